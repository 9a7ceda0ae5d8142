"""What one comparison is asked for and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.tables import Table


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        sizes: Numbers of stages.
        growth_sizes: Numbers of stages between which growth is fitted.
        crowds: How many sagas run at once.
        rounds: Rounds of short runs.
        long_rounds: Rounds of runs of 1,000 stages.
        imports: Rounds of imports, each in a process of its own.
    """

    sizes: tuple[int, ...]
    growth_sizes: tuple[int, ...]
    crowds: tuple[int, ...]
    rounds: int
    long_rounds: int
    imports: int

    def rounds_of(self, stages: int) -> int:
        """How many rounds to measure of runs of so many stages in all."""
        return self.rounds if stages < 1000 else self.long_rounds

    def runs_of(self, stages: int) -> int:
        """How many runs make one sample: enough for several milliseconds."""
        return max(1, 100 // stages)


FULL = Effort(sizes=(10, 100, 1000), growth_sizes=(10, 30, 100, 300, 1000), crowds=(100, 1000), rounds=40, long_rounds=16, imports=15)
QUICK = Effort(sizes=(10, 100), growth_sizes=(10, 30, 100), crowds=(20,), rounds=4, long_rounds=4, imports=2)


@dataclass(slots=True)
class Result:
    """What a comparison gives.

    Attributes:
        tables: For people.
        raw: For machines: by what was compared, by side, one number per round, in seconds or bytes.
    """

    tables: list[Table] = field(default_factory=list)
    raw: dict[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)


Comparison = Callable[[Effort], Coroutine[Any, Any, Result]]
