"""Tables of what became of the orders."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from examples.order_fulfilment.faults import STAGES, FaultKind
from examples.order_fulfilment.fulfilment import Fulfilment
from saga import FailureKind, SagaStatus

REFUSALS: Final = {"OutOfStock": "out of stock", "CardDeclined": "card limit", "UnknownAddress": "unknown address"}


def outcomes(fulfilments: Sequence[Fulfilment]) -> str:
    """How many orders ended in which way, and why."""
    counts = Counter((fulfilment.report.status, _why(fulfilment)) for fulfilment in fulfilments)
    return "\n".join(f"  {status:<12}  {why:<42}  {count:6,}" for (status, why), count in sorted(counts.items(), key=_rank))


def _rank(item: tuple[tuple[SagaStatus, str], int]) -> tuple[bool, str, bool, str]:
    (status, why), _ = item
    return status is not SagaStatus.COMPLETED, status, why.startswith("injected"), why


def _why(fulfilment: Fulfilment) -> str:
    cause = fulfilment.report.cause
    if cause is not None and cause.kind is FailureKind.INTERRUPTED and cause.stage is None:
        return "interrupted"
    if fulfilment.fault is not None:
        return f"injected: {fulfilment.fault.kind}"
    if cause is None:
        return ""
    return REFUSALS.get(cause.type.rpartition(".")[2], str(cause))


def faults(fulfilments: Sequence[Fulfilment]) -> str:
    """How often each fault struck, and where."""
    counts = Counter(fulfilment.fault for fulfilment in fulfilments if fulfilment.was_struck)
    by_place = Counter({(fault.kind, fault.stage): count for fault, count in counts.items() if fault is not None})

    def lines() -> Iterator[str]:
        yield f"  {'':<27}" + "".join(f"  {stage:>17}" for stage in STAGES)
        for kind in FaultKind:
            yield f"  {kind:<27}" + "".join(f"  {by_place[kind, stage]:17,}" for stage in STAGES)

    return "\n".join(lines())


def most_eventful(fulfilments: Sequence[Fulfilment]) -> Fulfilment | None:
    """The order that was undone with the most to tell of; None if none was undone."""
    undone = [fulfilment for fulfilment in fulfilments if fulfilment.report.status is SagaStatus.COMPENSATED]
    return max(undone, key=lambda fulfilment: (len(fulfilment.report.undone), len(fulfilment.report.failures)), default=None)
