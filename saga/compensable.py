"""What users write: stages that can be undone, and the contexts that their code receives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, overload

from stageflow.api import StageContext, StageKind, StageOutput

from saga.errors import PipelineInvalid
from saga.failures import Failure
from saga.outputs import copied
from saga.policies import Compensation, Policy, Retry, declared
from saga.quick import frozen
from saga.text import shown

if TYPE_CHECKING:
    from stageflow.api import Pipeline, PipelineContext
    from stageflow.context import ContextSnapshot

    from saga.report import SagaReport

T = TypeVar("T")

Returned = StageOutput | dict[str, Any] | None
"""What a stage may return."""


class Host(Protocol):
    """What a running saga offers to the code of an attempt of one of its stages."""

    def record_effect(self, effect: Any) -> Coroutine[Any, Any, None]:
        """Write one partial effect to the ledger, when it is awaited."""
        ...

    async def run_child(
        self, pipeline: Pipeline, context: PipelineContext | None, policy: Policy | None, fields: dict[str, Any]
    ) -> SagaReport:
        """Run a pipeline as a saga of its own, in the same ledger."""
        ...

    async def resume_child(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Go on with a child saga that has not come to its end."""
        ...

    async def child_reports(self) -> list[SagaReport]:
        """The children that this execution of the stage has run, oldest first."""
        ...


