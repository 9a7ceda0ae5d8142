"""A pipeline, read and checked once: its graph, and what each stage offers.

Everything that can be known to be wrong is refused here, before anything runs.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import partial
from itertools import dropwhile
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from pydantic import BaseModel
from stageflow.api import Pipeline, StageOutput

from saga.compensable import CompensableStage, PivotStage, SagaStage, wrapped
from saga.errors import MisuseError, PipelineInvalid, PolicyInvalid
from saga.graph import Graph, Node, Role
from saga.models import restored, warn_of_misfit
from saga.policies import Compensation, ContinueWithFallback, FailFast, Retry, declared
from saga.quick import frozen
from saga.text import did_you_mean, glimpse, shown, written

if TYPE_CHECKING:
    from stageflow.pipeline.pipeline import UnifiedStageSpec

    from saga.record import StageRecord

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
class StagePlan:
    """What one stage offers.

    Attributes:
        spec: stageflow's.
        make: Gives the object that runs and compensates it; called once a saga.
        retry: Its own, or None.
        timeout: Seconds, its own, or None.
        compensation: Its own, or None.
        output_model: What its output's data is made of again when it comes from a durable ledger; None: plain data,
            which is also what stays of data that does not fit.
        patient: It bounds itself: it is never given up, however long it takes to end after a cancel.
        has_effect: What it says of its effect, or None.
        nested_pipeline: The one that it runs as a saga, as `nested` does; None: it runs none, or takes care of that itself.
    """

    spec: UnifiedStageSpec
    make: Callable[[], Hooks]
    retry: Retry | None
    timeout: float | None
    compensation: Compensation | None
    output_model: Any
    patient: bool
    has_effect: bool | None
    nested_pipeline: Pipeline | None

    def undone_under(self, default: Compensation) -> Compensation:
        """How it is undone and asked: as it says for itself, and else as the policy does."""
        own = self.compensation
        if own is None:
            return default
        return BaseModel.model_copy(default, update={key: getattr(own, key) for key in own.model_fields_set})

    def warn_of_misfit(self, output: StageOutput) -> None:
        """Say in the log that an output does not fit the stage's `output_model`: nothing else shows it before a saga is resumed."""
        if self.output_model is not None:
            warn_of_misfit(self.spec.name, self.output_model, output.data)

    def restored(self, data: Any) -> Any:
        """Data that comes from a durable ledger, made what the stage, or each one of the saga that it runs, declares it to be."""
        if self.output_model is not None:
            return restored(self.spec.name, self.output_model, data)
        if self.nested_pipeline is not None and isinstance(data, dict) and isinstance(within := data.get("outputs"), dict):
            return data | {"outputs": Blueprint.of(self.nested_pipeline).restored(within)}
        return data


