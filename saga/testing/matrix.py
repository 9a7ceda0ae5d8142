"""A verification as text: the matrix, stage by fault, and what was wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from saga.events import SagaStatus
from saga.ledger import StageState
from saga.render.lettering import aligned
from saga.report import StageReport
from saga.testing.faults import KILLS, Fault
from saga.testing.outside import BY_THE_REPORT, leaves_and_branches

if TYPE_CHECKING:
    from saga.testing.verification import Trial, Verification

_SIGNS: Final = {
    SagaStatus.COMPLETED: "+",
    SagaStatus.DEGRADED: "~",
    SagaStatus.COMPENSATED: "<",
    SagaStatus.HALTED: "=",
    SagaStatus.CANCELLED: "/",
    SagaStatus.STUCK: "!",
}
_NEVER_BEGAN: Final = "."
_WRONG: Final = "X"
_UNREACHED: Final = "0"
_WHOLE: Final = "(the saga)"
_NOTHING_KNOWN: Final = (
    "It never struck, so nothing is known of it. If a stage does not run with this input, or is never undone, leave it out, "
    "and verify it with another input."
)
_OF_A_KILL: Final = (
    "What a died process has left is found by a probe(), which gives the same output; a stage that runs again needs "
    "ctx.idempotency_key; nothing that a stage keeps in itself outlives its process."
)
_UNDOES_OTHERWISE: Final = (
    "leaves something behind, or undoes what is not its own. Have it undo all that its stage did, and nothing else; a mere trace is to "
    "be left out of look()."
)
_RAN_UNASKED: Final = (
    "After an attempt that raised the next one runs unasked: let whoever carries it out recognise ctx.idempotency_key, or have execute() "
    "look first whether the effect is there."
)
_ADVICE: Final = {
    Fault.RAISES_AFTER: (
        "A lost answer looks like a failure: give the stage a probe(), or ctx.record its effects. A plain stage can have neither."
    ),
    Fault.UNDO_REPEATED: "compensate() has to bear repetition: let whoever carries it out recognise ctx.idempotency_key.",
    Fault.KILLED_BEFORE: _OF_A_KILL,
    Fault.KILLED_AFTER: _OF_A_KILL,
    Fault.TIMES_OUT_AFTER: "Its probe() has to find what landed; a compensate_in_doubt has to cope with it.",
    Fault.TIMES_OUT_BEFORE: "Its probe() has to tell that nothing landed; a compensate_in_doubt has to cope with that.",
}


def matrix(verification: Verification) -> str:
    """Draw it: a row for each stage, a column for each fault, what the signs mean, and what was wrong."""
    cells: dict[tuple[str, Fault], dict[str, None]] = {}
    for trial in verification.trials:
        cells.setdefault((trial.stage or _WHOLE, trial.fault), {})[_sign(trial)] = None
    faults = [fault for fault in Fault if any(fault is trial.fault for trial in verification.trials)]
    # A stage may run only when another one fails; and what is about the saga itself comes last.
    rows = list(dict.fromkeys([*verification.stages, *sorted(row for row, _ in cells if row != _WHOLE), *(row for row, _ in cells)]))
    table = [["", *(_header(fault)[part] for fault in faults)] for part in (0, 1)]
    table += [[row, *(" ".join(cells.get((row, fault), ())) for fault in faults)] for row in rows]
    lines = [f"{verification.pipeline}: {_verdict(verification)}", "", *aligned(table)]
    lines += ["", *_legend(sign for signs in cells.values() for sign in signs)]
    lines += _problems(verification.trials)
    return "\n".join(lines)


def _header(fault: Fault) -> tuple[str, str]:
    """The fault's name in two lines."""
    what, _, when = fault.rpartition(" ")
    return (what, when) if what else (when, "")


def _sign(trial: Trial) -> str:
    if not trial.reached:
        return _UNREACHED
    if trial.wrong:
        return _WRONG
    return "".join(_SIGNS[status] for status in trial.ending) or _NEVER_BEGAN


