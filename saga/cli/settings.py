"""What `[tool.saga]` in pyproject.toml says."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from saga.errors import MisuseError
from saga.text import did_you_mean, shown


class Settings(BaseModel):
    """The defaults of a project.

    Attributes:
        ledger: The URL of its ledger.
        pipelines: Where its pipelines are, as MODULE:PIPELINE.
        policy: The file with the policy of `saga run`, `saga check` and `saga explain`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ledger: str | None = None
    pipelines: tuple[str, ...] = ()
    policy: Path | None = None


def here() -> Path:
    """The current folder.

    Raises:
        MisuseError: It was deleted.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        hint = 'Change to the one that has taken its place, if one has: cd "$PWD"'
        raise MisuseError("a current folder that is there", got="one that was deleted", hint=hint) from None


def settings() -> Settings:
    """Read `[tool.saga]` from the pyproject.toml of the current folder; without one there are no defaults.

    Raises:
        MisuseError: It holds what makes no sense.
    """
    try:
        text = Path("pyproject.toml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return Settings()
    except UnicodeDecodeError as error:
        raise MisuseError("UTF-8 in pyproject.toml", got=f"{error.object[error.start]:#x} at byte {error.start}") from None
    try:
        return Settings.model_validate(tomllib.loads(text).get("tool", {}).get("saga", {}))
    except tomllib.TOMLDecodeError as error:
        raise MisuseError("TOML in pyproject.toml", got=str(error)) from None
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> MisuseError:
    first = error.errors()[0]
    key, place = str(next(iter(first["loc"]), "")), "in [tool.saga] of pyproject.toml"
    if first["type"] == "extra_forbidden":
        known = Settings.model_fields
        return MisuseError(f"one of {', '.join(known)} {place}", got=repr(key), hint=did_you_mean(key, known))
    # Of what may hold a ledger's URL, and so a password, nothing is shown.
    got = shown(first["input"]) if key in {"pipelines", "policy"} else f"a {type(first['input']).__name__}"
    if not key:
        return MisuseError(f"a table {place}", got=got)
    wanted = {"ledger": "a URL", "pipelines": 'a list, as in ["shop:book_trip"],', "policy": "the path of a file"}
    return MisuseError(f"{wanted[key]} for {key} {place}", got=got)
