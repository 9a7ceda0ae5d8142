"""The ledger: events, transitions, completions, leases; and what happens when it can't record."""

from __future__ import annotations

import asyncio
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from stageflow.api import Pipeline, StageOutput

from saga import (
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    LedgerConflict,
    LedgerCorrupt,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Retry,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    SagaUnrecorded,
    StageState,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    FallbackFailed,
    FallbackUsed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaStopped,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSettled,
    StageSkipped,
    StageStarted,
    TurnReason,
    Verdict,
    event_from_json,
    event_to_json,
)
from saga.graph import Graph, Node, Role
from saga.ledger import TRANSITIONS
from saga.owners import this_process
from saga.recovery import Rollback
from saga.recovery.state import SagaState
from tests.controlled import run
from tests.dying import Dying
from tests.slow import SlowLedger
from tests.test_owners import of_a_process_that_ended
from tests.world import DIAMOND, SEQUENCE, Script, World, scene

GRAPH = Graph.of([Node(name="b", dependencies=("a",), role=Role.COMPENSABLE), Node(name="a", role=Role.COMPENSABLE)])
STARTED = SagaStarted(saga_id="s", pipeline="p", graph=GRAPH, policy=FailFast(), input={"input_text": "x"})
OUTPUT = StageOutput.ok(amount=1)
FAILURE = Failure.of("a", FailureKind.REPORTED, "no")
LATE = StageProbed(stage="a", landed=None, output=OUTPUT, failure=Failure.of("a", FailureKind.LATE, "too late"), held=True)
ALL: list[AnyEvent] = [
    STARTED,
    StageStarted(stage="a", attempt=1),
    EffectRecorded(stage="a", effect={"seat": (1, "A")}),
    StageCompleted(stage="a", output=OUTPUT),
    StageFailed(stage="a", failure=FAILURE, in_doubt=True, will_retry=True, output=OUTPUT),
    StageSkipped(stage="a", reason="r", output=OUTPUT, with_branch=True),
    FallbackUsed(stage="a", output=OUTPUT, source="policy"),
    FallbackFailed(stage="a", failure=FAILURE),
    StageProbed(stage="a", landed=None, failure=FAILURE, will_retry=True),
    LATE,
    SagaStopped(cause=FAILURE),
    SagaTurnedBack(reason=TurnReason.FAILURE, cause=FAILURE),
    CompensationStarted(stage="a", attempt=1),
    CompensationCompleted(stage="a"),
    CompensationFailed(stage="a", failure=FAILURE, will_retry=True),
    StageSettled(stage="a", verdict=Verdict.KEPT, note="paid in cash", by="ann", output=OUTPUT),
    SagaResumed(forward=True, policy=FailFast(), by="ann"),
    SagaEnded(status=SagaStatus.STUCK, cause=FAILURE),
]


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_every_event_comes_back_from_json_equal(event: AnyEvent) -> None:
    assert event_from_json(event_to_json(event)) == event


def test_every_kind_of_event_has_been_written_and_read_back() -> None:
    assert {type(event) for event in ALL} == set(AnyEvent.__origin__.__args__)  # type: ignore[attr-defined] # a union in Annotated


def test_a_fresh_saga_begins_with_its_start() -> None:
    with pytest.raises(LedgerCorrupt, match="a saga begins with SagaStarted, this one with StageStarted"):
        SagaState([StageStarted(stage="a", attempt=1)])


