"""`kill -9` of a real process at every write of its ledger, then recovery in a new one: the world is as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from examples.order_fulfilment.bank import Bank
from examples.order_fulfilment.books import InForce, read_books
from examples.order_fulfilment.carrier import Carrier
from examples.order_fulfilment.inventory import Inventory
from examples.order_fulfilment.opening import ADDRESSES, CREDIT, STOCK
from examples.order_fulfilment.orders import Order
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationStarted,
    EffectRecorded,
    Event,
    SagaEnded,
    StageCompleted,
    StageSettled,
    StageStarted,
)
from saga.ledgers.sqlite import SQLiteLedger
from saga.recovery.state import SagaState
from saga.report import SagaReport
from tests.scripts.mortal import HALVES, Books, named
from tests.world import DIAMOND

ROOT = Path(__file__).parent.parent


class Nursery:
    """Has deeds done by processes of their own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.scripts.mortal"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, **deed: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(deed) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert not answer["failed"], answer
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def random_dag(seed: int) -> dict[str, list[str]]:
    dice = random.Random(seed)
    names = "abcdef"
    return {name: sorted(dice.sample(names[:place], min(place, dice.randint(0, 2)))) for place, name in enumerate(names)}


SHAPES = {"diamond": {name: list(needs) for name, needs in DIAMOND.items()}} | {f"random {seed}": random_dag(seed) for seed in (0, 1, 2, 4)}


