"""The graph of a saga: stages in layers, forward arrows, and the backward run as second arrows with their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from saga.render.drawing import Box, Drawing
from saga.render.layout import layout
from saga.render.lettering import cells, escaped, shortened, wrapped
from saga.render.svg import NAME_CELL, TEXT_CELL, Key, document, number, path, pill, section, state_keys, tag, text
from saga.render.wording import counted

DESK: Final = 1100.0
"""Pixels that a picture may be wide on a desk without being scrolled."""

_HEIGHT: Final = 46.0
_BETWEEN: Final = 16.0
_BEFORE_TEXT: Final = 42.0
_AFTER_TEXT: Final = 14.0
_NAME_ROOM: Final = 24
_LABEL_ROOM: Final = 30
_PORT: Final = 10.0
"""Forward arrows leave and reach a box so far before its middle, backward ones so far behind it."""
_HEAD: Final = 8.0
_BADGE: Final = 9.5
_OVERLAP: Final = 4.0
_GAP: Final = 62.0
_FAR: Final = 260.0
_TRACK: Final = 9.0
_BEND: Final = 14.0


def graph_svg(drawing: Drawing) -> str:
    """A graph as a picture that stands for itself."""
    plan = _plan(drawing)
    return document(drawing, plan.parts(None), _keys(drawing), width=plan.width, height=plan.height)


def graph_section(drawing: Drawing, links: Mapping[str, str]) -> str:
    """A graph as a part of a page, each stage a link to where `links` says."""
    plan = _plan(drawing)
    label = f"Graph of {drawing.title}: {counted(len(drawing.boxes), 'stage')}"
    return section(label, plan.parts(links), _keys(drawing), width=plan.width, height=plan.height, role="group")


def _keys(drawing: Drawing) -> list[Key]:
    keys = state_keys((box.state for box in drawing.boxes), drawing.meanings)
    if drawing.runs:
        keys.append(Key(path("run", ["M0,8H23"]) + path("run-head", ["M30,8l-8,-4.5v9z"]), 30, "runs before"))
    if any(box.order is not None for box in drawing.boxes):
        arrow = path("back", ["M27,8H46"]) + path("back-head", ["M19.5,8l8,-4.5v9z"])
        keys.append(Key(badge(10, 8, "1") + arrow, 46, "order of undoing"))
    return keys


def badge(x: float, y: float, order: str) -> str:
    """A place in the backward run, around that point."""
    half = badge_half(order)
    ground = tag("rect", class_="saga-back-head", x=x - half, y=y - _BADGE, width=2 * half, height=2 * _BADGE, rx=_BADGE)
    return ground + text(x, y + 4, order, "number")


def badge_half(order: str) -> float:
    """Half the width of a badge."""
    return _BADGE + 3.5 * (len(order) - 1)


def _plan(drawing: Drawing) -> _Plan:
    """The graph from left to right, unless that is too wide for a desk and from top to bottom is narrower."""
    across = _Plan(drawing, downward=False)
    if across.width <= DESK:
        return across
    return min(across, _Plan(drawing, downward=True), key=lambda plan: plan.width)


class _Hop(NamedTuple):
    """A stretch of an arrow, from one layer to the next.

    Attributes:
        layer: The one where it begins.
        source: Where it begins: a stage, and how many layers behind it.
        target: Where it ends, likewise.
        start: The place across where it begins.
        end: And where it ends.
    """

    layer: int
    source: tuple[str, int]
    target: tuple[str, int]
    start: float
    end: float

    @property
    def is_far(self) -> bool:
        """Whether a curve would be too flat to be followed: then it runs along a track between the layers."""
        return abs(self.end - self.start) > _FAR

    def ends(self, port: float) -> tuple[float, float]:
        """Where an arrow begins and ends that keeps so far from the middle of boxes; in lanes there and back keep closer together."""
        return self.start + port / (2 if self.source[1] else 1), self.end + port / (2 if self.target[1] else 1)


class _Plan:
    """A graph laid out in one direction.

    It is drawn in terms of along the arrows and across them; `_at` alone knows which is x and which is y.
    """

    def __init__(self, drawing: Drawing, *, downward: bool) -> None:
        self._downward = downward
        self._runs = drawing.runs
        self._undoes = tuple((dependency, name) for name, dependency in drawing.undoes)
        self._boxes = {box.name: box for box in drawing.boxes}
        dependencies: dict[str, list[str]] = {name: [] for name in self._boxes}
        for dependency, name in drawing.runs:
            dependencies[name].append(dependency)
        self._wide = {name: _width(box) for name, box in self._boxes.items()}
        self._layout = layout(dependencies, {name: (wide if downward else _HEIGHT) + _BETWEEN for name, wide in self._wide.items()})
        self._hubs: dict[_Hop, tuple[str, int]] = {}
        self._tracks: list[dict[tuple[str, int], float]] = [{} for _ in range(self._layout.layers)]
        self._begin: list[float] = []
        self._end: list[float] = []
        self._lay()
        length = max((self._end[its] + self._stands_out(name) for name, its in self._layout.layer.items()), default=0.0)
        self.width, self.height = (self._layout.breadth, length) if downward else (length, self._layout.breadth)

    def _lay(self) -> None:
        """Say where each layer begins and ends, and where between them the tracks run."""
        far = {hop for hop in self._hops(self._runs) if hop.is_far}
        met = Counter(end for hop in far for end in ((hop.layer, hop.source), (hop.layer, hop.target)))
        between: list[dict[tuple[str, int], None]] = [{} for _ in self._tracks]
        for hop in sorted(far):
            # What meets at one end shares a track.
            hub = hop.source if met[hop.layer, hop.source] >= met[hop.layer, hop.target] else hop.target
            self._hubs[hop] = hub
            between[hop.layer][hub] = None
        names: list[list[str]] = [[] for _ in self._tracks]
        for name, its in self._layout.layer.items():
            names[its].append(name)
        along = 0.0
        for layer, (hubs, inside) in enumerate(zip(between, names, strict=True)):
            self._begin.append(along)
            self._end.append(along + (_HEIGHT if self._downward else max(self._wide[name] for name in inside)))
            first = self._end[-1] + max(_GAP / 2, *(self._socket(name) + _HEAD + _BEND for name in inside))
            self._tracks[layer] = {hub: first + _TRACK * index for index, hub in enumerate(hubs)}
            along = first + _TRACK * len(hubs) + _GAP / 2

    def _hops(self, arrows: Iterable[tuple[str, str]]) -> Iterator[_Hop]:
        """The stretches of arrows; what several have of one stage's lanes comes once."""
        come: dict[str, int] = {}
        for dependency, name in arrows:
            first, place, lanes = self._layout.layer[dependency], self._layout.place[dependency], self._layout.lanes[dependency]
            steps = self._layout.layer[name] - first - 1
            for step in range(come.get(dependency, 0), steps):
                start = lanes[step - 1] if step else place
                yield _Hop(first + step, (dependency, step), (dependency, step + 1), start, lanes[step])
            come[dependency] = max(come.get(dependency, 0), steps)
            start = lanes[steps - 1] if steps else place
            yield _Hop(first + steps, (dependency, steps), (name, 0), start, self._layout.place[name])

    def parts(self, links: Mapping[str, str] | None) -> list[str]:
        """The arrows, and the boxes on top of them."""
        return [*self._forward(), *self._backward(), *(self._box(box, links) for box in self._boxes.values())]

    def _at(self, along: float, across: float) -> str:
        x, y = (across, along) if self._downward else (along, across)
        return f"{number(x)},{number(y)}"

    def _forward(self) -> list[str]:
        reached = {name for _, name in self._runs}
        heads = [
            self._head(self._begin[self._layout.layer[name]], self._layout.place[name] - _PORT, -_HEAD)
            for name in self._boxes
            if name in reached
        ]
        return [path("run", self._lines(self._runs, -_PORT, lambda _: 0.0, _HEAD - 1)), path("run-head", heads)]

    def _backward(self) -> list[str]:
        lines = self._lines(self._undoes, _PORT, lambda name: self._socket(name) + _HEAD - 1, 0.0)
        reached = {dependency for dependency, _ in self._undoes}
        heads = []
        for name, box in self._boxes.items():
            if box.order is None and name not in reached:
                continue
            end, place = self._end[self._layout.layer[name]], self._layout.place[name]
            tip = end + self._socket(name)
            heads.append(self._head(tip, place + _PORT, _HEAD))
            if name not in reached:
                # Nothing that depends on it leads back to it: it turns round where its own arrows begin.
                out, bend, back = self._at(end, place - _PORT), tip + 2 * _PORT, self._at(tip + _HEAD - 1, place + _PORT)
                lines.append(f"M{out}C{self._at(bend, place - _PORT)} {self._at(bend, place + _PORT)} {back}")
        return [path("back", lines), path("back-head", heads)]

    def _socket(self, name: str) -> float:
        """How far the badge with a stage's place in the backward run stands out."""
        order = self._boxes[name].order
        return 0.0 if order is None else self._badge_middle(str(order)) * 2 + _OVERLAP

    def _badge_middle(self, order: str) -> float:
        return (_BADGE if self._downward else badge_half(order)) - _OVERLAP

    def _stands_out(self, name: str) -> float:
        return 0.0 if self._boxes[name].order is None else self._socket(name) + 2 * _PORT

    def _head(self, along: float, across: float, length: float) -> str:
        """An arrow's head with its tip there; it points against `length`."""
        return f"M{self._at(along, across)}L{self._at(along + length, across - 4.5)} {self._at(along + length, across + 4.5)}z"

    def _lines(self, arrows: Iterable[tuple[str, str]], port: float, before: Callable[[str], float], behind: float) -> list[str]:
        """The arrows' lines, of which each stretch is drawn once.

        Args:
            arrows: (dependency, dependent).
            port: How far from the middle of a box they run.
            before: How far behind a box they begin.
            behind: How far before a box they end.
        """
        hops = dict.fromkeys(self._hops(arrows))
        furthest: dict[tuple[int, tuple[str, int], bool], _Hop] = {}
        for hop in hops:
            if hop.is_far:
                side = (hop.layer, self._hubs[hop], hop.end > hop.start)
                furthest[side] = max(hop, furthest.get(side, hop), key=lambda each: abs(each.end - each.start))
        whole = set(furthest.values())
        lines = []
        for hop in hops:
            left = self._end[hop.layer] + (before(hop.source[0]) if hop.source[1] == 0 else 0.0)
            right = self._begin[hop.layer + 1] - (behind if hop.target[1] == 0 else 0.0)
            if not hop.is_far:
                lines.append(self._curve(hop, left, right, port))
            else:
                lines.append(self._along_the_track(hop, left, right, port, whole=hop in whole))
            if hop.target[1]:
                # A lane leads on through its own layer.
                _, lane = hop.ends(port)
                lines.append(f"M{self._at(right, lane)}L{self._at(self._end[hop.layer + 1], lane)}")
        return lines

    def _curve(self, hop: _Hop, left: float, right: float, port: float) -> str:
        middle = (self._end[hop.layer] + self._begin[hop.layer + 1]) / 2
        start, end = hop.ends(port)
        return f"M{self._at(left, start)}C{self._at(middle, start)} {self._at(middle, end)} {self._at(right, end)}"

    def _along_the_track(self, hop: _Hop, left: float, right: float, port: float, *, whole: bool) -> str:
        """Onto the track, along it, and off it; of what shares a track only the longest goes all the way, or dashes would run together."""
        hub = self._hubs[hop]
        start, end = hop.ends(port)
        track = self._tracks[hop.layer][hub] + (_TRACK / 2 if port > 0 else 0.0)
        turn = _BEND if end > start else -_BEND
        onto = f"M{self._at(left, start)}L{self._at(track - _BEND, start)}Q{self._at(track, start)} {self._at(track, start + turn)}"
        off = f"{self._at(track, end - turn)}Q{self._at(track, end)} {self._at(track + _BEND, end)}L{self._at(right, end)}"
        if whole:
            return f"{onto}L{off}"
        return f"M{off}" if hub == hop.source else onto

    def _box(self, box: Box, links: Mapping[str, str] | None) -> str:
        layer, place = self._layout.layer[box.name], self._layout.place[box.name]
        wide = self._wide[box.name] if self._downward else self._end[layer] - self._begin[layer]
        x, y = (place - wide / 2, self._begin[layer]) if self._downward else (self._begin[layer], place - _HEIGHT / 2)
        room = int(round((wide - _BEFORE_TEXT - _AFTER_TEXT) / TEXT_CELL, 3))
        hint = box.hint or box.name
        parts = [
            tag("title", escaped(hint)),
            tag("rect", class_="saga-face", x=x, y=y, width=wide, height=_HEIGHT, rx=8.0),
            pill(x + 10, y + 12, box.state, 22),
            text(x + _BEFORE_TEXT, y + 20, shortened(box.name, _NAME_ROOM), "name"),
            *(text(x + _BEFORE_TEXT, y + 36, line, "faint") for line in wrapped(box.label, room, 1)),
        ]
        if box.is_cause:
            parts.append(tag("rect", class_="saga-pill", x=x + wide - 58, y=y - 9, width=46.0, height=16.0, rx=8.0))
            parts.append(text(x + wide - 35, y + 3, "cause", "number"))
        if box.order is not None:
            order = str(box.order)
            along, across = self._end[layer] + self._badge_middle(order), place + _PORT
            parts.append(badge(*((across, along) if self._downward else (along, across)), order))
        if links is None:
            return tag("g", "".join(parts), class_=f"saga-{box.state}")
        return tag("a", "".join(parts), class_=f"saga-{box.state}", href=links[box.name], aria_label=hint)


def _width(box: Box) -> float:
    name = cells(shortened(box.name, _NAME_ROOM)) * NAME_CELL
    label = sum(cells(line) for line in wrapped(box.label, _LABEL_ROOM, 1)) * TEXT_CELL
    return _BEFORE_TEXT + max(name, label, 70.0) + _AFTER_TEXT
