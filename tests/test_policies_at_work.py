"""Stop and keep, go on with fallbacks, go on without the branch; retries and timeouts with counters of their own."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from datetime import timedelta
from typing import Any

import pytest
from stageflow.api import Pipeline, PipelineContext, StageCancellationRequested, StageOutput, StageStatus

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    PivotStage,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.events import CompensationFailed
from tests.controlled import elapse, run
from tests.world import BRANCHES, DIAMOND, SEQUENCE, CardDeclined, Script, Scripted, World, nothing, scene

THREE = Retry(attempts=3, wait=1, jitter=False)


def test_halt_keeps_everything_for_a_redrive() -> None:
    world, pipeline = scene(DIAMOND, {"d": Script("raise")})

    report = run(SagaCoordinator(FailFast(on_failure="halt")).run(pipeline))

    assert report.status is SagaStatus.HALTED
    assert set(report.kept) == set(world.standing) == {"a", "b", "c"}
    assert world.undone() == []
    assert report.cause is not None
    assert report.cause.stage == "d"


def test_a_halted_saga_asks_for_what_is_in_doubt() -> None:
    landed = Script("hang", lands=True)
    world, pipeline = scene(SEQUENCE, {"b": landed}, {"b": "probed"})

    report = run(SagaCoordinator(FailFast(on_failure="halt", timeout=1)).run(pipeline))

    assert report.status is SagaStatus.HALTED
    assert report.stages["b"].state is StageState.KEPT
    assert report.kept["b"].data["probed"] is True
    assert set(world.standing) == {"a", "b"}


def test_a_caller_that_is_cancelled_keeps_everything_when_the_policy_halts() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=5)})
    coordinator = SagaCoordinator(FailFast(on_interrupt="halt"))

    async def cancelled() -> SagaReport:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(coordinator.run(pipeline, saga_id="s"), timeout=1)
        return await coordinator.report("s")

    report = run(cancelled())

    assert report.status is SagaStatus.HALTED
    assert set(world.standing) == {"a", "b"}
    assert report.not_run == ("c",)
    assert str(report).endswith("To do: what was done is kept. Mend the cause, then: saga resume s")


def test_a_fallback_of_the_stage_stands_in_and_the_saga_goes_on() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise")}, {"b": "fallback"})

    report = run(SagaCoordinator(ContinueWithFallback()).run(pipeline))

    assert report.status is SagaStatus.DEGRADED
    assert report.ok
    assert report.fallbacks == report.failed == ("b",)
    assert report.kept["b"].data == {"instead_of": "b"}
    assert set(world.standing) == {"a", "c"}


def test_a_fallback_of_the_policy_stands_in_for_a_stage_that_has_none() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("fail")})
    policy = ContinueWithFallback(fallbacks={"b": {"price": 0}})

    report = run(SagaCoordinator(policy).run(pipeline))

    assert report.status is SagaStatus.DEGRADED
    assert report.kept["b"].data == {"price": 0}
    assert set(world.standing) == {"a", "c"}


def test_a_dependent_gets_the_fallback_as_its_input() -> None:
    seen: list[Any] = []

    async def price(_: Any) -> StageOutput:
        return StageOutput.fail("no answer")

    async def show(ctx: Any) -> None:
        seen.append(ctx.inputs.get_from("price", "amount"))

    pipeline = Pipeline().with_stage("price", price, "enrich").with_stage("show", show, "work", dependencies=("price",))

    run(SagaCoordinator(ContinueWithFallback(fallbacks={"price": {"amount": 7}})).run(pipeline))

    assert seen == [7]


def test_a_fallback_that_fails_too_gives_way_to_the_policys() -> None:
    class Quote(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            raise CardDeclined("first")

        async def fallback(self, ctx: SagaContext, failure: Failure) -> int:
            assert failure.message == "first"
            return 42

        async def compensate(self, ctx: CompensationContext) -> None: ...

    pipeline = Pipeline().with_stage("quote", Quote)

    report = run(SagaCoordinator(ContinueWithFallback(fallbacks={"quote": {"x": 1}})).run(pipeline))

    assert report.kept["quote"].data == {"x": 1}
    assert [failure.kind for failure in report.failures] == [FailureKind.EXCEPTION, FailureKind.CONTRACT]
    assert [failure.stage for failure in report.failures] == ["quote", "quote"]


def test_a_failure_without_a_fallback_is_undone_as_in_fail_fast() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    report = run(SagaCoordinator(ContinueWithFallback()).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.log == ["+a", "+b", "-b", "-a"]


def test_a_failed_branch_is_skipped_and_the_others_go_on() -> None:
    shape = {"root": (), "left": ("root",), "leaf": ("left",), "tip": ("leaf",), "right": ("root",)}
    world, pipeline = scene(shape, {"leaf": Script("raise"), "right": Script(before=9)})

    report = run(SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch")).run(pipeline))

    assert world.refusals == []
    assert report.status is SagaStatus.DEGRADED
    assert report.skipped == ("tip",)
    assert report.stages["tip"].skip_reason == "leaf did not complete"
    # left served the failed leaf alone; root still serves right.
    assert world.undone() == ["left"]
    assert set(world.standing) == set(report.kept) == {"root", "right"}


def test_orphans_are_kept_when_the_policy_says_so() -> None:
    shape = {"root": (), "left": ("root",), "leaf": ("left",), "right": ("root",)}
    world, pipeline = scene(shape, {"leaf": Script("raise")})
    policy = ContinueWithFallback(without_fallback="skip_branch", orphans="keep")

    report = run(SagaCoordinator(policy).run(pipeline))

    assert report.status is SagaStatus.DEGRADED
    assert set(world.standing) == {"root", "left", "right"}


def test_a_saga_whose_every_branch_fell_and_that_keeps_its_orphans_is_halted_and_can_be_redriven_or_undone() -> None:
    """Promise 5: something of it stands, so it is not compensated."""
    shape = {"root": (), "leaf": ("root",)}
    policy = ContinueWithFallback(without_fallback="skip_branch", orphans="keep")
    for goes_on in ("redriven", "undone"):
        world, pipeline = scene(shape, {"leaf": Script("raise", then=("ok",))})
        coordinator = SagaCoordinator(policy)
        report = run(coordinator.run(pipeline, saga_id="s"))
        assert report.status is SagaStatus.HALTED
        assert set(world.standing) == set(report.kept) == {"root"}
        assert "To do: what was done is kept. Mend the cause, then: saga resume s" in str(report)

        after = run(coordinator.resume("s", pipeline) if goes_on == "redriven" else coordinator.compensate("s", pipeline))

        assert after.status is (SagaStatus.COMPLETED if goes_on == "redriven" else SagaStatus.COMPENSATED)
        assert set(world.standing) == (set(shape) if goes_on == "redriven" else set())
        assert world.refusals == []


def test_what_a_fallback_stands_in_for_is_blocked_by_one_in_doubt_above_it_and_undone_when_that_is_known() -> None:
    scripts = {"e": Script("raise", lands=True), "f": Script("hang", then=("raise",))}
    world, pipeline = scene({"e": (), "f": ("e",)}, scripts, {"e": "recording"})
    coordinator = SagaCoordinator(ContinueWithFallback(timeout=5, fallbacks={"e": {}, "f": {}}))

    report = run(coordinator.run(pipeline, saga_id="s"))

    assert report.status is SagaStatus.STUCK
    assert list(report.in_doubt) == ["f"]
    assert list(report.blocked) == ["e"]
    assert set(world.standing) == {"e"}
    run(coordinator.settle("s", "f", "undone", "the hotel says so"))
    known = run(coordinator.resume("s", pipeline))
    assert known.status is SagaStatus.DEGRADED
    assert known.stages["e"].state is StageState.FALLBACK
    assert world.log == ["+e", "-e"]


def test_an_orphan_behind_a_plain_stage_is_found() -> None:
    shape = {"root": (), "plain": ("root",), "leaf": ("plain",), "other": ()}
    world, pipeline = scene(shape, {"leaf": Script("raise")}, {"plain": "plain"})

    report = run(SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch")).run(pipeline))

    assert report.status is SagaStatus.DEGRADED
    assert set(world.standing) == {"other"}


def test_a_saga_whose_every_branch_fell_is_compensated() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    report = run(SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch")).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_dependent_of_two_is_skipped_when_one_of_them_fell() -> None:
    world, pipeline = scene(DIAMOND, {"b": Script("raise")})

    report = run(SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch")).run(pipeline))

    assert report.skipped == ("d",)
    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["c", "a"]


def test_a_retry_mends_what_passes() -> None:
    script = Script("raise", then=("retry", "ok"))
    _, pipeline = scene(SEQUENCE, {"b": script})

    report = run(SagaCoordinator(FailFast(retry=THREE)).run(pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert script.attempts == ["raise", "retry", "ok"]
    assert report.stages["b"].attempts == 3
    assert [failure.attempt for failure in report.failures] == [1, 2]
    assert report.cause is None


def test_retries_forward_and_backward_count_for_themselves() -> None:
    script = Script("raise", then=("ok",), undo_fails=2)
    world, pipeline = scene(SEQUENCE, {"b": script, "c": Script("raise")})
    policy = FailFast(retry=Retry(attempts=2, wait=0), compensation=Compensation(retry=Retry(attempts=3, wait=0)))

    report = run(SagaCoordinator(policy).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    undo = report.stages["b"].compensation
    assert undo is not None
    assert (report.stages["b"].attempts, undo.attempts, script.undo_attempts) == (2, 3, 3)
    assert world.standing == {}


def test_retries_wait_as_long_as_they_say() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script("raise", then=("raise", "ok"))})

    async def timed() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await SagaCoordinator(FailFast(retry=Retry(attempts=3, wait=10, multiplier=3, jitter=False))).run(pipeline)
        return loop.time() - began

    assert run(timed()) == pytest.approx(10 + 30)


def test_a_stage_is_not_attempted_after_its_longest_time() -> None:
    # It starts at 100 s of the loop: what counts is the time since its own first attempt.
    b = Script("raise", before=4)
    _, pipeline = scene(SEQUENCE, {"a": Script(before=100), "b": b})
    patient = Retry(attempts=9, wait=1, multiplier=1, jitter=False, max_elapsed=12)

    report = run(SagaCoordinator(FailFast(retry=patient)).run(pipeline))

    assert b.attempts == ["raise"] * 3
    assert report.status is SagaStatus.COMPENSATED


def test_a_stage_that_waits_for_its_retry_does_not_try_again_once_the_saga_stops() -> None:
    b = Script("raise", then=("ok",))
    _, pipeline = scene(BRANCHES, {"b": b, "c": Script("fail", before=5)})
    only_declined = Retry(attempts=2, wait=60, wait_max=60, jitter=False, retry_on=(CardDeclined,))

    report = run(SagaCoordinator(FailFast(retry=only_declined)).run(pipeline))

    assert b.attempts == ["raise"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["b"].state is StageState.FAILED
    assert [failure.stage for failure in report.failures] == ["b", "c"]


def test_what_a_stage_returned_before_its_retry_was_called_off_is_in_the_report() -> None:
    """Promise 4."""
    b = Script("fail", then=("ok",))
    _, pipeline = scene(BRANCHES, {"b": b, "c": Script("raise", before=5)})
    only_reported = Retry(attempts=2, wait=60, wait_max=60, jitter=False, retry_on=("reported",))

    report = run(SagaCoordinator(FailFast(retry=only_reported)).run(pipeline))

    assert b.attempts == ["fail"]
    assert report.stages["b"].output == StageOutput.fail("b reports", data={"partial": "b"})


async def within(_: Any) -> StageOutput:
    return StageOutput.ok()


async def gives_what_is_large(_: Any) -> Any:
    return list(range(10_000))


async def forgets_to_await(_: Any) -> Any:
    return within(_)


def test_what_is_wrongly_returned_is_shown_in_a_line() -> None:
    report = run(SagaCoordinator().run(Pipeline(name="p").with_stage("a", gives_what_is_large, "work")))

    assert report.cause is not None
    assert report.cause.message.startswith("expected a StageOutput with a dict as data, a dict or None, got [0, 1, 2, ")
    assert report.cause.message.endswith("...")
    assert len(report.cause.message) < 300


@pytest.mark.filterwarnings("ignore:coroutine 'within' was never awaited")
def test_a_stage_that_returns_what_it_should_have_awaited_is_told_so() -> None:
    report = run(SagaCoordinator().run(Pipeline(name="p").with_stage("a", forgets_to_await, "work")))

    assert report.cause is not None
    assert report.cause.message.endswith(". Write await before its call")


def test_retry_on_names_what_is_worth_it() -> None:
    worth = Script("raise", then=("ok",))
    not_worth = Script("fail", then=("ok",))
    _, pipeline = scene({"a": (), "b": ("a",)}, {"a": worth, "b": not_worth})

    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0, retry_on=(CardDeclined,)))).run(pipeline))

    assert worth.attempts == ["raise", "ok"]
    assert not_worth.attempts == ["fail"]
    assert report.cause is not None
    assert report.cause.kind is FailureKind.REPORTED


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("json.JSONDecodeError", json.JSONDecodeError("no", "{", 1)),
        ("json.decoder.JSONDecodeError", json.JSONDecodeError("no", "{", 1)),
        ("IOError", ConnectionResetError("gone")),
        ("asyncio.TimeoutError", TimeoutError("late")),
        ("socket.gaierror", socket.gaierror("no such host")),
    ],
)
def test_an_exception_is_tried_again_under_each_name_that_it_is_known_by(name: str, error: Exception) -> None:
    """Most know an exception by the package that they import it from; its own name may be that of a module within, or an older one."""
    attempts: list[str] = []

    async def call(ctx: Any) -> StageOutput:
        attempts.append(name)
        if len(attempts) == 1:
            raise error
        return StageOutput.ok()

    pipeline = Pipeline(name="p").with_stage("call", call, "work")

    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0, retry_on=name))).run(pipeline))

    assert len(attempts) == 2
    assert report.ok


def test_an_exception_that_is_given_itself_is_tried_again_though_its_module_has_another_one_by_its_name() -> None:
    kind = type("JSONDecodeError", (Exception,), {"__module__": "json"})
    attempts: list[int] = []

    async def call(ctx: Any) -> None:
        attempts.append(ctx.attempt)
        raise kind

    pipeline = Pipeline(name="p").with_stage("call", compensable(call, nothing))

    run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0, retry_on=kind))).run(pipeline))

    assert attempts == [1, 2]


def test_an_exception_of_a_script_is_tried_again_by_who_has_imported_the_script() -> None:
    """Its saga was begun by `python shop.py`, and is gone on with by `saga recover shop:trip`."""
    script = Script("raise", then=("ok",))
    _, pipeline = scene({"a": ()}, {"a": script})

    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0, retry_on="__main__.CardDeclined"))).run(pipeline))

    assert script.attempts == ["raise", "ok"]
    assert report.ok


def test_an_exception_of_this_script_is_not_another_ones_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    own = type("CardDeclined", (Exception,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "CardDeclined", own, raising=False)
    script = Script("raise", then=("ok",))
    _, pipeline = scene({"a": ()}, {"a": script})

    run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0, retry_on=own))).run(pipeline))

    assert script.attempts == ["raise"]


def test_an_exception_of_which_nobody_has_imported_the_module_is_worth_nothing() -> None:
    script = Script("raise", then=("ok",))
    _, pipeline = scene({"a": ()}, {"a": script})

    run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0, retry_on="no_such_package.CardDeclined"))).run(pipeline))

    assert script.attempts == ["raise"]


@pytest.mark.parametrize("retry_on", [TimeoutError, "TimeoutError", "asyncio.TimeoutError", OSError, "timeout"])
def test_a_stage_that_runs_out_of_time_is_tried_again_where_a_timeout_error_is(retry_on: Any) -> None:
    script = Script("hang", then=("ok",))
    world, pipeline = scene({"a": ()}, {"a": script})

    report = run(SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2, wait=0, retry_on=(retry_on,)))).run(pipeline))

    assert script.attempts == ["hang", "ok"]
    assert report.ok
    assert set(world.standing) == {"a"}


def test_a_stage_that_runs_out_of_time_is_not_tried_again_for_another_exception() -> None:
    script = Script("hang", then=("ok",))
    _, pipeline = scene({"a": ()}, {"a": script})

    run(SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2, wait=0, retry_on=(ConnectionError,)))).run(pipeline))

    assert script.attempts == ["hang"]


def test_a_wrong_return_type_is_not_tried_again() -> None:
    script = Script("wrong", then=("ok",))
    _, pipeline = scene({"a": ()}, {"a": script})

    report = run(SagaCoordinator(FailFast(retry=THREE)).run(pipeline))

    assert script.attempts == ["wrong"]
    assert report.cause is not None
    assert report.cause.kind is FailureKind.CONTRACT
    assert "42" in report.cause.message


@pytest.mark.parametrize("value", [[1], "text", None])
def test_an_output_whose_data_is_no_dict_breaks_the_contract(value: object) -> None:
    async def odd(_: Any) -> StageOutput:
        return StageOutput(status=StageOutput.ok().status, data=value)  # type: ignore[arg-type] # what the test is about

    report = run(SagaCoordinator().run(Pipeline().with_stage("odd", odd, "work")))

    cause = report.cause
    assert cause is not None
    assert (cause.stage, cause.kind, cause.type, cause.attempt) == ("odd", FailureKind.CONTRACT, type(value).__name__, 1)
    assert cause.message == f"expected a StageOutput with a dict as data, a dict or None, got StageOutput(data={value!r})"


def test_a_stage_that_changes_what_the_policy_gave_changes_it_for_no_other_saga() -> None:
    """A service runs all its sagas under one policy, and the next customer's had the extras of the one before."""
    extras: list[str] = []
    ordered: list[list[str]] = []

    async def fail(_: Any) -> None:
        raise CardDeclined

    async def order(ctx: Any) -> None:
        chosen = ctx.inputs.get_from("offer", "extras")
        chosen.append("breakfast")
        ordered.append(list(chosen))

    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks={"offer": {"extras": extras}}))
    pipeline = Pipeline(name="p").with_stage("offer", fail, "work").with_stage("order", order, "work", dependencies=("offer",))

    reports = [run(coordinator.run(pipeline)) for _ in range(2)]

    assert [report.fallbacks for report in reports] == [("offer",)] * 2
    assert ordered == [["breakfast"], ["breakfast"]]
    assert extras == []


