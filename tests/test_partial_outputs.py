"""What plain stageflow leaves of a pipeline that fails, and what a saga gives instead.

Every test draws one pipeline and runs it twice, each time in a new world: first with `Pipeline.run`, then through
`SagaCoordinator`. It asserts what the caller is told and what stands in the world. The first section holds the hypotheses that
this library began with, the others the losses that were found on the way. `docs/explanation/partial-outputs.md` names each test.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from stageflow import UnifiedStageExecutionError
from stageflow.api import Pipeline, PipelineContext, PipelineResults, StageContext, StageKind, StageOutput, StageStatus
from stageflow.pipeline.dag import UnifiedPipelineCancelled
from stageflow.pipeline.guard_retry import GuardRetryPolicy, GuardRetryStrategy
from stageflow.pipeline.subpipeline import ChildRunTracker, SubpipelineSpawner

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    MisuseError,
    PipelineInvalid,
    PivotStage,
    Policy,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaFailed,
    SagaReport,
    SagaStatus,
    StageState,
    nested,
)


class CardDeclined(Exception):
    """What a bank says."""


class World:
    """What stands outside the process. It refuses to undo what isn't there, and what something that stands rests on.

    Attributes:
        effects: What stands, in the order in which it landed.
        given_back: The output that each compensation was handed, by stage.
        cut_short: The stages that were cancelled while their code ran.
        refusals: What the world refused; a saga would report it as just another failed compensation.
    """

    def __init__(self) -> None:
        self.effects: list[str] = []
        self.given_back: dict[str, Any] = {}
        self.cut_short: list[str] = []
        self.refusals: list[str] = []
        self._rests_on: dict[str, tuple[str, ...]] = {}
        self._gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def open(self, gate: str) -> None:
        self._gates[gate].set()

    async def opened(self, gate: str) -> None:
        await self._gates[gate].wait()

    def settle(self, stage: str, after: tuple[str, ...]) -> None:
        self._rests_on[stage] = after

    def land(self, effect: str) -> None:
        self.effects.append(effect)

    def undo(self, effect: str) -> None:
        above = [other for other in self.effects if effect in self._rests_on.get(other, ())]
        if effect not in self.effects or above:
            self.refusals.append(f"{effect} is undone, standing: {self.effects}")
            raise RuntimeError(self.refusals[-1])
        self.effects.remove(effect)


Act = Callable[[World, StageContext], Awaitable[Any]]
Shape = Callable[[World], Pipeline]


async def land(world: World, ctx: StageContext) -> StageOutput:
    """The effect lands, and the stage completes."""
    world.land(ctx.stage_name)
    return StageOutput.ok(booking=ctx.stage_name)


async def decline(_: World, __: StageContext) -> StageOutput:
    """Raises; no effect."""
    raise CardDeclined("no money")


async def report_failure(_: World, __: StageContext) -> StageOutput:
    """Returns FAIL, with data; no effect."""
    return StageOutput.fail("no money", data={"code": 51, "limit": 300})


async def cancel(_: World, __: StageContext) -> StageOutput:
    """Returns CANCEL, with data; no effect."""
    return StageOutput.cancel("no visa", data={"country": "US"})


def once(gate: str, act: Act, *, opens: str | None = None) -> Act:
    """The act, once the gate is open; it opens another one with its last breath."""

    async def waits(world: World, ctx: StageContext) -> Any:
        await world.opened(gate)
        if opens is not None:
            world.open(opens)
        return await act(world, ctx)

    return waits


def slow(act: Act, *, opens: str, until: str) -> Act:
    """The act, whose effect lands long before it returns."""

    async def acts(world: World, ctx: StageContext) -> Any:
        output = await act(world, ctx)
        world.open(opens)
        await world.opened(until)
        return output

    return acts


def opening(gate: str, act: Act) -> Act:
    """The act, and a gate opened before it."""

    async def acts(world: World, ctx: StageContext) -> Any:
        world.open(gate)
        return await act(world, ctx)

    return acts


class Step(CompensableStage):
    """A stage that does its act, and whose compensation undoes the effect of its name."""

    def __init__(self, world: World, name: str, act: Act = land, *, after: tuple[str, ...] = ()) -> None:
        self.world, self.name, self.act, self.after = world, name, act, after
        world.settle(name, after)

    async def execute(self, ctx: StageContext) -> Any:
        try:
            return await self.act(self.world, ctx)
        except asyncio.CancelledError:
            self.world.cut_short.append(self.name)
            raise

    async def compensate(self, ctx: CompensationContext) -> None:
        self.world.given_back[self.name] = None if ctx.output is None else ctx.output.data
        self.world.undo(self.name)


class Probed(Step):
    """A step that can be asked whether its effect landed."""

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(booking=self.name, probed=True) if self.name in self.world.effects else None


class Undaunted(Step):
    """A step whose compensation copes with not knowing."""

    compensate_in_doubt = True


class Stubborn(Step):
    """A step that can't be undone after all."""

    async def compensate(self, ctx: CompensationContext) -> None:
        raise CardDeclined("the bank is closed")


