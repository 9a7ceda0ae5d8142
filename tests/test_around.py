"""Hooks, interceptors and sinks around each stage: they work as in stageflow, and whatever they do, the saga comes to rest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest
from stageflow import BaseInterceptor, ErrorAction, InterceptorResult
from stageflow.api import Pipeline, PipelineContext, StageCancellationRequested, StageContext, StageKind, StageOutput
from stageflow.events import NoOpEventSink
from stageflow.pipeline.interceptors import CriticalInterceptorError
from stageflow.stages.result import StageResult

from saga import (
    ContinueWithFallback,
    FailFast,
    LedgerError,
    MemoryLedger,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.blueprint import Blueprint
from saga.events import AnyEvent, SagaStarted, SagaStopped, StageCompleted, StageSkipped, StageStarted
from saga.failures import FailureKind
from saga.recovery.resumption import Direction, recovering
from tests.controlled import elapse, run
from tests.slow import SlowLedger
from tests.test_interruption import FailingLedger
from tests.test_scheduling import staged, undo
from tests.world import SEQUENCE, CardDeclined, Recorder, Script, Scripted, Watching, hooked, nothing, scene


def test_the_users_interceptors_see_every_stage_and_its_error() -> None:
    recorder = Recorder()
    world, pipeline = scene(SEQUENCE, {"b": Script("raise")})

    report = run(SagaCoordinator(interceptors=[recorder]).run(pipeline))

    assert recorder.seen == [
        ("before", "a"),
        ("after", "a", "completed"),
        ("before", "b"),
        ("error", "b", "CardDeclined"),
        ("after", "b", "failed"),
    ]
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("outcome", ["raise", "fail"])
def test_an_interceptor_that_asks_for_a_retry_does_not_get_one(outcome: str) -> None:
    script = Script(outcome)
    _, pipeline = scene(SEQUENCE, {"b": script})

    report = run(SagaCoordinator(interceptors=[Recorder(action=ErrorAction.RETRY)]).run(pipeline))

    assert script.attempts == [outcome]
    assert report.status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("position", ["a", "c"])
def test_a_stage_that_an_interceptor_answers_for_never_ran_and_is_not_undone(position: str) -> None:
    world, pipeline = scene({**SEQUENCE, "d": ("b",)}, {"d": Script("raise", before=1)})

    report = run(SagaCoordinator(interceptors=[Recorder(answer_for=position)]).run(pipeline))

    assert f"+{position}" not in world.log
    assert report.stages[position].state is StageState.SKIPPED
    assert report.stages[position].skip_reason == "an interceptor answered for it"
    assert world.standing == {}


class Denying(Recorder):
    """Answers for a stage with an error, as stageflow's authentication and its circuit breaker do."""

    async def before(self, stage_name: str, ctx: PipelineContext) -> InterceptorResult | None:
        return InterceptorResult(stage_ran=False, error="access denied") if stage_name == self.critical else None


def test_a_stage_that_an_interceptor_answers_for_with_an_error_has_failed() -> None:
    """It was skipped, what depends on it ran, and nobody was told of the error: the goods were shipped, and nothing was paid."""
    world, pipeline = scene(SEQUENCE)

    report = run(SagaCoordinator(interceptors=[Denying(critical="b")]).run(pipeline))

    assert world.log == ["+a", "-a"]
    assert report.cause is not None
    assert (report.cause.stage, report.cause.message) == ("b", "access denied")
    assert report.stages["b"].state is StageState.FAILED
    assert report.status is SagaStatus.COMPENSATED


def test_a_stage_that_is_to_be_tried_again_is_not_when_an_interceptor_answers_with_an_error() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang", lands=True, then=("ok",))})
    denying = Denying()
    coordinator = SagaCoordinator(FailFast(timeout=3.0, on_failure="halt"), interceptors=[denying])
    assert set(run(coordinator.run(pipeline, saga_id="s")).in_doubt) == {"b"}
    run(coordinator.settle("s", "b", "retry", "it can be sent again"))
    denying.critical = "b"

    denied = run(coordinator.resume("s", pipeline))
    denying.critical = ""
    report = run(coordinator.resume("s", pipeline))

    assert (denied.status, [*denied.in_doubt]) == (SagaStatus.HALTED, ["b"])
    assert report.status is SagaStatus.COMPLETED
    assert set(report.kept) == set(world.standing) == {"a", "b", "c"}


def test_an_interceptor_that_answers_with_an_error_for_what_had_completed_refuses_nothing_when_the_saga_goes_on() -> None:
    """What depends on it was given nothing in the place of what it gave."""
    given: list[Any] = []
    answers = iter([CardDeclined()])

    async def price(_: StageContext) -> StageOutput:
        return StageOutput.ok(amount=9)

    async def pay(ctx: StageContext) -> None:
        for declined in answers:
            raise declined
        given.append(ctx.inputs.get_from("price", "amount"))

    pipeline = Pipeline().with_stage("price", price, "work").with_stage("pay", pay, "work", dependencies=("price",))
    denying = Denying()
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), interceptors=[denying])
    run(coordinator.run(pipeline, saga_id="s"))
    denying.critical = "price"

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert given == [9]


