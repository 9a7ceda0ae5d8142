"""Going on with a saga that has come to rest: forward with what had completed, backward with what is left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageflow.api import Pipeline, PipelineContext, StageContext, StageOutput
from stageflow.context import Conversation, Enrichments, Message, ProfileEnrichment, RoutingDecision

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    GraphChanged,
    LedgerConflict,
    LedgerError,
    MemoryLedger,
    MisuseError,
    PivotStage,
    Policy,
    PolicyInvalid,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaNotFound,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
    nested,
)
from saga.blueprint import Blueprint
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationStarted,
    FallbackUsed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageStarted,
)
from saga.ledgers.sqlite import SQLiteLedger
from saga.recovery.state import SagaState
from saga.testing.rehearsal import MortalLedger
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.slow import SlowDisk
from tests.world import BRANCHES, DIAMOND, SEQUENCE, CardDeclined, Pivot, Probed, Recorder, Script, Scripted, World, nothing, scene

HALT = FailFast(on_failure="halt")
IMPATIENT = Compensation(retry=Retry(attempts=1))
S = StageState


def first_run(pipeline: Pipeline, policy: Policy = HALT, **fields: Any) -> tuple[SagaCoordinator, SagaReport]:
    coordinator = SagaCoordinator(policy)
    return coordinator, run(coordinator.run(pipeline, saga_id="s", **fields))


def holders(coordinator: SagaCoordinator) -> set[str | None]:
    """Who holds the sagas of its ledger: what is refused must keep nobody else from them."""
    return {entry.owner for entry in run(coordinator.ledger.list())}


# -- forward ---------------------------------------------------------------------------------------------------------


def test_a_halted_saga_runs_only_what_had_not_completed() -> None:
    world, pipeline = scene(DIAMOND, {"b": Script("raise", before=1, then=("ok",))})
    coordinator, halted = first_run(pipeline)
    assert halted.status is SagaStatus.HALTED
    assert set(world.standing) == {"a", "c"}

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert report.cause is None
    assert world.log == ["+a", "+c", "+b", "+d"]
    assert report.stages["b"].attempts == 2
    assert [failure.stage for failure in report.failures] == ["b"]


def test_what_had_completed_gives_its_output_to_what_runs_now() -> None:
    seen: dict[str, Any] = {}
    fails = [True]

    async def price(_: Any) -> StageOutput:
        return StageOutput.ok(amount=5)

    async def charge(ctx: Any) -> None:
        if fails.pop():
            raise CardDeclined
        seen.update(amount=ctx.inputs.get_from("price", "amount"), text=ctx.snapshot.input_text)

    pipeline = Pipeline().with_stage("price", price, "work").with_stage("charge", charge, "work", dependencies=("price",))
    coordinator, _ = first_run(pipeline, input_text="OSL-JFK")
    fails.append(False)

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert seen == {"amount": 5, "text": "OSL-JFK"}


class Keyed(CompensableStage):
    """Says with which keys it ran and was undone; fails as often as it is told to."""

    def __init__(self, fails: int = 0) -> None:
        self.keys: list[tuple[int, str]] = []
        self.undo_keys: list[str] = []
        self.fails = fails

    async def execute(self, ctx: SagaContext) -> None:
        self.keys.append((ctx.attempt, ctx.idempotency_key))
        if len(self.keys) <= self.fails:
            raise CardDeclined

    async def compensate(self, ctx: CompensationContext) -> None:
        assert ctx.idempotency_key == f"{ctx.forward_key}/undo"
        self.undo_keys.append(ctx.forward_key)


def test_a_stage_that_failed_runs_on_with_its_key_and_its_count() -> None:
    stage = Keyed(fails=3)
    pipeline = Pipeline().with_stage("pay", stage)
    coordinator, _ = first_run(pipeline, FailFast(on_failure="halt", retry=Retry(attempts=2, wait=0)))

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert stage.keys == [(1, "s/pay"), (2, "s/pay"), (3, "s/pay"), (4, "s/pay")]
    assert report.stages["pay"].executions == 1


def test_a_stage_that_was_undone_runs_again_with_another_key() -> None:
    stage, after = Keyed(), Keyed(fails=1)
    pipeline = Pipeline().with_stage("seat", stage).with_stage("pay", after, dependencies=("seat",))
    coordinator, undone = first_run(pipeline, FailFast())
    assert undone.status is SagaStatus.COMPENSATED

    report = run(coordinator.resume("s", pipeline, forward=True))
    again = run(coordinator.compensate("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert report.stages["seat"].executions == 2
    # All else is of the last one.
    assert (report.stages["seat"].attempts, len(report.stages["seat"].tries), report.compensation_order) == (1, 1, ())
    assert again.status is SagaStatus.COMPENSATED
    assert stage.keys == [(1, "s/seat"), (1, "s/seat~2")]
    # Its inputs are others than before: a key stands for one request with one content.
    assert after.keys == [(1, "s/pay"), (1, "s/pay~2")]
    assert stage.undo_keys == ["s/seat", "s/seat~2"]
    assert after.undo_keys == ["s/pay~2"]


def test_a_plain_stage_that_used_what_was_undone_runs_again() -> None:
    scripts = {name: Script() for name in "abc"} | {"c": Script("raise", then=("ok",))}
    world, pipeline = scene(SEQUENCE, scripts, {"b": "plain"})
    coordinator, _ = first_run(pipeline, FailFast())
    assert world.standing == {}

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert scripts["b"].attempts == ["ok", "ok"]
    assert world.log == ["+a", "-a", "+a", "+c"]


def test_a_redrive_that_fails_again_undoes_what_both_runs_did() -> None:
    world, pipeline = scene(DIAMOND, {"d": Script("raise")})
    coordinator, _ = first_run(pipeline)

    report = run(coordinator.resume("s", pipeline, policy=FailFast()))

    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert report.compensation_order[-1] == "a"
    assert [failure.attempt for failure in report.failures] == [1, 2]


def test_a_changed_policy_is_taken_and_recorded() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise", then=("raise", "ok"))})
    coordinator, _ = first_run(pipeline)
    patient = FailFast(retry=Retry(attempts=2, wait=0))

    report = run(coordinator.resume("s", pipeline, policy=patient, by="ann"))

    assert report.status is SagaStatus.COMPLETED
    (resumed,) = [event for event in run(coordinator.ledger.read("s")) if isinstance(event, SagaResumed)]
    assert (resumed.forward, resumed.policy, resumed.by) == (True, patient, "ann")
    assert resumed.graph is None  # as before
    assert world.log == ["+a", "+b", "+c"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ContinueWithFallback(fallbacks={"cc": {}}), "expected fallbacks for stages of pipeline 'scene' .a, b, c., got 'cc'"),
        ("fast", "expected a FailFast or a ContinueWithFallback policy, got 'fast'"),
    ],
    ids=["for another pipeline", "none"],
)
def test_a_changed_policy_that_is_none_for_its_pipeline_is_refused_and_nothing_runs(policy: Any, message: str) -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise", then=("ok",))})
    coordinator, _ = first_run(pipeline)
    before = run(coordinator.ledger.read("s"))

    with pytest.raises(PolicyInvalid, match=message):
        run(coordinator.resume("s", pipeline, policy=policy))

    assert run(coordinator.ledger.read("s")) == before
    assert world.log == ["+a", "+b"]
    assert holders(coordinator) == {None}
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPLETED


def test_a_graph_that_changed_is_refused_with_the_difference_and_nothing_runs() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    coordinator, _ = first_run(pipeline)
    other_world, other = scene(SEQUENCE | {"c": ("a",), "d": ("c",)})
    before = run(coordinator.ledger.read("s"))

    with pytest.raises(GraphChanged) as caught:
        run(coordinator.resume("s", other))

    assert caught.value.differences == ("stage 'd' is new", "stage 'c': dependencies was ['b'], is ['a']")
    assert run(coordinator.ledger.read("s")) == before
    assert other_world.log == []
    assert holders(coordinator) == {None}
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.HALTED
    assert world.log == ["+a", "+b"]


def test_a_saga_that_has_ended_well_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saga")
    world, pipeline = scene(SEQUENCE, {"b": Script("raise")})
    coordinator, degraded = first_run(pipeline, ContinueWithFallback(fallbacks={"b": {}}))
    before = run(coordinator.ledger.read("s"))

    report = run(coordinator.resume("s", pipeline))

    assert report == degraded
    assert report.status is SagaStatus.DEGRADED
    assert run(coordinator.ledger.read("s")) == before
    assert "saga s: it is degraded, nothing is left to run" in caplog.text
    assert world.log == ["+a", "+c"]


def test_a_saga_that_went_on_without_a_branch_takes_it_up_again() -> None:
    world, pipeline = scene({"a": (), "b": ("a",), "c": ("b",), "d": ("a",)}, {"b": Script("raise", then=("ok",))})
    coordinator, degraded = first_run(pipeline, ContinueWithFallback(without_fallback="skip_branch"))
    assert degraded.status is SagaStatus.DEGRADED
    assert degraded.skipped == ("c",)

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+d", "+b", "+c"]


def test_a_saga_that_a_stage_cancelled_runs_on() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("cancel", then=("ok",))})
    coordinator, cancelled = first_run(pipeline, FailFast())
    assert cancelled.status is SagaStatus.CANCELLED

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]


@pytest.mark.parametrize("landed", [True, False])
def test_what_is_in_doubt_is_asked_before_it_runs_again(landed: bool) -> None:
    script = Script("hang", lands=landed, then=("ok",))
    world, pipeline = scene(SEQUENCE, {"b": script}, {"b": "probed"})
    coordinator, _ = first_run(pipeline, FailFast(timeout=1, on_failure="halt"))

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert script.attempts == (["hang"] if landed else ["hang", "ok"])
    assert world.log == ["+a", "+b", "+c"]


def test_what_is_in_doubt_and_cannot_be_asked_has_to_be_settled_first() -> None:
    script = Script("hang", lands=True, then=("ok",))
    world, pipeline = scene(SEQUENCE, {"b": script})
    coordinator, halted = first_run(pipeline, FailFast(timeout=1, on_failure="halt"))
    assert halted.stages["b"].state is S.IN_DOUBT
    before = run(coordinator.ledger.read("s"))

    with pytest.raises(MisuseError, match=r"got b in doubt, without a probe and not idempotent\. Look whether the effect has landed"):
        run(coordinator.resume("s", pipeline))

    assert run(coordinator.ledger.read("s")) == before
    assert holders(coordinator) == {None}
    run(coordinator.settle("s", "b", "kept", "the bank has it", output={"receipt": 7}))
    assert holders(coordinator) == {None}
    report = run(coordinator.resume("s", pipeline))
    assert report.status is SagaStatus.COMPLETED
    assert report.kept["b"].data == {"receipt": 7}
    assert script.attempts == ["hang"]
    assert set(world.standing) == set("abc")


def test_all_that_has_to_be_settled_first_is_named() -> None:
    _, pipeline = scene(DIAMOND, {"b": Script("hang"), "c": Script("hang")})
    coordinator, _ = first_run(pipeline, FailFast(timeout=1, on_failure="halt"))

    with pytest.raises(MisuseError) as caught:
        run(coordinator.resume("s", pipeline))

    assert str(caught.value) == (
        "expected a saga whose stages in doubt can be asked, or can run again, got b, c in doubt, without a probe and not idempotent. "
        "Look whether the effect has landed, then settle it as kept or undone."
    )


def test_an_idempotent_stage_in_doubt_runs_again_with_its_key() -> None:
    script = Script("hang", lands=True, then=("ok",))
    world, pipeline = scene(SEQUENCE, {"b": script})
    pipeline.stages["b"].runner.idempotent = True  # type: ignore[union-attr] # a scripted stage
    coordinator, _ = first_run(pipeline, FailFast(timeout=1, on_failure="halt"))

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert script.attempts == ["hang", "ok"]
    assert world.log == ["+a", "+b", "+c"]


@pytest.mark.parametrize(("then", "status"), [("fail", "compensated"), ("cancel", "compensated"), ("raise", "stuck")])
def test_only_an_answer_of_an_idempotent_stage_tells_what_became_of_an_earlier_attempt(then: str, status: str) -> None:
    """Promise 5: what raises may not have got through to who would have recognised the request."""
    script = Script("hang", then=(then,))
    _, pipeline = scene(SEQUENCE, {"b": script})
    pipeline.stages["b"].runner.idempotent = True  # type: ignore[union-attr] # a scripted stage

    report = run(SagaCoordinator(FailFast(timeout=1, retry=Retry(attempts=2), on_cancel="compensate")).run(pipeline))

    assert script.attempts == ["hang", then]
    assert report.status == status
    assert list(report.in_doubt) == (["b"] if status == "stuck" else [])


def test_an_attempt_that_never_ran_leaves_the_stage_as_much_in_doubt_as_it_was() -> None:
    """Promise 5. Both lost their process; one fails while the second start of the other is written, which then does not run any more."""
    world, pipeline = scene({"fails": (), "landed": ()}, {"fails": Script("fail")})
    for spec in pipeline.stages.values():
        spec.runner.idempotent = True  # type: ignore[union-attr] # scripted stages
    world.land("landed")
    ledger = SlowDisk()

    async def play() -> SagaReport:
        started = SagaStarted(saga_id="s", pipeline="scene", graph=Blueprint.of(pipeline).graph, policy=FailFast())
        token = await ledger.create("s", "gone", [started, *(StageStarted(stage=name, attempt=1) for name in pipeline.stages)])
        await ledger.release("s", token)
        return await SagaCoordinator(ledger=ledger).resume("s", pipeline)

    report = run(play())

    assert world.log == ["+landed"]
    assert report.status is SagaStatus.STUCK
    assert list(report.in_doubt) == ["landed"]


def test_a_stuck_saga_may_be_told_to_go_forward_instead() -> None:
    scripts = {"b": Script(undo_fails=9), "d": Script("raise", then=("ok",))}
    world, pipeline = scene(DIAMOND, scripts)
    coordinator, stuck = first_run(pipeline, FailFast(compensation=IMPATIENT))
    assert stuck.status is SagaStatus.STUCK
    assert set(stuck.stuck) == {"b"}
    assert set(world.standing) == {"a", "b"}

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert set(world.standing) == set("abcd")
    assert {name: stage.executions for name, stage in report.stages.items()} == {"a": 1, "b": 1, "c": 2, "d": 2}
    assert scripts["b"].attempts == ["ok"]


def test_only_one_coordinator_at_a_time_goes_on_with_a_saga() -> None:
    import asyncio

    ledger = MemoryLedger()
    gate = asyncio.Event()
    script = Script("raise", then=("ok",))
    world, pipeline = scene(SEQUENCE, {"b": script})
    one, two = SagaCoordinator(HALT, ledger=ledger), SagaCoordinator(HALT, ledger=ledger)

    async def play() -> tuple[SagaReport, SagaReport]:
        await one.run(pipeline, saga_id="s")
        script.gate = gate
        first = asyncio.create_task(one.resume("s", pipeline))
        while len(script.attempts) < 2:
            await asyncio.sleep(0)
        with pytest.raises(LedgerConflict, match="saga s is held by"):
            await two.resume("s", pipeline)
        with pytest.raises(LedgerConflict, match="saga s is held by"):
            await two.settle("s", "b", "undone", "by hand")
        with pytest.raises(MisuseError, match="which is running here"):
            await one.resume("s", pipeline)
        gate.set()
        return await first, await two.resume("s", pipeline)

    done, untouched = run(play())

    assert done.status is SagaStatus.COMPLETED
    assert untouched == done
    assert world.log == ["+a", "+b", "+c"]


def test_an_unknown_saga_cannot_be_gone_on_with() -> None:
    _, pipeline = scene(SEQUENCE)

    for attempt in (
        SagaCoordinator().resume("s", pipeline),
        SagaCoordinator().compensate("s", pipeline),
        SagaCoordinator().settle("s", "a", "undone", "by hand"),
        SagaCoordinator().report("s"),
    ):
        with pytest.raises(SagaNotFound, match="expected the id of a saga in the ledger, got 's'"):
            run(attempt)


def test_a_saga_that_was_undone_is_not_begun_again_unless_somebody_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever settles the last stage that was stuck resumes the saga, as the report told them; nothing may be booked again."""
    caplog.set_level(logging.INFO, "saga")
    world, pipeline = scene(SEQUENCE, {"a": Script(undo_fails=1), "c": Script("raise")})
    coordinator, stuck = first_run(pipeline, FailFast(compensation=IMPATIENT))
    assert set(stuck.stuck) == {"a"}
    world.undo("a")

    settled = run(coordinator.settle("s", "a", "undone", "by hand"))
    resumed = run(coordinator.resume("s", pipeline))

    assert settled.status is SagaStatus.COMPENSATED
    assert resumed == settled
    assert world.log == ["+a", "+b", "-b", "-a"]
    assert "it is undone, and runs once more only when it is told to go forward" in caplog.text
    assert "undone 2nd" not in str(settled)


