"""What to do next: pure, without I/O, without user code.

`conclude` says what follows when the forward run has ended, `Rollback` which effects may be undone now, `final_status` how
the saga ends. They depend on the events alone, in which graph and policy are, so that a resumed saga goes on exactly as the
interrupted one would have (promise 12).
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Collection, Iterator
from typing import Final

from saga.events import SagaStatus, TurnReason, Verdict
from saga.failures import Failure, FailureKind
from saga.graph import Role
from saga.ledger import StageState
from saga.policies import ContinueWithFallback
from saga.quick import frozen, maker, members
from saga.recovery.record import StageRecord, Step, undo_step
from saga.recovery.scope import left_to_undo, orphans, protected, spared, undo_scope
from saga.recovery.state import SagaState

_S: Final = members(StageState)
_ROLE: Final = members(Role)
_STEP: Final = members(Step)
_STATUS: Final = members(SagaStatus)
_REASON: Final = members(TurnReason)
_KIND: Final = members(FailureKind)


class Rollback:
    """Which effects may be undone now.

    A stage is open once every stage of the scope that depends on it, directly or through any number of others, is
    clear: has no effect standing (promise 1). It is then taken, undone and cleared, or held; what a
    held stage depends on never opens (promise 8).

    Each stage and each dependency is looked at once, so the whole is linear in the size of the graph.

    Attributes:
        is_stopped: No further stage is to be taken.
    """

    def __init__(self, state: SagaState, reason: TurnReason) -> None:
        self._nodes = state.graph.by_name
        self._records = state.stages
        self._on_failure = state.policy.compensation.on_failure
        self._spared = spared(state, reason)
        # For each stage of the scope, how many others of it that depend on it are not clear.
        self._waits = waits = dict.fromkeys(undo_scope(state, reason), 0)
        for name in waits:
            for dependency in self._nodes[name].dependencies:
                if dependency in waits:
                    waits[dependency] += 1
        self._open: list[tuple[int, str]] = []
        self.is_stopped = False
        self._open_or_pass([name for name, count in waits.items() if count == 0])

    def __len__(self) -> int:
        """How many stages could be taken now."""
        return 0 if self.is_stopped else len(self._open)

    def step(self, name: str) -> Step:
        """What undoing a stage of the scope comes to next."""
        return undo_step(self._nodes[name], self._records[name], spares=name in self._spared)

    def take(self) -> str | None:
        """Take the open stage that started last; None: there is none to be taken."""
        return heapq.heappop(self._open)[1] if self._open and not self.is_stopped else None

    def clear(self, name: str) -> None:
        """Nothing of this stage stands any more: what waited for it alone opens."""
        self._open_or_pass(self._release(name))

    def hold(self, name: str) -> None:
        """This stage stands and will go on standing."""
        if self._on_failure == "halt":
            self.stop()
        elif self._goes_past(name):
            self.clear(name)

    def _goes_past(self, name: str) -> bool:
        # Nothing goes past a pivot that has completed, or may have (promise 10).
        return self._on_failure == "continue" and not self._nodes[name].is_point_of_no_return

    def stop(self) -> None:
        """Let no further stage be taken."""
        self.is_stopped = True

    def _release(self, name: str) -> list[str]:
        freed, waits = [], self._waits
        for dependency in self._nodes[name].dependencies:
            if dependency in waits:
                waits[dependency] -= 1
                if waits[dependency] == 0:
                    freed.append(dependency)
        return freed

    def _open_or_pass(self, pending: list[str]) -> None:
        """Open these stages; in the place of one of which nothing is to be undone, or that holds nothing up, those that waited for it."""
        while pending:
            name = pending.pop()
            step = self.step(name)
            if step is not _STEP.CLEAR and step is not _STEP.HOLD:
                heapq.heappush(self._open, (-self._records[name].order, name))
            elif step is _STEP.CLEAR or self._goes_past(name):
                pending += self._release(name)


def stage_states(state: SagaState) -> dict[str, StageState]:
    """Where every stage stands, in topological order; each is in exactly one state (promise 4)."""
    blocked: Collection[str] = ()
    if state.status is _STATUS.STUCK:
        # One that never turned back had nothing that could be undone: what is left over waits until it can be.
        blocked = left_to_undo(state, state.reason or _REASON.ORPHANS)
    states = {}
    for name, record in state.stages.items():
        shown = record.state
        if shown is _S.STUCK:
            pass  # whatever else is to be said of it
        elif record.doubt and record.is_in_question:
            shown = _S.IN_DOUBT
        elif name in blocked:
            shown = _S.BLOCKED
        elif record.fell_back and shown is _S.UNDONE:
            shown = _S.FALLBACK
        states[name] = shown
    return states


def verdicts_on(state: SagaState, stage: str, *, is_turned_back: bool) -> tuple[Verdict, ...]:
    """What a person may say of a stage; nothing where nobody's word is asked for.

    Args:
        state: Where its saga stands.
        stage: The stage's name.
        is_turned_back: Whether that saga goes forward no more, though it has not turned back itself.
    """
    record = state.stages[stage]
    if state.ended_at is None or not record.is_in_question:
        return ()
    if record.has_late_question:
        # To ask, undo or run it tells nothing of what came late.
        return (Verdict.UNDONE, Verdict.KEPT)
    # Going forward, a retry runs it once more, unless a fallback stands in; going backward, something has to be there to be tried.
    goes_back = is_turned_back or state.reason is not None or record.fell_back
    if record.state is not _S.STUCK and goes_back and undo_step(state.graph[stage], _asked_anew(record)) is _STEP.HOLD:
        return (Verdict.UNDONE, Verdict.KEPT)
    return tuple(Verdict)


def _asked_anew(record: StageRecord) -> StageRecord:
    asked = copy.copy(record)
    asked.ask_anew()
    return asked


@frozen
class Move:
    """What follows when the forward run has ended.

    Attributes:
        turn: Why the saga goes backward; None: it ends here.
        cause: What stopped it; None when it ran to its end.
        status: How it ends if it doesn't go backward; None: as `final_status` says.
    """

    turn: TurnReason | None = None
    cause: Failure | None = None
    status: SagaStatus | None = None


_move: Final = maker(Move)


def stopping(state: SagaState) -> Iterator[tuple[str, Failure]]:
    """The stages whose failure the policy lets stop the saga, unless a fallback stands in."""
    if isinstance(state.policy, ContinueWithFallback) and state.policy.without_fallback == "skip_branch":
        return
    for name, record in state.stages.items():
        failure = record.failure
        if failure is None or record.again or not record.attempts_failed or record.state not in {_S.FAILED, _S.IN_DOUBT}:
            continue
        if failure.kind is not _KIND.INTERRUPTED:
            yield name, failure


def unabsorbed(state: SagaState) -> Failure | None:
    """The first failure of a stage that the policy lets stop the saga."""
    return state.first_of(failure for _, failure in stopping(state))


def conclude(state: SagaState, stop: Failure | None) -> Move:
    """What follows when the forward run has ended.

    Args:
        state: No stage is running.
        stop: What first stopped the run: a stage's failure or CANCEL, the deadline, the caller; None if nothing did.
    """
    if stop is None and state.is_spotless:
        return _move()
    if stop is None or stop.kind is _KIND.CANCELLED:
        # A CANCEL asks to keep what was done; a stage that fails while the others drain outweighs it, and a process that dies does not.
        failed = unabsorbed(state)
        if stop is None or (failed is not None and failed.kind is not _KIND.CRASHED):
            stop = failed
    if stop is None:
        return _move(turn=_REASON.ORPHANS) if len(Rollback(state, _REASON.ORPHANS)) else _move()
    if stop.kind is _KIND.CANCELLED:
        if state.policy.on_cancel == "keep":
            return _move(cause=stop, status=_STATUS.CANCELLED)
        return _move(turn=_REASON.CANCEL, cause=stop)
    if stop.kind is _KIND.INTERRUPTED and stop.stage is None:
        if state.policy.on_interrupt == "halt":
            return _move(cause=stop, status=_STATUS.HALTED)
        return _move(turn=_REASON.INTERRUPT, cause=stop)
    if state.policy.on_failure == "halt":
        return _move(cause=stop, status=_STATUS.HALTED)
    return _move(turn=_REASON.FAILURE, cause=stop)


def _has_doubt(state: SagaState) -> bool:
    """Whether nobody knows of some stage whether its effect landed."""
    return any(record.doubt for record in state.stages.values())


def status_of_cancelled(state: SagaState) -> SagaStatus:
    """Where a saga stands that a stage has cancelled, and that keeps what it did."""
    # Nothing is left to do about one that is cancelled, and whoever prunes may forget it.
    return _STATUS.HALTED if _has_doubt(state) else _STATUS.CANCELLED


def final_status(state: SagaState) -> SagaStatus:
    """How a saga ends that ran to its end, or has gone backward as far as it could."""
    if state.reason is None and state.is_spotless:
        return _STATUS.COMPLETED
    is_forward = state.reason is None or state.reason is _REASON.ORPHANS
    unsettled = (is_forward and _has_doubt(state)) or (state.reason is not None and left_to_undo(state, state.reason))
    if unsettled:
        return _STATUS.STUCK
    for record in state.stages.values():
        # It may have left the scope: what came late, or a person's word, has given a use to what it was to be undone for.
        if record.state is _S.STUCK or (record.held is not None and record.has_late_question):
            return _STATUS.STUCK
    if not is_forward:
        return _STATUS.HALTED if protected(state) else _STATUS.COMPENSATED
    if not any(record.with_branch or record.failed for record in state.stages.values()):
        # What was undone, also by hand, did not do its part, unless it skipped itself or something stands in: it can be run once more.
        lacks = any(record.state is _S.UNDONE and record.skip_reason is None and not record.fell_back for record in state.stages.values())
        return _STATUS.HALTED if lacks else _STATUS.COMPLETED
    lost = orphans(state)
    if any(record.state is _S.KEPT or record.fell_back for name, record in state.stages.items() if name not in lost):
        return _STATUS.DEGRADED
    # Nothing came of it; but what the policy keeps all the same stands, and whoever runs this saga has to see to it.
    records = [state.stages[name] for name in lost if state.graph[name].role is not _ROLE.PLAIN]
    stands = any(record.state is _S.KEPT or record.fallback_ran for record in records)
    return _STATUS.HALTED if stands or protected(state) else _STATUS.COMPENSATED
