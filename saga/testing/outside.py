"""The outside world: looked at, and compared with what a report says of it."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, combinations, islice
from pprint import pformat
from typing import TYPE_CHECKING, Any, Final, Protocol

from stageflow.api import Pipeline, StageStatus

from saga.errors import MisuseError
from saga.ledger import MemoryLedger, StageState
from saga.policies import FailFast, Policy
from saga.testing.faults import WHOLE, ReferenceActions, Standing, stands
from saga.testing.rehearsal import Rehearsal

if TYPE_CHECKING:
    from saga.graph import Node
    from saga.report import SagaReport, StageReport

ID: Final = "verified"
"""Of every saga that is played: each has the world for itself, and its keys are to be the same."""
_PASSES: Final = frozenset({StageStatus.OK, StageStatus.SKIP})
_STANDS: Final = frozenset({StageState.KEPT, StageState.STUCK, StageState.BLOCKED})
_UNKNOWN: Final = frozenset({StageState.IN_DOUBT, StageState.RUNNING, StageState.COMPENSATING})
"""The last two are of a nested saga whose process died, when nobody has gone on with it."""
BY_THE_REPORT: Final = "By the report"
"""So begins what is said of a world that is not where the report says."""
_LINES: Final = 24
"""So many of a difference are shown."""
_WORLDS: Final = 64
"""So many are tried where a report leaves open what stands."""


class World(Protocol):
    """The outside world of the pipeline's stages, as the kit needs it. Both methods may be async."""

    def reset(self) -> Any:
        """Put everything back to where it was before the saga."""
        ...

    def look(self) -> Any:
        """What is in effect now, as a value that can be compared: accounts, seats, files.

        It has to be the same for two runs of the same stages: leave out keys, times, numbers that are given anew each time, and traces that
        a compensation may leave.
        """
        ...


class Outside:
    """The world of a pipeline's stages, and what it would look like if a report were true.

    Attributes:
        nodes: What is known of the stages, by their paths; whoever plays sagas adds to it.
    """

    def __init__(self, world: World, pipeline: Pipeline, policy: Policy, fields: dict[str, Any]) -> None:
        self.nodes: dict[str, Node] = {}
        self._world = world
        self._pipeline = pipeline
        self._policy = policy
        self._fields = fields
        self._looks: list[tuple[Standing, Any]] = []

    async def reset(self) -> None:
        """Put it back to where it was before the saga."""
        await _answer(self._world.reset())

    async def look(self) -> Any:
        """What is in effect now, as a value that stays as it is."""
        seen = await _answer(self._world.look())
        try:
            return copy.deepcopy(seen)
        except TypeError as error:
            raise _not_plain(error) from None

    async def contradiction(self, report: SagaReport | None, found: Any, far: Mapping[str, float]) -> str:
        """How what was found differs from what the report says; empty if it does not.

        Args:
            report: The saga's; None if it never began.
            found: What `look` gave.
            far: How far the code of each stage got, by its path, as `Injection.far` has it.
        """
        paths = {} if report is None else dict(leaves_and_branches(report))
        certain = {path: WHOLE for path, stage in paths.items() if stage.state in _STANDS}
        doubtful = [path for path, stage in paths.items() if _is_unknown(stage)]
        likely = {path: far[path] for path in doubtful if far.get(path)}
        possible = (dict.fromkeys(landed, WHOLE) for size in range(len(doubtful) + 1) for landed in combinations(doubtful, size))
        expected: list[Any] = []
        for landed in islice(chain([likely], possible), _WORLDS):
            expected.append(await self._reference(self._standing(paths, certain | landed)))
            if is_same(expected[-1], found):
                return ""
        said = "it never began" if report is None else f"it is {report.status.value}"
        in_effect = f"what {', '.join(certain)} did is in effect" if certain else "nothing is in effect"
        unknown = f", nobody knows about {', '.join(doubtful)}" if doubtful else ""
        return f"{BY_THE_REPORT} {said}, {in_effect}{unknown}. Then the world would be (-), and is (+):\n{difference(expected[0], found)}"

    def _standing(self, paths: Mapping[str, StageReport], far: Mapping[str, float]) -> Standing:
        needed = {
            path.removesuffix(node.name) + dependency
            for path, node in self.nodes.items()
            if stands(path, far)
            for dependency in node.dependencies
        }
        return Standing(
            far,
            {path: stage.failure for path, stage in paths.items() if stage.fallback and stage.failure and self.nodes[path].has_fallback},
            {
                path: stage.output
                for path, stage in paths.items()
                if path in needed and not stands(path, far) and stage.output is not None and stage.output.status in _PASSES
            },
        )

    async def _reference(self, standing: Standing) -> Any:
        """What the world looks like when these stages, and no others, have run in it."""
        for known, look in self._looks:
            if known == standing:
                return look
        await self.reset()
        coordinator = Rehearsal(
            FailFast(retry=self._policy.retry), MemoryLedger(), lambda blueprint, prefix: ReferenceActions(blueprint, prefix, standing)
        )
        report = await coordinator.run(self._pipeline, saga_id=ID, **self._fields)
        if not report.ok:
            names = ", ".join(sorted(standing.far))
            raise MisuseError(f"stages that run in a world in which no others do ({names})", got=f"this:\n{report}")
        self._looks.append((standing, await self.look()))
        return self._looks[-1][1]


async def _answer(given: Any) -> Any:
    return await given if inspect.isawaitable(given) else given


def leaves_and_branches(report: SagaReport, prefix: str = "") -> Iterator[tuple[str, StageReport]]:
    """The stages by their paths, in topological order; those of nested sagas behind the stage that runs them, the last ones last."""
    for name, stage in report.stages.items():
        # What a nested saga has left standing is told by its own stages; but the stage may have an effect of its own, in doubt with it.
        told_within = stage.children and stage.state is not StageState.IN_DOUBT
        yield prefix + name, replace(stage, state=StageState.SKIPPED) if told_within else stage
        for child in stage.children:
            yield from leaves_and_branches(child, f"{prefix}{name}/")


def _is_unknown(stage: StageReport) -> bool:
    """Whether the report does not claim to know that its effect stands, or that it doesn't."""
    kept_in_part = bool(stage.effects) and stage.compensation is None and stage.state in {StageState.FAILED, StageState.CANCELLED}
    return stage.state in _UNKNOWN or kept_in_part


def is_same(expected: object, found: object) -> bool:
    """Whether two looks at the world gave the same.

    Raises:
        MisuseError: They can't be compared: an array or a table answers for each of its parts.
    """
    try:
        return bool(expected == found)
    except (RuntimeError, TypeError, ValueError) as error:  # as torch, polars and numpy refuse
        raise _not_plain(error) from None


def _not_plain(error: Exception) -> MisuseError:
    hint = "Give plain values: lists of tuples for rows, a list for an array or what can be gone through once"
    return MisuseError("a look() that gives a value to keep and compare", got=str(error), hint=hint)


def difference(expected: object, found: object) -> str:
    """The lines in which two values differ: what was expected after a minus, what was found after a plus."""
    before, after = pformat(expected, width=100).splitlines(), pformat(found, width=100).splitlines()
    lines = [line for line in difflib.unified_diff(before, after, n=1, lineterm="") if not line.startswith(("---", "+++", "@@"))]
    if not lines:
        return f"    two values that print the same and are not equal: {pformat(found, width=100)}"
    more = [f"    ... {len(lines) - _LINES} lines more"] if len(lines) > _LINES else []
    return "\n".join([f"    {line}" for line in lines[:_LINES]] + more)
