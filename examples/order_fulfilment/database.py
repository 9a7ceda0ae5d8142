"""One SQLite file, and the thread that works on it."""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


class Database:
    """A database whose transactions run one after another, in the order in which they were asked for.

    This order makes a probe's answer final. Who loses patience stops waiting, but doesn't stop a transaction that has begun:
    it may still be committed. What is asked afterwards comes after it, so it sees what became of it.
    """

    SCHEMA: ClassVar[str]

    def __init__(self, path: Path) -> None:
        """Open the file, and make its tables if it is new."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=path.stem)
        self._connection = self._thread.submit(self._open, path).result()

    def _open(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None)
        # A write-ahead log with synchronous=NORMAL survives a crash of the process, and a commit need not wait for the disk.
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;" + self.SCHEMA)
        return connection

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a piece of work as one transaction: committed when it returns, rolled back when it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    async def write(self, sql: str, *rows: tuple[object, ...]) -> None:
        """Run one statement for every row, as one transaction."""

        def work(db: sqlite3.Connection) -> None:
            db.executemany(sql, rows)

        await self.transact(work)

    async def first(self, sql: str, *values: object) -> Any:
        """The first column of the first row that a query finds, or None."""

        def work(db: sqlite3.Connection) -> Any:
            row = db.execute(sql, values).fetchone()
            return None if row is None else row[0]

        return await self.transact(work)

    async def clear(self) -> None:
        """Take out every row."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("PRAGMA defer_foreign_keys = ON")
            for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - the names are those of the schema

        await self.transact(work)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            return work(connection)

    def close(self) -> None:
        """Close the file, after all that was asked for."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
