"""The commands that run the code of a pipeline: run, resume, compensate and recover."""

from __future__ import annotations

import asyncio
import inspect
import json
import secrets
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from errno import EIO
from functools import partial
from typing import Annotated, Any, Final, NoReturn

import typer
from stageflow.api import Pipeline

from saga.cli.aside import aside, let_go
from saga.cli.commands.given import AsJson, KnownTarget, PolicyFile, SagaId, Target, json_object, policy_in, policy_of
from saga.cli.commands.ledger import LedgerUrl, durable, ledger_at, reach_of, refuse_unknown, url_of
from saga.cli.commands.printed import print_error, print_json, print_report
from saga.cli.conduct import conduct, to_the_end, wound_up
from saga.cli.exits import Exit, exit_of_status
from saga.cli.interrupt import interruptible
from saga.cli.pipelines import load, load_all
from saga.cli.settings import settings
from saga.cli.view import Stderr, hanging_up, tell_on
from saga.coordinator import SagaCoordinator
from saga.errors import LedgerError, MisuseError, SagaExists, SagaUnrecorded
from saga.events import SagaStatus
from saga.family import sagas_above
from saga.ledger import Ledger, listed
from saga.policies import Policy
from saga.recovery.resumption import Decision, resumption, undoing
from saga.recovery.state import SagaState
from saga.render.reach import TARGET, Reach, command_for, next_command
from saga.report import Recovery, SagaReport
from saga.tasks import this_task

_NO_FIELDS: Final = frozenset(inspect.signature(SagaCoordinator.run).parameters) - {"context_fields"}
"""What `SagaCoordinator.run` takes beside the fields of a context."""


