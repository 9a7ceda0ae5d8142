"""A ledger in a file when something is wrong: the file, the disk, the process that writes, what is to be stored."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing.context import ForkProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stageflow.api import Pipeline, StageOutput

from saga import FailFast, LedgerError, MemoryLedger, MisuseError, SagaCoordinator, SagaReport, SagaStatus
from saga.errors import LedgerCorrupt, SagaUnrecorded
from saga.events import AnyEvent, EffectRecorded, SagaResumed, SagaStarted, StageCompleted, StageStarted, event_to_json
from saga.ledger import ALIVE
from saga.ledgers import open_ledger, sqlite, workers
from saga.ledgers.guards import Guard
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.rows import Prune, Writer, checksum
from saga.ledgers.sqlite import MIGRATIONS, SQLiteLedger
from saga.tasks import this_task
from tests.interrupting import interrupt_next_call
from tests.places import SQLiteFile
from tests.scripts.appending import AT_ONCE, SAGAS
from tests.scripts.unsynced import CALLS
from tests.test_ledger_contract import DONE, FIRST, SECOND, acquire, append, create, fork, forks, listed, on, prune, read, started
from tests.world import SEQUENCE, Script, nothing, scene

EVENTS = (started(), FIRST, SECOND, DONE)
RECORDED = (create(), append(FIRST), append(SECOND, version=2), create("other"), append(DONE, version=3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sagas.db"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a ledger that holds `EVENTS`."""
    path = tmp_path_factory.mktemp("whole") / "sagas.db"
    on(SQLiteLedger(path), *RECORDED)
    return path.read_bytes()


def execute(path: Path, *statements: str) -> None:
    """Do something to the file past the ledger."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def large(size: int = 300_000) -> StageCompleted:
    return StageCompleted(stage="a", output=StageOutput.ok({"text": "x" * size}))


# -- a file that is damaged ------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_gives_its_events_or_an_error_and_stays_as_it_is(whole: bytes, path: Path) -> None:
    for length in sorted({*range(0, len(whole), 509), *range(0, len(whole), 4096), 1, 99, 100, len(whole) - 1}):
        path.write_bytes(whole[:length])

        answers = on(SQLiteLedger(path), read(), listed())

        for answer in answers:
            assert answer in (EVENTS, ["s", "other"]) or isinstance(answer, LedgerError), length
        assert path.read_bytes() == whole[:length]


def test_a_file_that_lacks_pages_is_refused(whole: bytes, path: Path) -> None:
    for length in range(0, len(whole), 4096):
        path.write_bytes(whole[:length])

        answers = on(SQLiteLedger(path), read(), listed(), append(FIRST, version=4), create("new"), prune())

        assert all(isinstance(answer, LedgerCorrupt) for answer in answers), length
        assert all("Nothing was changed" in str(answer) for answer in answers), length
        assert path.read_bytes() == whole[:length]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
@example(flips=[8 * 19 + 1])
def test_a_file_with_flipped_bits_gives_its_events_or_an_error_and_stays_as_it_is(whole: bytes, path: Path, flips: list[int]) -> None:
    damaged = bytearray(whole)
    for flip in flips:
        damaged[flip // 8 % len(whole)] ^= 1 << flip % 8
    path.write_bytes(damaged)

    events, other = on(SQLiteLedger(path), read(), read("other"))

    assert events == EVENTS or isinstance(events, LedgerError)
    assert other == (started("other"),) or isinstance(other, LedgerError)
    left = path.read_bytes()
    if damaged[19] < whole[19] and left != damaged:
        # By its format it has no log yet, as a copy that VACUUM INTO made, and is given one; SQLite counts that.
        for field in (slice(18, 20), slice(24, 28), slice(92, 96)):
            damaged[field] = left[field]
    assert left == damaged


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The bytes of a ledger that holds `EVENTS`, all of them still in its log, and those of the log."""
    path = tmp_path_factory.mktemp("log") / "sagas.db"

    async def while_it_is_open(_: Any) -> tuple[bytes, bytes]:
        return await asyncio.to_thread(path.read_bytes), await asyncio.to_thread(path.with_name("sagas.db-wal").read_bytes)

    found: tuple[bytes, bytes] = on(SQLiteLedger(path), *RECORDED, while_it_is_open)[-1]
    return found


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_of_a_log_that_is_damaged_the_appends_before_the_damage_are_there_whole(log: tuple[bytes, bytes], path: Path, damage: str) -> None:
    """SQLite takes a log to end where it is damaged, as after a crash, and tells nobody: the docs say so."""
    found = []
    for place in range(0, len(log[1]), 4099):
        for name, content in zip(("sagas.db", "sagas.db-wal"), log, strict=True):
            path.with_name(name).write_bytes(content)
        with path.with_name("sagas.db-wal").open("r+b") as file:
            if damage == "cut":
                file.truncate(place)
            else:
                file.seek(place)
                file.write(bytes([log[1][place] ^ 1]))

        events, other, appended = on(SQLiteLedger(path), read(), read("other"), create("new"))

        found.append(len(events))
        assert events == EVENTS[: len(events)], place
        assert other in ((), (started("other"),)), place
        assert appended == 1, place
        for left in ("sagas.db-wal", "sagas.db-shm"):
            path.with_name(left).unlink(missing_ok=True)
    assert len(set(found)) > 2


