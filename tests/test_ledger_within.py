"""What becomes of a saga whose ledger fails, or whose lease is lost, in a saga that one of its stages runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from stageflow.api import Pipeline

from saga import (
    Compensation,
    CompensationContext,
    FailFast,
    LedgerCorrupt,
    LedgerError,
    MemoryLedger,
    MisuseError,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    SagaUnrecorded,
    compensable,
    nested,
)
from saga.events import AnyEvent, CompensationStarted, SagaEnded, SagaStarted, SagaTurnedBack, StageCompleted, StageSettled, StageStarted
from saga.ledger import Entry
from tests.controlled import elapse, run
from tests.world import Script, World, nothing, scene

IMPATIENT = FailFast(compensation=Compensation(retry=Retry(attempts=1)))
SHAPE = {"flight": (), "deposit": ("flight",), "room": ("deposit",), "after": ("room",)}


class NoRoom(MemoryLedger):
    """Can't write one kind of event of one saga; from then on nothing, or, if it is back at once, everything."""

    def __init__(self, saga_id: str, kind: type[AnyEvent], *, once: bool) -> None:
        super().__init__()
        self.saga_id, self.kind, self.once = saga_id, kind, once
        self.is_full = False

    async def create(self, saga_id: str, owner: str, events: Any, **how: Any) -> int:
        self._refuse(saga_id, events)
        return await super().create(saga_id, owner, events, **how)

    async def append(self, saga_id: str, events: Any, **how: Any) -> None:
        self._refuse(saga_id, events)
        await super().append(saga_id, events, **how)

    def _refuse(self, saga_id: str, events: Any) -> None:
        if self.is_full or (saga_id == self.saga_id and any(isinstance(event, self.kind) for event in events)):
            if self.once:
                self.saga_id = ""
            else:
                self.is_full = True
            raise LedgerError("no room left")


def trip(scripts: dict[str, Script], kind: str = "compensable") -> tuple[World, Pipeline]:
    """flight -> hotel (deposit -> room) -> after, in one world."""
    world, flat = scene(SHAPE, scripts, dict.fromkeys(SHAPE, kind))
    stages: dict[str, Any] = {name: spec.runner for name, spec in flat.stages.items()}
    hotel = Pipeline(name="hotel").with_stage("deposit", stages["deposit"]).with_stage("room", stages["room"], dependencies=("deposit",))
    pipeline = (
        Pipeline(name="trip")
        .with_stage("flight", stages["flight"])
        .with_stage("hotel", nested(hotel, IMPATIENT), dependencies=("flight",))
        .with_stage("after", stages["after"], dependencies=("hotel",))
    )
    return world, pipeline


@pytest.mark.parametrize(
    ("kind", "in_effect", "unknown"),
    [
        (SagaStarted, ("flight",), ("hotel",)),
        (StageStarted, ("flight",), ("hotel",)),
        (StageCompleted, ("flight", "hotel/deposit"), ("hotel",)),
        (SagaEnded, ("flight", "hotel/deposit", "hotel/room"), ("hotel",)),
    ],
)
def test_when_the_ledger_fails_within_the_error_names_what_is_in_effect_there(
    kind: type[AnyEvent], in_effect: tuple[str, ...], unknown: tuple[str, ...]
) -> None:
    """Promise 5: also of an error nobody may claim that nothing stands."""
    world, pipeline = trip({})
    ledger = NoRoom("s/hotel", kind, once=False)

    with pytest.raises(SagaUnrecorded) as failed:
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))

    assert (failed.value.in_effect, failed.value.unknown) == (in_effect, unknown)
    assert {name.rpartition("/")[2] for name in (*in_effect, *unknown)} >= world.standing.keys()
    assert str(failed.value).startswith("saga s stopped, because its ledger failed: no room left. Nothing more was started.")
    assert str(failed.value).count("coordinator.resume") == 1


