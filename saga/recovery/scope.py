"""What going backward is about, and what stays: pure, a matter of the graph and of where its stages stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from saga.events import TurnReason
from saga.graph import Node, Role
from saga.ledger import StageState
from saga.policies import ContinueWithFallback
from saga.quick import members
from saga.recovery.record import StageRecord, Step, undo_step

if TYPE_CHECKING:
    from saga.recovery.state import SagaState

_S: Final = members(StageState)
_REASON: Final = members(TurnReason)
_ROLE: Final = members(Role)
_STEP: Final = members(Step)


def _may_stay(state: SagaState) -> bool:
    """Whether anything may stay when the saga goes backward: some stage is past a point of no return, or a person had a word on one."""
    pivots = state.graph.points_of_no_return
    for name, record in state.stages.items():  # noqa: SIM110 - a generator takes twice as long
        if record.past_pivot or record.settled is not None or (record.landed and name in pivots):
            return True
    return False


def protected(state: SagaState) -> frozenset[str]:
    """What is never compensated: completed pivots, what a person said is to be kept, and everything that they depend on (promise 10)."""
    if not _may_stay(state):
        return frozenset()
    pivots = state.graph.points_of_no_return
    stays = [
        name for name, record in state.stages.items() if record.past_pivot or (record.landed and (name in pivots or record.is_kept_by_word))
    ]
    return state.graph.with_ancestors(stays)


def orphans(state: SagaState) -> frozenset[str]:
    """Stages that completed and serve nothing that is kept: all that depends on them failed or fell away with them."""
    idle: set[str] = set()
    lost: set[str] = set()
    for name in reversed(state.graph.names):
        record = state.stages[name]
        dependents = state.graph.dependents[name]
        if record.with_branch or (record.failed and not record.fell_back):
            idle.add(name)
        elif dependents and idle.issuperset(dependents):
            idle.add(name)
            lost.add(name)
    return frozenset(lost) - protected(state)


def groundless(state: SagaState) -> set[str]:
    """What depends on a stage that failed, and that nothing stands in for: it stands on it only if that ran anew beneath it."""
    found: set[str] = set()
    for node in state.graph.nodes:
        below = (state.stages[name] for name in node.dependencies)
        if not found.isdisjoint(node.dependencies) or any(record.failed and not record.fell_back for record in below):
            found.add(node.name)
    return found


def _useless(state: SagaState, reason: TurnReason) -> set[str]:
    """The stages that serve nothing that stays when the saga goes backward for this reason: all of them is undone, their fallbacks, too."""
    if reason is not _REASON.ORPHANS:
        return set(state.graph.names) - protected(state)
    # Read off what happened forward, which stays: a stage that is undone or stuck meanwhile is still one of them.
    lost = orphans(state) if isinstance(state.policy, ContinueWithFallback) and state.policy.orphans == "compensate" else frozenset()
    return (groundless(state) - protected(state)) | lost


def undo_scope(state: SagaState, reason: TurnReason) -> set[str]:
    """The stages that going backward for this reason is about; the others stand and hold nothing up."""
    if reason is not _REASON.ORPHANS and not _may_stay(state):
        return set(state.graph.names)  # as nearly always: nothing is protected and nothing stands for good, whatever else is so
    scope, begun = _useless(state, reason), []
    for name, record in state.stages.items():
        if reason is _REASON.ORPHANS:
            if record.failed or record.skip_reason is not None:
                scope.add(name)
        elif record.fell_back or record.past_pivot:
            # What a fallback stands in for is no foundation of what followed, so nothing protects its remains; nor does a stage's own
            # point of no return protect what is within it, where that can be undone all the same, or a person has to say what stands.
            scope.add(name)
        if record.undo_in_question and record.state is _S.COMPENSATING:
            # Whatever is known since of what protects it: its undoing may have got through as its process died, so to repeat it is to know.
            begun.append(name)
    scope -= _standing(state)
    scope.update(begun)
    return scope


def spared(state: SagaState, reason: TurnReason) -> frozenset[str]:
    """The stages of whose fallbacks the sagas stay, because what uses them does."""
    ran = [name for name, record in state.stages.items() if record.fallback_ran]
    return frozenset(ran) - _useless(state, reason) if ran else frozenset()


def left_to_undo(state: SagaState, reason: TurnReason) -> dict[str, Step]:
    """The stages of the scope of which something stands, or may stand, and what undoing them comes to next."""
    records = state.stages
    unclear = [node for node in state.graph.nodes if undo_step(node, records[node.name]) is not _STEP.CLEAR]
    if not unclear:
        # As when all has been undone. To spare a fallback's sagas leaves less to undo, never more: what the scope is need not be known.
        return {}
    scope, stays = undo_scope(state, reason), spared(state, reason)
    steps = {node.name: undo_step(node, records[node.name], spares=node.name in stays) for node in unclear if node.name in scope}
    return {name: step for name, step in steps.items() if step is not _STEP.CLEAR}


def _standing(state: SagaState) -> set[str]:
    """What stands for good: by a person's word, or because nobody can undo it and a person can say nothing new of it."""
    standing, kept = set(), []
    pivots = state.graph.points_of_no_return
    for name, record in state.stages.items():
        if record.is_kept_by_word:
            kept.append(name)
        elif (name in pivots or record.past_pivot) and _stands_by_pivot(state.graph[name], record):
            standing.add(name)
    if kept:
        # A word keeps what it is about and all that this stands on, which the remains of a replaced stage are not.
        standing.update(kept, (name for name in state.graph.with_ancestors(kept) if not state.stages[name].fell_back))
    return standing


def _stands_by_pivot(node: Node, record: StageRecord) -> bool:
    if node.role is _ROLE.PIVOT and record.landed:
        # Behind its fallback it serves nothing, but it has landed.
        return True
    return record.past_pivot and undo_step(node, record) is _STEP.HOLD and not record.is_in_question
