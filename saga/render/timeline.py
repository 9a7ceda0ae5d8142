"""The timeline of a saga: a bar for each attempt, and the waits between them; forward above, backward below.

Each direction has a scale of its own, for undoing may take a thousandth of the time, or come a week later. Stretches in which
nothing ran are cut and say how long they were.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from saga.failures import FailureKind
from saga.ledger import StageState
from saga.render.drawing import drawing
from saga.render.graph import badge
from saga.render.lettering import cells, escaped, shortened
from saga.render.svg import NAME_CELL, Key, document, moved, number, path, pill, section, state_keys, tag, text
from saga.render.wording import SIGNS, duration, seconds, words_of

if TYPE_CHECKING:
    from saga.recovery.record import Try
    from saga.report import SagaReport

_S = StageState
_WIDTH: Final = 560.0
_NOTE: Final = 130.0
_AXIS: Final = 52.0
_BETWEEN: Final = 24.0
_ROW: Final = 24.0
_BAR: Final = 14.0
_LEAST: Final = 3.0
_CUT: Final = 34.0
_TICK: Final = 90.0
_NAME_ROOM: Final = 24
_LEAD: Final = 38.0
_LEAST_ROOM: Final = 7
_MINUTE: Final = 60
_UNITS: Final = (("s", 1.0, 0.1), ("ms", 1e3, 1e-4), ("µs", 1e6, 0.0))
"""Units, how many of them make a second, and from which step on the axis they read well."""

_FAILED: Final = {
    FailureKind.TIMEOUT: _S.IN_DOUBT,
    FailureKind.INTERRUPTED: _S.IN_DOUBT,
    FailureKind.CRASHED: _S.IN_DOUBT,
    FailureKind.CANCELLED: _S.CANCELLED,
}
"""What an attempt looks like that failed in such a way; the others look failed."""
_MEANINGS: Final = {
    _S.KEPT: "attempt completed",
    _S.FAILED: "attempt failed",
    _S.IN_DOUBT: "nobody knew whether it landed",
    _S.UNDONE: "effect undone",
}
_SOLID: Final = frozenset({_S.KEPT, _S.UNDONE})
_ALIVE: Final = frozenset({_S.RUNNING, _S.COMPENSATING})


class _Bar(NamedTuple):
    """One attempt: from when to when, what it looks like, and in words."""

    start: datetime
    end: datetime
    state: StageState
    hint: str


class _Row(NamedTuple):
    """One stage in one direction: what stands before its name, its attempts, and what stands behind them."""

    lead: str
    name: str
    bars: tuple[_Bar, ...]
    note: str


def timeline_svg(report: SagaReport) -> str:
    """A saga's timeline as a picture that stands for itself."""
    panels = _panels(report)
    drawn, width, height = _drawn(panels)
    return document(drawing(report), drawn, _keys(panels), width=width, height=height)


def timeline_section(report: SagaReport) -> str:
    """A saga's timeline as a part of a page."""
    panels = _panels(report)
    drawn, width, height = _drawn(panels)
    label = f"Timeline of {report.pipeline}; the details of each stage have the same times"
    return section(label, drawn, _keys(panels), width=width, height=height, role="img")


