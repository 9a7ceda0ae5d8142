"""A compensation that comes late to what was gone on with since undoes nothing that stands on it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal

import pytest
from stageflow.api import Pipeline, StageContext, StageOutput

from saga import (
    Compensation,
    CompensationContext,
    FailFast,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
    nested,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    EffectRecorded,
    FallbackUsed,
    SagaEnded,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageStarted,
    TurnReason,
)
from saga.failures import FailureKind
from saga.recovery.late import Late, news_of
from saga.recovery.state import SagaState
from tests.controlled import elapse, run
from tests.late import (
    INSTEAD,
    Deaf,
    Doubtful,
    Held,
    held,
    resumed_while_it_comes_late,
    settled_down,
)
from tests.test_ledger import BACK, FAILURE, OUTPUT, PATHS, RUNS_ON, STARTED
from tests.world import Script, World, nothing, scene


class Refunds(Deaf):
    """Its first refund is deaf, each other one is carried out at once."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.refunds = 0

    async def execute(self, ctx: SagaContext) -> Any:
        self.world.land("deaf")
        return StageOutput.ok(charged=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.refunds += 1
        self.undone_with.append(ctx.idempotency_key)
        if self.refunds == 1:
            await self._wait()
        if "deaf" in self.world.standing:
            self.world.undo("deaf")


IN_TIME = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1)))


def shipped(world: World, stage: Deaf, *outcomes: str, **more: Any) -> Pipeline:
    """deaf -> ship, which comes to these outcomes, one after another."""
    world.dependencies["ship"] = ("deaf",)
    script = Script(outcomes[0], then=outcomes[1:], **more)
    ship = scene({"ship": ()}, {"ship": script})[1].stages["ship"].runner
    ship.world = world  # type: ignore[union-attr] # it is one of the scene's
    return Pipeline(name="trip").with_stage("deaf", stage).with_stage("ship", ship, dependencies=("deaf",))


@pytest.mark.parametrize("verdict", ["kept", "undone"])
@pytest.mark.parametrize("kept_by", ["resumed", "settled"])
def test_a_compensation_that_comes_late_to_what_is_kept_since_waits_for_a_person(kept_by: str, verdict: str) -> None:
    """Promise 5: the charge was kept, and refunded; what depends on it had gone on."""
    world = World({"deaf": ()})

    async def main() -> Held:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "raise", "ok")
        coordinator = SagaCoordinator(IN_TIME)
        assert [*(await coordinator.run(pipeline, saga_id="s")).stuck] == ["deaf"]
        if kept_by == "resumed":
            await coordinator.resume("s", pipeline, forward=True)
        else:
            await coordinator.settle("s", "deaf", "kept", "they are happy with it")
        assert "deaf" in world.standing
        return await held(coordinator, stage, pipeline, verdict)

    went = run(main())

    assert went.before.status is (SagaStatus.COMPLETED if kept_by == "resumed" else SagaStatus.HALTED)
    assert went.before.stages["deaf"].state is StageState.KEPT
    assert went.late.status is SagaStatus.STUCK
    assert [*went.late.in_doubt] == ["deaf"]
    assert went.late.stages["deaf"].output == StageOutput.ok(charged="s/deaf")
    assert went.late.failures[-1].message.startswith(
        "the compensation of execution 1 (key 's/deaf') had been given up and completed late, "
        "when the saga had gone on with what it undoes: that may be gone. Look in the outside world"
    )
    assert went.undone_with == []
    assert went.settled.clean
    assert "deaf" not in world.standing
    # Asked to be undone meanwhile, it was, but for what is held.
    assert went.compensated.stages["ship"].state is (StageState.UNDONE if kept_by == "resumed" else StageState.FAILED)
    assert went.settled.status is (SagaStatus.HALTED if verdict == "kept" else SagaStatus.COMPENSATED)


@pytest.mark.parametrize(("verdict", "status"), [("kept", "completed"), ("undone", "halted")])
def test_a_saga_whose_late_compensation_was_settled_is_complete_or_can_be_run_once_more(verdict: str, status: str) -> None:
    world = World({"deaf": ()})

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "raise", "ok")
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        if verdict == "kept":
            world.land("deaf")
        return await coordinator.settle("s", "deaf", verdict, "looked"), await coordinator.resume("s", pipeline)

    settled, resumed = run(main())

    assert settled.status.value == status
    assert settled.clean
    assert resumed.status is SagaStatus.COMPLETED
    assert resumed.kept["deaf"].data == {"charged": "s/deaf" if verdict == "kept" else "s/deaf~2"}
    assert world.standing == {"deaf": 1, "ship": 1}


