"""A family of which a process died, a ledger failed, or something is half undone goes on as if it had not been."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    LedgerConflict,
    LedgerError,
    MemoryLedger,
    MisuseError,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    SagaUnrecorded,
    StageState,
    compensable,
    nested,
)
from saga.events import FallbackFailed, SagaResumed, SagaTurnedBack, StageStarted
from saga.listeners.logs import log_events
from saga.nested import NestedSaga
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.slow import SlowLedger
from tests.within import (
    IMPATIENT,
    PATH,
    booking,
    fail,
    generations,
    half_undone,
    killed_while_it_ran,
    nothing_landed,
    with_another_hotel,
)
from tests.world import SEQUENCE, CardDeclined, Script, World, nothing, scene


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


def killed_at_any_event(made: Callable[[], tuple[World, Pipeline]]) -> Iterator[tuple[int, World, Pipeline, Dying]]:
    """The saga "s", killed at one event later each time until it comes to its end; its ledger is there again, and nobody holds it."""
    for kill in range(2, 40):
        world, trip = made()
        ledger = Dying(kill)
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ContinueWithFallback(), ledger=ledger).run(trip, saga_id="s"))
        is_done, ledger.left = ledger.left >= 0, 10_000
        ledger.forget_owners()
        yield kill, world, trip, ledger
        if is_done:
            return


def test_killed_at_any_event_a_fallback_that_runs_a_saga_is_called_again_and_one_saga_of_it_stands() -> None:
    """It failed, as its saga had the id of one that was there: the saga was undone, or stuck."""
    for kill, world, trip, ledger in killed_at_any_event(with_another_hotel):
        report = run(SagaCoordinator(ContinueWithFallback(), ledger=ledger).resume("s", trip))

        assert (report.status, report.fallbacks) == (SagaStatus.DEGRADED, ("hotel",)), kill
        assert world.standing == {"inn": 1, "taxi": 1}, kill
    assert kill > 10


@pytest.mark.parametrize("probe", [None, nothing_landed])
def test_killed_at_any_event_what_the_sagas_of_a_fallback_have_done_is_undone_when_the_saga_then_goes_back(probe: Any) -> None:
    """Promise 5: a fallback that was cut off had left no word, and its saga stood in one that was compensated."""
    for kill, world, trip, ledger in killed_at_any_event(partial(with_another_hotel, leaves=False, probe=probe)):
        report = run(SagaCoordinator(ledger=ledger).compensate("s", trip))

        assert (report.status, world.standing, world.refusals) == (SagaStatus.COMPENSATED, {}, []), kill
    assert kill > 5


def without_fallback(trip: Pipeline) -> Pipeline:
    hotel: Any = trip.stages["hotel"].runner
    mended = compensable(hotel.execute, hotel.compensate, compensate_in_doubt=True)
    return Pipeline(name=trip.name).with_stage("hotel", mended).with_stage("taxi", trip.stages["taxi"].runner, dependencies=("hotel",))


@pytest.mark.parametrize("without", ["fallback", "policy"])
def test_killed_at_any_event_what_the_sagas_of_a_fallback_have_done_is_undone_by_who_would_not_call_it_again(without: str) -> None:
    """Promise 5: with another policy, or without a fallback in its stage any more, a saga of one stood in a saga that was compensated."""
    stood = 0
    for kill, world, trip, ledger in killed_at_any_event(partial(with_another_hotel, leaves=False)):
        stood += "inn" in world.standing

        if without == "fallback":
            report = run(SagaCoordinator(ledger=ledger).resume("s", without_fallback(trip)))
        else:
            report = run(SagaCoordinator(ledger=ledger).resume("s", trip, policy=FailFast()))

        assert (report.status is SagaStatus.COMPENSATED) is (world.standing == {}), kill
    assert stood > 5


def test_killed_at_any_event_what_the_sagas_of_a_fallback_have_done_is_undone_that_was_called_only_when_the_saga_was_resumed() -> None:
    stood = 0
    for kill in range(40):
        world, trip = with_another_hotel(leaves=False)
        ledger = Dying(2)
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ledger=ledger).run(trip, saga_id="s"))
        ledger.left = kill
        ledger.forget_owners()
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ledger=ledger).resume("s", trip, policy=ContinueWithFallback()))
        is_done, ledger.left = ledger.left >= 0, 10_000
        ledger.forget_owners()
        stood += "inn" in world.standing

        report = run(SagaCoordinator(ledger=ledger).resume("s", trip, policy=FailFast()))

        assert (report.status is SagaStatus.COMPENSATED) is (world.standing == {}), kill
        if is_done:
            break
    assert stood > 5


def test_killed_at_any_event_what_the_sagas_of_a_fallback_have_done_is_undone_when_the_policy_has_another_one_now() -> None:
    """What the policy says stood in, and nothing told of the inn that was booked beside it."""
    stood = 0
    for kill, world, trip, ledger in killed_at_any_event(partial(with_another_hotel, leaves=False)):
        stood += "inn" in world.standing
        policy = ContinueWithFallback(fallbacks={"hotel": {"booked": None}})

        report = run(SagaCoordinator(ledger=ledger).resume("s", without_fallback(trip), policy=policy))

        is_by_policy = report.stages["hotel"].output == StageOutput.ok(booked=None)
        assert (report.status, report.fallbacks) == (SagaStatus.DEGRADED, ("hotel",)), kill
        assert world.standing == ({"taxi": 1} if is_by_policy else {"inn": 1, "taxi": 1}), kill
    assert stood > 5


@pytest.mark.parametrize("ran_before", [0, 1])
def test_killed_at_any_event_a_stage_in_doubt_is_not_found_to_have_landed_beside_the_sagas_of_its_fallback(ran_before: int) -> None:
    """Promise 11: its probe could not answer, and did when the saga went on: both hotels were booked in one that was completed."""
    stood = 0
    # Killed before it has timed out, it is another story.
    for kill in range(2 + 3 * ran_before, 40):
        shape: dict[str, tuple[str, ...]] = {"room": (), "meal": (), "inn": ()}
        world, flat = scene(shape, {"room": Script("hang", lands=True)}, dict.fromkeys(shape, "probed"))
        meal = Pipeline(name="meal").with_stage("meal", flat.stages["meal"].runner)
        other = Pipeline(name="other").with_stage("inn", flat.stages["inn"].runner)
        room: Any = flat.stages["room"].runner
        silent = iter([OSError("it does not answer")])

        async def book(ctx: SagaContext, room: Any = room, meal: Pipeline = meal) -> StageOutput:
            for _ in range(ran_before):
                await ctx.run_saga(meal)
            output: StageOutput = await room.execute(ctx)
            return output

        async def probe(ctx: CompensationContext, room: Any = room, silent: Any = silent) -> StageOutput | None:
            for error in silent:
                raise error
            landed: StageOutput | None = await room.probe(ctx)
            return landed

        async def release(ctx: CompensationContext, room: Any = room, meal: Pipeline = meal, other: Pipeline = other) -> None:
            for child in await ctx.child_sagas():
                await ctx.undo_saga(child.saga_id, meal if child.pipeline == "meal" else other)
            await room.compensate(ctx)

        async def book_other(ctx: SagaContext, _: Any, other: Pipeline = other) -> None:
            await ctx.run_saga(other)

        hotel = compensable(book, release, probe=probe, fallback=book_other, timeout=5)
        trip = Pipeline(name="trip").with_stage("room", hotel)
        policy = ContinueWithFallback(compensation=IMPATIENT.compensation)
        ledger = Dying(kill)
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(policy, ledger=ledger).run(trip, saga_id="s"))
        is_done, ledger.left = ledger.left >= 0, 10_000
        ledger.forget_owners()
        stood += "inn" in world.standing

        report = run(SagaCoordinator(ledger=ledger).resume("s", trip))

        expected = {SagaStatus.COMPLETED: {"room": 1} | ({"meal": 1} if ran_before else {}), SagaStatus.DEGRADED: {"inn": 1}}
        assert world.standing == expected[report.status], kill
        if is_done:
            break
    assert stood > 4


@pytest.mark.parametrize("instead", [{"fallbacks": {"send": {}}}, {"without_fallback": "skip_branch"}], ids=["fallbacks", "skip_branch"])
def test_killed_at_any_event_a_fallback_that_is_known_to_have_failed_is_not_called_again(instead: dict[str, Any]) -> None:
    """Promise 11: it told the customer twice, and might have stood in the second time."""
    was_known = 0
    for kill in range(2, 40):
        told: list[str] = []

        async def tell(ctx: SagaContext, _: Any, told: list[str] = told) -> None:
            told.append(ctx.saga_id)
            raise CardDeclined

        mail = Pipeline(name="mail").with_stage("send", compensable(fail, nothing, fallback=tell))
        ledger = Dying(kill)
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ContinueWithFallback(**instead), ledger=ledger).run(mail, saga_id="s"))
        is_done, ledger.left = ledger.left >= 0, 10_000
        ledger.forget_owners()
        is_known = any(isinstance(event, FallbackFailed) for event in run(ledger.read("s")))
        was_known += is_known

        run(SagaCoordinator(ledger=ledger).resume("s", mail))

        assert len(told) <= (1 if is_known else 2), kill
        if is_done:
            break
    assert was_known > 1


def test_a_fallback_that_failed_is_called_again_when_its_halted_saga_is_resumed() -> None:
    told: list[str] = []

    async def tell(ctx: SagaContext, _: Any) -> None:
        told.append(ctx.saga_id)
        if len(told) == 1:
            raise CardDeclined

    async def probe(_: CompensationContext) -> None:
        raise OSError("it does not answer")

    async def hang(_: SagaContext) -> None:
        await elapse(60)

    send = compensable(hang, nothing, probe=probe, fallback=tell, timeout=5)
    mail = Pipeline(name="mail").with_stage("send", send)
    coordinator = SagaCoordinator(ContinueWithFallback(on_failure="halt", compensation=IMPATIENT.compensation))
    halted = run(coordinator.run(mail, saga_id="s"))
    assert (halted.status, {*halted.in_doubt}) == (SagaStatus.HALTED, {"send"})

    report = run(coordinator.resume("s", mail))

    assert len(told) == 2, str(report)


def test_of_a_stage_that_died_when_it_had_run_a_saga_it_is_not_said_that_its_fallback_did() -> None:
    world, trip = with_another_hotel(leaves=True)
    ledger = Dying(3)
    with contextlib.suppress(LedgerError):
        run(SagaCoordinator(ContinueWithFallback(), ledger=ledger).run(trip, saga_id="s"))
    assert world.standing == {"room": 1}
    ledger.left = 10_000
    ledger.forget_owners()

    report = run(SagaCoordinator(ledger=ledger).compensate("s", trip))

    assert (report.status, world.standing) == (SagaStatus.COMPENSATED, {})
    assert [failure.message for failure in report.failures] == ["its process is gone; what became of it is not in the ledger"]


@pytest.mark.parametrize("probe", [None, nothing_landed])
@pytest.mark.parametrize("leaves", [True, False])
def test_killed_at_any_event_the_undoing_of_what_the_sagas_of_a_fallback_have_done_goes_on(leaves: bool, probe: Any) -> None:
    """Promise 11."""
    for kill in range(1, 40):
        world, trip = with_another_hotel(leaves=leaves, probe=probe)
        ledger = Dying(1000)
        run(SagaCoordinator(ContinueWithFallback(), ledger=ledger).run(trip, saga_id="s"))
        ledger.left = kill
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ledger=ledger).compensate("s", trip))
        is_done, ledger.left = ledger.left >= 0, 10_000
        ledger.forget_owners()

        run(SagaCoordinator(ledger=ledger).recover(trip))
        recovered = run(SagaCoordinator(ledger=ledger).report("s"))
        report = run(SagaCoordinator(ledger=ledger).compensate("s", trip))

        # Either nobody has heard that it was to be undone, or it is.
        assert (recovered.status, recovered.fallbacks) in {(SagaStatus.DEGRADED, ("hotel",)), (SagaStatus.COMPENSATED, ())}, kill
        assert (report.status, world.standing, world.refusals) == (SagaStatus.COMPENSATED, {}, []), kill
        if is_done:
            break
    assert kill > 5


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
