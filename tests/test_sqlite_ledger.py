"""The ledger in a file: what survives a kill, what is noticed of damage, and what is said when the file fails."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saga import FailFast, Ledger, LedgerConflict, LedgerCorrupt, LedgerError, MisuseError
from saga.events import AnyEvent, EffectRecorded, SagaStarted, StageStarted
from saga.ledgers import sqlite, workers
from saga.ledgers.sqlite import SQLiteLedger
from tests.test_ledger import GRAPH

ROOT = Path(__file__).parent.parent


def started(saga_id: str = "s") -> SagaStarted:
    return SagaStarted(saga_id=saga_id, pipeline="p", graph=GRAPH, policy=FailFast())


def attempt(number: int) -> StageStarted:
    return StageStarted(stage="a", attempt=number)


def effect(size: int) -> EffectRecorded:
    return EffectRecorded(stage="a", effect="x" * size)


def using(ledger: Ledger, act: Callable[[Any], Any]) -> Any:
    """Do something with a ledger, and close it."""

    async def play() -> Any:
        try:
            return await act(ledger)
        finally:
            await ledger.close()

    return asyncio.run(play())


def written(path: Path, sagas: int = 1, events: int = 3) -> dict[str, tuple[AnyEvent, ...]]:
    """Make a ledger with sagas in it; their events."""

    async def play(ledger: Ledger) -> dict[str, tuple[AnyEvent, ...]]:
        made: dict[str, tuple[AnyEvent, ...]] = {}
        for number in range(sagas):
            saga_id = f"saga-{number}"
            made[saga_id] = (started(saga_id), *(attempt(position) for position in range(1, events)))
            token = await ledger.create(saga_id, "me", made[saga_id][:1])
            for position in range(1, events):
                await ledger.append(saga_id, made[saga_id][position : position + 1], expected_version=position, token=token)
        return made

    found: dict[str, tuple[AnyEvent, ...]] = using(SQLiteLedger(path), play)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "a ledger that was closed is one file"
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sagas.db"


# -- on disk ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def child(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, with what a child of these tests needs already imported."""
    prelude = (
        "import asyncio, os, sys\n"
        "from saga import LedgerError\n"
        "from saga.ledgers.sqlite import SQLiteLedger\n"
        "from tests.test_sqlite_ledger import attempt, effect, started\n"
    )
    command = [sys.executable, "-W", "error", "-c", prelude + code, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}) as process:
        yield process
        if process.poll() is None:
            process.kill()


APPENDER = """
async def one(ledger, name):
    token = await ledger.create(name, name, [started(name)])
    for number in range(1, int(sys.argv[3]) + 1):
        await ledger.append(name, [attempt(number)], expected_version=number, token=token)
        print(name, number, flush=True)

async def main():
    async with SQLiteLedger(sys.argv[1]) as ledger:
        await asyncio.gather(*(one(ledger, name) for name in sys.argv[2].split(",")))

asyncio.run(main())
"""


@pytest.mark.parametrize("kill_after", [1, 50, 400])
def test_every_append_that_was_acknowledged_is_there_after_a_kill(path: Path, kill_after: int) -> None:
    names = [f"saga-{number}" for number in range(20)]
    acknowledged = dict.fromkeys(names, 0)

    with child(APPENDER, path, ",".join(names), 1000) as process:
        assert process.stdout is not None
        for count, line in enumerate(process.stdout, 1):
            name, number = line.split()
            acknowledged[name] = int(number)
            if count == kill_after:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    async def look(ledger: Ledger) -> None:
        for name in names:
            events = await ledger.read(name)
            assert [getattr(event, "attempt", 0) for event in events] == list(range(len(events))), "nothing is half there"
            assert len(events) > acknowledged[name] or not acknowledged[name]
            if events:
                assert await ledger.acquire(name, "me") == 2, "a saga whose process is gone can be gone on with"

    assert sum(acknowledged.values()) >= kill_after
    using(SQLiteLedger(path, clock=lambda: time.time() + 60), look)


