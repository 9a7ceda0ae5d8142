"""What can be made to go wrong with a stage, and what makes it go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from stageflow.api import StageOutput

from saga.actions import LocalActions
from saga.blueprint import Blueprint
from saga.compensable import CompensationContext, SagaContext
from saga.failures import Failure


class Fault(StrEnum):
    """A way in which a stage, or the process that runs it, goes wrong. Before and after are meant of the stage's effect."""

    RAISES_BEFORE = "raises before"
    RAISES_AFTER = "raises after"
    """The effect has landed, and the answer is lost."""
    TIMES_OUT_BEFORE = "times out before"
    TIMES_OUT_AFTER = "times out after"
    INTERRUPTED_BEFORE = "interrupted before"
    """The saga's caller is cancelled."""
    INTERRUPTED_AFTER = "interrupted after"
    CANCELS = "cancels"
    """It returns CANCEL and has no effect."""
    UNDO_REPEATED = "undo repeated"
    """Its compensation runs twice with the same key, as it does when its answer is lost."""
    UNDO_FAILS = "undo fails"
    """Its compensation raises, at every attempt."""
    KILLED_BEFORE = "killed before"
    """The process dies before a write to the ledger."""
    KILLED_AFTER = "killed after"
    """The process dies when a write is in the ledger, and nobody has learnt of it."""


UNDOING: Final = frozenset({Fault.UNDO_REPEATED, Fault.UNDO_FAILS})
KILLS: Final = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)
TIMEOUTS: Final = frozenset({Fault.TIMES_OUT_BEFORE, Fault.TIMES_OUT_AFTER})


class InjectedFault(Exception):
    """A stage or a compensation raised because it was made to."""


@dataclass
class Injection:
    """One fault at one stage of one saga.

    Attributes:
        fault: What goes wrong; None: nothing does, unless somewhere else.
        stage: Where; a stage of a nested saga by its path.
        turning: Another stage that raises before its effect, so that the saga turns back.
        caller: Who is cancelled where that is the fault.
        reached: Whether it struck.
        lifted: Whether it, and what turns the saga back, is mended.
    """

    fault: Fault | None = None
    stage: str = ""
    turning: str | None = None
    caller: asyncio.Task[Any] | None = None
    reached: bool = False
    lifted: bool = False


class FaultyActions(LocalActions):
    """Runs the stages' own code, and goes wrong where it is told to."""

    def __init__(self, blueprint: Blueprint, prefix: str, injection: Injection) -> None:
        super().__init__(blueprint)
        self._prefix = prefix
        self._injection = injection

    def _fault(self, stage: str) -> Fault | None:
        injection = self._injection
        return injection.fault if self._prefix + stage == injection.stage and not injection.lifted else None

    def _strike(self, stage: str) -> InjectedFault:
        self._injection.reached = True
        return InjectedFault(f"injected: {stage} {self._injection.fault}")

    async def execute(self, ctx: SagaContext) -> Any:
        """Run the stage that the context names, or fail before or after it."""
        stage, injection = ctx.stage_name, self._injection
        if self._prefix + stage == injection.turning and not injection.lifted:
            raise InjectedFault(f"injected: {stage} raises, so that the saga turns back")
        match self._fault(stage):
            case Fault.RAISES_BEFORE:
                raise self._strike(stage)
            case Fault.CANCELS:
                self._strike(stage)
                return StageOutput.cancel("injected")
            case Fault.RAISES_AFTER:
                await super().execute(ctx)
                raise self._strike(stage)
            case Fault.TIMES_OUT_BEFORE:
                self._strike(stage)
                await asyncio.Event().wait()
            case Fault.TIMES_OUT_AFTER:
                await self._answer_never(ctx)
            case Fault.INTERRUPTED_BEFORE:
                await self._interrupt(ctx)
            case Fault.INTERRUPTED_AFTER:
                output = await super().execute(ctx)
                await self._interrupt(ctx)
                return output
            case _:
                pass
        return await super().execute(ctx)

    async def _answer_never(self, ctx: SagaContext) -> None:
        request = asyncio.ensure_future(super().execute(ctx))
        try:
            await asyncio.shield(request)
            self._strike(ctx.stage_name)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not request.done():
                # It takes longer than we had patience for. Its effect is to land all the same before anybody asks for it.
                await request
                self._strike(ctx.stage_name)
            raise

    async def _interrupt(self, ctx: SagaContext) -> None:
        self._strike(ctx.stage_name)
        assert self._injection.caller is not None  # whoever runs the saga has said so
        self._injection.caller.cancel()
        while not ctx.is_cancelled:  # noqa: ASYNC110 - stageflow's contexts have no event to wait for
            await asyncio.sleep(0)

    async def compensate(self, ctx: CompensationContext) -> None:
        """Run the compensation; or fail instead of it, or run it twice."""
        match self._fault(ctx.stage_name):
            case Fault.UNDO_FAILS:
                raise self._strike(ctx.stage_name)
            case Fault.UNDO_REPEATED:
                await super().compensate(ctx)
                self._strike(ctx.stage_name)
            case _:
                pass
        await super().compensate(ctx)


@dataclass(frozen=True)
class Standing:
    """What of a saga stands.

    Attributes:
        stages: The stages whose effects stand, by their paths.
        fallbacks: Those whose fallback stands in, and for which failure.
        outputs: What every stage gave that gave something.
    """

    stages: frozenset[str]
    fallbacks: Mapping[str, Failure]
    outputs: Mapping[str, StageOutput]

    def is_in(self, path: str) -> bool:
        """Whether a stage, or one of a saga that it runs, stands."""
        return path in self.stages or any(stage.startswith(f"{path}/") for stage in self.stages)


class ReferenceActions(LocalActions):
    """Runs the code of the stages that are to stand; the others give what they gave, and do nothing."""

    def __init__(self, blueprint: Blueprint, prefix: str, standing: Standing) -> None:
        super().__init__(blueprint)
        self._prefix = prefix
        self._standing = standing

    async def execute(self, ctx: SagaContext) -> Any:
        """Run the stage if it is to stand."""
        path = self._prefix + ctx.stage_name
        failure = self._standing.fallbacks.get(path)
        if failure is not None:
            return await self.fallback(ctx, failure)
        if self._standing.is_in(path):
            return await super().execute(ctx)
        return self._standing.outputs.get(path, StageOutput.ok())
