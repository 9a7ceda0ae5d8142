"""What can't work is refused before anything runs, with an error that names the stage, what was expected and what it got."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import re
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol, get_args, get_origin, get_type_hints
from uuid import UUID

import pytest
from stageflow import BaseInterceptor
from stageflow.api import Pipeline, PipelineContext, StageKind
from stageflow.pipeline.guard_retry import GuardRetryStrategy
from stageflow.pipeline.interceptors import InterceptorResult, TimeoutInterceptor
from stageflow.pipeline.pipeline import UnifiedStageSpec
from stageflow.pipeline.retry import RetryInterceptor

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    GraphChanged,
    MemoryLedger,
    MisuseError,
    PipelineInvalid,
    PivotStage,
    PolicyInvalid,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaExists,
    SagaNotFound,
    SagaReport,
    SagaStatus,
    compensable,
    nested,
)
from saga.blueprint import Blueprint
from saga.events import SagaStarted, event_from_json, event_to_json
from saga.graph import Graph, Node, Role
from saga.ledgers.sqlite import SQLiteLedger
from saga.policies import load_policy
from tests.controlled import elapse, run
from tests.slow import SlowDisk
from tests.world import SEQUENCE, CardDeclined, Script, nothing, scene


class Good(CompensableStage):
    async def execute(self, ctx: SagaContext) -> None:
        raise AssertionError("nothing may run")

    async def compensate(self, ctx: CompensationContext) -> None: ...


async def good(_: Any) -> None:
    raise AssertionError("nothing may run")


@wraps(good)
def timed(ctx: Any) -> Any:
    return good(ctx)


async def yields(_: Any) -> Any:
    yield 1


class SyncExecute:
    kind = StageKind.WORK

    def execute(self, ctx: SagaContext) -> None: ...


class SyncCompensate(Good):
    def compensate(self, ctx: CompensationContext) -> None: ...  # type: ignore[override] # what the test is about


class SyncProbe(Good):
    def probe(self, ctx: CompensationContext) -> None: ...


class NeedsConfig(Good):
    def __init__(self, amount: int) -> None: ...


class NegativeTimeout(Good):
    timeout = -1.0


class OddRetry(Good):
    retry = 3  # type: ignore[assignment] # what the test is about


class NamesItsCompensation:
    compensate = "refund"

    async def execute(self, ctx: SagaContext) -> None: ...

    async def refund(self, ctx: CompensationContext) -> None: ...


class KnowsItsFallback(Good):
    fallback: ClassVar = {"amount": 0}


class AnswersWhetherIdempotent(Good):
    def idempotent(self) -> bool:  # type: ignore[override] # what the test is about
        return False


class CopesWithNo(Good):
    compensate_in_doubt = "no"  # type: ignore[assignment] # what the test is about


class SpeaksForAll(Good):
    compensation = Compensation(timeout=5, deadline=60, on_failure="halt")


class Twice:
    retry: Retry | None = Retry(attempts=2, wait=0)


class TwiceTooLate(Good, Twice): ...


class SyncUndoOfCallable:
    async def __call__(self, ctx: SagaContext) -> None: ...

    def compensate(self, ctx: CompensationContext) -> None: ...


class Abstract(CompensableStage):
    async def execute(self, ctx: SagaContext) -> None: ...


class UndoablePivot(PivotStage):
    async def execute(self, ctx: SagaContext) -> None: ...

    async def compensate(self, ctx: CompensationContext) -> None: ...


def spec(name: str, runner: Any = good, dependencies: tuple[str, ...] = ()) -> UnifiedStageSpec:
    return UnifiedStageSpec(name, runner, StageKind.WORK, dependencies)


def pipeline(*specs: UnifiedStageSpec) -> Pipeline:
    return Pipeline(name="bad", stages={one.name: one for one in specs})


PIPELINES: dict[str, tuple[Pipeline, str]] = {
    "empty": (Pipeline(), "expected a pipeline with at least one stage, got an empty one"),
    "cycle": (
        pipeline(spec("a", dependencies=("c",)), spec("b", dependencies=("a",)), spec("c", dependencies=("b",))),
        "expected dependencies without a cycle, for stage 'a', got a -> c -> b -> a",
    ),
    "itself": (pipeline(spec("a", dependencies=("a",))), "expected dependencies without a cycle, for stage 'a', got a -> a"),
    "unknown dependency": (
        pipeline(spec("a"), spec("b", dependencies=("z",))),
        "expected dependencies out of the pipeline's stages (a, b), for stage 'b', got 'z'",
    ),
    "misspelt dependency": (
        pipeline(spec("seat"), spec("room"), spec("pay", dependencies=("room", "saet"))),
        "expected dependencies out of the pipeline's stages (seat, room, pay), for stage 'pay', got 'saet'. Did you mean 'seat'?",
    ),
    "a str that was made a tuple of its characters": (
        Pipeline().with_stage("room", good, "work").with_stage("pay", good, "work", dependencies="room"),  # type: ignore[arg-type] # what the test is about
        "expected dependencies to be a tuple of names, for stage 'pay', got the str 'room'. Write ('room',).",
    ),
    "a str of which no stage is named": (
        pipeline(spec("a"), spec("b", dependencies=tuple("rom"))),
        "expected dependencies to be a tuple of names, for stage 'b', got the str 'rom'",
    ),
    "a str as it is": (
        pipeline(spec("a"), spec("b"), spec("c", dependencies="ab")),  # type: ignore[arg-type] # what the test is about
        "expected dependencies to be a tuple of names, for stage 'c', got the str 'ab'",
    ),
    "empty name": (pipeline(spec("")), "expected a stage name with at least one visible character, for stage '', got ''"),
    "blank name": (pipeline(spec(" ")), "expected a stage name with at least one visible character, for stage ' ', got ' '"),
    "name with a slash": (
        pipeline(spec("pay/fee")),
        "expected a stage name in UTF-8 without '/' that doesn't end in ~ or # and a number, got 'pay/fee'",
    ),
    "name of a second execution": (pipeline(spec("pay~2")), "expected a stage name in UTF-8 without '/'"),
    "name of a second child": (pipeline(spec("pay#2")), "expected a stage name in UTF-8 without '/'"),
    "name of an attempt's second child": (pipeline(spec("pay#2.2")), "expected a stage name in UTF-8 without '/'"),
    "name that no file holds": (
        pipeline(spec("pay\ud800")),
        "expected a stage name in UTF-8 without '/' that doesn't end in ~ or # and a number",
    ),
    "sync execute": (
        pipeline(spec("pay", SyncExecute())),
        "expected an async execute, for stage 'pay', got the plain def SyncExecute.execute",
    ),
    "sync execute of a class": (pipeline(spec("pay", SyncExecute)), "expected an async execute, for stage 'pay'"),
    "async generator": (
        pipeline(spec("pay", yields)),
        "expected an async execute, for stage 'pay', got the async generator yields. Return, and don't yield.",
    ),
    "async below a sync decorator": (
        pipeline(spec("pay", timed)),
        "expected an async execute, for stage 'pay', got the plain def good. It is async below its decorator: write async def",
    ),
    "sync callable": (pipeline(spec("pay", print)), "expected an async execute, for stage 'pay', got the plain def print"),
    "partial of a class": (
        pipeline(spec("pay", partial(NeedsConfig, amount=3))),
        (
            "expected an async execute, for stage 'pay', got functools.partial(<class 'tests.test_misuse.NeedsConfig'>, amount=3), "
            "which makes a stage. Give the pipeline the class, and its arguments as config={...}."
        ),
    ),
    "sync compensate": (pipeline(spec("pay", SyncCompensate)), "expected an async compensate, for stage 'pay', got the plain def"),
    "sync probe": (pipeline(spec("pay", SyncProbe)), "expected an async probe, for stage 'pay'"),
    "no stage at all": (pipeline(spec("pay", 42)), "expected a stage with an async execute, for stage 'pay', got 42"),
    "a pipeline as a stage": (
        pipeline(spec("pay", Pipeline(name="card"))),
        (
            "expected a stage with an async execute, for stage 'pay', got Pipeline(name='card', stages={}). "
            "A pipeline becomes a stage by nested(pipeline)."
        ),
    ),
    "missing config": (pipeline(spec("pay", NeedsConfig)), "expected a stage that can be built, for stage 'pay', got TypeError"),
    "negative timeout": (
        pipeline(spec("pay", NegativeTimeout)),
        "expected timeout to be None or more than 0 seconds, for stage 'pay', got -1.0",
    ),
    "name of a compensation": (
        pipeline(spec("pay", NamesItsCompensation)),
        "expected an async compensate, for stage 'pay', got 'refund'",
    ),
    "fallback that is known": (pipeline(spec("pay", KnowsItsFallback)), "expected an async fallback, for stage 'pay', got {'amount': 0}"),
    "idempotent that is asked": (
        pipeline(spec("pay", AnswersWhetherIdempotent)),
        "expected idempotent to be a bool or None, for stage 'pay', got <bound method AnswersWhetherIdempotent.idempotent",
    ),
    "compensate_in_doubt in words": (
        pipeline(spec("pay", CopesWithNo)),
        "expected compensate_in_doubt to be a bool or None, for stage 'pay', got 'no'",
    ),
    "mixin behind the base of a wrapped stage": (
        pipeline(spec("pay", compensable(TwiceTooLate, good))),
        "expected the retry of Twice to count, for stage 'pay', got the default of SagaStage. Name Twice first among the bases of T",
    ),
    "mixin behind the base": (
        pipeline(spec("pay", TwiceTooLate)),
        "expected the retry of Twice to count, for stage 'pay', got the default of SagaStage. Name Twice first among the bases of T",
    ),
    "compensation of all stages": (
        pipeline(spec("pay", SpeaksForAll)),
        "expected compensation to say its retry and timeout, for stage 'pay', got on_failure, deadline. The rest is",
    ),
    "sync compensate of a callable": (pipeline(spec("pay", SyncUndoOfCallable())), "expected an async compensate, for stage 'pay', got"),
    "odd retry": (pipeline(spec("pay", OddRetry)), "expected retry to be a Retry or None, for stage 'pay', got 3"),
    "abstract": (pipeline(spec("pay", Abstract)), "expected Abstract to define compensate(), for stage 'pay', got a class without"),
    "pivot with compensation": (pipeline(spec("pay", UndoablePivot)), "expected a pivot without compensate()"),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_a_pipeline_that_cannot_work_is_refused(case: str) -> None:
    bad, message = PIPELINES[case]
    coordinator = SagaCoordinator()

    with pytest.raises(PipelineInvalid) as caught:
        run(coordinator.run(bad))

    assert str(caught.value).startswith(message)
    assert run(coordinator.ledger.list()) == ()


def test_a_mixin_before_the_base_counts() -> None:
    class TwiceInTime(Twice, Good): ...

    assert Blueprint.of(pipeline(spec("pay", TwiceInTime))).stages["pay"].retry == Twice.retry


def test_a_mixin_behind_the_base_of_a_wrapped_stage_may_say_what_nobody_reads_of_it() -> None:
    class Harmless:
        has_effect: bool | None = False

    class HarmlessLast(Good, Harmless): ...

    assert Blueprint.of(pipeline(spec("pay", compensable(HarmlessLast, good)))).graph["pay"].role is Role.COMPENSABLE


def test_a_mixin_behind_the_base_counts_with_what_its_objects_have_of_their_own() -> None:
    @dataclass
    class Patient:
        timeout: float | None = 3.0

    class PatientLast(Good, Patient): ...

    assert Blueprint.of(pipeline(spec("pay", PatientLast))).stages["pay"].timeout == 3


def test_a_mixin_behind_the_base_may_say_what_that_says() -> None:
    class MayRetry(Protocol):
        retry: Retry | None = None

    class RetryLast(Good, MayRetry): ...

    assert Blueprint.of(pipeline(spec("pay", RetryLast))).stages["pay"].retry is None


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(PipelineInvalid, match="expected a stageflow Pipeline, got 'pipeline'"):
        run(SagaCoordinator().run("pipeline"))  # type: ignore[arg-type] # what the test is about


def test_what_cannot_be_made_compensable_is_refused() -> None:
    async def undo(_: CompensationContext) -> None: ...

    with pytest.raises(PipelineInvalid, match="expected a stage class, a stage instance or an async callable, got 42"):
        compensable(42, undo)  # type: ignore[arg-type] # what the test is about


def test_a_runner_without_anything_that_undoes_it_is_refused() -> None:
    with pytest.raises(PipelineInvalid, match=r"^expected an async callable that undoes it, got None\. What has none ") as caught:
        compensable(good, None)  # type: ignore[arg-type] # what the test is about

    assert str(caught.value).endswith("What has none stays as it is: give the pipeline the runner itself.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"probe": 3}, "an async callable as its probe, got 3"),
        (
            {"fallback": {"price": 0}},
            "an async callable as its fallback, got {'price': 0}. An output that is known beforehand is the policy's: ",
        ),
    ],
)
def test_what_can_not_be_called_is_no_probe_and_no_fallback(given: dict[str, Any], said: str) -> None:
    """It was passed over: nobody was asked, and nothing stood in."""
    with pytest.raises(PipelineInvalid) as caught:
        compensable(good, good, **given)

    assert str(caught.value).startswith(f"expected {said}")


POLICIES: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown key": (lambda: FailFast(retrys=1), "got 'retrys'. Did you mean 'retry'?"),  # type: ignore[call-arg] # what the test is about
    "unknown key in a part": (lambda: Compensation(nothing_like_it=1), "in Compensation, got 'nothing_like_it'"),  # type: ignore[call-arg] # as above
    "negative timeout": (lambda: FailFast(timeout=-1), "expected greater than 0 for FailFast.timeout, got -1"),
    "infinite timeout": (lambda: FailFast(timeout=float("inf")), "expected a finite number for FailFast.timeout, got inf"),
    "negative timeout of a compensation": (lambda: Compensation(timeout=-5), "expected greater than 0 for Compensation.timeout, got -5"),
    "no attempt": (lambda: Retry(attempts=0), "expected greater than or equal to 1 for Retry.attempts, got 0"),
    "odd retry_on": (lambda: Retry(retry_on=(3,)), "expected failure kinds, exception types or their qualified names for Retry.retry_on"),
    "single odd retry_on": (lambda: Retry(retry_on=3), "expected failure kinds"),
    "a misspelt failure kind in retry_on": (
        lambda: Retry(retry_on=["timeout", "exeption"]),
        "or the name of an exception for Retry.retry_on, got 'exeption'. Did you mean 'exception'?",
    ),
    "a misspelt exception in retry_on": (
        lambda: Retry(attempts=3, retry_on="ConectionError"),
        "expected an exception of Python's own, or one with its module, for Retry.retry_on, got 'ConectionError'. Did you mean 'Conn",
    ),
    "an exception without its module in retry_on": (
        lambda: Retry(attempts=3, retry_on="CardDeclined"),
        "expected an exception of Python's own, or one with its module, for Retry.retry_on, got 'CardDeclined'. As in payments.CardD",
    ),
    "a misspelt exception of a module in retry_on": (
        lambda: Retry(attempts=3, retry_on=["json.JSONDecodeEror"]),
        "expected an exception of json for Retry.retry_on, got 'json.JSONDecodeEror'. Did you mean 'json.JSONDecodeError'?",
    ),
    "what a module of Python's own lacks in retry_on": (
        lambda: Retry(attempts=3, retry_on=["json.TimeoutError"]),
        "expected an exception of json for Retry.retry_on, got 'json.TimeoutError'",
    ),
    "a misspelt exception of a package in retry_on": (
        lambda: Retry(attempts=3, retry_on=["tenacity.RetryEror"]),
        "expected an exception of tenacity for Retry.retry_on, got 'tenacity.RetryEror'. Did you mean 'tenacity.RetryError'?",
    ),
    "a word that is no failure kind in retry_on": (
        lambda: Retry(retry_on="rain"),
        "expected one of exception, reported, timeout, compensation, or the name of an exception for Retry.retry_on, got 'rain'",
    ),
    "a kind of failure that is never tried again": (
        lambda: Retry(attempts=2, retry_on="crashed"),
        "expected one of exception, reported, timeout, compensation, or the name of an exception for Retry.retry_on, got 'crashed'",
    ),
    "how to wait for no further attempt": (
        lambda: Retry(wait=5, max_elapsed=60),
        "expected attempts in Retry, got max_elapsed, wait alone. Without it there is one attempt, whatever else is said of others.",
    ),
    "how to wait for a compensation, and how often no more": (
        lambda: Compensation(retry={"wait": 5}),
        "expected attempts in Retry, got wait alone",
    ),
    "a wait beyond the longest one": (
        lambda: Retry(attempts=2, wait=60),
        "expected at least wait, 60, for Retry.wait_max, got 30",
    ),
    "a stage's kinds of failure for a compensation": (
        lambda: Compensation(retry=Retry(attempts=2, retry_on=["timeout", "reported", "ConnectionError"])),
        "expected the kind compensation, or exceptions, for Compensation.retry.retry_on, got 'reported', 'timeout'",
    ),
    "a boolean for seconds": (lambda: FailFast(timeout=True), "expected a valid number for FailFast.timeout, got True"),
    "a boolean for seconds that may be none": (lambda: Retry(wait=False), "expected a valid number for Retry.wait, got False"),
    "a boolean for a factor": (lambda: Retry(multiplier=True), "expected a valid number for Retry.multiplier, got True"),
    "a boolean for a count": (lambda: Retry(attempts=True), "expected a valid integer for Retry.attempts, got True"),
    "a boolean for a limit": (
        lambda: Compensation(max_concurrency=True),
        "expected a valid integer for Compensation.max_concurrency, got True",
    ),
    "a number for a part": (
        lambda: FailFast(retry=3),
        "expected a Retry or a table of its keys (attempts, wait, multiplier, wait_max, jitter, max_elapsed, retry_on), got 3",
    ),
    "odd choice": (lambda: FailFast(on_failure="panic"), "expected 'compensate' or 'halt' for FailFast.on_failure, got 'panic'"),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_that_makes_no_sense_is_refused(case: str) -> None:
    build, message = POLICIES[case]

    with pytest.raises(PolicyInvalid) as caught:
        build()

    assert message in str(caught.value)
    assert "expected" in str(caught.value)


COPIES: dict[str, tuple[Callable[[], Any], str]] = {
    "a typo": (lambda: FailFast().model_copy(update={"dedline": 5}), "Did you mean 'deadline'?"),
    "seconds as text": (lambda: FailFast().model_copy(update={"timeout": "5"}), "for FailFast.timeout, got '5'"),
    "odd choice": (lambda: FailFast().model_copy(update={"on_failure": "stop"}), "expected 'compensate' or 'halt' for FailFast.on_failure"),
    "nobody undoes": (lambda: Compensation().model_copy(update={"max_concurrency": 0}), "for Compensation.max_concurrency, got 0"),
    "no attempt": (lambda: Retry(attempts=3).model_copy(update={"attempts": "3"}), "for Retry.attempts, got '3'"),
}


@pytest.mark.parametrize("case", COPIES)
def test_a_copy_of_a_policy_that_makes_no_sense_is_refused(case: str) -> None:
    """pydantic would take it, and the saga would end in the middle of it, with what was done in effect."""
    build, message = COPIES[case]

    with pytest.raises(PolicyInvalid, match="expected") as caught:
        build()

    assert message in str(caught.value)


def test_a_copy_of_a_policy_has_what_was_updated_as_if_it_had_been_written_so() -> None:
    policy = ContinueWithFallback(timeout=5.0, fallbacks={"price": {"amount": Decimal("1.10")}})

    copy = policy.model_copy(update={"retry": {"attempts": 3, "retry_on": ValueError}, "deadline": 9.0})

    expected = Retry(attempts=3, retry_on=ValueError)
    assert copy == ContinueWithFallback(timeout=5.0, fallbacks=policy.fallbacks, retry=expected, deadline=9.0)
    assert policy.model_copy() == policy.model_copy(deep=True) == policy


def test_a_policy_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        FailFast().timeout = 3  # type: ignore[misc] # what the test is about


def test_a_fallback_for_a_stage_that_does_not_exist_is_refused() -> None:
    world, two = scene({"seat": (), "room": ("seat",)})
    coordinator = SagaCoordinator(ContinueWithFallback(fallbacks={"saet": {}}))

    with pytest.raises(PolicyInvalid) as caught:
        run(coordinator.run(two))

    assert world.log == []
    assert run(coordinator.ledger.list()) == ()
    assert str(caught.value) == "expected fallbacks for stages of pipeline 'scene' (seat, room), got 'saet'. Did you mean 'seat'?"


def test_what_is_no_policy_is_refused() -> None:
    _, three = scene(SEQUENCE)

    with pytest.raises(PolicyInvalid, match="expected a FailFast or a ContinueWithFallback policy, got 'fast'"):
        run(SagaCoordinator("fast").run(three))  # type: ignore[arg-type] # what the test is about


@pytest.mark.parametrize(
    ("given", "got"), [(MemoryLedger, r"the class MemoryLedger\. Write MemoryLedger\(\.\.\.\)\."), ({}, "a dict"), ([], "a list")]
)
def test_what_is_no_ledger_is_refused_before_anything_is_run(given: Any, got: str) -> None:
    with pytest.raises(MisuseError, match=f"^expected a ledger, got {got}$"):
        SagaCoordinator(ledger=given)


def test_a_url_in_place_of_a_ledger_is_refused_without_its_password() -> None:
    with pytest.raises(MisuseError, match=r"expected a ledger, got a str\. .*open_ledger\(url\) opens the one at a URL\.$") as caught:
        SagaCoordinator(ledger="postgresql://ada:secret@db/sagas")  # type: ignore[arg-type] # the mistake

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_policy_is_read_from_a_file(tmp_path: Any, suffix: str) -> None:
    texts = {
        "toml": 'policy = "continue_with_fallback"\ntimeout = 5\n[fallbacks.price]\namount = 1\n[compensation]\nmax_concurrency = 2\n',
        "json": (
            '{"policy": "continue_with_fallback", "timeout": 5, "fallbacks": {"price": {"amount": 1}},'
            ' "compensation": {"max_concurrency": 2}}'
        ),
    }
    file = tmp_path / f"policy.{suffix}"
    file.write_text(texts[suffix])

    policy = load_policy(file)

    assert policy == ContinueWithFallback(timeout=5, fallbacks={"price": {"amount": 1}}, compensation=Compensation(max_concurrency=2))


def test_exceptions_may_have_the_name_of_any_module_that_is_not_loaded_in_retry_on() -> None:
    retry = Retry(attempts=2, retry_on=[KeyError, "TimeoutError", "__main__.CardDeclined", "payments.declined", "timeout"])

    assert retry.retry_on == ("KeyError", "TimeoutError", "__main__.CardDeclined", "payments.declined", "timeout")


def test_retry_on_takes_the_lists_of_the_pages_from_a_type_checker_without_pydantics_plugin_too() -> None:
    declared = get_type_hints(Retry)["retry_on"]

    assert any(get_origin(kind) is Collection for kind in get_args(declared))


def test_an_exception_that_a_package_makes_as_it_goes_may_be_named_whether_that_is_loaded_or_not() -> None:
    """As `botocore.errorfactory.NoSuchKey`, which no module has."""
    assert "tenacity" in sys.modules

    retry = Retry(attempts=2, retry_on="tenacity.NoSuchKey")

    assert retry.is_worth(Failure.raised("pay", type("NoSuchKey", (Exception,), {"__module__": "tenacity"})("b"), attempt=1))


def test_an_exception_that_was_given_itself_is_meant_also_in_a_copy_though_its_module_lacks_it() -> None:
    """As those that botocore makes for each client."""
    made = type("Throttled", (Exception,), {"__module__": "json"})
    retry = Retry(attempts=2, retry_on=made)

    copy = retry.model_copy(update={"attempts": 3})

    assert copy.is_worth(Failure.raised("pay", made("slow down"), attempt=1))
    assert [type(name) for name in copy.model_dump()["retry_on"]] == [str]
    assert Retry.model_validate_json(copy.model_dump_json()) == copy


CHOICE = "expected policy = 'fail_fast' or 'continue_with_fallback', in"


def test_a_file_may_hold_what_a_policy_was_written_as(tmp_path: Any) -> None:
    policy = ContinueWithFallback(fallbacks={"price": {"until": datetime(2026, 7, 1, tzinfo=UTC), "amounts": (1, 2)}})
    (tmp_path / "policy.json").write_text(policy.model_dump_json())

    assert load_policy(tmp_path / "policy.json") == policy


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "policy = ", "expected TOML in a.toml, got Invalid value"),
        ("b.toml", 'policy = "panic"', f"{CHOICE} b.toml, got 'panic'"),
        ("c.json", "{", "expected JSON in c.json, got EOF while parsing an object at line 1 column 1"),
        ("d.toml", 'policy = "fail_fast"\nretrys = 3', " in FailFast, in d.toml, got 'retrys'. Did you mean 'retry'?"),
        ("e.toml", "timeout = 3", f"{CHOICE} e.toml, got no key policy"),
        ("f.json", '["fail_fast"]', f"{CHOICE} f.json, got no key policy"),
        ("f.toml", "policy = 3", f"{CHOICE} f.toml, got '3'"),
        ("g.yaml", "policy: fail_fast", "expected a .toml or .json file, got g.yaml"),
        ("h.py", "policy = 'fail_fast'", "expected a .toml or .json file, got h.py"),
        ("i.toml", 'policy = "fail_fast"\nretry = 3', "max_elapsed, retry_on), in i.toml, got 3"),
        ("j.json", '{"policy": "fail_fast", "compensation": {"timeout": true}}', "for Compensation.timeout, in j.json, got True"),
        ("k.toml", 'policy = "fail_fast"\nretry.retry_on = ["exeption"]', "for Retry.retry_on, in k.toml, got 'exeption'. Did you mean"),
        (
            "m.toml",
            'policy = "fail_fast"\nretry.retry_on = ["ConnectionError", "CardDeclined"]',
            "or one with its module, for Retry.retry_on, in m.toml, got 'CardDeclined'. As in payments.CardDeclined.",
        ),
        (
            "m.json",
            '{"policy": "fail_fast", "retry": {"retry_on": ["json.JSONDecodeEror"]}}',
            "expected an exception of json for Retry.retry_on, in m.json, got 'json.JSONDecodeEror'. Did you mean 'json.JSONDecodeError'?",
        ),
        (
            "m.toml",
            'policy = "fail_fast"\ncompensation.retry.retry_on = ["json.loads"]',
            "expected an exception of json for Retry.retry_on, in m.toml, got 'json.loads'",
        ),
        ("o.toml", 'policy = "fail_fast"\nretry.wait = 5', "expected attempts in Retry, in o.toml, got wait alone"),
        ("l.toml", 'policy = "fail_fast"\nretry.retry_on = [3]', "qualified names for Retry.retry_on, in l.toml, got [3]"),
        ("m.toml", b'policy = "\xff"', "expected UTF-8 in m.toml, got 0xff at byte 10"),
        ("n.json", b'{"policy": "\xe9t\xe9"}', "expected UTF-8 in n.json, got 0xe9 at byte 12"),
        ("o.json", "[" * 100_000, "expected JSON in o.json, got recursion limit exceeded"),
        ("p.toml", f"policy = {'[' * 100_000}", "expected TOML in p.toml, got values that are nested too deeply"),
    ],
)
def test_a_file_that_holds_no_policy_is_refused_by_its_name(tmp_path: Any, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(PolicyInvalid, match="expected") as caught:
        load_policy(tmp_path / name)

    assert message in str(caught.value)


def test_a_file_may_name_its_schema(tmp_path: Any) -> None:
    policy = ContinueWithFallback(fallbacks={"price": {"until": datetime(2026, 7, 1, tzinfo=UTC), "$schema": "its own"}})
    (tmp_path / "policy.json").write_text('{"$schema": "./schema.json", ' + policy.model_dump_json()[1:])

    assert load_policy(tmp_path / "policy.json") == policy


def test_a_file_may_name_exceptions_that_are_not_loaded_yet(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = ModuleType("lazy")
    monkeypatch.setattr(lazy, "__getattr__", lambda _: CardDeclined, raising=False)
    monkeypatch.setitem(sys.modules, "lazy", lazy)
    names = ("json.JSONDecodeError", "json.errors.Other", "lazy.CardDeclined", "no_such_package.CardDeclined")
    (tmp_path / "policy.json").write_text(FailFast(retry=Retry(attempts=2, retry_on=names)).model_dump_json())

    assert load_policy(tmp_path / "policy.json").retry.retry_on == names


def test_a_policy_that_was_recorded_is_read_also_when_it_would_be_refused_by_now() -> None:
    """Else nobody could read that saga again, let alone undo it."""
    started = SagaStarted(saga_id="s", pipeline="p", graph=Graph.of([Node(name="a")]), policy=FailFast(retry=Retry(attempts=2), deadline=5))
    document = json.loads(event_to_json(started))
    document["policy"]["retry"] |= {"wait": 60.0, "wait_max": 30.0, "retry_on": ["crashed", "exception"]}
    document["policy"]["compensation"]["retry"]["retry_on"] = ["timeout"]

    read = event_from_json(json.dumps(document))

    assert isinstance(read, SagaStarted)
    assert (read.policy.retry.wait, read.policy.retry.retry_on) == (60, ("crashed", "exception"))
    assert read.policy.compensation.retry.retry_on == ("timeout",)


def test_a_file_may_name_exceptions_of_what_stands_in_for_a_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(ModuleType):
        CardDeclined = CardDeclined

    class Bare:
        __slots__ = ()
        CardDeclined = CardDeclined

    monkeypatch.setitem(sys.modules, "found", Found("found"))
    monkeypatch.setitem(sys.modules, "bare", untyped(Bare()))
    names = ("bare.CardDeclined", "found.CardDeclined")
    (tmp_path / "policy.json").write_text(FailFast(retry=Retry(attempts=2, retry_on=names)).model_dump_json())

    policy = load_policy(tmp_path / "policy.json")

    assert policy.retry.retry_on == names
    assert not policy.retry.is_worth(Failure.raised("pay", ConnectionError("no line"), attempt=1))


def test_a_file_may_name_exceptions_of_a_module_that_reads_it_before_it_has_them(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy.json").write_text(FailFast(retry=Retry(attempts=2, retry_on="fresh_shop.Declined")).model_dump_json())
    (tmp_path / "fresh_shop.py").write_text(
        f"import saga\nPOLICY = saga.load_policy({str(tmp_path / 'policy.json')!r})\nclass Declined(Exception): ..."
    )
    monkeypatch.syspath_prepend(tmp_path)

    shop = importlib.import_module("fresh_shop")

    assert shop.POLICY.retry.is_worth(Failure.raised("pay", shop.Declined("no money"), attempt=1))


@pytest.mark.parametrize("name", ["policy.toml", "policy.json", "policy.yaml"])
def test_a_file_that_is_not_there_is_no_policy_that_is_wrong(tmp_path: Any, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / name)


def test_a_saga_id_that_is_taken_is_refused_while_it_runs_and_afterwards() -> None:
    world, three = scene(SEQUENCE, {"b": Script(before=5)})
    coordinator = SagaCoordinator()

    async def twice() -> None:
        running = asyncio.create_task(coordinator.run(three, saga_id="s"))
        await elapse(1)
        for _ in range(2):
            with pytest.raises(SagaExists, match="expected a saga id that is not in the ledger yet, got 's'"):
                await coordinator.run(three, saga_id="s")
            await running

    run(twice())

    assert world.log == ["+a", "+b", "+c"]


@pytest.mark.parametrize("saga_id", ["", "  ", 5])
def test_a_saga_id_that_is_none_is_refused(saga_id: Any) -> None:
    with pytest.raises(MisuseError, match="expected a saga id with at least one visible character"):
        run(SagaCoordinator().run(scene(SEQUENCE)[1], saga_id=saga_id))


@pytest.mark.parametrize("saga_id", [5, UUID(int=7)])
def test_an_id_of_another_type_is_refused_and_the_error_says_of_which_one_it_is(saga_id: Any) -> None:
    _, trip = scene(SEQUENCE)
    coordinator = SagaCoordinator()

    uses = [coordinator.run(trip, saga_id=saga_id), coordinator.report(saga_id), coordinator.resume(saga_id, trip)]
    for use in (*uses, coordinator.cancel(saga_id)):
        with pytest.raises(MisuseError, match=r"^expected .*, got (5|UUID\('.*'\))\. An id is a str\.$"):
            run(use)


ODD_NAMES = ["x" * 501, "\0", "\ud800"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("what", ["saga id", "pipeline name"])
def test_a_name_that_a_durable_ledger_cannot_hold_is_refused_before_anything_runs(what: str, name: str) -> None:
    coordinator = SagaCoordinator(ledger=SlowDisk())
    saga_id, named = (name, "p") if what == "saga id" else ("s", name)

    with pytest.raises(MisuseError, match=f"expected a {what} of at most 500 characters, without NUL and surrogates, got one of"):
        run(coordinator.run(Pipeline(name=named).with_stage("a", Good), saga_id=saga_id))


@pytest.mark.parametrize("what", ["saga id", "pipeline name"])
def test_a_stage_whose_saga_a_durable_ledger_cannot_hold_fails_and_its_own_saga_comes_to_rest(what: str, tmp_path: Path) -> None:
    world, trip = scene({"flight": ()})
    hotel = Pipeline(name="h" * (501 if what == "pipeline name" else 10)).with_stage("room", Good)
    trip = trip.with_stage("book_hotel", nested(hotel), dependencies=("flight",))
    saga_id = "t" * (490 if what == "saga id" else 10)

    async def play() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            return await SagaCoordinator(ledger=ledger).run(trip, saga_id=saga_id)

    report = asyncio.run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert report.cause.message.startswith(f"expected a {what} of at most 500 characters")
    assert world.log == ["+flight", "-flight"]


def test_a_guard_retry_strategy_is_refused_and_the_error_says_why() -> None:
    coordinator = SagaCoordinator()

    with pytest.raises(MisuseError, match="effects would land twice and be undone once"):
        run(coordinator.run(pipeline(spec("a")), guard_retry_strategy=GuardRetryStrategy()))

    assert run(coordinator.ledger.list()) == ()


@pytest.mark.parametrize("option", ["emit_stage_wide_events", "emit_pipeline_wide_event", "wide_event_emitter"])
@pytest.mark.parametrize("context", [None, PipelineContext.create()])
def test_stageflows_wide_events_are_refused_and_the_error_says_who_is_told_instead(context: PipelineContext | None, option: str) -> None:
    coordinator = SagaCoordinator()
    asked: dict[str, Any] = {option: True}

    with pytest.raises(MisuseError) as caught:
        run(coordinator.run(pipeline(spec("a")), context, **asked))

    assert str(caught.value) == (
        f"expected none of stageflow's wide events, got {option}=True. "
        "The coordinator's listeners are told of all that happens: SagaCoordinator(listeners=[SinkListener()])."
    )
    assert run(coordinator.ledger.list()) == ()


@pytest.mark.parametrize("case", ["cycle", "sync execute", "sync compensate", "negative timeout"])
def test_a_nested_pipeline_that_cannot_work_is_refused_before_the_one_around_it_begins(case: str) -> None:
    bad, message = PIPELINES[case]
    world, outer = scene({"a": ()})
    coordinator = SagaCoordinator()

    with pytest.raises(PipelineInvalid) as caught:
        run(coordinator.run(outer.with_stage("child", nested(bad), dependencies=("a",))))

    assert str(caught.value).startswith(message)
    assert world.log == []
    assert run(coordinator.ledger.list()) == ()


def test_arguments_of_pipeline_run_that_do_not_belong_here_are_refused() -> None:
    coordinator = SagaCoordinator()
    one = pipeline(spec("a"))

    with pytest.raises(MisuseError, match=r"expected interceptors at SagaCoordinator"):
        run(coordinator.run(one, interceptors=[]))
    with pytest.raises(MisuseError, match=r"expected fields of stageflow's PipelineContext, got an unexpected keyword argument 'colour'"):
        run(coordinator.run(one, colour="red"))
    with pytest.raises(MisuseError, match="expected either a context or its fields, got both, the fields being input_text"):
        run(coordinator.run(one, PipelineContext.create(), input_text="x"))
    with pytest.raises(MisuseError, match="expected a PipelineContext, got 'text'"):
        run(coordinator.run(one, "text"))  # type: ignore[arg-type] # what the test is about


def test_stageflows_timeout_in_a_contexts_data_is_refused_as_it_is_off_in_a_saga() -> None:
    """Nothing would ever be cut off."""
    world, three = scene(SEQUENCE)
    within = Pipeline(name="p").with_stage("book", nested(three, fields=lambda _: {"data": {"_timeout_ms": 50}}))
    said = "expected a timeout in the policy, got 50 as _timeout_ms in the context's data. It is in seconds: FailFast(timeout=...)"

    with pytest.raises(MisuseError, match=re.escape(said)):
        run(SagaCoordinator().run(three, data={"_timeout_ms": 50}))
    with pytest.raises(MisuseError, match=re.escape(said)):
        run(SagaCoordinator().run(three, PipelineContext.create(data={"_timeout_ms": 50})))
    report = run(SagaCoordinator().run(within))

    assert report.cause is not None
    assert said in report.cause.message
    assert world.log == []


def test_an_interceptor_made_of_stageflows_may_have_a_hook_that_has_an_effect() -> None:
    class Denies(TimeoutInterceptor):
        async def before(self, stage_name: str, ctx: PipelineContext) -> InterceptorResult:
            return InterceptorResult(stage_ran=False)

    world, three = scene(SEQUENCE)

    assert run(SagaCoordinator(interceptors=[Denies()]).run(three)).ok
    assert world.log == []


def test_stageflows_timeout_that_is_off_is_let_pass() -> None:
    _, three = scene(SEQUENCE)

    assert run(SagaCoordinator().run(three, data={"_timeout_ms": 0})).ok


def test_recording_an_effect_that_nothing_would_undo_is_refused() -> None:
    async def plain(ctx: Any) -> None:
        await ctx.record("seat")

    report = run(SagaCoordinator().run(pipeline(spec("plain", plain))))

    assert report.cause is not None
    assert report.cause.message == "expected ctx.record only in a stage with a compensation, for stage 'plain', got a stage without one"


def test_what_is_not_there_cannot_be_reported_cancelled_or_undone() -> None:
    coordinator = SagaCoordinator()

    with pytest.raises(SagaNotFound, match="expected the id of a saga in the ledger, got 'x'"):
        run(coordinator.report("x"))
    with pytest.raises(SagaNotFound, match=r"alive in this coordinator, got 'x'\. Only where it runs can it be stopped"):
        run(coordinator.cancel("x"))
    with pytest.raises(SagaNotFound, match="got 'x'"):
        run(coordinator.compensate("x", pipeline(spec("a"))))


def test_a_saga_that_is_alive_cannot_be_undone_on_demand() -> None:
    _, three = scene(SEQUENCE, {"b": Script(before=5)})
    coordinator = SagaCoordinator()

    async def too_early() -> None:
        running = asyncio.create_task(coordinator.run(three, saga_id="s"))
        await elapse(1)
        with pytest.raises(MisuseError, match="expected a saga that nobody is running, got saga s, which is running here"):
            await coordinator.compensate("s", three)
        await running

    run(too_early())


def test_a_pipeline_that_is_not_the_sagas_cannot_undo_it() -> None:
    _, three = scene(SEQUENCE)
    _, other = scene({"a": (), "b": (), "d": ("b",)}, {}, {"a": "pivot"})
    coordinator = SagaCoordinator()
    run(coordinator.run(three, saga_id="s"))

    with pytest.raises(GraphChanged) as caught:
        run(coordinator.compensate("s", other))

    assert caught.value.differences == (
        "stage 'c' is gone",
        "stage 'd' is new",
        "stage 'a': role was 'compensable', is 'pivot'",
        "stage 'b': dependencies was ['a'], is []",
    )


def test_of_pipelines_whose_stages_refer_to_them_not_all_are_kept() -> None:
    """One that is made for each request, say, whose stage goes on with the saga of that same pipeline."""

    def refers_to_itself() -> Pipeline:
        async def look(_: Any) -> dict[str, Any]:
            return {"name": mine.name}

        mine = pipeline(spec("a", look))
        return mine

    async def many() -> list[weakref.ref[Pipeline]]:
        made = []
        for _ in range(1100):
            one = refers_to_itself()
            made.append(weakref.ref(one))
            await SagaCoordinator().run(one)
        return made

    made = run(many())
    gc.collect()

    assert sum(ref() is not None for ref in made) <= 1000


def test_a_pipeline_that_was_changed_after_its_first_run_is_read_again() -> None:
    world, three = scene(SEQUENCE)
    coordinator = SagaCoordinator()
    run(coordinator.run(three))

    async def decline(_: Any) -> None:
        raise CardDeclined

    three.stages["c"] = spec("c", decline, ("b",))
    report = run(coordinator.run(three))

    assert world.log[:3] == ["+a", "+b", "+c"]
    assert report.cause is not None
    assert report.cause.stage == "c"


def test_a_stage_that_was_replaced_after_its_first_run_is_the_one_that_runs_also_if_it_equals_the_other() -> None:
    """As by a test, which then charged at the real bank."""

    @dataclass
    class Charge:
        bank: list[str] = field(compare=False)
        retry: Retry | None = None

        async def execute(self, ctx: Any) -> None:
            self.bank.append(ctx.stage_name)

    real, fake = list[str](), list[str]()
    one = pipeline(spec("a", Charge(real)))
    run(SagaCoordinator().run(one))

    one.stages["a"] = spec("a", Charge(fake))
    run(SagaCoordinator().run(one))

    assert (real, fake) == (["a"], ["a"])


@pytest.mark.parametrize("wrap", [lambda runner: runner, lambda runner: compensable(runner, nothing)], ids=["plain", "compensable"])
@pytest.mark.parametrize("of", ["class", "object", "function"])
def test_what_a_stage_says_of_itself_after_its_first_run_counts_from_then_on(of: str, wrap: Any) -> None:
    """As a setting that is read later, or a test's monkeypatch."""
    calls = []

    class Call(CompensableStage):
        async def execute(self, ctx: SagaContext) -> None:
            calls.append(ctx.attempt)
            raise ConnectionError

        async def compensate(self, ctx: CompensationContext) -> None: ...

    async def call(_: Any) -> None:
        calls.append(len(calls))
        raise ConnectionError

    runner: Any = {"class": Call, "object": Call(), "function": call}[of]
    one = pipeline(spec("a", wrap(runner)))
    coordinator = SagaCoordinator()
    run(coordinator.run(one))
    calls.clear()

    runner.retry = Retry(attempts=3, wait=0)
    run(coordinator.run(one))

    assert len(calls) == 3


