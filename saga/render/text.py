"""The report as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import dropwhile, pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from saga.events import SagaStatus, Verdict
from saga.failures import Failure, FailureKind
from saga.keys import is_within
from saga.ledger import StageState
from saga.render.lettering import aligned
from saga.text import printable, quoted

if TYPE_CHECKING:
    from saga.report import SagaReport, Settlement, StageReport

SIGNS: Final = {
    StageState.NOT_RUN: "·",
    StageState.RUNNING: ">",
    StageState.KEPT: "+",
    StageState.FALLBACK: "~",
    StageState.FAILED: "x",
    StageState.CANCELLED: "/",
    StageState.SKIPPED: "-",
    StageState.IN_DOUBT: "?",
    StageState.COMPENSATING: "<",
    StageState.UNDONE: "<",
    StageState.STUCK: "!",
    StageState.BLOCKED: "=",
}
"""A sign for each state, so that no reader depends on colour."""

_MINUTE: Final = 60
_TIME: Final = 3
"""The column of a row that has its time."""
_NO_FALLBACKS: Final = frozenset({FailureKind.COMPENSATION, FailureKind.INTERRUPTED, FailureKind.CRASHED, FailureKind.LATE})
"""How compensations and probes fail, and no fallback does; and what is no failure of its code's."""
_SAID_OTHERWISE: Final = frozenset({StageState.RUNNING, StageState.COMPENSATING, StageState.STUCK, StageState.BLOCKED})
"""The states of stages of which it goes without saying that something within them is left."""
_UNSETTLED: Final = frozenset({StageState.STUCK, StageState.IN_DOUBT})
"""The states of stages of which a person may have something to say."""
_CAME_TO_NOTHING: Final = frozenset(
    {StageState.FAILED, StageState.FALLBACK, StageState.CANCELLED, StageState.SKIPPED, StageState.IN_DOUBT, StageState.STUCK}
)
"""The states of stages of which nothing is kept, unless it is within them."""


def words_of(state: StageState) -> str:
    """A state as one says it."""
    return state.value.replace("_", " ")


def seconds(start: datetime | None, end: datetime | None) -> str:
    """The time between, in a unit that reads well; empty when either end is missing."""
    if start is None or end is None:
        return ""
    return duration((end - start).total_seconds())


def duration(span: float) -> str:
    """So many seconds, in a unit that reads well; fewer than none where the clocks of two machines differ."""
    if span < 0:
        return f"-{duration(-span)}"
    if round(span, 4) < 1:
        return f"{span * 1000:.1f} ms"
    if round(span, 2) < _MINUTE:
        return f"{span:.2f} s"
    minutes, rest = divmod(round(span), _MINUTE)
    return f"{minutes} min {rest} s" if minutes < _MINUTE else f"{minutes // _MINUTE} h {minutes % _MINUTE} min"


TARGET: Final = "MODULE:PIPELINE"
"""How a command is told a pipeline, where it isn't known which."""


class Reach(NamedTuple):
    """How the next command of `saga` gets at a saga.

    Attributes:
        pipeline: MODULE:PIPELINE, for the commands that run its code; empty where they find it by themselves.
        options: What every command is given, quoted.
        is_lost: No command will: its ledger ends with this process.
    """

    pipeline: str = ""
    options: str = ""
    is_lost: bool = False

    @property
    def to_another(self) -> Reach:
        """The same, but to a saga of another pipeline."""
        return self._replace(pipeline=TARGET if self.pipeline else "")


BY_ITSELF: Final = Reach()
"""By the settings and the environment alone."""


def summary(report: SagaReport, reach: Reach = BY_ITSELF) -> str:
    """A readable summary: the cause first, a line per stage in topological order, what to do last."""
    took = seconds(report.started_at, report.ended_at)
    lines = [
        f"Saga {printable(report.saga_id)} ({printable(report.pipeline)}): {report.status.value.upper()}"
        + (f" after {took}" if took else "")
    ]
    if report.cause is not None:
        lines.append(f"Cause: {printable(str(report.cause))}")
    lines.append("")
    lines += [f"  {line}" for line in aligned([_row(name, report) for name in report.stages], right={_TIME})]
    lines += ["", *what_to_do(report, reach)]
    return "\n".join(lines)


