"""What the sagas that a stage of ones own has run come to when it fails, is undone, or passes over them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    LedgerConflict,
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
from saga.events import AnyEvent, SagaEnded
from saga.nested import NestedSaga
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.late import DeniedByProbe, while_slow_is_undone
from tests.slow import SlowDisk
from tests.within import (
    IMPATIENT,
    booking,
    fail,
    generations,
    killed_while_it_ran,
    nothing_landed,
    undo_each,
    with_another_hotel,
)
from tests.world import SEQUENCE, CardDeclined, Script, conclude, nothing, scene


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


def test_what_the_sagas_of_a_fallback_have_done_is_undone_with_what_its_stage_has_left_once_nothing_uses_it() -> None:
    world, trip = with_another_hotel(undo_fails=1)
    coordinator = SagaCoordinator(ContinueWithFallback())
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", "hotel/room", "retry", "they answer again"))

    report = run(coordinator.compensate("s", trip))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+room", "+inn", "+taxi", "-taxi", "-inn", "-room"]


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("without_fallback", ["fail", "skip_branch"])
def test_what_the_sagas_of_a_fallback_have_done_is_undone_when_what_used_it_fails(without_fallback: Any, leaves: bool) -> None:
    """Promise 5: the inn stood in a saga that was compensated."""
    world, trip = with_another_hotel(leaves=leaves, taxi_does="raise")

    report = run(SagaCoordinator(ContinueWithFallback(without_fallback=without_fallback)).run(trip, saga_id="s"))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ([*("+room", "+inn"), *("-inn", "-room")] if leaves else ["+inn", "-inn"])
    assert [*report.undone] == ["hotel"]


def test_what_the_sagas_of_an_orphans_fallback_have_done_is_kept_where_the_policy_keeps_it() -> None:
    world, trip = with_another_hotel(leaves=True, taxi_does="raise")
    policy = ContinueWithFallback(without_fallback="skip_branch", orphans="keep")
    coordinator = SagaCoordinator(policy)

    report = run(coordinator.run(trip, saga_id="s"))

    assert (report.status, report.fallbacks) == (SagaStatus.HALTED, ("hotel",))
    assert world.standing == {"inn": 1}
    assert run(coordinator.compensate("s", trip)).status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("leaves", [True, False])
def test_what_the_sagas_of_a_fallback_have_done_is_undone_with_the_saga_also_long_after_what_its_stage_has_left(leaves: bool) -> None:
    """Promises 2 and 5: the stage was undone already, or there was nothing to undo of it, so nobody looked for the inn."""
    world, trip = with_another_hotel(leaves=leaves)
    coordinator = SagaCoordinator(ContinueWithFallback())
    went_on = run(coordinator.run(trip, saga_id="s"))
    assert (went_on.status, world.standing) == (SagaStatus.DEGRADED, {"inn": 1, "taxi": 1})

    report = run(coordinator.compensate("s", trip))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log[-2:] == ["-taxi", "-inn"]
    assert report.compensation_order == ("taxi", "hotel")
    assert (world.standing, world.refusals) == ({}, [])


def test_what_a_stage_recorded_is_not_undone_once_more_with_the_sagas_of_its_fallback() -> None:
    """Promise 2: it gets what is left, and another key than the first time."""
    world, room = scene({"inn": ()})
    undone: list[tuple[str, tuple[Any, ...]]] = []

    async def hold(ctx: SagaContext) -> None:
        await ctx.record("deposit")
        raise CardDeclined

    async def book_other(ctx: SagaContext, _: Any) -> None:
        await ctx.run_saga(room)

    async def release(ctx: CompensationContext) -> None:
        undone.append((ctx.idempotency_key, ctx.effects))
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, room)

    trip = Pipeline(name="trip").with_stage("hotel", compensable(hold, release, fallback=book_other))
    coordinator = SagaCoordinator(ContinueWithFallback())
    run(coordinator.run(trip, saga_id="s"))
    assert (undone, world.standing) == ([("s/hotel/undo", ("deposit",))], {"inn": 1})

    report = run(coordinator.compensate("s", trip))

    assert undone[1:] == [("s/hotel/undo~2", ())]
    assert (report.status, world.standing) == (SagaStatus.COMPENSATED, {})


def test_a_fallback_of_which_the_sagas_were_undone_stands_in_no_more_when_the_saga_is_run_once_more() -> None:
    """The taxi was ordered to an inn that had been cancelled."""
    world, trip = with_another_hotel(leaves=False)
    coordinator = SagaCoordinator(ContinueWithFallback())
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.compensate("s", trip))

    report = run(coordinator.resume("s", trip, forward=True))

    assert (report.status, report.fallbacks) == (SagaStatus.DEGRADED, ("hotel",))
    assert world.standing == {"inn": 1, "taxi": 1}


def test_a_person_who_says_that_a_stage_is_undone_with_the_sagas_of_its_fallback_says_that_the_fallback_stands_in_no_more() -> None:
    world, room = scene({"inn": ()})

    async def book_other(ctx: SagaContext, _: Any) -> None:
        await ctx.run_saga(room)

    trip = Pipeline(name="trip").with_stage("hotel", compensable(fail, fail, fallback=book_other))
    coordinator = SagaCoordinator(ContinueWithFallback(compensation=IMPATIENT.compensation))
    run(coordinator.run(trip, saga_id="s"))
    stuck = run(coordinator.compensate("s", trip))
    assert ([*stuck.stuck], world.standing) == (["hotel"], {"inn": 1})
    world.undo("inn")

    report = run(coordinator.settle("s", "hotel", "undone", "by hand"))

    assert (report.status, report.fallbacks, [*report.undone]) == (SagaStatus.COMPENSATED, (), ["hotel"])


@pytest.mark.parametrize("idempotent", [True, False])
@pytest.mark.parametrize("outcome", ["hang", "raise"])
def test_a_stage_that_is_stuck_behind_the_sagas_of_its_fallback_is_not_run_again_when_its_saga_goes_forward(
    outcome: str, idempotent: bool
) -> None:
    """Promise 1: it failed again, its fallback ran another inn, and the first one was cancelled under the taxi that goes there."""
    world, flat = scene({"inn": (), "taxi": ()})
    room = Pipeline(name="room").with_stage("inn", flat.stages["inn"].runner)
    answers = iter([CardDeclined()])
    ran: list[str] = []

    async def hold(ctx: SagaContext) -> None:
        ran.append("hotel")
        await ctx.record("deposit")
        await conclude("hotel", outcome)

    async def book_other(ctx: SagaContext, _: Any) -> None:
        ran.append("another one")
        await ctx.run_saga(room)

    async def release(ctx: CompensationContext) -> None:
        for declined in answers:
            raise declined
        await undo_each([room] * len(await ctx.child_sagas()))(ctx)

    hotel = compensable(hold, release, fallback=book_other, timeout=10, idempotent=idempotent, compensate_in_doubt=True)
    trip = Pipeline(name="trip").with_stage("hotel", hotel)
    trip = trip.with_stage("taxi", flat.stages["taxi"].runner, dependencies=("hotel",))
    coordinator = SagaCoordinator(ContinueWithFallback(compensation=IMPATIENT.compensation))
    assert [*run(coordinator.run(trip, saga_id="s")).stuck] == ["hotel"]

    report = run(coordinator.resume("s", trip, forward=True))

    assert (report.status, report.fallbacks) == (SagaStatus.DEGRADED, ("hotel",))
    assert report.compensation_order == ("hotel",)
    assert (ran, world.log) == (["hotel", "another one"], ["+inn", "+taxi"])


def test_a_saga_goes_forward_with_the_sagas_of_a_fallback_though_what_its_stage_has_left_is_half_undone() -> None:
    """It was refused until the stage could run again, which nobody wants of it."""
    world, trip = with_another_hotel(undo_fails=1)
    coordinator = SagaCoordinator(ContinueWithFallback())
    assert [*run(coordinator.run(trip, saga_id="s")).stuck] == ["hotel", "hotel/room"]

    report = run(coordinator.resume("s", trip, forward=True))

    assert ([*report.stuck], report.stages["taxi"].state) == (["hotel", "hotel/room"], StageState.KEPT)
    assert world.log == ["+room", "+inn", "+taxi"]


@pytest.mark.parametrize("outcome", ["hang", "raise"])
def test_a_person_who_says_that_what_a_stage_has_left_is_undone_does_not_say_so_of_the_sagas_of_its_fallback(outcome: str) -> None:
    """Promise 5: nothing had tried to undo the inn, whether the hotel was in doubt or stuck, and the saga was COMPENSATED with it."""
    world, flat = scene({"inn": (), "taxi": ()})
    room = Pipeline(name="room").with_stage("inn", flat.stages["inn"].runner)

    async def hold(ctx: SagaContext) -> None:
        await ctx.record("deposit")
        await conclude("hotel", outcome)

    async def book_other(ctx: SagaContext, _: Any) -> None:
        await ctx.run_saga(room)

    async def release(ctx: CompensationContext) -> None:
        if ctx.effects:
            raise CardDeclined
        await undo_each([room])(ctx)

    trip = Pipeline(name="trip").with_stage("hotel", compensable(hold, release, fallback=book_other, timeout=10))
    trip = trip.with_stage("taxi", flat.stages["taxi"].runner, dependencies=("hotel",))
    coordinator = SagaCoordinator(ContinueWithFallback(compensation=IMPATIENT.compensation))
    run(coordinator.run(trip, saga_id="s"))
    asked = run(coordinator.compensate("s", trip))
    assert ([*asked.stuck, *asked.in_doubt], world.log) == (["hotel"], ["+inn", "+taxi", "-taxi"])

    settled = run(coordinator.settle("s", "hotel", "undone", "they paid the deposit back"))
    report = run(coordinator.resume("s", trip))

    assert (settled.status, [*settled.blocked]) == (SagaStatus.STUCK, ["hotel"])
    assert (report.status, report.fallbacks, world.standing) == (SagaStatus.COMPENSATED, (), {})


def test_a_fallback_of_which_a_person_has_undone_the_rest_stands_in_no_more_when_the_saga_is_run_once_more() -> None:
    """The taxi was ordered to an inn that had been cancelled, by hand."""
    world, flat = scene({"inn": (), "taxi": ()}, {"inn": Script(undo_fails=1), "taxi": Script(undo_bears_repetition=True)})
    room = Pipeline(name="room").with_stage("inn", flat.stages["inn"].runner)

    async def book_other(ctx: SagaContext, _: Any) -> None:
        await ctx.run_saga(room, policy=IMPATIENT)

    trip = Pipeline(name="trip").with_stage("hotel", compensable(fail, undo_each([room]), fallback=book_other))
    trip = trip.with_stage("taxi", flat.stages["taxi"].runner, dependencies=("hotel",))
    coordinator = SagaCoordinator(ContinueWithFallback(compensation=IMPATIENT.compensation))
    run(coordinator.run(trip, saga_id="s"))
    assert [*run(coordinator.compensate("s", trip)).stuck] == ["hotel", "hotel/inn"]
    world.undo("inn")
    run(coordinator.settle("s", "hotel/inn", "undone", "by hand"))

    report = run(coordinator.resume("s", trip, forward=True))

    assert (report.status, report.fallbacks) == (SagaStatus.DEGRADED, ("hotel",))
    assert world.standing == {"inn": 1, "taxi": 1}


def test_what_comes_late_while_the_sagas_of_the_fallback_below_it_are_undone_does_not_stand_on_them() -> None:
    """Promise 1: it was kept, upon a fallback of which nothing stood any more."""
    shape = {"base": (), "mid": ("base",), "fails": ("mid",), "slow": ()}
    scripts = {"mid": Script(undo_takes=5), "fails": Script("raise"), "slow": Script(undo_takes=20)}
    world, flat = scene(shape, scripts)
    other = Pipeline(name="other").with_stage("slow", flat.stages["slow"].runner)

    async def book_other(ctx: SagaContext, _: Any) -> None:
        await ctx.run_saga(other)

    async def main() -> SagaReport:
        taxi = DeniedByProbe(world)
        trip = Pipeline(name="trip").with_stage("hotel", compensable(fail, undo_each([other]), fallback=book_other))
        trip = trip.with_stage("taxi", taxi, dependencies=("hotel",))
        for name in ("base", "mid", "fails"):
            trip = trip.with_stage(name, flat.stages[name].runner, dependencies=shape[name])
        coordinator = SagaCoordinator(ContinueWithFallback(timeout=10, cancel_grace=2, without_fallback="skip_branch"))
        return await while_slow_is_undone(coordinator.run(trip), world, taxi)

    report = run(main())

    assert (report.status, report.fallbacks) == (SagaStatus.COMPENSATED, ())
    assert (world.standing, world.refusals) == ({}, [])


def test_a_saga_of_a_fallback_is_not_undone_by_itself_under_what_used_it_and_one_that_its_stage_ran_may_be() -> None:
    """Promise 1."""
    world, trip = with_another_hotel(leaves=True)
    coordinator = SagaCoordinator(ContinueWithFallback())
    own, other = run(coordinator.run(trip, saga_id="s")).stages["hotel"].children
    stages = scene({"room": (), "inn": ()}, kinds=dict.fromkeys(("room", "inn"), "probed"))[1].stages

    with pytest.raises(MisuseError, match="expected a saga that no other one runs"):
        run(coordinator.compensate(other.saga_id, Pipeline(name="other").with_stage("inn", stages["inn"].runner)))
    report = run(coordinator.compensate(own.saga_id, Pipeline(name="hotel").with_stage("room", stages["room"].runner)))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {"inn": 1, "taxi": 1}


def test_what_the_sagas_of_a_fallback_have_done_waits_for_what_used_it() -> None:
    """Promise 1, and with on_failure="continue" promise 5: the hotel was undone without its inn, which nobody found then."""
    world, trip = with_another_hotel(leaves=True, taxi_undo_fails=1)
    coordinator = SagaCoordinator(ContinueWithFallback(compensation=IMPATIENT.compensation))
    run(coordinator.run(trip, saga_id="s"))
    stuck = run(coordinator.compensate("s", trip))
    assert ([*stuck.stuck], [*stuck.blocked]) == (["taxi"], ["hotel"])
    assert world.standing == {"inn": 1, "taxi": 1}
    run(coordinator.settle("s", "taxi", "retry", "they answer again"))

    report = run(coordinator.resume("s", trip))

    assert (report.status, world.standing, world.refusals) == (SagaStatus.COMPENSATED, {}, [])


def test_what_the_sagas_of_a_fallback_have_done_does_not_wait_where_nothing_is_to_wait() -> None:
    """Promise 5: the hotel was undone without its inn, and nobody found that then."""
    world, trip = with_another_hotel(leaves=True, taxi_undo_fails=1)
    go_past = Compensation(retry=Retry(attempts=1), on_failure="continue")
    coordinator = SagaCoordinator(ContinueWithFallback(compensation=go_past))
    run(coordinator.run(trip, saga_id="s"))
    stuck = run(coordinator.compensate("s", trip))
    assert ([*stuck.stuck], world.standing) == (["taxi"], {"taxi": 1})
    run(coordinator.settle("s", "taxi", "retry", "they answer again"))

    report = run(coordinator.resume("s", trip))

    assert (report.status, world.standing) == (SagaStatus.COMPENSATED, {})


def test_what_the_sagas_of_a_fallback_have_done_stays_when_a_person_keeps_what_used_it() -> None:
    world, trip = with_another_hotel(leaves=True, taxi_undo_fails=1)
    coordinator = SagaCoordinator(ContinueWithFallback(compensation=IMPATIENT.compensation))
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.compensate("s", trip))
    run(coordinator.settle("s", "taxi", "kept", "they are on their way"))

    report = run(coordinator.compensate("s", trip))

    assert (report.status, report.fallbacks) == (SagaStatus.HALTED, ("hotel",))
    assert world.standing == {"inn": 1, "taxi": 1}


def test_what_the_saga_of_a_fallback_within_has_done_is_undone_when_the_stage_that_ran_it_then_fails() -> None:
    """Promise 5: of the child it was said that nothing stood."""
    world, trip = with_another_hotel(leaves=False)

    async def plan(ctx: SagaContext) -> None:
        await ctx.run_saga(only_hotel, policy=ContinueWithFallback())
        raise CardDeclined

    only_hotel = Pipeline(name="only").with_stage("hotel", trip.stages["hotel"].runner)
    outer = Pipeline(name="outer").with_stage("plan", compensable(plan, undo_each([only_hotel])))

    report = run(SagaCoordinator().run(outer, saga_id="s"))

    assert (report.status, world.log) == (SagaStatus.COMPENSATED, ["+inn", "-inn"])


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


def test_a_stage_undoes_its_saga_with_no_pipeline_of_another_name() -> None:
    """As one that was written anew since, whose stages happen to be named alike."""
    world, hotel = scene({"room": ()})
    other_world, other = scene({"room": ()})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(Pipeline(name="hotel", stages=hotel.stages))

    release = undo_each([Pipeline(name="hostel", stages=other.stages)])
    trip = Pipeline(name="trip").with_stage("book", compensable(book, release)).with_stage("pay", fail, "work", dependencies=("book",))

    report = run(SagaCoordinator(IMPATIENT).run(trip, saga_id="s"))

    assert (world.log, other_world.log) == (["+room"], [])
    assert (report.status, [*report.stuck]) == (SagaStatus.STUCK, ["book"])
    assert "GraphChanged" in str(report)
    assert "its pipeline is 'hotel', this one is 'hostel'" in str(report)


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


@pytest.mark.parametrize("raises_at", [0.0, 10.5])
def test_a_compensation_that_fails_beside_a_saga_that_is_never_undone_is_given_up_when_its_time_is_over(raises_at: float) -> None:
    """What asyncio.gather left running was waited for without end, whatever the compensation's timeout."""
    world, room = scene({"room": ()}, {"room": Script(undo_takes=1_000)})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room, policy=FailFast(compensation=Compensation(timeout=None)))

    async def declined() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await elapse(raises_at)
        raise CardDeclined("the card was declined")

    async def release(ctx: CompensationContext) -> None:
        await asyncio.gather(declined(), *(ctx.undo_saga(child.saga_id, room) for child in await ctx.child_sagas()))

    trip = Pipeline().with_stage("book", compensable(book, release)).with_stage("fail", fail, "work", dependencies=("book",))
    policy = FailFast(compensation=Compensation(timeout=10.0, retry=Retry(attempts=1)), cancel_grace=2.0)

    coordinator = SagaCoordinator(policy)

    async def play() -> tuple[float, SagaReport, SagaReport]:
        report = await coordinator.run(trip, saga_id="s")
        given_up_at = asyncio.get_running_loop().time()
        await elapse(1_000)
        return given_up_at, report, await coordinator.resume("s", trip)

    given_up_at, report, later = run(play())

    assert given_up_at == 12.0
    assert report.status is SagaStatus.STUCK
    undone = report.stages["book"].compensation
    assert undone is not None
    assert undone.failure is not None
    raised, still_there = undone.failure.message.split("; ")
    assert raised == "it raised CardDeclined: the card was declined"
    assert still_there == "a saga that it undoes besides was not undone in time, and may still be on its way back"
    assert undone.failure.exception is not None
    assert isinstance(undone.failure.exception.__cause__, CardDeclined)
    assert later.stages["book"].children[0].status is SagaStatus.COMPENSATED
    assert world.log == ["+room", "-room"]


