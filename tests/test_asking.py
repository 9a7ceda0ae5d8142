"""How a stage's probe is asked: how often, for how long, what it is told, and what gives way to a saga that stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    MemoryLedger,
    PivotStage,
    Policy,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
)
from saga.compensable import SagaStage
from saga.events import (
    AnyEvent,
    StageProbed,
)
from tests.controlled import elapse, run
from tests.slow import SlowDisk
from tests.test_ledger import OUTPUT
from tests.world import SEQUENCE, CardDeclined, Script, scene

Answers = Callable[[CompensationContext], Awaitable[StageOutput | None]]


class Silent(CompensableStage):
    """Never ends; what its probe answers is up to the test."""

    timeout = 1.0

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    async def execute(self, ctx: Any) -> None:
        await asyncio.Event().wait()

    async def compensate(self, ctx: CompensationContext) -> None: ...

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return await self.answers(ctx)


def asked(answers: Answers, policy: FailFast) -> tuple[SagaReport, list[StageProbed], float]:
    """What came of a saga of that stage, what its ledger says of the probe, and how long it took."""

    async def main() -> tuple[SagaReport, list[AnyEvent], float]:
        ledger = MemoryLedger()
        report = await SagaCoordinator(policy, ledger=ledger).run(Pipeline().with_stage("silent", Silent(answers)), saga_id="s")
        return report, [*await ledger.read("s")], asyncio.get_running_loop().time()

    report, events, took = run(main())
    return report, [event for event in events if isinstance(event, StageProbed)], took


def asking(**settings: Any) -> FailFast:
    return FailFast(cancel_grace=2, compensation=Compensation(timeout=3, retry=Retry(jitter=False, **settings)))


def test_a_probe_is_told_which_attempt_it_is_and_the_ledger_whether_another_one_follows() -> None:
    attempts: list[int] = []

    async def no_line(ctx: CompensationContext) -> StageOutput | None:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise OSError("no line")
        return None

    report, probed, _ = asked(no_line, asking(attempts=3, wait=0))

    assert attempts == [1, 2, 3]
    assert [(one.landed, one.will_retry, one.failure and one.failure.attempt) for one in probed] == [
        (None, True, 1),
        (None, True, 2),
        (False, False, None),
    ]
    assert report.stages["silent"].state is StageState.FAILED


def test_a_probe_is_asked_no_longer_than_its_retry_lasts_counted_from_its_first_attempt() -> None:
    async def no_line(_: CompensationContext) -> StageOutput | None:
        await elapse(2)
        raise OSError("no line")

    # It begins a second into the saga: at 1, 3 and 5, and the next one would be 6 seconds after the first.
    report, probed, took = asked(no_line, asking(attempts=9, wait=0, max_elapsed=5))

    assert [one.will_retry for one in probed] == [True, True, False]
    assert took == 1 + 3 * 2
    assert report.in_doubt.keys() == {"silent"}


def test_a_probe_that_ignores_its_cancel_is_waited_for_no_longer_than_the_grace() -> None:
    released = asyncio.Event()

    async def deaf(_: CompensationContext) -> StageOutput | None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()
        return None

    async def main() -> tuple[SagaReport, float]:
        report = await SagaCoordinator(asking(attempts=1)).run(Pipeline().with_stage("silent", Silent(deaf)))
        took = asyncio.get_running_loop().time()
        released.set()
        return report, took

    report, took = run(main())

    assert took == 1 + 3 + 2
    assert report.failures[-1].message == "no answer within 3 s"


@pytest.mark.parametrize("waits", [False, True], ids=["while it is asked", "while it waits to be asked again"])
def test_a_probe_before_a_retry_gives_way_to_the_deadline(waits: bool) -> None:
    async def answer(ctx: CompensationContext) -> StageOutput | None:
        if ctx.cause is None and waits:
            raise OSError("no line")
        if ctx.cause is None:
            await asyncio.Event().wait()
        return None

    policy = asking(attempts=9, wait=100, wait_max=100).model_copy(update={"retry": Retry(attempts=2, wait=0), "deadline": 2.5})

    report, probed, took = asked(answer, policy)

    kinds = [(one.failure.kind, one.failure.attempt) for one in probed if one.failure is not None]
    assert kinds == [(FailureKind.COMPENSATION if waits else FailureKind.INTERRUPTED, 1)]
    # Asked once more when the saga has stopped, it answers.
    assert [one.landed for one in probed] == [None, False]
    assert took == 2.5
    assert report.stages["silent"].state is StageState.FAILED


def test_a_retry_that_is_called_off_after_the_probe_found_nothing_leaves_nothing_in_doubt() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang")}, {"b": "probed"})
    coordinator = SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2, wait=10, jitter=False)))

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(5)
        await coordinator.cancel("s")
        return await running

    report = run(play())

    assert report.stages["b"].probed is False
    assert report.stages["b"].state is StageState.FAILED
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("last", ["hang", "raise"])
def test_the_last_attempt_is_asked_for_although_the_one_before_it_was(last: str) -> None:
    asked: list[int] = []

    class Asked(CompensableStage):
        timeout = 1.0
        landed = False

        async def execute(self, ctx: SagaContext) -> None:
            if ctx.attempt == 2:
                self.landed = True
                if last == "raise":
                    raise CardDeclined
            await asyncio.Event().wait()

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            asked.append(ctx.attempt)
            return OUTPUT if self.landed else None

        async def compensate(self, ctx: CompensationContext) -> None:
            self.landed = False

    stage = Asked()
    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=1))).run(Pipeline().with_stage("a", stage)))

    assert len(asked) == 2
    assert report.stages["a"].state is StageState.UNDONE
    assert not stage.landed


class Unreachable:
    """Nobody can say what became of it."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        raise AssertionError("it was to be kept from running")

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        raise ConnectionError("the bank is down")


