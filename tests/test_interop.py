"""What others make of a report: exceptions, stageflow's results, JSON."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from stageflow.api import Pipeline, PipelineResults, StageContext, StageOutput

from saga import (
    Compensation,
    ContinueWithFallback,
    FailFast,
    MemoryLedger,
    PolicyInvalid,
    Retry,
    SagaCoordinator,
    SagaError,
    SagaFailed,
    SagaReport,
    SagaStatus,
    load_policy,
    nested,
)
from saga.events import event_to_json
from saga.schemas import main, schemas
from tests.controlled import run
from tests.world import FAN_IN, SEQUENCE, CardDeclined, Script, scene

COMMITTED = Path(__file__).parent.parent / "schemas"


class NoteworthyError(Exception):
    pass


async def find_fault(_ctx: Any) -> None:
    error = NoteworthyError("the card expired")
    error.add_note("expired in 2025")
    raise error


def failed_twice() -> SagaReport:
    """`pay` raises with a note, and `a` can't be undone."""
    _, pipeline = scene({"a": ()}, {"a": Script(undo_fails=9)})
    pipeline = pipeline.with_stage("pay", find_fault, "work", dependencies=("a",))
    return run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1)))).run(pipeline, saga_id="s"))


def raised(report: SagaReport) -> SagaFailed:
    with pytest.raises(SagaFailed) as caught:
        report.raise_for_status()
    return caught.value


def test_the_members_are_the_very_exceptions_with_their_tracebacks_and_notes() -> None:
    noteworthy, declined = raised(failed_twice()).exceptions

    assert isinstance(noteworthy, NoteworthyError)
    assert noteworthy.__notes__ == ["expired in 2025"]
    assert traceback.extract_tb(noteworthy.__traceback__)[-1].name == "find_fault"
    assert isinstance(declined, CardDeclined)
    assert traceback.extract_tb(declined.__traceback__)[-1].name == "compensate"


def test_except_star_splits_them_and_each_part_knows_the_report() -> None:
    report = failed_twice()
    caught: list[BaseException] = []

    try:
        report.raise_for_status()
    except* NoteworthyError as of_pay:
        caught.append(of_pay)
    except* CardDeclined as of_undo:
        caught.append(of_undo)

    assert len(caught) == 2
    for group in caught:
        assert isinstance(group, SagaFailed)
        assert group.report is report


def test_raising_twice_adds_nothing_to_the_exceptions() -> None:
    report = failed_twice()
    first = ["".join(traceback.format_exception(error)) for error in raised(report).exceptions]

    assert ["".join(traceback.format_exception(error)) for error in raised(report).exceptions] == first


def test_a_report_read_from_json_raises_errors_that_carry_the_stored_tracebacks() -> None:
    report = SagaReport.model_validate_json(failed_twice().model_dump_json())

    noteworthy, declined = raised(report).exceptions

    assert type(noteworthy) is SagaError
    assert str(noteworthy) == "stage 'pay' raised: NoteworthyError: the card expired"
    (note,) = noteworthy.__notes__
    assert note.startswith("Traceback (most recent call last):")
    assert "in find_fault" in note
    assert note.endswith("NoteworthyError: the card expired\nexpired in 2025")
    assert "undoing a was declined" in str(declined)


def test_a_failure_without_a_traceback_has_no_note() -> None:
    _, pipeline = scene({"a": ()}, {"a": Script("fail")})

    (error,) = raised(run(SagaCoordinator().run(pipeline))).exceptions

    assert str(error) == "stage 'a' reported a failure: a reports"
    assert not hasattr(error, "__notes__")


def test_an_exception_that_no_group_takes_is_the_cause_of_the_one_that_stands_for_it() -> None:
    async def cancels_itself(_ctx: Any) -> None:
        raise asyncio.CancelledError("enough")

    report = run(SagaCoordinator().run(Pipeline(name="odd").with_stage("a", cancels_itself, "work")))

    (error,) = raised(report).exceptions
    assert report.cause is not None
    assert error.__cause__ is report.cause.exception
    assert isinstance(error.__cause__, asyncio.CancelledError)


def test_a_completed_saga_gives_the_results_that_stageflow_gives() -> None:
    _, pipeline = scene(FAN_IN, {"b": Script("skip")}, dict.fromkeys(FAN_IN, "plain"))
    expected = run(pipeline.run())

    results = run(SagaCoordinator().run(pipeline)).to_pipeline_results()

    assert type(results) is PipelineResults
    assert list(results) == ["a", "b", "c", "d"]
    assert {name: (output.status, output.data) for name, output in results.items()} == {
        name: (output.status, output.data) for name, output in expected.items()
    }
    assert results.require_ok("d").data == {"stage": "d"}


def test_what_was_undone_is_no_result_and_what_failed_is_a_failed_one() -> None:
    _, pipeline = scene(SEQUENCE, {"c": Script("raise")})

    results = run(SagaCoordinator().run(pipeline)).to_pipeline_results()

    assert dict(results) == {"c": StageOutput.fail("c was declined")}
    assert results.failed() == ["c"]
    assert not results.ok("a")


