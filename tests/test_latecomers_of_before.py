"""What comes late of a stage that has run in another execution since waits for a person."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from stageflow.api import Pipeline, StageOutput, StageStatus

from saga import (
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Policy,
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
    FallbackUsed,
    SagaEnded,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageStarted,
)
from saga.failures import Failure, FailureKind
from saga.recovery.late import Late, news_of
from saga.recovery.state import SagaState
from tests.controlled import elapse, run
from tests.late import (
    LOSS,
    PROMPT,
    Deaf,
    DeafByKey,
    DeafPivot,
    DeniedByProbe,
    Doubtful,
    Held,
    Stays,
    held,
    lost,
    nested_in,
    resumed_while_it_comes_late,
    settled_down,
)
from tests.test_ledger import OUTPUT, PATHS, RUNS_ON, STARTED
from tests.world import Script, World, nothing, scene


class Again(Doubtful):
    """Its first execution is deaf, each other one comes to `then` at once. Each has its effect under its own key."""

    def __init__(self, world: World, then: str = "ok") -> None:
        super().__init__(world)
        self.then = then
        self.refunds_fail = False

    async def execute(self, ctx: SagaContext) -> StageOutput:
        if ctx.idempotency_key == "s/deaf":
            await self._wait()
        elif self.then == "raise":
            raise ValueError
        elif self.then != "ok":
            return StageOutput(status=StageStatus(self.then))
        self.world.land(ctx.idempotency_key)
        return StageOutput.ok(charged=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.refunds_fail:
            raise OSError
        self.undone_with.append(ctx.forward_key)
        if ctx.forward_key in self.world.standing:
            self.world.undo(ctx.forward_key)


class AgainAskable(Again):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        if ctx.forward_key == "s/deaf" and not self.released.is_set():
            raise OSError
        self.undone_with.append(f"asked {ctx.forward_key}")
        return StageOutput.ok(found=True) if ctx.forward_key in self.world.standing else None


INSTEAD_OF_IT = ContinueWithFallback(timeout=10, cancel_grace=2, fallbacks={"deaf": {"charged": None}})


@pytest.mark.parametrize("kind", [Again, AgainAskable])
@pytest.mark.parametrize(
    ("then", "policy", "before", "late", "undone", "kept"),
    [
        ("ok", PROMPT, "completed", "stuck", "halted", "completed"),
        ("skip", PROMPT, "completed", "stuck", "completed", "completed"),
        ("cancel", PROMPT, "cancelled", "halted", "cancelled", "cancelled"),
        ("cancel", PROMPT.model_copy(update={"on_cancel": "compensate"}), "compensated", "stuck", "compensated", "halted"),
        ("raise", PROMPT, "compensated", "stuck", "compensated", "halted"),
        ("raise", PROMPT.model_copy(update={"on_failure": "halt"}), "halted", "halted", "halted", "halted"),
        ("raise", INSTEAD_OF_IT, "degraded", "stuck", "degraded", "degraded"),
    ],
)
@pytest.mark.parametrize("verdict", ["undone", "kept"])
def test_what_comes_late_of_an_execution_before_waits_for_a_person(
    kind: type[Again], then: str, policy: Policy, before: str, late: str, undone: str, kept: str, verdict: str
) -> None:
    """Promise 5: it stands under a key that nothing would be undone with, or asked for, and the saga was compensated, or completed."""
    world = World({"deaf": ()})

    def put_right() -> None:
        for key in [*world.standing]:
            if verdict == "undone" or key == "s/deaf":
                world.undo(key)

    async def main() -> Held:
        stage = kind(world, then)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True, policy=policy)
        return await held(coordinator, stage, pipeline, verdict, put_right)

    went = run(main())

    assert went.before.status.value == before
    assert went.late.status.value == late
    assert [*went.late.in_doubt] == ["deaf"]
    assert not went.late.clean
    assert went.late.stages["deaf"].late_output == StageOutput.ok(charged="s/deaf")
    assert went.late.stages["deaf"].output == went.before.stages["deaf"].output
    question = went.late.failures[-1]
    assert (question.stage, question.kind) == ("deaf", FailureKind.LATE)
    assert question.message.startswith(
        "execution 1 (key 's/deaf') had been given up and completed late, when the saga had gone on with execution 2 (key 's/deaf~2'): "
        "what it did may stand, and nothing undoes it. Look in the outside world"
    )
    assert question.message in str(went.late)
    assert "saga settle s deaf undone" in str(went.late)
    assert went.undone_with == []
    assert went.compensated.in_doubt.keys() == {"deaf"}
    assert went.settled.clean
    assert went.settled.status.value == (undone if verdict == "undone" else kept)
    assert world.standing == ({"s/deaf~2": 1} if then == "ok" and verdict == "kept" else {})


@pytest.mark.parametrize("verdict", ["undone", "kept"])
@pytest.mark.parametrize("refunds_fail", [False, True])
def test_what_comes_late_of_an_execution_before_waits_for_a_person_also_when_the_one_after_was_to_be_undone(
    refunds_fail: bool, verdict: str
) -> None:
    world = World({"a": (), "deaf": ("a",)})

    async def main() -> Held:
        stage = Again(world)
        a = scene({"a": ()})[1].stages["a"].runner
        pipeline = Pipeline(name="trip").with_stage("a", a).with_stage("deaf", stage, dependencies=("a",))
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"compensation": Compensation(retry=Retry(attempts=1))}))
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        stage.refunds_fail = refunds_fail
        await coordinator.compensate("s", pipeline)
        return await held(coordinator, stage, pipeline, verdict)

    went = run(main())

    assert went.before.status is (SagaStatus.STUCK if refunds_fail else SagaStatus.COMPENSATED)
    assert went.late.stages["deaf"].state is (StageState.STUCK if refunds_fail else StageState.IN_DOUBT)
    assert went.late.status is SagaStatus.STUCK
    assert went.late.failures[-1].kind is FailureKind.LATE
    assert went.late.failures[-1].message in str(went.late)
    assert went.undone_with == []
    assert went.settled.stages["deaf"].state is (StageState.UNDONE if verdict == "undone" else StageState.KEPT)
    assert went.settled.status is (SagaStatus.HALTED if verdict == "kept" else SagaStatus.STUCK if refunds_fail else SagaStatus.COMPENSATED)


@pytest.mark.parametrize("end", ["ok", "raise"])
def test_what_comes_late_of_an_execution_before_while_the_saga_is_alive_turns_it_nowhere_and_holds_back_what_it_depends_on(
    end: str,
) -> None:
    world, others = scene({"a": (), "slow": ("a",)}, {"slow": Script("ok", before=20, then=(end,))})
    world.dependencies["deaf"] = ("a",)

    async def main() -> SagaReport:
        stage = Again(world)
        pipeline = others.with_stage("deaf", stage, dependencies=("a",))
        coordinator = SagaCoordinator(FailFast(cancel_grace=2))
        stage.timeout = 10  # of this one alone
        await coordinator.run(pipeline, saga_id="s")
        return await resumed_while_it_comes_late(coordinator, stage, pipeline)

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert [*report.in_doubt] == ["deaf"]
    assert report.failures[-1].kind is FailureKind.LATE
    assert report.stages["slow"].state is (StageState.KEPT if end == "ok" else StageState.FAILED)
    assert report.stages["a"].state is (StageState.KEPT if end == "ok" else StageState.BLOCKED)
    assert (report.cause and report.cause.kind) is (None if end == "ok" else FailureKind.EXCEPTION)
    assert world.standing.keys() == {"a", "s/deaf", "s/deaf~2", *(["slow"] if end == "ok" else [])}
    assert world.refusals == []


def test_what_comes_late_of_an_attempt_that_another_one_has_cancelled_waits_for_a_person() -> None:
    """It is the same execution, and a word of that one's own says that it has had no effect."""
    world = World({"deaf": ()})

    class Cancels(Deaf):
        idempotent = True

        async def execute(self, ctx: SagaContext) -> Any:
            return await super().execute(ctx) if ctx.attempt == 1 else StageOutput.cancel("enough")

    async def main() -> Held:
        stage = Cancels(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        return await held(coordinator, stage, pipeline, "undone", lambda: world.undo("deaf"))

    went = run(main())

    assert went.before.status is SagaStatus.CANCELLED
    assert went.late.status is SagaStatus.HALTED
    assert [*went.late.in_doubt] == ["deaf"]
    assert "execution 1 (key 's/deaf') had been given up and completed late, when the saga had gone on without it" in str(went.late)
    assert went.settled.status is SagaStatus.CANCELLED
    assert went.settled.clean


def test_a_second_attempt_that_comes_late_to_what_was_undone_answers_no_more_than_the_first() -> None:
    """Promise 5: it was kept, though a person had said that it was undone, and had undone it."""
    world = World({"deaf": ()})

    class Repeated(Deaf):
        idempotent = True

        async def execute(self, ctx: SagaContext) -> Any:
            self.world.standing["deaf"] = 1
            await self._wait()
            return self.outcome()

    async def main() -> SagaReport:
        stage = Repeated(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)
        await coordinator.settle("s", "deaf", "undone", "put right")
        world.undo("deaf")
        stage.released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert [*report.in_doubt] == ["deaf"]
    assert report.status is SagaStatus.STUCK


class BreaksAt(MemoryLedger):
    """Can't record such an event, once."""

    def __init__(self, breaks_at: Callable[[Any], bool]) -> None:
        super().__init__()
        self.breaks_at: Callable[[Any], bool] | None = breaks_at

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        if self.breaks_at is not None and any(map(self.breaks_at, events)):
            self.breaks_at = None
            raise OSError("disk full")
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


def test_what_came_late_in_a_saga_that_broke_off_is_neither_replaced_nor_run_when_that_is_recovered() -> None:
    world = World({"deaf": ()})

    async def main() -> SagaReport:
        stage = Again(world, "raise")
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT, ledger=BreaksAt(lambda event: isinstance(event, FallbackUsed)))
        await coordinator.run(pipeline, saga_id="s")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True, policy=INSTEAD_OF_IT)
        stage.released.set()
        await settled_down()
        return (await coordinator.recover(pipeline)).reports["s"]

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert [*report.in_doubt] == ["deaf"]
    assert report.fallbacks == ()
    assert report.cause is not None
    assert report.cause.kind is FailureKind.LATE