def test_when_the_ledger_fails_the_error_names_what_is_unknown_within() -> None:
    """Promise 5: room has failed and has not been asked yet; what is to undo deposit has not begun."""
    world, pipeline = trip({"room": Script("raise", lands=True)}, "probed")

    with pytest.raises(SagaUnrecorded) as failed:
        run(SagaCoordinator(ledger=NoRoom("s/hotel", SagaTurnedBack, once=False)).run(pipeline, saga_id="s"))

    assert failed.value.in_effect == ("flight", "hotel/deposit")
    assert failed.value.unknown == ("hotel", "hotel/room")
    assert world.standing.keys() == {"flight", "deposit", "room"}


def test_when_the_ledger_fails_two_sagas_of_a_stage_the_error_tells_of_the_first_and_of_what_is_in_effect_in_both() -> None:
    """Promise 9. The stage asks for both at once, and waits until both have failed."""

    class Breaking(MemoryLedger):
        async def append(self, saga_id: str, events: Any, **how: Any) -> None:
            if saga_id != "s" and isinstance(events[-1], SagaEnded):
                raise LedgerError(f"no room for {events[-1].status} {saga_id}")
            await super().append(saga_id, events, **how)

    caught: list[BaseException | SagaReport] = []
    turn = asyncio.Event()

    async def goes_first(_: SagaContext) -> None:
        turn.set()

    async def goes_second(_: SagaContext) -> None:
        await turn.wait()
        await elapse(1.0)

    async def book(ctx: SagaContext) -> None:
        hotel = Pipeline(name="hotel").with_stage("room", compensable(goes_first, nothing))
        car = Pipeline(name="car").with_stage("car", compensable(goes_second, nothing))
        caught.extend(await asyncio.gather(ctx.run_saga(car), ctx.run_saga(hotel), return_exceptions=True))

    with pytest.raises(SagaUnrecorded) as failed:
        run(SagaCoordinator(ledger=Breaking()).run(Pipeline().with_stage("book", compensable(book, nothing)), saga_id="s"))

    of_car, of_hotel = caught
    assert isinstance(of_car, SagaUnrecorded)
    assert isinstance(of_hotel, SagaUnrecorded)
    assert failed.value.__cause__ is of_hotel
    assert failed.value.in_effect == ("book/room", "book/car")


def test_when_the_ledger_can_not_note_that_an_undo_starts_the_effect_is_known_to_stand() -> None:
    """What was to undo it waited for that."""
    world, pipeline = scene({"a": (), "b": ("a",)}, {"b": Script("raise")})

    with pytest.raises(SagaUnrecorded) as failed:
        run(SagaCoordinator(ledger=NoRoom("s", CompensationStarted, once=False)).run(pipeline, saga_id="s"))

    assert (failed.value.in_effect, failed.value.unknown) == (("a",), ())
    assert world.standing.keys() == {"a"}


@pytest.mark.parametrize("kind", [SagaTurnedBack, CompensationStarted, SagaEnded])
def test_when_the_ledger_fails_while_a_child_is_undone_the_saga_goes_on_when_it_is_back(kind: type[AnyEvent]) -> None:
    """A stage is stuck when its compensation has failed, not when a disk was full for a moment."""
    world, pipeline = trip({"after": Script("raise")}, "probed")
    ledger = NoRoom("", kind, once=True)
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger, listeners=[lambda saga_id, event: begin(ledger, saga_id, event)])

    with pytest.raises(SagaUnrecorded) as failed:
        run(coordinator.run(pipeline, saga_id="s"))
    assert {name.rpartition("/")[2] for name in (*failed.value.in_effect, *failed.value.unknown)} >= world.standing.keys()
    recovery = run(SagaCoordinator(ledger=ledger).recover(pipeline))

    assert {saga_id: report.status for saga_id, report in recovery.reports.items()} == {"s": SagaStatus.COMPENSATED}, str(recovery)
    assert world.standing == {}
    assert world.refusals == []


def begin(ledger: NoRoom, saga_id: str, event: AnyEvent) -> None:
    if saga_id == "s" and isinstance(event, CompensationStarted) and event.stage == "hotel":
        ledger.saga_id = "s/hotel"


