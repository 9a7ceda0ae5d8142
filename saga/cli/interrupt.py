"""Ctrl-C, or what counts as one: once to turn a saga back, twice to leave it as it is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from saga.cli.aside import STDERR
from saga.cli.exits import Exit

_HANGUP: Final = getattr(signal, "SIGHUP", None)
"""Says that the terminal was closed; Windows has no such signal."""


@contextmanager
def interruptible(
    work: asyncio.Task[Any],
    first: Callable[[], None],
    second: Callable[[], str],
    gone: Callable[[], object],
    leave: Callable[[int], object] = os._exit,
) -> Iterator[None]:
    """For the length of a block, let SIGINT, SIGTERM or SIGHUP cancel the work, and a second SIGINT or SIGTERM end the process at once.

    Args:
        work: What is cancelled.
        first: Is called before that.
        second: What is said before the process ends.
        gone: Is called when the terminal was closed, before all else.
        leave: Ends the process.
    """
    loop = asyncio.get_running_loop()
    came: list[int] = []

    def turn_back() -> None:
        try:
            first()
        finally:
            # Also where nothing can be said: the disk on which stderr is may be full.
            work.cancel()

    def interrupt(number: int, _: FrameType | None) -> None:
        if number == _HANGUP:
            gone()
        came.append(number)
        if len(came) == 1:
            loop.call_soon_threadsafe(turn_back)
        # A SIGHUP is none of the two: it comes of the terminal and once more of its shell, and with a SIGTERM where a session ends.
        if number == _HANGUP or sum(one != _HANGUP for one in came) == 1:
            return
        try:
            # Past the streams: this may have come in the middle of a write to one.
            os.write(STDERR, second().encode())
        finally:
            # Not by an exception: to unwind would cancel compensations in the middle. A process that dies is what ledgers are made for.
            leave(Exit.INTERRUPTED)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:  # as nohup has it
        numbers.append(_HANGUP)
    # Not the loop's own handlers: those wait for a stage that blocks the loop.
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