def test_a_compensation_that_comes_late_while_the_saga_goes_forward_turns_nothing_back() -> None:
    world = World({"deaf": ()})

    async def main() -> SagaReport:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "raise", "ok", before=20)
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        return await resumed_while_it_comes_late(coordinator, stage, pipeline)

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert report.cause is None
    assert [*report.in_doubt] == ["deaf"]
    assert world.standing == {"ship": 1}


@pytest.mark.parametrize("way", ["settled", "resumed"])
def test_a_compensation_that_comes_late_to_what_is_to_be_undone_has_undone_it(way: str) -> None:
    """Promise 2: it was undone a second time. Nothing has run on it meanwhile that still stands."""
    world = World({"deaf": ()})

    async def end(_: StageContext) -> StageOutput:
        return StageOutput.fail("no")

    async def main() -> tuple[Refunds, SagaReport]:
        stage = Refunds(world)
        pipeline = shipped(world, stage, "ok", undo_takes=20).with_stage("end", end, "work", dependencies=("ship",))
        coordinator = SagaCoordinator(IN_TIME.model_copy(update={"compensation": Compensation(timeout=30, retry=Retry(attempts=1))}))
        await coordinator.run(pipeline, saga_id="s")
        if way == "settled":
            await coordinator.settle("s", "deaf", "retry", "they answer again")
            stage.released.set()
            await settled_down()
            return stage, await coordinator.resume("s", pipeline)
        running = asyncio.create_task(coordinator.resume("s", pipeline, forward=True))
        while "ship" not in world.undoing:
            await elapse(1)
        stage.released.set()
        return stage, await running

    stage, report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert stage.undone_with == ["s/deaf/undo"]
    assert world.standing == {}


class RefundFails(Doubtful):
    """Its first refund, of which nobody knows whether it is needed, is refused."""

    async def compensate(self, ctx: CompensationContext) -> None:
        if ctx.attempt == 1:
            raise OSError
        await super().compensate(ctx)


def test_what_completes_late_when_it_could_not_be_undone_is_kept_with_what_runs_on_it_then() -> None:
    """Promise 1: it still counted as failed, and when all had completed it was undone under what had run on it."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = RefundFails(world)
        pipeline = shipped(world, stage, "ok")
        coordinator = SagaCoordinator(IN_TIME.model_copy(update={"timeout": 10}))
        reports = [await coordinator.run(pipeline, saga_id="s")]
        stage.released.set()
        await settled_down()
        reports.append(await coordinator.report("s"))
        return [*reports, await coordinator.resume("s", pipeline, forward=True)]

    first, late, resumed = run(main())

    assert [*first.stuck] == [*late.stuck] == ["deaf"]
    assert resumed.status is SagaStatus.COMPLETED
    assert [*resumed.kept] == ["deaf", "ship"]
    assert world.standing == {"deaf": 1, "ship": 1}


@pytest.mark.parametrize("ships_at", [1, 2])
def test_what_completes_late_when_it_could_not_be_undone_behind_its_fallback_is_undone_then(ships_at: int) -> None:
    """Also under what goes on only then: with what its fallback gave, as what it gave itself does not stand."""
    world = World({"deaf": ()})
    shipped_with: list[StageOutput | None] = []

    async def ship(ctx: SagaContext) -> StageOutput:
        shipped_with.append(ctx.inputs.get_output("deaf"))
        return StageOutput.ok() if len(shipped_with) == ships_at else StageOutput.fail("no")

    async def main() -> list[SagaReport]:
        stage = RefundFails(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage).with_stage("ship", ship, "work", dependencies=("deaf",))  # type: ignore[arg-type] # stageflow's Stage takes its own context
        coordinator = SagaCoordinator(INSTEAD.model_copy(update={"compensation": Compensation(retry=Retry(attempts=1))}))
        first = await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await coordinator.resume("s", pipeline, forward=True)]

    first, late, resumed = run(main())

    assert [*first.stuck] == [*late.stuck] == ["deaf"]
    assert resumed.status is SagaStatus.DEGRADED
    assert resumed.fallbacks == ("deaf",)
    assert shipped_with == [StageOutput.ok(seat=None)] * ships_at
    assert late.stages["deaf"].output == resumed.stages["deaf"].output == StageOutput.ok(seat=None)
    assert late.stages["deaf"].late_output == StageOutput.ok(seat="14A")
    assert world.standing == {}


class RepeatableRefundFails(RefundFails):
    idempotent = True


@pytest.mark.parametrize("on_failure", ["halt", "compensate"])
def test_what_completes_late_behind_its_fallback_when_its_turn_to_run_again_has_not_come_is_kept_or_undone_as_what_it_gave(
    on_failure: Literal["halt", "compensate"],
) -> None:
    """It was kept as what its fallback gave; whoever went forward then went on with that, and the saga was called complete."""
    world = World({"deaf": ()})
    shipped_with: list[StageOutput | None] = []
    reserved: list[StageOutput] = [StageOutput.ok(), StageOutput.fail("full"), StageOutput.ok()]

    async def reserve(_: SagaContext) -> StageOutput:
        return reserved.pop(0)

    async def ship(ctx: SagaContext) -> StageOutput:
        shipped_with.append(ctx.inputs.get_output("deaf"))
        return StageOutput.fail("no") if len(shipped_with) == 1 else StageOutput.ok()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = RepeatableRefundFails(world)
        pipeline = Pipeline(name="trip").with_stage("room", compensable(reserve, nothing)).with_stage("deaf", stage, dependencies=("room",))
        pipeline = pipeline.with_stage("ship", ship, "work", dependencies=("deaf",))  # type: ignore[arg-type] # stageflow's Stage takes its own context
        once = Compensation(retry=Retry(attempts=1), on_failure="continue")
        coordinator = SagaCoordinator(INSTEAD.model_copy(update={"compensation": once}))
        await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        going_on = coordinator.resume("s", pipeline, forward=True, policy=INSTEAD.model_copy(update={"on_failure": on_failure}))
        return await going_on, await coordinator.resume("s", pipeline, forward=True)

    late, resumed = run(main())

    assert late.stages["deaf"].output == StageOutput.ok(seat="14A")
    assert late.fallbacks == ()
    assert resumed.status is SagaStatus.COMPLETED
    assert shipped_with[1:] == [StageOutput.ok(seat="14A")]
    assert world.standing == {"deaf": 1}


class Partly(Doubtful):
    """It records a part of what it does, and is found by its probe once it has done the rest."""

    async def execute(self, ctx: SagaContext) -> Any:
        await ctx.record("a part")
        return await super().execute(ctx)

    async def probe(self, _: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(found=True) if "deaf" in self.world.standing else None


@pytest.mark.parametrize("forward", [False, True])
def test_what_comes_late_behind_its_fallback_when_a_part_of_it_was_undone_is_undone_too(forward: bool) -> None:
    """Or kept, and its fallback serves no more, by who goes forward."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Partly(world)
        pipeline = shipped(world, stage, "ok")
        coordinator = SagaCoordinator(INSTEAD)
        first = await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await coordinator.resume("s", pipeline, forward=forward)]

    first, late, resumed = run(main())

    assert (first.status, late.status) == (SagaStatus.DEGRADED, SagaStatus.STUCK)
    assert [*late.in_doubt] == ["deaf"]
    assert resumed.status is (SagaStatus.COMPLETED if forward else SagaStatus.DEGRADED)
    assert resumed.fallbacks == (() if forward else ("deaf",))
    assert resumed.stages["deaf"].output == (StageOutput.ok(found=True) if forward else StageOutput.ok(seat=None))
    assert world.standing == ({"deaf": 1, "ship": 1} if forward else {"ship": 1})


