"""Ten thousand sagas at once on one coordinator and one pipeline object: none disturbs another, and the memory is given back."""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
import weakref
from collections import Counter
from typing import Any, Final

import pytest
from stageflow import BaseInterceptor
from stageflow.api import Pipeline, PipelineContext, StageOutput
from stageflow.pipeline.interceptors import CriticalInterceptorError

from saga import (
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    MemoryLedger,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    compensable,
)
from saga.backward import Backward
from saga.events import Event, SagaTurnedBack, StageFailed
from saga.forward import Forward
from saga.live.journal import Journal
from saga.live.saga import LiveSaga
from saga.recovery.record import StageRecord
from saga.recovery.state import SagaState
from tests.controlled import elapse, run
from tests.world import CardDeclined, Watching, nothing

MANY = 10_000
KINDS = (LiveSaga, Forward, Backward, Journal, SagaState, StageRecord, SagaReport, Event, asyncio.Task)


class Bookings:
    """What stands, by saga; each with the key that it was made with."""

    def __init__(self) -> None:
        self.standing: dict[str, dict[str, str]] = {}

    def pipeline(self) -> Pipeline:
        """Three stages; the last digit of the input says which one fails, if one does."""
        pipeline = Pipeline(name="many")
        for place in range(3):
            name = f"stage {place}"
            stage = compensable(self._book(place), self._cancel)
            pipeline = pipeline.with_stage(name, stage, dependencies=(f"stage {place - 1}",) if place else ())
        return pipeline

    def _book(self, place: int) -> Any:
        async def book(ctx: SagaContext) -> StageOutput:
            number = str(ctx.snapshot.input_text)
            await asyncio.sleep(0)
            if number[-1] == str(place):
                raise CardDeclined(number)
            below = {name: output.data["number"] for name, output in ctx.inputs.prior_outputs.items()}
            assert set(below.values()) <= {number}
            assert ctx.idempotency_key == f"{number}/{ctx.stage_name}"
            self.standing.setdefault(number, {})[ctx.stage_name] = ctx.idempotency_key
            return StageOutput.ok(number=number)

        return book

    async def _cancel(self, ctx: CompensationContext) -> None:
        assert ctx.output is not None
        number = ctx.output.data["number"]
        assert self.standing[number].pop(ctx.stage_name) == ctx.forward_key


async def all_at_once(coordinator: SagaCoordinator, pipeline: Pipeline, count: int) -> list[SagaReport]:
    return await asyncio.gather(*(coordinator.run(pipeline, saga_id=str(n), input_text=str(n)) for n in range(count)))


def parts_of_sagas() -> Counter[str]:
    """How many of what sagas are made of are in memory; other tests may have left some."""
    gc.collect()
    return Counter(kind.__name__ for item in gc.get_objects() for kind in KINDS if isinstance(item, kind))


@pytest.mark.timeout(240)
def test_ten_thousand_sagas_at_once_do_not_disturb_each_other_and_leave_nothing_behind() -> None:
    bookings = Bookings()
    pipeline = bookings.pipeline()
    coordinator = SagaCoordinator(ledger=MemoryLedger(keep=0))
    before = parts_of_sagas()

    reports = run(all_at_once(coordinator, pipeline, MANY))

    for number, report in enumerate(reports):
        fails = number % 10 < 3
        assert report.status is (SagaStatus.COMPENSATED if fails else SagaStatus.COMPLETED)
        assert report.saga_id == str(number)
        assert {output.data["number"] for output in report.kept.values()} == (set() if fails else {str(number)})
        assert len(bookings.standing.get(str(number), {})) == (0 if fails else 3)
    assert coordinator._keeper.held.sagas == {}
    del reports, report
    assert parts_of_sagas() <= before
    assert len(run(coordinator.ledger.list())) == 0


@pytest.mark.timeout(240)
def test_the_memory_of_sagas_that_have_ended_is_given_back() -> None:
    coordinator = SagaCoordinator(ledger=MemoryLedger(keep=0))

    async def rounds() -> list[int]:
        measured = []
        for _ in range(3):
            # A world of their own: what stands in it is the world's, not the sagas'.
            await all_at_once(coordinator, Bookings().pipeline(), 500)
            gc.collect()
            measured.append(tracemalloc.get_traced_memory()[0])
        return measured

    tracemalloc.start()
    try:
        first, _, last = run(rounds())
    finally:
        tracemalloc.stop()

    # Not 40 bytes for each of a thousand sagas, of which one in flight takes some twenty thousand.
    assert last - first < 40 * 1000


def left_to_the_garbage_collector(coordinator: SagaCoordinator, pipeline: Pipeline, status: SagaStatus, numbers: range) -> list[object]:
    """What waits for it when some sagas have come to that status and nobody has their reports any more."""

    async def ended(number: int) -> None:
        report = await coordinator.run(pipeline, saga_id=str(number), input_text=str(number))
        assert report.status is status

    async def scene() -> list[object]:
        first, *others = numbers
        await ended(first)
        gc.freeze()  # what there was before is none of it: of an earlier test something may wait for a second collection
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for number in others:
                await ended(number)
            gc.collect()
            return list(gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
            gc.unfreeze()

    return run(scene())


def test_of_a_saga_that_has_completed_nothing_waits_for_the_garbage_collector() -> None:
    """What refers to each other does; a thousand sagas would have it run for a third of their time."""
    left = left_to_the_garbage_collector(SagaCoordinator(), Bookings().pipeline(), SagaStatus.COMPLETED, range(9, 100, 10))

    assert left == []


LET_GO_OF: Final = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="since Python 3.12 the frame of a coroutine that raised holds those that awaited it",
)


