"""A stage that ran a saga is undone when nothing of that stands, whatever its compensation says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    MisuseError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.report import NestedSagaFailed
from tests.controlled import elapse, run
from tests.test_ill_behaved import compute_for_a_second
from tests.within import half_undone
from tests.world import CardDeclined, Probed, Script, nothing, scene

ONCE = Compensation(retry=Retry(attempts=1))
IMPATIENT = FailFast(compensation=ONCE)
HALTING = FailFast(on_failure="halt")


async def fine(_: Any) -> None: ...


async def declined(_: Any) -> None:
    raise CardDeclined


def test_what_ran_a_saga_and_could_not_be_undone_finds_that_saga_again_though_its_ground_was_undone() -> None:
    """Under another key the saga would be nobody's, and its effect would stand twice."""
    room_world, room = scene({"room": ()})
    _, trip = scene({"before": ()}, {"before": Script(order_matters=False)})

    async def book(ctx: SagaContext) -> None:
        if not await ctx.child_sagas():
            await ctx.run_saga(room)
            raise CardDeclined

    trip = trip.with_stage("book", compensable(book, declined), dependencies=("before",))
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1), on_failure="continue")))
    stuck = run(coordinator.run(trip, saga_id="s"))
    assert (stuck.stages["before"].state, stuck.stages["book"].state) == (StageState.UNDONE, StageState.STUCK)

    report = run(coordinator.resume("s", trip, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert (report.stages["before"].executions, report.stages["book"].executions) == (2, 1)
    assert room_world.standing == {"room": 1}


def test_what_is_half_undone_and_fails_when_it_runs_again_is_not_whole_and_runs_once_more() -> None:
    world, coordinator, trip = half_undone(idempotent=True)
    unready = Pipeline(name="trip").with_stage("book", compensable(declined, nothing, idempotent=True))
    halted = run(coordinator.resume("s", unready, policy=HALTING, forward=True))
    assert (halted.status, world.standing) == (SagaStatus.HALTED, {"room": 1})

    report = run(coordinator.resume("s", trip))

    assert report.status is SagaStatus.COMPLETED
    assert world.standing == {"room": 1, "breakfast": 1}


def test_what_was_half_undone_and_has_been_made_whole_does_not_run_again() -> None:
    _, coordinator, trip = half_undone(idempotent=True)
    whole = run(coordinator.resume("s", trip, forward=True))
    before = run(coordinator.ledger.read("s"))

    report = run(coordinator.resume("s", trip, forward=True))

    assert whole.status is SagaStatus.COMPLETED
    assert report == whole
    assert run(coordinator.ledger.read("s")) == before


@pytest.mark.parametrize(("goes_on", "log"), [("compensate", ["+room", "-room"]), ("resume", ["+room", "-room", "+room"])])
def test_a_saga_that_runs_on_from_before_its_own_was_gone_on_with_is_waited_for(goes_on: str, log: list[str]) -> None:
    """It was refused as one that is running here: the stage was stuck at once, or failed."""
    world, room = scene({"room": ()}, {"room": Script(before=20)})
    still_runs: list[SagaStatus] = []

    async def book(ctx: SagaContext) -> None:
        begun = await ctx.child_sagas()
        still_runs.extend(child.status for child in begun)
        report = await (ctx.resume_saga(begun[0].saga_id, room) if begun else ctx.run_saga(room))
        report.raise_for_status()

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            still_runs.append(child.status)
            await ctx.undo_saga(child.saga_id, room)

    trip = Pipeline(name="trip").with_stage("book", compensable(book, release, idempotent=True, compensate_in_doubt=True))
    coordinator = SagaCoordinator(FailFast(on_failure="halt", deadline=1, in_flight="cancel"))

    async def play() -> SagaReport:
        halted = await coordinator.run(trip, saga_id="s")
        assert halted.status is SagaStatus.HALTED
        if goes_on == "compensate":
            return await coordinator.compensate("s", trip)
        return await coordinator.resume("s", trip, policy=FailFast())

    report = run(play())

    assert still_runs == [SagaStatus.RUNNING]
    assert report.status is (SagaStatus.COMPENSATED if goes_on == "compensate" else SagaStatus.COMPLETED)
    assert world.log == log


def test_a_saga_that_a_completed_stage_left_running_is_stopped_before_it_is_undone() -> None:
    """It ran on to its end, be it beyond a point of no return, while its own saga waited to undo it."""
    world, room = scene({"room": (), "pay": ("room",)}, {"room": Script(before=20)}, {"pay": "pivot"})
    left: list[asyncio.Task[SagaReport]] = []

    async def book(ctx: SagaContext) -> None:
        left.append(asyncio.create_task(ctx.run_saga(room)))
        await asyncio.sleep(1)

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, room)

    trip, coordinator = Pipeline(name="trip").with_stage("book", compensable(book, release)), SagaCoordinator()

    async def play() -> tuple[SagaReport, SagaReport]:
        completed = await coordinator.run(trip, saga_id="s")
        return completed, await coordinator.compensate("s", trip)

    completed, report = run(play())

    assert completed.status is SagaStatus.COMPLETED
    assert left[0].done()
    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+room", "-room"]


def test_a_saga_that_a_compensation_takes_for_its_own_child_is_refused_and_not_waited_for() -> None:
    refused: list[str] = []

    async def release(ctx: CompensationContext) -> None:
        with pytest.raises(MisuseError) as caught:
            await ctx.undo_saga(ctx.saga_id, trip)
        refused.append(str(caught.value))

    trip = Pipeline(name="trip").with_stage("book", compensable(fine, release))
    trip = trip.with_stage("pay", declined, "work", dependencies=("book",))

    run(SagaCoordinator().run(trip, saga_id="s"))

    assert len(refused) == 1
    assert "expected a saga that saga s runs, got s, which no saga runs" in refused[0]


def test_a_compensation_that_returns_before_the_saga_that_it_undoes_is_undone_is_waited_for() -> None:
    """Promise 1: what that one stood on would be undone beside it."""
    world, whole = scene({"before": (), "room": ("before",)}, {"room": Script(undo_takes=5)})
    stages = {name: spec.runner for name, spec in whole.stages.items()}
    room = Pipeline(name="room").with_stage("room", stages["room"])
    left_running: list[asyncio.Task[SagaReport]] = []

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room)

    async def release(ctx: CompensationContext) -> None:
        left_running.extend([asyncio.create_task(ctx.undo_saga(child.saga_id, room)) for child in await ctx.child_sagas()])
        await asyncio.sleep(0)  # it has begun

    trip = Pipeline(name="trip").with_stage("before", stages["before"])
    trip = trip.with_stage("book", compensable(book, release), dependencies=("before",))
    trip = trip.with_stage("fail", declined, "work", dependencies=("book",))

    report = run(SagaCoordinator(IMPATIENT).run(trip))

    assert len(left_running) == 1
    assert report.status is SagaStatus.COMPENSATED, str(report)
    assert world.log == ["+before", "+room", "-room", "-before"]
    assert world.refusals == []


