"""What a saga's events come to: times, places, causes and words of the record."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from stageflow.api import StageOutput

from saga import (
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    LedgerCorrupt,
    Policy,
    SagaStatus,
    StageState,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    FallbackFailed,
    FallbackUsed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
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
from saga.recovery import stage_states
from saga.recovery.record import StageRecord, Step, Try, undo_step
from saga.recovery.scope import left_to_undo, protected
from saga.recovery.state import SagaState
from tests.test_ledger import BACK, CONTRADICTIONS, FAILURE, HALTED, LATE, OUTPUT, PATHS, RUNS_ON, STARTED, STUCK_WITH_REMAINS

LOST = Failure.of("a", FailureKind.CRASHED, "gone")


def at(second: int) -> datetime:
    return datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=second)


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
    assert list(state.failures) == [FAILURE_OF_THE_PATH, probing]


(FAILURE_OF_THE_PATH,) = (event.failure for event in PATHS[StageState.FAILED] if isinstance(event, StageFailed))


def test_what_stopped_a_saga_that_did_not_turn_back_is_among_its_failures_once() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    state = SagaState([STARTED, *PATHS[StageState.FAILED], SagaEnded(status=SagaStatus.HALTED, cause=late)])
    known = SagaState([STARTED, *PATHS[StageState.FAILED], SagaEnded(status=SagaStatus.HALTED, cause=FAILURE_OF_THE_PATH)])

    assert (state.cause, list(state.failures)) == (late, [FAILURE_OF_THE_PATH, late])
    assert list(known.failures) == [FAILURE_OF_THE_PATH]


def test_what_stopped_a_saga_beside_its_stages_is_its_cause_and_among_its_failures() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    state = SagaState([STARTED, *PATHS[StageState.KEPT], SagaStopped(cause=late)])

    assert (state.stop, state.cause, list(state.failures)) == (late, late, [late])


def test_what_turned_a_saga_back_is_its_cause_and_among_its_failures_once() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    state = SagaState([STARTED, *PATHS[StageState.KEPT], SagaTurnedBack(reason=TurnReason.FAILURE, cause=late)])
    known = SagaState([STARTED, *PATHS[StageState.FAILED], SagaTurnedBack(reason=TurnReason.FAILURE, cause=FAILURE_OF_THE_PATH)])

    assert (state.cause, list(state.failures)) == (late, [late])
    assert list(known.failures) == [FAILURE_OF_THE_PATH]


def test_an_effect_is_recorded_without_copying_those_before_it() -> None:
    """Twenty thousand of one stage took more than a second for nothing else, and a hundred thousand forty."""
    state = SagaState([STARTED, StageStarted(stage="a", attempt=1), EffectRecorded(stage="a", effect="1A")])
    effects = state.stages["a"].effects

    state.apply(EffectRecorded(stage="a", effect="1B"))

    assert state.stages["a"].effects is effects
    assert effects == ["1A", "1B"]
    assert state.stages["b"].effects is None


def test_a_failure_is_not_compared_with_each_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand stages that failed at once kept the event loop for five seconds, and two thousand for twenty."""
    compared: list[Failure] = []
    same = Failure.__eq__

    def counted(one: Failure, other: object) -> bool:
        compared.append(one)
        return same(one, other)

    monkeypatch.setattr(Failure, "__eq__", counted)
    failures = [Failure.of("a", FailureKind.REPORTED, "full", attempt=attempt + 1) for attempt in range(100)]
    attempts = [(StageStarted(stage="a", attempt=each.attempt), StageFailed(stage="a", failure=each, will_retry=True)) for each in failures]

    state = SagaState([STARTED, *(event for attempt in attempts for event in attempt)])

    assert [*map(id, state.failures)] == [*map(id, failures)]
    assert state.first_of(reversed(failures)) is failures[0]
    assert len(compared) < len(failures)


def test_what_stopped_a_saga_first_is_its_cause_whatever_stops_or_turns_it_later() -> None:
    late, cancelled = (Failure.of(None, kind, "enough") for kind in (FailureKind.TIMEOUT, FailureKind.INTERRUPTED))
    stopped: list[AnyEvent] = [STARTED, *PATHS[StageState.KEPT], SagaStopped(cause=late)]
    turned = SagaTurnedBack(reason=TurnReason.INTERRUPT, cause=cancelled)

    again, back = SagaState([*stopped, SagaStopped(cause=cancelled)]), SagaState([*stopped, turned])

    assert (again.cause, [*again.failures]) == (back.cause, [*back.failures]) == (late, [late, cancelled])


def test_a_saga_is_spotless_until_it_is_resumed_or_a_stage_fails_comes_into_question_or_skips_what_it_has_begun() -> None:
    assert SagaState([STARTED, *PATHS[StageState.KEPT]]).is_spotless is True
    assert SagaState([STARTED, *PATHS[StageState.SKIPPED]]).is_spotless is True
    recorded: list[AnyEvent] = [PATHS[StageState.RUNNING][0], EffectRecorded(stage="a", effect=1), *PATHS[StageState.SKIPPED]]
    assert SagaState([STARTED, *recorded]).is_spotless is False
    retried: list[AnyEvent] = [StageFailed(stage="a", failure=FAILURE, will_retry=True), StageStarted(stage="a", attempt=2)]
    mended = SagaState([STARTED, PATHS[StageState.RUNNING][0], *retried, StageCompleted(stage="a", output=OUTPUT)])
    assert mended.is_spotless is False
    assert SagaState([STARTED, *PATHS[StageState.KEPT], RUNS_ON]).is_spotless is False
    assert SagaState([STARTED, *PATHS[StageState.KEPT], LATE]).is_spotless is False
    assert SagaState([STARTED, *PATHS[StageState.KEPT], StageProbed(stage="a", landed=None, failure=FAILURE)]).is_spotless is False


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


