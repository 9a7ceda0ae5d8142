"""What the airline, the hotels and the bank have on file, in one SQLite file."""

import asyncio
from collections import defaultdict
from pathlib import Path

from examples.order_fulfilment.database import Database

DECLINED = "4000000000000002"
NEEDS_APPROVAL = "4000000000003220"
TAKES_NOTHING_BACK = "Hotel California"


class CardDeclined(Exception):
    """The bank pays nothing from this card."""


class NoCancellation(Exception):
    """The hotel takes no booking back."""


class Bookings(Database):
    """Each booking is known by the key of the request that made it: a repeated request makes none, and cancels none twice."""

    SCHEMA = "CREATE TABLE IF NOT EXISTS bookings (key TEXT PRIMARY KEY, what TEXT NOT NULL, detail TEXT NOT NULL);"

    def __init__(self, path: Path) -> None:
        """Open the file, and make it if it is not there."""
        super().__init__(path)
        self._approvals: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def book(self, key: str, what: str, detail: str) -> None:
        """Book a seat or a room."""
        await self.write("INSERT OR IGNORE INTO bookings VALUES (?, ?, ?)", (key, what, detail))

    async def charge(self, key: str, card: str) -> None:
        """Charge a card, when its owner has approved that."""
        if card == DECLINED:
            raise CardDeclined(card)
        if card == NEEDS_APPROVAL:
            await self._approvals[card].wait()
        await self.book(key, "charge", card)

    def approve(self, card: str) -> None:
        """Take the owner's approval of what is charged to the card."""
        self._approvals[card].set()

    async def has(self, key: str) -> bool:
        """Whether the request with this key has made a booking that stands."""
        return await self.first("SELECT 1 FROM bookings WHERE key = ?", key) is not None

    async def cancel(self, key: str) -> None:
        """Take back what the request with this key has booked."""
        if await self.first("SELECT detail FROM bookings WHERE key = ?", key) == TAKES_NOTHING_BACK:
            raise NoCancellation(TAKES_NOTHING_BACK)
        await self.write("DELETE FROM bookings WHERE key = ?", (key,))