@pytest.mark.parametrize("policy", [FailFast(retry=Retry(attempts=2, wait=0)), ContinueWithFallback()], ids=["retry", "fallback"])
def test_each_attempt_and_the_fallback_read_what_was_given_whatever_the_one_before_has_taken_of_it(policy: Any) -> None:
    """Promise 11: as it is after a crash. A retry shipped only what the attempt before had not come to."""
    seen: list[list[str]] = []

    async def pick(_: Any) -> dict[str, Any]:
        return {"items": ["book", "pen"]}

    async def ship(ctx: Any) -> None:
        items = ctx.inputs.get_from("pick", "items")
        seen.append(list(items))
        items.pop()
        raise ConnectionError("no lorry")

    async def ship_later(ctx: SagaContext, _: Failure) -> None:
        seen.append(ctx.inputs.get_from("pick", "items"))

    pipeline = Pipeline(name="p").with_stage("pick", pick, "transform")
    pipeline = pipeline.with_stage("ship", compensable(ship, nothing, fallback=ship_later), dependencies=("pick",))

    report = run(SagaCoordinator(policy).run(pipeline))

    assert seen == [["book", "pen"]] * 2
    assert report.stages["pick"].output == StageOutput.ok(items=["book", "pen"])


@pytest.mark.parametrize(
    ("own", "policys", "attempts"),
    [
        (Compensation(timeout=9.0), Compensation(retry=Retry(attempts=5, wait=0)), 5),
        (Compensation(retry=Retry(attempts=2, wait=0)), Compensation(timeout=1.0, retry=Retry(attempts=9)), 2),
    ],
    ids=["timeout", "retry"],
)
def test_what_a_stage_does_not_say_of_its_undoing_the_policy_says(own: Compensation, policys: Compensation, attempts: int) -> None:
    """A refund that was given more time was tried three times, where the policy said five."""
    asked: list[int] = []
    tried: list[int] = []

    class Charge(CompensableStage):
        compensation = own

        async def execute(self, ctx: SagaContext) -> None: ...

        async def compensate(self, ctx: CompensationContext) -> None:
            tried.append(ctx.attempt)
            await elapse(60)

    class Send(PivotStage):
        compensation = own

        async def execute(self, ctx: SagaContext) -> None:
            await elapse(60)

        async def probe(self, ctx: CompensationContext) -> None:
            asked.append(ctx.attempt)
            await elapse(60)

    async def decline(_: Any) -> None:
        raise CardDeclined

    coordinator = SagaCoordinator(FailFast(timeout=5.0, compensation=policys))
    charge = Pipeline(name="p").with_stage("charge", Charge).with_stage("ship", decline, "work", dependencies=("charge",))

    charged, sent = run(coordinator.run(charge)), run(coordinator.run(Pipeline(name="q").with_stage("send", Send)))

    assert len(asked) == len(tried) == attempts
    seconds = own.timeout if "timeout" in own.model_fields_set else policys.timeout
    assert [f"no answer within {seconds:g} s" in str(report.failures[-1]) for report in (charged, sent)] == [True, True]