# -- pivots ----------------------------------------------------------------------------------------------------------

#   before -> pivot -> after
#   aside  ----------> after
PAST = {"before": (), "aside": (), "pivot": ("before",), "after": ("pivot", "aside")}


def test_after_the_pivot_a_redrive_goes_on_from_there() -> None:
    scripts = {"after": Script("raise", then=("ok",))}
    world, pipeline = scene(PAST, scripts, {"pivot": "pivot"})
    coordinator, halted = first_run(pipeline, FailFast())
    assert halted.status is SagaStatus.HALTED
    assert halted.past_pivot is True
    assert set(world.standing) == {"before", "pivot"}
    assert set(halted.undone) == {"aside"}

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+before", "+aside", "+pivot", "-aside", "+aside", "+after"]


def test_a_saga_that_was_undone_on_demand_as_far_as_its_pivot_asks_for_nothing_more() -> None:
    world, pipeline = scene(PAST, {}, {"pivot": "pivot"})
    coordinator, _ = first_run(pipeline)

    report = run(coordinator.compensate("s", pipeline))

    assert report.status is SagaStatus.HALTED
    assert str(report).splitlines()[-1] == "What is kept stays. To run once more what was undone: saga resume s"
    assert set(world.standing) == {"before", "pivot"}


@pytest.mark.parametrize(
    "policy",
    [ContinueWithFallback(fallbacks={"extra": {}}), ContinueWithFallback(without_fallback="skip_branch")],
    ids=["fallback", "branch"],
)
def test_a_saga_that_had_gone_on_without_what_failed_asks_for_nothing_more_either_when_it_was_undone_on_demand(
    policy: ContinueWithFallback,
) -> None:
    """Whoever resumed it, as it told, would have done anew what had just been undone."""
    world, pipeline = scene(PAST | {"extra": ()}, {"extra": Script("raise")}, {"pivot": "pivot"})
    coordinator, degraded = first_run(pipeline, policy)
    assert degraded.status is SagaStatus.DEGRADED

    report = run(coordinator.compensate("s", pipeline))

    assert report.status is SagaStatus.HALTED
    assert str(report).splitlines()[-1] == "What is kept stays. To run once more what was undone: saga resume s"
    assert set(world.standing) == {"before", "pivot"}


TWO_PIVOTS = {"root": (), "left": ("root",), "right": ("root",), "p": ("left",), "q": ("right",)}


@pytest.mark.parametrize("failing", ["p", "q"])
def test_of_two_pivots_at_once_the_one_that_completes_protects_its_own(failing: str) -> None:
    done = "q" if failing == "p" else "p"
    world, pipeline = scene(
        TWO_PIVOTS, {failing: Script("raise", before=1, then=("ok",)), done: Script(before=2)}, {"p": "pivot", "q": "pivot"}
    )

    coordinator, report = first_run(pipeline, FailFast())

    lost = {"p": "left", "q": "right"}[failing]
    assert report.status is SagaStatus.HALTED
    assert world.undone() == [lost]
    assert world.standing.keys() == {"root", "left", "right", done} - {lost}
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPLETED


