"""Families of sagas for the tests to play with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from stageflow.api import Pipeline

from saga import (
    Compensation,
    CompensationContext,
    FailFast,
    LedgerError,
    MemoryLedger,
    Retry,
    SagaContext,
    SagaCoordinator,
    compensable,
    nested,
)
from tests.controlled import run
from tests.dying import Dying
from tests.world import CardDeclined, Script, World, conclude, scene

IMPATIENT = FailFast(compensation=Compensation(retry=Retry(attempts=1)))


def generations(
    scripts: dict[str, Script], kinds: dict[str, str] | None = None, policy: Any = None, pay_within: float | None = None
) -> tuple[World, Pipeline]:
    """trip (before -> book_hotel -> after) runs hotel (room -> charge_deposit -> confirm) runs bank (open -> pay), in one world."""
    shape = {
        "before": (),
        "room": ("before",),
        "open": ("room",),
        "pay": ("open",),
        "confirm": ("pay",),
        "after": ("confirm",),
        "aside": (),
    }
    world, flat = scene(shape, scripts, kinds)
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    stages["pay"].timeout = pay_within
    bank = Pipeline(name="bank").with_stage("open", stages["open"]).with_stage("pay", stages["pay"], dependencies=("open",))
    hotel = (
        Pipeline(name="hotel")
        .with_stage("room", stages["room"])
        .with_stage("charge_deposit", nested(bank, policy), dependencies=("room",))
        .with_stage("confirm", stages["confirm"], dependencies=("charge_deposit",))
    )
    trip = (
        Pipeline(name="trip")
        .with_stage("before", stages["before"])
        .with_stage("book_hotel", nested(hotel, policy), dependencies=("before",))
        .with_stage("after", stages["after"], dependencies=("book_hotel",))
        .with_stage("aside", stages["aside"])
    )
    return world, trip


PATH = "book_hotel/charge_deposit/pay"


def undo_each(pipelines: Sequence[Pipeline]) -> Callable[[CompensationContext], Awaitable[None]]:
    """Undoes the children, and looks at no report of them."""

    async def undo(ctx: CompensationContext) -> None:
        for child, pipeline in zip(await ctx.child_sagas(), pipelines, strict=True):
            await ctx.undo_saga(child.saga_id, pipeline)

    return undo


async def fail(_: Any) -> None:
    raise CardDeclined


def booking(outcome: str, *, second: str = "raise", probe: Any = None) -> tuple[World, Pipeline]:
    """book -> after: the first runs a room (take) and a meal (cook -> serve) as sagas, and then ends as it is told."""
    shape = {"take": (), "cook": (), "serve": ("cook",), "after": ()}
    scripts = {name: Script(undo_bears_repetition=True) for name in shape} | {"serve": Script(second)}
    world, flat = scene(shape, scripts, dict.fromkeys(shape, "probed"))
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    room = Pipeline(name="room").with_stage("take", stages["take"])
    meal = Pipeline(name="meal").with_stage("cook", stages["cook"]).with_stage("serve", stages["serve"], dependencies=("cook",))

    async def book(ctx: SagaContext) -> Any:
        for pipeline in (room, meal):
            report = await ctx.run_saga(pipeline)
        assert report.ok is (second == "ok")
        return await conclude("book", outcome)

    async def release(ctx: CompensationContext) -> None:
        for child in reversed(await ctx.child_sagas()):
            await ctx.undo_saga(child.saga_id, {"room": room, "meal": meal}[child.pipeline])

    trip = Pipeline(name="trip").with_stage("book", compensable(book, release, probe=probe))
    return world, trip.with_stage("after", stages["after"], dependencies=("book",))


async def nothing_landed(_: CompensationContext) -> None:
    """A probe that asks for what the stage has done itself, and not for its sagas."""


def with_another_hotel(
    *,
    undo_fails: int = 0,
    taxi: str = "probed",
    leaves: bool | None = None,
    taxi_does: str = "ok",
    taxi_undo_fails: int = 0,
    probe: Any = None,
) -> tuple[World, Pipeline]:
    """hotel -> taxi: the hotel's saga (room -> pay) fails, and another one (inn) stands in.

    Args:
        undo_fails: How often the room can't be undone; then it is left to the end.
        taxi: The kind of the taxi.
        leaves: Instead of that, whether a room alone is left to the end.
        taxi_does: What becomes of the taxi.
        taxi_undo_fails: How often the taxi can't be undone.
        probe: The hotel's.
    """
    shape: dict[str, tuple[str, ...]] = {"room": (), "pay": (), "inn": (), "taxi": ()}
    scripts = {name: Script(undo_bears_repetition=True) for name in shape} | {"pay": Script("raise")}
    scripts["room"].undo_fails = undo_fails
    scripts["taxi"] = Script(taxi_does, undo_fails=taxi_undo_fails, undo_bears_repetition=True)
    world, flat = scene(shape, scripts, dict.fromkeys(shape, "probed") | {"taxi": taxi})
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    hotel = Pipeline(name="hotel").with_stage("room", stages["room"]).with_stage("pay", stages["pay"], dependencies=("room",))
    other = Pipeline(name="other").with_stage("inn", stages["inn"])

    if leaves is not None:
        hotel = Pipeline(name="hotel").with_stage("room", stages["room"])

    async def book(ctx: SagaContext) -> None:
        if leaves is not False:
            (await ctx.run_saga(hotel, policy=IMPATIENT)).raise_for_status()
        raise CardDeclined

    async def book_other(ctx: SagaContext, _: Any) -> dict[str, Any]:
        return {"booked": (await ctx.run_saga(other)).saga_id}

    async def release(ctx: CompensationContext) -> None:
        for child in reversed(await ctx.child_sagas()):
            await ctx.undo_saga(child.saga_id, other if child.pipeline == "other" else hotel)

    trip = Pipeline(name="trip").with_stage("hotel", compensable(book, release, fallback=book_other, probe=probe, compensate_in_doubt=True))
    return world, trip.with_stage("taxi", stages["taxi"], dependencies=("hotel",))


def killed_while_it_ran(pipeline: Pipeline, ledger: Dying) -> Dying:
    """The ledger that saga `s` has left behind, whose process was killed."""
    with pytest.raises(LedgerError, match="killed"):
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))
    ledger.left = 10_000
    ledger.forget_owners()
    return ledger


def half_undone(*, idempotent: bool, ledger: MemoryLedger | None = None) -> tuple[World, SagaCoordinator, Pipeline]:
    """A stage that runs a hotel's room and breakfast as a saga; the breakfast has been undone, the room not."""
    shape = {"room": (), "breakfast": ()}
    world, hotel = scene(shape, {"room": Script(undo_fails=1)})

    async def book(ctx: SagaContext) -> dict[str, Any]:
        left = await ctx.child_sagas()
        report = await (ctx.resume_saga(left[-1].saga_id, hotel) if left else ctx.run_saga(hotel, policy=IMPATIENT))
        return {"id": report.saga_id}

    async def release(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            assert (await ctx.undo_saga(child.saga_id, hotel)).clean

    parent = Pipeline(name="trip").with_stage("book", compensable(book, release, idempotent=idempotent))
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger)
    run(coordinator.run(parent, saga_id="s"))
    stuck = run(coordinator.compensate("s", parent))
    assert list(stuck.stuck) == ["book", "book/room"]
    return world, coordinator, parent
