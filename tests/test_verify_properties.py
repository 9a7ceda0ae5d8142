"""Random sagas whose stages are as they should be pass, whatever their policy; with one defect in one stage they don't.

`SAGA_VERIFIED` sets the number of cases.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stageflow.api import Pipeline, StageContext, StageKind, StageOutput

from saga import (
    CompensableStage,
    Compensation,
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    PivotStage,
    Policy,
    Retry,
    SagaContext,
    nested,
)
from saga.testing import Fault, VerificationFailed, verify
from saga.testing.faults import UNDOING
from tests.controlled import elapse, run

CASES = int(os.environ.get("SAGA_VERIFIED", "60"))
NAMES = "abcd"


class Books:
    """A world of entries, by the keys of the requests that made them."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def reset(self) -> None:
        self.entries.clear()

    def look(self) -> Counter[str]:
        return Counter(self.entries.values())


class Entry(CompensableStage):
    """One entry, which can be found and taken out again."""

    def __init__(self, books: Books, name: str) -> None:
        self.books, self.name = books, name

    async def execute(self, ctx: SagaContext) -> StageOutput:
        seen = sorted(ctx.inputs.prior_outputs)
        self.books.entries[ctx.idempotency_key] = f"{self.name} after {seen}"
        return StageOutput.ok(name=self.name)

    async def compensate(self, ctx: CompensationContext) -> None:
        self.books.entries.pop(ctx.forward_key, None)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(name=self.name) if ctx.forward_key in self.books.entries else None


class SlowEntry(Entry):
    async def execute(self, ctx: SagaContext) -> StageOutput:
        await elapse(1)
        output = await super().execute(ctx)
        await elapse(1)
        return output


class Patched(Entry):
    """Its fallback makes an entry, too."""

    async def fallback(self, ctx: SagaContext, _: Failure) -> StageOutput:
        self.books.entries[f"{ctx.idempotency_key} instead"] = f"instead of {self.name}"
        return StageOutput.ok(name="instead")


class PatchedInVain(Entry):
    async def fallback(self, _: SagaContext, __: Failure) -> StageOutput:
        raise OSError("nothing to put in its place")


class Parts(CompensableStage):
    """Several entries, each noted; nobody can ask for them."""

    compensate_in_doubt = True

    def __init__(self, books: Books, name: str) -> None:
        self.books, self.name = books, name

    async def execute(self, ctx: SagaContext) -> None:
        for part in ("first", "second"):
            self.books.entries[f"{ctx.idempotency_key} {part}"] = f"{part} of {self.name}"
            await ctx.record(part)

    async def compensate(self, ctx: CompensationContext) -> None:
        for part in ("first", "second"):
            self.books.entries.pop(f"{ctx.forward_key} {part}", None)


class Pivot(PivotStage):
    def __init__(self, books: Books, name: str) -> None:
        self.books, self.name = books, name

    execute = Entry.execute
    probe = Entry.probe


class Plain:
    kind = StageKind.TRANSFORM

    def __init__(self, _: Books, name: str) -> None:
        self.name = name

    async def execute(self, _: StageContext) -> StageOutput:
        return StageOutput.ok(name=self.name)


class Skips(Plain):
    async def execute(self, _: StageContext) -> StageOutput:
        return StageOutput.skip("nothing to do")


def child(books: Books, name: str) -> Any:
    """A saga of two stages, the second of which needs the first."""
    inner = Pipeline(name=name).with_stage("one", Entry(books, f"{name}/one"))
    return nested(inner.with_stage("two", Entry(books, f"{name}/two"), dependencies=("one",)))


def child_with_pivot(books: Books, name: str) -> Any:
    inner = Pipeline(name=name).with_stage("one", Entry(books, f"{name}/one"))
    inner = inner.with_stage("point", Pivot(books, f"{name}/point"), dependencies=("one",))
    return nested(inner.with_stage("two", Entry(books, f"{name}/two"), dependencies=("point",)), FailFast(on_failure="halt"))


