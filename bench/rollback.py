"""The backward run: five steps side by side with sagaz, and what one compensation costs."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from bench.comparison import Result
from bench.floor import Floor
from bench.peers.sagaz import Sagaz, SagazSaga
from bench.rounds import interleaved, settled, timed
from bench.spread import Spread, ratios
from bench.tables import SPREAD, Mark, Table, mark_cells, show, spread_cells
from bench.workloads import SHAPES, Bare, MeasurementError, Plain, Saga, Stamped, StampedFailure, Stamps, chain, pipeline
from saga import SagaStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.comparison import Effort
    from bench.rounds import Sample, Side
    from bench.workloads import Shape

_AHEAD = Mark(1.0)
_CHEAP = Mark(10e-6, unit="s")
_ABSENT = "sagaz is not installed (pip install sagaz==1.5.0), so its side of this comparison is missing."
_LEAN = "sagaz, listeners off"
_ANEW = "sagaz, built for each run"


def _failing_saga(shape: Shape, stamps: Stamps) -> Saga:
    return Saga(pipeline(shape, Stamped(stamps), last=StampedFailure(stamps)), SagaStatus.COMPENSATED)


async def five_steps(effort: Effort) -> Result:
    """Measure a chain of five, its success and its rollback, side by side with sagaz."""
    shape, stamps = chain(5), Stamps()
    success: dict[str, Side] = {"saga": Saga(pipeline(shape)), "floor": Floor(shape)}
    success |= {"plain stageflow": Plain(shape), "bare stageflow": Bare(shape)}
    rollback: dict[str, Side] = {"saga": _failing_saga(shape, stamps)}
    sagaz = Sagaz.find()
    if sagaz is not None:
        for sides, noted in ((success, None), (rollback, stamps)):
            sides["sagaz"] = SagazSaga(sagaz, shape, noted)
            sides[_LEAN] = SagazSaga(sagaz, shape, noted, listeners=False)
            sides[_ANEW] = SagazSaga(sagaz, shape, noted, anew=True)
    table = Table("Five steps in a chain, side by side", ("what", "time", "saga is", *SPREAD, "mark", "reached"))
    result = Result([table])
    for label, sides in (("success", success), ("rollback of 4", rollback)):
        values = await interleaved({name: timed(side, effort.runs_of(5)) for name, side in sides.items()}, effort.rounds)
        table.rows += _side_by_side(label, values)
        result.raw[label] = values
    table.notes = [
        "saga is: saga's time divided by that row's. bare stageflow: no interceptors and no timeout.",
        "floor: the same contexts, events, fold, tasks and report, without a policy, a ledger, a cancel or a failure that anybody heeds.",
        "rollback: the fifth step raises, four are compensated; the whole run is timed.",
    ]
    if sagaz is None:
        table.notes.append(_ABSENT)
    else:
        table.notes.append(
            "sagaz is one object that is run again and again. Sagas that run at once need one each, so it is built for each run, too."
        )
        least = ratios(result.raw["success"]["floor"], result.raw["success"]["sagaz"])
        table.notes.append(f"The floor itself takes {show(least.median, 'x')} of sagaz's time, {spread_cells(least)[0]}.")
    return result


def _side_by_side(label: str, values: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for side, seconds in values.items():
        own = (f"{label}: {side}", show(Spread.of(seconds).median, "s"))
        if side == "saga":
            rows.append((*own, "-", "-", "-", "-", "-"))
            continue
        ratio = ratios(values["saga"], seconds)
        mark = None if side in {"floor", "bare stageflow", _ANEW} else _AHEAD
        rows.append((*own, show(ratio.median, "x"), *spread_cells(ratio), *mark_cells(mark, ratio)))
    return rows


def _stamped(side: Side, stamps: Stamps, stages: int, runs: int, seconds: Callable[[Stamps], float]) -> Sample[float]:
    """Make a sample of what one compensation takes."""

    async def run() -> float:
        stamps.compensations = 0
        await side.run()
        stamps.returned = perf_counter()
        if stamps.compensations != stages - 1:
            raise MeasurementError(f"expected {stages - 1} compensations, got {stamps.compensations}")
        return seconds(stamps)

    async def sample() -> float:
        await settled(side)
        return sum([await run() for _ in range(runs)]) / runs

    return sample


async def compensations(effort: Effort) -> Result:
    """Measure what one compensation takes, from the failure to the caller's having the report."""
    sagaz = Sagaz.find()
    columns = ("what", "sagaz", "saga", "mark", "reached", "saga to sagaz", *SPREAD, "mark", "reached")
    whole = Table("One compensation: from the failing stage's raise to the return of run(), by their number", columns)
    inner = Table("One more compensation in a chain: from the call of the first to the call of the last, by their number", columns)
    result = Result([whole, inner])
    for kind, shape in SHAPES.items():
        for size in effort.sizes:
            for table, label, seconds in ((whole, "whole", _whole), (inner, "inner", _inner)):
                if table is inner and shape is not chain:
                    # Compensations of branches overlap: what is spent before the first of them is called is for all of them.
                    continue
                stamps, runs = Stamps(), effort.runs_of(size)
                sides: dict[str, Sample[float]] = {}
                if sagaz is not None:
                    sides["sagaz"] = _stamped(SagazSaga(sagaz, shape(size), stamps), stamps, size, runs, seconds)
                sides["saga"] = _stamped(_failing_saga(shape(size), stamps), stamps, size, runs, seconds)
                values = await interleaved(sides, effort.rounds_of(size))
                table.rows.append(_compensation_row(f"{kind} of {size}", values))
                result.raw[f"{kind} of {size}, {label}"] = values
    whole.notes = [
        "There is one compensation less than there are stages. Our whole includes the drain, the plan and the report.",
        "In the fan-out the last branch fails when all others have completed.",
    ]
    if sagaz is None:
        whole.notes.append(_ABSENT)
    return result


def _whole(stamps: Stamps) -> float:
    return (stamps.returned - stamps.raised) / stamps.compensations


def _inner(stamps: Stamps) -> float:
    return (stamps.last - stamps.first) / (stamps.compensations - 1)


def _compensation_row(label: str, values: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    ours = Spread.of(values["saga"])
    absolute = (show(ours.median, "s"), *mark_cells(_CHEAP, ours))
    if "sagaz" not in values:
        return (label, "-", *absolute, "-", "-", "-", "-", "-")
    ratio = ratios(values["saga"], values["sagaz"])
    return (
        label,
        show(Spread.of(values["sagaz"]).median, "s"),
        *absolute,
        show(ratio.median, "x"),
        *spread_cells(ratio),
        *mark_cells(_AHEAD, ratio),
    )
