"""A stage that runs a pipeline of its own as a saga."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stageflow.api import Pipeline, PipelineContext, StageOutput

from saga import Compensation, FailFast, MisuseError, Retry, SagaCoordinator, SagaReport, SagaStatus, StageState, nested
from saga.nested import NestedSagaFailed
from tests.controlled import elapse, run
from tests.world import SEQUENCE, CardDeclined, Script, World, scene

IMPATIENT = FailFast(compensation=Compensation(retry=Retry(attempts=1)))


def family(child_scripts: dict[str, Script], parent_scripts: dict[str, Script], policy: Any = None) -> tuple[World, World, Pipeline]:
    """before -> child (a -> b -> c) -> after, each in a world of its own."""
    child_world, child = scene(SEQUENCE, child_scripts)
    parent_world, parent = scene({"before": ()}, parent_scripts)
    _, tail = scene({"after": ()}, parent_scripts)
    parent = parent.with_stage("child", nested(child, policy), dependencies=("before",))
    after = tail.stages["after"]
    after.runner.world = parent_world  # type: ignore[union-attr] # a scripted stage
    parent = parent.with_stage("after", after.runner, dependencies=("child",))
    return child_world, parent_world, parent


def test_a_child_that_completes_gives_its_outputs_to_the_parent() -> None:
    child_world, _, parent = family({}, {})

    report = run(SagaCoordinator().run(parent, saga_id="s"))

    assert report.status is SagaStatus.COMPLETED
    assert report.kept["child"].data == {"saga_id": "s/child", "outputs": {name: {"stage": name} for name in "abc"}}
    assert set(child_world.standing) == set("abc")


def test_a_child_that_fails_undoes_itself_and_fails_the_parents_stage() -> None:
    child_world, parent_world, parent = family({"c": Script("raise")}, {})
    coordinator = SagaCoordinator()

    report = run(coordinator.run(parent, saga_id="s"))

    assert child_world.log == ["+a", "+b", "-b", "-a"]
    assert parent_world.log == ["+before", "-before"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["child"].state is StageState.FAILED
    assert report.cause is not None
    assert isinstance(report.cause.exception, NestedSagaFailed)
    assert report.cause.exception.report.status is SagaStatus.COMPENSATED
    assert "stage 'c' raised: CardDeclined" in report.cause.message
    assert run(coordinator.report("s/child")).status is SagaStatus.COMPENSATED


def test_a_parent_that_fails_later_undoes_the_child_through_the_childs_own_ledger_entries() -> None:
    child_world, parent_world, parent = family({}, {"after": Script("raise")})
    coordinator = SagaCoordinator()

    report = run(coordinator.run(parent, saga_id="s"))

    assert child_world.undone() == ["c", "b", "a"]
    assert parent_world.undone() == ["before"]
    assert report.compensation_order == ("child", "before")
    child = run(coordinator.report("s/child"))
    assert child.status is SagaStatus.COMPENSATED
    assert child.compensation_order == ("c", "b", "a")
    assert child.cause is None


def test_a_child_that_is_stuck_makes_the_parent_stuck() -> None:
    child_world, parent_world, parent = family({"b": Script(undo_fails=9), "c": Script("raise")}, {}, IMPATIENT)

    report = run(SagaCoordinator(IMPATIENT).run(parent))

    assert report.status is SagaStatus.STUCK
    assert report.stages["child"].state is StageState.STUCK
    assert report.stages["before"].state is StageState.BLOCKED
    assert set(child_world.standing) == {"a", "b"}
    assert set(parent_world.standing) == {"before"}


def test_a_child_that_halted_is_undone_by_its_parent() -> None:
    child_world, parent_world, parent = family({"c": Script("raise")}, {}, FailFast(on_failure="halt"))

    report = run(SagaCoordinator().run(parent))

    assert report.status is SagaStatus.COMPENSATED
    assert child_world.standing == {}
    assert parent_world.standing == {}


def test_a_cancel_reaches_the_grandchildren() -> None:
    world, grandchild = scene(SEQUENCE, {"b": Script(before=20)}, dict.fromkeys("abc", "probed"))
    child = Pipeline(name="child").with_stage("grandchild", nested(grandchild, FailFast(in_flight="cancel")))
    parent = Pipeline(name="parent").with_stage("child", nested(child, FailFast(in_flight="cancel")))
    coordinator = SagaCoordinator(FailFast(in_flight="cancel"))

    async def play() -> tuple[SagaReport, float]:
        running = asyncio.create_task(coordinator.run(parent, saga_id="s"))
        await elapse(5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return await coordinator.report("s"), asyncio.get_running_loop().time()

    report, took = run(play())

    assert world.refusals == []
    assert world.standing == {}
    assert took == pytest.approx(5)
    assert report.status is SagaStatus.COMPENSATED
    assert run(coordinator.report("s/child/grandchild")).status is SagaStatus.COMPENSATED


def test_a_child_that_was_never_begun_or_undid_itself_has_not_landed() -> None:
    # The parent's stage times out while its child is at work: the child undoes itself, and the probe tells.
    child_world, child = scene(SEQUENCE, {"b": Script(before=20)}, dict.fromkeys("abc", "probed"))
    parent_world, parent = scene({"before": ()})
    parent = parent.with_stage("child", nested(child, FailFast(in_flight="cancel")), dependencies=("before",))

    report = run(SagaCoordinator(FailFast(timeout=5)).run(parent))

    assert child_world.standing == parent_world.standing == {}
    assert report.status is SagaStatus.COMPENSATED


def test_a_child_is_tried_again_with_an_id_of_its_own() -> None:
    script = Script("raise", then=("ok",))
    _, _, parent = family({"b": script}, {})
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0)))

    report = run(coordinator.run(parent, saga_id="s"))

    assert report.status is SagaStatus.COMPLETED
    assert report.kept["child"].data["saga_id"] == "s/child#2"


def test_every_attempts_child_is_undone() -> None:
    # The first child halts with its effects standing, the second completes, and then the parent fails.
    script = Script("raise", then=("ok",))
    child_world, _, parent = family({"b": script}, {"after": Script("raise")}, FailFast(on_failure="halt"))

    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0))).run(parent, saga_id="s"))

    assert script.attempts == ["raise", "ok"]
    assert child_world.standing == {}
    assert report.status is SagaStatus.COMPENSATED


def test_a_child_inherits_the_parents_input_but_for_what_is_given() -> None:
    seen: list[tuple[Any, ...]] = []

    async def look(ctx: Any) -> None:
        seen.append((ctx.snapshot.input_text, ctx.snapshot.execution_mode, ctx.snapshot.topology))

    child = Pipeline(name="kid").with_stage("look", look, "enrich")
    parent = Pipeline(name="mum")
    parent = parent.with_stage("same", nested(child)).with_stage("other", nested(child, fields=lambda _: {"input_text": "other"}))

    run(SagaCoordinator().run(parent, input_text="mine", execution_mode="fast"))

    assert sorted(seen) == [("mine", "fast", "kid"), ("other", "fast", "kid")]


def test_a_stage_may_run_a_saga_without_nesting_it() -> None:
    _, child = scene(SEQUENCE)
    reports: list[SagaReport] = []

    async def call(ctx: Any) -> StageOutput:
        reports.append(await ctx.run_saga(child, PipelineContext.create(input_text="own")))
        with pytest.raises(MisuseError, match="either a context or its fields"):
            await ctx.run_saga(child, PipelineContext.create(), input_text="x")
        return StageOutput.ok()

    report = run(SagaCoordinator().run(Pipeline().with_stage("call", call, "work")))

    assert report.ok
    assert reports[0].status is SagaStatus.COMPLETED


def test_a_saga_that_completed_is_undone_on_demand_once() -> None:
    world, pipeline = scene(SEQUENCE)
    coordinator = SagaCoordinator()
    run(coordinator.run(pipeline, saga_id="s"))

    report = run(coordinator.compensate("s", pipeline))
    again = run(coordinator.compensate("s", pipeline))

    assert report == again
    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["c", "b", "a"]
    with pytest.raises(ExceptionGroup, match="is compensated"):
        report.raise_for_status()


def test_a_saga_whose_ledger_breaks_can_be_undone_when_it_is_back() -> None:
    from tests.test_ledger import SlowLedger

    world, pipeline = scene(SEQUENCE)
    ledger = SlowLedger()
    coordinator = SagaCoordinator(ledger=ledger)

    async def refuse(saga_id: str, owner: str) -> int:
        raise OSError("no ledger")

    async def play() -> SagaReport:
        await coordinator.run(pipeline, saga_id="s")
        acquire, ledger.acquire = ledger.acquire, refuse  # type: ignore[method-assign] # the fault that is injected
        with pytest.raises(OSError, match="no ledger"):
            await coordinator.compensate("s", pipeline)
        ledger.acquire = acquire  # type: ignore[method-assign] # the fault is over
        return await coordinator.compensate("s", pipeline)

    assert run(play()).status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_child_that_raises_through_is_told_with_its_own_words() -> None:
    error = NestedSagaFailed(SagaReport.model_validate_json(run(SagaCoordinator().run(scene(SEQUENCE)[1], saga_id="s")).model_dump_json()))

    assert str(error) == "its saga s is completed"
    assert isinstance(error, Exception)
    assert not isinstance(error, CardDeclined)
