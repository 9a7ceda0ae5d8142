"""Ctrl-C, once and twice, in real scripts and placed exactly; and a KeyboardInterrupt that strikes anywhere in our code.

The first Ctrl-C cancels the main task. The second raises KeyboardInterrupt wherever the process is; asyncio.run then cancels every
task and waits for them all.
"""

from __future__ import annotations

import asyncio
import dis
import gc
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from stageflow import ErrorAction
from stageflow.api import Pipeline, PipelineContext
from stageflow.events import NoOpEventSink

import saga
from saga import (
    Compensation,
    ContinueWithFallback,
    FailFast,
    FailureKind,
    LedgerError,
    MemoryLedger,
    Retry,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    keeper,
    nested,
)
from saga.events import AnyEvent, StageProbed
from saga.keeper import SagaKeeper
from saga.ledger import _TURN
from saga.ledgers.sqlite import SQLiteLedger
from saga.live.around import Around
from saga.live.scheduling import Schedule
from saga.turns import Turns
from saga.watch import Crew
from tests.controlled import ControlledLoop, elapse, run
from tests.interrupting import interrupt_next_call
from tests.world import BRANCHES, DIAMOND, SEQUENCE, CardDeclined, Script, Watching, World, hooked, scene

ROOT = Path(__file__).parent.parent

# -- real scripts, real signals ------------------------------------------------------------------------------------


class Interrupted:
    """A script that runs a saga, as its parent sees it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.world = folder / "world"
        self.errors = folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.scripts.interrupted", self.world, *arguments],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout

    def says(self, line: str) -> None:
        assert self.output.readline() == f"{line}\n", self.errors.read_text()

    def ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.says("interrupted")

    def go_on(self) -> None:
        self.input.write("\n")
        self.input.flush()

    def ends(self) -> tuple[str, str]:
        """What it says last, and its stderr, when it is no longer held up."""
        self.input.close()
        said = self.output.read().removesuffix("\n")
        status, errors = self.process.wait(), self.errors.read_text()
        assert status == -signal.SIGINT, errors
        assert "\nKeyboardInterrupt\n" in errors
        return said, errors

    def standing(self) -> set[str]:
        with closing(sqlite3.connect(self.world)) as world:
            return {name for (name,) in world.execute("SELECT name FROM standing")}


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Interrupted]]:
    started: list[Interrupted] = []

    def start(*arguments: str) -> Interrupted:
        started.append(Interrupted(tmp_path, *arguments))
        return started[-1]

    yield start
    for interrupted in started:
        interrupted.process.kill()
        interrupted.process.wait()
        interrupted.input.close()
        interrupted.output.close()


def test_one_ctrl_c_while_a_stage_runs_lets_it_end_and_undoes_everything(script: Callable[..., Interrupted]) -> None:
    interrupted = script()
    interrupted.says("running b")

    interrupted.ctrl_c()
    interrupted.go_on()

    interrupted.says("undoing b 1")
    said, errors = interrupted.ends()
    assert said == "compensated"
    assert "destroyed" not in errors
    assert interrupted.standing() == set()


def test_two_ctrl_cs_while_a_stage_runs_cut_it_short_and_undo_everything(script: Callable[..., Interrupted]) -> None:
    interrupted = script()
    interrupted.says("running b")

    interrupted.ctrl_c()
    interrupted.ctrl_c()

    said, errors = interrupted.ends()
    assert said == "compensated"
    assert "destroyed" not in errors
    assert interrupted.standing() == set()


def test_one_ctrl_c_while_it_compensates_interrupts_nothing(script: Callable[..., Interrupted]) -> None:
    interrupted = script("fails")
    interrupted.says("running b")
    interrupted.go_on()
    interrupted.says("undoing b 1")

    interrupted.ctrl_c()

    said, errors = interrupted.ends()
    assert said == "compensated"
    assert "destroyed" not in errors
    assert interrupted.standing() == set()


def test_a_second_ctrl_c_while_it_compensates_has_the_attempt_repeated(script: Callable[..., Interrupted]) -> None:
    interrupted = script()
    interrupted.says("running b")
    interrupted.ctrl_c()
    interrupted.go_on()
    interrupted.says("undoing b 1")

    interrupted.ctrl_c()

    interrupted.says("undoing b 2")
    said, errors = interrupted.ends()
    assert said == "compensated"
    assert "destroyed" not in errors
    assert interrupted.standing() == set()


def test_a_third_ctrl_c_ends_the_process_as_a_kill_would(script: Callable[..., Interrupted]) -> None:
    interrupted = script("fails")
    interrupted.says("running b")
    interrupted.go_on()
    interrupted.says("undoing b 1")
    interrupted.ctrl_c()
    interrupted.ctrl_c()
    interrupted.says("undoing b 2")

    interrupted.ctrl_c()

    said, errors = interrupted.ends()
    assert said == "compensating", errors
    assert interrupted.standing() == {"a", "b"}


@pytest.mark.parametrize("seed", [1, 2])
def test_two_ctrl_cs_at_any_moments_leave_nothing_that_resuming_does_not_mend(seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.scripts.struck_at_random", str(seed), "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )

    assert done.returncode == 0, done.stderr


# -- strikes in the code of the stages -----------------------------------------------------------------------------


def interrupted(main: Coroutine[Any, Any, Any]) -> None:
    """Run it as asyncio.run does, in controlled time: a task that waits for ever is an error."""
    with asyncio.Runner(loop_factory=ControlledLoop) as runner:
        runner.run(main)


def two_ctrl_cs() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def raise_ctrl_c() -> None:
    """As the first Ctrl-C does in a loop that asyncio.run has not prepared for it."""
    raise KeyboardInterrupt


@pytest.fixture
def service() -> Iterator[None]:
    """A process whose handler of SIGTERM calls sys.exit(), as those of services do."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    signal.signal(signal.SIGTERM, before)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def strike_once(pipeline: Pipeline, stage: str, hook: str, strike: Callable[[], None] = two_ctrl_cs) -> list[str]:
    """Have something strike when the stage's code is called for the first time; where it did is in what this returns."""
    runner = pipeline.stages[stage].runner
    original = getattr(runner, hook)
    struck: list[str] = []

    async def struck_once(*arguments: Any) -> Any:
        if not struck:
            struck.append(hook)
            strike()
        return await original(*arguments)

    setattr(runner, hook, struck_once)
    return struck


