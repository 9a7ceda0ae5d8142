"""Whatever a stage returns or raises, the saga comes to its end and the report can be written."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, HttpUrl, RootModel, SecretStr, ValidationError
from pydantic_core import PydanticSerializationError
from stageflow.api import Pipeline, StageArtifact, StageEvent, StageOutput, StageStatus

from saga import (
    CompensationContext,
    ContinueWithFallback,
    FailFast,
    Failure,
    SagaContext,
    SagaCoordinator,
    SagaReport,
    SagaStatus,
    StageState,
    compensable,
)
from saga.encoding import TAG, Opaque, decoded, encoded, stored
from saga.errors import NotStorable
from saga.events import AnyEvent, EffectRecorded, StageCompleted, event_from_json, event_to_json
from saga.ledgers.sqlite import SQLiteLedger
from saga.outputs import copied, stored_output
from saga.text import said, shown
from tests.controlled import run
from tests.world import WATCHED, nothing


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not a word")

    __repr__ = __str__


class Unwilling:
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copy")

    def __repr__(self) -> str:
        raise RuntimeError("no words")


class Wordless:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


class Undecided:
    """As an array of several numbers."""

    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")

    def __repr__(self) -> str:
        return "undecided"


class Delegating(Exception):
    """As one that was unpickled before it had its response."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.response, name)


@dataclass(frozen=True)
class Refused(Exception):
    """One that lets nobody set an attribute of it, be it one of Python's own."""

    code: int


