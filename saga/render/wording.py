"""States, numbers and spans of time, as one says them wherever a saga is shown."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from saga.ledger import StageState

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


def words_of(state: StageState) -> str:
    """A state as one says it."""
    return state.value.replace("_", " ")


def counted(number: int, noun: str) -> str:
    """So many of what a noun with a plural in -s names."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
