"""Which way a saga goes when its stages have ended, and how it ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationStarted,
    EffectRecorded,
    SagaEnded,
    SagaStarted,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageSettled,
    StageSkipped,
    StageStarted,
    TurnReason,
    Verdict,
)
from saga.graph import Graph, Node, Role
from saga.recovery import Move, conclude, stage_states
from saga.recovery.scope import undo_scope
from saga.recovery.state import SagaState
from tests.controlled import run
from tests.test_ledger import BACK, OUTPUT, PATHS, STARTED
from tests.test_state import CHAIN
from tests.world import SEQUENCE, CardDeclined, Script, scene

ONCE = Compensation(retry=Retry(attempts=1))
SKIP_BRANCH = ContinueWithFallback(without_fallback="skip_branch", compensation=ONCE)


class Items(CompensableStage):
    """Records an effect, then fails; it undoes what it recorded unless told to fail at that, too."""

    undo_fails = False

    def __init__(self) -> None:
        self.undone: list[Any] = []

    async def execute(self, ctx: SagaContext) -> Any:
        await ctx.record("1A")
        raise CardDeclined

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.undo_fails:
            raise CardDeclined
        self.undone.extend(ctx.effects)


class StuckItems(Items):
    undo_fails = True


class SkippedStuckItems(StuckItems):
    async def execute(self, ctx: SagaContext) -> StageOutput:
        await ctx.record("1A")
        return StageOutput.skip("sold out")


def test_a_stage_that_falls_with_its_branch_is_undone_for_what_it_recorded_and_the_saga_is_degraded() -> None:
    world, pipeline = scene({"hotel": (), "other": ()})
    items = Items()

    report = run(SagaCoordinator(SKIP_BRANCH).run(pipeline.with_stage("items", items, dependencies=("hotel",))))

    assert items.undone == ["1A"]
    assert report.stages["items"].state is StageState.UNDONE
    assert world.log == ["+hotel", "+other", "-hotel"]
    assert report.status is SagaStatus.DEGRADED


@pytest.mark.parametrize("stage", [StuckItems, SkippedStuckItems])
def test_a_saga_that_goes_on_without_a_stage_whose_recorded_effects_are_stuck_is_stuck(stage: type[Items]) -> None:
    _, pipeline = scene({"other": ()})

    report = run(SagaCoordinator(SKIP_BRANCH).run(pipeline.with_stage("items", stage)))

    assert report.stages["items"].state is StageState.STUCK
    assert report.stages["other"].state is StageState.KEPT
    assert report.status is SagaStatus.STUCK


def test_what_served_only_a_stage_whose_recorded_effects_are_stuck_is_blocked() -> None:
    world, pipeline = scene({"hotel": (), "other": ()})

    report = run(SagaCoordinator(SKIP_BRANCH).run(pipeline.with_stage("items", StuckItems, dependencies=("hotel",))))

    assert report.stages["hotel"].state is StageState.BLOCKED
    assert set(world.standing) == {"hotel", "other"}


def test_what_served_only_a_stage_that_is_undone_by_now_makes_the_saga_stuck_when_it_is_stuck_itself() -> None:
    _, pipeline = scene({"hotel": (), "other": ()}, {"hotel": Script(undo_fails=9)})

    report = run(SagaCoordinator(SKIP_BRANCH).run(pipeline.with_stage("items", Items, dependencies=("hotel",))))

    assert (report.stages["hotel"].state, report.stages["items"].state) == (StageState.STUCK, StageState.UNDONE)
    assert report.status is SagaStatus.STUCK


def test_orphans_under_a_stuck_one_are_blocked_and_the_saga_is_stuck() -> None:
    shape = {"root": (), "middle": ("root",), "leaf": ("middle",), "other": ()}
    world, pipeline = scene(shape, {"leaf": Script("raise"), "middle": Script(undo_fails=9)})

    report = run(SagaCoordinator(SKIP_BRANCH).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert (report.stages["middle"].state, report.stages["root"].state) == (StageState.STUCK, StageState.BLOCKED)
    assert report.stages["other"].state is StageState.KEPT
    assert world.refusals == []


def test_a_saga_that_leaves_a_stage_in_doubt_beside_its_other_branches_is_stuck_without_turning_back() -> None:
    world, pipeline = scene({"slow": (), "other": ()}, {"slow": Script("hang")})
    coordinator = SagaCoordinator(SKIP_BRANCH.model_copy(update={"timeout": 1.0}))

    report = run(coordinator.run(pipeline, saga_id="s"))

    assert report.status is SagaStatus.STUCK
    assert report.stages["slow"].state is StageState.IN_DOUBT
    assert world.standing == {"other": 1}
    assert not any(isinstance(event, SagaTurnedBack) for event in run(coordinator.ledger.read("s")))


def test_a_saga_in_which_a_branch_fell_and_nothing_has_to_be_undone_does_not_turn_back() -> None:
    _, pipeline = scene({"leaf": (), "other": ()}, {"leaf": Script("raise")})
    coordinator = SagaCoordinator(SKIP_BRANCH)

    report = run(coordinator.run(pipeline, saga_id="s"))

    assert report.status is SagaStatus.DEGRADED
    assert not any(isinstance(event, SagaTurnedBack) for event in run(coordinator.ledger.read("s")))
    state = SagaState([replace(STARTED, policy=SKIP_BRANCH), *PATHS[StageState.FAILED]])
    assert conclude(state, None) == Move()


def test_a_saga_in_which_nothing_but_a_plain_stage_came_to_anything_is_compensated() -> None:
    world, pipeline = scene({"quote": (), "hotel": ("quote",)}, {"hotel": Script("raise")}, {"quote": "plain"})

    report = run(SagaCoordinator(SKIP_BRANCH).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize(
    ("shape", "status"),
    [
        ({"slow": (), "other": ()}, SagaStatus.COMPLETED),
        ({"slow": (), "after": ("slow",), "other": ()}, SagaStatus.DEGRADED),
    ],
    ids=["nothing fell", "a branch fell"],
)
def test_a_saga_is_degraded_after_a_person_kept_a_stage_if_a_branch_fell_with_it(
    shape: dict[str, tuple[str, ...]], status: SagaStatus
) -> None:
    _, pipeline = scene(shape, {"slow": Script("hang")})
    coordinator = SagaCoordinator(SKIP_BRANCH.model_copy(update={"timeout": 1.0}))

    async def settled() -> SagaReport:
        await coordinator.run(pipeline, saga_id="s")
        return await coordinator.settle("s", "slow", "kept", "it is in their books")

    report = run(settled())

    assert [*report.kept] == ["slow", "other"]
    assert report.status is status


def test_a_cancel_that_turns_the_saga_back_is_its_cause() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script("cancel")})

    report = run(SagaCoordinator(FailFast(on_cancel="compensate")).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind) == ("b", FailureKind.CANCELLED)


def test_a_cancel_that_keeps_what_was_done_is_the_cause_of_the_end() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script("cancel")})

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.CANCELLED
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind) == ("b", FailureKind.CANCELLED)


def test_a_deadline_is_no_interruption_by_the_caller() -> None:
    world, pipeline = scene({"a": (), "b": ("a",)}, {"b": Script(before=9)}, {"b": "probed"})

    report = run(SagaCoordinator(FailFast(deadline=5, on_interrupt="halt")).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_stage_that_was_interrupted_is_no_interruption_by_the_caller() -> None:
    interrupted = Failure.of("b", FailureKind.INTERRUPTED, "its task was cancelled")
    started = replace(STARTED, policy=FailFast(on_interrupt="halt"))
    state = SagaState([started, *PATHS[StageState.KEPT], StageStarted(stage="b", attempt=1), StageFailed(stage="b", failure=interrupted)])

    assert conclude(state, interrupted) == Move(turn=TurnReason.FAILURE, cause=interrupted)


@pytest.mark.parametrize(
    ("kind", "policy", "turn"),
    [
        (FailureKind.INTERRUPTED, FailFast(on_interrupt="halt"), None),
        (FailureKind.INTERRUPTED, FailFast(), TurnReason.INTERRUPT),
        (FailureKind.TIMEOUT, FailFast(on_failure="halt"), None),
        (FailureKind.TIMEOUT, FailFast(), TurnReason.FAILURE),
    ],
)
def test_what_stopped_a_saga_is_the_cause_of_what_follows(kind: FailureKind, policy: FailFast, turn: TurnReason | None) -> None:
    stop = Failure.of(None, kind, "enough")

    move = conclude(SagaState([replace(STARTED, policy=policy), *PATHS[StageState.KEPT]]), stop)

    assert move == Move(turn=turn, cause=stop, status=SagaStatus.HALTED if turn is None else None)


def test_a_caller_that_is_cancelled_is_the_cause_of_a_halt() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script(before=5)}, {"b": "probed"})
    coordinator = SagaCoordinator(FailFast(on_interrupt="halt"))

    async def cancelled() -> SagaReport:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(coordinator.run(pipeline, saga_id="s"), timeout=1)
        return await coordinator.report("s")

    report = run(cancelled())

    assert report.status is SagaStatus.HALTED
    assert report.cause is not None
    assert report.cause.message == "the caller was cancelled"
    assert report.cause in report.failures


def test_every_stage_in_doubt_lets_what_it_depends_on_go_when_the_policy_continues() -> None:
    shape = {"a1": (), "a2": (), "b1": ("a1",), "b2": ("a2",)}
    silent = Script(order_matters=False)
    world, pipeline = scene(shape, {"a1": silent, "a2": silent, "b1": Script("hang"), "b2": Script("hang")})
    policy = FailFast(timeout=1, compensation=Compensation(on_failure="continue"))

    report = run(SagaCoordinator(policy).run(pipeline))

    assert world.standing == {}
    assert set(report.undone) == {"a1", "a2"}
    assert set(report.in_doubt) == {"b1", "b2"}


def test_a_stage_that_cancels_after_it_recorded_an_effect_is_undone_for_it_when_the_policy_compensates() -> None:
    class CancelledItems(Items):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await ctx.record("1A")
            return StageOutput.cancel("sold out")

    items = CancelledItems()

    report = run(SagaCoordinator(FailFast(on_cancel="compensate")).run(Pipeline().with_stage("items", items)))

    assert items.undone == ["1A"]
    assert report.status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("works", [True, False])
def test_a_stage_in_doubt_falls_back_and_stays_in_doubt(works: bool) -> None:
    class Slow(Items):
        timeout = 1.0

        async def execute(self, ctx: SagaContext) -> None:
            await asyncio.Event().wait()

        async def fallback(self, ctx: SagaContext, failure: Failure) -> dict[str, int]:
            if not works:
                raise CardDeclined("no fallback either")
            return {"amount": 0}

    report = run(SagaCoordinator(ContinueWithFallback()).run(Pipeline().with_stage("slow", Slow)))

    assert report.status is SagaStatus.STUCK
    assert report.stages["slow"].state is StageState.IN_DOUBT
    assert report.fallbacks == (("slow",) if works else ())
    assert [failure.message for failure in report.failures] == ["no answer within 1 s", *([] if works else ["no fallback either"])]


def test_what_is_left_of_a_stage_behind_its_fallback_is_shown_as_it_is_undone() -> None:
    charged = [StageStarted(stage="a", attempt=1), EffectRecorded(stage="a", effect="half"), *PATHS[StageState.FALLBACK][1:], BACK]

    undoing = SagaState([STARTED, *charged, CompensationStarted(stage="a", attempt=1)])
    undone = SagaState([STARTED, *charged, CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a")])

    assert [stage_states(state)["a"] for state in (undoing, undone)] == [StageState.COMPENSATING, StageState.FALLBACK]


def on_each_other(top: Role) -> SagaStarted:
    below = [Node(name="a", role=Role.COMPENSABLE), Node(name="b", role=Role.COMPENSABLE, dependencies=("a",))]
    return replace(STARTED, graph=Graph.of([*below, Node(name="c", role=top, dependencies=("b",))]))


def completed(*stages: str) -> list[AnyEvent]:
    return [event for stage in stages for event in (StageStarted(stage=stage, attempt=1), StageCompleted(stage=stage, output=OUTPUT))]


@pytest.mark.parametrize(
    ("top", "scope"), [(Role.COMPENSABLE, {"a", "b", "c"}), (Role.PIVOT, {"a"})], ids=["which can be undone", "a pivot among it"]
)
def test_all_that_stands_on_what_has_failed_is_undone_with_it_however_many_are_between(top: Role, scope: set[str]) -> None:
    """Promises 1 and 10: it was kept when its saga went forward, and what it stands on failed when that ran anew."""
    state = SagaState([on_each_other(top), *completed("b", "c"), *PATHS[StageState.FAILED]])

    assert undo_scope(state, TurnReason.ORPHANS) == scope


@pytest.mark.parametrize(("reason", "scope"), [(TurnReason.ORPHANS, {"a"}), (TurnReason.REQUEST, set())])
def test_what_a_stage_recorded_before_it_skipped_itself_stays_under_a_pivot_when_all_is_undone_on_demand(
    reason: TurnReason, scope: set[str]
) -> None:
    recorded: list[AnyEvent] = [StageStarted(stage="a", attempt=1), EffectRecorded(stage="a", effect="a seat")]
    skipped = StageSkipped(stage="a", reason="sold out", output=StageOutput.skip("sold out"))

    state = SagaState([on_each_other(Role.PIVOT), *recorded, skipped, *completed("b", "c")])

    assert undo_scope(state, reason) == scope


@pytest.mark.parametrize(("stands_in", "scope"), [([], set()), (PATHS[StageState.FALLBACK][-1:], {"a"})], ids=["by itself", "a fallback"])
def test_a_persons_word_keeps_what_that_stage_stands_on_but_not_what_a_fallback_stands_in_for(
    stands_in: list[AnyEvent], scope: set[str]
) -> None:
    recorded = EffectRecorded(stage="a", effect="a seat")
    failed: list[AnyEvent] = [PATHS[StageState.FAILED][0], recorded, PATHS[StageState.FAILED][1], *stands_in]
    doubted: list[AnyEvent] = [replace(event, stage="b") for event in PATHS[StageState.IN_DOUBT]]  # type: ignore[arg-type] # of a stage
    kept = StageSettled(stage="b", verdict=Verdict.KEPT, note="it is booked", by="ann")

    state = SagaState([CHAIN, *failed, *doubted, SagaEnded(status=SagaStatus.STUCK), kept])

    assert undo_scope(state, TurnReason.ORPHANS) == scope
