"""Spans and metrics of sagas, as OpenTelemetry's own SDK collects them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from stageflow.api import Pipeline, PipelineContext, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    MemoryLedger,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    nested,
)
from saga.errors import SagasDamaged
from saga.events import (
    AnyEvent,
    CompensationFailed,
    CompensationStarted,
    EffectRecorded,
    SagaEnded,
    SagaResumed,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSettled,
    StageStarted,
    TurnReason,
    Verdict,
)
from saga.failures import Failure, FailureKind
from saga.ledgers.sqlite import SQLiteLedger
from saga.listeners.otel import OpenTelemetryListener
from tests.controlled import elapse, run
from tests.late import Doubtful
from tests.places import SQLiteFile
from tests.stories import Story
from tests.test_properties import cases
from tests.world import SEQUENCE, Probed, Script, WithFallback, scene

ONCE = FailFast(compensation=Compensation(retry=Retry(attempts=1)))
CASES = min(int(os.environ.get("SAGA_CASES", "200")), 2000)


class Backend:
    """What a telemetry backend gets to know."""

    def __init__(self, *, remember: int = 1000) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self._meters = MeterProvider([self._reader])
        self.listener = OpenTelemetryListener(self.tracers, self._meters, remember=remember)

    def coordinator(self, policy: Any = None, **options: Any) -> SagaCoordinator:
        return SagaCoordinator(policy, listeners=[self.listener], **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def points(self, metric: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """The values of a metric, for a histogram its counts, by attributes without the pipeline's name."""
        found: dict[tuple[tuple[str, Any], ...], Any] = {}
        data = self._reader.get_metrics_data()
        for measured in data.resource_metrics[0].scope_metrics[0].metrics if data is not None else ():
            if measured.name == metric:
                for point in measured.data.data_points:
                    attributes = dict(point.attributes or {})
                    assert attributes.pop("saga.pipeline.name") in {"scene", "unknown"}
                    found[tuple(sorted(attributes.items()))] = getattr(point, "value", None) if hasattr(point, "value") else point.count
        return found

    def seconds(self, metric: str) -> list[float]:
        """The sums of a histogram."""
        data = self._reader.get_metrics_data()
        found = data.resource_metrics[0].scope_metrics[0].metrics if data is not None else ()
        return sorted(getattr(point, "sum", 0.0) for measured in found if measured.name == metric for point in measured.data.data_points)

    def instruments(self) -> dict[str, tuple[str, bool, str, set[str]]]:
        """Every metric's kind of data, whether that only grows, its unit and the attributes of all its points."""
        data = self._reader.get_metrics_data()
        assert data is not None
        return {
            measured.name: (
                type(measured.data).__name__,
                getattr(measured.data, "is_monotonic", False),
                str(measured.unit),
                {name for point in measured.data.data_points for name in point.attributes or ()},
            )
            for measured in data.resource_metrics[0].scope_metrics[0].metrics
        }

    def now(self, metric: str) -> int:
        return sum(self.points(metric).values())


def key(**attributes: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((name.replace("__", "."), value) for name, value in attributes.items()))


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


def test_a_saga_is_a_span_and_every_attempt_is_one_below_it() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"b": Script("raise", then=("ok",))})

    run(backend.coordinator(FailFast(retry=Retry(attempts=2))).run(pipeline, saga_id="s"))

    assert backend.names() == ["execute a", "execute b", "execute b", "execute c", "saga scene"]
    root = backend.span("saga scene")
    assert {parent_of(span) for span in backend.spans if span is not root} == {root.context.span_id if root.context else None}
    assert parent_of(root) is None
    assert dict(attributes(root)) == {"saga.id": "s", "saga.pipeline.name": "scene", "saga.status": "completed"}
    assert root.status.status_code is StatusCode.UNSET
    failed, landed = [span for span in backend.spans if span.name == "execute b"]
    assert attributes(failed)["saga.stage.attempt"] == 1
    assert dict(attributes(landed)) == {"saga.id": "s", "saga.stage.name": "b", "saga.stage.attempt": 2, "saga.stage.execution": 1}


def test_a_span_lasts_from_its_first_event_to_its_last() -> None:
    backend = Backend()
    ledger = MemoryLedger()
    _, pipeline = scene({"a": ()})

    run(backend.coordinator(ledger=ledger).run(pipeline, saga_id="s"))

    began, started, completed, ended = run(ledger.read("s"))

    def nanoseconds(at: datetime) -> int:
        return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000

    assert (backend.span("saga scene").start_time, backend.span("saga scene").end_time) == (nanoseconds(began.at), nanoseconds(ended.at))
    assert (backend.span("execute a").start_time, backend.span("execute a").end_time) == (
        nanoseconds(started.at),
        nanoseconds(completed.at),
    )


