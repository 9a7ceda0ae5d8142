"""Values as plain JSON, and back: types that JSON lacks carry a tag."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, RootModel, TypeAdapter

from saga.errors import NotStorable
from saga.text import brief, qualified, said, shown, written

TAG: Final = "$saga"
ATOMS: Final = frozenset({str, int, float, bool, type(None), bytes, Decimal, datetime, date, time, timedelta, UUID})
"""Types whose values nobody can change, and which come back as the equals of no others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """Stands in a report read from JSON for a value that JSON could not hold.

    Attributes:
        type: The qualified name of the value's type.
        text: Its `repr`.
    """

    type: str
    text: str


def _is_text(value: str) -> bool:
    """Whether UTF-8 has all of it: it lacks surrogates."""
    return value.isascii() or value == written(value)


def _has_plain_keys(value: dict[Any, Any]) -> bool:
    for key in value:
        if type(key) is not str or not _is_text(key):
            return False
    return TAG not in value


Otherwise = Callable[..., Any]
"""Gives what stands for a value that has no encoding; behind the value comes what it raised, if that is why."""
Encode = Callable[[Any, Otherwise, int], Any]
"""Gives plain JSON for a value; behind the value come what stands for a part without an encoding, and how many levels there may be."""
_NOTHING: Final = object()

