"""Outputs at rest: copied when recorded, JSON when written.

stageflow hands the same `StageOutput.data` to every dependent, so a later stage could change what an
earlier one recorded. What goes into the ledger is therefore a copy, and what comes out is one too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import PlainSerializer, PlainValidator, SerializationInfo, ValidationInfo, WithJsonSchema
from stageflow.api import StageArtifact, StageEvent, StageOutput, StageStatus

from saga.encoding import ATOMS, decoded, encoded, stored
from saga.quick import unfrozen
from saga.text import said


def copied(value: Any) -> Any:
    """Copy a value so that whoever holds the original can't change the copy.

    What refuses to be copied (a lock, a connection) is kept by reference, and only that.
    """
    try:
        return _copied(value)
    except RecursionError:
        # It contains itself, or is nested deeper than the stack; deepcopy knows at least the former.
        return _deep(value)


def _copied(value: Any) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind is dict:
        if ATOMS.issuperset(map(type, value.values())):
            return value.copy()  # as most are, or what is in them; it takes a third of the time
        return {key: _copied(item) for key, item in value.items()}
    if kind is list:
        if ATOMS.issuperset(map(type, value)):
            return value.copy()
        return [_copied(item) for item in value]
    if kind is tuple:
        return tuple(_copied(item) for item in value)
    return _deep(value)


def _deep(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - user types decide what their __deepcopy__ raises
        return value


def copied_output(output: StageOutput) -> StageOutput:
    """Copy an output deeply enough that no later stage can change what was recorded."""
    if type(output) is StageOutput:
        made = _unfrozen()
        fresh: Any = made
        fresh.status, fresh.error = output.status, output.error
        fresh.duration_ms, fresh.version = output.duration_ms, output.version
        try:
            fresh.data = copied(output.data) if output.data else {}
            fresh.artifacts = copied(output.artifacts) if output.artifacts else []
            fresh.events = copied(output.events) if output.events else []
        except Exception:  # noqa: BLE001 - what else stands in the place of one may be neither empty nor not, as an array of numbers
            fresh.data, fresh.artifacts, fresh.events = map(copied, (output.data, output.artifacts, output.events))
        fresh.__class__ = StageOutput
        return made
    # Without a constructor: a type that somebody derived may have one of its own.
    derived: StageOutput = object.__new__(type(output))
    for field in dataclasses.fields(output):
        value = getattr(output, field.name)
        object.__setattr__(derived, field.name, copied(value) if field.name in _MUTABLE else value)
    return derived


_unfrozen: Final = unfrozen(StageOutput)
_MUTABLE: Final = frozenset({"data", "artifacts", "events"})
"""What of an output can be changed in place."""


def stored_output(output: StageOutput) -> dict[str, Any]:
    """Turn an output into plain JSON, but refuse one of which a part has no encoding: `data['connection']`.

    Raises:
        NotStorable: The error says which part.
    """
    return _output_to_json(output, stored)


STRICT: Final = object()
"""The context in which what has no encoding is refused when an event is written: `dump_json(..., context=STRICT)`."""


def _leniently(value: Any, _: str) -> Any:
    return encoded(value)


_ARTIFACT: Final = ("type", "payload", "timestamp")
_EVENT: Final = ("type", "data", "timestamp")


def _output_to_json(output: StageOutput, encode: Callable[[Any, str], Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {"status": output.status.value, "data": encode(output.data, "data")}
    if output.error is not None:
        plain["error"] = said(output.error)
    if output.duration_ms is not None:
        plain["duration_ms"] = encode(output.duration_ms, "duration_ms")
    if output.version is not None:
        plain["version"] = said(output.version)
    for name, fields in (("artifacts", _ARTIFACT), ("events", _EVENT)):
        items = getattr(output, name)
        if not isinstance(items, list | tuple):
            items = encode(items, name)
        elif items:
            items = [_part_to_json(item, f"{name}[{index}]", fields, encode) for index, item in enumerate(items)]
        if items:
            plain[name] = items
    return plain


def _part_to_json(part: Any, name: str, fields: tuple[str, ...], encode: Callable[[Any, str], Any]) -> list[Any]:
    """An artifact or an event of an output by its fields; anything else, for stageflow checks no type, as one item."""
    if all(hasattr(part, field) for field in fields):
        return [encode(getattr(part, field), f"{name}.{field}") for field in fields]
    return [encode(part, name)]


def _parts_from(value: Any, kind: Callable[..., Any]) -> Any:
    if not isinstance(value, list):
        return decoded(value)
    return [kind(*decoded(part)) if len(part) > 1 else decoded(part[0]) for part in value]


def _output_from(value: Any) -> StageOutput:
    if isinstance(value, StageOutput):
        return value
    try:
        fields: dict[str, Any] = dict(value)
        fields["status"] = StageStatus(fields["status"])
        fields["data"] = decoded(fields["data"])
        fields["duration_ms"] = decoded(fields.get("duration_ms"))
        fields["artifacts"] = _parts_from(fields.get("artifacts", []), StageArtifact)
        fields["events"] = _parts_from(fields.get("events", []), StageEvent)
        return StageOutput(**fields)
    except (TypeError, LookupError, ArithmeticError) as error:
        raise _no_value(error) from error


def _write_output(output: StageOutput, info: SerializationInfo) -> dict[str, Any]:
    return _output_to_json(output, stored if info.context is STRICT else _leniently)


Output = Annotated[
    StageOutput,
    PlainValidator(_output_from),
    PlainSerializer(_write_output, when_used="json"),
    WithJsonSchema({"type": "object", "required": ["status", "data"], "title": "StageOutput"}),
]
"""A stageflow output inside a pydantic model."""


def _plain_from(value: Any, info: ValidationInfo) -> Any:
    # A live value may hold our tag as an ordinary key; only JSON is ever decoded.
    if info.mode != "json":
        return value
    try:
        return decoded(value)
    except (TypeError, LookupError, ArithmeticError) as error:
        raise _no_value(error) from error


def _no_value(error: Exception) -> ValueError:
    """Of all that decoding may raise, pydantic makes a `ValidationError` of this alone."""
    return ValueError(f"expected what was written of a value, got {type(error).__name__}: {error}")


def _write_plain(value: Any, info: SerializationInfo) -> Any:
    return stored(value, "value") if info.context is STRICT else encoded(value)


Plain = Annotated[
    Any,
    PlainValidator(_plain_from),
    PlainSerializer(_write_plain, when_used="json"),
    WithJsonSchema({"description": "Any value; types that JSON lacks carry a $saga tag."}),
]
"""Any value inside a pydantic model, tagged in JSON."""
