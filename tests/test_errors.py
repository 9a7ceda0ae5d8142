"""What every error of saga can do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context

import pytest
from stageflow.api import Pipeline, StageContext

from saga import SagaCoordinator, SagaError, SagaFailed, SagaReport, SagaStatus, nested
from saga.errors import (
    GraphChanged,
    LedgerConflict,
    LedgerCorrupt,
    LedgerError,
    MisuseError,
    NotStorable,
    PipelineInvalid,
    PolicyInvalid,
    SagaExists,
    SagaNotFound,
    SagasDamaged,
    SagaUnrecorded,
)
from saga.report import NestedSagaFailed
from saga.testing.rehearsal import ProcessDied
from tests.controlled import run
from tests.stories import three_stages
from tests.world import SEQUENCE, Script, scene


def failed() -> SagaFailed:
    group = SagaFailed("saga s (trip) is halted", [ValueError("declined"), LedgerError("gone")])
    group.report = three_stages()
    return group


ERRORS = [
    SagaError("it was undone on demand"),
    *(kind("a stage", got="none", stage="pay", hint="Give one.") for kind in (MisuseError, PipelineInvalid, PolicyInvalid)),
    *(kind("a saga id", got="'s'") for kind in (SagaExists, SagaNotFound)),
    GraphChanged("s", ["stage 'pay' is gone"]),
    LedgerError("no such table"),
    LedgerCorrupt("event 3 is no JSON"),
    SagasDamaged({}, []),
    LedgerConflict.held("s", holder="a", until=datetime(2026, 3, 14, tzinfo=UTC)),
    SagaUnrecorded("s", OSError("disk full"), in_effect=["a"], unknown=["b"], goes_on="resume('s', pipeline)", asked_in_vain=False),
    ProcessDied("the process is gone"),
    NotStorable("data['connection']", "plain data at data['connection']", "a socket"),
    failed(),
    NestedSagaFailed(three_stages()),
]


def kinds(base: type[SagaError] = SagaError) -> Iterator[type[SagaError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def test_every_kind_of_error_is_looked_at() -> None:
    assert {kind for kind in kinds() if kind.__module__.startswith("saga.")} == set(map(type, ERRORS))


def facts(error: BaseException) -> tuple[object, ...]:
    """All that can be told of an error; members of a group are no values, so they are told, too."""
    members = [facts(member) for member in error.exceptions] if isinstance(error, BaseExceptionGroup) else list(error.args)
    return type(error), str(error), members, error.__dict__


def pickled(error: SagaError) -> SagaError:
    return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return] # noqa: S301 - our own bytes


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_copied_and_pickled_with_its_attributes_notes_and_text(
    error: SagaError, again: Callable[[SagaError], SagaError]
) -> None:
    error.add_note("seen at noon")

    assert facts(again(error)) == facts(error)


def test_a_report_that_holds_the_failure_of_a_nested_saga_is_copied() -> None:
    _, child = scene(SEQUENCE, {"b": Script("raise")})
    report = run(SagaCoordinator().run(Pipeline(name="parent").with_stage("child", nested(child))))

    copied: SagaReport = copy.deepcopy(report)

    assert copied == report
    assert report.cause is not None
    assert copied.cause is not None
    assert isinstance(copied.cause.exception, NestedSagaFailed)
    assert str(copied.cause.exception) == str(report.cause.exception)


class Unavailable(Exception):
    """As those of HTTP clients: it can be pickled, and not be made again from that."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


async def charge(ctx: StageContext) -> None:
    raise Unavailable(f"no answer to {ctx.stage_name}", code=503)


def run_in_a_worker() -> SagaReport:
    pipeline = Pipeline(name="child").with_stage("charge", charge, "work")
    return run(SagaCoordinator().run(Pipeline(name="parent").with_stage("pay", nested(pipeline)), saga_id="s"))


def test_a_report_comes_back_from_a_worker_process_whatever_its_stages_raised() -> None:
    here = run_in_a_worker()

    with ProcessPoolExecutor(1, get_context("spawn")) as workers:
        there = workers.submit(run_in_a_worker).result()

    assert here.cause is not None
    assert here.cause.exception is not None
    assert there.cause is not None
    assert there.cause.exception is None
    assert there.status is SagaStatus.COMPENSATED
    assert list(map(str, there.failures)) == list(map(str, here.failures))
    with pytest.raises(SagaFailed) as failed:
        there.raise_for_status()
    assert ["Unavailable: no answer to charge" in note for error in failed.value.exceptions for note in error.__notes__] == [True, True]


def fail_in_a_worker() -> None:
    run_in_a_worker().raise_for_status()


def test_a_failed_saga_comes_back_from_a_worker_process_whatever_its_stages_raised() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as workers, pytest.raises(SagaFailed) as failed:
        workers.submit(fail_in_a_worker).result()

    _, declined = failed.value.exceptions
    assert failed.value.report.status is SagaStatus.COMPENSATED
    assert str(declined) == "Unavailable: no answer to charge"
    assert "Unavailable: no answer to charge" in declined.__notes__[0]


def test_only_what_can_not_be_made_again_is_replaced_when_a_failed_saga_is_pickled() -> None:
    with pytest.raises(SagaFailed) as here:
        fail_in_a_worker()

    there = pickled(here.value)

    assert isinstance(there, SagaFailed)
    assert [type(error) for error in here.value.exceptions] == [NestedSagaFailed, Unavailable]
    assert [type(error) for error in there.exceptions] == [NestedSagaFailed, SagaError]


def test_a_report_is_copied_whatever_its_stages_raised() -> None:
    here = run_in_a_worker()

    copied = copy.deepcopy(here)

    assert copied == here
    assert copied is not here
    assert any(isinstance(failure.exception, Unavailable) for failure in copied.failures)


def test_a_conflict_names_the_holder_once_and_says_what_to_do() -> None:
    holder = "host/4711/1234567/4026531836/a2b5c2d0/9f86d081"

    at_most = LedgerConflict.held("s", holder=holder, until=datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC))
    for_ever = LedgerConflict.held("s", holder=holder)

    assert str(at_most) == (
        f"saga s is held by {holder}. Wait until it lets go, or until 2026-03-14 09:26:53 UTC if it says nothing more; "
        "or go on with the saga where it is held"
    )
    assert str(for_ever) == f"saga s is held by {holder}. Wait until it lets go; or go on with the saga where it is held"