def test_a_compensation_links_to_the_attempt_that_it_undoes() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"a": Script("raise", then=("ok",)), "c": Script("raise"), "b": Script(undo_fails=1)})
    policy = FailFast(retry=Retry(attempts=2), compensation=Compensation(retry=Retry(attempts=2)))

    run(backend.coordinator(policy).run(pipeline))

    executed = {attributes(span)["saga.stage.name"]: span for span in backend.spans if span.name.startswith("execute")}
    compensations = [span for span in backend.spans if span.name.startswith("compensate")]
    assert [span.name for span in compensations] == ["compensate b", "compensate b", "compensate a"]
    for span in compensations:
        (link,) = span.links
        undone = executed[attributes(span)["saga.stage.name"]]
        assert undone.context is not None
        assert link.context.span_id == undone.context.span_id
    assert attributes(executed["a"])["saga.stage.attempt"] == 2


def test_a_failure_is_an_error_of_its_span_with_the_exception_as_it_was_raised() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    run(backend.coordinator().run(pipeline))

    span = backend.span("execute c")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "stage 'c' raised: CardDeclined: c was declined"
    assert attributes(span)["error.type"] == "tests.world.CardDeclined"
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes is not None
    assert event.attributes["exception.type"] == "tests.world.CardDeclined"
    assert event.attributes["exception.message"] == "c was declined"
    assert "raise CardDeclined" in str(event.attributes["exception.stacktrace"])
    root = backend.span("saga scene")
    assert root.status.description == "compensated: stage 'c' raised: CardDeclined: c was declined"
    assert [event.name for event in root.events] == ["saga.turned_back"]


def test_a_timeout_that_leaves_a_stage_in_doubt_says_so_and_its_probe_is_noted() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"c": Script("hang")}, {"c": "probed"})

    run(backend.coordinator(FailFast(timeout=5)).run(pipeline))

    span = backend.span("execute c")
    assert attributes(span)["error.type"] == "timeout"
    assert attributes(span)["saga.stage.in_doubt"] is True
    (probed,) = [event for event in backend.span("saga scene").events if event.name == "saga.stage_probed"]
    assert probed.attributes == {"saga.stage.name": "c", "saga.stage.landed": False}


def test_a_probe_that_fails_is_noted_and_asked_again_and_counted() -> None:
    class SlowToAnswer(Probed):
        answers = iter([None])

        async def probe(self, ctx: CompensationContext) -> StageOutput | None:
            for _ in self.answers:
                raise ConnectionError("the line is busy")
            return await super().probe(ctx)

    backend = Backend()
    world, _ = scene({"a": ()})
    pipeline = Pipeline(name="scene").with_stage("a", SlowToAnswer(world, "a", Script("hang")))

    run(backend.coordinator(FailFast(timeout=5)).run(pipeline))

    busy, answered = [event for event in backend.span("saga scene").events if event.name == "saga.stage_probed"]
    assert busy.attributes is not None
    assert busy.attributes["exception.message"] == "the line is busy"
    assert answered.attributes == {"saga.stage.name": "a", "saga.stage.landed": False}
    assert backend.points("saga.retries") == {key(saga__stage__name="a", saga__action="probe"): 1}


def test_the_span_of_whoever_runs_the_saga_is_its_parent() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    async def request() -> None:
        with backend.tracers.get_tracer("app").start_as_current_span("POST /trips") as span:
            await backend.coordinator().run(pipeline)
            assert trace.get_current_span() is span

    run(request())

    posted = backend.span("POST /trips")
    assert posted.context is not None
    assert parent_of(backend.span("saga scene")) == posted.context.span_id
    assert {span.context.trace_id for span in backend.spans if span.context is not None} == {posted.context.trace_id}


class Traced(CompensableStage):
    """Does its work in a span of its own, as an instrumented client does."""

    def __init__(self, backend: Backend, name: str) -> None:
        self.tracer = backend.tracers.get_tracer("client")
        self.name = name

    async def execute(self, ctx: SagaContext) -> None:
        with self.tracer.start_as_current_span(f"POST {self.name}"):
            await asyncio.sleep(0)

    async def compensate(self, ctx: CompensationContext) -> None:
        with self.tracer.start_as_current_span(f"DELETE {self.name}"):
            await asyncio.sleep(0)