def test_an_interceptor_that_refuses_a_stage_stops_the_saga() -> None:
    world, pipeline = scene(SEQUENCE)

    report = run(SagaCoordinator(interceptors=[Recorder(critical="b")]).run(pipeline))

    assert report.cause is not None
    assert (report.cause.stage, report.cause.message) == ("b", "not allowed")
    assert report.stages["b"].state is StageState.FAILED
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


class SoreLoser(Recorder):
    async def after(self, stage_name: str, result: Any, ctx: PipelineContext) -> None:
        if stage_name == "b":
            raise CriticalInterceptorError("not like this", self.name)


def test_an_interceptor_that_refuses_afterwards_has_the_completed_stage_undone() -> None:
    world, pipeline = scene(SEQUENCE)

    report = run(SagaCoordinator(interceptors=[SoreLoser()]).run(pipeline))

    assert world.log == ["+a", "+b", "-b", "-a"]
    assert report.cause is not None
    assert report.cause.message == "not like this"


class LateLoser(SoreLoser):
    async def after(self, stage_name: str, result: Any, ctx: PipelineContext) -> None:
        if stage_name == "b":
            await elapse(2.0)
        await super().after(stage_name, result, ctx)


@pytest.mark.parametrize("stops", ["a stage", "the deadline"])
def test_what_an_interceptor_refuses_when_the_saga_has_stopped_is_in_the_report_behind_its_cause(stops: str) -> None:
    """Promise 9."""
    by_stage = stops == "a stage"
    other = {"c": Script("raise", before=1.5)}
    world, pipeline = scene({"a": (), "b": (), "c": ()}, other | ({"a": Script("raise", before=1.0)} if by_stage else {}))
    policy = FailFast() if by_stage else FailFast(deadline=1.0)

    report = run(SagaCoordinator(policy, interceptors=[LateLoser()]).run(pipeline, saga_id="s"))

    assert report.cause == report.failures[0]
    assert report.cause.kind is (FailureKind.EXCEPTION if by_stage else FailureKind.TIMEOUT)
    assert [failure.stage for failure in report.failures[1:]] == ["c", "b"]
    assert report.failures[-1].message == "not like this"
    assert report.failed == (("a", "c") if by_stage else ("c",))
    assert sorted(world.undone()) == (["b"] if by_stage else ["a", "b"])


