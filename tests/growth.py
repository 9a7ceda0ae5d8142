"""How much longer something takes where there is more of it, counted and not timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def steps(work: Callable[[], object]) -> int:
    """How many instructions of Python's own machine it takes: the same number on any machine, however busy."""
    counted = 0

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal counted
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        counted += event == "opcode"
        return count

    tracing = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(tracing)
    return counted


def growth(work: Callable[[int], Callable[[], object]], many: int) -> float:
    """How many times as long it takes with twice as many; 2.0 in proportion, 4.0 with their square.

    Args:
        work: Prepares it for so many, which is not counted.
        many: How many.
    """
    once, twice = work(many), work(2 * many)
    once()  # what is done but once is done
    return steps(twice) / steps(once)
