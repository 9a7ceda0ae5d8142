"""One saga's ledger while the saga is alive: what is recorded is checked, folded and written, in this order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

from saga.errors import LedgerError
from saga.events import AnyEvent, SagaStarted
from saga.ledger import Ledger
from saga.recovery import SagaState


class Journal:
    """Writes the events of one saga and keeps its state.

    After an append that failed nothing more is written: what the state then says beyond the ledger is unknown to
    whoever resumes, so no further effect may start.
    """

    def __init__(self, ledger: Ledger, saga_id: str, state: SagaState, *, version: int, token: int) -> None:
        self.saga_id: Final = saga_id
        self.state: Final = state
        self.error: LedgerError | None = None
        self._ledger = ledger
        self._version = version
        self._token = token
        self._released = False

    @classmethod
    async def begin(cls, ledger: Ledger, started: SagaStarted, owner: str) -> Journal:
        """Write the first event of a new saga.

        Raises:
            LedgerError: It could not be written; the saga does not exist.
        """
        state = SagaState([started])
        token = await ledger.create(started.saga_id, owner, (started,))
        return cls(ledger, started.saga_id, state, version=1, token=token)

    async def record(self, *events: AnyEvent, release: bool = False) -> None:
        """Fold the events and have them written, with `release` as the last ones before the lease is given back.

        Raises:
            LedgerError: They, or some before them, could not be written.
        """
        if self.error is not None:
            raise self.error
        for event in events:
            self.state.apply(event)
        version = self._version
        # Reserved before the write is awaited: a second record meanwhile goes behind this one.
        self._version += len(events)
        try:
            await self._ledger.append(self.saga_id, events, expected_version=version, token=self._token, release=release)
        except LedgerError as error:
            self.error = error
            raise
        except Exception as error:  # whatever a ledger's driver raises
            self.error = LedgerError(f"the ledger failed to record {_named(events)} of saga {self.saga_id}: {error}")
            raise self.error from error
        except asyncio.CancelledError as error:
            # Whether it was written is unknown; a worker that died of this would leave its saga waiting for ever.
            self.error = LedgerError(f"recording {_named(events)} of saga {self.saga_id} was cancelled from outside")
            raise self.error from error
        self._released = release

    async def close(self) -> None:
        """Give the lease back, if it is still held."""
        if not self._released:
            with contextlib.suppress(LedgerError):
                # It ends by itself, and what went wrong before counts for more.
                await self._ledger.release(self.saga_id, self._token)


def _named(events: Sequence[AnyEvent]) -> str:
    return " and ".join(type(event).__name__ for event in events)