class Bell:
    """A plain stageflow stage without an effect, which opens the gate of its name."""

    kind = StageKind.TRANSFORM

    def __init__(self, world: World, name: str, *, after: tuple[str, ...] = ()) -> None:
        self.world, self.name, self.after = world, name, after

    async def execute(self, _: StageContext) -> StageOutput:
        self.world.open(self.name)
        return StageOutput.ok()


class Final(PivotStage):
    """The point of no return."""

    def __init__(self, world: World, name: str, *, after: tuple[str, ...] = ()) -> None:
        self.world, self.name, self.after = world, name, after

    async def execute(self, ctx: StageContext) -> StageOutput:
        return await land(self.world, ctx)


def drawn(*steps: Step | Bell | Final) -> Pipeline:
    pipeline = Pipeline(name="trip")
    for step in steps:
        pipeline = pipeline.with_stage(step.name, step, dependencies=step.after)
    return pipeline


@dataclass
class PlainRun:
    """What `Pipeline.run` came to.

    Attributes:
        world: Its world.
        results: What it returned, if it did.
        error: What it raised, if it did.
        still_running: The tasks of stages that run on although it has ended.
    """

    world: World
    results: PipelineResults | None
    error: BaseException | None
    still_running: set[asyncio.Task[Any]]

    async def run_on(self) -> None:
        """Let what is still running come to its end."""
        await asyncio.gather(*self.still_running, return_exceptions=True)

    @property
    def execution_error(self) -> UnifiedStageExecutionError:
        assert isinstance(self.error, UnifiedStageExecutionError)
        return self.error

    @property
    def cancellation(self) -> UnifiedPipelineCancelled:
        assert isinstance(self.error, UnifiedPipelineCancelled)
        return self.error


async def plainly(shape: Shape, context: PipelineContext | None = None) -> PlainRun:
    """Run the shape with plain stageflow, in a new world."""
    world, results, error = World(), None, None
    before = asyncio.all_tasks()
    try:
        results = await shape(world).run(context if context is not None else PipelineContext.create())
    except (Exception, asyncio.CancelledError) as raised:  # noqa: BLE001 - what it raises is what the tests are about
        error = raised
    return PlainRun(world, results, error, asyncio.all_tasks() - before)


async def as_saga(
    shape: Shape,
    policy: Policy | None = None,
    context: PipelineContext | None = None,
    meanwhile: Callable[[World], Awaitable[None]] | None = None,
) -> tuple[World, SagaReport]:
    """Run the shape as a saga, in a new world, which refuses nothing; no task outlives it."""
    world = World()
    before = asyncio.all_tasks()
    run = asyncio.create_task(SagaCoordinator(policy).run(shape(world), context))
    if meanwhile is not None:
        await meanwhile(world)
    report = await run
    assert world.refusals == []
    assert asyncio.all_tasks() == before
    return world, report


def data_of(outputs: dict[str, Any]) -> dict[str, Any]:
    """The data of outputs, by stage."""
    return {name: None if output is None else output.data for name, output in outputs.items()}


def answered(report: SagaReport, stage: str) -> dict[str, Any]:
    """The data of what a stage returned, whatever became of it."""
    output = report.stages[stage].output
    assert output is not None
    return output.data


# -- the hypotheses --------------------------------------------------------------------------------------------------


def test_fail_keeps_no_results_and_a_saga_keeps_every_one() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "hold_room", after=("hold_seat",)),
            Step(world, "charge_card", report_failure, after=("hold_room",)),
        )

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is None
        assert plain.execution_error.stage == "charge_card"
        assert not hasattr(plain.error, "results")
        assert plain.world.effects == ["hold_seat", "hold_room"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPENSATED
        assert data_of(report.undone) == {"hold_seat": {"booking": "hold_seat"}, "hold_room": {"booking": "hold_room"}}
        assert report.failed == ("charge_card",)
        assert report.cause is not None
        assert report.cause.kind is FailureKind.REPORTED
        assert world.effects == []

    asyncio.run(scenario())


def test_cancel_keeps_some_results_and_a_saga_keeps_every_one() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "hold_room", slow(land, opens="room held", until="room confirmed")),
            Step(world, "check_visa", once("room held", cancel, opens="visa refused"), after=("hold_seat",)),
        )

    async def confirm(world: World) -> None:
        await world.opened("visa refused")
        world.open("room confirmed")

    async def scenario() -> None:
        plain = await plainly(trip)

        assert data_of(plain.cancellation.results) == {
            "hold_seat": {"booking": "hold_seat"},
            "check_visa": {"cancel_reason": "no visa", "country": "US"},
        }
        assert plain.world.cut_short == ["hold_room"]
        assert sorted(plain.world.effects) == ["hold_room", "hold_seat"]

        world, report = await as_saga(trip, meanwhile=confirm)

        assert report.status is SagaStatus.CANCELLED
        assert data_of(report.kept) == {"hold_seat": {"booking": "hold_seat"}, "hold_room": {"booking": "hold_room"}}
        assert report.stages["check_visa"].state is StageState.CANCELLED
        assert answered(report, "check_visa")["country"] == "US"
        assert world.cut_short == []
        assert sorted(world.effects) == sorted(report.kept)

        world, report = await as_saga(trip, FailFast(on_cancel="compensate"), meanwhile=confirm)

        assert report.status is SagaStatus.COMPENSATED
        assert sorted(report.undone) == ["hold_room", "hold_seat"]
        assert world.effects == []

    asyncio.run(scenario())


