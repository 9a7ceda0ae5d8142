"""The backward run: undoes what took effect, dependents before what they depend on, branches in parallel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextvars import copy_context
from typing import TYPE_CHECKING, Final

from stageflow.api import StageOutput, StageStatus

from saga.events import CompensationCompleted, CompensationFailed, CompensationStarted, TurnReason
from saga.failures import Failure, FailureKind, raised_instead
from saga.ledger import StageState
from saga.live.asking import ask
from saga.quick import maker, members
from saga.recovery import Rollback
from saga.recovery.record import Step, undo_step
from saga.report import NestedSagaFailed, SagaReport
from saga.tasks import closes, instead_of_cancel, outlast, start
from saga.text import glimpse, qualified, reason_in, said, shown
from saga.watch import Crew, Employer, Watched

if TYPE_CHECKING:
    from saga.contexts import CompensationContext
    from saga.live.saga import LiveSaga
    from saga.policies import Compensation, Retry
    from saga.recovery.record import StageRecord

_S: Final = members(StageState)
_STEP: Final = members(Step)
_compensation_started: Final = maker(CompensationStarted)
_compensation_completed: Final = maker(CompensationCompleted)


class _Worker(Watched):
    """Undoes one stage after another, as long as any is open, each in a task of its own.

    Attributes:
        stage: The one that it undoes now.
        raised: What that one's code has raised, while the sagas are waited for that it has left on their way back.
    """

    __slots__ = ("raised", "stage")

    def __init__(self, stage: str, employer: Employer) -> None:
        super().__init__(employer)
        self.stage = stage
        self.raised: BaseException | None = None


class Backward(Employer):
    """Carries out the rollback of one saga that has turned back."""

    def __init__(self, saga: LiveSaga, reason: TurnReason) -> None:
        self._saga = saga
        self._reason = reason
        self._state = saga.journal.state
        self._children = saga.children
        self._amendments = saga.keeper.amendments
        self._journal = saga.journal
        self._settings = saga.policy.compensation
        self._rollback = Rollback(self._state, reason)
        self._workers: Crew[_Worker] = Crew()
        self._context = copy_context()
        self._loop = asyncio.get_running_loop()
        self._until: float | None = None
        self._expired = False
        self._broken: Exception | None = None
        self._is_overtaken = False
        self._noting: asyncio.Task[None] | None = None
        # When the attempts began of a compensation that what came late has put off, and how many there were.
        self._put_off: dict[str, tuple[float, int]] = {}

    async def run(self) -> None:
        """Undo all that can be undone; what comes late meanwhile, too.

        Raises:
            LedgerError: The ledger could not record; no further compensation was started after that.
        """
        timer = None
        if self._settings.deadline is not None:
            self._until = self._loop.time() + self._settings.deadline
            timer = self._loop.call_at(self._until, self._expire)
        try:
            while await self._undo_what_is_open():
                self._is_overtaken = False
                if not self._rollback.is_stopped:
                    self._rollback = Rollback(self._state, self._reason)
        finally:
            if timer is not None:
                timer.cancel()
        for stage, record in self._state.stages.items():
            if record.state is _S.COMPENSATING:
                await self._leave_held_back(stage, record)

    async def _leave_held_back(self, stage: str, record: StageRecord) -> None:
        """Call stuck what came late in the midst of its undoing has put off for good."""
        if undo_step(self._state.graph[stage], record) is _STEP.PROBE:
            await ask(self._saga, stage)
        if record.state is _S.COMPENSATING:
            assert record.undo_failure is not None  # it waits for another attempt
            await self._journal.record(CompensationFailed(stage=stage, failure=record.undo_failure))

    async def _undo_what_is_open(self) -> bool:
        """Undo all that the plan has open; whether something has come late meanwhile, so that there may be more."""
        self._put_to_work()
        # Promise 7: a cancel can start a compensation, never interrupt one.
        await self._workers.disband(self)
        if self._broken is not None:
            raise self._broken
        came_late = self._amendments.has_late(self._saga.id) and await self._amendments.note_late(self._saga)
        return came_late or self._is_overtaken

    def _expire(self) -> None:
        self._expired = True
        self._rollback.stop()

    def _put_to_work(self) -> None:
        """Have as many workers as there are open stages, within the limit; a worker that ends its stage takes the next."""
        limit, employed = self._settings.max_concurrency, self._workers.members
        while (limit is None or len(employed) < limit) and (stage := self._take()) is not None:
            self._employ(_Worker(stage, self))

    def _take(self) -> str | None:
        """Take an open stage; None: there is none, or what came late has overtaken the plan."""
        return None if self._is_overtaken else self._rollback.take()

    def _employ(self, worker: _Worker) -> None:
        # It is employed where another one has ended: in its context, what that one bound would be bound for this one.
        self._context.run(self._workers.employ, worker, self._work(worker))

    async def _work(self, worker: _Worker) -> bool:
        """Undo a stage, and go on with the next one in another task, on which nothing was left; whether there is one."""
        stage = worker.stage
        while not worker.given_up:
            if self._noting is not None or self._amendments.has_late(self._saga.id):
                await self._heed_late(worker)
            step = self._next_step(stage)
            if step is None:
                break
            if step is _STEP.PROBE:
                await ask(self._saga, stage)
            else:
                await self._compensate(worker)
        if self._until is not None and self._loop.time() >= self._until:
            # The timer strikes two turns of the loop after code that never awaited.
            self._expire()
        if worker.given_up:
            # What follows from that goes on, and it is not dismissed before.
            return True
        following = self._take()
        if following is None:
            return False
        worker.stage = following
        self._employ(worker)
        self._put_to_work()
        return True

    def _next_step(self, stage: str) -> Step | None:
        """What is to be done to undo a stage; None: nothing, as it is clear from here on, or held, or what came late goes before."""
        step = self._rollback.step(stage)
        if step is _STEP.CLEAR:
            self._rollback.clear(stage)
        elif step is _STEP.HOLD:
            self._rollback.hold(stage)
        elif not self._is_overtaken:
            return step
        return None

    def breaks(self, error: Exception, /) -> None:
        """Start no further compensation."""
        self._broken = self._broken or error
        self._rollback.stop()

    async def _heed_late(self, worker: _Worker) -> None:
        while self._noting is not None:
            # What is being recorded may depend on what this one would go on to.
            await outlast({self._noting})
        if self._amendments.has_late(self._saga.id):
            noting = self._noting = start(self._note_late(worker))
            await outlast({noting})
            noting.result()

    async def _note_late(self, worker: _Worker) -> None:
        def is_in_hand(stage: str) -> bool:
            return any(other.stage == stage for other in self._workers.members if other is not worker)

        try:
            if await self._amendments.note_late(self._saga, is_in_hand):
                # It may depend on what is open now, and its own turn may be over.
                self._is_overtaken = True
        finally:
            self._noting = None

    async def _compensate(self, worker: _Worker) -> None:
        """Attempt the compensation as often as its retry allows; then it is undone or stuck."""
        stage, record = worker.stage, self._state.stages[worker.stage]
        settings = self._saga.blueprint.stages[stage].undone_under(self._settings)
        began, tries = self._put_off.pop(stage, (self._loop.time(), 0))
        while True:
            tries += 1
            attempt = record.undo_attempts + 1
            await self._journal.record(_compensation_started(stage=stage, attempt=attempt))
            failure = await self._attempt(worker, self._saga.compensation_context(stage, attempt), settings)
            if worker.given_up:
                if failure is None:
                    self._saga.comes_late(CompensationCompleted(stage=stage, late=True))
                    await self._amendments.late_is_recorded()
                return
            if failure is None:
                await self._journal.record(_compensation_completed(stage=stage))
                return
            if not await self._tries_again(worker, failure, settings.retry, began, tries):
                return

    async def _tries_again(self, worker: _Worker, failure: Failure, retry: Retry, began: float, tries: int) -> bool:
        """Record that an attempt of the compensation has failed; whether another one follows, for which it is time when this returns."""
        stage, record = worker.stage, self._state.stages[worker.stage]
        wait = retry.wait_before_next(failure, attempt=tries, elapsed=self._loop.time() - began)
        error = failure.exception
        past_pivot = isinstance(error, NestedSagaFailed) and error.past_pivot and not self._is_open_within(stage)
        if self._expired or past_pivot:
            wait = None
        in_part = stage in self._children.undone_within and not (past_pivot and self._is_whole(stage))
        can_be_asked = self._state.graph[stage].can_probe and not (record.unanswered or past_pivot or in_part)
        if wait is None and can_be_asked:
            await self._journal.record(CompensationFailed(stage=stage, failure=failure, will_retry=True))
            if await self._got_through(stage):
                return False
        failed = CompensationFailed(stage=stage, failure=failure, will_retry=wait is not None, past_pivot=past_pivot, in_part=in_part)
        await self._journal.record(failed)
        # One that is past its pivot is kept, and no longer to be undone before what a fallback below it stood in for.
        self._is_overtaken = self._is_overtaken or past_pivot
        if wait is None:
            return False
        await self._sleep(wait)
        if self._expired:
            if not (can_be_asked and await self._got_through(stage)):
                await self._journal.record(CompensationFailed(stage=stage, failure=failure))
            return False
        await self._heed_late(worker)
        if self._is_overtaken:
            self._put_off[stage] = began, tries
        return not self._is_overtaken

    async def _got_through(self, stage: str) -> bool:
        """Ask whether a compensation that failed has undone its stage all the same: that is not to be called stuck, or kept after it."""
        await ask(self._saga, stage)
        return self._state.stages[stage].state is _S.UNDONE

    async def _attempt(self, worker: _Worker, context: CompensationContext, settings: Compensation) -> Failure | None:
        worker.begin(settings.timeout, self._saga.policy.cancel_grace)
        failure = None
        try:
            returned = await self._saga.actions.compensate(context)
        except BaseException as raised:
            if closes(raised, worker.task):
                raise
            # A compensation's failure is data.
            failure = await self._told(worker, context.attempt, settings, raised)
            worker.raised = raised
        if left := self._children.left_on_their_way_back(worker.stage):
            # In the time that the code has itself.
            await outlast(left)
        worker.end()
        if worker.task.cancelling():
            # A cancel that it did not heed was the compensation's, and strikes nothing that comes after it.
            await worker.absorb()
        if failure is not None:
            worker.raised = None
            return failure
        failure = _refusal(worker.stage, context.attempt, returned)
        # Where no stage has run a saga, nothing within one stands.
        return await self._left_within(worker.stage, context.attempt) if failure is None and self._children.has_any else failure

    async def _told(self, worker: _Worker, attempt: int, settings: Compensation, raised: BaseException) -> Failure:
        """What a compensation has raised, in words."""
        self._saga.heed_signal(raised)
        error = raised
        was_cancelled = await worker.absorb()
        if worker.reason is not None:
            instead = instead_of_cancel(raised)
            error = TimeoutError(f"no answer within {settings.timeout:g} s{raised_instead(instead)}")
            error.__cause__ = instead
        elif was_cancelled and isinstance(raised, asyncio.CancelledError):
            error = InterruptedError("its task was cancelled from outside")
        return Failure.raised(worker.stage, error, attempt=attempt, kind=FailureKind.COMPENSATION)

    def _is_open_within(self, stage: str) -> bool:
        """Whether a person has to act within, so that not only a point of no return is in the way, whatever the compensation says."""
        return any(not report.clean for report in self._children.undone_within.get(stage, {}).values())

    def _is_whole(self, stage: str) -> bool:
        """Whether its compensation has undone nothing, as far as anybody knows: within, and of what the stage recorded itself."""
        return not self._state.stages[stage].effects and all(map(_nothing_is_undone, self._children.undone_within[stage].values()))

    async def _left_within(self, stage: str, attempt: int) -> Failure | None:
        # Whatever the compensation made of that report: a stage is not undone while something within it stands (promise 5).
        for report in self._children.undone_within.get(stage, {}).values():
            if (failed := NestedSagaFailed.unless_undone(report)) is not None:
                return Failure.raised(stage, failed, attempt=attempt, kind=FailureKind.COMPENSATION)
        if await self._children.left_within(stage):
            message = "it returned, and something stands of a saga that the stage ran and that it has not asked to be undone"
            return Failure.of(stage, FailureKind.COMPENSATION, message, attempt=attempt)
        return None

    async def _sleep(self, seconds: float) -> None:
        # Somebody may cancel every task of the process; what is being undone is undone to the end.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(seconds)

    def gives_up(self, worker: _Worker, /) -> None:
        """Go on without a compensation that ignored its cancel."""
        self._saga.keeper.gives_up(worker.task)
        worker.successor = self._saga.spawn(self._workers.see_through(worker, self._given_up(worker)))

    async def _given_up(self, worker: _Worker) -> None:
        """Go on without a compensation that ignored its cancel: its stage is stuck."""
        stage = worker.stage
        attempt = self._state.stages[stage].undo_attempts
        if worker.raised is None:
            why = f"it was not done in time, and it ignored its cancel for {self._saga.policy.cancel_grace:g} s; it may still be running"
        else:
            raised = f"{type(worker.raised).__name__}: {said(worker.raised)}"
            why = f"it raised {raised}; a saga that it undoes besides was not undone in time, and may still be on its way back"
        error = TimeoutError(why)
        error.__cause__ = worker.raised
        failure = Failure.raised(stage, error, attempt=attempt, kind=FailureKind.COMPENSATION)
        await self._journal.record(CompensationFailed(stage=stage, failure=failure))
        self._rollback.hold(stage)
        self._workers.dismiss(worker)
        self._put_to_work()


def _is_done(returned: Awaitable[object]) -> bool:
    """Whether it is a task that has come to its end, and that well."""
    return isinstance(returned, asyncio.Future) and returned.done() and not returned.cancelled() and returned.exception() is None


def _nothing_is_undone(report: SagaReport) -> bool:
    return not report.undone and all(_nothing_is_undone(child) for stage in report.stages.values() for child in stage.children)


def _refusal(stage: str, attempt: int, returned: object) -> Failure | None:
    """What a compensation returned that says it has not undone its stage; other things that it may return say nothing."""
    if returned is None:
        return None  # as nearly always; what follows asks abstract classes
    if isinstance(returned, Awaitable) and not _is_done(returned):
        message = f"it returned {glimpse(returned)}, which nobody has awaited. Write await before its call"
        return Failure.of(stage, FailureKind.COMPENSATION, message, type=qualified(type(returned)), attempt=attempt)
    if isinstance(returned, Generator | AsyncGenerator):
        message = f"it returned {glimpse(returned)}, which nobody has gone through to its end. Write return, and not yield, in it"
        return Failure.of(stage, FailureKind.COMPENSATION, message, type=qualified(type(returned)), attempt=attempt)
    if not isinstance(returned, StageOutput) or any(returned.status == fine for fine in (StageStatus.OK, StageStatus.SKIP)):
        return None
    status = returned.status.value if isinstance(returned.status, StageStatus) else shown(returned.status)
    given = returned.data.get("cancel_reason") if returned.error is None and isinstance(returned.data, dict) else returned.error
    why = reason_in(given, "no reason given")
    return Failure.of(stage, FailureKind.COMPENSATION, f"it returned {status.upper()}: {why}", type=status, attempt=attempt)
