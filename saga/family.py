"""Who runs whom: a saga in its ledger, those whose stages run it, and those that its stages run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from saga.blueprint import Blueprint
from saga.compensable import execution_key, execution_of
from saga.errors import LedgerCorrupt, MisuseError, SagaNotFound
from saga.events import (
    SagaEnded,
    SagaResumed,
    SagaStarted,
    SagaStatus,
    SagaTurnedBack,
    StageProbed,
    StageSettled,
    StageStarted,
    TurnReason,
    Verdict,
)
from saga.failures import Failure, FailureKind
from saga.graph import Role
from saga.ledger import MemoryLedger, StageState, answering, is_name, listed, recorded
from saga.record import Step, undo_step
from saga.recovery import SagaState
from saga.report import NestedSagaFailed, SagaReport
from saga.resumption import status_at_rest
from saga.text import shown

if TYPE_CHECKING:
    from saga.events import AnyEvent
    from saga.ledger import Entry, Ledger

_DONE: Final = frozenset({StageState.UNDONE, StageState.FAILED, StageState.CANCELLED, StageState.SKIPPED, StageState.FALLBACK})
"""The states of stages that may have run sagas of which nothing is left to be undone."""


async def events_of(ledger: Ledger, saga_id: str) -> Sequence[AnyEvent]:
    """All events of a saga, oldest first.

    Raises:
        MisuseError: It is no id.
        SagaNotFound: The ledger has no such saga.
    """
    _refuse_no_id(saga_id)
    events = await recorded(ledger, saga_id)
    if not events:
        hint = "This ledger is in memory: without ledger= every SagaCoordinator has its own." if isinstance(ledger, MemoryLedger) else ""
        raise SagaNotFound("the id of a saga in the ledger", got=repr(saga_id), hint=hint)
    return events


def _refuse_no_id(saga_id: object) -> None:
    if not isinstance(saga_id, str):
        raise MisuseError("the id of a saga", got=shown(saga_id))


async def report_of(ledger: Ledger, saga_id: str) -> SagaReport:
    """The report of a saga, with those that its stages run.

    What came late in one of those, and has not been told to it because a process died in between, is in it as if it had been (promise 5).

    Raises:
        SagaNotFound: The ledger has no such saga.
    """
    return (await _told(ledger, saga_id)).report


async def report_with_children(ledger: Ledger, state: SagaState, exceptions: Mapping[Failure, BaseException]) -> SagaReport:
    """The report of a saga of which somebody has the state, with those that its stages run; it also tells which of them can't be read."""
    return _report(state, *await _within(ledger, state.started.saga_id), exceptions)


class _Told(NamedTuple):
    """A saga as its events, and those of the sagas below it, leave it.

    Attributes:
        state: Where it stands.
        report: Its report, with those that its stages run.
        late_at: When something last came late to it, or within it, since it has come to rest; None if nothing has.
    """

    state: SagaState
    report: SagaReport
    late_at: datetime | None


async def _told(ledger: Ledger, saga_id: str) -> _Told:
    events = [*await events_of(ledger, saga_id)]
    state = SagaState(events)
    children, unread = await _within(ledger, saga_id)
    news: list[StageProbed | StageSettled] = []
    for child in children if state.ended_at is not None else ():
        stage, at = str(child.report.parent_stage), child.late_at
        execution = execution_of(child.report.saga_id, saga_id, stage)
        if at is None or _has_heard(events, stage, execution, at) or (event := heard(state, child.state, child.report)) is None:
            continue
        news.append(_told_at(event, at))
        state.apply(news[-1])
    if news:
        state.apply(SagaEnded(status=status_at_rest(state), at=max(event.at for event in news)))
    return _Told(state, _report(state, children, unread), _came_late_at(saga_id, [*events, *news]))


