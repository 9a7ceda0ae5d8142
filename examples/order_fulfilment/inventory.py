"""The stock: items on the shelf, and items set aside for an order."""

import sqlite3
from collections.abc import Mapping

from examples.order_fulfilment.database import Database


class OutOfStock(Exception):
    """There are fewer on the shelf than were asked for; nothing was set aside."""


class Inventory(Database):
    """Every item is either on the shelf or set aside under a reservation, and the shelf can't hold less than nothing."""

    SCHEMA = """
        CREATE TABLE IF NOT EXISTS shelf (
            sku      TEXT PRIMARY KEY,
            quantity INTEGER NOT NULL CHECK (quantity >= 0)
        );
        CREATE TABLE IF NOT EXISTS reservations (
            key      TEXT PRIMARY KEY,
            order_id TEXT NOT NULL,
            released INTEGER NOT NULL DEFAULT 0 CHECK (released IN (0, 1))
        );
        CREATE UNIQUE INDEX IF NOT EXISTS one_reservation_per_order ON reservations (order_id) WHERE NOT released;
        CREATE TABLE IF NOT EXISTS reserved_items (
            reservation TEXT NOT NULL REFERENCES reservations (key),
            sku         TEXT NOT NULL REFERENCES shelf (sku),
            quantity    INTEGER NOT NULL CHECK (quantity > 0),
            PRIMARY KEY (reservation, sku)
        );
    """

    async def stock_up(self, stock: Mapping[str, int]) -> None:
        """Put the first items on the shelf."""
        await self.write("INSERT INTO shelf VALUES (?, ?)", *stock.items())

    async def reserve(self, key: str, order_id: str, items: Mapping[str, int]) -> None:
        """Set items aside under a key; to ask again with the same key changes nothing.

        Raises:
            OutOfStock: The shelf has too few of one of them.
        """

        def work(db: sqlite3.Connection) -> None:
            insert = "INSERT INTO reservations (key, order_id) VALUES (?, ?) ON CONFLICT (key) DO NOTHING"
            if not db.execute(insert, (key, order_id)).rowcount:
                return
            for sku, quantity in items.items():
                try:
                    db.execute("UPDATE shelf SET quantity = quantity - ? WHERE sku = ?", (quantity, sku))
                    db.execute("INSERT INTO reserved_items VALUES (?, ?, ?)", (key, sku, quantity))
                except sqlite3.IntegrityError as refused:
                    raise OutOfStock(f"there aren't {quantity} x {sku} on the shelf") from refused

        await self.transact(work)

    async def release(self, key: str) -> None:
        """Put a reservation's items back on the shelf; does nothing when that was done before."""

        def work(db: sqlite3.Connection) -> None:
            if not db.execute("UPDATE reservations SET released = 1 WHERE key = ? AND NOT released", (key,)).rowcount:
                return
            for sku, quantity in db.execute("SELECT sku, quantity FROM reserved_items WHERE reservation = ?", (key,)).fetchall():
                db.execute("UPDATE shelf SET quantity = quantity + ? WHERE sku = ?", (quantity, sku))

        await self.transact(work)

    async def has_reserved(self, key: str) -> bool:
        """Whether items were set aside under this key."""
        return await self.first("SELECT key FROM reservations WHERE key = ?", key) is not None
