"""`python -m bench`: run the comparisons and print a table for each.

The exit code is 0 whether or not a mark is reached; it is not 0 only when something could not be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final

from bench import durable, footprint, forward, machine, rollback
from bench.comparison import FULL, QUICK, Comparison

COMPARISONS: Final[dict[str, Comparison]] = {
    "forward": forward.against_plain,
    "five": rollback.five_steps,
    "rollback": rollback.compensations,
    "durable": durable.ledgers,
    "growth": forward.by_size,
    "import": footprint.imports,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure saga against plain stageflow and against sagaz.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few rounds, small pipelines, about 20 seconds")
    parser.add_argument("--only", action="append", choices=COMPARISONS, metavar="NAME", help=f"one of {', '.join(COMPARISONS)}; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers there")
    return parser.parse_args()


def main() -> None:
    """Run what the command line asks for."""
    arguments = _arguments()
    effort = QUICK if arguments.quick else FULL
    on = machine.description()
    print("  ".join(f"{name} {value}" for name, value in on.items()))
    print(f"{'quick: too few rounds to conclude anything from; ' if arguments.quick else ''}medians; ratios are of the same round\n")
    raw: dict[str, Any] = {}
    for name in arguments.only or COMPARISONS:
        began = time.perf_counter()
        result = asyncio.run(COMPARISONS[name](effort))
        raw[name] = result.raw
        print("\n\n".join(str(table) for table in result.tables))
        print(f"  [{name}: {time.perf_counter() - began:.0f} s]\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": on, "seconds_or_bytes": raw}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