@pytest.mark.parametrize(
    ("before", "doubt", "after"),
    [
        (StageState.KEPT, False, StageState.KEPT),
        (StageState.FALLBACK, False, StageState.FALLBACK),
        (StageState.IN_DOUBT, True, StageState.STUCK),
    ],
)
def test_what_has_gone_beyond_its_own_point_of_no_return_is_kept_only_if_it_had_landed_or_something_stands_in(
    before: StageState, doubt: bool, after: StageState
) -> None:
    began = CompensationStarted(stage="a", attempt=1)
    failed = CompensationFailed(stage="a", failure=FAILURE, past_pivot=True)

    record = SagaState([STARTED, *PATHS[before], BACK, began, failed]).stages["a"]

    assert (record.past_pivot, record.doubt) == (True, doubt)
    assert record.state is after


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


def test_each_time_that_a_stage_completes_late_when_it_was_undone_it_is_undone_under_another_key() -> None:
    late = StageCompleted(stage="a", output=OUTPUT, late=True)

    record = SagaState([STARTED, *DONE, BACK, *UNDONE, late, *UNDONE, late]).stages["a"]

    assert record.undone_too_soon == 2


def test_each_time_that_a_fallbacks_sagas_are_to_be_undone_beside_what_was_they_are_under_another_key() -> None:
    late = StageProbed(stage="a", landed=None, failure=FAILURE)
    used = FallbackUsed(stage="a", output=OUTPUT, source="stage", ran=("s/a",))
    undone: list[AnyEvent] = [CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a")]
    began: list[AnyEvent] = [STARTED, StageStarted(stage="a", attempt=1), EffectRecorded(stage="a", effect=1)]
    began += [StageFailed(stage="a", failure=FAILURE), used, SagaTurnedBack(reason=TurnReason.ORPHANS), *undone]
    stuck, again = SagaEnded(status=SagaStatus.STUCK), SagaResumed(forward=False, by="ann")

    state = SagaState([*began, late, stuck, again, *undone, BACK, CompensationStarted(stage="a", attempt=1)])

    assert state.stages["a"].undone_too_soon == 2


def test_only_a_stage_that_was_stopped_before_its_code_ran_as_often_as_it_was_started_is_not_asked() -> None:
    probed = SagaStarted(
        saga_id="s", pipeline="p", graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, can_probe=True)]), policy=FailFast(), input={}
    )
    stopped = StageFailed(stage="a", failure=Failure.of("a", FailureKind.INTERRUPTED, "the saga stopped before it ran"))
    again: list[AnyEvent] = [SagaEnded(status=SagaStatus.HALTED), SagaResumed(forward=True, by="ann")]

    never: list[AnyEvent] = [StageStarted(stage="a", attempt=1), stopped, *again, StageStarted(stage="a", attempt=2), stopped]
    once: list[AnyEvent] = [StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE), *again, *never[-2:]]
    called_off: list[AnyEvent] = [StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE, will_retry=True), stopped]

    states = [SagaState([probed, *path]) for path in (never, once, called_off)]

    assert [undo_step(state.graph["a"], state.stages["a"]) for state in states] == [Step.CLEAR, Step.PROBE, Step.PROBE]


@pytest.mark.parametrize(("answer", "stands"), [(None, True), (True, True), (False, False)])
def test_a_fallback_that_has_not_looked_within_leaves_standing_what_its_stage_left(answer: bool | None, stands: bool) -> None:
    left: list[AnyEvent] = [StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE, left_within=True)]
    ends: list[AnyEvent] = [
        FallbackFailed(stage="a", failure=FAILURE, left_within=answer),
        FallbackUsed(stage="a", output=OUTPUT, source="stage", left_within=answer),
    ]

    states = [SagaState([STARTED, *left, end]) for end in ends]

    assert [undo_step(state.graph["a"], state.stages["a"]) for state in states] == [Step.COMPENSATE if stands else Step.CLEAR] * 2


def test_what_landed_late_behind_a_fallback_and_is_undone_is_not_undone_once_more_with_the_fallbacks_sagas() -> None:
    """Promise 2."""
    began = CompensationStarted(stage="a", attempt=1)
    path: list[AnyEvent] = [
        *PATHS[StageState.IN_DOUBT],
        FallbackUsed(stage="a", output=OUTPUT, source="stage", ran=("s/a",)),
        SagaTurnedBack(reason=TurnReason.ORPHANS),
        StageProbed(stage="a", landed=True, output=OUTPUT),
        began,
        CompensationCompleted(stage="a"),
        BACK,
    ]
    assert undo_step(STARTED.graph["a"], SagaState([STARTED, *path]).stages["a"]) is Step.COMPENSATE

    record = SagaState([STARTED, *path, began]).stages["a"]

    assert (record.landed, record.late_output) == (False, None)


def test_a_stage_whose_fallbacks_sagas_stand_does_not_run_in_another_execution_when_what_it_depends_on_runs_anew() -> None:
    """Under another key nobody would find them any more."""
    failure = Failure.of("b", FailureKind.REPORTED, "no")
    replaced: list[AnyEvent] = [
        StageStarted(stage="b", attempt=1),
        StageFailed(stage="b", failure=failure),
        FallbackUsed(stage="b", output=OUTPUT, source="stage", ran=("s/b",)),
    ]
    settled = StageSettled(stage="a", verdict=Verdict.UNDONE, note="by hand", by="ann")
    path = [*PATHS[StageState.KEPT], *replaced, LATE, SagaEnded(status=SagaStatus.STUCK), settled, SagaEnded(status=SagaStatus.HALTED)]

    state = SagaState([STARTED, *path, SagaResumed(forward=True, by="ann")])

    assert (state.stages["a"].anew, state.stages["b"].anew) == (True, False)
    assert undo_step(state.graph["b"], state.stages["b"]) is Step.COMPENSATE


