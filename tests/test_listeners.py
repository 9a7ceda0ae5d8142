"""What listens to a saga: the log, stageflow's event sink; and what a listener may never do."""

from __future__ import annotations

import io
import logging
from typing import Any, get_args

import pytest
from stageflow.api import Pipeline, StageOutput
from stageflow.events import clear_event_sink, set_event_sink

from saga import (
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Policy,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    StageState,
    compensable,
    nested,
)
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    EffectRecorded,
    FallbackFailed,
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaStatus,
    SagaStopped,
    StageCompleted,
    StageFailed,
    StageProbed,
)
from saga.failures import Failure, FailureKind
from saga.listeners import Listener
from saga.listeners.logs import _SAY, log_events
from saga.listeners.otel import OpenTelemetryListener
from saga.listeners.sink import SinkListener
from tests.controlled import run
from tests.world import BRANCHES, SEQUENCE, Script, nothing, scene

ONCE = FailFast(compensation=Compensation(retry=Retry(attempts=1)))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records if record.name == "saga"]


def play(
    caplog: pytest.LogCaptureFixture, scripts: dict[str, Script], policy: Policy | None = None, kinds: dict[str, str] | None = None
) -> tuple[SagaReport, list[str]]:
    """a -> b -> c under a coordinator that logs."""
    _, pipeline = scene(SEQUENCE, scripts, kinds)
    with caplog.at_level(logging.DEBUG, "saga"):
        report = run(SagaCoordinator(policy, listeners=[log_events]).run(pipeline, saga_id="s"))
    return report, lines(caplog)


def test_a_saga_that_completes_is_a_line_for_every_event(caplog: pytest.LogCaptureFixture) -> None:
    _, logged = play(caplog, {})

    assert logged == [
        "INFO saga s: started 'scene', 3 stages",
        "DEBUG saga s: stage 'a' started, attempt 1",
        "DEBUG saga s: stage 'a' completed",
        "DEBUG saga s: stage 'b' started, attempt 1",
        "DEBUG saga s: stage 'b' completed",
        "DEBUG saga s: stage 'c' started, attempt 1",
        "DEBUG saga s: stage 'c' completed",
        "INFO saga s: ended completed",
    ]


def test_what_goes_wrong_and_is_dealt_with_is_a_warning_and_what_stays_stuck_an_error(caplog: pytest.LogCaptureFixture) -> None:
    policy = FailFast(retry=Retry(attempts=2), compensation=Compensation(retry=Retry(attempts=2)))

    _, logged = play(caplog, {"c": Script("raise"), "a": Script(undo_fails=9)}, policy)

    assert [line for line in logged if not line.startswith("DEBUG")] == [
        "INFO saga s: started 'scene', 3 stages",
        "WARNING saga s: stage 'c' raised: CardDeclined: c was declined; another attempt follows",
        "WARNING saga s: stage 'c' raised at attempt 2: CardDeclined: c was declined",
        "WARNING saga s: turned back (failure): stage 'c' raised at attempt 2: CardDeclined: c was declined",
        "WARNING saga s: stage 'a' could not be compensated: CardDeclined: undoing a was declined; it is asked or attempted again",
        "ERROR saga s: stage 'a' is stuck: stage 'a' could not be compensated at attempt 2: CardDeclined: undoing a was declined",
        "ERROR saga s: ended stuck",
    ]
    assert "DEBUG saga s: the compensation of stage 'b' started, attempt 1" in logged
    assert "DEBUG saga s: stage 'b' is undone" in logged


def test_no_attempt_is_announced_that_does_not_follow(caplog: pytest.LogCaptureFixture) -> None:
    policy = FailFast(compensation=Compensation(retry=Retry(attempts=1)))

    report, logged = play(caplog, {"c": Script("raise"), "a": Script(undo_fails=9)}, policy, {"a": "probed"})

    assert report.stages["a"].state is StageState.STUCK
    assert [line for line in logged if "stage 'a'" in line][2:] == [
        "DEBUG saga s: the compensation of stage 'a' started, attempt 1",
        "WARNING saga s: stage 'a' could not be compensated: CardDeclined: undoing a was declined; it is asked or attempted again",
        "DEBUG saga s: stage 'a' was probed: its effect landed",
        "ERROR saga s: stage 'a' is stuck: stage 'a' could not be compensated: CardDeclined: undoing a was declined",
    ]


