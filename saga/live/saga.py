"""One saga while it is alive: what forward, backward and the code of its stages share."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from stageflow import PipelineTimer
from stageflow.events import NoOpEventSink

from saga.contexts import CompensationContext, Host, Inputs, UndoHost
from saga.errors import MisuseError
from saga.events import CompensationCompleted, EffectRecorded, StageCompleted
from saga.failures import Failure, FailureKind
from saga.graph import Role
from saga.keys import execution_key
from saga.live.children import Children
from saga.live.inputs import no_such_field, snapshot_of, with_dicts
from saga.outputs import copied, copied_output
from saga.quick import maker
from saga.recovery.late import Late, Latecomer
from saga.storable import refuse_unstorable
from saga.tasks import is_of_signal, leave_loop, outlast, retrieved, start

if TYPE_CHECKING:
    from stageflow.api import Pipeline, PipelineContext, StageOutput

    from saga.blueprint import Blueprint
    from saga.keeper import SagaKeeper
    from saga.live.actions import Actions
    from saga.live.journal import Journal
    from saga.policies import ContinueWithFallback, FailFast, Policy
    from saga.report import SagaReport

_compensation_context: Final = maker(CompensationContext)
STAGE_FAILED: Final = "the stage that ran it has failed"
"""Why a saga is stopped that a stage has left running."""
PARENT_STOPS: Final = "the saga that runs it is stopping"
"""Why one is stopped whose own saga starts nothing more."""


def has_hooks(context: PipelineContext) -> bool:
    """Whether something is to be called before each stage that is run in this context."""
    return bool(context._before_stage_start_hooks)  # noqa: SLF001 - stageflow has no other word for it


class LiveSaga(UndoHost):
    """One saga while it is alive.

    Attributes:
        id: Its id.
        loop: The event loop in which it runs.
        blueprint: Its pipeline.
        policy: Its policy.
        journal: Its ledger and its state.
        actions: How its stages' code is run.
        keeper: Whoever keeps it, and the sagas that its stages run.
        driver: Brings it to rest; there as long as the saga is held.
        snapshot: What all stages share of the caller's context: stageflow's immutable view of the input.
        ports: The capabilities that it brings, if any.
        timer: Since when it runs.
        event_sink: Where its stages may emit events.
        children: The sagas that its stages run.
        stop: Stops its forward run; None when it has none.
        is_stopping: Whether its forward run starts nothing more.
        stopped_by: What has stopped that; None if nothing has.
        recordings: What stages record of their effects, until they have ended: of some nobody may have awaited that.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        policy: FailFast | ContinueWithFallback,
        journal: Journal,
        actions: Actions,
        context: PipelineContext,
        keeper: SagaKeeper,
    ) -> None:
        self.id: Final = journal.saga_id
        self.loop: Final = asyncio.get_running_loop()
        self.blueprint: Final = blueprint
        self.policy: Final = policy
        self.journal: Final = journal
        self.actions: Final = actions
        self._context = context
        self.snapshot: Final = snapshot_of(context)
        # What stageflow makes of a database its root context has; to derive that takes as long again as all that is here.
        self.ports: Final = context.ports if context.db is None else context.derive_root_stage_context().inputs.ports
        self.timer: Final = PipelineTimer()
        self.event_sink: Final = context.event_sink
        self.keeper: Final = keeper
        self.driver: asyncio.Task[SagaReport]
        self.children: Final = Children(journal)
        self.stop: Callable[[Failure], None] | None = None
        self.is_stopping = False
        self.stopped_by: Failure | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.recordings: Final[dict[str, list[Coroutine[Any, Any, None]]]] = {}

    def private_context(self) -> PipelineContext:
        """Stageflow's context for this run alone, with stageflow's own timeouts off."""
        context = self._context
        hooks = list(context._before_stage_start_hooks)  # noqa: SLF001 - stageflow has no other word for it
        return dataclasses.replace(context, data=context.data | self.blueprint.without_timeouts, _before_stage_start_hooks=hooks)

    def has_hooks(self) -> bool:
        """Whether the caller's context has a hook."""
        return has_hooks(self._context)

    def emit_skipped(self, name: str, output: StageOutput) -> None:
        """Emit to the context's sink what stageflow does for a stage that is skipped."""
        if self.event_sink is None or type(self.event_sink) is NoOpEventSink:
            return
        record, run = self.journal.state.stages[name], self.snapshot
        took = record.ended_at - record.tries[-1].started_at if record.ended_at is not None and record.tries else timedelta()
        event = {
            "stage": name,
            "reason": output.data.get("reason", "Stage returned skip"),
            "duration_ms": took // timedelta(milliseconds=1),
            "pipeline_run_id": None if run.pipeline_run_id is None else str(run.pipeline_run_id),
            "request_id": None if run.request_id is None else str(run.request_id),
        }
        self.event_sink.try_emit(type=f"stage.{name}.skipped", data=event)

    def cancellation(self) -> str | None:
        """Why the caller's context was cancelled, or None if it was not."""
        if not self._context.is_canceled:
            return None
        return self._context.cancellation_reason or "the context was cancelled"

    def is_cancelled(self) -> bool:
        """Whether the code of a stage is to come to its end, because the saga stops."""
        return self.why_cancelled() is not None

    def why_cancelled(self) -> str | None:
        """Why it is to; None if it is not."""
        return self.cancellation() if self.stopped_by is None else str(self.stopped_by)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something in a task that is kept until it ends."""
        task = start(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def interrupt(self, why: str) -> None:
        """Stop it as if its caller had been cancelled; on its way back it goes on."""
        if self.stop is not None:
            self.stop(Failure.of(None, FailureKind.INTERRUPTED, why))

    def heed_signal(self, error: BaseException) -> None:
        """Stop if it came of a signal: that was meant for the whole process, and struck the code of a stage by chance."""
        if is_of_signal(error):
            leave_loop(error)
            self.interrupt(f"the process got a {type(error).__name__}")

    def stop_for_cancel(self) -> None:
        """Stop because a task of ours was cancelled, also where that has struck nothing: before it began, or while a ledger wrote."""
        # Somebody cancels every task of the process; none of ours may die of it, or the saga would wait for it for ever.
        self.interrupt("a task of the saga was cancelled from outside")

    def comes_late(self, event: Latecomer) -> None:
        """Hand over what something given up has come to after all."""
        record = self.journal.state.stages[event.stage]
        self.keeper.amendments.comes_late(self.id, Late(event, record.execution, record.attempts, record.undo_attempts))

    def say_again(self) -> None:
        """Hand over once more what came late and was not recorded, as the ledger failed."""
        for event in self.journal.unwritten:
            if isinstance(event, StageCompleted | CompensationCompleted) and event.late:
                self.comes_late(event)

    def compensation_context(self, stage: str, attempt: int) -> CompensationContext:
        """What a compensation or a probe of the stage gets to know."""
        state = self.journal.state
        record = state.stages[stage]
        inputs = Inputs()
        for name in state.graph.by_name[stage].dependencies:
            if (output := state.stages[name].output) is not None:
                inputs[name] = copied_output(output)
        key = execution_key(self.id, stage, record.execution)
        # Whoever recognises a repeated request to undo would answer that it was carried out, which was before there was anything to undo.
        again = f"~{record.undone_too_soon + 1}" if record.undone_too_soon else ""
        given = record.late_output or (None if record.fell_back else record.output)
        return _compensation_context(
            saga_id=self.id,
            stage_name=stage,
            output=copied_output(given) if record.landed and given is not None else None,
            effects=tuple(map(copied, record.effects)) if record.effects else (),
            in_doubt=record.doubt,
            cause=state.cause,
            attempt=attempt,
            idempotency_key=f"{key}/undo{again}",
            forward_key=key,
            inputs=inputs,
            snapshot=self.snapshot,
            _host=self,
        )

    def record_effect(self, stage: str, effect: Any, *, by_fallback: bool) -> Coroutine[Any, Any, None]:
        """Write one partial effect of a running stage to the ledger, when it is awaited."""
        recording = self._record_effect(stage, effect, by_fallback=by_fallback)
        self.recordings.setdefault(stage, []).append(recording)
        return recording

    def forgotten(self, stage: str) -> list[Coroutine[Any, Any, None]]:
        """What a stage has recorded and not awaited."""
        return [one for one in self.recordings.pop(stage, ()) if inspect.getcoroutinestate(one) == inspect.CORO_CREATED]

    async def _record_effect(self, stage: str, effect: Any, *, by_fallback: bool) -> None:
        if self.journal.state.graph[stage].role is not Role.COMPENSABLE:
            raise MisuseError("ctx.record only in a stage with a compensation", got="a stage without one", stage=stage)
        event = EffectRecorded(stage=stage, effect=effect)
        if by_fallback:
            self.comes_late(event)
            raise MisuseError(
                "ctx.record by execute",
                got="one by the fallback",
                stage=stage,
                hint="What is to be undone of a fallback it runs as a saga: ctx.run_saga. A person is asked what stands of this.",
            )
        if not self.journal.state.may_follow(event):
            self.comes_late(event)
            raise MisuseError(
                "ctx.record by an attempt that is running",
                got="one that was given up, or has ended",
                stage=stage,
                hint="Let it do nothing more; a person is asked what stands.",
            )
        write = start(self.journal.record(event))
        write.add_done_callback(retrieved)
        # A cancel of the stage is no cancel of the ledger: what it did is recorded.
        try:
            await asyncio.shield(write)
        except asyncio.CancelledError:
            # It may go on all the same, and nobody would tell it later.
            refuse_unstorable(self.journal.ledger, event)
            raise
        # In the ledger there is a text in the place of what it can't keep.
        refuse_unstorable(self.journal.ledger, event)

    async def undo_child(self, stage: str, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo what is left of a child saga."""
        with self.children.being_undone(stage) as made_of:
            await self.child_rests(saga_id)
            with self.children.heeding(stage):
                made_of[saga_id] = report = await self.keeper.undo_child(self, saga_id, pipeline)
        return report

    async def rest_child(self, stage: str, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """See to it that a child saga whose process is gone comes to rest, unless this saga runs on and sees to it itself."""
        await self.child_rests(saga_id)
        with self.children.heeding(stage):
            return await self.keeper.rest_child(self, saga_id, pipeline)

    async def child_rests(self, saga_id: str) -> None:
        """Wait for a child that a stage has left running, also before this saga was gone on with; on the way back it is stopped first."""
        child = self.keeper.held.sagas.get(saga_id)
        # Any other one is refused; to wait for itself, or one that runs it, would take for ever.
        if child is not None and child.journal.state.started.parent == self.id and child.loop is self.loop:
            if self.is_stopping:
                child.interrupt(PARENT_STOPS)
            await asyncio.wait([child.driver])

    async def child_reports(self, stage: str) -> list[SagaReport]:
        """The children that this execution of the stage has run, oldest first; without its fallback's while what used that is kept."""
        return await self.children.reports(stage)

    def child_context(self, stage: str, pipeline: Pipeline, fields: dict[str, Any]) -> PipelineContext:
        """The input of a child saga: this saga's, with some fields replaced.

        Raises:
            MisuseError: There is no such field, or it is to be a dict, and can't be one.
        """
        own: dict[str, Any] = {
            "topology": pipeline.name,
            "parent_run_id": self._context.pipeline_run_id,
            "parent_stage_id": stage,
            "artifacts": [],
            "data": {},
            "canceled": False,
        }
        try:
            return dataclasses.replace(self._context, **own | with_dicts(fields))
        except TypeError as error:
            raise no_such_field(error, fields) from None


class AttemptHost(Host):
    """The saga as the code of one attempt of a stage has it: it may run others until it has failed, or was given up."""

    __slots__ = ("_asked", "_attempt", "_is_over", "_ran", "_saga", "_stage")
    _is_fallback = False

    def __init__(self, saga: LiveSaga, stage: str, attempt: int) -> None:
        self._saga = saga
        self._stage = stage
        self._attempt = attempt
        self._asked: dict[asyncio.Future[None], None] = {}
        self._is_over = False
        self._ran: tuple[str, ...] = ()

    @property
    def ran(self) -> tuple[str, ...]:
        """The sagas that the code has run, or gone on with, and that have come to their ends, or run on."""
        return (*self._ran, *(child.id for child in self._saga.children.run_by(self._stage)))

    def record_effect(self, effect: Any) -> Coroutine[Any, Any, None]:
        """Write one partial effect to the ledger, when it is awaited."""
        return self._saga.record_effect(self._stage, effect, by_fallback=self._is_fallback)

    async def run_child(
        self, pipeline: Pipeline, context: PipelineContext | None, policy: Policy | None, fields: dict[str, Any]
    ) -> SagaReport:
        """Run a pipeline as a saga of its own, in the same ledger."""
        run = self._saga.keeper.run_child
        return await self._asks(partial(run, self._saga, self._stage, self._attempt, pipeline, context, policy, fields))

    async def resume_child(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Go on with a child saga that has not come to its end."""
        # Whoever resumed this saga wants it to go forward; one that got stuck since then goes on to be undone.
        forward = True if self._saga.journal.state.stages[self._stage].is_first_since_resumed else None
        return await self._asks(partial(self._resume_child, saga_id, pipeline, forward=forward))

    async def _resume_child(self, saga_id: str, pipeline: Pipeline, *, forward: bool | None) -> SagaReport:
        await self._saga.child_rests(saga_id)
        return await self._saga.keeper.resume_child(self._saga, saga_id, pipeline, forward=forward)

    async def child_reports(self) -> list[SagaReport]:
        """The children that this execution of the stage has run, oldest first."""
        return await self._saga.children.reports(self._stage)

    async def _asks(self, call: Callable[[], Awaitable[SagaReport]]) -> SagaReport:
        if self._is_over:
            # asyncio.gather raises what the first of several comes to, and leaves the others running.
            raise MisuseError(
                "a stage that is still running to run a saga",
                got="one of which this attempt has failed, or was given up",
                stage=self._stage,
                hint="Whatever it has begun beside, let it end before the stage does: asyncio.TaskGroup sees to that.",
            )
        answered = asyncio.get_running_loop().create_future()
        self._asked[answered] = None
        try:
            with self._saga.children.heeding(self._stage):
                report = await call()
            if report.ok:
                self._ran = (*self._ran, report.saga_id)
            return report
        finally:
            del self._asked[answered]
            answered.set_result(None)

    def give_up(self) -> None:
        """Let the code run no more sagas, and stop those that it has left running."""
        self._is_over = True
        for child in self._saga.children.run_by(self._stage):
            child.interrupt(STAGE_FAILED)

    async def wind_up(self) -> None:
        """Stop the sagas that the code has left running, or is just about to begin, and wait until they have come to rest."""
        self.give_up()
        if not self._asked:
            return
        self._saga.children.failed.add(self._stage)
        await outlast(tuple(self._asked))
        self._saga.children.failed.discard(self._stage)


class FallbackHost(AttemptHost):
    """The same for the code of its fallback."""

    __slots__ = ()
    _is_fallback = True
