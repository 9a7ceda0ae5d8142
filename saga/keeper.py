"""Keeps the sagas that are alive: begins them, takes them over, and lets go of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
from stageflow.api import Pipeline, PipelineContext

from saga.amendments import Amendments
from saga.blueprint import Blueprint, read
from saga.course import Course
from saga.errors import GraphChanged, LedgerConflict, LedgerCorrupt, LedgerError, MisuseError, NotStorable, SagaError, SagaExists
from saga.events import AnyEvent, SagaStarted
from saga.family import differences_from, events_of, renamed
from saga.ledger import A_NAME, LONGEST_NAME, Ledger, is_name, recorded
from saga.listeners import Listener
from saga.live.actions import LocalActions
from saga.live.held import Held
from saga.live.inputs import context_from, recorded_input, refuse_both, refuse_unfit
from saga.live.journal import Journal
from saga.live.saga import PARENT_STOPS, STAGE_FAILED, LiveSaga
from saga.policies import ContinueWithFallback, FailFast, Policy
from saga.quick import maker
from saga.recovery.resumption import Decision, recovering, resumption, undoing
from saga.recovery.state import SagaState
from saga.report import SagaReport
from saga.storable import refuse_unstorable
from saga.tasks import cut_short, end, outlast, start
from saga.text import shown
from saga.within import report_of, report_with_children

if TYPE_CHECKING:
    from stageflow import BaseInterceptor

    from saga.live.actions import Actions


_saga_started: Final = maker(SagaStarted)


class SagaKeeper:
    """Begins sagas, takes over those that nobody runs, and brings them to rest, whoever is cancelled meanwhile.

    Args:
        ledger: Where they are recorded.
        interceptors: stageflow's, around every stage.
        listeners: Who is told of every event.

    Attributes:
        held: The sagas that are held here.
        amendments: What others than the sagas' own runs have to say.
        given_up: The tasks in which code still runs that nobody waits for any more.
    """

    def __init__(self, ledger: Ledger, interceptors: Sequence[BaseInterceptor], listeners: Sequence[Listener]) -> None:
        self.held: Final = Held(ledger)
        self.amendments: Final = Amendments(ledger, self.held, listeners)
        self.given_up: Final[set[asyncio.Task[Any]]] = set()
        self._ledger: Final = ledger
        self._interceptors: Final = interceptors
        self._listeners: Final = listeners

    async def run(
        self, blueprint: Blueprint, policy: FailFast | ContinueWithFallback, context: PipelineContext, saga_id: str | None
    ) -> SagaReport:
        """Run a new saga."""
        saga = None
        try:
            saga, work = await self._begin(blueprint, policy, context, saga_id)
            return await self._unbroken(saga, work)
        except LedgerConflict as conflict:
            if saga is None or saga.journal.token is None:
                # It never was in the ledger: when its first events came there, somebody else had begun it since it was looked for.
                raise _taken(saga_id) from conflict
            raise

    async def go_on(
        self, saga_id: str, pipeline: Pipeline, decide: Decision, policy: Policy | None = None, *, interrupted: str | None = None
    ) -> SagaReport:
        """Take over a saga that nobody is running, and do what its events come to.

        Args:
            saga_id: Its id.
            pipeline: Its pipeline.
            decide: What its events come to.
            policy: Its policy from here on; None: as before.
            interrupted: Why it is stopped as soon as it goes on; None: it is not.
        """
        await self.amendments.catch_up(saga_id)
        saga, work = await self._taken_over(saga_id, pipeline, decide, policy)
        if interrupted is not None:
            saga.interrupt(interrupted)
        return await self._unbroken(saga, work)

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
        blueprint = read(pipeline, policy)
        refuse_both(context, fields)
        if context is None:
            context = parent.child_context(stage, pipeline, fields)
        while True:
            try:
                saga, work = await self._begin(blueprint, policy, context, parent.children.next_id(stage, attempt), parent, stage)
            except SagaExists:
                # A fallback whose process has died is called once more, in the same attempt.
                continue
            return await self._as_child(parent, saga, work)

    async def resume_child(self, parent: LiveSaga, saga_id: str, pipeline: Pipeline, *, forward: bool | None) -> SagaReport:
        """Go on with a child of a saga's stage."""
        decide = partial(resumption, forward=forward, by=f"saga {parent.id}", by_its_stage=True)
        return await self._as_child(parent, *await self._taken_over(saga_id, pipeline, decide, parent=parent))

    async def _as_child(self, parent: LiveSaga, saga: LiveSaga, work: Coroutine[Any, Any, None]) -> SagaReport:
        stage = str(saga.journal.state.started.parent_stage)
        parent.children.takes_in(saga, stage)
        if parent.is_stopping:
            saga.interrupt(PARENT_STOPS)
        elif stage in parent.children.failed:
            saga.interrupt(STAGE_FAILED)
        try:
            report = await self._unbroken(saga, work)
        finally:
            parent.children.parts_with(saga)
        parent.children.exceptions |= {failure: failure.exception for failure in report.failures if failure.exception is not None}
        return report

    async def undo_child(self, parent: LiveSaga, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """Undo what is left of a child."""
        decide = partial(undoing, by=f"saga {parent.id}")
        return await self._unbroken(*await self._taken_over(saga_id, pipeline, decide, parent=parent))

    async def sagas_rest(self) -> None:
        """Wait until none runs in this event loop any more, also of those that stages which were given up have left."""
        loop = asyncio.get_running_loop()
        while drivers := {saga.driver for saga in tuple(self.held.sagas.values()) if saga is not None and saga.loop is loop}:
            await asyncio.wait(drivers)

    def gives_up(self, task: asyncio.Task[Any]) -> None:
        """Note that nobody waits any more for the code that a task runs."""
        self.given_up.add(task)
        task.add_done_callback(self.given_up.discard)

    async def wind_up(self) -> None:
        """Wait until nothing runs in this event loop any more, and what it has come to is recorded."""
        await self.sagas_rest()
        loop = asyncio.get_running_loop()
        while left := {task for task in tuple(self.given_up) if task.get_loop() is loop} | self.amendments.recordings():
            await asyncio.wait(left)
            await self.sagas_rest()

    async def rest_child(self, parent: LiveSaga, saga_id: str, pipeline: Pipeline) -> SagaReport:
        """See to it that a child whose process is gone comes to rest: it is stopped, as those are that run when their parent stops."""
        if not parent.is_stopping:
            return await report_of(self._ledger, saga_id)
        decide = partial(recovering, by=f"saga {parent.id}")
        return await self._as_child(parent, *await self._taken_over(saga_id, pipeline, decide, parent=parent))

    # -- how a saga runs -----------------------------------------------------------------------------------------

    async def _begin(
        self,
        blueprint: Blueprint,
        policy: FailFast | ContinueWithFallback,
        context: PipelineContext,
        saga_id: str | None,
        parent: LiveSaga | None = None,
        parent_stage: str | None = None,
    ) -> tuple[LiveSaga, Coroutine[Any, Any, None]]:
        """A new saga, held from here on, and the work of it."""
        if saga_id is not None and (not isinstance(saga_id, str) or not saga_id.strip()):
            hint = "" if isinstance(saga_id, str) else "An id is a str."
            raise MisuseError("a saga id with at least one visible character", got=shown(saga_id), hint=hint)
        refuse_unfit(context)
        if self._ledger.durable:
            # The ledger would refuse them, too, but with the error of one that has failed.
            _refuse_names({"saga id": saga_id or "", "pipeline name": blueprint.name})
        is_there = saga_id is not None and bool(await recorded(self._ledger, saga_id))
        if saga_id is None:
            saga_id = os.urandom(16).hex()
        # Held at last: while the ledger was read, somebody else may have begun it.
        if is_there or not self.held.hold(saga_id):
            raise _taken(saga_id)
        journal = None
        try:
            started = _saga_started(
                saga_id=saga_id,
                pipeline=blueprint.name,
                graph=blueprint.graph,
                policy=policy,
                input=recorded_input(context),
                parent=None if parent is None else parent.id,
                parent_stage=parent_stage,
            )
            try:
                refuse_unstorable(self._ledger, started)
            except NotStorable as refused:
                hint = "The ledger keeps the context, so that the saga can go on without its caller."
                raise MisuseError(refused.expected, got=refused.got, hint=hint) from None
            journal = await Journal.begin(self._ledger, started, self.held.owner, _token_of(parent), self._listeners)
            saga = self.lives(blueprint, policy, journal, context)
            return saga, self._course(saga).forward()
        except BaseException:
            self.held.let_go(saga_id)
            if journal is not None and (token := await journal.close()) is not None:
                await self.held.give_back(saga_id, token)
            raise

    async def _take(
        self, saga_id: str, pipeline: Pipeline, policy: Policy | None, parent: LiveSaga | None
    ) -> tuple[LiveSaga, Sequence[AnyEvent]]:
        """Take over a saga that nobody is running; with its events."""
        events = await events_of(self._ledger, saga_id)
        if parent is not None:
            _refuse_others(SagaState(events).started, parent)
        if not self.held.hold(saga_id):
            raise self.held.busy(saga_id, "a saga that nobody is running", f"{SagaState(events).status.value} here")
        try:
            # Its holder may only stand still, and the lease have ended: code that can't go on with the saga leaves it to that one.
            await self._fitting(SagaState(events), pipeline, policy, parent)
            token = await self.held.acquire(saga_id, _token_of(parent))
            try:
                # Read again: whoever held it until now may have written.
                events = await events_of(self._ledger, saga_id)
                state = SagaState(events)
                blueprint, chosen = await self._fitting(state, pipeline, policy, parent)
                context = context_from(state.started.input)
                if self._ledger.durable:
                    blueprint.restore_outputs(state.stages)
                await self.amendments.let_hear(saga_id, events)
                owner, listeners = self.held.owner, self._listeners
                journal = Journal(self._ledger, saga_id, state, version=len(events), token=token, owner=owner, listeners=listeners)
                saga = self.lives(blueprint, chosen, journal, context)
            except BaseException:
                await self.held.give_back(saga_id, token)
                raise
        except BaseException:
            self.held.let_go(saga_id)
            raise
        saga.children.heed_those_before()
        return saga, events

    async def _fitting(
        self, state: SagaState, pipeline: Pipeline, policy: Policy | None, parent: LiveSaga | None
    ) -> tuple[Blueprint, FailFast | ContinueWithFallback]:
        """The pipeline, read, and the policy with which a saga goes on; refused where they are not for it."""
        blueprint, chosen = Blueprint.of(pipeline), policy if policy is not None else state.policy
        # Before the policy: where a stage is gone that it names, it is the pipeline that has changed.
        await _refuse_changed(self._ledger, state, blueprint, parent)
        blueprint.check_policy(chosen)
        return blueprint, chosen

    async def _taken_over(
        self, saga_id: str, pipeline: Pipeline, decide: Decision, policy: Policy | None = None, parent: LiveSaga | None = None
    ) -> tuple[LiveSaga, Coroutine[Any, Any, None]]:
        """A saga that nobody was running, held from here on, and the work that its events come to."""
        saga, events = await self._take(saga_id, pipeline, policy, parent)
        try:
            # Nothing is awaited before there is something to stop: a cancel by its id finds it.
            known, graph = saga.journal.state.graph, saga.journal.state.graph.offering(saga.blueprint.graph)
            chapter = decide(events, graph if graph != known else None)
            return saga, self._course(saga).turn_to(chapter)
        except BaseException:
            await self._let_go(saga)
            raise

    def lives(self, blueprint: Blueprint, policy: FailFast | ContinueWithFallback, journal: Journal, context: PipelineContext) -> LiveSaga:
        """A saga, held and in its ledger, from here on."""
        actions = self.actions(blueprint, journal.saga_id)
        saga = self.held.sagas[journal.saga_id] = LiveSaga(blueprint, policy, journal, actions, context, self)
        return saga

    def actions(self, blueprint: Blueprint, _saga_id: str) -> Actions:
        """What carries out the code of a saga's stages."""
        return LocalActions(blueprint)

    async def _let_go(self, saga: LiveSaga) -> None:
        if not saga.loop.is_running():
            # What is left of it is being thrown away, and nothing can be awaited; somebody may hold the saga anew.
            self.held.abandon(saga)
            return
        self.held.let_go(saga.id)
        token = await saga.journal.close()
        if token is not None:
            await self.held.give_back(saga.id, token)

    def _course(self, saga: LiveSaga) -> Course:
        return Course(saga, self.amendments, self._interceptors)

    async def _unbroken(self, saga: LiveSaga, work: Coroutine[Any, Any, None]) -> SagaReport:
        """Wait for the saga to come to rest, also when the caller is cancelled meanwhile."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended = partial(self._end_wait, saga, done)
        driver = saga.driver = start(self._closing(saga, work, ended))
        driver.add_done_callback(ended)
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

    def _end_wait(self, saga: LiveSaga, waiter: asyncio.Future[None], _: asyncio.Task[SagaReport]) -> None:
        # It has been let go of, unless a Ctrl-C struck just where that was to be done, or to be seen to: its heart would beat on for ever.
        self.held.abandon(saga)
        end(waiter)
        vars(saga).pop("driver", None)  # nobody finds it any more, and its context may hold the saga

    async def _closing(
        self, saga: LiveSaga, work: Coroutine[Any, Any, None], ended: Callable[[asyncio.Task[SagaReport]], None]
    ) -> SagaReport:
        try:
            await self._to_rest(saga, work)
            report = await self._report(saga)
        finally:
            await self._let_go(saga)
            saga.say_again()
            # The report has them; the frames of a stage's code hold its context, and that holds the saga.
            saga.journal.state.forget_failures()
            self.amendments.record_late(saga.id)
        # Nothing is awaited any more: when whoever waits goes on, this task has ended. To be told by it takes a turn of the loop more.
        driver = saga.driver
        ended(driver)
        # Last: where a Ctrl-C strikes before, the callback ends the wait.
        driver.remove_done_callback(ended)
        return report

    async def _to_rest(self, saga: LiveSaga, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except LedgerError as error:
            why: LedgerError = error
            if isinstance(error, LedgerConflict):
                if not error.is_missing:
                    # Somebody else goes on with it; what is in effect is theirs to know.
                    raise
                # What is missing may be what an append before it was to write, and failed.
                why = saga.journal.error or error
            raise saga.journal.left_unrecorded(why) from why
        except (MemoryError, RecursionError) as error:
            # Whatever code runs, these strike it: what is in effect is said, as where a Ctrl-C does.
            raise saga.journal.left_unrecorded(cut_short(error)) from error

    async def _report(self, saga: LiveSaga) -> SagaReport:
        """The report of a saga that has come to rest, which is recorded whatever becomes of the report."""
        state = saga.journal.state
        try:
            if not saga.children.has_any:
                return SagaReport.of(state)
            return await report_with_children(self._ledger, state, saga.children.exceptions)
        except LedgerError as error:
            kind = LedgerCorrupt if isinstance(error, LedgerCorrupt) else LedgerError
            raise kind(
                f"saga {saga.id} is {state.status.value}, which is recorded; but the sagas that its stages ran can't be read: "
                f"{error}. When the ledger is back, ask for the report: await coordinator.report({saga.id!r})"
            ) from error
        except (MemoryError, RecursionError) as error:
            # No error of the ledger's, of which a saga that runs this one would break off: all of this one is known.
            raise SagaError(
                f"saga {saga.id} is {state.status.value}, which is recorded; but a {type(error).__name__} struck while its report was "
                f"made. Ask for it: await coordinator.report({saga.id!r})"
            ) from error


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


def _taken(saga_id: str | None) -> SagaExists:
    return SagaExists("a saga id that is not in the ledger yet", got=repr(saga_id), hint="Read what became of it with report().")


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


async def _refuse_changed(ledger: Ledger, state: SagaState, blueprint: Blueprint, parent: LiveSaga | None) -> None:
    # For a saga of its own, whoever goes on with it may have said which pipeline is meant by the name.
    differences = [] if parent is None else renamed(state, blueprint.name)
    if differences := differences or await differences_from(ledger, state, blueprint):
        raise GraphChanged(state.started.saga_id, differences)
