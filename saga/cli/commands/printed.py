"""What commands print on stdout."""

from __future__ import annotations

import sys
from contextlib import suppress

import typer

from saga.render.reach import Reach
from saga.render.text import summary
from saga.report import SagaReport
from saga.text import harmless


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
