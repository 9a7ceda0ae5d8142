"""What the code of a stage receives: the contexts."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, overload

from stageflow.api import StageContext, StageOutput

from saga.failures import Failure
from saga.outputs import copied
from saga.policies import Policy
from saga.quick import frozen

if TYPE_CHECKING:
    from stageflow.api import Pipeline, PipelineContext
    from stageflow.context import ContextSnapshot

    from saga.report import SagaReport

T = TypeVar("T")


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
            KeyError: The stage is no direct dependency.
        """
        return self[stage].data.get(key, default)

    def require_from(self, stage: str, key: str) -> Any:
        """One value that a direct dependency has to have given.

        Raises:
            KeyError: The stage is no direct dependency, or gave no such value.
        """
        data = self[stage].data
        if key not in data:
            raise KeyError(f"expected a key of what {stage} gave ({', '.join(map(str, data)) or 'none'}), got {key!r}")
        return data[key]

    def get_output(self, stage: str) -> StageOutput:
        """All that a direct dependency gave.

        Raises:
            KeyError: The stage is no direct dependency.
        """
        return self[stage]

    def has_output(self, stage: str) -> bool:
        """True, as every direct dependency of a stage that ran has given one.

        Raises:
            KeyError: The stage is no direct dependency.
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
