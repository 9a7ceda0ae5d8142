"""What can be made to go wrong with a stage, and what makes it go wrong."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from stageflow.api import StageOutput

from saga.blueprint import Blueprint
from saga.contexts import CompensationContext, Host, SagaContext
from saga.failures import Failure
from saga.live.actions import LocalActions


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
    """The process dies before an event is in the ledger."""
    KILLED_AFTER = "killed after"
    """The process dies when a write is in the ledger, and nobody has learnt of it."""


UNDOING: Final = frozenset({Fault.UNDO_REPEATED, Fault.UNDO_FAILS})
KILLS: Final = (Fault.KILLED_BEFORE, Fault.KILLED_AFTER)
TIMEOUTS: Final = frozenset({Fault.TIMES_OUT_BEFORE, Fault.TIMES_OUT_AFTER})


class InjectedFault(Exception):
    """A stage or a compensation raised because it was made to."""


WHOLE: Final = math.inf
"""How far a stage came that ran to its end; one that broke off came as far as the effects that it was about to record."""


@dataclass
class Injection:
    """One fault at one stage of one saga.

    Attributes:
        fault: What goes wrong; None: nothing does, unless somewhere else.
        stage: Where; a stage of a nested saga by its path.
        interrupts: The caller is cancelled when that stage has had its effect, so that it is undone.
        turning: Another stage that raises before its effect, so that the saga turns back.
        caller: Who is cancelled where that is the fault.
        reached: Whether it struck.
        lifted: Whether it, and what turns the saga back, is mended.
        far: How far each stage whose code has run came, by its path.
    """

    fault: Fault | None = None
    stage: str = ""
    interrupts: bool = False
    turning: str | None = None
    caller: asyncio.Task[Any] | None = None
    reached: bool = False
    lifted: bool = False
    far: dict[str, float] = field(default_factory=dict)


class _BrokenOff(BaseException):
    """A stage is not to go on from here; no Exception, because it is nothing that a stage could mend."""


class _Recorder:
    """A saga, as the code of a stage sees it: counts what is recorded, and breaks the stage off at its n-th effect."""

    def __init__(self, host: Host, breaks_off_at: float = WHOLE) -> None:
        self._host = host
        self._breaks_off_at = breaks_off_at
        self.count = 0

    async def record_effect(self, effect: Any) -> None:
        """Have it recorded, or break off."""
        self.count += 1
        if self.count >= self._breaks_off_at:
            raise _BrokenOff
        await self._host.record_effect(effect)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


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
                await self._perform(ctx)
                raise self._strike(stage)
            case Fault.TIMES_OUT_BEFORE:
                self._strike(stage)
                await asyncio.Event().wait()
            case Fault.TIMES_OUT_AFTER:
                await self._answer_never(ctx)
            case Fault.INTERRUPTED_BEFORE:
                self._strike(stage)
                await self._interrupt(ctx)
            case Fault.INTERRUPTED_AFTER:
                output = await self._perform(ctx)
                self._strike(stage)
                await self._interrupt(ctx)
                return output
            case Fault.UNDO_REPEATED | Fault.UNDO_FAILS if injection.interrupts:
                output = await self._perform(ctx)
                await self._interrupt(ctx)
                return output
            case _:
                pass
        return await self._perform(ctx)

    async def _perform(self, ctx: SagaContext) -> Any:
        """Run the stage's own code, and note how far it comes."""
        path, far, recorder = self._prefix + ctx.stage_name, self._injection.far, _Recorder(ctx._host)  # noqa: SLF001 - to stand before it
        # Code that is given up may have its effect, and not end before anybody asks for it.
        far.setdefault(path, 0)
        try:
            returned = await super().execute(replace(ctx, _host=recorder))
        except BaseException:
            far[path] = max(far[path], recorder.count)
            raise
        far[path] = WHOLE
        return returned

    async def _answer_never(self, ctx: SagaContext) -> None:
        request = asyncio.ensure_future(self._perform(ctx))
        try:
            await asyncio.shield(request)
            self._strike(ctx.stage_name)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            # It takes longer than we had patience for; or it has ended in this very turn of the loop, in which nobody else ran.
            # Its effect is to land all the same before anybody asks for it.
            await request
            self._strike(ctx.stage_name)
            raise

    async def _interrupt(self, ctx: SagaContext) -> None:
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
        far: How far the stages came whose effects stand, by their paths.
        fallbacks: The stages whose fallback stands in, and for which failure.
        outputs: What those stages gave that do not stand, though stages do that depend on them.
    """

    far: Mapping[str, float]
    fallbacks: Mapping[str, Failure]
    outputs: Mapping[str, StageOutput]

    def __eq__(self, other: object) -> bool:
        """Whether the world has to look the same: when a stage failed, and with which words, is nothing that it shows."""
        return isinstance(other, Standing) and self._shown() == other._shown()

    __hash__ = None  # type: ignore[assignment] # outputs have none

    def _shown(self) -> tuple[object, ...]:
        return self.far, set(self.fallbacks), {path: output.data for path, output in self.outputs.items()}


def stands(path: str, standing: Collection[str]) -> bool:
    """Whether a stage, or one of a saga that it runs, is among those that stand."""
    return path in standing or any(stage.startswith(f"{path}/") for stage in standing)


class ReferenceActions(LocalActions):
    """Runs the code of the stages that are to stand; the others give what they gave, and do nothing."""

    def __init__(self, blueprint: Blueprint, prefix: str, standing: Standing) -> None:
        super().__init__(blueprint)
        self._prefix = prefix
        self._standing = standing

    async def execute(self, ctx: SagaContext) -> Any:
        """Run the stage if it is to stand, and as far."""
        path, standing = self._prefix + ctx.stage_name, self._standing
        given = standing.outputs.get(path, StageOutput.ok())
        failure = standing.fallbacks.get(path)
        if failure is not None:
            try:
                return await self.fallback(ctx, failure)
            except Exception:  # noqa: BLE001 - then the policy's stood in
                return given
        if not stands(path, standing.far):
            return given
        far = standing.far.get(path, WHOLE)
        recorder = _Recorder(ctx._host, far)  # noqa: SLF001 - to stand before it
        try:
            return await super().execute(replace(ctx, _host=recorder))
        except BaseException:
            # Not asked by its type: a task group of the stage may have wrapped it.
            if recorder.count >= far:
                return given
            raise
