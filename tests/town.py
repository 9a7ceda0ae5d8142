"""A town in which one can book things: stages as they should be, and stages with one defect, for the kit to pass and to find."""

from __future__ import annotations

from collections import Counter

from stageflow.api import StageOutput

from saga import CompensableStage, CompensationContext, Failure, PivotStage, SagaContext
from tests.controlled import elapse


class Town:
    """A world of bookings: by the keys of the requests that made them."""

    def __init__(self) -> None:
        self.bookings: dict[str, str] = {}
        self.resets = 0

    def reset(self) -> None:
        self.bookings.clear()
        self.resets += 1

    def look(self) -> Counter[str]:
        return Counter(self.bookings.values())


class Silent(CompensableStage):
    """It bears repetition and can be undone by its key, but nobody can ask it."""

    def __init__(self, town: Town, name: str) -> None:
        self.town, self.name = town, name

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.town.bookings[ctx.idempotency_key] = self.name
        return StageOutput.ok(key=ctx.idempotency_key)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.town.bookings.pop(ctx.forward_key, None)


class Booking(Silent):
    """As it should be: it can be asked, too."""

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(key=ctx.forward_key) if ctx.forward_key in self.town.bookings else None


class Sale(PivotStage):
    def __init__(self, town: Town, name: str) -> None:
        self.town, self.name = town, name

    execute = Booking.execute
    probe = Booking.probe


class Forgetful(Booking):
    """Undoes nothing."""

    async def compensate(self, ctx: CompensationContext) -> None: ...


class Literal(Silent):
    """Refuses to undo what is undone. If it could be asked, its probe would make up for that."""

    async def compensate(self, ctx: CompensationContext) -> None:
        del self.town.bookings[ctx.forward_key]


class Eager(Booking):
    """Books again at every attempt, whatever its key."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        earlier = [key for key in self.town.bookings if key.startswith(f"{ctx.idempotency_key} ")]
        key = f"{ctx.idempotency_key} {len(earlier)}"
        self.town.bookings[key] = self.name
        return StageOutput.ok(key=key)

    async def compensate(self, ctx: CompensationContext) -> None:
        for key in [key for key in self.town.bookings if key.startswith(f"{ctx.forward_key} ")]:
            del self.town.bookings[key]

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        found = [key for key in self.town.bookings if key.startswith(f"{ctx.forward_key} ")]
        return StageOutput.ok(key=found[0]) if found else None


class Lying(Booking):
    """Says that nothing landed."""

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return None


class Boasting(Booking):
    """Says that it landed, whatever it did."""

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(key=ctx.forward_key)


class Indebted(Booking):
    """Takes something else when its own booking is gone."""

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.town.bookings.pop(ctx.forward_key, None) is None:
            self.town.bookings["debt"] = "debt"


class Recording(Silent):
    """Books two things, and notes each."""

    async def execute(self, ctx: SagaContext) -> None:  # type: ignore[override] # a recorded effect needs no output
        for part in ("there", "back"):
            self.town.bookings[f"{ctx.idempotency_key} {part}"] = self.name
            await ctx.record(part)

    async def compensate(self, ctx: CompensationContext) -> None:
        for part in ("there", "back"):
            self.town.bookings.pop(f"{ctx.forward_key} {part}", None)

    compensate_in_doubt = True


class Unasked(Silent):
    """It lets the others begin before it has its effect."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        await elapse(1)
        output = await super().execute(ctx)
        await elapse(1)
        return output


class WithFallback(Booking):
    async def fallback(self, ctx: SagaContext, failure: Failure) -> StageOutput:
        self.town.bookings[f"{ctx.idempotency_key} instead"] = f"{self.name} instead"
        return StageOutput.ok(instead=True)
