"""The forward run: a stageflow pipeline under the ledger.

stageflow schedules, and runs wrappers of ours. It cancels the siblings of a failed stage with `Task.cancel()`, which an anyio
shield does not stop, and leaves the siblings of a stage that returned FAIL running unawaited. So a stage that fails doesn't say so
to stageflow: the saga leaves stageflow's run, which leaves the tasks of the running stages alone, and waits for them itself.

Where something else than our wrappers could make stageflow cancel a stage, or end its wrapper before it, the stage's code runs in a
task of ours, and the wrapper only waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from stageflow import BaseInterceptor, UnifiedStageExecutionError, UnifiedStageGraph
from stageflow.api import StageCancellationRequested, StageContext, StageOutput, StageStatus
from stageflow.pipeline.dag import UnifiedPipelineCancelled, UnifiedStageSpec

from saga.asking import ask
from saga.compensable import SagaContext
from saga.errors import LedgerError
from saga.events import FallbackFailed, FallbackUsed, SagaStopped, StageCompleted, StageFailed, StageSkipped, StageStarted
from saga.failures import Failure, FailureKind
from saga.graph import Role
from saga.ledger import StageState
from saga.outputs import copied_output
from saga.policies import ContinueWithFallback, FailFast
from saga.text import said, shown
from saga.watch import Crew, Watched, absorbed, bounded, cut_short_by, leave_loop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stageflow.api import PipelineContext
    from stageflow.stages.result import StageResult

    from saga.alive import LiveSaga
    from saga.blueprint import StagePlan
    from saga.recovery import StageRecord

_ENDED_WELL: Final = frozenset({StageState.KEPT, StageState.FALLBACK, StageState.SKIPPED})
_STOPPING: Final = StageOutput.cancel("the saga is stopping")


class _NoInterceptors(list[BaseInterceptor]):
    """None at all: an empty list is false, and would bring stageflow's default ones back."""

    def __bool__(self) -> bool:
        return True


class _Listener(BaseInterceptor):
    """Learns of stages that another interceptor answered for; stageflow's results are lost when a run fails."""

    name = "saga"

    def __init__(self, called: Container[str]) -> None:
        self.answered: dict[str, StageOutput] = {}
        self._called = called

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        """Let the stage run."""

    async def after(self, stage_name: str, result: StageResult, _ctx: PipelineContext) -> None:
        """Note an answer for a stage whose runner was never called."""
        if stage_name not in self._called:
            self.answered[stage_name] = StageOutput.ok(result.data)


@dataclass(slots=True)
class _Outcome:
    """What one attempt came to.

    Attributes:
        output: What the stage returned.
        failure: How it failed; None if it did not.
        asked_again: It returned RETRY.
        past_pivot: It failed after a point of no return of its own.
    """

    output: StageOutput | None = None
    failure: Failure | None = None
    asked_again: bool = False
    past_pivot: bool = False


class _StageRun(Watched):
    """One stage on its way through the forward run.

    Attributes:
        answer: What stageflow is told; an exception for the user's interceptors to see.
        waiter: What its wrapper waits for, while it runs in a task of ours.
    """

    __slots__ = ("answer", "ctx", "name", "plan", "record", "waiter")

    def __init__(self, name: str, plan: StagePlan, record: StageRecord, ctx: StageContext, on_give_up: Callable[[_StageRun], None]) -> None:
        super().__init__(on_give_up)
        self.name = name
        self.plan = plan
        self.record = record
        self.ctx = ctx
        self.answer: StageOutput | Exception = _STOPPING
        self.waiter: asyncio.Future[StageOutput] | None = None