def test_doubt_that_a_probe_clears_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    report, logged = play(caplog, {"c": Script("hang")}, FailFast(timeout=5), {"c": "probed"})

    assert report.status is SagaStatus.COMPENSATED
    assert "DEBUG saga s: stage 'c' was probed: its effect did not land" in logged
    assert any(line.startswith("WARNING") and line.endswith("whether its effect landed is in doubt") for line in logged)
    assert not any(line.startswith("ERROR") for line in logged)


def test_of_doubt_with_an_attempt_left_it_is_said_that_the_probe_may_come_first(caplog: pytest.LogCaptureFixture) -> None:
    report, logged = play(caplog, {"c": Script("hang", then=("ok",))}, FailFast(timeout=5, retry=Retry(attempts=2)), {"c": "probed"})

    assert report.status is SagaStatus.COMPLETED
    (warning,) = (line for line in logged if line.startswith("WARNING"))
    assert warning.endswith("whether its effect landed is in doubt; it is asked or attempted again")


def test_fallbacks_and_what_is_skipped_with_a_branch_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    _, logged = play(caplog, {"b": Script("raise")}, ContinueWithFallback(fallbacks={"b": {}}))
    assert "WARNING saga s: stage 'b' goes on with the fallback of its policy" in logged

    caplog.clear()
    _, logged = play(caplog, {"b": Script("raise")}, ContinueWithFallback(), {"b": "fallback"})
    assert "WARNING saga s: stage 'b' goes on with the fallback of its stage" in logged

    caplog.clear()
    _, logged = play(caplog, {"b": Script("raise")}, ContinueWithFallback(without_fallback="skip_branch"))
    assert "WARNING saga s: stage 'c' was skipped: b did not complete" in logged

    caplog.clear()
    _, logged = play(caplog, {"b": Script("skip")})
    assert "DEBUG saga s: stage 'b' was skipped: b has nothing to do" in logged


def test_a_saga_that_halts_and_is_resumed_says_so(caplog: pytest.LogCaptureFixture) -> None:
    script = Script("raise", then=("ok",))
    _, pipeline = scene(SEQUENCE, {"c": script})
    coordinator = SagaCoordinator(FailFast(on_failure="halt"), listeners=[log_events])

    async def main() -> None:
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.resume("s", pipeline, by="anna")

    with caplog.at_level(logging.INFO, "saga"):
        run(main())

    assert lines(caplog)[1:] == [
        "WARNING saga s: stage 'c' raised: CardDeclined: c was declined",
        "WARNING saga s: ended halted: stage 'c' raised: CardDeclined: c was declined",
        "INFO saga s: resumed by anna, going forward",
        "INFO saga s: ended completed",
    ]


def test_what_a_person_settles_is_logged_with_their_note(caplog: pytest.LogCaptureFixture) -> None:
    _, pipeline = scene(SEQUENCE, {"c": Script("raise"), "a": Script(undo_fails=9)})
    coordinator = SagaCoordinator(ONCE, listeners=[log_events])

    async def main() -> None:
        await coordinator.run(pipeline, saga_id="s")
        await coordinator.settle("s", "a", "undone", "refunded\nby hand", by="anna")

    with caplog.at_level(logging.INFO, "saga"):
        run(main())

    assert lines(caplog)[-2:] == [
        "INFO saga s: stage 'a' was settled as undone by anna: refunded by hand",
        "INFO saga s: ended compensated",
    ]


def test_a_child_names_the_stage_that_runs_it(caplog: pytest.LogCaptureFixture) -> None:
    _, trip = scene({"b": ()})
    _, pipeline = scene(SEQUENCE)

    with caplog.at_level(logging.INFO, "saga"):
        run(SagaCoordinator(listeners=[log_events]).run(pipeline.with_stage("trip", nested(trip)), saga_id="s"))

    assert "INFO saga s/trip: started 'scene', 1 stage for stage 'trip' of saga s" in lines(caplog)