def test_a_stage_has_its_own_retry_and_timeout() -> None:
    class Patient(CompensableStage):
        retry = Retry(attempts=2, wait=0, retry_on=(FailureKind.TIMEOUT,))
        timeout = 3.0
        compensation = Compensation(timeout=2.0, retry=Retry(attempts=1))
        attempts = 0

        async def execute(self, ctx: SagaContext) -> None:
            Patient.attempts += 1
            await elapse(10 if ctx.attempt == 1 else 1)

        async def compensate(self, ctx: CompensationContext) -> None:
            await elapse(5)

    async def fail(_: Any) -> None:
        raise CardDeclined

    pipeline = Pipeline().with_stage("patient", Patient).with_stage("fail", fail, "work", dependencies=("patient",))

    report = run(SagaCoordinator(FailFast(timeout=1)).run(pipeline))

    assert Patient.attempts == 2
    assert report.stages["patient"].state is StageState.STUCK
    undo = report.stages["patient"].compensation
    assert undo is not None
    assert undo.failure is not None
    assert undo.failure.message == "no answer within 2 s"


def test_the_deadline_stops_the_forward_run_and_interrupts_what_runs() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=60)}, {"b": "probed"})

    report = run(SagaCoordinator(FailFast(deadline=10)).run(pipeline))

    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind) == (None, FailureKind.TIMEOUT)
    assert report.stages["b"].failure is not None
    assert report.stages["b"].failure.kind is FailureKind.INTERRUPTED


