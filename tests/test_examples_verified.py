"""Our own examples, failed everywhere by our own kit."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from examples.booking_api.app import POLICY
from examples.booking_api.bookings import Bookings
from examples.booking_api.stages import Trip, book_trip
from examples.order_fulfilment.verify import verify_order
from saga.pytest_plugin import VerifySaga
from saga.testing import Fault


def test_an_order_comes_back_from_every_fault(tmp_path: Path) -> None:
    verification = asyncio.run(verify_order(tmp_path))

    assert verification.ok
    assert {(trial.stage, trial.fault) for trial in verification.trials} >= {
        (stage, fault) for stage in verification.stages for fault in Fault
    }


class Desk:
    """The bookings as a world, looked at with a connection of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bookings = Bookings(path)

    async def reset(self) -> None:
        await self.bookings.clear()

    def look(self) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as db:
            return sorted(db.execute("SELECT what, detail FROM bookings"))


def test_a_trip_comes_back_from_every_fault(tmp_path: Path, verify_saga: VerifySaga) -> None:
    desk = Desk(tmp_path / "bookings.sqlite")
    trip = Trip(flight="OSL-JFK", hotel="Ritz", card="4000")

    with closing(desk.bookings):
        assert verify_saga(book_trip(desk.bookings), POLICY, desk, input_text=trip.model_dump_json()).ok
