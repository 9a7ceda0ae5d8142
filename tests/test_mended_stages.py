"""What stages offer may have changed while their saga was at rest: a probe that was added is asked, and the ledger says since when."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    GraphChanged,
    LedgerError,
    MisuseError,
    Policy,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
)
from saga.events import CompensationStarted, SagaResumed, SagaTurnedBack
from saga.graph import Graph
from saga.ledgers.sqlite import SQLiteLedger
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.world import World, scene

HALT = FailFast(on_failure="halt")


class Unsure(CompensableStage):
    """Has its effect, and then takes longer than it may; at its second attempt it sees that it has had it."""

    timeout = 1.0

    def __init__(self, world: World, *, lands: bool = True) -> None:
        self.world = world
        self.lands = lands

    async def execute(self, ctx: SagaContext) -> None:
        if ctx.attempt == 1 and self.lands:
            self.world.land("pay")
        if ctx.attempt == 1:
            await elapse(60)
        if "pay" not in self.world.standing:
            self.world.land("pay")

    async def compensate(self, ctx: CompensationContext) -> None:
        if "pay" in self.world.standing:
            self.world.undo("pay")


class Asked(Unsure):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok() if "pay" in self.world.standing else None


class AskedInVain(Unsure):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        raise ConnectionError


class Coping(Unsure):
    compensate_in_doubt = True


class Repeatable(Unsure):
    idempotent = True


class Replaced(Unsure):
    async def fallback(self, ctx: SagaContext, failure: Failure) -> StageOutput:
        return StageOutput.ok(instead=True)


def mended(before: type[Unsure], after: type[Unsure], policy: Policy, *, lands: bool = True) -> tuple[SagaCoordinator, World, Pipeline]:
    """a -> pay, which has run as it was before; and the pipeline as it is now."""
    world, pipeline = scene({"a": ()})
    world.dependencies["pay"] = ("a",)
    coordinator = SagaCoordinator(policy)
    stage = before(world, lands=lands)
    run(coordinator.run(pipeline.with_stage("pay", stage, dependencies=("a",)), saga_id="s"))
    return coordinator, world, pipeline.with_stage("pay", after(world, lands=lands), dependencies=("a",))


def recorded(coordinator: SagaCoordinator) -> list[Graph | None]:
    """What the events say of what the stages offer from there on."""
    return [event.graph for event in run(coordinator.ledger.read("s")) if isinstance(event, SagaResumed | SagaTurnedBack)]


@pytest.mark.parametrize("after", [Asked, Coping])
@pytest.mark.parametrize("lands", [True, False])
def test_a_stage_in_doubt_is_undone_by_the_means_that_it_was_given_since(after: type[Unsure], lands: bool) -> None:
    coordinator, world, pipeline = mended(Unsure, after, FailFast(), lands=lands)
    stuck = run(coordinator.report("s"))
    assert (stuck.status, list(stuck.in_doubt), list(stuck.blocked)) == (SagaStatus.STUCK, ["pay"], ["a"])

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    at_first, since = recorded(coordinator)
    assert at_first is None
    assert since is not None
    assert (since["pay"].can_probe, since["pay"].undo_in_doubt) == (after is Asked, after is Coping)
    assert run(coordinator.report("s")) == report


def test_what_is_undone_on_demand_is_undone_by_the_means_of_now() -> None:
    coordinator, world, pipeline = mended(Unsure, Asked, HALT)

    report = run(coordinator.compensate("s", pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+a", "+pay", "-pay", "-a"]
    assert [graph and graph["pay"].can_probe for graph in recorded(coordinator)] == [True]


@pytest.mark.parametrize("after", [Asked, Repeatable])
def test_a_stage_in_doubt_goes_on_by_the_means_that_it_was_given_since(after: type[Unsure]) -> None:
    coordinator, world, pipeline = mended(Unsure, after, HALT)

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+pay"]


def test_a_stage_in_doubt_that_a_fallback_stands_in_for_is_undone_by_the_means_that_it_was_given_since() -> None:
    """What came after it stands on the fallback, and stays."""
    world, pipeline = scene({"ship": ()})
    world.dependencies["pay"] = ()
    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks={"pay": {"instead": True}}))
    (ship,) = pipeline.stages.values()

    def trip(kind: type[Unsure]) -> Pipeline:
        return Pipeline().with_stage("pay", kind(world)).with_stage("ship", ship.runner, dependencies=("pay",))

    stuck = run(coordinator.run(trip(Unsure), saga_id="s"))
    assert (stuck.status, [*stuck.in_doubt], [*stuck.kept]) == (SagaStatus.STUCK, ["pay"], ["ship"])

    report = run(coordinator.resume("s", trip(Asked)))

    assert report.status is SagaStatus.DEGRADED
    assert [*report.kept] == ["pay", "ship"]
    assert world.log == ["+pay", "+ship", "-pay"]


def test_a_fallback_that_was_added_since_stands_in() -> None:
    coordinator, _, pipeline = mended(Unsure, Replaced, HALT)
    run(coordinator.settle("s", "pay", "retry", "it has a fallback now"))

    report = run(coordinator.resume("s", pipeline, policy=ContinueWithFallback(timeout=1)))

    assert report.stages["pay"].attempts == 2
    assert report.status is SagaStatus.COMPLETED


def test_means_that_are_gone_since_are_not_asked_for() -> None:
    coordinator, world, pipeline = mended(AskedInVain, Unsure, HALT)

    with pytest.raises(MisuseError, match="pay in doubt, without a probe and not idempotent"):
        run(coordinator.resume("s", pipeline))
    report = run(coordinator.compensate("s", pipeline))

    assert (report.status, list(report.in_doubt)) == (SagaStatus.HALTED, ["pay"])
    assert world.log == ["+a", "+pay"]


def killed_in_its_undoing(before: type[Unsure], world: World, pipeline: Pipeline) -> Dying:
    """The ledger of a -> pay, whose process died while pay was being undone in doubt."""
    ledger = Dying(6)
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(pipeline.with_stage("pay", before(world), dependencies=("a",)), saga_id="s"))
    assert isinstance(run(ledger.read("s"))[-1], CompensationStarted)
    ledger.forget_owners()
    ledger.left = 99
    return ledger


class Counted(Unsure):
    """Its compensation needs to know that it landed, and what it gave."""

    undone_with: StageOutput | None = None
    tries = 0

    async def compensate(self, ctx: CompensationContext) -> None:
        self.tries += 1
        self.undone_with = ctx.output
        await super().compensate(ctx)


class AskedAndCounted(Asked, Counted): ...


class AskedInVainAndCounted(AskedInVain, Counted): ...


@pytest.mark.parametrize("after", [Counted, AskedInVainAndCounted])
def test_a_compensation_that_copes_with_doubt_no_more_is_not_called_in_doubt_again(after: type[Counted]) -> None:
    world, pipeline = scene({"a": ()})
    ledger = killed_in_its_undoing(Coping, world, pipeline)
    stage = after(world)

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline.with_stage("pay", stage, dependencies=("a",))))

    assert stage.tries == 0
    assert (report.status, [*report.stuck], [*report.blocked]) == (SagaStatus.STUCK, ["pay"], ["a"])


def test_a_compensation_that_copes_with_doubt_no_more_is_told_what_the_probe_that_was_added_found() -> None:
    world, pipeline = scene({"a": ()})
    ledger = killed_in_its_undoing(Coping, world, pipeline)
    world.land("pay")
    stage = AskedAndCounted(world)

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline.with_stage("pay", stage, dependencies=("a",))))

    assert stage.undone_with == StageOutput.ok()
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_what_stages_offer_is_recorded_when_it_has_changed_and_only_then() -> None:
    coordinator, _, pipeline = mended(Unsure, Asked, FailFast())
    run(coordinator.resume("s", pipeline))

    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPENSATED
    assert [graph is None for graph in recorded(coordinator)] == [True, False]
    assert run(coordinator.resume("s", pipeline, forward=True)).status is SagaStatus.COMPENSATED

    assert [graph is None for graph in recorded(coordinator)] == [True, False, True, True]


def test_what_a_stage_is_may_not_have_changed() -> None:
    coordinator, world, pipeline = mended(Unsure, Asked, FailFast())
    _, other = scene({"a": ()}, {}, {"a": "pivot"})

    with pytest.raises(GraphChanged) as caught:
        run(coordinator.resume("s", other.with_stage("pay", Asked(world), dependencies=("a",))))

    assert caught.value.differences == ("stage 'a': role was 'compensable', is 'pivot'",)
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("going_on", ["resume", "compensate", "recover"])
def test_a_stage_that_the_policy_in_the_ledger_names_and_that_is_gone_is_a_change_of_the_graph(going_on: str) -> None:
    world, pipeline = scene({"a": (), "pay": ("a",)})
    ledger = Dying(2)
    policy = ContinueWithFallback(fallbacks={"pay": {"paid": False}})
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))
    ledger.forget_owners()
    ledger.left = 99
    coordinator = SagaCoordinator(ledger=ledger)
    other_world, other = scene({"a": (), "charge": ("a",)})
    before = run(ledger.read("s"))

    if going_on == "recover":
        refused = run(coordinator.recover({"scene": other})).failed["s"]
    else:
        with pytest.raises(MisuseError) as caught:
            run(getattr(coordinator, going_on)("s", other))
        refused = caught.value

    assert isinstance(refused, GraphChanged)
    assert refused.differences == ("stage 'pay' is gone", "stage 'charge' is new")
    assert run(ledger.read("s")) == before
    assert other_world.log == []
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+pay"]


def test_a_saga_whose_process_died_goes_on_by_the_means_of_now() -> None:
    world, pipeline = scene({"a": ()})
    ledger = Dying(3)
    old = pipeline.with_stage("pay", Unsure(world), dependencies=("a",))
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(old, saga_id="s"))
    assert world.log == ["+a", "+pay"]
    ledger.forget_owners()
    ledger.left = 99

    recovery = run(SagaCoordinator(FailFast(), ledger=ledger).recover(pipeline.with_stage("pay", Asked(world), dependencies=("a",))))

    assert recovery.reports["s"].status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+pay"]


def test_a_durable_ledger_reads_back_what_was_recorded(tmp_path: Path) -> None:
    async def main() -> tuple[SagaReport, SagaReport]:
        world, pipeline = scene({"a": ()})

        class Slow(Unsure):
            timeout = 0.01

            async def execute(self, ctx: SagaContext) -> None:
                self.world.land("pay")
                await asyncio.Event().wait()

        class SlowAsked(Slow, Asked):
            pass

        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            await SagaCoordinator(ledger=ledger).run(pipeline.with_stage("pay", Slow(world), dependencies=("a",)), saga_id="s")
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            now = pipeline.with_stage("pay", SlowAsked(world), dependencies=("a",))
            report = await SagaCoordinator(ledger=ledger).resume("s", now)
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            return report, await SagaCoordinator(ledger=ledger).report("s")

    resumed, read = asyncio.run(main())

    assert resumed.status is SagaStatus.COMPENSATED
    assert read == resumed
