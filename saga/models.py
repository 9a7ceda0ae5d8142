"""What a stage declares as its `output_model`: made of its output's data again when that comes from a durable ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel, RootModel, ValidationError

from saga.encoding import adapter_of, decoded, encoded
from saga.log import LOG
from saga.text import printable, qualified, said


def warn_of_misfit(stage: str, model: Any, data: dict[str, Any]) -> None:
    """Say in the log that data does not fit a stage's model, or would come back as something else: nothing else shows it in time."""
    try:
        made = _made(model, data)
        back = _made(model, decoded(encoded(data)))
        changed = [name for name in _names_of(model) if not _is_as_it_was(getattr(made, name), getattr(back, name))]
        if changed:
            LOG.warning(
                "stage %r: of its output, %s would come back from a durable ledger as another value than was given: "
                "its output_model %s does not make the same of it again",
                stage,
                ", ".join(changed),
                qualified(model),
            )
    except Exception as error:  # noqa: BLE001 - whatever the user's validators raise
        LOG.warning(
            "stage %r: its output does not fit its output_model %s (%s); a durable ledger will give it back as plain data",
            stage,
            qualified(model),
            _misfit(error),
        )


def restored(stage: str, model: Any, data: dict[str, Any]) -> dict[str, Any]:
    """What a stage's output was made of, out of what a durable ledger gives back; plain data, with a warning, if it does not fit."""
    try:
        value, names = _made(model, data), _fields(model, data)
        _refuse_unstable(model, value)
        return {key: getattr(value, names[key], plain) if key in names else plain for key, plain in data.items()}
    except Exception as error:  # noqa: BLE001 - whatever the user's validators raise
        LOG.warning(
            "stage %r: its recorded output does not fit its output_model %s (%s); it stays plain data",
            stage,
            qualified(model),
            _misfit(error),
        )
        return data


def _made(model: Any, data: dict[str, Any]) -> Any:
    # By name, as models are stored; and by alias, as somebody may have written them.
    return adapter_of(model).validate_python(data, by_alias=True, by_name=True)


def _refuse_unstable(model: Any, value: Any) -> None:
    """Refuse what changes each time that it is made: what was recorded was made once already.

    Raises:
        ValueError: It does, as an amount does that a validator multiplies.
    """
    plain = encoded(value)
    try:
        again = encoded(_made(model, decoded(plain)))
    except Exception:  # noqa: BLE001 - whatever the user's validators raise; what the model does not write is missing, for example
        return
    if again != plain:
        raise ValueError("its validators change what they have made once more")


def _is_as_it_was(given: Any, back: Any) -> bool:
    """Whether models and dataclasses within a value have come back as the same; plain data may have become what a model makes of it."""
    match given:
        case RootModel():
            names = ["root"]
        case BaseModel():
            names = [name for name, field in type(given).model_fields.items() if not field.exclude]
        case _ if is_dataclass(given) and not isinstance(given, type):
            names = [field.name for field in fields(given)]
        case dict() if isinstance(back, dict):
            return all(map(_is_as_it_was, given.values(), back.values()))
        case list() | tuple() if isinstance(back, list | tuple):
            return all(map(_is_as_it_was, given, back))
        case _:
            return bool(given == back) or encoded(given) == encoded(back) or isinstance(given, dict | list | tuple)
    return type(back) is type(given) and all(_is_as_it_was(getattr(given, name), getattr(back, name)) for name in names)


def _names_of(model: Any) -> Sequence[str]:
    known = getattr(model, "__pydantic_fields__", None)
    return [field.name for field in fields(model)] if known is None else list(known)


def _fields(model: Any, data: dict[str, Any]) -> dict[str, str]:
    """The fields of a model by the keys that the data has for them: an alias, or else the name."""
    known = getattr(model, "__pydantic_fields__", None)
    if known is None:
        return {field.name: field.name for field in fields(model)}
    found: dict[str, str] = {}
    for name, field in known.items():
        aliases = [key for key in getattr(field.validation_alias, "choices", (field.validation_alias,)) if key in data]
        found |= dict.fromkeys(aliases or (name,), name)
    return found


def _misfit(error: Exception) -> str:
    """Why data does not fit a model, on one line; without the data, which may be secret."""
    if not isinstance(error, ValidationError):
        return printable(f"{type(error).__name__}: {said(error)}")
    found = error.errors(include_url=False, include_input=False)
    return printable("; ".join(": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"]))) for one in found))
