"""What ignores its cancel is given up in time; what it comes to later is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from stageflow.api import Pipeline, StageContext, StageOutput, StageStatus

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    LedgerConflict,
    LedgerError,
    MemoryLedger,
    MisuseError,
    PivotStage,
    Policy,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
    nested,
)
from saga.events import (
    CompensationCompleted,
    CompensationFailed,
    FallbackUsed,
    SagaEnded,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSettled,
    StageStarted,
)
from saga.failures import Failure, FailureKind
from saga.text import quoted
from tests.controlled import ControlledLoop, elapse, run
from tests.slow import SlowLedger
from tests.world import Script, World, nothing, scene

S = StageState


class Deaf(CompensableStage):
    """Does its work only once it is released, however often it is cancelled meanwhile."""

    def __init__(self, world: World, *, deaf_undo: bool = False) -> None:
        self.world = world
        self.released = asyncio.Event()
        self.deaf_undo = deaf_undo
        self.undone_with: list[Any] = []
        self.outcome: Callable[[], Any] = lambda: StageOutput.ok(seat="14A")

    async def _wait(self) -> None:
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                continue

    async def execute(self, ctx: SagaContext) -> Any:
        if not self.deaf_undo:
            await self._wait()
        self.world.land("deaf")
        return self.outcome()

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.deaf_undo:
            await self._wait()
        self.undone_with.append(None if ctx.output is None else ctx.output.data)
        self.world.begin_undo("deaf")
        self.world.undo("deaf")
        self.world.end_undo("deaf")


class Doubtful(Deaf):
    compensate_in_doubt = True

    async def compensate(self, ctx: CompensationContext) -> None:
        self.undone_with.append("in doubt" if ctx.in_doubt else ctx.output)
        if "deaf" in self.world.standing:
            self.world.undo("deaf")


class DeniedByProbe(Deaf):
    async def probe(self, ctx: CompensationContext) -> None:
        return None


class Stays(Deaf):
    async def compensate(self, ctx: CompensationContext) -> None:
        raise RuntimeError("no")

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok() if "deaf" in self.world.standing else None


class ReleasesAt(MemoryLedger):
    """Lets a stage come late in the moment in which such an event is recorded."""

    def __init__(self, kind: type[Any], stage: Deaf) -> None:
        super().__init__()
        self.kind = kind
        self.stage = stage

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        if any(isinstance(event, self.kind) for event in events):
            self.stage.released.set()
            await elapse(1)
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


def play(
    kind: type[Deaf] = Deaf,
    policy: Policy | None = None,
    *,
    released_when: Callable[[SagaReport | None], bool] = lambda report: report is not None,
    outcome: Callable[[], Any] | None = None,
    before: tuple[str, ...] = ("a",),
) -> tuple[World, Deaf, SagaReport, SagaReport, SagaReport]:
    """a -> deaf: the report that the caller gets, the one after the latecomer, and the one after resuming."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_takes=20)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> tuple[Deaf, SagaReport, SagaReport, SagaReport]:
        stage = kind(world)
        if outcome is not None:
            stage.outcome = outcome
        whole = pipeline.with_stage("deaf", stage, dependencies=before)
        coordinator = SagaCoordinator(policy or FailFast(timeout=10, cancel_grace=2))
        running = asyncio.create_task(coordinator.run(whole, saga_id="s"))
        while not running.done() and not released_when(None):
            await elapse(1)
        if not running.done():
            stage.released.set()
        first = await running
        stage.released.set()
        for _ in range(20):
            await asyncio.sleep(0)
        second = await coordinator.report("s")
        third = await coordinator.resume("s", whole)
        assert coordinator._keeper.held.sagas == {}
        assert coordinator._keeper.amendments._late == {}
        return stage, first, second, third

    return world, *run(main())


async def while_slow_is_undone(work: Coroutine[Any, Any, SagaReport], world: World, *late: Deaf, after: float = 0.0) -> SagaReport:
    """Run a saga of which some stages come late so long after `slow` has begun to be undone."""
    running = asyncio.create_task(work)
    while "slow" not in world.undoing:
        await elapse(1)
    if after:
        await elapse(after)
    for stage in late:
        stage.released.set()
    return await running


def test_the_caller_gets_its_report_in_time_and_the_late_completion_is_recorded_and_undone_on_resume() -> None:
    world, stage, first, late, resumed = play()

    assert first.status is SagaStatus.STUCK
    assert first.stages["deaf"].state is S.IN_DOUBT
    assert first.cause is not None
    assert "ignored its cancel for 2 s and was given up; it may still be running" in first.cause.message
    assert late.status is SagaStatus.STUCK
    assert late.stages["deaf"].state is S.BLOCKED
    assert late.stages["deaf"].late_output == StageOutput.ok(seat="14A")
    assert late.stages["deaf"].output == StageOutput.ok(seat="14A")
    assert "it completed late, when it had been given up" in str(late)
    assert resumed.status is SagaStatus.COMPENSATED
    assert stage.undone_with == [{"seat": "14A"}]
    assert world.standing == {}
    assert world.refusals == []


class HeedsTheSecondCancel(CompensableStage):
    """Comes to its end when it is cancelled once more, as asyncio.run does it with all that is left."""

    def __init__(self, world: World, *, undo: bool) -> None:
        self.world = world
        self.undo = undo

    async def execute(self, ctx: SagaContext) -> StageOutput:
        if not self.undo:
            await self._cancelled_twice()
        self.world.land("deaf")
        return StageOutput.ok(seat="14A")

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.undo:
            await self._cancelled_twice()
        self.world.begin_undo("deaf")
        self.world.undo("deaf")

    async def _cancelled_twice(self) -> None:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await elapse(1000)


@pytest.mark.parametrize("undo", [False, True])
def test_what_comes_late_when_its_event_loop_ends_is_recorded_before_it_does(undo: bool) -> None:
    world, pipeline = scene({"a": ()})
    world.dependencies["deaf"] = ("a",)
    pipeline = pipeline.with_stage("deaf", HeedsTheSecondCancel(world, undo=undo), dependencies=("a",))
    if undo:
        pipeline = pipeline.with_stage("pay", failing, "work", dependencies=("deaf",))
    limits = Compensation(retry=Retry(attempts=1), timeout=10)
    coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2, compensation=limits), ledger=SlowLedger())

    with asyncio.Runner(loop_factory=ControlledLoop) as runner:
        first = runner.run(coordinator.run(pipeline, saga_id="s"))
    late = run(coordinator.report("s"))
    last = run(coordinator.resume("s", pipeline))

    assert first.status is SagaStatus.STUCK
    assert late.stages["deaf"].state is (S.UNDONE if undo else S.BLOCKED)
    assert last.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_what_came_late_and_was_cut_off_from_outside_while_it_was_recorded_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """A ledger that is no durable one of ours may end with its caller, and asyncio.run cancels whoever still runs."""
    world = World({"deaf": ()})

    async def main() -> None:
        stage = Deaf(world)
        await SagaCoordinator(PROMPT, ledger=SlowLedger()).run(Pipeline().with_stage("deaf", stage), saga_id="s")
        stage.released.set()
        await elapse(0.1)

    with asyncio.Runner(loop_factory=ControlledLoop) as runner:
        runner.run(main())

    assert world.standing == {"deaf": 1}
    assert LOSS in [record.message for record in caplog.records]


async def failing(_: Any) -> StageOutput:
    return StageOutput.fail("no")


def test_what_comes_late_while_the_saga_goes_backward_is_undone_at_once() -> None:
    shape = {"a": (), "slow": ()}
    world, pipeline = scene(shape, {"slow": Script(undo_takes=20)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = Deaf(world)
        whole = pipeline.with_stage("deaf", stage, dependencies=("a",))
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2))
        return await while_slow_is_undone(coordinator.run(whole, saga_id="s"), world, stage)

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["deaf"].late_output == StageOutput.ok(seat="14A")
    assert world.undone() == ["slow", "deaf", "a"]
    assert world.standing == {}


def test_what_comes_late_when_what_it_depends_on_is_undone_as_serving_nothing_is_undone_too() -> None:
    """It was kept in a saga that had been compensated, and resumed, that ran again what it had been worked out from."""
    world, _, first, late, resumed = play(DeniedByProbe, ContinueWithFallback(timeout=10, cancel_grace=2, without_fallback="skip_branch"))

    assert first.status is SagaStatus.COMPENSATED
    assert late.status is SagaStatus.STUCK
    assert [*late.blocked] == ["deaf"]
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.log == ["+a", "-a", "+deaf", "-deaf"]


def test_what_came_late_when_what_it_depends_on_had_been_undone_is_gone_on_with_on_demand() -> None:
    world, pipeline = scene({"a": ()})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = DeniedByProbe(world)
        trip = pipeline.with_stage("deaf", stage, dependencies=("a",))
        trip = trip.with_stage("after", nothing, "work", dependencies=("deaf",))
        coordinator = SagaCoordinator(ContinueWithFallback(timeout=10, cancel_grace=2, without_fallback="skip_branch"))
        await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        return await coordinator.resume("s", trip, forward=True)

    report = run(main())

    assert report.status is SagaStatus.COMPLETED
    assert [*report.kept] == ["a", "deaf", "after"]
    assert world.standing == {"a": 1, "deaf": 1}


@pytest.mark.parametrize("kind", [DeniedByProbe, Doubtful])
@pytest.mark.parametrize("within", [False, True])
def test_nothing_is_undone_under_what_has_come_late_before(within: bool, kind: type[Deaf]) -> None:
    """Promise 1: its turn was over, and what it depends on was undone before it when the others that do had been undone."""
    world, pipeline = scene({"a": (), "slow": ("a",)}, {"slow": Script(undo_takes=20)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = kind(world)
        last = nested(Pipeline(name="inner").with_stage("deaf", stage), PROMPT) if within else stage
        coordinator = SagaCoordinator(PROMPT)
        return await while_slow_is_undone(
            coordinator.run(pipeline.with_stage("last", last, dependencies=("a",)), saga_id="s"), world, stage, after=5
        )

    report = run(main())

    assert world.refusals == []
    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["slow", "deaf", "a"]
    assert world.standing == {}


def test_what_comes_late_while_what_serves_nothing_is_undone_leaves_the_rest_as_it_is() -> None:
    shape = {"kept": (), "also": ("kept",), "base": (), "slow": ("base",), "fails": ("slow",)}
    world, pipeline = scene(shape, {"slow": Script(undo_takes=20), "fails": Script("raise")})
    world.dependencies["deaf"] = ("kept",)

    async def main() -> SagaReport:
        stage = DeniedByProbe(world)
        trip = pipeline.with_stage("deaf", stage, dependencies=("kept",))
        coordinator = SagaCoordinator(ContinueWithFallback(timeout=10, cancel_grace=2, without_fallback="skip_branch"))
        return await while_slow_is_undone(coordinator.run(trip, saga_id="s"), world, stage)

    report = run(main())

    assert report.status is SagaStatus.DEGRADED
    assert [*report.kept] == ["kept", "also", "deaf"]
    assert world.undone() == ["slow", "base"]
    assert world.standing == {"kept": 1, "also": 1, "deaf": 1}


def test_what_came_late_before_its_own_turn_is_undone_as_what_it_gave() -> None:
    world, _ = scene({})
    stage = Doubtful(world)

    report = run(SagaCoordinator(PROMPT, ledger=ReleasesAt(SagaTurnedBack, stage)).run(Pipeline().with_stage("deaf", stage)))

    assert report.status is SagaStatus.COMPENSATED
    assert stage.undone_with == [StageOutput.ok(seat="14A")]
    assert world.standing == {}


def test_two_that_come_late_at_once_are_both_heard() -> None:
    world, pipeline = scene({"a": (), "slow": ("a",)}, {"slow": Script(undo_takes=20)})
    deaf = [Doubtful(world), Doubtful(world)]

    async def main() -> SagaReport:
        return await while_slow_is_undone(
            SagaCoordinator(PROMPT).run(pipeline.with_stage("left", deaf[0]).with_stage("right", deaf[1]), saga_id="s"), world, *deaf
        )

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["left"].late_output == report.stages["right"].late_output == StageOutput.ok(seat="14A")
    assert world.standing == {}


def test_a_word_on_a_stage_waits_for_no_saga_below_another_ones_stage_of_that_name() -> None:
    world, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script(undo_fails=9), "b": Script("raise")})

    async def main() -> SagaReport:
        coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))))
        await coordinator.run(pipeline, saga_id="s")
        within = nested(Pipeline(name="within").with_stage("waits", forever, "work"))
        other = asyncio.create_task(coordinator.run(Pipeline().with_stage("a", within), saga_id="other"))
        await elapse(1)
        world.undo("a")
        await coordinator.settle("s", "a", "undone", "by hand")
        other.cancel()
        await asyncio.wait({other})
        return await coordinator.report("s")

    assert run(main()).status is SagaStatus.COMPENSATED


async def forever(_: StageContext) -> None:
    await asyncio.Event().wait()


async def late_between_two_attempts(trip: Pipeline, stage: Deaf | DeafPivot) -> tuple[SagaCoordinator, SagaReport]:
    """Run a saga of which a stage comes late while a compensation that has failed waits for its next attempt."""
    told: list[Any] = []
    patient = PROMPT.model_copy(update={"compensation": Compensation(retry=Retry(attempts=2, wait=10, jitter=False))})
    coordinator = SagaCoordinator(patient, listeners=[lambda _, event: told.append(event)])
    running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
    while not any(isinstance(event, CompensationFailed) for event in told):
        await elapse(1)
    stage.released.set()
    return coordinator, await running


@pytest.mark.parametrize("kind", [DeniedByProbe, Doubtful])
def test_a_compensation_is_not_tried_again_under_what_has_come_late_meanwhile(kind: type[Deaf]) -> None:
    """Promise 1."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=1)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = kind(world)
        return (await late_between_two_attempts(pipeline.with_stage("deaf", stage, dependencies=("a",)), stage))[1]

    report = run(main())

    assert world.refusals == []
    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["deaf", "a"]
    assert world.standing == {}


def test_a_compensation_that_what_came_late_has_put_off_has_no_more_attempts_than_any_other() -> None:
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=9)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = Doubtful(world)
        return (await late_between_two_attempts(pipeline.with_stage("deaf", stage, dependencies=("a",)), stage))[1]

    report = run(main())

    assert world.undone() == ["deaf"]
    assert report.stages["a"].compensation is not None
    assert report.stages["a"].compensation.attempts == 2


def test_a_compensation_that_failed_is_not_tried_again_under_a_pivot_that_has_come_late_meanwhile() -> None:
    """Promise 10; whether anything is left of what it undoes, a person says."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=1)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = DeafPivot(world)
        trip = pipeline.with_stage("deaf", stage, dependencies=("a",))
        coordinator, report = await late_between_two_attempts(trip, stage)
        await coordinator.settle("s", "a", "kept", note="it stands")
        return report, await coordinator.resume("s", trip)

    report, resumed = run(main())

    assert report.status is SagaStatus.STUCK
    assert [*report.stuck] == ["a"]
    assert world.refusals == []
    assert resumed.status is SagaStatus.COMPLETED
    assert world.standing == {"a": 1, "deaf": 1}


