"""The commands of `saga`: where each one is, and what they have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final

import typer

from saga.cli.commands import checking, looking, pruning, running, settling, transfer
from saga.cli.commands.printed import WITH_TRACEBACK, print_error

Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]
_COMMANDS: Final[Mapping[str, Callable[..., None]]] = {
    "run": running.run,
    "resume": running.resume,
    "compensate": running.compensate,
    "recover": running.recover,
    "list": looking.list_,
    "show": looking.show,
    "watch": looking.watch,
    "settle": settling.settle,
    "check": checking.check,
    "explain": checking.explain,
    "prune": pruning.prune,
    "export": transfer.export,
    "import": transfer.import_,
}
"""By name, in the order in which the help lists them."""

app: Final = typer.Typer(
    help="Run pipelines that undo what they did when they fail, and look after those that could not.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    """A command that says in a line what went wrong, and shows a traceback only when it is asked to."""

    @wraps(function)
    def guarded(*, traceback: bool, **given: Any) -> None:
        WITH_TRACEBACK.set(traceback)
        try:
            function(**given)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - at night, a line says more than a traceback
            raise typer.Exit(print_error(error)) from None

    signature = inspect.signature(function, eval_str=True)
    option = inspect.Parameter("traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Traceback)
    guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined] # typer reads it
    guarded.__annotations__ = function.__annotations__ | {"traceback": Traceback}
    return guarded


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


for _name, _function in _COMMANDS.items():
    # The whole line: of a longer help the list of commands would show a part.
    app.command(_name, short_help=inspect.getdoc(_function))(_guarded(_function))
