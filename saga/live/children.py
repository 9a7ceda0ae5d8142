"""The sagas that the stages of one saga run: which run now, which have run, and what they have left standing."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from saga.errors import LedgerConflict, LedgerCorrupt, LedgerError, SagaNotFound
from saga.family import children_of, children_of_execution
from saga.graph import Role
from saga.keys import child_id, execution_key
from saga.within import has_left, reports_of

if TYPE_CHECKING:
    from saga.failures import Failure
    from saga.live.journal import Journal
    from saga.live.saga import LiveSaga
    from saga.report import SagaReport


class Children:
    """The sagas that the stages of one saga run.

    Attributes:
        alive: Those that run now, in the order in which they began to.
        failed: The stages whose last attempt, or fallback, has failed, and whose sagas are being stopped.
        has_any: Whether the stages have run any.
        exceptions: What those that ended have failed with.
        undone_within: By stage those that its compensation has turned to, and what it has made of each.
    """

    def __init__(self, journal: Journal) -> None:
        self.alive: Final[dict[LiveSaga, None]] = {}
        self.failed: Final[set[str]] = set()
        self.has_any = False
        self.exceptions: dict[Failure, BaseException] = {}
        self.undone_within: Final[dict[str, dict[str, SagaReport]]] = {}
        self._journal = journal
        # Nobody else runs any meanwhile: to list them for each question would take longer, the more there are.
        self._ran_before: dict[str, str] | None = {}
        self._ran_here: dict[str, str] = {}
        self._begun: Final[dict[tuple[str, int], int]] = {}
        self._being_undone: Final[dict[str, set[asyncio.Future[None]]]] = {}

    # -- those that run now --------------------------------------------------------------------------------------

    def next_id(self, stage: str, attempt: int) -> str:
        """The id of the next one that an attempt of a stage runs."""
        key = self._key(stage)
        number = self._begun[key, attempt] = self._begun.get((key, attempt), 0) + 1
        return child_id(key, attempt, number)

    def _key(self, stage: str) -> str:
        return execution_key(self._journal.saga_id, stage, self._journal.state.stages[stage].execution)

    def takes_in(self, child: LiveSaga, stage: str) -> None:
        """A stage runs the child from here on."""
        self.has_any = True
        self.alive[child] = None
        self._ran_here[child.id] = stage

    def parts_with(self, child: LiveSaga) -> None:
        """The child has come to rest."""
        # Not by its id: a stage may have gone on with it from where it had just been let go of.
        del self.alive[child]
        if child.journal.token is None:
            del self._ran_here[child.id]  # the ledger has never heard of it

    def run_by(self, stage: str) -> list[LiveSaga]:
        """Those that a stage runs now."""
        return [child for child in self.alive if child.journal.state.started.parent_stage == stage]

    @contextmanager
    def being_undone(self, stage: str) -> Iterator[dict[str, SagaReport]]:
        """Where a stage's compensation turns to one of them; gets what it has made of each, by id."""
        made_of = self.undone_within.setdefault(stage, {})
        rests = asyncio.get_running_loop().create_future()
        self._being_undone.setdefault(stage, set()).add(rests)
        try:
            yield made_of
        finally:
            self._being_undone[stage].discard(rests)
            rests.set_result(None)

    def left_on_their_way_back(self, stage: str) -> tuple[asyncio.Future[None], ...]:
        """What is done when those are that a stage's compensation has left being undone: asyncio.gather raises what the first comes to."""
        return tuple(self._being_undone.get(stage, ()))

    @contextmanager
    def heeding(self, stage: str) -> Iterator[None]:
        """Where the ledger fails one of the stage's, record nothing more of this saga, whatever the stage makes of that."""
        try:
            yield
        except LedgerError as error:
            # One that can't be read, or that somebody else holds, fails its stage, and tells nothing of this saga's own ledger.
            if not (isinstance(error, LedgerCorrupt) or (isinstance(error, LedgerConflict) and error.is_held)):
                self._journal.break_off(stage, error)
            raise

    # -- all that have run ---------------------------------------------------------------------------------------

    def heed_those_before(self) -> None:
        """There may be some that were run before, which the ledger knows."""
        self.has_any, self._ran_before = True, None

    async def reports(self, stage: str) -> list[SagaReport]:
        """Those that this execution of the stage has run, oldest first; without its fallback's while what used that is kept."""
        with self.heeding(stage):
            return await reports_of(self._journal.ledger, await self._of(stage))

    async def has_under_way(self, stage: str) -> bool:
        """Whether the last that this execution of the stage has run has not come to its end."""
        try:
            reports = await self.reports(stage)
        except LedgerCorrupt:
            # The stage's own code will meet it, too, and fail with it.
            return False
        return bool(reports) and reports[-1].ended_at is None

    async def left_within(self, stage: str, besides: Collection[str] = ()) -> bool | None:
        """Whether those that this execution of the stage has run have left something standing; None: nobody could undo it.

        Args:
            stage: The stage.
            besides: Those that are not asked for.
        """
        if not self.has_any or self._journal.state.graph[stage].role is not Role.COMPENSABLE:
            return None
        try:
            with self.heeding(stage):
                return await has_left(self._journal.ledger, await self._of(stage, besides))
        except (LedgerCorrupt, SagaNotFound):
            # Nobody knows what stands of a child that can't be read, or is not there any more.
            return True

    async def _of(self, stage: str, besides: Collection[str] = ()) -> list[str]:
        record = self._journal.state.stages[stage]
        stand_in = () if record.undoes_fallback else record.fallback_ran
        if self._ran_before is None:
            self._ran_before = dict(await children_of(self._journal.ledger, self._journal.saga_id))
        # Of one that has just begun a durable ledger learns with its first stage.
        unheard = {child.id for child in self.alive if child.journal.token is None}
        ran = {**self._ran_before, **self._ran_here}
        known = [child for child, runner in ran.items() if runner == stage and child not in unheard]
        children = await children_of_execution(self._journal.ledger, self._journal.saga_id, known, self._key(stage))
        return [child for child in children if child not in stand_in and child not in besides]
