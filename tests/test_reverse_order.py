"""What took effect is undone in reverse dependency order: promise 1."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from saga import Compensation, FailFast, SagaCoordinator, SagaReport, SagaStatus, StageState
from saga.failures import FailureKind
from tests.controlled import run
from tests.world import DIAMOND, FAN_IN, SEQUENCE, Script, World, scene


def failing(shape: Mapping[str, tuple[str, ...]], policy: FailFast | None = None, /, **scripts: Script) -> tuple[World, SagaReport]:
    world, pipeline = scene(shape, scripts)
    report = run(SagaCoordinator(policy).run(pipeline))
    assert world.refusals == []
    return world, report


def test_in_a_sequence_the_failure_of_the_second_undoes_the_first_and_never_runs_the_third() -> None:
    world, report = failing(SEQUENCE, b=Script("raise"))

    assert world.log == ["+a", "-a"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["a"].output is not None
    assert report.stages["a"].output.data == {"stage": "a"}
    assert (report.stages["a"].state, report.failed, report.not_run) == (StageState.UNDONE, ("b",), ("c",))
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind, report.cause.type) == ("b", FailureKind.EXCEPTION, "tests.world.CardDeclined")


def test_in_a_diamond_the_failure_of_a_branch_never_runs_what_joins_them() -> None:
    world, report = failing(DIAMOND, b=Script("raise", before=1), c=Script(before=2))

    assert world.standing == {}
    assert sorted(world.log) == ["+a", "+c", "-a", "-c"]
    assert world.undone() == ["c", "a"]
    assert report.not_run == ("d",)


def test_in_a_diamond_the_failure_of_the_join_undoes_both_branches_at_once_and_then_the_root() -> None:
    world, report = failing(DIAMOND, d=Script("raise"), b=Script(undo_takes=1), c=Script(undo_takes=1))

    assert world.most_undone_at_once == 2
    assert world.undone()[-1] == "a"
    assert set(report.undone) == {"a", "b", "c"}
    assert report.compensation_order[-1] == "a"


def test_when_the_join_of_a_diamond_is_undone_both_branches_are_undone_at_once() -> None:
    world, report = failing(DIAMOND | {"e": ("d",)}, e=Script("raise"), b=Script(undo_takes=1), c=Script(undo_takes=1))

    assert report.compensation_order[0] == "d"
    assert world.most_undone_at_once == 2
    assert world.undone()[-1] == "a"


def test_a_fan_in_that_fails_has_all_its_inputs_undone_at_once() -> None:
    slow = {name: Script(undo_takes=1) for name in "abc"}

    world, report = failing(FAN_IN, d=Script("fail"), **slow)

    assert world.most_undone_at_once == 3
    assert world.standing == {}
    assert report.failed == ("d",)


def test_a_stage_without_compensation_between_two_that_have_one_still_orders_them() -> None:
    shape = {"a": (), "middle": ("a",), "c": ("middle",), "d": ("c",)}
    world, pipeline = scene(shape, {"c": Script(undo_takes=5), "d": Script("raise")}, {"middle": "plain"})

    report = run(SagaCoordinator().run(pipeline))

    assert world.refusals == []
    assert world.undone() == ["c", "a"]
    assert world.most_undone_at_once == 1
    assert report.kept.keys() == {"middle"}


def test_with_one_compensation_at_a_time_the_order_is_the_reverse_of_the_start_order() -> None:
    shape = {**dict.fromkeys("abcdefgh", ()), "z": tuple("abcdefgh")}
    policy = FailFast(compensation=Compensation(max_concurrency=1))

    world, report = failing(shape, policy, z=Script("raise"), **{name: Script(undo_takes=1) for name in "abcdefgh"})

    assert world.most_undone_at_once == 1
    assert world.undone() == list("hgfedcba")
    assert report.compensation_order == tuple("hgfedcba")


@pytest.mark.parametrize("limit", [2, 3])
def test_no_more_compensations_run_at_once_than_the_policy_allows(limit: int) -> None:
    shape = {**dict.fromkeys("abcdefgh", ()), "z": tuple("abcdefgh")}
    policy = FailFast(compensation=Compensation(max_concurrency=limit))

    world, _ = failing(shape, policy, z=Script("raise"), **{name: Script(undo_takes=1) for name in "abcdefgh"})

    assert world.most_undone_at_once == limit
    assert world.standing == {}


def test_a_chain_of_three_hundred_stages_is_undone_to_its_root() -> None:
    shape = {f"s{i}": (f"s{i - 1}",) if i else () for i in range(300)}
    # Declared backward: stageflow's own build would exceed the recursion limit.
    backward = dict(reversed(shape.items()))

    world, report = failing(backward, s299=Script("raise"))

    assert world.undone() == [f"s{i}" for i in reversed(range(299))]
    assert list(report.stages) == [f"s{i}" for i in range(300)]


def test_the_compensation_runs_on_the_object_that_executed() -> None:
    world, report = failing(SEQUENCE, c=Script("raise"))

    assert world.log == ["+a", "+b", "-b", "-a"]
    assert report.compensation_order == ("b", "a")