@pytest.mark.parametrize(
    ("kind", "on_failure", "rest", "last", "stands"),
    [
        (DeafByKey, "halt", SagaStatus.HALTED, SagaStatus.COMPLETED, {"s/deaf": 1}),
        (Again, "compensate", SagaStatus.COMPENSATED, SagaStatus.COMPENSATED, {}),
    ],
)
def test_what_came_late_in_a_saga_that_broke_off_before_it_ran_again_does_not_run_when_that_is_recovered(
    kind: type[Deaf], on_failure: str, rest: SagaStatus, last: SagaStatus, stands: dict[str, int]
) -> None:
    """It had its effect twice; where it had been undone as in doubt, under another key, and that of the late one was forgotten."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = kind(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": on_failure}), ledger=BreaksAt(runs_again))
        first = await coordinator.run(pipeline, saga_id="s")
        if first.in_doubt:
            await coordinator.settle("s", "deaf", "retry", "try")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        assert world.standing == {"s/deaf": 1}
        return [first, (await coordinator.recover(pipeline)).reports["s"]]

    first, recovered = run(main())

    assert first.status is rest
    assert recovered.status is last
    assert world.standing == stands


def runs_again(event: Any) -> bool:
    """Whether a stage that has run before starts."""
    return isinstance(event, StageStarted) and (event.attempt, event.execution) != (1, 1)


class StaysWithWhatItRecorded(DeafByKey):
    """Its probe says that it did not land; what it recorded before can't be undone, and then it can't be asked, either."""

    is_down = False

    async def execute(self, ctx: SagaContext) -> None:
        await ctx.record({"seat": "14A"})
        await super().execute(ctx)

    async def probe(self, _: CompensationContext) -> None:
        if self.is_down:
            raise OSError("no")

    async def compensate(self, _: CompensationContext) -> None:
        self.is_down = True
        raise OSError("no")


def test_what_was_stuck_and_comes_late_in_a_saga_that_broke_off_before_it_ran_again_is_kept_when_that_is_recovered() -> None:
    """It was run all the same, which its ledger refused as corrupt: the saga could never be recovered."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = StaysWithWhatItRecorded(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT, ledger=BreaksAt(runs_again))
        first = await coordinator.run(pipeline, saga_id="s")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        recovery = await coordinator.recover(pipeline)
        assert recovery.failed == {}
        return [first, recovery.reports["s"]]

    first, recovered = run(main())

    assert [*first.stuck] == ["deaf"]
    assert recovered.status is SagaStatus.COMPLETED
    assert [*recovered.kept] == ["deaf"]
    assert world.standing == {"s/deaf": 1}


