"""The ledger: the append-only record of sagas, and which event may follow which.

`TRANSITIONS` is the whole truth about what may happen to one stage; anything else is a `LedgerCorrupt` error.
`Ledger` is the port that every ledger fits, `MemoryLedger` the default one.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, Protocol, Self

from stageflow.api import StageOutput

from saga.errors import LedgerConflict, LedgerCorrupt, LedgerError, MisuseError, SagaError, SagasDamaged
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
    SagaTurnedBack,
    StageCompleted,
    StageEvent,
    StageFailed,
    StageProbed,
    StageSettled,
    StageSkipped,
    StageStarted,
    at_rest,
)
from saga.owners import is_gone
from saga.quick import members
from saga.text import said, shown, written

_STATUS: Final = members(SagaStatus)


class StageState(StrEnum):
    """Where a stage stands."""

    __hash__ = str.__hash__  # Enum's own is Python code, and states are looked up at every event

    NOT_RUN = "not_run"
    RUNNING = "running"
    KEPT = "kept"
    """It completed and its output stands."""
    FALLBACK = "fallback"
    """It failed and its fallback stands in."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    """It returned CANCEL."""
    SKIPPED = "skipped"
    IN_DOUBT = "in_doubt"
    """It started, and nobody knows whether its effect landed."""
    COMPENSATING = "compensating"
    UNDONE = "undone"
    """What it did is compensated."""
    STUCK = "stuck"
    """Its compensation failed for good; the effect stands and a person has to act."""
    BLOCKED = "blocked"
    """Still in effect, because something that depends on it is stuck or in doubt."""


_S = StageState

_AGAIN: Final = frozenset({StageStarted, StageSkipped, StageFailed})

TRANSITIONS: Final[Mapping[StageState, frozenset[type[Event]]]] = {
    _S.NOT_RUN: _AGAIN,
    _S.RUNNING: frozenset({StageStarted, EffectRecorded, StageCompleted, StageFailed, StageSkipped, StageProbed}),
    _S.KEPT: _AGAIN | {StageProbed, CompensationStarted, CompensationCompleted, StageSettled},
    _S.FAILED: _AGAIN
    | {FallbackUsed, FallbackFailed, StageProbed, CompensationStarted, CompensationCompleted, StageCompleted, StageSettled},
    _S.FALLBACK: _AGAIN | {StageProbed, CompensationStarted, CompensationCompleted, StageCompleted, StageSettled},
    _S.CANCELLED: _AGAIN | {StageProbed, CompensationStarted, StageSettled},
    _S.SKIPPED: _AGAIN | {StageProbed, CompensationStarted, StageSettled},
    _S.IN_DOUBT: _AGAIN
    | {FallbackUsed, FallbackFailed, StageProbed, CompensationStarted, CompensationCompleted, StageCompleted, StageSettled},
    _S.COMPENSATING: frozenset({CompensationStarted, CompensationCompleted, CompensationFailed, StageProbed}),
    _S.UNDONE: _AGAIN | {StageProbed, CompensationStarted, StageCompleted, StageSettled},
    _S.STUCK: _AGAIN | {StageProbed, CompensationCompleted, StageCompleted, StageSettled},
}
"""Which events may follow in which state of a stage. BLOCKED is missing: it is read off the other stages.

