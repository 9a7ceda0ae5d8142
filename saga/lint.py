"""What a pipeline's design leads to, before it runs.

`check` finds what is wrong with it, `explain` says what follows when a stage fails. Pure: no stage is run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, Self

from stageflow.api import Pipeline, StageKind, StageOutput

from saga.blueprint import Blueprint
from saga.compensable import wrapped
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
    StageCompleted,
    StageFailed,
    StageProbed,
    StageSkipped,
    StageStarted,
    TurnReason,
)
from saga.failures import Failure, FailureKind
from saga.graph import Graph, Node, Role
from saga.ledger import StageState
from saga.policies import ContinueWithFallback, FailFast, Policy, declared
from saga.recovery import Rollback, conclude, final_status, stage_states, unabsorbed
from saga.render.drawing import Drawing
from saga.render.explained import drawing_if, page
from saga.render.graph import graph_svg
from saga.render.mermaid import graph_mermaid
from saga.scope import undo_scope
from saga.stages import DECLARABLE, StagePlan
from saga.state import SagaState
from saga.text import printable


class FindingCode(StrEnum):
    """What may be wrong with a stage."""

    UNDECLARED_EFFECT = "undeclared-effect"
    """It is there to change something, and doesn't say whether that can be undone."""
    DOUBT_WITHOUT_PROBE = "doubt-without-probe"
    """It can end in doubt, and nothing can resolve that."""
    FALLIBLE_AFTER_PIVOT = "fallible-after-pivot"
    """It may fail when there is no way back, and nothing helps it forward."""
    IRREVERSIBLE_BEFORE_FALLIBLE = "irreversible-before-fallible"
    """Its effect can't be undone, and the saga may still have to."""
    INDEPENDENT_PIVOTS = "independent-pivots"
    """Two points of no return, of which one may be passed and the other not."""
    UNUSABLE_FALLBACK = "unusable-fallback"
    """Its fallback is never used."""
    NEVER_READ = "never-read"
    """It has something that is read only beside a compensate(), and has none."""
    MISSPELT = "misspelt"
    """It has something under a name that is nearly one that a saga reads."""


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """A stage that raises is enough, and the saga can be neither completed nor undone."""
    WARNING = "warning"
    """It takes bad luck or more than is known, or something that was written has no effect."""