def test_behind_such_a_refusal_a_failure_outweighs_a_cancel_as_ever() -> None:
    _, pipeline = scene({"a": (), "b": (), "c": ()}, {"a": Script("cancel", before=1.0), "c": Script("raise", before=3.0)})

    report = run(SagaCoordinator(interceptors=[LateLoser()]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.stage == "c"
    assert [failure.stage for failure in report.failures] == ["a", "b", "c"]


def test_a_crash_behind_such_a_refusal_leaves_the_cause_as_it_was() -> None:
    ledger = MemoryLedger()
    _, pipeline = scene({"a": (), "b": ()}, {"a": Script("cancel", before=1.0)})
    whole = run(SagaCoordinator(ledger=ledger, interceptors=[LateLoser()]).run(pipeline, saga_id="s"))
    events = list(run(ledger.read("s")))
    refusal = next(place for place, event in enumerate(events) if isinstance(event, SagaStopped) and event.cause.stage == "b")

    chapter = recovering(events[: refusal + 1], None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.CONCLUDE, whole.cause)


def test_a_hook_that_raises_stops_the_saga() -> None:
    world, pipeline = scene(SEQUENCE)
    context = PipelineContext.create()

    def hook(stage_name: str, *_: Any) -> None:
        if stage_name == "b":
            raise OSError("hook broken")

    context.add_before_stage_start_hook(hook)

    report = run(SagaCoordinator().run(pipeline, context))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert (report.cause.stage, report.cause.type) == ("b", "OSError")
    assert world.standing == {}


@pytest.mark.parametrize("ending", [StageOutput.fail("nobody answers"), StageOutput.cancel("nobody answers")], ids=["fails", "cancels"])
def test_a_hook_whose_own_pipeline_fails_stops_the_saga(ending: StageOutput) -> None:
    """What stageflow raises then names stages of that one."""
    world, pipeline = scene(SEQUENCE)
    context = PipelineContext.create()

    async def within(_: StageContext) -> StageOutput:
        return ending

    async def hook(stage_name: str, *_: Any) -> None:
        if stage_name == "b":
            await (
                Pipeline(name="of the hook")
                .with_stage("first", nothing, "work")
                .with_stage("within", within, "work", dependencies=("first",))
                .run()
            )

    context.add_before_stage_start_hook(hook)

    report = run(SagaCoordinator().run(pipeline, context))

    assert world.log in (["+a", "-a"], ["+a"])
    assert report.cause is not None
    assert "nobody answers" in report.cause.message
    assert list(report.stages) == ["a", "b", "c"]
    assert report.clean


class Outcome(BaseException):
    """As pytest.fail raises."""


@pytest.mark.parametrize(
    "error", [OSError("hook broken"), Outcome("hook broken"), GeneratorExit("hook broken")], ids=lambda error: type(error).__name__
)
def test_a_hook_that_raises_interrupts_no_stage_that_runs(error: BaseException) -> None:
    world, pipeline = scene({"a": (), "b": (), "c": ("b",)}, {"a": Script(before=5), "b": Script(before=1)})
    context = PipelineContext.create()

    def hook(stage_name: str, *_: Any) -> None:
        if stage_name == "c":
            raise error

    context.add_before_stage_start_hook(hook)

    report = run(SagaCoordinator().run(pipeline, context))

    assert set(world.log) == {"+a", "-a", "+b", "-b"}
    assert report.clean
    assert report.cause is not None
    assert report.cause.message == "hook broken"


class Clogged(NoOpEventSink):
    def try_emit(self, *, type: str, data: dict[str, Any] | None) -> None:  # noqa: A002 - as stageflow calls it
        raise OSError(f"{type}: the sink is clogged")


def test_a_sink_that_raises_interrupts_no_stage_that_runs() -> None:
    world, pipeline = scene({"a": (), "b": ()}, {"a": Script(before=5), "b": Script("skip", before=1)})

    report = run(SagaCoordinator().run(pipeline, event_sink=Clogged()))

    assert world.log == ["+a", "-a"]
    assert report.clean


class Masking(BaseInterceptor):
    """Lets nobody read what a card's number is."""

    name = "masking"

    async def before(self, stage_name: str, ctx: PipelineContext) -> None: ...

    async def after(self, _stage_name: str, result: Any, _ctx: PipelineContext) -> None:
        if "number" in result.data:
            result.data["number"] = "****"


def masked() -> PipelineContext:
    """A context whose hook does so."""
    context = PipelineContext.create()

    def mask(_name: str, _kind: Any, ctx: StageContext, _: PipelineContext) -> None:
        for output in ctx.inputs.prior_outputs.values():
            output.data["number"] = "****"

    context.add_before_stage_start_hook(mask)
    return context


@pytest.mark.parametrize(("context", "interceptors"), [(None, (Masking(),)), (masked(), ())], ids=["an interceptor", "a hook"])
@pytest.mark.parametrize("policy", [FailFast(retry=Retry(attempts=2, wait=0)), ContinueWithFallback()], ids=["retry", "fallback"])
def test_a_further_attempt_and_the_fallback_read_what_was_let_pass_as_the_first_attempt_did(
    policy: Any, context: PipelineContext | None, interceptors: tuple[Any, ...]
) -> None:
    seen: list[tuple[str, str]] = []

    def read(ctx: SagaContext) -> None:
        seen.append((ctx.inputs.get_from("card", "number"), ctx.inputs.get_from("card", "tries").pop()))

    async def read_card(_: Any) -> dict[str, Any]:
        return {"number": "4711", "tries": ["last", "first"]}

    async def charge(ctx: SagaContext) -> None:
        read(ctx)
        raise CardDeclined

    async def charge_later(ctx: SagaContext, _: Any) -> None:
        read(ctx)

    pipeline = staged(staged(Pipeline(name="p"), "card", read_card), "charge", compensable(charge, undo, fallback=charge_later), "card")

    run(SagaCoordinator(policy, interceptors=interceptors).run(pipeline, context))

    assert seen == [("****", "first")] * 2


class Copied:
    """Counts its copies."""

    copies = 0

    def __deepcopy__(self, _: Any) -> Copied:
        Copied.copies += 1
        return self


def test_what_was_let_pass_is_copied_once_however_many_may_be_given_it_anew() -> None:
    async def read_rows(_: Any) -> dict[str, Any]:
        return {"rows": Copied()}

    def copies(readers: int) -> int:
        pipeline = staged(Pipeline(name="p"), "rows", read_rows)
        for number in range(readers):
            pipeline = staged(pipeline, f"reader {number}", nothing, "rows")
        Copied.copies = 0
        run(SagaCoordinator(FailFast(retry=Retry(attempts=2)), interceptors=[Watching()]).run(pipeline))
        return Copied.copies

    assert 0 < copies(20) == copies(2)


def test_a_conditional_stage_that_a_hook_keeps_from_its_condition_is_not_told_as_skipped() -> None:
    async def check(_: SagaContext) -> dict[str, Any]:
        return {"skip_reason": "nothing to ship"}

    def refuse(name: str, *_: Any) -> None:
        if name == "ship":
            raise ValueError("closed")

    context = hooked()
    context.add_before_stage_start_hook(refuse)
    pipeline = staged(staged(Pipeline(name="p"), "check", check), "ship", nothing, "check", conditional=True)

    report = run(SagaCoordinator().run(pipeline, context))

    assert report.cause is not None
    assert report.skipped == ()
    assert report.failed == ("ship",)


class HeldUp(Watching):
    """Keeps a stage waiting before it runs, and lets it run when it is cancelled there."""

    def __init__(self, stage_name: str) -> None:
        self.stage_name = stage_name

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        if stage_name == self.stage_name:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


def test_a_stage_that_an_interceptor_lets_run_when_the_saga_is_stopping_has_not_run() -> None:
    async def fail(_: SagaContext) -> StageOutput:
        return StageOutput.fail("no lorry")

    pipeline = staged(staged(Pipeline(name="p"), "book", fail), "late", nothing)

    report = run(SagaCoordinator(interceptors=[HeldUp("late")]).run(pipeline))

    assert report.failed == ("book",)
    assert report.not_run == ("late",)


class Stalling(Watching):
    """Waits for ever at one of its turns, for a service that does not answer, say."""

    def __init__(self, turn: str) -> None:
        self.turn = turn

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        await self.stall("before", stage_name)

    async def after(self, stage_name: str, _result: Any, _ctx: PipelineContext) -> None:
        await self.stall("after", stage_name)

    async def on_error(self, stage_name: str, _error: Exception, _ctx: PipelineContext) -> ErrorAction:
        await self.stall("on_error", stage_name)
        return ErrorAction.FAIL

    async def stall(self, turn: str, stage_name: str) -> None:
        if f"{turn} {stage_name}" == self.turn:
            await asyncio.Event().wait()


def stalling(turn: str) -> tuple[PipelineContext | None, tuple[BaseInterceptor, ...]]:
    if not turn.startswith("hook"):
        return None, (Stalling(turn),)
    context = PipelineContext.create()

    async def hook(stage_name: str, *_: Any) -> None:
        if turn == f"hook {stage_name}":
            await asyncio.Event().wait()

    context.add_before_stage_start_hook(hook)
    return context, ()


@pytest.mark.parametrize("stop", ["deadline", "cancel"])
@pytest.mark.parametrize(
    ("turn", "ran"),
    [
        ("before second", {"first", "slow"}),
        ("after first", {"first", "slow"}),
        ("after slow", {"first", "slow", "second"}),
        ("hook second", {"first", "slow"}),
        ("hook first", {"slow"}),
    ],
)
def test_an_interceptor_or_a_hook_that_never_ends_keeps_no_saga_from_stopping(turn: str, ran: set[str], stop: str) -> None:
    world, _ = scene({"first": (), "slow": (), "second": ("first",)})
    context, interceptors = stalling(turn)
    pipeline = staged(Pipeline(name="p"), "first", Scripted(world, "first", Script()))
    pipeline = staged(pipeline, "slow", Scripted(world, "slow", Script(before=7.0)))
    pipeline = staged(pipeline, "second", Scripted(world, "second", Script()), "first")
    policy = FailFast(deadline=8.0 if stop == "deadline" else None, cancel_grace=3.0)
    coordinator = SagaCoordinator(policy, interceptors=interceptors)

    async def play() -> tuple[SagaReport, float]:
        running = asyncio.create_task(coordinator.run(pipeline, context, saga_id="s"))
        if stop == "cancel":
            await elapse(8.0)
            running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return await coordinator.report("s"), asyncio.get_running_loop().time()

    report, ended_at = run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert set(world.undone()) == set(report.undone) == ran
    assert world.standing == {}
    assert ended_at == 11.0


def test_an_interceptor_that_never_ends_when_it_is_told_of_an_error_keeps_nothing_from_being_undone() -> None:
    world, pipeline = scene({"first": (), "second": ("first",)}, {"second": Script(outcome="raise")})

    report = run(SagaCoordinator(interceptors=[Stalling("on_error second")]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.stage == "second"
    assert world.undone() == ["first"]


class Hasty(Stalling):
    """Has a stage waited for for a millisecond, as stageflow's own timeout does."""

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        ctx.data["_timeout.book"] = 1
        await super().before(stage_name, ctx)


def test_an_interceptor_that_still_runs_when_a_stage_was_refused_ends_with_the_saga() -> None:
    world, pipeline = scene({"book": (), "late": ()}, {"book": Script(before=1.0)})

    report = run(SagaCoordinator(interceptors=[Hasty("before late")]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.not_run == ("late",)
    assert world.undone() == ["book"]


class Cancelling(Watching):
    """Cancels the context that it is given when a stage has run."""

    async def after(self, stage_name: str, _result: Any, ctx: PipelineContext) -> None:
        if stage_name == "first":
            ctx.mark_canceled("enough")


def refusing() -> PipelineContext:
    """A context whose hook cancels the second stage before it starts."""
    context = PipelineContext.create()

    def refuse(stage_name: str, *_: Any) -> None:
        if stage_name == "second":
            raise StageCancellationRequested("enough")

    context.add_before_stage_start_hook(refuse)
    return context


@pytest.mark.parametrize(("context", "interceptors"), [(None, (Cancelling(),)), (refusing(), ())], ids=["by an interceptor", "by a hook"])
def test_an_interceptor_or_a_hook_may_call_the_saga_off(context: PipelineContext | None, interceptors: tuple[Any, ...]) -> None:
    pipeline = staged(Pipeline(name="p"), "first", compensable(nothing, undo))
    pipeline = staged(staged(pipeline, "second", nothing, "first"), "third", nothing, "second")

    report = run(SagaCoordinator(interceptors=interceptors).run(pipeline, context))

    assert report.status is SagaStatus.CANCELLED
    assert report.cause is not None
    assert (report.cause.stage, report.cause.message) == (None, "enough")
    assert set(report.kept) == {"first"}
    assert report.not_run == ("second", "third")


def test_a_cancel_that_comes_while_what_an_interceptor_answered_is_recorded_is_heeded() -> None:
    class Answering(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> Any:
            return InterceptorResult(stage_ran=False, result={"cached": True}) if stage_name == "b" else None

    undone: list[str] = []

    async def undo_it(ctx: Any) -> None:
        undone.append(ctx.stage_name)

    pipeline = staged(staged(Pipeline(), "a", compensable(nothing, undo_it)), "b", nothing, "a")
    ledger = SlowLedger(seconds=1.0)

    async def play() -> SagaReport:
        coordinator = SagaCoordinator(ledger=ledger, interceptors=[Answering()])
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        # SagaStarted, StageStarted and StageCompleted of a; then StageSkipped of b is being written.
        await elapse(3.5)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return await coordinator.report("s")

    report = run(play())

    assert undone == ["a"]
    assert report.status is SagaStatus.COMPENSATED


class Noting(Watching):
    """Notes what it is told of every stage, and has those that failed run again."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.told: dict[str, tuple[str, str | None]] = {}

    async def after(self, stage_name: str, result: Any, _ctx: PipelineContext) -> None:
        # A stage that was cancelled is told as completed.
        self.told[stage_name] = (result.status, result.error or result.data.get("cancel_reason"))

    async def on_error(self, _stage_name: str, error: Exception, _ctx: PipelineContext) -> ErrorAction:
        self.errors.append(error)
        return ErrorAction.RETRY


@pytest.mark.parametrize(
    ("outcome", "kind", "told"),
    [("raise", CardDeclined, "b was declined"), ("fail", RuntimeError, "stage 'b' reported a failure: b reports")],
)
def test_an_interceptor_is_told_what_a_stage_has_failed_with_also_when_it_asks_for_a_retry(
    outcome: str, kind: type[Exception], told: str
) -> None:
    script, noting = Script(outcome), Noting()
    world, pipeline = scene({"a": (), "b": ("a",)}, {"b": script})

    report = run(SagaCoordinator(interceptors=[noting]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert [(type(error), str(error)) for error in noting.errors] == [(kind, told)]
    assert noting.told == {"a": ("completed", None), "b": ("failed", told)}
    assert script.attempts == [outcome]
    assert world.undone() == ["a"]


@pytest.mark.parametrize("is_watched", [False, True])
def test_what_runs_when_the_saga_is_cancelled_is_cancelled_at_once_where_the_policy_says_so(is_watched: bool) -> None:
    noting = Noting()
    world, pipeline = scene({"slow": (), "slower": ()}, {"slow": Script("hang"), "slower": Script("hang")})
    coordinator = SagaCoordinator(FailFast(in_flight="cancel", cancel_grace=30.0), interceptors=[noting] if is_watched else ())

    async def play() -> tuple[SagaReport, float]:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(1.0)
        await coordinator.cancel("s", "not needed any more")
        return await running, asyncio.get_running_loop().time()

    report, ended_at = run(play())

    assert {stage.state for stage in report.stages.values()} == {StageState.IN_DOUBT}
    assert ended_at == 1.0
    assert world.running == set()
    assert noting.told == (dict.fromkeys(("slow", "slower"), ("completed", "the saga is stopping")) if is_watched else {})


def test_what_an_interceptor_answered_is_in_the_report_though_the_saga_fails() -> None:
    class Answering(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> Any:
            return InterceptorResult(stage_ran=False, result={"cached": True}) if stage_name == "price" else None

    _, pipeline = scene({"price": (), "book": ()}, {"book": Script("raise", before=1.0)})

    report = run(SagaCoordinator(interceptors=[Answering()]).run(pipeline))

    assert report.failed == ("book",)
    output = report.stages["price"].output
    assert output is not None
    assert output.data == {"cached": True}


def test_hooks_are_told_of_every_stage_and_its_kind_and_interceptors_of_those_that_no_condition_skips() -> None:
    """As in plain stageflow."""
    kinds: dict[str, Any] = {}
    noting = Noting()
    context = PipelineContext.create()
    context.add_before_stage_start_hook(lambda name, kind, *_: kinds.update({name: kind}))

    async def check(_: Any) -> dict[str, Any]:
        return {"skip_reason": "nothing to ship"}

    pipeline = Pipeline(name="p").with_stage("check", check, "guard")
    pipeline = staged(staged(pipeline, "ship", nothing, "check", conditional=True), "write", nothing, "ship")

    report = run(SagaCoordinator(interceptors=[noting]).run(pipeline, context))

    assert report.skipped == ("ship",)
    assert kinds == {"check": StageKind.GUARD, "ship": StageKind.WORK, "write": StageKind.WORK}
    assert noting.told == {"check": ("completed", None), "write": ("completed", None)}


class Telling(Recorder):
    """Notes all that an interceptor is told."""

    def __init__(self, name: str, priority: int, told: list[Any], answers: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.priority, self.told, self.answers = name, priority, told, answers

    async def before(self, stage_name: str, ctx: PipelineContext) -> InterceptorResult | None:
        self.told.append((self.name, "before", stage_name))
        return InterceptorResult(stage_ran=False, result=self.answers[stage_name]) if stage_name in self.answers else None

    async def after(self, stage_name: str, result: Any, ctx: PipelineContext) -> None:
        self.told.append((self.name, "after", stage_name, result.name, result.status, dict(result.data), result.error))

    async def on_error(self, stage_name: str, error: Exception, ctx: PipelineContext) -> ErrorAction:
        self.told.append((self.name, "error", stage_name, type(error), str(error)))
        return ErrorAction.FAIL


class Listening(NoOpEventSink):
    """Notes what stageflow emits, but for how long it took."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def try_emit(self, *, type: str, data: dict[str, Any] | None) -> None:  # noqa: A002 - as stageflow calls it
        assert data is not None
        self.told.append((type, {key: value for key, value in data.items() if key != "duration_ms"}))


async def gives(ctx: StageContext) -> dict[str, Any]:
    return {"by": ctx.stage_name, "from": [output.data for output in ctx.inputs.prior_outputs.values()]}


async def skips(_: StageContext) -> StageOutput:
    return StageOutput.skip("not today")


async def skips_the_next(_: StageContext) -> dict[str, Any]:
    return {"skip_reason": "nothing to ship"}


async def breaks(_: StageContext) -> None:
    raise CardDeclined("no funds")


async def cancels(_: StageContext) -> StageOutput:
    return StageOutput.cancel("sold out")


STAGES: dict[str, Callable[..., Any]] = {"nothing": nothing, "gives": gives, "skips": skips, "skips_the_next": skips_the_next}


@pytest.mark.parametrize("ending", [gives, breaks, cancels], ids=["succeeds", "fails", "cancels"])
@pytest.mark.parametrize("second", STAGES)
@pytest.mark.parametrize("first", STAGES)
def test_what_is_around_a_stage_is_told_what_plain_stageflow_tells_it(first: str, second: str, ending: Any) -> None:
    """Hooks, two interceptors of which one answers for a stage, and the sink."""
    now = PipelineContext.now()
    cached = StageResult("cached", "completed", now, now, data={"cached": True})
    pipeline = staged(staged(Pipeline(name="p"), "first", STAGES[first]), "answered", gives, "first")
    pipeline = staged(staged(pipeline, "second", STAGES[second], "answered"), "third", gives, "second", conditional=True)
    pipeline = staged(pipeline, "last", ending, "third")

    def told_by(call: Callable[[PipelineContext, list[BaseInterceptor]], Any]) -> tuple[list[Any], list[Any]]:
        told: list[Any] = []
        emitted: list[Any] = []
        context = PipelineContext.create(event_sink=Listening(emitted))
        context.add_before_stage_start_hook(
            lambda name, kind, ctx, _: told.append(("hook", name, kind, ctx.stage_name, [*ctx.inputs.prior_outputs]))
        )
        inner, outer = Telling("inner", 60, told, {"answered": cached}), Telling("outer", 20, told, {})
        with contextlib.suppress(Exception):
            run(call(context, [inner, outer]))
        return told, emitted

    by_stageflow = told_by(lambda context, interceptors: pipeline.run(context, interceptors=interceptors))

    assert told_by(lambda context, interceptors: SagaCoordinator(interceptors=interceptors).run(pipeline, context)) == by_stageflow
    assert ("hook", "last", StageKind.WORK, "last", ["third"]) in by_stageflow[0]


BOUND: ContextVar[str] = ContextVar("BOUND", default="nothing")


def test_a_stage_sees_what_a_hook_and_an_interceptor_have_bound_before_it() -> None:
    """Such as the span in which it runs."""
    seen: dict[str, str] = {}

    class Binding(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> None:
            BOUND.set(f"{BOUND.get()}, before {stage_name}")

    async def look(ctx: SagaContext) -> None:
        seen[ctx.stage_name] = BOUND.get()

    context = hooked()
    context.add_before_stage_start_hook(lambda name, *_: BOUND.set(f"hook {name}") and None)
    pipeline = staged(staged(Pipeline(name="p"), "a", look), "b", look, "a")

    assert run(SagaCoordinator(interceptors=[Binding()]).run(pipeline, context)).ok

    assert seen == {"a": "hook a, before a", "b": "hook b, before b"}


@pytest.mark.parametrize("answers", [False, True])
def test_an_interceptor_that_ignores_its_cancel_keeps_no_saga_from_ending_and_changes_nothing_of_it_later(
    answers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    released = asyncio.Event()

    class Deaf(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> Any:
            while stage_name == "late" and not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await released.wait()
            if stage_name == "late" and not answers:
                raise CriticalInterceptorError("not allowed", self.name)
            return InterceptorResult(stage_ran=False, result={"cached": True}) if stage_name == "late" else None

    world, pipeline = scene({"book": (), "late": ()}, {"book": Script("raise", before=1.0)})
    ledger = MemoryLedger()

    async def play() -> tuple[SagaReport, float]:
        coordinator = SagaCoordinator(FailFast(cancel_grace=2.0), ledger=ledger, interceptors=[Deaf()])
        report = await coordinator.run(pipeline, saga_id="s")
        ended_at, events = asyncio.get_running_loop().time(), await ledger.read("s")
        released.set()
        await elapse(1.0)
        assert await ledger.read("s") == events
        return report, ended_at

    report, ended_at = run(play())

    assert ended_at == 5.0
    assert report.failed == ("book",)
    assert report.not_run == ("late",)
    assert world.standing == {}
    assert "saga s: what is around stage 'late' ignores its cancel" in caplog.text


def test_winding_up_waits_for_an_interceptor_that_was_given_up() -> None:
    ended: list[str] = []

    class Deaf(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> None:
            if stage_name == "late":
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                await elapse(20.0)
                ended.append(stage_name)

    _, pipeline = scene({"book": (), "late": ()}, {"book": Script("raise", before=1.0)})
    coordinator = SagaCoordinator(FailFast(cancel_grace=2.0), interceptors=[Deaf()])

    async def play() -> None:
        await coordinator.run(pipeline)
        assert ended == []
        await coordinator.wind_up()

    run(play())

    assert ended == ["late"]


def test_an_interceptor_that_cancels_itself_stops_the_saga_as_a_cancel_from_outside_does() -> None:
    class Quitting(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> None:
            if stage_name == "b":
                raise asyncio.CancelledError

    world, pipeline = scene(SEQUENCE)

    report = run(SagaCoordinator(interceptors=[Quitting()]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message == "a task of the saga was cancelled from outside"
    assert world.log == ["+a", "-a"]


def test_an_interceptor_that_raises_what_is_no_exception_refuses_the_stage() -> None:
    class Failing(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> None:
            if stage_name == "b":
                raise Outcome("not in this test")

    world, pipeline = scene(SEQUENCE)

    report = run(SagaCoordinator(interceptors=[Failing()]).run(pipeline))

    assert report.cause is not None
    assert (report.cause.stage, report.cause.message) == ("b", "not in this test")
    assert world.log == ["+a", "-a"]


def test_a_ledger_that_can_not_record_what_an_interceptor_answered_ends_the_saga_when_nothing_runs_any_more() -> None:
    world, pipeline = scene({"a": (), "b": ("a",), "c": ()}, {"a": Script(before=1.0), "c": Script(before=2.0)})
    coordinator = SagaCoordinator(ledger=FailingLedger(StageSkipped), interceptors=[Recorder(answer_for="b")])

    with pytest.raises(LedgerError, match=r"because its ledger failed: the disk is full\. .* In effect: a.* not known: c"):
        run(coordinator.run(pipeline, saga_id="s"))

    assert world.log == ["+a", "+c"]


def test_a_saga_that_stops_lets_be_recorded_what_an_interceptor_has_answered_though_the_ledger_takes_longer_than_the_grace() -> None:
    class Late(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> Any:
            if stage_name != "price":
                return None
            await elapse(5.5)
            return InterceptorResult(stage_ran=False, result={"cached": True})

    world, pipeline = scene({"price": (), "book": ()}, {"book": Script("raise")})
    coordinator = SagaCoordinator(FailFast(cancel_grace=1.0), ledger=SlowLedger(seconds=3.0), interceptors=[Late()])

    # SagaStarted until 3, StageStarted of book until 6, its StageFailed until 9; from 8.5 to 11.5 what was answered.
    report = run(coordinator.run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.skipped == ("price",)
    assert world.standing == {}


@pytest.mark.parametrize(("kind", "status"), [("probed", SagaStatus.COMPLETED), ("compensable", SagaStatus.STUCK)])
def test_what_an_interceptor_answers_is_not_taken_for_a_stage_whose_process_died(kind: str, status: SagaStatus) -> None:
    """Its effect may have landed. Nobody asked, and the saga could not be ended, whoever resumed it."""
    world, pipeline = scene({"b": (), "c": ("b",)}, kinds={"b": kind})
    world.land("b")
    ledger = MemoryLedger()

    async def play() -> SagaReport:
        started = SagaStarted(saga_id="s", pipeline="scene", graph=Blueprint.of(pipeline).graph, policy=FailFast())
        token = await ledger.create("s", "gone", [started, StageStarted(stage="b", attempt=1)])
        await ledger.release("s", token)
        return await SagaCoordinator(ledger=ledger, interceptors=[Recorder(answer_for="b")]).resume("s", pipeline)

    report = run(play())

    assert report.status is status
    assert set(report.kept) | set(report.in_doubt) == set(world.standing)


@pytest.mark.parametrize("kind", ["compensable", "recording"])
def test_what_an_interceptor_answers_is_not_taken_for_a_stage_in_doubt_that_a_person_has_said_is_to_be_tried_again(kind: str) -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang", lands=True, then=("ok",))}, {"b": kind})
    recorder = Recorder()
    coordinator = SagaCoordinator(FailFast(timeout=3.0, on_failure="halt"), interceptors=[recorder])
    assert set(run(coordinator.run(pipeline, saga_id="s")).in_doubt) == {"b"}
    run(coordinator.settle("s", "b", "retry", "it can be sent again"))
    recorder.answer_for = "b"

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert set(report.kept) == set(world.standing) == {"a", "b", "c"}


class SwitchingOff(Watching):
    """Has the conditional stages after a skipped."""

    async def after(self, stage_name: str, result: Any, _ctx: PipelineContext) -> None:
        if stage_name == "a":
            result.data["skip_reason"] = "switched off"


def test_a_condition_that_holds_only_now_skips_no_stage_whose_process_died() -> None:
    world, pipeline = scene(SEQUENCE)
    pipeline = replace(pipeline, stages={**pipeline.stages, "b": replace(pipeline.stages["b"], conditional=True)})
    world.land("a")
    world.land("b")
    ledger = MemoryLedger()

    async def play() -> SagaReport:
        started = SagaStarted(saga_id="s", pipeline="scene", graph=Blueprint.of(pipeline).graph, policy=FailFast())
        a_ended = StageCompleted(stage="a", output=StageOutput.ok(stage="a"))
        events: list[AnyEvent] = [started, StageStarted(stage="a", attempt=1), a_ended, StageStarted(stage="b", attempt=1)]
        token = await ledger.create("s", "gone", events)
        await ledger.release("s", token)
        return await SagaCoordinator(ledger=ledger, interceptors=[SwitchingOff()]).resume("s", pipeline)

    report = run(play())

    assert report.status is SagaStatus.STUCK
    assert set(report.in_doubt) == {"b"}
    assert set(report.blocked) == {"a"}


def test_a_condition_that_holds_only_now_skips_no_stage_that_has_recorded_an_effect() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise", lands=True, then=("ok",))}, {"b": "recording"})
    pipeline = replace(pipeline, stages={**pipeline.stages, "b": replace(pipeline.stages["b"], conditional=True)})
    ledger = MemoryLedger()
    recorder = Recorder()
    assert run(SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(pipeline, saga_id="s")).failed == ("b",)

    report = run(SagaCoordinator(ledger=ledger, interceptors=[SwitchingOff(), recorder]).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert set(report.kept) == set(world.standing) == {"a", "b", "c"}
    assert ("before", "b") in recorder.seen


def test_a_hook_that_an_interceptor_adds_is_called_for_the_stages_that_are_left() -> None:
    """As in plain stageflow, which looks at the context before each."""
    called: list[str] = []

    class Adding(Watching):
        async def after(self, stage_name: str, _result: Any, ctx: PipelineContext) -> None:
            if stage_name == "a":
                ctx.add_before_stage_start_hook(lambda name, *_: called.append(name))

    _, pipeline = scene(SEQUENCE)

    run(SagaCoordinator(interceptors=[Adding()]).run(pipeline))

    assert called == ["b", "c"]
