"""Processes that are killed with SIGKILL at a chosen write of their ledger.

Run as a script it reads one JSON line for each deed, forks a process that does it, and answers with a JSON line: how that process
ended, and what it said. Forking from here saves every process its imports.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from stageflow.api import Pipeline, StageOutput

from examples.order_fulfilment.bank import Bank
from examples.order_fulfilment.carrier import Carrier
from examples.order_fulfilment.inventory import Inventory
from examples.order_fulfilment.stages import order_pipeline, order_stages
from saga import CompensableStage, Compensation, CompensationContext, FailFast, LedgerError, Retry, SagaContext, SagaCoordinator
from saga.events import AnyEvent, StageEvent
from saga.ledgers.durable import DurableLedger
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.sqlite import SQLiteLedger


class Books:
    """What stands in the outside world, in a real database, and every deed that changed it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(self._open()) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS effects (key TEXT PRIMARY KEY, stage TEXT)")
            db.execute("CREATE TABLE IF NOT EXISTS deeds (deed TEXT, stage TEXT)")
            db.execute("CREATE TABLE IF NOT EXISTS calls (stage TEXT, key TEXT)")

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def do(self, key: str, stage: str) -> None:
        with closing(self._open()) as db, db:
            if db.execute("INSERT OR IGNORE INTO effects VALUES (?, ?)", (key, stage)).rowcount:
                db.execute("INSERT INTO deeds VALUES ('did', ?)", (stage,))

    def call(self, stage: str, key: str) -> None:
        """Note that a compensation was called, whether there is anything to undo or not."""
        with closing(self._open()) as db, db:
            db.execute("INSERT INTO calls VALUES (?, ?)", (stage, key))

    def calls(self, stage: str) -> list[str]:
        """The keys with which its compensation was called."""
        with closing(self._open()) as db, db:
            return [key for (key,) in db.execute("SELECT key FROM calls WHERE stage = ?", (stage,))]

    def undo(self, key: str, stage: str, above: Sequence[str]) -> None:
        with closing(self._open()) as db, db:
            standing = {name for (name,) in db.execute("SELECT stage FROM effects")}
            if standing & set(above):
                db.execute("INSERT INTO deeds VALUES ('undone under its dependents', ?)", (stage,))
            if db.execute("DELETE FROM effects WHERE key = ?", (key,)).rowcount:
                db.execute("INSERT INTO deeds VALUES ('undid', ?)", (stage,))

    def note(self, deed: str, stage: str) -> None:
        with closing(self._open()) as db, db:
            db.execute("INSERT INTO deeds VALUES (?, ?)", (deed, stage))

    def has(self, key: str) -> bool:
        with closing(self._open()) as db, db:
            return db.execute("SELECT 1 FROM effects WHERE key = ?", (key,)).fetchone() is not None

    def standing(self) -> list[str]:
        with closing(self._open()) as db, db:
            return sorted(name for (name,) in db.execute("SELECT stage FROM effects"))

    def deeds(self) -> list[tuple[str, str]]:
        with closing(self._open()) as db, db:
            return list(db.execute("SELECT deed, stage FROM deeds"))


class Entry(CompensableStage):
    """Makes an entry in the books; where it fails, it fails after it had a look at them, and before it changed them."""

    def __init__(self, books: Books, name: str, above: Sequence[str], *, fails: bool) -> None:
        self.books, self.name, self.above, self.fails = books, name, above, fails

    async def execute(self, ctx: SagaContext) -> StageOutput:
        if self.fails:
            return StageOutput.fail("no")
        self.books.do(ctx.idempotency_key, self.name)
        return StageOutput.ok(stage=self.name)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.books.call(self.name, ctx.idempotency_key)
        self.books.undo(ctx.forward_key, self.name, self.above)


class Probed(Entry):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(stage=self.name) if self.books.has(ctx.forward_key) else None


class Idempotent(Entry):
    idempotent = True
    compensate_in_doubt = True


KINDS = {"probed": Probed, "idempotent": Idempotent, "silent": Entry}


def dependents(shape: dict[str, list[str]], name: str) -> list[str]:
    found: set[str] = set()
    for other, needs in shape.items():
        if name in needs or found & set(needs):
            found.add(other)
    return sorted(found)


def dag(folder: Path, shape: dict[str, list[str]], failing: str | None, kind: str) -> Pipeline:
    books = Books(folder / "books.sqlite")
    pipeline = Pipeline(name="dag")
    for name, needs in shape.items():
        stage = KINDS[kind](books, name, dependents(shape, name), fails=name == failing)
        pipeline = pipeline.with_stage(name, stage, dependencies=tuple(needs))
    return pipeline


class Mortal(DurableLedger):
    """Kills its process at the n-th write: before it, or when it is on disk and nobody knows yet."""

    writes = 0
    kill_at: int | None = None
    moment = ""

    def _begin(self) -> int:
        self.writes += 1
        self._die(self.writes, "before")
        return self.writes

    def _die(self, write: int, moment: str) -> None:
        if write == self.kill_at and moment == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], **how: Any) -> int:
        write = self._begin()
        token = await super().create(saga_id, owner, events, **how)
        self._die(write, "after")
        return token

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        write = self._begin()
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)
        self._die(write, "after")


class MortalFile(Mortal, SQLiteLedger):
    """In a file."""


class MortalSchema(Mortal, PostgresLedger):
    """On a server, which outlives the process."""


def mortal(deed: dict[str, Any]) -> Mortal:
    """The ledger of a deed: on the server that it names, else in its folder."""
    dsn = deed.get("dsn")
    ledger = MortalFile(Path(deed["folder"]) / "ledger.sqlite") if dsn is None else MortalSchema(dsn, schema=deed["folder"][-60:])
    ledger.kill_at, ledger.moment = deed.get("kill_at"), deed.get("moment", "")
    return ledger


