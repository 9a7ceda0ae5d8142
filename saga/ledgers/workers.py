"""Threads that carry out what event loops ask of a database: all that is waiting at once, so that it shares one commit."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, Protocol, TypeVar

from saga.errors import LedgerError
from saga.tasks import Answer, this_loop

_MOST: Final = 2**24
"""A batch is closed when it holds so many bytes."""
_LATE: Final = 0.005
"""Seconds after which an answer is late."""
_TURN: Final = 0.001
"""Seconds for which an event loop then stands back for the thread, at most."""
_ALONE: Final = 10
"""After so many batches of one request, the next isn't held up until the end of the loop's turn: nobody is there to join it."""


class Closable(Protocol):
    """What a worker works with; it is used and closed in the worker's thread."""

    def close(self) -> None:
        """Let go of the connection, if there is one; it may be used again."""
        ...


S = TypeVar("S", bound=Closable)


class _Order:
    """A request that is for the worker itself; it ends a batch. Who has no event loop hands it over as it is, and waits for no answer."""

    size: Final = 0
    number: Final = 0

    @property
    def request(self) -> _Order:
        """What is asked for."""
        return self


_END: Final = _Order()
"""The order to end."""


class _Rest(_Order):
    """The order to disconnect, and to do nothing until `over` is set.

    Attributes:
        reached: The worker is disconnected, or has ended.
        over: It may go on.
    """

    def __init__(self) -> None:
        self.reached: Final = threading.Event()
        self.over: Final = threading.Event()


