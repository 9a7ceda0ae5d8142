"""What may be wrong with the design of a pipeline."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from stageflow.api import Pipeline

from saga.compensable import wrapped
from saga.graph import Role
from saga.lint.consequences import consequence_of
from saga.lint.design import Design
from saga.policies import ContinueWithFallback, Policy, declared
from saga.stages import DECLARABLE


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


def check(pipeline: Pipeline, policy: Policy | None = None) -> list[Finding]:
    """Find what is wrong with a pipeline that is to run under this policy; `FailFast()` by default.

    Returns:
        The findings in topological order of their stages, at most one for each stage and code.

    Raises:
        PipelineInvalid: It can't be run as a saga at all.
        PolicyInvalid: The policy is not one, or names a stage that isn't there.
    """
    design = Design.of(pipeline, policy)
    place = {name: position for position, name in enumerate(design.graph.names)}
    return sorted((finding for rule in _RULES for finding in rule(design)), key=lambda finding: place[finding.stage])


def _undeclared_effects(design: Design) -> Iterator[Finding]:
    for node in design.graph.nodes:
        if design.is_silent(node):
            yield Finding.of(
                FindingCode.UNDECLARED_EFFECT,
                node.name,
                f"a stage of kind {node.kind} without a compensation keeps what effect it has, whatever becomes of the saga",
                "Give it a compensate(), or let it say has_effect = False (it has none) or True (nobody can undo it)",
            )


def _doubts_without_probe(design: Design) -> Iterator[Finding]:
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


def _fallible_after_pivot(design: Design) -> Iterator[Finding]:
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


def _irreversible_before_fallible(design: Design) -> Iterator[Finding]:
    graph, skips = design.graph, design.skips_branches()
    irreversible = [node.name for node in graph.nodes if design.is_irreversible(node)]
    if not irreversible:
        return
    # What is retried after a pivot is meant to be retried until it succeeds.
    sure = {name for pivot in design.pivots() for name in design.with_dependents(pivot) - {pivot} if design.is_retried(name)}
    fallible = [name for name in graph.names if name not in sure and not design.fallback(name)]
    # A saga that skips a branch undoes what served only that branch.
    orphaned = {name: consequence_of(design, name).impossible for name in fallible} if skips else {}
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


def _independent_pivots(design: Design) -> Iterator[Finding]:
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


def _unusable_fallbacks(design: Design) -> Iterator[Finding]:
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


def _never_read(design: Design) -> Iterator[Finding]:
    for node in design.graph.nodes:
        if node.role is Role.COMPENSABLE:
            continue
        # A pivot is asked by its probe, as often and as long as its compensation says.
        read = {"probe", "compensation"} if node.can_probe else set()
        runner = design.offer(node.name).spec.runner
        passed_over = [part for part in _OF_UNDOING if part not in read and declared(runner, part)]
        if passed_over:
            yield Finding.of(
                FindingCode.NEVER_READ,
                node.name,
                f"it has {_named(passed_over)}, which a saga reads only beside a compensate(), and has none",
                "Take it away" if node.role is Role.PIVOT else "Give it a compensate(), or take it away",
            )


_OF_UNDOING: Final = ("probe", "compensation", "compensate_in_doubt")


def _misspelt(design: Design) -> Iterator[Finding]:
    for name in design.graph.names:
        meant = _nearly_declared(design.offer(name).spec.runner)
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
