"""Whatever a stage returns or raises, the saga comes to its end and the report can be written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from stageflow.api import Pipeline, StageArtifact, StageEvent, StageOutput, StageStatus

from saga import (
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.outputs import TAG, Opaque, copied, decoded, encoded
from tests.controlled import run


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not a word")

    __repr__ = __str__


class Unwilling:
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copy")

    def __repr__(self) -> str:
        raise RuntimeError("no words")


def cyclic() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def deep() -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"in": value}
    return value


ODD: dict[str, Callable[[], Any]] = {
    "data within itself": lambda: StageOutput.ok(cyclic()),
    "data nested deeply": lambda: StageOutput.ok(deep()),
    "data that can't be copied": lambda: StageOutput.ok(lock=threading.Lock(), other=Unwilling()),
    "an error that is no text": lambda: StageOutput.fail(error=12),  # type: ignore[arg-type] # what the test is about
    "an error that can't be told": lambda: StageOutput.fail(error=Mute()),  # type: ignore[arg-type] # as above
    "a status that is none": lambda: StageOutput(status="ok"),  # type: ignore[arg-type] # as above
    "a skip without words": lambda: StageOutput.skip(reason=Mute()),  # type: ignore[arg-type] # as above
    "a cancel without words": lambda: StageOutput.cancel(reason=Mute()),  # type: ignore[arg-type] # as above
    "a retry without words": lambda: StageOutput.retry(error=Mute()),  # type: ignore[arg-type] # as above
    "what can't be shown": Unwilling,
    "an exception that can't be told": Mute,
}


@pytest.mark.parametrize("case", ODD)
def test_a_saga_ends_and_can_be_reported_whatever_a_stage_returns_or_raises(case: str) -> None:
    async def odd(_: Any) -> Any:
        value = ODD[case]()
        if isinstance(value, Mute):
            raise value
        return value

    async def fail(_: Any) -> None:
        raise Mute

    async def undo(_: CompensationContext) -> None: ...

    pipeline = Pipeline().with_stage("odd", compensable(odd, undo)).with_stage("fail", fail, "work", dependencies=("odd",))

    report = run(SagaCoordinator(FailFast(on_cancel="compensate")).run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert report.cause is not None
    assert SagaReport.model_validate_json(report.model_dump_json()).status is report.status
    assert "COMPENSATED" in str(report)


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("role", ["compensate", "probe", "fallback"])
def test_a_saga_ends_whatever_its_other_code_returns_or_raises(role: str, case: str) -> None:
    async def odd(*_: Any) -> Any:
        value = ODD[case]()
        if isinstance(value, Mute):
            raise value
        return value

    async def fine(_: Any) -> None: ...

    async def fail(_: Any) -> None:
        raise ValueError("no")

    hooks: dict[str, Any] = {role: odd} if role != "compensate" else {}
    stage = compensable(fine if role == "compensate" else fail, odd if role == "compensate" else fine, **hooks)
    pipeline = Pipeline().with_stage("odd", stage).with_stage("fail", fail, "work", dependencies=("odd",))

    report = run(SagaCoordinator(ContinueWithFallback()).run(pipeline))

    assert report.ended_at is not None
    assert report.model_dump_json()


def test_a_defect_of_ours_ends_the_saga_with_an_error_instead_of_hanging_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fine(_: Any) -> None: ...

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("a", compensable(fine, fine)).with_stage("b", fail, "work", dependencies=("a",))

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("our own mistake")

    for where in ("saga.forward.normalised", "saga.alive.LiveSaga.compensation_context"):
        with monkeypatch.context() as patched:
            patched.setattr(where, broken)

            with pytest.raises(ZeroDivisionError):
                run(SagaCoordinator().run(pipeline))


def test_what_cannot_be_copied_does_not_keep_its_neighbours_from_being_copied() -> None:
    lock = threading.Lock()
    original = {"t": (lock, {"price": 300}), "l": [Unwilling(), {1}]}

    copy = copied(original)
    original["t"][1]["price"] = 0  # type: ignore[index] # a dict inside a tuple

    assert copy["t"] == (lock, {"price": 300})
    assert copy["l"][1] is not original["l"][1]


plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.decimals(allow_nan=False),
        st.datetimes(timezones=st.just(UTC)), st.dates(), st.times(), st.timedeltas(), st.uuids(), st.frozensets(st.integers()),
    ),
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner), st.dictionaries(st.integers(), inner),
        st.dictionaries(st.just(TAG), inner),
    ),
)  # fmt: skip


@given(plain)
def test_what_people_put_into_outputs_comes_back_equal(value: Any) -> None:
    copy = decoded(encoded(value))

    assert copy == value
    assert copied(value) == value


def test_an_output_comes_back_whole() -> None:
    output = StageOutput(
        status=StageStatus.OK,
        data={"when": datetime(2026, 1, 2, tzinfo=UTC), "price": Decimal("1.10"), "ids": {UUID(int=1)}, "nan": float("inf")},
        artifacts=[StageArtifact("audio", {"raw": b"x"}, datetime(2026, 1, 2, tzinfo=UTC))],
        events=[StageEvent("done", {"day": date(2026, 1, 2), "at": time(1), "for": timedelta(1)}, datetime(2026, 1, 3, tzinfo=UTC))],
        version="2",
        duration_ms=5,
    )

    async def whole(_: Any) -> StageOutput:
        return output

    report = run(SagaCoordinator().run(Pipeline().with_stage("whole", whole, "work")))

    assert report.kept["whole"] == output
    assert SagaReport.model_validate_json(report.model_dump_json()) == report


def test_models_and_dataclasses_become_plain_data_and_the_rest_is_named() -> None:
    class Model(BaseModel):
        price: Decimal

    @dataclass
    class Record:
        price: Decimal

    class Thing:
        def __repr__(self) -> str:
            return "a thing"

    assert decoded(encoded({"m": Model(price=Decimal(1)), "r": Record(Decimal(2))})) == {
        "m": {"price": Decimal(1)},
        "r": {"price": Decimal(2)},
    }
    opaque = decoded(encoded(Thing()))
    assert opaque == Opaque(f"{__name__}.test_models_and_dataclasses_become_plain_data_and_the_rest_is_named.<locals>.Thing", "a thing")
    assert decoded(encoded(opaque)) == opaque


def test_a_tag_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a tag out of"):
        decoded({TAG: "builtins.eval", "value": "1"})


def test_a_live_effect_that_looks_like_a_tag_is_left_as_it_is() -> None:
    async def book(ctx: Any) -> None:
        await ctx.record({TAG: "bytes", "value": "!"})

    async def undo(_: CompensationContext) -> None: ...

    report = run(SagaCoordinator().run(Pipeline().with_stage("book", compensable(book, undo))))

    assert report.stages["book"].state is StageState.KEPT
    assert report.stages["book"].effects == ({TAG: "bytes", "value": "!"},)
    assert SagaReport.model_validate_json(report.model_dump_json()) == report