def test_nothing_is_undone_under_what_is_just_being_recorded_as_having_come_late() -> None:
    """Promise 1: who is done with another stage meanwhile waits for that."""
    shape = {"a": (), "other": ("a",), "apart": ()}
    world, pipeline = scene(shape, {"other": Script(undo_takes=20), "apart": Script(undo_takes=16)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = DeniedByProbe(world)
        coordinator = SagaCoordinator(PROMPT, ledger=SlowLedger(seconds=3))
        running = asyncio.create_task(coordinator.run(pipeline.with_stage("deaf", stage, dependencies=("a",)), saga_id="s"))
        while not {"other", "apart"} <= world.undoing:
            await elapse(1)
        await elapse(5)
        stage.released.set()
        return await running

    report = run(main())

    assert world.refusals == []
    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["apart", "other", "deaf", "a"]


def test_a_compensation_that_is_held_back_by_what_came_late_and_cant_be_undone_leaves_its_stage_stuck() -> None:
    """Between two attempts of it; a person can then say of both what stands."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=1)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Stays(world)
        trip = pipeline.with_stage("deaf", stage, dependencies=("a",))
        coordinator, report = await late_between_two_attempts(trip, stage)
        world.undo("deaf")
        await coordinator.settle("s", "deaf", "undone", note="by hand")
        await coordinator.settle("s", "a", "retry", note="mended")
        return report, await coordinator.resume("s", trip)

    report, resumed = run(main())

    assert report.status is SagaStatus.STUCK
    assert [*report.stuck] == ["a", "deaf"]
    assert world.refusals == []
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("kind", [DeniedByProbe, Deaf])
def test_a_late_failure_behind_the_probes_answer_is_told_to_the_log(kind: type[Deaf], caplog: pytest.LogCaptureFixture) -> None:
    """It may have landed since; where nobody has answered, the stage is in doubt anyway."""
    world, _ = scene({})
    stage = kind(world)
    stage.outcome = lambda: StageOutput.fail("the line broke")

    async def main() -> SagaReport:
        report = await SagaCoordinator(PROMPT).run(Pipeline().with_stage("deaf", stage), saga_id="s")
        stage.released.set()
        await settled_down()
        return report

    report = run(main())

    assert report.status is (SagaStatus.COMPENSATED if kind is DeniedByProbe else SagaStatus.STUCK)
    told = [record.getMessage() for record in caplog.records if "its probe had answered that nothing had landed" in record.getMessage()]
    assert [message.partition(", after")[0] for message in told] == (
        ["saga s: stage 'deaf' reported a failure: the line broke"] if kind is DeniedByProbe else []
    )


@pytest.mark.parametrize("halts", [True, False])
def test_a_way_back_that_is_planned_anew_goes_no_further_than_the_one_before(halts: bool) -> None:
    """What has failed under `on_failure="halt"`, or the compensations' deadline, holds for all of it."""
    shape = {"first": (), "slow": ("first",), "fails": ()}
    world, pipeline = scene(shape, {"slow": Script(undo_takes=20), "fails": Script(undo_fails=9)})
    once = Retry(attempts=1)
    settings = Compensation(retry=once, on_failure="halt") if halts else Compensation(retry=once, deadline=15, timeout=100)
    policy = PROMPT.model_copy(update={"compensation": settings})

    async def main() -> SagaReport:
        stage = DeniedByProbe(world)
        coordinator = SagaCoordinator(policy)
        return await while_slow_is_undone(coordinator.run(pipeline.with_stage("deaf", stage), saga_id="s"), world, stage, after=5)

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert report.stages["deaf"].late_output is not None
    assert report.stages["deaf"].compensation is None
    assert "deaf" in world.standing
    assert "first" in world.standing


@pytest.mark.parametrize("within", [False, True])
def test_what_comes_late_of_a_stage_that_is_just_asked_for_waits_for_the_answer(within: bool) -> None:
    """Beside it another one is done; whoever is then undone next looks what has come late."""
    world, pipeline = scene({"first": (), "next": ("first",)}, {"next": Script(undo_takes=8)})

    class AnswersSlowly(DeniedByProbe):
        async def probe(self, ctx: CompensationContext) -> None:
            await elapse(5)
            self.released.set()
            await elapse(15)

    class AsksSlowly(Tolerant):
        compensate_in_doubt = True

        async def execute(self, ctx: SagaContext) -> StageOutput:
            await super().execute(ctx)
            await elapse(100)
            return StageOutput.ok()

        async def probe(self, ctx: CompensationContext) -> None:
            stage.released.set()
            await elapse(15)

    stage = DeniedByProbe(world) if within else AnswersSlowly(world)

    async def main() -> SagaReport:
        last = AsksSlowly(Pipeline(name="inner").with_stage("deaf", stage)) if within else stage
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"timeout": 20 if within else 10}))
        return await coordinator.run(pipeline.with_stage("last", last), saga_id="s")

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.refusals == []
    assert sorted(world.undone()) == ["deaf", "first", "next"]
    assert world.standing == {}


def test_what_comes_late_after_it_was_compensated_in_doubt_is_in_doubt_again() -> None:
    world, stage, first, late, resumed = play(Doubtful)

    assert first.status is SagaStatus.COMPENSATED
    assert late.status is SagaStatus.STUCK
    assert late.stages["deaf"].state is S.IN_DOUBT
    assert resumed.status is SagaStatus.COMPENSATED
    assert stage.undone_with == ["in doubt", "in doubt"]
    assert world.standing == {}


def test_what_comes_late_after_it_was_compensated_in_doubt_is_undone_under_another_key() -> None:
    """Under the same one the bank would say that it had refunded it, which was when there was nothing to refund."""

    class Recognised(Doubtful):
        keys: ClassVar[list[str]] = []

        async def compensate(self, ctx: CompensationContext) -> None:
            if ctx.idempotency_key not in self.keys:
                await super().compensate(ctx)
            self.keys.append(ctx.idempotency_key)

    world, _, first, _, resumed = play(Recognised)

    assert first.status is resumed.status is SagaStatus.COMPENSATED
    assert Recognised.keys == ["s/deaf/undo", "s/deaf/undo~2"]
    assert world.standing == {}


class FoundUntilUndone(Doubtful):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(found=True) if "deaf" in self.world.standing else None


@pytest.mark.parametrize("kind", [Doubtful, FoundUntilUndone])
def test_what_comes_late_before_its_turn_to_be_undone_is_undone_once(kind: type[Deaf]) -> None:
    """Promise 2: it was taken for something that had come after its undoing, and was undone again under another key."""
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20)})

    async def main() -> tuple[Deaf, SagaReport]:
        stage = kind(world)
        one_by_one = Compensation(max_concurrency=1)
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2, compensation=one_by_one))
        whole = Pipeline(name="trip").with_stage("deaf", stage).with_stage("slow", pipeline.stages["slow"].runner)
        return stage, await while_slow_is_undone(coordinator.run(whole, saga_id="s"), world, stage)

    stage, report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert stage.undone_with == [StageOutput.ok(seat="14A")]
    assert world.log == ["+slow", "+deaf", "-slow", "-deaf"]


@pytest.mark.parametrize("forward", [None, True])
def test_what_its_probe_finds_undone_when_it_has_come_late_is_not_undone_again(forward: bool | None) -> None:
    """Promise 2: it was found and undone before its code came to say that it had completed. To run again it takes another key."""
    world = World({"deaf": ()})

    class SaysSoLater(FoundUntilUndone):
        compensate_in_doubt = False
        keys: ClassVar[list[str]] = []

        async def execute(self, ctx: SagaContext) -> Any:
            self.keys.append(ctx.idempotency_key)
            self.world.land("deaf")
            await self._wait()
            return self.outcome()

    async def main() -> tuple[Deaf, list[SagaReport]]:
        stage = SaysSoLater(world)
        trip = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        return stage, [first, await coordinator.report("s"), await coordinator.resume("s", trip, forward=forward)]

    stage, (first, late, resumed) = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert late.stages["deaf"].state is S.IN_DOUBT
    assert len(stage.undone_with) == 1
    assert resumed.status is (SagaStatus.COMPLETED if forward else SagaStatus.COMPENSATED)
    assert resumed.stages["deaf"].state is (S.KEPT if forward else S.UNDONE)
    assert SaysSoLater.keys == (["s/deaf", "s/deaf~2"] if forward else ["s/deaf"])
    assert world.standing == ({"deaf": 1} if forward else {})


def test_what_comes_late_against_the_word_of_its_probe_stands() -> None:
    world, _, first, late, resumed = play(DeniedByProbe)

    assert first.status is SagaStatus.COMPENSATED
    assert first.stages["deaf"].probed is False
    assert late.status is SagaStatus.STUCK
    assert "deaf" in late.blocked
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_what_comes_late_although_a_fallback_stands_in_is_undone_on_resume() -> None:
    policy = ContinueWithFallback(timeout=10, cancel_grace=2, fallbacks={"deaf": {"seat": None}})
    world, stage, first, late, resumed = play(policy=policy)

    assert first.status is SagaStatus.STUCK
    assert late.status is SagaStatus.STUCK
    assert resumed.status is SagaStatus.DEGRADED
    assert resumed.kept["deaf"].data == {"seat": None}
    assert stage.undone_with == [{"seat": "14A"}]
    assert set(world.standing) == {"a"}


def test_what_comes_late_behind_a_fallback_is_undone_also_when_a_person_keeps_what_followed_on_that() -> None:
    """Promise 5: that is kept with all that it depends on, but it never depended on this; no command could undo it."""
    world, pipeline = scene({"ship": ()}, {"ship": Script("hang", lands=True)})

    async def main() -> list[SagaReport]:
        stage = Deaf(world)
        ship = pipeline.stages["ship"].runner
        whole = Pipeline(name="trip").with_stage("deaf", stage).with_stage("ship", ship, dependencies=("deaf",))
        coordinator = SagaCoordinator(INSTEAD)
        await coordinator.run(whole, saga_id="s")
        await coordinator.settle("s", "ship", "kept", "it is on its way")
        stage.released.set()
        await settled_down()
        return [await coordinator.report("s"), await coordinator.resume("s", whole)]

    late, resumed = run(main())

    assert late.status is SagaStatus.STUCK
    assert [*late.blocked] == ["deaf"]
    assert resumed.clean
    assert [*resumed.kept] == ["deaf", "ship"]
    assert world.undone() == ["deaf"]
    assert world.standing == {"ship": 1}


@pytest.mark.parametrize("outcome", [lambda: StageOutput.fail("too late"), lambda: 42, lambda: StageOutput.skip("never mind")])
def test_what_fails_late_changes_nothing(outcome: Callable[[], Any]) -> None:
    _, _, first, late, _ = play(outcome=outcome)

    assert first == late


def test_a_compensation_that_comes_to_its_end_late_has_undone_its_stage() -> None:
    world, pipeline = scene({"a": ()})
    world.dependencies["deaf"] = ("a",)

    async def main() -> tuple[SagaReport, SagaReport, SagaReport]:
        stage = Deaf(world, deaf_undo=True)

        async def fail(_: Any) -> None:
            raise ValueError

        whole = pipeline.with_stage("deaf", stage, dependencies=("a",)).with_stage("fail", fail, "work", dependencies=("deaf",))
        coordinator = SagaCoordinator(FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1))))
        first = await coordinator.run(whole, saga_id="s")
        stage.released.set()
        for _ in range(20):
            await asyncio.sleep(0)
        return first, await coordinator.report("s"), await coordinator.resume("s", whole)

    first, late, resumed = run(main())

    assert first.stages["deaf"].state is S.STUCK
    assert late.stages["deaf"].state is S.UNDONE
    assert late.status is SagaStatus.STUCK
    assert set(late.blocked) == {"a"}
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.undone() == ["deaf", "a"]


LOSS = "saga s: what came late (StageCompleted) could not be recorded; look at its stages in the outside world"


def lost(caplog: pytest.LogCaptureFixture) -> list[tuple[str, BaseException | None]]:
    """What the log says is an error, and what has led to it in the first place."""
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    led_to = [record.exc_info[1] if record.exc_info else None for record in errors]
    return [(record.getMessage(), error and (error.__cause__ or error)) for record, error in zip(errors, led_to, strict=True)]


@pytest.mark.parametrize("error", [LedgerError("disk full"), OSError("a driver's own")])
def test_what_comes_too_late_to_be_recorded_is_told_to_the_log(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class Gone(MemoryLedger):
        async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
            if any(isinstance(event, StageCompleted) and event.late for event in events):
                raise error
            await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)

    world, pipeline = scene({"a": ()})

    async def main() -> None:
        stage = Deaf(world)
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2), ledger=Gone())
        await coordinator.run(pipeline.with_stage("deaf", stage, dependencies=("a",)), saga_id="s")
        stage.released.set()
        for _ in range(20):
            await asyncio.sleep(0)

    with caplog.at_level(logging.ERROR, "saga"):
        run(main())

    assert lost(caplog) == [(LOSS, error)]


@pytest.mark.parametrize("above", [(), ("grandchild", "child")])
def test_what_comes_late_while_another_coordinator_goes_on_is_recorded_when_that_one_lets_go(
    above: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 5: it was told to the log alone, and the saga stayed compensated while it stood."""
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20)})
    halting = PROMPT.model_copy(update={"on_failure": "halt"})

    async def main() -> list[SagaReport]:
        stage = Deaf(world)
        ledger = MemoryLedger()
        last = nested(nested_in(stage, *above), PROMPT) if above else stage
        trip = pipeline.with_stage("last", last, dependencies=("slow",))
        path = "/".join(["last", *reversed(above), "deaf"]) if above else "last"
        other = SagaCoordinator(ledger=ledger)
        await SagaCoordinator(halting, ledger=ledger).run(trip, saga_id="s")
        await other.settle("s", path, "undone", "not in their books")
        undone = await while_slow_is_undone(other.compensate("s", trip), world, stage)
        await elapse(2)
        return [undone, await other.report("s")]

    with caplog.at_level(logging.WARNING, "saga"):
        undone, late = run(main())

    assert undone.status is SagaStatus.COMPENSATED
    assert world.standing == {"deaf": 1}
    assert late.status is SagaStatus.STUCK
    assert "last" in late.in_doubt
    (told,) = caplog.messages
    assert "waits to be recorded: saga s is held by" in told


class Unreadable(MemoryLedger):
    """Can't be read any more when it is told so."""

    is_gone = False

    async def read(self, saga_id: str) -> Any:
        if self.is_gone:
            raise OSError("the disk is gone")
        return await super().read(saga_id)


def test_what_came_late_and_is_tried_again_when_the_ledger_is_gone_is_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20)})
    ledger = Unreadable()

    async def main() -> None:
        stage = Deaf(world)
        trip = pipeline.with_stage("deaf", stage, dependencies=("slow",))
        await SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}), ledger=ledger).run(trip, saga_id="s")
        other = SagaCoordinator(ledger=ledger)
        await other.settle("s", "deaf", "undone", "not in their books")
        await while_slow_is_undone(other.compensate("s", trip), world, stage)
        ledger.is_gone = True
        await elapse(2)

    with caplog.at_level(logging.WARNING, "saga"):
        run(main())

    waits, lost = caplog.messages
    assert "waits to be recorded: saga s is held by" in waits
    assert "(StageCompleted) could not be recorded; look at its stages in the outside world" in lost


