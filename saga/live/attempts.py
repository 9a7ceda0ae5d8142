"""One stage's way through the forward run: its attempts, what they came to, and what stands in for it when they fail."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from stageflow.api import StageCancellationRequested, StageOutput, StageStatus

from saga.contexts import SagaContext
from saga.errors import MisuseError, NotStorable
from saga.events import FallbackFailed, FallbackUsed, StageCompleted, StageFailed, StageSkipped, StageStarted
from saga.failures import Failure, FailureKind
from saga.graph import Role
from saga.keys import execution_key
from saga.ledger import StageState
from saga.live.asking import ask
from saga.live.saga import AttemptHost, FallbackHost
from saga.log import LOG
from saga.outcomes import Outcome
from saga.outputs import copied, copied_output
from saga.quick import maker, members
from saga.report import NestedSagaFailed
from saga.storable import refuse_unstorable
from saga.tasks import closes, instead_of_cancel, is_of_signal
from saga.text import brief, printable, reason_in
from saga.watch import Employer, Watched, bounded

if TYPE_CHECKING:
    from stageflow.stages.inputs import StageInputs

    from saga.live.saga import LiveSaga
    from saga.policies import ContinueWithFallback, Retry

_S: Final = members(StageState)
_STATUS: Final = members(StageStatus)
_KIND: Final = members(FailureKind)
_saga_context: Final = maker(SagaContext)
_stage_started: Final = maker(StageStarted)
_stage_completed: Final = maker(StageCompleted)
_stage_failed: Final = maker(StageFailed)
_SAID_NOTHING: Final = frozenset({FailureKind.EXCEPTION, FailureKind.REPORTED, FailureKind.CONTRACT})
"""Of an attempt that failed so it is taken that it had no effect, and nobody has asked."""
_CUT_SHORT: Final = frozenset({FailureKind.TIMEOUT, FailureKind.INTERRUPTED})
"""Of an attempt that failed so nobody knows whether it had its effect."""


class WholeRun(Employer, Protocol):
    """What a stage on its way needs of the run that it is a part of.

    Attributes:
        stopped: Done when no stage starts any more, and no further attempt of one.
        interrupted: Done when what still runs is cancelled.
        passed: What interceptors and hooks have let pass of stages' outputs, where a stage may have to be given that anew.
        timeout: Seconds for one attempt of a stage that says nothing of that; None: no limit.
        grace: Seconds within which code is to end that was cancelled.
    """

    stopped: asyncio.Future[None]
    interrupted: asyncio.Future[None]
    passed: dict[str, StageOutput]
    timeout: float | None
    grace: float

    def refuse_unkept(self, name: str) -> None:
        """Stop because the ledger could not keep what a stage gave."""
        ...


class StageRun(Watched):
    """One stage on its way through the forward run.

    Attributes:
        name: Its name.
        node: What the graph says of it.
        record: What the events say of it.
        inputs: What it is given.
    """

    __slots__ = ("_host", "_is_cut_off", "_offer", "_saga", "inputs", "name", "node", "record")
    employer: WholeRun

    def __init__(self, saga: LiveSaga, name: str, inputs: StageInputs, employer: WholeRun) -> None:
        # By its name: until Python 3.12 each super() makes an object.
        Watched.__init__(self, employer)
        state = saga.journal.state
        self.name = name
        self.node = state.graph[name]
        self.record = state.stages[name]
        self.inputs = inputs
        self._saga = saga
        self._offer = saga.blueprint.stages[name]
        self._host: AttemptHost
        # Its fallback died with an earlier process, and sagas that it had run stand.
        self._is_cut_off = False

    @property
    def may_be_given_anew(self) -> bool:
        """Whether its code may be called more than once, with what those before gave."""
        return self.node.has_fallback or self._retry.attempts > 1

    @property
    def _retry(self) -> Retry:
        return self._offer.retry or self._saga.policy.retry

    async def left_open(self) -> Outcome | None:
        """What an earlier process left to be decided; None if the stage is to run."""
        record, node = self.record, self.node
        if record.state in {_S.FAILED, _S.IN_DOUBT} and not record.again:
            # It died before what follows from this failure was recorded.
            if record.awaits_fallback and await self._saga.children.left_within(self.name):
                self._is_cut_off = True
            return Outcome(failure=record.failure)
        if not record.doubt:
            return None
        failure = record.failure
        assert failure is not None  # it is in doubt because an attempt failed
        may_repeat = node.idempotent or record.may_repeat
        if node.idempotent and await self._saga.children.has_under_way(self.name):
            # Run again, it goes on with that one; a probe could only say that nobody knows.
            return None
        if node.can_probe:
            landed = await ask(self._saga, self.name, stop=self.employer.interrupted)
            if landed is not None:
                return Outcome(output=landed)
            may_repeat = may_repeat or record.answer is False
        elif not may_repeat:
            # Where it waited for its next attempt, that it gets one is in the ledger; what it failed with can't be asked once more.
            was_waiting = record.state is _S.RUNNING and failure.kind is not FailureKind.CRASHED
            may_repeat = was_waiting or self._retry.wait_before_next(failure, attempt=record.attempts_since, elapsed=0.0) is not None
        if may_repeat:
            return None
        if record.state is _S.RUNNING:
            await self._saga.journal.record(StageFailed(stage=self.name, failure=failure, in_doubt=True))
        return Outcome(failure=failure)

    async def attempts(self) -> Outcome:
        """Attempt the stage as often as its retry allows; the outcome is in the ledger when this returns."""
        saga, name, record = self._saga, self.name, self.record
        seconds = self._offer.timeout or self.employer.timeout
        began = saga.loop.time()
        while True:
            attempt, execution = record.next_attempt()
            await saga.journal.record(_stage_started(stage=name, attempt=attempt, execution=execution))
            if self.task.cancelling():
                # While a ledger wrote that outlasts it.
                saga.stop_for_cancel()
            if self.employer.stopped.done():
                failure = Failure.of(name, FailureKind.INTERRUPTED, "the saga stopped before it ran")
                await saga.journal.record(StageFailed(stage=name, failure=failure))
                return Outcome(failure=failure)
            outcome = await self._attempt(seconds)
            if self.given_up:
                return outcome
            if name in saga.recordings or not outcome.is_well():
                outcome = await self._wound_up(outcome)
            if record.state is _S.KEPT:
                return outcome
            if outcome.failure is None:
                await saga.journal.record(self._end_of(outcome))
                if record.not_kept is not None:
                    self.employer.refuse_unkept(name)
                return outcome
            last = await self._failed(outcome, outcome.failure, began)
            if last is not None:
                return last

    async def _failed(self, outcome: Outcome, failure: Failure, began: float) -> Outcome | None:
        """Record how an attempt has failed; what the stage has come to with that, or None: it is attempted again."""
        saga, node, name, record = self._saga, self.node, self.name, self.record
        left_within = await saga.children.left_within(name) if saga.children.has_any else None
        # A plain stage has declared no effect, so there is nothing to be in doubt about.
        in_doubt = failure.kind in _CUT_SHORT and node.role is not Role.PLAIN
        asked = outcome.output is not None and outcome.output.status is _STATUS.RETRY
        wait = self._retry.wait_before_next(failure, attempt=record.attempts_since, elapsed=saga.loop.time() - began, asked=asked)
        if self.employer.stopped.done():
            wait = None
        error, output = failure.exception, None if outcome.output is None else copied_output(outcome.output)
        await saga.journal.record(
            _stage_failed(
                stage=name,
                failure=failure,
                in_doubt=in_doubt,
                will_retry=wait is not None,
                past_pivot=isinstance(error, NestedSagaFailed) and error.past_pivot and node.is_point_of_no_return,
                left_within=left_within,
                output=output,
            )
        )
        if wait is None:
            return outcome
        if record.doubt and node.can_probe:
            landed = await ask(saga, name, stop=self.employer.interrupted)
            if landed is not None:
                return Outcome(landed)
            if record.unanswered and not node.idempotent:
                wait = None
        self._give_anew()
        if wait is None or not await self._pause(wait):
            # Called off: the failure that was to be mended stands.
            await saga.journal.record(_stage_failed(stage=name, failure=failure, in_doubt=record.doubt, output=output))
            return outcome
        return None

    def _give_anew(self) -> None:
        """Give a stage what those before gave, as it was given: an attempt may have changed it, and no crash would show that."""
        recorded = {name: self._saga.journal.state.stages[name].output or given for name, given in self.inputs.prior_outputs.items()}
        outputs = {name: copied_output(self.employer.passed.get(name, output)) for name, output in recorded.items()}
        self.inputs = replace(self.inputs, prior_outputs=outputs)

    async def _pause(self, seconds: float) -> bool:
        """Wait for the next attempt; whether there is to be one."""
        try:
            await asyncio.wait({self.employer.stopped}, timeout=seconds)
        except asyncio.CancelledError:
            self._saga.stop_for_cancel()
        return not self.employer.stopped.done()

    # -- one attempt ---------------------------------------------------------------------------------------------

    async def _attempt(self, seconds: float | None) -> Outcome:
        context = self._context(AttemptHost(self._saga, self.name, self.record.attempts))
        self.begin(seconds, None if self._offer.bounds_itself else self.employer.grace)
        try:
            returned = await self._saga.actions.execute(context)
        except BaseException as error:
            if closes(error, self.task):
                raise
            # A stage's failure is data, also when it calls sys.exit().
            self.end()
            return await self._raised(error, seconds)
        self.end()
        if self.task.cancelling():
            # A cancel that it did not heed was the stage's, and strikes nothing that comes after it.
            await self.absorb()
        return Outcome.of(self.name, self.record.attempts, returned)

    def _context(self, host: AttemptHost) -> SagaContext:
        """What its code is given, which has the saga by that host."""
        saga = self._saga
        self._host = host
        return _saga_context(
            snapshot=saga.snapshot,
            inputs=self.inputs,
            stage_name=self.name,
            timer=saga.timer,
            event_sink=saga.event_sink,
            _cancellation_probe=saga.is_cancelled,
            _cancellation_reason_provider=saga.why_cancelled,
            saga_id=saga.id,
            attempt=self.record.attempts,
            idempotency_key=execution_key(saga.id, self.name, self.record.execution),
            _host=host,
        )

    async def _raised(self, error: BaseException, seconds: float | None) -> Outcome:
        name, attempt = self.name, self.record.attempts
        self._saga.heed_signal(error)
        was_cancelled = bool(self.task.cancelling()) and await self.absorb()
        if self.reason is _KIND.TIMEOUT:
            why = f"no answer within {seconds:g} s"
            return Outcome(failure=Failure.of(name, FailureKind.TIMEOUT, why, attempt=attempt, instead=instead_of_cancel(error)))
        if self.reason is _KIND.INTERRUPTED or (was_cancelled and isinstance(error, asyncio.CancelledError)):
            why = "it was cancelled because the saga stopped" if self.employer.stopped.done() else "its task was cancelled from outside"
            return Outcome(failure=Failure.of(name, FailureKind.INTERRUPTED, why, attempt=attempt, instead=instead_of_cancel(error)))
        if isinstance(error, StageCancellationRequested):
            return Outcome.of(name, attempt, StageOutput.cancel(error.reason))
        if is_of_signal(error):
            why = f"a {type(error).__name__} struck while it ran"
            return Outcome(failure=Failure.of(name, FailureKind.INTERRUPTED, why, attempt=attempt))
        return Outcome(failure=Failure.raised(name, error, attempt=attempt))

    async def _wound_up(self, outcome: Outcome) -> Outcome:
        """The outcome of an attempt of which nothing runs any more, seen against all that is known."""
        is_well = outcome.is_well()
        if not is_well:
            await self._host.wind_up()
        for recording in self._saga.forgotten(self.name):
            outcome = await self._catch_up(recording, outcome)
        return outcome if is_well or outcome.output is None else await self._checked(outcome)

    async def _catch_up(self, recording: Coroutine[Any, Any, None], outcome: Outcome) -> Outcome:
        """Record what the stage has recorded without `await`; the attempt's outcome with that."""
        try:
            await recording
            warnings.warn(f"stage {self.name!r} called ctx.record(...) without await", RuntimeWarning, stacklevel=2)
        except (MisuseError, NotStorable, RuntimeWarning) as error:
            return Outcome(failure=outcome.failure or Failure.raised(self.name, error, attempt=self.record.attempts))
        return outcome

    async def _checked(self, outcome: Outcome) -> Outcome:
        """The outcome of a stage that says that it has had no effect, seen against what its attempts before have come to."""
        record, output = self.record, outcome.output
        if output is None or output.status not in {_STATUS.SKIP, _STATUS.CANCEL}:
            return outcome
        if self.node.can_probe and any(earlier.failed in _SAID_NOTHING for earlier in record.tries):
            # They are taken at their word where nothing else is known; where it can be asked, it is asked before the word counts.
            landed = await ask(self._saga, self.name, stop=self.employer.interrupted)
            if landed is not None:
                return Outcome(output=landed, failure=outcome.failure)
        if output.status is not _STATUS.SKIP:
            return outcome
        left_within = await self._saga.children.left_within(self.name)
        if record.effects or record.doubt or left_within:
            # Its dependents would run on, and what stands of it could then not be undone before them.
            if left_within:
                had = "left nothing standing, got a SKIP and sagas that stand"
            elif record.effects:
                had = f"recorded no effect, got a SKIP after {len(record.effects)} recorded effects"
            else:
                had = "had no effect, got a SKIP after an attempt that may have had one"
            message = f"expected a stage that skips itself to have {had}"
            return Outcome(output, Failure.of(self.name, FailureKind.CONTRACT, message, attempt=record.attempts))
        return outcome

    def _end_of(self, outcome: Outcome) -> StageCompleted | StageSkipped:
        output = outcome.output
        assert output is not None  # without a failure there is one
        copy = copied_output(output)
        if output.status is _STATUS.SKIP:
            return StageSkipped(stage=self.name, reason=brief(reason_in(output.data.get("reason"), "it said so")), output=copy)
        if self._offer.output_model is not None:
            self._offer.warn_of_misfit(output)
        return _stage_completed(stage=self.name, output=copy)

    # -- a stage that was given up -------------------------------------------------------------------------------

    async def leave_running(self) -> Failure:
        """Record that nobody waits any more for code that ignored its cancel: it is in doubt, and may still be running."""
        assert self.reason is not None  # it was cancelled before it was given up
        self._host.give_up()
        message = f"it ignored its cancel for {self.employer.grace:g} s and was given up; it may still be running"
        failure = Failure.of(self.name, self.reason, message, attempt=self.record.attempts)
        in_doubt = self.node.role is not Role.PLAIN
        await self._saga.journal.record(StageFailed(stage=self.name, failure=failure, in_doubt=in_doubt))
        return failure

    async def came_late(self, outcome: Outcome) -> None:
        """Hand over what code came to that nobody waited for any more."""
        if outcome.is_well():
            assert outcome.output is not None  # or it would not be well
            self._saga.comes_late(StageCompleted(stage=self.name, output=copied_output(outcome.output), late=True))
        elif self.record.answer is False:
            # Where nothing has answered it is in doubt, and a person looks anyway.
            message = (
                "saga %s: %s, after it had been given up and its probe had answered that nothing had landed; look whether that is still so"
            )
            LOG.warning(message, printable(self._saga.id), printable(str(outcome.failure or f"stage {self.name!r} has ended")))
        await self._saga.keeper.amendments.late_is_recorded()

    # -- what stands in for it -----------------------------------------------------------------------------------

    async def stands_in(self, failure: Failure, policy: ContinueWithFallback) -> StageOutput | None:
        """The output that stands in for a failed stage's, recorded; None if there is none."""
        node = self.node
        # A fallback that died when it had run sagas is called once more: these would stand beside an effect that is found to have landed.
        if node.can_probe and not self.record.unanswered and not self._is_cut_off:
            # With a landed effect there is nothing to stand in for; and nothing is left that could not be undone in order.
            landed = await ask(self._saga, self.name, stop=self.employer.interrupted)
            if landed is not None:
                return landed
            if self.employer.stopped.done():
                # Nothing goes on with it any more, and where the probe was cut off nobody knows that it is needed.
                return None
        output: StageOutput | None = None
        if node.has_fallback and (self.record.again or not self.record.fallback_failed):
            output = await self._fallback(failure)
        if output is not None:
            ran = self._host.ran
            left_within = await self._saga.children.left_within(self.name, besides=ran)
            used = FallbackUsed(stage=self.name, output=copied_output(output), source="stage", ran=ran, left_within=left_within)
            await self._saga.journal.record(used)
        elif self.name in policy.fallbacks:
            data = copied(policy.fallbacks[self.name])
            if self._saga.journal.ledger.durable:
                # Of a policy that comes from there it is plain; what follows gets the same in whichever process it runs.
                data = self._saga.blueprint.restored({self.name: data})[self.name]
            output = StageOutput.ok(data)
            # It may have had a fallback of its own, which died with its process when it had run sagas.
            left_within = await self._saga.children.left_within(self.name)
            await self._saga.journal.record(
                FallbackUsed(stage=self.name, output=copied_output(output), source="policy", left_within=left_within)
            )
        return output

    async def _fallback(self, failure: Failure) -> StageOutput | None:
        seconds, attempt = self._offer.timeout or self.employer.timeout, self.record.attempts
        self._give_anew()
        context = self._context(FallbackHost(self._saga, self.name, attempt))
        try:
            call = self._saga.actions.fallback(context, failure)
            returned = await bounded(
                call,
                seconds=seconds,
                grace=self.employer.grace,
                gives_up=self._saga.keeper.gives_up,
                stop=self.employer.interrupted,
            )
            outcome = Outcome.of(self.name, attempt, returned)
            if outcome.failure is None and outcome.output is not None:
                refuse_unstorable(self._saga.journal.ledger, FallbackUsed(stage=self.name, output=outcome.output, source="stage"))
        except BaseException as error:
            if closes(error, self.task):
                raise
            # A fallback's failure is data.
            self._saga.heed_signal(error)
            outcome = Outcome(failure=Failure.raised(self.name, error, attempt=attempt))
        for recording in self._saga.forgotten(self.name):
            outcome = await self._catch_up(recording, outcome)
        if outcome.failure is not None:
            await self._host.wind_up()
            left_within = await self._saga.children.left_within(self.name)
            await self._saga.journal.record(FallbackFailed(stage=self.name, failure=outcome.failure, left_within=left_within))
            return None
        return outcome.output
