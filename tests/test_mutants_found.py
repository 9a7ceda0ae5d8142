"""What changing the code at random showed to be untested: times, places, causes and words of the record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
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
    LedgerCorrupt,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    FallbackFailed,
    SagaEnded,
    SagaResumed,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSettled,
    StageSkipped,
    StageStarted,
    TurnReason,
    Verdict,
)
from saga.graph import Graph, Node, Role
from saga.record import Step, Try, undo_step
from saga.recovery import Move, Rollback, conclude, stage_states
from saga.report import NestedSagaFailed
from saga.resumption import Direction, recovering, refusal, resumption, undoing
from saga.scope import protected
from saga.state import SagaState
from tests.controlled import elapse, run
from tests.slow import SlowLedger
from tests.test_hard_cases import by_cancelling_every_task, deaf
from tests.test_ill_behaved import compute_for_a_second
from tests.test_ledger import BACK, CONTRADICTIONS, HALTED, LATE, PATHS, STARTED, STUCK_WITH_REMAINS
from tests.test_nested import half_undone
from tests.world import SEQUENCE, CardDeclined, Probed, Script, nothing, scene, staged

ONCE = Compensation(retry=Retry(attempts=1))
SKIP_BRANCH = ContinueWithFallback(without_fallback="skip_branch", compensation=ONCE)
OUTPUT = StageOutput.ok(amount=1)
FAILURE = Failure.of("a", FailureKind.REPORTED, "no")
LOST = Failure.of("a", FailureKind.CRASHED, "gone")


def at(second: int) -> datetime:
    return datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=second)


# -- the fold of the events --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_the_saga_the_event_what_it_met_and_what_to_do(case: str) -> None:
    path, event, message = CONTRADICTIONS[case]

    with pytest.raises(LedgerCorrupt) as caught:
        SagaState([STARTED, *path, event])

    met = message.rpartition("can't follow on ")[2]
    assert str(caught.value) == (
        f"saga s: {type(event).__name__} can't follow on {met}; the saga is left as it is. "
        "Compare its ledger with a backup before you go on."
    )


def test_a_stage_keeps_the_place_and_the_time_of_its_first_start_and_of_its_first_compensation() -> None:
    failed = CompensationFailed(stage="a", failure=FAILURE, will_retry=True)
    state = SagaState(
        [
            STARTED,
            StageStarted(stage="a", attempt=1, at=at(1)),
            StageFailed(stage="a", failure=FAILURE, will_retry=True, at=at(2)),
            StageStarted(stage="a", attempt=2, at=at(3)),
            StageCompleted(stage="a", output=OUTPUT, at=at(4)),
            StageStarted(stage="b", attempt=1, at=at(5)),
            StageCompleted(stage="b", output=OUTPUT, at=at(6)),
            BACK,
            CompensationStarted(stage="a", attempt=1, at=at(7)),
            failed,
            CompensationStarted(stage="b", attempt=1, at=at(8)),
            CompensationStarted(stage="a", attempt=2, at=at(9)),
            CompensationCompleted(stage="b", at=at(10)),
            CompensationFailed(stage="a", failure=FAILURE, at=at(11)),
        ]
    )

    a, b = state.stages["a"], state.stages["b"]
    assert (a.attempts, a.order, a.started_at, a.ended_at) == (2, 0, at(1), at(4))
    assert (b.attempts, b.order, b.started_at, b.ended_at) == (1, 1, at(5), at(6))
    assert (a.undo_attempts, a.undo_order, a.undo_started_at, a.undo_ended_at) == (2, 0, at(7), at(11))
    assert (b.undo_attempts, b.undo_order, b.undo_started_at, b.undo_ended_at) == (1, 1, at(8), at(10))


def test_a_stage_that_skips_itself_ended_then_and_one_that_never_started_never_ended() -> None:
    skip = StageSkipped(stage="a", reason="nothing to do", output=OUTPUT, at=at(2))

    itself = SagaState([STARTED, StageStarted(stage="a", attempt=1, at=at(1)), skip]).stages["a"]
    unstarted = SagaState([STARTED, skip]).stages["a"]

    assert (itself.started_at, itself.ended_at) == (at(1), at(2))
    assert itself.tries == (Try(at(1), at(2)),)
    assert (unstarted.started_at, unstarted.ended_at) == (None, None)


def test_a_failed_stage_whose_probe_fails_for_good_is_in_doubt_and_tells_why() -> None:
    probing = Failure.of("a", FailureKind.COMPENSATION, "no line")
    state = SagaState([STARTED, *PATHS[StageState.FAILED], StageProbed(stage="a", landed=None, failure=probing)])

    record = state.stages["a"]
    assert record.state is StageState.IN_DOUBT
    assert record.undo_failure == probing
    assert state.failures == [FAILURE_OF_THE_PATH, probing]


(FAILURE_OF_THE_PATH,) = (event.failure for event in PATHS[StageState.FAILED] if isinstance(event, StageFailed))


def test_what_stopped_a_saga_that_did_not_turn_back_is_among_its_failures_once() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    state = SagaState([STARTED, *PATHS[StageState.FAILED], SagaEnded(status=SagaStatus.HALTED, cause=late)])
    known = SagaState([STARTED, *PATHS[StageState.FAILED], SagaEnded(status=SagaStatus.HALTED, cause=FAILURE_OF_THE_PATH)])

    assert (state.cause, state.failures) == (late, [FAILURE_OF_THE_PATH, late])
    assert known.failures == [FAILURE_OF_THE_PATH]


def test_what_stopped_a_saga_beside_its_stages_is_its_cause_and_among_its_failures() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    state = SagaState([STARTED, *PATHS[StageState.KEPT], SagaStopped(cause=late)])

    assert (state.stop, state.cause, state.failures) == (late, late, [late])


def test_what_turned_a_saga_back_is_its_cause_and_among_its_failures_once() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    state = SagaState([STARTED, *PATHS[StageState.KEPT], SagaTurnedBack(reason=TurnReason.FAILURE, cause=late)])
    known = SagaState([STARTED, *PATHS[StageState.FAILED], SagaTurnedBack(reason=TurnReason.FAILURE, cause=FAILURE_OF_THE_PATH)])

    assert (state.cause, state.failures) == (late, [late])
    assert known.failures == [FAILURE_OF_THE_PATH]


def test_a_saga_is_spotless_until_a_stage_fails_or_skips_what_it_has_begun() -> None:
    assert SagaState([STARTED, *PATHS[StageState.KEPT]]).is_spotless is True
    assert SagaState([STARTED, *PATHS[StageState.SKIPPED]]).is_spotless is True
    recorded: list[AnyEvent] = [PATHS[StageState.RUNNING][0], EffectRecorded(stage="a", effect=1), *PATHS[StageState.SKIPPED]]
    assert SagaState([STARTED, *recorded]).is_spotless is False
    retried: list[AnyEvent] = [StageFailed(stage="a", failure=FAILURE, will_retry=True), StageStarted(stage="a", attempt=2)]
    mended = SagaState([STARTED, PATHS[StageState.RUNNING][0], *retried, StageCompleted(stage="a", output=OUTPUT)])
    assert mended.is_spotless is False


STUCK_IN_DOUBT: list[AnyEvent] = [
    *PATHS[StageState.IN_DOUBT],
    BACK,
    CompensationStarted(stage="a", attempt=1),
    CompensationFailed(stage="a", failure=FAILURE),
]
COMPLETED_LATE = StageCompleted(stage="a", output=OUTPUT, late=True, at=at(9))


@pytest.mark.parametrize(
    ("ended", "failed"),
    [(CompensationCompleted(stage="a", at=at(2)), None), (CompensationFailed(stage="a", failure=FAILURE, at=at(2)), FAILURE.kind)],
    ids=["completed", "failed"],
)
def test_an_attempt_to_undo_ends_when_its_outcome_is_recorded(ended: AnyEvent, failed: FailureKind | None) -> None:
    began = CompensationStarted(stage="a", attempt=1, at=at(1))

    record = SagaState([STARTED, *PATHS[StageState.KEPT], BACK, began, ended]).stages["a"]

    assert record.undo_tries == (Try(at(1), at(2), failed),)


@pytest.mark.parametrize(
    ("ended", "tried"),
    [
        (StageCompleted(stage="a", output=OUTPUT, at=at(2)), Try(at(1), at(2))),
        (StageFailed(stage="a", failure=FAILURE, at=at(2)), Try(at(1), at(2), FAILURE.kind)),
        (StageFailed(stage="a", failure=LOST, at=at(2)), Try(at(1), None, LOST.kind)),
    ],
    ids=["completed", "failed", "lost with its process"],
)
def test_an_attempt_ends_when_its_outcome_is_recorded_unless_it_was_lost_with_its_process(ended: AnyEvent, tried: Try) -> None:
    record = SagaState([STARTED, StageStarted(stage="a", attempt=1, at=at(1)), ended]).stages["a"]

    assert record.tries == (tried,)


def test_a_stage_and_its_compensation_keep_all_their_attempts_the_oldest_first() -> None:
    failed = StageFailed(stage="a", failure=FAILURE, will_retry=True, at=at(2))
    completed = StageCompleted(stage="a", output=OUTPUT, at=at(4))
    not_undone = CompensationFailed(stage="a", failure=FAILURE, will_retry=True, at=at(6))
    events: list[AnyEvent] = [
        StageStarted(stage="a", attempt=1, at=at(1)), failed, StageStarted(stage="a", attempt=2, at=at(3)), completed, BACK,
        CompensationStarted(stage="a", attempt=1, at=at(5)), not_undone, CompensationStarted(stage="a", attempt=2, at=at(7)),
        CompensationCompleted(stage="a", at=at(8)),
    ]  # fmt: skip

    record = SagaState([STARTED, *events]).stages["a"]

    assert record.tries == (Try(at(1), at(2), FAILURE.kind), Try(at(3), at(4)))
    assert record.undo_tries == (Try(at(5), at(6), FAILURE.kind), Try(at(7), at(8)))


def test_an_attempt_that_was_lost_with_its_process_stays_lost_when_the_next_one_is_called_off() -> None:
    lost = StageFailed(stage="a", failure=LOST, will_retry=True, at=at(2))
    called_off = StageFailed(stage="a", failure=FAILURE, at=at(3))

    record = SagaState([STARTED, StageStarted(stage="a", attempt=1, at=at(1)), lost, called_off]).stages["a"]

    assert record.tries == (Try(at(1), None, LOST.kind),)


def test_a_stage_that_has_gone_beyond_its_own_point_of_no_return_stays_beyond_it() -> None:
    failed = StageFailed(stage="a", failure=FAILURE, past_pivot=True, will_retry=True)
    failed_again = StageFailed(stage="a", failure=FAILURE)

    state = SagaState([STARTED, StageStarted(stage="a", attempt=1), failed, StageStarted(stage="a", attempt=2), failed_again])

    assert protected(state) == {"a"}


@pytest.mark.parametrize("before", [StageState.KEPT, StageState.IN_DOUBT])
def test_what_has_gone_beyond_its_own_point_of_no_return_is_kept_only_if_it_had_landed(before: StageState) -> None:
    began = CompensationStarted(stage="a", attempt=1)
    failed = CompensationFailed(stage="a", failure=FAILURE, past_pivot=True)

    record = SagaState([STARTED, *PATHS[before], BACK, began, failed]).stages["a"]

    assert (record.past_pivot, record.doubt) == (True, False)
    assert record.state is (StageState.KEPT if before is StageState.KEPT else StageState.FAILED)


def test_a_stage_in_doubt_that_completes_late_has_not_failed() -> None:
    record = SagaState([STARTED, *PATHS[StageState.IN_DOUBT], COMPLETED_LATE]).stages["a"]

    assert (record.state, record.landed, record.doubt, record.failed) == (StageState.KEPT, True, False, False)


def test_a_stuck_stage_that_completes_late_stays_stuck_and_is_known_to_have_landed() -> None:
    record = SagaState([STARTED, *STUCK_IN_DOUBT, COMPLETED_LATE]).stages["a"]

    assert (record.state, record.landed, record.doubt) == (StageState.STUCK, True, False)
    assert (record.output, record.late_output, record.ended_at) == (OUTPUT, OUTPUT, at(9))


def test_what_came_late_of_another_execution_waits_for_a_person_also_when_this_one_is_undone_late() -> None:
    state = SagaState([STARTED, *PATHS[StageState.STUCK], LATE, CompensationCompleted(stage="a", late=True)])

    assert state.stages["a"].state is StageState.UNDONE
    assert undo_step(state.graph["a"], state.stages["a"]) is Step.HOLD
    assert stage_states(state)["a"] is StageState.IN_DOUBT


def said(verdict: Verdict) -> list[AnyEvent]:
    """A person's word on stage a, when the saga has come to rest."""
    return [SagaEnded(status=SagaStatus.STUCK), StageSettled(stage="a", verdict=verdict, note="looked", by="ann", at=at(9))]


