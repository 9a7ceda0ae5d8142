"""A saga has one owner: while it is alive nobody else takes the saga, and a process that was forked off is another one."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from stageflow import BaseInterceptor
from stageflow.api import Pipeline, PipelineContext, StageContext

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    FailFast,
    LedgerConflict,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Recovery,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaExists,
    SagaNotFound,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
    nested,
)
from saga import coordinator as coordinator_module
from saga.blueprint import Blueprint
from saga.events import AnyEvent, CompensationStarted, SagaStarted, StageSettled
from saga.ledgers.sqlite import SQLiteLedger
from saga.live import held as held_module
from saga.tasks import this_task
from tests.controlled import ControlledLoop, elapse, run
from tests.dying import Dying
from tests.slow import SlowDisk, SlowLedger
from tests.world import HOOKED, SEQUENCE, Script, nothing, scene


class Leased(MemoryLedger):
    """Remembers when an owner said that it is alive; its driver fails now and then."""

    lease = 30.0

    def __init__(self) -> None:
        super().__init__()
        self.beats: list[float] = []
        self.alive: set[str | None] = set()

    async def beat(self, owner: str) -> None:
        self.alive.add(owner)
        self.beats.append(asyncio.get_running_loop().time())
        if len(self.beats) == 3:
            raise OSError("a driver's error")


def test_an_owner_beats_on_while_it_undoes_though_every_task_is_cancelled() -> None:
    """As asyncio.run does before it ends: a compensation goes on for longer than the lease, and nobody else may undo meanwhile."""
    _, pipeline = scene({"a": ()}, {"a": Script(before=1.0, undo_takes=100.0)})
    ledger = Leased()

    async def play() -> str | None:
        me = asyncio.current_task()
        caller = asyncio.create_task(SagaCoordinator(ledger=ledger).run(pipeline.with_stage("b", hangs, "work", dependencies=("a",))))
        for moment in (5.0, 30.0, 60.0):
            await elapse(moment)
            for task in asyncio.all_tasks() - {me}:
                task.cancel()
        (entry,) = await ledger.list()
        await asyncio.wait({caller})
        return entry.owner

    async def hangs(_: Any) -> None:
        await elapse(60.0)

    owner = run(play())

    assert ledger.alive == {owner}
    between = [later - sooner for sooner, later in zip(ledger.beats, ledger.beats[1:], strict=False)]
    assert ledger.beats[-1] > 90.0
    assert max(between) <= 10.0


class SlowToHear(Leased):
    """Takes its time to be told that an owner is alive."""

    async def beat(self, owner: str) -> None:
        await super().beat(owner)
        await elapse(5.0)


class Unreachable(MemoryLedger):
    """Fails whoever writes while it is out of reach."""

    lease = 30.0
    is_reached = True

    def __init__(self) -> None:
        super().__init__()
        self.given_back: list[str] = []

    async def append(self, saga_id: str, events: Sequence[AnyEvent], **how: Any) -> None:
        self._fail()
        await super().append(saga_id, events, **how)

    async def release(self, saga_id: str, token: int) -> None:
        self._fail()
        self.given_back.append(saga_id)
        await super().release(saga_id, token)

    async def beat(self, owner: str) -> None:
        self._fail()

    def _fail(self) -> None:
        if not self.is_reached:
            raise LedgerError("no line")


def test_a_saga_that_could_not_be_given_back_is_not_held_by_its_owners_life_for_others() -> None:
    world, pipeline = scene(SEQUENCE, {"a": Script(before=1.0)}, dict.fromkeys(SEQUENCE, "probed"))
    _, other = scene({"a": ()}, {"a": Script(before=100.0)})
    ledger = Unreachable()

    async def play() -> SagaReport:
        owner = SagaCoordinator(ledger=ledger)
        lasting, failing = asyncio.create_task(owner.run(other)), asyncio.create_task(owner.run(pipeline, saga_id="s"))
        await elapse(0.5)
        ledger.is_reached = False
        with pytest.raises(LedgerError, match="no line"):
            await failing
        await elapse(20.0)
        with pytest.raises(LedgerConflict, match="is held"):
            await SagaCoordinator(ledger=ledger).resume("s", pipeline)
        ledger.is_reached = True
        await elapse(10.0)
        report = await SagaCoordinator(ledger=ledger).resume("s", pipeline)
        assert not lasting.done()
        await lasting
        return report

    report = run(play())

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]
    assert ledger.given_back == ["s"]


class SlowToFail(Leased):
    """Says after ten seconds that it could not be told that an owner is alive."""

    async def beat(self, owner: str) -> None:
        await super().beat(owner)
        await elapse(10.0)
        raise LedgerError("no line")


def test_an_owner_says_that_it_is_alive_three_times_a_lease_also_where_the_ledger_takes_its_time_to_fail() -> None:
    _, pipeline = scene({"a": ()}, {"a": Script(before=45.0)})
    ledger = SlowToFail()

    run(SagaCoordinator(ledger=ledger).run(pipeline))

    assert ledger.beats == [10.0, 20.0, 30.0, 40.0]


class SlowToTakeBack(Unreachable):
    """Takes its time for each lease that is given back; remembers when its owner said that it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.beats: list[float] = []

    async def beat(self, owner: str) -> None:
        await super().beat(owner)
        self.beats.append(asyncio.get_running_loop().time())

    async def release(self, saga_id: str, token: int) -> None:
        await super().release(saga_id, token)
        await elapse(1.0)