def _panels(report: SagaReport) -> dict[str, list[_Row]]:
    """What ran in each direction."""
    said = {(failure.stage, failure.attempt, failure.kind): failure.message for failure in report.failures}
    undos = {name: stage.compensation.tries if stage.compensation is not None else () for name, stage in report.stages.items()}
    every = [each for name, stage in report.stages.items() for each in (*stage.tries, *undos[name])]
    now = max((at for each in every for at in (each.started_at, each.ended_at) if at is not None), default=report.started_at)
    forward, backward = [], []

    def bars(name: str, tries: tuple[Try, ...], done: StageState) -> tuple[_Bar, ...]:
        found = []
        for attempt, (start, ended, failed) in enumerate(tries, 1):
            state, end = done, ended
            if failed is not None:
                state = _FAILED.get(failed, _S.FAILED)
            elif ended is None and attempt == len(tries) and report.stages[name].state in _ALIVE:
                state, end = report.stages[name].state, now
            elif ended is None:
                state = _S.IN_DOUBT
            # Of an attempt whose process was lost only the start is known.
            end = max(start, end or start)
            why = said.get((name, attempt, failed), "") if failed is not None else ""
            hint = ", ".join(filter(None, (f"{name}, attempt {attempt}: {words_of(state)}", seconds(start, ended))))
            found.append(_Bar(start, end, state, f"{hint}; {why}" if why else hint))
        return tuple(found)

    for name, stage in report.stages.items():
        done = _S.SKIPPED if stage.skip_reason is not None else _S.KEPT
        tried = bars(name, stage.tries, done)
        is_cause = report.cause is not None and report.cause.stage == name
        note = (_took(stage.tries) or words_of(stage.state)) + (", cause" if is_cause else "")
        forward.append(_Row(pill(14, 4, stage.state), name, tried, note))
    for place, name in enumerate(report.compensation_order, 1):
        tried = bars(name, undos[name], _S.UNDONE)
        backward.append(_Row(badge(16, 12, str(place)), name, tried, _took(undos[name])))
    return {"Forward": forward, "Backward": backward} if backward else {"Forward": forward}


def _took(tries: tuple[Try, ...]) -> str:
    return seconds(tries[0].started_at, tries[-1].ended_at) if tries else ""


def _keys(panels: dict[str, list[_Row]]) -> list[Key]:
    rows = [row for rows in panels.values() for row in rows]
    keys = state_keys((bar.state for row in rows for bar in row.bars), _MEANINGS)
    if any(len(row.bars) > 1 for row in rows):
        keys.append(Key(path("wait", ["M0,8H26"]), 26, "wait"))
    return keys


class _Scale:
    """Where on the axis a moment is.

    Attributes:
        begin: The first moment.
        pieces: What is shown in full: from when to when, in seconds since the beginning, and where it begins on the axis.
        rate: Pixels a second.
    """

    def __init__(self, bars: list[_Bar]) -> None:
        self.begin = min(bar.start for bar in bars)
        busy: list[list[float]] = []
        for start, end in sorted((self._since(bar.start), self._since(bar.end)) for bar in bars):
            if busy and start <= busy[-1][1]:
                busy[-1][1] = max(busy[-1][1], end)
            else:
                busy.append([start, end])
        # An idle stretch that is shorter than all that ran is shown as it is.
        least = sum(end - start for start, end in busy)
        shown = [busy[0]]
        for start, end in busy[1:]:
            if start - shown[-1][1] <= least:
                shown[-1][1] = end
            else:
                shown.append([start, end])
        self.cut = min(_CUT, _WIDTH / 2 / len(shown))
        kept = sum(end - start for start, end in shown)
        self.rate = (_WIDTH - self.cut * (len(shown) - 1)) / kept if kept else 0.0
        self.pieces: list[tuple[float, float, float]] = []
        x = 0.0
        for start, end in shown:
            self.pieces.append((start, end, x))
            x += (end - start) * self.rate + self.cut

    def _since(self, moment: datetime) -> float:
        return (moment - self.begin).total_seconds()

    def at(self, moment: datetime) -> float:
        """Where it is, from the axis' beginning."""
        since = self._since(moment)
        start, _, x = self.pieces[bisect_right(self.pieces, since, key=lambda piece: piece[0]) - 1]
        return x + (since - start) * self.rate

    def ticks(self) -> list[tuple[float, str]]:
        """Round moments on the axis, and how long after its beginning they are."""
        if not self.rate:
            return [(0.0, "0 s")]
        rough = _TICK / self.rate
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        found: list[tuple[float, str]] = []
        for start, end, x in self.pieces:
            for count in range(math.ceil(start / step), math.floor(end / step) + 1):
                place = x + (count * step - start) * self.rate
                if not found or place - found[-1][0] >= _TICK / 2:
                    found.append((place, _moment(count * step, step)))
        return found

    def cuts(self) -> list[tuple[float, str]]:
        """Where idle stretches are cut, and how long they are; without words where there is no room for them."""
        found: list[tuple[float, str]] = []
        spoken = -_TICK
        for (_, end, _), (start, _, x) in pairwise(self.pieces):
            middle = x - self.cut / 2
            has_room = middle - spoken >= _TICK
            spoken = middle if has_room else spoken
            found.append((middle, f"+ {duration(start - end)}" if has_room else ""))
        return found


