"""What changes with a ledger that outlives the process: fewer writes, owners that say that they are alive, recovery, plain data."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, HttpUrl, RootModel, computed_field, field_serializer, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    LedgerConflict,
    LedgerError,
    MemoryLedger,
    MisuseError,
    PipelineInvalid,
    Recovery,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaError,
    SagaStatus,
    SagaUnrecorded,
    compensable,
    nested,
)
from saga.encoding import stored
from saga.events import AnyEvent, SagaEnded, SagaStarted, StageCompleted, StageProbed, StageStarted, event_from_json, event_to_json
from saga.live import heart
from saga.live.journal import Journal
from saga.testing.rehearsal import MortalLedger
from tests.controlled import ControlledLoop, elapse, run
from tests.dying import Dying
from tests.places import PostgresSchema, SQLiteFile
from tests.slow import SlowDisk
from tests.world import BRANCHES, DIAMOND, SEQUENCE, Script, World, scene


def test_a_completion_is_written_together_with_the_start_that_it_enables() -> None:
    world, pipeline = scene(SEQUENCE)
    ledger = SlowDisk()

    report = run(SagaCoordinator(ledger=ledger).run(pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]
    assert ledger.writes == [
        ["SagaStarted", "StageStarted"],
        ["StageCompleted", "StageStarted"],
        ["StageCompleted", "StageStarted"],
        ["StageCompleted", "SagaEnded"],
    ]


def test_where_each_turn_of_the_loop_takes_long_a_completion_still_waits_for_the_start_that_it_enables() -> None:
    _, pipeline = scene(SEQUENCE)
    ledger = SlowDisk()

    async def play() -> None:
        running = asyncio.create_task(SagaCoordinator(ledger=ledger).run(pipeline))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ControlledLoop)
        while not running.done():
            loop.compute(1)
            await asyncio.sleep(0)

    run(play())

    assert [events[0] for events in ledger.writes] == ["SagaStarted", "StageCompleted", "StageCompleted", "StageCompleted"]


def test_an_undo_is_written_together_with_the_next_one() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    ledger = SlowDisk()

    run(SagaCoordinator(ledger=ledger).run(pipeline))

    assert world.standing == {}
    assert ledger.writes[3:] == [
        ["StageFailed", "SagaTurnedBack", "CompensationStarted"],
        ["CompensationCompleted", "CompensationStarted"],
        ["CompensationCompleted", "SagaEnded"],
    ]


def test_what_nobody_waits_for_is_written_soon_all_the_same() -> None:
    _, pipeline = scene(BRANCHES, {"b": Script(before=60)})
    ledger = SlowDisk()
    coordinator = SagaCoordinator(ledger=ledger)

    async def play() -> tuple[list[Any], str | None]:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(1)
        seen = [event.stage for event in await ledger.read("s") if isinstance(event, StageCompleted)]
        (entry,) = await ledger.list()
        await running
        return seen, entry.owner

    seen, owner = run(play())

    assert seen == ["a", "c"]
    assert owner is not None, "whoever runs the saga has let go of it"


def test_many_first_stages_go_into_one_write_behind_the_one_that_creates_the_saga() -> None:
    shape: dict[str, tuple[str, ...]] = dict.fromkeys("abcdefgh", ())
    world, pipeline = scene(shape)
    ledger = SlowDisk()

    report = run(SagaCoordinator(ledger=ledger).run(pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert sorted(world.log) == [f"+{name}" for name in shape]
    assert ledger.writes[:2] == [["SagaStarted", "StageStarted"], ["StageStarted"] * 7]


@pytest.mark.parametrize("breaks_at", [SagaStarted, StageStarted, StageCompleted])
def test_when_the_first_write_fails_every_branch_learns_of_it_and_nothing_runs(breaks_at: type[Any]) -> None:
    shape: dict[str, tuple[str, ...]] = dict.fromkeys("abc", ()) | {"d": ("a", "b", "c")}
    world, pipeline = scene(shape)
    ledger = SlowDisk()
    ledger.breaks_at = breaks_at

    with pytest.raises(LedgerError, match="no space left"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))

    assert sorted(world.log) == (["+a", "+b", "+c"] if breaks_at is StageCompleted else [])


def test_what_was_to_be_written_soon_waits_for_no_saga_that_could_not_begin() -> None:
    """That the caller was cancelled is due to be written in the turn of the loop in which the ledger fails: no cancel ended that wait."""
    _, pipeline = scene(SEQUENCE)
    ledger = SlowDisk(seconds=1)
    ledger.breaks_at = SagaStarted

    async def play() -> set[str]:
        saga = asyncio.create_task(SagaCoordinator(ledger=ledger).run(pipeline))
        await elapse(1 - Journal.linger)
        saga.cancel()
        with pytest.raises(LedgerError, match="no space left"):
            await saga
        await elapse(1)
        return {str(task.get_coro()) for task in asyncio.all_tasks() - {asyncio.current_task()}}

    left = run(play())

    assert left == set()


def test_when_the_second_write_fails_those_who_waited_for_it_learn_of_it() -> None:
    class BreaksBehind(SlowDisk):
        async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
            raise OSError("no space left")

    shape: dict[str, tuple[str, ...]] = dict.fromkeys("abc", ())
    world, pipeline = scene(shape)

    with pytest.raises(LedgerError, match="no space left"):
        run(SagaCoordinator(ledger=BreaksBehind()).run(pipeline))

    assert world.log == []


@pytest.mark.parametrize("wait", [1.0019, 1.002, 1.0021])
def test_what_nobody_waits_for_is_taken_along_by_a_write_that_comes_first(wait: float) -> None:
    """The completion of "a" waits for its time to be written, or has just been told that it has come, when "c" is attempted again."""

    async def a(_: Any) -> None:
        await elapse(1)

    async def c(ctx: SagaContext) -> None:
        if ctx.attempt == 1:
            raise ConnectionError

    again = compensable(c, a, retry=Retry(attempts=2, wait=wait, jitter=False))
    ledger = SlowDisk(seconds=0)

    run(SagaCoordinator(ledger=ledger).run(Pipeline(name="p").with_stage("a", a, "work").with_stage("c", again)))

    assert [name for write in ledger.writes for name in write].count("StageCompleted") == 2


def test_what_could_not_be_written_late_is_told_to_whoever_records_next() -> None:
    world, pipeline = scene(BRANCHES, {"b": Script(before=60)})
    ledger = SlowDisk()
    ledger.breaks_at = StageCompleted

    with pytest.raises(LedgerError, match="no space left"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))

    assert world.log == ["+a"]


class BreaksOnce(SlowDisk):
    async def _written(self, events: Sequence[AnyEvent]) -> None:
        try:
            await super()._written(events)
        except OSError:
            self.breaks_at = None
            raise


def test_what_was_refused_behind_a_late_write_that_failed_is_told_as_what_that_one_failed_of() -> None:
    """It was told that the ledger had been put back."""
    world, pipeline = scene({"a": (), "b": (), "c": ("b",)}, {"a": Script(before=1), "b": Script(before=1.1)})
    ledger = BreaksOnce(seconds=0.25)
    ledger.breaks_at = StageCompleted

    with pytest.raises(SagaUnrecorded, match=r"because its ledger failed: .*: no space left") as caught:
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))

    assert ledger.writes[-1] == ["StageCompleted", "StageStarted"]  # and that was refused
    assert isinstance(caught.value.__cause__, LedgerError)
    assert isinstance(caught.value.__cause__.__cause__, OSError)
    assert (world.log, caught.value.in_effect, caught.value.unknown) == (["+a", "+b"], ("a", "b"), ())


def test_who_lost_its_lease_is_told_so_though_nobody_waited_for_the_write_that_was_refused() -> None:
    """What is in effect is for whoever runs the saga now to know."""
    world, pipeline = scene(BRANCHES, {"b": Script(before=60), "c": Script(before=1)})
    ledger = SlowDisk()

    async def play() -> LedgerConflict:
        running = asyncio.create_task(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
        await elapse(0.5)
        (entry,) = await ledger.list()
        await ledger.acquire("s", str(entry.owner))
        with pytest.raises(LedgerConflict) as lost:
            await running
        return lost.value

    lost = run(play())

    assert "the current one is 2" in str(lost)
    assert world.log == ["+a", "+c", "+b"]


def test_an_owner_says_that_it_is_alive_as_long_as_a_saga_of_its_is(caplog: pytest.LogCaptureFixture) -> None:
    _, pipeline = scene({"a": ()}, {"a": Script(before=45)})
    ledger = SlowDisk()
    coordinator = SagaCoordinator(ledger=ledger)

    async def play() -> None:
        await asyncio.gather(coordinator.run(pipeline), coordinator.run(pipeline))
        assert ledger.beats == 4
        await elapse(100)
        assert ledger.beats == 4

    run(play())

    assert "the ledger could not be told that" in caplog.text


def test_a_loop_ends_though_a_ctrl_c_struck_where_nobody_ran_yet_what_its_owners_hold() -> None:
    """Their hearts beat on, and asyncio.run waited for that: the process hung."""
    ledger = SlowDisk()
    owners = [SagaCoordinator(ledger=ledger)._keeper.held for _ in "12"]

    async def play() -> None:
        for held in owners:
            held.hold("s")
        await elapse(15)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), asyncio.Runner(loop_factory=ControlledLoop) as runner:
        runner.run(play())

    # When it was time to, and when they were cancelled.
    assert ledger.beats == 2 * len(owners)


class Begins(WeakSet[Any]):
    """Hearts of which another one begins, in another thread, while somebody goes through them."""

    def __iter__(self) -> Iterator[Any]:
        for one in super().__iter__():
            self.add(Begins)
            yield one


def test_an_owner_says_that_it_is_alive_in_a_loop_that_ends_while_another_one_begins_to_in_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its heart stood still with a RuntimeError, and what was still to be undone lost its lease."""
    monkeypatch.setattr(heart, "_HEARTS", Begins())
    ledger = SlowDisk()
    held = SagaCoordinator(ledger=ledger)._keeper.held
    undoing: list[asyncio.Task[None]] = []

    async def undo() -> None:
        held.hold("s")
        with contextlib.suppress(asyncio.CancelledError):
            await elapse(100)
        await elapse(25)
        held.let_go("s")

    async def play() -> None:
        undoing.append(asyncio.create_task(undo()))
        await elapse(1)

    with asyncio.Runner(loop_factory=ControlledLoop) as runner:
        runner.run(play())

    # When it was cancelled, and every ten seconds from then on.
    assert ledger.beats == 3


