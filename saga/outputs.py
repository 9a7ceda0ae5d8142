"""Outputs at rest: copied when recorded, JSON with tagged types when written.

stageflow hands the same `StageOutput.data` to every dependent, so a later stage could change what an
earlier one recorded. What goes into the ledger is therefore a copy, and what comes out is one too.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import math
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import BaseModel, PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema
from stageflow.api import StageArtifact, StageEvent, StageOutput, StageStatus

from saga.text import qualified, said, shown

TAG: Final = "$saga"
_ATOMS: Final = frozenset({str, int, float, bool, type(None), bytes, Decimal, datetime, date, time, timedelta, UUID})


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """Stands in a report read from JSON for a value that JSON could not hold.

    Attributes:
        type: The qualified name of the value's type.
        text: Its `repr`.
    """

    type: str
    text: str


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
    if kind in _ATOMS:
        return value
    if kind is dict:
        return {key: _copied(item) for key, item in value.items()}
    if kind is list:
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
    if not output.data and not output.artifacts and not output.events:
        return output
    return dataclasses.replace(output, data=copied(output.data), artifacts=copied(output.artifacts), events=copied(output.events))


_ENCODERS: Final[dict[type, tuple[str, Callable[[Any], Any]]]] = {
    datetime: ("datetime", datetime.isoformat),
    date: ("date", date.isoformat),
    time: ("time", time.isoformat),
    timedelta: ("timedelta", lambda span: [span.days, span.seconds, span.microseconds]),
    UUID: ("uuid", str),
    Decimal: ("decimal", str),
    bytes: ("bytes", lambda raw: base64.b64encode(raw).decode("ascii")),
}
_COLLECTIONS: Final[dict[type, str]] = {tuple: "tuple", set: "set", frozenset: "frozenset"}
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda parts: timedelta(*parts),
    "uuid": UUID,
    "decimal": Decimal,
    "bytes": base64.b64decode,
    "float": float,
    "tuple": lambda items: tuple(decoded(item) for item in items),
    "set": lambda items: {decoded(item) for item in items},
    "frozenset": lambda items: frozenset(decoded(item) for item in items),
    "dict": lambda pairs: {decoded(key): decoded(item) for key, item in pairs},
    "opaque": lambda parts: Opaque(*parts),
}


def encoded(value: Any) -> Any:
    """Turn a value into plain JSON; standard types carry a tag so that they come back equal.

    What has no encoding becomes an `Opaque` of its type and repr. Pydantic models and dataclasses become
    plain data.
    """
    try:
        return _encoded(value)
    except RecursionError:
        return _opaque(value, "nested too deeply, or within itself")


def _opaque(value: Any, text: str) -> dict[str, Any]:
    return {TAG: "opaque", "value": [qualified(type(value)), text]}


def _encoded(value: Any) -> Any:
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return {TAG: "float", "value": repr(value)}
    if kind in {str, int, float, bool, type(None)}:
        return value
    if kind is list:
        return [_encoded(item) for item in value]
    if kind is dict:
        if TAG not in value and all(type(key) is str for key in value):
            return {key: _encoded(item) for key, item in value.items()}
        return {TAG: "dict", "value": [[_encoded(key), _encoded(item)] for key, item in value.items()]}
    if kind in _ENCODERS:
        tag, encode = _ENCODERS[kind]
        return {TAG: tag, "value": encode(value)}
    if kind in _COLLECTIONS:
        return {TAG: _COLLECTIONS[kind], "value": [_encoded(item) for item in value]}
    if kind is Opaque:
        return {TAG: "opaque", "value": [value.type, value.text]}
    if isinstance(value, BaseModel):
        return _encoded(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encoded({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return _opaque(value, shown(value))


def decoded(value: Any) -> Any:
    """Turn what `encoded` gave back into values.

    Raises:
        ValueError: A tag is unknown; no type is ever looked up by a name in the data.
    """
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: decoded(item) for key, item in value.items()}
    if value[TAG] not in _DECODERS:
        raise ValueError(f"expected a tag out of {sorted(_DECODERS)}, got {value[TAG]!r}")
    return _DECODERS[value[TAG]](value["value"])


def _output_to_json(output: StageOutput) -> dict[str, Any]:
    plain = {
        "status": output.status.value,
        "data": encoded(output.data),
        "error": None if output.error is None else said(output.error),
        "duration_ms": output.duration_ms,
        "version": None if output.version is None else said(output.version),
        "artifacts": [encoded([item.type, item.payload, item.timestamp]) for item in output.artifacts],
        "events": [encoded([item.type, item.data, item.timestamp]) for item in output.events],
    }
    return {key: value for key, value in plain.items() if key in {"status", "data"} or value}


def _output_from(value: Any) -> StageOutput:
    if isinstance(value, StageOutput):
        return value
    fields: dict[str, Any] = dict(value)
    fields["status"] = StageStatus(fields["status"])
    fields["data"] = decoded(fields["data"])
    fields["artifacts"] = [StageArtifact(*decoded(item)) for item in fields.get("artifacts", ())]
    fields["events"] = [StageEvent(*decoded(item)) for item in fields.get("events", ())]
    return StageOutput(**fields)


Output = Annotated[
    StageOutput,
    PlainValidator(_output_from),
    PlainSerializer(_output_to_json, when_used="json"),
    WithJsonSchema({"type": "object", "required": ["status", "data"], "title": "StageOutput"}),
]
"""A stageflow output inside a pydantic model."""


def _plain_from(value: Any, info: ValidationInfo) -> Any:
    # A live value may hold our tag as an ordinary key; only JSON is ever decoded.
    return decoded(value) if info.mode == "json" else value


Plain = Annotated[
    Any,
    PlainValidator(_plain_from),
    PlainSerializer(encoded, when_used="json"),
    WithJsonSchema({"description": "Any value; types that JSON lacks carry a $saga tag."}),
]
"""Any value inside a pydantic model, tagged in JSON."""
