"""OpenTelemetry as a listener: spans and metrics. It needs the extra `otel`, and is the only file that knows OpenTelemetry."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from opentelemetry import context as contexts
from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode, TracerProvider
from opentelemetry.util.types import Attributes

from saga.errors import LedgerCorrupt, SagasDamaged
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
    SagaStatus,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageEvent,
    StageFailed,
    StageProbed,
    StageSkipped,
    StageStarted,
    at_rest,
    reads_only,
)
from saga.failures import Failure, FailureKind
from saga.ledger import Ledger, StageState, listed
from saga.recovery import stage_states
from saga.recovery.state import SagaState

SCOPE: Final = "saga"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_WAITING: Final = (StageState.STUCK, StageState.IN_DOUBT)
_MAY_WAIT: Final = frozenset({SagaStatus.STUCK, SagaStatus.HALTED})
"""Where a saga may have such stages: one that halts keeps its doubt."""
_UNKNOWN: Final = "unknown"


@dataclass(slots=True)
class _Attempt:
    """An attempt that runs: of a stage or, with `undoes`, of its compensation."""

    span: Span
    began: datetime
    undoes: bool


@dataclass(slots=True)
class _Saga:
    """What is remembered of one saga.

    Attributes:
        pipeline: Its pipeline's name, if its start was seen.
        state: The fold of its events; None if its start was not seen, or nothing of it can change any more.
        root: Its span; None while it is at rest.
        inside: The context in which its attempts' spans begin.
        began: When its root span did.
        status: RUNNING or COMPENSATING, as it is counted among the active ones; None while it is at rest.
        attempts: By stage, those that run.
        executions: By stage, the span of the last attempt to execute it.
        failed: By stage, what its last attempt was to do, if that failed and another one may follow.
        cause: What went wrong since it was started or went on.
        waiting: How many stages are counted as stuck, and how many as in doubt.
    """

    pipeline: str = _UNKNOWN
    state: SagaState | None = None
    root: Span | None = None
    inside: Context = field(default_factory=Context)
    began: datetime = _EPOCH
    status: SagaStatus | None = None
    attempts: dict[str, _Attempt] = field(default_factory=dict)
    executions: dict[str, SpanContext] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cause: Failure | None = None
    waiting: Counter[StageState] = field(default_factory=Counter)


@reads_only
class OpenTelemetryListener:
    """Makes spans and metrics of a saga's events: `SagaCoordinator(..., listeners=[OpenTelemetryListener()])`.

    The names are in docs/reference/telemetry.md. A stage's code, and that of its compensation, runs with its attempt's span as the
    current one; a saga's span is a child of whatever span was current where the saga was run.

    A saga whose start this listener was not told of has spans, too, without the pipeline's name; its stages that are stuck or in doubt
    are not counted.

    Args:
        tracer_provider: Makes the spans; None: the global one.
        meter_provider: Takes the measurements; None: the global one.
        remember: Of how many sagas at rest, the last ones, to remember what links and counts need if they go on: a few hundred bytes a
            stage, and the outputs of those in which something failed. Those in which something waits for a person come on top.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None, *, remember: int = 1000
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._active = meter.create_up_down_counter("saga.active", "{saga}", "Sagas that are running or compensating now.")
        self._duration = meter.create_histogram("saga.duration", "s", "How long sagas took until they came to rest.")
        self._executed = meter.create_histogram("saga.stage.duration", "s", "How long attempts of stages took.")
        self._compensated = meter.create_histogram("saga.compensation.duration", "s", "How long attempts of compensations took.")
        self._retries = meter.create_counter("saga.retries", "{retry}", "Attempts that failed and were followed by another one.")
        self._waiting = {
            StageState.STUCK: meter.create_up_down_counter("saga.stage.stuck", "{stage}", "Stages of sagas at rest that are stuck now."),
            StageState.IN_DOUBT: meter.create_up_down_counter(
                "saga.stage.in_doubt", "{stage}", "Stages of sagas at rest that are in doubt now."
            ),
        }
        self._alive: dict[str, _Saga] = {}
        self._unsettled: dict[str, _Saga] = {}
        self._at_rest: OrderedDict[str, _Saga] = OrderedDict()
        self._remember = remember

    def __call__(self, saga_id: str, event: AnyEvent) -> None:
        """Take in an event."""
        event = at_rest(event)
        saga = self._alive.get(saga_id) or self._resting(saga_id)
        _fold(saga, event)
        match event:
            case SagaStarted() | SagaResumed():
                self._begin(saga_id, saga, event)
                self._counts_as(saga, SagaStatus.RUNNING if isinstance(event, SagaStarted) or event.forward else SagaStatus.COMPENSATING)
            case SagaTurnedBack():
                self._begin(saga_id, saga, event)
                self._counts_as(saga, SagaStatus.COMPENSATING)
                # A failure may outweigh the CANCEL that has stopped it.
                saga.cause = event.cause or saga.cause
                self._note(saga, event, {"saga.turn.reason": event.reason.value})
            case SagaEnded():
                self._end(saga_id, saga, event)
            case SagaStopped():
                saga.cause = saga.cause or event.cause
                self._note(saga, event, _failed(event.cause))
            case StageStarted() | CompensationStarted():
                self._attempt(saga_id, saga, event)
            case _:
                self._on_stage(saga, event)

    async def survey(self, ledger: Ledger) -> None:
        """Count what waits in a ledger for a person, also where this listener was told of nothing.

        A process that has just started knows nothing of the sagas that wait from before, and none learns what others settle. Have one
        process call this, when it starts and as often as it pleases.

        Raises:
            SagasDamaged: Some sagas can't be read; what waits in all others is counted.
            LedgerError: The ledger can't be read.
        """
        waiting, damaged = await listed(ledger, _MAY_WAIT)
        unread: dict[str, LedgerCorrupt] = {}
        for saga_id in {*waiting, *damaged, *self._unsettled}:
            try:
                events = await ledger.read(saga_id)
                state = SagaState(events) if events else None
            except LedgerCorrupt as error:
                unread[saga_id] = error
                continue
            # Any number of them may have halted: in memory is only what waits, or did.
            if state is not None and saga_id not in self._alive and (_waiting_in(state) or saga_id in self._unsettled):
                saga = self._resting(saga_id)
                saga.state, saga.pipeline = state, state.started.pipeline
                self._rest(saga_id, saga)
        if unread:
            raise SagasDamaged(unread, [entry for entry in waiting.values() if entry.saga_id not in unread])

    # -- the saga ------------------------------------------------------------------------------------------------

    def _begin(self, saga_id: str, saga: _Saga, event: SagaStarted | SagaResumed | SagaTurnedBack) -> None:
        """Begin its span, if it was at rest or unknown."""
        if saga.root is not None:
            return
        attributes = {"saga.id": saga_id, "saga.pipeline.name": saga.pipeline}
        if isinstance(event, SagaStarted) and event.parent is not None and event.parent_stage is not None:
            attributes |= {"saga.parent.id": event.parent, "saga.parent.stage.name": event.parent_stage}
        saga.root = self._tracer.start_span(f"saga {saga.pipeline}", attributes=attributes, start_time=_nanoseconds(event.at))
        saga.inside = trace.set_span_in_context(saga.root)
        saga.began, saga.cause = event.at, None
        # Whoever goes on with it may mend what waits; what still does is counted when it has come to rest again.
        self._counts_waiting(saga, Counter())
        self._forget(saga_id)
        self._alive[saga_id] = saga

    def _end(self, saga_id: str, saga: _Saga, event: SagaEnded) -> None:
        if saga.root is not None:
            cause = event.cause or saga.cause
            saga.root.set_attribute("saga.status", event.status.value)
            # What was undone because somebody asked for it is no error.
            if cause is not None or event.status is SagaStatus.STUCK:
                saga.root.set_status(Status(StatusCode.ERROR, event.status.value if cause is None else f"{event.status.value}: {cause}"))
            ended = _not_before(saga.began, event.at)
            saga.root.end(_nanoseconds(ended))
            taken = {"saga.pipeline.name": saga.pipeline, "saga.status": event.status.value}
            self._duration.record((ended - saga.began).total_seconds(), taken)
            self._counts_as(saga, None)
            saga.root, saga.inside = None, Context()
            saga.failed.clear()
        self._alive.pop(saga_id, None)
        self._rest(saga_id, saga)

    def _rest(self, saga_id: str, saga: _Saga) -> None:
        """Remember a saga that has come to rest, count what waits in it, and forget the one that has rested longest if nothing does."""
        if saga.state is not None:
            self._counts_waiting(saga, _waiting_in(saga.state))
            if saga.state.is_spotless:
                # Nothing in it waits, and nothing can come late.
                saga.state = None
        self._forget(saga_id)
        if saga.waiting.total():
            # It is remembered until it is settled: an alert that ends by itself has lied.
            self._unsettled[saga_id] = saga
            return
        self._at_rest[saga_id] = saga
        while len(self._at_rest) > self._remember:
            self._at_rest.popitem(last=False)

    def _resting(self, saga_id: str) -> _Saga:
        return self._unsettled.get(saga_id) or self._at_rest.get(saga_id) or _Saga()

    def _forget(self, saga_id: str) -> None:
        self._unsettled.pop(saga_id, None)
        self._at_rest.pop(saga_id, None)

    def _counts_as(self, saga: _Saga, status: SagaStatus | None) -> None:
        for was, change in ((saga.status, -1), (status, 1)):
            if was is not None:
                self._active.add(change, {"saga.pipeline.name": saga.pipeline, "saga.status": was.value})
        saga.status = status

    def _counts_waiting(self, saga: _Saga, waiting: Counter[StageState]) -> None:
        for state in _WAITING:
            if waiting[state] != saga.waiting[state]:
                self._waiting[state].add(waiting[state] - saga.waiting[state], {"saga.pipeline.name": saga.pipeline})
        saga.waiting = waiting

    # -- its stages ----------------------------------------------------------------------------------------------

    def _attempt(self, saga_id: str, saga: _Saga, event: StageStarted | CompensationStarted) -> None:
        undoes = isinstance(event, CompensationStarted)
        links = [Link(saga.executions[event.stage])] if undoes and event.stage in saga.executions else []
        span = self._tracer.start_span(
            f"{'compensate' if undoes else 'execute'} {event.stage}",
            saga.inside,
            attributes={"saga.id": saga_id, "saga.stage.name": event.stage, "saga.stage.attempt": event.attempt},
            links=links,
            start_time=_nanoseconds(event.at),
        )
        if isinstance(event, StageStarted):
            span.set_attribute("saga.stage.execution", event.execution)
            saga.executions[event.stage] = span.get_span_context()
        saga.attempts[event.stage] = _Attempt(span, event.at, undoes)
        if saga.failed.pop(event.stage, None) == (action := "compensate" if undoes else "execute"):
            self._retried(saga, event.stage, action)
        # An attempt's start is told in the task that then runs the user's code, and in no other.
        contexts.attach(trace.set_span_in_context(span, saga.inside))

    def _on_stage(self, saga: _Saga, event: StageEvent) -> None:
        match event:
            case StageCompleted() | StageSkipped() | CompensationCompleted():
                self._close(saga, event, None)
            case StageFailed() | CompensationFailed():
                self._close(saga, event, event.failure)
                if event.will_retry:
                    # What its probe says may come first, and leave nothing to attempt.
                    saga.failed[event.stage] = "execute" if isinstance(event, StageFailed) else "compensate"
            case StageProbed():
                if event.will_retry:
                    self._retried(saga, event.stage, "probe")
                answer: Attributes = {} if event.landed is None else {"saga.stage.landed": event.landed}
                self._note(saga, event, answer if event.failure is None else _failed(event.failure))
            case FallbackFailed():
                self._note(saga, event, _failed(event.failure))
            case FallbackUsed() | EffectRecorded():
                self._note(saga, event, {})
            case _:
                # StageSettled: nobody runs the saga, so there is no span to note it on; what it changes is counted at its end.
                pass

    def _retried(self, saga: _Saga, stage: str, action: str) -> None:
        self._retries.add(1, {"saga.pipeline.name": saga.pipeline, "saga.stage.name": stage, "saga.action": action})

    def _close(self, saga: _Saga, event: StageEvent, failure: Failure | None) -> None:
        """End the span of an attempt; what comes without one, or late, has none."""
        attempt = saga.attempts.pop(event.stage, None)
        if attempt is None:
            return
        measured = {"saga.pipeline.name": saga.pipeline, "saga.stage.name": event.stage}
        if failure is not None:
            measured["error.type"] = _error_type(failure)
            attempt.span.set_attribute("error.type", _error_type(failure))
            attempt.span.add_event("exception", _failed(failure), _nanoseconds(failure.at))
            attempt.span.set_status(Status(StatusCode.ERROR, str(failure)))
        if isinstance(event, StageFailed):
            attempt.span.set_attribute("saga.stage.in_doubt", event.in_doubt)
        ended = _not_before(attempt.began, event.at)
        attempt.span.end(_nanoseconds(ended))
        durations = self._compensated if attempt.undoes else self._executed
        durations.record((ended - attempt.began).total_seconds(), measured)

    def _note(self, saga: _Saga, event: AnyEvent, attributes: Attributes) -> None:
        """Add an event to the span of the stage's attempt, else to the saga's."""
        stage = {"saga.stage.name": event.stage} if isinstance(event, StageEvent) else {}
        attempt = saga.attempts.get(stage.get("saga.stage.name", ""))
        span = attempt.span if attempt is not None else saga.root
        if span is not None:
            span.add_event(f"saga.{event.event.removeprefix('saga_')}", {**stage, **(attributes or {})}, _nanoseconds(event.at))