def test_an_owner_says_that_it_is_alive_in_a_loop_that_goes_on_after_everything_in_it_was_cancelled() -> None:
    ledger = SlowDisk()
    held = SagaCoordinator(ledger=ledger)._keeper.held

    async def hold(saga_id: str, seconds: float) -> None:
        held.hold(saga_id)
        await elapse(seconds)

    with asyncio.Runner(loop_factory=ControlledLoop) as runner:
        runner.run(hold("a", 5))
        (heart,) = asyncio.all_tasks(runner.get_loop())
        heart.cancel()
        runner.get_loop().run_until_complete(heart)
        before = ledger.beats
        runner.run(hold("b", 25))
        beats = ledger.beats - before

    assert beats == 2


def test_an_owner_that_held_nothing_for_a_while_says_again_that_it_is_alive() -> None:
    _, pipeline = scene({"a": ()}, {"a": Script(before=45)})
    ledger = SlowDisk()
    coordinator = SagaCoordinator(ledger=ledger)

    async def play() -> list[int]:
        beats = []
        for _ in range(2):
            await coordinator.run(pipeline)
            beats.append(ledger.beats)
        return beats

    assert run(play()) == [4, 8]


def stopped_by(durable: SQLiteFile | PostgresSchema, pipeline: Pipeline, world: World, *statements: str) -> SagaUnrecorded:
    """What the saga "s" ends with whose ledger somebody changes while its stage b runs."""

    async def play() -> SagaUnrecorded:
        async with durable.open() as ledger:

            def change(name: str) -> None:
                if name == "b":
                    for statement in statements:
                        durable.execute(statement)

            world.witness = change
            with pytest.raises(SagaUnrecorded) as caught:
                await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s")
            return caught.value

    return asyncio.run(play())


def test_a_saga_of_which_its_ledger_knows_nothing_any_more_says_what_is_in_effect(durable: SQLiteFile | PostgresSchema) -> None:
    """Nobody else goes on with it: a ledger from before it began was put in the place of its own, for example."""
    world, pipeline = scene(SEQUENCE)

    error = stopped_by(durable, pipeline, world, "DELETE FROM sagas")

    assert world.log == ["+a", "+b"]
    assert (error.in_effect, error.unknown) == (("a", "b"), ())
    assert str(error).startswith(
        "saga s stopped, because its ledger failed: there is no saga s. Nothing more was started. In effect: a, b;"
    )