async def _within(ledger: Ledger, saga_id: str) -> tuple[list[_Told], dict[str, dict[str, str]]]:
    """The sagas that a saga's stages run, oldest first; and by stage and id those that can't be read, with what the ledger says."""
    children: list[_Told] = []
    unread: dict[str, dict[str, str]] = {}
    for child, stage in await run_in(ledger, saga_id):
        try:
            children.append(await _told(ledger, child))
        except SagaNotFound:
            # Forgotten since it was listed, and the saga that ran it with it: nothing was left to do about either.
            continue
        except LedgerCorrupt as damage:
            # To read it again changes nothing, and what its parent did is known all the same.
            unread.setdefault(stage, {})[child] = str(damage)
    return children, unread


def _report(
    state: SagaState,
    within: Sequence[_Told],
    unread: Mapping[str, Mapping[str, str]],
    exceptions: Mapping[Failure, BaseException] | None = None,
) -> SagaReport:
    children: dict[str, tuple[SagaReport, ...]] = {}
    for child in within:
        stage = str(child.report.parent_stage)
        children[stage] = (*children.get(stage, ()), child.report)
    return SagaReport.of(state, children, exceptions, unread)


async def reports_of(ledger: Ledger, saga_id: str, stage: str, prefix: str) -> list[SagaReport]:
    """The children of a saga's stage, oldest first; those whose ids begin so."""
    return [await report_of(ledger, child) for child in await _run_within(ledger, saga_id, stage, prefix)]


async def has_left(ledger: Ledger, saga_id: str, stage: str, prefix: str) -> bool:
    """Whether anything stands, or may stand, of the children of a saga's stage; of those whose ids begin so."""
    for child in await _run_within(ledger, saga_id, stage, prefix):
        state = SagaState(await events_of(ledger, child))
        if state.ended_at is None or _stands(state):
            return True
    return False


def _stands(state: SagaState) -> bool:
    return any(undo_step(node, state.stages[node.name]) is not Step.CLEAR for node in state.graph.nodes)


async def differences_from(ledger: Ledger, state: SagaState, blueprint: Blueprint) -> list[str]:
    """How a pipeline differs from the one that a saga was started with; or those nested in it, from those of its children that stand."""
    found = state.graph.differences(blueprint.graph)
    nested = {name: plan.nested_pipeline for name, plan in blueprint.stages.items() if plan.nested_pipeline is not None}
    if found or not nested:
        return found
    entries, _ = await listed(ledger, parent=state.started.saga_id)
    for child in entries.values():
        pipeline = nested.get(str(child.parent_stage))
        if pipeline is None or child.status is SagaStatus.COMPENSATED:
            continue
        with suppress(LedgerCorrupt, SagaNotFound):  # whoever goes on with it meets that, or nobody has to
            inner = SagaState(await events_of(ledger, child.saga_id))
            differences = await differences_from(ledger, inner, Blueprint.of(pipeline))
            found += [f"within stage {child.parent_stage!r}: {difference}" for difference in differences]
    return found


async def _run_within(ledger: Ledger, saga_id: str, stage: str, prefix: str) -> list[str]:
    ids = [child for child, runner in await run_in(ledger, saga_id) if runner == stage]
    found = [child for child in ids if child == prefix or child.startswith(f"{prefix}#")]
    # One that a damaged ledger does not list would be forgotten, or run a second time: the first is also asked for by its name.
    lost = await recorded(ledger, prefix) if prefix not in found and is_name(prefix) else ()
    return [prefix, *found] if any(isinstance(event, SagaStarted) and event.parent == saga_id for event in lost[:1]) else found


async def run_in(ledger: Ledger, saga_id: str) -> list[tuple[str, str]]:
    """The sagas that a saga's stages run, oldest first, with the stages; behind them those whose rows make no sense, by their events."""
    entries, damaged = await listed(ledger, parent=saga_id)
    found = [(child, str(entry.parent_stage)) for child, entry in entries.items()]
    return found + [(child, str(SagaState(await events_of(ledger, child)).started.parent_stage)) for child in damaged]


async def below(ledger: Ledger, saga_id: str, stage: str | None = None) -> list[Entry]:
    """All sagas below a saga, or below one of its stages, the upper ones first."""
    found: list[Entry] = []
    with answering("list its sagas"):
        children = await ledger.list(parent=saga_id)
    for child in children:
        if stage is None or child.parent_stage == stage:
            found += [child, *await below(ledger, child.saga_id)]
    return found