@pytest.mark.parametrize(("came", "is_late"), [(LATE, True), (StageProbed(stage="a", landed=None, failure=FAILURE, held=True), False)])
def test_what_came_late_of_an_execution_before_is_still_a_question_when_the_next_one_does_not_begin(
    came: StageProbed, is_late: bool
) -> None:
    """What came late within is of the execution that is over."""
    past: list[AnyEvent] = [StageStarted(stage="a", attempt=1), StageCompleted(stage="a", output=OUTPUT)]
    past += [SagaTurnedBack(reason=TurnReason.FAILURE), CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a")]
    past += [SagaEnded(status=SagaStatus.COMPENSATED), SagaResumed(forward=True, by="ann"), came]

    state = SagaState([STARTED, *past, StageSkipped(stage="a", reason="b failed", output=OUTPUT, with_branch=True)])

    assert state.stages["a"].has_late_question is is_late
    assert state.stages["a"].doubt is is_late
    assert state.stages["a"].held == (came if is_late else None)


PATHS: dict[StageState, list[AnyEvent]] = {
    StageState.NOT_RUN: [],
    StageState.RUNNING: [StageStarted(stage="a", attempt=1)],
    StageState.KEPT: [StageStarted(stage="a", attempt=1), StageCompleted(stage="a", output=OUTPUT)],
    StageState.FAILED: [StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE)],
    StageState.FALLBACK: [
        StageStarted(stage="a", attempt=1),
        StageFailed(stage="a", failure=FAILURE),
        FallbackUsed(stage="a", output=OUTPUT, source="stage"),
    ],
    StageState.CANCELLED: [
        StageStarted(stage="a", attempt=1),
        StageFailed(stage="a", failure=Failure.of("a", FailureKind.CANCELLED, "enough")),
    ],
    StageState.SKIPPED: [StageSkipped(stage="a", reason="r", output=OUTPUT)],
    StageState.IN_DOUBT: [StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE, in_doubt=True)],
}
BACK = SagaTurnedBack(reason=TurnReason.REQUEST)
PATHS[StageState.COMPENSATING] = [*PATHS[StageState.KEPT], BACK, CompensationStarted(stage="a", attempt=1)]
PATHS[StageState.UNDONE] = [*PATHS[StageState.COMPENSATING], CompensationCompleted(stage="a")]
PATHS[StageState.STUCK] = [*PATHS[StageState.COMPENSATING], CompensationFailed(stage="a", failure=FAILURE)]
STAGE_EVENTS: list[AnyEvent] = [event for event in ALL if hasattr(event, "stage")]


def test_the_paths_reach_every_state_of_the_table() -> None:
    assert set(PATHS) == set(TRANSITIONS)
    for expected, path in PATHS.items():
        assert SagaState([STARTED, *path]).stages["a"].state is expected


HALTED = SagaEnded(status=SagaStatus.HALTED)
RUNS_ON = SagaResumed(forward=True, by="ann")
STUCK_WITH_REMAINS: list[AnyEvent] = [
    StageStarted(stage="a", attempt=1),
    EffectRecorded(stage="a", effect=1),
    StageFailed(stage="a", failure=FAILURE),
    BACK,
    CompensationStarted(stage="a", attempt=1),
    CompensationFailed(stage="a", failure=FAILURE),
]
UNSURE: list[AnyEvent] = [StageStarted(stage="a", attempt=1), StageFailed(stage="a", failure=FAILURE, in_doubt=True, will_retry=True)]
STUCK = StageState.STUCK
# "p" is plain and worked out from what "a" gave: when "a" was undone, it runs again, too.
ON_GROUND_THAT_IS_GONE: list[AnyEvent] = [*PATHS[StageState.UNDONE], HALTED, RUNS_ON]
PLAIN_PATHS: dict[StageState, list[AnyEvent]] = {
    StageState.KEPT: [StageStarted(stage="p", attempt=1), StageCompleted(stage="p", output=OUTPUT)],
    StageState.FALLBACK: [
        StageStarted(stage="p", attempt=1),
        StageFailed(stage="p", failure=FAILURE),
        FallbackUsed(stage="p", output=OUTPUT, source="stage"),
    ],
    StageState.SKIPPED: [StageSkipped(stage="p", reason="r", output=OUTPUT)],
}
THREE = SagaStarted(
    saga_id="s",
    pipeline="p",
    graph=Graph.of([*GRAPH.nodes, Node(name="p", dependencies=("a",))]),
    policy=FailFast(),
)