SCENES: dict[str, tuple[Mapping[str, tuple[str, ...]], dict[str, Callable[[], Script]], str]] = {
    "execute": (SEQUENCE, {}, "probed"),
    "probe": (SEQUENCE, {"b": lambda: Script("raise")}, "probed"),
    "fallback": (SEQUENCE, {"b": lambda: Script("raise")}, "fallback"),
    "compensate": (SEQUENCE, {"c": lambda: Script("raise")}, "probed"),
}


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(("strike", "leaves"), [(two_ctrl_cs, KeyboardInterrupt), (raise_ctrl_c, KeyboardInterrupt), (sigterm, SystemExit)])
@pytest.mark.parametrize(
    ("hook", "policy"),
    # FailFast has no use for a fallback.
    [
        pytest.param(hook, policy, id=f"{hook}-{policy.policy}")
        for hook in SCENES
        for policy in (FailFast(), ContinueWithFallback())
        if hook != "fallback" or policy.policy != "fail_fast"
    ],
)
def test_a_signal_that_strikes_the_code_of_a_stage_stops_the_saga_and_leaves_the_loop(
    hook: str, policy: Any, strike: Any, leaves: type[BaseException]
) -> None:
    shape, scripts, kind = SCENES[hook]
    world, pipeline = scene(shape, {name: make() for name, make in scripts.items()}, dict.fromkeys(shape, kind))
    struck = strike_once(pipeline, "b", hook, strike)
    coordinator = SagaCoordinator(policy)

    with pytest.raises(leaves):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    assert struck == [hook]
    assert coordinator._keeper.held.sagas == {}
    assert world.refusals == []
    assert world.standing == {}
    assert run(coordinator.report("s")).status is SagaStatus.COMPENSATED