def test_what_a_probe_tells_after_a_crash_is_undone_of_a_stage_is_so_of_its_fallbacks_sagas_too() -> None:
    path: list[AnyEvent] = [
        StageStarted(stage="a", attempt=1),
        StageFailed(stage="a", failure=FAILURE),
        FallbackUsed(stage="a", output=OUTPUT, source="stage", ran=("s/a",)),
        BACK,
        CompensationStarted(stage="a", attempt=1),
        CompensationFailed(stage="a", failure=LOST, will_retry=True),
    ]

    state = SagaState([STARTED, *path, StageProbed(stage="a", landed=False, left_within=False)])

    assert (state.stages["a"].fell_back, undo_step(state.graph["a"], state.stages["a"])) == (False, Step.CLEAR)


@pytest.mark.parametrize(
    ("outcome", "state", "again"),
    [
        (StageCompleted(stage="a", output=OUTPUT), StageState.KEPT, False),
        (StageFailed(stage="a", failure=FAILURE), StageState.FAILED, True),
    ],
)
def test_a_stage_that_was_half_undone_runs_again_until_it_has_completed(outcome: AnyEvent, state: StageState, again: bool) -> None:
    half = CompensationFailed(stage="a", failure=FAILURE, in_part=True)
    stuck: list[AnyEvent] = [*PATHS[StageState.COMPENSATING], half, SagaEnded(status=SagaStatus.STUCK)]
    forward = SagaResumed(forward=True, by="ann")
    ran: list[AnyEvent] = [StageStarted(stage="a", attempt=2), outcome, SagaEnded(status=SagaStatus.HALTED)]

    once = SagaState([STARTED, *stuck, forward]).stages["a"]
    twice = SagaState([STARTED, *stuck, forward, *ran, forward]).stages["a"]

    assert (once.state, once.again) == (StageState.FAILED, True)
    assert (twice.state, twice.again) == (state, again)


def test_a_fallback_serves_on_when_what_its_stage_has_left_is_half_undone() -> None:
    left: list[AnyEvent] = [StageStarted(stage="a", attempt=1), EffectRecorded(stage="a", effect=1), *PATHS[StageState.FALLBACK][1:]]
    half: list[AnyEvent] = [BACK, CompensationStarted(stage="a", attempt=1), CompensationFailed(stage="a", failure=FAILURE, in_part=True)]
    retried: list[AnyEvent] = [
        SagaEnded(status=SagaStatus.STUCK),
        StageSettled(stage="a", verdict=Verdict.RETRY, note="mended", by="ann"),
        SagaResumed(forward=True, by="ann"),
    ]

    record = SagaState([STARTED, *left, *half, *retried]).stages["a"]

    assert (record.state, record.again) == (StageState.FALLBACK, False)


CHAIN = replace(
    STARTED,
    graph=Graph.of([Node(name="a", role=Role.COMPENSABLE), Node(name="b", role=Role.COMPENSABLE, dependencies=("a",))]),
)


def of(stage: str, *events: AnyEvent) -> list[AnyEvent]:
    return [replace(event, stage=stage) for event in events]  # type: ignore[arg-type] # all of them are of a stage


DONE = PATHS[StageState.KEPT]
UNDONE: list[AnyEvent] = [CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a")]
HALF_UNDONE: list[AnyEvent] = [
    CompensationStarted(stage="a", attempt=1),
    CompensationFailed(stage="a", failure=FAILURE, in_part=True),
]
BEYOND = CompensationFailed(stage="a", failure=FAILURE, past_pivot=True)


@pytest.mark.parametrize(
    "path",
    [
        [*DONE, *of("b", *DONE), BACK, *of("b", *HALF_UNDONE), *HALF_UNDONE],
        [*DONE, *of("b", *PATHS[StageState.IN_DOUBT]), BACK, *UNDONE],
        [*DONE, *of("b", *PATHS[StageState.FAILED]), BACK, *of("b", UNDONE[0], BEYOND), *UNDONE],
    ],
    ids=["half undone", "in doubt", "failed beyond its pivot"],
)
def test_what_may_be_left_of_a_stage_runs_again_under_the_same_key_also_on_what_runs_anew(path: list[AnyEvent]) -> None:
    record = SagaState([CHAIN, *path, SagaEnded(status=SagaStatus.STUCK), SagaResumed(forward=True, by="ann")]).stages["b"]

    assert (record.again, record.anew, record.next_attempt()[1]) == (True, False, 1)


def test_a_plain_stage_runs_again_on_what_was_half_undone() -> None:
    plain = replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE), Node(name="b", dependencies=("a",))]))
    path = [*DONE, *of("b", *DONE), BACK, *HALF_UNDONE, SagaEnded(status=SagaStatus.STUCK), SagaResumed(forward=True, by="ann")]

    record = SagaState([plain, *path]).stages["b"]

    assert (record.again, record.anew) == (True, True)


def test_a_stage_that_never_ran_runs_for_the_first_time_on_what_runs_anew() -> None:
    path = [*DONE, BACK, *UNDONE, SagaEnded(status=SagaStatus.COMPENSATED), SagaResumed(forward=True, by="ann")]

    record = SagaState([CHAIN, *path]).stages["b"]

    assert (record.again, record.next_attempt()[1]) == (False, 1)