@frozen
class Blueprint:
    """A checked pipeline.

    Attributes:
        name: The pipeline's.
        graph: Its stages and what each offers, in topological order.
        stages: What the graph can't hold, in topological order.
        specs: The pipeline's own specs, by which a later change is noticed.
        said: What the class, object or function of each said of itself, in the order of the specs and of `DECLARABLE`; as above.
        without_timeouts: What turns stageflow's own timeouts off, in its context's data.
    """

    name: str
    graph: Graph
    stages: dict[str, StagePlan]
    specs: tuple[UnifiedStageSpec, ...]
    said: list[Any]
    without_timeouts: dict[str, int]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Blueprint:
        """Read a pipeline, or remember what was read of it as long as its stages are the same, and say the same of themselves.

        Raises:
            PipelineInvalid: It, or one of its stages, can't be run as a saga; the error names the stage.
        """
        if not isinstance(pipeline, Pipeline):
            raise PipelineInvalid("a stageflow Pipeline", got=repr(pipeline))
        key, specs = id(pipeline), tuple(pipeline.stages.values())
        runners = [spec.runner for spec in specs]
        runners += [runner.func for runner in runners if isinstance(runner, partial)]
        known, said = _KNOWN.get(key), [getattr(runner, part, None) for runner in runners for part in DECLARABLE]
        # A stage may equal the one in whose place it was put, as that of a dataclass, and is another one.
        if known is not None and [*map(id, known[1].specs)] == [*map(id, specs)] and known[1].said == said:
            return known[1]
        blueprint = cls._read(pipeline, specs, said)
        if len(_KNOWN) >= _MOST_KNOWN:
            # A pipeline that a stage of its own refers to is kept alive by what was read of it.
            _KNOWN.pop(next(iter(_KNOWN)), None)  # its pipeline may be gone just now
        remembered = _KNOWN  # as Python ends, the names of a module may be gone before the pipeline is
        _KNOWN[key] = (weakref.ref(pipeline, lambda _: remembered.pop(key, None)), blueprint)
        return blueprint

    @classmethod
    def _read(cls, pipeline: Pipeline, specs: tuple[UnifiedStageSpec, ...], said: list[Any]) -> Blueprint:
        read = {name: _read_stage(name, spec) for name, spec in pipeline.stages.items()}
        for name, spec in pipeline.stages.items():
            _refuse_str(name, spec.dependencies, pipeline.stages)
        graph = Graph.of(node for node, _ in read.values())
        return cls(
            name=pipeline.name,
            graph=graph,
            stages={name: read[name][1] for name in graph.names},
            specs=specs,
            said=said,
            without_timeouts={"_timeout_ms": 0} | {f"_timeout.{name}": 0 for name in graph.names},
        )

    def restored(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """The data of several stages that comes from a durable ledger, made what they declare it to be."""
        return {name: self.stages[name].restored(data) if name in self.stages else data for name, data in outputs.items()}

    def restore_outputs(self, records: Mapping[str, StageRecord]) -> None:
        """Make outputs that come from a durable ledger what their stages declare them to be.

        One that does not fit its stage's `output_model` stays plain data, and the log says why. It is no reason to refuse
        the saga: what was recorded stays as it is, and nobody could ever go on with it.
        """
        for name, plan in self.stages.items():
            record = records[name]
            for part in ("output", "late_output"):
                output: StageOutput | None = getattr(record, part)
                if output is not None and (record.landed or record.fell_back):
                    setattr(record, part, replace(output, data=plan.restored(output.data)))

    def check_policy(self, policy: FailFast | ContinueWithFallback) -> None:
        """Refuse a policy that speaks of stages that aren't there.

        Raises:
            PolicyInvalid: It does.
        """
        refuse_no_policy(policy)
        for name in policy.fallbacks if isinstance(policy, ContinueWithFallback) else ():
            if name not in self.stages:
                raise PolicyInvalid(
                    f"fallbacks for stages of pipeline {self.name!r} ({', '.join(self.stages)})",
                    got=repr(name),
                    hint=did_you_mean(name, self.stages),
                )


def by_name(pipelines: object) -> dict[str, Pipeline]:
    """The pipelines under the names by which sagas are to find them.

    Args:
        pipelines: One, or those that are given, found by their names; as a mapping, by its keys.

    Raises:
        MisuseError: One is no pipeline, or two that differ have one name: what either is for can't be known.
    """
    if isinstance(pipelines, Pipeline):
        pipelines = (pipelines,)
    if isinstance(pipelines, str) or not isinstance(pipelines, Iterable):
        raise MisuseError("the pipelines that the sagas were started with", got=shown(pipelines))
    named = pipelines.items() if isinstance(pipelines, Mapping) else [(getattr(each, "name", ""), each) for each in pipelines]
    found: dict[str, Pipeline] = {}
    for name, pipeline in named:
        if not isinstance(pipeline, Pipeline):
            raise PipelineInvalid("a stageflow Pipeline", got=shown(pipeline))
        if found.setdefault(name, pipeline) is not pipeline:
            hint = "Give those that differ in calls of their own."
            raise MisuseError("one pipeline of each name", got=f"several named {name!r}", hint=hint)
    return found


def refuse_no_policy(policy: object) -> None:
    """Refuse what is no policy; None stands for one elsewhere.

    Raises:
        PolicyInvalid: It is none.
    """
    if policy is not None and not isinstance(policy, FailFast | ContinueWithFallback):
        hint = f"Write {policy.__name__}()." if isinstance(policy, type) and issubclass(policy, FailFast | ContinueWithFallback) else ""
        raise PolicyInvalid("a FailFast or a ContinueWithFallback policy", got=repr(policy), hint=hint)


def _refuse_ambiguous(name: str) -> None:
    if _AMBIGUOUS.search(name) or written(name) != name:
        raise PipelineInvalid(
            "a stage name in UTF-8 without '/' that doesn't end in ~ or # and a number",
            got=repr(written(name)),
            hint="Idempotency keys and paths are made of names, and two stages would share one.",
        )


def _refuse_str(name: str, dependencies: Sequence[str], stages: Mapping[str, object]) -> None:
    """Refuse a str in the place of a tuple; stageflow makes one of it, so ("seat") comes here as ('s', 'e', 'a', 't')."""
    word = "".join(dependencies)
    is_taken_apart = len(dependencies) > 1 and len(word) == len(dependencies) and not stages.keys() >= set(dependencies)
    if isinstance(dependencies, str) or is_taken_apart:
        hint = f"Write ({word!r},)." if word in stages else ""
        raise PipelineInvalid("dependencies to be a tuple of names", got=f"the str {word!r}", stage=name, hint=hint)


def _read_stage(name: str, spec: UnifiedStageSpec) -> tuple[Node, StagePlan]:
    _refuse_ambiguous(name)
    runner: Any = spec.runner
    config = spec.config
    make: Callable[[], Hooks]
    if isinstance(runner, type):
        make = (lambda: runner(**config)) if config else runner
        _refuse_abstract(name, runner)
    elif hasattr(runner, "execute"):
        make = lambda: runner  # noqa: E731 - a one-line sibling of the branch above
    else:
        called: Any = _Callable(runner)
        make = lambda: called  # noqa: E731 - as above
    sample = _instance(name, make)
    _refuse_shadowed(name, sample)
    if not callable(getattr(sample, "execute", None)):
        hint = "A pipeline becomes a stage by nested(pipeline)." if isinstance(runner, Pipeline) else ""
        raise PipelineInvalid("a stage with an async execute", got=glimpse(runner), stage=name, hint=hint)
    offered = {hook: function for hook in _HOOKS if (function := getattr(sample, hook, None)) is not None}
    for hook, function in offered.items():
        _refuse_sync(name, hook, function)
        _refuse_signature(name, hook, function, _HOOKS[hook])
    can_compensate = "compensate" in offered
    is_pivot = isinstance(sample, PivotStage)
    if is_pivot and can_compensate:
        raise PipelineInvalid("a pivot without compensate(): it is the point of no return", got="one with it", stage=name)
    role = Role.PIVOT if is_pivot else Role.COMPENSABLE if can_compensate else Role.PLAIN
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
    plan = StagePlan(
        spec=spec,
        make=make,
        retry=_declared(name, sample, "retry", Retry),
        timeout=_declared_seconds(name, sample),
        compensation=_declared_compensation(name, sample),
        output_model=_declared_model(name, sample),
        patient=bool(getattr(sample, "bounds_itself", False)),
        has_effect=_declared(name, sample, "has_effect", bool),
        nested_pipeline=getattr(sample, "nested_pipeline", None),
    )
    return node, plan


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
_MOST_KNOWN: Final = 1000
_KNOWN: Final[dict[int, tuple[weakref.ref[Pipeline], Blueprint]]] = {}
"""What was read of the pipelines that are alive, by identity: a pipeline has no hash."""
