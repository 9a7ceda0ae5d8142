"""Carrying out a saga's work while somebody looks on, and may press Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from saga.cli.aside import aside
from saga.cli.exits import Exit
from saga.cli.family import Family
from saga.cli.interrupt import interruptible
from saga.cli.view import hanging_up, view
from saga.coordinator import SagaCoordinator
from saga.errors import SagaNotFound
from saga.events import SagaStatus
from saga.ledger import Ledger, StageState
from saga.policies import Policy
from saga.report import SagaReport
from saga.tasks import this_task
from saga.text import printable

_S = StageState


@dataclass(frozen=True, slots=True)
class Conducted:
    """What came of some work on a saga.

    Attributes:
        report: The saga's; None if it was interrupted before there was one.
        interrupted: Whether somebody pressed Ctrl-C.
        idle: Whether there was nothing to do: the saga is as it was.
    """

    report: SagaReport | None
    interrupted: bool
    idle: bool = False


async def conduct(
    ledger: Ledger,
    saga_id: str,
    work: Callable[[SagaCoordinator], Coroutine[Any, Any, SagaReport]],
    *,
    console: Console,
    goes_on: str,
    policy: Policy | None = None,
) -> Conducted:
    """Carry out some work on a saga, show it, and see to it that an interruption undoes what was done.

    What stages print, and the programs that they start, goes to stderr: stdout is for the report.

    Args:
        ledger: Where it is recorded.
        saga_id: Its id.
        work: What to do.
        console: Where it is shown.
        goes_on: The command that goes on with it later.
        policy: The coordinator's.
    """
    family = await Family.read(ledger, saga_id)
    before = family.sagas.get(family.head)
    ended = None if before is None else before.ended_at
    with aside():
        async with view(family, console) as hear:
            coordinator = SagaCoordinator(policy, ledger=ledger, listeners=[hear])
            warning = Notice(family, console, goes_on if ledger.durable else None)
            looking_on = asyncio.all_tasks()
            task = asyncio.create_task(work(coordinator))
            report: SagaReport | None = None
            try:
                with interruptible(task, warning.first, warning.second, hanging_up(console)), contextlib.suppress(asyncio.CancelledError):
                    report = await task
            finally:
                has_news = await wound_up(coordinator, console, looking_on)
        interrupted = report is None
        # What was given up may come to something that tells of the saga.
        if has_news or interrupted:
            with contextlib.suppress(SagaNotFound):
                report = await coordinator.report(saga_id)
    return Conducted(report, interrupted, idle=report is not None and not interrupted and report.ended_at == ended)


async def wound_up(coordinator: SagaCoordinator, console: Console, others: Collection[asyncio.Task[Any]]) -> bool:
    """Have code that was given up come to its end while its ledger is open; asyncio.run would do so only behind that. Whether any ran.

    Args:
        coordinator: Whose sagas' it is.
        console: Where it is said that something takes its time.
        others: The tasks that are none of that code's.
    """
    if not asyncio.all_tasks().difference(others):
        return False
    words = Text(_WAITS, style="bold yellow")
    telling = asyncio.get_running_loop().call_later(_A_MOMENT, lambda: console.print(words, soft_wrap=not console.is_terminal))
    waiting = asyncio.create_task(_wind_up(coordinator, others))
    with interruptible(waiting, lambda: None, str, hanging_up(console)), contextlib.suppress(asyncio.CancelledError):
        await waiting
    telling.cancel()
    if waiting.cancelled():
        _LEFT.update(asyncio.all_tasks().difference(others))
    return True


async def _wind_up(coordinator: SagaCoordinator, others: Collection[asyncio.Task[Any]]) -> None:
    keeper = coordinator._keeper  # noqa: SLF001 - wind_up() cancels nothing, and a command is not to wait for ever
    # A saga within may be going back, and a cancel must not cut through a compensation, nor through the recording of what came late.
    await keeper.sagas_rest()
    for task in asyncio.all_tasks().difference(others, {this_task()}, keeper.amendments.recordings()):
        task.cancel()
        keeper.gives_up(task)
    await keeper.wind_up()


async def to_the_end(command: Coroutine[Any, Any, Exit], tell: Callable[[Exception], Exit]) -> Exit:
    """What a command exits with; where code that was left still runs the process ends here: asyncio.run would wait for that.

    Args:
        command: The command.
        tell: Says what went wrong, and what to exit with then.
    """
    try:
        code = await command
    except Exception as error:
        if not _is_left():
            raise
        code = tell(error)
    if _is_left():
        os._exit(code)
    return code


def _is_left() -> bool:
    return not all(task.done() for task in _LEFT)


_A_MOMENT: Final = 0.2
"""Seconds that nobody has to be told of."""
_WAITS: Final = "Waiting for what was given up and still runs; Ctrl-C leaves it."
_LEFT: Final[set[asyncio.Task[Any]]] = set()
"""What somebody has said to leave. asyncio does not hold it: one that waits for nothing else would be told of when it is collected."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What is said to somebody who presses Ctrl-C.

    Attributes:
        family: What it is about.
        console: Where it is said.
        goes_on: The command that goes on later; None: the ledger dies with the process.
    """

    family: Family
    console: Console
    goes_on: str | None

    def first(self) -> None:
        """What happens now, and what a second Ctrl-C would leave."""
        for line in (f"Interrupted: {self._what_follows()}.", *self._stopping("A second Ctrl-C stops at once", "leaves")):
            self.console.print(Text(printable(line), style="bold yellow"), soft_wrap=not self.console.is_terminal)

    def second(self) -> str:
        """What is left."""
        cursor = "\x1b[?25h\n" if self.console.is_terminal else ""
        return "".join([cursor, *(f"{printable(line)}\n" for line in self._stopping("Stopped at once", "left"))])

    def _what_follows(self) -> str:
        state = self.family.sagas.get(self.family.head)
        if state is None:
            return "nothing has been done yet"
        if state.status is SagaStatus.COMPENSATING:
            return "it is being undone already, and that goes on"
        running = [name for name, record in state.stages.items() if record.state is _S.RUNNING]
        waits = f"waiting for {', '.join(running)}, then " if running else ""
        if state.policy.on_interrupt == "halt":
            return f"{waits}keeping what was done, as its policy says"
        return f"{waits}undoing what was done"

    def _stopping(self, stops: str, leaves: str) -> Iterator[str]:
        standing = list(self.family.standing())
        unknown = [name for name, shown in standing if shown in {_S.RUNNING, _S.COMPENSATING, _S.IN_DOUBT}]
        known = [name for name, _ in standing if name not in set(unknown)]
        parts = [f"in effect: {', '.join(known)}"] if known else []
        parts += [f"in doubt: {', '.join(unknown)}"] if unknown else []
        yield f"{stops} and {leaves} {'; '.join(parts) or 'nothing in effect'}."
        if self.goes_on is not None:
            yield f"What goes on from there: {self.goes_on}"
        elif parts:
            yield "The ledger is in memory: nothing knows of that then."
