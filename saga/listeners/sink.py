"""stageflow's event sink as a listener."""

from __future__ import annotations

from typing import Any, Final

from pydantic import TypeAdapter
from stageflow import EventSink
from stageflow.events import get_event_sink

from saga.events import AnyEvent, reads_only

_EVENT: Final[TypeAdapter[Any]] = TypeAdapter(AnyEvent)


@reads_only
class SinkListener:
    """Emits every event to an event sink of stageflow: `SagaCoordinator(..., listeners=[SinkListener()])`.

    Its type is `saga.stage_completed`, or `saga.ended` for an event of the saga itself; its data is the event as a ledger without
    `redact` stores it, as plain JSON values, and the `saga_id`.

    Args:
        sink: The sink; None: the one that `stageflow.events.set_event_sink` has set where the saga was run.
    """

    def __init__(self, sink: EventSink | None = None) -> None:
        self._sink = sink

    def __call__(self, saga_id: str, event: AnyEvent) -> None:
        """Emit the event, without waiting for the sink."""
        sink = self._sink if self._sink is not None else get_event_sink()
        sink.try_emit(type=sink_type(event), data=_EVENT.dump_python(event, mode="json") | {"saga_id": saga_id})


def sink_type(event: AnyEvent) -> str:
    """The type under which a sink is told of an event."""
    return f"saga.{event.event.removeprefix('saga_')}"
