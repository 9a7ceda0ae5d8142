"""`SagaCoordinator`: runs pipelines as sagas, and goes on with them; what a user says is checked here."""

from __future__ import annotations

import asyncio
import getpass
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from stageflow.api import Pipeline, PipelineContext, StageOutput
from stageflow.pipeline.interceptors import TimeoutInterceptor
from stageflow.pipeline.retry import RetryInterceptor

from saga.blueprint import by_name, read, refuse_no_policy
from saga.errors import GraphChanged, LedgerConflict, MisuseError, PipelineInvalid, SagaError, SagaNotFound
from saga.events import SagaStatus, StageSettled, Verdict
from saga.family import events_of, is_left_alone, refuse_no_id, renamed, sagas_above
from saga.keeper import SagaKeeper
from saga.ledger import ALIVE, Entry, Ledger, MemoryLedger, is_held, listed, recorded, refuse_no_ledger
from saga.listeners import Listener
from saga.live.inputs import context_of
from saga.outputs import copied
from saga.policies import ContinueWithFallback, FailFast, Policy
from saga.recovery.resumption import recovering, resumption, undoing
from saga.recovery.state import SagaState
from saga.report import Recovery, SagaReport
from saga.stages import is_async, is_generator
from saga.tasks import this_task
from saga.text import shown
from saga.within import report_of

if TYPE_CHECKING:
    from stageflow import BaseInterceptor

T = TypeVar("T")


