"""Words for what users wrote: values whose own words may fail, names that are nearly right, text that a terminal must not obey."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from heapq import nlargest
from itertools import takewhile
from operator import eq
from shlex import quote
from typing import Final

_BREAK: Final = re.compile(r"[\t-\r\x85\u2028\u2029]\s*")
# What moves a terminal's cursor, rings its bell or turns round what is read after it; what only shapes letters or emoji is left alone.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_COMPARED: Final = 100
"""How many names one that is nearly right is compared with; to compare two takes a tenth of a millisecond, and a ledger has thousands."""
_HALF: Final = 50_000
_GLIMPSE: Final = 200


def qualified(kind: type) -> str:
    """Name a type as `module.Qualname`; builtins without their module."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def bytes_of(text: str) -> int:
    """How many bytes of UTF-8 a text takes."""
    return len(text) if text.isascii() else len(text.encode())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask whether the nearest of the known names was meant; empty when none is near."""
    # A slip leaves what is before it and what is behind it.
    likely = nlargest(_COMPARED, known, key=lambda other: _in_common(name, other) + _in_common(reversed(name), reversed(other)))
    close = difflib.get_close_matches(name, likely, n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def _in_common(one: Iterable[str], other: Iterable[str]) -> int:
    """How far they are the same from their beginning."""
    return sum(takewhile(bool, map(eq, one, other)))


def said(value: object) -> str:
    """What `str` gives, or a stand-in when it fails: user types decide what their `__str__` raises."""
    try:
        return written(str(value))
    except Exception as error:  # noqa: BLE001 - whatever the user's __str__ raises
        return f"<{qualified(type(value))}, which can't be put into words: {type(error).__name__}>"


def reason_in(value: object, otherwise: str) -> str:
    """What somebody gave as a reason, in words; `otherwise` where that says nothing."""
    # Nobody asks whether it is true: of an array of several numbers nobody knows.
    return otherwise if value is None else said(value) or otherwise


def shown(value: object) -> str:
    """What `repr` gives, or a stand-in when it fails."""
    try:
        return written(repr(value))
    except Exception as error:  # noqa: BLE001 - whatever the user's __repr__ raises
        return f"<{qualified(type(value))}, which can't be shown: {type(error).__name__}>"


def glimpse(value: object) -> str:
    """What `repr` gives, cut to 200 characters: enough to see what it is in a line that says something else."""
    text = shown(value)
    return text if len(text) <= _GLIMPSE else f"{text[:_GLIMPSE]}..."


def written(text: str) -> str:
    """Text that can be written: what UTF-8 lacks, such as the odd bytes in a file's name, is escaped.

    It is a plain `str`, whatever class it comes as.
    """
    text = str.__str__(text)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def brief(text: str) -> str:
    """The text, without the middle of one of more than 100,000 characters: every ledger can keep it, and a person may read it."""
    left_out = len(text) - 2 * _HALF
    return text if left_out <= 0 else f"{text[:_HALF]} [{left_out:,} characters left out] {text[-_HALF:]}"


def harmless(text: str) -> str:
    """The text, of which a terminal does nothing but show it: control characters, line breaks among them, are escaped as in JSON."""
    return _CONTROL.sub(_escaped, text)


def printable(text: str) -> str:
    """The text as one line of which a terminal does nothing but show it: control characters are escaped."""
    return harmless(_BREAK.sub(" ", written(text).strip()))


def quoted(text: str) -> str:
    """The text as one word of a command that a person can read, copy and run; control characters as bash and zsh read them."""
    if not _CONTROL.search(text):
        return quote(text)
    return "$'" + _CONTROL.sub(_escaped, text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
