"""The sagas that one owner holds, and the hearts that say so."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from bisect import bisect_left, insort
from itertools import groupby
from typing import TYPE_CHECKING, Final

import anyio

from saga.errors import LedgerError, MisuseError
from saga.ledger import answering
from saga.live.heart import Heart
from saga.owners import this_process
from saga.tasks import make_ready, outlast, start, this_loop

if TYPE_CHECKING:
    from saga.ledger import Ledger
    from saga.live.saga import LiveSaga


class Held:
    """What one owner holds in a ledger.

    Args:
        ledger: The one in which.

    Attributes:
        owner: Its name.
        sagas: By id, those that are alive; None for one in whose ledger something is just being recorded.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger: Final = ledger
        self.owner: Final = this_process()
        self.sagas: Final[dict[str, LiveSaga | None]] = {}
        self._hearts: Final[dict[asyncio.AbstractEventLoop, Heart]] = {}
        self._beating: Final[dict[str, Heart]] = {}
        # Sorted: what is within a saga is behind it. Where a ledger fails, it fails thousands at once.
        self._owed: Final[list[tuple[str, int]]] = []
        # Loops of several threads may run sagas of one owner.
        self._turn: Final = threading.RLock()

    def hold(self, saga_id: str) -> bool:
        """Let nobody else here go on with a saga, and say that its owner is alive until it is let go of; False if it is held already.

        Raises:
            MisuseError: No event loop of asyncio runs.
        """
        loop = this_loop()
        make_ready()
        with self._turn:
            if self.holds(saga_id):
                return False
            self.sagas[saga_id] = None
            if self._ledger.lease is not None:
                if loop not in self._hearts:
                    self._hearts[loop] = Heart(self._beat, self.owner, self._ledger.lease / 3)
                self._beating[saga_id] = self._hearts[loop]
                self._hearts[loop].hold()
        return True

    def holds(self, saga_id: str) -> bool:
        """Whether a saga is held here; nobody runs it any more whose event loop was closed in its midst."""
        saga = self.sagas.get(saga_id)
        if saga is not None and saga.loop.is_closed():
            self.abandon(saga)
        return saga_id in self.sagas

    def abandon(self, saga: LiveSaga) -> None:
        """Hold a saga no more of which no further code can run; its lease is given back with a later sign of life."""
        with self._turn:
            if self.sagas.get(saga.id) is saga:
                self.let_go(saga.id)
                if saga.journal.token is not None:
                    insort(self._owed, (saga.id, saga.journal.token))

    def let_go(self, saga_id: str) -> None:
        """Hold a saga no more; its lease is given back with its last event, or behind that."""
        with self._turn:
            del self.sagas[saga_id]
            heart = self._beating.pop(saga_id, None)
            if heart is not None and heart.let_go():
                del self._hearts[heart.loop]

    async def give_back(self, saga_id: str, token: int) -> None:
        """Give the lease of a saga back; where the ledger fails, with a later sign of life, which else would hold that saga, too."""
        insort(self._owed, (saga_id, token))
        # A "0" comes next to a "/".
        within = self._owed[bisect_left(self._owed, (f"{saga_id}/",)) : bisect_left(self._owed, (f"{saga_id}0",))]
        with contextlib.suppress(LedgerError):
            # What went wrong before counts for more.
            for lease in (*reversed(within), (saga_id, token)):
                await self._release(*lease)

    async def _release(self, saga_id: str, token: int) -> None:
        with answering(f"give the lease of saga {saga_id} back"):
            await self._ledger.release(saga_id, token)
        with contextlib.suppress(ValueError):  # somebody else has done so meanwhile, too
            self._owed.remove((saga_id, token))

    async def _beat(self) -> None:
        await self._ledger.beat(self.owner)
        for saga_id in tuple(self.sagas):
            self.holds(saga_id)  # or abandons it
        # Those within a saga before its own: who goes on with it would find them held, and it would get stuck. Else all together, which
        # a durable ledger carries out as one: the next beat waits for it, and there may be thousands.
        for _, level in groupby(sorted(self._owed, key=_depth, reverse=True), _depth):
            await asyncio.gather(*[start(self._release(*lease)) for lease in level])

    def busy(self, saga_id: str, expected: str, state: str) -> MisuseError:
        """What is wrong with going on with a saga that is held here.

        Args:
            saga_id: Its id.
            expected: What it should be.
            state: What it is, if it is alive.
        """
        if self.sagas.get(saga_id) is not None:
            return MisuseError(expected, got=f"saga {saga_id}, which is {state}")
        return MisuseError(expected, got=f"saga {saga_id}, of which something is just being recorded here", hint="Try again in a moment.")

    async def acquire(self, saga_id: str, under: int | None = None) -> int:
        """Take the lease of a saga; when the caller is cancelled meanwhile, it is given back first.

        Args:
            saga_id: Its id.
            under: The token under which the saga that runs it is held.
        """
        try:
            with answering(f"take the lease of saga {saga_id}"):
                return await self._ledger.acquire(saga_id, self.owner, under=under)
        except asyncio.CancelledError:
            # The ledger may carry it out all the same, and our heart would hold what nobody runs for as long as it beats for another saga.
            # In a task of its own: the caller may be cancelled more than once.
            with anyio.CancelScope(shield=True):
                await outlast({start(self._release_unknown(saga_id, under))})
            raise

    async def _release_unknown(self, saga_id: str, under: int | None) -> None:
        # Of a lease with a token that nobody knows: whoever holds it gets it once more, behind the first time, and with one that is known.
        with contextlib.suppress(LedgerError), answering(f"give the lease of saga {saga_id} back"):
            await self._ledger.release(saga_id, await self._ledger.acquire(saga_id, self.owner, under=under))


def _depth(lease: tuple[str, int]) -> int:
    """How many sagas that of a lease is within, at most: the id of one that a stage runs is its parent's, with a "/" and more behind it."""
    return lease[0].count("/")
