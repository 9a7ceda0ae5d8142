"""What went wrong: `Failure` and its kinds."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from traceback import StackSummary, TracebackException, walk_tb
from types import CodeType, FrameType, TracebackType
from typing import Any, ClassVar, Final, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from saga.quick import filled
from saga.text import brief, qualified, said, written


class FailureKind(StrEnum):
    """The ways in which a stage, a compensation or a saga fails."""

    EXCEPTION = "exception"
    """It raised."""
    REPORTED = "reported"
    """It returned `StageOutput.fail(...)`."""
    TIMEOUT = "timeout"
    """It exceeded its timeout; for a saga, its deadline."""
    INTERRUPTED = "interrupted"
    """It was cancelled from outside while it ran; for a saga, its caller was."""
    CRASHED = "crashed"
    """The process that ran it is gone."""
    CONTRACT = "contract"
    """It returned something that is no stage output, or RETRY without an attempt left."""
    COMPENSATION = "compensation"
    """Its compensation or its probe failed."""
    CANCELLED = "cancelled"
    """It returned `StageOutput.cancel(...)` or raised `StageCancellationRequested`."""
    LATE = "late"
    """Code of it that had been given up did something when others had gone on without it: only a person can see what stands."""


class Failure(BaseModel):
    """One failure of one attempt.

    Attributes:
        stage: The stage, or None for the saga's own deadline or its caller's cancel. In a report, a stage of a
            nested saga is named by its path: `book_hotel/charge_deposit`.
        kind: In what way it failed.
        type: The qualified name of the exception's type, or of the output's status.
        message: What it said.
        attempt: Which attempt failed; 1 is the first, 0 for the saga itself.
        at: When, UTC.
        traceback: The formatted traceback, if there was one.
        of_probe: Whether it is its probe that failed, and not its compensation.
        exception: The exception itself, in the report that `run` or `resume` returned; no ledger keeps it, and it is not pickled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    # Room for itself without the exception, made once: a ledger in memory keeps the cause of a saga in two events. And for
    # what refers to it weakly, which Python leaves out where slots are named.
    __slots__ = ("__weakref__", "_stored_as")
    _stored_as: ClassVar[Failure]  # not a field, and none of pydantic's private attributes, which every failure would be made with

    stage: str | None
    kind: FailureKind
    type: str = ""
    message: str
    attempt: int = 0
    at: AwareDatetime
    traceback: str | None = None
    of_probe: bool = False
    exception: BaseException | None = Field(default=None, exclude=True, repr=False)

    @classmethod
    def of(
        cls,
        stage: str | None,
        kind: FailureKind,
        message: object,
        *,
        type: str = "",  # noqa: A002 - the field's name
        attempt: int = 0,
        instead: BaseException | None = None,
    ) -> Self:
        """Note a failure that comes without an exception, or with one that the code raised instead of ending when it was cancelled."""
        traceback = None if instead is None else _traced(instead)
        message = brief(said(message) + raised_instead(instead))
        return cls(stage=stage, kind=kind, type=type, message=message, attempt=attempt, at=datetime.now(UTC), traceback=traceback)

    @classmethod
    def raised(
        cls, stage: str | None, error: BaseException, *, attempt: int, kind: FailureKind = FailureKind.EXCEPTION, of_probe: bool = False
    ) -> Self:
        """Note a failure that an exception tells of, with its traceback, which begins with the user's code from here on."""
        trace = begin_with_user(error)
        # In the order of the fields, and as pydantic would leave them: to have it look at them takes a sixth of the time of all this.
        given = {
            "stage": None if stage is None else written(stage),
            "kind": kind,
            "type": written(qualified(type(error))),
            "message": brief(said(error) or written(type(error).__name__)),
            "attempt": attempt,
            "at": datetime.now(UTC),
            "traceback": _traced(error, trace),
            "of_probe": of_probe,
        }
        names = set(given)
        stored, made = filled(cls, {**given, "exception": None}, names), filled(cls, {**given, "exception": error}, names)
        object.__setattr__(made, "_stored_as", stored)
        return made

    def __eq__(self, other: object) -> bool:
        """Compare what is stored: a failure read back from JSON equals the one that was written."""
        return isinstance(other, Failure) and self._stored() == other._stored()

    def __hash__(self) -> int:
        """Hash the part of what is stored that tells nearly all of them apart."""
        return hash((self.stage, self.at))

    def __getstate__(self) -> dict[Any, Any]:
        """Be pickled as it is stored.

        Not every exception can be made again from what it pickles, and where one can't, the pool of processes to which it is sent breaks or
        waits for ever.
        """
        return BaseModel.__getstate__(without_exception(self))

    def __deepcopy__(self, _: Any = None) -> Self:
        """Itself: nothing in it changes, and many exceptions can't be copied."""
        return self

    def _but(self, exception: BaseException | None) -> Self:
        """The same failure, but with this exception; pydantic's own copy would not share what never changes."""
        return filled(self.__class__, {**self.__dict__, "exception": exception}, self.__pydantic_fields_set__)

    def _stored(self) -> tuple[object, ...]:
        return tuple(getattr(self, field) for field in Failure.model_fields if field != "exception")

    def __str__(self) -> str:
        """Say who failed, in what way and with which words."""
        who = f"stage {self.stage!r}" if self.stage is not None else "the saga"
        return f"{who} {'could not be asked' if self.of_probe else _SAID[self.kind]}{in_its_words(self)}"


def without_exception(failure: Failure) -> Failure:
    """The failure as it is stored."""
    if failure.exception is None:
        return failure
    try:
        return failure._stored_as  # noqa: SLF001 - of this file
    except AttributeError:  # it was copied from another one
        return failure._but(None)  # noqa: SLF001 - as above


