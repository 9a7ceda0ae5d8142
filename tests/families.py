"""Whole families of sagas in a world that knows every effect by its idempotency key, and refuses what must not happen to it.

The key of an effect is the path to the execution that had it, `s/book_hotel#2/charge`. So the world can tell whose it is and what
depends on it from the shapes of the pipelines alone; it knows nothing of how a saga decides.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stageflow.api import Pipeline, StageKind, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    PivotStage,
    Policy,
    Retry,
    SagaContext,
    SagaReport,
    SagaStatus,
    nested,
)
from saga.failures import Failure
from tests.controlled import elapse
from tests.world import CardDeclined, WorldRefused, conclude


@dataclass
class Leaf:
    """A stage with an effect of its own, or none.

    Attributes:
        kind: What it offers, a key of `STAGES`.
        outcome: As a `Script`'s, until it has failed so many `times`.
        times: How often it ends so before it succeeds.
        lands: Whether its effect lands all the same.
        before: Seconds before the effect.
        after: Seconds after the effect.
        undo_fails: How many of its compensations fail.
        undo_takes: Seconds.
        unanswered: How many times its probe gives no answer.
    """

    kind: str = "compensable"
    outcome: str = "ok"
    times: int = 99
    lands: bool = False
    before: float = 0.0
    after: float = 0.0
    undo_fails: int = 0
    undo_takes: float = 0.0
    unanswered: int = 0

    def mend(self) -> None:
        """From here on nothing goes wrong with it."""
        self.outcome, self.undo_fails, self.unanswered = "ok", 0, 0
        self.before = self.after = self.undo_takes = 0.0


@dataclass
class Kin:
    """A stage that runs sagas: a nested one, or several of which it takes care itself.

    Attributes:
        trees: The sagas.
        instead: Those that its fallback runs; without any it has none.
        at_once: Of several, whether it runs them at once; None: it is a nested one.
        asked: Of several, whether it has a probe.
        records: Of several, whether it records an effect of its own before it runs them.
        outcome: How it ends itself, having run several, as a `Script`'s.
        times: How often it ends so before it succeeds.
        goes_on: Whether its fallback goes on with what one whose process died has begun.
        instead_fails: How often its fallback fails when it has run its sagas.
    """

    trees: list[Tree]
    instead: list[Tree] = field(default_factory=list)
    at_once: bool | None = None
    asked: bool = True
    records: bool = False
    outcome: str = "ok"
    times: int = 0
    goes_on: bool = True
    instead_fails: int = 0

    def mend(self) -> None:
        """From here on nothing goes wrong with it."""
        self.outcome, self.instead_fails = "ok", 0


@dataclass
class Tree:
    """A saga, with those that its stages run; every stage of a family has another name."""

    name: str
    shape: Mapping[str, tuple[str, ...]]
    stages: Mapping[str, Leaf | Kin]
    policy: Policy

    def family(self) -> Iterator[Tree]:
        """It and all below it."""
        yield self
        for stage in self.stages.values():
            if isinstance(stage, Kin):
                for tree in (*stage.trees, *stage.instead):
                    yield from tree.family()

    def kin(self) -> dict[str, Kin]:
        """All stages of the family that run sagas."""
        return {name: stage for tree in self.family() for name, stage in tree.stages.items() if isinstance(stage, Kin)}

    def leaves(self) -> dict[str, Leaf]:
        """All stages of the family that run no saga."""
        return {name: stage for tree in self.family() for name, stage in tree.stages.items() if isinstance(stage, Leaf)}

    def pipeline(self, world: FamilyWorld) -> Pipeline:
        """Its pipeline, in a world."""
        made = Pipeline(name=self.name)
        for name, dependencies in self.shape.items():
            stage = self.stages[name]
            made = made.with_stage(name, _runner(world, name, stage), dependencies=dependencies)
        return made


def _runner(world: FamilyWorld, name: str, stage: Leaf | Kin) -> Any:
    if isinstance(stage, Leaf):
        return STAGES[stage.kind](world, name, stage)
    if stage.at_once is None:
        return nested(stage.trees[0].pipeline(world), stage.trees[0].policy)
    several = AskedSeveral if stage.asked else Several
    return type(several.__name__, (WithOthersInstead, several), {})(world, name, stage) if stage.instead else several(world, name, stage)


def tokens(path: str) -> tuple[str, ...]:
    """The stages of a path, without the numbers of their executions and attempts."""
    return tuple(re.split(r"[~#]", token, maxsplit=1)[0] for token in path.split("/"))


class FamilyWorld:
    """What stands, by its key.

    Attributes:
        standing: The keys of the effects that stand, and the stage that each is of.
        refusals: What was asked for and may not be.
        serving: The sagas that a stage or its fallback gave last, by the path to the stage, and so what depends on it builds on.
        built_on: Of each effect, what was serving when it landed.
    """

    def __init__(self, root: Tree) -> None:
        self.needs = {name: dependencies for tree in root.family() for name, dependencies in tree.shape.items()}
        self.standing: dict[str, str] = {}
        self.landed: dict[str, str] = {}
        self.undone: set[str] = set()
        self.confirmed: set[str] = set()
        self.unsure: set[str] = set()
        self.running: list[str] = []
        self.undoing: list[str] = []
        self.refusals: list[str] = []
        self.log: list[str] = []
        self.in_no_order: set[str] = set()
        self.replaceable = {name for name, kin in root.kin().items() if kin.instead}
        self.several_stand = {leaf for kin in root.kin().values() if not kin.goes_on for tree in kin.instead for leaf in tree.leaves()}
        self.serving: dict[str, set[str]] = {}
        self.built_on: dict[str, dict[str, set[str]]] = {}
        self._above: dict[str, frozenset[str]] = {}

    def above(self, name: str) -> frozenset[str]:
        """The stages of its pipeline that depend on a stage, by brute force."""
        if name not in self._above:
            found = {other for other, needs in self.needs.items() if name in needs}
            self._above[name] = frozenset(found.union(*[self.above(other) for other in found]))
        return self._above[name]

    def depends(self, key: str, on: str) -> bool:
        """Whether the effect of one key depends on that of another.

        It does where one stage depends on the other, at the place where their paths part, and none from there on had given something else.
        """
        steps = on.split("/")
        for place, (mine, its) in enumerate(zip(key.split("/"), steps, strict=False)):
            if mine != its:
                (upper,), (lower,) = tokens(mine), tokens(its)
                if upper not in self.above(lower) or (lower in self.in_no_order and lower not in self.replaceable):
                    return False
                return all(self.was_given(key, on, depth) for depth in range(place, len(steps)))
        return False

    def was_given(self, key: str, on: str, depth: int) -> bool:
        """Whether one effect landed on what the stage at a depth of the other's path gave: not all sagas that it ran may be that."""
        *above, step = on.split("/")[: depth + 1]
        (stage,) = tokens(step)
        given = self.built_on[key].get("/".join([*above, stage]), set())
        return stage not in self.replaceable or any(on.startswith(f"{saga_id}/") for saga_id in given)

    def serve(self, saga_id: str, stage: str, sagas: Iterable[str]) -> None:
        """What depends on a stage stands on these of the sagas that it ran, from here on."""
        self.serving[f"{saga_id}/{stage}"] = set(sagas)

    def refuse(self, why: str) -> None:
        """Keep why, as the saga would report it as just another failure."""
        self.refusals.append(why)
        raise WorldRefused(why)

    def begin_undo(self, saga_id: str, key: str) -> None:
        running = [other for other in self.running if other.startswith(f"{saga_id}/")]
        if running:
            self.refuse(f"{key} is undone while {running} are running")
        under = [other for other in self.standing if self.depends(other, key)]
        if under:
            self.refuse(f"{key} is undone under {under}")
        if key in self.confirmed:
            self.refuse(f"{key} is undone twice")
        self.undoing.append(key)

    def begin(self, saga_id: str, key: str) -> None:
        undoing = [other for other in self.undoing if other.rpartition("/")[0] == saga_id]
        if undoing:
            self.refuse(f"{key} runs while {undoing} are being undone")
        self.running.append(key)

    def land(self, key: str, name: str) -> None:
        if self.landed.setdefault(key, name) != name:
            self.refuse(f"{key} is the key of {self.landed[key]} and of {name}")
        if key in self.standing:
            return
        if key in self.undone:
            self.refuse(f"{key} was undone, and is asked for once more")
        twice = [other for other, its in self.standing.items() if its == name]
        if twice and name not in self.several_stand:
            self.refuse(f"{key} is asked for while {twice} stand")
        self.standing[key] = name
        self.built_on[key] = dict(self.serving)
        self.log.append(f"+{key}")

    def undo(self, key: str, *, in_doubt: bool) -> None:
        if key not in self.standing:
            if not in_doubt and key not in self.undone:
                self.refuse(f"{key} is undone, and nothing of it stands")
            return
        del self.standing[key]
        self.undone.add(key)
        self.log.append(f"-{key}")

    def confirm(self, key: str) -> None:
        """Its compensation has said that it is undone; a process that dies now may not have recorded that."""
        self.confirmed.add(key)
        self.unsure.add(key)

    def by_hand(self, key: str) -> None:
        """A person undoes it."""
        del self.standing[key]
        self.undone.add(key)
        self.confirmed.add(key)
        self.log.append(f"hand -{key}")

    def within(self, saga_id: str, stage: str | None = None) -> list[str]:
        """The keys of what stands in a saga, or in one of its stages."""
        below = [key for key in self.standing if key.startswith(f"{saga_id}/")]
        place = saga_id.count("/") + 1
        return [key for key in below if stage is None or tokens(key)[place] == stage]


