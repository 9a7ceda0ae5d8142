"""Finding a pipeline by MODULE:PIPELINE."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from operator import attrgetter
from types import ModuleType
from typing import Any

from stageflow.api import Pipeline

from saga.blueprint import by_name
from saga.cli.aside import aside
from saga.cli.settings import here
from saga.errors import MisuseError
from saga.text import did_you_mean, said, shown


def load(target: str) -> Pipeline:
    """Import a pipeline; the current directory comes first. What its module prints goes to stderr: stdout is for what was asked for.

    Args:
        target: `module:attribute`; the attribute is a `Pipeline`, or takes no arguments and returns one.

    Raises:
        MisuseError: There is no such pipeline.
    """
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise MisuseError("MODULE:PIPELINE, as in shop:book_trip", got=repr(target))
    with aside():
        module = _module(module_name)
        try:
            found = attrgetter(attribute)(module)
        except AttributeError:
            raise MisuseError(f"a pipeline in {module_name}", got=repr(attribute), hint=_others(attribute, module)) from None
        return _pipeline(found, target)


def load_all(targets: Iterable[str]) -> dict[str, Pipeline]:
    """Import pipelines, by their names.

    Raises:
        MisuseError: A pipeline is not there, or two that differ have one name.
    """
    return by_name(map(load, dict.fromkeys(targets)))


def _module(name: str) -> ModuleType:
    folder = str(here())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if name.startswith("."):  # as a path does; Python would ask for its package
        raise _unknown(name, name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{name}.".startswith(f"{missing.name}."):
            raise _broken(name, missing) from missing
        raise _unknown(name, missing.name.rpartition(".")[2]) from None
    except Exception as error:
        raise _broken(name, error) from error


def _unknown(name: str, missing: str) -> MisuseError:
    near = sorted(path.stem for path in here().iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
    # The name of its file is what a shell completes.
    last = name.removesuffix(".py").replace("/", ".") if name.endswith(".py") else missing
    return MisuseError("a module that can be imported from here", got=repr(name), hint=did_you_mean(last, near))


def _broken(name: str, error: Exception) -> MisuseError:
    return MisuseError(f"a module {name} that can be imported", got=f"{type(error).__name__}: {said(error)}")


def _others(attribute: str, module: ModuleType) -> str:
    pipelines = sorted(name for name, value in vars(module).items() if isinstance(value, Pipeline))
    hint = did_you_mean(attribute, [*pipelines, *(name for name, value in vars(module).items() if callable(value))])
    return hint or (f"It has: {', '.join(pipelines)}." if pipelines else "")


def _pipeline(found: Any, target: str) -> Pipeline:
    if isinstance(found, Pipeline):
        return found
    expected = f"a Pipeline, or a function without arguments that returns one, at {target}"
    if not callable(found):
        raise MisuseError(expected, got=shown(found))
    try:
        made = found()
    except Exception as error:
        raise MisuseError(expected, got=f"{type(error).__name__}: {said(error)}") from error
    if not isinstance(made, Pipeline):
        raise MisuseError(expected, got=f"a function that returns {shown(made)}")
    return made
