"""Code that comes to its end late: stages that ignore their cancel, and the scenes in which they do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    MisuseError,
    PivotStage,
    Policy,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    nested,
)
from tests.controlled import elapse
from tests.world import World


class Deaf(CompensableStage):
    """Does its work only once it is released, however often it is cancelled meanwhile."""

    def __init__(self, world: World, *, deaf_undo: bool = False) -> None:
        self.world = world
        self.released = asyncio.Event()
        self.deaf_undo = deaf_undo
        self.undone_with: list[Any] = []
        self.outcome: Callable[[], Any] = lambda: StageOutput.ok(seat="14A")

    async def _wait(self) -> None:
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                continue

    async def execute(self, ctx: SagaContext) -> Any:
        if not self.deaf_undo:
            await self._wait()
        self.world.land("deaf")
        return self.outcome()

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.deaf_undo:
            await self._wait()
        self.undone_with.append(None if ctx.output is None else ctx.output.data)
        self.world.begin_undo("deaf")
        self.world.undo("deaf")
        self.world.end_undo("deaf")


class Doubtful(Deaf):
    compensate_in_doubt = True

    async def compensate(self, ctx: CompensationContext) -> None:
        self.undone_with.append("in doubt" if ctx.in_doubt else ctx.output)
        if "deaf" in self.world.standing:
            self.world.undo("deaf")


class DeniedByProbe(Deaf):
    async def probe(self, ctx: CompensationContext) -> None:
        return None


class Stays(Deaf):
    async def compensate(self, ctx: CompensationContext) -> None:
        raise RuntimeError("no")

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok() if "deaf" in self.world.standing else None


async def while_slow_is_undone(work: Coroutine[Any, Any, SagaReport], world: World, *late: Deaf, after: float = 0.0) -> SagaReport:
    """Run a saga of which some stages come late so long after `slow` has begun to be undone."""
    running = asyncio.create_task(work)
    while "slow" not in world.undoing:
        await elapse(1)
    if after:
        await elapse(after)
    for stage in late:
        stage.released.set()
    return await running


LOSS = "saga s: what came late (StageCompleted) could not be recorded; look at its stages in the outside world"


def lost(caplog: pytest.LogCaptureFixture) -> list[tuple[str, BaseException | None]]:
    """What the log says is an error, and what has led to it in the first place."""
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    led_to = [record.exc_info[1] if record.exc_info else None for record in errors]
    return [(record.getMessage(), error and (error.__cause__ or error)) for record, error in zip(errors, led_to, strict=True)]


PROMPT = FailFast(timeout=10, cancel_grace=2)


async def settled_down() -> None:
    """What came late has been recorded, in the ledgers of the sagas above, too."""
    for _ in range(50):
        await asyncio.sleep(0)


async def resumed_while_it_comes_late(coordinator: SagaCoordinator, stage: Deaf, pipeline: Pipeline) -> SagaReport:
    """What comes of a saga that goes on forward, and of which something comes late after five seconds."""
    running = asyncio.create_task(coordinator.resume("s", pipeline, forward=True))
    await elapse(5)
    stage.released.set()
    await settled_down()
    assert (await coordinator.report("s")).status is SagaStatus.RUNNING
    return await running


def nested_in(stage: Deaf, *above: str, policy: Policy = PROMPT) -> Pipeline:
    """The stage in a pipeline in a pipeline ..., named from the inside."""
    pipeline = Pipeline(name="inner").with_stage("deaf", stage)
    for name in above:
        pipeline = Pipeline(name=f"of_{name}").with_stage(name, nested(pipeline, policy))
    return pipeline


INSTEAD = ContinueWithFallback(timeout=10, cancel_grace=2, fallbacks={"deaf": {"seat": None}})


class DeafByKey(Deaf):
    """What it does bears the key of its execution, so that each execution stands by itself."""

    is_deaf = True

    async def execute(self, ctx: SagaContext) -> Any:
        if self.is_deaf:
            await self._wait()
        self.world.land(ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.world.undo(ctx.forward_key)


class Tolerant(CompensableStage):
    """Runs a saga, and does not mind that it fails; `outcome` is what it comes to itself."""

    def __init__(self, inner: Pipeline, outcome: StageOutput | None = None) -> None:
        self.inner = inner
        self.outcome = outcome

    async def execute(self, ctx: SagaContext) -> StageOutput:
        await ctx.run_saga(self.inner, policy=PROMPT)
        return self.outcome or StageOutput.ok()

    async def compensate(self, ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, self.inner)


@dataclass
class Held:
    """What a saga that something came late in says, and what became of it.

    Attributes:
        before: Before that.
        late: After it.
        resumed: When somebody has then gone on all the same; None: it was refused.
        compensated: When somebody has asked to undo it.
        undone_with: What the code of its stage was called with until then.
        settled: When a person has said what stands.
    """

    before: SagaReport
    late: SagaReport
    resumed: SagaReport | None
    compensated: SagaReport
    undone_with: list[Any]
    settled: SagaReport


async def held(
    coordinator: SagaCoordinator, stage: Deaf, pipeline: Pipeline, verdict: str, put_right: Callable[[], None] = lambda: None
) -> Held:
    """Let the stage of a saga come late, go on with that, and settle it."""
    before = await coordinator.report("s")
    stage.released.set()
    await settled_down()
    late = await coordinator.report("s")
    assert "and say so (undone or kept); then go on:\n" in str(late)
    stage.undone_with.clear()
    resumed = None
    with contextlib.suppress(MisuseError):
        resumed = await coordinator.resume("s", pipeline)
    with pytest.raises(MisuseError, match="nothing that came late waits for a person, got deaf in doubt, of which something came late"):
        await coordinator.resume("s", pipeline, forward=True)
    compensated = await coordinator.compensate("s", pipeline)
    with pytest.raises(MisuseError, match=r"undone or kept, for stage 'deaf', got retry\. Something of it came late"):
        await coordinator.settle("s", "deaf", "retry", "try")
    undone_with = [*stage.undone_with]
    put_right()
    return Held(before, late, resumed, compensated, undone_with, await coordinator.settle("s", "deaf", verdict, "looked"))


class DeafPivot(PivotStage):
    """Completes once it is released, against the word of its probe."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.released = asyncio.Event()

    async def execute(self, _: SagaContext) -> None:
        while not self.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.released.wait()
        self.world.land("deaf")

    async def probe(self, _: CompensationContext) -> None:
        return None
