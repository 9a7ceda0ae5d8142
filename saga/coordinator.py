"""`SagaCoordinator`: runs pipelines as sagas. The only place where forward, backward and the ledger meet."""

from __future__ import annotations

import asyncio
import getpass
import inspect
import logging
import os
import secrets
import weakref
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
from stageflow.api import Pipeline, PipelineContext, StageOutput

from saga.actions import LocalActions
from saga.alive import LiveSaga
from saga.amendments import Amendments
from saga.asking import ask
from saga.backward import Backward
from saga.blueprint import Blueprint, by_name, refuse_no_policy
from saga.errors import (
    GraphChanged,
    LedgerConflict,
    LedgerCorrupt,
    LedgerError,
    MisuseError,
    NotStorable,
    SagaError,
    SagaExists,
    SagaNotFound,
)
from saga.events import (
    AnyEvent,
    SagaEnded,
    SagaStarted,
    SagaStatus,
    SagaTurnedBack,
    StageSettled,
    TurnReason,
    Verdict,
)
from saga.failures import Failure
from saga.family import events_of, has_left, is_left_alone, report_of, report_with_children, reports_of, run_by
from saga.forward import Forward
from saga.held import Held
from saga.inputs import context_of, recorded_input, refuse_both
from saga.journal import Journal, Listener
from saga.ledger import A_NAME, ALIVE, LONGEST_NAME, Entry, Ledger, MemoryLedger, is_name
from saga.outputs import copied
from saga.policies import ContinueWithFallback, FailFast, Policy
from saga.recovery import SagaState, Step, conclude, final_status, has_doubt, undo_step
from saga.report import Recovery, SagaReport
from saga.resumption import Chapter, Decision, Direction, recovering, resumption, undoing
from saga.storable import refuse_unstorable
from saga.text import shown
from saga.watch import outlast, start

if TYPE_CHECKING:
    from stageflow import BaseInterceptor

    from saga.actions import Actions
    from saga.alive import Late

_LOG: Final = logging.getLogger("saga")