class Receipt(StageOutput):
    """An output with a constructor of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(StageStatus.OK, {"number": number})


def cyclic() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def deep() -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"in": value}
    return value


def nested(kind: Callable[[Any], Any], levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = kind([value])
    return value


ODD: dict[str, Callable[[], Any]] = {
    "data within itself": lambda: StageOutput.ok(cyclic()),
    "data nested deeply": lambda: StageOutput.ok(deep()),
    "data that can't be copied": lambda: StageOutput.ok(lock=threading.Lock(), other=Unwilling()),
    "data that can't be shown": lambda: StageOutput.ok(wordless=Wordless()),
    "an error that is no text": lambda: StageOutput.fail(error=12),  # type: ignore[arg-type] # what the test is about
    "an error that can't be told": lambda: StageOutput.fail(error=Mute()),  # type: ignore[arg-type] # as above
    "a status that is none": lambda: StageOutput(status="ok"),  # type: ignore[arg-type] # as above
    "a status that is no word": lambda: StageOutput(status=["fail"]),  # type: ignore[arg-type] # as above
    "a skip without words": lambda: StageOutput.skip(reason=Mute()),  # type: ignore[arg-type] # as above
    "a cancel without words": lambda: StageOutput.cancel(reason=Mute()),  # type: ignore[arg-type] # as above
    "a retry without words": lambda: StageOutput.retry(error=Mute()),  # type: ignore[arg-type] # as above
    "a failure neither true nor false": lambda: StageOutput.fail(error=Undecided()),  # type: ignore[arg-type] # as above
    "a skip neither true nor false": lambda: StageOutput.skip(reason=Undecided()),  # type: ignore[arg-type] # as above
    "a cancel neither true nor false": lambda: StageOutput.cancel(reason=Undecided()),  # type: ignore[arg-type] # as above
    "a failure without data": lambda: StageOutput(status=StageStatus.FAIL, data=None),  # type: ignore[arg-type] # as above
    "what can't be shown": Unwilling,
    "an exception that can't be told": Mute,
    "an exception that can't be asked": Delegating,
    "an exception that can't be changed": lambda: Refused(51),
    "an output with a constructor of its own": lambda: Receipt(7),
}


@pytest.mark.parametrize("case", ODD)
def test_a_saga_ends_and_can_be_reported_whatever_a_stage_returns_or_raises(case: str) -> None:
    async def odd(_: Any) -> Any:
        value = ODD[case]()
        if isinstance(value, Exception):
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
    assert repr(report).startswith("SagaReport(saga_id=")


@WATCHED
def test_a_skip_reason_that_is_neither_true_nor_false_fails_the_stage_that_it_is_for(interceptors: tuple[Any, ...]) -> None:
    standing = set()

    async def charge(_: Any) -> dict[str, Any]:
        standing.add("charge")
        return {"skip_reason": Undecided()}

    async def refund(_: CompensationContext) -> None:
        standing.discard("charge")

    pipeline = (
        Pipeline(name="p")
        .with_stage("charge", compensable(charge, refund))
        .with_stage("ship", nothing, "work", dependencies=("charge",), conditional=True)
    )

    report = run(SagaCoordinator(interceptors=interceptors).run(pipeline))

    assert standing == set()
    assert (report.status, report.failed) == (SagaStatus.COMPENSATED, ("ship",))
    assert "neither true nor false" in str(report.cause)


def test_of_what_cannot_be_shown_the_rest_of_a_report_is() -> None:
    async def odd(ctx: SagaContext) -> StageOutput:
        await ctx.record(Wordless())
        return StageOutput.ok(wordless=Wordless())

    async def undo(_: CompensationContext) -> None: ...

    report = run(SagaCoordinator().run(Pipeline().with_stage("odd", compensable(odd, undo)).with_stage("even", nothing, "work")))

    odd_one, even = repr(report.stages["odd"]), repr(report.stages["even"])
    assert "output=<stageflow.core.stage_output.StageOutput, which can't be shown: RuntimeError>, failure=None, " in odd_one
    assert "effects=<tuple, which can't be shown: RuntimeError>, fallback=False" in odd_one
    assert even.startswith("StageReport(state=<StageState.KEPT: 'kept'>, output=StageOutput(status=<StageStatus.OK: 'ok'>, data={}")
    assert even in repr(report.stages)


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("role", ["compensate", "probe", "fallback"])
def test_a_saga_ends_whatever_its_other_code_returns_or_raises(role: str, case: str) -> None:
    async def odd(*_: Any) -> Any:
        value = ODD[case]()
        if isinstance(value, Exception):
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


def test_a_compensation_that_answers_with_a_status_that_is_none_has_undone_nothing() -> None:
    async def fine(_: Any) -> None: ...

    async def fail(_: Any) -> None:
        raise ValueError("no")

    async def odd(_: CompensationContext) -> Any:
        return StageOutput(status=["failed"])  # type: ignore[arg-type] # what the test is about

    pipeline = Pipeline().with_stage("a", compensable(fine, odd)).with_stage("b", fail, "work", dependencies=("a",))

    report = run(SagaCoordinator().run(pipeline))

    assert [*report.stuck] == ["a"]
    assert report.failures[-1].message == "it returned ['FAILED']: no reason given"


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_compensation_that_returns_what_nobody_has_awaited_has_undone_nothing() -> None:
    standing = set()

    async def charge(_: Any) -> None:
        standing.add("charge")

    async def refund() -> None:
        standing.remove("charge")

    async def forgets_await(_: CompensationContext) -> Any:
        return refund()

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("a", compensable(charge, forgets_await)).with_stage("b", fail, "work", dependencies=("a",))

    report = run(SagaCoordinator().run(pipeline))

    assert standing == {"charge"}
    assert (report.status, [*report.stuck]) == (SagaStatus.STUCK, ["a"])
    failure = report.failures[-1]
    assert (failure.stage, failure.type, failure.attempt) == ("a", "coroutine", 3)
    assert failure.message.startswith("it returned <coroutine object ")
    assert failure.message.endswith("which nobody has awaited. Write await before its call")


@pytest.mark.parametrize("of", ["async", "plain"])
def test_a_compensation_that_returns_a_generator_has_undone_nothing(of: str) -> None:
    standing = set()

    async def charge(_: Any) -> None:
        standing.add("charge")

    async def refunds() -> Any:
        standing.remove("charge")
        yield

    def refunds_at_once() -> Any:
        standing.remove("charge")
        yield

    async def goes_through_nothing(_: CompensationContext) -> Any:
        return refunds() if of == "async" else refunds_at_once()

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("a", compensable(charge, goes_through_nothing)).with_stage("b", fail, "work", dependencies=("a",))

    report = run(SagaCoordinator().run(pipeline))

    assert standing == {"charge"}
    assert (report.status, [*report.stuck]) == (SagaStatus.STUCK, ["a"])
    failure = report.failures[-1]
    assert (failure.stage, failure.type, failure.attempt) == ("a", "async_generator" if of == "async" else "generator", 3)
    assert failure.message.startswith(f"it returned <{failure.type} object ")
    assert failure.message.endswith("which nobody has gone through to its end. Write return, and not yield, in it")


@pytest.mark.parametrize(
    ("refunds", "status"), [("at once", SagaStatus.COMPENSATED), ("never", SagaStatus.STUCK), ("not", SagaStatus.STUCK)]
)
def test_a_compensation_may_return_the_task_that_it_has_waited_for(refunds: str, status: SagaStatus) -> None:
    standing = set()

    async def charge(_: Any) -> None:
        standing.add("charge")

    async def refund() -> None:
        if refunds == "not":
            raise ConnectionError("no line to the bank")
        standing.discard("charge")

    async def waits_for_it(_: CompensationContext) -> Any:
        task = asyncio.ensure_future(refund())
        if refunds == "never":
            task.cancel()
        await asyncio.wait([task])
        return task

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("a", compensable(charge, waits_for_it)).with_stage("b", fail, "work", dependencies=("a",))

    report = run(SagaCoordinator().run(pipeline))

    assert standing == (set() if status is SagaStatus.COMPENSATED else {"charge"})
    assert report.status is status


def test_a_defect_of_ours_ends_the_saga_with_an_error_instead_of_hanging_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fine(_: Any) -> None: ...

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("a", compensable(fine, fine)).with_stage("b", fail, "work", dependencies=("a",))

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("our own mistake")

    for where in ("saga.outcomes.Outcome.of", "saga.live.saga.LiveSaga.compensation_context"):
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
        st.datetimes(timezones=st.none() | st.just(UTC) | st.just(timezone(timedelta(hours=-3)))), st.dates(), st.times(), st.timedeltas(),
        st.uuids(), st.frozensets(st.integers()), st.sets(st.integers() | st.text() | st.uuids()),
        st.sets(st.tuples(st.booleans(), st.dates())),
    ),
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner), st.dictionaries(st.integers(), inner),
        st.dictionaries(st.just(TAG), inner),
    ),
)  # fmt: skip


def typed(value: Any) -> Any:
    """A value with the types of all its parts: 1, True and Decimal(1) are equal, as a set and a frozenset are."""
    match value:
        case dict():
            parts: Any = [(typed(key), typed(part)) for key, part in value.items()]
        case list() | tuple():
            parts = [typed(part) for part in value]
        case set() | frozenset():
            parts = sorted(map(typed, value), key=repr)
        case datetime() | time():
            parts = repr(value.replace(fold=0))  # which counts for no equality
        case _:
            # repr() tells -0.0 from 0.0 and Decimal("1.0") from Decimal("1.00"), too.
            parts = repr(value)
    return type(value), parts


@given(plain)
def test_what_people_put_into_outputs_comes_back_equal(value: Any) -> None:
    copy = decoded(encoded(value))

    assert copy == value
    assert typed(copy) == typed(value)
    assert typed(copied(value)) == typed(value)
    stored(value, "value")


@given(plain)
def test_what_people_put_into_outputs_comes_back_equal_from_an_event(value: Any) -> None:
    events: list[AnyEvent] = [EffectRecorded(stage="a", effect=value), StageCompleted(stage="a", output=StageOutput.ok(value=value))]

    back: list[Any] = [event_from_json(event_to_json(event, strict=True)) for event in events]

    assert back == events
    assert typed(back[0].effect) == typed(back[1].output.data["value"]) == typed(value)


LIMITS: dict[str, Any] = {
    "a number of more digits than JSON is read with": 10**5000,
    "a negative one": -(10**5000),
    "a text with odd bytes": "report\udcff.pdf",
    "a key with odd bytes": {"report\udcff.pdf": 1},
    "as deep as can be": nested(list, 150),
    "tuples as deep as can be": nested(tuple, 75),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_is_at_the_limits_of_json_comes_back_equal(case: str) -> None:
    event = EffectRecorded(stage="a", effect=LIMITS[case])

    assert event_from_json(event_to_json(event, strict=True)) == event


class Price(BaseModel):
    amount: Any


@dataclass
class Seat:
    row: Any


@dataclass(frozen=True)
class Place:
    row: int


class Fare(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    amount: int = 1


class Seats(RootModel[tuple[int, ...]]):
    model_config = ConfigDict(frozen=True)


@dataclass
class Unset:
    row: int
    seat: int = field(init=False)


class Priceless(BaseModel):
    amount: int


class Anything(RootModel[Any]): ...


class Nowhere(tzinfo):
    def utcoffset(self, _: datetime | None) -> Any:
        raise RuntimeError("no zone")

    dst = tzname = utcoffset

    def __repr__(self) -> str:
        return "nowhere"


class Proxy:
    """Passes every question on to something that isn't there, as werkzeug's proxies do outside a request."""

    @property  # type: ignore[misc] # what the test is about
    def __class__(self) -> Any:
        raise RuntimeError("outside a request")

    def __deepcopy__(self, _: Any) -> Any:
        return self


UNWILLING: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a dataclass with a field that was never set": (
        lambda: Unset(row=1),
        "Unset",
        "AttributeError: 'Unset' object has no attribute 'seat'",
    ),
    "a model with a field that was never set": (
        lambda: Priceless.__new__(Priceless),
        "Priceless",
        "AttributeError: 'Priceless' object has no attribute 'amount'",
    ),
    "a time whose zone raises": (lambda: datetime(2026, 1, 2, tzinfo=Nowhere()), "datetime.datetime", "RuntimeError: no zone"),
    "a proxy of nothing": (Proxy, "Proxy", "RuntimeError: outside a request"),
}


@pytest.mark.parametrize("case", UNWILLING)
def test_what_raises_while_it_is_encoded_is_refused_by_the_path_to_it(case: str) -> None:
    make, name, why = UNWILLING[case]

    with pytest.raises(NotStorable) as caught:
        stored({"seats": [1, make()]}, "it")

    assert caught.value.path == "it['seats'][1]"
    assert f"{name}, which can't be encoded: " in str(caught.value)
    assert why in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("case", UNWILLING)
def test_what_raises_while_it_is_encoded_does_not_keep_its_neighbours_from_being_told(case: str) -> None:
    make, name, _ = UNWILLING[case]

    back = decoded(encoded({"seat": "14A", "odd": make()}))

    assert back["seat"] == "14A"
    assert isinstance(back["odd"], Opaque)
    assert back["odd"].type.endswith(name)


@pytest.mark.parametrize("case", UNWILLING)
def test_an_output_that_raises_while_it_is_encoded_stops_the_saga_and_what_its_stage_did_is_undone(case: str, tmp_path: Path) -> None:
    undone = []

    async def book(_: Any) -> StageOutput:
        return StageOutput.ok(seat="14A", odd=UNWILLING[case][0]())

    async def cancel(ctx: CompensationContext) -> None:
        assert ctx.output is not None
        undone.append(ctx.output.data["seat"])

    pipeline = Pipeline().with_stage("book", compensable(book, cancel))

    async def play() -> SagaReport:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            return await SagaCoordinator(ledger=ledger).run(pipeline)

    report = asyncio.run(play())

    assert report.status is SagaStatus.COMPENSATED
    assert undone == ["14A"]
    assert "expected plain data at data['odd'], got" in str(report.cause)


class Line(Enum):
    BUSY = object()


class Card(BaseModel):
    number: SecretStr


class Page(BaseModel):
    url: HttpUrl
    line: Any = None


PLACE = f"{__name__}.Place, which has no encoding as JSON that can be hashed"
UNSTORABLE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a lock": (threading.Lock, "it", "_thread.lock, which has no encoding as JSON"),
    "in a dict": (lambda: {"a": 1, "connection": threading.Lock()}, "it['connection']", "_thread.lock"),
    "in a list": (lambda: [1, [2, threading.Lock()]], "it[1][1]", "_thread.lock"),
    "in a tuple": (lambda: (threading.Lock(),), "it[0]", "_thread.lock"),
    "in a set": (lambda: {1, Unwilling}, "an item of it", "type"),
    "a key": (lambda: {"x": {Unwilling: 1}}, f"the key {Unwilling!r} of it['x']", "type"),
    "in a model": (lambda: {"price": Price(amount=threading.Lock())}, "it['price'].amount", "_thread.lock"),
    "in a dataclass": (lambda: [Seat(row={"a": threading.Lock()})], "it[0].row['a']", "_thread.lock"),
    "a dataclass itself": (lambda: Seat, "it", "type"),
    "a member of an enum of such": (lambda: {"line": Line.BUSY}, "it['line']", "object, which"),
    "a secret in a model": (lambda: {"card": Card(number=SecretStr("4111"))}, "it['card'].number", "pydantic.types.SecretStr"),
    "beside what its model writes itself": (lambda: Page(url=HttpUrl("http://x/"), line=object()), "it.line", "object, which"),
    "what can't be shown": (lambda: {"a": Unwilling()}, "it['a']", "Unwilling"),
    "a dataclass in a set": (lambda: {"seats": {Place(1)}}, "an item of it['seats']", PLACE),
    "a dataclass in a frozenset": (lambda: frozenset({Place(1)}), "an item of it", PLACE),
    "a dataclass as a key": (lambda: {Place(1): "Ann"}, "the key Place(row=1) of it", PLACE),
    "a dataclass in a tuple that is a key": (lambda: {(Place(1), 1): 2}, "the key (Place(row=1), 1) of it[0]", PLACE),
    "a model in a set": (lambda: {Fare()}, "an item of it", "Fare, which has no encoding as JSON that can be hashed"),
    "a model with our tag in a set": (lambda: {Fare.model_validate({TAG: "set"})}, "an item of it", "Fare, which"),
    "in a model of one value": (lambda: {"all": Anything([1, threading.Lock()])}, "it['all'][1]", "_thread.lock"),
    "what holds itself": (cyclic, "it", "more than 150 levels, or a value within itself"),
    "what is nested too deeply": (deep, "it", "more than 150 levels"),
    "a little too deeply": (lambda: nested(list, 152), "it", "more than 150 levels"),
    "tuples a little too deeply": (lambda: nested(tuple, 77), "it", "more than 150 levels"),
}


@pytest.mark.parametrize("case", UNSTORABLE)
def test_what_cannot_be_stored_is_refused_by_the_path_to_it(case: str) -> None:
    make, path, why = UNSTORABLE[case]

    with pytest.raises(NotStorable) as caught:
        stored(make(), "it")

    assert caught.value.path == path
    assert str(caught.value).startswith(f"expected plain data at {path}, got ")
    assert why in str(caught.value)
    assert isinstance(caught.value, ValueError)


class Colour(Enum):
    RED = "red"


class Lounge(StrEnum):
    NORTH = "north"


class Numbered(NamedTuple):
    row: int
    seat: str


class Shy(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "***"


DERIVED: dict[str, tuple[Any, Any]] = {
    "a text that says something else than it is": (Shy("Ann"), "Ann"),
    "a member of an enum": (Colour.RED, "red"),
    "a text of a type of its own": (SagaStatus.STUCK, "stuck"),
    "a dict in its order": (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "a dict with a default": (defaultdict(list, a=[1]), {"a": [1]}),
    "a tuple with names": (Numbered(14, "A"), (14, "A")),
    "bytes that can be changed": (bytearray(b"x"), b"x"),
    "keys and items": ({Lounge.NORTH: {Colour.RED}}, {"north": {"red"}}),
}


@pytest.mark.parametrize("case", DERIVED)
def test_a_value_of_a_type_that_was_derived_from_a_plain_one_comes_back_plain(case: str) -> None:
    value, back = DERIVED[case]
    event = EffectRecorded(stage="a", effect=value)

    assert typed(event_from_json(event_to_json(event, strict=True)).effect) == typed(back)  # type: ignore[union-attr] # it is that event


class Cents(Decimal):
    currency = "EUR"


class Nanoseconds(datetime):
    nanosecond = 7


class Basket(set[str]):
    owner = "Ann"


@pytest.mark.parametrize("value", [Cents("1.50"), Nanoseconds(2026, 11, 27, tzinfo=UTC), Basket({"a"})])
def test_a_value_of_a_type_that_may_hold_more_than_the_one_it_was_derived_from_is_refused(value: object) -> None:
    with pytest.raises(NotStorable, match=rf"at price, got .*{type(value).__name__}, which has no encoding"):
        stored(value, "price")


class Way(Enum):
    RED = "red"


ALIKE: dict[str, Any] = {
    "a key and what another one stands for": {Colour.RED: 1, "red": 2},
    "two keys that stand for the same": {Colour.RED: 1, Way.RED: 2},
    "keys within keys": {("a", Colour.RED): 1, ("a", "red"): 2},
    "items": {Colour.RED, Way.RED},
    "items that can't be changed": frozenset({Colour.RED, "red"}),
}


@pytest.mark.parametrize("case", ALIKE)
def test_of_two_that_would_come_back_as_one_neither_is_lost(case: str) -> None:
    with pytest.raises(NotStorable, match=r"data\['legs'\].*come back as the equal of another one"):
        stored_output(StageOutput.ok(legs=ALIKE[case]))

    assert len(decoded(encoded(ALIKE[case]))) == 2


class Pairs(RootModel[dict[Any, Any]]): ...


NAMED_LIKE_OUR_TAG: dict[str, tuple[Any, Any]] = {
    "the name of our tag": (Fare(**{TAG: "x"}), {"amount": 1, TAG: "x"}),
    "what looks as if we had written it": (Fare(**{TAG: "int", "value": "0x10"}), {"amount": 1, TAG: "int", "value": "0x10"}),
    "of a model that is a dict, too": (Pairs({TAG: "int", "value": "0x10"}), {TAG: "int", "value": "0x10"}),
    "of a model that is a dict, keys that JSON lacks": (Pairs({1: "a", ("b", 2): Decimal(1)}), {1: "a", ("b", 2): Decimal(1)}),
}


@pytest.mark.parametrize("case", NAMED_LIKE_OUR_TAG)
def test_what_a_model_holds_beyond_its_fields_comes_back_whatever_it_is_named(case: str) -> None:
    value, back = NAMED_LIKE_OUR_TAG[case]
    event = EffectRecorded(stage="a", effect=value)

    assert typed(event_from_json(event_to_json(event, strict=True)).effect) == typed(back)  # type: ignore[union-attr] # it is that event


@pytest.mark.parametrize(
    "when",
    [
        datetime(2026, 7, 1, 2, 30, tzinfo=ZoneInfo("Europe/Oslo")),
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Oslo")),
        datetime(2026, 3, 29, 2, 30, tzinfo=ZoneInfo("Europe/Oslo")),
        time(2, 30, tzinfo=ZoneInfo("Europe/Oslo")),
        time(2, 30, fold=1, tzinfo=ZoneInfo("Europe/Oslo")),
    ],
    ids=["summer", "in the hour that comes twice", "in the hour that is left out", "of any day", "of a day on which it comes twice"],
)
def test_a_time_comes_back_in_its_zone(when: datetime | time) -> None:
    back = decoded(encoded(when))

    assert (back, back.fold, back.tzinfo) == (when, when.fold, when.tzinfo)


@pytest.mark.parametrize("zone", ["Europe/Atlantis", "Europe", "E" * 300, "../Europe"])
def test_where_a_zone_is_unknown_the_moment_comes_back(zone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of some the package tzdata says so with an OSError, as of one that is a directory in it."""
    (tmp_path / "tzdata" / "zoneinfo" / "Europe").mkdir(parents=True)
    for package in ("tzdata", "tzdata/zoneinfo"):
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    plain = encoded(datetime(2026, 7, 1, 2, 30, tzinfo=ZoneInfo("Europe/Oslo")))
    plain["value"][1] = zone

    back = decoded(plain)

    assert back == datetime(2026, 7, 1, 0, 30, tzinfo=UTC)


