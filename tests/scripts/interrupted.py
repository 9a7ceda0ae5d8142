"""A script with one saga over a world in SQLite, for a parent that interrupts it: python -m tests.scripts.interrupted WORLD FAILS.

It says on stdout where it is ("running b", "undoing b 1", "interrupted" for each SIGINT), and goes on for each byte on stdin, or when
stdin is closed. Of the first SIGINT it says so when it waits again: the next one then strikes nothing that still follows from it.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import sqlite3
import sys
from typing import Any

from stageflow.api import Pipeline, StageOutput

from saga import CompensableStage, CompensationContext, SagaContext, SagaCoordinator, SagaReport


def say(words: str) -> None:
    # Not print(): a signal handler may say something while it writes.
    os.write(1, f"{words}\n".encode())


async def told(words: str) -> None:
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Before it says anything: a Ctrl-C in the midst of this would leave stdin half known to the loop, for every later attempt.
    loop.add_reader(0, heard.set)
    try:
        say(words)
        await heard.wait()
        os.read(0, 1)
    finally:
        loop.remove_reader(0)


class Saying(selectors.DefaultSelector):
    """Says, when there is something to say, that the loop is about to wait."""

    has_news = False

    def select(self, timeout: float | None = None) -> Any:
        if self.has_news and (timeout is None or timeout > 0):
            self.has_news = False
            say("interrupted")
        return super().select(timeout)


class Book(CompensableStage):
    def __init__(self, world: str, name: str) -> None:
        self.world = sqlite3.connect(world, isolation_level=None)
        self.name = name

    async def execute(self, ctx: SagaContext) -> None:
        if self.name == "b":
            await told("running b")
        self.world.execute("INSERT INTO standing VALUES (?)", (self.name,))

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok() if self.world.execute("SELECT * FROM standing WHERE name = ?", (self.name,)).fetchall() else None

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.name == "b":
            await told(f"undoing b {ctx.attempt}")
        self.world.execute("DELETE FROM standing WHERE name = ?", (self.name,))


async def fail(_: Any) -> StageOutput:
    return StageOutput.fail("no")


def main(world: str, *, fails: bool) -> None:
    sqlite3.connect(world).execute("CREATE TABLE standing (name TEXT)")
    pipeline = Pipeline(name="interrupted").with_stage("a", Book(world, "a")).with_stage("b", Book(world, "b"), dependencies=("a",))
    if fails:
        pipeline = pipeline.with_stage("c", fail, "work", dependencies=("b",))
    coordinator = SagaCoordinator()
    selector = Saying()

    async def run() -> SagaReport:
        asyncios = signal.getsignal(signal.SIGINT)
        assert callable(asyncios)

        def interrupted(number: int, frame: Any) -> Any:
            # Two signals of which the first was not handled yet would count as one: the parent waits for this line.
            try:
                asyncios(number, frame)
            except KeyboardInterrupt:
                say("interrupted")
                raise
            selector.has_news = True

        signal.signal(signal.SIGINT, interrupted)
        # Has every signal wake the loop: one that comes just before the loop begins to wait would else be handled when it has waited.
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, say, "woken")
        return await coordinator.run(pipeline, saga_id="s")

    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            runner.run(run())
    finally:
        say(asyncio.run(coordinator.report("s")).status.value)


if __name__ == "__main__":
    main(sys.argv[1], fails=sys.argv[2:] == ["fails"])