def test_a_record_has_the_ids_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    play(caplog, {"c": Script("raise")}, FailFast(retry=Retry(attempts=2)))

    fields = [(r.__dict__["saga_id"], r.__dict__["saga_event"], r.__dict__["stage"], r.__dict__["attempt"]) for r in caplog.records]
    assert fields[0] == ("s", "saga_started", None, None)
    assert ("s", "stage_started", "c", 2) in fields
    assert ("s", "stage_failed", "c", 2) in fields
    assert ("s", "stage_completed", "a", None) in fields


def test_no_field_of_a_record_takes_the_place_of_its_message_in_structlog(caplog: pytest.LogCaptureFixture) -> None:
    """It keeps what is said under `event`, and its ExtraAdder puts a record's fields beside that."""
    play(caplog, {"c": Script("raise")})

    told = [{"event": record.getMessage()} | record.__dict__ for record in caplog.records]

    assert "saga s: stage 'c' raised: CardDeclined: c was declined" in [line["event"] for line in told]


def test_one_event_is_one_line_whatever_a_stage_says(caplog: pytest.LogCaptureFixture) -> None:
    failure = Failure.of("pay", FailureKind.EXCEPTION, "declined\n  by the bank\r\nfor good\x1b[2J", type="Declined", attempt=1)

    with caplog.at_level(logging.DEBUG, "saga"):
        log_events("s", StageFailed(stage="pay", failure=failure))

    assert lines(caplog) == ["WARNING saga s: stage 'pay' raised: Declined: declined by the bank for good\\u001b[2J"]


def test_levels_that_only_rare_events_reach(caplog: pytest.LogCaptureFixture) -> None:
    failure = Failure.of("pay", FailureKind.COMPENSATION, "no answer", attempt=1)
    unanswered = Failure.raised("pay", OSError("busy"), attempt=1, kind=FailureKind.COMPENSATION, of_probe=True)
    given_up = Failure.raised("pay", OSError("busy"), attempt=2, kind=FailureKind.COMPENSATION, of_probe=True)
    within = Failure.of("pay", FailureKind.COMPENSATION, "something came late: its saga s/pay is stuck", attempt=1)

    with caplog.at_level(logging.DEBUG, "saga"):
        log_events("s", StageProbed(stage="pay", landed=True))
        log_events("s", StageProbed(stage="pay", landed=None, failure=unanswered, will_retry=True))
        log_events("s", StageProbed(stage="pay", landed=None, failure=given_up))
        log_events("s", StageProbed(stage="pay", landed=None, failure=within))
        log_events("s", StageProbed(stage="pay", landed=None, failure=Failure.of("pay", FailureKind.LATE, "look"), held=True))
        log_events("s", CompensationFailed(stage="pay", failure=failure, past_pivot=True))
        log_events("s", SagaResumed(forward=False, by="anna"))
        log_events("s", SagaStopped(cause=Failure.of(None, FailureKind.INTERRUPTED, "the caller was cancelled")))
        log_events("s", EffectRecorded(stage="pay", effect="a secret"))
        log_events("s", FallbackFailed(stage="pay", failure=failure))
        log_events("s", StageCompleted(stage="pay", output=StageOutput.ok(), late=True))
        log_events("s", CompensationCompleted(stage="pay", late=True))

    assert lines(caplog) == [
        "DEBUG saga s: stage 'pay' was probed: its effect landed",
        "WARNING saga s: the probe of stage 'pay' gave no answer: OSError: busy; another attempt follows",
        "ERROR saga s: the probe of stage 'pay' gave no answer at attempt 2: OSError: busy",
        "ERROR saga s: stage 'pay' could not be compensated: something came late: its saga s/pay is stuck",
        "ERROR saga s: stage 'pay' is in question: look",
        "WARNING saga s: stage 'pay' is past a pivot of its own and can't be undone: stage 'pay' could not be compensated: no answer",
        "INFO saga s: resumed by anna, going backward",
        "WARNING saga s: starts no further stage: the saga was interrupted: the caller was cancelled",
        "DEBUG saga s: stage 'pay' recorded an effect",
        "WARNING saga s: the fallback of stage 'pay' failed: stage 'pay' could not be compensated: no answer",
        "WARNING saga s: stage 'pay' completed late, after it had been given up",
        "WARNING saga s: stage 'pay' was undone late, after its compensation had been given up",
    ]