def _moment(since: float, step: float) -> str:
    if since >= 2 * _MINUTE:
        minutes, rest = divmod(since, _MINUTE)
        return f"{int(minutes) // _MINUTE}:{int(minutes) % _MINUTE:02}:{round(rest, 6):02g}"
    unit, factor = next((unit, factor) for unit, factor, least in _UNITS if step >= least)
    return f"{since * factor:.10g} {unit}"


def _drawn(panels: dict[str, list[_Row]]) -> tuple[list[str], float, float]:
    """The panels beneath each other, with the width and the height that they take."""
    widest = max((cells(shortened(row.name, _NAME_ROOM)) for rows in panels.values() for row in rows), default=0)
    gutter = _LEAD + max(widest, _LEAST_ROOM) * NAME_CELL + 16
    parts = []
    height = 0.0
    for title, rows in panels.items():
        drawn, high = _panel(title, rows, gutter)
        parts.append(moved(0, height, *drawn))
        height += high + _BETWEEN
    return parts, gutter + _WIDTH + _NOTE, height - _BETWEEN


def _panel(title: str, rows: list[_Row], gutter: float) -> tuple[list[str], float]:
    """One direction: an axis, and a row for each stage."""
    bars = [bar for row in rows for bar in row.bars]
    height = _AXIS + _ROW * len(rows)
    wide = gutter + _WIDTH + _NOTE
    band = tag("rect", class_="saga-band", width=wide, height=_ROW, rx=4.0)
    bands = [moved(0, _AXIS + _ROW * index, band) for index in range(0, len(rows), 2)]
    parts = [text(0, 14, title, font_weight="600"), *bands]
    scale = _Scale(bars) if bars else None
    if scale is not None:
        parts.append(text(gutter, 14, f"from {scale.begin:%Y-%m-%d %H:%M:%S}.{scale.begin.microsecond // 1000:03} UTC", "faint"))
        parts += [text(gutter + x, 34, words, "faint", text_anchor="middle") for x, words in scale.ticks()]
        parts.append(path("grid", [f"M{number(gutter + x)},{number(_AXIS - 6)}V{number(height)}" for x, _ in scale.ticks()]))
        parts += [text(gutter + x, 47, words, "faint", text_anchor="middle") for x, words in scale.cuts() if words]
        parts.append(path("wait", [f"M{number(gutter + x)},{number(_AXIS)}V{number(height)}" for x, _ in scale.cuts()]))
    for index, row in enumerate(rows):
        parts.append(moved(0, _AXIS + _ROW * index, row.lead, text(_LEAD, 16, shortened(row.name, _NAME_ROOM), "name")))
        drawn = _bars(row.bars, scale) if scale is not None else []
        end = scale.at(row.bars[-1].end) + 8 if scale is not None and row.bars else 0.0
        parts.append(moved(gutter, _AXIS + _ROW * index, *drawn, text(end, 16, row.note, "faint")))
    return parts, height


def _bars(bars: tuple[_Bar, ...], scale: _Scale) -> list[str]:
    ends = [(scale.at(bar.start), scale.at(bar.end)) for bar in bars]
    waits = [f"M{number(end)},{number(_ROW / 2)}H{number(start)}" for (_, end), (start, _) in pairwise(ends)]
    parts = [path("wait", waits)]
    for bar, (start, end) in zip(bars, ends, strict=True):
        wide, is_solid = max(end - start, _LEAST), bar.state in _SOLID
        shape = tag("rect", class_="saga-pill" if is_solid else "saga-face", x=start, y=5.0, width=wide, height=_BAR, rx=3.0)
        sign = text(start + wide / 2, 16.5, SIGNS[bar.state], "sign" if is_solid else "mark") if wide > _BAR else ""
        parts.append(tag("g", tag("title", escaped(bar.hint)) + shape + sign, class_=f"saga-{bar.state}"))
    return parts
