"""The forward run: the stages of a pipeline, under the ledger."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from stageflow.api import StageCancellationRequested, StageOutput, StageStatus

from saga.alive import Attempt
from saga.asking import ask
from saga.compensable import SagaContext
from saga.errors import LedgerError, MisuseError, NotStorable
from saga.events import FallbackFailed, FallbackUsed, SagaStopped, StageCompleted, StageFailed, StageSkipped, StageStarted
from saga.failures import Failure, FailureKind
from saga.graph import Node, Role
from saga.ledger import StageState
from saga.outcomes import Outcome
from saga.outputs import copied, copied_output
from saga.policies import ContinueWithFallback
from saga.quick import members
from saga.report import NestedSagaFailed
from saga.scheduling import STOPPING, OwnSchedule, Schedule, StageflowSchedule, Stages
from saga.storable import refuse_unstorable
from saga.text import brief, printable, reason_in
from saga.watch import Crew, Employer, Watched, bounded, closes, cut_short_by, instead_of_cancel, is_of_signal, leave_loop, this_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stageflow import BaseInterceptor
    from stageflow.stages.inputs import StageInputs

    from saga.alive import LiveSaga
    from saga.blueprint import StagePlan
    from saga.record import StageRecord

_LOG: Final = logging.getLogger("saga")
_S: Final = members(StageState)
_STATUS: Final = members(StageStatus)
_ENDED_WELL: Final = frozenset({_S.KEPT, _S.FALLBACK, _S.SKIPPED})
_SAID_NOTHING: Final = frozenset({FailureKind.EXCEPTION, FailureKind.REPORTED, FailureKind.CONTRACT})
"""Of an attempt that failed so it is taken that it had no effect, and nobody has asked."""


class _StageRun(Watched):
    """One stage on its way through the forward run."""

    __slots__ = ("host", "inputs", "name", "node", "plan", "record")

    def __init__(self, node: Node, plan: StagePlan, record: StageRecord, inputs: StageInputs, employer: Employer) -> None:
        super().__init__(employer)
        self.name = node.name
        self.node = node
        self.plan = plan
        self.record = record
        self.inputs = inputs
        self.host: Attempt


class Forward(Stages, Employer):
    """Runs one saga forward, until every stage has ended or something stops it.

    Attributes:
        cause: What first stopped the run; None while nothing has.
    """

    def __init__(self, saga: LiveSaga, interceptors: Sequence[BaseInterceptor]) -> None:
        self.cause: Failure | None = None
        self._saga = saga
        self._state = saga.journal.state
        self._record = saga.journal.record
        self._policy = saga.policy
        by_stageflow = interceptors or saga.needs_stageflow()
        # What interceptors have let pass is not what is recorded: they may have changed it on its way to the others.
        self._is_intercepted = bool(interceptors)
        self._passed: dict[str, StageOutput] = {}
        self._schedule: Schedule = StageflowSchedule(saga, interceptors) if by_stageflow else OwnSchedule(saga)
        self._loop = asyncio.get_running_loop()
        self._running: Crew[_StageRun] = Crew()
        self._fallen: set[str] = set()
        self._cut_off: set[str] = set()
        self._stopped = asyncio.Event()
        self._interrupted = asyncio.Event()
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
        self._fallen = {name for name, record in self._state.stages.items() if record.with_branch and not record.again}
        timer = None
        if self._policy.deadline is not None:
            self._until = self._loop.time() + self._policy.deadline
            timer = self._loop.call_at(self._until, self._out_of_time)
        self._heed_early_cancel(this_task())
        self._heed_what_is_missing()
        try:
            await self._schedule.run(self)
        except asyncio.CancelledError:
            self._stop_for_cancel()
        except (KeyboardInterrupt, SystemExit) as error:
            leave_loop(error)
            self.breaks(cut_short_by(error))
        await self._come_to_rest()
        if timer is not None:
            timer.cancel()
        if self._broken is None:
            await self._schedule.tell(self)
        self._saga.stop = None
        if self._broken is not None:
            raise self._broken

    def stop(self, cause: Failure, *, besides: str | None = None) -> None:
        """Start no further stage; the first cause stays the cause. Whoever waits is answered so, `besides` the stage that is to answer."""
        if self.cause is not None:
            return
        self.cause = cause
        self._saga.is_stopping, self._saga.stopped_by = True, str(cause)
        self._stopped.set()
        self._schedule.stop(besides)
        for child in self._saga.children:
            # A child is no single stage: it starts nothing more, either.
            child.interrupt("the saga that runs it is stopping")

    def _heed_early_cancel(self, task: asyncio.Task[Any]) -> None:
        if task.cancelling():
            # It came before the task began, or while a ledger wrote that outlasts it, and has struck nothing.
            self._stop_for_cancel()

    def _heed_what_is_missing(self) -> None:
        for name, record in self._state.stages.items():
            if record.not_kept is not None and not record.again and any(map(self._is_due, self._state.graph.dependents[name])):
                # They would get a text where a value was.
                self._refuse_unkept(name)
            if record.held is not None and record.held.failure is not None and record.is_held and self.given(name) is None:
                # It came late while nobody ran the saga: to ask, run or replace the stage is for a person to allow.
                self.stop(record.held.failure)

    def _stop_for_cancel(self) -> None:
        # Somebody cancels every task of the process; none of ours may die of it, or the saga would wait for it for ever.
        self._saga.interrupt("a task of the saga was cancelled from outside")

    def _out_of_time(self) -> None:
        self.stop(Failure.of(None, FailureKind.TIMEOUT, f"the forward run exceeded its deadline of {self._policy.deadline:g} s"))
        self._interrupt()

    async def refused(self, stage: str, error: Exception) -> None:
        """Stop because an interceptor did not let a stage run, or end, or its condition can't be told."""
        # A failure of the stage itself has stopped the run before its wrapper raised it.
        failure = Failure.raised(stage, error, attempt=0)
        self.stop(failure)
        if self._is_due(stage):
            await self._unless_broken(StageFailed(stage=stage, failure=failure))

    async def _come_to_rest(self) -> None:
        """Wait for what still runs, and record what stopped the run and what it left open."""
        if self.cause is not None and self.cause not in self._state.failures:
            # A stage's failure is in the ledger already; whoever resumes has to learn of any other cause, too.
            await self._unless_broken(SagaStopped(cause=self.cause))
        if self._running.members:
            await self._drain()
        if self.cause is None:
            return
        for name, record in self._state.stages.items():
            if record.state is _S.RUNNING and record.failure is not None:
                # An earlier process left it open, and it did not get its turn before the saga stopped.
                await self._unless_broken(StageFailed(stage=name, failure=record.failure, in_doubt=record.doubt))

    async def _unless_broken(self, event: SagaStopped | StageFailed) -> None:
        if self._broken is not None:
            return
        try:
            await self._record(event)
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
        self._interrupted.set()
        for run in self._running.members:
            if run.node.role is not spared:
                run.cancel(FailureKind.INTERRUPTED)

    # -- one stage -----------------------------------------------------------------------------------------------

    def given(self, name: str) -> StageOutput | None:
        """What a stage gave that ended well before the saga was resumed; None: it is to run."""
        record = self._state.stages[name]
        if record.again or not (record.state in _ENDED_WELL or record.fell_back):
            return None
        assert record.output is not None  # what ended so has given one
        return copied_output(record.output)

    def begin(self, name: str, inputs: StageInputs) -> None:
        """Start a stage in a task of ours; its schedule is told when it has ended."""
        run = _StageRun(self._state.graph[name], self._saga.blueprint.stages[name], self._state.stages[name], inputs, self)
        if self._is_intercepted and (run.node.has_fallback or (run.plan.retry or self._policy.retry).attempts > 1):
            self._passed |= {each: copied_output(output) for each, output in inputs.prior_outputs.items() if each not in self._passed}
        self._running.employ(run, self._see_to(run))

    def _give_anew(self, run: _StageRun) -> None:
        """Give a stage what those before gave, as it was given: an attempt may have changed it, and no crash would show that."""
        recorded = {name: self._state.stages[name].output or given for name, given in run.inputs.prior_outputs.items()}
        outputs = {name: copied_output(self._passed.get(name, output)) for name, output in recorded.items()}
        run.inputs = replace(run.inputs, prior_outputs=outputs)

    async def _see_to(self, run: _StageRun) -> bool:
        answer = await self._stage(run)
        if not run.given_up:
            self._schedule.ended(self, run.name, answer)
        # What follows from that goes on, and it is not dismissed before.
        return run.given_up

    def breaks(self, error: Exception, /) -> None:
        """Start no further stage; the run then raises this."""
        self._broken = self._broken or error
        self.stop(Failure.raised(None, error, attempt=0))

    async def _stage(self, run: _StageRun) -> StageOutput | Failure:
        node = run.node
        if node.conditional and (skipped := await self._skipped(run)):
            return skipped
        for dependency in node.dependencies:
            if dependency in self._fallen:
                return await self._falls_with(run, dependency)
            if self._is_due(dependency):
                await self.learn(dependency, run.inputs.prior_outputs[dependency])
        cancelled = self._saga.cancellation()
        if cancelled is not None:
            self.stop(Failure.of(None, FailureKind.CANCELLED, cancelled))
        self._heed_early_cancel(run.task)
        if self._until is not None and self._loop.time() >= self._until:
            # The timer strikes a turn of the loop after code that never awaited.
            self._out_of_time()
        if self.is_stopping():
            return STOPPING
        outcome = None if run.record.state is _S.NOT_RUN else await self._left_open(run)
        if outcome is None:
            outcome = await self._attempts(run)
        if run.given_up:
            self._came_late(run, outcome)
            await self._saga.keeper.amendments.late_is_recorded()
            return STOPPING
        if outcome.failure is None:
            assert outcome.output is not None  # without a failure there is one
            return outcome.output
        return await self._absorb(run, outcome.failure)

    async def _skipped(self, run: _StageRun) -> StageOutput | None:
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

    def _came_late(self, run: _StageRun, outcome: Outcome) -> None:
        """Hand over what code came to that nobody waited for any more."""
        if outcome.failure is None and outcome.output is not None and outcome.output.status is _STATUS.OK:
            self._saga.comes_late(StageCompleted(stage=run.name, output=copied_output(outcome.output), late=True))
        elif run.record.answer is False:
            # Where nothing has answered it is in doubt, and a person looks anyway.
            message = (
                "saga %s: %s, after it had been given up and its probe had answered that nothing had landed; look whether that is still so"
            )
            _LOG.warning(message, printable(self._saga.id), printable(str(outcome.failure or f"stage {run.name!r} has ended")))

    def _is_due(self, name: str) -> bool:
        """Whether the stage has yet to run."""
        record = self._state.stages[name]
        return record.again or record.state is _S.NOT_RUN

    async def learn(self, name: str, output: StageOutput) -> None:
        """Record a stage that its condition skipped, or that an interceptor answered for, without having been started."""
        if not self._is_due(name) or output.status in {_STATUS.CANCEL, _STATUS.FAIL}:
            return
        skipped = output.status is _STATUS.SKIP
        reason = brief(reason_in(output.data.get("reason"), "stageflow skipped it")) if skipped else "an interceptor answered for it"
        await self._record(StageSkipped(stage=name, reason=reason, output=copied_output(output)))
        self._refuse_unkept(name)

    async def _falls_with(self, run: _StageRun, dependency: str) -> StageOutput:
        self._fallen.add(run.name)
        output = StageOutput.skip(f"{dependency} did not complete")
        await self._record(StageSkipped(stage=run.name, reason=str(output.data["reason"]), output=output, with_branch=True))
        return output

    async def _left_open(self, run: _StageRun) -> Outcome | None:
        """What an earlier process left to be decided; None if the stage is to run."""
        record, node = run.record, run.node
        if record.state in {_S.FAILED, _S.IN_DOUBT} and not record.again:
            # It died before what follows from this failure was recorded.
            if record.awaits_fallback and await self._saga.left_within(run.name):
                self._cut_off.add(run.name)
            return Outcome(failure=record.failure)
        if not record.doubt:
            return None
        failure = record.failure
        assert failure is not None  # it is in doubt because an attempt failed
        may_repeat = node.idempotent or record.may_repeat
        if node.idempotent and await self._saga.has_child_under_way(run.name):
            # Run again, it goes on with that one; a probe could only say that nobody knows.
            return None
        if node.can_probe:
            landed = await ask(self._saga, run.name, stop=self._interrupted)
            if landed is not None:
                return Outcome(output=landed)
            may_repeat = may_repeat or record.answer is False
        elif not may_repeat:
            retry = run.plan.retry or self._policy.retry
            tries = record.attempts - record.attempts_before
            # Where it waited for its next attempt, that it gets one is in the ledger; what it failed with can't be asked once more.
            was_waiting = record.state is _S.RUNNING and failure.kind is not FailureKind.CRASHED
            may_repeat = was_waiting or retry.wait_before_next(failure, attempt=tries, elapsed=0.0) is not None
        if may_repeat:
            return None
        if record.state is _S.RUNNING:
            await self._record(StageFailed(stage=run.name, failure=failure, in_doubt=True))
        return Outcome(failure=failure)

    async def _attempts(self, run: _StageRun) -> Outcome:
        """Attempt the stage as often as its retry allows; the outcome is in the ledger when this returns."""
        retry = run.plan.retry or self._policy.retry
        seconds = run.plan.timeout or self._policy.timeout
        loop, node, name, record = self._loop, run.node, run.name, run.record
        began, goes_on = loop.time(), True
        tries = record.attempts - record.attempts_before
        while goes_on:
            tries += 1
            attempt = 1 if record.is_due_anew else record.attempts + 1
            await self._record(StageStarted(stage=name, attempt=attempt, execution=record.next_execution))
            self._heed_early_cancel(run.task)
            if self.is_stopping():
                failure = Failure.of(name, FailureKind.INTERRUPTED, "the saga stopped before it ran")
                await self._record(StageFailed(stage=name, failure=failure))
                return Outcome(failure=failure)
            outcome = await self._attempt(run, seconds)
            if not run.given_up:
                outcome = await self._wound_up(run, outcome)
            if run.given_up or record.state is _S.KEPT:
                return outcome
            if outcome.failure is None:
                await self._record(self._end_of(run, outcome))
                self._refuse_unkept(name)
                return outcome
            failure, error = outcome.failure, outcome.failure.exception
            left_within = await self._saga.left_within(name)
            # A plain stage has declared no effect, so there is nothing to be in doubt about.
            in_doubt = failure.kind in {FailureKind.TIMEOUT, FailureKind.INTERRUPTED} and node.role is not Role.PLAIN
            asked = outcome.output is not None and outcome.output.status is _STATUS.RETRY
            wait = retry.wait_before_next(failure, attempt=tries, elapsed=loop.time() - began, asked=asked)
            if self.is_stopping():
                wait = None
            output = None if outcome.output is None else copied_output(outcome.output)
            await self._record(
                StageFailed(
                    stage=name,
                    failure=failure,
                    in_doubt=in_doubt,
                    will_retry=wait is not None,
                    past_pivot=node.is_point_of_no_return and isinstance(error, NestedSagaFailed) and error.past_pivot,
                    left_within=left_within,
                    output=output,
                )
            )
            if wait is None:
                return outcome
            if record.doubt and node.can_probe:
                landed = await ask(self._saga, name, stop=self._interrupted)
                if landed is not None:
                    return Outcome(output=landed)
                if record.unanswered and not node.idempotent:
                    wait = None
            self._give_anew(run)
            goes_on = wait is not None and await self._pause(wait)
        # Called off: the failure that was to be mended stands.
        await self._record(StageFailed(stage=name, failure=failure, in_doubt=record.doubt, output=output))
        return outcome

    async def _wound_up(self, run: _StageRun, outcome: Outcome) -> Outcome:
        """The outcome of an attempt of which nothing runs any more, seen against all that is known."""
        is_well = outcome.failure is None and outcome.output is not None and outcome.output.status is _STATUS.OK
        if not is_well:
            await run.host.wind_up()
        for recording in self._saga.forgotten(run.name):
            outcome = await self._catch_up(run, recording, outcome)
        return outcome if is_well else await self._checked(run, outcome)

    async def _catch_up(self, run: _StageRun, recording: Coroutine[Any, Any, None], outcome: Outcome) -> Outcome:
        """Record what the stage has recorded without `await`; the attempt's outcome with that."""
        try:
            await recording
            warnings.warn(f"stage {run.name!r} called ctx.record(...) without await", RuntimeWarning, stacklevel=2)
        except (MisuseError, NotStorable, RuntimeWarning) as error:
            return Outcome(failure=outcome.failure or Failure.raised(run.name, error, attempt=run.record.attempts))
        return outcome

    def _end_of(self, run: _StageRun, outcome: Outcome) -> StageCompleted | StageSkipped:
        output = outcome.output
        assert output is not None  # without a failure there is one
        copy = copied_output(output)
        if output.status is _STATUS.SKIP:
            return StageSkipped(stage=run.name, reason=brief(reason_in(output.data.get("reason"), "it said so")), output=copy)
        run.plan.warn_of_misfit(output)
        return StageCompleted(stage=run.name, output=copy)

    def _refuse_unkept(self, name: str) -> None:
        record = self._state.stages[name]
        if record.not_kept is not None:
            # Its effect stands and is known; but whoever resumed this saga would lack what it gave.
            message = f"{record.not_kept}: the ledger can't keep it"
            self.stop(Failure.of(name, FailureKind.CONTRACT, message, attempt=record.attempts))

    async def _pause(self, seconds: float) -> bool:
        """Wait for the next attempt; whether there is to be one."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            return True
        except asyncio.CancelledError:
            self._stop_for_cancel()
        return False

    async def _attempt(self, run: _StageRun, seconds: float | None) -> Outcome:
        context = self._context(run)
        run.begin(seconds, None if run.plan.patient else self._policy.cancel_grace)
        try:
            returned = await self._saga.actions.execute(context)
        except BaseException as error:
            if closes(error, run.task):
                raise
            # A stage's failure is data, also when it calls sys.exit().
            run.end()
            return await self._raised(run, error, seconds)
        run.end()
        # A cancel that it did not heed was the stage's, and strikes nothing that comes after it.
        await run.absorb()
        return Outcome.of(run.name, run.record.attempts, returned)

    async def _checked(self, run: _StageRun, outcome: Outcome) -> Outcome:
        """The outcome of a stage that says that it has had no effect, seen against what its attempts before have come to."""
        record, output = run.record, outcome.output
        if output is None or output.status not in {_STATUS.SKIP, _STATUS.CANCEL}:
            return outcome
        if run.node.can_probe and any(earlier.failed in _SAID_NOTHING for earlier in record.tries):
            # They are taken at their word where nothing else is known; where it can be asked, it is asked before the word counts.
            landed = await ask(self._saga, run.name, stop=self._interrupted)
            if landed is not None:
                return Outcome(output=landed, failure=outcome.failure)
        if output.status is not _STATUS.SKIP:
            return outcome
        left_within = await self._saga.left_within(run.name)
        if record.effects or record.doubt or left_within:
            # Its dependents would run on, and what stands of it could then not be undone before them.
            if left_within:
                had = "left nothing standing, got a SKIP and sagas that stand"
            elif record.effects:
                had = f"recorded no effect, got a SKIP after {len(record.effects)} recorded effects"
            else:
                had = "had no effect, got a SKIP after an attempt that may have had one"
            message = f"expected a stage that skips itself to have {had}"
            return Outcome(output, Failure.of(run.name, FailureKind.CONTRACT, message, attempt=record.attempts))
        return outcome

    def _context(self, run: _StageRun, *, is_fallback: bool = False) -> SagaContext:
        saga = self._saga
        root = saga.root
        run.host = Attempt(saga, run.name, run.record.attempts, is_fallback=is_fallback)
        return SagaContext(
            snapshot=root.snapshot,
            inputs=run.inputs,
            stage_name=run.name,
            timer=root.timer,
            event_sink=root.event_sink,
            _cancellation_probe=saga.is_cancelled,
            _cancellation_reason_provider=saga.why_cancelled,
            saga_id=saga.id,
            attempt=run.record.attempts,
            idempotency_key=saga.forward_key(run.name),
            _host=run.host,
        )

    async def _raised(self, run: _StageRun, error: BaseException, seconds: float | None) -> Outcome:
        name, attempt = run.name, run.record.attempts
        self._saga.heed_signal(error)
        was_cancelled = await run.absorb()
        if run.reason is FailureKind.TIMEOUT:
            why = f"no answer within {seconds:g} s"
            return Outcome(failure=Failure.of(name, FailureKind.TIMEOUT, why, attempt=attempt, instead=instead_of_cancel(error)))
        if run.reason is FailureKind.INTERRUPTED or (was_cancelled and isinstance(error, asyncio.CancelledError)):
            why = "it was cancelled because the saga stopped" if self.cause is not None else "its task was cancelled from outside"
            return Outcome(failure=Failure.of(name, FailureKind.INTERRUPTED, why, attempt=attempt, instead=instead_of_cancel(error)))
        if isinstance(error, StageCancellationRequested):
            return Outcome.of(name, attempt, StageOutput.cancel(error.reason))
        if is_of_signal(error):
            why = f"a {type(error).__name__} struck while it ran"
            return Outcome(failure=Failure.of(name, FailureKind.INTERRUPTED, why, attempt=attempt))
        return Outcome(failure=Failure.raised(name, error, attempt=attempt))

    def gives_up(self, run: _StageRun, /) -> None:
        """Go on without a stage that ignored its cancel."""
        run.successor = self._saga.spawn(self._running.see_through(run, self._given_up(run)))

    async def _given_up(self, run: _StageRun) -> None:
        """Go on without a stage that ignored its cancel: it is in doubt, and may still be running."""
        assert run.reason is not None  # it was cancelled before it was given up
        run.host.give_up()
        message = f"it ignored its cancel for {self._policy.cancel_grace:g} s and was given up; it may still be running"
        failure = Failure.of(run.name, run.reason, message, attempt=run.record.attempts)
        in_doubt = run.node.role is not Role.PLAIN
        await self._record(StageFailed(stage=run.name, failure=failure, in_doubt=in_doubt))
        self._schedule.ended(self, run.name, await self._absorb(run, failure))

    # -- what a failure leads to ---------------------------------------------------------------------------------

    async def _absorb(self, run: _StageRun, failure: Failure) -> StageOutput | Failure:
        """Put something in the place of a failed stage's output, or stop the saga."""
        policy = self._policy
        if failure.kind is FailureKind.CANCELLED:
            self.stop(failure)
            return STOPPING
        if isinstance(policy, ContinueWithFallback) and self.cause is None and failure.kind is not FailureKind.INTERRUPTED:
            output = await self._stands_in(run, failure, policy)
            if output is not None:
                return output
            if policy.without_fallback == "skip_branch":
                self._fallen.add(run.name)
                return StageOutput.skip(f"{run.name} failed")
        self.stop(failure, besides=run.name)
        return failure

    async def _stands_in(self, run: _StageRun, failure: Failure, policy: ContinueWithFallback) -> StageOutput | None:
        """The output that stands in for a failed stage's, recorded; None if there is none."""
        node = run.node
        # A fallback that died when it had run sagas is called once more: these would stand beside an effect that is found to have landed.
        if node.can_probe and not run.record.unanswered and run.name not in self._cut_off:
            # With a landed effect there is nothing to stand in for; and nothing is left that could not be undone in order.
            landed = await ask(self._saga, run.name, stop=self._interrupted)
            if landed is not None:
                return landed
            if self.is_stopping():
                # Nothing goes on with it any more, and where the probe was cut off nobody knows that it is needed.
                return None
        output: StageOutput | None = None
        if node.has_fallback and (run.record.again or not run.record.fallback_failed):
            output = await self._fallback(run, failure)
        if output is not None:
            ran = run.host.ran
            left_within = await self._saga.left_within(run.name, besides=ran)
            used = FallbackUsed(stage=run.name, output=copied_output(output), source="stage", ran=ran, left_within=left_within)
            await self._record(used)
        elif run.name in policy.fallbacks:
            output = StageOutput.ok(copied(policy.fallbacks[run.name]))
            # It may have had a fallback of its own, which died with its process when it had run sagas.
            left_within = await self._saga.left_within(run.name)
            await self._record(FallbackUsed(stage=run.name, output=copied_output(output), source="policy", left_within=left_within))
        return output

    async def _fallback(self, run: _StageRun, failure: Failure) -> StageOutput | None:
        seconds, attempt = run.plan.timeout or self._policy.timeout, run.record.attempts
        self._give_anew(run)
        try:
            call = self._saga.actions.fallback(self._context(run, is_fallback=True), failure)
            returned = await bounded(call, seconds=seconds, grace=self._policy.cancel_grace, stop=self._interrupted)
            outcome = Outcome.of(run.name, attempt, returned)
            if outcome.failure is None and outcome.output is not None:
                refuse_unstorable(self._saga.journal.ledger, FallbackUsed(stage=run.name, output=outcome.output, source="stage"))
        except BaseException as error:
            if closes(error, run.task):
                raise
            # A fallback's failure is data.
            self._saga.heed_signal(error)
            outcome = Outcome(failure=Failure.raised(run.name, error, attempt=attempt))
        for recording in self._saga.forgotten(run.name):
            outcome = await self._catch_up(run, recording, outcome)
        if outcome.failure is not None:
            await run.host.wind_up()
            left_within = await self._saga.left_within(run.name)
            await self._record(FallbackFailed(stage=run.name, failure=outcome.failure, left_within=left_within))
            return None
        return outcome.output
