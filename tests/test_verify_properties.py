"""Random sagas whose stages are as they should be pass, whatever their policy; with one defect in one stage they don't.

`SAGA_VERIFIED` sets the number of cases.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stageflow.api import Pipeline, StageContext, StageKind, StageOutput

from saga import (
    Compensation,
    ContinueWithFallback,
    FailFast,
    Failure,
    Policy,
    Retry,
    SagaContext,
    nested,
)
from saga.testing import Fault, VerificationFailed, verify
from saga.testing.faults import UNDOING
from tests.controlled import elapse, run
from tests.town import Boasting, Booking, Eager, Forgetful, Indebted, Literal, Lying, Recording, Sale, Town, WithFallback

CASES = int(os.environ.get("SAGA_VERIFIED", "60"))
NAMES = "abcd"


class Following(Booking):
    """Books according to what the stages before it gave."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        self.town.bookings[ctx.idempotency_key] = f"{self.name} after {sorted(ctx.inputs.prior_outputs)}"
        return StageOutput.ok(key=ctx.idempotency_key)


class Slow(Following):
    async def execute(self, ctx: SagaContext) -> StageOutput:
        await elapse(1)
        output = await super().execute(ctx)
        await elapse(1)
        return output


class WithVainFallback(Following):
    async def fallback(self, _: SagaContext, __: Failure) -> StageOutput:
        raise OSError("nothing to put in its place")


class Plain:
    kind = StageKind.TRANSFORM

    def __init__(self, _: Town, name: str) -> None:
        self.name = name

    async def execute(self, _: StageContext) -> StageOutput:
        return StageOutput.ok(name=self.name)


class Skips(Plain):
    async def execute(self, _: StageContext) -> StageOutput:
        return StageOutput.skip("nothing to do")


def child(town: Town, name: str) -> Any:
    """A saga of two stages, the second of which needs the first."""
    inner = Pipeline(name=name).with_stage("one", Following(town, f"{name}/one"))
    return nested(inner.with_stage("two", Following(town, f"{name}/two"), dependencies=("one",)))


def child_with_pivot(town: Town, name: str) -> Any:
    inner = Pipeline(name=name).with_stage("one", Following(town, f"{name}/one"))
    inner = inner.with_stage("point", Sale(town, f"{name}/point"), dependencies=("one",))
    return nested(inner.with_stage("two", Following(town, f"{name}/two"), dependencies=("point",)), FailFast(on_failure="halt"))


KINDS: Mapping[str, Any] = {
    "booking": Following,
    "slow": Slow,
    "with a fallback": WithFallback,
    "with a vain fallback": WithVainFallback,
    "recording": Recording,
    "pivot": Sale,
    "plain": Plain,
    "skips": Skips,
    "child": child,
    "child with pivot": child_with_pivot,
}


NEVER_UNDONE = {"pivot", "plain", "skips", "child with pivot"}


@st.composite
def policies(draw: st.DrawFn, names: str) -> Policy:
    common: dict[str, Any] = {
        "retry": Retry(attempts=draw(st.integers(1, 2)), wait=3),
        "timeout": draw(st.sampled_from([None, 20.0])),
        "compensation": Compensation(
            retry=Retry(attempts=draw(st.integers(1, 2))),
            max_concurrency=draw(st.sampled_from([None, 1])),
            on_failure=draw(st.sampled_from(["isolate", "continue", "halt"])),
        ),
        "in_flight": draw(st.sampled_from(["drain", "cancel"])),
        "drain_timeout": draw(st.sampled_from([None, 0.5, 30.0])),
        "on_failure": draw(st.sampled_from(["compensate", "compensate", "halt"])),
        "on_cancel": draw(st.sampled_from(["keep", "compensate"])),
        "on_interrupt": draw(st.sampled_from(["compensate", "halt"])),
        "deadline": draw(st.sampled_from([None, None, 100.0])),
    }
    if draw(st.booleans()):
        return FailFast(**common)
    return ContinueWithFallback(
        **common,
        fallbacks={name: {"instead_of": name} for name in draw(st.sets(st.sampled_from(names), max_size=2))},
        without_fallback=draw(st.sampled_from(["fail", "skip_branch"])),
        orphans=draw(st.sampled_from(["compensate", "keep"])),
    )