def test_a_saga_within_its_deadline_is_left_alone() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script(before=5)})

    assert run(SagaCoordinator(FailFast(deadline=10)).run(pipeline)).status is SagaStatus.COMPLETED


def test_the_deadline_of_the_backward_run_starts_no_further_compensation() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(undo_takes=20), "c": Script("raise")})
    policy = FailFast(compensation=Compensation(deadline=10))

    report = run(SagaCoordinator(policy).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert report.stages["b"].state is StageState.UNDONE
    assert report.stages["a"].state is StageState.BLOCKED
    assert set(world.standing) == {"a"}


def test_the_deadline_of_the_backward_run_counts_from_when_that_begins() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(undo_takes=5), "c": Script("raise", before=100)})

    report = run(SagaCoordinator(FailFast(compensation=Compensation(deadline=10))).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


@pytest.mark.parametrize("stops", ["deadline", "halt"])
@pytest.mark.parametrize("lands", [True, False])
def test_what_the_backward_run_did_not_get_to_is_asked_for_all_the_same(stops: str, lands: bool) -> None:
    """To know is free; and what is known not to have landed leaves nothing for a person to settle."""
    scripts = {"a": Script("raise", before=1, lands=lands), "b": Script(undo_takes=20, undo_fails=9 if stops == "halt" else 0)}
    world, pipeline = scene({"a": (), "b": ()}, scripts, {"a": "probed"})
    one_by_one = Compensation(max_concurrency=1, deadline=10) if stops == "deadline" else Compensation(max_concurrency=1, on_failure="halt")

    report = run(SagaCoordinator(FailFast(compensation=one_by_one)).run(pipeline))

    assert world.refusals == []
    assert set(world.standing) == {*(["a"] if lands else []), *(["b"] if stops == "halt" else [])}
    assert report.status is (SagaStatus.STUCK if world.standing else SagaStatus.COMPENSATED)
    assert report.stages["a"].state is (StageState.BLOCKED if lands else StageState.FAILED)
    assert report.stages["a"].output == (StageOutput.ok(stage="a", probed=True) if lands else None)


def test_the_deadline_of_the_backward_run_ends_the_retries() -> None:
    script = Script(undo_fails=99)
    _, pipeline = scene(SEQUENCE, {"b": script, "c": Script("raise")})
    policy = FailFast(compensation=Compensation(deadline=10, retry=Retry(attempts=99, wait=7, multiplier=1, jitter=False)))

    report = run(SagaCoordinator(policy).run(pipeline))

    assert script.undo_attempts == 2
    assert report.stages["b"].state is StageState.STUCK
    assert report.status is SagaStatus.STUCK


def test_a_compensation_that_fails_after_the_deadline_of_the_backward_run_is_stuck_at_once() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script(undo_fails=99, undo_takes=20), "c": Script("raise")})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(deadline=10)))

    run(coordinator.run(pipeline, saga_id="s"))

    failed = [event for event in run(coordinator.ledger.read("s")) if isinstance(event, CompensationFailed)]
    assert [event.will_retry for event in failed] == [False]


