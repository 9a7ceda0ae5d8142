"""A stage that runs a pipeline of its own as a saga."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from stageflow.api import Pipeline, PipelineContext, StageArtifact, StageContext, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    GraphChanged,
    LedgerConflict,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Policy,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaFailed,
    SagaReport,
    SagaStatus,
    SagaUnrecorded,
    StageState,
    compensable,
    nested,
)
from saga.events import AnyEvent, SagaEnded, SagaResumed, SagaTurnedBack, StageCompleted, StageStarted
from saga.ledger import Entry
from saga.ledgers.sqlite import SQLiteLedger
from saga.listeners.logs import log_events
from saga.nested import NestedSaga
from saga.report import NestedSagaFailed
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.slow import SlowLedger
from tests.world import SEQUENCE, CardDeclined, Recording, Script, Scripted, World, conclude, nothing, scene

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


OWN_EFFECT = "expected a stage that has done nothing but run a saga, for stage 'a', got one that had an effect of its own"


def before_and_after_it_was_nested(world: World, kind: type[Scripted], outcome: str) -> tuple[Pipeline, World, Pipeline]:
    """A stage that has its effect itself; and one in its place that runs a saga, in a world of its own."""
    child_world, child = scene({"b": ()})
    before: Any = kind(world, "a", Script(outcome, lands=True))
    return Pipeline(name="p").with_stage("a", before), child_world, Pipeline(name="p").with_stage("a", nested(child))


@pytest.mark.parametrize(("kind", "outcome"), [(Scripted, "ok"), (Recording, "ok"), (Recording, "raise")])
def test_what_a_stage_did_before_it_was_a_nested_saga_is_not_called_undone(kind: type[Scripted], outcome: str) -> None:
    world = World({"a": ()})
    before, _, after = before_and_after_it_was_nested(world, kind, outcome)
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(before, saga_id="s"))

    report = run(coordinator.compensate("s", after))

    assert world.log == ["+a"]
    assert (report.status, list(report.stuck)) == (SagaStatus.STUCK, ["a"])
    assert OWN_EFFECT in str(report)


def test_what_a_stage_did_before_it_was_a_nested_saga_is_undone_by_its_code_as_it_was() -> None:
    world = World({"a": ()})
    before, _, after = before_and_after_it_was_nested(world, Scripted, "ok")
    coordinator = SagaCoordinator()
    run(coordinator.run(before, saga_id="s"))
    run(coordinator.compensate("s", after))

    run(coordinator.settle("s", "a", "retry", "its code is as it was"))

    assert run(coordinator.resume("s", before)).status is SagaStatus.COMPENSATED
    assert world.log == ["+a", "-a"]


def test_what_a_stage_did_before_it_was_a_nested_saga_stands_when_that_one_is_undone() -> None:
    world = World({"a": ()})
    before, child_world, after = before_and_after_it_was_nested(world, Recording, "raise")
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(before, saga_id="s"))
    assert run(coordinator.resume("s", after)).status is SagaStatus.COMPLETED

    report = run(coordinator.compensate("s", after))

    assert child_world.log == ["+b", "-b"]
    assert world.log == ["+a"]
    assert (report.status, list(report.stuck)) == (SagaStatus.STUCK, ["a"])
    assert OWN_EFFECT in str(report)


def trip_with(hotel: Sequence[str]) -> tuple[World, Pipeline]:
    """seat -> rooms -> car, where rooms runs a saga that runs the hotel's."""
    world, inner = scene({name: tuple(hotel[:place][-1:]) for place, name in enumerate(hotel)}, kinds=dict.fromkeys(hotel, "probed"))
    seat, car = (scene({name: ()}, kinds={name: "probed"})[1].stages[name].runner for name in ("seat", "car"))
    for stage in (seat, car):
        stage.world = world  # type: ignore[union-attr] # a scripted stage
    rooms = Pipeline(name="rooms").with_stage("hotel", nested(inner))
    trip = Pipeline(name="trip").with_stage("seat", seat).with_stage("rooms", nested(rooms), dependencies=("seat",))
    return world, trip.with_stage("car", car, dependencies=("rooms",))


@pytest.mark.parametrize("going_on", ["resume", "compensate", "recover"])
@pytest.mark.parametrize("kill", [7, 8, 10, 12])
def test_a_saga_within_which_a_pipeline_has_changed_is_left_as_it_is_and_goes_on_with_the_old_one(kill: int, going_on: str) -> None:
    world, trip = trip_with(["room", "breakfast"])
    ledger = Dying(kill)
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(trip, saga_id="s"))
    ledger.forget_owners()
    ledger.left = 99
    coordinator = SagaCoordinator(ledger=ledger)
    before = {saga_id: run(ledger.read(saga_id)) for saga_id in ("s", "s/rooms", "s/rooms/hotel")}
    assert before["s/rooms/hotel"]
    other_world, other = trip_with(["room", "sauna"])

    if going_on == "recover":
        recovery = run(coordinator.recover(other))
        assert not recovery.reports
        refused = recovery.failed["s"]
    else:
        with pytest.raises(GraphChanged) as caught:
            run(getattr(coordinator, going_on)("s", other))
        refused = caught.value

    assert isinstance(refused, GraphChanged)
    within = "within stage 'rooms': within stage 'hotel': stage"
    assert refused.differences == (f"{within} 'breakfast' is gone", f"{within} 'sauna' is new")
    assert {saga_id: run(ledger.read(saga_id)) for saga_id in before} == before
    assert other_world.log == []
    assert run(coordinator.recover(trip)).reports["s"].status is SagaStatus.COMPLETED
    assert world.log == ["+seat", "+room", "+breakfast", "+car"]


def test_a_nested_pipeline_may_have_changed_when_nothing_of_its_saga_stands() -> None:
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    _, child = scene({"a": (), "b": ("a",)}, {"b": Script("raise")})
    run(coordinator.run(Pipeline(name="p").with_stage("child", nested(child)), saga_id="s"))
    world, other = scene({"a": (), "c": ("a",)})

    report = run(coordinator.resume("s", Pipeline(name="p").with_stage("child", nested(other))))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+c"]


def test_a_family_that_is_forgotten_as_soon_as_it_has_come_to_rest_has_its_report_all_the_same() -> None:
    class Forgetful(MemoryLedger):
        """Somebody prunes it each time that the children of a saga have been listed, and before they are read."""

        async def list(self, **which: Any) -> Sequence[Entry]:
            entries = await super().list(**which)
            await self.prune(timedelta(days=-1))
            return entries

    child_world, _, parent = family({}, {})
    ledger = Forgetful()

    report = run(SagaCoordinator(ledger=ledger).run(parent, saga_id="s"))

    assert report.status is SagaStatus.COMPLETED
    assert set(child_world.standing) == set("abc")
    assert run(ledger.read("s/child")) == ()


def test_a_child_whose_family_is_forgotten_while_it_is_reported_has_its_report_all_the_same() -> None:
    class Forgetful(MemoryLedger):
        """Somebody prunes it each time that the outermost saga has been read."""

        async def read(self, saga_id: str) -> Sequence[AnyEvent]:
            events = await super().read(saga_id)
            if saga_id == "s":
                await self.prune(timedelta(days=-1))
            return events

    *_, parent = family({}, {})
    coordinator = SagaCoordinator(ledger=Forgetful())
    run(coordinator.run(parent, saga_id="s"))

    report = run(coordinator.report("s/child"))

    assert report.status is SagaStatus.COMPLETED
    assert run(coordinator.ledger.read("s")) == ()


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


def test_a_child_of_which_nothing_came_and_that_keeps_an_orphan_is_undone_with_its_parent() -> None:
    child_world, child = scene({"x": (), "y": ("x",)}, {"y": Script("raise")})
    parent_world, parent = scene({"before": ()})
    keeping = ContinueWithFallback(without_fallback="skip_branch", orphans="keep")
    parent = parent.with_stage("child", nested(child, keeping), dependencies=("before",))
    coordinator = SagaCoordinator()

    report = run(coordinator.run(parent, saga_id="s"))

    assert report.status is SagaStatus.COMPENSATED
    assert child_world.log == ["+x", "-x"]
    assert parent_world.log == ["+before", "-before"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_stage_may_run_several_children_in_one_attempt_and_undo_them_all(at_once: bool) -> None:
    """Each under an id of its own, also in another attempt."""
    worlds, rooms = zip(*[scene({"room": ()}) for _ in range(3)], strict=True)
    policy = FailFast(retry=Retry(attempts=2, wait=0.0))

    async def book(ctx: SagaContext) -> dict[str, Any]:
        if ctx.attempt == 1:
            await ctx.run_saga(rooms[0])
            raise CardDeclined
        if at_once:
            reports = await asyncio.gather(*[ctx.run_saga(room) for room in rooms[1:]])
        else:
            reports = [await ctx.run_saga(room) for room in rooms[1:]]
        assert all(report.ok for report in reports)
        return {"ids": [report.saga_id for report in await ctx.child_sagas()]}

    async def release(ctx: CompensationContext) -> None:
        for report, room in zip(await ctx.child_sagas(), rooms, strict=True):
            assert (await ctx.undo_saga(report.saga_id, room)).clean

    _, tail = scene({"after": ()}, {"after": Script("raise")})
    parent = Pipeline().with_stage("book", compensable(book, release))
    parent = parent.with_stage("after", tail.stages["after"].runner, dependencies=("book",))

    report = run(SagaCoordinator(policy).run(parent, saga_id="s"))

    assert report.undone["book"] is not None
    assert report.undone["book"].data == {"ids": ["s/book", "s/book#2", "s/book#2.2"]}
    assert [world.log for world in worlds] == [["+room", "-room"]] * 3
    assert report.status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("keep", [lambda _: MemoryLedger(), lambda path: SQLiteLedger(path / "ledger.db")], ids=["in memory", "on disk"])
def test_the_childs_own_exceptions_are_raised_with_the_parents(keep: Callable[[Path], MemoryLedger | SQLiteLedger], tmp_path: Path) -> None:
    """So `except* CardDeclined` finds one that a stage of a grandchild raised, whichever ledger it is."""
    _, child = scene(SEQUENCE, {"c": Script("raise")})
    grandparent = Pipeline(name="top").with_stage("middle", nested(Pipeline(name="m").with_stage("child", nested(child), "work")), "work")

    async def play() -> SagaReport:
        ledger = keep(tmp_path)
        report = await SagaCoordinator(ledger=ledger).run(grandparent)
        await ledger.close()
        return report

    report = asyncio.run(play())

    with pytest.raises(SagaFailed) as caught:
        report.raise_for_status()
    assert [type(error) for error in caught.value.exceptions] == [NestedSagaFailed, CardDeclined, NestedSagaFailed]
    assert [failure.stage for failure in report.failures] == ["middle/child/c", "middle/child", "middle"]


def test_the_exceptions_of_all_children_are_raised_with_the_parents() -> None:
    (_, one), (_, other) = scene({"a": ()}, {"a": Script("raise")}), scene({"b": ()}, {"b": Script("raise")})
    parent = Pipeline(name="parent").with_stage("one", nested(one)).with_stage("other", nested(other))

    report = run(SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch")).run(parent))

    assert {failure.stage: type(failure.exception) for failure in report.failures} == {
        "one/a": CardDeclined,
        "one": NestedSagaFailed,
        "other/b": CardDeclined,
        "other": NestedSagaFailed,
    }


def test_a_policy_that_names_a_stage_which_the_child_does_not_have_is_refused_before_the_child_runs() -> None:
    world, child = scene({"price": ()})
    parent = Pipeline(name="parent").with_stage("child", nested(child, ContinueWithFallback(fallbacks={"prise": {"amount": 0}})))

    report = run(SagaCoordinator().run(parent))

    assert report.cause is not None
    assert "prise" in report.cause.message
    assert world.log == []


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


class Stays(CompensableStage):
    """Fails when it has had an effect, which nobody can undo."""

    async def execute(self, ctx: SagaContext) -> None:
        await ctx.record("half")
        raise CardDeclined

    async def compensate(self, ctx: CompensationContext) -> None:
        raise CardDeclined


def test_nothing_is_kept_within_a_stage_of_which_a_person_said_that_it_is_undone_though_its_fallback_stands_in() -> None:
    world, child = scene({"seat": (), "room": ("seat",)}, {"room": Script(before=100)}, {"room": "probed"})
    trip = Pipeline(name="trip").with_stage("child", nested(child, FailFast(on_interrupt="halt")))
    trip = trip.with_stage("after", Stays, dependencies=("child",))

    async def main() -> list[SagaReport]:
        coordinator = SagaCoordinator(ContinueWithFallback(timeout=10, fallbacks={"child": {"instead": 1}, "after": {"instead": 2}}))
        first = await coordinator.run(trip, saga_id="s")
        world.undo("seat")
        return [first, await coordinator.settle("s", "child", "undone", "by hand")]

    first, settled = run(main())

    assert "Kept within what did not complete: child/seat." in str(first)
    assert settled.stages["child"].state is StageState.FALLBACK
    assert "Kept within" not in str(settled)
    assert world.standing == {}


def test_a_child_is_tried_again_with_an_id_of_its_own() -> None:
    script = Script("raise", then=("ok",))
    _, _, parent = family({"b": script}, {})
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0)))

    report = run(coordinator.run(parent, saga_id="s"))

    assert report.status is SagaStatus.COMPLETED
    assert report.kept["child"].data["saga_id"] == "s/child#2"