def test_a_fallback_is_a_result_and_a_cancelled_stage_a_cancelled_one() -> None:
    _, fell_back = scene(SEQUENCE, {"b": Script("raise")})
    _, cancelled = scene(SEQUENCE, {"b": Script("cancel")})

    with_fallback = run(SagaCoordinator(ContinueWithFallback(fallbacks={"b": {"price": 0}})).run(fell_back)).to_pipeline_results()
    until_cancel = run(SagaCoordinator().run(cancelled)).to_pipeline_results()

    assert with_fallback["b"] == StageOutput.ok(price=0)
    assert list(with_fallback) == ["a", "b", "c"]
    assert until_cancel["b"] == StageOutput.cancel("b cancels")
    assert list(until_cancel) == ["a", "b"]


@pytest.mark.parametrize("end", [StageOutput.fail("declined", data={"code": 51}), StageOutput.cancel("sold out", data={"code": 52})])
def test_the_data_of_a_fail_or_a_cancel_is_among_the_results(end: StageOutput) -> None:
    async def ends(_ctx: StageContext) -> StageOutput:
        return end

    report = run(SagaCoordinator().run(Pipeline(name="trip").with_stage("a", ends, "work")))

    assert dict(report.to_pipeline_results()) == {"a": end}


def test_a_retry_that_was_not_granted_is_a_failed_one_among_the_results() -> None:
    """stageflow takes a RETRY for completed."""

    async def busy(_ctx: StageContext) -> StageOutput:
        return StageOutput.retry("busy")

    results = run(SagaCoordinator().run(Pipeline(name="trip").with_stage("a", busy, "work"))).to_pipeline_results()

    assert results.failed() == ["a"]


# -- schemas -----------------------------------------------------------------------------------------------------


def test_the_committed_schemas_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "error", "-m", "saga.schemas", str(tmp_path)], check=True, cwd=COMMITTED.parent)

    written = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert written == {path.name: json.loads(path.read_text()) for path in COMMITTED.iterdir()}, "write them again: make schemas"


def test_the_command_makes_its_directory(tmp_path: Path) -> None:
    main([str(tmp_path / "new" / "schemas")])

    assert {path.name for path in (tmp_path / "new" / "schemas").iterdir()} == {"policy.json", "report.json", "events.json"}


@pytest.mark.parametrize("name", ["policy.json", "report.json", "events.json"])
def test_a_schema_is_one_and_every_part_of_it_says_what_it_is(name: str) -> None:
    schema = schemas()[name]

    jsonschema.Draft202012Validator.check_schema(schema)
    for part, described in schema["$defs"].items():
        if described["type"] == "array":
            # A named tuple, and pydantic takes no description from those.
            continue
        assert described["description"], part
        assert "Attributes:" not in described["description"], part


def test_a_fields_description_is_what_the_docstring_says_of_it() -> None:
    fields = schemas()["events.json"]["$defs"]["StageFailed"]["properties"]

    assert fields["in_doubt"]["description"] == "Whether its effect may have landed all the same."
    assert schemas()["report.json"]["$defs"]["CompensationReport"]["description"] == "What became of one stage's compensation."


def lived() -> tuple[list[Any], SagaReport]:
    """The events and the report of a saga with a child, partial effects, a fallback, a probe and something stuck."""
    ledger = MemoryLedger()
    _, trip = scene({"x": ()})
    shape = {"a": (), "b": ("a",), "c": ("b",)}
    scripts = {"a": Script(undo_fails=9), "b": Script("raise"), "c": Script("hang")}
    _, pipeline = scene(shape, scripts, {"a": "recording", "b": "fallback", "c": "probed"})
    pipeline = pipeline.with_stage("trip", nested(trip))
    policy = ContinueWithFallback(timeout=5, compensation=Compensation(retry=Retry(attempts=2)))
    report = run(SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s", input_text="OSL-JFK"))
    return [*run(ledger.read("s")), *run(ledger.read("s/trip"))], report


def test_the_schema_of_the_events_accepts_what_a_ledger_stores() -> None:
    events, report = lived()
    validator = jsonschema.Draft202012Validator(schemas()["events.json"])

    assert report.status is SagaStatus.STUCK
    assert len({type(event) for event in events}) > 10
    for event in events:
        validator.validate(json.loads(event_to_json(event)))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"event": "stage_started", "stage": "a"})


def test_the_schema_of_the_report_accepts_what_a_report_writes_down_to_its_children() -> None:
    _, report = lived()
    written = json.loads(report.model_dump_json())
    validator = jsonschema.Draft202012Validator(schemas()["report.json"])

    validator.validate(written)
    written["stages"]["trip"]["children"][0]["status"] = "splendid"
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(written)


def test_the_schema_of_the_policy_accepts_what_may_be_written_and_refuses_an_unknown_key() -> None:
    validator = jsonschema.Draft202012Validator(schemas()["policy.json"])

    validator.validate({"policy": "fail_fast", "retry": {"attempts": 3}, "deadline": 60})
    validator.validate(json.loads(ContinueWithFallback(fallbacks={"price": {"amount": 0}}).model_dump_json()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"policy": "fail_fast", "retries": 3})


@pytest.mark.parametrize("keys", [{}, {"fallbacks": {"price": {}}}, {"without_fallback": "fail"}, {"timeout": 5}])
def test_what_does_not_say_which_policy_it_is_is_refused_by_the_schema_as_by_the_reader(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps(keys))

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schemas()["policy.json"]).validate(keys)
    with pytest.raises(PolicyInvalid, match="got no key policy"):
        load_policy(tmp_path / "policy.json")
