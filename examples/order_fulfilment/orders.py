"""What is ordered."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0, strict=True)]


class Line(BaseModel):
    """So many of one item, at the price that was agreed.

    Attributes:
        sku: The item.
        quantity: How many.
        unit_cents: The price of one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sku: Text
    quantity: Count
    unit_cents: Count


class Order(BaseModel):
    """One order: one line of JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Text
    card: Text
    address: Text
    lines: Annotated[tuple[Line, ...], Field(min_length=1)]

    @property
    def cents(self) -> int:
        """What it costs."""
        return sum(line.quantity * line.unit_cents for line in self.lines)

    @property
    def items(self) -> dict[str, int]:
        """How many of which item."""
        items: dict[str, int] = {}
        for line in self.lines:
            items[line.sku] = items.get(line.sku, 0) + line.quantity
        return items


def read_orders(path: Path) -> list[Order]:
    """Read a JSON-lines file of orders.

    Raises:
        ValueError: A line holds no order, or an order twice; the message names the line.
        OSError: The file can't be read.
    """
    orders: dict[str, Order] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            order = Order.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path.name}, line {number}: expected an order, got {where or 'a line'}: {first['msg']}") from None
        if order.id in orders:
            raise ValueError(f"{path.name}, line {number}: expected a new order, got {order.id} again")
        orders[order.id] = order
    return list(orders.values())
