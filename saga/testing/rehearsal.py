"""A coordinator that is told how to carry out the stages' code, and a ledger that dies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel

from saga.coordinator import SagaCoordinator
from saga.errors import LedgerError
from saga.events import AnyEvent, SagaStarted, StageEvent, event_from_json, event_to_json
from saga.keeper import SagaKeeper
from saga.ledger import MemoryLedger
from saga.policies import Compensation, Policy, Retry

if TYPE_CHECKING:
    from stageflow.api import PipelineContext

    from saga.blueprint import Blueprint
    from saga.graph import Node
    from saga.ledger import Ledger
    from saga.live.actions import Actions
    from saga.live.journal import Journal
    from saga.live.saga import LiveSaga
    from saga.stages import StageOffer

PATIENCE: Final = 0.05
"""Seconds after which a stage that is made to time out does."""


class Rehearsal(SagaCoordinator):
    """Runs sagas as they are, except that nobody waits: neither before a retry, nor for a stage that is to time out.

    Args:
        policy: The saga's.
        ledger: Where it is recorded.
        actions: Gives what carries out the stages' code, for a pipeline and the path that leads to it.
        impatient_of: The paths of stages that time out soon.

    Attributes:
        nodes: What each stage of the sagas that it ran is in its graph, by its path.
    """

    def __init__(
        self,
        policy: Policy,
        ledger: Ledger,
        actions: Callable[[Blueprint, str], Actions],
        impatient_of: Collection[str] = (),
    ) -> None:
        self._play = actions
        self._impatient_of = impatient_of
        self.nodes: dict[str, Node] = {}
        super().__init__(policy, ledger=ledger)

    def _new_keeper(self) -> SagaKeeper:
        return _Rehearsing(self.ledger, self._play, self._impatient_of, self.nodes)


class _Rehearsing(SagaKeeper):
    def __init__(
        self, ledger: Ledger, play: Callable[[Blueprint, str], Actions], impatient_of: Collection[str], nodes: dict[str, Node]
    ) -> None:
        super().__init__(ledger, (), ())
        self._play = play
        self._impatient_of = impatient_of
        self._nodes = nodes
        self._prefixes: dict[str, str] = {}

    def lives(self, blueprint: Blueprint, policy: Policy, journal: Journal, context: PipelineContext) -> LiveSaga:
        started = journal.state.started
        prefix = "" if started.parent is None else f"{self._prefixes[started.parent]}{started.parent_stage}/"
        self._prefixes[journal.saga_id] = prefix
        self._nodes |= {prefix + node.name: node for node in blueprint.graph.nodes}
        # On a busy machine, too, the same events go into the same writes.
        journal.linger = PATIENCE
        stages = {name: self._hurried(offer, prefix + name, policy) for name, offer in blueprint.stages.items()}
        return super().lives(replace(blueprint, stages=stages), _without_waits(policy), journal, context)

    def _hurried(self, offer: StageOffer, path: str, policy: Policy) -> StageOffer:
        return replace(
            offer,
            retry=None if offer.retry is None else _at_once(offer.retry),
            timeout=PATIENCE if path in self._impatient_of else offer.timeout,
            # Its effect is to land before anybody asks for it, however long it takes.
            bounds_itself=offer.bounds_itself or path in self._impatient_of,
            compensation=None if offer.compensation is None else _undone_at_once(offer.undone_under(policy.compensation)),
            # What stands in for the output of a stage that is not to run fits no model; and only a durable ledger asks for one.
            output_model=offer.output_model if self._ledger.durable else None,
        )

    def actions(self, blueprint: Blueprint, saga_id: str) -> Actions:
        return self._play(blueprint, self._prefixes[saga_id])


def _without_waits(policy: Policy) -> Policy:
    return policy.model_copy(update={"retry": _at_once(policy.retry), "compensation": _undone_at_once(policy.compensation)})


def _at_once(retry: Retry) -> Retry:
    # Not made anew: what it names was looked for when it was made, and a stage may have imported its module since.
    return BaseModel.model_copy(retry, update={"attempts": retry.attempts, "wait": 0.0})


def _undone_at_once(compensation: Compensation) -> Compensation:
    return compensation.model_copy(update={"retry": _at_once(compensation.retry)})


class ProcessDied(LedgerError):
    """From here on, nothing that this process does is recorded."""


class MortalLedger(MemoryLedger):
    """Dies where it is told to, and can be taken up again as if by another process.

    Args:
        durable: It hands out what a durable ledger would: what was written as JSON and read again.

    Attributes:
        struck_at: The path of the stage that the last event or write was about; empty for the saga as a whole, None while it lives.
        struck_events: The events that were not recorded any more, or those that were recorded last.
    """

    def __init__(self, *, durable: bool) -> None:
        super().__init__()
        self.durable = durable
        self.struck_at: str | None = None
        self.struck_events: tuple[str, ...] = ()
        self._left: int | None = None
        self._after = False
        self._is_dead = False

    def die_at(self, nth: int, *, after: bool) -> None:
        """Die when the n-th write from now on is in the ledger; or before the n-th event is.

        A durable ledger gets several events in one write. But what comes before the event may have been written earlier, when the machine
        was busy; so one that is to die before an event gets those that precede it.
        """
        self._left, self._after = nth, after

    def revive(self) -> None:
        """Be the ledger that the next process finds; who held a saga is gone."""
        self._left, self._is_dead = None, False
        for saga in self._sagas.values():
            saga.owner = None

    def _path(self, started: SagaStarted) -> str:
        """The path that leads to a saga's stages; empty for one that no other runs."""
        return "" if started.parent is None else f"{self._path(self._sagas[started.parent].started)}{started.parent_stage}/"

    def _refuse_if_dead(self) -> None:
        if self._is_dead:
            raise ProcessDied("the process is played dead")

    def _last_words(self, events: Sequence[AnyEvent]) -> Sequence[AnyEvent] | None:
        """Those of the events that are recorded before the process dies; None if it lives on."""
        self._refuse_if_dead()
        if self._left is None:
            return None
        units = 1 if self._after else len(events)
        if self._left > units:
            self._left -= units
            return None
        return events if self._after else events[: self._left - 1]

    def _die(self, started: SagaStarted, events: Sequence[AnyEvent]) -> None:
        path = self._path(started)
        stages = [event.stage for event in events if isinstance(event, StageEvent)]
        self.struck_at = path + stages[0] if stages else path.rstrip("/")
        self.struck_events = tuple(type(event).__name__ for event in events)
        self._is_dead = True
        self._refuse_if_dead()

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], *, under: int | None = None) -> int:
        """Record a new saga, unless this is where the process dies."""
        last = self._last_words(events)
        token = 0 if last is not None and not last else await super().create(saga_id, owner, events if last is None else last, under=under)
        if last is not None:
            assert isinstance(events[0], SagaStarted)  # every saga begins with it
            self._die(events[0], events if self._after else events[len(last) :])
        return token

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        """Record the events, unless this is where the process dies."""
        last = self._last_words(events)
        recorded = events if last is None else last
        await super().append(saga_id, recorded, expected_version=expected_version, token=token, release=release)
        if last is not None:
            self._die(self._sagas[saga_id].started, events if self._after else events[len(last) :])

    async def acquire(self, saga_id: str, owner: str, *, under: int | None = None) -> int:
        """Take the lease of a saga."""
        self._refuse_if_dead()
        return await super().acquire(saga_id, owner, under=under)

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga, as they are at rest."""
        self._refuse_if_dead()
        events = await super().read(saga_id)
        return tuple(event_from_json(event_to_json(event)) for event in events) if self.durable else events
