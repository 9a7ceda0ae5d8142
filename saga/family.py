"""Who runs whom: a saga in its ledger, those whose stages run it, and those that its stages run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from saga.errors import LedgerCorrupt, MisuseError, SagaNotFound
from saga.ledger import StageState
from saga.recovery import SagaState, stage_states
from saga.report import SagaReport

if TYPE_CHECKING:
    from saga.events import AnyEvent
    from saga.failures import Failure
    from saga.ledger import Ledger


async def events_of(ledger: Ledger, saga_id: str) -> Sequence[AnyEvent]:
    """All events of a saga, oldest first.

    Raises:
        SagaNotFound: The ledger has no such saga.
    """
    events = await ledger.read(saga_id)
    if not events:
        raise SagaNotFound("the id of a saga in the ledger", got=repr(saga_id))
    return events


async def report_of(ledger: Ledger, saga_id: str) -> SagaReport:
    """The report of a saga, with those that its stages run.

    Raises:
        SagaNotFound: The ledger has no such saga.
    """
    return await report_with_children(ledger, SagaState(await events_of(ledger, saga_id)), {})


async def report_with_children(ledger: Ledger, state: SagaState, exceptions: Mapping[Failure, BaseException]) -> SagaReport:
    """The report of a saga of which somebody has the state, with those that its stages run; it also tells which of them can't be read."""
    children: dict[str, tuple[SagaReport, ...]] = {}
    unread: dict[str, dict[str, str]] = {}
    for entry in await ledger.list(parent=state.started.saga_id):
        stage = str(entry.parent_stage)
        try:
            children[stage] = (*children.get(stage, ()), await report_of(ledger, entry.saga_id))
        except LedgerCorrupt as damage:
            # To read it again changes nothing, and what its parent did is known all the same.
            unread.setdefault(stage, {})[entry.saga_id] = str(damage)
    return SagaReport.of(state, children, exceptions, unread)


async def reports_of(ledger: Ledger, saga_id: str, stage: str, prefix: str) -> list[SagaReport]:
    """The children of a saga's stage, oldest first; those whose ids begin so."""
    entries = await ledger.list(parent=saga_id)
    ids = [entry.saga_id for entry in entries if entry.parent_stage == stage]
    return [await report_of(ledger, child) for child in ids if child == prefix or child.startswith(f"{prefix}#")]


async def run_by(ledger: Ledger, state: SagaState) -> list[tuple[str, str]]:
    """The sagas and stages that run a saga, the outermost first; those of them that the ledger has."""
    found: list[tuple[str, str]] = []
    while (parent := state.started.parent) is not None and (events := await ledger.read(parent)):
        found.insert(0, (parent, str(state.started.parent_stage)))
        state = SagaState(events)
    return found


async def located(ledger: Ledger, state: SagaState, path: str) -> list[tuple[str, str]]:
    """The sagas and stages that a path leads through, from a saga on, the outermost first.

    Of several sagas that a stage has run it leads to the one with something to settle there, else to the last.

    Raises:
        MisuseError: It leads to no stage, or to several that are to be settled.
    """
    places = await _places(ledger, state, path)
    if not places:
        raise MisuseError(f"a stage of saga {state.started.saga_id} ({', '.join(state.stages)})", got=repr(path))
    unsettled = [place for place in places if place.is_unsettled]
    if len(unsettled) > 1:
        # Told apart by their sagas' ids, which they have in the report; the first one's may be the path of all.
        unsettled = [place for place in unsettled if _spelled_out(place.way) == path] or unsettled
    if len(unsettled) > 1:
        raise MisuseError(
            "one stage that is stuck or in doubt",
            got=f"{path!r}, which leads to {len(unsettled)}",
            hint=f"Name one of them: {', '.join(_spelled_out(place.way) for place in unsettled)}.",
        )
    return (unsettled or places)[0].way


class _Place(NamedTuple):
    """Where a path leads.

    Attributes:
        way: The sagas and stages that it leads through, the outermost first.
        is_unsettled: Whether the stage is stuck or in doubt.
    """

    way: list[tuple[str, str]]
    is_unsettled: bool


def _spelled_out(way: Sequence[tuple[str, str]]) -> str:
    """The path that leads this way and no other."""
    (outermost, _), (innermost, stage) = way[0], way[-1]
    return f"{innermost}/{stage}".removeprefix(f"{outermost}/")


async def _places(ledger: Ledger, state: SagaState, path: str) -> list[_Place]:
    """Where a path leads from a saga on, to the last of several children first."""
    saga_id = state.started.saga_id
    if path in state.stages:
        shown = stage_states(state, state.policy)[path]
        return [_Place([(saga_id, path)], shown in {StageState.STUCK, StageState.IN_DOUBT})]
    found: list[_Place] = []
    for child in reversed(await ledger.list(parent=saga_id) if "/" in path else ()):
        stage = str(child.parent_stage)
        for name in {stage, child.saga_id.removeprefix(f"{saga_id}/")}:
            if path.startswith(f"{name}/"):
                below = SagaState(await events_of(ledger, child.saga_id))
                places = await _places(ledger, below, path.removeprefix(f"{name}/"))
                found += [_Place([(saga_id, stage), *place.way], place.is_unsettled) for place in places]
    return found
