"""A peer's side of the conversation: lines of JSON. It needs nothing but the standard library, because every peer's environment is its own.

Asked `{"fails": false, "size": 100, "runs": 1}`, it runs 100 sagas at once, once, and answers `{"seconds": ...}`; asked for a size
of 1, one after another. Its first line says what it is, and what a saga takes, succeeding and rolled back.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

Run = Callable[[bool], Awaitable[None]]
"""Runs one saga of five steps; True: the fifth fails, and four are compensated. Raises when it ends otherwise."""
Peer = Callable[[Path, str], AbstractAsyncContextManager[Run]]
"""Gets ready, with a directory of its own and an address of a PostgreSQL server, if it needs one."""


class Unexpected(Exception):
    """A saga did something else than it was meant to do."""


class Fifth(Exception):
    """The failure of the fifth step."""


_WARM: Final = 1.0
"""Seconds for which a side runs before it is measured: until its log, if it has one, is as long as it gets, and is written over."""


class World:
    """Counts what was done and undone; a peer that skips a step would be fast."""

    def __init__(self) -> None:
        """Nothing was done; of a saga whose fifth step fails, four are to be undone."""
        self.compensated = 4
        self.done = 0
        self.undone = 0

    def expect(self, *, fails: bool, sagas: int) -> None:
        """Refuse to go on measuring something that went wrong, and begin anew."""
        steps, undone = (4, self.compensated) if fails else (5, 0)
        if (self.done, self.undone) != (steps * sagas, undone * sagas):
            raise Unexpected(f"expected {steps * sagas} steps and {undone * sagas} undone, got {self.done} and {self.undone}")
        self.done = self.undone = 0


WORLD = World()


def serve(peer: Peer, *packages: str) -> None:
    """Answer until the other side hangs up; the command line is a directory and PostgreSQL's address."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    directory, dsn = Path(sys.argv[-2]), sys.argv[-1]

    def answer(line: str) -> None:
        print(line, file=answers, flush=True)

    asyncio.run(_serve(peer(directory, dsn), {name: version(name) for name in packages}, answer))
    # Some leave threads behind.
    os._exit(0)


async def _serve(peer: AbstractAsyncContextManager[Run], versions: Mapping[str, str], answer: Callable[[str], None]) -> None:
    async with peer as run:
        seconds = [await _warm(run, fails=fails) for fails in (False, True)]
        answer(json.dumps({"versions": versions, "seconds": seconds}))
        while line := await asyncio.to_thread(sys.stdin.readline):
            answer(json.dumps({"seconds": await _seconds(run, **json.loads(line))}))


async def _warm(run: Run, *, fails: bool) -> float:
    """Run one saga after another for a while; the seconds that one takes."""
    seconds, end = [], perf_counter() + _WARM
    while perf_counter() < end:
        seconds.append(await _seconds(run, fails=fails, size=1, runs=1))
    return median(seconds)


async def _seconds(run: Run, *, fails: bool, size: int, runs: int) -> float:
    gc.collect()
    begin = perf_counter()
    for _ in range(runs):
        if size == 1:
            await run(fails)
        else:
            await asyncio.gather(*(run(fails) for _ in range(size)))
    seconds = perf_counter() - begin
    WORLD.expect(fails=fails, sagas=size * runs)
    return seconds / size / runs
