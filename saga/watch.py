"""Time limits for code that may ignore its cancel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from saga.failures import FailureKind


class Watched:
    """A task of ours that runs somebody else's code, and does not trust it to end.

    The task is cancelled when the code's time is up or when told to; if the code then has not ended within the grace, it
    is given up: `on_give_up` is called, and whoever waits for it must wait no longer.

    Attributes:
        task: The task; set by whoever starts it.
        is_acting: The code is running now.
        reason: Why it was cancelled, TIMEOUT or INTERRUPTED; None if it was not.
        given_up: It ignored its cancel for longer than the grace.
    """

    __slots__ = ("_grace", "_on_give_up", "_timer", "given_up", "is_acting", "reason", "task")

    def __init__(self, on_give_up: Callable[[Any], None]) -> None:
        self.task: asyncio.Task[None]
        self.is_acting = False
        self.reason: FailureKind | None = None
        self.given_up = False
        self._on_give_up = on_give_up
        self._grace: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float | None, grace: float | None) -> None:
        """Let the code that starts now run for so many seconds, and end within the grace once it is cancelled; None: no limit."""
        self.is_acting, self.reason, self._grace = True, None, grace
        if seconds is not None:
            self._timer = self.task.get_loop().call_later(seconds, self.cancel, FailureKind.TIMEOUT)

    def end(self) -> None:
        """The code has ended."""
        self.is_acting = False
        self._stop_clock()

    def cancel(self, reason: FailureKind) -> None:
        """Cancel the code if it runs; a second cancel changes nothing."""
        if not self.is_acting or self.reason is not None:
            return
        self._stop_clock()
        self.reason = reason
        self.task.cancel()
        if self._grace is not None:
            self._timer = self.task.get_loop().call_later(self._grace, self._give_up)

    def _give_up(self) -> None:
        self.given_up = True
        self._on_give_up(self)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def absorb(self) -> bool:
        """Take back the cancels that the task got; whether there were any, from here or from outside."""
        if not self.task.cancelling():
            return False
        # A cancel that has not been delivered yet would otherwise strike at our own next await.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        while self.task.cancelling():
            self.task.uncancel()
        return True


async def bounded(call: Awaitable[Any], *, seconds: float | None, grace: float, stop: asyncio.Event | None = None) -> Any:
    """Run somebody else's code for at most so many seconds, or until `stop` is set.

    Returns in time whatever the code does: what ignores its cancel for longer than the grace is left to itself.
    It costs a task more than to be `Watched`, so it is for what runs seldom.

    Raises:
        TimeoutError: The time was up.
        asyncio.CancelledError: `stop` was set, or the code cancelled itself.
        Exception: Whatever the code raises.
    """

    async def run() -> Any:
        return await call

    task = asyncio.create_task(run())
    task.add_done_callback(retrieved)
    waiting: set[asyncio.Task[Any]] = {task} if stop is None else {task, asyncio.create_task(stop.wait())}
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        in_time = task.done()
        if not in_time:
            task.cancel()
            await asyncio.wait({task}, timeout=grace)
    except asyncio.CancelledError:
        _cancel(waiting)
        raise
    _cancel(waiting)
    if in_time or (task.done() and not task.cancelled() and task.exception() is None):
        return task.result()
    if stop is not None and stop.is_set():
        raise asyncio.CancelledError
    raise TimeoutError(f"no answer within {seconds:g} s")


def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()


def retrieved(task: asyncio.Task[Any]) -> None:
    """Look at a task's exception: asyncio complains of one that nobody looked at, and one that comes after its time is no news."""
    if not task.cancelled():
        task.exception()
