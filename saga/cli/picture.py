"""A saga as a picture: its stages as a tree, and a bar."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final, NamedTuple

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from saga.cli.family import Family, to_undo
from saga.cli.lines import said
from saga.events import SagaStatus
from saga.graph import Graph
from saga.ledger import StageState
from saga.recovery import stage_states
from saga.recovery.record import StageRecord
from saga.recovery.state import SagaState
from saga.render.wording import SIGNS, seconds, words_of
from saga.text import printable

_S = StageState

COLOURS: Final = {
    StageState.NOT_RUN: "dim",
    StageState.RUNNING: "cyan",
    StageState.KEPT: "green",
    StageState.FALLBACK: "yellow",
    StageState.FAILED: "red",
    StageState.CANCELLED: "yellow",
    StageState.SKIPPED: "dim",
    StageState.IN_DOUBT: "bold red",
    StageState.COMPENSATING: "magenta",
    StageState.UNDONE: "blue",
    StageState.STUCK: "bold red",
    StageState.BLOCKED: "red",
}
_TURNED: Final = "magenta"
_BACKWARD: Final = frozenset({SagaStatus.COMPENSATING, SagaStatus.COMPENSATED, SagaStatus.STUCK})
_STATE: Final = len("< compensating")
_NARROW: Final = 80
"""Columns below which there is no room for a stage's note."""
_CRAMPED: Final = 60
"""Columns below which its attempts make way for its name."""


class Row(NamedTuple):
    """A stage in the picture.

    Attributes:
        key: Its saga and its name.
        guide: The lines of the tree before its name.
        state: Where it stands.
        label: That in words.
        attempt: Of what it is at; 0 if it never started.
        time: How long that has taken.
        note: What there is to say.
    """

    key: str
    guide: str
    name: str
    state: StageState
    label: str
    attempt: int
    time: str
    note: str


def picture(family: Family, now: datetime, width: int, height: int, focus: str = "") -> RenderableType:
    """Draw a family: a title, a row for each stage, a bar; as many rows as fit, around the one that something happened to last."""
    state = family.sagas.get(family.head)
    if state is None:
        return Text("")
    shown, above, below = _window(list(rows(family, family.head, now)), max(height - 6, 3), focus)
    table = Table.grid(padding=(0, 2, 0, 0))
    # rich takes what is too much from the columns that may wrap, the widest first; so names and notes may, and their texts don't.
    table.add_column(overflow="ellipsis")
    table.add_column(no_wrap=True, min_width=_STATE)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="ellipsis")
    for row in shown:
        colour = COLOURS[row.state]
        table.add_row(
            Text(row.guide, style="dim", no_wrap=True).append(row.name, style="default not dim"),
            Text(f"{SIGNS[row.state]} {row.label}", style=colour),
            Text(f"attempt {row.attempt}" if row.attempt and width >= _CRAMPED else "", style="default" if row.attempt > 1 else "dim"),
            Text(row.time),
            Text(row.note if width >= _NARROW else "", style="dim", no_wrap=True),
        )
    parts: list[RenderableType] = [_title(state, now)]
    if above:
        parts.append(_hidden(above, "above"))
    parts.append(table)
    if below:
        parts.append(_hidden(below, "below"))
    return Group(*parts, _bar(state, width))


def _title(state: SagaState, now: datetime) -> Text:
    took = _took(state.started.at, state.ended_at, now)
    colour = _TURNED if state.status is SagaStatus.COMPENSATING else "cyan"
    name, saga_id = printable(state.started.pipeline), printable(state.started.saga_id)
    return Text.assemble((name, "bold"), f"  {saga_id}  ", (state.status.value, colour), f"  {took}")


