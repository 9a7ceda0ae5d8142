"""Text in pictures and tables: made harmless, measured, aligned, shortened, broken into lines.

What is shown comes from users: a stage's name, an error's words. It may hold markup, line breaks, control characters, ten
thousand characters, or half of a surrogate pair.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Final

# XML 1.0 has no way to write these, not even as a reference; and a lone surrogate can't be stored as UTF-8.
_UNWRITABLE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def writable(text: str) -> str:
    """The text with a replacement character for each that XML and UTF-8 can't hold."""
    return _UNWRITABLE.sub("\ufffd", text)


def escaped(text: str) -> str:
    """The text as character data or an attribute's value of XML or HTML."""
    return html.escape(writable(text))


def one_line(text: str) -> str:
    """The text with each run of whitespace as one space."""
    return " ".join(text.split())


def cells(text: str) -> int:
    """How many columns of a fixed-width font the text takes: an ideograph or an emoji takes two, an accent on a letter none."""
    return len(text) if text.isascii() else sum(_cells(character) for character in text)


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> Iterator[str]:
    """The rows of a table as lines, for a terminal.

    Args:
        rows: At least one, all with as many cells.
        right: The columns whose cells end at the same place, of all but the last; in the others they begin there.
    """
    # Behind the last column stands nothing: what it holds may be long, and is not measured.
    widths = [*(max(map(cells, column)) for column in [*zip(*rows, strict=True)][:-1]), 0]
    for row in rows:
        gaps = [" " * (width and width - cells(cell)) for cell, width in zip(row, widths, strict=True)]
        line = (gap + cell if column in right else cell + gap for column, (cell, gap) in enumerate(zip(row, gaps, strict=True)))
        yield "  ".join(line).rstrip()


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(text: str, room: int) -> str:
    taken = 0
    for index, character in enumerate(text):
        taken += _cells(character)
        if taken > room:
            return text[:index]
    return text


def shortened(text: str, room: int) -> str:
    """The text on one line of `room` columns; what is too long keeps its beginning and its end, which tell names apart."""
    line = one_line(text)
    if len(line) <= room and cells(line) <= room:
        return line
    head = _fitting(line, (room - 1) - (room - 1) // 2)
    tail = _fitting(line[::-1], (room - 1) // 2)[::-1]
    return f"{head}…{tail}"


def wrapped(text: str, room: int, lines: int) -> list[str]:
    """The text in at most so many lines of `room` columns; the last one says with an ellipsis that there was more."""
    broken: list[str] = []
    rest = one_line(text)
    while rest:
        line = _fitting(rest, room)
        if line != rest and len(broken) == lines - 1:
            return [*broken, f"{_fitting(rest, room - 1).rstrip()}…"]
        if line != rest and " " in line and rest[len(line)] != " ":
            line = line[: line.rindex(" ")]
        broken.append(line)
        rest = rest[len(line) :].strip()
    return broken
