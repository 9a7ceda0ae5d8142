"""The ledger in PostgreSQL: what becomes of appends when the connection breaks, and what is said when the database fails."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from typing import Any

import psycopg
import pytest
from stageflow.api import Pipeline

from saga import FailFast, Ledger, LedgerConflict, LedgerCorrupt, LedgerError, MisuseError, SagaCoordinator, SagaStatus
from saga.events import SagaEnded, SagaStarted, StageStarted
from saga.ledgers import durable as durable_module
from saga.ledgers import postgres as module
from saga.ledgers.postgres import PostgresLedger
from tests.places import PostgresSchema, patient
from tests.test_ledger import GRAPH


def started(saga_id: str = "s") -> SagaStarted:
    return SagaStarted(saga_id=saga_id, pipeline="p", graph=GRAPH, policy=FailFast())


def attempt(number: int) -> StageStarted:
    return StageStarted(stage="a", attempt=number)


def using(ledger: Ledger, act: Callable[[Any], Any]) -> Any:
    """Do something with a ledger, and close it."""

    async def play() -> Any:
        try:
            return await act(ledger)
        finally:
            await ledger.close()

    return asyncio.run(play())


@pytest.fixture
def place(postgres: Any, new_schema: Callable[[], str]) -> PostgresSchema:
    return PostgresSchema(postgres.get_uri(), new_schema())


def begun(place: PostgresSchema, *saga_ids: str) -> None:
    """Begin sagas as somebody does who has patience: where it is over soon, a slow client that makes the schema is taken for gone."""

    async def play(ledger: Ledger) -> None:
        for saga_id in saga_ids:
            await ledger.create(saga_id, "me", (started(saga_id),))

    using(place.open(), play)


async def somebody_waits(place: PostgresSchema, many: int = 1) -> None:
    """Come back when so many ledgers wait for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'saga'"
    while place.execute(waiting) < [(many,)]:
        await asyncio.sleep(0)


# -- a connection that breaks ----------------------------------------------------------------------------------------


