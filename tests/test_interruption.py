"""However, whenever and how often a saga is interrupted, it comes to rest, and then its caller learns of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from stageflow.api import Pipeline, PipelineContext

from saga import (
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    LedgerError,
    MemoryLedger,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    compensable,
    nested,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationStarted,
    SagaEnded,
    SagaStopped,
    SagaTurnedBack,
    StageFailed,
    StageStarted,
)
from saga.ledgers.sqlite import SQLiteLedger
from tests.controlled import ControlledLoop, elapse, run
from tests.world import BRANCHES, DIAMOND, HOOKED, SEQUENCE, CardDeclined, Recorder, Script, scene

PATIENT = Retry(attempts=3, wait=10, jitter=False)


@dataclass(frozen=True)
class Phase:
    """What a saga is doing when it is interrupted, and at which moment.

    Attributes:
        scripts: Makes what its stages do; each run needs its own.
        shape: Its pipeline's.
        policy: What differs from the default one.
        at: The moment, in seconds.
        is_cause_under: The policies under which nothing else has stopped the saga before.
        first_cancelled_at: When it was cancelled for the first time already, if it was.
    """

    scripts: Callable[[], dict[str, Script]]
    shape: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SEQUENCE)
    policy: dict[str, Any] = field(default_factory=dict)
    at: float = 5
    is_cause_under: tuple[str, ...] = ("fail fast", "continue with fallback")
    first_cancelled_at: float | None = None


PHASES = {
    "a stage runs": Phase(lambda: {"b": Script(before=10)}),
    "between two stages": Phase(lambda: {"a": Script(before=5)}),
    "it drains after a failure": Phase(lambda: {"b": Script("raise", before=1), "c": Script(before=10)}, BRANCHES, is_cause_under=()),
    "it drains after a cancel": Phase(lambda: {"b": Script(before=20), "c": Script(before=10)}, BRANCHES, first_cancelled_at=2),
    "a stage waits for its retry": Phase(lambda: {"b": Script("raise", then=("ok",))}, policy={"retry": PATIENT}),
    "a stage is asked before its retry": Phase(
        lambda: {"b": Script("hang", lands=True, probe_takes=10)}, policy={"timeout": 1, "retry": PATIENT}
    ),
    "a stage is asked after its last attempt": Phase(
        lambda: {"b": Script("hang", lands=True, probe_takes=10)},
        policy={"timeout": 1},
        # It is asked before a fallback stands in: had its effect landed, nothing had failed.
        is_cause_under=("continue with fallback",),
    ),
    "a compensation runs": Phase(lambda: {"b": Script(undo_takes=10), "c": Script("raise", before=1)}, is_cause_under=()),
    "a compensation waits for its retry": Phase(
        lambda: {"b": Script(undo_fails=1), "c": Script("raise")}, policy={"compensation": Compensation(retry=PATIENT)}, is_cause_under=()
    ),
}
POLICIES = {"fail fast": FailFast, "continue with fallback": ContinueWithFallback}

# -- the ways to interrupt a saga: each ends when the caller has got its answer ------------------------------------


async def by_cancelling_its_task(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    task = asyncio.create_task(saga)
    await elapse(at)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_cancelling_its_task_again_and_again(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    task = asyncio.create_task(saga)
    await elapse(at)
    while not task.done():
        task.cancel()
        await elapse(0.5)
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_wait_for(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(saga, at)


async def limited(saga: Awaitable[Any], *limits: float) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for seconds in limits:
            await stack.enter_async_context(asyncio.timeout(seconds))
        await saga


async def by_timeout(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    with pytest.raises(TimeoutError):
        await limited(saga, at)


async def by_timeouts_in_each_other(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    # The inner one's time is up first, and before its caller may go on the outer one's is, too.
    with pytest.raises(TimeoutError):
        await limited(saga, at + 0.5, at)


async def decline(_: Any) -> None:
    raise CardDeclined


async def fails(at: float) -> None:
    await elapse(at)
    raise CardDeclined


async def by_task_group(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fails(at))
            await saga

    with pytest.raises(ExceptionGroup):
        await grouped()


async def by_its_sibling_in_a_task_group(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(saga)
            group.create_task(fails(at))

    # In a task of its own: Python 3.11 leaves the count of cancels wrong behind a group whose body had ended.
    with pytest.raises(ExceptionGroup):
        await asyncio.create_task(grouped())


async def by_anyio_task_group(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    async def grouped() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(fails, at)
            await saga

    with pytest.raises(ExceptionGroup):
        await grouped()


async def by_move_on_after(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    with anyio.move_on_after(at) as scope:
        await saga
    assert scope.cancelled_caught


async def by_cancel_scope(saga: Coroutine[Any, Any, SagaReport], at: float, _: SagaCoordinator) -> None:
    with anyio.CancelScope() as scope:
        asyncio.get_running_loop().call_later(at, scope.cancel)
        await saga
    assert scope.cancelled_caught


async def by_its_id(saga: Coroutine[Any, Any, SagaReport], at: float, coordinator: SagaCoordinator) -> None:
    task = asyncio.create_task(saga)
    await elapse(at)
    await coordinator.cancel("s")
    assert (await task).saga_id == "s"


WAYS = [
    by_cancelling_its_task,
    by_cancelling_its_task_again_and_again,
    by_wait_for,
    by_timeout,
    by_timeouts_in_each_other,
    by_task_group,
    by_its_sibling_in_a_task_group,
    by_anyio_task_group,
    by_move_on_after,
    by_cancel_scope,
    by_its_id,
]


def stop_by_id(coordinator: SagaCoordinator) -> None:
    saga = coordinator._keeper.held.sagas["s"]
    assert saga is not None
    saga.interrupt("the shop closes")


class Interrupted:
    """A saga in some phase, and its caller."""

    def __init__(self, phase: Phase, policy: str, on_interrupt: str) -> None:
        self.world, self.pipeline = scene(phase.shape, phase.scripts(), dict.fromkeys(phase.shape, "probed"))
        self.coordinator = SagaCoordinator(POLICIES[policy](on_interrupt=on_interrupt, **phase.policy))
        self.phase = phase
        self.is_cause = policy in phase.is_cause_under
        self.is_answered = False

    async def call(self) -> SagaReport:
        try:
            return await self.coordinator.run(self.pipeline, saga_id="s")
        finally:
            self.is_answered = True
            assert self.coordinator._keeper.held.sagas == {}, "the caller went on before the saga had come to rest"
            assert not self.world.running
            assert not self.world.undoing

    def cancel_before(self) -> None:
        if self.phase.first_cancelled_at is not None:
            asyncio.get_running_loop().call_later(self.phase.first_cancelled_at, stop_by_id, self.coordinator)

    def report(self) -> SagaReport:
        return run(self.coordinator.report("s"))


def has_come_to_rest(saga: Interrupted, on_interrupt: str) -> None:
    report = saga.report()
    assert saga.is_answered
    assert report.ended_at is not None
    assert report.clean
    if saga.is_cause:
        assert report.cause is not None
        assert (report.cause.stage, report.cause.kind) == (None, FailureKind.INTERRUPTED)
    halts = saga.is_cause and on_interrupt == "halt"
    assert report.status is (SagaStatus.HALTED if halts else SagaStatus.COMPENSATED)
    assert set(report.kept) == set(saga.world.standing)
    assert halts or not report.kept


async def scopes_still_work() -> None:
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        await limited(asyncio.Event().wait(), 1)
    with anyio.move_on_after(1) as scope:
        await asyncio.Event().wait()
    assert scope.cancelled_caught


@pytest.mark.parametrize("on_interrupt", ["compensate", "halt"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS)
def test_whoever_interrupts_a_saga_hears_of_it_when_it_has_come_to_rest(way: Any, phase: str, policy: str, on_interrupt: str) -> None:
    saga = Interrupted(PHASES[phase], policy, on_interrupt)

    async def play() -> None:
        saga.cancel_before()
        await way(saga.call(), saga.phase.at, saga.coordinator)
        await scopes_still_work()

    run(play())

    assert saga.world.refusals == []
    has_come_to_rest(saga, on_interrupt)


# -- everything is cancelled: the loop is shut down -----------------------------------------------------------------


@pytest.mark.parametrize("on_interrupt", ["compensate", "halt"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_loop_that_is_shut_down_waits_until_the_saga_has_come_to_rest(phase: str, policy: str, on_interrupt: str) -> None:
    saga = Interrupted(PHASES[phase], policy, on_interrupt)
    mishaps: list[dict[str, Any]] = []
    running: list[asyncio.Task[SagaReport]] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: mishaps.append(context))
        saga.cancel_before()
        running.append(asyncio.create_task(saga.call()))
        await elapse(saga.phase.at)

    # What is left when the main task has ended is cancelled once, and awaited.
    with asyncio.Runner(loop_factory=ControlledLoop) as runner:
        runner.run(leave())

    assert mishaps == []
    assert running[0].cancelled()
    cut_short_and_repeated(saga, phase)
    has_come_to_rest(saga, on_interrupt)


def cut_short_and_repeated(saga: Interrupted, phase: str) -> None:
    """Also the tasks of the saga are cancelled: an attempt of a compensation may be cut short, and is repeated."""
    assert saga.world.refusals == (["the compensation of b was interrupted"] if phase == "a compensation runs" else [])


class Numbered(asyncio.Task[Any]):
    """A task of ours that is named as asyncio names any other: that tells in which order they were made."""

    def __init__(self, work: Coroutine[Any, Any, Any], *, loop: asyncio.AbstractEventLoop, name: str) -> None:
        super().__init__(work, loop=loop)


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "Task", Numbered)


def in_order(tasks: set[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    return sorted(tasks, key=lambda task: int(task.get_name().removeprefix("Task-")))


def the_caller_alone(caller: asyncio.Task[SagaReport]) -> list[asyncio.Task[Any]]:
    return [caller]


def every_task(caller: asyncio.Task[SagaReport]) -> list[asyncio.Task[Any]]:
    others = in_order(asyncio.all_tasks())
    return others[others.index(caller) :]


def every_task_the_youngest_first(caller: asyncio.Task[SagaReport]) -> list[asyncio.Task[Any]]:
    return every_task(caller)[::-1]


@pytest.mark.parametrize("on_interrupt", ["compensate", "halt"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("whom", [every_task, every_task_the_youngest_first])
def test_in_whichever_order_all_tasks_are_cancelled_the_saga_comes_to_rest(whom: Any, phase: str, policy: str, on_interrupt: str) -> None:
    saga = Interrupted(PHASES[phase], policy, on_interrupt)

    async def play() -> None:
        saga.cancel_before()
        caller = asyncio.create_task(saga.call())
        await elapse(saga.phase.at)
        for task in whom(caller):
            task.cancel()
        await asyncio.wait({caller})

    run(play())

    cut_short_and_repeated(saga, phase)
    has_come_to_rest(saga, on_interrupt)


STORIES: dict[str, Callable[[], dict[str, Script]]] = {
    "it completes": lambda: {name: Script(turns=1) for name in "abcd"},
    "its last stage fails": lambda: {name: Script("raise" if name == "d" else "ok", turns=1) for name in "abcd"},
    "two of its stages are asked": lambda: {name: Script("raise" if name in "bc" else "ok", lands=True, turns=2) for name in "abcd"},
}


@pytest.mark.parametrize("on_failure", ["compensate", "halt"])
@pytest.mark.parametrize("on_interrupt", ["compensate", "halt"])
@pytest.mark.parametrize("whom", [the_caller_alone, every_task, every_task_the_youngest_first])
@HOOKED
@pytest.mark.parametrize("story", STORIES)
def test_a_cancel_at_any_turn_of_the_loop_lets_the_saga_come_to_rest(
    story: str, context: PipelineContext | None, whom: Any, on_interrupt: Any, on_failure: Any
) -> None:
    """Also one that comes before a task of the saga has begun, and one that comes when the saga has just ended."""

    async def play(coordinator: SagaCoordinator, pipeline: Pipeline, turns: int) -> bool:
        caller = asyncio.create_task(coordinator.run(pipeline, context, saga_id="s"))
        for _ in range(turns):
            await asyncio.sleep(0)
        comes_too_late = caller.done()
        for task in whom(caller) if not comes_too_late else ():
            task.cancel()
        await asyncio.wait({caller})
        return comes_too_late

    turns, comes_too_late = 1, False
    begun = set()
    while not comes_too_late:
        world, pipeline = scene(DIAMOND, STORIES[story](), dict.fromkeys(DIAMOND, "probed"))
        coordinator = SagaCoordinator(FailFast(on_interrupt=on_interrupt, on_failure=on_failure))
        comes_too_late = run(play(coordinator, pipeline, turns))

        report = run(coordinator.report("s"))
        assert report.ended_at is not None
        assert report.clean
        assert coordinator._keeper.held.sagas == {}
        assert set(report.kept) == set(world.standing)
        assert world.undoing == world.running == set()
        begun.add(sum(stage.attempts > 0 for stage in report.stages.values()))
        turns += 1
    assert {name for name, stage in report.stages.items() if stage.probed} == (
        {"b", "c"} if story == "two of its stages are asked" else set()
    )
    # It has struck before the first stage, and with each layer of the diamond as the last that had begun.
    assert begun == ({0, 1, 3} if story == "two of its stages are asked" else {0, 1, 3, 4})


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("whom", [every_task, every_task_the_youngest_first])
def test_a_nested_saga_is_undone_though_all_tasks_are_cancelled_meanwhile(whom: Any, times: int) -> None:
    """As asyncio.run does before it ends: by a second Ctrl-C, or where a signal's handler raises SystemExit."""
    inner_world, inner = scene({"a": ()}, {"a": Script(undo_takes=10)}, {"a": "probed"})
    world, outer = scene({"before": ()}, {}, {"before": "probed"})
    pipeline = outer.with_stage("within", nested(inner), dependencies=("before",)).with_stage(
        "pay", declines, "work", dependencies=("within",)
    )
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        caller = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        for _ in range(times):
            await elapse(5)
            for task in whom(caller):
                task.cancel()
        await asyncio.wait({caller})
        return await coordinator.report("s")

    report = run(play())

    assert "the compensation of a was interrupted" in inner_world.refusals
    assert inner_world.standing == world.standing == {}
    assert report.status is SagaStatus.COMPENSATED


