"""A saga and the sagas that its stages run, as their events tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Self

from saga.events import AnyEvent, SagaStarted, SagaStatus
from saga.graph import Role
from saga.ledger import Ledger, StageState
from saga.recovery import stage_states
from saga.recovery.record import Step
from saga.recovery.scope import left_to_undo
from saga.recovery.state import SagaState

_S = StageState


class Family:
    """Folds the events of a saga and of the sagas that its stages run; `hear` is a listener for a coordinator.

    Attributes:
        head: The id of the saga that it is about.
        sagas: The states of all of them, by id.
    """

    def __init__(self, head: str) -> None:
        self.head = head
        self.sagas: dict[str, SagaState] = {}
        self._heard: Counter[str] = Counter()

    @classmethod
    async def read(cls, ledger: Ledger, head: str) -> Self:
        """What the ledger holds of them now."""
        family = cls(head)
        async for saga_id, event in family.news(ledger):
            family.hear(saga_id, event)
        return family

    async def news(self, ledger: Ledger) -> AsyncIterator[tuple[str, AnyEvent]]:
        """What the ledger holds of them that has not been heard, parents first."""
        waiting = [self.head]
        while waiting:
            saga_id = waiting.pop(0)
            for event in (await ledger.read(saga_id))[self._heard[saga_id] :]:
                yield saga_id, event
            waiting += [entry.saga_id for entry in await ledger.list(parent=saga_id)]

    def hear(self, saga_id: str, event: AnyEvent) -> None:
        """Take in an event; those of other sagas are passed over."""
        self._heard[saga_id] += 1
        if isinstance(event, SagaStarted):
            if saga_id == self.head or event.parent in self.sagas:
                self.sagas[saga_id] = SagaState([event])
        elif saga_id in self.sagas:
            self.sagas[saga_id].apply(event)

    def children(self, saga_id: str, stage: str) -> list[str]:
        """The sagas that a stage ran, oldest first, without those that were undone before it ran the last one."""
        ran = {
            child: state for child, state in self.sagas.items() if (state.started.parent, state.started.parent_stage) == (saga_id, stage)
        }
        return [child for child, state in ran.items() if state.status is not SagaStatus.COMPENSATED or child == list(ran)[-1]]

    def standing(self) -> Iterator[tuple[str, StageState]]:
        """The stages that have, or may have, an effect now, by their paths."""
        for prefix, state in self._branches():
            for name, shown in stage_states(state).items():
                record = state.stages[name]
                lasts = record.landed and state.graph[name].role is not Role.PLAIN and shown is not _S.UNDONE
                if lasts or shown in {_S.RUNNING, _S.COMPENSATING, _S.STUCK, _S.IN_DOUBT}:
                    yield f"{prefix}{name}", shown

    def _branches(self) -> Iterator[tuple[str, SagaState]]:
        paths: dict[str | None, str] = {}
        for saga_id, state in self.sagas.items():
            started = state.started
            paths[saga_id] = f"{paths[started.parent]}{started.parent_stage}/" if started.parent in paths else ""
            yield paths[saga_id], state


def to_undo(state: SagaState) -> frozenset[str]:
    """What a saga on its way back has still to undo."""
    if state.status is not SagaStatus.COMPENSATING or state.reason is None:
        return frozenset()
    return frozenset(name for name, step in left_to_undo(state, state.reason).items() if step is not Step.HOLD)