@pytest.mark.parametrize("in_flight", ["drain", "cancel"])
@pytest.mark.parametrize("outcome", ["ok", "raise"])
def test_a_pivot_in_flight_gets_its_time_and_its_outcome_decides(outcome: str, in_flight: Any) -> None:
    shape = {"base": (), "p": ("base",), "sibling": ("base",)}
    world, pipeline = scene(shape, {"p": Script(outcome, before=5), "sibling": Script("raise", before=1)}, {"p": "pivot"})

    _, report = first_run(pipeline, FailFast(in_flight=in_flight))

    assert world.refusals == []
    assert set(world.standing) == ({"base", "p"} if outcome == "ok" else set())
    assert report.status is (SagaStatus.HALTED if outcome == "ok" else SagaStatus.COMPENSATED)


def test_a_pivot_that_outlasts_the_drain_is_interrupted_and_holds_what_it_stands_on() -> None:
    world, pipeline = scene(BRANCHES, {"b": Script(before=50), "c": Script("raise")}, {"b": "pivot"})

    _, report = first_run(pipeline, FailFast(in_flight="cancel", drain_timeout=10, compensation=Compensation(on_failure="continue")))

    assert report.status is SagaStatus.STUCK
    assert set(report.in_doubt) == {"b"}
    assert set(report.blocked) == {"a"}
    assert set(world.standing) == {"a"}


# -- backward --------------------------------------------------------------------------------------------------------

#   a -> (plain) -> c -> d, and e beside it
GAPPED = {"a": (), "plain": ("a",), "c": ("plain",), "d": ("c",), "e": ("a",)}


@pytest.mark.parametrize(
    ("on_failure", "undone", "blocked"),
    [
        ("isolate", ["d", "e"], {"a"}),
        ("continue", ["d", "e", "a"], set()),
        ("halt", ["d"], {"a", "e"}),
    ],
)
def test_stuck_blocked_and_undone_are_told_apart(on_failure: Any, undone: list[str], blocked: set[str]) -> None:
    # Undone one at a time, the last started first: d, then c, which fails for good, then e and a.
    scripts = {
        "a": Script(order_matters=on_failure != "continue"),
        "c": Script(before=2, undo_fails=9),
        "e": Script(before=1),
        "f": Script("raise"),
    }
    world, pipeline = scene(GAPPED | {"f": ("d", "e")}, scripts, {"plain": "plain"})
    compensation = Compensation(retry=Retry(attempts=1), on_failure=on_failure, max_concurrency=1)

    _, report = first_run(pipeline, FailFast(compensation=compensation))

    assert world.refusals == []
    assert report.status is SagaStatus.STUCK
    assert set(report.stuck) == {"c"}
    assert world.undone() == undone
    assert set(report.undone) == set(undone)
    assert set(report.blocked) == blocked
    assert world.standing.keys() == {"c"} | blocked
    assert "Still in effect, its undoing failed: c." in str(report)
    assert "saga settle s c undone --note '...'" in str(report)


def stuck_saga(**more: Any) -> tuple[World, Pipeline, SagaCoordinator, SagaReport, dict[str, Script]]:
    """a -> {b, c} -> d, where d failed and b can't be undone: a is blocked."""
    scripts = {"b": Script(undo_fails=1), "d": Script("raise", then=("ok",))} | more
    world, pipeline = scene(DIAMOND, scripts)
    coordinator, report = first_run(pipeline, FailFast(compensation=IMPATIENT))
    assert report.status is SagaStatus.STUCK
    assert (set(report.stuck), set(report.blocked), set(report.undone)) == ({"b"}, {"a"}, {"c"})
    return world, pipeline, coordinator, report, scripts


def test_what_was_undone_by_hand_lets_the_blocked_ones_be_undone() -> None:
    world, pipeline, coordinator, _, _ = stuck_saga()
    world.undo("b")

    settled = run(coordinator.settle("s", "b", "undone", "refunded by hand, ticket 4711", by="ann"))
    report = run(coordinator.resume("s", pipeline))

    assert settled.status is SagaStatus.STUCK
    assert set(settled.blocked) == {"a"}
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert world.undone() == ["c", "b", "a"]
    word = report.stages["b"].settled
    assert word is not None
    assert (word.verdict, word.note, word.by) == ("undone", "refunded by hand, ticket 4711", "ann")
    assert "settled as undone by ann: refunded by hand, ticket 4711" in str(report)


def test_what_was_undone_by_hand_keeps_its_output_in_the_report() -> None:
    """Promise 4."""
    _, _, coordinator, stuck, _ = stuck_saga()

    settled = run(coordinator.settle("s", "b", "undone", "refunded by hand"))

    assert settled.stages["b"].output == stuck.stuck["b"] == StageOutput.ok(stage="b")
    assert settled.undone["b"] == stuck.stuck["b"]


def test_what_stands_in_the_way_is_mended_and_tried_again() -> None:
    world, pipeline, coordinator, _, scripts = stuck_saga()

    settled = run(coordinator.settle("s", "b", "retry", "the bank is back"))
    report = run(coordinator.resume("s", pipeline))

    assert settled.status is SagaStatus.STUCK
    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["c", "b", "a"]
    assert scripts["b"].undo_attempts == 2
    compensation = report.stages["b"].compensation
    assert compensation is not None
    assert compensation.attempts == 2


def test_what_is_to_be_kept_keeps_what_it_stands_on() -> None:
    world, pipeline, coordinator, _, _ = stuck_saga()

    settled = run(coordinator.settle("s", "b", "kept", "the customer keeps it"))
    resumed = run(coordinator.resume("s", pipeline))

    assert settled.status is SagaStatus.HALTED
    assert set(settled.kept) == {"a", "b"}
    assert resumed.status is SagaStatus.COMPLETED
    assert set(world.standing) == set("abcd")
    again = run(coordinator.compensate("s", pipeline))
    assert set(again.kept) == {"a", "b"}
    assert again.status is SagaStatus.HALTED
    assert set(world.standing) == {"a", "b"}


def test_before_anything_is_settled_a_stuck_saga_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saga")
    world, pipeline, coordinator, stuck, scripts = stuck_saga()
    before = run(coordinator.ledger.read("s"))

    report = run(coordinator.resume("s", pipeline))

    assert report == stuck
    assert run(coordinator.ledger.read("s")) == before
    assert scripts["b"].undo_attempts == 1
    assert set(world.standing) == {"a", "b"}
    assert "nothing can be undone before what is stuck or in doubt is settled" in caplog.text


@pytest.mark.parametrize(
    ("stage", "verdict", "note", "message"),
    [
        ("b", "gone", "why", "expected undone, kept or retry as the verdict, for stage 'b', got 'gone'"),
        ("b", "undone", " ", "expected a note that says why, for stage 'b', got ' '"),
        ("b", "undone", None, "expected a note that says why, for stage 'b', got None"),
        ("c", "undone", "why", "expected a stage that is stuck or in doubt, for stage 'c', got one that is undone"),
        ("a", "undone", "why", "expected a stage that is stuck or in doubt, for stage 'a', got one that is blocked"),
        ("z", "undone", "why", r"expected a stage of saga s \(a, b, c, d\), got 'z'"),
        ("b/x", "undone", "why", r"expected a stage of saga s \(a, b, c, d\), got 'b/x'"),
    ],
)
def test_a_word_that_makes_no_sense_is_refused_and_nothing_is_recorded(stage: str, verdict: str, note: Any, message: str) -> None:
    _, _, coordinator, _, _ = stuck_saga()
    before = run(coordinator.ledger.read("s"))

    with pytest.raises(MisuseError, match=message):
        run(coordinator.settle("s", stage, verdict, note))

    assert run(coordinator.ledger.read("s")) == before


SKIP_BRANCH = ContinueWithFallback(timeout=1, without_fallback="skip_branch", compensation=IMPATIENT)


def test_what_served_a_branch_that_fell_is_not_settled_while_it_is_only_blocked() -> None:
    shape = {"root": (), "middle": ("root",), "leaf": ("middle",), "other": ()}
    _, pipeline = scene(shape, {"middle": Script(undo_fails=9), "leaf": Script("raise")})
    coordinator, _ = first_run(pipeline, SKIP_BRANCH)

    with pytest.raises(MisuseError, match="expected a stage that is stuck or in doubt, for stage 'root', got one that is blocked"):
        run(coordinator.settle("s", "root", "undone", "by hand"))


def test_a_saga_that_went_on_without_two_branches_is_stuck_until_both_are_settled() -> None:
    shape = {"hotel": (), "room": ("hotel",), "flight": (), "seat": ("flight",), "other": ()}
    scripts = {"hotel": Script(undo_fails=9), "room": Script("raise"), "flight": Script(undo_fails=9), "seat": Script("raise")}
    coordinator, first = first_run(scene(shape, scripts)[1], SKIP_BRANCH)
    assert set(first.stuck) == {"hotel", "flight"}

    one = run(coordinator.settle("s", "hotel", "undone", "by hand"))
    both = run(coordinator.settle("s", "flight", "undone", "by hand"))

    assert one.status is SagaStatus.STUCK
    assert both.status is SagaStatus.DEGRADED


def test_a_saga_that_is_stuck_beside_the_branch_that_it_kept_stays_as_it_is() -> None:
    scripts = {"hotel": Script(undo_fails=9), "room": Script("raise")}
    world, pipeline = scene({"hotel": (), "room": ("hotel",), "other": ()}, scripts)
    coordinator, stuck = first_run(pipeline, SKIP_BRANCH)

    report = run(coordinator.resume("s", pipeline))

    assert report == stuck
    assert scripts["hotel"].undo_attempts == 1
    assert set(world.standing) == {"hotel", "other"}


def test_a_saga_that_never_turned_back_is_degraded_when_its_doubt_is_settled() -> None:
    coordinator, first = first_run(scene({"slow": (), "other": ()}, {"slow": Script("hang")})[1], SKIP_BRANCH)
    assert first.status is SagaStatus.STUCK

    settled = run(coordinator.settle("s", "slow", "undone", "it never arrived"))

    assert settled.status is SagaStatus.DEGRADED


def test_a_saga_that_is_alive_is_not_settled() -> None:
    import asyncio

    world, pipeline = scene(SEQUENCE, {"b": Script(before=5)})
    coordinator = SagaCoordinator()

    async def play() -> None:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        while "a" not in world.standing:
            await asyncio.sleep(0)
        with pytest.raises(MisuseError, match="expected a saga that has come to rest, got saga s, which is alive"):
            await coordinator.settle("s", "a", "undone", "by hand")
        await running

    run(play())