def test_several_processes_append_to_one_file(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child(APPENDER, path, f"{number}a,{number}b,{number}c", 30)) for number in range(3)]
        for process in processes:
            process.communicate()
            assert process.returncode == 0

    async def look(ledger: Ledger) -> None:
        entries = await ledger.list()
        assert sorted(entry.saga_id for entry in entries) == [f"{number}{letter}" for number in range(3) for letter in "abc"]
        for entry in entries:
            assert [getattr(event, "attempt", 0) for event in await ledger.read(entry.saga_id)] == list(range(31))

    using(SQLiteLedger(path), look)


def test_an_append_is_synced_before_it_is_acknowledged(path: Path) -> None:
    store = sqlite._Store(path, 30.0, 10.0, time.time)
    connection = store._connection()

    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA fullfsync").fetchone() == (1,)
    store.close()


def commits(path: Path) -> int:
    """How many commits are in the log beside a ledger: a frame that ends one says how many pages the file then has."""
    log = path.with_name(f"{path.name}-wal").read_bytes()
    page = struct.unpack(">I", log[8:12])[0]
    frames = range(32, len(log) - page - 23, page + 24)
    return sum(struct.unpack(">I", log[at + 4 : at + 8])[0] > 0 for at in frames)


def test_appends_that_come_together_share_a_commit(path: Path) -> None:
    async def play(ledger: Ledger) -> tuple[int, int]:
        await asyncio.gather(*(ledger.create(f"s{number}", "me", (started(f"s{number}"),)) for number in range(200)))
        before = commits(path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            # While another program writes, appends queue up.
            other.execute("BEGIN IMMEDIATE")
            appends = [ledger.append(f"s{number}", (attempt(1),), expected_version=1, token=1) for number in range(200)]
            tasks = [asyncio.create_task(one) for one in appends]
            await asyncio.sleep(0)
            other.execute("ROLLBACK")
            await asyncio.gather(*tasks)
        return before, commits(path)

    before, after = using(SQLiteLedger(path), play)

    # The first may have been taken alone before the others came.
    assert 1 <= after - before <= 3


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, tuple[AnyEvent, ...]]]:
    """The bytes of a ledger with thirty sagas, and their events."""
    path = tmp_path_factory.mktemp("intact") / "sagas.db"
    sagas = written(path, sagas=30, events=6)
    return path.read_bytes(), sagas


def read_all(path: Path, sagas: dict[str, tuple[AnyEvent, ...]]) -> tuple[int, list[LedgerError]]:
    """Read every saga of a ledger that may be damaged: how many were right, and what was said of the others."""

    async def play(ledger: Ledger) -> tuple[int, list[LedgerError]]:
        right, errors = 0, []
        for saga_id, events in sagas.items():
            try:
                found = await ledger.read(saga_id)
            except LedgerError as error:
                errors.append(error)
            else:
                assert found == events, "wrong events are worse than none"
                right += 1
        return right, errors

    before = path.read_bytes()
    answer: tuple[int, list[LedgerError]] = using(SQLiteLedger(path, patience=0.1), play)
    assert path.read_bytes() == before
    return answer


@pytest.mark.parametrize("part", [0, 1, 15, 16, 99, 100, 511, 4095, 4096, 4097, *range(8191, 90000, 6007)])
def test_of_a_ledger_that_was_cut_nothing_is_read_and_nothing_is_changed(path: Path, part: int, intact: Any) -> None:
    data, sagas = intact
    assert part < len(data)
    path.write_bytes(data[:part])

    right, errors = read_all(path, sagas)

    assert right == 0
    assert {type(error) for error in errors} <= {LedgerCorrupt, LedgerError}
    assert all(str(path) in str(error) for error in errors)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), length=st.integers(1, 64), how=st.sampled_from(["bit", "zero", "swap"])
)
def test_of_a_ledger_with_flipped_bits_the_right_events_are_read_or_none(
    tmp_path: Path, share: float, bit: int, length: int, how: str, intact: Any
) -> None:
    data, sagas = bytearray(intact[0]), intact[1]
    at = int(share * len(data))
    if how == "bit":
        data[at] ^= 1 << bit
    elif how == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    else:
        page = at // 4096 * 4096
        data[page : page + 8192] = data[page + 4096 : page + 8192] + data[page : page + 4096]
    path = tmp_path / "damaged.db"
    path.write_bytes(data)

    read_all(path, sagas)