def test_an_owner_says_that_it_is_alive_also_while_it_gives_a_hundred_sagas_back() -> None:
    """A ledger that was out of reach fails all that run at once; those that have nothing to record meanwhile are held on."""
    _, pipeline = scene({"a": ()}, {"a": Script(before=1.0)})
    _, other = scene({"a": ()}, {"a": Script(before=100.0)})
    ledger = SlowToTakeBack()

    async def play() -> None:
        owner = SagaCoordinator(ledger=ledger)
        lasting = asyncio.create_task(owner.run(other))
        failing = asyncio.gather(*(owner.run(pipeline) for _ in range(100)), return_exceptions=True)
        await elapse(0.5)
        ledger.is_reached = False
        await failing
        ledger.is_reached = True
        await lasting

    run(play())

    assert len(ledger.given_back) == 100
    between = [later - sooner for sooner, later in zip(ledger.beats, ledger.beats[1:], strict=False)]
    assert max(between) < ledger.lease / 2


class BackAfterAFailure(Unreachable):
    """Is in reach again once somebody has tried in vain to give a saga back."""

    async def release(self, saga_id: str, token: int) -> None:
        try:
            await super().release(saga_id, token)
        except LedgerError:
            self.is_reached = True
            raise


def test_a_saga_is_given_back_behind_those_that_its_stages_have_left() -> None:
    """Else who goes on with it finds them held, and its stages fail and can't be undone."""
    world, within = scene({"x": ()}, {"x": Script(before=1.0)}, {"x": "probed"})
    _, other = scene({"a": ()}, {"a": Script(before=100.0)})
    pipeline = Pipeline(name="trip").with_stage("book", nested(within))
    ledger = BackAfterAFailure()

    async def play() -> SagaReport:
        owner = SagaCoordinator(ledger=ledger)
        lasting, failing = asyncio.create_task(owner.run(other)), asyncio.create_task(owner.run(pipeline, saga_id="s"))
        await elapse(0.5)
        ledger.is_reached = False
        with pytest.raises(LedgerError, match="no line"):
            await failing
        report = await SagaCoordinator(ledger=ledger).resume("s", pipeline)
        assert not lasting.done()
        await lasting
        return report

    report = run(play())

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+x"]
    assert ledger.given_back == ["s/book", "s"]


def test_a_saga_that_ends_while_its_owner_says_that_it_is_alive_alarms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    _, pipeline = scene({"a": ()}, {"a": Script(before=12.0)})
    ledger = SlowToHear()

    report = run(SagaCoordinator(ledger=ledger).run(pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert ledger.beats == [10.0]
    assert not caplog.records


def abandoned(coordinator: SagaCoordinator, pipeline: Pipeline, after: float, context: PipelineContext | None = None) -> None:
    """A saga whose event loop is closed in its midst: as by who gives up on run_until_complete, and whose program runs on."""
    loop = ControlledLoop()
    caller = loop.create_task(coordinator.run(pipeline, context, saga_id="s"))
    loop.run_until_complete(elapse(after))
    loop.close()
    caller.set_name("abandoned")


@HOOKED
@pytest.mark.parametrize("kind", [MemoryLedger, Leased])
def test_a_saga_whose_event_loop_was_closed_is_gone_on_with_where_it_ran(kind: type[MemoryLedger], context: PipelineContext | None) -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=10.0)}, dict.fromkeys(SEQUENCE, "probed"))
    coordinator = SagaCoordinator(ledger=kind())
    abandoned(coordinator, pipeline, 5.0, context)

    async def play() -> Recovery:
        recovering = asyncio.create_task(coordinator.recover([pipeline]))
        await elapse(5.0)
        # What was left in the closed loop takes nothing along.
        gc.collect()
        with pytest.raises(MisuseError, match="running here"):
            await coordinator.resume("s", pipeline)
        return await recovering

    recovery = run(play())

    assert recovery.reports["s"].status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]


