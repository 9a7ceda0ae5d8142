"""The forward run: which stages of a pipeline start, what their answers lead to, and how the whole comes to rest."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from stageflow.api import StageOutput, StageStatus

from saga.errors import LedgerError
from saga.events import SagaStopped, StageFailed, StageSkipped
from saga.failures import Failure, FailureKind, without_exception
from saga.graph import Role
from saga.ledger import StageState
from saga.live.around import STOPPING, Stages
from saga.live.attempts import StageRun, WholeRun
from saga.live.saga import PARENT_STOPS
from saga.live.scheduling import Schedule
from saga.outputs import copied_output
from saga.policies import ContinueWithFallback
from saga.quick import members
from saga.tasks import cut_short_by, end, leave_loop, this_task
from saga.text import brief, reason_in
from saga.watch import Crew

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stageflow import BaseInterceptor
    from stageflow.stages.inputs import StageInputs

    from saga.live.saga import LiveSaga

_S: Final = members(StageState)
_STATUS: Final = members(StageStatus)
_KIND: Final = members(FailureKind)
_ENDED_WELL: Final = frozenset({_S.KEPT, _S.FALLBACK, _S.SKIPPED})


class Forward(Stages, WholeRun):
    """Runs one saga forward, until every stage has ended or something stops it.

    Attributes:
        cause: What first stopped the run; None while nothing has.
    """

    def __init__(self, saga: LiveSaga, interceptors: Sequence[BaseInterceptor]) -> None:
        self.cause: Failure | None = None
        self.stopped: asyncio.Future[None] = saga.loop.create_future()
        self.interrupted: asyncio.Future[None] = saga.loop.create_future()
        # What was let pass is not what is recorded: interceptors and hooks may have changed it on its way to the others.
        self.passed: dict[str, StageOutput] = {}
        # Taken out of the policy once: of a model Python looks up each field anew, and then asks the model for it.
        self.timeout: float | None = saga.policy.timeout
        self.grace: float = saga.policy.cancel_grace
        self._saga = saga
        self._state = saga.journal.state
        self._journal = saga.journal
        self._policy = saga.policy
        self._schedule = Schedule(saga, interceptors)
        self._is_watched = self._schedule.is_watched
        self._loop = saga.loop
        self._running: Crew[StageRun] = Crew()
        self._fallen: set[str] = set()
        self._failures_before = 0
        self._until: float | None = None
        self._broken: Exception | None = None
        saga.stop = self.stop

    def is_stopping(self) -> bool:
        """Whether no further stage starts."""
        return self.cause is not None

    async def run(self) -> None:
        """Run until no stage runs any more.

        Raises:
            LedgerError: The ledger could not record; nothing was started after that.
        """
        timer = None
        if self._policy.deadline is not None:
            self._until = self._loop.time() + self._policy.deadline
            timer = self._loop.call_at(self._until, self._out_of_time)
        if this_task().cancelling():
            # Before it began: that has struck nothing.
            self._saga.stop_for_cancel()
        if not self._state.is_spotless:
            self._heed_what_was_before()
        try:
            await self._schedule.run(self)
        except asyncio.CancelledError:
            self._saga.stop_for_cancel()
        except (KeyboardInterrupt, SystemExit) as error:
            leave_loop(error)
            self.breaks(cut_short_by(error))
        await self._come_to_rest()
        if timer is not None:
            timer.cancel()
        await self._schedule.rest(self)
        self._saga.stop = None
        if self._broken is not None:
            raise self._broken

    def stop(self, cause: Failure, *, besides: str | None = None) -> None:
        """Start no further stage; the first cause stays the cause. Whoever waits is answered so, `besides` the stage that is to answer."""
        if self.cause is not None:
            return
        self.cause = cause
        self._failures_before = len(self._state.failures)
        # Not with its exception, whose frames hold the saga.
        self._saga.is_stopping, self._saga.stopped_by = True, without_exception(cause)
        end(self.stopped)
        self._schedule.stop(besides)
        for child in self._saga.children.alive:
            # A child is no single stage: it starts nothing more, either.
            child.interrupt(PARENT_STOPS)

    def _heed_what_was_before(self) -> None:
        """Take over what has fallen, and stop at once where the ledger lacks an output that is needed, or a person's word."""
        for name, record in self._state.stages.items():
            if record.with_branch and not record.again:
                self._fallen.add(name)
            if record.not_kept is not None and not record.again and any(map(self._is_due, self._state.graph.dependents[name])):
                # They would get a text where a value was.
                self.refuse_unkept(name)
            if record.held is not None and record.held.failure is not None and record.has_late_question and self.given(name) is None:
                # It came late while nobody ran the saga: to ask, run or replace the stage is for a person to allow.
                self.stop(record.held.failure)

    def _out_of_time(self) -> None:
        self.stop(Failure.of(None, FailureKind.TIMEOUT, f"the forward run exceeded its deadline of {self._policy.deadline:g} s"))
        self._interrupt()

    async def _come_to_rest(self) -> None:
        """Wait for what still runs, and record what stopped the run and what it left open."""
        if self.cause is not None and self.cause not in self._state.failures:
            # A stage's failure is in the ledger already; whoever resumes has to learn of any other cause, too.
            await self._record_stop(self.cause)
        if self._running.members:
            await self._drain()
        if self.cause is None:
            return
        for name, record in self._state.stages.items():
            if record.state is _S.RUNNING and record.failure is not None:
                # An earlier process left it open, and it did not get its turn before the saga stopped.
                await self._unless_broken(StageFailed(stage=name, failure=record.failure, in_doubt=record.doubt))

    async def _record_stop(self, cause: Failure) -> None:
        known = self._state.failures
        since = list(known)[self._failures_before :]
        if cause not in known and any(failure.kind is not FailureKind.INTERRUPTED for failure in since):
            # In the same turn of the loop, and not for what stops the saga: they come before it in the ledger, and by their times, too.
            self.cause = cause = cause.model_copy(update={"at": datetime.now(UTC)})
        await self._unless_broken(SagaStopped(cause=cause))

    async def _unless_broken(self, event: SagaStopped | StageFailed) -> None:
        if self._broken is not None:
            return
        try:
            await self._journal.record(event)
        except LedgerError as error:
            self.breaks(error)

    async def _drain(self) -> None:
        """Wait until no stage runs: promise 3 begins here."""
        policy, timer = self._policy, None
        if policy.in_flight == "cancel":
            # A pivot's outcome decides what may be undone at all, so it gets its time.
            self._interrupt(spared=Role.PIVOT)
        if policy.drain_timeout is not None:
            timer = self._loop.call_later(policy.drain_timeout, self._interrupt)
        await self._running.disband(self)
        if timer is not None:
            timer.cancel()

    def _interrupt(self, spared: Role | None = None) -> None:
        end(self.interrupted)
        for run in self._running.members:
            if run.node.role is not spared:
                run.cancel(FailureKind.INTERRUPTED)

    # -- a stage's turn ------------------------------------------------------------------------------------------

    def given(self, name: str) -> StageOutput | None:
        """What a stage gave that ended well before the saga was resumed; None: it is to run."""
        record = self._state.stages[name]
        if record.again or not (record.state in _ENDED_WELL or record.fell_back):
            return None
        assert record.output is not None  # what ended so has given one
        return copied_output(record.output)

    def can_be_left_out(self, name: str) -> bool:
        """Whether nothing of the stage can be in effect from an earlier run of the saga."""
        record = self._state.stages[name]
        return self._is_due(name) and (record.is_due_anew or not record.may_have_left_something)

    def begin(self, name: str, inputs: StageInputs) -> None:
        """Start a stage in a task of ours; its schedule is told when it has ended."""
        run = StageRun(self._saga, name, inputs, self)
        if self._is_watched and run.may_be_given_anew:
            self._note_passed(inputs)
        self._running.employ(run, self._see_to(run))

    def _note_passed(self, inputs: StageInputs) -> None:
        for name, output in inputs.prior_outputs.items():
            if name not in self.passed:
                self.passed[name] = copied_output(output)

    async def _see_to(self, run: StageRun) -> bool:
        """Have a stage take its turn, and tell its schedule what it answers; whether what follows goes on in another task."""
        answer: StageOutput | Failure | None = None
        if run.node.conditional or self._fallen:
            answer = await self._left_out(run)
        if answer is None and self._is_called_off(run):
            answer = STOPPING
        if answer is None:
            outcome = None if run.record.state is _S.NOT_RUN else await run.left_open()
            if outcome is None:
                outcome = await run.attempts()
            if run.given_up:
                await run.came_late(outcome)
                # It is not dismissed before the other task has seen to it.
                return True
            answer = outcome.output if outcome.failure is None else await self._absorb(run, outcome.failure)
            assert answer is not None  # without a failure there is an output
        if isinstance(answer, StageOutput) and answer.status is _STATUS.SKIP:
            try:
                self._saga.emit_skipped(run.name, answer)
            except Exception as error:  # noqa: BLE001 - a sink is the user's
                await self.refused(run.name, error)
        self._schedule.ended(self, run.name, answer)
        return False

    async def _left_out(self, run: StageRun) -> StageOutput | None:
        """What a stage answers that its condition skips, or that falls with one that it depends on; None if it is neither."""
        if run.node.conditional and self.can_be_left_out(run.name) and (skipped := await self._skipped(run)):
            return skipped
        for dependency in run.node.dependencies:
            if dependency in self._fallen:
                return await self._falls_with(run, dependency)
        return None

    def _is_called_off(self, run: StageRun) -> bool:
        """Whether the saga stops before the stage begins, be it for what nobody has heeded yet."""
        cancelled = self._saga.cancellation()
        if cancelled is not None:
            self.stop(Failure.of(None, FailureKind.CANCELLED, cancelled))
        if run.task.cancelling():
            # Before it began: that has struck nothing.
            self._saga.stop_for_cancel()
        if self._until is not None and self._loop.time() >= self._until:
            # The timer strikes a turn of the loop after code that never awaited.
            self._out_of_time()
        return self.cause is not None

    async def _skipped(self, run: StageRun) -> StageOutput | None:
        """The output of a stage that its condition skips; None if the stage is to run."""
        try:
            if not (reason := run.inputs.get("skip_reason")):
                return None
        except Exception as error:  # noqa: BLE001 - what another stage gave may be neither true nor false, as an array of numbers
            await self.refused(run.name, error)
            return STOPPING
        output = StageOutput.skip(reason)
        await self.learn(run.name, output)
        return output

    async def _falls_with(self, run: StageRun, dependency: str) -> StageOutput:
        self._fallen.add(run.name)
        output = StageOutput.skip(f"{dependency} did not complete")
        await self._journal.record(StageSkipped(stage=run.name, reason=str(output.data["reason"]), output=output, with_branch=True))
        return output

    def _is_due(self, name: str) -> bool:
        """Whether the stage has yet to run."""
        record = self._state.stages[name]
        return record.again or record.state is _S.NOT_RUN

    async def learn(self, name: str, output: StageOutput) -> None:
        """Record a stage that its condition skipped, or that an interceptor answered for, without having been started."""
        if not self._is_due(name) or self._broken is not None:
            return
        skipped = output.status is _STATUS.SKIP
        reason = brief(reason_in(output.data.get("reason"), "its condition says so")) if skipped else "an interceptor answered for it"
        await self._journal.record(StageSkipped(stage=name, reason=reason, output=copied_output(output)))
        if self._state.stages[name].not_kept is not None:
            self.refuse_unkept(name)

    async def refused(self, stage: str, error: BaseException) -> None:
        """Stop because what is around a stage did not let it run, or end, or its condition can't be told."""
        if self.cause is not None and not self._is_due(stage):
            # The stage has ended, and what stopped the saga before stays its cause, also for whoever resumes it.
            if self._state.stop is None:
                await self._record_stop(self.cause)
            await self._unless_broken(SagaStopped(cause=Failure.raised(stage, error, attempt=0)))
            return
        failure = Failure.raised(stage, error, attempt=0)
        self.stop(failure)
        if self._is_due(stage):
            await self._unless_broken(StageFailed(stage=stage, failure=failure))

    def refuse_unkept(self, name: str) -> None:
        """Stop because the ledger could not keep what a stage gave."""
        record = self._state.stages[name]
        # Its effect stands and is known; but whoever resumed this saga would lack what it gave.
        message = f"{record.not_kept}: the ledger can't keep it"
        self.stop(Failure.of(name, FailureKind.CONTRACT, message, attempt=record.attempts))

    # -- what a failure leads to ---------------------------------------------------------------------------------

    async def _absorb(self, run: StageRun, failure: Failure) -> StageOutput | Failure:
        """Put something in the place of a failed stage's output, or stop the saga."""
        policy = self._policy
        if failure.kind is _KIND.CANCELLED:
            self.stop(failure, besides=run.name)
            return StageOutput.cancel(failure.message)
        if isinstance(policy, ContinueWithFallback) and self.cause is None and failure.kind is not FailureKind.INTERRUPTED:
            output = await run.stands_in(failure, policy)
            if output is not None:
                return output
            if policy.without_fallback == "skip_branch":
                self._fallen.add(run.name)
                return StageOutput.skip(f"{run.name} failed")
        self.stop(failure, besides=run.name)
        return failure

    def gives_up(self, run: StageRun, /) -> None:
        """Go on without a stage that ignored its cancel."""
        self._saga.keeper.gives_up(run.task)
        run.successor = self._saga.spawn(self._running.see_through(run, self._given_up(run)))

    async def _given_up(self, run: StageRun) -> None:
        failure = await run.leave_running()
        self._schedule.ended(self, run.name, await self._absorb(run, failure))

    def breaks(self, error: Exception, /) -> None:
        """Start no further stage; the run then raises this."""
        self._broken = self._broken or error
        self.stop(Failure.raised(None, error, attempt=0))
