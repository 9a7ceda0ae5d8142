"""What follows when a stage fails, as the code says that also recovers real sagas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stageflow.api import Pipeline, StageOutput

from saga.errors import MisuseError
from saga.events import (
    AnyEvent,
    CompensationCompleted,
    CompensationStarted,
    FallbackUsed,
    SagaEnded,
    SagaStarted,
    SagaStatus,
    SagaTurnedBack,
    StageFailed,
    StageProbed,
    StageSkipped,
    StageStarted,
    TurnReason,
)
from saga.failures import Failure, FailureKind
from saga.ledger import StageState
from saga.lint.design import Design
from saga.policies import Policy
from saga.recovery import Rollback, conclude, final_status, stage_states, unabsorbed
from saga.recovery.scope import undo_scope
from saga.recovery.state import SagaState
from saga.render.drawing import Drawing
from saga.render.explained import drawing_if, page
from saga.render.graph import graph_svg
from saga.render.mermaid import graph_mermaid
from saga.text import printable


@dataclass(frozen=True, slots=True)
class Consequence:
    """What follows when one stage fails.

    Attributes:
        stage: The stage that fails.
        status: How the saga ends.
        absorbed: The failure doesn't stop the saga: a fallback stands in, or the stage's branch is skipped.
        undone: What is undone, in waves: the stages of one may be undone at the same time, as far as `max_concurrency` lets them, and
            each waits for what depends on it in the waves before.
        kept: What stands and is meant to, in topological order; the failed stage itself, when its fallback stands in.
        impossible: What the saga would undo and can't, in topological order: plain stages that have an effect, or don't say
            that they have none.
    """

    stage: str
    status: SagaStatus
    absorbed: bool
    undone: tuple[tuple[str, ...], ...]
    kept: tuple[str, ...]
    impossible: tuple[str, ...]

    @property
    def what_follows(self) -> tuple[str, ...]:
        """What becomes of the failure and of the other stages, a line each."""
        lines = []
        if self.absorbed:
            lines.append("its fallback stands in" if self.stage in self.kept else "its branch is skipped")
        if self.undone:
            lines.append(f"undone: {'; then '.join(', '.join(wave) for wave in self.undone)}")
        if self.kept:
            lines.append(f"kept: {', '.join(self.kept)}")
        if self.impossible:
            lines.append(f"impossible to undo: {', '.join(self.impossible)}")
        return tuple(lines) or ("nothing had been done",)

    def __str__(self) -> str:
        """Some lines."""
        return "\n  ".join(map(printable, (f"If {self.stage} fails: {self.status.value.upper()}", *self.what_follows)))


@dataclass(frozen=True, slots=True)
class Explanation:
    """What follows when a stage fails, for every stage.

    Attributes:
        pipeline: The pipeline's name.
        stages: The consequence for each stage, in topological order.
        dependencies: The stages that each stage waits for.
    """

    pipeline: str
    stages: dict[str, Consequence]
    dependencies: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        """A readable text."""
        return "\n\n".join([f"Pipeline {printable(self.pipeline)}", *(str(consequence) for consequence in self.stages.values())])

    def to_svg(self, stage: str) -> str:
        """The graph as a failure of this stage leaves it; stages with the same number are undone at the same time.

        Raises:
            MisuseError: There is no such stage.
        """
        return graph_svg(self._drawing(stage))

    def to_mermaid(self, stage: str) -> str:
        """The same as a Mermaid flowchart.

        Raises:
            MisuseError: There is no such stage.
        """
        return graph_mermaid(self._drawing(stage))

    def to_html(self) -> str:
        """One file in which one chooses the stage that fails; above 100 stages it has no pictures. It needs nothing else."""
        return page(self)

    def _drawing(self, stage: str) -> Drawing:
        if stage not in self.stages:
            raise MisuseError(f"a stage of pipeline {self.pipeline} ({', '.join(self.stages)})", got=repr(stage))
        return drawing_if(self, stage)


def explain(pipeline: Pipeline, policy: Policy | None = None) -> Explanation:
    """Say for every stage what follows when it fails under this policy; `FailFast()` by default.

    It plays the failure to the code that also recovers real sagas, on these assumptions: the stage raises in its last attempt, its
    effect has not landed, and it has recorded none; all that doesn't depend on it has completed by then; nothing else fails,
    neither a fallback nor a compensation. Each stage is one play, so the time grows with the square of their number: ten to
    fifteen seconds for a thousand.

    Raises:
        PipelineInvalid: It can't be run as a saga at all.
        PolicyInvalid: The policy is not one, or names a stage that isn't there.
    """
    design = Design.of(pipeline, policy)
    return Explanation(
        pipeline=design.blueprint.name,
        stages={name: consequence_of(design, name) for name in design.graph.names},
        dependencies={node.name: node.dependencies for node in design.graph.nodes},
    )


def consequence_of(design: Design, stage: str) -> Consequence:
    """Play the failure of one stage to the code that recovers real sagas."""
    graph = design.graph
    branch = design.with_dependents(stage)
    state = SagaState(_until(design, stage, completed=[name for name in graph.names if name not in branch]))
    fallback, rest = design.fallback(stage), [name for name in graph.names if name in branch and name != stage]
    if fallback is not None:
        state.apply(FallbackUsed(stage=stage, output=StageOutput.ok(), source=fallback))
        _apply(state, (event for name in rest for event in design.passes[name]))
    cause = unabsorbed(state)
    if cause is None and fallback is None:
        output = StageOutput.skip()
        _apply(state, (StageSkipped(stage=name, reason=f"{stage} failed", output=output, with_branch=True) for name in rest))
    move = conclude(state, cause)
    undone = _undo(state, move.turn, cause) if move.turn is not None else ()
    status = move.status if move.status is not None else final_status(state)
    state.apply(SagaEnded(status=status, cause=move.cause))
    shown = stage_states(state)
    # A saga that ended by itself has looked for orphans, also where it found none that it could undo.
    scope = frozenset() if move.status is not None else undo_scope(state, move.turn or TurnReason.ORPHANS)
    impossible = tuple(
        node.name
        for node in graph.nodes
        if node.name in scope and shown[node.name] is StageState.KEPT and (design.is_silent(node) or design.is_irreversible(node))
    )
    return Consequence(
        stage=stage,
        status=status,
        absorbed=cause is None,
        undone=undone,
        kept=tuple(name for name, where in shown.items() if where in {StageState.KEPT, StageState.FALLBACK} and name not in impossible),
        impossible=impossible,
    )


def _until(design: Design, stage: str, completed: list[str]) -> Iterator[AnyEvent]:
    """The ledger of a saga in which these stages complete, and then that one fails."""
    yield SagaStarted(saga_id="explained", pipeline=design.blueprint.name, graph=design.graph, policy=design.policy)
    for name in completed:
        yield from design.passes[name]
    yield StageStarted(stage=stage, attempt=1)
    yield StageFailed(stage=stage, failure=Failure.of(stage, FailureKind.EXCEPTION, "explained", attempt=1))
    if design.graph[stage].can_probe:
        yield StageProbed(stage=stage, landed=False)


def _undo(state: SagaState, reason: TurnReason, cause: Failure | None) -> tuple[tuple[str, ...], ...]:
    """Undo what can be undone, all that is open at once."""
    state.apply(SagaTurnedBack(reason=reason, cause=cause))
    rollback, waves = Rollback(state, reason), []
    while wave := tuple(iter(rollback.take, None)):
        for name in wave:
            state.apply(CompensationStarted(stage=name, attempt=1))
            state.apply(CompensationCompleted(stage=name))
        for name in wave:
            rollback.clear(name)
        waves.append(wave)
    return tuple(waves)


def _apply(state: SagaState, events: Iterable[AnyEvent]) -> None:
    for event in events:
        state.apply(event)
