"""What the larger tests pass by."""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import format_exception, walk_tb
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from stageflow.api import Pipeline, PipelineContext, StageKind, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    FailureKind,
    PipelineInvalid,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaError,
    SagaFailed,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
    nested,
)
from saga.events import (
    StageSettled,
    StageSkipped,
    Verdict,
)
from saga.failures import without_exception
from saga.graph import Graph, Node, Role
from saga.ledgers.sqlite import SQLiteLedger
from saga.policies import Policy
from saga.render.lettering import cells
from saga.text import did_you_mean, printable
from saga.watch import bounded
from tests.controlled import ControlledLoop, elapse, run
from tests.growth import growth
from tests.stories import Story
from tests.test_hard_cases import deaf
from tests.world import SEQUENCE, CardDeclined, Script, Scripted, World, hooked, nothing, scene

# -- compensable() -----------------------------------------------------------------------------------------------


class Plain:
    kind = StageKind.ENRICH
    timeout = 5.0

    def __init__(self, amount: int = 0) -> None:
        self.amount = amount

    async def execute(self, ctx: SagaContext) -> StageOutput:
        return StageOutput.ok(amount=self.amount)

    async def fallback(self, ctx: SagaContext, failure: Failure) -> dict[str, int]:
        return {"amount": -self.amount}


def test_a_stage_class_that_cannot_be_edited_gets_a_compensation_and_keeps_the_rest() -> None:
    undone: list[Any] = []

    async def undo(ctx: CompensationContext) -> None:
        assert ctx.output is not None
        undone.append(ctx.output.data)

    async def fail(_: Any) -> None:
        raise CardDeclined

    stage = compensable(Plain, undo)
    pipeline = Pipeline().with_stage("plain", stage, config={"amount": 3}).with_stage("fail", fail, "work", dependencies=("plain",))

    report = run(SagaCoordinator().run(pipeline))

    assert undone == [{"amount": 3}]
    assert report.status is SagaStatus.COMPENSATED
    assert pipeline.stages["plain"].kind is StageKind.ENRICH
    assert stage.__name__ == "compensable(Plain)"
    assert stage(amount=1).timeout == 5.0
    assert stage(amount=1).fallback.__self__.amount == 1


def test_an_instance_that_gets_a_compensation_keeps_what_it_declared_unless_told_otherwise() -> None:
    async def undo(_: CompensationContext) -> None: ...

    declared, told = compensable(Plain(2), undo), compensable(Plain(2), undo, timeout=1.0, kind="agent", retry=Retry(attempts=2))

    assert (declared.timeout, declared.kind, declared.fallback.__self__.amount) == (5.0, StageKind.ENRICH, 2)
    assert (told.timeout, told.kind, told.retry) == (1.0, "agent", Retry(attempts=2))
    assert not getattr(declared, "probe", None)


# -- failures and reports ----------------------------------------------------------------------------------------


def test_a_failure_says_who_in_what_way_and_with_which_words() -> None:
    try:
        raise CardDeclined("limit")
    except CardDeclined as error:
        raised = Failure.raised("pay", error, attempt=2)
    reported = Failure.of("pay", FailureKind.REPORTED, "no")
    saga = Failure.of(None, FailureKind.TIMEOUT, "too late")

    assert str(raised) == "stage 'pay' raised at attempt 2: CardDeclined: limit"
    assert str(reported) == "stage 'pay' reported a failure: no"
    assert str(saga) == "the saga ran out of time: too late"
    assert raised.traceback is not None
    assert "CardDeclined: limit" in raised.traceback
    assert len({raised, Failure.model_validate_json(raised.model_dump_json())}) == 1
    assert raised != "raised"


def without_marks(told: str) -> list[str]:
    """The lines of a traceback but those that point at a part of the line above."""
    return [line for line in told.splitlines() if not line.strip(" |") or line.strip(" |^~")]


def test_a_traceback_tells_of_every_cause_and_member_all_but_the_marks_under_the_lines() -> None:
    try:
        try:
            assert 1 + int("many")
        except ValueError as declined:
            declined.add_note("at the desk")
            raise ExceptionGroup("both", [declined, CardDeclined("limit")]) from declined
    except ExceptionGroup as error:
        failure = Failure.raised("pay", error, attempt=1)
        whole = "".join(format_exception(error))

    assert str(failure.traceback).splitlines() == without_marks(whole) != whole.splitlines()


class OddlyNoted(CardDeclined):
    __notes__ = 7  # type: ignore[assignment] # that is the test


class OfAScript(CardDeclined):
    __module__ = "__main__"


class Muttering(CardDeclined):
    def __str__(self) -> str:
        raise ValueError


def noted(*notes: str) -> CardDeclined:
    declined = CardDeclined("limit")
    for note in notes:
        declined.add_note(note)
    return declined


def after(error: BaseException, *, cause: BaseException | None = None, context: BaseException | None = None) -> BaseException:
    error.__cause__, error.__context__, error.__suppress_context__ = cause, context, cause is not None
    return error