def test_what_undoes_a_stage_that_was_given_up_waits_for_its_saga_that_is_still_on_its_way_back() -> None:
    """A person was called, though all that was left to do was to wait."""
    world, hotel = scene({"room": (), "tour": ("room",)}, {"room": Script(undo_takes=20), "tour": Script(before=60)}, {"tour": "probed"})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel)

    trip = Pipeline().with_stage("book", compensable(book, undo_each([hotel]), timeout=10, compensate_in_doubt=True))

    report = run(SagaCoordinator().run(trip, saga_id="s"))

    assert "was given up" in str(report.stages["book"].failure)
    assert report.status is SagaStatus.COMPENSATED, str(report)
    assert world.log == ["+room", "-room"]


@pytest.mark.parametrize("policy", [FailFast(), ContinueWithFallback()], ids=lambda policy: type(policy).__name__)
def test_a_probe_of_a_stage_that_was_given_up_waits_for_its_saga_that_is_still_on_its_way_back(policy: Policy) -> None:
    """Asked before its parent stopped, it was told that the saga was running."""
    world, hotel = scene({"room": (), "tour": ("room",)}, {"room": Script(undo_takes=20), "tour": Script(before=60)}, {"tour": "probed"})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel)

    async def ask(ctx: CompensationContext) -> StageOutput | None:
        (child,) = await ctx.child_sagas()
        return None if (await ctx.rest_saga(child.saga_id, hotel)).status is SagaStatus.COMPENSATED else StageOutput.ok()

    trip = Pipeline().with_stage("book", compensable(book, undo_each([hotel]), probe=ask, timeout=10))

    report = run(SagaCoordinator(policy).run(trip, saga_id="s"))

    assert "was given up" in str(report.stages["book"].failure)
    assert report.status is SagaStatus.COMPENSATED, str(report)
    assert world.log == ["+room", "-room"]