@pytest.mark.parametrize("durable", [False, True])
def test_the_code_of_a_stage_runs_inside_its_attempts_span(durable: bool, tmp_path: Path) -> None:
    backend = Backend()
    told: list[AnyEvent] = []
    _, last = scene({"c": ()}, {"c": Script("raise")})
    stages = tuple("abdefghijk")
    pipeline = Pipeline(name="scene")
    for name in stages:
        pipeline = pipeline.with_stage(name, Traced(backend, name))
    pipeline = pipeline.with_stage("c", last.stages["c"].runner, dependencies=stages)

    async def main() -> list[AnyEvent]:
        ledger = SQLiteLedger(tmp_path / "sagas.db") if durable else MemoryLedger()
        policy = FailFast(compensation=Compensation(max_concurrency=3))
        coordinator = SagaCoordinator(policy, ledger=ledger, listeners=[backend.listener, lambda _, event: told.append(event)])
        await coordinator.run(pipeline, saga_id="s")
        events = await ledger.read("s")
        if isinstance(ledger, SQLiteLedger):
            await ledger.close()
        return list(events)

    events = asyncio.run(main())

    assert [event.at for event in told] == [event.at for event in events]
    for name in stages:
        executing, undoing = backend.span(f"execute {name}"), backend.span(f"compensate {name}")
        assert executing.context is not None
        assert undoing.context is not None
        assert parent_of(backend.span(f"POST {name}")) == executing.context.span_id
        assert parent_of(backend.span(f"DELETE {name}")) == undoing.context.span_id
        assert parent_of(undoing) == parent_of(executing)


def test_a_child_saga_is_below_the_attempt_that_runs_it_and_its_undoing_below_that_of_its_parent() -> None:
    backend = Backend()
    _, trip = scene({"b": ()})
    _, last = scene({"c": ()}, {"c": Script("raise")})
    pipeline = Pipeline(name="scene").with_stage("trip", nested(trip))
    pipeline = pipeline.with_stage("c", last.stages["c"].runner, dependencies=("trip",))

    run(backend.coordinator().run(pipeline, saga_id="s"))

    executing, undoing = backend.span("execute trip"), backend.span("compensate trip")
    assert executing.context is not None
    assert undoing.context is not None
    forth, back = [span for span in backend.spans if span.name == "saga scene" and attributes(span)["saga.id"] == "s/trip"]
    assert parent_of(forth) == executing.context.span_id
    assert attributes(forth)["saga.parent.id"] == "s"
    assert attributes(forth)["saga.parent.stage.name"] == "trip"
    assert parent_of(back) == undoing.context.span_id
    assert back.status.status_code is StatusCode.UNSET
    (link,) = backend.span("compensate b").links
    landed = backend.span("execute b").context
    assert landed is not None
    assert link.context.span_id == landed.span_id


def test_what_is_undone_on_demand_is_a_span_of_its_own_that_still_links_back() -> None:
    backend = Backend()
    _, pipeline = scene({"a": ()})
    coordinator = backend.coordinator()

    async def main() -> None:
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.compensate("s", pipeline)

    run(main())

    assert backend.names() == ["execute a", "saga scene", "compensate a", "saga scene"]
    (link,) = backend.span("compensate a").links
    landed = backend.span("execute a").context
    assert landed is not None
    assert link.context.span_id == landed.span_id
    back = backend.spans[-1]
    assert back.status.status_code is StatusCode.UNSET
    assert attributes(back)["saga.status"] == "compensated"