@pytest.mark.parametrize(
    "error",
    [
        CardDeclined("limit"),
        CardDeclined(),
        CardDeclined("limit\nof the card"),
        CardDeclined("limit", "\ud800", "\u00e9"),
        OfAScript("limit"),
        Muttering(),
        OddlyNoted("limit"),
        noted("at the desk"),
        noted("at the\ndesk", ""),
        KeyError("card"),
        KeyboardInterrupt(),
        OSError(2, "no such file", "card.txt"),
        SyntaxError("invalid syntax", ("shop.py", 3, 5, "    if card", None, None)),
        AttributeError("no such attribute", name="arg", obj=ValueError()),
        ImportError("cannot import name", name="shop"),
        ExceptionGroup("both", [CardDeclined("limit"), noted("at the desk")]),
        after(CardDeclined("limit"), cause=KeyError("card")),
        after(CardDeclined("limit"), context=KeyError("card")),
        after(CardDeclined("limit"), cause=KeyError("card"), context=KeyError("other")),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("depth", [0, 20])
def test_a_traceback_tells_what_python_would_tell(error: BaseException, depth: int) -> None:
    def fails(left: int) -> None:
        if left:
            fails(left - 1)
        raise error.with_traceback(None)

    with pytest.raises(type(error)) as raised:
        fails(depth)
    whole = "".join(format_exception(raised.value)).encode("utf-8", "backslashreplace").decode()
    failures = [Failure.raised("pay", error, attempt=1), Failure.of("pay", FailureKind.TIMEOUT, "too late", instead=error)]

    assert [without_marks(str(failure.traceback)) for failure in failures] == [without_marks(whole)] * 2


def test_a_traceback_tells_nothing_of_what_was_being_handled_if_that_is_told_not_to() -> None:
    try:
        try:
            raise KeyError("card")
        except KeyError:
            raise CardDeclined("limit") from None
    except CardDeclined as error:
        failure = Failure.raised("pay", error, attempt=1)
        whole = "".join(format_exception(error))

    assert str(failure.traceback).splitlines() == without_marks(whole)
    assert "KeyError" not in whole


def test_a_failure_is_made_as_pydantic_makes_it_of_whatever_class_its_words_are() -> None:
    class Words(str):
        __slots__ = ()

        def isascii(self) -> bool:
            return True

        def __str__(self) -> str:
            return self

    class Sold(Exception):
        def __str__(self) -> str:
            return Words("sold out: \udcff")

    failure = Failure.raised(Words("pay"), Sold(), attempt=2)
    fields = {name: getattr(failure, name) for name in failure.model_fields_set}
    validated = Failure(**fields, exception=failure.exception)

    assert fields.keys() == Failure.model_fields.keys() - {"exception"}
    assert list(vars(failure).items()) == list(vars(validated).items())
    assert {type(failure.stage), type(failure.type), type(failure.message), type(failure.traceback)} == {str}
    assert failure.message == "sold out: \\udcff"
    assert vars(without_exception(failure)) == vars(Failure(**fields))
    assert pickle.loads(pickle.dumps(failure)) == failure  # noqa: S301 - of this test


def test_a_failure_is_stored_as_it_is_when_it_was_copied_from_one_that_is_stored() -> None:
    failure = Failure.raised("pay", CardDeclined("limit"), attempt=1)
    stored = without_exception(failure)

    elsewhere = without_exception(failure.model_copy(update={"stage": "book_hotel/pay"}))

    assert (stored, stored.exception) == (failure, None)
    assert (elsewhere.stage, elsewhere.exception) == ("book_hotel/pay", None)


def test_who_looks_a_failure_up_does_not_have_to_hold_it() -> None:
    """As who tells of each once: a WeakKeyDictionary of those that were told of."""
    failure = Failure.raised("pay", CardDeclined("limit"), attempt=1)
    told = weakref.WeakKeyDictionary({failure: "at the desk"})

    assert told[failure.model_copy()] == "at the desk"
    del failure
    assert not told


def unlike_any_other(depth: int) -> Failure:
    """Something that fails at a place of its own each time: a function that nobody else has."""
    namespace: dict[str, Any] = {"CardDeclined": CardDeclined}
    source = f"def fails_{depth}():\n    raise CardDeclined('limit')\n"
    exec(compile(source, f"shop_{depth}.py", "exec"), namespace)  # noqa: S102 - it is written here
    try:
        namespace[f"fails_{depth}"]()
    except CardDeclined as error:
        return Failure.raised("pay", error, attempt=1)
    raise AssertionError("it did not fail")


def test_each_failure_has_a_traceback_of_its_own_however_many_there_are() -> None:
    """The words for a place are kept for the next failure there."""
    for _ in range(2):
        for depth in range(300):
            told = str(unlike_any_other(depth).traceback)

            assert f'File "shop_{depth}.py", line 2, in fails_{depth}\n' in told
            assert told.endswith("CardDeclined: limit\n")


def test_the_words_for_a_place_hold_nothing_of_what_failed_there() -> None:
    def fails() -> weakref.ref[World]:
        world = World({})
        try:
            raise CardDeclined(str(world.standing))
        except CardDeclined as error:
            Failure.raised("pay", error, attempt=1)
        return weakref.ref(world)

    assert fails()() is None


def test_a_traceback_says_what_an_unknown_name_may_have_meant() -> None:
    try:
        declined = CardDeclined("limit")
        raise decline from declined  # type: ignore[name-defined] # there is none
    except NameError as error:
        failure = Failure.raised("pay", error, attempt=1)
        last = format_exception(error)[-1]

    assert str(failure.traceback).endswith(last)


def test_the_tracebacks_in_a_report_begin_with_the_users_code() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script("raise"), "a": Script(undo_fails=9)})

    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1)))).run(pipeline))

    begins = [str(failure.traceback).splitlines()[1].rpartition(", in ")[2] for failure in report.failures]
    assert begins == ["execute", "compensate"]


def failure_by_way_of(*packages: str | None) -> Failure:
    """Of what a function raises that one calls, and so on: one in a module of each package, the outermost first."""

    def declines() -> None:
        raise CardDeclined("limit")

    call: Callable[[], None] = declines
    for package in reversed(packages):
        module: dict[str, Any] = {"__package__": package, "call": call}
        exec("def calls():\n    call()", module)  # noqa: S102 - it is written here
        call = module["calls"]
    with pytest.raises(CardDeclined) as raised:
        call()
    return Failure.raised("pay", raised.value.with_traceback(raised.tb.tb_next), attempt=1)


@pytest.mark.parametrize("package", ["sagas", "saga_shop.stages", "shop.saga", "examples.booking_api", "tests", "", None])
def test_a_traceback_begins_with_the_users_code_wherever_in_saga_that_was_called(package: str | None) -> None:
    failure = failure_by_way_of("saga", "saga.testing", "saga.cli.commands", package, "saga.ledgers")

    assert failure.exception is not None
    frames = [frame.f_globals["__package__"] for frame, _ in walk_tb(failure.exception.__traceback__)]
    assert frames == [package, "saga.ledgers", "tests"]


