"""What durable ledgers are asked to write, and the rows that come of it: JSON lines under a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from saga.errors import LedgerCorrupt, LedgerError, PolicyInvalid, SagasDamaged
from saga.events import AnyEvent, SagaStarted, SagaStatus, event_from_json, event_to_json, line_of, with_copies
from saga.ledger import A_NAME, LONGEST_NAME, Entry, is_name, status_said
from saga.text import bytes_of, quoted

Redact = Callable[[AnyEvent], AnyEvent]
"""Gives an event without what must not be stored."""


class Row(NamedTuple):
    """The events of one append.

    Attributes:
        first: How many events of the saga are before them.
        added: How many they are.
        body: A line of JSON each.
        checksum: What tells that this is what was written, for this saga and at this place.
        status: Where the saga stands after them; None: where it stood before.
        at: When the last of them was recorded, in ISO 8601, UTC.
    """

    first: int
    added: int
    body: str
    checksum: int
    status: str | None
    at: str


class Create(NamedTuple):
    """Begin a saga, its parent's token being `under`; None: whatever that is. `Row.first` is 0."""

    saga_id: str
    owner: str
    pipeline: str
    parent: str | None
    parent_stage: str | None
    started_at: str
    row: Row
    under: int | None


class Append(NamedTuple):
    """Add to a saga."""

    saga_id: str
    token: int
    release: bool
    row: Row


class Acquire(NamedTuple):
    """Take a lease, the parent's token being `under`; None: whatever that is."""

    saga_id: str
    owner: str
    under: int | None


class Release(NamedTuple):
    """Give a lease back."""

    saga_id: str
    token: int


class Beat(NamedTuple):
    """Extend all leases of an owner."""

    owner: str


class Prune(NamedTuple):
    """Forget what ended before a time, out of the sagas numbered above `after`."""

    before: str
    after: int


class Pruned(NamedTuple):
    """What came of a `Prune`: who is forgotten, and the number to go on after; None: that was all."""

    saga_ids: tuple[str, ...]
    last: int | None


Request = Create | Append | Acquire | Release | Beat | Prune


class Writer:
    """Makes rows of events.

    Args:
        max_event_bytes: How many bytes of JSON one event may have.
        redact: What every event goes through first.
    """

    def __init__(self, max_event_bytes: int, redact: Redact | None) -> None:
        self._max = max_event_bytes
        self._redact = redact

    def create(self, saga_id: str, owner: str, events: Sequence[AnyEvent], under: int | None) -> Create:
        """Make the rows of a new saga."""
        started = events[0]
        assert isinstance(started, SagaStarted)  # the journal sees to that
        parts = {"saga id": saga_id, "owner": owner, "pipeline name": started.pipeline}
        for what, text in (parts | {"parent": started.parent or "", "stage name": started.parent_stage or ""}).items():
            check_name(what, text)
        row = self.row(saga_id, 0, events)
        return Create(saga_id, owner, started.pipeline, started.parent, started.parent_stage, iso(started.at), row, under)

    def row(self, saga_id: str, first: int, events: Sequence[AnyEvent]) -> Row:
        """Make a row of events.

        Raises:
            LedgerError: One of them can't be written, or is too large; nothing was recorded.
        """
        body = "\n".join([self._line(saga_id, event) for event in events])
        status = status_said(events)
        return Row(first, len(events), body, checksum(saga_id, first, body.encode()), status and status.value, iso(events[-1].at))

    def _line(self, saga_id: str, event: AnyEvent) -> str:
        try:
            # What was redacted is written anew: it may be the same event, and only what it holds another one.
            line = line_of(event) if self._redact is None else event_to_json(self._redacted(saga_id, event), strict=True)
        except PydanticSerializationError as error:
            raise LedgerError(f"{_named(saga_id, event)} can't be stored: {str(error).rpartition('NotStorable: ')[2]}") from error
        size = bytes_of(line)
        if size > self._max:
            too_large = f"has {size:,} bytes of JSON, the ledger takes {self._max:,} (max_event_bytes)"
            raise LedgerError(f"{_named(saga_id, event)} {too_large}; nothing was recorded. A ledger opened with a larger one takes it")
        if self._redact is not None:
            _refuse_changed(saga_id, event, line)
        return line

    def _redacted(self, saga_id: str, event: AnyEvent) -> AnyEvent:
        """What is left of an event; when that can't be known, what should be hidden must not be stored."""
        assert self._redact is not None  # else nobody asks
        try:
            redacted = self._redact(with_copies(event))
        except Exception as error:  # whatever the user's code raises
            raise LedgerError(f"{_named(saga_id, event)} can't be stored: redact raised {type(error).__name__}: {error}") from error
        if type(redacted) is not type(event):
            raise LedgerError(f"{_named(saga_id, event)} can't be stored: expected one from redact, got {type(redacted).__name__}")
        return redacted


_FIXED: Final = ("event", "saga_id", "pipeline", "parent", "parent_stage", "stage", "status")
"""What redact must leave as it is: without it a saga can't be read any more, or reads as another one."""


def _refuse_changed(saga_id: str, event: AnyEvent, line: str) -> None:
    """Refuse a redacted event that would be read as another one, or not at all.

    Raises:
        LedgerError: It would; the error says what has changed.
    """
    try:
        back = event_from_json(line)
    except _UNREADABLE as error:
        raise LedgerError(f"{_named(saga_id, event)} can't be stored: what redact gave can't be read again: {_why(error)}") from error
    for part in _FIXED:
        was, now = getattr(event, part, None), getattr(back, part, None)
        if was != now:
            raise LedgerError(f"{_named(saga_id, event)} can't be stored: redact changed its {part} from {was!r} to {now!r}")