class Dropped(MemoryLedger):
    """The line drops once, at the n-th call of a method; its driver has errors of its own."""

    def __init__(self, method: str, number: int = 1) -> None:
        super().__init__()
        self.method, self.left = method, number

    def _call(self, method: str) -> None:
        self.left -= method == self.method
        if method == self.method and self.left == 0:
            raise ConnectionError("the line dropped")

    async def acquire(self, *args: Any, **how: Any) -> int:
        self._call("acquire")
        return await super().acquire(*args, **how)

    async def release(self, *args: Any) -> None:
        self._call("release")
        await super().release(*args)

    async def append(self, *args: Any, **how: Any) -> None:
        self._call("append")
        await super().append(*args, **how)

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        self._call("read")
        return await super().read(saga_id)

    async def list(self, **which: Any) -> Sequence[Entry]:
        self._call("list")
        return await super().list(**which)


@pytest.mark.parametrize("method", ["read", "list", "acquire"])
def test_whatever_a_ledgers_driver_raises_is_the_ledgers_failure_and_the_saga_goes_on_when_it_is_back(method: str) -> None:
    """It was taken for the stage's, whose compensation was then called stuck; or the caller got it, and no word of what was in effect."""
    number, is_reached = 0, True
    while is_reached:
        number += 1
        world, pipeline = trip({"after": Script("raise")}, "probed")
        ledger = Dropped(method, number)
        try:
            report: SagaReport | None = run(SagaCoordinator(IMPATIENT, ledger=ledger).run(pipeline, saga_id="s"))
        except LedgerError:
            report = None
        is_reached, ledger.left = ledger.left <= 0, 0
        recovery = run(SagaCoordinator(ledger=ledger).recover(pipeline))

        assert (report is None) is is_reached, (number, report)
        assert {report.status for report in recovery.reports.values()} <= {SagaStatus.COMPENSATED}, str(recovery)
        assert not recovery.failed
        assert world.standing == {}
        assert world.refusals == []
    assert number > 1


@pytest.mark.parametrize(
    ("method", "failed_to"),
    [
        ("read", "read saga s"),
        ("list", "list its sagas"),
        ("acquire", "take the lease of saga s"),
        ("append", "record StageSettled and SagaEnded of saga s"),
    ],
)
def test_a_word_that_the_ledgers_driver_did_not_take_is_told_as_the_ledgers_failure_and_can_be_said_again(
    method: str, failed_to: str
) -> None:
    _, pipeline = trip({"after": Script("raise"), "flight": Script(undo_fails=9)})
    ledger = Dropped(method, 0)
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger)

    async def say_twice() -> SagaReport:
        assert [*(await coordinator.run(pipeline, saga_id="s")).stuck] == ["flight"]
        ledger.left = 1
        with pytest.raises(LedgerError, match=f"the ledger failed to {failed_to}: ConnectionError: the line dropped"):
            await coordinator.settle("s", "flight", "undone", "by hand")
        return await coordinator.settle("s", "flight", "undone", "by hand")

    assert run(say_twice()).status is SagaStatus.COMPENSATED


def test_a_lease_that_the_ledgers_driver_does_not_take_back_hides_no_report() -> None:
    _, pipeline = trip({})
    ledger = Dropped("release")
    coordinator = SagaCoordinator(ledger=ledger)

    async def nothing_to_do() -> tuple[SagaReport, SagaReport]:
        return await coordinator.run(pipeline, saga_id="s"), await coordinator.resume("s", pipeline)

    first, again = run(nothing_to_do())

    assert ledger.left == 0
    assert again == first


def test_a_stage_that_swallows_the_ledgers_error_of_its_child_has_not_completed() -> None:
    _, room = scene({"room": ()})

    async def book(ctx: SagaContext) -> None:
        with pytest.raises(LedgerError):
            await ctx.run_saga(room)

    async def release(ctx: CompensationContext) -> None:
        raise AssertionError(ctx)

    pipeline = Pipeline().with_stage("book", compensable(book, release))

    with pytest.raises(SagaUnrecorded) as failed:
        run(SagaCoordinator(ledger=NoRoom("s/book", StageCompleted, once=True)).run(pipeline, saga_id="s"))

    assert (failed.value.in_effect, failed.value.unknown) == (("book/room",), ("book",))