async def declines(_: Any) -> None:
    raise CardDeclined


def test_code_that_runs_after_a_cancel_was_taken_in_may_use_scopes_of_its_own() -> None:
    """A cancel that has struck already must not be taken for one of the time when they were entered."""
    undone_at: list[int] = []

    async def book(_: SagaContext) -> None: ...

    async def cancel(ctx: CompensationContext) -> None:
        if ctx.attempt == 1:
            raise CardDeclined
        with pytest.raises(ExceptionGroup):
            await by_task_group_of_its_own()
        await scopes_still_work()
        undone_at.append(ctx.attempt)

    async def by_task_group_of_its_own() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fails(1))
            await asyncio.Event().wait()

    pipeline = Pipeline().with_stage("book", compensable(book, cancel)).with_stage("fail", decline, "work", dependencies=("book",))
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=PATIENT)))

    async def play() -> SagaReport:
        caller = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(5)
        for task in every_task(caller):
            task.cancel()
        await asyncio.wait({caller})
        return await coordinator.report("s")

    report = run(play())

    assert undone_at == [2]
    assert report.status is SagaStatus.COMPENSATED


# -- a ledger that fails meanwhile ----------------------------------------------------------------------------------


def test_of_a_stage_whose_time_is_up_when_the_caller_is_cancelled_failures_are_told_in_the_order_of_their_times() -> None:
    _, pipeline = scene({"b": (), "c": ("b",)}, {"b": Script(after=1.0), "c": Script("hang")})
    coordinator = SagaCoordinator(FailFast(timeout=10.0))

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(11.0)
        running.cancel()
        await asyncio.wait({running})
        return await coordinator.report("s")

    report = run(play())

    assert report.cause is not None
    assert report.cause.kind is FailureKind.INTERRUPTED
    assert {failure.kind for failure in report.failures} == {FailureKind.TIMEOUT, FailureKind.INTERRUPTED}
    assert [failure.at for failure in report.failures] == sorted(failure.at for failure in report.failures)


