"""Whatever happens in one branch, the other one's output is never lost and its effect never left behind: promises 3 and 4."""

from __future__ import annotations

import asyncio

import pytest

from saga import FailFast, SagaCoordinator, SagaReport, SagaStatus, StageState
from tests.controlled import elapse, run
from tests.world import BRANCHES, DIAMOND, FAN_IN, SEQUENCE, Script, World, scene

BAD = ["raise", "fail", "wrong", "retry", "die", "timeout"]
POLICIES = [FailFast(timeout=50), FailFast(timeout=50, in_flight="cancel")]


def bad(outcome: str, before: float = 0.0) -> Script:
    """A script that comes to a bad end; a timeout is a hang under the policies' limit of 50 s."""
    return Script("hang" if outcome == "timeout" else outcome, before=before)


def through(world: World, report: SagaReport) -> None:
    """What holds whatever happened: the world refused nothing, and the report agrees with it."""
    assert world.refusals == []
    standing = {name for name, stage in report.stages.items() if stage.state in {StageState.KEPT, StageState.STUCK, StageState.BLOCKED}}
    assert standing == set(world.standing)
    for name, stage in report.stages.items():
        if f"+{name}" in world.log:
            assert stage.output is not None or stage.state in {StageState.FAILED, StageState.IN_DOUBT}


@pytest.mark.parametrize("outcome", BAD)
@pytest.mark.parametrize(
    ("b_takes", "c_takes"),
    [(1, 20), (20, 0), (0, 0), (10, 10), (10, 20)],
    ids=["b first", "c first", "same tick at once", "same tick later", "while c runs"],
)
def test_a_branch_that_fails_at_any_moment_leaves_nothing_of_the_other_behind(outcome: str, b_takes: float, c_takes: float) -> None:
    world, pipeline = scene(BRANCHES, {"b": bad(outcome, b_takes), "c": Script(before=c_takes)})

    report = run(SagaCoordinator(FailFast(timeout=100)).run(pipeline))

    through(world, report)
    if b_takes == c_takes == 0 and outcome != "timeout":
        # B failed before C's first step, and a saga that stops starts no further stage.
        assert report.not_run == ("c",)
    else:
        assert report.stages["c"].state is StageState.UNDONE
        assert report.stages["c"].output is not None
        assert report.stages["c"].output.data == {"stage": "c"}
    assert report.cause is not None
    assert report.cause.stage == "b"
    in_doubt = outcome == "timeout"
    # A timed-out stage without a probe is in doubt, and what it depends on is held back.
    assert report.status is (SagaStatus.STUCK if in_doubt else SagaStatus.COMPENSATED)
    assert set(world.standing) == ({"a"} if in_doubt else set())


def test_what_fails_in_the_same_tick_is_all_in_the_report_the_first_as_the_cause() -> None:
    world, pipeline = scene(FAN_IN, {"a": Script("raise", before=3), "b": Script("fail", before=3), "c": Script(before=3)})

    report = run(SagaCoordinator().run(pipeline))

    through(world, report)
    assert report.cause is not None
    assert report.cause.stage == "a"
    assert [failure.stage for failure in report.failures] == ["a", "b"]
    assert report.stages["c"].state is StageState.UNDONE


def test_a_sibling_that_runs_is_drained_before_the_first_compensation() -> None:
    world, pipeline = scene(BRANCHES, {"b": Script("raise", before=1), "c": Script(before=10, after=10)})

    report = run(SagaCoordinator(FailFast(drain_timeout=None)).run(pipeline))

    through(world, report)
    assert world.log == ["+a", "+c", "-c", "-a"]


def test_a_sibling_that_is_cancelled_in_flight_is_in_doubt_and_holds_its_ancestors() -> None:
    world, pipeline = scene(BRANCHES, {"b": Script("raise", before=1), "c": Script(before=2)})

    report = run(SagaCoordinator(FailFast(in_flight="cancel")).run(pipeline))

    assert world.refusals == []
    assert report.stages["c"].state is StageState.IN_DOUBT
    assert report.stages["a"].state is StageState.BLOCKED
    assert report.status is SagaStatus.STUCK
    assert not report.clean