class Short(MemoryLedger):
    """For a line of JSON that is to be made of what a stage gave there is no memory left; MemoryError is Python's own."""

    durable = True
    is_short = False

    @property
    def max_event_bytes(self) -> int | None:  # type: ignore[override] # what is asked when that line is made
        if self.is_short:
            raise MemoryError
        return None


def test_a_saga_whose_own_code_runs_out_of_memory_says_what_is_in_effect() -> None:
    ledger = Short()

    async def hungry(_: object) -> StageOutput:
        ledger.is_short = True
        return StageOutput.ok()

    world, pipeline = scene({"a": ()})
    pipeline = pipeline.with_stage("b", hungry, "work", dependencies=("a",))
    coordinator = SagaCoordinator(ledger=ledger)
    with pytest.raises(SagaUnrecorded, match=r"cut short by a MemoryError.* In effect: a;") as raised:
        run(coordinator.run(pipeline, saga_id="s"))
    ledger.is_short = False
    report = run(coordinator.compensate("s", pipeline))

    assert isinstance(raised.value.__cause__, MemoryError)
    assert report.status is SagaStatus.COMPENSATED
    assert not world.standing


class _Large(type):
    """For a copy of one there is no memory left; what asks for its type's hash is about to make one."""

    is_too_large = False

    def __hash__(cls) -> int:
        if _Large.is_too_large:
            raise MemoryError
        return super().__hash__()


class Scan(metaclass=_Large):
    pass


def test_a_saga_for_whose_report_there_is_no_memory_says_that_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scan(_: object) -> StageOutput:
        return StageOutput.ok(scan=Scan())

    def at_its_end(_: str, event: AnyEvent) -> None:
        monkeypatch.setattr(_Large, "is_too_large", isinstance(event, SagaEnded))

    coordinator = SagaCoordinator(listeners=[at_its_end])
    with pytest.raises(SagaError, match=r"saga s is completed, which is recorded; .* await coordinator.report\('s'\)") as raised:
        run(coordinator.run(Pipeline().with_stage("scan", scan, "work"), saga_id="s"))
    monkeypatch.undo()
    report = run(coordinator.report("s"))

    assert isinstance(raised.value.__cause__, MemoryError)
    assert list(report.kept) == ["scan"]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("DELETE FROM events WHERE first > 0; UPDATE sagas SET version = 2", "saga s has 2 events, expected 4: what comes before these"),
        ("UPDATE sagas SET token = 0, owner = 'you'", "saga s is written with lease token 1, the current one is 0: that"),
    ],
    ids=["events", "lease"],
)
def test_a_saga_whose_ledger_was_put_back_as_it_was_before_says_what_is_in_effect(
    durable: SQLiteFile | PostgresSchema, lost: str, said: str
) -> None:
    """Nobody else goes on with it, and what became of it since is not in the ledger."""
    world, pipeline = scene(SEQUENCE)

    error = stopped_by(durable, pipeline, world, *lost.split("; "))

    assert world.log == ["+a", "+b"]
    assert (error.in_effect, error.unknown) == (("a", "b"), ())
    why = f"{said} is not in the ledger, as where an older copy was put back"
    assert str(error).startswith(f"saga s stopped, because its ledger failed: {why}")


def test_a_saga_whose_ledger_knows_nothing_any_more_of_one_within_says_what_is_in_effect(durable: SQLiteFile | PostgresSchema) -> None:
    """It was told that there is no such saga, as of a wrong id with which nothing was run."""
    world, within = scene(SEQUENCE)
    trip = Pipeline(name="trip").with_stage("book", nested(within))

    error = stopped_by(durable, trip, world, "DELETE FROM sagas", "DELETE FROM events")

    assert world.log == ["+a", "+b"]
    assert (error.in_effect, error.unknown) == (("book/a", "book/b"), ("book",))
    assert str(error).startswith("saga s stopped, because its ledger failed: there is no saga s/book.")


def test_a_saga_whose_ledger_failed_is_given_back_so_that_another_goes_on_with_it_at_once() -> None:
    world, pipeline = scene(SEQUENCE, {}, dict.fromkeys(SEQUENCE, "probed"))
    ledger = SlowDisk()
    ledger.breaks_at = StageCompleted
    with pytest.raises(LedgerError, match="no space left"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.breaks_at = None

    (entry,) = run(ledger.list())
    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert (entry.status, entry.owner) == (SagaStatus.RUNNING, None)
    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]


def test_a_stage_that_is_cancelled_while_it_records_an_effect_is_undone_for_it() -> None:
    world, pipeline = scene({"a": (), "b": ()}, {"a": Script("raise", before=0.5), "b": Script(before=0.45)}, {"b": "recording"})
    ledger = SlowDisk(seconds=0.2)

    report = run(SagaCoordinator(FailFast(in_flight="cancel"), ledger=ledger).run(pipeline))

    assert report.stages["b"].effects == ("b",)
    assert report.stages["b"].failure is not None
    assert report.stages["b"].failure.kind == "interrupted"
    assert set(report.in_doubt) == {"b"}
    assert world.log == ["+b"]


# -- recovery --------------------------------------------------------------------------------------------------------


def test_every_saga_whose_process_is_gone_is_gone_on_with() -> None:
    async def nothing(_: Any) -> None: ...

    ledger = Dying(1000)
    worlds = {}
    for number in range(5):
        worlds[number], pipeline = scene(DIAMOND, {"d": Script("raise" if number % 2 else "ok")}, dict.fromkeys(DIAMOND, "probed"))
        pipeline = Pipeline(name=f"scene {number}", stages=dict(pipeline.stages))
        ledger.left = 4 + number
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id=f"s{number}"))
        worlds[number].pipeline = pipeline  # type: ignore[attr-defined] # kept beside its world
    ledger.left = 1000
    pipelines = [world.pipeline for world in worlds.values()]  # type: ignore[attr-defined] # as above
    unknown = Pipeline(name="unknown").with_stage("a", nothing, "work")
    ledger.left = 1
    with contextlib.suppress(LedgerError):
        run(SagaCoordinator(ledger=ledger).run(unknown, saga_id="of another service"))
    ledger.left = 1000
    ledger.forget_owners()
    ledger._sagas["s0"].owner = "somebody alive"

    recovery = run(SagaCoordinator(ledger=ledger).recover(pipelines, concurrency=2))

    assert {saga_id: report.status.value for saga_id, report in recovery.reports.items()} == {
        "s1": "compensated",
        "s2": "completed",
        "s3": "compensated",
        "s4": "completed",
    }
    assert set(recovery.held) == {"s0"}
    assert isinstance(recovery.held["s0"], LedgerConflict)
    assert set(recovery.failed) == {"of another service"}
    assert "expected a pipeline named 'unknown', got those named scene 0, scene 1" in str(recovery.failed["of another service"])
    assert "s1: COMPENSATED" in str(recovery)
    assert "s0: left alone, saga s0 is held by somebody alive" in str(recovery)
    assert "of another service: not recovered, expected a pipeline" in str(recovery)
    for number in (1, 2, 3, 4):
        assert worlds[number].refusals == []
        assert set(worlds[number].standing) == (set() if number % 2 else set(DIAMOND))


