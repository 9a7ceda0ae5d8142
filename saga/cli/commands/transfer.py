"""Taking sagas from one ledger to another: export and import."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from saga.cli.commands.given import SagaId
from saga.cli.commands.ledger import LedgerUrl, durable, ledger_at, refuse_unknown
from saga.cli.commands.printed import print_json
from saga.cli.family import Family
from saga.errors import LedgerCorrupt, LedgerError, MisuseError, PolicyInvalid, SagaExists
from saga.events import AnyEvent, SagaStarted, event_from_json, event_to_json, line_of
from saga.keys import is_within
from saga.ledger import Ledger
from saga.recovery.state import SagaState
from saga.text import bytes_of, printable

_END_OF_EXPORT: Final = re.compile(r'\{"events":(\d+)\}\s*$')


def export(saga_id: SagaId, ledger: LedgerUrl = None) -> None:
    """Write the events of a saga, and of those that its stages run, as JSON lines, and how many there are."""

    async def events() -> list[AnyEvent]:
        async with ledger_at(durable(ledger)) as opened:
            await refuse_unknown(opened, saga_id)
            family = await Family.read(opened, saga_id)
            return [event for member in family.sagas for event in await opened.read(member)]

    written = asyncio.run(events())
    for event in written:
        print_json(event_to_json(event))
    print_json(f'{{"events":{len(written)}}}')


def import_(
    file: Annotated[typer.FileText, typer.Argument(metavar="FILE", encoding="utf-8", help="What export wrote; - for stdin.")],
    ledger: LedgerUrl = None,
) -> None:
    """Take over sagas that `saga export` has written, also from another ledger."""
    try:
        sagas = _sagas_in(file)
    except UnicodeDecodeError as error:
        raise MisuseError("what saga export writes, which is UTF-8", got=str(error), hint="Nothing was imported.") from None

    async def taken_over() -> list[str]:
        async with ledger_at(durable(ledger), exists=False) as opened:
            there = [saga_id for saga_id, events in sagas.items() if await _is_there(opened, saga_id, events)]
            if len(there) == len(sagas):
                return there  # and somebody may have begun to go on with them
            for saga_id, events in sagas.items():
                _refuse_too_large(opened.max_event_bytes, saga_id, events)
            # Held until the last one is there, and children first: who goes on with a saga whose children are still to come would begin
            # them anew, also when the import has been killed. Whoever imports the same file again holds what that one held.
            owner = f"import-{sha256(line_of(next(iter(sagas.values()))[0]).encode()).hexdigest()[:16]}"
            tokens = {}
            for saga_id in sorted(sagas, key=_slashes, reverse=True):
                begun = opened.acquire(saga_id, owner) if saga_id in there else opened.create(saga_id, owner, sagas[saga_id])
                tokens[saga_id] = await begun
            for saga_id, token in tokens.items():
                await opened.release(saga_id, token)
            return there

    there = asyncio.run(taken_over())
    for saga_id, events in sagas.items():
        typer.echo(f"{printable(saga_id)}  {SagaState(events).status.value}{', was there already' if saga_id in there else ''}")


def _slashes(saga_id: str) -> int:
    """How many there are: more than in the id of the saga that runs this one, with which this one's begins."""
    return saga_id.count("/")


async def _is_there(ledger: Ledger, saga_id: str, events: Sequence[AnyEvent]) -> bool:
    """Whether the ledger has the saga already, with these events and no others: an import may have been killed.

    Raises:
        SagaExists: It has another one of that id.
    """
    found = await ledger.read(saga_id)
    if found and list(map(line_of, found)) != list(map(line_of, events)):
        raise SagaExists("a saga id that is not in the ledger yet", got=repr(saga_id), hint="Nothing was imported.")
    return bool(found)


def _refuse_too_large(most: int | None, saga_id: str, events: Sequence[AnyEvent]) -> None:
    """Refuse what the ledger would refuse only when it has taken other sagas already.

    Raises:
        LedgerError: One of the events has more bytes of JSON than it takes.
    """
    largest = max(events, key=lambda event: bytes_of(line_of(event)))
    size = bytes_of(line_of(largest))
    if most is not None and size > most:
        got = f"{size:,}, {type(largest).__name__} of saga {saga_id}"
        raise LedgerError(f"expected at most {most:,} bytes of JSON in one event (max_event_bytes), got {got}; nothing was imported")


def _sagas_in(lines: Iterator[str]) -> dict[str, list[AnyEvent]]:
    sagas: dict[str, list[AnyEvent]] = {}
    current: list[AnyEvent] | None = None
    before = 0
    for number, line in enumerate(lines, 1):
        if (end := _END_OF_EXPORT.match(line)) is not None:
            if int(end[1]) != before:
                raise LedgerCorrupt(f"expected {end[1]} events before line {number}, got {before}: an export was cut; nothing was imported")
            current, before = None, 0
            continue
        before += 1
        event = _event_in(line, number)
        if isinstance(event, SagaStarted):
            if event.saga_id in sagas:
                raise LedgerCorrupt(f"line {number} begins saga {event.saga_id} a second time; nothing was imported")
            current = sagas[event.saga_id] = []
        if current is None:
            raise LedgerCorrupt(f"expected SagaStarted in line {number}, got {type(event).__name__}; nothing was imported")
        current.append(event)
    if not sagas:
        raise MisuseError("at least one saga", got="a file without any", hint="Nothing was imported.")
    if before:
        # Whoever goes on with a saga that lacks its end does that part of it again.
        raise LedgerCorrupt("expected at the end how many events there are, got none: the file was cut; nothing was imported")
    _refuse_what_makes_no_sense(sagas)
    return sagas


def _event_in(line: str, number: int) -> AnyEvent:
    try:
        return event_from_json(line)
    except ValidationError as error:
        why = f"got {error.errors()[0]['msg']}"
    except PolicyInvalid as error:
        # Whoever wrote it had a policy that is one.
        why = f"got one of another version of saga: {error}"
    raise LedgerCorrupt(f"expected an event of a saga in line {number}, {why}; nothing was imported")


def _refuse_what_makes_no_sense(sagas: Mapping[str, Sequence[AnyEvent]]) -> None:
    try:
        states = {saga_id: SagaState(events) for saga_id, events in sagas.items()}
    except LedgerCorrupt as error:
        raise LedgerCorrupt(f"{error} Nothing was imported.") from None
    for saga_id, state in states.items():
        parent, stage = state.started.parent, state.started.parent_stage
        if parent is None:
            continue
        if not is_within(f"{saga_id}/", f"{parent}/{stage}"):
            # So none runs itself, not even through others.
            why = f"saga {saga_id} is not one that stage {stage!r} of saga {parent} runs: its id would begin with {parent}/{stage}"
            raise LedgerCorrupt(f"{why}; nothing was imported")
        if parent not in states:
            # What goes on with it, or lists it, begins with that one.
            hint = f"Export {parent}. Nothing was imported."
            raise MisuseError(f"the saga {parent}, which runs {saga_id}, in the file, too", got="none", hint=hint)
        if stage not in states[parent].stages:
            # No report would tell of it.
            why = f"stage {stage!r} of saga {parent}, which is said to run saga {saga_id}, is not among its stages"
            raise LedgerCorrupt(f"{why} ({', '.join(states[parent].stages)}); nothing was imported")