def test_a_path_comes_back_as_one() -> None:
    assert typed(decoded(encoded({"file": Path("report.csv")}))) == typed({"file": Path("report.csv")})


HASHED: dict[str, tuple[Any, Any]] = {
    "tuples in a set": ({(1, (2, "a"))}, {(1, (2, "a"))}),
    "a frozenset as a key": ({frozenset({date(2026, 1, 2)}): 1}, {frozenset({date(2026, 1, 2)}): 1}),
    "a value of a key that is none": ({1: Place(2)}, {1: {"row": 2}}),
    "a model that is a tuple": ({Seats((1, 2))}, {(1, 2)}),
}


@pytest.mark.parametrize("case", HASHED)
def test_what_still_has_a_hash_when_it_comes_back_may_be_in_a_set_or_a_key(case: str) -> None:
    value, back = HASHED[case]
    event = EffectRecorded(stage="a", effect=value)

    assert event_from_json(event_to_json(event, strict=True)) == EffectRecorded(stage="a", effect=back, at=event.at)


@pytest.mark.parametrize("value", [{Place(1)}, {Place(1): "Ann"}], ids=["set", "key"])
def test_what_would_have_no_hash_any_more_is_named_in_a_report_all_the_same(value: Any) -> None:
    (back,) = decoded(encoded(value))

    assert back == Opaque(f"{__name__}.Place", "Place(row=1)")


