"""Stages that are made with `compensable` of what others wrote."""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

import pytest
import tenacity
from pydantic import BaseModel
from stageflow.api import Pipeline, StageContext, StageOutput, stage

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    FailFast,
    PipelineInvalid,
    PivotStage,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    compensable,
    nested,
)
from saga.blueprint import Blueprint
from saga.ledgers.sqlite import SQLiteLedger
from tests.controlled import elapse, run
from tests.world import nothing


class Seat(BaseModel):
    number: str


class Booked(BaseModel):
    seat: Seat


class Runner:
    kind = "work"
    output_model = Booked

    async def execute(self, _: Any) -> StageOutput:
        return StageOutput.ok(seat=Seat(number="14A"))


@pytest.mark.parametrize("runner", [Runner, Runner()], ids=["class", "instance"])
def test_what_its_runner_declares_of_its_output_holds_after_a_restart(runner: Any, tmp_path: Path) -> None:
    freed: list[str] = []

    async def free(ctx: CompensationContext) -> None:
        assert ctx.output is not None
        freed.append(ctx.output.data["seat"].number)

    pipeline = Pipeline(name="p").with_stage("seat", compensable(runner, free))

    async def in_two_lives() -> SagaReport:
        async with SQLiteLedger(tmp_path / "ledger.db") as ledger:
            await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s")
        async with SQLiteLedger(tmp_path / "ledger.db") as ledger:
            return await SagaCoordinator(ledger=ledger).compensate("s", pipeline)

    assert asyncio.run(in_two_lives()).status is SagaStatus.COMPENSATED
    assert freed == ["14A"]


class Patient:
    """Says of itself when it is made how patient it is."""

    kind = "work"

    def __init__(self, seconds: float = 1.0) -> None:
        self.timeout = seconds
        self.retry = Retry(attempts=4, wait=0)
        self.idempotent = True

    async def execute(self, _: Any) -> None: ...


def test_what_a_class_says_of_itself_when_it_is_made_counts() -> None:
    made = stage("a", compensable(Patient, nothing), config={"seconds": 7.0})
    given = stage("b", compensable(Patient, nothing, timeout=3.0, retry=Retry(attempts=2)))

    blueprint = Blueprint.of(Pipeline(name="p", stages={"a": made, "b": given}))

    assert (blueprint.stages["a"].timeout, blueprint.stages["a"].retry, blueprint.graph["a"].idempotent) == (
        7.0,
        Retry(attempts=4, wait=0),
        True,
    )
    assert (blueprint.stages["b"].timeout, blueprint.stages["b"].retry) == (3.0, Retry(attempts=2))


@pytest.mark.parametrize("runner", [Patient, Patient()], ids=["class", "instance"])
def test_what_is_denied_beside_a_runner_counts_before_what_the_runner_says(runner: Any) -> None:
    """A stage that is not idempotent after all would be run again when its process died, and charge twice."""
    made = compensable(runner, nothing, idempotent=False)

    assert not Blueprint.of(Pipeline(name="p").with_stage("a", made)).graph["a"].idempotent