def doubtful(policy: Policy, kind: str = "compensable") -> tuple[World, Pipeline, SagaCoordinator, SagaReport, Script]:
    script = Script("hang", lands=True)
    world, pipeline = scene(SEQUENCE, {"b": script}, {"b": kind})
    coordinator, report = first_run(pipeline, policy)
    return world, pipeline, coordinator, report, script


def test_doubt_that_a_person_resolves() -> None:
    for verdict, standing, status in (
        ("undone", set(), SagaStatus.COMPENSATED),
        ("kept", {"a", "b"}, SagaStatus.HALTED),
    ):
        world, pipeline, coordinator, report, _ = doubtful(FailFast(timeout=1))
        assert set(report.in_doubt) == {"b"}
        assert set(report.blocked) == {"a"}
        if verdict == "undone":
            world.undo("b")

        run(coordinator.settle("s", "b", verdict, "looked at the bank's books"))
        if verdict == "undone":
            run(coordinator.resume("s", pipeline))

        assert run(coordinator.report("s")).status is status
        assert set(world.standing) == standing


def test_a_retry_that_could_tell_nothing_new_is_refused() -> None:
    _, _, coordinator, report, _ = doubtful(FailFast(timeout=1))
    assert "and say so (undone or kept); then go on:" in str(report)
    assert report.stages["b"].verdicts == ("undone", "kept")

    with pytest.raises(MisuseError, match=r"expected undone or kept, for stage 'b', got retry\. It has neither a probe nor"):
        run(coordinator.settle("s", "b", "retry", "once more"))


def test_the_summary_says_which_stages_may_be_tried_once_more() -> None:
    """It proposed to try what can't be tried, and that was refused."""

    class Unknown(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await elapse(1000)
            return StageOutput.ok()

        async def compensate(self, ctx: CompensationContext) -> None: ...

    world, _ = scene({"a": ()})
    pipeline = Pipeline().with_stage("a", Unanswering(world, "a", Script("hang", lands=True))).with_stage("b", Unknown())
    coordinator, first = first_run(pipeline, FailFast(timeout=1, compensation=IMPATIENT))

    reported = run(coordinator.report("s"))

    assert reported.stages["a"].verdicts == ("undone", "kept", "retry")
    assert reported.stages["b"].verdicts == ("undone", "kept")
    assert SagaReport.model_validate_json(reported.model_dump_json()) == reported
    for report in (first, reported):
        assert "and say so (undone, kept or retry, that of a alone); then go on:" in str(report)


def test_a_stage_in_doubt_is_in_nobodys_question_while_it_runs_once_more_or_is_undone() -> None:
    seen: list[tuple[StageState, int]] = []

    class Unanswered(CompensableStage):
        timeout = 1.0
        retry = Retry(attempts=2, wait=0)
        idempotent = compensate_in_doubt = True

        async def execute(self, ctx: SagaContext) -> None:
            await self.look()
            await elapse(1000)

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.in_doubt
            await self.look()

        async def look(self) -> None:
            stage = (await coordinator.report("s")).stages["pay"]
            seen.append((stage.state, len(stage.verdicts)))

    coordinator = SagaCoordinator()

    run(coordinator.run(Pipeline().with_stage("pay", Unanswered()), saga_id="s"))

    assert seen == [(StageState.RUNNING, 0), (StageState.RUNNING, 0), (StageState.COMPENSATING, 0)]


def test_a_retry_within_a_saga_that_goes_backward_is_refused_where_nothing_can_be_tried() -> None:
    """The saga within had halted, and was to go on forward; the report then told to undo it by itself, which is refused."""
    halts = FailFast(timeout=1, on_failure="halt")

    class Silent(PivotStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await elapse(1000)
            return StageOutput.ok()

    inner = Pipeline(name="inner").with_stage("pay", Silent())
    coordinator, first = first_run(Pipeline(name="trip").with_stage("child", nested(inner, halts)), FailFast())
    assert first.status is SagaStatus.STUCK
    assert first.stages["child"].children[0].status is SagaStatus.HALTED

    with pytest.raises(MisuseError, match=r"expected undone or kept, for stage 'pay', got retry\. It has neither a probe nor"):
        run(coordinator.settle("s", "child/pay", "retry", "once more"))

    for saga_id in ("s", "s/child"):
        assert "and say so (undone or kept); then go on:" in str(run(coordinator.report(saga_id)))
    assert "and say so (undone or kept); then go on:" in str(first)


def test_a_retry_within_a_saga_that_is_stuck_and_has_not_turned_back_is_taken() -> None:
    """Resumed, that goes forward, and so does what is within it."""
    _, hotel = scene({"pay": ()}, {"pay": Script("hang")})

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(hotel, policy=FailFast(timeout=1, on_failure="halt"))
        await elapse(1000)

    async def probe(_: CompensationContext) -> None:
        raise ConnectionError("no line")

    trip = Pipeline(name="trip").with_stage("book", compensable(book, nothing, probe=probe, timeout=5))
    coordinator = SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch", compensation=IMPATIENT))
    stuck = run(coordinator.run(trip, saga_id="s"))

    report = run(coordinator.settle("s", "book/pay", "retry", "once more"))

    assert (stuck.status, stuck.compensation_order) == (SagaStatus.STUCK, ())
    for told in (stuck, run(coordinator.report("s"))):
        assert told.stages["book"].children[0].stages["pay"].verdicts == ("undone", "kept", "retry")
    said = report.stages["book"].children[0].stages["pay"].settled
    assert said is not None
    assert said.verdict == "retry"


def test_a_retry_is_accepted_for_a_stage_whose_probe_has_failed() -> None:
    world = World({"b": ()})
    pipeline = Pipeline().with_stage("b", Unanswering(world, "b", Script("hang", lands=True)))
    coordinator, first = first_run(pipeline, FailFast(timeout=1, compensation=IMPATIENT))
    assert first.status is SagaStatus.STUCK

    settled = run(coordinator.settle("s", "b", "retry", "the line is back"))

    assert settled.stages["b"].state is S.IN_DOUBT
    assert settled.stages["b"].settled is not None


def test_going_forward_a_retry_runs_what_was_in_doubt_once_more() -> None:
    world, pipeline, coordinator, _, script = doubtful(FailFast(timeout=1, on_failure="halt"))
    script.then = ("ok",)

    run(coordinator.settle("s", "b", "retry", "nothing has arrived at the bank"))
    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert script.attempts == ["hang", "ok"]
    assert set(world.standing) == set("abc")


def test_a_probe_that_had_failed_is_asked_again_when_the_saga_is_resumed() -> None:
    answers: list[Any] = [OSError("no line"), StageOutput.ok(found=True)]
    undone: list[Any] = []

    class Charge(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            import asyncio

            await asyncio.Event().wait()

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[no-any-return] # of the list above

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.output is not None
            undone.append(ctx.output.data)

    pipeline = Pipeline().with_stage("charge", Charge())
    coordinator, report = first_run(pipeline, FailFast(timeout=1, compensation=IMPATIENT))
    assert report.status is SagaStatus.STUCK

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert undone == [{"found": True}]


@pytest.mark.parametrize("settled", [False, True])
def test_an_undoing_in_doubt_that_got_through_and_seemed_to_fail_is_one_once_the_probe_finds_nothing(settled: bool) -> None:
    """To run again it takes another key: with the old one the bank would say that it had been paid, and not that it has paid back."""
    world = World({"charge": ()})
    bank_is_open = False

    class Charge(CompensableStage):
        compensate_in_doubt = True

        async def execute(self, ctx: SagaContext) -> None:
            if ctx.idempotency_key not in world.keys:
                world.keys.add(ctx.idempotency_key)
                world.land("charge")
            if not bank_is_open:
                await elapse(60.0)

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            if not bank_is_open:
                raise OSError("no line")
            return StageOutput.ok() if "charge" in world.standing else None

        async def compensate(self, ctx: CompensationContext) -> None:
            world.undo("charge")
            raise OSError("no answer")

    pipeline = Pipeline().with_stage("charge", Charge())
    coordinator, stuck = first_run(pipeline, FailFast(timeout=1, compensation=IMPATIENT))
    bank_is_open = True
    if settled:
        run(coordinator.settle("s", "charge", "retry", "the bank is open"))
        undone = run(coordinator.resume("s", pipeline))

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert stuck.stages["charge"].state is S.STUCK
    assert not settled or (undone.status, undone.stages["charge"].state) == (SagaStatus.COMPENSATED, S.UNDONE)
    assert report.status is SagaStatus.COMPLETED
    assert world.keys == {"s/charge", "s/charge~2"}
    assert world.standing == {"charge": 1}


# -- on demand -------------------------------------------------------------------------------------------------------


def test_a_second_undo_on_demand_does_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saga")
    world, pipeline = scene(DIAMOND)
    coordinator, _ = first_run(pipeline)

    first = run(coordinator.compensate("s", pipeline))
    before = run(coordinator.ledger.read("s"))
    second = run(coordinator.compensate("s", pipeline))

    assert first == second
    assert run(coordinator.ledger.read("s")) == before
    assert first.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert "saga s: nothing that can be undone is left" in caplog.text
    assert "Nothing is left to do." in str(second)


def test_a_halted_saga_of_which_nothing_stands_is_undone_on_demand_too_and_nobody_who_resumes_what_has_halted_runs_it() -> None:
    _, pipeline = scene({"a": ()}, {"a": Script("raise")})
    coordinator, halted = first_run(pipeline)

    report = run(coordinator.compensate("s", pipeline))
    resumed = run(coordinator.resume("s", pipeline))
    forgotten = run(coordinator.ledger.prune(timedelta(0)))

    assert halted.status is SagaStatus.HALTED
    assert (report.status, str(report).splitlines()[-1]) == (SagaStatus.COMPENSATED, "Nothing is left to do.")
    assert resumed == report
    assert forgotten == ("s",)


def test_a_saga_that_stages_with_nothing_to_undo_completed_stays_complete_when_it_is_to_be_undone() -> None:
    _, pipeline = scene({"a": ()}, {}, {"a": "plain"})
    coordinator, completed = first_run(pipeline)

    report = run(coordinator.compensate("s", pipeline))

    assert report == completed


@pytest.mark.parametrize("kept_by", ["completion", "halt"])
def test_a_compensation_asked_for_on_demand_is_told_what_had_stopped_the_saga(kept_by: str) -> None:
    told: list[Failure | None] = []

    async def hold(ctx: SagaContext) -> None: ...

    async def release(ctx: CompensationContext) -> None:
        told.append(ctx.cause)

    async def charge(ctx: StageContext) -> StageOutput:
        return StageOutput.fail("declined") if kept_by == "halt" else StageOutput.ok()

    trip = Pipeline(name="p").with_stage("hold", compensable(hold, release)).with_stage("charge", charge, "work", dependencies=("hold",))
    coordinator = SagaCoordinator(FailFast(on_failure="halt"))
    report = run(coordinator.run(trip, saga_id="s"))

    run(coordinator.compensate("s", trip))

    assert report.status is (SagaStatus.HALTED if kept_by == "halt" else SagaStatus.COMPLETED)
    assert [cause and cause.message for cause in told] == ["declined" if kept_by == "halt" else None]


# -- a process that died ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["probed", "idempotent"])
@pytest.mark.parametrize("failing", [None, "d"])
@pytest.mark.parametrize("policy", [FailFast(), ContinueWithFallback(fallbacks={"b": {}})])
def test_killed_at_any_event_and_resumed_the_world_is_as_if_it_had_not_been(kind: str, failing: str | None, policy: Policy) -> None:
    """Promise 11, for every prefix of the ledger of a diamond."""
    lengths = set()
    # What may run again and raises then has not said what became of the first request; what reports a failure has.
    fails = "raise" if kind == "probed" else "fail"
    for killed_after in range(40):
        scripts = {name: Script(before=1) for name in DIAMOND} | {"b": Script(fails if isinstance(policy, ContinueWithFallback) else "ok")}
        if failing:
            scripts[failing] = Script(fails, lands=kind == "probed" and isinstance(policy, FailFast))
        world, pipeline = scene(DIAMOND, scripts, dict.fromkeys(DIAMOND, "probed" if kind == "probed" else "compensable"))
        for spec in pipeline.stages.values():
            spec.runner.idempotent = kind == "idempotent"  # type: ignore[union-attr] # scripted stages
        for script in scripts.values():
            script.undo_bears_repetition = kind == "idempotent"
        ledger = Dying(killed_after)
        coordinator = SagaCoordinator(policy, ledger=ledger)
        try:
            run(coordinator.run(pipeline, saga_id="s"))
        except LedgerError:
            ledger.left = 1000
            report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))
        else:
            lengths.add(killed_after)
            report = run(coordinator.report("s"))

        assert world.refusals == [], killed_after
        if failing and report.status is not SagaStatus.COMPLETED:
            assert report.status is SagaStatus.COMPENSATED, (killed_after, str(report))
            assert world.standing == {}, killed_after
        elif failing:
            # It died before it could say that the stage had failed, and the stage's effect was there.
            assert scripts[failing].lands
            assert set(world.standing) == set(DIAMOND)
        else:
            assert report.ok, (killed_after, str(report))
            assert set(world.standing) == {"a", "c", "d"} | ({"b"} if isinstance(policy, FailFast) else set())
        assert all(count == 1 for count in world.standing.values())
    assert lengths, "the last of the runs was never cut short"


def test_a_stage_that_cannot_tell_is_in_doubt_after_its_process_died() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(before=1)})
    ledger = Dying(3)  # a started, a completed, b started

    with pytest.raises(Exception, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 1000
    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert set(world.standing) == {"a", "b"}
    assert report.status is SagaStatus.STUCK
    assert set(report.in_doubt) == {"b"}
    assert set(report.blocked) == {"a"}
    assert report.cause is not None
    assert report.cause.kind is FailureKind.CRASHED
    assert "stage 'b' lost its process: its process is gone; what became of it is not in the ledger" in str(report.cause)


def test_a_stage_that_lost_its_process_runs_again_if_it_is_plain() -> None:
    script = Script()
    world, pipeline = scene(SEQUENCE, {"b": script}, {"b": "plain"})
    ledger = Dying(3)  # as above
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 1000

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert script.attempts == ["ok", "ok"]
    assert world.log == ["+a", "+c"]


class AskedPivot(Pivot):
    probe = Probed.probe


class IdempotentPivot(Pivot):
    idempotent = True


@pytest.mark.parametrize(
    ("kind", "status", "attempts"),
    [(AskedPivot, SagaStatus.COMPLETED, 1), (IdempotentPivot, SagaStatus.COMPLETED, 2), (Pivot, SagaStatus.STUCK, 1)],
)
def test_a_pivot_that_lost_its_process_is_asked_run_again_or_in_doubt(kind: Any, status: SagaStatus, attempts: int) -> None:
    script = Script()
    world, pipeline = scene({"a": ()})
    pipeline = pipeline.with_stage("b", kind(world, "b", script), dependencies=("a",))
    ledger = Dying(3)  # as above
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 1000

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is status
    assert len(script.attempts) == attempts
    assert set(world.standing) == {"a", "b"}
    assert (set(report.in_doubt), set(report.blocked)) == (({"b"}, {"a"}) if status is SagaStatus.STUCK else (set(), set()))


@pytest.mark.parametrize("retry", [Retry(attempts=2), Retry(attempts=2, wait=0, max_elapsed=0.5)], ids=["attempts", "and time"])
def test_a_stage_with_attempts_left_uses_them_after_its_process_died(retry: Retry) -> None:
    world, pipeline = scene(SEQUENCE)
    ledger = Dying(3)
    policy = FailFast(retry=retry)

    with pytest.raises(Exception, match="killed"):
        run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 1000
    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]
    started = [event.attempt for event in run(ledger.read("s")) if isinstance(event, StageStarted) and event.stage == "b"]
    assert started == [1, 2]


