"""What a durable ledger can't keep, be it too large, fails whoever gave it: what it did is undone, and the saga comes to its end."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from stageflow import BaseInterceptor, InterceptorResult
from stageflow.api import Pipeline, PipelineContext, StageContext, StageOutput
from stageflow.core import StageArtifact
from stageflow.stages.result import StageResult

from saga import (
    CompensableStage,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Ledger,
    MemoryLedger,
    MisuseError,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    SagaUnrecorded,
    StageState,
    compensable,
)
from saga.encoding import Opaque
from saga.events import AnyEvent, EffectRecorded, SagaStarted, StageCompleted, StageFailed, StageProbed, StageSkipped, event_to_json
from saga.failures import Failure, FailureKind
from saga.ledgers.sqlite import SQLiteLedger
from tests.controlled import elapse, run
from tests.slow import SlowDisk
from tests.world import World

S = StageState
MOST = 4_000
LONG = "x" * 5_000


class Book(CompensableStage):
    """Books a seat in a world, and says more of it than a ledger takes."""

    timeout = 5.0

    def __init__(self, **how: Any) -> None:
        self.world = World({"book": ()})
        self.how = how
        self.told: list[Any] = []

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.world.land("book")
        if "records" in self.how:
            await ctx.record(self.how["records"])
        if self.how.get("late"):
            await elapse(60)
        output: StageOutput = self.how.get("gives", StageOutput.ok(seat="14A"))
        return output

    async def compensate(self, ctx: CompensationContext) -> None:
        self.told.append(ctx.effects or (ctx.output and ctx.output.data))
        self.world.undo("book")


class Probed(Book):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(seat="14A", ticket=LONG)


def played(stage: CompensableStage, ledger: Ledger, **how: Any) -> tuple[SagaReport, Sequence[AnyEvent]]:
    """book, by a coordinator with that ledger; and what is in the ledger then."""
    pipeline = Pipeline().with_stage("book", stage)

    async def main() -> tuple[SagaReport, Sequence[AnyEvent]]:
        report = await SagaCoordinator(how.get("policy"), ledger=ledger).run(pipeline, saga_id="s")
        events = await ledger.read("s")
        await ledger.close()
        return report, events

    return asyncio.run(main()) if isinstance(ledger, SQLiteLedger) else run(main())


def slow_disk() -> SlowDisk:
    ledger = SlowDisk()
    ledger.max_event_bytes = MOST
    return ledger


def test_an_output_that_is_too_large_fails_its_stage_which_is_undone_by_what_was_small_enough(tmp_path: Path) -> None:
    stage = Book(gives=StageOutput.ok(seat="14A", ticket=LONG, price=120))

    report, events = played(stage, SQLiteLedger(tmp_path / "sagas.db", max_event_bytes=MOST))

    assert report.status is SagaStatus.COMPENSATED
    assert stage.world.standing == {}
    assert stage.told == [{"seat": "14A", "price": 120, "ticket": Opaque("str", "5,013 bytes of JSON, which were left out")}]
    assert report.cause is not None
    assert (report.cause.stage, report.cause.kind) == ("book", FailureKind.CONTRACT)
    expected = "expected at most 4,000 bytes of JSON in one event (max_event_bytes), got 5,1"
    assert report.cause.message.startswith(expected)
    assert report.cause.message.endswith("most of them in data['ticket']: the ledger can't keep it")
    assert SagaReport.from_events(events) == report


def test_what_is_too_large_beside_the_data_of_an_output_is_left_out_of_the_ledger() -> None:
    gives = replace(StageOutput.ok(seat="14A"), artifacts=[StageArtifact("ticket", {"scan": LONG})])
    stage = Book(gives=gives)

    report, events = played(stage, slow_disk())

    assert report.status is SagaStatus.COMPENSATED
    assert stage.world.standing == {}
    assert stage.told == [{"seat": "14A"}]
    assert max(len(event_to_json(event)) for event in events if isinstance(event, StageCompleted)) <= MOST


def test_an_output_of_just_the_size_that_the_ledger_takes_is_kept_whole(tmp_path: Path) -> None:
    files = (tmp_path / str(number) for number in count())

    def is_refused(characters: int) -> bool:
        stage = Book(gives=StageOutput.ok(ticket="x" * characters))
        report, _ = played(stage, SQLiteLedger(next(files), max_event_bytes=MOST))
        return report.status is SagaStatus.COMPENSATED

    first = bisect_left(range(MOST), 1, key=is_refused)

    assert MOST - 300 < first < MOST
    assert [is_refused(size) for size in range(first - 3, first + 3)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("effect", "told", "where"),
    [
        (
            {"seat": "14A", "ticket": LONG},
            {"seat": "14A", "ticket": Opaque("str", "5,013 bytes of JSON, which were left out")},
            "effect['ticket']",
        ),
        ([LONG], Opaque("list", "5,004 bytes of JSON, which were left out"), "effect"),
        (dict.fromkeys(range(2_000), "x"), None, "effect[1999]"),
    ],
    ids=["a large part", "not a dict", "many small parts"],
)
def test_an_effect_that_is_too_large_fails_its_stage_which_is_undone_by_what_was_small_enough(effect: Any, told: Any, where: str) -> None:
    stage = Book(records=effect)

    report, _ = played(stage, slow_disk())

    assert report.status is SagaStatus.COMPENSATED
    assert stage.world.standing == {}
    ((kept,),) = stage.told
    if told is not None:
        assert kept == told
    else:
        assert kept
        assert kept.items() < effect.items()
    assert report.cause is not None
    assert report.cause.type == "saga.errors.NotStorable"
    assert report.cause.message.endswith(f"most of them in {where}")


def test_an_output_that_is_too_large_for_its_artifacts_keeps_its_data() -> None:
    output = StageOutput.ok(seat="14A")
    output = replace(output, artifacts=[StageArtifact("ticket", {"text": LONG})])
    stage = Book(gives=output)

    report, _ = played(stage, slow_disk())

    assert report.status is SagaStatus.COMPENSATED
    assert stage.told == [{"seat": "14A"}]


def test_an_output_that_is_too_large_beside_what_has_no_encoding_is_undone_too() -> None:
    stage = Book(gives=StageOutput.ok(seat="14A", ticket=LONG, line=object()))

    report, _ = played(stage, slow_disk())

    assert report.status is SagaStatus.COMPENSATED
    ((told),) = stage.told
    assert told["seat"] == "14A"
    assert {told["ticket"].type, told["line"].type} == {"str", "object"}


def test_what_is_beside_a_failure_may_be_too_large() -> None:
    report, events = played(Book(gives=StageOutput.fail("declined", data={"why": LONG})), slow_disk())

    assert report.cause is not None
    assert report.cause.message == "declined"
    (failed,) = [event for event in events if isinstance(event, StageFailed)]
    assert failed.output is not None
    assert failed.output.data["why"] == Opaque("str", "5,010 bytes of JSON, which were left out")


def test_a_probe_that_gives_too_much_has_failed() -> None:
    stage = Probed(late=True)

    report, events = played(stage, slow_disk())

    assert (report.status, stage.told) == (SagaStatus.STUCK, [])
    probed = [event for event in events if isinstance(event, StageProbed)]
    assert {event.landed for event in probed} == {None}
    assert "most of them in data['ticket']" in str(probed[-1].failure)


@pytest.mark.parametrize("instead", [{"ticket": LONG}, {"line": object()}], ids=["too large", "no encoding"])
def test_a_fallback_that_gives_what_cannot_be_stored_has_failed(instead: dict[str, Any]) -> None:
    class Plan(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.fail("no seat")

        async def compensate(self, ctx: CompensationContext) -> None:
            raise AssertionError

        async def fallback(self, ctx: SagaContext, failure: Failure) -> StageOutput:
            return StageOutput.ok(instead)

    report, _ = played(Plan(), slow_disk(), policy=ContinueWithFallback())

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["book"].state is S.FAILED
    assert report.failures[-1].type == "saga.errors.NotStorable"
    assert played(Plan(), MemoryLedger(), policy=ContinueWithFallback())[0].status is SagaStatus.DEGRADED


def test_a_stage_that_skips_itself_with_what_cannot_be_stored_stops_the_saga() -> None:
    class Plan(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            return replace(StageOutput.skip("sold out"), data={"reason": "sold out", "line": object()})

        async def compensate(self, ctx: CompensationContext) -> None:
            raise AssertionError

    report, _ = played(Plan(), slow_disk())

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert "expected plain data at data['line'], got object" in report.cause.message


def test_an_interceptor_that_answers_with_what_cannot_be_stored_stops_the_saga() -> None:
    class Answers(BaseInterceptor):
        name = "answers"

        async def before(self, stage_name: str, ctx: PipelineContext) -> InterceptorResult:
            return InterceptorResult(stage_ran=False, result={"line": object()})

        async def after(self, stage_name: str, result: StageResult, ctx: PipelineContext) -> None:
            """It has nothing to add."""

    async def main() -> SagaReport:
        pipeline = Pipeline().with_stage("book", Book())
        return await SagaCoordinator(ledger=slow_disk(), interceptors=[Answers()]).run(pipeline)

    report = run(main())

    assert report.cause is not None
    assert "expected plain data at data['line'], got object" in report.cause.message


def test_what_comes_late_and_cannot_be_stored_is_recorded_all_the_same(tmp_path: Path) -> None:
    class Deaf(Book):
        timeout = 0.01  # by the real clock

        async def execute(self, ctx: SagaContext) -> StageOutput:
            while not self.how["released"].is_set():
                try:
                    await self.how["released"].wait()
                except asyncio.CancelledError:
                    continue
            self.world.land("book")
            return StageOutput.ok(seat="14A", line=object(), ticket=LONG)

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            return None

    async def main() -> tuple[Deaf, SagaReport, SagaReport, SagaReport]:
        stage, recorded = Deaf(released=asyncio.Event()), asyncio.Event()
        pipeline = Pipeline().with_stage("book", stage)

        def listen(_: str, event: AnyEvent) -> None:
            if isinstance(event, StageCompleted):
                recorded.set()

        async with SQLiteLedger(tmp_path / "sagas.db", max_event_bytes=MOST) as ledger:
            coordinator = SagaCoordinator(FailFast(cancel_grace=0.01), ledger=ledger, listeners=[listen])
            first = await coordinator.run(pipeline, saga_id="s")
            stage.how["released"].set()
            await recorded.wait()
            late = await coordinator.report("s")
            while "s" in coordinator._keeper.held.sagas:
                await coordinator.report("s")
            return stage, first, late, await coordinator.resume("s", pipeline, forward=False)

    stage, first, late, resumed = asyncio.run(main())

    assert first.status is SagaStatus.COMPENSATED
    assert late.status is SagaStatus.STUCK
    assert resumed.status is SagaStatus.COMPENSATED
    assert stage.world.standing == {}
    assert [told["seat"] for told in stage.told] == ["14A"]


def test_an_input_that_is_too_large_is_refused_before_anything_runs() -> None:
    book = Book()

    with pytest.raises(MisuseError) as refused:
        run(SagaCoordinator(ledger=slow_disk()).run(Pipeline().with_stage("book", book), input_text="OSL-JFK", metadata={"scan": LONG}))

    expected = "expected at most 4,000 bytes of JSON in one event (max_event_bytes), got 6,0"
    assert str(refused.value).startswith(expected)
    assert "most of them in context['metadata']. The ledger keeps the context" in str(refused.value)
    assert book.world.log == []


def test_what_redact_takes_out_of_an_event_in_place_is_in_no_file(tmp_path: Path) -> None:
    def without_cards(event: AnyEvent) -> AnyEvent:
        if isinstance(event, StageCompleted):
            event.output.data.pop("card", None)
        return event

    class Pay(CompensableStage):
        async def execute(self, _ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(card="4711-4711", amount=12)

        async def compensate(self, _ctx: CompensationContext) -> None:
            raise AssertionError

    async def main() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db", redact=without_cards) as ledger:
            await SagaCoordinator(ledger=ledger).run(Pipeline().with_stage("pay", Pay), saga_id="s")
            return await SagaCoordinator(ledger=ledger).report("s")

    report = asyncio.run(main())

    assert report.kept["pay"].data == {"amount": 12}
    assert b"4711-4711" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_what_redact_takes_out_in_place_is_known_to_the_saga_that_is_running(tmp_path: Path) -> None:
    refunded = []

    def without_cards(event: AnyEvent) -> AnyEvent:
        if isinstance(event, StageCompleted):
            event.output.data["buyer"].pop("card", None)
        if isinstance(event, EffectRecorded):
            event.effect.pop("card")
        return event

    class Pay(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            await ctx.record({"card": "4711", "cents": 1200})
            return StageOutput.ok(buyer={"card": "4711"})

        async def compensate(self, ctx: CompensationContext) -> None:
            assert ctx.output is not None
            refunded.append((ctx.output.data, ctx.effects))

    async def ship(_: StageContext) -> None:
        raise OSError

    async def main() -> SagaReport:
        pipeline = Pipeline().with_stage("pay", Pay).with_stage("ship", ship, "work", dependencies=("pay",))
        async with SQLiteLedger(tmp_path / "sagas.db", redact=without_cards) as ledger:
            return await SagaCoordinator(ledger=ledger).run(pipeline)

    report = asyncio.run(main())

    assert report.status == "compensated"
    assert refunded == [({"buyer": {"card": "4711"}}, ({"card": "4711", "cents": 1200},))]


def test_what_redact_takes_out_of_a_policy_in_place_is_known_to_the_saga_that_is_running(tmp_path: Path) -> None:
    def without_cards(event: AnyEvent) -> AnyEvent:
        if isinstance(event, SagaStarted) and isinstance(event.policy, ContinueWithFallback):
            event.policy.fallbacks["pay"].pop("card")
        return event

    async def pay(_: StageContext) -> None:
        raise OSError

    async def main() -> SagaReport:
        policy = ContinueWithFallback(fallbacks={"pay": {"card": "4711", "cents": 1200}})
        async with SQLiteLedger(tmp_path / "sagas.db", redact=without_cards) as ledger:
            return await SagaCoordinator(policy, ledger=ledger).run(Pipeline().with_stage("pay", pay, "work"))

    report = asyncio.run(main())

    assert report.kept["pay"].data == {"card": "4711", "cents": 1200}


class Clock(tzinfo):
    """Counts how often it is asked, and does not answer the first few times."""

    def __init__(self, silent: int = 0) -> None:
        self.asked = 0
        self._silent = silent

    def __deepcopy__(self, _: object) -> Clock:
        return self

    def utcoffset(self, _when: datetime | None, /) -> timedelta:
        self.asked += 1
        if self.asked <= self._silent:
            raise OSError("no clock")
        return timedelta(hours=1)

    def dst(self, _when: datetime | None, /) -> None:
        return None

    def tzname(self, _when: datetime | None, /) -> None:
        return None


def test_an_output_is_encoded_once(tmp_path: Path) -> None:
    clock = Clock()
    departure = datetime(2026, 11, 27, 12, tzinfo=clock)

    class Book(CompensableStage):
        async def execute(self, _ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(departure=departure)

        async def compensate(self, _ctx: CompensationContext) -> None:
            raise AssertionError

    async def main() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            await SagaCoordinator(ledger=ledger).run(Pipeline().with_stage("book", Book), saga_id="s")
            return await SagaCoordinator(ledger=ledger).report("s")

    report = asyncio.run(main())

    assert clock.asked == 1
    assert report.kept["book"].data == {"departure": departure}


@pytest.mark.parametrize("silent", [1, 3])
def test_an_output_whose_own_code_fails_while_it_is_encoded_is_asked_once_more(silent: int, tmp_path: Path) -> None:
    departure = datetime(2026, 11, 27, 12, tzinfo=Clock(silent))
    undone = []

    class Book(CompensableStage):
        async def execute(self, _ctx: SagaContext) -> StageOutput:
            return StageOutput.ok(departure=departure)

        async def compensate(self, _ctx: CompensationContext) -> None:
            undone.append("book")

    async def main() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            return await SagaCoordinator(ledger=ledger).run(Pipeline().with_stage("book", Book), saga_id="s")

    report = asyncio.run(main())

    assert report.status is (SagaStatus.COMPLETED if silent == 1 else SagaStatus.COMPENSATED)
    assert undone == ([] if silent == 1 else ["book"])


def test_what_redact_makes_too_large_stops_the_saga_and_it_goes_on_with_a_larger_bound(tmp_path: Path) -> None:
    def explained(event: AnyEvent) -> AnyEvent:
        return replace(event, reason=LONG) if isinstance(event, StageSkipped) else event

    class Plan(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            return StageOutput.skip("sold out")

        async def probe(self, ctx: CompensationContext) -> None:
            return None

        async def compensate(self, ctx: CompensationContext) -> None:
            raise AssertionError

    book = Book()
    pipeline = Pipeline().with_stage("book", book).with_stage("plan", Plan, dependencies=("book",))

    async def main() -> tuple[SagaUnrecorded, SagaReport]:
        path = tmp_path / "sagas.db"
        async with SQLiteLedger(path, max_event_bytes=MOST, redact=explained) as small:
            with pytest.raises(SagaUnrecorded) as caught:
                await SagaCoordinator(ledger=small).run(pipeline, saga_id="s")
        async with SQLiteLedger(path, redact=explained) as ledger:
            return caught.value, await SagaCoordinator(ledger=ledger).resume("s", pipeline)

    stopped, report = asyncio.run(main())

    assert "stage 'plan', has 5,1" in str(stopped)
    assert "A ledger opened with a larger one takes it. Nothing more was started. In effect: book; not known: nothing." in str(stopped)
    assert book.world.log == ["+book"]
    assert report.status is SagaStatus.COMPLETED


def test_a_failure_that_says_more_than_anybody_reads_is_kept_without_its_middle(tmp_path: Path) -> None:
    class Plan(CompensableStage):
        async def execute(self, ctx: SagaContext) -> StageOutput:
            raise ValueError("head " + "x" * 20_000_000 + " tail")

        async def compensate(self, ctx: CompensationContext) -> None:
            raise AssertionError

    report, _ = played(Plan(), SQLiteLedger(tmp_path / "sagas.db"))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message.startswith("head xxx")
    assert report.cause.message.endswith("xxx tail")
    assert "x [19,900,010 characters left out] x" in report.cause.message


class Line(Book):
    """Gives what has no encoding, until it is mended."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.world.land("book")
        return StageOutput.ok(seat="14A") if self.how.get("mended") else StageOutput.ok(seat="14A", line=object())