class _Asked(Answer[Any]):
    """A request, and the answer to it, which comes from a worker's thread.

    To ask, and to give the answer, are callbacks of the loop, which a Ctrl-C may cut off.

    Attributes:
        worker: Who is asked.
        request: What its `work` understands, or an order.
        size: How many bytes of a batch it takes.
        number: How many requests the worker had got with it.
        is_taken: The thread has it; it takes it only once.
        brought: The answer, once it is there, even if nobody gives it.
    """

    # A thousand sagas have as many of these at once: each container less is one that Python's garbage collector need not look at.
    __slots__ = ("brought", "is_taken", "number", "request", "size", "worker")

    def __init__(self, worker: Worker[Any], request: Any, size: int, number: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.worker = worker
        self.request = request
        self.size = size
        self.number = number
        self.is_taken = False
        self.brought: Any = _NOTHING

    def make_up(self) -> None:
        """Ask, where that was cut off, and give what is there."""
        if not self.is_taken:
            self.worker.ask_again(self)
        if self.brought is not _NOTHING:
            self.give(self.brought)


_NOTHING: Final = object()
_Job = _Asked | _Order


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
        self._asked: dict[asyncio.AbstractEventLoop, list[_Asked]] = {}
        self._jobs: SimpleQueue[Sequence[_Job]] = SimpleQueue()
        self._taken: deque[_Job] = deque()
        self._alone = 0
        self._numbers = itertools.count(1)
        self._newest = self._answered = 0
        self._watching: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._has_answered = threading.Event()
        self._has_ended = False
        self._store = store()
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        with WORKING.lock:
            self._thread.start()
            WORKING.workers.add(self)

    def ask(self, request: Any, size: int = 0) -> Answer[Any]:
        """Have a request carried out; the answer is for the event loop that runs.

        Args:
            request: What `work` understands.
            size: How many bytes of a batch it takes.

        Raises:
            MisuseError: No event loop of asyncio runs.
        """
        loop = this_loop()
        self._newest = number = next(self._numbers)
        asked = _Asked(self, request, size, number, loop)
        if loop not in self._watching:
            self._watching.add(loop)
            with self._lock:
                self._loops.add(loop)
            loop.call_later(_LATE, self._stand_back, loop, number)
        if loop in self._asked:
            self._asked[loop].append(asked)
        elif self._alone < _ALONE:
            self._asked[loop] = [asked]
            loop.call_soon(self._end_turn, loop)
        else:
            self._hand_over([asked])
        return asked

    def _stand_back(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        """Let the thread have Python's lock, if an answer is late; and have the loops of other threads do so, too.

        A loop that never rests takes the lock back from each of its short waits before a thread has woken, and a thread that is woken for
        nothing asks for it anew: on a quiet machine it never gets it, and nothing would be recorded as long as the loop has work to do.
        """
        try:
            if self._answered < number:
                # Where a Ctrl-C cut off the end of a turn, in a loop that goes on all the same, what is asked for since waits behind that.
                self._end_turn(loop)
                self._call_in_the_others(number)
                self._has_answered.clear()
                self._has_answered.wait(_TURN)
        finally:
            # A Ctrl-C may strike the wait, too.
            if self._answered < self._newest:
                loop.call_later(_LATE, self._stand_back, loop, self._newest if self._answered >= number else number)
            else:
                self._watching.discard(loop)

    def _call_in_the_others(self, number: int) -> None:
        with self._lock:
            others = [loop for loop in self._loops if loop not in self._watching]
        for loop in others:
            self._watching.add(loop)
            with suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._stand_back, loop, number)

    def ask_again(self, asked: _Asked) -> None:
        """Hand a request over once more."""
        loop = asked.get_loop()
        if not any(other is asked for other in self._asked.get(loop, ())):
            # It was cut off on its way, before what still waits for the end of the turn.
            self._hand_over([asked])
        self._end_turn(loop)

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have all that one turn of a loop asked for in one batch; handed over one by one, a thousand requests become dozens."""
        self._hand_over(self._asked.get(loop, ()))
        # Not before: what a Ctrl-C cuts off is handed over once more.
        self._asked.pop(loop, None)

    def _hand_over(self, jobs: Sequence[_Job]) -> None:
        if jobs:
            # All at once: the thread may take the first before the second is there. A copy: a turn that was cut off goes on with its own.
            self._jobs.put(tuple(jobs))
        if self._has_ended:
            self._refuse_late()

    def _refuse_late(self) -> None:
        """Answer what came too late: from the thread when it ends, and from whoever hands over after that."""
        with suppress(Empty):
            while True:
                self._refuse(self._jobs.get_nowait())

    def _refuse(self, jobs: Iterable[_Job]) -> None:
        for job in jobs:
            if isinstance(job.request, _Rest):
                job.request.reached.set()
            if _is_new(job):
                self._give([job], [LedgerError("the ledger is closed")])

    async def end(self) -> None:
        """Do what was asked for before, and end; a worker to which somebody else has said so is waited for."""
        with suppress(LedgerError):
            await self.ask(_END)
        self._thread.join()  # it has said that it is at its end

    def stop(self) -> None:
        """Have it end, too, but wait for nothing; for who has no event loop."""
        self._jobs.put([_END])

    def join(self, seconds: float) -> None:
        """Wait so long until it has ended."""
        self._thread.join(seconds)

    def rest(self) -> _Rest:
        """Have it do what was asked for before, disconnect, and wait; it connects again when it is next needed."""
        rest = _Rest()
        if threading.current_thread() is self._thread:
            # What it is just doing forks, a clock for example. The batch is done again or fails, and nobody shares its connection.
            self._store.close()
            rest.reached.set()
        else:
            self._hand_over([rest])
        return rest

    def _run(self, work: Callable[[S, Sequence[Any]], Sequence[Any]]) -> None:
        end = None
        while end is None:
            end = self._turn(work)
        self._store.close()
        self._has_ended = True
        self._refuse(self._taken)  # it came together with the order to end, and behind it
        self._refuse_late()
        self._give([end], [None])

    def _turn(self, work: Callable[[S, Sequence[Any]], Sequence[Any]]) -> _Job | None:
        """Carry out one batch; the order to end, if it has come."""
        # While the thread waits for more it must hold on to nothing that was asked for: it may be what keeps a ledger alive.
        jobs = self._take()
        last = jobs.pop() if isinstance(jobs[-1].request, _Order) else None
        jobs = list(filter(_is_new, jobs))
        if jobs:
            self._give(jobs, _answers(self._store, work, [job.request for job in jobs]))
        if last is None or not isinstance(last.request, _Rest):
            return last
        self._store.close()
        last.request.reached.set()
        last.request.over.wait()
        return None

    def _give(self, jobs: Sequence[_Job], answers: Sequence[Any]) -> None:
        _answer(jobs, answers)
        # Of two loops the one that asked first may have handed over last.
        self._answered = max(self._answered, *(job.number for job in jobs))
        self._has_answered.set()

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        size = 0
        while not jobs or (size < _MOST and not isinstance(jobs[-1].request, _Order) and (self._taken or not self._jobs.empty())):
            if not self._taken:
                self._taken.extend(self._jobs.get())
            jobs.append(self._taken.popleft())
            size += jobs[-1].size
        self._alone = self._alone + 1 if len(jobs) == 1 else 0
        return jobs


def _is_new(job: _Job) -> bool:
    """Take a job, unless it has been: what was asked for once more may have been handed over the first time, too."""
    if isinstance(job, _Asked):
        if job.is_taken:
            return False
        job.is_taken = True
    return True


def _answers(store: S, work: Callable[[S, Sequence[Any]], Sequence[Any]], requests: Sequence[Any]) -> Sequence[Any]:
    try:
        return work(store, requests)
    except LedgerError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - whoever waits has to be told, whatever it is
        failure = failed(error)
    return [again(failure) for _ in requests]


def failed(error: Exception) -> LedgerError:
    """What to tell whoever waits of an error that nobody expects."""
    failure = LedgerError(f"the ledger failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def again(error: LedgerError) -> LedgerError:
    """The same error for one more who waits: every `raise` adds to an exception's traceback."""
    copy = type(error)(str(error))
    copy.__cause__ = error.__cause__
    return copy


def _answer(jobs: Sequence[_Job], answers: Sequence[Any]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Asked]] = {}
    for job, answer in zip(jobs, answers, strict=True):
        if isinstance(job, _Asked):
            job.brought = answer
            by_loop.setdefault(job.get_loop(), []).append(job)
    for loop, answered in by_loop.items():
        try:
            loop.call_soon_threadsafe(_give_all, answered)
        except RuntimeError:
            continue  # the loop is closed, and whoever asked is gone with it


