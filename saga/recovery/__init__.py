"""What the events of a saga come to, and what to do next: pure, without I/O, without user code.

From the bottom up: what they say of one stage (`record`), which stages going backward is about (`scope`), where the whole saga stands
(`state`), what a latecomer tells it (`late`), what follows (`moves`), and how one goes on that nobody runs (`resumption`).
"""

from saga.recovery.moves import (
    Move,
    Rollback,
    conclude,
    final_status,
    stage_states,
    status_of_cancelled,
    unabsorbed,
    verdicts_on,
)

__all__ = [
    "Move",
    "Rollback",
    "conclude",
    "final_status",
    "stage_states",
    "status_of_cancelled",
    "unabsorbed",
    "verdicts_on",
]
