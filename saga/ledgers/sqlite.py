"""`SQLiteLedger`: sagas in one file, for any number of processes of one machine."""

from __future__ import annotations

import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import cache, partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from threading import RLock
from typing import Any, Final

from saga.errors import LedgerConflict, LedgerCorrupt, LedgerError, MisuseError
from saga.events import AnyEvent, SagaStatus
from saga.ledger import FORGETTABLE, Entry
from saga.ledgers.durable import MAX_EVENT_BYTES, DurableLedger
from saga.ledgers.guards import Guard, is_in_use
from saga.ledgers.rows import Acquire, Append, Beat, Create, Prune, Pruned, Redact, Release, Request, entries_in, events_in, others
from saga.owners import is_gone

MIGRATIONS: Final = (
    (
        """CREATE TABLE sagas (
            number INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            pipeline TEXT NOT NULL,
            parent TEXT,
            parent_stage TEXT,
            status TEXT NOT NULL,
            started_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            version INTEGER NOT NULL,
            token INTEGER NOT NULL,
            owner TEXT
        )""",
        "CREATE INDEX sagas_by_parent ON sagas (parent) WHERE parent IS NOT NULL",
        "CREATE INDEX sagas_by_status ON sagas (status)",
        # Not clustered by saga: of a thousand sagas that write at once, each would touch a page of its own.
        """CREATE TABLE events (
            number INTEGER PRIMARY KEY,
            saga TEXT NOT NULL,
            first INTEGER NOT NULL,
            checksum INTEGER NOT NULL,
            body TEXT NOT NULL
        )""",
        "CREATE UNIQUE INDEX events_by_saga ON events (saga, first)",
        "CREATE TABLE owners (id TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
    ),
)
"""What makes a file of version n out of one of version n - 1. Those that have been released are never changed."""

_APPLICATION: Final = int.from_bytes(b"saga")
_CHUNK: Final = 500
_MOST_FREED: Final = 4_000
"""Pages; a step of forgetting ends when it has freed so many: each is read, and written anew where SQLite was built with SECURE_DELETE."""
_LONGEST: Final = 2**31 // 1000
"""Seconds; SQLite counts the milliseconds that it waits for a lock in 32 bits, and takes more than they hold for none."""
_FORGETTABLE: Final = ", ".join(f"'{status.value}'" for status in sorted(FORGETTABLE))

_CREATE: Final = """
    INSERT INTO sagas (id, pipeline, parent, parent_stage, status, started_at, updated_at, version, token, owner)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1, ?) ON CONFLICT (id) DO NOTHING
"""
_APPEND: Final = """
    UPDATE sagas
    SET version = version + ?, updated_at = ?, owner = CASE WHEN ? THEN NULL ELSE owner END
    WHERE id = ? AND version = ? AND token = ?
"""
# By itself, because few appends need it: SQLite writes the index of a column that is set even when its value stays.
_STATUS: Final = "UPDATE sagas SET status = ? WHERE id = ?"
_INSERT: Final = "INSERT INTO events (saga, first, checksum, body) VALUES (?, ?, ?, ?)"
_BEAT: Final = "INSERT INTO owners (id, until) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET until = excluded.until"
_HOLDER: Final = "SELECT version, token, owner, until FROM sagas LEFT JOIN owners ON owners.id = owner WHERE sagas.id = ?"
_TAKE_BELOW: Final = """
    WITH RECURSIVE below (id) AS (
        SELECT id FROM sagas WHERE parent = ? UNION SELECT sagas.id FROM below JOIN sagas ON parent = below.id
    )
    UPDATE sagas SET owner = NULL, token = token + 1 WHERE id IN below AND owner = ?
"""
_OLD: Final = f"""
    WITH RECURSIVE roots AS (
        SELECT number, id FROM sagas
        WHERE number > :after AND status IN ({_FORGETTABLE}) AND updated_at < :before
            AND NOT EXISTS (SELECT 1 FROM sagas AS above WHERE above.id = sagas.parent)
        ORDER BY number LIMIT {_CHUNK}
    ),
    families (root, id) AS (
        SELECT number, id FROM roots UNION ALL SELECT root, sagas.id FROM families JOIN sagas ON parent = families.id
    )
    SELECT root, sagas.id, min(
        status IN ({_FORGETTABLE}) AND updated_at < :before AND (owner IS NULL OR until IS NULL OR until < :now)
    ) OVER (PARTITION BY root)
    FROM families JOIN sagas ON sagas.id = families.id LEFT JOIN owners ON owners.id = owner ORDER BY root
"""  # noqa: S608 - made of constants
_READ: Final = """
    SELECT version, pipeline, parent, parent_stage, first, checksum, CAST(coalesce(body, '') AS BLOB)
    FROM (SELECT ? AS id) AS asked LEFT JOIN sagas USING (id) LEFT JOIN events ON saga = asked.id ORDER BY first
"""
_ENTRIES: Final = """
    SELECT sagas.id, pipeline, status, started_at, updated_at, parent, parent_stage, owner, until
    FROM sagas LEFT JOIN owners ON owners.id = owner
"""