class SlowlyUndone(Deaf):
    compensate_in_doubt = True

    async def execute(self, ctx: SagaContext) -> None:
        await self._wait()
        self.world.land("slowly")

    async def compensate(self, ctx: CompensationContext) -> None:
        self.world.begin_undo("slowly")
        await elapse(20)
        self.world.undo("slowly")
        self.world.end_undo("slowly")


def test_what_comes_late_of_one_stage_is_not_lost_while_another_that_came_late_is_under_way_elsewhere() -> None:
    """Promise 5: when it was tried again, what waited for no stage was dropped without a word, and the saga stayed compensated."""
    world = World({})

    async def main() -> SagaReport:
        deaf, slowly = Deaf(world), SlowlyUndone(world)
        trip = Pipeline(name="trip").with_stage("deaf", deaf).with_stage("slowly", slowly)
        ledger = MemoryLedger()
        other = SagaCoordinator(ledger=ledger)
        await SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}), ledger=ledger).run(trip, saga_id="s")
        await other.settle("s", "deaf", "undone", "not in their books")
        undoing = asyncio.create_task(other.compensate("s", trip))
        while "slowly" not in world.undoing:
            await elapse(1)
        deaf.released.set()
        slowly.released.set()
        assert (await undoing).status is SagaStatus.COMPENSATED
        await elapse(2)
        return await other.report("s")

    report = run(main())

    assert world.standing == {"deaf": 1}
    assert report.status is SagaStatus.STUCK
    assert "deaf" in report.in_doubt


class ReadsSlowly(MemoryLedger):
    """The next one who reads waits at the gate, if there is one."""

    gate: asyncio.Event | None = None
    has_arrived = False

    async def read(self, saga_id: str) -> Any:
        if self.gate is not None and not self.has_arrived:
            self.has_arrived = True
            await self.gate.wait()
        return await super().read(saga_id)


def test_what_came_late_and_is_just_tried_again_when_somebody_here_goes_on_is_recorded_behind_that() -> None:
    """It was told to the log as lost."""
    world, pipeline = scene({"slow": ()}, {"slow": Script(before=5, undo_takes=20)})

    async def main() -> SagaReport:
        stage = Deaf(world)
        ledger = ReadsSlowly()
        trip = pipeline.with_stage("deaf", stage, dependencies=("slow",))
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}), ledger=ledger)
        other = SagaCoordinator(ledger=ledger)
        await coordinator.run(trip, saga_id="s")
        await other.settle("s", "deaf", "undone", "not in their books")
        await while_slow_is_undone(other.compensate("s", trip), world, stage)
        gate = ledger.gate = asyncio.Event()
        while not ledger.has_arrived:
            await elapse(0.1)
        going_on = asyncio.create_task(coordinator.resume("s", trip, forward=True))
        await elapse(1)
        gate.set()
        await going_on
        await elapse(2)
        return await coordinator.report("s")

    report = run(main())

    assert world.standing["deaf"] == 2
    assert report.status is SagaStatus.STUCK
    assert "deaf" in report.in_doubt
    assert report.failures[-1].kind is FailureKind.LATE


def test_a_blocked_thread_does_not_hold_up_the_report_and_its_completion_is_recorded() -> None:
    """In real time: a thread that nobody can cancel."""
    go = threading.Event()

    class Blocking(CompensableStage):
        async def execute(self, ctx: SagaContext) -> dict[str, Any]:
            task = asyncio.ensure_future(asyncio.to_thread(go.wait, 60))
            while not task.done():
                try:
                    await asyncio.shield(task)
                except asyncio.CancelledError:
                    continue
            return {"written": True}

        async def compensate(self, ctx: CompensationContext) -> None: ...

    pipeline = Pipeline().with_stage("blocking", Blocking())

    async def main() -> tuple[SagaReport, SagaReport]:
        coordinator = SagaCoordinator(FailFast(timeout=0.05, cancel_grace=0.05))
        first = await asyncio.wait_for(coordinator.run(pipeline, saga_id="s"), 5)
        go.set()
        while not (late := await coordinator.report("s")).stages["blocking"].late_output:
            await asyncio.sleep(0)
        return first, late

    first, late = asyncio.run(main())

    assert first.status is SagaStatus.STUCK
    assert set(first.in_doubt) == {"blocking"}
    assert late.stages["blocking"].output == StageOutput.ok(written=True)


def test_a_compensation_that_ends_while_its_giving_up_is_recorded_has_nothing_undone_twice() -> None:
    """Promise 2: the way back went on without waiting for that, and what was left was then undone by both."""
    world, pipeline = scene({"a": (), "b": ()}, {"a": Script(undo_takes=5), "b": Script("raise", before=5)})

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Deaf(world, deaf_undo=True)
        one_by_one = Compensation(timeout=10, max_concurrency=1, retry=Retry(attempts=1))
        coordinator = SagaCoordinator(FailFast(cancel_grace=2, compensation=one_by_one), ledger=ReleasesAt(CompensationFailed, stage))
        first = await coordinator.run(pipeline.with_stage("deaf", stage), saga_id="s")
        return first, await coordinator.report("s")

    first, late = run(main())

    assert first.status is late.status is SagaStatus.COMPENSATED
    assert first.stages["a"].compensation is not None
    assert first.stages["a"].compensation.attempts == 1
    assert world.refusals == []
    assert world.standing == {}


def test_nothing_is_undone_while_the_fallback_of_a_stage_that_was_given_up_is_running() -> None:
    """Promise 3: also when the stage has come to its end meanwhile, as nobody waited for what followed from its giving up."""
    world, pipeline = scene({"a": (), "b": ()}, {"b": Script("raise", before=15)})
    running: list[bool] = []

    class StoodInFor(Deaf):
        timeout = 10

        async def fallback(self, ctx: SagaContext, failure: Failure) -> None:
            self.released.set()
            world.enter("fallback")
            await elapse(9)
            world.leave("fallback")
            running.append(bool(world.undoing))

    async def main() -> SagaReport:
        stage = StoodInFor(world)
        coordinator = SagaCoordinator(ContinueWithFallback(cancel_grace=2))
        return await coordinator.run(pipeline.with_stage("deaf", stage), saga_id="s")

    report = run(main())

    assert running == [False]
    assert world.refusals == []
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_compensation_that_fails_late_leaves_its_stage_stuck() -> None:
    world = World({"deaf": ()})

    class FailsLate(Deaf):
        async def compensate(self, ctx: CompensationContext) -> None:
            await self._wait()
            raise OSError("refused")

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = FailsLate(world, deaf_undo=True)

        async def fail(_: Any) -> None:
            raise ValueError

        pipeline = Pipeline().with_stage("deaf", stage).with_stage("fail", fail, "work", dependencies=("deaf",))
        coordinator = SagaCoordinator(FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1))))
        first = await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        for _ in range(20):
            await asyncio.sleep(0)
        return first, await coordinator.report("s")

    first, late = run(main())

    assert first == late
    assert set(late.stuck) == {"deaf"}


def test_what_comes_while_the_saga_is_coming_to_rest_is_recorded_behind_its_end() -> None:
    world = World({"deaf": ()})

    async def main() -> SagaReport:
        stage = Deaf(world)
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2), ledger=ReleasesAt(SagaEnded, stage))
        await coordinator.run(Pipeline().with_stage("deaf", stage), saga_id="s")
        await elapse(5)
        return await coordinator.report("s")

    report = run(main())

    assert report.stages["deaf"].late_output == StageOutput.ok(seat="14A")
    assert report.status is SagaStatus.STUCK


class FoundByProbe(Deaf):
    timeout = 10

    async def execute(self, ctx: SagaContext) -> Any:
        self.world.land("deaf")
        await self._wait()
        return self.outcome()

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(seat="14A") if "deaf" in self.world.standing else None


@pytest.mark.parametrize("end", ["ok", "raise"])
def test_what_its_probe_has_found_and_comes_late_is_no_news(end: str, caplog: pytest.LogCaptureFixture) -> None:
    """While the saga that was told by the probe goes on forward."""
    world, pipeline = scene({"a": (), "slow": ("a",)}, {"slow": Script(end, before=30)})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = FoundByProbe(world)
        coordinator = SagaCoordinator(ContinueWithFallback(cancel_grace=2, fallbacks={"deaf": {}}))
        running = asyncio.create_task(coordinator.run(pipeline.with_stage("deaf", stage, dependencies=("a",)), saga_id="s"))
        await elapse(20)
        assert (await coordinator.report("s")).stages["deaf"].probed
        stage.released.set()
        return await running

    report = run(main())

    assert report.status is (SagaStatus.COMPLETED if end == "ok" else SagaStatus.COMPENSATED)
    assert world.standing.keys() == ({"a", "slow", "deaf"} if end == "ok" else set())
    assert world.refusals == []
    assert "could not be recorded" not in caplog.text


@pytest.mark.parametrize("late", ["at rest", "alive"])
def test_a_stage_that_ran_again_has_answered_for_the_attempt_that_comes_late(late: str, caplog: pytest.LogCaptureFixture) -> None:
    class RunsAgain(Deaf):
        idempotent = True

        async def execute(self, ctx: SagaContext) -> Any:
            if ctx.attempt == 1:
                await self._wait()
            elif late == "alive":
                self.released.set()
                await elapse(1)
            if "deaf" not in self.world.standing:
                self.world.land("deaf")
            return {"attempt": ctx.attempt}

    world = World({"deaf": ()})

    async def main() -> SagaReport:
        stage = RunsAgain(world)
        pipeline = Pipeline().with_stage("deaf", stage)
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2, on_failure="halt"))
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline)
        stage.released.set()
        await elapse(1)
        return await coordinator.report("s")

    report = run(main())

    assert report.status is SagaStatus.COMPLETED
    assert report.kept["deaf"].data == {"attempt": 2}
    assert world.standing == {"deaf": 1}
    assert "could not be recorded" not in caplog.text


def test_a_compensation_that_comes_late_when_another_attempt_has_undone_its_stage_is_no_news() -> None:
    world, pipeline = scene({"a": ()})
    world.dependencies["deaf"] = ("a",)

    class UndoneTwice(Deaf):
        async def compensate(self, ctx: CompensationContext) -> None:
            if ctx.attempt == 1:
                await self._wait()
                return
            self.world.undo("deaf")
            self.released.set()
            await elapse(1)

    async def fail(_: Any) -> None:
        raise ValueError

    async def main() -> SagaReport:
        stage = UndoneTwice(world, deaf_undo=True)
        whole = pipeline.with_stage("deaf", stage, dependencies=("a",)).with_stage("fail", fail, "work", dependencies=("deaf",))
        coordinator = SagaCoordinator(FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1))))
        assert "deaf" in (await coordinator.run(whole, saga_id="s")).stuck
        await coordinator.settle("s", "deaf", "retry", "they answer again")
        return await coordinator.resume("s", whole)

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["deaf", "a"]


def test_what_comes_late_while_a_person_settles_the_saga_is_recorded_behind_that() -> None:
    world = World({"deaf": (), "other": ()})

    async def main() -> SagaReport:
        stage = Deaf(world)
        pipeline = Pipeline().with_stage("deaf", stage).with_stage("other", scene({"x": ()}, {"x": Script("hang")})[1].stages["x"].runner)
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2), ledger=ReleasesAt(StageSettled, stage))
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.settle("s", "other", "undone", "looked")
        await elapse(5)
        return await coordinator.report("s")

    report = run(main())

    assert report.stages["deaf"].late_output == StageOutput.ok(seat="14A")
    assert report.stages["deaf"].state is S.BLOCKED


def test_whoever_goes_on_while_something_is_being_recorded_is_told_to_try_again() -> None:
    world = World({"deaf": ()})

    async def main() -> tuple[list[str], SagaReport]:
        stage = Deaf(world)
        pipeline = Pipeline().with_stage("deaf", stage)
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2), ledger=SlowLedger())
        await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        await elapse(0.1)
        refused = []
        for again in (coordinator.resume("s", pipeline), coordinator.settle("s", "deaf", "kept", "looked")):
            with pytest.raises(MisuseError) as error:
                await again
            refused.append(str(error.value))
        await elapse(5)
        return refused, await coordinator.resume("s", pipeline)

    refused, report = run(main())

    assert all("got saga s, of which something is just being recorded here. Try again in a moment." in text for text in refused), refused
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("turns", range(6))
def test_what_comes_late_in_the_moment_in_which_somebody_goes_on_is_not_lost(turns: int, caplog: pytest.LogCaptureFixture) -> None:
    world = World({"deaf": ()})

    async def main() -> SagaReport:
        stage = Deaf(world)
        pipeline = Pipeline().with_stage("deaf", stage)
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2))
        await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        await coordinator.resume("s", pipeline)
        await elapse(1)
        return await coordinator.report("s")

    report = run(main())

    assert report.stages["deaf"].late_output == StageOutput.ok(seat="14A")
    assert "could not be recorded" not in caplog.text


def test_a_saga_stays_stuck_when_what_comes_late_has_a_use_for_what_could_not_be_undone() -> None:
    """Undoing it has been tried, and what is left of it only a person can see."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=9)})
    released = asyncio.Event()

    async def tells(_: StageContext) -> StageOutput:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue
        return StageOutput.ok(told=True)

    async def main() -> tuple[SagaReport, SagaReport]:
        whole = pipeline.with_stage("tells", tells, "work", dependencies=("a",))
        policy = ContinueWithFallback(
            timeout=10, cancel_grace=2, without_fallback="skip_branch", compensation=Compensation(retry=Retry(attempts=1))
        )
        coordinator = SagaCoordinator(policy)
        first = await coordinator.run(whole, saga_id="s")
        released.set()
        await elapse(1)
        return first, await coordinator.report("s")

    first, late = run(main())

    assert first.status is SagaStatus.STUCK
    assert set(first.stuck) == {"a"}
    assert late.kept["tells"].data == {"told": True}
    assert set(late.stuck) == {"a"}
    assert late.status is SagaStatus.STUCK
    assert set(world.standing) == {"a"}


# -- within a saga that a stage has run --------------------------------------------------------------------------------

PROMPT = FailFast(timeout=10, cancel_grace=2)


async def settled_down() -> None:
    """What came late has been recorded, in the ledgers of the sagas above, too."""
    for _ in range(50):
        await asyncio.sleep(0)


async def resumed_while_it_comes_late(coordinator: SagaCoordinator, stage: Deaf, pipeline: Pipeline) -> SagaReport:
    """What comes of a saga that goes on forward, and of which something comes late after five seconds."""
    running = asyncio.create_task(coordinator.resume("s", pipeline, forward=True))
    await elapse(5)
    stage.released.set()
    await settled_down()
    assert (await coordinator.report("s")).status is SagaStatus.RUNNING
    return await running


def nested_in(stage: Deaf, *above: str, policy: Policy = PROMPT) -> Pipeline:
    """The stage in a pipeline in a pipeline ..., named from the inside."""
    pipeline = Pipeline(name="inner").with_stage("deaf", stage)
    for name in above:
        pipeline = Pipeline(name=f"of_{name}").with_stage(name, nested(pipeline, policy))
    return pipeline


@pytest.mark.parametrize("way", ["resume", "compensate"])
@pytest.mark.parametrize("above", [("child",), ("grandchild", "child")])
def test_what_comes_late_within_is_undone_through_the_sagas_above_that_were_done_with_it(way: str, above: tuple[str, ...]) -> None:
    """Promise 5: they are compensated no more, and who goes on with the outermost needs to know of no other."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Doubtful(world)
        trip = nested_in(stage, *above)
        coordinator = SagaCoordinator()
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        assert world.standing == {"deaf": 1}
        return [first, late, await getattr(coordinator, way)("s", trip)]

    first, late, undone = run(main())

    assert first.status is undone.status is SagaStatus.COMPENSATED
    assert late.status is SagaStatus.STUCK
    assert late.stages["child"].state is S.IN_DOUBT
    assert [*late.in_doubt] == ["child", *(["child/grandchild"] if len(above) > 1 else []), "/".join([*reversed(above), "deaf"])]
    assert "something of its saga s/child is stuck, blocked or in doubt" in str(late)
    assert "its probe failed" not in str(late)
    assert undone.clean
    assert world.standing == {}


