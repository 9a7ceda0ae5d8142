"""When each stage starts, and what it gets; whatever hooks, interceptors and sinks are around it, the report says the same."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import weakref
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from stageflow.api import Pipeline, PipelineContext, StageOutput, stage
from stageflow.context import ContextSnapshot, RunIdentity
from stageflow.events import NoOpEventSink
from stageflow.stages.inputs import UndeclaredDependencyError
from stageflow.stages.ports import create_core_ports

from saga import (
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.live.inputs import _HANDED_ON, context_of
from tests.controlled import ControlledLoop, elapse, run
from tests.world import HOOKED, WATCHED, Script, nothing, scene


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


@HOOKED
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


@WATCHED
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


def test_a_stage_sees_all_that_stageflow_shows_of_the_callers_context() -> None:
    given: dict[str, Any] = {field.name: f"its {field.name}" for field in fields(ContextSnapshot) if field.name != "run_id"}
    given |= {field.name: uuid4() for field in fields(RunIdentity)} | {"metadata": {"seat": "12A"}, "created_at": datetime.now(UTC)}
    context = PipelineContext.create(**given)
    shown: list[ContextSnapshot[Any]] = []

    async def look(ctx: SagaContext) -> None:
        shown.append(ctx.snapshot)

    assert run(SagaCoordinator().run(staged(Pipeline(name="p"), "a", look), context)).ok
    assert shown == [context.to_snapshot()]
    assert type(shown[0]) is ContextSnapshot
    assert type(shown[0].run_id) is RunIdentity
    assert {name: getattr(shown[0], name) for name in given} == given
    assert shown[0].metadata is not context.metadata


EVERY_FIELD = frozenset(inspect.signature(PipelineContext.create).parameters)


@pytest.mark.parametrize("given", [(), _HANDED_ON, EVERY_FIELD], ids=["none", "what is only handed on", "every one"])
def test_a_context_of_fields_is_the_one_that_stageflow_makes_of_them(given: Collection[str]) -> None:
    dicts = {"configuration": {"seat": "12A"}, "metadata": {"seat": "12A"}, "data": {"seat": "12A"}}
    of_a_type: dict[str, Any] = dicts | {
        "created_at": datetime.now(UTC),
        "event_sink": NoOpEventSink(),
        "artifacts": ["a ticket"],
        "canceled": True,
    }
    fields: dict[str, Any] = {name: of_a_type.get(name, f"its {name}") for name in given}

    made = context_of("p", None, fields)

    expected = PipelineContext.create(**{"topology": "p"} | fields)
    assert type(made) is PipelineContext
    assert replace(made, created_at=expected.created_at, event_sink=expected.event_sink) == expected
    assert type(made.event_sink) is type(expected.event_sink)
    assert not any(getattr(made, name) is value for name, value in dicts.items())


WHO: ContextVar[str] = ContextVar("WHO", default="the caller")


@WATCHED
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


@HOOKED
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


@WATCHED
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


@HOOKED
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


@WATCHED
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


@HOOKED
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


@HOOKED
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


@HOOKED
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


@HOOKED
def test_a_stage_may_take_longer_than_stageflow_lets_one(context: PipelineContext | None) -> None:
    """How long one may take is the policy's to say: without a word of it, as long as it likes."""
    world, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script(before=3_600.0)})

    report = run(SagaCoordinator().run(pipeline, context))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b"]


@HOOKED
def test_a_stage_whose_turn_comes_after_the_deadline_has_not_run(context: PipelineContext | None) -> None:
    pipeline, ran = busy_chain()

    report = run(SagaCoordinator(FailFast(deadline=2.5)).run(pipeline, context))

    assert ran == ["s0", "s1", "s2"]
    assert report.skipped == ()
    assert report.not_run == tuple(f"s{number}" for number in range(3, 10))