def fail() -> None:
    raise CardDeclined


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(("strike", "leaves"), [(raise_ctrl_c, KeyboardInterrupt), (sigterm, SystemExit)])
def test_a_stage_that_a_signal_strikes_is_in_doubt_because_it_said_nothing_of_its_effect(strike: Any, leaves: type[BaseException]) -> None:
    """Of a charge that SIGTERM met in a service it was taken that it had not landed, and the service went on to run."""
    world, pipeline = scene(SEQUENCE)
    strike_once(pipeline, "b", "execute", strike)
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0)))

    with pytest.raises(leaves):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    report = run(coordinator.report("s"))
    assert report.failures[-1].message == f"a {leaves.__name__} struck while it ran"
    assert report.stages["b"].state is StageState.IN_DOUBT
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind) == (None, FailureKind.INTERRUPTED)
    assert set(world.standing) == {"a"}


class Exits:
    """A handler that is an object, as one that counts the signals is."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)


def exits_once(number: int, _: FrameType | None) -> None:
    """A handler that has the signals which come after the first one ignored."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def exits_without_its_arguments(number: int, frame: FrameType | None) -> None:
    """A handler that deletes what it does not use."""
    del number, frame
    sys.exit(143)


class ExitsWithoutItsArguments:
    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        sys.exit(143)


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    "handler",
    [
        exits_once,
        exits_without_its_arguments,
        Exits(),
        Exits().__call__,
        partial(Exits()),
        ExitsWithoutItsArguments(),
        partial(ExitsWithoutItsArguments()),
    ],
)
def test_a_sigterm_is_known_as_one_however_its_handler_was_written(handler: Callable[[int, FrameType | None], None]) -> None:
    """Of a charge that it met it was taken that it had not landed: the card was charged twice, and the service went on to run."""
    world, pipeline = scene(SEQUENCE)
    strike_once(pipeline, "b", "execute", sigterm)
    coordinator = SagaCoordinator(FailFast(retry=Retry(attempts=2, wait=0)))
    signal.signal(signal.SIGTERM, handler)

    with pytest.raises(SystemExit):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    assert run(coordinator.report("s")).stages["b"].state is StageState.IN_DOUBT
    assert set(world.standing) == {"a"}


def test_ctrl_c_in_a_stage_of_a_nested_saga_undoes_the_child_and_its_parent() -> None:
    child_world, child = scene(SEQUENCE, kinds=dict.fromkeys(SEQUENCE, "probed"))
    world, parent = scene({"before": ()})
    strike_once(child, "b", "execute")
    coordinator = SagaCoordinator()

    with pytest.raises(KeyboardInterrupt):
        interrupted(coordinator.run(parent.with_stage("child", nested(child), dependencies=("before",)), saga_id="s"))

    assert child_world.log == ["+a", "-a"]
    assert world.log == ["+before", "-before"]
    assert run(coordinator.report("s")).status is SagaStatus.COMPENSATED


def test_another_saga_comes_to_rest_although_ctrl_c_has_struck_one() -> None:
    world, pipeline = scene(SEQUENCE, kinds=dict.fromkeys(SEQUENCE, "probed"))
    other_world, other = scene(SEQUENCE, {"b": Script(before=10), "a": Script(undo_takes=10)}, dict.fromkeys(SEQUENCE, "probed"))
    strike_once(pipeline, "b", "execute")
    coordinator = SagaCoordinator()

    async def both() -> None:
        await asyncio.gather(coordinator.run(pipeline, saga_id="s"), coordinator.run(other, saga_id="other"))

    with pytest.raises(KeyboardInterrupt):
        interrupted(both())

    assert world.standing == other_world.standing == {}
    assert run(coordinator.report("other")).status is SagaStatus.COMPENSATED