def test_a_compensation_that_ignored_its_cancel_goes_on_to_nothing_when_its_event_loop_was_closed() -> None:
    async def undo(_: CompensationContext) -> None:
        try:
            await elapse(10.0)
        except asyncio.CancelledError:
            await elapse(10.0)

    async def fails(_: Any) -> None:
        raise ConnectionError("no line")

    pipeline = Pipeline(name="trip").with_stage("a", compensable(nothing, undo)).with_stage("b", fails, "work", dependencies=("a",))
    coordinator = SagaCoordinator(FailFast(cancel_grace=30.0, compensation=Compensation(timeout=1.0)))
    abandoned(coordinator, pipeline, 5.0)
    events = run(coordinator.ledger.read("s"))

    del coordinator
    gc.collect()

    assert isinstance(events[-1], CompensationStarted)


class BeginsSlowly(MemoryLedger):
    durable = True

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], *, under: int | None = None) -> int:
        await elapse(10.0)
        return await super().create(saga_id, owner, events, under=under)


def test_a_saga_whose_event_loop_was_closed_before_it_was_recorded_may_be_run_again() -> None:
    world, pipeline = scene(SEQUENCE)
    coordinator = SagaCoordinator(ledger=BeginsSlowly())
    abandoned(coordinator, pipeline, 5.0)

    report = run(coordinator.run(pipeline, saga_id="s"))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]


def test_a_saga_whose_event_loop_was_closed_is_not_held_by_its_owners_life_for_others() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=10.0)}, dict.fromkeys(SEQUENCE, "probed"))
    _, other = scene({"a": ()}, {"a": Script(before=100.0)})
    ledger = Leased()
    owner = SagaCoordinator(ledger=ledger)
    abandoned(owner, pipeline, 5.0)

    async def play() -> SagaReport:
        lasting = asyncio.create_task(owner.run(other))
        await elapse(5.0)
        with pytest.raises(LedgerConflict, match="is held"):
            await SagaCoordinator(ledger=ledger).resume("s", pipeline)
        await elapse(6.0)
        report = await SagaCoordinator(ledger=ledger).resume("s", pipeline)
        assert not lasting.done()
        await lasting
        return report

    report = run(play())

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]


FORKING = """
import asyncio, os, sys
from stageflow.api import Pipeline
from saga import SagaCoordinator, PivotStage
from saga.ledgers.sqlite import SQLiteLedger

begun, parent_goes_on = os.pipe(), os.pipe()

class Pay(PivotStage):
    idempotent = True
    async def execute(self, ctx):
        print("paid", flush=True)
        os.write(begun[1], b"x")
        await asyncio.to_thread(os.read, parent_goes_on[0], 1)

pipeline = Pipeline(name="p").with_stage("pay", Pay)
coordinator = SagaCoordinator(ledger=SQLiteLedger(sys.argv[1]))
child = os.fork()
if child:
    print(asyncio.run(coordinator.run(pipeline, saga_id="s")).status.value, flush=True)
    os.waitpid(child, 0)
else:
    os.read(begun[0], 1)
    print(*asyncio.run(coordinator.recover(pipeline)).held, flush=True)
    os.write(parent_goes_on[1], b"x")
    os._exit(0)
"""