def test_a_parallel_branchs_output_is_lost_on_failure_and_a_saga_keeps_it() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "hold_room", after=("hold_seat",)),
            # It runs only when stageflow has taken note of the room's output.
            Bell(world, "room noted", after=("hold_room",)),
            Step(world, "charge_card", once("room noted", decline), after=("hold_seat",)),
        )

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is None
        assert vars(plain.execution_error).keys() == {"stage", "original", "recoverable"}
        assert plain.world.effects == ["hold_seat", "hold_room"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPENSATED
        assert data_of(report.undone)["hold_room"] == {"booking": "hold_room"}
        assert world.effects == []

    asyncio.run(scenario())


def test_a_fan_in_failure_hides_its_inputs_outputs_and_a_saga_shows_them() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "hold_room"),
            Step(world, "hold_car"),
            Step(world, "charge_card", decline, after=("hold_seat", "hold_room", "hold_car")),
        )

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is None
        assert isinstance(plain.execution_error.original, CardDeclined)
        assert "hold" not in str(plain.error)
        assert sorted(plain.world.effects) == ["hold_car", "hold_room", "hold_seat"]

        world, report = await as_saga(trip)

        assert data_of(report.undone) == {name: {"booking": name} for name in ("hold_seat", "hold_room", "hold_car")}
        assert report.failed == ("charge_card",)
        assert report.kept == {}
        assert world.effects == []

    asyncio.run(scenario())


async def book_three_of_five(world: World, _: StageContext) -> StageOutput:
    seats = [f"seat {number}" for number in (1, 2, 3)]
    for seat in seats:
        world.land(seat)
    return StageOutput.ok(seats=seats, partial=True)


def test_ok_with_partial_true_is_a_plain_success_in_stageflow_and_in_a_saga_too() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(Step(world, "book_seats", book_three_of_five), Step(world, "print_tickets", after=("book_seats",)))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is not None
        assert plain.results["book_seats"].status is StageStatus.OK
        assert plain.results.failed() == []
        assert plain.world.effects == ["seat 1", "seat 2", "seat 3", "print_tickets"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPLETED
        assert report.stages["book_seats"].state is StageState.KEPT
        assert report.kept["book_seats"].data == {"seats": ["seat 1", "seat 2", "seat 3"], "partial": True}
        assert world.effects == ["seat 1", "seat 2", "seat 3", "print_tickets"]

    asyncio.run(scenario())


class BookSeats(CompensableStage):
    """Books seats one by one, records each where it can, and undoes those that it recorded."""

    name = "book_seats"
    after: tuple[str, ...] = ()

    def __init__(self, world: World) -> None:
        self.world = world

    async def execute(self, ctx: StageContext) -> StageOutput:
        for number in (1, 2, 3):
            self.world.land(f"seat {number}")
            if isinstance(ctx, SagaContext):
                await ctx.record(f"seat {number}")
        raise CardDeclined("no money for the fourth")

    async def compensate(self, ctx: CompensationContext) -> None:
        for seat in reversed(ctx.effects):
            self.world.undo(seat)


def test_what_a_stage_did_before_it_failed_is_lost_and_a_saga_undoes_what_was_recorded() -> None:
    def trip(world: World) -> Pipeline:
        return Pipeline(name="trip").with_stage("book_seats", BookSeats(world))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.execution_error.stage == "book_seats"
        assert plain.world.effects == ["seat 1", "seat 2", "seat 3"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPENSATED
        assert report.stages["book_seats"].effects == ("seat 1", "seat 2", "seat 3")
        assert report.undone == {"book_seats": None}
        assert report.failed == ("book_seats",)
        assert world.effects == []

    asyncio.run(scenario())


def test_the_execution_error_has_no_results_and_a_sagas_error_carries_the_report() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(Step(world, "hold_seat"), Step(world, "charge_card", decline, after=("hold_seat",)))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert not hasattr(plain.execution_error, "results")
        assert vars(plain.execution_error).keys() == {"stage", "original", "recoverable"}
        assert plain.execution_error.recoverable is False
        assert plain.world.effects == ["hold_seat"]

        world, report = await as_saga(trip)
        with pytest.raises(SagaFailed) as failed:
            report.raise_for_status()

        assert failed.value.report is report
        assert [type(error) for error in failed.value.exceptions] == [CardDeclined]
        assert data_of(failed.value.report.undone) == {"hold_seat": {"booking": "hold_seat"}}
        assert world.effects == []

    asyncio.run(scenario())


# -- the silent losses: what ends at the wrong moment -----------------------------------------------------------------


def test_a_stage_that_raises_cancels_its_sibling_mid_effect_and_a_saga_lets_it_end() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_room", slow(land, opens="room held", until="room confirmed")),
            Step(world, "charge_card", once("room held", decline, opens="declined")),
        )

    async def confirm(world: World) -> None:
        await world.opened("declined")
        world.open("room confirmed")

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.execution_error.stage == "charge_card"
        assert plain.world.cut_short == ["hold_room"]
        assert plain.world.effects == ["hold_room"]

        world, report = await as_saga(trip, meanwhile=confirm)

        assert world.cut_short == []
        assert data_of(report.undone) == {"hold_room": {"booking": "hold_room"}}
        assert world.effects == []

        world, report = await as_saga(trip, FailFast(in_flight="cancel"))

        assert world.cut_short == ["hold_room"]
        assert report.status is SagaStatus.STUCK
        assert data_of(report.in_doubt) == {"hold_room": None}
        assert world.effects == ["hold_room"]

    asyncio.run(scenario())


def test_fail_leaves_siblings_committing_after_run_has_raised_and_a_saga_drains_them() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_room", once("room free", land)),
            Step(world, "charge_card", opening("declined", report_failure)),
        )

    async def free_the_room(world: World) -> None:
        await world.opened("declined")
        world.open("room free")

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.execution_error.stage == "charge_card"
        assert plain.world.effects == []
        assert len(plain.still_running) > 0

        plain.world.open("room free")
        await plain.run_on()

        assert plain.world.effects == ["hold_room"]

        world, report = await as_saga(trip, meanwhile=free_the_room)

        assert report.status is SagaStatus.COMPENSATED
        assert data_of(report.undone) == {"hold_room": {"booking": "hold_room"}}
        assert world.effects == []

    asyncio.run(scenario())


