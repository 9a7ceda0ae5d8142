"""What can be told of a saga's events: the log, stageflow's event sink, OpenTelemetry. Each is a listener that a coordinator is given."""

from collections.abc import Callable

from saga.events import AnyEvent

Listener = Callable[[str, AnyEvent], None]
"""Is told of every event, with the saga's id, when it is in the ledger. What it raises is logged and harms no saga.

It is told of the start of an attempt in the task that then runs the attempt, so what it sets in the context holds for that attempt.
"""
