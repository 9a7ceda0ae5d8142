"""What can go wrong, at every stage: a fault goes between one stage and the saga, and the other stages know nothing of it."""

import asyncio
import random
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict
from stageflow.api import Pipeline, StageOutput

from examples.order_fulfilment.stages import OrderStage, order_pipeline
from saga import CompensationContext, SagaContext, compensable

STAGES: Final = ("reserve_stock", "authorise_payment", "capture_payment", "create_shipment", "issue_receipt")
PATIENCE: Final = 0.1
"""Seconds after which a stage that hangs is given up."""


class FaultKind(StrEnum):
    """The ways in which a stage goes wrong."""

    RAISES_BEFORE = "raises before its effect"
    RAISES_AFTER = "raises after its effect"
    RETURNS_FAIL = "returns FAIL"
    HANGS_BEFORE = "hangs before its effect"
    HANGS_AFTER = "hangs after its effect"
    REQUEST_LOST = "request lost, once"
    ANSWER_LOST = "answer lost, once"
    UNDO_REQUEST_LOST = "undoing: request lost, once"
    UNDO_ANSWER_LOST = "undoing: answer lost, once"

    @property
    def is_mended(self) -> bool:
        """Whether a retry mends it, so that the order is fulfilled all the same."""
        return self in {FaultKind.REQUEST_LOST, FaultKind.ANSWER_LOST}

    @property
    def is_of_undoing(self) -> bool:
        """Whether it strikes the compensation."""
        return self in {FaultKind.UNDO_REQUEST_LOST, FaultKind.UNDO_ANSWER_LOST}


class Fault(BaseModel):
    """One kind of fault at one stage."""

    model_config = ConfigDict(frozen=True)

    stage: str
    kind: FaultKind


class InjectedError(Exception):
    """A stage raised because it was told to."""


FAULTS: Final = tuple(Fault(stage=stage, kind=kind) for kind in FaultKind for stage in STAGES)
"""All of them."""


def deal(orders: Iterable[str], number: int, seed: int) -> dict[str, Fault]:
    """Deal faults to so many of the orders, each fault as often as any other; the same ones for the same seed."""
    candidates = sorted(orders)
    struck = random.Random(seed).sample(candidates, min(number, len(candidates)))
    return {order: FAULTS[index % len(FAULTS)] for index, order in enumerate(struck)}


def faulty_pipeline(stages: Mapping[str, OrderStage], fault: Fault, struck: set[str]) -> Pipeline:
    """The pipeline with a fault in it; the ids of the sagas that it strikes are noted in `struck`."""
    stages = dict(stages)
    if fault.kind.is_of_undoing:
        # What comes last has to fail, or nothing would be undone.
        stages[STAGES[-1]] = _Faulty(stages[STAGES[-1]], FaultKind.RAISES_AFTER, set()).stage()
    stages[fault.stage] = _Faulty(stages[fault.stage], fault.kind, struck).stage()
    return order_pipeline(stages)


class _Faulty:
    """Stands between a stage and the saga."""

    def __init__(self, stage: OrderStage, kind: FaultKind, struck: set[str]) -> None:
        self._stage = stage
        self._kind = kind
        self._struck = struck
        self._unanswered: set[asyncio.Task[Any]] = set()

    def stage(self) -> Any:
        hangs = self._kind in {FaultKind.HANGS_BEFORE, FaultKind.HANGS_AFTER}
        return compensable(self._execute, self._compensate, probe=self._stage.probe, timeout=PATIENCE if hangs else None)

    async def _execute(self, ctx: SagaContext) -> Any:
        match self._kind:
            case FaultKind.RAISES_BEFORE:
                self._strike(ctx)
                raise InjectedError(f"injected: {self._kind}")
            case FaultKind.RETURNS_FAIL:
                self._strike(ctx)
                return StageOutput.fail(f"injected: {self._kind}")
            case FaultKind.HANGS_BEFORE:
                self._strike(ctx)
                await asyncio.Event().wait()
            case FaultKind.HANGS_AFTER:
                self._strike(ctx)
                # The request gets through, however long it takes, and its answer never comes.
                request = asyncio.create_task(self._stage.execute(ctx))
                self._unanswered.add(request)
                request.add_done_callback(self._unanswered.discard)
                await asyncio.Event().wait()
            case FaultKind.REQUEST_LOST if ctx.attempt == 1:
                self._strike(ctx)
                raise ConnectionError(f"injected: {self._kind}")
        output = await self._stage.execute(ctx)
        match self._kind:
            case FaultKind.RAISES_AFTER:
                self._strike(ctx)
                raise InjectedError(f"injected: {self._kind}")
            case FaultKind.ANSWER_LOST if ctx.attempt == 1:
                self._strike(ctx)
                raise ConnectionError(f"injected: {self._kind}")
        return output

    async def _compensate(self, ctx: CompensationContext) -> None:
        if self._kind is FaultKind.UNDO_REQUEST_LOST and ctx.attempt == 1:
            self._strike(ctx)
            raise ConnectionError(f"injected: {self._kind}")
        await self._stage.compensate(ctx)
        if self._kind is FaultKind.UNDO_ANSWER_LOST and ctx.attempt == 1:
            self._strike(ctx)
            raise ConnectionError(f"injected: {self._kind}")

    def _strike(self, ctx: SagaContext | CompensationContext) -> None:
        self._struck.add(ctx.saga_id)
