"""agent-saga with its write-ahead log in a file: `python -m bench.peers.agent_saga DIRECTORY DSN`.

As its documentation has it: `saga_scope` with one FileWAL for all sagas, and steps that are compensable, by a registered handler, so that
another process could undo them. An intent is on disk (fsync) before its step runs. A step that raised may have had its effect, so it
is compensated, too: five, where the others compensate four.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent_saga.context import SagaAborted
from agent_saga.decorator import saga_scope
from agent_saga.registry import compensator
from agent_saga.semantics import ActionSemantics, Compensation
from agent_saga.wal import FileWAL

from bench.peers.turns import WORLD, Fifth, Run, Unexpected, serve


async def step() -> dict[str, Any]:
    """Do it."""
    WORLD.done += 1
    return {}


async def failing() -> dict[str, Any]:
    """Fail."""
    raise Fifth


@compensator("undo")
async def undo() -> None:
    """Undo it."""
    WORLD.undone += 1


def _compensation(_result: dict[str, Any]) -> Compensation:
    return Compensation(fn=undo, handler="undo")


@asynccontextmanager
async def agent_saga(directory: Path, _dsn: str) -> AsyncIterator[Run]:
    """Run sagas on one log."""
    wal = FileWAL(directory / "saga.wal")
    await wal.start()

    async def run(fails: bool) -> None:
        try:
            async with saga_scope(wal=wal) as saga:
                for number in range(5):
                    forward = failing if fails and number == 4 else step
                    await saga.execute(f"step_{number}", ActionSemantics.COMPENSABLE, forward, compensate=_compensation)
        except SagaAborted as aborted:
            if not (fails and aborted.report.clean):
                raise
        else:
            if fails:
                raise Unexpected("expected an aborted saga")

    yield run
    await wal.close()


if __name__ == "__main__":
    WORLD.compensated = 5
    serve(agent_saga, "agent-saga")
