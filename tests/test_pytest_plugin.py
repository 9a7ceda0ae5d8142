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
        assert verify_saga(Pipeline(name="one").with_stage("tick", Ticks()), None, Ticks()).ok
"""


def run_pytest(pytester: pytest.Pytester, *options: str, looks: bool = True) -> pytest.RunResult:
    pytester.makepyfile(A_TEST.replace("{looks}", str(looks)))
    pytester.makeconftest('pytest_plugins = ("saga.pytest_plugin",)')
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


def test_the_matrix_of_a_saga_that_was_verified_is_printed_at_the_end(pytester: pytest.Pytester) -> None:
    result = run_pytest(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*= saga: *::test_it =*", "one: wherever it failed, the world was where the report said", "tick *<*"])


def test_a_quiet_run_prints_none(pytester: pytest.Pytester) -> None:
    result = run_pytest(pytester, "-q")

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*saga:*")


def test_a_saga_that_does_not_come_back_fails_its_test_with_the_matrix(pytester: pytest.Pytester) -> None:
    result = run_pytest(pytester, looks=False)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *tick *X *", "E *By the report it is compensated, nothing is in effect.*"])
