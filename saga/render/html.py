"""The report as one HTML file: pictures, table and details, without scripts, readable offline, on paper, by keyboard and by ear.

A node of the graph is a link to its stage's details, which the browser opens by itself, because the link leads into them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from heapq import merge
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any, Final

from saga.encoding import encoded
from saga.failures import Failure
from saga.keys import is_path, is_within
from saga.ledger import StageState
from saga.render.advice import what_to_do
from saga.render.colours import DARK, LIGHT, Scheme, stylesheet
from saga.render.drawing import Drawing, drawing
from saga.render.graph import graph_section, graph_svg
from saga.render.lettering import cells, escaped, one_line, shortened, wrapped
from saga.render.svg import tag
from saga.render.text import explanation
from saga.render.timeline import timeline_section
from saga.render.wording import SIGNS, duration, seconds, words_of

if TYPE_CHECKING:
    from saga.recovery.record import Try
    from saga.report import SagaReport, StageReport

_NAME_ROOM: Final = 30
LINE: Final = 120
"""Columns of a name, or half of an explanation, that the overview shows; the details have all of it."""
_MOST: Final = 50_000
"""Characters of one output, or of one traceback, that are shown; a browser chokes on much more."""
_ISOLATES: Final = re.compile("[\u2066-\u2069]")


def page(report: SagaReport) -> str:
    """A whole page for one saga."""
    its = drawing(report)
    anchors = {name: f"stage-{place}" for place, name in enumerate(report.stages, 1)}
    return filled(f"{its.title}: {its.verdict}", "\n".join((_header(report, its), _main(report, its, anchors))))


def filled(title: str, body: str) -> str:
    """A page that needs nothing but itself; it has to have an element with the id `stages`."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escaped(one_line(title)),
        pictures=stylesheet(),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        body=body,
    )


def fragment(report: SagaReport) -> str:
    """The graph for a cell of a notebook: a picture that is scrolled when it is larger than the cell."""
    return tag("div", graph_svg(drawing(report)), style="overflow:auto;max-height:80vh")


def _variables(scheme: Scheme) -> str:
    focus, cause = scheme.states[StageState.RUNNING].ink, scheme.states[StageState.FAILED].ink
    values = {"paper": scheme.paper, "text": scheme.text, "faint": scheme.faint, "line": scheme.line, "band": scheme.band}
    values |= {"edge": scheme.edge, "focus": focus, "cause": cause}
    return "; ".join(f"--{name}: {value}" for name, value in values.items())


def isolated(words: str) -> str:
    """Somebody else's words: their direction, left or right, is kept to themselves."""
    # A browser takes the end of an isolate in them for that of their element: what is behind it would be read from right to left.
    return tag("bdi", escaped(_ISOLATES.sub(lambda found: f"\\u{ord(found[0]):04x}", words))) if words else ""


def link_to(name: str, anchors: dict[str, str]) -> str:
    """A stage's name, which leads to where there is more of it."""
    return tag("a", isolated(shortened(name, LINE)), class_="name", href=f"#{anchors[name]}")


def first_line(words: str) -> str:
    """What the overview shows of some words."""
    return "".join(isolated(line) for line in wrapped(words, 2 * LINE, 1))


def sign(state: StageState) -> str:
    """A state's sign on its colour."""
    return tag("span", tag("span", escaped(SIGNS[state]), class_="saga-pill", aria_hidden="true"), class_=f"saga-{state}")


def _header(report: SagaReport, its: Drawing) -> str:
    parts = [tag("h1", isolated(shortened(its.title, LINE)) or "Saga"), tag("p", sign(its.state) + its.verdict, class_="verdict")]
    if report.cause is not None:
        parts.append(tag("p", f"Cause: {isolated(str(report.cause))}", class_="cause", tabindex="0"))
    parts += [tag("p", tag("code", isolated(line.strip())) if line.startswith(" ") else isolated(line)) for line in what_to_do(report)]
    ended = f", ended {_moment(report.ended_at)}" if report.ended_at is not None else ""
    parts.append(tag("p", f"Saga {tag('code', isolated(report.saga_id))}, started {_moment(report.started_at)}{ended}", class_="faint"))
    links = (("#graph", "Graph"), ("#timeline", "Timeline"), ("#stages", "Stages"), ("#details", "Details"))
    nav = tag("nav", "".join(tag("a", words, href=to) for to, words in links), aria_label="On this page")
    return tag("header", "\n".join(parts)) + "\n" + nav


def _main(report: SagaReport, its: Drawing, anchors: dict[str, str]) -> str:
    links = {name: f"#{anchor}" for name, anchor in anchors.items()}
    within = [(failure.stage, failure) for failure in report.failures if failure.stage is not None and is_path(failure.stage)]
    details = "\n".join(_details(name, stage, report, anchors, within) for name, stage in report.stages.items())
    parts = (
        tag("h2", "Graph", id="graph"),
        scrolling("Graph, scrolls", graph_section(its, links)),
        tag("h2", "Timeline", id="timeline"),
        scrolling("Timeline, scrolls", timeline_section(report)),
        tag("h2", "Stages", id="stages"),
        _table(report, anchors),
        tag("h2", "Details", id="details"),
        details,
    )
    return tag("main", "\n".join(parts))


