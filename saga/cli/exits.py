"""What `saga` exits with."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from saga.errors import MisuseError, SagaError
from saga.events import SagaStatus
from saga.text import printable, said


class Exit(IntEnum):
    """What `saga` exits with."""

    COMPLETED = 0
    """The saga completed; or what was asked for is done."""
    FAILED = 1
    """The ledger could not read or record, or something else went wrong that is nobody's misuse."""
    MISUSE = 2
    """Something was asked for that can't work; nothing was run. Also what the shell's own usage errors give."""
    DEGRADED = 3
    """The saga went on with fallbacks, or without a branch."""
    COMPENSATED = 4
    """The saga was undone."""
    HALTED = 5
    """The saga failed, and what it did is kept."""
    STUCK = 6
    """A person has to act."""
    CANCELLED = 7
    """A stage cancelled the saga, and what it did is kept."""
    FOUND = 8
    """`saga check` found an error."""
    LEFT = 9
    """`saga watch` found that nobody runs the saga any more: `saga recover` goes on with it."""
    INTERRUPTED = 130
    """It was interrupted, and what the policy wants done then is done; a saga that got stuck on the way gives 6."""


_BY_STATUS: Final = {
    SagaStatus.COMPLETED: Exit.COMPLETED,
    SagaStatus.DEGRADED: Exit.DEGRADED,
    SagaStatus.COMPENSATED: Exit.COMPENSATED,
    SagaStatus.HALTED: Exit.HALTED,
    SagaStatus.STUCK: Exit.STUCK,
    SagaStatus.CANCELLED: Exit.CANCELLED,
}
_ABSENT: Final = FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError | ModuleNotFoundError
"""A file or a driver that isn't there is the caller's to see to. A disk that is full is not: the saga may have run."""


def exit_of_status(status: SagaStatus, *, interrupted: bool = False) -> Exit:
    """What to exit with after a saga has come to rest."""
    if interrupted and status is not SagaStatus.STUCK:
        return Exit.INTERRUPTED
    return _BY_STATUS[status]


def exit_of_error(error: Exception) -> Exit:
    """What to exit with after an error."""
    return Exit.MISUSE if isinstance(error, MisuseError | _ABSENT) else Exit.FAILED


def in_a_line(error: Exception) -> str:
    """What went wrong."""
    known = isinstance(error, SagaError | OSError | ModuleNotFoundError)
    return printable(str(error) if known else f"{type(error).__name__}: {said(error)}")
