"""The standard library's logging as a listener: one line per event, under the logger `saga`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    Event,
    FallbackFailed,
    FallbackUsed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaStatus,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSettled,
    StageSkipped,
    StageStarted,
    reads_only,
)
from saga.failures import FailureKind, in_its_words
from saga.render.wording import counted
from saga.text import printable

_LOG: Final = logging.getLogger("saga")
_Words = tuple[int, str]
_AGAIN: Final = "; another attempt follows"
_ASKED: Final = "; it is asked or attempted again"
"""Where its probe, if it has one, may say that there is nothing left to attempt, or no attempt is left."""


@reads_only
def log_events(saga_id: str, event: AnyEvent) -> None:
    """Log an event: `SagaCoordinator(..., listeners=[log_events])`.

    Every record has the fields `saga_id`, `saga_event`, `stage` and `attempt`, the last two None where an event has none.

    What goes well is DEBUG for a stage and INFO for a saga; what goes wrong and is dealt with is WARNING; ERROR is what a person has to
    act on: a stuck compensation, a probe that gave no answer, what came late and only a person can answer, a saga that ends stuck.
    """
    level, words = _SAY[type(event)](event)
    if not _LOG.isEnabledFor(level):
        # The logger would find out, too; with what is made for it, a saga whose DEBUG is off pays twice as much.
        return
    failure = getattr(event, "failure", None)
    attempt = getattr(event, "attempt", None) if failure is None else failure.attempt
    # Not `event`: structlog keeps the message under that name, and the Elastic Common Schema an object.
    fields = {"saga_id": saga_id, "saga_event": event.event, "stage": getattr(event, "stage", None), "attempt": attempt}
    # A stage's own words may have line breaks, and be looked at with a tool that goes by lines, or in a terminal.
    _LOG.log(level, "saga %s: %s", printable(saga_id), printable(words), extra=fields)


def _saga_started(event: SagaStarted) -> _Words:
    child = "" if event.parent is None else f" for stage {event.parent_stage!r} of saga {event.parent}"
    return logging.INFO, f"started {event.pipeline!r}, {counted(len(event.graph.names), 'stage')}{child}"


def _saga_stopped(event: SagaStopped) -> _Words:
    return logging.WARNING, f"starts no further stage: {event.cause}"


def _saga_turned_back(event: SagaTurnedBack) -> _Words:
    cause = "" if event.cause is None else f": {event.cause}"
    return logging.WARNING, f"turned back ({event.reason.value}){cause}"


def _saga_resumed(event: SagaResumed) -> _Words:
    return logging.INFO, f"resumed by {event.by}, going {'forward' if event.forward else 'backward'}"


def _saga_ended(event: SagaEnded) -> _Words:
    level = {SagaStatus.STUCK: logging.ERROR, SagaStatus.HALTED: logging.WARNING}.get(event.status, logging.INFO)
    cause = "" if event.cause is None else f": {event.cause}"
    return level, f"ended {event.status.value}{cause}"


def _stage_started(event: StageStarted) -> _Words:
    return logging.DEBUG, f"stage {event.stage!r} started, attempt {event.attempt}"


def _effect_recorded(event: EffectRecorded) -> _Words:
    # What the effect is may be a secret, or long: it is in the ledger.
    return logging.DEBUG, f"stage {event.stage!r} recorded an effect"


def _stage_completed(event: StageCompleted) -> _Words:
    if event.late:
        return logging.WARNING, f"stage {event.stage!r} completed late, after it had been given up"
    return logging.DEBUG, f"stage {event.stage!r} completed"


def _stage_failed(event: StageFailed) -> _Words:
    doubt = "; whether its effect landed is in doubt" if event.in_doubt else ""
    # Whether one that a crash cut off may run again is found out later.
    again = "" if not event.will_retry or event.failure.kind is FailureKind.CRASHED else _ASKED if event.in_doubt else _AGAIN
    return logging.WARNING, f"{event.failure}{doubt}{again}"


def _stage_skipped(event: StageSkipped) -> _Words:
    level = logging.WARNING if event.with_branch else logging.DEBUG
    return level, f"stage {event.stage!r} was skipped: {event.reason}"


def _fallback_used(event: FallbackUsed) -> _Words:
    return logging.WARNING, f"stage {event.stage!r} goes on with the fallback of its {event.source}"


def _fallback_failed(event: FallbackFailed) -> _Words:
    return logging.WARNING, f"the fallback of stage {event.stage!r} failed: {event.failure}"


def _stage_probed(event: StageProbed) -> _Words:
    if event.landed is not None:
        return logging.DEBUG, f"stage {event.stage!r} was probed: its effect {'landed' if event.landed else 'did not land'}"
    assert event.failure is not None  # it is why there is no answer
    if event.is_of_late:
        return logging.ERROR, str(event.failure)
    # Why a probe failed has the kind of a compensation's failure; but nobody tried to undo anything.
    level, again = (logging.WARNING, _AGAIN) if event.will_retry else (logging.ERROR, "")
    return level, f"the probe of stage {event.stage!r} gave no answer{in_its_words(event.failure)}{again}"


def _compensation_started(event: CompensationStarted) -> _Words:
    return logging.DEBUG, f"the compensation of stage {event.stage!r} started, attempt {event.attempt}"


def _compensation_completed(event: CompensationCompleted) -> _Words:
    if event.late:
        return logging.WARNING, f"stage {event.stage!r} was undone late, after its compensation had been given up"
    return logging.DEBUG, f"stage {event.stage!r} is undone"


def _compensation_failed(event: CompensationFailed) -> _Words:
    if event.will_retry:
        return logging.WARNING, f"{event.failure}{_ASKED}"
    if event.past_pivot:
        return logging.WARNING, f"stage {event.stage!r} is past a pivot of its own and can't be undone: {event.failure}"
    return logging.ERROR, f"stage {event.stage!r} is stuck: {event.failure}"


def _stage_settled(event: StageSettled) -> _Words:
    return logging.INFO, f"stage {event.stage!r} was settled as {event.verdict.value} by {event.by}: {event.note}"


_SAY: Final[Mapping[type[Event], Callable[[Any], _Words]]] = {
    SagaStarted: _saga_started,
    SagaStopped: _saga_stopped,
    SagaTurnedBack: _saga_turned_back,
    SagaResumed: _saga_resumed,
    SagaEnded: _saga_ended,
    StageStarted: _stage_started,
    EffectRecorded: _effect_recorded,
    StageCompleted: _stage_completed,
    StageFailed: _stage_failed,
    StageSkipped: _stage_skipped,
    FallbackUsed: _fallback_used,
    FallbackFailed: _fallback_failed,
    StageProbed: _stage_probed,
    CompensationStarted: _compensation_started,
    CompensationCompleted: _compensation_completed,
    CompensationFailed: _compensation_failed,
    StageSettled: _stage_settled,
}