def test_a_sibling_that_finishes_in_the_tick_of_a_failure_is_lost_and_a_saga_keeps_it() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat", once("now", land)),
            Step(world, "charge_card", once("now", decline)),
            Bell(world, "now"),
        )

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is None
        assert plain.world.cut_short == []
        assert plain.world.effects == ["hold_seat"]
        assert not plain.still_running

        world, report = await as_saga(trip)

        assert data_of(report.undone)["hold_seat"] == {"booking": "hold_seat"}
        assert world.effects == []

    asyncio.run(scenario())


def test_a_sibling_that_finishes_in_the_tick_of_a_cancel_may_be_missing_and_a_saga_never_misses_it() -> None:
    seats = [f"hold_seat_{number}" for number in range(8)]

    def trip(world: World) -> Pipeline:
        return drawn(
            *(Step(world, seat, once("now", land)) for seat in seats),
            Step(world, "check_visa", once("now", cancel)),
            Bell(world, "now"),
        )

    async def scenario() -> None:
        # stageflow goes through a set of tasks that are all done and stops at the CANCEL: which ones it has seen by then
        # differs from run to run. That the CANCEL comes last 50 times over is out of the question.
        runs = [await plainly(trip) for _ in range(50)]

        for plain in runs:
            assert plain.cancellation.stage == "check_visa"
            assert plain.world.effects == seats
            assert plain.world.cut_short == []
        assert any(set(seats) - plain.cancellation.results.keys() for plain in runs)

        for _ in range(20):
            world, report = await as_saga(trip)

            assert report.status is SagaStatus.CANCELLED
            assert report.kept.keys() >= set(seats)
            assert world.effects == seats

    asyncio.run(scenario())


def test_of_two_failures_in_one_tick_one_is_lost_and_a_saga_reports_both() -> None:
    async def overbooked(_: World, __: StageContext) -> StageOutput:
        raise LookupError("overbooked")

    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat", once("now", overbooked)),
            Step(world, "charge_card", once("now", decline)),
            Bell(world, "now"),
        )

    async def scenario() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        plain = await plainly(trip)

        error = plain.execution_error
        lost = "no money" if error.stage == "hold_seat" else "overbooked"
        told = [str(error), str(error.original), str(error.__cause__), str(error.__context__)]
        assert lost not in " ".join(told)
        assert not plain.still_running

        world, report = await as_saga(trip)

        assert {failure.stage for failure in report.failures} == {"hold_seat", "charge_card"}
        assert report.cause == report.failures[0]
        assert set(report.failed) == {"hold_seat", "charge_card"}
        assert world.effects == []

    asyncio.run(scenario())


def test_a_cancelled_caller_leaves_stages_running_and_a_saga_compensates_before_it_lets_go() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "hold_room", slow(land, opens="room held", until="room confirmed"), after=("hold_seat",)),
            Step(world, "charge_card", after=("hold_room",)),
        )

    async def scenario() -> None:
        world = World()
        before = asyncio.all_tasks()
        run = asyncio.create_task(trip(world).run(PipelineContext.create()))
        await world.opened("room held")
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

        still_running = asyncio.all_tasks() - before
        assert len(still_running) > 0
        world.open("room confirmed")
        await asyncio.gather(*still_running, return_exceptions=True)
        assert world.effects == ["hold_seat", "hold_room"]

        world, coordinator = World(), SagaCoordinator()
        saga = asyncio.create_task(coordinator.run(trip(world), saga_id="trip-7"))
        await world.opened("room held")
        saga.cancel()
        world.open("room confirmed")
        with pytest.raises(asyncio.CancelledError):
            await saga

        report = await coordinator.report("trip-7")
        assert report.status is SagaStatus.COMPENSATED
        assert report.cause is not None
        assert report.cause.kind is FailureKind.INTERRUPTED
        assert list(report.undone) == ["hold_seat", "hold_room"]
        assert report.not_run == ("charge_card",)
        assert world.effects == []

    asyncio.run(scenario())