def test_what_a_person_says_is_undone_has_not_landed_and_ended_then() -> None:
    record = SagaState([STARTED, *PATHS[StageState.STUCK], *said(Verdict.UNDONE)]).stages["a"]

    assert (record.state, record.landed, record.undo_ended_at) == (StageState.UNDONE, False, at(9))


def test_what_a_person_says_is_kept_keeps_its_output_but_not_what_it_returned_beside_a_failure() -> None:
    failed = StageFailed(stage="a", failure=FAILURE, in_doubt=True, output=OUTPUT)

    stuck = SagaState([STARTED, *PATHS[StageState.STUCK], *said(Verdict.KEPT)]).stages["a"]
    unsure = SagaState([STARTED, StageStarted(stage="a", attempt=1), failed, *said(Verdict.KEPT)]).stages["a"]

    assert stuck.output == OUTPUT
    assert unsure.output == StageOutput.ok()


@pytest.mark.parametrize(
    ("stuck", "state"),
    [(PATHS[StageState.STUCK], StageState.KEPT), (STUCK_IN_DOUBT, StageState.IN_DOUBT), (STUCK_WITH_REMAINS, StageState.FAILED)],
    ids=["landed", "in doubt", "remains"],
)
def test_what_is_to_be_tried_again_stands_where_it_stood_before_it_was_stuck(stuck: list[AnyEvent], state: StageState) -> None:
    record = SagaState([STARTED, *stuck, *said(Verdict.RETRY)]).stages["a"]

    assert record.state is state