def test_a_child_that_is_stuck_does_not_go_forward_when_its_stage_is_tried_again() -> None:
    """Only whoever resumes the saga can want that of a child that has turned back."""
    world, child = scene(SEQUENCE, {"a": Script(undo_fails=1), "b": Script("raise", then=("ok",))})
    parent = Pipeline(name="parent").with_stage("child", nested(child, IMPATIENT))

    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0))).run(parent, saga_id="s"))

    assert report.status is SagaStatus.STUCK
    assert report.stages["child"].attempts == 2
    assert world.log == ["+a"]


@pytest.mark.parametrize("many", [1, 8])
def test_a_saga_is_not_read_anew_for_each_child_that_it_undoes(many: int) -> None:
    """The more children, the longer what their parent has recorded: to undo twice as many would take four times as long."""
    reads: Counter[str] = Counter()

    class Counting(MemoryLedger):
        async def read(self, saga_id: str) -> Sequence[AnyEvent]:
            reads[saga_id] += 1
            return await super().read(saga_id)

    families = {f"child{number}": scene({"a": ()}) for number in range(many)}
    parent = Pipeline(name="parent")
    for name, (_, child) in families.items():
        parent = parent.with_stage(name, nested(child))
    parent = parent.with_stage("fail", fail, "work", dependencies=tuple(families))

    report = run(SagaCoordinator(ledger=Counting()).run(parent, saga_id="s"))

    assert report.status is SagaStatus.COMPENSATED
    assert [world.log for world, _ in families.values()] == [["+a", "-a"]] * many
    assert reads["s"] == 1


def test_the_children_of_a_saga_are_not_listed_anew_for_each_of_them() -> None:
    """The more there are, the longer the list: to undo twice as many took four times as long."""
    lists: Counter[str | None] = Counter()

    class Counting(MemoryLedger):
        async def list(self, **wanted: Any) -> Sequence[Entry]:
            lists[wanted.get("parent")] += 1
            return await super().list(**wanted)

    def lists_to_undo(many: int) -> list[int]:
        """How often the children are listed until so many have run, and until they are undone."""
        lists.clear()
        world, child = scene({"a": ()})
        parent = Pipeline(name="parent")
        for number in range(many):
            parent = parent.with_stage(f"child{number}", nested(child))
        coordinator = SagaCoordinator(ledger=Counting())
        run(coordinator.run(parent, saga_id="s"))
        ran = lists["s"]
        assert run(coordinator.compensate("s", parent)).status is SagaStatus.COMPENSATED
        assert world.log == ["+a"] * many + ["-a"] * many
        return [ran, lists["s"]]

    assert lists_to_undo(8) == lists_to_undo(1)


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
    other = nested(child, fields=lambda ctx: {"input_text": f"{ctx.stage_name} of {ctx.saga_id}"})
    parent = parent.with_stage("same", nested(child)).with_stage("other", other)

    run(SagaCoordinator().run(parent, saga_id="s", input_text="mine", execution_mode="fast"))

    assert sorted(seen) == [("mine", "fast", "kid"), ("other of s", "fast", "kid")]
    assert other.name == "kid"


def test_a_child_knows_who_runs_it_and_has_none_of_what_its_parents_context_has_gathered() -> None:
    """As in stageflow: a fork has data and artifacts of its own."""
    seen: dict[str, tuple[Any, ...]] = {}
    context = PipelineContext.create(pipeline_run_id=uuid4(), data={"gathered": 1}, artifacts=[StageArtifact(type="ticket", payload={})])

    def look(stage: str, _kind: object, _ctx: StageContext, given: PipelineContext) -> None:
        seen[stage] = (given.data.get("gathered"), len(given.artifacts), given.parent_run_id, given.parent_stage_id)

    context.add_before_stage_start_hook(look)
    child = Pipeline(name="kid").with_stage("inner", nothing, "work")

    assert run(SagaCoordinator().run(Pipeline(name="mum").with_stage("outer", nested(child)), context)).ok

    assert seen == {"outer": (1, 1, None, None), "inner": (None, 0, context.pipeline_run_id, "outer")}


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
    world, pipeline = scene(SEQUENCE)
    ledger = SlowLedger()
    coordinator = SagaCoordinator(ledger=ledger)

    async def refuse(saga_id: str, owner: str, *, under: int | None = None) -> int:
        raise OSError("no ledger")

    async def play() -> SagaReport:
        await coordinator.run(pipeline, saga_id="s")
        acquire, ledger.acquire = ledger.acquire, refuse  # type: ignore[method-assign] # the fault that is injected
        with pytest.raises(LedgerError, match="no ledger"):
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


# -- hard cases ------------------------------------------------------------------------------------------------------


def generations(
    scripts: dict[str, Script], kinds: dict[str, str] | None = None, policy: Any = None, pay_within: float | None = None
) -> tuple[World, Pipeline]:
    """trip (before -> book_hotel -> after) runs hotel (room -> charge_deposit -> confirm) runs bank (open -> pay), in one world."""
    shape = {
        "before": (),
        "room": ("before",),
        "open": ("room",),
        "pay": ("open",),
        "confirm": ("pay",),
        "after": ("confirm",),
        "aside": (),
    }
    world, flat = scene(shape, scripts, kinds)
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    stages["pay"].timeout = pay_within
    bank = Pipeline(name="bank").with_stage("open", stages["open"]).with_stage("pay", stages["pay"], dependencies=("open",))
    hotel = (
        Pipeline(name="hotel")
        .with_stage("room", stages["room"])
        .with_stage("charge_deposit", nested(bank, policy), dependencies=("room",))
        .with_stage("confirm", stages["confirm"], dependencies=("charge_deposit",))
    )
    trip = (
        Pipeline(name="trip")
        .with_stage("before", stages["before"])
        .with_stage("book_hotel", nested(hotel, policy), dependencies=("before",))
        .with_stage("after", stages["after"], dependencies=("book_hotel",))
        .with_stage("aside", stages["aside"])
    )
    return world, trip


PATH = "book_hotel/charge_deposit/pay"


def test_what_is_stuck_in_a_grandchild_surfaces_with_its_path_and_is_settled_by_it() -> None:
    world, trip = generations({"pay": Script(undo_fails=9), "after": Script("raise")}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)

    stuck = run(coordinator.run(trip, saga_id="s"))

    assert stuck.status is SagaStatus.STUCK
    assert list(stuck.stuck) == ["book_hotel", "book_hotel/charge_deposit", PATH]
    assert list(stuck.blocked) == ["before", "book_hotel/room", "book_hotel/charge_deposit/open"]
    assert PATH in {failure.stage for failure in stuck.failures}
    assert f"saga settle s {PATH} undone --note '...'" in str(stuck)
    assert str(stuck).count("saga settle") == 1
    assert world.standing.keys() == {"before", "room", "open", "pay"}
    assert SagaReport.model_validate_json(stuck.model_dump_json()) == stuck

    world.undo("pay")
    settled = run(coordinator.settle("s", PATH, "undone", "the bank gave it back", by="ann"))
    report = run(coordinator.resume("s", trip))

    assert settled.status is SagaStatus.STUCK
    assert report.status is SagaStatus.COMPENSATED
    assert report.clean, str(report)
    assert world.standing == {}
    assert world.undone() == ["aside", "confirm", "pay", "open", "room", "before"]
    assert world.refusals == []
    grandchild = report.stages["book_hotel"].children[0].stages["charge_deposit"].children[0]
    assert grandchild.stages["pay"].settled is not None
    assert grandchild.stages["pay"].settled.by == "ann"


def test_a_child_that_does_not_come_clean_on_its_own_way_back_surfaces_too() -> None:
    world, trip = generations({"room": Script(undo_fails=9), "confirm": Script("raise")}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)

    report = run(coordinator.run(trip, saga_id="s"))

    assert report.status is SagaStatus.STUCK
    assert "book_hotel/room" in report.stuck
    assert world.standing.keys() == {"before", "room"}
    assert "book_hotel/confirm" in {failure.stage for failure in report.failures}


def test_a_parent_that_stops_lets_its_children_start_nothing_more() -> None:
    world, trip = generations({"room": Script(before=5), "aside": Script("raise", before=1)})

    report = run(SagaCoordinator().run(trip, saga_id="s"))

    assert "+pay" not in world.log
    assert world.log == ["+before", "+room", "-room", "-before"]
    assert report.status is SagaStatus.COMPENSATED
    child = report.stages["book_hotel"].children[0]
    assert child.status is SagaStatus.COMPENSATED
    assert child.cause is not None
    assert child.cause.message == "the saga that runs it is stopping"


def test_a_cancel_by_id_reaches_a_stage_of_a_grandchild() -> None:
    world, trip = generations({"pay": Script(before=5)})
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        while "pay" not in world.running:
            await elapse(1)
        await coordinator.cancel("s", "the customer left")
        return await running

    report = run(play())

    assert "+confirm" not in world.log
    assert [name for name in world.undone() if name != "aside"] == ["pay", "open", "room", "before"]
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message == "the customer left"


def test_a_child_that_is_begun_when_its_parent_is_stopping_runs_nothing() -> None:
    world, child = scene({"x": ()})
    _, parent = scene({"fails": ()}, {"fails": Script("raise", before=1)})

    async def hesitates(ctx: Any) -> dict[str, str]:
        await elapse(5)
        stopped = await ctx.run_saga(child)
        return {"became": stopped.status.value, "because": stopped.cause.message}

    async def nothing(_: Any) -> None: ...

    report = run(SagaCoordinator().run(parent.with_stage("hesitates", compensable(hesitates, nothing)), saga_id="s"))

    assert world.log == []
    output = report.stages["hesitates"].output
    assert output is not None
    assert output.data == {"became": "compensated", "because": "the saga that runs it is stopping"}


def test_a_child_that_cannot_go_on_fails_its_parents_stage_until_it_is_settled() -> None:
    halting = FailFast(on_failure="halt")
    world, trip = generations({"pay": Script("hang", lands=True)}, policy=halting, pay_within=1)
    coordinator = SagaCoordinator(halting)
    first = run(coordinator.run(trip, saga_id="s"))

    second = run(coordinator.resume("s", trip))
    run(coordinator.settle("s", PATH, "kept", "the bank has it"))
    third = run(coordinator.resume("s", trip))

    assert first.status is second.status is SagaStatus.HALTED
    assert list(second.in_doubt) == ["book_hotel", "book_hotel/charge_deposit", PATH]
    assert any("pay in doubt, without a probe and not idempotent" in failure.message for failure in second.failures)
    assert third.status is SagaStatus.COMPLETED
    assert all(count == 1 for count in world.standing.values())


def test_a_word_on_a_stage_within_is_refused_whole_while_the_saga_above_is_alive() -> None:
    _, room = scene({"room": ()}, {"room": Script(undo_fails=9)})
    world, beside = scene({"beside": ()}, {"beside": Script(undo_takes=10)})
    trip = Pipeline(name="trip").with_stage("book", nested(room, IMPATIENT)).with_stage("beside", nested(beside))
    trip = trip.with_stage("fail", fail, "work", dependencies=("book", "beside"))
    coordinator = SagaCoordinator(IMPATIENT)

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        await elapse(5)
        before = await coordinator.ledger.read("s/book")
        with pytest.raises(MisuseError, match="expected a saga that has come to rest, got saga s, which is alive"):
            await coordinator.settle("s", "book/room", "undone", "by hand")
        assert await coordinator.ledger.read("s/book") == before
        return await running

    report = run(play())

    assert [*report.stuck] == ["book", "book/room"]
    assert world.standing == {}


def test_of_two_stuck_stages_of_a_child_each_is_settled_by_its_path() -> None:
    shape = {"a": (), "b": ()}
    world, child = scene(shape, {name: Script(undo_fails=9) for name in shape})

    parent = Pipeline(name="parent").with_stage("child", nested(child, IMPATIENT)).with_stage("fail", fail, "work", dependencies=("child",))
    coordinator = SagaCoordinator(IMPATIENT)
    stuck = run(coordinator.run(parent, saga_id="s"))
    assert list(stuck.stuck) == ["child", "child/a", "child/b"]

    for name in shape:
        world.undo(name)
        run(coordinator.settle("s", f"child/{name}", "undone", "by hand"))
    report = run(coordinator.resume("s", parent))

    assert report.status is SagaStatus.COMPENSATED


