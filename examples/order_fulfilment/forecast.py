"""How each order has to end, told before the first one runs from what is ordered and what there is."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from examples.order_fulfilment.bank import CardDeclined
from examples.order_fulfilment.carrier import UnknownAddress
from examples.order_fulfilment.inventory import OutOfStock
from examples.order_fulfilment.opening import ADDRESSES, CREDIT, STOCK
from examples.order_fulfilment.orders import Order

Refusal = type[OutOfStock] | type[CardDeclined] | type[UnknownAddress]


@dataclass(frozen=True)
class Prospects:
    """What can come of an order as long as nothing breaks.

    Attributes:
        can_succeed: There are the stock, the credit and the address for it.
        refusals: How it may be refused. If it also can succeed, others want the same stock or credit, and there isn't enough for all.
    """

    can_succeed: bool
    refusals: frozenset[Refusal]

    @property
    def are_certain(self) -> bool:
        """Whether nothing but a fault can keep it from being fulfilled."""
        return not self.refusals


def prospects(orders: Iterable[Order]) -> dict[str, Prospects]:
    """The prospects of every order, by its id, when all of them are run at once."""
    orders = list(orders)
    wanted: Counter[str] = Counter()
    charged: Counter[str] = Counter()
    for order in orders:
        wanted.update(order.items)
        charged[order.card] += order.cents
    return {order.id: _prospects(order, wanted, charged) for order in orders}


def _prospects(order: Order, wanted: Counter[str], charged: Counter[str]) -> Prospects:
    refusals: set[Refusal] = set()
    if any(wanted[sku] > STOCK.get(sku, 0) for sku in order.items):
        refusals.add(OutOfStock)
    if charged[order.card] > CREDIT.get(order.card, 0):
        refusals.add(CardDeclined)
    if order.address not in ADDRESSES:
        refusals.add(UnknownAddress)
    can_succeed = (
        all(quantity <= STOCK.get(sku, 0) for sku, quantity in order.items.items())
        and order.cents <= CREDIT.get(order.card, 0)
        and order.address in ADDRESSES
    )
    return Prospects(can_succeed=can_succeed, refusals=frozenset(refusals))
