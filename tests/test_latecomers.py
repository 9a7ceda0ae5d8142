"""What ignores its cancel is given up in time; what it comes to later is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from stageflow.api import Pipeline, StageContext, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    LedgerError,
    MemoryLedger,
    MisuseError,
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
    SagaEnded,
    SagaTurnedBack,
    StageCompleted,
    StageSettled,
)
from saga.failures import Failure, FailureKind
from saga.ledgers.sqlite import SQLiteLedger
from tests.controlled import ControlledLoop, elapse, run
from tests.late import (
    INSTEAD,
    LOSS,
    PROMPT,
    Deaf,
    DeafPivot,
    DeniedByProbe,
    Doubtful,
    Stays,
    Tolerant,
    lost,
    nested_in,
    settled_down,
    while_slow_is_undone,
)
from tests.slow import SlowLedger
from tests.world import Script, World, nothing, scene


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


def test_the_caller_gets_its_report_in_time_and_the_late_completion_is_recorded_and_undone_on_resume() -> None:
    world, stage, first, late, resumed = play()

    assert first.status is SagaStatus.STUCK
    assert first.stages["deaf"].state is StageState.IN_DOUBT
    assert first.cause is not None
    assert "ignored its cancel for 2 s and was given up; it may still be running" in first.cause.message
    assert late.status is SagaStatus.STUCK
    assert late.stages["deaf"].state is StageState.BLOCKED
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
    assert late.stages["deaf"].state is (StageState.UNDONE if undo else StageState.BLOCKED)
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


def test_a_compensation_that_fails_is_not_tried_again_under_what_was_heard_of_beside_it_meanwhile() -> None:
    """Promise 1."""
    world, pipeline = scene({"a": (), "slow": ()}, {"a": Script(undo_fails=1, undo_takes=20), "slow": Script(undo_takes=5)})
    world.dependencies["deaf"] = ("a",)
    patient = PROMPT.model_copy(update={"compensation": Compensation(retry=Retry(attempts=2, wait=10, jitter=False))})

    async def main() -> SagaReport:
        stage = Doubtful(world)
        running = SagaCoordinator(patient).run(pipeline.with_stage("deaf", stage, dependencies=("a",)), saga_id="s")
        return await while_slow_is_undone(running, world, stage)

    report = run(main())

    assert world.refusals == []
    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["slow", "deaf", "a"]


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
    world, pipeline = scene({"other": (), "a": ()}, {"a": Script(undo_fails=1)})
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
    assert not any(failure.of_probe for failure in report.failures)
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


def test_what_a_stage_says_late_makes_no_line_of_its_own_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    world, _ = scene({})
    stage = DeniedByProbe(world)
    stage.outcome = lambda: StageOutput.fail("the line broke\nsaga s: ended")

    async def main() -> None:
        await SagaCoordinator(PROMPT).run(Pipeline().with_stage("deaf", stage), saga_id="s\nsaga t")
        stage.released.set()
        await settled_down()

    run(main())

    (told,) = caplog.messages
    assert told.startswith("saga s saga t: stage 'deaf' reported a failure: the line broke saga s: ended, after it had been given up")


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


class RecordsLate(Doubtful):
    async def execute(self, ctx: SagaContext) -> None:
        await self._wait()
        await ctx.record("14A")


def test_what_came_late_before_its_turn_and_waits_for_a_person_halts_nothing() -> None:
    world, pipeline = scene({"first": (), "deaf": (), "slow": ()}, {"slow": Script(undo_takes=20)})
    policy = PROMPT.model_copy(update={"compensation": Compensation(max_concurrency=1, on_failure="halt")})

    async def main() -> SagaReport:
        stage = RecordsLate(world)
        run_in_turn = SagaCoordinator(policy).run(pipeline.with_stage("deaf", stage), saga_id="s")
        return await while_slow_is_undone(run_in_turn, world, stage, after=5)

    report = run(main())

    assert world.undone() == ["slow", "first"]
    assert [*report.in_doubt] == ["deaf"]
    assert report.stages["deaf"].compensation is None


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
    assert late.stages["deaf"].state is StageState.IN_DOUBT
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
    assert late.stages["deaf"].state is StageState.IN_DOUBT
    assert len(stage.undone_with) == 1
    assert resumed.status is (SagaStatus.COMPLETED if forward else SagaStatus.COMPENSATED)
    assert resumed.stages["deaf"].state is (StageState.KEPT if forward else StageState.UNDONE)
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


class Unanswered(Deaf):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        raise OSError


BEHIND = "Still in effect, landed behind a fallback: deaf."


@pytest.mark.parametrize(
    ("kind", "fails", "status"),
    [
        (Deaf, True, SagaStatus.HALTED),
        (DeniedByProbe, True, SagaStatus.HALTED),
        (Unanswered, True, SagaStatus.HALTED),
        (DeafPivot, False, SagaStatus.DEGRADED),
    ],
)
def test_the_report_says_what_came_late_behind_a_fallback_and_stands(kind: Callable[[World], Any], fails: bool, status: SagaStatus) -> None:
    world, pipeline = scene({"end": ()}, {"end": Script("raise" if fails else "ok")}, {"end": "plain"})

    async def main() -> list[SagaReport]:
        stage = kind(world)
        whole = Pipeline(name="trip").with_stage("deaf", stage).with_stage("end", pipeline.stages["end"].runner, dependencies=("deaf",))
        coordinator = SagaCoordinator(INSTEAD.model_copy(update={"on_failure": "halt"}))
        first = await coordinator.run(whole, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await coordinator.compensate("s", whole)]

    first, late, undone = run(main())

    assert first.stages["end"].state is (StageState.FAILED if fails else StageState.KEPT)
    assert late.status is status
    assert [BEHIND in str(report).splitlines() for report in (first, late, undone)] == [False, True, "deaf" in world.standing]


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

    ledger = MemoryLedger()

    async def main() -> tuple[SagaReport, SagaReport, SagaReport]:
        stage = Deaf(world, deaf_undo=True)

        async def fail(_: Any) -> None:
            raise ValueError

        whole = pipeline.with_stage("deaf", stage, dependencies=("a",)).with_stage("fail", fail, "work", dependencies=("deaf",))
        policy = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1)))
        coordinator = SagaCoordinator(policy, ledger=ledger)
        first = await coordinator.run(whole, saga_id="s")
        stage.released.set()
        for _ in range(20):
            await asyncio.sleep(0)
        return first, await coordinator.report("s"), await coordinator.resume("s", whole)

    first, late, resumed = run(main())

    assert first.stages["deaf"].state is StageState.STUCK
    assert late.stages["deaf"].state is StageState.UNDONE
    assert late.status is SagaStatus.STUCK
    assert set(late.blocked) == {"a"}
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.undone() == ["deaf", "a"]
    completed = [event for event in run(ledger.read("s")) if isinstance(event, CompensationCompleted)]
    assert [(event.stage, event.late) for event in completed] == [("deaf", True), ("a", False)]


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
    ledger, saga_id = Unreadable(), "s\nsaga t"

    async def main() -> None:
        stage = Deaf(world)
        trip = pipeline.with_stage("deaf", stage, dependencies=("slow",))
        await SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}), ledger=ledger).run(trip, saga_id=saga_id)
        other = SagaCoordinator(ledger=ledger)
        await other.settle(saga_id, "deaf", "undone", "not in their books")
        await while_slow_is_undone(other.compensate(saga_id, trip), world, stage)
        ledger.is_gone = True
        await elapse(2)

    with caplog.at_level(logging.WARNING, "saga"):
        run(main())

    waits, lost = caplog.messages
    assert "waits to be recorded: saga s saga t is held by" in waits
    assert "(StageCompleted) could not be recorded; look at its stages in the outside world" in lost
    assert waits.startswith("saga s saga t: ")
    assert lost.startswith("saga s saga t: ")


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


def test_a_program_may_wait_for_what_was_given_up_before_it_closes_its_ledger(tmp_path: Path) -> None:
    """What it came to was lost with the end of asyncio.run, behind that of the ledger."""
    world, pipeline = scene({"a": ()})
    stage = Deaf(world)
    pipeline = pipeline.with_stage("deaf", stage, dependencies=("a",))

    async def main() -> tuple[SagaReport, bool]:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            coordinator = SagaCoordinator(FailFast(timeout=0.01, cancel_grace=0.01), ledger=ledger)
            report = await coordinator.run(pipeline, saga_id="s")
            winding_up = asyncio.create_task(coordinator.wind_up())
            await ledger.read("s")
            has_waited = not winding_up.done()
            stage.released.set()
            await winding_up
        return report, has_waited

    async def look() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            return await SagaCoordinator(ledger=ledger).report("s")

    first, has_waited = asyncio.run(main())
    late = asyncio.run(look())

    assert has_waited
    assert set(first.in_doubt) == {"deaf"}
    assert late.in_doubt == {}
    assert late.stages["deaf"].late_output == StageOutput.ok(seat="14A")


def test_a_program_that_winds_up_waits_for_its_sagas_and_for_compensations_that_were_given_up() -> None:
    world, pipeline = scene({"a": ()}, {"a": Script(before=5)})
    policy = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1)))

    async def main() -> tuple[float, list[SagaReport]]:
        coordinator = SagaCoordinator(policy)
        stage = Deaf(world, deaf_undo=True)
        stage.released.set()
        going = asyncio.create_task(coordinator.run(pipeline.with_stage("deaf", stage, dependencies=("a",)), saga_id="s"))
        await elapse(1)
        await coordinator.wind_up()
        assert coordinator._keeper.held.sagas == {}
        stage.released.clear()
        stuck = await coordinator.compensate("s", pipeline.with_stage("deaf", stage, dependencies=("a",)))
        asyncio.get_running_loop().call_later(30, stage.released.set)
        await coordinator.wind_up()
        return asyncio.get_running_loop().time(), [await going, stuck, await coordinator.report("s")]

    ended_at, (completed, stuck, late) = run(main())

    assert [completed.status, stuck.status] == [SagaStatus.COMPLETED, SagaStatus.STUCK]
    assert late.stages["deaf"].state is StageState.UNDONE
    assert ended_at == 47.0


def test_a_wait_for_what_was_given_up_ends_when_whoever_waits_has_waited_enough() -> None:
    world, pipeline = scene({"a": ()})
    stage = Deaf(world)

    async def main() -> SagaReport:
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2))
        report = await coordinator.run(pipeline.with_stage("deaf", stage, dependencies=("a",)), saga_id="s")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await coordinator.wind_up()
        stage.released.set()
        await coordinator.wind_up()
        return report

    assert set(run(main()).in_doubt) == {"deaf"}


class Releases(CompensableStage):
    """Fails, and when it is asked whether its effect has landed, another stage comes to its end."""

    def __init__(self, deaf: Deaf) -> None:
        self.deaf = deaf

    async def execute(self, ctx: SagaContext) -> StageOutput:
        raise ConnectionError("no line")

    async def compensate(self, ctx: CompensationContext) -> None: ...

    async def probe(self, ctx: CompensationContext) -> None:
        self.deaf.released.set()
        await elapse(1)


def test_a_wait_for_what_came_late_ends_when_whoever_waits_has_waited_enough_while_it_is_recorded() -> None:
    """The cancel was swallowed, and with it the time limit."""
    stage = Deaf(World({}))
    trip = Pipeline(name="trip").with_stage("deaf", stage).with_stage("releases", Releases(stage))

    async def main() -> SagaReport:
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}), ledger=SlowLedger(seconds=5))
        await coordinator.run(trip, saga_id="s")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await coordinator.wind_up()
        await coordinator.wind_up()
        return await coordinator.report("s")

    assert run(main()).stages["deaf"].late_output is not None


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
    assert report.stages["deaf"].state is StageState.BLOCKED


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


@pytest.mark.parametrize(
    ("retried", "becomes"), [(False, [StageState.STUCK, StageState.UNDONE]), (True, [StageState.KEPT, StageState.IN_DOUBT])]
)
def test_a_compensation_comes_late_to_what_is_used_by_what_came_late_before(retried: bool, becomes: list[StageState]) -> None:
    """What is stuck it has undone; of what is kept, to be undone once more if need be, a person says whether it stands."""
    world = World({"deaf": ()})
    released = asyncio.Event()

    async def tells(_: StageContext) -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    async def main() -> list[SagaReport]:
        stage = Deaf(world, deaf_undo=True)
        pipeline = Pipeline().with_stage("deaf", stage).with_stage("tells", tells, "work", dependencies=("deaf",))
        once = Compensation(timeout=10, retry=Retry(attempts=1))
        policy = ContinueWithFallback(timeout=10, cancel_grace=2, without_fallback="skip_branch", compensation=once)
        coordinator = SagaCoordinator(policy)
        reports = [await coordinator.run(pipeline, saga_id="s")]
        if retried:
            await coordinator.settle("s", "deaf", "retry", "they answer again")
        for comes_late in (released, stage.released):
            comes_late.set()
            await settled_down()
            reports.append(await coordinator.report("s"))
        return reports

    first, used, late = run(main())

    assert first.stages["deaf"].state is StageState.STUCK
    assert [*used.kept] == [*(["deaf"] if retried else []), "tells"]
    assert [used.stages["deaf"].state, late.stages["deaf"].state] == becomes
    assert world.standing == {}


@pytest.mark.parametrize("hook", ["fallback", "probe"])
def test_a_program_that_winds_up_waits_for_a_fallback_or_a_probe_that_was_given_up(hook: str) -> None:
    """What a fallback recorded came when the ledger was closed, and nobody was asked about it."""
    released, ended = asyncio.Event(), []

    async def book(_: SagaContext) -> None:
        raise ValueError("no")

    async def cancel(_: CompensationContext) -> None: ...

    async def never_heeds(ctx: Any, *_: Any) -> StageOutput | None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()
        ended.append(hook)
        if hook == "probe":
            return None
        await ctx.record({"seat": "14A"})
        return StageOutput.ok()

    hooks: dict[str, Any] = {hook: never_heeds}
    pipeline = Pipeline().with_stage("book", compensable(book, cancel, **hooks))
    policy = ContinueWithFallback(timeout=10, cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1)))

    async def main() -> SagaReport:
        coordinator = SagaCoordinator(policy)
        await coordinator.run(pipeline, saga_id="s")
        assert ended == []
        asyncio.get_running_loop().call_later(30, released.set)
        await coordinator.wind_up()
        return await coordinator.report("s")

    report = run(main())

    assert ended == [hook]
    assert [failure.kind for failure in report.failures].count(FailureKind.LATE) == (hook == "fallback")


def test_what_a_probe_said_before_its_stage_completed_late_is_told_no_more_once_it_says_otherwise() -> None:
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Stays(world)
        pipeline = nested_in(stage)
        coordinator = SagaCoordinator(PROMPT)
        first = await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.resume("s", pipeline), await coordinator.resume("s", pipeline, forward=True)]

    first, stuck, forward = run(main())

    assert (first.status, first.stages["deaf"].probed) == (SagaStatus.COMPENSATED, False)
    assert (stuck.status, stuck.stages["deaf"].probed) == (SagaStatus.STUCK, True)
    assert (forward.status, world.standing) == (SagaStatus.COMPLETED, {"deaf": 1})
    assert "asked, it had landed" in str(forward)
