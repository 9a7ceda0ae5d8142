"""An explanation for people: for each stage the graph as a failure of that stage leaves it, and one HTML file with all of them.

The page has no script: a stage in a picture is a link to the picture of its own failure, and the stylesheet shows what was chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from saga.ledger import StageState
from saga.render.colours import LIKE
from saga.render.drawing import Box, Drawing, way_back
from saga.render.graph import graph_section
from saga.render.html import LINE, filled, first_line, isolated, link_to, scrolling, sign, table
from saga.render.lettering import shortened
from saga.render.svg import tag
from saga.render.wording import words_of

if TYPE_CHECKING:
    from saga.lint import Consequence, Explanation

_S = StageState
_MEANINGS: Final = {_S.FAILED: "fails", _S.FALLBACK: "fails, its fallback stands in", _S.STUCK: "impossible to undo"}
_TURNED: Final = frozenset({_S.FAILED, _S.SKIPPED, _S.UNDONE})
"""Where the backward arrows come from."""
_MOST_BOXES: Final = 10_000
"""So many in all the pictures of a page; a browser chokes on much more."""


def drawing_if(explanation: Explanation, stage: str) -> Drawing:
    """The picture of what follows when that stage fails."""
    consequence = explanation.stages[stage]
    runs = tuple((dependency, name) for name, needed in explanation.dependencies.items() for dependency in needed)
    waves = {name: number for number, wave in enumerate(consequence.undone, 1) for name in wave}
    boxes = tuple(_box(name, consequence, waves.get(name)) for name in explanation.stages)
    turned = {box.name for box in boxes if box.state in _TURNED}
    return Drawing(
        title=explanation.pipeline,
        state=LIKE[consequence.status],
        verdict=f"if {stage} fails: {consequence.status.value}",
        cause="",
        boxes=boxes,
        runs=runs,
        undoes=tuple(way_back(explanation.stages, runs, turned, waves)),
        meanings=_MEANINGS,
    )


def _box(name: str, consequence: Consequence, wave: int | None) -> Box:
    state = _state(name, consequence)
    label = _MEANINGS.get(state, words_of(state))
    order = f", number {wave} in the order of undoing" if wave is not None else ""
    return Box(name=name, state=state, label=label, hint=f"{name}: {label}{order}", order=wave, is_cause=name == consequence.stage)


def _state(name: str, consequence: Consequence) -> StageState:
    if any(name in wave for wave in consequence.undone):
        return _S.UNDONE
    if name in consequence.impossible:
        return _S.STUCK
    if name == consequence.stage:
        return _S.FALLBACK if name in consequence.kept else _S.FAILED
    if name in consequence.kept:
        return _S.KEPT
    return _S.SKIPPED if consequence.absorbed else _S.NOT_RUN


def page(explanation: Explanation) -> str:
    """A whole page for one pipeline."""
    anchors = {name: f"if-{place}" for place, name in enumerate(explanation.stages, 1)}
    head = (
        tag("h1", isolated(shortened(explanation.pipeline, LINE)) or "Pipeline"),
        tag("p", "What follows when one stage fails, if all that doesn't depend on it has completed by then and nothing else fails."),
        tag("p", "Choose a stage, here or in a picture.", class_="faint"),
    )
    main = [tag("div", _table(explanation, anchors), id="stages"), *(_section(explanation, name, anchors) for name in anchors)]
    body = tag("header", "\n".join(head)) + "\n" + tag("main", "\n".join(main), class_="choice")
    return filled(f"{explanation.pipeline}: if a stage fails", body)


def _table(explanation: Explanation, anchors: dict[str, str]) -> str:
    rows = []
    for name, consequence in explanation.stages.items():
        status = sign(LIKE[consequence.status]) + consequence.status.value
        follows = first_line("; ".join(consequence.what_follows))
        rows.append("".join((tag("th", link_to(name, anchors), scope="row"), tag("td", status), tag("td", follows))))
    heads = "".join(tag("th", words, scope="col") for words in ("If it fails", "The saga is", "What follows"))
    return table(anchors, heads, rows)


def _section(explanation: Explanation, name: str, anchors: dict[str, str]) -> str:
    consequence = explanation.stages[name]
    status = f"the saga is {consequence.status.value}"
    parts = [tag("h2", f"{sign(LIKE[consequence.status])}If {isolated(shortened(name, LINE))} fails, {status}")]
    parts += [tag("p", isolated(line)) for line in consequence.what_follows]
    if len(anchors) ** 2 <= _MOST_BOXES:
        links = {other: f"#{anchor}" for other, anchor in anchors.items()}
        parts.append(scrolling("Graph, scrolls", graph_section(drawing_if(explanation, name), links)))
    parts.append(tag("p", tag("a", "All stages", href="#stages"), class_="faint"))
    return tag("section", "\n".join(parts), id=anchors[name])