A stage that has ended runs again only in a saga that was resumed, completes then only late, and is settled only in doubt or stuck. One
that was done with and is asked for once more can't answer: something of it has come late, or in a saga that it ran. One that is not stuck
is undone late only where it is to be undone. One that is undone is undone again only where the sagas of its fallback are left.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a ledger knows of a saga without reading its events.

    Attributes:
        saga_id: Its id.
        pipeline: Its pipeline's name.
        status: Where it stands.
        started_at: When it began, UTC.
        updated_at: When its last event was recorded, UTC.
        parent: The id of the saga that runs it as a child, if one does.
        parent_stage: The parent's stage that does.
        owner: Who holds its lease; None if nobody does.
        until: When the owner counts as gone unless it says that it is alive, UTC, by the clock of who asks; None: not before it lets go.
    """

    saga_id: str
    pipeline: str
    status: SagaStatus
    started_at: datetime
    updated_at: datetime
    parent: str | None = None
    parent_stage: str | None = None
    owner: str | None = None
    until: datetime | None = None


def is_held(entry: Entry) -> bool:
    """Whether somebody who counts as alive holds the saga."""
    if entry.owner is None or is_gone(entry.owner):
        return False
    return entry.until is None or entry.until >= datetime.now(UTC)


ALIVE: Final = frozenset({SagaStatus.RUNNING, SagaStatus.COMPENSATING})
"""A saga in one of these has an owner, or its process is gone."""
FORGETTABLE: Final = frozenset({SagaStatus.COMPLETED, SagaStatus.DEGRADED, SagaStatus.COMPENSATED, SagaStatus.CANCELLED})
"""Nothing is left to do about a saga in one of these; a stuck one waits for a person, a halted one to be resumed."""


_SAY_NOTHING: Final = frozenset({StageStarted, EffectRecorded, StageCompleted, CompensationStarted, CompensationCompleted})
"""Most events: of no failure, and of nothing that changes where the saga stands."""


def status_said(events: Sequence[AnyEvent]) -> SagaStatus | None:
    """Where a saga stands after these events; None: where it stood before them."""
    for event in reversed(events):
        if isinstance(event, StageEvent):
            continue  # as most are
        match event:
            case SagaEnded(status=status):
                return status
            case SagaTurnedBack():
                return _STATUS.COMPENSATING
            case SagaResumed(forward=forward):
                return _STATUS.RUNNING if forward else _STATUS.COMPENSATING
            case SagaStarted():
                return _STATUS.RUNNING
    return None


LONGEST_NAME: Final = 500
A_NAME: Final = f"of at most {LONGEST_NAME} characters, without NUL and surrogates"


def is_name(text: str) -> bool:
    """Whether every durable ledger can hold it as a saga's id, or as the name of its pipeline or of the stage that runs it."""
    return len(text) <= LONGEST_NAME and (text.isprintable() or ("\0" not in text and written(text) == text))


def asked_for(statuses: Collection[SagaStatus] | None) -> frozenset[SagaStatus] | None:
    """The statuses by which sagas are listed, also where they are asked for by their words; None: all.

    Raises:
        MisuseError: One of them is no status, or they come in no collection.
    """
    try:
        return None if statuses is None else frozenset(map(SagaStatus, statuses))
    except (TypeError, ValueError):
        raise MisuseError("a collection of statuses of sagas", got=shown(statuses), hint="Write {SagaStatus.STUCK}.") from None


def moment_ago(age: timedelta) -> datetime:
    """When it was, so long ago, UTC.

    Raises:
        MisuseError: It is no timedelta, or below 0, or no date can say when.
    """
    if not isinstance(age, timedelta):
        raise MisuseError("a timedelta", got=shown(age), hint="Write timedelta(days=30).")
    if age < timedelta():
        raise MisuseError("an age of 0 or more", got=str(age))
    try:
        return datetime.now(UTC) - age
    except OverflowError:
        raise MisuseError("an age that reaches back to the year 1 at most", got=str(age)) from None


