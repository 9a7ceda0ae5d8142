"""What every ledger does, in memory, in a file and in PostgreSQL alike."""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import partial
from itertools import count
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stageflow.api import StageOutput

from saga import FailFast, Failure, Ledger, LedgerConflict, LedgerError, MisuseError, SagaStatus
from saga.events import (
    AnyEvent,
    CompensationStarted,
    EffectRecorded,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageStarted,
    TurnReason,
    event_to_json,
)
from tests.places import Memory, Place, PostgresSchema, SQLiteFile
from tests.test_ledger import ALL, FAILURE, GRAPH, OUTPUT

FIRST, SECOND = StageStarted(stage="a", attempt=1), StageCompleted(stage="a", output=OUTPUT)
LONG_AGO = datetime.now(UTC) - timedelta(days=30)
DONE = SagaEnded(status=SagaStatus.COMPLETED, at=LONG_AGO)


def started(saga_id: str = "s", at: datetime = LONG_AGO, parent: str | None = None) -> SagaStarted:
    stage = None if parent is None else "a"
    return SagaStarted(saga_id=saga_id, pipeline="p", graph=GRAPH, policy=FailFast(), at=at, parent=parent, parent_stage=stage)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    match request.param:
        case "memory":
            return Memory()
        case "sqlite":
            return SQLiteFile(tmp_path / "sagas.db")
        case _:
            return PostgresSchema(request.getfixturevalue("postgres").get_uri(), request.getfixturevalue("new_schema")())


def on(ledger: Ledger, *acts: Callable[[Ledger], Any]) -> list[Any]:
    """Do one thing after another with a ledger, and close it; what is raised is an answer."""

    async def play() -> list[Any]:
        answers = []
        for act in acts:
            try:
                answers.append(await act(ledger))
            except LedgerError as error:
                answers.append(error)
        await ledger.close()
        return answers

    return asyncio.run(play())


def create(
    saga_id: str = "s", owner: str = "me", *more: AnyEvent, parent: str | None = None, at: datetime = LONG_AGO, under: int | None = None
) -> Any:
    return lambda ledger: ledger.create(saga_id, owner, (started(saga_id, at, parent), *more), under=under)


def append(*events: AnyEvent, version: int = 1, token: int = 1, saga_id: str = "s", release: bool = False) -> Any:
    return lambda ledger: ledger.append(saga_id, events, expected_version=version, token=token, release=release)


def acquire(owner: str, saga_id: str = "s", under: int | None = None) -> Any:
    return lambda ledger: ledger.acquire(saga_id, owner, under=under)


def release(token: int, saga_id: str = "s") -> Any:
    return lambda ledger: ledger.release(saga_id, token)


def read(saga_id: str = "s") -> Any:
    return lambda ledger: ledger.read(saga_id)


def listed(**which: Any) -> Any:
    async def ids(ledger: Ledger) -> list[str]:
        return [entry.saga_id for entry in await ledger.list(**which)]

    return ids


def ended(saga_id: str, status: SagaStatus = SagaStatus.COMPLETED, at: datetime = LONG_AGO) -> Any:
    return append(SagaEnded(status=status, at=at), saga_id=saga_id, release=True)


def prune(days: float = 1) -> Any:
    async def pruned(ledger: Ledger) -> set[str]:
        return set(await ledger.prune(timedelta(days=days)))

    return pruned


FORK = multiprocessing.get_context("fork")
# Newer Pythons warn of every fork of a process that has threads; ours have come to rest before it.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def fork(work: Callable[[], object]) -> ForkProcess:
    """Have a child of this process do something, with all that it inherits."""
    child = FORK.Process(target=work)
    child.start()
    return child


# -- recording -------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_read_back_in_order(place: Place) -> None:
    *_, events = on(place.open(), create(), append(FIRST, SECOND), append(DONE, version=3), read())

    assert events == (started(), FIRST, SECOND, DONE)


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_every_event_is_read_back_equal(place: Place, event: AnyEvent) -> None:
    *_, events = on(place.open(), create(), append(event), read())

    assert events == (started(), event)


def test_what_json_lacks_is_read_back_equal(place: Place) -> None:
    data = {
        "price": Decimal("12.30"), "ticket": b"\x00\xff", "leaves": datetime(2026, 7, 1, 12, 30, tzinfo=timezone(timedelta(hours=2))),
        "booking": UUID(int=7), "seats": {"14A", "14B"}, "route": ("OSL", "JFK"), "days": [{"on": date(2026, 7, 1), "at": time(12, 30)}],
    }  # fmt: skip
    given = (StageCompleted(stage="a", output=StageOutput.ok(data)), EffectRecorded(stage="a", effect=data))

    *_, events, completions = on(place.open(), create(), append(FIRST, *given), read(), lambda ledger: ledger.completions("s"))

    back = [events[2].output.data, events[3].effect, completions["a"].data]
    assert back == [data] * 3
    for one in back:
        assert {name: type(value) for name, value in one.items()} == {name: type(value) for name, value in data.items()}


def test_a_saga_may_begin_with_several_events(place: Place) -> None:
    token, appended, events = on(place.open(), create("s", "me", FIRST), append(SECOND, version=2), read())

    assert (token, appended) == (1, None)
    assert events == (started(), FIRST, SECOND)


def test_of_a_saga_that_is_not_there_nothing_is_read_and_nothing_can_be_done(place: Place) -> None:
    events, appended, acquired, released, completions = on(
        place.open(), read(), append(FIRST), acquire("me"), release(1), lambda ledger: ledger.completions("s")
    )

    assert events == ()
    assert isinstance(appended, LedgerConflict)
    assert isinstance(acquired, LedgerConflict)
    assert str(appended) == str(acquired) == "there is no saga s"
    assert released is None
    assert completions == {}


def test_a_saga_is_created_once(place: Place) -> None:
    _, again, events, entries = on(place.open(), create(), create("s", "you", FIRST), read(), lambda ledger: ledger.list())

    assert isinstance(again, LedgerConflict)
    assert str(again) == "saga s exists already; nothing was recorded"
    assert events == (started(),)
    assert entries[0].owner == "me"


@pytest.mark.parametrize("version", [0, 1, 3])
def test_an_append_behind_more_or_fewer_events_is_refused_whole(place: Place, version: int) -> None:
    *_, refused, events = on(place.open(), create(), append(FIRST), append(SECOND, DONE, version=version), read())

    assert isinstance(refused, LedgerConflict)
    missing = "what comes before these is not in the ledger, as where an older copy was put back"
    why = missing if version > 2 else "somebody else wrote to it"
    assert str(refused).startswith(f"saga s has 2 events, expected {version}: {why}")
    assert str(refused).endswith("; nothing was recorded")
    assert refused.is_missing == (version > 2)
    assert events == (started(), FIRST)


