"""Shows how far the orders are."""

import time
from collections import Counter
from typing import TextIO

from saga import SagaReport

REFRESH = 0.1
"""Seconds between two looks of somebody who watches."""


class Progress:
    """Counts orders: in one line that is rewritten on a terminal, else in a new line for every tenth of them."""

    def __init__(self, total: int, out: TextIO) -> None:
        """Start the clock.

        Args:
            total: How many orders there are.
            out: Where to show it.
        """
        self._total = total
        self._out = out
        self._counts: Counter[str] = Counter()
        self._began = time.monotonic()
        self._shown = 0.0

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def count(self, report: SagaReport) -> None:
        """Count an order that has ended."""
        self._counts[report.status] += 1
        done = self._counts.total()
        if self._out.isatty():
            if self.seconds - self._shown > REFRESH or done == self._total:
                self._shown = self.seconds
                self._out.write(f"\r{self}")
                self._out.flush()
        elif done == self._total or done % max(1, self._total // 10) == 0:
            self._out.write(f"{self}\n")
            self._out.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._out.isatty():
            self._out.write(f"\r{self}\n")

    def __str__(self) -> str:
        """How far it is."""
        done = self._counts.total()
        counts = ", ".join(f"{count:,} {status}" for status, count in sorted(self._counts.items(), reverse=True))
        return f"  {done:6,} of {self._total:,} orders, {self.seconds:5.1f} s: {counts}"
