"""A pipeline and the policy that it is to run under, as one asks about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Self

from stageflow.api import Pipeline, StageKind, StageOutput

from saga.blueprint import Blueprint, read
from saga.events import StageCompleted, StageStarted
from saga.failures import FailureKind
from saga.graph import Graph, Node, Role
from saga.policies import ContinueWithFallback, FailFast, Policy
from saga.stages import StageOffer


@dataclass(frozen=True, slots=True)
class Design:
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
        """Read a pipeline for a policy; `FailFast()` by default.

        Raises:
            PipelineInvalid: It can't be run as a saga at all.
            PolicyInvalid: The policy is not one, or names a stage that isn't there.
        """
        policy = policy if policy is not None else FailFast()
        blueprint = read(pipeline, policy)
        output = StageOutput.ok()
        passes = {name: (StageStarted(stage=name, attempt=1), StageCompleted(stage=name, output=output)) for name in blueprint.graph.names}
        return cls(blueprint, policy, passes)

    @property
    def graph(self) -> Graph:
        """The pipeline's."""
        return self.blueprint.graph

    def offer(self, name: str) -> StageOffer:
        """What a stage offers."""
        return self.blueprint.stages[name]

    def pivots(self) -> list[str]:
        """The points of no return, in topological order."""
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
        return node.role is Role.PLAIN and node.kind in _CHANGES_THINGS and self.offer(node.name).has_effect is None

    def is_irreversible(self, node: Node) -> bool:
        """Whether a stage says that it has an effect, and that nobody can undo it."""
        return node.role is Role.PLAIN and self.offer(node.name).has_effect is True

    def is_retried(self, name: str) -> bool:
        """Whether the stage is attempted again if it fails and not only if it runs out of time; for which exceptions, is its own affair."""
        retry = self.offer(name).retry or self.policy.retry
        return retry.attempts > 1 and (retry.retry_on is None or not _OUT_OF_TIME.issuperset(retry.retry_on))

    def fallback(self, name: str) -> Literal["stage", "policy"] | None:
        """Whose fallback stands in for the stage when it fails; None: nobody's."""
        if not isinstance(self.policy, ContinueWithFallback):
            return None
        if self.graph[name].has_fallback:
            return "stage"
        return "policy" if name in self.policy.fallbacks else None

    def skips_branches(self) -> bool:
        """Whether the policy skips the branch of a stage that fails and has no fallback."""
        return isinstance(self.policy, ContinueWithFallback) and self.policy.without_fallback == "skip_branch"

    def doubts(self, name: str) -> Iterator[str]:
        """What was asked for that can leave the stage in doubt.

        Not `drain_timeout`, nor a process that dies: either can leave any stage in doubt, so a finding for them would single out none.
        """
        seconds = self.offer(name).timeout or self.policy.timeout
        if seconds is not None:
            yield f"after a timeout of {seconds:g} s"
        if self.policy.in_flight == "cancel" and self.graph[name].role is not Role.PIVOT:
            yield "cancelled in flight"
        if self.policy.deadline is not None:
            yield f"after the deadline of {self.policy.deadline:g} s"


_OUT_OF_TIME: Final = frozenset({FailureKind.TIMEOUT.value, FailureKind.COMPENSATION.value})
"""The kinds that no stage has which raises or reports a failure; the last one no stage at all has, going forward."""
_CHANGES_THINGS: Final = frozenset({StageKind.WORK.value, StageKind.AGENT.value})