def test_the_same_append_twice_is_recorded_once(place: Place) -> None:
    *_, first, second, events = on(place.open(), create(), append(FIRST), append(FIRST), read())

    assert first is None
    assert isinstance(second, LedgerConflict)
    assert events == (started(), FIRST)


def test_appends_of_one_saga_take_effect_in_the_order_of_the_calls(place: Place) -> None:
    events = tuple(StageStarted(stage="a", attempt=number) for number in range(1, 50))

    async def at_once(ledger: Ledger) -> None:
        calls = [ledger.append("s", (event,), expected_version=number, token=1) for number, event in enumerate(events, 1)]
        await asyncio.gather(*calls)

    *_, found = on(place.open(), create(), at_once, read())

    assert found == (started(), *events)


def test_an_append_that_is_refused_does_not_keep_those_with_it_from_being_recorded(place: Place) -> None:
    good = [
        append(FIRST, saga_id="a"), append(FIRST, saga_id="d"), append(SECOND, saga_id="d", version=2), create("g"), acquire("me", "f"),
        append(FIRST, saga_id="e"),
    ]  # fmt: skip
    bad = [
        append(FIRST, saga_id="b", version=7), append(FIRST, saga_id="c", token=7), append(FIRST, saga_id="z"),
        append(SECOND, saga_id="d", version=9), create("e"), acquire("you", "e"),
    ]  # fmt: skip

    async def at_once(ledger: Ledger) -> list[Any]:
        await asyncio.gather(*(create(name)(ledger) for name in "abcdef"))
        mixed = [act for pair in zip(good, bad, strict=True) for act in pair]
        return await asyncio.gather(*(act(ledger) for act in mixed), return_exceptions=True)

    answers, *events = on(place.open(), at_once, *(read(name) for name in "abcdefg"))

    assert [isinstance(answer, LedgerConflict) for answer in answers] == [False, True] * 6
    assert [len(found) for found in events] == [2, 1, 1, 3, 2, 1, 1]


def test_an_append_that_was_cancelled_is_there_whole_or_not_at_all(place: Place) -> None:
    async def impatient(ledger: Ledger) -> None:
        task = asyncio.create_task(append(FIRST, SECOND)(ledger))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    *_, events = on(place.open(), create(), impatient, create("other"), read())

    assert events in ((started(),), (started(), FIRST, SECOND))


async def told(call: Any) -> Any:
    """What comes of a call; what is raised is an answer."""
    try:
        return await call
    except LedgerError as error:
        return error


@pytest.mark.parametrize("scope", [False, True])
def test_who_is_cancelled_while_it_writes_gets_the_answer_all_the_same(durable: Place, scope: bool) -> None:
    async def play() -> Any:
        ledger = durable.open()
        writes: list[Any] = [create(), append(FIRST, SECOND), append(FIRST, version=9)]
        answers = []
        for write in writes:
            if scope:
                with anyio.CancelScope() as cut:
                    asyncio.get_running_loop().call_soon(cut.cancel)
                    answers.append(await told(write(ledger)))
            else:
                task = asyncio.create_task(told(write(ledger)))
                for _ in range(3):
                    await asyncio.sleep(0)
                    task.cancel()
                answers.append(await task)
        events = await ledger.read("s")
        await ledger.close()
        return answers, events

    (token, done, refused), events = asyncio.run(play())

    assert (token, done) == (1, None)
    assert isinstance(refused, LedgerConflict)
    assert len(events) == 3


def test_completions_are_read_from_the_events(place: Place) -> None:
    probed = StageProbed(stage="b", landed=True, output=OUTPUT)
    asked_of_a_person = StageProbed(stage="a", landed=None, output=StageOutput.ok(by="one that came late"), held=True)

    *_, completions = on(place.open(), create(), append(FIRST, SECOND, asked_of_a_person, probed), lambda ledger: ledger.completions("s"))

    assert completions == {"a": OUTPUT, "b": OUTPUT}


@pytest.mark.parametrize("order", [1, -1], ids=["probed, then completed", "completed, then probed"])
def test_of_a_stage_that_ran_twice_the_last_completion_counts(place: Place, order: int) -> None:
    probed = StageProbed(stage="a", landed=True, output=StageOutput.ok(by="the probe"))
    events: list[Any] = [probed, replace(SECOND, output=StageOutput.ok(by="the stage"))][::order]

    *_, completions = on(place.open(), create(), append(FIRST, *events), lambda ledger: ledger.completions("s"))

    assert completions == {"a": events[-1].output}


# -- leases ----------------------------------------------------------------------------------------------------------


def test_whoever_holds_a_saga_keeps_others_from_it_until_it_lets_go(place: Place) -> None:
    ledger = place.open()

    first, refused, released, second = on(ledger, create(), acquire("you"), release(1), acquire("you"))

    assert first == 1
    assert isinstance(refused, LedgerConflict)
    assert "saga s is held by me. Wait until it lets go" in str(refused)
    assert refused.holder == "me"
    assert (refused.until is None) is (ledger.lease is None)
    assert released is None
    assert second > first


def test_the_holder_itself_gets_a_new_token_and_the_old_one_is_refused(place: Place) -> None:
    _, token, old, new = on(place.open(), create(), acquire("me"), append(FIRST), append(FIRST, token=2))

    assert token == 2
    assert isinstance(old, LedgerConflict)
    assert "saga s is written with lease token 1, the current one is 2: me holds it" in str(old)
    assert new is None


def test_who_has_lost_its_lease_learns_who_holds_it(place: Place) -> None:
    ledger = place.open()

    *_, refused, late_release, entries, events = on(
        ledger, create(), release(1), acquire("you"), append(FIRST), release(1), lambda ledger: ledger.list(), read()
    )

    assert isinstance(refused, LedgerConflict)
    assert refused.holder == "you"
    assert (refused.until is None) is (ledger.lease is None)
    assert late_release is None
    assert entries[0].owner == "you"
    assert events == (started(),)


def test_when_nobody_holds_a_saga_the_last_token_is_good_until_somebody_takes_it(place: Place) -> None:
    *_, after_release, taken, released, too_late = on(
        place.open(), create(), append(FIRST, release=True), append(SECOND, version=2), acquire("you"), release(2), append(DONE, version=3)
    )

    assert after_release is None
    assert taken == 2
    assert released is None
    assert isinstance(too_late, LedgerConflict)
    assert "nobody holds it now" in str(too_late)
    assert too_late.holder is None