class Forward:
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
        self._interceptors = list(interceptors)
        self._loop = asyncio.get_running_loop()
        self._hosts = not interceptors and isinstance(saga.policy, FailFast) and saga.is_left_alone()
        self._within: asyncio.Task[Any] | None = None
        self._runs: dict[str, _StageRun] = {}
        self._running: Crew[_StageRun] = Crew(self._breaks)
        self._called: set[str] = set()
        self._fallen = {name for name, record in self._state.stages.items() if record.with_branch and not record.again}
        self._stopped = asyncio.Event()
        self._interrupted = asyncio.Event()
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
        deadline = self._policy.deadline
        timer = None if deadline is None else self._loop.call_later(deadline, self._out_of_time, deadline)
        listener = _Listener(self._called)
        results = await self._schedule(listener)
        if self._hosts and self.cause is not None:
            await absorbed(_this_task())
        await self._come_to_rest()
        # The stages' contexts lead back here.
        self._runs.clear()
        if timer is not None:
            timer.cancel()
        if self._broken is None and not self._hosts:
            for name, output in {**listener.answered, **results}.items():
                await self._learn(name, output)
        if self._broken is not None:
            raise self._broken

    async def _schedule(self, listener: _Listener) -> Mapping[str, StageOutput]:
        """Have stageflow run the stages, and give its results; what ended that early has stopped the saga when this returns."""
        saga = self._saga
        # What Pipeline.build() makes of a pipeline that has been checked; to make it at once takes half the time.
        graph = UnifiedStageGraph(
            [
                UnifiedStageSpec(
                    name=name,
                    runner=self._wrapper(name),
                    kind=plan.spec.kind,
                    dependencies=plan.spec.dependencies,
                    conditional=plan.spec.conditional,
                )
                for name, plan in saga.blueprint.stages.items()
            ],
            pipeline_name=saga.blueprint.name,
            interceptors=_NoInterceptors() if self._hosts else [*self._interceptors, listener],
        )
        self._heed_early_cancel()
        try:
            return await self._stay_in(graph)
        except UnifiedPipelineCancelled as cancelled:
            if self.cause is None:
                # No wrapper of ours asked for it: the context was cancelled, or a hook.
                self.stop(Failure.of(None, FailureKind.CANCELLED, cancelled.reason))
            return cancelled.results
        except UnifiedStageExecutionError as failed:
            await self._refused(failed.stage, failed.original)
        except asyncio.CancelledError:
            self._stop_for_cancel()
        except (KeyboardInterrupt, SystemExit) as error:
            leave_loop(error)
            self._breaks(cut_short_by(error))
        except Exception as error:  # noqa: BLE001 - a hook's or an interceptor's of the user
            self.stop(Failure.raised(None, error, attempt=0))
        return {}

    async def _stay_in(self, graph: UnifiedStageGraph) -> Mapping[str, StageOutput]:
        """Let stageflow run, until all stages have ended or the saga stops."""
        self._within = _this_task() if self._hosts else None
        try:
            return await graph.run(self._saga.private_context())
        finally:
            self._within = None

    def stop(self, cause: Failure, *, told: _StageRun | None = None) -> None:
        """Start no further stage; the first cause stays the cause. The stage that is `told` answers for itself."""
        if self.cause is not None:
            return
        self.cause = cause
        self._saga.is_stopping = True
        self._stopped.set()
        if self._within is not None:
            # Not awaited any longer, stageflow's run leaves the stages' tasks alone.
            self._within.cancel()
        for run in self._running.members:
            # One CANCEL is enough for stageflow to cancel and await its other wrappers and to end.
            if run is not told and run.waiter is not None and not run.waiter.done():
                run.waiter.set_result(_STOPPING)
        for child in self._saga.children:
            # A child is no single stage: it starts nothing more, either.
            child.interrupt("the saga that runs it is stopping")

    def _heed_early_cancel(self) -> None:
        if _this_task().cancelling():
            # It came before the task began, and has struck nothing.
            self._stop_for_cancel()

    def _stop_for_cancel(self) -> None:
        # Somebody cancels every task of the process; none of ours may die of it, or the saga would wait for it for ever.
        self._saga.interrupt("a task of the saga was cancelled from outside")

    def _out_of_time(self, deadline: float) -> None:
        self.stop(Failure.of(None, FailureKind.TIMEOUT, f"the forward run exceeded its deadline of {deadline:g} s"))
        self._interrupt()

    async def _refused(self, stage: str, error: Exception) -> None:
        # Our wrappers' exceptions stopped the run before they were raised; what stops it only now is an interceptor's.
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
            if record.state is StageState.RUNNING and record.failure is not None:
                # An earlier process left it open, and it did not get its turn before the saga stopped.
                await self._unless_broken(StageFailed(stage=name, failure=record.failure, in_doubt=record.doubt))

    async def _unless_broken(self, event: SagaStopped | StageFailed) -> None:
        if self._broken is not None:
            return
        try:
            await self._record(event)
        except LedgerError as error:
            self._breaks(error)

    async def _drain(self) -> None:
        """Wait until no stage runs: promise 3 begins here."""
        policy, timer = self._policy, None
        if policy.in_flight == "cancel":
            # A pivot's outcome decides what may be undone at all, so it gets its time.
            self._interrupt(spared=Role.PIVOT)
        if policy.drain_timeout is not None:
            timer = self._loop.call_later(policy.drain_timeout, self._interrupt)
        await self._running.disband()
        if timer is not None:
            timer.cancel()

    def _interrupt(self, spared: Role | None = None) -> None:
        self._interrupted.set()
        for run in self._running.members:
            if self._state.graph[run.name].role is not spared:
                run.cancel(FailureKind.INTERRUPTED)

    # -- what stageflow runs -------------------------------------------------------------------------------------

    def _wrapper(self, name: str) -> Callable[[StageContext], Awaitable[StageOutput]]:
        record = self._state.stages[name]
        if record.state in _ENDED_WELL and not record.again:
            assert record.output is not None  # what ended so has given one
            given = copied_output(record.output)
            self._called.add(name)

            async def give() -> StageOutput:
                return given

            return lambda _: give()
        return partial(self._host if self._hosts else self._wait_for, name)

    async def _host(self, name: str, ctx: StageContext) -> StageOutput:
        """Run the stage in stageflow's task for it."""
        if self.is_stopping():
            return _STOPPING
        run = self._run_of(name, ctx)
        await self._running.enlist(run, self._own(run))
        assert isinstance(run.answer, StageOutput)  # an exception is for interceptors
        return run.answer

    async def _wait_for(self, name: str, ctx: StageContext) -> StageOutput:
        """Run the stage in a task of ours."""
        self._called.add(name)
        run = self._runs.get(name)
        if run is None:
            if self.is_stopping():
                return _STOPPING
            run = self._runs[name] = self._run_of(name, ctx)
            self._running.employ(run, self._own(run))
        # An interceptor that asks for a retry gets here again: retries are the policy's, so the error stays.
        if isinstance(run.answer, Exception):
            raise run.answer
        run.waiter = self._loop.create_future()
        return await run.waiter

    def _run_of(self, name: str, ctx: StageContext) -> _StageRun:
        return _StageRun(name, self._saga.blueprint.stages[name], self._state.stages[name], ctx, self._gives_up)

    def _answer(self, run: _StageRun, answer: StageOutput | Exception) -> None:
        run.answer = answer
        if run.waiter is None or run.waiter.done():
            return
        if isinstance(answer, Exception):
            run.waiter.set_exception(answer)
        else:
            run.waiter.set_result(answer)

    # -- what we run ---------------------------------------------------------------------------------------------

    async def _own(self, run: _StageRun) -> None:
        answer = await self._stage(run)
        if not run.given_up:
            self._answer(run, answer)

    def _breaks(self, error: Exception) -> None:
        self._broken = self._broken or error
        self.stop(Failure.raised(None, error, attempt=0))

    async def _stage(self, run: _StageRun) -> StageOutput | Exception:
        for dependency in self._state.graph[run.name].dependencies:
            if dependency in self._fallen:
                return await self._falls_with(run, dependency)
            if self._is_due(dependency):
                await self._learn(dependency, run.ctx.inputs.prior_outputs[dependency])
        cancelled = self._saga.cancellation()
        if cancelled is not None:
            self.stop(Failure.of(None, FailureKind.CANCELLED, cancelled))
        self._heed_early_cancel()
        if self.is_stopping():
            return _STOPPING
        outcome = None if run.record.state is StageState.NOT_RUN else await self._left_open(run)
        if outcome is None:
            outcome = await self._attempts(run)
        if run.given_up:
            if outcome.failure is None and outcome.output is not None and outcome.output.status is StageStatus.OK:
                self._saga.comes_late(StageCompleted(stage=run.name, output=copied_output(outcome.output), late=True))
            return _STOPPING
        if outcome.failure is None:
            assert outcome.output is not None  # without a failure there is one
            return outcome.output
        return await self._absorb(run, outcome.failure)

    def _is_due(self, name: str) -> bool:
        """Whether the stage has yet to run."""
        record = self._state.stages[name]
        return record.again or record.state is StageState.NOT_RUN

    async def _learn(self, name: str, output: StageOutput) -> None:
        """Record a stage that stageflow skipped, or that an interceptor answered for, without our wrapper being called."""
        if not self._is_due(name) or output.status in {StageStatus.CANCEL, StageStatus.FAIL}:
            return
        skipped = output.status is StageStatus.SKIP
        reason = said(output.data.get("reason") or "stageflow skipped it") if skipped else "an interceptor answered for it"
        await self._record(StageSkipped(stage=name, reason=reason, output=copied_output(output)))

    async def _falls_with(self, run: _StageRun, dependency: str) -> StageOutput:
        self._fallen.add(run.name)
        output = StageOutput.skip(f"{dependency} did not complete")
        await self._record(StageSkipped(stage=run.name, reason=str(output.data["reason"]), output=output, with_branch=True))
        return output

    async def _left_open(self, run: _StageRun) -> _Outcome | None:
        """What an earlier process left to be decided; None if the stage is to run."""
        record, node = run.record, self._state.graph[run.name]
        if record.state in {StageState.FAILED, StageState.IN_DOUBT} and not record.again:
            # It died before what follows from this failure was recorded.
            return _Outcome(failure=record.failure)
        if not record.doubt:
            return None
        failure = record.failure
        assert failure is not None  # it is in doubt because an attempt failed
        may_repeat = node.idempotent or record.may_repeat
        if node.can_probe:
            landed = await ask(self._saga, run.name, stop=self._interrupted)
            if landed is not None:
                return _Outcome(output=landed)
            may_repeat = may_repeat or record.answer is False
        elif not may_repeat:
            retry = run.plan.retry or self._policy.retry
            tries = record.attempts - record.attempts_before
            may_repeat = retry.wait_before_next(failure, attempt=tries, elapsed=0.0) is not None
        if may_repeat:
            return None
        if record.state is StageState.RUNNING:
            await self._record(StageFailed(stage=run.name, failure=failure, in_doubt=True))
        return _Outcome(failure=failure)

    async def _attempts(self, run: _StageRun) -> _Outcome:
        """Attempt the stage as often as its retry allows; the outcome is in the ledger when this returns."""
        retry = run.plan.retry or self._policy.retry
        seconds = run.plan.timeout or self._policy.timeout
        loop, node, name = self._loop, self._state.graph[run.name], run.name
        began, goes_on = loop.time(), True
        tries = run.record.attempts - run.record.attempts_before
        while goes_on:
            tries += 1
            await self._record(self._start_of(run))
            if self.is_stopping():
                failure = Failure.of(name, FailureKind.INTERRUPTED, "the saga stopped before it ran")
                await self._record(StageFailed(stage=name, failure=failure))
                return _Outcome(failure=failure)
            outcome = await self._attempt(run, seconds)
            if run.given_up:
                return outcome
            if outcome.failure is None:
                await self._record(self._end_of(run, outcome))
                self._refuse_unstorable(name)
                return outcome
            failure = outcome.failure
            # A plain stage has declared no effect, so there is nothing to be in doubt about.
            in_doubt = failure.kind in {FailureKind.TIMEOUT, FailureKind.INTERRUPTED} and node.role is not Role.PLAIN
            wait = retry.wait_before_next(failure, attempt=tries, elapsed=loop.time() - began, asked=outcome.asked_again)
            if self.is_stopping():
                wait = None
            output = None if outcome.output is None else copied_output(outcome.output)
            await self._record(
                StageFailed(
                    stage=name,
                    failure=failure,
                    in_doubt=in_doubt,
                    will_retry=wait is not None,
                    past_pivot=outcome.past_pivot,
                    output=output,
                )
            )
            if wait is None:
                return outcome
            if run.record.doubt and node.can_probe:
                landed = await ask(self._saga, run.name, stop=self._interrupted)
                if landed is not None:
                    return _Outcome(output=landed)
                if run.record.unanswered and not node.idempotent:
                    wait = None
            goes_on = wait is not None and await self._pause(wait)
        # Called off: the failure that was to be mended stands.
        await self._record(StageFailed(stage=name, failure=failure, in_doubt=run.record.doubt, output=output))
        return outcome

    def _start_of(self, run: _StageRun) -> StageStarted:
        record = run.record
        if record.again and record.anew:
            return StageStarted(stage=run.name, attempt=1, execution=max(record.execution, 1) + 1)
        return StageStarted(stage=run.name, attempt=record.attempts + 1, execution=max(record.execution, 1))

    def _end_of(self, run: _StageRun, outcome: _Outcome) -> StageCompleted | StageSkipped:
        output = outcome.output
        assert output is not None  # without a failure there is one
        copy = copied_output(output)
        if output.status is StageStatus.SKIP:
            return StageSkipped(stage=run.name, reason=said(output.data.get("reason") or "it said so"), output=copy)
        return StageCompleted(stage=run.name, output=copy)

    def _refuse_unstorable(self, name: str) -> None:
        refused = self._saga.journal.unstorable.pop(name, None)
        if refused is not None:
            # Its effect stands and is known; but whoever resumed this saga would lack what it gave.
            message = f"{refused}: no durable ledger can keep it"
            self.stop(Failure.of(name, FailureKind.CONTRACT, message, attempt=self._state.stages[name].attempts))

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
        return False

    async def _attempt(self, run: _StageRun, seconds: float | None) -> _Outcome:
        context = self._context(run)
        run.begin(seconds, None if run.plan.patient else self._policy.cancel_grace)
        try:
            returned = await self._saga.actions.execute(context)
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - a stage's failure is data, also when it calls sys.exit()
            run.end()
            return await self._raised(run, error, seconds)
        run.end()
        if run.reason is not None:
            await run.absorb()
        outcome = normalised(run.name, run.record.attempts, returned)
        if outcome.failure is None and outcome.output is not None and outcome.output.status is StageStatus.SKIP and run.record.effects:
            # Its dependents would run on, and what it recorded could then not be undone before them.
            got = f"a SKIP after {len(run.record.effects)} recorded effects"
            message = f"expected a stage that skips itself to have recorded no effect, got {got}"
            return _Outcome(outcome.output, Failure.of(run.name, FailureKind.CONTRACT, message, attempt=run.record.attempts))
        return outcome

    def _context(self, run: _StageRun) -> SagaContext:
        ctx, saga = run.ctx, self._saga
        return SagaContext(
            snapshot=ctx.snapshot,
            inputs=ctx.inputs,
            stage_name=run.name,
            timer=ctx.timer,
            event_sink=ctx.event_sink,
            _cancellation_probe=self._is_cancelled,
            _cancellation_reason_provider=self._why_cancelled,
            saga_id=saga.id,
            attempt=run.record.attempts,
            idempotency_key=saga.forward_key(run.name),
            _host=saga,
        )

    def _is_cancelled(self) -> bool:
        return self.cause is not None or self._saga.cancellation() is not None

    def _why_cancelled(self) -> str | None:
        return str(self.cause) if self.cause is not None else self._saga.cancellation()

    async def _raised(self, run: _StageRun, error: BaseException, seconds: float | None) -> _Outcome:
        name, attempt = run.name, run.record.attempts
        self._saga.heed_ctrl_c(error)
        was_cancelled = await run.absorb()
        if run.reason is FailureKind.TIMEOUT:
            return _Outcome(failure=Failure.of(name, FailureKind.TIMEOUT, f"no answer within {seconds:g} s", attempt=attempt))
        if run.reason is FailureKind.INTERRUPTED or (was_cancelled and isinstance(error, asyncio.CancelledError)):
            why = "it was cancelled because the saga stopped" if self.cause is not None else "its task was cancelled from outside"
            return _Outcome(failure=Failure.of(name, FailureKind.INTERRUPTED, why, attempt=attempt))
        if isinstance(error, StageCancellationRequested):
            return normalised(name, attempt, StageOutput.cancel(error.reason))
        if isinstance(error, KeyboardInterrupt):
            # It struck by chance, so the stage says nothing of its effect with it.
            return _Outcome(failure=Failure.of(name, FailureKind.INTERRUPTED, "a KeyboardInterrupt struck while it ran", attempt=attempt))
        past_pivot = self._state.graph[name].is_point_of_no_return and getattr(error, "past_pivot", False) is True
        return _Outcome(failure=Failure.raised(name, error, attempt=attempt), past_pivot=past_pivot)

    def _gives_up(self, run: _StageRun) -> None:
        self._saga.spawn(self._running.see_through(run, self._given_up(run)))

    async def _given_up(self, run: _StageRun) -> None:
        """Go on without a stage that ignored its cancel: it is in doubt, and may still be running."""
        assert run.reason is not None  # it was cancelled before it was given up
        message = f"it ignored its cancel for {self._policy.cancel_grace:g} s and was given up; it may still be running"
        failure = Failure.of(run.name, run.reason, message, attempt=run.record.attempts)
        in_doubt = self._state.graph[run.name].role is not Role.PLAIN
        await self._record(StageFailed(stage=run.name, failure=failure, in_doubt=in_doubt))
        self._answer(run, await self._absorb(run, failure))

    # -- what a failure leads to ---------------------------------------------------------------------------------

    async def _absorb(self, run: _StageRun, failure: Failure) -> StageOutput | Exception:
        """Put something in the place of a failed stage's output, or stop the saga."""
        policy = self._policy
        if failure.kind is FailureKind.CANCELLED:
            self.stop(failure)
            return _STOPPING
        if isinstance(policy, ContinueWithFallback) and self.cause is None and failure.kind is not FailureKind.INTERRUPTED:
            output = await self._stands_in(run, failure, policy)
            if output is not None:
                return output
            if policy.without_fallback == "skip_branch":
                self._fallen.add(run.name)
                return StageOutput.skip(f"{run.name} failed")
        self.stop(failure, told=run)
        if self._interceptors:
            # The user's interceptors get to see what went wrong; without any, a CANCEL ends stageflow without a traceback in the log.
            return failure.exception if isinstance(failure.exception, Exception) else RuntimeError(str(failure))
        return _STOPPING

    async def _stands_in(self, run: _StageRun, failure: Failure, policy: ContinueWithFallback) -> StageOutput | None:
        """The output that stands in for a failed stage's, recorded; None if there is none."""
        node = self._state.graph[run.name]
        if node.can_probe and not run.record.unanswered:
            # With a landed effect there is nothing to stand in for; and nothing is left that could not be undone in order.
            landed = await ask(self._saga, run.name, stop=self._interrupted)
            if landed is not None:
                return landed
        output: StageOutput | None = None
        if node.has_fallback:
            output = await self._fallback(run, failure)
        source: Literal["stage", "policy"] = "stage" if output is not None else "policy"
        if output is None and run.name in policy.fallbacks:
            output = StageOutput.ok(dict(policy.fallbacks[run.name]))
        if output is not None:
            await self._record(FallbackUsed(stage=run.name, output=copied_output(output), source=source))
        return output

    async def _fallback(self, run: _StageRun, failure: Failure) -> StageOutput | None:
        seconds, attempt = run.plan.timeout or self._policy.timeout, run.record.attempts
        try:
            call = self._saga.actions.fallback(self._context(run), failure)
            returned = await bounded(call, seconds=seconds, grace=self._policy.cancel_grace, stop=self._interrupted)
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - a fallback's failure is data
            self._saga.heed_ctrl_c(error)
            outcome = _Outcome(failure=Failure.raised(run.name, error, attempt=attempt))
        else:
            outcome = normalised(run.name, attempt, returned)
        if outcome.failure is not None:
            await self._record(FallbackFailed(stage=run.name, failure=outcome.failure))
            return None
        return outcome.output


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # a saga runs in tasks
    return task


