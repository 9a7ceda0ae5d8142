"""The commands that look at sagas: list, show and watch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from heapq import merge
from itertools import count, groupby
from typing import Annotated, Final

import typer
from pydantic import TypeAdapter

from saga.cli.commands.given import AsJson, SagaId
from saga.cli.commands.ledger import LedgerUrl, durable, ledger_at, reach_of, refuse_unknown
from saga.cli.commands.printed import print_json, print_report
from saga.cli.exits import Exit, exit_of_status
from saga.cli.family import Family
from saga.cli.view import Stderr, view
from saga.coordinator import SagaCoordinator
from saga.errors import LedgerCorrupt, SagasDamaged
from saga.events import SagaStatus
from saga.ledger import ALIVE, Entry, is_held, listed
from saga.render.lettering import aligned
from saga.render.reach import command_for, recover_command
from saga.report import SagaReport
from saga.text import printable

_LOOKS: Final = 0.25
"""Seconds between two looks of `saga watch` into the ledger."""
_SELDOM: Final = 8
"""How many of them there are to one for who runs the saga: that one goes through the whole ledger."""


def list_(
    statuses: Annotated[list[SagaStatus] | None, typer.Option("--status", help="Only those that stand so; may be repeated.")] = None,
    nested: Annotated[bool, typer.Option("--nested", help="Also those that stages of other sagas run.")] = False,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """List the sagas, oldest first."""

    async def entries() -> tuple[list[Entry], Mapping[str, LedgerCorrupt]]:
        async with ledger_at(durable(ledger)) as opened:
            known, damaged = await listed(opened, statuses or None)
            shown = [entry for entry in known.values() if nested or entry.parent is None]
            # The ledger has them as they came to it, those that were imported behind all that ran there before.
            return sorted(shown, key=lambda entry: entry.started_at), damaged

    found, damaged = asyncio.run(entries())
    if as_json:
        print_json(TypeAdapter(list[Entry]).dump_json(found).decode())
    else:
        cells = [
            (printable(entry.saga_id), printable(entry.pipeline), entry.status.value, _when(entry.started_at), _runs(entry))
            for entry in found
        ]
        for line in aligned([("ID", "PIPELINE", "STATUS", "STARTED", ""), *cells]):
            typer.echo(line)
    if damaged:
        raise SagasDamaged(damaged, found)


def _when(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _runs(entry: Entry) -> str:
    if entry.status not in ALIVE:
        return ""
    return "somebody runs it" if is_held(entry) else "nobody runs it"


def show(saga_id: SagaId, ledger: LedgerUrl = None, as_json: AsJson = False) -> None:
    """Show what became of a saga, and what is to be done about it."""
    reach = reach_of(None, ledger)

    async def report() -> SagaReport:
        async with ledger_at(durable(ledger)) as opened:
            await refuse_unknown(opened, saga_id)
            return await SagaCoordinator(ledger=opened).report(saga_id)

    print_report(asyncio.run(report()), reach, as_json=as_json)


def watch(saga_id: SagaId, ledger: LedgerUrl = None, as_json: AsJson = False) -> None:
    """Look on while another process runs a saga, until it has come to rest or nobody runs it any more."""
    reach = reach_of(None, ledger)

    async def looking_on() -> tuple[SagaReport, str | None]:
        async with ledger_at(durable(ledger)) as opened:
            await refuse_unknown(opened, saga_id)
            coordinator, family, left = SagaCoordinator(ledger=opened), await Family.read(opened, saga_id), None
            looks = count()
            async with view(family, Stderr()) as hear:
                while True:
                    # What it is told by: somebody may go on right now with a saga that has come to rest.
                    report = await coordinator.report(saga_id)
                    news = groupby([told async for told in family.news(opened)], lambda told: told[0])
                    # By the clock, but of each saga in its own order, whatever the clock did.
                    for member, event in merge(*(list(of_one) for _, of_one in news), key=lambda told: told[1].at):
                        hear(member, event)
                    if report.ended_at is not None or left is not None:
                        return report, left
                    await asyncio.sleep(_LOOKS)
                    if next(looks) % _SELDOM == 0:
                        left = _left_behind(saga_id, *await listed(opened, ALIVE))

    try:
        report, left = asyncio.run(looking_on())
    except KeyboardInterrupt:
        typer.echo(f"Watching {saga_id} no longer; it goes on by itself.", err=True)
        raise typer.Exit(Exit.INTERRUPTED) from None
    print_report(report, reach, as_json=as_json)
    if left is None:
        raise typer.Exit(exit_of_status(report.status))
    typer.echo(f"Nobody runs {saga_id} any more: its process is gone, or has not said for as long as its lease that it is alive.", err=True)
    resume = command_for("resume", left, reach)
    typer.echo(f"What goes on with it: {resume}; with all whose process is gone: {recover_command(reach)}", err=True)
    raise typer.Exit(Exit.LEFT)


def _left_behind(saga_id: str, alive: Mapping[str, Entry], damaged: Mapping[str, LedgerCorrupt]) -> str | None:
    """The saga to go on with, if nobody runs this one any more: itself, or the outermost one that runs it."""
    if saga_id in damaged:
        raise damaged[saga_id]
    entry = alive.get(saga_id)
    while entry is not None and entry.parent is not None and entry.parent in alive:
        entry = alive[entry.parent]
    return None if entry is None or is_held(entry) else entry.saga_id