class SagaCoordinator:
    """Runs stageflow pipelines as sagas.

    One coordinator runs any number of sagas at once, of one or many pipelines.

    Args:
        policy: What happens when something fails, in the sagas that `run` begins; others go on with the one in their ledger.
        ledger: Where sagas are recorded; a new `MemoryLedger` by default.
        interceptors: stageflow interceptors around every stage, with all its attempts, and not around its compensation; in a saga that
            is resumed also around those that had completed, which don't run again. stageflow's default ones are off: they answer
            for stages that never ran, and retry against the policy.
        listeners: Are told of every event that is in the ledger, with the saga's id: `listener(saga_id, event)`. They run in the saga's
            own time, so they have to be quick; what they raise is logged and harms no saga.

    Raises:
        MisuseError: What is given as the ledger, an interceptor or a listener is not one, or interceptors or listeners come in no list.
        PolicyInvalid: What is given as the policy is not one.
    """

    def __init__(
        self,
        policy: FailFast | ContinueWithFallback | None = None,
        *,
        ledger: Ledger | None = None,
        interceptors: Sequence[BaseInterceptor] = (),
        listeners: Sequence[Listener] = (),
    ) -> None:
        refuse_no_ledger(ledger)
        refuse_no_policy(policy)
        self.policy: Final = policy if policy is not None else FailFast()
        self.ledger: Final = ledger if ledger is not None else MemoryLedger()
        self._interceptors = _checked(interceptors, "interceptor")
        for interceptor in self._interceptors:
            _refuse_no_interceptor(interceptor)
        self._listeners = _checked(listeners, "listener")
        for listener in self._listeners:
            _refuse_no_listener(listener)
        self._keeper = self._new_keeper()
        _COORDINATORS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Be pickled and copied without what it holds: in another process, or beside this one, it is another owner."""
        return {name: value for name, value in vars(self).items() if name != "_keeper"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hold nothing yet."""
        vars(self).update(state)
        self._keeper = self._new_keeper()
        _COORDINATORS.add(self)

    def _new_keeper(self) -> SagaKeeper:
        """An owner of its own, that holds nothing."""
        return SagaKeeper(self.ledger, self._interceptors, self._listeners)

    async def run(
        self,
        pipeline: Pipeline,
        context: PipelineContext | None = None,
        *,
        saga_id: str | None = None,
        **context_fields: Any,
    ) -> SagaReport:
        """Run a pipeline as a saga.

        Args:
            pipeline: The pipeline; it is not changed and may run any number of times at once.
            context: stageflow's context, or
            context_fields: its fields, as in `Pipeline.run`: `input_text=`, `metadata=`, ...
            saga_id: Its id; a new one by default.

        Returns:
            The report, whatever became of the stages.

        Raises:
            SagaExists: The id is taken, even if only since a moment ago; nothing was run.
            MisuseError: Something can't work; nothing was run.
            LedgerError: The ledger could not record, or Ctrl-C, or a lack of memory or of stack, struck the saga's own code; no further
                effect was started.
            SagaError: For the report there was no memory, or no stack; what became of the saga is recorded.
            asyncio.CancelledError: The caller was cancelled, and the saga has done what `on_interrupt` says.
        """
        blueprint = read(pipeline, self.policy)
        context = context_of(pipeline.name, context, context_fields)
        return await self._keeper.run(blueprint, self.policy, context, saga_id)

    async def resume(
        self,
        saga_id: str,
        pipeline: Pipeline,
        *,
        policy: Policy | None = None,
        forward: bool | None = None,
        by: str | None = None,
    ) -> SagaReport:
        """Go on with a saga that halted, is stuck or has ended, or whose process is gone.

        Forward: what has completed is not run again and its outputs are used; what failed runs again with the same idempotency key, and
        what was undone with another one. Backward: what is still to be undone is undone.

        Args:
            saga_id: Its id.
            pipeline: The one that it was started with; its stages' code may have been mended meanwhile, and have been given a
                probe, a fallback, `idempotent` or `compensate_in_doubt`, or lost one.
            policy: The saga's from here on, which is recorded if it goes on; None: as before.
            forward: None: a saga that is stuck on its way back, or whose process died there, goes on to be undone, as does one that is
                stuck and was run by another one; one that was undone stays so; any other one goes on forward. True: of these, one that
                is stuck or was undone goes on forward, too. False is as None: what undoes a saga is `compensate`.
            by: Who resumes it, for the ledger; the user of this process by default.

        Returns:
            The report; of a saga that has nothing left to do as it was.

        Raises:
            SagaNotFound: The ledger has no such saga.
            GraphChanged: The pipeline differs from the saga's, or one nested in it from that of a child of which anything stands.
            MisuseError: The saga is alive here, has stages in doubt that a person has to settle first, or is run by another one.
            LedgerConflict: Another coordinator holds it.
            LedgerError: The ledger could not record or read; no further effect was started.
            SagaError: As for `run`.
            asyncio.CancelledError: The caller was cancelled, and the saga is at rest: as `on_interrupt` says, or undone.
        """
        if not isinstance(forward, bool | None):
            raise MisuseError("forward to be True, False or None", got=shown(forward))
        await self._refuse_other(saga_id, pipeline, undoes=False, forward=forward)
        return await self._keeper.go_on(saga_id, pipeline, partial(resumption, policy=policy, forward=forward, by=_who(by)), policy)

    async def compensate(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo a saga that nobody is running: one that has come to rest, or whose process is gone.

        Where nothing can be undone nothing happens: a second call gives the same report again. But one that has halted, and of which
        nothing stands, is compensated, so that nobody who resumes what has halted runs it.

        Raises:
            SagaNotFound: The ledger has no such saga.
            GraphChanged: The pipeline differs from the saga's, or one nested in it from that of a child of which anything stands.
            MisuseError: The saga is alive here, or is run by another one.
            LedgerConflict: Another coordinator holds it.
            LedgerError: The ledger could not record or read; nothing further was begun to be undone.
            SagaError: As for `run`.
            asyncio.CancelledError: The caller was cancelled, and the saga has been undone all the same.
        """
        await self._refuse_other(saga_id, pipeline, undoes=True)
        return await self._keeper.go_on(saga_id, pipeline, partial(undoing, by=_user()))

    async def settle(
        self, saga_id: str, stage: str, verdict: Verdict | str, note: str, *, output: dict[str, Any] | None = None, by: str | None = None
    ) -> SagaReport:
        """Take a person's word on a stage that is stuck or in doubt; `resume` then goes on from there.

        Args:
            saga_id: The saga's id.
            stage: The stage; one of a nested saga by its path, `book_hotel/charge_deposit`. The sagas that run this one learn of it.
            verdict: `undone`: nothing of it stands. `kept`: it stands and is to stay, with all that it depends on. `retry`: what was
                in the way is mended, so try once more.
            note: Why; for whoever reads the ledger later.
            output: With `kept`, the output data that a stage counts as having given which gave none.
            by: Who says so; the user of this process by default.

        Raises:
            SagaNotFound: The ledger has no such saga.
            MisuseError: The stage is neither stuck nor in doubt, a saga below it has not come to rest or, for `undone`, has something
                stuck, blocked or in doubt, an output is given beside the stage's own, or a retry could not tell anything new; nothing was
                recorded.
            LedgerConflict: Another coordinator holds the saga.
            LedgerError: The ledger could not record or read.
        """
        if verdict not in set(Verdict):
            raise MisuseError("undone, kept or retry as the verdict", got=repr(verdict), stage=stage)
        if not isinstance(note, str) or not note.strip():
            raise MisuseError("a note that says why", got=repr(note), stage=stage)
        if output is not None and not isinstance(output, dict):
            raise MisuseError("a dict as the output's data", got=repr(output), stage=stage)
        said = StageSettled(
            stage=stage,
            verdict=Verdict(verdict),
            note=note,
            by=_who(by),
            output=None if output is None else StageOutput.ok(copied(output)),
        )
        cancels = this_task().cancelling()
        await self._keeper.amendments.settle(saga_id, said)
        if this_task().cancelling() > cancels:
            # A durable ledger answers whoever is cancelled meanwhile all the same, so that every saga that is to know learns of the word.
            raise asyncio.CancelledError
        return await self.report(saga_id)

    async def recover(
        self, pipelines: Pipeline | Iterable[Pipeline] | Mapping[str, Pipeline], *, concurrency: int = 10, by: str | None = None
    ) -> Recovery:
        """Go on with every saga in the ledger whose process is gone, as `resume` does; nested ones go on with those that run them.

        Where a saga has come to rest and left one behind that a stage of it had run, that one is stopped, as if it had run on until then.
        A saga of which the ledger can't tell where it stands is in `failed`, too; those that it runs are left to it.

        Args:
            pipelines: The one, or those, that the sagas were started with, found by their names; as a mapping, by its keys.
            concurrency: How many sagas go on at once.
            by: Who resumes them, for the ledger; the user of this process by default.

        Returns:
            A report for every saga that went on, and for every other one why it did not.

        Raises:
            MisuseError: These are no pipelines, several have one name, or `concurrency` is not at least 1.
            LedgerError: The ledger can't tell of any saga. What fails with one of them is in `failed`.
            asyncio.CancelledError: The caller was cancelled, and the sagas that went on have done what their policies say.
        """
        known = by_name(pipelines)
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise MisuseError("a concurrency of at least 1", got=shown(concurrency))
        entries, damaged = await listed(self.ledger, ALIVE)
        recovery = Recovery()
        limit = asyncio.Semaphore(concurrency)
        decide = partial(recovering, by=_who(by))

        async def go_on(entry: Entry) -> None:
            # As of now: by the time that it is its turn, its holder may have said more.
            holder = entry.owner if is_held(entry) else None
            async with limit:
                if self._keeper.held.holds(entry.saga_id):
                    return
                try:
                    if entry.owner == self._keeper.held.owner:
                        events = await recorded(self.ledger, entry.saga_id)
                        if not events or SagaState(events).ended_at is not None:
                            return  # it ran here when it was listed, and has come to rest since
                    pipeline = _among(known, entry.pipeline)
                    is_left_behind = entry.parent is not None and bool(await recorded(self.ledger, entry.parent))
                    # Nobody waits for what it would give, and a person may have said that nothing of it stands.
                    why = "the saga that ran it has come to rest" if is_left_behind else None
                    with self._held_before_unfit(entry, holder):
                        recovery.reports[entry.saga_id] = await self._keeper.go_on(entry.saga_id, pipeline, decide, interrupted=why)
                except LedgerConflict as held:
                    recovery.held[entry.saga_id] = held
                except Exception as error:  # noqa: BLE001 - it is one saga's, and the others go on
                    if entry.saga_id in self._keeper.held.sagas:
                        return  # somebody else here was faster while its ledger was read
                    recovery.failed[entry.saga_id] = error if isinstance(error, SagaError) else _unexpected(entry.saga_id, error)

        def is_due(entry: Entry) -> bool:
            return entry.saga_id in waiting and not any(entry.parent in above for above in (entries, damaged, self._keeper.held.sagas))

        waiting = set(entries)
        while due := list(filter(is_due, entries.values())):
            waiting.difference_update(entry.saga_id for entry in due)
            async with asyncio.TaskGroup() as group:
                for entry in due:
                    group.create_task(go_on(entry))
            # Those that have come to rest may have passed by what had been left to them.
            entries, damaged = await listed(self.ledger, ALIVE) if waiting else ({}, damaged)
        recovery.failed.update(damaged)
        return recovery

    @contextmanager
    def _held_before_unfit(self, entry: Entry, holder: str | None) -> Iterator[None]:
        """Say of a saga that is held that it is, also where the pipeline is not for it, so that nobody has tried to take its lease."""
        try:
            yield
        except (GraphChanged, PipelineInvalid):
            if holder is None or holder == self._keeper.held.owner:
                raise
            raise LedgerConflict.held(entry.saga_id, holder=holder, until=entry.until) from None

    async def report(self, saga_id: str) -> SagaReport:
        """The report of a saga, alive or not.

        Raises:
            SagaNotFound: The ledger has no such saga.
            LedgerError: The ledger can't read it.
        """
        return await report_of(self.ledger, saga_id)

    async def cancel(self, saga_id: str, reason: str = "it was asked to stop") -> None:
        """Stop a saga that is running here, and those that its stages run, as if its caller had been cancelled.

        `run` then returns its report.

        A saga that is going backward already is not stopped: a cancel can start a compensation, never interrupt one.

        Raises:
            MisuseError: It is no id.
            SagaNotFound: No saga of that id is alive in this coordinator.
        """
        refuse_no_id(saga_id)
        held = self._keeper.held
        saga = held.sagas.get(saga_id) if held.holds(saga_id) else None
        if saga is None:
            hint = "Only where it runs can it be stopped; what a saga at rest did is undone by compensate()."
            raise SagaNotFound("a saga that is alive in this coordinator", got=repr(saga_id), hint=hint)
        if saga.loop is asyncio.get_running_loop():
            saga.interrupt(reason)
        else:
            # Another thread's: it would not wake up for it.
            saga.loop.call_soon_threadsafe(saga.interrupt, reason)

    async def wind_up(self) -> None:
        """Wait for all that still runs in this event loop, sagas and code that was given up, and until what that comes to is recorded.

        A ledger that is closed before then records none of that. Such code may never end: bound the wait with asyncio.timeout. A stage that
        calls this waits for itself.

        Raises:
            asyncio.CancelledError: The caller was cancelled; what runs goes on.
        """
        await self._keeper.wind_up()

    async def _refuse_other(self, saga_id: str, pipeline: Pipeline, *, undoes: bool, forward: bool | None = None) -> None:
        """Refuse to go on with what is another saga's part, or with a pipeline of another name.

        Where the other one has nothing left to do about it, it may be undone by itself, or go on to be.

        Raises:
            SagaNotFound: The ledger has no such saga.
            MisuseError: Another one runs it.
            GraphChanged: The pipeline has another name.
        """
        state = SagaState(await events_of(self.ledger, saga_id))
        goes_back = undoes or (state.status is SagaStatus.STUCK and not forward)
        above = await sagas_above(self.ledger, state)
        if above and not (goes_back and await is_left_alone(self.ledger, state, is_undone=undoes)):
            parent, stage = above[0]
            raise MisuseError(
                "a saga that no other one runs",
                got=f"{saga_id}, which is run by stage {stage!r} of saga {parent}",
                hint=f"Go on with {parent}: it goes on with those that it runs, and learns what became of them.",
            )
        name = getattr(pipeline, "name", None)
        if isinstance(name, str) and (differences := renamed(state, name)):
            raise GraphChanged(saga_id, differences)


_COORDINATORS: Final[weakref.WeakSet[SagaCoordinator]] = weakref.WeakSet()


def _name_all_anew() -> None:
    """Have each coordinator hold nothing in a process that was forked off: the sagas are its parent's."""
    for coordinator in _COORDINATORS:
        coordinator._keeper = coordinator._new_keeper()  # noqa: SLF001 - of this file


if hasattr(os, "register_at_fork"):  # pragma: no branch - where processes don't fork, there is nothing to see to
    os.register_at_fork(after_in_child=_name_all_anew)


def _who(by: str | None) -> str:
    if by is not None and not isinstance(by, str):
        # It would be recorded, and nobody could read the saga again.
        raise MisuseError("a text that says by whom", got=shown(by))
    return by or _user()


def _user() -> str:
    """Who runs this process, for the ledger."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _checked(given: Sequence[T], what: str) -> tuple[T, ...]:
    if not isinstance(given, Iterable):
        raise MisuseError(f"a list of {what}s", got=shown(given), hint=f"Write {what}s=[it].")
    return tuple(given)


_WITHOUT_EFFECT: Final[Mapping[object, str]] = {
    TimeoutInterceptor.before: "stageflow's timeouts are off: FailFast(timeout=...), in seconds, is for all, and a stage may have its own.",
    RetryInterceptor.on_error: "It only waits: FailFast(retry=Retry(attempts=3)) is for all, and a stage may have its own.",
}
"""stageflow's hooks that do nothing in a saga, and what does it there; an interceptor that is derived may have one that does."""


def _refuse_no_interceptor(interceptor: object) -> None:
    # stageflow logs that its hooks can't be called, or awaited, and runs every stage as if there were none.
    if isinstance(interceptor, type):
        name = interceptor.__qualname__
        raise MisuseError("an interceptor", got=f"the class {name}", hint=f"Write {name}(...).")
    for hook in ("before", "after", "on_error"):
        function = getattr(interceptor, hook, None)
        if not is_async(function):
            raise MisuseError(f"an interceptor with an async {hook}", got=shown(interceptor))
        if (hint := _WITHOUT_EFFECT.get(getattr(function, "__func__", None))) is not None:
            raise MisuseError("interceptors that have an effect in a saga", got=shown(interceptor), hint=hint)


def _refuse_no_listener(listener: object) -> None:
    if not callable(listener) or isinstance(listener, type) or is_async(listener) or is_generator(listener):
        raise MisuseError("a listener to be a plain function, or an object that can be called as one", got=shown(listener))


def _among(known: Mapping[str, Pipeline], name: str) -> Pipeline:
    if name not in known:
        raise MisuseError(f"a pipeline named {name!r}", got=f"those named {', '.join(known) or 'nothing'}")
    return known[name]


def _unexpected(saga_id: str, error: Exception) -> SagaError:
    failed = SagaError(f"saga {saga_id} could not go on: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed
