"""What states look like: a colour and a border for each, in light and in dark, beside the sign that `text` gives it.

The colours are literals in classes, not custom properties, so that converters other than browsers draw them, too. Text on each
of them has a contrast of 4.5 : 1 at least, lines and borders of 3 : 1 (WCAG 2.2, 1.4.3 and 1.4.11).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from saga.events import SagaStatus
from saga.ledger import StageState

_S = StageState


class Shade(NamedTuple):
    """A state's colours in one scheme: of its sign's ground, its border and its lines; and of its box."""

    ink: str
    fill: str


class Scheme(NamedTuple):
    """The colours of a picture, in light or in dark."""

    paper: str
    text: str
    faint: str
    line: str
    on_ink: str
    band: str
    edge: str
    states: dict[StageState, Shade]


LIGHT: Final = Scheme(
    paper="#ffffff",
    text="#1f2328",
    faint="#57606a",
    line="#6e7781",
    on_ink="#ffffff",
    band="#f3f5f7",
    edge="#d0d7de",
    states={
        _S.NOT_RUN: Shade("#6a737d", "#f6f8fa"),
        _S.RUNNING: Shade("#0b5cc4", "#e8f1fd"),
        _S.KEPT: Shade("#1a7f37", "#e7f6eb"),
        _S.FALLBACK: Shade("#0b7285", "#e2f5f8"),
        _S.FAILED: Shade("#c01c28", "#fdecec"),
        _S.CANCELLED: Shade("#4b5563", "#eceff3"),
        _S.SKIPPED: Shade("#6a737d", "#f6f8fa"),
        _S.IN_DOUBT: Shade("#7d5e00", "#fcf4d2"),
        _S.COMPENSATING: Shade("#7a3fc7", "#f3edfc"),
        _S.UNDONE: Shade("#7a3fc7", "#f3edfc"),
        _S.STUCK: Shade("#9d1260", "#fce6f1"),
        _S.BLOCKED: Shade("#9a4a00", "#fdefe0"),
    },
)
DARK: Final = Scheme(
    paper="#0d1117",
    text="#e6edf3",
    faint="#a3acb6",
    line="#8b949e",
    on_ink="#0d1117",
    band="#161b22",
    edge="#30363d",
    states={
        _S.NOT_RUN: Shade("#8b949e", "#161b22"),
        _S.RUNNING: Shade("#6cb0ff", "#10233d"),
        _S.KEPT: Shade("#57d178", "#10261a"),
        _S.FALLBACK: Shade("#4fc3d9", "#0c2a31"),
        _S.FAILED: Shade("#ff7b72", "#37171a"),
        _S.CANCELLED: Shade("#a9b4c0", "#1e252d"),
        _S.SKIPPED: Shade("#8b949e", "#161b22"),
        _S.IN_DOUBT: Shade("#e3c04a", "#2d2609"),
        _S.COMPENSATING: Shade("#c09bff", "#251b3b"),
        _S.UNDONE: Shade("#c09bff", "#251b3b"),
        _S.STUCK: Shade("#ff85c0", "#3a1128"),
        _S.BLOCKED: Shade("#f0a050", "#33210d"),
    },
)

_BORDERS: Final = {
    _S.NOT_RUN: "stroke-dasharray:1 4;stroke-linecap:round",
    _S.SKIPPED: "stroke-dasharray:1 4;stroke-linecap:round",
    _S.RUNNING: "stroke-dasharray:6 3",
    _S.COMPENSATING: "stroke-dasharray:6 3",
    _S.FAILED: "stroke-width:2.5",
    _S.IN_DOUBT: "stroke-dasharray:9 3 2 3",
    _S.STUCK: "stroke-width:4",
}

LIKE: Final = {
    SagaStatus.RUNNING: _S.RUNNING,
    SagaStatus.COMPENSATING: _S.COMPENSATING,
    SagaStatus.COMPLETED: _S.KEPT,
    SagaStatus.DEGRADED: _S.FALLBACK,
    SagaStatus.COMPENSATED: _S.UNDONE,
    SagaStatus.HALTED: _S.BLOCKED,
    SagaStatus.CANCELLED: _S.CANCELLED,
    SagaStatus.STUCK: _S.STUCK,
}
"""The state of a stage that a saga's status looks like."""

_SHAPES: Final = """
.saga-picture{font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:12px}
.saga-name,.saga-sign,.saga-mark{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.saga-name{font-size:13px;font-weight:600}
.saga-sign,.saga-mark{font-size:14px;font-weight:700;text-anchor:middle}
.saga-title{font-size:17px;font-weight:700}
.saga-number{font-size:11px;font-weight:700;text-anchor:middle}
.saga-face{stroke-width:1.5}
.saga-run,.saga-back,.saga-wait{fill:none;stroke-width:1.5}
.saga-back{stroke-width:1.75;stroke-dasharray:5 4}
.saga-wait{stroke-dasharray:2 3}
.saga-grid{stroke-opacity:.3}
"""


def stylesheet() -> str:
    """The rules for every picture, and for the page around it; all names begin with `saga-`, because a page may hold other things."""
    borders = "".join(f".saga-{state} .saga-face{{{border}}}\n" for state, border in _BORDERS.items())
    return f"{_SHAPES}{borders}{_rules(LIGHT)}@media screen and (prefers-color-scheme:dark){{\n{_rules(DARK)}}}\n"


def _rules(scheme: Scheme) -> str:
    back = scheme.states[_S.UNDONE].ink
    lines = [
        f".saga-paper{{fill:{scheme.paper}}}",
        f".saga-name,.saga-title,.saga-text,.saga-mark{{fill:{scheme.text}}}",
        f".saga-faint{{fill:{scheme.faint}}}",
        f".saga-band{{fill:{scheme.band}}}",
        f".saga-run,.saga-wait,.saga-grid{{stroke:{scheme.line}}}",
        f".saga-run-head{{fill:{scheme.line}}}",
        f".saga-back{{stroke:{back}}}",
        f".saga-back-head{{fill:{back}}}",
        f".saga-sign,.saga-number{{fill:{scheme.on_ink}}}",
    ]
    for state, shade in scheme.states.items():
        lines.append(f".saga-{state} .saga-face{{fill:{shade.fill};stroke:{shade.ink}}}")
        lines.append(f".saga-{state} .saga-pill{{fill:{shade.ink};background:{shade.ink};color:{scheme.on_ink}}}")
    return "\n".join(lines) + "\n"
