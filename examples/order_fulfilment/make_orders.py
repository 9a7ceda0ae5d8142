"""Writes orders.jsonl: 1,000 orders, the same ones whenever and wherever it runs.

Run it from the root of the repository: `python -m examples.order_fulfilment.make_orders`
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

from examples.order_fulfilment.opening import ADDRESSES, CREDIT, PRICES
from examples.order_fulfilment.orders import Line, Order

T = TypeVar("T")

PATH: Final = Path(__file__).with_name("orders.jsonl")
SEED: Final = 1987
"""The year of Garcia-Molina and Salem's "Sagas"."""

NOWHERE: Final = ("Atlantis", "Avalon", "El Dorado", "Shangri-La")
CARDS: Final = [card for card in CREDIT if card.startswith("card-")]
STUDENT_CARDS: Final = [card for card in CREDIT if card.startswith("student-card-")]
EVERYDAY: Final = [sku for sku in PRICES if sku not in {"signed print", "moon lamp"}]


class Dice:
    """Random choices that no version of Python makes differently: of its generators, only `random()` is guaranteed to stay."""

    def __init__(self, seed: int) -> None:
        """Start from a seed."""
        self._random = random.Random(seed)

    def pick(self, choices: Sequence[T]) -> T:
        """Choose one."""
        return choices[int(self._random.random() * len(choices))]

    def roll(self) -> int:
        """Choose a number from 0 to 99."""
        return self.pick(range(100))


def make_order(number: int, dice: Dice) -> Order:
    """Make one order; out of a hundred, about fifteen ask for what can't be had, and another seven for what not all can have."""
    card, address = dice.pick(CARDS), dice.pick(ADDRESSES)
    items = {dice.pick(EVERYDAY): 1 + dice.pick(range(4)) for _ in range(1 + dice.pick(range(3)))}
    match dice.roll():
        case 0 | 1 | 2 | 3 | 4:
            address = dice.pick(NOWHERE)
        case 5 | 6 | 7 | 8 | 9:
            items["moon lamp"] = 1
        case 10 | 11 | 12 | 13 | 14:
            card, items = dice.pick(STUDENT_CARDS), items | {"gooseneck kettle": 1}
        case 15 | 16 | 17 | 18:
            items["signed print"] = 1
        case 19 | 20 | 21:
            card = "club-card"
    lines = tuple(Line(sku=sku, quantity=quantity, unit_cents=PRICES[sku]) for sku, quantity in items.items())
    return Order(id=f"order-{number:04}", card=card, address=address, lines=lines)


def make_orders() -> bytes:
    """Make the whole file."""
    dice = Dice(SEED)
    return b"".join(make_order(number, dice).model_dump_json().encode() + b"\n" for number in range(1, 1_001))


if __name__ == "__main__":
    PATH.write_bytes(make_orders())