def test_a_probe_that_gave_no_answer_is_asked_again_when_a_person_says_so() -> None:
    node = Node(name="a", role=Role.COMPENSABLE, can_probe=True)
    unanswered = StageProbed(stage="a", landed=None, failure=FAILURE)

    record = SagaState([STARTED, *PATHS[StageState.IN_DOUBT], unanswered, *said(Verdict.RETRY)]).stages["a"]

    assert undo_step(node, record) is Step.PROBE


# -- which way a saga goes ---------------------------------------------------------------------------------------


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


# -- going backward ----------------------------------------------------------------------------------------------


async def fine(_: Any) -> None: ...


async def declined(_: Any) -> None:
    raise CardDeclined


def test_a_compensation_is_not_attempted_after_its_longest_time() -> None:
    # It starts at 100 s of the loop: what counts is the time since its own first attempt.
    script = Script(undo_fails=9, undo_takes=4)
    _, pipeline = scene({"a": (), "b": ("a",)}, {"a": script, "b": Script("raise", before=100)})
    patient = Retry(attempts=9, wait=1, multiplier=1, jitter=False, max_elapsed=12)

    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=patient))).run(pipeline))

    assert script.undo_attempts == 3
    assert report.stages["a"].state is StageState.STUCK


def test_a_compensation_that_was_cancelled_from_outside_says_so() -> None:
    _, pipeline = scene(SEQUENCE, {"c": Script("raise", before=1), "b": Script(undo_takes=10)})
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        await by_cancelling_every_task(coordinator.run(pipeline, saga_id="s"))
        return await coordinator.report("s")

    undo = run(play()).stages["b"].compensation

    assert undo is not None
    assert undo.failure is not None
    assert undo.failure.type == "InterruptedError"
    assert undo.failure.message == "its task was cancelled from outside"