def undo_each(pipelines: Sequence[Pipeline]) -> Callable[[CompensationContext], Awaitable[None]]:
    """Undoes the children, and looks at no report of them."""

    async def undo(ctx: CompensationContext) -> None:
        for child, pipeline in zip(await ctx.child_sagas(), pipelines, strict=True):
            await ctx.undo_saga(child.saga_id, pipeline)

    return undo


async def fail(_: Any) -> None:
    raise CardDeclined


def test_a_halted_saga_whose_child_has_halted_asks_nobody_to_say_what_stands() -> None:
    """Said undone, while the child's stages stand by its ledger, they would be left behind."""
    world, child = scene(SEQUENCE, {"b": Script("raise", then=("ok",))})
    halting = FailFast(on_failure="halt")
    trip = Pipeline().with_stage("child", nested(child, halting))
    coordinator = SagaCoordinator(halting)

    report = run(coordinator.run(trip, saga_id="s"))

    assert [*report.in_doubt] == ["child"]
    assert str(report).splitlines()[-1] == "To do: there is nothing to settle. Mend the cause, then: saga resume s"
    assert run(coordinator.resume("s", trip)).status is SagaStatus.COMPLETED
    assert world.standing == {"a": 1, "b": 1, "c": 1}


def test_beside_a_child_that_has_halted_only_what_is_unclear_is_to_be_settled() -> None:
    _, child = scene(SEQUENCE, {"b": Script("raise")})
    halting = FailFast(on_failure="halt", in_flight="cancel")

    async def hang(_: Any) -> None:
        await asyncio.Event().wait()

    trip = Pipeline().with_stage("child", nested(child, halting)).with_stage("pay", compensable(hang, hang))

    report = run(SagaCoordinator(halting).run(trip, saga_id="s"))

    assert {*report.in_doubt} == {"child", "pay"}
    assert str(report).splitlines()[-2:] == ["  saga settle s pay undone --note '...'", "  saga resume s"]


@pytest.mark.parametrize(
    ("pay", "after", "verdict"),
    [
        ("in doubt", "ok", "kept"),
        ("in doubt", "ok", "undone"),
        ("stuck", "raise", "kept"),
        ("stuck", "raise", "undone"),
        ("stuck", "raise", "retry"),
    ],
)
def test_when_a_person_has_said_what_became_of_a_stage_within_there_is_only_to_go_on(pay: str, after: str, verdict: str) -> None:
    """Whoever said of the stage around it that it is undone, too, would leave behind what the child keeps."""
    script = Script("hang", lands=True) if pay == "in doubt" else Script(undo_fails=9)
    _, trip = generations({"pay": script, "after": Script(after)}, policy=IMPATIENT, pay_within=1)
    coordinator = SagaCoordinator(IMPATIENT)
    stuck = run(coordinator.run(trip, saga_id="s"))
    assert str(stuck).splitlines()[-2:] == [f"  saga settle s {PATH} undone --note '...'", "  saga resume s"]

    settled = run(coordinator.settle("s", PATH, verdict, "they told me"))

    assert "saga settle" not in str(settled)
    assert str(settled).endswith(": saga resume s")


def test_when_a_person_has_said_to_try_again_there_is_only_to_go_on_until_that_has_failed() -> None:
    world, pipeline = scene(SEQUENCE, {"a": Script(undo_fails=2), "c": Script("raise")})
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(pipeline, saga_id="s"))

    told = [str(run(coordinator.settle("s", "a", "retry", "they answer again"))), str(run(coordinator.resume("s", pipeline)))]

    assert ["saga settle" in text for text in told] == [False, True]
    assert world.standing == {"a": 1}


def test_a_stage_that_was_to_run_again_is_for_a_person_once_its_saga_goes_back_without_it() -> None:
    """To resume was all that there was to do, and it did nothing."""
    world, pipeline = scene({"a": (), "b": ()}, {"b": Script("hang", lands=True)})
    coordinator = SagaCoordinator(FailFast(timeout=1, on_failure="halt"))
    run(coordinator.run(pipeline, saga_id="s"))
    run(coordinator.settle("s", "b", "retry", "when it goes forward"))

    stuck = run(coordinator.compensate("s", pipeline))

    assert str(stuck).splitlines()[-2:] == ["  saga settle s b undone --note '...'", "  saga resume s"]
    world.undo("b")
    assert run(coordinator.settle("s", "b", "undone", "by hand")).status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_stage_that_was_to_be_tried_again_is_for_a_person_once_its_saga_goes_back_and_cannot_try_it() -> None:
    """To resume was all that there was to do, and it did nothing."""
    world, hotel = scene({"room": (), "breakfast": ("room",)}, {"breakfast": Script("hang", lands=True)})
    trip = Pipeline().with_stage("hotel", nested(hotel, FailFast(timeout=1, on_failure="halt", compensation=IMPATIENT.compensation)))
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", "hotel/breakfast", "retry", "when it goes forward"))

    stuck = run(coordinator.compensate("s", trip))

    assert str(stuck).splitlines()[-2:] == ["  saga settle s hotel/breakfast undone --note '...'", "  saga resume s"]
    world.undo("breakfast")
    run(coordinator.settle("s", "hotel/breakfast", "undone", "by hand"))
    assert run(coordinator.resume("s", trip)).status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_below_a_saga_that_died_on_its_way_back_no_word_is_taken_that_only_going_forward_could_heed() -> None:
    """It was taken, and refused when the saga had gone on and come to rest."""
    _, hotel = scene({"room": (), "breakfast": ("room",)}, {"breakfast": Script("hang", lands=True)})
    trip = Pipeline().with_stage("hotel", nested(hotel, FailFast(timeout=1, on_failure="halt")))
    ledger = Dying(10_000)
    run(SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(trip, saga_id="s"))
    ledger.left = 1
    with pytest.raises(LedgerError):
        run(SagaCoordinator(ledger=ledger).compensate("s", trip))
    ledger.left = 10_000
    ledger.forget_owners()
    coordinator = SagaCoordinator(ledger=ledger)

    report = run(coordinator.report("s"))
    with pytest.raises(MisuseError, match="expected undone or kept, for stage 'breakfast', got retry"):
        run(coordinator.settle("s", "hotel/breakfast", "retry", "they answer again"))

    assert report.status is SagaStatus.COMPENSATING
    assert report.stages["hotel"].children[0].stages["breakfast"].verdicts == ("undone", "kept")


def test_what_is_held_back_within_a_stage_in_doubt_that_nothing_can_tell_of_is_undone_through_its_own_saga() -> None:
    """To try the stage again was all that there was to say, and it was refused."""
    shape = {"room": (), "breakfast": ("room",), "tour": ("breakfast",)}
    world, hotel = scene(shape, {"breakfast": Script(undo_fails=9), "tour": Script(before=3)})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel, policy=IMPATIENT)

    trip = Pipeline().with_stage("book", compensable(book, undo_each([hotel]), timeout=1))
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(trip, saga_id="s"))
    world.undo("breakfast")
    run(coordinator.settle("s", "book/breakfast", "undone", "by hand"))

    told = [
        str(run(coordinator.resume("s", trip))).splitlines()[-1],
        str(run(coordinator.compensate("s/book", hotel))).splitlines()[-1],
        str(run(coordinator.report("s"))).splitlines()[-2],
        str(run(coordinator.settle("s", "book", "undone", "nothing of it stands"))).splitlines()[-1],
    ]

    assert told == [
        "To do: it was not undone to the end; go on with: saga compensate s/book",
        "Nothing is left to do.",
        "  saga settle s book undone --note '...'",
        "Nothing is left to do.",
    ]
    assert world.standing == {}


def test_a_saga_is_undone_by_itself_behind_the_fallback_of_a_stage_in_doubt_that_nothing_can_tell_of() -> None:
    world, hotel = scene({"room": (), "tour": ("room",)}, {"tour": Script(before=3)})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel, policy=FailFast(on_interrupt="halt"))

    trip = Pipeline().with_stage("book", compensable(book, undo_each([hotel]), timeout=1))
    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks={"book": {}}))
    stuck = run(coordinator.run(trip, saga_id="s"))
    assert (stuck.fallbacks, {*stuck.in_doubt}) == (("book",), {"book"})
    assert world.standing == {"room": 1, "tour": 1}

    report = run(coordinator.compensate("s/book", hotel))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert run(coordinator.settle("s", "book", "undone", "nothing of it stands")).status is SagaStatus.DEGRADED


def booking(outcome: str, *, second: str = "raise", probe: Any = None) -> tuple[World, Pipeline]:
    """book -> after: the first runs a room (take) and a meal (cook -> serve) as sagas, and then ends as it is told."""
    shape = {"take": (), "cook": (), "serve": ("cook",), "after": ()}
    scripts = {name: Script(undo_bears_repetition=True) for name in shape} | {"serve": Script(second)}
    world, flat = scene(shape, scripts, dict.fromkeys(shape, "probed"))
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    room = Pipeline(name="room").with_stage("take", stages["take"])
    meal = Pipeline(name="meal").with_stage("cook", stages["cook"]).with_stage("serve", stages["serve"], dependencies=("cook",))

    async def book(ctx: SagaContext) -> Any:
        for pipeline in (room, meal):
            report = await ctx.run_saga(pipeline)
        assert report.ok is (second == "ok")
        return await conclude("book", outcome)

    async def release(ctx: CompensationContext) -> None:
        for child in reversed(await ctx.child_sagas()):
            await ctx.undo_saga(child.saga_id, {"room": room, "meal": meal}[child.pipeline])

    trip = Pipeline(name="trip").with_stage("book", compensable(book, release, probe=probe))
    return world, trip.with_stage("after", stages["after"], dependencies=("book",))


async def nothing_landed(_: CompensationContext) -> None:
    """A probe that asks for what the stage has done itself, and not for its sagas."""


@pytest.mark.parametrize("probe", [None, nothing_landed])
@pytest.mark.parametrize(("outcome", "kind"), [("raise", "exception"), ("fail", "reported"), ("skip", "contract"), ("wrong", "contract")])
def test_what_the_sagas_of_a_stage_have_done_is_undone_when_the_stage_then_fails(outcome: str, kind: str, probe: Any) -> None:
    """Promise 5: it was taken at its word that it had had no effect, and a child stood that nobody could reach."""
    world, trip = booking(outcome, probe=probe)

    report = run(SagaCoordinator().run(trip, saga_id="s"))

    assert world.log == ["+take", "+cook", "-cook", "-take"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.kind == kind
    assert report.stages["book"].state is StageState.UNDONE
    assert [child.status for child in report.stages["book"].children] == [SagaStatus.COMPENSATED] * 2


def test_what_the_sagas_of_a_stage_have_done_is_kept_with_the_rest_when_the_stage_cancels() -> None:
    world, trip = booking("cancel", second="ok")
    coordinator = SagaCoordinator()

    report = run(coordinator.run(trip, saga_id="s"))
    assert report.status is SagaStatus.CANCELLED
    assert world.standing == {"take": 1, "cook": 1, "serve": 1}

    assert run(coordinator.compensate("s", trip)).status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_behind_the_fallback_of_a_stage_what_its_sagas_have_done_is_undone() -> None:
    world, trip = booking("raise", second="ok")

    report = run(SagaCoordinator(ContinueWithFallback(fallbacks={"book": {}})).run(trip))

    assert report.status is SagaStatus.DEGRADED
    assert world.standing == {"after": 1}


@pytest.mark.parametrize("instead", [{}, {"book": {}}])
def test_what_the_sagas_of_a_fallback_have_done_is_undone_when_that_then_fails(instead: dict[str, Any]) -> None:
    """Promise 5: a fallback that stands in keeps what it did, but of one that failed nobody has any use."""
    world, hostel = scene({"bed": ()})

    async def try_elsewhere(ctx: SagaContext, _: Any) -> None:
        await ctx.run_saga(hostel)
        raise CardDeclined

    book = compensable(fail, undo_each([hostel]), fallback=try_elsewhere)
    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks=instead))

    report = run(coordinator.run(Pipeline(name="trip").with_stage("book", book), saga_id="s"))

    assert report.status is (SagaStatus.DEGRADED if instead else SagaStatus.COMPENSATED)
    assert world.log == ["+bed", "-bed"]
    assert report.stages["book"].children[0].status is SagaStatus.COMPENSATED