def test_a_child_is_begun_and_taken_by_whoever_holds_its_parent_and_by_nobody_else(place: Place) -> None:
    """Promise 2: an owner that was overtaken would run the children of a saga beside whoever runs it now."""
    ledger = place.open()

    *_, begun, taken, refused, refused_too, lost, entries = on(
        ledger,
        create(),
        create("alone", parent="s"),
        release(1, "alone"),
        acquire("me"),
        create("child", parent="s", under=2),
        acquire("me", "child", under=2),
        create("another", parent="s", under=1),
        acquire("me", "child", under=1),
        create("lost", parent="nowhere", under=1),
        listed(parent="s"),
    )

    assert (begun, taken) == (1, 2)
    for conflict in (refused, refused_too):
        assert isinstance(conflict, LedgerConflict)
        assert "saga s is written with lease token 1, the current one is 2: me holds it" in str(conflict)
        assert conflict.holder == "me"
    assert isinstance(lost, LedgerConflict)
    assert str(lost) == "there is no saga nowhere"
    assert entries == ["alone", "child"]


def test_a_child_that_is_there_is_told_from_one_whose_parent_was_overtaken(place: Place) -> None:
    *_, exists, overtaken = on(
        place.open(),
        create(),
        create("child", parent="s", under=1),
        create("child", parent="s", under=1),
        create("child", parent="s", under=3),
    )

    assert str(exists) == "saga child exists already; nothing was recorded"
    assert "saga s is written with lease token 3, the current one is 1" in str(overtaken)


def test_whoever_takes_over_a_saga_takes_all_that_is_below_it_from_the_owner_that_lost_it(durable: Place) -> None:
    """One that was stopped for longer than its lease, and goes on the moment after it was lost, counts as alive again."""
    ledger = durable.open(lease=600.0)

    def wait(_: Ledger) -> Any:
        durable.pass_time(601)
        return asyncio.sleep(0)

    *_, taken, _, child, grandchild, own, other, mine, at_rest, entries = on(
        ledger,
        create("s", "gone"),
        create("child", "gone", parent="s"),
        create("grandchild", "gone", parent="child"),
        create("aside", "gone"),
        create("other's", "you", parent="s"),
        create("at rest", "gone", parent="s"),
        release(1, "at rest"),
        wait,
        acquire("me"),
        lambda ledger: ledger.beat("gone"),
        append(FIRST, saga_id="child"),
        append(FIRST, saga_id="grandchild"),
        append(FIRST, saga_id="aside"),
        append(FIRST, saga_id="other's"),
        acquire("me", "child", under=2),
        append(FIRST, saga_id="at rest"),
        lambda ledger: ledger.list(),
    )

    assert taken == 2
    for name, conflict in (("child", child), ("grandchild", grandchild)):
        assert isinstance(conflict, LedgerConflict)
        assert f"saga {name} is written with lease token 1, the current one is 2: nobody holds it now" in str(conflict)
    assert own is other is at_rest is None
    assert mine == 3
    owners = {entry.saga_id: entry.owner for entry in entries}
    assert owners == {"s": "me", "child": "me", "grandchild": None, "aside": "gone", "other's": "you", "at rest": None}


def test_an_append_may_give_the_lease_back(place: Place) -> None:
    *_, entries, taken = on(place.open(), create(), append(DONE, release=True), lambda ledger: ledger.list(), acquire("you"))

    assert entries[0].owner is None
    assert entries[0].until is None
    assert taken == 2


def test_an_append_that_is_not_told_to_does_not_give_the_lease_back(place: Place) -> None:
    def append_once(ledger: Ledger) -> Any:
        return ledger.append("s", (DONE,), expected_version=1, token=1)

    *_, entries = on(place.open(), create(), append_once, lambda ledger: ledger.list())

    assert entries[0].owner == "me"


def test_an_append_that_is_refused_does_not_give_the_lease_back(place: Place) -> None:
    *_, refused, entries = on(place.open(), create(), append(DONE, version=7, release=True), lambda ledger: ledger.list())

    assert isinstance(refused, LedgerConflict)
    assert entries[0].owner == "me"
    assert entries[0].status is SagaStatus.RUNNING


def test_an_owner_that_says_nothing_for_longer_than_its_lease_may_be_succeeded(durable: Place) -> None:
    ledger = durable.open(lease=600.0)

    async def pause(_: Ledger) -> None:
        durable.pass_time(400)

    _, _, too_early, _, own, _, token, late = on(
        ledger, create(), pause, acquire("you"), pause, append(FIRST), read(), acquire("you"), append(SECOND, version=2)
    )

    assert isinstance(too_early, LedgerConflict)
    assert own is None, "its lease has ended, but nobody took it"
    assert token == 2
    assert isinstance(late, LedgerConflict)
    assert late.holder == "you"
    assert late.until is not None


@pytest.mark.parametrize("sign_of_life", ["beat", "create", "acquire"])
def test_an_owner_that_says_that_it_is_alive_keeps_all_its_sagas(durable: Place, sign_of_life: str) -> None:
    async def pause(_: Ledger) -> None:
        durable.pass_time(400)

    signs: dict[str, Any] = {"beat": lambda ledger: ledger.beat("me"), "create": create("third"), "acquire": acquire("me", "second")}

    *_, first, second = on(
        durable.open(lease=600.0),
        create("first"), create("second"), pause, signs[sign_of_life], pause, acquire("you", "first"), acquire("you", "second"),
    )  # fmt: skip

    assert isinstance(first, LedgerConflict)
    assert isinstance(second, LedgerConflict)


@pytest.mark.parametrize("lease", [float("inf"), 1e12])
def test_a_lease_that_ends_at_no_date_is_refused(durable: Place, lease: float) -> None:
    with pytest.raises(MisuseError, match="expected a lease of at most 1,000,000,000 seconds"):
        durable.open(lease=lease)


@pytest.mark.parametrize(("lease", "patience"), [(30, 10.5), (5, 10.0), (30, float("inf"))])
def test_a_patience_for_which_the_word_that_a_process_is_alive_may_come_too_late_is_refused(
    durable: Place, lease: float, patience: float
) -> None:
    with pytest.raises(MisuseError) as caught:
        durable.open(lease=lease, patience=patience)

    assert f"expected a patience of at most a third of the lease, got {patience:g} for patience and {lease} for lease" in str(caught.value)


def test_a_lease_alone_may_be_short(durable: Place) -> None:
    assert on(durable.open(lease=0.3, patience=None), create(), read())[-1] == (started(),)


def test_a_patience_may_be_a_third_of_the_lease(durable: Place) -> None:
    assert durable.open(lease=0.3, patience=0.1).lease == 0.3


def test_the_longest_lease_ends_at_a_date(durable: Place) -> None:
    _, (entry,) = on(durable.open(lease=1e9), create(), lambda ledger: ledger.list())

    assert entry.until > datetime.now(UTC) + timedelta(days=11_000)


