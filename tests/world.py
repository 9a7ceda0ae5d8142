"""The outside world as a test double: it knows what stands, and refuses a wrong order and a double undo."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from stageflow import BaseInterceptor, ErrorAction, InterceptorResult
from stageflow.api import Pipeline, PipelineContext, StageContext, StageKind, StageOutput
from stageflow.pipeline.interceptors import CriticalInterceptorError

from saga import CompensableStage, CompensationContext, PivotStage, SagaContext
from saga.failures import Failure
from tests.controlled import elapse


class WorldRefused(Exception):
    """What was asked for can't be done to this world."""


class World:
    """What stands, what runs, and what was done, in order.

    Every refusal is kept, because the saga under test would report it as just another failed compensation.
    """

    def __init__(self, dependencies: Mapping[str, Iterable[str]]) -> None:
        self.dependencies = {name: tuple(names) for name, names in dependencies.items()}
        self._closure: dict[str, set[str]] = {}
        self.standing: dict[str, int] = {}
        self.keys: set[str] = set()
        self.running: set[str] = set()
        self.undoing: set[str] = set()
        self.log: list[str] = []
        self.refusals: list[str] = []
        self.most_undone_at_once = 0
        self.witness: Callable[[str], None] | None = None

    def dependents(self, name: str) -> set[str]:
        """Everything that depends on the stage, by brute force over the transitive closure."""
        if name not in self._closure:
            found: set[str] = set()
            pending = [name]
            while pending:
                below = pending.pop()
                more = {other for other, needs in self.dependencies.items() if below in needs} - found
                found |= more
                pending += more
            self._closure[name] = found
        return self._closure[name]

    def _refuse(self, why: str) -> None:
        self.refusals.append(why)
        raise WorldRefused(why)

    def enter(self, name: str) -> None:
        if self.undoing:
            self._refuse(f"{name} runs while {sorted(self.undoing)} are being undone")
        if self.witness is not None:
            self.witness(name)
        self.running.add(name)

    def leave(self, name: str) -> None:
        self.running.discard(name)

    def land(self, name: str) -> None:
        self.standing[name] = self.standing.get(name, 0) + 1
        self.log.append(f"+{name}")

    def begin_undo(self, name: str, *, order_matters: bool = True) -> None:
        if self.running:
            self._refuse(f"{name} is undone while {sorted(self.running)} are running")
        above = self.dependents(name)
        if order_matters and above & self.standing.keys():
            self._refuse(f"{name} is undone under {sorted(above & self.standing.keys())}")
        self.undoing.add(name)
        self.most_undone_at_once = max(self.most_undone_at_once, len(self.undoing))

    def undo(self, name: str, key: str | None = None) -> None:
        if name not in self.standing:
            self._refuse(f"{name} is undone, and nothing of it stands")
        self.standing[name] -= 1
        if not self.standing[name]:
            del self.standing[name]
        self.log.append(f"-{name}")
        if key is not None:
            self.keys.add(key)

    def end_undo(self, name: str) -> None:
        self.undoing.discard(name)

    def undone(self) -> list[str]:
        """What was undone, in order."""
        return [entry[1:] for entry in self.log if entry.startswith("-")]


@dataclass
class Script:
    """What a stage does when it is its turn.

    Attributes:
        outcome: `ok`, `raise`, `fail`, `cancel`, `retry`, `wrong`, `skip`, `hang` (until it is cancelled), or
            `die` (it raises CancelledError).
        lands: Whether its effect lands although the outcome is no success.
        turns: Turns of the event loop before the effect.
        before: Seconds before the effect.
        after: Seconds after the effect.
        gate: Waited for before the effect.
        then: The outcomes of further attempts; the last one is repeated.
        undo_fails: How many of its compensation's attempts fail.
        undo_takes: Seconds.
        undo_bears_repetition: The outside world recognises a request to undo that it has carried out.
        probe_takes: Seconds.
    """

    outcome: str = "ok"
    lands: bool = False
    turns: int = 0
    before: float = 0.0
    after: float = 0.0
    gate: asyncio.Event | None = None
    then: tuple[str, ...] = ()
    undo_fails: int = 0
    undo_takes: float = 0.0
    probe_takes: float = 0.0
    order_matters: bool = True
    undo_bears_repetition: bool = False
    attempts: list[str] = field(default_factory=list)
    undo_attempts: int = 0

    def next_outcome(self) -> str:
        outcomes = (self.outcome, *self.then)
        return outcomes[min(len(self.attempts), len(outcomes) - 1)]


