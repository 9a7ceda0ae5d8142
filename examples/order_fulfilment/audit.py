"""The audit: are the books right, and is what the reports say what the books say?"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from examples.order_fulfilment.bank import SHOP
from examples.order_fulfilment.books import Books, InForce
from examples.order_fulfilment.faults import STAGES
from examples.order_fulfilment.forecast import Prospects
from examples.order_fulfilment.fulfilment import Fulfilment
from examples.order_fulfilment.opening import CREDIT, STOCK, euros
from saga import FailureKind, SagaReport, SagaStatus, StageState

ORDERS_OF_MOVEMENTS: Final = {
    (),
    ("authorise", "void"),
    ("authorise", "capture"),
    ("authorise", "capture", "refund", "void"),
}
"""The ways in which an order's money can have moved when it is at rest."""

EDGES: Final = (
    ("capture_payment", "reserve_stock"),
    ("capture_payment", "authorise_payment"),
    ("create_shipment", "capture_payment"),
    ("issue_receipt", "create_shipment"),
)
"""A stage, and one that it depends on."""


@dataclass(frozen=True)
class Check:
    """One claim, and all that contradicts it.

    Attributes:
        claim: What is right if nothing is out of place.
        figures: What was counted.
        out_of_place: A sentence for each contradiction.
    """

    claim: str
    figures: str
    out_of_place: tuple[str, ...] = ()


def audit(books: Books, fulfilments: Sequence[Fulfilment], forecast: dict[str, Prospects]) -> list[Check]:
    """Check the books by themselves first, then the reports against them, then both against what had to come."""
    return [
        _files(books),
        _money(books),
        _accounts(books),
        _items(books),
        _orders(books, fulfilments),
        _reports(books, fulfilments),
        _stages(books, fulfilments),
        _order_of_undoing(books, fulfilments),
        _endings(fulfilments, forecast),
        _faults(fulfilments),
    ]


def _files(books: Books) -> Check:
    rows = sum(map(len, (books.shelf, books.reservations, books.accounts, books.movements, books.receipts, books.shipments)))
    return Check("The databases are whole", f"{rows:,} rows", tuple(books.damage))


def _money(books: Books) -> Check:
    before, after = sum(CREDIT.values()), sum(books.accounts.values())
    wrong = () if before == after else (f"there were {euros(before)} and there are {euros(after)}",)
    return Check("No money was made or lost", f"{euros(after)}, {euros(books.accounts.get(SHOP, 0))} of it earned by the shop", wrong)


def _accounts(books: Books) -> Check:
    expected = Counter({SHOP: 0} | CREDIT)
    for movement in books.movements:
        expected[movement.giver] -= movement.cents
        expected[movement.taker] += movement.cents
    wrong = tuple(
        f"account {name!r} shows {euros(books.accounts.get(name, 0))}, its movements come to {euros(expected[name])}"
        for name in sorted(expected.keys() | books.accounts.keys())
        if books.accounts.get(name, 0) != expected[name]
    )
    return Check("Every account shows what was moved", f"{len(books.accounts):,} accounts, {len(books.movements):,} movements", wrong)


def _items(books: Books) -> Check:
    shipped: Counter[str] = Counter()
    for in_force in books.in_force.values():
        for _, items in in_force.shipped:
            shipped.update(items)
    wrong = tuple(
        f"of {sku!r} there were {STOCK.get(sku, 0)}, and {books.shelf.get(sku, 0)} are on the shelf and {shipped[sku]} in parcels"
        for sku in sorted(STOCK.keys() | books.shelf.keys() | shipped.keys())
        if STOCK.get(sku, 0) != books.shelf.get(sku, 0) + shipped[sku]
    )
    return Check("No item was made or lost", f"{sum(books.shelf.values()):,} on the shelf, {shipped.total():,} in parcels", wrong)


def _orders(books: Books, fulfilments: Sequence[Fulfilment]) -> Check:
    wrong = []
    count: Counter[bool] = Counter()
    for fulfilment in fulfilments:
        found = books.in_force.get(fulfilment.order.id, InForce())
        if found in (InForce(), InForce.fulfilled(fulfilment.order)):
            count[found == InForce()] += 1
        else:
            wrong.append(f"{fulfilment.order.id} is neither fulfilled nor undone; in force is {found}")
    known = {fulfilment.order.id for fulfilment in fulfilments}
    wrong += [f"{order_id} was never run; in force is {books.in_force[order_id]}" for order_id in sorted(books.in_force.keys() - known)]
    return Check("Every order is wholly fulfilled or wholly undone", f"{count[False]:,} fulfilled, {count[True]:,} undone", tuple(wrong))