def _row(name: str, report: SagaReport) -> tuple[str, str, str, str, str]:
    stage = report.stages[name]
    tries = f"{stage.attempts} attempt{'' if stage.attempts == 1 else 's'}" if stage.attempts else ""
    state = f"{SIGNS[stage.state]} {words_of(stage.state)}"
    return printable(name), state, tries, seconds(stage.started_at, stage.ended_at), printable(explanation(name, report))


def explanation(name: str, report: SagaReport) -> str:
    """What there is to explain about a stage; empty if nothing is."""
    stage = report.stages[name]
    undo = stage.compensation
    held = [failure.message for failure in _held(name, report)]
    if stage.state is StageState.STUCK and undo is not None and undo.failure is not None:
        return "; ".join([f"its compensation failed {_so_often(undo.attempts)}: {_said(undo.failure)}", *held])
    parts = [f"something of its saga {child.saga_id} is stuck, blocked or in doubt" for child in troubled(stage)]
    parts += [f"its saga {saga_id} can't be read" for saga_id in stage.unread]
    if stage.state is StageState.SKIPPED:
        return "; ".join([*parts, stage.skip_reason or ""])
    parts += ["held back by what is stuck, in doubt or not undone"] if stage.state is StageState.BLOCKED else []
    if stage.settled is not None:
        parts.append(f"settled as {stage.settled.verdict.value} by {stage.settled.by}: {stage.settled.note}")
    parts += held
    if stage.late_output is not None and not held:
        parts.append("it completed late, when it had been given up")
    if stage.failure is not None:
        # What it gave beside a failure, and what its fallback gave, mended nothing.
        mended = "at first it " if stage.state is StageState.KEPT or (stage.output and (stage.probed or not stage.failed)) else ""
        parts.append(mended + str(stage.failure).removeprefix(f"stage {name!r} "))
    if stage.probed is not None:
        parts.append("asked, it had landed" if stage.probed else "asked, it had not landed")
    elif unanswered := _of_probe(name, report):
        parts.append(f"its probe failed {_so_often(len(unanswered))}: {_said(unanswered[-1])}")
    if of_fallback := _of_fallback(name, report):
        parts.append(f"its fallback failed: {_said(of_fallback[-1])}")
    by_hand = stage.settled is not None and stage.settled.verdict is Verdict.UNDONE
    if stage.state is StageState.UNDONE and undo is not None and name in report.compensation_order and not by_hand:
        parts.append(f"undone {_ordinal(report.compensation_order.index(name) + 1)} in {seconds(undo.started_at, undo.ended_at)}")
        if undo.attempts > 1 and undo.failure is not None:
            parts.append(f"at attempt {undo.attempts}, after {_said(undo.failure)}")
    return "; ".join(parts)


def troubled(stage: StageReport) -> list[SagaReport]:
    """The sagas of a stage in which something is stuck, blocked or in doubt, where its state does not say so."""
    return [] if stage.state in _SAID_OTHERWISE or stage.is_kept_by_word else [child for child in stage.children if not child.clean]


def _ordinal(number: int) -> str:
    teens = 10 <= number % 100 <= 20  # noqa: PLR2004 - eleventh to thirteenth
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _so_often(number: int) -> str:
    return "once" if number == 1 else f"{number} times, the last"


def _said(failure: Failure) -> str:
    return f"{failure.type.rpartition('.')[2]}: {failure.message}" if failure.type else failure.message


def _held(name: str, report: SagaReport) -> list[Failure]:
    """What of a stage came late and waits for a person's word."""
    stage = report.stages[name]
    if stage.state not in _UNSETTLED:
        return []
    said = stage.settled
    # A retry tells nothing of it.
    since = said.at if said is not None and said.verdict is not Verdict.RETRY else report.started_at
    return [failure for failure in report.failures_of(name) if failure.kind is FailureKind.LATE and failure.at >= since]


def _of_probe(name: str, report: SagaReport) -> list[Failure]:
    """The failures of a stage's probe, of this execution."""
    tries = report.stages[name].tries
    return [failure for failure in report.failures_of(name) if failure.of_probe and (not tries or failure.at >= tries[0].started_at)]


def _of_fallback(name: str, report: SagaReport) -> list[Failure]:
    """The failures of a stage's fallback: those of the way forward after its last attempt's, but for a probe's that was cut off."""
    last = report.stages[name].failure
    since = dropwhile(lambda failure: failure != last, report.failures_of(name))
    # A saga that the stage ran has failures of its own, of no attempt, that are told under its stage's name.
    return [failure for failure in since if failure.attempt and failure.kind not in _NO_FALLBACKS and failure != last]