def test_a_compensation_that_raises_a_cancel_of_its_own_is_not_called_cancelled_from_outside() -> None:
    async def undo(_: CompensationContext) -> None:
        raise asyncio.CancelledError("mine")

    pipeline = Pipeline().with_stage("a", compensable(fine, undo)).with_stage("b", declined, "work", dependencies=("a",))

    undone = run(SagaCoordinator(FailFast(compensation=ONCE)).run(pipeline)).stages["a"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "mine"


def test_a_timeout_that_a_compensation_survives_is_not_held_against_the_next_one() -> None:
    async def stubborn(_: CompensationContext) -> None:
        try:
            await elapse(10)
        except asyncio.CancelledError:
            await elapse(1)

    async def cancels_itself(_: CompensationContext) -> None:
        raise asyncio.CancelledError("mine")

    pipeline = (
        Pipeline()
        .with_stage("a", compensable(fine, cancels_itself))
        .with_stage("b", compensable(fine, stubborn), dependencies=("a",))
        .with_stage("c", declined, "work", dependencies=("b",))
    )

    report = run(SagaCoordinator(FailFast(compensation=Compensation(timeout=3, retry=Retry(attempts=1)))).run(pipeline))

    assert report.stages["b"].state is StageState.UNDONE
    undone = report.stages["a"].compensation
    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "mine"


def test_a_ledger_is_not_written_under_a_cancel_that_a_compensation_survived() -> None:
    cancels: list[tuple[str, int]] = []

    class Watching(MemoryLedger):
        async def append(self, saga_id: str, events: Sequence[AnyEvent], **more: Any) -> None:
            task = asyncio.current_task()
            assert task is not None
            cancels.extend((type(event).__name__, task.cancelling()) for event in events)
            await super().append(saga_id, events, **more)

    async def stubborn(_: CompensationContext) -> None:
        try:
            await elapse(10)
        except asyncio.CancelledError:
            await elapse(1)

    pipeline = Pipeline().with_stage("a", compensable(fine, stubborn)).with_stage("b", declined, "work", dependencies=("a",))

    run(SagaCoordinator(FailFast(compensation=Compensation(timeout=3)), ledger=Watching()).run(pipeline))

    assert ("CompensationCompleted", 0) in cancels


def test_when_the_ledger_breaks_while_going_backward_nobody_is_asked_any_more() -> None:
    asked: list[str] = []

    async def probe(ctx: CompensationContext) -> None:
        asked.append(ctx.stage_name)

    pipeline = Pipeline().with_stage("a", compensable(declined, fine, probe=probe)).with_stage("b", compensable(fine, fine))
    one_by_one = FailFast(compensation=Compensation(max_concurrency=1))

    with pytest.raises(LedgerError, match="disk full"):
        run(SagaCoordinator(one_by_one, ledger=SlowLedger(CompensationStarted)).run(pipeline))

    assert asked == []


def test_an_error_of_a_compensation_that_was_cancelled_from_outside_is_told_in_its_own_words() -> None:
    async def undo(_: CompensationContext) -> None:
        try:
            await elapse(10)
        except asyncio.CancelledError:
            raise CardDeclined("closed") from None

    async def late(_: Any) -> None:
        await elapse(1)
        raise CardDeclined

    pipeline = Pipeline().with_stage("a", compensable(fine, undo)).with_stage("b", late, "work", dependencies=("a",))
    coordinator = SagaCoordinator(FailFast(compensation=ONCE))

    async def play() -> SagaReport:
        await by_cancelling_every_task(coordinator.run(pipeline, saga_id="s"))
        return await coordinator.report("s")

    undone = run(play()).stages["a"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "closed"


def test_a_compensation_that_is_given_up_is_told_of_in_full() -> None:
    released = asyncio.Event()

    async def undo(_: CompensationContext) -> None:
        await deaf(released)

    pipeline = Pipeline().with_stage("a", compensable(fine, undo)).with_stage("b", declined, "work", dependencies=("a",))
    policy = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1)))

    async def play() -> SagaReport:
        report = await SagaCoordinator(policy).run(pipeline)
        released.set()
        return report

    undone = run(play()).stages["a"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert (undone.failure.stage, undone.failure.kind, undone.failure.attempt) == ("a", FailureKind.COMPENSATION, 1)
    assert undone.failure.message.endswith("it ignored its cancel for 2 s; it may still be running")


def test_what_stands_on_nothing_but_a_compensation_that_was_given_up_goes_when_the_policy_continues() -> None:
    released = asyncio.Event()
    world, pipeline = scene({"a": ()}, {"a": Script(order_matters=False)})

    async def undo(_: CompensationContext) -> None:
        await deaf(released)

    pipeline = pipeline.with_stage("b", compensable(fine, undo), dependencies=("a",))
    pipeline = pipeline.with_stage("c", declined, "work", dependencies=("b",))
    policy = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1), on_failure="continue"))

    async def play() -> SagaReport:
        report = await SagaCoordinator(policy).run(pipeline)
        released.set()
        return report

    report = run(play())

    assert world.standing == {}
    assert (report.stages["b"].state, report.stages["a"].state) == (StageState.STUCK, StageState.UNDONE)