async def run_by(ledger: Ledger, state: SagaState) -> list[tuple[str, str]]:
    """The sagas and stages that run a saga, the outermost first; those of them that the ledger has."""
    found: list[tuple[str, str]] = []
    while (parent := state.started.parent) is not None and (events := await recorded(ledger, parent)):
        found.insert(0, (parent, str(state.started.parent_stage)))
        state = SagaState(events)
    return found


async def is_turned_back(ledger: Ledger, above: Sequence[tuple[str, str]], saga_id: str) -> bool:
    """Whether a saga goes forward no more, whatever its own way: one above goes backward, or its stage has gone on with another execution.

    Args:
        ledger: The ledger.
        above: The sagas and stages that run it, the outermost first.
        saga_id: Its id.
    """
    ids = [*(parent for parent, _ in above), saga_id]
    for (parent, stage), child in zip(above, ids[1:], strict=True):
        state = SagaState(await recorded(ledger, parent))
        if state.status is SagaStatus.STUCK and state.reason is not None:
            return True
        if execution_of(child, parent, stage) != state.stages[stage].execution:
            return True
    return False


def heard(state: SagaState, child: SagaState, report: SagaReport) -> StageProbed | StageSettled | None:
    """What follows for a saga when something has come late in one that its stage ran; None if nothing does.

    Args:
        state: The saga's.
        child: Of the one that its stage ran.
        report: That one's.
    """
    stage, child_id = str(child.started.parent_stage), child.started.saga_id
    node, record = state.graph[stage], state.stages[stage]
    if (execution := execution_of(child_id, state.started.saga_id, stage)) != record.execution:
        # Its stage finds it no more, whatever it comes to.
        if node.role is Role.PLAIN or not _stands(child):
            return None
        return StageProbed(stage=stage, landed=None, failure=_replaced(state, stage, child_id, execution), held=True)
    if record.state is StageState.STUCK:
        # What was in the way of undoing it may be gone.
        why = f"something came late in its saga {child_id}, which is {report.status.value}"
        return StageSettled(stage=stage, verdict=Verdict.RETRY, note=why, by=f"saga {child_id}")
    # Beyond a point of no return of its own a stage is done with, too: what came late may be on this side of that.
    is_done_with = record.state in _DONE and (record.past_pivot or undo_step(node, record) is Step.CLEAR)
    # What came late in one that had halted is kept there, and in nobody's question; yet it stands.
    is_news = not report.clean or (is_done_with and _stands(child))
    if not is_news or node.role is Role.PLAIN:
        return None
    # Running it again goes on with a child that has not turned back, or only to be rid of what serves nothing.
    goes_on = record.state is StageState.KEPT and node.idempotent and child.reason in {None, TurnReason.ORPHANS}
    if record.is_kept_by_word or not (is_done_with or goes_on):
        return None
    message = f"something came late: {NestedSagaFailed(report)}"
    failure = Failure.of(stage, FailureKind.COMPENSATION, message, attempt=record.attempts)
    held = any(inner.held is not None for inner in child.stages.values())
    return StageProbed(stage=stage, landed=None, failure=failure, held=held)


async def unheard(ledger: Ledger, saga_id: str, events: Sequence[AnyEvent]) -> list[str]:
    """The sagas that a saga's stages ran in which something came late since they have come to rest, and of which it has not heard.

    It is told behind them, in a ledger of its own: a process may die in between.
    """
    found: list[str] = []
    for child, stage in await run_in(ledger, saga_id):
        try:
            at = _came_late_at(child, await recorded(ledger, child))
        except LedgerCorrupt:
            continue  # whoever asks for the report is told
        if at is not None and not _has_heard(events, stage, execution_of(child, saga_id, stage), at):
            found.append(child)
    return found


