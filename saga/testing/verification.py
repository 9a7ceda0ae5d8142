"""Failing a saga everywhere, and proving that the world comes back: `verify`."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, Final, Protocol

from stageflow.api import Pipeline, StageStatus

from saga.blueprint import Blueprint
from saga.errors import LedgerError, MisuseError
from saga.events import SagaStatus, Verdict
from saga.graph import Node, Role
from saga.ledger import MemoryLedger, StageState
from saga.policies import FailFast, Policy
from saga.testing.faults import KILLS, TIMEOUTS, UNDOING, Fault, FaultyActions, Injection, ReferenceActions, Standing
from saga.testing.matrix import difference, matrix
from saga.testing.rehearsal import MortalLedger, Rehearsal

if TYPE_CHECKING:
    from saga.report import SagaReport, StageReport

_ID: Final = "verified"
_PASSES: Final = frozenset({StageStatus.OK, StageStatus.SKIP})
_STANDS: Final = frozenset({StageState.KEPT, StageState.STUCK, StageState.BLOCKED})


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


@dataclass(frozen=True, slots=True)
class Trial:
    """One saga with one fault in it.

    Attributes:
        fault: What went wrong.
        stage: Where, by its path; of a kill, the stage that the write was about, empty for one about the saga as a whole.
        reached: Whether the fault struck.
        report: How the saga came to rest; None if it never began.
        mended: How it came to rest when the fault was mended and the saga was resumed; None if that was not called for.
        contradiction: How the world differed from the report; empty if it did not.
    """

    fault: Fault
    stage: str
    reached: bool
    report: SagaReport | None = None
    mended: SagaReport | None = None
    contradiction: str = ""

    @property
    def ok(self) -> bool:
        """Whether the fault struck, and the world was where the report said."""
        return self.reached and not self.contradiction

    @property
    def ending(self) -> tuple[SagaStatus, ...]:
        """The statuses in which the saga came to rest, the last one after the fault was mended; empty if it never began."""
        return tuple(report.status for report in (self.report, self.mended) if report is not None)


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of a saga that was failed everywhere.

    `str()` gives the matrix, stage by fault, and what was wrong.

    Attributes:
        pipeline: The pipeline's name.
        stages: The paths of its stages, in topological order, those of a nested saga behind the stage that runs it.
        trials: Each fault that was injected, and what came of it.
    """

    pipeline: str
    stages: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def ok(self) -> bool:
        """Whether every fault struck, and the world was where the report said, each time."""
        return all(trial.ok for trial in self.trials)

    def __str__(self) -> str:
        """Draw the matrix, and say what was wrong."""
        return matrix(self)


class VerificationFailed(AssertionError):
    """A fault never struck, or the world was not where the report said.

    Attributes:
        verification: All that was found.
    """

    def __init__(self, verification: Verification) -> None:
        self.verification = verification
        super().__init__(f"\n{verification}")


async def verify(
    pipeline: Pipeline,
    policy: Policy | None,
    world: World,
    *,
    faults: Collection[Fault] = tuple(Fault),
    leave_out: Collection[str] = (),
    durable: bool = True,
    **context_fields: Any,
) -> Verification:
    """Fail every stage in turn, in every way, and kill the saga at every write; each time, look whether the world is where the report says.

    A saga that comes to rest stuck or halted is then mended and resumed, and looked at once more. The stages' own code runs, with their own
    timeouts; only the waits between attempts are left out.

    What a report says is in effect is checked by doing it: the stages that it keeps run in a new world, and the two have to be equal.

    Args:
        pipeline: The pipeline; its stages work on the world.
        policy: The saga's; `FailFast()` if None.
        world: What the stages have their effects on. It is reset before every saga.
        faults: Which faults to inject; all by default.
        leave_out: Stages that no fault is injected at, by their paths: those that don't run with this input.
        durable: Hand what is resumed the outputs as a durable ledger would; False: as they were.
        context_fields: The saga's input, as in `SagaCoordinator.run`.

    Returns:
        What was found. It is true of this input alone.

    Raises:
        VerificationFailed: The world was not where a report said, or a fault never struck.
        MisuseError: Nothing can be verified: without any fault the saga doesn't complete, or the world can't be reset or compared.
    """
    verifier = _Verifier(pipeline, policy if policy is not None else FailFast(), world, durable=durable, fields=context_fields)
    stages = await verifier.begin()
    unknown = sorted(set(leave_out) - set(stages))
    if unknown:
        raise MisuseError(f"stages of pipeline {pipeline.name!r} to leave out ({', '.join(stages)})", got=", ".join(map(repr, unknown)))
    trials = [trial async for trial in verifier.trials([name for name in stages if name not in leave_out], frozenset(faults))]
    verification = Verification(pipeline.name, tuple(stages), tuple(trials))
    if not verification.ok:
        raise VerificationFailed(verification)
    return verification