def test_raise_for_status_raises_the_stages_own_exceptions_the_cause_first() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script("raise"), "b": Script(undo_fails=9)})
    report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1)))).run(pipeline))

    with pytest.raises(SagaFailed) as caught:
        report.raise_for_status()

    assert [str(error) for error in caught.value.exceptions] == ["c was declined", "undoing b was declined"]
    assert caught.value.report is report
    assert caught.value.message.endswith("(scene) is stuck")
    declined, rest = caught.value.split(lambda error: str(error) == "c was declined")
    assert isinstance(declined, SagaFailed)
    assert isinstance(rest, SagaFailed)
    assert declined.report is report
    assert world.standing.keys() == {"a", "b"}


def test_raise_for_status_within_stages_that_run_sagas_raises_each_exception_once() -> None:
    async def declined(_: Any) -> None:
        raise ValueError("declined")

    def running(within: Pipeline) -> Pipeline:
        async def child(ctx: SagaContext) -> None:
            (await ctx.run_saga(within)).raise_for_status()

        return Pipeline(name="p").with_stage("child", compensable(child, nothing))

    report = run(SagaCoordinator().run(running(running(running(Pipeline(name="p").with_stage("pay", declined, "work"))))))
    with pytest.raises(SagaFailed) as raised:
        report.raise_for_status()

    told = "".join(format_exception(raised.value))
    assert len(report.failures) == 4
    assert told.count("ValueError: declined") == 1


def test_raise_for_status_of_a_report_from_json_still_tells_every_failure() -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script("raise")})
    report = SagaReport.model_validate_json(run(SagaCoordinator().run(pipeline)).model_dump_json())

    with pytest.raises(SagaFailed) as caught:
        report.raise_for_status()

    (error,) = caught.value.exceptions
    assert isinstance(error, SagaError)
    assert str(error) == "stage 'b' raised: CardDeclined: b was declined"


def test_a_report_is_shown_to_who_debugs_in_a_line_whatever_its_stages_gave() -> None:
    """Python 3.11's asyncio.run puts what its coroutine returns through repr: of 1,000 stages that was nearly a megabyte."""
    world, pipeline = scene({"a": (), "b": ("a",), "c": ("b",)}, {"c": Script("raise")})

    report = run(SagaCoordinator().run(pipeline, saga_id="s"))

    stages = "stages={'undone': 2, 'failed': 1}"
    assert repr(report) == f"SagaReport(saga_id='s', pipeline='scene', status=<SagaStatus.COMPENSATED: 'compensated'>, {stages})"
    assert world.standing == {}


def test_raise_for_status_lets_a_good_report_pass() -> None:
    _, pipeline = scene(SEQUENCE)

    run(SagaCoordinator().run(pipeline)).raise_for_status()


def told(policy: Policy, kinds: dict[str, str] | None = None, **scripts: Script) -> list[str]:
    _, pipeline = scene(SEQUENCE, scripts, kinds)
    text = str(run(SagaCoordinator(policy).run(pipeline, saga_id="s")))
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_summary_puts_the_cause_first_then_every_stage_then_what_to_do() -> None:
    lines = told(FailFast(), b=Script("raise"))

    assert lines[0].startswith("Saga s (scene): COMPENSATED after ")
    assert lines[1] == "Cause: stage 'b' raised: CardDeclined: b was declined"
    assert re.fullmatch(r"a < undone 1 attempt \d+\.\d+ m?s undone 1st in \d+\.\d+ m?s", lines[3])
    assert re.fullmatch(r"b x failed 1 attempt \d+\.\d+ m?s raised: CardDeclined: b was declined", lines[4])
    assert lines[5] == "c · not run"
    assert lines[7] == "Nothing is left to do."


def test_the_columns_of_the_summary_stand_below_each_other_whatever_script_the_names_are_in() -> None:
    names = ("seat", "座席を予約する", "réserver", "de\u0301ja\u0300")
    _, pipeline = scene(dict.fromkeys(names, ()), {})

    rows = str(run(SagaCoordinator().run(pipeline))).splitlines()[2:6]

    assert {cells(row.partition("+")[0]) for row in rows} == {2 + 2 * 7 + 2}


def test_the_summary_tells_what_a_retry_mended_and_what_a_probe_found() -> None:
    one_retry = FailFast(timeout=1, retry=Retry(attempts=2, wait=0))
    mended = told(one_retry, b=Script("raise", then=("ok",)))
    landed = told(one_retry, {"b": "probed"}, b=Script("hang", lands=True))
    not_landed = told(FailFast(timeout=1), {"b": "probed"}, b=Script("hang"))

    assert mended[3].startswith("b + kept 2 attempts")
    assert mended[3].endswith("at first it raised: CardDeclined: b was declined")
    assert landed[3].endswith("at first it ran out of time: no answer within 1 s; asked, it had landed")
    assert not_landed[4].endswith("ran out of time: no answer within 1 s; asked, it had not landed")


class Asked(CompensableStage):
    """Nobody knows whether it landed, and nobody says."""

    timeout = 1.0
    compensation = Compensation(retry=Retry(attempts=3, wait=0))
    answer: Any = ConnectionError("bank unreachable")

    async def execute(self, ctx: SagaContext) -> None:
        await asyncio.Event().wait()

    async def probe(self, ctx: CompensationContext) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def compensate(self, ctx: CompensationContext) -> None:
        if ctx.attempt == 1:
            raise CardDeclined("not yet")


class AskedWrong(Asked):
    compensation = Compensation(retry=Retry(attempts=1))
    answer = True


class AskedThenUndone(Asked):
    compensate_in_doubt = True


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (Asked, "3 times, the last: ConnectionError: bank unreachable"),
        (AskedWrong, "once: TypeError: expected None or a StageOutput with status OK from the probe, got True"),
        (AskedThenUndone, "3 times, the last: ConnectionError: bank unreachable; undone 1st in "),
    ],
)
def test_the_summary_tells_why_a_probe_gave_no_answer(stage: type[CompensableStage], said: str) -> None:
    report = run(SagaCoordinator().run(Pipeline(name="bank").with_stage("pay", stage), saga_id="s"))

    assert f"ran out of time: no answer within 1 s; its probe failed {said}" in str(report).splitlines()[3]


