"""The example's own promise: whatever happens, not a cent, not an item is out of place; and its audit notices if one is."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from examples.order_fulfilment.__main__ import main
from examples.order_fulfilment.bank import Bank, CardDeclined
from examples.order_fulfilment.carrier import Carrier, UnknownAddress
from examples.order_fulfilment.faults import FAULTS, deal
from examples.order_fulfilment.forecast import prospects
from examples.order_fulfilment.fulfilment import Fulfilment
from examples.order_fulfilment.inventory import Inventory, OutOfStock
from examples.order_fulfilment.make_orders import PATH, make_orders
from examples.order_fulfilment.orders import read_orders
from examples.order_fulfilment.progress import Progress
from saga import SagaStatus, StageState

if TYPE_CHECKING:
    from collections.abc import Callable

    from examples.order_fulfilment.database import Database

ROOT = Path(__file__).parent.parent
THE_BOOKS_AGREE = "The books agree: not a cent, not an item out of place."
CONCURRENCY = 8


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200 orders by the real main function, with all that it leaves."""
    folder = tmp_path_factory.mktemp("run") / "kept"
    assert main(["--first", "200", "--concurrency", str(CONCURRENCY), "--keep", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def fulfilments(kept: Path) -> list[Fulfilment]:
    lines = (kept / "reports.jsonl").read_text(encoding="utf-8").splitlines()
    return [Fulfilment.model_validate_json(line) for line in lines]


@pytest.fixture
def copy(kept: Path, tmp_path: Path) -> Path:
    """What the run left, to be tampered with."""
    return Path(shutil.copytree(kept, tmp_path / "copy"))


# -- the run -----------------------------------------------------------------------------------------------------


def test_the_committed_orders_are_what_the_script_makes() -> None:
    assert PATH.read_bytes() == make_orders()
    assert len(read_orders(PATH)) == 1_000


def test_it_runs_as_a_program_and_says_nothing_but_what_it_is_asked_for(tmp_path: Path) -> None:
    program = [sys.executable, "-W", "error", "-m", "examples.order_fulfilment", "--first", "200", "--keep", str(tmp_path)]

    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "200 of 200 orders" in done.stdout
    assert "COMPENSATED" in done.stdout
    assert done.stdout.rstrip().endswith(THE_BOOKS_AGREE)


def test_stock_and_payment_are_seen_to_in_parallel_and_the_rest_one_after_another(fulfilments: list[Fulfilment]) -> None:
    completed = [fulfilment.report.stages for fulfilment in fulfilments if fulfilment.report.status is SagaStatus.COMPLETED]

    assert len(completed) > 50
    for stages in completed:
        begun, ended = ({name: getattr(stage, at) for name, stage in stages.items()} for at in ("started_at", "ended_at"))
        assert begun["reserve_stock"] < ended["authorise_payment"]
        assert begun["authorise_payment"] < ended["reserve_stock"]
        assert max(ended["reserve_stock"], ended["authorise_payment"]) <= begun["capture_payment"]
        assert ended["capture_payment"] <= begun["create_shipment"]
        assert ended["create_shipment"] <= begun["issue_receipt"]


def test_every_kind_of_fault_strikes_at_every_stage(fulfilments: list[Fulfilment]) -> None:
    struck = Counter(fulfilment.fault for fulfilment in fulfilments if fulfilment.was_struck)

    assert set(struck) == set(FAULTS)


def test_orders_fail_by_each_nature_of_the_data(fulfilments: list[Fulfilment]) -> None:
    causes = {fulfilment.report.cause.type.rpartition(".")[2] for fulfilment in fulfilments if fulfilment.report.cause}

    assert causes >= {"OutOfStock", "CardDeclined", "UnknownAddress"}


def test_a_lost_answer_is_asked_for_again_and_the_effect_landed_once(fulfilments: list[Fulfilment]) -> None:
    lost = [fulfilment for fulfilment in fulfilments if fulfilment.fault and fulfilment.fault.kind.is_mended]

    assert lost
    for fulfilment in lost:
        assert fulfilment.fault is not None
        assert fulfilment.report.status is SagaStatus.COMPLETED
        assert fulfilment.report.stages[fulfilment.fault.stage].attempts == 2


def test_a_stage_that_hangs_is_asked_for_by_its_probe(fulfilments: list[Fulfilment]) -> None:
    states: dict[str, set[StageState]] = {}
    for fulfilment in fulfilments:
        if fulfilment.fault and fulfilment.fault.kind.startswith("hangs"):
            states.setdefault(fulfilment.fault.kind, set()).add(fulfilment.report.stages[fulfilment.fault.stage].state)

    assert states == {"hangs before its effect": {StageState.FAILED}, "hangs after its effect": {StageState.UNDONE}}


def test_no_more_sagas_run_at_once_than_asked_for(fulfilments: list[Fulfilment]) -> None:
    # An end sorts before a start of the same instant, for it makes room for it.
    turns = sorted(
        turn
        for report in (fulfilment.report for fulfilment in fulfilments)
        for turn in ((report.started_at, 1), (report.ended_at or report.started_at, -1))
    )

    running = most = 0
    for _, change in turns:
        running += change
        most = max(most, running)

    assert 1 < most <= CONCURRENCY


def test_ctrl_c_undoes_what_is_in_flight_and_the_books_agree_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class PressesCtrlC(io.StringIO):
        def write(self, text: str) -> int:
            if "20 of 200 orders" in text:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = PressesCtrlC()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "stdout", out)

    try:
        code = main(["--first", "200"])
    finally:
        signal.signal(signal.SIGINT, before)

    assert code == 130
    assert "those in flight were undone" in out.getvalue()
    assert THE_BOOKS_AGREE in out.getvalue()


# -- the audit ---------------------------------------------------------------------------------------------------


def test_what_was_kept_can_be_audited_again(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--audit", str(kept)]) == 0

    assert THE_BOOKS_AGREE in capsys.readouterr().out


@pytest.mark.parametrize(
    ("claim", "database", "sql"),
    [
        ("No money was made or lost", "bank", "UPDATE accounts SET balance = balance + 1 WHERE name = 'card-001'"),
        ("No money was made or lost", "bank", "UPDATE accounts SET balance = balance - 1 WHERE name = 'shop'"),
        (
            "Every account shows what was moved",
            "bank",
            "UPDATE accounts SET balance = balance + CASE name WHEN 'card-001' THEN 1 ELSE -1 END WHERE name IN ('card-001', 'shop')",
        ),
        (
            "Every order is wholly",
            "bank",
            "UPDATE movements SET cents = cents + 1 WHERE rowid = (SELECT min(rowid) FROM movements WHERE kind = 'capture')",
        ),
        (
            "Every order is wholly",
            "bank",
            "UPDATE movements SET taker = 'card-001' WHERE rowid = (SELECT min(rowid) FROM movements WHERE kind = 'capture')",
        ),
        (
            "Every order is wholly",
            "bank",
            "INSERT INTO movements VALUES ('order-0001/capture_payment/again', 'capture', 'order-0001', 'card-001', 'shop', 1, NULL)",
        ),
        ("Every order is wholly", "bank", "UPDATE receipts SET cancelled = 1 WHERE number = (SELECT min(number) FROM receipts)"),
        ("No item was made or lost", "inventory", "UPDATE shelf SET quantity = quantity - 1 WHERE sku = 'teapot'"),
        ("Every order is wholly", "inventory", "UPDATE reserved_items SET quantity = quantity + 1"),
        ("Every stage of every report", "inventory", "DELETE FROM reservations WHERE released"),
        (
            "The databases are whole",
            "carrier",
            "DELETE FROM shipments WHERE tracking = (SELECT min(tracking) FROM shipments WHERE NOT cancelled)",
        ),
        (
            "No item was made or lost",
            "carrier",
            "DELETE FROM shipments WHERE tracking = (SELECT min(tracking) FROM shipments WHERE NOT cancelled)",
        ),
        (
            "No item was made or lost",
            "carrier",
            "UPDATE shipments SET cancelled = 1 WHERE tracking = (SELECT min(tracking) FROM shipments WHERE NOT cancelled)",
        ),
        (
            "Every order is wholly",
            "carrier",
            "UPDATE shipments SET address = 'Riga ' WHERE tracking = (SELECT min(tracking) FROM shipments WHERE NOT cancelled)",
        ),
        (
            "Every stage of every report",
            "carrier",
            "UPDATE shipments SET tracking = 999999 WHERE tracking = (SELECT min(tracking) FROM shipments WHERE NOT cancelled)",
        ),
        ("What came last was undone first", "bank", "UPDATE movements SET rowid = -rowid WHERE kind = 'void'"),
    ],
)
def test_the_audit_notices_when_a_database_was_tampered_with(
    copy: Path, capsys: pytest.CaptureFixture[str], claim: str, database: str, sql: str
) -> None:
    with closing(sqlite3.connect(copy / f"{database}.sqlite", isolation_level=None)) as connection:
        assert connection.execute(sql).rowcount > 0

    assert main(["--audit", str(copy)]) == 1

    printed = capsys.readouterr().out
    assert f"wrong  {claim}" in printed
    assert THE_BOOKS_AGREE not in printed


def _first(lines: list[dict[str, Any]], status: str) -> dict[str, Any]:
    found: dict[str, Any] = next(line["report"] for line in lines if line["report"]["status"] == status and line["fault"] is None)
    return found


def _completed_is_called_compensated(lines: list[dict[str, Any]]) -> None:
    _first(lines, "completed")["status"] = "compensated"


def _a_stage_is_in_doubt(lines: list[dict[str, Any]]) -> None:
    _first(lines, "compensated")["stages"]["issue_receipt"]["state"] = "in_doubt"


def _another_tracking_number(lines: list[dict[str, Any]]) -> None:
    _first(lines, "completed")["stages"]["create_shipment"]["output"]["data"]["tracking"] += 1


def _a_report_is_lost(lines: list[dict[str, Any]]) -> None:
    lines.remove(next(line for line in lines if line["report"]["status"] == "compensated"))


def _undone_in_the_wrong_order(lines: list[dict[str, Any]]) -> None:
    max((line["report"] for line in lines), key=lambda report: len(report["compensation_order"]))["compensation_order"].reverse()


def _another_cause(lines: list[dict[str, Any]]) -> None:
    _first(lines, "compensated")["cause"]["type"] = "OSError"


def _the_fault_did_not_strike(lines: list[dict[str, Any]]) -> None:
    next(line for line in lines if line["fault"])["was_struck"] = False


@pytest.mark.parametrize(
    ("claim", "tamper"),
    [
        ("Every report agrees with the books", _completed_is_called_compensated),
        ("Every report agrees with the books", _a_stage_is_in_doubt),
        ("Every stage of every report", _another_tracking_number),
        ("Every stage of every report", _a_report_is_lost),
        ("What came last was undone first", _undone_in_the_wrong_order),
        ("Every order ended as it had to", _another_cause),
        ("Every injected fault struck", _the_fault_did_not_strike),
    ],
)
def test_the_audit_notices_when_a_report_is_wrong(
    copy: Path, capsys: pytest.CaptureFixture[str], claim: str, tamper: Callable[[list[dict[str, Any]]], None]
) -> None:
    path = copy / "reports.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tamper(lines)
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    assert main(["--audit", str(copy)]) == 1

    assert f"wrong  {claim}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("database", "undoing"),
    [(Inventory, "release"), (Bank, "void"), (Bank, "refund"), (Bank, "cancel_receipt"), (Carrier, "cancel")],
)
def test_the_audit_notices_an_undoing_that_undoes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], database: type[Database], undoing: str
) -> None:
    async def do_nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(database, undoing, do_nothing)

    assert main(["--first", "100", "--faults", "0.5"]) == 1

    printed = capsys.readouterr().out
    assert "wrong  Every order is wholly fulfilled or wholly undone" in printed
    assert "wrong  Every report agrees with the books" in printed