def test_what_comes_late_within_while_the_saga_above_goes_backward_is_undone_before_it_comes_to_rest() -> None:
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20)})

    async def main() -> SagaReport:
        stage = Doubtful(world)
        coordinator = SagaCoordinator()
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        return await while_slow_is_undone(coordinator.run(trip, saga_id="s"), world, stage)

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert "+deaf" in world.log
    assert world.standing == {}


def test_what_comes_late_within_a_saga_that_had_halted_is_undone_with_its_parent() -> None:
    """Promise 5: there it is kept, which is in nobody's question; but the saga above was compensated, and stayed so."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        halting = PROMPT.model_copy(update={"on_interrupt": "halt"})
        trip = Pipeline(name="trip").with_stage("child", nested(nested_in(stage), halting))
        coordinator = SagaCoordinator(PROMPT)
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        assert world.standing == {"deaf": 1}
        return [first, late, await coordinator.resume("s", trip)]

    first, late, undone = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert first.stages["child"].children[0].status is SagaStatus.HALTED
    assert late.status is SagaStatus.STUCK
    assert undone.status is SagaStatus.COMPENSATED
    assert undone.clean
    assert world.standing == {}


@pytest.mark.parametrize("alive", [False, True])
def test_what_comes_late_within_a_stage_that_is_stuck_because_of_it_is_tried_again_on_resume(alive: bool) -> None:
    """Nobody knew whether it had landed; now that is known, and it can be undone. A word is for a saga at rest: it waits for that."""
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20)})

    async def main() -> list[SagaReport]:
        stage = Deaf(world)
        coordinator = SagaCoordinator()
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        while alive and "slow" not in world.undoing:
            await elapse(1)
        if alive:
            stage.released.set()
        first = await running
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await coordinator.resume("s", trip)]

    first, late, resumed = run(main())

    assert [*first.stuck] == ["child"]
    assert late.status is SagaStatus.STUCK
    assert late.stages["child"].settled is not None
    assert late.stages["child"].settled.by == "saga s/child"
    assert str(late).endswith("there is nothing to settle. Mend the cause, then: saga resume s")
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


class StopsAtWord(MemoryLedger):
    """The process dies when it tells a stage of what came late within; to whoever comes after it the ledger answers."""

    stage: str | None = None

    def has_stopped(self) -> bool:
        return self.stage is None

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        if any(isinstance(event, StageProbed | StageSettled) and event.stage == self.stage for event in events):
            self.stage = None
            raise OSError("killed")
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


@pytest.mark.parametrize("way", ["resume", "compensate"])
@pytest.mark.parametrize(("above", "killed_at"), [(("child",), "child"), (("inner", "child"), "inner"), (("inner", "child"), "child")])
@pytest.mark.parametrize("kind", [Doubtful, Deaf])
def test_what_came_late_within_is_heard_of_by_who_goes_on_when_the_process_died_before_those_above_had(
    kind: type[Deaf], above: tuple[str, ...], killed_at: str, way: str
) -> None:
    """Promise 5: they stayed compensated, or stuck, for good, while what came late stood."""
    world = World({"deaf": ()})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = kind(world)
        trip = nested_in(stage, *above)
        await SagaCoordinator(ledger=ledger).run(trip, saga_id="s")
        ledger.stage = killed_at
        stage.released.set()
        await settled_down()
        assert ledger.has_stopped()
        assert world.standing == {"deaf": 1}
        coordinator = SagaCoordinator(ledger=ledger)
        left = await coordinator.report("s")
        undone: SagaReport = await getattr(coordinator, way)("s", trip)
        return left, undone

    left, report = run(main())

    assert left.status is SagaStatus.STUCK
    assert [*above][-1] in {*left.stuck, *left.in_doubt}
    assert str(left).endswith("saga resume s")
    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.standing == {}


def test_what_came_late_within_is_heard_of_on_its_way_by_a_saga_that_is_recovered() -> None:
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20, undo_bears_repetition=True)})
    ledger = StopsAtWord()

    async def main() -> SagaReport:
        stage = Doubtful(world)
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        running = asyncio.create_task(SagaCoordinator(ledger=ledger).run(trip, saga_id="s"))
        while "slow" not in world.undoing:
            await elapse(1)
        ledger.stage = "child"
        stage.released.set()
        with pytest.raises(LedgerError, match="killed"):
            await running
        assert world.standing == {"deaf": 1}
        return (await SagaCoordinator(ledger=ledger).recover(trip)).reports["s"]

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.standing == {}


def test_a_saga_is_not_called_compensated_by_a_word_on_a_stage_beside_one_within_which_something_came_late() -> None:
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=9)})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Doubtful(world)
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        await SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))), ledger=ledger).run(trip, saga_id="s")
        ledger.stage = "child"
        stage.released.set()
        await settled_down()
        assert ledger.has_stopped()
        coordinator = SagaCoordinator(ledger=ledger)
        world.undo("a")
        said = await coordinator.settle("s", "a", "undone", "by hand")
        return said, await coordinator.resume("s", trip)

    said, resumed = run(main())

    assert said.status is SagaStatus.STUCK
    assert [*said.in_doubt] == ["child", "child/deaf"]
    assert resumed.status is SagaStatus.COMPENSATED
    assert resumed.clean
    assert world.standing == {}


class AnswersInItsTurn(SlowLedger):
    """Whoever asks for the sagas lets others go first, as with any ledger that is not in memory."""

    async def list(self, **how: Any) -> Any:
        await elapse(0.1)
        return await super().list(**how)


@pytest.mark.parametrize("after", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("by_another", [False, True])
def test_a_word_said_while_its_saga_is_just_told_of_what_came_late_within_is_taken_or_can_be_said_again(
    by_another: bool, after: float
) -> None:
    """It was recorded, and refused all the same: "try again in a moment", which was refused, too."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=9)})
    ledger = AnswersInItsTurn()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Doubtful(world)
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))), ledger=ledger)
        await coordinator.run(trip, saga_id="s")
        world.undo("a")
        asyncio.get_running_loop().call_later(after, stage.released.set)
        operator = SagaCoordinator(ledger=ledger) if by_another else coordinator
        try:
            await operator.settle("s", "a", "undone", "by hand")
        except (LedgerConflict, MisuseError):
            await elapse(1)
            await operator.settle("s", "a", "undone", "by hand")
        await elapse(1)
        return await coordinator.report("s"), await coordinator.resume("s", trip)

    report, resumed = run(main())

    assert [*report.undone] == ["a"]
    assert [*report.in_doubt] == ["child", "child/deaf"]
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


INSTEAD = ContinueWithFallback(timeout=10, cancel_grace=2, fallbacks={"deaf": {"seat": None}})


@pytest.mark.parametrize("way", ["resume", "compensate"])
@pytest.mark.parametrize("retried", [False, True])
def test_what_comes_late_within_a_stage_that_is_kept_is_undone_when_that_runs_again(way: str, retried: bool) -> None:
    """Its child went on with a fallback: what came late serves nothing, and what else the child gave is in use."""
    world, inner = scene({"other": ()}, {"other": Script("raise", then=("ok",)) if retried else Script()})
    world.dependencies["deaf"] = ()

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        child = nested(inner.with_stage("deaf", stage, dependencies=("other",)), INSTEAD)
        trip = Pipeline(name="trip").with_stage("child", child)
        coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0.0)))
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await getattr(coordinator, way)("s", trip)]

    first, late, gone_on = run(main())

    assert first.status is SagaStatus.COMPLETED
    assert first.clean
    assert late.status is SagaStatus.STUCK
    assert late.stages["child"].state is S.IN_DOUBT
    assert gone_on.status is (SagaStatus.COMPLETED if way == "resume" else SagaStatus.COMPENSATED)
    assert gone_on.clean
    assert world.standing == ({"other": 1} if way == "resume" else {})


def test_what_comes_late_within_while_the_saga_above_goes_forward_turns_nothing_back() -> None:
    """Its stage has completed, be it at the second attempt: what came after that is not to be undone."""
    world, inner = scene({"other": ()}, {"other": Script("raise", then=("ok",))})
    world.dependencies["deaf"] = ()

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)

        async def wait(_: StageContext) -> None:
            stage.released.set()
            await settled_down()

        child = nested(inner.with_stage("deaf", stage, dependencies=("other",)), INSTEAD)
        trip = Pipeline(name="trip").with_stage("child", child).with_stage("wait", wait, "work", dependencies=("child",))
        coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0.0)))
        return [await coordinator.run(trip, saga_id="s"), await coordinator.resume("s", trip)]

    first, resumed = run(main())

    assert first.status is SagaStatus.STUCK
    assert first.cause is None
    assert [*first.kept] == ["wait"]
    assert resumed.status is SagaStatus.COMPLETED
    assert resumed.clean
    assert world.standing == {"other": 1}


def test_what_comes_late_within_a_stage_beyond_a_pivot_of_its_own_is_undone_on_resume() -> None:
    """Promise 5: the saga above went on without that branch, and no command could undo what stood there."""
    world, others = scene({"pay": (), "other": ()}, kinds={"pay": "pivot"})

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        inner = Pipeline(name="inner").with_stage("pay", others.stages["pay"].runner).with_stage("deaf", stage)
        trip = Pipeline(name="trip").with_stage("child", nested(inner, PROMPT)).with_stage("other", others.stages["other"].runner)
        coordinator = SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch"))
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await coordinator.resume("s", trip)]

    first, late, resumed = run(main())

    assert first.status is resumed.status is SagaStatus.DEGRADED
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child"]
    assert [*late.blocked] == ["child/deaf"]
    assert resumed.clean
    assert world.standing == {"pay": 1, "other": 1}


def test_what_comes_late_within_a_stage_that_a_person_keeps_is_kept_with_it() -> None:
    world = World({"deaf": ()})

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Deaf(world)
        coordinator = SagaCoordinator()
        await coordinator.run(nested_in(stage, "child"), saga_id="s")
        kept = await coordinator.settle("s", "child", "kept", "they sent a ticket")
        stage.released.set()
        await settled_down()
        return kept, await coordinator.report("s")

    kept, late = run(main())

    assert kept.status is late.status is SagaStatus.HALTED
    assert late.stages["child"].state is S.KEPT
    assert late.stages["child"].children[0].stages["deaf"].late_output is not None
    assert late.clean