Saga = tuple[dict[str, tuple[str, tuple[str, ...]]], Policy]
"""Kind and dependencies of each stage, and the policy."""


@st.composite
def sagas(draw: st.DrawFn) -> Saga:
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    kinds = {name: draw(st.sampled_from(list(KINDS))) for name in names}
    if {"plain", "skips"}.issuperset(kinds.values()):
        kinds[names[-1]] = "booking"
    shape = {
        name: (kinds[name], tuple(sorted(draw(st.sets(st.sampled_from(names[:place]), max_size=2)))) if place else ())
        for place, name in enumerate(names)
    }
    return shape, draw(policies(names))


def built(shape: Mapping[str, tuple[str, tuple[str, ...]]], instead: Mapping[str, Any] | None = None) -> tuple[Town, Pipeline]:
    town, pipeline = Town(), Pipeline(name="drawn")
    for name, (kind, dependencies) in shape.items():
        pipeline = pipeline.with_stage(name, (instead or {}).get(name, KINDS[kind])(town, name), dependencies=dependencies)
    return town, pipeline


DEFECTS: Mapping[type[Booking], tuple[Fault, ...]] = {
    Forgetful: (Fault.UNDO_REPEATED,),
    Literal: (Fault.UNDO_REPEATED,),
    Indebted: (Fault.UNDO_REPEATED,),
    Lying: (Fault.TIMES_OUT_AFTER, Fault.RAISES_AFTER),
    Boasting: (Fault.TIMES_OUT_BEFORE,),
}
"""And what brings each to light."""


IN_DOUBT_BESIDE_WHAT_IS_STUCK: Saga = (
    {"a": ("booking", ()), "b": ("recording", ()), "c": ("child with pivot", ())},
    FailFast(compensation=Compensation(retry=Retry(attempts=1)), in_flight="cancel", on_interrupt="halt", on_failure="halt"),
)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(saga=sagas(), fault=st.sampled_from(list(Fault)), durable=st.booleans())
@example(saga=IN_DOUBT_BESIDE_WHAT_IS_STUCK, fault=Fault.UNDO_FAILS, durable=False)
def test_a_saga_as_it_should_be_passes(saga: Saga, fault: Fault, durable: bool) -> None:
    shape, policy = saga
    if fault in UNDOING and not any(kind not in NEVER_UNDONE for kind, _ in shape.values()):
        return
    town, pipeline = built(shape)

    assert run(verify(pipeline, policy, town, faults=[fault], durable=durable)).ok


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(saga=sagas(), defect=st.sampled_from(list(DEFECTS)), data=st.data())
def test_a_saga_with_one_defect_in_one_stage_does_not(saga: Saga, defect: type[Booking], data: st.DataObject) -> None:
    shape, policy = saga
    stage = data.draw(st.sampled_from(list(shape)))
    town, pipeline = built(shape, {stage: defect})

    with pytest.raises(VerificationFailed):
        run(verify(pipeline, policy, town, faults=DEFECTS[defect]))


@settings(max_examples=CASES // 4, deadline=None, suppress_health_check=list(HealthCheck))
@given(saga=sagas(), data=st.data())
def test_a_stage_that_acts_anew_at_every_attempt_does_not_if_the_policy_attempts_it_twice(saga: Saga, data: st.DataObject) -> None:
    shape, policy = saga
    stage = data.draw(st.sampled_from(list(shape)))
    town, pipeline = built(shape, {stage: Eager})
    policy = policy.model_copy(update={"retry": Retry(attempts=2), "on_failure": "halt"})

    with pytest.raises(VerificationFailed):
        run(verify(pipeline, policy, town, faults=[Fault.RAISES_AFTER]))
