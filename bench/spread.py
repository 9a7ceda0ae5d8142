"""Numbers with their spread: a median, its quartiles and its 95 % interval."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Spread:
    """One statistic over the rounds of a measurement.

    Attributes:
        median: The middle.
        lower: The first quartile.
        upper: The third quartile.
        low: The lower end of the median's 95 % interval.
        high: The upper end.
        rounds: How many values it is made of.

    The interval is read off the sorted values (the k-th smallest and the k-th largest, k by the binomial distribution), so it
    assumes nothing of their distribution. With fewer than six values there is no such pair: then it is the whole range.
    Source: Conover, "Practical Nonparametric Statistics", 3rd edition, section 3.2.
    """

    median: float
    lower: float
    upper: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up one value per round; at least two."""
        ranked = sorted(values)
        lower, _, upper = statistics.quantiles(ranked, n=4, method="inclusive")
        outside = _outside(len(ranked))
        return cls(statistics.median(ranked), lower, upper, ranked[outside], ranked[-1 - outside], len(ranked))


def _outside(count: int) -> int:
    """How many values may be left out at either end with at most 2.5 % of the probability."""
    below = 0.0
    for dropped in range(count):
        below += math.comb(count, dropped) / 2**count
        if below > 0.025:
            return dropped if dropped == 0 else dropped - 1
    raise AssertionError("half of the probability lies below the middle")


def ratios(after: Sequence[float], before: Sequence[float]) -> Spread:
    """How many times as much `after` is as `before`, round by round."""
    return Spread.of([ours / theirs for ours, theirs in zip(after, before, strict=True)])


def growth(sizes: Sequence[int], costs: Sequence[Sequence[float]]) -> Spread:
    """The exponent p of the power law `cost = c * size**p` that fits best on logarithmic axes; 1 is linear.

    It is fitted to the medians over the rounds; its spread is that of fits to rounds drawn anew with replacement.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Args:
        sizes: The sizes.
        costs: For each size, one cost per round, in the same order of rounds.
    """
    draw, rounds = random.Random(1), range(len(costs[0]))  # noqa: S311 - a fixed seed: the same rounds give the same interval
    fits = []
    for _ in range(1000):
        drawn = draw.choices(rounds, k=len(rounds))
        fits.append(_exponent(sizes, [statistics.median([cost[number] for number in drawn]) for cost in costs]))
    quartiles = statistics.quantiles(fits, n=4, method="inclusive")
    ends = statistics.quantiles(fits, n=40, method="inclusive")
    median = _exponent(sizes, [statistics.median(cost) for cost in costs])
    return Spread(median, quartiles[0], quartiles[-1], ends[0], ends[-1], len(rounds))


def _exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    # On a machine so busy that noise has eaten a small cost there is still an answer, with an interval that says what it is worth.
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(max(cost, 1e-9)) for cost in costs]).slope