UNKNOWN = '{"type":"nothing that we know"}'
UNREADABLE = event_to_json(EffectRecorded(stage="a", effect="it")).replace('"it"', '{"$saga":"set","value":[{"row":1}]}')
BY_HAND = {
    "swapped": ("UPDATE events SET first = -first WHERE saga = 's'", "UPDATE events SET first = first + 3 WHERE saga = 's'"),
    "first one deleted": ("DELETE FROM events WHERE saga = 's' AND first = 0",),
    "middle one deleted": ("DELETE FROM events WHERE saga = 's' AND first = 1",),
    "middle one deleted and not counted": (
        "DELETE FROM events WHERE saga = 's' AND first = 1",
        "UPDATE sagas SET version = 3 WHERE id = 's'",
    ),
    "last one deleted": ("DELETE FROM events WHERE saga = 's' AND first = 3",),
    "all deleted": ("DELETE FROM events WHERE saga = 's'",),
    "only the saga's row deleted": ("DELETE FROM sagas WHERE id = 's'",),
    "body changed": ("UPDATE events SET body = replace(body, '\"a\"', '\"b\"') WHERE saga = 's'",),
    "body taken from another place": (
        """UPDATE events SET (body, checksum) = (SELECT body, checksum FROM events AS e WHERE e.saga = 's' AND e.first = 1)
        WHERE saga = 's' AND first = 2""",
    ),
    "body taken from another saga": (
        """UPDATE events SET (body, checksum) = (SELECT body, checksum FROM events AS e WHERE e.saga = 'other')
        WHERE saga = 's' AND first = 0""",
    ),
    "body no text": ("UPDATE events SET body = x'ff00' WHERE saga = 's'",),
    "place no number": ("UPDATE events SET first = 'zero' WHERE saga = 's' AND first = 0",),
    "checksum no number": ("UPDATE events SET checksum = 'none' WHERE saga = 's'",),
    "event of another version of saga": (
        f"UPDATE events SET body = '{UNKNOWN}', checksum = {checksum('s', 3, UNKNOWN.encode())} WHERE first = 3",  # noqa: S608 - constants
    ),
    "set of what can't be in one": (
        f"UPDATE events SET body = '{UNREADABLE}', checksum = {checksum('s', 3, UNREADABLE.encode())} WHERE first = 3",  # noqa: S608 - as above
    ),
    "count changed": ("UPDATE sagas SET version = 3 WHERE id = 's'",),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_rows_that_are_not_as_they_were_written_are_refused_and_other_sagas_are_read(whole: bytes, path: Path, case: str) -> None:
    path.write_bytes(whole)
    execute(path, *BY_HAND[case])
    damaged = path.read_bytes()

    events, other = on(SQLiteLedger(path), read(), read("other"))

    assert isinstance(events, LedgerCorrupt)
    assert "saga s can't be read at event" in str(events)
    assert "Nothing was changed" in str(events)
    assert other == (started("other"),)
    assert path.read_bytes() == damaged != whole


LATER = '"later":1,'
RESUMED = SagaResumed(forward=True, by="me", policy=FailFast())
OF_A_NEWER_VERSION: dict[str, tuple[AnyEvent, str, str, str]] = {
    "an event": (FIRST, '"stage_started"', '"stage_put_off"', "Input tag 'stage_put_off'"),
    "a field of an event": (FIRST, '"attempt"', f'{LATER}"attempt"', "later: Unexpected keyword argument"),
    "a key of a policy": (RESUMED, '"in_flight"', f'{LATER}"in_flight"', "expected one of retry, timeout, compensation"),
}


@pytest.mark.parametrize("case", OF_A_NEWER_VERSION)
def test_what_a_newer_version_of_saga_wrote_is_not_called_damaged_nor_read_without_what_is_new(path: Path, case: str) -> None:
    event, old, new, why = OF_A_NEWER_VERSION[case]
    on(SQLiteLedger(path), create(), append(event))
    body = event_to_json(event).replace(old, new)
    assert new in body
    execute(path, f"UPDATE events SET body = '{body}', checksum = {checksum('s', 1, body.encode())} WHERE first = 1")  # noqa: S608 - constants

    (unread,) = on(SQLiteLedger(path), read())

    assert isinstance(unread, LedgerCorrupt)
    assert str(unread).startswith("saga s can't be read at event 1: that is no event of this version of saga: ")
    assert why in str(unread)
    assert "Nothing was changed. If a newer version wrote it, go on with that one; else " in str(unread)


@pytest.mark.parametrize("case", BY_HAND)
def test_nobody_goes_on_with_a_saga_that_cannot_be_read_and_the_file_stays_as_it_is(path: Path, case: str) -> None:
    last = EffectRecorded(stage="a", effect=1)
    on(
        SQLiteLedger(path),
        create(),
        append(FIRST),
        append(SECOND, version=2),
        create("other", "me", DONE),
        append(last, version=3, release=True),
    )
    execute(path, *BY_HAND[case])
    damaged = path.read_bytes()
    pipeline = Pipeline(name="p").with_stage("a", nothing, "work")

    async def play() -> list[str]:
        async with SQLiteLedger(path) as ledger:
            saga = SagaCoordinator(ledger=ledger)
            deeds = [
                saga.report("s"), saga.resume("s", pipeline), saga.compensate("s", pipeline), saga.settle("s", "a", "undone", "seen"),
                saga.run(pipeline, saga_id="s"),
            ]  # fmt: skip
            for deed in deeds:
                with pytest.raises(LedgerCorrupt, match="Nothing was changed"):
                    await deed
            recovery = await saga.recover([pipeline])
            assert all(isinstance(error, LedgerCorrupt) for error in recovery.failed.values())
            return list(recovery.failed)

    failed = asyncio.run(play())

    assert failed == ([] if case == "only the saga's row deleted" else ["s"])
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("change", ["status = 'lost'", "started_at = 'long ago'", "updated_at = x'00'"])
def test_a_saga_of_which_no_sense_can_be_made_is_not_listed_as_something_else(whole: bytes, path: Path, change: str) -> None:
    path.write_bytes(whole)
    execute(path, f"UPDATE sagas SET {change} WHERE id = 's'")  # noqa: S608 - constants

    entries, events = on(SQLiteLedger(path), listed(), read())

    assert isinstance(entries, LedgerCorrupt)
    assert events == EVENTS


def test_no_flipped_bit_of_a_status_hides_a_saga_that_is_to_be_recovered(whole: bytes, path: Path) -> None:
    places = [found.start() + place for found in re.finditer(b"running", whole) for place in range(len("running"))]
    assert len(places) == 2 * len("running")  # in the saga's row, and in an index

    for place, bit in product(places, range(8)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)

        (alive,) = on(SQLiteLedger(path), listed(statuses=ALIVE))

        assert alive == ["other"] or isinstance(alive, LedgerError), (place, bit)


@pytest.mark.parametrize("status", ["'lost'", "x'00'"])
def test_a_saga_whose_status_makes_no_sense_is_not_passed_over(whole: bytes, path: Path, status: str) -> None:
    path.write_bytes(whole)
    execute(path, f"UPDATE sagas SET status = {status} WHERE id = 'other'")  # noqa: S608 - constants

    alive, done = on(SQLiteLedger(path), listed(statuses=ALIVE), listed(statuses={SagaStatus.COMPLETED}))

    assert isinstance(alive, LedgerCorrupt)
    assert isinstance(done, LedgerCorrupt)


def test_a_row_that_is_in_the_way_harms_only_the_saga_whose_it_is(path: Path) -> None:
    on(SQLiteLedger(path), create())
    execute(path, "INSERT INTO events (saga, first, checksum, body) VALUES ('bad', 0, 0, '')")

    async def together(ledger: Any) -> list[Any]:
        with locked(path):  # so that the others are there when the first is done
            asked = [asyncio.create_task(create(name)(ledger)) for name in ("first", "second", "bad", "third")]
            await asyncio.sleep(0)
        return await asyncio.gather(*asked, return_exceptions=True)

    answers, sagas = on(SQLiteLedger(path), together, listed())

    assert [answers[0], answers[1], answers[3]] == [1, 1, 1]
    assert isinstance(answers[2], LedgerError)
    assert "UNIQUE" in str(answers[2])
    assert sagas == ["s", "first", "second", "third"]


@pytest.mark.parametrize(
    ("change", "token"),
    [
        ("owners SET until = 'soon'", 7),
        ("owners SET until = 1e300", 7),
        ("owners SET until = 9e999", 7),
        ("sagas SET token = 'x', owner = NULL", 7),
        ("sagas SET version = 'x'", 1),
        ("sagas SET version = x'00'", 1),
    ],
)
def test_a_row_of_which_no_sense_can_be_made_harms_only_the_saga_whose_it_is(path: Path, change: str, token: int) -> None:
    """What others recorded in the same commit was lost, and their sagas stopped."""
    on(SQLiteLedger(path), create("bad", "other"))
    execute(path, f"UPDATE {change}")
    on(SQLiteLedger(path), create("first"))

    async def together(ledger: Any) -> list[Any]:
        acts = (append(FIRST, saga_id="first"), acquire("me", "bad"), append(FIRST, saga_id="bad", token=token), create("second"))
        with locked(path):  # so that the others are there when the first is done
            asked = [asyncio.create_task(act(ledger)) for act in acts]
            await asyncio.sleep(0)
        return await asyncio.gather(*asked, return_exceptions=True)

    (recorded, taken, overtaken, begun), events = on(SQLiteLedger(path), together, read("first"))

    assert (recorded, begun, len(events)) == (None, 1, 2)
    for refused in (taken, overtaken):
        assert type(refused) is LedgerCorrupt
        assert str(refused).startswith("the ledger is damaged: who holds saga bad, or how many events it has, can't be read: ")
        assert "Nothing was changed." in str(refused)


# -- a file that is something else -----------------------------------------------------------------------------------

ANYTHING = (read(), listed(), create("new"), append(FIRST), prune())


@pytest.mark.parametrize("version", [len(MIGRATIONS) + 1, 2**31 - 1, -1])
def test_a_file_of_a_newer_version_is_refused_and_stays_as_it_is(whole: bytes, path: Path, version: int) -> None:
    path.write_bytes(whole)
    execute(path, f"PRAGMA user_version = {version}")
    newer = path.read_bytes()

    answers = on(SQLiteLedger(path), *ANYTHING)

    assert all(f"has schema version {version}" in str(answer) and isinstance(answer, LedgerError) for answer in answers)
    assert path.read_bytes() == newer


@pytest.mark.parametrize("version", [0, 1, 7])
def test_another_programs_database_is_not_written_into(path: Path, version: int) -> None:
    execute(path, "CREATE TABLE customers (name TEXT)", f"PRAGMA user_version = {version}")
    theirs = path.read_bytes()

    answers = on(SQLiteLedger(path), *ANYTHING)

    assert all("another program's database" in str(answer) and isinstance(answer, LedgerError) for answer in answers)
    assert path.read_bytes() == theirs


def test_a_saga_that_cannot_begin_there_says_so_in_whole_sentences(path: Path) -> None:
    execute(path, "CREATE TABLE customers (name TEXT)")
    pipeline = Pipeline(name="trip").with_stage("book", nothing, "work")

    with pytest.raises(LedgerError, match=r"Nothing was changed\. None of its stages ran\. "):
        asyncio.run(SagaCoordinator(ledger=SQLiteLedger(path)).run(pipeline))


@pytest.mark.parametrize("content", [b"", b"x", b"Dear diary, " * 1000])
def test_a_file_that_is_no_database_is_refused_and_stays_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    answers = on(SQLiteLedger(path), *ANYTHING)

    assert all(isinstance(answer, LedgerError) and "Nothing was changed" in str(answer) for answer in answers)
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", ["DROP INDEX events_by_saga", "ALTER TABLE sagas ADD COLUMN colour TEXT", "DROP TABLE owners"])
def test_a_file_whose_tables_were_changed_is_refused(whole: bytes, path: Path, change: str) -> None:
    path.write_bytes(whole)
    execute(path, change)
    changed = path.read_bytes()

    answers = on(SQLiteLedger(path), *ANYTHING)

    assert all("is not as it was made" in str(answer) and isinstance(answer, LedgerCorrupt) for answer in answers)
    assert path.read_bytes() == changed


def test_an_index_of_ones_own_is_nothing_to_refuse(whole: bytes, path: Path) -> None:
    path.write_bytes(whole)
    execute(path, "CREATE INDEX mine ON sagas (pipeline)")

    assert on(SQLiteLedger(path), read()) == [EVENTS]


def test_a_file_of_an_older_version_is_brought_to_the_newest_and_keeps_its_sagas(
    whole: bytes, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(whole)
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*MIGRATIONS, ("ALTER TABLE sagas ADD COLUMN colour TEXT",)))

    for _ in range(2):
        assert on(SQLiteLedger(path), read()) == [EVENTS]

    execute(path, "SELECT colour FROM sagas")
    monkeypatch.undo()
    (refused,) = on(SQLiteLedger(path), read())
    assert "has schema version 2, this version of saga knows up to 1" in str(refused)


def test_a_log_without_its_file_is_not_taken_for_a_new_ledger(path: Path) -> None:
    log = path.with_name("sagas.db-wal")
    log.write_bytes(b"of a ledger")

    answers = on(SQLiteLedger(path), *ANYTHING)

    assert all("put the file back" in str(answer) for answer in answers)
    assert log.read_bytes() == b"of a ledger"
    assert not path.exists()


def test_a_ledger_is_made_where_a_link_leads(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path.name)

    assert on(SQLiteLedger(link), create()) == [1]
    assert path.is_file()
    assert link.is_symlink()


# -- a ledger that fails ---------------------------------------------------------------------------------------------


def test_a_ledger_whose_lock_another_program_holds_fails_in_time_and_works_again_afterwards(path: Path) -> None:
    on(SQLiteLedger(path), create())
    ledger = SQLiteLedger(path, patience=0.01)

    async def while_locked(opened: Any) -> Any:
        with locked(path):
            with pytest.raises(LedgerError, match=r"has held its lock for more than 0.01 s.*nothing was recorded"):
                await append(FIRST)(opened)
            return await opened.read("s")  # readers wait for nobody

    meanwhile, _, events = on(ledger, while_locked, append(FIRST), read())

    assert meanwhile == (started(),)
    assert events == (started(), FIRST)


@pytest.mark.parametrize(("lease", "patience"), [(3.0, 1.0), (30.0, 10.0), (3_600.0, 10.0)])
def test_a_long_lease_alone_has_nobody_wait_longer_for_a_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch, lease: float, patience: float
) -> None:
    waits: set[float] = set()
    connect = sqlite3.connect

    def note(database: Any, **options: Any) -> Any:
        waits.add(options.get("timeout", patience))
        return connect(database, **options)

    monkeypatch.setattr(sqlite3, "connect", note)

    on(SQLiteLedger(path, lease=lease), create(), read())

    assert waits == {patience}


def test_however_long_the_patience_it_is_not_over_at_once(path: Path) -> None:
    on(SQLiteLedger(path), create())

    async def wait(ledger: Any) -> None:
        with locked(path):
            appending = asyncio.ensure_future(append(FIRST)(ledger))
            for _ in range(20):  # by then, who doesn't wait for the lock has failed
                await ledger.read("s")
        await appending

    _, events = on(SQLiteLedger(path, lease=10**9, patience=10**8), wait, read())

    assert events == (started(), FIRST)


def test_a_ledger_that_nobody_else_may_even_read_fails_in_time_and_works_again_afterwards(whole: bytes, path: Path) -> None:
    path.write_bytes(whole)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        for pragma in ("PRAGMA locking_mode = EXCLUSIVE", "BEGIN EXCLUSIVE"):
            other.execute(pragma)
        refused = on(SQLiteLedger(path, patience=0.01), read(), listed(), create("new"))

    assert all("has held its lock" in str(answer) for answer in refused)
    assert on(SQLiteLedger(path), read()) == [EVENTS]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full; python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_append_for_which_there_is_no_room_is_not_there_and_there_can_be_one_when_there_is(path: Path) -> None:
    async def on_a_full_disk(ledger: Any) -> None:
        with files_of_at_most(200_000), pytest.raises(LedgerError, match="nothing was recorded"):
            await append(large())(ledger)

    _, _, before, appended, after = on(SQLiteLedger(path), create(), on_a_full_disk, read(), append(large()), read())

    assert before == (started(),)
    assert appended is None
    assert len(after) == 2


def test_a_disk_without_room_for_a_new_ledger_is_left_clean(path: Path) -> None:
    with files_of_at_most(5_000):
        refused = on(SQLiteLedger(path), create())

    assert isinstance(refused[0], LedgerError)
    assert list(path.parent.iterdir()) == []
    assert on(SQLiteLedger(path), create()) == [1]