def test_an_owner_whose_process_is_gone_is_succeeded_at_once(durable: Place) -> None:
    import subprocess
    import sys

    gone = subprocess.run(
        [sys.executable, "-c", "from saga.owners import this_process; print(this_process())"], capture_output=True, text=True, check=True
    ).stdout.strip()

    *_, token = on(durable.open(lease=3600.0), create("s", gone), acquire("you"))

    assert token == 2


def test_of_many_that_take_a_saga_at_once_one_gets_it(durable: Place) -> None:
    ledgers = [durable.open() for _ in range(4)]

    async def play() -> list[Any]:
        await ledgers[0].create("s", "me", (started(),))
        await ledgers[0].release("s", 1)
        takers = [ledger.acquire("s", f"taker {number}") for number, ledger in enumerate(ledgers)]
        answers = await asyncio.gather(*takers, return_exceptions=True)
        for ledger in ledgers:
            await ledger.close()
        return answers

    answers = asyncio.run(play())

    assert sorted(isinstance(answer, LedgerConflict) for answer in answers) == [False, True, True, True]


# -- looking ---------------------------------------------------------------------------------------------------------


def test_an_entry_says_what_is_known_of_a_saga(place: Place) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    ledger = place.open()

    *_, entries = on(
        ledger, create("parent"), create("s", parent="parent"), append(replace(FIRST, at=at)), lambda ledger: ledger.list(parent="parent")
    )

    (entry,) = entries
    assert (entry.saga_id, entry.pipeline, entry.status) == ("s", "p", SagaStatus.RUNNING)
    assert (entry.parent, entry.parent_stage) == ("parent", "a")
    assert (entry.started_at, entry.updated_at) == (LONG_AGO, at)
    assert entry.owner == "me"
    assert (entry.until is None) is (ledger.lease is None)


def test_sagas_are_listed_in_the_order_in_which_they_were_created(place: Place) -> None:
    later = LONG_AGO + timedelta(days=1)

    *_, everything, of_c = on(place.open(), create("c", at=later), create("a"), create("b", parent="c"), listed(), listed(parent="c"))

    assert everything == ["c", "a", "b"]
    assert of_c == ["b"]


def test_sagas_are_listed_by_status(place: Place) -> None:
    *_, running, two, none, of_parent = on(
        place.open(),
        create("a"), create("b"), ended("b"), create("c"), ended("c", SagaStatus.STUCK), create("d", parent="a"),
        listed(statuses={SagaStatus.RUNNING}),
        listed(statuses=[SagaStatus.STUCK, SagaStatus.COMPLETED]),
        listed(statuses=()),
        listed(statuses={SagaStatus.RUNNING}, parent="a"),
    )  # fmt: skip

    assert running == ["a", "d"]
    assert two == ["b", "c"]
    assert none == []
    assert of_parent == ["d"]


def test_a_status_may_be_asked_for_by_its_word(place: Place) -> None:
    *_, stuck = on(place.open(), create("a"), create("b"), ended("b", SagaStatus.STUCK), listed(statuses=["stuck"]))

    assert stuck == ["b"]


@pytest.mark.parametrize("statuses", ["stuck", SagaStatus.STUCK, ["Stuck"], 6, [["stuck"]]])
def test_what_are_no_statuses_are_refused(place: Place, statuses: Any) -> None:
    async def refused(ledger: Ledger) -> str:
        with pytest.raises(MisuseError) as caught:
            await ledger.list(statuses=statuses)
        return str(caught.value)

    *_, message = on(place.open(), create(), refused)

    assert message == f"expected a collection of statuses of sagas, got {statuses!r}. Write {{SagaStatus.STUCK}}."


STATUSES: dict[str, tuple[list[AnyEvent], SagaStatus]] = {
    "nothing more": ([], SagaStatus.RUNNING),
    "a stage's event": ([FIRST], SagaStatus.RUNNING),
    "turning back": ([SagaTurnedBack(reason=TurnReason.FAILURE), FIRST], SagaStatus.COMPENSATING),
    "an end": ([SagaTurnedBack(reason=TurnReason.FAILURE), SagaEnded(status=SagaStatus.COMPENSATED)], SagaStatus.COMPENSATED),
    "an end, and a late event": ([SagaEnded(status=SagaStatus.STUCK), SECOND], SagaStatus.STUCK),
    "going on": ([SagaEnded(status=SagaStatus.HALTED), SagaResumed(forward=True, by="ann")], SagaStatus.RUNNING),
    "going back": ([SagaEnded(status=SagaStatus.HALTED), SagaResumed(forward=False, by="ann")], SagaStatus.COMPENSATING),
}


@pytest.mark.parametrize("case", STATUSES)
@pytest.mark.parametrize("how", ["with its start", "together", "one by one"])
def test_a_saga_stands_where_its_last_telling_event_says(place: Place, case: str, how: str) -> None:
    events, status = STATUSES[case]
    acts = [create(), *(append(event, version=number) for number, event in enumerate(events, 1))]
    if how == "with its start":
        acts = [create("s", "me", *events)]
    elif how == "together" and events:
        acts = [create(), append(*events)]

    *_, entries = on(place.open(), *acts, lambda ledger: ledger.list())

    assert entries[0].status is status


# -- forgetting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [status for status in SagaStatus if status not in {SagaStatus.RUNNING, SagaStatus.COMPENSATING}])
def test_only_a_saga_about_which_nothing_is_left_to_do_is_forgotten(place: Place, status: SagaStatus) -> None:
    over = status not in {SagaStatus.STUCK, SagaStatus.HALTED}

    *_, forgotten, events, left, again = on(place.open(), create(), ended("s", status), prune(), read(), listed(), prune())

    assert forgotten == ({"s"} if over else set())
    assert events == (() if over else (started(), SagaEnded(status=status, at=LONG_AGO)))
    assert left == ([] if over else ["s"])
    assert again == set()


def test_a_saga_that_is_alive_is_not_forgotten(place: Place) -> None:
    *_, forgotten = on(
        place.open(), create("running"), create("back"), append(SagaTurnedBack(reason=TurnReason.REQUEST), saga_id="back"), prune()
    )

    assert forgotten == set()


def test_a_saga_whose_last_event_is_younger_is_not_forgotten(place: Place) -> None:
    recently = datetime.now(UTC) - timedelta(hours=36)

    *_, kept, gone = on(place.open(), create(), ended("s", at=recently), prune(days=2), prune(days=1))

    assert kept == set()
    assert gone == {"s"}


