"""A graph as Mermaid text: for what renders Mermaid, a forge's README or an issue for example."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

from saga.ledger import StageState
from saga.render.colours import LIGHT
from saga.render.drawing import Box, Drawing
from saga.render.lettering import one_line, shortened, wrapped, writable
from saga.render.wording import SIGNS
from saga.text import harmless

_MOST_ARROWS: Final = 500
"""Mermaid refuses more (`maxEdges`), and a diagram can't raise it."""
_NAME_ROOM: Final = 40
_LABEL_ROOM: Final = 60
# Mermaid knows no escapes, only numbered characters; and it looks for directives, comments and styles before it parses, by
# regular expressions that mind no quotes. So whatever is not plain is numbered, and with it what Mermaid marks its numbers with.
_NOT_PLAIN: Final = re.compile(r"[^\w ,.()'!?-]|[ﬂß]")


def graph_mermaid(drawing: Drawing) -> str:
    """A graph as a flowchart.

    Where the arrows of both directions would be more than Mermaid draws, the backward ones are left out: the order of undoing is
    in the boxes, too.
    """
    ids = {box.name: f"s{index}" for index, box in enumerate(drawing.boxes)}
    # It is YAML, which takes the escapes of JSON, and no control characters.
    title = harmless(json.dumps(one_line(writable(f"{drawing.title}: {drawing.verdict}")), ensure_ascii=False))
    lines = ["---", f"title: {title}", "---", "flowchart LR"]
    lines += [f'  {ids[box.name]}["{_label(box)}"]:::{box.state}' for box in drawing.boxes]
    lines += [f"  {ids[dependency]} --> {ids[name]}" for dependency, name in drawing.runs]
    undoes = _undoes(drawing, ids)
    if len(drawing.runs) + len(undoes) <= _MOST_ARROWS:
        lines += undoes
    else:
        undoes = []
    present = {box.state for box in drawing.boxes}
    for state in StageState:
        if state in present:
            shade = LIGHT.states[state]
            lines.append(f"  classDef {state} fill:{shade.fill},stroke:{shade.ink},color:{LIGHT.text}")
    if undoes:
        numbers = ",".join(str(len(drawing.runs) + index) for index in range(len(undoes)))
        lines.append(f"  linkStyle {numbers} stroke:{LIGHT.states[StageState.UNDONE].ink}")
    return "\n".join(lines) + "\n"


def _undoes(drawing: Drawing, ids: Mapping[str, str]) -> list[str]:
    # An arrow's head points at its end only, and arrows to and fro would be cycles, which Mermaid breaks where it likes: stages
    # would land before what they depend on. So these are lines in the forward direction whose label points back.
    places = {box.name: box.order for box in drawing.boxes}
    reached = {dependency for _, dependency in drawing.undoes}
    lines = [f"  {ids[dependency]} -.-|{_back(places[dependency])}| {ids[name]}" for name, dependency in drawing.undoes]
    return lines + [
        f"  {ids[name]} -.->|{order}| {ids[name]}" for name, order in places.items() if order is not None and name not in reached
    ]


def _back(place: int | None) -> str:
    return "←" if place is None else f"← {place}"


def _label(box: Box) -> str:
    # The space doesn't break: Mermaid 11 takes a + or a - with a plain one behind it for a list, and draws a complaint in place of it all.
    words = [f"{SIGNS[box.state]}\u00a0{shortened(box.name, _NAME_ROOM)}", *wrapped(box.label, _LABEL_ROOM, 1)]
    if box.is_cause:
        words.append("the cause")
    if box.order is not None:
        words.append(f"undoing, number {box.order}")
    return "<br/>".join(_NOT_PLAIN.sub(lambda found: f"#{ord(found[0])};", writable(line)) for line in words)