@pytest.mark.parametrize(
    "kept_from_running",
    [
        StageFailed(stage="a", failure=Failure.of("a", FailureKind.INTERRUPTED, "the saga stopped before it ran")),
        StageSkipped(stage="a", reason="a branch fell", output=OUTPUT, with_branch=True),
    ],
    ids=["failed", "skipped"],
)
def test_the_key_of_what_was_undone_is_not_used_again_when_the_next_execution_did_not_begin(kept_from_running: AnyEvent) -> None:
    ended = SagaEnded(status=SagaStatus.COMPENSATED)

    record = SagaState([STARTED, *DONE, BACK, *UNDONE, ended, RUNS_ON, kept_from_running]).stages["a"]

    assert (record.execution, record.next_attempt()[1]) == (1, 2)


ENDED = SagaEnded(status=SagaStatus.COMPENSATED)


def test_what_was_undone_for_what_it_had_recorded_runs_in_another_execution() -> None:
    recorded: list[AnyEvent] = [DONE[0], EffectRecorded(stage="a", effect="a seat"), DONE[1]]

    record = SagaState([STARTED, *recorded, BACK, *UNDONE, ENDED, RUNS_ON]).stages["a"]

    assert (record.again, record.next_attempt()[1]) == (True, 2)


def test_what_was_worked_out_from_what_is_gone_still_runs_anew_when_it_did_not_get_its_turn_and_what_stands_between_does_not() -> None:
    nodes = [Node(name="a", role=Role.COMPENSABLE), Node(name="b", dependencies=("a",))]
    nodes += [Node(name="c", role=Role.COMPENSABLE, dependencies=("a",)), Node(name="d", dependencies=("c",))]
    began = replace(STARTED, graph=Graph.of(nodes))
    done = [event for name in "abcd" for event in of(name, *DONE)]
    anew: list[AnyEvent] = [StageStarted(stage="a", attempt=1, execution=2), DONE[1], HALTED, RUNS_ON]

    state = SagaState([began, *done, BACK, *UNDONE, ENDED, RUNS_ON, *anew])

    assert {name: record.is_due_anew for name, record in state.stages.items()} == {"a": False, "b": True, "c": False, "d": False}


def test_a_stage_that_is_to_run_again_has_failed_until_it_has_and_its_probe_is_not_asked_what_it_has_answered() -> None:
    answered = StageProbed(stage="a", landed=False)

    state = SagaState([STARTED, *PATHS[StageState.FAILED], answered, HALTED, RUNS_ON])

    assert (state.stages["a"].again, state.stages["a"].failed, state.stages["a"].answer) == (True, True, False)


@pytest.mark.parametrize(
    ("policy", "path", "awaits"),
    [
        (FailFast(), [SagaResumed(forward=True, policy=ContinueWithFallback(), by="ann")], True),
        (ContinueWithFallback(), [SagaResumed(forward=True, policy=FailFast(), by="ann")], True),
        (FailFast(), [HALTED, SagaResumed(forward=True, policy=ContinueWithFallback(), by="ann")], False),
    ],
    ids=["died, and falls back now", "died where it was to fall back", "runs again first"],
)
def test_a_stage_that_had_failed_when_its_process_died_awaits_its_fallback(policy: Policy, path: list[AnyEvent], awaits: bool) -> None:
    began = replace(STARTED, policy=policy, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, has_fallback=True)]))

    assert SagaState([began, *PATHS[StageState.FAILED], *path]).stages["a"].awaits_fallback is awaits


def test_each_execution_has_a_number_of_its_own() -> None:
    undone: list[AnyEvent] = [BACK, *UNDONE, SagaEnded(status=SagaStatus.COMPENSATED), RUNS_ON]
    again: list[AnyEvent] = [StageStarted(stage="a", attempt=1, execution=2), StageCompleted(stage="a", output=OUTPUT)]

    record = SagaState([STARTED, *DONE, *undone, *again, *undone]).stages["a"]

    assert record.next_attempt()[1] == 3


def attempts_of(*failed: FailureKind, after: int = 0) -> list[AnyEvent]:
    """Attempts that failed in such ways, and one that runs."""
    kinds = [*failed, None]
    starts: list[AnyEvent] = [StageStarted(stage="a", attempt=after + number) for number, _ in enumerate(kinds, 1)]
    fails: list[AnyEvent] = [StageFailed(stage="a", failure=Failure.of("a", kind, "no"), will_retry=True) for kind in failed]
    return [event for pair in zip(starts, fails, strict=False) for event in pair] + starts[-1:]


@pytest.mark.parametrize("is_resumed", [False, True])
@pytest.mark.parametrize(
    ("failed", "is_first"),
    [
        ((), (True, True)),
        ((FailureKind.EXCEPTION,), (False, False)),
        ((FailureKind.CRASHED,), (False, True)),
        ((FailureKind.CRASHED, FailureKind.EXCEPTION), (False, False)),
    ],
)
def test_an_attempt_is_the_first_since_its_saga_was_resumed_beside_such_as_died_with_their_processes(
    failed: tuple[FailureKind, ...], is_first: tuple[bool, bool], is_resumed: bool
) -> None:
    before = [*PATHS[StageState.FAILED], HALTED, RUNS_ON] if is_resumed else []

    record = SagaState([STARTED, *before, *attempts_of(*failed, after=len(before) and 1)]).stages["a"]

    assert record.is_first_since_resumed is is_first[is_resumed]