class FirstIsDeaf(Deaf):
    """It is deaf in the first of the sagas that run it; what it does in the second one can't be undone."""

    async def execute(self, ctx: SagaContext) -> Any:
        if ctx.saga_id.endswith("/child"):
            await self._wait()
        self.world.land(ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        if ctx.saga_id.endswith("/child#2"):
            raise OSError
        self.world.undo(ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok() if ctx.forward_key in self.world.standing else None


class DeafByKey(Deaf):
    """What it does bears the key of its execution, so that each execution stands by itself."""

    is_deaf = True

    async def execute(self, ctx: SagaContext) -> Any:
        if self.is_deaf:
            await self._wait()
        self.world.land(ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.world.undo(ctx.forward_key)


TWICE = FailFast(retry=Retry(attempts=2, wait=0.0))


def test_what_comes_late_within_the_child_of_an_earlier_attempt_is_undone_beside_a_later_one_that_is_stuck() -> None:
    """Promise 8: neither depends on the other. Were the later one then kept, no command would undo the earlier."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = FirstIsDeaf(world)
        trip = nested_in(stage, "child")
        coordinator = SagaCoordinator(TWICE)
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        assert world.standing == {"s/child/deaf": 1, "s/child#2/deaf": 1}
        return [first, await coordinator.compensate("s", trip)]

    first, undone = run(main())

    assert first.status is SagaStatus.COMPLETED
    assert [*undone.stuck] == ["child", "child#2/deaf"]
    assert world.standing == {"s/child#2/deaf": 1}


@pytest.mark.parametrize("above", ["s", "s/top"])
def test_what_comes_late_within_the_child_of_an_earlier_attempt_is_undone_by_the_command_that_is_told(above: str) -> None:
    """It said to resume the saga above, which is complete."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = FirstIsDeaf(world)
        trip = nested_in(stage, "child")
        if above != "s":
            trip = Pipeline(name="outer").with_stage("top", nested(trip, TWICE))
        coordinator = SagaCoordinator(TWICE)
        await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        child = await coordinator.resume(f"{above}/child", Pipeline(name="inner").with_stage("deaf", stage))
        return [late, child, await coordinator.report("s")]

    late, child, report = run(main())

    assert late.status is SagaStatus.COMPLETED
    assert str(late).endswith(f"To do: it was not undone to the end; go on with: saga resume {above}/child")
    assert child.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.standing == {f"{above}/child#2/deaf": 1}


def test_what_is_to_be_tried_again_within_the_child_of_an_earlier_attempt_is_gone_on_with_by_the_command_that_is_told() -> None:
    """It said to resume the saga above, which is complete."""
    world = World({})

    class FirstIsDeafWithin(DeafByKey, DeniedByProbe):
        async def execute(self, ctx: SagaContext) -> Any:
            self.is_deaf = ctx.saga_id == "s/child/inner"
            return await super().execute(ctx)

    async def main() -> list[SagaReport]:
        stage = FirstIsDeafWithin(world)
        coordinator = SagaCoordinator(TWICE)
        first = await coordinator.run(nested_in(stage, "inner", "child"), saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        said = await coordinator.settle("s", "child/inner", "retry", "try")
        await coordinator.resume("s/child", nested_in(stage, "inner"))
        return [first, late, said, await coordinator.report("s")]

    first, late, said, last = run(main())

    assert first.clean
    assert str(late).endswith("and say so (undone, kept or retry):\n  saga settle s child/inner retry --note '...'")
    assert str(said).endswith("there is nothing to settle. Mend the cause, then: saga resume s/child")
    assert first.status is last.status is SagaStatus.COMPLETED
    assert last.clean
    assert world.standing == {"s/child#2/inner/deaf": 1}


def test_of_a_stage_within_which_something_is_to_be_undone_nobody_is_asked_to_say_that_it_is() -> None:
    """That is refused: what came late within stands."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        trip = nested_in(stage, "child")
        coordinator = SagaCoordinator()
        reports = [await coordinator.run(trip, saga_id="s")]
        stage.released.set()
        await settled_down()
        reports.append(await coordinator.report("s"))
        with pytest.raises(MisuseError, match="undone, while these are: child/deaf"):
            await coordinator.settle("s", "child", "undone", "looked")
        await coordinator.settle("s", "child", "retry", "looked")
        return [*reports, await coordinator.resume("s", trip)]

    first, late, resumed = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert [*late.in_doubt] == ["child"]
    assert [*late.blocked] == ["child/deaf"]
    assert "saga settle s child retry --note '...'" in str(late)
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("on_failure", ["compensate", "halt"])
@pytest.mark.parametrize("above", [(), ("grandchild",)])
def test_what_came_late_within_two_executions_is_undone_by_the_commands_that_are_told(above: tuple[str, ...], on_failure: str) -> None:
    """They said to try the stage again, which is refused, or to resume the saga, which left it as it was."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = DeafByKey(world)
        child, trip = nested_in(stage, *above), nested_in(stage, *above, "child")
        path = "/".join(["child", *above, "deaf"])
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", path, "undone", "not in their books")
        await coordinator.resume("s", trip)
        await coordinator.resume("s", trip, forward=True, policy=PROMPT.model_copy(update={"on_failure": on_failure}))
        stage.released.set()
        await settled_down()
        world.undo(f"s/{path}")
        late = await coordinator.settle("s", path, "undone", "by hand")
        for saga_id in ("s/child", "s/child~2"):
            if f"saga compensate {quoted(saga_id)}" in str(late):
                await coordinator.compensate(saga_id, child)
        undone = await coordinator.report("s")
        await coordinator.settle("s", "child", "undone", "nothing stands")
        return [late, undone, await coordinator.compensate("s", trip)]

    late, undone, last = run(main())

    assert str(late).endswith("To do: it was not undone to the end; go on with: saga compensate 's/child~2'")
    assert str(undone).endswith("(undone or kept); then go on:\n  saga settle s child undone --note '...'\n  saga resume s")
    assert last.clean
    assert world.standing == {}


def test_a_word_on_a_stage_that_has_run_since_is_no_answer_to_what_comes_late_of_it() -> None:
    """There was nothing to settle, said the report, and to resume, which did nothing."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = DeafByKey(world)
        trip = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}))
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "deaf", "retry", "try")
        stage.is_deaf = False
        await coordinator.resume("s", trip)
        undone = await coordinator.compensate("s", trip)
        stage.released.set()
        await settled_down()
        return [undone, await coordinator.report("s")]

    undone, late = run(main())

    assert undone.status is SagaStatus.COMPENSATED
    assert world.standing == {"s/deaf": 1}
    assert [*late.in_doubt] == ["deaf"]
    assert "saga settle s deaf undone --note '...'" in str(late)


@pytest.mark.parametrize("way", ["resume", "compensate"])
def test_what_comes_late_within_a_stage_that_was_undone_after_a_word_on_it_is_undone_by_the_commands_that_are_told(way: str) -> None:
    """It told to compensate the saga within by itself, which is refused: the stage undoes it."""
    world = World({})

    class NotInTheirBooks(DeafByKey, DeniedByProbe): ...

    class Refused(DeafByKey):
        is_deaf = False

        async def compensate(self, ctx: CompensationContext) -> None:
            raise OSError

    async def main() -> list[SagaReport]:
        late = NotInTheirBooks(world)
        inner = Pipeline(name="inner").with_stage("stays", Refused(world)).with_stage("late", late)
        trip = Pipeline(name="trip").with_stage("child", nested(inner, PROMPT))
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/stays", "undone", "by hand")
        del world.standing["s/child/stays"]
        undone = await getattr(coordinator, way)("s", trip)
        late.released.set()
        await settled_down()
        told = await coordinator.report("s")
        await coordinator.settle("s", "child", "retry", "as told")
        return [undone, told, await coordinator.resume("s", trip)]

    undone, told, last = run(main())

    assert undone.status is SagaStatus.COMPENSATED
    assert str(told).endswith("then go on:\n  saga settle s child retry --note '...'\n  saga resume s")
    assert last.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_nobody_is_told_to_go_on_while_a_stage_around_waits_for_a_word_of_its_own() -> None:
    """To resume is refused before that has been said."""
    world = World({})

    class NotInTheirBooks(DeafByKey, DeniedByProbe): ...

    async def main() -> list[SagaReport]:
        stage = NotInTheirBooks(world)
        trip = nested_in(stage, "inner", "child", policy=PROMPT.model_copy(update={"on_interrupt": "halt"}))
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(trip, saga_id="s")
        stage.is_deaf = False
        await coordinator.resume("s", trip, forward=True)
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        world.undo("s/child/inner/deaf")
        said = await coordinator.settle("s", "child/inner", "undone", "by hand")
        await coordinator.settle("s", "child", "kept", "its second booking stands")
        return [late, said, await coordinator.resume("s", trip)]

    late, said, last = run(main())

    assert str(late).endswith("and say so (undone, kept or retry):\n  saga settle s child/inner undone --note '...'")
    assert str(said).endswith("and say so (undone or kept); then go on:\n  saga settle s child undone --note '...'\n  saga resume s")
    assert last.status is SagaStatus.COMPLETED
    assert last.clean
    assert world.standing == {"s/child~2/inner/deaf": 1}


class Tolerant(CompensableStage):
    """Runs a saga, and does not mind that it fails; `outcome` is what it comes to itself."""

    def __init__(self, inner: Pipeline, outcome: StageOutput | None = None) -> None:
        self.inner = inner
        self.outcome = outcome

    async def execute(self, ctx: SagaContext) -> StageOutput:
        await ctx.run_saga(self.inner, policy=PROMPT)
        return self.outcome or StageOutput.ok()

    async def compensate(self, ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, self.inner)


class ToleratesAgain(Tolerant):
    idempotent = True


async def late_within(
    tolerant: type[Tolerant],
    *,
    outcome: StageOutput | None = None,
    fails: bool = False,
    again: bool = False,
    compensates: bool = False,
    policy: Policy | None = None,
    ledger: StopsAtWord | None = None,
) -> tuple[World, SagaCoordinator, Pipeline, Pipeline, SagaReport]:
    """A saga at rest that was done with a child in which something came late then: with what of it stands, and what it said then."""
    world = World({"deaf": ()})
    stage = Doubtful(world)
    inner = nested_in(stage)

    async def end(_: StageContext) -> StageOutput:
        return StageOutput.fail("no") if fails else StageOutput.ok()

    trip = Pipeline(name="trip").with_stage("book", tolerant(inner, outcome)).with_stage("end", end, "work", dependencies=("book",))
    coordinator = SagaCoordinator(policy, ledger=ledger)
    await coordinator.run(trip, saga_id="s")
    if again:
        fails = False
        await coordinator.resume("s", trip, forward=True)
    if compensates:
        await coordinator.compensate("s", trip)
    first = await coordinator.report("s")
    assert first.clean
    if ledger is not None:
        ledger.stage = "book"
    stage.released.set()
    await settled_down()
    return world, coordinator, trip, inner, first


def test_the_sagas_of_a_stage_that_is_given_up_are_stopped() -> None:
    """They went on to charge, though a fallback stood in for the stage."""
    world, inner = scene({"hold": (), "charge": ("hold",)}, {"hold": Script(before=20)}, {"hold": "probed"})
    at_once = FailFast(in_flight="cancel")

    class LeavesItRunning(Tolerant):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            child = asyncio.ensure_future(ctx.run_saga(self.inner, policy=at_once))
            while not child.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({child})
            return StageOutput.ok() if child.result().ok else StageOutput.fail("no")

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return StageOutput.ok() if "charge" in world.standing else None

    async def main() -> tuple[SagaReport, SagaReport]:
        coordinator = SagaCoordinator(ContinueWithFallback(timeout=10, cancel_grace=2, fallbacks={"book": {}}))
        first = await coordinator.run(Pipeline(name="trip").with_stage("book", LeavesItRunning(inner)), saga_id="s")
        await elapse(50)
        return first, await coordinator.report("s")

    first, report = run(main())

    assert first.fallbacks == ("book",)
    assert world.log == []
    assert report.stages["book"].children[0].status is SagaStatus.COMPENSATED
    assert report.status is SagaStatus.DEGRADED
    assert report.clean


@pytest.mark.parametrize("way", ["resume", "compensate", "forward"])
def test_what_comes_late_within_a_stage_that_was_undone_is_undone_by_what_undid_it(way: str) -> None:
    """It is not made for doubt, and there is none: it finds what stands in the saga that it ran."""

    async def main() -> tuple[World, SagaReport, SagaReport]:
        world, coordinator, trip, _, first = await late_within(Tolerant, fails=True)
        assert first.status is SagaStatus.COMPENSATED
        late = await coordinator.report("s")
        if way == "forward":
            with pytest.raises(MisuseError, match="half undone stages can run again, got book, not idempotent"):
                await coordinator.resume("s", trip, forward=True)
            way_back = coordinator.resume
        else:
            way_back = getattr(coordinator, way)
        return world, late, await way_back("s", trip)

    world, late, undone = run(main())

    assert late.status is SagaStatus.STUCK
    assert late.stages["book"].state is S.BLOCKED
    assert undone.status is SagaStatus.COMPENSATED
    assert undone.clean
    assert world.standing == {}


def test_what_comes_late_within_a_stage_that_was_cancelled_is_not_forgotten() -> None:
    async def main() -> tuple[World, SagaReport, SagaReport, SagaReport]:
        world, coordinator, _, inner, first = await late_within(Tolerant, outcome=StageOutput.cancel("enough"))
        late = await coordinator.report("s")
        await coordinator.compensate("s/book", inner)
        return world, first, late, await coordinator.settle("s", "book", "undone", "its saga is undone")

    world, first, late, settled = run(main())

    assert first.status is settled.status is SagaStatus.CANCELLED
    assert late.status is SagaStatus.HALTED
    assert [*late.in_doubt] == ["book", "book/deaf"]
    assert world.standing == {}


def test_what_comes_late_within_a_saga_of_which_nothing_came_leaves_it_stuck() -> None:
    """Also where it never turned back: there was nothing to undo."""
    skipping = ContinueWithFallback(without_fallback="skip_branch")

    async def main() -> tuple[SagaReport, SagaReport]:
        _, coordinator, _, _, first = await late_within(Tolerant, outcome=StageOutput.fail("no"), policy=skipping)
        return first, await coordinator.report("s")

    first, late = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["book", "book/deaf"]


@pytest.mark.parametrize("tolerant", [Tolerant, ToleratesAgain])
def test_a_child_that_turned_back_is_undone_by_itself_where_its_stage_stands_without_it(tolerant: type[Tolerant]) -> None:
    async def main() -> tuple[World, SagaReport, SagaReport]:
        world, coordinator, _, inner, _ = await late_within(tolerant)
        for refused in (coordinator.compensate("s/book", inner), coordinator.resume("s/book", inner, forward=True)):
            with pytest.raises(MisuseError, match="a saga that no other one runs"):
                await refused
        return world, await coordinator.resume("s/book", inner), await coordinator.report("s")

    world, child, report = run(main())

    assert child.status is SagaStatus.COMPENSATED
    assert report.status is SagaStatus.COMPLETED
    assert report.clean
    assert world.standing == {}


class OnlyOnce(Tolerant):
    """Runs its saga in its first execution alone."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        return await super().execute(ctx) if ctx.idempotency_key == "s/book" else StageOutput.ok()


@pytest.mark.parametrize("way", ["resume", "compensate"])
def test_a_child_of_an_execution_before_is_undone_by_itself(way: str) -> None:
    """Its stage runs under another key now, and finds it no more."""

    async def main() -> tuple[World, SagaReport, SagaReport, SagaReport]:
        world, coordinator, _, inner, _ = await late_within(OnlyOnce, fails=True, again=True)
        late = await coordinator.report("s")
        child = await getattr(coordinator, way)("s/book", inner)
        return world, late, child, await coordinator.settle("s", "book", "kept", "its second run stands")

    world, late, child, report = run(main())

    assert late.status is SagaStatus.STUCK
    assert child.status is SagaStatus.COMPENSATED
    assert report.status is SagaStatus.COMPLETED
    assert report.stages["book"].executions == 2
    assert report.clean
    assert world.standing == {}


def test_a_retry_within_a_child_of_an_execution_before_is_refused_where_nothing_can_be_tried() -> None:
    """Nobody goes forward with it; the report told to undo it by itself, again and again, which did nothing."""
    world = World({})

    async def main() -> SagaReport:
        stage = DeafByKey(world)
        trip = nested_in(stage, "child", policy=PROMPT.model_copy(update={"on_failure": "halt"}))
        coordinator = SagaCoordinator()
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/deaf", "undone", "not in their books")
        await coordinator.resume("s", trip)
        stage.is_deaf = False
        await coordinator.resume("s", trip, forward=True)
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        with pytest.raises(MisuseError, match=r"expected undone or kept, for stage 'deaf', got retry\. It has neither a probe nor"):
            await coordinator.settle("s", "child/deaf", "retry", "once more")
        return late

    late = run(main())

    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child", "child/deaf"]
    assert world.standing == {"s/child/deaf": 1, "s/child~2/deaf": 1}


@pytest.mark.parametrize("is_undone", [False, True], ids=["stuck", "undone"])
def test_to_hear_of_a_saga_of_one_execution_is_not_to_have_heard_of_that_of_another(is_undone: bool) -> None:
    """Promise 5: what had come late in the first one, whose process died before that was told, stood, and there was nothing to settle."""
    world = World({})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport, SagaReport]:
        first, second = DeafByKey(world), DeafByKey(world)
        trip, again = nested_in(first, "child"), nested_in(second, "child")
        coordinator = SagaCoordinator(ledger=ledger)
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/deaf", "undone", "not in their books")
        await coordinator.resume("s", trip)
        await coordinator.resume("s", again, forward=True)
        if is_undone:
            await coordinator.settle("s", "child~2/deaf", "undone", "nor in their books")
            assert (await coordinator.resume("s", again)).status is SagaStatus.COMPENSATED
        ledger.stage = "child"
        first.released.set()
        await settled_down()
        assert ledger.has_stopped()
        second.released.set()
        await settled_down()
        late = await coordinator.report("s")
        resumed = await SagaCoordinator(ledger=ledger).resume("s", again)
        return late, resumed, await coordinator.report("s")

    late, resumed, asked_again = run(main())

    assert world.standing == {"s/child/deaf": 1, "s/child~2/deaf": 1}
    for report in (late, resumed):
        assert report.status is SagaStatus.STUCK
        assert report.ended_at is not None
        assert [failure.kind for failure in report.failures].count(FailureKind.LATE) == 1
        assert {*report.in_doubt} >= {"child", "child/deaf"}
    assert asked_again == resumed


def test_a_retry_within_a_child_is_proposed_and_taken_in_the_execution_that_goes_on_with_it() -> None:
    """Also in a later one than the first: of what is within that, nothing has turned back."""
    world = World({})

    class Patient(DeafByKey):
        async def _wait(self) -> None:
            await self.released.wait()

    stage = Patient(world)
    halts = FailFast(on_failure="halt")
    middle = nested_in(stage, "grandchild", policy=PROMPT.model_copy(update={"on_failure": "halt"}))
    trip = Pipeline(name="outer").with_stage("child", nested(middle, halts))
    coordinator = SagaCoordinator(halts)

    async def main() -> tuple[SagaReport, SagaReport, SagaReport, SagaReport]:
        stage.is_deaf = False
        await coordinator.run(trip, saga_id="s")
        await coordinator.compensate("s", trip)
        stage.is_deaf = True
        halted = await coordinator.resume("s", trip, forward=True)
        asked, within = await coordinator.report("s"), await coordinator.report("s/child~2/grandchild")
        stage.is_deaf = False
        await coordinator.settle("s", "child~2/grandchild/deaf", "retry", "they have not heard of it")
        return halted, asked, within, await coordinator.resume("s", trip, forward=True)

    halted, asked, within, resumed = run(main())

    assert halted == asked
    assert asked.stages["child"].children[-1].stages["grandchild"].children[0] == within
    assert within.stages["deaf"].verdicts == ("undone", "kept", "retry")
    assert resumed.ok
    assert world.standing == {"s/child~2/grandchild/deaf": 1}


def test_no_saga_is_compensated_while_something_of_an_execution_before_is_stuck() -> None:
    """Promise 5: its own stages were undone, and what had come late in the first saga of one of them stood."""

    async def main() -> tuple[World, SagaReport, SagaReport, SagaReport, SagaReport]:
        world, coordinator, trip, inner, first = await late_within(OnlyOnce, fails=True, again=True, compensates=True)
        late = await coordinator.report("s")
        with pytest.raises(MisuseError, match="undone, while these are: book/deaf"):
            await coordinator.settle("s", "book", "undone", "looked")
        tried = await coordinator.resume("s", trip)
        assert world.standing == {"deaf": 1}
        await coordinator.resume("s/book", inner)
        return world, first, late, tried, await coordinator.settle("s", "book", "undone", "its first saga is undone")

    world, first, late, tried, settled = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert late.status is tried.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["book", "book/deaf"]
    assert "something came late in its saga s/book, of execution 1, when the saga had gone on with execution 2" in str(late)
    assert settled.status is SagaStatus.COMPENSATED
    assert settled.clean
    assert world.standing == {}


def test_what_is_told_of_an_execution_before_can_be_said_though_the_process_died_before_its_saga_heard() -> None:
    ledger = StopsAtWord()

    async def main() -> tuple[World, list[SagaReport]]:
        world, coordinator, _, inner, _ = await late_within(OnlyOnce, fails=True, again=True, compensates=True, ledger=ledger)
        assert ledger.has_stopped()
        recorded = len(await ledger.read("s"))
        left = [await coordinator.report("s"), await coordinator.report("s")]
        assert len(await ledger.read("s")) == recorded
        kept = await coordinator.settle("s", "book", "kept", "it may stand")
        await coordinator.compensate("s/book", inner)
        return world, [*left, kept]

    world, (left, again, kept) = run(main())

    assert left.status is SagaStatus.STUCK
    assert left == again
    assert "something came late in its saga s/book, of execution 1, when the saga had gone on with execution 2" in str(left)
    assert kept.status is SagaStatus.HALTED
    assert "book" in kept.kept
    assert world.standing == {}


def test_what_came_late_within_a_child_that_had_halted_is_told_though_the_process_died_before_its_saga_heard() -> None:
    """Promise 5: the child keeps it, so nothing of that one is in question; and its saga was compensated, and clean."""
    world = World({"deaf": ()})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = DeniedByProbe(world)
        trip = nested_in(stage, "inner", "child", policy=PROMPT.model_copy(update={"on_interrupt": "halt"}))
        await SagaCoordinator(PROMPT, ledger=ledger).run(trip, saga_id="s")
        ledger.stage = "inner"
        stage.released.set()
        await settled_down()
        assert ledger.has_stopped()
        assert world.standing == {"deaf": 1}
        coordinator = SagaCoordinator(ledger=ledger)
        return await coordinator.report("s"), await coordinator.resume("s", trip)

    left, resumed = run(main())

    assert left.status is SagaStatus.STUCK
    assert [*left.in_doubt] == ["child", "child/inner"]
    assert resumed.status is SagaStatus.COMPENSATED
    assert resumed.clean
    assert world.standing == {}


@pytest.mark.parametrize("alive", [False, True])
def test_what_comes_late_within_a_halted_child_of_an_execution_before_waits_for_a_person(alive: bool) -> None:
    """Promise 5: there it counts as kept, its stage finds it no more, and the saga above was complete, with nothing left to do."""
    world, pipeline = scene({"seat": ()}, {"seat": Script(before=20)})

    async def main() -> tuple[SagaReport, SagaReport, SagaReport]:
        stage = FirstIsDeaf(world)
        inner = nested_in(stage)
        trip = pipeline.with_stage("child", nested(inner, PROMPT.model_copy(update={"on_failure": "halt"})), dependencies=("seat",))
        coordinator = SagaCoordinator()
        await coordinator.run(trip, saga_id="s")
        if alive:
            await resumed_while_it_comes_late(coordinator, stage, trip)
        else:
            assert (await coordinator.resume("s", trip, forward=True)).ok
            stage.released.set()
        await settled_down()
        assert world.standing == {"seat": 1, "s/child/deaf": 1, "s/child~2/deaf": 1}
        late = await coordinator.report("s")
        undone = await coordinator.compensate("s/child", inner)
        return late, undone, await coordinator.settle("s", "child", "kept", "its second booking stands, and the first is undone")

    late, undone, settled = run(main())

    assert [child.status for child in late.stages["child"].children] == [SagaStatus.HALTED, SagaStatus.COMPLETED]
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child"]
    assert "something came late in its saga s/child, of execution 1, when the saga had gone on with execution 2" in str(late)
    assert undone.status is SagaStatus.COMPENSATED
    assert settled.status is SagaStatus.COMPLETED
    assert settled.clean
    assert world.standing == {"seat": 1, "s/child~2/deaf": 1}


def test_what_comes_late_within_a_plain_stage_is_undone_by_itself_when_its_saga_is_at_rest() -> None:
    world = World({"deaf": ()})
    stage = Doubtful(world)
    inner = nested_in(stage)
    may_end = asyncio.Event()

    async def book(ctx: Any) -> None:
        await ctx.run_saga(inner, policy=PROMPT)

    async def wait(_: Any) -> None:
        stage.released.set()
        await may_end.wait()

    async def main() -> SagaReport:
        trip = Pipeline(name="trip").with_stage("book", book, "work").with_stage("wait", wait, "work", dependencies=("book",))
        coordinator = SagaCoordinator()
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        while "deaf" not in world.standing:
            await elapse(1)
        await settled_down()
        with pytest.raises(MisuseError, match="a saga that no other one runs"):
            await coordinator.compensate("s/book", inner)
        may_end.set()
        assert not (await running).clean
        await coordinator.compensate("s/book", inner)
        return await coordinator.report("s")

    report = run(main())

    assert report.status is SagaStatus.COMPLETED
    assert report.clean
    assert world.standing == {}


def test_what_comes_late_in_a_saga_that_broke_off_does_not_bring_it_to_its_end() -> None:
    """Or it would be at rest and RUNNING, and nobody would recover it."""
    world = World({"deaf": ()})

    class Breaks(MemoryLedger):
        breaks = True

        async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
            if self.breaks and any(isinstance(event, SagaEnded) for event in events):
                self.breaks = False
                raise OSError("disk full")
            await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Deaf(world)
        pipeline = nested_in(stage)
        coordinator = SagaCoordinator(PROMPT, ledger=Breaks())
        with pytest.raises(LedgerError):
            await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        return late, (await coordinator.recover(pipeline)).reports["s"]

    late, recovered = run(main())

    assert late.stages["deaf"].late_output is not None
    assert late.ended_at is None
    assert recovered.status is SagaStatus.COMPENSATED
    assert world.standing == {}


# -- when its stage has run in another execution since ------------------------------------------------------------------


class Again(Doubtful):
    """Its first execution is deaf, each other one comes to `then` at once. Each has its effect under its own key."""

    def __init__(self, world: World, then: str = "ok") -> None:
        super().__init__(world)
        self.then = then
        self.refunds_fail = False

    async def execute(self, ctx: SagaContext) -> StageOutput:
        if ctx.idempotency_key == "s/deaf":
            await self._wait()
        elif self.then == "raise":
            raise ValueError
        elif self.then != "ok":
            return StageOutput(status=StageStatus(self.then))
        self.world.land(ctx.idempotency_key)
        return StageOutput.ok(charged=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.refunds_fail:
            raise OSError
        self.undone_with.append(ctx.forward_key)
        if ctx.forward_key in self.world.standing:
            self.world.undo(ctx.forward_key)


class AgainAskable(Again):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        if ctx.forward_key == "s/deaf" and not self.released.is_set():
            raise OSError
        self.undone_with.append(f"asked {ctx.forward_key}")
        return StageOutput.ok(found=True) if ctx.forward_key in self.world.standing else None


INSTEAD_OF_IT = ContinueWithFallback(timeout=10, cancel_grace=2, fallbacks={"deaf": {"charged": None}})


@dataclass
class Held:
    """What a saga that something came late in says, and what became of it.

    Attributes:
        before: Before that.
        late: After it.
        resumed: When somebody has then gone on all the same; None: it was refused.
        compensated: When somebody has asked to undo it.
        undone_with: What the code of its stage was called with until then.
        settled: When a person has said what stands.
    """

    before: SagaReport
    late: SagaReport
    resumed: SagaReport | None
    compensated: SagaReport
    undone_with: list[Any]
    settled: SagaReport


async def held(
    coordinator: SagaCoordinator, stage: Deaf, pipeline: Pipeline, verdict: str, put_right: Callable[[], None] = lambda: None
) -> Held:
    """Let the stage of a saga come late, go on with that, and settle it."""
    before = await coordinator.report("s")
    stage.released.set()
    await settled_down()
    late = await coordinator.report("s")
    assert "and say so (undone or kept); then go on:\n" in str(late)
    stage.undone_with.clear()
    resumed = None
    with contextlib.suppress(MisuseError):
        resumed = await coordinator.resume("s", pipeline)
    with pytest.raises(MisuseError, match="nothing that came late waits for a person, got deaf in doubt, of which something came late"):
        await coordinator.resume("s", pipeline, forward=True)
    compensated = await coordinator.compensate("s", pipeline)
    with pytest.raises(MisuseError, match=r"undone or kept, for stage 'deaf', got retry\. Something of it came late"):
        await coordinator.settle("s", "deaf", "retry", "try")
    undone_with = [*stage.undone_with]
    put_right()
    return Held(before, late, resumed, compensated, undone_with, await coordinator.settle("s", "deaf", verdict, "looked"))


@pytest.mark.parametrize("kind", [Again, AgainAskable])
@pytest.mark.parametrize(
    ("then", "policy", "before", "late", "undone", "kept"),
    [
        ("ok", PROMPT, "completed", "stuck", "halted", "completed"),
        ("skip", PROMPT, "completed", "stuck", "completed", "completed"),
        ("cancel", PROMPT, "cancelled", "halted", "cancelled", "cancelled"),
        ("cancel", PROMPT.model_copy(update={"on_cancel": "compensate"}), "compensated", "stuck", "compensated", "halted"),
        ("raise", PROMPT, "compensated", "stuck", "compensated", "halted"),
        ("raise", PROMPT.model_copy(update={"on_failure": "halt"}), "halted", "halted", "halted", "halted"),
        ("raise", INSTEAD_OF_IT, "degraded", "stuck", "degraded", "degraded"),
    ],
)
@pytest.mark.parametrize("verdict", ["undone", "kept"])
def test_what_comes_late_of_an_execution_before_waits_for_a_person(
    kind: type[Again], then: str, policy: Policy, before: str, late: str, undone: str, kept: str, verdict: str
) -> None:
    """Promise 5: it stands under a key that nothing would be undone with, or asked for, and the saga was compensated, or completed."""
    world = World({"deaf": ()})

    def put_right() -> None:
        for key in [*world.standing]:
            if verdict == "undone" or key == "s/deaf":
                world.undo(key)

    async def main() -> Held:
        stage = kind(world, then)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True, policy=policy)
        return await held(coordinator, stage, pipeline, verdict, put_right)

    went = run(main())

    assert went.before.status.value == before
    assert went.late.status.value == late
    assert [*went.late.in_doubt] == ["deaf"]
    assert not went.late.clean
    assert went.late.stages["deaf"].late_output == StageOutput.ok(charged="s/deaf")
    assert went.late.stages["deaf"].output == went.before.stages["deaf"].output
    question = went.late.failures[-1]
    assert (question.stage, question.kind) == ("deaf", FailureKind.LATE)
    assert question.message.startswith(
        "execution 1 (key 's/deaf') had been given up and completed late, when the saga had gone on with execution 2 (key 's/deaf~2'): "
        "what it did may stand, and nothing undoes it. Look in the outside world"
    )
    assert question.message in str(went.late)
    assert "saga settle s deaf undone" in str(went.late)
    assert went.undone_with == []
    assert went.compensated.in_doubt.keys() == {"deaf"}
    assert went.settled.clean
    assert went.settled.status.value == (undone if verdict == "undone" else kept)
    assert world.standing == ({"s/deaf~2": 1} if then == "ok" and verdict == "kept" else {})


@pytest.mark.parametrize("verdict", ["undone", "kept"])
@pytest.mark.parametrize("refunds_fail", [False, True])
def test_what_comes_late_of_an_execution_before_waits_for_a_person_also_when_the_one_after_was_to_be_undone(
    refunds_fail: bool, verdict: str
) -> None:
    world = World({"a": (), "deaf": ("a",)})

    async def main() -> Held:
        stage = Again(world)
        a = scene({"a": ()})[1].stages["a"].runner
        pipeline = Pipeline(name="trip").with_stage("a", a).with_stage("deaf", stage, dependencies=("a",))
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"compensation": Compensation(retry=Retry(attempts=1))}))
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        stage.refunds_fail = refunds_fail
        await coordinator.compensate("s", pipeline)
        return await held(coordinator, stage, pipeline, verdict)

    went = run(main())

    assert went.before.status is (SagaStatus.STUCK if refunds_fail else SagaStatus.COMPENSATED)
    assert went.late.stages["deaf"].state is (S.STUCK if refunds_fail else S.IN_DOUBT)
    assert went.late.status is SagaStatus.STUCK
    assert went.late.failures[-1].kind is FailureKind.LATE
    assert went.late.failures[-1].message in str(went.late)
    assert went.undone_with == []
    assert went.settled.stages["deaf"].state is (S.UNDONE if verdict == "undone" else S.KEPT)
    assert went.settled.status is (SagaStatus.HALTED if verdict == "kept" else SagaStatus.STUCK if refunds_fail else SagaStatus.COMPENSATED)


