"""What the three databases say, read without the code that wrote them."""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from examples.order_fulfilment.bank import SHOP
from examples.order_fulfilment.orders import Order
from examples.order_fulfilment.shop import DATABASES


class Reservation(NamedTuple):
    """A row of the inventory, with its items."""

    key: str
    order_id: str
    is_undone: bool
    items: dict[str, int]


class Movement(NamedTuple):
    """A row of the bank."""

    key: str
    kind: str
    order_id: str
    giver: str
    taker: str
    cents: int
    reverses: str | None


class Receipt(NamedTuple):
    """A row of the bank, with what was captured for which order."""

    number: int
    key: str
    order_id: str
    cents: int
    is_undone: bool


class Shipment(NamedTuple):
    """A row of the carrier, with the parcel's items."""

    tracking: int
    key: str
    order_id: str
    address: str
    is_undone: bool
    items: dict[str, int]


@dataclass
class InForce:
    """What is in force for one order, all databases together.

    Attributes:
        reserved: The items of each reservation.
        money: What each account has more than without this order, in cents; those that differ.
        shipped: The address and the items of each parcel.
        receipts: The amount of each receipt, in cents.
    """

    reserved: list[dict[str, int]] = field(default_factory=list)
    money: dict[str, int] = field(default_factory=dict)
    shipped: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    receipts: list[int] = field(default_factory=list)

    @classmethod
    def fulfilled(cls, order: Order) -> Self:
        """What is in force for an order that was fulfilled; for any other, it is nothing."""
        return cls([order.items], {order.card: -order.cents, SHOP: order.cents}, [(order.address, order.items)], [order.cents])


@dataclass(frozen=True)
class Books:
    """All that the three databases hold."""

    shelf: dict[str, int]
    reservations: list[Reservation]
    accounts: dict[str, int]
    movements: list[Movement]
    receipts: list[Receipt]
    shipments: list[Shipment]
    damage: list[str]

    @cached_property
    def effects(self) -> dict[str, bool]:
        """Whether it is undone, for every effect that ever landed; by its idempotency key."""
        reversed_ = {movement.reverses for movement in self.movements}
        effects = {row.key: row.key in reversed_ for row in self.movements if row.reverses is None}
        effects |= {row.key: row.is_undone for row in self.reservations}
        effects |= {row.key: row.is_undone for row in self.shipments}
        effects |= {row.key: row.is_undone for row in self.receipts}
        return effects

    @cached_property
    def in_force(self) -> dict[str, InForce]:
        """What is in force, by order."""
        found: defaultdict[str, InForce] = defaultdict(InForce)
        for reservation in self.reservations:
            if not reservation.is_undone:
                found[reservation.order_id].reserved.append(reservation.items)
        for shipment in self.shipments:
            if not shipment.is_undone:
                found[shipment.order_id].shipped.append((shipment.address, shipment.items))
        for receipt in self.receipts:
            if not receipt.is_undone:
                found[receipt.order_id].receipts.append(receipt.cents)
        for order_id, moved in self._moved().items():
            found[order_id].money = {account: cents for account, cents in moved.items() if cents}
        return found

    def _moved(self) -> dict[str, Counter[str]]:
        moved: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for movement in self.movements:
            moved[movement.order_id][movement.giver] -= movement.cents
            moved[movement.order_id][movement.taker] += movement.cents
        return moved


def read_books(folder: Path) -> Books:
    """Read the databases.

    Raises:
        sqlite3.Error: One of them is missing, or is no database.
    """
    with ExitStack() as files:
        inventory, bank, carrier = databases = [files.enter_context(closing(_open(folder / name))) for name in DATABASES]
        reserved = _items(inventory, "SELECT reservation, sku, quantity FROM reserved_items")
        packed = _items(carrier, "SELECT tracking, sku, quantity FROM parcel_items")
        reservations = inventory.execute("SELECT key, order_id, released FROM reservations")
        movements = bank.execute("SELECT key, kind, order_id, giver, taker, cents, reverses FROM movements ORDER BY rowid")
        receipts = bank.execute("SELECT number, r.key, order_id, cents, cancelled FROM receipts r JOIN movements m ON m.key = capture")
        shipments = carrier.execute("SELECT tracking, key, order_id, address, cancelled FROM shipments")
        return Books(
            shelf=dict(inventory.execute("SELECT sku, quantity FROM shelf")),
            reservations=[Reservation(key, order, bool(released), reserved[key]) for key, order, released in reservations],
            accounts=dict(bank.execute("SELECT name, balance FROM accounts")),
            movements=[Movement(*row) for row in movements],
            receipts=[Receipt(number, key, order, cents, bool(cancelled)) for number, key, order, cents, cancelled in receipts],
            shipments=[
                Shipment(tracking, key, order, address, bool(cancelled), packed[tracking])
                for tracking, key, order, address, cancelled in shipments
            ],
            damage=[f"{name}: {damage}" for name, db in zip(DATABASES, databases, strict=True) for damage in _damage(db)],
        )


def _open(path: Path) -> sqlite3.Connection:
    # Unlike a plain path, this makes no new file where there is none.
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)


def _items(db: sqlite3.Connection, query: str) -> defaultdict[Any, dict[str, int]]:
    items: defaultdict[Any, dict[str, int]] = defaultdict(dict)
    for owner, sku, quantity in db.execute(query):
        items[owner][sku] = quantity
    return items


def _damage(db: sqlite3.Connection) -> Iterator[str]:
    for (answer,) in db.execute("PRAGMA integrity_check"):
        if answer != "ok":
            yield answer
    for table, row, parent, _ in db.execute("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} belongs to no row of {parent}"