def test_a_stage_that_runs_again_has_lost_what_its_fallback_came_to_before() -> None:
    began = replace(STARTED, policy=ContinueWithFallback(), graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, has_fallback=True)]))
    failed: list[AnyEvent] = [*PATHS[StageState.FAILED], FallbackFailed(stage="a", failure=FAILURE), HALTED, RUNS_ON]

    before, after = (SagaState([began, *failed, *then]).stages["a"] for then in ([], [StageStarted(stage="a", attempt=2)]))

    assert (before.awaits_fallback, before.fallback_failed) == (True, True)
    assert (after.awaits_fallback, after.fallback_failed) == (False, False)


def test_a_stage_that_fell_with_its_branch_serves_as_any_other_once_it_has_run_again() -> None:
    fell = StageSkipped(stage="a", reason="a branch fell", output=OUTPUT, with_branch=True)

    record = SagaState([STARTED, fell, SagaEnded(status=SagaStatus.DEGRADED), RUNS_ON, *DONE]).stages["a"]

    assert (record.state, record.with_branch, record.skip_reason) == (StageState.KEPT, False, None)


def test_another_fallback_of_a_stage_serves_though_the_one_before_was_to_be_undone() -> None:
    used = FallbackUsed(stage="a", output=OUTPUT, source="stage", ran=("s/a",))
    stuck: list[AnyEvent] = [*PATHS[StageState.FAILED], used, BACK, *PATHS[StageState.STUCK][-2:], SagaEnded(status=SagaStatus.STUCK)]
    again: list[AnyEvent] = [RUNS_ON, StageStarted(stage="a", attempt=2), StageFailed(stage="a", failure=FAILURE), used]

    before, after = (SagaState([STARTED, *stuck, *then]).stages["a"] for then in ([], again))

    assert (before.fallback_serves, after.fallback_serves) == (False, True)


def test_what_is_undone_in_the_end_is_so_as_a_whole() -> None:
    half = CompensationFailed(stage="a", failure=FAILURE, in_part=True, will_retry=True)

    record = SagaState([STARTED, *DONE, BACK, HALF_UNDONE[0], half, CompensationStarted(stage="a", attempt=2), UNDONE[1]]).stages["a"]

    assert (record.state, record.undone_in_part) == (StageState.UNDONE, False)


def test_a_stage_that_skipped_itself_is_still_skipped_when_its_saga_goes_forward_whatever_had_landed_of_it() -> None:
    skipped = StageSkipped(stage="a", reason="sold out", output=OUTPUT)
    found = StageProbed(stage="a", landed=True, output=OUTPUT)

    record = SagaState([STARTED, *RETRIED[:2], skipped, found, HALTED, RUNS_ON]).stages["a"]

    assert (record.state, record.landed, record.again) == (StageState.SKIPPED, True, False)


def test_what_ran_on_a_stage_that_was_skipped_with_recorded_effects_is_undone_with_these() -> None:
    """Promise 1. Only an earlier version has let a condition skip such a stage; its ledgers say so."""
    ran: list[AnyEvent] = [StageStarted(stage="a", attempt=1), EffectRecorded(stage="a", effect=1), StageFailed(stage="a", failure=FAILURE)]
    resumed: list[AnyEvent] = [SagaEnded(status=SagaStatus.HALTED), SagaResumed(forward=True, by="ann")]
    skipped = StageSkipped(stage="a", reason="switched off", output=StageOutput.skip("switched off"))

    state = SagaState([CHAIN, *ran, *resumed, skipped, *of("b", *DONE)])

    assert set(left_to_undo(state, TurnReason.ORPHANS)) == {"a", "b"}


def test_where_nothing_is_to_be_undone_nothing_is_either_when_the_sagas_of_a_fallback_are_spared() -> None:
    """So of a stage that is clear nobody needs to know what is spared."""
    flags = list(product((False, True), repeat=7))
    for state, role, (doubt, landed, past_pivot, fell_back, probes, holds_pivot, left) in product(StageState, Role, flags):
        record = StageRecord(
            state=state, attempts=1, doubt=doubt, landed=landed, past_pivot=past_pivot, fell_back=fell_back, stands_in_part=left
        )
        record.fallback_ran = ("s/a",)
        node = Node(name="a", role=role, can_probe=probes, holds_pivot=holds_pivot)

        assert undo_step(node, record) is not Step.CLEAR or undo_step(node, record, spares=True) is Step.CLEAR


def test_what_is_being_undone_when_a_pivot_comes_late_above_it_is_undone_all_the_same() -> None:
    pivot = Node(name="b", role=Role.PIVOT, dependencies=("a",))
    began = replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE), pivot]))
    late = StageCompleted(stage="b", output=OUTPUT, late=True)

    state = SagaState([began, *DONE, *of("b", *PATHS[StageState.FAILED]), BACK, UNDONE[0], late, UNDONE[1]])

    assert [record.state for record in state.stages.values()] == [StageState.UNDONE, StageState.KEPT]


def test_a_stage_that_runs_again_is_asked_about_anew_before_it_runs_once_more() -> None:
    question = StageProbed(stage="a", landed=None, failure=Failure.of("a", FailureKind.COMPENSATION, "something within"), held=True)
    word = StageSettled(stage="a", verdict=Verdict.RETRY, note="try", by="ann")
    doubted: list[AnyEvent] = [*PATHS[StageState.IN_DOUBT], question, SagaEnded(status=SagaStatus.STUCK)]

    waiting = [SagaState([STARTED, *doubted, *said, RUNS_ON]).stages["a"] for said in ([], [word])]
    running = [SagaState([STARTED, *doubted, *said, RUNS_ON, StageStarted(stage="a", attempt=2)]).stages["a"] for said in ([], [word])]

    assert [(one.attempts_failed, one.may_repeat, one.held) for one in waiting] == [(True, False, question), (True, True, None)]
    assert [(one.attempts_failed, one.may_repeat, one.held) for one in running] == [(False, False, None)] * 2


