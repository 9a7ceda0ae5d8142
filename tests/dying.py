"""A ledger that breaks at a chosen event: for whoever resumes, its process was killed there."""

from __future__ import annotations

from typing import Any

from saga import MemoryLedger


class Dying(MemoryLedger):
    """Forgets who held a saga, as a ledger does whose owners' processes are gone, and stops taking events."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def forget_owners(self) -> None:
        for saga in self._sagas.values():
            saga.owner = None

    async def append(self, saga_id: str, events: Any, *, expected_version: int, token: int, release: bool = False) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("killed")
        await super().append(saga_id, events, expected_version=expected_version, token=token, release=release)