def test_a_disk_that_is_full_before_a_new_ledger_is_whole_has_none(tmp_path: Path) -> None:
    size = 256 * 1024
    mounting = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(tmp_path))}"
    by_itself = [shutil.which("unshare") or "false", "-rm", "sh", "-c"]
    if subprocess.run([*by_itself, mounting], check=False, capture_output=True).returncode:
        pytest.skip("nobody may mount a small disk here")
    making = shlex.join([sys.executable, "-m", "tests.scripts.cramped", str(tmp_path), str(size)])

    told = subprocess.run([*by_itself, f"{mounting} && {making}"], check=True, capture_output=True, text=True).stdout

    assert set(told.splitlines()) == {"['s']"}


def test_a_disk_that_may_only_be_read_is_given_as_the_reason_why_there_is_no_new_ledger(tmp_path: Path) -> None:
    mounting = f"mount -t tmpfs -o ro tmpfs {shlex.quote(str(tmp_path))}"
    by_itself = [shutil.which("unshare") or "false", "-rm", "sh", "-c"]
    if subprocess.run([*by_itself, mounting], check=False, capture_output=True).returncode:
        pytest.skip("nobody may mount a disk here")
    path = tmp_path / "sagas.db"
    making = f"import asyncio, saga.ledgers.sqlite as it; asyncio.run(it.SQLiteLedger({str(path)!r}).list())"
    by_python = shlex.join([sys.executable, "-c", making])

    told = subprocess.run([*by_itself, f"{mounting} && {by_python}"], check=False, capture_output=True, text=True).stderr

    assert f"the ledger {path} failed: unable to open database file (it, or its log beside it, can't be opened" in told


def test_a_disk_that_has_no_links_is_named_in_the_error_and_left_clean(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)

    (refused,) = on(SQLiteLedger(path), create())

    assert isinstance(refused, LedgerError)
    assert f"the ledger {path} can't be made: [Errno 1]" in str(refused)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("mode", ["as it was made", "as VACUUM INTO makes it"])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_ledger_that_may_not_be_written_to_says_so(whole: bytes, what: str, mode: str) -> None:
    # Not under pytest's own directory, which is its owner's alone: root may write anywhere, so it becomes somebody else.
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "sagas.db"
        path.write_bytes(whole)
        if mode != "as it was made":
            execute(path, "PRAGMA journal_mode = DELETE")
        path.chmod(0o444 if what == "file" else 0o666)
        path.parent.chmod(0o777 if what == "file" else 0o555)
        try:
            told = subprocess.run([sys.executable, "-m", "tests.scripts.reading", path], check=True, capture_output=True, text=True).stdout
        finally:
            path.parent.chmod(0o755)
        left = [file.name for file in path.parent.iterdir()]

    found, refused = told.splitlines()
    assert "attempt to write a readonly database (it, its log or its directory can't be written to; see to their owners" in refused
    needs_log = mode == "as it was made"
    assert found == (refused if what == "directory" and needs_log else str(len(EVENTS))), "who may write to it needs a log to read it"
    assert left == ["sagas.db"], "a log of somebody else's would keep out who may write to it"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may become somebody with the rights of another user")
def test_who_has_the_rights_of_another_user_may_write_to_what_is_theirs(path: Path) -> None:
    on(SQLiteLedger(path), create())
    becoming = "import os, runpy; os.setresuid(65534, 0, 0); runpy.run_module('tests.scripts.appending', run_name='__main__')"

    told = subprocess.run([sys.executable, "-c", becoming, path, "1"], check=True, stdout=subprocess.PIPE, text=True).stdout

    assert len(told.splitlines()) == len(SAGAS)


def test_who_may_only_read_a_ledger_sees_what_others_have_recorded_since(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(SQLiteLedger(path), create("s"))
    command = [sys.executable, "-m", "tests.scripts.appending", str(path), "1"]
    monkeypatch.setattr(os, "access", lambda *_, **__: False)

    async def record(_: Any) -> None:
        await asyncio.to_thread(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)

    before, _, after = on(SQLiteLedger(path), listed(), record, listed())

    assert before == ["s"]
    assert sorted(after) == [*SAGAS, "s"]


@pytest.mark.parametrize("begins", ["when it is opened", "when it is read"])
def test_who_may_only_read_a_ledger_is_told_when_others_have_written_to_it_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch, begins: str
) -> None:
    on(SQLiteLedger(path), create("s"))
    store = sqlite._Store(path, 30.0, 10.0, time.time, sqlite._Shared())

    with closing(sqlite3.connect(path)) as other:

        def write(*_: Any, **__: Any) -> bool:
            if begins == "when it is opened":
                other.execute("UPDATE sagas SET status = 'stuck'")
            return False

        monkeypatch.setattr(os, "access", write)
        with pytest.raises(LedgerError, match="while it was read; read it again"), store._reading():
            other.execute("UPDATE sagas SET status = 'stuck'")

    monkeypatch.undo()
    assert store.read("s") == (started(),)
    store.close()