class Network:
    """Stands between a ledger and the server, and can swallow what is said next and break the connection.

    Attributes:
        port: Where the ledger finds it.
        swallow: `question`: the next one that holds `word` never gets to the server; `answer`: the server carries it out, and its answer
            gets lost; `all`: from it on the server hears nothing any more, as of a machine that lost its power.
        lost: How often it did so.
        taken: How many connections it has taken.
        is_down: Whether it takes none, and closes those that somebody tries to make.
        meanwhile: What happens before the connection breaks.
    """

    def __init__(self, directory: str) -> None:
        self.swallow: str | None = None
        self.word = b'"at'  # of every event
        self.lost = 0
        self.taken = 0
        self.is_down = False
        self.meanwhile: Callable[[], Any] = lambda: None
        self._server = f"{directory}/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [self._start(self._accept)]

    def _start(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_down:
                client.close()
                continue
            self.taken += 1
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            doomed = threading.Event()
            self._threads += [self._start(self._questions, client, server, doomed), self._start(self._answers, server, client, doomed)]

    def _questions(self, client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self.swallow is not None and self.word in data:
                    kind, self.swallow, self.lost = self.swallow, None, self.lost + 1
                    if kind == "question":
                        break
                    if kind == "all":
                        while client.recv(65536):
                            pass
                        return
                    doomed.set()
                server.sendall(data)
        self._break(client, server)

    def _answers(self, server: socket.socket, client: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if doomed.is_set():
                    self.meanwhile()
                    break
                client.sendall(data)
        self._break(client, server)

    def _break(self, *sockets: socket.socket) -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        # Shut down, because closing alone does not wake a thread that waits for the next connection.
        self._break(self._listener)
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def network(postgres: Any) -> Iterator[Network]:
    between = Network(str(postgres.pgdata))
    yield between
    between.close()


class Hurried:
    """Time that has passed at once where somebody sleeps, and else passes as ever."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger's patience is soon over, and a server that is slow has time to answer all the same."""
    monkeypatch.setattr(module, "time", Hurried())


def over(network: Network, place: PostgresSchema, **options: Any) -> PostgresLedger:
    dsn = f"host=127.0.0.1 port={network.port} user=postgres dbname=postgres sslmode=disable gssencmode=disable"
    return PostgresLedger(dsn, schema=place.schema, **patient(options))


@pytest.mark.parametrize("lost", ["question", "answer"])
def test_an_append_whose_outcome_got_lost_is_recorded_once(place: PostgresSchema, network: Network, lost: str) -> None:
    async def play(ledger: Ledger) -> Any:
        token = await ledger.create("s", "me", (started(),))
        network.swallow = lost
        await ledger.append("s", (attempt(1), attempt(2)), expected_version=1, token=token)
        await ledger.append("s", (attempt(3),), expected_version=3, token=token)
        return await ledger.read("s")

    events = using(over(network, place), play)

    assert network.lost == 1
    assert [getattr(event, "attempt", 0) for event in events] == [0, 1, 2, 3]


def test_an_append_whose_answer_got_lost_does_not_count_when_the_lease_was_lost_meanwhile(place: PostgresSchema, network: Network) -> None:
    """It is recorded; but whoever holds the saga now has gone on from there, and what it was to guard may have been done and undone."""
    network.meanwhile = lambda: place.execute("UPDATE sagas SET owner = 'you', token = token + 1")

    async def play(ledger: Ledger) -> Any:
        token = await ledger.create("s", "me", (started(),))
        network.swallow = "answer"
        with pytest.raises(LedgerConflict) as overtaken:
            await ledger.append("s", (attempt(1),), expected_version=1, token=token)
        return overtaken.value, await ledger.read("s")

    overtaken, events = using(over(network, place), play)

    assert network.lost == 1
    assert len(events) == 2
    assert overtaken.holder == "you"
    assert "saga s is written with lease token 1, the current one is 2" in str(overtaken)
    assert str(overtaken).endswith("; whether it was recorded is not known")


@pytest.mark.parametrize("lost", ["question", "answer"])
def test_a_saga_whose_creation_got_lost_is_created_once(place: PostgresSchema, network: Network, lost: str) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.beat("me")
        network.swallow = lost
        token = await ledger.create("s", "me", (started(),))
        await ledger.append("s", (attempt(1),), expected_version=1, token=token)
        return await ledger.read("s")

    events = using(over(network, place), play)

    assert network.lost == 1
    assert len(events) == 2


@pytest.mark.parametrize("lost", ["question", "answer"])
def test_when_a_batch_got_lost_what_conflicted_conflicts_and_what_was_recorded_is_recorded(
    place: PostgresSchema, network: Network, lost: str
) -> None:
    async def play(ledger: Ledger) -> Any:
        await asyncio.gather(*(ledger.create(name, "me", (started(name),)) for name in "ab"))
        token = await ledger.acquire("b", "me")
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            # While somebody has the tables to himself, appends queue up behind the first of them.
            other.execute(f'LOCK TABLE "{place.schema}".sagas')
            first = asyncio.create_task(ledger.append("b", (attempt(1),), expected_version=1, token=token))
            await somebody_waits(place)
            calls = [
                ledger.append("a", (attempt(1),), expected_version=1, token=1),
                ledger.append("a", (attempt(2),), expected_version=2, token=1),
                ledger.append("a", (attempt(9),), expected_version=9, token=1),
                ledger.append("b", (attempt(2),), expected_version=2, token=1),
                ledger.create("a", "me", (started("a"),)),
                ledger.create("c", "me", (started("c"),)),
                ledger.append("z", (attempt(1),), expected_version=1, token=1),
            ]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(0)
            network.swallow = lost
            network.word = b'"attempt\\":9'
            other.rollback()
            answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        return answers, [len(await ledger.read(name)) for name in "abcz"]

    answers, events = using(over(network, place), play)

    assert network.lost == 1
    assert [type(answer) for answer in answers[1:]] == [
        type(None), type(None), LedgerConflict, LedgerConflict, LedgerConflict, int, LedgerConflict,
    ]  # fmt: skip
    assert [str(answer).partition(":")[0] for answer in answers if isinstance(answer, LedgerConflict)] == [
        "saga a has 3 events, expected 9",
        "saga b is written with lease token 1, the current one is 2",
        "saga a exists already; nothing was recorded",
        "there is no saga z",
    ]
    assert events == [3, 2, 1, 0]


def test_a_lease_is_taken_though_the_answer_got_lost(place: PostgresSchema, network: Network) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        await ledger.release("s", 1)
        network.swallow, network.word = "answer", b"token + 1"
        token = await ledger.acquire("s", "you")
        await ledger.append("s", (attempt(1),), expected_version=1, token=token)
        return await ledger.list()

    (entry,) = using(over(network, place), play)

    assert network.lost == 1
    assert entry.owner == "you"


def test_what_is_read_is_asked_for_again_when_the_answer_got_lost(place: PostgresSchema, network: Network) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        network.swallow, network.word = "answer", b"JOIN events"
        return await ledger.read("s")

    assert len(using(over(network, place), play)) == 1
    assert network.lost == 1


@pytest.mark.parametrize(("deed", "word"), [("acquire", b"token + 1"), ("prune", b"DELETE FROM events")])
def test_who_vanishes_in_the_midst_of_a_transaction_keeps_its_locks_no_longer_than_others_wait(
    place: PostgresSchema, network: Network, deed: str, word: bytes
) -> None:
    async def play(ledger: Ledger) -> Any:
        token = await ledger.create("s", "me", (started(),))
        vanishing = over(network, place, patience=1)
        await vanishing.acquire("s", "me")
        network.swallow, network.word = "all", word
        lost = asyncio.create_task(vanishing.acquire("s", "me") if deed == "acquire" else vanishing.prune(timedelta(0)))
        while not network.lost:
            await asyncio.sleep(0)

        await ledger.append("s", (attempt(1),), expected_version=1, token=token + 1)

        with pytest.raises(LedgerError):
            await lost
        await vanishing.close()
        return await ledger.read("s")

    assert len(using(place.open(), play)) == 2


@pytest.mark.usefixtures("hurried")
def test_when_it_stays_unknown_what_became_of_an_append_the_error_says_so(place: PostgresSchema, network: Network) -> None:
    async def play(ledger: Ledger) -> None:
        token = await ledger.create("s", "me", (started(),))
        network.swallow = "answer"
        network._break(network._listener)
        with pytest.raises(LedgerError, match="whether it was recorded is not known") as caught:
            await ledger.append("s", (attempt(1),), expected_version=1, token=token)
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        with pytest.raises(LedgerError, match="nothing was recorded"):
            await ledger.append("s", (attempt(2),), expected_version=2, token=token)

    using(over(network, place, patience=10), play)

    assert network.lost == 1
    assert len(using(place.open(), lambda ledger: ledger.read("s"))) == 2


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("deed", "word"), [("create", b"SELECT write"), ("acquire", b"COMMIT")])
def test_what_was_begun_or_taken_without_its_owner_ever_knowing_is_not_held_by_its_life(
    place: PostgresSchema, network: Network, deed: str, word: bytes
) -> None:
    """As long as that one has other sagas, nobody else could go on with it."""

    async def play(ledger: Ledger) -> int:
        elsewhere = place.open()
        await ledger.beat("me")
        if deed == "acquire":
            await elsewhere.release("s", await elsewhere.create("s", "you", (started(),)))
        network.swallow, network.word, network.meanwhile = "answer", word, lambda: setattr(network, "is_down", True)
        with pytest.raises(LedgerError, match="whether it was recorded is not known"):
            await (ledger.create("s", "me", (started(),)) if deed == "create" else ledger.acquire("s", "me"))
        network.is_down = False
        await ledger.beat("me")

        token = await elsewhere.acquire("s", "you")

        await elsewhere.append("s", (attempt(1),), expected_version=1, token=token)
        await elsewhere.close()
        return len(await ledger.read("s"))

    assert using(over(network, place, patience=10), play) == 2
    assert network.lost == 1


def test_a_connection_that_died_while_nobody_used_it_is_replaced(place: PostgresSchema) -> None:
    async def play(ledger: Ledger) -> Any:
        token = await ledger.create("s", "me", (started(),))
        await ledger.read("s")
        place.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'saga'")
        await ledger.append("s", (attempt(1),), expected_version=1, token=token)
        return await ledger.read("s")

    assert len(using(place.open(), play)) == 2


def test_a_server_that_is_restarted_costs_no_append(place: PostgresSchema, postgres: Any) -> None:
    restarted, names = threading.Event(), [f"s{number}" for number in range(20)]

    def restart() -> None:
        postgres.stop()
        postgres.ensure_postgres_running()
        restarted.set()

    async def one(ledger: Ledger, name: str) -> int:
        token = await ledger.create(name, "me", (started(name),))
        number = 0
        while number < 5 or not restarted.is_set():
            number += 1
            await ledger.append(name, (attempt(number),), expected_version=number, token=token)
        await ledger.append(name, (attempt(number + 1),), expected_version=number + 1, token=token)
        return number + 1

    async def play(ledger: Ledger) -> Any:
        sagas = asyncio.gather(*(one(ledger, name) for name in names))
        await asyncio.to_thread(restart)
        return await sagas, [await ledger.read(name) for name in names]

    counts, found = using(place.open(), play)

    for count, events in zip(counts, found, strict=True):
        assert [getattr(event, "attempt", 0) for event in events] == list(range(count + 1))


@pytest.mark.usefixtures("hurried")
def test_a_database_that_is_gone_is_told_after_the_patience_and_found_again_when_it_is_back(place: PostgresSchema, postgres: Any) -> None:
    async def play(ledger: Ledger) -> Any:
        token = await ledger.create("s", "me", (started(),))
        await asyncio.to_thread(postgres.stop)
        try:
            with pytest.raises(LedgerError, match="failed: "):
                await ledger.append("s", (attempt(1),), expected_version=1, token=token)
            with pytest.raises(LedgerError, match="nothing was recorded"):
                await ledger.read("s")
        finally:
            await asyncio.to_thread(postgres.ensure_postgres_running)
        await ledger.append("s", (attempt(1),), expected_version=1, token=token)
        return await ledger.read("s")

    assert len(using(place.open(patience=10), play)) == 2


@pytest.mark.usefixtures("hurried")
def test_of_what_was_only_read_nobody_is_told_that_it_may_have_been_recorded(place: PostgresSchema, postgres: Any) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        await ledger.read("s")
        await asyncio.to_thread(postgres.stop)
        try:
            return await asyncio.gather(ledger.read("s"), ledger.list(), return_exceptions=True)
        finally:
            await asyncio.to_thread(postgres.ensure_postgres_running)

    errors = using(place.open(patience=10), play)

    assert [type(error) for error in errors] == [LedgerError, LedgerError]
    assert all(str(error).endswith("; nothing was recorded") for error in errors)


@contextlib.contextmanager
def stopped(place: PostgresSchema, postgres: Any) -> Iterator[None]:
    """A server of which no process does anything any more, while its machine still takes what is sent to it."""
    pids = [postgres.get_pid(), *(pid for (pid,) in place.execute("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()"))]

    def send(number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it served a connection that was closed just before
                os.kill(pid, number)

    send(signal.SIGSTOP)
    try:
        yield
    finally:
        send(signal.SIGCONT)


def test_a_server_that_hangs_is_given_up_and_what_it_was_told_is_recorded_once_at_most(place: PostgresSchema, postgres: Any) -> None:
    begun(place, "s")

    async def play(ledger: Ledger) -> Any:
        await asyncio.gather(ledger.beat("me"), ledger.read("s"))
        with stopped(place, postgres):
            deeds = [ledger.append("s", (attempt(1),), expected_version=1, token=1), ledger.read("s"), ledger.acquire("s", "me")]
            errors = [await asyncio.wait_for(asyncio.gather(deed, return_exceptions=True), 60) for deed in deeds]
        place.execute("SELECT 1")  # it is awake
        token = await ledger.acquire("s", "me")
        known = await ledger.read("s")
        await ledger.append("s", (attempt(len(known)),), expected_version=len(known), token=token)
        return [str(error) for (error,) in errors], known, await ledger.read("s")

    errors, known, events = using(place.open(patience=0.1), play)

    appended, read, acquired = errors
    silent = f"the ledger in schema {place.schema!r} failed: the server has said nothing for 2 s; "
    assert appended == silent + "whether it was recorded is not known"
    assert read == silent + "nothing was recorded"
    assert "timeout" in acquired
    assert acquired.endswith("; nothing was recorded")
    assert events[: len(known)] == known
    assert [getattr(event, "attempt", 0) for event in events] == list(range(len(known) + 1))


# -- a database that refuses -----------------------------------------------------------------------------------------


def test_a_database_that_is_not_there_is_told(place: PostgresSchema) -> None:
    ledger = PostgresLedger(place.dsn.replace("/postgres?", "/nowhere?"), patience=0.01)

    with pytest.raises(LedgerError, match=r"the ledger in schema 'saga' failed: .*database .nowhere. does not exist"):
        using(ledger, lambda ledger: ledger.list())


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_those_who_read_together_from_a_server_that_is_gone_do_not_wait_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for file in (module, durable_module):
        monkeypatch.setattr(file, "time", clock)
    ledger = PostgresLedger("host=/nowhere user=x", patience=10)

    async def play(ledger: Ledger) -> Any:
        return await asyncio.gather(*(ledger.read(f"s{number}") for number in range(100)), return_exceptions=True)

    errors = using(ledger, play)

    assert all(type(error) is LedgerError and "nothing was recorded" in str(error) for error in errors)
    assert clock.now <= 2 * 10


def test_a_read_that_asks_for_too_much_fails_none_that_came_with_it(place: PostgresSchema, monkeypatch: pytest.MonkeyPatch) -> None:
    using(place.open(), lambda ledger: ledger.create("s", "me", (started(),)))
    # As by a statement_timeout, which would have to be a short one, and would cut off what asks for little where the machine is slow.
    monkeypatch.setattr(
        module, "_ENTRIES", "SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(60), %(others)s::text[], %(parent)s::text, %(now)s"
    )
    ledger = place.open(patience=0.2)

    async def play(ledger: Ledger) -> Any:
        return await asyncio.gather(ledger.list(), ledger.read("s"), ledger.list(), ledger.read("s"), return_exceptions=True)

    listed, events, *others = using(ledger, play)

    assert "canceling statement due to user request" in str(listed)
    assert type(others[0]) is type(listed)
    assert [len(events), len(others[1])] == [1, 1]


def test_what_a_role_may_not_do_is_told_at_once(place: PostgresSchema) -> None:
    place.execute("CREATE ROLE somebody")
    ledger = place.open(dsn=f"{place.dsn}&options=-crole%3Dsomebody", schema="out_of_bounds", lease=10_800, patience=3_600)

    with pytest.raises(LedgerError, match="permission denied for database"):
        using(ledger, lambda ledger: ledger.read("s"))


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_any_text_is_refused_before_anything_runs(place: PostgresSchema, encoding: str) -> None:
    place.execute(f"CREATE DATABASE {encoding} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    ledger = PostgresLedger(place.dsn.replace("/postgres?", f"/{encoding.lower()}?"))

    if encoding == "LATIN1":
        with pytest.raises(LedgerError, match="needs a database that can hold any text, with the encoding UTF8; this one has LATIN1"):
            using(ledger, lambda ledger: ledger.create("s", "me", (started(),)))
    else:
        assert using(ledger, lambda ledger: ledger.create("5 €", "me", (started("5 €"),))) == 1


@pytest.mark.usefixtures("hurried")
def test_a_database_that_may_only_be_read_is_read_and_refuses_appends(place: PostgresSchema) -> None:
    using(place.open(), lambda ledger: ledger.create("s", "me", (started(),)))

    async def play(ledger: Ledger) -> Any:
        calls = (ledger.append("s", (attempt(number),), expected_version=number, token=1) for number in (1, 2))
        return await asyncio.gather(*calls, return_exceptions=True), await ledger.read("s")

    dsn = f"{place.dsn}&options=-c%20default_transaction_read_only%3Don"
    refused, events = using(place.open(dsn=dsn, patience=10), play)

    assert all("cannot execute" in str(error) and "in a read-only transaction; nothing was recorded" in str(error) for error in refused)
    assert len(events) == 1


@contextlib.contextmanager
def read_only(place: PostgresSchema) -> Iterator[None]:
    """A server that may only be read, as one that is not yet promoted in a failover."""
    place.execute("ALTER ROLE postgres SET default_transaction_read_only = on")
    place.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'saga'")
    try:
        yield
    finally:
        writing = PostgresSchema(f"{place.dsn}&options=-c%20default_transaction_read_only%3Doff", place.schema)
        writing.execute("ALTER ROLE postgres RESET default_transaction_read_only")


@pytest.mark.usefixtures("hurried")
def test_a_database_that_may_be_written_to_again_is(place: PostgresSchema) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        with read_only(place), pytest.raises(LedgerError, match="in a read-only transaction"):
            await ledger.append("s", (attempt(1),), expected_version=1, token=1)
        await ledger.append("s", (attempt(1),), expected_version=1, token=1)
        return await ledger.read("s")

    assert len(using(place.open(patience=10), play)) == 2


def test_a_server_that_may_only_be_read_for_a_while_costs_no_append(place: PostgresSchema, network: Network) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        with read_only(place):
            append = asyncio.create_task(ledger.append("s", (attempt(1),), expected_version=1, token=1))
            while network.taken < 3:  # it has been refused in the second
                assert not append.done()
                await asyncio.sleep(0)
        await append
        return await ledger.read("s")

    assert len(using(over(network, place), play)) == 2


def test_an_append_that_somebody_cancels_is_done_again(place: PostgresSchema) -> None:
    """As a `statement_timeout` of the role does, while somebody has a lock."""

    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute(f'LOCK TABLE "{place.schema}".sagas')
            append = asyncio.create_task(ledger.append("s", (attempt(1),), expected_version=1, token=1))
            await somebody_waits(place)
            waiting = "wait_event_type = 'Lock' AND application_name = 'saga'"
            assert place.execute(f"SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE {waiting}") == [(True,)]  # noqa: S608 - a constant
        await append
        return await ledger.read("s")

    assert len(using(place.open(), play)) == 2


def test_a_lock_that_somebody_keeps_is_told_after_the_patience(place: PostgresSchema) -> None:
    begun(place, "s")

    async def play(ledger: Ledger) -> None:
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute(f'LOCK TABLE "{place.schema}".sagas')
            with pytest.raises(LedgerError, match="canceling statement due to lock timeout; nothing was recorded"):
                await ledger.append("s", (attempt(1),), expected_version=1, token=1)
        await ledger.append("s", (attempt(1),), expected_version=1, token=1)

    using(place.open(patience=0.05), play)


def test_an_owner_says_that_it_is_alive_while_somebody_keeps_the_lock_that_its_appends_wait_for(place: PostgresSchema) -> None:
    """As VACUUM FULL does: sagas that have nothing to record in that time would else be taken for gone."""

    begun(place, "s")

    async def play(ledger: Ledger) -> Any:
        place.execute("DELETE FROM owners")
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute(f'LOCK TABLE "{place.schema}".events')
            appends = (ledger.append("s", (attempt(1),), expected_version=1, token=1) for _ in range(2))
            return await asyncio.gather(*appends, ledger.beat("me"), return_exceptions=True)

    *refused, heard = using(place.open(patience=0.2), play)

    assert all("canceling statement due to lock timeout" in str(error) for error in refused)
    assert heard is None
    assert place.owners() == ["me"]


def test_an_append_that_the_database_refuses_does_not_take_others_with_it(place: PostgresSchema) -> None:
    async def play(ledger: Ledger) -> Any:
        await asyncio.gather(*(ledger.create(name, "me", (started(name),)) for name in "abc"))
        place.execute("ALTER TABLE events ADD CHECK (saga <> 'b' OR first = 0)")
        calls = (ledger.append(name, (attempt(1),), expected_version=1, token=1) for name in "abcz")
        return await asyncio.gather(*calls, return_exceptions=True), [len(await ledger.read(name)) for name in "abc"]

    (first, second, third, fourth), events = using(place.open(), play)

    assert (first, third) == (None, None)
    assert type(second) is LedgerError
    assert "violates check constraint" in str(second)
    assert type(fourth) is LedgerConflict
    assert events == [2, 1, 2]


def test_transactions_that_lock_each_other_out_go_well_the_next_time(place: PostgresSchema) -> None:
    async def play(ledger: Ledger) -> Any:
        await asyncio.gather(*(ledger.create(name, "me", (started(name),)) for name in "ab"))
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute("SET deadlock_timeout = '100s'")  # so that the ledger is the one that gives up
            row = f'SELECT 1 FROM "{place.schema}".sagas WHERE id = %s FOR UPDATE'  # noqa: S608 - the schema is ours
            other.execute(row, ("b",))
            calls = [asyncio.create_task(ledger.append(name, (attempt(1),), expected_version=1, token=1)) for name in "ab"]
            await somebody_waits(place)
            await asyncio.to_thread(other.execute, row, ("a",))
            other.rollback()
        return await asyncio.gather(*calls)

    assert using(place.open(), play) == [None, None]


def test_what_is_recorded_stays_so_when_what_was_asked_for_with_it_is_done_again(place: PostgresSchema) -> None:
    async def play(ledger: Ledger) -> Any:
        await asyncio.gather(*(ledger.create(name, "me", (started(name),)) for name in "abc"))
        await ledger.release("b", 1)
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute("SET deadlock_timeout = '100s'")  # so that the ledger is the one that gives up
            other.execute(f'SET search_path TO "{place.schema}"')
            other.execute("INSERT INTO owners VALUES ('you', 'infinity')")
            calls = [
                ledger.append("a", (attempt(1),), expected_version=1, token=1),
                ledger.acquire("b", "you"),
                ledger.append("c", (attempt(1),), expected_version=1, token=1),
                ledger.append("c", (attempt(9),), expected_version=9, token=1),
            ]
            answers = asyncio.gather(*calls, return_exceptions=True)
            await somebody_waits(place)
            await asyncio.to_thread(other.execute, "SELECT 1 FROM sagas WHERE id = 'b' FOR UPDATE")
            other.rollback()
        return await answers, [len(await ledger.read(name)) for name in "abc"]

    (first, token, third, fourth), events = using(place.open(), play)

    assert (first, token, third) == (None, 2, None)
    assert isinstance(fourth, LedgerConflict)
    assert events == [2, 1, 2]


@pytest.mark.parametrize("refused", [False, True])
def test_of_what_was_asked_for_together_only_what_is_not_recorded_is_said_not_to_be(place: PostgresSchema, refused: bool) -> None:
    begun(place, *"abcd")

    async def play(ledger: Ledger) -> Any:
        if refused:  # then each is written by itself
            place.execute("ALTER TABLE events ADD CHECK (saga <> 'b' OR first = 0)")
        appends = [ledger.append(name, (attempt(1),), expected_version=1, token=1) for name in ("abd" if refused else "ab")]
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute(f"SELECT 1 FROM \"{place.schema}\".sagas WHERE id IN ('c', 'd') FOR UPDATE")  # noqa: S608 - the schema is ours
            answers = await asyncio.gather(*appends, ledger.acquire("c", "me"), return_exceptions=True)
        return [None if answer is None else str(answer).rpartition("; ")[2] for answer in answers], [
            len(await ledger.read(name)) for name in "abcd"
        ]

    answers, events = using(place.open(patience=0.05), play)

    nothing = "nothing was recorded"
    assert answers == ([None, nothing, nothing, nothing] if refused else [None, None, nothing])
    assert events == ([2, 1, 1, 1] if refused else [2, 2, 1, 1])


def test_of_those_who_wait_to_take_a_saga_one_gets_it(place: PostgresSchema) -> None:
    async def play() -> Any:
        ledgers = [place.open() for _ in range(4)]
        await ledgers[0].create("s", "me", (started(),))
        await ledgers[0].release("s", 1)
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute(f'SELECT 1 FROM "{place.schema}".sagas FOR UPDATE')  # noqa: S608 - the schema is ours
            calls = [asyncio.create_task(ledger.acquire("s", f"taker {number}")) for number, ledger in enumerate(ledgers)]
            await somebody_waits(place, len(ledgers))
            other.rollback()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.gather(*(ledger.close() for ledger in ledgers))
        return answers

    answers = asyncio.run(play())

    assert sorted(isinstance(answer, LedgerConflict) for answer in answers) == [False, True, True, True]


def test_a_saga_that_is_taken_while_others_are_forgotten_stays(place: PostgresSchema) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        await ledger.append("s", (SagaEnded(status=SagaStatus.COMPLETED),), expected_version=1, token=1, release=True)
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute(f'SET search_path TO "{place.schema}"')
            other.execute("UPDATE sagas SET owner = 'you', token = 2")
            other.execute("INSERT INTO owners VALUES ('you', 'infinity')")
            pruned = asyncio.create_task(ledger.prune(timedelta(0)))
            await somebody_waits(place)
            other.commit()
        return await pruned, await ledger.read("s")

    forgotten, events = using(place.open(), play)

    assert forgotten == ()
    assert len(events) == 2


def test_who_is_just_taking_a_saga_and_who_forgets_it_do_not_lock_each_other_out(place: PostgresSchema) -> None:
    """The server would notice that after a second, and every append would wait for it."""

    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        await ledger.append("s", (SagaEnded(status=SagaStatus.COMPLETED),), expected_version=1, token=1, release=True)
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            other.execute("SET deadlock_timeout = '10ms'")  # so that the other is the one that is told
            other.execute(f'SET search_path TO "{place.schema}"')
            other.execute("SELECT parent FROM sagas WHERE id = 's' FOR UPDATE")
            pruned = asyncio.create_task(ledger.prune(timedelta(0)))
            await somebody_waits(place)
            await asyncio.to_thread(other.execute, "UPDATE sagas SET owner = 'you', token = token + 1 WHERE id = 's'")
            other.execute("INSERT INTO owners VALUES ('you', 'infinity')")
            other.commit()
        return await pruned, await ledger.read("s")

    forgotten, events = using(place.open(), play)

    assert forgotten == ()
    assert len(events) == 2


def test_leases_that_are_given_back_together_share_a_commit(place: PostgresSchema) -> None:
    names = [f"s{number}" for number in range(20)]

    async def play(ledger: Ledger) -> Any:
        await asyncio.gather(*(ledger.create(name, "me", (started(name),)) for name in names))
        await ledger.acquire("s1", "me")
        with contextlib.closing(psycopg.connect(place.dsn)) as other:
            # While somebody has the tables to himself, the others queue up behind the first of them.
            other.execute(f'LOCK TABLE "{place.schema}".sagas')
            first = asyncio.create_task(ledger.release("s0", 1))
            await somebody_waits(place)
            tasks = [asyncio.create_task(ledger.release(name, 1)) for name in names[1:]]
            await asyncio.sleep(0)
            other.rollback()
            await asyncio.gather(first, *tasks)
        return [entry.saga_id for entry in await ledger.list() if entry.owner is not None]

    held = using(place.open(), play)

    assert held == ["s1"]
    assert place.execute("SELECT count(DISTINCT xmin::text) FROM sagas WHERE owner IS NULL") == [(2,)]


# -- how it is made --------------------------------------------------------------------------------------------------


def test_ledgers_that_make_one_schema_at_once_are_one(place: PostgresSchema) -> None:
    async def play() -> Any:
        ledgers = [place.open() for _ in range(6)]
        await asyncio.gather(*(ledger.create(f"s{number}", "me", (started(f"s{number}"),)) for number, ledger in enumerate(ledgers)))
        found = [len(await ledger.list()) for ledger in ledgers]
        await asyncio.gather(*(ledger.close() for ledger in ledgers))
        return found

    assert asyncio.run(play()) == [6] * 6
    assert place.execute("SELECT version FROM schema_version") == [(len(module.MIGRATIONS),)]


def test_who_writes_and_who_reads_first_at_once_make_one_schema(place: PostgresSchema) -> None:
    async def play(ledger: Ledger) -> Any:
        with contextlib.closing(psycopg.connect(place.dsn, autocommit=True)) as other:
            other.execute("SELECT pg_advisory_lock(hashtext(%s))", (f"saga ledger {place.schema}",))
            calls = [asyncio.create_task(ledger.create("s", "me", (started(),))), asyncio.create_task(ledger.list())]
            await somebody_waits(place, 2)
        return await asyncio.gather(*calls)

    token, _ = using(place.open(), play)

    assert token == 1


def test_in_the_place_of_a_schema_that_was_taken_away_while_it_was_in_use_no_other_one_is_made(place: PostgresSchema) -> None:
    """Whoever restores a backup meanwhile would come upon it, and sagas that run would be told that they never were."""

    async def play(ledger: Ledger) -> Any:
        token = await ledger.create("s", "me", (started(),))
        place.execute(f'ALTER SCHEMA "{place.schema}" RENAME TO "{place.schema} elsewhere"')
        place.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'saga'")
        append = partial(ledger.append, "s", (attempt(1),), expected_version=1, token=token)
        deeds = (append(), ledger.read("s"), ledger.list(), ledger.create("t", "me", (started("t"),)))
        refused = [str(*await asyncio.gather(deed, return_exceptions=True)) for deed in deeds]
        made = place.execute("SELECT to_regnamespace(%s) IS NOT NULL", f'"{place.schema}"')
        place.execute(f'ALTER SCHEMA "{place.schema} elsewhere" RENAME TO "{place.schema}"')
        await append()
        return refused, made, await ledger.read("s")

    refused, made, events = using(place.open(), play)

    gone = f"the ledger in schema {place.schema!r} is gone; put it back, or restart to begin a new one. None was made in its place"
    assert refused == [gone] * 4
    assert made == [(False,)]
    assert len(events) == 2


def test_who_may_not_use_the_schema_is_told_so_at_once(place: PostgresSchema) -> None:
    using(place.open(), lambda ledger: ledger.create("s", "me", (started(),)))
    place.execute("CREATE ROLE stranger")
    stranger = place.open(dsn=f"{place.dsn}&options=-crole%3Dstranger", lease=10_800, patience=3_600)

    with pytest.raises(LedgerError, match="permission denied for schema"):
        using(stranger, lambda ledger: ledger.list())


@pytest.mark.parametrize("role", ["user", "reader"])
def test_a_schema_that_is_made_is_used_with_the_rights_that_the_docs_name(place: PostgresSchema, role: str) -> None:
    using(place.open(), lambda ledger: ledger.create("s", "me", (started(),)))
    rights = "SELECT" if role == "reader" else "SELECT, INSERT, UPDATE, DELETE"
    place.execute(f"CREATE ROLE the_{role}")
    place.execute(f'GRANT USAGE ON SCHEMA "{place.schema}" TO "the_{role}"')
    place.execute(f'GRANT {rights} ON ALL TABLES IN SCHEMA "{place.schema}" TO "the_{role}"')

    async def play(ledger: Ledger) -> Any:
        if role == "user":
            token = await ledger.acquire("s", "me")
            await ledger.append("s", (attempt(1),), expected_version=1, token=token)
            await ledger.create("t", "me", (started("t"), SagaEnded(status=SagaStatus.COMPLETED)))
            await ledger.release("t", 1)
            assert await ledger.prune(timedelta(0)) == ("t",)
        return len(await ledger.read("s")), [entry.saga_id for entry in await ledger.list()]

    events, listed = using(place.open(dsn=f"{place.dsn}&options=-crole%3Dthe_{role}"), play)

    assert events == (2 if role == "user" else 1)
    assert listed == ["s"]


def test_a_schema_that_is_there_already_may_be_used(place: PostgresSchema) -> None:
    place.execute(f'CREATE SCHEMA "{place.schema}"')

    assert using(place.open(), lambda ledger: ledger.create("s", "me", (started(),))) == 1


@pytest.mark.parametrize("schema", ['odd "name"; --', "Ünicode", "saga"])
def test_a_schema_may_have_any_name(postgres: Any, schema: str) -> None:
    ledger = PostgresLedger(postgres.get_uri(), schema=schema)

    assert using(ledger, lambda ledger: ledger.create("s", "me", (started(),))) == 1
    assert len(using(PostgresLedger(postgres.get_uri(), schema=schema), lambda ledger: ledger.read("s"))) == 1


@pytest.mark.parametrize("schema", ["ü" * 31 + "x", "x" * 63])
def test_a_schema_may_have_a_name_as_long_as_postgresql_keeps_whole(postgres: Any, schema: str) -> None:
    ledger = PostgresLedger(postgres.get_uri(), schema=schema)

    assert using(ledger, lambda ledger: ledger.create("s", "me", (started(),))) == 1


@pytest.mark.parametrize("schema", ["ü" * 32, "x" * 64, "", "a\0b", "\ud800", None, b"saga"])
def test_a_schema_whose_name_postgresql_would_cut_or_refuse_is_refused(schema: Any) -> None:
    """Cut, it may be that of another ledger."""
    with pytest.raises(MisuseError, match="expected a name of 1 to 63 bytes for the schema, without NUL and surrogates, got "):
        PostgresLedger("dbname=x", schema=schema)


def test_a_schema_of_a_newer_version_is_refused(place: PostgresSchema) -> None:
    using(place.open(), lambda ledger: ledger.list())
    place.execute("UPDATE schema_version SET version = 7")

    with pytest.raises(LedgerError, match=r"has schema version 7, this version of saga knows up to 1: .* Nothing was changed"):
        using(place.open(), lambda ledger: ledger.create("s", "me", (started(),)))


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM schema_version",
        "INSERT INTO schema_version VALUES (2)",
        "ALTER TABLE schema_version ALTER version TYPE text USING '1.0.3'",
        "DROP TABLE sagas",
        "DROP TABLE sagas; ALTER TABLE schema_version RENAME version TO rank",
    ],
)
def test_a_schema_in_which_another_program_counts_its_versions_is_refused(place: PostgresSchema, change: str) -> None:
    using(place.open(), lambda ledger: ledger.list())
    place.execute(change)

    with pytest.raises(LedgerError, match=r"^expected a ledger in schema 'saga \d+', got a table schema_version .* Nothing was changed\."):
        using(place.open(), lambda ledger: ledger.create("s", "me", (started(),)))


def test_a_schema_of_an_older_version_is_brought_to_the_newest(place: PostgresSchema, monkeypatch: pytest.MonkeyPatch) -> None:
    using(place.open(), lambda ledger: ledger.create("s", "me", (started(),)))
    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, ("ALTER TABLE sagas ADD COLUMN colour text",)))

    for _ in range(2):
        assert len(using(place.open(), lambda ledger: ledger.read("s"))) == 1

    assert place.execute("SELECT colour FROM sagas") == [(None,)]
    assert place.execute("SELECT version FROM schema_version") == [(2,)]


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM events WHERE first = 1",
        "UPDATE events SET body = replace(body, '\"attempt\":1', '\"attempt\":2') WHERE first = 1",
        "UPDATE events SET (body, checksum) = (SELECT body, checksum FROM events AS e WHERE e.first = 3 - events.first) WHERE first > 0",
        "DELETE FROM events WHERE first = 2",
        "DELETE FROM sagas",
        "DELETE FROM events",
    ],
)
def test_a_row_that_was_changed_is_noticed_and_nothing_is_changed_besides(place: PostgresSchema, change: str) -> None:
    def rows() -> list[Any]:
        return [place.execute(f"SELECT * FROM {table} ORDER BY 1, 2") for table in ("sagas", "events")]  # noqa: S608 - constants

    async def play(ledger: Ledger) -> Any:
        token = await ledger.create("s", "me", (started(),))
        await ledger.append("s", (attempt(1),), expected_version=1, token=token)
        await ledger.append("s", (attempt(2),), expected_version=2, token=token)
        await ledger.release("s", token)
        place.execute(change)
        damaged = rows()
        for deed in (ledger.read("s"), SagaCoordinator(ledger=ledger).resume("s", Pipeline(name="p"))):
            with pytest.raises(LedgerCorrupt, match=r"the ledger is damaged: saga s can't be read.*Nothing was changed"):
                await deed
        assert rows() == damaged

    using(place.open(), play)