@pytest.mark.parametrize("end", ["ok", "raise"])
def test_what_comes_late_of_an_execution_before_while_the_saga_is_alive_turns_it_nowhere_and_holds_back_what_it_depends_on(
    end: str,
) -> None:
    world, others = scene({"a": (), "slow": ("a",)}, {"slow": Script("ok", before=20, then=(end,))})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = Again(world)
        pipeline = others.with_stage("deaf", stage, dependencies=("a",))
        coordinator = SagaCoordinator(FailFast(cancel_grace=2))
        stage.timeout = 10  # of this one alone
        await coordinator.run(pipeline, saga_id="s")
        return await resumed_while_it_comes_late(coordinator, stage, pipeline)

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert [*report.in_doubt] == ["deaf"]
    assert report.failures[-1].kind is FailureKind.LATE
    assert report.stages["slow"].state is (S.KEPT if end == "ok" else S.FAILED)
    assert report.stages["a"].state is (S.KEPT if end == "ok" else S.BLOCKED)
    assert report.cause is None or report.cause.kind is FailureKind.EXCEPTION
    assert world.standing.keys() == {"a", "s/deaf", "s/deaf~2", *(["slow"] if end == "ok" else [])}
    assert world.refusals == []


def test_what_comes_late_of_an_attempt_that_another_one_has_cancelled_waits_for_a_person() -> None:
    """It is the same execution, and a word of that one's own says that it has had no effect."""
    world = World({"deaf": ()})

    class Cancels(Deaf):
        idempotent = True

        async def execute(self, ctx: SagaContext) -> Any:
            return await super().execute(ctx) if ctx.attempt == 1 else StageOutput.cancel("enough")

    async def main() -> Held:
        stage = Cancels(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        return await held(coordinator, stage, pipeline, "undone", lambda: world.undo("deaf"))

    went = run(main())

    assert went.before.status is SagaStatus.CANCELLED
    assert went.late.status is SagaStatus.HALTED
    assert [*went.late.in_doubt] == ["deaf"]
    assert "execution 1 (key 's/deaf') had been given up and completed late, when the saga had gone on without it" in str(went.late)
    assert went.settled.status is SagaStatus.CANCELLED
    assert went.settled.clean


def test_a_second_attempt_that_comes_late_to_what_was_undone_answers_no_more_than_the_first() -> None:
    """Promise 5: it was kept, though a person had said that it was undone, and had undone it."""
    world = World({"deaf": ()})

    class Repeated(Deaf):
        idempotent = True

        async def execute(self, ctx: SagaContext) -> Any:
            self.world.standing["deaf"] = 1
            await self._wait()
            return self.outcome()

    async def main() -> SagaReport:
        stage = Repeated(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        await coordinator.settle("s", "deaf", "undone", "put right")
        world.undo("deaf")
        stage.released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert [*report.in_doubt] == ["deaf"]
    assert report.status is SagaStatus.STUCK


class BreaksAt(MemoryLedger):
    """Can't record such an event, once."""

    def __init__(self, breaks_at: Callable[[Any], bool]) -> None:
        super().__init__()
        self.breaks_at: Callable[[Any], bool] | None = breaks_at

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        if self.breaks_at is not None and any(map(self.breaks_at, events)):
            self.breaks_at = None
            raise OSError("disk full")
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


def test_what_came_late_in_a_saga_that_broke_off_is_neither_replaced_nor_run_when_that_is_recovered() -> None:
    world = World({"deaf": ()})

    async def main() -> SagaReport:
        stage = Again(world, "raise")
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT, ledger=BreaksAt(lambda event: isinstance(event, FallbackUsed)))
        await coordinator.run(pipeline, saga_id="s")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True, policy=INSTEAD_OF_IT)
        stage.released.set()
        await settled_down()
        return (await coordinator.recover(pipeline)).reports["s"]

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert [*report.in_doubt] == ["deaf"]
    assert report.fallbacks == ()
    assert report.cause is not None
    assert report.cause.kind is FailureKind.LATE


