"""saga itself: `python -m bench.peers.ours memory|sqlite|postgres DIRECTORY DSN`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from bench.peers.turns import WORLD, Fifth, Run, Unexpected, serve
from bench.workloads import chain, pipeline
from saga import CompensableStage, CompensationContext, Ledger, MemoryLedger, SagaContext, SagaCoordinator, SagaStatus
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.sqlite import SQLiteLedger


class Step(CompensableStage):
    """Does and undoes nothing but what is counted."""

    async def execute(self, _ctx: SagaContext) -> None:
        """Do it."""
        WORLD.done += 1

    async def compensate(self, _ctx: CompensationContext) -> None:
        """Undo it."""
        WORLD.undone += 1


class Fails(Step):
    """Fails."""

    async def execute(self, _ctx: SagaContext) -> None:
        """Fail."""
        raise Fifth


@asynccontextmanager
async def saga(directory: Path, dsn: str) -> AsyncIterator[Run]:
    """Run sagas on one ledger."""
    ledgers: dict[str, Callable[[], Ledger]] = {
        "memory": MemoryLedger,
        "sqlite": lambda: SQLiteLedger(directory / "sagas.db"),
        "postgres": lambda: PostgresLedger(dsn),
    }
    ledger = ledgers[sys.argv[1]]()
    coordinator = SagaCoordinator(ledger=ledger)
    pipelines = {
        False: (pipeline(chain(5), Step), SagaStatus.COMPLETED),
        True: (pipeline(chain(5), Step, last=Fails), SagaStatus.COMPENSATED),
    }

    async def run(fails: bool) -> None:
        what, expected = pipelines[fails]
        report = await coordinator.run(what)
        if report.status is not expected:
            raise Unexpected(f"expected {expected.value}, got {report.status.value}")

    try:
        yield run
    finally:
        await ledger.close()


if __name__ == "__main__":
    serve(saga, "stageflow-core", "pydantic")