def _window(found: list[Row], room: int, focus: str) -> tuple[list[Row], list[Row], list[Row]]:
    if len(found) <= room:
        return found, [], []
    room -= 2
    place = next((place for place, row in enumerate(found) if row.key == focus), 0)
    start = min(max(place - room // 2, 0), len(found) - room)
    return found[start : start + room], found[:start], found[start + room :]


def _hidden(found: list[Row], where: str) -> Text:
    counts: dict[str, int] = {}
    for row in found:
        counts[row.label] = counts.get(row.label, 0) + 1
    return Text(f"… {len(found)} {where}: " + ", ".join(f"{count} {label}" for label, count in counts.items()), style="dim", no_wrap=True)


def _bar(state: SagaState, width: int) -> Table:
    """Forward, how many stages have ended; backward, how many effects have been undone, and the bar runs back and stays there."""
    held = {name for name, where in stage_states(state).items() if where in {_S.STUCK, _S.BLOCKED}}
    left, undone = len(to_undo(state) | held), sum(record.state is _S.UNDONE for record in state.stages.values())
    ended = sum(record.state not in {_S.NOT_RUN, _S.RUNNING} for record in state.stages.values())
    total = len(state.stages)
    grid = Table.grid(padding=(0, 2, 0, 0))
    bar_width = max(10, min(40, width - 24))
    if state.status in _BACKWARD:
        done = left / (left + undone) if left + undone else 0.0
        bar = ProgressBar(total=1.0, completed=done, width=bar_width, complete_style=_TURNED, finished_style=_TURNED)
        grid.add_row(bar, f"{undone} of {left + undone} undone")
    else:
        grid.add_row(ProgressBar(total=total, completed=ended, width=bar_width), f"{ended} of {total} done")
    return grid


def rows(family: Family, saga_id: str, now: datetime, guide: str = "") -> Iterator[Row]:
    """The rows of a saga, those of a saga that a stage runs below it."""
    state = family.sagas[saga_id]
    states, remaining = stage_states(state), to_undo(state)
    for lines, name in outline(state.graph):
        record, where = state.stages[name], states[name]
        waits = name in remaining and where is not _S.COMPENSATING
        attempt, time = _effort(record, where, now)
        label = "to undo" if waits else words_of(where)
        yield Row(f"{saga_id}/{name}", guide + lines, printable(name), where, label, attempt, time, printable(_note(state, name, where)))
        for child in family.children(saga_id, name):
            yield from rows(family, child, now, f"{guide}{_continued(lines)}  ")


def _continued(lines: str) -> str:
    return lines.replace("├", "│").replace("└", " ")


def _effort(record: StageRecord, where: StageState, now: datetime) -> tuple[int, str]:
    if where in {_S.COMPENSATING, _S.UNDONE, _S.STUCK} and record.undo_started_at is not None:
        return record.undo_attempts, _took(record.undo_started_at, record.undo_ended_at, now)
    if record.started_at is None:
        return 0, ""
    return record.attempts, _took(record.started_at, None if where is _S.RUNNING else record.ended_at, now)


def _took(start: datetime, end: datetime | None, now: datetime) -> str:
    # What goes on is shown in tenths of a second: finer digits would only flicker.
    return seconds(start, end) if end is not None else f"{(now - start).total_seconds():.1f} s"


def _note(state: SagaState, name: str, where: StageState) -> str:
    record = state.stages[name]
    match where:
        case _S.NOT_RUN if state.status is SagaStatus.RUNNING:
            waits = [under for under in state.graph[name].dependencies if state.stages[under].state in {_S.NOT_RUN, _S.RUNNING}]
            return f"after {', '.join(waits)}" if waits else ""
        case _S.COMPENSATING | _S.STUCK | _S.UNDONE if record.undo_failure is not None:
            return said(record.undo_failure)
        case _S.SKIPPED:
            return record.skip_reason or ""
        case _S.KEPT if record.failure is not None:
            return f"at first it {said(record.failure)}"
        case _ if record.failure is not None:
            return said(record.failure)
        case _:
            return ""


def outline(graph: Graph) -> list[tuple[str, str]]:
    """The stages as the rows of a tree: for each one its guide, and its name.

    What follows one stage alone stands below it at the same level. Where several follow, each is a branch; what joins
    branches stands behind them, at the level where they forked. (The tree is that of the dominators.)
    """
    over: dict[str, str | None] = {}
    depth: dict[str | None, int] = {None: 0}
    below: dict[str | None, list[str]] = {None: []}
    for node in graph.nodes:
        nearest: str | None = node.dependencies[0] if node.dependencies else None
        for other in node.dependencies[1:]:
            nearest = _common(nearest, other, over, depth)
        over[node.name], depth[node.name] = nearest, depth[nearest] + 1
        below[node.name] = []
        below[nearest].append(node.name)
    rows: list[tuple[str, str]] = []
    waiting = _rows_below(None, "", below, graph)
    while waiting:
        name, guide, rest = waiting.pop()
        rows.append((guide, name))
        waiting += _rows_below(name, rest, below, graph)
    return rows


def _common(one: str | None, other: str | None, over: dict[str, str | None], depth: dict[str | None, int]) -> str | None:
    while one != other:
        if depth[one] < depth[other]:
            one, other = other, one
        assert one is not None  # only the top has depth 0
        one = over[one]
    return one


def _rows_below(top: str | None, guide: str, below: dict[str | None, list[str]], graph: Graph) -> list[tuple[str, str, str]]:
    """What stands directly below a stage, the last first: names, their guides, and the guides of what is below them."""
    branches = [name for name in below[top] if all(under == top for under in graph[name].dependencies)]
    if len(branches) == 1:
        rows = [(branches[0], guide, guide)]
    else:
        last = len(branches) - 1
        rows = [
            (name, f"{guide}{'└' if place == last else '├'} ", f"{guide}{' ' if place == last else '│'} ")
            for place, name in enumerate(branches)
        ]
    rows += [(name, guide, guide) for name in below[top] if any(under != top for under in graph[name].dependencies)]
    return rows[::-1]
