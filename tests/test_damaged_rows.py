"""A saga whose row in the ledger is damaged, on disk or by hand: what is told of it, and what becomes of the others."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stageflow.api import Pipeline

from saga import FailFast, FailureKind, LedgerCorrupt, Recovery, SagaCoordinator, SagaError, SagaReport, SagasDamaged, SagaStatus, nested
from saga.blueprint import Blueprint
from saga.events import SagaStarted, StageStarted
from saga.ledger import ALIVE, Ledger
from tests.places import Place, SQLiteFile
from tests.test_ledger_contract import append, create, on, read, started
from tests.world import Script, World, scene


def damage(place: Any, what: str, saga_id: str) -> None:
    """Change the saga's row past the ledger."""
    place.execute(f"UPDATE sagas SET {what} WHERE id = '{saga_id}'")  # noqa: S608 - constants


def left_behind(place: Place, pipeline: Pipeline, *saga_ids: str, parent: str | None = None) -> None:
    """Sagas whose process is gone."""
    stage = None if parent is None else "child"

    async def leave(ledger: Ledger) -> None:
        for saga_id in saga_ids:
            begun = SagaStarted(
                saga_id=saga_id,
                pipeline=pipeline.name,
                graph=Blueprint.of(pipeline).graph,
                policy=FailFast(),
                parent=parent,
                parent_stage=stage,
            )
            await ledger.release(saga_id, await ledger.create(saga_id, "gone", [begun]))

    on(place.open(), leave)


def recover(place: Place, *pipelines: Pipeline) -> Recovery:
    found: Recovery = on(place.open(), lambda ledger: SagaCoordinator(ledger=ledger).recover(pipelines))[0]
    return found


STATUS = "status = 'lost'"
NO_SENSE = {
    "sqlite": [STATUS, "status = x'00'", "status = CAST(x'72ff' AS TEXT)", "started_at = 'long ago'", "updated_at = 3", "pipeline = x'70'"],
    "postgres": [STATUS, "started_at = 'infinity'", "updated_at = '20000-01-01'"],
}


def test_rows_of_which_no_sense_can_be_made_hide_no_other(durable: Place) -> None:
    changes = NO_SENSE["sqlite" if isinstance(durable, SQLiteFile) else "postgres"]
    damaged = [f"t{number}" for number in range(len(changes))]
    on(durable.open(), *map(create, ("s", *damaged, "u")))
    for saga_id, change in zip(damaged, changes, strict=True):
        damage(durable, change, saga_id)

    answers = on(durable.open(), lambda ledger: ledger.list(), lambda ledger: ledger.list(statuses=ALIVE))

    for told in answers:
        assert isinstance(told, SagasDamaged)
        assert [entry.saga_id for entry in told.entries] == ["s", "u"]
        assert [*told.damaged] == damaged
        for saga_id, why in told.damaged.items():
            assert str(why).startswith(f"the ledger is damaged: where saga {saga_id} stands can't be read: ")
            assert f"Nothing was changed. Look what its events say (saga show {saga_id})" in str(why)
            assert str(why) in str(told)


def test_the_commands_for_a_damaged_saga_can_be_run_as_they_are_told_whatever_its_id(durable: Place) -> None:
    on(durable.open(), create("trip; reboot"))
    damage(durable, STATUS, "trip; reboot")

    (told,) = on(durable.open(), lambda ledger: ledger.list())

    assert "(saga show 'trip; reboot') and go on with it by its id (saga resume 'trip; reboot')" in str(told)


def test_a_saga_whose_status_makes_no_sense_is_passed_over_by_nobody_who_asks_for_some(durable: Place) -> None:
    on(durable.open(), create("s"), create("t"))
    damage(durable, STATUS, "t")

    stuck, running = on(
        durable.open(), *(lambda ledger, one=one: ledger.list(statuses={one}) for one in (SagaStatus.STUCK, SagaStatus.RUNNING))
    )

    for told, others in ((stuck, []), (running, ["s"])):
        assert isinstance(told, SagasDamaged)
        assert [entry.saga_id for entry in told.entries] == others


def test_a_text_that_is_no_text_any_more_is_shown_as_it_is(tmp_path: Any) -> None:
    place = SQLiteFile(tmp_path / "sagas.db")
    on(place.open(), create())
    damage(place, "owner = CAST(x'6dff' AS TEXT)", "s")

    ((entry,),) = on(place.open(), lambda ledger: ledger.list())

    assert entry.owner == r"m\xff"


