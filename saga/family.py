"""Who runs whom: a saga in its ledger, those whose stages run it, and those that its stages run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from saga.errors import LedgerCorrupt, MisuseError, SagaNotFound
from saga.recovery import SagaState
from saga.report import SagaReport

if TYPE_CHECKING:
    from saga.events import AnyEvent
    from saga.failures import Failure
    from saga.ledger import Entry, Ledger


async def events_of(ledger: Ledger, saga_id: str) -> Sequence[AnyEvent]:
    """All events of a saga, oldest first.

    Raises:
        SagaNotFound: The ledger has no such saga.
    """
    events = await ledger.read(saga_id)
    if not events:
        raise SagaNotFound("the id of a saga in the ledger", got=repr(saga_id))
    return events


async def report_of(ledger: Ledger, saga_id: str) -> SagaReport:
    """The report of a saga, with those that its stages run.

    Raises:
        SagaNotFound: The ledger has no such saga.
    """
    return await report_with_children(ledger, SagaState(await events_of(ledger, saga_id)), {})


async def report_with_children(ledger: Ledger, state: SagaState, exceptions: Mapping[Failure, BaseException]) -> SagaReport:
    """The report of a saga of which somebody has the state, with those that its stages run; it also tells which of them can't be read."""
    children: dict[str, tuple[SagaReport, ...]] = {}
    unread: dict[str, dict[str, str]] = {}
    for entry in await ledger.list(parent=state.started.saga_id):
        stage = str(entry.parent_stage)
        try:
            children[stage] = (*children.get(stage, ()), await report_of(ledger, entry.saga_id))
        except LedgerCorrupt as damage:
            # To read it again changes nothing, and what its parent did is known all the same.
            unread.setdefault(stage, {})[entry.saga_id] = str(damage)
    return SagaReport.of(state, children, exceptions, unread)


async def reports_of(ledger: Ledger, saga_id: str, stage: str, prefix: str) -> list[SagaReport]:
    """The children of a saga's stage, oldest first; those whose ids begin so."""
    entries = await ledger.list(parent=saga_id)
    ids = [entry.saga_id for entry in entries if entry.parent_stage == stage]
    return [await report_of(ledger, child) for child in ids if child == prefix or child.startswith(f"{prefix}#")]


async def below(ledger: Ledger, saga_id: str, stage: str | None = None) -> list[Entry]:
    """All sagas below a saga, or below one of its stages, the upper ones first."""
    found: list[Entry] = []
    for child in await ledger.list(parent=saga_id):
        if stage is None or child.parent_stage == stage:
            found += [child, *await below(ledger, child.saga_id)]
    return found


async def run_by(ledger: Ledger, state: SagaState) -> list[tuple[str, str]]:
    """The sagas and stages that run a saga, the outermost first; those of them that the ledger has."""
    found: list[tuple[str, str]] = []
    while (parent := state.started.parent) is not None and (events := await ledger.read(parent)):
        found.insert(0, (parent, str(state.started.parent_stage)))
        state = SagaState(events)
    return found


async def located(ledger: Ledger, state: SagaState, path: str) -> list[tuple[str, str]]:
    """The sagas and stages that a path leads through, from a saga on, the outermost first.

    Raises:
        MisuseError: It leads to no stage, or to several.
    """
    ways = await _ways(ledger, state, path)
    if not ways:
        raise MisuseError(f"a stage of saga {state.started.saga_id} ({', '.join(state.stages)})", got=repr(path))
    if len(ways) > 1:
        # Whichever is in question: said twice, a path that leads to what is left would lead to another one the second time.
        raise MisuseError(
            "the path of one stage",
            got=f"{path!r}, which leads to {len(ways)}",
            hint=f"Name one of them: {', '.join(map(_spelled_out, ways))}.",
        )
    return ways[0]


def _spelled_out(way: Sequence[tuple[str, str]]) -> str:
    """The path that leads this way and no other."""
    (outermost, _), (innermost, stage) = way[0], way[-1]
    return f"{innermost}/{stage}".removeprefix(f"{outermost}/")


async def _ways(ledger: Ledger, state: SagaState, path: str) -> list[list[tuple[str, str]]]:
    """Where a path may lead from a saga on."""
    saga_id = state.started.saga_id
    if path in state.stages:
        return [[(saga_id, path)]]
    first, _, rest = path.partition("/")
    children = await ledger.list(parent=saga_id) if rest else ()
    # Whoever has the very id that a path begins with is meant by it, whatever other sagas the stage has run.
    named = [child for child in children if child.saga_id == f"{saga_id}/{first}"]
    found: list[list[tuple[str, str]]] = []
    for child in named or [child for child in children if child.parent_stage == first]:
        inner = SagaState(await events_of(ledger, child.saga_id))
        found += [[(saga_id, str(child.parent_stage)), *way] for way in await _ways(ledger, inner, rest)]
    return found
