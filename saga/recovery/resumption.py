"""Going on with a saga that nobody runs: what is recorded, and what is then to be done. Pure, like all that decides.

A crash is no second code path: what the dead process left open is recorded as failed attempts, and the same plan is entered later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from saga.errors import MisuseError
from saga.events import (
    AnyEvent,
    CompensationFailed,
    SagaResumed,
    SagaStatus,
    SagaTurnedBack,
    StageFailed,
    StageSettled,
    TurnReason,
    Verdict,
)
from saga.failures import Failure, FailureKind
from saga.graph import Graph, Role
from saga.ledger import StageState
from saga.policies import ContinueWithFallback, Policy
from saga.recovery.moves import Rollback, final_status, stage_states, status_of_cancelled, stopping, verdicts_on
from saga.recovery.state import SagaState

_S = StageState
_UNSETTLED: Final = "nothing can be undone before what is stuck or in doubt is settled"


class Direction(Enum):
    """Where a saga goes on to."""

    FORWARD = auto()
    BACKWARD = auto()
    CONCLUDE = auto()
    """Its forward run had been stopped: what follows from that is still to be done."""
    NOWHERE = auto()
    """Nothing is left to do."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """How a saga goes on.

    Attributes:
        direction: Where to.
        events: What is recorded first.
        reason: Going backward, why.
        stop: To be concluded, what had stopped it.
        why_not: Going nowhere, why.
    """

    direction: Direction
    events: tuple[AnyEvent, ...] = ()
    reason: TurnReason | None = None
    stop: Failure | None = None
    why_not: str = ""


Decision = Callable[[Sequence[AnyEvent], Graph | None], Chapter]
"""How a saga goes on, from its ledger and its stages with what they offer from here on; None: as before."""


def resumption(
    events: Sequence[AnyEvent],
    graph: Graph | None = None,
    *,
    policy: Policy | None = None,
    forward: bool | None,
    by: str,
    by_its_stage: bool = False,
) -> Chapter:
    """How a saga goes on that is resumed.

    Args:
        events: Its ledger.
        graph: Its stages with what they offer from here on; None: as before.
        policy: Its policy from here on; None: as before.
        forward: As the caller wants it: None, True or False.
        by: Who resumes it.
        by_its_stage: Whether the stage that ran it does; by anybody else one that a stage ran is resumed only when that is done with it.

    Raises:
        MisuseError: It would run stages again that are in doubt.
    """
    state = SagaState(events)
    state.graph, state.policy = graph or state.graph, policy or state.policy
    ahead = SagaResumed(forward=True, policy=policy, graph=graph, by=by)
    back = SagaResumed(forward=False, policy=policy, graph=graph, by=by)
    if state.ended_at is None:
        if state.reason is not None:
            return Chapter(Direction.BACKWARD, (back, *crashed(state, goes_on=False)), state.reason)
        stop = stopped_by(state)
        direction = Direction.FORWARD if stop is None else Direction.CONCLUDE
        return Chapter(direction, (ahead, *crashed(state, goes_on=stop is None)), stop=stop)
    is_left_alone = state.started.parent is not None and not by_its_stage
    if state.status is SagaStatus.STUCK and (state.reason is not None or is_left_alone) and not forward:
        # One that never turned back could not undo yet what serves nothing in it.
        reason = state.reason or TurnReason.ORPHANS
        begun = (back,) if state.reason is not None else (SagaTurnedBack(reason=reason), back)
        if not len(Rollback(SagaState([*events, *begun]), reason)):
            return Chapter(Direction.NOWHERE, why_not=_UNSETTLED)
        return Chapter(Direction.BACKWARD, begun, reason)
    if state.status is SagaStatus.COMPENSATED and not forward:
        # Whoever has just settled the last stage that was stuck wants it undone, not begun again.
        return Chapter(Direction.NOWHERE, why_not="it is undone, and runs once more only when it is told to go forward")
    if state.status in {SagaStatus.COMPLETED, SagaStatus.DEGRADED}:
        trial = SagaState([*events, ahead])
        if not any(record.again for record in trial.stages.values()):
            return Chapter(Direction.NOWHERE, why_not=f"it is {state.status.value}, nothing is left to run")
    _refuse_undecided(state)
    return Chapter(Direction.FORWARD, (ahead,))


def recovering(events: Sequence[AnyEvent], graph: Graph | None = None, *, by: str) -> Chapter:
    """How a saga goes on that had not come to rest when it was looked for."""
    if SagaState(events).ended_at is not None:
        # Whoever was faster may have left it halted, and nobody has asked to run it once more.
        return Chapter(Direction.NOWHERE, why_not="it has come to rest meanwhile")
    return resumption(events, graph, forward=None, by=by)


def undoing(events: Sequence[AnyEvent], graph: Graph | None = None, *, by: str) -> Chapter:
    """How a saga goes on that is undone on demand."""
    state = SagaState(events)
    if state.status is SagaStatus.COMPENSATING:
        rest = resumption(events, graph, forward=False, by=by)
        if rest.reason is not TurnReason.ORPHANS:
            return rest
        # It was only to lose what served nothing; now nothing of it is to stay.
        return replace(rest, events=(*rest.events, SagaTurnedBack(reason=TurnReason.REQUEST)), reason=TurnReason.REQUEST)
    turned = SagaTurnedBack(reason=TurnReason.REQUEST, graph=graph)
    begun = (*crashed(state, goes_on=False), turned)
    if state.ended_at is not None and not len(Rollback(trial := SagaState([*events, *begun]), TurnReason.REQUEST)):
        comes_to = final_status(trial)
        # A halted saga waits to be resumed, which nobody wants of one that is to be undone.
        if state.status is not SagaStatus.HALTED or comes_to is not SagaStatus.COMPENSATED:
            is_stuck = comes_to is SagaStatus.STUCK
            return Chapter(Direction.NOWHERE, why_not=_UNSETTLED if is_stuck else "nothing that can be undone is left")
    return Chapter(Direction.BACKWARD, begun, TurnReason.REQUEST)


def stopped_by(state: SagaState) -> Failure | None:
    """What had stopped a forward run whose process died, as far as its ledger tells; None if it may go on."""
    if state.stop is not None:
        return state.stop
    found = [failure for name, failure in stopping(state) if not _awaits_fallback(state, name)]
    cancelled = (record for record in state.stages.values() if record.state is _S.CANCELLED and not record.again)
    found += [record.failure for record in cancelled if record.failure is not None]
    return state.first_of(found)


def _awaits_fallback(state: SagaState, name: str) -> bool:
    if not isinstance(state.policy, ContinueWithFallback):
        return False
    return name in state.policy.fallbacks or (state.graph[name].has_fallback and not state.stages[name].fallback_failed)


def status_at_rest(state: SagaState) -> SagaStatus:
    """Where a saga stands that had come to rest, after something became known of one of its stages."""
    if state.reason is not None:
        return final_status(state)
    halted_by = state.cause.kind if state.status is SagaStatus.HALTED and state.cause is not None else None
    if state.status is SagaStatus.CANCELLED or halted_by is FailureKind.CANCELLED:
        return status_of_cancelled(state)
    if state.status not in {SagaStatus.COMPLETED, SagaStatus.DEGRADED, SagaStatus.COMPENSATED, SagaStatus.STUCK}:
        return state.status
    # What a fallback had stood in for has come late: it serves nothing, and stands.
    return SagaStatus.STUCK if len(Rollback(state, TurnReason.ORPHANS)) else final_status(state)


def crashed(state: SagaState, *, goes_on: bool) -> list[StageFailed | CompensationFailed]:
    """What the death of a saga's process has done to what was under way.

    Args:
        state: The saga's, as its process left it.
        goes_on: Whether stages that were running are attempted again.
    """
    found: list[StageFailed | CompensationFailed] = []
    message = "its process is gone; what became of it is not in the ledger"
    for name, record in state.stages.items():
        if record.state is _S.COMPENSATING:
            failure = Failure.of(name, FailureKind.CRASHED, message, attempt=record.undo_attempts)
            found.append(CompensationFailed(stage=name, failure=failure, will_retry=True))
        elif record.state is _S.RUNNING and record.tries[-1].is_open:
            failure = Failure.of(name, FailureKind.CRASHED, message, attempt=record.attempts)
            in_doubt = state.graph[name].role is not Role.PLAIN
            found.append(StageFailed(stage=name, failure=failure, in_doubt=in_doubt, will_retry=goes_on))
        elif record.state is _S.RUNNING and not goes_on:
            assert record.failure is not None  # it waited for its next attempt
            found.append(StageFailed(stage=name, failure=record.failure))
    return found


def _refuse_undecided(state: SagaState) -> None:
    """Refuse to run stages again of which nobody has said, and nothing can tell, that they may."""
    held = [name for name, record in state.stages.items() if record.held is not None]
    if held:
        raise MisuseError(
            "a saga in which nothing that came late waits for a person",
            got=f"{', '.join(held)} in doubt, of which something came late",
            hint="Look what stands, put it right by hand, then settle the innermost stage as kept or undone.",
        )
    unfit = [(node, state.stages[node.name]) for node in state.graph.nodes if not node.idempotent]
    unfit = [(node, record) for node, record in unfit if not (record.fallback_serves or record.may_repeat)]
    undecided = [node.name for node, record in unfit if record.doubt and record.state in {_S.IN_DOUBT, _S.STUCK} and not node.can_probe]
    if undecided:
        raise MisuseError(
            "a saga whose stages in doubt can be asked, or can run again",
            got=f"{', '.join(undecided)} in doubt, without a probe and not idempotent",
            hint="Look whether the effect has landed, then settle it as kept or undone.",
        )
    in_part = [node.name for node, record in unfit if record.undone_in_part]
    if in_part:
        raise MisuseError(
            "a saga whose half undone stages can run again",
            got=f"{', '.join(in_part)}, not idempotent",
            hint="Put it right by hand, then settle it as kept or undone; or go on backward.",
        )


def refusal(state: SagaState, said: StageSettled, *, is_turned_back: bool) -> MisuseError | None:
    """Why a person's word on a stage can't be taken; None if it can.

    Args:
        state: Where its saga stands.
        said: The word.
        is_turned_back: Whether that saga goes forward no more, though it has not turned back itself.
    """
    record = state.stages[said.stage]
    if said.output is not None and said.verdict is not Verdict.KEPT:
        return MisuseError("an output only of what is kept", got=f"one with {said.verdict}", stage=said.stage)
    if state.ended_at is None:
        return MisuseError(
            "a saga that has come to rest",
            got=f"one that is {state.status.value}",
            stage=said.stage,
            hint="If its process is gone, go on with it first: saga recover, or coordinator.recover(pipelines).",
        )
    verdicts = verdicts_on(state, said.stage, is_turned_back=is_turned_back)
    if not verdicts:
        shown = stage_states(state)[said.stage]
        return MisuseError("a stage that is stuck or in doubt", got=f"one that is {shown.value}", stage=said.stage)
    # Of one of which something came late, what is kept may be what that gave.
    has_its_own = record.landed and record.output is not None and not record.has_late_question
    if said.output is not None and (has_its_own or record.fell_back):
        own = "its fallback's" if record.fell_back else "its own"
        return MisuseError("an output only of a stage that gave none", got=f"one beside {own}", stage=said.stage)
    if said.verdict not in verdicts:
        hint = "It has neither a probe nor a compensation that copes with doubt."
        if record.has_late_question:
            hint = "Something of it came late: to ask, undo or run it tells nothing of that."
        return MisuseError(" or ".join(verdicts), got=said.verdict, stage=said.stage, hint=hint)
    return None
