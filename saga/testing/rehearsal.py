"""A coordinator that is told how to carry out the stages' code, and a ledger that dies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from saga.coordinator import SagaCoordinator
from saga.errors import LedgerError
from saga.events import AnyEvent, SagaStarted, StageEvent, event_from_json, event_to_json
from saga.ledger import MemoryLedger
from saga.policies import Compensation, Policy, Retry

if TYPE_CHECKING:
    from stageflow.api import PipelineContext

    from saga.actions import Actions
    from saga.alive import LiveSaga
    from saga.blueprint import Blueprint, StagePlan
    from saga.graph import Node
    from saga.journal import Journal
    from saga.ledger import Ledger

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
        super().__init__(policy, ledger=ledger)
        self._play = actions
        self._impatient_of = impatient_of
        self.nodes: dict[str, Node] = {}
        self._prefixes: dict[str, str] = {}

    def _lives(self, blueprint: Blueprint, policy: Policy, journal: Journal, context: PipelineContext) -> LiveSaga:
        started = journal.state.started
        prefix = "" if started.parent is None else f"{self._prefixes[started.parent]}{started.parent_stage}/"
        self._prefixes[journal.saga_id] = prefix
        self.nodes |= {prefix + node.name: node for node in blueprint.graph.nodes}
        # On a busy machine, too, the same events go into the same writes.
        journal.linger = PATIENCE
        stages = {name: self._hurried(plan, prefix + name) for name, plan in blueprint.stages.items()}
        return super()._lives(replace(blueprint, stages=stages), _without_waits(policy), journal, context)

    def _hurried(self, plan: StagePlan, path: str) -> StagePlan:
        return replace(
            plan,
            retry=None if plan.retry is None else _at_once(plan.retry),
            timeout=PATIENCE if path in self._impatient_of else plan.timeout,
            # Its effect is to land before anybody asks for it, however long it takes.
            patient=plan.patient or path in self._impatient_of,
            compensation=None if plan.compensation is None else _undone_at_once(plan.compensation),
        )

    def _actions(self, blueprint: Blueprint, saga_id: str) -> Actions:
        return self._play(blueprint, self._prefixes[saga_id])


def _without_waits(policy: Policy) -> Policy:
    return policy.model_copy(update={"retry": _at_once(policy.retry), "compensation": _undone_at_once(policy.compensation)})


def _at_once(retry: Retry) -> Retry:
    return Retry(attempts=retry.attempts, wait=0, jitter=False, max_elapsed=retry.max_elapsed, retry_on=retry.retry_on)


def _undone_at_once(compensation: Compensation) -> Compensation:
    return compensation.model_copy(update={"retry": _at_once(compensation.retry)})


class ProcessDied(LedgerError):
    """From here on, nothing that this process does is recorded."""


class MortalLedger(MemoryLedger):
    """Dies at a chosen write, and can be taken up again as if by another process.

    Args:
        durable: It hands out what a durable ledger would: what was written as JSON and read again.

    Attributes:
        struck_at: The path of the stage that the last write was about; empty for the saga as a whole, None while it lives.
        struck_events: What that write was to record.
    """

    def __init__(self, *, durable: bool) -> None:
        super().__init__()
        self.durable = durable
        self.struck_at: str | None = None
        self.struck_events: tuple[str, ...] = ()
        self._writes_left: int | None = None
        self._after = False
        self._is_dead = False

    def die_at(self, write: int, *, after: bool) -> None:
        """Die at the n-th write from now on: before it, or when it is in the ledger."""
        self._writes_left, self._after = write, after

    def revive(self) -> None:
        """Be the ledger that the next process finds; who held a saga is gone."""
        self._writes_left, self._is_dead = None, False
        for saga in self._sagas.values():
            saga.owner = None

    def _path(self, started: SagaStarted) -> str:
        """The path that leads to a saga's stages; empty for one that no other runs."""
        return "" if started.parent is None else f"{self._path(self._sagas[started.parent].started)}{started.parent_stage}/"

    def _refuse_if_dead(self) -> None:
        if self._is_dead:
            raise ProcessDied("the process is played dead")

    def _is_the_last(self) -> bool:
        self._refuse_if_dead()
        if self._writes_left is None:
            return False
        self._writes_left -= 1
        return self._writes_left == 0

    def _die(self, saga_id: str, events: Sequence[AnyEvent]) -> None:
        first = events[0]
        path = self._path(first if isinstance(first, SagaStarted) else self._sagas[saga_id].started)
        stages = [event.stage for event in events if isinstance(event, StageEvent)]
        self.struck_at = path + stages[0] if stages else path.rstrip("/")
        self.struck_events = tuple(type(event).__name__ for event in events)
        self._is_dead = True
        self._refuse_if_dead()

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent]) -> int:
        """Record a new saga, unless this is where the process dies."""
        is_last = self._is_the_last()
        if is_last and not self._after:
            self._die(saga_id, events)
        token = await super().create(saga_id, owner, events)
        if is_last:
            self._die(saga_id, events)
        return token

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        """Record the events, unless this is where the process dies."""
        is_last = self._is_the_last()
        if is_last and not self._after:
            self._die(saga_id, events)
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)
        if is_last:
            self._die(saga_id, events)

    async def acquire(self, saga_id: str, owner: str) -> int:
        """Take the lease of a saga."""
        self._refuse_if_dead()
        return await super().acquire(saga_id, owner)

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga, as they are at rest."""
        self._refuse_if_dead()
        events = await super().read(saga_id)
        return tuple(event_from_json(event_to_json(event)) for event in events) if self.durable else events
