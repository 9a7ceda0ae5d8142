"""The parts of every picture: elements, words, signs, headline and legend, as SVG.

Nothing in a picture needs scripts, fonts or files from elsewhere, so it is shown alike by a browser, a README and a notebook.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from saga.ledger import StageState
from saga.render.colours import stylesheet
from saga.render.drawing import Drawing
from saga.render.lettering import cells, escaped, one_line, shortened, wrapped
from saga.render.wording import SIGNS, words_of

NAME_CELL: Final = 7.9
"""Pixels of a column of a stage's name: fixed-width, 13 px, bold."""
TEXT_CELL: Final = 6.7
"""Pixels of a letter of the other texts: 12 px, of a wide font; narrower ones leave some room."""
MARGIN: Final = 24.0

_TITLE_CELL: Final = 10.5
_LINE: Final = 17.0
_SMALL_PILL: Final = 16.0


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{round(value, 1):.10g}"


def tag(name: str, content: str = "", **attributes: str | float) -> str:
    """An element; in an attribute's name an underscore stands for a hyphen, one at its end for nothing."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value) if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{said}>{content}</{name}>" if content else f"<{name}{said}/>"


def text(x: float, y: float, words: str, kind: str = "text", **attributes: str | float) -> str:
    """Words whose baseline begins at that point."""
    return tag("text", escaped(words), class_=f"saga-{kind}", x=x, y=y, **attributes)


def path(kind: str, lines: Iterable[str]) -> str:
    """Lines of one kind, as one element."""
    joined = "".join(lines)
    return tag("path", class_=f"saga-{kind}", d=joined) if joined else ""


def moved(x: float, y: float, *parts: str) -> str:
    """The parts with their origin at that point."""
    return tag("g", "".join(parts), transform=f"translate({number(x)} {number(y)})")


def pill(x: float, y: float, state: StageState, size: float = _SMALL_PILL) -> str:
    """A state's sign on its colour, from its upper left corner."""
    ground = tag("rect", class_="saga-pill", x=x, y=y, width=size, height=size, rx=size / 4)
    return tag("g", ground + text(x + size / 2, y + size / 2 + 4.5, SIGNS[state], "sign"), class_=f"saga-{state}")


class Key(NamedTuple):
    """A sign in the legend.

    Attributes:
        drawn: From the origin, 16 pixels high.
        width: How wide that is.
        meaning: What it stands for.
    """

    drawn: str
    width: float
    meaning: str


def state_keys(states: Iterable[StageState], meanings: Mapping[StageState, str] = MappingProxyType({})) -> list[Key]:
    """The keys of these states, in the order of `StageState`; what a sign means may differ from its state's name."""
    present = set(states)
    return [Key(pill(0, 0, state), _SMALL_PILL, meanings.get(state, words_of(state))) for state in StageState if state in present]


def document(drawing: Drawing, drawn: Iterable[str], keys: Iterable[Key], *, width: float, height: float) -> str:
    """A picture that stands for itself: with a headline, its colours, its ground, and words for those who can't see it."""
    wide = max(width, 520.0) + 2 * MARGIN
    above, top = _headline(drawing, wide)
    below, high = _legend(keys, wide, top + height + MARGIN)
    name = one_line(f"{drawing.title}: {drawing.verdict}")
    inside = "".join(
        (
            tag("title", escaped(name)),
            tag("desc", escaped(drawing.description)),
            tag("style", stylesheet()),
            tag("rect", class_="saga-paper", width=wide, height=high, rx=8.0),
            *above,
            moved(MARGIN, top, *drawn),
            *below,
        )
    )
    return _svg(inside, wide, high, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=name)


def section(label: str, drawn: Iterable[str], keys: Iterable[Key], *, width: float, height: float, role: str) -> str:
    """A picture as a part of a page, which has the colours and the headline; `label` is what a screen reader says of it."""
    wide = max(width, 250.0) + 2 * MARGIN
    below, high = _legend(keys, wide, MARGIN / 2 + height + MARGIN)
    return _svg(moved(MARGIN, MARGIN / 2, *drawn) + "".join(below), wide, high, role=role, aria_label=label)


def _svg(inside: str, width: float, height: float, **attributes: str) -> str:
    box = f"0 0 {number(width)} {number(height)}"
    return tag("svg", inside, class_="saga-picture", width=width, height=height, viewBox=box, **attributes)


def _headline(drawing: Drawing, width: float) -> tuple[list[str], float]:
    """What stands above a drawing, and where the drawing begins."""
    room = width - 2 * MARGIN
    parts = [
        text(MARGIN, 38, shortened(drawing.title, int(room / _TITLE_CELL)), "title"),
        pill(MARGIN, 52, drawing.state, 20),
        text(MARGIN + 28, 66.5, drawing.verdict, font_weight="600"),
    ]
    lines = wrapped(f"Cause: {drawing.cause}", int(room / TEXT_CELL), 3) if drawing.cause else []
    parts += [text(MARGIN, 92 + _LINE * index, line) for index, line in enumerate(lines)]
    return parts, 100 + _LINE * len(lines)


def _legend(keys: Iterable[Key], width: float, y: float) -> tuple[list[str], float]:
    """The keys from there on down, broken into lines, and where the picture ends."""
    parts = []
    x = MARGIN
    for key in keys:
        takes = key.width + 8 + cells(key.meaning) * TEXT_CELL
        if x + takes > width - MARGIN:
            x, y = MARGIN, y + 26
        parts.append(moved(x, y, key.drawn, text(key.width + 8, 12.5, key.meaning, "faint")))
        x += takes + 20
    return parts, y + 16 + MARGIN