class Acting(CompensableStage):
    """What a leaf says happens."""

    records = False
    copes_with_doubt = False

    def __init__(self, world: FamilyWorld, name: str, leaf: Leaf) -> None:
        self.world, self.name, self.leaf = world, name, leaf
        if leaf.outcome == "hang":
            self.timeout = 3.0  # of this one alone

    async def execute(self, ctx: SagaContext) -> Any:
        world, leaf, key = self.world, self.leaf, ctx.idempotency_key
        outcome = leaf.outcome if leaf.times > 0 and not (self.idempotent and key in world.standing) else "ok"
        leaf.times -= 1
        world.begin(ctx.saga_id, key)
        try:
            if leaf.before:
                await elapse(leaf.before)
            if outcome == "ok" or leaf.lands:
                self.act(key)
                if self.records:
                    await ctx.record(key)
            if leaf.after:
                await elapse(leaf.after)
            return await conclude(self.name, outcome)
        finally:
            world.running.remove(key)

    def act(self, key: str) -> None:
        self.world.land(key, self.name)

    async def compensate(self, ctx: CompensationContext) -> None:
        world, leaf, key = self.world, self.leaf, ctx.forward_key
        world.begin_undo(ctx.saga_id, key)
        try:
            if leaf.undo_takes:
                await elapse(leaf.undo_takes)
            fails, leaf.undo_fails = leaf.undo_fails > 0, max(0, leaf.undo_fails - 1)
            if fails:
                raise CardDeclined(f"undoing {key} was declined")
            world.undo(key, in_doubt=self.copes_with_doubt)
            world.confirm(key)
        except asyncio.CancelledError:
            world.refusals.append(f"the compensation of {key} was interrupted")
            raise
        finally:
            world.undoing.remove(key)