@pytest.mark.parametrize(
    ("age", "message"),
    [
        (30, r"expected a timedelta, got 30\. Write timedelta\(days=30\)\."),
        ("30d", r"expected a timedelta, got '30d'\."),
        (None, r"expected a timedelta, got None\."),
        (timedelta(days=-1), "expected an age of 0 or more, got -1 day, 0:00:00"),
        (timedelta.max, "expected an age that reaches back to the year 1 at most, got 999999999 days"),
    ],
)
def test_an_age_that_is_none_is_refused_and_nothing_is_forgotten(place: Place, age: Any, message: str) -> None:
    async def pruned(ledger: Ledger) -> None:
        with pytest.raises(MisuseError, match=f"^{message}"):
            await ledger.prune(age)

    *_, left = on(place.open(), create(), ended("s"), pruned, listed())

    assert left == ["s"]


@pytest.mark.parametrize("hours", [-12, 0, 14])
def test_a_time_is_the_same_in_every_zone(place: Place, hours: int) -> None:
    zone = timezone(timedelta(hours=hours))
    recently = (datetime.now(UTC) - timedelta(hours=36)).astimezone(zone)

    *_, entries, kept, gone = on(
        place.open(), create(at=LONG_AGO.astimezone(zone)), ended("s", at=recently), lambda ledger: ledger.list(), prune(1.6), prune(1.4)
    )

    assert (entries[0].started_at, entries[0].updated_at) == (LONG_AGO, recently)
    assert kept == set()
    assert gone == {"s"}


def test_a_saga_that_somebody_holds_is_not_forgotten(place: Place) -> None:
    *_, held, _, free = on(place.open(), create(), ended("s"), acquire("you"), prune(), release(2), prune())

    assert held == set()
    assert free == {"s"}


def test_a_saga_that_ends_after_its_lease_was_given_back_is_forgotten(place: Place) -> None:
    *_, forgotten = on(place.open(), create(), release(1), append(DONE), prune())

    assert forgotten == {"s"}


def test_a_saga_whose_holder_is_gone_is_forgotten(durable: Place) -> None:
    async def pause(_: Ledger) -> None:
        durable.pass_time(601)

    *_, held, _, gone = on(durable.open(lease=600.0), create(), append(DONE), prune(), pause, prune())

    assert held == set()
    assert gone == {"s"}


FAMILY: dict[str, tuple[list[Any], set[str]]] = {
    "all is over": ([ended("grandchild"), ended("child"), ended("s")], {"s", "child", "grandchild"}),
    "the root is stuck": ([ended("grandchild"), ended("child"), ended("s", SagaStatus.STUCK)], set()),
    "a child is stuck": ([ended("grandchild"), ended("child", SagaStatus.STUCK), ended("s")], set()),
    "a grandchild is stuck": ([ended("grandchild", SagaStatus.STUCK), ended("child"), ended("s")], set()),
    "a grandchild ends last": ([ended("child"), ended("s"), ended("grandchild")], {"s", "child", "grandchild"}),
    "a grandchild is younger": ([ended("child"), ended("s"), ended("grandchild", at=datetime.now(UTC))], set()),
    "a grandchild is held": ([ended("grandchild"), ended("child"), ended("s"), acquire("you", "grandchild")], set()),
    "a child became stuck later": (
        [ended("grandchild"), ended("child"), ended("s"), acquire("you", "child"),
         append(SagaEnded(status=SagaStatus.STUCK, at=LONG_AGO), saga_id="child", version=2, token=2, release=True)],
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILY)
def test_a_child_goes_with_the_saga_that_runs_it(place: Place, case: str) -> None:
    acts, expected = FAMILY[case]

    *_, forgotten, left = on(
        place.open(),
        create(), create("child", parent="s"), create("grandchild", parent="child"), create("other"),
        *acts, prune(), listed(),
    )  # fmt: skip

    assert forgotten == expected
    assert set(left) == {"s", "child", "grandchild", "other"} - expected


def test_a_child_whose_parent_is_not_there_goes_by_itself(place: Place) -> None:
    *_, forgotten, left = on(place.open(), create("child", parent="nobody"), ended("child"), prune(), listed(parent="nobody"))

    assert forgotten == {"child"}
    assert left == []


def test_a_child_that_was_there_before_the_saga_that_runs_it_stays_with_it(place: Place) -> None:
    *_, while_it_runs, _, at_its_end = on(place.open(), create("child", parent="s"), ended("child"), create(), prune(), ended("s"), prune())

    assert while_it_runs == set()
    assert at_its_end == {"s", "child"}


def test_an_id_is_free_again_when_its_saga_is_forgotten(place: Place) -> None:
    *_, forgotten, created, events = on(
        place.open(), create(), append(FIRST), append(DONE, version=2, release=True), prune(), create(), read()
    )

    assert forgotten == {"s"}
    assert created == 1
    assert events == (started(),)


def test_many_more_sagas_than_are_forgotten_at_once_are_forgotten(durable: Place) -> None:
    async def many(ledger: Ledger) -> None:
        await asyncio.gather(*(create(f"s{number}")(ledger) for number in range(1100)))
        await asyncio.gather(*(ended(f"s{number}")(ledger) for number in range(1100) if number % 100))

    _, forgotten, left = on(durable.open(), many, prune(), listed())

    assert len(forgotten) == 1089
    assert left == [f"s{number}" for number in range(0, 1100, 100)]


def test_owners_of_whom_nobody_hears_any_more_are_forgotten_unless_they_hold_something(durable: Place) -> None:
    async def pause(_: Ledger) -> None:
        durable.pass_time(601)

    on(
        durable.open(lease=600.0),
        create("s", "holder"),
        lambda ledger: ledger.beat("gone"),
        pause,
        lambda ledger: ledger.beat("alive"),
        prune(),
    )

    assert sorted(durable.owners()) == ["alive", "holder"]


# -- opening and closing ---------------------------------------------------------------------------------------------


def test_what_was_recorded_is_there_for_who_opens_it_next(durable: Place) -> None:
    on(durable.open(), create(), append(FIRST))

    events, entries, token = on(durable.open(), read(), lambda ledger: ledger.list(), acquire("me"))

    assert events == (started(), FIRST)
    assert entries[0].owner == "me"
    assert token == 2


def test_ledgers_on_one_place_see_what_the_others_recorded(durable: Place) -> None:
    mine, yours = durable.open(), durable.open()

    async def play() -> list[Any]:
        await create()(mine)
        seen = await yours.read("s")
        refused = await asyncio.gather(append(FIRST, version=0)(yours), create()(yours), return_exceptions=True)
        await append(FIRST)(yours)
        found = await mine.read("s")
        await mine.close()
        await yours.close()
        return [seen, refused, found]

    seen, refused, found = asyncio.run(play())

    assert seen == (started(),)
    assert all(isinstance(answer, LedgerConflict) for answer in refused)
    assert found == (started(), FIRST)


def test_a_ledger_serves_one_event_loop_after_another(durable: Place) -> None:
    ledger = durable.open()

    asyncio.run(create()(ledger))
    asyncio.run(append(FIRST)(ledger))

    assert on(ledger, read()) == [(started(), FIRST)]


def test_a_ledger_serves_event_loops_in_several_threads(durable: Place) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ledger = durable.open()

    async def play(name: str) -> None:
        await create(name)(ledger)
        for number in range(20):
            await append(FIRST, saga_id=name, version=1 + number)(ledger)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: asyncio.run(play(name)), "abcd"))

    assert [len(events) for events in on(ledger, *(read(name) for name in "abcd"))] == [21] * 4


