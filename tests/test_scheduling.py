"""Whoever starts the stages, we or stageflow, they get the same and the report says the same."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from contextvars import ContextVar
from typing import Any

import pytest
from stageflow import BaseInterceptor, ErrorAction, InterceptorResult
from stageflow.api import Pipeline, PipelineContext, StageCancellationRequested, StageKind, StageOutput, stage
from stageflow.stages.inputs import UndeclaredDependencyError
from stageflow.stages.ports import create_core_ports

from saga import (
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from tests.controlled import ControlledLoop, elapse, run
from tests.slow import SlowLedger
from tests.world import CardDeclined, Script, Scripted, hooked, nothing, scene

BY_US_OR_STAGEFLOW = pytest.mark.parametrize("context", [None, hooked()], ids=["by our schedule", "by stageflow's"])


class Watching(BaseInterceptor):
    """Has stageflow run the pipeline, and does nothing."""

    name = "watching"

    async def before(self, stage_name: str, ctx: PipelineContext) -> None: ...

    async def after(self, _stage_name: str, _result: Any, _ctx: PipelineContext) -> None: ...


def staged(pipeline: Pipeline, name: str, runner: Any, *dependencies: str, conditional: bool = False) -> Pipeline:
    return pipeline.with_stage(name, runner, "work", dependencies=dependencies, conditional=conditional)


async def undo(_: Any) -> None: ...


def test_what_a_stage_gave_is_let_go_of_when_those_that_use_it_have_ended() -> None:
    """It may be large; what the ledger has of it is a copy."""

    class Large: ...

    large: list[weakref.ref[Large]] = []
    is_there: list[bool] = []

    async def gives(_: SagaContext) -> dict[str, Any]:
        given = Large()
        large.append(weakref.ref(given))
        return {"large": given}

    async def looks(_: SagaContext) -> None:
        is_there.append(large[0]() is not None)

    pipeline = staged(staged(Pipeline(name="p"), "gives", gives), "uses", looks, "gives")
    pipeline = staged(staged(pipeline, "next", looks, "uses"), "last", looks, "next")

    run(SagaCoordinator().run(pipeline))

    assert is_there == [True, False, False]


@BY_US_OR_STAGEFLOW
def test_a_stage_has_its_inputs_in_the_order_in_which_they_came(context: PipelineContext | None) -> None:
    """So `ctx.inputs.get(key)` finds the same output first."""
    seen: list[Any] = []
    second_is_done = asyncio.Event()

    async def first(_: SagaContext) -> dict[str, Any]:
        await second_is_done.wait()
        for _turn in range(5):
            # What ends in the same turn of the loop comes in any order.
            await asyncio.sleep(0)
        return {"by": "first"}

    async def second(_: SagaContext) -> dict[str, Any]:
        second_is_done.set()
        return {"by": "second"}

    async def last(ctx: SagaContext) -> None:
        seen.extend((list(ctx.inputs.prior_outputs), ctx.inputs.get("by"), ctx.inputs.get_from("first", "by"), ctx.stage_name))
        with pytest.raises(UndeclaredDependencyError, match="Stage 'last'"):
            ctx.inputs.get_output("other")

    pipeline = staged(staged(Pipeline(name="p"), "first", first), "other", nothing)
    pipeline = staged(staged(pipeline, "second", second), "last", last, "first", "second")

    assert run(SagaCoordinator().run(pipeline, context)).ok
    assert seen == [["second", "first"], "second", "first", "last"]


class Masking(BaseInterceptor):
    """Lets nobody read what a card's number is."""

    name = "masking"

    async def before(self, stage_name: str, ctx: PipelineContext) -> None: ...

    async def after(self, _stage_name: str, result: Any, _ctx: PipelineContext) -> None:
        if "number" in result.data:
            result.data["number"] = "****"


@pytest.mark.parametrize("policy", [FailFast(retry=Retry(attempts=2, wait=0)), ContinueWithFallback()], ids=["retry", "fallback"])
def test_a_further_attempt_and_the_fallback_read_what_an_interceptor_has_let_pass_as_the_first_attempt_did(policy: Any) -> None:
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

    run(SagaCoordinator(policy, interceptors=[Masking()]).run(pipeline))

    assert seen == [("****", "first")] * 2