class Asked(Acting):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return answer(self.world, self.leaf, ctx)


def answer(world: FamilyWorld, leaf: Leaf, ctx: CompensationContext) -> StageOutput | None:
    if leaf.unanswered:
        leaf.unanswered -= 1
        raise CardDeclined(f"nobody knows of {ctx.forward_key}")
    return StageOutput.ok(stage=ctx.stage_name, probed=True) if ctx.forward_key in world.standing else None


class Recording(Acting):
    records = True


class Sturdy(Acting):
    idempotent = True
    compensate_in_doubt = True
    copes_with_doubt = True


class WithFallback(Acting):
    async def fallback(self, ctx: SagaContext, failure: Failure) -> dict[str, Any]:
        return {"instead_of": self.name}


class Pivot(PivotStage):
    def __init__(self, world: FamilyWorld, name: str, leaf: Leaf) -> None:
        self.acting = Acting(world, name, leaf)
        if leaf.outcome == "hang":
            self.timeout = 3.0  # of this one alone

    async def execute(self, ctx: SagaContext) -> Any:
        return await self.acting.execute(ctx)


class AskedPivot(Pivot):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return answer(self.acting.world, self.acting.leaf, ctx)


class Plain:
    """It has no effect."""

    kind = StageKind.TRANSFORM

    def __init__(self, world: FamilyWorld, name: str, leaf: Leaf) -> None:
        self.name, self.leaf = name, leaf
        if leaf.outcome == "hang":
            self.timeout = 3.0

    async def execute(self, ctx: Any) -> Any:
        outcome = self.leaf.outcome if self.leaf.times > 0 else "ok"
        self.leaf.times -= 1
        if self.leaf.before:
            await elapse(self.leaf.before)
        return await conclude(self.name, outcome)


STAGES: Mapping[str, Any] = {
    "compensable": Acting,
    "asked": Asked,
    "recording": Recording,
    "sturdy": Sturdy,
    "fallback": WithFallback,
    "pivot": Pivot,
    "asked pivot": AskedPivot,
    "plain": Plain,
}


class NotAllWell(Exception):
    """What a stage raises whose sagas did not all come to their ends, or could not all be undone."""

    def __init__(self, report: SagaReport) -> None:
        self.past_pivot = report.past_pivot
        super().__init__(str(report))