def test_a_coordinator_that_was_made_before_a_fork_is_another_owner_after_it(tmp_path: Path) -> None:
    """A server that loads its program and then forks its workers: none takes another one's saga for its own."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path / "ledger.db")], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stderr == ""
    assert done.stdout.split() == ["paid", "s", "completed"]


def test_after_a_fork_a_coordinator_holds_nothing_and_has_another_name() -> None:
    """What runs in the forked process, played here."""
    coordinator = SagaCoordinator()
    before = coordinator._keeper.held.owner
    coordinator._keeper.held.sagas["s"] = None

    coordinator_module._name_all_anew()

    assert coordinator._keeper.held.owner != before
    assert coordinator._keeper.held.sagas == {}


class Waiting:
    """Waits until it may go on."""

    def __init__(self) -> None:
        self.begun, self.goes_on = asyncio.Event(), asyncio.Event()

    async def execute(self, _ctx: StageContext) -> None:
        self.begun.set()
        await self.goes_on.wait()


def pickled(coordinator: SagaCoordinator) -> SagaCoordinator:
    sent: SagaCoordinator = pickle.loads(pickle.dumps(coordinator))  # noqa: S301 - our own bytes
    return sent


@pytest.mark.parametrize("sent", [pickled, copy.deepcopy])
def test_a_coordinator_that_is_sent_to_another_process_is_another_owner_there(
    sent: Callable[[SagaCoordinator], SagaCoordinator], tmp_path: Path
) -> None:
    """Given to a process that was spawned, it took a saga that ran here for its own: the card was charged twice at once."""
    here = SagaCoordinator(ledger=SQLiteLedger(tmp_path / "ledger.db"))
    there = sent(here)

    async def play() -> tuple[Recovery, SagaReport]:
        stage = Waiting()
        pipeline = Pipeline(name="p").with_stage("pay", compensable(stage, nothing, idempotent=True))
        running = asyncio.create_task(here.run(pipeline, saga_id="s"))
        await stage.begun.wait()
        recovery = await there.recover(pipeline)
        stage.goes_on.set()
        return recovery, await running

    recovery, report = asyncio.run(asyncio.wait_for(play(), 60.0))

    assert list(recovery.held) == ["s"]
    assert report.status is SagaStatus.COMPLETED


class Goes(CompensableStage):
    """Goes on with the child that an earlier process has left."""

    idempotent = True

    def __init__(self, child: Pipeline) -> None:
        self.child = child

    async def execute(self, ctx: SagaContext) -> None:
        await elapse(10.0)
        left = await ctx.child_sagas()
        report = await (ctx.resume_saga(left[-1].saga_id, self.child) if left else ctx.run_saga(self.child))
        assert report.ok

    async def compensate(self, ctx: CompensationContext) -> None: ...


def test_a_child_whose_parent_is_being_recovered_is_left_to_it() -> None:
    _, child = scene({"a": ()}, {"a": Script(before=5.0)}, {"a": "probed"})
    parent = Pipeline(name="parent").with_stage("child", Goes(child))
    # It dies when the child's stage has begun.
    ledger = Dying(2)

    async def play() -> tuple[Any, Any]:
        with contextlib.suppress(LedgerError):
            await SagaCoordinator(ledger=ledger).run(parent, saga_id="s")
        ledger.left = 1000
        ledger.forget_owners()
        coordinator = SagaCoordinator(ledger=ledger)
        first = asyncio.create_task(coordinator.recover([parent, child]))
        await elapse(5.0)
        return await coordinator.recover([parent, child]), await first

    second, first = run(play())

    assert (second.reports, second.held, second.failed) == ({}, {}, {})
    assert first.reports["s"].status is SagaStatus.COMPLETED


def test_a_child_that_its_parent_passes_by_as_it_goes_on_is_stopped_by_the_same_recovery() -> None:
    """It begins another one. And so that the grandchild is not left behind in its turn, which its compensation has passed over."""
    world, room = scene({"room": ()}, {}, {"room": "probed"})

    async def book_anew(ctx: SagaContext) -> None:
        await ctx.run_saga(floor if ctx.stage_name == "floor" else room)

    floor = Pipeline(name="floor").with_stage("room", compensable(book_anew, nothing, compensate_in_doubt=True))
    hotel = Pipeline(name="hotel").with_stage("floor", compensable(book_anew, nothing, idempotent=True))
    ledger = Dying(3)

    async def play() -> tuple[Recovery, Recovery]:
        with contextlib.suppress(LedgerError):
            await SagaCoordinator(ledger=ledger).run(hotel, saga_id="s")
        assert [entry.status for entry in await ledger.list()] == [SagaStatus.RUNNING] * 3
        ledger.left = 1000
        ledger.forget_owners()
        coordinator = SagaCoordinator(ledger=ledger)
        first, second = [await coordinator.recover([hotel, floor, room]) for _ in range(2)]
        return first, second

    first, second = run(play())

    assert {saga_id: report.status for saga_id, report in first.reports.items()} == {
        "s": SagaStatus.COMPLETED,
        "s/floor": SagaStatus.STUCK,
        "s/floor/room": SagaStatus.COMPENSATED,
    }
    assert str(second) == "No saga has lost its process."
    assert world.log == ["+room", "+room", "-room"]


class ReadsSlowly(MemoryLedger):
    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        await elapse(1.0)
        return await super().read(saga_id)


@pytest.mark.parametrize("kind", [MemoryLedger, ReadsSlowly])
def test_a_saga_that_goes_on_here_meanwhile_is_no_failure_of_a_recovery(kind: type[MemoryLedger]) -> None:
    _, pipeline = scene({"a": ()}, {"a": Script(before=5.0)})
    ledger = kind()

    async def play() -> list[Any]:
        for name in "xyz":
            await left_behind(ledger, pipeline, name)
        coordinator = SagaCoordinator(ledger=ledger)
        return list(await asyncio.gather(*(coordinator.recover(pipeline, concurrency=1) for _ in range(2))))

    recoveries = run(play())

    assert {name for recovery in recoveries for name in recovery.reports} == {"x", "y", "z"}
    assert [recovery.failed for recovery in recoveries] == [{}, {}]


@pytest.mark.parametrize("kind", [MemoryLedger, ReadsSlowly, partial(MemoryLedger, keep=0)])
def test_a_saga_that_comes_to_rest_where_it_runs_is_none_that_a_recovery_went_on_with(kind: Callable[[], MemoryLedger]) -> None:
    """A service recovers every minute beside the sagas that it runs, and looks at what went on."""
    _, pipeline = scene({"a": ()}, {"a": Script(before=5.0)})
    ledger = kind()

    async def play() -> tuple[Recovery, SagaReport]:
        await left_behind(ledger, pipeline, "x")
        coordinator = SagaCoordinator(ledger=ledger)
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="y"))
        await elapse(2.0)
        return await coordinator.recover(pipeline, concurrency=1), await running

    recovery, report = run(play())

    assert report.status is SagaStatus.COMPLETED
    assert list(recovery.reports) == ["x"]
    assert not recovery.held
    assert not recovery.failed


class ForgottenWhenTaken(MemoryLedger):
    """Whoever takes a lease stands still for so long that another process brings the saga to rest, and somebody prunes it."""

    async def acquire(self, saga_id: str, owner: str, *, under: int | None = None) -> int:
        token = await super().acquire(saga_id, owner, under=under)
        self._forget(saga_id)
        return token


def test_a_saga_that_is_forgotten_while_it_is_taken_over_is_not_there() -> None:
    _, pipeline = scene(SEQUENCE)
    ledger = ForgottenWhenTaken()
    run(left_behind(ledger, pipeline, "s"))
    coordinator = SagaCoordinator(ledger=ledger)

    with pytest.raises(SagaNotFound, match="got 's'"):
        run(coordinator.resume("s", pipeline))

    assert coordinator._keeper.held.sagas == {}


async def left_behind(ledger: MemoryLedger, pipeline: Pipeline, saga_id: str, parent: str | None = None) -> None:
    """A saga whose process is gone."""
    graph, stage = Blueprint.of(pipeline).graph, None if parent is None else "a"
    started = SagaStarted(saga_id=saga_id, pipeline=pipeline.name, graph=graph, policy=FailFast(), parent=parent, parent_stage=stage)
    token = await ledger.create(saga_id, "gone", [started])
    await ledger.release(saga_id, token)


def test_what_nobody_expects_of_one_saga_leaves_the_others_of_a_recovery_alone() -> None:
    _, pipeline = scene({"a": ()})

    class Odd(MemoryLedger):
        async def read(self, saga_id: str) -> Any:
            return 1 if saga_id == "x" else await super().read(saga_id)

    ledger = Odd()

    async def play() -> Any:
        for name in "xy":
            await left_behind(ledger, pipeline, name)
        return await SagaCoordinator(ledger=ledger).recover(pipeline)

    recovery = run(play())

    assert recovery.reports["y"].status is SagaStatus.COMPLETED
    assert str(recovery.failed["x"]) == "saga x could not go on: TypeError: cannot unpack non-iterable int object"
    assert isinstance(recovery.failed["x"].__cause__, TypeError)


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_caller_that_is_cancelled_while_its_resuming_is_recorded_gets_its_cancel(how: str) -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise", then=("ok",))})
    ledger = SlowDisk(seconds=1.0)
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger)

    async def play() -> SagaReport:
        await coordinator.run(pipeline, saga_id="s")
        if how == "cancel":
            resuming = asyncio.create_task(coordinator.resume("s", pipeline))
            await elapse(0.5)
            resuming.cancel()
            await asyncio.wait({resuming})
            assert resuming.cancelled()
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await coordinator.resume("s", pipeline)
        return await coordinator.report("s")

    report = run(play())

    assert any("SagaResumed" in write for write in ledger.writes)
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_person_who_is_cancelled_while_the_word_is_recorded_gets_the_cancel_and_has_said_it(tmp_path: Path) -> None:
    class Cancelling(SQLiteLedger):
        """Cancels whoever records a person's word."""

        async def append(self, saga_id: str, events: Sequence[AnyEvent], **how: Any) -> None:
            if isinstance(events[0], StageSettled):
                this_task().cancel()
            await super().append(saga_id, events, **how)

    _, pipeline = scene(SEQUENCE, {"b": Script(undo_fails=1), "c": Script("raise")})

    async def play() -> tuple[asyncio.Task[SagaReport], SagaReport]:
        async with Cancelling(tmp_path / "sagas.db") as ledger:
            coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))), ledger=ledger)
            await coordinator.run(pipeline, saga_id="s")
            settling = asyncio.create_task(coordinator.settle("s", "b", "undone", "cancelled by phone"))
            await asyncio.wait({settling})
            return settling, await coordinator.report("s")

    settling, report = asyncio.run(play())

    assert settling.cancelled()
    assert report.stages["b"].state is StageState.UNDONE