def test_sys_exit_in_a_probe_is_a_failure_like_any_other() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise")}, {"b": "probed"})
    struck = strike_once(pipeline, "b", "probe", lambda: sys.exit(3))

    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=2, wait=0)))).run(pipeline))

    assert struck == ["probe"]
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}


# -- strikes in our own code: the saga ends as if its process had been killed --------------------------------------


class StruckLedger(MemoryLedger):
    """Something strikes once while it appends; before or after the events are in it."""

    def __init__(self, strike: type[BaseException], at: int, *, when: str) -> None:
        super().__init__()
        self.strike, self.at, self.when = strike, at, when
        self.appends = 0

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        self.appends += 1
        if self.appends == self.at and self.when == "before":
            raise self.strike
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)
        if self.appends == self.at and self.when == "after":
            raise self.strike


def telling() -> tuple[World, Pipeline, FailFast]:
    """A saga that does everything once: it retries, drains, asks, undoes in parallel, repeats a compensation."""
    scripts = {
        "b": Script("raise", then=("ok",), before=1, undo_takes=2),
        "c": Script(before=1, undo_takes=2, undo_fails=1),
        "d": Script("hang", lands=True, probe_takes=1),
    }
    world, pipeline = scene(DIAMOND | {"e": ("a",)}, scripts | {"e": Script(before=9)}, dict.fromkeys((*DIAMOND, "e"), "probed"))
    return world, pipeline, FailFast(timeout=20, retry=Retry(attempts=2, wait=1, jitter=False, retry_on=("exception",)))


def resumed_elsewhere(ledger: MemoryLedger, world: World, pipeline: Pipeline) -> SagaReport:
    """What comes of the saga in another process: its ledger is read there, and what ran in this one runs no more."""
    world.running.clear()
    world.undoing.clear()

    async def resume() -> SagaReport:
        events = await ledger.read("s")
        copy = MemoryLedger()
        token = await copy.create("s", "gone", events[:1])
        await copy.append("s", events[1:], expected_version=1, token=token, release=True)
        return await SagaCoordinator(ledger=copy).resume("s", pipeline)

    return run(resume())


APPENDS = 27
"""How many there are in the telling saga."""


def at_peace(world: World, report: SagaReport) -> bool:
    """Whether the world and the report agree; an attempt of a compensation may have been cut short, and was repeated."""
    assert [refusal for refusal in world.refusals if not refusal.endswith("was interrupted")] == []
    return report.clean and set(report.kept) == set(world.standing)


@pytest.mark.parametrize("at", range(1, APPENDS + 1))
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("strike", [KeyboardInterrupt, SystemExit])
def test_whatever_append_is_struck_the_saga_does_not_hang_and_can_be_resumed(strike: type[BaseException], when: str, at: int) -> None:
    world, pipeline, policy = telling()
    ledger = StruckLedger(strike, at, when=when)
    coordinator = SagaCoordinator(policy, ledger=ledger)

    with pytest.raises(strike):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    assert coordinator._keeper.held.sagas == {}
    has_ended = at == APPENDS and when == "after"
    left = run(coordinator.report("s"))
    assert (left.ended_at is not None) is has_ended
    assert left.status in ({SagaStatus.COMPENSATED} if has_ended else {SagaStatus.RUNNING, SagaStatus.COMPENSATING})
    report = run(coordinator.resume("s", pipeline))
    assert at_peace(world, report)