class ToldAsync:
    async def __call__(self, saga_id: str, event: Any) -> None: ...


class ToldInParts:
    def tell(self, saga_id: str, event: Any) -> Any:
        yield


class DeniesSync(BaseInterceptor):
    """stageflow can't await what it answers, logs that, and runs the stage."""

    def before(self, stage_name: str, ctx: PipelineContext) -> Any:
        return InterceptorResult(stage_ran=False)

    async def after(self, stage_name: str, result: Any, ctx: PipelineContext) -> None: ...


class ChecksSync(BaseInterceptor):
    async def before(self, *_: Any) -> None: ...
    def after(self, *_: Any) -> None: ...  # type: ignore[override] # what the test is about


class NotesSync(BaseInterceptor):
    async def before(self, stage_name: str, ctx: PipelineContext) -> None: ...

    async def after(self, stage_name: str, result: Any, ctx: PipelineContext) -> None: ...

    def on_error(self, stage_name: str, error: Exception, ctx: PipelineContext) -> Any: ...


def untyped(value: Any) -> Any:
    """What a type checker would refuse."""
    return value


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: SagaCoordinator(untyped(FailFast)), r"expected a FailFast or a ContinueWithFallback policy, got .* Write FailFast\(\)."),
        (lambda: SagaCoordinator(untyped("fail_fast")), "expected a FailFast or a ContinueWithFallback policy, got 'fail_fast'"),
        (lambda: SagaCoordinator(listeners=untyped(print)), r"expected a list of listeners, got .* Write listeners=\[it\]."),
        (lambda: SagaCoordinator(interceptors=untyped(print)), r"expected a list of interceptors, got .* Write interceptors=\[it\]."),
        (
            lambda: SagaCoordinator(interceptors=untyped([BaseInterceptor])),
            r"expected an interceptor, got the class BaseInterceptor. Write BaseInterceptor\(\.\.\.\).",
        ),
        (lambda: SagaCoordinator(listeners=untyped([nothing])), "expected a listener to be a plain function"),
        (lambda: SagaCoordinator(listeners=untyped([dict])), "expected a listener to be a plain function"),
        (lambda: SagaCoordinator(listeners=untyped([ToldAsync()])), "expected a listener to be a plain function"),
        (lambda: SagaCoordinator(listeners=untyped([ToldInParts().tell])), "expected a listener to be a plain function"),
        (lambda: SagaCoordinator(listeners=untyped([yields])), "expected a listener to be a plain function"),
        (lambda: SagaCoordinator(interceptors=[DeniesSync()]), "expected an interceptor with an async before, got <.*DeniesSync"),
        (lambda: SagaCoordinator(interceptors=[ChecksSync()]), "expected an interceptor with an async after, got <.*ChecksSync"),
        (lambda: SagaCoordinator(interceptors=[NotesSync()]), "expected an interceptor with an async on_error, got <.*NotesSync"),
        (lambda: SagaCoordinator(interceptors=untyped([print])), "expected an interceptor with an async before, got <built-in"),
        (
            lambda: SagaCoordinator(interceptors=[TimeoutInterceptor()]),
            r"expected interceptors that have an effect in a saga, got <.*TimeoutInterceptor.*stageflow's timeouts are off: FailFast\(time",
        ),
        (
            lambda: SagaCoordinator(interceptors=[RetryInterceptor()]),
            r"got <.*RetryInterceptor.*>\. It only waits: FailFast\(retry=Retry\(",
        ),
        (lambda: nested(untyped(nothing)), "expected a stageflow Pipeline"),
    ],
)
def test_what_can_not_work_is_refused_when_it_is_made(made: Any, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        made()


TRIP, SAME = Pipeline(name="trip"), Pipeline(name="trip")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None,), "expected the pipelines that the sagas were started with, got None"),
        (("trip",), "expected the pipelines that the sagas were started with, got 'trip'"),
        (([TRIP, None],), "expected a stageflow Pipeline, got None"),
        (({"trip": "shop:trip"},), "expected a stageflow Pipeline, got 'shop:trip'"),
        (([TRIP, SAME],), r"expected one pipeline of each name, got several named 'trip'\. Give those .* in calls of their own\."),
        ((TRIP, 0), "expected a concurrency of at least 1, got 0"),
        ((TRIP, -1), "expected a concurrency of at least 1, got -1"),
        ((TRIP, 2.5), r"expected a concurrency of at least 1, got 2\.5"),
        ((TRIP, True), "expected a concurrency of at least 1, got True"),
    ],
)
def test_a_recovery_that_cannot_work_is_refused_before_it_looks_into_the_ledger(given: Any, message: str) -> None:
    pipelines, concurrency = (*given, 10)[:2]

    with pytest.raises(MisuseError, match=f"^{message}$"):
        run(SagaCoordinator(ledger=Unreadable()).recover(pipelines, concurrency=concurrency))