def test_the_metrics_of_a_saga_that_is_stuck() -> None:
    backend = Backend()
    shape = {"a": (), "b": ("a",), "c": ("b",), "d": ("b",)}
    _, pipeline = scene(shape, {"c": Script("raise"), "d": Script(), "b": Script(undo_fails=9)})
    policy = FailFast(retry=Retry(attempts=2), compensation=Compensation(retry=Retry(attempts=3)))

    report = run(backend.coordinator(policy).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert backend.points("saga.duration") == {key(saga__status="stuck"): 1}
    assert backend.points("saga.stage.duration") == {
        key(saga__stage__name="a"): 1,
        key(saga__stage__name="b"): 1,
        key(saga__stage__name="c", error__type="tests.world.CardDeclined"): 2,
        key(saga__stage__name="d"): 1,
    }
    assert backend.points("saga.compensation.duration") == {
        key(saga__stage__name="d"): 1,
        key(saga__stage__name="b", error__type="tests.world.CardDeclined"): 3,
    }
    assert backend.points("saga.retries") == {
        key(saga__stage__name="c", saga__action="execute"): 1,
        key(saga__stage__name="b", saga__action="compensate"): 2,
    }
    assert backend.points("saga.active") == {key(saga__status="running"): 0, key(saga__status="compensating"): 0}
    assert backend.now("saga.stage.stuck") == 1
    assert backend.now("saga.stage.in_doubt") == 0


def test_only_attempts_that_another_one_followed_are_counted_as_retries() -> None:
    backend = Backend()
    world, pipeline = scene({"a": (), "b": ("a",)}, {"a": Script(undo_fails=9), "b": Script("raise")}, {"a": "probed"})
    policy = FailFast(compensation=Compensation(retry=Retry(attempts=3)))

    report = run(backend.coordinator(policy).run(pipeline))

    assert list(report.stuck) == ["a"]
    assert backend.points("saga.compensation.duration") == {key(saga__stage__name="a", error__type="tests.world.CardDeclined"): 3}
    assert backend.points("saga.retries") == {key(saga__stage__name="a", saga__action="compensate"): 2}
    assert list(world.standing) == ["a"]


def test_active_sagas_are_counted_by_where_they_are() -> None:
    backend = Backend()
    seen: list[dict[Any, int]] = []

    class Looking(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            seen.append(backend.points("saga.active"))

        async def compensate(self, ctx: CompensationContext) -> None:
            seen.append(backend.points("saga.active"))

    _, last = scene({"b": ()}, {"b": Script("raise")})
    pipeline = Pipeline(name="scene").with_stage("a", Looking).with_stage("b", last.stages["b"].runner, dependencies=("a",))

    run(backend.coordinator().run(pipeline))

    assert seen == [
        {key(saga__status="running"): 1},
        {key(saga__status="running"): 0, key(saga__status="compensating"): 1},
    ]


def test_what_is_stuck_now_goes_down_when_it_is_settled_or_undone_after_all() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise"), "b": Script(undo_fails=1)})
    coordinator = backend.coordinator(ONCE)

    async def main() -> list[int]:
        seen = []
        await coordinator.run(pipeline, saga_id="mended")
        seen.append(backend.now("saga.stage.stuck"))
        await coordinator.settle("mended", "b", "retry", "the bank is back")
        seen.append(backend.now("saga.stage.stuck"))
        await coordinator.resume("mended", pipeline)
        seen.append(backend.now("saga.stage.stuck"))
        return seen

    assert run(main()) == [1, 0, 0]
    assert [span.name for span in backend.spans][-3:] == ["compensate b", "compensate a", "saga scene"]


def test_what_is_in_doubt_now_is_counted_when_the_saga_rests_and_until_a_person_says() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"c": Script("hang")})
    coordinator = backend.coordinator(FailFast(timeout=5))

    async def main() -> list[int]:
        await coordinator.run(pipeline, saga_id="s")
        before = backend.now("saga.stage.in_doubt")
        await coordinator.settle("s", "c", "undone", "it never landed")
        return [before, backend.now("saga.stage.in_doubt")]

    assert run(main()) == [1, 0]


def test_what_completes_after_it_was_undone_is_in_doubt_from_then_on() -> None:
    backend = Backend()
    world, _ = scene({"deaf": ()})

    async def main() -> list[int]:
        stage = Doubtful(world)
        pipeline = Pipeline(name="scene").with_stage("deaf", stage)
        report = await backend.coordinator(FailFast(timeout=10, cancel_grace=2)).run(pipeline, saga_id="s")
        assert report.status is SagaStatus.COMPENSATED
        seen = [backend.now("saga.stage.in_doubt")]
        stage.released.set()
        await elapse(1)
        return [*seen, backend.now("saga.stage.in_doubt")]

    assert run(main()) == [0, 1]
    assert backend.names() == ["execute deaf", "compensate deaf", "saga scene"]
    assert backend.points("saga.duration") == {key(saga__status="compensated"): 1}


def test_a_process_that_starts_counts_what_waits_in_its_ledger() -> None:
    ledger = MemoryLedger()
    _, pipeline = scene({"b": (), "c": ("b",)}, {"c": Script("raise"), "b": Script(undo_fails=1)})
    before = SagaCoordinator(ONCE, ledger=ledger)
    backend = Backend()

    async def main() -> list[int]:
        await before.run(pipeline, saga_id="s")
        await backend.listener.survey(ledger)
        await backend.listener.survey(ledger)
        seen = [backend.now("saga.stage.stuck")]
        # Elsewhere, and this listener isn't told.
        settled = await before.settle("s", "b", "undone", "by hand")
        assert settled.status is SagaStatus.COMPENSATED
        await backend.listener.survey(ledger)
        return [*seen, backend.now("saga.stage.stuck")]

    assert run(main()) == [1, 0]


