"""What is shown of a saga while it runs: a live picture in a terminal, lines elsewhere. Both draw what the events say."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from errno import EIO
from typing import Final

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from saga.cli.aside import STDOUT, let_go
from saga.cli.family import Family
from saga.cli.lines import tell
from saga.cli.picture import picture
from saga.events import AnyEvent
from saga.listeners import Listener
from saga.text import printable

_FRAMES: Final = 0.1
"""Seconds between two pictures."""


class Stderr(Console):
    """stderr as a console; whoever reads it may go away, which is nothing to the saga."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def __exit__(self, *raised: object) -> None:
        """Write what was printed; whom `setsid` or `disown` has parted from its terminal is not told that it was closed."""
        try:
            super().__exit__(*raised)
        except OSError as error:
            if error.errno != EIO:
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Say nothing more, and let nobody stumble who prints there; rich would end the process in the middle of a saga."""
        self.quiet = True
        gone = self.file.fileno()
        if sys.__stdout__ is not None and os.path.sameopenfile(STDOUT, gone):
            let_go(STDOUT)  # where the programs print that stages start
        let_go(gone)


def hanging_up(console: Console) -> Callable[[], None]:
    """What has it say nothing more when its terminal was closed; of one that was nobody can tell that it is a terminal."""
    # rich takes for one, or for none, what the environment says: FORCE_COLOR, TTY_COMPATIBLE.
    return console.on_broken_pipe if console.file.isatty() else lambda: None


def view(family: Family, console: Console) -> AbstractAsyncContextManager[Listener]:
    """Show a family for the length of a block; what it gives wants to hear of every event."""
    return _live(family, console) if console.is_terminal and not console.is_dumb_terminal else _lines(family, console)


def tell_on(console: Console) -> Listener:
    """What prints a line for each event that is of interest."""

    def hear(saga_id: str, event: AnyEvent) -> None:
        told = tell(event)
        if told:
            console.print(Text(f"{printable(saga_id)}  {told}"), soft_wrap=True)

    return hear


@asynccontextmanager
async def _lines(family: Family, console: Console) -> AsyncIterator[Listener]:
    told = tell_on(console)

    def hear(saga_id: str, event: AnyEvent) -> None:
        family.hear(saga_id, event)
        told(saga_id, event)

    yield hear


@asynccontextmanager
async def _live(family: Family, console: Console) -> AsyncIterator[Listener]:
    touched = [""]

    def hear(saga_id: str, event: AnyEvent) -> None:
        family.hear(saga_id, event)
        touched[0] = saga_id + "/" + getattr(event, "stage", "")

    def draw() -> RenderableType:
        return picture(family, datetime.now(UTC), console.width, console.height, focus=touched[0])

    # Drawn by a task and not by rich's thread, which would read the family while the saga writes to it.
    with Live(console=console, get_renderable=draw, auto_refresh=False, transient=True) as live:

        async def redraw() -> None:
            while True:
                live.refresh()
                await asyncio.sleep(_FRAMES)

        drawing = asyncio.create_task(redraw())
        try:
            yield hear
        finally:
            drawing.cancel()
