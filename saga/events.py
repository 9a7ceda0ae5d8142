"""The events of a saga: what its ledger is made of.

Frozen, in the past tense, and complete: the state of a saga, its report and what to do next follow from
them and nothing else. They are slotted dataclasses, because a ledger in memory keeps many: a pydantic model is three
containers to the garbage collector, and cost a third of a saga's time. pydantic reads and writes their JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, partial
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import AwareDatetime, ConfigDict, Discriminator, TypeAdapter

from saga.failures import Failure, FailureKind, without_exception
from saga.graph import Graph
from saga.outputs import STRICT, Output, Plain, copied, copied_output
from saga.policies import Policy
from saga.quick import changer, frozen

T = TypeVar("T")


class SagaStatus(StrEnum):
    """Where a saga stands."""

    RUNNING = "running"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    """Every stage did its part."""
    DEGRADED = "degraded"
    """It went on with fallbacks, or without a branch."""
    COMPENSATED = "compensated"
    """It was undone: nothing is stuck, blocked or in doubt."""
    HALTED = "halted"
    """It failed, and what it did is kept; it can be redriven."""
    CANCELLED = "cancelled"
    """A stage cancelled it, and what it did is kept."""
    STUCK = "stuck"
    """Something is stuck, blocked or in doubt, and a person has to act."""


class TurnReason(StrEnum):
    """Why a saga goes backward."""

    FAILURE = "failure"
    """A stage failed, or the deadline passed."""
    CANCEL = "cancel"
    """A stage cancelled it, and the policy compensates then."""
    INTERRUPT = "interrupt"
    """Its caller was cancelled."""
    ORPHANS = "orphans"
    """It came to its end, and some effects serve nothing that is kept."""
    REQUEST = "request"
    """Somebody asked for it, when nobody ran it."""


class Verdict(StrEnum):
    """What a person says of a stage that is stuck or in doubt."""

    UNDONE = "undone"
    """Nothing of it stands: it was undone by hand, or its effect never landed."""
    KEPT = "kept"
    """Its effect stands and is to stay, with all that it depends on."""
    RETRY = "retry"
    """Whatever stood in the way is mended: undo it, or run it, once more."""


class _Written:
    """Has room for the line that an event is written as: it is checked and stored as the same one, and made once."""

    __slots__ = ("line",)
    line: str


@frozen
class Event(_Written):
    """What every event has.

    Attributes:
        at: When it was recorded, UTC.
    """

    # What a newer version of saga wrote is not read without what is new in it: a plan made of the rest would be another one.
    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    at: AwareDatetime = field(default_factory=partial(datetime.now, UTC))


@frozen
class SagaStarted(Event):
    """The saga exists: its graph and its input are fixed, its policy until it is resumed with another one.

    Attributes:
        saga_id: Its id.
        pipeline: The pipeline's name.
        graph: Its stages.
        policy: What happens when something fails.
        input: The fields of stageflow's context.
        parent: The id of the saga that runs it as a child, if one does.
        parent_stage: The parent's stage that does.
    """

    event: Literal["saga_started"] = "saga_started"
    saga_id: str
    pipeline: str
    graph: Graph
    policy: Policy
    input: Plain = field(default_factory=dict)
    parent: str | None = None
    parent_stage: str | None = None


@frozen
class StageEvent(Event):
    """An event of one stage."""

    stage: str


@frozen
class StageStarted(StageEvent):
    """An attempt of a stage is about to run.

    Attributes:
        attempt: Of this execution; 1 for the first.
        execution: 1, and one more each time that the stage runs again after it, or something that it depends on, was undone.
    """

    event: Literal["stage_started"] = "stage_started"
    attempt: int
    execution: int = 1


@frozen
class EffectRecorded(StageEvent):
    """A running stage noted a partial effect."""

    event: Literal["effect_recorded"] = "effect_recorded"
    effect: Plain


@frozen
class StageCompleted(StageEvent):
    """A stage gave its output: its effect has landed.

    Attributes:
        output: What it gave.
        late: It had been given up as in doubt, and nobody waited for it any more.
        not_kept: What of its output the ledger could not keep, and why; None if it keeps all of it.
    """

    event: Literal["stage_completed"] = "stage_completed"
    output: Output
    late: bool = False
    not_kept: str | None = None


@frozen
class StageFailed(StageEvent):
    """An attempt of a stage failed.

    Attributes:
        failure: How.
        in_doubt: Whether its effect may have landed all the same.
        will_retry: Whether another attempt follows, unless its probe says that its effect landed; of one that a crash cut off, unless it
            then turns out that none may.
        past_pivot: Whether it failed after a point of no return of its own: nothing that it depends on is undone.
        left_within: Whether sagas that it ran have left something standing; None: as before, or nobody has looked.
        output: What it returned beside the failure, if anything.
    """

    event: Literal["stage_failed"] = "stage_failed"
    failure: Failure
    in_doubt: bool = False
    will_retry: bool = False
    past_pivot: bool = False
    left_within: bool | None = None
    output: Output | None = None


@frozen
class StageSkipped(StageEvent):
    """A stage was skipped: by its own word, by its condition, by an interceptor's answer, or with its branch.

    Attributes:
        reason: Why.
        output: What its dependents get to see.
        with_branch: Whether it is skipped because something that it depends on failed.
        not_kept: What of its output the ledger could not keep, and why; None if it keeps all of it.
    """

    event: Literal["stage_skipped"] = "stage_skipped"
    reason: str
    output: Output
    with_branch: bool = False
    not_kept: str | None = None


@frozen
class FallbackUsed(StageEvent):
    """A failed stage's fallback became its output.

    Attributes:
        output: The output.
        source: Whose fallback it is.
        ran: The sagas that it ran, or went on with, and that came to their ends: they stand as long as something uses the fallback.
        left_within: Whether other sagas that the stage ran have left something standing; None: as before, or nobody has looked.
    """

    event: Literal["fallback_used"] = "fallback_used"
    output: Output
    source: Literal["stage", "policy"]
    ran: tuple[str, ...] = ()
    left_within: bool | None = None


@frozen
class FallbackFailed(StageEvent):
    """A failed stage's own fallback failed, too.

    Attributes:
        failure: How.
        left_within: Whether sagas that the stage or its fallback ran have left something standing; None: as before, or nobody has looked.
    """

    event: Literal["fallback_failed"] = "fallback_failed"
    failure: Failure
    left_within: bool | None = None


@frozen
class StageProbed(StageEvent):
    """A stage was asked whether its effect landed.

    Attributes:
        landed: The answer; None when the probe failed, or when something has come late, of the stage or in a saga that it ran.
        left_within: With `landed=False`, whether sagas that it ran have left something standing; None: as before, or nobody has looked.
        output: With `landed=True`, the output; with `held`, what that has given which came late.
        failure: With `landed=None`, how the probe failed, what came late, or where that saga stands.
        will_retry: Whether it is asked again.
        held: With `landed=None`, whether nobody runs the stage again before a person has said what stands of it, or within. Where it is
            its own code that came late (`FailureKind.LATE`), nobody asks or undoes it before that, either.
    """

    event: Literal["stage_probed"] = "stage_probed"
    landed: bool | None
    left_within: bool | None = None
    output: Output | None = None
    failure: Failure | None = None
    will_retry: bool = False
    held: bool = False

    @property
    def is_of_late(self) -> bool:
        """Whether nobody was asked: something came late, of the stage or in a saga that it ran."""
        failure = self.failure
        return failure is not None and not failure.of_probe and failure.kind is not FailureKind.INTERRUPTED


@frozen
class SagaStopped(Event):
    """Something other than a stage's failure has stopped the saga: no further stage starts. Another one behind it would have.

    Attributes:
        cause: The deadline, the caller's cancel, an interceptor's error; a stage's failure, if an interceptor's error comes behind that.
    """

    event: Literal["saga_stopped"] = "saga_stopped"
    cause: Failure


@frozen
class SagaTurnedBack(Event):
    """The fence: no stage runs any more; from here the saga goes backward.

    Attributes:
        reason: Why.
        cause: What stopped it, if that is not in the ledger yet.
        graph: Its stages with what they offer from here on; None: as before.
    """

    event: Literal["saga_turned_back"] = "saga_turned_back"
    reason: TurnReason
    cause: Failure | None = None
    graph: Graph | None = None


@frozen
class CompensationStarted(StageEvent):
    """An attempt to undo a stage is about to run."""

    event: Literal["compensation_started"] = "compensation_started"
    attempt: int


@frozen
class CompensationCompleted(StageEvent):
    """A stage's effect is undone.

    Attributes:
        late: Its compensation had been given up as stuck, and nobody waited for it any more.
    """

    event: Literal["compensation_completed"] = "compensation_completed"
    late: bool = False


@frozen
class CompensationFailed(StageEvent):
    """An attempt to undo a stage failed; unless more is to come the stage is stuck.

    Attributes:
        failure: How.
        will_retry: Whether more is to come: another attempt, or the answer of its probe, also after the last one.
        past_pivot: Whether it can't be undone because it has gone beyond a point of no return of its own.
        in_part: Whether a part of it may be undone by now.
    """

    event: Literal["compensation_failed"] = "compensation_failed"
    failure: Failure
    will_retry: bool = False
    past_pivot: bool = False
    in_part: bool = False


@frozen
class StageSettled(StageEvent):
    """A person has said what became of a stage that is stuck or in doubt.

    Attributes:
        verdict: What they said.
        note: Why.
        by: Who.
        output: With `KEPT`, what the stage counts as having given, if it never gave an output itself.
    """

    event: Literal["stage_settled"] = "stage_settled"
    verdict: Verdict
    note: str
    by: str
    output: Output | None = None


@frozen
class SagaResumed(Event):
    """Somebody goes on with a saga that had come to rest, or whose process is gone.

    Attributes:
        forward: Whether its stages run on; else it goes on to be undone.
        policy: Its policy from here on; None: as before.
        graph: Its stages with what they offer from here on; None: as before.
        by: Who.
    """

    event: Literal["saga_resumed"] = "saga_resumed"
    forward: bool
    policy: Policy | None = None
    graph: Graph | None = None
    by: str


@frozen
class SagaEnded(Event):
    """The saga has come to rest.

    Attributes:
        status: Where.
        cause: What stopped it, when it did not turn back.
    """

    event: Literal["saga_ended"] = "saga_ended"
    status: SagaStatus
    cause: Failure | None = None


AnyEvent = Annotated[
    SagaStarted
    | StageStarted
    | EffectRecorded
    | StageCompleted
    | StageFailed
    | StageSkipped
    | FallbackUsed
    | FallbackFailed
    | StageProbed
    | SagaStopped
    | SagaTurnedBack
    | CompensationStarted
    | CompensationCompleted
    | CompensationFailed
    | StageSettled
    | SagaResumed
    | SagaEnded,
    Discriminator("event"),
]


_FAILURES: Final[Mapping[type[Event], str]] = {
    StageFailed: "failure",
    FallbackFailed: "failure",
    StageProbed: "failure",
    CompensationFailed: "failure",
    SagaStopped: "cause",
    SagaTurnedBack: "cause",
    SagaEnded: "cause",
}


def at_rest(event: AnyEvent) -> AnyEvent:
    """The event without its exception object, as every ledger keeps it: a traceback holds on to all that the code had in its hands."""
    field_name = _FAILURES.get(type(event))
    if field_name is None:
        return event  # as most do
    failure: Failure | None = getattr(event, field_name)
    if failure is None or failure.exception is None:
        return event
    kind: Any = type(event)  # mypy takes a class for unhashable
    rested: AnyEvent = _changer(kind, field_name)(event, without_exception(failure))
    return rested


# dataclasses.replace looks at each field's definition anew, which takes longer than to make the event.
_changer: Final = cache(changer)


# Made when they are first used: a ledger in memory needs neither, and the reader takes a tenth of the time that importing saga takes.
@cache
def _reader() -> TypeAdapter[Any]:
    return TypeAdapter(AnyEvent)


@cache
def _writer(kind: type[object]) -> TypeAdapter[Any]:
    # The union's own writer looks for the event's type among all of them first, and takes twice as long.
    return TypeAdapter(kind)


def event_to_json(event: AnyEvent, *, strict: bool = False) -> str:
    """Write one event as a line of JSON.

    What has no encoding is written as the text that stands for it, with `strict` refused.

    Raises:
        pydantic_core.PydanticSerializationError: The event can't be written; with `strict` the text names the part.
    """
    kind: Any = type(event)  # mypy takes a class for unhashable
    return _writer(kind).serializer.to_json(event, context=STRICT if strict else None).decode("utf-8")


def line_of(event: AnyEvent) -> str:
    """The line that a durable ledger keeps of an event: strict JSON, the same one whenever it is asked for.

    Raises:
        pydantic_core.PydanticSerializationError: As `event_to_json`.
    """
    try:
        return event.line
    except AttributeError:
        line = event_to_json(event, strict=True)
    object.__setattr__(event, "line", line)  # it is frozen, and this no part of what it says
    return line


def event_from_json(text: str | bytes) -> AnyEvent:
    """Read back what `event_to_json` wrote.

    Raises:
        pydantic.ValidationError: The text is no event.
    """
    event: AnyEvent = _reader().validate_json(text)
    return event


def with_copies(event: AnyEvent) -> AnyEvent:
    """The event with copies of what somebody's code may change in place: the saga that is running keeps what it knows."""
    copies: dict[str, Any] = {name: copy(value) for name, copy in _CHANGEABLE if (value := getattr(event, name, None)) is not None}
    return replace(event, **copies) if copies else event


def reads_only(listener: T) -> T:
    """Say of a listener, a function or a class, that it changes nothing of what it is told: then it gets no copies, which take time."""
    _READERS.add(id(listener))
    return listener


def told_to(listener: object, event: AnyEvent) -> AnyEvent:
    """What a listener is told of an event."""
    return event if id(listener) in _READERS or id(type(listener)) in _READERS else with_copies(event)


_READERS: Final[set[int]] = set()
_CHANGEABLE: Final = (("output", copied_output), ("effect", copied), ("input", copied), ("policy", copied))
