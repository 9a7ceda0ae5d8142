"""Events in words."""

from __future__ import annotations

from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    FallbackFailed,
    FallbackUsed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageEvent,
    StageFailed,
    StageProbed,
    StageSettled,
    StageSkipped,
    StageStarted,
    TurnReason,
)
from saga.failures import Failure, FailureKind, in_its_words
from saga.text import printable


def tell(event: AnyEvent) -> str:
    """An event as a line; empty if it is of no interest to somebody who looks on."""
    if not isinstance(event, StageEvent):
        return printable(_of_saga(event))
    said = _of_undoing(event) or _of_stage(event)
    return printable(f"{event.stage}: {said}") if said else ""


def _of_saga(event: SagaStarted | SagaResumed | SagaStopped | SagaTurnedBack | SagaEnded) -> str:
    match event:
        case SagaStarted():
            return f"{event.pipeline} started"
        case SagaResumed(forward=forward):
            return f"goes on {'forward' if forward else 'backward'}, resumed by {event.by}"
        case SagaStopped():
            return f"stopped: {event.cause}"
        case SagaTurnedBack(cause=None, reason=TurnReason.ORPHANS):
            return "turned back: some of what was done serves nothing that is kept"
        case SagaTurnedBack():
            return f"turned back: {event.cause or 'it is undone on request'}"
        case _:
            return event.status.value.upper()


def _of_stage(event: StageEvent) -> str:
    match event:
        case StageStarted():
            return "started" + _attempt(event.attempt)
        case StageCompleted():
            return "completed" + (" late" if event.late else "")
        case StageFailed():
            return said(event.failure) + ("; in doubt" if event.in_doubt else "") + _again(event)
        case StageSkipped():
            return f"skipped, {event.reason}"
        case FallbackUsed():
            return "its fallback stands in"
        case FallbackFailed():
            return f"its fallback failed: {said(event.failure)}"
        case StageProbed():
            return _answer(event)
        case StageSettled():
            return f"settled as {event.verdict.value} by {event.by}: {event.note}"
        case _:
            return ""


def _of_undoing(event: StageEvent) -> str:
    match event:
        case CompensationStarted():
            return "being undone" + _attempt(event.attempt)
        case CompensationCompleted():
            return "undone" + (" late" if event.late else "")
        case CompensationFailed():
            return said(event.failure) + _again(event)
        case _:
            return ""


def _attempt(number: int) -> str:
    return f", attempt {number}" if number > 1 else ""


def _again(event: StageFailed | CompensationFailed | StageProbed) -> str:
    # Whether a stage that a crash cut off may run again is found out after it has been told of.
    is_open = isinstance(event, StageFailed) and event.failure.kind is FailureKind.CRASHED
    # Its probe, if it has one, may say that there is nothing left to try.
    is_asked = isinstance(event, CompensationFailed) or (isinstance(event, StageFailed) and event.in_doubt)
    return f"; it is {'asked or ' * is_asked}tried again" if event.will_retry and not is_open else ""


def _answer(event: StageProbed) -> str:
    if event.failure is None:
        return f"asked, it has {'' if event.landed else 'not '}landed"
    if event.is_of_late:
        return said(event.failure)
    return f"asked, no answer{in_its_words(event.failure)}{_again(event)}"


def said(failure: Failure) -> str:
    """A failure without its stage, which is named beside it."""
    return str(failure).removeprefix(f"stage {failure.stage!r} ")
