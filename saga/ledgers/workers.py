"""Threads that carry out what event loops ask of a database: all that is waiting at once, so that it shares one commit."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from saga.errors import LedgerError

_MOST: Final = 2**24
"""A batch is closed when it holds so many bytes."""
_ALONE: Final = 10
"""After so many batches of one request, the next isn't held up until the end of the loop's turn: nobody is there to join it."""


class Closable(Protocol):
    """What a worker works with; it is made, used and closed in the worker's thread."""

    def close(self) -> None:
        """Let go of the connection, if there is one; it may be used again."""
        ...


S = TypeVar("S", bound=Closable)


_END: Final = object()
"""The request to end."""


class _Job(NamedTuple):
    request: Any
    size: int
    loop: asyncio.AbstractEventLoop | None
    future: asyncio.Future[Any] | None


class Worker(Generic[S]):
    """One thread with one connection.

    Args:
        name: The thread's name.
        store: Makes what it works with.
        work: Carries out a batch of requests: an answer for each, in their order; an answer that is an exception is raised. What it
            raises itself is the answer to all.

    The thread is a daemon: a program that forgets to close its ledger ends all the same.
    """

    def __init__(self, name: str, store: Callable[[], S], work: Callable[[S, Sequence[Any]], Sequence[Any]]) -> None:
        self.pid: Final = os.getpid()
        self._asked: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._alone = 0
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, args=(store, work), name=name, daemon=True)
        self._thread.start()
        _WORKING.add(self)

    def ask(self, request: Any, size: int = 0) -> asyncio.Future[Any]:
        """Have a request carried out; the answer is for the event loop that runs.

        Args:
            request: What `work` understands.
            size: How many bytes of a batch it takes.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        job = _Job(request, size, loop, future)
        if loop in self._asked:
            self._asked[loop].append(job)
        elif self._alone < _ALONE:
            self._asked[loop] = [job]
            loop.call_soon(self._end_turn, loop)
        else:
            self._hand_over([job])
        return future

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have all that one turn of a loop asked for in one batch; handed over one by one, a thousand requests become dozens."""
        self._hand_over(self._asked.pop(loop))

    def _hand_over(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            self._jobs.put(job)
        if self._has_ended:
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        """Answer what came too late: from the thread when it ends, and from whoever hands over after that."""
        with suppress(Empty):
            while True:
                _answer([self._jobs.get_nowait()], [LedgerError("the ledger is closed")])

    async def end(self) -> None:
        """Do what was asked for before, and end."""
        await self.ask(_END)
        self._thread.join()  # it has said that it is at its end

    def stop(self) -> None:
        """Have it end, too, but wait for nothing; for who has no event loop."""
        self._jobs.put(_Job(_END, 0, None, None))

    def join(self, seconds: float) -> None:
        """Wait so long until it has ended."""
        self._thread.join(seconds)

    def _run(self, store: Callable[[], S], work: Callable[[S, Sequence[Any]], Sequence[Any]]) -> None:
        opened = store()
        end = None
        while end is None:
            end = self._turn(opened, work)
        opened.close()
        self._has_ended = True
        self._refuse_rest()
        _answer([end], [None])

    def _turn(self, store: S, work: Callable[[S, Sequence[Any]], Sequence[Any]]) -> _Job | None:
        """Carry out one batch; the request to end, if it has come."""
        # While the thread waits for more it must hold on to nothing that was asked for: it may be what keeps a ledger alive.
        jobs = self._take()
        end = jobs.pop() if jobs[-1].request is _END else None
        if jobs:
            _answer(jobs, _answers(store, work, [job.request for job in jobs]))
        return end

    def _take(self) -> list[_Job]:
        jobs = [self._jobs.get()]
        size = jobs[0].size
        while size < _MOST and jobs[-1].request is not _END and not self._jobs.empty():
            jobs.append(self._jobs.get())
            size += jobs[-1].size
        self._alone = self._alone + 1 if len(jobs) == 1 else 0
        return jobs


def _answers(store: S, work: Callable[[S, Sequence[Any]], Sequence[Any]], requests: Sequence[Any]) -> Sequence[Any]:
    try:
        return work(store, requests)
    except LedgerError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - whoever waits has to be told, whatever it is
        failure = LedgerError(f"the ledger failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
    # Each gets one of their own: every `raise` adds to an exception's traceback.
    return [_again(failure) for _ in requests]


def _again(error: LedgerError) -> LedgerError:
    copy = type(error)(str(error))
    copy.__cause__ = error.__cause__
    return copy


def _answer(jobs: Sequence[_Job], answers: Sequence[Any]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for job, answer in zip(jobs, answers, strict=True):
        if job.loop is not None and job.future is not None:
            by_loop.setdefault(job.loop, []).append((job.future, answer))
    for loop, answered in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, answered)
        except RuntimeError:
            continue  # the loop is closed, and whoever asked is gone with it


def _settle(answered: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in answered:
        if future.done():
            continue  # whoever asked was cancelled
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


_WORKING: Final[weakref.WeakSet[Worker[Any]]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Close the connections of ledgers that nobody closed; what was answered is on disk already."""
    mine = [worker for worker in _WORKING if worker.pid == os.getpid()]
    for worker in mine:
        worker.stop()
    for worker in mine:
        worker.join(5.0)
