"""The exceptions that saga raises.

::

    SagaError
     ├── MisuseError           refused before anything ran
     │    ├── PipelineInvalid  a stage or the graph can't be run as a saga
     │    ├── PolicyInvalid    a policy holds a value that makes no sense
     │    ├── SagaExists       the saga id is taken
     │    ├── SagaNotFound     no saga has that id
     │    └── GraphChanged     the pipeline is not the one that the saga was started with
     ├── LedgerError           the ledger could not record or read
     │    ├── LedgerCorrupt    the events contradict the transition table
     │    │    └── SagasDamaged the ledger can't tell where some sagas stand
     │    ├── LedgerConflict   somebody else wrote to the saga, or holds its lease
     │    └── SagaUnrecorded   a saga could not record how it went on, and stopped
     ├── NotStorable           a value can't be written as JSON and read back, or is too large
     └── SagaFailed            raised on request, by `SagaReport.raise_for_status()`

A failing stage raises none of these: `SagaCoordinator.run` answers with a report. One that `nested` made, and whose saga did not complete,
fails with a `saga.report.NestedSagaFailed`, a SagaError, too.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from traceback import TracebackException
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from saga.ledger import Entry
    from saga.report import SagaReport


class SagaError(Exception):
    """The base of every error that saga raises. It is pickled and copied with its attributes, notes and text."""

    def __reduce__(self) -> tuple[object, ...]:
        """Be made again without `__init__`, whose arguments are not kept: it makes the text of them."""
        return _made_again, (type(self), *self.args), self.__dict__


def _made_again(kind: type[SagaError], *args: object) -> SagaError:
    return kind.__new__(kind, *args)


class MisuseError(SagaError):
    """Something was asked for that can't work; nothing was run, nothing was changed.

    Attributes:
        stage: The stage that it is about, or None.
        expected: What would have been right.
        got: What was found instead.
    """

    def __init__(self, expected: str, *, got: str, stage: str | None = None, hint: str = "") -> None:
        self.stage = stage
        self.expected = expected
        self.got = got
        where = f", for stage {stage!r}" if stage is not None else ""
        super().__init__(f"expected {expected}{where}, got {got}" + (f". {hint}" if hint else ""))


class PipelineInvalid(MisuseError):
    """A pipeline, or one of its stages, can't be run as a saga."""


class PolicyInvalid(MisuseError):
    """A policy holds a key or a value that makes no sense, or names a stage that isn't there."""


class SagaExists(MisuseError):
    """The saga id is already in the ledger."""


class SagaNotFound(MisuseError):
    """The ledger has no saga of that id."""


