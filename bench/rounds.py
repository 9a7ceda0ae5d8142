"""Measuring in turns: A, B, B, A, ... in one process, so that a machine that slows down slows both sides."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Protocol, TypeVar

T = TypeVar("T")
Sample = Callable[[], Awaitable[T]]
"""Takes one measurement."""


class Side(Protocol):
    """One side of a comparison: something to run again and again."""

    async def prepare(self) -> None:
        """Get ready for a round of runs; not timed."""
        ...

    async def run(self) -> None:
        """Run it once; timed."""
        ...


async def settled(side: Side) -> None:
    """Get a side ready for a round.

    The garbage collector is on, as it is for users; it starts every round with nothing left over from the one before.
    """
    await side.prepare()
    gc.collect()


def timed(side: Side, runs: int) -> Sample[float]:
    """Make a sample of the seconds that one run takes: the mean of so many runs in a row."""

    async def sample() -> float:
        await settled(side)
        begin = perf_counter()
        for _ in range(runs):
            await side.run()
        return (perf_counter() - begin) / runs

    return sample


async def interleaved(sides: Mapping[str, Sample[T]], rounds: int) -> dict[str, list[T]]:
    """Take one sample of every side in every round, in alternating order; the i-th values of all sides are of one round.

    One round more is run before, and thrown away.
    """
    samples: dict[str, list[T]] = {name: [] for name in sides}
    there, back = list(sides), list(reversed(list(sides)))
    for number in range(rounds + 1):
        for name in there if number % 2 else back:
            sample = await sides[name]()
            if number:
                samples[name].append(sample)
    return samples
