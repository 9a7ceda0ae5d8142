"""A clock that tests control: the event loop's time jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class NothingLeftToWaitFor(AssertionError):
    """The loop would have waited for ever: what it runs is deadlocked."""


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise NothingLeftToWaitFor
        if not ready and timeout is not None and timeout > 0:
            self.now += timeout
        return ready


class ControlledLoop(asyncio.SelectorEventLoop):
    """An event loop in which an hour passes at once when nothing happens in it."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def compute(self, seconds: float) -> None:
        """Let so much time pass in one turn of the loop, as code does that never awaits."""
        self._jumping.now += seconds


async def elapse(seconds: float) -> None:
    """Let so much of the controlled time pass."""
    await asyncio.sleep(seconds)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in controlled time; a task that is still there at the end is an error."""

    async def watched() -> T:
        loop = asyncio.get_running_loop()
        mishaps: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: mishaps.append(context))
        result = await main
        # Tasks that have nothing left to do but to record what came late end within a few turns of the loop.
        for _ in range(5):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"leaked tasks: {left}"
        assert not mishaps, f"asyncio complained: {mishaps}"
        return result

    with asyncio.Runner(loop_factory=ControlledLoop) as runner:
        return runner.run(watched())