def histories(before: StageState) -> list[tuple[str, list[AnyEvent]]]:
    """Stages in that state, with what led there: also in sagas that turned back, ended, or were resumed."""
    path = PATHS[before]
    found = [("a", path), ("a", [*path, HALTED, RUNS_ON] if before is not StageState.COMPENSATING else path)]
    if before not in {StageState.RUNNING, StageState.COMPENSATING}:
        found += [("a", [*path, BACK]), ("a", [*path, HALTED])]
    if before is STUCK:
        found.append(("a", [*STUCK_WITH_REMAINS, HALTED, RUNS_ON]))
    if before in PLAIN_PATHS:
        backward = [*path[:0], *PATHS[StageState.KEPT], *PLAIN_PATHS[before], *PATHS[StageState.UNDONE][2:]]
        found.append(("p", [*backward, HALTED, RUNS_ON]))
    if before in {StageState.KEPT, StageState.FAILED, StageState.CANCELLED, StageState.UNDONE}:
        found.append(("a", [*path, LATE, HALTED]))
    if before is StageState.SKIPPED:
        found.append(("a", [*UNSURE, *path, HALTED]))
    if before is StageState.FALLBACK:
        found.append(("a", [*PATHS[StageState.IN_DOUBT], PATHS[StageState.FALLBACK][-1], HALTED]))
    if before is StageState.UNDONE:
        # What it had left was undone when the sagas of its fallback were of use; then nothing used them any more.
        used = FallbackUsed(stage="a", output=OUTPUT, source="stage", ran=("s/a",))
        remains = [*STUCK_WITH_REMAINS[:3], used, SagaTurnedBack(reason=TurnReason.ORPHANS)]
        found.append(("a", [*remains, CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a"), BACK]))
    return [(stage, events) for stage, events in found if ends_in(before, stage, events)]


def ends_in(state: StageState, stage: str, events: list[AnyEvent]) -> bool:
    try:
        return SagaState([THREE, *events]).stages[stage].state is state
    except LedgerCorrupt:
        return False


def variants(event: AnyEvent, stage: str) -> list[AnyEvent]:
    any_event: Any = event
    for_stage: Any = replace(any_event, stage=stage)
    if isinstance(for_stage, StageCompleted | CompensationCompleted):
        return [for_stage, replace(for_stage, late=True)]
    return [for_stage]


@pytest.mark.parametrize("event", STAGE_EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("before", PATHS)
def test_an_event_follows_where_the_table_allows_it_and_nowhere_else(before: StageState, event: AnyEvent) -> None:
    taken, refused = [], []
    for stage, history in histories(before):
        for variant in variants(event, stage):
            try:
                SagaState([THREE, *history, variant])
                taken.append(history)
            except LedgerCorrupt as error:
                refused.append(str(error))

    assert bool(taken) is (type(event) in TRANSITIONS[before])
    assert all(type(event).__name__ in message for message in refused)


@pytest.mark.parametrize("before", [state for state in PATHS if state not in {StageState.NOT_RUN, StageState.RUNNING}])
def test_a_stage_that_has_ended_runs_again_only_in_a_saga_that_was_resumed(before: StageState) -> None:
    for again in (StageStarted(stage="a", attempt=2), StageSkipped(stage="a", reason="r", output=OUTPUT)):
        with pytest.raises(LedgerCorrupt, match=f"stage 'a' in state {before.value}"):
            SagaState([STARTED, *PATHS[before], again])


@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize("before", [StageState.KEPT, StageState.CANCELLED, StageState.UNDONE])
def test_a_stage_that_was_done_with_gives_no_answer(before: StageState, landed: bool) -> None:
    with pytest.raises(LedgerCorrupt, match=f"StageProbed can't follow on stage 'a' in state {before.value}"):
        SagaState([STARTED, *PATHS[before], StageProbed(stage="a", landed=landed)])


def test_late_is_what_nobody_waited_for_and_nothing_else_is() -> None:
    for path, completed in (
        (PATHS[StageState.RUNNING], StageCompleted(stage="a", output=OUTPUT, late=True)),
        (PATHS[StageState.IN_DOUBT], StageCompleted(stage="a", output=OUTPUT)),
        (PATHS[StageState.COMPENSATING], CompensationCompleted(stage="a", late=True)),
        (PATHS[StageState.STUCK], CompensationCompleted(stage="a")),
    ):
        with pytest.raises(LedgerCorrupt):
            SagaState([STARTED, *path, completed])


ORPHANED = SagaTurnedBack(reason=TurnReason.ORPHANS)


@pytest.mark.parametrize(
    ("path", "may_follow"),
    [([], False), ([ORPHANED], False), ([BACK], True), ([ORPHANED, *PATHS[StageState.STUCK][-2:]], True)],
    ids=["going forward", "undoing others", "undoing it", "stuck"],
)
def test_a_compensation_comes_late_to_what_is_stuck_or_to_be_undone_and_to_nothing_else(path: list[AnyEvent], may_follow: bool) -> None:
    state = SagaState([STARTED, *PATHS[StageState.KEPT], *path])

    assert state.may_follow(CompensationCompleted(stage="a", late=True)) is may_follow


def test_only_what_is_stuck_or_in_doubt_in_a_saga_at_rest_is_settled() -> None:
    word = StageSettled(stage="a", verdict=Verdict.UNDONE, note="by hand", by="ann")
    for path in ([*PATHS[StageState.STUCK]], [*PATHS[StageState.FALLBACK], HALTED], [*PATHS[StageState.SKIPPED], HALTED]):
        with pytest.raises(LedgerCorrupt):
            SagaState([STARTED, *path, word])


CONTRADICTIONS: dict[str, tuple[list[AnyEvent], AnyEvent, str]] = {
    "a second start": ([], STARTED, "SagaStarted can't follow on a saga that has started"),
    "an unknown stage": ([], StageStarted(stage="z", attempt=1), "can't follow on a saga without that stage"),
    "turning back under running work": (PATHS[StageState.RUNNING], BACK, "a saga whose stages still run"),
    "ending under running work": (PATHS[StageState.RUNNING], SagaEnded(status=SagaStatus.COMPLETED), "a saga whose stages still run"),
    "starting while going backward": (PATHS[StageState.UNDONE], StageStarted(stage="b", attempt=1), "a saga that is compensating"),
    "going forward on the way back": (PATHS[StageState.UNDONE], RUNS_ON, "a saga that is compensating"),
    "going on backward without having turned": (
        [*PATHS[StageState.KEPT], HALTED],
        SagaResumed(forward=False, by="ann"),
        "a saga that never turned back",
    ),
    "going on with other stages": (
        [*PATHS[StageState.KEPT], HALTED],
        SagaResumed(forward=True, graph=Graph.of([Node(name="a")]), by="ann"),
        "SagaResumed can't follow on a saga with another graph (stage 'b' is gone; stage 'a': role was 'compensable', is 'plain')",
    ),
    "turning back with other stages": (
        PATHS[StageState.KEPT],
        SagaTurnedBack(reason=TurnReason.REQUEST, graph=Graph.of([*STARTED.graph.nodes, Node(name="z")])),
        "SagaTurnedBack can't follow on a saga with another graph (stage 'z' is new)",
    ),
    "undoing twice": (
        PATHS[StageState.UNDONE],
        CompensationStarted(stage="a", attempt=1),
        "CompensationStarted can't follow on stage 'a' in state undone",
    ),
    "asking what is stuck": (
        PATHS[StageState.STUCK],
        StageProbed(stage="a", landed=True, output=OUTPUT),
        "StageProbed can't follow on stage 'a' in state stuck",
    ),
    "compensating while going forward": (PATHS[StageState.KEPT], CompensationStarted(stage="a", attempt=1), "a saga that is running"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_and_named(case: str) -> None:
    path, event, message = CONTRADICTIONS[case]

    with pytest.raises(LedgerCorrupt, match="the saga is left as it is") as caught:
        SagaState([STARTED, *path, event])

    assert message in str(caught.value)


def test_completions_are_in_topological_order_whatever_order_they_came_in() -> None:
    world, pipeline = scene({"z": (), "m": ("z",), "b": ("z",), "a": ("m",), "last": ("a", "b")}, {"m": Script(before=3)})
    coordinator = SagaCoordinator()

    run(coordinator.run(pipeline, saga_id="s"))

    assert list(run(coordinator.ledger.completions("s"))) == ["z", "m", "b", "a", "last"]
    assert world.log == ["+z", "+b", "+m", "+a", "+last"]


def test_completions_count_what_was_found_by_asking_and_what_was_undone_later() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("hang", lands=True), "c": Script("raise")}, {"b": "probed"})
    coordinator = SagaCoordinator(FailFast(timeout=1))

    run(coordinator.run(pipeline, saga_id="s"))

    assert world.standing == {}
    completions = run(coordinator.ledger.completions("s"))
    assert list(completions) == ["a", "b"]
    assert completions["b"].data["probed"] is True
    assert run(coordinator.ledger.completions("unknown")) == {}


def test_what_a_later_stage_does_to_an_output_does_not_reach_the_ledger() -> None:
    async def first(_: Any) -> StageOutput:
        return StageOutput.ok(items=[1])

    async def second(ctx: Any) -> None:
        ctx.inputs.get_from("first", "items").append("smuggled")

    pipeline = Pipeline().with_stage("first", first, "work").with_stage("second", second, "work", dependencies=("first",))

    report = run(SagaCoordinator().run(pipeline))

    assert report.kept["first"].data == {"items": [1]}


def test_what_a_later_stage_adds_to_an_empty_output_does_not_reach_the_ledger() -> None:
    async def first(_: Any) -> None: ...

    async def second(ctx: Any) -> None:
        given = ctx.inputs.get_output("first")
        given.data["smuggled"] = True
        given.artifacts.append("smuggled")
        given.events.append("smuggled")

    pipeline = Pipeline().with_stage("first", first, "work").with_stage("second", second, "work", dependencies=("first",))

    report = run(SagaCoordinator().run(pipeline))

    assert report.kept["first"] == StageOutput.ok()


def test_what_is_added_to_an_empty_output_of_a_report_is_in_no_other_report() -> None:
    async def gives_nothing(_: Any) -> None: ...

    coordinator = SagaCoordinator()
    report = run(coordinator.run(Pipeline().with_stage("a", gives_nothing, "work"), saga_id="s"))
    report.kept["a"].data["added"] = True

    again = run(coordinator.report("s"))

    assert again.kept["a"] == StageOutput.ok()


def test_a_memory_ledger_refuses_a_wrong_version_a_stale_token_and_a_second_owner() -> None:
    ledger = MemoryLedger()

    async def play() -> None:
        token = await ledger.create("s", "me", [STARTED])
        with pytest.raises(LedgerConflict, match="exists already"):
            await ledger.create("s", "me", [STARTED])
        with pytest.raises(LedgerConflict, match="has 1 events, expected 0"):
            await ledger.append("s", [BACK], expected_version=0, token=token)
        with pytest.raises(LedgerConflict, match=r"held by me\. Wait until it lets go; ") as caught:
            await ledger.acquire("s", "you")
        assert caught.value.holder == "me"
        newer = await ledger.acquire("s", "me")
        with pytest.raises(LedgerConflict, match=f"lease token {token}, the current one is {newer}"):
            await ledger.append("s", [BACK], expected_version=1, token=token)
        await ledger.release("s", token)
        with pytest.raises(LedgerConflict, match="held by me"):
            await ledger.acquire("s", "you")
        await ledger.release("s", newer)
        assert await ledger.acquire("s", "you") > newer
        assert [entry.saga_id for entry in await ledger.list()] == ["s"]
        assert await ledger.read("s") == (STARTED,)

    run(play())


def test_a_memory_ledger_keeps_so_many_sagas_about_which_nothing_is_left_to_do_and_all_others() -> None:
    ledger = MemoryLedger(keep=2)

    async def play() -> list[str]:
        for saga_id in "abcdef":
            await ledger.create(saga_id, "me", [replace(STARTED, saga_id=saga_id)])
        for saga_id, status in zip("abcde", ["completed", "stuck", "compensated", "cancelled", "degraded"], strict=True):
            await ledger.append(saga_id, [SagaEnded(status=SagaStatus(status))], expected_version=1, token=1, release=True)
        return [entry.saga_id for entry in await ledger.list()]

    assert run(play()) == ["b", "d", "e", "f"]


def test_a_memory_ledger_keeps_ten_thousand_such_sagas_unless_it_is_told_otherwise() -> None:
    ledger = MemoryLedger()

    async def play() -> list[str]:
        for number in range(10_001):
            token = await ledger.create(str(number), "me", [replace(STARTED, saga_id=str(number)), SagaEnded(status=SagaStatus.COMPLETED)])
            await ledger.release(str(number), token)
        return [entry.saga_id for entry in await ledger.list()]

    assert run(play()) == [str(number) for number in range(1, 10_001)]


def test_a_memory_ledger_serves_the_event_loops_of_several_threads() -> None:
    ledger = MemoryLedger(keep=5)
    interval = sys.getswitchinterval()

    async def begin_and_end(thread: int) -> None:
        for number in range(500):
            saga_id = f"{thread}-{number}"
            token = await ledger.create(saga_id, "me", [replace(STARTED, saga_id=saga_id)])
            await ledger.list()
            await ledger.append(saga_id, [SagaEnded(status=SagaStatus.COMPLETED)], expected_version=1, token=token, release=True)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(max_workers=4) as threads:
            list(threads.map(lambda thread: asyncio.run(begin_and_end(thread)), range(4)))
    finally:
        sys.setswitchinterval(interval)

    assert len(run(ledger.list())) == 5


def test_a_copy_of_a_memory_ledger_lets_go_on_with_what_a_process_held_that_is_gone() -> None:
    """One that was pickled, and has outlived the process; in a copy beside a process that lives on, that one's sagas are its own."""
    ledger = MemoryLedger()
    gone, alive, me = of_a_process_that_ended(), this_process(), this_process()

    async def play() -> int:
        await ledger.create("left", gone, [replace(STARTED, saga_id="left")])
        await ledger.create("running", alive, [replace(STARTED, saga_id="running")])
        copied: MemoryLedger = pickle.loads(pickle.dumps(ledger))  # noqa: S301 - our own bytes
        with pytest.raises(LedgerConflict, match="saga running is held"):
            await copied.acquire("running", me)
        return await copied.acquire("left", me)

    assert run(play()) == 2


@pytest.mark.parametrize("keep", [None, "10", -1, float("nan"), True])
def test_a_memory_ledger_that_is_to_keep_what_is_no_number_of_sagas_is_refused_when_it_is_made(keep: Any) -> None:
    with pytest.raises(MisuseError, match=f"^expected a number of sagas to keep, at least 0, got {keep!r}$"):
        MemoryLedger(keep=keep)


def test_a_memory_ledger_keeps_nothing_of_a_family_that_it_forgets() -> None:
    ledger = MemoryLedger(keep=0)

    async def play() -> None:
        await ledger.create("s", "me", [STARTED])
        await ledger.create("child", "me", [replace(STARTED, saga_id="child", parent="s", parent_stage="a")])
        for saga_id in ("child", "s"):
            await ledger.append(saga_id, [SagaEnded(status=SagaStatus.COMPLETED)], expected_version=1, token=1, release=True)

    run(play())

    assert (ledger._sagas, ledger._children, ledger._done) == ({}, {}, {})


@pytest.mark.parametrize("policy", [FailFast(), FailFast(in_flight="cancel")])
@pytest.mark.parametrize("victim", ["b", "c", "d"])
def test_a_ledger_that_takes_its_time_changes_nothing(victim: str, policy: FailFast) -> None:
    world, pipeline = scene(DIAMOND, {victim: Script("raise")}, dict.fromkeys(DIAMOND, "probed"))

    report = run(SagaCoordinator(policy, ledger=SlowLedger()).run(pipeline))

    assert world.refusals == []
    assert world.standing == {}
    assert report.status is SagaStatus.COMPENSATED


def test_a_stage_whose_start_was_recorded_when_the_saga_stopped_does_not_run() -> None:
    world, pipeline = scene({"a": (), "b": ("a",)})
    coordinator = SagaCoordinator(ledger=SlowLedger())

    async def cancelled_while_the_start_is_written() -> SagaReport:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(coordinator.run(pipeline, saga_id="s"), 0.35)
        return await coordinator.report("s")

    report = run(cancelled_while_the_start_is_written())

    assert world.log == []
    assert report.stages["a"].state is StageState.FAILED
    assert report.stages["a"].failure is not None
    assert (report.stages["a"].failure.stage, report.stages["a"].failure.message) == ("a", "the saga stopped before it ran")
    assert report.status is SagaStatus.COMPENSATED


def broken(breaks_at: type[Any], error: Exception | None = None, policy: Any = None, **scripts: Script) -> tuple[World, str, SagaReport]:
    world, pipeline = scene(DIAMOND, scripts, {"b": "probed"})
    ledger = SlowLedger(breaks_at, error)
    coordinator = SagaCoordinator(policy, ledger=ledger)

    async def play() -> tuple[str, SagaReport]:
        with pytest.raises(LedgerError) as caught:
            await coordinator.run(pipeline, saga_id="s")
        assert coordinator._keeper.held.sagas == {}
        ledger.breaks_at = None
        return str(caught.value), await coordinator.report("s")

    message, report = run(play())
    return world, message, report


@pytest.mark.parametrize("breaks_at", [StageStarted, StageCompleted])
def test_when_the_ledger_breaks_no_further_effect_is_started(breaks_at: type[Any]) -> None:
    world, message, report = broken(breaks_at)

    assert message.startswith("saga s stopped, because its ledger failed: disk full. Nothing more was started.")
    # What waited for the ledger before it ran has not run.
    known = "In effect: nothing; not known: nothing." if breaks_at is StageStarted else "In effect: a; not known: nothing."
    assert known in message
    assert message.endswith("When the ledger is back, go on: await coordinator.resume('s', pipeline)")
    assert world.log == ([] if breaks_at is StageStarted else ["+a"])
    assert report.status is SagaStatus.RUNNING


def test_when_the_ledger_breaks_before_it_has_that_a_saga_is_to_be_undone_nobody_is_told_to_resume_it() -> None:
    """That would run it on."""
    _, pipeline = scene({"a": (), "b": ("a",)}, {"b": Script("raise")})
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=SlowLedger(SagaTurnedBack))

    async def play() -> None:
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.compensate("s", pipeline)

    with pytest.raises(SagaUnrecorded, match=r"go on: await coordinator\.compensate\('s', pipeline\)$"):
        run(play())


def test_when_the_ledger_breaks_before_it_has_that_a_saga_is_undone_as_a_whole_nobody_is_told_to_undo_its_orphans_alone() -> None:
    _, pipeline = scene({"a": (), "b": ("a",), "c": ()}, {"b": Script("raise")})
    ledger = Dying(7)
    skips = SagaCoordinator(ContinueWithFallback(without_fallback="skip_branch"), ledger=ledger)
    with pytest.raises(SagaUnrecorded):
        run(skips.run(pipeline, saga_id="s"))
    assert run(skips.report("s")).status is SagaStatus.COMPENSATING
    ledger.forget_owners()

    with pytest.raises(SagaUnrecorded, match=r"go on: await coordinator\.compensate\('s', pipeline\)$"):
        run(SagaCoordinator(ledger=ledger).compensate("s", pipeline))


@pytest.mark.parametrize(
    ("asked", "call"),
    [({"forward": True}, "forward=True"), ({"forward": True, "policy": FailFast(timeout=9)}, "forward=True, policy=policy")],
)
def test_when_the_ledger_breaks_before_it_has_that_a_stuck_saga_goes_forward_nobody_is_told_to_undo_it(
    asked: dict[str, Any], call: str
) -> None:
    """A plain resume goes on to undo it."""
    world, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script(undo_fails=9), "b": Script("raise")})
    coordinator = SagaCoordinator(ledger=SlowLedger(SagaResumed))

    async def play() -> None:
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, **asked)

    with pytest.raises(SagaUnrecorded) as caught:
        run(play())

    assert str(caught.value).endswith(f"go on: await coordinator.resume('s', pipeline, {call})")
    assert world.undone() == []