def _has_heard(events: Sequence[AnyEvent], stage: str, execution: int, at: datetime) -> bool:
    """Whether a saga has heard since of what came late in one that an execution of its stage ran."""
    now = 1
    for event in events:
        if isinstance(event, StageStarted) and event.stage == stage:
            now = event.execution
        if not isinstance(event, StageProbed | StageSettled) or event.stage != stage or event.at < at:
            continue
        # Another execution finds nothing of this one by itself: a person is asked for a word, or has said it.
        if now == execution or _is_for_all(event):
            return True
    return False


def _is_for_all(event: StageProbed | StageSettled) -> bool:
    """Whether a person is asked, or has said, what stands of a stage, whichever execution of it that is of."""
    if isinstance(event, StageSettled):
        return event.verdict is not Verdict.RETRY
    return event.failure is not None and event.failure.kind is FailureKind.LATE


def _told_at(event: StageProbed | StageSettled, at: datetime) -> StageProbed | StageSettled:
    """What a saga hears, as of when it came to be: whoever reads the ledgers twice reads the same."""
    if isinstance(event, StageProbed) and event.failure is not None:
        event = replace(event, failure=event.failure.model_copy(update={"at": at}))
    return replace(event, at=at)


def _came_late_at(saga_id: str, events: Sequence[AnyEvent]) -> datetime | None:
    """When something last came late to a saga that nobody has gone on with since; None if nothing has."""
    is_at_rest, at = False, None
    for event in events:
        if isinstance(event, SagaEnded):
            is_at_rest = True
        elif isinstance(event, SagaResumed | SagaTurnedBack):
            is_at_rest, at = False, None
        elif is_at_rest and not (isinstance(event, StageSettled) and not event.by.startswith(f"saga {saga_id}/")):
            # All but a person's word, which whoever was cut off says again.
            at = event.at
    return at


def _replaced(state: SagaState, stage: str, child_id: str, execution: int) -> Failure:
    """That something came late in a saga of which the stage finds nothing any more, and what a person has to do about it."""
    record = state.stages[stage]
    now = f"execution {record.execution} (key {execution_key(state.started.saga_id, stage, record.execution)!r})"
    message = (
        f"something came late in its saga {child_id}, of execution {execution}, when the saga had gone on with {now}: it stands, and "
        f"nothing undoes it. Compensate {child_id} by itself, or look in the outside world and put it right by hand; then settle the "
        "stage: kept if what the saga counts on stands, undone if nothing does"
    )
    return Failure.of(stage, FailureKind.LATE, message, attempt=record.attempts)


async def is_left_alone(ledger: Ledger, state: SagaState, *, is_undone: bool) -> bool:
    """Whether the sagas above one have come to rest, and the stage that ran it has nothing left to do about it.

    Args:
        ledger: The ledger.
        state: The saga's.
        is_undone: Whether it would be undone whole, so that the stage must not stand on it; else it goes on with what it has begun itself.
    """
    above = [SagaState(await recorded(ledger, saga_id)) for saga_id, _ in await run_by(ledger, state)]
    stage, parent = str(state.started.parent_stage), above[-1]
    node, record = parent.graph[stage], parent.stages[stage]
    if any(saga.ended_at is None for saga in above):
        return False
    if execution_of(state.started.saga_id, parent.started.saga_id, stage) != record.execution:
        return True
    if record.state in {StageState.KEPT, StageState.FALLBACK} and not is_undone:
        return True
    step = undo_step(node, record)
    is_for_a_person = record.is_held or record.state in {StageState.IN_DOUBT, StageState.FALLBACK}
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
    children = await run_in(ledger, saga_id) if rest else []
    # Whoever has the very id that a path begins with is meant by it, whatever other sagas the stage has run.
    named = [(child, stage) for child, stage in children if child == f"{saga_id}/{first}"]
    found: list[list[tuple[str, str]]] = []
    for child, stage in named or [(child, stage) for child, stage in children if stage == first]:
        inner = SagaState(await events_of(ledger, child))
        found += [[(saga_id, stage), *way] for way in await _ways(ledger, inner, rest)]
    return found
