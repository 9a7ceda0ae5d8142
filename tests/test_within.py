"""What a saga makes of what came late in one that its stage ran, read off the events of both."""

from __future__ import annotations

from typing import Any

import pytest
from stageflow.api import StageOutput

from saga import FailFast, Failure, FailureKind, SagaReport, SagaStatus
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    FallbackUsed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
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
from saga.recovery.state import SagaState
from saga.within import heard

FAILURE = Failure.of("book", FailureKind.EXCEPTION, "no")
BACK = SagaTurnedBack(reason=TurnReason.REQUEST)
OK = StageOutput.ok()


def kept(stage: str, execution: int = 1) -> list[AnyEvent]:
    return [StageStarted(stage=stage, attempt=1, execution=execution), StageCompleted(stage=stage, output=OK)]


def undone(stage: str) -> list[AnyEvent]:
    return [CompensationStarted(stage=stage, attempt=1), CompensationCompleted(stage=stage)]


def child(saga_id: str, *events: AnyEvent) -> SagaState:
    """A saga of one stage that a stage `book` of saga `s` has run."""
    graph = Graph.of([Node(name="charge", role=Role.COMPENSABLE)])
    began = SagaStarted(saga_id=saga_id, pipeline="inner", graph=graph, policy=FailFast(), input={}, parent="s", parent_stage="book")
    return SagaState([began, *events])


def stuck(saga_id: str) -> SagaState:
    """Its stage was undone, and has completed late."""
    late = StageCompleted(stage="charge", output=OK, late=True)
    return child(saga_id, *kept("charge"), BACK, *undone("charge"), late, SagaEnded(status=SagaStatus.STUCK))


def halted(saga_id: str) -> SagaState:
    return child(saga_id, *kept("charge"), SagaEnded(status=SagaStatus.HALTED))


def compensated(saga_id: str) -> SagaState:
    return child(saga_id, *kept("charge"), BACK, *undone("charge"), SagaEnded(status=SagaStatus.COMPENSATED))


def stuck_going_forward(saga_id: str) -> SagaState:
    """It completed, and something of an execution before came late in it."""
    late = Failure.of("charge", FailureKind.LATE, "too late")
    question = StageProbed(stage="charge", landed=None, failure=late, held=True)
    return child(saga_id, *kept("charge"), question, SagaEnded(status=SagaStatus.STUCK))


def parent(*events: AnyEvent, role: Role = Role.COMPENSABLE, idempotent: bool = False) -> SagaState:
    graph = Graph.of([Node(name="book", role=role, idempotent=idempotent)])
    return SagaState([SagaStarted(saga_id="s", pipeline="outer", graph=graph, policy=FailFast(), input={}), *events])


REPLACED: list[AnyEvent] = [
    StageStarted(stage="book", attempt=1),
    StageFailed(stage="book", failure=FAILURE),
    FallbackUsed(stage="book", output=OK, source="stage", ran=("s/book#1.2",)),
]
UNDONE = [*kept("book"), BACK, *undone("book"), SagaEnded(status=SagaStatus.COMPENSATED)]
RUN_AGAIN = [*UNDONE, SagaResumed(forward=True, by="ann"), *kept("book", execution=2)]
UNDONE_AGAIN = [*RUN_AGAIN, BACK, *undone("book")]
KEPT_BY_WORD = [
    *kept("book"),
    BACK,
    CompensationStarted(stage="book", attempt=1),
    CompensationFailed(stage="book", failure=FAILURE),
    SagaEnded(status=SagaStatus.STUCK),
    StageSettled(stage="book", verdict=Verdict.KEPT, note="it is fine", by="ann"),
]