def test_a_stage_that_times_out_may_have_landed_and_a_saga_says_in_doubt_or_asks() -> None:
    def trip(world: World, kind: type[Step] = Step) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            kind(world, "charge_card", slow(land, opens="charged", until="the bank answers"), after=("hold_seat",)),
        )

    async def scenario() -> None:
        plain = await plainly(trip, PipelineContext.create(data={"_timeout_ms": 10}))

        assert "timed out" in str(plain.execution_error.original)
        assert plain.world.effects == ["hold_seat", "charge_card"]

        world, report = await as_saga(trip, FailFast(timeout=0.01))

        assert report.status is SagaStatus.STUCK
        assert data_of(report.in_doubt) == {"charge_card": None}
        assert data_of(report.blocked) == {"hold_seat": {"booking": "hold_seat"}}
        assert world.effects == ["hold_seat", "charge_card"]

        world, report = await as_saga(lambda world: trip(world, Probed), FailFast(timeout=0.01))

        assert report.status is SagaStatus.COMPENSATED
        assert data_of(report.undone)["charge_card"] == {"booking": "charge_card", "probed": True}
        assert world.effects == []

        world, report = await as_saga(lambda world: trip(world, Undaunted), FailFast(timeout=0.01))

        assert report.status is SagaStatus.COMPENSATED
        assert report.undone["charge_card"] is None
        assert world.effects == []

    asyncio.run(scenario())


def test_a_stages_own_cancelled_error_looks_like_the_callers_cancel_and_a_saga_knows_better() -> None:
    async def give_up(_: World, __: StageContext) -> StageOutput:
        raise asyncio.CancelledError

    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "hold_room", once("room free", land)),
            Step(world, "charge_card", opening("given up", give_up), after=("hold_seat",)),
        )

    async def free_the_room(world: World) -> None:
        await world.opened("given up")
        world.open("room free")

    async def scenario() -> None:
        plain = await plainly(trip)

        assert type(plain.error) is asyncio.CancelledError
        assert plain.world.effects == ["hold_seat"]
        plain.world.open("room free")
        await plain.run_on()
        assert plain.world.effects == ["hold_seat", "hold_room"]

        world, report = await as_saga(trip, meanwhile=free_the_room)

        assert report.status is SagaStatus.COMPENSATED
        assert report.cause is not None
        assert (report.cause.stage, report.cause.kind) == ("charge_card", FailureKind.EXCEPTION)
        assert set(report.undone) == {"hold_seat", "hold_room"}
        assert world.effects == []

    asyncio.run(scenario())


# -- the silent losses: what a stage returned -------------------------------------------------------------------------


def test_the_data_of_a_fail_is_dropped_and_a_saga_keeps_it() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(Step(world, "hold_seat"), Step(world, "charge_card", report_failure, after=("hold_seat",)))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert type(plain.execution_error.original) is RuntimeError
        assert vars(plain.execution_error.original) == {}
        assert plain.execution_error.original.args == ("no money",)
        assert plain.world.effects == ["hold_seat"]

        world, report = await as_saga(trip)

        assert answered(report, "charge_card") == {"code": 51, "limit": 300}
        assert world.effects == []

    asyncio.run(scenario())


