"""Words for what users wrote: for values whose own words may fail, and for names that are nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def qualified(kind: type) -> str:
    """Name a type as `module.Qualname`; builtins without their module."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask whether the nearest of the known names was meant; empty when none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def said(value: object) -> str:
    """What `str` gives, or a stand-in when it fails: user types decide what their `__str__` raises."""
    try:
        return written(str(value))
    except Exception as error:  # noqa: BLE001 - whatever the user's __str__ raises
        return f"<{qualified(type(value))}, which can't be put into words: {type(error).__name__}>"


def shown(value: object) -> str:
    """What `repr` gives, or a stand-in when it fails."""
    try:
        return written(repr(value))
    except Exception as error:  # noqa: BLE001 - whatever the user's __repr__ raises
        return f"<{qualified(type(value))}, which can't be shown: {type(error).__name__}>"


def written(text: str) -> str:
    """Text that can be written: what UTF-8 lacks, such as the odd bytes in a file's name, is escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