def test_a_failure_of_a_probe_does_not_say_that_its_stage_could_not_be_compensated() -> None:
    report = run(SagaCoordinator().run(Pipeline(name="bank").with_stage("pay", AskedThenUndone), saga_id="s"))

    assert report.status is SagaStatus.COMPENSATED
    for told in (report, SagaReport.model_validate_json(report.model_dump_json())):
        assert list(map(str, told.failures))[-2:] == [
            "stage 'pay' could not be asked at attempt 3: ConnectionError: bank unreachable",
            "stage 'pay' could not be compensated: CardDeclined: not yet",
        ]


def test_what_was_returned_beside_a_failure_does_not_pass_for_a_later_success() -> None:
    async def declined(ctx: Any) -> StageOutput:
        return StageOutput.fail("declined", data={"balance": 0})

    async def no_line(ctx: CompensationContext) -> None:
        raise OSError("no line")

    stage = compensable(declined, no_line, probe=no_line)
    report = run(SagaCoordinator().run(Pipeline(name="p").with_stage("pay", stage), saga_id="s"))

    assert report.stages["pay"].output is not None
    assert report.stages["pay"].state is StageState.IN_DOUBT
    assert "  reported a failure: declined; its probe failed 3 times" in str(report).splitlines()[3]


class Unpriced(Scripted):
    async def fallback(self, ctx: SagaContext, failure: Failure) -> None:
        raise ValueError("price list missing")


def test_the_summary_tells_why_a_fallback_did_not_stand_in() -> None:
    def lines(**fallbacks: Any) -> list[str]:
        world = World({"b": ()})
        pipeline = Pipeline(name="priced").with_stage("b", Unpriced(world, "b", Script("raise")))
        return str(run(SagaCoordinator(ContinueWithFallback(fallbacks=fallbacks)).run(pipeline, saga_id="s"))).splitlines()

    said = "raised: CardDeclined: b was declined; its fallback failed: ValueError: price list missing"

    assert lines()[3].endswith(said)
    assert lines(b={"price": 0})[2].startswith("  b  ~ fallback")
    assert lines(b={"price": 0})[2].endswith(said)


def test_the_summary_tells_why_a_compensation_had_to_be_repeated() -> None:
    lines = told(FailFast(compensation=Compensation(retry=Retry(attempts=2, wait=0))), a=Script(undo_fails=1), b=Script("raise"))

    assert lines[3].endswith("at attempt 2, after CardDeclined: undoing a was declined")


def test_the_summary_of_a_stage_that_ran_again_tells_nothing_of_the_undoing_before() -> None:
    a, b = Script(undo_fails=1), Script("raise")
    _, pipeline = scene({"a": (), "b": ("a",)}, {"a": a, "b": b})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=2, wait=0))))

    async def main() -> SagaReport:
        await coordinator.run(pipeline, saga_id="s")
        a.outcome = "raise"
        return await coordinator.resume("s", pipeline, forward=True)

    report = run(main())

    assert report.stages["a"].state is StageState.FAILED
    assert str(report).splitlines()[3].endswith("raised: CardDeclined: a was declined")


def test_the_summary_of_a_stuck_saga_names_what_is_stuck_and_what_is_held_back_with_it() -> None:
    lines = told(FailFast(compensation=Compensation(retry=Retry(attempts=1))), b=Script(undo_fails=9), c=Script("raise"))

    assert lines[-5:-3] == ["Still in effect, its undoing failed: b.", "Still in effect, held back: a."]


RECORDED = "Still in effect, recorded by what did not complete: b."


@pytest.mark.parametrize(
    ("policy", "b"),
    [
        (FailFast(on_failure="halt"), Script("raise", lands=True)),
        (FailFast(), Script("cancel", lands=True)),
        (ContinueWithFallback(on_failure="halt", fallbacks={"b": {}}), Script("raise", lands=True)),
    ],
)
def test_the_summary_says_what_stands_of_a_stage_that_recorded_an_effect_and_did_not_complete(policy: Policy, b: Script) -> None:
    world, pipeline = scene(SEQUENCE, {"b": b, "c": Script("raise")}, {"b": "recording"})

    report = run(SagaCoordinator(policy).run(pipeline))

    assert "b" in world.standing
    assert RECORDED in str(report).splitlines()


@pytest.mark.parametrize("policy", [FailFast(), ContinueWithFallback(fallbacks={"b": {}})])
def test_the_summary_says_nothing_of_a_recorded_effect_that_was_undone(policy: Policy) -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script("raise", lands=True, order_matters=False)}, {"b": "recording"})

    report = run(SagaCoordinator(policy).run(pipeline))

    assert "b" not in world.standing
    assert RECORDED not in str(report)


def test_the_summary_says_what_stands_of_a_stage_that_recorded_an_effect_within_a_saga() -> None:
    _, inner = scene(SEQUENCE, {"b": Script("raise", lands=True)}, {"b": "recording"})

    halts = FailFast(on_failure="halt")

    report = run(SagaCoordinator(halts).run(Pipeline(name="outer").with_stage("nest", nested(inner, halts))))

    assert "Still in effect, recorded by what did not complete: nest/b." in str(report).splitlines()


@pytest.mark.parametrize("words", [str, SagaReport.to_html])
def test_the_words_of_a_report_grow_with_its_stages_also_where_all_of_them_are_stuck(words: Callable[[SagaReport], str]) -> None:
    """To print the report of a thousand took five seconds, and that of two thousand twenty."""

    async def refuse(_: CompensationContext) -> None:
        raise OSError("the bank is closed")

    async def decline(_: Any) -> StageOutput:
        return StageOutput.fail("declined")

    def told_of(many: int) -> Callable[[], str]:
        pipeline = Pipeline(name="p")
        for number in range(many):
            pipeline = pipeline.with_stage(f"book{number}", compensable(nothing, refuse))
        pipeline = pipeline.with_stage("pay", decline, "work", dependencies=tuple(pipeline.stages))
        report = run(SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1)))).run(pipeline))
        assert len(report.stuck) == many
        return lambda: words(report)

    assert growth(told_of, 50) < 2.5