def with_another_hotel(*, undo_fails: int = 0, taxi: str = "probed") -> tuple[World, Pipeline]:
    """hotel -> taxi: the hotel's saga (room -> pay) fails, and another one (inn) stands in."""
    shape: dict[str, tuple[str, ...]] = {"room": (), "pay": (), "inn": (), "taxi": ()}
    scripts = {name: Script(undo_bears_repetition=True) for name in shape} | {"pay": Script("raise")}
    scripts["room"].undo_fails = undo_fails
    world, flat = scene(shape, scripts, dict.fromkeys(shape, "probed") | {"taxi": taxi})
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    hotel = Pipeline(name="hotel").with_stage("room", stages["room"]).with_stage("pay", stages["pay"], dependencies=("room",))
    other = Pipeline(name="other").with_stage("inn", stages["inn"])

    async def book(ctx: SagaContext) -> None:
        (await ctx.run_saga(hotel, policy=IMPATIENT)).raise_for_status()

    async def book_other(ctx: SagaContext, _: Any) -> dict[str, Any]:
        return {"booked": (await ctx.run_saga(other)).saga_id}

    async def release(ctx: CompensationContext) -> None:
        for child in reversed(await ctx.child_sagas()):
            await ctx.undo_saga(child.saga_id, other if child.pipeline == "other" else hotel)

    trip = Pipeline(name="trip").with_stage("hotel", compensable(book, release, fallback=book_other, compensate_in_doubt=True))
    return world, trip.with_stage("taxi", stages["taxi"], dependencies=("hotel",))


def test_what_the_sagas_of_a_fallback_have_done_stands_while_what_its_stage_has_left_is_undone() -> None:
    """Promise 1: the inn was cancelled under the taxi that took people there."""
    world, trip = with_another_hotel(undo_fails=1)
    coordinator = SagaCoordinator(ContinueWithFallback())
    stuck = run(coordinator.run(trip, saga_id="s"))
    assert (stuck.status, [*stuck.stuck]) == (SagaStatus.STUCK, ["hotel", "hotel/room"])
    run(coordinator.settle("s", "hotel/room", "retry", "they answer again"))

    report = run(coordinator.resume("s", trip))

    assert (report.status, report.fallbacks) == (SagaStatus.DEGRADED, ("hotel",))
    assert world.log == ["+room", "+inn", "+taxi", "-room"]


def test_what_the_sagas_of_a_fallback_have_done_stands_below_a_pivot_that_used_it() -> None:
    world, trip = with_another_hotel(undo_fails=1, taxi="pivot")
    trip = trip.with_stage("tour", fail, "work", dependencies=("taxi",))

    report = run(SagaCoordinator(ContinueWithFallback()).run(trip, saga_id="s"))

    assert [*report.stuck] == ["hotel", "hotel/room"]
    assert world.log == ["+room", "+inn", "+taxi"]


def test_what_the_sagas_of_a_fallback_have_done_is_undone_with_what_its_stage_has_left_once_nothing_uses_it() -> None:
    world, trip = with_another_hotel(undo_fails=1)
    coordinator = SagaCoordinator(ContinueWithFallback())
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", "hotel/room", "retry", "they answer again"))

    report = run(coordinator.compensate("s", trip))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+room", "+inn", "+taxi", "-taxi", "-inn", "-room"]


def test_killed_at_any_event_a_fallback_that_runs_a_saga_is_called_again_and_one_saga_of_it_stands() -> None:
    """It failed, as its saga had the id of one that was there: the saga was undone, or stuck."""
    for kill in range(2, 40):
        world, trip = with_another_hotel()
        ledger = Dying(kill)
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ContinueWithFallback(), ledger=ledger).run(trip, saga_id="s"))
        is_done, ledger.left = ledger.left >= 0, 10_000
        ledger.forget_owners()

        report = run(SagaCoordinator(ContinueWithFallback(), ledger=ledger).resume("s", trip))

        assert (report.status, report.fallbacks) == (SagaStatus.DEGRADED, ("hotel",)), kill
        assert world.standing == {"inn": 1, "taxi": 1}, kill
        if is_done:
            break
    assert kill > 10


def test_a_stage_whose_sagas_have_all_undone_themselves_has_failed_and_is_not_undone() -> None:
    world, meal = scene({"cook": (), "serve": ("cook",)}, {"serve": Script("raise")})

    async def book(ctx: SagaContext) -> None:
        (await ctx.run_saga(meal)).raise_for_status()

    report = run(SagaCoordinator().run(Pipeline().with_stage("book", compensable(book, nothing))))

    assert world.log == ["+cook", "-cook"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["book"].state is StageState.FAILED
    assert report.stages["book"].compensation is None


def test_a_stage_that_fails_with_a_saga_that_nobody_can_read_is_not_taken_at_its_word() -> None:
    world, trip = booking("raise", second="ok")

    class Torn(MemoryLedger):
        is_torn = True

        async def read(self, saga_id: str) -> Sequence[Any]:
            events = await super().read(saga_id)
            return events[1:] if saga_id == "s/book" and self.is_torn else events

    ledger = Torn()

    def mend(saga_id: str, event: object) -> None:
        if saga_id == "s" and isinstance(event, SagaEnded):
            ledger.is_torn = False

    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger, listeners=[mend])
    stuck = run(coordinator.run(trip, saga_id="s"))
    assert list(stuck.stuck) == ["book"]
    assert "LedgerCorrupt" in str(stuck)
    run(coordinator.settle("s", "book", "retry", "it can be read again"))

    assert run(coordinator.resume("s", trip)).status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("probe", [None, nothing_landed])
def test_killed_at_any_event_what_the_sagas_of_a_failing_stage_have_done_is_undone_or_in_question(probe: Any) -> None:
    """Promises 5 and 11."""
    survived = 0
    for killed_after in range(40):
        world, trip = booking("raise", probe=probe)
        ledger = Dying(killed_after)
        try:
            report = run(SagaCoordinator(ledger=ledger).run(trip, saga_id="s"))
            survived += 1
        except LedgerError:
            ledger.left = 1000
            ledger.forget_owners()
            run(SagaCoordinator(ledger=ledger).recover(trip))
            report = run(SagaCoordinator(ledger=ledger).report("s"))

        if probe is None and report.status is SagaStatus.STUCK:
            # Nothing can tell whether it had an effect of its own.
            assert "book" in report.in_doubt, (killed_after, str(report))
        else:
            assert report.status is SagaStatus.COMPENSATED, (killed_after, str(report))
            assert world.standing == {}, killed_after
        assert world.refusals == [], killed_after
    assert survived


def test_a_probe_that_passes_over_the_sagas_of_a_stage_makes_nothing_of_them_undone() -> None:
    world, room = scene({"room": ()})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room)

    trip = Pipeline().with_stage("book", compensable(book, fail, probe=nothing_landed))
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(trip, saga_id="s"))

    report = run(coordinator.compensate("s", trip))

    assert report.stages["book"].compensation is not None
    assert report.stages["book"].state is StageState.STUCK
    assert world.standing == {"room": 1}


def test_what_a_child_keeps_is_named_where_its_stage_did_not_complete() -> None:
    _, trip = generations({"confirm": Script("raise")}, {"pay": "pivot"})

    halted = run(SagaCoordinator().run(trip, saga_id="s"))

    within = ["book_hotel/room", "book_hotel/charge_deposit"]
    assert f"Kept within what did not complete: {', '.join(within)}." in str(halted).splitlines()


@pytest.mark.parametrize("left_in", ["room", "meal"])
def test_a_child_left_behind_by_a_saga_at_rest_is_stopped_and_never_goes_forward(left_in: str) -> None:
    """Promise 5: or what a person has just said to be undone would be done once more, under a saga that says so."""
    world, hotel = scene({"room": (), "meal": ("room",)}, kinds={"room": "probed", "meal": "probed"})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel)

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, hotel)

    trip = Pipeline(name="trip").with_stage("book", compensable(book, release))
    ledger = Dying(after=3 if left_in == "room" else 4)
    hotel = replace(hotel, name="hotel")

    async def play() -> tuple[SagaReport, str, SagaReport]:
        with pytest.raises(LedgerError):
            await SagaCoordinator(ledger=ledger).run(trip, saga_id="s")
        ledger.left = 100
        ledger.forget_owners()
        coordinator = SagaCoordinator(ledger=ledger)
        stuck = (await coordinator.recover(trip)).reports["s"]
        with pytest.raises(MisuseError) as refused:
            await coordinator.settle("s", "book", "undone", "refunded")
        recovery = await coordinator.recover([trip, hotel])
        assert {saga_id: report.status for saga_id, report in recovery.reports.items()} == {"s/book": SagaStatus.COMPENSATED}
        await coordinator.settle("s", "book", "undone", "refunded")
        return stuck, str(refused.value), await coordinator.resume("s", trip)

    stuck, refused, report = run(play())

    assert stuck.status is SagaStatus.STUCK
    assert stuck.stages["book"].verdicts == ()
    assert str(stuck).splitlines()[-1] == (
        "To do: a saga within has not come to rest: it is running, or its process is gone. "
        "saga list says which, saga recover goes on with it."
    )
    assert "a stage whose own sagas have come to rest, for stage 'book', got saga s/book, which is running" in refused
    assert "coordinator.recover, with its pipeline 'hotel'" in refused
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert world.log.count("+room") == 1


def test_a_word_on_a_stage_within_that_is_refused_counts_for_nobody_though_another_one_like_it_was_taken() -> None:
    """It was taken for the first one said again: the sagas above were told of it, and whoever said it that all was well."""
    _, trip = generations({"pay": Script(undo_fails=9), "after": Script("raise")}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", PATH, "retry", "the bank is back"))
    stuck = run(coordinator.resume("s", trip))

    with pytest.raises(MisuseError, match="expected an output only of what is kept"):
        run(coordinator.settle("s", PATH, "retry", "the bank has it", output={"receipt": 7}))

    assert run(coordinator.report("s")) == stuck


def test_a_stage_is_undone_by_word_only_when_nothing_within_it_is_in_question() -> None:
    """Promise 5: or the saga would be compensated, while what is stuck within stands by its ledger, and nobody would look there."""
    world, trip = generations({"pay": Script(undo_fails=9), "after": Script("raise")}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)
    stuck = run(coordinator.run(trip, saga_id="s"))
    outer = stuck.stages["book_hotel"]
    assert outer.verdicts == ("kept", "retry")
    assert outer.children[0].stages["charge_deposit"].verdicts == ("kept", "retry")
    assert stuck.status is SagaStatus.STUCK

    for path in ("book_hotel", "book_hotel/charge_deposit"):
        with pytest.raises(MisuseError) as refused:
            run(coordinator.settle("s", path, "undone", "they told me"))
        assert "expected a stage within which nothing is stuck, blocked or in doubt, for stage" in str(refused.value)
        assert PATH in str(refused.value)
        assert str(refused.value).endswith(
            ". Settle what is stuck or in doubt there, and go on with the saga: the stage finds out by itself."
        )
        assert run(coordinator.report("s")) == stuck
    world.undo("pay")
    run(coordinator.settle("s", PATH, "undone", "the bank gave it back"))
    report = run(coordinator.resume("s", trip))

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.standing == {}


@pytest.mark.parametrize("verdict", ["undone", "kept"])
def test_a_word_on_a_stage_waits_for_all_sagas_below_it(verdict: str) -> None:
    """Also for one that is running under one that has come to rest: what it is going to do is not known yet. One beside it does not."""
    world, inmost = scene({"pay": ()}, {"pay": Script(before=20)})
    _, quick = scene({"room": ()})
    _, seat = scene({"seat": ()}, {"seat": Script(undo_fails=9)})

    async def book(ctx: SagaContext) -> None:
        await asyncio.gather(ctx.run_saga(inmost), ctx.run_saga(quick))

    hotel = Pipeline(name="hotel").with_stage("book", compensable(book, undo_each([inmost, quick])))
    trip = seat.with_stage("beside", nested(scene(SEQUENCE)[1]))
    trip = trip.with_stage("hotel", nested(hotel, FailFast(timeout=1, cancel_grace=1)))
    coordinator = SagaCoordinator(IMPATIENT)

    async def play() -> tuple[SagaReport, str]:
        stuck = await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "seat", "undone", "they have it back")
        with pytest.raises(MisuseError) as refused:
            await coordinator.settle("s", "hotel", verdict, "looked")
        await elapse(30)
        return stuck, str(refused.value)

    stuck, refused = run(play())

    assert [*stuck.stuck, *stuck.in_doubt] == ["seat", "hotel", "hotel/book"]
    assert stuck.stages["hotel"].verdicts == ("retry",)
    to_do = str(stuck).partition("To do: ")[2].splitlines()
    assert to_do[0].startswith("a saga within has not come to rest: it is running, or its process is gone. ")
    assert to_do[1:] == [
        "To do: look at the outside world, put it right by hand, and say so (undone, kept or retry):",
        "  saga settle s seat undone --note '...'",
    ]
    assert "a stage whose own sagas have come to rest, for stage 'hotel', got saga s/hotel/book, which is running" in refused
    assert world.log == ["+pay", "-pay"]


