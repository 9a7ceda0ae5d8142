"""The kit in pytest: a fixture, and the matrices at the end of the run."""

from __future__ import annotations

import pytest

A_TEST = """
    from stageflow.api import Pipeline, StageOutput
    from saga import CompensableStage

    class Ticks(CompensableStage):
        ticks = {}

        def reset(self):
            self.ticks.clear()

        def look(self):
            return len(self.ticks)

        async def execute(self, ctx):
            self.ticks[ctx.idempotency_key] = True

        async def compensate(self, ctx):
            self.ticks.pop(ctx.forward_key, None)

        async def probe(self, ctx):
            return StageOutput.ok() if LOOKS and ctx.forward_key in self.ticks else None

    LOOKS = {looks}

    def test_it(verify_saga):
        for _ in range({times}):
            assert verify_saga(Pipeline(name="one").with_stage("tick", Ticks()), None, Ticks()).ok
"""


def a_test(*, looks: bool = True, times: int = 1) -> str:
    return A_TEST.replace("{looks}", str(looks)).replace("{times}", str(times))


def run_pytest(pytester: pytest.Pytester, *options: str, looks: bool = True, times: int = 1) -> pytest.RunResult:
    pytester.makepyfile(a_test(looks=looks, times=times))
    pytester.makeconftest('pytest_plugins = ("saga.pytest_plugin",)')
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


def test_the_matrix_of_a_saga_that_was_verified_is_printed_at_the_end(pytester: pytest.Pytester) -> None:
    result = run_pytest(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*= saga: *::test_it =*", "one: wherever it failed, the world was where the report said", "tick *<*"])


def test_a_matrix_that_a_test_comes_to_again_and_again_is_printed_once(pytester: pytest.Pytester) -> None:
    """As below hypothesis, which calls a test a hundred times."""
    result = run_pytest(pytester, times=3)

    result.assert_outcomes(passed=1)
    assert str(result.stdout).count("one: wherever it failed, the world was where the report said") == 1


def test_a_saga_that_is_refuted_fails_its_test_in_the_words_of_the_matrix_and_no_others(pytester: pytest.Pytester) -> None:
    result = run_pytest(pytester, looks=False)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*VerificationFailed: one: 4 trials went wrong", "E*raises after: tick"])
    result.stdout.no_fnmatch_line("*verification.py*")
    result.stdout.no_fnmatch_line("*asyncio*")


def test_a_test_that_is_a_coroutine_is_told_to_await_verify_itself(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.anyio
        async def test_it(verify_saga):
            verify_saga(None, None, None)
        """
    )
    pytester.makeconftest('pytest_plugins = ("saga.pytest_plugin",)')

    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-W", "error")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*MisuseError: expected a test that is no coroutine, got one. *await saga.testing.verify(*"])
    result.stdout.no_fnmatch_line("*never awaited*")


AS_XDIST_DOES = """
    import json
    from pathlib import Path

    pytest_plugins = ("saga.pytest_plugin",)
    SENT = Path("sent.jsonl")

    class Worker:
        def __init__(self, config):
            self.config = config

        def pytest_runtest_logreport(self, report):
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with SENT.open("a") as file:
                print(json.dumps(data), file=file)

    class Controller:
        def pytest_runtestloop(self, session):
            for line in SENT.read_text().splitlines():
                report = session.config.hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
                session.config.hook.pytest_runtest_logreport(report=report)
            return True

    def pytest_configure(config):
        config.pluginmanager.register(Controller() if SENT.exists() else Worker(config))
"""


def test_the_matrix_is_printed_where_the_terminal_is_when_the_test_ran_in_another_process(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(a_test())
    pytester.makeconftest(AS_XDIST_DOES)

    worker = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q")
    controller = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    worker.assert_outcomes(passed=1)
    controller.assert_outcomes(passed=1)
    controller.stdout.fnmatch_lines(["*= saga: *::test_it =*", "one: wherever it failed, *", "tick *<*"])
    assert str(controller.stdout).count("saga: ") == 1


def test_a_quiet_run_prints_none(pytester: pytest.Pytester) -> None:
    result = run_pytest(pytester, "-q")

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*saga:*")


def test_a_saga_that_does_not_come_back_fails_its_test_with_the_matrix(pytester: pytest.Pytester) -> None:
    result = run_pytest(pytester, looks=False)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *tick *X *", "E *By the report it is compensated, nothing is in effect.*"])
