"""What `import saga` takes, against `import stageflow.api`: time and memory, each import in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from statistics import median
from typing import TYPE_CHECKING

from bench.comparison import Result
from bench.rounds import interleaved
from bench.spread import ratios
from bench.tables import SPREAD, Table, show, spread_cells
from bench.workloads import MeasurementError

if TYPE_CHECKING:
    from bench.comparison import Effort
    from bench.rounds import Sample

# ru_maxrss would do, but Linux hands the parent's peak on to the child, and ours has run benchmarks.
_PROGRAM = """
import time
begin = time.perf_counter()
{statement}
seconds = time.perf_counter() - begin
try:
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
except OSError:
    import resource, sys
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
import json
print(json.dumps([seconds, peak]))
"""
_STATEMENTS = {"nothing": "pass", "stageflow.api": "import stageflow.api", "saga": "import saga"}


def _imported(statement: str) -> Sample[tuple[float, float]]:
    """Make a sample of the seconds that an import takes and of the bytes that its process has held at most."""

    async def sample() -> tuple[float, float]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _PROGRAM.format(statement=statement), stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await process.communicate()
        if process.returncode != 0:
            raise MeasurementError(f"{statement!r} ended with exit code {process.returncode}")
        seconds, peak = json.loads(printed)
        return seconds, peak

    return sample


async def imports(effort: Effort) -> Result:
    """Measure the imports."""
    values = await interleaved({name: _imported(statement) for name, statement in _STATEMENTS.items()}, effort.imports)
    table = Table("import saga against import stageflow.api", ("what", "nothing", "stageflow.api", "saga", "ratio", *SPREAD))
    result = Result([table])
    for index, (label, unit) in enumerate((("time of the import", "s"), ("peak memory of the process", "B"))):
        sides = {name: [sample[index] for sample in samples] for name, samples in values.items()}
        ratio = ratios(sides["saga"], sides["stageflow.api"])
        medians = {name: show(median(numbers), unit) for name, numbers in sides.items()}
        if unit == "s":
            medians["nothing"] = "-"
        table.rows.append((label, *medians.values(), show(ratio.median, "x"), *spread_cells(ratio)))
        result.raw[label] = sides
    table.notes = ["saga imports stageflow, so its numbers contain the others; the byte code is compiled already."]
    return result