@pytest.mark.parametrize("where", ["", "missing/sagas.db"])
def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, where: str) -> None:
    answers = on(SQLiteLedger(tmp_path / where), *ANYTHING)

    assert all(isinstance(answer, LedgerError) and str(tmp_path) in str(answer) for answer in answers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_was_taken_away_is_not_written_to_any_more(whole: bytes, path: Path, is_replaced: bool) -> None:
    moved = path.with_name("moved.db")

    async def move(_: Any) -> None:
        await asyncio.to_thread(path.rename, moved)
        if is_replaced:
            await asyncio.to_thread(path.write_bytes, whole)

    async def take_its_log_away(_: Any) -> None:
        await asyncio.to_thread(path.with_name(f"{path.name}-wal").rename, moved.with_name(f"{moved.name}-wal"))

    *_, appended, unread, _, events = on(SQLiteLedger(path), create(), read(), move, append(FIRST), read(), take_its_log_away, read())

    assert isinstance(appended, LedgerError)
    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(appended)
    if is_replaced:
        assert "was replaced, but its log sagas.db-wal is of the one before; move it away. Nothing was changed." in str(unread)
        assert events == EVENTS
        assert path.read_bytes() == whole
    else:
        assert "is gone; put it back" in str(unread)
        assert "is gone; put it back" in str(events)
    assert on(SQLiteLedger(moved), read()) == [(started(),)]


def test_a_file_that_was_replaced_is_used_also_when_its_log_gets_the_number_of_the_one_before(whole: bytes, path: Path) -> None:
    """A file system gives the numbers of deleted files to new ones."""
    log = path.with_name(f"{path.name}-wal")
    numbers: list[int] = []

    def give_its_number_to_the_next() -> None:
        number = log.stat().st_ino
        for suffix in ("-wal", "-shm"):
            path.with_name(f"{path.name}{suffix}").unlink()
        for attempt in range(1000):
            taken = path.with_name(f"taken-{attempt}")
            taken.touch()
            if taken.stat().st_ino == number:
                taken.unlink()
                break
        numbers.append(number)

    async def replace(_: Any) -> None:
        await asyncio.to_thread(path.rename, path.with_name("moved.db"))
        await asyncio.to_thread(path.write_bytes, whole)

    async def take_its_log_away(_: Any) -> None:
        await asyncio.to_thread(give_its_number_to_the_next)

    async def look(_: Any) -> None:
        numbers.append((await asyncio.to_thread(log.stat)).st_ino)

    *_, events, _, written = on(SQLiteLedger(path), create(), read(), replace, read(), read(), take_its_log_away, read(), look, create("t"))

    if len(set(numbers)) > 1:
        pytest.skip("the numbers of files are not given anew here, or another program was faster")
    assert events == EVENTS
    assert written == 1


def test_in_the_place_of_a_ledger_that_was_taken_away_no_other_one_is_made_and_it_goes_on_when_it_is_back(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()

    async def take_away(_: Any) -> None:
        for file in path.parent.glob("sagas.db*"):
            await asyncio.to_thread(file.rename, elsewhere / file.name)

    async def put_back(_: Any) -> list[str]:
        made = [file.name for file in path.parent.glob("sagas.db*")]
        for file in elsewhere.iterdir():
            await asyncio.to_thread(file.rename, path.parent / file.name)
        return made

    *_, gone, unread, unheard, made, recorded, events = on(
        SQLiteLedger(path), create(), take_away, append(FIRST), append(FIRST), read(), create("new"), put_back, append(FIRST), read()
    )

    for answer in (gone, unread, unheard):
        assert type(answer) is LedgerError
        assert str(answer) == f"the ledger {path} is gone; put it back, or restart to begin a new one. Nothing was recorded"
    assert made == []
    assert recorded is None
    assert [*map(type, events)] == [SagaStarted, StageStarted]


def test_processes_that_open_a_copy_in_another_journal_mode_at_once_all_append_to_it(path: Path) -> None:
    on(SQLiteLedger(path), create())
    execute(path, "PRAGMA journal_mode = DELETE")
    command = [sys.executable, "-m", "tests.scripts.appending", str(path), "1"]

    processes = [subprocess.Popen([*command, prefix], stdout=subprocess.DEVNULL) for prefix in "wxyz"]

    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_log_that_another_process_took_away_is_not_written_to_any_more(
    path: Path, is_linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the process itself has opened and closed the file, SQLite's locks are gone: appends would be acknowledged, and be nowhere."""
    monkeypatch.setattr("fcntl.F_OFD_SETLK", 0x7FFF, raising=False)  # as where the system has no locks that stay
    called = path.with_name("link.db") if is_linked else path
    if is_linked:
        called.symlink_to(path.name)

    async def copy(_: Any) -> None:
        await asyncio.to_thread(shutil.copy, path, path.with_name("backup.db"))
        listing = [sys.executable, "-c", "from saga.cli import main; main()", "list", "--ledger", f"sqlite:///{path}"]
        await asyncio.to_thread(subprocess.run, listing, check=True, stdout=subprocess.DEVNULL)
        # A newer SQLite (3.53, not 3.40) notices that its locks are gone and leaves the log; an older one at the same file does not.
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)

    *_, refused, recorded, events = on(SQLiteLedger(called), create(), copy, append(FIRST), append(FIRST), read())

    assert type(refused) is LedgerError
    assert f"the ledger {called}, or its log beside it, was moved, deleted or replaced while it was in use; nothing was recorded" in str(
        refused
    )
    assert recorded is None
    assert [*map(type, events)] == [SagaStarted, StageStarted]


@pytest.mark.skipif(sys.platform != "linux", reason="there all locks of a process go when it closes the file")
def test_a_process_that_copies_its_ledger_loses_nothing_to_another_one_that_closes_it(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    numbers: list[int] = []

    async def copy(_: Any) -> None:
        numbers.append(log.stat().st_ino)
        await asyncio.to_thread(shutil.copy, path, path.with_name("backup.db"))
        listing = [sys.executable, "-c", "from saga.cli import main; main()", "list", "--ledger", f"sqlite:///{path}"]
        await asyncio.to_thread(subprocess.run, listing, check=True, stdout=subprocess.DEVNULL)

    async def look(_: Any) -> None:
        numbers.append(log.stat().st_ino)

    acts = [create(), read(), copy, append(FIRST), look, copy, append(SECOND, version=2), read(), look]
    *_, one, _, _, two, events, _ = on(SQLiteLedger(path), *acts)

    assert (one, two) == (None, None)
    assert events == (started(), FIRST, SECOND)
    assert len(set(numbers)) == 1
    assert sorted(path.parent.iterdir()) == [path.with_name("backup.db"), path]


@pytest.mark.skipif(sys.platform != "linux", reason="a ledger opens its file past SQLite only there")
def test_a_connection_of_ones_own_keeps_its_locks_when_the_ledger_beside_it_is_closed(path: Path) -> None:
    listing = [sys.executable, "-c", "from saga.cli import main; main()", "list", "--ledger", f"sqlite:///{path}"]
    on(SQLiteLedger(path), create())

    with closing(sqlite3.connect(path)) as own:
        own.execute("SELECT * FROM sagas").fetchall()
        log = path.with_name(f"{path.name}-wal").stat().st_ino
        for saga_id in ("t", "u"):
            on(SQLiteLedger(path), create(saga_id))
            subprocess.run(listing, check=True, stdout=subprocess.DEVNULL)

        assert path.with_name(f"{path.name}-wal").stat().st_ino == log
        assert own.execute("SELECT id FROM sagas ORDER BY id").fetchall() == [("s",), ("t",), ("u",)]
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="a ledger opens its file past SQLite only there")
def test_a_connection_of_ones_own_that_reads_while_the_ledger_beside_it_is_closed_keeps_its_locks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = [sys.executable, "-c", "from saga.cli import main; main()", "list", "--ledger", f"sqlite:///{path}"]
    log = path.with_name(f"{path.name}-wal")
    on(SQLiteLedger(path), create())
    close = Guard.close
    told: list[str] = []

    with closing(sqlite3.connect(path, timeout=0, check_same_thread=False)) as own:

        def read_first(guard: Guard) -> None:
            try:
                own.execute("SELECT * FROM sagas").fetchall()
            except sqlite3.OperationalError as error:
                told.append(str(error))
            close(guard)

        monkeypatch.setattr(Guard, "close", read_first)
        on(SQLiteLedger(path), create("t"))
        own.execute("SELECT * FROM sagas").fetchall()
        number = log.stat().st_ino
        subprocess.run(listing, check=True, stdout=subprocess.DEVNULL)

        assert log.stat().st_ino == number
    assert told == ["database is locked"]


_CLOSING = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX, 510, 0x40000002)
print("closing", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there all locks of a process go when it closes the file")
def test_a_ledger_that_lost_its_locks_while_it_was_opened_is_not_used_while_another_process_closes_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(SQLiteLedger(path), create())
    others: list[subprocess.Popen[str]] = []
    connect = sqlite._open

    def copy_meanwhile(*args: Any) -> Any:
        opened = connect(*args)
        path.read_bytes()
        command = [sys.executable, "-c", _CLOSING, str(path)]
        others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[0].stdout is not None
        others[0].stdout.readline()
        monkeypatch.undo()
        return opened

    async def end(_: Any) -> None:
        await asyncio.to_thread(others[0].communicate)

    monkeypatch.setattr(sqlite, "_open", copy_meanwhile)
    refused, _, recorded, events = on(SQLiteLedger(path), append(FIRST), end, append(FIRST), read())

    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert recorded is None
    assert events == (started(), FIRST)


@pytest.mark.skipif(sys.platform != "linux", reason="there all locks of a process go when it closes the file")
def test_a_ledger_that_lost_its_locks_while_it_was_opened_is_not_used_when_another_process_has_closed_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would record in a log that nobody can find, and what others record meanwhile would be written over."""

    def another_appends_and_closes(prefix: str) -> None:
        command = [sys.executable, "-m", "tests.scripts.appending", str(path), "1", prefix, "close"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    on(SQLiteLedger(path), create())
    connect = sqlite._open

    def copy_meanwhile(*args: Any) -> Any:
        opened = connect(*args)
        path.read_bytes()
        another_appends_and_closes("t")
        monkeypatch.undo()
        return opened

    async def have_another_append(_: Any) -> None:
        await asyncio.to_thread(another_appends_and_closes, "u")

    monkeypatch.setattr(sqlite, "_open", copy_meanwhile)
    refused, _, recorded, events = on(SQLiteLedger(path), append(FIRST), have_another_append, append(FIRST), read())

    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert recorded is None
    assert events == (started(), FIRST)
    (ids,) = on(SQLiteLedger(path), listed())
    assert sorted(ids) == ["s", *(f"{prefix}{saga_id}" for prefix in "tu" for saga_id in SAGAS)]


@pytest.mark.parametrize("is_alone", [True, False], ids=["one ledger", "beside an idle one of the process"])
@pytest.mark.parametrize("taken", [("shm",), ("wal", "shm")], ids=["the index of the log", "both, as by who takes itself for the last"])
def test_what_processes_record_on_both_sides_of_a_log_that_was_taken_away_is_all_there(
    path: Path, taken: Sequence[str], is_alone: bool
) -> None:
    idle = SQLiteLedger(path)
    command = [sys.executable, "-m", "tests.scripts.appending", str(path)]
    others: list[subprocess.Popen[str]] = []
    told: list[str] = []

    def begin_another() -> None:
        execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in taken:
            path.with_name(f"{path.name}-{suffix}").unlink()
        others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

    async def take_away(_: Any) -> None:
        await asyncio.to_thread(begin_another)

    async def hear(_: Any) -> None:
        stdout = others[0].stdout
        assert stdout is not None
        told.extend([await asyncio.to_thread(stdout.readline) for _ in range(20)])

    async def begin(ledger: Any) -> None:
        await (ledger if is_alone else idle).read("s")

    async def end(_: Any) -> None:
        await idle.close()

    acts = [create(), read(), begin, take_away, hear, append(FIRST), append(FIRST), hear, append(SECOND, version=2), end]
    *_, refused, one, _, two, _ = on(SQLiteLedger(path), *acts)
    with others[0] as other:
        other.kill()

    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert (one, two) == (None, None)
    assert on(SQLiteLedger(path), read()) == [(started(), FIRST, SECOND)]
    for saga_id, version in map(str.split, told):
        (events,) = on(SQLiteLedger(path), read(saga_id))
        assert len(events) >= int(version)


@pytest.mark.skipif(sys.version_info < (3, 12) and sys.platform != "linux", reason="there SQLite can't be kept from deleting the log")
@pytest.mark.parametrize("closes", [False, True], ids=["who died", "who closed the ledger"])
@pytest.mark.parametrize("is_written", [True, False], ids=["a log that was written into the file", "a log that was not"])
@pytest.mark.parametrize("taken", [("shm",), ("wal", "shm")], ids=["the index of the log", "both"])
def test_what_others_recorded_since_a_log_was_taken_away_is_there_when_the_one_that_had_it_lets_go(
    path: Path, taken: Sequence[str], is_written: bool, closes: bool
) -> None:
    """Though nobody of them is there any more, so that it is the last one."""
    command = [sys.executable, "-m", "tests.scripts.appending", str(path), "200", "", *["close"] * closes]
    told: list[str] = []

    def take_away() -> None:
        if is_written:
            execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in taken:
            path.with_name(f"{path.name}-{suffix}").unlink()
        told.extend(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())

    async def act(_: Any) -> None:
        await asyncio.to_thread(take_away)

    *_, refused, recorded = on(SQLiteLedger(path), create("s"), read("s"), act, append(FIRST), create("t"))

    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert recorded == 1
    assert len(told) == 200 * len(SAGAS)
    assert on(SQLiteLedger(path), read("t")) == [(started("t"),)]
    for saga_id in SAGAS:
        (events,) = on(SQLiteLedger(path), read(saga_id))
        assert len(events) == 1 + 200 * AT_ONCE


def test_what_was_recorded_in_a_log_that_was_taken_away_is_there_if_others_have_only_looked_since(path: Path) -> None:
    async def take_away(_: Any) -> None:
        for suffix in ("wal", "shm"):
            path.with_name(f"{path.name}-{suffix}").unlink()
        listing = [sys.executable, "-c", "from saga.cli import main; main()", "list", "--ledger", f"sqlite:///{path}"]
        await asyncio.to_thread(subprocess.run, listing, check=True, stdout=subprocess.DEVNULL)

    on(SQLiteLedger(path), create(), append(FIRST), take_away)

    assert on(SQLiteLedger(path), read()) == [(started(), FIRST)]


def test_what_was_recorded_in_a_log_that_was_taken_away_is_there_though_it_is_closed_last_by_who_has_only_read(path: Path) -> None:
    """The file was written to since it was opened to be read, but by the ledger itself."""
    log = path.with_name(f"{path.name}-wal")
    written: list[int] = []

    async def look(_: Any) -> None:
        written.append((await asyncio.to_thread(path.stat)).st_mtime_ns)

    async def take_away(_: Any) -> None:
        assert log.stat().st_size
        for suffix in ("wal", "shm"):
            path.with_name(f"{path.name}-{suffix}").unlink()

    long = [append(large(1_100_000), version=version) for version in (1, 2)]
    acts = [create(), read(), look, *long, append(FIRST, version=3), look, take_away, append(SECOND, version=4), read()]
    *_, refused, events = on(SQLiteLedger(path), *acts)

    assert written[0] != written[1]
    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert [*map(type, events)] == [SagaStarted, StageCompleted, StageCompleted, StageStarted]


_IDLE = """
import asyncio, sys
from saga.ledgers.sqlite import SQLiteLedger
from tests.test_ledger_contract import FIRST, append, create

async def main(path):
    async with SQLiteLedger(path) as ledger:
        await create("t")(ledger)
        print("recorded", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for _ in range(2):
            try:
                await append(FIRST, saga_id="t")(ledger)
            except Exception as refused:
                print(refused, flush=True)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there nobody can be kept from opening the file meanwhile")
@pytest.mark.parametrize(
    ("taken", "is_looked_at"),
    [(("wal",), False), (("shm",), False), (("wal", "shm"), False), (("wal", "shm"), True)],
    ids=["the log", "its index", "both", "both, and somebody has looked since"],
)
def test_what_processes_recorded_in_a_log_that_was_deleted_is_there_though_none_is_the_last(
    path: Path, taken: Sequence[str], is_looked_at: bool
) -> None:
    listing = [sys.executable, "-c", "from saga.cli import main; main()", "list", "--ledger", f"sqlite:///{path}"]
    with subprocess.Popen([sys.executable, "-c", _IDLE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as idle:
        assert idle.stdout is not None
        idle.stdout.readline()

        async def take_away(_: Any) -> None:
            for suffix in taken:
                path.with_name(f"{path.name}-{suffix}").unlink()
            if is_looked_at:
                await asyncio.to_thread(subprocess.run, listing, check=True, stdout=subprocess.DEVNULL)

        *_, refused, recorded, ids = on(SQLiteLedger(path), create("s"), take_away, append(FIRST), append(FIRST), listed())
        told, _ = idle.communicate("go on")

    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert recorded is None
    assert ids == ["t", "s"]
    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in told
    for events in on(SQLiteLedger(path), read("s"), read("t")):
        assert [*map(type, events)] == [SagaStarted, StageStarted]


_LOOKING = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT count(*) FROM sagas").fetchone()[0], flush=True)
sys.stdin.read()
"""


def test_a_file_is_not_changed_under_who_has_opened_it_since_its_log_was_deleted(path: Path) -> None:
    """What they have read would no longer fit to what is there, and what they record damage it."""
    on(SQLiteLedger(path), create("s"))
    others: list[subprocess.Popen[str]] = []

    def look() -> None:
        for suffix in ("wal", "shm"):
            path.with_name(f"{path.name}-{suffix}").unlink()
        others.append(subprocess.Popen([sys.executable, "-c", _LOOKING, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[0].stdout is not None
        assert others[0].stdout.readline() == "1\n"

    async def have_somebody_look(_: Any) -> None:
        await asyncio.to_thread(look)

    before = path.read_bytes()
    *_, refused = on(SQLiteLedger(path), create("t"), have_somebody_look, create("u"))
    after = path.read_bytes()
    with others[0] as other:
        other.communicate()

    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert after == before


def test_a_log_that_was_deleted_without_its_index_is_no_failure_of_the_disk(path: Path) -> None:
    on(SQLiteLedger(path), create())

    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE sagas SET status = 'stuck'")
        other.commit()
        path.with_name(f"{path.name}-wal").unlink()
        answers = on(SQLiteLedger(path), read(), append(FIRST))

    assert all("its log was deleted while others use it; end all that do); nothing was recorded" in str(answer) for answer in answers)
    assert on(SQLiteLedger(path), read()) == [(started(),)]


def test_a_link_that_leads_to_another_file_since_is_noticed(whole: bytes, path: Path) -> None:
    link, other = path.with_name("link.db"), path.with_name("other.db")
    link.symlink_to(path.name)

    async def turn(_: Any) -> None:
        other.write_bytes(whole)
        link.unlink()
        link.symlink_to(other.name)

    *_, refused, events = on(SQLiteLedger(link), create(), turn, append(FIRST), read())

    assert "was moved, deleted or replaced while it was in use; nothing was recorded" in str(refused)
    assert len(events) == len(EVENTS)


def test_of_a_log_that_is_taken_away_at_the_moment_of_a_write_nobody_says_what_became_of_it(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    is_armed: list[bool] = []

    def clock() -> float:
        if is_armed:
            log.rename(log.with_name("taken away"))
            is_armed.clear()
        return time.time()

    async def arm(_: Any) -> None:
        is_armed.append(True)

    *_, unknown = on(SQLiteLedger(path, clock=clock), create(), arm, lambda ledger: ledger.beat("me"))

    assert type(unknown) is LedgerError
    assert str(unknown).endswith("was moved, deleted or replaced while it was in use; whether this was recorded is not known")


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in CALLS, reason="has the kernel fail for a disk")
@pytest.mark.parametrize(
    ("call", "why"), [("sync", "the disk failed to sync"), ("index", "there is no room left for the index of its log")]
)
def test_of_what_the_disk_failed_to_keep_behind_the_log_nobody_says_what_became_of_it(path: Path, call: str, why: str) -> None:
    """It is in the log: where the process is killed before anything else is written, it is recorded."""
    told = subprocess.run([sys.executable, "-m", "tests.scripts.unsynced", path, call], check=False, capture_output=True, text=True)

    assert told.returncode == -signal.SIGKILL, told.stderr
    saga_id, _, said = told.stdout.partition(" ")
    assert said == f"the ledger {path} failed: disk I/O error ({why}); whether this was recorded is not known\n"
    assert on(SQLiteLedger(path), listed())[0][-1] == saga_id


@contextmanager
def full(path: Path) -> Iterator[None]:
    with files_of_at_most(path.with_name(f"{path.name}-wal").stat().st_size):
        yield


@contextmanager
def gone(path: Path) -> Iterator[None]:
    moved = path.rename(path.with_name("moved.db"))
    yield
    moved.rename(path)


@pytest.mark.parametrize(
    ("fails", "why"), [(full, "disk I/O error"), (locked, "has held its lock"), (gone, "was moved, deleted or replaced")]
)
@pytest.mark.parametrize("backward", [False, True])
def test_a_saga_whose_ledger_fails_starts_nothing_more_says_what_is_in_effect_and_goes_on_when_it_is_back(
    path: Path, fails: Callable[[Path], AbstractContextManager[None]], why: str, backward: bool
) -> None:
    shape = SEQUENCE | {"d": ("c",)}
    script = Script("raise") if backward else Script()
    world, pipeline = scene(shape, {"d": script}, dict.fromkeys(shape, "probed"))
    struck = world.begin_undo if backward else world.enter

    async def play() -> tuple[SagaUnrecorded, list[str], SagaReport]:
        async with SQLiteLedger(path, patience=0.01) as ledger:
            coordinator = SagaCoordinator(ledger=ledger)
            with ExitStack() as failing:

                def strike(name: str, **options: Any) -> None:
                    struck(name, **options)
                    if name == "b":
                        failing.enter_context(fails(path))

                setattr(world, struck.__name__, strike)
                with pytest.raises(SagaUnrecorded) as caught:
                    await coordinator.run(pipeline, saga_id="s")
                log = list(world.log)
            setattr(world, struck.__name__, struck)
            return caught.value, log, await coordinator.resume("s", pipeline)

    error, log, report = asyncio.run(play())

    assert log == (["+a", "+b", "+c", "-c", "-b"] if backward else ["+a", "+b"])
    assert error.in_effect == (("a",) if backward else ("a", "b"))
    assert why in str(error)
    assert f"Nothing more was started. In effect: {', '.join(error.in_effect)}; not known: nothing." in str(error)
    assert str(error).endswith("When the ledger is back, go on: await coordinator.resume('s', pipeline)")
    assert world.log == [*log, *(["-a"] if backward else ["+c", "+d"])]
    assert world.refusals == []
    assert report.status is (SagaStatus.COMPENSATED if backward else SagaStatus.COMPLETED)


def test_what_goes_wrong_in_a_clock_is_told_to_everybody_who_waits_and_to_nobody_else(path: Path) -> None:
    is_broken = True

    def clock() -> float:
        if is_broken:
            raise ZeroDivisionError("no time")
        return 0.0

    async def together(ledger: Any) -> Any:
        return await asyncio.gather(create("a")(ledger), create("b")(ledger), return_exceptions=True)

    async def mend(_: Any) -> None:
        nonlocal is_broken
        is_broken = False

    (one, other), none, _, created = on(SQLiteLedger(path, clock=clock), together, listed(), mend, create("a"))

    for answer in (one, other):
        assert isinstance(answer, LedgerError)
        assert "ZeroDivisionError: no time" in str(answer)
        assert isinstance(answer.__cause__, ZeroDivisionError)
    assert one is not other
    assert none == []
    assert created == 1


def test_an_event_loop_that_is_gone_before_its_answer_keeps_nobody_else_from_theirs(path: Path) -> None:
    ledger = SQLiteLedger(path)
    asyncio.run(create()(ledger))

    async def leave() -> None:
        asking = asyncio.create_task(ledger.release("s", 1))
        await asyncio.sleep(0)
        asking.cancel()

    with locked(path):
        asyncio.run(leave())

    _, (entry,) = on(ledger, append(FIRST), lambda ledger: ledger.list())
    assert entry.owner is None


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_copy", [False, True])
def test_an_append_is_synced_before_it_is_acknowledged(path: Path, is_copy: bool) -> None:
    if is_copy:
        original = path.with_name("original.db")
        on(SQLiteLedger(original), create())
        execute(original, f"VACUUM INTO '{path}'")
    store = sqlite._Store(path, 30.0, 10.0, time.time, sqlite._Shared())
    connection = store._connection()

    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA fullfsync").fetchone() == (1,)
    store.close()


@pytest.mark.parametrize("heard", [20, 20 * len(SAGAS) + 1], ids=["while another records", "when another has ended"])
def test_whoever_opens_a_ledger_whose_log_was_taken_away_has_the_whole_process_let_go_of_it(path: Path, heard: int) -> None:
    command = [sys.executable, "-m", "tests.scripts.appending", str(path), "20"]

    async def main() -> list[str]:
        idle, anew = SQLiteLedger(path), SQLiteLedger(path)
        await create()(idle)
        await idle.read("s")
        execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        for suffix in ("wal", "shm"):
            path.with_name(f"{path.name}-{suffix}").unlink()
        with await asyncio.to_thread(partial(subprocess.Popen, command, stdout=subprocess.PIPE, text=True)) as other:
            assert other.stdout is not None
            told = [await asyncio.to_thread(other.stdout.readline) for _ in range(heard)]
            if not told[-1]:
                other.wait()
            await create("t")(anew)
            told += await asyncio.to_thread(other.stdout.readlines)
        await append(FIRST)(idle)
        await idle.close()
        await anew.close()
        return told

    told = asyncio.run(main())

    assert len([line for line in told if line]) == 20 * len(SAGAS)
    assert on(SQLiteLedger(path), read("s"), read("t")) == [(started(), FIRST), (started("t"),)]
    for saga_id in SAGAS:
        (events,) = on(SQLiteLedger(path), read(saga_id))
        assert len(events) == 1 + 20 * AT_ONCE


class Asked:
    """A lock that says so when somebody asked for it in vain, and did not wait."""

    def __init__(self, lock: Any, say: Callable[[], None]) -> None:
        self.lock, self.say = lock, say

    def acquire(self, *, blocking: bool) -> bool:
        is_mine: bool = self.lock.acquire(blocking=blocking)
        if not is_mine:
            self.say()
        return is_mine

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_files_that_were_taken_away_are_not_opened_anew_while_somebody_of_the_process_is_busy_with_them(path: Path) -> None:
    on(SQLiteLedger(path), create())
    busy, anew = (sqlite._Store(path, 30.0, 10.0, time.time, sqlite._Shared()) for _ in range(2))
    busy._connection()
    path.with_name(f"{path.name}-shm").unlink()
    is_busy, is_over = threading.Event(), threading.Event()
    in_use: Any = Asked(busy._in_use, is_over.set)
    busy._in_use = in_use

    def work() -> None:
        with busy._in_use:
            is_busy.set()
            is_over.wait()

    thread = threading.Thread(target=work)
    thread.start()
    is_busy.wait()

    with pytest.raises(LedgerError, match="was moved, deleted or replaced while it was in use; nothing was recorded"):
        anew.read("s")
    thread.join()

    assert anew.read("s") == (started(),)
    assert busy._opened is None
    anew.close()


def test_a_ledger_that_is_closed_fails_no_other_one_that_is_opened_just_then(tmp_path: Path) -> None:
    """SQLite takes its log away with the last connection: whoever opened another file was told that somebody had taken that away."""

    async def open_and_close(worker: int) -> int:
        for turn in range(30):
            async with SQLiteLedger(tmp_path / f"{worker}-{turn}.db") as ledger:
                await ledger.create("s", "me", [started("s")])
        return worker

    async def play() -> list[int]:
        return await asyncio.gather(*map(open_and_close, range(6)))

    assert asyncio.run(play()) == [*range(6)]


def test_a_commit_that_fails_otherwise_records_nothing(path: Path) -> None:
    store = sqlite._Store(path, 30.0, 10.0, time.time, sqlite._Shared())
    begun = Writer(2**24, None).create("s", "me", (started(),), None)
    statements = [""]
    connection = store._connection()
    connection.set_trace_callback(statements.append)
    connection.set_progress_handler(lambda: statements[-1] == "COMMIT", 1)

    with pytest.raises(LedgerError, match="interrupted; nothing was recorded"):
        store.write([begun])

    assert store.read("s") == ()
    assert store.write([begun]) == [1]
    store.close()


def test_what_may_only_be_read_keeps_its_journal_mode(path: Path) -> None:
    on(SQLiteLedger(path), create())
    execute(path, "PRAGMA journal_mode = DELETE")

    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        sqlite._prepare(connection, path)

        assert connection.execute("SELECT id FROM sagas").fetchall() == [("s",)]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_copy_that_somebody_reads_is_not_used_before_it_has_its_log(path: Path) -> None:
    """Whoever used it without would do so for as long as it is connected, and a power loss could take back what it was told."""
    original = path.with_name("original.db")
    on(SQLiteLedger(original), create("s"))
    execute(original, f"VACUUM INTO '{path}'")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM sagas").fetchall()

        async def when_nobody_reads_it(ledger: Any) -> Any:
            reader.execute("COMMIT")
            return await create("t")(ledger)

        refused, token = on(SQLiteLedger(path, patience=0.1), append(DONE, version=99), when_nobody_reads_it)

    assert "locked" in str(refused)
    assert token == 1
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(("status", "owners"), [("completed", 1000), ("running", 100)], ids=["a step", "the last step"])
def test_to_forget_many_owners_takes_one_look_at_every_saga_and_only_at_the_end(path: Path, status: str, owners: int) -> None:
    on(SQLiteLedger(path), create())
    with closing(sqlite3.connect(path)) as connection, connection:
        numbers = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1000)"
        connection.execute(
            f"""INSERT INTO sagas (id, pipeline, status, started_at, updated_at, version, token, owner)
            {numbers} SELECT 'r' || n, 'p', 'running', started_at, updated_at, 1, 1, 'holder' || n FROM numbers, sagas"""  # noqa: S608 - a constant
        )
        connection.execute(f"INSERT INTO owners {numbers} SELECT iif(n % 10, 'gone', 'holder') || n, 0 FROM numbers")  # noqa: S608 - as above
        connection.execute("UPDATE sagas SET status = ? WHERE id = 's'", (status,))
    store, steps = sqlite._Store(path, 30.0, 10.0, time.time, sqlite._Shared()), [0]

    def count() -> None:
        steps[0] += 1

    store._connection().set_progress_handler(count, 1)
    store.write([Prune(DONE.at.replace(year=9999).isoformat(), 0)])
    store.close()

    with closing(sqlite3.connect(path)) as connection:
        ((left,),) = connection.execute("SELECT count(*) FROM owners WHERE id != 'me'")
    assert left == owners
    assert steps[0] < 100_000  # of SQLite's own; 1,000 looks at 1,000 sagas were millions


def test_to_forget_sagas_that_hold_much_takes_many_steps_and_takes_each_with_its_family(path: Path) -> None:
    for name in "abcd":
        on(SQLiteLedger(path), create(name, "me", large(10 * 2**20), DONE), create(f"{name}/c", "me", DONE, parent=name))
    store = sqlite._Store(path, 30.0, 10.0, lambda: time.time() + 60, sqlite._Shared())
    steps: list[set[str]] = []
    step: int | None = 0

    while step is not None:
        (pruned,) = store.write([Prune(DONE.at.replace(year=9999).isoformat(), step)])
        steps.append(set(pruned.saga_ids))
        step = pruned.last

    assert steps == [{"a", "a/c", "b", "b/c"}, {"c", "c/c", "d", "d/c"}, set()]
    assert store.list(None, None) == ()
    store.close()


def test_a_log_that_grew_while_somebody_read_is_small_again_when_they_are_done(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    sizes: list[int] = []

    async def look(_: Any) -> None:
        sizes.append((await asyncio.to_thread(log.stat)).st_size)

    def more(first: int) -> list[Any]:
        return [*(append(large(2**23), version=version) for version in range(first, first + 10)), look]

    on(SQLiteLedger(path), create())
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:

        async def end(_: Any) -> None:
            reader.execute("COMMIT")

        reader.execute("BEGIN")
        reader.execute("SELECT * FROM sagas").fetchall()
        on(SQLiteLedger(path), *more(1), end, *more(11))

    assert sizes[0] > 10 * 2**23
    assert sizes[1] <= 2**26


def commits_in(path: Path) -> int:
    """How many commits are in the log beside a ledger: of the frames, one that ends a commit says how many pages the file then has."""
    log = path.with_name(f"{path.name}-wal").read_bytes()
    page = int.from_bytes(log[8:12])
    return sum(any(log[frame + 4 : frame + 8]) for frame in range(32, len(log), 24 + page))


def test_appends_that_come_together_share_a_commit(path: Path) -> None:
    names = [f"s{number}" for number in range(200)]

    async def together(ledger: Any) -> int:
        await asyncio.gather(*(create(name)(ledger) for name in names))
        before = commits_in(path)
        await asyncio.gather(*(append(FIRST, saga_id=name)(ledger) for name in names))
        return commits_in(path) - before

    assert on(SQLiteLedger(path), together) == [1]


def test_ledgers_that_are_made_at_once_are_one(path: Path) -> None:
    async def play() -> list[Any]:
        ledgers = [SQLiteLedger(path) for _ in range(8)]
        await asyncio.gather(*(create(f"s{number}")(ledger) for number, ledger in enumerate(ledgers)))
        found = [len(await ledger.list()) for ledger in ledgers]
        for ledger in ledgers:
            await ledger.close()
        return found

    assert asyncio.run(play()) == [8] * 8
    assert list(path.parent.iterdir()) == [path]


def test_several_processes_append_to_one_file(path: Path) -> None:
    command = [sys.executable, "-m", "tests.scripts.appending", str(path), "20"]
    processes = [subprocess.Popen([*command, prefix], stdout=subprocess.DEVNULL) for prefix in "xyz"]

    assert [process.wait(60) for process in processes] == [0, 0, 0]

    names = [f"{prefix}{saga}" for prefix in "xyz" for saga in SAGAS]
    for name, events in zip(names, on(SQLiteLedger(path), *map(read, names)), strict=True):
        assert events[0].saga_id == name
        assert [event.attempt for event in events[1:]] == list(range(1, 1 + 20 * AT_ONCE))


def test_a_copy_made_as_the_docs_say_while_a_process_appends_holds_all_that_was_recorded_before(path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "how-to" / "look-after-a-ledger.md"
    (statement,) = re.findall(r'`sqlite3 trips\.db "(.+?)"`', page.read_text(encoding="utf-8"))
    copy = path.with_name("copy.db")
    command = [sys.executable, "-m", "tests.scripts.appending", str(path)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(40)]
        execute(path, statement.replace("copy.db", str(copy)))
        process.kill()

    recorded = dict(zip(SAGAS, on(SQLiteLedger(copy), *map(read, SAGAS)), strict=True))
    for saga_id, version in map(str.split, told):
        assert len(recorded[saga_id]) >= int(version)


# -- threads ---------------------------------------------------------------------------------------------------------


def threads_of(path: Path) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"SQLiteLedger({str(path)!r})")]


def test_a_ledger_that_was_closed_has_no_threads(path: Path) -> None:
    ledger = SQLiteLedger(path)

    asyncio.run(create()(ledger))
    during = sorted(thread.name for thread in threads_of(path))
    asyncio.run(ledger.close())

    assert during == [f"SQLiteLedger({str(path)!r}) ({work})" for work in ("reads", "writes")]
    assert threads_of(path) == []


def test_a_ledger_that_gets_one_thread_only_lets_it_go_and_is_used_when_there_are_two(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system refuses them above a user's limit: whoever tries again would take each that becomes free."""
    ledger = SQLiteLedger(path)
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", start_one)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            asyncio.run(create()(ledger))
    begun[0].join(5)

    assert not begun[0].is_alive()
    assert on(ledger, create(), read())[1] == (started(),)


def test_a_ledger_is_told_to_be_shut_out_by_the_limit_of_open_files_and_is_opened_when_there_is_room(path: Path) -> None:
    ledger = SQLiteLedger(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> Sequence[AnyEvent]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(LedgerError, match="how many files this process may have open"):
                await create()(ledger)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await create()(ledger)
        return await ledger.read("s")

    assert asyncio.run(main()) == (started(),)


def opening_fails(monkeypatch: pytest.MonkeyPatch, why: int) -> None:
    """Let the ledger's own opening of its file fail, and none of SQLite's."""

    def fail(*_: Any) -> int:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "open", fail)


@pytest.mark.skipif(sys.platform != "linux", reason="a ledger opens its file past SQLite only there")
def test_a_ledger_that_has_no_room_for_its_lock_is_not_used_before_there_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(SQLiteLedger(path), create())

    async def make_room(_: Any) -> None:
        monkeypatch.undo()

    async def look(_: Any) -> list[str]:
        return in_use(path)

    opening_fails(monkeypatch, errno.EMFILE)
    refused, _, recorded, files = on(SQLiteLedger(path), append(FIRST), make_room, append(FIRST), look)

    assert f"the ledger {path} can't be locked: [Errno 24] Too many open files (see to how many files" in str(refused)
    assert recorded is None
    assert files.count(str(path)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="a ledger opens its file past SQLite only there")
def test_a_ledger_that_could_only_be_read_at_first_is_locked_when_it_can_be_written_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(SQLiteLedger(path), create())

    async def mount_anew(_: Any) -> None:
        monkeypatch.undo()

    async def look(_: Any) -> list[str]:
        return in_use(path)

    opening_fails(monkeypatch, errno.EROFS)
    before, one, _, recorded, two = on(SQLiteLedger(path), read(), look, mount_anew, append(FIRST), look)

    assert (before, recorded) == ((started(),), None)
    assert (one.count(str(path)), two.count(str(path))) == (1, 3)


def test_a_ledger_is_opened_while_another_one_takes_its_log_away_because_it_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_last, has_closed, goes_on = threading.Event(), threading.Event(), threading.Event()
    came: list[bool] = []

    class Lingers(sqlite3.Connection):
        def close(self) -> None:
            super().close()
            if is_last.is_set():
                has_closed.set()
                came.append(goes_on.wait(60))

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Lingers))

    async def play() -> None:
        one, other = SQLiteLedger(path), SQLiteLedger(path)
        await one.beat("me")
        is_last.set()
        closing_it = asyncio.create_task(one.close())
        while not has_closed.is_set():
            await asyncio.sleep(0)
        is_last.clear()
        try:
            await other.beat("you")
        finally:
            goes_on.set()
            await closing_it
            await other.close()

    asyncio.run(play())

    assert came == [True], "it waited for that to end"
    assert SQLiteFile(path).owners() == ["me", "you"]


def test_whoever_closes_a_ledger_that_somebody_else_is_closing_waits_until_it_is_closed(path: Path) -> None:
    """What was asked for before would be lost with the event loop, or meet a file that is gone."""
    ledger = SQLiteLedger(path)

    async def play() -> list[threading.Thread]:
        await create()(ledger)
        appended = asyncio.create_task(append(FIRST)(ledger))
        await asyncio.sleep(0)
        first = asyncio.create_task(ledger.close())
        await asyncio.sleep(0)
        await ledger.close()
        left = threads_of(path)
        await asyncio.gather(first, appended)
        return left

    left = asyncio.run(play())

    assert left == []
    assert on(SQLiteLedger(path), read()) == [(started(), FIRST)]


class Door:
    """What a worker may work with: each request is an event that it waits for."""

    def close(self) -> None:
        """It stays."""


def wait_for(_: Door, requests: Sequence[threading.Event]) -> Sequence[bool]:
    return [request.wait(60) for request in requests]


def opened() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_who_has_been_alone_for_a_while_is_not_held_up_for_others() -> None:
    reached = threading.Event()

    def reach(_: Door, requests: Sequence[threading.Event]) -> Sequence[None]:
        for request in requests:
            request.set()
        return [None] * len(requests)

    async def play() -> None:
        worker = workers.Worker("w", Door, reach)
        for _ in range(workers._ALONE):
            await worker.ask(threading.Event())
        asked = worker.ask(reached)

        assert reached.wait(60)  # before this turn of the loop ends

        await asked
        await worker.end()

    asyncio.run(play())


class Taken(SimpleQueue[Any]):
    """What is put into it is taken at once, as where the thread that takes it is the faster one."""

    def __init__(self) -> None:
        super().__init__()
        self.is_taken = threading.Event()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:  # noqa: FBT002 - as in Python's own
        self.is_taken.clear()
        super().put(item)
        assert self.is_taken.wait(60)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: FBT002 - as in Python's own
        item = super().get(block, timeout)
        self.is_taken.set()
        return item


def test_what_is_asked_for_in_one_turn_of_a_loop_is_one_batch_though_the_thread_takes_the_first_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[Sequence[int]] = []

    def work(_: Door, requests: Sequence[int]) -> Sequence[None]:
        batches.append(requests)
        return [None] * len(requests)

    async def play() -> None:
        worker = workers.Worker("w", Door, work)
        await asyncio.gather(*map(worker.ask, range(3)))
        await worker.end()

    monkeypatch.setattr(workers, "SimpleQueue", Taken)

    asyncio.run(play())

    assert batches == [[0, 1, 2]]


class Pause(threading.Event):
    """Sets another event when a thread of a name waits for it."""

    def __init__(self, name: str, seen: threading.Event) -> None:
        super().__init__()
        self.name, self.seen = name, seen

    def wait(self, timeout: float | None = None) -> bool:
        if threading.current_thread().name == self.name:
            self.seen.set()
        return super().wait(timeout)


def test_a_loop_that_never_rests_stands_back_for_what_another_one_waits_for() -> None:
    """It has its own answers; but as long as it has work to do, it keeps Python's lock from the worker, and from the other loop."""
    worker = workers.Worker("w", Door, wait_for)
    is_busy, is_over, has_stood_back = threading.Event(), threading.Event(), threading.Event()

    async def ask_once() -> None:
        assert await worker.ask(opened())

    async def be_busy() -> None:
        await ask_once()
        while asyncio.get_running_loop() in worker._watching:  # until it has seen that it has its answer
            await asyncio.sleep(0)
        is_busy.set()
        while not is_over.is_set():
            await asyncio.sleep(0)

    async def wait() -> bool:
        answer: bool = await worker.ask(has_stood_back)
        is_over.set()
        await worker.end()
        return answer

    gone = asyncio.new_event_loop()
    gone.run_until_complete(ask_once())
    gone.close()
    busy = threading.Thread(target=lambda: asyncio.run(be_busy()), name="busy")
    busy.start()
    assert is_busy.wait(60)
    worker._has_answered = Pause("busy", has_stood_back)
    answer = asyncio.run(wait())
    busy.join()

    assert answer


def test_a_loop_rests_once_all_is_answered_in_whatever_order_two_loops_have_handed_it_over() -> None:
    """Each stood back every few milliseconds for an answer that was there, until somebody asked for something else."""
    first, is_handed_over = threading.Event(), threading.Event()

    async def ask_and_be_first() -> None:
        asked = worker.ask(opened())
        await asyncio.sleep(0)
        is_handed_over.set()
        assert await asked

    async def play() -> None:
        busy = worker.ask(first)
        await asyncio.sleep(0)
        asked = worker.ask(opened())
        other = threading.Thread(target=lambda: asyncio.run(ask_and_be_first()))
        other.start()
        assert is_handed_over.wait(60)  # before the end of this loop's turn
        await asyncio.sleep(0)
        first.set()
        assert await busy
        assert await asked
        other.join()
        # The thread notes after it has answered how far it has come.
        rest = worker.rest()
        assert rest.reached.wait(60)

        assert worker._answered == worker._newest

        rest.over.set()
        await worker.end()

    worker = workers.Worker("w", Door, wait_for)
    asyncio.run(play())


def test_what_is_handed_over_behind_the_end_is_refused() -> None:
    async def play() -> None:
        worker = workers.Worker("w", Door, wait_for)
        first = threading.Event()
        asked = worker.ask(first)
        await asyncio.sleep(0)
        worker.stop()
        late = worker.ask(opened())
        await asyncio.sleep(0)
        first.set()

        assert await asked
        with pytest.raises(LedgerError, match="the ledger is closed"):
            await late

    asyncio.run(play())


def test_what_is_handed_over_after_another_event_loop_has_closed_the_ledger_is_refused() -> None:
    async def play() -> None:
        worker = workers.Worker("w", Door, wait_for)
        late = worker.ask(opened())
        other = threading.Thread(target=lambda: asyncio.run(worker.end()))
        other.start()
        other.join()

        with pytest.raises(LedgerError, match="the ledger is closed"):
            await late

    asyncio.run(play())


def test_what_was_done_before_the_end_is_answered_so_though_it_was_asked_for_once_more_behind_that() -> None:
    begun = threading.Event()

    def work(door: Door, requests: Sequence[threading.Event]) -> Sequence[bool]:
        begun.set()
        return wait_for(door, requests)

    async def play() -> None:
        worker = workers.Worker("w", Door, work)
        first = threading.Event()
        worker.ask(first)
        await asyncio.sleep(0)
        assert begun.wait(60)
        asked = worker.ask(opened())
        await asyncio.sleep(0)
        worker.stop()
        asked.cancel()

        first.set()
        worker.join(60)
        asked.cancel()

        assert asked.late is not None
        assert await asked.late

    asyncio.run(play())


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize(("place", "name"), [(workers.Worker, "_end_turn"), (workers.Worker, "_hand_over"), (workers, "_give_all")])
def test_a_write_that_a_ctrl_c_cuts_off_from_its_answer_is_answered_all_the_same(
    place: Any, name: str, is_cancelled: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saga waited for it for ever when asyncio.run cancelled all tasks, and the process hung."""
    answered: list[str] = []

    async def play() -> None:
        async with SQLiteLedger(path) as ledger:
            if is_cancelled:
                asyncio.get_running_loop().call_soon(this_task().cancel)
            interrupt_next_call(monkeypatch, place, name)
            await ledger.create("s", "me", [started("s")])
            answered.append("created")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(play())

    assert answered == ["created"]


def test_what_is_asked_for_keeps_its_place_when_who_waits_for_it_is_cancelled_in_the_same_turn() -> None:
    done: list[str] = []

    def work(_: Door, requests: Sequence[str]) -> Sequence[None]:
        done.extend(requests)
        return [None] * len(requests)

    async def play() -> None:
        worker = workers.Worker("w", Door, work)
        worker.ask("first")
        worker.ask("second").cancel()
        await worker.end()

    asyncio.run(play())

    assert done == ["first", "second"]


@pytest.mark.parametrize("name", ["_end_turn", "_hand_over"])
def test_a_ledger_answers_in_a_loop_that_goes_on_after_a_ctrl_c_cut_off_what_it_was_asked_for(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an interactive shell, where nobody is cancelled: all that was asked of it from then on, or just that, waited for ever."""
    asking: list[asyncio.Task[Any]] = []

    async def play() -> Sequence[AnyEvent]:
        asking.append(this_task())
        interrupt_next_call(monkeypatch, workers.Worker, name)
        return await ledger.read("s")

    async def goes_on() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*asking, ledger.read("s")), 60)

    with asyncio.Runner() as runner:
        ledger = SQLiteLedger(path)
        with pytest.raises(KeyboardInterrupt):
            runner.run(play())

        assert runner.run(goes_on()) == [(), ()]

        runner.run(ledger.close())


def test_a_ledger_answers_in_a_loop_that_goes_on_after_one_ctrl_c_struck_where_it_stood_back_and_another_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What sees that an answer is late was over with the first."""

    async def play() -> None:
        worker.ask(first)
        await asyncio.sleep(0)
        interrupt_next_call(monkeypatch, threading.Event, "wait")
        await asyncio.Event().wait()

    async def play_on() -> None:
        interrupt_next_call(monkeypatch, workers.Worker, "_end_turn")
        asking.append(worker.ask(opened()))
        first.set()
        await asyncio.Event().wait()

    async def goes_on() -> bool:
        return bool(await asyncio.wait_for(asking[0], 60))

    first = threading.Event()
    asking: list[asyncio.Future[Any]] = []
    with asyncio.Runner() as runner:
        worker = workers.Worker("w", Door, wait_for)
        for work in (play, play_on):
            with pytest.raises(KeyboardInterrupt):
                runner.run(work())

        assert runner.run(goes_on())

        runner.run(worker.end())


def test_a_ledger_is_closed_although_a_ctrl_c_cut_off_what_it_was_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order to end went behind what nobody handed over any more, and the process hung."""

    async def play() -> None:
        async with SQLiteLedger(path) as ledger:
            interrupt_next_call(monkeypatch, workers.Worker, "_end_turn")
            await ledger.read("s")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(play())

    assert threads_of(path) == []


def test_a_ledger_that_nobody_holds_any_more_ends_its_threads_and_closes_its_connections(path: Path) -> None:
    ledger = SQLiteLedger(path)
    asyncio.run(create()(ledger))
    threads = threads_of(path)

    del ledger
    gc.collect()
    for thread in threads:
        thread.join(60)

    assert threads_of(path) == []
    assert list(path.parent.iterdir()) == [path]


# -- a process that forks --------------------------------------------------------------------------------------------


def in_use(path: Path) -> list[str]:
    """Which of a ledger's files this process has open."""
    descriptors = Path("/proc/self/fd").iterdir()
    return [str(found) for found in map(Path.resolve, descriptors) if str(found).startswith(str(path))]


def fork_waits() -> bool:
    """Whether the main thread is forking, and waits for a worker to come to rest."""
    main = sys._current_frames()[threading.main_thread().ident or 0]
    return bool(workers.WORKING._rests) and main.f_code is threading.Condition.wait.__code__


@forks
def test_a_process_that_is_forked_off_inherits_no_connection_and_no_worker(path: Path) -> None:
    ledger = SQLiteLedger(path)
    asyncio.run(create()(ledger))
    asyncio.run(read()(ledger))
    before = in_use(path)

    def look() -> None:
        assert in_use(path) == []
        assert list(workers.WORKING.workers) == []
        assert threads_of(path) == []

    child = fork(look)
    child.join()

    assert before
    assert child.exitcode == 0
    assert on(ledger, read()) == [(started(),)]


@forks
def test_a_process_that_is_forked_off_inherits_no_lock_of_a_ledger_that_others_use(path: Path) -> None:
    """While others use the file, the opening of it that is locked stays for the next connection: after the fork, too."""
    ledger = SQLiteLedger(path)

    def look() -> None:
        assert in_use(path) == []

    with subprocess.Popen([sys.executable, "-c", _IDLE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as idle:
        assert idle.stdout is not None
        idle.stdout.readline()
        asyncio.run(create()(ledger))
        child = fork(look)
        child.join()
        kept = in_use(path)
        asyncio.run(ledger.close())
        idle.communicate("go on")

    assert kept == [str(path)]
    assert child.exitcode == 0


@forks
def test_a_fork_waits_until_the_batch_under_way_is_on_disk(path: Path) -> None:
    is_writing = threading.Event()

    def clock() -> float:
        """Keep the transaction open until a fork has begun."""
        if not is_writing.is_set():
            is_writing.set()
            while not fork_waits():
                pass
        return time.time()

    def look() -> None:
        with closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT id FROM sagas").fetchall() == [("s",)]

    ledger = SQLiteLedger(path, clock=clock)
    writer = threading.Thread(target=lambda: asyncio.run(create()(ledger)))
    writer.start()
    assert is_writing.wait(60)
    child = fork(look)
    child.join()
    writer.join()

    assert child.exitcode == 0
    assert on(ledger, read()) == [(started(),)]


@forks
def test_a_signal_whose_handler_raises_does_not_have_a_fork_go_ahead_of_the_batch_under_way(path: Path) -> None:
    is_writing, is_raised = threading.Event(), threading.Event()

    def clock() -> float:
        """Keep the transaction open until a fork waits for it and was interrupted."""
        if not is_writing.is_set():
            is_writing.set()
            while not fork_waits():
                pass
            while not is_raised.is_set():
                # One that strikes just before the fork's wait begins does not end it.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                is_raised.wait(0.1)
        return time.time()

    def interrupt(*_: object) -> None:
        is_raised.set()
        raise KeyboardInterrupt

    ledger = SQLiteLedger(path, clock=clock)
    usual = signal.signal(signal.SIGUSR1, interrupt)
    writer = threading.Thread(target=lambda: asyncio.run(create()(ledger)))
    writer.start()
    try:
        assert is_writing.wait(60)
        child = fork(lambda: on(SQLiteLedger(path), append(FIRST)))
        child.join()
    finally:
        signal.signal(signal.SIGUSR1, usual)
    writer.join()

    assert is_raised.is_set()
    assert child.exitcode == 0
    assert on(ledger, read()) == [(started(), FIRST)]


@forks
def test_a_clock_that_forks_costs_the_batch_that_asks_it_and_no_other(path: Path) -> None:
    children: list[ForkProcess] = []

    def clock() -> float:
        if not children:
            children.append(fork(lambda: None))
        return time.time()

    failed, _, events = on(SQLiteLedger(path, clock=clock), create(), create(), read())

    children[0].join()
    assert children[0].exitcode == 0
    assert isinstance(failed, LedgerError)
    assert "nothing was recorded" in str(failed)
    assert events == (started(),)


# -- a process that ends ---------------------------------------------------------------------------------------------


def test_what_a_killed_process_was_told_is_recorded_is_there_and_nothing_is_half_there(path: Path) -> None:
    command = [sys.executable, "-m", "tests.scripts.appending", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(40)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()

    assert process.returncode == -signal.SIGKILL
    recorded = dict(zip(SAGAS, on(SQLiteLedger(path), *map(read, SAGAS)), strict=True))
    # The last line may be cut; what it would have said is not known to anybody.
    for saga_id, version in (line.split() for line in told if line.endswith("\n")):
        assert len(recorded[saga_id]) >= int(version)
    for saga_id, events in recorded.items():
        assert events[0].saga_id == saga_id
        assert [event.attempt for event in events[1:]] == list(range(1, len(events)))
        assert len(events) % AT_ONCE == 1


def test_a_ledger_that_nobody_closed_is_closed_when_the_process_ends(path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.scripts.appending", str(path), "4"], check=True, stdout=subprocess.DEVNULL)

    assert list(path.parent.iterdir()) == [path]  # no log any more
    assert [len(events) for events in on(SQLiteLedger(path), *map(read, SAGAS))] == [1 + 4 * AT_ONCE] * len(SAGAS)


def test_all_ledgers_can_be_closed_at_once(path: Path) -> None:
    ledger = SQLiteLedger(path)
    asyncio.run(create()(ledger))

    workers._stop_all()

    assert list(path.parent.iterdir()) == [path]


# -- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [{"rows": [1, {"seats": (2, object())}]}, {"by": {3: {"x": [print]}}}])
def test_what_cannot_be_stored_is_refused_with_the_path_to_it(path: Path, data: dict[str, Any]) -> None:
    event = StageCompleted(stage="pay", output=StageOutput.ok(data))

    _, refused, events = on(SQLiteLedger(path), create(), append(event), read())

    where = "data['rows'][1]['seats'][1]" if "rows" in data else "data['by'][3]['x'][0]"
    assert isinstance(refused, LedgerError)
    assert str(refused).startswith("StageCompleted of saga s, stage 'pay', can't be stored")
    assert where in str(refused)
    assert events == (started(),)


def test_an_event_that_is_too_large_is_refused_with_its_size_and_nothing_of_its_append_is_recorded(path: Path) -> None:
    ledger = SQLiteLedger(path, max_event_bytes=2_000)

    _, refused, _, events = on(ledger, create(), append(FIRST, large(2_000)), append(FIRST), read())

    assert isinstance(refused, LedgerError)
    assert "stage 'a', has 2,1" in str(refused)
    assert "bytes of JSON, the ledger takes 2,000 (max_event_bytes); nothing was recorded" in str(refused)
    assert events == (started(), FIRST)


def test_the_size_of_an_event_is_counted_in_bytes_and_not_in_characters(path: Path) -> None:
    event = StageCompleted(stage="a", output=StageOutput.ok({"text": "€" * 700}))

    _, refused = on(SQLiteLedger(path, max_event_bytes=2_000), create(), append(event))

    assert "has 2,2" in str(refused)


def test_redact_changes_what_is_stored_and_nothing_else(path: Path) -> None:
    def redact(event: AnyEvent) -> AnyEvent:
        return replace(event, output=StageOutput.ok({"card": "***"})) if isinstance(event, StageCompleted) else event

    paid = StageCompleted(stage="a", output=StageOutput.ok({"card": "4111-1111"}))

    *_, events = on(SQLiteLedger(path, redact=redact), create(), append(FIRST, paid), read())

    assert events == (started(), FIRST, redact(paid))
    assert paid.output.data == {"card": "4111-1111"}
    assert b"4111" not in path.read_bytes()


def _raises(_: AnyEvent) -> AnyEvent:
    raise KeyError("card")


@pytest.mark.parametrize(
    ("redact", "why"), [(_raises, "redact raised KeyError: 'card'"), (lambda _: None, "expected one from redact, got NoneType")]
)
def test_when_redact_fails_nothing_is_stored(path: Path, redact: Any, why: str) -> None:
    refused, sagas = on(SQLiteLedger(path, redact=redact), create(), listed())

    assert isinstance(refused, LedgerError)
    assert str(refused) == f"SagaStarted of saga s can't be stored: {why}"
    assert sagas == []


@pytest.mark.parametrize("name", ["x" * 501, "a\0b", "a\ud800b"])
def test_a_name_that_a_database_cannot_hold_is_refused(path: Path, name: str) -> None:
    create_it, read_it, own_it = create(name), read(name), create("t", name)

    answers = on(SQLiteLedger(path), create_it, read_it, own_it, append(FIRST, saga_id=name))

    assert all(isinstance(answer, LedgerError) and "of at most 500 characters" in str(answer) for answer in answers)


# -- opening ---------------------------------------------------------------------------------------------------------


def test_a_ledger_is_opened_by_its_url(path: Path) -> None:
    assert isinstance(open_ledger("memory:"), MemoryLedger)
    in_a_file = open_ledger(f"sqlite:///{path}")
    assert isinstance(in_a_file, SQLiteLedger)
    assert in_a_file.path == path
    assert isinstance(open_ledger("postgresql://user:secret@localhost/sagas"), PostgresLedger)
    assert isinstance(open_ledger("postgres://localhost/sagas"), PostgresLedger)


@pytest.mark.parametrize("url", ["", "memory:x", "sqlite:", "sqlite:///", "sqlite://x", "postgresql:x", "mysql://me:secret@x"])
def test_a_url_that_names_no_ledger_is_refused_without_the_password_in_it(url: str) -> None:
    with pytest.raises(MisuseError, match=r"expected a ledger's URL: memory:, sqlite:///path or postgresql://") as refused:
        open_ledger(url)

    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("path_", ["", ":memory:"])
def test_a_path_that_is_none_is_refused(path_: str) -> None:
    with pytest.raises(MisuseError, match=r"expected the path of a file, got .*MemoryLedger"):
        SQLiteLedger(path_)


@pytest.mark.parametrize("option", ["lease", "patience", "max_event_bytes"])
@pytest.mark.parametrize("number", [0, -1, float("nan"), "30", True])
def test_an_option_that_makes_no_sense_is_refused(path: Path, option: str, number: Any) -> None:
    make = partial(SQLiteLedger, path)

    with pytest.raises(MisuseError, match=f"expected a number above 0 for {option}, got {number!r}"):
        make(**{option: number})


def test_a_redact_that_is_no_function_is_refused(path: Path) -> None:
    redact: Any = 3

    with pytest.raises(MisuseError, match="expected a function for redact, got 3"):
        SQLiteLedger(path, redact=redact)


def test_a_ledger_says_where_it_is(path: Path) -> None:
    assert repr(SQLiteFile(path).open()) == f"SQLiteLedger({str(path)!r})"


def test_a_path_from_a_folder_that_was_deleted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    with pytest.raises(MisuseError, match=r"^expected a path from the root where the current folder was deleted, got 'sagas.db'$"):
        SQLiteLedger("sagas.db")


def test_a_path_is_the_one_that_it_was_when_the_ledger_was_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    ledger = SQLiteLedger(path.name)
    monkeypatch.chdir("/")

    on(ledger, create())

    assert path.exists()