class FailingLedger(MemoryLedger):
    """Fails to record one kind of event, and everything after it."""

    def __init__(self, kind: type[AnyEvent]) -> None:
        super().__init__()
        self.kind, self.has_failed = kind, False

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        self.has_failed = self.has_failed or any(isinstance(event, self.kind) for event in events)
        if self.has_failed:
            raise LedgerError("the disk is full")
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)


def test_a_ledger_that_can_not_note_the_interruption_ends_the_saga_when_nothing_runs_any_more() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=10)})
    coordinator = SagaCoordinator(ledger=FailingLedger(SagaStopped))

    async def play() -> float:
        asyncio.get_running_loop().call_later(5, stop_by_id, coordinator)
        with pytest.raises(LedgerError, match="the disk is full"):
            await coordinator.run(pipeline, saga_id="s")
        return asyncio.get_running_loop().time()

    assert run(play()) == 10
    assert world.running == set()
    assert world.undone() == []


def test_a_ledger_that_can_not_note_what_an_interceptor_refused_ends_the_saga_when_nothing_runs_any_more() -> None:
    world, pipeline = scene(BRANCHES, {"c": Script(before=10)})
    coordinator = SagaCoordinator(ledger=FailingLedger(StageFailed), interceptors=[Recorder(critical="b")])

    async def play() -> None:
        with pytest.raises(LedgerError, match="the disk is full"):
            await coordinator.run(pipeline)
        assert world.running == set()

    run(play())

    assert world.undone() == []


