"""A person's word on a stage of a saga that another one runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stageflow.api import Pipeline

from saga import (
    CompensableStage,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    LedgerError,
    MisuseError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    Verdict,
    compensable,
    nested,
)
from saga.render.advice import what_to_do
from saga.render.reach import Reach
from saga.report import NestedSagaFailed
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.within import (
    IMPATIENT,
    PATH,
    fail,
    generations,
    undo_each,
)
from tests.world import SEQUENCE, CardDeclined, Script, nothing, scene


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
    assert world.standing == dict.fromkeys(("before", "room", "open", "pay", "confirm", "after", "aside"), 1)


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


def test_a_stage_in_doubt_that_can_neither_be_asked_nor_run_again_is_settled_though_its_saga_has_halted() -> None:
    """The report said that nothing was to be settled, and to resume the saga, which was refused."""
    _, child = scene({"room": ()}, {"room": Script("raise")})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(child, policy=FailFast(on_failure="halt"))
        await elapse(10)

    trip = Pipeline(name="trip").with_stage("book", compensable(book, nothing, timeout=1))
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))

    report = run(coordinator.run(trip, saga_id="s"))

    assert [within.status for within in report.stages["book"].children] == [SagaStatus.HALTED]
    with pytest.raises(MisuseError, match="book in doubt, without a probe and not idempotent"):
        run(coordinator.resume("s", trip))
    assert what_to_do(report)[-3:] == [
        "To do: look at the outside world, put it right by hand, and say so (undone, kept or retry); then go on:",
        "  saga settle s book undone --note '...'",
        "  saga resume s",
    ]


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


@pytest.mark.parametrize("fallbacks", [{}, {"book": {}}])
def test_a_stage_that_was_to_be_tried_again_is_for_a_person_once_the_saga_above_is_done_with_it(fallbacks: dict[str, Any]) -> None:
    """The report said to resume the saga, which did nothing, and said so again."""

    async def hang(_: SagaContext) -> None:
        await elapse(10)

    room = Pipeline(name="room").with_stage("room", compensable(hang, nothing, timeout=1))
    attempts = iter(["first", *fallbacks])

    async def book(ctx: Any) -> None:
        for attempt in attempts:
            if attempt == "first":
                await ctx.run_saga(room, policy=FailFast(on_failure="halt"))
            raise CardDeclined

    trip = Pipeline(name="trip").with_stage("book", book, "work")
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", "book/room", "retry", "they answer again"))

    report = run(coordinator.resume("s", trip, policy=ContinueWithFallback(fallbacks=fallbacks)))

    assert report.status is (SagaStatus.DEGRADED if fallbacks else SagaStatus.COMPLETED)
    assert what_to_do(report)[-2:] == [
        "To do: look at the outside world, put it right by hand, and say so (undone or kept):",
        "  saga settle s book/room undone --note '...'",
    ]
    assert run(coordinator.settle("s", "book/room", "undone", "by hand")).clean


def test_a_saga_that_is_stuck_within_a_stage_that_the_saga_above_is_done_with_is_resumed_by_itself() -> None:
    is_reached: list[bool] = []

    async def hang(_: SagaContext) -> None:
        await elapse(10)

    async def ask(_: CompensationContext) -> None:
        if not is_reached:
            raise CardDeclined

    room = Pipeline(name="room").with_stage("room", compensable(hang, nothing, probe=ask, timeout=1))
    answers = iter([CardDeclined()])

    async def book(ctx: Any) -> None:
        for declined in answers:
            await ctx.run_saga(room, policy=IMPATIENT)
            raise declined

    trip = Pipeline(name="trip").with_stage("book", book, "work")
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    run(coordinator.run(trip, saga_id="s"))
    run(coordinator.settle("s", "book/room", "retry", "they answer again"))

    report = run(coordinator.resume("s", trip))

    assert report.status is SagaStatus.COMPLETED
    assert what_to_do(report)[-1] == "To do: there is nothing to settle. Mend the cause, then: saga resume s/book"
    is_reached.append(True)
    assert run(coordinator.resume("s/book", room)).status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("verdict", ["undone", "retry"])
def test_a_saga_within_that_is_stuck_and_never_turned_back_undoes_by_itself_what_serves_nothing(verdict: str) -> None:
    """The report said to resume it by itself, and that was refused: the seat was held for ever."""
    is_reached: list[bool] = []

    async def hang(_: SagaContext) -> None:
        await elapse(10)

    async def ask(_: CompensationContext) -> None:
        if not is_reached:
            raise CardDeclined

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(child, policy=ContinueWithFallback(without_fallback="skip_branch"))

    world, flat = scene({"seat": ()})
    child = Pipeline(name="child").with_stage("seat", flat.stages["seat"].runner)
    child = child.with_stage("room", compensable(hang, nothing, probe=ask, timeout=1), dependencies=("seat",))
    coordinator = SagaCoordinator()
    first = run(coordinator.run(Pipeline(name="trip").with_stage("book", compensable(book, nothing)), saga_id="s"))
    assert (first.status, [*first.blocked], [*first.in_doubt]) == (SagaStatus.COMPLETED, ["book/seat"], ["book/room"])

    settled = run(coordinator.settle("s", "book/room", verdict, "looked"))

    assert what_to_do(settled)[-1].endswith("saga resume s/book")
    is_reached.append(True)
    assert run(coordinator.resume("s/book", child)).status is SagaStatus.COMPENSATED
    assert run(coordinator.report("s")).clean
    assert (world.standing, world.refusals) == ({}, [])


@pytest.mark.parametrize("fallbacks", [{}, {"book": {"instead": True}}])
def test_no_word_is_taken_that_only_going_forward_could_heed_within_a_stage_that_the_saga_above_is_done_with(
    fallbacks: dict[str, Any],
) -> None:
    """The report said to resume the saga within, which did nothing, and said so again."""

    async def hang(_: SagaContext) -> None:
        await elapse(10)

    async def book(ctx: Any) -> None:
        await ctx.run_saga(child, policy=ContinueWithFallback(without_fallback="skip_branch"))
        if fallbacks:
            raise CardDeclined

    world, flat = scene({"seat": ()})
    child = Pipeline(name="child").with_stage("seat", flat.stages["seat"].runner)
    child = child.with_stage("room", compensable(hang, nothing, timeout=1), dependencies=("seat",))
    trip = Pipeline(name="trip").with_stage("book", book, "work")
    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks=fallbacks))
    run(coordinator.run(trip, saga_id="s"))
    assert (world.log, run(coordinator.report("s/book")).status) == (["+seat"], SagaStatus.STUCK)

    with pytest.raises(MisuseError, match=r"expected undone or kept, .* got retry\. It has neither a probe nor a compensation that copes"):
        run(coordinator.settle("s", "book/room", "retry", "they answer again"))

    report = run(coordinator.report("s/book"))
    assert report.stages["room"].verdicts == (Verdict.UNDONE, Verdict.KEPT)
    run(coordinator.settle("s", "book/room", "undone", "looked"))
    assert run(coordinator.resume("s/book", child)).status is SagaStatus.COMPENSATED
    assert (world.standing, world.refusals) == ({}, [])


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


@pytest.mark.parametrize(("pipeline", "given"), [("", ""), ("shop:trip", " MODULE:PIPELINE")])
def test_the_commands_for_a_saga_within_take_its_own_pipeline_where_they_find_none_by_themselves(pipeline: str, given: str) -> None:
    """Typed as they were printed, they were refused for the want of it."""
    _, hotel = scene({"room": (), "tour": ("room",)}, {"room": Script(undo_fails=1), "tour": Script(before=3)})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel, policy=IMPATIENT)

    trip = Pipeline(name="trip").with_stage("book", compensable(book, undo_each([hotel]), timeout=1))
    coordinator = SagaCoordinator(FailFast(cancel_grace=1))

    async def play() -> tuple[SagaReport, SagaReport]:
        early = await coordinator.run(trip, saga_id="s")
        await elapse(60)
        await coordinator.settle("s", "book/room", "retry", "they answer again")
        return early, await coordinator.resume("s", trip)

    early, late = run(play())

    reach = Reach(pipeline)
    assert f"saga recover{given} goes on with it." in what_to_do(early, reach)[-1]
    assert what_to_do(late, reach)[-1] == f"To do: it was not undone to the end; go on with: saga compensate s/book{given}"


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