def test_a_halted_saga_that_is_struck_as_it_has_asked_what_landed_has_not_ended() -> None:
    """The answer is in its ledger, and struck is a listener: the ledger would take the end."""
    world, pipeline = scene(BRANCHES, {"b": Script("hang", lands=True), "c": Script("hang")}, dict.fromkeys("bc", "probed"))
    struck: list[str] = []

    def strike(_: str, event: AnyEvent) -> None:
        if isinstance(event, StageProbed) and not struck:
            struck.append(event.stage)
            raise KeyboardInterrupt

    coordinator = SagaCoordinator(FailFast(timeout=5, on_failure="halt"), listeners=[strike])

    with pytest.raises(KeyboardInterrupt):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    assert struck == ["b"]
    assert run(coordinator.report("s")).status is SagaStatus.RUNNING
    report = run(coordinator.resume("s", pipeline))
    assert report.status is SagaStatus.HALTED
    assert set(report.kept) == set(world.standing) == {"a", "b"}


def test_a_saga_that_is_struck_as_its_first_stages_are_started_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    world, pipeline = scene(SEQUENCE)
    coordinator = SagaCoordinator()
    interrupt_next_call(monkeypatch, Schedule, "_inputs_of")

    with pytest.raises(KeyboardInterrupt):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    assert coordinator._keeper.held.sagas == {}
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPLETED
    assert world.log == ["+a", "+b", "+c"]


