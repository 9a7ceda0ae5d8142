"""What all durable ledgers have in common: two threads, one that writes in batches and one that reads."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final, Protocol, Self

from saga.errors import LedgerCorrupt, LedgerError, MisuseError
from saga.events import AnyEvent, SagaStatus
from saga.ledger import Entry, Ledger, asked_for, moment_ago
from saga.ledgers.rows import Acquire, Append, Beat, Prune, Pruned, Redact, Release, Request, Writer, check_name, iso
from saga.ledgers.workers import WORKING, Worker, again, failed
from saga.tasks import outlasting
from saga.text import shown

MAX_EVENT_BYTES: Final = 16 * 2**20
_LONGEST_LEASE: Final = 10**9
"""When a longer one ends no date can say."""
_PATIENCE: Final = 10.0
"""Seconds; it is no longer for a longer lease: whoever waits for a database that is gone would hear of it only after that."""


class Store(Protocol):
    """A database, from the one thread that uses it; it connects when it is first used, and again after `close` or a failure."""

    def write(self, requests: Sequence[Request]) -> Sequence[Any]:
        """Carry out a batch of requests.

        When it returns, all of it is on disk. A request that conflicts has a `LedgerConflict` for an answer and changes nothing;
        the others are carried out.

        Raises:
            LedgerError: None was carried out, or, where the message says so, it isn't known.
        """
        ...

    def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga."""
        ...

    def list(self, statuses: Collection[SagaStatus] | None, parent: str | None) -> Sequence[Entry]:
        """What is known of the sagas."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


class DurableLedger(Ledger):
    """Keeps sagas in a database; see the ledgers themselves.

    A write that was asked for is carried out whatever happens to whoever waits for it. So who is cancelled while it creates or appends
    gets the answer all the same: a saga whose every task is cancelled, as asyncio.run does before it ends, knows where it stands.
    """

    lease: float | None
    durable = True
    max_event_bytes: int | None

    def __init__(
        self,
        name: str,
        store: Callable[..., Store],
        *,
        lease: float,
        patience: float | None,
        max_event_bytes: int,
        redact: Redact | None,
    ) -> None:
        _refuse_no_number("lease", lease)
        patience = min(_PATIENCE, lease / 3) if patience is None else patience
        _refuse_no_number("patience", patience)
        _refuse_no_number("max_event_bytes", max_event_bytes)
        if lease > _LONGEST_LEASE:
            raise MisuseError(f"a lease of at most {_LONGEST_LEASE:,} seconds", got=repr(lease))
        # The sign of life waits behind a write. (Three times 0.1 is a bit more than 0.3.)
        if round(3 * patience, 9) > lease:
            hint = "The word that the process is alive may wait for so long, and others take over from one that says nothing."
            got = f"{patience:g} for patience and {lease:g} for lease"
            raise MisuseError("a patience of at most a third of the lease", got=got, hint=hint)
        if redact is not None and not callable(redact):
            raise MisuseError("a function for redact", got=shown(redact))
        self.lease = lease
        self.max_event_bytes = max_event_bytes
        self._name = name
        self._store: Callable[[], Store] = partial(store, patience=patience)
        self._patience = patience
        self._rows = Writer(max_event_bytes, redact)
        self._threads: tuple[Worker[Store], Worker[Store]] | None = None
        self._closed = False

    def __repr__(self) -> str:
        """Say where it is."""
        return self._name

    async def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], *, under: int | None = None) -> int:
        """Record a new saga's first events."""
        request = self._rows.create(saga_id, owner, events, under)
        token: int = await outlasting(self._writer.ask(request, len(request.row.body)))
        return token

    async def acquire(self, saga_id: str, owner: str, *, under: int | None = None) -> int:
        """Take the lease of a saga.

        A holder whose process is known to be gone doesn't count as alive, even if its lease goes on for a while.
        """
        check_name("saga id", saga_id)
        check_name("owner", owner)
        token: int = await self._writer.ask(Acquire(saga_id, owner, under))
        return token

    async def release(self, saga_id: str, token: int) -> None:
        """Give the lease back."""
        check_name("saga id", saga_id)
        await self._writer.ask(Release(saga_id, token))

    async def beat(self, owner: str) -> None:
        """Say that an owner is alive."""
        check_name("owner", owner)
        await self._writer.ask(Beat(owner))

    async def append(self, saga_id: str, events: Sequence[AnyEvent], *, expected_version: int, token: int, release: bool = False) -> None:
        """Record events."""
        check_name("saga id", saga_id)
        request = Append(saga_id, token, release, self._rows.row(saga_id, expected_version, events))
        await outlasting(self._writer.ask(request, len(request.row.body)))

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        """All events of a saga."""
        check_name("saga id", saga_id)
        events: Sequence[AnyEvent] = await self._reader.ask(lambda store: store.read(saga_id))
        return events

    async def list(self, *, statuses: Collection[SagaStatus] | None = None, parent: str | None = None) -> Sequence[Entry]:
        """The sagas."""
        check_name("saga id", parent or "")
        wanted = asked_for(statuses)
        entries: Sequence[Entry] = await self._reader.ask(lambda store: store.list(wanted, parent))
        return entries

    async def prune(self, older_than: timedelta) -> Sequence[str]:
        """Forget old sagas; a few hundred at a time, so that other appends get their turn."""
        before, after = iso(moment_ago(older_than)), 0
        forgotten: tuple[str, ...] = ()
        while True:
            pruned: Pruned = await self._writer.ask(Prune(before, after))
            forgotten += pruned.saga_ids
            if pruned.last is None:
                return forgotten
            after = pruned.last

    async def close(self) -> None:
        """Write what was asked for before, and let go of the database."""
        self._closed = True
        if self._threads is not None and self._threads[0].pid == os.getpid():
            writer, reader = self._threads
            # One after the other: of two connections that close at once, neither takes SQLite's log away as the last one does.
            try:
                await reader.end()
            finally:
                await writer.end()

    async def __aenter__(self) -> Self:
        """Use it for the length of a block.

        Raises:
            LedgerError: It is closed.
        """
        if self._closed:
            raise self._no_more()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    @property
    def _writer(self) -> Worker[Store]:
        return self._workers()[0]

    @property
    def _reader(self) -> Worker[Store]:
        return self._workers()[1]

    def _workers(self) -> tuple[Worker[Store], Worker[Store]]:
        if self._closed:
            raise self._no_more()
        # A process that was forked off has none of our threads, and must not touch their connections.
        if self._threads is None or self._threads[0].pid != os.getpid():
            with WORKING.lock:
                self._start()
        assert self._threads is not None  # they have just been started
        return self._threads

    def _no_more(self) -> LedgerError:
        return LedgerError(f"{self._name} is closed, and can't be used again. Make another one")

    def _start(self) -> None:
        if self._threads is not None and self._threads[0].pid == os.getpid():
            return  # the event loop of another thread was faster
        writer = Worker(f"{self._name} (writes)", self._store, _at_once)
        try:
            reader = Worker(f"{self._name} (reads)", self._store, partial(_one_by_one, self._patience))
        except BaseException:
            # The system may refuse a thread; whoever tries again would leave one behind each time.
            writer.stop()
            raise
        self._threads = writer, reader
        for worker in self._threads:
            # At the end of the process, workers.py sees to it that they end, and waits for that.
            weakref.finalize(self, worker.stop).atexit = False


def _at_once(store: Store, requests: Sequence[Request]) -> Sequence[Any]:
    return store.write(requests)


def _refuse_no_number(what: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
        raise MisuseError(f"a number above 0 for {what}", got=repr(number))


def _one_by_one(patience: float, store: Store, reads: Sequence[Callable[[Store], Any]]) -> Sequence[Any]:
    answers: list[Any] = []
    in_vain = 0
    for read in reads:
        begun = time.monotonic()
        try:
            answers.append(read(store))
            in_vain = 0
        except LedgerError as error:
            answers.append(error)
            waited = time.monotonic() - begun > patience / 2 and not isinstance(error, LedgerCorrupt)
            in_vain = in_vain + 1 if waited else 0
            if in_vain > 1:
                # One alone may have asked for too much. Where a second one waited in vain, each of the others would wait as long again.
                return answers + [again(error) for _ in reads[len(answers) :]]
        except Exception as error:  # noqa: BLE001 - whoever waits has to be told, whatever it is, and nobody else
            answers.append(failed(error))
    return answers