def test_no_word_is_proposed_on_a_stage_of_a_saga_that_has_not_come_to_rest() -> None:
    class Unanswered(CompensableStage):
        timeout = 1.0

        async def execute(self, ctx: SagaContext) -> None:
            await elapse(1000)

        async def compensate(self, ctx: CompensationContext) -> None: ...

    _, hotel = scene({"room": ()}, {"room": Script(before=20)})
    hotel = hotel.with_stage("pay", Unanswered())

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel)

    trip = Pipeline(name="trip").with_stage("book", compensable(book, undo_each([hotel]), timeout=3))
    coordinator = SagaCoordinator(FailFast(cancel_grace=1))

    async def play() -> tuple[SagaReport, SagaReport]:
        early = await coordinator.run(trip, saga_id="s")
        with pytest.raises(MisuseError, match="a saga that has come to rest"):
            await coordinator.settle("s", "book/pay", "kept", "looked")
        await elapse(60)
        return early, await coordinator.report("s")

    early, late = run(play())

    assert [*early.in_doubt] == [*late.in_doubt] == ["book", "book/pay"]
    assert "To do: a saga within has not come to rest: it is running, or its process is gone. " in str(early)
    assert "saga settle s book/pay undone" in str(late)


def test_a_compensation_that_passes_over_what_a_child_left_standing_has_failed() -> None:
    """Promise 5: compensated means that nothing is stuck, however careless the code of a stage is."""
    world, room = scene({"room": ()}, {"room": Script(undo_fails=9)})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room, policy=IMPATIENT)

    parent = Pipeline().with_stage("book", compensable(book, undo_each([room]))).with_stage("fail", fail, "work", dependencies=("book",))
    coordinator = SagaCoordinator(IMPATIENT)

    stuck = run(coordinator.run(parent, saga_id="s"))

    assert stuck.status is SagaStatus.STUCK
    assert stuck.stages["book"].state is StageState.STUCK
    assert "saga.report.NestedSagaFailed" in [failure.type for failure in stuck.failures]
    world.undo("room")
    run(coordinator.settle("s", "book/room", "undone", "by hand"))
    assert run(coordinator.resume("s", parent)).status is SagaStatus.COMPENSATED


def test_a_compensation_that_passes_over_a_child_has_failed() -> None:
    """Promise 5: it undid the first of two, and the saga counted as compensated while the other one stood."""
    world, room = scene({"room": ()})
    mended = False

    async def book(ctx: SagaContext) -> None:
        for _ in range(2):
            await ctx.run_saga(room)

    async def release(ctx: CompensationContext) -> None:
        for child in (await ctx.child_sagas())[: 2 if mended else 1]:
            await ctx.undo_saga(child.saga_id, room)

    parent = Pipeline().with_stage("book", compensable(book, release)).with_stage("fail", fail, "work", dependencies=("book",))
    coordinator = SagaCoordinator(IMPATIENT)

    stuck = run(coordinator.run(parent, saga_id="s"))
    assert stuck.status is SagaStatus.STUCK
    assert [*stuck.stuck] == ["book"]
    assert world.standing == {"room": 1}
    mended = True
    run(coordinator.settle("s", "book", "retry", "it looks for both now"))
    report = run(coordinator.resume("s", parent))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_compensation_that_fails_with_one_of_its_sagas_waits_until_the_others_are_undone(attempts: int) -> None:
    """Promise 1: asyncio.gather leaves them running, and what they stood on was undone beside them, or another attempt met them."""
    world, room = scene({"before": (), "room": ("before",)}, {"room": Script(undo_takes=5)})
    stages = {name: spec.runner for name, spec in room.stages.items()}
    room = Pipeline(name="room").with_stage("room", stages["room"])
    answers = iter([CardDeclined(), None])

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room)

    async def declined_at_first() -> None:
        if next(answers) is not None:
            raise CardDeclined

    async def release(ctx: CompensationContext) -> None:
        await asyncio.gather(declined_at_first(), *(ctx.undo_saga(child.saga_id, room) for child in await ctx.child_sagas()))

    trip = Pipeline(name="trip").with_stage("before", stages["before"])
    trip = trip.with_stage("book", compensable(book, release), dependencies=("before",))
    trip = trip.with_stage("fail", fail, "work", dependencies=("book",))
    policy = FailFast(compensation=Compensation(retry=Retry(attempts=attempts, wait=0.0), on_failure="continue"))

    report = run(SagaCoordinator(policy).run(trip, saga_id="s"))

    assert report.status is (SagaStatus.STUCK if attempts == 1 else SagaStatus.COMPENSATED)
    assert report.stages["book"].children[0].status is SagaStatus.COMPENSATED
    assert world.log == ["+before", "+room", "-room", "-before"]
    assert world.refusals == []


@pytest.mark.parametrize(("verdict", "status"), [("kept", SagaStatus.HALTED), ("undone", SagaStatus.COMPENSATED)])
def test_a_stage_in_doubt_beyond_a_pivot_of_its_own_is_for_a_person(verdict: str, status: SagaStatus) -> None:
    """Promise 5: the saga was called halted, as if it could be redriven."""
    _, sale = scene({"sell": (), "mail": ("sell",)}, {"mail": Script("raise")}, {"sell": "pivot"})

    class Sell(CompensableStage):
        holds_pivot = True

        async def execute(self, ctx: SagaContext) -> None:
            if ctx.attempt == 1:
                await asyncio.Event().wait()
            raise NestedSagaFailed(await ctx.run_saga(sale))

        async def compensate(self, _ctx: CompensationContext) -> None:
            raise AssertionError

    coordinator = SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2, wait=0.0)))

    report = run(coordinator.run(Pipeline().with_stage("sell", Sell), saga_id="s"))
    settled = run(coordinator.settle("s", "sell", verdict, "looked"))

    assert report.status is SagaStatus.STUCK
    assert [*report.in_doubt] == ["sell"]
    assert settled.status is status


def test_a_compensation_that_passes_over_the_pivot_of_a_child_undoes_nothing_before_it() -> None:
    """Promise 10: the same as when the child is `nested`, which raises what it was told."""
    _, before = scene({"before": ()})
    _, sale = scene({"sale": ()}, kinds={"sale": "pivot"})

    async def sell(ctx: SagaContext) -> None:
        await ctx.run_saga(sale)

    parent = before.with_stage("sell", compensable(sell, undo_each([sale])), dependencies=("before",))
    parent = parent.with_stage("fail", fail, "work", dependencies=("sell",))

    report = run(SagaCoordinator(IMPATIENT).run(parent))

    assert report.status is SagaStatus.HALTED
    assert [*report.kept] == ["before", "sell"]


def test_what_a_fallback_stands_in_for_is_undone_when_what_used_that_turns_out_to_be_beyond_the_pivot_of_a_child() -> None:
    """Promise 12: whoever resumed the saga undid it, and until then a person was asked for."""
    world, before = scene({"seat": ()}, {"seat": Script("raise", lands=True)}, {"seat": "recording"})
    _, sale = scene({"sale": ()}, kinds={"sale": "pivot"})

    async def sell(ctx: SagaContext) -> None:
        await ctx.run_saga(sale)

    trip = before.with_stage("sell", compensable(sell, undo_each([sale])), dependencies=("seat",))
    trip = trip.with_stage("fail", fail, "work", dependencies=("sell",))

    report = run(SagaCoordinator(ContinueWithFallback(fallbacks={"seat": {}})).run(trip))

    assert report.status is SagaStatus.HALTED
    assert report.clean, str(report)
    assert [*report.kept] == ["seat", "sell"]
    assert report.fallbacks == ("seat",)
    assert world.undone() == ["seat"]


def test_a_compensation_that_takes_what_is_stuck_beyond_the_pivot_of_a_child_for_kept_is_stuck() -> None:
    """Promise 5: or the saga would be done with the stage, and nobody would be asked for what is stuck within."""
    world, sale = scene({"sell": (), "mail": ("sell",)}, {"mail": Script(undo_fails=1)}, {"sell": "pivot"})

    async def sell(ctx: SagaContext) -> None:
        await ctx.run_saga(sale, policy=IMPATIENT)

    async def give_back(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            raise NestedSagaFailed(await ctx.undo_saga(child.saga_id, sale))

    trip = Pipeline().with_stage("sell", compensable(sell, give_back)).with_stage("fail", fail, "work", dependencies=("sell",))
    coordinator = SagaCoordinator(IMPATIENT)

    stuck = run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", "sell/mail", "retry", "they answer again"))
    report = run(coordinator.resume("s", trip))

    assert stuck.status is SagaStatus.STUCK
    assert [*stuck.stuck] == ["sell", "sell/mail"]
    assert report.status is SagaStatus.HALTED
    assert report.clean, str(report)
    assert world.standing == {"sell": 1}


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_stage_that_fails_with_one_of_its_sagas_waits_until_the_others_have_stopped(attempts: int) -> None:
    """Promise 3: asyncio.gather leaves them running, and nothing is undone, or attempted anew, beside them."""
    world, slow = scene({"a": (), "b": ("a",)}, {"b": Script(before=5, then=("ok",))})
    _, fast = scene({"x": ()}, {"x": Script("raise", then=("ok",))})

    async def book(ctx: SagaContext) -> None:
        reports = await asyncio.gather(*(failing_with(ctx.run_saga(pipeline)) for pipeline in (slow, fast)))
        assert all(report.ok for report in reports)

    async def failing_with(report: Awaitable[SagaReport]) -> SagaReport:
        (ended := await report).raise_for_status()
        return ended

    trip = Pipeline(name="trip").with_stage("book", compensable(book, undo_each([slow, fast])))
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=attempts, wait=0.0), compensation=IMPATIENT.compensation))

    report = run(coordinator.run(trip, saga_id="s"))

    assert report.status is (SagaStatus.COMPENSATED if attempts == 1 else SagaStatus.COMPLETED)
    assert report.clean, str(report)
    assert "fallback" not in str(report)
    assert world.log[:4] == ["+a", "+b", "-b", "-a"]
    assert world.standing == ({} if attempts == 1 else {"a": 1, "b": 1})


def test_a_stage_that_fails_stops_none_of_the_sagas_that_others_run() -> None:
    """What they have begun comes to its end: the failed stage's fallback stands in, and the saga goes on."""
    world, room = scene({"room": ()}, {"room": Script(before=5)})
    stages = {name: spec.runner for name, spec in room.stages.items()}
    suite = Pipeline(name="suite").with_stage("suite", stages["room"])

    async def declined() -> None:
        await elapse(1)
        raise CardDeclined

    async def book(ctx: SagaContext) -> None:
        await asyncio.gather(declined(), ctx.run_saga(suite))

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, suite)

    trip = Pipeline(name="trip").with_stage("book", compensable(book, release)).with_stage("other", nested(room))

    report = run(SagaCoordinator(ContinueWithFallback(fallbacks={"book": {}})).run(trip, saga_id="s"))

    assert report.status is SagaStatus.DEGRADED
    assert [report.stages[name].children[0].status for name in ("book", "other")] == [SagaStatus.COMPENSATED, SagaStatus.COMPLETED]
    assert world.log == ["+room", "+room", "-room"]


def test_a_stage_that_completes_stops_none_of_the_sagas_that_it_has_left_running() -> None:
    world, room = scene({"a": (), "b": ("a",)}, {"a": Script(before=5)})
    begun: list[asyncio.Task[SagaReport]] = []

    async def book(ctx: SagaContext) -> None:
        begun.append(asyncio.create_task(ctx.run_saga(room)))
        await elapse(1)

    async def takes_long(_: SagaContext) -> None:
        await elapse(10)

    trip = Pipeline(name="trip").with_stage("book", compensable(book, undo_each([room])))
    trip = trip.with_stage("pay", compensable(takes_long, nothing), dependencies=("book",))

    report = run(SagaCoordinator().run(trip, saga_id="s"))

    assert report.status is SagaStatus.COMPLETED
    assert begun[0].result().status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b"]


class SlowToRead(MemoryLedger):
    """Looks long for a saga that is about to begin."""

    async def read(self, saga_id: str) -> Any:
        found = await super().read(saga_id)
        if not found:
            await elapse(1)
        return found


