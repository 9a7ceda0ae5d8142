"""What users write: stages that can be undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from stageflow.api import StageKind, StageOutput

from saga.contexts import CompensationContext, SagaContext
from saga.errors import PipelineInvalid
from saga.failures import Failure
from saga.policies import Compensation, Retry, declared
from saga.text import shown

Returned = StageOutput | dict[str, Any] | None
"""What a stage may return."""

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
