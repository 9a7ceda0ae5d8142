"""The stages of a trip: what each books, how that is taken back, and how to ask whether it was booked."""

from dataclasses import dataclass

from pydantic import BaseModel
from stageflow.api import Pipeline, StageOutput

from examples.booking_api.bookings import Bookings
from saga import CompensableStage, CompensationContext, SagaContext


class Trip(BaseModel):
    """What a customer asks for."""

    flight: str
    hotel: str
    card: str


@dataclass(frozen=True)
class TripStage(CompensableStage):
    """A stage that books something; whoever makes the booking knows it by the saga's key."""

    bookings: Bookings

    async def compensate(self, ctx: CompensationContext) -> None:
        """Take it back."""
        await self.bookings.cancel(ctx.forward_key)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Look for the booking: a client that hangs up may leave one in doubt."""
        return StageOutput.ok() if await self.bookings.has(ctx.forward_key) else None


class BookSeat(TripStage):
    """Books a seat."""

    async def execute(self, ctx: SagaContext) -> None:
        """Book it with the airline."""
        await self.bookings.book(ctx.idempotency_key, "seat", _trip(ctx).flight)


class BookRoom(TripStage):
    """Books a room."""

    async def execute(self, ctx: SagaContext) -> None:
        """Book it with the hotel."""
        await self.bookings.book(ctx.idempotency_key, "room", _trip(ctx).hotel)


class ChargeCard(TripStage):
    """Charges the customer's card; undone by a refund."""

    async def execute(self, ctx: SagaContext) -> None:
        """Charge it, which may take as long as the customer takes to approve."""
        await self.bookings.charge(ctx.idempotency_key, _trip(ctx).card)


def _trip(ctx: SagaContext) -> Trip:
    return Trip.model_validate_json(ctx.snapshot.input_text or "")


def book_trip(bookings: Bookings) -> Pipeline:
    """The pipeline of a trip."""
    return (
        Pipeline(name="book_trip")
        .with_stage("book_seat", BookSeat(bookings))
        .with_stage("book_room", BookRoom(bookings))
        .with_stage("charge_card", ChargeCard(bookings), dependencies=("book_seat", "book_room"))
    )