@pytest.mark.parametrize(
    ("above", "below"),
    [
        pytest.param(parent(*RUN_AGAIN), compensated("s/book"), id="nothing stands of an execution before"),
        pytest.param(parent(*RUN_AGAIN, role=Role.PLAIN), halted("s/book"), id="a plain stage has nothing to undo"),
        pytest.param(parent(*kept("book"), role=Role.PLAIN), stuck("s/book"), id="nor has it now"),
        pytest.param(parent(*UNDONE), compensated("s/book"), id="nothing stands of one that is done with"),
        pytest.param(parent(*kept("book")), stuck("s/book"), id="what is kept is undone with its stage"),
        pytest.param(parent(*kept("book"), idempotent=True), stuck("s/book"), id="it does not go on with one that turned back"),
        pytest.param(parent(*KEPT_BY_WORD, idempotent=True), stuck_going_forward("s/book"), id="a person keeps it with all within"),
        pytest.param(
            parent(
                StageStarted(stage="book", attempt=1),
                EffectRecorded(stage="book", effect="seat 1"),
                StageFailed(stage="book", failure=FAILURE),
            ),
            stuck("s/book"),
            id="its compensation is still to come",
        ),
    ],
)
def test_what_came_late_within_says_nothing_of_a_stage_that_finds_out_by_itself_or_has_no_part_in_it(
    above: SagaState, below: SagaState
) -> None:
    assert heard(above, below, SagaReport.of(below)) is None


@pytest.mark.parametrize("below", [stuck("s/book"), halted("s/book"), stuck("s/book#2")], ids=["stuck", "halted", "of another attempt"])
@pytest.mark.parametrize("path", [RUN_AGAIN, UNDONE_AGAIN], ids=["kept", "undone"])
def test_what_came_late_within_an_execution_before_is_for_a_person(path: list[AnyEvent], below: SagaState) -> None:
    question = heard(parent(*path), below, SagaReport.of(below))

    child_id = below.started.saga_id
    assert isinstance(question, StageProbed)
    assert (question.stage, question.landed, question.held) == ("book", None, True)
    assert question.failure is not None
    assert (question.failure.stage, question.failure.kind, question.failure.attempt) == ("book", FailureKind.LATE, 1)
    assert question.failure.message == (
        f"something came late in its saga {child_id}, of execution 1, when the saga had gone on with execution 2 (key 's/book~2'): "
        f"it stands, and nothing undoes it. Compensate {child_id} by itself, or look in the outside world and put it right by hand; "
        "then settle the stage: kept if what the saga counts on stands, undone if nothing does"
    )


@pytest.mark.parametrize(
    ("above", "below"),
    [
        pytest.param(parent(*UNDONE), stuck("s/book"), id="undone"),
        pytest.param(parent(*UNDONE), halted("s/book#2"), id="undone, by an attempt before"),
        pytest.param(parent(*UNDONE_AGAIN), stuck("s/book~2"), id="undone, in its second execution"),
        pytest.param(parent(*kept("book"), idempotent=True), stuck_going_forward("s/book"), id="kept, and goes on with it"),
        pytest.param(parent(*REPLACED), stuck("s/book"), id="behind a fallback that has run another one"),
    ],
)
def test_what_came_late_within_a_stage_that_was_done_with_it_has_it_undone_or_asked_again(above: SagaState, below: SagaState) -> None:
    news = heard(above, below, SagaReport.of(below))

    assert isinstance(news, StageProbed)
    assert news.failure is not None
    assert (news.failure.stage, news.failure.kind, news.failure.attempt) == ("book", FailureKind.COMPENSATION, 1)
    assert news.held is (below.stages["charge"].held is not None)


def test_what_came_late_within_a_stage_that_is_stuck_has_it_tried_again() -> None:
    above = parent(*kept("book"), BACK, CompensationStarted(stage="book", attempt=1), CompensationFailed(stage="book", failure=FAILURE))
    below = stuck("s/book")

    said: Any = heard(above, below, SagaReport.of(below))

    assert isinstance(said, StageSettled)
    assert (said.stage, said.verdict, said.by) == ("book", Verdict.RETRY, "saga s/book")
    assert said.note == "something came late in its saga s/book, which is stuck"
