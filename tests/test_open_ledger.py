"""Ledgers by their URL."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stageflow.api import Pipeline

from saga import MemoryLedger, MisuseError, SagaCoordinator, compensable
from saga.ledgers import open_ledger
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.sqlite import SQLiteLedger
from tests.world import nothing


def test_a_url_says_which_ledger_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    here, anywhere = open_ledger("sqlite:///sagas.db"), open_ledger("sqlite:////var/lib/sagas.db")

    assert isinstance(open_ledger("memory:"), MemoryLedger)
    assert isinstance(here, SQLiteLedger)
    assert here.path == tmp_path / "sagas.db"
    assert isinstance(anywhere, SQLiteLedger)
    assert anywhere.path == Path("/var/lib/sagas.db")


@pytest.mark.parametrize("url", ["memory:", "sqlite:///sagas.db"])
def test_a_ledger_may_be_opened_for_the_length_of_a_block(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    async def used() -> list[str]:
        async with open_ledger(url) as ledger:
            await SagaCoordinator(ledger=ledger).run(Pipeline(name="trip").with_stage("book", compensable(nothing, nothing)))
            return [entry.pipeline for entry in await ledger.list()]

    assert asyncio.run(used()) == ["trip"]


def test_a_file_that_is_to_be_there_already_is_refused_where_it_is_not(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/sagas.db"
    with pytest.raises(MisuseError) as caught:
        open_ledger(url, exists=True)

    assert str(caught.value) == f"expected a ledger that is there, got {url}, and there is no file {tmp_path}/sagas.db"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_a_url_of_postgresql_is_handed_to_libpq(scheme: str) -> None:
    ledger = open_ledger(f"{scheme}://ann@db.example:5433/shop")

    assert isinstance(ledger, PostgresLedger)
    assert repr(ledger) == "PostgresLedger('shop', schema='saga')"


@pytest.mark.parametrize(
    "url", ["", "memory", "memory:x", "sqlite:sagas.db", "sqlite://sagas.db", "sqlite:///", "postgresql:x", "mysql://ann:s3cret@db/x"]
)
def test_any_other_url_is_refused_and_kept_secret(url: str) -> None:
    with pytest.raises(MisuseError, match=r"expected a ledger's URL: memory:, sqlite:///path or postgresql://..., got") as caught:
        open_ledger(url)

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["host=db user=ann password=s3cret dbname=shop", "password=s3cret hostaddr=::1", "ann/s3cret@db.example", "ann@db:5433/shop"]
)
def test_what_names_no_scheme_is_refused_and_kept_secret(given: str) -> None:
    """As a connection string of libpq, which a `PostgresLedger` takes."""
    with pytest.raises(MisuseError) as caught:
        open_ledger(given)

    hint = "PostgresLedger(...) takes a connection string of libpq, too"
    assert str(caught.value) == f"expected a ledger's URL: memory:, sqlite:///path or postgresql://..., got one without a scheme. {hint}."


@pytest.mark.parametrize("url", ["sqlite:sagas.db", "sqlite:/sagas.db", "sqlite://sagas.db", "sqlite:///"])
def test_a_url_of_sqlite_with_too_few_slashes_is_told_how_many_it_takes(url: str) -> None:
    with pytest.raises(
        MisuseError, match=r"got 'sqlite:'\. Three slashes for a path from here, sqlite:///sagas\.db; four from the root\.$"
    ):
        open_ledger(url)


@pytest.mark.parametrize("url", ["sqlite:///sagas.db?password=s3cret", "sqlite:///sagas.db\n", "sqlite:////var/lib/sagas.db "])
def test_a_url_that_would_be_another_file_than_it_looks_is_refused(url: str) -> None:
    """As one with the options that other libraries take, or one read from a file with its line's end."""
    with pytest.raises(MisuseError, match=r"^expected a path without options, and without spaces around it, behind sqlite:///") as caught:
        open_ledger(url)

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///sagas.db", "sqlite://sagas.db", "SQLite:///sagas.db", "postgresql://ann:s3cret@db/shop"])
def test_a_url_in_place_of_a_path_is_refused_and_kept_secret(url: str) -> None:
    with pytest.raises(MisuseError, match=r"^expected the path of a file, got a URL\. saga\.ledgers\.open_ledger\(url\) opens it\.$"):
        SQLiteLedger(url)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (open_ledger, "a ledger's URL: memory:, sqlite:///path or postgresql://..."),
        (SQLiteLedger, "the path of a file"),
        (PostgresLedger, "a connection string or URL of PostgreSQL"),
    ],
)
@pytest.mark.parametrize("given", [None, b"sqlite:///sagas.db", 5])
def test_a_variable_that_is_not_set_or_is_no_text_is_refused_in_words(made: Any, expected: str, given: Any) -> None:
    with pytest.raises(MisuseError) as caught:
        made(given)

    assert str(caught.value) == f"expected {expected}, got a {type(given).__name__}"


def test_a_path_that_only_looks_like_a_url_is_one(tmp_path: Path) -> None:
    assert SQLiteLedger(tmp_path / "sqlite:" / "sagas.db").path == tmp_path / "sqlite:" / "sagas.db"
    assert SQLiteLedger("sagas:today.db").path == Path("sagas:today.db").absolute()


def test_importing_saga_brings_no_database() -> None:
    code = "import sys, saga; print([name for name in sys.modules if name.startswith(('sqlite3', 'psycopg', 'saga.ledgers'))])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