def test_a_sibling_that_is_cancelled_in_flight_is_asked_whether_it_landed() -> None:
    kinds = {"c": "probed"}
    landed = scene(BRANCHES, {"b": Script("raise", before=2), "c": Script(before=1, after=9)}, kinds)
    not_landed = scene(BRANCHES, {"b": Script("raise", before=1), "c": Script(before=9)}, kinds)

    for world, pipeline in (landed, not_landed):
        report = run(SagaCoordinator(FailFast(in_flight="cancel")).run(pipeline))

        assert world.refusals == []
        assert world.standing == {}
        assert report.status is SagaStatus.COMPENSATED
    assert landed[0].log == ["+a", "+c", "-c", "-a"]
    assert not_landed[0].log == ["+a", "-a"]


def test_a_drain_that_takes_too_long_ends_in_a_cancel() -> None:
    world, pipeline = scene(BRANCHES, {"b": Script("raise", before=1), "c": Script("hang")}, {"c": "probed"})

    report = run(SagaCoordinator(FailFast(drain_timeout=7)).run(pipeline))

    assert world.refusals == []
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED


SHAPES = {"sequence": SEQUENCE, "branches": BRANCHES, "diamond": DIAMOND, "fan-in": FAN_IN}


@pytest.mark.parametrize("policy", POLICIES, ids=["drain", "cancel"])
@pytest.mark.parametrize("outcome", BAD)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_failure_of_any_stage_in_any_shape_brings_the_world_back(shape: str, outcome: str, policy: FailFast) -> None:
    for victim in SHAPES[shape]:
        scripts = {name: Script(before=1, after=1) for name in SHAPES[shape]} | {victim: bad(outcome, 1.5)}
        world, pipeline = scene(SHAPES[shape], scripts, dict.fromkeys(SHAPES[shape], "probed"))

        report = run(SagaCoordinator(policy).run(pipeline))

        through(world, report)
        assert world.standing == {}
        assert report.status is SagaStatus.COMPENSATED
        assert report.cause is not None
        assert report.cause.stage == victim
        assert scripts[victim].attempts, "the fault was not reached"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cancel_by_a_stage_keeps_what_was_done(shape: str) -> None:
    for victim in SHAPES[shape]:
        scripts = {name: Script(before=1, after=1) for name in SHAPES[shape]} | {victim: Script("cancel", before=1.5)}
        world, pipeline = scene(SHAPES[shape], scripts)

        report = run(SagaCoordinator().run(pipeline))

        through(world, report)
        assert report.status is SagaStatus.CANCELLED
        assert report.stages[victim].state is StageState.CANCELLED
        assert set(report.kept) == set(world.standing)
        assert world.undone() == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cancel_by_a_stage_undoes_what_was_done_when_the_policy_says_so(shape: str) -> None:
    for victim in SHAPES[shape]:
        world, pipeline = scene(SHAPES[shape], {victim: Script("cancel", before=1.5)})

        report = run(SagaCoordinator(FailFast(on_cancel="compensate")).run(pipeline))

        through(world, report)
        assert world.standing == {}
        assert report.status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("policy", POLICIES, ids=["drain", "cancel"])
@pytest.mark.parametrize(
    ("shape", "at"),
    # Each stage takes two seconds: the last one runs from 4 s on where three follow on each other, else from 2 s on.
    [(shape, at) for shape in SHAPES for at in (0.5, 1, 1.5, 2, 2.5, 3.5, *((4, 4.5, 5.5) if shape in {"sequence", "diamond"} else ()))],
)
def test_the_callers_own_cancellation_at_any_moment_brings_the_world_back(shape: str, at: float, policy: FailFast) -> None:
    scripts = {name: Script(before=1, after=1) for name in SHAPES[shape]}
    world, pipeline = scene(SHAPES[shape], scripts, dict.fromkeys(SHAPES[shape], "probed"))
    coordinator = SagaCoordinator(policy)

    async def cancelled() -> SagaReport:
        task = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(at)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert "saga" in "".join(caught.value.__notes__).lower()
        return await coordinator.report("s")

    report = run(cancelled())

    assert world.refusals == []
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.stage is None
