"""When each stage of a saga starts: as soon as all that it depends on has ended."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Final

from stageflow.api import StageOutput
from stageflow.stages.inputs import StageInputs

from saga.live.around import Around, Stages
from saga.quick import maker
from saga.tasks import end

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from stageflow import BaseInterceptor

    from saga.failures import Failure
    from saga.live.saga import LiveSaga

_stage_inputs: Final = maker(StageInputs)


class Schedule:
    """Starts a stage as soon as all that it depends on has ended.

    It is told each time whose stages they are and does not hold on to them: what refers to each other waits for Python's garbage collector.

    Attributes:
        is_watched: Hooks or interceptors are around each stage.
    """

    def __init__(self, saga: LiveSaga, interceptors: Sequence[BaseInterceptor]) -> None:
        graph = saga.blueprint.graph
        self._nodes = graph.nodes
        # Python looks up anew each time, in the class first, what is worked out when it is first asked for.
        self._dependencies, self._dependents = graph.dependencies, graph.dependents
        self._snapshot = saga.snapshot
        self._ports = saga.ports
        # Stages are started where another one has ended: in its context, what it bound would be bound for them.
        self._context = copy_context()
        self._inputs: dict[str, dict[str, StageOutput]] = {}
        self._left = len(graph.nodes)
        self._over: asyncio.Future[None] = saga.loop.create_future()
        self._around = Around(saga, interceptors) if interceptors or saga.has_hooks() else None
        self.is_watched = self._around is not None

    async def run(self, stages: Stages) -> None:
        """Start the stages, until all have ended or the saga stops."""
        self._start(stages, [node.name for node in self._nodes if not node.dependencies])
        await self._over

    def _start(self, stages: Stages, ready: list[str]) -> None:
        for name in ready:
            given = stages.given(name)
            if self._around is not None:
                # What stands in the ledger passes by interceptors, too: they may have changed it on its way to the others.
                self._context.run(self._around.let_in, stages, name, self._inputs_of(name), given, self._goes_on)
            elif given is None:
                self._context.run(stages.begin, name, self._inputs_of(name))
            else:
                # The list grows while it is gone through: to hand on what thousands gave takes no stack.
                ready += self._enabled(name, given)

    def _inputs_of(self, name: str) -> StageInputs:
        return _stage_inputs(
            snapshot=self._snapshot,
            prior_outputs=self._inputs.pop(name, {}),  # what nobody needs any more may be large
            ports=self._ports,
            declared_deps=self._dependencies[name],
            stage_name=name,
        )

    def _enabled(self, name: str, output: StageOutput) -> list[str]:
        """The stages that have waited for this one only."""
        self._left -= 1
        if not self._left:
            end(self._over)
        enabled = []
        for dependent in self._dependents[name]:
            inputs = self._inputs.setdefault(dependent, {})
            # In the order in which they ended, as stageflow has them.
            inputs[name] = output
            if len(inputs) == len(self._dependencies[dependent]):
                enabled.append(dependent)
        return enabled

    def ended(self, stages: Stages, name: str, answer: StageOutput | Failure) -> None:
        """Take a stage's answer for those that depend on it; a failure has stopped the saga."""
        if self._around is not None:
            self._around.tell(name, answer)
        elif not stages.is_stopping():
            assert isinstance(answer, StageOutput)  # a failure has stopped the saga
            self._start(stages, self._enabled(name, answer))

    def _goes_on(self, stages: Stages, name: str, output: StageOutput) -> bool:
        """Start the stages that have waited for this one only; whether any has yet to end."""
        if not stages.is_stopping():
            self._start(stages, self._enabled(name, output))
        return self._left > 0

    def stop(self, besides: str | None) -> None:
        """Start nothing more; what is around a stage is told so, `besides` the one that is to answer."""
        end(self._over)
        if self._around is not None:
            self._around.stop(besides)

    async def rest(self, stages: Stages) -> None:
        """Wait until nothing runs around a stage any more."""
        if self._around is not None:
            await self._around.rest(stages)
