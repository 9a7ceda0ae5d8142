"""What a saga is told of those that its stages ran: where they stand, and what came late in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from saga.errors import LedgerCorrupt, SagaNotFound
from saga.events import SagaEnded, SagaResumed, SagaTurnedBack, StageProbed, StageSettled, StageStarted, TurnReason, Verdict
from saga.failures import Failure, FailureKind
from saga.family import children_of, events_of, is_turned_back, sagas_above, turns_back
from saga.graph import Role
from saga.keys import execution_key, execution_of
from saga.ledger import StageState, listed, recorded
from saga.recovery.record import Step, undo_step
from saga.recovery.resumption import status_at_rest
from saga.recovery.state import SagaState
from saga.report import NestedSagaFailed, SagaReport

if TYPE_CHECKING:
    from saga.events import AnyEvent
    from saga.ledger import Ledger

_DONE: Final = frozenset({StageState.UNDONE, StageState.FAILED, StageState.CANCELLED, StageState.SKIPPED, StageState.FALLBACK})
"""The states of stages that may have run sagas of which nothing is left to be undone."""


async def report_of(ledger: Ledger, saga_id: str) -> SagaReport:
    """The report of a saga, with those that its stages run.

    What came late in one of those, and has not been told to it because a process died in between, is in it as if it had been (promise 5).

    Raises:
        SagaNotFound: The ledger has no such saga.
    """
    return (await _read(ledger, saga_id)).report


async def report_with_children(ledger: Ledger, state: SagaState, exceptions: Mapping[Failure, BaseException]) -> SagaReport:
    """The report of a saga of which somebody has the state, with those that its stages run; it also tells which of them can't be read."""
    return _report(state, *await _within(ledger, state.started.saga_id, state), exceptions)


class _Whole(NamedTuple):
    """A saga with all that is below it, as their events leave it.

    Attributes:
        state: Where it stands.
        report: Its report, with those that its stages run.
        late_at: When something last came late to it, or within it, since it has come to rest; None if nothing has.
    """

    state: SagaState
    report: SagaReport
    late_at: datetime | None


async def _read(ledger: Ledger, saga_id: str, *, is_turned_back: bool | None = None) -> _Whole:
    """Read a saga and all that is below it; None: whether those above it let it go forward is yet to be found out."""
    events = [*await events_of(ledger, saga_id)]
    state = SagaState(events)
    if is_turned_back is None:
        is_turned_back = await _is_turned_back(ledger, state)
    children, unread = await _within(ledger, saga_id, None if is_turned_back else state)
    news: list[StageProbed | StageSettled] = []
    for child in children if state.ended_at is not None else ():
        at = _unheard_since(events, child)
        if at is not None and (event := heard(state, child.state, child.report)) is not None:
            news.append(_as_of(event, at))
            state.apply(news[-1])
    if news:
        state.apply(SagaEnded(status=status_at_rest(state), at=max(event.at for event in news)))
    report = _report(state, children, unread, is_turned_back=is_turned_back)
    return _Whole(state, report, _came_late_at(saga_id, [*events, *news]))


async def _is_turned_back(ledger: Ledger, state: SagaState) -> bool:
    """Whether those above a saga let it go forward no more."""
    try:
        return await is_turned_back(ledger, await sagas_above(ledger, state), state.started.saga_id)
    except (LedgerCorrupt, SagaNotFound):
        # Damaged, or just forgotten: what the saga did is known all the same, and nobody takes it forward from there.
        return True


async def _within(ledger: Ledger, saga_id: str, state: SagaState | None) -> tuple[list[_Whole], dict[str, dict[str, str]]]:
    """The sagas that a saga's stages run, oldest first; and by stage and id those that can't be read, with what the ledger says.

    They go forward as the saga's state lets them; None: not at all.
    """
    children: list[_Whole] = []
    unread: dict[str, dict[str, str]] = {}
    for child, stage in await children_of(ledger, saga_id):
        try:
            children.append(await _read(ledger, child, is_turned_back=state is None or turns_back(state, stage, child)))
        except SagaNotFound:
            # Forgotten since it was listed, and the saga that ran it with it: nothing was left to do about either.
            continue
        except LedgerCorrupt as damage:
            # To read it again changes nothing, and what its parent did is known all the same.
            unread.setdefault(stage, {})[child] = str(damage)
    return children, unread


def _report(
    state: SagaState,
    within: Sequence[_Whole],
    unread: Mapping[str, Mapping[str, str]],
    exceptions: Mapping[Failure, BaseException] | None = None,
    *,
    is_turned_back: bool = False,
) -> SagaReport:
    children: dict[str, tuple[SagaReport, ...]] = {}
    for child in within:
        stage = str(child.report.parent_stage)
        children[stage] = (*children.get(stage, ()), child.report)
    return SagaReport.of(state, children, exceptions, unread, is_turned_back=is_turned_back)