def _waiting_in(state: SagaState) -> Counter[StageState]:
    """How many stages are stuck, and how many in doubt."""
    return Counter(shown for shown in stage_states(state).values() if shown in _WAITING)


def _fold(saga: _Saga, event: AnyEvent) -> None:
    if isinstance(event, SagaStarted):
        saga.pipeline, saga.state = event.pipeline, SagaState([event])
        return
    if saga.state is None:
        return
    try:
        saga.state.apply(event)
    except LedgerCorrupt:
        # Another process went on with the saga, and what it recorded was told there. The spans still tell of this one.
        saga.state = None


def _not_before(began: datetime, ended: datetime) -> datetime:
    """When something ended; it took no time if the clock was set back: OpenTelemetry drops a negative one, and would not count it."""
    return max(began, ended)


def _nanoseconds(at: datetime) -> int:
    # By whole numbers: a float of nanoseconds since 1970 is off by hundreds of them.
    return (at - _EPOCH) // timedelta(microseconds=1) * 1000


def _error_type(failure: Failure) -> str:
    return failure.type if failure.kind in {FailureKind.EXCEPTION, FailureKind.COMPENSATION} and failure.type else failure.kind.value


def _failed(failure: Failure) -> dict[str, str]:
    """What OpenTelemetry records of an exception, from what the ledger knows of it."""
    told = {"exception.type": failure.type or failure.kind.value, "exception.message": failure.message}
    return told if failure.traceback is None else told | {"exception.stacktrace": failure.traceback}