@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_of_a_report_with_other_failures_tells_of_these(deep: bool) -> None:
    _, pipeline = scene(SEQUENCE, {"b": Script("raise")})
    report = run(SagaCoordinator().run(pipeline))
    (failure,) = report.failures_of("b")
    other = failure.model_copy(update={"of_probe": True, "message": "no line"})

    copied = report.model_copy(update={"failures": (*report.failures, other)}, deep=deep)

    assert copied.failures_of("b") == [failure, other]
    assert report.failures_of("b") == [failure]
    assert report.failures_of("a") == ()


def test_the_summary_of_a_cancelled_saga_says_what_to_do_about_what_is_in_doubt() -> None:
    begun = asyncio.Event()

    async def charge(ctx: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def think_better_of_it(ctx: Any) -> StageOutput:
        await begun.wait()
        return StageOutput.cancel("no more")

    pipeline = Pipeline(name="p").with_stage("charge", compensable(charge, charge)).with_stage("ask", think_better_of_it, "work")
    report = run(SagaCoordinator(FailFast(in_flight="cancel")).run(pipeline, saga_id="s"))

    # It is CANCELLED only once nothing is in doubt.
    assert report.status is SagaStatus.HALTED
    assert report.cause is not None
    assert report.cause.kind is FailureKind.CANCELLED
    assert str(report).splitlines()[-4:] == [
        "In doubt, may be in effect: charge.",
        "To do: look at the outside world, put it right by hand, and say so (undone, kept or retry); then go on:",
        "  saga settle s charge undone --note '...'",
        "  saga resume s",
    ]


def test_the_summary_of_a_saga_that_passed_over_what_one_of_its_own_left_standing_says_what_to_do() -> None:
    _, inner = scene(SEQUENCE, {"a": Script(undo_fails=99), "b": Script("raise")})

    async def careless(ctx: Any) -> None:
        await ctx.run_saga(inner)

    report = run(SagaCoordinator().run(Pipeline(name="outer").with_stage("nest", careless, "work"), saga_id="s"))

    assert report.status is SagaStatus.COMPLETED
    assert str(report).splitlines()[-3] == "Still in effect, its undoing failed: nest/a."
    assert str(report).endswith("\n  saga settle s nest/a undone --note '...'")


def test_the_summary_of_a_halted_and_of_a_living_saga_say_what_to_do() -> None:
    assert told(FailFast(on_failure="halt"), b=Script("raise"))[-1].startswith("To do: what was done is kept.")
    _, pipeline = scene(SEQUENCE, {"b": Script(before=5)})
    coordinator = SagaCoordinator()

    async def peek() -> SagaReport:
        running = asyncio.create_task(coordinator.run(pipeline, saga_id="s"))
        await elapse(1)
        report = await coordinator.report("s")
        await running
        return report

    report = run(peek())

    assert report.status is SagaStatus.RUNNING
    assert report.stages["b"].state is StageState.RUNNING
    assert str(report).endswith("it is running, or its process is gone. saga list says which, saga recover goes on with it.")


RUDE = "\x1b[2J\x1b]0;owned\x07 line\nNothing is left to do."
TAMED = r"\u001b[2J\u001b]0;owned\u0007 line Nothing is left to do."


def test_the_summary_shows_rude_words_and_names_in_the_row_of_their_stage() -> None:
    story = Story(f"trip {RUDE}", {"a\x1b[31m": (), "b": ("a\x1b[31m",), "c": ("a\x1b[31m",), "d": ("b", "c")})
    story.done("a\x1b[31m", 0, 1).tell(1, StageSkipped, stage="c", reason=RUDE, output=StageOutput.ok())
    story.fails("b", 1, 2, RUDE).turns_back(2)
    story.undo_fails("a\x1b[31m", 2, 3, RUDE).ends(3, SagaStatus.STUCK)
    story.tell(4, StageSettled, stage="a\x1b[31m", verdict=Verdict.UNDONE, note=RUDE, by=f"ann {RUDE}")

    text = str(story.report)

    lines = text.splitlines()
    assert not set(text) & set("\x1b\x07\r")
    assert lines[0] == f"Saga 7f3a (trip {TAMED}): STUCK after 3.00 s"
    assert lines[1] == f"Cause: stage 'b' raised: CardDeclined: {TAMED}"
    assert lines[3].startswith(r"  a\u001b[31m  < undone ")
    assert f"settled as undone by ann {TAMED}: {TAMED}" in lines[3]
    assert lines[4].endswith(f"raised: CardDeclined: {TAMED}")
    assert lines[5].endswith(TAMED)
    assert not any(line.startswith("Nothing") for line in lines)


def test_the_command_that_settles_a_stage_with_a_rude_name_names_it_to_the_shell() -> None:
    name = "it's \\ \x1b[31m\ncaf\u00e9"
    story = Story("trip", {name: (), "b": (name,)}).done(name, 0, 1).fails("b", 1, 2, "no").turns_back(2)
    lines = str(story.undo_fails(name, 2, 3, "down").ends(3, SagaStatus.STUCK).report).splitlines()

    (command,) = (line.strip() for line in lines if "saga settle" in line)

    shell = ["/bin/bash", "-c", f"saga() {{ printf '%s\\0' \"$@\"; }}; {command}"]
    done = subprocess.run(shell, env={"LC_ALL": "C.UTF-8"}, stdout=subprocess.PIPE, text=True, check=True)
    assert name in done.stdout.split("\0")


@pytest.mark.parametrize(
    "text", ["caf\u00e9", "\u4eac\u90fd 10\u00a0000 \u20ac", "\u0645\u06cc\u200c\u062e", "\U0001f468\u200d\U0001f469", "a  b"]
)
def test_words_of_any_language_are_shown_as_they_are(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(("place", "said"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (21, "21st")])
def test_ordinals_read_as_people_say_them(place: int, said: str) -> None:
    shape = {f"s{number:02}": () for number in range(25)} | {"z": tuple(f"s{number:02}" for number in range(25))}
    _, pipeline = scene(shape, {"z": Script("raise")})
    report = run(SagaCoordinator(FailFast(compensation=Compensation(max_concurrency=1))).run(pipeline))

    (line,) = (line for line in str(report).splitlines() if line.split()[:1] == [report.compensation_order[place - 1]])

    assert f"undone {said} in" in line


# -- policies ----------------------------------------------------------------------------------------------------


def test_waits_grow_by_the_multiplier_up_to_the_maximum() -> None:
    retry = Retry(attempts=6, wait=1, multiplier=3, wait_max=20, jitter=False)
    failure = Failure.of("a", FailureKind.REPORTED, "no")

    assert [retry.wait_before_next(failure, attempt=n, elapsed=0) for n in range(1, 7)] == [1, 3, 9, 20, 20, None]


def test_a_maximum_below_the_default_wait_is_the_wait() -> None:
    retry = Retry(attempts=3, wait_max=0.01, jitter=False)
    failure = Failure.of("a", FailureKind.REPORTED, "no")

    assert [retry.wait_before_next(failure, attempt=n, elapsed=0) for n in (1, 2)] == [0.01, 0.01]


def test_a_retry_that_does_not_wait_never_does() -> None:
    """tenacity's power of two overflows after a thousand attempts, and stands for the longest wait then."""
    tireless = Retry(attempts=5000, wait=0.0, jitter=False)
    failure = Failure.of("a", FailureKind.REPORTED, "no")

    assert {tireless.wait_before_next(failure, attempt=attempt, elapsed=0.0) for attempt in (1, 1024, 1026, 4000)} == {0.0}


def test_jitter_stays_between_nothing_and_the_full_wait() -> None:
    retry = Retry(attempts=9, wait=4, multiplier=2, wait_max=30)
    failure = Failure.of("a", FailureKind.REPORTED, "no")

    for attempt, most in ((1, 4), (2, 8), (3, 16), (4, 30)):
        waits = [retry.wait_before_next(failure, attempt=attempt, elapsed=0) for _ in range(200)]
        numbers = [wait for wait in waits if wait is not None]
        assert len(numbers) == 200
        assert 0 <= min(numbers) < most / 4
        assert most * 3 / 4 < max(numbers) <= most


def test_no_attempt_starts_after_the_longest_time() -> None:
    retry = Retry(attempts=9, wait=2, jitter=False, max_elapsed=10)
    failure = Failure.of("a", FailureKind.REPORTED, "no")

    assert retry.wait_before_next(failure, attempt=1, elapsed=8) == 2
    assert retry.wait_before_next(failure, attempt=1, elapsed=8.5) is None


@pytest.mark.parametrize("kind", [FailureKind.CANCELLED, FailureKind.INTERRUPTED, FailureKind.CONTRACT])
def test_what_another_attempt_cannot_mend_is_not_retried(kind: FailureKind) -> None:
    failure = Failure.of("a", kind, "no")

    assert Retry(attempts=2).wait_before_next(failure, attempt=1, elapsed=0) is None


# -- time limits -------------------------------------------------------------------------------------------------


def test_a_bounded_call_ends_in_time_whatever_it_does() -> None:
    async def play() -> None:
        loop, released = asyncio.get_running_loop(), asyncio.Event()
        stop = loop.create_future()
        given_up: list[asyncio.Task[Any]] = []

        async def answer() -> int:
            return 42

        async def fail() -> None:
            raise CardDeclined

        async def late() -> str:
            try:
                await released.wait()
            except asyncio.CancelledError:
                await elapse(1)
            return "late, but in time for the grace"

        async def late_error() -> None:
            try:
                await released.wait()
            except asyncio.CancelledError:
                raise CardDeclined from None

        assert await bounded(answer(), seconds=None, grace=1, gives_up=given_up.append) == 42
        with pytest.raises(CardDeclined):
            await bounded(fail(), seconds=5, grace=1, gives_up=given_up.append)
        assert await bounded(late(), seconds=5, grace=2, gives_up=given_up.append) == "late, but in time for the grace"
        with pytest.raises(TimeoutError, match="no answer within 5 s"):
            await bounded(late_error(), seconds=5, grace=2, gives_up=given_up.append)
        began = loop.time()
        with pytest.raises(TimeoutError):
            await bounded(deaf(released), seconds=5, grace=2, gives_up=given_up.append)
        assert loop.time() - began == 7
        assert len(given_up) == 1
        loop.call_later(3, stop.set_result, None)
        with pytest.raises(asyncio.CancelledError):
            await bounded(deaf(released), seconds=None, grace=2, gives_up=given_up.append, stop=stop)
        assert loop.time() - began == 12
        assert len(given_up) == 2
        released.set()

    run(play())


def test_a_probe_is_asked_again_when_it_fails() -> None:
    class Shy(CompensableStage):
        timeout = 1.0
        asked = 0

        async def execute(self, ctx: SagaContext) -> None:
            await asyncio.Event().wait()

        async def probe(self, ctx: CompensationContext) -> None:
            Shy.asked += 1
            if Shy.asked < 3:
                raise CardDeclined("not now")

        async def compensate(self, ctx: CompensationContext) -> None: ...

    report = run(SagaCoordinator().run(Pipeline().with_stage("shy", Shy)))

    assert Shy.asked == 3
    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["shy"].probed is False
    assert [failure.message for failure in report.failures] == ["no answer within 1 s", "not now", "not now"]


def test_a_probe_before_a_retry_gives_way_when_the_saga_is_interrupted() -> None:
    class Slow(CompensableStage):
        timeout = 1.0

        async def execute(self, ctx: SagaContext) -> None:
            await asyncio.Event().wait()

        async def probe(self, ctx: CompensationContext) -> None:
            if ctx.cause is None:
                await asyncio.Event().wait()

        async def compensate(self, ctx: CompensationContext) -> None: ...

    policy = FailFast(retry=Retry(attempts=2, wait=0), deadline=10)

    async def timed() -> tuple[SagaReport, float]:
        report = await SagaCoordinator(policy).run(Pipeline().with_stage("slow", Slow))
        return report, asyncio.get_running_loop().time()

    report, took = run(timed())

    assert took == 10
    assert report.stages["slow"].state is StageState.FAILED
    assert report.stages["slow"].probed is False


def test_a_cancel_by_id_does_not_reach_a_saga_that_is_being_undone() -> None:
    world, pipeline = scene(SEQUENCE, {"c": Script(undo_takes=5)})
    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        await coordinator.run(pipeline, saga_id="s")
        undoing = asyncio.create_task(coordinator.compensate("s", pipeline))
        await elapse(1)
        await coordinator.cancel("s")
        undoing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await undoing
        return await coordinator.report("s")

    assert run(play()).status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_compensation_that_succeeds_in_spite_of_its_timeout_has_succeeded() -> None:
    async def fine(_: Any) -> None: ...

    async def stubborn(_: CompensationContext) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await elapse(1)

    async def fail(_: Any) -> None:
        raise CardDeclined

    pipeline = Pipeline().with_stage("a", compensable(fine, stubborn)).with_stage("b", fail, "work", dependencies=("a",))

    report = run(SagaCoordinator(FailFast(compensation=Compensation(timeout=3))).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.stages["a"].compensation is not None
    assert report.stages["a"].compensation.attempts == 1


@pytest.mark.parametrize("moment", [2.0, 3.0])
def test_cancelling_every_task_again_and_again_still_ends_with_everything_undone(moment: float) -> None:
    # During the drain and during the wait between two attempts of a compensation.
    scripts = {"b": Script("raise", before=1), "c": Script(before=2), "a": Script(undo_fails=1)}
    world, pipeline = scene({"a": (), "b": ("a",), "c": ("a",)}, scripts, {"c": "probed"})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=3, wait=4, jitter=False))))

    async def play() -> SagaReport:
        asyncio.create_task(coordinator.run(pipeline, saga_id="s"))  # noqa: RUF006 - found again among all tasks
        await elapse(moment - 0.5)
        mine = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if "watched" not in repr(task)]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        return await coordinator.report("s")

    assert run(play()).status is SagaStatus.COMPENSATED
    assert world.standing == {}


