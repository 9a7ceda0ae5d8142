"""How a saga goes on that nobody runs, be it after a person's word: read off its events alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    LedgerError,
    MisuseError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaStatus,
    StageState,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    FallbackFailed,
    SagaEnded,
    SagaResumed,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSettled,
    StageStarted,
    TurnReason,
    Verdict,
)
from saga.graph import Graph, Node, Role
from saga.recovery import Rollback
from saga.recovery.resumption import Direction, crashed, recovering, refusal, resumption, status_at_rest, undoing
from saga.recovery.state import SagaState
from tests.controlled import elapse, run
from tests.slow import SlowLedger
from tests.test_hard_cases import deaf
from tests.test_ledger import BACK, FAILURE, HALTED, LATE, OUTPUT, PATHS, RUNS_ON, STARTED
from tests.world import SEQUENCE, CardDeclined, Probed, Script, scene, staged

GONE = "its process is gone; what became of it is not in the ledger"
ONCE = Compensation(retry=Retry(attempts=1))
IMPATIENT = FailFast(compensation=ONCE)
SKIP_BRANCH = ContinueWithFallback(without_fallback="skip_branch", compensation=ONCE)


@pytest.mark.parametrize("state", [StageState.FAILED, StageState.IN_DOUBT])
@pytest.mark.parametrize("policy", [None, ContinueWithFallback()], ids=["fail fast", "no fallback"])
def test_a_saga_that_a_stage_had_stopped_when_its_process_died_starts_nothing_more(policy: Any, state: StageState) -> None:
    failed = PATHS[state][-1]
    assert isinstance(failed, StageFailed)

    chapter = resumption([STARTED, *PATHS[state]], policy=policy, forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.CONCLUDE, failed.failure)


@pytest.mark.parametrize("policy", [SKIP_BRANCH, ContinueWithFallback(fallbacks={"a": {}})], ids=["skip the branch", "a fallback"])
def test_a_saga_that_a_failed_stage_does_not_stop_goes_on_when_its_process_died(policy: Any) -> None:
    chapter = resumption([STARTED, *PATHS[StageState.FAILED]], policy=policy, forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.FORWARD, None)


def test_a_saga_whose_fallback_had_failed_when_its_process_died_starts_nothing_more() -> None:
    began = replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, has_fallback=True)]))
    fell_back = FallbackFailed(stage="a", failure=FAILURE)

    chapter = resumption([began, *PATHS[StageState.FAILED], fell_back], policy=ContinueWithFallback(), forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.CONCLUDE, FAILURE)


@pytest.mark.parametrize("state", [StageState.FAILED, StageState.CANCELLED])
def test_what_was_to_run_again_when_the_process_died_still_is(state: StageState) -> None:
    chapter = resumption([STARTED, *PATHS[state], HALTED, RUNS_ON], forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.FORWARD, None)


def test_what_had_stopped_a_saga_beside_its_stages_when_its_process_died_still_does() -> None:
    late = Failure.of(None, FailureKind.TIMEOUT, "too late")

    chapter = resumption([STARTED, *PATHS[StageState.KEPT], SagaStopped(cause=late)], forward=None, by="ann")

    assert (chapter.direction, chapter.stop) == (Direction.CONCLUDE, late)


def test_of_several_stages_that_failed_before_the_process_died_the_first_had_stopped_the_saga() -> None:
    began = replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE), Node(name="b", role=Role.COMPENSABLE)]))
    first, second = (Failure.of(stage, FailureKind.REPORTED, "no") for stage in "ba")
    starts = [StageStarted(stage=stage, attempt=1) for stage in "ab"]
    fails = [StageFailed(stage="b", failure=first), StageFailed(stage="a", failure=second)]

    chapter = resumption([began, *starts, *fails], forward=None, by="ann")

    assert chapter.stop == first


def test_an_attempt_whose_process_died_is_told_as_that_although_one_before_it_had_failed() -> None:
    attempts: list[AnyEvent] = [
        StageStarted(stage="a", attempt=1),
        StageFailed(stage="a", failure=FAILURE, will_retry=True),
        StageStarted(stage="a", attempt=2),
    ]

    (failed,) = crashed(SagaState([STARTED, *attempts]), goes_on=True)

    assert isinstance(failed, StageFailed)
    assert (failed.in_doubt, failed.will_retry) == (True, True)
    assert (failed.failure.stage, failed.failure.kind, failed.failure.attempt) == ("a", FailureKind.CRASHED, 2)
    assert failed.failure.message == GONE


def test_a_stage_that_waited_for_its_next_attempt_when_its_process_died_has_failed_as_it_had() -> None:
    state = SagaState([STARTED, StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE, will_retry=True)])

    (failed,) = crashed(state, goes_on=False)

    assert isinstance(failed, StageFailed)
    assert (failed.stage, failed.failure, failed.in_doubt, failed.will_retry) == ("a", FAILURE, False, False)
    assert crashed(state, goes_on=True) == []


def test_a_compensation_whose_process_died_has_failed_and_is_attempted_again() -> None:
    (failed,) = crashed(SagaState([STARTED, *PATHS[StageState.COMPENSATING]]), goes_on=False)

    assert isinstance(failed, CompensationFailed)
    assert failed.will_retry is True
    assert (failed.stage, failed.failure.stage, failed.failure.kind, failed.failure.attempt) == ("a", "a", FailureKind.CRASHED, 1)
    assert failed.failure.message == GONE


def test_a_saga_whose_process_died_is_undone_on_demand_with_what_it_ran_in_doubt() -> None:
    chapter = undoing([STARTED, *PATHS[StageState.RUNNING]], by="ann")

    assert (chapter.direction, chapter.reason) == (Direction.BACKWARD, TurnReason.REQUEST)
    failed, turned = chapter.events
    assert isinstance(failed, StageFailed)
    assert (failed.stage, failed.in_doubt, failed.will_retry) == ("a", True, False)
    assert isinstance(turned, SagaTurnedBack)


def test_a_stuck_saga_whose_stage_is_to_be_tried_again_goes_on_backward() -> None:
    stuck = SagaEnded(status=SagaStatus.STUCK)
    retry = StageSettled(stage="a", verdict=Verdict.RETRY, note="the bank is back", by="ann")

    chapter = resumption([STARTED, *PATHS[StageState.STUCK], stuck, retry, stuck], forward=None, by="ann")

    assert (chapter.direction, chapter.reason) == (Direction.BACKWARD, TurnReason.REQUEST)


def test_a_changed_policy_is_recorded_on_the_way_back_too() -> None:
    chapter = resumption([STARTED, *PATHS[StageState.COMPENSATING]], policy=SKIP_BRANCH, forward=None, by="ann")

    resumed = chapter.events[0]
    assert isinstance(resumed, SagaResumed)
    assert (resumed.forward, resumed.policy) == (False, SKIP_BRANCH)


def test_a_saga_whose_process_died_on_its_way_back_is_undone_by_whoever_demands_it() -> None:
    chapter = undoing([STARTED, *PATHS[StageState.COMPENSATING]], by="ann")

    assert chapter.direction is Direction.BACKWARD
    resumed, failed = chapter.events
    assert isinstance(resumed, SagaResumed)
    assert (resumed.forward, resumed.by) == (False, "ann")
    assert isinstance(failed, CompensationFailed)


def test_a_saga_rid_of_what_served_nothing_is_stuck_when_something_came_late_within_what_it_keeps() -> None:
    nodes = [Node(name="a", role=Role.COMPENSABLE), Node(name="b", role=Role.COMPENSABLE), Node(name="c", dependencies=("b",))]
    began = replace(STARTED, graph=Graph.of(nodes), policy=SKIP_BRANCH)
    ran: list[AnyEvent] = [StageStarted(stage=stage, attempt=1) for stage in "ab"]
    ran += [StageCompleted(stage=stage, output=StageOutput.ok()) for stage in "ab"]
    failed: list[AnyEvent] = [
        StageStarted(stage="c", attempt=1),
        StageFailed(stage="c", failure=Failure.of("c", FailureKind.REPORTED, "no")),
    ]
    undone: list[AnyEvent] = [
        SagaTurnedBack(reason=TurnReason.ORPHANS),
        CompensationStarted(stage="b", attempt=1),
        CompensationCompleted(stage="b"),
    ]
    ended: list[AnyEvent] = [began, *ran, *failed, *undone, SagaEnded(status=SagaStatus.DEGRADED)]
    before, after = SagaState(ended), SagaState([*ended, StageProbed(stage="a", landed=None, failure=FAILURE)])

    assert status_at_rest(before) is SagaStatus.DEGRADED
    assert status_at_rest(after) is SagaStatus.STUCK
    assert after.stages["a"].state is StageState.IN_DOUBT


def test_a_saga_that_nothing_had_stopped_stays_halted() -> None:
    """A person's word had left it so, of what came late after it had completed."""
    assert status_at_rest(SagaState([STARTED, *PATHS[StageState.KEPT], HALTED])) is SagaStatus.HALTED