class ThenRefused(DeafByKey):
    """It is deaf at first; each other attempt is refused."""

    async def execute(self, ctx: SagaContext) -> Any:
        if ctx.attempt > 1:
            raise OSError("refused")
        await super().execute(ctx)


@pytest.mark.parametrize("is_recovered_here", [True, False])
def test_what_comes_late_of_a_stage_that_a_dead_process_was_running_again_waits_until_that_is_recovered(
    is_recovered_here: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knew yet what the stage had come to first, and what came late was lost to the log."""
    world = World({})
    ledger = BreaksAt(lambda event: isinstance(event, StageFailed) and event.failure.attempt > 1)

    async def main() -> list[SagaReport]:
        stage = ThenRefused(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}), ledger=ledger)
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.settle("s", "deaf", "retry", "try")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline)
        stage.released.set()
        await settled_down()
        await elapse(60)
        broken = await coordinator.report("s")
        await (coordinator if is_recovered_here else SagaCoordinator(ledger=ledger)).recover(pipeline)
        await elapse(2)
        return [broken, await coordinator.report("s"), await coordinator.compensate("s", pipeline)]

    broken, recovered, undone = run(main())

    assert broken.status is SagaStatus.RUNNING
    assert recovered.stages["deaf"].state is StageState.KEPT
    assert undone.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING and "late" in record.getMessage()]
    assert "waits to be recorded: it broke off; recover it" in told


def test_a_pivot_that_comes_late_in_a_saga_that_broke_off_lets_an_undoing_under_way_come_to_its_end() -> None:
    """Else nobody could ever go on with the saga: it may not end while a stage of it is being undone."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_bears_repetition=True)})

    async def main() -> tuple[StageState, SagaReport]:
        stage = DeafPivot(world)
        whole = pipeline.with_stage("deaf", stage, dependencies=("a",))
        ledger = BreaksAt(lambda event: isinstance(event, CompensationCompleted))
        coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2), ledger=ledger)
        with pytest.raises(LedgerError, match="disk full"):
            await coordinator.run(whole, saga_id="s")
        stage.released.set()
        await settled_down()
        left = (await coordinator.report("s")).stages["deaf"].state
        return left, (await coordinator.recover(whole)).reports["s"]

    left, report = run(main())

    assert left is StageState.KEPT
    assert report.status is SagaStatus.HALTED
    assert report.stages["a"].state is StageState.UNDONE
    assert world.standing == {"deaf": 1}


