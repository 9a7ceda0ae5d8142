"""The parcels, and the addresses to which they can go."""

import sqlite3
from collections.abc import Iterable, Mapping

from examples.order_fulfilment.database import Database


class UnknownAddress(Exception):
    """The carrier doesn't go there; nothing was shipped."""


class Carrier(Database):
    """A shipment goes to a known address, and an order is in one parcel at most."""

    SCHEMA = """
        CREATE TABLE IF NOT EXISTS addresses (
            name TEXT PRIMARY KEY
        );
        CREATE TABLE IF NOT EXISTS shipments (
            tracking  INTEGER PRIMARY KEY,
            key       TEXT NOT NULL UNIQUE,
            order_id  TEXT NOT NULL,
            address   TEXT NOT NULL REFERENCES addresses (name),
            cancelled INTEGER NOT NULL DEFAULT 0 CHECK (cancelled IN (0, 1))
        );
        CREATE UNIQUE INDEX IF NOT EXISTS one_parcel_per_order ON shipments (order_id) WHERE NOT cancelled;
        CREATE TABLE IF NOT EXISTS parcel_items (
            tracking INTEGER NOT NULL REFERENCES shipments (tracking),
            sku      TEXT NOT NULL,
            quantity INTEGER NOT NULL CHECK (quantity > 0),
            PRIMARY KEY (tracking, sku)
        );
    """

    async def learn_addresses(self, addresses: Iterable[str]) -> None:
        """Note where the carrier goes."""
        await self.write("INSERT INTO addresses VALUES (?)", *((address,) for address in addresses))

    async def ship(self, key: str, order_id: str, address: str, items: Mapping[str, int]) -> int:
        """Ship a parcel, and give its tracking number: the same one whenever the key is the same.

        Raises:
            UnknownAddress: The carrier doesn't go there.
        """

        def work(db: sqlite3.Connection) -> int:
            insert = "INSERT INTO shipments (key, order_id, address) VALUES (?, ?, ?) ON CONFLICT (key) DO NOTHING"
            try:
                is_new = db.execute(insert, (key, order_id, address)).rowcount
            except sqlite3.IntegrityError as refused:
                raise UnknownAddress(f"the carrier doesn't go to {address}") from refused
            tracking = int(db.execute("SELECT tracking FROM shipments WHERE key = ?", (key,)).fetchone()[0])
            if is_new:
                rows = [(tracking, sku, quantity) for sku, quantity in items.items()]
                db.executemany("INSERT INTO parcel_items VALUES (?, ?, ?)", rows)
            return tracking

        return await self.transact(work)

    async def cancel(self, key: str) -> None:
        """Call a parcel back; to cancel it again changes nothing."""
        await self.write("UPDATE shipments SET cancelled = 1 WHERE key = ?", (key,))

    async def tracking_number(self, key: str) -> int | None:
        """The tracking number of the parcel that was shipped under this key, or None."""
        tracking: int | None = await self.first("SELECT tracking FROM shipments WHERE key = ?", key)
        return tracking