class UndoHost(Protocol):
    """What it offers to the compensations and probes of all its stages."""

    async def undo_child(self, stage: str, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo what is left of a child saga."""
        ...

    async def rest_child(self, stage: str, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """See to it that a child saga whose process is gone comes to rest, unless this saga runs on and sees to it itself."""
        ...

    async def child_reports(self, stage: str) -> list[SagaReport]:
        """The children that this execution of the stage has run, oldest first."""
        ...


@frozen
class SagaContext(StageContext):
    """stageflow's `StageContext`, and what a stage of a saga needs beside it.

    Attributes:
        saga_id: The saga's id.
        attempt: 1 for the first attempt of this execution.
        idempotency_key: The same for every attempt of one execution, also after a crash and when a saga that failed is resumed;
            another one when the stage runs again after it, or something that it depends on, was undone. Hand it to whoever carries out the
            effect, so that a repeated request is recognised.
    """

    if TYPE_CHECKING:
        snapshot: ContextSnapshot[Any]  # stageflow says no more than ContextSnapshot, which pyright in strict mode complains of
    saga_id: str
    attempt: int
    idempotency_key: str
    _host: Host

    def record(self, effect: Any) -> Coroutine[Any, Any, None]:
        """Note a partial effect in the ledger before the stage goes on: `await ctx.record(effect)`.

        When the stage then fails, its compensation gets what was recorded, oldest first, as `ctx.effects`. What was recorded without
        `await` is noted when the attempt has ended, with a RuntimeWarning: a process that dies before knows nothing of it.

        Raises:
            MisuseError: The stage has no compensation, or its fallback records, so nothing would ever undo the effect; or the attempt was
                given up, or has ended.
            NotStorable: A durable ledger can't keep it. The stage's compensation gets a text in its place.
        """
        # As it is now: when it is awaited, in a task say, the stage may have put its next effect into the same dict.
        return self._host.record_effect(copied(effect))

    async def run_saga(
        self, pipeline: Pipeline, context: PipelineContext | None = None, *, policy: Policy | None = None, **context_fields: Any
    ) -> SagaReport:
        """Run a pipeline as a child saga, one or several in an attempt; `nested` wraps this in a stage that also undoes it.

        What an earlier attempt has run stands beside it: that is in `child_sagas`, to go on with by `resume_saga`.

        Returns:
            The child's report, whatever became of it: a child that failed does not fail the stage by itself.

        Raises:
            MisuseError: The child can't work; nothing was run.
        """
        return await self._host.run_child(pipeline, context, policy, context_fields)

    async def resume_saga(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Go on with a child saga of an earlier attempt; of one that has completed, just its report.

        Raises:
            MisuseError: There is no such saga, this one does not run it, or its pipeline is not the one that it was started with.
        """
        return await self._host.resume_child(saga_id, pipeline)

    async def child_sagas(self) -> list[SagaReport]:
        """The reports of the child sagas that this execution has run, oldest first."""
        return await self._host.child_reports()


class Inputs(dict[str, StageOutput]):
    """The outputs of a stage's direct dependencies, by stage."""

    def get_from(self, stage: str, key: str, default: Any = None) -> Any:
        """One value of what a direct dependency gave, as `execute` gets it.

        Raises:
            KeyError: The stage is none.
        """
        return self[stage].data.get(key, default)

    def require_from(self, stage: str, key: str) -> Any:
        """One value that a direct dependency has to have given.

        Raises:
            KeyError: The stage is none, or gave no such value.
        """
        data = self[stage].data
        if key not in data:
            raise KeyError(f"expected a key of what {stage} gave ({', '.join(map(str, data)) or 'none'}), got {key!r}")
        return data[key]

    def get_output(self, stage: str) -> StageOutput:
        """All that a direct dependency gave.

        Raises:
            KeyError: The stage is none.
        """
        return self[stage]

    def has_output(self, stage: str) -> bool:
        """True, as every direct dependency of a stage that ran has given one.

        Raises:
            KeyError: The stage is none.
        """
        return bool(self[stage])

    @property
    def prior_outputs(self) -> Inputs:
        """All of them."""
        return self

    @overload
    def get(self, stage: str, default: None = None) -> StageOutput | None: ...
    @overload
    def get(self, stage: str, default: T) -> StageOutput | T: ...
    def get(self, stage: str, default: Any = None) -> Any:
        """The output of a direct dependency, as that of a dict.

        Raises:
            KeyError: It is no stage, but the key of a value that one gave, by which `execute` would get that value.
        """
        if stage in self:
            return self[stage]
        for name, output in self.items():
            if stage in output.data:
                hint = f"get_from({name!r}, {stage!r})"
                raise KeyError(f"expected a stage that this one depends on ({', '.join(self)}), got a key of what {name} gave: {hint}")
        return default

    def __missing__(self, stage: str) -> NoReturn:
        """Say what there is instead."""
        raise KeyError(f"expected a stage that this one depends on ({', '.join(self) or 'none'}), got {stage!r}")


@frozen
class CompensationContext:
    """What a compensation or a probe gets to know.

    Attributes:
        saga_id: The saga's id.
        stage_name: The stage to undo.
        output: What the stage gave when it completed; None if it never did.
        effects: What the stage recorded with `ctx.record`, oldest first.
        in_doubt: Whether nobody knows if the effect landed.
        cause: What stopped the saga; None if nothing did: a completed one is undone on demand, or a skipped branch is cleared away.
        attempt: Of this compensation; 1 for the first.
        idempotency_key: This compensation's own, the same for all its attempts; another one when the effect came late, after its undoing.
        forward_key: The `idempotency_key` that the execution had: the outside world knows the effect by it.
        inputs: Outputs of the direct dependencies, by stage; `get_from`, `require_from` and `get_output` as in `execute`.
        snapshot: stageflow's immutable view of the run's input.
    """

    saga_id: str
    stage_name: str
    output: StageOutput | None
    effects: tuple[Any, ...]
    in_doubt: bool
    cause: Failure | None
    attempt: int
    idempotency_key: str
    forward_key: str
    inputs: Inputs
    snapshot: ContextSnapshot[Any]
    _host: UndoHost

    async def undo_saga(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo what a child saga left standing; does nothing when nothing is.

        One that the stage had left running is stopped, as its parent's stop stops it, and waited for.

        Returns:
            The child's report. Unless it is clean and not past its pivot, something of the child stands, and this compensation counts as
            failed, whatever it returns.

        Raises:
            MisuseError: There is no such saga, this one does not run it, or its pipeline is not the one that it was started with.
        """
        return await self._host.undo_child(self.stage_name, saga_id, pipeline)

    async def rest_saga(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """For a probe: let a child saga whose process is gone come to rest, as one does whose parent stops.

        One that the stage had left running when it was given up is waited for. Else does nothing while the parent runs on: then its stage
        goes on with the child.
        """
        return await self._host.rest_child(self.stage_name, saga_id, pipeline)

    async def child_sagas(self) -> list[SagaReport]:
        """The reports of the child sagas that this execution has run, oldest first; without its fallback's while what used that is kept."""
        return await self._host.child_reports(self.stage_name)


if TYPE_CHECKING:
    # stageflow's Stage protocol promises execute() a bare StageContext, so no class whose execute takes more would fit
    # `Pipeline.with_stage`; with a base that is unknown to the type checker, ours do.
    _Stage = Any
else:

    class _Stage: ...


class SagaStage(_Stage, ABC):  # type: ignore[misc] # see _Stage
    """What a stage may declare about itself in a saga; plain stageflow stages may, too.

    Attributes:
        name: For the reader; the pipeline's name for the stage is the one that counts.
        kind: stageflow's category.
        retry: How often it is attempted; None: as the policy says.
        timeout: Seconds for one attempt; None: as the policy says.
        idempotent: It may run again with the same idempotency key and has its effect once all the same; so it is run again when its process
            died, or when it is in doubt and the saga is resumed. If it then returns FAIL or CANCEL, it has had no effect; if it raises,
            it stays in doubt.
        output_model: A pydantic model or a dataclass with a field for each key of the output's data: what comes back from a durable
            ledger is made of it again. None: it comes back as plain data.
        has_effect: Of a stage that is neither compensable nor a pivot: False says that it changes nothing outside the process, True that
            it does and that nobody can undo it; None says nothing. `saga.lint` reads it, a run doesn't.
    """

    name: str = ""
    kind: StageKind = StageKind.WORK
    retry: Retry | None = None
    timeout: float | None = None
    idempotent: bool = False
    output_model: Any = None
    has_effect: bool | None = None

    @abstractmethod
    async def execute(self, ctx: SagaContext) -> Returned:
        """Do the work; its effect counts as landed once this has returned."""


class CompensableStage(SagaStage):
    """A stage whose effect can be undone.

    It may also define `async probe(ctx: CompensationContext) -> StageOutput | None`, which asks the outside world whether
    the effect landed (the output if it did, None if it did not; raising means: still unknown), and
    `async fallback(ctx: SagaContext, failure: Failure)`, whose result replaces the output under
    `ContinueWithFallback`.

    Attributes:
        compensation: This stage's own retry and timeout for undoing; where it says nothing of one of them: as the policy says. What is said
            there of all compensations, as `on_failure`, is the policy's to say.
        compensate_in_doubt: The compensation copes with not knowing whether there is anything to undo.
    """

    compensation: Compensation | None = None
    compensate_in_doubt: bool = False

    @abstractmethod
    async def compensate(self, ctx: CompensationContext) -> StageOutput | None:
        """Undo the effect. It may be called again with the same key, so it must bear repetition.

        It fails by raising, or by returning FAIL, RETRY, CANCEL, what is still to be awaited or a generator; whatever else it returns,
        False too, says that it is undone.
        """


class PivotStage(SagaStage):
    """The point of no return: once it has completed, it and all it depends on are never compensated.

    It may define a `probe`, and should: in doubt it holds all that it depends on, and the saga is stuck. It may define a `fallback`, too.
    """


class _Executes(Protocol):
    @property
    def execute(self) -> Callable[..., Awaitable[Returned]]: ...


Runner = Callable[[SagaContext], Awaitable[Returned]] | _Executes
"""What carries out a stage: an async callable, or an object with an `execute`."""
Compensate = Callable[[CompensationContext], Awaitable[StageOutput | None]]
Probe = Callable[[CompensationContext], Awaitable[StageOutput | None]]
Fallback = Callable[[SagaContext, Failure], Awaitable[Returned]]


class _Part:
    """What was given as a part, else what the runner says now: as of any other stage, it may be set later."""

    def __set_name__(self, _: type, name: str) -> None:
        self.name = name

    def __get__(self, stage: Any, kind: Any) -> Any:
        composed = kind if stage is None else stage
        given = composed.given.get(self.name)
        return declared(composed.runner, self.name) if given is None else given


class _Composed:
    """A stage made of parts: somebody's runner, and what is given beside it, which counts before what the runner says itself."""

    compensate = _Part()
    probe = _Part()
    fallback = _Part()
    retry = _Part()
    timeout = _Part()
    compensation = _Part()
    compensate_in_doubt = _Part()
    idempotent = _Part()
    output_model = _Part()
    bounds_itself = _Part()
    holds_pivot = _Part()
    nested_pipeline = _Part()

    def __init__(self, runner: Any, given: Mapping[str, Any]) -> None:
        self.runner = runner
        self.given = given
        self.kind = _kind(runner, given)

    @property
    def execute(self) -> Any:
        return getattr(self.runner, "execute", self.runner)


def wrapped(stage: Any) -> Any:
    """What `compensable` has wrapped in this stage, or else the stage itself."""
    kind = stage if isinstance(stage, type) else type(stage)
    return stage.runner if issubclass(kind, _Composed) else stage


def _kind(runner: Any, given: Mapping[str, Any]) -> Any:
    return given["kind"] or getattr(runner, "kind", None) or StageKind.WORK


def compensable(
    runner: Runner | type[Any],
    compensate: Compensate,
    *,
    probe: Probe | None = None,
    fallback: Fallback | None = None,
    retry: Retry | None = None,
    timeout: float | None = None,
    compensation: Compensation | None = None,
    compensate_in_doubt: bool | None = None,
    idempotent: bool | None = None,
    kind: StageKind | str | None = None,
) -> Any:
    """Make a stage of functions, or give a compensation to a stage that can't be edited.

    Args:
        runner: An async callable, a stage instance, or a stage class. A class gives a factory that takes the class's
            `config=`, and a new instance for every saga.
        compensate: Undoes the effect.
        probe: Asks whether the effect landed.
        fallback: Gives an output in place of the failed stage's.
        retry: How often it is attempted; None: what the runner says, else the policy.
        timeout: Seconds for one attempt; None: what the runner says, else the policy.
        compensation: Its own retry and timeout for undoing; where it says nothing of one of them: what the policy says.
        compensate_in_doubt: The compensation copes with not knowing; None: what the runner says.
        idempotent: It may run again with the same key and has its effect once all the same; None: what the runner says.
        kind: stageflow's category; None: the runner's, else WORK.

    Raises:
        PipelineInvalid: The runner is none of these, or a pivot, which nothing undoes; or what is given beside it can't be called.
    """
    given = {
        "compensate": compensate,
        "probe": probe,
        "fallback": fallback,
        "retry": retry,
        "timeout": timeout,
        "compensation": compensation,
        "compensate_in_doubt": compensate_in_doubt,
        "idempotent": idempotent,
        "kind": kind,
    }
    if not callable(given["compensate"]):
        hint = "What has none stays as it is: give the pipeline the runner itself."
        raise PipelineInvalid("an async callable that undoes it", got=shown(compensate), hint=hint)
    known = "An output that is known beforehand is the policy's: ContinueWithFallback(fallbacks={...})."
    for part, hint in (("probe", ""), ("fallback", known)):
        if given[part] is not None and not callable(given[part]):
            raise PipelineInvalid(f"an async callable as its {part}", got=shown(given[part]), hint=hint)
    if isinstance(runner, PivotStage) or (isinstance(runner, type) and issubclass(runner, PivotStage)):
        raise PipelineInvalid("a runner that can be undone", got=f"the pivot {runner!r}", hint="A pivot is the point of no return.")
    if isinstance(runner, type):
        made: Any = runner

        class Compensable(_Composed):
            def __init__(self, **config: Any) -> None:
                super().__init__(made(**config), given)

        Compensable.__name__ = Compensable.__qualname__ = f"compensable({runner.__name__})"
        Compensable.runner, Compensable.given = runner, given
        Compensable.kind = _kind(runner, given)  # stageflow reads it off the class
        return Compensable
    if not callable(getattr(runner, "execute", runner)):
        raise PipelineInvalid("a stage class, a stage instance or an async callable", got=repr(runner))
    return _Composed(runner, given)
