"""DBOS: `python -m bench.peers.dbos sqlite|sqlite-wal|postgres DIRECTORY DSN`.

An async workflow of async steps, as its documentation has it. It has no compensation of its own: what the workflow catches it undoes by
four more steps. On SQLite it leaves the journal and `synchronous` at SQLite's defaults (DELETE and FULL); `sqlite-wal` gives it a file
that is in WAL mode already, which is faster and as durable.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from dbos import DBOS

from bench.peers.turns import WORLD, Fifth, Run, Unexpected, serve


@DBOS.step()
async def step() -> None:
    """Do it."""
    WORLD.done += 1


@DBOS.step()
async def failing() -> None:
    """Fail."""
    raise Fifth


@DBOS.step()
async def undo() -> None:
    """Undo it."""
    WORLD.undone += 1


@DBOS.workflow()
async def five_steps(fails: bool) -> str:
    """Take five steps, or undo four."""
    try:
        for number in range(5):
            await (failing() if fails and number == 4 else step())
    except Fifth:
        for _ in range(4):
            await undo()
        return "compensated"
    return "completed"


@asynccontextmanager
async def dbos(directory: Path, dsn: str) -> AsyncIterator[Run]:
    """Run workflows on one database."""
    file = directory / "dbos.sqlite"
    if sys.argv[1] == "sqlite-wal":
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    url = dsn if sys.argv[1] == "postgres" else f"sqlite:///{file}"
    DBOS(config={"name": "bench", "system_database_url": url, "console_log_level": "CRITICAL", "enable_otlp": False})
    DBOS.launch()

    async def run(fails: bool) -> None:
        if (got := await five_steps(fails)) != ("compensated" if fails else "completed"):
            raise Unexpected(f"got {got}")

    yield run


if __name__ == "__main__":
    serve(dbos, "dbos")
