"""The report as text for a terminal."""

from __future__ import annotations

from itertools import dropwhile
from typing import TYPE_CHECKING, Final

from saga.events import Verdict
from saga.failures import Failure, FailureKind
from saga.ledger import StageState
from saga.render.advice import held, what_to_do
from saga.render.lettering import aligned
from saga.render.reach import BY_ITSELF, Reach
from saga.render.wording import SIGNS, counted, seconds, words_of
from saga.text import printable

if TYPE_CHECKING:
    from saga.report import SagaReport, StageReport

_TIME: Final = 3
"""The column of a row that has its time."""
_NO_FALLBACKS: Final = frozenset({FailureKind.COMPENSATION, FailureKind.INTERRUPTED, FailureKind.CRASHED, FailureKind.LATE})
"""How compensations and probes fail, and no fallback does; and what is no failure of its code's."""
_SAID_OTHERWISE: Final = frozenset({StageState.RUNNING, StageState.COMPENSATING, StageState.STUCK, StageState.BLOCKED})
"""The states of stages of which it goes without saying that something within them is left."""


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
    tries = counted(stage.attempts, "attempt") if stage.attempts else ""
    state = f"{SIGNS[stage.state]} {words_of(stage.state)}"
    return printable(name), state, tries, seconds(stage.started_at, stage.ended_at), printable(explanation(name, report))


def explanation(name: str, report: SagaReport) -> str:
    """What there is to explain about a stage; empty if nothing is."""
    stage = report.stages[name]
    undo = stage.compensation
    came_late = [failure.message for failure in held(name, report)]
    if stage.state is StageState.STUCK and undo is not None and undo.failure is not None:
        return "; ".join([f"its compensation failed {_so_often(undo.attempts)}: {_said(undo.failure)}", *came_late])
    parts = [f"something of its saga {child.saga_id} is stuck, blocked or in doubt" for child in troubled(stage)]
    parts += [f"its saga {saga_id} can't be read" for saga_id in stage.unread]
    if stage.state is StageState.SKIPPED:
        return "; ".join([*parts, stage.skip_reason or ""])
    parts += ["held back by what is stuck, in doubt or not undone"] if stage.state is StageState.BLOCKED else []
    if stage.settled is not None:
        parts.append(f"settled as {stage.settled.verdict.value} by {stage.settled.by}: {stage.settled.note}")
    parts += came_late
    if stage.late_output is not None and not came_late:
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


def _of_probe(name: str, report: SagaReport) -> list[Failure]:
    """The failures of a stage's probe, of this execution."""
    stage = report.stages[name]
    asked = [failure for failure in report.failures_of(name) if failure.of_probe]
    # Of an execution before there is nothing to be told apart where there was none.
    return asked if stage.executions <= 1 or not stage.tries else [one for one in asked if one.at >= stage.tries[0].started_at]


def _of_fallback(name: str, report: SagaReport) -> list[Failure]:
    """The failures of a stage's fallback: those of the way forward after its last attempt's, but for a probe's that was cut off."""
    last = report.stages[name].failure
    since = dropwhile(lambda failure: failure != last, report.failures_of(name))
    # A saga that the stage ran has failures of its own, of no attempt, that are told under its stage's name.
    return [failure for failure in since if failure.attempt and failure.kind not in _NO_FALLBACKS and failure != last]
