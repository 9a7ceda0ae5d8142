"""What came late of a stage, when nobody waited for it any more, and what that tells its saga; pure."""

from __future__ import annotations

from typing import NamedTuple

from saga.events import CompensationCompleted, EffectRecorded, StageCompleted, StageProbed
from saga.failures import Failure, FailureKind
from saga.keys import execution_key
from saga.ledger import StageState
from saga.recovery.record import StageRecord, Step, undo_step
from saga.recovery.state import SagaState
from saga.text import glimpse

Latecomer = StageCompleted | EffectRecorded | CompensationCompleted
"""What code that was given up may come to after all."""


class Late(NamedTuple):
    """What code that was given up has come to after all, and of which run of its stage: that may have run again since.

    Attributes:
        event: What it has come to.
        execution: The stage's execution that it comes of.
        attempts: How many attempts of that had started by then.
        undo_attempts: How many of its compensation had.
    """

    event: Latecomer
    execution: int
    attempts: int
    undo_attempts: int


def news_of(state: SagaState, late: Late) -> Latecomer | StageProbed | None:
    """What came late of a stage, if it tells something new; what nobody but a person can make sense of, as a question."""
    event = late.event
    node, record = state.graph[event.stage], state.stages[event.stage]
    # One that was to run anew and did not get its turn is done with that execution, too.
    is_its_own = late.execution == record.execution and record.attempts > 0
    match event:
        case StageCompleted():
            # A probe, a person or another attempt has told before.
            is_known = is_its_own and record.state is StageState.KEPT
            may_follow = is_its_own
        case EffectRecorded():
            # Whoever has told of the stage before did not know of it.
            is_known = may_follow = False
        case _:
            is_known = record.state is StageState.UNDONE or undo_step(node, record) is Step.CLEAR
            # What has run since, or completed late meanwhile, it may have undone as well, or not.
            may_follow = is_its_own and late.attempts == record.attempts and late.undo_attempts > record.late_beside
    if is_known:
        return None
    if may_follow and state.may_follow(event):
        return event
    output = event.output if isinstance(event, StageCompleted) else None
    return StageProbed(stage=event.stage, landed=None, output=output, failure=_question(state, late, record), held=True)


def _question(state: SagaState, late: Late, record: StageRecord) -> Failure:
    """What came late, and what a person has to do about it."""
    event, saga_id = late.event, state.started.saga_id
    stage = event.stage
    which = f"execution {late.execution} (key {execution_key(saga_id, stage, late.execution)!r})"
    now = f"execution {record.execution} (key {execution_key(saga_id, stage, record.execution)!r})"
    if isinstance(event, CompensationCompleted):
        since = f"with {now}" if late.execution != record.execution else "with what it undoes"
        what = f"the compensation of {which} had been given up and completed late, when the saga had gone on {since}: that may be gone"
    else:
        since = f"the saga had gone on with {now}" if late.execution != record.execution else "the saga had gone on without it"
        came = "had been given up and completed late" if isinstance(event, StageCompleted) else f"recorded {glimpse(event.effect)} late"
        what = f"{which} {came}, when {since}: what it did may stand, and nothing undoes it"
    todo = (
        "Look in the outside world and put it right by hand, then settle it: kept if what the saga counts on stands, undone if nothing does"
    )
    return Failure.of(stage, FailureKind.LATE, f"{what}. {todo}", attempt=late.attempts)