CHANGES = {
    "a row is gone": "DELETE FROM events WHERE saga = 'saga-0' AND first = 1",
    "the last row is gone": "DELETE FROM events WHERE saga = 'saga-0' AND first = 2",
    "all rows are gone": "DELETE FROM events WHERE saga = 'saga-0'",
    "the saga's own row is gone": "DELETE FROM sagas WHERE id = 'saga-0'",
    "there is a row too many": "UPDATE sagas SET version = 2 WHERE id = 'saga-0'",
    "a row is another saga's": "UPDATE events SET saga = 'saga-0', first = 3 WHERE saga = 'saga-1' AND first = 2",
    "two rows are in the wrong order": (
        "UPDATE events SET body = (SELECT body FROM events AS other WHERE other.saga = events.saga AND other.first = 3 - events.first), "
        "checksum = (SELECT checksum FROM events AS other WHERE other.saga = events.saga AND other.first = 3 - events.first) "
        "WHERE saga = 'saga-0' AND first > 0"
    ),
    "a row has another place": "UPDATE events SET first = 3 WHERE saga = 'saga-0' AND first = 1",
    "a body was changed": "UPDATE events SET body = replace(body, '\"attempt\":1', '\"attempt\":2') WHERE saga = 'saga-0' AND first = 1",
    "a body is a number": "UPDATE events SET body = 7 WHERE saga = 'saga-0' AND first = 1",
    "a body is nothing": "UPDATE events SET body = '' WHERE saga = 'saga-0' AND first = 1",
    "a checksum is a text": "UPDATE events SET checksum = 'seven' WHERE saga = 'saga-0' AND first = 1",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_that_was_changed_is_noticed_and_other_sagas_are_read(path: Path, change: str) -> None:
    sagas = written(path, sagas=3)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        assert other.execute(CHANGES[change]).rowcount >= 1

    async def look(ledger: Ledger) -> None:
        with pytest.raises(LedgerCorrupt, match=r"damaged: saga saga-0 can't be read at event \d.*Nothing was changed. Restore the ledger"):
            await ledger.read("saga-0")
        assert await ledger.read("saga-2") == sagas["saga-2"]

    using(SQLiteLedger(path), look)


def test_a_row_that_this_version_cannot_read_is_told_from_damage(path: Path) -> None:
    from saga.ledgers.rows import checksum

    written(path)
    body = '{"at":"2026-01-01T00:00:00Z","event":"stage_applauded","stage":"a"}'
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE events SET body = ?, checksum = ? WHERE first = 1", (body, checksum("saga-0", 1, body.encode())))

    with pytest.raises(LedgerCorrupt, match=r"at event 1: no event of this version of saga: .*stage_applauded"):
        using(SQLiteLedger(path), lambda ledger: ledger.read("saga-0"))


def test_an_entry_that_makes_no_sense_is_noticed(path: Path) -> None:
    written(path)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE sagas SET status = 'funny'")

    with pytest.raises(LedgerCorrupt, match=r"is damaged: 'funny' is not a valid SagaStatus. Nothing was changed"):
        using(SQLiteLedger(path), lambda ledger: ledger.list())


def test_a_damaged_row_fails_the_append_that_meets_it_and_no_other(path: Path) -> None:
    async def make(ledger: Ledger) -> None:
        for saga_id in ("a", "b", "c"):
            await ledger.create(saga_id, "me", (started(saga_id),))

    using(SQLiteLedger(path), make)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        # A row that can't be where it says it is: the append of "b" would be its second.
        other.execute("INSERT INTO events (saga, first, checksum, body) VALUES ('b', 1, 0, '')")

    async def play(ledger: Ledger) -> list[Any]:
        appends = (ledger.append(saga_id, (attempt(1),), expected_version=1, token=1) for saga_id in ("a", "b", "c", "z"))
        return await asyncio.gather(*appends, return_exceptions=True)

    first, second, third, fourth = using(SQLiteLedger(path), play)

    assert (first, third) == (None, None)
    assert type(second) is LedgerError
    assert "UNIQUE constraint failed" in str(second)
    assert type(fourth) is LedgerConflict


def foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE sagas (id TEXT)")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text": (lambda path: path.write_text("Dear diary, " * 100), "is damaged, or no ledger: file is not a database. Nothing was changed"),
    "nothing": (lambda path: path.touch(), "got an empty file; delete it to begin a new ledger"),
    "a directory": (lambda path: path.mkdir(), "failed: unable to open database file"),
    "another program's database": (foreign, r"got another program's database \(application_id 0\)"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_is(path: Path, kind: str) -> None:
    make, message = FOREIGN[kind]
    make(path)
    before = None if path.is_dir() else path.read_bytes()

    with pytest.raises(LedgerError, match=message):
        using(SQLiteLedger(path), lambda ledger: ledger.create("s", "me", (started(),)))
    with pytest.raises(LedgerError, match=message):
        using(SQLiteLedger(path), lambda ledger: ledger.read("s"))

    assert (None if path.is_dir() else path.read_bytes()) == before
    assert list(path.parent.iterdir()) == [path]


def test_a_ledger_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    written(path)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 7")
    before = path.read_bytes()

    with pytest.raises(LedgerError, match="has schema version 7, this version of saga knows up to 1: it was written by a newer one"):
        using(SQLiteLedger(path), lambda ledger: ledger.create("s", "me", (started(),)))

    assert path.read_bytes() == before


def test_a_ledger_of_an_older_version_is_brought_to_the_newest_and_keeps_its_sagas(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sagas = written(path)
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*sqlite.MIGRATIONS, ("ALTER TABLE sagas ADD COLUMN colour TEXT",)))

    found = [using(SQLiteLedger(path), lambda ledger: ledger.read("saga-0")) for _ in range(2)]

    assert found == [sagas["saga-0"]] * 2
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA user_version").fetchone() == (2,)
        assert other.execute("SELECT colour FROM sagas").fetchone() == (None,)


def test_a_ledger_whose_schema_was_changed_by_hand_is_refused(path: Path) -> None:
    written(path)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("ALTER TABLE sagas RENAME COLUMN token TO tokens")

    with pytest.raises(LedgerCorrupt, match="damaged, or was changed by hand: sagas is not as it was made"):
        using(SQLiteLedger(path), lambda ledger: ledger.read("s"))


def test_an_index_of_ones_own_is_nothing_to_refuse(path: Path) -> None:
    sagas = written(path)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE INDEX mine ON sagas (pipeline)")

    assert using(SQLiteLedger(path), lambda ledger: ledger.read("saga-0")) == sagas["saga-0"]


# -- a file that fails -----------------------------------------------------------------------------------------------


def test_a_ledger_that_is_locked_says_so_after_its_patience(path: Path) -> None:
    async def play(ledger: Ledger) -> None:
        await ledger.create("s", "me", (started(),))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(
                LedgerError, match=r"database is locked \(another process or program has held its lock for more than 0.05 s\)"
            ):
                await ledger.append("s", (attempt(1),), expected_version=1, token=1)
            assert len(await ledger.read("s")) == 1, "whoever reads need not wait"
        await ledger.append("s", (attempt(1),), expected_version=1, token=1)

    using(SQLiteLedger(path, patience=0.05), play)


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

async def main():
    async with SQLiteLedger(sys.argv[1]) as ledger:
        await ledger.create("s", "me", [started()])
        await ledger.append("s", [effect(100)], expected_version=1, token=1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
        try:
            await ledger.append("s", [effect(200_000)], expected_version=2, token=1)
        except LedgerError as error:
            print(type(error).__name__, error)
        print(len(await ledger.read("s")))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        await ledger.append("s", [effect(300_000)], expected_version=2, token=1)
        print(len(await ledger.read("s")))

asyncio.run(main())
"""


def test_a_disk_that_is_full_is_told_and_when_there_is_room_again_it_goes_on(path: Path) -> None:
    with child(FULL, path) as process:
        printed, _ = process.communicate()

    assert process.returncode == 0
    error, events, later = printed.splitlines()
    assert error.startswith("LedgerError the ledger")
    assert "nothing was recorded" in error
    assert (events, later) == ("2", "3")


READ_ONLY = """
if os.geteuid() == 0:
    os.setuid(65534)  # root may write to everything

async def main():
    async with SQLiteLedger(sys.argv[1]) as ledger:
        for act in (ledger.create("s", "me", [started()]), ledger.read("saga-0")):
            try:
                print(len(await act))
            except LedgerError as error:
                print(type(error).__name__, error)

asyncio.run(main())
"""


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_ledger_that_may_not_be_written_to_says_so(tmp_path: Path, what: str) -> None:
    import tempfile

    # Not under pytest's own directory, which is its owner's alone.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = directory / "sagas.db"
        written(path)
        path.chmod(0o444 if what == "file" else 0o666)
        directory.chmod(0o777 if what == "file" else 0o555)

        with child(READ_ONLY, path) as process:
            printed, _ = process.communicate()
        directory.chmod(0o755)

    refused, found = printed.splitlines()
    assert process.returncode == 0
    assert refused.startswith("LedgerError the ledger")
    assert "attempt to write a readonly database (it or its directory can't be written to; see to their permissions)" in refused
    assert found == ("3" if what == "file" else refused), "what is in a file can be read, if a log may be made beside it"


def test_a_ledger_without_a_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"unable to open database file .*see to the directory"):
        using(SQLiteLedger(tmp_path / "nowhere" / "sagas.db"), lambda ledger: ledger.list())


def test_a_ledger_that_was_deleted_while_in_use_does_not_go_on_writing_to_nothing(path: Path) -> None:
    async def play(ledger: Ledger) -> None:
        await ledger.create("s", "me", (started(),))
        path.unlink()  # noqa: ASYNC240 - nothing else runs
        with pytest.raises(LedgerError, match="moved, deleted or replaced while it was in use; nothing was recorded"):
            await ledger.append("s", (attempt(1),), expected_version=1, token=1)
        with pytest.raises(LedgerError, match=r"is gone, but its log sagas.db-wal is there"):
            await ledger.append("s", (attempt(1),), expected_version=1, token=1)
        path.with_name("sagas.db-wal").unlink()
        with pytest.raises(LedgerConflict, match="there is no saga s"):
            await ledger.append("s", (attempt(1),), expected_version=1, token=1)

    using(SQLiteLedger(path), play)


def test_a_ledger_that_was_replaced_while_in_use_is_left_alone(path: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.db"

    async def play(ledger: Ledger) -> None:
        await ledger.create("s", "me", (started(),))
        await ledger.read("s")
        path.with_name("sagas.db-wal").unlink()
        shutil.copy(backup, tmp_path / "restored.db")
        (tmp_path / "restored.db").rename(path)
        for act in (ledger.append("s", (attempt(1),), expected_version=1, token=1), ledger.read("s")):
            with pytest.raises(LedgerError, match="moved, deleted or replaced"):
                await act
        assert len(await ledger.read("saga-0")) == 3

    sagas = written(path)
    path.rename(backup)
    using(SQLiteLedger(path), play)

    assert using(SQLiteLedger(path), lambda ledger: ledger.read("saga-0")) == sagas["saga-0"]


def test_ledgers_that_are_made_at_once_are_one(path: Path) -> None:
    async def play() -> list[Any]:
        ledgers = [SQLiteLedger(path) for _ in range(8)]
        await asyncio.gather(*(ledger.create(f"s{number}", "me", (started(f"s{number}"),)) for number, ledger in enumerate(ledgers)))
        found = [len(await ledger.list()) for ledger in ledgers]
        await asyncio.gather(*(ledger.close() for ledger in ledgers))
        return found

    assert asyncio.run(play()) == [8] * 8
    assert list(path.parent.iterdir()) == [path]


def test_a_ledger_that_cannot_be_made_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)

    with pytest.raises(LedgerError, match=r"can't be made: .*Operation not permitted"):
        using(SQLiteLedger(path), lambda ledger: ledger.list())
    assert list(path.parent.iterdir()) == []


# -- threads and processes -------------------------------------------------------------------------------------------


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("SQLiteLedger")]


def test_a_ledger_that_was_closed_has_no_threads(path: Path) -> None:
    ledger = SQLiteLedger(path)

    asyncio.run(ledger.create("s", "me", (started(),)))
    during = names_of_threads()
    asyncio.run(ledger.close())

    assert sorted(during) == [f"SQLiteLedger('{path}') (reads)", f"SQLiteLedger('{path}') (writes)"]
    assert names_of_threads() == []


def test_a_ledger_that_nobody_holds_any_more_ends_its_threads_and_connections(path: Path) -> None:
    ledger = SQLiteLedger(path)
    asyncio.run(ledger.create("s", "me", (started(),)))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("SQLiteLedger")]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del ledger
        gc.collect()
        for thread in threads:
            thread.join(5)

    assert names_of_threads() == []
    assert list(path.parent.iterdir()) == [path], "its log is gone: it was closed in order"


FORGETFUL = """
ledger = SQLiteLedger(sys.argv[1])
asyncio.run(ledger.create("s", "me", [started()]))
print("done", flush=True)
"""


def test_a_program_that_does_not_close_its_ledger_ends_in_order(path: Path) -> None:
    with child(FORGETFUL, path) as process:
        printed, _ = process.communicate(timeout=20)

    assert (process.returncode, printed) == (0, "done\n")
    assert list(path.parent.iterdir()) == [path]


def test_at_the_end_of_a_process_the_ledgers_that_nobody_closed_are_closed(path: Path) -> None:
    ledger = SQLiteLedger(path)
    asyncio.run(ledger.create("s", "me", (started(),)))

    workers._stop_all()

    assert names_of_threads() == []
    assert list(path.parent.iterdir()) == [path]


FORKING = """
ledger = SQLiteLedger(sys.argv[1])
asyncio.run(ledger.create("s", "me", [started()]))
pid = os.fork()
number = 1 if pid else 2
if pid:
    os.waitpid(pid, 0)
asyncio.run(ledger.create(f"of {'parent' if pid else 'child'}", "me", [started()]))
asyncio.run(ledger.close())
"""


def test_a_process_that_was_forked_off_uses_threads_and_connections_of_its_own(path: Path) -> None:
    with child(FORKING, path) as process:
        process.communicate(timeout=20)

    assert process.returncode == 0
    entries = using(SQLiteLedger(path), lambda ledger: ledger.list())
    assert [entry.saga_id for entry in entries] == ["s", "of child", "of parent"]


def test_whoever_asks_and_leaves_its_event_loop_keeps_nobody_waiting(path: Path) -> None:
    ledger = SQLiteLedger(path)

    async def leave() -> None:
        call = asyncio.create_task(ledger.create("s", "me", (started(),)))
        await asyncio.sleep(0)
        call.cancel()

    asyncio.run(leave())

    assert using(ledger, lambda ledger: ledger.acquire("s", "me")) == 2


def test_a_defect_of_ours_is_told_to_whoever_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("our own mistake")

    monkeypatch.setattr(sqlite._Store, "write", broken)

    async def play(ledger: Ledger) -> list[Any]:
        calls = (ledger.create(saga_id, "me", (started(saga_id),)) for saga_id in "ab")
        return await asyncio.gather(*calls, return_exceptions=True)

    errors = using(SQLiteLedger(path), play)

    assert [str(error) for error in errors] == ["the ledger failed: ZeroDivisionError: our own mistake"] * 2
    assert all(isinstance(error.__cause__, ZeroDivisionError) for error in errors)
    assert errors[0] is not errors[1]


# -- how it is made --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_a_ledger_needs_a_file(path: str) -> None:
    with pytest.raises(MisuseError, match=r"expected the path of a file, got .* A ledger in memory is a MemoryLedger"):
        SQLiteLedger(path)


@pytest.mark.parametrize("option", ["lease", "patience", "max_event_bytes"])
def test_a_number_that_makes_no_sense_is_refused(path: Path, option: str) -> None:
    with pytest.raises(MisuseError, match=f"expected a number above 0 for {option}, got 0"):
        SQLiteLedger(path, **{option: 0})  # type: ignore[arg-type] # what the test is about


def test_a_path_is_where_it_was_when_the_ledger_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = SQLiteLedger("odd name?#%.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    using(ledger, lambda ledger: ledger.create("s", "me", (started(),)))

    assert (tmp_path / "odd name?#%.db").exists()
    assert repr(ledger) == "SQLiteLedger('odd name?#%.db')"


def test_importing_saga_brings_no_database() -> None:
    code = "import sys, saga; print([name for name in sys.modules if name.startswith(('sqlite3', 'psycopg', 'saga.ledgers'))])"

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