class Charge(Unreachable, CompensableStage):
    async def compensate(self, ctx: CompensationContext) -> None: ...


class Payout(Unreachable, PivotStage): ...


@pytest.mark.parametrize("kept_from_running", [Charge, Payout])
def test_a_stage_that_was_kept_from_running_is_not_asked_whether_its_effect_landed(kept_from_running: type[SagaStage]) -> None:
    """The saga was stuck for an effect that nobody had begun, when what had failed beside it left its probe without an answer, too."""
    world, pipeline = scene({"seat": (), "check": ("seat",)}, {"check": Script("raise")}, {"check": "plain"})
    pipeline = pipeline.with_stage("pay", kept_from_running, dependencies=("seat",))

    report = run(SagaCoordinator(ledger=SlowDisk()).run(pipeline))

    pay = report.stages["pay"]
    assert pay.failure is not None
    assert (pay.attempts, pay.failure.message) == (1, "the saga stopped before it ran")
    assert (pay.state, report.status) == (StageState.FAILED, SagaStatus.COMPENSATED)
    assert world.standing == {}


class Unsearchable(CompensableStage):
    """As the docs have it where a service takes no key and can't be asked: a lost answer is for a person."""

    retry = Retry(attempts=1)

    def __init__(self, loses: str) -> None:
        self.loses, self.calls = loses, list[str]()

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.calls.append("pay")
        if self.loses == "pay":
            await ctx.record("no answer")
            raise ConnectionError("the answer is lost")
        return StageOutput.ok()

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        if ctx.in_doubt or ctx.effects or ctx.output:
            raise LookupError("nobody can tell")
        return None

    async def compensate(self, ctx: CompensationContext) -> None:
        if ctx.attempt > 1:
            raise LookupError("nobody can tell")
        self.calls.append("refund")
        raise ConnectionError("the answer is lost")


@pytest.mark.parametrize("policy", [FailFast(), FailFast(on_failure="halt"), ContinueWithFallback(fallbacks={"pay": {}})])
@pytest.mark.parametrize(("loses", "state"), [("pay", StageState.IN_DOUBT), ("refund", StageState.STUCK)])
def test_what_nobody_can_tell_of_is_carried_out_once_and_left_to_a_person(loses: str, state: StageState, policy: Policy) -> None:
    stage = Unsearchable(loses)
    pipeline = Pipeline(name="p").with_stage("pay", stage)

    async def main() -> list[SagaReport]:
        coordinator = SagaCoordinator(policy)
        first = await coordinator.run(pipeline, saga_id="s")
        if first.ok:
            first = await coordinator.compensate("s", pipeline)
        return [first, await coordinator.resume("s", pipeline)]

    reports = run(main())

    assert [report.stages["pay"].state for report in reports] == [state, state]
    assert stage.calls == ["pay", "refund"][: 1 if loses == "pay" else 2]
