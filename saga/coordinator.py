"""`SagaCoordinator`: runs pipelines as sagas. The only place where forward, backward and the ledger meet."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
from stageflow.api import Pipeline, PipelineContext

from saga.actions import LocalActions
from saga.alive import LiveSaga
from saga.asking import ask
from saga.backward import Backward
from saga.blueprint import Blueprint
from saga.compensable import child_id
from saga.errors import GraphChanged, MisuseError, SagaExists, SagaNotFound
from saga.events import SagaEnded, SagaStarted, SagaStatus, SagaTurnedBack, TurnReason
from saga.failures import Failure, FailureKind
from saga.forward import Forward
from saga.journal import Journal
from saga.ledger import Ledger, MemoryLedger
from saga.policies import ContinueWithFallback, FailFast, Policy
from saga.recovery import Move, Rollback, SagaState, Step, conclude, final_status, undo_step
from saga.report import SagaReport

if TYPE_CHECKING:
    from stageflow import BaseInterceptor

_ALIVE: Final = frozenset({SagaStatus.RUNNING, SagaStatus.COMPENSATING})
_INPUT: Final = (
    "pipeline_run_id",
    "request_id",
    "session_id",
    "user_id",
    "org_id",
    "interaction_id",
    "topology",
    "configuration",
    "execution_mode",
    "input_text",
    "input_audio_duration_ms",
    "metadata",
    "created_at",
    "service",
    "data",
)
"""What of stageflow's context is recorded, so that a saga can go on without its caller."""