def test_a_compensation_that_fails_after_the_backward_deadline_is_not_repeated() -> None:
    script = Script(undo_takes=20, undo_fails=9)
    _, pipeline = scene(SEQUENCE, {"b": script, "c": Script("raise")})

    report = run(SagaCoordinator(FailFast(compensation=Compensation(deadline=10))).run(pipeline))

    assert script.undo_attempts == 1
    assert report.stages["b"].state is StageState.STUCK


def test_a_stuck_saga_is_not_undone_over_again() -> None:
    world, pipeline = scene(SEQUENCE, {"b": Script(undo_fails=9), "c": Script("raise")})
    coordinator = SagaCoordinator(FailFast(compensation=Compensation(retry=Retry(attempts=1))))
    stuck = run(coordinator.run(pipeline, saga_id="s"))

    again = run(coordinator.compensate("s", pipeline))

    assert again == stuck
    assert set(world.standing) == {"a", "b"}


def test_what_is_in_doubt_holds_nothing_back_when_the_policy_continues() -> None:
    shape = {"a": (), "b": ("a",)}
    world, pipeline = scene(shape, {"b": Script("hang"), "a": Script(order_matters=False)})
    policy = FailFast(timeout=1, compensation=Compensation(on_failure="continue"))

    report = run(SagaCoordinator(policy).run(pipeline))

    assert report.status is SagaStatus.STUCK
    assert (report.stages["b"].state, report.stages["a"].state) == (StageState.IN_DOUBT, StageState.UNDONE)
    assert world.standing == {}