def test_a_saga_that_halted_stays_halted_when_a_person_settles_what_was_in_doubt() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang")})
    coordinator = SagaCoordinator(FailFast(timeout=1, on_failure="halt"))
    halted = run(coordinator.run(pipeline, saga_id="s"))
    assert (halted.status, [*halted.in_doubt]) == (SagaStatus.HALTED, ["b"])

    settled = run(coordinator.settle("s", "b", "undone", "it never arrived"))

    assert settled.status is SagaStatus.HALTED
    assert world.standing == {"a": 1}


def test_a_saga_is_stuck_until_what_served_nothing_is_undone_though_what_was_stuck_of_it_is_settled() -> None:
    shape = {"root": (), "middle": ("root",), "leaf": ("middle",), "other": ()}
    world, pipeline = scene(shape, {"leaf": Script("raise"), "middle": Script(undo_fails=9)})
    coordinator = SagaCoordinator(SKIP_BRANCH)
    assert [*run(coordinator.run(pipeline, saga_id="s")).blocked] == ["root"]
    world.undo("middle")

    settled = run(coordinator.settle("s", "middle", "undone", "by hand"))
    report = run(coordinator.resume("s", pipeline))

    assert settled.status is SagaStatus.STUCK
    assert report.status is SagaStatus.DEGRADED
    assert world.standing == {"other": 1}