class SlowToAnswer(MemoryLedger):
    """Gives a lease at once, and says so a second later; what is asked for while `fails` fails."""

    def __init__(self) -> None:
        super().__init__()
        self.acquired = 0
        self.fails = False

    async def acquire(self, saga_id: str, owner: str, **how: Any) -> int:
        token = await super().acquire(saga_id, owner, **how)
        self.acquired += 1
        await elapse(1.0)
        return token

    async def read(self, saga_id: str) -> Any:
        if self.fails and self.acquired:
            raise LedgerError("no line")
        return await super().read(saga_id)


def calls(pipeline: Pipeline) -> dict[str, Any]:
    return {
        "resume": lambda coordinator: coordinator.resume("s", pipeline),
        "compensate": lambda coordinator: coordinator.compensate("s", pipeline),
        "settle": lambda coordinator: coordinator.settle("s", "c", "undone", "I looked"),
    }


@pytest.mark.parametrize("call", ["resume", "compensate", "settle"])
@pytest.mark.parametrize("how", ["cancel", "twice", "scope"])
def test_a_caller_that_is_cancelled_while_it_takes_a_saga_does_not_keep_it(call: str, how: str) -> None:
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    ledger = SlowToAnswer()
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger)

    async def play() -> str | None:
        await coordinator.run(pipeline, saga_id="s")
        if how != "scope":
            caller = asyncio.create_task(calls(pipeline)[call](coordinator))
            await elapse(0.5)
            caller.cancel()
            if how == "twice":
                # Whoever waits long for the first one to take effect says it again.
                await elapse(0.1)
                caller.cancel()
            await asyncio.wait({caller})
            assert caller.cancelled()
        else:
            with anyio.move_on_after(0.5) as scope:
                await calls(pipeline)[call](coordinator)
            assert scope.cancelled_caught
        (entry,) = await ledger.list()
        return entry.owner

    assert run(play()) is None
    assert ledger.acquired


