"""stdout is for what was asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Final, TextIO

STDOUT: Final = 1
STDERR: Final = 2


@contextmanager
def aside() -> Iterator[None]:
    """For the length of a block, let what is printed go to stderr: what Python prints, and what the programs do that it starts."""
    with redirect_stdout(sys.stderr), ExitStack() as afterwards:
        # Where one was closed when Python began, its number may be that of another file by now.
        if sys.__stdout__ is not None and sys.__stderr__ is not None:
            before = os.dup(STDOUT)
            afterwards.callback(os.close, before)
            os.dup2(STDERR, STDOUT)
            afterwards.callback(os.dup2, before, STDOUT)
            afterwards.callback(_write_out, sys.__stdout__)
        yield


def let_go(number: int) -> None:
    """Have what is written there go nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _write_out(stream: TextIO) -> None:
    """Have what is still in its buffer go where it goes now, if that can be had."""
    with suppress(OSError, ValueError):
        stream.flush()