def test_a_stage_that_ignores_its_timeout_is_not_cancelled_twice() -> None:
    released = asyncio.Event()

    async def slow(_: Any) -> None:
        await deaf(released)

    async def timed() -> tuple[SagaReport, float]:
        report = await SagaCoordinator(FailFast(timeout=10, cancel_grace=5, deadline=12)).run(Pipeline().with_stage("slow", slow, "work"))
        took = asyncio.get_running_loop().time()
        released.set()
        return report, took

    report, took = run(timed())

    assert took == 15
    assert report.stages["slow"].failure is not None
    assert report.stages["slow"].failure.kind is FailureKind.TIMEOUT


def test_a_probe_whose_task_is_cancelled_from_outside_is_asked_again() -> None:
    class Slow(CompensableStage):
        timeout = 1.0
        asked = 0

        async def execute(self, ctx: SagaContext) -> None:
            await asyncio.Event().wait()

        async def probe(self, ctx: CompensationContext) -> None:
            Slow.asked += 1
            await elapse(10)

        async def compensate(self, ctx: CompensationContext) -> None: ...

    coordinator = SagaCoordinator()

    async def play() -> SagaReport:
        asyncio.create_task(coordinator.run(Pipeline().with_stage("slow", Slow), saga_id="s"))  # noqa: RUF006 - found again among all tasks
        await elapse(5)
        mine = [task for task in asyncio.all_tasks() - {asyncio.current_task()} if "watched" not in repr(task)]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        return await coordinator.report("s")

    assert run(play()).status is SagaStatus.COMPENSATED
    assert Slow.asked == 2


# -- a loop that goes away ---------------------------------------------------------------------------------------


@pytest.fixture
def unraisable() -> Iterator[list[Any]]:
    """What Python could not raise, because it happened while something was being thrown away."""
    seen: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, seen.append
    yield seen
    sys.unraisablehook = before