_LEVELS: Final = 150
"""How deeply JSON nests at most: pydantic writes 255 levels and reads 200, and a value stands within an output, an event and a row."""
_BITS: Final = 1024
"""pydantic reads no number of more than 4,300 digits; larger ones than this are written as text."""
_ENCODERS: Final[dict[type, tuple[str, Callable[[Any], Any]]]] = {
    str: ("text", lambda text: base64.b64encode(text.encode("utf-8", "surrogatepass")).decode("ascii")),
    int: ("int", hex),
    float: ("float", repr),
    datetime: ("datetime", lambda when: _of_zone(when) or when.isoformat()),
    date: ("date", date.isoformat),
    time: ("time", lambda clock: _of_zone(clock) or clock.isoformat()),
    timedelta: ("timedelta", lambda span: [span.days, span.seconds, span.microseconds]),
    UUID: ("uuid", str),
    Decimal: ("decimal", str),
    bytes: ("bytes", lambda raw: base64.b64encode(raw).decode("ascii")),
    type(Path()): ("path", str),
    Opaque: ("opaque", lambda opaque: [opaque.type, opaque.text]),
}
_DERIVED: Final[dict[type, Callable[[Any], Any]]] = {
    dict: lambda value: dict(dict.items(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: bytes.__bytes__,
    bytearray: bytes,
}
"""What values of types that somebody derived from these are stored as: what they hold, and not what they say that they are."""
_COLLECTIONS: Final[dict[type, str]] = {tuple: "tuple", set: "set", frozenset: "frozenset"}
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "datetime": lambda said: _in_zone(datetime, said),
    "date": date.fromisoformat,
    "time": lambda said: _in_zone(time, said),
    "timedelta": lambda parts: timedelta(*parts),
    "uuid": UUID,
    "decimal": Decimal,
    "bytes": base64.b64decode,
    "path": Path,
    "text": lambda raw: base64.b64decode(raw).decode("utf-8", "surrogatepass"),
    "int": lambda digits: int(digits, 16),
    "float": float,
    "tuple": lambda items: tuple(decoded(item) for item in items),
    "set": lambda items: {decoded(item) for item in items},
    "frozenset": lambda items: frozenset(decoded(item) for item in items),
    "dict": lambda pairs: {decoded(key): decoded(item) for key, item in pairs},
    "opaque": lambda parts: Opaque(*parts),
}


def _of_zone(when: datetime | time) -> list[Any] | None:
    """A moment, or a time of day, with the name of its time zone, which an offset does not tell; None: it has none."""
    zone = when.tzinfo
    if type(zone) is not ZoneInfo or zone.key is None:
        return None
    return [when.isoformat(), zone.key, when.fold]


def _in_zone(kind: type[datetime | time], said: str | list[Any]) -> datetime | time:
    if isinstance(said, str):
        return kind.fromisoformat(said)
    text, key, fold = said
    when = kind.fromisoformat(text)
    try:
        return when.replace(tzinfo=ZoneInfo(key), fold=fold)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return when  # this machine does not know it; the moment is the same


def encoded(value: Any) -> Any:
    """Turn a value into plain JSON; standard types carry a tag so that they come back equal.

    What has no encoding, or raises while it is encoded, becomes an `Opaque` of its type and repr. Pydantic models
    and dataclasses become plain data.
    """
    try:
        return _encoded(value, _opaque, _LEVELS)
    except RecursionError:
        return _opaque(value, text="nested too deeply, or within itself")


def stored(value: Any, name: str) -> Any:
    """Turn a value into plain JSON as `encoded` does, but refuse what would come back from a durable ledger as an `Opaque`.

    Args:
        value: What is to be kept.
        name: What the error calls it: `effect`; of its parts it then says `effect['seats'][2]`.

    Raises:
        NotStorable: It, or a part of it, has no encoding, or raises while it is encoded; the error says which part.
    """
    return _stored(value, name, _encoded)


def _stored(value: Any, name: str, encode: Encode) -> Any:
    try:
        return encode(value, _refused, _LEVELS)
    except RecursionError:
        raise NotStorable(name, f"plain data at {name}", f"more than {_LEVELS} levels, or a value within itself") from None
    except NotStorable as refused:
        raised = refused.__cause__
        for part, item, encode_part in _parts_of(value, name, encode):
            _stored(item, part, encode_part)
        hashed = " that can be hashed" if encode is _encoded_key else ""
        why = f"has no encoding as JSON{hashed}" if raised is None else f"can't be encoded: {type(raised).__name__}: {said(raised)}"
        raise NotStorable(name, f"plain data at {name}", f"{qualified(type(value))}, which {why}") from raised


def _parts_of(value: Any, name: str, encode: Encode) -> Sequence[tuple[str, Any, Encode]]:
    try:
        return list(_parts(value, name, encode))
    except Exception:  # noqa: BLE001 - whatever the user's type raises; then it is to blame itself
        return ()


def _parts(value: Any, name: str, encode: Encode) -> Iterator[tuple[str, Any, Encode]]:
    match value:
        case dict():
            yield from ((f"the key {shown(key)} of {name}", key, _encoded_key) for key in value)
            yield from ((f"{name}[{shown(key)}]", item, _encoded) for key, item in value.items())
        case list() | tuple():
            yield from ((f"{name}[{index}]", item, encode) for index, item in enumerate(value))
        case set() | frozenset():
            yield from ((f"an item of {name}", item, _encoded_key) for item in value)
        case _:
            match _plain_of(value):
                case dict(fields) if not isinstance(value, RootModel):
                    yield from ((f"{name}.{field}", item, partial(_encoded_field, value, field)) for field, item in fields.items())
                case plain if plain is not _NOTHING:
                    yield name, plain, encode


def _opaque(value: Any, _: Exception | None = None, *, text: str | None = None) -> dict[str, Any]:
    return {TAG: "opaque", "value": [qualified(type(value)), brief(shown(value)) if text is None else text]}


def _refused(_: Any, error: Exception | None = None) -> NoReturn:
    raise NotStorable("", "", "") from error  # `stored` finds out where


def _encoded(value: Any, otherwise: Otherwise, levels: int) -> Any:
    kind = type(value)
    # One after another, the most frequent first: for large outputs this is where the time goes.
    if kind is str:
        return value if _is_text(value) else _tagged(kind, value)
    if kind is int:
        return value if value.bit_length() <= _BITS else _tagged(kind, value)
    if value is None or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else _tagged(kind, value)
    if levels < 0:
        raise RecursionError
    if kind is list:
        return [_encoded(item, otherwise, levels - 1) for item in value]
    if kind is dict:
        if _has_plain_keys(value):
            return {key: _encoded(item, otherwise, levels - 1) for key, item in value.items()}
        keys, items = _encoded_keys(value, otherwise, levels - 3), [_encoded(item, otherwise, levels - 3) for item in value.values()]
        return {TAG: "dict", "value": list(map(list, zip(keys, items, strict=True)))}
    if kind in _ENCODERS:
        try:
            return _tagged(kind, value)
        except Exception as error:  # noqa: BLE001 - whatever the user's tzinfo raises
            return otherwise(value, error)
    if kind in _COLLECTIONS:
        items = [_encoded(item, otherwise, levels - 2) for item in value] if kind is tuple else _encoded_keys(value, otherwise, levels - 2)
        return {TAG: _COLLECTIONS[kind], "value": items}
    return _encoded_object(value, otherwise, levels)


def _encoded_key(value: Any, otherwise: Otherwise, levels: int) -> Any:
    """Encode a dict's key or an item of a set, which has to have a hash when it comes back, too."""
    plain = _encoded(value, otherwise, levels)
    return plain if _is_hashable(plain) else otherwise(value)


def _encoded_keys(values: Iterable[Any], otherwise: Otherwise, levels: int) -> list[Any]:
    """Encode all keys of a dict, or all items of a set; one that would come back as another one's equal would replace it."""
    keys = [_encoded_key(value, otherwise, levels) for value in values]
    if ATOMS.issuperset(map(type, values)):
        return keys
    seen = set()
    for place, value in enumerate(values):
        back = decoded(keys[place])
        if back in seen:
            keys[place] = otherwise(value, ValueError(f"it would come back as the equal of another one, as {shown(back)}"))
        seen.add(back)
    return keys


def _is_hashable(plain: Any) -> bool:
    """Whether what `decoded` makes of it has a hash: a model or a dataclass comes back as a dict, which has none."""
    if type(plain) is not dict:
        return type(plain) is not list
    if plain.get(TAG) == "tuple":
        return all(map(_is_hashable, plain["value"]))
    return TAG in plain and plain[TAG] not in {"dict", "set"}


def _encoded_object(value: Any, otherwise: Otherwise, levels: int) -> Any:
    try:
        plain = _plain_of(value)
    except Exception as error:  # noqa: BLE001 - whatever the user's type raises
        return otherwise(value, error)
    if plain is _NOTHING:
        return otherwise(value)
    if not _has_fields(value):
        return _encoded(plain, otherwise, levels)
    if _has_plain_keys(plain):
        return {name: _encoded_field(value, name, item, otherwise, levels - 1) for name, item in plain.items()}
    # What a model holds beyond its fields may have any name, our tag's, too.
    fields = [(name, _encoded_field(value, name, item, otherwise, levels - 3)) for name, item in plain.items()]
    return {TAG: "dict", "value": [[_encoded_key(name, otherwise, levels - 3), item] for name, item in fields]}


def _encoded_field(owner: Any, name: str, item: Any, otherwise: Otherwise, levels: int) -> Any:
    """Encode a field of a model or a dataclass; one that has no encoding of ours as its owner writes and reads it itself."""
    try:
        return _encoded(item, _refused, levels)
    except NotStorable:
        own = _own_form(owner, name, item)
        return _encoded(item if own is _NOTHING else own, otherwise, levels)


def _own_form(owner: Any, name: str, item: Any) -> Any:
    """What the owner's type makes of a field for JSON, if it makes the same value of that again: it does not of a secret."""
    try:
        kind: Any = type(owner)  # mypy takes a class for unhashable
        adapter = adapter_of(kind)
        plain = adapter.dump_python(owner, mode="json", include={name})[name]
        back = adapter.validate_python(_plain_of(owner) | {name: plain}, by_alias=True, by_name=True)
        return plain if getattr(back, name) == item else _NOTHING
    except Exception:  # noqa: BLE001 - whatever the user's type raises: then it has no such form
        return _NOTHING


@lru_cache(maxsize=1000)
def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """What reads and writes values of a type."""
    return TypeAdapter(kind)


def _plain_of(value: Any) -> Any:
    """What a pydantic model or a dataclass holds by the names of its fields, what an enum's member stands for; of all else `_NOTHING`.

    A value of a type that somebody derived from a plain one is plain, too: it comes back equal.
    """
    match value:
        case Enum():
            return value.value
        case RootModel():
            return value.root
        case BaseModel():
            # Not as it would write itself: a field's serializer has no way back, and what is computed is computed again.
            shown = (name for name, field in type(value).model_fields.items() if not field.exclude)
            return {name: getattr(value, name) for name in shown} | (value.model_extra or {})
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return next((plain(value) for kind, plain in _DERIVED.items() if isinstance(value, kind)), _NOTHING)


def _has_fields(value: Any) -> bool:
    return dataclasses.is_dataclass(value) if not isinstance(value, BaseModel) else not isinstance(value, RootModel)


def _tagged(kind: type, value: Any) -> dict[str, Any]:
    tag, encode = _ENCODERS[kind]
    return {TAG: tag, "value": encode(value)}


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