class Ledger(Protocol):
    """Where sagas are recorded.

    An append is either recorded whole, before the call returns, or not at all. Appends of one saga take effect in
    the order of the calls. A call that is cancelled may have been carried out all the same.

    Whoever writes to a saga holds its lease: `create` and `acquire` give a token that goes with every append, and
    a later holder's token is higher. An owner that says nothing for longer than `lease` counts as gone, and what it held may be
    taken over; it then finds that its token is refused.

    Whatever else it raises is taken for a LedgerError.

    Names are such as `is_name` says, or a durable ledger refuses them.

    A saga that a stage runs has that stage's as its parent. Whoever creates or acquires it says `under` which token it holds the
    parent, and is refused when that is no longer the current one. Whoever takes over a saga that another owner held takes from that owner
    the leases of all that is below it, too: an owner that lost a saga writes nothing more to its children, and begins none.

    Attributes:
        lease: Seconds after which an owner that did not `beat` counts as gone; None: owners never do.
        durable: Whether it outlives the process: events are stored as JSON, and an append costs so much that events which guard
            nothing are better written together with the next one that does.
        max_event_bytes: How many bytes of JSON one event may have; None: as many as it likes.
    """

    lease: float | None
    durable: bool
    max_event_bytes: int | None

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], *, under: int | None = None) -> int:
        """Record a new saga's first events, and take its lease for `owner`.

        Raises:
            LedgerConflict: There is a saga of that id, or its parent's token is not `under`.
            LedgerError: They can't be recorded; the saga does not exist.
        """
        ...

    async def acquire(self, saga_id: str, owner: str, *, under: int | None = None) -> int:
        """Take the lease of a saga for `owner`; the holder itself gets a new token, and the old one is refused from then on.

        Raises:
            LedgerConflict: There is no such saga, its parent's token is not `under`, or another owner holds it and counts as alive; the
                error says who and until when.
        """
        ...

    async def release(self, saga_id: str, token: int) -> None:
        """Give the lease back; a lease that was lost in the meantime is left alone.

        The token stays good for appends until somebody takes the lease.
        """
        ...

    async def beat(self, owner: str) -> None:
        """Say that an owner is alive; `create` and `acquire` say so, too."""
        ...

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        """Record events behind the `expected_version` events that are already there; with `release`, give the lease back with them.

        Raises:
            LedgerConflict: There are more or fewer events, the token is not the current one, or there is no such saga; nothing was
                recorded. When the lease was lost, the error says who holds it now and until when.
            LedgerError: They can't be recorded.
        """
        ...

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga, oldest first; empty when there is no such saga.

        Raises:
            LedgerCorrupt: What is there can't be read as events.
        """
        ...

    async def list(self, *, statuses: Collection[SagaStatus] | None = None, parent: str | None = None) -> Sequence[Entry]:
        """The sagas in the order in which they were created: all, those in some statuses, the children of one.

        Raises:
            MisuseError: One of `statuses` is no status, or a single one is given in place of a collection.
            SagasDamaged: Of some of them it can't tell where they stand, so they may be among those that were asked for, or not; the error
                has the others.
            LedgerCorrupt: It can't tell of any.
        """
        ...

    async def prune(self, older_than: timedelta) -> Sequence[str]:
        """Forget sagas whose last event is older and about which nothing is left to do; their ids.

        A child goes with the saga that runs it, and both stay while anything is left to do about one of them, one of them is
        younger, or somebody who counts as alive holds one of them.

        Raises:
            MisuseError: `older_than` is no timedelta, or below 0, or reaches back beyond the year 1.
        """
        ...

    async def close(self) -> None:
        """Let go of files and connections, when everything asked for before has been done; nothing more may be asked for."""
        ...

    async def completions(self, saga_id: str) -> dict[str, StageOutput]:
        """What completed, by stage, in topological order; also what was undone later."""
        events = await self.read(saga_id)
        # In order: a stage that was undone may have run once more, and its last output counts.
        outputs = {
            event.stage: event.output
            for event in events
            if (isinstance(event, StageCompleted) or (isinstance(event, StageProbed) and event.landed)) and event.output
        }
        started = events[0] if events else None
        if not isinstance(started, SagaStarted):
            return {}
        return {name: outputs[name] for name in started.graph.names if name in outputs}


@dataclass(slots=True)
class _Kept:
    """One saga in memory.

    Attributes:
        events: Its events.
        started: The first of them.
        owner: Who holds its lease.
        token: The last one that was given.
        status: Where it stands.
    """

    events: list[AnyEvent]
    started: SagaStarted
    owner: str | None
    token: int
    status: SagaStatus


def refuse_no_ledger(ledger: object) -> None:
    """Refuse what is neither a ledger nor None.

    Raises:
        MisuseError: It is something else.
    """
    if isinstance(ledger, type):
        raise MisuseError("a ledger", got=f"the class {ledger.__qualname__}", hint=f"Write {ledger.__qualname__}(...).")
    if ledger is not None and not callable(getattr(ledger, "acquire", None)):
        # Not the text itself: a URL may hold a password.
        hint = "saga.ledgers.open_ledger(url) opens the one at a URL." if isinstance(ledger, str) else ""
        raise MisuseError("a ledger", got=f"a {type(ledger).__name__}", hint=hint)


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Make a LedgerError of whatever else a ledger's driver raises when it is to do so: what then follows is decided by that."""
    try:
        yield
    except SagaError:
        raise
    except Exception as error:  # whatever it is
        raise LedgerError(f"the ledger failed to {what}: {type(error).__name__}: {said(error)}") from error


