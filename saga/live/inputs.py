"""What a saga is run on: stageflow's context, and what of it is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields as fields_of
from operator import attrgetter
from typing import Any, Final

from stageflow.api import PipelineContext
from stageflow.context import (
    ContextSnapshot,
    Conversation,
    DocumentEnrichment,
    Enrichments,
    MemoryEnrichment,
    Message,
    ProfileEnrichment,
    RoutingDecision,
    RunIdentity,
)

from saga.errors import MisuseError
from saga.outputs import copied
from saga.policies import ContinueWithFallback
from saga.quick import maker
from saga.text import did_you_mean, shown

_run_identity: Final = maker(RunIdentity)
_context_snapshot: Final = maker(ContextSnapshot)
_pipeline_context: Final = maker(PipelineContext)
_TIMEOUT: Final = "_timeout_ms"
"""Under which stageflow's interceptor looks for a stage's timeout in the context's data."""
_RECORDED: Final = (
    "pipeline_run_id",
    "request_id",
    "session_id",
    "user_id",
    "org_id",
    "interaction_id",
    "topology",
    "configuration",
    "execution_mode",
    "input_text",
    "input_audio_duration_ms",
    "conversation",
    "enrichments",
    "extensions",
    "metadata",
    "created_at",
    "service",
    "data",
)
"""What of stageflow's context is recorded, so that a saga can go on without its caller."""
_values_recorded: Final = attrgetter(*_RECORDED)
_HANDED_ON: Final = frozenset(_RECORDED) - {"created_at"}
"""What stageflow's `create` only hands on to the constructor, or copies where it is a dict, which `with_dicts` has done."""
_BUNDLES: Final[Mapping[str, Any]] = {
    "conversation": Conversation,
    "messages": Message,
    "routing_decision": RoutingDecision,
    "enrichments": Enrichments,
    "profile": ProfileEnrichment,
    "memory": MemoryEnrichment,
    "documents": DocumentEnrichment,
}
"""What of it is recorded as dicts of its fields, and made of them again."""
_DICTS: Final = ("configuration", "metadata", "data")
"""What is empty where nothing was given."""
_WIDE_EVENTS: Final = ("emit_stage_wide_events", "emit_pipeline_wide_event", "wide_event_emitter")
"""With which `Pipeline.run` is asked for stageflow's wide events."""
_OPTIONS: Final = frozenset({"guard_retry_strategy", "interceptors", *_WIDE_EVENTS})
"""What `Pipeline.run` takes beside the fields of its context, and a saga does not."""
_ELSEWHERE: Final = {
    "A policy is given to SagaCoordinator(...).": frozenset(ContinueWithFallback.model_fields),
    "It is given to SagaCoordinator(...).": frozenset({"ledger", "listeners"}),
    "The id of a saga that a stage runs is made of the stage's.": frozenset({"saga_id"}),
}
"""Where to give what is taken for a field of the context."""


def context_of(name: str, context: PipelineContext | None, fields: dict[str, Any]) -> PipelineContext:
    """The context that a pipeline of that name is run with: the caller's, or one of these fields.

    Raises:
        MisuseError: Both are given, or what a saga can't be run with.
    """
    if not _OPTIONS.isdisjoint(fields):
        raise _no_option(fields)
    if context is None:
        try:
            create = _pipeline_context if _HANDED_ON.issuperset(fields) else PipelineContext.create
            return create(**{"topology": name} | with_dicts(fields))
        except TypeError as error:
            raise no_such_field(error, fields) from None
    refuse_both(context, fields)
    return context


def _no_option(fields: dict[str, Any]) -> MisuseError:
    """What to say of what `Pipeline.run` takes beside the fields of its context, and a saga does not."""
    if "guard_retry_strategy" in fields:
        hint = "It repeats stages behind the saga's back: effects would land twice and be undone once. Give the stage a Retry."
        return MisuseError("no guard_retry_strategy", got=repr(fields["guard_retry_strategy"]), hint=hint)
    if "interceptors" in fields:
        return MisuseError("interceptors at SagaCoordinator(..., interceptors=)", got="interceptors at run()")
    option = next(option for option in _WIDE_EVENTS if option in fields)
    hint = "The coordinator's listeners are told of all that happens: SagaCoordinator(listeners=[SinkListener()])."
    return MisuseError("none of stageflow's wide events", got=f"{option}={shown(fields[option])}", hint=hint)


def no_such_field(error: TypeError, fields: dict[str, Any]) -> MisuseError:
    """What to say of fields of which stageflow's context lacks one."""
    known = inspect.signature(PipelineContext.create).parameters
    place = next((place for place, names in _ELSEWHERE.items() if not names.isdisjoint(fields)), "")
    near = filter(None, (did_you_mean(name, known) for name in fields if name not in known))
    hint = place or next(near, "What it has no field for is given in metadata={...}.")
    # Python guesses, too, from 3.14 on.
    got = str(error).rpartition(") got ")[2].partition(". Did you mean")[0]
    return MisuseError("fields of stageflow's PipelineContext", got=got, hint=hint)