def test_what_waits_in_a_saga_whose_row_is_damaged_is_counted_by_its_events(tmp_path: Path) -> None:
    _, pipeline = scene({"b": (), "c": ("b",)}, {"c": Script("raise"), "b": Script(undo_fails=1)})
    place = SQLiteFile(tmp_path / "sagas.db")
    backend = Backend()

    async def main() -> int:
        async with place.open() as ledger:
            await SagaCoordinator(ONCE, ledger=ledger).run(pipeline, saga_id="s")
            place.execute("UPDATE sagas SET status = 'struck'")
            await backend.listener.survey(ledger)
            return backend.now("saga.stage.stuck")

    assert asyncio.run(main()) == 1


def test_a_process_that_starts_counts_what_a_saga_halted_in_doubt_leaves_waiting() -> None:
    ledger = MemoryLedger()
    _, pipeline = scene({"b": ()}, {"b": Script("hang")})
    backend = Backend()

    async def main() -> SagaReport:
        report = await SagaCoordinator(FailFast(timeout=1, on_failure="halt"), ledger=ledger).run(pipeline, saga_id="s")
        await backend.listener.survey(ledger)
        return report

    report = run(main())

    assert (report.status, set(report.in_doubt)) == (SagaStatus.HALTED, {"b"})
    assert backend.now("saga.stage.in_doubt") == 1


def test_a_survey_counts_all_that_waits_but_in_the_saga_that_cant_be_read(tmp_path: Path) -> None:
    _, pipeline = scene({"b": (), "c": ("b",)}, {"c": Script("raise"), "b": Script(undo_fails=3)})
    place = SQLiteFile(tmp_path / "sagas.db")
    backend = Backend()

    async def main() -> None:
        async with place.open() as ledger:
            for saga_id in ("r", "s", "t"):
                await SagaCoordinator(ONCE, ledger=ledger).run(pipeline, saga_id=saga_id)
            place.execute("UPDATE events SET body = '{}' WHERE saga = 's' AND first = 0")
            await backend.listener.survey(ledger)

    with pytest.raises(SagasDamaged, match="saga s can't be read") as found:
        asyncio.run(main())

    assert (list(found.value.damaged), [entry.saga_id for entry in found.value.entries]) == (["s"], ["r", "t"])
    assert backend.now("saga.stage.stuck") == 2


def test_a_survey_drives_no_saga_out_of_memory_for_one_in_which_nothing_waits() -> None:
    """A ledger may hold any number of sagas that halted; what was undone here was then one of an unknown pipeline."""
    ledger = MemoryLedger()
    backend = Backend(remember=1)
    _, good = scene({"b": ()})
    _, bad = scene({"b": ()}, {"b": Script("raise")})
    coordinator = backend.coordinator(ledger=ledger)

    async def main() -> None:
        await SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(bad, saga_id="halted")
        await coordinator.run(good, saga_id="s")
        await backend.listener.survey(ledger)
        await coordinator.compensate("s", good)

    run(main())

    assert backend.names()[-2:] == ["compensate b", "saga scene"]


def test_a_survey_leaves_a_saga_that_is_alive_alone() -> None:
    backend = Backend()
    ledger = MemoryLedger()
    script = Script(undo_fails=1)
    _, pipeline = scene(SEQUENCE, {"c": Script("raise"), "b": script})
    coordinator = backend.coordinator(ONCE, ledger=ledger)

    async def main() -> list[int]:
        await coordinator.run(pipeline, saga_id="s")
        seen = [backend.now("saga.stage.stuck")]
        backend.listener("s", SagaResumed(forward=False, by="anna"))
        await backend.listener.survey(ledger)
        assert list(backend.listener._at_rest) == []
        return [*seen, backend.now("saga.stage.stuck")]

    assert run(main()) == [1, 0]


def test_a_saga_that_failed_and_then_completed_is_an_error_once() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise", then=("ok",))})
    coordinator = backend.coordinator()

    async def main() -> None:
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, forward=True)

    run(main())

    first, second = [span for span in backend.spans if span.name == "saga scene"]
    assert first.status.status_code is StatusCode.ERROR
    assert second.status.status_code is StatusCode.UNSET
    assert attributes(second)["saga.status"] == "completed"