class Unreadable(MemoryLedger):
    async def list(self, **_: Any) -> Any:
        raise AssertionError("nobody may look")


@pytest.mark.parametrize("pipelines", [TRIP, [TRIP, TRIP], iter([TRIP]), {"trip": TRIP, "journey": TRIP}, []])
def test_a_pipeline_may_be_given_to_a_recovery_in_any_way(pipelines: Any) -> None:
    assert str(run(SagaCoordinator().recover(pipelines))) == "No saga has lost its process."


def test_who_settles_or_resumes_is_told_by_a_text(tmp_path: Path) -> None:
    """A number was recorded, and no durable ledger could read that saga again."""
    _, three = scene(SEQUENCE, {"b": Script(undo_fails=9), "c": Script("raise")})

    async def settled_by_a_number() -> SagaStatus:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))), ledger=ledger)
            await coordinator.run(three, saga_id="s")
            for call in (
                coordinator.settle("s", "b", "undone", "by hand", by=untyped(4711)),
                coordinator.resume("s", three, by=untyped(4711)),
                coordinator.recover(three, by=untyped(4711)),
            ):
                with pytest.raises(MisuseError, match="expected a text that says by whom, got 4711"):
                    await call
            return (await coordinator.report("s")).status

    assert asyncio.run(settled_by_a_number()) is SagaStatus.STUCK