def test_retry_is_treated_as_completed_and_a_saga_tries_again_or_fails() -> None:
    async def try_later(world: World, ctx: StageContext) -> StageOutput:
        if isinstance(ctx, SagaContext) and ctx.attempt > 1:
            return await land(world, ctx)
        return StageOutput.retry("the bank is busy")

    def trip(world: World) -> Pipeline:
        return drawn(Step(world, "charge_card", try_later), Step(world, "send_ticket", after=("charge_card",)))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is not None
        assert plain.results["charge_card"].status is StageStatus.RETRY
        assert plain.results.ok("send_ticket")
        assert plain.results.failed() == []
        assert plain.world.effects == ["send_ticket"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPENSATED
        assert report.failed == ("charge_card",)
        assert report.not_run == ("send_ticket",)
        assert world.effects == []

        world, report = await as_saga(trip, FailFast(retry=Retry(attempts=2, wait=0)))

        assert report.status is SagaStatus.COMPLETED
        assert report.stages["charge_card"].attempts == 2
        assert world.effects == ["charge_card", "send_ticket"]

    asyncio.run(scenario())


def test_a_skip_does_not_cascade_in_stageflow_nor_in_a_saga_which_names_it() -> None:
    async def no_bag(_: World, __: StageContext) -> StageOutput:
        return StageOutput.skip("no bag")

    def trip(world: World) -> Pipeline:
        pipeline = drawn(Step(world, "weigh_bag", no_bag), Step(world, "load_bag", after=("weigh_bag",)))
        return pipeline.with_stage("tag_bag", Step(world, "tag_bag"), dependencies=("weigh_bag",), conditional=True)

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is not None
        assert plain.results["weigh_bag"].status is StageStatus.SKIP
        assert plain.results.ok("load_bag")
        # Not even a conditional stage is skipped: it looks for `skip_reason` in the data, and skip() writes `reason`.
        assert plain.results.ok("tag_bag")
        assert sorted(plain.world.effects) == ["load_bag", "tag_bag"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPLETED
        assert report.skipped == ("weigh_bag",)
        assert report.stages["weigh_bag"].skip_reason == "no bag"
        assert set(report.kept) == {"load_bag", "tag_bag"}
        assert sorted(world.effects) == ["load_bag", "tag_bag"]

    asyncio.run(scenario())


def test_a_conditional_stage_is_skipped_without_a_word_and_a_saga_says_why() -> None:
    async def no_bag(_: World, __: StageContext) -> StageOutput:
        return StageOutput.skip("no bag", data={"skip_reason": "no bag"})

    def trip(world: World) -> Pipeline:
        pipeline = drawn(Step(world, "weigh_bag", no_bag))
        pipeline = pipeline.with_stage("tag_bag", Step(world, "tag_bag"), dependencies=("weigh_bag",), conditional=True)
        return pipeline.with_stage("load_bag", Step(world, "load_bag"), dependencies=("tag_bag",))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is not None
        assert plain.results["tag_bag"].status is StageStatus.SKIP
        assert plain.results.failed() == []
        assert plain.world.effects == ["load_bag"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPLETED
        assert report.skipped == ("weigh_bag", "tag_bag")
        assert report.stages["tag_bag"].skip_reason == "no bag"
        assert world.effects == ["load_bag"]

    asyncio.run(scenario())


async def the_answer(_: World, __: StageContext) -> Any:
    return 42


async def a_list_as_data(_: World, __: StageContext) -> Any:
    return StageOutput.ok(data=["seat 1"])  # type: ignore[arg-type] # what a stage without type checks may return


@pytest.mark.parametrize(("mistake", "raised"), [(the_answer, UnifiedStageExecutionError), (a_list_as_data, AttributeError)])
def test_a_wrong_return_type_leaves_siblings_running_and_a_saga_drains_them(mistake: Act, raised: type[Exception]) -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_room", once("room free", land)),
            Step(world, "charge_card", opening("charged", mistake)),
        )

    async def free_the_room(world: World) -> None:
        await world.opened("charged")
        world.open("room free")

    async def scenario() -> None:
        plain = await plainly(trip)

        assert type(plain.error) is raised
        assert plain.world.effects == []
        plain.world.open("room free")
        await plain.run_on()
        assert plain.world.effects == ["hold_room"]

        world, report = await as_saga(trip, meanwhile=free_the_room)

        assert report.status is SagaStatus.COMPENSATED
        assert report.cause is not None
        assert report.cause.kind is FailureKind.CONTRACT
        assert set(report.undone) == {"hold_room"}
        assert world.effects == []

    asyncio.run(scenario())


def test_an_effect_that_lands_before_its_stage_fails_stands_unless_a_saga_can_ask() -> None:
    async def charge_and_jam(world: World, ctx: StageContext) -> StageOutput:
        world.land(ctx.stage_name)
        raise CardDeclined("the receipt printer jams")

    def trip(world: World, kind: type[Step] = Step) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Bell(world, "seat held", after=("hold_seat",)),
            kind(world, "charge_card", charge_and_jam, after=("seat held",)),
        )

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.execution_error.stage == "charge_card"
        assert plain.world.effects == ["hold_seat", "charge_card"]

        # By contract a stage that raises has had no effect, and a saga takes it at its word ...
        world, report = await as_saga(trip)

        assert report.status is SagaStatus.COMPENSATED
        assert report.stages["charge_card"].state is StageState.FAILED
        assert world.effects == ["charge_card"]

        # ... unless the stage has a probe, or has recorded what it did.
        world, report = await as_saga(lambda world: trip(world, Probed))

        assert report.status is SagaStatus.COMPENSATED
        assert report.failed == ("charge_card",)
        assert set(report.undone) == {"hold_seat", "charge_card"}
        assert world.effects == []

    asyncio.run(scenario())


def test_a_plain_def_fails_after_its_effect_and_a_saga_refuses_it_before_anything_runs() -> None:
    def trip(world: World) -> Pipeline:
        def charge_card(ctx: StageContext) -> StageOutput:
            world.land(ctx.stage_name)
            return StageOutput.ok()

        pipeline = drawn(Step(world, "hold_seat"))
        return pipeline.with_stage("charge_card", charge_card, "work", dependencies=("hold_seat",))  # type: ignore[arg-type] # the mistake

    async def scenario() -> None:
        plain = await plainly(trip)

        assert isinstance(plain.execution_error.original, TypeError)
        assert plain.world.effects == ["hold_seat", "charge_card"]

        world = World()
        with pytest.raises(PipelineInvalid, match="expected an async execute, for stage 'charge_card'"):
            await SagaCoordinator().run(trip(world))

        assert world.effects == []

    asyncio.run(scenario())


def test_a_later_stage_changes_an_earlier_stages_output_and_a_sagas_copy_stays() -> None:
    async def price(world: World, ctx: StageContext) -> StageOutput:
        world.land(ctx.stage_name)
        return StageOutput.ok(price=300)

    async def give_it_away(ctx: StageContext) -> StageOutput:
        seat = ctx.inputs.get_output("hold_seat")
        assert seat is not None
        seat.data["price"] = 0
        return StageOutput.ok()

    async def read_the_price(_: World, ctx: StageContext) -> StageOutput:
        return StageOutput.cancel("too cheap", data={"price": ctx.inputs.get_from("hold_seat", "price")})

    def trip(world: World) -> Pipeline:
        pipeline = drawn(Step(world, "hold_seat", price)).with_stage("discount", give_it_away, "work", dependencies=("hold_seat",))
        charge = Step(world, "charge_card", read_the_price)
        return pipeline.with_stage("charge_card", charge, dependencies=("hold_seat", "discount"))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.cancellation.results["hold_seat"].data == {"price": 0}
        assert plain.cancellation.results["charge_card"].data["price"] == 0
        assert plain.world.effects == ["hold_seat"]

        world, report = await as_saga(trip)

        # stageflow still hands the changed output to the stages that come later; only the record of it is safe.
        assert report.kept["hold_seat"].data == {"price": 300}
        assert answered(report, "charge_card")["price"] == 0
        assert world.effects == ["hold_seat"]

        world, report = await as_saga(trip, FailFast(on_cancel="compensate"))

        assert report.status is SagaStatus.COMPENSATED
        assert world.given_back == {"hold_seat": {"price": 300}}
        assert world.effects == []

    asyncio.run(scenario())


# -- the silent losses: what stageflow's own helpers do ---------------------------------------------------------------


def test_an_idempotency_key_answers_for_stages_that_never_ran_and_a_saga_runs_them() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"), Step(world, "hold_room", after=("hold_seat",)), Step(world, "charge_card", after=("hold_room",))
        )

    async def scenario() -> None:
        plain = await plainly(trip, PipelineContext.create(data={"idempotency_key": "trip-7"}))

        assert plain.results is not None
        assert [plain.results.ok(name) for name in ("hold_seat", "hold_room", "charge_card")] == [True, True, True]
        assert plain.results["hold_room"].data == {"booking": "hold_seat"}
        assert plain.results["charge_card"].data == {}
        assert plain.world.effects == ["hold_seat"]

        world, report = await as_saga(trip, context=PipelineContext.create(data={"idempotency_key": "trip-7"}))

        assert report.status is SagaStatus.COMPLETED
        assert report.kept["charge_card"].data == {"booking": "charge_card"}
        assert world.effects == ["hold_seat", "hold_room", "charge_card"]

    asyncio.run(scenario())