@pytest.mark.parametrize("runner", [Patient, Patient()], ids=["class", "instance"])
def test_what_a_test_puts_in_the_place_of_a_wrapped_stages_code_is_run(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    async def told(_: Any, ctx: Any) -> None:
        calls.append(ctx.stage_name)

    pipeline = Pipeline(name="p").with_stage("a", compensable(runner, nothing))
    run(SagaCoordinator().run(pipeline))

    monkeypatch.setattr(Patient, "execute", told)
    run(SagaCoordinator().run(pipeline))

    assert calls == ["a"]


@pytest.mark.parametrize("runner", [Patient, Patient()], ids=["class", "instance"])
def test_what_is_set_on_a_wrapped_stage_itself_counts_from_then_on(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compensable(runner, nothing)
    pipeline = Pipeline(name="p").with_stage("a", made)
    before = Blueprint.of(pipeline).stages["a"].retry

    monkeypatch.setattr(made, "retry", Retry(attempts=9))

    assert (before, Blueprint.of(pipeline).stages["a"].retry) == (Retry(attempts=4, wait=0), Retry(attempts=9))


def test_a_class_that_was_made_compensable_may_get_further_bases() -> None:
    """A base with a metaclass, as an abstract one, was a conflict."""

    class Audited(ABC):
        @abstractmethod
        def auditor(self) -> str: ...

    class AuditedPatient(compensable(Patient, nothing), Audited):  # type: ignore[misc] # what compensable() makes is known when it runs
        def auditor(self) -> str:
            return "Ada"

    offer = Blueprint.of(Pipeline(name="p").with_stage("a", AuditedPatient)).stages["a"]

    assert offer.retry == Retry(attempts=4, wait=0)


class Charge:
    """A stage that is an object to be called."""

    retry = Retry(attempts=2, wait=0)

    def __init__(self) -> None:
        self.charged: list[int] = []

    async def __call__(self, ctx: Any) -> None:
        if ctx.attempt == 1:
            raise ConnectionError
        self.charged.append(5)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.charged.append(-5)


async def declines(_: Any) -> None:
    raise ValueError("no")


def test_what_an_object_that_is_called_declares_counts_as_it_does_of_any_other() -> None:
    charge = Charge()
    pipeline = Pipeline().with_stage("charge", charge, "work").with_stage("ship", declines, "work", dependencies=("charge",))

    report = run(SagaCoordinator().run(pipeline))

    assert charge.charged == [5, -5]
    assert list(report.undone) == ["charge"]


def test_what_is_set_on_a_function_counts_as_it_does_of_an_object() -> None:
    charged = []

    async def charge(_: Any) -> None:
        charged.append(5)

    async def refund(_: CompensationContext) -> None:
        charged.append(-5)

    charge.compensate = refund  # type: ignore[attr-defined] # a function may have any
    pipeline = Pipeline().with_stage("charge", charge, "work").with_stage("ship", declines, "work", dependencies=("charge",))

    report = run(SagaCoordinator().run(pipeline))

    assert charged == [5, -5]
    assert list(report.undone) == ["charge"]


def test_what_a_function_says_of_itself_counts_also_where_some_of_its_arguments_are_given() -> None:
    """As no config= is taken for a function, that is how one is told what to do."""
    charged = []

    async def charge(_: Any, amount: int) -> None:
        charged.append(amount)

    async def refund(_: CompensationContext) -> None:
        charged.append(-5)

    pipeline = Pipeline().with_stage("charge", functools.partial(charge, amount=5), "work")
    pipeline = pipeline.with_stage("ship", declines, "work", dependencies=("charge",))
    Blueprint.of(pipeline)

    charge.compensate = refund  # type: ignore[attr-defined] # a function may have any
    report = run(SagaCoordinator().run(pipeline))

    assert charged == [5, -5]
    assert list(report.undone) == ["charge"]


class Traced:
    """As a decorator makes it that is a class."""

    def __init__(self, wrapped: Callable[[Any], Any]) -> None:
        functools.update_wrapper(self, wrapped)
        self.wrapped = wrapped

    async def __call__(self, ctx: SagaContext) -> Any:
        return await self.wrapped(ctx)


@pytest.mark.parametrize(
    "made",
    [lambda runner: runner, Traced, lambda runner: compensable(runner, nothing), lambda runner: compensable(Traced(runner), nothing)],
    ids=["plain", "wrapped", "compensable", "wrapped and compensable"],
)
def test_a_function_that_tenacity_retries_is_a_stage_like_any_other(made: Callable[[Any], Any]) -> None:
    calls: list[int] = []

    @tenacity.retry(stop=tenacity.stop_after_attempt(2))
    async def call(_: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise ConnectionError

    report = run(SagaCoordinator().run(Pipeline().with_stage("call", made(call), "work")))

    assert calls == [0, 1]
    assert report.ok


class Send(PivotStage):
    async def execute(self, ctx: SagaContext) -> None: ...


@pytest.mark.parametrize("pivot", [Send, Send()], ids=["class", "instance"])
def test_a_pivot_can_not_be_made_compensable(pivot: Any) -> None:
    with pytest.raises(PipelineInvalid, match=r"expected a runner that can be undone, got the pivot .* A pivot is the point of no return"):
        compensable(pivot, nothing)


def test_a_nested_saga_with_a_pivot_holds_what_it_depends_on_under_another_compensation_too() -> None:
    """Promise 10."""
    undone: list[str] = []

    class Note(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None: ...

        async def compensate(self, ctx: CompensationContext) -> None:
            undone.append(ctx.stage_name)

    async def fails(_: Any) -> None:
        raise ConnectionError("no line")

    child = nested(Pipeline(name="child").with_stage("send", Send))
    pipeline = Pipeline(name="p").with_stage("before", Note).with_stage("child", compensable(child, nothing), dependencies=("before",))
    pipeline = pipeline.with_stage("after", fails, "work", dependencies=("child",))

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.HALTED
    assert undone == []


class Refunds(CompensableStage):
    async def execute(self, ctx: SagaContext) -> dict[str, Any]:
        return {"receipt": 7}

    async def compensate(self, ctx: CompensationContext) -> StageOutput:
        return StageOutput.fail("the bank is closed")


async def charge(ctx: SagaContext) -> dict[str, Any]:
    return {"receipt": 7}


async def refund(ctx: CompensationContext) -> StageOutput:
    return StageOutput.fail("the bank is closed")


@pytest.mark.parametrize("stage", [Refunds, compensable(charge, refund)])
def test_what_undoes_a_stage_may_say_that_it_failed_and_a_type_checker_knows(stage: Any) -> None:
    pipeline = Pipeline(name="p").with_stage("charge", stage)
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))))
    run(coordinator.run(pipeline, saga_id="s"))

    report = run(coordinator.compensate("s", pipeline))

    assert list(report.stuck) == ["charge"]
    assert [failure.message for failure in report.failures] == ["it returned FAIL: the bank is closed"]


