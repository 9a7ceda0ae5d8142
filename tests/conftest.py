"""What tests share: signals that are heard, a PostgreSQL server that is started once, places for durable ledgers, and no limit to the time
of one drawn case.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.places import Place, PostgresSchema, SQLiteFile, postgres_server

# What a shell runs in the background has to ignore Ctrl-C, and what nohup runs that its terminal is closed; so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

pytest_plugins = ("pytester", "saga.pytest_plugin")

# A machine that does other things, too, is no defect; pytest's own timeout stops what hangs.
settings.register_profile("saga", deadline=None)
settings.load_profile("saga")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def new_schema() -> Callable[[], str]:
    """Gives the name of a schema that nobody has used."""
    numbers = itertools.count()
    return lambda: f"saga {next(numbers)}"


@pytest.fixture(params=["sqlite", "postgres"])
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return SQLiteFile(tmp_path / "sagas.db")
    return PostgresSchema(request.getfixturevalue("postgres").get_uri(), request.getfixturevalue("new_schema")())
