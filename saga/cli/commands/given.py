"""What several commands are given: their arguments and options, and what these come to."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from saga.cli.commands.ledger import durable, ledger_at
from saga.cli.family import Family
from saga.cli.settings import settings
from saga.errors import MisuseError
from saga.ledger import listed
from saga.policies import Policy, load_policy
from saga.render.reach import TARGET

_AS_IT_IS: Final = re.compile(r"(?!=)[\w@%+=:,./-]+")
"""What every shell reads as it is. zsh looks for a program behind a first =; `shlex.quote` would quote all letters but those of English."""


def _known_ids(ctx: typer.Context) -> list[str]:
    async def ids() -> list[str]:
        async with ledger_at(durable(ctx.params.get("ledger"))) as ledger:
            return [*(await listed(ledger))[0]]

    return _completed(ids())


def _known_stages(ctx: typer.Context) -> list[str]:
    async def stages() -> list[str]:
        async with ledger_at(durable(ctx.params.get("ledger"))) as ledger:
            family = await Family.read(ledger, ctx.params["saga_id"])
            return list(family.sagas[family.head].stages)

    return _completed(stages())


def _completed(words: Coroutine[Any, Any, list[str]]) -> list[str]:
    try:
        # The shell takes them for what was typed; zsh already when it offers them, and typer does not quote all that it would run.
        return [word for word in asyncio.run(words) if _AS_IT_IS.fullmatch(word)]
    except Exception:  # noqa: BLE001 - a shell that completes a word has no place for an error
        return []


SagaId = Annotated[str, typer.Argument(metavar="ID", help="The saga's id.", autocompletion=_known_ids)]
Stage = Annotated[str, typer.Argument(metavar="STAGE", help="The stage; one of a nested saga by its path.", autocompletion=_known_stages)]
Target = Annotated[str, typer.Argument(metavar=TARGET, help="A Pipeline, or a function that returns one.")]
KnownTarget = Annotated[str | None, typer.Argument(metavar=TARGET, help="Its pipeline; by default found in [tool.saga] pipelines.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", metavar="FILE", help="A policy, in TOML or JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def policy_of(given: Path | None) -> Policy | None:
    """The policy in this file, or in that of the project; None: neither says of one."""
    chosen = given or settings().policy
    return None if chosen is None else policy_in(chosen)


def policy_in(policy: Path) -> Policy:
    """The policy in a file.

    Raises:
        MisuseError: It can't be read, or holds none.
    """
    try:
        return load_policy(policy)
    except OSError as error:
        raise MisuseError("a policy file", got=f"{str(policy)!r}: {error.strerror}") from None


def json_object(given: str, option: str) -> dict[str, Any]:
    """The JSON object that an option was given: itself, or behind an @ the file that holds it.

    Raises:
        MisuseError: There is no such object.
    """
    try:
        text = Path(given[1:]).read_text(encoding="utf-8") if given.startswith("@") else given
        found = json.loads(text)
    except OSError as error:
        raise MisuseError(f"a file of JSON behind the @ of {option}", got=f"{given[1:]!r}: {error.strerror}") from None
    except ValueError as error:
        raise MisuseError(f"JSON for {option}", got=str(error)) from None
    except RecursionError:
        raise MisuseError(f"JSON for {option}", got="values that are nested too deeply") from None
    if not isinstance(found, dict):
        raise MisuseError(f"a JSON object for {option}", got=text[:80])
    return found
