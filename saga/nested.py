"""A stage that runs a pipeline of its own as a saga."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stageflow.api import Pipeline, StageOutput

from saga.blueprint import Blueprint, refuse_no_policy
from saga.compensable import CompensableStage
from saga.contexts import CompensationContext, SagaContext
from saga.errors import MisuseError
from saga.events import SagaStatus
from saga.policies import Compensation, Policy, Retry
from saga.report import NestedSagaFailed, SagaReport
from saga.stages import is_async
from saga.text import shown


class NestedSaga(CompensableStage):
    """Runs a pipeline as a child saga, and undoes it through the child's own ledger entries.

    A child that fails compensates itself and then fails this stage. A child that completed is undone when the parent
    turns back. Its output is `{"saga_id": ..., "outputs": {stage: data}}`.

    Args:
        pipeline: The child's.
        policy: The child's; `FailFast()` by default.
        fields: Gives the fields of the child's context that differ from the parent's.
    """

    bounds_itself = True
    idempotent = True
    """Running it again goes on with the child that is there."""
    compensate_in_doubt = True
    compensation = Compensation(retry=Retry(attempts=3, wait=0, retry_on=(InterruptedError,)), timeout=None)
    """The child's own policy says how patiently its stages are undone; only an attempt that was cut off from outside is repeated."""

    def __init__(
        self,
        pipeline: Pipeline,
        policy: Policy | None = None,
        fields: Callable[[SagaContext], Mapping[str, Any]] | None = None,
    ) -> None:
        refuse_no_policy(policy)
        if fields is not None and (not callable(fields) or is_async(fields)):
            raise MisuseError("a plain function that gives the child's fields", got=shown(fields), hint="As in fields=lambda ctx: {...}.")
        self.holds_pivot = any(node.is_point_of_no_return for node in Blueprint.of(pipeline).graph.nodes)
        self.name = pipeline.name
        self.nested_pipeline = pipeline
        self._policy = policy
        self._fields = fields

    async def execute(self, ctx: SagaContext) -> StageOutput:
        """Run the child, or go on with one that an earlier attempt has left."""
        left = _standing(await ctx.child_sagas())
        if left:
            report = await ctx.resume_saga(left[-1].saga_id, self.nested_pipeline)
        else:
            fields = dict(self._fields(ctx)) if self._fields is not None else {}
            report = await ctx.run_saga(self.nested_pipeline, policy=self._policy, **fields)
        if not report.ok:
            raise NestedSagaFailed(report)
        return _output(report)

    async def compensate(self, ctx: CompensationContext) -> None:
        """Undo what is left of the child, whichever attempt ran it."""
        children = await ctx.child_sagas()
        # What one attempt's child leaves standing holds back no other's.
        for report in [await ctx.undo_saga(standing.saga_id, self.nested_pipeline) for standing in reversed(_standing(children))]:
            if (failed := NestedSagaFailed.unless_undone(report)) is not None:
                raise failed
        _refuse_own_effect(ctx, children)

    async def probe(self, ctx: CompensationContext) -> StageOutput | None:
        """Ask the child's ledger what became of it; one whose process is gone comes to rest first, unless its parent runs on.

        Raises:
            NestedSagaFailed: It has not come to its end, and something of it may stand.
        """
        children = await ctx.child_sagas()
        _refuse_own_effect(ctx, children)
        standing = _standing(children)
        if standing and standing[-1].ended_at is None:
            await ctx.rest_saga(standing[-1].saga_id, self.nested_pipeline)
            standing = _standing(await ctx.child_sagas())
        if not standing:
            return None
        if not standing[-1].ok:
            raise NestedSagaFailed(standing[-1])
        found = _output(standing[-1])
        # A report that comes from the ledger knows of no model.
        found.data["outputs"] = Blueprint.of(self.nested_pipeline).restored(found.data["outputs"])
        return found


def _refuse_own_effect(ctx: CompensationContext, children: list[SagaReport]) -> None:
    """Refuse to answer for what no child has done: the stage had its effect itself, in an older version of the pipeline.

    Raises:
        MisuseError: It had one.
    """
    if ctx.effects or (ctx.output is not None and not children):
        raise MisuseError(
            "a stage that has done nothing but run a saga",
            got="one that had an effect of its own",
            stage=ctx.stage_name,
            hint="It was no nested saga then: undo it with its code as it was, or by hand, and settle it.",
        )


def _standing(children: list[SagaReport]) -> list[SagaReport]:
    """The children of which anything may stand."""
    return [report for report in children if report.status is not SagaStatus.COMPENSATED]


def _output(report: SagaReport) -> StageOutput:
    return StageOutput.ok(saga_id=report.saga_id, outputs={name: output.data for name, output in report.kept.items()})


def nested(
    pipeline: Pipeline,
    policy: Policy | None = None,
    fields: Callable[[SagaContext], Mapping[str, Any]] | None = None,
) -> NestedSaga:
    """Make a stage of a whole pipeline: it runs as a child saga, and is undone as one.

    Args:
        pipeline: The child's.
        policy: The child's; `FailFast()` by default, not the parent's.
        fields: Gives the fields of the child's context that differ from the parent's, as `{"input_text": ...}`.

    Raises:
        MisuseError: It is no pipeline or can't be run as a saga, the policy is not one, or the fields are given by no plain function.
    """
    return NestedSaga(pipeline, policy, fields)
