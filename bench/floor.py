"""The floor of a saga in memory: its contexts, events, fold, tasks and report, and nothing that keeps a promise."""

from __future__ import annotations

import asyncio
import secrets
from contextvars import copy_context
from typing import TYPE_CHECKING

from stageflow.api import StageOutput
from stageflow.stages.inputs import StageInputs

from bench.workloads import MeasurementError, NoOp, pipeline
from saga import FailFast, SagaContext, SagaReport, SagaStatus
from saga.blueprint import Blueprint
from saga.events import SagaEnded, SagaStarted, StageCompleted, StageStarted
from saga.live.inputs import context_of, recorded_input
from saga.outputs import copied_output
from saga.recovery.state import SagaState

if TYPE_CHECKING:
    from bench.workloads import Shape
    from saga.events import AnyEvent


class Floor:
    """The bare loop: each stage in a task of its own when those before it have ended, its two events folded, and the report made of that.

    Nothing in it heeds a cancel, a timeout or a failure; nothing is retried, skipped or undone; its ledger is a list.
    """

    def __init__(self, shape: Shape) -> None:
        """Read the pipeline once."""
        self._blueprint = Blueprint.of(pipeline(shape))
        self._policy = FailFast()
        self._ledger: dict[str, list[AnyEvent]] = {}

    async def prepare(self) -> None:
        """Get ready: nothing grows from round to round."""
        self._ledger.clear()

    async def run(self) -> None:
        """Run it once."""
        report = await _Run(self._blueprint, self._policy, self._ledger).to_its_end()
        if report.status is not SagaStatus.COMPLETED:
            raise MeasurementError(f"expected a saga that is completed, got one that is {report.status.value}")


class _Run:
    def __init__(self, blueprint: Blueprint, policy: FailFast, ledger: dict[str, list[AnyEvent]]) -> None:
        context = context_of(blueprint.name, None, {})
        self._id = secrets.token_hex(16)
        started = SagaStarted(
            saga_id=self._id, pipeline=blueprint.name, graph=blueprint.graph, policy=policy, input=recorded_input(context)
        )
        self._blueprint = blueprint
        self._root = context.derive_root_stage_context()
        self._state = SagaState([started])
        self._events: list[AnyEvent] = [started]
        ledger[self._id] = self._events
        self._inputs: dict[str, dict[str, StageOutput]] = {name: {} for name in blueprint.graph.names}
        self._context = copy_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = len(blueprint.graph.names)
        self._over = asyncio.Event()

    async def to_its_end(self) -> SagaReport:
        # In a task of its own, as every saga is: what its caller's cancel must not reach.
        return await asyncio.create_task(self._drive())

    async def _drive(self) -> SagaReport:
        for node in self._blueprint.graph.nodes:
            if not node.dependencies:
                self._begin(node.name)
        await self._over.wait()
        self._record(SagaEnded(status=SagaStatus.COMPLETED))
        return SagaReport.of(self._state)

    def _record(self, event: AnyEvent) -> None:
        self._state.apply(event)
        self._events.append(event)

    def _begin(self, name: str) -> None:
        self._tasks.add(self._context.run(asyncio.create_task, self._stage(name)))

    async def _stage(self, name: str) -> None:
        self._record(StageStarted(stage=name, attempt=1))
        runner = self._blueprint.stages[name].make()
        assert isinstance(runner, NoOp)  # which gives nothing
        await runner.execute(self._told(name))
        output = StageOutput.ok()
        self._record(StageCompleted(stage=name, output=copied_output(output)))
        self._left -= 1
        if not self._left:
            self._over.set()
        graph = self._blueprint.graph
        for dependent in graph.dependents[name]:
            inputs = self._inputs[dependent]
            inputs[name] = output
            if len(inputs) == len(graph[dependent].dependencies):
                self._begin(dependent)

    def _told(self, name: str) -> SagaContext:
        inputs = StageInputs(
            snapshot=self._root.snapshot,
            prior_outputs=self._inputs[name],
            ports=self._root.inputs.ports,
            declared_deps=frozenset(self._blueprint.graph[name].dependencies),
            stage_name=name,
        )
        return SagaContext(
            snapshot=self._root.snapshot,
            inputs=inputs,
            stage_name=name,
            timer=self._root.timer,
            event_sink=self._root.event_sink,
            saga_id=self._id,
            attempt=1,
            idempotency_key=f"{self._id}/{name}/1",
            _host=None,  # type: ignore[arg-type] # no stage of ours asks for anything
        )
