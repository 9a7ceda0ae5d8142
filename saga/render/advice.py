"""What of a saga is still in effect, and what a person has to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from saga.events import SagaStatus, Verdict
from saga.failures import Failure, FailureKind
from saga.keys import is_path, is_within
from saga.ledger import StageState
from saga.render.reach import BY_ITSELF, Reach, command_for, next_command, recover_command
from saga.text import printable

if TYPE_CHECKING:
    from saga.report import SagaReport, Settlement, StageReport

_UNSETTLED: Final = frozenset({StageState.STUCK, StageState.IN_DOUBT})
"""The states of stages of which a person may have something to say."""
_CAME_TO_NOTHING: Final = frozenset(
    {StageState.FAILED, StageState.FALLBACK, StageState.CANCELLED, StageState.SKIPPED, StageState.IN_DOUBT, StageState.STUCK}
)
"""The states of stages of which nothing is kept, unless it is within them."""


def what_to_do(report: SagaReport, reach: Reach = BY_ITSELF) -> list[str]:
    """What is still in effect, and what a person has to do, a line each."""
    lines = []
    for label, names in (
        ("Still in effect, its undoing failed", report.stuck),
        ("Still in effect, held back", report.blocked),
        ("In doubt, may be in effect", report.in_doubt),
        ("Still in effect, recorded by what did not complete", [*_recorded(report)]),
        ("Still in effect, landed behind a fallback", [*_landed_behind(report)]),
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
    return bool(held(name, saga))


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
    if held(name, saga):
        return True
    goes_back = any(outer.status is SagaStatus.STUCK for outer, _ in way)
    was_tried = stage.compensation is None or _word_on(stage) is not None
    return stage.state is StageState.IN_DOUBT and goes_back and was_tried and not _is_to_be_tried(name, saga)


def _resume(report: SagaReport, reach: Reach) -> str:
    return command_for("resume", _outer(report)[0], reach)


def goes_on(path: str, report: SagaReport) -> bool:
    """Whether nobody has to say what became of a stage in doubt.

    Its own saga has halted, as its probe has found, and goes on when this one does; or somebody has said to try it again, and it has not
    been tried since. Neither holds where a saga around it goes backward, and the stage that runs it there can't be tried, or has been in
    vain; where that waits for a word on what came late; or where the saga around it is done with that stage, and this one is not to be
    resumed by itself.
    """
    *above, (saga, name) = way = _way(path, report)
    stage = saga.stages[name]
    if held(name, saga):
        return False
    if any(_is_done_with(runner, outer) and inner.status is not SagaStatus.STUCK for (outer, runner), (inner, _) in pairwise(way)):
        return False
    around = [(outer, runner) for outer, runner in above if outer.status is SagaStatus.STUCK and outer.stages[runner].state in _UNSETTLED]
    around += [(outer, runner) for outer, runner in above if held(runner, outer)]
    if not all(_is_to_be_tried(runner, outer) for outer, runner in around):
        return False
    if _is_to_be_tried(name, saga):
        return True
    if saga.status is not SagaStatus.HALTED or not any(failure.of_probe for failure in saga.failures_of(name)):
        # One that nothing can ask runs again in doubt only where it is idempotent, of which no report tells.
        return False
    return bool(stage.children) and stage.children[-1].status is SagaStatus.HALTED and stage.children[-1].clean


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
    if said is None or said.verdict is not Verdict.RETRY or held(name, saga):
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


def held(name: str, report: SagaReport) -> list[Failure]:
    """What of a stage came late and waits for a person's word."""
    stage = report.stages[name]
    if stage.state not in _UNSETTLED:
        return []
    late = [failure for failure in report.failures_of(name) if failure.kind is FailureKind.LATE]
    said = stage.settled
    # A retry tells nothing of it.
    return late if said is None or said.verdict is Verdict.RETRY else [failure for failure in late if failure.at >= said.at]


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


def _landed_behind(report: SagaReport) -> Iterator[str]:
    """The stages of a saga at rest that have landed all the same behind the fallback that stands in for them, by their paths."""
    # In one that is compensated only a plain stage can have, and that has declared no effect.
    if report.ended_at is not None and report.status is not SagaStatus.COMPENSATED:
        landed = (name for name, stage in report.stages.items() if stage.fallback and stage.late_output is not None and _is_left(stage))
        yield from landed
    for path, child in _within_nothing(report):
        yield from (f"{path}/{inner}" for inner in _landed_behind(child))


def _is_left(stage: StageReport) -> bool:
    """Whether a stage that came to nothing was not undone, and nothing else says so."""
    if stage.state not in _CAME_TO_NOTHING - _UNSETTLED or stage.is_undone_by_word:
        return False
    # To ask for it alone has undone nothing.
    return stage.state is not StageState.FALLBACK or stage.compensation is None or not stage.compensation.attempts


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