_OPEN: Final[set[_Store]] = set()
"""Those of the process that are connected, whichever ledger's they are: SQLite has all connections to a file share its log's index. A new
one would take over that of one whose log was taken away, and what other processes have recorded with the new index would be lost."""


class SQLiteLedger(DurableLedger):
    """Keeps sagas in an SQLite file.

    An append is on disk before the call returns (WAL, `synchronous=FULL`); those of many sagas that come together share one
    commit. Any number of processes of one machine may use the file at once; network file systems won't do, because SQLite's
    locks don't work there.

    Args:
        path: The file. It is made when it is first used; its directory has to be there.
        lease: Seconds after which an owner that did not `beat` counts as gone.
        patience: Seconds that a batch of appends waits for other processes that write. At most a third of `lease`, because `beat` waits
            behind it; the default is 10, or that third if it is less.
        max_event_bytes: How many bytes of JSON one event may have.
        redact: What every event goes through before it is stored. What it takes out is missing when a saga is resumed, too.
        clock: What time it is for the leases, in seconds; the same for all processes that use the file.

    Raises:
        MisuseError: An argument makes no sense.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lease: float = 30.0,
        patience: float | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        redact: Redact | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise MisuseError("the path of a file", got=f"a {type(path).__name__}")
        if os.fspath(path) in {"", ":memory:"}:
            raise MisuseError("the path of a file", got=repr(path), hint="A ledger in memory is a MemoryLedger.")
        if "://" in os.fspath(path):
            # Not shown: it may hold a password.
            raise MisuseError("the path of a file", got="a URL", hint="saga.ledgers.open_ledger(url) opens it.")
        try:
            # Made absolute now: the working directory may be another one when the file is opened.
            self.path: Final = Path(path).absolute()
        except FileNotFoundError:
            raise MisuseError("a path from the root where the current folder was deleted", got=repr(os.fspath(path))) from None
        super().__init__(
            f"SQLiteLedger({str(path)!r})",
            partial(_Store, self.path, lease, clock=clock, shared=_Shared()),
            lease=lease,
            patience=patience,
            max_event_bytes=max_event_bytes,
            redact=redact,
        )


class _Shared:
    """What the stores of a ledger know of each other.

    Attributes:
        files: Which file, and which beside it, one of them has opened last.
    """

    def __init__(self) -> None:
        self.files: Sequence[tuple[int, int] | None] = ()


class _Store:
    def __init__(self, path: Path, lease: float, patience: float, clock: Callable[[], float], shared: _Shared) -> None:
        self._path = path
        self._shared = shared
        self._in_use = RLock()
        self._lease = lease
        self._patience = min(patience, _LONGEST)
        self._clock = clock
        self._opened: sqlite3.Connection | None = None
        self._is_fixed = False
        self._guard: Guard | None = None
        self._paths: Sequence[Path] = ()
        self._files: Sequence[tuple[int, int] | None] = ()
        self._modified = 0
        self._beaten: set[str] = set()

    # -- requests ------------------------------------------------------------------------------------------------

    def write(self, requests: Sequence[Request]) -> Sequence[Any]:
        try:
            with self._in_use:
                return self._transaction(requests)
        except LedgerError:
            self._give_up()
            raise
        except sqlite3.Error as error:
            self._give_up()
            if len(requests) > 1 and not isinstance(error, sqlite3.OperationalError):
                # It is about one of them, and each in a transaction of its own shows which.
                return [self._alone(request) for request in requests]
            raise _told(error, self._path, self._patience) from error

    def _alone(self, request: Request) -> Any:
        try:
            return self.write((request,))[0]
        except LedgerError as error:
            return error

    def _transaction(self, requests: Sequence[Request]) -> Sequence[Any]:
        connection = self._connection()
        self._beaten.clear()
        connection.execute("BEGIN IMMEDIATE")
        try:
            answers = [self._carry_out(connection, request) for request in requests]
            self._commit(connection)
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        self._refuse_taken_away(_UNKNOWN)
        return answers

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_IOERR") or error.sqlite_errorname == "SQLITE_IOERR_WRITE":
                raise
            # It may be in the log, whole, and that was then not synced, or not entered in its index: whoever opens it after a crash finds
            # it there, unless something else was written over it before.
            raise _told(error, self._path, self._patience, _UNKNOWN) from error

    def _carry_out(self, connection: sqlite3.Connection, request: Request) -> Any:
        try:
            match request:
                case Append():
                    return self._append(connection, request)
                case Create():
                    return self._create(connection, request)
                case Acquire():
                    return self._acquire(connection, request)
                case Release(saga_id, token):
                    connection.execute("UPDATE sagas SET owner = NULL WHERE id = ? AND token = ?", (saga_id, token))
                    return None
                case Beat(owner):
                    return self._beat(connection, owner)
            return self._prune(connection, request)
        except (LedgerConflict, LedgerCorrupt) as refused:
            return refused

    def _create(self, connection: sqlite3.Connection, request: Create) -> int:
        saga_id, owner, pipeline, parent, parent_stage, started_at, row, under = request
        if under is not None:
            self._refuse_overtaken(connection, str(parent), under)
        values = (saga_id, pipeline, parent, parent_stage, row.status, started_at, row.at, row.added, owner)
        if not connection.execute(_CREATE, values).rowcount:
            raise LedgerConflict.exists(saga_id)
        connection.execute(_INSERT, (saga_id, row.first, row.checksum, row.body))
        self._beat(connection, owner)
        return 1

    def _append(self, connection: sqlite3.Connection, request: Append) -> None:
        saga_id, token, release, (first, added, body, checksum, status, at) = request
        if not connection.execute(_APPEND, (added, at, release, saga_id, first, token)).rowcount:
            version, current, holder, until = self._holder(connection, saga_id)
            if current != token:
                raise LedgerConflict.overtaken(saga_id, token, current, holder=holder, until=_when(until))
            raise LedgerConflict.outdated(saga_id, first, version)
        if status is not None:
            connection.execute(_STATUS, (status, saga_id))
        connection.execute(_INSERT, (saga_id, first, checksum, body))

    def _holder(self, connection: sqlite3.Connection, saga_id: str) -> tuple[int, int, str | None, float | None]:
        found: tuple[int, int, str | None, float | None] | None = connection.execute(_HOLDER, (saga_id,)).fetchone()
        if found is None:
            raise LedgerConflict.missing(saga_id)
        version, token, _, until = found
        try:
            _ = _when(until), token + 1, version + 1  # what is made of them
        except (TypeError, ValueError, OverflowError, OSError) as error:
            # Told of this saga alone: what others ask for in the same transaction is carried out.
            raise LedgerCorrupt(
                f"the ledger is damaged: who holds saga {saga_id}, or how many events it has, can't be read: {error}. {_UNCHANGED} "
                "Restore the ledger from a backup, or see to what this saga did by hand."
            ) from error
        return found

    def _acquire(self, connection: sqlite3.Connection, request: Acquire) -> int:
        saga_id, owner, under = request
        _, token, holder, until = self._holder(connection, saga_id)
        if under is not None:
            (parent,) = connection.execute("SELECT parent FROM sagas WHERE id = ?", (saga_id,)).fetchone()
            self._refuse_overtaken(connection, parent, under)
        if holder not in {None, owner} and until is not None and until >= self._clock() and not is_gone(str(holder)):
            raise LedgerConflict.held(saga_id, holder=str(holder), until=_when(until))
        connection.execute("UPDATE sagas SET owner = ?, token = token + 1 WHERE id = ?", (owner, saga_id))
        if holder not in {None, owner}:
            connection.execute(_TAKE_BELOW, (saga_id, holder))
        self._beat(connection, owner)
        return token + 1

    def _refuse_overtaken(self, connection: sqlite3.Connection, parent: str, under: int) -> None:
        _, token, holder, until = self._holder(connection, parent)
        if token != under:
            raise LedgerConflict.overtaken(parent, under, token, holder=holder, until=_when(until))

    def _beat(self, connection: sqlite3.Connection, owner: str) -> None:
        if owner not in self._beaten:
            connection.execute(_BEAT, (owner, self._clock() + self._lease))
            self._beaten.add(owner)

    def _prune(self, connection: sqlite3.Connection, request: Prune) -> Pruned:
        found = connection.execute(_OLD, {"after": request.after, "before": request.before, "now": self._clock()}).fetchall()
        before = self._free_pages(connection)
        forgotten: list[tuple[str]] = []
        last = None
        for root, family in groupby(found, itemgetter(0)):
            over = [(saga_id,) for _, saga_id, is_over in family if is_over]
            connection.executemany("DELETE FROM events WHERE saga = ?", over)
            connection.executemany("DELETE FROM sagas WHERE id = ?", over)
            forgotten += over
            last = root
            if self._free_pages(connection) - before > _MOST_FREED:
                break
        if not found:
            # Once, at the end: it looks at every saga. NOT EXISTS would do so for every owner, because sagas have no index by owner.
            holders = "SELECT owner FROM sagas WHERE owner IS NOT NULL"
            connection.execute(f"DELETE FROM owners WHERE until < ? AND id NOT IN ({holders})", (self._clock(),))  # noqa: S608 - a constant
        return Pruned(tuple(saga_id for (saga_id,) in forgotten), last)

    def _free_pages(self, connection: sqlite3.Connection) -> int:
        pages: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
        return pages

    def read(self, saga_id: str) -> Sequence[AnyEvent]:
        with self._reading() as connection:
            found = connection.execute(_READ, (saga_id,)).fetchall()
            version, *began = found[0][:4]
            return events_in(saga_id, version, began, [(first, expected, body) for *_, first, expected, body in found if first is not None])

    def list(self, statuses: Collection[SagaStatus] | None, parent: str | None) -> Sequence[Entry]:
        wanted: dict[str, Sequence[str]] = {}
        if statuses is not None:
            # By the rows themselves: an index that was damaged would hide a saga, and nobody would go on with it.
            unwanted = others(statuses)
            wanted[f"coalesce(status, '') NOT IN ({', '.join('?' * len(unwanted))})"] = unwanted
        if parent is not None:
            wanted["parent = ?"] = [parent]
        where = f" WHERE {' AND '.join(wanted)}" if wanted else ""
        with self._reading() as connection:
            rows = connection.execute(f"{_ENTRIES}{where} ORDER BY sagas.number", list(chain(*wanted.values()))).fetchall()
            return entries_in(rows, _when)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._in_use:
                yield self._connection()
                self._refuse_used()
        except LedgerError:
            self._give_up()
            raise
        except sqlite3.Error as error:
            self._give_up()
            raise _told(error, self._path, self._patience) from error

    def _give_up(self) -> None:
        """Disconnect, and whoever is left with files that were taken away, too."""
        self.close()
        for other in _taken_away():
            other.close()

    def close(self) -> None:
        with self._in_use:
            if self._opened is not None:
                if not self.is_taken_away():
                    # As the last one it takes the log away itself: who opens the file just then is not to take that for another's deed.
                    _OPEN.discard(self)
                with self._guard.given_back() if self._guard else nullcontext(), suppress(sqlite3.Error):
                    if self._guard:
                        self._save_or_leave(self._opened, self._guard)
                    self._opened.close()
                self._opened = self._guard = None
                _OPEN.discard(self)

    def _save_or_leave(self, connection: sqlite3.Connection, guard: Guard) -> None:
        # The last one that is closed may have looked long ago, and writes into the file what others have put into the log.
        guard.modified = max(guard.modified, self._modified)
        if self.is_taken_away():
            self._save(connection, guard)
        if self._is_gone_past(guard.modified):
            _leave_log(connection)
        else:
            guard.let_go()

    def _save(self, connection: sqlite3.Connection, guard: Guard) -> None:
        """Take what is recorded out of a log that was taken away; where others use it, too, no connection is the last one that would."""
        with guard.shut() as is_shut, suppress(sqlite3.Error):
            if is_shut and self._fits(guard.modified):
                connection.execute("PRAGMA wal_checkpoint(FULL)")
                guard.modified = _modified(self._path)

    def _fits(self, modified: int) -> bool:
        """Whether what is in a log that was taken away fits to the file: not to what others have recorded, or read to go by, since then.

        Args:
            modified: When anybody of this process has seen the file written to last.
        """
        (file, *beside), (own, *own_beside) = self._identities(), self._files
        if None in beside and all(found in {None, ours} for found, ours in zip(beside, own_beside, strict=True)):
            # Whoever opens it makes what is missing.
            return file == own
        # SQLite's locks on an index of our own would be gone when it is closed.
        is_another = beside[1] not in {None, own_beside[1]}
        return is_another and not self._is_gone_past(modified) and not is_in_use(self._paths[2])

    # -- the file ------------------------------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        if self._opened is not None and self._is_fixed:
            # It would not see what others have recorded since.
            self.close()
        if self._opened is None:
            # SQLite follows links: the log is beside the file itself.
            file = Path(os.path.realpath(self._path))
            # The last one is the log's index: through it the processes that use the file know of each other's locks and commits.
            self._paths = (self._path, _log_of(file), file.with_name(f"{file.name}-shm"))
            self._let_go_of_others()
            self._refuse_another(file)
            before = self._identities()
            self._opened, self._is_fixed = _open(self._path, file, self._patience)
            self._files = self._shared.files = before if self._is_fixed else self._identities()
            self._modified = _modified(self._path)
            _OPEN.add(self)
            self._hold(self._opened)
        else:
            # SQLite would go on to write to files that nobody can find any more.
            self._refuse_taken_away("nothing was recorded")
        return self._opened

    def _hold(self, connection: sqlite3.Connection) -> None:
        if self._files[1] is None:
            if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
                # While it was opened, the process lost SQLite's locks, and somebody took the log away as the last one.
                raise LedgerError(f"{self._replaced()}; nothing was recorded")
            return  # without a log SQLite has the file to itself while it writes
        self._guard = Guard.of(self._files[0])
        try:
            self._guard.hold(self._path)
        except BlockingIOError:
            raise LedgerError(f"{self._replaced()}; nothing was recorded") from None
        except OSError as error:
            hint = "see to how many files this process may have open"
            raise LedgerError(f"the ledger {self._path} can't be locked: {error} ({hint}); nothing was recorded") from error

    def _let_go_of_others(self) -> None:
        for other in _taken_away():
            # Not waited for: it may be doing the same. It finds out by itself, and this one is opened when it is next used.
            if not other._in_use.acquire(blocking=False):  # noqa: SLF001 - one of us
                raise LedgerError(f"{other._replaced()}; nothing was recorded")  # noqa: SLF001 - one of us
            other.close()
            other._in_use.release()  # noqa: SLF001 - one of us

    def _refuse_used(self) -> None:
        if self._is_fixed and self.is_taken_away():
            # It may be some from before and some from after they wrote.
            raise LedgerError(f"others have begun to use the ledger {self._path} while it was read; read it again. {_UNCHANGED}")

    def _refuse_taken_away(self, outcome: str) -> None:
        modified = _modified(self._path)
        if self.is_taken_away():
            raise LedgerError(f"{self._replaced()}; {outcome}")
        self._modified = modified

    def _is_gone_past(self, modified: int) -> bool:
        """Whether others have recorded since its log was taken away, so that what it has in it, which only it can see, fits no longer.

        Args:
            modified: When anybody of this process has seen the file written to last.
        """
        file, log, _ = self._paths
        return self.is_taken_away() and _identity(file) == self._files[0] and bool(_size(log) or _modified(file) != modified)

    def is_taken_away(self) -> bool:
        """Whether the files that it has open are no longer those that others find."""
        return self._opened is not None and self._identities() != self._files

    def _refuse_another(self, file: Path) -> None:
        # Of the last one only: when a file is deleted, the next one may get its number.
        used = self._shared.files
        if used and not file.exists():
            # Sagas that run know of what is in it, and whoever puts it back would lose what was recorded in a new one meanwhile.
            raise LedgerError(f"the ledger {self._path} is gone; put it back, or restart to begin a new one. Nothing was recorded")
        found, log, _ = self._identities()
        if used and log is not None and used[0] != found and used[1] == log:
            # SQLite would write into the one that was put there what the log has of the other one.
            name = _log_of(file).name
            raise LedgerError(f"the ledger {self._path} was replaced, but its log {name} is of the one before; move it away. {_UNCHANGED}")

    def _replaced(self) -> str:
        return f"the ledger {self._path}, or its log beside it, was moved, deleted or replaced while it was in use"

    def _identities(self) -> Sequence[tuple[int, int] | None]:
        """Which file it is, and which those beside it.

        Where no `Guard` can be had, a process that has lost its locks finds by them that another one has taken its log away.
        """
        return [_identity(path) for path in self._paths]


def _taken_away() -> list[_Store]:
    # Whoever closes meanwhile is no longer among them by the time that its files are gone.
    return [store for store in list(_OPEN) if store.is_taken_away() and store in _OPEN]


def _log_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _modified(path: Path) -> int:
    """When it was last written to: nanoseconds, by the clock of its file system."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _leave_log(connection: sqlite3.Connection) -> None:
    """Have a connection write nothing into the file when it is closed, and leave the log that is there now.

    Else SQLite, if nobody else has the file open, writes into it what it knows of its own log, and deletes the one that it finds. Before
    Python 3.12 it can't be told not to, and it takes the guard for somebody else.
    """
    if sys.version_info >= (3, 12):  # pragma: no cover - not on 3.11
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)