def test_a_word_is_no_answer_to_whether_a_saga_goes_forward() -> None:
    """Each is true, "false" too: a saga that was to be undone ran on."""
    world, three = scene(SEQUENCE, {"b": Script(undo_fails=1), "c": Script("raise")})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))))
    run(coordinator.run(three, saga_id="s"))
    run(coordinator.settle("s", "b", "retry", "the bank is open again"))

    with pytest.raises(MisuseError, match="expected forward to be True, False or None, got 'false'"):
        run(coordinator.resume("s", three, forward=untyped("false")))

    assert run(coordinator.resume("s", three, forward=False)).status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_an_output_that_a_person_gives_has_to_be_a_dict() -> None:
    async def hangs(_: Any) -> None:
        await elapse(60.0)

    coordinator = SagaCoordinator(FailFast(timeout=1.0))
    run(coordinator.run(Pipeline(name="p").with_stage("a", compensable(hangs, nothing)), saga_id="s"))

    with pytest.raises(MisuseError, match="expected a dict as the output's data, for stage 'a', got 3"):
        run(coordinator.settle("s", "a", "kept", "seen", output=3))  # type: ignore[arg-type] # what the test is about


@pytest.mark.parametrize(
    ("script", "policy", "got"),
    [
        (Script(undo_fails=9), FailFast(), "one beside its own"),
        (Script("hang"), ContinueWithFallback(timeout=1, fallbacks={"a": {"receipt": 0}}), "one beside its fallback's"),
    ],
    ids=["completed", "fell back"],
)
def test_an_output_of_a_stage_that_has_one_is_refused_and_leaves_what_it_gave(script: Script, policy: Any, got: str) -> None:
    _, pipeline = scene({"a": (), "b": ("a",)}, {"a": script, "b": Script("raise")})
    coordinator = SagaCoordinator(policy)
    before = run(coordinator.run(pipeline, saga_id="s"))

    with pytest.raises(MisuseError, match=f"^expected an output only of a stage that gave none, for stage 'a', got {got}$"):
        run(coordinator.settle("s", "a", "kept", "it stands", output={"receipt": 9}))

    assert run(coordinator.report("s")) == before
    kept = run(coordinator.settle("s", "a", "kept", "it stands"))
    assert kept.kept["a"] == before.stages["a"].output


