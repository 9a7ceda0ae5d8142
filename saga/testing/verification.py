"""Failing a saga everywhere, and proving that the world comes back: `verify`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pprint import pformat
from typing import TYPE_CHECKING, Any, Final

from stageflow.api import Pipeline

from saga.errors import LedgerError, MisuseError, SagaError
from saga.events import SagaEnded, SagaStatus, Verdict
from saga.failures import Failure, FailureKind
from saga.graph import Node, Role
from saga.keys import is_within
from saga.ledger import StageState
from saga.policies import FailFast, Policy
from saga.render.advice import goes_on
from saga.tasks import outlast, this_loop
from saga.testing.faults import KILLS, TIMEOUTS, UNDOING, Fault, FaultyActions, InjectedFault, Injection
from saga.testing.matrix import matrix
from saga.testing.outside import ID, Outside, World, difference, is_same, leaves_and_branches
from saga.testing.rehearsal import MortalLedger, Rehearsal
from saga.text import qualified

if TYPE_CHECKING:
    from saga.report import SagaReport

_OWN_FAULT: Final = frozenset({FailureKind.EXCEPTION, FailureKind.REPORTED, FailureKind.CONTRACT})
_INJECTED: Final = qualified(InjectedFault)


@dataclass(frozen=True, slots=True)
class Trial:
    """One saga with one fault in it.

    Attributes:
        fault: What went wrong.
        stage: Where, by its path; of a kill, the stage that the event or write was about, empty for one about the saga as a whole.
        events: Of a kill, the events that were not recorded any more, or those that were recorded last.
        reached: Whether the fault struck.
        report: How the saga came to rest; None if it never began.
        mended: How it came to rest when the fault was mended and the saga was resumed; None if that was not called for.
        wrong: How the world differed from the report, or what failed though nothing made it fail; empty if all was well.
    """

    fault: Fault
    stage: str
    reached: bool
    events: tuple[str, ...] = ()
    report: SagaReport | None = None
    mended: SagaReport | None = None
    wrong: str = ""

    @property
    def ok(self) -> bool:
        """Whether the fault struck, the world was where the report said, and nothing failed that nothing made fail."""
        return self.reached and not self.wrong

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
        """Whether all went well in every trial."""
        return all(trial.ok for trial in self.trials)

    def __str__(self) -> str:
        """Draw the matrix, and say what was wrong."""
        return matrix(self)


class VerificationFailed(AssertionError):
    """The world was not where a report said, something failed that nothing made fail, or a fault never struck.

    Attributes:
        verification: All that was found.
    """

    def __init__(self, verification: Verification) -> None:
        self.verification = verification
        super().__init__(str(verification))


async def verify(
    pipeline: Pipeline,
    policy: Policy | None,
    world: World,
    *,
    faults: Fault | Collection[Fault] = tuple(Fault),
    leave_out: str | Collection[str] = (),
    durable: bool = True,
    **context_fields: Any,
) -> Verification:
    """Fail every stage in turn, in every way, and kill the saga at every event; each time, look whether the world is where the report says.

    A saga that comes to rest stuck or halted is then mended and resumed, and looked at once more. The stages' own code runs, with their own
    timeouts; only the waits between attempts are left out.

    What a report says is in effect is checked by doing it: the stages that it keeps run in a new world, and the two have to be equal.

    A stage or a compensation that fails though nothing made it fail is wrong, too, and so is a saga that can't go on when the fault is
    mended.

    Args:
        pipeline: The pipeline; its stages work on the world.
        policy: The saga's; `FailFast()` if None.
        world: What the stages have their effects on. It is reset before every saga.
        faults: Which fault, or faults, to inject; all by default.
        leave_out: The stage, or stages, that no fault is injected at, by their paths: those that don't run with this input.
        durable: Give the stages of a resumed saga what others gave as a durable ledger keeps it; False: as it was.
        context_fields: The saga's input, as in `SagaCoordinator.run`.

    Returns:
        What was found. It is true of this input alone.

    Raises:
        VerificationFailed: The world was not where a report said, something failed that nothing made fail, or a fault never struck.
        MisuseError: Nothing can be verified: no fault is left to inject, the saga doesn't complete without any, or the world is not one,
            can't be reset or compared, or doesn't show what the saga does; or no event loop of asyncio runs.
    """
    this_loop()  # before the world is reset
    if isinstance(world, type) or not all(callable(getattr(world, part, None)) for part in ("reset", "look")):
        raise MisuseError("a world with reset() and look()", got=repr(world))
    if "saga_id" in context_fields:
        raise MisuseError("a saga without an id: the kit runs many, one after another", got=f"saga_id={context_fields['saga_id']!r}")
    chosen = _chosen(faults)
    verifier = _Verifier(pipeline, policy if policy is not None else FailFast(), world, durable=durable, fields=context_fields)
    stages = await verifier.begin()
    left_out = {leave_out} if isinstance(leave_out, str) else set(leave_out)
    if not left_out <= set(stages):
        unknown = ", ".join(map(repr, sorted(left_out - set(stages))))
        raise MisuseError(f"stages of pipeline {pipeline.name!r} to leave out ({', '.join(stages)})", got=unknown)
    try:
        trials = [trial async for trial in verifier.trials([name for name in stages if name not in left_out], chosen)]
    except asyncio.CancelledError as cancelled:
        cancelled.add_note(f"{pipeline.name!r} was being verified: {verifier.under_way}")
        raise
    if not trials:
        raise MisuseError(
            "a fault that can strike a stage", got=f"{', '.join(chosen)} at {', '.join(set(stages) - left_out) or 'no stage'}"
        )
    verification = Verification(pipeline.name, tuple(stages), tuple(trials))
    if not verification.ok:
        raise VerificationFailed(verification)
    return verification


def _chosen(faults: Fault | Collection[Fault]) -> list[Fault]:
    given = [faults] if isinstance(faults, str) else list(faults)
    unknown = [fault for fault in given if fault not in set(Fault)]
    if unknown or not given:
        raise MisuseError(f"faults to inject ({', '.join(Fault)})", got=", ".join(map(repr, unknown)) or "none")
    return [fault for fault in Fault if fault in given]


class _Verifier:
    """Plays one saga after another in one world.

    Attributes:
        under_way: What is tried now.
    """

    def __init__(self, pipeline: Pipeline, policy: Policy, world: World, *, durable: bool, fields: dict[str, Any]) -> None:
        self._pipeline = pipeline
        self._policy = policy
        self._outside = Outside(world, pipeline, policy, fields)
        self._durable = durable
        self._fields = fields
        self._ran: list[str] = []
        self.under_way = ""

    async def begin(self) -> list[str]:
        """Run the saga without any fault, to learn its stages and whether anything can be verified at all; their paths."""
        await self._outside.reset()
        before = await self._outside.look()
        again = await self._outside.look()
        if not is_same(before, again):
            got = f"one that gave (-), and then (+):\n{difference(before, again)}"
            hint = "Leave out what is new at each look, and give values that equal what they are copied from"
            raise MisuseError("a look() that gives the same as long as nothing happens", got=got, hint=hint)
        nothing = Injection()
        coordinator = self._coordinator(self._ledger(), nothing)
        report = await self._run(coordinator, nothing)
        after = await self._outside.look()
        if not report.ok:
            raise MisuseError("a saga that completes with this input when nothing is made to fail", got=f"this:\n{report}")
        if is_same(before, after):
            raise MisuseError("a look() that shows what the saga does", got=f"the same before it and after it: {pformat(after)}")
        self._outside.nodes |= coordinator.nodes
        await self._outside.reset()
        back = await self._outside.look()
        if not is_same(before, back):
            got = f"one that was (-), and is (+):\n{difference(before, back)}"
            raise MisuseError("a world that reset() puts back to where it was before the saga", got=got)
        stages = dict(leaves_and_branches(report))
        contradiction = await self._outside.contradiction(report, after, {})
        if contradiction:
            hint = (
                "Leave out of look() what differs from run to run (keys, times, numbers that are given anew, an order left to chance), "
                "and have reset() forget all that the world has seen, also keys"
            )
            skipped = [path for path, stage in stages.items() if stage.state is StageState.SKIPPED and not stage.children]
            if skipped:
                hint += f", and let no stage return SKIP that has had an effect (skipped: {', '.join(skipped)})"
            raise MisuseError("a world that looks the same whenever the same stages have run", got=contradiction, hint=hint)
        self._ran = [path for path, stage in stages.items() if stage.attempts]
        return list(stages)

    # -- what is tried -------------------------------------------------------------------------------------------

    async def trials(self, stages: Collection[str], faults: Collection[Fault]) -> AsyncIterator[Trial]:
        """Inject each fault at each stage; have the process die at every event, on the way there and on the way back."""
        for stage, fault in product(stages, (fault for fault in faults if fault not in KILLS)):
            if fault not in UNDOING or self._can_be_undone(self._outside.nodes[stage]):
                self.under_way = f"{fault}: {stage}"
                yield await self._trial(fault, stage)
        for kill in (fault for fault in faults if fault in KILLS):
            for turning in (None, *self._turnings(stages)):
                async for trial in self._kills(kill, turning):
                    yield trial
            async for trial in self._kills(kill, None, on_demand=True):
                yield trial

    @staticmethod
    def _can_be_undone(node: Node) -> bool:
        return node.role is Role.COMPENSABLE and not node.is_point_of_no_return

    def _turnings(self, stages: Collection[str]) -> Iterator[str]:
        """Where a saga is to turn back: at the end of each pipeline, and at each point of no return, before which nothing is kept."""
        ran = [path for path in self._ran if path in stages]
        last = {path.rpartition("/")[0]: path for path in ran}
        yield from (path for path in ran if path in last.values() or self._outside.nodes[path].is_point_of_no_return)

    async def _trial(self, fault: Fault, stage: str) -> Trial:
        trial = Trial(fault, stage, reached=False)
        # A stage is undone on demand, or, where a point of no return behind it forbids that, when the caller is cancelled before.
        for interrupts in (False, True) if fault in UNDOING else (False,):
            await self._outside.reset()
            injection = Injection(fault, stage, interrupts=interrupts)
            coordinator = self._coordinator(self._ledger(), injection)
            report = await self._run(coordinator, injection)
            try:
                if fault in UNDOING and not injection.reached:
                    report = await coordinator.compensate(ID, self._pipeline)
                if injection.reached:
                    return await self._concluded(replace(trial, reached=True, report=report), coordinator, injection)
            except SagaError as error:
                return replace(trial, reached=True, report=report, wrong=_stopped_by(error))
        # A compensation that fails by itself is never done when the fault would strike.
        return replace(trial, wrong=_own_fault(trial, report, injection.far))

    async def _kills(self, fault: Fault, turning: str | None, *, on_demand: bool = False) -> AsyncIterator[Trial]:
        """Have the process die at the first event or write, at the second, and so on to the last; each time another one goes on."""
        nth = 0
        while True:
            nth += 1
            self.under_way = f"{fault}: number {nth}" + (f", where {turning} turns back" if turning else ", on demand" if on_demand else "")
            await self._outside.reset()
            injection, ledger = Injection(turning=turning), self._ledger()
            coordinator = self._coordinator(ledger, injection)
            if on_demand:
                await self._run(coordinator, injection)
            ledger.die_at(nth, after=fault is Fault.KILLED_AFTER)
            trial = Trial(fault, "", reached=True)
            try:
                with contextlib.suppress(LedgerError):
                    await (coordinator.compensate(ID, self._pipeline) if on_demand else self._run(coordinator, injection))
                if ledger.struck_at is None:
                    return
                trial = replace(trial, stage=ledger.struck_at, events=ledger.struck_events)
                ledger.revive()
                coordinator = self._coordinator(ledger, injection)
                report = await self._gone_on_with(coordinator)
                trial = await self._concluded(replace(trial, report=report), coordinator, injection)
            except SagaError as error:
                trial = replace(trial, wrong=_stopped_by(error))
            yield trial
            if ledger.struck_at is None:
                return

    async def _gone_on_with(self, coordinator: Rehearsal) -> SagaReport | None:
        """What becomes of the saga whose process has died; None if it had not begun."""
        events = await coordinator.ledger.read(ID)
        if not events:
            return None
        if isinstance(events[-1], SagaEnded):
            # It had come to rest, so nobody goes on with it.
            return await coordinator.report(ID)
        return await coordinator.resume(ID, self._pipeline)

    async def _concluded(self, trial: Trial, coordinator: Rehearsal, injection: Injection) -> Trial:
        """Look at the world, mend the fault, resume, and look again."""
        self._outside.nodes |= coordinator.nodes
        found, far = await self._outside.look(), dict(injection.far)
        injection.lifted = True
        mended = None if trial.report is None else await self._mend(trial.report, coordinator)
        found_mended = await self._outside.look()
        # Last, because to know what a report means another world has to be made.
        wrong = [await self._outside.contradiction(trial.report, found, far), _own_fault(trial, trial.report, far)]
        if mended is not None and not any(wrong):
            wrong = [await self._outside.contradiction(mended, found_mended, injection.far), _own_fault(trial, mended, injection.far)]
            if trial.report is not None and trial.report.status is SagaStatus.HALTED and not mended.ok and not any(wrong):
                wrong = [_went_on_badly(mended)]
        return replace(trial, mended=mended, wrong="\n".join(filter(None, wrong)))

    async def _mend(self, report: SagaReport, coordinator: Rehearsal) -> SagaReport | None:
        """Do what the report asks a person to do, where that takes no look at the outside world; None if nothing is to be done."""
        innermost = [name for name in report.stuck if not any(is_within(other, name) for other in report.stuck)]
        # A stage whose own saga is stuck, or has halted, is in doubt for that alone.
        doubtful = [name for name in report.in_doubt if not (any(is_within(other, name) for other in innermost) or goes_on(name, report))]
        if (report.status is SagaStatus.HALTED and doubtful) or not (report.status is SagaStatus.HALTED or innermost):
            return None
        for name in innermost:
            await coordinator.settle(ID, name, Verdict.RETRY, "the injected fault is mended")
        return await coordinator.resume(ID, self._pipeline)

    # -- how a saga is run ---------------------------------------------------------------------------------------

    def _ledger(self) -> MortalLedger:
        return MortalLedger(durable=self._durable)

    def _coordinator(self, ledger: MortalLedger, injection: Injection) -> Rehearsal:
        impatient_of = [injection.stage] if injection.fault in TIMEOUTS else []
        return Rehearsal(
            self._policy, ledger, lambda blueprint, prefix: FaultyActions(blueprint, prefix, injection), impatient_of=impatient_of
        )

    async def _run(self, coordinator: Rehearsal, injection: Injection) -> SagaReport:
        caller = injection.caller = asyncio.create_task(coordinator.run(self._pipeline, saga_id=ID, **self._fields))
        try:
            await asyncio.wait({caller})
        except asyncio.CancelledError:
            # Whoever verifies is cancelled: the saga is undone before the cancel goes on.
            caller.cancel()
            await outlast({caller})
            raise
        return await coordinator.report(ID) if caller.cancelled() else caller.result()


def _stopped_by(error: SagaError) -> str:
    return f"It could not go on: {error}"


def _own_fault(trial: Trial, report: SagaReport | None, far: Mapping[str, float]) -> str:
    """What failed, forward or backward, though nothing made that fail, or was said without ground; empty if there is no such thing."""
    if report is None:
        return ""
    stages = dict(leaves_and_branches(report))
    for path, stage in stages.items():
        if stage.probed and path not in far:
            return f"The probe of {path} said that its effect had landed, and its code had never run."
        failure = None if stage.compensation is None else stage.compensation.failure
        if failure is None or failure.type == _INJECTED:
            continue
        # A process that died may have left half an effect, as a saga within may, and then a probe has nothing to say.
        unknown = stage.state is StageState.IN_DOUBT and path == trial.stage and trial.fault not in KILLS and not stage.children
        if unknown or stage.state is StageState.STUCK:
            return _unprovoked(report, _of(path, failure))
    failed = _own_failure(report)
    # What was struck may break at its next attempt for that, what is asked to stop may raise, and what a fallback gives may be too little.
    is_struck = trial.reached and trial.fault not in KILLS and failed is not None and failed.stage == trial.stage
    is_provoked = is_struck or trial.fault is Fault.CANCELS or any(stage.fallback for stage in stages.values())
    return "" if failed is None or is_provoked else _unprovoked(report, failed)


def _unprovoked(report: SagaReport, failure: Failure) -> str:
    return f"It is {report.status.value}, though nothing made this fail: {failure}"


def _went_on_badly(mended: SagaReport) -> str:
    """What failed on the way forward when the fault was mended; empty if nothing did, or by chance."""
    failed = _own_failure(mended)
    return f"The fault was mended, and it is {mended.status.value} all the same: {failed}" if failed is not None else ""


def _own_failure(report: SagaReport) -> Failure | None:
    """What stopped the saga on its way forward and was not made to; None if nothing did, or chance."""
    path = ""
    while report.cause is not None and report.cause.stage is not None:
        path += report.cause.stage
        children = report.stages[report.cause.stage].children
        if not children:
            own = report.cause.kind in _OWN_FAULT and report.cause.type != _INJECTED
            return _of(path, report.cause) if own else None
        path, report = f"{path}/", children[-1]
    return None


def _of(path: str, failure: Failure) -> Failure:
    return failure.model_copy(update={"stage": path})
