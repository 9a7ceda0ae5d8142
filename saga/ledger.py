"""The ledger: the append-only record of sagas, and which event may follow which.

`TRANSITIONS` is the whole truth about what may happen to one stage; anything else is a `LedgerCorrupt` error.
`Ledger` is the port that every ledger fits, `MemoryLedger` the default one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final, Protocol

from stageflow.api import StageOutput

from saga.errors import LedgerConflict
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    Event,
    FallbackFailed,
    FallbackUsed,
    SagaStarted,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSkipped,
    StageStarted,
)


class StageState(StrEnum):
    """Where a stage stands."""

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

TRANSITIONS: Final[Mapping[StageState, frozenset[type[Event]]]] = {
    _S.NOT_RUN: frozenset({StageStarted, StageSkipped, StageFailed}),
    _S.RUNNING: frozenset({StageStarted, EffectRecorded, StageCompleted, StageFailed, StageSkipped, StageProbed}),
    _S.KEPT: frozenset({CompensationStarted}),
    _S.FAILED: frozenset({FallbackUsed, FallbackFailed, StageProbed, CompensationStarted}),
    _S.FALLBACK: frozenset({CompensationStarted}),
    _S.CANCELLED: frozenset({CompensationStarted}),
    _S.SKIPPED: frozenset({CompensationStarted}),
    _S.IN_DOUBT: frozenset({FallbackUsed, FallbackFailed, StageProbed, CompensationStarted}),
    _S.COMPENSATING: frozenset({CompensationStarted, CompensationCompleted, CompensationFailed}),
    _S.UNDONE: frozenset(),
    _S.STUCK: frozenset(),
}
"""Which events may follow in which state of a stage. BLOCKED is missing: it is read off the other stages."""


class Ledger(Protocol):
    """Where sagas are recorded.

    An append is either recorded whole, before the call returns, or not at all. Appends of one saga take effect in
    the order of the calls.
    """

    async def acquire(self, saga_id: str, owner: str) -> int:
        """Take the saga's lease for `owner`; the token that is returned goes with every append.

        Raises:
            LedgerConflict: Another owner holds it.
        """
        ...

    async def release(self, saga_id: str, token: int) -> None:
        """Give the lease back; a lease that was lost in the meantime is left alone."""
        ...

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int) -> None:
        """Record events behind the `expected_version` events that are already there.

        Raises:
            LedgerConflict: There are more or fewer events, or the token is not the current one.
            LedgerError: They can't be recorded.
        """
        ...

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga, oldest first; empty when there is no such saga."""
        ...

    async def list(self) -> Sequence[str]:
        """The ids of all sagas, oldest first."""
        ...

    async def completions(self, saga_id: str) -> dict[str, StageOutput]:
        """What completed, by stage, in topological order; also what was undone later."""
        events = await self.read(saga_id)
        outputs = {event.stage: event.output for event in events if isinstance(event, StageCompleted)}
        outputs |= {event.stage: event.output for event in events if isinstance(event, StageProbed) and event.landed and event.output}
        started = events[0] if events else None
        if not isinstance(started, SagaStarted):
            return {}
        return {name: outputs[name] for name in started.graph.names if name in outputs}


class MemoryLedger(Ledger):
    """Keeps the events in this process; they are gone when it ends."""

    def __init__(self) -> None:
        self._events: dict[str, list[AnyEvent]] = {}
        self._owners: dict[str, str] = {}
        self._tokens: dict[str, int] = {}

    async def acquire(self, saga_id: str, owner: str) -> int:
        """Take the lease; it lasts until it is released, because its holder lives in this process."""
        holder = self._owners.setdefault(saga_id, owner)
        if holder != owner:
            raise LedgerConflict(f"saga {saga_id} is held by {holder}; {owner} has to wait until it is released")
        token = self._tokens[saga_id] = self._tokens.get(saga_id, 0) + 1
        return token

    async def release(self, saga_id: str, token: int) -> None:
        """Give the lease back."""
        if self._tokens.get(saga_id) == token:
            self._owners.pop(saga_id, None)

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int) -> None:
        """Record the events."""
        recorded = self._events.setdefault(saga_id, [])
        if len(recorded) != expected_version:
            raise LedgerConflict(f"saga {saga_id} has {len(recorded)} events, expected {expected_version}: somebody else wrote to it")
        if self._tokens.get(saga_id) != token:
            raise LedgerConflict(f"saga {saga_id} is written with lease token {token}, the current one is {self._tokens.get(saga_id)}")
        recorded.extend(events)

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga, oldest first."""
        return tuple(self._events.get(saga_id, ()))

    async def list(self) -> Sequence[str]:
        """The ids of all sagas, oldest first."""
        return tuple(self._events)