@pytest.mark.parametrize(("on_failure", "standing"), [("isolate", {"b", "a"}), ("continue", {"b"}), ("halt", {"b", "a", "x"})])
def test_a_compensation_that_fails_for_good_holds_back_what_the_policy_says(on_failure: Any, standing: set[str]) -> None:
    # a <- b <- plain <- d, and beside it x, whose undoing begins only after b's has failed.
    shape = {"a": (), "b": ("a",), "plain": ("b",), "x": (), "y": ("x",), "d": ("plain", "y")}
    scripts = {
        "b": Script(undo_fails=9),
        "a": Script(order_matters=on_failure != "continue"),
        "y": Script(undo_takes=50),
        "d": Script("raise"),
    }
    world, pipeline = scene(shape, scripts, {"plain": "plain"})
    policy = FailFast(compensation=Compensation(on_failure=on_failure, retry=Retry(attempts=2, wait=1)))

    report = run(SagaCoordinator(policy).run(pipeline))

    assert world.refusals == []
    assert set(world.standing) == standing
    assert set(report.stuck) == {"b"}
    assert set(report.blocked) == standing - {"b"}
    assert report.status is SagaStatus.STUCK
    assert [failure.kind for failure in report.failures[1:]] == [FailureKind.COMPENSATION] * 2
    text = str(report)
    assert "its compensation failed 2 times, the last: CardDeclined: undoing b was declined" in text
    assert "Still in effect, its undoing failed: b." in text