def _open(path: Path, file: Path, patience: float) -> tuple[sqlite3.Connection, bool]:
    """Open a ledger, and make it if there is none; whether it is taken for a file that nobody changes, because it can only be read.

    Args:
        path: What it is called.
        file: Where it is, without links on the way.
        patience: Seconds that it waits for a lock.

    Raises:
        LedgerError: The file is no ledger, or not one of a version that is known; it was not changed.
    """
    log = _log_of(file)
    # First the log, then the file: another process that is just making the ledger makes the file first.
    if log.exists() and not file.exists():
        raise LedgerError(f"the ledger {path} is gone, but its log {log.name} is there; put the file back, or move the log away")
    if not file.exists():
        _make(file, patience)
    if not file.stat().st_size:
        raise LedgerCorrupt(f"expected a ledger in {path}, got an empty file; delete it to begin a new ledger. {_UNCHANGED}")
    # Who may only read the file would make a log that is theirs, and that who may write to the file can't write to.
    is_fixed = not (log.exists() or os.access(file, os.W_OK, effective_ids=os.access in os.supports_effective_ids))
    how = "mode=ro&immutable=1" if is_fixed else "mode=rw"
    # Not of this thread alone: whoever finds that its files were taken away closes it.
    connection = sqlite3.connect(f"{file.as_uri()}?{how}", uri=True, isolation_level=None, timeout=patience, check_same_thread=False)
    # A text that was damaged is one saga's, and no reason to fail all that are read with it.
    connection.text_factory = partial(str, encoding="utf-8", errors="backslashreplace")
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection, is_fixed


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    if found != _APPLICATION:
        raise LedgerError(f"expected a ledger in {path}, got another program's database (application_id {found}). {_UNCHANGED}")
    # FULL: a commit is on disk when it returns; fullfsync: on macOS, too. cell_size_check: look for damage when a page is read.
    for pragma in ("synchronous = FULL", "fullfsync = ON", "checkpoint_fullfsync = ON", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {pragma}")
    # The log is begun anew after so many pages: to write over what is there takes the disk half as long as to let a file grow. It grows
    # as long as somebody reads, for a copy, say; then it is cut to so many bytes.
    for pragma in ("wal_autocheckpoint = 250", f"journal_size_limit = {2**26}"):
        connection.execute(f"PRAGMA {pragma}")
    _migrate(connection, path)
    missing = _schema(len(MIGRATIONS)) - set(connection.execute(_SCHEMA))
    if missing:
        names = ", ".join(sorted(name for name, _ in missing))
        raise LedgerCorrupt(f"the ledger {path} is damaged, or was changed by hand: {names} is not as it was made. {_UNCHANGED}")
    try:
        # A copy that VACUUM INTO made is in another mode, in which a power loss may take back what was committed.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA user_version")  # the log is made when something is read
    except sqlite3.OperationalError as error:
        # Nobody commits anything to it then; it can be read.
        if not error.sqlite_errorname.startswith("SQLITE_READONLY"):
            raise


def _make(path: Path, patience: float) -> None:
    """Make a ledger under another name first: whoever sees the file sees all of it, and an empty one is known to be damaged."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        with closing(sqlite3.connect(new, isolation_level=None, timeout=patience)) as connection:
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "fullfsync = ON", f"application_id = {_APPLICATION}"):
                connection.execute(f"PRAGMA {pragma}")
            _migrate(connection, new)
            # Not left to the closing, which says nothing when there is no room to take all out of the log.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with suppress(FileExistsError):  # another process was faster
            os.link(new, path)
        _sync(path.parent)
    except OSError as error:
        raise LedgerError(f"the ledger {path} can't be made: {error}") from error
    finally:
        for suffix in ("", "-wal", "-shm"):  # the last two are left when there is no room for what they hold
            with suppress(OSError):  # where nothing can be made, nothing can be deleted either, not even what isn't there
                new.with_name(f"{new.name}{suffix}").unlink()


def _sync(directory: Path) -> None:
    """Have the name of a new file on disk, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_SCHEMA: Final = "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"


@cache
def _schema(version: int) -> frozenset[tuple[str, str]]:
    """What `_SCHEMA` finds in a file of that version."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for statement in chain(*MIGRATIONS[:version]):
            connection.execute(statement)
        return frozenset(connection.execute(_SCHEMA))


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring a file to the version that is known here, in one transaction."""
    if _version(connection, path) == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    # Once more, now that no other process can.
    for statement in chain(*MIGRATIONS[_version(connection, path) :]):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if not 0 <= found <= len(MIGRATIONS):
        raise LedgerError(
            f"the ledger {path} has schema version {found}, this version of saga knows up to {len(MIGRATIONS)}: "
            f"it was written by a newer one. {_UNCHANGED}"
        )
    return found


def _when(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


_UNCHANGED: Final = "Nothing was changed."
_UNKNOWN: Final = "whether this was recorded is not known"


def _told(error: sqlite3.Error, path: Path, patience: float, outcome: str = "nothing was recorded") -> LedgerError:
    """Say what SQLite says, and what to do."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return LedgerCorrupt(
            f"the ledger {path} is damaged, or no ledger: {error}. {_UNCHANGED} Restore it from a backup, or save what is left of it "
            "with sqlite3's .recover"
        )
    hints = {
        "SQLITE_BUSY": f"another process or program has held its lock for more than {patience:g} s",
        "SQLITE_FULL": "there is no room left for it",
        "SQLITE_READONLY": "it, its log or its directory can't be written to; see to their owners and permissions",
        "SQLITE_CANTOPEN": "it, or its log beside it, can't be opened; see to the directory and its permissions, and to how many files "
        "this process may have open",
        "SQLITE_IOERR_FSYNC": "the disk failed to sync",
        "SQLITE_IOERR_SHMSIZE": "there is no room left for the index of its log",
        "SQLITE_IOERR_SHORT_READ": "it was cut, or its log was deleted while others use it; end all that do",
        "SQLITE_IOERR": "the disk failed",
    }
    hint = next((f" ({hint})" for start, hint in hints.items() if name.startswith(start)), "")
    return LedgerError(f"the ledger {path} failed: {error}{hint}; {outcome}")
