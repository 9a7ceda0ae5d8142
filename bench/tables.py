"""How the numbers are shown: plain text in columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.spread import Spread


@dataclass(frozen=True, slots=True)
class Mark:
    """A number that a measurement is to reach: at most so much.

    Attributes:
        most: The number.
        unit: How to show it.
    """

    most: float
    unit: str = "x"

    def __str__(self) -> str:
        """Show it as a bound."""
        return f"<= {show(self.most, self.unit)}"

    def verdict(self, measured: Spread) -> str:
        """Say whether it is reached; `open` when the 95 % interval lies on both sides of it."""
        if measured.low <= self.most < measured.high:
            return "open"
        return "yes" if measured.high <= self.most else "no"


@dataclass(slots=True)
class Table:
    """One comparison as it is shown.

    Attributes:
        title: What was compared.
        columns: The headings; the first column is text and the others are numbers.
        rows: As many cells each as there are headings.
        notes: What a reader has to know to understand the numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Lay it out."""
        widths = [max(len(cell) for cell in column) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [self.title, "-" * len(self.title), _line(self.columns, widths)]
        lines += [_line(row, widths) for row in self.rows]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1])] + [cell.rjust(width) for cell, width in rest]).rstrip()


def show(value: float, unit: str) -> str:
    """Show a number of seconds ("s"), of bytes ("B"), a ratio ("x") or a bare number ("")."""
    match unit:
        case "s" if abs(value) < 0.9995e-3:
            return f"{value * 1e6:.3g} us" if abs(value) < 99.95e-6 else f"{value * 1e6:.0f} us"
        case "s":
            return f"{value * 1e3:.2f} ms" if abs(value) < 99.995e-3 else f"{value * 1e3:.0f} ms"
        case "B":
            return f"{value / 2**20:.1f} MiB"
        case "x":
            return f"{value:.2f}x"
        case _:
            return f"{value:.3f}"


SPREAD = ("95 % interval", "quartiles")
"""The headings of what `spread_cells` gives."""


def spread_cells(spread: Spread, unit: str = "x") -> tuple[str, str]:
    """Show how far a statistic spreads."""

    def shown(value: float) -> str:
        return show(value, unit).removesuffix("x")

    return f"[{shown(spread.low)}, {shown(spread.high)}]", f"[{shown(spread.lower)}, {shown(spread.upper)}]"


def mark_cells(mark: Mark | None, measured: Spread) -> tuple[str, str]:
    """Show a mark and whether it is reached."""
    return ("-", "-") if mark is None else (str(mark), mark.verdict(measured))