def test_of_outputs_the_log_shows_no_more_than_the_glimpse_that_a_failure_has(caplog: pytest.LogCaptureFixture) -> None:
    async def gives(_: Any) -> Any:
        return {"card": "4111"}

    async def gives_no_output(_: Any) -> Any:
        return ["5500" * 100]

    pipeline = Pipeline(name="pay").with_stage("pay", compensable(gives, nothing))
    pipeline = pipeline.with_stage("book", compensable(gives_no_output, nothing), dependencies=("pay",))

    with caplog.at_level(logging.DEBUG, "saga"):
        run(SagaCoordinator(listeners=[log_events]).run(pipeline, saga_id="s"))

    assert "4111" not in caplog.text
    assert {line.rpartition("got ")[2] for line in lines(caplog) if "5500" in line} == {f"{['5500' * 100]!r}"[:200] + "..."}


def test_of_a_stage_that_a_crash_cut_off_no_attempt_is_promised(caplog: pytest.LogCaptureFixture) -> None:
    crashed = Failure.of("pay", FailureKind.CRASHED, "its process is gone")

    with caplog.at_level(logging.WARNING, "saga"):
        log_events("s", StageFailed(stage="pay", failure=crashed, in_doubt=True, will_retry=True))

    assert lines(caplog) == [
        "WARNING saga s: stage 'pay' lost its process: its process is gone; whether its effect landed is in doubt",
    ]


def test_nothing_is_made_for_a_level_that_is_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "saga"):
        log_events("s", SagaEnded(status=SagaStatus.COMPLETED))
        log_events("s", SagaEnded(status=SagaStatus.STUCK))

    assert lines(caplog) == ["ERROR saga s: ended stuck"]


def test_every_event_has_its_words() -> None:
    union, *_ = get_args(AnyEvent)

    assert set(_SAY) == set(get_args(union))


