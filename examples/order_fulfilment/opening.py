"""What the shop has before the first order: stock, the credit on its customers' cards, known addresses."""

from typing import Final

PRICES: Final = {
    "espresso beans 1 kg": 18_99,
    "filter papers": 4_49,
    "gooseneck kettle": 39_95,
    "hand grinder": 59_00,
    "milk jug": 16_50,
    "mug": 8_90,
    "scale": 29_99,
    "teapot": 24_50,
    "thermos": 32_75,
    "tray": 21_99,
    "signed print": 45_00,
    "moon lamp": 75_25,
}
"""Cents for one."""

STOCK: Final = dict.fromkeys(PRICES, 1_500) | {"signed print": 25, "moon lamp": 0}
"""Items on the shelf. More signed prints are wanted than there are, and moon lamps are sold out."""

CREDIT: Final = (
    {f"card-{number:03}": 2_000_00 for number in range(1, 251)}
    | {f"student-card-{number}": 20_00 for number in range(1, 10)}
    | {"club-card": 1_500_00}
)
"""Cents that can be spent with each card. A student's is soon spent, and the club's members share one."""

ADDRESSES: Final = ("Aarhus", "Bergen", "Bremen", "Ghent", "Gothenburg", "Leith", "Oulu", "Riga", "Tallinn", "Turku", "Utrecht", "Visby")
"""Where the carrier goes."""


def euros(cents: int) -> str:
    """Write an amount for people."""
    sign = "-" if cents < 0 else ""
    return f"{sign}EUR {abs(cents) // 100:,}.{abs(cents) % 100:02}"