def next_command(name: str, *words: str, options: str = "") -> str:
    """A command of `saga` to be copied and run; its options as they are, its words quoted."""
    given = " ".join(map(quoted, words))
    # What begins with a dash would be taken for an option, were it not said that no more of them follow.
    parts = (name, options, "--", given) if any(word.startswith("-") for word in words) else (name, given, options)
    return " ".join(("saga", *filter(None, parts)))


def command_for(name: str, saga_id: str, reach: Reach) -> str:
    """A command that runs the code of a saga's pipeline."""
    return next_command(name, saga_id, *filter(None, [reach.pipeline]), options=reach.options)


def recover_command(reach: Reach) -> str:
    """The command that goes on with all whose process is gone."""
    return next_command("recover", *filter(None, [reach.pipeline]), options=reach.options)


def _how_to_settle(report: SagaReport, reach: Reach) -> list[str]:
    """The exact next commands, for the innermost stages: what runs them finds out by itself."""
    open_ones = [*report.stuck, *report.in_doubt]
    within = list(filter(is_path, open_ones))
    innermost = dict.fromkeys(name for name in open_ones if not any(is_within(other, name) for other in within))
    blocked = list(filter(is_path, report.blocked))
    saga_id, path = _outer(report)
    resume = _resume(report, reach)
    unclear = {name: _left_within(name, report, reach, blocked) for name in innermost if not goes_on(name, report)}
    to_say = [name for name, left in unclear.items() if not left]
    if not to_say and len(unclear) < len(innermost):
        return [
            f"To do: there is nothing to settle. Mend the cause, then: {command}" for command in [*_unfinished(report, reach)] or [resume]
        ]
    if not to_say:
        commands = dict.fromkeys(command for left in unclear.values() for command in left) or _unfinished(report, reach)
        return [f"To do: it was not undone to the end; go on with: {command}" for command in commands]
    alive = {name for name in to_say if Verdict.KEPT not in _verdicts(name, report)}
    first = [f"To do: a saga within has not come to rest: {_going_on(reach.to_another)}"] if alive else []
    to_say = [name for name in to_say if name not in alive]
    if not to_say:
        return first
    # What has come to rest otherwise goes on with nothing: resumed, it would run once more.
    waits = report.status in {SagaStatus.STUCK, SagaStatus.HALTED}
    # Where a stage around waits for a word of its own, that is told next: the saga can't go on before.
    then_goes_on = waits and not alive and all(name in innermost or not _waits_for_a_word(name, report) for name in open_ones)
    told = {name: _word(name, blocked) for name in to_say}
    may_retry = [name for name, word in told.items() if word == "retry" or (waits and Verdict.RETRY in _verdicts(name, report))]
    words, then = _words(to_say, may_retry), "; then go on" if then_goes_on else ""
    return [
        *first,
        f"To do: look at the outside world, put it right by hand, and say so ({words}){then}:",
        *(
            "  " + next_command("settle", saga_id, f"{path}{name}", word, options=f"--note '...' {reach.options}".rstrip())
            for name, word in told.items()
        ),
        *([f"  {resume}"] if then_goes_on else []),
    ]


def _words(to_say: Sequence[str], may_retry: Sequence[str]) -> str:
    """What a person may say of these stages; some of them may be tried once more."""
    if not may_retry:
        return "undone or kept"
    some = "" if len(may_retry) == len(to_say) else f", that of {', '.join(map(printable, may_retry))} alone"
    return f"undone, kept or retry{some}"


def _verdicts(path: str, report: SagaReport) -> tuple[Verdict, ...]:
    """What a person may say of a stage."""
    *_, (saga, name) = _way(path, report)
    return saga.stages[name].verdicts


def _waits_for_a_word(path: str, report: SagaReport) -> bool:
    """Whether something of a stage came late, of which to try it once more tells nothing."""
    *_, (saga, name) = _way(path, report)
    return bool(_held(name, saga))


def _unfinished(report: SagaReport, reach: Reach) -> Iterator[str]:
    """The commands that go on with what was not undone to the end: with those within, where the saga itself has nothing left to do."""
    if report.status in {SagaStatus.STUCK, SagaStatus.HALTED}:
        yield _resume(report, reach)
        return
    for child in [child for stage in report.stages.values() for child in stage.children if not child.clean]:
        if child.status is SagaStatus.STUCK:
            yield command_for("resume", child.saga_id, reach.to_another)
        else:
            yield from _unfinished(child, reach)