@pytest.mark.parametrize("interceptors", [(), (Watching(),)], ids=["by our schedule", "by stageflow's"])
@pytest.mark.parametrize("given", [{"ports": create_core_ports(db="a port")}, {"db": "a database"}, {}])
def test_a_stage_has_the_ports_the_sink_and_the_input_of_its_context(given: dict[str, Any], interceptors: tuple[Any, ...]) -> None:
    context = PipelineContext.create(input_text="OSL-JFK", metadata={"seat": "12A"}, **given)
    contexts: list[SagaContext] = []

    async def look(ctx: SagaContext) -> None:
        contexts.append(ctx)

    pipeline = staged(staged(Pipeline(name="p"), "a", look), "b", look, "a")

    assert run(SagaCoordinator(interceptors=interceptors).run(pipeline, context)).ok
    a, b = contexts
    assert a.inputs.ports == b.inputs.ports == context.derive_root_stage_context().inputs.ports
    assert a.snapshot == a.inputs.snapshot == b.snapshot == context.to_snapshot()
    assert a.timer is b.timer is not None
    assert a.event_sink is context.event_sink


WHO: ContextVar[str] = ContextVar("WHO", default="the caller")


@pytest.mark.parametrize("interceptors", [(), (Watching(),)], ids=["by our schedule", "by stageflow's"])
def test_what_a_stage_sets_in_its_context_variables_no_other_stage_sees(interceptors: tuple[Any, ...]) -> None:
    """As in plain stageflow: what a stage binds for its log lines, say, is not bound for those after it, nor when it is undone."""
    seen: list[tuple[str, str]] = []

    async def forward(ctx: SagaContext) -> None:
        seen.append((ctx.stage_name, WHO.get()))
        WHO.set(ctx.stage_name)
        await asyncio.sleep(0)
        assert WHO.get() == ctx.stage_name
        if ctx.stage_name == "last":
            raise RuntimeError("no lorry")

    async def backward(ctx: CompensationContext) -> None:
        seen.append((f"undo {ctx.stage_name}", WHO.get()))
        WHO.set(f"undo {ctx.stage_name}")

    async def in_a_context() -> SagaReport:
        WHO.set("this caller")
        return await SagaCoordinator(interceptors=interceptors).run(pipeline)

    stages = {name: compensable(forward, backward) for name in ("a", "b", "c", "last")}
    pipeline = staged(staged(Pipeline(name="p"), "a", stages["a"]), "b", stages["b"], "a")
    pipeline = staged(staged(pipeline, "c", stages["c"], "a"), "last", stages["last"], "b", "c")

    report = run(in_a_context())

    assert report.status is SagaStatus.COMPENSATED
    assert {who for _, who in seen} == {"this caller"}
    assert sorted(name for name, _ in seen) == ["a", "b", "c", "last", "undo a", "undo b", "undo c"]


@BY_US_OR_STAGEFLOW
@pytest.mark.parametrize("given", [{"skip_reason": "nothing to ship"}, {"skip_reason": ""}, {}])
def test_a_conditional_stage_is_skipped_for_the_same_reason(given: dict[str, Any], context: PipelineContext | None) -> None:
    ran: list[str] = []

    async def check(_: SagaContext) -> dict[str, Any]:
        return given

    async def note(ctx: SagaContext) -> None:
        ran.append(ctx.stage_name)

    pipeline = staged(staged(Pipeline(name="p"), "check", check), "plain", note, "check")
    pipeline = staged(staged(pipeline, "ship", note, "check", conditional=True), "write", note, "ship")

    report = run(SagaCoordinator().run(pipeline, context))

    assert report.status is SagaStatus.COMPLETED
    assert report.skipped == (("ship",) if given.get("skip_reason") else ())
    assert report.stages["ship"].skip_reason == (given.get("skip_reason") or None)
    assert sorted(ran) == (["plain", "write"] if given.get("skip_reason") else ["plain", "ship", "write"])


@pytest.mark.parametrize("interceptors", [(), (Watching(),)], ids=["by our schedule", "by stageflow's"])
def test_a_stage_that_its_condition_had_skipped_when_another_one_failed_is_told_as_skipped(interceptors: tuple[Any, ...]) -> None:
    async def check(_: SagaContext) -> dict[str, Any]:
        return {"skip_reason": "nothing to ship"}

    async def book(_: SagaContext) -> StageOutput:
        await elapse(1)
        return StageOutput.fail("no lorry")

    pipeline = staged(staged(Pipeline(name="p"), "check", check), "book", book, "check")
    pipeline = staged(pipeline, "ship", nothing, "check", conditional=True)

    report = run(SagaCoordinator(interceptors=interceptors).run(pipeline))

    assert report.failed == ("book",)
    assert report.skipped == ("ship",)
    assert report.stages["ship"].skip_reason == "nothing to ship"


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
    assert report.not_run == ("ship",)