def test_a_child_is_recovered_by_the_saga_that_runs_it() -> None:
    world, child = scene(SEQUENCE, {}, dict.fromkeys(SEQUENCE, "probed"))
    parent = Pipeline(name="parent").with_stage("child", nested(child))
    ledger = Dying(5)
    with contextlib.suppress(LedgerError):
        run(SagaCoordinator(ledger=ledger).run(parent, saga_id="s"))
    ledger.left = 1000
    ledger.forget_owners()
    assert len(run(ledger.list())) == 2

    recovery = run(SagaCoordinator(ledger=ledger).recover([parent, child]))

    assert set(recovery.reports) == {"s"}
    assert recovery.reports["s"].status is SagaStatus.COMPLETED
    assert set(world.standing) == set(SEQUENCE)


def left_by_a_killed_process(pipelines: dict[str, Pipeline]) -> Dying:
    """A ledger with a saga of each pipeline whose process died when its first stage had started."""
    ledger = Dying(0)
    for saga_id, pipeline in pipelines.items():
        ledger.left = 1
        with contextlib.suppress(LedgerError):
            run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id=saga_id))
    ledger.left = 1000
    ledger.forget_owners()
    return ledger


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_sagas_are_recovered_at_once_than_is_said(concurrency: int) -> None:
    running, most = set(), [0]

    async def wait(ctx: Any) -> None:
        running.add(ctx.saga_id)
        most[0] = max(most[0], len(running))
        await elapse(1)
        running.discard(ctx.saga_id)

    pipeline = Pipeline(name="waiting").with_stage("wait", wait, "work")
    ledger = left_by_a_killed_process({f"s{number}": pipeline for number in range(7)})
    most[0] = 0

    recovery = run(SagaCoordinator(ledger=ledger).recover([pipeline], concurrency=concurrency))

    assert most == [concurrency]
    assert {report.status for report in recovery.reports.values()} == {SagaStatus.COMPLETED}
    assert len(recovery.reports) == 7


def test_a_recovery_that_waits_for_a_saga_keeps_no_later_one_of_its_coordinator_from_the_others() -> None:
    runs: list[str] = []

    async def answer(ctx: Any) -> None:
        runs.append(ctx.saga_id)
        if ctx.saga_id == "hanging":
            began.set()
            await answered.wait()

    async def main() -> tuple[Recovery, Recovery]:
        coordinator = SagaCoordinator(ledger=ledger)
        first = asyncio.create_task(coordinator.recover([pipeline], concurrency=1))
        await began.wait()
        second = await coordinator.recover([pipeline], concurrency=1)
        answered.set()
        return await first, second

    pipeline = Pipeline(name="asking").with_stage("answer", answer, "work")
    began, answered = asyncio.Event(), asyncio.Event()
    answered.set()
    ledger = left_by_a_killed_process({"hanging": pipeline, "other": pipeline})
    runs.clear()
    began, answered = asyncio.Event(), asyncio.Event()

    first, second = run(main())

    assert runs == ["hanging", "other"]
    assert {saga_id: report.status for saga_id, report in second.reports.items()} == {"other": SagaStatus.COMPLETED}
    assert first.reports["hanging"].status is SagaStatus.COMPLETED
    assert not first.failed | second.failed


