"""What is run: stages that do nothing, in chains and fan-outs, by plain stageflow and as sagas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from stageflow import BaseInterceptor
from stageflow.api import Pipeline, PipelineContext, stage

from saga import CompensableStage, SagaCoordinator, SagaReport, SagaStatus

if TYPE_CHECKING:
    from saga import CompensationContext, SagaContext

Shape = Mapping[str, tuple[str, ...]]
"""The dependencies of every stage by its name, in topological order."""


def chain(stages: int) -> Shape:
    """Every stage after the one before it."""
    return {f"stage_{number}": (f"stage_{number - 1}",) if number else () for number in range(stages)}


def fan_out(stages: int) -> Shape:
    """One stage, and all others after it, at once."""
    return {f"stage_{number}": ("stage_0",) if number else () for number in range(stages)}


SHAPES = {"chain": chain, "fan-out": fan_out}


class MeasurementError(Exception):
    """What was measured did something else than it was meant to do."""


class Failing(Exception):
    """The failure that turns a run back."""


class NoOp(CompensableStage):
    """Does nothing, and undoes it."""

    async def execute(self, ctx: SagaContext) -> None:
        """Do nothing."""

    async def compensate(self, ctx: CompensationContext) -> None:
        """Undo nothing."""


@dataclass(slots=True)
class Stamps:
    """When one rollback passed its landmarks, by `perf_counter`.

    Attributes:
        raised: The failing stage raised.
        first: The first compensation was called.
        last: The last compensation was called.
        returned: The caller had the outcome.
        compensations: How many were called.
    """

    raised: float = 0.0
    first: float = 0.0
    last: float = 0.0
    returned: float = 0.0
    compensations: int = 0

    def fail(self) -> None:
        """Turn the run back."""
        self.raised = perf_counter()
        raise Failing

    def compensated(self) -> None:
        """Note a call of a compensation."""
        self.last = perf_counter()
        if not self.compensations:
            self.first = self.last
        self.compensations += 1


class Stamped(CompensableStage):
    """Does nothing, and notes when it is undone."""

    def __init__(self, stamps: Stamps) -> None:
        """Note it there."""
        self.stamps = stamps

    async def execute(self, ctx: SagaContext) -> None:
        """Do nothing."""

    async def compensate(self, _ctx: CompensationContext) -> None:
        """Note the time."""
        self.stamps.compensated()


class StampedFailure(Stamped):
    """Notes when it fails."""

    async def execute(self, _ctx: SagaContext) -> None:
        """Fail."""
        self.stamps.fail()


def pipeline(shape: Shape, runner: Any = NoOp, last: Any = None) -> Pipeline:
    """Build a pipeline of that shape, all of one runner, or all but the last stage."""
    specs = {name: stage(name, runner, dependencies=dependencies) for name, dependencies in shape.items()}
    if last is not None:
        name = list(specs)[-1]
        specs[name] = stage(name, last, dependencies=shape[name])
    return Pipeline(name="bench", stages=specs)


class Silent(BaseInterceptor):
    """Does nothing around every stage; without any interceptor stageflow would bring back its default ones."""

    name = "silent"

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        """Do nothing."""

    async def after(self, _stage_name: str, _result: object, _ctx: PipelineContext) -> None:
        """Do nothing."""


class Plain:
    """Plain stageflow, as it comes: `pipeline.run()`; or with interceptors in the place of its default ones."""

    def __init__(self, shape: Shape, *, interceptors: Sequence[BaseInterceptor] = ()) -> None:
        """Build the pipeline once."""
        self._pipeline = pipeline(shape)
        self._interceptors = list(interceptors)

    async def prepare(self) -> None:
        """Get ready: there is nothing to get ready."""

    async def run(self) -> None:
        """Run it once."""
        results = await self._pipeline.run(interceptors=self._interceptors)
        if len(results) != len(self._pipeline.stages):
            raise MeasurementError(f"expected {len(self._pipeline.stages)} outputs, got {len(results)}")


class Bare(Plain):
    """stageflow's scheduling alone: its interceptors and its timeout are off."""

    def __init__(self, shape: Shape) -> None:
        """Build the pipeline once."""
        super().__init__(shape)
        self._off = {"_timeout_ms": 0} | {f"_timeout.{name}": 0 for name in shape}

    async def run(self) -> None:
        """Run it once."""
        context = PipelineContext.create(topology=self._pipeline.name, data=dict(self._off))
        await self._pipeline.run(context, interceptors=[Silent()])


class Saga:
    """A saga with the memory ledger, as it comes: `SagaCoordinator().run(pipeline)`."""

    def __init__(
        self, pipeline: Pipeline, expected: SagaStatus = SagaStatus.COMPLETED, *, interceptors: Sequence[BaseInterceptor] = ()
    ) -> None:
        """Expect it to end in that status."""
        self._pipeline = pipeline
        self._expected = expected
        self._interceptors = interceptors
        self._coordinator = SagaCoordinator(interceptors=interceptors)

    async def prepare(self) -> None:
        """Get a new coordinator, so that no ledger grows from round to round, and have it read the pipeline."""
        self._coordinator = SagaCoordinator(interceptors=self._interceptors)
        await self.run()

    async def run(self) -> None:
        """Run it once."""
        self.check(await self._coordinator.run(self._pipeline))

    def check(self, report: SagaReport) -> None:
        """Refuse to go on measuring something that went wrong."""
        if report.status is not self._expected:
            raise MeasurementError(f"expected a saga that is {self._expected.value}, got one that is {report.status.value}")


class FirstSaga(Saga):
    """A saga of a new coordinator and a new pipeline, which is read and checked first."""

    async def prepare(self) -> None:
        """Get ready: both are part of what is timed."""

    async def run(self) -> None:
        """Run it once."""
        self.check(await SagaCoordinator().run(replace(self._pipeline)))
