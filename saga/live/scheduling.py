"""When each stage of a saga starts: we say so ourselves, unless something has a part in stageflow's run that only stageflow calls."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from stageflow import BaseInterceptor, UnifiedStageExecutionError, UnifiedStageGraph
from stageflow.api import StageContext, StageOutput
from stageflow.pipeline.dag import UnifiedPipelineCancelled, UnifiedStageSpec
from stageflow.stages.inputs import StageInputs

from saga.failures import Failure, FailureKind
from saga.tasks import closes, end, this_task

if TYPE_CHECKING:
    from stageflow.api import PipelineContext
    from stageflow.stages.result import StageResult

    from saga.live.saga import LiveSaga

STOPPING: Final = StageOutput.cancel("the saga is stopping")
"""The answer of a stage that has nothing to give to those that depend on it, because the saga is stopping."""


class Stages(Protocol):
    """What a schedule has started, and tells how the run goes."""

    def given(self, name: str) -> StageOutput | None:
        """What a stage gave that ended well before, in a saga that was resumed; None: it is to run."""
        ...

    def begin(self, name: str, inputs: StageInputs) -> None:
        """Start a stage; its schedule is told when it has ended."""
        ...

    def is_stopping(self) -> bool:
        """Whether no further stage starts."""
        ...

    def stop(self, cause: Failure) -> None:
        """Start no further stage; the first cause stays the cause."""
        ...

    async def refused(self, stage: str, error: Exception) -> None:
        """Stop because an interceptor did not let a stage run, or end."""
        ...

    async def learn(self, name: str, output: StageOutput) -> None:
        """Record a stage that was answered for without having been started."""
        ...


class Schedule(Protocol):
    """Starts every stage in its turn.

    It is told each time whose stages they are and does not hold on to them: what refers to each other waits for Python's garbage collector.
    """

    async def run(self, stages: Stages) -> None:
        """Start the stages, until all have ended or the saga stops."""
        ...

    def ended(self, stages: Stages, name: str, answer: StageOutput | Failure) -> None:
        """Take a stage's answer for those that depend on it; a failure has stopped the saga."""
        ...

    def stop(self, besides: str | None, /) -> None:
        """Start nothing more; whoever waits is answered so, `besides` the stage that is to answer."""
        ...

    async def tell(self, stages: Stages) -> None:
        """Tell of stages that were answered for by something else, when the others have come to rest."""
        ...


class OwnSchedule:
    """Starts a stage as soon as all that it depends on has ended."""

    def __init__(self, saga: LiveSaga) -> None:
        self._graph = saga.blueprint.graph
        self._snapshot = saga.snapshot
        self._ports = saga.ports
        # Stages are started where another one has ended: in its context, what it bound would be bound for them.
        self._context = copy_context()
        self._inputs: dict[str, dict[str, StageOutput]] = {name: {} for name in self._graph.names}
        self._left = len(self._inputs)
        self._over: asyncio.Future[None] = saga.loop.create_future()

    async def run(self, stages: Stages) -> None:
        """Start the stages, until all have ended or the saga stops."""
        self._start(stages, [node.name for node in self._graph.nodes if not node.dependencies])
        await self._over

    def _start(self, stages: Stages, ready: list[str]) -> None:
        for name in ready:
            given = stages.given(name)
            if given is None:
                self._context.run(stages.begin, name, self._inputs_of(name))
            else:
                # The list grows while it is gone through: to hand on what thousands gave takes no stack.
                ready += self._enabled(name, given)

    def _inputs_of(self, name: str) -> StageInputs:
        return StageInputs(
            snapshot=self._snapshot,
            prior_outputs=self._inputs.pop(name),  # what nobody needs any more may be large
            ports=self._ports,
            declared_deps=frozenset(self._graph[name].dependencies),
            stage_name=name,
        )

    def _enabled(self, name: str, output: StageOutput) -> list[str]:
        """The stages that have waited for this one only."""
        self._left -= 1
        if not self._left:
            end(self._over)
        enabled = []
        for dependent in self._graph.dependents[name]:
            inputs = self._inputs[dependent]
            # In the order in which they ended, as stageflow has them.
            inputs[name] = output
            if len(inputs) == len(self._graph[dependent].dependencies):
                enabled.append(dependent)
        return enabled

    def ended(self, stages: Stages, name: str, answer: StageOutput | Failure) -> None:
        """Start the stages that have waited for this one only."""
        if not stages.is_stopping():
            assert isinstance(answer, StageOutput)  # a failure has stopped the saga
            self._start(stages, self._enabled(name, answer))

    def stop(self, _besides: str | None, /) -> None:
        """Start nothing more."""
        end(self._over)

    async def tell(self, _stages: Stages) -> None:
        """Nothing else answers for a stage."""


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