def test_a_stage_goes_on_with_its_saga_at_the_very_turn_at_which_that_was_let_go_of() -> None:
    """The two were taken for one: a KeyError failed the stage, and its saga was undone."""
    world, hotel = scene({"room": ()}, {"room": Script("raise", then=("ok",))})

    async def book(ctx: SagaContext) -> None:
        begun = asyncio.create_task(ctx.run_saga(hotel, policy=FailFast(on_failure="halt")))
        went_on = None
        while went_on is None:
            await asyncio.sleep(0)
            for child in await ctx.child_sagas():
                with contextlib.suppress(MisuseError):  # it is not let go of yet
                    went_on = await ctx.resume_saga(child.saga_id, hotel)
        await begun

    trip = Pipeline().with_stage("book", compensable(book, undo_each([hotel])))

    report = run(SagaCoordinator().run(trip, saga_id="s"))

    assert report.status is SagaStatus.COMPLETED, str(report)
    assert world.log == ["+room"]


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


def test_a_stage_that_asks_for_its_sagas_is_told_of_those_that_the_ledger_knows() -> None:
    """A durable ledger learns of one with its first stage, and no report can be made of it before."""
    told: list[list[str]] = []
    _, room = scene({"room": ()})

    async def book(ctx: SagaContext) -> None:
        booking = asyncio.create_task(ctx.run_saga(room))
        await asyncio.sleep(0)
        told.append([child.saga_id for child in await ctx.child_sagas()])
        await booking
        told.append([child.saga_id for child in await ctx.child_sagas()])

    report = run(SagaCoordinator(ledger=SlowDisk()).run(Pipeline().with_stage("book", compensable(book, nothing)), saga_id="s"))

    assert report.status is SagaStatus.COMPLETED, str(report)
    assert told == [[], ["s/book"]]


class Taken(SlowDisk):
    """Somebody else holds a saga of each id that a stage's would have."""

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], **how: Any) -> int:
        if saga_id.startswith("s/"):
            raise LedgerConflict.held(saga_id, holder="somebody else")
        return await super().create(saga_id, owner, events, **how)


def test_a_saga_that_could_not_begin_has_left_nothing() -> None:
    _, room = scene({"room": ()})
    world, trip = scene({"before": ()})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room)

    trip = trip.with_stage("book", compensable(book, nothing), dependencies=("before",))

    report = run(SagaCoordinator(ledger=Taken()).run(trip, saga_id="s"))

    assert report.status is SagaStatus.COMPENSATED, str(report)
    assert "somebody else" in str(report.cause)
    assert world.standing == {}