@pytest.mark.parametrize("style", ["German", "SQL,DMY", "Postgres"])
def test_times_are_read_however_the_database_writes_them(place: PostgresSchema, style: str) -> None:
    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        with pytest.raises(LedgerConflict, match="saga s has 1 events, expected 2"):
            await ledger.append("s", (attempt(1),), expected_version=2, token=1)
        return await ledger.list()

    (entry,) = using(place.open(dsn=f"{place.dsn}&options=-c%20datestyle%3D{style}"), play)

    assert entry.until is not None


@pytest.mark.parametrize("ahead", [timedelta(hours=1), timedelta(hours=-1)])
def test_until_when_a_saga_is_held_is_told_by_the_clock_of_who_asks(
    place: PostgresSchema, ahead: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease itself goes by the server's; who compares its end with a clock of his own, as `saga list` does, would be misled."""

    class Elsewhere(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override] # a plain one will do
            return datetime.now(tz) + ahead

    async def play(ledger: Ledger) -> Any:
        await ledger.create("s", "me", (started(),))
        with pytest.raises(LedgerConflict) as held:
            await ledger.acquire("s", "you")
        (entry,) = await ledger.list()
        return entry.until, held.value.until

    monkeypatch.setattr(module, "datetime", Elsewhere)
    told = using(place.open(lease=600.0), play)

    for until in told:
        assert timedelta(seconds=500) < until - Elsewhere.now(UTC) <= timedelta(seconds=600)


def test_commits_are_on_disk_though_the_database_does_without_it(place: PostgresSchema) -> None:
    store = module._Store(f"{place.dsn}&options=-c%20synchronous_commit%3Doff", place.schema, 30.0, 10.0, threading.Event())

    assert store._connection().execute("SHOW synchronous_commit").fetchone() == ("on",)
    store.close()


def test_commits_that_wait_for_replicas_still_do(place: PostgresSchema) -> None:
    store = module._Store(f"{place.dsn}&options=-c%20synchronous_commit%3Dremote_apply", place.schema, 30.0, 10.0, threading.Event())

    assert store._connection().execute("SHOW synchronous_commit").fetchone() == ("remote_apply",)
    store.close()


def test_a_server_that_does_not_answer_is_given_up_after_the_patience_unless_the_dsn_says_otherwise() -> None:
    dsn, rest = "dbname=x", ("saga", 30.0, 2.5, threading.Event())
    mine = module._Store(dsn, *rest)._parameters()
    yours = module._Store(f"{dsn} connect_timeout=99 tcp_user_timeout=98 application_name=shop", *rest)._parameters()

    assert (mine["connect_timeout"], mine["tcp_user_timeout"], mine["application_name"]) == (3, 3000, "saga")
    assert (yours["connect_timeout"], yours["tcp_user_timeout"], yours["application_name"]) == ("99", "98", "shop")


def test_a_server_that_has_the_question_and_owes_the_answer_is_asked_for_signs_of_life() -> None:
    mine = module._Store("dbname=x", "saga", 30.0, 10.0, threading.Event())._parameters()
    yours = module._Store("dbname=x keepalives_idle=99", "saga", 30.0, 10.0, threading.Event())._parameters()

    # The third that is not answered comes after the patience, and then `tcp_user_timeout` breaks the connection.
    assert (mine["keepalives_idle"], mine["keepalives_interval"], mine["tcp_user_timeout"]) == (4, 4, 10_000)
    assert yours["keepalives_idle"] == "99"


def test_a_patience_may_be_longer_than_postgresql_can_count(place: PostgresSchema, network: Network) -> None:
    ledger = over(network, place, lease=1e9, patience=1e8)

    assert using(ledger, lambda ledger: ledger.create("s", "me", (started(),))) == 1


def said_by(error: BaseException) -> str:
    """What Python writes of an error that nobody caught, but for the lines of code, of which some are the test's."""
    report = traceback.TracebackException.from_exception(error)
    causes = [error.__cause__, None if error.__suppress_context__ else error.__context__]
    return "".join([*report.format_exception_only(), *(said_by(cause) for cause in causes if cause is not None)])


@pytest.mark.parametrize(
    "dsn",
    [
        "host=db password 's3cret'",
        "postgresql://ann:50%s3cret@db/shop",
        "postgresql://ann:a@s3cret@db/shop",
        "postgresql://ann:a/s3cret@db/shop",
        "postgresql://ann@shop:s3cret@db/shop",
    ],
)
def test_a_connection_string_that_makes_no_sense_is_refused_and_kept_secret(dsn: str) -> None:
    with pytest.raises(MisuseError, match=r"expected a .* of PostgreSQL, got one .* are written %40") as caught:
        PostgresLedger(dsn)

    assert "s3cret" not in said_by(caught.value)


@pytest.mark.parametrize("dsn", ["postgresql://ann:a%40%2F%25@db/shop", "postgresql:///shop?host=@abstract", "dbname=a@b host=db"])
def test_an_at_sign_where_it_makes_sense_is_taken(dsn: str) -> None:
    assert "PostgresLedger" in repr(PostgresLedger(dsn))


def test_a_ledger_says_where_it_is_and_not_the_password() -> None:
    assert repr(PostgresLedger("postgresql://ann:s3cret@db/shop")) == "PostgresLedger('shop', schema='saga')"


def test_without_its_driver_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "saga.ledgers.postgres")

    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'stageflow-saga[postgres]'")):
        importlib.import_module("saga.ledgers.postgres")