@pytest.mark.parametrize("verdict", ["undone", "kept"])
def test_a_word_on_a_stage_within_that_did_not_get_to_the_saga_above_is_said_again(verdict: str) -> None:
    world, pipeline = trip({"after": Script("raise"), "room": Script(undo_fails=9)})
    ledger = NoRoom("", StageSettled, once=True)
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger)

    async def play() -> SagaReport:
        stuck = await coordinator.run(pipeline, saga_id="s")
        assert [*stuck.stuck] == ["hotel", "hotel/room"]
        if verdict == "undone":
            world.undo("room")
        ledger.saga_id = "s"
        with pytest.raises(LedgerError):
            await coordinator.settle("s", "hotel/room", verdict, "they told me")
        with pytest.raises(MisuseError):
            await coordinator.settle("s", "hotel/room", "kept" if verdict == "undone" else "undone", "they told me")
        await coordinator.settle("s", "hotel/room", verdict, "they told me")
        with pytest.raises(MisuseError, match=f"got one that is {verdict}"):
            await coordinator.settle("s", "hotel/room", verdict, "they told me")
        return await coordinator.resume("s", pipeline)

    report = run(play())

    assert report.status is (SagaStatus.COMPENSATED if verdict == "undone" else SagaStatus.HALTED)
    assert report.clean
    assert set(world.standing) == (set() if verdict == "undone" else {"flight", "deposit", "room"})


@pytest.mark.parametrize("is_back", [True, False])
def test_what_other_stages_have_come_to_is_recorded_all_the_same(is_back: bool) -> None:
    """Or they would be in doubt, though the ledger would take what is known of them; if it does not, the first error is told."""
    has_paid = asyncio.Event()

    class NoRoomForTheChild(MemoryLedger):
        durable = True
        is_full = False

        async def append(self, saga_id: str, events: Any, **how: Any) -> None:
            if self.is_full or (saga_id == "s/book" and isinstance(events[-1], SagaEnded)):
                self.is_full = not is_back
                raise LedgerError("no room left")
            await super().append(saga_id, events, **how)

    async def pay(_: SagaContext) -> None:
        has_paid.set()

    async def room(_: SagaContext) -> None:
        await has_paid.wait()

    hotel = Pipeline(name="hotel").with_stage("room", compensable(room, nothing))
    pipeline = Pipeline().with_stage("book", nested(hotel)).with_stage("pay", compensable(pay, nothing))
    ledger = NoRoomForTheChild()

    with pytest.raises(SagaUnrecorded) as failed:
        run(SagaCoordinator(ledger=ledger).run(pipeline, saga_id="s"))

    assert {*failed.value.in_effect, *failed.value.unknown} == {"book", "book/room", "pay"}
    assert [event.stage for event in run(ledger.read("s")) if isinstance(event, StageCompleted)] == ["pay"] * is_back
    assert {entry.saga_id: entry.owner for entry in run(ledger.list())} == {"s": None, "s/book": None}


class Damaged(MemoryLedger):
    """Can't read some sagas; or can't write, as if its process had been killed."""

    damaged = ""
    dies = False

    async def append(self, saga_id: str, events: Any, **how: Any) -> None:
        if self.dies:
            for saga in self._sagas.values():
                saga.owner = None
            raise OSError("killed")
        await super().append(saga_id, events, **how)

    async def read(self, saga_id: str) -> Sequence[AnyEvent]:
        if saga_id == self.damaged:
            raise LedgerCorrupt(f"saga {saga_id} is damaged")
        return await super().read(saga_id)


def test_a_child_that_cannot_be_read_fails_its_stage_and_holds_up_nothing_else() -> None:
    """To read it again changes nothing: a person has to see to it."""
    world, pipeline = trip({"after": Script("raise")})
    ledger = Damaged()

    def damage(saga_id: str, event: AnyEvent) -> None:
        if saga_id == "s/hotel" and isinstance(event, SagaEnded):
            ledger.damaged = "s/hotel"

    report = run(SagaCoordinator(IMPATIENT, ledger=ledger, listeners=[damage]).run(pipeline, saga_id="s"))

    assert report.status is SagaStatus.STUCK
    assert [*report.stuck] == ["hotel"]
    assert world.standing.keys() == {"flight", "deposit", "room"}