def test_recover_goes_on_with_all_sagas_but_the_one_that_is_damaged_and_says_which(durable: Place) -> None:
    world, pipeline = scene({"a": ()})
    left_behind(durable, pipeline, "s", "t", "u")
    damage(durable, STATUS, "t")

    first = recover(durable, pipeline)
    (resumed,) = on(durable.open(), lambda ledger: SagaCoordinator(ledger=ledger).resume("t", pipeline))
    second = recover(durable, pipeline)

    assert {saga_id: report.status for saga_id, report in first.reports.items()} == dict.fromkeys("su", SagaStatus.COMPLETED)
    assert [*first.failed] == ["t"]
    assert (
        str(first).splitlines()[-1].startswith("t: not recovered, the ledger is damaged: where saga t stands can't be read: 'lost' is not")
    )
    assert resumed.status is SagaStatus.COMPLETED
    assert str(second) == "No saga has lost its process."
    assert world.log == ["+a"] * 3


def test_recover_leaves_what_a_damaged_saga_runs_to_it(durable: Place) -> None:
    world, child = scene({"a": ()})
    parent = Pipeline(name="parent").with_stage("child", nested(child), "work")
    left_behind(durable, parent, "s")
    left_behind(durable, child, "s/child", parent="s")
    left_behind(durable, child, "other")
    damage(durable, STATUS, "s")

    recovery = recover(durable, parent, child)

    assert [*recovery.reports] == ["other"]
    assert [*recovery.failed] == ["s"]
    assert world.log == ["+a"]


def test_recover_that_finds_a_row_damaged_on_its_second_look_says_so(durable: Place) -> None:
    """It looks once more when sagas have come to rest that run others."""
    _, child = scene({"a": ()})
    left_behind(durable, child, "s", "t")
    left_behind(durable, child, "t/child", parent="t")

    def strike(saga_id: str, event: Any) -> None:
        if saga_id == "s" and isinstance(event, StageStarted):
            damage(durable, STATUS, "t/child")

    (recovery,) = on(durable.open(), lambda ledger: SagaCoordinator(ledger=ledger, listeners=[strike]).recover(child))

    assert sorted(recovery.reports) == ["s", "t"]
    assert str(recovery.failed["t/child"]).startswith("the ledger is damaged: where saga t/child stands can't be read")


# -- a row that disagrees with the saga's events ---------------------------------------------------------------------


@pytest.mark.parametrize("change", ["pipeline = 'q'", "parent = NULL", "parent = 't'", "parent_stage = 'b'", "parent_stage = NULL"])
def test_a_row_that_disagrees_with_how_the_saga_began_is_noticed_by_whoever_reads_it(durable: Place, change: str) -> None:
    on(durable.open(), create("s"), create("s/a", parent="s"))
    damage(durable, change, "s/a")

    events, other = on(durable.open(), read("s/a"), read())

    assert isinstance(events, LedgerCorrupt)
    assert "saga s/a can't be read at event 0: it began with " in str(events)
    assert "Nothing was changed" in str(events)
    assert other == (started(),)


def family() -> tuple[World, Pipeline, Pipeline]:
    """A pipeline whose one stage runs another one, of one stage in the world."""
    world, child = scene({"a": ()})
    return world, Pipeline(name="parent").with_stage("child", nested(child)), child


PARENT = ["parent = NULL", "parent = 'x'", "parent_stage = 'x'"]


@pytest.mark.parametrize("change", PARENT)
def test_a_child_whose_row_has_lost_its_parent_is_not_run_beside_another_one(durable: Place, change: str) -> None:
    world, parent, child = family()
    left_behind(durable, parent, "s")
    on(durable.open(), append(StageStarted(stage="child", attempt=1)))
    left_behind(durable, child, "s/child", parent="s")
    damage(durable, change, "s/child")

    recovery = recover(durable, parent, child)

    assert world.log == []
    assert recovery.reports["s"].status is SagaStatus.STUCK
    assert [*recovery.reports["s"].stuck] == ["child"]
    assert [*recovery.failed] == ["s/child"]