@pytest.mark.parametrize("hesitates", [False, True])
@pytest.mark.parametrize("instead", ["another attempt", "a fallback"])
def test_a_saga_that_a_failed_stage_was_about_to_run_runs_nothing(instead: str, hesitates: bool) -> None:
    """Promises 2 and 5: it ran beside the next attempt, which ran one of its own; or behind a fallback, where nobody could undo it."""
    world, room = scene({"room": ()})
    answers = iter([CardDeclined(), None])

    async def declined_at_first() -> None:
        if instead == "a fallback" or next(answers) is not None:
            raise CardDeclined

    came_to: list[str] = []

    async def begins(ctx: SagaContext) -> None:
        if hesitates:
            await elapse(1)
        try:
            came_to.append(str((await ctx.run_saga(room)).cause))
        except MisuseError as refused:
            came_to.append(str(refused))

    async def book(ctx: SagaContext) -> None:
        await asyncio.gather(declined_at_first(), begins(ctx))

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, room)

    async def rest(_: SagaContext) -> None:
        await elapse(5)

    trip = (
        Pipeline(name="trip")
        .with_stage("book", compensable(book, release))
        .with_stage("rest", compensable(rest, nothing), dependencies=("book",))
    )
    policy: Policy = FailFast(retry=Retry(attempts=2, wait=0.0))
    if instead == "a fallback":
        policy = ContinueWithFallback(fallbacks={"book": {}})
    coordinator = SagaCoordinator(policy, ledger=SlowToRead())

    first = run(coordinator.run(trip, saga_id="s"))
    assert first.ok
    assert world.log == ["+room"] * (instead == "another attempt")
    assert came_to[0] == (
        "expected a stage that is still running to run a saga, for stage 'book', "
        "got one of which this attempt has failed, or was given up. "
        "Whatever it has begun beside, let it end before the stage does: asyncio.TaskGroup sees to that."
        if hesitates
        else "the saga was interrupted: the stage that ran it has failed"
    )
    undone = run(coordinator.compensate("s", trip))

    assert undone.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert world.refusals == []


def test_beside_the_pivot_of_one_child_what_is_stuck_in_another_one_is_still_for_a_person() -> None:
    """Promise 5: the stage can't be undone any more, but that says nothing of its other sagas."""
    _, sale = scene({"sale": ()}, kinds={"sale": "pivot"})
    world, room = scene({"room": ()}, {"room": Script(undo_fails=1)})

    async def book(ctx: SagaContext) -> None:
        for pipeline in (sale, room):
            await ctx.run_saga(pipeline, policy=IMPATIENT)
        raise CardDeclined

    parent = Pipeline(name="trip").with_stage("book", compensable(book, undo_each([sale, room])))
    coordinator = SagaCoordinator(IMPATIENT)

    stuck = run(coordinator.run(parent, saga_id="s"))
    assert stuck.status is SagaStatus.STUCK
    assert [*stuck.stuck] == ["book", "book#1.2/room"]
    run(coordinator.settle("s", "book#1.2/room", "retry", "they answer again"))
    report = run(coordinator.resume("s", parent))

    assert report.status is SagaStatus.HALTED
    assert report.clean, str(report)
    assert world.standing == {}


def test_what_is_stuck_in_several_children_of_a_stage_is_reported_and_settled_one_by_one() -> None:
    worlds, rooms = zip(*[scene({"room": (), "bed": ()}, {"room": Script(undo_fails=9)}) for _ in range(3)], strict=True)

    async def book(ctx: SagaContext) -> None:
        for room in rooms:
            await ctx.run_saga(room, policy=IMPATIENT)

    parent = Pipeline().with_stage("book", compensable(book, undo_each(rooms))).with_stage("fail", fail, "work", dependencies=("book",))
    coordinator = SagaCoordinator(IMPATIENT)

    stuck = run(coordinator.run(parent, saga_id="s"))

    assert [*stuck.stuck] == ["book", "book/room", "book#1.2/room", "book#1.3/room"]
    assert [line.split()[2:5] for line in str(stuck).splitlines() if "saga settle" in line] == [
        ["s", path, "undone"] for path in ("book/room", "'book#1.2/room'", "'book#1.3/room'")
    ]
    worlds[1].undo("room")
    report = run(coordinator.settle("s", "book#1.2/room", "undone", "by hand"))
    assert [*report.stuck] == ["book/room", "book#1.3/room"]
    worlds[0].undo("room")
    report = run(coordinator.settle("s", "book/room", "undone", "by hand"))
    assert [*report.stuck] == ["book#1.3/room"]
    with pytest.raises(MisuseError, match="expected a stage that is stuck or in doubt, for stage 'room', got one that is undone"):
        run(coordinator.settle("s", "book/room", "undone", "by hand"))
    worlds[2].undo("room")
    report = run(coordinator.settle("s", "book#1.3/room", "undone", "by hand"))
    assert not report.stuck
    with pytest.raises(MisuseError, match="expected a stage that is stuck or in doubt, for stage 'room', got one that is undone"):
        run(coordinator.settle("s", "book#1.3/room", "undone", "by hand"))
    assert run(coordinator.resume("s", parent)).status is SagaStatus.COMPENSATED
    assert [world.standing for world in worlds] == [{}, {}, {}]


def test_a_word_said_again_is_taken_for_the_stage_that_it_was_said_of() -> None:
    """Nobody has looked at the other ones; and where the sagas above lack it, they learn of it then."""
    worlds, rooms = zip(*[scene({"room": ()}, {"room": Script(undo_fails=fails)}) for fails in (9, 0)], strict=True)

    async def book(ctx: SagaContext) -> None:
        for room in rooms:
            await ctx.run_saga(room, policy=IMPATIENT)

    parent = Pipeline().with_stage("book", compensable(book, undo_each(rooms))).with_stage("fail", fail, "work", dependencies=("book",))
    ledger = Dying(10_000)
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger)
    stuck = run(coordinator.run(parent, saga_id="s"))
    assert [*stuck.stuck] == ["book", "book/room"]
    worlds[0].undo("room")
    ledger.left = 1
    with pytest.raises(LedgerError, match="killed"):
        run(coordinator.settle("s", "book/room", "undone", "by hand"))
    ledger.left = 10_000

    run(coordinator.settle("s", "book/room", "undone", "by hand"))
    report = run(coordinator.resume("s", parent))

    assert report.status is SagaStatus.COMPENSATED
    assert [world.standing for world in worlds] == [{}, {}]


def test_what_a_later_attempt_ran_has_a_path_of_its_own_though_what_was_before_it_is_undone() -> None:
    shape = {"room": (), "pay": ("room",)}
    rooms = [scene(shape, {"room": Script(undo_fails=fails), "pay": Script("raise")})[1] for fails in (0, 9)]

    async def book(ctx: SagaContext) -> None:
        report = await ctx.run_saga(rooms[ctx.attempt - 1], policy=IMPATIENT)
        raise NestedSagaFailed(report)

    parent = Pipeline().with_stage("book", compensable(book, undo_each(rooms), compensate_in_doubt=True))
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0.0), compensation=IMPATIENT.compensation))

    report = run(coordinator.run(parent, saga_id="s"))

    assert [*report.stuck] == ["book", "book#2/room"]
    command = "saga settle s 'book#2/room' undone --note '...'"
    assert command in str(report)
    assert command in str(run(coordinator.report("s/book#2")))
    assert [failure.stage for failure in report.failures] == ["book/pay", "book", "book#2/pay", "book#2/room", "book", "book"]
    assert "undoing room was declined" in report.failures[-1].message
    with pytest.raises(MisuseError, match="for stage 'room', got one that is undone"):
        run(coordinator.settle("s", "book/room", "kept", "by hand"))
    assert not run(coordinator.settle("s", "book#2/room", "kept", "by hand")).stuck


def test_a_path_that_leads_to_several_stuck_stages_is_refused() -> None:
    _, rooms = zip(*[scene({"room": ()}, {"room": Script(undo_fails=9)}) for _ in range(2)], strict=True)

    async def book(ctx: SagaContext) -> None:
        if ctx.attempt == 1:
            raise CardDeclined
        for room in rooms:
            await ctx.run_saga(room, policy=IMPATIENT)

    parent = Pipeline().with_stage("book", compensable(book, undo_each(rooms))).with_stage("fail", fail, "work", dependencies=("book",))
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0.0), compensation=IMPATIENT.compensation))
    stuck = run(coordinator.run(parent, saga_id="s"))
    assert [*stuck.stuck] == ["book", "book#2/room", "book#2.2/room"]

    with pytest.raises(MisuseError) as refused:
        run(coordinator.settle("s", "book/room", "undone", "by hand"))

    several = "expected the path of one stage, got 'book/room', which leads to 2."
    assert str(refused.value) == f"{several} Name one of them: book#2/room, book#2.2/room."


def test_what_a_person_keeps_in_a_child_keeps_what_the_child_stands_on() -> None:
    world, trip = generations({"pay": Script(undo_fails=9), "after": Script("raise")}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(trip, saga_id="s"))

    run(coordinator.settle("s", PATH, "kept", "the customer keeps it"))
    report = run(coordinator.resume("s", trip))

    assert report.status is SagaStatus.HALTED
    assert report.clean, str(report)
    assert report.past_pivot
    assert report.stages["book_hotel"].state is StageState.KEPT
    assert world.standing.keys() == {"before", "room", "open", "pay"}


def test_a_pivot_within_a_child_protects_what_the_child_stands_on() -> None:
    world, trip = generations({"after": Script("raise", then=("ok",))}, {"pay": "pivot"})
    coordinator = SagaCoordinator()

    halted = run(coordinator.run(trip, saga_id="s"))
    report = run(coordinator.resume("s", trip))

    assert halted.status is SagaStatus.HALTED
    assert halted.past_pivot
    assert halted.compensation_order == ("aside",)
    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+before", "+aside", "+room", "+open", "+pay", "+confirm", "-aside", "+aside", "+after"]


def test_a_child_that_fails_after_its_pivot_halts_the_parent_and_both_go_on_from_there() -> None:
    world, trip = generations({"confirm": Script("raise", then=("ok",))}, {"pay": "pivot"})
    coordinator = SagaCoordinator()

    halted = run(coordinator.run(trip, saga_id="s"))

    assert halted.status is SagaStatus.HALTED
    assert halted.stages["book_hotel"].state is StageState.FAILED
    assert halted.stages["before"].state is StageState.KEPT
    assert world.standing.keys() == {"before", "room", "open", "pay"}

    report = run(coordinator.resume("s", trip))

    assert report.status is SagaStatus.COMPLETED
    assert world.standing.keys() == {"before", "room", "open", "pay", "confirm", "after", "aside"}
    assert all(count == 1 for count in world.standing.values())
    assert len(report.stages["book_hotel"].children) == 1


@pytest.mark.parametrize("fallback", [False, True])
def test_what_can_be_undone_beyond_the_pivot_of_a_child_is_undone_when_it_is_settled(fallback: bool) -> None:
    """Also where a fallback stands in, so that the child never goes forward any more; it was in doubt for good."""
    shape = {"pay": (), "mail": ("pay",), "fail": ("mail",)}
    world, child = scene(shape, {"mail": Script(undo_fails=1), "fail": Script("raise", then=("ok",))}, {"pay": "pivot"})
    before, parent = scene({"before": ()})
    trip = parent.with_stage("child", nested(child, IMPATIENT), dependencies=("before",))
    policy: Any = ContinueWithFallback(fallbacks={"child": {}}) if fallback else FailFast()
    coordinator = SagaCoordinator(policy)

    stuck = run(coordinator.run(trip, saga_id="s"))
    assert stuck.status is SagaStatus.STUCK
    assert [*stuck.stuck] == ["child", "child/mail"]
    run(coordinator.settle("s", "child/mail", "retry", "they answer again"))
    report = run(coordinator.resume("s", trip))

    assert report.status is (SagaStatus.DEGRADED if fallback else SagaStatus.HALTED)
    assert report.clean, str(report)
    assert (world.standing, before.standing) == ({"pay": 1}, {"before": 1})
    assert "Kept within what did not complete: child/pay." in str(report).splitlines()
    assert report.stages["child"].state is (StageState.FALLBACK if fallback else StageState.FAILED)
    assert set(report.kept) == ({"before", "child"} if fallback else {"before"})
    again = run(coordinator.resume("s", trip))
    if fallback:
        assert again == report, "there was nothing left to do"
    else:
        assert again.status is SagaStatus.COMPLETED
        assert world.standing == {"pay": 1, "mail": 1, "fail": 1}


def test_what_a_person_undid_beyond_the_pivot_of_a_child_protects_nothing_before_it() -> None:
    """What was held back by it may be undone then, as the docs say."""
    world, child = scene({"pay": (), "mail": ("pay",)}, {"mail": Script("hang")}, {"pay": "pivot"})
    before, parent = scene({"before": ()})
    trip = parent.with_stage("child", nested(child, FailFast(timeout=1)), dependencies=("before",))
    coordinator = SagaCoordinator(IMPATIENT)
    stuck = run(coordinator.run(trip, saga_id="s"))
    assert [*stuck.stuck, *stuck.in_doubt, *stuck.kept] == ["child", "child/mail", "before"]

    run(coordinator.settle("s", "child/mail", "undone", "nobody got one"))
    world.undo("pay")
    run(coordinator.settle("s", "child", "undone", "they gave the money back, too"))
    report = run(coordinator.resume("s", trip))

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean, str(report)
    assert not report.past_pivot
    assert (world.standing, before.standing) == ({}, {})