@pytest.mark.parametrize("on_failure", ["compensate", "halt"])
def test_the_error_of_a_saga_is_the_failure_that_outweighed_the_cancel_of_its_context(on_failure: Any) -> None:
    backend = Backend()
    shape: dict[str, tuple[str, ...]] = {"a": (), "b": ("a",), "c": ()}
    _, pipeline = scene(shape, {"a": Script(before=1), "c": Script("raise", before=2)})
    context = PipelineContext.create()

    async def main() -> SagaReport:
        running = asyncio.create_task(backend.coordinator(FailFast(on_failure=on_failure)).run(pipeline, context))
        await elapse(0.5)
        context.mark_canceled("enough")
        return await running

    report = run(main())

    [span] = [span for span in backend.spans if span.name == "saga scene"]
    assert report.cause is not None
    assert report.cause.stage == "c"
    assert span.status.description == f"{report.status.value}: {report.cause}"


def test_what_is_resumed_here_and_was_started_elsewhere_has_spans_without_a_pipelines_name() -> None:
    ledger = MemoryLedger()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise", then=("ok",))})
    backend = Backend()

    async def main() -> SagaReport:
        await SagaCoordinator(FailFast(on_failure="halt"), ledger=ledger).run(pipeline, saga_id="s")
        return await backend.coordinator(ledger=ledger).resume("s", pipeline)

    report = run(main())

    assert report.status is SagaStatus.COMPLETED
    assert backend.names() == ["execute c", "saga unknown"]
    assert attributes(backend.spans[-1])["saga.id"] == "s"
    assert backend.points("saga.active") == {key(saga__status="running"): 0}


def test_events_of_sagas_that_it_does_not_know_do_no_harm() -> None:
    backend = Backend()
    failure = Failure.of("a", FailureKind.EXCEPTION, "no", attempt=1)

    backend.listener("s", StageFailed(stage="a", failure=failure, will_retry=True))
    backend.listener("s", StageCompleted(stage="a", output=None, late=True))  # type: ignore[arg-type] # nobody looks at it
    backend.listener("s", StageSettled(stage="a", verdict=Verdict.UNDONE, note="by hand", by="anna"))
    backend.listener("s", SagaEnded(status=SagaStatus.COMPENSATED))
    backend.listener("s", SagaEnded(status=SagaStatus.COMPENSATED))
    backend.listener("s", EffectRecorded(stage="a", effect=1))
    backend.listener("t", SagaTurnedBack(reason=TurnReason.REQUEST))
    backend.listener("t", SagaEnded(status=SagaStatus.STUCK))

    assert backend.names() == ["saga unknown"]
    assert backend.spans[0].status.description == "stuck"
    assert backend.points("saga.duration") == {key(saga__status="stuck"): 1}


def test_what_takes_how_long_is_measured_in_seconds_from_its_own_start_or_from_where_it_went_on() -> None:
    backend = Backend()
    story = Story("scene", {"a": (), "b": ("a",)}).done("a", 0, 1).fails("b", 1, 3, "no").ends(4, SagaStatus.HALTED)
    story.tell(1_000, SagaResumed, forward=True, by="anna").fails("b", 1_000, 1_016, "no", attempt=2)
    story.turns_back(1_016).undone("a", 1_016, 1_048).ends(1_064, SagaStatus.COMPENSATED)

    for event in story.events:
        backend.listener("s", event)

    assert backend.seconds("saga.duration") == [4, 64]
    assert backend.seconds("saga.stage.duration") == [1, 2 + 16]
    assert backend.seconds("saga.compensation.duration") == [32]
    assert [(span.end_time or 0) - (span.start_time or 0) for span in backend.spans if span.name == "saga scene"] == [4 * 10**9, 64 * 10**9]


