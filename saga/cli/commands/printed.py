"""What commands print: reports and JSON on stdout, and on stderr what went wrong."""

from __future__ import annotations

import sys
from contextlib import suppress
from contextvars import ContextVar
from traceback import format_exception
from typing import Final

import typer

from saga.cli.exits import Exit, exit_of_error, in_a_line
from saga.render.reach import Reach
from saga.render.text import summary
from saga.report import SagaReport
from saga.text import harmless

WITH_TRACEBACK: Final = ContextVar("WITH_TRACEBACK", default=False)
"""Whether an error is to be shown with where it comes from."""


def print_report(report: SagaReport, reach: Reach, *, as_json: bool) -> None:
    """Print a report, with the commands that come next; as JSON without them."""
    if as_json:
        print_json(report.model_dump_json())
    else:
        typer.echo(summary(report, reach))


def print_json(text: str) -> None:
    """Print a line of JSON in UTF-8, which is what reads it again, whatever the locale takes text for."""
    with suppress(AttributeError):  # whoever calls from Python may have put anything there
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr] # of a stream to the outside
    typer.echo(harmless(text))


def print_error(error: Exception) -> Exit:
    """Say what went wrong; what to exit with."""
    told = "\n".join(map(harmless, "".join(format_exception(error)).split("\n"))) if WITH_TRACEBACK.get() else f"saga: {in_a_line(error)}"
    typer.echo(told, err=True)
    return exit_of_error(error)