@BY_US_OR_STAGEFLOW
def test_a_condition_counts_before_a_branch_that_fell(context: PipelineContext | None) -> None:
    async def check(_: SagaContext) -> dict[str, Any]:
        return {"skip_reason": "nothing to ship"}

    async def fail(_: SagaContext) -> StageOutput:
        return StageOutput.fail("no lorry")

    pipeline = staged(staged(Pipeline(name="p"), "check", check), "book", fail)
    pipeline = staged(pipeline, "ship", nothing, "check", "book", conditional=True)
    pipeline = staged(pipeline, "drive", nothing, "book")

    report = run(SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch")).run(pipeline, context))

    assert report.stages["ship"].skip_reason == "nothing to ship"
    assert report.stages["drive"].skip_reason == "book did not complete"


@pytest.mark.parametrize("interceptors", [(), (Watching(),)], ids=["by our schedule", "by stageflow's"])
def test_what_a_resumed_saga_has_is_given_to_those_that_run_again(interceptors: tuple[Any, ...]) -> None:
    """A long chain: to hand on what they gave takes no stack."""
    stages, is_open = 1_200, False

    async def gate(ctx: SagaContext) -> dict[str, Any]:
        return {"got": ctx.inputs.get("number")} if is_open else StageOutput.fail("closed")  # type: ignore[return-value] # either will do

    def numbered(number: int) -> Any:
        async def give(_: SagaContext) -> dict[str, Any]:
            return {"number": number}

        return compensable(give, undo)

    numbers = range(stages)
    chain = {f"s{n}": stage(f"s{n}", numbered(n), dependencies=(f"s{n - 1}",) if n else ()) for n in numbers}
    pipeline = staged(Pipeline(name="p", stages=chain), "gate", gate, f"s{stages - 1}")
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), interceptors=interceptors)

    async def play() -> SagaReport:
        nonlocal is_open
        halted = await coordinator.run(pipeline, saga_id="s")
        assert halted.status is SagaStatus.HALTED
        is_open = True
        return await coordinator.resume("s", pipeline)

    report = run(play())

    assert report.ok
    assert report.stages["gate"].state is StageState.KEPT
    assert report.kept["gate"].data == {"got": stages - 1}


class HeldUp(Watching):
    """Keeps a stage waiting before it runs, and lets it run when it is cancelled there."""

    def __init__(self, stage_name: str) -> None:
        self.stage_name = stage_name

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        if stage_name == self.stage_name:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()


def test_a_stage_that_stageflow_gets_to_when_the_saga_is_stopping_has_not_run() -> None:
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
    """Has stageflow wait for a stage for a millisecond, as a timeout of stageflow's own does."""

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        ctx.data["_timeout.book"] = 1
        await super().before(stage_name, ctx)


