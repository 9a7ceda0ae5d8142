"""The forward run: a saga against the plain run that it protects, and how it grows."""

from __future__ import annotations

import asyncio
from statistics import median
from typing import TYPE_CHECKING

from bench.comparison import Result
from bench.rounds import interleaved, timed
from bench.spread import Spread, growth, ratios
from bench.tables import SPREAD, Mark, Table, mark_cells, show, spread_cells
from bench.workloads import SHAPES, FirstSaga, Plain, Saga, Silent, chain, pipeline

if TYPE_CHECKING:
    from bench.comparison import Effort
    from bench.rounds import Sample, Side

_NOT_SLOWER = Mark(1.0)
# Cost that grows with n log n fits an exponent of 1.24 between 10 and 1,000 stages, and n squared one of 2.
_LINEAR = Mark(1.1, unit="")


class Crowd:
    """Many runs at once."""

    def __init__(self, one: Side, size: int) -> None:
        """Run so many of it."""
        self._one = one
        self._size = size

    async def prepare(self) -> None:
        """Get ready for a round."""
        await self._one.prepare()

    async def run(self) -> None:
        """Run them all, and wait for all."""
        await asyncio.gather(*(self._one.run() for _ in range(self._size)))


async def against_plain(effort: Effort) -> Result:
    """Measure sagas against `Pipeline.run` of the same pipelines."""
    watched = Saga(pipeline(chain(10)), interceptors=[Silent()])
    cases: list[tuple[str, int, Side, Side]] = [
        ("chain of 5", 5, Plain(chain(5)), Saga(pipeline(chain(5)))),
        ("chain of 5, coordinator and pipeline new", 5, Plain(chain(5)), FirstSaga(pipeline(chain(5)))),
        ("chain of 10, an interceptor in the saga", 10, Plain(chain(10)), watched),
        ("chain of 10, the same interceptor in both", 10, Plain(chain(10), interceptors=[Silent()]), watched),
    ]
    for kind, shape in SHAPES.items():
        cases += [(f"{kind} of {size}", size, Plain(shape(size)), Saga(pipeline(shape(size)))) for size in effort.sizes]
    crowd = effort.crowds[-1]
    cases.append((f"{crowd} chains of 5 at once", crowd * 5, Crowd(Plain(chain(5)), crowd), Crowd(Saga(pipeline(chain(5))), crowd)))
    table = Table(
        "A saga with the memory ledger against plain Pipeline.run",
        ("what", "plain", "saga", "ratio", *SPREAD, "mark", "reached"),
    )
    result = Result([table])
    for label, stages, plain, saga in cases:
        runs = effort.runs_of(stages)
        values = await interleaved({"plain": timed(plain, runs), "saga": timed(saga, runs)}, effort.rounds_of(stages))
        ratio = ratios(values["saga"], values["plain"])
        table.rows.append(
            (
                label,
                *(show(median(values[side]), "s") for side in ("plain", "saga")),
                show(ratio.median, "x"),
                *spread_cells(ratio),
                *mark_cells(_NOT_SLOWER, ratio),
            )
        )
        result.raw[label] = values
    table.notes = [
        "plain: as it comes, with stageflow's default interceptors and 30 s timeout, which a saga leaves out.",
        "The same interceptor in both: it takes the place of stageflow's default ones in the plain run, which keeps its timeout.",
        "Coordinator and pipeline new: to make the one and to read and check the other is timed, too; for the others it was done before.",
    ]
    return result


async def by_size(effort: Effort) -> Result:
    """Measure how a saga grows with the number of its stages."""
    table = Table("A saga by the number of its stages", ("what", "saga", "per stage", *SPREAD))
    fits = Table("How it grows", ("what", "exponent", *SPREAD, "mark", "reached"))
    result = Result([table, fits])
    sizes = effort.growth_sizes
    for kind, shape in SHAPES.items():
        sides: dict[str, Sample[float]] = {str(size): timed(Saga(pipeline(shape(size))), effort.runs_of(size)) for size in sizes}
        values = await interleaved(sides, effort.rounds_of(max(sizes)))
        for size in sizes:
            each = Spread.of([seconds / size for seconds in values[str(size)]])
            whole = show(median(values[str(size)]), "s")
            table.rows.append((f"{kind} of {size}", whole, show(each.median, "s"), *spread_cells(each, "s")))
        exponent = growth(sizes, [values[str(size)] for size in sizes])
        label = f"{kind}, {sizes[0]} to {sizes[-1]}"
        fits.rows.append((label, show(exponent.median, ""), *spread_cells(exponent, ""), *mark_cells(_LINEAR, exponent)))
        result.raw |= {f"{kind} of {side}": {"seconds": seconds} for side, seconds in values.items()}
    fits.notes = ["The exponent p of cost = c * n**p, fitted on logarithmic axes to the medians; 1 is linear, n log n would be 1.24."]
    return result
