"""Who runs whom: a saga in its ledger, those whose stages run it, and those that its stages run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from saga.blueprint import Blueprint
from saga.errors import LedgerCorrupt, MisuseError, SagaNotFound
from saga.events import SagaStarted, SagaStatus
from saga.keys import execution_of
from saga.ledger import MemoryLedger, StageState, answering, is_name, listed, recorded
from saga.recovery.record import Step, undo_step
from saga.recovery.state import SagaState
from saga.text import shown

if TYPE_CHECKING:
    from saga.events import AnyEvent
    from saga.graph import Node
    from saga.ledger import Entry, Ledger
    from saga.recovery.record import StageRecord


async def events_of(ledger: Ledger, saga_id: str) -> Sequence[AnyEvent]:
    """All events of a saga, oldest first.

    Raises:
        MisuseError: It is no id.
        SagaNotFound: The ledger has no such saga.
    """
    refuse_no_id(saga_id)
    events = await recorded(ledger, saga_id)
    if not events:
        hint = "This ledger is in memory: without ledger= every SagaCoordinator has its own." if isinstance(ledger, MemoryLedger) else ""
        raise SagaNotFound("the id of a saga in the ledger", got=repr(saga_id), hint=hint)
    return events


def refuse_no_id(saga_id: object) -> None:
    """Refuse what can't be the id of a saga.

    Raises:
        MisuseError: It is no str.
    """
    if not isinstance(saga_id, str):
        raise MisuseError("the id of a saga", got=shown(saga_id), hint="An id is a str.")


async def differences_from(ledger: Ledger, state: SagaState, blueprint: Blueprint) -> list[str]:
    """How a pipeline differs from the one that a saga was started with; or those nested in it, from those of its children that stand."""
    found = state.graph.differences(blueprint.graph)
    nested = {name: offer.nested_pipeline for name, offer in blueprint.stages.items() if offer.nested_pipeline is not None}
    if found or not nested:
        return found
    entries, _ = await listed(ledger, parent=state.started.saga_id)

    def is_its_own(child: Entry) -> bool:
        pipeline = nested.get(stage := str(child.parent_stage))
        # Of another name it is what a fallback ran, and whoever goes on with it says by which pipeline.
        return pipeline is not None and (child.pipeline == pipeline.name or not state.graph[stage].has_fallback)

    children = [child for child in entries.values() if is_its_own(child)]
    ran = {child.parent_stage for child in children}
    found += [
        f"stage {name!r} runs a saga now, and may have had an effect itself before"
        for name in nested
        if name not in ran and _may_have_acted(state.graph[name], state.stages[name], blueprint.graph[name])
    ]
    for child in children:
        if child.status is SagaStatus.COMPENSATED:
            continue
        with suppress(LedgerCorrupt, SagaNotFound):  # whoever goes on with it meets that, or nobody has to
            pipeline = nested[stage := str(child.parent_stage)]
            inner = SagaState(await events_of(ledger, child.saga_id))
            differences = renamed(inner, pipeline.name) or await differences_from(ledger, inner, Blueprint.of(pipeline))
            found += [f"within stage {stage!r}: {difference}" for difference in differences]
    return found


def _may_have_acted(node: Node, record: StageRecord, now: Node) -> bool:
    """Whether a stage that is nested now may have had an effect before it was: asked, its saga would say that nothing has landed."""
    if (node.can_probe, node.undo_in_doubt, node.idempotent) == (now.can_probe, now.undo_in_doubt, now.idempotent):
        return False  # it offers what it did, which for a nested one is nearly always all of that: it is the same
    return record.state is StageState.RUNNING or record.doubt or undo_step(node, record) is Step.PROBE


def renamed(state: SagaState, name: str) -> list[str]:
    """Say in a sentence that a pipeline of that name is not the one that a saga was started with; empty when it may be."""
    started = state.started.pipeline
    return [] if name == started else [f"its pipeline is {started!r}, this one is {name!r}"]


async def children_of_execution(ledger: Ledger, saga_id: str, children: Sequence[str], key: str) -> list[str]:
    """Those of a saga's children that an execution of a stage has run: their ids begin with the execution's idempotency key."""
    found = [child for child in children if child == key or child.startswith(f"{key}#")]
    # One that a damaged ledger does not list would be forgotten, or run a second time: the first is also asked for by its name.
    lost = await recorded(ledger, key) if key not in found and is_name(key) else ()
    return [key, *found] if any(isinstance(event, SagaStarted) and event.parent == saga_id for event in lost[:1]) else found


async def children_of(ledger: Ledger, saga_id: str) -> list[tuple[str, str]]:
    """The sagas that a saga's stages run, oldest first, with the stages; behind them those whose rows make no sense, by their events."""
    entries, damaged = await listed(ledger, parent=saga_id)
    found = [(child, str(entry.parent_stage)) for child, entry in entries.items()]
    return found + [(child, str(SagaState(await events_of(ledger, child)).started.parent_stage)) for child in damaged]


