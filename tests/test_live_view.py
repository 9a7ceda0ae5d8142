"""What is shown of a saga while it runs: the tree, the rows, the bar, the lines, and what Ctrl-C says."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import signal
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console
from stageflow.api import StageOutput

from saga import ContinueWithFallback, FailFast, MemoryLedger, Policy, SagaCoordinator, SagaReport
from saga.cli.conduct import Conducted, Notice, conduct
from saga.cli.family import Family
from saga.cli.interrupt import interruptible
from saga.cli.lines import tell
from saga.cli.picture import outline, picture
from saga.cli.view import view
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
    SagaStatus,
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
)
from saga.failures import Failure, FailureKind
from saga.graph import Graph, Node, Role
from tests.world import BRANCHES, DIAMOND, SEQUENCE, Script, scene

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def graph(shape: Mapping[str, tuple[str, ...]], role: Role = Role.COMPENSABLE) -> Graph:
    return Graph.of(Node(name=name, role=role, dependencies=dependencies) for name, dependencies in shape.items())


def at(second: float) -> Any:
    return NOON + timedelta(seconds=second)


def failure(stage: str | None = None, kind: FailureKind = FailureKind.REPORTED, message: str = "declined") -> Failure:
    return Failure.of(stage, kind, message)


def unanswered(attempt: int) -> Failure:
    return Failure.raised("a", OSError("busy"), attempt=attempt, kind=FailureKind.COMPENSATION, of_probe=True)


def family_of(
    shape: Mapping[str, tuple[str, ...]], *events: AnyEvent, policy: Policy | None = None, role: Role = Role.COMPENSABLE
) -> Family:
    family = Family("s")
    family.hear("s", SagaStarted(at=at(0), saga_id="s", pipeline="trip", graph=graph(shape, role), policy=policy or FailFast()))
    for event in events:
        family.hear("s", event)
    return family


def completed(stage: str, second: float = 0) -> tuple[AnyEvent, AnyEvent]:
    output = StageOutput.ok()
    return StageStarted(at=at(second), stage=stage, attempt=1), StageCompleted(at=at(second + 0.5), stage=stage, output=output)


def failed(stage: str, second: float = 0, **more: Any) -> tuple[AnyEvent, AnyEvent]:
    return StageStarted(at=at(second), stage=stage, attempt=1), StageFailed(
        at=at(second + 0.5), stage=stage, failure=failure(stage), **more
    )


def turned() -> SagaTurnedBack:
    return SagaTurnedBack(reason=TurnReason.FAILURE)


def shown(family: Family, second: float = 10, *, width: int = 100, height: int = 40, focus: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as captured:
        console.print(picture(family, at(second), width, height, focus))
    return [line.rstrip() for line in captured.get().splitlines()]


# -- the tree ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (SEQUENCE, ["a", "b", "c"]),
        (BRANCHES, ["a", "├ b", "└ c"]),
        (DIAMOND, ["a", "├ b", "└ c", "d"]),
        ({"a": (), "b": (), "c": ("a", "b")}, ["├ a", "└ b", "c"]),
        (
            {"a": (), "b": ("a",), "c": ("a",), "b1": ("b",), "c1": ("c",), "c2": ("c",), "d": ("b1", "c1", "c2"), "e": ("d",)},
            ["a", "├ b", "│ b1", "└ c", "  ├ c1", "  └ c2", "d", "e"],
        ),
        ({"a": (), "b": ("a",), "c": ("a", "b")}, ["a", "b", "c"]),
    ],
)
def test_the_tree_forks_where_stages_branch_and_closes_where_they_join(shape: Mapping[str, tuple[str, ...]], rows: list[str]) -> None:
    assert [guide + name for guide, name in outline(graph(shape))] == rows


def test_the_tree_of_a_thousand_stages_in_a_row_is_flat() -> None:
    chain = {f"s{number}": (f"s{number - 1}",) if number else () for number in range(1000)}

    assert {guide for guide, _ in outline(graph(chain))} == {""}


# -- the rows ----------------------------------------------------------------------------------------------------


def test_a_picture_shows_state_attempt_and_time_of_every_stage() -> None:
    retried = StageFailed(stage="b", failure=failure("b"), will_retry=True)
    events = (*completed("a"), StageStarted(at=at(1), stage="b", attempt=1), retried, StageStarted(at=at(2), stage="b", attempt=2))
    family = family_of(SEQUENCE, *events)

    assert shown(family, 3.25) == [
        "trip  s  running  3.2 s",
        "a  + kept          attempt 1  500.0 ms",
        "b  > running       attempt 2     2.2 s  reported a failure: declined",
        "c  · not run                            after b",
        "━━━━━━━━━━━━━                             1 of 3 done",
    ]


def test_a_picture_of_the_way_back_shows_what_is_still_to_be_undone() -> None:
    back = (CompensationStarted(at=at(4), stage="b", attempt=1),)
    again = CompensationFailed(stage="b", failure=failure("b", FailureKind.COMPENSATION, "busy"), will_retry=True)
    family = family_of(SEQUENCE, *completed("a"), *completed("b", 1), *failed("c", 2), turned(), *back, again)

    first = shown(family, 5)
    family.hear("s", CompensationStarted(at=at(6), stage="b", attempt=2))
    family.hear("s", CompensationCompleted(at=at(7), stage="b"))
    second = shown(family, 8)

    assert first[0] == "trip  s  compensating  5.0 s"
    assert first[1] == "a  + to undo       attempt 1  500.0 ms"
    assert first[2] == "b  < compensating  attempt 1     1.0 s  could not be compensated: busy"
    assert first[3] == "c  x failed        attempt 1  500.0 ms  reported a failure: declined"
    assert first[4].endswith("0 of 2 undone")
    assert second[2] == "b  < undone        attempt 2    3.00 s  could not be compensated: busy"
    assert second[4].endswith("1 of 2 undone")


def test_the_bar_runs_forward_and_then_back() -> None:
    def filled(family: Family) -> int:
        return shown(family)[-1].count("━")

    forward = family_of(SEQUENCE, *completed("a"), *completed("b"))
    back = family_of(SEQUENCE, *completed("a"), *completed("b"), *failed("c"), turned())
    nearly = family_of(SEQUENCE, *completed("a"), *completed("b"), *failed("c"), turned())
    for event in (CompensationStarted(stage="b", attempt=1), CompensationCompleted(stage="b")):
        nearly.hear("s", event)

    assert (filled(forward), filled(back), filled(nearly)) == (26, 40, 20)


def test_the_bar_stays_at_what_was_undone_when_the_saga_has_come_to_rest() -> None:
    def last(*events: AnyEvent) -> list[str]:
        family, shown_last = family_of(SEQUENCE, *completed("a"), *completed("b"), *failed("c"), turned()), []
        for event in events:
            family.hear("s", event)
            shown_last.append(shown(family)[-1].split("  ")[-1].strip())
        return shown_last

    undone = [event for stage in "ba" for event in (CompensationStarted(stage=stage, attempt=1), CompensationCompleted(stage=stage))]
    stuck = CompensationFailed(stage="b", failure=failure("b", FailureKind.COMPENSATION, "no line"))

    assert last(*undone, SagaEnded(status=SagaStatus.COMPENSATED))[1:] == [
        "1 of 2 undone",
        "1 of 2 undone",
        "2 of 2 undone",
        "2 of 2 undone",
    ]
    assert last(undone[0], stuck, SagaEnded(status=SagaStatus.STUCK)) == ["0 of 2 undone"] * 3


def test_a_stage_that_is_held_back_stuck_skipped_or_its_fallback_says_why() -> None:
    stuck = CompensationFailed(at=at(5), stage="b", failure=failure("b", FailureKind.COMPENSATION, "no line"))
    tried = (turned(), CompensationStarted(at=at(4), stage="b", attempt=1), stuck, SagaEnded(at=at(6), status=SagaStatus.STUCK))
    held = family_of(SEQUENCE, *completed("a"), *completed("b"), *failed("c"), *tried)
    skipped = family_of(SEQUENCE, StageSkipped(stage="a", reason="nothing to do", output=StageOutput.skip("nothing to do")))
    fallback = family_of(
        SEQUENCE, *failed("a"), FallbackUsed(at=at(0.5), stage="a", output=StageOutput.ok(), source="stage"), policy=ContinueWithFallback()
    )

    assert shown(held)[0] == "trip  s  stuck  6.00 s"
    assert shown(held)[1] == "a  = blocked       attempt 1  500.0 ms"
    assert shown(held)[2] == "b  ! stuck         attempt 1    1.00 s  could not be compensated: no line"
    assert shown(skipped)[1] == "a  - skipped           nothing to do"
    assert shown(fallback)[1] == "a  ~ fallback      attempt 1  500.0 ms  reported a failure: declined"


def test_what_is_stuck_on_the_way_back_is_no_longer_to_undo_but_what_it_depends_on_is() -> None:
    stuck = CompensationFailed(stage="b", failure=failure("b", FailureKind.COMPENSATION, "no line"))
    family = family_of(SEQUENCE, *completed("a"), *completed("b"), *failed("c"), turned(), CompensationStarted(stage="b", attempt=1), stuck)

    lines = shown(family)

    assert lines[1].startswith("a  + to undo  ")
    assert lines[2].startswith("b  ! stuck  ")


def test_in_a_narrow_terminal_stages_keep_their_names() -> None:
    family = family_of({"reserve_seat": (), "reserve_room": ()}, *completed("reserve_seat"))

    assert shown(family, width=45)[1:3] == ["├ reserve_seat  + kept            500.0 ms", "└ reserve_room  · not run"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_long_message_and_a_long_name_are_cut_and_take_nothing_from_what_stands_beside_them(width: int) -> None:
    long = "reserve_" + "the_very_best_" * 5 + "seat"
    failed_at_length = StageFailed(at=at(1), stage="pay", failure=failure("pay", message="declined, " * 60))
    family = family_of({"pay": (), long: ()}, StageStarted(at=at(0), stage="pay", attempt=1), failed_at_length, *completed(long))

    _, pay, seat, _ = shown(family, width=width)

    note = [] if width < 80 else ["reported"]
    assert pay.split()[:8] == ["├", "pay", "x", "failed", "attempt", "1", "1.00", "s"]
    assert pay.split()[8:9] == note
    assert seat.startswith("└ reserve_the_")
    assert seat.split()[2:] == ["+", "kept", "attempt", "1", "500.0", "ms"]
    assert max(len(pay), len(seat)) <= width


def test_a_failure_that_a_later_attempt_has_mended_is_told_as_one() -> None:
    again = (StageStarted(at=at(1), stage="a", attempt=2), StageCompleted(at=at(2), stage="a", output=StageOutput.ok()))
    family = family_of(SEQUENCE, *failed("a", will_retry=True), *again)

    assert shown(family)[1] == "a  + kept          attempt 2  2.00 s  at first it reported a failure: declined"


def test_a_nested_saga_stands_below_the_stage_that_runs_it() -> None:
    family = family_of(BRANCHES, *completed("a"), StageStarted(at=at(1), stage="b", attempt=1))
    for number in (1, 2):
        child = f"s/b#{number}"
        started = SagaStarted(
            at=at(1), saga_id=child, pipeline="hotel", graph=graph(BRANCHES), policy=FailFast(), parent="s", parent_stage="b"
        )
        family.hear(child, started)
    family.hear("s/b#1", SagaEnded(status=SagaStatus.COMPENSATED))
    family.hear("s/b#2", StageStarted(at=at(2), stage="a", attempt=1))
    family.hear("other", SagaStarted(saga_id="other", pipeline="hotel", graph=graph(BRANCHES), policy=FailFast()))
    family.hear("other", StageStarted(stage="a", attempt=1))

    assert [line[:12].rstrip() for line in shown(family, 3)[1:-1]] == [
        "a        + k",
        "├ b      > r",
        "│   a    > r",
        "│   ├ b  · n",
        "│   └ c  · n",
        "└ c      · n",
    ]
    assert [*family.sagas] == ["s", "s/b#1", "s/b#2"]


def test_too_few_rows_show_those_around_what_happened_last() -> None:
    chain = {f"s{number}": (f"s{number - 1}",) if number else () for number in range(30)}
    family = family_of(chain, *(event for number in range(12) for event in completed(f"s{number}")))

    middle = shown(family, height=16, focus="s/s11")
    top = shown(family, height=16)

    assert len(middle) <= 16 - 2
    assert middle[1] == "… 7 above: 7 kept"
    assert [line.split()[0] for line in middle[2:10]] == [f"s{number}" for number in range(7, 15)]
    assert middle[10] == "… 15 below: 15 not run"
    assert top[1].startswith("s0")
    assert top[-2] == "… 22 below: 4 kept, 18 not run"


def test_as_many_rows_as_there_is_room_for_are_all_shown() -> None:
    chain = {f"s{number}": (f"s{number - 1}",) if number else () for number in range(10)}

    lines = shown(family_of(chain), height=16)

    assert [line.split()[0] for line in lines[1:-1]] == [*chain]


def test_a_narrow_picture_leaves_the_notes_out_and_stays_within_its_width() -> None:
    lines = shown(family_of(SEQUENCE, *failed("a")), width=60)

    assert lines[1] == "a  x failed        attempt 1  500.0 ms"
    assert max(map(len, lines)) <= 60


def test_before_anything_has_happened_there_is_nothing_to_show() -> None:
    assert shown(Family("s")) == [""]


# -- the lines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (SagaResumed(forward=True, by="ann"), "goes on forward, resumed by ann"),
        (SagaResumed(forward=False, by="ann"), "goes on backward, resumed by ann"),
        (SagaStopped(cause=failure()), "stopped: the saga reported a failure: declined"),
        (SagaTurnedBack(reason=TurnReason.REQUEST), "turned back: it is undone on request"),
        (SagaTurnedBack(reason=TurnReason.ORPHANS), "turned back: some of what was done serves nothing that is kept"),
        (SagaTurnedBack(reason=TurnReason.FAILURE, cause=failure("b")), "turned back: stage 'b' reported a failure: declined"),
        (SagaEnded(status=SagaStatus.STUCK), "STUCK"),
        (StageStarted(stage="a", attempt=1), "a: started"),
        (StageStarted(stage="a", attempt=2), "a: started, attempt 2"),
        (EffectRecorded(stage="a", effect=1), ""),
        (StageCompleted(stage="a", output=StageOutput.ok()), "a: completed"),
        (StageCompleted(stage="a", output=StageOutput.ok(), late=True), "a: completed late"),
        (StageFailed(stage="a", failure=failure("a")), "a: reported a failure: declined"),
        (StageFailed(stage="a", failure=failure("a"), in_doubt=True), "a: reported a failure: declined; in doubt"),
        (StageFailed(stage="a", failure=failure("a"), will_retry=True), "a: reported a failure: declined; it is tried again"),
        (
            StageFailed(stage="a", failure=failure("a", FailureKind.TIMEOUT, "no answer"), in_doubt=True, will_retry=True),
            "a: ran out of time: no answer; in doubt; it is asked or tried again",
        ),
        (
            StageFailed(stage="a", failure=failure("a", FailureKind.CRASHED, "its process is gone"), in_doubt=True, will_retry=True),
            "a: lost its process: its process is gone; in doubt",
        ),
        (StageSkipped(stage="a", reason="no need", output=StageOutput.ok()), "a: skipped, no need"),
        (FallbackUsed(stage="a", output=StageOutput.ok(), source="policy"), "a: its fallback stands in"),
        (FallbackFailed(stage="a", failure=failure("a")), "a: its fallback failed: reported a failure: declined"),
        (StageProbed(stage="a", landed=True, output=StageOutput.ok()), "a: asked, it has landed"),
        (StageProbed(stage="a", landed=False), "a: asked, it has not landed"),
        (
            StageProbed(stage="a", landed=None, failure=unanswered(1), will_retry=True),
            "a: asked, no answer: OSError: busy; it is tried again",
        ),
        (
            StageProbed(stage="a", landed=None, failure=unanswered(2)),
            "a: asked, no answer at attempt 2: OSError: busy",
        ),
        (StageProbed(stage="a", landed=None, failure=failure("a", FailureKind.LATE, "look"), held=True), "a: is in question: look"),
        (
            StageProbed(
                stage="a", landed=None, failure=failure("a", FailureKind.COMPENSATION, "something came late: its saga s/a is stuck")
            ),
            "a: could not be compensated: something came late: its saga s/a is stuck",
        ),
        (StageSettled(stage="a", verdict=Verdict.KEPT, note="in the books", by="ann"), "a: settled as kept by ann: in the books"),
        (CompensationStarted(stage="a", attempt=3), "a: being undone, attempt 3"),
        (CompensationCompleted(stage="a"), "a: undone"),
        (CompensationCompleted(stage="a", late=True), "a: undone late"),
        (
            CompensationFailed(stage="a", failure=failure("a", FailureKind.COMPENSATION, "busy"), will_retry=True),
            "a: could not be compensated: busy; it is asked or tried again",
        ),
    ],
)
def test_an_event_is_told_in_a_line(event: AnyEvent, line: str) -> None:
    assert tell(event) == line


RUDE = "\x1b[2J\x1b]0;owned\x07 line\nNothing is left to do."
"""What a stage may say that would clear a terminal, name its window and forge a line."""
TAMED = r"\u001b[2J\u001b]0;owned\u0007 line Nothing is left to do."


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (SagaStopped(cause=failure(message=RUDE)), f"stopped: the saga reported a failure: {TAMED}"),
        (StageFailed(stage="a\x1b[31m", failure=failure("a\x1b[31m", message=RUDE)), rf"a\u001b[31m: reported a failure: {TAMED}"),
        (StageSkipped(stage="a", reason=RUDE, output=StageOutput.ok()), f"a: skipped, {TAMED}"),
        (StageSettled(stage="a", verdict=Verdict.KEPT, note=RUDE, by="ann"), f"a: settled as kept by ann: {TAMED}"),
    ],
)
def test_what_stages_and_people_say_moves_no_cursor_and_breaks_no_line(event: AnyEvent, line: str) -> None:
    assert tell(event) == line


def test_a_picture_shows_rude_words_and_names_on_the_line_of_their_stage() -> None:
    skipped = StageSkipped(stage="b\n", reason=RUDE, output=StageOutput.ok())
    family = family_of({"a\x1b[31m": (), "b\n": ("a\x1b[31m",)}, *completed("a\x1b[31m"), skipped)

    lines = shown(family, width=140)

    assert [line.split()[0] for line in lines[1:3]] == [r"a\u001b[31m", "b"]
    assert lines[2].endswith(TAMED)
    assert len(lines) == 4


def on_paper() -> Console:
    return Console(file=io.StringIO(), width=40, force_terminal=False)


def in_colour() -> Console:
    return Console(file=io.StringIO(), width=200, height=30, force_terminal=True, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_long_line_is_not_broken_where_there_is_no_terminal() -> None:
    console = on_paper()

    async def look_on() -> None:
        async with view(Family("s"), console) as hear:
            hear("s", StageSkipped(stage="a", reason="word " * 20, output=StageOutput.ok()))
            hear("s", EffectRecorded(stage="a", effect=1))

    asyncio.run(look_on())

    assert written(console).count("\n") == 1


def test_a_terminal_is_drawn_upon_and_left_as_it_was() -> None:
    console = in_colour()
    family = family_of(SEQUENCE)

    async def look_on() -> None:
        async with view(family, console) as hear:
            for event in completed("a"):
                hear("s", event)
            while "1 of 3 done" not in written(console):
                await asyncio.sleep(0)

    asyncio.run(look_on())

    assert "\x1b[?25l" in written(console)
    after = written(console).rpartition("1 of 3 done")[2]
    assert "\x1b[?25h" in after, "the cursor is back"
    assert after.count("\x1b[1A\x1b[2K") == 5, "the picture is gone"


# -- interruptions -----------------------------------------------------------------------------------------------


def test_the_first_signal_cancels_and_the_second_one_leaves(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    left: list[int] = []

    async def endless() -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        task = asyncio.create_task(endless())
        with interruptible(task, lambda: said.append("first"), lambda: "second\n", lambda: None, left.append):
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(asyncio.CancelledError):
                await task
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    asyncio.run(work())

    assert said == ["first"]
    assert capfd.readouterr().err == "second\n"
    assert left == [130]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_that_is_closed_counts_as_a_first_signal_and_never_as_a_second_one() -> None:
    """The shell that ran in it says so, too, and whoever has pressed Ctrl-C may close the window while all is being undone."""
    said: list[str] = []
    left: list[int] = []

    async def work() -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        with interruptible(task, lambda: said.append("first"), lambda: "second\n", lambda: said.append("gone"), left.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(work())

    assert said == ["gone", "gone", "first"]
    assert left == []


def test_a_session_that_ends_sends_no_second_signal() -> None:
    """systemd ends one with a SIGTERM and a SIGHUP at once, of which Python hears the SIGHUP first: nothing was undone."""
    left: list[int] = []

    async def work() -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        with interruptible(task, lambda: None, lambda: "second\n", lambda: None, left.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            before = [*left]
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(asyncio.CancelledError):
                await task
        assert before == []

    asyncio.run(work())

    assert left == [130]


def test_a_process_that_is_to_outlive_its_terminal_goes_on_when_that_is_closed() -> None:
    async def work() -> None:
        task = asyncio.create_task(asyncio.sleep(0))
        with interruptible(task, lambda: None, lambda: "second\n", lambda: None):
            os.kill(os.getpid(), signal.SIGHUP)
            await task

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        asyncio.run(work())
        left = signal.getsignal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)

    assert left is signal.SIG_IGN


def test_what_can_not_be_said_keeps_nobody_from_leaving() -> None:
    left: list[int] = []

    def speechless() -> str:
        raise RuntimeError("no words")

    async def work() -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        with interruptible(task, lambda: None, speechless, lambda: None, left.append):
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(RuntimeError, match="no words"):
                signal.raise_signal(signal.SIGINT)

    asyncio.run(work())

    assert left == [130]


def test_what_can_not_be_said_keeps_nobody_from_turning_back(caplog: pytest.LogCaptureFixture) -> None:
    """As where stderr is a file on a disk that is full."""

    def speechless() -> None:
        raise OSError(errno.ENOSPC, "no space left")

    async def work() -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        with interruptible(task, speechless, lambda: "second\n", lambda: None):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait({task}, timeout=60)
            assert task.cancelled()

    asyncio.run(work())

    assert "no space left" in caplog.text


async def interrupted(shape: Mapping[str, tuple[str, ...]], console: Console, policy: FailFast, **scripts: Script) -> Conducted:
    """Run a saga that presses Ctrl-C itself when its stage b has started."""
    gate = asyncio.Event()
    _, pipeline = scene(shape, {"b": Script(gate=gate)} | scripts)
    ledger = MemoryLedger()

    async def work(coordinator: SagaCoordinator) -> SagaReport:
        def press(_: str, event: AnyEvent) -> None:
            if isinstance(event, StageStarted) and event.stage == "b":
                os.kill(os.getpid(), signal.SIGINT)
                asyncio.get_running_loop().call_soon(gate.set)

        watched = SagaCoordinator(policy, ledger=ledger, listeners=[*coordinator._listeners, press])
        return await watched.run(pipeline, saga_id="s")

    return await conduct(ledger, "s", work, console=console, goes_on="saga resume s", policy=policy)


def test_ctrl_c_says_what_it_waits_for_and_that_memory_forgets() -> None:
    console = on_paper()

    outcome = asyncio.run(interrupted(SEQUENCE, console, FailFast()))

    assert outcome.interrupted
    assert outcome.report is not None
    assert outcome.report.status is SagaStatus.COMPENSATED
    assert "Interrupted: waiting for b, then undoing what was done.\n" in written(console)
    assert (
        "A second Ctrl-C stops at once and leaves in effect: a; in doubt: b.\nThe ledger is in memory: nothing knows of that then.\n"
        in written(console)
    )


def test_ctrl_c_names_a_stage_with_a_rude_name_on_one_line() -> None:
    console = on_paper()
    notice = Notice(family_of({"a\n\x1b[2J": ()}, *completed("a\n\x1b[2J")), console, goes_on=None)

    notice.first()

    said = r"A second Ctrl-C stops at once and leaves in effect: a \u001b[2J."
    assert said in written(console).splitlines()
    assert said.replace("A second Ctrl-C stops at once and leaves", "Stopped at once and left") in notice.second().splitlines()


def test_ctrl_c_says_that_a_policy_keeps_what_was_done() -> None:
    console = on_paper()

    outcome = asyncio.run(interrupted(SEQUENCE, console, FailFast(on_interrupt="halt")))

    assert outcome.report is not None
    assert outcome.report.status is SagaStatus.HALTED
    assert "Interrupted: waiting for b, then keeping what was done, as its policy says.\n" in written(console)


def test_ctrl_c_before_the_saga_has_begun_leaves_nothing() -> None:
    console = on_paper()

    async def work(_: SagaCoordinator) -> SagaReport:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
        raise AssertionError

    outcome = asyncio.run(conduct(MemoryLedger(), "s", work, console=console, goes_on="saga resume s"))

    assert outcome == Conducted(None, interrupted=True)
    assert written(console) == ("Interrupted: nothing has been done yet.\nA second Ctrl-C stops at once and leaves nothing in effect.\n")


def test_ctrl_c_on_the_way_back_leaves_compensations_alone_and_says_how_to_go_on() -> None:
    console = on_paper()
    family = family_of(SEQUENCE, *completed("a"), *completed("b"), *failed("c"), turned(), CompensationStarted(stage="b", attempt=1))

    Notice(family, console, "saga resume s").first()

    assert written(console).splitlines() == [
        "Interrupted: it is being undone already, and that goes on.",
        "A second Ctrl-C stops at once and leaves in effect: a; in doubt: b.",
        "What goes on from there: saga resume s",
    ]


def test_a_second_ctrl_c_gives_the_cursor_back_and_names_the_stages_of_nested_sagas() -> None:
    family = family_of(SEQUENCE, StageStarted(stage="a", attempt=1))
    started = SagaStarted(saga_id="s/a", pipeline="hotel", graph=graph(SEQUENCE), policy=FailFast(), parent="s", parent_stage="a")
    for event in (started, *completed("a")):
        family.hear("s/a", event)

    assert Notice(family, in_colour(), None).second() == (
        "\x1b[?25h\nStopped at once and left in effect: a/a; in doubt: a.\nThe ledger is in memory: nothing knows of that then.\n"
    )


def test_neither_what_was_undone_nor_a_stage_without_a_compensation_is_left_in_effect() -> None:
    undone = (turned(), CompensationStarted(stage="a", attempt=1), CompensationCompleted(stage="a"))
    family = family_of(SEQUENCE, *completed("a"), *failed("b"), *undone)
    plain = family_of(SEQUENCE, *completed("a"), role=Role.PLAIN)

    assert Notice(family, on_paper(), None).second() == "Stopped at once and left nothing in effect.\n"
    assert Notice(plain, on_paper(), None).second() == "Stopped at once and left nothing in effect.\n"


def test_what_is_in_doubt_is_left_so_also_when_nothing_of_it_runs_any_more() -> None:
    family = family_of(SEQUENCE, *failed("a", in_doubt=True))

    assert Notice(family, in_colour(), "saga resume s").second().splitlines()[1:] == [
        "Stopped at once and left in doubt: a.",
        "What goes on from there: saga resume s",
    ]


def test_a_family_is_read_from_the_ledger_once_and_then_only_what_is_new() -> None:
    ledger = MemoryLedger()

    async def story() -> tuple[list[AnyEvent], list[AnyEvent]]:
        started, *rest = family_events()
        token = await ledger.create("s", "somebody", [started])
        family = await Family.read(ledger, "s")
        await ledger.append("s", rest, expected_version=1, token=token)
        news = [event async for _, event in family.news(ledger)]
        for event in news:
            family.hear("s", event)
        return news, [event async for _, event in family.news(ledger)]

    assert asyncio.run(story()) == (list(completed("a")), [])


def test_all_sagas_of_a_stage_are_shown_in_their_order_also_from_the_ledger_but_for_those_that_it_has_put_behind_it() -> None:
    ledger = MemoryLedger()

    async def story() -> Family:
        await ledger.create("s", "somebody", family_events())
        for child, begun in {"r": [], "s": [SagaEnded(status=SagaStatus.COMPENSATED)], "t": [], "u": []}.items():
            within = SagaStarted(
                saga_id=f"s/{child}", pipeline="room", graph=graph({child: ()}), policy=FailFast(), parent="s", parent_stage="a"
            )
            await ledger.create(f"s/{child}", "somebody", [within, *begun])
        return await Family.read(ledger, "s")

    family = asyncio.run(story())

    assert [line.split()[0] for line in shown(family)[1:6]] == ["a", "r", "t", "u", "b"]
    family.hear("s/u", SagaEnded(status=SagaStatus.COMPENSATED))
    assert [line.split()[0] for line in shown(family)[1:6]] == ["a", "r", "t", "u", "b"]


def family_events() -> list[AnyEvent]:
    return [SagaStarted(at=at(0), saga_id="s", pipeline="trip", graph=graph(SEQUENCE), policy=FailFast()), *completed("a")]


@pytest.mark.parametrize("leaves_it", [False, True])
def test_what_was_given_up_and_takes_its_time_is_waited_for_unless_somebody_presses_ctrl_c(*, leaves_it: bool) -> None:
    console = on_paper()
    _, pipeline = scene({"a": ()})
    ended: list[str] = []

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        while "Waiting for what was given up" not in written(console):
            await asyncio.sleep(0)
        if leaves_it:
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        ended.append("stubborn")

    async def main() -> Conducted:
        left: list[asyncio.Task[None]] = []

        async def work(coordinator: SagaCoordinator) -> SagaReport:
            left.append(asyncio.create_task(stubborn()))
            return await coordinator.run(pipeline, saga_id="s")

        outcome = await conduct(MemoryLedger(), "s", work, console=console, goes_on="")
        ended.append("conduct")
        return outcome

    outcome = asyncio.run(main())

    assert outcome.report is not None
    assert outcome.report.status is SagaStatus.COMPLETED
    assert ended == (["conduct", "stubborn"] if leaves_it else ["stubborn", "conduct"])
    assert "Waiting for what was given up and still runs; Ctrl-C leaves it.\n" in written(console)


def test_the_picture_goes_on_while_what_was_given_up_is_waited_for() -> None:
    """It stood still: of a saga within that was still being undone nothing more was seen."""
    console = in_colour()
    _, pipeline = scene({"a": ()})

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        while "Waiting for what was given up" not in written(console):
            await asyncio.sleep(0)
        shown = len(written(console))
        async with asyncio.timeout(60):
            while len(written(console)) == shown:
                await asyncio.sleep(0)

    async def main() -> bool:
        left: list[asyncio.Task[None]] = []

        async def work(coordinator: SagaCoordinator) -> SagaReport:
            left.append(asyncio.create_task(stubborn()))
            return await coordinator.run(pipeline, saga_id="s")

        await conduct(MemoryLedger(), "s", work, console=console, goes_on="")
        return left[0].exception() is None

    assert asyncio.run(main())