def test_where_nothing_came_of_a_saga_but_what_is_beyond_the_pivot_of_a_child_it_halts() -> None:
    """Promise 5: it was said to be compensated, and the pivot stood."""
    world, child = scene({"pay": (), "mail": ("pay",)}, {"mail": Script("raise", then=("ok",))}, {"pay": "pivot"})
    aside, parent = scene({"aside": ()})
    parent = parent.with_stage("child", nested(child))
    tail = scene({"after": ()})[1].stages["after"].runner
    parent = parent.with_stage("after", tail, dependencies=("aside", "child"))
    coordinator = SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch"))

    halted = run(coordinator.run(parent, saga_id="s"))

    assert halted.status is SagaStatus.HALTED
    assert (world.standing, aside.standing) == ({"pay": 1}, {})
    assert run(coordinator.resume("s", parent)).status is SagaStatus.COMPLETED


def test_a_child_that_fails_before_its_pivot_is_undone_with_its_parent() -> None:
    world, trip = generations({"pay": Script("raise")}, {"pay": "pivot"})

    report = run(SagaCoordinator().run(trip, saga_id="s"))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_halted_child_goes_on_when_its_parent_does() -> None:
    halting = FailFast(on_failure="halt")
    world, trip = generations({"pay": Script("raise", then=("ok",))}, policy=halting)
    ledger = MemoryLedger()
    coordinator = SagaCoordinator(halting, ledger=ledger)

    halted = run(coordinator.run(trip, saga_id="s"))
    report = run(coordinator.resume("s", trip))

    assert halted.status is SagaStatus.HALTED
    assert report.status is SagaStatus.COMPLETED
    assert [name for name in world.log if name != "+aside"] == ["+before", "+room", "+open", "+pay", "+confirm", "+after"]
    assert len(report.stages["book_hotel"].children) == 1
    assert [child.status for child in report.stages["book_hotel"].children] == [SagaStatus.COMPLETED]
    assert [event.by for event in run(ledger.read("s/book_hotel")) if isinstance(event, SagaResumed)] == ["saga s"]


def test_when_the_ledger_fails_a_child_that_goes_on_the_error_names_what_is_in_effect_there() -> None:
    halting = FailFast(on_failure="halt")
    world, child = scene(SEQUENCE, {"b": Script("raise", then=("ok",))})
    parent = Pipeline(name="parent").with_stage("child", nested(child, halting))
    ledger = Dying(10_000)
    coordinator = SagaCoordinator(halting, ledger=ledger)
    run(coordinator.run(parent, saga_id="s"))
    ledger.left = 5

    with pytest.raises(SagaUnrecorded) as failed:
        run(coordinator.resume("s", parent))

    assert world.log == ["+a", "+b"]
    assert (failed.value.in_effect, failed.value.unknown) == (("child/a", "child/b"), ("child",))