def test_an_interceptor_that_stageflow_leaves_running_ends_with_the_saga() -> None:
    """Of a stage that fails so, stageflow does not await the siblings."""
    world, pipeline = scene({"book": (), "late": ()}, {"book": Script(before=1.0)})

    report = run(SagaCoordinator(interceptors=[Hasty("before late")]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.not_run == ("late",)
    assert world.undone() == ["book"]


class Cancelling(Watching):
    """Cancels stageflow's own context when a stage has run."""

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
def test_what_is_cancelled_in_stageflows_run_alone_stops_the_saga(context: PipelineContext | None, interceptors: tuple[Any, ...]) -> None:
    pipeline = staged(Pipeline(name="p"), "first", compensable(nothing, undo))
    pipeline = staged(staged(pipeline, "second", nothing, "first"), "third", nothing, "second")

    report = run(SagaCoordinator(interceptors=interceptors).run(pipeline, context))

    assert report.status is SagaStatus.CANCELLED
    assert report.cause is not None
    assert (report.cause.stage, report.cause.message) == (None, "enough")
    assert set(report.kept) == {"first"}
    assert report.not_run == ("second", "third")


def busy_chain() -> tuple[Pipeline, list[str]]:
    """Ten stages that compute for a second each and never await, and what has run of them."""
    ran: list[str] = []

    async def compute(ctx: SagaContext) -> None:
        ran.append(ctx.stage_name)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ControlledLoop)
        loop.compute(1.0)

    pipeline = Pipeline(name="p")
    for number in range(10):
        pipeline = staged(pipeline, f"s{number}", compute, *([f"s{number - 1}"] if number else []))
    return pipeline, ran


@BY_US_OR_STAGEFLOW
def test_between_stages_that_never_await_others_get_their_turn(context: PipelineContext | None) -> None:
    pipeline, ran = busy_chain()
    seen: list[int] = []

    async def neighbour() -> None:
        while len(ran) < 10:
            seen.append(len(ran))
            await asyncio.sleep(0)

    async def both() -> SagaReport:
        other = asyncio.create_task(neighbour())
        report = await SagaCoordinator().run(pipeline, context)
        await other
        return report

    assert run(both()).ok
    assert set(seen) == set(range(10))


@BY_US_OR_STAGEFLOW
def test_a_cancel_that_comes_between_two_stages_lets_no_further_one_start(context: PipelineContext | None) -> None:
    """Also when it strikes the task that runs both."""
    pipeline, ran = busy_chain()

    async def all_cancelled() -> None:
        me = asyncio.current_task()
        while len(ran) < 3:
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {me, caller}:
            task.cancel()

    caller: asyncio.Task[Any] | None = None

    async def play() -> SagaReport:
        nonlocal caller
        caller = asyncio.current_task()
        other = asyncio.create_task(all_cancelled())
        report = await SagaCoordinator(FailFast(on_interrupt="halt")).run(pipeline, context)
        await other
        return report

    report = run(play())

    assert report.status is SagaStatus.HALTED
    assert list(report.kept) == ran == ["s0", "s1", "s2"]


@BY_US_OR_STAGEFLOW
def test_a_cancel_that_a_stage_did_not_heed_stops_no_other_one(context: PipelineContext | None) -> None:
    async def heedless(_: SagaContext) -> dict[str, Any]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await elapse(1.0)
        task.cancel()
        return {}

    pipeline = staged(staged(Pipeline(name="p"), "a", heedless), "b", nothing, "a")

    report = run(SagaCoordinator().run(pipeline, context))

    assert report.status is SagaStatus.COMPLETED
    assert list(report.kept) == ["a", "b"]


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


@BY_US_OR_STAGEFLOW
def test_a_stage_may_take_longer_than_stageflow_lets_one(context: PipelineContext | None) -> None:
    """How long one may take is the policy's to say: without a word of it, as long as it likes."""
    world, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script(before=3_600.0)})

    report = run(SagaCoordinator().run(pipeline, context))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b"]


class Noting(Watching):
    """Notes what stageflow tells of every stage, and has those that failed run again."""

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


@pytest.mark.parametrize("by_stageflow", [False, True])
def test_what_runs_when_the_saga_is_cancelled_is_cancelled_at_once_where_the_policy_says_so(by_stageflow: bool) -> None:
    noting = Noting()
    world, pipeline = scene({"slow": (), "slower": ()}, {"slow": Script("hang"), "slower": Script("hang")})
    coordinator = SagaCoordinator(FailFast(in_flight="cancel", cancel_grace=30.0), interceptors=[noting] if by_stageflow else ())

    async def play() -> tuple[SagaReport, float]:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(1.0)
        await coordinator.cancel("s", "not needed any more")
        return await running, asyncio.get_running_loop().time()

    report, ended_at = run(play())

    assert {stage.state for stage in report.stages.values()} == {StageState.IN_DOUBT}
    assert ended_at == 1.0
    assert world.running == set()
    assert noting.told == (dict.fromkeys(("slow", "slower"), ("completed", "the saga is stopping")) if by_stageflow else {})


@BY_US_OR_STAGEFLOW
def test_a_stage_whose_turn_comes_after_the_deadline_has_not_run(context: PipelineContext | None) -> None:
    pipeline, ran = busy_chain()

    report = run(SagaCoordinator(FailFast(deadline=2.5)).run(pipeline, context))

    assert ran == ["s0", "s1", "s2"]
    assert report.skipped == ()
    assert report.not_run == tuple(f"s{number}" for number in range(3, 10))


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
