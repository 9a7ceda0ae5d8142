"""What is done quickly comes to the same: a dataclass or model that is frozen, equal, copied, derived from; an enumeration's members."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any

import pytest
from pydantic import ValidationError, field_validator
from stageflow.api import StageOutput

from saga.events import SagaStarted, StageCompleted, StageProbed, StageSettled, StageStarted, Verdict
from saga.ledger import StageState
from saga.quick import changer, frozen, maker, members
from saga.recovery.record import StageRecord
from saga.report import SagaReport, StageReport
from tests.stories import three_stages, twelve_stages
from tests.test_ledger import STARTED


@frozen
class Parcel:
    weight: float
    marks: list[str] = field(default_factory=list)
    insured: bool = False


@frozen
class Tracked(Parcel):
    number: str


def test_an_instance_is_of_its_class_and_has_its_fields() -> None:
    parcel = Tracked(weight=2.5, number="N1")

    assert type(parcel) is Tracked
    assert (parcel.weight, parcel.marks, parcel.insured, parcel.number) == (2.5, [], False, "N1")
    assert repr(parcel) == "Tracked(weight=2.5, marks=[], insured=False, number='N1')"
    assert parcel == Tracked(weight=2.5, number="N1")


def test_a_default_that_is_made_is_made_for_each() -> None:
    given: list[str] = []

    assert Parcel(weight=1).marks is not Parcel(weight=1).marks
    assert Parcel(weight=1, marks=given).marks is given


def test_a_maker_makes_what_the_class_does() -> None:
    make = maker(Tracked)

    made = make(weight=2.5, number="N1")

    assert type(made) is Tracked
    assert made == Tracked(weight=2.5, number="N1")
    assert made.marks is not make(weight=2.5, number="N1").marks
    with pytest.raises(FrozenInstanceError):
        made.number = "N2"  # type: ignore[misc] # what the test is about


def test_a_maker_leaves_it_to_a_class_that_looks_at_its_fields() -> None:
    @dataclass(frozen=True, slots=True)
    class Weighed:
        weight: float

        def __post_init__(self) -> None:
            if self.weight < 0:
                raise ValueError("weight")

    assert maker(Weighed)(weight=1.5) == Weighed(1.5)
    with pytest.raises(ValueError, match="weight"):
        maker(Weighed)(weight=-1)


def test_a_maker_takes_fields_by_place_where_the_class_does() -> None:
    @dataclass(frozen=True)
    class Label:
        text: str
        colours: tuple[str, ...] = ()

    assert maker(Label)("fragile", colours=("red",)) == Label("fragile", ("red",))


def test_a_maker_refuses_what_is_missing_or_unknown() -> None:
    with pytest.raises(TypeError, match="weight"):
        maker(Parcel)()  # type: ignore[call-arg] # what the test is about
    with pytest.raises(TypeError, match="colour"):
        maker(Parcel)(weight=1, colour="red")  # type: ignore[call-arg] # as above


def test_a_changer_makes_a_copy_in_which_one_part_is_another() -> None:
    parcel = Tracked(weight=2.5, marks=["fragile"], insured=True, number="N1")

    changed = changer(Tracked, "number")(parcel, "N2")

    assert type(changed) is Tracked
    assert changed == replace(parcel, number="N2")
    assert parcel.number == "N1"
    with pytest.raises(FrozenInstanceError):
        changed.number = "N3"  # type: ignore[misc] # what the test is about


def test_it_is_frozen_once_it_has_been_made() -> None:
    parcel = Parcel(weight=1)

    with pytest.raises(FrozenInstanceError):
        parcel.weight = 2  # type: ignore[misc] # what the test is about
    with pytest.raises(FrozenInstanceError):
        del parcel.weight


def test_what_is_missing_or_unknown_is_refused_as_by_any_constructor() -> None:
    with pytest.raises(TypeError, match="weight"):
        Parcel()  # type: ignore[call-arg] # what the test is about
    with pytest.raises(TypeError, match="colour"):
        Parcel(weight=1, colour="red")  # type: ignore[call-arg] # as above
    with pytest.raises(TypeError, match="positional"):
        Parcel(1)  # type: ignore[call-arg] # as above


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda parcel: pickle.loads(pickle.dumps(parcel)), replace])  # noqa: S301 - our own
def test_a_copy_is_its_equal_and_frozen(again: Any) -> None:
    parcel = Tracked(weight=1, marks=["fragile"], number="N1")

    twin: Tracked = again(parcel)

    assert twin == parcel
    assert type(twin) is Tracked
    with pytest.raises(FrozenInstanceError):
        twin.number = "N2"  # type: ignore[misc] # what the test is about


def test_a_class_that_somebody_derives_stays_that_class() -> None:
    class Plain(Parcel):
        """Has room for more."""

    @dataclass(frozen=True)
    class Own(Parcel):
        colour: str = "red"

    assert type(Plain(weight=1)) is Plain
    assert Plain(weight=1, marks=["a"]).marks == ["a"]
    assert Plain(weight=1).marks == []
    assert Own(weight=1) == Own(weight=1, colour="red")


def test_one_that_sees_to_more_when_it_is_made_is_left_to_dataclasses() -> None:
    seen: list[float] = []

    @frozen
    class Weighed:
        weight: float

        def __post_init__(self) -> None:
            seen.append(self.weight)

    Weighed(weight=3)

    assert seen == [3]


@pytest.mark.parametrize("kind", [SagaStarted, StageStarted, StageCompleted, StageReport])
def test_its_signature_tells_the_types_of_its_fields(kind: Any) -> None:
    signature = inspect.signature(kind)

    assert [*signature.parameters] == [one.name for one in fields(kind)]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_the_members_of_an_enumeration_are_its_own() -> None:
    kept: StageState = members(StageState).KEPT

    assert kept is StageState.KEPT
    assert {name: getattr(members(StageState), name) for name in StageState.__members__} == dict(StageState.__members__)
    assert not hasattr(members(StageState), "LOST")


@pytest.mark.parametrize("story", [three_stages, twelve_stages])
def test_a_report_is_as_if_it_had_been_validated(story: Any) -> None:
    """With the pydantic that is installed: the lowest that we allow, too, has to make nothing else of a model."""
    report = story()

    validated = SagaReport(**{name: getattr(report, name) for name in SagaReport.model_fields})

    assert report == validated
    assert [(name, type(value)) for name, value in vars(report).items()] == [(name, type(value)) for name, value in vars(validated).items()]
    assert report.model_fields_set == validated.model_fields_set
    assert report.model_extra is validated.model_extra is None
    assert repr(report) == repr(validated)
    assert report.model_dump(exclude_unset=True) == validated.model_dump(exclude_unset=True)
    assert report.model_dump_json() == validated.model_dump_json()
    copies: list[Any] = [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each)), SagaReport.model_copy]  # noqa: S301 - our own
    for again in copies:
        assert again(report) == again(validated) == report
        assert again(report).model_fields_set == report.model_fields_set
    assert report.model_copy(update={"past_pivot": True}) == validated.model_copy(update={"past_pivot": True})
    with pytest.raises(ValidationError, match="frozen"):
        report.past_pivot = True


def test_a_report_of_a_kind_that_somebody_derives_is_validated_as_that_kind_says() -> None:
    class Named(SagaReport):
        team: str = "trips"

        @field_validator("pipeline")
        @classmethod
        def _named(cls, name: str) -> str:
            return name.upper()

    report = Named.from_events([STARTED])

    assert (type(report), report.pipeline, report.team) == (Named, "P", "trips")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (StageRecord(late_output=StageOutput.ok(late=1)), "late_output"),
        (StageRecord(held=StageProbed(stage="a", landed=None, output=StageOutput.ok(late=1))), "late_output"),
        (StageRecord(settled=StageSettled(stage="a", verdict=Verdict.KEPT, note="seen", by="ann")), "settled"),
        ((three_stages(),), "children"),
        ({"s/a": "damaged"}, "unread"),
        ((Verdict.RETRY,), "verdicts"),
    ],
)
def test_what_is_rarely_to_be_told_of_a_stage_is_told_when_it_is_all(said: Any, told: str) -> None:
    record = said if isinstance(said, StageRecord) else StageRecord()
    record.state = StageState.KEPT

    report = StageReport.of(record, record.state, (), **({} if record is said else {told: said}))

    bare = StageReport(state=record.state)
    assert [each.name for each in fields(report) if getattr(report, each.name) != getattr(bare, each.name)] == [told]