def test_a_report_names_the_first_failure_as_the_cause_whatever_fails_later() -> None:
    _, pipeline = scene(DIAMOND, {"b": Script("raise", before=1), "c": Script("fail", before=2), "a": Script(undo_fails=9)})

    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1)))).run(pipeline))

    assert report.cause is not None
    assert report.cause.stage == "b"
    assert [(failure.stage, failure.kind) for failure in report.failures] == [
        ("b", FailureKind.EXCEPTION),
        ("c", FailureKind.REPORTED),
        ("a", FailureKind.COMPENSATION),
    ]


def test_a_cancelled_saga_is_not_done_with_while_a_stage_is_in_doubt() -> None:
    world, pipeline = scene(BRANCHES, {"b": Script("cancel", before=1), "c": Script("hang", lands=True)})
    coordinator = SagaCoordinator(FailFast(in_flight="cancel"))

    halted = run(coordinator.run(pipeline, saga_id="s"))

    assert halted.status is SagaStatus.HALTED
    assert halted.cause is not None
    assert halted.cause.kind is FailureKind.CANCELLED
    assert list(halted.in_doubt) == ["c"]
    assert run(coordinator.ledger.prune(timedelta(0))) == ()
    settled = run(coordinator.settle("s", "c", "kept", "it is on their books"))
    assert settled.status is SagaStatus.CANCELLED
    assert set(settled.kept) == set(world.standing) == {"a", "c"}
    assert run(coordinator.ledger.prune(timedelta(0))) == ("s",)


def test_a_saga_that_halted_behind_its_pivot_is_closed_by_going_on_without_what_fails() -> None:
    shape: dict[str, tuple[str, ...]] = {"seat": (), "ticket": ("seat",), "notify": ("ticket",)}
    world, pipeline = scene(shape, {"notify": Script("raise")}, {"ticket": "pivot", "notify": "plain"})
    coordinator = SagaCoordinator()
    assert run(coordinator.run(pipeline, saga_id="s")).status is SagaStatus.HALTED

    undone = run(coordinator.compensate("s", pipeline))
    forgotten = run(coordinator.ledger.prune(timedelta(0)))
    closed = run(coordinator.resume("s", pipeline, policy=ContinueWithFallback(without_fallback="skip_branch")))

    assert (undone.status, forgotten) == (SagaStatus.HALTED, ())
    assert (closed.status, closed.failed) == (SagaStatus.DEGRADED, ("notify",))
    assert set(closed.kept) == {"seat", "ticket"}
    assert world.undone() == []
    assert run(coordinator.ledger.prune(timedelta(0))) == ("s",)


def test_a_cancelled_saga_asks_for_what_is_in_doubt() -> None:
    world, pipeline = scene(BRANCHES, {"b": Script("cancel", before=1), "c": Script("hang", lands=True)}, {"c": "probed"})

    report = run(SagaCoordinator(FailFast(in_flight="cancel")).run(pipeline))

    assert report.status is SagaStatus.CANCELLED
    assert set(report.kept) == set(world.standing) == {"a", "c"}


def test_a_stage_that_raises_stageflows_cancel_has_cancelled_the_saga_and_says_why() -> None:
    world, pipeline = scene({"a": ()})

    async def check(_: Any) -> None:
        raise StageCancellationRequested("no visa")

    pipeline = pipeline.with_stage("check", check, "work", dependencies=("a",))

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.CANCELLED
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind, report.cause.message) == ("check", FailureKind.CANCELLED, "no visa")
    assert world.standing.keys() == {"a"}


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (StageOutput.cancel(data={}), (FailureKind.CANCELLED, "cancel", "no reason given")),
        (StageOutput(status=StageStatus.FAIL), (FailureKind.REPORTED, "fail", "no error given")),
        (StageOutput.retry("busy"), (FailureKind.CONTRACT, "retry", "it asked for a retry and no attempt is left: busy")),
    ],
    ids=["cancel", "fail", "retry"],
)
def test_what_a_stage_returns_in_place_of_an_output_is_told_in_full(output: StageOutput, told: tuple[FailureKind, str, str]) -> None:
    async def second_thoughts(ctx: SagaContext) -> StageOutput:
        return output if ctx.attempt == 2 else StageOutput.retry("not yet")

    pipeline = Pipeline().with_stage("check", compensable(second_thoughts, nothing, retry=Retry(attempts=2, wait=0)))

    report = run(SagaCoordinator().run(pipeline))

    cause = report.cause
    assert cause is not None
    assert (cause.stage, cause.attempt, cause.kind, cause.type, cause.message) == ("check", 2, *told)