async def sagas_below(ledger: Ledger, saga_id: str, stage: str | None = None) -> list[Entry]:
    """All sagas below a saga, or below one of its stages, the upper ones first."""
    found: list[Entry] = []
    with answering("list its sagas"):
        children = await ledger.list(parent=saga_id)
    for child in children:
        if stage is None or child.parent_stage == stage:
            found += [child, *await sagas_below(ledger, child.saga_id)]
    return found


async def sagas_above(ledger: Ledger, state: SagaState) -> list[tuple[str, str]]:
    """The sagas and stages that run a saga, the outermost first; those of them that the ledger has."""
    found: list[tuple[str, str]] = []
    while (parent := state.started.parent) is not None and (events := await recorded(ledger, parent)):
        found.insert(0, (parent, str(state.started.parent_stage)))
        state = SagaState(events)
    return found


async def is_turned_back(ledger: Ledger, above: Sequence[tuple[str, str]], saga_id: str) -> bool:
    """Whether a saga goes forward no more, whatever its own way: one above goes backward, or its stage is done with it.

    Args:
        ledger: The ledger.
        above: The sagas and stages that run it, the outermost first.
        saga_id: Its id.

    Raises:
        SagaNotFound: One of those is no longer in the ledger.
    """
    ids = [*(parent for parent, _ in above), saga_id]
    for (parent, stage), child in zip(above, ids[1:], strict=True):
        if turns_back(SagaState(await events_of(ledger, parent)), stage, child):
            return True
    return False


def turns_back(state: SagaState, stage: str, child_id: str) -> bool:
    """Whether a saga that a stage of this one ran goes forward no more, because of this one."""
    if state.status in {SagaStatus.COMPENSATING, SagaStatus.STUCK} and state.reason is not None:
        return True
    record = state.stages.get(stage)  # a damaged row may name another one
    if record is None:
        return False
    is_done_with = record.state in {StageState.KEPT, StageState.FALLBACK}
    return is_done_with or execution_of(child_id, state.started.saga_id, stage) != record.execution


async def is_left_alone(ledger: Ledger, state: SagaState, *, is_undone: bool) -> bool:
    """Whether the sagas above one have come to rest, and the stage that ran it has nothing left to do about it.

    Args:
        ledger: The ledger.
        state: The saga's.
        is_undone: Whether it would be undone whole, so that the stage must not stand on it; else it goes on with what it has begun itself.
    """
    above = [SagaState(await recorded(ledger, saga_id)) for saga_id, _ in await sagas_above(ledger, state)]
    stage, parent = str(state.started.parent_stage), above[-1]
    node, record = parent.graph[stage], parent.stages[stage]
    if any(saga.ended_at is None for saga in above):
        return False
    if execution_of(state.started.saga_id, parent.started.saga_id, stage) != record.execution:
        return True
    if record.state in {StageState.KEPT, StageState.FALLBACK} and not is_undone:
        return True
    step = undo_step(node, record, spares=state.started.saga_id not in record.fallback_ran)
    is_for_a_person = record.has_late_question or record.state in {StageState.IN_DOUBT, StageState.FALLBACK}
    return step is Step.CLEAR or (step is Step.HOLD and is_for_a_person)


async def located(ledger: Ledger, state: SagaState, path: str) -> list[tuple[str, str]]:
    """The sagas and stages that a path leads through, from a saga on, the outermost first.

    Raises:
        MisuseError: It leads to no stage, or to several.
    """
    ways = await _ways(ledger, state, path)
    if not ways:
        raise MisuseError(f"a stage of saga {state.started.saga_id} ({', '.join(state.stages)})", got=repr(path))
    if len(ways) > 1:
        # Whichever is in question: said twice, a path that leads to what is left would lead to another one the second time.
        raise MisuseError(
            "the path of one stage",
            got=f"{path!r}, which leads to {len(ways)}",
            hint=f"Name one of them: {', '.join(map(_spelled_out, ways))}.",
        )
    return ways[0]


def _spelled_out(way: Sequence[tuple[str, str]]) -> str:
    """The path that leads this way and no other."""
    (outermost, _), (innermost, stage) = way[0], way[-1]
    return f"{innermost}/{stage}".removeprefix(f"{outermost}/")


async def _ways(ledger: Ledger, state: SagaState, path: str) -> list[list[tuple[str, str]]]:
    """Where a path may lead from a saga on."""
    saga_id = state.started.saga_id
    if path in state.stages:
        return [[(saga_id, path)]]
    first, _, rest = path.partition("/")
    children = await children_of(ledger, saga_id) if rest else []
    # Whoever has the very id that a path begins with is meant by it, whatever other sagas the stage has run.
    named = [(child, stage) for child, stage in children if child == f"{saga_id}/{first}"]
    found: list[list[tuple[str, str]]] = []
    for child, stage in named or [(child, stage) for child, stage in children if stage == first]:
        inner = SagaState(await events_of(ledger, child))
        found += [[(saga_id, stage), *way] for way in await _ways(ledger, inner, rest)]
    return found
