"""Random graphs, faults, interruptions: what is promised holds, checked by brute force against the world.

`SAGA_CASES` sets the number of cases; `make campaign` runs many more than the test run does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from saga import (
    Compensation,
    ContinueWithFallback,
    FailFast,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Policy,
    Retry,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
)
from saga.events import (
    AnyEvent,
    CompensationStarted,
    FallbackFailed,
    FallbackUsed,
    SagaResumed,
    SagaTurnedBack,
    StageCompleted,
    StageEvent,
    StageFailed,
    StageProbed,
    StageSkipped,
    StageStarted,
    TurnReason,
)
from saga.failures import FailureKind
from saga.graph import Role
from saga.recovery import Rollback
from saga.recovery.state import SagaState
from saga.render.text import explanation
from tests.controlled import elapse, run
from tests.dying import Dying
from tests.slow import SlowDisk
from tests.world import Script, World, hooked, scene, staged

CASES = int(os.environ.get("SAGA_CASES", "2000"))
NAMES = "abcdefghijkl"
TIMEOUT = 10.0
BAD = ("raise", "fail", "wrong", "retry", "cancel", "hang", "die")
S = StageState


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    names = NAMES[: draw(st.integers(1, 12))]
    return {
        name: tuple(sorted(draw(st.sets(st.sampled_from(names[:place]), max_size=3)))) if place else () for place, name in enumerate(names)
    }


@st.composite
def scripts(draw: st.DrawFn, kind: str) -> Script:
    outcome = draw(st.one_of(st.just("ok"), st.just("ok"), st.just("skip"), st.sampled_from(BAD)))
    # By contract a stage that raises or reports has no effect; only one that can be asked may have it all the same.
    lands = {"probed": {"raise", "fail", "wrong", "hang", "die"}, "recording": {*BAD, "skip"}}
    may_land = outcome in lands.get(kind, {"hang"})
    return Script(
        outcome=outcome,
        lands=may_land and draw(st.booleans()),
        before=draw(st.sampled_from([0.0, 0.0, 1.0, 2.0])),
        after=draw(st.sampled_from([0.0, 0.0, 1.0])),
        then=draw(st.sampled_from([(), ("ok",)])),
        undo_fails=draw(st.sampled_from([0, 0, 0, 0, 1, 9])),
        undo_takes=draw(st.sampled_from([0.0, 1.0])),
    )


@st.composite
def policies(draw: st.DrawFn, names: str) -> Policy:
    common: dict[str, Any] = {
        "retry": Retry(attempts=draw(st.integers(1, 2)), wait=draw(st.sampled_from([0.0, 3.0])), jitter=False),
        "timeout": TIMEOUT,
        "compensation": Compensation(
            retry=Retry(attempts=2, wait=1, jitter=False),
            max_concurrency=draw(st.sampled_from([None, None, 1, 2])),
            on_failure=draw(st.sampled_from(["isolate", "isolate", "continue", "halt"])),
        ),
        "in_flight": draw(st.sampled_from(["drain", "cancel"])),
        "drain_timeout": draw(st.sampled_from([None, 2.0, 30.0])),
        "on_failure": draw(st.sampled_from(["compensate", "compensate", "compensate", "halt"])),
        "on_cancel": draw(st.sampled_from(["keep", "compensate"])),
        "on_interrupt": draw(st.sampled_from(["compensate", "compensate", "halt"])),
        "deadline": draw(st.sampled_from([None, None, 4.0])),
    }
    if draw(st.booleans()):
        return FailFast(**common)
    return ContinueWithFallback(
        **common,
        fallbacks={name: {"instead_of": name} for name in draw(st.sets(st.sampled_from(names), max_size=3))},
        without_fallback=draw(st.sampled_from(["fail", "skip_branch"])),
        orphans=draw(st.sampled_from(["compensate", "keep"])),
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(shapes())
    kind = st.sampled_from(["compensable"] * 4 + ["probed"] * 3 + ["recording"] * 2 + ["pivot", "plain", "fallback"])
    kinds = {name: draw(kind) for name in shape}
    return {
        "shape": shape,
        "kinds": kinds,
        "scripts": {name: draw(scripts(kinds[name])) for name in shape},
        "policy": draw(policies("".join(shape))),
        "durable": draw(st.booleans()),
        "hooked": draw(st.booleans()),
        "cancel_at": draw(st.one_of(st.none(), st.none(), st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 11.0]))),
    }


def witness(ledger: MemoryLedger, world: World) -> None:
    """Promise 6, seen from inside the stage: its start is recorded, and so is the end of all that it depends on."""

    def look(name: str) -> None:
        (kept,) = ledger._sagas.values()
        events = kept.events
        mine = [event for event in events if isinstance(event, StageEvent) and event.stage == name]
        assert isinstance(mine[-1], StageStarted), f"{name} runs and the ledger does not know"
        ended = {
            event.stage
            for event in events
            if isinstance(event, StageCompleted | StageSkipped | FallbackUsed) or (isinstance(event, StageProbed) and event.landed)
        }
        failed = set(world.dependencies[name]) - ended
        assert not failed, f"{name} runs before the ledger knows of {failed}"

    world.witness = look


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_what_is_promised_holds(case: Mapping[str, Any]) -> None:
    policy: Policy = case["policy"]
    world, pipeline = scene(case["shape"], case["scripts"], case["kinds"])
    fallbacks = policy.fallbacks if isinstance(policy, ContinueWithFallback) else {}
    for name, script in case["scripts"].items():
        script.attempts.clear()
        script.undo_attempts = 0
        # What a stage recorded before its fallback stood in is undone at the end, below what used the fallback.
        replaced = case["kinds"][name] == "recording" and name in fallbacks
        script.order_matters = policy.compensation.on_failure != "continue" and not replaced
    ledger = SlowDisk() if case["durable"] else MemoryLedger()
    witness(ledger, world)
    coordinator = SagaCoordinator(policy, ledger=ledger)
    context = hooked() if case["hooked"] else None

    async def play() -> SagaReport:
        task = asyncio.create_task(coordinator.run(pipeline, context, saga_id="s"))
        if case["cancel_at"] is not None:
            await elapse(case["cancel_at"])
            task.cancel()
        try:
            report = await task
        except asyncio.CancelledError:
            report = await coordinator.report("s")
        assert report == await coordinator.report("s")
        return report

    report = run(play())

    event(report.status.value)
    assert SagaReport.model_validate_json(report.model_dump_json()) == report
    Oracle(case, world, report, ledger._sagas["s"].events).check()


class Oracle:
    """Checks a finished saga by brute force; it knows the promises, and nothing of how they are kept."""

    def __init__(self, case: Mapping[str, Any], world: World, report: SagaReport, events: list[AnyEvent]) -> None:
        self.case, self.world, self.report, self.events = case, world, report, events
        self.kinds: Mapping[str, str] = case["kinds"]
        self.scripts: Mapping[str, Script] = case["scripts"]
        self.policy: Policy = case["policy"]
        self.states = {name: stage.state for name, stage in report.stages.items()}

    def check(self) -> None:
        # Promises 1, 2, 3 and 7: the world refuses whatever breaks them.
        assert self.world.refusals == []
        assert set(self.states) == set(self.case["shape"])
        self.the_report_agrees_with_the_world()
        self.outputs_are_in_the_report()
        self.the_status_claims_no_more_than_is_known()
        self.only_what_depends_is_held_back()
        self.what_the_policy_does_not_keep_is_undone()
        self.every_failure_is_there()
        self.pivots_are_respected()
        self.the_plan_follows_from_the_events()
        its_words_are_true(self.report, self.events)

    def the_report_agrees_with_the_world(self) -> None:
        for name, state in self.states.items():
            if self.kinds[name] == "plain" or state is S.IN_DOUBT:
                continue
            stage = self.report.stages[name]
            # A saga that keeps what was done also keeps what a failed stage had recorded.
            kept_part = bool(stage.effects) and stage.compensation is None and state not in {S.UNDONE, S.KEPT}
            stands = state in {S.KEPT, S.STUCK, S.BLOCKED} or kept_part
            assert not kept_part or self.report.status in {SagaStatus.HALTED, SagaStatus.CANCELLED} or state is S.BLOCKED
            assert stands == (name in self.world.standing), (name, state)
            assert state not in {S.RUNNING, S.COMPENSATING}

    def outputs_are_in_the_report(self) -> None:
        # Promise 4.
        for name, stage in self.report.stages.items():
            completed = self.scripts[name].attempts and self.scripts[name].attempts[-1] == "ok" and stage.failure is None
            if completed:
                assert stage.output is not None
                assert stage.output.data == {"stage": name}

    def the_status_claims_no_more_than_is_known(self) -> None:
        # Promise 5.
        unsettled = {name for name, state in self.states.items() if state in {S.STUCK, S.BLOCKED, S.IN_DOUBT}}
        match self.report.status:
            case SagaStatus.COMPENSATED:
                assert not unsettled
                assert not self.world.standing
            case SagaStatus.COMPLETED:
                assert set(self.states.values()) <= {S.KEPT, S.SKIPPED}
            case SagaStatus.DEGRADED:
                assert not unsettled
                assert self.report.failed
            case SagaStatus.STUCK:
                assert unsettled
            case SagaStatus.HALTED:
                assert self.report.cause is not None or self.nothing_is_left_but_orphans_that_are_kept()
            case SagaStatus.CANCELLED:
                assert S.CANCELLED in self.states.values() or any(f.kind is FailureKind.CANCELLED for f in self.report.failures)
                assert self.policy.on_cancel == "keep"
                assert not unsettled
            case other:
                raise AssertionError(other)

    def nothing_is_left_but_orphans_that_are_kept(self) -> bool:
        ends = {name for name in self.kinds if not self.world.dependents(name) - {name}}
        above = {end for name in self.world.standing for end in ends & (self.world.dependents(name) | {name})}
        fell = {name for name in above if (self.report.stages[name].skip_reason or "").endswith(" did not complete")}
        keeps = isinstance(self.policy, ContinueWithFallback) and self.policy.orphans == "keep"
        return keeps and bool(above) and above <= fell | set(self.report.failed)

    def only_what_depends_is_held_back(self) -> None:
        # Promise 8.
        if self.policy.compensation.on_failure == "halt":
            return
        for name in self.report.blocked:
            dependents = self.world.dependents(name)
            above = {self.states[other] for other in dependents}
            in_doubt = {other for other in dependents if self.kinds[other] == "pivot" and self.states[other] is S.IN_DOUBT}
            assert in_doubt or self.policy.compensation.on_failure == "isolate"
            assert above & {S.STUCK, S.IN_DOUBT}, f"{name} is blocked by nothing"

    def what_the_policy_does_not_keep_is_undone(self) -> None:
        # Promises 8 and 10, from the other side: without a failure nothing is undone, and after one only a halt, a cancel or a
        # point of no return leaves something standing.
        if not self.report.failures:
            assert self.report.status is SagaStatus.COMPLETED
        if self.report.status is SagaStatus.DEGRADED:
            assert isinstance(self.policy, ContinueWithFallback)
        turned = {event.reason for event in self.events if isinstance(event, SagaTurnedBack)}
        pivots = {name for name, kind in self.kinds.items() if kind == "pivot" and self.states[name] is S.KEPT}
        below_pivots = {name for name in self.kinds if self.world.dependents(name) & pivots} | pivots
        if self.report.status is SagaStatus.HALTED and self.report.cause is None:
            assert self.nothing_is_left_but_orphans_that_are_kept()
            assert turned <= {TurnReason.ORPHANS}
        elif self.report.status is SagaStatus.HALTED and not turned:
            assert self.report.cause is not None
            by_the_caller = self.report.cause.stage is None and self.report.cause.kind is FailureKind.INTERRUPTED
            if self.report.cause.kind is FailureKind.CANCELLED:
                assert (self.policy.on_cancel, bool(self.report.in_doubt)) == ("keep", True)
            else:
                assert (self.policy.on_interrupt if by_the_caller else self.policy.on_failure) == "halt"
        elif self.report.status is SagaStatus.HALTED:
            assert pivots
        if turned - {TurnReason.ORPHANS}:
            kept = {name for name, state in self.states.items() if state is S.KEPT and self.kinds[name] != "plain"}
            assert kept <= below_pivots, "it was not undone, and nothing keeps it"

    def every_failure_is_there(self) -> None:
        # Promise 9.
        assert self.report.cause is None or self.report.cause in self.report.failures
        for name, script in self.scripts.items():
            # A stage that recorded an effect and then skips itself has broken its contract.
            contradicts = self.kinds[name] == "recording" and script.lands
            bad = [outcome for outcome in script.attempts if outcome in BAD or (outcome == "skip" and contradicts)]
            told = [f for f in self.report.failures if f.stage == name and f.kind is not FailureKind.COMPENSATION]
            # A stage that hangs, or that is cut off while it does something else, fails by interruption.
            cut_off = sum(f.kind in {FailureKind.INTERRUPTED, FailureKind.TIMEOUT} for f in told)
            assert len(told) - cut_off <= len(bad) <= len(told), (name, script.attempts, told)
        times = [failure.at for failure in self.report.failures]
        assert times == sorted(times)

    def pivots_are_respected(self) -> None:
        # Promise 10.
        for name, kind in self.kinds.items():
            if kind == "pivot" and self.states[name] is S.KEPT:
                below = {other for other in self.kinds if name in self.world.dependents(other)} - set(self.report.fallbacks)
                assert not below & set(self.world.undone()), f"{name} has completed"
                assert self.report.status is not SagaStatus.COMPENSATED

    def the_plan_follows_from_the_events(self) -> None:
        # Promise 12: at every compensation, a plan made afresh from the events before it would have started it, too.
        backward = False
        for place, entry in enumerate(self.events):
            backward = backward or isinstance(entry, SagaTurnedBack)
            if isinstance(entry, CompensationStarted) and entry.attempt == 1:
                assert backward
                state = SagaState(self.events[:place])
                assert state.reason is not None
                rollback = Rollback(state, state.reason)
                open_now = {rollback.take() for _ in range(len(rollback))}
                assert entry.stage in open_now
                assert state.graph[entry.stage].role is Role.COMPENSABLE


def its_words_are_true(report: SagaReport, events: Sequence[AnyEvent]) -> None:
    """What the summary tells of each stage has happened in the execution that it tells of."""
    last: dict[str, list[AnyEvent]] = {name: [] for name in report.stages}
    undone: list[str] = []
    begun: set[str] = set()
    never_began: dict[str, int] = {}
    for entry in events:
        if isinstance(entry, SagaResumed):
            begun.clear()
        if not isinstance(entry, StageEvent):
            continue
        if isinstance(entry, StageStarted):
            begun.add(entry.stage)
        if isinstance(entry, StageStarted) and entry.attempt == 1:
            last[entry.stage] = []
            undone = [name for name in undone if name != entry.stage]
        if isinstance(entry, StageSkipped | StageFailed) and entry.stage not in begun:
            # If it was due anew, this is another execution, that ended before it began.
            never_began[entry.stage] = len(last[entry.stage])
        if isinstance(entry, CompensationStarted) and entry.stage not in undone:
            undone.append(entry.stage)
        last[entry.stage].append(entry)
    for name, stage in report.stages.items():
        words = explanation(name, report)
        told_of = last[name] if stage.attempts else last[name][never_began.get(name, 0) :]
        kinds = Counter(type(entry) for entry in told_of)
        probed = [entry for entry in told_of if isinstance(entry, StageProbed)]
        unanswered = sum(entry.failure is not None and entry.failure.kind is FailureKind.COMPENSATION for entry in probed)
        assert stage.attempts == kinds[StageStarted], words
        assert "its fallback failed" not in words or kinds[FallbackFailed], words
        assert told(words, r"its probe failed (?:(\d+) times|once)") in {None, unanswered}, words
        assert told(words, r"its compensation failed (?:(\d+) times|once)") in {None, kinds[CompensationStarted]}, words
        assert told(words, r"undone (\d+)(?:st|nd|rd|th) in") in {None, undone.index(name) + 1 if name in undone else 0}, words
        assert told(words, r"undone .* at attempt (\d+), after") in {None, kinds[CompensationStarted]}, words
        assert "asked, it had landed" not in words or any(entry.landed for entry in probed), words
        assert "asked, it had not landed" not in words or probed[-1].landed is False, words


def told(words: str, pattern: str) -> int | None:
    """The number that is told there; None if nothing is."""
    found = re.search(pattern, words)
    return None if found is None else int(found[1] or 1)


# -- sagas that are killed, resumed, settled, mended, undone on demand -----------------------------------------------

DEEDS = ("resume", "forward", "compensate", "undone", "kept", "retry", "mend", "other means")
OTHER_MEANS = {"compensable": "probed", "probed": "fallback", "fallback": "compensable"}


@settings(max_examples=CASES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cases(),
    st.lists(st.one_of(st.none(), st.integers(0, 40)), min_size=1, max_size=3),
    st.lists(st.sampled_from(DEEDS), max_size=5),
)
def test_what_is_promised_holds_for_a_saga_that_is_killed_and_gone_on_with(
    case: Mapping[str, Any], kills: list[int | None], deeds: list[str]
) -> None:
    Biography(case).live(kills, deeds)


class Biography:
    """A saga with a hard life; after each chapter the report has to agree with the world."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.shape: Mapping[str, tuple[str, ...]] = case["shape"]
        self.kinds: Mapping[str, str] = case["kinds"]
        self.scripts: Mapping[str, Script] = case["scripts"]
        self.policy: Policy = case["policy"]
        self.world, self.pipeline = scene(self.shape, self.scripts, self.kinds)
        self.ledger = Dying(10_000)
        self.fallbacks = self.policy.fallbacks.keys() if isinstance(self.policy, ContinueWithFallback) else set()
        for name, script in self.scripts.items():
            script.attempts.clear()
            script.undo_attempts = 0
            script.undo_bears_repetition = True
            replaced = self.kinds[name] == "recording" and name in self.fallbacks
            script.order_matters = self.policy.compensation.on_failure != "continue" and not replaced

    def live(self, kills: list[int | None], deeds: list[str]) -> None:
        self.act(lambda saga: saga.run(self.pipeline, saga_id="s"), kills[0])
        for kill in kills[1:]:
            self.act(lambda saga: saga.resume("s", self.pipeline), kill)
        self.act(lambda saga: saga.resume("s", self.pipeline))
        self.look()
        for deed in deeds:
            self.do(deed)
            self.look()
        self.come_home()

    def act(self, deed: Callable[[SagaCoordinator], Coroutine[Any, Any, Any]], kill: int | None = None) -> None:
        """Do something with a new coordinator, whose process dies at some event."""
        self.ledger.left = 10_000 if kill is None else kill
        with contextlib.suppress(MisuseError, *(() if kill is None else (LedgerError,))):
            run(deed(SagaCoordinator(self.policy, ledger=self.ledger)))
        self.ledger.left = 10_000
        self.ledger.forget_owners()

    def report(self) -> SagaReport:
        return run(SagaCoordinator(ledger=self.ledger).report("s"))

    def do(self, deed: str) -> None:
        match deed:
            case "resume":
                self.act(lambda saga: saga.resume("s", self.pipeline))
            case "forward":
                self.act(lambda saga: saga.resume("s", self.pipeline, forward=True))
            case "compensate":
                self.act(lambda saga: saga.compensate("s", self.pipeline))
            case "mend":
                for script in self.scripts.values():
                    script.outcome, script.then, script.undo_fails = "ok", (), 0
            case "other means":
                # Who raises after its effect has landed is to be asked, or lies.
                turning = {name: kind for name, kind in self.kinds.items() if kind in OTHER_MEANS and not self.scripts[name].lands}
                self.kinds = {**self.kinds, **{name: OTHER_MEANS[kind] for name, kind in turning.items()}}
                for name, kind in turning.items():
                    if name in self.fallbacks or kind == "fallback":
                        # One that was in doubt when its fallback stood in can be undone from here on, below what used that.
                        self.scripts[name].order_matters = False
                self.pipeline = staged(self.world, self.shape, self.scripts, self.kinds)
            case _:
                self.settle(deed)

    def settle(self, verdict: str) -> None:
        """Say the truth of all that is stuck or in doubt, having made it true where that takes a deed."""
        report = self.report()
        for name in (*report.stuck, *report.in_doubt):
            word = "undone" if verdict == "kept" and name not in self.world.standing else verdict
            if word == "retry":
                self.scripts[name].undo_fails = 0
            if word == "undone":
                self.world.standing.pop(name, None)
            self.act(lambda saga, name=name, word=word: saga.settle("s", name, word, "looked"))  # type: ignore[misc] # mypy knows no defaults of lambdas

    def look(self) -> None:
        assert self.world.refusals == []
        report = self.report()
        assert SagaReport.model_validate_json(report.model_dump_json()) == report
        its_words_are_true(report, self.ledger._sagas["s"].events)
        unsettled = {*report.stuck, *report.blocked, *report.in_doubt}
        assert report.status is not SagaStatus.COMPENSATED or not unsettled
        assert report.status not in {SagaStatus.RUNNING, SagaStatus.COMPENSATING}
        for name, stage in report.stages.items():
            partly = self.kinds[name] == "recording" and stage.state not in {S.KEPT, S.UNDONE}
            if self.kinds[name] == "plain" or stage.state is S.IN_DOUBT or partly:
                continue
            kept_by_word = stage.settled is not None and stage.settled.verdict == "kept" and stage.state is S.FALLBACK
            stands = stage.state in {S.KEPT, S.STUCK, S.BLOCKED} or kept_by_word
            assert stands == (name in self.world.standing), (name, stage.state)
            # Promise 2, and redrive: whatever was run again, no effect stands twice.
            assert self.world.standing.get(name, 0) <= 1

    def come_home(self) -> None:
        """Mended and settled, any saga can be undone but for what a pivot or a person keeps."""
        self.do("mend")
        for _ in range(2):
            self.settle("undone")
            self.act(lambda saga: saga.compensate("s", self.pipeline))
        self.look()
        report = self.report()
        event(f"home: {report.status.value}")
        assert report.clean
        if not report.past_pivot:
            assert self.world.standing == {}