class SagaCoordinator:
    """Runs stageflow pipelines as sagas.

    One coordinator runs any number of sagas at once, of one or many pipelines.

    Args:
        policy: What happens when something fails, unless a run brings its own.
        ledger: Where sagas are recorded; a new `MemoryLedger` by default.
        interceptors: stageflow interceptors around every stage. stageflow's default ones are off: they answer for stages
            that never ran, and retry against the policy.

    Raises:
        PolicyInvalid: The policy is none.
    """

    def __init__(
        self,
        policy: FailFast | ContinueWithFallback | None = None,
        *,
        ledger: Ledger | None = None,
        interceptors: Sequence[BaseInterceptor] = (),
    ) -> None:
        self.policy: Final = policy if policy is not None else FailFast()
        self.ledger: Final = ledger if ledger is not None else MemoryLedger()
        self._interceptors = tuple(interceptors)
        self._owner = secrets.token_hex(16)
        self._alive: dict[str, Forward | None] = {}

    async def run(
        self,
        pipeline: Pipeline,
        context: PipelineContext | None = None,
        *,
        saga_id: str | None = None,
        **context_fields: Any,
    ) -> SagaReport:
        """Run a pipeline as a saga.

        Args:
            pipeline: The pipeline; it is not changed and may run any number of times at once.
            context: stageflow's context, or
            context_fields: its fields, as in `Pipeline.run`: `input_text=`, `metadata=`, ...
            saga_id: Its id; a new one by default.

        Returns:
            The report, whatever became of the stages.

        Raises:
            MisuseError: Something can't work; nothing was run.
            LedgerError: The ledger could not record; no further effect was started.
            asyncio.CancelledError: The caller was cancelled, and the saga has done what `on_interrupt` says.
        """
        blueprint = self._read(pipeline, self.policy)
        context = _context(pipeline.name, context, context_fields)
        saga = await self._begin(blueprint, self.policy, context, saga_id)
        return await self._see_through(saga)

    async def compensate(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo a saga that has come to rest; where nothing can be undone, nothing happens.

        Raises:
            SagaNotFound: The ledger has no such saga.
            GraphChanged: The pipeline differs from the saga's.
            MisuseError: The saga is still alive.
        """
        state, version = await self._find(saga_id)
        policy = state.started.policy
        blueprint = self._read(pipeline, policy)
        differences = state.graph.differences(blueprint.graph)
        if differences:
            raise GraphChanged(saga_id, differences)
        if saga_id in self._alive or state.status in _ALIVE:
            raise MisuseError("a saga that has come to rest", got=f"saga {saga_id}, which is {state.status.value}")
        if not len(Rollback(state, policy, TurnReason.REQUEST)):
            return SagaReport.of(state, policy)
        self._alive[saga_id] = None
        try:
            token = await self.ledger.acquire(saga_id, self._owner)
            journal = Journal(self.ledger, saga_id, state, version=version, token=token)
            context = PipelineContext.create(**state.started.input)
            saga = LiveSaga(blueprint, policy, journal, LocalActions(blueprint), context, self)
            work = self._undo(saga, Move(turn=TurnReason.REQUEST))
        except BaseException:
            del self._alive[saga_id]
            raise
        return await self._unbroken(asyncio.create_task(self._closing(saga, work)))

    async def report(self, saga_id: str) -> SagaReport:
        """The report of a saga, alive or not.

        Raises:
            SagaNotFound: The ledger has no such saga.
        """
        state, _ = await self._find(saga_id)
        return SagaReport.of(state, state.started.policy)

    async def cancel(self, saga_id: str, reason: str = "it was asked to stop") -> None:
        """Stop a saga that is running here, as if its caller had been cancelled; `run` then returns its report.

        A saga that is going backward already is not stopped: a cancel can start a compensation, never interrupt one.

        Raises:
            SagaNotFound: No saga of that id is alive in this coordinator.
        """
        if saga_id not in self._alive:
            raise SagaNotFound("a saga that is alive in this coordinator", got=repr(saga_id))
        forward = self._alive[saga_id]
        if forward is not None:
            forward.stop(Failure.of(None, FailureKind.INTERRUPTED, reason))

    # -- what a running saga asks for ----------------------------------------------------------------------------

    async def run_child(
        self,
        parent: LiveSaga,
        stage: str,
        attempt: int,
        pipeline: Pipeline,
        context: PipelineContext | None,
        policy: Policy | None,
        fields: dict[str, Any],
    ) -> SagaReport:
        """Run a child of a saga's stage; `SagaContext.run_saga` gets here."""
        policy = policy if policy is not None else FailFast()
        blueprint = self._read(pipeline, policy)
        if context is None:
            context = parent.child_context(stage, pipeline, fields)
        elif fields:
            raise _both_given(fields)
        saga = await self._begin(blueprint, policy, context, child_id(parent.forward_key(stage), attempt), parent.id, stage)
        return await self._see_through(saga)

    async def undo_child(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo what is left of a child."""
        return await self.compensate(saga_id, pipeline)

    async def report_child(self, saga_id: str) -> SagaReport | None:
        """Report on a child; None if it never began."""
        events = await self.ledger.read(saga_id)
        return SagaReport.from_events(events) if events else None

    # -- how a saga runs -----------------------------------------------------------------------------------------

    def _read(self, pipeline: Pipeline, policy: FailFast | ContinueWithFallback) -> Blueprint:
        blueprint = Blueprint.of(pipeline)
        blueprint.check_policy(policy)
        return blueprint

    async def _find(self, saga_id: str) -> tuple[SagaState, int]:
        events = await self.ledger.read(saga_id)
        if not events:
            raise SagaNotFound("the id of a saga in the ledger", got=repr(saga_id))
        return SagaState(events), len(events)

    async def _begin(
        self,
        blueprint: Blueprint,
        policy: FailFast | ContinueWithFallback,
        context: PipelineContext,
        saga_id: str | None,
        parent: str | None = None,
        parent_stage: str | None = None,
    ) -> LiveSaga:
        if saga_id is None:
            saga_id = secrets.token_hex(16)
        elif not isinstance(saga_id, str) or not saga_id.strip():
            raise MisuseError("a saga id with at least one visible character", got=repr(saga_id))
        elif saga_id in self._alive or await self.ledger.read(saga_id):
            raise SagaExists("a saga id that is not in the ledger yet", got=repr(saga_id), hint="Read what became of it with report().")
        self._alive[saga_id] = None
        try:
            started = SagaStarted(
                saga_id=saga_id,
                pipeline=blueprint.name,
                graph=blueprint.graph,
                policy=policy,
                input={name: value for name in _INPUT if (value := getattr(context, name))},
                parent=parent,
                parent_stage=parent_stage,
            )
            journal = await Journal.begin(self.ledger, started, self._owner)
        except BaseException:
            del self._alive[saga_id]
            raise
        return LiveSaga(blueprint, policy, journal, LocalActions(blueprint), context, self)

    async def _see_through(self, saga: LiveSaga) -> SagaReport:
        forward = self._alive[saga.id] = Forward(saga, self._interceptors)
        driver = asyncio.create_task(self._closing(saga, self._drive(saga, forward)))
        return await self._unbroken(driver, forward)

    async def _unbroken(self, driver: asyncio.Task[SagaReport], forward: Forward | None = None) -> SagaReport:
        """Wait for the saga to come to rest, also when the caller is cancelled meanwhile."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        driver.add_done_callback(partial(_wake, done))
        try:
            await done
        except asyncio.CancelledError as cancelled:
            if forward is not None:
                forward.stop(Failure.of(None, FailureKind.INTERRUPTED, "the caller was cancelled"))
            # anyio repeats the cancel of a scope at every turn of the loop until the scope is left: the shield keeps
            # that off; further plain cancels are absorbed one by one.
            with anyio.CancelScope(shield=True):
                while not driver.done():
                    try:
                        await asyncio.wait({driver})
                    except asyncio.CancelledError:
                        continue
            cancelled.add_note(str(driver.result()))
            raise
        return driver.result()

    async def _closing(self, saga: LiveSaga, work: Any) -> SagaReport:
        try:
            await work
            return SagaReport.of(saga.journal.state, saga.policy)
        finally:
            del self._alive[saga.id]
            await saga.journal.close()

    async def _drive(self, saga: LiveSaga, forward: Forward) -> None:
        await forward.run()
        move = conclude(saga.journal.state, saga.policy, forward.cause)
        if move.turn is not None:
            await self._undo(saga, move)
            return
        await self._ask_the_rest(saga)
        status = move.status if move.status is not None else final_status(saga.journal.state, saga.policy)
        await saga.journal.record(SagaEnded(status=status, cause=move.cause))

    async def _ask_the_rest(self, saga: LiveSaga) -> None:
        """Ask for all that no compensation has asked for: to know is free, whatever the policy leaves standing."""
        state = saga.journal.state
        if state.is_spotless:
            return
        askable = [node.name for node in state.graph.nodes if undo_step(node, state.stages[node.name]) is Step.PROBE]
        await asyncio.gather(*(ask(saga, name) for name in askable))

    async def _undo(self, saga: LiveSaga, move: Move) -> None:
        assert move.turn is not None  # asked only to go backward
        await saga.journal.record(SagaTurnedBack(reason=move.turn, cause=move.cause))
        await Backward(saga, move.turn).run()
        await self._ask_the_rest(saga)
        await saga.journal.record(SagaEnded(status=final_status(saga.journal.state, saga.policy)))


def _both_given(fields: dict[str, Any]) -> MisuseError:
    return MisuseError("either a context or its fields", got=f"both, the fields being {', '.join(fields)}")


def _context(name: str, context: PipelineContext | None, fields: dict[str, Any]) -> PipelineContext:
    if "guard_retry_strategy" in fields:
        raise MisuseError(
            "no guard_retry_strategy",
            got=repr(fields["guard_retry_strategy"]),
            hint="It repeats stages behind the saga's back: effects would land twice and be undone once. Give the stage a Retry.",
        )
    if "interceptors" in fields:
        raise MisuseError("interceptors at SagaCoordinator(..., interceptors=)", got="interceptors at run()")
    if context is None:
        try:
            return PipelineContext.create(**{"topology": name} | fields)
        except TypeError as error:
            raise MisuseError("fields of stageflow's PipelineContext", got=str(error).rpartition(") ")[2]) from None
    if fields:
        raise _both_given(fields)
    if not isinstance(context, PipelineContext):
        raise MisuseError("a PipelineContext", got=repr(context))
    return context


def _wake(waiter: asyncio.Future[None], _: asyncio.Task[SagaReport]) -> None:
    if not waiter.done():
        waiter.set_result(None)
