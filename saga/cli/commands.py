"""The commands of `saga`."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from errno import EIO
from functools import partial, wraps
from hashlib import sha256
from heapq import merge
from importlib.metadata import PackageNotFoundError, version
from itertools import count, groupby
from pathlib import Path
from traceback import format_exc
from typing import Annotated, Any, Final, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError
from stageflow.api import Pipeline

from saga.cli.aside import aside, let_go
from saga.cli.conduct import conduct, to_the_end, wound_up
from saga.cli.exits import Exit, exit_of_error, exit_of_status, in_a_line
from saga.cli.family import Family
from saga.cli.interrupt import interruptible
from saga.cli.pipelines import load, load_all
from saga.cli.settings import here, settings
from saga.cli.view import Stderr, hanging_up, tell_on, view
from saga.coordinator import SagaCoordinator
from saga.errors import LedgerCorrupt, LedgerError, MisuseError, PolicyInvalid, SagaExists, SagaNotFound, SagasDamaged, SagaUnrecorded
from saga.events import AnyEvent, SagaStarted, SagaStatus, Verdict, event_from_json, event_to_json, line_of
from saga.keys import is_within
from saga.ledger import ALIVE, Entry, Ledger, listed
from saga.ledgers import open_ledger
from saga.lint import Explanation, Finding, Severity
from saga.lint import check as find
from saga.lint import explain as consequences
from saga.owners import is_gone
from saga.policies import Policy, load_policy
from saga.render.lettering import aligned
from saga.render.reach import TARGET, Reach, command_for, next_command, recover_command
from saga.render.text import summary
from saga.report import Recovery, SagaReport
from saga.resumption import Decision, resumption, undoing
from saga.state import SagaState
from saga.text import bytes_of, did_you_mean, harmless, printable
from saga.watch import this_task

_MEMORY: Final = "memory:"
_VARIABLE: Final = "SAGA_LEDGER"
_LOOKS: Final = 0.25
"""Seconds between two looks of `saga watch` into the ledger."""
_SELDOM: Final = 8
"""How many of them there are to one for who runs the saga: that one goes through the whole ledger."""
_NO_FIELDS: Final = frozenset(inspect.signature(SagaCoordinator.run).parameters) - {"context_fields"}
"""What `SagaCoordinator.run` takes beside the fields of a context."""
_HIDDEN: Final = re.compile("@|password", re.IGNORECASE)
"""What the URL of a ledger has where it may hold a password."""
_AS_IT_IS: Final = re.compile(r"(?!=)[\w@%+=:,./-]+")
"""What every shell reads as it is. zsh looks for a program behind a first =; `shlex.quote` would quote all letters but those of English."""
_END_OF_EXPORT: Final = re.compile(r'\{"events":(\d+)\}\s*$')
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

app: Final = typer.Typer(
    help="Run pipelines that undo what they did when they fail, and look after those that could not.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: one that says in a line what went wrong, and shows a traceback only when it is asked to."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def guarded(*, traceback: bool, **given: Any) -> None:
            try:
                function(**given)
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise
            except Exception as error:  # noqa: BLE001 - at night, a line says more than a traceback
                told = "\n".join(map(harmless, format_exc().split("\n"))) if traceback else f"saga: {in_a_line(error)}"
                typer.echo(told, err=True)
                raise typer.Exit(exit_of_error(error)) from None

        signature = inspect.signature(function, eval_str=True)
        option = inspect.Parameter("traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Traceback)
        guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined] # typer reads it
        guarded.__annotations__ = function.__annotations__ | {"traceback": Traceback}
        # The whole line: of a longer help the list of commands would show a part.
        app.command(name, short_help=inspect.getdoc(function))(guarded)
        return function

    return register


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        try:
            typer.echo(f"saga {version('stageflow-saga')}")
        except PackageNotFoundError:
            typer.echo("saga, from a folder that is not installed")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None: ...


def _known_ids(ctx: typer.Context) -> list[str]:
    async def ids() -> list[str]:
        async with _opened(_durable(ctx.params.get("ledger"))) as ledger:
            return [*(await listed(ledger))[0]]

    return _completed(ids())


def _known_stages(ctx: typer.Context) -> list[str]:
    async def stages() -> list[str]:
        async with _opened(_durable(ctx.params.get("ledger"))) as ledger:
            family = await Family.read(ledger, ctx.params["saga_id"])
            return list(family.sagas[family.head].stages)

    return _completed(stages())


def _completed(words: Coroutine[Any, Any, list[str]]) -> list[str]:
    try:
        # The shell takes them for what was typed; zsh already when it offers them, and typer does not quote all that it would run.
        return [word for word in asyncio.run(words) if _AS_IT_IS.fullmatch(word)]
    except Exception:  # noqa: BLE001 - a shell that completes a word has no place for an error
        return []


SagaId = Annotated[str, typer.Argument(metavar="ID", help="The saga's id.", autocompletion=_known_ids)]
Stage = Annotated[str, typer.Argument(metavar="STAGE", help="The stage; one of a nested saga by its path.", autocompletion=_known_stages)]
Target = Annotated[str, typer.Argument(metavar=TARGET, help="A Pipeline, or a function that returns one.")]
KnownTarget = Annotated[str | None, typer.Argument(metavar=TARGET, help="Its pipeline; by default found in [tool.saga] pipelines.")]
LedgerUrl = Annotated[
    str | None,
    typer.Option("--ledger", metavar="URL", envvar=_VARIABLE, help="memory:, sqlite:///path or postgresql://...", show_default=False),
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", metavar="FILE", help="A policy, in TOML or JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


# -- running -----------------------------------------------------------------------------------------------------


@command("run")
def run(
    target: Target,
    text: Annotated[str, typer.Option("--input", metavar="TEXT|@FILE", help="The text, or a file: a JSON object of context fields.")] = "",
    policy: PolicyFile = None,
    ledger: LedgerUrl = None,
    saga_id: Annotated[str | None, typer.Option("--id", metavar="ID", help="The saga's id; a new one by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline as a saga."""
    pipeline, fields, chosen = load(target), _fields(text), _policy(policy)
    name = saga_id if saga_id is not None else secrets.token_hex(6)
    url, reach = _url(ledger), _reach(target, ledger)

    async def work(coordinator: SagaCoordinator) -> SagaReport:
        try:
            return await coordinator.run(pipeline, saga_id=name, **fields)
        except SagaExists as taken:
            hint = f"What became of that one: {next_command('show', name, options=reach.options)}"
            raise SagaExists(taken.expected, got=taken.got, hint=hint) from None

    _exit_with(_conduct(url, name, work, reach, policy=chosen, as_json=as_json))


