"""Going backward: limits of time, cancels from outside, and what is told of a compensation that failed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from stageflow.api import Pipeline

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    FailFast,
    FailureKind,
    LedgerError,
    MemoryLedger,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.events import (
    AnyEvent,
    CompensationFailed,
    CompensationStarted,
)
from tests.controlled import elapse, run
from tests.slow import SlowLedger
from tests.test_hard_cases import by_cancelling_every_task, deaf
from tests.world import SEQUENCE, CardDeclined, Script, scene

ONCE = Compensation(retry=Retry(attempts=1))


async def fine(_: Any) -> None: ...


async def declined(_: Any) -> None:
    raise CardDeclined


def test_a_compensation_is_not_attempted_after_its_longest_time() -> None:
    # It starts at 100 s of the loop: what counts is the time since its own first attempt.
    script = Script(undo_fails=9, undo_takes=4)
    _, pipeline = scene({"a": (), "b": ("a",)}, {"a": script, "b": Script("raise", before=100)})
    patient = Retry(attempts=9, wait=1, multiplier=1, jitter=False, max_elapsed=12)

    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=patient))).run(pipeline))

    assert script.undo_attempts == 3
    assert report.stages["a"].state is StageState.STUCK


def test_a_compensation_that_was_cancelled_from_outside_says_so() -> None:
    _, pipeline = scene(SEQUENCE, {"c": Script("raise", before=1), "b": Script(undo_takes=10)})
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        await by_cancelling_every_task(coordinator.run(pipeline, saga_id="s"))
        return await coordinator.report("s")

    undo = run(play()).stages["b"].compensation

    assert undo is not None
    assert undo.failure is not None
    assert undo.failure.type == "InterruptedError"
    assert undo.failure.message == "its task was cancelled from outside"


def test_a_compensation_that_raises_a_cancel_of_its_own_is_not_called_cancelled_from_outside() -> None:
    async def undo(_: CompensationContext) -> None:
        raise asyncio.CancelledError("mine")

    pipeline = Pipeline().with_stage("a", compensable(fine, undo)).with_stage("b", declined, "work", dependencies=("a",))

    undone = run(SagaCoordinator(FailFast(compensation=ONCE)).run(pipeline)).stages["a"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "mine"


def test_a_timeout_that_a_compensation_survives_is_not_held_against_the_next_one() -> None:
    async def stubborn(_: CompensationContext) -> None:
        try:
            await elapse(10)
        except asyncio.CancelledError:
            await elapse(1)

    async def cancels_itself(_: CompensationContext) -> None:
        raise asyncio.CancelledError("mine")

    pipeline = (
        Pipeline()
        .with_stage("a", compensable(fine, cancels_itself))
        .with_stage("b", compensable(fine, stubborn), dependencies=("a",))
        .with_stage("c", declined, "work", dependencies=("b",))
    )

    report = run(SagaCoordinator(FailFast(compensation=Compensation(timeout=3, retry=Retry(attempts=1)))).run(pipeline))

    assert report.stages["b"].state is StageState.UNDONE
    undone = report.stages["a"].compensation
    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "mine"


def test_a_ledger_is_not_written_under_a_cancel_that_a_compensation_survived() -> None:
    cancels: list[tuple[str, int]] = []

    class Watching(MemoryLedger):
        async def append(self, saga_id: str, events: Sequence[AnyEvent], **more: Any) -> None:
            task = asyncio.current_task()
            assert task is not None
            cancels.extend((type(event).__name__, task.cancelling()) for event in events)
            await super().append(saga_id, events, **more)

    async def stubborn(_: CompensationContext) -> None:
        try:
            await elapse(10)
        except asyncio.CancelledError:
            await elapse(1)

    pipeline = Pipeline().with_stage("a", compensable(fine, stubborn)).with_stage("b", declined, "work", dependencies=("a",))

    run(SagaCoordinator(FailFast(compensation=Compensation(timeout=3)), ledger=Watching()).run(pipeline))

    assert ("CompensationCompleted", 0) in cancels


def test_when_the_ledger_breaks_while_going_backward_nobody_is_asked_any_more() -> None:
    asked: list[str] = []

    async def probe(ctx: CompensationContext) -> None:
        asked.append(ctx.stage_name)

    pipeline = Pipeline().with_stage("a", compensable(declined, fine, probe=probe)).with_stage("b", compensable(fine, fine))
    one_by_one = FailFast(compensation=Compensation(max_concurrency=1))

    with pytest.raises(LedgerError, match="disk full"):
        run(SagaCoordinator(one_by_one, ledger=SlowLedger(CompensationStarted)).run(pipeline))

    assert asked == []


def test_an_error_of_a_compensation_that_was_cancelled_from_outside_is_told_in_its_own_words() -> None:
    async def undo(_: CompensationContext) -> None:
        try:
            await elapse(10)
        except asyncio.CancelledError:
            raise CardDeclined("closed") from None

    async def late(_: Any) -> None:
        await elapse(1)
        raise CardDeclined

    pipeline = Pipeline().with_stage("a", compensable(fine, undo)).with_stage("b", late, "work", dependencies=("a",))
    coordinator = SagaCoordinator(FailFast(compensation=ONCE))

    async def play() -> SagaReport:
        await by_cancelling_every_task(coordinator.run(pipeline, saga_id="s"))
        return await coordinator.report("s")

    undone = run(play()).stages["a"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "closed"


def test_a_compensation_that_is_given_up_is_told_of_in_full() -> None:
    released = asyncio.Event()

    async def undo(ctx: CompensationContext) -> None:
        if ctx.attempt == 1:
            raise ConnectionError("no line")
        await deaf(released)

    pipeline = Pipeline().with_stage("a", compensable(fine, undo)).with_stage("b", declined, "work", dependencies=("a",))
    policy = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=2, wait=0)))

    async def play() -> SagaReport:
        report = await SagaCoordinator(policy).run(pipeline)
        released.set()
        return report

    undone = run(play()).stages["a"].compensation

    assert undone is not None
    assert undone.failure is not None
    assert (undone.failure.stage, undone.failure.kind, undone.failure.attempt) == ("a", FailureKind.COMPENSATION, 2)
    assert undone.failure.message == "it was not done in time, and it ignored its cancel for 2 s; it may still be running"


def test_what_stands_on_nothing_but_a_compensation_that_was_given_up_goes_when_the_policy_continues() -> None:
    released = asyncio.Event()
    world, pipeline = scene({"a": ()}, {"a": Script(order_matters=False)})

    async def undo(_: CompensationContext) -> None:
        await deaf(released)

    pipeline = pipeline.with_stage("b", compensable(fine, undo), dependencies=("a",))
    pipeline = pipeline.with_stage("c", declined, "work", dependencies=("b",))
    policy = FailFast(cancel_grace=2, compensation=Compensation(timeout=10, retry=Retry(attempts=1), on_failure="continue"))

    async def play() -> SagaReport:
        report = await SagaCoordinator(policy).run(pipeline)
        released.set()
        return report

    report = run(play())

    assert world.standing == {}
    assert (report.stages["b"].state, report.stages["a"].state) == (StageState.STUCK, StageState.UNDONE)


def test_a_wait_that_the_backward_deadline_ends_leaves_the_failure_that_it_should_have_mended() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script(undo_fails=9), "c": Script("raise")})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(deadline=5, retry=Retry(attempts=3, wait=10, jitter=False))))

    report = run(coordinator.run(pipeline, saga_id="s"))

    undone = report.stages["b"].compensation
    assert not any(failure.of_probe for failure in report.failures)
    assert undone is not None
    assert undone.failure is not None
    assert undone.failure.message == "undoing b was declined"
    told = [event for event in run(coordinator.ledger.read("s")) if isinstance(event, CompensationFailed)]
    assert [(event.failure, event.will_retry) for event in told] == [(undone.failure, True), (undone.failure, False)]


@pytest.mark.parametrize("moment", [2.1, 2.4, 2.6, 2.9])
def test_cancelling_every_task_while_the_ledger_writes_ends_the_saga_as_a_crash_would(moment: float) -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    coordinator = SagaCoordinator(ledger=SlowLedger())

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(moment)
        mine = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if "watched" not in repr(task)]
        assert len(mine) == 3
        for task in mine:
            task.cancel()
        with pytest.raises((LedgerError, asyncio.CancelledError)):
            await running
        return await coordinator.report("s")

    assert run(play()).status is SagaStatus.COMPENSATING
    assert world.refusals == []


async def cancel_every_task() -> None:
    mine = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if "watched" not in repr(task)]
    for task in mine:
        task.cancel()
    await asyncio.gather(*mine, return_exceptions=True)


def test_cancelling_every_task_while_a_stage_waits_for_its_retry_calls_the_retry_off() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise", then=("ok",))})
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=10, jitter=False)))

    async def play() -> SagaReport:
        asyncio.create_task(coordinator.run(pipeline, saga_id="s"))  # noqa: RUF006 - found again among all tasks
        await elapse(5)
        await cancel_every_task()
        return await coordinator.report("s")

    report = run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["b"].attempts == 1
    assert world.standing == {}


def test_cancelling_every_task_while_a_probe_waits_to_be_asked_again_has_it_asked_at_once() -> None:
    class Shy(CompensableStage):
        asked = 0

        async def execute(self, ctx: SagaContext) -> None:
            raise CardDeclined

        async def probe(self, ctx: CompensationContext) -> None:
            Shy.asked += 1
            if Shy.asked == 1:
                raise CardDeclined

        async def compensate(self, ctx: CompensationContext) -> None: ...

    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=2, wait=10, jitter=False))))

    async def play() -> tuple[SagaReport, float]:
        asyncio.create_task(coordinator.run(Pipeline().with_stage("shy", Shy), saga_id="s"))  # noqa: RUF006 - found again among all tasks
        await elapse(5)
        await cancel_every_task()
        return await coordinator.report("s"), asyncio.get_running_loop().time()

    report, took = run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert (Shy.asked, took) == (2, 5)


def test_nothing_of_a_saga_that_was_undone_waits_for_its_backward_deadline() -> None:
    class Held(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None: ...

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def play() -> weakref.ref[Held]:
        stage = Held()
        pipeline = Pipeline().with_stage("a", stage).with_stage("b", declined, "work", dependencies=("a",))
        report = await SagaCoordinator(FailFast(compensation=Compensation(deadline=3600))).run(pipeline)
        assert report.status is SagaStatus.COMPENSATED
        return weakref.ref(stage)

    async def main() -> Held | None:
        held = await play()
        gc.collect()
        return held()

    assert run(main()) is None