def test_a_stage_that_died_in_a_redrive_has_the_attempts_of_that_one_left() -> None:
    """Those before are the redrive's business, which gives it all of them anew."""
    script = Script("raise", then=("raise", "ok"))
    world, pipeline = scene({"a": ()}, {"a": script})
    ledger = Dying(1000)
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0), on_failure="halt"), ledger=ledger)
    assert run(coordinator.run(pipeline, saga_id="s")).status is SagaStatus.HALTED
    ledger.left = 2  # resumed, a started
    with pytest.raises(LedgerError, match="killed"):
        run(coordinator.resume("s", pipeline))
    ledger.left = 1000

    report = run(SagaCoordinator(ledger=_reread(ledger)).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert report.stages["a"].attempts == len(script.attempts) == 4
    assert world.log == ["+a"]


def test_a_stage_that_is_asked_when_its_saga_goes_on_is_asked_no_longer_than_the_deadline() -> None:
    """Also the probe of a stage whose process died is cut off, as is every other code of a saga that is out of time."""
    world, pipeline = scene({"a": ()}, {"a": Script(probe_takes=50)}, {"a": "probed"})
    coordinator, _ = killed_while(pipeline, FailFast(deadline=10), StageCompleted)

    async def timed() -> float:
        report = await coordinator.resume("s", pipeline)
        assert report.cause is not None
        assert report.cause.kind is FailureKind.TIMEOUT
        return asyncio.get_running_loop().time()

    # Until the deadline, and then once more to undo it.
    assert run(timed()) == 60
    assert world.standing == {}


def test_a_saga_that_goes_on_without_its_caller_has_the_context_that_it_was_run_with() -> None:
    given: dict[str, Any] = {
        name: uuid4() for name in ("pipeline_run_id", "request_id", "session_id", "user_id", "org_id", "interaction_id")
    }
    given |= {
        "topology": "trip",
        "execution_mode": "fast",
        "service": "booking",
        "input_text": "OSL-JFK",
        "configuration": {"fares": "low"},
    }
    given |= {"input_audio_duration_ms": 7, "metadata": {"tags": ["a"]}, "data": {"currency": "NOK"}}
    context = PipelineContext.create(**given)
    seen: list[dict[str, Any]] = []

    class Seeing(Recorder):
        async def before(self, stage_name: str, ctx: PipelineContext) -> None:
            values = {name: getattr(ctx, name) for name in (*given, "created_at")}
            seen.append(values | {"data": {"currency": ctx.data["currency"]}})

    _, pipeline = scene({"a": ()}, {"a": Script("raise", then=("ok",))})
    ledger = MemoryLedger()
    run(SagaCoordinator(HALT, ledger=ledger).run(pipeline, context, saga_id="s"))

    report = run(SagaCoordinator(ledger=ledger, interceptors=[Seeing()]).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert seen == [given | {"created_at": context.created_at}]


@pytest.mark.parametrize("is_durable", [False, True])
def test_a_stage_that_is_undone_after_its_process_reads_the_same_of_its_snapshot_as_before(is_durable: bool) -> None:
    """What stageflow bundles in it, too: a compensation that looked up the tenant there was stuck, as there was none any more."""
    said = [Message(role="user", content="a window seat", timestamp=datetime(2026, 5, 4, tzinfo=UTC))]
    given: dict[str, Any] = {
        "conversation": Conversation(said, RoutingDecision(agent_id="clerk", pipeline_name="trip", topology="trip")),
        "enrichments": Enrichments(profile=ProfileEnrichment(user_id=uuid4(), preferences={"class": "first"})),
        "extensions": {"tenant": "north", "limit": Decimal("9.50")},
    }
    seen: list[Any] = []

    async def look(ctx: Any) -> None:
        seen.append(ctx.snapshot)

    pipeline = Pipeline(name="p").with_stage("a", compensable(look, look))
    ledger = MortalLedger(durable=is_durable)
    run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s", **given))

    report = run(SagaCoordinator(ledger=ledger).compensate("s", pipeline))

    assert report.status is SagaStatus.COMPENSATED
    before, after = seen
    assert after == before
    assert {name: getattr(after, name) for name in given} == given


def not_typed(value: Any) -> Any:
    """What a program without type checks may hand over."""
    return value


@pytest.mark.parametrize("is_durable", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"enrichments": Enrichments(profile=ProfileEnrichment(user_id=not_typed("customer-17")))},
        {"enrichments": Enrichments(profile=not_typed({"tier": "gold"}))},
        {"enrichments": {"tier": "gold"}},
        {"conversation": Conversation(not_typed((Message("user", "hello", timestamp=not_typed(1777900000.5)),)))},
        {"extensions": {}, "input_text": "", "input_audio_duration_ms": 0},
    ],
)
def test_input_of_which_stageflow_does_not_check_the_type_is_read_after_the_process_as_it_was_before(
    fields: dict[str, Any], is_durable: bool
) -> None:
    """A user_id that is no UUID was recorded, and the saga could then never be undone; what was empty was None."""
    seen: list[Any] = []

    async def look(ctx: Any) -> None:
        seen.append({name: getattr(ctx.snapshot, name) for name in fields})

    pipeline = Pipeline(name="p").with_stage("a", compensable(look, look))
    ledger = MortalLedger(durable=is_durable)
    run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s", **fields))

    report = run(SagaCoordinator(ledger=ledger).compensate("s", pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert seen == [fields, fields]


def test_a_saga_is_undone_whatever_redact_has_left_of_what_stageflow_bundles_in_its_input(tmp_path: Path) -> None:
    seen: list[Any] = []

    def hide(event: AnyEvent) -> AnyEvent:
        if isinstance(event, SagaStarted):
            event.input["enrichments"]["profile"]["user_id"] = "hidden"
            assert event.input["conversation"]["messages"][0].pop("content") == "hello"
            event.input["conversation"]["messages"] = "hidden"
        return event

    async def look(ctx: Any) -> None:
        seen.append((ctx.snapshot.profile.user_id, ctx.snapshot.profile.goals, ctx.snapshot.messages))

    user, said = uuid4(), [Message("user", "hello")]
    bundled: dict[str, Any] = {
        "conversation": Conversation(said),
        "enrichments": Enrichments(profile=ProfileEnrichment(user, goals=["rest"])),
    }
    pipeline = Pipeline(name="p").with_stage("a", compensable(look, look))

    async def play() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db", redact=hide) as ledger:
            await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s", **bundled)
            return await SagaCoordinator(ledger=ledger).compensate("s", pipeline)

    report = asyncio.run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert seen == [(user, ["rest"], said), ("hidden", ["rest"], "hidden")]


@pytest.mark.parametrize("name", ["configuration", "metadata", "data"])
def test_a_saga_is_undone_also_where_redact_has_left_a_text_in_the_place_of_a_dict_of_its_input(name: str, tmp_path: Path) -> None:
    """Python's own error ended compensate(), resume() and recover() of it, for good."""
    world, pipeline = scene(SEQUENCE)
    fields: dict[str, Any] = {name: {"card": "4711"}}

    def hide(event: AnyEvent) -> AnyEvent:
        if isinstance(event, SagaStarted):
            event.input[name] = "hidden"
        return event

    async def play() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db", redact=hide) as ledger:
            await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s", **fields)
            return await SagaCoordinator(ledger=ledger).compensate("s", pipeline)

    report = asyncio.run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert not world.standing


@pytest.mark.parametrize("left", ["hidden", None, {"hidden": True}, {"input_text": "hidden", 7: "hidden"}], ids=str)
def test_a_saga_is_undone_whatever_redact_has_left_in_the_place_of_its_input(left: Any, tmp_path: Path) -> None:
    """Python's own error ended whatever would go on with it, for good."""
    world, pipeline = scene(SEQUENCE)

    def hide(event: AnyEvent) -> AnyEvent:
        return replace(event, input=left) if isinstance(event, SagaStarted) else event

    async def play() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db", redact=hide) as ledger:
            await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s", input_text="4711")
            return await SagaCoordinator(ledger=ledger).compensate("s", pipeline)

    report = asyncio.run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert not world.standing


def test_a_stage_that_was_skipped_gives_the_same_when_its_saga_goes_on() -> None:
    world, pipeline = scene({"a": ()}, {"a": Script("raise", before=1, then=("ok",))})
    told: list[Any] = []

    async def check(_: Any) -> dict[str, Any]:
        return {"skip_reason": "nothing to ship"}

    async def note(ctx: Any) -> None:
        told.append(ctx.inputs.get_output("ship"))

    pipeline = pipeline.with_stage("check", check, "work").with_stage("ship", note, "work", dependencies=("check",), conditional=True)
    pipeline = pipeline.with_stage("write", note, "work", dependencies=("ship", "a"))
    coordinator = SagaCoordinator(HALT, ledger=MemoryLedger())
    halted = run(coordinator.run(pipeline, saga_id="s"))

    report = run(coordinator.resume("s", pipeline))

    assert (halted.skipped, halted.status, report.status) == (("ship",), SagaStatus.HALTED, SagaStatus.COMPLETED)
    assert told == [StageOutput.skip("nothing to ship")]
    assert world.standing.keys() == {"a"}


@given(kill=st.integers(0, 25), again=st.integers(0, 25))
def test_killed_twice_it_comes_back_all_the_same(kill: int, again: int) -> None:
    world, pipeline = scene(DIAMOND, {"d": Script("raise")}, dict.fromkeys(DIAMOND, "probed"))
    ledger = Dying(kill)
    with contextlib.suppress(LedgerError):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    was_undone = SagaState(run(ledger.read("s"))).ended_at is not None
    ledger.left = again
    with contextlib.suppress(LedgerError):
        run(SagaCoordinator(ledger=ledger).resume("s", pipeline, forward=False if was_undone else None))
    ledger.left = 1000

    report = run(SagaCoordinator(ledger=ledger).compensate("s", pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert world.refusals == []
    assert world.standing == {}


def killed_while(pipeline: Pipeline, policy: Policy, kills: type[Any]) -> tuple[SagaCoordinator, Exception]:
    """Run a saga whose ledger takes nothing from an event of that type on."""

    class Killing(Dying):
        async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
            if any(isinstance(event, kills) for event in events):
                self.left = 0
            await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)

    ledger = Killing(1000)
    coordinator = SagaCoordinator(policy, ledger=ledger)
    with pytest.raises(LedgerError, match="killed") as caught:
        run(coordinator.run(pipeline, saga_id="s"))
    ledger.left = 1000
    return SagaCoordinator(ledger=_reread(ledger)), caught.value


def _reread(ledger: MemoryLedger) -> MemoryLedger:
    fresh = MemoryLedger()
    fresh._sagas = ledger._sagas
    return fresh


@pytest.mark.parametrize(("kills", "attempts"), [(StageCompleted, 1), (SagaStopped, 2), (SagaTurnedBack, 1), (SagaEnded, 1)])
def test_a_saga_that_was_killed_runs_on_under_a_new_deadline_unless_the_old_one_is_in_the_ledger(kills: type[Any], attempts: int) -> None:
    b = Script(before=50)
    world, pipeline = scene(SEQUENCE, {"b": b}, dict.fromkeys(SEQUENCE, "probed"))
    coordinator, _ = killed_while(pipeline, FailFast(deadline=10), kills)

    report = run(coordinator.resume("s", pipeline))

    assert len(b.attempts) == attempts
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
    assert world.refusals == []


def test_killed_between_a_cancel_and_its_end_a_saga_stays_cancelled() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("cancel")})
    coordinator, _ = killed_while(pipeline, FailFast(), SagaEnded)

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.CANCELLED
    assert world.log == ["+a"]


@pytest.mark.parametrize("on_cancel", ["keep", "compensate"])
def test_killed_while_another_stage_ran_on_a_cancelled_saga_ends_as_its_policy_says(on_cancel: Any) -> None:
    """Promise 11: that its process is gone is no failure of the stage, which would outweigh the CANCEL."""
    world, pipeline = scene({"a": (), "b": ()}, {"a": Script(before=5.0), "b": Script("cancel")}, {"a": "probed"})
    coordinator, _ = killed_while(pipeline, FailFast(on_cancel=on_cancel), StageCompleted)

    report = run(coordinator.resume("s", pipeline))

    assert report.cause is not None
    assert report.cause.kind is FailureKind.CANCELLED
    assert report.status is (SagaStatus.CANCELLED if on_cancel == "keep" else SagaStatus.COMPENSATED)
    assert world.standing == ({"a": 1} if on_cancel == "keep" else {})


@pytest.mark.parametrize("kind", ["fallback", "compensable"])
def test_killed_before_its_fallback_stood_in_it_stands_in_then(kind: str) -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise")}, {"b": kind})
    policy = ContinueWithFallback(fallbacks={} if kind == "fallback" else {"b": {"instead_of": "b"}})
    coordinator, _ = killed_while(pipeline, policy, FallbackUsed)

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.DEGRADED
    assert report.kept["b"].data == {"instead_of": "b"}
    assert world.log == ["+a", "+c"]


def test_killed_while_it_waited_for_its_next_attempt_it_is_attempted_again() -> None:
    script = Script("raise", then=("raise", "ok"))
    world, pipeline = scene({"a": ()}, {"a": script})

    class KillsTheSecond(Dying):
        async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
            if any(isinstance(event, StageStarted) and event.attempt == 2 for event in events):
                self.left = 0
            await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)

    ledger = KillsTheSecond(1000)
    with pytest.raises(LedgerError):
        run(SagaCoordinator(FailFast(retry=Retry(attempts=3)), ledger=ledger).run(pipeline, saga_id="s"))

    report = run(SagaCoordinator(ledger=_reread(ledger)).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert script.attempts == ["raise", "raise", "ok"]
    assert [failure.kind for failure in report.failures] == [FailureKind.EXCEPTION] * 2
    assert world.log == ["+a"]


class Line(ConnectionError):
    """A policy that lists its base can't tell, of its name alone, that it is one."""


@pytest.mark.parametrize("second", ["retry", "raise"])
def test_killed_while_it_waited_in_doubt_for_its_next_attempt_it_is_attempted_again(second: str) -> None:
    attempts: list[int] = []

    class Charge(CompensableStage):
        timeout = 1.0

        async def execute(self, ctx: SagaContext) -> StageOutput:
            attempts.append(ctx.attempt)
            if ctx.attempt == 1:
                await elapse(10.0)
            if ctx.attempt == 2 and second == "raise":
                raise Line("gone")
            return StageOutput.retry("not yet") if ctx.attempt == 2 else StageOutput.ok()

        async def compensate(self, ctx: CompensationContext) -> None: ...

    class KillsTheThird(Dying):
        async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
            if any(isinstance(event, StageStarted) and event.attempt == 3 for event in events):
                self.left = 0
            await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)

    pipeline = Pipeline(name="scene").with_stage("a", Charge)
    ledger = KillsTheThird(1000)
    policy = FailFast(retry=Retry(attempts=3, retry_on=("timeout", ConnectionError)))
    with pytest.raises(LedgerError):
        run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))

    report = run(SagaCoordinator(ledger=_reread(ledger)).resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert attempts == [1, 2, 3]


class Unanswering(Scripted):
    def __init__(self, world: World, name: str, script: Script) -> None:
        super().__init__(world, name, script)
        self.answers: list[Any] = []

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        raise OSError("no line")


def test_a_probe_that_still_does_not_answer_lets_nothing_run_again() -> None:
    """Not even where a stage has its attempts left: a charge might land twice."""
    script = Script("hang", lands=True, then=("ok",))
    world = World({"b": ()})
    pipeline = Pipeline().with_stage("b", Unanswering(world, "b", script))
    coordinator, _ = first_run(pipeline, FailFast(timeout=1, on_failure="halt", compensation=IMPATIENT))

    report = run(coordinator.resume("s", pipeline, policy=FailFast(retry=Retry(attempts=5), compensation=IMPATIENT)))

    assert script.attempts == ["hang"]
    assert report.status is SagaStatus.STUCK
    assert set(report.in_doubt) == {"b"}


def test_a_fallback_goes_on_standing_in_for_a_stage_in_doubt_when_the_process_dies_after_it() -> None:
    world = World({"b": (), "c": ("b",)})
    pipeline = Pipeline().with_stage("b", Unanswering(world, "b", Script("hang", lands=True)))
    pipeline = pipeline.with_stage("c", Scripted(world, "c", Script()), dependencies=("b",))
    ledger = Dying(1000)
    halting = FailFast(timeout=1, on_failure="halt", compensation=IMPATIENT)
    run(SagaCoordinator(halting, ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 3  # resumed, asked in vain, fallback used
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).resume("s", pipeline, policy=ContinueWithFallback(fallbacks={"b": {}}, compensation=IMPATIENT)))
    assert isinstance(run(ledger.read("s"))[-1], FallbackUsed)
    ledger.left = 1000
    ledger.forget_owners()

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.fallbacks == ("b",)
    assert set(report.in_doubt) == {"b"}
    assert world.log == ["+b", "+c"]


def test_a_retry_is_accepted_for_a_fallback_whose_stage_can_be_asked() -> None:
    script = Script("hang", lands=True)
    world = World({"b": ()})
    pipeline = Pipeline().with_stage("b", Unanswering(world, "b", script))
    policy = ContinueWithFallback(timeout=1, fallbacks={"b": {}}, compensation=IMPATIENT)
    coordinator, first = first_run(pipeline, policy)
    assert first.status is SagaStatus.STUCK
    Unanswering.probe, unanswering = Probed.probe, Unanswering.probe  # type: ignore[method-assign] # the line is mended
    try:
        run(coordinator.settle("s", "b", "retry", "the line is back"))
        report = run(coordinator.resume("s", pipeline))
    finally:
        Unanswering.probe = unanswering  # type: ignore[method-assign] # as above

    assert report.status is SagaStatus.DEGRADED
    assert report.kept["b"].data == {}
    assert report.stages["b"].late_output is not None
    assert world.log == ["+b", "-b"]


def test_a_saga_whose_process_died_is_gone_on_with_before_anything_is_settled() -> None:
    _, pipeline = scene(SEQUENCE)
    coordinator, _ = killed_while(pipeline, FailFast(), SagaEnded)

    with pytest.raises(MisuseError, match=r"got one that is running\. If its process is gone, go on with it first: saga recover"):
        run(coordinator.settle("s", "a", "undone", "by hand"))


def test_a_saga_whose_process_died_can_be_undone_on_demand() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    for kills in (SagaEnded, SagaTurnedBack, CompensationCompleted):
        world, pipeline = scene(SEQUENCE, {"c": Script("raise")}, dict.fromkeys(SEQUENCE, "probed"))
        coordinator, _ = killed_while(pipeline, FailFast(), kills)

        report = run(coordinator.compensate("s", pipeline))

        assert report.status is SagaStatus.COMPENSATED
        assert world.standing == {}
        assert world.refusals == []


def test_a_branch_that_fell_before_its_process_died_takes_along_what_comes_after_it() -> None:
    shape = {"fails": (), "falls": ("fails",), "slow": (), "joins": ("falls", "slow")}
    world, pipeline = scene(shape, {"fails": Script("raise"), "slow": Script(before=1)}, {"slow": "probed"})
    coordinator, _ = killed_while(pipeline, ContinueWithFallback(without_fallback="skip_branch"), StageCompleted)

    report = run(coordinator.resume("s", pipeline))

    assert report.skipped == ("falls", "joins")
    assert "+joins" not in world.log
    assert (report.status, world.standing) == (SagaStatus.COMPENSATED, {})


@pytest.mark.parametrize("kills", [CompensationStarted, CompensationCompleted, SagaEnded])
def test_a_saga_whose_process_died_while_it_undid_its_orphans_is_undone_as_a_whole_on_demand(kills: type[Any]) -> None:
    shape = {"orphan": (), "falls": ("orphan",), "kept": ()}
    world, pipeline = scene(shape, {"falls": Script("raise")}, {"orphan": "probed"})
    coordinator, _ = killed_while(pipeline, ContinueWithFallback(without_fallback="skip_branch"), kills)
    assert "kept" in world.standing

    report = run(coordinator.compensate("s", pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert (world.standing, world.refusals) == ({}, [])
    assert SagaReport.from_events(run(coordinator.ledger.read("s"))) == report


def test_who_settles_is_unknown_where_the_process_has_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass

    def nobody() -> str:
        raise KeyError("no such user")

    _, _, coordinator, _, _ = stuck_saga()
    monkeypatch.setattr(getpass, "getuser", nobody)

    report = run(coordinator.settle("s", "b", "undone", "by hand"))

    assert report.stages["b"].settled is not None
    assert report.stages["b"].settled.by == "unknown"


def test_what_recorded_effects_and_could_not_be_undone_runs_again_under_its_key_though_its_ground_was_undone() -> None:
    """Promise 2: under another key its effect would stand twice."""
    scripts = {"a": Script(order_matters=False), "b": Script("raise", lands=True, undo_fails=9)}
    world, pipeline = scene({"a": (), "b": ("a",)}, scripts, {"b": "recording"})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1), on_failure="continue")))
    stuck = run(coordinator.run(pipeline, saga_id="s"))
    assert (stuck.status, world.standing) == (SagaStatus.STUCK, {"b": 1})
    scripts["b"].outcome = "ok"

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert world.standing == {"a": 1, "b": 1}
    assert report.stages["b"].executions == 1
    assert report.stages["a"].executions == 2