class InParts(Refunds):
    """Its first attempt charges a part and fails."""

    async def execute(self, ctx: SagaContext) -> Any:
        await ctx.record("a part")
        if ctx.attempt == 1:
            self.world.land("deaf")
            raise ValueError
        return StageOutput.ok(charged="all")


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_compensation_that_comes_late_to_what_has_run_again_waits_for_a_person(is_stuck: bool) -> None:
    """It may have undone what that gave as well, or not: also where that could not be undone itself."""
    world = World({"deaf": ()})

    class Fails(InParts):
        async def compensate(self, ctx: CompensationContext) -> None:
            if self.refunds:
                raise OSError
            await super().compensate(ctx)

    async def main() -> SagaReport:
        stage = Fails(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        if is_stuck:
            await coordinator.compensate("s", pipeline)
        stage.released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert report.stages["deaf"].attempts == 2
    assert report.stages["deaf"].state is (StageState.STUCK if is_stuck else StageState.IN_DOUBT)
    assert report.status is SagaStatus.STUCK
    assert report.failures[-1].kind is FailureKind.LATE


@pytest.mark.parametrize("then", ["ok", "cancel"])
def test_a_compensation_that_comes_late_of_an_execution_before_waits_for_a_person_if_anything_stands(
    then: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A person had said that nothing of that one stood: it may have undone what stands now, and else tells nothing new."""
    world = World({"deaf": ()})

    class Cancels(Refunds):
        async def execute(self, ctx: SagaContext) -> Any:
            if then == "cancel" and ctx.idempotency_key != "s/deaf":
                return StageOutput.cancel("enough")
            return await super().execute(ctx)

    async def main() -> SagaReport:
        stage = Cancels(world)
        pipeline = shipped(world, stage, "raise", "ok")
        coordinator = SagaCoordinator(IN_TIME)
        await coordinator.run(pipeline, saga_id="s")
        world.undo("deaf")
        await coordinator.settle("s", "deaf", "undone", "refunded by hand")
        await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert report.status is (SagaStatus.STUCK if then == "ok" else SagaStatus.CANCELLED)
    assert report.clean is (then == "cancel")
    assert "could not be recorded" not in caplog.text
    if then == "ok":
        assert "the compensation of execution 1 (key 's/deaf') had been given up and completed late, " in str(report)
        assert "when the saga had gone on with execution 2 (key 's/deaf~2')" in str(report)


def test_a_compensation_that_comes_late_after_what_it_undoes_has_come_late_may_have_come_before_it() -> None:
    """Promise 5: both had been given up; it found nothing, the charge landed, and it then said that it had undone it."""
    world = World({"deaf": ()})

    class BothDeaf(Doubtful):
        def __init__(self, world: World) -> None:
            super().__init__(world)
            self.may_answer = asyncio.Event()

        async def compensate(self, ctx: CompensationContext) -> None:
            assert "deaf" not in world.standing
            while not self.may_answer.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.may_answer.wait()

    async def main() -> list[SagaReport]:
        stage = BothDeaf(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(IN_TIME.model_copy(update={"timeout": 10}))
        reports = [await coordinator.run(pipeline, saga_id="s")]
        for event in (stage.released, stage.may_answer):
            event.set()
            await settled_down()
            reports.append(await coordinator.report("s"))
        world.undo("deaf")
        return [*reports, await coordinator.settle("s", "deaf", "undone", "refunded by hand")]

    first, landed, late, settled = run(main())

    assert [*first.stuck] == [*landed.stuck] == [*late.stuck] == ["deaf"]
    assert late.status is SagaStatus.STUCK
    assert late.failures[-1].kind is FailureKind.LATE
    assert settled.status is SagaStatus.COMPENSATED
    assert settled.clean


def test_a_stage_that_was_stuck_in_doubt_is_asked_again_when_what_is_within_it_is_settled() -> None:
    """It had landed before it came into question, and was taken for known: its probe's answer was refused as LedgerCorrupt."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Refunds(world)

        async def end(_: StageContext) -> StageOutput:
            await elapse(20)
            return StageOutput.fail("no")

        child = nested(Pipeline(name="inner").with_stage("deaf", stage), IN_TIME)
        trip = Pipeline(name="trip").with_stage("child", child).with_stage("end", end, "work", dependencies=("child",))
        coordinator = SagaCoordinator()
        reports = [await coordinator.run(trip, saga_id="s")]
        running = asyncio.create_task(coordinator.resume("s", trip, forward=True))
        await elapse(5)
        stage.released.set()
        reports.append(await running)
        world.land("deaf")
        reports.append(await coordinator.settle("s", "child/deaf", "kept", "charged again by hand"))
        return [*reports, await coordinator.resume("s", trip)]

    first, late, settled, resumed = run(main())

    assert [*first.stuck] == ["child", "child/deaf"]
    assert [*late.stuck] == ["child"]
    assert [*late.in_doubt] == ["child/deaf"]
    assert [*settled.in_doubt] == ["child"]
    assert resumed.status is SagaStatus.HALTED
    assert resumed.clean
    assert resumed.stages["child"].state is StageState.KEPT
    assert world.standing == {"deaf": 1}


UNDOES_LATE = CompensationCompleted(stage="a", late=True)


def test_a_compensation_that_comes_late_of_an_execution_before_undoes_nothing_of_one_that_is_to_be_undone() -> None:
    began_anew: list[AnyEvent] = [SagaEnded(status=SagaStatus.COMPENSATED), RUNS_ON, StageStarted(stage="a", attempt=1, execution=2)]
    path = [*PATHS[StageState.UNDONE], *began_anew, StageCompleted(stage="a", output=OUTPUT), BACK]
    before, current = (Late(UNDOES_LATE, execution=number, attempts=1, undo_attempts=1) for number in (1, 2))

    state = SagaState([STARTED, *path])

    assert isinstance(news_of(state, before), StageProbed)
    assert news_of(state, current) == UNDOES_LATE


def test_a_compensation_that_comes_late_to_what_was_undone_is_no_news_also_while_the_sagas_of_its_fallback_stand() -> None:
    used = FallbackUsed(stage="a", output=OUTPUT, source="stage", ran=("s/a",))
    left: list[AnyEvent] = [
        StageStarted(stage="a", attempt=1),
        EffectRecorded(stage="a", effect=1),
        StageFailed(stage="a", failure=FAILURE),
    ]
    undone: list[AnyEvent] = [SagaTurnedBack(reason=TurnReason.ORPHANS), *PATHS[StageState.UNDONE][-2:]]

    state = SagaState([STARTED, *left, used, *undone])

    assert news_of(state, Late(UNDOES_LATE, execution=1, attempts=1, undo_attempts=1)) is None