@pytest.mark.parametrize("kind", ["compensable", "probed"])
def test_an_undoing_under_way_in_a_saga_that_broke_off_is_stuck_under_what_came_late_unless_its_probe_finds_it_done(kind: str) -> None:
    world, pipeline = scene({"plain": (), "a": ("plain",)}, kinds={"plain": "plain", "a": kind})

    async def main() -> SagaReport:
        stage = Stays(world)
        whole = pipeline.with_stage("deaf", stage, dependencies=("a",))
        ledger = BreaksAt(lambda event: isinstance(event, CompensationCompleted))
        coordinator = SagaCoordinator(PROMPT, ledger=ledger)
        with pytest.raises(LedgerError, match="disk full"):
            await coordinator.run(whole, saga_id="s")
        stage.released.set()
        await settled_down()
        return (await coordinator.recover(whole)).reports["s"]

    report = run(main())

    assert report.status is SagaStatus.STUCK
    assert {name: stage.state for name, stage in report.stages.items()} == {
        "plain": StageState.KEPT,
        "a": StageState.UNDONE if kind == "probed" else StageState.STUCK,
        "deaf": StageState.STUCK,
    }
    assert world.standing == {"deaf": 1}


class BreaksAtOnDisk(BreaksAt):
    """Takes what guards nothing together with what follows."""

    durable = True


@pytest.mark.parametrize("kind", [BreaksAt, BreaksAtOnDisk])
def test_what_comes_late_and_breaks_its_saga_off_is_recorded_when_the_ledger_is_back(kind: type[BreaksAt]) -> None:
    """Promise 5: the caller was told that it is in effect, and to resume; the saga was then compensated."""
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20, undo_bears_repetition=True)})

    async def main() -> SagaReport:
        stage = DeniedByProbe(world)
        trip = pipeline.with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT, ledger=kind(lambda event: isinstance(event, StageCompleted) and event.late))
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        while "slow" not in world.undoing:
            await elapse(1)
        stage.released.set()
        with pytest.raises(LedgerError, match="In effect: deaf"):
            await running
        await settled_down()
        return await coordinator.resume("s", trip)

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["slow", "deaf"]
    assert world.standing == {}


