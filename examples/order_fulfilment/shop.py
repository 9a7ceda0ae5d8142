"""The three databases, and the stages that work on them."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final, Self

from examples.order_fulfilment.bank import Bank
from examples.order_fulfilment.carrier import Carrier
from examples.order_fulfilment.inventory import Inventory
from examples.order_fulfilment.opening import ADDRESSES, CREDIT, STOCK
from examples.order_fulfilment.stages import OrderStage, order_stages

DATABASES: Final = ("inventory.sqlite", "bank.sqlite", "carrier.sqlite")


class Shop:
    """Inventory, bank and carrier; to be closed at the end of a `with` block.

    Attributes:
        folder: Where their files are.
        stages: The stages of an order, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Open the databases, and make those that are not there."""
        self.folder = folder
        self._files = ExitStack()
        self._inventory = self._files.enter_context(closing(Inventory(folder / DATABASES[0])))
        self._bank = self._files.enter_context(closing(Bank(folder / DATABASES[1])))
        self._carrier = self._files.enter_context(closing(Carrier(folder / DATABASES[2])))
        self.stages: dict[str, OrderStage] = order_stages(self._inventory, self._bank, self._carrier)

    async def reset(self) -> None:
        """Put everything to where it is before the first order."""
        for database in (self._inventory, self._bank, self._carrier):
            await database.clear()
        await self._inventory.stock_up(STOCK)
        await self._bank.open_accounts(CREDIT)
        await self._carrier.learn_addresses(ADDRESSES)

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the databases."""
        self._files.close()