def test_a_compensation_that_asks_nothing_of_a_saga_beyond_its_pivot_and_says_so_is_believed() -> None:
    world, before = scene({"before": ()})
    _, sale = scene({"sale": ()}, kinds={"sale": "pivot"})

    async def sell(ctx: SagaContext) -> None:
        await ctx.run_saga(sale)

    async def give_back(ctx: CompensationContext) -> None:
        raise NestedSagaFailed((await ctx.child_sagas())[0])

    trip = before.with_stage("sell", compensable(sell, give_back), dependencies=("before",))
    trip = trip.with_stage("fail", declined, "work", dependencies=("sell",))

    report = run(SagaCoordinator(IMPATIENT).run(trip))

    assert report.status is SagaStatus.HALTED
    assert [*report.kept] == ["before", "sell"]
    assert world.standing == {"before": 1}


def test_behind_a_fallback_what_is_beyond_the_pivot_of_its_saga_and_in_doubt_is_still_for_a_person_to_settle() -> None:
    """Halted, the saga would ask nobody what the attempt before has left."""
    _, sale = scene({"sell": (), "mail": ("sell",)}, {"mail": Script("raise")}, {"sell": "pivot"})

    class Sell(CompensableStage):
        idempotent = True
        holds_pivot = True

        async def execute(self, ctx: SagaContext) -> None:
            if ctx.attempt == 1:
                await asyncio.Event().wait()
            raise NestedSagaFailed(await ctx.run_saga(sale))

        async def compensate(self, ctx: CompensationContext) -> None: ...

    policy = ContinueWithFallback(fallbacks={"sell": {}}, timeout=1, retry=Retry(attempts=2, wait=0), compensation=ONCE)
    trip = Pipeline().with_stage("sell", Sell).with_stage("fail", declined, "work", dependencies=("sell",))

    report = run(SagaCoordinator(policy).run(trip))

    assert (report.stages["sell"].attempts, report.past_pivot, report.fallbacks) == (2, True, ("sell",))
    assert report.stages["sell"].state is StageState.IN_DOUBT
    assert report.status is SagaStatus.STUCK


Undo = Callable[[CompensationContext], Awaitable[Any]]


def gives_no_reason(_: Pipeline) -> Undo:
    async def undo(_: CompensationContext) -> StageOutput:
        return StageOutput.cancel()

    return undo


def asks_for_nothing(_: Pipeline) -> Undo:
    return fine


def heeds_no_answer(room: Pipeline) -> Undo:
    async def undo(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, room)

    return undo