class _Verifier:
    """Plays one saga after another in one world."""

    def __init__(self, pipeline: Pipeline, policy: Policy, world: World, *, durable: bool, fields: dict[str, Any]) -> None:
        self._pipeline = pipeline
        self._policy = policy
        self._world = world
        self._durable = durable
        self._fields = fields
        self._nodes: dict[str, Node] = {}
        self._looks: dict[tuple[frozenset[str], frozenset[str]], Any] = {}

    async def begin(self) -> list[str]:
        """Run the saga without any fault, to learn its stages and whether anything can be verified at all; their paths."""
        await self._reset()
        before = await self._look()
        coordinator = self._coordinator(self._ledger(), Injection())
        report = await self._run(coordinator, Injection())
        after = await self._look()
        if not report.ok:
            raise MisuseError("a saga that completes with this input when nothing is made to fail", got=f"this:\n{report}")
        self._nodes = coordinator.nodes
        await self._reset()
        if await self._look() != before:
            got = f"one that was (-), and is (+):\n{difference(before, await self._look())}"
            raise MisuseError("a world that reset() puts back to where it was before the saga", got=got)
        contradiction = await self._contradiction(report, after)
        if contradiction:
            hint = "Leave out of look() what differs from run to run: keys, times, numbers that are given anew each time"
            raise MisuseError("a world that looks the same whenever the same stages have run", got=contradiction, hint=hint)
        return [path for path, _ in _leaves_and_branches(report)]

    # -- what is tried -------------------------------------------------------------------------------------------

    async def trials(self, stages: Collection[str], faults: Collection[Fault]) -> AsyncIterator[Trial]:
        """Inject every fault at every stage; have the process die at every write, on the way there and on the way back."""
        for stage, at_stage in product(stages, (fault for fault in Fault if fault in faults and fault not in KILLS)):
            if at_stage not in UNDOING or self._nodes[stage].role is Role.COMPENSABLE:
                yield await self._trial(at_stage, stage)
        own = [name for name in self._pipeline_order() if name in stages]
        for fault in (fault for fault in KILLS if fault in faults):
            # Forward to the end; back from where most is undone, and from each point of no return, before which nothing is kept.
            turnings = dict.fromkeys([*own[-1:], *(name for name in own if self._nodes[name].is_point_of_no_return)])
            for turning in (None, *turnings):
                async for trial in self._kills(fault, turning):
                    yield trial
            async for trial in self._kills(fault, None, on_demand=True):
                yield trial

    def _pipeline_order(self) -> tuple[str, ...]:
        return Blueprint.of(self._pipeline).graph.names

    async def _trial(self, fault: Fault, stage: str) -> Trial:
        others = [name for name in reversed(self._pipeline_order()) if name != stage] if fault in UNDOING else []
        # A stage is undone on demand, or, when it stands before a point of no return, when a stage behind it fails.
        for turning in (None, *others):
            await self._reset()
            injection = Injection(fault, stage, turning)
            coordinator = self._coordinator(self._ledger(), injection)
            report = await self._run(coordinator, injection)
            if fault in UNDOING and not injection.reached:
                report = await coordinator.compensate(_ID, self._pipeline)
            if injection.reached:
                return await self._concluded(Trial(fault, stage, reached=True, report=report), coordinator, injection)
        return Trial(fault, stage, reached=False)

    async def _kills(self, fault: Fault, turning: str | None, *, on_demand: bool = False) -> AsyncIterator[Trial]:
        """Have the process die at the first write, at the second, and so on to the last; each time another one goes on."""
        write = 0
        while True:
            write += 1
            await self._reset()
            injection, ledger = Injection(turning=turning), self._ledger()
            coordinator = self._coordinator(ledger, injection)
            if on_demand:
                await self._run(coordinator, injection)
            ledger.die_at(write, after=fault is Fault.KILLED_AFTER)
            with contextlib.suppress(LedgerError):
                await (coordinator.compensate(_ID, self._pipeline) if on_demand else self._run(coordinator, injection))
            if ledger.struck_at is None:
                return
            ledger.revive()
            coordinator = self._coordinator(ledger, injection)
            report = await coordinator.resume(_ID, self._pipeline) if await ledger.read(_ID) else None
            yield await self._concluded(Trial(fault, ledger.struck_at, reached=True, report=report), coordinator, injection)

    async def _concluded(self, trial: Trial, coordinator: Rehearsal, injection: Injection) -> Trial:
        """Look at the world, mend the fault, resume, and look again."""
        found = await self._look()
        injection.lifted = True
        mended = None if trial.report is None else await self._mend(trial.report, coordinator)
        found_mended = await self._look()
        # Last, because to know what a report means another world has to be made.
        contradiction = await self._contradiction(trial.report, found)
        if mended is not None and not contradiction:
            contradiction = await self._contradiction(mended, found_mended)
        return replace(trial, mended=mended, contradiction=contradiction)

    async def _mend(self, report: SagaReport, coordinator: Rehearsal) -> SagaReport | None:
        """Do what the report asks a person to do, where that takes no look at the outside world; None if nothing is to be done."""
        if report.status is SagaStatus.HALTED and not report.in_doubt:
            return await coordinator.resume(_ID, self._pipeline)
        innermost = [name for name in report.stuck if not any(other.startswith(f"{name}/") for other in report.stuck)]
        if not innermost:
            return None
        for name in innermost:
            await coordinator.settle(_ID, name, Verdict.RETRY, "the injected fault is mended")
        return await coordinator.resume(_ID, self._pipeline)

    # -- what is in effect ---------------------------------------------------------------------------------------

    async def _contradiction(self, report: SagaReport | None, found: Any) -> str:
        """How what was found differs from what the report says; empty if it does not."""
        paths = {} if report is None else dict(_leaves_and_branches(report))
        certain = frozenset(path for path, stage in paths.items() if stage.state in _STANDS)
        doubtful = [path for path, stage in paths.items() if _is_unknown(stage)]
        fallbacks = {
            path: stage.failure for path, stage in paths.items() if stage.fallback and stage.failure and self._nodes[path].has_fallback
        }
        outputs = {path: stage.output for path, stage in paths.items() if stage.output is not None and stage.output.status in _PASSES}
        for landed in (landed for size in range(len(doubtful) + 1) for landed in combinations(doubtful, size)):
            expected = await self._reference(Standing(certain | frozenset(landed), fallbacks, outputs))
            if expected == found:
                return ""
        said = "it never began" if report is None else f"it is {report.status.value}"
        stands = f"what {', '.join(path for path in paths if path in certain)} did is in effect" if certain else "nothing is in effect"
        unknown = f", nobody knows about {', '.join(doubtful)}" if doubtful else ""
        return f"By the report {said}, {stands}{unknown}. Then the world would be (-), and is (+):\n{difference(expected, found)}"

    async def _reference(self, standing: Standing) -> Any:
        """What the world looks like when these stages, and no others, have run in it."""
        key = standing.stages, frozenset(standing.fallbacks)
        if key not in self._looks:
            await self._reset()
            coordinator = Rehearsal(FailFast(), MemoryLedger(), lambda blueprint, prefix: ReferenceActions(blueprint, prefix, standing))
            report = await coordinator.run(self._pipeline, saga_id=_ID, **self._fields)
            if not report.ok:
                stages = ", ".join(sorted(standing.stages))
                raise MisuseError(f"stages that run in a world in which no others do ({stages})", got=f"this:\n{report}")
            self._looks[key] = await self._look()
        return self._looks[key]

    async def _reset(self) -> None:
        await _answer(self._world.reset())

    async def _look(self) -> Any:
        return copy.deepcopy(await _answer(self._world.look()))

    # -- how a saga is run ---------------------------------------------------------------------------------------

    def _ledger(self) -> MortalLedger:
        return MortalLedger(durable=self._durable)

    def _coordinator(self, ledger: MortalLedger, injection: Injection) -> Rehearsal:
        impatient_of = [injection.stage] if injection.fault in TIMEOUTS else []
        return Rehearsal(
            self._policy, ledger, lambda blueprint, prefix: FaultyActions(blueprint, prefix, injection), impatient_of=impatient_of
        )

    async def _run(self, coordinator: Rehearsal, injection: Injection) -> SagaReport:
        caller = injection.caller = asyncio.create_task(coordinator.run(self._pipeline, saga_id=_ID, **self._fields))
        try:
            await asyncio.wait({caller})
        except asyncio.CancelledError:
            # Whoever verifies is cancelled: the saga is undone before the cancel goes on.
            caller.cancel()
            await asyncio.wait({caller})
            raise
        return await coordinator.report(_ID) if caller.cancelled() else caller.result()


async def _answer(given: Any) -> Any:
    return await given if inspect.isawaitable(given) else given


def _leaves_and_branches(report: SagaReport, prefix: str = "") -> Iterator[tuple[str, StageReport]]:
    """The stages by their paths, in topological order; those of a nested saga behind the stage that runs it."""
    for name, stage in report.stages.items():
        child = stage.children[-1] if stage.children else None
        # What a nested saga has left standing is told by its own stages.
        yield prefix + name, stage if child is None else replace(stage, state=StageState.SKIPPED)
        if child is not None:
            yield from _leaves_and_branches(child, f"{prefix}{name}/")


def _is_unknown(stage: StageReport) -> bool:
    """Whether the report does not claim to know that its effect stands, or that it doesn't."""
    kept_in_part = bool(stage.effects) and stage.compensation is None and stage.state in {StageState.FAILED, StageState.CANCELLED}
    return stage.state is StageState.IN_DOUBT or kept_in_part