def test_a_wait_that_the_backward_deadline_ends_leaves_the_failure_that_it_should_have_mended() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script(undo_fails=9), "c": Script("raise")})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(deadline=5, retry=Retry(attempts=3, wait=10, jitter=False))))

    undone = run(coordinator.run(pipeline, saga_id="s")).stages["b"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "undoing b was declined"
    told = [event for event in run(coordinator.ledger.read("s")) if isinstance(event, CompensationFailed)]
    assert [(event.failure, event.will_retry) for event in told] == [(undone.failure, True), (undone.failure, False)]


@pytest.mark.parametrize("moment", [2.1, 2.4, 2.6, 2.9])
def test_cancelling_every_task_while_the_ledger_writes_ends_the_saga_as_a_crash_would(moment: float) -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    coordinator = SagaCoordinator(ledger=SlowLedger())

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(moment)
        mine = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if "watched" not in repr(task)]
        assert len(mine) == 3
        for task in mine:
            task.cancel()
        with pytest.raises((LedgerError, asyncio.CancelledError)):
            await running
        return await coordinator.report("s")

    assert run(play()).status is SagaStatus.COMPENSATING
    assert world.refusals == []


async def cancel_every_task() -> None:
    mine = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if "watched" not in repr(task)]
    for task in mine:
        task.cancel()
    await asyncio.gather(*mine, return_exceptions=True)


def test_cancelling_every_task_while_a_stage_waits_for_its_retry_calls_the_retry_off() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise", then=("ok",))})
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=10, jitter=False)))

    async def play() -> SagaReport:
        asyncio.create_task(coordinator.run(pipeline, saga_id="s"))  # noqa: RUF006 - found again among all tasks
        await elapse(5)
        await cancel_every_task()
        return await coordinator.report("s")

    report = run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["b"].attempts == 1
    assert world.standing == {}


def test_cancelling_every_task_while_a_probe_waits_to_be_asked_again_has_it_asked_at_once() -> None:
    class Shy(CompensableStage):
        asked = 0

        async def execute(self, ctx: SagaContext) -> None:
            raise CardDeclined

        async def probe(self, ctx: CompensationContext) -> None:
            Shy.asked += 1
            if Shy.asked == 1:
                raise CardDeclined

        async def compensate(self, ctx: CompensationContext) -> None: ...

    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=2, wait=10, jitter=False))))

    async def play() -> tuple[SagaReport, float]:
        asyncio.create_task(coordinator.run(Pipeline().with_stage("shy", Shy), saga_id="s"))  # noqa: RUF006 - found again among all tasks
        await elapse(5)
        await cancel_every_task()
        return await coordinator.report("s"), asyncio.get_running_loop().time()

    report, took = run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert (Shy.asked, took) == (2, 5)


# -- asking and trying again -------------------------------------------------------------------------------------


def test_a_retry_that_is_called_off_after_the_probe_found_nothing_leaves_nothing_in_doubt() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang")}, {"b": "probed"})
    coordinator = SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2, wait=10, jitter=False)))

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(5)
        await coordinator.cancel("s")
        return await running

    report = run(play())

    assert report.stages["b"].probed is False
    assert report.stages["b"].state is StageState.FAILED
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("last", ["hang", "raise"])
def test_the_last_attempt_is_asked_for_although_the_one_before_it_was(last: str) -> None:
    asked: list[int] = []

    class Asked(CompensableStage):
        timeout = 1.0
        landed = False

        async def execute(self, ctx: SagaContext) -> None:
            if ctx.attempt == 2:
                self.landed = True
                if last == "raise":
                    raise CardDeclined
            await asyncio.Event().wait()

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            asked.append(ctx.attempt)
            return OUTPUT if self.landed else None

        async def compensate(self, ctx: CompensationContext) -> None:
            self.landed = False

    stage = Asked()
    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=1))).run(Pipeline().with_stage("a", stage)))

    assert len(asked) == 2
    assert report.stages["a"].state is StageState.UNDONE
    assert not stage.landed