@pytest.mark.parametrize("verdict", ["undone", "retry"])
def test_an_output_of_what_is_not_to_stay_is_refused(verdict: str) -> None:
    async def hangs(_: Any) -> None:
        await elapse(60.0)

    coordinator = SagaCoordinator(FailFast(timeout=1.0))
    run(coordinator.run(Pipeline(name="p").with_stage("a", compensable(hangs, nothing)), saga_id="s"))
    before = run(coordinator.ledger.read("s"))

    with pytest.raises(MisuseError, match=f"expected an output only of what is kept, for stage 'a', got one with {verdict}"):
        run(coordinator.settle("s", "a", verdict, "seen", output={"receipt": 9}))

    assert run(coordinator.ledger.read("s")) == before


@pytest.mark.parametrize(
    ("given", "fields", "hint"),
    [
        ((), {"inputtext": "x"}, "got an unexpected keyword argument 'inputtext'. Did you mean 'input_text'?"),
        ((), {"timeout": 5}, "got an unexpected keyword argument 'timeout'. A policy is given to SagaCoordinator(...)."),
        ((), {"fallbacks": {}}, "got an unexpected keyword argument 'fallbacks'. A policy is given to SagaCoordinator(...)."),
        ((), {"ledger": MemoryLedger()}, "got an unexpected keyword argument 'ledger'. It is given to SagaCoordinator(...)."),
        ((), {"listeners": []}, "got an unexpected keyword argument 'listeners'. It is given to SagaCoordinator(...)."),
        ((), {"people": 5}, "got an unexpected keyword argument 'people'. What it has no field for is given in metadata={...}."),
        ((), {"metadata": "OSL-JFK"}, "expected metadata={...}, got 'OSL-JFK'. A text is given as input_text=."),
        ((), {"data": [("people", 5)]}, "expected data={...}, got [('people', 5)]"),
        (("OSL-JFK",), {}, "got 'OSL-JFK'. A text is given as input_text=, anything else in metadata={...}."),
        (({"people": 5},), {}, "got {'people': 5}. A text is given as input_text=, anything else in metadata={...}."),
    ],
)
def test_whoever_gives_an_input_in_a_wrong_way_is_told_the_right_one(given: tuple[Any, ...], fields: dict[str, Any], hint: str) -> None:
    _, trip = scene(SEQUENCE)

    with pytest.raises(MisuseError) as caught:
        run(SagaCoordinator().run(trip, *given, **fields))

    assert str(caught.value).endswith(hint)


