"""Code of a stage that leaves something behind on its task, or ends as no code should: it harms itself, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from collections.abc import Awaitable, Callable
from contextvars import Context, ContextVar
from typing import Any, TypeVarTuple

import anyio
import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    LedgerError,
    MemoryLedger,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    SagaUnrecorded,
    StageState,
    compensable,
)
from saga.events import SagaStarted, SagaTurnedBack, StageProbed, StageStarted
from tests.controlled import ControlledLoop, elapse, run
from tests.growth import growth
from tests.slow import SlowDisk, SlowLedger
from tests.world import Script, nothing, scene

Code = Callable[[Any], Awaitable[Any]]
Ts = TypeVarTuple("Ts")
WHO: ContextVar[str] = ContextVar("WHO", default="the caller")


async def fails(*_: Any) -> None:
    raise ConnectionError("no line")


def staged(*stages: tuple[str, Any]) -> Pipeline:
    """A chain."""
    pipeline = Pipeline(name="p")
    for name, runner in stages:
        pipeline = pipeline.with_stage(name, runner, "work", dependencies=list(pipeline.stages)[-1:])
    return pipeline


def this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def leaves_a_watchdog(_: Any) -> None:
    asyncio.get_running_loop().call_later(1.0, this_task().cancel)


async def leaves_a_timeout_open(_: Any) -> None:
    await asyncio.timeout(1.0).__aenter__()


async def leaves_a_scope_open(_: Any) -> None:
    anyio.move_on_after(1.0).__enter__()


async def cancels_itself_and_returns(_: Any) -> None:
    this_task().cancel()


LEFT_BEHIND = pytest.mark.parametrize(
    "leave", [leaves_a_watchdog, leaves_a_timeout_open, leaves_a_scope_open, cancels_itself_and_returns], ids=lambda code: code.__name__
)


@LEFT_BEHIND
def test_what_a_stage_leaves_on_its_task_strikes_no_other_stage(leave: Code) -> None:
    async def takes_long(_: SagaContext) -> None:
        await elapse(5.0)

    report = run(SagaCoordinator().run(staged(("a", compensable(leave, nothing)), ("b", compensable(takes_long, nothing)))))

    assert report.status is SagaStatus.COMPLETED


@LEFT_BEHIND
def test_what_a_compensation_leaves_on_its_task_strikes_no_other_compensation(leave: Code) -> None:
    """Promise 7."""
    calls: list[str] = []

    async def takes_long(ctx: CompensationContext) -> None:
        calls.append(ctx.stage_name)
        await elapse(5.0)

    pipeline = staged(("a", compensable(nothing, takes_long)), ("b", compensable(nothing, leave)), ("c", fails))

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert calls == ["a"]
    assert [failure.stage for failure in report.failures] == ["c"]


def test_a_cancel_that_a_stage_did_not_heed_strikes_neither_its_retry_nor_its_fallback() -> None:
    attempts: list[int] = []

    async def heedless(ctx: SagaContext) -> StageOutput:
        attempts.append(ctx.attempt)
        this_task().cancel()
        return StageOutput.fail("not yet")

    async def stands_in(_: SagaContext, __: Any) -> StageOutput:
        await asyncio.sleep(0)
        return StageOutput.ok(by="the fallback")

    stage = compensable(heedless, nothing, fallback=stands_in, retry=Retry(attempts=2, wait=0))

    report = run(SagaCoordinator(ContinueWithFallback()).run(staged(("a", stage))))

    assert attempts == [1, 2]
    assert report.status is SagaStatus.DEGRADED
    assert report.kept["a"].data == {"by": "the fallback"}


@pytest.mark.parametrize("goes", ["forward", "backward"])
def test_what_code_bound_that_was_given_up_no_other_code_sees(goes: str) -> None:
    seen: list[str] = []

    async def ignores_its_cancel(ctx: Any) -> None:
        WHO.set(ctx.stage_name)
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await elapse(60.0)

    async def look(_: Any) -> None:
        seen.append(WHO.get())

    if goes == "forward":
        pipeline = staged(("a", compensable(ignores_its_cancel, nothing, timeout=1.0)), ("b", look))
        policy: Any = ContinueWithFallback(fallbacks={"a": {}}, cancel_grace=1.0)
    else:
        stages = {name: compensable(nothing, look) for name in "ac"}
        pipeline = staged(("a", stages["a"]), ("b", compensable(nothing, ignores_its_cancel)), ("c", stages["c"]), ("d", fails))
        policy = FailFast(compensation=Compensation(retry=Retry(attempts=1), timeout=1.0, on_failure="continue"), cancel_grace=1.0)

    async def play() -> SagaReport:
        report = await SagaCoordinator(policy).run(pipeline)
        await elapse(120.0)
        return report

    report = run(play())

    assert report.status is SagaStatus.STUCK
    assert seen == ["the caller"] * (1 if goes == "forward" else 2)


def test_a_deadline_that_passes_in_the_turn_in_which_stages_begin_cancels_what_runs() -> None:
    cancelled: list[str] = []

    async def hangs(_: SagaContext) -> None:
        try:
            await elapse(3600.0)
        except asyncio.CancelledError:
            cancelled.append("hangs")
            raise

    async def computes(_: SagaContext) -> None:
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ControlledLoop)
        loop.compute(2.0)
        await asyncio.sleep(0)

    pipeline = staged(("computes", computes)).with_stage("hangs", compensable(hangs, nothing))
    for name in "cde":
        pipeline = pipeline.with_stage(name, nothing, "work", dependencies=("computes",))

    report = run(SagaCoordinator(FailFast(deadline=1.0, drain_timeout=None)).run(pipeline))

    assert cancelled == ["hangs"]
    assert report.cause is not None
    assert report.cause.kind is FailureKind.TIMEOUT


def test_each_of_several_stages_has_its_own_time_and_no_clock_ticks_on_when_they_have_ended() -> None:
    cut_at: dict[str, float] = {}

    async def takes_long(ctx: SagaContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            await elapse(5.0)
        except asyncio.CancelledError:
            cut_at[ctx.stage_name] = loop.time()
            raise

    async def play() -> tuple[SagaReport, list[Any]]:
        report = await SagaCoordinator().run(pipeline)
        loop: Any = asyncio.get_running_loop()
        return report, [timer for timer in loop._scheduled if not timer.cancelled()]

    pipeline = Pipeline(name="p")
    for name, seconds in {"three": 3.0, "one": 1.0, "none": None, "two": 2.0, "sixty": 60.0}.items():
        pipeline = pipeline.with_stage(name, compensable(takes_long, nothing, timeout=seconds))

    report, ticking = run(play())

    assert cut_at == {"one": 1.0, "two": 2.0, "three": 3.0}
    assert set(report.undone) == {"none", "sixty"}
    assert ticking == []


class CoarseLoop(ControlledLoop):
    """Has no timer for what is due within half a millisecond: as uvloop does, it takes that for due, and its handle knows no moment."""

    def call_at(self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None) -> Any:
        if when - self.time() < 0.0005:
            return self.call_soon(callback, *args, context=context)
        return super().call_at(when, callback, *args, context=context)


def test_a_stage_begins_while_the_time_of_another_one_is_just_running_out_in_a_loop_without_timers_as_short_as_that() -> None:
    pipeline = Pipeline(name="p").with_stage("a", nothing, "work").with_stage("b", nothing, "work")

    with asyncio.Runner(loop_factory=CoarseLoop) as runner:
        report = runner.run(SagaCoordinator(FailFast(timeout=0.0001)).run(pipeline))

    assert report.status is SagaStatus.COMPLETED


def compute_for_a_second(ctx: Any, called: list[str]) -> None:
    called.append(ctx.stage_name)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ControlledLoop)
    loop.compute(1.0)


def test_no_stage_starts_after_the_deadline_though_none_ever_awaits() -> None:
    ran: list[str] = []

    async def computes(ctx: SagaContext) -> None:
        compute_for_a_second(ctx, ran)

    report = run(SagaCoordinator(FailFast(deadline=2.5)).run(staged(*((f"s{number}", computes) for number in range(10)))))

    assert report.cause is not None
    assert report.cause.message == "the forward run exceeded its deadline of 2.5 s"
    assert ran == ["s0", "s1", "s2"]


def test_no_compensation_starts_after_the_deadline_though_none_ever_awaits() -> None:
    undone: list[str] = []

    async def computes(ctx: CompensationContext) -> None:
        compute_for_a_second(ctx, undone)

    stages = [(f"s{number}", compensable(nothing, computes)) for number in range(10)]

    report = run(SagaCoordinator(FailFast(compensation=Compensation(deadline=2.5))).run(staged(*stages, ("last", fails))))

    assert report.status is SagaStatus.STUCK
    assert undone == ["s9", "s8", "s7"]


async def exits_like_a_generator(*_: Any) -> None:
    raise GeneratorExit


@pytest.mark.parametrize("where", ["stage", "fallback", "probe", "compensation"])
def test_code_that_raises_generator_exit_has_failed_and_nobody_waits_for_ever(where: str) -> None:
    bad = exits_like_a_generator

    async def hangs(_: SagaContext) -> None:
        await elapse(60.0)

    forward: Any = {"stage": bad, "fallback": fails, "probe": hangs, "compensation": nothing}[where]
    stage = compensable(
        forward,
        bad if where == "compensation" else nothing,
        fallback=bad if where == "fallback" else None,
        probe=bad if where == "probe" else None,
        timeout=1.0,
    )
    policy = ContinueWithFallback() if where == "fallback" else FailFast()

    report = run(SagaCoordinator(policy).run(staged(("a", stage), ("b", fails))))

    assert "GeneratorExit" in [failure.type for failure in report.failures]
    assert report.ended_at is not None


async def raises_when_it_is_cancelled(_: Any) -> None:
    try:
        await elapse(60.0)
    except asyncio.CancelledError:
        raise RuntimeError("half of it could not be given back") from None


def test_what_a_stage_raises_when_its_time_is_up_is_in_the_report() -> None:
    """Promise 9."""
    report = run(SagaCoordinator().run(staged(("a", compensable(raises_when_it_is_cancelled, nothing, timeout=1.0)))))

    (failure,) = report.failures
    assert failure.kind is FailureKind.TIMEOUT
    assert failure.message == "no answer within 1 s; then it raised RuntimeError: half of it could not be given back"
    assert failure.traceback is not None
    assert failure.traceback.endswith("RuntimeError: half of it could not be given back\n")
    assert report.stages["a"].state is StageState.IN_DOUBT


def test_what_a_stage_raises_when_the_saga_cuts_it_short_does_not_say_that_it_has_had_no_effect() -> None:
    """Promise 5."""
    pipeline = staged(("a", compensable(raises_when_it_is_cancelled, nothing))).with_stage("beside", fails, "work")

    report = run(SagaCoordinator(FailFast(drain_timeout=1.0)).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert report.stages["a"].state is StageState.IN_DOUBT
    failure = report.stages["a"].failure
    assert failure is not None
    assert failure.kind is FailureKind.INTERRUPTED
    assert failure.message == "it was cancelled because the saga stopped; then it raised RuntimeError: half of it could not be given back"


def test_a_stage_whose_own_task_is_cancelled_from_outside_is_in_doubt() -> None:
    """Promise 5."""

    async def book(_: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(1.0, task.cancel)
        await elapse(60.0)

    report = run(SagaCoordinator().run(staged(("a", compensable(book, nothing)))))

    assert report.status is SagaStatus.STUCK
    assert report.stages["a"].state is StageState.IN_DOUBT
    failure = report.stages["a"].failure
    assert failure is not None
    assert failure.kind is FailureKind.INTERRUPTED
    assert failure.message == "its task was cancelled from outside"


def test_what_a_compensation_raises_when_its_time_is_up_is_in_the_report() -> None:
    """Promise 9."""
    undo = Compensation(retry=Retry(attempts=1), timeout=1.0)
    pipeline = staged(("a", compensable(nothing, raises_when_it_is_cancelled, compensation=undo)), ("b", fails))

    report = run(SagaCoordinator().run(pipeline))

    failure = report.failures[-1]
    assert failure.message == "no answer within 1 s; then it raised RuntimeError: half of it could not be given back"
    assert failure.traceback is not None
    assert "RuntimeError: half of it could not be given back" in failure.traceback
    assert set(report.stuck) == {"a"}


REFUSALS = {
    "fail": (StageOutput.fail("the bank refused"), "it returned FAIL: the bank refused"),
    "retry": (StageOutput.retry("later"), "it returned RETRY: later"),
    "cancel": (StageOutput.cancel("not today"), "it returned CANCEL: not today"),
}


@pytest.mark.parametrize("said", REFUSALS)
def test_a_compensation_that_returns_that_it_failed_has_failed(said: str) -> None:
    """Promise 5: an effect whose undoing was refused is never called undone."""
    returned, message = REFUSALS[said]
    answers = [returned, returned, returned]

    async def refuses(_: CompensationContext) -> Any:
        return answers.pop()

    report = run(SagaCoordinator().run(staged(("a", compensable(nothing, refuses)), ("b", fails))))

    assert answers == []
    assert set(report.stuck) == {"a"}
    assert report.stages["a"].compensation is not None
    assert report.stages["a"].compensation.failure is not None
    assert report.stages["a"].compensation.failure.message == message


@pytest.mark.parametrize("returned", [None, StageOutput.ok(), StageOutput.skip("it was gone already"), {"refund": 7}, False])
def test_what_else_a_compensation_returns_says_nothing(returned: Any) -> None:
    async def undo(_: CompensationContext) -> Any:
        return returned

    report = run(SagaCoordinator().run(staged(("a", compensable(nothing, undo)), ("b", fails))))

    assert report.status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("then", ["returns", "raises"])
def test_an_effect_that_was_recorded_without_await_is_undone_all_the_same(then: str) -> None:
    undone: list[Any] = []

    async def forgets(ctx: SagaContext) -> None:
        await ctx.record("first")
        ctx.record("second")  # type: ignore[unused-coroutine] # what the test is about
        ctx.record("third")  # type: ignore[unused-coroutine] # as above
        if then == "raises":
            raise ConnectionError("no line")

    async def undo(ctx: CompensationContext) -> None:
        undone.extend(ctx.effects)

    with pytest.warns(RuntimeWarning, match="stage 'a' called ctx.record"):
        report = run(SagaCoordinator().run(staged(("a", compensable(forgets, undo)), ("b", fails))))

    assert report.status is SagaStatus.COMPENSATED
    assert undone == ["first", "second", "third"]


def test_an_effect_is_recorded_as_it_was_when_it_was_noted_however_late_that_is_awaited() -> None:
    undone: list[Any] = []

    async def book(ctx: SagaContext) -> None:
        booking: dict[str, Any] = {}
        async with asyncio.TaskGroup() as group:
            for seat in ("1A", "1B", "1C"):
                booking["seat"] = seat
                group.create_task(ctx.record(booking))

    async def undo(ctx: CompensationContext) -> None:
        undone.extend(ctx.effects)

    report = run(SagaCoordinator().run(staged(("a", compensable(book, undo)), ("b", fails))))

    assert report.status is SagaStatus.COMPENSATED
    assert undone == [{"seat": "1A"}, {"seat": "1B"}, {"seat": "1C"}]


def test_to_record_many_effects_at_once_takes_no_longer_for_each_the_more_there_are() -> None:
    """Eight thousand took ten seconds: for each one all of those that had not begun were looked through."""

    def recording(many: int) -> Callable[[], None]:
        async def book(ctx: SagaContext) -> None:
            await asyncio.gather(*[ctx.record(seat) for seat in range(many)])

        def play() -> None:
            report = run(SagaCoordinator().run(staged(("a", compensable(book, nothing)))))
            assert len(report.stages["a"].effects) == many

        return play

    assert growth(recording, 200) < 2.5


@pytest.mark.parametrize("then", ["returns", "raises"])
def test_what_a_plain_stage_records_without_await_fails_it(then: str) -> None:
    async def forgets(ctx: SagaContext) -> None:
        ctx.record("seat")  # type: ignore[unused-coroutine] # what the test is about
        if then == "raises":
            raise ConnectionError("no line")

    report = run(SagaCoordinator().run(staged(("a", forgets))))

    assert report.cause is not None
    assert (report.cause.stage, report.cause.attempt) == ("a", 1)
    expected = "no line" if then == "raises" else "expected ctx.record only in a stage with a compensation"
    assert report.cause.message.startswith(expected)


def test_where_warnings_are_errors_a_forgotten_await_fails_its_stage_and_is_undone() -> None:
    undone: list[Any] = []

    async def forgets(ctx: SagaContext) -> None:
        ctx.record("seat")  # type: ignore[unused-coroutine] # what the test is about

    async def undo(ctx: CompensationContext) -> None:
        undone.extend(ctx.effects)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run(SagaCoordinator().run(staged(("a", compensable(forgets, undo)))))

    assert report.status is SagaStatus.COMPENSATED
    assert undone == ["seat"]
    assert report.cause is not None
    assert report.cause.message == "stage 'a' called ctx.record(...) without await"


def test_when_a_retry_can_not_be_recorded_the_attempt_before_it_is_not_known() -> None:
    """It ran out of time, and its effect may stand, though the next attempt never began."""

    async def hangs(_: SagaContext) -> None:
        await elapse(60.0)

    class Full(MemoryLedger):
        async def append(self, saga_id: str, events: Any, **given: Any) -> None:
            if any(isinstance(event, StageStarted) and event.attempt > 1 for event in events):
                raise LedgerError("disk full")
            await super().append(saga_id, events, **given)

    pipeline = staged(
        ("a", compensable(nothing, nothing)), ("b", compensable(hangs, nothing, timeout=1.0, retry=Retry(attempts=2, wait=0)))
    )

    with pytest.raises(SagaUnrecorded) as caught:
        run(SagaCoordinator(ledger=Full()).run(pipeline))

    assert caught.value.in_effect == ("a",)
    assert caught.value.unknown == ("b",)


def test_when_a_ledger_fails_what_a_failed_stage_recorded_is_in_effect() -> None:
    async def half(ctx: SagaContext) -> None:
        await ctx.record("seat")
        raise ConnectionError("no line")

    class Full(MemoryLedger):
        async def append(self, saga_id: str, events: Any, **given: Any) -> None:
            if any(isinstance(event, SagaTurnedBack) for event in events):
                raise LedgerError("disk full")
            await super().append(saga_id, events, **given)

    with pytest.raises(SagaUnrecorded) as caught:
        run(SagaCoordinator(ledger=Full()).run(staged(("a", compensable(half, nothing)))))

    assert (caught.value.in_effect, caught.value.unknown) == (("a",), ())


def test_a_ledger_that_fails_while_several_stages_are_asked_for_is_told_of_once_and_asyncio_has_nothing_to_add() -> None:
    _, pipeline = scene({"a": (), "b": ()}, dict.fromkeys("ab", Script("hang")), dict.fromkeys("ab", "probed"))

    async def play() -> None:
        with pytest.raises(SagaUnrecorded):
            await SagaCoordinator(FailFast(timeout=1, on_failure="halt"), ledger=SlowLedger(StageProbed, seconds=0.0)).run(pipeline)
        gc.collect()

    run(play())


@pytest.mark.parametrize("ends", ["ok", "skip"])
def test_a_stage_that_failed_and_then_succeeded_is_not_among_those_that_failed(ends: str) -> None:
    async def second_time(ctx: SagaContext) -> StageOutput:
        if ctx.attempt == 1:
            raise ConnectionError("no line")
        return StageOutput.ok(seat="14A") if ends == "ok" else StageOutput.skip("no seat wanted")

    stage = compensable(second_time, nothing, retry=Retry(attempts=2, wait=0))

    report = run(SagaCoordinator().run(staged(("a", stage), ("b", fails))))

    assert report.failed == ("b",)
    assert report.stages["a"].failure is not None
    assert ("a" in report.to_pipeline_results()) is (ends == "skip")


@pytest.mark.parametrize("stages", [1, 3])
def test_when_the_first_write_fails_the_error_says_that_nothing_ran(stages: int) -> None:
    ledger = SlowDisk()
    ledger.breaks_at = SagaStarted
    pipeline = Pipeline(name="p")
    for number in range(stages):
        pipeline = pipeline.with_stage(f"s{number}", compensable(nothing, nothing))

    with pytest.raises(LedgerError, match=r"saga \w+ could not begin: .*no space left.* None of its stages ran\.") as caught:
        run(SagaCoordinator(ledger=ledger).run(pipeline))

    assert "resume" not in str(caught.value)