def test_what_somebody_else_has_recovered_meanwhile_is_not_run_once_more() -> None:
    runs: list[str] = []

    class Raced(Dying):
        """Between a look at the sagas and the first step, another process recovers them all."""

        async def list(self, **which: Any) -> Any:
            entries = await super().list(**which)
            if runs == ["first"]:
                await SagaCoordinator(ledger=_same(self)).recover([pipeline])
            return entries

    def _same(ledger: Dying) -> Dying:
        other = Dying(1000)
        other._sagas, other._children, other._done = ledger._sagas, ledger._children, ledger._done
        return other

    async def fail(_: Any) -> StageOutput:
        runs.append("first" if not runs else "again")
        return StageOutput.fail("no lorry")

    pipeline = Pipeline(name="halting").with_stage("ship", fail, "work")
    ledger = Raced(1)
    with contextlib.suppress(LedgerError):
        run(SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 1000
    ledger.forget_owners()

    recovery = run(SagaCoordinator(ledger=ledger).recover([pipeline]))

    assert runs == ["first", "again"]
    assert recovery.reports["s"].status is SagaStatus.HALTED


def test_a_saga_whose_pipeline_has_changed_is_left_as_it_is_and_the_others_go_on() -> None:
    async def nothing(_: Any) -> None: ...

    before = Pipeline(name="changed").with_stage("a", nothing, "work")
    same = Pipeline(name="same").with_stage("a", nothing, "work")
    ledger = left_by_a_killed_process({"changed": before, "same": same})
    events = run(ledger.read("changed"))

    recovery = run(SagaCoordinator(ledger=ledger).recover([before.with_stage("b", nothing, "work"), same]))

    assert str(recovery) == (
        "same: COMPLETED\n"
        "changed: not recovered, expected the pipeline that saga changed was started with, got another one: stage 'b' is new. "
        "Nothing was run. Go on with the pipeline as it was then."
    )
    assert run(ledger.read("changed")) == events


@pytest.mark.parametrize("keep", [0, 3])
def test_a_ledger_in_memory_forgets_what_nobody_needs_the_oldest_first(keep: int) -> None:
    _, pipeline = scene({"a": ()})
    ledger = MemoryLedger(keep=keep)
    coordinator = SagaCoordinator(ledger=ledger)
    for number in range(6):
        run(coordinator.run(pipeline, saga_id=f"s{number}"))

    assert [entry.saga_id for entry in run(ledger.list())] == [f"s{number}" for number in range(6)][6 - keep :]


def test_where_no_saga_lost_its_process_there_is_nothing_to_recover() -> None:
    _, pipeline = scene(SEQUENCE)
    coordinator = SagaCoordinator()
    run(coordinator.run(pipeline))

    assert str(run(coordinator.recover({"scene": pipeline}))) == "No saga has lost its process."


# -- outputs that come back ------------------------------------------------------------------------------------------


class Booking(BaseModel):
    seat: str
    price: float


@dataclass
class Receipt:
    booking: Booking


class Receipts(BaseModel):
    booking: Booking


class Stored(MemoryLedger):
    """Gives back what it was given as a durable ledger does: read from JSON."""

    durable = True

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        return tuple(event_from_json(event_to_json(event)) for event in await super().read(saga_id))


@pytest.mark.parametrize("model", [None, Receipt, Receipts])
def test_an_output_comes_back_from_a_durable_ledger_as_what_its_stage_declares(model: Any) -> None:
    undone: list[Any] = []
    seen: list[Any] = []

    class Book(CompensableStage):
        output_model = model

        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(booking=Booking(seat="14A", price=9.5), note="window")

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.output is not None
            undone.append(ctx.output.data)

    async def look(ctx: Any) -> StageOutput:
        seen.append(ctx.inputs.get_output("book").data)
        return StageOutput.ok() if ctx.attempt > 1 else StageOutput.fail("not yet")

    pipeline = Pipeline().with_stage("book", Book).with_stage("other", Book).with_stage("look", look, "work", dependencies=("book",))
    ledger = Stored()
    run(SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(pipeline, saga_id="s"))

    run(SagaCoordinator(ledger=ledger).resume("s", pipeline))
    run(SagaCoordinator(ledger=ledger).compensate("s", pipeline))

    booking = {"seat": "14A", "price": 9.5} if model is None else Booking(seat="14A", price=9.5)
    assert seen == [{"booking": Booking(seat="14A", price=9.5), "note": "window"}, {"booking": booking, "note": "window"}]
    assert undone == [{"booking": booking, "note": "window"}] * 2


class SoldOut(CompensableStage):
    output_model = Receipts

    async def execute(self, ctx: SagaContext) -> StageOutput:
        return StageOutput.fail("sold out")

    async def compensate(self, ctx: CompensationContext) -> None: ...


def test_what_a_fallback_gave_comes_back_as_what_its_stage_declares() -> None:
    seen: list[Any] = []

    class Book(SoldOut):
        async def fallback(self, ctx: SagaContext, failure: Failure) -> StageOutput:
            return StageOutput.ok(booking=Booking(seat="by the door", price=0))

    async def look(ctx: Any) -> StageOutput:
        seen.append(ctx.inputs.get_from("book", "booking"))
        return StageOutput.ok() if ctx.attempt > 1 else StageOutput.fail("not yet")

    pipeline = Pipeline().with_stage("book", Book).with_stage("look", look, "work", dependencies=("book",))

    ledger = Stored()
    run(SagaCoordinator(ContinueWithFallback(on_failure="halt"), ledger=ledger).run(pipeline, saga_id="s"))

    assert run(SagaCoordinator(ledger=ledger).resume("s", pipeline)).status is SagaStatus.DEGRADED
    assert seen == [Booking(seat="by the door", price=0)] * 2


def test_the_fallback_that_a_policy_in_the_ledger_has_comes_back_as_what_its_stage_declares() -> None:
    seen: list[Any] = []

    async def wake(ctx: Any) -> StageOutput:
        return StageOutput.ok() if ctx.attempt > 1 else StageOutput.fail("not yet")

    async def look(ctx: Any) -> None:
        seen.append(ctx.inputs.get_from("book", "booking"))

    pipeline = Pipeline().with_stage("wake", wake, "work").with_stage("book", SoldOut, dependencies=("wake",))
    pipeline = pipeline.with_stage("look", look, "work", dependencies=("book",))
    door = Booking(seat="by the door", price=0)
    policy = ContinueWithFallback(on_failure="halt", fallbacks={"book": {"booking": door}})
    ledger = Stored()
    run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.DEGRADED
    assert seen == [door]


def test_the_fallback_of_a_policy_is_what_its_stage_declares_in_the_process_that_begins_the_saga_as_in_those_that_go_on_with_it() -> None:
    """Read from a file it is plain, and what used it failed there, until another process went on."""
    seen: list[Any] = []

    async def look(ctx: Any) -> StageOutput:
        seen.append(ctx.inputs.get_from("book", "booking"))
        return StageOutput.ok() if ctx.attempt > 1 else StageOutput.fail("not yet")

    pipeline = Pipeline().with_stage("book", SoldOut).with_stage("look", look, "work", dependencies=("book",))
    policy = ContinueWithFallback(on_failure="halt", fallbacks={"book": {"booking": {"seat": "by the door", "price": 0}}})
    ledger = Stored()
    run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))

    run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert seen == [Booking(seat="by the door", price=0)] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_that_the_fallback_of_a_recorded_policy_fits_no_model_is_warned_of_where_it_is_used(
    caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    class Book(CompensableStage):
        output_model = Receipts

        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.fail("sold out") if fails else StageOutput.ok(booking=Booking(seat="14A", price=10))

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def wake(ctx: Any) -> StageOutput:
        return StageOutput.ok() if ctx.attempt > 1 else StageOutput.fail("not yet")

    pipeline = Pipeline().with_stage("wake", wake, "work").with_stage("book", Book, dependencies=("wake",))
    policy = ContinueWithFallback(on_failure="halt", fallbacks={"book": {"booking": "none"}})
    ledger = Stored()
    run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is (SagaStatus.DEGRADED if fails else SagaStatus.COMPLETED)
    assert report.kept["book"].data == {"booking": "none" if fails else Booking(seat="14A", price=10)}
    assert ["does not fit" in record.message for record in caplog.records] == [True] * fails


def test_a_saga_goes_on_with_the_fallbacks_of_a_policy_that_would_be_refused_by_now() -> None:
    _, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script("raise", then=("ok",)), "b": Script("raise")})
    written = ContinueWithFallback(on_failure="halt", fallbacks={"b": {"instead": True}}).model_dump(mode="json")
    written["compensation"]["retry"]["retry_on"] = ["timeout"]
    recorded = ContinueWithFallback.model_validate_json(json.dumps(written))
    ledger = Stored()
    run(SagaCoordinator(recorded, ledger=ledger).run(pipeline, saga_id="s"))

    assert run(SagaCoordinator(ledger=ledger).resume("s", pipeline)).status is SagaStatus.DEGRADED