@pytest.mark.parametrize("skipped_by", ["its branch", "its condition", "an interceptor"])
def test_what_was_undone_and_is_skipped_when_it_would_run_again_is_not_undone_once_more(skipped_by: str) -> None:
    """Promise 2: what stood of it belongs to the execution before, which is over, and so is its key."""
    falls = Script(then=("raise", "ok")) if skipped_by == "its branch" else Script()
    says = iter([{}, {"skip_reason": "it rains"} if skipped_by == "its condition" else {}])

    async def look(_: Any) -> dict[str, str]:
        return next(says)

    world, pipeline = scene(SEQUENCE, {"a": falls, "c": Script("raise", then=("raise", "ok"))})
    pipeline = pipeline.with_stage("look", look, "work", dependencies=("a",))
    conditional = replace(pipeline.stages["b"], dependencies=("look",), conditional=True)
    pipeline = replace(pipeline, stages={**pipeline.stages, "b": conditional})
    recorder = Recorder()
    coordinator = SagaCoordinator(interceptors=[recorder])
    run(coordinator.run(pipeline, saga_id="s"))
    assert world.undone() == ["b", "a"]

    if skipped_by == "an interceptor":
        recorder.answer_for = "b"
    redriven = run(coordinator.resume("s", pipeline, forward=True, policy=ContinueWithFallback(without_fallback="skip_branch")))
    assert redriven.stages["b"].state is S.SKIPPED
    recorder.answer_for = ""
    again = run(coordinator.compensate("s", pipeline))

    assert world.refusals == []
    assert world.standing == {}
    assert again.clean