@LET_GO_OF
def test_of_a_saga_that_was_undone_nothing_waits_for_the_garbage_collector() -> None:
    """An exception holds the frames of the code that raised it, these its context, and that the saga, with its failures."""
    left = left_to_the_garbage_collector(SagaCoordinator(), Bookings().pipeline(), SagaStatus.COMPENSATED, range(1, 100, 10))

    assert left == []


@pytest.mark.parametrize("where", [pytest.param("fallback", marks=LET_GO_OF), pytest.param("compensation", marks=LET_GO_OF), "probe"])
def test_of_a_saga_that_failed_in_another_way_nothing_waits_for_the_garbage_collector(where: str) -> None:
    async def fails(*_: Any) -> None:
        raise ConnectionError("no line")

    async def works(*_: Any) -> None: ...

    async def hangs(_: SagaContext) -> None:
        await elapse(60.0)

    undo = fails if where == "compensation" else works
    forward = {"fallback": fails, "probe": hangs}.get(where, works)
    stage = compensable(forward, undo, fallback=fails if where == "fallback" else None, probe=fails if where == "probe" else None)
    pipeline = Pipeline(name="p").with_stage("a", stage, "work").with_stage("b", fails, "work", dependencies=("a",))
    policy = ContinueWithFallback() if where == "fallback" else FailFast(timeout=1.0)
    status = SagaStatus.COMPENSATED if where == "fallback" else SagaStatus.STUCK

    left = left_to_the_garbage_collector(SagaCoordinator(policy), pipeline, status, range(3))

    assert left == []


class Refusing(Watching):
    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        if stage_name == "b":
            raise CriticalInterceptorError("not allowed", self.name)


@LET_GO_OF
@pytest.mark.parametrize("interceptor", [Watching(), Refusing()], ids=["is told of the failure", "refuses"])
def test_of_a_saga_that_failed_with_an_interceptor_around_it_nothing_waits_for_the_garbage_collector(interceptor: BaseInterceptor) -> None:
    """stageflow raises the failure once more on its way to the interceptors, and calls them with what leads to the saga."""

    async def fails(_: Any) -> None:
        raise ConnectionError("no line")

    pipeline = Pipeline(name="p").with_stage("a", compensable(nothing, nothing), "work")
    pipeline = pipeline.with_stage("b", fails, "work", dependencies=("a",))

    left = left_to_the_garbage_collector(SagaCoordinator(interceptors=[interceptor]), pipeline, SagaStatus.COMPENSATED, range(3))

    assert left == []


def test_a_ledger_in_memory_is_bounded_by_what_it_keeps() -> None:
    coordinator = SagaCoordinator(ledger=MemoryLedger(keep=100))

    run(all_at_once(coordinator, Bookings().pipeline(), 500))

    assert len(run(coordinator.ledger.list())) == 100


def test_a_ledger_in_memory_keeps_what_a_saga_failed_with_once() -> None:
    async def fails(*_: Any) -> None:
        raise ConnectionError("no line")

    ledger = MemoryLedger()
    run(SagaCoordinator(ledger=ledger).run(Pipeline(name="p").with_stage("a", fails, "work"), saga_id="s"))

    _, _, failed, turned, _ = run(ledger.read("s"))
    assert isinstance(failed, StageFailed)
    assert isinstance(turned, SagaTurnedBack)
    assert failed.failure is turned.cause


class Connection:
    """Something that a stage holds while it runs."""


@pytest.mark.parametrize("where", ["stage", "fallback", "compensation", "probe"])
def test_a_ledger_in_memory_lets_go_of_what_failing_code_had_in_its_hands(where: str) -> None:
    """The exception is the report's; kept with ten thousand sagas, each traceback would keep a whole run and its connections."""
    held: list[weakref.ref[Connection]] = []

    async def fails(*_: Any) -> None:
        connection = Connection()
        held.append(weakref.ref(connection))
        raise ConnectionError("no line")

    async def works(*_: Any) -> None: ...

    async def hangs(_: SagaContext) -> None:
        await elapse(60.0)

    forward = {"compensation": works, "probe": hangs}.get(where, fails)
    undo = fails if where == "compensation" else works
    stage = compensable(forward, undo, fallback=fails if where == "fallback" else None, probe=fails if where == "probe" else None)
    pipeline = Pipeline(name="p").with_stage("a", stage, "work")
    if where == "compensation":
        pipeline = pipeline.with_stage("b", fails, "work", dependencies=("a",))
    coordinator = SagaCoordinator(ContinueWithFallback() if where == "fallback" else FailFast(timeout=1.0))

    report = run(coordinator.run(pipeline, saga_id="s"))

    seen = [failure.exception for failure in report.failures if failure.exception is not None]
    assert {type(error) for error in seen} == {ConnectionError}
    again = run(coordinator.report("s"))
    assert again == report
    assert [failure.exception for failure in again.failures] == [None] * len(report.failures)
    assert "ConnectionError: no line" in str([failure.traceback for failure in again.failures])
    del report, seen
    gc.collect()
    assert held
    assert [ref() for ref in held] == [None] * len(held)