class Unchecked(str):
    """A text that says of itself that it can be written, whatever is in it."""

    __slots__ = ()

    def isprintable(self) -> bool:
        return True


def test_a_read_that_fails_keeps_nobody_who_reads_at_the_same_time_from_their_answer(durable: Place) -> None:
    async def together(ledger: Ledger) -> Any:
        asked = (ledger.read("s"), ledger.list(parent=Unchecked("\ud800")), ledger.list())
        return await asyncio.gather(*asked, return_exceptions=True)

    _, (events, refused, entries) = on(durable.open(), create(), together)

    assert events == (started(),)
    assert [entry.saga_id for entry in entries] == ["s"]
    assert type(refused) is LedgerError
    assert "UnicodeEncodeError: 'utf-8' codec can't encode" in str(refused)
    assert isinstance(refused.__cause__, UnicodeEncodeError)


def test_closing_waits_for_what_was_asked_for_and_then_nothing_more_can_be_asked(durable: Place) -> None:
    ledger = durable.open()

    async def play() -> Any:
        await create()(ledger)
        appended = asyncio.create_task(append(FIRST)(ledger))
        await asyncio.sleep(0)
        await ledger.close()
        await ledger.close()
        await appended
        with pytest.raises(LedgerError, match="is closed"):
            await append(SECOND, version=2)(ledger)
        with pytest.raises(LedgerError, match="is closed"):
            await ledger.read("s")

    asyncio.run(play())

    assert on(durable.open(), read()) == [(started(), FIRST)]


def test_a_ledger_is_closed_at_the_end_of_its_block(durable: Place) -> None:
    async def play() -> None:
        async with durable.open() as ledger:  # type: ignore[attr-defined] # durable ledgers have one
            await create()(ledger)
        with pytest.raises(LedgerError, match="is closed"):
            await ledger.read("s")

    asyncio.run(play())


def test_a_block_of_a_ledger_that_is_closed_does_not_begin(durable: Place) -> None:
    """As when a service's lifespan begins anew around a module's ledger: it came up, and each of its sagas failed."""

    async def play() -> None:
        ledger = durable.open()
        await ledger.close()
        with pytest.raises(LedgerError, match=r"is closed, and can't be used again\. Make another one"):
            async with ledger:  # type: ignore[attr-defined] # durable ledgers can be used for a block
                raise AssertionError("it began")

    asyncio.run(play())


def test_a_ledger_that_was_never_used_can_be_closed(place: Place) -> None:
    assert on(place.open()) == []


# -- forking ---------------------------------------------------------------------------------------------------------


@forks
def test_a_process_that_was_forked_off_and_its_parent_go_on_side_by_side(durable: Place) -> None:
    ledger = durable.open()
    asyncio.run(create("before")(ledger))
    both = FORK.Barrier(2)

    def take_turns(name: str) -> None:
        for number in range(3):
            asyncio.run(create(f"{name} {number}")(ledger))
            both.wait(60)

    other = fork(lambda: take_turns("child"))
    take_turns("parent")
    other.join()

    assert other.exitcode == 0
    *_, found = on(ledger, listed())
    assert sorted(found) == ["before", *(f"{name} {number}" for name in ("child", "parent") for number in range(3))]


@forks
@pytest.mark.parametrize("closes", [True, False])
def test_a_process_that_was_forked_off_keeps_what_it_writes_after_its_parent_has_closed_the_ledger(durable: Place, closes: bool) -> None:
    ledger = durable.open()
    asyncio.run(create("before")(ledger))
    is_written, is_closed = FORK.Event(), FORK.Event()

    def write() -> None:
        asyncio.run(create("early")(ledger))
        is_written.set()
        assert is_closed.wait(60)
        asyncio.run(create("late")(ledger))
        if closes:
            asyncio.run(ledger.close())

    child = fork(write)
    assert is_written.wait(60)
    asyncio.run(ledger.close())
    is_closed.set()
    child.join()

    assert child.exitcode == 0
    assert on(durable.open(), listed()) == [["before", "early", "late"]]


@forks
def test_processes_that_are_forked_off_while_their_parent_writes_without_a_pause_all_write_and_nothing_is_lost(durable: Place) -> None:
    ledger = durable.open()
    told: dict[str, int] = {}
    is_writing, is_over = threading.Event(), threading.Event()

    async def write(saga_id: str) -> None:
        await create(saga_id)(ledger)
        for version in count(1):
            told[saga_id] = version
            if is_over.is_set():
                return
            await append(FIRST, version=version, saga_id=saga_id)(ledger)
            is_writing.set()

    async def write_all() -> None:
        await asyncio.gather(*map(write, "abcd"))

    writer = threading.Thread(target=lambda: asyncio.run(write_all()))
    writer.start()
    assert is_writing.wait(60)
    # Every other one with a ledger of its own.
    used = [durable.open() if number % 2 else ledger for number in range(12)]
    children = [fork(partial(on, one, create(f"child {number}"))) for number, one in enumerate(used)]
    for child in children:
        child.join()
    is_over.set()
    writer.join()

    assert [child.exitcode for child in children] == [0] * 12
    found, *sagas = on(ledger, listed(), *map(read, "abcd"))
    assert sorted(found) == sorted([*"abcd", *(f"child {n}" for n in range(12))])
    assert [len(events) for events in sagas] == [told[saga_id] for saga_id in "abcd"]


@forks
def test_a_ledger_that_was_closed_does_not_hold_up_a_fork(durable: Place) -> None:
    ledger = durable.open()
    on(ledger, create())

    child = fork(lambda: on(durable.open(), create("child")))
    child.join()

    assert child.exitcode == 0
    assert on(durable.open(), listed()) == [["s", "child"]]
    assert repr(ledger)  # it was there all the time


# -- what is stored --------------------------------------------------------------------------------------------------


