"""Runs orders as sagas, so many at a time."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from examples.order_fulfilment.faults import Fault, faulty_pipeline
from examples.order_fulfilment.orders import Order
from examples.order_fulfilment.shop import Shop
from examples.order_fulfilment.stages import order_pipeline
from saga import Compensation, FailFast, Retry, SagaCoordinator, SagaReport

LOST_MESSAGES: Final = Retry(attempts=3, wait=0.01, retry_on=(ConnectionError,))
POLICY: Final = FailFast(retry=LOST_MESSAGES, timeout=30.0, compensation=Compensation(retry=LOST_MESSAGES))


class Fulfilment(BaseModel):
    """What became of one order.

    Attributes:
        order: What was ordered.
        report: The saga's report.
        fault: The fault that was injected, or None.
        was_struck: Whether the fault struck.
    """

    model_config = ConfigDict(frozen=True)

    order: Order
    report: SagaReport
    fault: Fault | None
    was_struck: bool


async def fulfil(
    orders: Iterable[Order], folder: Path, faults: Mapping[str, Fault], *, concurrency: int, on_report: Callable[[SagaReport], None]
) -> list[Fulfilment]:
    """Run orders as sagas, at most `concurrency` at a time.

    When the task is cancelled, no further order is begun and those in flight are undone before this returns.

    Args:
        orders: What to run.
        folder: Where the three databases are made.
        faults: What to inject, by order.
        concurrency: How many sagas run at once.
        on_report: Is called whenever an order has ended.

    Returns:
        What became of every order that was begun.
    """
    coordinator = SagaCoordinator(POLICY)
    waiting = iter(orders)
    begun: list[Order] = []
    struck: set[str] = set()
    with Shop(folder) as shop:
        await shop.reset()
        flawless = order_pipeline(shop.stages)
        faulty = {fault: faulty_pipeline(shop.stages, fault, struck) for fault in set(faults.values())}

        async def work() -> None:
            for order in waiting:
                begun.append(order)
                pipeline = faulty[faults[order.id]] if order.id in faults else flawless
                on_report(await coordinator.run(pipeline, saga_id=order.id, input_text=order.model_dump_json()))

        # Somebody pressed Ctrl-C: the coordinator has undone what was in flight, and what was begun is audited like all else.
        with suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as workers:
                for _ in range(concurrency):
                    workers.create_task(work())
    return [
        Fulfilment(order=order, report=await coordinator.report(order.id), fault=faults.get(order.id), was_struck=order.id in struck)
        for order in begun
    ]