def test_nobody_is_warned_that_what_a_stage_says_of_its_skip_fits_no_model(caplog: pytest.LogCaptureFixture) -> None:
    class Book(CompensableStage):
        output_model = Receipts

        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.skip("nobody travels")

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def look(ctx: Any) -> StageOutput:
        return StageOutput.ok() if ctx.attempt > 1 else StageOutput.fail("not yet")

    pipeline = Pipeline().with_stage("book", Book).with_stage("look", look, "work", dependencies=("book",))
    ledger = Stored()
    run(SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(pipeline, saga_id="s"))

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert "output_model" not in caplog.text


@pytest.mark.parametrize("nth", range(1, 8))
def test_killed_at_any_event_what_was_given_within_a_nested_saga_comes_back_as_its_stages_declare(nth: int) -> None:
    seen: list[Any] = []

    class Book(CompensableStage):
        output_model = Receipts
        idempotent = True

        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(booking=Booking(seat="14A", price=9.5))

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def look(ctx: Any) -> None:
        trip = ctx.inputs.get_from("trip", "outputs")
        seen.append(trip["flights"]["outputs"]["book"]["booking"])

    flights = Pipeline(name="flights").with_stage("book", Book)
    trip = Pipeline(name="trip").with_stage("flights", nested(flights))
    pipeline = Pipeline().with_stage("trip", nested(trip)).with_stage("look", look, "work", dependencies=("trip",))
    ledger = MortalLedger(durable=True)
    ledger.die_at(nth, after=True)

    with pytest.raises(LedgerError):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.revive()
    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert set(map(type, seen)) <= {Booking}


def test_a_saga_goes_on_whatever_stands_in_for_what_a_saga_within_a_nested_one_gave() -> None:
    """It was looked through for the outputs of stages, which None has not."""
    seen: list[Any] = []

    async def book(_: Any) -> StageOutput:
        return StageOutput.fail("sold out")

    async def look(ctx: Any) -> StageOutput:
        seen.append(ctx.inputs.get_from("trip", "outputs"))
        return StageOutput.ok() if ctx.attempt > 1 else StageOutput.fail("not yet")

    flights = Pipeline(name="flights").with_stage("book", book, "work")
    trip = Pipeline(name="trip").with_stage("flights", nested(flights))
    pipeline = Pipeline().with_stage("trip", nested(trip)).with_stage("look", look, "work", dependencies=("trip",))
    policy = ContinueWithFallback(on_failure="halt", fallbacks={"trip": {"outputs": {"flights": None}}})
    ledger = Stored()
    run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.DEGRADED
    assert seen == [{"flights": None}] * 2


def undone_after_a_crash(model: Any, data: dict[str, Any]) -> dict[str, Any]:
    """What the compensation of a stage is given that gave this, in another process."""
    undone: list[dict[str, Any]] = []

    class Charge(CompensableStage):
        output_model = model

        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(data)

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.output is not None
            undone.append(ctx.output.data)

    pipeline = Pipeline().with_stage("charge", Charge)
    ledger = Stored()
    run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    run(SagaCoordinator(ledger=ledger).compensate("s", pipeline))
    (given,) = undone
    return given


class Colour(Enum):
    RED = "red"