@pytest.mark.parametrize("shape", [SEQUENCE, {"a": (), "b": (), "c": ()}], ids=["sequence", "roots"])
@pytest.mark.parametrize("written", [StageStarted, SagaTurnedBack, CompensationStarted, CompensationCompleted, SagaEnded])
def test_a_saga_outlasts_the_cancel_of_every_task_while_its_ledger_writes(
    tmp_path: Path, written: type[Any], shape: Mapping[str, tuple[str, ...]]
) -> None:
    """As asyncio.run does before it ends: what is under way at that moment is carried out, whoever waits for it."""
    world, pipeline = scene(shape, {"c": Script("raise")})
    cuts = 0

    def cancel_all() -> None:
        for task in asyncio.all_tasks():
            task.cancel()

    def cut(event: AnyEvent) -> AnyEvent:
        nonlocal cuts
        if isinstance(event, written) and not cuts:
            cuts += 1
            # Two turns of the loop later the other first stages wait for this write, too.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, cancel_all)
        return event

    async def play() -> None:
        async with SQLiteLedger(tmp_path / "sagas.db", redact=cut) as ledger:
            await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s")

    async def look() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            return await SagaCoordinator(ledger=ledger).report("s")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(play())
    report = asyncio.run(look())

    assert cuts == 1
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_saga_is_stopped_by_its_id_from_the_event_loop_of_another_thread() -> None:
    world, pipeline = scene({"a": ()}, {}, {"a": "probed"})
    coordinator = SagaCoordinator(FailFast(in_flight="cancel", timeout=100))
    begun = threading.Event()

    async def hangs(_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(max_workers=1) as elsewhere:
        running = elsewhere.submit(asyncio.run, coordinator.run(pipeline.with_stage("b", hangs, "work", dependencies=("a",)), saga_id="s"))
        assert begun.wait(60)
        asyncio.run(coordinator.cancel("s", "the customer left"))
        report = running.result(60)

    assert report.status is SagaStatus.COMPENSATED
    assert str(report.cause) == "the saga was interrupted: the customer left"
    assert world.log == ["+a", "-a"]
