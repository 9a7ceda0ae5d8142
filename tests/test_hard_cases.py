"""Pivots, doubt, stages that ignore their cancel, interceptors, contexts: what stageflow and the world throw at a saga."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any
from uuid import uuid4

import anyio
import pytest
from stageflow.api import Pipeline, PipelineContext, StageContext, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from tests.controlled import elapse, run
from tests.world import BRANCHES, DIAMOND, SEQUENCE, CardDeclined, Script, World, scene

# -- pivots ------------------------------------------------------------------------------------------------------


def test_a_failure_before_the_pivot_undoes_everything() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise")}, {"b": "pivot"})

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_failure_after_the_pivot_undoes_only_what_the_pivot_does_not_stand_on_and_halts() -> None:
    shape = {"a": (), "pivot": ("a",), "beside": ("a",), "after": ("pivot",), "end": ("after", "beside")}
    world, pipeline = scene(shape, {"end": Script("raise")}, {"pivot": "pivot"})

    report = run(SagaCoordinator().run(pipeline))

    assert world.refusals == []
    assert report.status is SagaStatus.HALTED
    assert set(world.standing) == set(report.kept) == {"a", "pivot"}
    assert set(report.undone) == {"beside", "after"}


def test_a_pivot_in_flight_is_drained_before_its_outcome_decides() -> None:
    kinds = {"c": "pivot"}
    world, pipeline = scene(BRANCHES, {"b": Script("raise", before=1), "c": Script(before=5)}, kinds)

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.HALTED
    assert set(world.standing) == {"a", "c"}


def test_a_pivot_in_doubt_holds_what_it_stands_on() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang", lands=True)}, {"b": "pivot"})

    report = run(SagaCoordinator(FailFast(timeout=1)).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert (report.stages["b"].state, report.stages["a"].state) == (StageState.IN_DOUBT, StageState.BLOCKED)
    assert set(world.standing) == {"a", "b"}


# -- doubt -------------------------------------------------------------------------------------------------------


class Charge(CompensableStage):
    """Charges, and hangs after the effect; it can be asked."""

    timeout = 1.0

    def __init__(self, world: World, answers: list[Any]) -> None:
        self.world, self.answers, self.charges = world, answers, 0

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.charges += 1
        if self.charges == 1:
            self.world.land("charge")
            await asyncio.Event().wait()
        return StageOutput.ok(again=True)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        assert ctx.in_doubt
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if answer is None else StageOutput.ok(charge=answer)

    async def compensate(self, ctx: CompensationContext) -> None:
        assert ctx.output is not None
        assert ctx.output.data == {"charge": 7}
        self.world.undo("charge")


def charging(answers: list[Any], policy: FailFast) -> tuple[Charge, SagaReport]:
    world = World({"charge": ()})
    stage = Charge(world, answers)

    async def fail(_: Any) -> None:
        raise CardDeclined

    pipeline = Pipeline().with_stage("charge", stage).with_stage("fail", fail, "work", dependencies=("charge",))
    return stage, run(SagaCoordinator(policy).run(pipeline))


def test_before_a_retry_the_probe_is_asked_so_that_nothing_is_charged_twice() -> None:
    stage, report = charging([7], FailFast(retry=Retry(attempts=3, wait=0)))

    assert stage.charges == 1
    assert stage.world.log == ["+charge", "-charge"]
    assert report.status is SagaStatus.COMPENSATED
    # It was found to have completed.
    assert report.failed == ("fail",)


def test_a_probe_that_finds_nothing_lets_the_retry_go_on() -> None:
    stage, report = charging([None], FailFast(retry=Retry(attempts=2, wait=0), on_failure="halt"))

    assert stage.charges == 2
    assert report.kept["charge"].data == {"again": True}


def test_a_probe_that_keeps_failing_leaves_the_stage_in_doubt_and_is_not_retried_over() -> None:
    answers: list[Any] = [OSError("no line")] * 3

    stage, report = charging(answers, FailFast(retry=Retry(attempts=2, wait=0), compensation=Compensation(retry=Retry(attempts=3, wait=0))))

    assert stage.charges == 1
    assert answers == []
    assert report.stages["charge"].state is StageState.IN_DOUBT
    assert report.status is SagaStatus.STUCK
    assert [failure.message for failure in report.failures if failure.kind is FailureKind.COMPENSATION] == ["no line"] * 3


def test_a_probe_that_gives_nonsense_has_failed() -> None:
    class Odd(Charge):
        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return 42  # type: ignore[return-value] # what the test is about

    world = World({"charge": ()})
    pipeline = Pipeline().with_stage("charge", Odd(world, []))

    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1)))).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert "42" in report.failures[-1].message


def test_a_probe_that_hangs_is_bounded_by_the_compensations_timeout() -> None:
    class Silent(Charge):
        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            await asyncio.Event().wait()
            return None

    pipeline = Pipeline().with_stage("charge", Silent(World({"charge": ()}), []))
    policy = FailFast(compensation=Compensation(timeout=3, retry=Retry(attempts=1)))

    async def timed() -> tuple[SagaReport, float]:
        report = await SagaCoordinator(policy).run(pipeline)
        return report, asyncio.get_running_loop().time()

    report, took = run(timed())

    assert took == pytest.approx(1 + 3)
    assert report.in_doubt.keys() == {"charge"}
    assert report.failures[-1].message == "no answer within 3 s"


@pytest.mark.parametrize("lost", ["the answer", "the time", "the refund's answer", "nothing"])
def test_of_a_service_that_knows_neither_keys_nor_a_search_nothing_is_asked_twice_and_a_person_looks(lost: str) -> None:
    """As `docs/how-to/write-a-stage.md` says to go about it."""
    requests: list[str] = []

    class Pay(CompensableStage):
        retry = Retry(attempts=1)
        timeout = 5

        async def execute(self, ctx: SagaContext) -> None:
            requests.append("pay")
            if lost == "the answer":
                await ctx.record("no answer")
                raise ConnectionError
            if lost == "the time":
                await asyncio.Event().wait()

        async def compensate(self, ctx: CompensationContext) -> None:
            if ctx.output is None or ctx.attempt > 1:
                raise LookupError("look by hand")
            requests.append("refund")
            if lost == "the refund's answer":
                raise ConnectionError

    _, pipeline = scene({"a": (), "pay": (), "end": ("a", "pay")}, {"end": Script("raise")})
    stages = pipeline.stages | {"pay": replace(pipeline.stages["pay"], runner=Pay)}

    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=3, wait=0))).run(replace(pipeline, stages=stages)))

    assert requests == (["pay"] if lost in {"the answer", "the time"} else ["pay", "refund"])
    assert report.status is (SagaStatus.COMPENSATED if lost == "nothing" else SagaStatus.STUCK)
    assert {*report.stuck, *report.in_doubt} == (set() if lost == "nothing" else {"pay"})


def test_an_attempt_that_raised_is_followed_by_another_one_before_its_probe_is_asked() -> None:
    told: list[str] = []

    class Pay(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            told.append("paid")
            raise ConnectionError

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            told.append("asked")
            return StageOutput.ok()

        async def compensate(self, ctx: CompensationContext) -> None: ...

    run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0))).run(Pipeline(name="p").with_stage("pay", Pay)))

    assert told == ["paid", "paid", "asked"]


def test_a_compensation_that_copes_with_doubt_is_asked_to() -> None:
    seen: list[tuple[bool, Any]] = []

    async def charge(_: Any) -> None:
        await asyncio.Event().wait()

    async def refund(ctx: CompensationContext) -> None:
        seen.append((ctx.in_doubt, ctx.output))

    pipeline = Pipeline().with_stage("charge", compensable(charge, refund, timeout=1.0, compensate_in_doubt=True))

    report = run(SagaCoordinator().run(pipeline))

    assert seen == [(True, None)]
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["charge"].state is StageState.UNDONE


def test_a_plain_stage_that_times_out_has_nothing_to_be_in_doubt_about() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang")}, {"b": "plain"})

    report = run(SagaCoordinator(FailFast(timeout=1)).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["b"].state is StageState.FAILED
    assert world.standing == {}


def test_a_stage_that_answers_in_spite_of_its_timeout_has_completed() -> None:
    class Stubborn(CompensableStage):
        timeout = 1.0

        async def execute(self, ctx: SagaContext) -> StageOutput:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await elapse(1)
            return StageOutput.ok(committed=True)

        async def compensate(self, ctx: CompensationContext) -> None: ...

    report = run(SagaCoordinator().run(Pipeline().with_stage("stubborn", Stubborn)))

    assert report.status is SagaStatus.COMPLETED
    assert report.kept["stubborn"].data == {"committed": True}


def test_an_attempt_in_doubt_is_not_answered_for_by_a_later_one_that_fails() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang", lands=True, then=("fail",))})

    report = run(SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2, wait=0))).run(pipeline))

    assert report.stages["b"].state is StageState.IN_DOUBT
    assert report.status is SagaStatus.STUCK
    assert set(world.standing) == {"a", "b"}


# -- code that ignores its cancel --------------------------------------------------------------------------------


async def deaf(released: asyncio.Event) -> None:
    """Ignore every cancel until released."""
    while not released.is_set():
        try:
            await released.wait()
        except asyncio.CancelledError:
            continue


@pytest.mark.parametrize("policy", [FailFast(timeout=10, cancel_grace=2), FailFast(deadline=10, cancel_grace=2)])
def test_a_stage_that_ignores_its_cancel_is_given_up_in_time(policy: FailFast) -> None:
    world, pipeline = scene({"a": ()})
    released = asyncio.Event()

    class Deaf(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            await deaf(released)

        async def compensate(self, ctx: CompensationContext) -> None:
            raise AssertionError("nobody knows whether there is anything to undo")

    pipeline = pipeline.with_stage("deaf", Deaf, dependencies=("a",))

    async def timed() -> tuple[SagaReport, float]:
        report = await SagaCoordinator(policy).run(pipeline)
        took = asyncio.get_running_loop().time()
        released.set()
        return report, took

    report, took = run(timed())

    assert took == pytest.approx(12)
    assert report.status is SagaStatus.STUCK
    assert report.stages["deaf"].state is StageState.IN_DOUBT
    assert report.stages["deaf"].failure is not None
    assert report.stages["deaf"].failure.stage == "deaf"
    assert "ignored its cancel for 2 s" in report.stages["deaf"].failure.message
    assert set(world.standing) == {"a"}


def test_a_fallback_stands_in_for_a_stage_that_was_given_up() -> None:
    released = asyncio.Event()

    async def slow(_: Any) -> None:
        await deaf(released)

    pipeline = Pipeline().with_stage("slow", slow, "work")
    policy = ContinueWithFallback(timeout=1, cancel_grace=1, fallbacks={"slow": {"x": 1}})

    async def released_at_the_end() -> SagaReport:
        report = await SagaCoordinator(policy).run(pipeline)
        released.set()
        return report

    report = run(released_at_the_end())

    assert report.status is SagaStatus.DEGRADED
    assert report.kept["slow"].data == {"x": 1}


@pytest.mark.parametrize("others", [0, 1])
def test_a_compensation_that_ignores_its_cancel_is_given_up_and_the_others_go_on(others: int) -> None:
    released = asyncio.Event()
    world, pipeline = scene({"a": (), "x": ()}, {"x": Script(undo_takes=5 * others)})

    async def noop(_: Any) -> None: ...

    async def undo(_: CompensationContext) -> None:
        await deaf(released)

    async def fail(_: Any) -> None:
        raise CardDeclined

    pipeline = pipeline.with_stage("deaf", compensable(noop, undo), dependencies=("a",))
    pipeline = pipeline.with_stage("fail", fail, "work", dependencies=("deaf", "x"))
    policy = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1), max_concurrency=1))

    async def timed() -> SagaReport:
        report = await SagaCoordinator(policy).run(pipeline)
        released.set()
        return report

    report = run(timed())

    assert report.status is SagaStatus.STUCK
    assert (report.stages["deaf"].state, report.stages["a"].state) == (StageState.STUCK, StageState.BLOCKED)
    assert report.stages["x"].state is StageState.UNDONE
    assert set(world.standing) == {"a"}
    undo_report = report.stages["deaf"].compensation
    assert undo_report is not None
    assert undo_report.failure is not None
    assert "may still be running" in undo_report.failure.message


@pytest.mark.parametrize(("of_stage", "of_policy", "expected"), [(5.0, 60.0, 5.0), (None, 60.0, 60.0)])
@pytest.mark.parametrize("heeds_cancel", [True, False])
def test_a_fallback_that_hangs_has_failed_when_its_time_is_up(
    of_stage: float | None, of_policy: float, expected: float, heeds_cancel: bool
) -> None:
    released = asyncio.Event()

    class Hanging(CompensableStage):
        timeout = of_stage

        async def execute(self, ctx: SagaContext) -> None:
            raise CardDeclined

        async def fallback(self, ctx: SagaContext, failure: Any) -> None:
            await (asyncio.Event().wait() if heeds_cancel else deaf(released))

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def timed() -> tuple[SagaReport, float]:
        policy = ContinueWithFallback(timeout=of_policy, cancel_grace=2)
        report = await SagaCoordinator(policy).run(Pipeline().with_stage("hanging", Hanging))
        took = asyncio.get_running_loop().time()
        released.set()
        return report, took

    report, took = run(timed())

    assert took == pytest.approx(expected if heeds_cancel else expected + 2)
    assert report.status is SagaStatus.COMPENSATED
    assert [failure.stage for failure in report.failures] == ["hanging", "hanging"]


def test_a_fallback_that_hangs_is_cut_off_when_the_saga_is_interrupted() -> None:
    class Hanging(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            raise CardDeclined

        async def fallback(self, ctx: SagaContext, failure: Any) -> None:
            await asyncio.Event().wait()

        async def compensate(self, ctx: CompensationContext) -> None: ...

    report = run(SagaCoordinator(ContinueWithFallback(deadline=5)).run(Pipeline().with_stage("hanging", Hanging)))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.kind is FailureKind.TIMEOUT
    assert "its fallback failed: CancelledError: the saga stopped before it had answered" in str(report)


AGAIN = Retry(attempts=2, jitter=False)
FALLBACKS: dict[str, dict[str, Any]] = {"asked": {"instead": True}, "beside": {}}


@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize(
    ("policy", "script"),
    [
        (FailFast(retry=AGAIN, timeout=1.0, deadline=2.0), Script("hang")),
        (FailFast(retry=AGAIN, timeout=1.0, in_flight="cancel"), Script("hang")),
        (FailFast(retry=AGAIN, timeout=1.0, drain_timeout=1.0), Script("hang")),
        (FailFast(retry=AGAIN, deadline=2.0), Script("raise", then=("cancel",))),
        (FailFast(retry=AGAIN, deadline=2.0), Script("raise", then=("skip",))),
        (ContinueWithFallback(timeout=1.0, deadline=2.0, fallbacks=FALLBACKS), Script("hang")),
        (ContinueWithFallback(deadline=2.0, fallbacks=FALLBACKS), Script("raise", before=1.0)),
    ],
    ids=["deadline", "in_flight", "drain_timeout", "then a cancel", "then a skip", "then a fallback", "then a fallback of one that raised"],
)
def test_a_probe_that_is_cut_off_because_the_saga_stops_is_asked_again_on_its_way_back(policy: Any, script: Script, lands: bool) -> None:
    """Nobody has to look into what the outside world can tell."""
    script = replace(script, lands=lands, probe_takes=9.0, attempts=[])
    scripts = {"asked": script, "beside": Script("raise", before=0.9)}
    world, pipeline = scene({"first": (), "asked": ("first",), "beside": ()}, scripts, {"asked": "probed"})

    report = run(SagaCoordinator(policy).run(pipeline))

    cut_off = [failure.message for failure in report.failures if failure.stage == "asked" and failure.kind is FailureKind.INTERRUPTED]
    assert cut_off == ["the saga stopped before its probe had answered"]
    assert "fallback failed" not in str(report)
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert world.undone() == (["asked", "first"] if lands else ["first"])


@pytest.mark.parametrize("in_flight", ["drain", "cancel"])
@pytest.mark.parametrize("without_fallback", ["fail", "skip_branch"])
def test_no_fallback_begins_when_the_saga_has_stopped_while_its_probe_was_asked(in_flight: Any, without_fallback: Any) -> None:
    world, pipeline = scene({"beside": ()}, {"beside": Script("cancel", before=2)})
    began: list[str] = []

    class Asked(CompensableStage):
        timeout = 1.0

        async def execute(self, ctx: SagaContext) -> None:
            world.land("asked")
            await elapse(100)

        async def compensate(self, ctx: CompensationContext) -> None:
            world.undo("asked")

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            if not began:
                began.append("probe")
                await elapse(9)
                raise CardDeclined("who asks?")
            return StageOutput.ok() if "asked" in world.standing else None

        async def fallback(self, ctx: SagaContext, failure: Failure) -> None:
            began.append("fallback")

    once = Compensation(retry=Retry(attempts=1))
    policy = ContinueWithFallback(in_flight=in_flight, without_fallback=without_fallback, on_cancel="compensate", compensation=once)

    report = run(SagaCoordinator(policy).run(pipeline.with_stage("asked", Asked())))

    assert began == ["probe"]
    assert report.fallbacks == ()


# -- cancels of every kind ---------------------------------------------------------------------------------------


def interrupted_during_compensation(wait: Any) -> tuple[World, SagaReport]:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise", before=1), "b": Script(undo_takes=10), "a": Script(undo_takes=10)})
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        await wait(coordinator.run(pipeline, saga_id="s"))
        return await coordinator.report("s")

    return world, run(play())


async def by_wait_for(saga: Any) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(saga, 5)


async def by_timeout(saga: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(5):
            await saga

    with pytest.raises(TimeoutError):
        await limited()


async def by_task_group(saga: Any) -> None:
    async def fail() -> None:
        await elapse(5)
        raise CardDeclined

    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(saga)
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        await grouped()


async def by_anyio_scope(saga: Any) -> None:
    with anyio.move_on_after(5) as scope:
        await saga
    assert scope.cancelled_caught


async def by_many_cancels(saga: Any) -> None:
    task = asyncio.create_task(saga)
    for _ in range(5):
        await elapse(4)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_cancelling_every_task(saga: Any) -> None:
    # What asyncio.run does when its main task has ended, and servers on shutdown.
    asyncio.create_task(saga)  # noqa: RUF006 - found again among all tasks
    await elapse(5)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    mine = [task for task in others if "watched" not in repr(task)]
    for task in mine:
        task.cancel()
    await asyncio.gather(*mine, return_exceptions=True)


@pytest.mark.parametrize("wait", [by_wait_for, by_timeout, by_task_group, by_anyio_scope, by_many_cancels])
def test_no_cancel_of_the_caller_interrupts_a_compensation(wait: Any) -> None:
    world, report = interrupted_during_compensation(wait)

    assert world.refusals == []
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("wait", [by_wait_for, by_timeout, by_task_group, by_anyio_scope, by_many_cancels, by_cancelling_every_task])
def test_any_cancel_of_the_caller_starts_the_compensation(wait: Any) -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script(before=20)}, dict.fromkeys("abc", "probed"))
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        await wait(coordinator.run(pipeline, saga_id="s"))
        return await coordinator.report("s")

    report = run(play())

    assert world.refusals == []
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None


def test_a_compensation_whose_task_is_cancelled_from_outside_is_attempted_again() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise", before=1), "b": Script(undo_takes=10)})
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        await by_cancelling_every_task(coordinator.run(pipeline, saga_id="s"))
        return await coordinator.report("s")

    report = run(play())

    assert world.refusals == ["the compensation of b was interrupted"]
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED


def test_a_stage_may_notice_that_the_saga_is_stopping() -> None:
    noticed: list[str | None] = []

    class Polite(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            for _ in range(10):
                await elapse(1)
                if ctx.is_cancelled:
                    noticed.append(ctx.cancellation_reason)
                    ctx.raise_if_cancelled()

        async def compensate(self, ctx: CompensationContext) -> None:
            raise AssertionError("it said that it had no effect")

    async def fail(_: Any) -> None:
        await elapse(3.5)
        raise CardDeclined("no")

    report = run(SagaCoordinator().run(Pipeline().with_stage("polite", Polite).with_stage("fail", fail, "work")))

    assert noticed == ["stage 'fail' raised: CardDeclined: no"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["polite"].state is StageState.CANCELLED


def test_a_blocking_thread_is_left_in_doubt() -> None:
    release = threading.Event()

    class Blocking(CompensableStage):
        timeout = 0.05

        async def execute(self, ctx: SagaContext) -> None:
            await asyncio.to_thread(release.wait)

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def play() -> SagaReport:
        report = await SagaCoordinator().run(Pipeline().with_stage("blocking", Blocking))
        release.set()
        return report

    # A thread lives in real time, so this one test does, too.
    assert asyncio.run(play()).in_doubt.keys() == {"blocking"}


# -- interceptors and contexts -----------------------------------------------------------------------------------


def test_a_pipeline_that_a_stage_runs_in_a_fork_of_the_context_is_drained_with_it() -> None:
    """Else the stage is taken to have failed, and what its pipeline did is forgotten."""
    world, pipeline = scene({"fails": ()}, {"fails": Script("raise", before=5)})
    contexts: list[PipelineContext] = []
    context = PipelineContext.create()
    context.add_before_stage_start_hook(lambda *told: contexts.append(told[3]))

    async def within(_: StageContext) -> None:
        await elapse(2)
        world.land("within")
        await elapse(20)

    class Runs(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            fork = contexts[0].fork(child_run_id=uuid4(), parent_stage_id="runs", correlation_id=uuid4())
            await Pipeline(name="inner").with_stage("within", within, "work").run(fork)

        async def compensate(self, ctx: CompensationContext) -> None:
            world.undo("within")

    report = run(SagaCoordinator(FailFast(cancel_grace=2)).run(pipeline.with_stage("runs", Runs()), context))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+within", "-within"]


def test_a_stage_that_its_condition_skips_is_in_the_report_of_a_saga_that_fails() -> None:
    async def extra(_: Any) -> None:
        raise AssertionError("it was to be skipped")

    async def route(_: Any) -> StageOutput:
        return StageOutput.ok(skip_reason="not today")

    _, pipeline = scene({"a": ()}, {"a": Script("raise", before=1)})
    pipeline = pipeline.with_stage("route", route, "route").with_stage("extra", extra, "work", dependencies=("route",), conditional=True)

    report = run(SagaCoordinator().run(pipeline))

    assert report.cause is not None
    assert report.skipped == ("extra",)


def test_a_stage_that_its_condition_skips_is_in_the_report() -> None:
    async def route(_: Any) -> StageOutput:
        return StageOutput.ok(skip_reason="not today")

    async def extra(_: Any) -> None:
        raise AssertionError("it was to be skipped")

    for last in (False, True):
        pipeline = Pipeline().with_stage("route", route, "route")
        pipeline = pipeline.with_stage("extra", extra, "work", dependencies=("route",), conditional=True)
        if not last:
            pipeline = pipeline.with_stage("after", route, "route", dependencies=("extra",))

        report = run(SagaCoordinator().run(pipeline))

        assert report.status is SagaStatus.COMPLETED
        assert report.skipped == ("extra",)
        assert report.stages["extra"].skip_reason == "not today"


def test_a_stage_that_skips_itself_has_nothing_to_undo() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("skip"), "c": Script("raise")})

    report = run(SagaCoordinator().run(pipeline))

    assert report.stages["b"].state is StageState.SKIPPED
    assert world.log == ["+a", "-a"]


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_context_that_is_cancelled_stops_the_saga_and_keeps_what_was_done(when: str) -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=5)})
    context = PipelineContext.create(input_text="x")

    async def play() -> SagaReport:
        running = asyncio.create_task(SagaCoordinator().run(pipeline, context))
        if when == "during":
            await elapse(2)
        context.mark_canceled("enough")
        return await running

    report = run(play())

    assert report.status is SagaStatus.CANCELLED
    assert report.cause is not None
    assert report.cause.message == "enough"
    assert set(world.standing) == (set() if when == "before" else {"a", "b"})


def test_the_callers_context_is_left_as_it_was() -> None:
    _, pipeline = scene(SEQUENCE)
    context = PipelineContext.create(data={"mine": 1})

    run(SagaCoordinator().run(pipeline, context))

    assert context.data == {"mine": 1}


def test_a_stage_gets_stageflows_context_and_what_a_saga_adds() -> None:
    seen: list[SagaContext] = []

    async def look(ctx: Any) -> StageOutput:
        assert isinstance(ctx, SagaContext)
        seen.append(ctx)
        return StageOutput.retry("again") if ctx.attempt == 1 else StageOutput.ok()

    pipeline = Pipeline().with_stage("look", look, "enrich")

    run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0))).run(pipeline, input_text="hello", saga_id="s"))

    assert [ctx.attempt for ctx in seen] == [1, 2]
    assert {ctx.idempotency_key for ctx in seen} == {"s/look"}
    assert {ctx.saga_id for ctx in seen} == {"s"}
    assert seen[0].snapshot.input_text == "hello"
    assert seen[0].snapshot.topology == "pipeline"
    assert not seen[0].is_cancelled
    assert seen[0].cancellation_reason is None


def test_a_compensation_learns_all_that_it_needs() -> None:
    seen: list[CompensationContext] = []

    async def base(_: Any) -> StageOutput:
        return StageOutput.ok(base=1)

    async def book(ctx: Any) -> StageOutput:
        await ctx.record("seat 1")
        return StageOutput.ok(booking=[1, 2])

    async def cancel(ctx: CompensationContext) -> None:
        seen.append(ctx)
        if ctx.attempt == 1:
            assert ctx.output is not None
            ctx.output.data["booking"].append("mine to change")
            raise CardDeclined

    async def fail(_: Any) -> None:
        raise CardDeclined("why")

    pipeline = Pipeline().with_stage("base", base, "enrich").with_stage("book", compensable(book, cancel), dependencies=("base",))
    pipeline = pipeline.with_stage("fail", fail, "work", dependencies=("book",))

    report = run(SagaCoordinator().run(pipeline, saga_id="s", input_text="in"))

    second = seen[1]
    assert (second.saga_id, second.stage_name, second.attempt, second.in_doubt) == ("s", "book", 2, False)
    assert second.output == StageOutput.ok(booking=[1, 2])
    assert second.effects == ("seat 1",)
    assert (second.forward_key, second.idempotency_key) == ("s/book", "s/book/undo")
    assert second.inputs == {"base": StageOutput.ok(base=1)}
    assert second.cause is not None
    assert second.cause.message == "why"
    assert second.snapshot.input_text == "in"
    assert report.undone["book"] == StageOutput.ok(booking=[1, 2])


def test_a_class_with_config_an_instance_a_callable_and_a_pivot_run_in_one_pipeline() -> None:
    world, pipeline = scene(DIAMOND, {}, {"b": "pivot", "c": "plain"})

    class Configured(CompensableStage):
        made = 0

        def __init__(self, amount: int) -> None:
            self.amount = amount
            Configured.made += 1
            self.executed = False

        async def execute(self, ctx: SagaContext) -> StageOutput:
            self.executed = True
            return StageOutput.ok(amount=self.amount)

        async def compensate(self, ctx: CompensationContext) -> None:
            assert self.executed, "it has to be the object that ran"
            world.log.append("-configured")

    class Acts:
        async def __call__(self, ctx: StageContext) -> dict[str, int]:
            raise CardDeclined

    pipeline = pipeline.with_stage("configured", Configured, config={"amount": 5})
    pipeline = pipeline.with_stage("call", Acts(), "work", dependencies=("configured",))

    report = run(SagaCoordinator().run(pipeline))

    assert "-configured" in world.log
    assert report.stages["configured"].output == StageOutput.ok(amount=5)


def test_sys_exit_in_a_stage_is_a_failure_like_any_other() -> None:
    world, pipeline = scene(SEQUENCE)

    async def leave(_: Any) -> None:
        raise SystemExit(3)

    report = run(SagaCoordinator().run(pipeline.with_stage("leave", leave, "work", dependencies=("c",))))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.type == "SystemExit"
    assert world.standing == {}


# -- loops whose tasks are made in another way -------------------------------------------------------------------


def plain_tasks(loop: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(work, loop=loop, **options)


def eager_tasks(loop: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
    """What asyncio.eager_task_factory does from Python 3.12 on: the first step is run before the maker has its task."""
    task, maker = asyncio.Task(work, loop=loop, **options), asyncio.current_task(loop)
    first_step = loop._ready.pop()
    if maker is not None:
        asyncio.tasks._leave_task(loop, maker)
    first_step._run()
    if maker is not None:
        asyncio.tasks._enter_task(loop, maker)
    return task


FACTORIES = [plain_tasks, getattr(asyncio, "eager_task_factory", eager_tasks)]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
@pytest.mark.parametrize("outcome", ["ok", "raise", "fail", "hang", "cancel"])
@pytest.mark.parametrize("policy", [FailFast(timeout=5), ContinueWithFallback(timeout=5, fallbacks={"c": {}})])
def test_a_task_factory_of_the_users_changes_nothing(policy: FailFast | ContinueWithFallback, outcome: str, factory: Any) -> None:
    def report_of(with_factory: bool) -> tuple[Any, ...]:
        world, pipeline = scene(DIAMOND, {"c": Script(outcome, before=1)})

        async def play() -> SagaReport:
            if with_factory:
                asyncio.get_running_loop().set_task_factory(factory)
            return await SagaCoordinator(policy).run(pipeline)

        report = run(play())
        return report.status, {name: stage.state for name, stage in report.stages.items()}, sorted(world.log), world.refusals

    assert report_of(with_factory=True) == report_of(with_factory=False)


class Refunds(CompensableStage):
    """A card that is charged; its refund gets through, and the bank's answer does not."""

    def __init__(self, world: World, *, gets_through: bool) -> None:
        self.world, self.gets_through = world, gets_through

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.world.land("charge")
        return StageOutput.ok(receipt=9)

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.gets_through:
            self.world.undo("charge")
        await asyncio.Event().wait()

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(receipt=9) if "charge" in self.world.standing else None


@pytest.mark.parametrize("gets_through", [True, False])
def test_what_cannot_be_undone_is_asked_before_it_is_called_stuck(gets_through: bool) -> None:
    """On resume(forward=True) it would be called kept: goods would be sent for a charge that was refunded."""
    world = World({"charge": ()})

    async def fail(_: Any) -> None:
        raise CardDeclined

    pipeline = Pipeline().with_stage("charge", Refunds(world, gets_through=gets_through))
    pipeline = pipeline.with_stage("fail", fail, "work", dependencies=("charge",))

    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1), timeout=1))).run(pipeline))

    assert report.status is (SagaStatus.COMPENSATED if gets_through else SagaStatus.STUCK)
    assert report.stages["charge"].state is (StageState.UNDONE if gets_through else StageState.STUCK)
    assert [failure.kind for failure in report.failures] == [FailureKind.EXCEPTION, FailureKind.COMPENSATION]
