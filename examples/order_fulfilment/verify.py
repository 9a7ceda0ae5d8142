"""Fails an order everywhere, and looks each time whether the three databases are where the report says: the matrix on standard output.

python -m examples.order_fulfilment.verify
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from examples.order_fulfilment.books import InForce, read_books
from examples.order_fulfilment.fulfilment import POLICY
from examples.order_fulfilment.opening import ADDRESSES
from examples.order_fulfilment.orders import Line, Order
from examples.order_fulfilment.shop import Shop
from examples.order_fulfilment.stages import order_pipeline
from saga.testing import Verification, verify

ORDER = Order(id="order-1", card="card-001", address=ADDRESSES[0], lines=(Line(sku="teapot", quantity=2, unit_cents=24_50),))


class ShopWorld(Shop):
    """The shop, as `saga.testing` looks at it."""

    def look(self) -> dict[str, Any]:
        """What is on the shelf, who has how much, and what is in force for the order; without the traces that undoing leaves."""
        books = read_books(self.folder)
        accounts = {name: cents for name, cents in books.accounts.items() if cents or not name.startswith("hold ")}
        in_force = {order_id: found for order_id, found in books.in_force.items() if found != InForce()}
        return {"damage": books.damage, "shelf": books.shelf, "accounts": accounts, "in force": in_force}


async def verify_order(folder: Path) -> Verification:
    """Fail an order that would succeed, in databases in a folder."""
    with ShopWorld(folder) as shop:
        return await verify(order_pipeline(shop.stages), POLICY, shop, input_text=ORDER.model_dump_json())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(asyncio.run(verify_order(Path(folder))))