def test_a_set_that_could_not_be_read_again_stops_the_saga_and_what_its_stage_did_is_undone(tmp_path: Path) -> None:
    undone = []

    async def book(_: Any) -> StageOutput:
        return StageOutput.ok(seats={Place(14)})

    async def cancel(ctx: CompensationContext) -> None:
        undone.append(ctx.output is not None)

    pipeline = Pipeline().with_stage("book", compensable(book, cancel))

    async def play() -> tuple[SagaReport, SagaReport]:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            coordinator = SagaCoordinator(ledger=ledger)
            return await coordinator.run(pipeline, saga_id="s"), await coordinator.report("s")

    ran, read = asyncio.run(play())

    assert ran.status is read.status is SagaStatus.COMPENSATED
    assert undone == [True]
    assert "an item of data['seats'], got" in str(read.cause)


OUTPUTS: dict[str, tuple[Callable[[], StageOutput], str]] = {
    "data": (lambda: StageOutput.ok(rows=[{"connection": threading.Lock()}]), "data['rows'][0]['connection']"),
    "artifacts": (
        lambda: StageOutput(status=StageStatus.OK, artifacts=[artifact(1), artifact(threading.Lock())]),
        "artifacts[1].payload['x']",
    ),
    "events": (
        lambda: StageOutput(status=StageStatus.OK, events=[StageEvent("e", {"x": threading.Lock()}, datetime(2026, 1, 1, tzinfo=UTC))]),
        "events[0].data['x']",
    ),
    "no artifact": (lambda: StageOutput(status=StageStatus.OK, artifacts=["a", {"x": threading.Lock()}]), "artifacts[1]['x']"),  # type: ignore[list-item] # what the test is about
    "no artifacts": (lambda: StageOutput(status=StageStatus.OK, artifacts=threading.Lock()), "artifacts"),  # type: ignore[arg-type] # as above
    "duration": (lambda: StageOutput(status=StageStatus.OK, duration_ms=threading.Lock()), "duration_ms"),  # type: ignore[arg-type] # what the test is about
}


