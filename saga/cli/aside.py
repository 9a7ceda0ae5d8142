"""stdout is for what was asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Final

STDOUT: Final = 1
_STDERR: Final = 2


@contextmanager
def aside() -> Iterator[None]:
    """For the length of a block, let what is printed go to stderr: what Python prints, and what the programs do that it starts."""
    with redirect_stdout(sys.stderr), ExitStack() as afterwards:
        # Where one was closed when Python began, its number may be that of another file by now.
        if sys.__stdout__ is not None and sys.__stderr__ is not None:
            before = os.dup(STDOUT)
            afterwards.callback(os.close, before)
            os.dup2(_STDERR, STDOUT)
            afterwards.callback(os.dup2, before, STDOUT)
        yield