STUCK_UNFINISHED: list[AnyEvent] = [
    StageStarted(stage="a", attempt=1),
    EffectRecorded(stage="a", effect=1),
    *PATHS[StageState.FALLBACK][1:],
    BACK,
    CompensationStarted(stage="a", attempt=1),
    CompensationFailed(stage="a", failure=FAILURE),
    SagaEnded(status=SagaStatus.STUCK),
]


@pytest.mark.parametrize(
    ("goes_on", "state", "falls_back"),
    [([], StageState.STUCK, True), ([RUNS_ON, HALTED], StageState.STUCK, True), ([RUNS_ON], StageState.KEPT, False)],
    ids=["at rest", "halted before its turn", "going forward"],
)
def test_what_completes_late_and_is_stuck_behind_its_fallback_is_kept_only_by_who_goes_forward(
    goes_on: list[AnyEvent], state: StageState, falls_back: bool
) -> None:
    late = StageCompleted(stage="a", output=OUTPUT, late=True)

    record = SagaState([STARTED, *STUCK_UNFINISHED, *goes_on, late]).stages["a"]

    assert (record.state, record.landed, record.fell_back, record.failed) == (state, True, falls_back, falls_back)


def test_what_completes_late_in_doubt_before_it_runs_again_has_what_it_gave_and_no_fallback() -> None:
    doubted = [replace(event, in_doubt=True) if isinstance(event, StageFailed) else event for event in STUCK_UNFINISHED]
    late = StageCompleted(stage="a", output=StageOutput.ok(of="its own"), late=True)

    record = SagaState([STARTED, *doubted, RUNS_ON, late]).stages["a"]

    assert (record.state, record.fell_back, record.failed, record.again) == (StageState.KEPT, False, False, False)
    assert record.output == late.output


def test_what_completes_late_has_not_failed_also_where_it_is_stuck() -> None:
    without_fallback = [event for event in STUCK_UNFINISHED if not isinstance(event, FallbackUsed)]

    record = SagaState([STARTED, *without_fallback, StageCompleted(stage="a", output=OUTPUT, late=True)]).stages["a"]

    assert (record.state, record.failed) == (StageState.STUCK, False)


@pytest.mark.parametrize(
    ("below", "is_lost"),
    [
        ([*DONE, BACK, UNDONE[0]], True),
        ([*DONE, BACK, *UNDONE], True),
        ([*STUCK_UNFINISHED[:3], FallbackUsed(stage="a", output=OUTPUT, source="stage"), BACK, *UNDONE], False),
        ([*STUCK_UNFINISHED[:3], FallbackUsed(stage="a", output=OUTPUT, source="stage", ran=("c",)), BACK, UNDONE[0]], True),
    ],
    ids=["being undone", "undone", "undone behind its fallback", "being undone with its fallback's sagas"],
)
def test_what_completes_late_serves_nothing_when_what_it_was_worked_out_from_is_gone(below: list[AnyEvent], is_lost: bool) -> None:
    failed = of("b", *PATHS[StageState.FAILED])
    turn = below.index(BACK)
    late = StageCompleted(stage="b", output=OUTPUT, late=True)

    record = SagaState([CHAIN, *below[:turn], *failed, *below[turn:], late]).stages["b"]

    assert (record.state, record.failed) == (StageState.KEPT, is_lost)


@pytest.mark.parametrize(
    "kept_from_running",
    [
        StageFailed(stage="a", failure=Failure.of("a", FailureKind.INTERRUPTED, "the saga stopped before it ran")),
        StageSkipped(stage="a", reason="a branch fell", output=OUTPUT, with_branch=True, not_kept="a lock"),
    ],
    ids=["failed", "skipped"],
)
def test_a_stage_that_was_kept_from_running_again_has_lost_its_fallback_and_its_turn(kept_from_running: AnyEvent) -> None:
    record = SagaState([STARTED, *STUCK_UNFINISHED, RUNS_ON, kept_from_running]).stages["a"]

    assert (record.fell_back, record.again) == (False, False)
    assert record.not_kept == getattr(kept_from_running, "not_kept", None)


def test_a_stage_ends_when_its_fallback_stands_in() -> None:
    started, failed, used = (replace(event, at=at(second)) for second, event in enumerate(PATHS[StageState.FALLBACK]))

    assert SagaState([STARTED, started, failed]).stages["a"].ended_at == at(1)
    assert SagaState([STARTED, started, failed, used]).stages["a"].ended_at == at(2)


def test_a_probe_that_is_asked_once_more_has_told_nothing_yet() -> None:
    busy = StageProbed(stage="a", landed=None, failure=Failure.of("a", FailureKind.COMPENSATION, "no line"), will_retry=True)

    record = SagaState([STARTED, *PATHS[StageState.FAILED], busy]).stages["a"]

    assert (record.state, record.doubt, record.unanswered) == (StageState.FAILED, False, False)


WITHIN = StageProbed(stage="a", landed=None, failure=Failure.of("a", FailureKind.COMPENSATION, "something came late within"), held=True)
UNDONE_BEHIND_ITS_FALLBACK: list[AnyEvent] = [
    *STUCK_UNFINISHED[:3],
    FallbackUsed(stage="a", output=OUTPUT, source="stage"),
    BACK,
    *UNDONE,
    StageCompleted(stage="a", output=OUTPUT, late=True),
]
RETRIED: list[AnyEvent] = [
    StageStarted(stage="a", attempt=1),
    StageFailed(stage="a", failure=FAILURE, in_doubt=True, will_retry=True),
    StageStarted(stage="a", attempt=2),
]


