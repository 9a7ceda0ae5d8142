"""Words for values whose own words may fail: user types decide what their `__str__` and `__repr__` raise."""

from __future__ import annotations


def qualified(kind: type) -> str:
    """Name a type as `module.Qualname`; builtins without their module."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def said(value: object) -> str:
    """What `str` gives, or a stand-in when it fails."""
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
