"""The turns of an event loop, counted once for all who wait a few of them."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Final


class Turns:
    """Wakes whoever has waited so many turns of the loop, at the cost of one callback a turn however many wait."""

    def __init__(self) -> None:
        self._now = 0
        self._due: dict[Callable[[], None], int] = {}
        self._counts = False

    def wait(self, wake: Callable[[], None]) -> None:
        """Have that called when the turns are over, unless it is called off."""
        self._due[wake] = self._now + PATIENCE
        if not self._counts:
            self._counts = True
            asyncio.get_running_loop().call_soon(self._count)

    def call_off(self, wake: Callable[[], None]) -> None:
        """Don't call it."""
        self._due.pop(wake, None)

    def _count(self) -> None:
        self._now += 1
        # All wait equally long, so whoever came first is due first.
        while self._due and next(iter(self._due.values())) <= self._now:
            wake = next(iter(self._due))
            del self._due[wake]
            wake()
        self._counts = bool(self._due)
        if self._counts:
            asyncio.get_running_loop().call_soon(self._count)


PATIENCE: Final = 10
"""So many turns: the start that a completion enables is at most five turns away, however long they take where a thousand sagas run; and
a timer, which the loop has to sort, is seldom needed."""

_TURNS: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Turns]] = weakref.WeakKeyDictionary()


def turns() -> Turns:
    """Those of the loop that runs."""
    loop = asyncio.get_running_loop()
    found = _TURNS.get(loop)
    if found is None:
        found = _TURNS[loop] = Turns()
    return found