def check_name(what: str, text: str) -> None:
    """Refuse a name that not every database can hold; others that are written with it must not suffer for it.

    Raises:
        LedgerError: It is too long, or contains NUL or what UTF-8 lacks.
    """
    if not is_name(text):
        raise LedgerError(f"expected a {what} {A_NAME}, got {text[:LONGEST_NAME]!r}")


def _named(saga_id: str, event: AnyEvent) -> str:
    stage = getattr(event, "stage", None)
    return f"{type(event).__name__} of saga {saga_id}" + ("" if stage is None else f", stage {stage!r},")


def iso(when: datetime) -> str:
    """Write a time in UTC; the texts sort as the times do."""
    return (when if when.tzinfo is UTC else when.astimezone(UTC)).isoformat()


def checksum(saga_id: str, first: int, body: bytes) -> int:
    """What tells that a body is what was written, for this saga and at this place: CRC-32 notices any few flipped bits."""
    return zlib.crc32(body, zlib.crc32(f"{saga_id}/{first}/".encode()))


def events_in(saga_id: str, version: int | None, began: Sequence[Any], rows: Iterable[tuple[int, int, bytes]]) -> tuple[AnyEvent, ...]:
    """Read a saga's events out of its rows, in order.

    Args:
        saga_id: The saga.
        version: How many events it has, by its own row; None: there is no such row.
        began: Its pipeline, its parent and the stage of that which runs it, by its own row.
        rows: For each append: how many events are before it, its checksum, its body.

    Raises:
        LedgerCorrupt: They are not the rows that were written.
    """
    events: list[AnyEvent] = []
    for first, expected, body in rows:
        if first != len(events):
            raise _corrupt(saga_id, len(events), f"the next row begins at event {first}")
        if checksum(saga_id, first, body) != expected:
            raise _corrupt(saga_id, first, "the row's checksum says that it was changed")
        try:
            events += [event_from_json(line) for line in body.split(b"\n")]
        except _UNREADABLE as error:
            raise LedgerCorrupt(
                f"saga {saga_id} can't be read at event {len(events)}: that is no event of this version of saga: {_why(error)}. "
                "Nothing was changed. If a newer version wrote it, go on with that one; else restore the ledger from a backup, or see to "
                "what this saga did by hand."
            ) from error
    if version != len(events) and (events or version is not None):
        raise _corrupt(saga_id, len(events), f"there are {len(events)} events, and the saga's row says {version}")
    for started in events[:1]:
        # Its row has no checksum; who goes by it would take a child for a saga of its own, or pass it by.
        said = [getattr(started, name, None) for name in ("pipeline", "parent", "parent_stage")]
        if said != [*began]:
            raise _corrupt(saga_id, 0, f"it began with pipeline, parent and stage {said}, and the saga's row says {[*began]}")
    return tuple(events)


_UNREADABLE: Final = (ValueError, TypeError, LookupError, PolicyInvalid)
"""What reading an event may raise: a `ValidationError`, which is a ValueError, and whatever else comes of a damaged value."""


def _why(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    first = error.errors(include_url=False)[0]
    # Behind the kind of the event comes its field.
    return ": ".join([*map(str, first["loc"][1:2]), first["msg"]])


def entries_in(rows: Iterable[Sequence[Any]], when: Callable[[Any], datetime | None]) -> tuple[Entry, ...]:
    """Read what is known of sagas out of their rows.

    Args:
        rows: Of each what an `Entry` holds, in its order; the first two times in ISO 8601.
        when: Reads the last one.

    Raises:
        SagasDamaged: Of some rows no sense can be made.
    """
    entries: list[Entry] = []
    damaged: dict[str, LedgerCorrupt] = {}
    for saga_id, pipeline, status, started_at, updated_at, parent, parent_stage, owner, until in rows:
        try:
            _refuse_no_texts(saga_id, pipeline, *(name for name in (parent, parent_stage, owner) if name is not None))
            began, changed = datetime.fromisoformat(started_at), datetime.fromisoformat(updated_at)
            entries.append(Entry(saga_id, pipeline, SagaStatus(status), began, changed, parent, parent_stage, owner, when(until)))
        except (TypeError, ValueError, OverflowError) as error:
            its_id = quoted(str(saga_id))
            damaged[str(saga_id)] = LedgerCorrupt(
                f"the ledger is damaged: where saga {saga_id} stands can't be read: {error}. Nothing was changed. Look what its events say "
                f"(saga show {its_id}) and go on with it by its id (saga resume {its_id}), or restore the ledger from a backup."
            )
    if damaged:
        raise SagasDamaged(damaged, entries)
    return tuple(entries)


def _refuse_no_texts(*found: object) -> None:
    for one in found:
        if not isinstance(one, str):
            raise TypeError(f"expected a text, got {one!r}")


def others(statuses: Collection[SagaStatus]) -> list[str]:
    """All statuses but these, as they are written.

    To ask for sagas that stand in none of these, rather than for those in the wanted ones, also finds those whose status was damaged.
    """
    return sorted({status.value for status in SagaStatus} - {status.value for status in statuses})


def _corrupt(saga_id: str, position: int, why: str) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"the ledger is damaged: saga {saga_id} can't be read at event {position}: {why}. Nothing was changed. "
        "Restore the ledger from a backup, or see to what this saga did by hand."
    )