@pytest.mark.parametrize(
    ("shape", "failing", "kind", "ledger"),
    [
        ("diamond", None, "probed", "sqlite"),
        ("diamond", "d", "idempotent", "sqlite"),
        ("diamond", "d", "probed", "postgres"),
        ("random 0", None, "idempotent", "sqlite"),
        ("random 1", "d", "probed", "sqlite"),
        ("random 2", "f", "probed", "sqlite"),
        ("random 4", "e", "idempotent", "sqlite"),
        ("random 4", "e", "idempotent", "postgres"),
    ],
)
def test_a_process_killed_at_any_write_is_recovered_as_if_it_had_not_been(
    shape: str, failing: str | None, kind: str, ledger: str, nursery: Nursery, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Promises 2 and 11."""
    graph, fails = SHAPES[shape], failing is not None
    case: dict[str, Any] = {"what": "dag", "shape": graph, "failing": failing, "kind": kind}
    if ledger == "postgres":
        case["dsn"] = request.getfixturevalue("postgres").get_uri()
    (tmp_path / "whole").mkdir()
    whole = nursery.do(deed="run", folder=str(tmp_path / "whole"), **case)
    expected = Books(tmp_path / "whole" / "books.sqlite")
    assert whole["status"] == ("compensated" if fails else "completed")
    assert expected.standing() == ([] if fails else sorted(graph))

    called_twice = set()
    for moment in ("before", "after"):
        write, killed = 0, True
        while killed:
            write += 1
            folder = tmp_path / f"{moment} {write}"
            folder.mkdir()
            where = f"killed {moment} write {write}"
            killed = nursery.do(deed="run", folder=str(folder), kill_at=write, moment=moment, **case)["killed"]
            recovered = nursery.do(deed="recover", folder=str(folder), **case)["recovered"]
            again = nursery.do(deed="recover", folder=str(folder), **case)["recovered"]

            books = Books(folder / "books.sqlite")
            never_began = (write, moment) == (1, "before")
            assert again == {}, where
            assert recovered in ({}, {"s": whole["status"]}), where
            assert recovered or never_began or not killed or moment == "after", where
            assert books.standing() == ([] if never_began else expected.standing()), where
            done = books.deeds()
            assert not [stage for deed, stage in done if deed == "undone under its dependents"], where
            for stage in graph:
                # No effect and no undo ran twice, and none was left out.
                assert done.count(("did", stage)) <= 1, where
                assert done.count(("undid", stage)) == done.count(("did", stage)) * fails, where
                # A compensation is called again where its record was lost, with the same key; and not where a probe can tell that it ran.
                calls = books.calls(stage)
                assert calls == [f"s/{stage}/undo"] * len(calls), where
                assert len(calls) <= 2, where
                called_twice |= {stage} if len(calls) == 2 else set()
        # Every write was reached: the one that begins the saga, those of its stages, the one that ends it.
        assert write > 4
    assert bool(called_twice) == (fails and kind == "idempotent")


@pytest.mark.parametrize("first", [2, 3, 5])
def test_a_process_killed_again_at_any_write_of_its_recovery_is_recovered_by_the_next(first: int, nursery: Nursery, tmp_path: Path) -> None:
    """Promise 11."""
    case: dict[str, Any] = {"what": "dag", "shape": SHAPES["diamond"], "failing": "d", "kind": "probed"}
    second, killed = 0, True
    while killed:
        second += 1
        folder = tmp_path / str(second)
        folder.mkdir()
        assert nursery.do(deed="run", folder=str(folder), kill_at=first, moment="after", **case)["killed"]
        killed = nursery.do(deed="recover", folder=str(folder), kill_at=second, moment="before", **case)["killed"]
        recovered = nursery.do(deed="recover", folder=str(folder), **case)["recovered"]

        assert recovered == ({"s": "compensated"} if killed else {}), second
        assert Books(folder / "books.sqlite").standing() == [], second
    # How many writes there are depends on what falls together into one; taking up the saga and ending it are never the same.
    assert second > 2


def test_what_cannot_be_known_is_in_doubt(nursery: Nursery, tmp_path: Path) -> None:
    case: dict[str, Any] = {"what": "dag", "shape": {"a": [], "b": ["a"]}, "failing": None, "kind": "silent"}
    assert nursery.do(deed="run", folder=str(tmp_path), kill_at=2, moment="after", **case)["killed"]

    recovered = nursery.do(deed="recover", folder=str(tmp_path), **case)

    assert recovered["recovered"] == {"s": "stuck"}
    assert Books(tmp_path / "books.sqlite").standing() == ["a"]


# -- the tables of the docs --------------------------------------------------------------------------------------

FATES: dict[str, tuple[str, list[str]]] = {
    "the saga's first write was not done": ("before SagaStarted", []),
    "its code had not begun": ("after StageStarted it", []),
    "it was in the middle of its effect": ("in execute", []),
    "it was done, which was not on disk": ("before StageCompleted it", []),
    "its completion was on disk": ("after StageCompleted it", []),
    "it had failed, which was not on disk": ("before StageFailed it", ["it"]),
    "it was done, and another stage's failure on disk": ("before StageCompleted it", ["other"]),
    "what failed was not on disk": ("before StageFailed after", ["after"]),
    "its compensation's code had not begun": ("after CompensationStarted it", ["after"]),
    "it was in the middle of being undone": ("in compensate", ["after"]),
    "it was undone, which was not on disk": ("before CompensationCompleted it", ["after"]),
    "that it is undone was on disk": ("after CompensationCompleted it", ["after"]),
    "all was undone, the saga's end not on disk": ("before SagaEnded", ["after"]),
    "the saga's end was on disk": ("after SagaEnded", ["after"]),
}
"""The rows of the tables: where the process is killed, and which stages fail."""

ON_DISK: dict[type[Event], str] = {
    StageStarted: "its start",
    EffectRecorded: "the part",
    StageCompleted: "its completion",
    CompensationStarted: "the undoing's start",
    CompensationCompleted: "that it is undone",
}


def cells_of_the_docs() -> Iterator[tuple[str, str, str, str, str]]:
    """When it is killed, what is then on disk and in the world, what the stage offers, and what follows."""
    page = (ROOT / "docs" / "explanation" / "durability.md").read_text("utf-8")
    kinds: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "killed when":
            kinds = cells[3:]
        elif cells[0] in FATES:
            for kind, follows in zip(kinds, cells[3:], strict=True):
                for one in (kind,) if kind in HALVES else (name for name in HALVES if name != "probe"):
                    yield cells[0], cells[1], cells[2], one, follows


CELLS = list(cells_of_the_docs())


def events_in(folder: Path) -> Sequence[AnyEvent]:
    async def read() -> Sequence[AnyEvent]:
        async with SQLiteLedger(folder / "ledger.sqlite") as ledger:
            return await ledger.read("s")

    return asyncio.run(read())


def test_the_tables_of_the_docs_have_all_moments_and_kinds() -> None:
    assert {(cell[0], cell[3]) for cell in CELLS} == {(when, kind) for when in FATES for kind in HALVES}


@pytest.mark.parametrize(("when", "on_disk", "in_the_world", "kind", "follows"), CELLS, ids=[f"{cell[0]}, {cell[3]}" for cell in CELLS])
def test_what_follows_when_a_process_is_killed_is_what_the_docs_say(
    when: str, on_disk: str, in_the_world: str, kind: str, follows: str, nursery: Nursery, tmp_path: Path
) -> None:
    """Promise 11."""
    point, failing = FATES[when]
    case: dict[str, Any] = {"what": "fate", "folder": str(tmp_path), "kind": kind, "failing": failing}

    assert nursery.do(deed="run", point=point, **case)["killed"]
    books = Books(tmp_path / "books.sqlite")
    deeds = len(books.deeds())
    left = ["nothing", *(ON_DISK[type(event)] for event in events_in(tmp_path) if named(event).endswith(" it"))]
    stood = books.standing().count("it")
    nursery.do(deed="recover", **case)

    did = ", ".join(deed for deed, _ in books.deeds()[deeds:] if deed in {"asked", "runs", "undone"})
    events = events_in(tmp_path)
    ended = SagaState(events).status.value if events else "not known"
    assert left[-1] == on_disk
    assert ("nothing", "a part", "all")[stood] == in_the_world
    assert f"{did}: {ended}".removeprefix(": ") == follows
    assert books.standing().count("it") == {"completed": 2, "compensated": 0, "stuck": stood, "not known": 0}[ended]


def test_the_report_of_what_cannot_be_known_says_what_may_stand_and_what_to_do(nursery: Nursery, tmp_path: Path) -> None:
    case: dict[str, Any] = {"what": "fate", "folder": str(tmp_path), "kind": "none", "failing": []}
    nursery.do(deed="run", point="in execute", **case)
    nursery.do(deed="recover", **case)

    report = SagaReport.of(SagaState(events_in(tmp_path)))

    assert (set(report.in_doubt), set(report.blocked), report.not_run) == ({"it"}, {"before"}, ("after",))
    assert report.cause is not None
    assert report.cause.kind == "crashed"
    assert "saga settle s it undone --note" in str(report)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_persons_word_whose_process_is_killed_is_on_disk_whole_or_not_at_all(moment: str, nursery: Nursery, tmp_path: Path) -> None:
    case: dict[str, Any] = {"what": "fate", "folder": str(tmp_path), "kind": "none", "failing": []}
    nursery.do(deed="run", point="in execute", **case)
    assert nursery.do(deed="recover", **case)["recovered"] == {"s": "stuck"}

    assert nursery.do(deed="settle", point=f"{moment} StageSettled it", **case)["killed"]

    events = events_in(tmp_path)
    assert any(isinstance(event, StageSettled) for event in events) == (moment == "after")
    assert isinstance(events[-1], SagaEnded)
    if moment == "before":
        nursery.do(deed="settle", **case)
    assert nursery.do(deed="resume", **case)["status"] == "compensated"


# -- a whole order -----------------------------------------------------------------------------------------------


def an_order(address: str) -> Order:
    """The first one in the file that nothing but its address can stop."""
    lines = (ROOT / "examples/order_fulfilment/orders.jsonl").read_text("utf-8").splitlines()
    orders = [Order.model_validate_json(line) for line in lines]
    order = next(each for each in orders if each.card.startswith("card-") and "moon lamp" not in each.items and each.cents < 1_000_00)
    return order.model_copy(update={"address": address})


async def open_shop(folder: Path) -> None:
    with (
        closing(Inventory(folder / "inventory.sqlite")) as inventory,
        closing(Bank(folder / "bank.sqlite")) as bank,
        closing(Carrier(folder / "carrier.sqlite")) as carrier,
    ):
        await inventory.stock_up(STOCK)
        await bank.open_accounts(CREDIT)
        await carrier.learn_addresses(ADDRESSES)


@pytest.mark.parametrize("is_deliverable", [True, False])
def test_an_order_whose_process_is_killed_at_any_write_balances_to_the_cent(is_deliverable: bool, nursery: Nursery, tmp_path: Path) -> None:
    order = an_order(ADDRESSES[0] if is_deliverable else "Atlantis")
    case: dict[str, Any] = {"what": "order", "input": order.model_dump_json()}
    write, survived = 0, False

    while not survived:
        write += 1
        for moment in ("before", "after"):
            folder = tmp_path / f"{moment} {write}"
            folder.mkdir()
            asyncio.run(open_shop(folder))
            died = nursery.do(deed="run", folder=str(folder), kill_at=write, moment=moment, **case)
            survived = not died["killed"]
            recovered = nursery.do(deed="recover", folder=str(folder), **case)

            books = read_books(folder)
            assert books.damage == []
            assert sum(books.accounts.values()) == sum(CREDIT.values())
            began = (write, moment) != (1, "before")
            ended = "completed" if is_deliverable else "compensated"
            assert recovered["recovered"] in ({}, {"s": ended}), (moment, write)
            if began:
                # Whether the recovery had to do anything or not: by its ledger the saga has come to its end.
                assert SagaState(events_in(folder)).status.value == ended, (moment, write)
            fulfilled = InForce.fulfilled(order) if is_deliverable and began else InForce()
            assert books.in_force[order.id] == fulfilled, (moment, write, recovered)
    assert write > 5