def normalised(stage: str, attempt: int, returned: object) -> _Outcome:
    """Sort what a stage returned into an output or a failure."""
    match returned:
        case None:
            return _Outcome(output=StageOutput.ok())
        case dict():
            return _Outcome(output=StageOutput.ok(returned))
        case StageOutput(data=dict(), status=StageStatus()):
            return _by_status(stage, attempt, returned)
        case StageOutput(data=data, status=StageStatus()):
            return _Outcome(failure=_broken_contract(stage, attempt, f"StageOutput(data={shown(data)})", type(data)))
        case _:
            return _Outcome(failure=_broken_contract(stage, attempt, shown(returned), type(returned)))


def _broken_contract(stage: str, attempt: int, got: str, kind: type) -> Failure:
    message = f"expected a StageOutput with a dict as data, a dict or None, got {got}"
    return Failure.of(stage, FailureKind.CONTRACT, message, type=kind.__qualname__, attempt=attempt)


def _by_status(stage: str, attempt: int, output: StageOutput) -> _Outcome:
    status = output.status.value
    match output.status:
        case StageStatus.OK | StageStatus.SKIP:
            return _Outcome(output=output)
        case StageStatus.CANCEL:
            reason = said(output.data.get("cancel_reason") or "no reason given")
            return _Outcome(output, Failure.of(stage, FailureKind.CANCELLED, reason, type=status, attempt=attempt))
        case StageStatus.FAIL:
            message = output.error or "no error given"
            return _Outcome(output, Failure.of(stage, FailureKind.REPORTED, message, type=status, attempt=attempt))
        case _:
            message = f"it asked for a retry and no attempt is left: {said(output.error)}"
            failure = Failure.of(stage, FailureKind.CONTRACT, message, type=status, attempt=attempt)
            return _Outcome(output, failure, asked_again=True)
