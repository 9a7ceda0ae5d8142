"""Time limits for code that may ignore its cancel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from saga.failures import FailureKind


class Watch:
    """Watches one task while it runs somebody else's code.

    It cancels the task when its time is up or when told to; if the code then has not ended within the grace, it is
    given up: `on_give_up` is called and whoever waits for it must wait no longer.

    Attributes:
        reason: Why it was cancelled, TIMEOUT or INTERRUPTED; None if it was not.
        given_up: It ignored its cancel for longer than the grace.
    """

    __slots__ = ("_grace", "_on_give_up", "_task", "_timer", "given_up", "reason")

    def __init__(self, task: asyncio.Task[None], grace: float | None, on_give_up: Callable[[], None]) -> None:
        self._task = task
        self._grace = grace
        self._on_give_up = on_give_up
        self._timer: asyncio.TimerHandle | None = None
        self.reason: FailureKind | None = None
        self.given_up = False

    def limit(self, seconds: float | None) -> None:
        """Let the code that starts now run for so many seconds; None: for as long as it takes."""
        if seconds is not None:
            self._timer = self._task.get_loop().call_later(seconds, self.cancel, FailureKind.TIMEOUT)

    def cancel(self, reason: FailureKind) -> None:
        """Cancel it; a second cancel changes nothing."""
        if self.reason is not None:
            return
        self.stop_clock()
        self.reason = reason
        self._task.cancel()
        if self._grace is not None:
            self._timer = self._task.get_loop().call_later(self._grace, self._give_up)

    def _give_up(self) -> None:
        self.given_up = True
        self._on_give_up()

    def stop_clock(self) -> None:
        """The code has ended, or is somebody else's now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def absorb(self) -> bool:
        """Take back the cancels that the task got; whether there were any, from here or from outside."""
        if not self._task.cancelling():
            return False
        # A cancel that has not been delivered yet would otherwise strike at our own next await.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        while self._task.cancelling():
            self._task.uncancel()
        return True


async def bounded(call: Awaitable[Any], *, seconds: float | None, grace: float, stop: asyncio.Event | None = None) -> Any:
    """Run somebody else's code for at most so many seconds, or until `stop` is set.

    Returns in time whatever the code does: what ignores its cancel for longer than the grace is left to itself.
    It costs a task more than a `Watch`, so it is for what runs seldom.

    Raises:
        TimeoutError: The time was up.
        asyncio.CancelledError: `stop` was set, or the code cancelled itself.
        Exception: Whatever the code raises.
    """

    async def run() -> Any:
        return await call

    task = asyncio.create_task(run())
    task.add_done_callback(_retrieved)
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


def _retrieved(task: asyncio.Task[Any]) -> None:
    # asyncio complains of an exception that nobody looked at; one that comes after its time is no news.
    if not task.cancelled():
        task.exception()