async def reports_of(ledger: Ledger, children: Sequence[str]) -> list[SagaReport]:
    """The reports of children of a saga that is alive."""
    # It lets them go forward. To read for each of them what it has recorded would take longer, the more there are.
    return [(await _read(ledger, child, is_turned_back=False)).report for child in children]


async def has_left(ledger: Ledger, children: Sequence[str]) -> bool:
    """Whether anything stands, or may stand, of any of these sagas."""
    for child in children:
        state = SagaState(await events_of(ledger, child))
        if state.ended_at is None or _stands(state):
            return True
    return False


def _stands(state: SagaState) -> bool:
    return any(undo_step(node, state.stages[node.name]) is not Step.CLEAR for node in state.graph.nodes)


def heard(state: SagaState, child: SagaState, report: SagaReport) -> StageProbed | StageSettled | None:
    """What follows for a saga when something has come late in one that its stage ran; None if nothing does.

    Args:
        state: The saga's.
        child: Of the one that its stage ran.
        report: That one's.
    """
    stage, child_id = str(child.started.parent_stage), child.started.saga_id
    node, record = state.graph[stage], state.stages[stage]
    if node.role is Role.PLAIN:
        # It has declared no effect, whatever it runs.
        return None
    if (execution := execution_of(child_id, state.started.saga_id, stage)) != record.execution:
        # Its stage finds it no more, whatever it comes to.
        if not _stands(child):
            return None
        return StageProbed(stage=stage, landed=None, failure=_replaced(state, stage, child_id, execution), held=True)
    if record.state is StageState.STUCK:
        # What was in the way of undoing it may be gone.
        why = f"something came late in its saga {child_id}, which is {report.status.value}"
        return StageSettled(stage=stage, verdict=Verdict.RETRY, note=why, by=f"saga {child_id}")
    # Beyond a point of no return of its own a stage is done with, too: what came late may be on this side of that.
    is_done_with = record.state in _DONE and (record.past_pivot or undo_step(node, record, spares=True) is Step.CLEAR)
    # What came late in one that had halted is kept there, and in nobody's question; yet it stands.
    is_news = not report.clean or (is_done_with and _stands(child))
    # Running it again goes on with a child that has not turned back, or only to be rid of what serves nothing.
    goes_on = record.state is StageState.KEPT and node.idempotent and child.reason in {None, TurnReason.ORPHANS}
    if record.is_kept_by_word or not is_news or not (is_done_with or goes_on):
        return None
    message = f"something came late: {NestedSagaFailed(report)}"
    failure = Failure.of(stage, FailureKind.COMPENSATION, message, attempt=record.attempts)
    held = any(inner.held is not None for inner in child.stages.values())
    return StageProbed(stage=stage, landed=None, failure=failure, held=held)


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


async def unheard(ledger: Ledger, saga_id: str, events: Sequence[AnyEvent]) -> list[str]:
    """The sagas that a saga's stages ran in which something came late since they have come to rest, and of which it has not heard.

    It is told behind them, in a ledger of its own: a process may die in between.
    """
    children, _ = await _within(ledger, saga_id, None)  # of those that can't be read, whoever asks for the report is told
    return [child.report.saga_id for child in children if _unheard_since(events, child) is not None]


async def recorded_around(ledger: Ledger, state: SagaState) -> datetime:
    """When something was last recorded of the sagas above one, or of those that it runs, by whosever clock.

    What comes late in it comes behind that, and only times tell so across ledgers: a clock may be set back, or be another machine's.
    """
    above = [event.at for saga_id, _ in await sagas_above(ledger, state) for event in await recorded(ledger, saga_id)]
    below, _ = await listed(ledger, parent=state.started.saga_id)
    return max([state.started.at, *above, *(entry.updated_at for entry in below.values())])


def _unheard_since(events: Sequence[AnyEvent], child: _Whole) -> datetime | None:
    """Since when something has come late in one that a stage ran, and its saga has not heard of it; None if it has, or nothing has."""
    if (at := child.late_at) is None:
        return None
    stage = str(child.report.parent_stage)
    execution, now = execution_of(child.report.saga_id, str(child.report.parent), stage), 1
    for event in events:
        if isinstance(event, StageStarted) and event.stage == stage:
            now = event.execution
        if not isinstance(event, StageProbed | StageSettled) or event.stage != stage or event.at < at:
            continue
        # Another execution finds nothing of this one by itself: a person is asked for a word, or has said it.
        if now == execution or _is_for_all(event):
            return None
    return at


def _is_for_all(event: StageProbed | StageSettled) -> bool:
    """Whether a person is asked, or has said, what stands of a stage, whichever execution of it that is of."""
    if isinstance(event, StageSettled):
        return event.verdict is not Verdict.RETRY
    return event.failure is not None and event.failure.kind is FailureKind.LATE


def _as_of(event: StageProbed | StageSettled, at: datetime) -> StageProbed | StageSettled:
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
