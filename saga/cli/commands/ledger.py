"""The ledger that a command is given, and what is in it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

import typer

from saga.cli.settings import settings
from saga.errors import MisuseError, SagaNotFound
from saga.ledger import Ledger, listed
from saga.ledgers import open_ledger
from saga.render.reach import TARGET, Reach
from saga.text import did_you_mean

_MEMORY: Final = "memory:"
_VARIABLE: Final = "SAGA_LEDGER"
_HIDDEN: Final = re.compile("@|password", re.IGNORECASE)
"""What the URL of a ledger has where it may hold a password."""
LedgerUrl = Annotated[
    str | None,
    typer.Option("--ledger", metavar="URL", envvar=_VARIABLE, help="memory:, sqlite:///path or postgresql://...", show_default=False),
]


@asynccontextmanager
async def ledger_at(url: str, *, exists: bool = True) -> AsyncIterator[Ledger]:
    """The ledger at this URL, open for the length of a block.

    It is to be there already, unless `exists` is False: in a new one nobody finds the saga that they look for.
    """
    ledger = open_ledger(url, exists=exists)
    try:
        yield ledger
    finally:
        await ledger.close()


def url_of(given: str | None) -> str:
    """The URL of the ledger: the one that is given, or else what the environment, or the project, says."""
    # An empty one, as that of a variable that is not set, is no word for memory: what was run there is gone. click passes over an empty
    # SAGA_LEDGER.
    said = given if given is not None else os.environ.get(_VARIABLE, settings().ledger)
    return said if said is not None else _MEMORY


def durable(given: str | None) -> str:
    """The URL of a ledger that outlives the process.

    Raises:
        MisuseError: It does not.
    """
    url = url_of(given)
    if url == _MEMORY:
        raise MisuseError(
            "a ledger that outlives the process",
            got=_MEMORY,
            hint="Give --ledger sqlite:///sagas.db, set SAGA_LEDGER, or set ledger in [tool.saga] of pyproject.toml.",
        )
    return url


async def refuse_unknown(ledger: Ledger, saga_id: str) -> None:
    """Refuse the id of a saga that the ledger does not have.

    Raises:
        SagaNotFound: It has none of that id; the error names the nearest.
    """
    if not await ledger.read(saga_id):
        known, _ = await listed(ledger)
        raise SagaNotFound("the id of a saga in the ledger", got=repr(saga_id), hint=did_you_mean(saga_id, known))


def reach_of(target: str | None, ledger: str | None) -> Reach:
    """How the next command gets at a saga of this command's."""
    # What the environment says it will say again; and a URL may hold a password.
    url = "URL" if ledger is not None and _HIDDEN.search(ledger) else ledger
    option = [] if url is None or ledger == os.environ.get(_VARIABLE) else ["--ledger", url]
    pipeline = target or ("" if settings().pipelines else TARGET)
    return Reach(pipeline, shlex.join(option), is_lost=url_of(ledger) == _MEMORY)