@pytest.mark.parametrize("call", ["resume", "compensate", "settle"])
def test_a_saga_that_was_taken_and_cannot_be_read_then_is_let_go(call: str) -> None:
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    ledger = SlowToAnswer()
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger)

    async def play() -> str | None:
        await coordinator.run(pipeline, saga_id="s")
        ledger.fails = True
        with pytest.raises(LedgerError, match="no line"):
            await calls(pipeline)[call](coordinator)
        (entry,) = await ledger.list()
        return entry.owner

    assert run(play()) is None
    assert ledger.acquired == 1


def test_what_a_caller_changes_after_a_saga_has_begun_its_ledger_does_not_hold() -> None:
    seen: list[Any] = []

    async def look(ctx: Any) -> None:
        seen.append(ctx.snapshot.metadata)
        if len(seen) == 1:
            raise ConnectionError("no line")

    metadata = {"iban": ["NO1"]}
    pipeline = Pipeline(name="p").with_stage("a", look, "work")
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(pipeline, saga_id="s", metadata=metadata))
    metadata["iban"].append("changed")

    run(coordinator.resume("s", pipeline))

    assert seen[1]["iban"] == ["NO1"]


# -- whose part a saga is --------------------------------------------------------------------------------------------


def stuck_within() -> tuple[Any, SagaCoordinator, Pipeline, Pipeline]:
    """top: middle: child: a -> b, where a could not be undone."""
    world, child = scene({"a": (), "b": ("a",)}, {"a": Script(undo_fails=3), "b": Script("raise")})
    middle = Pipeline(name="middle").with_stage("child", nested(child))
    return world, SagaCoordinator(), child, Pipeline(name="top").with_stage("middle", nested(middle))


def test_what_is_settled_within_is_learned_by_the_sagas_around_it_whichever_is_named() -> None:
    world, coordinator, _, top = stuck_within()
    run(coordinator.run(top, saga_id="s"))
    world.undo("a")

    run(coordinator.settle("s/middle/child", "a", "undone", "by hand"))
    report = run(coordinator.resume("s", top, forward=False))

    assert report.status is SagaStatus.COMPENSATED
    assert report.stuck == {}


def test_the_report_of_what_is_stuck_within_says_what_to_do_in_the_saga_that_runs_it() -> None:
    _, coordinator, _, top = stuck_within()
    report = run(coordinator.run(top, saga_id="s"))

    within = run(coordinator.report("s/middle"))

    assert str(within).splitlines()[-2:] == ["  saga settle s middle/child/a undone --note '...'", "  saga resume s"]
    assert report.cause is not None
    assert report.cause.message.endswith("is stuck: stage 'a' could not be compensated at attempt 3: CardDeclined: undoing a was declined")
    assert SagaReport.model_validate_json(within.model_dump_json()) == within
    assert (within.parent, within.parent_stage) == ("s", "middle")