def test_whoever_looks_for_a_saga_in_the_memory_of_another_coordinator_is_told_so() -> None:
    _, trip = scene(SEQUENCE)
    run(SagaCoordinator().run(trip, saga_id="trip-1"))

    with pytest.raises(SagaNotFound, match=r"got 'trip-1'\. This ledger is in memory: without ledger= every SagaCoordinator has its own"):
        run(SagaCoordinator().resume("trip-1", trip))


@pytest.mark.parametrize("swapped", ["resume", "compensate"])
def test_a_pipeline_in_the_place_of_an_id_is_refused(swapped: str) -> None:
    with pytest.raises(MisuseError, match=r"^expected the id of a saga, got Pipeline"):
        run(getattr(SagaCoordinator(), swapped)(TRIP, "trip-1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fast"}, "expected a FailFast or a ContinueWithFallback policy, got 'fast'"),
        ({"fields": {"input_text": "x"}}, "expected a plain function that gives the child's fields, got {'input_text': 'x'}. As in "),
        ({"fields": nothing}, "expected a plain function that gives the child's fields, got <function nothing"),
    ],
)
def test_a_nested_saga_that_cannot_work_is_refused_when_it_is_built(options: dict[str, Any], message: str) -> None:
    _, trip = scene(SEQUENCE)

    with pytest.raises(MisuseError, match=re.escape(message)):
        nested(trip, **options)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"saga_id": "mine"}, "got an unexpected keyword argument 'saga_id'. The id of a saga that a stage runs is made of the stage's."),
        ({"inputtext": "x"}, "got an unexpected keyword argument 'inputtext'. Did you mean 'input_text'?"),
        ({"metadata": "OSL-JFK"}, "expected metadata={...}, got 'OSL-JFK'. A text is given as input_text=."),
    ],
    ids=["saga_id", "inputtext", "metadata"],
)
def test_what_the_context_of_a_nested_saga_cannot_be_given_is_told_of_as_for_any_saga(fields: dict[str, Any], told: str) -> None:
    _, trip = scene(SEQUENCE)
    within = Pipeline(name="p").with_stage("book", nested(trip, fields=lambda _: fields))

    report = run(SagaCoordinator().run(within))

    assert report.cause is not None
    assert report.cause.message.endswith(told)


