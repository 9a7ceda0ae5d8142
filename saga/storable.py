"""What of an event a durable ledger can keep: nothing without an encoding as JSON, and no more than it has room for."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import PydanticSerializationError, to_json

from saga.encoding import Opaque, encoded, stored
from saga.errors import NotStorable
from saga.events import (
    AnyEvent,
    EffectRecorded,
    FallbackUsed,
    SagaStarted,
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSkipped,
    event_from_json,
    event_to_json,
    line_of,
)
from saga.outputs import stored_output
from saga.text import brief, bytes_of, qualified, shown

if TYPE_CHECKING:
    from saga.ledger import Ledger

_WITH_OUTPUT: Final = (StageCompleted, StageFailed, StageSkipped, StageProbed, FallbackUsed)


def storable(ledger: Ledger, event: AnyEvent) -> AnyEvent:
    """The event with texts in the place of what of its output or effect the ledger can't keep."""
    try:
        refuse_unstorable(ledger, event)
    except NotStorable as refused:
        most = ledger.max_event_bytes
        event = event_from_json(event_to_json(event))
        if isinstance(event, StageCompleted | StageSkipped):
            event = replace(event, not_kept=brief(str(refused)))
        return event if most is None or bytes_of(event_to_json(event)) <= most else _fitting(event, most // 2)
    return event


def refuse_unstorable(ledger: Ledger, event: AnyEvent) -> None:
    """Refuse an event with an output, an effect or an input that the ledger can't keep.

    How large it is counts before the ledger's `redact` sees it.

    Raises:
        NotStorable: The error says which part.
    """
    if not ledger.durable:
        return
    if isinstance(event, EffectRecorded):
        value, name = event.effect, "effect"
    elif isinstance(event, _WITH_OUTPUT) and event.output is not None:
        value, name = event.output.data, "data"
    elif isinstance(event, SagaStarted):
        value, name = event.input, "context"
    else:
        return
    try:
        size = bytes_of(line_of(event))
    except PydanticSerializationError:
        # In words of ours, if it is this value that it is about.
        _ = stored_output(event.output) if isinstance(event, _WITH_OUTPUT) and event.output is not None else stored(value, name)
        return
    most = ledger.max_event_bytes
    if most is not None and size > most:
        largest = f"{name}[{shown([*_sizes_of(value)][-1])}]" if type(value) is dict and value else name
        expected = f"at most {most:,} bytes of JSON in one event (max_event_bytes)"
        raise NotStorable(largest, expected, f"{size:,}, most of them in {largest}")


def _fitting(event: AnyEvent, room: int) -> AnyEvent:
    """The event with as much of its effect, or of its output's data, as fits into so many bytes of JSON."""
    if isinstance(event, EffectRecorded):
        return replace(event, effect=_what_fits(event.effect, room))
    assert isinstance(event, _WITH_OUTPUT)  # nothing else is ever too large to be recorded with its stage
    assert event.output is not None  # it is what was too large
    return replace(event, output=replace(event.output, data=_what_fits(event.output.data, room), artifacts=[], events=[]))


def _what_fits(value: Any, room: int) -> Any:
    """What of a value fits into so many bytes of JSON: of a dict the smallest items, and a text for each of the others; else a text."""
    if type(value) is not dict:
        return _left_out(value, _size_of(encoded(value)))
    fits: dict[Any, Any] = {}
    for key, size in _sizes_of(value).items():
        item, taken = value[key], size
        if size > room:
            item = _left_out(item, size)
            taken = _size_of(encoded({key: item}))
        room -= taken
        if room >= 0:
            fits[key] = item
    return fits


def _left_out(value: Any, size: int) -> Opaque:
    return Opaque(qualified(type(value)), f"{size:,} bytes of JSON, which were left out")


def _sizes_of(data: dict[Any, Any]) -> dict[Any, int]:
    """How many bytes of JSON each key of a dict takes with its value, the smallest first."""
    sizes = {key: _size_of(encoded({key: value})) for key, value in data.items()}
    return dict(sorted(sizes.items(), key=itemgetter(1)))


def _size_of(plain: Any) -> int:
    """How many bytes plain JSON takes."""
    return len(to_json(plain))