def with_dicts(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of the context, with a dict where it has one; None is an empty one. stageflow copies what it gets, or only takes it.

    Raises:
        MisuseError: One can't be a dict.
    """
    given = fields.copy()
    for name in _DICTS:
        if name in fields:
            value = {} if fields[name] is None else fields[name]
            if not isinstance(value, Mapping):
                raise _no_dict(name, value)
            given[name] = dict(value)
    return given


def _no_dict(name: str, value: object) -> MisuseError:
    hint = "A text is given as input_text=." if isinstance(value, str) else ""
    return MisuseError(f"{name}={{...}}", got=shown(value), hint=hint)


def refuse_both(context: PipelineContext | None, fields: dict[str, Any]) -> None:
    """Refuse a context that comes with fields.

    Raises:
        MisuseError: Both are given.
    """
    if context is not None and fields:
        raise MisuseError("either a context or its fields", got=f"both, the fields being {', '.join(fields)}")


def refuse_unfit(context: PipelineContext) -> None:
    """Refuse what no saga can be run on.

    Raises:
        MisuseError: It is no context; or it has what is no dict where there is to be one; or it sets stageflow's own timeout, which is off
            in a saga.
    """
    if not isinstance(context, PipelineContext):
        raise MisuseError("a PipelineContext", got=shown(context), hint="A text is given as input_text=, anything else in metadata={...}.")
    for name in _DICTS:
        # No copy with dicts is made instead: whoever has this context may cancel the saga by it.
        if not isinstance(value := getattr(context, name), dict):
            raise _no_dict(name, value)
    if context.data.get(_TIMEOUT):
        hint = "It is in seconds: FailFast(timeout=...) is for all stages, and each may have a timeout of its own."
        raise MisuseError("a timeout in the policy", got=f"{shown(context.data[_TIMEOUT])} as {_TIMEOUT} in the context's data", hint=hint)


def snapshot_of(context: PipelineContext) -> ContextSnapshot[Any]:
    """What stageflow's `to_snapshot` gives, in a quarter of the time."""
    if type(context) is not PipelineContext:
        return context.to_snapshot()  # somebody's own
    created_at = context.created_at
    return _context_snapshot(
        run_id=_run_identity(
            pipeline_run_id=context.pipeline_run_id,
            request_id=context.request_id,
            session_id=context.session_id,
            user_id=context.user_id,
            org_id=context.org_id,
            interaction_id=context.interaction_id,
            created_at=created_at,
        ),
        enrichments=context.enrichments,
        conversation=context.conversation,
        extensions=context.extensions,
        input_text=context.input_text,
        input_audio_duration_ms=context.input_audio_duration_ms,
        topology=context.topology,
        execution_mode=context.execution_mode,
        created_at=created_at,
        metadata=context.metadata.copy(),
    )


def recorded_input(context: PipelineContext) -> dict[str, Any]:
    """The fields of a context that a ledger keeps."""
    recorded = {}
    for name, value in zip(_RECORDED, _values_recorded(context), strict=True):
        if value or (value is not None and name not in _DICTS):
            recorded[name] = copied(_written(name, value) if name in _BUNDLES else value)
    return recorded


def _written(name: str, value: Any) -> Any:
    # Not by its to_dict: that, and what reads it, fails on a field that is not of the type that it says, which nothing has checked.
    kind = _BUNDLES.get(name)
    if kind is None:
        return value
    if type(value) in {list, tuple}:
        return type(value)([_written(name, item) for item in value])
    return {part.name: _written(part.name, getattr(value, part.name)) for part in fields_of(kind)} if isinstance(value, kind) else value


def context_from(recorded: Any) -> PipelineContext:
    """A context with the fields that a ledger has kept of one."""
    # In the place of the whole, or of a dict in it, redact may have left a text, and fields of its own; stageflow takes none, and nobody
    # could ever go on with the saga.
    given = recorded if isinstance(recorded, Mapping) else {}
    kept = {name: given[name] for name in _RECORDED if name in given}
    return PipelineContext.create(
        **{name: _made(name, value) for name, value in kept.items() if name not in _DICTS or isinstance(value, Mapping)}
    )


def _made(name: str, plain: Any) -> Any:
    kind = _BUNDLES.get(name)
    if kind is None:
        return plain
    if type(plain) in {list, tuple}:
        return type(plain)([_made(name, item) for item in plain])
    try:
        return kind(**{part: _made(part, value) for part, value in plain.items()})
    except (AttributeError, TypeError):
        return plain  # it was none, or redact has left none: no reason to refuse the saga, with which nobody could ever go on