def _word(name: str, blocked: Sequence[str]) -> str:
    """What to say of a stage: that nothing of it stands is refused while something within it is still to be undone."""
    return "retry" if any(is_within(inner, name) for inner in blocked) else "undone"


def _left_within(name: str, report: SagaReport, reach: Reach, blocked: Sequence[str]) -> list[str]:
    """The commands that undo what is held back within a stage, where the saga that goes backward can't try the stage that runs it."""
    way = _way(name, report)
    saga, innermost = way[-1]
    if not (any(is_within(inner, name) for inner in blocked) or _is_to_be_tried(innermost, saga)):
        return []
    while way and not _was_passed(way):
        way.pop()
    left = [child for saga, runner in way[-1:] for child in saga.stages[runner].children if not child.clean]
    return [command_for("compensate", child.saga_id, reach.to_another) for child in left]


def _was_passed(way: Sequence[tuple[SagaReport, str]]) -> bool:
    """Whether the last stage of a way waits for a person: it was come by on the way back and could not be tried, or has been in vain."""
    saga, name = way[-1]
    stage = saga.stages[name]
    if _held(name, saga):
        return True
    goes_back = any(outer.status is SagaStatus.STUCK for outer, _ in way)
    was_tried = stage.compensation is None or _word_on(stage) is not None
    return stage.state is StageState.IN_DOUBT and goes_back and was_tried and not _is_to_be_tried(name, saga)


def _resume(report: SagaReport, reach: Reach) -> str:
    return command_for("resume", _outer(report)[0], reach)


def goes_on(path: str, report: SagaReport) -> bool:
    """Whether nobody has to say what became of a stage in doubt.

    Its own saga has halted, and goes on when this one does; or somebody has said to try it again, and it has not been tried since. Neither
    holds where a saga around it goes backward, and the stage that runs it there can't be tried, or has been in vain; where that waits
    for a word on what came late; or where the saga around it is done with that stage, and this one is not to be resumed by itself.
    """
    *above, (saga, name) = way = _way(path, report)
    stage = saga.stages[name]
    if _held(name, saga):
        return False
    if any(_is_done_with(runner, outer) and inner.status is not SagaStatus.STUCK for (outer, runner), (inner, _) in pairwise(way)):
        return False
    around = [(outer, runner) for outer, runner in above if outer.status is SagaStatus.STUCK and outer.stages[runner].state in _UNSETTLED]
    around += [(outer, runner) for outer, runner in above if _held(runner, outer)]
    if not all(_is_to_be_tried(runner, outer) for outer, runner in around):
        return False
    if _is_to_be_tried(name, saga):
        return True
    if saga.status is not SagaStatus.HALTED or not stage.children:
        return False
    return stage.children[-1].status is SagaStatus.HALTED and stage.children[-1].clean


def _is_done_with(name: str, saga: SagaReport) -> bool:
    """Whether a saga at rest that is resumed does nothing more about a stage, whatever is left within that."""
    if saga.status in {SagaStatus.COMPLETED, SagaStatus.COMPENSATED}:
        return True
    state = saga.stages[name].state
    return state is StageState.KEPT or (state is StageState.FALLBACK and saga.status is SagaStatus.DEGRADED)


def _is_to_be_tried(name: str, saga: SagaReport) -> bool:
    """Whether somebody has said to try a stage again, and it has not been since."""
    stage = saga.stages[name]
    said = _word_on(stage)
    if said is None or said.verdict is not Verdict.RETRY or _held(name, saga):
        return False
    if stage.verdicts and Verdict.RETRY not in stage.verdicts:
        # The saga has turned back since, where nothing can try it.
        return False
    return all(failure.at <= said.at for failure in saga.failures_of(name))


def _word_on(stage: StageReport) -> Settlement | None:
    """What a person said of a stage, unless it has run, was to be undone or has been answered for since: that was about what was then."""
    said, undo = stage.settled, stage.compensation
    if said is None or stage.probed is not None:
        return None
    tries = (*stage.tries, *(undo.tries if undo is not None else ()))
    return said if all(each.started_at <= said.at for each in tries) else None


def _way(path: str, report: SagaReport) -> list[tuple[SagaReport, str]]:
    """The sagas and stages through which one of the report's paths leads, the outermost first."""
    for name, stage in report.stages.items() if is_path(path) else ():
        for begin, child in stage.children_by_path.items() if path.startswith(name) else ():
            if path.startswith(f"{begin}/"):
                return [(report, name), *_way(path.removeprefix(f"{begin}/"), child)]
    return [(report, path)]


