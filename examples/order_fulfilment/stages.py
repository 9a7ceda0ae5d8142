"""The stages of an order: what each does, how it is undone, and how to ask whether it was done.

Every request carries the saga's idempotency key. So it can be repeated without harm, what it did is found again under that
key, and it is undone by that key, also when its answer was lost on the way.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stageflow.api import Pipeline, StageOutput

from examples.order_fulfilment.bank import Bank
from examples.order_fulfilment.carrier import Carrier
from examples.order_fulfilment.inventory import Inventory
from examples.order_fulfilment.orders import Order
from saga import CompensableStage, CompensationContext, SagaContext


class OrderStage(CompensableStage):
    """A stage that can be undone, and that knows afterwards whether it was done."""

    @abstractmethod
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Ask the database: the output if the effect landed, None if it did not."""


@dataclass(frozen=True)
class ReserveStock(OrderStage):
    """Sets the order's items aside; undone by putting them back on the shelf."""

    inventory: Inventory

    async def execute(self, ctx: SagaContext) -> StageOutput:
        """Set the items aside."""
        order = _order(ctx)
        await self.inventory.reserve(ctx.idempotency_key, order.id, order.items)
        return StageOutput.ok(reservation=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        """Put them back."""
        await self.inventory.release(ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Look for the reservation."""
        return StageOutput.ok(reservation=ctx.forward_key) if await self.inventory.has_reserved(ctx.forward_key) else None


@dataclass(frozen=True)
class AuthorisePayment(OrderStage):
    """Holds the price on the customer's card; undone by voiding the hold."""

    bank: Bank

    async def execute(self, ctx: SagaContext) -> StageOutput:
        """Hold the money."""
        order = _order(ctx)
        await self.bank.authorise(ctx.idempotency_key, order.id, order.card, order.cents)
        return StageOutput.ok(authorisation=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        """Let it go."""
        await self.bank.void(ctx.idempotency_key, ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Look for the hold."""
        return StageOutput.ok(authorisation=ctx.forward_key) if await self.bank.has_moved(ctx.forward_key) else None


@dataclass(frozen=True)
class CapturePayment(OrderStage):
    """Gives the shop the money that is held; undone by a refund."""

    bank: Bank

    async def execute(self, ctx: SagaContext) -> StageOutput:
        """Take the money."""
        await self.bank.capture(ctx.idempotency_key, ctx.inputs.require_from("authorise_payment", "authorisation"))
        return StageOutput.ok(capture=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        """Give it back."""
        await self.bank.refund(ctx.idempotency_key, ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Look for the capture."""
        return StageOutput.ok(capture=ctx.forward_key) if await self.bank.has_moved(ctx.forward_key) else None


@dataclass(frozen=True)
class CreateShipment(OrderStage):
    """Hands the parcel to the carrier; undone by calling it back."""

    carrier: Carrier

    async def execute(self, ctx: SagaContext) -> StageOutput:
        """Ship it."""
        order = _order(ctx)
        tracking = await self.carrier.ship(ctx.idempotency_key, order.id, order.address, order.items)
        return StageOutput.ok(tracking=tracking)

    async def compensate(self, ctx: CompensationContext) -> None:
        """Call it back."""
        await self.carrier.cancel(ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Look for the parcel."""
        tracking = await self.carrier.tracking_number(ctx.forward_key)
        return None if tracking is None else StageOutput.ok(tracking=tracking)


@dataclass(frozen=True)
class IssueReceipt(OrderStage):
    """Confirms the payment to the customer; undone by cancelling the receipt, whose number stays taken."""

    bank: Bank

    async def execute(self, ctx: SagaContext) -> StageOutput:
        """Issue it."""
        number = await self.bank.issue_receipt(ctx.idempotency_key, ctx.inputs.require_from("capture_payment", "capture"))
        return StageOutput.ok(receipt=number, tracking=ctx.inputs.require_from("create_shipment", "tracking"))

    async def compensate(self, ctx: CompensationContext) -> None:
        """Cancel it."""
        await self.bank.cancel_receipt(ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Look for it."""
        number = await self.bank.receipt_number(ctx.forward_key)
        if number is None:
            return None
        return StageOutput.ok(receipt=number, tracking=ctx.inputs["create_shipment"].data["tracking"])


def order_stages(inventory: Inventory, bank: Bank, carrier: Carrier) -> dict[str, OrderStage]:
    """The stages by name, in the order in which they are drawn."""
    return {
        "reserve_stock": ReserveStock(inventory),
        "authorise_payment": AuthorisePayment(bank),
        "capture_payment": CapturePayment(bank),
        "create_shipment": CreateShipment(carrier),
        "issue_receipt": IssueReceipt(bank),
    }


def order_pipeline(stages: Mapping[str, Any]) -> Pipeline:
    """Put the stages together.

    ::

        reserve_stock ──────┐
                            ├── capture_payment ── create_shipment ── issue_receipt
        authorise_payment ──┘
    """
    return (
        Pipeline(name="order_fulfilment")
        .with_stage("reserve_stock", stages["reserve_stock"])
        .with_stage("authorise_payment", stages["authorise_payment"])
        .with_stage("capture_payment", stages["capture_payment"], dependencies=("reserve_stock", "authorise_payment"))
        .with_stage("create_shipment", stages["create_shipment"], dependencies=("capture_payment",))
        .with_stage("issue_receipt", stages["issue_receipt"], dependencies=("capture_payment", "create_shipment"))
    )


def _order(ctx: SagaContext) -> Order:
    # The saga's input is the line of JSON that the order came in as.
    assert ctx.snapshot.input_text is not None
    return Order.model_validate_json(ctx.snapshot.input_text)
