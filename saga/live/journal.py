"""One saga's ledger while the saga is alive: what is recorded is checked, folded, written, and told, in this order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import repeat
from typing import Final

from saga.errors import LedgerError, SagaUnrecorded
from saga.events import (
    AnyEvent,
    CompensationStarted,
    EffectRecorded,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaTurnedBack,
    StageStarted,
    TurnReason,
    told_to,
)
from saga.ledger import Ledger
from saga.listeners import Listener
from saga.log import LOG
from saga.recovery.record import Step, undo_step
from saga.recovery.state import SagaState
from saga.storable import storable
from saga.tasks import Answer, outlasting
from saga.text import printable
from saga.turns import Turns, turns

_AWAITED: Final = (StageStarted, CompensationStarted, EffectRecorded, SagaResumed, SagaEnded)
"""What has to be in the ledger before anybody goes on; everything else may be written together with the next of these."""


class Journal:
    """Writes the events of one saga and keeps its state.

    To a durable ledger, an event that guards nothing is written together with the next one that does: a completion with the
    starts that it enables is one write (promise 6).

    In the place of a value that a durable ledger can't hold it writes a text.

    After an append that failed nothing more is written: what the state then says beyond the ledger is unknown to
    whoever resumes, so no further effect may start.

    Attributes:
        saga_id: The saga's id.
        ledger: Where they are written.
        state: What they come to.
        token: That of the lease under which it writes; None while the saga is not in the ledger.
        error: What went wrong with an append, the first that failed; None if nothing did.
        unwritten: The events that were to be written then, and those left when it was closed: what they were to guard has not run.
        linger: Seconds after which an event is written although nobody waits for it, when some turns of the event loop have passed.
    """

    linger: float = 0.002

    def __init__(
        self,
        ledger: Ledger,
        saga_id: str,
        state: SagaState,
        *,
        version: int,
        token: int | None,
        owner: str,
        under: int | None = None,
        listeners: Sequence[Listener],
    ) -> None:
        self.saga_id: Final = saga_id
        self.state: Final = state
        self.error: LedgerError | None = None
        self.unwritten: Sequence[AnyEvent] = ()
        self.ledger: Final = ledger
        self._durable = ledger.durable
        self._version = version
        self.token = token
        self._owner = owner
        self._under = under
        self._listeners = listeners
        self._pending: list[AnyEvent] = []
        self._turns: Turns | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._late_write: asyncio.Task[None] | None = None
        # What comes while the saga is being created; None: it is not.
        self._behind: list[tuple[Sequence[AnyEvent], Answer[None]]] | None = None
        self._released = False
        self._within: dict[str, list[LedgerError]] = {}

    @classmethod
    async def begin(cls, ledger: Ledger, started: SagaStarted, owner: str, under: int | None, listeners: Sequence[Listener]) -> Journal:
        """Begin the ledger of a new saga, under its parent's token; its first event is written at the latest before its first stage starts.

        Raises:
            LedgerError: It could not be written; the saga does not exist.
        """
        journal = cls(ledger, started.saga_id, SagaState([started]), version=0, token=None, owner=owner, under=under, listeners=listeners)
        journal._pending.append(started)
        if not ledger.durable:
            await journal.record()
        return journal

    def break_off(self, stage: str, error: LedgerError) -> None:
        """Record nothing more: the ledger has failed a saga that the stage runs, so what this one would say of the stage is not known."""
        self.error = self.error or error
        self._within.setdefault(stage, []).append(error)

    async def record(self, *events: AnyEvent, release: bool = False) -> None:
        """Fold the events and have them written, behind those that wait; with `release` they are the last before the lease is given back.

        Raises:
            LedgerError: They, or some before them, could not be written.
        """
        if self.error is not None and events:
            raise self.error
        if self._durable:
            events = tuple(map(storable, repeat(self.ledger), events))
        for event in events:
            self.state.apply(event)
        if self._durable and events and not isinstance(events[-1], _AWAITED):
            self._pending += events
            if self._turns is None:
                self._turns = turns()
                self._turns.wait(self._linger)
            return
        version = self._version
        try:
            if self._pending:
                # In here: where a Ctrl-C has these forgotten, nothing is written that comes after them.
                events = (*self._pending, *events)
                self._forget_pending()
            # Reserved before the write is awaited: a second record meanwhile goes behind this one.
            self._version += len(events)
            if self.token is not None:
                await self.ledger.append(self.saga_id, events, expected_version=version, token=self.token, release=release)
                self._released = release
            else:
                await self._create(events)
        except (Exception, asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
            told = self._failed(error, events)
            if isinstance(error, KeyboardInterrupt | SystemExit | LedgerError):
                raise
            raise told from error
        if self._listeners:
            tell(self._listeners, self.saga_id, events)

    def _forget_pending(self) -> None:
        self._pending.clear()
        if self._turns is not None:
            self._turns.call_off(self._linger)
            self._turns = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _linger(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.linger, self._write_soon)

    def _write_soon(self) -> None:
        self._late_write = asyncio.get_running_loop().create_task(self._write_late())

    async def _write_late(self) -> None:
        if not self._pending or self.unwritten:
            # Somebody recorded meanwhile, and took them along; or the ledger has failed, and nothing more is written.
            return
        # Who records next gets the error.
        with contextlib.suppress(LedgerError):
            await self.record()

    def _failed(self, error: BaseException, events: Sequence[AnyEvent]) -> LedgerError:
        self.unwritten = (*self.unwritten, *events)
        told = self._told(error, events)
        self.error = self.error or told
        return told

    def _told(self, error: BaseException, events: Sequence[AnyEvent]) -> LedgerError:
        match error:
            case LedgerError():
                return error
            case Exception():  # whatever a ledger's driver raises
                return LedgerError(f"the ledger failed to record {named(events)} of saga {self.saga_id}: {error}")
            case asyncio.CancelledError():
                # Whether it was written is unknown; a worker that died of this would leave its saga waiting for ever.
                return LedgerError(f"recording {named(events)} of saga {self.saga_id} was cancelled from outside")
        return LedgerError(f"the process was told to end while {named(events)} of saga {self.saga_id} was recorded")

    async def _create(self, events: Sequence[AnyEvent]) -> None:
        if self._behind is not None:
            waiter: Answer[None] = Answer(loop=asyncio.get_running_loop())
            self._behind.append((events, waiter))
            await outlasting(waiter)
            return
        behind = self._behind = []
        try:
            self.token = await self.ledger.create(self.saga_id, self._owner, events, under=self._under)
            self._behind = None
            if behind:
                # In one append, and at once: what comes from here on goes behind them.
                late = [event for more, _ in behind for event in more]
                await self.ledger.append(self.saga_id, late, expected_version=len(events), token=self.token)
        except BaseException as error:
            for _, waiter in behind:
                waiter.give(LedgerError(f"the ledger failed to begin saga {self.saga_id}: {error}"))
            raise
        for _, waiter in behind:
            waiter.give(None)

    async def close(self) -> int | None:
        """Write what is left; the token of the lease that is still to be given back, if any is."""
        if self._within:
            # What other stages have come to is known, and this ledger may still take it.
            await self._write_late()
        if self._pending:
            # What a Ctrl-C leaves running while the saga is let go of may record no more: a ledger that lacks these can't be read then.
            self.error = self.error or LedgerError(f"saga {self.saga_id} was let go of before it had recorded {named(self._pending)}")
        self.unwritten = (*self.unwritten, *self._pending)
        self._forget_pending()
        return None if self._released else self.token

    def left_unrecorded(self, error: LedgerError) -> LedgerError:
        """What to say of the saga that its ledger failed: what is in effect, and what nobody knows."""
        state = self.state
        if any(isinstance(event, SagaStarted) for event in self.unwritten):
            why = str(error).rstrip(".")
            return LedgerError(
                f"saga {self.saga_id} could not begin: {why}. None of its stages ran. When the ledger is back, run it again; "
                "should it hold this one all the same, go on with that instead."
            )
        # Its code has not run: it waited for this event to be in the ledger.
        never_began = {event.stage for event in self.unwritten if isinstance(event, StageStarted | CompensationStarted)}
        unknown, in_effect = [], []
        for name, record in state.stages.items():
            node = state.graph[name]
            step = undo_step(node, record)
            if record.doubt or step is Step.PROBE or (record.is_under_way and name not in never_began):
                unknown.append(name)
            elif step is not Step.CLEAR:
                in_effect.append(name)
            for within in self._within.get(name, ()):
                if isinstance(within, SagaUnrecorded):
                    in_effect += [f"{name}/{inner}" for inner in within.in_effect]
                    unknown += [f"{name}/{inner}" for inner in within.unknown]
        said: BaseException | None = error
        while isinstance(said, SagaUnrecorded):  # by a child
            said = said.__cause__
        # To undo as a whole what had begun to lose its orphans is both: to go on with it, and then to turn.
        asked = next((event for event in reversed(self.unwritten) if _asks(event)), None)
        return SagaUnrecorded(
            self.saga_id,
            said,
            in_effect=in_effect,
            unknown=unknown,
            goes_on=_call(self.saga_id, asked),
            asked_in_vain=asked is not None,
        )


def _asks(event: AnyEvent) -> bool:
    """Whether somebody has asked for it."""
    return isinstance(event, SagaResumed) or (isinstance(event, SagaTurnedBack) and event.reason is TurnReason.REQUEST)


def _call(saga_id: str, asked: AnyEvent | None) -> str:
    """The call that goes on, with what was asked for that is not recorded: a plain `resume` may go the other way."""
    if isinstance(asked, SagaTurnedBack):
        return f"compensate({saga_id!r}, pipeline)"
    forward = policy = ""
    if isinstance(asked, SagaResumed):
        forward = ", forward=True" if asked.forward else ""
        policy = ", policy=policy" if asked.policy is not None else ""
    return f"resume({saga_id!r}, pipeline{forward}{policy})"


def named(events: Sequence[AnyEvent]) -> str:
    """The kinds of some events, in words."""
    return " and ".join(type(event).__name__ for event in events)


def tell(listeners: Sequence[Listener], saga_id: str, events: Sequence[AnyEvent]) -> None:
    """Tell everybody who listens what is in the ledger now."""
    for event in events:
        for listener in listeners:
            try:
                listener(saga_id, told_to(listener, event))
            except (KeyboardInterrupt, SystemExit):
                # A signal strikes whatever code runs.
                raise
            except BaseException:  # noqa: BLE001 - whatever a listener raises
                LOG.exception("saga %s: a listener failed on %s; the saga goes on", printable(saga_id), type(event).__name__)