def is_path(name: str) -> bool:
    """Whether it may lead to a stage within another one."""
    return "/" in name


def _outer(report: SagaReport) -> tuple[str, str]:
    """The saga to go on with, and the path to this one's stages from there: what another one runs goes on with that."""
    return (report.saga_id, "") if report.parent is None else (report.parent, f"{report.saga_id.removeprefix(f'{report.parent}/')}/")


def _kept_within(report: SagaReport) -> Iterator[str]:
    """The stages that their own saga keeps, though the stage that ran it came to nothing, by their paths."""
    for path, child in _within_nothing(report):
        yield from (f"{path}/{inner}" for inner in (*child.kept, *_kept_within(child)))


def _recorded(report: SagaReport) -> Iterator[str]:
    """The stages of a saga at rest that came to nothing, and whose recorded effects stand, by their paths."""
    if report.ended_at is not None:
        yield from (name for name, stage in report.stages.items() if stage.effects and _is_left(stage))
    for path, child in _within_nothing(report):
        yield from (f"{path}/{inner}" for inner in _recorded(child))


def _is_left(stage: StageReport) -> bool:
    """Whether a stage that came to nothing was not undone, and nothing else says so."""
    if stage.state not in _CAME_TO_NOTHING - _UNSETTLED or stage.is_undone_by_word:
        return False
    return stage.state is not StageState.FALLBACK or stage.compensation is None


def _within_nothing(report: SagaReport) -> Iterator[tuple[str, SagaReport]]:
    """The sagas of stages that came to nothing that may keep something, by what the paths to their stages begin with."""
    for stage in report.stages.values():
        if stage.state not in _CAME_TO_NOTHING or stage.is_undone_by_word:
            continue
        for path, child in stage.children_by_path.items():
            if child.clean and child.ended_at is not None and child.status is not SagaStatus.COMPENSATED:
                yield path, child


def _going_on(reach: Reach) -> str:
    """What to do about a saga that is alive."""
    which, recover = next_command("list", options=reach.options), recover_command(reach)
    return f"it is running, or its process is gone. {which} says which, {recover} goes on with it."


def what_to_do(report: SagaReport, reach: Reach = BY_ITSELF) -> list[str]:
    """What is still in effect, and what a person has to do, a line each."""
    lines = []
    for label, names in (
        ("Still in effect, its undoing failed", report.stuck),
        ("Still in effect, held back", report.blocked),
        ("In doubt, may be in effect", report.in_doubt),
        ("Still in effect, recorded by what did not complete", [*_recorded(report)]),
    ):
        if names:
            lines.append(f"{label}: {', '.join(map(printable, names))}.")
    if kept := list(_kept_within(report)):
        lines.append(f"Kept within what did not complete: {', '.join(map(printable, kept))}.")
    unread = report.unread
    lines += [f"Not known what stands of saga {printable(saga_id)}: {printable(why)}" for saga_id, why in unread.items()]
    match report.status:
        case status if reach.is_lost and (status in {SagaStatus.STUCK, SagaStatus.HALTED} or not report.clean):
            lines.append(
                "To do: put right by hand what should not stand. The ledger was in memory, and no command finds the saga any more."
            )
        case SagaStatus.RUNNING | SagaStatus.COMPENSATING:
            lines.append(f"It has not come to rest: {_going_on(reach)}")
        case _ if report.status is SagaStatus.STUCK or report.stuck or report.blocked or report.in_doubt:
            # Also one that was cancelled while something was in doubt, or whose stage passed over what its own saga could not undo.
            lines += _how_to_settle(report, reach)
        case SagaStatus.HALTED if report.cause is None and not report.undone.keys() <= {*report.failed}:
            # It was undone as far as it can be, or somebody said that nothing stands of what would complete it. What failed is undone also
            # where its branch fell.
            lines.append(f"What is kept stays. To run once more what was undone: {_resume(report, reach)}")
        case SagaStatus.HALTED:
            lines.append(f"To do: what was done is kept. Mend the cause, then: {_resume(report, reach)}")
        case _ if report.parent is not None and not unread and not reach.is_lost:
            # That one may be stuck for it all the same, until it is gone on with.
            above = next_command("show", report.parent, options=reach.options)
            lines.append(f"Nothing is left to do in it. What is left of the saga that runs it: {above}")
        case _ if not unread:
            lines.append("Nothing is left to do.")
    return lines
