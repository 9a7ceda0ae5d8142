"""The course of a saga, forward and backward, until it comes to rest: the only place where these and the ledger meet."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from saga.backward import Backward
from saga.events import AnyEvent, FallbackFailed, SagaEnded, SagaStatus, SagaTurnedBack, TurnReason
from saga.failures import Failure, FailureKind
from saga.forward import Forward
from saga.ledger import StageState
from saga.live.asking import ask
from saga.log import LOG
from saga.quick import maker, members
from saga.recovery import conclude, final_status, status_of_cancelled
from saga.recovery.record import Step, undo_step
from saga.recovery.resumption import Chapter, Direction
from saga.tasks import outlast, start
from saga.text import printable

if TYPE_CHECKING:
    from stageflow import BaseInterceptor

    from saga.amendments import Amendments
    from saga.live.saga import LiveSaga

_STEP: Final = members(Step)
_saga_turned_back: Final = maker(SagaTurnedBack)
_saga_ended: Final = maker(SagaEnded)


class Course:
    """Brings a saga to rest: what its events come to is done, and recorded.

    Args:
        saga: The saga; it is held as long as its course runs.
        amendments: Who knows what came late for it.
        interceptors: stageflow's, around every stage.
    """

    def __init__(self, saga: LiveSaga, amendments: Amendments, interceptors: Sequence[BaseInterceptor]) -> None:
        self._saga: Final = saga
        self._state: Final = saga.journal.state
        self._amendments: Final = amendments
        self._interceptors: Final = interceptors

    def forward(self, before: Sequence[AnyEvent] = ()) -> Coroutine[Any, Any, None]:
        """Run the saga forward, and what follows from that, when it is awaited; these events are recorded first."""
        # Made here and not in its task: a cancel that comes before the task runs finds what it is to stop.
        return self._drive(Forward(self._saga, self._interceptors), before)

    def turn_to(self, chapter: Chapter) -> Coroutine[Any, Any, None]:
        """The work of a new chapter of the saga, which begins with its being recorded."""
        if chapter.direction is Direction.FORWARD:
            return self.forward(chapter.events)
        return self._finish(chapter)

    async def _finish(self, chapter: Chapter) -> None:
        if chapter.direction is Direction.NOWHERE:
            LOG.info("saga %s: %s", printable(self._saga.id), chapter.why_not)
            return
        await self._saga.journal.record(*chapter.events)
        if chapter.direction is Direction.CONCLUDE:
            await self._conclude(chapter.stop)
        else:
            assert chapter.reason is not None  # a saga goes backward for a reason
            await self._note_cut_off()
            await self._back(chapter.reason)

    async def _drive(self, forward: Forward, before: Sequence[AnyEvent]) -> None:
        if before:
            await self._saga.journal.record(*before)
        await forward.run()
        await self._conclude(forward.cause)

    async def _conclude(self, stop: Failure | None) -> None:
        saga, state = self._saga, self._state
        saga.is_stopping = True
        if self._amendments.has_late(saga.id):
            await self._amendments.note_late(saga)
        if saga.children.has_any:
            await self._note_cut_off()
        move = conclude(state, stop)
        if move.turn is not None:
            await saga.journal.record(_saga_turned_back(reason=move.turn, cause=move.cause))
            await self._back(move.turn)
            return
        if askable := self._left_to_ask():
            await self._ask(askable)
        status = move.status if move.status is not None else final_status(state)
        if status is SagaStatus.CANCELLED:
            status = status_of_cancelled(state)
        await saga.journal.record(_saga_ended(status=status, cause=move.cause), release=True)

    async def _note_cut_off(self) -> None:
        """Record which fallbacks were cut off with their process when they had run sagas that stand: nothing else tells of these."""
        saga, state = self._saga, self._state
        if state.is_spotless:
            return
        for name, record in state.stages.items():
            # Of one in doubt it is looked up when that is asked.
            may_have_begun = record.state is StageState.FAILED and record.awaits_fallback and not record.fallback_failed
            if may_have_begun and not record.stands_in_part and await saga.children.left_within(name):
                message = "the process of its fallback is gone; what became of it is not in the ledger"
                failure = Failure.of(name, FailureKind.CRASHED, message, attempt=record.attempts)
                await saga.journal.record(FallbackFailed(stage=name, failure=failure, left_within=True))

    def _left_to_ask(self) -> list[str]:
        """All that no compensation has asked for: to know is free, whatever the policy leaves standing."""
        state = self._state
        if state.is_spotless or not state.graph.with_probe:
            return []
        return [node.name for node in state.graph.with_probe if undo_step(node, state.stages[node.name]) is _STEP.PROBE]

    async def _ask(self, stages: list[str]) -> None:
        asking = [start(ask(self._saga, name)) for name in stages]
        await outlast(asking)
        # All of them are looked at: asyncio complains of an exception that nobody looked at.
        for error in [asked.exception() for asked in asking]:
            if error is not None:
                raise error

    async def _back(self, reason: TurnReason) -> None:
        self._saga.is_stopping = True
        await Backward(self._saga, reason).run()
        if askable := self._left_to_ask():
            await self._ask(askable)
        await self._saga.journal.record(_saga_ended(status=final_status(self._state)), release=True)
