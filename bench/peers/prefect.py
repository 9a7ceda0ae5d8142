"""Prefect's transactions: `python -m bench.peers.prefect DIRECTORY DSN`.

A flow with a `transaction()` around five tasks that persist their results and have an `on_rollback` hook, as its documentation has it, with
the server that it starts by itself. Its results are files without an fsync, and its server's SQLite has `synchronous=NORMAL`: it
survives a killed process, not a loss of power.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

# Before the import, which reads them.
os.environ |= {
    "PREFECT_HOME": sys.argv[-2],
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "80",
}

from prefect import flow, task
from prefect.transactions import atransaction

from bench.peers.turns import WORLD, Fifth, Run, Unexpected, serve


@task(persist_result=True)
async def step(_number: int) -> None:
    """Do it."""
    WORLD.done += 1


@step.on_rollback
def undo(_transaction: Any) -> None:
    """Undo it."""
    WORLD.undone += 1


@task(persist_result=True)
async def failing() -> None:
    """Fail."""
    raise Fifth


@flow
async def five_steps(fails: bool) -> None:
    """Take five steps in one transaction."""
    async with atransaction():
        for number in range(4):
            await step(number)
        await (failing() if fails else step(4))


@asynccontextmanager
async def prefect(_directory: Path, _dsn: str) -> AsyncIterator[Run]:
    """Run flows."""

    async def run(fails: bool) -> None:
        try:
            await five_steps(fails)
        except Fifth:
            if not fails:
                raise
        else:
            if fails:
                raise Unexpected("expected the failure of the fifth step")

    yield run


if __name__ == "__main__":
    serve(prefect, "prefect")