def test_a_saga_that_another_one_runs_is_not_resumed_or_undone_by_itself() -> None:
    _, coordinator, child, top = stuck_within()
    run(coordinator.run(top, saga_id="s"))

    for go_on in (coordinator.resume, coordinator.compensate):
        with pytest.raises(
            MisuseError, match=r"a saga that no other one runs, got s/middle/child, .*stage 'middle' of saga s. Go on with s: "
        ):
            run(go_on("s/middle/child", child))


def test_a_child_of_which_the_ledger_has_no_parent_goes_on_by_itself() -> None:
    """Brought from another ledger alone, say."""
    _, pipeline = scene({"a": ()})
    ledger = MemoryLedger()

    async def play() -> SagaReport:
        await left_behind(ledger, pipeline, "s/child", parent="s")
        return await SagaCoordinator(ledger=ledger).resume("s/child", pipeline)

    assert run(play()).status is SagaStatus.COMPLETED


def test_a_recovery_leaves_the_child_of_a_saga_that_is_just_being_resumed_to_it() -> None:
    """Which is still halted in the ledger, and about to go on with its child."""
    world, pipeline = scene({"a": ()}, {"a": Script("raise", then=("ok",))})
    ledger = SlowLedger()
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger)

    async def play() -> Recovery:
        await coordinator.run(pipeline, saga_id="s")
        await left_behind(ledger, pipeline, "s/a", parent="s")
        resumed = asyncio.create_task(coordinator.resume("s", pipeline))
        await elapse(0.1)
        recovery = await coordinator.recover(pipeline)
        await resumed
        return recovery

    recovery = run(play())

    assert (recovery.reports, recovery.held, recovery.failed) == ({}, {}, {})
    assert world.log == ["+a"]