class Told:
    """A sink of stageflow's that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    async def emit(self, *, type: str, data: dict[str, Any] | None) -> None:  # noqa: A002 - stageflow's name
        raise AssertionError("a saga does not wait for a sink")

    def try_emit(self, *, type: str, data: dict[str, Any] | None) -> None:  # noqa: A002 - stageflow's name
        self.events.append((type, data))


def test_a_sink_gets_every_event_as_plain_data() -> None:
    sink = Told()
    _, pipeline = scene({"a": (), "b": ("a",)}, {"b": Script("raise")})

    run(SagaCoordinator(listeners=[SinkListener(sink)]).run(pipeline, saga_id="s"))

    assert [name for name, _ in sink.events] == [
        "saga.started",
        "saga.stage_started",
        "saga.stage_completed",
        "saga.stage_started",
        "saga.stage_failed",
        "saga.turned_back",
        "saga.compensation_started",
        "saga.compensation_completed",
        "saga.ended",
    ]
    completed = sink.events[2][1]
    assert completed.pop("at").endswith("Z")
    assert completed == {
        "event": "stage_completed",
        "saga_id": "s",
        "stage": "a",
        "output": {"status": "ok", "data": {"stage": "a"}},
        "late": False,
        "not_kept": None,
    }
    assert "exception" not in sink.events[4][1]["failure"]
    assert sink.events[4][1]["failure"]["message"] == "b was declined"


def test_the_sink_that_stageflow_was_given_is_the_default() -> None:
    sink = Told()
    _, pipeline = scene(BRANCHES)

    async def main() -> None:
        set_event_sink(sink)
        await SagaCoordinator(listeners=[SinkListener()]).run(pipeline)
        clear_event_sink()

    run(main())

    assert sink.events[-1][0] == "saga.ended"


def test_a_sink_that_raises_harms_no_saga_and_no_other_listener(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Told):
        def try_emit(self, *, type: str, data: dict[str, Any] | None) -> None:  # noqa: A002 - stageflow's name
            raise ConnectionError("the sink is gone")

    sink = Told()
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    report = run(SagaCoordinator(listeners=[SinkListener(Broken()), SinkListener(sink)]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert len(sink.events) == len([line for line in lines(caplog) if "a listener failed on" in line])
    assert sink.events[-1][0] == "saga.ended"


class Refused(logging.Handler):
    """A handler of somebody's own, whose server does not answer."""

    def emit(self, _record: logging.LogRecord) -> None:
        raise ConnectionError("the log server is gone")


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
def test_a_handler_of_the_log_that_raises_harms_no_saga(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    log, handler = logging.getLogger("saga"), Refused()
    log.addHandler(handler)
    before = log.level
    log.setLevel(level)
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    try:
        report = run(SagaCoordinator(listeners=[log_events]).run(pipeline))
    finally:
        log.setLevel(before)
        log.removeHandler(handler)

    assert report.status is SagaStatus.COMPENSATED
    assert not world.standing
    said = capsys.readouterr().err
    assert "ConnectionError: the log server is gone" in said
    assert "a listener failed on" in said


def test_a_log_that_goes_to_a_stderr_that_was_closed_harms_no_saga(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program closes it that goes into the background: Python's own handlers then raise a ValueError."""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    log = logging.getLogger("saga")
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(closed)])
    monkeypatch.setattr(log, "propagate", False)
    world, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    report = run(SagaCoordinator(listeners=[log_events]).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert not world.standing


def test_what_a_listener_takes_out_of_an_event_is_missing_for_no_one_else() -> None:
    """As `redact` may: one that hides what it then sends somewhere is no reason for a compensation to do without."""
    undone: list[Any] = []
    told: list[Any] = []

    def hide(_: str, event: AnyEvent) -> None:
        if isinstance(event, StageCompleted):
            event.output.data.pop("card")
        if isinstance(event, EffectRecorded):
            event.effect["card"] = "hidden"

    def hear(_: str, event: AnyEvent) -> None:
        if isinstance(event, StageCompleted):
            told.append(event.output.data)

    async def charge(ctx: SagaContext) -> dict[str, Any]:
        await ctx.record({"card": "4711"})
        return {"card": "4711"}

    async def refund(ctx: CompensationContext) -> None:
        assert ctx.output is not None
        undone.extend((ctx.output.data, *ctx.effects))

    async def ship(_: Any) -> StageOutput:
        return StageOutput.fail("no lorry")

    pipeline = Pipeline(name="p").with_stage("charge", compensable(charge, refund))
    pipeline = pipeline.with_stage("ship", ship, "work", dependencies=("charge",))

    report = run(SagaCoordinator(listeners=[hide, hear]).run(pipeline))

    assert undone == [{"card": "4711"}] * 2
    assert told == [{"card": "4711"}]
    assert report.stages["charge"].effects == ({"card": "4711"},)


def test_what_a_listener_takes_out_of_a_sagas_input_is_there_for_whoever_undoes_it_later() -> None:
    undone: list[Any] = []

    def hide(_: str, event: AnyEvent) -> None:
        if isinstance(event, SagaStarted):
            event.input["metadata"].pop("card")

    async def refund(ctx: CompensationContext) -> None:
        undone.append(ctx.snapshot.metadata)

    pipeline = Pipeline(name="p").with_stage("charge", compensable(nothing, refund))
    coordinator = SagaCoordinator(listeners=[hide])
    run(coordinator.run(pipeline, saga_id="s", metadata={"card": "4711"}))

    run(coordinator.compensate("s", pipeline))

    assert undone == [{"card": "4711"}]


class Counted:
    """Counts how often it is copied."""

    copies = 0

    def __deepcopy__(self, _: Any) -> Counted:
        Counted.copies += 1
        return self


def test_only_who_may_change_what_it_is_told_is_given_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large output takes longer to copy than to log, and OpenTelemetry's listener held a second one of each in a saga that ran."""

    class Hiding(OpenTelemetryListener): ...

    async def book(_: Any) -> dict[str, Any]:
        return {"seats": Counted()}

    def copies_with(*listeners: Listener) -> int:
        monkeypatch.setattr(Counted, "copies", 0)
        run(SagaCoordinator(listeners=listeners).run(Pipeline(name="p").with_stage("book", book, "work")))
        return Counted.copies

    without = copies_with()

    assert copies_with(log_events, OpenTelemetryListener(), SinkListener()) == without
    assert copies_with(Hiding(), lambda _, event: log_events("s", event)) == without + 2


def test_a_signal_that_strikes_a_listener_ends_the_program() -> None:
    def listener(_saga_id: str, _event: Any) -> None:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run(SagaCoordinator(listeners=[listener]).run(scene(SEQUENCE)[1]))