class Waits(CompensableStage):
    """Waits for ever in the method that it is told."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.reached = False

    async def _wait(self, where: str) -> None:
        if where == self.where:
            self.reached = True
            await asyncio.Event().wait()

    async def execute(self, ctx: SagaContext) -> None:
        await self._wait("execute")
        if self.where != "compensate":
            raise CardDeclined

    async def fallback(self, ctx: SagaContext, failure: Failure) -> None:
        await self._wait("fallback")
        raise CardDeclined

    async def probe(self, ctx: CompensationContext) -> None:
        await self._wait("probe")

    async def compensate(self, ctx: CompensationContext) -> None:
        await self._wait("compensate")


@pytest.mark.parametrize("where", ["execute", "fallback", "probe", "compensate"])
@pytest.mark.parametrize("context", [None, hooked], ids=["bare", "with a hook"])
def test_a_saga_whose_loop_is_thrown_away_makes_no_noise(
    context: Callable[[], PipelineContext] | None, where: str, unraisable: list[Any]
) -> None:
    async def fail(_: Any) -> None:
        raise CardDeclined

    stage = Waits(where)
    pipeline = Pipeline().with_stage("waits", stage).with_stage("fail", fail, "work", dependencies=("waits",))
    loop = asyncio.new_event_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    task = loop.create_task(SagaCoordinator(ContinueWithFallback()).run(pipeline, context and context()))

    async def until_reached() -> None:
        while not stage.reached:
            await asyncio.sleep(0)

    loop.run_until_complete(until_reached())
    loop.close()
    del task
    gc.collect()

    assert unraisable == []
    assert all("was destroyed but it is pending" in complaint["message"] for complaint in complaints)


def test_a_saga_whose_loop_is_thrown_away_while_it_waits_for_a_hook_makes_no_noise(unraisable: list[Any]) -> None:
    async def fail(_: Any) -> None:
        raise CardDeclined

    reached: list[str] = []

    async def hook(name: str, *_: Any) -> None:
        if name == "waits":
            reached.append(name)
            await asyncio.Event().wait()

    context = PipelineContext.create()
    context.add_before_stage_start_hook(hook)
    coordinator = SagaCoordinator(FailFast(cancel_grace=10.0))
    loop = ControlledLoop()
    loop.set_exception_handler(lambda *_: None)
    task = loop.create_task(coordinator.run(Pipeline().with_stage("fail", fail, "work").with_stage("waits", Waits("nowhere")), context))

    loop.run_until_complete(elapse(5.0))
    loop.close()
    del task, coordinator
    gc.collect()

    assert reached == ["waits"]
    assert unraisable == []


def test_a_saga_that_is_thrown_away_before_its_loop_makes_no_noise(tmp_path: Path) -> None:
    """At the end of a program Python closes what is left of it in any order; a loop that nobody closed may be the last."""
    stage = Waits("execute")
    pipeline = Pipeline().with_stage("waits", stage)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    caller = loop.create_task(SagaCoordinator(ledger=SQLiteLedger(tmp_path / "sagas.db")).run(pipeline))

    async def until_reached() -> None:
        while not stage.reached:
            await asyncio.sleep(0)

    loop.run_until_complete(until_reached())

    for task in asyncio.all_tasks(loop):
        code: Any = task.get_coro()
        code.close()  # which raises what the code itself does then

    loop.close()
    assert not caller.done()


# -- the graph ---------------------------------------------------------------------------------------------------


def test_the_graph_names_what_it_refuses() -> None:
    with pytest.raises(PipelineInvalid, match="at least one visible character, for stage ' ', got ' '"):
        Graph.of([Node(name=" ")])
    with pytest.raises(PipelineInvalid, match=r"dependencies out of the pipeline's stages \(a\), for stage 'a', got 'z'"):
        Graph.of([Node(name="a", dependencies=("z",))])


def test_stages_stay_in_the_order_in_which_they_were_written_where_each_comes_after_what_it_needs() -> None:
    written = Graph.of([Node(name="a"), Node(name="b", dependencies=("a",)), Node(name="c"), Node(name="d", dependencies=("c", "b"))])
    mixed_up = Graph.of([Node(name="d", dependencies=("c", "b")), Node(name="b", dependencies=("a",)), Node(name="c"), Node(name="a")])

    assert written.names == ("a", "b", "c", "d")
    for place, node in enumerate(mixed_up.nodes):
        assert set(node.dependencies) <= set(mixed_up.names[:place])


def test_the_graph_reaches_ancestors_once_however_many_ways_lead_there() -> None:
    graph = Graph.of(
        [Node(name="d", dependencies=("b", "c")), Node(name="b", dependencies=("a",)), Node(name="c", dependencies=("a",)), Node(name="a")]
    )

    assert graph.with_ancestors(["d", "b"]) == {"a", "b", "c", "d"}
    assert graph.with_ancestors(["b"]) == {"a", "b"}
    assert graph.names[0] == "a"
    assert graph["d"].dependencies == ("b", "c")
    assert graph.differences(graph) == []


@pytest.mark.parametrize(
    "nodes",
    [[{"name": "a", "dependencies": ["b"]}, {"name": "b"}], [{"name": "a", "dependencies": ["z"]}], [{"name": "a"}, {"name": "a"}]],
    ids=["before what it needs", "on one that is unknown", "twice"],
)
def test_a_graph_is_not_read_of_which_no_plan_could_be_made(nodes: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError, match="expected each stage once, behind those that it depends on, got 'a'"):
        TypeAdapter(Graph).validate_python({"nodes": nodes})


def test_a_difference_is_told_for_every_stage_also_behind_one_that_is_gone() -> None:
    before = Graph.of([Node(name="a"), Node(name="b", role=Role.COMPENSABLE), Node(name="c", dependencies=("b", "a"))])
    after = Graph.of([Node(name="b"), Node(name="c", dependencies=("b",)), Node(name="d")])

    assert before.differences(after) == [
        "stage 'a' is gone",
        "stage 'd' is new",
        "stage 'b': role was 'compensable', is 'plain'",
        "stage 'c': dependencies was ['a', 'b'], is ['b']",
    ]


# -- words -------------------------------------------------------------------------------------------------------


def test_the_nearest_of_very_many_names_is_found_by_comparing_few() -> None:
    def looking(many: int) -> Callable[[], object]:
        names = [f"{number * 7_919 % 1_000_003:06}" for number in range(many)]
        return lambda: did_you_mean("01x838", names)

    assert looking(500)() == "Did you mean '015838'?"
    assert growth(looking, 500) < 1.5
