"""Keys, ids and paths that are made of the names of stages, and what can be read off them."""

from __future__ import annotations

import re
from typing import Final


def execution_key(saga_id: str, stage: str, execution: int) -> str:
    """The idempotency key of a stage's execution."""
    return f"{saga_id}/{stage}" if execution <= 1 else f"{saga_id}/{stage}~{execution}"


def child_id(forward_key: str, attempt: int, number: int) -> str:
    """The id of the first, second, ... saga that an attempt of a stage runs, from the idempotency key of its execution."""
    if number > 1:
        return f"{forward_key}#{attempt}.{number}"
    return forward_key if attempt == 1 else f"{forward_key}#{attempt}"


def execution_of(child: str, parent: str, stage: str) -> int:
    """The execution of the parent's stage that ran a saga of that id."""
    found = re.match(r"~(\d+)", child.removeprefix(f"{parent}/{stage}"))
    return int(found[1]) if found is not None else 1


def is_path(name: str) -> bool:
    """Whether it may lead to a stage within another one."""
    return "/" in name


def is_within(path: str, stage: str) -> bool:
    """Whether a path leads to a stage of a saga that this one runs: `book/charge` and, of one of several, `book#2/charge`."""
    # A pattern of its own for each stage is made anew where there are more than Python keeps, and most paths are tried in vain.
    return path.startswith(stage) and _WHICH.match(path, len(stage)) is not None


_WHICH: Final = re.compile(r"(~\d+)?(#\d+(\.\d+)?)?/")
"""Which of the sagas that a stage has run, in a path, between its name and what is within."""
