"""What is wrong with a pipeline is found before it runs, and what is explained is what then happens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stageflow.api import Pipeline, StageKind

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    PipelineInvalid,
    PivotStage,
    Policy,
    PolicyInvalid,
    Retry,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    compensable,
    nested,
)
from saga.lint import Consequence, FindingCode, Severity, check, explain
from tests.controlled import run
from tests.test_properties import shapes
from tests.world import Script, World, nothing, scene

CASES = int(os.environ.get("SAGA_CASES", "200"))
TWICE = Retry(attempts=2)
GO_ON = ContinueWithFallback()
SKIP = ContinueWithFallback(without_fallback="skip_branch")


class Hold(CompensableStage):
    async def execute(self, ctx: SagaContext) -> None: ...

    async def compensate(self, ctx: CompensationContext) -> None: ...


class Charge(PivotStage):
    async def execute(self, ctx: SagaContext) -> None: ...


class Plain:
    """A plain stageflow stage that says nothing."""

    kind = StageKind.WORK

    async def execute(self, ctx: Any) -> None: ...


def a(base: type, **declared: Any) -> Any:
    """A stage of that class which declares more than the class does."""
    return type(f"Declared{base.__name__}", (base,), declared)


async def probe(self: Any, ctx: CompensationContext) -> None: ...


async def fallback(self: Any, ctx: SagaContext, failure: Any) -> None: ...


def pipeline(**stages: Any) -> Pipeline:
    """A pipeline of stages, each alone or as `(stage, dependency, ...)`."""
    made = Pipeline(name="made")
    for name, told in stages.items():
        stage, *dependencies = told if isinstance(told, tuple) else (told,)
        made = made.with_stage(name, stage, dependencies=tuple(dependencies))
    return made


def found(of: Pipeline, policy: Policy | None = None) -> list[tuple[str, str]]:
    return [(finding.stage, finding.code.value) for finding in check(of, policy)]


PURE, MAILS, RETRIED = a(Plain, has_effect=False), a(Plain, has_effect=True), a(Hold, retry=TWICE)

# -- undeclared-effect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StageKind.WORK, StageKind.AGENT])
def test_a_stage_that_is_there_to_change_something_has_to_say_whether_it_can_be_undone(kind: StageKind) -> None:
    assert found(pipeline(mail=a(Plain, kind=kind))) == [("mail", "undeclared-effect")]


@pytest.mark.parametrize("kind", [StageKind.TRANSFORM, StageKind.ENRICH, StageKind.ROUTE, StageKind.GUARD])
def test_a_stage_of_a_kind_that_changes_nothing_need_not_say_so(kind: StageKind) -> None:
    assert found(pipeline(read=a(Plain, kind=kind))) == []


@pytest.mark.parametrize("mended", [PURE, MAILS, Hold, Charge])
def test_whatever_a_stage_says_of_its_effect_is_enough(mended: Any) -> None:
    assert found(pipeline(mail=mended)) == []


def test_a_plain_function_says_so_as_an_attribute() -> None:
    async def fetch(_: Any) -> None: ...

    silent = Pipeline(name="p").with_stage("fetch", fetch, "work")
    assert found(silent) == [("fetch", "undeclared-effect")]

    fetch.has_effect = False  # type: ignore[attr-defined]
    declared = Pipeline(name="p").with_stage("fetch", fetch, "work")
    assert found(declared) == []


def test_an_effect_is_declared_with_yes_or_no() -> None:
    with pytest.raises(PipelineInvalid, match="expected has_effect to be a bool or None, for stage 'mail', got 'none'"):
        check(pipeline(mail=a(Plain, has_effect="none")))


# -- doubt-without-probe -----------------------------------------------------------------------------------------

DOUBTS = {
    "its timeout": (a(Hold, timeout=5.0), FailFast(), "after a timeout of 5 s"),
    "the policy's timeout": (Hold, FailFast(timeout=9), "after a timeout of 9 s"),
    "its timeout before the policy's": (a(Hold, timeout=5.0), FailFast(timeout=9), "after a timeout of 5 s"),
    "a cancel in flight": (Hold, FailFast(in_flight="cancel"), "cancelled in flight"),
    "the deadline": (Hold, FailFast(deadline=60), "after the deadline of 60 s"),
    "all of them": (
        a(Hold, timeout=5.0),
        FailFast(in_flight="cancel", deadline=60),
        "after a timeout of 5 s, cancelled in flight, after the deadline of 60 s",
    ),
    "a fallback in its place": (a(Hold, fallback=fallback), ContinueWithFallback(timeout=9), "after a timeout of 9 s"),
}


@pytest.mark.parametrize(("stage", "policy", "why"), DOUBTS.values(), ids=DOUBTS)
def test_a_stage_that_can_end_in_doubt_needs_something_that_resolves_it(stage: Any, policy: Policy, why: str) -> None:
    (finding,) = check(pipeline(hold=stage), policy)

    assert (finding.stage, finding.code) == ("hold", FindingCode.DOUBT_WITHOUT_PROBE)
    assert f"({why})" in finding.message
    assert "compensate_in_doubt" in finding.advice
    assert found(pipeline(hold=a(stage, probe=probe)), policy) == []
    assert found(pipeline(hold=a(stage, compensate_in_doubt=True)), policy) == []


def test_a_pivot_in_doubt_can_only_be_asked() -> None:
    (finding,) = check(pipeline(charge=Charge), FailFast(timeout=5))

    assert (finding.stage, finding.code) == ("charge", FindingCode.DOUBT_WITHOUT_PROBE)
    assert "compensate_in_doubt" not in finding.advice
    assert found(pipeline(charge=a(Charge, probe=probe)), FailFast(timeout=5)) == []


def test_a_pivot_in_flight_is_not_cancelled_so_it_is_in_no_doubt_for_that() -> None:
    assert found(pipeline(charge=Charge), FailFast(in_flight="cancel")) == []


def test_a_plain_stage_and_a_nested_saga_are_never_in_doubt_without_help() -> None:
    harsh = FailFast(timeout=5, in_flight="cancel", deadline=60)

    assert found(pipeline(read=PURE, trip=nested(pipeline(hold=Hold))), harsh) == []


def test_a_plain_stage_that_nobody_can_undo_is_not_to_be_cut_off() -> None:
    (finding,) = check(pipeline(mail=MAILS), FailFast(timeout=5))

    assert (finding.stage, finding.code) == ("mail", FindingCode.DOUBT_WITHOUT_PROBE)
    assert "it can be cut off (after a timeout of 5 s) when it has had its effect" in finding.message
    assert "PivotStage" in finding.advice
    assert found(pipeline(mail=MAILS)) == []
    assert found(pipeline(mail=a(Charge, probe=probe)), FailFast(timeout=5)) == []


def test_the_bound_on_draining_singles_out_no_stage() -> None:
    assert found(pipeline(hold=Hold, book=Hold), FailFast(drain_timeout=1)) == []


# -- fallible-after-pivot ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ship", [Hold, PURE, Charge, a(Hold, retry=Retry(attempts=1))])
def test_what_comes_after_a_pivot_has_to_be_helped_forward(ship: Any) -> None:
    made = pipeline(hold=Hold, charge=(Charge, "hold"), ship=(ship, "charge"))

    (finding,) = check(made)

    assert (finding.stage, finding.code, finding.severity) == ("ship", FindingCode.FALLIBLE_AFTER_PIVOT, Severity.ERROR)
    assert "'charge'" in finding.message
    assert "depend on it" not in finding.advice


@pytest.mark.parametrize(
    ("ship", "policy"),
    [
        (RETRIED, FailFast()),
        (Hold, FailFast(retry=TWICE)),
        (a(Hold, fallback=fallback), GO_ON),
        (Hold, ContinueWithFallback(fallbacks={"ship": {}})),
        (Hold, SKIP),
    ],
    ids=["its retry", "the policy's retry", "its fallback", "the policy's fallback", "a branch that may be skipped"],
)
def test_a_retry_a_fallback_or_a_skipped_branch_helps_forward(ship: Any, policy: Policy) -> None:
    assert found(pipeline(hold=Hold, charge=(Charge, "hold"), ship=(ship, "charge")), policy) == []


def test_a_fallback_of_another_stage_helps_nobody() -> None:
    made = pipeline(hold=Hold, charge=(Charge, "hold"), ship=(Hold, "charge"))

    assert found(made, ContinueWithFallback(fallbacks={"hold": {}})) == [("ship", "fallible-after-pivot")]


def test_a_stage_of_its_own_with_one_attempt_is_not_helped_by_the_policys_retry() -> None:
    made = pipeline(charge=Charge, ship=(a(Hold, retry=Retry(attempts=1)), "charge"))

    assert found(made, FailFast(retry=TWICE)) == [("ship", "fallible-after-pivot")]


@pytest.mark.parametrize(
    ("retry_on", "helps"),
    [((), False), ("timeout", False), (("timeout", "compensation"), False), ("reported", True), (("timeout", OSError), True)],
)
def test_a_retry_after_a_timeout_alone_helps_nobody_that_raises(retry_on: Any, helps: bool) -> None:
    made = pipeline(charge=Charge, ship=(a(Hold, retry=Retry(attempts=9, retry_on=retry_on), compensate_in_doubt=True), "charge"))

    assert found(made) == ([] if helps else [("ship", "fallible-after-pivot")])


def test_however_far_after_a_pivot_a_stage_comes_it_has_to_be_helped() -> None:
    made = pipeline(charge=Charge, ship=(RETRIED, "charge"), thank=(PURE, "ship"))

    assert found(made) == [("thank", "fallible-after-pivot")]


def test_what_may_run_beside_a_pivot_may_fail_after_it() -> None:
    (finding,) = check(pipeline(charge=Charge, hold=Hold))

    assert (finding.stage, finding.code) == ("hold", FindingCode.FALLIBLE_AFTER_PIVOT)
    assert "let 'charge' depend on it" in finding.advice
    assert found(pipeline(hold=Hold, charge=(Charge, "hold"))) == []


def test_of_many_pivots_one_finding_names_all() -> None:
    made = pipeline(
        charge=Charge,
        sign=(a(Charge, retry=TWICE), "charge"),
        seal=(a(Charge, retry=TWICE), "sign"),
        post=(a(Charge, retry=TWICE), "seal"),
        hold=(Hold, "charge"),
    )

    (finding,) = check(made)

    assert "'charge', 'sign', 'seal' and 1 more" in finding.message
    assert "let 'sign', 'seal' and 'post' depend on it" in finding.advice


# -- irreversible-before-fallible --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        pipeline(mail=MAILS, hold=(Hold, "mail")),
        pipeline(mail=MAILS, hold=Hold),
        pipeline(mail=MAILS, hold=(RETRIED, "mail")),
        pipeline(mail=MAILS, read=(PURE, "mail")),
        pipeline(mail=MAILS, charge=(Charge, "mail")),
        pipeline(mail=MAILS, charge=(a(Charge, retry=TWICE), "mail")),
    ],
    ids=[
        "before",
        "beside",
        "before a retried one without a pivot",
        "before one without an effect",
        "before a pivot",
        "before a retried pivot",
    ],
)
def test_what_nobody_can_undo_is_not_to_be_done_while_something_may_fail(made: Pipeline) -> None:
    (finding,) = check(made)

    assert (finding.stage, finding.code, finding.severity) == ("mail", FindingCode.IRREVERSIBLE_BEFORE_FALLIBLE, Severity.ERROR)
    assert repr(next(name for name in made.stages if name != "mail")) in finding.message


@pytest.mark.parametrize(
    ("made", "policy"),
    [
        (pipeline(hold=Hold, mail=(MAILS, "hold")), FailFast()),
        (pipeline(mail=a(Hold, has_effect=True), hold=(Hold, "mail")), FailFast()),
        (pipeline(mail=Charge, hold=(RETRIED, "mail")), FailFast()),
        (pipeline(mail=MAILS, hold=(a(Hold, fallback=fallback), "mail")), GO_ON),
        (pipeline(mail=MAILS, hold=(Hold, "mail")), ContinueWithFallback(fallbacks={"hold": {}})),
        (pipeline(charge=Charge, mail=(a(MAILS, retry=TWICE), "charge"), ship=(RETRIED, "charge")), FailFast()),
    ],
    ids=[
        "last",
        "with a compensation after all",
        "as a pivot",
        "before a fallback",
        "before the policy's fallback",
        "after a pivot, beside what is retried",
    ],
)
def test_what_nobody_can_undo_may_be_done_once_nothing_can_turn_back(made: Pipeline, policy: Policy) -> None:
    assert found(made, policy) == []


def test_what_follows_a_pivot_without_a_retry_may_leave_it_behind() -> None:
    made = pipeline(charge=Charge, mail=(a(MAILS, retry=TWICE), "charge"), ship=(Hold, "mail"))

    assert found(made) == [("mail", "irreversible-before-fallible"), ("ship", "fallible-after-pivot")]


def test_a_retry_is_no_certainty_beside_a_pivot() -> None:
    made = pipeline(charge=Charge, hold=RETRIED, mail=(a(MAILS, retry=TWICE), "charge"))

    (finding,) = check(made)

    assert (finding.stage, finding.code) == ("mail", FindingCode.IRREVERSIBLE_BEFORE_FALLIBLE)
    assert "'hold' may fail" in finding.message


def test_a_branch_that_is_skipped_leaves_behind_what_only_served_it() -> None:
    served = pipeline(mail=MAILS, hold=(Hold, "mail"))
    shared = pipeline(mail=MAILS, hold=(Hold, "mail"), book=(Hold, "mail"))
    beside = pipeline(mail=MAILS, hold=Hold)

    assert found(served, SKIP) == [("mail", "irreversible-before-fallible")]
    assert found(served, ContinueWithFallback(without_fallback="skip_branch", orphans="keep")) == []
    assert found(shared, SKIP) == []
    assert found(beside, SKIP) == []


# -- independent-pivots ------------------------------------------------------------------------------------------


def test_of_pivots_that_do_not_depend_on_each_other_one_may_complete_and_the_other_fail() -> None:
    (finding,) = check(pipeline(charge=Charge, sign=Charge))

    assert (finding.stage, finding.code, finding.severity) == ("sign", FindingCode.INDEPENDENT_PIVOTS, Severity.ERROR)
    assert "'charge'" in finding.message
    assert found(pipeline(charge=Charge, sign=(a(Charge, retry=TWICE), "charge"))) == []
    assert found(pipeline(charge=Charge, sign=RETRIED)) == []


def test_a_pivot_names_all_earlier_ones_that_it_does_not_depend_on() -> None:
    findings = check(pipeline(charge=Charge, sign=Charge, seal=(a(Charge, retry=TWICE), "charge")))

    assert [(finding.stage, finding.code.value) for finding in findings] == [("sign", "independent-pivots"), ("seal", "independent-pivots")]
    assert "'sign'" in findings[1].message
    assert "'charge'" not in findings[1].message


@pytest.mark.parametrize(
    ("policy", "stuck"),
    [
        (FailFast(), True),
        (GO_ON, True),
        (ContinueWithFallback(fallbacks={"charge": {}}), True),
        (ContinueWithFallback(fallbacks={"sign": {}}), True),
        (ContinueWithFallback(fallbacks={"charge": {}, "sign": {}}), False),
        (SKIP, False),
    ],
    ids=["fail fast", "no fallback", "a fallback of the first", "a fallback of the second", "a fallback of both", "a skipped branch"],
)
def test_pivots_beside_each_other_are_found_when_a_run_gets_stuck_between_them_and_only_then(policy: Policy, stuck: bool) -> None:
    ends = set()
    for fails in ("charge", "sign"):
        scripts = {name: Script("raise", before=1) if name == fails else Script() for name in ("charge", "sign")}
        _, made = scene({"charge": (), "sign": ()}, scripts, {"charge": "pivot", "sign": "pivot"})

        findings = found(made, policy)
        report = run(SagaCoordinator(policy).run(made))

        assert scripts[fails].attempts == ["raise"], "the fault was not reached"
        assert findings == ([("sign", "independent-pivots")] if stuck else [])
        assert explain(made, policy).stages[fails].status is report.status
        ends.add(report.status)
    assert (SagaStatus.HALTED in ends) == stuck
    assert ends <= {SagaStatus.HALTED, SagaStatus.DEGRADED}


def test_a_pivots_own_fallback_counts_as_the_policys_does() -> None:
    helped = a(Charge, fallback=fallback)

    assert found(pipeline(charge=helped, sign=helped), GO_ON) == []
    assert found(pipeline(charge=helped, sign=Charge), ContinueWithFallback(fallbacks={"sign": {}})) == []
    assert found(pipeline(charge=helped, sign=Charge), GO_ON) == [("sign", "independent-pivots")]


# -- unusable-fallback -------------------------------------------------------------------------------------------


def test_a_fallback_is_never_used_under_fail_fast() -> None:
    made = pipeline(hold=a(Hold, fallback=fallback))

    assert found(made) == [("hold", "unusable-fallback")]
    assert found(made, GO_ON) == []
    assert found(pipeline(hold=Hold)) == []


def test_the_policys_fallback_is_of_use_when_the_stages_own_fails() -> None:
    assert found(pipeline(hold=a(Hold, fallback=fallback)), ContinueWithFallback(fallbacks={"hold": {}})) == []


# -- never-read --------------------------------------------------------------------------------------------------


def test_what_is_said_of_the_undoing_of_a_stage_that_nothing_undoes_is_never_read() -> None:
    said = {"probe": probe, "compensation": Compensation(timeout=5), "compensate_in_doubt": True}

    (finding,) = check(pipeline(hold=a(Plain, has_effect=True, **said)))

    assert (finding.stage, finding.code, finding.severity) == ("hold", FindingCode.NEVER_READ, Severity.WARNING)
    assert finding.message.endswith("'compensation' and 'compensate_in_doubt', which a saga reads only beside a compensate(), and has none")
    assert finding.advice == "Give it a compensate(), or take it away"
    assert found(pipeline(hold=a(Hold, **said))) == []


def test_a_pivot_is_asked_and_never_undone() -> None:
    asked = a(Charge, probe=probe, compensation=Compensation(timeout=5))

    (finding,) = check(pipeline(charge=a(asked, compensate_in_doubt=True)))

    assert (finding.code, finding.advice) == (FindingCode.NEVER_READ, "Take it away")
    assert "'compensate_in_doubt'" in finding.message
    assert found(pipeline(charge=asked)) == []
    assert found(pipeline(charge=a(asked, probe=None))) == [("charge", "never-read")]


def test_a_plain_function_with_a_probe_is_never_asked() -> None:
    async def fetch(_: Any) -> None: ...

    fetch.has_effect = False  # type: ignore[attr-defined]
    fetch.probe = partial(probe, None)  # type: ignore[attr-defined]

    for runner in (fetch, partial(fetch)):
        assert found(Pipeline(name="p").with_stage("fetch", runner, "work")) == [("fetch", "never-read")]


# -- misspelt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("timeuot", "timeout"),
        ("retrys", "retry"),
        ("idempotant", "idempotent"),
        ("compensate_in_dout", "compensate_in_doubt"),
        ("output_modell", "output_model"),
        ("porbe", "probe"),
        ("fallbak", "fallback"),
        ("compensatoin", "compensation"),
    ],
)
def test_what_a_stage_says_under_a_name_that_is_nearly_right_is_asked_about(written: str, meant: str) -> None:
    (finding,) = check(pipeline(hold=a(Hold, **{written: 5.0})))

    assert (finding.stage, finding.code, finding.severity) == ("hold", FindingCode.MISSPELT, Severity.WARNING)
    assert finding.message == f"it has {written!r}, which a saga doesn't read: {meant!r} may be meant"


def test_a_misspelt_compensation_of_a_plain_stage_is_asked_about() -> None:
    assert found(pipeline(hold=a(Plain, has_effect=True, compensat=Hold.compensate))) == [("hold", "misspelt")]
    assert found(pipeline(hold=a(Plain, has_efect=True))) == [("hold", "undeclared-effect"), ("hold", "misspelt")]


@pytest.mark.parametrize("made", [lambda stage: stage, lambda stage: stage()], ids=["class", "object"])
def test_what_is_misspelt_in_a_stage_that_is_wrapped_is_asked_about(made: Any) -> None:
    wrapped = compensable(made(a(Plain, timeuot=5.0, compensation=Compensation(timeout=5))), nothing)

    assert found(pipeline(hold=wrapped)) == [("hold", "misspelt")]


def test_all_that_is_misspelt_in_a_stage_and_its_bases_is_one_finding_also_of_an_instance() -> None:
    made = a(a(Hold, timeuot=5.0), porbe=probe)

    (finding,) = check(pipeline(hold=made()))

    assert "'porbe' and 'timeuot'" in finding.message
    assert "'probe' and 'timeout' may be meant" in finding.message


@pytest.mark.parametrize(
    "own",
    [
        {"_timeuot": 5.0},
        {"timeout_ms": 500},
        {"timeout": None, "retry": TWICE, "idempotent": True},
        {"fallbacks": {}, "fallback": fallback},
        {"compensated": []},
        {"executor": None, "names": (), "seat": "12A"},
    ],
    ids=["private", "with a unit", "right", "beside the right one", "beside a method", "a stage's own"],
)
def test_other_names_are_a_stages_own_affair(own: dict[str, Any]) -> None:
    assert found(pipeline(hold=a(Hold, **own)), GO_ON) == []


# -- findings ----------------------------------------------------------------------------------------------------


def test_findings_come_in_topological_order_each_code_once_a_stage() -> None:
    made = pipeline(
        thank=(Plain, "ship"),
        ship=(a(Hold, fallback=fallback, timeout=5.0), "charge"),
        charge=(Charge, "mail", "log"),
        mail=MAILS,
        log=Plain,
    )

    assert found(made) == [
        ("mail", "irreversible-before-fallible"),
        ("log", "undeclared-effect"),
        ("ship", "doubt-without-probe"),
        ("ship", "fallible-after-pivot"),
        ("ship", "unusable-fallback"),
        ("thank", "undeclared-effect"),
        ("thank", "fallible-after-pivot"),
    ]


def test_a_finding_is_one_line_that_says_where_what_and_what_to_do() -> None:
    (finding,) = check(pipeline(hold=a(Hold, fallback=fallback)))

    assert str(finding) == (
        "stage 'hold': warning unusable-fallback: its fallback() is never used: under FailFast a failure stops the saga. "
        "Run the pipeline under ContinueWithFallback, or take the fallback() away."
    )
    assert {finding} == set(check(pipeline(hold=a(Hold, fallback=fallback))))


@pytest.mark.parametrize("look", [check, explain])
def test_what_cannot_run_is_refused_as_a_run_refuses_it(look: Any) -> None:
    with pytest.raises(PipelineInvalid, match="expected a stageflow Pipeline, got 'made'"):
        look("made")
    with pytest.raises(PolicyInvalid, match="expected a FailFast or a ContinueWithFallback policy, got 'strict'"):
        look(pipeline(hold=Hold), "strict")
    with pytest.raises(PolicyInvalid, match=r"expected fallbacks for stages of pipeline 'made' \(hold\), got 'book'"):
        look(pipeline(hold=Hold), ContinueWithFallback(fallbacks={"book": {}}))


# -- explain -----------------------------------------------------------------------------------------------------


def test_for_every_stage_it_is_said_what_is_undone_kept_and_impossible_to_undo() -> None:
    made = pipeline(
        price=PURE,
        seat=(Hold, "price"),
        room=(Hold, "price"),
        mail=(MAILS, "seat"),
        log=(Plain, "seat"),
        charge=(Charge, "mail", "room"),
        ship=(Hold, "charge"),
    )

    told = explain(made)

    assert list(told.stages) == ["price", "seat", "room", "mail", "log", "charge", "ship"]
    assert told.stages["price"] == Consequence("price", SagaStatus.COMPENSATED, absorbed=False, undone=(), kept=(), impossible=())
    assert told.stages["charge"] == Consequence(
        "charge", SagaStatus.COMPENSATED, absorbed=False, undone=(("room", "seat"),), kept=("price",), impossible=("mail", "log")
    )
    assert told.stages["ship"] == Consequence(
        "ship", SagaStatus.HALTED, absorbed=False, undone=(), kept=("price", "seat", "room", "mail", "charge"), impossible=("log",)
    )


def test_a_wave_waits_for_what_depends_on_its_stages() -> None:
    made = pipeline(base=Hold, left=(Hold, "base"), right=(Hold, "base"), top=(Hold, "right"), pay=(PURE, "left", "top"))

    assert explain(made).stages["pay"].undone == (("top", "left"), ("right",), ("base",))


@pytest.mark.parametrize("policy", [FailFast(on_failure="halt"), ContinueWithFallback(on_failure="halt")])
def test_a_saga_that_halts_keeps_everything_and_finds_nothing_impossible(policy: Policy) -> None:
    told = explain(pipeline(hold=Hold, mail=(MAILS, "hold"), pay=(PURE, "mail")), policy).stages["pay"]

    assert told == Consequence("pay", SagaStatus.HALTED, absorbed=False, undone=(), kept=("hold", "mail"), impossible=())


@pytest.mark.parametrize(("seat", "policy"), [(a(Hold, fallback=fallback), GO_ON), (Hold, ContinueWithFallback(fallbacks={"seat": {}}))])
def test_a_fallback_that_stands_in_lets_the_saga_go_on(seat: Any, policy: Policy) -> None:
    told = explain(pipeline(hold=Hold, seat=(seat, "hold"), mail=(MAILS, "seat")), policy).stages["seat"]

    assert told == Consequence("seat", SagaStatus.DEGRADED, absorbed=True, undone=(), kept=("hold", "seat", "mail"), impossible=())


def test_a_skipped_branch_takes_its_orphans_along_and_no_others() -> None:
    made = pipeline(hold=Hold, mail=MAILS, seat=(Hold, "hold", "mail"), tell=(Hold, "seat"), room=Hold)

    told = explain(made, SKIP).stages["seat"]

    assert told == Consequence("seat", SagaStatus.DEGRADED, absorbed=True, undone=(("hold",),), kept=("room",), impossible=("mail",))


def test_an_orphan_that_nobody_can_undo_is_told_of_even_when_nothing_else_is_to_undo() -> None:
    told = explain(pipeline(mail=MAILS, seat=(Hold, "mail"), room=Hold), SKIP).stages["seat"]

    assert told == Consequence("seat", SagaStatus.DEGRADED, absorbed=True, undone=(), kept=("room",), impossible=("mail",))


def test_an_explanation_reads_as_a_text() -> None:
    made = pipeline(
        seat=Hold,
        room=Hold,
        mail=MAILS,
        quote=(Hold, "seat", "room"),
        price=(a(Plain, has_effect=False, fallback=fallback), "quote"),
        pay=(PURE, "price", "mail"),
    )

    assert str(explain(made, GO_ON)) == (
        "Pipeline made\n"
        "\n"
        "If seat fails: COMPENSATED\n"
        "  undone: room\n"
        "  impossible to undo: mail\n"
        "\n"
        "If room fails: COMPENSATED\n"
        "  undone: seat\n"
        "  impossible to undo: mail\n"
        "\n"
        "If mail fails: COMPENSATED\n"
        "  undone: quote; then room, seat\n"
        "  kept: price\n"
        "\n"
        "If quote fails: COMPENSATED\n"
        "  undone: room, seat\n"
        "  impossible to undo: mail\n"
        "\n"
        "If price fails: DEGRADED\n"
        "  its fallback stands in\n"
        "  kept: seat, room, mail, quote, price, pay\n"
        "\n"
        "If pay fails: COMPENSATED\n"
        "  undone: quote; then room, seat\n"
        "  kept: price\n"
        "  impossible to undo: mail"
    )


def test_an_explanation_is_nothing_that_a_terminal_would_obey() -> None:
    made = Pipeline(name="p\x1b[2J").with_stage("a\x1b[31m\nb", Hold)

    assert str(explain(made)) == ("Pipeline p\\u001b[2J\n\nIf a\\u001b[31m b fails: COMPENSATED\n  nothing had been done")


def test_the_text_says_when_a_branch_is_skipped_and_when_nothing_had_been_done() -> None:
    made = pipeline(hold=Hold, seat=(Hold, "hold"))

    assert str(explain(made).stages["hold"]) == "If hold fails: COMPENSATED\n  nothing had been done"
    assert str(explain(made, SKIP).stages["seat"]) == "If seat fails: COMPENSATED\n  its branch is skipped\n  undone: hold"


# -- what is explained is what happens ---------------------------------------------------------------------------

KINDS = ["compensable", "compensable", "probed", "recording", "fallback", "pivot", "plain", "silent"]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(shapes())
    common: dict[str, Any] = {
        "on_failure": draw(st.sampled_from(["compensate", "compensate", "halt"])),
        "drain_timeout": None,
        "compensation": Compensation(max_concurrency=draw(st.sampled_from([None, None, 1])), timeout=None),
    }
    go_on = {
        "fallbacks": {name: {} for name in draw(st.sets(st.sampled_from(sorted(shape)), max_size=2))},
        "without_fallback": draw(st.sampled_from(["fail", "skip_branch"])),
        "orphans": draw(st.sampled_from(["compensate", "keep"])),
    }
    return {
        "shape": shape,
        "kinds": {name: draw(st.sampled_from(KINDS)) for name in shape},
        "fails": draw(st.sampled_from(sorted(shape))),
        "policy": FailFast(**common) if draw(st.booleans()) else ContinueWithFallback(**common, **go_on),
    }


def is_to_be_undone(name: str, fails: str, world: World, policy: Policy, report: SagaReport) -> bool:
    """Whether a saga would undo this completed stage if it could, by brute force."""
    if report.cause is not None:
        return policy.on_failure == "compensate"
    if report.stages[fails].fallback or (isinstance(policy, ContinueWithFallback) and policy.orphans == "keep"):
        return False

    def serves_nothing(stage: str) -> bool:
        uses = [other for other, needs in world.dependencies.items() if stage in needs]
        return stage in {fails, *world.dependents(fails)} or (uses != [] and all(serves_nothing(other) for other in uses))

    return serves_nothing(name)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_what_is_explained_is_what_happens(case: Mapping[str, Any]) -> None:
    fails, policy, silent = case["fails"], case["policy"], {name for name, kind in case["kinds"].items() if kind == "silent"}
    # All that doesn't depend on the stage that fails has completed long before.
    scripts = {name: Script("raise", before=100) if name == fails else Script(undo_takes=1) for name in case["shape"]}
    kinds = {name: "plain" if name in silent else kind for name, kind in case["kinds"].items()}
    world, made = scene(case["shape"], scripts, kinds)
    for name in silent:
        made = made.with_stage(name, made.stages[name].runner, "work", dependencies=made.stages[name].dependencies)
    told = explain(made, policy).stages[fails]

    report = run(SagaCoordinator(policy).run(made))

    event(f"{report.status.value}, {'absorbed' if told.absorbed else 'not absorbed'}")
    assert scripts[fails].attempts == ["raise"], "the fault was not reached"
    assert world.refusals == []
    assert told.status is report.status
    assert told.absorbed == (report.cause is None)
    assert {name for wave in told.undone for name in wave} == set(report.undone)
    assert not set(told.kept) & set(told.impossible)
    assert {*told.kept, *told.impossible} == set(report.kept)
    passed = {name for name, kind in kinds.items() if kind == "pivot" and name in report.kept and not report.stages[name].fallback}
    unprotected = {name for name in silent & set(report.kept) - {fails} if not world.dependents(name) & passed}
    assert set(told.impossible) == {name for name in unprotected if is_to_be_undone(name, fails, world, policy, report)}
    order = list(report.compensation_order)
    if policy.compensation.max_concurrency is None:
        # Each compensation takes as long as any other, so the waves are to be seen.
        for wave in told.undone:
            assert set(wave) == {order.pop(0) for _ in wave}
    else:
        wave_of = {name: number for number, wave in enumerate(told.undone) for name in wave}
        for later, name in enumerate(order):
            assert all(wave_of[other] < wave_of[name] for other in order[:later] if other in world.dependents(name))
            assert not world.dependents(name) & set(order[later:])