class SagaCoordinator:
    """Runs stageflow pipelines as sagas.

    One coordinator runs any number of sagas at once, of one or many pipelines.

    Args:
        policy: What happens when something fails, unless a run brings its own.
        ledger: Where sagas are recorded; a new `MemoryLedger` by default.
        interceptors: stageflow interceptors around every stage. stageflow's default ones are off: they answer for stages
            that never ran, and retry against the policy.
        listeners: Are told of every event that is in the ledger, with the saga's id: `listener(saga_id, event)`. They run in the saga's
            own time, so they have to be quick; what they raise is logged and harms no saga.

    Raises:
        MisuseError: The ledger is none, or a listener.
        PolicyInvalid: The policy is none.
    """

    def __init__(
        self,
        policy: FailFast | ContinueWithFallback | None = None,
        *,
        ledger: Ledger | None = None,
        interceptors: Sequence[BaseInterceptor] = (),
        listeners: Sequence[Listener] = (),
    ) -> None:
        if isinstance(ledger, str):
            # Not the text itself: a URL may hold a password.
            raise MisuseError("a ledger", got="a str", hint="saga.ledgers.open_ledger(url) opens the one at a URL.")
        refuse_no_policy(policy)
        self.policy: Final = policy if policy is not None else FailFast()
        self.ledger: Final = ledger if ledger is not None else MemoryLedger()
        self._interceptors = tuple(interceptors)
        self._listeners = _checked(listeners)
        self._name_anew()
        _COORDINATORS.add(self)

    def _name_anew(self) -> None:
        """Be an owner of its own, that holds nothing: also in a process that was forked off, which has none of its parent's sagas."""
        self._held = Held(self.ledger)
        self._amendments = Amendments(self.ledger, self._held, self._listeners)

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
            MisuseError: Something can't work; nothing was run.
            LedgerError: The ledger could not record, or Ctrl-C struck the saga's own code; no further effect was started.
            asyncio.CancelledError: The caller was cancelled, and the saga has done what `on_interrupt` says.
        """
        blueprint = self._read(pipeline, self.policy)
        context = context_of(pipeline.name, context, context_fields)
        saga = await self._begin(blueprint, self.policy, context, saga_id)
        return await self._unbroken(saga, self._forward(saga))

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
            policy: The saga's from here on, which is recorded; None: as before.
            forward: None: a saga that is stuck, or was on its way back, goes on to be undone, one that was undone stays so, any
                other one goes on forward. True lets these go on forward, too.
            by: Who resumes it, for the ledger; the user of this process by default.

        Returns:
            The report; of a saga that has nothing left to do as it was.

        Raises:
            SagaNotFound: The ledger has no such saga.
            GraphChanged: The pipeline differs from the saga's.
            MisuseError: The saga is alive here, has stages in doubt that a person has to settle first, or is run by another one.
            LedgerConflict: Another coordinator holds it.
        """
        await self._refuse_other(saga_id, pipeline, undoes=False, forward=forward)
        return await self._go_on(saga_id, pipeline, partial(resumption, policy=policy, forward=forward, by=by or _user()), policy)

    async def compensate(self, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo a saga that nobody is running: one that has come to rest, or whose process is gone.

        Where nothing can be undone nothing happens: a second call gives the same report again.

        Raises:
            SagaNotFound: The ledger has no such saga.
            GraphChanged: The pipeline differs from the saga's.
            MisuseError: The saga is alive here, or is run by another one.
            LedgerConflict: Another coordinator holds it.
        """
        await self._refuse_other(saga_id, pipeline, undoes=True)
        return await self._go_on(saga_id, pipeline, partial(undoing, by=_user()))

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
            output: With `kept`, the output data that a stage in doubt counts as having given.
            by: Who says so; the user of this process by default.

        Raises:
            SagaNotFound: The ledger has no such saga.
            MisuseError: The stage is neither stuck nor in doubt, a saga below it has not come to rest or, for `undone`, has something
                stuck, blocked or in doubt, or a retry could not tell anything new; nothing was recorded.
            LedgerConflict: Another coordinator holds the saga.
        """
        if verdict not in set(Verdict):
            raise MisuseError("undone, kept or retry as the verdict", got=repr(verdict), stage=stage)
        if not note.strip():
            raise MisuseError("a note that says why", got=repr(note), stage=stage)
        if output is not None and not isinstance(output, dict):
            raise MisuseError("a dict as the output's data", got=repr(output), stage=stage)
        said = StageSettled(
            stage=stage,
            verdict=Verdict(verdict),
            note=note,
            by=by or _user(),
            output=None if output is None else StageOutput.ok(copied(output)),
        )
        await self._amendments.settle(saga_id, said)
        return await self.report(saga_id)

    async def recover(
        self, pipelines: Pipeline | Iterable[Pipeline] | Mapping[str, Pipeline], *, concurrency: int = 10, by: str | None = None
    ) -> Recovery:
        """Go on with every saga in the ledger whose process is gone, as `resume` does; nested ones go on with those that run them.

        Where a saga has come to rest and left one behind that a stage of it had run, that one is stopped, as if it had run on until then.

        Args:
            pipelines: The one, or those, that the sagas were started with, found by their names; as a mapping, by its keys.
            concurrency: How many sagas go on at once.
            by: Who resumes them, for the ledger; the user of this process by default.

        Returns:
            A report for every saga that went on, and for every other one why it did not.

        Raises:
            MisuseError: These are no pipelines, several have one name, or `concurrency` is not at least 1.
        """
        known = by_name(pipelines)
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise MisuseError("a concurrency of at least 1", got=shown(concurrency))
        entries = {entry.saga_id: entry for entry in await self.ledger.list(statuses=ALIVE)}
        recovery = Recovery()
        limit = asyncio.Semaphore(concurrency)

        async def go_on(entry: Entry) -> None:
            async with limit:
                if entry.saga_id in self._held.sagas:
                    return
                try:
                    pipeline = _among(known, entry.pipeline)
                    is_left_behind = entry.parent is not None and bool(await self.ledger.read(entry.parent))
                    saga, work = await self._taken_over(entry.saga_id, pipeline, partial(recovering, by=by or _user()))
                    if is_left_behind:
                        # Nobody waits for what it would give, and a person may have said that nothing of it stands.
                        saga.interrupt("the saga that ran it has come to rest")
                    recovery.reports[entry.saga_id] = await self._unbroken(saga, work)
                except LedgerConflict as held:
                    recovery.held[entry.saga_id] = held
                except Exception as error:  # noqa: BLE001 - it is one saga's, and the others go on
                    recovery.failed[entry.saga_id] = error if isinstance(error, SagaError) else _unexpected(entry.saga_id, error)

        waiting = set(entries)
        while due := [
            entry
            for entry in entries.values()
            if entry.saga_id in waiting and entry.parent not in entries and entry.parent not in self._held.sagas
        ]:
            waiting.difference_update(entry.saga_id for entry in due)
            async with asyncio.TaskGroup() as group:
                for entry in due:
                    group.create_task(go_on(entry))
            # Those that have come to rest may have passed by what had been left to them.
            entries = {entry.saga_id: entry for entry in await self.ledger.list(statuses=ALIVE)} if waiting else {}
        return recovery

    async def report(self, saga_id: str) -> SagaReport:
        """The report of a saga, alive or not.

        Raises:
            SagaNotFound: The ledger has no such saga.
        """
        return await report_of(self.ledger, saga_id)

    async def cancel(self, saga_id: str, reason: str = "it was asked to stop") -> None:
        """Stop a saga that is running here, and those that its stages run, as if its caller had been cancelled.

        `run` then returns its report.

        A saga that is going backward already is not stopped: a cancel can start a compensation, never interrupt one.

        Raises:
            SagaNotFound: No saga of that id is alive in this coordinator.
        """
        saga = self._held.sagas.get(saga_id)
        if saga is None:
            raise SagaNotFound("a saga that is alive in this coordinator", got=repr(saga_id))
        saga.interrupt(reason)

    # -- what a running saga asks for ----------------------------------------------------------------------------

    async def run_child(
        self,
        parent: LiveSaga,
        stage: str,
        attempt: int,
        pipeline: Pipeline,
        context: PipelineContext | None,
        policy: Policy | None,
        fields: dict[str, Any],
    ) -> SagaReport:
        """Run a child of a saga's stage; `SagaContext.run_saga` gets here."""
        policy = policy if policy is not None else FailFast()
        blueprint = self._read(pipeline, policy)
        refuse_both(context, fields)
        if context is None:
            context = parent.child_context(stage, pipeline, fields)
        saga = await self._begin(blueprint, policy, context, parent.next_child(stage, attempt), parent, stage)
        return await self._as_child(parent, saga, self._forward(saga))

    async def resume_child(self, parent: LiveSaga, saga_id: str, pipeline: Pipeline, *, forward: bool | None) -> SagaReport:
        """Go on with a child of a saga's stage."""
        decide = partial(resumption, forward=forward, by=f"saga {parent.id}")
        return await self._as_child(parent, *await self._taken_over(saga_id, pipeline, decide, parent=parent))

    async def _as_child(self, parent: LiveSaga, saga: LiveSaga, work: Coroutine[Any, Any, None]) -> SagaReport:
        parent.has_children = True
        rests = parent.children[saga] = asyncio.get_running_loop().create_future()
        if parent.is_stopping:
            saga.interrupt("the saga that runs it is stopping")
        try:
            report = await self._unbroken(saga, work)
        finally:
            del parent.children[saga]
            rests.set_result(None)
        parent.exceptions |= {failure: failure.exception for failure in report.failures if failure.exception is not None}
        return report

    async def undo_child(self, parent: LiveSaga, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo what is left of a child."""
        return await self._unbroken(*await self._taken_over(saga_id, pipeline, partial(undoing, by=_user()), parent=parent))

    async def rest_child(self, parent: LiveSaga, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """See to it that a child whose process is gone comes to rest: it is stopped, as those are that run when their parent stops."""
        if not parent.is_stopping:
            return await self.report(saga_id)
        decide = partial(recovering, by=f"saga {parent.id}")
        return await self._as_child(parent, *await self._taken_over(saga_id, pipeline, decide, parent=parent))

    async def reports_of(self, saga_id: str, stage: str, prefix: str) -> list[SagaReport]:
        """The children of a saga's stage, oldest first; those whose ids begin so."""
        return await reports_of(self.ledger, saga_id, stage, prefix)

    async def has_left(self, saga_id: str, stage: str, prefix: str) -> bool:
        """Whether anything stands, or may stand, of the children of a saga's stage; of those whose ids begin so."""
        return await has_left(self.ledger, saga_id, stage, prefix)

    def comes_late(self, saga_id: str, late: Late) -> None:
        """Record at the next occasion what nobody waited for any more."""
        self._amendments.comes_late(saga_id, late)

    # -- how a saga runs -----------------------------------------------------------------------------------------

    def _read(self, pipeline: Pipeline, policy: FailFast | ContinueWithFallback) -> Blueprint:
        blueprint = Blueprint.of(pipeline)
        blueprint.check_policy(policy)
        return blueprint

    async def _begin(
        self,
        blueprint: Blueprint,
        policy: FailFast | ContinueWithFallback,
        context: PipelineContext,
        saga_id: str | None,
        parent: LiveSaga | None = None,
        parent_stage: str | None = None,
    ) -> LiveSaga:
        if saga_id is not None and (not isinstance(saga_id, str) or not saga_id.strip()):
            raise MisuseError("a saga id with at least one visible character", got=repr(saga_id))
        if self.ledger.durable:
            # The ledger would refuse them, too, but with the error of one that has failed.
            _refuse_names({"saga id": saga_id or "", "pipeline name": blueprint.name})
        if saga_id is None:
            saga_id = secrets.token_hex(16)
        elif await self.ledger.read(saga_id) or saga_id in self._held.sagas:
            # Looked for here at last: while the ledger was read, somebody else may have begun it.
            raise SagaExists("a saga id that is not in the ledger yet", got=repr(saga_id), hint="Read what became of it with report().")
        self._held.hold(saga_id)
        try:
            started = SagaStarted(
                saga_id=saga_id,
                pipeline=blueprint.name,
                graph=blueprint.graph,
                policy=policy,
                input=recorded_input(context),
                parent=None if parent is None else parent.id,
                parent_stage=parent_stage,
            )
            try:
                refuse_unstorable(self.ledger, started)
            except NotStorable as refused:
                hint = "The ledger keeps the context, so that the saga can go on without its caller."
                raise MisuseError(refused.expected, got=refused.got, hint=hint) from None
            journal = await Journal.begin(self.ledger, started, self._held.owner, _token_of(parent), self._listeners)
        except BaseException:
            self._held.let_go(saga_id)
            raise
        return self._lives(blueprint, policy, journal, context)

    async def _take(
        self, saga_id: str, pipeline: Pipeline, policy: Policy | None, parent: LiveSaga | None
    ) -> tuple[LiveSaga, Sequence[AnyEvent]]:
        """Take over a saga that nobody is running; with its events."""
        events = await events_of(self.ledger, saga_id)
        if parent is not None:
            _refuse_others(SagaState(events).started, parent)
        if saga_id in self._held.sagas:
            raise self._held.busy(saga_id, "a saga that nobody is running", f"{SagaState(events).status.value} here")
        self._held.hold(saga_id)
        try:
            token = await self._held.acquire(saga_id, _token_of(parent))
            try:
                # Read again: whoever held it until now may have written.
                events = await self.ledger.read(saga_id)
                state = SagaState(events)
                chosen = policy if policy is not None else state.policy
                blueprint = self._read(pipeline, chosen)
                _refuse_changed(state, blueprint)
                context = PipelineContext.create(**state.started.input)
                if self.ledger.durable:
                    blueprint.restore_outputs(state.stages)
            except BaseException:
                await self.ledger.release(saga_id, token)
                raise
        except BaseException:
            self._held.let_go(saga_id)
            raise
        journal = Journal(self.ledger, saga_id, state, version=len(events), token=token, owner=self._held.owner, listeners=self._listeners)
        saga = self._lives(blueprint, chosen, journal, context)
        saga.has_children = True
        return saga, events

    async def _go_on(self, saga_id: str, pipeline: Pipeline, decide: Decision, policy: Policy | None = None) -> SagaReport:
        """Take over a saga that nobody is running, and do what its events come to."""
        return await self._unbroken(*await self._taken_over(saga_id, pipeline, decide, policy))

    async def _taken_over(
        self, saga_id: str, pipeline: Pipeline, decide: Decision, policy: Policy | None = None, parent: LiveSaga | None = None
    ) -> tuple[LiveSaga, Coroutine[Any, Any, None]]:
        """A saga that nobody was running, held from here on, and the work that its events come to."""
        saga, events = await self._take(saga_id, pipeline, policy, parent)
        try:
            # Nothing is awaited before there is something to stop: a cancel by its id finds it.
            known, graph = saga.journal.state.graph, saga.journal.state.graph.offering(saga.blueprint.graph)
            return saga, self._turn_to(saga, decide(events, graph if graph != known else None))
        except BaseException:
            await self._let_go(saga)
            raise

    def _lives(self, blueprint: Blueprint, policy: FailFast | ContinueWithFallback, journal: Journal, context: PipelineContext) -> LiveSaga:
        actions = self._actions(blueprint, journal.saga_id)
        saga = self._held.sagas[journal.saga_id] = LiveSaga(blueprint, policy, journal, actions, context, self)
        return saga

    def _actions(self, blueprint: Blueprint, _saga_id: str) -> Actions:
        """What carries out the code of a saga's stages."""
        return LocalActions(blueprint)

    async def _let_go(self, saga: LiveSaga) -> None:
        self._held.let_go(saga.id)
        await saga.journal.close()

    def _forward(self, saga: LiveSaga, before: Sequence[AnyEvent] = ()) -> Coroutine[Any, Any, None]:
        # Made here and not in its task: a cancel that comes before the task runs finds what it is to stop.
        return self._drive(saga, Forward(saga, self._interceptors), before)

    async def _unbroken(self, saga: LiveSaga, work: Coroutine[Any, Any, None]) -> SagaReport:
        """Wait for the saga to come to rest, also when the caller is cancelled meanwhile."""
        driver = start(self._closing(saga, work))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        driver.add_done_callback(partial(_wake, done))
        try:
            await done
        except asyncio.CancelledError as cancelled:
            saga.interrupt("the caller was cancelled")
            # anyio repeats the cancel of a scope at every turn of the loop until the scope is left: the shield keeps
            # that off; further plain cancels are absorbed one by one.
            with anyio.CancelScope(shield=True):
                await outlast({driver})
            cancelled.add_note(str(driver.result()))
            raise
        return driver.result()

    async def _closing(self, saga: LiveSaga, work: Coroutine[Any, Any, None]) -> SagaReport:
        try:
            await self._to_rest(saga, work)
            return await self._report(saga)
        finally:
            await self._let_go(saga)
            self._amendments.record_late(saga.id)

    async def _to_rest(self, saga: LiveSaga, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except LedgerConflict:
            # Somebody else goes on with it; what is in effect is theirs to know.
            raise
        except LedgerError as error:
            raise saga.journal.left_unrecorded(error) from error

    async def _report(self, saga: LiveSaga) -> SagaReport:
        """The report of a saga that has come to rest, which is recorded whatever becomes of the report."""
        state = saga.journal.state
        if not saga.has_children:
            return SagaReport.of(state)
        try:
            return await report_with_children(self.ledger, state, saga.exceptions)
        except LedgerError as error:
            kind = LedgerCorrupt if isinstance(error, LedgerCorrupt) else LedgerError
            raise kind(
                f"saga {saga.id} is {state.status.value}, which is recorded; but the sagas that its stages ran can't be read: "
                f"{error}. When the ledger is back, ask for the report: await coordinator.report({saga.id!r})"
            ) from error

    async def _drive(self, saga: LiveSaga, forward: Forward, before: Sequence[AnyEvent]) -> None:
        if before:
            await saga.journal.record(*before)
        await forward.run()
        await self._conclude(saga, forward.cause)

    async def _conclude(self, saga: LiveSaga, stop: Failure | None) -> None:
        saga.is_stopping = True
        await self._amendments.note_late(saga)
        move = conclude(saga.journal.state, saga.policy, stop)
        if move.turn is not None:
            await saga.journal.record(SagaTurnedBack(reason=move.turn, cause=move.cause))
            await self._back(saga, move.turn)
            return
        await self._ask_the_rest(saga)
        status = move.status if move.status is not None else final_status(saga.journal.state, saga.policy)
        if status is SagaStatus.CANCELLED and has_doubt(saga.journal.state):
            # Nothing is left to do about one that was cancelled, and whoever prunes may forget it.
            status = SagaStatus.HALTED
        await saga.journal.record(SagaEnded(status=status, cause=move.cause), release=True)

    async def _ask_the_rest(self, saga: LiveSaga) -> None:
        """Ask for all that no compensation has asked for: to know is free, whatever the policy leaves standing."""
        state = saga.journal.state
        if state.is_spotless:
            return
        askable = [node.name for node in state.graph.nodes if undo_step(node, state.stages[node.name]) is Step.PROBE]
        asking = [start(ask(saga, name)) for name in askable]
        await outlast(asking)
        # All of them are looked at: asyncio complains of an exception that nobody looked at.
        for error in [asked.exception() for asked in asking]:
            if error is not None:
                raise error

    async def _back(self, saga: LiveSaga, reason: TurnReason) -> None:
        saga.is_stopping = True
        while True:
            await Backward(saga, reason).run()
            if not await self._amendments.note_late(saga):
                break
        await self._ask_the_rest(saga)
        await saga.journal.record(SagaEnded(status=final_status(saga.journal.state, saga.policy)), release=True)

    def _turn_to(self, saga: LiveSaga, chapter: Chapter) -> Coroutine[Any, Any, None]:
        """The work of a new chapter of the saga, which begins with its being recorded."""
        if chapter.direction is Direction.FORWARD:
            return self._forward(saga, chapter.events)
        return self._finish(saga, chapter)

    async def _finish(self, saga: LiveSaga, chapter: Chapter) -> None:
        if chapter.direction is Direction.NOWHERE:
            _LOG.info("saga %s: %s", saga.id, chapter.why_not)
            return
        await saga.journal.record(*chapter.events)
        if chapter.direction is Direction.CONCLUDE:
            await self._conclude(saga, chapter.stop)
        else:
            assert chapter.reason is not None  # a saga goes backward for a reason
            await self._back(saga, chapter.reason)

    async def _refuse_other(self, saga_id: str, pipeline: Pipeline, *, undoes: bool, forward: bool | None = None) -> None:
        """Refuse to go on with what is another saga's part, or with a pipeline of another name.

        Where the other one has nothing left to do about it, it may be undone by itself, or go on to be.

        Raises:
            SagaNotFound: The ledger has no such saga.
            MisuseError: Another one runs it.
            GraphChanged: The pipeline has another name.
        """
        state = SagaState(await events_of(self.ledger, saga_id))
        goes_back = undoes or (state.status is SagaStatus.STUCK and state.reason is not None and not forward)
        for parent, stage in (await run_by(self.ledger, state))[:1]:
            if goes_back and await is_left_alone(self.ledger, state, is_undone=undoes):
                break
            raise MisuseError(
                "a saga that no other one runs",
                got=f"{saga_id}, which is run by stage {stage!r} of saga {parent}",
                hint=f"Go on with {parent}: it goes on with those that it runs, and learns what became of them.",
            )
        name = getattr(pipeline, "name", None)
        if isinstance(name, str) and name != state.started.pipeline:
            raise GraphChanged(saga_id, [f"its pipeline is {state.started.pipeline!r}, this one is {name!r}"])


_COORDINATORS: Final[weakref.WeakSet[SagaCoordinator]] = weakref.WeakSet()


def _name_all_anew() -> None:
    """What a process that was forked off begins with."""
    for coordinator in _COORDINATORS:
        coordinator._name_anew()  # noqa: SLF001 - of this file


if hasattr(os, "register_at_fork"):  # pragma: no branch - where processes don't fork, there is nothing to see to
    os.register_at_fork(after_in_child=_name_all_anew)


def _checked(listeners: Sequence[Listener]) -> tuple[Listener, ...]:
    if callable(listeners):
        raise MisuseError("a list of listeners", got=repr(listeners), hint="Write listeners=[it].")
    for listener in listeners:
        if not callable(listener) or isinstance(listener, type) or inspect.iscoroutinefunction(listener):
            raise MisuseError("a listener to be a plain function, or an object that can be called as one", got=repr(listener))
    return tuple(listeners)


def _token_of(parent: LiveSaga | None) -> int | None:
    return None if parent is None else parent.journal.token


def _refuse_names(names: Mapping[str, str]) -> None:
    """Refuse what no saga can be recorded under.

    Raises:
        MisuseError: One of them is too long, or contains what not every database can hold.
    """
    for what, name in names.items():
        if not is_name(name):
            hint = "The id of a saga that a stage runs is made of that stage's name and its own saga's id." if what == "saga id" else ""
            raise MisuseError(f"a {what} {A_NAME}", got=f"one of {len(name)}: {name[:LONGEST_NAME]!r}", hint=hint)


def _refuse_others(started: SagaStarted, parent: LiveSaga) -> None:
    """Refuse a stage to go on with a saga that is not its own saga's: the ledger fences that one with another lease, or with none.

    Raises:
        MisuseError: It is not.
    """
    if started.parent != parent.id:
        runner = "no saga runs" if started.parent is None else f"saga {started.parent} runs"
        raise MisuseError(
            f"a saga that saga {parent.id} runs",
            got=f"{started.saga_id}, which {runner}",
            hint="A stage goes on with what it began with ctx.run_saga; other sagas are for the coordinator's own methods.",
        )


def _among(known: Mapping[str, Pipeline], name: str) -> Pipeline:
    if name not in known:
        raise MisuseError(f"a pipeline named {name!r}", got=f"those named {', '.join(known) or 'nothing'}")
    return known[name]


def _unexpected(saga_id: str, error: Exception) -> SagaError:
    failed = SagaError(f"saga {saga_id} could not go on: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _refuse_changed(state: SagaState, blueprint: Blueprint) -> None:
    differences = state.graph.differences(blueprint.graph)
    if differences:
        raise GraphChanged(state.started.saga_id, differences)


def _wake(waiter: asyncio.Future[None], _: asyncio.Task[SagaReport]) -> None:
    if not waiter.done():
        waiter.set_result(None)
