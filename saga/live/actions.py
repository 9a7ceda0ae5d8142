"""The port through which a saga acts on the world: run this action, this compensation, this probe.

Forward and backward know nothing of where the user's code runs; `LocalActions` runs it in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from saga.blueprint import Blueprint
from saga.contexts import CompensationContext, SagaContext
from saga.failures import Failure
from saga.stages import Hooks

if TYPE_CHECKING:
    from collections.abc import Awaitable


class Actions(Protocol):
    """Carries out what user code has to do for one saga."""

    def execute(self, ctx: SagaContext) -> Awaitable[Any]:
        """Run the stage that the context names."""
        ...

    def fallback(self, ctx: SagaContext, failure: Failure) -> Awaitable[Any]:
        """Run its fallback."""
        ...

    def compensate(self, ctx: CompensationContext) -> Awaitable[Any]:
        """Run its compensation."""
        ...

    def probe(self, ctx: CompensationContext) -> Awaitable[Any]:
        """Ask its probe."""
        ...


class LocalActions:
    """Runs the stages' own code, each on one object from its first attempt to its compensation."""

    def __init__(self, blueprint: Blueprint) -> None:
        self._offers = blueprint.stages
        self._made: dict[str, Hooks] = {}

    def _stage(self, stage: str) -> Hooks:
        made = self._made.get(stage)
        if made is None:
            made = self._made[stage] = self._offers[stage].make()
        return made

    def execute(self, ctx: SagaContext) -> Awaitable[Any]:
        """Run the stage that the context names."""
        return self._stage(ctx.stage_name).execute(ctx)

    def fallback(self, ctx: SagaContext, failure: Failure) -> Awaitable[Any]:
        """Run its fallback."""
        return self._stage(ctx.stage_name).fallback(ctx, failure)

    def compensate(self, ctx: CompensationContext) -> Awaitable[Any]:
        """Run its compensation."""
        return self._stage(ctx.stage_name).compensate(ctx)

    def probe(self, ctx: CompensationContext) -> Awaitable[Any]:
        """Ask its probe."""
        return self._stage(ctx.stage_name).probe(ctx)
