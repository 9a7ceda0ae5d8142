"""Ledgers that take their time for every write, as a disk does, and that can break."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from saga import LedgerError, MemoryLedger
from saga.events import AnyEvent
from tests.controlled import elapse


class SlowLedger(MemoryLedger):
    """Writes one after the other, in the order of the calls, and remembers what was written together.

    It breaks at the first write with such an event.
    """

    def __init__(self, breaks_at: type[Any] | None = None, error: Exception | None = None, *, seconds: float = 0.25) -> None:
        super().__init__()
        self.breaks_at = breaks_at
        self.error = error or LedgerError("disk full")
        self.seconds = seconds
        self.writes: list[list[str]] = []
        self.turn = asyncio.Lock()

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], **how: Any) -> int:
        await self._written(events)
        return await super().create(saga_id, owner, events, **how)

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        await self._written(events)
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)

    async def _written(self, events: Sequence[AnyEvent]) -> None:
        async with self.turn:
            await elapse(self.seconds)
            if self.breaks_at is not None and any(isinstance(event, self.breaks_at) for event in events):
                raise self.error
            self.writes.append([type(event).__name__ for event in events])


class SlowDisk(SlowLedger):
    """A durable one: what guards nothing is written together with what does, and its owners have to say that they are alive.

    The second time that one says so, nobody hears it.
    """

    durable = True
    lease = 30.0

    def __init__(self, *, seconds: float = 0.01) -> None:
        super().__init__(error=OSError("no space left"), seconds=seconds)
        self.beats = 0

    async def beat(self, owner: str) -> None:
        self.beats += 1
        if self.beats == 2:
            raise LedgerError("no line")