def test_what_comes_late_in_a_saga_that_broke_off_while_its_stage_ran_in_another_execution_waits_until_that_is_recovered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Again(world)
        pipeline = Pipeline(name="trip").with_stage("deaf", stage)
        ledger = BreaksAt(lambda event: isinstance(event, StageCompleted) and not event.late)
        coordinator = SagaCoordinator(PROMPT, ledger=ledger)
        await coordinator.run(pipeline, saga_id="s")
        with pytest.raises(LedgerError):
            await coordinator.resume("s", pipeline, forward=True)
        stage.released.set()
        await settled_down()
        broken = await coordinator.report("s")
        return [broken, (await coordinator.recover(pipeline)).reports["s"]]

    broken, recovered = run(main())

    assert broken.stages["deaf"].state is StageState.RUNNING
    assert recovered.status is SagaStatus.STUCK
    assert [*recovered.in_doubt] == ["deaf"]
    assert recovered.failures[-1].kind is FailureKind.LATE
    assert lost(caplog) == []


def test_what_comes_late_of_a_plain_stage_that_has_cancelled_since_is_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It has nothing that anybody could undo, or settle."""
    released = asyncio.Event()

    async def look(ctx: Any) -> StageOutput:
        if ctx.attempt > 1:
            return StageOutput.cancel("enough")
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()
        return StageOutput.ok()

    async def main() -> SagaReport:
        pipeline = Pipeline(name="trip").with_stage("look", look, "work")
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}))
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline)
        released.set()
        await settled_down()
        return await coordinator.report("s")

    report = run(main())

    assert report.stages["look"].state is StageState.CANCELLED
    assert lost(caplog) == [(LOSS, None)]


def test_what_comes_late_while_its_undoing_is_gone_on_with_waits_for_what_comes_of_that() -> None:
    """The ledger broke off while both were undone; one after the other now, the first of them takes its time."""
    world = World({"deaf": ()})
    stage = Doubtful(world)

    async def let_go(_: CompensationContext) -> None:
        await elapse(10)

    async def fail(_: SagaContext) -> StageOutput:
        return StageOutput.fail("no")

    pipeline = Pipeline(name="trip").with_stage("deaf", stage).with_stage("other", compensable(nothing, let_go))
    pipeline = pipeline.with_stage("fail", compensable(fail, nothing), dependencies=("other",))
    one_by_one = PROMPT.model_copy(update={"compensation": Compensation(max_concurrency=1)})

    async def main() -> tuple[SagaReport, SagaReport]:
        ledger = BreaksAt(lambda event: isinstance(event, CompensationCompleted))
        coordinator = SagaCoordinator(PROMPT, ledger=ledger)
        with pytest.raises(LedgerError):
            await coordinator.run(pipeline, saga_id="s")
        going_on = asyncio.create_task(coordinator.resume("s", pipeline, policy=one_by_one))
        await elapse(5)
        stage.released.set()
        first = await going_on
        return first, await coordinator.report("s")

    first, report = run(main())

    assert first == report
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("way", ["kept", "undone", "compensate"])
def test_the_sagas_above_wait_for_a_person_with_one_in_which_an_execution_before_came_late(way: str) -> None:
    """Resumed meanwhile, they would turn back because it can't go on; undone, they are, but for what it holds back."""
    world, others = scene({"other": ()})

    class Renewed(Again):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if ctx.idempotency_key != "s/child/deaf":
                return await super().execute(ctx)
            await self._wait()
            self.world.land("first")
            return StageOutput.ok()

    async def main() -> list[SagaReport]:
        stage = Renewed(world)
        halting = PROMPT.model_copy(update={"on_failure": "halt"})
        trip = others.with_stage("child", nested(nested_in(stage), halting), dependencies=("other",))
        coordinator = SagaCoordinator(FailFast(on_failure="halt"))
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/deaf", "undone", "not in their books")
        first = await coordinator.resume("s", trip)
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        with pytest.raises(MisuseError, match="got child in doubt, of which something came late"):
            await coordinator.resume("s", trip)
        if way == "compensate":
            stuck = await coordinator.compensate("s", trip)
            for key in ("first", "s/child/deaf~2"):
                world.standing.pop(key)
            await coordinator.settle("s", "child/deaf", "undone", "looked")
            return [first, late, stuck, await coordinator.resume("s", trip)]
        world.standing.pop("first")
        if way == "undone":
            world.standing.pop("s/child/deaf~2")
        settled = await coordinator.settle("s", "child/deaf", way, "looked")
        return [first, late, settled, await coordinator.resume("s", trip)]

    first, late, then, last = run(main())

    assert first.status is SagaStatus.COMPLETED
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child", "child/deaf"]
    assert "stage 'deaf' is in question: execution 1" in late.failures[-1].message
    if way == "compensate":
        assert [*then.stuck] == ["child"]
        assert [*then.blocked] == ["other"]
    assert last.status is (SagaStatus.COMPENSATED if way == "compensate" else SagaStatus.COMPLETED)
    assert last.clean
    number = {"kept": 2, "undone": 3, "compensate": 0}[way]
    assert world.standing.keys() == ({"other", f"s/child/deaf~{number}"} if number else set())