# -- the graph and the ledger ------------------------------------------------------------------------------------


def test_a_difference_is_told_for_every_stage_also_behind_one_that_is_gone() -> None:
    before = Graph.of([Node(name="a"), Node(name="b", role=Role.COMPENSABLE), Node(name="c", dependencies=("b", "a"))])
    after = Graph.of([Node(name="b"), Node(name="c", dependencies=("b",)), Node(name="d")])

    assert before.differences(after) == [
        "stage 'a' is gone",
        "stage 'd' is new",
        "stage 'b': role was 'compensable', is 'plain'",
        "stage 'c': dependencies was ['a', 'b'], is ['b']",
    ]


@pytest.mark.parametrize(("answer", "stands"), [(None, True), (True, True), (False, False)])
def test_what_a_look_within_has_found_holds_until_somebody_has_looked_again(answer: bool | None, stands: bool) -> None:
    state = SagaState(
        [
            STARTED,
            StageStarted(stage="a", attempt=1),
            StageFailed(stage="a", failure=FAILURE, left_within=True),
            StageProbed(stage="a", landed=False, left_within=answer),
        ]
    )

    assert undo_step(state.graph["a"], state.stages["a"]) is (Step.COMPENSATE if stands else Step.CLEAR)


def test_each_time_that_something_comes_late_within_what_was_undone_it_is_undone_under_another_key() -> None:
    late = StageProbed(stage="a", landed=None, failure=FAILURE)
    undone: list[AnyEvent] = [CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a")]
    done = SagaEnded(status=SagaStatus.COMPENSATED)
    stuck = SagaEnded(status=SagaStatus.STUCK)
    again = SagaResumed(forward=False, by="ann")
    began: list[AnyEvent] = [STARTED, StageStarted(stage="a", attempt=1), StageCompleted(stage="a", output=OUTPUT), BACK]

    state = SagaState([*began, *undone, done, late, stuck, again, *undone, done, late, stuck])

    record = state.stages["a"]
    assert record.undone_too_soon == 2
    assert (record.doubt, undo_step(state.graph["a"], record)) == (False, Step.COMPENSATE)


# -- within a stage ----------------------------------------------------------------------------------------------

IMPATIENT = FailFast(compensation=ONCE)
HALTING = FailFast(on_failure="halt")


@pytest.mark.parametrize(("answer", "stands"), [(None, True), (True, True), (False, False)])
def test_a_fallback_that_fails_and_has_not_looked_within_leaves_standing_what_its_stage_left(answer: bool | None, stands: bool) -> None:
    state = SagaState(
        [
            STARTED,
            StageStarted(stage="a", attempt=1),
            StageFailed(stage="a", failure=FAILURE, left_within=True),
            FallbackFailed(stage="a", failure=FAILURE, left_within=answer),
        ]
    )

    assert undo_step(state.graph["a"], state.stages["a"]) is (Step.COMPENSATE if stands else Step.CLEAR)


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


# -- what a person says, and going on ----------------------------------------------------------------------------


def test_a_saga_that_halted_stays_halted_when_a_person_settles_what_was_in_doubt() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang")})
    coordinator = SagaCoordinator(FailFast(timeout=1, on_failure="halt"))
    halted = run(coordinator.run(pipeline, saga_id="s"))
    assert (halted.status, [*halted.in_doubt]) == (SagaStatus.HALTED, ["b"])

    settled = run(coordinator.settle("s", "b", "undone", "it never arrived"))

    assert settled.status is SagaStatus.HALTED
    assert world.standing == {"a": 1}


def test_a_saga_is_stuck_until_what_served_nothing_is_undone_though_what_was_stuck_of_it_is_settled() -> None:
    shape = {"root": (), "middle": ("root",), "leaf": ("middle",), "other": ()}
    world, pipeline = scene(shape, {"leaf": Script("raise"), "middle": Script(undo_fails=9)})
    coordinator = SagaCoordinator(SKIP_BRANCH)
    assert [*run(coordinator.run(pipeline, saga_id="s")).blocked] == ["root"]
    world.undo("middle")

    settled = run(coordinator.settle("s", "middle", "undone", "by hand"))
    report = run(coordinator.resume("s", pipeline))

    assert settled.status is SagaStatus.STUCK
    assert report.status is SagaStatus.DEGRADED
    assert world.standing == {"other": 1}


def test_what_stands_in_for_a_stage_still_does_when_a_person_has_what_is_left_of_that_undone_again() -> None:
    """Going forward, too: its dependents have used the fallback, and what would land now would serve nothing."""
    script = Script("raise", lands=True, then=("ok",), undo_fails=1)
    world, pipeline = scene({"b": ()}, {"b": script}, {"b": "recording"})
    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks={"b": {"receipt": None}}, compensation=ONCE))
    assert [*run(coordinator.run(pipeline, saga_id="s")).stuck] == ["b"]
    run(coordinator.settle("s", "b", "retry", "they answer again"))

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert script.attempts == ["raise"]
    assert report.status is SagaStatus.DEGRADED
    assert report.kept["b"].data == {"receipt": None}
    assert world.log == ["+b", "-b"]