def test_what_stands_in_for_a_stage_still_does_when_a_person_has_what_is_left_of_that_undone_again() -> None:
    """Going forward, too: its dependents have used the fallback, and what would land now would serve nothing."""
    script = Script("raise", lands=True, then=("ok",), undo_fails=1)
    world, pipeline = scene({"b": ()}, {"b": script}, {"b": "recording"})
    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks={"b": {"receipt": None}}, compensation=ONCE))
    assert [*run(coordinator.run(pipeline, saga_id="s")).stuck] == ["b"]
    run(coordinator.settle("s", "b", "retry", "they answer again"))

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert script.attempts == ["raise"]
    assert report.status is SagaStatus.DEGRADED
    assert report.kept["b"].data == {"receipt": None}
    assert world.log == ["+b", "-b"]


def test_what_a_probe_has_found_undone_is_undone_as_a_whole_and_since_then() -> None:
    """Running it again needs nobody's word, and nothing that is idempotent: nothing of it is left."""

    class Unanswered(Probed):
        async def compensate(self, ctx: CompensationContext) -> None:
            await super().compensate(ctx)
            raise CardDeclined("no answer")

    world, tail = scene({"a": (), "b": ("a",)}, {"b": Script("raise", then=("ok",))})
    pipeline = Pipeline(name="scene").with_stage("a", Unanswered(world, "a", Script()))
    pipeline = pipeline.with_stage("b", tail.stages["b"].runner, dependencies=("a",))
    coordinator = SagaCoordinator(IMPATIENT)
    undone = run(coordinator.run(pipeline, saga_id="s"))
    assert undone.status is SagaStatus.COMPENSATED
    assert undone.stages["a"].compensation is not None
    assert undone.stages["a"].compensation.ended_at is not None

    report = run(coordinator.resume("s", pipeline, forward=True))

    assert report.status is SagaStatus.COMPLETED
    assert world.log == ["+a", "-a", "+a", "+b"]


