"""`saga.testing` for pytest: the fixture `verify_saga`, and the matrices at the end of the run.

To be asked for, in the top `conftest.py`: `pytest_plugins = ("saga.pytest_plugin",)`. Loaded by itself, it would import saga into every
run of pytest, and pytest would rewrite the asserts of all of saga.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final, Protocol

import pytest

from saga.errors import MisuseError
from saga.testing import VerificationFailed, verify

if TYPE_CHECKING:
    from stageflow.api import Pipeline

    from saga.policies import Policy
    from saga.testing import Verification, World

_MATRIX: Final = "saga"
"""The property of a test that holds a matrix."""


class VerifySaga(Protocol):
    """`saga.testing.verify`, for a test that is no coroutine."""

    def __call__(self, pipeline: Pipeline, policy: Policy | None, world: World, **options: Any) -> Verification:
        """Fail the saga everywhere; the options are those of `saga.testing.verify`."""
        ...


@pytest.fixture
def verify_saga(request: pytest.FixtureRequest) -> VerifySaga:
    """Fail a saga everywhere, and look each time whether the world is where the report says.

    The matrix is printed at the end of the run. In a test that is a coroutine, await `saga.testing.verify` instead.
    """

    def verify_saga(pipeline: Pipeline, policy: Policy | None, world: World, **options: Any) -> Verification:
        __tracebackhide__ = True
        try:
            _refuse_coroutine()
            return _kept(request, asyncio.run(verify(pipeline, policy, world, **options)))
        except (VerificationFailed, MisuseError) as told:
            # All that is to be said is in its words: where in the kit they were found tells nobody anything.
            raise told.with_traceback(None) from told.__cause__

    return verify_saga


def _refuse_coroutine() -> None:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise MisuseError("a test that is no coroutine", got="one", hint="In one that is, await saga.testing.verify(...) instead.")


def _kept(request: pytest.FixtureRequest, verification: Verification) -> Verification:
    # Under pytest-xdist this process has no terminal: all that gets from here to there is the tests' reports.
    request.node.user_properties.append((_MATRIX, str(verification)))
    return verification


def pytest_configure(config: pytest.Config) -> None:
    """Look out for matrices."""
    config.pluginmanager.register(_Matrices(config))


class _Matrices:
    """Takes the matrices from the reports of the tests, and prints them at the end of the run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._found: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # The last report of a test has what the ones before it have.
        if report.when == "teardown":
            # Below hypothesis a test comes to the same one a hundred times.
            drawn = dict.fromkeys(str(matrix) for name, matrix in report.user_properties if name == _MATRIX)
            self._found += [(report.nodeid, matrix) for matrix in drawn]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the matrices, unless pytest is to be quiet."""
        for test, drawn in self._found if self._config.get_verbosity() >= 0 else []:
            terminalreporter.section(f"saga: {test}")
            terminalreporter.write_line(drawn)
