"""Durable ledgers, one file each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from saga.errors import MisuseError
from saga.ledger import Ledger, MemoryLedger


@asynccontextmanager
async def open_ledger(url: str) -> AsyncIterator[Ledger]:
    """Open the ledger that a URL names."""
    if url != "memory:":
        raise MisuseError("memory: as the ledger", got=repr(url))
    yield MemoryLedger()
