"""Sagas told, not run: events at times of our choosing, so that a picture of them is the same every time."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stageflow.api import Pipeline, StageOutput

from saga import CompensableStage, ContinueWithFallback, FailFast, Failure, FailureKind, PivotStage, Policy, SagaReport, SagaStatus
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationFailed,
    CompensationStarted,
    SagaEnded,
    SagaStarted,
    SagaTurnedBack,
    StageCompleted,
    StageFailed,
    StageStarted,
    TurnReason,
)
from saga.graph import Graph, Node, Role
from saga.lint import Explanation, explain
from saga.text import written

BEGIN = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)


def moment(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


def failure(stage: str | None, message: str, at: float, *, attempt: int = 1, kind: FailureKind = FailureKind.EXCEPTION) -> Failure:
    name = {FailureKind.EXCEPTION: "shop.errors.CardDeclined", FailureKind.COMPENSATION: "shop.errors.Unreachable"}.get(kind, "")
    return Failure(stage=stage, kind=kind, type=name, message=message, attempt=attempt, at=moment(at))


class Story:
    """A saga as it is told: what happened, and how many seconds after its start."""

    def __init__(
        self,
        name: str,
        shape: Mapping[str, Iterable[str]],
        *,
        pivots: Iterable[str] = (),
        policy: FailFast | ContinueWithFallback | None = None,
    ) -> None:
        self.policy = policy or FailFast()
        roles = dict.fromkeys(shape, Role.COMPENSABLE) | dict.fromkeys(pivots, Role.PIVOT)
        graph = Graph.of(Node(name=stage, dependencies=tuple(needs), role=roles[stage]) for stage, needs in shape.items())
        self.events: list[AnyEvent] = [SagaStarted(at=BEGIN, saga_id="7f3a", pipeline=name, graph=graph, policy=self.policy)]

    def tell(self, at: float, event: type[AnyEvent], **fields: Any) -> Story:
        self.events.append(event(at=moment(at), **fields))
        return self

    def done(self, stage: str, start: float, end: float, /, **data: Any) -> Story:
        """The stage runs once and completes."""
        self.tell(start, StageStarted, stage=stage, attempt=1)
        return self.tell(end, StageCompleted, stage=stage, output=StageOutput.ok(**data))

    def fails(self, stage: str, start: float, end: float, message: str, *, attempt: int = 1, **fields: Any) -> Story:
        kind = fields.pop("kind", FailureKind.EXCEPTION)
        self.tell(start, StageStarted, stage=stage, attempt=attempt)
        return self.tell(end, StageFailed, stage=stage, failure=failure(stage, message, end, attempt=attempt, kind=kind), **fields)

    def turns_back(self, at: float) -> Story:
        cause = next(event.failure for event in self.events if isinstance(event, StageFailed) and not event.will_retry)
        return self.tell(at, SagaTurnedBack, reason=TurnReason.FAILURE, cause=cause)

    def undone(self, stage: str, start: float, end: float, *, attempt: int = 1) -> Story:
        self.tell(start, CompensationStarted, stage=stage, attempt=attempt)
        return self.tell(end, CompensationCompleted, stage=stage)

    def undo_fails(self, stage: str, start: float, end: float, message: str, *, attempt: int = 1, will_retry: bool = False) -> Story:
        self.tell(start, CompensationStarted, stage=stage, attempt=attempt)
        said = failure(stage, message, end, attempt=attempt, kind=FailureKind.COMPENSATION)
        return self.tell(end, CompensationFailed, stage=stage, failure=said, will_retry=will_retry)

    def ends(self, at: float, status: SagaStatus) -> Story:
        return self.tell(at, SagaEnded, status=status)

    @property
    def report(self) -> SagaReport:
        first, *rest = self.events
        return SagaReport.from_events([first, *sorted(rest, key=lambda event: event.at)])


def three_stages() -> SagaReport:
    """A trip: two reservations side by side, and a card that is declined."""
    return (
        Story("book_trip", {"reserve_seat": (), "reserve_room": (), "charge_card": ("reserve_seat", "reserve_room")})
        .done("reserve_seat", 0.0, 0.42, booking="seat 14A for OSL-JFK")
        .done("reserve_room", 0.001, 0.31, booking="room 7 for OSL-JFK")
        .fails("charge_card", 0.421, 0.61, "limit exceeded", will_retry=True)
        .fails("charge_card", 0.81, 0.97, "the card was declined", attempt=2)
        .turns_back(0.972)
        .undone("reserve_room", 0.973, 1.15)
        .undone("reserve_seat", 0.974, 1.24)
        .ends(1.241, SagaStatus.COMPENSATED)
        .report
    )


def twelve_stages() -> SagaReport:
    """An order of which one effect is stuck, and what it holds back."""
    shape = {
        "validate_order": (),
        "load_customer": (),
        "reserve_stock": ("validate_order",),
        "price_order": ("validate_order", "load_customer"),
        "authorise_card": ("price_order",),
        "reserve_courier": ("reserve_stock",),
        "print_label": ("reserve_courier",),
        "award_points": ("price_order", "load_customer"),
        "charge_card": ("authorise_card", "reserve_stock"),
        "hand_over": ("charge_card", "print_label"),
        "send_receipt": ("charge_card", "award_points"),
        "archive_order": ("hand_over", "send_receipt"),
    }
    story = Story("fulfil_order", shape)
    for stage, start, end in (
        ("validate_order", 0.0, 0.2),
        ("load_customer", 0.0, 0.9),
        ("reserve_stock", 0.2, 1.1),
        ("price_order", 0.9, 1.3),
        ("authorise_card", 1.3, 2.6),
        ("reserve_courier", 1.1, 2.0),
        ("print_label", 2.0, 2.3),
        ("charge_card", 2.6, 4.1),
    ):
        story.done(stage, start, end, id=f"{stage}-1")
    story.fails("award_points", 1.3, 1.6, "no answer within 0.3 s", kind=FailureKind.TIMEOUT, in_doubt=True, will_retry=True)
    story.tell(2.1, StageStarted, stage="award_points", attempt=2)
    story.tell(2.4, StageCompleted, stage="award_points", output=StageOutput.ok(points=120))
    story.fails("hand_over", 4.1, 4.9, "the depot is closed & nobody answers the door")
    story.done("send_receipt", 4.1, 4.6)
    story.turns_back(4.95)
    story.undone("send_receipt", 4.95, 5.2)
    story.undone("print_label", 4.95, 5.1)
    story.undo_fails("charge_card", 5.2, 5.6, "connection refused", will_retry=True)
    story.undo_fails("charge_card", 6.1, 6.5, "connection refused", attempt=2, will_retry=True)
    story.undo_fails("charge_card", 7.5, 7.9, "the bank does not answer", attempt=3)
    story.undone("award_points", 5.2, 5.5)
    story.undone("reserve_courier", 5.1, 5.4)
    return story.ends(7.95, SagaStatus.STUCK).report


def many_stages(count: int = 300, seed: int = 7) -> SagaReport:
    """A random graph in which one stage of the last third fails."""
    draw = random.Random(seed)
    words = ["reserve", "charge", "publish", "index", "notify", "copy", "lock", "price", "route", "label"]
    names = [f"{draw.choice(words)}_{draw.choice(['seat', 'item', 'file', 'order', 'customer'])}_{number:03}" for number in range(count)]
    shape: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(names):
        near = names[max(0, index - 25) : index]
        shape[name] = tuple(draw.sample(near, min(len(near), draw.choice([1, 1, 1, 2, 2, 3])))) if index > 8 else ()
    return simulated("publish_catalogue", shape, names[int(count * 0.8)], draw)


def simulated(name: str, shape: Mapping[str, Iterable[str]], failing: str, draw: random.Random) -> SagaReport:
    """Every stage takes its time as soon as it can; one fails, and what has completed by then is undone as soon as it can be."""
    story = Story(name, shape)
    ends: dict[str, float] = {}
    starts: dict[str, float] = {}
    for stage, needs in shape.items():
        starts[stage] = max((ends[need] for need in needs), default=0.0)
        ends[stage] = starts[stage] + draw.uniform(0.02, 0.6)
    stop = ends[failing]
    ran = [stage for stage in shape if starts[stage] < stop and stage != failing]
    for stage in ran:
        story.done(stage, starts[stage], ends[stage])
    story.fails(failing, starts[failing], stop, "the index refused the document: field 'price' is not a number")
    turn = max(stop, *(ends[stage] for stage in ran)) + 0.01
    story.turns_back(turn)
    clear: dict[str, float] = {}
    for stage in reversed(ran):
        start = max((clear[other] for other in ran if other in clear and stage in shape[other]), default=turn) + 0.001
        clear[stage] = start + draw.uniform(0.01, 0.3)
        story.undone(stage, start, clear[stage])
    return story.ends(max(clear.values()) + 0.01, SagaStatus.COMPENSATED).report


def chain(count: int) -> SagaReport:
    shape = {f"step_{number:03}": (f"step_{number - 1:03}",) if number else () for number in range(count)}
    return simulated("chain", shape, f"step_{count - 2:03}", random.Random(1))


def fan(count: int) -> SagaReport:
    parts = {f"resize_image_{number:03}": ("unpack",) for number in range(count)}
    return simulated("fan", {"unpack": (), **parts, "publish": tuple(parts)}, "publish", random.Random(2))


class Undoable(CompensableStage):
    async def execute(self, ctx: Any) -> None: ...

    async def compensate(self, ctx: Any) -> None: ...


class Final(PivotStage):
    async def execute(self, ctx: Any) -> None: ...


def plain(*, has_effect: bool) -> Any:
    async def execute(ctx: Any) -> None: ...

    execute.has_effect = has_effect  # type: ignore[attr-defined] # as a user would
    return execute


def thought_of(policy: Policy | None = None) -> Explanation:
    """An order that has not run: what would follow if one of its stages failed."""
    pipeline = (
        Pipeline(name="fulfil_order")
        .with_stage("load", plain(has_effect=False), "work")
        .with_stage("stock", Undoable, dependencies=("load",))
        .with_stage("courier", Undoable, dependencies=("load",))
        .with_stage("letter", plain(has_effect=True), "work", dependencies=("stock",))
        .with_stage("price", plain(has_effect=False), "work", dependencies=("stock", "courier"))
        .with_stage("charge", Undoable, dependencies=("price",))
        .with_stage("hand_over", Final, dependencies=("charge", "letter"))
        .with_stage("receipt", plain(has_effect=False), "work", dependencies=("hand_over",))
    )
    return explain(pipeline, policy)


def chain_thought_of(names: Iterable[str]) -> Explanation:
    pipeline, before = Pipeline(name="chain"), tuple[str, ...]()
    # What a stage can't be called, because keys and paths are made of it, is in the names of a nested saga's stages.
    for name in [written(name).replace("/", "|") for name in names]:
        pipeline, before = pipeline.with_stage(name, Undoable, dependencies=before), (name,)
    return explain(pipeline)


HOSTILE = (
    "<script>document.title = 'hacked'</script>",
    "\"quoted\" 'single' `tick` </svg></style></title>",
    "end",
    '%%{init: {"theme": "dark"}}%%',
    'a-->b; click s0 href "javascript:document.title = 1"',
    'style x:#f00;style:"x"#quot;',
    "\u202ereversed \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "two\nlines\r\n---\n",
    "x" * 10_000,
    "\x00\x1b[31m\ud800\ufffe control",
    "<img src=x onerror=\"document.title = 'hacked'\">",
    "日本語 🚀 ﬂ°°35¶ß e\u0301",
    "]]>--><!--&amp;#35;&lt;",
    "${title} $body",
    "it's the last",
)


def hostile() -> SagaReport:
    """A chain of stages whose names, outputs and errors are what a careless renderer trips over."""
    shape = {name: HOSTILE[max(0, index - 1) : index] for index, name in enumerate(HOSTILE)}
    story = Story("\n---\n%%{init}%% <script>document.title = 'hacked'</script> \"x\"" + "z" * 3_000, shape)
    *done, failing, _ = HOSTILE
    for at, name in enumerate(done):
        story.done(name, at, at + 1, **{name: name})
    said = '<img src=x onerror="document.title = \'hacked\'"> "\n%%{init}%% end\n\ud800\x00' + "y" * 10_000
    story.fails(failing, len(done), len(done) + 1, said).turns_back(len(done) + 1)
    for at, name in enumerate(reversed(done)):
        story.undone(name, len(done) + 1 + at, len(done) + 2 + at)
    return story.ends(3 * len(HOSTILE), SagaStatus.COMPENSATED).report


PICTURES: dict[str, Callable[[], str]] = {
    "book_trip.svg": lambda: three_stages().to_svg(),
    "book_trip-timeline.svg": lambda: three_stages().to_svg("timeline"),
    "fulfil_order.svg": lambda: twelve_stages().to_svg(),
    "if_hand_over_fails.svg": lambda: thought_of().to_svg("hand_over"),
}
"""What the docs show."""


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(sys.argv[1], name).write_text(draw() + "\n", encoding="utf-8")