def test_each_attempt_that_comes_late_to_what_was_undone_is_undone_under_another_key() -> None:
    """Whoever recognises a repeated request would answer that the second one was carried out."""
    released = [asyncio.Event(), asyncio.Event()]
    keys: list[str] = []

    class Deaf(CompensableStage):
        compensate_in_doubt = True
        idempotent = True

        async def execute(self, ctx: SagaContext) -> None:
            await deaf(released[ctx.attempt - 1])

        async def compensate(self, ctx: CompensationContext) -> None:
            keys.append(ctx.idempotency_key)

    pipeline = Pipeline().with_stage("deaf", Deaf)
    coordinator = SagaCoordinator(FailFast(timeout=10, cancel_grace=2, on_failure="halt"))

    async def play() -> list[SagaStatus]:
        await coordinator.run(pipeline, saga_id="s")
        seen = [(await coordinator.resume("s", pipeline, policy=FailFast(timeout=10, cancel_grace=2))).status]
        for late in released:
            late.set()
            await elapse(1)
            seen.append((await coordinator.report("s")).status)
            seen.append((await coordinator.compensate("s", pipeline)).status)
        return seen

    seen = run(play())

    assert seen == [SagaStatus.COMPENSATED, *[SagaStatus.STUCK, SagaStatus.COMPENSATED] * 2]
    assert keys == ["s/deaf/undo", "s/deaf/undo~2", "s/deaf/undo~3"]


def test_what_a_stage_was_given_since_is_heeded_by_whoever_goes_on_with_an_undoing_whose_process_died() -> None:
    scripts = {"b": Script("hang", lands=True)}
    world, pipeline = scene(SEQUENCE, scripts)
    ledger = SlowLedger(SagaEnded, seconds=0.0)
    with pytest.raises(LedgerError, match="disk full"):
        run(SagaCoordinator(FailFast(timeout=1), ledger=ledger).run(pipeline, saga_id="s"))
    assert run(SagaCoordinator(ledger=ledger).report("s")).status is SagaStatus.COMPENSATING
    ledger.breaks_at = None
    probed = staged(world, SEQUENCE, scripts, {"b": "probed"})

    report = run(SagaCoordinator(ledger=ledger).compensate("s", probed))

    assert report.status is SagaStatus.COMPENSATED
    assert world.undone() == ["b", "a"]


