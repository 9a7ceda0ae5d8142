"""What is added to the ledger of a saga from beside its run: a person's word on a stage, and what came late."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from saga.errors import LedgerConflict, LedgerCorrupt, MisuseError
from saga.events import SagaEnded, StageProbed, StageSettled, Verdict
from saga.family import children_of, events_of, is_turned_back, located, sagas_above, sagas_below
from saga.graph import Role
from saga.keys import is_within
from saga.ledger import ALIVE, answering, recorded
from saga.live.journal import named, tell
from saga.log import LOG
from saga.recovery.late import Late, Latecomer, news_of
from saga.recovery.resumption import refusal, status_at_rest
from saga.recovery.state import SagaState
from saga.storable import storable
from saga.tasks import outlast, start
from saga.text import printable
from saga.within import heard, recorded_around, report_of, report_with_children, unheard

if TYPE_CHECKING:
    from saga.events import AnyEvent
    from saga.ledger import Ledger
    from saga.listeners import Listener
    from saga.live.held import Held
    from saga.live.saga import LiveSaga

_AGAIN: Final = 1.0
"""Seconds until what came late for a saga that another coordinator holds, or has died with, is recorded, if it is at rest by then."""


def _by_nobody(_: str) -> bool:
    return False


class Amendments:
    """Adds to the ledgers of sagas what others than their own runs have to say.

    Args:
        ledger: The ledger.
        held: The sagas that are held here.
        listeners: Who is told.
    """

    def __init__(self, ledger: Ledger, held: Held, listeners: Sequence[Listener]) -> None:
        self._ledger: Final = ledger
        self._held: Final = held
        self._listeners: Final = listeners
        self._late: Final[defaultdict[str, list[Late | _Within]]] = defaultdict(list)
        self._tasks: Final[set[asyncio.Task[None]]] = set()

    async def settle(self, saga_id: str, said: StageSettled) -> None:
        """Take a person's word on a stage, and have the sagas above it find out by trying again.

        Args:
            saga_id: The saga's id.
            said: The word; its stage may be a path.

        Raises:
            SagaNotFound: The ledger has no such saga.
            MisuseError: The word can't be taken, and was not recorded.
            LedgerConflict: Another coordinator holds the saga.
        """
        path = said.stage
        state = SagaState(await events_of(self._ledger, saga_id))
        *above, (owner, leaf) = [*await sagas_above(self._ledger, state), *await located(self._ledger, state, path)]
        said = dataclasses.replace(said, stage=leaf)
        for parent, _ in above:
            # The word is for those above, too: one that is taken below and not there would have to be said again.
            self._refuse_held(parent)
        with contextlib.suppress(LedgerConflict):  # the word is taken all the same, and whoever holds a saga has it hear
            await self.catch_up(above[0][0] if above else owner)
        if said.verdict is not Verdict.RETRY:
            await self._refuse_while_within(owner, said, path)
        goes_back = said.verdict is Verdict.RETRY and await is_turned_back(self._ledger, above, owner)
        refused = await self._settle(owner, said, is_turned_back=goes_back)
        # Whoever was cut off between the saga's ledger and those of the ones above it says it again.
        if refused is not None and not refused.is_repeated:
            raise refused.misuse
        is_news = refused is None
        for parent, name in reversed(above):
            # What runs the child is stuck because of it, and finds out by trying again.
            again = StageSettled(stage=name, verdict=Verdict.RETRY, note=f"{path} is settled as {said.verdict}: {said.note}", by=said.by)
            is_news = await self._settle(parent, again) is None or is_news
        if refused is not None and not is_news:
            raise refused.misuse

    async def catch_up(self, saga_id: str) -> None:
        """Have a saga at rest, and before it those below, hear what came late in the sagas that its stages ran, if it has not.

        One that is held here hears of it from whoever holds it, or behind that.

        Raises:
            LedgerConflict: Another coordinator holds one of them.
        """
        for child, _ in await children_of(self._ledger, saga_id):
            with contextlib.suppress(LedgerCorrupt):
                await self.catch_up(child)
        events = await recorded(self._ledger, saga_id)
        within = [_Within(child) for child in await unheard(self._ledger, saga_id, events)]
        if within and SagaState(events).ended_at is not None and not self._held.holds(saga_id):
            await self._amend(saga_id, partial(self._added, late=within))

    async def let_hear(self, saga_id: str, events: Sequence[AnyEvent]) -> None:
        """Have a saga that is gone on with hear on its way what it has not heard of."""
        for child in await unheard(self._ledger, saga_id, events):
            self._late[saga_id].append(_Within(child))

    async def _refuse_while_within(self, saga_id: str, said: StageSettled, path: str) -> None:
        """Refuse a word on what stands of a stage while a saga below it has not come to rest, or is in question itself."""
        stage = said.stage
        for child in await sagas_below(self._ledger, saga_id, stage):
            if child.status in ALIVE:
                raise MisuseError(
                    "a stage whose own sagas have come to rest",
                    got=f"saga {child.saga_id}, which is {child.status.value}",
                    stage=stage,
                    hint=f"If its process is gone, have it stopped first: saga recover, or coordinator.recover, with its pipeline "
                    f"{child.pipeline!r}.",
                )
        if said.verdict is Verdict.KEPT:
            # It is kept with all that is within it.
            return
        report = await report_of(self._ledger, saga_id)
        within = [
            f"{path.removesuffix(stage)}{inner}" for inner in (*report.stuck, *report.in_doubt, *report.blocked) if is_within(inner, stage)
        ]
        if within:
            raise MisuseError(
                "a stage within which nothing is stuck, blocked or in doubt",
                got=f"undone, while these are: {', '.join(within)}",
                stage=stage,
                hint="Settle what is stuck or in doubt there, and go on with the saga: the stage finds out by itself.",
            )

    async def _settle(self, saga_id: str, said: StageSettled, *, is_turned_back: bool = False) -> _Refused | None:
        """Record a person's word on a stage; or why it can't be taken."""
        refused: list[_Refused] = []

        async def settled(state: SagaState) -> list[AnyEvent]:
            misuse = refusal(state, said, is_turned_back=is_turned_back)
            if misuse is not None:
                record = state.stages[said.stage]
                is_answered = record.settled is not None and record.settled.verdict is said.verdict and not record.is_in_question
                refused.append(_Refused(misuse, is_repeated=is_answered))
                return []
            state.apply(said)
            return [said, SagaEnded(status=status_at_rest(state))]

        await self._amend(saga_id, settled)
        return refused[0] if refused else None

    async def _amend(self, saga_id: str, decide: Callable[[SagaState], Awaitable[list[AnyEvent]]]) -> None:
        """Add to the ledger of a saga that nobody runs."""
        if not self._held.hold(saga_id):
            raise self._busy(saga_id)
        try:
            token = await self._held.acquire(saga_id)
            try:
                events = await recorded(self._ledger, saga_id)
                more = await decide(SagaState(events))
                if more:
                    with answering(f"record {named(more)} of saga {saga_id}"):
                        await self._ledger.append(saga_id, more, expected_version=len(events), token=token)
                    tell(self._listeners, saga_id, more)
            finally:
                await self._held.give_back(saga_id, token)
        finally:
            self._held.let_go(saga_id)
            self.record_late(saga_id)

    def _refuse_held(self, saga_id: str) -> None:
        if self._held.holds(saga_id):
            raise self._busy(saga_id)

    def _busy(self, saga_id: str) -> MisuseError:
        return self._held.busy(saga_id, "a saga that has come to rest", "alive")

    def comes_late(self, saga_id: str, late: Late) -> None:
        """Record at the next occasion what nobody waited for any more."""
        self._late[saga_id].append(late)
        if saga_id not in self._held.sagas:
            self.record_late(saga_id)

    def recordings(self) -> set[asyncio.Task[None]]:
        """The tasks that are just recording in this event loop what came late."""
        loop = asyncio.get_running_loop()
        return {task for task in tuple(self._tasks) if task.get_loop() is loop and not task.done()}

    async def late_is_recorded(self) -> None:
        """Wait until nothing that came late is just being recorded in this event loop.

        When that ends, asyncio.run waits for code that was given up, and for nothing that begins only then.
        """
        await outlast(self.recordings())

    def has_late(self, saga_id: str) -> bool:
        """Whether anything came late for a saga that is not recorded yet."""
        return saga_id in self._late

    async def note_late(self, saga: LiveSaga, is_in_hand: Callable[[str], bool] = _by_nobody) -> bool:
        """Record what came late for a saga that is alive, before more is asked for or undone: else it would seem to have come after that.

        Args:
            saga: The saga.
            is_in_hand: Whether a stage is just being asked for, or undone: what came late of it waits for what comes of that.

        Returns:
            Whether anything did.
        """
        noted = False
        async for event in self._news(saga.journal.state, self._late.pop(saga.id, []), is_in_hand):
            await saga.journal.record(event)
            noted = True
        return noted

    async def _news(
        self, state: SagaState, late: Sequence[Late | _Within], is_in_hand: Callable[[str], bool] = _by_nobody
    ) -> AsyncIterator[Latecomer | StageProbed | StageSettled]:
        """What came late and tells a saga something new; record each before you ask for the next one."""
        saga_id = state.started.saga_id

        def is_busy(stage: str) -> bool:
            return is_in_hand(stage) or state.stages[stage].is_under_way

        for one in late:
            event: Latecomer | StageProbed | StageSettled | None
            if isinstance(one, Late):
                # What its stage comes to first is not known yet.
                is_early = is_busy(one.event.stage)
                event = None if is_early else _own_news(state, one)
            else:
                child = SagaState(await events_of(self._ledger, one.saga_id))
                event = heard(state, child, await report_with_children(self._ledger, child, {}))
                # As above; or a word is to be said, which nobody does before the saga has come to rest.
                is_early = is_busy(str(child.started.parent_stage)) or isinstance(event, StageSettled)
                is_early = is_early and self._held.sagas[saga_id] is not None
            if is_early:
                self._late[saga_id].append(one)
            elif event is not None:
                yield event

    def record_late(self, saga_id: str, *, is_told: bool = False) -> None:
        """Record soon what came late for a saga that is held no more, if anything did; the log may be told already who is in the way."""
        if saga_id not in self._late:
            return
        task = start(self._record_late(saga_id, is_told=is_told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record_late(self, saga_id: str, *, is_told: bool = False) -> None:
        if is_told and await self._has_to_wait(saga_id):
            self._try_again(saga_id)
            return
        # Nothing is awaited from here until the saga is held: whoever goes on with it here meanwhile would know nothing of this.
        if saga_id in self._held.sagas or saga_id not in self._late:
            # Somebody goes on with it since: it is recorded when that one comes to rest. Or it has been.
            return
        late = self._late.pop(saga_id)
        above: list[tuple[str, str]] = []
        waiting: list[Late | _Within] = []

        async def added(state: SagaState) -> list[AnyEvent]:
            waiting[:] = [one for one in late if _is_under_way(state, one)]
            events = await self._added(state, [one for one in late if one not in waiting])
            if events:
                above.extend(await sagas_above(self._ledger, state))
            return events

        try:
            await self._amend(saga_id, added)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever a ledger's driver raises
            if isinstance(error, LedgerConflict) and not error.is_missing:
                # Another coordinator goes on with it, or has died with it, and knows nothing of this.
                self._wait(saga_id, late, error, is_told=is_told)
            else:
                _tell_of_loss(saga_id, late, error)
            return
        if waiting:
            # The process that went on with it has died, and what its stage comes to first is for whoever recovers it to find out.
            self._wait(saga_id, waiting, "it broke off; recover it", is_told=is_told)
        for parent, _ in above[-1:]:
            # What runs it may have been done with it: it hears of it now, or when it comes to rest.
            self._late[parent].append(_Within(saga_id))
            await self._record_late(parent)

    async def _has_to_wait(self, saga_id: str) -> bool:
        """Whether nothing of what waits can be recorded yet; found out without the lease, which whoever is to recover the saga needs."""
        try:
            state = SagaState(await events_of(self._ledger, saga_id))
        except Exception:  # noqa: BLE001 - whatever a ledger's driver raises; to record it fails as well, and is told of
            return False
        late = () if saga_id in self._held.sagas else self._late.get(saga_id, ())
        return bool(late) and all(_is_under_way(state, one) for one in late)

    def _wait(self, saga_id: str, late: Sequence[Late | _Within], why: object, *, is_told: bool) -> None:
        self._late[saga_id][:0] = late
        if not is_told:
            _tell_of_delay(saga_id, late, why)
        self._try_again(saga_id)

    def _try_again(self, saga_id: str) -> None:
        """Record what waits after a while; no task waits: it would keep asyncio.run."""
        asyncio.get_running_loop().call_later(_AGAIN, partial(self.record_late, saga_id, is_told=True))

    async def _added(self, state: SagaState, late: Sequence[Late | _Within]) -> list[AnyEvent]:
        """What came late and tells a saga that nobody runs something new, and where it stands then."""
        events: list[AnyEvent] = []
        behind = await recorded_around(self._ledger, state)
        async for event in self._news(state, late):
            kept = storable(self._ledger, dataclasses.replace(event, at=max(event.at, behind)))
            state.apply(kept)
            events.append(kept)
        if not events or state.ended_at is None:
            # It broke off, and whoever recovers it brings it to its end.
            return events
        return [*events, SagaEnded(status=status_at_rest(state), at=events[-1].at)]


class _Refused(NamedTuple):
    """A person's word that is not taken.

    Attributes:
        misuse: Why.
        is_repeated: Whether it is the one that the stage was settled with last, and is in question no more.
    """

    misuse: MisuseError
    is_repeated: bool


class _Within(NamedTuple):
    """Something came late within a saga that a stage ran.

    Attributes:
        saga_id: That one's id.
    """

    saga_id: str


def _is_under_way(state: SagaState, late: Late | _Within) -> bool:
    """Whether the stage that something came late of was started, or begun to be undone, once more, and is not known to have ended."""
    return isinstance(late, Late) and state.stages[late.event.stage].is_under_way


def _own_news(state: SagaState, late: Late) -> Latecomer | StageProbed | None:
    """What came late of a stage, if it tells its saga something new."""
    event = news_of(state, late)
    if isinstance(event, StageProbed) and state.graph[event.stage].role is Role.PLAIN:
        # A plain stage is never in question, so nobody would be asked.
        _tell_of_loss(state.started.saga_id, [late])
        return None
    return event


def _tell_of_loss(saga_id: str, late: Sequence[Late | _Within], error: BaseException | None = None) -> None:
    message = "saga %s: what came late (%s) could not be recorded; look at its stages in the outside world"
    LOG.error(message, printable(saga_id), printable(_named(late)), exc_info=error)


def _tell_of_delay(saga_id: str, late: Sequence[Late | _Within], why: object) -> None:
    message = "saga %s: what came late (%s) waits to be recorded: %s. If its event loop ends first, look at its stages in the outside world"
    LOG.warning(message, printable(saga_id), printable(_named(late)), printable(str(why)))


def _named(late: Sequence[Late | _Within]) -> str:
    return ", ".join(f"something in saga {one.saga_id}" if isinstance(one, _Within) else type(one.event).__name__ for one in late)
