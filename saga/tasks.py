"""Tasks that begin, and waits that last, whoever is cancelled; and what strikes them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import traceback
import types
from collections.abc import Callable, Collection, Coroutine, Generator
from functools import cache
from typing import Any, TypeVar

import anyio

from saga.errors import LedgerError, MisuseError

T = TypeVar("T")


@cache
def make_ready() -> None:
    """Have anyio import its part for asyncio, which it does with the first scope: before a saga begins, and not when a cancel strikes it.

    Of a Ctrl-C that strikes an import Python 3.11 may make a RuntimeError, and a saga would end of it.
    """
    anyio.CancelScope()


def start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run something in a task that begins even if it is cancelled before, and that takes nobody along when Ctrl-C strikes it.

    asyncio throws a cancel that comes before a task's first step into code that has not begun: not even its `finally` runs, and
    whoever waits for what it was to do waits for ever. Here such a cancel is only counted, in the task's `cancelling()`.
    """
    begun = _begun(work)
    begun.send(None)
    # Not by the loop, whose task factory may run a task before its maker knows of it, as asyncio.eager_task_factory does. All have
    # one name: asyncio would put one together for each, Task-12.
    return asyncio.Task(begun, loop=asyncio.get_running_loop(), name="saga")


async def _begun(work: Coroutine[Any, Any, T]) -> T:
    try:
        await _first_step()
    except asyncio.CancelledError:
        pass
    except (KeyboardInterrupt, SystemExit) as error:
        # uvloop has a signal strike the first code that runs again: what nobody has begun yet need not die of it.
        leave_loop(error)
    try:
        return await work
    except (KeyboardInterrupt, SystemExit) as error:
        leave_loop(error)
        raise cut_short_by(error) from error


@types.coroutine
def _first_step() -> Generator[None, None, None]:
    yield


async def outlast(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Wait until all tasks have ended, or futures are done, however often whoever waits is cancelled."""
    while not all(task.done() for task in tasks):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)


async def sit_out(wait: asyncio.Future[None], breaks: Callable[[Exception], None]) -> None:
    """Wait until a wait has ended or something strikes whoever waits; `breaks` is told of a Ctrl-C."""
    try:
        await wait
    except asyncio.CancelledError:
        pass
    except (KeyboardInterrupt, SystemExit) as error:
        leave_loop(error)
        breaks(cut_short_by(error))


def end(wait: asyncio.Future[None]) -> None:
    """Let whoever waits go on, unless the wait has ended already."""
    if not wait.done():
        wait.set_result(None)


class Answer(asyncio.Future[T]):
    """What somebody waits for who gets it even if he is cancelled meanwhile: see `outlasting`.

    A cancel ends the wait, as that for any future, and the answer is then kept aside. asyncio.shield costs another future and another
    turn of the loop, for each write of a saga.
    """

    late: asyncio.Future[T] | None = None

    def cancel(self, msg: Any = None) -> bool:
        """End the wait; the answer is still to come."""
        is_first = super().cancel(msg)
        if is_first:
            self.late = self.get_loop().create_future()
        self.make_up()
        return is_first

    def give(self, answer: T | Exception) -> None:
        """Answer, with an error if it is one; a second answer changes nothing."""
        future = self if self.late is None else self.late
        if future.done():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
            retrieved(self.late)  # who was cancelled need not ask for it
        else:
            future.set_result(answer)

    def make_up(self) -> None:
        """Do once more what a Ctrl-C may have cut off on the way to the answer; whoever waits for it is cancelled then, by asyncio.run."""


async def outlasting(answer: Answer[T]) -> T:
    """Wait for an answer that comes whatever happens, however often whoever waits is cancelled; that is counted in its `cancelling()`."""
    try:
        return await answer
    except asyncio.CancelledError:
        if answer.late is None:
            # It had come already.
            return answer.result()
        # anyio repeats the cancel of a scope at every turn of the loop until the scope is left.
        with anyio.CancelScope(shield=True):
            while not answer.late.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([answer.late])
                answer.make_up()
    return answer.late.result()


def this_loop() -> asyncio.AbstractEventLoop:
    """The event loop that runs here.

    Raises:
        MisuseError: None of asyncio's does.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        hint = "With anyio, choose the backend 'asyncio'; trio can't run sagas."
        raise MisuseError("an event loop of asyncio", got="none that runs here", hint=hint) from None


def this_task() -> asyncio.Task[Any]:
    """The task that runs now.

    Raises:
        MisuseError: No event loop of asyncio runs.
    """
    task = asyncio.current_task(this_loop())
    assert task is not None  # a saga runs in tasks
    return task


def leave_loop(error: BaseException) -> None:
    """Let a KeyboardInterrupt or SystemExit out of the loop at its next turn; another error changes nothing.

    asyncio lets these two out when a task raises them, but once more for every task that waits for that one: the second time it
    cuts short asyncio.run's own wait for all that is still to be undone.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):
        asyncio.get_running_loop().call_soon(_leave, error)


def _leave(error: BaseException) -> None:
    raise error


def is_of_signal(error: BaseException) -> bool:
    """Whether a signal has struck, Ctrl-C or one whose handler exits: by chance, and the code that ran has said nothing of its effect."""
    if not isinstance(error, SystemExit):
        return isinstance(error, KeyboardInterrupt)
    # Many handlers replace themselves first, so that a second signal does nothing; and some delete what they were given and don't use.
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    called: list[Any] = [getattr(handler, "func", handler) for handler in handlers if callable(handler)]
    in_place = {getattr(code, "__code__", None) for handler in called for code in (handler, handler.__call__)}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_code in in_place or _was_given(frame, frame.f_back) for frame in frames)


def _was_given(frame: types.FrameType, struck: types.FrameType | None) -> bool:
    """Whether a function was called with the frame that it interrupts, as Python calls the handler of a signal, and nobody else does."""
    given = frame.f_locals.values()
    return struck is not None and any(one is struck or (type(one) is tuple and any(each is struck for each in one)) for one in given)


def instead_of_cancel(error: BaseException) -> BaseException | None:
    """What code that was cancelled has raised instead; None if it ended as it should."""
    return None if isinstance(error, asyncio.CancelledError) else error


def closes(error: BaseException, task: asyncio.Task[Any]) -> bool:
    """Whether the coroutine that this task runs is being closed: then nobody has raised this error, and nothing may be awaited any more."""
    if not isinstance(error, GeneratorExit):
        return False
    try:
        return asyncio.current_task() is not task
    except RuntimeError:  # no loop runs any more
        return True


def cut_short_by(error: BaseException) -> Exception:
    """What a saga ends with when this has struck its own code."""
    return error if isinstance(error, Exception) else cut_short(error)


def cut_short(error: BaseException) -> LedgerError:
    """That something has struck a saga's own code which may strike any."""
    return LedgerError(f"the saga was cut short by a {type(error).__name__}: it is left as if its process had been killed, resume it")


def retrieved(task: asyncio.Future[Any] | None) -> None:
    """Look at a task's exception: asyncio complains of one that nobody looked at, and one that comes after its time is no news."""
    if task is not None and not task.cancelled():
        task.exception()
