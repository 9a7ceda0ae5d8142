"""What a picture of a graph shows, as plain data: the same for a saga that has run and for one that is only thought of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from saga.ledger import StageState
from saga.render.colours import LIKE
from saga.render.lettering import one_line
from saga.render.text import explanation, troubled
from saga.render.wording import counted, seconds, words_of

if TYPE_CHECKING:
    from saga.report import SagaReport, StageReport

_S = StageState
_TURNS: Final = frozenset({_S.FAILED, _S.CANCELLED, _S.IN_DOUBT})
"""The states of stages that went wrong: a saga turns back there, also where nothing was undone."""


@dataclass(frozen=True, slots=True)
class Box:
    """A stage in a picture.

    Attributes:
        name: The stage's.
        state: Decides colour, border and sign.
        label: A few words beneath the name.
        hint: Everything there is to say, in a sentence or two: for a pointer that rests on it, and for a screen reader.
        order: Its place in the backward run, 1 is the first; None if it has none.
        is_cause: Whether it stopped the saga first.
    """

    name: str
    state: StageState
    label: str = ""
    hint: str = ""
    order: int | None = None
    is_cause: bool = False


@dataclass(frozen=True, slots=True)
class Drawing:
    """A graph to be drawn.

    Attributes:
        title: What it is a picture of.
        state: What the whole looks like.
        verdict: How the whole stands, in a few words.
        cause: What stopped it; empty if nothing did.
        boxes: The stages, in topological order.
        runs: The forward arrows: (dependency, dependent).
        undoes: The backward arrows: (dependent, dependency).
        meanings: What a state stands for, where that is not what it is called.
    """

    title: str
    state: StageState
    verdict: str
    cause: str
    boxes: tuple[Box, ...]
    runs: tuple[tuple[str, str], ...]
    undoes: tuple[tuple[str, str], ...]
    meanings: Mapping[StageState, str] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """The picture in words."""
        said = [self.verdict + "."]
        if self.cause:
            said.append(f"Cause: {self.cause.rstrip('.')}.")
        for state in StageState:
            names = [box.name for box in self.boxes if box.state is state]
            if names:
                meaning = self.meanings.get(state, words_of(state))
                said.append(f"{meaning.capitalize()}: {', '.join(names)}.")
        undone = sorted((box.order, box.name) for box in self.boxes if box.order is not None)
        if undone:
            said.append(f"Order of undoing: {', '.join(name for _, name in undone)}.")
        return " ".join(said)


def drawing(report: SagaReport) -> Drawing:
    """The picture of a saga."""
    # One that stands after all, because the saga was run on or a pivot within it was passed, is no part of the way back.
    places = {name: place for place, name in enumerate(report.compensation_order, 1) if report.stages[name].state is not _S.KEPT}
    took = seconds(report.started_at, report.ended_at)
    runs = tuple((dependency, name) for name, stage in report.stages.items() for dependency in stage.dependencies)
    turned = {name for name, stage in report.stages.items() if name in places or stage.state in _TURNS}
    return Drawing(
        title=report.pipeline,
        state=LIKE[report.status],
        verdict=report.status.value + (f" after {took}" if took else ""),
        cause="" if report.cause is None else str(report.cause),
        boxes=tuple(
            Box(
                name=name,
                state=stage.state,
                label=_label(stage),
                hint=_hint(name, stage, report),
                order=places.get(name),
                is_cause=report.cause is not None and report.cause.stage == name,
            )
            for name, stage in report.stages.items()
        ),
        runs=runs,
        undoes=tuple(way_back(report.stages, runs, turned, places)),
    )


def way_back(
    names: Iterable[str], runs: Iterable[tuple[str, str]], turned: Iterable[str], undone: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The arrows along which a saga goes backward.

    They lead from the stages that `turned`, against the dependencies, to those that are `undone`; also through stages in between
    that have nothing to undo.

    Args:
        names: The stages, in topological order.
        runs: The forward arrows.
        turned: Where something went wrong or was undone.
        undone: What was undone.
    """
    dependencies: dict[str, list[str]] = {name: [] for name in names}
    for dependency, name in runs:
        dependencies[name].append(dependency)
    leads: set[str] = set()
    for name, needed in dependencies.items():
        if name in undone or not leads.isdisjoint(needed):
            leads.add(name)
    reached, arrows = set(turned), []
    for name in reversed(list(dependencies)):
        if name in reached:
            ways = [dependency for dependency in dependencies[name] if dependency in leads]
            arrows += [(name, dependency) for dependency in ways]
            reached.update(ways)
    return arrows


def _label(stage: StageReport) -> str:
    state = words_of(stage.state) + (" · trouble within" if troubled(stage) or (stage.unread and not stage.is_known_by_word) else "")
    if stage.state in _TURNS and stage.failure is not None:
        return f"{state}: {one_line(stage.failure.message)}"
    if stage.state is _S.STUCK and stage.compensation is not None and stage.compensation.failure is not None:
        return f"{state}: {one_line(stage.compensation.failure.message)}"
    tries = f"{stage.attempts} attempts" if stage.attempts > 1 else ""
    return " · ".join(part for part in (state, tries, seconds(stage.started_at, stage.ended_at)) if part)


def _hint(name: str, stage: StageReport, report: SagaReport) -> str:
    tries = counted(stage.attempts, "attempt") if stage.attempts else ""
    facts = (words_of(stage.state), tries, seconds(stage.started_at, stage.ended_at))
    explained = explanation(name, report)
    return f"{name}: {', '.join(fact for fact in facts if fact)}" + (f"; {explained}" if explained else "")
