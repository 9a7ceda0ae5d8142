"""Saying that an owner is alive, for as long as it holds the lease of any saga."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Final

from saga.log import LOG
from saga.tasks import start, this_task

_HEARTS: Final[weakref.WeakSet[asyncio.Task[Any]]] = weakref.WeakSet()
"""Those of all threads: one may begin while another one looks here, so nobody goes through them."""


class Heart:
    """Beats for an owner in the event loop in which it was made, while that loop's sagas are held.

    Args:
        beat: Tells the ledger.
        owner: Who is alive.
        seconds: From the start of one beat to that of the next; where the ledger takes longer, that follows at once.

    Attributes:
        loop: That event loop.
    """

    def __init__(self, beat: Callable[[], Awaitable[None]], owner: str, seconds: float) -> None:
        self.loop: Final = asyncio.get_running_loop()
        self._beat = beat
        self._owner = owner
        self._seconds = seconds
        self._held = 0
        self._task = self._beating()

    def hold(self) -> None:
        """Beat for one saga more."""
        self._held += 1
        if self._task.done():  # nothing ran in its loop any more when it was cancelled
            self._task = self._beating()

    def let_go(self) -> bool:
        """Beat for one saga less; whether it was the last, and the heart stands still."""
        self._held -= 1
        if not self._held and not self.loop.is_closed():
            self._task.cancel()
        return not self._held

    def _beating(self) -> asyncio.Task[None]:
        task = start(self._live())
        _HEARTS.add(task)
        return task

    async def _live(self) -> None:
        due = self.loop.time() + self._seconds
        while self._held:
            with contextlib.suppress(asyncio.CancelledError):
                rest = due - self.loop.time()
                if not this_task().cancelling():
                    await asyncio.sleep(rest)
                elif others := {task for task in asyncio.all_tasks() if task not in _HEARTS}:
                    # asyncio.run cancels every task before it ends, and waits for what is still to be undone: that must not lose its lease.
                    await asyncio.wait(others, timeout=rest)
                else:
                    # A Ctrl-C has struck where a saga was to be let go of: nobody runs it any more.
                    return
            due = self.loop.time() + self._seconds
            if self._held:
                await self._say()

    async def _say(self) -> None:
        try:
            await self._beat()
        except (Exception, asyncio.CancelledError):  # noqa: BLE001 - whatever a ledger's driver raises
            # A lease that is lost is noticed by the next append, which is refused. Of one that is given back meanwhile nobody need be told.
            if self._held:
                LOG.warning("the ledger could not be told that %s is alive", self._owner, exc_info=True)