@pytest.mark.parametrize(
    ("undo", "kind", "message"),
    [
        (gives_no_reason, "cancel", "it returned CANCEL: no reason given"),
        (asks_for_nothing, "", "it returned, and something stands of a saga that the stage ran and that it has not asked to be undone"),
        (
            heeds_no_answer,
            "saga.report.NestedSagaFailed",
            "its saga s/book is stuck: stage 'room' could not be compensated: CardDeclined: undoing room was declined",
        ),
    ],
)
def test_a_compensation_that_returns_though_something_stands_has_failed_and_is_told_of_in_full(
    undo: Callable[[Pipeline], Undo], kind: str, message: str
) -> None:
    _, room = scene({"room": ()}, {"room": Script(undo_fails=9)})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room, policy=IMPATIENT)

    trip = Pipeline().with_stage("book", compensable(book, undo(room))).with_stage("fail", declined, "work", dependencies=("book",))

    undone = run(SagaCoordinator(IMPATIENT).run(trip, saga_id="s")).stages["book"].compensation

    assert undone is not None
    failure = undone.failure
    assert failure is not None
    assert (failure.stage, failure.kind, failure.type, failure.attempt) == ("book", FailureKind.COMPENSATION, kind, 1)
    assert failure.message == message


def test_what_a_compensation_raised_when_its_time_was_up_is_in_the_traceback_of_its_failure() -> None:
    async def undo(_: CompensationContext) -> None:
        try:
            await elapse(10)
        except asyncio.CancelledError:
            raise CardDeclined("closed") from None

    pipeline = Pipeline().with_stage("a", compensable(fine, undo)).with_stage("b", declined, "work", dependencies=("a",))
    policy = FailFast(compensation=Compensation(timeout=3, retry=Retry(attempts=1)))

    undone = run(SagaCoordinator(policy).run(pipeline)).stages["a"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "no answer within 3 s; then it raised CardDeclined: closed"
    assert undone.failure.traceback is not None
    assert 'raise CardDeclined("closed") from None' in undone.failure.traceback


def raises_of_the_pivot(_: Pipeline) -> Undo:
    async def undo(ctx: CompensationContext) -> None:
        raise NestedSagaFailed((await ctx.child_sagas())[0])

    return undo


@pytest.mark.parametrize(
    ("undo", "kind", "state"),
    [(heeds_no_answer, "compensable", StageState.STUCK), (raises_of_the_pivot, "pivot", StageState.KEPT)],
    ids=["undone in part", "beyond its pivot"],
)
def test_a_stage_is_not_asked_whether_it_is_undone_when_its_own_sagas_have_told_that_it_is_not(
    undo: Callable[[Pipeline], Undo], kind: str, state: StageState
) -> None:
    asked: list[str] = []
    _, room = scene({"room": ()}, {"room": Script(undo_fails=9)}, {"room": kind})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room, policy=IMPATIENT)

    async def probe(ctx: CompensationContext) -> None:
        asked.append(ctx.stage_name)

    trip = Pipeline().with_stage("book", compensable(book, undo(room), probe=probe))
    trip = trip.with_stage("fail", declined, "work", dependencies=("book",))

    report = run(SagaCoordinator(IMPATIENT).run(trip))

    assert report.stages["book"].state is state
    assert asked == []


@pytest.mark.parametrize("takes", [10, 1], ids=["fails after it", "waits for its next attempt then"])
@pytest.mark.parametrize("went_through", [True, False])
def test_a_compensation_for_which_the_backward_deadline_leaves_no_other_attempt_is_asked_for(went_through: bool, takes: int) -> None:
    """To ask starts no compensation, and whoever went forward from there would take for kept what is undone."""
    asked: list[float] = []

    class Asked(Probed):
        async def compensate(self, ctx: CompensationContext) -> None:
            await elapse(takes)
            if went_through:
                self.world.undo("a")
            raise TimeoutError("the answer was lost")

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            asked.append(asyncio.get_running_loop().time())
            return await super().probe(ctx)

    world, tail = scene({"a": (), "b": ("a",)}, {"b": Script("raise")})
    pipeline = Pipeline(name="scene").with_stage("a", Asked(world, "a", Script()))
    pipeline = pipeline.with_stage("b", tail.stages["b"].runner, dependencies=("a",))

    settings = Compensation(deadline=5, retry=Retry(attempts=2, wait=9, jitter=False))

    report = run(SagaCoordinator(FailFast(compensation=settings)).run(pipeline))

    assert report.stages["a"].state is (StageState.UNDONE if went_through else StageState.STUCK)
    assert world.standing == ({} if went_through else {"a": 1})
    assert asked == [10]
    assert report.stages["a"].compensation is not None
    assert report.stages["a"].compensation.attempts == 1


def test_no_compensation_starts_at_the_very_moment_of_the_deadline_though_none_ever_awaits() -> None:
    undone: list[str] = []

    async def computes(ctx: CompensationContext) -> None:
        compute_for_a_second(ctx, undone)

    pipeline = Pipeline().with_stage("s0", compensable(fine, computes))
    for number in range(1, 5):
        pipeline = pipeline.with_stage(f"s{number}", compensable(fine, computes), dependencies=(f"s{number - 1}",))
    pipeline = pipeline.with_stage("fail", declined, "work", dependencies=("s4",))

    report = run(SagaCoordinator(FailFast(compensation=Compensation(deadline=2.0))).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert undone == ["s4", "s3"]