class Headers(Mapping[str, str]):
    """As those of a web framework: no dict, and without copy()."""

    def __getitem__(self, name: str) -> str:
        return {"lang": "no"}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("lang",))

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("name", ["configuration", "metadata", "data"])
@pytest.mark.parametrize(("given", "got"), [(None, {}), (Headers(), {"lang": "no"})], ids=["None", "mapping"])
def test_where_the_context_has_a_dict_nothing_and_any_mapping_may_be_given(name: str, given: Any, got: dict[str, str]) -> None:
    """Python's own error ended run(), or, within a nested saga, left that running for ever, and its stage stuck."""
    trip = Pipeline(name="trip").with_stage("book", nothing, "work")
    within = Pipeline(name="p").with_stage("trip", nested(trip, fields=lambda _: {name: given}))
    coordinator = SagaCoordinator()

    reports = [run(coordinator.run(trip, saga_id="s", **{name: given})), run(coordinator.run(within, saga_id="p"))]

    assert [report.status for report in reports] == [SagaStatus.COMPLETED] * 2
    for saga_id in ("s", "p/trip"):
        started, *_ = run(coordinator.ledger.read(saga_id))
        assert isinstance(started, SagaStarted)
        assert started.input.get(name, {}) == got


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (PipelineContext(metadata="OSL-JFK"), "expected metadata={...}, got 'OSL-JFK'. A text is given as input_text=."),  # type: ignore[arg-type] # what a user may do
        (PipelineContext(data=None), "expected data={...}, got None"),  # type: ignore[arg-type] # the same
        (PipelineContext(metadata=Headers()), "expected metadata={...}, got "),  # type: ignore[arg-type] # the same
        ("OSL-JFK", "expected a PipelineContext, got 'OSL-JFK'. A text is given as input_text="),
    ],
)
def test_what_no_saga_can_be_run_on_is_refused_before_it_is_recorded(context: Any, message: str) -> None:
    """Python's own error ended run(), and the saga was running for ever; within a stage it said nothing of what to do."""
    trip = Pipeline(name="trip").with_stage("book", good, "work")
    coordinator = SagaCoordinator()

    async def book(ctx: SagaContext) -> None:
        await ctx.run_saga(trip, context)

    with pytest.raises(MisuseError, match="^" + re.escape(message)):
        run(coordinator.run(trip, context))
    report = run(coordinator.run(Pipeline(name="p").with_stage("book", compensable(book, nothing)), saga_id="s"))

    assert [entry.saga_id for entry in run(coordinator.ledger.list())] == ["s"]
    assert report.cause is not None
    assert report.cause.message.startswith(message)