def test_what_ended_after_the_clock_was_set_back_is_counted_and_took_no_time(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    story = Story("scene", {"a": (), "b": ("a",)}).done("a", 3_600, -1).fails("b", 0, 1, "no").turns_back(1).undone("a", 2, -3_600)
    story.ends(-3_599, SagaStatus.COMPENSATED)

    for event in story.events:
        backend.listener("s", event)

    assert backend.points("saga.duration") == {key(saga__status="compensated"): 1}
    assert backend.points("saga.compensation.duration") == {key(saga__stage__name="a"): 1}
    assert sum(backend.points("saga.stage.duration").values()) == 2
    assert all((span.end_time or 0) >= (span.start_time or 0) for span in backend.spans)
    assert not caplog.records


def test_a_saga_that_went_on_elsewhere_meanwhile_loses_its_counts_and_not_its_spans() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")})
    run(backend.coordinator(FailFast(on_failure="halt")).run(pipeline, saga_id="s"))

    backend.listener("s", SagaResumed(forward=True, by="anna"))
    backend.listener("s", SagaEnded(status=SagaStatus.COMPENSATED))
    backend.listener("s", SagaResumed(forward=False, by="anna"))
    backend.listener("s", SagaEnded(status=SagaStatus.STUCK))

    assert backend.names()[-2:] == ["saga scene", "saga scene"]


def test_sagas_at_rest_are_remembered_up_to_a_limit_and_what_waits_in_them_until_it_is_settled() -> None:
    backend = Backend(remember=2)
    _, bad = scene(SEQUENCE, {"c": Script("raise"), "b": Script(undo_fails=99)})
    _, good = scene(SEQUENCE)
    coordinator = backend.coordinator(ONCE)

    async def main() -> None:
        for number in range(3):
            await coordinator.run(bad, saga_id=f"bad {number}")
        await coordinator.settle("bad 1", "b", "undone", "by hand")
        for number in range(2):
            await coordinator.run(good, saga_id=f"good {number}")
        await coordinator.resume("bad 1", bad)

    run(main())

    assert list(backend.listener._at_rest) == ["good 1", "bad 1"]
    assert list(backend.listener._unsettled) == ["bad 0", "bad 2"]
    assert backend.listener._alive == {}
    assert backend.now("saga.stage.stuck") == 2


def test_a_saga_in_which_nothing_failed_keeps_none_of_its_outputs_in_memory() -> None:
    backend = Backend()
    _, good = scene(SEQUENCE)
    _, bad = scene(SEQUENCE, {"c": Script("raise")})

    run(backend.coordinator().run(good, saga_id="good"))
    run(backend.coordinator().run(bad, saga_id="bad"))

    assert backend.listener._at_rest["good"].state is None
    assert backend.listener._at_rest["bad"].state is not None


def test_of_a_saga_that_failed_no_exception_is_kept_in_memory() -> None:
    """Its traceback would keep the whole run, and all that the stage had in its hands."""
    held: list[weakref.ref[Backend]] = []

    async def fails(_: Any) -> None:
        connection = Backend()
        held.append(weakref.ref(connection))
        raise ConnectionError("no line")

    backend = Backend()
    run(backend.coordinator().run(Pipeline(name="p").with_stage("a", fails, "work")))
    gc.collect()

    assert [ref() for ref in held] == [None]


def test_fallbacks_and_recorded_effects_are_events_of_the_saga_and_of_the_attempt() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"b": Script("raise")}, {"a": "recording", "b": "fallback"})

    run(backend.coordinator(ContinueWithFallback()).run(pipeline))

    assert [event.name for event in backend.span("execute a").events] == ["saga.effect_recorded"]
    assert [event.name for event in backend.span("saga scene").events] == ["saga.fallback_used"]


def test_a_deadline_is_what_the_sagas_span_says_went_wrong() -> None:
    backend = Backend()
    _, pipeline = scene(SEQUENCE, {"b": Script("hang")})

    run(backend.coordinator(FailFast(deadline=5, on_failure="halt")).run(pipeline))

    root = backend.span("saga scene")
    assert [event.name for event in root.events] == ["saga.stopped"]
    assert root.status.description is not None
    assert root.status.description.endswith("the forward run exceeded its deadline of 5 s")


def test_a_fallback_that_fails_is_noted() -> None:
    class Refusing(WithFallback):
        async def fallback(self, ctx: SagaContext, failure: Failure) -> dict[str, Any]:
            raise LookupError("no price in the cache")

    backend = Backend()
    world, _ = scene({"a": ()})
    pipeline = Pipeline(name="scene").with_stage("a", Refusing(world, "a", Script("raise")))

    run(backend.coordinator(ContinueWithFallback()).run(pipeline))

    (failed, *_) = backend.span("saga scene").events
    assert failed.name == "saga.fallback_failed"
    assert failed.attributes is not None
    assert failed.attributes["exception.message"] == "no price in the cache"