def test_who_recovers_a_saga_is_in_the_ledger() -> None:
    _, pipeline = scene(SEQUENCE)
    ledger = SlowLedger(SagaEnded, seconds=0.0)
    with pytest.raises(LedgerError, match="disk full"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.breaks_at = None

    run(SagaCoordinator(ledger=ledger).recover(pipeline, by="ann"))

    assert [event.by for event in run(ledger.read("s")) if isinstance(event, SagaResumed)] == ["ann"]


STUCK = SagaEnded(status=SagaStatus.STUCK)
COMPENSATED = SagaEnded(status=SagaStatus.COMPENSATED)
COMPLETED = SagaEnded(status=SagaStatus.COMPLETED)


@pytest.mark.parametrize(
    ("decide", "path", "why"),
    [
        (resumption, [*PATHS[StageState.STUCK], STUCK], "nothing can be undone before what is stuck or in doubt is settled"),
        (resumption, [*PATHS[StageState.UNDONE], COMPENSATED], "it is undone, and runs once more only when it is told to go forward"),
        (resumption, [*PATHS[StageState.KEPT], COMPLETED], "it is completed, nothing is left to run"),
        (recovering, [*PATHS[StageState.FAILED], HALTED], "it has come to rest meanwhile"),
        (undoing, [*PATHS[StageState.UNDONE], COMPENSATED], "nothing that can be undone is left"),
        (undoing, [*PATHS[StageState.STUCK], STUCK], "nothing can be undone before what is stuck or in doubt is settled"),
        (undoing, [*PATHS[StageState.IN_DOUBT], HALTED], "nothing can be undone before what is stuck or in doubt is settled"),
    ],
)
def test_of_a_saga_that_is_left_as_it_is_the_log_says_why(decide: Any, path: list[AnyEvent], why: str) -> None:
    how = {"forward": None} if decide is resumption else {}

    chapter = decide([STARTED, *path], by="ann", **how)

    assert (chapter.direction, chapter.why_not) == (Direction.NOWHERE, why)


def test_all_that_is_half_undone_and_may_not_run_again_is_named_with_what_to_do() -> None:
    completed = [event for stage in "ab" for event in (StageStarted(stage=stage, attempt=1), StageCompleted(stage=stage, output=OUTPUT))]
    in_part = [
        event
        for stage in "ab"
        for event in (CompensationStarted(stage=stage, attempt=1), CompensationFailed(stage=stage, failure=FAILURE, in_part=True))
    ]

    with pytest.raises(MisuseError) as caught:
        resumption([STARTED, *completed, BACK, *in_part, STUCK], forward=True, by="ann")

    assert str(caught.value) == (
        "expected a saga whose half undone stages can run again, got a, b, not idempotent. "
        "Put it right by hand, then settle it as kept or undone; or go on backward."
    )


def test_a_saga_goes_forward_past_a_stage_in_doubt_for_which_a_fallback_stands_in() -> None:
    b_failed = [replace(event, stage="b") for event in PATHS[StageState.FAILED]]  # type: ignore[arg-type] # of a stage
    path = [*PATHS[StageState.IN_DOUBT], PATHS[StageState.FALLBACK][-1], *b_failed, HALTED]

    assert resumption([STARTED, *path], forward=True, by="ann").direction is Direction.FORWARD


def test_all_of_which_something_came_late_is_named_with_what_to_do() -> None:
    late = [replace(LATE, stage=stage) for stage in "ab"]
    completed = [event for stage in "ab" for event in (StageStarted(stage=stage, attempt=1), StageCompleted(stage=stage, output=OUTPUT))]

    with pytest.raises(MisuseError) as caught:
        resumption([STARTED, *completed, *late, STUCK], forward=True, by="ann")

    assert str(caught.value) == (
        "expected a saga in which nothing that came late waits for a person, got a, b in doubt, of which something came late. "
        "Look what stands, put it right by hand, then settle the innermost stage as kept or undone."
    )


def test_a_word_on_a_saga_that_has_not_come_to_rest_is_refused_with_what_to_do() -> None:
    word = StageSettled(stage="a", verdict=Verdict.UNDONE, note="looked", by="ann")

    misuse = refusal(SagaState([STARTED, *PATHS[StageState.IN_DOUBT]]), word, is_turned_back=False)

    assert misuse is not None
    assert misuse.stage == "a"
    assert str(misuse) == (
        "expected a saga that has come to rest, for stage 'a', got one that is running. "
        "If its process is gone, go on with it first: saga recover, or coordinator.recover(pipelines)."
    )


@pytest.mark.parametrize(
    ("path", "is_taken"),
    [
        ([*PATHS[StageState.STUCK], STUCK], False),
        ([StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE, in_doubt=True, output=OUTPUT), STUCK], True),
        ([*PATHS[StageState.KEPT], LATE, STUCK], True),
    ],
    ids=["it completed", "it gave it beside its failure", "another one came late"],
)
def test_an_output_is_taken_of_what_is_kept_unless_the_stage_is_known_to_have_given_one(path: list[AnyEvent], is_taken: bool) -> None:
    word = StageSettled(stage="a", verdict=Verdict.KEPT, note="looked", by="ann", output=OUTPUT)

    misuse = refusal(SagaState([STARTED, *path]), word, is_turned_back=False)

    assert (misuse is None) is is_taken