def test_a_guard_retry_forgets_the_first_output_and_a_saga_refuses_it() -> None:
    strategy = GuardRetryStrategy({"check_seat": GuardRetryPolicy(retry_stage="hold_seat", max_attempts=2)})

    async def hold_another(world: World, _: StageContext) -> StageOutput:
        world.land(f"seat {len(world.effects) + 1}")
        return StageOutput.ok(seat=world.effects[-1])

    async def by_the_window(_: World, ctx: StageContext) -> StageOutput:
        seat = ctx.inputs.get_from("hold_seat", "seat")
        return StageOutput.ok() if seat == "seat 2" else StageOutput.fail("an aisle seat")

    def trip(world: World) -> Pipeline:
        check = Step(world, "check_seat", by_the_window)
        return drawn(Step(world, "hold_seat", hold_another)).with_stage("check_seat", check, "guard", dependencies=("hold_seat",))

    async def scenario() -> None:
        world = World()
        results = await trip(world).run(PipelineContext.create(), guard_retry_strategy=strategy)

        assert results["hold_seat"].data == {"seat": "seat 2"}
        assert world.effects == ["seat 1", "seat 2"]

        world = World()
        with pytest.raises(MisuseError, match="expected no guard_retry_strategy"):
            await SagaCoordinator().run(trip(world), guard_retry_strategy=strategy)

        assert world.effects == []

    asyncio.run(scenario())


