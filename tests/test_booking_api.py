"""The web service of the example, over a real socket: what it answers, and what a client that hangs up leaves behind."""

from __future__ import annotations

import queue
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from examples.booking_api.app import create_app
from examples.booking_api.bookings import DECLINED, NEEDS_APPROVAL, TAKES_NOTHING_BACK
from saga import SagaReport, SagaStatus, StageState
from saga.events import AnyEvent, SagaEnded, StageStarted

PATIENCE = 60
"""Seconds, for what takes milliseconds."""


class Service:
    """A server in a thread of its own, on a port that the system chose."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._events: queue.Queue[tuple[str, AnyEvent]] = queue.Queue()
        app = create_app(database, listeners=[lambda saga_id, event: self._events.put((saga_id, event))])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        # Bound and listening before the server is: a client that is early waits in its queue.
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self._socket.getsockname()[1]}", timeout=PATIENCE, trust_env=False)

    def stop(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        self._socket.close()
        assert not self._thread.is_alive()

    def post(self, hotel: str = "Bristol", card: str = "4242424242424242") -> httpx.Response:
        return self.client.post("/trips", json={"flight": "SK4455", "hotel": hotel, "card": card})

    def call_without_waiting(self, card: str) -> socket.socket:
        """Ask for a trip over a bare connection that is the caller's to hang up."""
        request = self.client.build_request("POST", "/trips", json={"flight": "SK4455", "hotel": "Bristol", "card": card})
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection = socket.create_connection(self._socket.getsockname(), PATIENCE)
        connection.sendall(f"POST /trips HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        return connection

    def wait_for(self, is_it: Callable[[AnyEvent], bool]) -> str:
        """The id of the saga of which such an event is told next."""
        while True:
            saga_id, event = self._events.get(timeout=PATIENCE)
            if is_it(event):
                return saga_id

    def booked(self) -> list[str]:
        with closing(sqlite3.connect(self._database)) as database:
            return [what for (what,) in database.execute("SELECT what FROM bookings ORDER BY what")]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "trips.sqlite")
    yield service
    service.stop()


def report_in(response: httpx.Response) -> SagaReport:
    return SagaReport.model_validate_json(response.content)


def is_charging(event: AnyEvent) -> bool:
    return isinstance(event, StageStarted) and event.stage == "charge_card"


def has_ended(event: AnyEvent) -> bool:
    return isinstance(event, SagaEnded)


def test_a_trip_that_is_booked_is_a_201_with_the_report(service: Service) -> None:
    response = service.post()

    assert response.status_code == 201
    assert report_in(response).status is SagaStatus.COMPLETED
    assert response.headers["content-type"] == "application/json"
    assert service.booked() == ["charge", "room", "seat"]
    assert service.client.get(response.headers["location"]).json() == response.json()


def test_a_trip_that_was_compensated_is_a_409_with_the_report(service: Service) -> None:
    response = service.post(card=DECLINED)

    assert response.status_code == 409
    report = report_in(response)
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.stage == "charge_card"
    assert set(report.undone) == {"book_seat", "book_room"}
    assert service.booked() == []


def test_a_trip_that_is_stuck_is_a_500_that_says_what_stands(service: Service) -> None:
    response = service.post(TAKES_NOTHING_BACK, DECLINED)

    assert response.status_code == 500
    assert set(report_in(response).stuck) == {"book_room"}
    assert service.booked() == ["room"]


def test_a_client_that_hangs_up_while_its_saga_runs_leaves_nothing_booked(service: Service) -> None:
    connection = service.call_without_waiting(NEEDS_APPROVAL)
    charging = service.wait_for(is_charging)
    assert service.booked() == ["room", "seat"]

    connection.close()

    assert service.wait_for(has_ended) == charging
    assert service.booked() == []
    report = report_in(service.client.get(f"/trips/{charging}"))
    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message == "the caller was cancelled"
    assert report.stages["charge_card"].state is StageState.FAILED
    assert report.stages["charge_card"].probed is False


def test_a_client_that_stays_gets_its_trip_when_the_payment_is_approved(service: Service) -> None:
    with service.call_without_waiting(NEEDS_APPROVAL) as connection:
        service.wait_for(is_charging)

        service.client.post(f"/cards/{NEEDS_APPROVAL}/approval").raise_for_status()

        assert connection.recv(12) == b"HTTP/1.1 201"
    assert service.booked() == ["charge", "room", "seat"]


def test_one_client_that_hangs_up_does_not_disturb_another(service: Service) -> None:
    leaving = service.call_without_waiting(NEEDS_APPROVAL)
    left = service.wait_for(is_charging)
    with service.call_without_waiting(NEEDS_APPROVAL) as staying:
        service.wait_for(is_charging)

        leaving.close()
        assert service.wait_for(has_ended) == left
        service.client.post(f"/cards/{NEEDS_APPROVAL}/approval").raise_for_status()

        assert staying.recv(12) == b"HTTP/1.1 201"
    assert service.booked() == ["charge", "room", "seat"]


def test_a_trip_that_nobody_knows_is_a_404(service: Service) -> None:
    response = service.client.get("/trips/nowhere")

    assert response.status_code == 404
    assert "'nowhere'" in response.json()["detail"]


def test_what_is_no_trip_is_refused_before_a_saga_begins(service: Service) -> None:
    assert service.client.post("/trips", json={"flight": "SK4455"}).status_code == 422
    assert service.booked() == []


def test_the_package_says_how_to_call_it(service: Service) -> None:
    import examples.booking_api

    paths: dict[str, Any] = service.client.get("/openapi.json").json()["paths"]
    assert examples.booking_api.__doc__ is not None
    for path in paths:
        assert f" {path} " in examples.booking_api.__doc__