class Wine(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Colour
    label: Path
    shop: HttpUrl
    number: int = Field(alias="no")
    bottled: date

    @field_serializer("bottled")
    def as_people_write_it(self, day: date) -> str:
        return f"{day:%d/%m/%Y}"

    @computed_field  # type: ignore[prop-decorator] # as pydantic's documentation has it
    @property
    def is_old(self) -> bool:
        return self.bottled.year < 2000


@dataclass(frozen=True)
class Shelf:
    wines: tuple[Wine, ...]
    best: Wine | None = None


class Cellar(BaseModel):
    shelf: Shelf
    by_colour: dict[Colour, Wine]


def test_models_within_models_come_back_as_they_were_however_they_write_themselves() -> None:
    wine = Wine(colour=Colour.RED, label=Path("1.png"), shop=HttpUrl("http://wine.example/"), no=7, bottled=date(1998, 10, 1))
    cellar = {"shelf": Shelf((wine,), best=wine), "by_colour": {Colour.RED: wine}}

    assert undone_after_a_crash(Cellar, cellar) == cellar


def test_what_a_model_says_is_never_to_be_written_is_not_stored() -> None:
    class Card(BaseModel):
        holder: str
        pin: str = Field(default="", exclude=True)

    assert stored({"card": Card(holder="Ann", pin="1234")}, "data") == {"card": {"holder": "Ann"}}


def test_an_output_that_does_not_fit_its_model_is_told_of_at_once(caplog: pytest.LogCaptureFixture) -> None:
    class Book(CompensableStage):
        output_model = Booking

        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(booking=Booking(seat="14A", price=9.5))

        async def compensate(self, ctx: CompensationContext) -> None: ...

    with caplog.at_level(logging.WARNING, "saga"):
        report = run(SagaCoordinator().run(Pipeline().with_stage("book", Book)))

    assert report.status is SagaStatus.COMPLETED
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("stage 'book': its output does not fit its output_model tests.test_durable.Booking (seat: Field required")


class Cents(BaseModel):
    cents: int

    @field_validator("cents", mode="before")
    @classmethod
    def of_crowns(cls, crowns: Any) -> int:
        return int(float(crowns) * 100)


class Refundable(BaseModel):
    paid: Cents


def test_a_validator_that_changes_an_amount_does_not_change_what_was_recorded_once_more(caplog: pytest.LogCaptureFixture) -> None:
    paid = Cents(cents="9.50")

    undone = undone_after_a_crash(Refundable, {"paid": paid})

    assert paid.cents == 950
    assert undone == {"paid": {"cents": 950}}
    assert "its validators change what they have made once more" in caplog.text


def test_an_output_with_a_key_that_its_model_never_writes_comes_back_as_what_it_was() -> None:
    class Unlocked(BaseModel):
        pin: str = Field(exclude=True)
        to: Booking

    undone = undone_after_a_crash(Unlocked, {"pin": "1234", "to": Booking(seat="14A", price=9.5)})

    assert undone == {"pin": "1234", "to": Booking(seat="14A", price=9.5)}


class ByCard(BaseModel):
    reference: str


class ByBank(BaseModel):
    reference: str


class Signed(ByBank):
    signature: str


class Paid(BaseModel):
    by: ByCard | ByBank
    to: ByBank = ByBank(reference="us")
    parts: tuple[ByBank, ...] = ()
    named: dict[str, ByBank] = Field(default_factory=dict)
    root: RootModel[list[ByBank]] | None = None
    record: Receipt | None = None


CHANGED: dict[str, dict[str, Any]] = {
    "by": {"by": ByBank(reference="1")},
    "to": {"by": ByCard(reference="1"), "to": Signed(reference="2", signature="Ann")},
    "parts": {"by": ByCard(reference="1"), "parts": (Signed(reference="2", signature="Ann"),)},
    "named": {"by": ByCard(reference="1"), "named": {"a": Signed(reference="2", signature="Ann")}},
}


@pytest.mark.parametrize("part", CHANGED)
def test_an_output_that_would_come_back_as_another_one_is_told_of_at_once(part: str, caplog: pytest.LogCaptureFixture) -> None:
    undone_after_a_crash(Paid, CHANGED[part])

    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith(f"stage 'charge': of its output, {part} would come back from a durable ledger as another value than was given")


UNCHANGED: dict[str, dict[str, Any]] = {
    "models": {"by": ByCard(reference="1"), "parts": (ByBank(reference="2"),), "root": RootModel[list[ByBank]]([ByBank(reference="3")])},
    "a dataclass": {"by": ByCard(reference="1"), "record": Receipt(Booking(seat="14A", price=float("nan")))},
    "plain data": {"by": {"reference": "1"}, "parts": [{"reference": "2"}]},
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_of_an_output_that_comes_back_as_it_was_nothing_is_told(case: str, caplog: pytest.LogCaptureFixture) -> None:
    undone = undone_after_a_crash(Paid, UNCHANGED[case])

    assert undone["by"] == ByCard(reference="1")
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


class Moody(BaseModel):
    booking: Any

    @field_validator("booking")
    @classmethod
    def refuse(cls, _: Any) -> Any:
        raise RuntimeError("not today")


class Talkative(BaseModel):
    booking: Any

    @field_validator("booking")
    @classmethod
    def refuse(cls, _: Any) -> Any:
        raise RuntimeError("not today\nsaga s: ended")


MISFITS: dict[str, tuple[Any, str]] = {
    "a field that is missing": (Receipt, "tests.test_durable.Receipt (booking.price: Field required)"),
    "a validator that says more than a line": (Talkative, "tests.test_durable.Talkative (RuntimeError: not today saga s: ended)"),
    "a validator that raises": (Moody, "tests.test_durable.Moody (RuntimeError: not today)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_output_that_no_longer_fits_its_model_stays_plain_data_and_the_log_says_why(case: str, caplog: pytest.LogCaptureFixture) -> None:
    model, why = MISFITS[case]
    undone: list[Any] = []

    class Book(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(booking={"seat": "14A"})

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.output is not None
            undone.append(ctx.output.data)

    class Typed(Book):
        output_model = model

    ledger = Stored()
    run(SagaCoordinator(ledger=ledger).run(Pipeline().with_stage("book", Book), saga_id="s"))

    with caplog.at_level(logging.WARNING, "saga"):
        report = run(SagaCoordinator(ledger=ledger).compensate("s", Pipeline().with_stage("book", Typed)))

    assert report.status is SagaStatus.COMPENSATED
    assert undone == [{"booking": {"seat": "14A"}}]
    said = f"stage 'book': its recorded output does not fit its output_model {why}; it stays plain data"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [said]


@pytest.mark.parametrize("output", [None, {"booking": {"seat": 14}}], ids=["no output", "one that does not fit"])
def test_a_saga_goes_on_although_a_person_settled_a_stage_without_what_its_model_requires(output: Any) -> None:
    seen: list[Any] = []

    class Book(CompensableStage):
        output_model = Receipt
        timeout = 1

        async def execute(self, ctx: SagaContext) -> StageOutput:
            await elapse(60)
            raise AssertionError

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def ship(ctx: Any) -> None:
        seen.append(ctx.inputs.get_output("book").data)

    pipeline = Pipeline().with_stage("book", Book).with_stage("ship", ship, "work", dependencies=("book",))
    coordinator = SagaCoordinator(ledger=Stored())
    run(coordinator.run(pipeline, saga_id="s"))
    run(coordinator.settle("s", "book", "kept", "the airline has it", output=output))

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert seen == [output or {}]


class Named(BaseModel):
    number: Booking = Field(alias="flight")
    name: str = Field(default="", validation_alias=AliasChoices("passenger", "name"))
    seat: str = Field(default="any", alias="place")


class ByEither(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    number: Booking = Field(alias="flight")


@pydantic_dataclass
class NamedRecord:
    number: Booking = Field(alias="flight")


BOOKED = Booking(seat="14A", price=9.5)
MODELLED: dict[str, tuple[Any, dict[str, Any]]] = {
    "keys that are methods of a model": (Receipts, {"booking": BOOKED, "copy": "carbon", "json": {"a": 1}}),
    "aliases": (Named, {"flight": BOOKED, "passenger": "Ann"}),
    "a name of which only the alias is read": (Named, {"flight": BOOKED, "seat": "14A"}),
    "an alias where the name would do": (ByEither, {"flight": BOOKED}),
    "a name where the alias would do": (ByEither, {"number": BOOKED}),
    "an alias in a dataclass": (NamedRecord, {"flight": BOOKED, "number": 3}),
}


@pytest.mark.parametrize("case", MODELLED)
def test_only_what_is_a_field_of_the_model_is_made_of_it(case: str) -> None:
    model, data = MODELLED[case]

    assert undone_after_a_crash(model, data) == data


# -- listeners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [ValueError, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("ledger", [MemoryLedger, SlowDisk])
def test_listeners_are_told_what_is_in_the_ledger_and_harm_no_saga(ledger: Any, raised: Any, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, AnyEvent]] = []

    def fails(_: str, event: AnyEvent) -> None:
        raise raised("deaf")

    kept = ledger()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise", undo_fails=9), "b": Script(undo_fails=9)})
    coordinator = SagaCoordinator(FailFast(), ledger=kept, listeners=[fails, lambda saga_id, event: heard.append((saga_id, event))])

    async def play() -> None:
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.settle("s", "b", "undone", "by hand")
        await coordinator.resume("s", pipeline)

    with caplog.at_level(logging.ERROR, "saga"):
        run(play())

    assert heard == [("s", event) for event in run(kept.read("s"))]
    assert "saga s: a listener failed on SagaStarted; the saga goes on" in caplog.text


def test_no_id_makes_a_line_of_its_own_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: str, event: AnyEvent) -> None:
        raise ValueError("deaf")

    _, pipeline = scene({"a": ()})

    with caplog.at_level(logging.INFO, "saga"):
        report = run(SagaCoordinator(listeners=[fails]).run(pipeline, saga_id="s\nsaga t: \x1b[2Jended"))

    assert report.ok
    assert {message.partition(": a listener")[0] for message in caplog.messages} == {"saga s saga t: \\u001b[2Jended"}


def test_an_output_model_that_is_none_is_refused() -> None:
    class Book(CompensableStage):
        output_model = dict

        async def execute(self, ctx: SagaContext) -> None: ...

        async def compensate(self, ctx: CompensationContext) -> None: ...

    with pytest.raises(PipelineInvalid, match="expected output_model to be a pydantic model, a dataclass or None, for stage 'book'"):
        run(SagaCoordinator().run(Pipeline().with_stage("book", Book)))


# -- what can't be stored --------------------------------------------------------------------------------------------


def unstorable(**how: Any) -> tuple[list[Any], Any]:
    """a -> book: `book` gives, or records, or fails with something that JSON can't hold."""
    undone: list[Any] = []

    class Book(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            if how.get("records"):
                await ctx.record({"seat": "14A"})
                await ctx.record({"line": object()})
            if how.get("fails"):
                return StageOutput.fail("declined", data={"line": object()})
            return StageOutput.ok(seat="14A", line=object())

        async def compensate(self, ctx: CompensationContext) -> None:
            undone.append(ctx.effects or (ctx.output and ctx.output.data["seat"]))

    world, pipeline = scene({"a": ()})
    pipeline = pipeline.with_stage("book", Book(), dependencies=("a",))
    report = run(SagaCoordinator(ledger=SlowDisk()).run(pipeline, saga_id="s"))
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED
    return undone, report


def test_an_output_that_cannot_be_stored_stops_the_saga_and_what_the_stage_did_is_undone() -> None:
    undone, report = unstorable()

    assert undone == ["14A"]
    assert report.cause.stage == "book"
    assert report.cause.kind == "contract"
    assert "expected plain data at data['line'], got object" in report.cause.message
    assert "the ledger can't keep it" in report.cause.message


def test_an_effect_that_cannot_be_stored_fails_its_stage_which_is_undone_for_all_that_it_recorded() -> None:
    undone, report = unstorable(records=True)

    (effects,) = undone
    assert effects[0] == {"seat": "14A"}
    assert effects[1]["line"].type == "object"
    assert "expected plain data at effect['line'], got object" in report.cause.message


def test_an_effect_that_cannot_be_stored_and_whose_recording_was_cut_off_does_not_stop_the_attempt_after_that() -> None:
    undone: list[Any] = []

    class Book(CompensableStage):
        retry = Retry(attempts=2, wait=0)
        timeout = 1

        async def execute(self, ctx: SagaContext) -> StageOutput:
            if ctx.attempt == 1:
                await ctx.record({"line": object()})
            return StageOutput.ok(seat="14A")

        async def compensate(self, ctx: CompensationContext) -> None:
            undone.append(ctx.output)

    pipeline = Pipeline().with_stage("book", Book)
    ledger = SlowDisk(seconds=1.5)

    report = run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))

    assert [each.failed for each in report.stages["book"].tries] == [FailureKind.TIMEOUT, None]
    assert report.status is SagaStatus.COMPLETED
    assert report.stages["book"].effects[0]["line"].type == "object"
    assert undone == []


def test_an_effect_that_cannot_be_stored_fails_its_stage_also_where_that_waits_no_longer_for_its_recording() -> None:
    undone: list[Any] = []

    class Book(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await ctx.record({"line": object()})
            return StageOutput.ok(seat="14A")

        async def compensate(self, ctx: CompensationContext) -> None:
            undone.append(ctx.effects[0]["line"].type)

    report = run(SagaCoordinator(ledger=SlowDisk(seconds=1.5)).run(Pipeline().with_stage("book", Book), saga_id="s"))

    assert report.status is SagaStatus.COMPENSATED
    assert "expected plain data at effect['line'], got object" in str(report.cause)
    assert undone == ["object"]


def test_what_is_beside_a_failure_may_be_anything() -> None:
    _, report = unstorable(fails=True)

    assert report.cause.message == "declined"
    assert report.stages["book"].output.data["line"].type == "object"


def probed_in_vain(ledger: MemoryLedger) -> tuple[list[Any], SagaStatus, Sequence[AnyEvent]]:
    """book: it takes too long, and its probe gives something that JSON can't hold; what was undone, and how the saga ended."""
    undone: list[Any] = []

    class Book(CompensableStage):
        timeout = 1

        async def execute(self, ctx: SagaContext) -> StageOutput:
            await elapse(60)
            raise AssertionError

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return StageOutput.ok(seat="14A", status=NotImplemented)

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.output is not None
            undone.append(ctx.output.data)

    report = run(SagaCoordinator(ledger=ledger).run(Pipeline().with_stage("book", Book), saga_id="s"))
    return undone, report.status, run(ledger.read("s"))


def test_a_probe_that_gives_what_cannot_be_stored_has_failed_and_no_compensation_is_told_of_it() -> None:
    undone, status, events = probed_in_vain(SlowDisk())

    probed = [event for event in events if isinstance(event, StageProbed)]
    assert (undone, status) == ([], SagaStatus.STUCK)
    assert {event.landed for event in probed} == {None}
    assert "NotStorable: expected plain data at data['status'], got NotImplementedType" in str(probed[-1].failure)


def test_where_nothing_is_stored_a_probe_may_give_anything() -> None:
    undone, status, _ = probed_in_vain(MemoryLedger())

    assert (undone, status) == ([{"seat": "14A", "status": NotImplemented}], SagaStatus.COMPENSATED)


def test_an_input_that_cannot_be_stored_is_refused_before_anything_runs() -> None:
    world, pipeline = scene(SEQUENCE)

    with pytest.raises(MisuseError, match=r"expected plain data at context\['metadata'\]\['line'\], got object"):
        run(SagaCoordinator(ledger=SlowDisk()).run(pipeline, metadata={"line": object()}))

    assert world.log == []
