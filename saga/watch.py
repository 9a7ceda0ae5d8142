"""Time limits for code that may ignore its cancel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Generic, Protocol, TypeVar

from saga.failures import FailureKind
from saga.tasks import closes, cut_short_by, end, leave_loop, retrieved, sit_out, start

W = TypeVar("W", bound="Watched")


def _uncancel(task: asyncio.Task[Any]) -> None:
    while task.cancelling():
        task.uncancel()


class Employer(Protocol):
    """Whoever has a crew run somebody else's code.

    Its members know it and the crew does not, so that nothing of a saga that has ended waits for Python's garbage collector.
    """

    def gives_up(self, member: Any, /) -> None:
        """Go on without a member whose code ignored its cancel for longer than the grace."""
        ...

    def breaks(self, error: Exception, /) -> None:
        """Take what ended a member that should not have: the ledger's error, a Ctrl-C, a defect of ours."""
        ...


class Watched:
    """A task of ours that runs somebody else's code, and does not trust it to end.

    The task is cancelled when the code's time is up or when told to; if the code then has not ended within the grace, it
    is given up: its employer is told, and must wait for it no longer.

    Attributes:
        employer: Whoever has it run.
        task: The task; set by the crew that starts it.
        crew: That crew, whose clock says when the code's time is up.
        until: When that is, by the event loop's clock; None: never.
        is_acting: The code is running now.
        reason: Why it was cancelled, TIMEOUT or INTERRUPTED; None if it was not.
        given_up: It ignored its cancel for longer than the grace.
        successor: The task that then sees to what follows from that.
    """

    __slots__ = ("_grace", "_timer", "crew", "employer", "given_up", "is_acting", "reason", "successor", "task", "until")

    def __init__(self, employer: Employer) -> None:
        self.employer = employer
        self.task: asyncio.Task[None]
        self.crew: Crew[Any]
        self.until: float | None = None
        self.is_acting = False
        self.reason: FailureKind | None = None
        self.given_up = False
        self.successor: asyncio.Task[None] | None = None
        self._grace: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float | None, grace: float | None) -> None:
        """Let the code that starts now run for so many seconds, and end within the grace once it is cancelled; None: no limit."""
        if self.task.cancelling():
            # A scope of the code (asyncio.timeout, TaskGroup) would take a cancel that has struck before for one of its own time.
            _uncancel(self.task)
        self.is_acting, self.reason, self._grace = True, None, grace
        if seconds is not None:
            self.until = self.task.get_loop().time() + seconds
            self.crew.wake_at(self.until)

    def end(self) -> None:
        """The code has ended."""
        self.is_acting, self.until = False, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cancel(self, reason: FailureKind) -> None:
        """Cancel the code if it runs; a second cancel changes nothing."""
        if not self.is_acting or self.reason is not None:
            return
        self.reason, self.until = reason, None
        self.task.cancel()
        if self._grace is not None:
            self._timer = self.task.get_loop().call_later(self._grace, self._give_up)

    def _give_up(self) -> None:
        self.given_up = True
        self.employer.gives_up(self)

    async def absorb(self) -> bool:
        """Take back the cancels that the task got; whether there were any, from here or from outside."""
        if not self.task.cancelling():
            return False
        # One that has not been delivered yet would otherwise strike at our own next await.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        _uncancel(self.task)
        return True


class Crew(Generic[W]):
    """The tasks of ours that run somebody else's code now, and the wait until none does.

    Attributes:
        members: Those that nobody has dismissed.
    """

    def __init__(self) -> None:
        self.members: Final[set[W]] = set()
        self._turn: asyncio.Future[None] | None = None
        self._alarm: asyncio.Handle | None = None
        self._rings_at = 0.0

    def employ(self, member: W, work: Coroutine[Any, Any, bool | None]) -> None:
        """Start a member's task."""
        member.crew = self
        member.task = start(self.see_through(member, work))
        self.members.add(member)

    def wake_at(self, moment: float) -> None:
        """Look then whose time is up. One clock for all: a timer for each costs more than most of their code takes."""
        if self._alarm is None or moment < self._rings_at:
            self._stop_clock()
            # Not asked of the handle: what uvloop gives knows no moment that is less than half a millisecond away.
            self._rings_at = moment
            self._alarm = asyncio.get_running_loop().call_at(moment, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        now = asyncio.get_running_loop().time()
        left = []
        for member in self.members:
            if member.until is not None and member.until <= now:
                member.cancel(FailureKind.TIMEOUT)
            elif member.until is not None:
                left.append(member.until)
        if left:
            self.wake_at(min(left))

    def _stop_clock(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def see_through(self, member: W, work: Coroutine[Any, Any, bool | None]) -> None:
        """Do the work; the member is dismissed after it, whatever came of it, unless it says that it goes on in another task."""
        try:
            if await work:
                return
        except BaseException as error:
            if closes(error, member.task):
                raise
            # Whatever it is, nobody must wait for this member for ever.
            leave_loop(error)
            member.employer.breaks(cut_short_by(error))
        self.dismiss(member)

    def dismiss(self, member: W) -> None:
        """Wait for it no longer."""
        self.members.discard(member)
        if self._turn is not None:
            end(self._turn)
        if not self.members:
            self._stop_clock()

    async def disband(self, employer: Employer) -> None:
        """Wait until nobody works any more, whatever strikes their employer, who waits."""
        # Asked of the tasks themselves: a Ctrl-C may have killed one before it was dismissed.
        while self._is_at_work():
            self._turn = asyncio.get_running_loop().create_future()
            await sit_out(self._turn, employer.breaks)
        for member in tuple(self.members):
            killed_by = (member.successor or member.task).exception()
            assert killed_by is not None  # or it would have been dismissed
            employer.breaks(cut_short_by(killed_by))

    def _is_at_work(self) -> bool:
        for member in self.members:  # noqa: SIM110 - a generator takes twice as long
            if not (member.successor or member.task).done():
                return True
        return False


async def bounded(
    call: Awaitable[Any],
    *,
    seconds: float | None,
    grace: float,
    gives_up: Callable[[asyncio.Task[Any]], None],
    stop: asyncio.Future[None] | None = None,
) -> Any:
    """Run somebody else's code for at most so many seconds, or until `stop` is done.

    Returns in time whatever the code does: what ignores its cancel for longer than the grace is left to itself, and `gives_up` told of it.
    It costs a task more than to be `Watched`, so it is for what runs seldom.

    Raises:
        TimeoutError: The time was up.
        asyncio.CancelledError: `stop` was done, or the code cancelled itself.
        BaseException: Whatever the code raises.
    """

    async def run() -> tuple[Any, BaseException | None]:
        try:
            return await call, None
        except (KeyboardInterrupt, SystemExit) as error:
            # asyncio lets these two out of the loop, past whoever waits here.
            return None, error

    task = start(run())
    task.add_done_callback(retrieved)
    waiting: set[asyncio.Future[Any]] = {task} if stop is None else {task, stop}
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        in_time = task.done()
        if not in_time:
            task.cancel()
            await asyncio.wait({task}, timeout=grace)
    except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
        task.cancel()
        gives_up(task)
        raise
    task.cancel()
    if not task.done():
        gives_up(task)
    if in_time or (task.done() and not task.cancelled() and task.exception() is None):
        returned, error = task.result()
        if error is not None:
            raise error
        return returned
    if stop is not None and stop.done():
        raise asyncio.CancelledError("the saga stopped before it had answered")
    raise TimeoutError(f"no answer within {seconds:g} s")