@pytest.mark.parametrize(
    "scripts",
    [
        {"room": Script(undo_fails=1), "after": Script("raise", before=1, then=("ok",))},
        {"room": Script(undo_fails=1), "confirm": Script("raise", then=("ok",))},
        {"open": Script(undo_fails=1), "after": Script("raise", before=1, then=("ok",))},
        {"confirm": Script(undo_fails=1), "after": Script("raise", before=1, then=("ok",))},
    ],
)
@pytest.mark.parametrize("settled", [False, True])
def test_a_child_that_is_stuck_half_undone_is_made_whole_when_its_parent_goes_forward(scripts: dict[str, Script], settled: bool) -> None:
    """What is kept stands: also what is within it."""
    for script in scripts.values():
        script.attempts.clear()
        script.undo_attempts = 0
    world, trip = generations(scripts, policy=IMPATIENT)
    seen: list[Any] = []

    async def look(ctx: Any) -> None:
        seen.append(ctx.inputs.get_output("book_hotel").data["saga_id"])

    trip = trip.with_stage("look", look, "work", dependencies=("book_hotel",))
    coordinator = SagaCoordinator(IMPATIENT)
    stuck = run(coordinator.run(trip, saga_id="s"))
    assert stuck.status is SagaStatus.STUCK
    if settled:
        (path,) = [name for name in stuck.stuck if name.endswith(("room", "open", "confirm"))]
        run(coordinator.settle("s", path, "retry", "they answer again"))

    report = run(coordinator.resume("s", trip, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert report.clean, str(report)
    assert world.standing == dict.fromkeys(["before", "room", "open", "pay", "confirm", "after", "aside"], 1)
    assert seen[-1:] == ["s/book_hotel"]
    assert len(seen) == 1 + ("after" in scripts)
    undone = run(coordinator.compensate("s", trip))
    assert undone.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert world.refusals == []


def test_a_child_of_which_a_person_keeps_a_part_is_made_whole_when_its_parent_goes_forward() -> None:
    world, trip = generations({"pay": Script(undo_fails=9), "after": Script("raise", then=("ok",))}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", PATH, "kept", "the customer keeps it"))
    halted = run(coordinator.resume("s", trip))
    assert "confirm" not in world.standing
    assert halted.status is SagaStatus.HALTED

    report = run(coordinator.resume("s", trip))

    assert report.status is SagaStatus.COMPLETED
    assert world.standing == dict.fromkeys(["before", "room", "open", "pay", "confirm", "after", "aside"], 1)


def test_a_child_that_a_person_keeps_as_it_is_stays_as_it_is() -> None:
    world, trip = generations({"room": Script(undo_fails=9), "after": Script("raise", then=("ok",))}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(trip, saga_id="s"))

    run(coordinator.settle("s", "book_hotel", "kept", "the room alone will do"))
    report = run(coordinator.resume("s", trip, forward=True))

    assert report.status is SagaStatus.COMPLETED
    # What is within it is kept by the same word.
    assert report.clean
    assert str(report).endswith("Nothing is left to do.")
    assert "stuck, blocked or in doubt" not in str(report)
    assert world.standing.keys() == {"before", "room", "after", "aside"}


@pytest.mark.parametrize("failing", [None, "after", "confirm"])
def test_killed_at_any_event_a_family_comes_back_as_if_it_had_not_been(failing: str | None) -> None:
    """Promise 11 with children and grandchildren, whose ledgers break together with their parent's."""
    names = {"before", "room", "open", "pay", "confirm", "after", "aside"}
    survived = 0
    for killed_after in range(80):
        scripts = {failing: Script("raise")} if failing else {}
        world, trip = generations(scripts, dict.fromkeys(names, "probed"))
        ledger = Dying(killed_after)
        try:
            report = run(SagaCoordinator(ledger=ledger).run(trip, saga_id="s"))
            survived += 1
        except LedgerError:
            ledger.left = 10_000
            ledger.forget_owners()
            report = run(SagaCoordinator(ledger=ledger).resume("s", trip))

        assert world.refusals == [], killed_after
        assert world.standing.keys() == (set() if failing else names), (killed_after, str(report))
        assert report.status is (SagaStatus.COMPENSATED if failing else SagaStatus.COMPLETED), (killed_after, str(report))
    assert survived


def killed_while_it_ran(pipeline: Pipeline, ledger: Dying) -> Dying:
    """The ledger that saga `s` has left behind, whose process was killed."""
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 10_000
    ledger.forget_owners()
    return ledger


def test_a_child_that_lost_its_process_is_gone_on_with_and_nobody_is_asked_what_became_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """An ERROR in the log is for a person; and a report of what came to its end names no failure that nobody met."""
    child_world, child = scene(SEQUENCE, kinds=dict.fromkeys("abc", "probed"))
    parent = Pipeline(name="parent").with_stage("child", nested(child))
    ledger = killed_while_it_ran(parent, Dying(5))

    with caplog.at_level(logging.INFO, "saga"):
        recovery = run(SagaCoordinator(ledger=ledger, listeners=[log_events]).recover([parent]))

    report = recovery.reports["s"]
    assert report.status is SagaStatus.COMPLETED
    assert child_world.log == ["+a", "+b", "+c"]
    assert {failure.kind for failure in report.failures} == {FailureKind.CRASHED}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_on_the_way_back_a_child_that_lost_its_process_comes_to_rest_by_itself_and_its_stage_finds_that_nothing_stands() -> None:
    child_world, child = scene(SEQUENCE, kinds=dict.fromkeys("abc", "probed"))
    parent = Pipeline(name="parent").with_stage("child", nested(child))
    ledger = killed_while_it_ran(parent, Dying(5))

    report = run(SagaCoordinator(ledger=ledger).compensate("s", parent))

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["child"].state is StageState.FAILED
    assert {failure.kind for failure in report.failures} == {FailureKind.CRASHED, FailureKind.INTERRUPTED}
    assert child_world.standing == {}
    assert [event.by for event in run(ledger.read("s/child")) if isinstance(event, SagaResumed)] == ["saga s"]


def test_a_child_whose_undoing_goes_on_is_resumed_by_the_saga_that_runs_it() -> None:
    """And by no person: nobody has asked for it."""
    world, child = scene(SEQUENCE)

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(child)

    async def release(ctx: CompensationContext) -> None:
        for known in await ctx.child_sagas():
            await ctx.undo_saga(known.saga_id, child)

    parent = Pipeline(name="parent").with_stage("book", compensable(book, release))
    parent = parent.with_stage("fail", fail, "work", dependencies=("book",))

    class Killed(Dying):
        async def append(self, saga_id: str, events: Any, **how: Any) -> None:
            await super().append(saga_id, events, **how)
            if saga_id == "s/book" and isinstance(events[-1], SagaTurnedBack):
                self.left = 0

    ledger = killed_while_it_ran(parent, Killed(10_000))

    run(SagaCoordinator(ledger=ledger).recover([parent]))

    assert world.log == ["+a", "+b", "+c", "-c", "-b", "-a"]
    assert [event.by for event in run(ledger.read("s/book")) if isinstance(event, SagaResumed)] == ["saga s"]


def test_killed_at_any_event_a_saga_that_halts_lets_its_children_come_to_rest() -> None:
    """As it would have if its process had lived: what had stopped it stops what it goes back to only to ask."""
    halted = 0
    for killed_after in range(20):
        child_world, child = scene(SEQUENCE, {"b": Script(before=5)}, dict.fromkeys("abc", "probed"))
        _, parent = scene({"aside": ()}, {"aside": Script("raise", before=1)})
        parent = parent.with_stage("child", nested(child))
        ledger = Dying(killed_after)
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(parent, saga_id="s"))
        ledger.left = 10_000
        ledger.forget_owners()

        report = run(SagaCoordinator(ledger=ledger).resume("s", parent))

        assert all(entry.status is not SagaStatus.RUNNING for entry in run(ledger.list())), killed_after
        if report.stages["child"].state is StageState.FAILED:
            halted += 1
            assert report.status is SagaStatus.HALTED
            assert child_world.standing == {}
    assert halted


def test_a_probe_that_finds_a_child_stuck_says_which_and_why() -> None:
    script = Script(undo_fails=9, undo_bears_repetition=True)
    _, child = scene(SEQUENCE, {"a": script}, kinds=dict.fromkeys("abc", "probed"))
    parent = Pipeline(name="parent").with_stage("child", nested(child, IMPATIENT))
    ledger = killed_while_it_ran(parent, Dying(5))

    report = run(SagaCoordinator(ledger=ledger).compensate("s", parent))

    asked = [failure for failure in report.failures if failure.stage == "child" and failure.kind is FailureKind.COMPENSATION]
    assert report.status is SagaStatus.STUCK
    assert [failure.type for failure in asked[:1]] == ["saga.report.NestedSagaFailed"]
    assert "s/child" in asked[0].message


def test_a_child_of_the_execution_that_stands_is_not_undone_by_itself() -> None:
    _, child = scene(SEQUENCE)
    script = Script("raise", then=("ok",))
    _, tail = scene({"after": ()}, {"after": script})
    parent = Pipeline(name="parent").with_stage("child", nested(child))
    parent = parent.with_stage("after", tail.stages["after"].runner, dependencies=("child",))
    coordinator = SagaCoordinator()
    run(coordinator.run(parent, saga_id="s"))
    assert run(coordinator.resume("s", parent, forward=True)).stages["child"].executions == 2

    with pytest.raises(MisuseError, match="a saga that no other one runs"):
        run(coordinator.compensate("s/child~2", child))


def test_a_probe_that_lets_a_child_come_to_rest_stops_none_while_its_own_saga_runs_on() -> None:
    child_world, child = scene(SEQUENCE, kinds=dict.fromkeys("abc", "probed"))
    seen: list[tuple[SagaStatus, list[str]]] = []

    class Cautious(NestedSaga):
        idempotent = False

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            (known,) = await ctx.child_sagas()
            rested = await ctx.rest_saga(known.saga_id, child)
            seen.append((rested.status, [*child_world.log]))
            return await super().probe(ctx)

    parent = Pipeline(name="parent").with_stage("child", Cautious(child))
    ledger = killed_while_it_ran(parent, Dying(5))

    report = run(SagaCoordinator(ledger=ledger).resume("s", parent))

    assert seen == [(SagaStatus.RUNNING, ["+a", "+b"])]
    assert report.status is SagaStatus.COMPENSATED
    assert child_world.standing == {}


def test_who_lost_its_lease_brings_no_child_to_rest() -> None:
    """Whoever runs the saga now is about to."""
    world, child = scene(SEQUENCE, kinds=dict.fromkeys("abc", "probed"))
    asked: list[asyncio.Event] = []

    class HeldUp(NestedSaga):
        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            gate = asyncio.Event()
            asked.append(gate)
            await gate.wait()
            return await super().probe(ctx)

    parent = Pipeline(name="parent").with_stage("child", HeldUp(child))
    ledger = killed_while_it_ran(parent, Dying(5))

    async def taken_over() -> asyncio.Task[SagaReport]:
        ledger.forget_owners()
        so_far = len(asked)
        undoing = asyncio.create_task(SagaCoordinator(ledger=ledger).compensate("s", parent))
        while len(asked) == so_far:
            await asyncio.sleep(0)
        return undoing

    async def play() -> tuple[list[str], SagaReport]:
        slow, quick = await taken_over(), await taken_over()
        asked[0].set()
        with pytest.raises(LedgerConflict):
            await slow
        done_by_slow = world.log[2:]
        asked[1].set()
        return done_by_slow, await quick

    done_by_slow, report = run(play())

    assert done_by_slow == []
    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+a", "+b", "-b", "-a"]


def test_when_the_ledger_fails_while_a_probe_brings_a_child_to_rest_the_error_names_what_is_in_effect_there() -> None:
    world, child = scene(SEQUENCE, kinds=dict.fromkeys("abc", "probed"))
    parent = Pipeline(name="parent").with_stage("child", nested(child))
    ledger = killed_while_it_ran(parent, Dying(5))
    ledger.left = 3

    with pytest.raises(SagaUnrecorded) as failed:
        run(SagaCoordinator(ledger=ledger).compensate("s", parent))

    assert world.standing.keys() == {"a", "b"}
    assert {*failed.value.in_effect, *failed.value.unknown} == {"child", "child/a", "child/b"}


def test_killed_before_it_is_known_that_a_child_is_done_whose_pivot_is_behind_it_the_child_is_not_undone() -> None:
    """Promises 10 and 11: the probe finds that it has completed, and from then on it stands, with all that it depends on."""
    world, trip = generations({}, {"pay": "pivot"})

    class Killed(Dying):
        async def append(self, saga_id: str, events: Any, **how: Any) -> None:
            if any(isinstance(event, StageCompleted) and event.stage == "book_hotel" for event in events):
                self.left = 0
            await super().append(saga_id, events, **how)

    ledger = killed_while_it_ran(trip, Killed(1000))
    report = run(SagaCoordinator(ledger=ledger).compensate("s", trip))

    assert report.status is SagaStatus.HALTED
    assert report.clean, str(report)
    assert report.stages["book_hotel"].state is StageState.KEPT
    assert report.compensation_order == ("aside",)
    assert world.standing.keys() == {"before", "room", "open", "pay", "confirm"}


@pytest.mark.parametrize("failing", [None, "aside", "confirm"])
def test_killed_at_any_event_no_saga_of_a_family_is_left_running_by_whoever_recovers_it(failing: str | None) -> None:
    """Promise 11: a parent that does not go on lets its children come to rest, as it would have if its process had lived."""
    survived = left_by_its_parent = 0
    for killed_after in range(60):
        # It can't run again when its process has died, so the parent halts.
        scripts = {name: Script(undo_bears_repetition=True) for name in ("before", "room", "open", "pay", "confirm", "aside")}
        scripts["aside"].before, scripts["pay"].before = 2, 1
        if failing:
            scripts[failing].outcome = "raise"
        _, trip = generations(scripts, dict.fromkeys(["open", "pay"], "probed"))
        ledger = Dying(killed_after)
        try:
            run(SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(trip, saga_id="s"))
            survived += 1
        except LedgerError:
            ledger.left = 10_000
            ledger.forget_owners()
            recovery = run(SagaCoordinator(ledger=ledger).recover(trip))
            left_by_its_parent += any(report.status is SagaStatus.HALTED for report in recovery.reports.values())

        again = run(SagaCoordinator(ledger=ledger).recover(trip))
        assert str(again) == "No saga has lost its process.", killed_after
    assert survived
    assert left_by_its_parent


def test_killed_at_any_event_a_resumed_family_goes_forward_as_if_it_had_not_been() -> None:
    """Promise 11: what whoever resumed the parent wants of its stuck child holds until the child knows of it."""
    survived = killed_before_the_child_knew = 0
    for killed_after in range(60):
        scripts = {"open": Script(undo_fails=1, undo_bears_repetition=True), "confirm": Script("raise", then=("ok",))}
        names = ["before", "room", "open", "pay", "confirm", "after", "aside"]
        world, trip = generations(scripts, dict.fromkeys(names, "probed"), IMPATIENT)
        ledger = Dying(after=1000)
        policy = FailFast(on_failure="halt")
        stuck = run(SagaCoordinator(policy, ledger=ledger).run(trip, saga_id="s"))
        assert "book_hotel/charge_deposit/open" in stuck.stuck
        run(SagaCoordinator(ledger=ledger).settle("s", "book_hotel/charge_deposit/open", "retry", "they answer again"))

        ledger.left = killed_after
        try:
            run(SagaCoordinator(ledger=ledger).resume("s", trip, forward=True))
            survived += 1
        except LedgerError:
            ledger.left = 1000
            ledger.forget_owners()
            known = [any(isinstance(event, SagaResumed) for event in run(ledger.read(of))) for of in ("s", "s/book_hotel")]
            killed_before_the_child_knew += known == [True, False]
            recovery = run(SagaCoordinator(ledger=ledger).recover(trip))
            if not known[0]:
                assert not recovery.reports
                run(SagaCoordinator(ledger=ledger).resume("s", trip, forward=True))

        report = run(SagaCoordinator(ledger=ledger).report("s"))
        assert report.status is SagaStatus.COMPLETED, (killed_after, str(report))
        assert world.standing == dict.fromkeys(names, 1), killed_after
        assert world.refusals == [], killed_after
    assert survived
    assert killed_before_the_child_knew


class Striking(MemoryLedger):
    """Cancels somebody while it writes an event of a kind."""

    def __init__(self, kind: type[object]) -> None:
        super().__init__()
        self.kind = kind
        self.victim: asyncio.Task[Any] | None = None

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        if self.victim is not None and isinstance(events[-1], self.kind):
            self.victim.cancel()
            self.victim = None
            await asyncio.sleep(0)
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


def half_undone(*, idempotent: bool, ledger: MemoryLedger | None = None) -> tuple[World, SagaCoordinator, Pipeline]:
    """A stage that runs a hotel's room and breakfast as a saga; the breakfast has been undone, the room not."""
    shape = {"room": (), "breakfast": ()}
    world, hotel = scene(shape, {"room": Script(undo_fails=1)})

    async def book(ctx: SagaContext) -> dict[str, Any]:
        left = await ctx.child_sagas()
        report = await (ctx.resume_saga(left[-1].saga_id, hotel) if left else ctx.run_saga(hotel, policy=IMPATIENT))
        return {"id": report.saga_id}

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            assert (await ctx.undo_saga(child.saga_id, hotel)).clean

    parent = Pipeline(name="trip").with_stage("book", compensable(book, release, idempotent=idempotent))
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger)
    run(coordinator.run(parent, saga_id="s"))
    stuck = run(coordinator.compensate("s", parent))
    assert list(stuck.stuck) == ["book", "book/room"]
    return world, coordinator, parent


def test_a_stage_of_ones_own_that_is_stuck_half_undone_runs_again_when_its_saga_goes_forward() -> None:
    """What is kept stands: also what is within it."""
    world, coordinator, parent = half_undone(idempotent=True)

    report = run(coordinator.resume("s", parent, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert report.stages["book"].children[0].status is SagaStatus.COMPLETED
    assert world.standing == {"room": 1, "breakfast": 1}
    assert world.log == ["+room", "+breakfast", "-breakfast", "+breakfast"]


@pytest.mark.parametrize("event", [SagaResumed, StageStarted])
def test_one_that_is_stopped_before_it_runs_again_still_stands_in_part(event: type[object]) -> None:
    """Promise 5: what its saga then undoes is undone within it, too."""
    ledger = Striking(event)
    world, coordinator, parent = half_undone(idempotent=True, ledger=ledger)
    run(coordinator.settle("s", "book/room", "retry", "they answer again"))

    async def play() -> SagaReport:
        ledger.victim = resuming = asyncio.create_task(coordinator.resume("s", parent, forward=True))
        with pytest.raises(asyncio.CancelledError):
            await resuming
        return await coordinator.report("s")

    report = run(play())

    assert ledger.victim is None
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert world.log == ["+room", "+breakfast", "-breakfast", "-room"]


def test_one_whose_process_dies_before_it_runs_again_still_stands_in_part() -> None:
    ledger = Dying(after=100)
    world, coordinator, parent = half_undone(idempotent=True, ledger=ledger)
    run(coordinator.settle("s", "book/room", "retry", "they answer again"))
    ledger.left = 1
    with pytest.raises(LedgerError):
        run(coordinator.resume("s", parent, forward=True))
    assert isinstance(run(ledger.read("s"))[-1], SagaResumed)
    ledger.left = 100
    ledger.forget_owners()

    report = run(SagaCoordinator(ledger=ledger).compensate("s", parent))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_one_that_may_not_run_again_is_for_a_person_to_make_whole() -> None:
    world, coordinator, parent = half_undone(idempotent=False)

    with pytest.raises(MisuseError, match="expected a saga whose half undone stages can run again, got book, not idempotent"):
        run(coordinator.resume("s", parent, forward=True))
    assert world.log == ["+room", "+breakfast", "-breakfast"]
    world.undo("room")
    run(coordinator.settle("s", "book/room", "undone", "by hand"))
    assert run(coordinator.resume("s", parent)).status is SagaStatus.COMPENSATED


def test_one_that_a_person_has_made_whole_is_kept() -> None:
    world, coordinator, parent = half_undone(idempotent=False)
    world.land("breakfast")
    run(coordinator.settle("s", "book", "kept", "booked the breakfast by hand"))

    report = run(coordinator.resume("s", parent, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert report.stages["book"].state is StageState.KEPT


@pytest.mark.parametrize("how", ["resume_saga", "undo_saga"])
@pytest.mark.parametrize("whose", ["nobody's", "another saga's"])
def test_a_stage_that_turns_to_a_saga_that_is_not_its_own_fails_and_holds_up_nothing_else(how: str, whose: str) -> None:
    strange, other = scene({"room": ()})
    world, trip = scene({"aside": ()})
    stranger = "other" if whose == "nobody's" else "other/child"

    async def turn_to_it(ctx: Any) -> None:
        if hasattr(ctx, how):
            await getattr(ctx, how)(stranger, other)

    trip = trip.with_stage("book", compensable(turn_to_it, turn_to_it)).with_stage("fail", fail, "work", dependencies=("book", "aside"))
    coordinator = SagaCoordinator(IMPATIENT)
    run(coordinator.run(other if whose == "nobody's" else Pipeline(name="top").with_stage("child", nested(other)), saga_id="other"))

    report = run(coordinator.run(trip, saga_id="s"))

    (failure,) = [failure for failure in report.failures if failure.stage == "book"]
    runner = "no saga runs" if whose == "nobody's" else "saga other runs"
    assert failure.message == (
        f"expected a saga that saga s runs, got {stranger}, which {runner}. "
        "A stage goes on with what it began with ctx.run_saga; other sagas are for the coordinator's own methods."
    )
    assert report.status is (SagaStatus.STUCK if how == "undo_saga" else SagaStatus.COMPENSATED)
    assert world.standing == {}
    assert strange.log == ["+room"]
    assert run(coordinator.report(stranger)).status is SagaStatus.COMPLETED


def test_a_child_whose_every_branch_fell_says_why_to_the_stage_that_ran_it() -> None:
    _, within = scene({"room": (), "breakfast": ("room",)}, {"breakfast": Script("raise")})
    pipeline = Pipeline(name="trip").with_stage("hotel", nested(within, ContinueWithFallback(without_fallback="skip_branch")))

    report = run(SagaCoordinator().run(pipeline, saga_id="s"))

    assert report.cause is not None
    assert report.cause.message == ("its saga s/hotel is compensated: stage 'breakfast' raised: CardDeclined: breakfast was declined")