@pytest.mark.parametrize(("place", "name"), [(Crew, "disband"), (Turns, "call_off")])
def test_of_a_saga_that_is_struck_as_its_compensations_begin_nothing_is_recorded_past_what_is_not(
    place: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had yet to write was dropped, and a compensation that had begun was recorded: nobody could read the saga any more."""
    dependencies = {"a": (), "b": (), "c": ("a", "b")}
    world, pipeline = scene(dependencies, {"c": Script("raise")}, dict.fromkeys(dependencies, "probed"))
    strike_once(pipeline, "c", "execute", lambda: interrupt_next_call(monkeypatch, place, name))

    async def main() -> None:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            await SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s")

    async def resume() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            return await SagaCoordinator(ledger=ledger).resume("s", pipeline)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())

    assert at_peace(world, asyncio.run(resume()))


def test_that_many_appends_there_are_to_strike() -> None:
    _, pipeline, policy = telling()
    ledger = StruckLedger(KeyboardInterrupt, 0, when="never")

    run(SagaCoordinator(policy, ledger=ledger).run(pipeline))

    assert ledger.appends == APPENDS


def test_whoever_waits_for_a_saga_that_was_struck_itself_learns_how_it_was_left() -> None:
    _, pipeline, policy = telling()
    coordinator = SagaCoordinator(policy, ledger=StruckLedger(KeyboardInterrupt, 5, when="after"))
    told: list[str] = []

    async def call() -> None:
        with pytest.raises(LedgerError) as caught:
            await coordinator.run(pipeline, saga_id="s")
        told.append(str(caught.value))

    with pytest.raises(KeyboardInterrupt):
        interrupted(call())

    (message,) = told
    assert "the saga was cut short by a KeyboardInterrupt: it is left as if its process had been killed, resume it" in message
    assert "go on: await coordinator.resume('s', pipeline)" in message


def test_whoever_waits_for_a_saga_in_which_a_compensations_task_was_struck_learns_how_it_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    strike_once(pipeline, "b", "compensate", lambda: interrupt_next_call(monkeypatch, Crew, "dismiss"))
    told: list[str] = []

    async def call() -> None:
        with pytest.raises(LedgerError) as caught:
            await SagaCoordinator().run(pipeline, saga_id="s")
        told.append(str(caught.value))

    with pytest.raises(KeyboardInterrupt):
        interrupted(call())

    (message,) = told
    assert "the saga was cut short by a KeyboardInterrupt: it is left as if its process had been killed, resume it" in message
    assert world.undone() == ["b", "a"]


class StruckAround(Watching, NoOpEventSink):
    """Something strikes at one of the turns of what is around stage c."""

    def __init__(self, turn: str) -> None:
        self.turn, self.reached = turn, False

    def strike(self, turn: str, stage: str) -> None:
        if turn == self.turn and stage == "c":
            self.reached = True
            raise KeyboardInterrupt

    def context(self) -> PipelineContext:
        context = PipelineContext.create(event_sink=self)
        context.add_before_stage_start_hook(lambda name, *_: self.strike("hook", name))
        return context

    async def before(self, stage_name: str, ctx: PipelineContext) -> None:
        self.strike("before", stage_name)

    async def after(self, stage_name: str, _result: Any, _ctx: PipelineContext) -> None:
        self.strike("after", stage_name)

    async def on_error(self, stage_name: str, _error: Exception, _ctx: PipelineContext) -> ErrorAction:
        self.strike("on_error", stage_name)
        return ErrorAction.FAIL

    def try_emit(self, *, type: str, data: dict[str, Any] | None) -> None:  # noqa: A002 - as stageflow calls it
        self.strike("sink", type.split(".")[1])


@pytest.mark.parametrize(
    ("turn", "outcome"), [("hook", "ok"), ("before", "ok"), ("after", "ok"), ("after", "raise"), ("on_error", "raise"), ("sink", "skip")]
)
def test_wherever_it_strikes_around_a_stage_the_saga_does_not_hang_and_can_be_resumed(turn: str, outcome: str) -> None:
    around = StruckAround(turn)
    world, pipeline = scene(DIAMOND, {"b": Script(before=1), "c": Script(outcome), "d": Script("raise")}, dict.fromkeys(DIAMOND, "probed"))
    coordinator = SagaCoordinator(interceptors=[around])

    with pytest.raises(KeyboardInterrupt):
        interrupted(coordinator.run(pipeline, around.context(), saga_id="s"))

    assert around.reached
    assert coordinator._keeper.held.sagas == {}
    around.turn = ""
    assert at_peace(world, run(coordinator.resume("s", pipeline)))


def test_a_strike_as_what_is_around_one_stage_ends_keeps_nobody_waiting_for_what_is_around_another(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lingering(Watching):
        async def before(self, stage_name: str, ctx: PipelineContext) -> None:
            if stage_name == "b":
                try:
                    await asyncio.Event().wait()
                finally:
                    await elapse(1.0)

        async def after(self, stage_name: str, _result: Any, _ctx: PipelineContext) -> None:
            interrupt_next_call(monkeypatch, Around, "_leaves")

    world, pipeline = scene({"a": (), "b": ()})
    coordinator = SagaCoordinator(interceptors=[Lingering()])

    with pytest.raises(KeyboardInterrupt):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    assert coordinator._keeper.held.sagas == {}
    assert world.log == ["+a"]
    assert at_peace(world, run(coordinator.resume("s", pipeline)))


class Strike:
    """Raises KeyboardInterrupt in the n-th line of our code that is executed; the main task was cancelled before if so wished."""

    OURS = str(Path(saga.__file__).parent)

    def __init__(self, line: int) -> None:
        self.line = line
        self.lines = 0

    def at_call(self, frame: FrameType, *_: Any) -> Any:
        return self.at_line if frame.f_code.co_filename.startswith(self.OURS) else None

    def at_line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not _leaves_with(frame):
            self.lines += 1
            if self.lines == self.line:
                raise KeyboardInterrupt
        return self.at_line


def _leaves_with(frame: FrameType) -> bool:
    """Whether a `with` block is just left, which for a trace function is a line; between its body and `__exit__` Python heeds no signal."""
    following = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 6 : 2]
    return following == bytes([dis.opmap["LOAD_CONST"]] * 3)  # three times None


def struck(line: int, cancelled_at: float | None, *, is_watched: bool) -> int:
    """Strike one saga in that line, look at what is left of it, and resume it; how many lines were executed."""
    world, pipeline, policy = telling()
    ledger = MemoryLedger()
    coordinator = SagaCoordinator(policy, ledger=ledger, interceptors=[Watching()] if is_watched else ())
    strike = Strike(line)
    tracing = sys.gettrace()

    async def main() -> None:
        if cancelled_at is not None:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_later(cancelled_at, task.cancel)
        sys.settrace(strike.at_call)
        await coordinator.run(pipeline, hooked() if is_watched else None, saga_id="s")

    try:
        interrupted(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    finally:
        sys.settrace(tracing)
    assert repr(_TURN).startswith("<unlocked")  # or another thread would wait for ever
    if run(ledger.read("s")):
        report = resumed_elsewhere(ledger, world, pipeline)
        assert report.ended_at is not None
        assert at_peace(world, report)
    return strike.lines


@pytest.fixture
def _swept() -> Iterator[None]:
    """Python complains of what a strike leaves behind, coroutines that nobody came to await, unless it goes before the test ends."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    # A record of the log holds a traceback, and that the coroutines.
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.collect()
    sys.unraisablehook = before


@pytest.mark.usefixtures("_swept")
@pytest.mark.parametrize(("cancelled_at", "is_watched"), [(None, False), (1.5, False), (23, False), (23, True)])
def test_in_whatever_line_of_our_code_it_strikes_the_saga_does_not_hang_and_can_be_resumed(
    cancelled_at: float | None, is_watched: bool
) -> None:
    lines = struck(0, cancelled_at, is_watched=is_watched)

    # All of them would take a minute or two; a prime reaches others in each loop.
    for line in range(1, lines, 101):
        struck(line, cancelled_at, is_watched=is_watched)

    assert lines > 3000


@pytest.mark.usefixtures("_swept")
def test_a_saga_that_is_struck_where_it_has_not_begun_is_held_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heart beat for it for ever, on a ledger with leases, and asyncio.run waited for that."""
    _, pipeline, policy = telling()
    coordinator = SagaCoordinator(policy)
    interrupt_next_call(monkeypatch, SagaKeeper, "_closing")

    with pytest.raises(KeyboardInterrupt):
        interrupted(coordinator.run(pipeline, saga_id="s"))

    assert coordinator._keeper.held.sagas == {}


def test_whoever_waits_for_a_saga_that_is_struck_where_it_says_that_it_has_ended_goes_on_in_a_loop_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody cancels what waits in a loop that is simply run again, as asyncio.run does."""
    _, pipeline, policy = telling()
    coordinator = SagaCoordinator(policy)
    interrupt_next_call(monkeypatch, keeper, "end")

    with closing(ControlledLoop()) as loop:
        waits = loop.create_task(coordinator.run(pipeline, saga_id="s"))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(waits)
        with pytest.raises(LedgerError, match="cut short by a KeyboardInterrupt"):
            loop.run_until_complete(waits)

    assert coordinator._keeper.held.sagas == {}


# -- what a struck process leaves to the next one ------------------------------------------------------------------


def test_a_stage_that_died_running_is_called_off_when_the_resumed_saga_stops_before_its_turn() -> None:
    """Found by striking every line: the saga could not turn back over a stage that seemed to be running still."""
    chain = {"a": (), "b": ("a",), "c": ("b",), "d": ("c",), "e": ("d",), "beside": ()}
    scripts = {"e": Script(before=5), "beside": Script("raise", before=1)}
    world, pipeline = scene(chain, scripts, dict.fromkeys(chain, "probed") | {"beside": "fallback"})
    fallback = strike_once(pipeline, "beside", "fallback", fail)
    ledger = StruckLedger(KeyboardInterrupt, 11, when="after")

    with pytest.raises(KeyboardInterrupt):
        interrupted(SagaCoordinator(ContinueWithFallback(), ledger=ledger).run(pipeline, saga_id="s"))
    assert fallback == []
    left = run(SagaCoordinator(ledger=ledger).report("s"))
    assert (left.stages["e"].state, left.stages["beside"].state) == (StageState.RUNNING, StageState.FAILED)
    report = resumed_elsewhere(ledger, world, pipeline)

    assert fallback == ["fallback"]
    assert report.status is SagaStatus.COMPENSATED
    assert world.standing == {}