def _give_all(answered: Sequence[_Asked]) -> None:
    for asked in answered:
        asked.give(asked.brought)


class _Working:
    """The workers of this process; while it forks, all of them are disconnected and at rest, and none is started.

    A child inherits what SQLite knows of the locks that its process holds, and would believe that it holds them, too: it would write
    without any, and lose all of that when its parent takes the log away as the last one that uses it. A socket it would share.

    Attributes:
        lock: Held while workers are started, and by whoever forks.
        workers: All of them that somebody holds on to.
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Be a process without workers, as one that was forked off is; threads that it doesn't have may hold the old lock."""
        self.lock = threading.RLock()
        self.workers: weakref.WeakSet[Worker[Any]] = weakref.WeakSet()
        self._rests: list[_Rest] = []

    def rest(self) -> None:
        """Come back when nobody works."""
        self.lock.acquire()
        for worker in list(self.workers):
            # One after the other: of two connections that close at once, neither takes SQLite's log away as the last one does.
            rest = worker.rest()
            self._rests.append(rest)
            while not rest.reached.is_set():
                # When a signal's handler raises here, a second Ctrl-C's for example, Python says so at most, and forks all the same.
                with suppress(BaseException):
                    rest.reached.wait()

    def go_on(self) -> None:
        """Let them work again."""
        for rest in self._rests:
            rest.over.set()
        self._rests = []
        self.lock.release()


WORKING: Final = _Working()
if hasattr(os, "register_at_fork"):  # pragma: no branch - where processes don't fork, there is nothing to see to
    os.register_at_fork(before=WORKING.rest, after_in_parent=WORKING.go_on, after_in_child=WORKING.begin_anew)


@atexit.register
def _stop_all() -> None:
    """Close the connections of ledgers that nobody closed; what was answered is on disk already."""
    mine = [worker for worker in WORKING.workers if worker.pid == os.getpid()]
    for worker in mine:
        worker.stop()
    for worker in mine:
        worker.join(5.0)