def test_a_value_without_an_encoding_is_refused_and_named(durable: Place) -> None:
    output = StageOutput.ok(seats=[1, {"connection": threading.Lock()}])

    *_, refused, events = on(durable.open(), create(), append(FIRST, replace(SECOND, output=output)), read())

    assert type(refused) is LedgerError
    assert str(refused) == (
        "StageCompleted of saga s, stage 'a', can't be stored: "
        "expected plain data at data['seats'][1]['connection'], got _thread.lock, which has no encoding as JSON"
    )
    assert events == (started(),)


def test_a_saga_whose_input_cannot_be_stored_does_not_exist(durable: Place) -> None:
    odd = replace(started(), input={"data": {"lock": threading.Lock()}})

    refused, events = on(durable.open(), lambda ledger: ledger.create("s", "me", (odd,)), read())

    assert type(refused) is LedgerError
    assert "SagaStarted of saga s can't be stored: expected plain data at value['data']['lock']" in str(refused)
    assert events == ()


@pytest.mark.parametrize("text", ["x" * 99, "\u20ac" * 33, '"' * 49])
def test_an_event_may_have_as_many_bytes_as_the_ledger_says_and_no_more(durable: Place, text: str) -> None:
    event = EffectRecorded(stage="a", effect=text)
    size = len(event_to_json(event).encode())

    _, fits, *_ = on(durable.open(max_event_bytes=size), lambda ledger: ledger.beat("me"), append(event))
    *_, too_large, events = on(durable.open(max_event_bytes=size - 1), append(event), read())

    assert isinstance(fits, LedgerConflict), "there is no such saga, but it was asked for"
    assert type(too_large) is LedgerError
    said = f"EffectRecorded of saga s, stage 'a', has {size} bytes of JSON, the ledger takes {size - 1} (max_event_bytes)"
    assert str(too_large) == f"{said}; nothing was recorded. A ledger opened with a larger one takes it"
    assert events == ()


def test_a_large_output_is_read_back_equal(durable: Place) -> None:
    large = replace(SECOND, output=StageOutput.ok(rows=[{"name": f"row {number}", "\u20ac": number} for number in range(20_000)]))

    *_, appended, events = on(durable.open(), create(), append(FIRST, large), read())

    assert appended is None
    assert events == (started(), FIRST, large)


ODD_TEXTS = ["\0", "\ud800", "\udcff in a file's name", "\u2028\n\r\x1f", "\U0001f9fe", "'; DROP TABLE events; --"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_in_a_value_is_read_back_equal(durable: Place, text: str) -> None:
    event = EffectRecorded(stage="a", effect={text: [text]})
    failed = StageFailed(stage="a", failure=Failure.raised("a", ValueError(text), attempt=1))

    *_, recorded, events = on(durable.open(), create(), append(event, failed), read())

    assert recorded is None
    assert events == (started(), event, failed)


@pytest.mark.parametrize("name", ["\0", "\ud800", "x" * 501])
def test_a_name_that_a_database_cannot_hold_is_refused_and_nobody_else_suffers(durable: Place, name: str) -> None:
    def of_pipeline(ledger: Ledger) -> Any:
        return ledger.create("t", "me", (replace(started("t"), pipeline=name),))

    odd = [
        create(name), create("t", name), create("t", parent=name), of_pipeline,
        append(FIRST, saga_id=name), acquire("me", name), acquire(name), release(1, name), lambda ledger: ledger.beat(name), read(name),
        listed(parent=name),
    ]  # fmt: skip

    async def at_once(ledger: Ledger) -> list[Any]:
        return await asyncio.gather(*(act(ledger) for act in [*odd, append(FIRST)]), return_exceptions=True)

    _, (*refused, appended), everything = on(durable.open(), create(), at_once, listed())

    assert {type(error) for error in refused} == {LedgerError}
    assert all("of at most 500 characters, without NUL and surrogates" in str(error) for error in refused)
    assert appended is None
    assert everything == ["s"]


@pytest.mark.parametrize("name", ["x" * 500, "a b/c?#%", "\u20ac \U0001f9fe", "\u200b\n", "s' OR 1=1 --", "%s"])
def test_any_other_name_will_do(durable: Place, name: str) -> None:
    *_, events, entries = on(durable.open(), create(name), append(FIRST, saga_id=name), read(name), lambda ledger: ledger.list())

    assert events == (started(name), FIRST)
    assert entries[0].saga_id == name


def test_what_is_asked_for_is_done_though_the_loop_never_rests(durable: Place) -> None:
    """Python's lock goes to a thread only if the loop lets go of it for longer than it takes the thread to wake up."""
    given_up = 60.0

    async def play() -> tuple[float, Any]:
        loop = asyncio.get_running_loop()
        began, over = loop.time(), asyncio.Event()

        async def compute() -> None:
            while not over.is_set() and loop.time() < began + given_up:
                sum(range(10_000))
                await asyncio.sleep(0)

        computing = asyncio.create_task(compute())
        ledger = durable.open()
        for act in (create(), append(FIRST), append(SECOND, version=2)):
            await act(ledger)
        events = await ledger.read("s")
        took = loop.time() - began
        over.set()
        await computing
        await ledger.close()
        return took, events

    took, events = asyncio.run(play())

    assert events == (started(), FIRST, SECOND)
    assert took < given_up


def test_what_redact_takes_out_is_never_stored(durable: Place) -> None:
    def without_cards(event: AnyEvent) -> AnyEvent:
        return replace(event, output=StageOutput.ok(card="***")) if isinstance(event, StageCompleted) else event

    *_, events = on(
        durable.open(redact=without_cards), create(), append(FIRST, replace(SECOND, output=StageOutput.ok(card="4711"))), read()
    )

    assert events == (started(), FIRST, replace(SECOND, output=StageOutput.ok(card="***")))


def test_when_redact_fails_nothing_is_stored(durable: Place) -> None:
    def broken(event: AnyEvent) -> AnyEvent:
        if isinstance(event, StageCompleted):
            raise KeyError("card")
        return event

    *_, refused, events = on(durable.open(redact=broken), create(), append(FIRST, SECOND), read())

    assert str(refused) == "StageCompleted of saga s, stage 'a', can't be stored: redact raised KeyError: 'card'"
    assert events == (started(),)


def test_what_redact_gives_has_to_be_the_event(durable: Place) -> None:
    refused, events = on(durable.open(redact=lambda _: None), create(), read())

    assert str(refused) == "SagaStarted of saga s can't be stored: expected one from redact, got NoneType"
    assert events == ()


NO_ZONE = datetime(2026, 1, 2)  # noqa: DTZ001 - that it has none is what it is for
CHANGED: dict[str, tuple[AnyEvent, dict[str, Any], str]] = {
    "no failure": (
        StageFailed(stage="a", failure=FAILURE),
        {"failure": None},
        "what redact gave can't be read again: failure: Input should be",
    ),
    "no time": (FIRST, {"at": "yesterday"}, "what redact gave can't be read again: at: Input should be a valid datetime"),
    "a time of no zone": (FIRST, {"at": NO_ZONE}, "what redact gave can't be read again: at: Input should have timezone info"),
    "a failure of no zone": (
        StageFailed(stage="a", failure=FAILURE),
        {"failure": FAILURE.model_copy(update={"at": NO_ZONE})},
        "what redact gave can't be read again: failure: Input should have timezone info",
    ),
    "no event": (FIRST, {"event": "gone"}, "what redact gave can't be read again: Input tag 'gone'"),
    "another event": (
        CompensationStarted(stage="a", attempt=1),
        {"event": "stage_started"},
        "redact changed its event from 'compensation_started' to 'stage_started'",
    ),
    "another stage": (FIRST, {"stage": "b"}, "redact changed its stage from 'a' to 'b'"),
    "another saga": (started(), {"saga_id": "t"}, "redact changed its saga_id from 's' to 't'"),
    "another pipeline": (started(), {"pipeline": "q"}, "redact changed its pipeline from 'p' to 'q'"),
    "another parent": (started(), {"parent": "t"}, "redact changed its parent from None to 't'"),
    "another parent's stage": (started(), {"parent_stage": "a"}, "redact changed its parent_stage from None to 'a'"),
    "another status": (DONE, {"status": SagaStatus.STUCK}, "redact changed its status from <SagaStatus.COMPLETED: 'completed'> to"),
}


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("case", CHANGED)
def test_a_redacted_event_that_would_be_read_as_another_one_or_not_at_all_is_never_stored(durable: Place, case: str) -> None:
    event, changes, why = CHANGED[case]

    def redact(one: AnyEvent) -> AnyEvent:
        return replace(one, **changes) if one == event else one

    def put(ledger: Ledger) -> Any:
        if isinstance(event, SagaStarted):
            return ledger.create("s", "me", (event,))
        return append(event)(ledger)

    *_, refused, events = on(durable.open(redact=redact), *(() if isinstance(event, SagaStarted) else (create(),)), put, read())

    assert type(refused) is LedgerError
    assert f"{type(event).__name__} of saga s" in str(refused)
    assert f"can't be stored: {why}" in str(refused)
    assert len(events) == (0 if isinstance(event, SagaStarted) else 1)


# -- all of it at once -----------------------------------------------------------------------------------------------

YOUNG = datetime.now(UTC)
KINDS: list[Callable[[datetime], AnyEvent]] = [
    lambda at: StageStarted(stage="a", attempt=1, at=at),
    lambda at: SagaTurnedBack(reason=TurnReason.REQUEST, at=at),
    lambda at: SagaResumed(forward=True, by="ann", at=at),
    *(partial(lambda status, at: SagaEnded(status=status, at=at), status) for status in SagaStatus),
]
SAGAS, OWNERS, TIMES = st.sampled_from("pqrs"), st.sampled_from(["ann", "bob"]), st.sampled_from([LONG_AGO, LONG_AGO, YOUNG])
MOSTLY_RIGHT = st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1])
UNDER = st.sampled_from([None, None, 1, 2])
ACTS = st.one_of(
    st.tuples(st.just("create"), SAGAS, OWNERS, TIMES, st.booleans(), UNDER),
    st.tuples(
        st.just("append"), SAGAS, st.lists(st.tuples(st.sampled_from(KINDS), TIMES), min_size=1, max_size=3), MOSTLY_RIGHT, MOSTLY_RIGHT,
        st.booleans(),
    ),
    st.tuples(st.just("append"), SAGAS, st.tuples(st.tuples(st.just(KINDS[-1]), TIMES)), st.just(0), st.just(0), st.just(value=True)),
    st.tuples(st.just("acquire"), SAGAS, OWNERS, UNDER),
    st.tuples(st.just("release"), SAGAS, MOSTLY_RIGHT),
    st.tuples(st.just("list"), st.none() | st.sets(st.sampled_from(SagaStatus)), st.none() | SAGAS),
    st.tuples(st.just("prune")),
)  # fmt: skip