def undone_with(read: Callable[[CompensationContext], Any]) -> SagaReport:
    """A room beside a seat and a meal for it; the meal is undone by code that reads what others gave."""

    async def cancel(ctx: CompensationContext) -> None:
        read(ctx)

    async def hold(ctx: StageContext) -> dict[str, Any]:
        return {"number": f"14A of {ctx.stage_name}"}

    pipeline = (
        Pipeline(name="p")
        .with_stage("seat", hold, "work")
        .with_stage("room", hold, "work")
        .with_stage("meal", compensable(hold, cancel), dependencies=("seat",))
    )
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))))
    run(coordinator.run(pipeline, saga_id="s"))
    return run(coordinator.compensate("s", pipeline))


def test_a_compensation_reads_what_others_gave_as_the_stage_did() -> None:
    seen: list[Any] = []

    undone_with(lambda ctx: seen.extend([ctx.inputs.get_from("seat", "number"), ctx.inputs.get_from("seat", "row", 14), dict(ctx.inputs)]))
    undone_with(lambda ctx: seen.extend([ctx.inputs.get("seat"), ctx.inputs.get("row", 14)]))

    seat = StageOutput.ok(number="14A of seat")
    assert seen == ["14A of seat", 14, {"seat": seat}, seat, 14]


def test_what_a_compensation_gets_is_an_output_and_a_type_checker_knows() -> None:
    """It took it for the value that `execute` gets: `ctx.inputs.get("seat")["number"]` was well with it, and the undoing got stuck."""
    seen: list[Any] = []

    def read(ctx: CompensationContext) -> None:
        seat, row = ctx.inputs.get("seat"), ctx.inputs.get("row", 14)
        seen.extend([assert_type(seat, StageOutput | None), assert_type(row, StageOutput | int)])

    undone_with(read)

    assert seen == [StageOutput.ok(number="14A of seat"), 14]


def test_a_compensation_reads_what_others_gave_by_whatever_its_stage_may_call() -> None:
    seen: list[Any] = []

    undone_with(lambda ctx: seen.extend([ctx.inputs.require_from("seat", "number"), ctx.inputs.get_output("seat")]))
    undone_with(lambda ctx: seen.extend([ctx.inputs.has_output("seat"), ctx.inputs.prior_outputs]))

    seat = StageOutput.ok(number="14A of seat")
    assert seen == ["14A of seat", seat, True, {"seat": seat}]