_SEVERITIES: Final = {
    FindingCode.UNDECLARED_EFFECT: Severity.WARNING,
    FindingCode.DOUBT_WITHOUT_PROBE: Severity.WARNING,
    FindingCode.FALLIBLE_AFTER_PIVOT: Severity.ERROR,
    FindingCode.IRREVERSIBLE_BEFORE_FALLIBLE: Severity.ERROR,
    FindingCode.INDEPENDENT_PIVOTS: Severity.ERROR,
    FindingCode.UNUSABLE_FALLBACK: Severity.WARNING,
    FindingCode.NEVER_READ: Severity.WARNING,
    FindingCode.MISSPELT: Severity.WARNING,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with a stage.

    Attributes:
        code: What.
        severity: How bad that is.
        stage: Which stage.
        message: What may happen.
        advice: What to do.
    """

    code: FindingCode
    severity: Severity
    stage: str
    message: str
    advice: str

    @classmethod
    def of(cls, code: FindingCode, stage: str, message: str, advice: str) -> Self:
        """Note a finding, as bad as its code is."""
        return cls(code, _SEVERITIES[code], stage, message, advice)

    def __str__(self) -> str:
        """One line."""
        return f"stage {self.stage!r}: {self.severity.value} {self.code.value}: {self.message}. {self.advice}."


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


def check(pipeline: Pipeline, policy: Policy | None = None) -> list[Finding]:
    """Find what is wrong with a pipeline that is to run under this policy; `FailFast()` by default.

    Returns:
        The findings in topological order of their stages, at most one for each stage and code.

    Raises:
        PipelineInvalid: It can't be run as a saga at all.
        PolicyInvalid: The policy is none, or names a stage that isn't there.
    """
    design = _Design.of(pipeline, policy)
    place = {name: position for position, name in enumerate(design.graph.names)}
    return sorted((finding for rule in _RULES for finding in rule(design)), key=lambda finding: place[finding.stage])


def explain(pipeline: Pipeline, policy: Policy | None = None) -> Explanation:
    """Say for every stage what follows when it fails under this policy; `FailFast()` by default.

    It plays the failure to the code that also recovers real sagas, on these assumptions: the stage raises in its last attempt, its
    effect has not landed, and it has recorded none; all that doesn't depend on it has completed by then; nothing else fails,
    neither a fallback nor a compensation. Each stage is one play, so the time grows with the square of their number: ten to
    fifteen seconds for a thousand.

    Raises:
        PipelineInvalid: It can't be run as a saga at all.
        PolicyInvalid: The policy is none, or names a stage that isn't there.
    """
    design = _Design.of(pipeline, policy)
    return Explanation(
        pipeline=design.blueprint.name,
        stages={name: _consequence(design, name) for name in design.graph.names},
        dependencies={node.name: node.dependencies for node in design.graph.nodes},
    )


@dataclass(frozen=True, slots=True)
class _Design:
    """A pipeline, and the policy that it is to run under.

    Attributes:
        blueprint: The pipeline's.
        policy: The policy.
        passes: What the ledger would say of each stage if it completed.
    """

    blueprint: Blueprint
    policy: Policy
    passes: dict[str, tuple[StageStarted, StageCompleted]]

    @classmethod
    def of(cls, pipeline: Pipeline, policy: Policy | None) -> Self:
        blueprint = Blueprint.of(pipeline)
        policy = policy if policy is not None else FailFast()
        blueprint.check_policy(policy)
        output = StageOutput.ok()
        passes = {name: (StageStarted(stage=name, attempt=1), StageCompleted(stage=name, output=output)) for name in blueprint.graph.names}
        return cls(blueprint, policy, passes)

    @property
    def graph(self) -> Graph:
        return self.blueprint.graph

    def plan(self, name: str) -> StagePlan:
        return self.blueprint.stages[name]

    def pivots(self) -> list[str]:
        return [node.name for node in self.graph.nodes if node.is_point_of_no_return]

    def with_dependents(self, name: str) -> frozenset[str]:
        """The stage and everything that depends on it, directly or through any number of others."""
        found = {name}
        for node in self.graph.nodes:
            if not found.isdisjoint(node.dependencies):
                found.add(node.name)
        return frozenset(found)

    def is_silent(self, node: Node) -> bool:
        """Whether a stage of a kind that changes things says nothing of its effect."""
        return node.role is Role.PLAIN and node.kind in _CHANGES_THINGS and self.plan(node.name).has_effect is None

    def is_irreversible(self, node: Node) -> bool:
        return node.role is Role.PLAIN and self.plan(node.name).has_effect is True

    def is_retried(self, name: str) -> bool:
        """Whether the stage is attempted again if it fails and not only if it runs out of time; for which exceptions, is its own affair."""
        retry = self.plan(name).retry or self.policy.retry
        return retry.attempts > 1 and (retry.retry_on is None or not _OUT_OF_TIME.issuperset(retry.retry_on))

    def fallback(self, name: str) -> Literal["stage", "policy"] | None:
        """Whose fallback stands in for the stage when it fails; None: nobody's."""
        if not isinstance(self.policy, ContinueWithFallback):
            return None
        if self.graph[name].has_fallback:
            return "stage"
        return "policy" if name in self.policy.fallbacks else None

    def skips_branches(self) -> bool:
        return isinstance(self.policy, ContinueWithFallback) and self.policy.without_fallback == "skip_branch"

    def doubts(self, name: str) -> Iterator[str]:
        """What was asked for that can leave the stage in doubt.

        Not `drain_timeout`, nor a process that dies: either can leave any stage in doubt, so a finding for them would single out none.
        """
        seconds = self.plan(name).timeout or self.policy.timeout
        if seconds is not None:
            yield f"after a timeout of {seconds:g} s"
        if self.policy.in_flight == "cancel" and self.graph[name].role is not Role.PIVOT:
            yield "cancelled in flight"
        if self.policy.deadline is not None:
            yield f"after the deadline of {self.policy.deadline:g} s"


_OUT_OF_TIME: Final = frozenset({FailureKind.TIMEOUT.value, FailureKind.COMPENSATION.value})
"""The kinds that no stage has which raises or reports a failure; the last one no stage at all has, going forward."""
_CHANGES_THINGS: Final = frozenset({StageKind.WORK.value, StageKind.AGENT.value})


# -- what may be wrong -----------------------------------------------------------------------------------------------


def _undeclared_effects(design: _Design) -> Iterator[Finding]:
    for node in design.graph.nodes:
        if design.is_silent(node):
            yield Finding.of(
                FindingCode.UNDECLARED_EFFECT,
                node.name,
                f"a stage of kind {node.kind} without a compensation keeps what effect it has, whatever becomes of the saga",
                "Give it a compensate(), or let it say has_effect = False (it has none) or True (nobody can undo it)",
            )


def _doubts_without_probe(design: _Design) -> Iterator[Finding]:
    for node in design.graph.nodes:
        reasons = ", ".join(design.doubts(node.name))
        if not reasons or node.can_probe or node.undo_in_doubt:
            continue
        if node.role is not Role.PLAIN:
            problem = f"it can end in doubt ({reasons}), and then nobody knows whether to undo it: the saga is stuck"
            copes = ", or a compensation that copes with not knowing (compensate_in_doubt = True)" if node.role is Role.COMPENSABLE else ""
            yield Finding.of(FindingCode.DOUBT_WITHOUT_PROBE, node.name, problem, f"Give it a probe(){copes}")
        elif design.is_irreversible(node):
            problem = f"it can be cut off ({reasons}) when it has had its effect; it then counts as failed, and nobody is told of that"
            advice = "Make it a PivotStage with a probe(): that is in doubt then, and is asked"
            yield Finding.of(FindingCode.DOUBT_WITHOUT_PROBE, node.name, problem, advice)


def _fallible_after_pivot(design: _Design) -> Iterator[Finding]:
    if design.skips_branches():
        return
    before = {pivot: design.graph.with_ancestors([pivot]) for pivot in design.pivots()}
    after = {pivot: design.with_dependents(pivot) for pivot in before}
    for node in design.graph.nodes:
        name = node.name
        if design.is_retried(name) or design.fallback(name):
            continue
        # Pivots beside each other are a finding of their own.
        passed = [pivot for pivot in before if name not in before[pivot] and (name in after[pivot] or not node.is_point_of_no_return)]
        if not passed:
            continue
        beside = [pivot for pivot in passed if name not in after[pivot]]
        sooner = f", or let {_named(beside)} depend on it" if beside else ""
        yield Finding.of(
            FindingCode.FALLIBLE_AFTER_PIVOT,
            name,
            f"it may fail when {_named(passed)} can't be undone any more: the saga then can go neither on nor back",
            f"Give it a Retry with more than one attempt, also where it raises, or a fallback under ContinueWithFallback{sooner}",
        )


def _irreversible_before_fallible(design: _Design) -> Iterator[Finding]:
    graph, skips = design.graph, design.skips_branches()
    irreversible = [node.name for node in graph.nodes if design.is_irreversible(node)]
    if not irreversible:
        return
    # What is retried after a pivot is meant to be retried until it succeeds.
    sure = {name for pivot in design.pivots() for name in design.with_dependents(pivot) - {pivot} if design.is_retried(name)}
    fallible = [name for name in graph.names if name not in sure and not design.fallback(name)]
    # A saga that skips a branch undoes what served only that branch.
    orphaned = {name: _consequence(design, name).impossible for name in fallible} if skips else {}
    for name in irreversible:
        before = graph.with_ancestors([name])
        later = [other for other in fallible if other not in before and (not skips or name in orphaned[other])]
        if later:
            yield Finding.of(
                FindingCode.IRREVERSIBLE_BEFORE_FALLIBLE,
                name,
                f"nobody can undo its effect, and after it {_named(later)} may fail: the effect then stays for nothing",
                "Let it depend on what may fail, or make it the PivotStage and have all that comes after it retried, "
                "or give it a compensate()",
            )


def _independent_pivots(design: _Design) -> Iterator[Finding]:
    if design.skips_branches():
        return
    pivots = design.pivots()
    for place, pivot in enumerate(pivots):
        before = design.graph.with_ancestors([pivot])
        # Either may be the one that fails, so a fallback of one alone leaves the other.
        others = [other for other in pivots[:place] if other not in before and not (design.fallback(pivot) and design.fallback(other))]
        if others:
            yield Finding.of(
                FindingCode.INDEPENDENT_PIVOTS,
                pivot,
                f"it and {_named(others)} are pivots that don't depend on each other: when one has completed and another fails, "
                "the saga can go neither on nor back",
                "Let one depend on the other and be retried, or make a compensable stage of one",
            )


def _unusable_fallbacks(design: _Design) -> Iterator[Finding]:
    # Under ContinueWithFallback each is of use: the policy's also behind a stage's own, for when that one fails.
    if isinstance(design.policy, ContinueWithFallback):
        return
    for node in design.graph.nodes:
        if node.has_fallback:
            yield Finding.of(
                FindingCode.UNUSABLE_FALLBACK,
                node.name,
                "its fallback() is never used: under FailFast a failure stops the saga",
                "Run the pipeline under ContinueWithFallback, or take the fallback() away",
            )


def _never_read(design: _Design) -> Iterator[Finding]:
    for node in design.graph.nodes:
        if node.role is Role.COMPENSABLE:
            continue
        # A pivot is asked by its probe, as often and as long as its compensation says.
        read = {"probe", "compensation"} if node.can_probe else set()
        runner = design.plan(node.name).spec.runner
        passed_over = [part for part in _OF_UNDOING if part not in read and declared(runner, part)]
        if passed_over:
            yield Finding.of(
                FindingCode.NEVER_READ,
                node.name,
                f"it has {_named(passed_over)}, which a saga reads only beside a compensate(), and has none",
                "Take it away" if node.role is Role.PIVOT else "Give it a compensate(), or take it away",
            )


_OF_UNDOING: Final = ("probe", "compensation", "compensate_in_doubt")


def _misspelt(design: _Design) -> Iterator[Finding]:
    for name in design.graph.names:
        meant = _nearly_declared(design.plan(name).spec.runner)
        if meant:
            yield Finding.of(
                FindingCode.MISSPELT,
                name,
                f"it has {_named(list(meant))}, which a saga doesn't read: {_named(list(meant.values()))} may be meant",
                "Write it so, or give it a name that is less like it",
            )


def _nearly_declared(stage: object) -> dict[str, str]:
    """What the stage's class has under a name that is nearly one of those that it lacks, and that one."""
    lacking = [name for name in DECLARABLE if not getattr(stage, name, None)]
    code = wrapped(stage)
    found = {}
    for name in dir(code if isinstance(code, type) else type(code)):
        if name.startswith("_") or name in DECLARABLE:
            continue
        close = difflib.get_close_matches(name, lacking, n=1, cutoff=0.8)
        # A word more is no slip: `timeout_ms` is the stage's own.
        if close and not name.startswith(f"{close[0]}_"):
            found[name] = close[0]
    return found


_RULES: Final = (
    _undeclared_effects,
    _doubts_without_probe,
    _fallible_after_pivot,
    _irreversible_before_fallible,
    _independent_pivots,
    _unusable_fallbacks,
    _never_read,
    _misspelt,
)


def _named(names: list[str]) -> str:
    shown = 3
    quoted = [repr(name) for name in names[:shown]]
    if len(names) > shown:
        quoted.append(f"{len(names) - shown} more")
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


# -- what follows when a stage fails ---------------------------------------------------------------------------------


def _consequence(design: _Design, stage: str) -> Consequence:
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


def _until(design: _Design, stage: str, completed: list[str]) -> Iterator[AnyEvent]:
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
    while len(rollback):
        wave = tuple(rollback.take() for _ in range(len(rollback)))
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
