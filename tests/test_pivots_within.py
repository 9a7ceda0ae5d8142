"""What a point of no return of a saga within means for the stages around it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from stageflow.api import Pipeline

from saga import (
    CompensableStage,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    MisuseError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaStatus,
    StageState,
    compensable,
    nested,
)
from saga.events import CompensationFailed, StageCompleted
from saga.report import NestedSagaFailed
from tests.controlled import run
from tests.dying import Dying
from tests.within import (
    IMPATIENT,
    fail,
    generations,
    killed_while_it_ran,
    nothing_landed,
    undo_each,
    with_another_hotel,
)
from tests.world import CardDeclined, Script, World, scene


def test_what_the_sagas_of_a_fallback_have_done_stands_below_a_pivot_that_used_it() -> None:
    world, trip = with_another_hotel(undo_fails=1, taxi="pivot")
    trip = trip.with_stage("tour", fail, "work", dependencies=("taxi",))

    report = run(SagaCoordinator(ContinueWithFallback()).run(trip, saga_id="s"))

    assert [*report.stuck] == ["hotel", "hotel/room"]
    assert world.log == ["+room", "+inn", "+taxi"]


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


def sale_and_letter(letter: Sequence[str], fails: str) -> tuple[World, SagaCoordinator, Pipeline]:
    """sell -> tell: the first runs a sale, which is a pivot with these stages behind it, as a saga; one of the two then fails once."""
    world, sale = scene({"sale": (), **dict.fromkeys(letter, ("sale",))}, kinds={"sale": "pivot"})
    failing = [fails]

    async def sell(ctx: SagaContext) -> None:
        begun = await ctx.child_sagas()
        report = await (ctx.resume_saga(begun[0].saga_id, sale) if begun else ctx.run_saga(sale))
        report.raise_for_status()
        await tell(ctx)

    async def tell(ctx: SagaContext) -> None:
        if ctx.stage_name in failing:
            failing.clear()
            raise CardDeclined

    trip = Pipeline(name="trip").with_stage("sell", compensable(sell, undo_each([sale])))
    trip = trip.with_stage("tell", compensable(tell, nothing_landed), dependencies=("sell",))
    return world, SagaCoordinator(), trip


def test_a_stage_of_which_nothing_can_be_undone_beyond_the_pivot_of_a_child_is_gone_on_from() -> None:
    """It was said to be half undone, which it was not: the saga could neither be resumed nor settled."""
    world, coordinator, trip = sale_and_letter((), "tell")
    halted = run(coordinator.run(trip, saga_id="s"))

    report = run(coordinator.resume("s", trip))

    assert halted.status is SagaStatus.HALTED
    assert [*halted.kept] == ["sell"]
    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+sale"]


def test_a_stage_that_failed_and_is_half_undone_beyond_the_pivot_of_a_child_runs_again() -> None:
    """As one that failed does without a word, whether it is idempotent or not; nobody could settle it."""
    world, coordinator, trip = sale_and_letter(("letter",), "sell")
    halted = run(coordinator.run(trip, saga_id="s"))

    report = run(coordinator.resume("s", trip))

    assert halted.status is SagaStatus.HALTED
    assert halted.stages["sell"].state is StageState.FAILED
    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+sale", "+letter", "-letter", "+letter"]


@pytest.mark.parametrize("verdict", ["kept", "retry"])
def test_a_stage_in_doubt_with_the_pivot_of_a_child_in_the_way_of_its_undoing_does_not_run_again_without_a_word(verdict: str) -> None:
    """It was called failed and ran once more: nobody knows what it had done beside its saga."""
    world, sale = scene({"sale": ()}, kinds={"sale": "pivot"})

    async def sell(ctx: SagaContext) -> None:
        begun = await ctx.child_sagas()
        await (ctx.resume_saga(begun[0].saga_id, sale) if begun else ctx.run_saga(sale))
        world.log.append("+card")
        if not begun:
            await asyncio.Event().wait()

    stage = compensable(sell, undo_each([sale]), timeout=1, compensate_in_doubt=True)
    trip, coordinator = Pipeline(name="trip").with_stage("sell", stage), SagaCoordinator()
    stuck = run(coordinator.run(trip, saga_id="s"))
    with pytest.raises(MisuseError, match="sell in doubt"):
        run(coordinator.resume("s", trip, forward=True))
    run(coordinator.settle("s", "sell", verdict, "looked"))

    report = run(coordinator.resume("s", trip, forward=True))

    assert stuck.status is SagaStatus.STUCK
    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+sale", "+card", *(["+card"] if verdict == "retry" else [])]


@pytest.mark.parametrize("verdict", ["kept", "retry"])
def test_a_stage_that_completed_and_is_half_undone_beyond_the_pivot_of_a_child_is_for_a_person(verdict: str) -> None:
    """It was called kept, and the saga halted: resume refused it as half undone, and settle as kept."""
    world, coordinator, trip = sale_and_letter(("letter",), "tell")
    stuck = run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", "sell", verdict, "looked"))

    report = run(coordinator.resume("s", trip, forward=True))

    assert stuck.status is SagaStatus.STUCK
    assert [*stuck.stuck] == ["sell"]
    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+sale", "+letter", "-letter", *(["+letter"] if verdict == "retry" else [])]


def test_a_compensation_that_meets_the_pivot_of_a_child_says_what_is_in_its_way() -> None:
    """It had failed because its saga was completed: nobody could guess why that is a failure."""
    _, coordinator, trip = sale_and_letter(("letter",), "tell")

    stuck = run(coordinator.run(trip, saga_id="s"))

    assert [*stuck.stuck] == ["sell"]
    assert "failed once: NestedSagaFailed: its saga s/sell is halted: a pivot or a person keeps what stands of it" in str(stuck)


def test_a_stage_that_recorded_effects_beside_a_saga_beyond_its_pivot_is_not_called_kept_when_its_compensation_has_failed() -> None:
    """It may have undone these before it met the pivot: the saga halted, and when it was resumed, it went on as if they stood."""
    world, sale = scene({"sale": ()}, kinds={"sale": "pivot"})

    async def sell(ctx: SagaContext) -> None:
        await ctx.record("card")
        world.log.append("+card")
        await ctx.run_saga(sale)

    async def refund(ctx: CompensationContext) -> None:
        world.log.append("-card")
        await undo_each([sale])(ctx)

    trip = Pipeline(name="trip").with_stage("sell", compensable(sell, refund)).with_stage("tell", fail, "work", dependencies=("sell",))
    coordinator = SagaCoordinator()
    report = run(coordinator.run(trip, saga_id="s"))

    with pytest.raises(MisuseError, match="half undone"):
        run(coordinator.resume("s", trip, forward=True))

    assert world.log == ["+card", "+sale", "-card"]
    assert [*report.stuck] == ["sell"]


def test_what_a_fallback_stands_in_for_is_undone_when_what_used_that_turns_out_to_be_beyond_the_pivot_of_a_child() -> None:
    """Promise 12: whoever resumed the saga undid it, and until then a person was asked for."""
    world, before = scene({"seat": ()}, {"seat": Script("raise", lands=True)}, {"seat": "recording"})
    _, sale = scene({"sale": ()}, kinds={"sale": "pivot"})

    async def sell(ctx: SagaContext) -> None:
        await ctx.run_saga(sale)

    trip = before.with_stage("sell", compensable(sell, undo_each([sale])), dependencies=("seat",))
    trip = trip.with_stage("fail", fail, "work", dependencies=("sell",))

    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks={"seat": {}}))
    report = run(coordinator.run(trip, saga_id="s"))

    assert report.status is SagaStatus.HALTED
    assert report.clean, str(report)
    assert [*report.kept] == ["seat", "sell"]
    assert report.fallbacks == ("seat",)
    assert world.undone() == ["seat"]
    failed = [event for event in run(coordinator.ledger.read("s")) if isinstance(event, CompensationFailed)]
    assert [(event.stage, event.past_pivot, event.will_retry) for event in failed] == [("sell", True, False)]


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
    assert world.standing == dict.fromkeys(("before", "room", "open", "pay", "confirm", "after", "aside"), 1)
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