class Careless:
    kind = "work"

    async def execute(self, ctx: Any) -> None: ...

    async def compensate(self) -> None: ...


def told_of(hook: Any) -> Any:
    @wraps(hook)
    async def telling(*args: Any, **kwargs: Any) -> Any:
        return await hook(*args, **kwargs)

    return telling


class CarelessBelowADecorator(Careless):
    compensate = told_of(Careless.compensate)


class AsksForMore(Careless):
    async def compensate(self, ctx: Any, *, bank: str) -> None: ...  # type: ignore[override] # what the test is about


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (Careless, r"compensate\(\) -> 'None'"),
        (CarelessBelowADecorator, r"compensate\(\) -> 'None'"),
        (AsksForMore, r"compensate\(ctx: 'Any', \*, bank: 'str'\) -> 'None'"),
    ],
)
def test_a_compensation_that_takes_no_context_or_more_than_that_is_refused_before_anything_runs(made: Any, got: str) -> None:
    with pytest.raises(MisuseError, match=f"expected compensate to be called with ctx, for stage 'a', got {got}"):
        run(SagaCoordinator().run(Pipeline(name="p").with_stage("a", made())))


@pytest.mark.parametrize("saga_id", [None, "s"])
def test_a_saga_in_no_event_loop_of_asyncio_is_refused_before_anything_is_recorded(saga_id: str | None) -> None:
    """As trio runs it, be it below anyio: it was in the ledger, and running for ever, when it met the first call of asyncio's."""
    coordinator = SagaCoordinator()

    with pytest.raises(MisuseError, match=r"^expected an event loop of asyncio, got none that runs here\. With anyio, choose the backend "):
        coordinator.run(Pipeline(name="p").with_stage("a", good, "work"), saga_id=saga_id).send(None)

    assert run(coordinator.ledger.list()) == ()
    assert coordinator._keeper.held.sagas == {}


def test_in_no_event_loop_of_asyncio_it_is_not_said_that_a_ledger_on_disk_has_failed(tmp_path: Path) -> None:
    """As of an id, which is looked for first: an operator looked after a database that was well."""
    _, trip = scene(SEQUENCE)
    coordinator = SagaCoordinator(ledger=SQLiteLedger(tmp_path / "sagas.db"))

    for use in (
        coordinator.run(trip, saga_id="s"),
        coordinator.report("s"),
        coordinator.resume("s", trip),
        coordinator.settle("s", "a", "undone", "by hand"),
        coordinator.recover(trip),
    ):
        with pytest.raises(MisuseError, match=r"^expected an event loop of asyncio, got none that runs here\."):
            use.send(None)
