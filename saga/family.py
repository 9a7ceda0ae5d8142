"""Who runs whom: a saga in its ledger, those whose stages run it, and those that its stages run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from saga.errors import MisuseError, SagaNotFound
from saga.recovery import SagaState
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
    """The report of a saga of which somebody has the state, with those that its stages run."""
    children: dict[str, tuple[SagaReport, ...]] = {}
    for entry in await ledger.list(parent=state.started.saga_id):
        stage = str(entry.parent_stage)
        children[stage] = (*children.get(stage, ()), await report_of(ledger, entry.saga_id))
    return SagaReport.of(state, children, exceptions)


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

    Raises:
        MisuseError: It leads to no stage.
    """
    saga_id = state.started.saga_id
    if path in state.stages:
        return [(saga_id, path)]
    for stage in state.stages:
        if not path.startswith(f"{stage}/"):
            continue
        for child in reversed([entry for entry in await ledger.list(parent=saga_id) if entry.parent_stage == stage]):
            with contextlib.suppress(MisuseError):
                below = SagaState(await events_of(ledger, child.saga_id))
                return [(saga_id, stage), *await located(ledger, below, path.removeprefix(f"{stage}/"))]
    raise MisuseError(f"a stage of saga {saga_id} ({', '.join(state.stages)})", got=repr(path))