def run(
    target: Target,
    text: Annotated[str, typer.Option("--input", metavar="TEXT|@FILE", help="The text, or a file: a JSON object of context fields.")] = "",
    policy: PolicyFile = None,
    ledger: LedgerUrl = None,
    saga_id: Annotated[str | None, typer.Option("--id", metavar="ID", help="The saga's id; a new one by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline as a saga."""
    pipeline, fields, chosen = load(target), _fields(text), policy_of(policy)
    name = saga_id if saga_id is not None else secrets.token_hex(6)
    url, reach = url_of(ledger), reach_of(target, ledger)

    async def work(coordinator: SagaCoordinator) -> SagaReport:
        try:
            return await coordinator.run(pipeline, saga_id=name, **fields)
        except SagaExists as taken:
            hint = f"What became of that one: {next_command('show', name, options=reach.options)}"
            raise SagaExists(taken.expected, got=taken.got, hint=hint) from None

    _exit_with(_conduct(url, name, work, reach, policy=chosen, exists=False, as_json=as_json))


def resume(
    saga_id: SagaId,
    target: KnownTarget = None,
    policy: PolicyFile = None,
    forward: Annotated[bool, typer.Option("--forward", help="Run on a saga that is stuck on its way back, or that was undone.")] = False,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a saga that halted, is stuck or lost its process."""
    chosen = None if policy is None else policy_in(policy)
    url = durable(ledger)

    async def work(coordinator: SagaCoordinator) -> SagaReport:
        pipeline = await _pipeline_of(coordinator.ledger, saga_id, target, command_for("resume", saga_id, reach_of(TARGET, ledger)))
        return await coordinator.resume(saga_id, pipeline, policy=chosen, forward=forward or None)

    decision = partial(resumption, policy=chosen, forward=forward or None, by="")
    given = [*(["--forward"] if forward else ()), *(() if policy is None else ("--policy", str(policy)))]
    _exit_with(_conduct(url, saga_id, work, reach_of(target, ledger), decision=decision, given=given, as_json=as_json))


def compensate(saga_id: SagaId, target: KnownTarget = None, ledger: LedgerUrl = None, as_json: AsJson = False) -> None:
    """Undo a saga, also one that completed."""
    url = durable(ledger)

    async def work(coordinator: SagaCoordinator) -> SagaReport:
        pipeline = await _pipeline_of(coordinator.ledger, saga_id, target, command_for("compensate", saga_id, reach_of(TARGET, ledger)))
        return await coordinator.compensate(saga_id, pipeline)

    # Until it is recorded that it is to be undone, to resume it would run it on.
    _exit_with(
        _conduct(url, saga_id, work, reach_of(target, ledger), decision=partial(undoing, by=""), again="compensate", as_json=as_json)
    )


def _exit_with(command: Coroutine[Any, Any, Exit]) -> NoReturn:
    raise typer.Exit(asyncio.run(to_the_end(command, print_error)))


async def _conduct(
    url: str,
    saga_id: str,
    work: Callable[[SagaCoordinator], Coroutine[Any, Any, SagaReport]],
    reach: Reach,
    *,
    policy: Policy | None = None,
    decision: Decision | None = None,
    again: str = "resume",
    given: Sequence[str] = (),
    exists: bool = True,
    as_json: bool,
) -> Exit:
    goes_on = command_for(again, saga_id, reach)
    async with ledger_at(url, exists=exists) as ledger:
        try:
            outcome = await conduct(ledger, saga_id, work, console=Stderr(), goes_on=goes_on, policy=policy)
        except SagaUnrecorded as stopped:
            # One that was undone since what was asked for was recorded would be run once more.
            options = [shlex.join(given)] if stopped.asked_in_vain else []
            next_reach = reach._replace(options=" ".join(filter(None, [*options, reach.options])))
            raise _unrecorded(stopped, command_for(again, saga_id, next_reach)) from stopped
        if outcome.idle and decision is not None and (why_not := decision(await ledger.read(saga_id), None).why_not):
            typer.echo(f"Nothing was done: {why_not}.", err=True)
    if outcome.report is None:
        return Exit.INTERRUPTED
    try:
        print_report(outcome.report, reach, as_json=as_json)
    except OSError as error:
        # It was interrupted by whoever closed the terminal on which that would stand.
        if not (outcome.interrupted and error.errno == EIO):
            raise
        let_go(sys.stdout.fileno())  # Python tries once more at its end
    return exit_of_status(outcome.report.status, interrupted=outcome.interrupted)


def _unrecorded(stopped: SagaUnrecorded, goes_on: str) -> LedgerError:
    """The same for who types commands, and has no coordinator."""
    return LedgerError(f"{stopped.told} When the ledger is back, go on: {goes_on}")


def recover(
    targets: Annotated[list[str] | None, typer.Argument(metavar=TARGET, help="The pipelines; by default [tool.saga] pipelines.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="How many sagas go on at once.")] = 10,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Go on with every saga whose process is gone."""
    pipelines = _pipelines(targets or settings().pipelines)
    url = durable(ledger)
    goes_on = next_command("recover", *(targets or ()), options=reach_of(None, ledger).options)

    async def all_of_them() -> Exit:
        async with ledger_at(url) as opened:
            console, gone_on_with = Stderr(), set[str]()
            coordinator = SagaCoordinator(ledger=opened, listeners=[tell_on(console), lambda saga_id, _: gone_on_with.add(saga_id)])
            task = asyncio.create_task(coordinator.recover(pipelines, concurrency=concurrency))
            recovery: Recovery | None = None
            by_ctrl_c = interruptible(task, lambda: console.print(_FIRST, soft_wrap=True), lambda: _SECOND, hanging_up(console))
            with by_ctrl_c, aside(), suppress(asyncio.CancelledError):
                recovery = await task
            with aside():
                has_news = await wound_up(coordinator, console, {this_task()})
            if recovery is None:
                stuck, _ = await listed(opened, {SagaStatus.STUCK})
                return Exit.INTERRUPTED if gone_on_with.isdisjoint(stuck) else Exit.STUCK
            if has_news:
                recovery.reports.update({saga_id: await coordinator.report(saga_id) for saga_id in recovery.reports})
        unrecorded = {saga_id: error for saga_id, error in recovery.failed.items() if isinstance(error, SagaUnrecorded)}
        recovery.failed.update({saga_id: _unrecorded(stopped, goes_on) for saga_id, stopped in unrecorded.items()})
        if as_json:
            print_json(_as_json(recovery))
        else:
            typer.echo(recovery)
        ends = {exit_of_status(report.status) for report in recovery.reports.values()}
        ends |= {Exit.FAILED} if recovery.failed else set()
        return next((gravest for gravest in (Exit.STUCK, Exit.FAILED, Exit.HALTED) if gravest in ends), Exit.COMPLETED)

    _exit_with(all_of_them())


def _as_json(recovery: Recovery) -> str:
    return json.dumps(
        {
            "reports": {saga_id: report.model_dump(mode="json") for saga_id, report in recovery.reports.items()},
            "held": {saga_id: str(error) for saga_id, error in recovery.held.items()},
            "failed": {saga_id: str(error) for saga_id, error in recovery.failed.items()},
        }
    )


_FIRST: Final = "Interrupted: what these sagas did is undone, as their policies say. A second Ctrl-C stops at once."
_SECOND: Final = "Stopped at once; saga recover goes on from there.\n"


def _fields(given: str) -> dict[str, Any]:
    if not given.startswith("@"):
        return {"input_text": given} if given else {}
    fields = json_object(given, "--input")
    if others := sorted(_NO_FIELDS & fields.keys()):
        raise MisuseError("fields of stageflow's PipelineContext", got=", ".join(map(repr, others)), hint="A saga's id is given with --id.")
    return fields


def _pipelines(targets: Sequence[str], hint: str = "") -> dict[str, Pipeline]:
    if not targets:
        raise MisuseError(f"{TARGET}, or pipelines in [tool.saga] of pyproject.toml", got="neither", hint=hint)
    return load_all(targets)


async def _pipeline_of(ledger: Ledger, saga_id: str, target: str | None, with_target: str) -> Pipeline:
    await refuse_unknown(ledger, saga_id)
    if target is not None:
        return load(target)
    state = SagaState(await ledger.read(saga_id))
    name = state.started.pipeline
    above = await sagas_above(ledger, state)
    say = f"Go on with saga {above[0][0]}, which runs it. Where that is done with it, say" if above else "Say"
    hint = f"{say} where {name!r} is: {with_target}"
    known = _pipelines(settings().pipelines, hint)
    if name not in known:
        raise MisuseError(f"the pipeline {name!r} among [tool.saga] pipelines", got=", ".join(known), hint=hint)
    return known[name]
