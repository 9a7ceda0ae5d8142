"""A stage that runs a pipeline of its own as a saga."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from stageflow.api import Pipeline, PipelineContext, StageArtifact, StageContext, StageOutput

from saga import (
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    GraphChanged,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaFailed,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
    nested,
)
from saga.events import AnyEvent, SagaResumed, SagaStarted, StageStarted
from saga.ledger import Entry
from saga.ledgers.sqlite import SQLiteLedger
from saga.report import NestedSagaFailed
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.within import (
    IMPATIENT,
    fail,
    generations,
    killed_while_it_ran,
    undo_each,
)
from tests.world import SEQUENCE, CardDeclined, Probed, Recording, Script, Scripted, World, nothing, scene


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


@pytest.mark.parametrize("going_on", ["resume", "compensate"])
@pytest.mark.parametrize(
    ("kind", "outcome", "kill"), [(Scripted, "hang", 99), (Scripted, "ok", 1), (Probed, "ok", 1), (Probed, "raise", 2)]
)
def test_of_a_stage_that_may_have_had_an_effect_before_it_was_a_nested_saga_none_answers(
    kind: type[Scripted], outcome: str, kill: int, going_on: str
) -> None:
    """It had run no saga: asked, that would say that nothing has landed."""
    world = World({"a": ()})
    before, child_world, after = before_and_after_it_was_nested(world, kind, outcome)
    ledger = Dying(kill)
    with contextlib.suppress(LedgerError):
        run(SagaCoordinator(FailFast(on_failure="halt", timeout=1), ledger=ledger).run(before, saga_id="s"))
    ledger.forget_owners()
    ledger.left = 99
    coordinator = SagaCoordinator(ledger=ledger)
    events = run(ledger.read("s"))

    with pytest.raises(GraphChanged) as caught:
        run(getattr(coordinator, going_on)("s", after))

    assert caught.value.differences == ("stage 'a' runs a saga now, and may have had an effect itself before",)
    assert run(ledger.read("s")) == events
    assert (world.log, child_world.log) == (["+a"], [])


def test_a_nested_saga_that_offers_less_than_others_goes_on_though_its_process_died_before_its_child_began() -> None:
    class WithoutChild(Dying):
        async def create(self, saga_id: str, *args: Any, **under: Any) -> int:
            if not self.left:
                raise OSError("killed")
            return await super().create(saga_id, *args, **under)

    world, child = scene({"b": ()})
    pipeline = Pipeline(name="p").with_stage(
        "a", compensable(nested(child), undo_each([child]), idempotent=False, compensate_in_doubt=False)
    )
    ledger = killed_while_it_ran(pipeline, WithoutChild(1))
    assert [type(event) for event in run(ledger.read("s"))] == [SagaStarted, StageStarted]
    assert run(ledger.list(parent="s")) == ()

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+b"]


def test_a_stage_that_had_no_effect_before_it_was_a_nested_saga_runs_as_one() -> None:
    world = World({"a": ()})
    child_world, child = scene({"b": ()})
    before = Pipeline(name="p").with_stage("a", Scripted(world, "a", Script("raise")))
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(before, saga_id="s"))

    report = run(coordinator.resume("s", Pipeline(name="p").with_stage("a", nested(child))))

    assert report.status is SagaStatus.COMPLETED
    assert child_world.log == ["+b"]


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


@pytest.mark.parametrize("going_on", ["resume", "compensate"])
def test_a_saga_within_which_a_pipeline_has_another_name_now_is_left_as_it_is(going_on: str) -> None:
    """Its stages are named alike, and what they do may be another thing."""
    world, hotel = scene({"room": ()})
    hostel_world, hostel = scene({"room": ()})
    hotel, hostel = Pipeline(name="hotel", stages=hotel.stages), Pipeline(name="hostel", stages=hostel.stages)
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(in_a_trip(hotel), saga_id="s"))

    with pytest.raises(GraphChanged) as caught:
        run(getattr(coordinator, going_on)("s", in_a_trip(hostel)))

    assert caught.value.differences == ("within stage 'book': its pipeline is 'hotel', this one is 'hostel'",)
    assert (world.log, hostel_world.log) == (["+room"], [])
    assert run(coordinator.compensate("s", in_a_trip(hotel))).status is SagaStatus.COMPENSATED
    assert world.log == ["+room", "-room"]


def in_a_trip(inner: Pipeline) -> Pipeline:
    """book -> pay: the first runs that pipeline as a saga, and the second fails."""
    return Pipeline(name="trip").with_stage("book", nested(inner)).with_stage("pay", fail, "work", dependencies=("book",))


def with_an_inn_instead() -> tuple[World, Pipeline]:
    """book -> taxi: the first runs a hotel, which fails, as a saga; its fallback runs an inn."""
    shape: dict[str, tuple[str, ...]] = {"room": (), "bed": (), "taxi": ()}
    world, flat = scene(shape, {"room": Script("raise")}, dict.fromkeys(shape, "probed"))
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    hotel, inn = Pipeline(name="hotel").with_stage("room", stages["room"]), Pipeline(name="inn").with_stage("bed", stages["bed"])

    async def book_inn(ctx: SagaContext, _: Any) -> None:
        left = await ctx.child_sagas()
        report = await (ctx.resume_saga(left[-1].saga_id, inn) if left[-1].pipeline == "inn" else ctx.run_saga(inn))
        report.raise_for_status()

    async def release(ctx: CompensationContext) -> None:
        for child in reversed(await ctx.child_sagas()):
            await ctx.undo_saga(child.saga_id, inn if child.pipeline == "inn" else hotel)

    trip = Pipeline(name="trip").with_stage("book", compensable(nested(hotel), release, fallback=book_inn))
    return world, trip.with_stage("taxi", stages["taxi"], dependencies=("book",))


def test_a_nested_pipeline_has_not_changed_because_its_fallback_ran_another_one() -> None:
    world, trip = with_an_inn_instead()
    coordinator = SagaCoordinator(ContinueWithFallback())
    assert run(coordinator.run(trip, saga_id="s")).status is SagaStatus.DEGRADED

    report = run(coordinator.compensate("s", trip))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+bed", "+taxi", "-taxi", "-bed"]


@pytest.mark.parametrize("kill", range(1, 12))
def test_a_nested_pipeline_has_not_changed_because_its_fallback_was_running_another_one(kill: int) -> None:
    world, trip = with_an_inn_instead()
    ledger = Dying(kill)
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ContinueWithFallback(), ledger=ledger).run(trip, saga_id="s"))
    ledger.forget_owners()
    ledger.left = 99

    report = run(SagaCoordinator(ledger=ledger).resume("s", trip))

    assert report.status is SagaStatus.DEGRADED
    assert world.log == ["+bed", "+taxi"]


@pytest.mark.parametrize("going_on", ["resume", "compensate"])
def test_what_its_fallback_ran_answers_for_no_stage_that_may_have_had_an_effect_before_it_was_a_nested_saga(going_on: str) -> None:
    """The saga was called compensated while what the stage had done stood."""
    world = World({"a": ()})
    own = Scripted(world, "a", Script("hang", lands=True))
    hotel_world, hotel = scene({"room": ()})
    inn_world, flat = scene({"bed": ()})
    inn = Pipeline(name="inn", stages=flat.stages)

    async def book_inn(ctx: SagaContext, _: Any) -> None:
        await ctx.run_saga(inn)

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, inn)

    before = Pipeline(name="trip").with_stage("a", compensable(own, own.compensate, fallback=book_inn, timeout=1))
    after = Pipeline(name="trip").with_stage("a", compensable(nested(hotel), release, fallback=book_inn))
    coordinator = SagaCoordinator(ContinueWithFallback())
    run(coordinator.run(before, saga_id="s"))
    assert (world.log, inn_world.log) == (["+a"], ["+bed"])

    with pytest.raises(GraphChanged) as caught:
        run(getattr(coordinator, going_on)("s", after))

    assert caught.value.differences == ("stage 'a' runs a saga now, and may have had an effect itself before",)
    assert (world.log, inn_world.log, hotel_world.log) == (["+a"], ["+bed"], [])


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
            await self.prune(timedelta(0))
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
                await self.prune(timedelta(0))
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


def test_a_child_that_raises_through_is_told_with_its_own_words() -> None:
    error = NestedSagaFailed(SagaReport.model_validate_json(run(SagaCoordinator().run(scene(SEQUENCE)[1], saga_id="s")).model_dump_json()))

    assert str(error) == "its saga s is completed"
    assert isinstance(error, Exception)
    assert not isinstance(error, CardDeclined)


def test_a_child_that_does_not_come_clean_on_its_own_way_back_surfaces_too() -> None:
    world, trip = generations({"room": Script(undo_fails=9), "confirm": Script("raise")}, policy=IMPATIENT)
    coordinator = SagaCoordinator(IMPATIENT)

    report = run(coordinator.run(trip, saga_id="s"))

    assert report.status is SagaStatus.STUCK
    assert "book_hotel/room" in report.stuck
    assert world.standing.keys() == {"before", "room"}
    assert "book_hotel/confirm" in {failure.stage for failure in report.failures}


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
        "Nothing is left to do in it. What is left of the saga that runs it: saga show s",
        "  saga settle s book undone --note '...'",
        "Nothing is left to do.",
    ]
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


def test_a_child_that_halted_with_nothing_standing_is_undone_with_its_parent_and_both_are_forgotten() -> None:
    """It stayed halted, which nobody could resume, and no prune ever forgot the two."""
    _, parent_world, pipeline = family({"a": Script("raise")}, {}, FailFast(on_failure="halt"))
    coordinator = SagaCoordinator()

    report = run(coordinator.run(pipeline, saga_id="s"))
    forgotten = run(coordinator.ledger.prune(timedelta(0)))

    assert parent_world.log == ["+before", "-before"]
    assert report.status is SagaStatus.COMPENSATED
    assert [child.status for child in report.stages["child"].children] == [SagaStatus.COMPENSATED]
    assert sorted(forgotten) == ["s", "s/child"]


def test_a_child_that_halted_with_nothing_standing_is_undone_by_itself_where_its_parent_is_done_with_it() -> None:
    _, child = scene(SEQUENCE, {"a": Script("raise")})

    async def goes_on(ctx: StageContext) -> StageOutput:
        assert isinstance(ctx, SagaContext)
        await ctx.run_saga(child, policy=FailFast(on_failure="halt"))
        return StageOutput.ok()

    coordinator = SagaCoordinator()
    run(coordinator.run(Pipeline(name="parent").with_stage("child", goes_on, "work"), saga_id="s"))
    assert run(coordinator.report("s/child")).status is SagaStatus.HALTED

    report = run(coordinator.compensate("s/child", child))
    forgotten = run(coordinator.ledger.prune(timedelta(0)))

    assert report.status is SagaStatus.COMPENSATED
    assert sorted(forgotten) == ["s", "s/child"]


def test_a_child_whose_every_branch_fell_says_why_to_the_stage_that_ran_it() -> None:
    _, within = scene({"room": (), "breakfast": ("room",)}, {"breakfast": Script("raise")})
    pipeline = Pipeline(name="trip").with_stage("hotel", nested(within, ContinueWithFallback(without_fallback="skip_branch")))

    report = run(SagaCoordinator().run(pipeline, saga_id="s"))

    assert report.cause is not None
    assert report.cause.message == ("its saga s/hotel is compensated: stage 'breakfast' raised: CardDeclined: breakfast was declined")


def test_a_child_whose_every_branch_fell_does_not_blame_a_stage_for_which_a_fallback_stood_in() -> None:
    shape = {"price": (), "room": ("price",), "breakfast": ("room",)}
    _, within = scene(shape, {"price": Script("raise"), "breakfast": Script("raise")})
    policy = ContinueWithFallback(without_fallback="skip_branch", fallbacks={"price": {"amount": 0}})
    pipeline = Pipeline(name="trip").with_stage("hotel", nested(within, policy))

    report = run(SagaCoordinator().run(pipeline, saga_id="s"))

    assert report.cause is not None
    assert report.cause.message == "its saga s/hotel is compensated: stage 'breakfast' raised: CardDeclined: breakfast was declined"