@pytest.mark.parametrize("fails", [Script("raise", before=2), Script("hang")], ids=["failed", "in doubt"])
def test_a_cancel_outweighed_by_a_failure_during_the_drain_compensates(fails: Script) -> None:
    world, pipeline = scene(BRANCHES, {"b": Script("cancel", before=1), "c": fails}, {"c": "probed"})

    report = run(SagaCoordinator(FailFast(timeout=5)).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.stage == "c"
    assert world.standing == {}


def test_a_saga_that_halts_for_a_failure_that_outweighs_the_cancel_of_its_context_waits_to_be_resumed() -> None:
    shape: dict[str, tuple[str, ...]] = {"seat": (), "room": ("seat",), "card": (), "mail": ()}
    scripts = {"seat": Script(before=2), "card": Script("raise", before=3), "mail": Script("hang", lands=True)}
    _, pipeline = scene(shape, scripts)
    coordinator = SagaCoordinator(FailFast(on_failure="halt", timeout=5))
    context = PipelineContext.create()

    async def play() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, context, saga_id="s"))
        await elapse(1)
        context.mark_canceled("enough")
        return await running

    halted = run(play())
    settled = run(coordinator.settle("s", "mail", "kept", "it has arrived"))

    assert halted.cause is not None
    assert halted.cause.stage == "card"
    assert [failure.stage for failure in halted.failures] == [None, "card", "mail"]
    assert (halted.status, settled.status) == (SagaStatus.HALTED, SagaStatus.HALTED)
    assert run(coordinator.ledger.prune(timedelta(0))) == ()


@pytest.mark.parametrize(
    ("script", "policy", "status", "cause"),
    [
        (Script("raise", before=1), FailFast(on_failure="halt"), SagaStatus.HALTED, FailureKind.EXCEPTION),
        (Script("raise", before=3), FailFast(on_failure="halt"), SagaStatus.COMPENSATED, FailureKind.INTERRUPTED),
        (Script("cancel", before=1), FailFast(), SagaStatus.CANCELLED, FailureKind.CANCELLED),
        (Script("cancel", before=3), FailFast(), SagaStatus.COMPENSATED, FailureKind.INTERRUPTED),
    ],
    ids=["a failure", "not a failure", "a cancel", "not a cancel"],
)
def test_what_stops_a_saga_first_decides_also_when_its_caller_goes_away_meanwhile(
    script: Script, policy: FailFast, status: SagaStatus, cause: FailureKind
) -> None:
    world, pipeline = scene(BRANCHES, {"b": script, "c": Script("ok", before=4)})
    coordinator = SagaCoordinator(policy)

    async def given_up() -> SagaReport:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(coordinator.run(pipeline, saga_id="s"), 2)
        return await coordinator.report("s")

    report = run(given_up())

    assert report.cause is not None
    assert (report.status, report.cause.kind) == (status, cause)
    assert set(world.standing) == (set() if status is SagaStatus.COMPENSATED else {"a", "c"})


@pytest.mark.parametrize(("retry_on", "attempts"), [("compensation", 2), ("TimeoutError", 2), ("ConnectionError", 1)])
def test_a_compensation_that_runs_out_of_time_is_retried_under_the_names_in_the_docs(retry_on: str, attempts: int) -> None:
    _, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script(undo_takes=60), "b": Script("raise")})
    compensation = Compensation(timeout=1, retry=Retry(attempts=2, retry_on=(retry_on,)))

    report = run(SagaCoordinator(FailFast(compensation=compensation)).run(pipeline))

    undoing = report.stages["a"].compensation
    assert undoing is not None
    assert undoing.attempts == attempts


class FiveSeats(CompensableStage):
    """Books five seats one by one; the fourth is taken."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def execute(self, ctx: SagaContext) -> StageOutput:
        for seat in ("1A", "1B", "1C", "1D", "1E"):
            if seat == "1D":
                raise CardDeclined("1D is taken")
            self.world.land(seat)
            await ctx.record({"seat": seat})
        return StageOutput.ok()

    async def compensate(self, ctx: CompensationContext) -> None:
        assert ctx.output is None
        for effect in reversed(ctx.effects):
            self.world.undo(effect["seat"])


def test_a_stage_that_fails_at_its_fourth_item_is_undone_for_the_three() -> None:
    world = World({"seats": (), "hotel": ()})
    pipeline = Pipeline().with_stage("seats", FiveSeats(world))

    report = run(SagaCoordinator().run(pipeline))

    assert world.log == ["+1A", "+1B", "+1C", "-1C", "-1B", "-1A"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["seats"].state is StageState.UNDONE
    assert report.stages["seats"].effects == ({"seat": "1A"}, {"seat": "1B"}, {"seat": "1C"})
    assert report.undone == {"seats": None}
    assert report.failed == ("seats",)


def test_what_a_failed_stage_recorded_is_undone_although_its_fallback_stands_in() -> None:
    world = World({"seats": ()})
    pipeline = Pipeline().with_stage("seats", FiveSeats(world))

    report = run(SagaCoordinator(ContinueWithFallback(fallbacks={"seats": {"standing_room": 5}})).run(pipeline))

    assert world.standing == {}
    assert report.status is SagaStatus.DEGRADED
    assert report.stages["seats"].state is StageState.FALLBACK
    assert report.kept["seats"].data == {"standing_room": 5}


class SellsTheSeatOfAnother(FiveSeats):
    """Fails, and its fallback has an effect of its own, of which it makes a note as `execute` does."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        raise RuntimeError("no seats")

    async def fallback(self, ctx: SagaContext, _: Failure) -> StageOutput:
        self.world.land("1A")
        await self.note(ctx)
        return StageOutput.ok(seat="1A")

    async def note(self, ctx: SagaContext) -> None:
        await ctx.record({"seat": "1A"})


