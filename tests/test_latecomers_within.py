"""What comes late within a saga that a stage has run is heard of, and undone through those above it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from stageflow.api import Pipeline, StageContext, StageOutput

from saga import (
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    LedgerConflict,
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
    nested,
)
from saga.events import (
    SagaEnded,
    StageProbed,
    StageSettled,
)
from saga.failures import FailureKind
from saga.text import quoted
from tests.controlled import elapse, run
from tests.late import (
    INSTEAD,
    PROMPT,
    Deaf,
    DeafByKey,
    DeniedByProbe,
    Doubtful,
    Tolerant,
    nested_in,
    resumed_while_it_comes_late,
    settled_down,
    while_slow_is_undone,
)
from tests.slow import SlowLedger
from tests.world import Script, World, scene


class Fails(Tolerant):
    """It minds: it fails with the saga that it runs, which has halted by then; while nothing of that stands, nobody undoes it."""

    compensate_in_doubt = True
    timeout = 100

    async def execute(self, ctx: SagaContext) -> StageOutput:
        report = await ctx.run_saga(self.inner, policy=PROMPT.model_copy(update={"on_failure": "halt"}))
        report.raise_for_status()
        return StageOutput.ok()


@pytest.mark.parametrize("way", ["resume", "compensate"])
@pytest.mark.parametrize("above", [("child",), ("grandchild", "child")])
def test_what_comes_late_within_is_undone_through_the_sagas_above_that_were_done_with_it(way: str, above: tuple[str, ...]) -> None:
    """Promise 5: they are compensated no more, and who goes on with the outermost needs to know of no other."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = Doubtful(world)
        trip = nested_in(stage, *above)
        coordinator = SagaCoordinator()
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        assert world.standing == {"deaf": 1}
        return [first, late, await getattr(coordinator, way)("s", trip)]

    first, late, undone = run(main())

    assert first.status is undone.status is SagaStatus.COMPENSATED
    assert late.status is SagaStatus.STUCK
    assert late.stages["child"].state is StageState.IN_DOUBT
    assert [*late.in_doubt] == ["child", *(["child/grandchild"] if len(above) > 1 else []), "/".join([*reversed(above), "deaf"])]
    assert "something of its saga s/child is stuck, blocked or in doubt" in str(late)
    assert "its probe failed" not in str(late)
    assert undone.clean
    assert world.standing == {}


def test_what_comes_late_within_while_the_saga_above_goes_backward_is_undone_before_it_comes_to_rest() -> None:
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20)})

    async def main() -> SagaReport:
        stage = Doubtful(world)
        coordinator = SagaCoordinator()
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        return await while_slow_is_undone(coordinator.run(trip, saga_id="s"), world, stage)

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert "+deaf" in world.log
    assert world.standing == {}