class NotesItsSeat(Doubtful):
    """Notes what it did before it goes on, and may do more."""

    refused: ClassVar[list[str]] = []

    async def execute(self, ctx: SagaContext) -> Any:
        await self._wait()
        self.world.land("deaf")
        try:
            await ctx.record({"seat": "14A"})
        except MisuseError as error:
            self.refused.append(str(error))
            raise
        self.world.land("another seat")


class DeniedByProbeBefore(NotesItsSeat):
    async def probe(self, ctx: CompensationContext) -> None:
        return None


@pytest.mark.parametrize("kind", [NotesItsSeat, DeniedByProbeBefore])
@pytest.mark.parametrize("way", ["at rest", "alive", "resumed"])
def test_an_effect_that_is_recorded_late_stops_the_stage_and_waits_for_a_person(
    way: str, kind: type[NotesItsSeat], caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 5: to the stage the ledger seemed corrupt, it raised, and the saga stayed compensated, with a seat that stood."""
    world, others = scene({"slow": ()}, {"slow": Script(undo_takes=20)})
    kind.refused.clear()

    async def main() -> list[SagaReport]:
        stage = kind(world)
        pipeline = others.with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT)
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        while way == "alive" and "slow" not in world.undoing:
            await elapse(1)
        if way == "alive":
            stage.released.set()
        reports = [await running]
        stage.released.set()
        if way == "resumed":
            reports = [await coordinator.resume("s", pipeline)]
        await settled_down()
        reports.append(await coordinator.report("s"))
        assert "deaf" in world.standing
        world.undo("deaf")
        return [*reports, await coordinator.settle("s", "deaf", "undone", "they gave it back")]

    first, late, settled = run(main())

    assert first.status is (SagaStatus.STUCK if way == "alive" else SagaStatus.COMPENSATED)
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["deaf"]
    assert late.failures[-1].kind is FailureKind.LATE
    assert "execution 1 (key 's/deaf') recorded {'seat': '14A'} late, when the saga had gone on without it" in str(late)
    (refused,) = kind.refused
    assert "expected ctx.record by an attempt that is running, for stage 'deaf', got one that was given up, or has ended." in refused
    assert settled.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert "could not be recorded" not in caplog.text


UNDONE_AND_RUN_ON = [*PATHS[StageState.UNDONE], SagaEnded(status=SagaStatus.COMPENSATED), RUNS_ON]
STOPPED = Failure.of("a", FailureKind.INTERRUPTED, "the saga stopped before it ran")


@pytest.mark.parametrize(
    "since",
    [StageStarted(stage="a", attempt=1, execution=2), StageFailed(stage="a", failure=STOPPED)],
    ids=["has begun", "did not get its turn"],
)
def test_what_comes_late_of_an_execution_that_is_over_is_asked_of_a_person_whether_or_not_the_next_has_begun(since: AnyEvent) -> None:
    state = SagaState([STARTED, *UNDONE_AND_RUN_ON, since])
    late = Late(StageCompleted(stage="a", output=OUTPUT, late=True), execution=1, attempts=3, undo_attempts=1)

    question = news_of(state, late)

    assert isinstance(question, StageProbed)
    assert (question.landed, question.output, question.held) == (None, OUTPUT, True)
    assert question.failure is not None
    assert (question.failure.kind, question.failure.attempt) == (FailureKind.LATE, 3)