def test_what_runs_after_a_stage_that_failed_and_is_answered_for_when_the_saga_goes_on_is_kept() -> None:
    """As if the stage had skipped itself: its failure is made good, and no ground is missing."""
    world, pipeline = scene(SEQUENCE, {"b": Script("raise")})
    recorder = Recorder()
    coordinator = SagaCoordinator(HALT, interceptors=[recorder])
    assert run(coordinator.run(pipeline, saga_id="s")).failed == ("b",)
    recorder.answer_for = "b"

    report = run(coordinator.resume("s", pipeline))

    assert report.status is SagaStatus.COMPLETED
    assert report.failed == ()
    assert report.skipped == ("b",)
    assert set(report.kept) == set(world.standing) == {"a", "c"}


def test_what_was_undone_and_was_not_let_run_again_is_not_undone_once_more() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    recorder = Recorder()
    coordinator = SagaCoordinator(interceptors=[recorder])
    run(coordinator.run(pipeline, saga_id="s"))
    recorder.critical = "b"

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert world.log == ["+a", "+b", "-b", "-a", "+a", "-a"]
    assert world.refusals == []
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["b"].state is S.FAILED


def test_what_was_skipped_when_it_would_run_again_runs_the_next_time_and_not_under_the_key_that_was_undone() -> None:
    stage = Keyed()
    _, pipeline = scene({"a": ()}, {"a": Script(then=("raise", "ok"))})
    _, tail = scene({"c": ("b",)}, {"c": Script("raise", then=("ok",))})
    pipeline = pipeline.with_stage("b", stage, dependencies=("a",)).with_stage("c", tail.stages["c"].runner, dependencies=("b",))
    coordinator, _ = first_run(pipeline, FailFast())
    skipped = run(coordinator.resume("s", pipeline, forward=True, policy=ContinueWithFallback(without_fallback="skip_branch")))
    assert skipped.stages["b"].state is S.SKIPPED

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert stage.keys == [(1, "s/b"), (1, "s/b~2")]
    assert stage.undo_keys == ["s/b"]