def retries_in(events: Sequence[AnyEvent]) -> int:
    """How many failures, that let another attempt follow, one of the same kind did follow; a probe that has no answer is asked again."""
    found = sum(isinstance(event, StageProbed) and event.will_retry for event in events)
    for starts, fails in ((StageStarted, StageFailed), (CompensationStarted, CompensationFailed)):
        for stage in {event.stage for event in events if isinstance(event, starts)}:
            own = [event for event in events if isinstance(event, starts | fails) and event.stage == stage]
            found += sum(isinstance(was, fails) and was.will_retry and isinstance(follows, starts) for was, follows in pairwise(own))
    return found


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_whatever_a_saga_does_its_telemetry_agrees_with_its_ledger(case: Mapping[str, Any]) -> None:
    backend, ledger, mishaps = Backend(), MemoryLedger(), []
    _, pipeline = scene(case["shape"], case["scripts"], case["kinds"])
    for script in case["scripts"].values():
        script.attempts.clear()
        script.undo_attempts = 0

    def listener(saga_id: str, event: AnyEvent) -> None:
        try:
            backend.listener(saga_id, event)
        except Exception as error:  # noqa: BLE001 - the coordinator would log it and go on
            mishaps.append(error)

    async def play() -> SagaReport:
        coordinator = SagaCoordinator(case["policy"], ledger=ledger, listeners=[listener])
        task = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        if case["cancel_at"] is not None:
            await elapse(case["cancel_at"])
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return await coordinator.report("s")

    report = run(play())

    events = run(ledger.read("s"))
    begun = [event for event in events if isinstance(event, StageStarted | CompensationStarted)]
    assert mishaps == []
    assert len(backend.spans) == len(begun) + 1
    assert backend.now("saga.active") == 0
    assert backend.now("saga.retries") == retries_in(events)
    states = [stage.state for stage in report.stages.values()]
    assert backend.now("saga.stage.stuck") == states.count(StageState.STUCK)
    assert backend.now("saga.stage.in_doubt") == states.count(StageState.IN_DOUBT)
    assert backend.points("saga.duration") == {key(saga__status=report.status.value): 1}
    assert attributes(backend.span("saga scene"))["saga.status"] == report.status.value
    for span in backend.spans:
        assert span.name.startswith("compensate") is bool(span.links)


# -- the page that names them ------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "telemetry.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    _, _, below = PAGE.partition(f"### {heading}\n")
    _, _, body = below.partition("---|\n")
    rows, _, _ = body.partition("\n\n")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def named(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


@pytest.fixture(scope="module")
def everything() -> Backend:
    """A backend that has seen all that sagas may do."""
    backend = Backend()
    _, trip = scene({"x": ()})
    _, fine = scene(SEQUENCE)
    retrying = {"b": Script("raise", then=("ok",)), "c": Script("raise"), "a": Script(undo_fails=9)}
    _, stuck = scene(SEQUENCE, retrying, {"a": "recording"})
    _, doubtful = scene(SEQUENCE, {"c": Script("hang")})
    policy = FailFast(timeout=5, retry=Retry(attempts=2), compensation=Compensation(retry=Retry(attempts=2)))
    for pipeline in (fine.with_stage("trip", nested(trip)), stuck, doubtful):
        run(backend.coordinator(policy).run(pipeline))
    return backend


def test_the_page_names_every_span_with_its_attributes(everything: Backend) -> None:
    documented = {re.sub(r"[`{} ]", " ", row[0]).split()[0]: named(row[3]) for row in table("Spans")}

    found: dict[str, set[str]] = {}
    for span in everything.spans:
        found.setdefault(span.name.split()[0], set()).update(attributes(span))
    assert found == documented


def test_the_page_names_every_metric_with_its_instrument_unit_and_attributes(everything: Backend) -> None:
    instruments = {"Histogram": "Histogram", "Counter": "Sum", "UpDownCounter": "Sum"}

    documented = {row[0].strip("`"): (row[1], row[2].strip("`"), named(row[4])) for row in table("Metrics")}

    found = everything.instruments()
    assert found.keys() == documented.keys()
    for name, (instrument, unit, keys) in documented.items():
        kind, is_monotonic, measured_unit, measured_keys = found[name]
        assert (kind, measured_unit, measured_keys) == (instruments[instrument], unit, keys), name
        assert is_monotonic is (instrument == "Counter"), name


def test_without_providers_the_global_ones_are_used() -> None:
    _, pipeline = scene(SEQUENCE)

    report = run(SagaCoordinator(listeners=[OpenTelemetryListener()]).run(pipeline))

    assert report.status is SagaStatus.COMPLETED