def test_when_the_ledger_breaks_while_going_backward_no_further_compensation_is_started() -> None:
    world, _, report = broken(CompensationCompleted, d=Script("raise"))

    assert len(world.undone()) <= 2
    assert "a" in world.standing
    assert report.status is SagaStatus.COMPENSATING


@pytest.mark.parametrize("breaks_at", [SagaTurnedBack, StageFailed, SagaEnded, CompensationStarted, StageProbed, FallbackUsed])
def test_wherever_the_ledger_breaks_the_caller_is_told(breaks_at: type[Any]) -> None:
    policy = ContinueWithFallback(timeout=1, fallbacks={"c": {}}, retry=Retry(attempts=1))

    broken(breaks_at, policy=policy, b=Script("hang", lands=True), c=Script("raise", before=5), d=Script("raise"))


def test_what_a_driver_raises_is_told_as_a_ledgers_error() -> None:
    _, message, _ = broken(StageCompleted, OSError("no space left"))

    assert "the ledger failed to record StageCompleted of saga s: no space left" in message


def test_a_saga_whose_start_cannot_be_recorded_never_was() -> None:
    world, pipeline = scene(SEQUENCE)
    coordinator = SagaCoordinator(ledger=SlowLedger(SagaStarted))

    with pytest.raises(LedgerError, match="disk full"):
        run(coordinator.run(pipeline, saga_id="s"))

    assert world.log == []
    assert coordinator._keeper.held.sagas == {}