def _reports(books: Books, fulfilments: Sequence[Fulfilment]) -> Check:
    wrong = []
    for order, report in ((fulfilment.order, fulfilment.report) for fulfilment in fulfilments):
        found = books.in_force.get(order.id, InForce())
        if report.status is SagaStatus.COMPLETED:
            is_right = found == InForce.fulfilled(order) and tuple(report.kept) == tuple(report.stages)
        else:
            is_right = report.status is SagaStatus.COMPENSATED and found == InForce() and not report.kept
        if not is_right or not report.clean:
            wrong.append(f"{order.id} is reported as {report.status}, kept {list(report.kept)}; in force is {found}")
    unsettled = sum(len(report.stuck) + len(report.blocked) + len(report.in_doubt) for report in _reports_of(fulfilments))
    return Check("Every report agrees with the books", f"{len(fulfilments):,} reports, {unsettled} stages unsettled", tuple(wrong))


def _stages(books: Books, fulfilments: Sequence[Fulfilment]) -> Check:
    wrong = []
    numbers = {shipment.key: shipment.tracking for shipment in books.shipments} | {row.key: row.number for row in books.receipts}
    count: Counter[str] = Counter()
    for report in _reports_of(fulfilments):
        for name, stage in report.stages.items():
            key = f"{report.saga_id}/{name}"
            said = {StageState.KEPT: "in force", StageState.UNDONE: "undone"}.get(stage.state, "never done")
            found = {None: "never done", False: "in force", True: "undone"}[books.effects.get(key)]
            count[found] += 1
            if said != found:
                wrong.append(f"{key} is reported as {stage.state}; in the books it is {found}")
            number = None if stage.output is None else stage.output.data.get({"issue_receipt": "receipt"}.get(name, "tracking"))
            if number != numbers.get(key):
                wrong.append(f"{key} is reported with number {number}; in the books it has {numbers.get(key)}")
    reported = {f"{report.saga_id}/{name}" for report in _reports_of(fulfilments) for name in report.stages}
    wrong += [f"{key} is in the books and in no report" for key in sorted(books.effects.keys() - reported)]
    figures = ", ".join(f"{count[state]:,} {state}" for state in ("in force", "undone", "never done"))
    return Check("Every stage of every report does, too", figures, tuple(wrong))


def _order_of_undoing(books: Books, fulfilments: Sequence[Fulfilment]) -> Check:
    wrong = []
    movements: dict[str, tuple[str, ...]] = {}
    for movement in books.movements:
        movements[movement.order_id] = (*movements.get(movement.order_id, ()), movement.kind)
    wrong += [f"the money of {order} moved so: {kinds}" for order, kinds in movements.items() if kinds not in ORDERS_OF_MOVEMENTS]
    undone = 0
    for report in _reports_of(fulfilments):
        place = {name: number for number, name in enumerate(report.compensation_order)}
        undone += len(place)
        wrong += [
            f"{report.saga_id} undid {dependency} before {dependent}"
            for dependent, dependency in EDGES
            if dependent in place and dependency in place and place[dependent] > place[dependency]
        ]
    return Check("What came last was undone first", f"{undone:,} effects undone", tuple(wrong))


def _endings(fulfilments: Sequence[Fulfilment], forecast: dict[str, Prospects]) -> Check:
    ended = [fulfilment for fulfilment in fulfilments if not _was_interrupted(fulfilment.report)]
    wrong = tuple(
        f"{fulfilment.order.id} ended as {fulfilment.report.status}, {fulfilment.report.cause or 'without a failure'}"
        for fulfilment in ended
        if not _had_to_end_so(fulfilment, forecast[fulfilment.order.id])
    )
    return Check("Every order ended as it had to", f"{len(ended):,} orders", wrong)


def _had_to_end_so(fulfilment: Fulfilment, prospects: Prospects) -> bool:
    fault, report = fulfilment.fault, fulfilment.report
    if report.status is SagaStatus.COMPLETED:
        return prospects.can_succeed and (fault is None or fault.kind.is_mended)
    if report.cause is None:
        return False
    if fault is not None:
        culprit = STAGES[-1] if fault.kind.is_of_undoing else fault.stage
        return not fault.kind.is_mended and report.cause.stage == culprit
    return report.cause.type in {f"{refusal.__module__}.{refusal.__qualname__}" for refusal in prospects.refusals}


def _faults(fulfilments: Sequence[Fulfilment]) -> Check:
    injected = [fulfilment for fulfilment in fulfilments if fulfilment.fault is not None]
    wrong = tuple(
        f"{fulfilment.order.id} was to meet {fulfilment.fault}, and did not"
        for fulfilment in injected
        if not fulfilment.was_struck and not _was_interrupted(fulfilment.report)
    )
    kinds = len({fulfilment.fault for fulfilment in injected})
    return Check("Every injected fault struck", f"{len(injected):,} faults of {kinds} kinds", wrong)


def _was_interrupted(report: SagaReport) -> bool:
    return report.cause is not None and report.cause.stage is None and report.cause.kind is FailureKind.INTERRUPTED


def _reports_of(fulfilments: Sequence[Fulfilment]) -> Iterator[SagaReport]:
    return (fulfilment.report for fulfilment in fulfilments)