def test_what_comes_late_within_a_saga_that_had_halted_is_undone_with_its_parent() -> None:
    """Promise 5: there it is kept, which is in nobody's question; but the saga above was compensated, and stayed so."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        trip = Pipeline(name="trip").with_stage("child", Fails(nested_in(stage)))
        coordinator = SagaCoordinator()
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        assert world.standing == {"deaf": 1}
        return [first, late, await coordinator.resume("s", trip)]

    first, late, undone = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert first.stages["child"].children[0].status is SagaStatus.HALTED
    assert late.status is SagaStatus.STUCK
    assert undone.status is SagaStatus.COMPENSATED
    assert undone.clean
    assert world.standing == {}


@pytest.mark.parametrize("alive", [False, True])
def test_what_comes_late_within_a_stage_that_is_stuck_because_of_it_is_tried_again_on_resume(alive: bool) -> None:
    """Nobody knew whether it had landed; now that is known, and it can be undone. A word is for a saga at rest: it waits for that."""
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20)})

    async def main() -> list[SagaReport]:
        stage = Deaf(world)
        coordinator = SagaCoordinator()
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        while alive and "slow" not in world.undoing:
            await elapse(1)
        if alive:
            stage.released.set()
        first = await running
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await coordinator.resume("s", trip)]

    first, late, resumed = run(main())

    assert [*first.stuck] == ["child"]
    assert late.status is SagaStatus.STUCK
    assert late.stages["child"].settled is not None
    assert late.stages["child"].settled.by == "saga s/child"
    assert str(late).endswith("there is nothing to settle. Mend the cause, then: saga resume s")
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


class StopsAtWord(MemoryLedger):
    """The process dies when it tells a stage of what came late within; to whoever comes after it the ledger answers."""

    stage: str | None = None

    def has_stopped(self) -> bool:
        return self.stage is None

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        if any(isinstance(event, StageProbed | StageSettled) and event.stage == self.stage for event in events):
            self.stage = None
            raise OSError("killed")
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


@pytest.mark.parametrize("way", ["resume", "compensate"])
@pytest.mark.parametrize(("above", "killed_at"), [(("child",), "child"), (("inner", "child"), "inner"), (("inner", "child"), "child")])
@pytest.mark.parametrize("kind", [Doubtful, Deaf])
def test_what_came_late_within_is_heard_of_by_who_goes_on_when_the_process_died_before_those_above_had(
    kind: type[Deaf], above: tuple[str, ...], killed_at: str, way: str
) -> None:
    """Promise 5: they stayed compensated, or stuck, for good, while what came late stood."""
    world = World({"deaf": ()})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = kind(world)
        trip = nested_in(stage, *above)
        await SagaCoordinator(ledger=ledger).run(trip, saga_id="s")
        ledger.stage = killed_at
        stage.released.set()
        await settled_down()
        assert ledger.has_stopped()
        assert world.standing == {"deaf": 1}
        coordinator = SagaCoordinator(ledger=ledger)
        left = await coordinator.report("s")
        undone: SagaReport = await getattr(coordinator, way)("s", trip)
        return left, undone

    left, report = run(main())

    assert left.status is SagaStatus.STUCK
    assert [*above][-1] in {*left.stuck, *left.in_doubt}
    assert str(left).endswith("saga resume s")
    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.standing == {}


class Ahead(StopsAtWord):
    """Another machine, or this one before its clock was set back, records with a clock that is an hour ahead."""

    is_ahead = True

    def _timed(self, events: Any) -> Any:
        return [replace(event, at=event.at + timedelta(hours=1)) for event in events] if self.is_ahead else events

    async def create(self, saga_id: str, owner: str, events: Any, *, under: int | None = None) -> int:
        return await super().create(saga_id, owner, self._timed(events), under=under)

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        await super().append(saga_id, self._timed(events), expected_version=expected_version, token=token, release=release)


@pytest.mark.parametrize("ahead", ["before", "when it came late"])
@pytest.mark.parametrize("killed_at", [None, "child", "inner"])
@pytest.mark.parametrize("kind", [Doubtful, Deaf])
def test_what_came_late_within_is_heard_of_once_whatever_the_clocks_say(kind: type[Deaf], killed_at: str | None, ahead: str) -> None:
    """Promise 5: by their clocks what came late was older than what those above had heard before, or what they heard of it older yet."""
    world = World({"deaf": ()})
    ledger = Ahead()

    async def main() -> tuple[SagaReport, SagaReport, SagaReport]:
        stage = kind(world)
        trip = nested_in(stage, "inner", "child")
        ledger.is_ahead = ahead == "before"
        await SagaCoordinator(ledger=ledger).run(trip, saga_id="s")
        ledger.is_ahead = not ledger.is_ahead
        ledger.stage = killed_at
        stage.released.set()
        await settled_down()
        assert ledger.has_stopped()
        assert world.standing == {"deaf": 1}
        coordinator = SagaCoordinator(ledger=ledger)
        ledger.is_ahead = False
        left = await coordinator.report("s")
        return left, await coordinator.resume("s", trip), await coordinator.report("s")

    left, report, then = run(main())

    assert left.status is SagaStatus.STUCK
    assert report.status is SagaStatus.COMPENSATED
    assert then == report
    assert world.standing == {}


def test_what_came_late_within_is_heard_of_on_its_way_by_a_saga_that_is_recovered() -> None:
    world, pipeline = scene({"slow": ()}, {"slow": Script(undo_takes=20, undo_bears_repetition=True)})
    ledger = StopsAtWord()

    async def main() -> SagaReport:
        stage = Doubtful(world)
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        running = asyncio.create_task(SagaCoordinator(ledger=ledger).run(trip, saga_id="s"))
        while "slow" not in world.undoing:
            await elapse(1)
        ledger.stage = "child"
        stage.released.set()
        with pytest.raises(LedgerError, match="killed"):
            await running
        assert world.standing == {"deaf": 1}
        return (await SagaCoordinator(ledger=ledger).recover(trip)).reports["s"]

    report = run(main())

    assert report.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.standing == {}


def test_a_saga_is_not_called_compensated_by_a_word_on_a_stage_beside_one_within_which_something_came_late() -> None:
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=9)})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Doubtful(world)
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        await SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))), ledger=ledger).run(trip, saga_id="s")
        ledger.stage = "child"
        stage.released.set()
        await settled_down()
        assert ledger.has_stopped()
        coordinator = SagaCoordinator(ledger=ledger)
        world.undo("a")
        said = await coordinator.settle("s", "a", "undone", "by hand")
        return said, await coordinator.resume("s", trip)

    said, resumed = run(main())

    assert said.status is SagaStatus.STUCK
    assert [*said.in_doubt] == ["child", "child/deaf"]
    assert resumed.status is SagaStatus.COMPENSATED
    assert resumed.clean
    assert world.standing == {}


class AnswersInItsTurn(SlowLedger):
    """Whoever asks for the sagas lets others go first, as with any ledger that is not in memory."""

    async def list(self, **how: Any) -> Any:
        await elapse(0.1)
        return await super().list(**how)


@pytest.mark.parametrize("after", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("by_another", [False, True])
def test_a_word_said_while_its_saga_is_just_told_of_what_came_late_within_is_taken_or_can_be_said_again(
    by_another: bool, after: float
) -> None:
    """It was recorded, and refused all the same: "try again in a moment", which was refused, too."""
    world, pipeline = scene({"a": ()}, {"a": Script(undo_fails=9)})
    ledger = AnswersInItsTurn()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Doubtful(world)
        trip = pipeline.with_stage("child", nested(nested_in(stage), PROMPT))
        coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))), ledger=ledger)
        await coordinator.run(trip, saga_id="s")
        world.undo("a")
        asyncio.get_running_loop().call_later(after, stage.released.set)
        operator = SagaCoordinator(ledger=ledger) if by_another else coordinator
        try:
            await operator.settle("s", "a", "undone", "by hand")
        except (LedgerConflict, MisuseError):
            await elapse(1)
            await operator.settle("s", "a", "undone", "by hand")
        await elapse(1)
        return await coordinator.report("s"), await coordinator.resume("s", trip)

    report, resumed = run(main())

    assert [*report.undone] == ["a"]
    assert [*report.in_doubt] == ["child", "child/deaf"]
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("way", ["resume", "compensate"])
@pytest.mark.parametrize("retried", [False, True])
def test_what_comes_late_within_a_stage_that_is_kept_is_undone_when_that_runs_again(way: str, retried: bool) -> None:
    """Its child went on with a fallback: what came late serves nothing, and what else the child gave is in use."""
    world, inner = scene({"other": ()}, {"other": Script("raise", then=("ok",)) if retried else Script()})
    world.dependencies["deaf"] = ()

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        child = nested(inner.with_stage("deaf", stage, dependencies=("other",)), INSTEAD)
        trip = Pipeline(name="trip").with_stage("child", child)
        coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0.0)))
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await getattr(coordinator, way)("s", trip)]

    first, late, gone_on = run(main())

    assert first.status is SagaStatus.COMPLETED
    assert first.clean
    assert late.status is SagaStatus.STUCK
    assert late.stages["child"].state is StageState.IN_DOUBT
    assert gone_on.status is (SagaStatus.COMPLETED if way == "resume" else SagaStatus.COMPENSATED)
    assert gone_on.clean
    assert world.standing == ({"other": 1} if way == "resume" else {})


def test_what_comes_late_within_while_the_saga_above_goes_forward_turns_nothing_back() -> None:
    """Its stage has completed, be it at the second attempt: what came after that is not to be undone."""
    world, inner = scene({"other": ()}, {"other": Script("raise", then=("ok",))})
    world.dependencies["deaf"] = ()

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)

        async def wait(_: StageContext) -> None:
            stage.released.set()
            await settled_down()

        child = nested(inner.with_stage("deaf", stage, dependencies=("other",)), INSTEAD)
        trip = Pipeline(name="trip").with_stage("child", child).with_stage("wait", wait, "work", dependencies=("child",))
        coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0.0)))
        return [await coordinator.run(trip, saga_id="s"), await coordinator.resume("s", trip)]

    first, resumed = run(main())

    assert first.status is SagaStatus.STUCK
    assert first.cause is None
    assert [*first.kept] == ["wait"]
    assert resumed.status is SagaStatus.COMPLETED
    assert resumed.clean
    assert world.standing == {"other": 1}


def test_what_comes_late_within_a_stage_beyond_a_pivot_of_its_own_is_undone_on_resume() -> None:
    """Promise 5: the saga above went on without that branch, and no command could undo what stood there."""
    world, others = scene({"pay": (), "other": ()}, kinds={"pay": "pivot"})

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        inner = Pipeline(name="inner").with_stage("pay", others.stages["pay"].runner).with_stage("deaf", stage)
        trip = Pipeline(name="trip").with_stage("child", nested(inner, PROMPT)).with_stage("other", others.stages["other"].runner)
        coordinator = SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch"))
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        return [first, await coordinator.report("s"), await coordinator.resume("s", trip)]

    first, late, resumed = run(main())

    assert first.status is resumed.status is SagaStatus.DEGRADED
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child"]
    assert [*late.blocked] == ["child/deaf"]
    assert resumed.clean
    assert world.standing == {"pay": 1, "other": 1}


def test_what_comes_late_within_a_stage_that_a_person_keeps_is_kept_with_it() -> None:
    world = World({"deaf": ()})

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Deaf(world)
        coordinator = SagaCoordinator()
        await coordinator.run(nested_in(stage, "child"), saga_id="s")
        kept = await coordinator.settle("s", "child", "kept", "they sent a ticket")
        stage.released.set()
        await settled_down()
        return kept, await coordinator.report("s")

    kept, late = run(main())

    assert kept.status is late.status is SagaStatus.HALTED
    assert late.stages["child"].state is StageState.KEPT
    assert late.stages["child"].children[0].stages["deaf"].late_output is not None
    assert late.clean


class FirstIsDeaf(Deaf):
    """It is deaf in the first of the sagas that run it; what it does in the second one can't be undone."""

    async def execute(self, ctx: SagaContext) -> Any:
        if ctx.saga_id.endswith("/child"):
            await self._wait()
        self.world.land(ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        if ctx.saga_id.endswith("/child#2"):
            raise OSError
        self.world.undo(ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok() if ctx.forward_key in self.world.standing else None


TWICE = FailFast(retry=Retry(attempts=2, wait=0.0))


def test_what_comes_late_within_the_child_of_an_earlier_attempt_is_undone_beside_a_later_one_that_is_stuck() -> None:
    """Promise 8: neither depends on the other. Were the later one then kept, no command would undo the earlier."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = FirstIsDeaf(world)
        trip = nested_in(stage, "child")
        coordinator = SagaCoordinator(TWICE)
        first = await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        assert world.standing == {"s/child/deaf": 1, "s/child#2/deaf": 1}
        return [first, await coordinator.compensate("s", trip)]

    first, undone = run(main())

    assert first.status is SagaStatus.COMPLETED
    assert [*undone.stuck] == ["child", "child#2/deaf"]
    assert world.standing == {"s/child#2/deaf": 1}


@pytest.mark.parametrize("above", ["s", "s/top"])
def test_what_comes_late_within_the_child_of_an_earlier_attempt_is_undone_by_the_command_that_is_told(above: str) -> None:
    """It said to resume the saga above, which is complete."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = FirstIsDeaf(world)
        trip = nested_in(stage, "child")
        if above != "s":
            trip = Pipeline(name="outer").with_stage("top", nested(trip, TWICE))
        coordinator = SagaCoordinator(TWICE)
        await coordinator.run(trip, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        child = await coordinator.resume(f"{above}/child", Pipeline(name="inner").with_stage("deaf", stage))
        return [late, child, await coordinator.report("s")]

    late, child, report = run(main())

    assert late.status is SagaStatus.COMPLETED
    assert str(late).endswith(f"To do: it was not undone to the end; go on with: saga resume {above}/child")
    assert child.status is SagaStatus.COMPENSATED
    assert report.clean
    assert world.standing == {f"{above}/child#2/deaf": 1}


def test_what_is_to_be_tried_again_within_the_child_of_an_earlier_attempt_is_gone_on_with_by_the_command_that_is_told() -> None:
    """It said to resume the saga above, which is complete."""
    world = World({})

    class FirstIsDeafWithin(DeafByKey, DeniedByProbe):
        async def execute(self, ctx: SagaContext) -> Any:
            self.is_deaf = ctx.saga_id == "s/child/inner"
            return await super().execute(ctx)

    async def main() -> list[SagaReport]:
        stage = FirstIsDeafWithin(world)
        coordinator = SagaCoordinator(TWICE)
        first = await coordinator.run(nested_in(stage, "inner", "child"), saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        said = await coordinator.settle("s", "child/inner", "retry", "try")
        await coordinator.resume("s/child", nested_in(stage, "inner"))
        return [first, late, said, await coordinator.report("s")]

    first, late, said, last = run(main())

    assert first.clean
    assert str(late).endswith("and say so (undone, kept or retry):\n  saga settle s child/inner retry --note '...'")
    assert str(said).endswith("there is nothing to settle. Mend the cause, then: saga resume s/child")
    assert first.status is last.status is SagaStatus.COMPLETED
    assert last.clean
    assert world.standing == {"s/child#2/inner/deaf": 1}


def test_of_a_stage_within_which_something_is_to_be_undone_nobody_is_asked_to_say_that_it_is() -> None:
    """That is refused: what came late within stands."""
    world = World({"deaf": ()})

    async def main() -> list[SagaReport]:
        stage = DeniedByProbe(world)
        trip = nested_in(stage, "child")
        coordinator = SagaCoordinator()
        reports = [await coordinator.run(trip, saga_id="s")]
        stage.released.set()
        await settled_down()
        reports.append(await coordinator.report("s"))
        with pytest.raises(MisuseError, match="undone, while these are: child/deaf"):
            await coordinator.settle("s", "child", "undone", "looked")
        await coordinator.settle("s", "child", "retry", "looked")
        return [*reports, await coordinator.resume("s", trip)]

    first, late, resumed = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert [*late.in_doubt] == ["child"]
    assert [*late.blocked] == ["child/deaf"]
    assert "saga settle s child retry --note '...'" in str(late)
    assert resumed.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("on_failure", ["compensate", "halt"])
@pytest.mark.parametrize("above", [(), ("grandchild",)])
def test_what_came_late_within_two_executions_is_undone_by_the_commands_that_are_told(above: tuple[str, ...], on_failure: str) -> None:
    """They said to try the stage again, which is refused, or to resume the saga, which left it as it was."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = DeafByKey(world)
        child, trip = nested_in(stage, *above), nested_in(stage, *above, "child")
        path = "/".join(["child", *above, "deaf"])
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", path, "undone", "not in their books")
        await coordinator.resume("s", trip)
        await coordinator.resume("s", trip, forward=True, policy=PROMPT.model_copy(update={"on_failure": on_failure}))
        stage.released.set()
        await settled_down()
        world.undo(f"s/{path}")
        late = await coordinator.settle("s", path, "undone", "by hand")
        for saga_id in ("s/child", "s/child~2"):
            if f"saga compensate {quoted(saga_id)}" in str(late):
                await coordinator.compensate(saga_id, child)
        undone = await coordinator.report("s")
        await coordinator.settle("s", "child", "undone", "nothing stands")
        return [late, undone, await coordinator.compensate("s", trip)]

    late, undone, last = run(main())

    assert str(late).endswith("To do: it was not undone to the end; go on with: saga compensate 's/child~2'")
    assert str(undone).endswith("(undone or kept); then go on:\n  saga settle s child undone --note '...'\n  saga resume s")
    assert last.clean
    assert world.standing == {}


def test_a_word_on_a_stage_that_has_run_since_is_no_answer_to_what_comes_late_of_it() -> None:
    """There was nothing to settle, said the report, and to resume, which did nothing."""
    world = World({})

    async def main() -> list[SagaReport]:
        stage = DeafByKey(world)
        trip = Pipeline(name="trip").with_stage("deaf", stage)
        coordinator = SagaCoordinator(PROMPT.model_copy(update={"on_failure": "halt"}))
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "deaf", "retry", "try")
        stage.is_deaf = False
        await coordinator.resume("s", trip)
        undone = await coordinator.compensate("s", trip)
        stage.released.set()
        await settled_down()
        return [undone, await coordinator.report("s")]

    undone, late = run(main())

    assert undone.status is SagaStatus.COMPENSATED
    assert world.standing == {"s/deaf": 1}
    assert [*late.in_doubt] == ["deaf"]
    assert "saga settle s deaf undone --note '...'" in str(late)


@pytest.mark.parametrize("way", ["resume", "compensate"])
def test_what_comes_late_within_a_stage_that_was_undone_after_a_word_on_it_is_undone_by_the_commands_that_are_told(way: str) -> None:
    """It told to compensate the saga within by itself, which is refused: the stage undoes it."""
    world = World({})

    class NotInTheirBooks(DeafByKey, DeniedByProbe): ...

    class Refused(DeafByKey):
        is_deaf = False

        async def compensate(self, ctx: CompensationContext) -> None:
            raise OSError

    async def main() -> list[SagaReport]:
        late = NotInTheirBooks(world)
        inner = Pipeline(name="inner").with_stage("stays", Refused(world)).with_stage("late", late)
        trip = Pipeline(name="trip").with_stage("child", nested(inner, PROMPT))
        coordinator = SagaCoordinator(PROMPT)
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/stays", "undone", "by hand")
        del world.standing["s/child/stays"]
        undone = await getattr(coordinator, way)("s", trip)
        late.released.set()
        await settled_down()
        told = await coordinator.report("s")
        await coordinator.settle("s", "child", "retry", "as told")
        return [undone, told, await coordinator.resume("s", trip)]

    undone, told, last = run(main())

    assert undone.status is SagaStatus.COMPENSATED
    assert str(told).endswith("then go on:\n  saga settle s child retry --note '...'\n  saga resume s")
    assert last.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_nobody_is_told_to_go_on_while_a_stage_around_waits_for_a_word_of_its_own() -> None:
    """To resume is refused before that has been said."""
    world, pipeline = scene({"seat": ()})

    class NotInTheirBooks(DeafByKey, DeniedByProbe): ...

    async def main() -> list[SagaReport]:
        stage = NotInTheirBooks(world)
        middle = Pipeline(name="middle").with_stage("inner", Fails(nested_in(stage)))
        trip = pipeline.with_stage("child", Fails(middle), dependencies=("seat",))
        coordinator = SagaCoordinator()
        await coordinator.run(trip, saga_id="s")
        stage.is_deaf = False
        await coordinator.resume("s", trip, forward=True)
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        world.undo("s/child/inner/deaf")
        said = await coordinator.settle("s", "child/inner", "undone", "by hand")
        await coordinator.settle("s", "child", "kept", "its second booking stands")
        return [late, said, await coordinator.resume("s", trip)]

    late, said, last = run(main())

    assert str(late).endswith("and say so (undone, kept or retry):\n  saga settle s child/inner undone --note '...'")
    assert str(said).endswith("and say so (undone or kept); then go on:\n  saga settle s child undone --note '...'\n  saga resume s")
    assert last.status is SagaStatus.COMPLETED
    assert last.clean
    assert world.standing == {"seat": 1, "s/child~2/inner/deaf": 1}


class ToleratesAgain(Tolerant):
    idempotent = True


async def late_within(
    tolerant: type[Tolerant],
    *,
    outcome: StageOutput | None = None,
    fails: bool = False,
    again: bool = False,
    compensates: bool = False,
    policy: Policy | None = None,
    ledger: StopsAtWord | None = None,
) -> tuple[World, SagaCoordinator, Pipeline, Pipeline, SagaReport]:
    """A saga at rest that was done with a child in which something came late then: with what of it stands, and what it said then."""
    world = World({"deaf": ()})
    stage = Doubtful(world)
    inner = nested_in(stage)

    async def end(_: StageContext) -> StageOutput:
        return StageOutput.fail("no") if fails else StageOutput.ok()

    trip = Pipeline(name="trip").with_stage("book", tolerant(inner, outcome)).with_stage("end", end, "work", dependencies=("book",))
    coordinator = SagaCoordinator(policy, ledger=ledger)
    await coordinator.run(trip, saga_id="s")
    if again:
        fails = False
        await coordinator.resume("s", trip, forward=True)
    if compensates:
        await coordinator.compensate("s", trip)
    first = await coordinator.report("s")
    assert first.clean
    if ledger is not None:
        ledger.stage = "book"
    stage.released.set()
    await settled_down()
    return world, coordinator, trip, inner, first


def test_the_sagas_of_a_stage_that_is_given_up_are_stopped() -> None:
    """They went on to charge, though a fallback stood in for the stage."""
    world, inner = scene({"hold": (), "charge": ("hold",)}, {"hold": Script(before=20)}, {"hold": "probed"})
    at_once = FailFast(in_flight="cancel")

    class LeavesItRunning(Tolerant):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            child = asyncio.ensure_future(ctx.run_saga(self.inner, policy=at_once))
            while not child.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({child})
            return StageOutput.ok() if child.result().ok else StageOutput.fail("no")

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return StageOutput.ok() if "charge" in world.standing else None

    async def main() -> tuple[SagaReport, SagaReport]:
        coordinator = SagaCoordinator(ContinueWithFallback(timeout=10, cancel_grace=2, fallbacks={"book": {}}))
        first = await coordinator.run(Pipeline(name="trip").with_stage("book", LeavesItRunning(inner)), saga_id="s")
        await elapse(50)
        return first, await coordinator.report("s")

    first, report = run(main())

    assert first.fallbacks == ("book",)
    assert world.log == []
    assert report.stages["book"].children[0].status is SagaStatus.COMPENSATED
    assert report.status is SagaStatus.DEGRADED
    assert report.clean


@pytest.mark.parametrize("way", ["resume", "compensate", "forward"])
def test_what_comes_late_within_a_stage_that_was_undone_is_undone_by_what_undid_it(way: str) -> None:
    """It is not made for doubt, and there is none: it finds what stands in the saga that it ran."""

    async def main() -> tuple[World, SagaReport, SagaReport]:
        world, coordinator, trip, _, first = await late_within(Tolerant, fails=True)
        assert first.status is SagaStatus.COMPENSATED
        late = await coordinator.report("s")
        if way == "forward":
            with pytest.raises(MisuseError, match="half undone stages can run again, got book, not idempotent"):
                await coordinator.resume("s", trip, forward=True)
            way_back = coordinator.resume
        else:
            way_back = getattr(coordinator, way)
        return world, late, await way_back("s", trip)

    world, late, undone = run(main())

    assert late.status is SagaStatus.STUCK
    assert late.stages["book"].state is StageState.BLOCKED
    assert undone.status is SagaStatus.COMPENSATED
    assert undone.clean
    assert world.standing == {}


def test_what_comes_late_within_a_stage_that_was_cancelled_is_not_forgotten() -> None:
    async def main() -> tuple[World, SagaReport, SagaReport, SagaReport]:
        world, coordinator, _, inner, first = await late_within(Tolerant, outcome=StageOutput.cancel("enough"))
        late = await coordinator.report("s")
        await coordinator.compensate("s/book", inner)
        return world, first, late, await coordinator.settle("s", "book", "undone", "its saga is undone")

    world, first, late, settled = run(main())

    assert first.status is settled.status is SagaStatus.CANCELLED
    assert late.status is SagaStatus.HALTED
    assert [*late.in_doubt] == ["book", "book/deaf"]
    assert world.standing == {}


def test_what_comes_late_within_a_saga_of_which_nothing_came_leaves_it_stuck() -> None:
    """Also where it never turned back: there was nothing to undo."""
    skipping = ContinueWithFallback(without_fallback="skip_branch")

    async def main() -> tuple[SagaReport, SagaReport]:
        _, coordinator, _, _, first = await late_within(Tolerant, outcome=StageOutput.fail("no"), policy=skipping)
        return first, await coordinator.report("s")

    first, late = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["book", "book/deaf"]


@pytest.mark.parametrize("tolerant", [Tolerant, ToleratesAgain])
def test_a_child_that_turned_back_is_undone_by_itself_where_its_stage_stands_without_it(tolerant: type[Tolerant]) -> None:
    async def main() -> tuple[World, SagaReport, SagaReport]:
        world, coordinator, _, inner, _ = await late_within(tolerant)
        for refused in (coordinator.compensate("s/book", inner), coordinator.resume("s/book", inner, forward=True)):
            with pytest.raises(MisuseError, match="a saga that no other one runs"):
                await refused
        return world, await coordinator.resume("s/book", inner), await coordinator.report("s")

    world, child, report = run(main())

    assert child.status is SagaStatus.COMPENSATED
    assert report.status is SagaStatus.COMPLETED
    assert report.clean
    assert world.standing == {}


class OnlyOnce(Tolerant):
    """Runs its saga in its first execution alone."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        return await super().execute(ctx) if ctx.idempotency_key == "s/book" else StageOutput.ok()


@pytest.mark.parametrize("way", ["resume", "compensate"])
def test_a_child_of_an_execution_before_is_undone_by_itself(way: str) -> None:
    """Its stage runs under another key now, and finds it no more."""

    async def main() -> tuple[World, SagaReport, SagaReport, SagaReport]:
        world, coordinator, _, inner, _ = await late_within(OnlyOnce, fails=True, again=True)
        late = await coordinator.report("s")
        child = await getattr(coordinator, way)("s/book", inner)
        return world, late, child, await coordinator.settle("s", "book", "kept", "its second run stands")

    world, late, child, report = run(main())

    assert late.status is SagaStatus.STUCK
    assert child.status is SagaStatus.COMPENSATED
    assert report.status is SagaStatus.COMPLETED
    assert report.stages["book"].executions == 2
    assert report.clean
    assert world.standing == {}


def test_a_retry_within_a_child_of_an_execution_before_is_refused_where_nothing_can_be_tried() -> None:
    """Nobody goes forward with it; the report told to undo it by itself, again and again, which did nothing."""
    world = World({})

    async def main() -> SagaReport:
        stage = DeafByKey(world)
        trip = nested_in(stage, "child", policy=PROMPT.model_copy(update={"on_failure": "halt"}))
        coordinator = SagaCoordinator()
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/deaf", "undone", "not in their books")
        await coordinator.resume("s", trip)
        stage.is_deaf = False
        await coordinator.resume("s", trip, forward=True)
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        with pytest.raises(MisuseError, match=r"expected undone or kept, for stage 'deaf', got retry\. It has neither a probe nor"):
            await coordinator.settle("s", "child/deaf", "retry", "once more")
        return late

    late = run(main())

    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child", "child/deaf"]
    assert world.standing == {"s/child/deaf": 1, "s/child~2/deaf": 1}


@pytest.mark.parametrize("is_undone", [False, True], ids=["stuck", "undone"])
def test_to_hear_of_a_saga_of_one_execution_is_not_to_have_heard_of_that_of_another(is_undone: bool) -> None:
    """Promise 5: what had come late in the first one, whose process died before that was told, stood, and there was nothing to settle."""
    world = World({})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport, SagaReport]:
        first, second = DeafByKey(world), DeafByKey(world)
        trip, again = nested_in(first, "child"), nested_in(second, "child")
        coordinator = SagaCoordinator(ledger=ledger)
        await coordinator.run(trip, saga_id="s")
        await coordinator.settle("s", "child/deaf", "undone", "not in their books")
        await coordinator.resume("s", trip)
        await coordinator.resume("s", again, forward=True)
        if is_undone:
            await coordinator.settle("s", "child~2/deaf", "undone", "nor in their books")
            assert (await coordinator.resume("s", again)).status is SagaStatus.COMPENSATED
        ledger.stage = "child"
        first.released.set()
        await settled_down()
        assert ledger.has_stopped()
        second.released.set()
        await settled_down()
        late = await coordinator.report("s")
        resumed = await SagaCoordinator(ledger=ledger).resume("s", again)
        return late, resumed, await coordinator.report("s")

    late, resumed, asked_again = run(main())

    assert world.standing == {"s/child/deaf": 1, "s/child~2/deaf": 1}
    for report in (late, resumed):
        assert report.status is SagaStatus.STUCK
        assert report.ended_at is not None
        assert [failure.kind for failure in report.failures].count(FailureKind.LATE) == 1
        assert {*report.in_doubt} >= {"child", "child/deaf"}
    assert asked_again == resumed


def test_a_retry_within_a_child_is_proposed_and_taken_in_the_execution_that_goes_on_with_it() -> None:
    """Also in a later one than the first: of what is within that, nothing has turned back."""
    world = World({})

    class Patient(DeafByKey):
        async def _wait(self) -> None:
            await self.released.wait()

    stage = Patient(world)
    halts = FailFast(on_failure="halt")
    middle = nested_in(stage, "grandchild", policy=PROMPT.model_copy(update={"on_failure": "halt"}))
    trip = Pipeline(name="outer").with_stage("child", nested(middle, halts))
    coordinator = SagaCoordinator(halts)

    async def main() -> tuple[SagaReport, SagaReport, SagaReport, SagaReport]:
        stage.is_deaf = False
        await coordinator.run(trip, saga_id="s")
        await coordinator.compensate("s", trip)
        stage.is_deaf = True
        halted = await coordinator.resume("s", trip, forward=True)
        asked, within = await coordinator.report("s"), await coordinator.report("s/child~2/grandchild")
        stage.is_deaf = False
        await coordinator.settle("s", "child~2/grandchild/deaf", "retry", "they have not heard of it")
        return halted, asked, within, await coordinator.resume("s", trip, forward=True)

    halted, asked, within, resumed = run(main())

    assert halted == asked
    assert asked.stages["child"].children[-1].stages["grandchild"].children[0] == within
    assert within.stages["deaf"].verdicts == ("undone", "kept", "retry")
    assert resumed.ok
    assert world.standing == {"s/child~2/grandchild/deaf": 1}


def test_no_saga_is_compensated_while_something_of_an_execution_before_is_stuck() -> None:
    """Promise 5: its own stages were undone, and what had come late in the first saga of one of them stood."""

    async def main() -> tuple[World, SagaReport, SagaReport, SagaReport, SagaReport]:
        world, coordinator, trip, inner, first = await late_within(OnlyOnce, fails=True, again=True, compensates=True)
        late = await coordinator.report("s")
        with pytest.raises(MisuseError, match="undone, while these are: book/deaf"):
            await coordinator.settle("s", "book", "undone", "looked")
        tried = await coordinator.resume("s", trip)
        assert world.standing == {"deaf": 1}
        await coordinator.resume("s/book", inner)
        return world, first, late, tried, await coordinator.settle("s", "book", "undone", "its first saga is undone")

    world, first, late, tried, settled = run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert late.status is tried.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["book", "book/deaf"]
    assert "something came late in its saga s/book, of execution 1, when the saga had gone on with execution 2" in str(late)
    assert settled.status is SagaStatus.COMPENSATED
    assert settled.clean
    assert world.standing == {}


def test_what_is_told_of_an_execution_before_can_be_said_though_the_process_died_before_its_saga_heard() -> None:
    ledger = StopsAtWord()

    async def main() -> tuple[World, list[SagaReport]]:
        world, coordinator, _, inner, _ = await late_within(OnlyOnce, fails=True, again=True, compensates=True, ledger=ledger)
        assert ledger.has_stopped()
        recorded = len(await ledger.read("s"))
        left = [await coordinator.report("s"), await coordinator.report("s")]
        assert len(await ledger.read("s")) == recorded
        kept = await coordinator.settle("s", "book", "kept", "it may stand")
        await coordinator.compensate("s/book", inner)
        return world, [*left, kept]

    world, (left, again, kept) = run(main())

    assert left.status is SagaStatus.STUCK
    assert left == again
    assert "something came late in its saga s/book, of execution 1, when the saga had gone on with execution 2" in str(left)
    assert kept.status is SagaStatus.HALTED
    assert "book" in kept.kept
    assert world.standing == {}


def test_what_came_late_within_a_child_that_had_halted_is_told_though_the_process_died_before_its_saga_heard() -> None:
    """Promise 5: the child keeps it, so nothing of that one is in question; and its saga was compensated, and clean."""
    world = World({"deaf": ()})
    ledger = StopsAtWord()

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = DeniedByProbe(world)
        trip = Pipeline(name="trip").with_stage("child", nested(Pipeline(name="of_inner").with_stage("inner", Fails(nested_in(stage)))))
        await SagaCoordinator(ledger=ledger).run(trip, saga_id="s")
        ledger.stage = "inner"
        stage.released.set()
        await settled_down()
        assert ledger.has_stopped()
        assert world.standing == {"deaf": 1}
        coordinator = SagaCoordinator(ledger=ledger)
        return await coordinator.report("s"), await coordinator.resume("s", trip)

    left, resumed = run(main())

    assert left.status is SagaStatus.STUCK
    assert [*left.in_doubt] == ["child", "child/inner"]
    assert resumed.status is SagaStatus.COMPENSATED
    assert resumed.clean
    assert world.standing == {}


@pytest.mark.parametrize("alive", [False, True])
def test_what_comes_late_within_a_halted_child_of_an_execution_before_waits_for_a_person(alive: bool) -> None:
    """Promise 5: there it counts as kept, its stage finds it no more, and the saga above was complete, with nothing left to do."""
    world, pipeline = scene({"seat": ()}, {"seat": Script(before=20)})

    async def main() -> tuple[SagaReport, SagaReport, SagaReport]:
        stage = FirstIsDeaf(world)
        inner = nested_in(stage)
        trip = pipeline.with_stage("child", Fails(inner), dependencies=("seat",))
        coordinator = SagaCoordinator()
        await coordinator.run(trip, saga_id="s")
        if alive:
            await resumed_while_it_comes_late(coordinator, stage, trip)
        else:
            assert (await coordinator.resume("s", trip, forward=True)).ok
            stage.released.set()
        await settled_down()
        assert world.standing == {"seat": 1, "s/child/deaf": 1, "s/child~2/deaf": 1}
        late = await coordinator.report("s")
        undone = await coordinator.compensate("s/child", inner)
        return late, undone, await coordinator.settle("s", "child", "kept", "its second booking stands, and the first is undone")

    late, undone, settled = run(main())

    assert [child.status for child in late.stages["child"].children] == [SagaStatus.HALTED, SagaStatus.COMPLETED]
    assert late.status is SagaStatus.STUCK
    assert [*late.in_doubt] == ["child"]
    assert "something came late in its saga s/child, of execution 1, when the saga had gone on with execution 2" in str(late)
    assert undone.status is SagaStatus.COMPENSATED
    assert settled.status is SagaStatus.COMPLETED
    assert settled.clean
    assert world.standing == {"seat": 1, "s/child~2/deaf": 1}


def test_what_comes_late_within_a_plain_stage_is_undone_by_itself_when_its_saga_is_at_rest() -> None:
    world = World({"deaf": ()})
    stage = Doubtful(world)
    inner = nested_in(stage)
    may_end = asyncio.Event()

    async def book(ctx: Any) -> None:
        await ctx.run_saga(inner, policy=PROMPT)

    async def wait(_: Any) -> None:
        stage.released.set()
        await may_end.wait()

    async def main() -> SagaReport:
        trip = Pipeline(name="trip").with_stage("book", book, "work").with_stage("wait", wait, "work", dependencies=("book",))
        coordinator = SagaCoordinator()
        running = asyncio.create_task(coordinator.run(trip, saga_id="s"))
        while "deaf" not in world.standing:
            await elapse(1)
        await settled_down()
        with pytest.raises(MisuseError, match="a saga that no other one runs"):
            await coordinator.compensate("s/book", inner)
        may_end.set()
        assert not (await running).clean
        await coordinator.compensate("s/book", inner)
        return await coordinator.report("s")

    report = run(main())

    assert report.status is SagaStatus.COMPLETED
    assert report.clean
    assert world.standing == {}


def test_what_comes_late_in_a_saga_that_broke_off_does_not_bring_it_to_its_end() -> None:
    """Or it would be at rest and RUNNING, and nobody would recover it."""
    world = World({"deaf": ()})

    class Breaks(MemoryLedger):
        breaks = True

        async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
            if self.breaks and any(isinstance(event, SagaEnded) for event in events):
                self.breaks = False
                raise OSError("disk full")
            await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)

    async def main() -> tuple[SagaReport, SagaReport]:
        stage = Deaf(world)
        pipeline = nested_in(stage)
        coordinator = SagaCoordinator(PROMPT, ledger=Breaks())
        with pytest.raises(LedgerError):
            await coordinator.run(pipeline, saga_id="s")
        stage.released.set()
        await settled_down()
        late = await coordinator.report("s")
        return late, (await coordinator.recover(pipeline)).reports["s"]

    late, recovered = run(main())

    assert late.stages["deaf"].late_output is not None
    assert late.ended_at is None
    assert recovered.status is SagaStatus.COMPENSATED
    assert world.standing == {}