# -- the three databases -----------------------------------------------------------------------------------------


def test_the_shelf_holds_no_less_than_nothing_and_a_repeated_request_takes_nothing(tmp_path: Path) -> None:
    async def use(inventory: Inventory) -> int:
        await inventory.stock_up({"mug": 3, "tray": 9})
        await inventory.reserve("first", "order 1", {"mug": 2})
        await inventory.reserve("first", "order 1", {"mug": 2})
        with pytest.raises(OutOfStock, match="2 x mug"):
            await inventory.reserve("second", "order 2", {"tray": 9, "mug": 2})
        with pytest.raises(OutOfStock, match="1 x moon"):
            await inventory.reserve("third", "order 3", {"moon": 1})
        assert not await inventory.has_reserved("second")
        assert await inventory.first("SELECT sum(quantity) FROM shelf") == 10
        await inventory.release("first")
        await inventory.release("first")
        return int(await inventory.first("SELECT sum(quantity) FROM shelf"))

    with closing(Inventory(tmp_path / "inventory.sqlite")) as inventory:
        assert asyncio.run(use(inventory)) == 12


def test_a_card_has_a_limit_and_money_moves_once_whatever_the_keys(tmp_path: Path) -> None:
    async def use(bank: Bank) -> list[int]:
        await bank.open_accounts({"card": 100})
        await bank.authorise("hold 1", "order 1", "card", 70)
        await bank.authorise("hold 1", "order 1", "card", 70)
        with pytest.raises(CardDeclined):
            await bank.authorise("hold 2", "order 2", "card", 31)
        with pytest.raises(CardDeclined):
            await bank.authorise("hold 3", "order 3", "no such card", 1)
        await bank.capture("capture 1", "hold 1")
        with pytest.raises(sqlite3.IntegrityError):
            await bank.capture("capture 2", "hold 1")
        with pytest.raises(sqlite3.IntegrityError):
            await bank.void("void 1", "hold 1")
        shop = [await bank.first("SELECT balance FROM accounts WHERE name = 'shop'")]
        await bank.refund("refund 1", "capture 1")
        await bank.refund("refund 2", "capture 1")
        await bank.void("void 1", "hold 1")
        await bank.void("void 2", "hold 1")
        return [*shop, *[await bank.first("SELECT balance FROM accounts WHERE name = ?", name) for name in ("shop", "card")]]

    with closing(Bank(tmp_path / "bank.sqlite")) as bank:
        assert asyncio.run(use(bank)) == [70, 0, 100]