@pytest.mark.parametrize("killed", [False, True])
def test_no_stage_runs_on_a_text_that_stands_where_a_value_was(killed: bool) -> None:
    """Neither when a saga that kept what it had is resumed, nor when its process died before it knew why it stopped."""
    stage, seen = Line(), list[Any]()

    async def pay(ctx: SagaContext) -> None:
        seen.append(ctx.inputs.get_from("book", "line"))

    async def nothing(_: CompensationContext) -> None: ...

    pipeline = Pipeline().with_stage("book", stage).with_stage("pay", compensable(pay, nothing), dependencies=("book",))
    ledger = slow_disk()

    async def main() -> list[SagaReport]:
        coordinator = SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger)
        reports = [await coordinator.run(pipeline, saga_id="s")]
        if killed:
            kept = ledger._sagas["s"]
            last = next(place for place, event in enumerate(kept.events) if isinstance(event, StageCompleted))
            del kept.events[last + 1 :]
        reports += [await coordinator.resume("s", pipeline), await coordinator.resume("s", pipeline)]
        assert seen == []
        reports.append(await coordinator.compensate("s", pipeline))
        stage.how["mended"] = True
        reports.append(await coordinator.resume("s", pipeline, forward=True))
        return reports

    reports = run(main())

    halted = [SagaStatus.HALTED] * 3
    assert [report.status for report in reports] == [*halted, SagaStatus.COMPENSATED, SagaStatus.COMPLETED]
    for report in reports[:3]:
        assert report.cause is not None
        assert report.cause.message.endswith("got object, which has no encoding as JSON: the ledger can't keep it")
    assert [told["seat"] for told in stage.told] == ["14A"]
    assert seen == [None]
    assert stage.world.standing == {"book": 1}
