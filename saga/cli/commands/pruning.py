"""Forgetting old sagas: prune."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer

from saga.cli.commands.ledger import LedgerUrl, durable, ledger_at
from saga.errors import MisuseError
from saga.text import printable

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def prune(
    older_than: Annotated[str, typer.Option("--older-than", metavar="AGE", help="How old, as in 30d, 12h or 90m.")],
    ledger: LedgerUrl = None,
) -> None:
    """Forget old sagas about which nothing is left to do."""
    age = _age(older_than)

    async def forgotten() -> tuple[str, ...]:
        async with ledger_at(durable(ledger)) as opened:
            return tuple(await opened.prune(age))

    gone = asyncio.run(forgotten())
    for saga_id in gone:
        typer.echo(printable(saga_id))
    typer.echo(f"{len(gone)} forgotten", err=True)


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d+)([smhdw])", text)
    if not found:
        raise MisuseError("an age such as 30d, 12h or 90m", got=repr(text))
    try:
        age = timedelta(**{_UNITS[found[2]]: int(found[1])})
        datetime.now(UTC) - age
    except (OverflowError, ValueError):
        raise MisuseError("an age that reaches back to the year 1 at most", got=f"{text[:20]!r}") from None
    return age