def test_a_parcel_goes_to_a_known_address_and_an_order_is_in_one_parcel(tmp_path: Path) -> None:
    async def use(carrier: Carrier) -> None:
        await carrier.learn_addresses(["Riga"])
        tracking = await carrier.ship("first", "order 1", "Riga", {"mug": 1})
        assert await carrier.ship("first", "order 1", "Riga", {"mug": 1}) == tracking
        with pytest.raises(UnknownAddress, match="Atlantis"):
            await carrier.ship("second", "order 2", "Atlantis", {"mug": 1})
        assert await carrier.tracking_number("first") == tracking
        assert await carrier.tracking_number("second") is None

    with closing(Carrier(tmp_path / "carrier.sqlite")) as carrier:
        asyncio.run(use(carrier))


def test_a_probe_sees_what_became_of_a_request_whose_caller_lost_patience(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slowly(db: sqlite3.Connection) -> None:
        begun.set()
        may_end.wait()
        db.execute("INSERT INTO reservations (key, order_id) VALUES ('late', 'order 1')")

    async def use(inventory: Inventory) -> bool:
        request = asyncio.create_task(inventory.transact(slowly))
        await asyncio.to_thread(begun.wait)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        probe = asyncio.create_task(inventory.has_reserved("late"))
        may_end.set()
        return await probe

    with closing(Inventory(tmp_path / "inventory.sqlite")) as inventory:
        assert asyncio.run(use(inventory))


# -- what surrounds it -------------------------------------------------------------------------------------------


def test_faults_are_dealt_evenly_and_the_same_way_for_the_same_seed() -> None:
    orders = [str(number) for number in range(200)]

    faults = deal(orders, 90, seed=1)

    assert faults == deal(reversed(orders), 90, seed=1) != deal(orders, 90, seed=2)
    assert set(Counter(faults.values()).values()) == {2}
    assert len(deal(orders, 1_000, seed=1)) == 200


def test_the_forecast_tells_what_may_and_what_can_not_be_had() -> None:
    forecast = prospects(read_orders(PATH))
    told = Counter((its.can_succeed, frozenset(refusal.__name__ for refusal in its.refusals)) for its in forecast.values())

    assert told[True, frozenset()] > 700
    for refusal in ("OutOfStock", "CardDeclined", "UnknownAddress"):
        assert told[False, frozenset({refusal})] > 10
    for contended in ("OutOfStock", "CardDeclined"):
        assert told[True, frozenset({contended})] > 10


def test_on_a_terminal_progress_stays_in_one_line(fulfilments: list[Fulfilment]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    progress = Progress(len(fulfilments), out)

    for fulfilment in fulfilments:
        progress.count(fulfilment.report)
    progress.end()

    assert out.getvalue().count("\n") == 1
    assert "200 of 200 orders" in out.getvalue()


@pytest.mark.parametrize(
    ("orders", "complaint"),
    [
        ('{"id": "1"}\n', "line 1: expected an order, got card"),
        ("nonsense\n", "line 1: expected an order, got a line"),
        ('{"id": "1", "card": "c", "address": "a", "lines": [{"sku": "s", "quantity": 1, "unit_cents": 1.5}]}', "lines.0.unit_cents"),
        ('{"id": "1", "card": "c", "address": "a", "lines": [{"sku": "s", "quantity": 1, "unit_cents": 1}]}\n' * 2, "got 1 again"),
    ],
)
def test_a_file_that_holds_no_orders_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], orders: str, complaint: str) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text(orders, encoding="utf-8")

    with pytest.raises(SystemExit) as exited:
        main(["--orders", str(path)])

    assert exited.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--concurrency", "0"], ["--faults", "1.1"], ["--faults", "many"], ["--audit", "no such folder"]])
def test_arguments_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)

    assert exited.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_databases_of_an_earlier_run_are_not_written_over(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--keep", str(kept)])

    assert "expected a folder without databases" in capsys.readouterr().err