@command("resume")
def resume(
    saga_id: SagaId,
    target: KnownTarget = None,
    policy: PolicyFile = None,
    forward: Annotated[bool, typer.Option("--forward", help="Run on a saga that is stuck on its way back, or that was undone.")] = False,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a saga that halted, is stuck or lost its process."""
    chosen = None if policy is None else _loaded(policy)
    url = _durable(ledger)

    async def work(coordinator: SagaCoordinator) -> SagaReport:
        pipeline = await _pipeline_of(coordinator.ledger, saga_id, target, command_for("resume", saga_id, _reach(TARGET, ledger)))
        return await coordinator.resume(saga_id, pipeline, policy=chosen, forward=forward or None)

    decision = partial(resumption, policy=chosen, forward=forward or None, by="")
    given = [*(["--forward"] if forward else ()), *(() if policy is None else ("--policy", str(policy)))]
    _exit_with(_conduct(url, saga_id, work, _reach(target, ledger), decision=decision, given=given, as_json=as_json))


@command("compensate")
def compensate(saga_id: SagaId, target: KnownTarget = None, ledger: LedgerUrl = None, as_json: AsJson = False) -> None:
    """Undo a saga, also one that completed."""
    url = _durable(ledger)

    async def work(coordinator: SagaCoordinator) -> SagaReport:
        pipeline = await _pipeline_of(coordinator.ledger, saga_id, target, command_for("compensate", saga_id, _reach(TARGET, ledger)))
        return await coordinator.compensate(saga_id, pipeline)

    # Until it is recorded that it is to be undone, to resume it would run it on.
    _exit_with(_conduct(url, saga_id, work, _reach(target, ledger), decision=partial(undoing, by=""), again="compensate", as_json=as_json))


def _exit_with(command: Coroutine[Any, Any, Exit]) -> NoReturn:
    raise typer.Exit(asyncio.run(to_the_end(command)))


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
    as_json: bool,
) -> Exit:
    goes_on = command_for(again, saga_id, reach)
    async with _opened(url) as ledger:
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
        _print_report(outcome.report, reach, as_json=as_json)
    except OSError as error:
        # It was interrupted by whoever closed the terminal on which that would stand.
        if not (outcome.interrupted and error.errno == EIO):
            raise
        let_go(sys.stdout.fileno())  # Python tries once more at its end
    return exit_of_status(outcome.report.status, interrupted=outcome.interrupted)


def _unrecorded(stopped: SagaUnrecorded, goes_on: str) -> LedgerError:
    """The same for who types commands, and has no coordinator."""
    return LedgerError(f"{stopped.told} When the ledger is back, go on: {goes_on}")


@command("recover")
def recover(
    targets: Annotated[list[str] | None, typer.Argument(metavar=TARGET, help="The pipelines; by default [tool.saga] pipelines.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="How many sagas go on at once.")] = 10,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Go on with every saga whose process is gone."""
    pipelines = _pipelines(targets or settings().pipelines)
    url = _durable(ledger)
    goes_on = next_command("recover", *(targets or ()), options=_reach(None, ledger).options)

    async def all_of_them() -> Exit:
        async with _opened(url) as opened:
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
            _print_json(_as_json(recovery))
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


# -- looking -----------------------------------------------------------------------------------------------------


@command("list")
def list_(
    statuses: Annotated[list[SagaStatus] | None, typer.Option("--status", help="Only those that stand so; may be repeated.")] = None,
    nested: Annotated[bool, typer.Option("--nested", help="Also those that stages of other sagas run.")] = False,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """List the sagas, oldest first."""

    async def entries() -> tuple[list[Entry], Mapping[str, LedgerCorrupt]]:
        async with _opened(_durable(ledger)) as opened:
            known, damaged = await listed(opened, statuses or None)
            return [entry for entry in known.values() if nested or entry.parent is None], damaged

    found, damaged = asyncio.run(entries())
    if as_json:
        _print_json(TypeAdapter(list[Entry]).dump_json(found).decode())
    else:
        cells = [
            (printable(entry.saga_id), printable(entry.pipeline), entry.status.value, _when(entry.started_at), _runs(entry))
            for entry in found
        ]
        for line in aligned([("ID", "PIPELINE", "STATUS", "STARTED", ""), *cells]):
            typer.echo(line)
    if damaged:
        raise SagasDamaged(damaged, found)


def _when(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _runs(entry: Entry) -> str:
    if entry.status not in ALIVE:
        return ""
    return "somebody runs it" if _is_held(entry) else "nobody runs it"


def _is_held(entry: Entry) -> bool:
    """Whether somebody who counts as alive holds the saga."""
    if entry.owner is None or entry.until is None or is_gone(entry.owner):
        return False
    return entry.until >= datetime.now(UTC)


@command("show")
def show(saga_id: SagaId, ledger: LedgerUrl = None, as_json: AsJson = False) -> None:
    """Show what became of a saga, and what is to be done about it."""
    reach = _reach(None, ledger)

    async def report() -> SagaReport:
        async with _opened(_durable(ledger)) as opened:
            await _refuse_unknown(opened, saga_id)
            return await SagaCoordinator(ledger=opened).report(saga_id)

    _print_report(asyncio.run(report()), reach, as_json=as_json)


@command("watch")
def watch(saga_id: SagaId, ledger: LedgerUrl = None, as_json: AsJson = False) -> None:
    """Look on while another process runs a saga, until it has come to rest or nobody runs it any more."""
    reach = _reach(None, ledger)

    async def looking_on() -> tuple[SagaReport, str | None]:
        async with _opened(_durable(ledger)) as opened:
            await _refuse_unknown(opened, saga_id)
            coordinator, family, left = SagaCoordinator(ledger=opened), await Family.read(opened, saga_id), None
            looks = count()
            async with view(family, Stderr()) as hear:
                while True:
                    # What it is told by: somebody may go on right now with a saga that has come to rest.
                    report = await coordinator.report(saga_id)
                    news = groupby([told async for told in family.news(opened)], lambda told: told[0])
                    # By the clock, but of each saga in its own order, whatever the clock did.
                    for member, event in merge(*(list(of_one) for _, of_one in news), key=lambda told: told[1].at):
                        hear(member, event)
                    if report.ended_at is not None or left is not None:
                        return report, left
                    await asyncio.sleep(_LOOKS)
                    if next(looks) % _SELDOM == 0:
                        left = _left_behind(saga_id, *await listed(opened, ALIVE))

    try:
        report, left = asyncio.run(looking_on())
    except KeyboardInterrupt:
        typer.echo(f"Watching {saga_id} no longer; it goes on by itself.", err=True)
        raise typer.Exit(Exit.INTERRUPTED) from None
    _print_report(report, reach, as_json=as_json)
    if left is None:
        raise typer.Exit(exit_of_status(report.status))
    typer.echo(f"Nobody runs {saga_id} any more: its process is gone, or has not said for as long as its lease that it is alive.", err=True)
    resume = command_for("resume", left, reach)
    typer.echo(f"What goes on with it: {resume}; with all whose process is gone: {recover_command(reach)}", err=True)
    raise typer.Exit(Exit.LEFT)


def _left_behind(saga_id: str, alive: Mapping[str, Entry], damaged: Mapping[str, LedgerCorrupt]) -> str | None:
    """The saga to go on with, if nobody runs this one any more: itself, or the outermost one that runs it."""
    if saga_id in damaged:
        raise damaged[saga_id]
    entry = alive.get(saga_id)
    while entry is not None and entry.parent is not None and entry.parent in alive:
        entry = alive[entry.parent]
    return None if entry is None or _is_held(entry) else entry.saga_id


# -- a person's word ---------------------------------------------------------------------------------------------


@command("settle")
def settle(
    saga_id: SagaId,
    stage: Stage,
    verdict: Annotated[
        Verdict, typer.Argument(metavar="VERDICT", help="undone: nothing of it stands. kept: it stands, and is to. retry: try once more.")
    ],
    note: Annotated[str, typer.Option("--note", help="Why; for whoever reads the ledger later.")],
    output: Annotated[
        str | None, typer.Option("--output", metavar="JSON|@FILE", help="With kept: the output data of a stage that gave none.")
    ] = None,
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say what became of a stage that is stuck or in doubt."""
    data = None if output is None else _json_object(output, "--output")
    reach = _reach(None, ledger)

    async def settled() -> SagaReport:
        async with _opened(_durable(ledger)) as opened:
            await _refuse_unknown(opened, saga_id)
            return await SagaCoordinator(ledger=opened).settle(saga_id, stage, verdict, note, output=data)

    _print_report(asyncio.run(settled()), reach, as_json=as_json)


# -- before it runs ----------------------------------------------------------------------------------------------


@command("check")
def check(target: Target, policy: PolicyFile = None, as_json: AsJson = False) -> None:
    """Find what is wrong with a pipeline, without running it."""
    findings = find(load(target), _policy(policy))
    if as_json:
        _print_json(TypeAdapter(list[Finding]).dump_json(findings).decode())
    else:
        for finding in findings:
            typer.echo(finding)
    raise typer.Exit(Exit.FOUND if any(finding.severity is Severity.ERROR for finding in findings) else Exit.COMPLETED)


@command("explain")
def explain(target: Target, policy: PolicyFile = None, as_json: AsJson = False) -> None:
    """Say for every stage what follows when it fails."""
    explanation = consequences(load(target), _policy(policy))
    if as_json:
        _print_json(TypeAdapter(Explanation).dump_json(explanation).decode())
    else:
        typer.echo(explanation)


# -- the ledger's keeping ----------------------------------------------------------------------------------------


@command("prune")
def prune(
    older_than: Annotated[str, typer.Option("--older-than", metavar="AGE", help="How old, as in 30d, 12h or 90m.")],
    ledger: LedgerUrl = None,
) -> None:
    """Forget old sagas about which nothing is left to do."""
    age = _age(older_than)

    async def forgotten() -> tuple[str, ...]:
        async with _opened(_durable(ledger)) as opened:
            return tuple(await opened.prune(age))

    gone = asyncio.run(forgotten())
    for saga_id in gone:
        typer.echo(printable(saga_id))
    typer.echo(f"{len(gone)} forgotten", err=True)


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d+)([smhdw])", text)
    if not found:
        raise MisuseError("an age such as 30d, 12h or 90m", got=repr(text))
    try:
        age = timedelta(**{_UNITS[found[2]]: int(found[1])})
        datetime.now(UTC) - age
    except (OverflowError, ValueError):
        raise MisuseError("an age that reaches back to the year 1 at most", got=f"{text[:20]!r}") from None
    return age


@command("export")
def export(saga_id: SagaId, ledger: LedgerUrl = None) -> None:
    """Write the events of a saga, and of those that its stages run, as JSON lines, and how many there are."""

    async def events() -> list[AnyEvent]:
        async with _opened(_durable(ledger)) as opened:
            await _refuse_unknown(opened, saga_id)
            family = await Family.read(opened, saga_id)
            return [event for member in family.sagas for event in await opened.read(member)]

    written = asyncio.run(events())
    for event in written:
        _print_json(event_to_json(event))
    _print_json(f'{{"events":{len(written)}}}')


@command("import")
def import_(
    file: Annotated[typer.FileText, typer.Argument(metavar="FILE", encoding="utf-8", help="What export wrote; - for stdin.")],
    ledger: LedgerUrl = None,
) -> None:
    """Take over sagas that `saga export` has written, be it from another ledger."""
    try:
        sagas = _sagas_in(file)
    except UnicodeDecodeError as error:
        raise MisuseError("what saga export writes, which is UTF-8", got=str(error), hint="Nothing was imported.") from None

    async def taken_over() -> list[str]:
        async with _opened(_durable(ledger, exists=False)) as opened:
            there = [saga_id for saga_id, events in sagas.items() if await _is_there(opened, saga_id, events)]
            if len(there) == len(sagas):
                return there  # and somebody may have begun to go on with them
            for saga_id, events in sagas.items():
                _refuse_too_large(opened.max_event_bytes, saga_id, events)
            # Held until the last one is there, and children first: who goes on with a saga whose children are still to come would begin
            # them anew, also when the import has been killed. Whoever imports the same file again holds what that one held.
            owner = f"import-{sha256(line_of(next(iter(sagas.values()))[0]).encode()).hexdigest()[:16]}"
            tokens = {}
            for saga_id in sorted(sagas, key=_slashes, reverse=True):
                begun = opened.acquire(saga_id, owner) if saga_id in there else opened.create(saga_id, owner, sagas[saga_id])
                tokens[saga_id] = await begun
            for saga_id, token in tokens.items():
                await opened.release(saga_id, token)
            return there

    there = asyncio.run(taken_over())
    for saga_id, events in sagas.items():
        typer.echo(f"{printable(saga_id)}  {SagaState(events).status.value}{', was there already' if saga_id in there else ''}")


def _slashes(saga_id: str) -> int:
    """More of them than in the id of the saga that runs this one, which this one's begins with."""
    return saga_id.count("/")


async def _is_there(ledger: Ledger, saga_id: str, events: Sequence[AnyEvent]) -> bool:
    """Whether the ledger has the saga already, with these events and no others: an import may have been killed.

    Raises:
        SagaExists: It has another one of that id.
    """
    found = await ledger.read(saga_id)
    if found and list(map(line_of, found)) != list(map(line_of, events)):
        raise SagaExists("a saga id that is not in the ledger yet", got=repr(saga_id), hint="Nothing was imported.")
    return bool(found)


def _refuse_too_large(most: int | None, saga_id: str, events: Sequence[AnyEvent]) -> None:
    """Refuse what the ledger would refuse only when it has taken other sagas already.

    Raises:
        LedgerError: One of the events has more bytes of JSON than it takes.
    """
    largest = max(events, key=lambda event: bytes_of(line_of(event)))
    size = bytes_of(line_of(largest))
    if most is not None and size > most:
        got = f"{size:,}, {type(largest).__name__} of saga {saga_id}"
        raise LedgerError(f"expected at most {most:,} bytes of JSON in one event (max_event_bytes), got {got}; nothing was imported")


def _sagas_in(lines: Iterator[str]) -> dict[str, list[AnyEvent]]:
    sagas: dict[str, list[AnyEvent]] = {}
    current: list[AnyEvent] | None = None
    before = 0
    for number, line in enumerate(lines, 1):
        if (end := _END_OF_EXPORT.match(line)) is not None:
            if int(end[1]) != before:
                raise LedgerCorrupt(f"expected {end[1]} events before line {number}, got {before}: an export was cut; nothing was imported")
            current, before = None, 0
            continue
        before += 1
        event = _event_in(line, number)
        if isinstance(event, SagaStarted):
            if event.saga_id in sagas:
                raise LedgerCorrupt(f"line {number} begins saga {event.saga_id} a second time; nothing was imported")
            current = sagas[event.saga_id] = []
        if current is None:
            raise LedgerCorrupt(f"expected SagaStarted in line {number}, got {type(event).__name__}; nothing was imported")
        current.append(event)
    if not sagas:
        raise MisuseError("at least one saga", got="a file without any", hint="Nothing was imported.")
    if before:
        # Whoever goes on with a saga that lacks its end does that part of it again.
        raise LedgerCorrupt("expected at the end how many events there are, got none: the file was cut; nothing was imported")
    _refuse_what_makes_no_sense(sagas)
    return sagas


def _event_in(line: str, number: int) -> AnyEvent:
    try:
        return event_from_json(line)
    except ValidationError as error:
        why = f"got {error.errors()[0]['msg']}"
    except PolicyInvalid as error:
        # Whoever wrote it had a policy that is one.
        why = f"got one of another version of saga: {error}"
    raise LedgerCorrupt(f"expected an event of a saga in line {number}, {why}; nothing was imported")


def _refuse_what_makes_no_sense(sagas: Mapping[str, Sequence[AnyEvent]]) -> None:
    try:
        states = {saga_id: SagaState(events) for saga_id, events in sagas.items()}
    except LedgerCorrupt as error:
        raise LedgerCorrupt(f"{error} Nothing was imported.") from None
    for saga_id, state in states.items():
        parent, stage = state.started.parent, state.started.parent_stage
        if parent is None:
            continue
        if not is_within(f"{saga_id}/", f"{parent}/{stage}"):
            # So none runs itself, be it through others.
            why = f"saga {saga_id} is none that stage {stage!r} of saga {parent} runs: its id would begin with {parent}/{stage}"
            raise LedgerCorrupt(f"{why}; nothing was imported")
        if parent not in states:
            # What goes on with it, or lists it, begins with that one.
            hint = f"Export {parent}. Nothing was imported."
            raise MisuseError(f"the saga {parent}, which runs {saga_id}, in the file, too", got="none", hint=hint)
        if stage not in states[parent].stages:
            # No report would tell of it.
            why = f"stage {stage!r} of saga {parent}, which is said to run saga {saga_id}, is none of its stages"
            raise LedgerCorrupt(f"{why} ({', '.join(states[parent].stages)}); nothing was imported")


# -- what the commands have in common ----------------------------------------------------------------------------


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Ledger]:
    ledger = open_ledger(url)
    try:
        yield ledger
    finally:
        await ledger.close()


def _url(given: str | None) -> str:
    # An empty one, as that of a variable that is not set, is no word for memory: what was run there is gone. click passes over an empty
    # SAGA_LEDGER.
    said = given if given is not None else os.environ.get(_VARIABLE, settings().ledger)
    return said if said is not None else _MEMORY


def _durable(given: str | None, *, exists: bool = True) -> str:
    """The URL of a ledger that outlives the process; of one that is there already, unless `exists` is False."""
    url = _url(given)
    if url == _MEMORY:
        raise MisuseError(
            "a ledger that outlives the process",
            got=_MEMORY,
            hint="Give --ledger sqlite:///sagas.db, set SAGA_LEDGER, or set ledger in [tool.saga] of pyproject.toml.",
        )
    file = Path(url.removeprefix("sqlite:///"))
    if exists and url.startswith("sqlite:///") and not file.exists():
        # Opening it would make an empty one, in which nobody finds the saga that they look for.
        raise MisuseError("a ledger that is there", got=f"{url}, and there is no file {here() / file}")
    return url


def _policy(given: Path | None) -> Policy | None:
    chosen = given or settings().policy
    return None if chosen is None else _loaded(chosen)


def _loaded(policy: Path) -> Policy:
    try:
        return load_policy(policy)
    except OSError as error:
        raise MisuseError("a policy file", got=f"{str(policy)!r}: {error.strerror}") from None


def _fields(given: str) -> dict[str, Any]:
    if not given.startswith("@"):
        return {"input_text": given} if given else {}
    fields = _json_object(given, "--input")
    if others := sorted(_NO_FIELDS & fields.keys()):
        raise MisuseError("fields of stageflow's PipelineContext", got=", ".join(map(repr, others)), hint="A saga's id is given with --id.")
    return fields


def _json_object(given: str, option: str) -> dict[str, Any]:
    try:
        text = Path(given[1:]).read_text(encoding="utf-8") if given.startswith("@") else given
        found = json.loads(text)
    except OSError as error:
        raise MisuseError(f"a file of JSON behind the @ of {option}", got=f"{given[1:]!r}: {error.strerror}") from None
    except ValueError as error:
        raise MisuseError(f"JSON for {option}", got=str(error)) from None
    except RecursionError:
        raise MisuseError(f"JSON for {option}", got="values that are nested too deeply") from None
    if not isinstance(found, dict):
        raise MisuseError(f"a JSON object for {option}", got=text[:80])
    return found


def _pipelines(targets: Sequence[str], hint: str = "") -> dict[str, Pipeline]:
    if not targets:
        raise MisuseError(f"{TARGET}, or pipelines in [tool.saga] of pyproject.toml", got="neither", hint=hint)
    return load_all(targets)


async def _pipeline_of(ledger: Ledger, saga_id: str, target: str | None, with_target: str) -> Pipeline:
    await _refuse_unknown(ledger, saga_id)
    if target is not None:
        return load(target)
    started = (await ledger.read(saga_id))[0]
    assert isinstance(started, SagaStarted)  # every ledger begins so
    hint = f"Say where {started.pipeline!r} is: {with_target}"
    known = _pipelines(settings().pipelines, hint)
    if started.pipeline not in known:
        raise MisuseError(f"the pipeline {started.pipeline!r} among [tool.saga] pipelines", got=", ".join(known), hint=hint)
    return known[started.pipeline]


async def _refuse_unknown(ledger: Ledger, saga_id: str) -> None:
    if not await ledger.read(saga_id):
        known, _ = await listed(ledger)
        raise SagaNotFound("the id of a saga in the ledger", got=repr(saga_id), hint=did_you_mean(saga_id, known))


def _reach(target: str | None, ledger: str | None) -> Reach:
    """How the next command gets at a saga of this command's."""
    # What the environment says it will say again; and a URL may hold a password.
    url = "URL" if ledger is not None and _HIDDEN.search(ledger) else ledger
    option = [] if url is None or ledger == os.environ.get(_VARIABLE) else ["--ledger", url]
    pipeline = target or ("" if settings().pipelines else TARGET)
    return Reach(pipeline, shlex.join(option), is_lost=_url(ledger) == _MEMORY)


def _print_report(report: SagaReport, reach: Reach, *, as_json: bool) -> None:
    if as_json:
        _print_json(report.model_dump_json())
    else:
        typer.echo(summary(report, reach))


def _print_json(text: str) -> None:
    """Print a line of JSON in UTF-8, which is what reads it again, whatever the locale takes text for."""
    with suppress(AttributeError):  # whoever calls from Python may have put anything there
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr] # of a stream to the outside
    typer.echo(harmless(text))