@pytest.mark.parametrize(
    ("path", "landed", "state"),
    [
        ([*RETRIED, StageSkipped(stage="a", reason="sold out", output=OUTPUT)], True, StageState.SKIPPED),
        ([*RETRIED, StageSkipped(stage="a", reason="sold out", output=OUTPUT)], False, StageState.SKIPPED),
        ([*PATHS[StageState.IN_DOUBT], FallbackUsed(stage="a", output=OUTPUT, source="stage")], True, StageState.FALLBACK),
        ([*PATHS[StageState.FALLBACK], StageCompleted(stage="a", output=OUTPUT, late=True), WITHIN], False, StageState.FALLBACK),
        (UNDONE_BEHIND_ITS_FALLBACK, True, StageState.FALLBACK),
        (UNDONE_BEHIND_ITS_FALLBACK, False, StageState.UNDONE),
    ],
    ids=[
        "skipped",
        "skipped and nothing",
        "fallback",
        "fallback and nothing",
        "undone behind its fallback",
        "undone behind its fallback and nothing",
    ],
)
def test_what_a_probe_finds_behind_what_stands_in_for_it_comes_too_late(path: list[AnyEvent], landed: bool, state: StageState) -> None:
    found = StageOutput.ok(found=True) if landed else None

    record = SagaState([STARTED, *path, StageProbed(stage="a", landed=landed, output=found)]).stages["a"]

    assert (record.state, record.landed, record.doubt, record.output) == (state, landed, False, OUTPUT)
    assert not landed or record.late_output == found


def test_what_came_late_within_waits_no_more_once_the_stage_was_asked() -> None:
    path: list[AnyEvent] = [*PATHS[StageState.IN_DOUBT], WITHIN]

    asked = SagaState([STARTED, *path, StageProbed(stage="a", landed=True, output=OUTPUT)])

    assert SagaState([STARTED, *path]).stages["a"].held == WITHIN
    assert asked.stages["a"].held is None


def test_what_came_late_within_waits_no_more_once_the_stage_is_undone() -> None:
    assert SagaState([STARTED, *DONE, WITHIN, BACK, *UNDONE]).stages["a"].held is None


def test_what_came_late_within_what_was_undone_for_what_it_had_recorded_is_there_to_be_undone_again() -> None:
    record = SagaState([STARTED, *STUCK_UNFINISHED[:3], BACK, *UNDONE, WITHIN]).stages["a"]

    assert (record.state, record.doubt, record.undone_in_part) == (StageState.FAILED, False, True)


def test_a_stage_that_was_half_undone_stays_so_when_another_attempt_gets_nowhere() -> None:
    nowhere: list[AnyEvent] = [CompensationStarted(stage="a", attempt=2), CompensationFailed(stage="a", failure=FAILURE)]
    half = CompensationFailed(stage="a", failure=FAILURE, in_part=True, will_retry=True)

    record = SagaState([STARTED, *DONE, BACK, HALF_UNDONE[0], half, *nowhere]).stages["a"]

    assert (record.state, record.undone_in_part) == (StageState.STUCK, True)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (DONE, Failure.of("a", FailureKind.COMPENSATION, "something came late within")),
        (PATHS[StageState.CANCELLED], Failure.of("a", FailureKind.CANCELLED, "enough")),
        ([*PATHS[StageState.IN_DOUBT], BACK, *UNDONE], FAILURE),
    ],
    ids=["kept", "cancelled", "undone in doubt"],
)
def test_what_something_came_late_within_is_in_doubt_and_has_failed_as_it_had_or_because_of_that(
    path: list[AnyEvent], why: Failure
) -> None:
    record = SagaState([STARTED, *path, WITHIN]).stages["a"]

    assert (record.state, record.doubt) == (StageState.IN_DOUBT, True)
    assert record.failure is not None
    assert (record.failure.kind, record.failure.message) == (why.kind, why.message)


def test_what_came_late_within_does_not_take_the_place_of_what_waits_for_a_person() -> None:
    assert SagaState([STARTED, *PATHS[StageState.IN_DOUBT], LATE, WITHIN]).stages["a"].held == LATE


def test_a_stage_in_doubt_that_is_found_by_who_goes_forward_does_not_run_and_ended_then() -> None:
    found = StageProbed(stage="a", landed=True, output=OUTPUT, at=at(9))

    record = SagaState([STARTED, *PATHS[StageState.IN_DOUBT], HALTED, RUNS_ON, found]).stages["a"]

    assert (record.state, record.again, record.ended_at) == (StageState.KEPT, False, at(9))


SETTLED = StageSettled(stage="a", verdict=Verdict.UNDONE, note="by hand", by="ann")
NOT_UNDONE: list[AnyEvent] = [
    BACK,
    CompensationStarted(stage="a", attempt=1),
    CompensationFailed(stage="a", failure=FAILURE),
    SagaEnded(status=SagaStatus.STUCK),
    replace(SETTLED, verdict=Verdict.RETRY),
]
COMES_LATE = StageCompleted(stage="a", output=OUTPUT, late=True)