def test_a_stage_can_not_go_on_with_a_child_that_is_not_there() -> None:
    _, child = scene({"a": ()})

    class Asks(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            await ctx.resume_saga("nowhere", child)

        async def compensate(self, ctx: CompensationContext) -> None: ...

    report = run(SagaCoordinator().run(Pipeline(name="p").with_stage("a", Asks)))

    assert report.cause is not None
    assert report.cause.message.startswith("expected the id of a saga in the ledger, got 'nowhere'")


def test_a_pipeline_of_another_name_can_not_undo_a_saga() -> None:
    """A mistyped one, whose stages happen to be named alike."""
    _, pipeline = scene(SEQUENCE)
    coordinator = SagaCoordinator()
    run(coordinator.run(pipeline, saga_id="s"))
    other = Pipeline(name="refund", stages=pipeline.stages)

    with pytest.raises(MisuseError, match=r"got another one: its pipeline is 'scene', this one is 'refund'. Nothing was run"):
        run(coordinator.compensate("s", other))


class SlowToRead(SlowDisk):
    async def read(self, saga_id: str) -> Any:
        await elapse(1)
        return await super().read(saga_id)


def test_of_those_who_begin_a_saga_of_one_id_at_once_one_begins_it_and_the_others_are_told() -> None:
    """As two requests for one order do, on a ledger that is read before the first of them has written."""
    world, pipeline = scene(SEQUENCE)
    coordinator = SagaCoordinator(ledger=SlowToRead())

    async def play() -> list[SagaReport | BaseException]:
        return await asyncio.gather(*[coordinator.run(pipeline, saga_id="order-7") for _ in range(3)], return_exceptions=True)

    first, *others = run(play())

    assert isinstance(first, SagaReport)
    assert first.status is SagaStatus.COMPLETED
    assert [type(other) for other in others] == [SagaExists, SagaExists]
    assert world.log == ["+a", "+b", "+c"]
    assert coordinator._keeper.held.sagas == {}
    assert coordinator._keeper.held._beating == {}


class TwoThreads:
    """Take a saga at the same instant, each when the other has found that nobody holds it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        meeting = threading.Barrier(2)
        monkeypatch.setattr(held_module, "make_ready", lambda: meeting.wait(10))
        self._one_has_ended = threading.Event()

    def outlasting(self, pipeline: Pipeline) -> Pipeline:
        """A pipeline whose sagas go on until one of the two has ended."""

        async def outlast(_: Any) -> None:
            await asyncio.to_thread(self._one_has_ended.wait, 10)

        return pipeline.with_stage("d", outlast, "transform", dependencies=("c",))

    def end_with(self, call: Callable[[], Coroutine[Any, Any, SagaReport]]) -> list[SagaReport | BaseException]:
        """What the two end with, a report last."""
        with ThreadPoolExecutor(2) as threads:
            running = [threads.submit(lambda: asyncio.run(call())) for _ in range(2)]
            for each in running:
                each.add_done_callback(lambda _: self._one_has_ended.set())
            return sorted([each.exception() or each.result() for each in running], key=lambda end: isinstance(end, SagaReport))


@pytest.mark.parametrize("kind", [Leased, SlowDisk])
def test_of_two_threads_that_begin_a_saga_of_one_id_at_once_one_begins_it_and_the_other_is_told(
    kind: type[MemoryLedger], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, pipeline = scene(SEQUENCE)
    threads = TwoThreads(monkeypatch)
    coordinator = SagaCoordinator(ledger=kind())

    told, report = threads.end_with(lambda: coordinator.run(threads.outlasting(pipeline), saga_id="order-7"))

    assert isinstance(report, SagaReport)
    assert report.status is SagaStatus.COMPLETED
    assert isinstance(told, SagaExists)
    assert world.log == ["+a", "+b", "+c"]
    assert coordinator._keeper.held.sagas == {}
    assert coordinator._keeper.held._beating == {}


def test_of_two_threads_that_resume_a_saga_at_once_one_goes_on_with_it_and_the_other_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise", then=("ok",))})
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=Leased())
    threads = TwoThreads(monkeypatch)
    lasting = threads.outlasting(pipeline)
    with monkeypatch.context() as alone:
        alone.setattr(held_module, "make_ready", lambda: None)
        asyncio.run(coordinator.run(lasting, saga_id="order-7"))

    told, report = threads.end_with(lambda: coordinator.resume("order-7", lasting))

    assert isinstance(report, SagaReport)
    assert report.status is SagaStatus.COMPLETED
    assert isinstance(told, MisuseError)
    assert world.log == ["+a", "+b", "+c"]
    assert coordinator._keeper.held.sagas == {}


class Unready(PipelineContext):
    """Whose snapshot is not there yet."""

    def to_snapshot(self) -> Any:
        raise ValueError("no snapshot yet")


class OfATenant(PipelineContext):
    """That can't be made again from its fields, as stageflow's interceptors need it."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields, service="the tenant's")


class Watches(BaseInterceptor):
    name = "watches"

    async def before(self, stage_name: str, ctx: PipelineContext) -> None: ...

    async def after(self, stage_name: str, result: Any, ctx: PipelineContext) -> None: ...


@pytest.mark.parametrize(("kind", "raises"), [(Unready, ValueError), (OfATenant, TypeError)])
def test_a_saga_that_nothing_can_be_made_of_to_run_it_is_not_held(
    kind: Callable[..., PipelineContext], raises: type[Exception], tmp_path: Path
) -> None:
    """Its id was taken as long as the process lived, whose heart beat for it, and who waited for all to rest got an AttributeError."""
    world, pipeline = scene(SEQUENCE)
    like = PipelineContext.create()
    fields = {field.name: getattr(like, field.name) for field in dataclasses.fields(like) if field.init and field.name != "service"}

    async def main() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            coordinator = SagaCoordinator(ledger=ledger, interceptors=[Watches()])
            with pytest.raises(raises):
                await coordinator.run(pipeline, kind(**fields), saga_id="s")
            await coordinator.wind_up()
            assert coordinator._keeper.held.sagas == {}
            return await coordinator.run(pipeline, saga_id="s")

    assert asyncio.run(main()).ok
    assert set(world.standing) == set(SEQUENCE)


def test_of_a_saga_that_could_not_be_run_and_is_in_memory_already_the_lease_is_given_back() -> None:
    world, pipeline = scene(SEQUENCE)
    ledger = MemoryLedger()
    like = PipelineContext.create()
    fields = {field.name: getattr(like, field.name) for field in dataclasses.fields(like) if field.init and field.name != "service"}

    async def main() -> Recovery:
        with pytest.raises(ValueError, match="no snapshot yet"):
            await SagaCoordinator(ledger=ledger).run(pipeline, Unready(**fields), saga_id="s")
        return await SagaCoordinator(ledger=ledger).recover(pipeline)

    recovery = asyncio.run(main())

    assert recovery.reports["s"].ok
    assert (recovery.held, recovery.failed) == ({}, {})
    assert set(world.standing) == set(SEQUENCE)


def test_a_saga_that_is_resumed_is_stopped_by_its_id_from_the_moment_in_which_it_is_alive() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise", before=5, then=("ok",))})
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=SlowToRead())

    async def play() -> SagaReport:
        await coordinator.run(pipeline, saga_id="s")
        resumed = asyncio.create_task(coordinator.resume("s", pipeline))
        cancelled = False
        while not cancelled:
            await elapse(0.1)
            with contextlib.suppress(SagaNotFound):
                await coordinator.cancel("s", "the customer left")
                cancelled = True
        return await resumed

    report = run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message == "the customer left"
    assert world.log == ["+a", "+b", "-b", "-a"]