def test_what_did_not_get_its_turn_to_run_anew_still_runs_anew() -> None:
    """Its output came of what was undone: nothing may be charged by it."""
    seats, charged = iter(["14A", "20F"]), []
    world, pipeline = scene({"z": ()}, {"z": Script(then=("raise", "ok"), before=1)})

    async def book(_: Any) -> dict[str, str]:
        return {"seat": next(seats)}

    async def release(_: Any) -> None: ...

    async def price(ctx: Any) -> dict[str, Any]:
        return {"for": ctx.inputs.get_from("seat", "seat")}

    async def charge(ctx: Any) -> None:
        charged.append(ctx.inputs.get_from("price", "for"))
        if len(charged) == 1:
            raise CardDeclined

    whole = (
        pipeline.with_stage("seat", compensable(book, release))
        .with_stage("price", price, "work", dependencies=("seat", "z"))
        .with_stage("charge", charge, "work", dependencies=("price",))
    )
    coordinator = SagaCoordinator()
    run(coordinator.run(whole, saga_id="s"))
    halted = run(coordinator.resume("s", whole, forward=True, policy=HALT))
    assert halted.status is SagaStatus.HALTED
    assert world.log == ["+z", "-z"]

    report = run(coordinator.resume("s", whole))

    assert report.status is SagaStatus.COMPLETED
    assert charged == ["14A", "20F"]


def test_what_is_stuck_and_in_doubt_is_asked_when_the_saga_goes_forward_instead() -> None:
    world = World({"pay": ()})
    answers: list[bool] = [False, True]

    class Unreachable(Scripted):
        compensate_in_doubt = True

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            if not answers.pop(0):
                raise ConnectionError
            return StageOutput.ok(found=True)

    pipeline = Pipeline().with_stage("pay", Unreachable(world, "pay", Script("hang", lands=True, undo_fails=9)))
    coordinator, stuck = first_run(pipeline, FailFast(timeout=1, compensation=IMPATIENT))
    assert list(stuck.stuck) == ["pay"]

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert report.kept["pay"].data == {"found": True}
    assert world.standing == {"pay": 1}


class Captured(Pivot):
    """A pivot that can be asked, as soon as the line is back."""

    is_reachable = False

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        if not self.is_reachable:
            raise OSError("no line")
        return StageOutput.ok(receipt=9) if self.name in self.world.standing else None


@pytest.mark.parametrize("begun_by", ["resume", "compensate"])
def test_a_pivot_that_turns_out_to_have_landed_behind_its_fallback_holds_nothing_up(begun_by: str) -> None:
    """Nobody can undo it, and there is nothing to settle: the saga would be stuck for good."""
    world = World({"a": (), "b": ("a",), "c": ("b",)})
    pivot = Captured(world, "b", Script("hang", lands=True))
    pipeline = Pipeline().with_stage("a", Scripted(world, "a", Script())).with_stage("b", pivot, dependencies=("a",))
    pipeline = pipeline.with_stage("c", Scripted(world, "c", Script()), dependencies=("b",))
    coordinator, first = first_run(pipeline, ContinueWithFallback(timeout=1, fallbacks={"b": {}}, compensation=IMPATIENT))
    assert first.status is SagaStatus.STUCK
    assert set(first.in_doubt) == {"b"}
    pivot.is_reachable = True

    report = run(getattr(coordinator, begun_by)("s", pipeline))

    assert report.clean
    assert report.status is (SagaStatus.DEGRADED if begun_by == "resume" else SagaStatus.HALTED)
    assert report.stages["b"].state is S.FALLBACK
    assert report.stages["b"].late_output == StageOutput.ok(receipt=9)
    assert set(world.standing) == {"a", "b"} | ({"c"} if begun_by == "resume" else set())


class Keeps(Scripted):
    """Records its effect before anything can go wrong, and tells with what it was undone."""

    undone_with: Any = "nothing"

    async def execute(self, ctx: SagaContext) -> Any:
        self.world.standing[self.name] = 1
        await ctx.record(ctx.idempotency_key)
        self.script.attempts.append(self.script.next_outcome())
        if self.script.attempts[-1] == "raise":
            raise CardDeclined(self.name)
        return StageOutput.ok(receipt=9)

    async def compensate(self, ctx: CompensationContext) -> None:
        await super().compensate(ctx)
        self.undone_with = ctx.output


def test_what_runs_again_where_a_fallback_stood_in_is_undone_with_what_it_gave_itself() -> None:
    script = Script("raise", then=("ok",), undo_fails=1)
    world = World({"b": ()})
    stage = Keeps(world, "b", script)
    pipeline = Pipeline().with_stage("b", stage)
    coordinator, first = first_run(pipeline, ContinueWithFallback(fallbacks={"b": {"receipt": None}}, compensation=IMPATIENT))
    assert first.status is SagaStatus.STUCK
    assert first.fallbacks == ("b",)

    second = run(coordinator.resume("s", pipeline, forward=True))
    undone = run(coordinator.compensate("s", pipeline))

    assert second.status is SagaStatus.COMPLETED
    assert second.fallbacks == ()
    assert undone.status is SagaStatus.COMPENSATED
    assert stage.undone_with == StageOutput.ok(receipt=9)


@pytest.mark.parametrize(("verdict", "state"), [("kept", S.KEPT), ("undone", S.UNDONE)])
def test_what_a_fallback_stood_in_for_and_lost_its_process_when_it_ran_again_can_be_settled(verdict: str, state: StageState) -> None:
    world = World({"b": ()})
    stage = Keeps(world, "b", Script("raise", then=("ok",), undo_fails=1))
    pipeline = Pipeline().with_stage("b", stage)
    policy = ContinueWithFallback(fallbacks={"b": {"receipt": None}}, compensation=IMPATIENT)
    ledger = Dying(10_000)
    run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s"))
    # It is killed while it runs.
    ledger.left = 3
    with pytest.raises(LedgerError):
        run(SagaCoordinator(ledger=ledger).resume("s", pipeline, forward=True, policy=FailFast(on_failure="halt")))
    ledger.left = 10_000
    ledger.forget_owners()
    coordinator = SagaCoordinator(ledger=ledger)
    assert set(run(coordinator.resume("s", pipeline)).in_doubt) == {"b"}

    report = run(coordinator.settle("s", "b", verdict, "looked"))

    assert report.stages["b"].state is state
    assert report.clean


def test_a_saga_whose_fallback_stands_in_is_left_as_it_is_when_the_remains_below_it_were_undone() -> None:
    """Its dependents have used the fallback: what would land now would serve nothing."""
    world = World({"b": (), "c": ("b",)})
    stage = Keeps(world, "b", Script("raise", then=("ok",), order_matters=False))
    pipeline = Pipeline().with_stage("b", stage).with_stage("c", Scripted(world, "c", Script()), dependencies=("b",))
    coordinator, first = first_run(pipeline, ContinueWithFallback(fallbacks={"b": {"receipt": None}}))
    assert first.status is SagaStatus.DEGRADED
    assert set(world.standing) == {"c"}

    report = run(coordinator.resume("s", pipeline))

    assert stage.script.attempts == ["raise"]
    assert report == first


def test_a_fallback_still_stands_in_where_its_saga_goes_on_with_another_branch() -> None:
    world = World({"b": (), "c": ("b",), "d": ()})
    stage, other = Keeps(world, "b", Script("raise", then=("ok",), order_matters=False)), Script("raise", then=("ok",))
    pipeline = Pipeline().with_stage("b", stage).with_stage("c", Scripted(world, "c", Script()), dependencies=("b",))
    pipeline = pipeline.with_stage("d", Scripted(world, "d", other))
    coordinator, first = first_run(pipeline, ContinueWithFallback(fallbacks={"b": {"receipt": None}}, without_fallback="skip_branch"))
    assert first.failed == ("b", "d")

    report = run(coordinator.resume("s", pipeline))

    assert stage.script.attempts == ["raise"]
    assert report.status is SagaStatus.DEGRADED
    assert report.kept["b"].data == {"receipt": None}
    assert set(world.standing) == {"c", "d"}


@pytest.mark.parametrize("retried", [False, True])
def test_what_stands_below_a_fallback_and_cannot_be_undone_may_be_kept(retried: bool) -> None:
    world = World({"b": ()})
    stage = Keeps(world, "b", Script("raise", undo_fails=9))
    pipeline = Pipeline().with_stage("b", stage)
    coordinator, first = first_run(pipeline, ContinueWithFallback(fallbacks={"b": {"receipt": None}}, compensation=IMPATIENT))
    assert set(first.stuck) == {"b"}
    if retried:
        run(coordinator.settle("s", "b", "retry", "the bank answers again"))
        assert set(run(coordinator.resume("s", pipeline)).stuck) == {"b"}

    report = run(coordinator.settle("s", "b", "kept", "it may stay"))

    assert report.clean
    assert report.status is SagaStatus.DEGRADED
    assert report.stages["b"].state is S.FALLBACK


def test_a_stage_in_doubt_behind_its_fallback_is_not_tried_again_where_nothing_can_be_tried() -> None:
    """It was said that there is nothing to settle, and to resume the saga, which ran nothing as the fallback stands in."""
    world, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script("hang", lands=True)})
    coordinator, stuck = first_run(pipeline, ContinueWithFallback(timeout=10, fallbacks={"a": {}}))
    assert stuck.status is SagaStatus.STUCK
    assert [*stuck.in_doubt] == ["a"]

    with pytest.raises(MisuseError, match=r"undone or kept, for stage 'a', got retry\. It has neither a probe nor a compensation"):
        run(coordinator.settle("s", "a", "retry", "looked"))

    world.undo("a")
    assert run(coordinator.settle("s", "a", "undone", "put right")).status is SagaStatus.DEGRADED
