"""What each stage offers, read off it once; everything about it that can be known to be wrong is refused here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import is_dataclass
from functools import partial
from itertools import dropwhile
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from pydantic import BaseModel
from stageflow.api import Pipeline, StageOutput

from saga.compensable import CompensableStage, PivotStage, SagaStage, wrapped
from saga.errors import PipelineInvalid
from saga.graph import Node, Role
from saga.models import warn_of_misfit
from saga.policies import Compensation, Retry, declared
from saga.quick import frozen
from saga.text import glimpse, shown, written

if TYPE_CHECKING:
    from stageflow.pipeline.pipeline import UnifiedStageSpec

T = TypeVar("T")
_HOOKS: Final = {"execute": ("ctx",), "compensate": ("ctx",), "probe": ("ctx",), "fallback": ("ctx", "failure")}
"""What stages are called for, and with what."""
DECLARABLE: Final = (
    "retry",
    "timeout",
    "idempotent",
    "output_model",
    "has_effect",
    "compensation",
    "compensate_in_doubt",
    "compensate",
    "probe",
    "fallback",
)
"""What a saga reads of a stage besides its `execute`, without which it is refused."""


class Hooks(Protocol):
    """A stage as the saga calls it; only `execute` is always there."""

    execute: Callable[[Any], Awaitable[Any]]
    compensate: Callable[[Any], Awaitable[None]]
    probe: Callable[[Any], Awaitable[Any]]
    fallback: Callable[[Any, Any], Awaitable[Any]]


class _Callable:
    """An async callable as a stage, which says of itself what the callable does."""

    def __init__(self, execute: Callable[[Any], Any]) -> None:
        self.execute = execute

    def __getattr__(self, part: str) -> Any:
        return declared(self.execute, part)


@frozen
class StageOffer:
    """What one stage offers.

    Attributes:
        spec: stageflow's.
        make: Gives the object that runs and compensates it; called once a saga.
        retry: Its own, or None.
        timeout: Seconds, its own, or None.
        compensation: Its own, or None.
        output_model: What its output's data is made of again when it comes from a durable ledger; None: plain data,
            which is also what stays of data that does not fit.
        bounds_itself: It sees to its own limits, and is never given up, however long it takes to end after a cancel.
        has_effect: What it says of its effect, or None.
        nested_pipeline: The one that it runs as a saga, as `nested` does; None: it runs none, or takes care of that itself.
    """

    spec: UnifiedStageSpec
    make: Callable[[], Hooks]
    retry: Retry | None
    timeout: float | None
    compensation: Compensation | None
    output_model: Any
    bounds_itself: bool
    has_effect: bool | None
    nested_pipeline: Pipeline | None

    def undone_under(self, default: Compensation) -> Compensation:
        """How it is undone and asked: as it says for itself, and else as the policy does."""
        own = self.compensation
        if own is None:
            return default
        return BaseModel.model_copy(default, update={key: getattr(own, key) for key in own.model_fields_set})

    def warn_of_misfit(self, output: StageOutput) -> None:
        """Say in the log that an output does not fit the `output_model` of a stage that has one: nothing else shows it before a resume."""
        warn_of_misfit(self.spec.name, self.output_model, output.data)


def read_stage(name: str, spec: UnifiedStageSpec) -> tuple[Node, StageOffer]:
    """Read what a stage offers: for the graph, and what that can't hold.

    Raises:
        PipelineInvalid: It can't be run in a saga.
    """
    _refuse_ambiguous(name)
    make = _maker(name, spec.runner, spec.config)
    sample = _instance(name, make)
    _refuse_shadowed(name, sample)
    offered = _offered(name, sample, spec.runner)
    role = _role(name, sample, can_compensate="compensate" in offered)
    node = Node(
        name=name,
        dependencies=tuple(dict.fromkeys(spec.dependencies)),
        kind=str(getattr(spec.kind, "value", spec.kind)),
        role=role,
        conditional=spec.conditional,
        can_probe=role is not Role.PLAIN and "probe" in offered,
        undo_in_doubt=bool(_declared(name, sample, "compensate_in_doubt", bool)) and role is Role.COMPENSABLE,
        idempotent=bool(_declared(name, sample, "idempotent", bool)),
        holds_pivot=bool(getattr(sample, "holds_pivot", False)),
        has_fallback="fallback" in offered,
    )
    offer = StageOffer(
        spec=spec,
        make=make,
        retry=_declared(name, sample, "retry", Retry),
        timeout=_declared_seconds(name, sample),
        compensation=_declared_compensation(name, sample),
        output_model=_declared_model(name, sample),
        bounds_itself=bool(getattr(sample, "bounds_itself", False)),
        has_effect=_declared(name, sample, "has_effect", bool),
        nested_pipeline=getattr(sample, "nested_pipeline", None),
    )
    return node, offer


def _maker(name: str, runner: Any, config: dict[str, Any]) -> Callable[[], Hooks]:
    """What gives the object that runs and compensates a stage: a new one of a class, else always the same."""
    if isinstance(runner, type):
        _refuse_abstract(name, runner)
        return (lambda: runner(**config)) if config else runner
    stage: Any = runner if hasattr(runner, "execute") else _Callable(runner)
    return lambda: stage


def _offered(name: str, sample: object, runner: object) -> frozenset[str]:
    """What the stage can be called for, each of which is async and takes what it is called with."""
    if not callable(getattr(sample, "execute", None)):
        hint = "A pipeline becomes a stage by nested(pipeline)." if isinstance(runner, Pipeline) else ""
        raise PipelineInvalid("a stage with an async execute", got=glimpse(runner), stage=name, hint=hint)
    offered = {hook: function for hook in _HOOKS if (function := getattr(sample, hook, None)) is not None}
    for hook, function in offered.items():
        _refuse_sync(name, hook, function)
        _refuse_signature(name, hook, function, _HOOKS[hook])
    return frozenset(offered)


def _role(name: str, sample: object, *, can_compensate: bool) -> Role:
    is_pivot = isinstance(sample, PivotStage)
    if is_pivot and can_compensate:
        raise PipelineInvalid("a pivot without compensate(): it is the point of no return", got="one with it", stage=name)
    return Role.PIVOT if is_pivot else Role.COMPENSABLE if can_compensate else Role.PLAIN


def _refuse_ambiguous(name: str) -> None:
    if _AMBIGUOUS.search(name) or written(name) != name:
        raise PipelineInvalid(
            "a stage name in UTF-8 without '/' that doesn't end in ~ or # and a number",
            got=repr(written(name)),
            hint="Idempotency keys and paths are made of names, and two stages would share one.",
        )


def _instance(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:  # whatever the user's constructor raises
        raise PipelineInvalid(
            "a stage that can be built", got=f"{type(error).__name__}: {error}", stage=name, hint="Its class gets config= as keywords."
        ) from error


def _refuse_abstract(name: str, runner: type) -> None:
    missing = sorted(getattr(runner, "__abstractmethods__", ()))
    if missing:
        raise PipelineInvalid(
            f"{runner.__name__} to define {' and '.join(f'{method}()' for method in missing)}", got="a class without", stage=name
        )


def _refuse_shadowed(name: str, sample: object) -> None:
    """Refuse a mixin behind our own base class, whose defaults come first."""
    stage = type(wrapped(sample))
    if _BASES.issuperset(dropwhile(lambda base: base not in _OURS, stage.__mro__)):
        return  # there is none, as nearly always
    for part in DECLARABLE:
        first, *others = [base for base in stage.__mro__ if part in vars(base)] or [stage]
        if not others or first not in _OURS:
            continue
        mixin, default = others[0], vars(first)[part]
        # The object may have its own, as that of a dataclass.
        if getattr(sample, part, ...) is default and vars(mixin)[part] is not default:
            hint = f"Name {mixin.__name__} first among the bases of {stage.__name__}."
            raise PipelineInvalid(f"the {part} of {mixin.__name__} to count", got=f"the default of {first.__name__}", stage=name, hint=hint)


def _refuse_sync(name: str, hook: str, function: object) -> None:
    if not callable(function):
        raise PipelineInvalid(f"an async {hook}", got=shown(function), stage=name)
    if is_async(function):
        return
    name_of_it = getattr(function, "__qualname__", repr(function))
    if inspect.isasyncgenfunction(function):
        raise PipelineInvalid(f"an async {hook}", got=f"the async generator {name_of_it}", stage=name, hint="Return, and don't yield.")
    if isinstance(function, partial) and hasattr(function.func, "execute"):
        hint = "Give the pipeline the class, and its arguments as config={...}."
        raise PipelineInvalid(f"an async {hook}", got=f"{shown(function)}, which makes a stage", stage=name, hint=hint)
    hint = "Write async def, and take blocking work to a thread (asyncio.to_thread)."
    if is_async(inspect.unwrap(function)):
        hint = "It is async below its decorator: write async def, and await, there, too."
    raise PipelineInvalid(f"an async {hook}", got=f"the plain def {name_of_it}", stage=name, hint=hint)


def _refuse_signature(name: str, hook: str, function: Any, arguments: tuple[str, ...]) -> None:
    if _takes(function, len(arguments)):
        return
    try:
        own, signature = inspect.signature(function, follow_wrapped=False), inspect.signature(function)
    except (TypeError, ValueError):
        return  # there is none, or it says nothing of itself
    try:
        own.bind(*arguments)
        # What it wraps may need more, which the wrapper then gives it.
        signature.bind_partial(*arguments)
    except TypeError:
        raise PipelineInvalid(f"{hook} to be called with {' and '.join(arguments)}", got=f"{hook}{signature}", stage=name) from None


def _takes(function: Any, count: int) -> bool:
    """Whether its own code says that it takes so many arguments, whatever its signature does: that of a wrapper is what it has wrapped's.

    To have a signature made takes many times as long, too.
    """
    if type(function) is MethodType:
        function, count = function.__func__, count + 1
    if type(function) is not FunctionType:
        return False
    return bool(function.__code__.co_argcount == count and not function.__code__.co_kwonlyargcount)


def is_async(function: object) -> bool:
    """Whether to call it gives something to await."""
    code = getattr(function, "__code__", None)  # also of a method
    if type(code) is CodeType and code.co_flags & inspect.CO_COROUTINE:
        return True  # as nearly always, at a tenth of what inspect takes
    return any(map(inspect.iscoroutinefunction, _codes(function)))


def is_generator(function: object) -> bool:
    """Whether to call it runs nothing before somebody iterates over what it gives."""
    return any(inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code) for code in _codes(function))


def _codes(function: object) -> tuple[object, object]:
    return function, getattr(function, "__call__", None)  # noqa: B004 - asks for its code, not whether it is callable


def _declared(name: str, stage: object, attribute: str, kind: type[T]) -> T | None:
    value = getattr(stage, attribute, None)
    if value is None or isinstance(value, kind):
        return value
    raise PipelineInvalid(f"{attribute} to be a {kind.__name__} or None", got=repr(value), stage=name)


def _declared_seconds(name: str, stage: object) -> float | None:
    value = getattr(stage, "timeout", None)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")):
        return value
    raise PipelineInvalid("timeout to be None or more than 0 seconds", got=repr(value), stage=name)


def _declared_compensation(name: str, stage: object) -> Compensation | None:
    own = _declared(name, stage, "compensation", Compensation)
    # Of the whole way back only the policy decides.
    passed_over = [] if own is None else [key for key, value in _OF_ALL if getattr(own, key) != value]
    if passed_over:
        hint = "The rest is said of all stages, in the policy's: FailFast(compensation=Compensation(...))."
        raise PipelineInvalid("compensation to say its retry and timeout", got=", ".join(passed_over), stage=name, hint=hint)
    return own


def _declared_model(name: str, stage: object) -> Any:
    model = getattr(stage, "output_model", None)
    if model is None or (isinstance(model, type) and (issubclass(model, BaseModel) or is_dataclass(model))):
        return model
    raise PipelineInvalid("output_model to be a pydantic model, a dataclass or None", got=repr(model), stage=name)


_AMBIGUOUS: Final = re.compile(r"/|~\d+$|#\d+(\.\d+)?$")
_OURS: Final = frozenset({SagaStage, CompensableStage})
_BASES: Final = frozenset(CompensableStage.__mro__)
_OF_ALL: Final = [(key, value) for key, value in Compensation() if key not in {"retry", "timeout"}]
"""What a stage can't say for itself of how it is undone, and what it is by default."""