async def recorded(ledger: Ledger, saga_id: str) -> Sequence[AnyEvent]:
    """All events of a saga, oldest first; empty when there is no such saga."""
    with answering(f"read saga {saga_id}"):
        return await ledger.read(saga_id)


async def listed(
    ledger: Ledger, statuses: Collection[SagaStatus] | None = None, parent: str | None = None
) -> tuple[Mapping[str, Entry], Mapping[str, LedgerCorrupt]]:
    """What a ledger tells of its sagas, by id, and of which it can't tell where they stand, and why."""
    damaged: Mapping[str, LedgerCorrupt] = {}
    try:
        with answering("list its sagas"):
            entries = await ledger.list(statuses=statuses, parent=parent)
    except SagasDamaged as some:
        entries, damaged = some.entries, some.damaged
    return {entry.saga_id: entry for entry in entries}, damaged


_TURN: Final = threading.RLock()
"""Held by the thread that changes which sagas a `MemoryLedger` has, or who holds one: loops of several may use the same ledger."""

if hasattr(os, "register_at_fork"):  # pragma: no branch - where processes don't fork, there is nothing to see to
    # The child has none of the other threads: what one of them held would be held for ever.
    os.register_at_fork(before=_TURN.acquire, after_in_parent=_TURN.release, after_in_child=_TURN.release)