async def nothing(*_: Any) -> None:
    """A stage that does nothing, or the undoing of one."""


class CardDeclined(Exception):
    """What scripted stages raise."""


async def perform(world: World, name: str, script: Script, ctx: SagaContext, *, records: bool = False) -> Any:
    """One attempt of a scripted stage."""
    outcome, key = script.next_outcome(), ctx.idempotency_key
    script.attempts.append(outcome)
    world.enter(name)
    try:
        if script.gate is not None:
            await script.gate.wait()
        for _turn in range(script.turns):
            await asyncio.sleep(0)
        if script.before:
            await elapse(script.before)
        if outcome == "ok" or script.lands:
            if key not in world.keys:
                # A repeated attempt has its effect once.
                world.keys.add(key)
                world.land(name)
            if records:
                await ctx.record(name)
        if script.after:
            await elapse(script.after)
        return await conclude(name, outcome)
    finally:
        world.leave(name)


async def conclude(name: str, outcome: str) -> Any:
    match outcome:
        case "ok":
            return StageOutput.ok(stage=name)
        case "raise":
            raise CardDeclined(f"{name} was declined")
        case "fail":
            return StageOutput.fail(f"{name} reports", data={"partial": name})
        case "cancel":
            return StageOutput.cancel(f"{name} cancels")
        case "retry":
            return StageOutput.retry(f"{name} again")
        case "wrong":
            return 42
        case "skip":
            return StageOutput.skip(f"{name} has nothing to do")
        case "hang":
            await asyncio.Event().wait()
        case "die":
            raise asyncio.CancelledError
    raise AssertionError(outcome)


class Scripted(CompensableStage):
    def __init__(self, world: World, name: str, script: Script) -> None:
        self.world, self.name, self.script = world, name, script

    async def execute(self, ctx: SagaContext) -> Any:
        return await perform(self.world, self.name, self.script, ctx)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.script.undo_attempts += 1
        if self.script.undo_bears_repetition and ctx.idempotency_key in self.world.keys:
            return
        self.world.begin_undo(self.name, order_matters=self.script.order_matters)
        try:
            if self.script.undo_takes:
                await elapse(self.script.undo_takes)
            if self.script.undo_attempts <= self.script.undo_fails:
                raise CardDeclined(f"undoing {self.name} was declined")
            self.world.undo(self.name, ctx.idempotency_key)
        except asyncio.CancelledError:
            self.world.refusals.append(f"the compensation of {self.name} was interrupted")
            raise
        finally:
            self.world.end_undo(self.name)


class Probed(Scripted):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        if self.script.probe_takes:
            await elapse(self.script.probe_takes)
        return StageOutput.ok(stage=self.name, probed=True) if self.name in self.world.standing else None


class Pivot(PivotStage):
    def __init__(self, world: World, name: str, script: Script) -> None:
        self.world, self.name, self.script = world, name, script

    async def execute(self, ctx: SagaContext) -> Any:
        return await perform(self.world, self.name, self.script, ctx)


class Plain:
    """A plain stageflow stage: it has no effect on the world."""

    kind = StageKind.TRANSFORM

    def __init__(self, world: World, name: str, script: Script) -> None:
        self.world, self.name, self.script = world, name, script

    async def execute(self, ctx: StageContext) -> Any:
        self.world.enter(self.name)
        try:
            if self.script.before:
                await elapse(self.script.before)
            outcome = self.script.next_outcome()
            self.script.attempts.append(outcome)
            return await conclude(self.name, outcome)
        finally:
            self.world.leave(self.name)