def scrolling(label: str, inside: str) -> str:
    """A part that scrolls by itself; the keyboard scrolls it, too, once it has the focus."""
    return tag("div", inside, class_="box", role="region", aria_label=label, tabindex="0")


def table(names: Collection[str], heads: str, rows: Iterable[str]) -> str:
    """A table of stages that scrolls by itself; each row begins with a name, for which there is room up to a point."""
    stages = "The only stage" if len(names) == 1 else f"The {len(names)} stages, each after those that it depends on"
    inside = tag("caption", stages) + tag("thead", tag("tr", heads)) + tag("tbody", "\n".join(tag("tr", row) for row in rows))
    widest = min(max(map(cells, names), default=0), _NAME_ROOM)
    return scrolling("Table of stages, scrolls", tag("table", inside, style=f"--names: {widest}ch"))


def _table(report: SagaReport, anchors: dict[str, str]) -> str:
    places = {name: str(place) for place, name in enumerate(report.compensation_order, 1)}
    heads = {"Stage": "", "State": "", "Attempts": "number", "Time": "number", "Undoing": "number", "What happened": ""}
    rows = []
    for name, stage in report.stages.items():
        parts = (
            tag("th", link_to(name, anchors), scope="row"),
            tag("td", sign(stage.state) + words_of(stage.state)),
            tag("td", str(stage.attempts), class_="number"),
            tag("td", seconds(stage.started_at, stage.ended_at) or "-", class_="number"),
            tag("td", places.get(name, "-"), class_="number"),
            tag("td", first_line(explanation(name, report)) or "-"),
        )
        rows.append("".join(parts))
    return table(report.stages, "".join(tag("th", words, scope="col", class_=kind) for words, kind in heads.items()), rows)


def _details(name: str, stage: StageReport, report: SagaReport, anchors: dict[str, str], within: Sequence[tuple[str, Failure]]) -> str:
    heading = tag("h3", tag("span", isolated(name), class_="name"))
    summary = tag("summary", f"{sign(stage.state)} {heading} {tag('span', words_of(stage.state), class_='faint')}")
    needs = ", ".join(link_to(needed, anchors) for needed in stage.dependencies) or "nothing"
    facts = [("Depends on", needs)]
    if name in report.compensation_order:
        facts.append(("Order of undoing", f"number {report.compensation_order.index(name) + 1} of {len(report.compensation_order)}"))
    if explained := explanation(name, report):
        facts.append(("What happened", isolated(explained)))
    parts = [tag("dl", "".join(tag("dt", term) + tag("dd", fact) for term, fact in facts))]
    parts += _tries("Attempts", stage.tries)
    if stage.compensation is not None:
        parts += _tries("Attempts to undo it", stage.compensation.tries)
    parts += _values("Effects", list(stage.effects))
    if stage.output is not None:
        parts += _values("Output", stage.output.data)
    if stage.late_output is not None:
        parts += _values("Output that came late", stage.late_output.data)
    for child in stage.children:
        parts += [tag("h4", "Saga within"), tag("pre", isolated(_cut(str(child))))]
    inner = [failure for path, failure in within if is_within(path, name)]
    for failure in merge(report.failures_of(name), inner, key=lambda failure: failure.at):
        parts += _failure(failure)
    return tag("details", summary + tag("div", "\n".join(parts), class_="inside", id=anchors[name], tabindex="-1"))


def _tries(title: str, tries: tuple[Try, ...]) -> list[str]:
    if not tries:
        return []
    items = []
    for started, ended, failed in tries:
        outcome = f"failed ({failed.value})" if failed is not None else "completed" if ended is not None else "no outcome recorded"
        took = f", {duration((ended - started).total_seconds())}" if ended is not None else ""
        items.append(tag("li", f"{_moment(started)}{took}, {outcome}"))
    return [tag("h4", title), tag("ol", "".join(items))]


def _values(title: str, value: Any) -> list[str]:
    return [tag("h4", title), tag("pre", isolated(_cut(_json(value))), tabindex="0")] if value else []


def _failure(failure: Failure) -> list[str]:
    parts = [tag("h4", f"Failure, {_moment(failure.at)}"), tag("p", isolated(_cut(str(failure))))]
    return [*parts, tag("pre", isolated(_cut(failure.traceback)))] if failure.traceback else parts


def _json(value: Any) -> str:
    try:
        return json.dumps(encoded(value), indent=2, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply to be shown"


def _cut(words: str) -> str:
    return words if len(words) <= _MOST else f"{words[:_MOST]} … and {len(words) - _MOST:,} more characters"


def _moment(at: datetime) -> str:
    return tag("time", f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03} UTC", datetime=at.isoformat())