class Player:
    """Does what was drawn with one ledger, and notes what became of it in words that don't depend on its clock."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.tokens = dict.fromkeys("pqrs", 0)
        self.answers: list[Any] = []

    async def play(self, acts: list[Any]) -> list[Any]:
        for act in acts:
            try:
                self.answers.append(await getattr(self, act[0])(*act[1:]))
            except LedgerConflict as conflict:
                text = re.sub(r", or until .* says nothing more| until [0-9: -]+ UTC", "", str(conflict))
                self.answers.append((text, conflict.holder))
        self.answers += [await self.ledger.read(saga) for saga in "pqrs"]
        self.answers.append(await self.list(None, None))
        await self.ledger.close()
        return self.answers

    async def create(self, saga: str, owner: str, at: datetime, is_child: bool, under: int | None) -> int:
        parent = chr(ord(saga) - 1) if is_child else None
        self.tokens[saga] = await self.ledger.create(saga, owner, (started(saga, at, parent),), under=under)
        return self.tokens[saga]

    async def append(self, saga: str, events: Any, version_off: int, token_off: int, release: bool) -> None:
        version, token = len(await self.ledger.read(saga)) + version_off, self.tokens[saga] + token_off
        made = [kind(at) for kind, at in events]
        await self.ledger.append(saga, made, expected_version=version, token=token, release=release)

    async def acquire(self, saga: str, owner: str, under: int | None) -> int:
        self.tokens[saga] = await self.ledger.acquire(saga, owner, under=under)
        return self.tokens[saga]

    async def release(self, saga: str, token_off: int) -> None:
        await self.ledger.release(saga, self.tokens[saga] + token_off)

    async def list(self, statuses: set[SagaStatus] | None, parent: str | None) -> list[Any]:
        return [replace(entry, until=None) for entry in await self.ledger.list(statuses=statuses, parent=parent)]

    async def prune(self) -> set[str]:
        return set(await self.ledger.prune(timedelta(days=1)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(ACTS, max_size=30))
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_whatever_is_done_durable_ledgers_answer_as_memory_does(
    kind: str, acts: list[Any], tmp_path_factory: pytest.TempPathFactory, new_schema: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    file = SQLiteFile(tmp_path_factory.mktemp("ledger") / "sagas.db")
    place = file if kind == "sqlite" else PostgresSchema(request.getfixturevalue("postgres").get_uri(), new_schema())

    found = asyncio.run(Player(place.open(lease=3600.0)).play(acts))

    assert found == asyncio.run(Player(Memory().open()).play(acts))