@pytest.mark.parametrize(
    ("kind", "on_failure", "rest", "last", "stands"),
    [
        (DeafByKey, "halt", SagaStatus.HALTED, SagaStatus.COMPLETED, {"s/deaf": 1}),
        (Again, "compensate", SagaStatus.COMPENSATED, SagaStatus.COMPENSATED, {}),
    ],
)
def test_what_came_late_in_a_saga_that_broke_off_before_it_ran_again_does_not_run_when_that_is_recovered(
    kind: type[Deaf], on_failure: str, rest: SagaStatus, last: SagaStatus, stands: dict[str, int]
) -> None:
    """It had its effect twice; where it had been undone as in doubt, under another key, and that of the late one was forgotten."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = kind(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": on_failure}), ledger=BreaksAt(runs_again))
        first = await coordinator.run(pipeline, saga_id="s")
        if first.in_doubt:
            await coordinator.settle("s", "deaf", "retry", "try")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        assert world.standing == {"s/deaf": 1}
        return [first, (await coordinator.recover(pipeline)).reports["s"]]

    first, recovered = run(main())

    assert first.status is rest
    assert recovered.status is last
    assert world.standing == stands


def runs_again(event: Any) -> bool:
    """Whether a stage that has run before starts."""
    return isinstance(event, StageStarted) and (event.attempt, event.execution) != (1, 1)


class StaysWithWhatItRecorded(DeafByKey):
    """Its probe says that it did not land; what it recorded before can't be undone, and then it can't be asked, either."""

    is_down = False

    async def execute(self, ctx: SagaContext) -> None:
        await ctx.record({"seat": "14A"})
        await super().execute(ctx)

    async def probe(self, _: CompensationContext) -> None:
        if self.is_down:
            raise OSError("no")

    async def compensate(self, _: CompensationContext) -> None:
        self.is_down = True
        raise OSError("no")


def test_what_was_stuck_and_comes_late_in_a_saga_that_broke_off_before_it_ran_again_is_kept_when_that_is_recovered() -> None:
    """It was run all the same, which its ledger refused as corrupt: the saga could never be recovered."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = StaysWithWhatItRecorded(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT, ledger=BreaksAt(runs_again))
        first = await coordinator.run(pipeline, saga_id="s")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        recovery = await coordinator.recover(pipeline)
        assert recovery.failed == {}
        return [first, recovery.reports["s"]]

    first, recovered = run(main())

    assert [*first.stuck] == ["deaf"]
    assert recovered.status is SagaStatus.COMPLETED
    assert [*recovered.kept] == ["deaf"]
    assert world.standing == {"s/deaf": 1}


class ThenRefused(DeafByKey):
    """It is deaf at first; each other attempt is refused."""

    async def execute(self, ctx: SagaContext) -> Any:
        if ctx.attempt > 1:
            raise OSError("refused")
        await super().execute(ctx)


@pytest.mark.parametrize("is_recovered_here", [True, False])
def test_what_comes_late_of_a_stage_that_a_dead_process_was_running_again_waits_until_that_is_recovered(
    is_recovered_here: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knew yet what the stage had come to first, and what came late was lost to the log."""
    world = World({})
    ledger = BreaksAt(lambda event: isinstance(event, StageFailed) and event.failure.attempt > 1)

    async def main() -> list[SagaReport]:
        stage = ThenRefused(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}), ledger=ledger)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.settle("s", "deaf", "retry", "try")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline)
        stage.released.set()
        await settled_down()
        await elapse(60)
        broken = await coordinator.report("s")
        await (coordinator if is_recovered_here else SagaCoordinator(ledger=ledger)).recover(pipeline)
        await elapse(2)
        return [broken, await coordinator.report("s"), await coordinator.compensate("s", pipeline)]

    broken, recovered, undone = run(main())

    assert broken.status is SagaStatus.RUNNING
    assert recovered.stages["deaf"].state is S.KEPT
    assert undone.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING and "late" in record.getMessage()]
    assert "waits to be recorded: it broke off; recover it" in told


class DeafPivot(PivotStage):
    """Completes once it is released, against the word of its probe."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.released = asyncio.Event()

    async def execute(self, _: SagaContext) -> None:
        while not self.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.released.wait()
        self.world.land("deaf")

    async def probe(self, _: CompensationContext) -> None:
        return None


def test_a_pivot_that_comes_late_in_a_saga_that_broke_off_lets_an_undoing_under_way_come_to_its_end() -> None:
    """Else nobody could ever go on with the saga: it may not end while a stage of it is being undone."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_bears_repetition=True)})

    async def main() -> tuple[StageState, SagaReport]:
        stage = DeafPivot(world)
        whole = pipeline.with_stage("deaf", stage, dependencies=("a",))
        ledger = BreaksAt(lambda event: isinstance(event, CompensationCompleted))
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2), ledger=ledger)
        with pytest.raises(LedgerError, match="disk full"):
            await coordinator.run(whole, saga_id="s")
        stage.released.set()
        await settled_down()
        left = (await coordinator.report("s")).stages["deaf"].state
        return left, (await coordinator.recover(whole)).reports["s"]

    left, report = run(main())

    assert left is S.KEPT
    assert report.status is SagaStatus.HALTED
    assert report.stages["a"].state is S.UNDONE
    assert world.standing == {"deaf": 1}


@pytest.mark.parametrize("kind", ["compensable", "probed"])
def test_an_undoing_under_way_in_a_saga_that_broke_off_is_stuck_under_what_came_late_unless_its_probe_finds_it_done(kind: str) -> None:
    world, pipeline = scene({"a": ()}, kinds={"a": kind})

    async def main() -> SagaReport:
        stage = Stays(world)
        whole = pipeline.with_stage("deaf", stage, dependencies=("a",))
        ledger = BreaksAt(lambda event: isinstance(event, CompensationCompleted))
        coordinator = SagaCoordinator(PROMPT, ledger=ledger)
        with pytest.raises(LedgerError, match="disk full"):
            await coordinator.run(whole, saga_id="s")
        stage.released.set()
        await settled_down()
        return (await coordinator.recover(whole)).reports["s"]

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert {name: stage.state for name, stage in report.stages.items()} == {"a": S.UNDONE if kind == "probed" else S.STUCK, "deaf": S.STUCK}
    assert world.standing == {"deaf": 1}


class BreaksAtOnDisk(BreaksAt):
    """Takes what guards nothing together with what follows."""

    durable = True


@pytest.mark.parametrize("kind", [BreaksAt, BreaksAtOnDisk])
def test_what_comes_late_and_breaks_its_saga_off_is_recorded_when_the_ledger_is_back(kind: type[BreaksAt]) -> None:
    """Promise 5: the caller was told that it is in effect, and to resume; the saga was then compensated."""
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20, undo_bears_repetition=True)})

    async def main() -> SagaReport:
        stage = DeniedByProbe(world)
        trip = pipeline.with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT, ledger=kind(lambda event: isinstance(event, StageCompleted) and event.late))
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        while "slow" not in world.undoing:
            await elapse(1)
        stage.released.set()
        with pytest.raises(LedgerError, match="In effect: deaf"):
            await running
        await settled_down()
        return await coordinator.resume("s", trip)

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["slow", "deaf"]
    assert world.standing == {}


def test_what_comes_late_in_a_saga_that_broke_off_while_its_stage_ran_in_another_execution_waits_until_that_is_recovered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Again(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        ledger = BreaksAt(lambda event: isinstance(event, StageCompleted) and not event.late)
        coordinator = SagaCoordinator(PROMPT, ledger=ledger)
        await coordinator.run(pipeline, saga_id="s")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        broken = await coordinator.report("s")
        return [broken, (await coordinator.recover(pipeline)).reports["s"]]

    broken, recovered = run(main())

    assert broken.stages["deaf"].state is S.RUNNING
    assert recovered.status is SagaStatus.STUCK
    assert [*recovered.in_doubt] == ["deaf"]
    assert recovered.failures[-1].kind is FailureKind.LATE
    assert lost(caplog) == []


def test_what_comes_late_of_a_plain_stage_that_has_cancelled_since_is_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It has nothing that anybody could undo, or settle."""
    released = asyncio.Event()

    async def look(ctx: Any) -> StageOutput:
        if ctx.attempt > 1:
            return StageOutput.cancel("enough")
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()
        return StageOutput.ok()

    async def main() -> SagaReport:
        pipeline = Pipeline(name="trip").with_stage("look", look, "work")
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}))
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline)
        released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert report.stages["look"].state is S.CANCELLED
    assert lost(caplog) == [(LOSS, None)]


def test_what_comes_late_while_its_undoing_is_gone_on_with_waits_for_what_comes_of_that() -> None:
    """The ledger broke off while both were undone; one after the other now, the first of them takes its time."""
    world = World({"deaf": ()})
    stage = Doubtful(world)

    async def let_go(_: CompensationContext) -> None:
        await elapse(10)

    async def fail(_: SagaContext) -> StageOutput:
        return StageOutput.fail("no")

    pipeline = Pipeline(name="trip").with_stage("deaf", stage).with_stage("other", compensable(nothing, let_go))
    pipeline = pipeline.with_stage("fail", compensable(fail, nothing), dependencies=("other",))
    one_by_one = PROMPT.model_copy(update={"compensation": Compensation(max_concurrency=1)})

    async def main() -> tuple[SagaReport, SagaReport]:
        ledger = BreaksAt(lambda event: isinstance(event, CompensationCompleted))
        coordinator = SagaCoordinator(PROMPT, ledger=ledger)
        with pytest.raises(LedgerError):
            await coordinator.run(pipeline, saga_id="s")
        going_on = asyncio.create_task(coordinator.resume("s", pipeline, policy=one_by_one))
        await elapse(5)
        stage.released.set()
        first = await going_on
        return first, await coordinator.report("s")

    first, report = run(main())

    assert first == report
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("way", ["kept", "undone", "compensate"])
def test_the_sagas_above_wait_for_a_person_with_one_in_which_an_execution_before_came_late(way: str) -> None:
    """Resumed meanwhile, they would turn back because it can't go on; undone, they are, but for what it holds back."""
    world, others = scene({"other": ()})

    class Renewed(Again):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if ctx.idempotency_key != "s/child/deaf":
                return await super().execute(ctx)
            await self._wait()
            self.world.land("first")
            return StageOutput.ok()

    async def main() -> list[SagaReport]:
        stage = Renewed(world)
        halting = PROMPT.model_copy(update={"on_failure": "halt"})
        trip = others.with_stage("child", nested(nested_in(stage), halting), dependencies=("other",))
        coordinator = SagaCoordinator(FailFast(on_failure="halt"))
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/deaf", "undone", "not in their books")
        first = await coordinator.resume("s", trip)
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        with pytest.raises(MisuseError, match="got child in doubt, of which something came late"):
            await coordinator.resume("s", trip)
        if way == "compensate":
            stuck = await coordinator.compensate("s", trip)
            for key in ("first", "s/child/deaf~2"):
                world.standing.pop(key)
            await coordinator.settle("s", "child/deaf", "undone", "looked")
            return [first, late, stuck, await coordinator.resume("s", trip)]
        world.standing.pop("first")
        if way == "undone":
            world.standing.pop("s/child/deaf~2")
        settled = await coordinator.settle("s", "child/deaf", way, "looked")
        return [first, late, settled, await coordinator.resume("s", trip)]

    first, late, then, last = run(main())

    assert first.status is SagaStatus.COMPLETED
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child", "child/deaf"]
    assert "stage 'deaf' is in question: execution 1" in late.failures[-1].message
    if way == "compensate":
        assert [*then.stuck] == ["child"]
        assert [*then.blocked] == ["other"]
    assert last.status is (SagaStatus.COMPENSATED if way == "compensate" else SagaStatus.COMPLETED)
    assert last.clean
    number = {"kept": 2, "undone": 3, "compensate": 0}[way]
    assert world.standing.keys() == ({"other", f"s/child/deaf~{number}"} if number else set())