def test_a_compensation_that_requires_what_nobody_gave_is_told_what_there_is() -> None:
    report = undone_with(lambda ctx: ctx.inputs.require_from("seat", "row"))

    assert list(report.stuck) == ["meal"]
    assert "expected a key of what seat gave (number), got 'row'" in report.failures[0].message


@pytest.mark.parametrize(
    "read",
    [
        lambda ctx: ctx.inputs["room"],
        lambda ctx: ctx.inputs.get_from("room", "number"),
        lambda ctx: ctx.inputs.require_from("room", "number"),
        lambda ctx: ctx.inputs.get_output("room"),
        lambda ctx: ctx.inputs.has_output("room"),
    ],
)
def test_a_compensation_that_reads_what_its_stage_does_not_depend_on_is_told_so(read: Callable[[CompensationContext], Any]) -> None:
    report = undone_with(read)

    assert list(report.stuck) == ["meal"]
    assert "expected a stage that this one depends on (seat), got 'room'" in report.failures[0].message


def test_a_compensation_that_asks_for_a_value_as_execute_may_is_told_how_to_ask() -> None:
    """What `execute` gets by `ctx.inputs.get(key)`, whichever stage gave it, was None in a compensation, which then undid nothing."""
    report = undone_with(lambda ctx: ctx.inputs.get("number"))

    assert list(report.stuck) == ["meal"]
    expected = "expected a stage that this one depends on (seat), got a key of what seat gave: get_from('seat', 'number')"
    assert expected in report.failures[0].message


@dataclass(frozen=True)
class Unanswered(CompensableStage):
    """Waits for an answer that never comes, as long as each object of it is told to."""

    timeout: float
    retry: Retry | None = None
    compensate_in_doubt: bool = True

    async def execute(self, ctx: SagaContext) -> None:
        await elapse(60)

    async def compensate(self, ctx: CompensationContext) -> None: ...


def test_each_object_of_a_stage_may_declare_for_itself_and_a_type_checker_knows() -> None:
    once = Pipeline(name="p").with_stage("hold", Unanswered(timeout=3))
    twice = Pipeline(name="p").with_stage("hold", Unanswered, config={"timeout": 5, "retry": Retry(attempts=2)})

    reports = [run(SagaCoordinator().run(pipeline)) for pipeline in (once, twice)]

    assert [report.status for report in reports] == [SagaStatus.COMPENSATED] * 2
    assert [report.stages["hold"].attempts for report in reports] == [1, 2]
    assert [str(report.cause) for report in reports] == [
        "stage 'hold' ran out of time: no answer within 3 s",
        "stage 'hold' ran out of time at attempt 2: no answer within 5 s",
    ]


def test_code_that_says_nothing_of_its_arguments_is_called_as_any_other() -> None:
    called: list[str] = []

    async def pay(*given: StageContext) -> None:
        called.append(given[0].stage_name)

    pay.__signature__ = "pay(ctx)"  # type: ignore[attr-defined] # what some binding generators leave there

    report = run(SagaCoordinator().run(Pipeline(name="p").with_stage("pay", pay, "work")))

    assert report.ok
    assert called == ["pay"]


@pytest.mark.parametrize("takes", ["ctx", "anything"])
def test_a_wrapper_that_gives_what_it_wraps_a_further_argument_is_called_as_it_says_itself(takes: str) -> None:
    paid: list[str] = []

    def with_bank(pay: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(pay)
        async def paying(ctx: Any) -> Any:
            return await pay(ctx, "DNB")

        @functools.wraps(pay)
        async def paying_with(*args: Any, **kwargs: Any) -> Any:
            return await pay(*args, bank="DNB", **kwargs)

        return paying if takes == "ctx" else paying_with

    @with_bank
    async def pay(ctx: Any, bank: str) -> None:
        paid.append(f"{ctx.stage_name} from {bank}")

    report = run(SagaCoordinator().run(Pipeline(name="p").with_stage("pay", pay, "work")))

    assert report.ok
    assert paid == ["pay from DNB"]