@pytest.mark.parametrize(
    ("path", "left_within", "state"),
    [
        ([*PATHS[StageState.UNDONE], COMES_LATE], False, StageState.UNDONE),
        ([*PATHS[StageState.UNDONE], COMES_LATE], True, StageState.FAILED),
        ([*PATHS[StageState.IN_DOUBT], SagaEnded(status=SagaStatus.STUCK), SETTLED, COMES_LATE], False, StageState.UNDONE),
        ([*PATHS[StageState.KEPT], WITHIN], False, StageState.FAILED),
        ([*PATHS[StageState.IN_DOUBT], *NOT_UNDONE], False, StageState.UNDONE),
    ],
    ids=["undone", "undone but for what is within", "undone by hand", "kept", "undone though that seemed to fail"],
)
def test_what_a_probe_does_not_find_is_undone_if_it_has_been_and_failed_otherwise(
    path: list[AnyEvent], left_within: bool, state: StageState
) -> None:
    record = SagaState([STARTED, *path, StageProbed(stage="a", landed=False, left_within=left_within)]).stages["a"]

    assert (record.state, record.landed, record.doubt) == (state, False, False)


def test_what_a_probe_finds_to_have_been_undone_runs_again_under_another_key() -> None:
    doubted: list[AnyEvent] = [*PATHS[StageState.UNDONE], COMES_LATE, SagaEnded(status=SagaStatus.STUCK), RUNS_ON]

    assert SagaState([STARTED, *doubted]).stages["a"].next_attempt()[1] == 1
    assert SagaState([STARTED, *doubted, StageProbed(stage="a", landed=False)]).stages["a"].next_attempt()[1] == 2


@pytest.mark.parametrize(
    ("idempotent", "kind", "doubt"),
    [
        (True, FailureKind.REPORTED, False),
        (True, FailureKind.CANCELLED, False),
        (True, FailureKind.EXCEPTION, True),
        (False, FailureKind.REPORTED, True),
    ],
)
def test_what_an_idempotent_stage_says_of_its_own_accord_answers_for_an_attempt_in_doubt(
    idempotent: bool, kind: FailureKind, doubt: bool
) -> None:
    began = replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, idempotent=idempotent)]))
    timed_out = StageFailed(stage="a", failure=Failure.of("a", FailureKind.TIMEOUT, "too slow"), in_doubt=True, will_retry=True)
    says = StageFailed(stage="a", failure=Failure.of("a", kind, "no"))

    state = SagaState([began, StageStarted(stage="a", attempt=1), timed_out, StageStarted(stage="a", attempt=2), says])

    assert state.stages["a"].doubt is doubt


ANSWERED = StageProbed(stage="a", landed=False)


@pytest.mark.parametrize(
    ("before", "landed", "answer"),
    [
        (DONE, True, None),
        ([*PATHS[StageState.FAILED], ANSWERED, COMES_LATE], True, True),
        ([*PATHS[StageState.FAILED], ANSWERED, COMES_LATE], None, False),
    ],
    ids=["never asked", "came late to its answer", "no answer"],
)
def test_what_a_probe_tells_of_an_undoing_corrects_what_it_answered_before_and_nothing_else(
    before: list[AnyEvent], landed: bool | None, answer: bool | None
) -> None:
    undoing: list[AnyEvent] = [BACK, UNDONE[0], CompensationFailed(stage="a", failure=FAILURE, will_retry=True)]

    record = SagaState([STARTED, *before, *undoing, StageProbed(stage="a", landed=landed)]).stages["a"]

    assert record.answer is answer


UNANSWERED = StageProbed(stage="a", landed=None, failure=Failure.of("a", FailureKind.COMPENSATION, "no line"))
ON = ContinueWithFallback()


@pytest.mark.parametrize(
    ("policy", "offers", "path", "awaits"),
    [
        (ON, {"has_fallback": True}, PATHS[StageState.FAILED], True),
        (ON, {}, PATHS[StageState.FAILED], False),
        (FailFast(), {"has_fallback": True}, PATHS[StageState.FAILED], False),
        (ON, {"has_fallback": True, "can_probe": True}, PATHS[StageState.FAILED], False),
        (ON, {"has_fallback": True, "can_probe": True}, [*PATHS[StageState.FAILED], ANSWERED], True),
        (ON, {"has_fallback": True, "can_probe": True}, [*PATHS[StageState.FAILED], UNANSWERED], True),
        (ON, {"has_fallback": True, "can_probe": True}, [*RETRIED[:2], ANSWERED], False),
        (ON, {"has_fallback": True, "can_probe": True}, [*PATHS[StageState.FAILED], BACK, ANSWERED], False),
    ],
    ids=["failed", "has none", "is not to go on", "not asked", "nothing landed", "no answer", "to be tried again", "turned back"],
)
def test_a_stage_awaits_its_own_fallback_once_it_has_failed_for_good_and_was_asked(
    policy: Policy, offers: dict[str, bool], path: list[AnyEvent], awaits: bool
) -> None:
    began = replace(STARTED, policy=policy, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, **offers)]))  # type: ignore[arg-type] # the offers are bools

    assert SagaState([began, *path]).stages["a"].awaits_fallback is awaits


@pytest.mark.parametrize("fell_back", [False, True])
def test_what_a_probe_finds_of_a_stage_that_was_begun_to_be_undone_in_doubt_is_what_it_gave(fell_back: bool) -> None:
    """Not what stood in for it."""
    cheap = FallbackUsed(stage="a", output=StageOutput.ok(cheap=True), source="stage")
    died = CompensationFailed(stage="a", failure=LOST, will_retry=True)
    began: list[AnyEvent] = [*PATHS[StageState.IN_DOUBT], *([cheap] if fell_back else []), BACK, CompensationStarted(stage="a", attempt=1)]

    record = SagaState([STARTED, *began, died, StageProbed(stage="a", landed=True, output=OUTPUT)]).stages["a"]

    assert (record.landed, record.doubt, record.answer) == (True, False, True)
    assert (record.late_output if fell_back else record.output) == OUTPUT