def test_a_subpipelines_failure_is_a_success_of_its_parent_and_a_nested_sagas_is_not() -> None:
    def hotel(world: World) -> Pipeline:
        return drawn(Step(world, "hold_room"), Step(world, "pay_deposit", decline, after=("hold_room",)))

    def trip(world: World) -> Pipeline:
        async def book_hotel(_: World, ctx: StageContext) -> StageOutput:
            spawner = SubpipelineSpawner(ChildRunTracker(), emit_events=False)
            child = await spawner.spawn("hotel", PipelineContext.create(), uuid4(), ctx.stage_name, hotel(world).run)
            assert (child.success, child.data) == (False, None)
            return StageOutput.ok()

        return drawn(Step(world, "hold_seat"), Step(world, "book_hotel", book_hotel, after=("hold_seat",)))

    def nested_trip(world: World) -> Pipeline:
        pipeline = drawn(Step(world, "hold_seat"))
        return pipeline.with_stage("book_hotel", nested(hotel(world)), dependencies=("hold_seat",))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is not None
        assert plain.results.ok("book_hotel")
        assert plain.world.effects == ["hold_seat", "hold_room"]

        world, coordinator = World(), SagaCoordinator()
        report = await coordinator.run(nested_trip(world), saga_id="trip-7")
        child = await coordinator.report("trip-7/book_hotel")

        assert report.status is SagaStatus.COMPENSATED
        assert report.failed == ("book_hotel",)
        assert data_of(child.undone) == {"hold_room": {"booking": "hold_room"}}
        assert world.effects == []

    asyncio.run(scenario())


# -- what plain stageflow has no answer to ----------------------------------------------------------------------------


def test_a_compensation_that_fails_is_stuck_and_names_what_it_holds_back() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "hold_room"),
            Stubborn(world, "pay_deposit", after=("hold_room",)),
            Step(world, "charge_card", decline, after=("hold_seat", "pay_deposit")),
        )

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.execution_error.stage == "charge_card"
        assert sorted(plain.world.effects) == ["hold_room", "hold_seat", "pay_deposit"]

        world, report = await as_saga(trip, FailFast(compensation=Compensation(retry=Retry(attempts=1))))

        assert report.status is SagaStatus.STUCK
        assert data_of(report.stuck) == {"pay_deposit": {"booking": "pay_deposit"}}
        assert data_of(report.blocked) == {"hold_room": {"booking": "hold_room"}}
        assert data_of(report.undone) == {"hold_seat": {"booking": "hold_seat"}}
        assert [failure.stage for failure in report.failures] == ["charge_card", "pay_deposit"]
        assert world.effects == ["hold_room", "pay_deposit"]

    asyncio.run(scenario())


def test_what_lies_before_the_point_of_no_return_is_kept() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Final(world, "issue_ticket", after=("hold_seat",)),
            Step(world, "hold_room"),
            Step(world, "charge_card", decline, after=("issue_ticket", "hold_room")),
        )

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is None
        assert sorted(plain.world.effects) == ["hold_room", "hold_seat", "issue_ticket"]

        world, report = await as_saga(trip)

        assert report.status is SagaStatus.HALTED
        assert set(report.kept) == {"hold_seat", "issue_ticket"}
        assert set(report.undone) == {"hold_room"}
        assert sorted(world.effects) == ["hold_seat", "issue_ticket"]

    asyncio.run(scenario())


def test_a_halted_saga_keeps_every_output_and_can_be_undone_later() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(Step(world, "hold_seat"), Step(world, "charge_card", decline, after=("hold_seat",)))

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.results is None
        assert plain.world.effects == ["hold_seat"]

        world, coordinator = World(), SagaCoordinator(FailFast(on_failure="halt"))
        pipeline = trip(world)
        halted = await coordinator.run(pipeline, saga_id="trip-7")

        assert halted.status is SagaStatus.HALTED
        assert data_of(halted.kept) == {"hold_seat": {"booking": "hold_seat"}}
        assert world.effects == ["hold_seat"]

        report = await coordinator.compensate("trip-7", pipeline)

        assert report.status is SagaStatus.COMPENSATED
        assert set(report.undone) == {"hold_seat"}
        assert world.effects == []

    asyncio.run(scenario())


def test_one_failed_branch_ends_the_others_and_a_saga_can_go_on_without_it() -> None:
    def trip(world: World) -> Pipeline:
        return drawn(
            Step(world, "hold_seat"),
            Step(world, "send_ticket", opening("sending", once("mail is open", land)), after=("hold_seat",)),
            Step(world, "hold_car", once("sending", decline, opens="car refused")),
            Step(world, "insure_car", after=("hold_car",)),
        )

    async def open_the_mail(world: World) -> None:
        await world.opened("car refused")
        world.open("mail is open")

    async def scenario() -> None:
        plain = await plainly(trip)

        assert plain.execution_error.stage == "hold_car"
        assert plain.world.cut_short == ["send_ticket"]
        assert plain.world.effects == ["hold_seat"]

        world, report = await as_saga(trip, ContinueWithFallback(without_fallback="skip_branch"), meanwhile=open_the_mail)

        assert report.status is SagaStatus.DEGRADED
        assert set(report.kept) == {"hold_seat", "send_ticket"}
        assert report.failed == ("hold_car",)
        assert report.skipped == ("insure_car",)
        assert sorted(world.effects) == ["hold_seat", "send_ticket"]

    asyncio.run(scenario())