class Recording(Scripted):
    """Records its effect as soon as it has landed, whatever becomes of the stage then."""

    async def execute(self, ctx: SagaContext) -> Any:
        return await perform(self.world, self.name, self.script, ctx, records=True)

    async def compensate(self, ctx: CompensationContext) -> None:
        if ctx.effects:
            await super().compensate(ctx)


class WithFallback(Scripted):
    async def fallback(self, ctx: SagaContext, failure: Failure) -> dict[str, Any]:
        return {"instead_of": self.name}


STAGES = {"compensable": Scripted, "probed": Probed, "pivot": Pivot, "plain": Plain, "fallback": WithFallback, "recording": Recording}

SEQUENCE = {"a": (), "b": ("a",), "c": ("b",)}
BRANCHES = {"a": (), "b": ("a",), "c": ("a",)}
DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
FAN_IN = {"a": (), "b": (), "c": (), "d": ("a", "b", "c")}


def hooked() -> PipelineContext:
    """A context with a hook in it, so that something is around each stage."""
    context = PipelineContext.create()
    context.add_before_stage_start_hook(lambda *_: None)
    return context


class Watching(BaseInterceptor):
    """Is around each stage, and does nothing."""

    name = "watching"

    async def before(self, stage_name: str, ctx: PipelineContext) -> Any: ...

    async def after(self, _stage_name: str, _result: Any, _ctx: PipelineContext) -> None: ...


class Recorder(BaseInterceptor):
    """Notes its turns around each stage; answers for one or refuses one if it is to."""

    name = "recorder"

    def __init__(self, answer_for: str = "", action: ErrorAction = ErrorAction.FAIL, critical: str = "") -> None:
        self.seen: list[tuple[str, ...]] = []
        self.answer_for, self.action, self.critical = answer_for, action, critical

    async def before(self, stage_name: str, ctx: PipelineContext) -> InterceptorResult | None:
        self.seen.append(("before", stage_name))
        if stage_name == self.critical:
            raise CriticalInterceptorError("not allowed", self.name)
        if stage_name == self.answer_for:
            return InterceptorResult(stage_ran=False, result={"cached": True})
        return None

    async def after(self, stage_name: str, result: Any, ctx: PipelineContext) -> None:
        self.seen.append(("after", stage_name, result.status))

    async def on_error(self, stage_name: str, error: Exception, ctx: PipelineContext) -> ErrorAction:
        self.seen.append(("error", stage_name, type(error).__name__))
        return self.action


HOOKED = pytest.mark.parametrize("context", [None, hooked()], ids=["bare", "with a hook"])
WATCHED = pytest.mark.parametrize("interceptors", [(), (Watching(),)], ids=["bare", "with an interceptor"])


def scene(
    shape: Mapping[str, Iterable[str]], scripts: Mapping[str, Script] | None = None, kinds: Mapping[str, str] | None = None
) -> tuple[World, Pipeline]:
    """A world, and a pipeline of that shape in it; what isn't scripted succeeds, what has no kind is compensable."""
    world = World(shape)
    return world, staged(world, shape, scripts or {}, kinds or {})


def staged(world: World, shape: Mapping[str, Iterable[str]], scripts: Mapping[str, Script], kinds: Mapping[str, str]) -> Pipeline:
    """The pipeline of a scene in a world that is there."""
    pipeline = Pipeline(name="scene")
    for name, dependencies in shape.items():
        script = scripts.get(name, Script())
        kind = STAGES[kinds.get(name, "compensable")]
        pipeline = pipeline.with_stage(name, kind(world, name, script), dependencies=tuple(dependencies))  # type: ignore[arg-type] # stageflow's Stage takes its own context
    return pipeline