class NotesItsSeat(Doubtful):
    """Notes what it did before it goes on, and may do more."""

    refused: ClassVar[list[str]] = []

    async def execute(self, ctx: SagaContext) -> Any:
        await self._wait()
        self.world.land("deaf")
        try:
            await ctx.record({"seat": "14A"})
        except MisuseError as error:
            self.refused.append(str(error))
            raise
        self.world.land("another seat")


class DeniedByProbeBefore(NotesItsSeat):
    async def probe(self, ctx: CompensationContext) -> None:
        return None


@pytest.mark.parametrize("kind", [NotesItsSeat, DeniedByProbeBefore])
@pytest.mark.parametrize("way", ["at rest", "alive", "resumed"])
def test_an_effect_that_is_recorded_late_stops_the_stage_and_waits_for_a_person(
    way: str, kind: type[NotesItsSeat], caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 5: to the stage the ledger seemed corrupt, it raised, and the saga stayed compensated, with a seat that stood."""
    world, others = scene({"slow": ()}, {"slow": Script(undo_takes=20)})
    kind.refused.clear()

    async def main() -> list[SagaReport]:
        stage = kind(world)
        pipeline = others.with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        while way == "alive" and "slow" not in world.undoing:
            await elapse(1)
        if way == "alive":
            stage.released.set()
        reports = [await running]
        stage.released.set()
        if way == "resumed":
            reports = [await coordinator.resume("s", pipeline)]
        await settled_down()
        reports.append(await coordinator.report("s"))
        assert "deaf" in world.standing
        world.undo("deaf")
        return [*reports, await coordinator.settle("s", "deaf", "undone", "they gave it back")]

    first, late, settled = run(main())

    assert first.status is (SagaStatus.STUCK if way == "alive" else SagaStatus.COMPENSATED)
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["deaf"]
    assert late.failures[-1].kind is FailureKind.LATE
    assert "execution 1 (key 's/deaf') recorded {'seat': '14A'} late, when the saga had gone on without it" in str(late)
    (refused,) = kind.refused
    assert "expected ctx.record by an attempt that is running, for stage 'deaf', got one that was given up, or has ended." in refused
    assert settled.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert "could not be recorded" not in caplog.text


# -- when what it undoes was gone on with since -------------------------------------------------------------------------


class Refunds(Deaf):
    """Its first refund is deaf, each other one is carried out at once."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.refunds = 0

    async def execute(self, ctx: SagaContext) -> Any:
        self.world.land("deaf")
        return StageOutput.ok(charged=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.refunds += 1
        self.undone_with.append(ctx.idempotency_key)
        if self.refunds == 1:
            await self._wait()
        if "deaf" in self.world.standing:
            self.world.undo("deaf")


IN_TIME = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1)))


def shipped(world: World, stage: Deaf, *outcomes: str, **more: Any) -> Pipeline:
    """deaf -> ship, which comes to these outcomes, one after another."""
    world.dependencies["ship"] = ("deaf",)
    script = Script(outcomes[0], then=outcomes[1:], **more)
    ship = scene({"ship": ()}, {"ship": script})[1].stages["ship"].runner
    ship.world = world  # type: ignore[union-attr] # it is one of the scene's
    return Pipeline(name="trip").with_stage("deaf", stage).with_stage("ship", ship, dependencies=("deaf",))


@pytest.mark.parametrize("verdict", ["kept", "undone"])
@pytest.mark.parametrize("kept_by", ["resumed", "settled"])
def test_a_compensation_that_comes_late_to_what_is_kept_since_waits_for_a_person(kept_by: str, verdict: str) -> None:
    """Promise 5: the charge was kept, and refunded; what depends on it had gone on."""
    world = World({"deaf": ()})

    async def main() -> Held:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "raise", "ok")
        coordinator = SagaCoordinator(IN_TIME)
        assert [*(await coordinator.run(pipeline, saga_id="s")).stuck] == ["deaf"]
        if kept_by == "resumed":
            await coordinator.resume("s", pipeline, forward=True)
        else:
            await coordinator.settle("s", "deaf", "kept", "they are happy with it")
        assert "deaf" in world.standing
        return await held(coordinator, stage, pipeline, verdict)

    went = run(main())

    assert went.before.status is (SagaStatus.COMPLETED if kept_by == "resumed" else SagaStatus.HALTED)
    assert went.before.stages["deaf"].state is S.KEPT
    assert went.late.status is SagaStatus.STUCK
    assert [*went.late.in_doubt] == ["deaf"]
    assert went.late.stages["deaf"].output == StageOutput.ok(charged="s/deaf")
    assert went.late.failures[-1].message.startswith(
        "the compensation of execution 1 (key 's/deaf') had been given up and completed late, "
        "when the saga had gone on with what it undoes: that may be gone. Look in the outside world"
    )
    assert went.undone_with == []
    assert went.settled.clean
    assert "deaf" not in world.standing
    # Asked to be undone meanwhile, it was, but for what is held.
    assert went.compensated.stages["ship"].state is (S.UNDONE if kept_by == "resumed" else S.FAILED)
    assert went.settled.status is (SagaStatus.HALTED if verdict == "kept" else SagaStatus.COMPENSATED)


@pytest.mark.parametrize(("verdict", "status"), [("kept", "completed"), ("undone", "halted")])
def test_a_saga_whose_late_compensation_was_settled_is_complete_or_can_be_run_once_more(verdict: str, status: str) -> None:
    world = World({"deaf": ()})

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "raise", "ok")
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        if verdict == "kept":
            world.land("deaf")
        return await coordinator.settle("s", "deaf", verdict, "looked"), await coordinator.resume("s", pipeline)

    settled, resumed = run(main())

    assert settled.status.value == status
    assert settled.clean
    assert resumed.status is SagaStatus.COMPLETED
    assert resumed.kept["deaf"].data == {"charged": "s/deaf" if verdict == "kept" else "s/deaf~2"}
    assert world.standing == {"deaf": 1, "ship": 1}


def test_a_compensation_that_comes_late_while_the_saga_goes_forward_turns_nothing_back() -> None:
    world = World({"deaf": ()})

    async def main() -> SagaReport:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "raise", "ok", before=20)
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        return await resumed_while_it_comes_late(coordinator, stage, pipeline)

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert report.cause is None
    assert [*report.in_doubt] == ["deaf"]
    assert world.standing == {"ship": 1}


@pytest.mark.parametrize("way", ["settled", "resumed"])
def test_a_compensation_that_comes_late_to_what_is_to_be_undone_has_undone_it(way: str) -> None:
    """Promise 2: it was undone a second time. Nothing has run on it meanwhile that still stands."""
    world = World({"deaf": ()})

    async def end(_: StageContext) -> StageOutput:
        return StageOutput.fail("no")

    async def main() -> tuple[Refunds, SagaReport]:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "ok", undo_takes=20).with_stage("end", end, "work", dependencies=("ship",))
        coordinator = SagaCoordinator(IN_TIME.model_copy(update={"compensation": Compensation(timeout=30, retry=Retry(attempts=1))}))
        await coordinator.run(pipeline, saga_id="s")
        if way == "settled":
            await coordinator.settle("s", "deaf", "retry", "they answer again")
            stage.released.set()
            await settled_down()
            return stage, await coordinator.resume("s", pipeline)
        running = asyncio.create_task(coordinator.resume("s", pipeline, forward=True))
        while "ship" not in world.undoing:
            await elapse(1)
        stage.released.set()
        return stage, await running

    stage, report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert stage.undone_with == ["s/deaf/undo"]
    assert world.standing == {}


class RefundFails(Doubtful):
    """Its first refund, of which nobody knows whether it is needed, is refused."""

    async def compensate(self, ctx: CompensationContext) -> None:
        if ctx.attempt == 1:
            raise OSError
        await super().compensate(ctx)


def test_what_completes_late_when_it_could_not_be_undone_is_kept_with_what_runs_on_it_then() -> None:
    """Promise 1: it still counted as failed, and when all had completed it was undone under what had run on it."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = RefundFails(world)
        pipeline = shipped(world, stage, "ok")
        coordinator = SagaCoordinator(IN_TIME.model_copy(update={"timeout": 10}))
        reports = [await coordinator.run(pipeline, saga_id="s")]
        stage.released.set()
        await settled_down()
        reports.append(await coordinator.report("s"))
        return [*reports, await coordinator.resume("s", pipeline, forward=True)]

    first, late, resumed = run(main())

    assert [*first.stuck] == [*late.stuck] == ["deaf"]
    assert resumed.status is SagaStatus.COMPLETED
    assert [*resumed.kept] == ["deaf", "ship"]
    assert world.standing == {"deaf": 1, "ship": 1}


def test_what_completes_late_when_it_could_not_be_undone_behind_its_fallback_is_undone_then() -> None:
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = RefundFails(world)
        pipeline = shipped(world, stage, "ok")
        coordinator = SagaCoordinator(INSTEAD.model_copy(update={"compensation": Compensation(retry=Retry(attempts=1))}))
        first = await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.resume("s", pipeline, forward=True)]

    first, resumed = run(main())

    assert [*first.stuck] == ["deaf"]
    assert resumed.status is SagaStatus.DEGRADED
    assert resumed.fallbacks == ("deaf",)
    assert world.standing == {"ship": 1}


class InParts(Refunds):
    """Its first attempt charges a part and fails."""

    async def execute(self, ctx: SagaContext) -> Any:
        await ctx.record("a part")
        if ctx.attempt == 1:
            self.world.land("deaf")
            raise ValueError
        return StageOutput.ok(charged="all")


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_compensation_that_comes_late_to_what_has_run_again_waits_for_a_person(is_stuck: bool) -> None:
    """It may have undone what that gave as well, or not: also where that could not be undone itself."""
    world = World({"deaf": ()})

    class Fails(InParts):
        async def compensate(self, ctx: CompensationContext) -> None:
            if self.refunds:
                raise OSError
            await super().compensate(ctx)

    async def main() -> SagaReport:
        stage = Fails(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        if is_stuck:
            await coordinator.compensate("s", pipeline)
        stage.released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert report.stages["deaf"].attempts == 2
    assert report.stages["deaf"].state is (S.STUCK if is_stuck else S.IN_DOUBT)
    assert report.status is SagaStatus.STUCK
    assert report.failures[-1].kind is FailureKind.LATE


@pytest.mark.parametrize("then", ["ok", "cancel"])
def test_a_compensation_that_comes_late_of_an_execution_before_waits_for_a_person_if_anything_stands(
    then: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A person had said that nothing of that one stood: it may have undone what stands now, and else tells nothing new."""
    world = World({"deaf": ()})

    class Cancels(Refunds):
        async def execute(self, ctx: SagaContext) -> Any:
            if then == "cancel" and ctx.idempotency_key != "s/deaf":
                return StageOutput.cancel("enough")
            return await super().execute(ctx)

    async def main() -> SagaReport:
        stage = Cancels(world)
        pipeline = shipped(world, stage, "raise", "ok")
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        world.undo("deaf")
        await coordinator.settle("s", "deaf", "undone", "refunded by hand")
        await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert report.status is (SagaStatus.STUCK if then == "ok" else SagaStatus.CANCELLED)
    assert report.clean is (then == "cancel")
    assert "could not be recorded" not in caplog.text
    if then == "ok":
        assert "the compensation of execution 1 (key 's/deaf') had been given up and completed late, " in str(report)
        assert "when the saga had gone on with execution 2 (key 's/deaf~2')" in str(report)


def test_a_compensation_that_comes_late_after_what_it_undoes_has_come_late_may_have_come_before_it() -> None:
    """Promise 5: both had been given up; it found nothing, the charge landed, and it then said that it had undone it."""
    world = World({"deaf": ()})

    class BothDeaf(Doubtful):
        def __init__(self, world: World) -> None:
            super().__init__(world)
            self.may_answer = asyncio.Event()

        async def compensate(self, ctx: CompensationContext) -> None:
            assert "deaf" not in world.standing
            while not self.may_answer.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.may_answer.wait()

    async def main() -> list[SagaReport]:
        stage = BothDeaf(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(IN_TIME.model_copy(update={"timeout": 10}))
        reports = [await coordinator.run(pipeline, saga_id="s")]
        for event in (stage.released, stage.may_answer):
            event.set()
            await settled_down()
            reports.append(await coordinator.report("s"))
        world.undo("deaf")
        return [*reports, await coordinator.settle("s", "deaf", "undone", "refunded by hand")]

    first, landed, late, settled = run(main())

    assert [*first.stuck] == [*landed.stuck] == [*late.stuck] == ["deaf"]
    assert late.status is SagaStatus.STUCK
    assert late.failures[-1].kind is FailureKind.LATE
    assert settled.status is SagaStatus.COMPENSATED
    assert settled.clean


def test_a_stage_that_was_stuck_in_doubt_is_asked_again_when_what_is_within_it_is_settled() -> None:
    """It had landed before it came into question, and was taken for known: its probe's answer was refused as LedgerCorrupt."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Refunds(world)

        async def end(_: StageContext) -> StageOutput:
            await elapse(20)
            return StageOutput.fail("no")

        child = nested(Pipeline(name="inner").with_stage("deaf", stage), IN_TIME)
        trip = Pipeline(name="trip").with_stage("child", child).with_stage("end", end, "work", dependencies=("child",))
        coordinator = SagaCoordinator()
        reports = [await coordinator.run(trip, saga_id="s")]
        running = asyncio.create_task(coordinator.resume("s", trip, forward=True))
        await elapse(5)
        stage.released.set()
        reports.append(await running)
        world.land("deaf")
        reports.append(await coordinator.settle("s", "child/deaf", "kept", "charged again by hand"))
        return [*reports, await coordinator.resume("s", trip)]

    first, late, settled, resumed = run(main())

    assert [*first.stuck] == ["child", "child/deaf"]
    assert [*late.stuck] == ["child"]
    assert [*late.in_doubt] == ["child/deaf"]
    assert [*settled.in_doubt] == ["child"]
    assert resumed.status is SagaStatus.HALTED
    assert resumed.clean
    assert resumed.stages["child"].state is S.KEPT
    assert world.standing == {"deaf": 1}