class StageflowSchedule:
    """Has stageflow run wrappers of ours, which start the stages and wait for them.

    stageflow cancels the siblings of a failed stage with `Task.cancel()`, which an anyio shield does not stop, and leaves the siblings
    of a stage that returned FAIL running unawaited. So a stage runs in a task that stageflow does not know; and a saga that stops tells
    stageflow so with a CANCEL, which makes it cancel and await its other wrappers. What a hook or an interceptor
    keeps waiting says nothing to anybody: it gets its grace, and is cancelled then.
    """

    def __init__(self, saga: LiveSaga, interceptors: Sequence[BaseInterceptor]) -> None:
        self._saga = saga
        self._interceptors = interceptors
        self._context = saga.private_context(self._note, self._note_skipped)
        self._called: set[str] = set()
        self._listener = _Listener(self._called)
        self._answers: dict[str, StageOutput | Exception] = {}
        self._waiters: dict[str, asyncio.Future[StageOutput | Exception]] = {}
        self._conditional = frozenset(name for name, offer in saga.blueprint.stages.items() if offer.spec.conditional)
        self._skipped: dict[str, StageOutput] = {}
        self._results: dict[str, StageOutput] = {}
        self._wrappers: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, stages: Stages) -> None:
        """Start the stages, until all have ended or the saga stops."""
        graph, task = self._graph(stages), this_task()
        try:
            self._results = await graph.run(self._context)
        except UnifiedPipelineCancelled as cancelled:
            if not stages.is_stopping():
                # No wrapper of ours asked for it: the context was cancelled, or a hook.
                stages.stop(Failure.of(None, FailureKind.CANCELLED, cancelled.reason))
            self._results = cancelled.results
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if closes(error, task):
                # Those that stageflow has left behind are closed, too; of a loop that is gone a cancel would ask for a turn.
                self._wrappers.clear()
                raise
            # A hook's or an interceptor's of the user.
            if isinstance(error, UnifiedStageExecutionError) and error.stage in self._saga.blueprint.stages:
                await stages.refused(error.stage, error.original)
            else:
                # Also what a hook's own pipeline has failed with.
                stages.stop(Failure.raised(None, error, attempt=0))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            # Those that stageflow has left behind.
            self._cut_off()

    def _graph(self, stages: Stages) -> UnifiedStageGraph:
        """What Pipeline.build() makes of a pipeline that has been checked; to make it at once takes half the time."""
        offers = self._saga.blueprint.stages
        self._answers |= {name: given for name in offers if (given := stages.given(name)) is not None}
        specs = [
            UnifiedStageSpec(
                name=name,
                runner=partial(self._wait_for, stages, name),
                kind=offer.spec.kind,
                dependencies=offer.spec.dependencies,
                conditional=offer.spec.conditional,
            )
            for name, offer in offers.items()
        ]
        return UnifiedStageGraph(specs, interceptors=[*self._interceptors, self._listener])

    async def _wait_for(self, stages: Stages, name: str, ctx: StageContext) -> StageOutput:
        self._called.add(name)
        # An interceptor that asks for a retry gets here again: retries are the policy's, so the answer stays.
        answer = self._answers.get(name)
        if answer is None and stages.is_stopping():
            return STOPPING
        if answer is None:
            assert name not in self._waiters  # stageflow runs a wrapper again only when it has answered
            stages.begin(name, ctx.inputs)
            waiter = self._waiters[name] = asyncio.get_running_loop().create_future()
            answer = await waiter
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ended(self, _stages: Stages, name: str, answer: StageOutput | Failure) -> None:
        """Have the stage's wrapper say so to stageflow."""
        told = self._answers[name] = self._told(answer) if isinstance(answer, Failure) else answer
        self._release(name, told)

    def _told(self, failure: Failure) -> StageOutput | Exception:
        if not self._interceptors:
            # For an exception stageflow writes a traceback to the log.
            return STOPPING
        # The user's interceptors get to see what went wrong.
        return failure.exception if isinstance(failure.exception, Exception) else RuntimeError(str(failure))

    def stop(self, besides: str | None, /) -> None:
        """Start nothing more."""
        for name in self._waiters:
            # One CANCEL is enough for stageflow to cancel and await its other wrappers and to end.
            if name != besides:
                self._release(name, STOPPING)
        # Those that have not come so far tell nobody anything.
        self._timer = asyncio.get_running_loop().call_later(self._saga.policy.cancel_grace, self._cut_off)

    def _note(self, _name: str, _kind: object, _ctx: StageContext, context: PipelineContext) -> None:
        # A fork of the context inherits the hook; what a stage runs in one is the stage's.
        if context is self._context:
            self._wrappers.add(this_task())

    def _note_skipped(self, name: str, _kind: object, ctx: StageContext, context: PipelineContext) -> None:
        # stageflow calls no runner and no interceptor then, and its results are lost when the run fails.
        if context is self._context and name in self._conditional and (reason := ctx.inputs.get("skip_reason")):
            self._skipped[name] = StageOutput.skip(reason)

    def _cut_off(self) -> None:
        for wrapper in self._wrappers:
            wrapper.cancel()

    def _release(self, name: str, answer: StageOutput | Exception) -> None:
        waiter = self._waiters.get(name)
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    async def tell(self, stages: Stages) -> None:
        """Tell of the stages that stageflow skipped, or that an interceptor answered for."""
        for name, output in {**self._listener.answered, **self._skipped, **self._results}.items():
            # Those of a pipeline that a hook has run, and that was cancelled, have other names.
            if name in self._saga.blueprint.stages:
                await stages.learn(name, output)