def artifact(value: Any) -> StageArtifact:
    return StageArtifact("a", {"x": value}, datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("part", OUTPUTS)
def test_an_output_that_cannot_be_stored_is_refused_by_the_path_to_the_part(part: str) -> None:
    make, path = OUTPUTS[part]

    with pytest.raises(NotStorable) as caught:
        stored_output(make())

    assert caught.value.path == path
    stored_output(StageOutput(status=StageStatus.OK, data={"x": (1,)}, artifacts=[artifact(1)], duration_ms=5))


def test_what_cannot_be_stored_is_named_in_a_report_all_the_same() -> None:
    event = StageCompleted(stage="a", output=StageOutput.ok(lock=threading.Lock(), deep=nested(list, 300)))

    back: Any = event_from_json(event_to_json(event))

    assert isinstance(back.output.data, Opaque)
    with pytest.raises(PydanticSerializationError, match="NotStorable"):
        event_to_json(event, strict=True)


def test_an_effect_that_cannot_be_stored_is_refused_with_strict_alone() -> None:
    event = EffectRecorded(stage="a", effect=[threading.Lock()])

    assert "_thread.lock" in event_to_json(event)
    with pytest.raises(PydanticSerializationError, match=re.escape("value[0]")):
        event_to_json(event, strict=True)


def test_fallbacks_of_a_policy_come_back_equal() -> None:
    policy = ContinueWithFallback(fallbacks={"price": {"amount": Decimal("1.10"), "until": date(2026, 1, 2), "of": ("a", {1})}})

    assert ContinueWithFallback.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize("text", ["caf\u00e9", "plain", "report\udcff.pdf", "\ud83e"])
def test_words_can_always_be_written(text: str) -> None:
    error = ValueError(text)

    failure = Failure.raised("a", error, attempt=1)

    for words in (said(error), shown(error), failure.message, failure.traceback or ""):
        assert words.encode()
    assert said("caf\u00e9 \udcff") == "caf\u00e9 \\udcff"


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


NONSENSE: dict[str, Any] = {
    "a set of dicts": {TAG: "set", "value": [{"row": 1}]},
    "a tag without a value": {TAG: "uuid"},
    "a tag that is a list": {TAG: [], "value": 1},
    "a number that is none": {TAG: "decimal", "value": "many"},
    "a time longer than all": {TAG: "timedelta", "value": [10**12]},
}


@pytest.mark.parametrize("case", NONSENSE)
def test_an_event_with_a_value_that_nothing_can_be_made_of_is_refused(case: str) -> None:
    plain = json.dumps(NONSENSE[case])
    effect = event_to_json(EffectRecorded(stage="a", effect="it")).replace('"it"', plain)
    completed = event_to_json(StageCompleted(stage="a", output=StageOutput.ok(seat="it"))).replace('"it"', plain)

    for text in (effect, completed):
        with pytest.raises(ValidationError, match="expected what was written of a value, got"):
            event_from_json(text)


def test_a_live_effect_that_looks_like_a_tag_is_left_as_it_is() -> None:
    async def book(ctx: Any) -> None:
        await ctx.record({TAG: "bytes", "value": "!"})

    async def undo(_: CompensationContext) -> None: ...

    report = run(SagaCoordinator().run(Pipeline().with_stage("book", compensable(book, undo))))

    assert report.stages["book"].state is StageState.KEPT
    assert report.stages["book"].effects == ({TAG: "bytes", "value": "!"},)
    assert SagaReport.model_validate_json(report.model_dump_json()) == report


def test_an_output_with_a_constructor_of_its_own_is_what_its_compensation_gets() -> None:
    seen: list[StageOutput | None] = []

    async def pay(_: Any) -> StageOutput:
        return Receipt(7)

    async def refund(ctx: CompensationContext) -> None:
        seen.append(ctx.output)

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("pay", compensable(pay, refund)).with_stage("fail", fail, "work", dependencies=("pay",))

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert [(type(given), given and given.data) for given in seen] == [(Receipt, {"number": 7})]


@pytest.mark.parametrize("part", ["artifacts", "events"])
@pytest.mark.parametrize(
    "value",
    [[{"type": "invoice", "payload": {"no": Decimal("7.10")}}], ["invoice.pdf", ("a", 1), [1, 2, 3]], {"invoice": 7}, "invoice.pdf"],
    ids=["dicts", "others", "a dict", "a text"],
)
def test_what_stands_in_the_place_of_artifacts_or_events_is_kept_as_it_is_and_harms_no_saga(part: str, value: Any, tmp_path: Path) -> None:
    """stageflow looks at none of them."""
    seen: list[Any] = []

    async def book(_: Any) -> StageOutput:
        return StageOutput(status=StageStatus.OK, data={"seat": "14A"}, **{part: value})

    async def cancel(ctx: CompensationContext) -> None:
        assert ctx.output is not None
        seen.append(getattr(ctx.output, part))

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("book", compensable(book, cancel)).with_stage("fail", fail, "work", dependencies=("book",))

    async def play() -> tuple[SagaReport, SagaReport]:
        async with SQLiteLedger(tmp_path / "sagas.db") as ledger:
            coordinator = SagaCoordinator(ledger=ledger)
            return await coordinator.run(pipeline, saga_id="s"), await coordinator.report("s")

    ran, read = asyncio.run(play())

    assert ran.status is SagaStatus.COMPENSATED
    assert seen == [value]
    assert read == ran


@pytest.mark.parametrize("part", ["artifacts", "events"])
def test_what_stands_there_and_can_not_say_whether_it_is_empty_harms_no_saga(part: str) -> None:
    """As a table or an array of numbers: the saga was cut short by its error, and the effect stood."""
    value, seen = Undecided(), []

    async def book(_: Any) -> StageOutput:
        return StageOutput(status=StageStatus.OK, data={"seat": "14A"}, **{part: value})  # type: ignore[arg-type] # what the test is about

    async def cancel(ctx: CompensationContext) -> None:
        assert ctx.output is not None
        seen.append(type(getattr(ctx.output, part)))

    async def fail(_: Any) -> None:
        raise ValueError("no")

    pipeline = Pipeline().with_stage("book", compensable(book, cancel)).with_stage("fail", fail, "work", dependencies=("book",))

    report = run(SagaCoordinator().run(pipeline))

    assert report.status is SagaStatus.COMPENSATED
    assert seen == [Undecided]


@pytest.mark.parametrize("field", ["duration_ms", "error", "version"])
def test_an_empty_field_of_an_output_is_told_from_none(field: str) -> None:
    for value in (None, 0 if field == "duration_ms" else ""):
        event = StageCompleted(stage="a", output=StageOutput(status=StageStatus.OK, **{field: value}))  # type: ignore[arg-type] # either will do

        assert event_from_json(event_to_json(event)) == event