def _verdict(verification: Verification) -> str:
    if verification.ok:
        return "wherever it failed, the world was where the report said"
    wrong = sum(not trial.ok for trial in verification.trials)
    return "1 trial went wrong" if wrong == 1 else f"{wrong} trials went wrong"


def _legend(signs: Iterable[str]) -> Iterator[str]:
    found = set(signs)
    single = {sign for joined in found for sign in joined}
    meanings: Mapping[str, str] = {sign: status.value for status, sign in _SIGNS.items()} | {
        _NEVER_BEGAN: "never began",
        _WRONG: "wrong",
        _UNREACHED: "never struck",
    }
    yield "   ".join(f"{sign} {meaning}" for sign, meaning in meanings.items() if sign in single)
    if any(len(sign) > 1 for sign in found):
        yield "The second of two signs: when the fault was mended and the saga resumed."


def _problems(trials: Collection[Trial]) -> Iterator[str]:
    """What was wrong: each thing once, behind all that led to it, and before what helps."""
    found: dict[str, list[Trial]] = {}
    for trial in (trial for trial in trials if not trial.ok):
        found.setdefault(trial.wrong or _NOTHING_KNOWN, []).append(trial)
    for wrong, alike in found.items():
        led_to_it: dict[Fault, dict[str, None]] = {}
        for trial in alike:
            write = f" ({', '.join(trial.events)})" if trial.events else ""
            led_to_it.setdefault(trial.fault, {})[(trial.stage or _WHOLE) + write] = None
        yield ""
        yield from (f"{fault}: {', '.join(stages)}" for fault, stages in led_to_it.items())
        yield wrong
        yield from _advice(wrong, alike, [trial for trial in trials if trial.ok])


def _advice(wrong: str, alike: Collection[Trial], went_well: Iterable[Trial]) -> Iterable[str]:
    """What helps, if something does."""
    is_of_world = wrong.startswith(BY_THE_REPORT)
    plain = [trial for trial in alike if _is_plain(trial)] if is_of_world else []
    undone = [_undone(trial) for trial in plain]
    if plain and all(undone):  # where nothing was undone, no compensation has a part in it
        # The harder faults go wrong for the same reason, and say nothing of their own until this is mended.
        suspects = set.intersection(*undone)
        faults = {trial.fault for trial in plain}
        cleared = {path for trial in went_well if trial.fault in faults and _is_plain(trial) for path in _undone(trial)}
        names = " or ".join(sorted(suspects - cleared or suspects))
        return (f"compensate(){names and f' of {names}'} {_UNDOES_OTHERWISE}",)
    # What failed by itself says why; only of a process that died there is more to say.
    told = [trial for trial in alike if trial.fault in _ADVICE and (trial.fault in KILLS or is_of_world)]
    return dict.fromkeys(_RAN_UNASKED if _ran_unasked(trial) else _ADVICE[trial.fault] for trial in told)


def _ran_unasked(trial: Trial) -> bool:
    """Whether a stage that has a probe was attempted again before that was asked."""
    stages = {} if trial.report is None else dict(leaves_and_branches(trial.report))
    stage = stages.get(trial.stage)
    return trial.fault is Fault.RAISES_AFTER and stage is not None and stage.probed is not None and stage.attempts > 1


def _undone(trial: Trial) -> set[str]:
    """The paths of the stages that were undone before anything was mended."""
    stages = () if trial.report is None else leaves_and_branches(trial.report)
    return {path for path, stage in stages if stage.state is StageState.UNDONE}


def _is_plain(trial: Trial) -> bool:
    """Whether nothing was asked of the compensations but to undo once what had landed once."""
    stages = {} if trial.report is None else dict(leaves_and_branches(trial.report))
    match trial.fault, stages.get(trial.stage):
        case Fault.RAISES_BEFORE, _:
            return True
        case Fault.INTERRUPTED_AFTER, StageReport(failure=None):
            return True
        case Fault.RAISES_AFTER | Fault.TIMES_OUT_AFTER, StageReport(state=StageState.UNDONE, attempts=1):
            return True
        case _:
            return False
