"""How a saga goes on that nobody runs: read off its events alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from stageflow.api import StageOutput

from saga import ContinueWithFallback, Failure, FailureKind, SagaStatus, StageState
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    FallbackFailed,
    SagaEnded,
    SagaResumed,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSettled,
    StageStarted,
    TurnReason,
    Verdict,
)
from saga.graph import Graph, Node, Role
from saga.resumption import Direction, crashed, resumption, status_at_rest, undoing
from saga.state import SagaState
from tests.test_ledger import FAILURE, HALTED, PATHS, RUNS_ON, STARTED

GONE = "its process is gone; what became of it is not in the ledger"
SKIP_BRANCH = ContinueWithFallback(without_fallback="skip_branch")


@pytest.mark.parametrize("policy", [None, ContinueWithFallback()], ids=["fail fast", "no fallback"])
def test_a_saga_that_a_stage_had_stopped_when_its_process_died_starts_nothing_more(policy: Any) -> None:
    chapter = resumption([STARTED, *PATHS[StageState.FAILED]], policy=policy, forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.CONCLUDE, FAILURE)


@pytest.mark.parametrize("policy", [SKIP_BRANCH, ContinueWithFallback(fallbacks={"a": {}})], ids=["skip the branch", "a fallback"])
def test_a_saga_that_a_failed_stage_does_not_stop_goes_on_when_its_process_died(policy: Any) -> None:
    chapter = resumption([STARTED, *PATHS[StageState.FAILED]], policy=policy, forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.FORWARD, None)


def test_a_saga_whose_fallback_had_failed_when_its_process_died_starts_nothing_more() -> None:
    began = replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, has_fallback=True)]))
    fell_back = FallbackFailed(stage="a", failure=FAILURE)

    chapter = resumption([began, *PATHS[StageState.FAILED], fell_back], policy=ContinueWithFallback(), forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.CONCLUDE, FAILURE)


def test_what_was_to_run_again_when_the_process_died_still_is() -> None:
    chapter = resumption([STARTED, *PATHS[StageState.FAILED], HALTED, RUNS_ON], forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.FORWARD, None)


def test_what_had_stopped_a_saga_beside_its_stages_when_its_process_died_still_does() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    chapter = resumption([STARTED, *PATHS[StageState.KEPT], SagaStopped(cause=late)], forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.CONCLUDE, late)


def test_of_several_stages_that_failed_before_the_process_died_the_first_had_stopped_the_saga() -> None:
    began = replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE), Node(name="b", role=Role.COMPENSABLE)]))
    first, second = (Failure.of(stage, FailureKind.REPORTED, "no") for stage in "ba")
    starts = [StageStarted(stage=stage, attempt=1) for stage in "ab"]
    fails = [StageFailed(stage="b", failure=first), StageFailed(stage="a", failure=second)]

    chapter = resumption([began, *starts, *fails], forward=None, by="ann")

    assert chapter.stop == first


def test_an_attempt_whose_process_died_is_told_as_that_although_one_before_it_had_failed() -> None:
    attempts: list[AnyEvent] = [
        StageStarted(stage="a", attempt=1),
        StageFailed(stage="a", failure=FAILURE, will_retry=True),
        StageStarted(stage="a", attempt=2),
    ]

    (failed,) = crashed(SagaState([STARTED, *attempts]), goes_on=True)

    assert isinstance(failed, StageFailed)
    assert (failed.in_doubt, failed.will_retry) == (True, True)
    assert (failed.failure.stage, failed.failure.kind, failed.failure.attempt) == ("a", FailureKind.CRASHED, 2)
    assert failed.failure.message == GONE


def test_a_stage_that_waited_for_its_next_attempt_when_its_process_died_has_failed_as_it_had() -> None:
    state = SagaState([STARTED, StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE, will_retry=True)])

    (failed,) = crashed(state, goes_on=False)

    assert isinstance(failed, StageFailed)
    assert (failed.failure, failed.in_doubt, failed.will_retry) == (FAILURE, False, False)
    assert crashed(state, goes_on=True) == []


def test_a_compensation_whose_process_died_has_failed_and_is_attempted_again() -> None:
    (failed,) = crashed(SagaState([STARTED, *PATHS[StageState.COMPENSATING]]), goes_on=False)

    assert isinstance(failed, CompensationFailed)
    assert failed.will_retry is True
    assert (failed.stage, failed.failure.stage, failed.failure.kind, failed.failure.attempt) == ("a", "a", FailureKind.CRASHED, 1)
    assert failed.failure.message == GONE


def test_a_saga_whose_process_died_is_undone_on_demand_with_what_it_ran_in_doubt() -> None:
    chapter = undoing([STARTED, *PATHS[StageState.RUNNING]], by="ann")

    assert (chapter.direction, chapter.reason) == (Direction.BACKWARD, TurnReason.REQUEST)
    failed, turned = chapter.events
    assert isinstance(failed, StageFailed)
    assert (failed.stage, failed.in_doubt, failed.will_retry) == ("a", True, False)
    assert isinstance(turned, SagaTurnedBack)


def test_a_stuck_saga_whose_stage_is_to_be_tried_again_goes_on_backward() -> None:
    stuck = SagaEnded(status=SagaStatus.STUCK)
    retry = StageSettled(stage="a", verdict=Verdict.RETRY, note="the bank is back", by="ann")

    chapter = resumption([STARTED, *PATHS[StageState.STUCK], stuck, retry, stuck], forward=None, by="ann")

    assert (chapter.direction, chapter.reason) == (Direction.BACKWARD, TurnReason.REQUEST)


def test_a_changed_policy_is_recorded_on_the_way_back_too() -> None:
    chapter = resumption([STARTED, *PATHS[StageState.COMPENSATING]], policy=SKIP_BRANCH, forward=None, by="ann")

    resumed = chapter.events[0]
    assert isinstance(resumed, SagaResumed)
    assert (resumed.forward, resumed.policy) == (False, SKIP_BRANCH)


def test_a_saga_whose_process_died_on_its_way_back_is_undone_by_whoever_demands_it() -> None:
    chapter = undoing([STARTED, *PATHS[StageState.COMPENSATING]], by="ann")

    assert chapter.direction is Direction.BACKWARD
    resumed, failed = chapter.events
    assert isinstance(resumed, SagaResumed)
    assert (resumed.forward, resumed.by) == (False, "ann")
    assert isinstance(failed, CompensationFailed)


def test_a_saga_rid_of_what_served_nothing_is_stuck_when_something_came_late_within_what_it_keeps() -> None:
    nodes = [Node(name="a", role=Role.COMPENSABLE), Node(name="b", role=Role.COMPENSABLE), Node(name="c", dependencies=("b",))]
    began = replace(STARTED, graph=Graph.of(nodes), policy=SKIP_BRANCH)
    ran: list[AnyEvent] = [StageStarted(stage=stage, attempt=1) for stage in "ab"]
    ran += [StageCompleted(stage=stage, output=StageOutput.ok()) for stage in "ab"]
    failed: list[AnyEvent] = [
        StageStarted(stage="c", attempt=1),
        StageFailed(stage="c", failure=Failure.of("c", FailureKind.REPORTED, "no")),
    ]
    undone: list[AnyEvent] = [
        SagaTurnedBack(reason=TurnReason.ORPHANS),
        CompensationStarted(stage="b", attempt=1),
        CompensationCompleted(stage="b"),
    ]
    ended: list[AnyEvent] = [began, *ran, *failed, *undone, SagaEnded(status=SagaStatus.DEGRADED)]
    before, after = SagaState(ended), SagaState([*ended, StageProbed(stage="a", landed=None, failure=FAILURE)])

    assert status_at_rest(before) is SagaStatus.DEGRADED
    assert status_at_rest(after) is SagaStatus.STUCK
    assert after.stages["a"].state is StageState.IN_DOUBT
