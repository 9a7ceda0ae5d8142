"""A person's word on a stage: settle."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from saga.cli.commands.given import AsJson, SagaId, Stage, json_object
from saga.cli.commands.ledger import LedgerUrl, durable, ledger_at, reach_of, refuse_unknown
from saga.cli.commands.printed import print_report
from saga.coordinator import SagaCoordinator
from saga.events import Verdict
from saga.report import SagaReport


def settle(
    saga_id: SagaId,
    stage: Stage,
    verdict: Annotated[
        Verdict, typer.Argument(metavar="VERDICT", help="undone: nothing of it stands. kept: it stands, and is to. retry: try once more.")
    ],
    note: Annotated[str, typer.Option("--note", help="Why; for whoever reads the ledger later.")],
    output: Annotated[
        str | None, typer.Option("--output", metavar="JSON|@FILE", help="With kept: the output data of a stage that gave none.")
    ] = None,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say what became of a stage that is stuck or in doubt."""
    data = None if output is None else json_object(output, "--output")
    reach = reach_of(None, ledger)

    async def settled() -> SagaReport:
        async with ledger_at(durable(ledger)) as opened:
            await refuse_unknown(opened, saga_id)
            return await SagaCoordinator(ledger=opened).settle(saga_id, stage, verdict, note, output=data)

    print_report(asyncio.run(settled()), reach, as_json=as_json)