def _unless_failed(report: SagaReport | BaseException) -> SagaReport:
    if isinstance(report, BaseException):
        raise report
    if not report.ok:
        raise NotAllWell(report)
    return report


class Several(CompensableStage):
    """Takes care of several sagas itself, as the docs say."""

    idempotent = True
    compensate_in_doubt = True
    compensation = Compensation(retry=Retry(attempts=1), timeout=None)

    def __init__(self, world: FamilyWorld, name: str, kin: Kin) -> None:
        self.world, self.name, self.kin = world, name, kin
        self.own = [(tree.pipeline(world), tree.policy) for tree in kin.trees]
        self.instead = [(tree.pipeline(world), tree.policy) for tree in kin.instead]
        self.pipelines = {pipeline.name: pipeline for pipeline, _ in (*self.own, *self.instead)}

    async def execute(self, ctx: SagaContext) -> Any:
        self.world.serve(ctx.saga_id, self.name, ())
        if self.kin.records:
            await ctx.record("sagas")
        reports = await self.run_each(ctx, self.own, goes_on=True)
        if self.kin.outcome != "ok" and self.kin.times > 0:
            self.kin.times -= 1
            return await conclude(self.name, self.kin.outcome)
        return self.giving(ctx.saga_id, reports)

    async def run_each(self, ctx: SagaContext, sagas: list[tuple[Pipeline, Policy]], *, goes_on: bool) -> list[SagaReport]:
        """The reports of sagas that all came to their ends."""
        left = {report.pipeline: report for report in await ctx.child_sagas() if report.status is not SagaStatus.COMPENSATED}

        async def go_on(pipeline: Pipeline, policy: Policy) -> SagaReport:
            if goes_on and pipeline.name in left:
                return await ctx.resume_saga(left[pipeline.name].saga_id, pipeline)
            return await ctx.run_saga(pipeline, policy=policy)

        if self.kin.at_once:
            reports = await asyncio.gather(*[go_on(*one) for one in sagas], return_exceptions=True)
            return [_unless_failed(report) for report in reports]
        return [_unless_failed(await go_on(*one)) for one in sagas]

    def giving(self, saga_id: str, reports: list[SagaReport]) -> dict[str, Any]:
        """An output for those that depend on it to build on."""
        sagas = [report.saga_id for report in reports]
        self.world.serve(saga_id, self.name, sagas)
        return {"sagas": sagas}

    async def compensate(self, ctx: CompensationContext) -> None:
        left = [report for report in await ctx.child_sagas() if report.status is not SagaStatus.COMPENSATED]
        undone = [await ctx.undo_saga(report.saga_id, self.pipelines[report.pipeline]) for report in reversed(left)]
        for report in undone:
            if report.past_pivot or not report.clean:
                raise NotAllWell(report)


class AskedSeveral(Several):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        left = [report for report in await ctx.child_sagas() if report.status is not SagaStatus.COMPENSATED]
        for report in left:
            if report.ended_at is None:
                await ctx.rest_saga(report.saga_id, self.pipelines[report.pipeline])
        left = [report for report in await ctx.child_sagas() if report.status is not SagaStatus.COMPENSATED]
        is_whole = {report.pipeline for report in left} == {pipeline.name for pipeline, _ in self.own}
        if left and not (is_whole and len(left) == len(self.own) and all(report.ok for report in left)):
            raise NotAllWell(left[-1])
        if not left:
            return None
        if not self.world.serving.get(f"{ctx.saga_id}/{self.name}"):
            self.world.serve(ctx.saga_id, self.name, [report.saga_id for report in left])
        return StageOutput.ok(sagas=[report.saga_id for report in left])


class WithOthersInstead(Several):
    async def fallback(self, ctx: SagaContext, failure: Failure) -> dict[str, Any]:
        self.world.serve(ctx.saga_id, self.name, ())
        reports = await self.run_each(ctx, self.instead, goes_on=self.kin.goes_on)
        if self.kin.instead_fails > 0:
            self.kin.instead_fails -= 1
            raise CardDeclined(f"nothing stands in for {self.name}")
        return self.giving(ctx.saga_id, reports)


def may_fall_back(tree: Tree, policies: list[Policy]) -> set[str]:
    """The stages whose dependents may stand on something else than their effects."""
    names = {name for name, leaf in tree.leaves().items() if leaf.kind == "fallback"}
    for policy in [*(member.policy for member in tree.family()), *policies]:
        if isinstance(policy, ContinueWithFallback):
            names |= policy.fallbacks.keys()
    return names