def begin_with_user(error: BaseException) -> TracebackType | None:
    """Have its traceback begin with the user's code; gives that."""
    # Our own frames hold the saga, which holds the failure: what refers to each other waits for Python's garbage collector.
    # Not by an assignment, which the class has a say in: a frozen dataclass refuses every one.
    trace = _by_user(error.__traceback__)
    BaseException.with_traceback(error, trace)
    return trace


def in_its_words(failure: Failure) -> str:
    """A failure without who failed and in what way: at which attempt, if not at the first, and with which words."""
    tries = f" at attempt {failure.attempt}" if failure.attempt > 1 else ""
    named = failure.kind in _NAMED_BY_TYPE and failure.type and failure.type not in failure.message
    what = f"{failure.type.rpartition('.')[2]}: {failure.message}" if named else failure.message
    return f"{tries}: {what}"


def raised_instead(error: BaseException | None) -> str:
    """What to add to the word that code was cancelled: empty if it ended as it should."""
    return "" if error is None else f"; then it raised {type(error).__name__}: {said(error)}"


def _traced(error: BaseException, trace: TracebackType | None = None) -> str:
    try:
        trace = trace or _by_user(error.__traceback__)
        return brief(written(_plainly(error, trace) or _formatted(error, trace)))
    except Exception as failed:  # noqa: BLE001 - whatever the user's attributes raise; Python looks for notes, for example
        return f"<no traceback: {qualified(type(failed))} while it was formatted>"


_TOLD_MORE_OF: Final = (SyntaxError, NameError, AttributeError, ImportError, BaseExceptionGroup)
"""What Python tells more of than where it was raised, its type and its words: the place in a text, what was meant, its members."""


def _plainly(error: BaseException, trace: TracebackType | None) -> str | None:
    """The traceback of an exception alone, as nearly always; None where there may be more to tell."""
    follows = error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__)
    if trace is None or follows or isinstance(error, _TOLD_MORE_OF):
        return None
    try:
        has_notes, words = getattr(error, "__notes__", None) is not None, str(error)
    except Exception:  # noqa: BLE001 - Python has something to say of most that the user's code raises here
        return None
    if has_notes:
        return None
    kind = qualified(type(error)).removeprefix("__main__.")
    return "".join(["Traceback (most recent call last):\n", *_stack(trace).words, f"{kind}: {words}\n" if words else f"{kind}\n"])


def _formatted(error: BaseException, trace: TracebackType | None) -> str:
    # Python looks into the frames for what an unknown name may have meant; of all else the stack is put in below.
    whole = TracebackException(type(error), error, trace if isinstance(error, NameError) else None, compact=True)
    whole.stack = _stack(trace)
    parts = [whole]
    while parts:
        part = parts.pop()
        for frame in part.stack:
            # For the marks under each line Python would parse the source, all in all longer than a saga takes to be undone.
            frame.colno = None
        parts += [inner for inner in (part.__cause__, part.__context__, *(part.exceptions or ())) if inner is not None]
    return "".join(whole.format())


class _Stack(StackSummary):
    """A stack in words, and the code that it is of, so that no other gets its address."""

    codes: list[CodeType]
    words: list[str]

    def format(self, **_: Any) -> list[str]:
        """The words."""
        return self.words


_MOST_STACKS: Final = 256
_STACKS: Final[dict[tuple[int, ...], _Stack]] = {}
"""Those of the last failures. What fails often fails in the same places, and to find the words takes an eighth of a rollback."""


def _stack(trace: TracebackType | None) -> _Stack:
    found: list[int] = []
    inner = trace
    while inner is not None:
        found += (id(inner.tb_frame.f_code), inner.tb_lineno)
        inner = inner.tb_next
    places = tuple(found)
    known = _STACKS.get(places)
    if known is None:
        if len(_STACKS) >= _MOST_STACKS:
            _STACKS.clear()
        known = _Stack(StackSummary.extract(walk_tb(trace)))
        known.codes, known.words = [frame.f_code for frame, _ in walk_tb(trace)], StackSummary.format(known)
        _STACKS[places] = known  # whole: the loop of another thread may fail in the same places
    return known


def _by_user(trace: TracebackType | None) -> TracebackType | None:
    """Where it begins with the user's code; how that was called is the same for every failure."""
    while trace is not None and trace.tb_next is not None and _is_ours(trace.tb_frame):
        trace = trace.tb_next
    return trace


_CALL_FOR_US: Final = frozenset({"stageflow.pipeline.interceptors", "stageflow.stages.context"})
"""Of stageflow what calls interceptors and hooks."""


_OURS: Final = f"{__package__}."


def _is_ours(frame: FrameType) -> bool:
    of = frame.f_globals
    return f"{of.get('__package__')}.".startswith(_OURS) or of.get("__name__") in _CALL_FOR_US


_NAMED_BY_TYPE: Final = frozenset({FailureKind.EXCEPTION, FailureKind.COMPENSATION})
_SAID: Final = {
    FailureKind.EXCEPTION: "raised",
    FailureKind.REPORTED: "reported a failure",
    FailureKind.TIMEOUT: "ran out of time",
    FailureKind.INTERRUPTED: "was interrupted",
    FailureKind.CRASHED: "lost its process",
    FailureKind.CONTRACT: "broke its contract",
    FailureKind.COMPENSATION: "could not be compensated",
    FailureKind.CANCELLED: "cancelled",
    FailureKind.LATE: "is in question",
}