class MemoryLedger(Ledger):
    """Keeps the events in this process; they are gone when it ends.

    It serves any number of coordinators, event loops and threads.

    As in any other ledger, a failure is kept with its text and its traceback's, but without the exception object.

    Args:
        keep: How many sagas about which nothing is left to do are kept; the oldest are forgotten first. No other one ever is.

    Raises:
        MisuseError: `keep` is no number, or below 0.
    """

    lease: float | None = None
    durable = False
    max_event_bytes: int | None = None

    def __init__(self, keep: int = 10_000) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not keep >= 0:
            raise MisuseError("a number of sagas to keep, at least 0", got=shown(keep))
        self._keep = keep
        self._sagas: dict[str, _Kept] = {}
        self._children: dict[str | None, dict[str, None]] = {}
        # A dict looks for its first key behind all those that were taken out, and the oldest is taken out for each saga that ends.
        self._done: OrderedDict[str, None] = OrderedDict()

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], *, under: int | None = None) -> int:
        """Record a new saga."""
        started = events[0]
        assert isinstance(started, SagaStarted)  # the journal sees to that
        saga = _Kept(list(map(at_rest, events)), started, owner, 1, status_said(events) or _STATUS.RUNNING)
        with _TURN:
            self._refuse_overtaken(started, under)
            if saga_id in self._sagas:
                raise LedgerConflict.exists(saga_id)
            self._sagas[saga_id] = saga
            if started.parent is not None:
                self._children.setdefault(started.parent, {})[saga_id] = None
            for one in self._family(saga):
                self._done.pop(one.started.saga_id, None)  # a child that was alone so far
        return 1

    def _refuse_overtaken(self, started: SagaStarted, under: int | None) -> None:
        if under is not None and (above := self._find(str(started.parent))).token != under:
            raise LedgerConflict.overtaken(str(started.parent), under, above.token, holder=above.owner)

    async def acquire(self, saga_id: str, owner: str, *, under: int | None = None) -> int:
        """Take the lease; it lasts until it is released, or its holder's process is gone: a copy or a fork may outlive that."""
        with _TURN:
            saga = self._find(saga_id)
            self._refuse_overtaken(saga.started, under)
            if saga.owner is not None and saga.owner != owner and not is_gone(saga.owner):
                raise LedgerConflict.held(saga_id, holder=saga.owner)
            saga.owner = owner
            saga.token += 1
            self._review(saga)
            return saga.token

    def _find(self, saga_id: str) -> _Kept:
        saga = self._sagas.get(saga_id)
        if saga is None:
            raise LedgerConflict.missing(saga_id)
        return saga

    async def release(self, saga_id: str, token: int) -> None:
        """Give the lease back."""
        with _TURN:
            saga = self._sagas.get(saga_id)
            if saga is not None and saga.token == token:
                saga.owner = None
                self._review(saga)

    def _review(self, saga: _Kept) -> None:
        """Note whether anything is left to do about a saga, those that run it, and their children."""
        while saga.started.parent in self._sagas:
            saga = self._sagas[saga.started.parent]
        saga_id = saga.started.saga_id
        self._done.pop(saga_id, None)
        if self._is_done(saga):
            self._done[saga_id] = None
        while len(self._done) > self._keep:
            self._forget(next(iter(self._done)))

    def _is_done(self, saga: _Kept) -> bool:
        """Whether nothing is left to do about it, its children, and theirs."""
        if saga.owner is not None or saga.status not in FORGETTABLE:
            return False
        children = self._children.get(saga.started.saga_id)
        return not children or all(self._is_done(self._sagas[child]) for child in children)

    def _family(self, saga: _Kept) -> Sequence[_Kept]:
        """It, its children, and theirs."""
        children = self._children.get(saga.started.saga_id)
        if not children:
            return (saga,)  # as most are
        return [saga, *(one for child in children for one in self._family(self._sagas[child]))]

    def _forget(self, saga_id: str) -> Sequence[str]:
        family = self._family(self._sagas[saga_id])
        for one in family:
            gone = one.started
            del self._sagas[gone.saga_id]
            self._done.pop(gone.saga_id, None)
            self._children.pop(gone.saga_id, None)
            if gone.parent in self._children:
                del self._children[gone.parent][gone.saga_id]
        return [one.started.saga_id for one in family]

    async def beat(self, owner: str) -> None:
        """Owners live in this process; they need not say so."""

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        """Record the events."""
        saga = self._sagas.get(saga_id)
        if saga is None or saga.token != token or len(saga.events) != expected_version:
            raise self._refusal(saga_id, saga, expected_version, token)
        for event in events:
            if type(event) not in _SAY_NOTHING:
                saga.events += map(at_rest, events)
                saga.status = status_said(events) or saga.status
                break
        else:
            saga.events += events
        if release or saga.owner is None:
            with _TURN:
                saga.owner = None
                self._review(saga)

    @staticmethod
    def _refusal(saga_id: str, saga: _Kept | None, expected_version: int, token: int) -> LedgerConflict:
        if saga is None:
            return LedgerConflict.missing(saga_id)
        if saga.token != token:
            return LedgerConflict.overtaken(saga_id, token, saga.token, holder=saga.owner)
        return LedgerConflict.outdated(saga_id, expected_version, len(saga.events))

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga."""
        saga = self._sagas.get(saga_id)
        return () if saga is None else tuple(saga.events)

    async def list(self, *, statuses: Collection[SagaStatus] | None = None, parent: str | None = None) -> Sequence[Entry]:
        """The sagas."""
        wanted = asked_for(statuses)
        with _TURN:
            ids = self._sagas if parent is None else self._children.get(parent, ())
            sagas = [self._sagas[saga_id] for saga_id in ids]
        return tuple(self._entry(saga) for saga in sagas if wanted is None or saga.status in wanted)

    def _entry(self, saga: _Kept) -> Entry:
        started = saga.started
        return Entry(
            saga_id=started.saga_id,
            pipeline=started.pipeline,
            status=saga.status,
            started_at=started.at,
            updated_at=saga.events[-1].at,
            parent=started.parent,
            parent_stage=started.parent_stage,
            owner=saga.owner,
        )

    async def prune(self, older_than: timedelta) -> Sequence[str]:
        """Forget old sagas about which nothing is left to do."""
        before = moment_ago(older_than)
        with _TURN:
            old = [done for done in self._done if all(one.events[-1].at < before for one in self._family(self._sagas[done]))]
            return tuple([gone for saga_id in old for gone in self._forget(saga_id)])

    async def close(self) -> None:
        """There is nothing to let go of."""

    async def __aenter__(self) -> Self:
        """Use it for the length of a block, as any other one; it may be used after it, too."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()