class GraphChanged(MisuseError):
    """The pipeline differs from the one that the saga was started with.

    Attributes:
        differences: One sentence for each stage that differs.
    """

    def __init__(self, saga_id: str, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__(
            f"the pipeline that saga {saga_id} was started with",
            got="another one: " + "; ".join(differences),
            hint="Nothing was run. Go on with the pipeline as it was then.",
        )


class LedgerError(SagaError):
    """The ledger could not record or read; the saga starts no further effect."""


class LedgerCorrupt(LedgerError):
    """What the ledger holds is not what was written, or an event follows one that it may not follow; all is left as it is."""


class SagasDamaged(LedgerCorrupt):
    """The ledger can't tell where some sagas stand; it tells of all others.

    Attributes:
        damaged: By id, why not, and what to do.
        entries: The others, of those that were asked for.
    """

    def __init__(self, damaged: Mapping[str, LedgerCorrupt], entries: Sequence[Entry]) -> None:
        self.damaged = dict(damaged)
        self.entries = tuple(entries)
        super().__init__(" ".join(map(str, damaged.values())))


_PUT_BACK: Final = "as where an older copy was put back, or a server took over that lacked the last commits"


class LedgerConflict(LedgerError):
    """Another coordinator wrote to this saga, or holds its lease.

    Attributes:
        holder: Who holds it, if it is about that.
        until: When the holder counts as gone unless it says that it is alive, UTC; None: not before it lets go.
        is_held: Whether the lease could not be had, so that nothing was begun; not whether one that was had is lost.
        is_missing: Whether the saga, or a part of it that its holder was told is recorded, is not in the ledger, as where an older copy was
            put back: then nobody else can say what of it is in effect.
    """

    def __init__(
        self, message: str, *, holder: str | None = None, until: datetime | None = None, is_held: bool = False, is_missing: bool = False
    ) -> None:
        self.holder = holder
        self.until = until
        self.is_held = is_held
        self.is_missing = is_missing
        super().__init__(message)

    @classmethod
    def missing(cls, saga_id: str) -> Self:
        """There is no such saga."""
        return cls(f"there is no saga {saga_id}", is_missing=True)

    @classmethod
    def exists(cls, saga_id: str) -> Self:
        """There is one already."""
        return cls(f"saga {saga_id} exists already; nothing was recorded")

    @classmethod
    def held(cls, saga_id: str, *, holder: str, until: datetime | None = None) -> Self:
        """Another owner holds the lease and counts as alive."""
        at_most = "" if until is None else f", or until {_clock(until)} if it says nothing more"
        message = f"saga {saga_id} is held by {holder}. Wait until it lets go{at_most}; or go on with the saga where it is held"
        return cls(message, holder=holder, until=until, is_held=True)

    @classmethod
    def overtaken(
        cls,
        saga_id: str,
        token: int,
        current: int,
        *,
        holder: str | None,
        until: datetime | None = None,
        outcome: str = "nothing was recorded",
    ) -> Self:
        """The lease was lost to a later holder; or the ledger is as it was before that lease was given."""
        written = f"saga {saga_id} is written with lease token {token}, the current one is {current}"
        if token > current:
            return cls(f"{written}: that is not in the ledger, {_PUT_BACK}; {outcome}", is_missing=True)
        now = "nobody holds it now" if holder is None else f"{holder} holds it" + ("" if until is None else f" until {_clock(until)}")
        return cls(f"{written}: {now}; {outcome}", holder=holder, until=until)

    @classmethod
    def outdated(cls, saga_id: str, expected: int, found: int) -> Self:
        """There are more or fewer events than the writer knew of."""
        is_missing = found < expected
        why = f"what comes before these is not in the ledger, {_PUT_BACK}" if is_missing else "somebody else wrote to it"
        return cls(f"saga {saga_id} has {found} events, expected {expected}: {why}; nothing was recorded", is_missing=is_missing)


def _clock(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


class SagaUnrecorded(LedgerError):
    """A saga could not record how it went on, so it stopped where it was; its `__cause__` is what the ledger said.

    Attributes:
        saga_id: The saga's id.
        in_effect: The stages whose effect stands, as far as is known; those of a saga that a stage was running then, by their paths.
        unknown: The stages that were running or being undone when the ledger failed, were in doubt before, or are asked before anybody
            says that they had no effect.
        told: All of that in words, without how to go on.
        asked_in_vain: What was asked for, to undo it or to go on with it, is not known to be recorded: it is to be asked for once more.
    """

    def __init__(
        self,
        saga_id: str,
        why: BaseException | None,
        *,
        in_effect: Sequence[str],
        unknown: Sequence[str],
        goes_on: str,
        asked_in_vain: bool,
    ) -> None:
        self.saga_id = saga_id
        self.in_effect = tuple(in_effect)
        self.unknown = tuple(unknown)
        self.asked_in_vain = asked_in_vain
        self.told = (
            f"saga {saga_id} stopped, because its ledger failed: {str(why).rstrip('.')}. Nothing more was started. "
            f"In effect: {', '.join(in_effect) or 'nothing'}; not known: {', '.join(unknown) or 'nothing'}."
        )
        super().__init__(f"{self.told} When the ledger is back, go on: await coordinator.{goes_on}")


class NotStorable(SagaError, ValueError):
    """A durable ledger can't keep a value: it can't be written as JSON and read back equal, or is too large.

    Attributes:
        path: Which one: `data['connection']`.
        expected: What it should be.
        got: What it is.
    """

    def __init__(self, path: str, expected: str, got: str) -> None:
        self.path = path
        self.expected = expected
        self.got = got
        super().__init__(f"expected {expected}, got {got}")


class SagaFailed(ExceptionGroup, SagaError):
    """A saga did not complete; its members are the stages' own exceptions, the cause first.

    Raised by `SagaReport.raise_for_status()`, which sets `report`. Where a member can't be made again from what it pickles, a stand-in with
    its words and its traceback is pickled.
    """

    report: SagaReport

    def __reduce__(self) -> tuple[object, ...]:
        """Be made again with all members: for one that can't be, the pool of processes to which they are sent breaks, or waits for ever."""
        return _made_again, (type(self), self.message, [*map(_that_travels, self.exceptions)]), self.__dict__

    def derive(self, excs: Sequence[Exception], /) -> SagaFailed:  # type: ignore[override] # typeshed's overloads can't be met by a subclass
        """Keep the type when `except*` splits the group."""
        part = SagaFailed(self.message, excs)
        part.report = self.report
        return part


def _that_travels(error: Exception) -> Exception:
    """An exception as it is, if it can be made again from what it pickles; else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - whatever the user's constructor raises
        told = TracebackException.from_exception(error)
        stand_in = SagaError(f"{type(error).__qualname__}: {told}")
        stand_in.add_note("".join(told.format()).rstrip())
        return stand_in
    return error
