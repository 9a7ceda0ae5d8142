"""The dependency graph of a pipeline: validated, topologically ordered, comparable.

It is plain data and goes into the ledger: what happens is decided from it, without the user's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, ClassVar, Final, Self

from pydantic import AfterValidator, ConfigDict

from saga.errors import PipelineInvalid
from saga.quick import frozen
from saga.text import did_you_mean

_CLOSED: Final = ConfigDict(extra="forbid")


class Role(StrEnum):
    """What a stage offers for backward recovery."""

    PLAIN = "plain"
    """It declares no effect: nothing to undo, its output is kept."""
    COMPENSABLE = "compensable"
    """Its effect can be undone."""
    PIVOT = "pivot"
    """The point of no return: once it has completed, it and all it depends on stay."""


@frozen
class Node:
    """One stage of the graph.

    Attributes:
        name: The stage's name, unique in its pipeline.
        dependencies: Names of the stages that it waits for, without repetition.
        kind: stageflow's `StageKind`, by value.
        role: What it offers for backward recovery.
        conditional: Whether it is skipped when a dependency's data has a `skip_reason`.
        can_probe: Whether it can ask the outside world whether its effect landed.
        undo_in_doubt: Whether its compensation copes with not knowing.
        idempotent: Whether it may run again with the same idempotency key, and has its effect once all the
            same: what a later attempt says answers for the earlier ones.
        holds_pivot: Whether it runs a saga that has a pivot.
        has_fallback: Whether it offers a `fallback()` of its own.
    """

    __pydantic_config__: ClassVar = _CLOSED

    name: str
    dependencies: tuple[str, ...] = ()
    kind: str = "work"
    role: Role = Role.PLAIN
    conditional: bool = False
    can_probe: bool = False
    undo_in_doubt: bool = False
    idempotent: bool = False
    holds_pivot: bool = False
    has_fallback: bool = False

    @property
    def is_point_of_no_return(self) -> bool:
        """Whether it and all it depends on stay, once it has completed."""
        return self.role is Role.PIVOT or self.holds_pivot


_OFFERS: Final = frozenset({"can_probe", "undo_in_doubt", "idempotent", "has_fallback"})
"""What may change while a saga is at rest, by its being mended: nothing that has been done counts for anything else because of it."""


def _misplaced(nodes: Iterable[Node]) -> str | None:
    """The first stage that does not stand behind those that it depends on, or stands there twice; None: there is none."""
    before: set[str] = set()
    for node in nodes:
        if node.name in before or not before.issuperset(node.dependencies):
            return node.name
        before.add(node.name)
    return None


def _in_order(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Refuse what is read and no `Graph.of` has sorted: no plan could be made of it, and no picture."""
    name = _misplaced(nodes)
    if name is not None:
        raise ValueError(f"expected each stage once, behind those that it depends on, got {name!r}")
    return nodes


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The stages of a pipeline in topological order.

    Build it with `Graph.of`, which validates and sorts; equal pipelines give equal graphs.
    """

    __pydantic_config__: ClassVar = _CLOSED

    nodes: Annotated[tuple[Node, ...], AfterValidator(_in_order)]

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> Self:
        """Take the nodes in the order given; where one comes before what it depends on, sort them topologically.

        Raises:
            PipelineInvalid: There is no stage, a name is empty, a dependency is unknown, or there is a cycle.
        """
        by_name = {node.name: node for node in nodes}
        if not by_name:
            raise PipelineInvalid("a pipeline with at least one stage", got="an empty one")
        for node in by_name.values():
            if not node.name.strip():
                raise PipelineInvalid("a stage name with at least one visible character", got=repr(node.name), stage=node.name)
            for dependency in node.dependencies:
                if dependency not in by_name:
                    raise PipelineInvalid(
                        f"dependencies out of the pipeline's stages ({', '.join(by_name)})",
                        got=repr(dependency),
                        stage=node.name,
                        hint=did_you_mean(dependency, by_name),
                    )
        if _misplaced(by_name.values()) is None:
            return cls(nodes=tuple(by_name.values()))
        try:
            order = tuple(TopologicalSorter({name: node.dependencies for name, node in by_name.items()}).static_order())
        except CycleError as error:
            path = list(reversed(error.args[1]))
            raise PipelineInvalid("dependencies without a cycle", got=" -> ".join(path), stage=path[0]) from None
        return cls(nodes=tuple(by_name[name] for name in order))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The stages' names in topological order."""
        return tuple(node.name for node in self.nodes)

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """The nodes by name, in topological order."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def points_of_no_return(self) -> frozenset[str]:
        """The stages that stay with all they depend on, once they have completed."""
        return frozenset(node.name for node in self.nodes if node.is_point_of_no_return)

    @cached_property
    def with_probe(self) -> tuple[Node, ...]:
        """The stages that can ask the outside world whether their effects landed, in topological order."""
        return tuple(node for node in self.nodes if node.can_probe)

    @cached_property
    def dependencies(self) -> Mapping[str, frozenset[str]]:
        """For each stage, the stages that it directly depends on."""
        return {node.name: frozenset(node.dependencies) for node in self.nodes}

    @cached_property
    def dependents(self) -> Mapping[str, tuple[str, ...]]:
        """For each stage, the stages that directly depend on it, in topological order."""
        found: dict[str, list[str]] = {name: [] for name in self.names}
        for node in self.nodes:
            for dependency in node.dependencies:
                found[dependency].append(node.name)
        return {name: tuple(children) for name, children in found.items()}

    def __getitem__(self, name: str) -> Node:
        """The node of that name."""
        return self.by_name[name]

    def with_ancestors(self, names: Iterable[str]) -> frozenset[str]:
        """These stages and everything that they depend on, directly or through any number of others."""
        reached: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name not in reached:
                reached.add(name)
                pending.extend(self.by_name[name].dependencies)
        return frozenset(reached)

    def offering(self, other: Graph) -> Graph:
        """This graph, with what the stages of `other` offer; both have the same stages."""
        return Graph(nodes=tuple(replace(node, **{name: getattr(other[node.name], name) for name in _OFFERS}) for node in self.nodes))

    def differences(self, other: Graph) -> list[str]:
        """Say in a sentence for each stage how `other` differs, beside in what it offers; empty when both ask for the same saga."""
        found = [f"stage {name!r} is gone" for name in self.names if name not in other.by_name]
        found += [f"stage {name!r} is new" for name in other.names if name not in self.by_name]
        for mine in self.nodes:
            theirs = other.by_name.get(mine.name)
            if theirs is None:
                continue
            for field in [field.name for field in fields(Node) if field.name not in _OFFERS]:
                before, after = getattr(mine, field), getattr(theirs, field)
                if field == "dependencies":
                    before, after = sorted(before), sorted(after)
                if before != after:
                    was, now = (value.value if isinstance(value, Role) else value for value in (before, after))
                    found.append(f"stage {mine.name!r}: {field} was {was!r}, is {now!r}")
        return found