class SellsItAndForgetsToWait(SellsTheSeatOfAnother):
    async def note(self, ctx: SagaContext) -> None:
        _ = ctx.record({"seat": "1A"})


@pytest.mark.parametrize("kind", [SellsTheSeatOfAnother, SellsItAndForgetsToWait])
def test_an_effect_that_a_fallback_records_is_refused_with_what_to_do_instead_and_is_not_lost(kind: type[SellsTheSeatOfAnother]) -> None:
    world = World({"seats": ()})
    pipeline = Pipeline().with_stage("seats", kind(world))

    report = run(SagaCoordinator(ContinueWithFallback()).run(pipeline))

    assert report.in_doubt == {"seats": None}
    assert [failure.message for failure in report.failures][1] == (
        "expected ctx.record by execute, for stage 'seats', got one by the fallback. What is to be undone of a fallback it runs as a saga: "
        "ctx.run_saga. A person is asked what stands of this."
    )
    assert "recorded {'seat': '1A'}" in str(report)


def test_a_cancel_by_id_stops_the_saga_and_run_gives_its_report() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=5)})
    coordinator = SagaCoordinator()

    async def cancelled() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(1)
        await coordinator.cancel("s", "the shop closes")
        return await running

    report = run(cancelled())

    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message == "the shop closes"


def test_a_stage_that_skips_itself_after_it_recorded_an_effect_has_broken_its_contract_and_is_undone() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("skip", lands=True)}, {"b": "recording"})

    report = run(SagaCoordinator().run(pipeline))

    assert world.refusals == []
    assert world.log == ["+a", "+b", "-b", "-a"]
    assert report.not_run == ("c",)
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind) == ("b", FailureKind.CONTRACT)
    assert report.cause.message == "expected a stage that skips itself to have recorded no effect, got a SKIP after 1 recorded effects"


class Copes(Scripted):
    compensate_in_doubt = True


def test_a_stage_that_skips_itself_after_an_attempt_that_may_have_landed_has_broken_its_contract_and_is_undone_first() -> None:
    """With a SKIP its dependents would run on, and it would be undone below them."""
    script = Script("hang", lands=True, then=("skip",))
    world = World(SEQUENCE)
    pipeline = Pipeline()
    for name, needs in SEQUENCE.items():
        stage = Copes(world, name, script) if name == "b" else Scripted(world, name, Script())
        pipeline = pipeline.with_stage(name, stage, dependencies=needs)

    report = run(SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2, wait=0))).run(pipeline))

    assert script.attempts == ["hang", "skip"]
    assert world.refusals == []
    assert world.log == ["+a", "+b", "-b", "-a"]
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message == (
        "expected a stage that skips itself to have had no effect, got a SKIP after an attempt that may have had one"
    )


@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize("then", ["cancel", "skip"])
@pytest.mark.parametrize("on_cancel", ["keep", "compensate"])
def test_a_stage_that_stops_after_an_attempt_that_raised_is_asked_before_its_word_counts(lands: bool, then: str, on_cancel: Any) -> None:
    """The request got through and its answer was lost; by the next attempt the customer had left."""
    script = Script("raise", lands=lands, then=(then,))
    world, pipeline = scene(SEQUENCE, {"b": script}, {"b": "probed"})

    report = run(SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0), on_cancel=on_cancel)).run(pipeline))

    assert script.attempts == ["raise", then]
    assert world.refusals == []
    assert report.clean
    stands = {"a": then == "skip" or on_cancel == "keep", "b": lands and (then == "skip" or on_cancel == "keep"), "c": then == "skip"}
    assert set(world.standing) == {name for name, does in stands.items() if does}
    assert set(report.kept) == set(world.standing)
    if then == "skip":
        assert report.status is SagaStatus.COMPLETED
    else:
        assert report.status is (SagaStatus.CANCELLED if on_cancel == "keep" else SagaStatus.COMPENSATED)
        assert report.cause is not None
        assert report.cause.message == "b cancels"


@pytest.mark.parametrize("last", ["ok", "raise"])
def test_what_a_stage_recorded_before_its_fallback_is_undone_also_below_a_pivot_that_completed(last: str) -> None:
    world, pipeline = scene(
        SEQUENCE, {"a": Script("raise", lands=True, order_matters=False), "c": Script(last)}, {"a": "recording", "b": "pivot"}
    )
    policy = ContinueWithFallback(fallbacks={"a": {"instead": True}})

    report = run(SagaCoordinator(policy).run(pipeline))

    assert world.refusals == []
    assert set(world.standing) == ({"b", "c"} if last == "ok" else {"b"})
    assert report.status is (SagaStatus.DEGRADED if last == "ok" else SagaStatus.HALTED)
    assert report.stages["a"].state is StageState.FALLBACK
