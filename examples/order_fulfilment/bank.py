"""The money, by double entry: whatever one account gets, another one gives."""

import sqlite3
from collections.abc import Mapping

from examples.order_fulfilment.database import Database
from examples.order_fulfilment.opening import euros

SHOP = "shop"


class CardDeclined(Exception):
    """The card has less credit left than was asked for; nothing was moved."""


class Bank(Database):
    """Cards, the shop, and the money held between them: all are accounts, and none can go below zero.

    This one constraint is a card's limit, and it keeps a hold from being captured twice, or voided after its capture.
    A movement is the only way to change a balance, and it changes two; so money is never made.
    """

    SCHEMA = """
        CREATE TABLE IF NOT EXISTS accounts (
            name    TEXT PRIMARY KEY,
            balance INTEGER NOT NULL CHECK (balance >= 0)
        );
        CREATE TABLE IF NOT EXISTS movements (
            key      TEXT PRIMARY KEY,
            kind     TEXT NOT NULL CHECK (kind IN ('authorise', 'capture', 'refund', 'void')),
            order_id TEXT NOT NULL,
            giver    TEXT NOT NULL REFERENCES accounts (name),
            taker    TEXT NOT NULL REFERENCES accounts (name) CHECK (taker <> giver),
            cents    INTEGER NOT NULL CHECK (cents > 0),
            reverses TEXT UNIQUE REFERENCES movements (key)
        );
        CREATE TRIGGER IF NOT EXISTS money_moves AFTER INSERT ON movements BEGIN
            UPDATE accounts SET balance = balance - new.cents WHERE name = new.giver;
            UPDATE accounts SET balance = balance + new.cents WHERE name = new.taker;
        END;
        CREATE TABLE IF NOT EXISTS receipts (
            number    INTEGER PRIMARY KEY,
            key       TEXT NOT NULL UNIQUE,
            capture   TEXT NOT NULL UNIQUE REFERENCES movements (key),
            cancelled INTEGER NOT NULL DEFAULT 0 CHECK (cancelled IN (0, 1))
        );
    """

    async def open_accounts(self, credit: Mapping[str, int]) -> None:
        """Open the shop's account with nothing in it, and one for every card."""
        await self.write("INSERT INTO accounts VALUES (?, ?)", (SHOP, 0), *credit.items())

    async def authorise(self, key: str, order_id: str, card: str, cents: int) -> None:
        """Hold money from a card; to ask again with the same key changes nothing.

        Raises:
            CardDeclined: The card has less than that left, or there is no such card.
        """
        hold = f"hold {key}"

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO accounts VALUES (?, 0) ON CONFLICT (name) DO NOTHING", (hold,))
            try:
                _move(db, (key, "authorise", order_id, card, hold, cents))
            except sqlite3.IntegrityError as refused:
                raise CardDeclined(f"{card} can't give {euros(cents)}") from refused

        await self.transact(work)

    async def capture(self, key: str, authorisation: str) -> None:
        """Give the shop what is held; to ask again with the same key changes nothing."""

        def work(db: sqlite3.Connection) -> None:
            order_id, hold, cents = db.execute(
                "SELECT order_id, taker, cents FROM movements WHERE key = ? AND kind = 'authorise'", (authorisation,)
            ).fetchone()
            _move(db, (key, "capture", order_id, hold, SHOP, cents))

        await self.transact(work)

    async def refund(self, key: str, capture: str) -> None:
        """Give back what was captured; does nothing when that was done before."""
        await self._reverse(key, "refund", capture)

    async def void(self, key: str, authorisation: str) -> None:
        """Give back what is held; does nothing when that was done before."""
        await self._reverse(key, "void", authorisation)

    async def _reverse(self, key: str, kind: str, movement: str) -> None:
        # A movement is reversed once, whatever the keys under which that is asked for.
        await self.write(
            "INSERT INTO movements SELECT ?, ?, order_id, taker, giver, cents, key FROM movements WHERE key = ? ON CONFLICT DO NOTHING",
            (key, kind, movement),
        )

    async def has_moved(self, key: str) -> bool:
        """Whether money was moved under this key."""
        return await self.first("SELECT key FROM movements WHERE key = ?", key) is not None

    async def issue_receipt(self, key: str, capture: str) -> int:
        """Issue a receipt for what was captured, and give its number: the same one whenever the key is the same."""
        await self.write("INSERT INTO receipts (key, capture) VALUES (?, ?) ON CONFLICT (key) DO NOTHING", (key, capture))
        return int(await self.first("SELECT number FROM receipts WHERE key = ?", key))

    async def cancel_receipt(self, key: str) -> None:
        """Cancel a receipt, whose number stays taken; to cancel it again changes nothing."""
        await self.write("UPDATE receipts SET cancelled = 1 WHERE key = ?", (key,))

    async def receipt_number(self, key: str) -> int | None:
        """The number of the receipt that was issued under this key, or None."""
        number: int | None = await self.first("SELECT number FROM receipts WHERE key = ?", key)
        return number


def _move(db: sqlite3.Connection, movement: tuple[str, str, str, str, str, int]) -> None:
    db.execute(
        "INSERT INTO movements (key, kind, order_id, giver, taker, cents) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
        movement,
    )