def test_what_a_probe_has_found_undone_is_undone_as_a_whole_and_since_then() -> None:
    """Running it again needs nobody's word, and nothing that is idempotent: nothing of it is left."""

    class Unanswered(Probed):
        async def compensate(self, ctx: CompensationContext) -> None:
            await super().compensate(ctx)
            raise CardDeclined("no answer")

    world, tail = scene({"a": (), "b": ("a",)}, {"b": Script("raise", then=("ok",))})
    pipeline = Pipeline(name="scene").with_stage("a", Unanswered(world, "a", Script()))
    pipeline = pipeline.with_stage("b", tail.stages["b"].runner, dependencies=("a",))
    coordinator = SagaCoordinator(IMPATIENT)
    undone = run(coordinator.run(pipeline, saga_id="s"))
    assert undone.status is SagaStatus.COMPENSATED
    assert undone.stages["a"].compensation is not None
    assert undone.stages["a"].compensation.ended_at is not None

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "-a", "+a", "+b"]


def test_each_attempt_that_comes_late_to_what_was_undone_is_undone_under_another_key() -> None:
    """Whoever recognises a repeated request would answer that the second one was carried out."""
    released = [asyncio.Event(), asyncio.Event()]
    keys: list[str] = []

    class Deaf(CompensableStage):
        compensate_in_doubt = True
        idempotent = True

        async def execute(self, ctx: SagaContext) -> None:
            await deaf(released[ctx.attempt - 1])

        async def compensate(self, ctx: CompensationContext) -> None:
            keys.append(ctx.idempotency_key)

    pipeline = Pipeline().with_stage("deaf", Deaf)
    coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2, on_failure="halt"))

    async def play() -> list[SagaStatus]:
        await coordinator.run(pipeline, saga_id="s")
        seen = [(await coordinator.resume("s", pipeline, policy=FailFast(timeout=10, cancel_grace=2))).status]
        for late in released:
            late.set()
            await elapse(1)
            seen.append((await coordinator.report("s")).status)
            seen.append((await coordinator.compensate("s", pipeline)).status)
        return seen

    seen = run(play())

    assert seen == [SagaStatus.COMPENSATED, *[SagaStatus.STUCK, SagaStatus.COMPENSATED] * 2]
    assert keys == ["s/deaf/undo", "s/deaf/undo~2", "s/deaf/undo~3"]


def test_what_a_stage_was_given_since_is_heeded_by_whoever_goes_on_with_an_undoing_whose_process_died() -> None:
    scripts = {"b": Script("hang", lands=True)}
    world, pipeline = scene(SEQUENCE, scripts)
    ledger = SlowLedger(SagaEnded, seconds=0.0)
    with pytest.raises(LedgerError, match="disk full"):
        run(SagaCoordinator(FailFast(timeout=1), ledger=ledger).run(pipeline, saga_id="s"))
    assert run(SagaCoordinator(ledger=ledger).report("s")).status is SagaStatus.COMPENSATING
    ledger.breaks_at = None
    probed = staged(world, SEQUENCE, scripts, {"b": "probed"})

    report = run(SagaCoordinator(ledger=ledger).compensate("s", probed))

    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["b", "a"]