def test_a_stage_that_is_given_up_when_the_ledger_breaks_ends_the_saga_all_the_same() -> None:
    from tests.test_hard_cases import deaf

    for backward in (False, True):
        released = asyncio.Event()
        _, pipeline = scene({"a": ()}, {"a": Script("ok")})

        async def ignore(_: Any, released: asyncio.Event = released) -> None:
            await deaf(released)

        async def fine(_: Any) -> None: ...

        from saga import Compensation, compensable

        pipeline = pipeline.with_stage("deaf", compensable(fine, ignore) if backward else compensable(ignore, fine), dependencies=("a",))
        pipeline = pipeline.with_stage("fail", compensable(scripted_failure, fine), dependencies=("deaf",))
        policy = FailFast(timeout=3, cancel_grace=1, compensation=Compensation(timeout=3, retry=Retry(attempts=1)))
        coordinator = SagaCoordinator(policy, ledger=SlowLedger(CompensationFailed if backward else StageFailed))

        async def play(coordinator: SagaCoordinator = coordinator, pipeline: Any = pipeline, released: asyncio.Event = released) -> None:
            with pytest.raises(LedgerError, match="disk full"):
                await coordinator.run(pipeline)
            released.set()

        run(play())


async def scripted_failure(_: Any) -> None:
    raise ValueError("no")


def test_a_report_is_a_projection_of_the_events() -> None:
    _, pipeline = scene(DIAMOND, {"d": Script("raise")})
    coordinator = SagaCoordinator()
    report = run(coordinator.run(pipeline, saga_id="s"))

    events = [event_from_json(event_to_json(event)) for event in run(coordinator.ledger.read("s"))]

    assert SagaReport.from_events(events) == report
    assert all(event.at <= datetime.now(UTC) for event in events)


def test_a_compensation_whose_process_died_is_open_again() -> None:
    events = [STARTED, *PATHS[StageState.COMPENSATING]]

    rollback = Rollback(SagaState(events), TurnReason.REQUEST)

    assert len(rollback) == 1
    assert rollback.take() == "a"