class Fate:
    """Kills its process when it meets what it was told: `in execute`, `in compensate`, or `before` or `after` an event is on disk."""

    def __init__(self, point: str | None) -> None:
        self.point = point
        self.other_has_failed = asyncio.Event()

    def meet(self, moment: str) -> None:
        if moment == self.point:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, _: str, event: AnyEvent) -> None:
        self.meet(f"after {named(event)}")
        if named(event) == "StageFailed other":
            self.other_has_failed.set()


def named(event: AnyEvent) -> str:
    return " ".join([type(event).__name__, *([event.stage] if isinstance(event, StageEvent) else [])])


class Fateful(SQLiteLedger):
    """Meets what is about to be written."""

    def __init__(self, path: Path, fate: Fate) -> None:
        super().__init__(path)
        self.fate = fate

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], **how: Any) -> int:
        for event in events:
            self.fate.meet(f"before {named(event)}")
        return await super().create(saga_id, owner, events, **how)

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        for event in events:
            self.fate.meet(f"before {named(event)}")
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


class Halves(CompensableStage):
    """Has an effect of two parts, records the first, and notes in the books what it is asked for."""

    compensation = Compensation(retry=Retry(attempts=1))

    def __init__(self, books: Books, fate: Fate, failing: Sequence[str]) -> None:
        self.books, self.fate, self.failing = books, fate, failing

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.books.note("runs", "it")
        if "it" in self.failing:
            return StageOutput.fail("declined")
        self.books.do(f"{ctx.idempotency_key}/1", "it")
        await ctx.record(1)
        if "other" in self.failing:
            await self.fate.other_has_failed.wait()
        self.fate.meet("in execute")
        self.books.do(f"{ctx.idempotency_key}/2", "it")
        return StageOutput.ok()

    async def compensate(self, ctx: CompensationContext) -> None:
        self.books.note("undone", "it")
        self.books.undo(f"{ctx.forward_key}/1", "it", ())
        self.fate.meet("in compensate")
        self.books.undo(f"{ctx.forward_key}/2", "it", ())


class AskedHalves(Halves):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        self.books.note("asked", "it")
        parts = {self.books.has(f"{ctx.forward_key}/{part}") for part in (1, 2)}
        if len(parts) == 2:
            raise OSError("only a part of it is there")
        return StageOutput.ok() if parts == {True} else None


class IdempotentHalves(Halves):
    idempotent = True


class CopingHalves(Halves):
    compensate_in_doubt = True


HALVES = {"probe": AskedHalves, "idempotent": IdempotentHalves, "copes": CopingHalves, "none": Halves}


def fateful(books: Books, fate: Fate, kind: str, failing: Sequence[str]) -> Pipeline:
    """before -> it -> after, and beside `it` another stage."""

    async def plain(ctx: Any) -> StageOutput:
        return StageOutput.fail("no") if ctx.stage_name in failing else StageOutput.ok()

    return (
        Pipeline(name="fateful")
        .with_stage("before", Entry(books, "before", (), fails=False))
        .with_stage("it", HALVES[kind](books, fate, failing), dependencies=("before",))
        .with_stage("other", plain, "work", dependencies=("before",))
        .with_stage("after", plain, "work", dependencies=("it",))
    )


async def meet_fate(folder: Path, deed: dict[str, Any]) -> dict[str, Any]:
    fate = Fate(deed.get("point"))
    async with Fateful(folder / "ledger.sqlite", fate) as ledger:
        coordinator = SagaCoordinator(ledger=ledger, listeners=[fate.hear])
        pipeline = fateful(Books(folder / "books.sqlite"), fate, deed["kind"], deed["failing"])
        return await run_or_recover(coordinator, pipeline, deed)


async def act(deed: dict[str, Any]) -> dict[str, Any]:
    folder = Path(deed["folder"])
    if deed["what"] == "fate":
        return await meet_fate(folder, deed)
    ledger = mortal(deed)
    coordinator = SagaCoordinator(FailFast(), ledger=ledger)
    async with ledger:
        if deed["what"] == "order":
            with (
                closing(Inventory(folder / "inventory.sqlite")) as inventory,
                closing(Bank(folder / "bank.sqlite")) as bank,
                closing(Carrier(folder / "carrier.sqlite")) as carrier,
            ):
                pipeline = order_pipeline(order_stages(inventory, bank, carrier))
                return await run_or_recover(coordinator, pipeline, deed)
        return await run_or_recover(coordinator, dag(folder, deed["shape"], deed["failing"], deed["kind"]), deed)


async def run_or_recover(coordinator: SagaCoordinator, pipeline: Pipeline, deed: dict[str, Any]) -> dict[str, Any]:
    try:
        if deed["deed"] == "run":
            report = await coordinator.run(pipeline, saga_id="s", input_text=deed.get("input"))
            return {"status": report.status.value}
        if deed["deed"] == "settle":
            return {"status": (await coordinator.settle("s", "it", "undone", "by hand")).status.value}
        if deed["deed"] == "resume":
            return {"status": (await coordinator.resume("s", pipeline)).status.value}
        recovery = await coordinator.recover([pipeline])
    except LedgerError as error:
        return {"error": str(error)}
    return {"recovered": {saga_id: report.status.value for saga_id, report in recovery.reports.items()}, "said": str(recovery)}


def fork(deed: dict[str, Any]) -> dict[str, Any]:
    sent, received = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(sent)
        try:
            with os.fdopen(received, "w") as answer:
                json.dump(asyncio.run(act(deed)), answer)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(received)
    with os.fdopen(sent) as answer:
        said = answer.read()
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": killed, "failed": not killed and status != 0, **(json.loads(said) if said else {})}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)