@pytest.mark.parametrize("change", PARENT)
def test_a_saga_is_not_called_undone_while_a_child_stands_whose_row_has_lost_it(durable: Place, change: str) -> None:
    """Promise 5."""
    world, parent, _ = family()
    on(durable.open(), lambda ledger: SagaCoordinator(ledger=ledger).run(parent, saga_id="s"))
    damage(durable, change, "s/child")

    (report,) = on(durable.open(), lambda ledger: SagaCoordinator(ledger=ledger).compensate("s", parent))

    assert world.log == ["+a"]
    assert report.status is SagaStatus.STUCK
    assert [*report.stuck] == ["child"]
    assert "saga s/child" in str(report)


def test_no_flipped_bit_of_a_parents_name_has_its_child_forgotten(tmp_path: Path) -> None:
    """It is in rows and in indexes, and SQLite looks for children in an index."""
    place = SQLiteFile(tmp_path / "sagas.db")
    world, parent, _ = family()
    on(place.open(), lambda ledger: SagaCoordinator(ledger=ledger).run(parent, saga_id="the-parent"))
    whole = place.path.read_bytes()
    counted: Counter[str] = Counter()

    async def undo(ledger: Ledger) -> str:
        try:
            return (await SagaCoordinator(ledger=ledger).compensate("the-parent", parent)).status.value
        except SagaError as error:
            return type(error).__name__

    for found in re.finditer(b"the-parent", whole):
        damaged = bytearray(whole)
        damaged[found.start()] ^= 1
        place.path.write_bytes(damaged)
        world.log.clear()
        world.standing["a"] = 1

        (outcome,) = on(place.open(), undo)

        assert outcome != "compensated" or world.log == ["-a"], found
        counted[outcome] += 1
    assert counted["compensated"] > 1
    assert counted["stuck"] > 1


@pytest.mark.parametrize("change", PARENT)
def test_a_stage_without_a_fallback_that_left_nothing_is_not_called_stuck_for_one_when_its_childs_row_is_damaged(
    durable: Place, change: str
) -> None:
    """It was said that the process of its fallback was gone, and what it depended on was held back."""
    world, flat = scene({"a": (), "b": ()}, {"b": Script("raise")})
    child = Pipeline(name="child").with_stage("b", flat.stages["b"].runner)
    parent = Pipeline(name="parent").with_stage("a", flat.stages["a"].runner)
    parent = parent.with_stage("child", nested(child), dependencies=("a",))
    on(durable.open(), lambda ledger: SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(parent, saga_id="s"))
    damage(durable, change, "s/child")

    (report,) = on(durable.open(), lambda ledger: SagaCoordinator(ledger=ledger).compensate("s", parent))

    assert world.log == ["+a", "-a"]
    assert report.status is SagaStatus.COMPENSATED
    assert [failure.kind for failure in report.failures] == [FailureKind.EXCEPTION]


def test_a_child_whose_status_makes_no_sense_goes_on_with_its_parent_by_its_events(durable: Place) -> None:
    world, parent, child = family()
    left_behind(durable, parent, "s")
    on(durable.open(), append(StageStarted(stage="child", attempt=1)))
    left_behind(durable, child, "s/child", parent="s")
    damage(durable, STATUS, "s/child")

    first, second = recover(durable, parent, child), recover(durable, parent, child)

    assert first.reports["s"].status is SagaStatus.COMPLETED
    assert [report.saga_id for report in first.reports["s"].stages["child"].children] == ["s/child"]
    assert [*first.failed] == ["s/child"]
    assert str(second) == "No saga has lost its process."
    assert world.log == ["+a"]


def test_a_child_whose_status_makes_no_sense_is_undone_with_its_parent_and_named_by_its_path(durable: Place) -> None:
    world, child = scene({"a": ()}, {"a": Script(undo_fails=3)})
    parent = Pipeline(name="parent").with_stage("child", nested(child), "work")
    on(durable.open(), lambda ledger: SagaCoordinator(ledger=ledger).run(parent, saga_id="s"))
    damage(durable, STATUS, "s/child")

    async def undo(ledger: Ledger) -> list[SagaReport]:
        coordinator = SagaCoordinator(FailFast(), ledger=ledger)
        stuck = await coordinator.compensate("s", parent)
        damage(durable, STATUS, "s/child")
        await coordinator.settle("s", "child/a", "undone", "by hand")
        return [stuck, await coordinator.resume("s", parent)]

    ((stuck, undone),) = on(durable.open(), undo)

    assert [*stuck.stuck] == ["child", "child/a"]
    assert undone.status is SagaStatus.COMPENSATED
    assert world.log == ["+a"]