def test_a_child_that_cannot_be_read_is_not_gone_on_with_and_nothing_beneath_it_is_undone() -> None:
    """Promise 5: nobody knows what of the child stands."""
    world, pipeline = trip({})
    ledger = Damaged()

    def die(saga_id: str, event: AnyEvent) -> None:
        if saga_id == "s/hotel" and isinstance(event, SagaEnded):
            ledger.dies = True

    with pytest.raises(LedgerError):
        run(SagaCoordinator(IMPATIENT, ledger=ledger, listeners=[die]).run(pipeline, saga_id="s"))
    ledger.dies, ledger.damaged = False, "s/hotel"

    report = run(SagaCoordinator(ledger=ledger).resume("s", pipeline))

    assert report.status is SagaStatus.STUCK
    assert "saga s/hotel is damaged" in str(report)
    assert world.standing.keys() == {"flight", "deposit", "room"}


def test_a_child_that_cannot_be_read_hides_nothing_of_its_parent_which_is_not_clean() -> None:
    """Promise 5: nobody knows what of the child stands."""
    _, pipeline = trip({})
    ledger = Damaged()
    coordinator = SagaCoordinator(ledger=ledger)
    top = Pipeline(name="top").with_stage("trip", nested(pipeline), "work")
    run(coordinator.run(top, saga_id="s"))
    ledger.damaged = "s/trip/hotel"

    report = run(coordinator.report("s"))

    assert report.status is SagaStatus.COMPLETED
    assert not report.clean
    assert report.unread == {"s/trip/hotel": "saga s/trip/hotel is damaged"}
    assert SagaReport.model_validate_json(report.model_dump_json()).unread == report.unread
    (within,) = report.stages["trip"].children
    assert "its saga s/trip/hotel can't be read" in str(within)
    assert "trouble within" in within.to_svg()
    for text in (str(report), str(within)):
        assert text.splitlines()[-1] == "Not known what stands of saga s/trip/hotel: saga s/trip/hotel is damaged"


def test_a_saga_above_that_cannot_be_read_hides_no_report_of_those_within() -> None:
    """What they did is what a person has to know who puts right by hand what that saga did."""
    _, pipeline = trip({"room": Script("raise")})
    ledger = Damaged()
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger)
    run(coordinator.run(Pipeline(name="top").with_stage("trip", nested(pipeline)), saga_id="s"))
    before = {saga_id: run(coordinator.report(saga_id)) for saga_id in ("s/trip", "s/trip/hotel")}
    ledger.damaged = "s"

    after = {saga_id: run(coordinator.report(saga_id)) for saga_id in before}

    assert after == before


def test_beside_a_saga_that_cannot_be_read_another_one_of_its_stage_keeps_its_path() -> None:
    async def refuse(_: CompensationContext) -> None:
        raise ConnectionError("no line")

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(room)
        await ctx.run_saga(room)

    async def cancel(ctx: CompensationContext) -> None:
        for child in await ctx.child_sagas():
            await ctx.undo_saga(child.saga_id, room)

    room = Pipeline(name="room").with_stage("deposit", compensable(nothing, refuse), "work")
    pipeline = Pipeline(name="trip").with_stage("hotel", compensable(book, cancel), "work")
    ledger = Damaged()
    coordinator = SagaCoordinator(IMPATIENT, ledger=ledger)
    run(coordinator.run(pipeline, saga_id="s"))
    run(coordinator.compensate("s", pipeline))
    ledger.damaged = "s/hotel"

    report = run(coordinator.report("s"))

    assert report.unread.keys() == {"s/hotel"}
    assert {*report.stuck} == {"hotel", "hotel#1.2/deposit"}


