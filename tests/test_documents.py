"""Every Python block of the README and the docs runs, and prints what the text block behind it says."""

from __future__ import annotations

import asyncio
import inspect
import io
import re
import subprocess
import sys
import tomllib
from operator import attrgetter
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
from rich.console import Console
from stageflow.api import Pipeline

import saga
from saga import CompensableStage, Compensation, ContinueWithFallback, FailFast, FailureKind, Retry, SagaCoordinator, SagaStatus, nested
from saga.cli.family import Family
from saga.cli.picture import picture
from saga.events import CompensationFailed, CompensationStarted, StageFailed, StageStarted
from saga.ledger import TRANSITIONS
from saga.ledgers.postgres import PostgresLedger
from saga.ledgers.sqlite import SQLiteLedger
from tests.stories import Story, failure, moment

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<output>.*?)^```)?", re.MULTILINE | re.DOTALL)
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "bench" / "README.md"]
TUTORIAL = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
BLOCKS = [
    pytest.param(found["code"], found["output"], id=f"{page.relative_to(ROOT)}:{page.read_text()[: found.start()].count(chr(10)) + 1}")
    for page in PAGES
    if page not in TUTORIAL
    for found in BLOCK.finditer(page.read_text())
]


@pytest.mark.parametrize(("code", "output"), BLOCKS)
def test_a_block_runs_and_prints_what_is_said(code: str, output: str | None, tmp_path: Path) -> None:
    printed = run(code, tmp_path)

    if output is not None:
        assert printed == output


@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.name)
def test_the_blocks_of_a_page_of_the_tutorial_run_as_one_file_and_print_what_is_said(page: Path, tmp_path: Path) -> None:
    blocks = list(BLOCK.finditer(page.read_text()))

    assert run("".join(block["code"] for block in blocks), tmp_path) == "".join(block["output"] or "" for block in blocks)


def run(code: str, folder: Path) -> str:
    script = folder / "block.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, "-W", "error", script], cwd=folder, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Unlucky(CompensableStage):
    """Fails in every way that there is on the way back; `fails` says whether forward, too."""

    compensation = Compensation(retry=Retry(attempts=1))

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    async def execute(self, ctx: Any) -> None:
        await ctx.record("a part")
        if self.fails:
            raise OSError("forward")

    async def compensate(self, ctx: Any) -> None:
        raise OSError("back")

    async def probe(self, ctx: Any) -> None:
        raise OSError("asked")

    async def fallback(self, ctx: Any, failure: Any) -> None:
        raise OSError("in its place")


@pytest.mark.parametrize("policy", [ContinueWithFallback(), FailFast(), FailFast(on_failure="halt")], ids=["fallback", "undo", "halt"])
def test_what_the_docs_redact_leaves_no_traceback_in_the_ledger(policy: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "make-sagas-durable.md").read_text()
    (code,) = [block["code"] for block in BLOCK.finditer(page) if "redact=" in block["code"]]
    block: dict[str, Any] = {}
    exec(code, block)  # noqa: S102 - it is ours
    pipeline = Pipeline(name="p").with_stage("a", Unlucky(fails=False)).with_stage("b", Unlucky(fails=True), dependencies=("a",))

    async def stored(**how: Any) -> tuple[SagaStatus, bytes]:
        file = tmp_path / f"{len(how)}.db"
        async with SQLiteLedger(file, **how) as ledger:
            report = await SagaCoordinator(policy, ledger=ledger).run(pipeline, saga_id="s")
        return report.status, file.read_bytes()

    (ended, whole), (also, redacted) = asyncio.run(stored()), asyncio.run(stored(redact=block["without_tracebacks"]))

    assert ended is also
    assert b"Traceback" in whole
    assert b"Traceback" not in redacted


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 4
    assert len(TUTORIAL) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_leads_to_every_page_on_how_to_do_something() -> None:
    readme = (ROOT / "README.md").read_text()

    missing = {page.name for page in (ROOT / "docs" / "how-to").glob("*.md") if f"docs/how-to/{page.name}" not in readme}

    assert not missing


def test_every_public_name_is_in_the_reference() -> None:
    described = {name.rpartition(".")[2] for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)}
    modules = {"saga.errors", "saga.events", "saga.lint"}

    missing = {name for name in saga.__all__ if name not in described and getattr(saga, name).__module__ not in modules}

    assert not missing


def test_a_coordinator_shows_its_users_nothing_but_what_is_for_them() -> None:
    methods = {"run", "resume", "compensate", "settle", "recover", "report", "cancel", "wind_up"}

    shown = {name for name in dir(saga.SagaCoordinator()) if not name.startswith("_")}

    assert shown == methods | {"policy", "ledger"}


def test_every_test_that_the_docs_name_is_there() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))

    named = {(page.name, name) for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}

    assert named
    assert not {(page, name) for page, name in named if f"def {name}(" not in tests}


def test_every_test_that_random_changes_are_run_against_is_there() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]

    selected = [name.partition("::") for name in settings["pytest_add_cli_args_test_selection"]]

    assert selected
    assert not [(path, test) for path, _, test in selected if f"def {test}" not in (ROOT / path).read_text()]


def test_the_table_of_what_may_follow_is_the_ledgers() -> None:
    page = (ROOT / "docs" / "explanation" / "order-and-recovery.md").read_text()

    rows = re.findall(r"^\| `(\w+)` \| (`.*`) \|$", page, re.MULTILINE)

    assert {state: set(re.findall(r"`(\w+)`", events)) for state, events in rows} == {
        state.value: {event.__name__ for event in events} for state, events in TRANSITIONS.items()
    }


def test_the_tree_of_a_running_saga_in_the_readme_is_what_a_terminal_shows() -> None:
    story = Story("book_trip", {"reserve_seat": (), "reserve_room": (), "charge_card": ("reserve_seat", "reserve_room")})
    story.done("reserve_seat", 0.0, 0.3025).done("reserve_room", 0.001, 0.3)
    story.tell(0.303, StageStarted, stage="charge_card", attempt=1)
    first, last = (failure("charge_card", "the card was declined", 0.9, attempt=n, kind=FailureKind.REPORTED) for n in (1, 2))
    story.tell(0.5, StageFailed, stage="charge_card", failure=first, will_retry=True)
    story.tell(0.6, StageStarted, stage="charge_card", attempt=2).tell(0.9409, StageFailed, stage="charge_card", failure=last)
    story.turns_back(0.95).tell(1.2, CompensationStarted, stage="reserve_room", attempt=1)
    family = Family("7f3a")
    for event in story.events:
        family.hear("7f3a", event)
    console = Console(file=io.StringIO(), width=120, color_system=None)

    with console.capture() as captured:
        console.print(picture(family, moment(1.4), 120, 30, ""))

    rows = [f"    {line.rstrip()}" for line in captured.get().replace("7f3a", "trip-1").splitlines()]
    assert "\n".join(rows) in (ROOT / "README.md").read_text()


SETTLE = (ROOT / "docs" / "how-to" / "settle-a-stuck-saga.md").read_text()


def test_the_report_on_the_page_for_whoever_is_called_is_one() -> None:
    story = Story("book_trip", {"reserve_seat": (), "charge_card": ("reserve_seat",), "print_ticket": ("charge_card",)})
    story.done("reserve_seat", 0.0, 0.081).done("charge_card", 0.0811, 0.3935)
    no_paper = failure("print_ticket", "no paper", 0.404).model_copy(update={"type": "OSError"})
    story.tell(0.3938, StageStarted, stage="print_ticket", attempt=1).tell(0.404, StageFailed, stage="print_ticket", failure=no_paper)
    story.turns_back(0.405)
    for attempt in (1, 2):
        story.undo_fails("charge_card", attempt * 60 - 59.5, attempt * 60 + 0.5, "no answer", attempt=attempt, will_retry=True)
    refused = failure("charge_card", "no answer within 60 s", 180.99, attempt=3, kind=FailureKind.COMPENSATION)
    timed_out = refused.model_copy(update={"type": "TimeoutError"})
    story.tell(120.9, CompensationStarted, stage="charge_card", attempt=3)
    story.tell(180.99, CompensationFailed, stage="charge_card", failure=timed_out).ends(181, SagaStatus.STUCK)

    assert indent(str(story.report), "    ", lambda line: line.strip() != "") in SETTLE


def test_the_keys_on_the_page_for_whoever_is_called_are_those_of_a_saga() -> None:
    keys: list[str] = []

    class Charge(CompensableStage):
        async def execute(self, ctx: Any) -> None:
            keys.append(ctx.idempotency_key)

        async def compensate(self, ctx: Any) -> None:
            keys.append(ctx.idempotency_key)

    async def twice() -> None:
        coordinator, pipeline = SagaCoordinator(), Pipeline(name="p").with_stage("charge_card", Charge)
        await coordinator.run(pipeline, saga_id="7f3a")
        await coordinator.compensate("7f3a", pipeline)
        await coordinator.resume("7f3a", pipeline, forward=True)
        await coordinator.compensate("7f3a", pipeline)

    async def within() -> None:
        hotel = Pipeline(name="hotel").with_stage("charge_deposit", Charge)
        await SagaCoordinator().run(Pipeline(name="p").with_stage("book_hotel", nested(hotel)), saga_id="7f3a")

    asyncio.run(twice())
    asyncio.run(within())

    assert len(keys) == 5
    assert all(f"`{key}`" in SETTLE for key in keys)


def test_the_defaults_in_the_docs_are_those_of_the_code() -> None:
    worded: dict[str, Any] = {"none": None, "one attempt": Retry(), "three attempts": Retry(attempts=3)}

    def rows(page: str) -> dict[str, str]:
        return dict(re.findall(r"^\| `([\w.]+)` \| `?([\w ]+?)`? \| ", (ROOT / "docs" / "how-to" / page).read_text(), re.MULTILINE))

    policy, ledger = rows("choose-a-policy.md"), rows("choose-a-ledger.md")

    assert len(policy) >= 9
    for name, said in policy.items():
        default = attrgetter(name)(FailFast())
        assert worded.get(said, said) == (f"{default:g}" if isinstance(default, float) else default)
    for made in (SQLiteLedger, PostgresLedger):
        told = {name: parameter.default for name, parameter in inspect.signature(made).parameters.items()}
        assert ledger == {
            "lease": f"{told['lease']:g}",
            "patience": "a third of that up to 10",
            "max_event_bytes": "16 MiB",
            "redact": "none",
        }
        assert (told["patience"], told["max_event_bytes"], told["redact"]) == (None, 16 * 2**20, None)


def test_the_shape_of_the_code_names_every_module() -> None:
    shape = (ROOT / "docs" / "explanation" / "shape.md").read_text()

    modules = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "saga").iterdir()} - {"__pycache__/", "py.typed"}

    assert not {name for name in modules if f"`saga/{name}`" not in shape}


def test_the_shape_of_the_code_names_every_module_of_a_package() -> None:
    shape = (ROOT / "docs" / "explanation" / "shape.md").read_text()
    rows = {package: row for row in shape.splitlines() for package in re.findall(r"`saga/(\w+)/`", row)}

    modules = {path for path in (ROOT / "saga").glob("*/*.py") if path.name != "__init__.py"}

    assert not {path for path in modules if not re.search(rf"`{path.stem}(\.py)?`", rows[path.parent.name])}


def test_the_imports_point_down_the_table_of_the_shape_of_the_code() -> None:
    shape = (ROOT / "docs" / "explanation" / "shape.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == ["saga"])
    depths = {name: depth for depth, names in enumerate(layers) for name in names.split(" | ")}

    rows = [re.findall(r"`saga/(\w+)", row) for row in re.findall(r"^\| ([^|]+) \|", shape, re.MULTILINE)]
    told = [depth for row in rows for depth in sorted(depths[name] for name in row if name in depths)]

    assert len(told) == len(depths)
    assert told == sorted(told)