KINDS: Mapping[str, Any] = {
    "entry": Entry,
    "slow": SlowEntry,
    "patched": Patched,
    "patched in vain": PatchedInVain,
    "parts": Parts,
    "pivot": Pivot,
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
        kinds[names[-1]] = "entry"
    shape = {
        name: (kinds[name], tuple(sorted(draw(st.sets(st.sampled_from(names[:place]), max_size=2)))) if place else ())
        for place, name in enumerate(names)
    }
    return shape, draw(policies(names))


def built(shape: Mapping[str, tuple[str, tuple[str, ...]]], instead: Mapping[str, Any] | None = None) -> tuple[Books, Pipeline]:
    books, pipeline = Books(), Pipeline(name="drawn")
    for name, (kind, dependencies) in shape.items():
        pipeline = pipeline.with_stage(name, (instead or {}).get(name, KINDS[kind])(books, name), dependencies=dependencies)
    return books, pipeline


class UndoesNothing(Entry):
    async def compensate(self, ctx: CompensationContext) -> None: ...


class UndoesOnce(Entry):
    async def compensate(self, ctx: CompensationContext) -> None:
        del self.books.entries[ctx.forward_key]


class UndoesTooMuch(Entry):
    """Takes somebody else's entry when its own is gone."""

    async def compensate(self, ctx: CompensationContext) -> None:
        if self.books.entries.pop(ctx.forward_key, None) is None:
            self.books.entries["debt"] = "debt"


class FindsNothing(Entry):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return None


class FindsWhatIsNotThere(Entry):
    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(name=self.name)


class EntersAnew(Entry):
    """Makes another entry whenever it runs, whatever its key."""

    async def execute(self, ctx: SagaContext) -> StageOutput:
        same = [key for key in self.books.entries if key.startswith(f"{ctx.idempotency_key} ")]
        self.books.entries[f"{ctx.idempotency_key} {len(same)}"] = self.name
        return StageOutput.ok(name=self.name)

    async def compensate(self, ctx: CompensationContext) -> None:
        for key in [key for key in self.books.entries if key.startswith(f"{ctx.forward_key} ")]:
            del self.books.entries[key]

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        return StageOutput.ok(name=self.name) if f"{ctx.forward_key} 0" in self.books.entries else None


DEFECTS: Mapping[type[Entry], tuple[Fault, ...]] = {
    UndoesNothing: (Fault.UNDO_REPEATED,),
    UndoesOnce: (Fault.UNDO_REPEATED,),
    UndoesTooMuch: (Fault.UNDO_REPEATED,),
    FindsNothing: (Fault.TIMES_OUT_AFTER, Fault.RAISES_AFTER),
    FindsWhatIsNotThere: (Fault.TIMES_OUT_BEFORE,),
}
"""And what brings each to light."""


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(saga=sagas(), fault=st.sampled_from(list(Fault)), durable=st.booleans())
def test_a_saga_as_it_should_be_passes(saga: Saga, fault: Fault, durable: bool) -> None:
    shape, policy = saga
    if fault in UNDOING and not any(kind not in NEVER_UNDONE for kind, _ in shape.values()):
        return
    books, pipeline = built(shape)

    assert run(verify(pipeline, policy, books, faults=[fault], durable=durable)).ok


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(saga=sagas(), defect=st.sampled_from(list(DEFECTS)), data=st.data())
def test_a_saga_with_one_defect_in_one_stage_does_not(saga: Saga, defect: type[Entry], data: st.DataObject) -> None:
    shape, policy = saga
    stage = data.draw(st.sampled_from(list(shape)))
    books, pipeline = built(shape, {stage: defect})

    with pytest.raises(VerificationFailed):
        run(verify(pipeline, policy, books, faults=DEFECTS[defect]))


@settings(max_examples=CASES // 4, deadline=None, suppress_health_check=list(HealthCheck))
@given(saga=sagas(), data=st.data())
def test_a_stage_that_acts_anew_at_every_attempt_does_not_if_the_policy_attempts_it_twice(saga: Saga, data: st.DataObject) -> None:
    shape, policy = saga
    stage = data.draw(st.sampled_from(list(shape)))
    books, pipeline = built(shape, {stage: EntersAnew})
    policy = policy.model_copy(update={"retry": Retry(attempts=2), "on_failure": "halt"})

    with pytest.raises(VerificationFailed):
        run(verify(pipeline, policy, books, faults=[Fault.RAISES_AFTER]))