@pytest.mark.parametrize("verdict", ["undone", "kept"])
def test_what_a_person_says_of_a_child_that_cannot_be_read_is_known(verdict: str) -> None:
    _, pipeline = trip({})
    ledger = Damaged()
    coordinator = SagaCoordinator(ledger=ledger)
    run(coordinator.run(pipeline, saga_id="s"))
    ledger.damaged = "s/hotel"
    stuck = run(coordinator.compensate("s", pipeline))
    assert [*stuck.stuck] == ["hotel"]
    assert [*stuck.unread] == ["s/hotel"]

    report = run(coordinator.settle("s", "hotel", verdict, "I looked"))

    assert report.stages["hotel"].state.value == verdict
    assert (report.stuck, report.unread) == ({}, {})


@pytest.mark.parametrize("error", [LedgerError, LedgerCorrupt])
def test_a_saga_that_has_ended_is_not_called_unrecorded_when_its_children_cannot_be_read(error: type[LedgerError]) -> None:
    _, pipeline = trip({})

    class Unread(MemoryLedger):
        has_ended = False

        async def list(self, **how: Any) -> Sequence[Entry]:
            if self.has_ended:
                raise error("no line")
            return await super().list(**how)

    def note(saga_id: str, event: AnyEvent) -> None:
        ledger.has_ended = saga_id == "s" and isinstance(event, SagaEnded)

    ledger = Unread()
    coordinator = SagaCoordinator(ledger=ledger, listeners=[note])

    with pytest.raises(error) as failed:
        run(coordinator.run(pipeline, saga_id="s"))

    assert type(failed.value) is error
    assert str(failed.value).startswith("saga s is completed, which is recorded; but the sagas that its stages ran can't be read: no line.")
    ledger.has_ended = False
    assert run(coordinator.report("s")).status is SagaStatus.COMPLETED
    assert run(ledger.list())[0].owner is None


def halted_within() -> tuple[World, World, MemoryLedger, SagaCoordinator, Pipeline]:
    """flight beside hotel (deposit -> room), which has halted at the room."""
    halting = IMPATIENT.model_copy(update={"on_failure": "halt"})
    hotel_world, hotel = scene({"deposit": (), "room": ("deposit",)}, {"room": Script("raise", then=("ok",))})
    world, pipeline = scene({"flight": ()})
    pipeline = pipeline.with_stage("hotel", nested(hotel, halting))
    ledger = MemoryLedger()
    coordinator = SagaCoordinator(halting, ledger=ledger)
    assert run(coordinator.run(pipeline, saga_id="s")).status is SagaStatus.HALTED
    return world, hotel_world, ledger, coordinator, pipeline


def test_a_child_that_somebody_else_holds_is_stuck_and_holds_up_nothing_else() -> None:
    """The lease of the saga that runs it is as good as before."""
    world, hotel_world, ledger, coordinator, pipeline = halted_within()
    token = run(ledger.acquire("s/hotel", "somebody else"))

    held = run(coordinator.compensate("s", pipeline))

    assert held.status is SagaStatus.STUCK
    assert "saga s/hotel is held by somebody else" in str(held)
    assert (world.standing, hotel_world.standing) == ({}, {"deposit": 1})
    run(ledger.release("s/hotel", token))
    run(coordinator.settle("s", "hotel", "retry", "they have let go of it"))
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPENSATED
    assert hotel_world.standing == {}


def test_a_child_that_somebody_else_holds_leaves_its_stage_in_doubt_and_goes_on_later() -> None:
    world, hotel_world, ledger, coordinator, pipeline = halted_within()
    token = run(ledger.acquire("s/hotel", "somebody else"))

    held = run(coordinator.resume("s", pipeline))

    assert held.status is SagaStatus.HALTED
    assert [*held.in_doubt] == ["hotel"]
    assert "saga s/hotel is held by somebody else" in str(held)
    run(ledger.release("s/hotel", token))
    assert run(coordinator.resume("s", pipeline)).status is SagaStatus.COMPLETED
    assert (world.standing, hotel_world.standing) == ({"flight": 1}, {"deposit": 1, "room": 1})