def test_who_recovers_a_saga_is_in_the_ledger() -> None:
    _, pipeline = scene(SEQUENCE)
    ledger = SlowLedger(SagaEnded, seconds=0.0)
    with pytest.raises(LedgerError, match="disk full"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.breaks_at = None

    run(SagaCoordinator(ledger=ledger).recover(pipeline, by="ann"))

    assert [event.by for event in run(ledger.read("s")) if isinstance(event, SagaResumed)] == ["ann"]


STUCK = SagaEnded(status=SagaStatus.STUCK)
COMPENSATED = SagaEnded(status=SagaStatus.COMPENSATED)
COMPLETED = SagaEnded(status=SagaStatus.COMPLETED)


@pytest.mark.parametrize(
    ("decide", "path", "why"),
    [
        (resumption, [*PATHS[StageState.STUCK], STUCK], "nothing can be undone before what is stuck or in doubt is settled"),
        (resumption, [*PATHS[StageState.UNDONE], COMPENSATED], "it is undone; forward=True runs it once more"),
        (resumption, [*PATHS[StageState.KEPT], COMPLETED], "it is completed, nothing is left to run"),
        (recovering, [*PATHS[StageState.FAILED], HALTED], "it has come to rest meanwhile"),
        (undoing, [*PATHS[StageState.UNDONE], COMPENSATED], "nothing is left to undo"),
    ],
)
def test_of_a_saga_that_is_left_as_it_is_the_log_says_why(decide: Any, path: list[AnyEvent], why: str) -> None:
    how = {"forward": None} if decide is resumption else {}

    chapter = decide([STARTED, *path], by="ann", **how)

    assert (chapter.direction, chapter.why_not) == (Direction.NOWHERE, why)


def test_all_that_is_half_undone_and_may_not_run_again_is_named_with_what_to_do() -> None:
    completed = [event for stage in "ab" for event in (StageStarted(stage=stage, attempt=1), StageCompleted(stage=stage, output=OUTPUT))]
    in_part = [
        event
        for stage in "ab"
        for event in (CompensationStarted(stage=stage, attempt=1), CompensationFailed(stage=stage, failure=FAILURE, in_part=True))
    ]

    with pytest.raises(MisuseError) as caught:
        resumption([STARTED, *completed, BACK, *in_part, STUCK], forward=True, by="ann")

    assert str(caught.value) == (
        "expected a saga whose half undone stages can run again, got a, b, not idempotent. "
        "Put it right by hand, then say what stands: settle(saga_id, stage, 'kept' or 'undone', note); or go on backward."
    )


def test_a_word_on_a_saga_that_has_not_come_to_rest_is_refused_with_what_to_do() -> None:
    word = StageSettled(stage="a", verdict=Verdict.UNDONE, note="looked", by="ann")

    misuse = refusal(SagaState([STARTED, *PATHS[StageState.IN_DOUBT]]), word)

    assert misuse is not None
    assert misuse.stage == "a"
    assert str(misuse) == (
        "expected a saga that has come to rest, for stage 'a', got one that is running. "
        "If its process is gone, go on with it first: saga recover, or coordinator.recover(pipelines)."
    )


def test_a_saga_can_go_forward_once_its_undoing_has_found_out_what_came_late_within() -> None:
    """What stands within is beyond a point of no return: nobody had a word to say on it, and none was taken."""
    nested_stage = Node(name="a", role=Role.COMPENSABLE, can_probe=True, idempotent=True, holds_pivot=True)
    events: list[AnyEvent] = [
        replace(STARTED, graph=Graph.of([nested_stage])),
        StageStarted(stage="a", attempt=1),
        StageFailed(stage="a", failure=FAILURE),
        BACK,
        StageProbed(stage="a", landed=False),
        SagaEnded(status=SagaStatus.COMPENSATED),
        StageProbed(stage="a", landed=None, failure=FAILURE, held=True),
        SagaEnded(status=SagaStatus.STUCK),
    ]
    found: list[AnyEvent] = [
        SagaResumed(forward=False, by="ann"),
        CompensationStarted(stage="a", attempt=1),
        CompensationFailed(stage="a", failure=FAILURE, past_pivot=True, in_part=True),
        SagaEnded(status=SagaStatus.HALTED),
    ]

    with pytest.raises(MisuseError, match="got a in doubt, of which something came late"):
        resumption(events, forward=True, by="ann")
    assert resumption([*events, *found], forward=True, by="ann").direction is Direction.FORWARD


def test_what_stands_on_a_stage_that_has_failed_anew_is_undone_before_that() -> None:
    """Promise 1: it came late, was kept when the saga went forward, and what it depends on then failed with something done."""
    events: list[AnyEvent] = [
        replace(STARTED, policy=SKIP_BRANCH, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE), ON_A])),
        *(StageStarted(stage="a", attempt=1), StageCompleted(stage="a", output=OUTPUT)),
        *(StageStarted(stage="b", attempt=1), StageFailed(stage="b", failure=FAILURE)),
        SagaTurnedBack(reason=TurnReason.ORPHANS),
        *(CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a"), SagaEnded(status=SagaStatus.COMPENSATED)),
        *(StageCompleted(stage="b", output=OUTPUT, late=True), SagaEnded(status=SagaStatus.STUCK)),
        SagaResumed(forward=True, by="ann"),
        *(
            StageStarted(stage="a", attempt=1, execution=2),
            EffectRecorded(stage="a", effect="a seat"),
            StageFailed(stage="a", failure=FAILURE),
        ),
    ]

    rollback = Rollback(SagaState(events), TurnReason.ORPHANS)

    assert len(rollback) == 1
    assert rollback.take() == "b"


ON_A = Node(name="b", role=Role.COMPENSABLE, dependencies=("a",))


@pytest.mark.parametrize("before", ["an undoing that failed", "an effect behind its undoing"])
def test_what_the_probe_finds_nothing_of_has_failed_when_the_stage_has_run_since_its_undoing(before: str) -> None:
    """What came of the undoing says nothing of the attempt that came after it."""
    in_doubt = StageFailed(stage="a", failure=FAILURE, in_doubt=True)
    undoing: list[AnyEvent] = [CompensationStarted(stage="a", attempt=1), CompensationFailed(stage="a", failure=FAILURE)]
    if before == "an effect behind its undoing":
        undoing = [
            *(CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a")),
            *(SagaEnded(status=SagaStatus.COMPENSATED), StageCompleted(stage="a", output=OUTPUT, late=True)),
        ]
    events: list[AnyEvent] = [
        replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, can_probe=True, idempotent=True)])),
        *(StageStarted(stage="a", attempt=1), in_doubt, BACK, *undoing, SagaEnded(status=SagaStatus.STUCK)),
        *(SagaResumed(forward=True, by="ann"), StageStarted(stage="a", attempt=2), in_doubt),
    ]

    record = SagaState([*events, StageProbed(stage="a", landed=False)]).stages["a"]

    assert record.state is StageState.FAILED
    assert not record.anew
