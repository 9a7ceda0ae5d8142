"""The web service: an endpoint that runs a saga, and a client's disconnect that undoes it."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
from fastapi import FastAPI, HTTPException, Request, Response

from examples.booking_api.bookings import Bookings
from examples.booking_api.stages import Trip, book_trip
from saga import Compensation, FailFast, Retry, SagaCoordinator, SagaNotFound, SagaReport, SagaStatus
from saga.listeners import Listener

T = TypeVar("T")

STATUS_CODES = {SagaStatus.COMPLETED: 201, SagaStatus.COMPENSATED: 409}
CLIENT_CLOSED_REQUEST = 499

# A stage that is cancelled midway is asked what it did, so nobody has to wait for a payment that its customer has walked away from.
POLICY = FailFast(in_flight="cancel", timeout=300, compensation=Compensation(timeout=10, retry=Retry(attempts=3, wait=0.05)))


def create_app(database: Path, listeners: Sequence[Listener] = ()) -> FastAPI:
    """Make the service over a database of bookings."""
    bookings = Bookings(database)
    pipeline = book_trip(bookings)
    coordinator = SagaCoordinator(POLICY, listeners=listeners)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        bookings.close()

    app = FastAPI(title="Trips", lifespan=lifespan)

    @app.post("/trips")
    async def book(trip: Trip, request: Request) -> Response:
        """Book a trip, wholly or not at all."""
        report = await while_connected(request, coordinator.run(pipeline, input_text=trip.model_dump_json()))
        if report is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return _answer(report, STATUS_CODES.get(report.status, 500))

    @app.post("/cards/{card}/approval", status_code=204)
    async def approve(card: str) -> None:
        """Approve what is charged to a card."""
        bookings.approve(card)

    @app.get("/trips/{saga_id}")
    async def look(saga_id: str) -> Response:
        """Tell what became of a trip."""
        try:
            return _answer(await coordinator.report(saga_id), 200)
        except SagaNotFound as missing:
            raise HTTPException(404, str(missing)) from missing

    return app


async def while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """Wait for some work, and cancel it when the client hangs up; None if it did.

    Nobody cancels an endpoint whose client is gone: the server only says so to whoever receives from the request. A saga whose
    caller is cancelled undoes what it did before it lets the cancel through, so when this returns nothing is left to be done.
    """
    result = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            # The body has been read, so all that comes is the disconnect.
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        result = await work
        group.cancel_scope.cancel()
    return result


def _answer(report: SagaReport, status_code: int) -> Response:
    return Response(report.model_dump_json(), status_code, {"Location": f"/trips/{report.saga_id}"}, "application/json")