def test_a_saga_can_go_forward_once_its_undoing_has_found_out_what_came_late_within() -> None:
    """What stands within is beyond a point of no return: nobody had a word to say on it, and none was taken."""
    nested_stage = Node(name="a", role=Role.COMPENSABLE, can_probe=True, idempotent=True, holds_pivot=True)
    events: list[AnyEvent] = [
        replace(STARTED, graph=Graph.of([nested_stage])),
        StageStarted(stage="a", attempt=1),
        StageFailed(stage="a", failure=FAILURE),
        BACK,
        StageProbed(stage="a", landed=False),
        SagaEnded(status=SagaStatus.COMPENSATED),
        StageProbed(stage="a", landed=None, failure=FAILURE, held=True),
        SagaEnded(status=SagaStatus.STUCK),
    ]
    found: list[AnyEvent] = [
        SagaResumed(forward=False, by="ann"),
        CompensationStarted(stage="a", attempt=1),
        CompensationFailed(stage="a", failure=FAILURE, past_pivot=True, in_part=True),
        SagaEnded(status=SagaStatus.HALTED),
    ]

    with pytest.raises(MisuseError, match="got a in doubt, of which something came late"):
        resumption(events, forward=True, by="ann")
    assert resumption([*events, *found], forward=True, by="ann").direction is Direction.FORWARD


def test_what_stands_on_a_stage_that_has_failed_anew_is_undone_before_that() -> None:
    """Promise 1: it came late, was kept when the saga went forward, and what it depends on then failed with something done."""
    events: list[AnyEvent] = [
        replace(STARTED, policy=SKIP_BRANCH, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE), ON_A])),
        *(StageStarted(stage="a", attempt=1), StageCompleted(stage="a", output=OUTPUT)),
        *(StageStarted(stage="b", attempt=1), StageFailed(stage="b", failure=FAILURE)),
        SagaTurnedBack(reason=TurnReason.ORPHANS),
        *(CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a"), SagaEnded(status=SagaStatus.COMPENSATED)),
        *(StageCompleted(stage="b", output=OUTPUT, late=True), SagaEnded(status=SagaStatus.STUCK)),
        SagaResumed(forward=True, by="ann"),
        *(
            StageStarted(stage="a", attempt=1, execution=2),
            EffectRecorded(stage="a", effect="a seat"),
            StageFailed(stage="a", failure=FAILURE),
        ),
    ]

    rollback = Rollback(SagaState(events), TurnReason.ORPHANS)

    assert len(rollback) == 1
    assert rollback.take() == "b"


ON_A = Node(name="b", role=Role.COMPENSABLE, dependencies=("a",))


@pytest.mark.parametrize("before", ["an undoing that failed", "an effect behind its undoing"])
def test_what_the_probe_finds_nothing_of_has_failed_when_the_stage_has_run_since_its_undoing(before: str) -> None:
    """What came of the undoing says nothing of the attempt that came after it."""
    in_doubt = StageFailed(stage="a", failure=FAILURE, in_doubt=True)
    undoing: list[AnyEvent] = [CompensationStarted(stage="a", attempt=1), CompensationFailed(stage="a", failure=FAILURE)]
    if before == "an effect behind its undoing":
        undoing = [
            *(CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a")),
            *(SagaEnded(status=SagaStatus.COMPENSATED), StageCompleted(stage="a", output=OUTPUT, late=True)),
        ]
    events: list[AnyEvent] = [
        replace(STARTED, graph=Graph.of([Node(name="a", role=Role.COMPENSABLE, can_probe=True, idempotent=True)])),
        *(StageStarted(stage="a", attempt=1), in_doubt, BACK, *undoing, SagaEnded(status=SagaStatus.STUCK)),
        *(SagaResumed(forward=True, by="ann"), StageStarted(stage="a", attempt=2), in_doubt),
    ]

    record = SagaState([*events, StageProbed(stage="a", landed=False)]).stages["a"]

    assert record.state is StageState.FAILED
    assert not record.anew
