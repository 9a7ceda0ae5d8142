"""`saga` on the command line: in this process where that is enough, as a real process where signals and terminals matter."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import runpy
import shlex
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import psycopg
import pytest
from typer.main import get_command

from saga import SagaCoordinator
from saga.cli import conduct, main
from saga.cli.aside import aside, let_go
from saga.cli.commands import app
from saga.cli.exits import Exit, exit_of_status
from saga.cli.view import Stderr
from saga.errors import LedgerError
from saga.events import SagaEnded, SagaResumed, SagaStarted, SagaStatus, event_to_json
from saga.graph import Graph, Node, Role
from saga.ledger import StageState
from saga.ledgers.sqlite import SQLiteLedger
from saga.policies import FailFast
from saga.report import SagaReport

ROOT = Path(__file__).parent.parent

SHOP = """
import asyncio
import os
from pathlib import Path

from saga import CompensableStage, Compensation, PivotStage, Retry, nested
from stageflow.api import Pipeline, StageOutput

DOWN = Path("the-bank-is-down")


class Reserve(CompensableStage):
    async def execute(self, ctx):
        print("reserved for", ctx.snapshot.input_text)
        return StageOutput.ok(booking=ctx.snapshot.input_text)

    async def compensate(self, ctx):
        print("cancelled", ctx.output.data["booking"])


class Charge(CompensableStage):
    compensation = Compensation(retry=Retry(attempts=1))

    async def execute(self, ctx):
        return StageOutput.ok(receipt=7)

    async def compensate(self, ctx):
        if DOWN.exists():
            raise ConnectionError("the bank doesn't answer")


class ChargeSlowly(Charge):
    compensate_in_doubt = True

    async def execute(self, ctx):
        print("the bank is asked", flush=True)
        await asyncio.Event().wait()


class RefundSlowly(Charge):
    async def compensate(self, ctx):
        print("the bank is asked for it back", flush=True)
        if DOWN.exists():
            await asyncio.Event().wait()


async def decline(ctx):
    return StageOutput.fail("declined")


async def stop(ctx):
    return StageOutput.cancel("sold out")


async def die(ctx):
    print("dies", flush=True)
    os._exit(9)


async def ship(ctx):
    return {"parcel": 1} if not DOWN.exists() else StageOutput.fail("no lorry")


ship.has_effect = False
seat = Pipeline(name="seat").with_stage("reserve_seat", Reserve)
paid = seat.with_stage("charge_card", Charge, dependencies=("reserve_seat",))


def ending(name, stage):
    return Pipeline(name=name, stages=paid.stages).with_stage("ship", stage, "work", dependencies=("charge_card",))


trip = ending("trip", decline)
order = ending("order", ship)
sold_out = ending("sold_out", stop)
crash = ending("crash", die)
slow = Pipeline(name="slow", stages=seat.stages).with_stage("charge_card", ChargeSlowly, dependencies=("reserve_seat",))
refund = Pipeline(name="refund", stages=seat.stages).with_stage("charge_card", RefundSlowly, dependencies=("reserve_seat",)).with_stage(
    "ship", decline, "work", dependencies=("charge_card",)
)
family = Pipeline(name="family").with_stage("book", nested(trip))
number = 7


def made():
    return seat


def made_wrong():
    return 7


def breaks():
    raise ValueError("no catalogue")
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


@dataclass
class Shop:
    """A folder with a module of pipelines, and `saga` in it."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    terminals: list[Terminal] = field(default_factory=list)
    lorries: list[int] = field(default_factory=list)

    def saga(self, *arguments: str) -> Done:
        """Run it in this process."""
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        out, err = self.capture.readouterr()
        return Done(int(exited.value.code or 0), out, err)

    def really(self, *arguments: str, **environment: str) -> Done:
        """Run it in a process of its own."""
        command = [sys.executable, "-W", "error", "-m", "saga", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment(**environment), capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def in_latin(self, *arguments: str) -> tuple[int, bytes, str]:
        """Run it in a process of its own whose locale has letters for western Europe alone: its exit code, and what it writes."""
        command = [sys.executable, "-W", "error", "-m", "saga", *arguments]
        environment = self.environment(PYTHONIOENCODING="latin-1")
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, check=False)
        return done.returncode, done.stdout, done.stderr.decode("latin-1")

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SAGA_LEDGER": "sqlite:///sagas.db", "TERM": "xterm"} | more

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def begin_elsewhere(self, saga_id: str, pipeline: str = "seat", *, lease: float) -> None:
        """Begin a saga in a process of which nothing can be known but how long it counts as alive."""
        graph = Graph.of([Node(name="reserve_seat", role=Role.COMPENSABLE)])
        started = SagaStarted(saga_id=saga_id, pipeline=pipeline, graph=graph, policy=FailFast())

        async def begin() -> None:
            async with SQLiteLedger("sagas.db", lease=lease, patience=lease / 3) as ledger:
                await ledger.create(saga_id, f"owner of {saga_id}", [started])

        asyncio.run(begin())

    def breaks_the_bank(self) -> None:
        self.write("the-bank-is-down", "")

    def mends_the_bank(self) -> None:
        (self.folder / "the-bank-is-down").unlink()

    def brings_the_lorry(self) -> None:
        """Let whoever waits for it, now or later, go on."""
        lorry = os.open(self.folder / "a-lorry", os.O_RDWR | os.O_NONBLOCK)
        os.write(lorry, b"!")
        self.lorries.append(lorry)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shop]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("SAGA_LEDGER", "sqlite:///sagas.db")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    place = Shop(tmp_path, capsys)
    place.write("shop.py", SHOP)
    os.mkfifo(tmp_path / "a-lorry")
    yield place
    for terminal in place.terminals:
        terminal.close()
    for lorry in place.lorries:
        os.close(lorry)
    sys.modules.pop("shop", None)


# -- running -----------------------------------------------------------------------------------------------------


def test_run_puts_the_report_on_stdout_and_what_happens_on_stderr(shop: Shop) -> None:
    done = shop.saga("run", "shop:trip", "--input", "OSL-JFK", "--id", "s")

    assert done.code == Exit.COMPENSATED
    assert done.out.startswith("Saga s (trip): COMPENSATED after ")
    assert done.out.endswith("Nothing is left to do.\n")
    assert done.err.splitlines() == [
        "s  trip started",
        "s  reserve_seat: started",
        "reserved for OSL-JFK",
        "s  reserve_seat: completed",
        "s  charge_card: started",
        "s  charge_card: completed",
        "s  ship: started",
        "s  ship: reported a failure: declined",
        "s  turned back: stage 'ship' reported a failure: declined",
        "s  charge_card: being undone",
        "s  charge_card: undone",
        "s  reserve_seat: being undone",
        "cancelled OSL-JFK",
        "s  reserve_seat: undone",
        "s  COMPENSATED",
    ]


def test_where_the_locale_has_no_letters_for_what_is_told_they_are_escaped(shop: Shop) -> None:
    """The saga had run, and its command ended with 1 and without a report."""
    shop.write("shop.py", SHOP.replace('StageOutput.fail("declined")', 'StageOutput.fail("abgelehnt ✗ für 北京")'))

    code, out, err = shop.in_latin("run", "shop:trip", "--id", "s", "--input", "Zürich")

    assert code == Exit.COMPENSATED
    assert "Cause: stage 'ship' reported a failure: abgelehnt \\u2717 für \\u5317\\u4eac\n" in out.decode("latin-1")
    assert "reserved for Zürich" in err
    for command, ended in {"show": Exit.COMPLETED, "watch": Exit.COMPENSATED, "compensate": Exit.COMPENSATED}.items():
        again = shop.in_latin(command, "s", *(["shop:trip"] if command == "compensate" else []))
        assert again[:2] == (ended, out)


def test_what_machines_read_is_utf_8_whatever_the_locale(shop: Shop) -> None:
    pipeline = 'trip = Pipeline(name="✗").with_stage("北京", decline, "work")'
    shop.write("shop.py", SHOP + pipeline)
    run = shop.in_latin("run", "shop:trip", "--id", "s", "--json")[1]
    shown = shop.in_latin("show", "s", "--json")[1]
    listed = shop.in_latin("list", "--json")[1]
    found = shop.in_latin("check", "shop:trip", "--json")[1]
    explained = shop.in_latin("explain", "shop:trip", "--json")[1]
    (shop.folder / "s.jsonl").write_bytes(shop.in_latin("export", "s")[1])

    imported = shop.in_latin("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    assert run == shown
    assert SagaReport.model_validate_json(shown).failed == ("北京",)
    assert json.loads(listed)[0]["pipeline"] == "✗"
    assert json.loads(found)[0]["stage"] == "北京"
    assert [*json.loads(explained)["stages"]] == ["北京"]
    assert imported == (Exit.COMPLETED, b"s  compensated\n", "")
    assert shop.in_latin("show", "s", "--json", "--ledger", "sqlite:///new.db")[1] == shown


def test_what_programs_print_that_stages_start_goes_to_stderr(shop: Shop) -> None:
    programs = """
import subprocess

subprocess.run(["echo", "the catalogue is read"], check=True)


async def weigh(ctx):
    subprocess.run(["echo", "7 kg"], check=True)


parcel = Pipeline(name="parcel").with_stage("weigh", weigh, "work")
"""
    shop.write("shop.py", SHOP + programs)

    done = shop.really("run", "shop:parcel", "--json")

    assert SagaReport.model_validate_json(done.out).status is SagaStatus.COMPLETED
    assert [line for line in done.err.splitlines() if line in {"the catalogue is read", "7 kg"}] == ["the catalogue is read", "7 kg"]


def test_what_a_stage_writes_past_print_and_has_not_been_written_out_goes_to_stderr(shop: Shop) -> None:
    weigh = """
import sys


async def weigh(ctx):
    sys.__stdout__.write("7 kg\\n")


parcel = Pipeline(name="parcel").with_stage("weigh", weigh, "work")
"""
    shop.write("shop.py", SHOP + weigh)

    done = shop.really("run", "shop:parcel", "--json")

    assert SagaReport.model_validate_json(done.out).status is SagaStatus.COMPLETED
    assert "7 kg" in done.err.splitlines()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_where_a_stream_is_closed_a_saga_runs_all_the_same(shop: Shop, closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m saga run shop:trip --id s {closed}"

    done = subprocess.run(["/bin/sh", "-c", command], cwd=shop.folder, env=shop.environment(), capture_output=True, text=True, check=False)

    assert done.returncode == Exit.COMPENSATED
    assert ("COMPENSATED" in done.stdout) is (closed == "2>&-")


def test_with_json_stdout_holds_a_report_and_nothing_else(shop: Shop) -> None:
    done = shop.saga("run", "shop:order", "--json")

    report = SagaReport.model_validate_json(done.out)
    assert done.code == Exit.COMPLETED
    assert report.status is SagaStatus.COMPLETED
    assert report.kept["ship"].data == {"parcel": 1}
    assert re.fullmatch("[0-9a-f]{12}", report.saga_id)


@pytest.mark.parametrize("command", ["run", "check", "explain"])
def test_with_json_stdout_holds_nothing_that_a_module_prints_when_it_is_imported(shop: Shop, command: str) -> None:
    shop.write("chatty.py", SHOP.replace("    return seat", "    print('made')\n    return seat") + "print('hello')\n")

    done = shop.saga(command, "chatty:made", "--json")

    assert json.loads(done.out) is not None
    assert "hello\nmade\n" in done.err
    sys.modules.pop("chatty", None)


def test_every_end_has_an_exit_code_of_its_own(shop: Shop) -> None:
    shop.write("halt.toml", 'policy = "fail_fast"\non_failure = "halt"\n')
    shop.write("degrade.toml", 'policy = "continue_with_fallback"\n[fallbacks.ship]\nparcel = 0\n')

    codes = [
        shop.saga("run", "shop:order").code,
        shop.saga("run", "shop:trip", "--policy", "degrade.toml").code,
        shop.saga("run", "shop:trip").code,
        shop.saga("run", "shop:trip", "--policy", "halt.toml").code,
        shop.saga("run", "shop:sold_out").code,
        shop.saga("run", "shop:nothing").code,
    ]
    shop.breaks_the_bank()
    codes.append(shop.saga("run", "shop:trip").code)

    assert codes == [Exit.COMPLETED, Exit.DEGRADED, Exit.COMPENSATED, Exit.HALTED, Exit.CANCELLED, Exit.MISUSE, Exit.STUCK]
    assert len(set(codes)) == len(codes)


def test_every_option_is_in_the_docs_and_every_one_in_the_docs_is_there() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    group: Any = get_command(app)
    sections = dict(re.findall(r"^### `saga (\w+)[^\n]*\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))

    there = {
        name: {option for param in command.params for option in param.opts if option[0] == "-"} for name, command in group.commands.items()
    }
    told = {name: set(re.findall(r"`(--[a-z-]+)", text)) for name, text in sections.items()}

    assert told == {name: options - {"--ledger", "--traceback"} for name, options in there.items()}


def test_an_interruption_counts_less_than_a_saga_that_is_stuck() -> None:
    assert exit_of_status(SagaStatus.COMPENSATED, interrupted=True) is Exit.INTERRUPTED
    assert exit_of_status(SagaStatus.STUCK, interrupted=True) is Exit.STUCK


def test_the_input_may_be_a_file_of_context_fields(shop: Shop) -> None:
    shop.write("input.json", json.dumps({"input_text": "OSL-LIS", "metadata": {"agent": "ann"}}))

    done = shop.saga("run", "shop:seat", "--input", "@input.json", "--id", "s")

    assert "reserved for OSL-LIS" in done.err
    assert json.loads(shop.saga("export", "s").out.splitlines()[0])["input"]["metadata"] == {"agent": "ann"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected JSON for --input, got Expecting property name"),
        ("[1]", "expected a JSON object for --input, got [1]"),
        ("[" * 200_000, "expected JSON for --input, got values that are nested too deeply\n"),
        ('{"colour": 1}', "expected fields of stageflow's PipelineContext, got "),
        ('{"saga_id": "s"}', "expected fields of stageflow's PipelineContext, got 'saga_id'. A saga's id is given with --id.\n"),
        (
            '{"pipeline": 1, "self": 2, "context": {}}',
            "expected fields of stageflow's PipelineContext, got 'context', 'pipeline', 'self'. ",
        ),
    ],
)
def test_an_input_file_that_makes_no_sense_is_refused(shop: Shop, text: str, said: str) -> None:
    shop.write("input.json", text)

    done = shop.saga("run", "shop:seat", "--input", "@input.json")

    assert done.code == Exit.MISUSE
    assert said in done.err


def test_a_file_of_other_bytes_than_utf_8_is_refused(shop: Shop) -> None:
    (shop.folder / "bytes").write_bytes(b"\xff{}\n")

    ran = shop.saga("run", "shop:seat", "--input", "@bytes")
    imported = shop.saga("import", "bytes")

    assert (ran.code, imported.code) == (Exit.MISUSE, Exit.MISUSE)
    assert ran.err.startswith("saga: expected JSON for --input, got 'utf-8' codec can't decode byte 0xff in position 0")
    assert imported.err.startswith("saga: expected what saga export writes, which is UTF-8, got 'utf-8' codec can't decode byte 0xff")
    assert imported.err.endswith(". Nothing was imported.\n")


def test_an_input_from_a_file_that_is_not_there_is_refused(shop: Shop) -> None:
    ran = shop.saga("run", "shop:seat", "--input", "@gone.json")

    assert ran.code == Exit.MISUSE
    assert ran.err == "saga: expected a file of JSON behind the @ of --input, got 'gone.json': No such file or directory\n"


def test_a_run_in_memory_needs_no_file(shop: Shop) -> None:
    assert shop.saga("run", "shop:order", "--ledger", "memory:").code == Exit.COMPLETED
    assert not (shop.folder / "sagas.db").exists()


def test_an_empty_ledger_is_not_taken_for_memory(shop: Shop) -> None:
    """As `--ledger "$LEDGER"` of a variable that is not set: what was run would be gone."""
    ran = shop.saga("run", "shop:order", "--ledger", "")

    assert ran.code == Exit.MISUSE
    assert ran.err == "saga: expected a ledger's URL: memory:, sqlite:///path or postgresql://..., got ''\n"


@pytest.mark.parametrize("command", ["run", "list"])
def test_an_empty_variable_is_not_taken_for_memory_nor_for_the_projects_ledger(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    shop.write("pyproject.toml", '[tool.saga]\nledger = "sqlite:///others.db"')
    monkeypatch.setenv("SAGA_LEDGER", "")

    done = shop.saga(command, *(["shop:order"] if command == "run" else []))

    assert done.code == Exit.MISUSE
    assert done.err == "saga: expected a ledger's URL: memory:, sqlite:///path or postgresql://..., got ''\n"


# -- misuse ------------------------------------------------------------------------------------------------------


A_PIPELINE = "expected a Pipeline, or a function without arguments that returns one,"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("shop", "saga: expected MODULE:PIPELINE, as in shop:book_trip, got 'shop'\n"),
        ("shopp:trip", "saga: expected a module that can be imported from here, got 'shopp'. Did you mean 'shop'?\n"),
        ("zzz:trip", "saga: expected a module that can be imported from here, got 'zzz'\n"),
        ("shop.py:trip", "saga: expected a module that can be imported from here, got 'shop.py'. Did you mean 'shop'?\n"),
        ("./shop.py:trip", "saga: expected a module that can be imported from here, got './shop.py'. Did you mean 'shop'?\n"),
        ("./shop:trip", "saga: expected a module that can be imported from here, got './shop'. Did you mean 'shop'?\n"),
        ("shop:tripp", "saga: expected a pipeline in shop, got 'tripp'. Did you mean 'trip'?\n"),
        (
            "shop:zzz",
            "saga: expected a pipeline in shop, got 'zzz'. It has: crash, family, order, paid, refund, seat, slow, sold_out, trip.\n",
        ),
        ("shop:number", f"saga: {A_PIPELINE} at shop:number, got 7\n"),
        (
            "shop:made_wrong",
            f"saga: {A_PIPELINE} at shop:made_wrong, got a function that returns 7\n",
        ),
        ("shop:breaks", f"saga: {A_PIPELINE} at shop:breaks, got ValueError: no catalogue\n"),
        ("broken:trip", "saga: expected a module broken that can be imported, got ZeroDivisionError: division by zero\n"),
        ("lacking:trip", "saga: expected a module lacking that can be imported, got ModuleNotFoundError: No module named 'airline'\n"),
        ("empty:trip", "saga: expected a pipeline in empty, got 'trip'\n"),
        ("rude:trip", "saga: expected a module rude that can be imported, got ValueError: \\u001b[2J cleared\n"),
    ],
)
def test_a_pipeline_that_is_not_there_is_refused_in_a_line(shop: Shop, target: str, said: str) -> None:
    shop.write("broken.py", "1 / 0")
    shop.write("lacking.py", "import airline")
    shop.write("empty.py", "")
    shop.write("rude.py", "raise ValueError('\\x1b[2J\\ncleared')")

    done = shop.saga("run", target)

    assert (done.code, done.err) == (Exit.MISUSE, said)
    sys.modules.pop("empty", None)


def test_a_function_that_returns_a_pipeline_is_called(shop: Shop) -> None:
    assert shop.saga("run", "shop:made").code == Exit.COMPLETED


def test_a_traceback_is_shown_when_it_is_asked_for(shop: Shop) -> None:
    done = shop.saga("run", "shop:breaks", "--traceback")

    assert done.code == Exit.MISUSE
    assert done.err.startswith("Traceback (most recent call last):")
    assert 'raise ValueError("no catalogue")' in done.err


def test_a_taken_id_a_missing_policy_and_an_unknown_option_are_misuse(shop: Shop) -> None:
    shop.saga("run", "shop:seat", "--id", "s")

    taken = shop.saga("run", "shop:seat", "--id", "s")
    missing = shop.saga("run", "shop:seat", "--policy", "none.toml")
    unknown = shop.saga("run", "shop:seat", "--bogus")

    assert (taken.code, missing.code, unknown.code) == (Exit.MISUSE,) * 3
    assert taken.err == "saga: expected a saga id that is not in the ledger yet, got 's'. What became of that one: saga show s\n"
    assert missing.err == "saga: expected a policy file, got 'none.toml': No such file or directory\n"
    assert "No such option: --bogus" in unknown.err


def test_looking_into_a_ledger_needs_one_that_lasts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAGA_LEDGER")

    done = shop.saga("list")

    assert done.code == Exit.MISUSE
    assert done.err.startswith("saga: expected a ledger that outlives the process, got memory:. Give --ledger sqlite:///")


def test_a_mistyped_file_is_not_made_into_an_empty_ledger(shop: Shop) -> None:
    done = shop.saga("show", "s", "--ledger", "sqlite:///saggas.db")

    assert done.code == Exit.MISUSE
    assert f"there is no file {shop.folder / 'saggas.db'}" in done.err
    assert not (shop.folder / "saggas.db").exists()


LOOKING = {
    "list": ("list",),
    "show": ("show", "s"),
    "watch": ("watch", "s"),
    "settle": ("settle", "s", "charge_card", "undone", "--note", "by hand"),
    "resume": ("resume", "s", "shop:seat"),
    "compensate": ("compensate", "s", "shop:seat"),
    "recover": ("recover", "shop:seat"),
    "export": ("export", "s"),
    "prune": ("prune", "--older-than", "30d"),
}


@pytest.mark.parametrize("command", LOOKING)
def test_in_a_mistyped_database_no_schema_is_made(shop: Shop, an_empty_database: str, command: str) -> None:
    done = shop.saga(*LOOKING[command], "--ledger", an_empty_database)

    assert done.code == Exit.FAILED
    assert done.err == "saga: there is no ledger in schema 'saga' of this database; none was made\n"
    assert not _has_a_ledger(an_empty_database)


def test_in_an_empty_database_the_first_saga_makes_the_schema(shop: Shop, an_empty_database: str) -> None:
    ran = shop.saga("run", "shop:seat", "--id", "s", "--ledger", an_empty_database)
    shown = shop.saga("show", "s", "--ledger", an_empty_database)

    assert (ran.code, shown.code) == (Exit.COMPLETED, Exit.COMPLETED)


@pytest.fixture
def an_empty_database(postgres: Any) -> Iterator[str]:
    uri = postgres.get_uri()
    with closing(psycopg.connect(uri, autocommit=True)) as server:
        server.execute("CREATE DATABASE mistyped")
        yield uri.replace("/postgres?", "/mistyped?")
        server.execute("DROP DATABASE mistyped WITH (FORCE)")


def _has_a_ledger(uri: str) -> bool:
    with closing(psycopg.connect(uri)) as database:
        found = database.execute("SELECT to_regnamespace('saga') IS NOT NULL").fetchone()
    return found == (True,)


@pytest.mark.parametrize("url", ["sqlite:sagas.db", "sqlite://sagas.db", "sqlite://localhost/sagas.db"])
def test_a_url_with_too_few_slashes_is_not_taken_for_a_mistyped_file(shop: Shop, url: str) -> None:
    shop.saga("run", "shop:seat", "--id", "s")

    done = shop.saga("show", "s", "--ledger", url)

    assert done.code == Exit.MISUSE
    assert "Three slashes for a path from here, sqlite:///sagas.db" in done.err


def test_an_unknown_id_is_refused_with_the_nearest_one(shop: Shop) -> None:
    shop.saga("run", "shop:seat", "--id", "trip-77")

    done = shop.saga("show", "trip-7")

    assert (done.code, done.err) == (Exit.MISUSE, "saga: expected the id of a saga in the ledger, got 'trip-7'. Did you mean 'trip-77'?\n")


def test_a_ledger_that_fails_is_no_misuse(shop: Shop) -> None:
    shop.write("sagas.db", "this is no database" * 100)

    done = shop.saga("list")

    assert done.code == Exit.FAILED
    assert done.err.startswith("saga: ")
    assert "Traceback" not in done.err


def test_what_nobody_foresaw_is_said_in_a_line_too(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saga.cli.commands.checking.find", "no function")

    done = shop.saga("check", "shop:seat")

    assert (done.code, done.err) == (Exit.FAILED, "saga: TypeError: 'str' object is not callable\n")


def test_a_reader_that_goes_away_is_no_error_to_talk_about(shop: Shop) -> None:
    shop.saga("run", "shop:seat", "--id", "s")
    command = [sys.executable, "-m", "saga", "export", "s"]
    read, write = os.pipe()
    os.close(read)

    done = subprocess.run(command, cwd=shop.folder, env=shop.environment(), stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)

    assert done.stderr == ""


def test_a_reader_of_what_happens_who_goes_away_ends_no_saga(shop: Shop) -> None:
    shop.write("note.py", SHOP.replace('print("cancelled", ctx.output.data["booking"])', 'DOWN.write_text("cancelled")'))
    command = [sys.executable, "-W", "error", "-m", "saga", "run", "note:trip", "--id", "s"]
    read, write = os.pipe()
    os.close(read)

    done = subprocess.run(command, cwd=shop.folder, env=shop.environment(), stdout=subprocess.PIPE, stderr=write, text=True, check=False)
    os.close(write)

    assert done.returncode == Exit.COMPENSATED
    assert (shop.folder / "the-bank-is-down").read_text(encoding="utf-8") == "cancelled"
    assert done.stdout.startswith("Saga s (trip): COMPENSATED after ")
    assert done.stdout.endswith("Nothing is left to do.\n")


def test_a_program_that_a_stage_starts_is_not_ended_when_nobody_reads_what_happens(shop: Shop) -> None:
    weigh = """
import subprocess


async def weigh(ctx):
    subprocess.run(["cat", __file__], check=True)


parcel = Pipeline(name="parcel").with_stage("weigh", weigh, "work")
"""
    shop.write("shop.py", SHOP + weigh)
    command = [sys.executable, "-m", "saga", "run", "shop:parcel"]
    read, write = os.pipe()
    os.close(read)

    done = subprocess.run(command, cwd=shop.folder, env=shop.environment(), stdout=subprocess.PIPE, stderr=write, text=True, check=False)
    os.close(write)

    assert done.returncode == Exit.COMPLETED
    assert done.stdout.endswith("Nothing is left to do.\n")


def test_what_stages_print_when_nobody_reads_it_any_more_harms_none_of_them(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)

    with os.fdopen(write, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        done = shop.saga("run", "shop:trip", "--id", "s")

    assert done.code == Exit.COMPENSATED
    assert re.search(r"reserve_seat +< undone +1 attempt ", done.out)


def test_without_its_extra_the_command_says_how_to_get_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "saga.cli.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)

    done = shop.saga("list")

    assert (done.code, done.err) == (
        Exit.MISUSE,
        "saga: the command line needs typer. Install it with: pip install 'stageflow-saga[cli]'\n",
    )


def test_another_module_that_is_missing_is_not_taken_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("saga.cli.commands", "saga.cli.commands.checking"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "saga.lint", None)

    with pytest.raises(ModuleNotFoundError, match=r"saga\.lint"):
        main(["list"])


# -- what a project says -----------------------------------------------------------------------------------------


def test_a_project_names_its_ledger_its_pipelines_and_its_policy(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAGA_LEDGER")
    shop.write("halt.toml", 'policy = "fail_fast"\non_failure = "halt"\n')
    shop.write(
        "pyproject.toml", '[tool.saga]\nledger = "sqlite:///other.db"\npipelines = ["shop:seat", "shop:trip"]\npolicy = "halt.toml"\n'
    )

    halted = shop.saga("run", "shop:trip", "--id", "s")
    undone = shop.saga("compensate", "s")

    assert halted.code == Exit.HALTED
    assert undone.code == Exit.COMPENSATED
    assert (shop.folder / "other.db").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.saga", "saga: expected TOML in pyproject.toml, got "),
        (
            "[tool.saga]\nledgr = 1",
            "saga: expected one of ledger, pipelines, policy in [tool.saga] of pyproject.toml, got 'ledgr'. Did you mean 'ledger'?\n",
        ),
        # What stands there instead may hold a password.
        (
            '[tool.saga]\nledger = ["postgresql://ann:s3cret@db/shop"]',
            "saga: expected a URL for ledger in [tool.saga] of pyproject.toml, got a list\n",
        ),
        (
            '[tool.saga]\npipelines = "shop:trip"',
            "saga: expected a list, as in [\"shop:book_trip\"], for pipelines in [tool.saga] of pyproject.toml, got 'shop:trip'\n",
        ),
        (
            '[tool]\nsaga = "postgresql://ann:s3cret@db/shop"',
            "saga: expected a table in [tool.saga] of pyproject.toml, got a str\n",
        ),
    ],
)
def test_a_project_that_says_what_makes_no_sense_is_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.delenv("SAGA_LEDGER")
    shop.write("pyproject.toml", text)

    done = shop.saga("run", "shop:seat")

    assert done.code == Exit.MISUSE
    assert done.err.startswith(said)


def test_a_project_whose_file_is_not_utf_8_is_refused_by_its_name(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended with a UnicodeDecodeError of nobody knows what, and with 1, as where a ledger fails."""
    monkeypatch.delenv("SAGA_LEDGER")
    (shop.folder / "pyproject.toml").write_text('[project]\nauthors = [{name = "Müller"}]\n', encoding="latin-1")

    done = shop.saga("run", "shop:seat")

    assert done == (Exit.MISUSE, "", "saga: expected UTF-8 in pyproject.toml, got 0xfc at byte 31\n")


def test_in_a_folder_that_was_deleted_what_needs_it_is_refused_and_everything_else_goes_on(
    shop: Shop, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in that of a release which a newer one has taken the place of: all that was said was "No such file or directory"."""
    shop.breaks_the_bank()
    shop.saga("run", "shop:trip", "--id", "s")
    gone = tmp_path_factory.mktemp("release")
    monkeypatch.chdir(gone)
    gone.rmdir()

    from_here = [shop.saga("show", "s"), shop.saga("run", "shop:trip")]
    monkeypatch.setenv("SAGA_LEDGER", f"sqlite:///{shop.folder}/sagas.db")
    from_the_root = [shop.saga("show", "s"), shop.saga("settle", "s", "charge_card", "undone", "--note", "by hand")]

    assert [done.code for done in from_here] == [Exit.MISUSE, Exit.MISUSE]
    assert from_here[0].err == "saga: expected a path from the root where the current folder was deleted, got 'sagas.db'\n"
    refused = "saga: expected a current folder that is there, got one that was deleted. Change to the one that has taken its place, "
    assert from_here[1].err.startswith(refused)
    assert [done.code for done in from_the_root] == [Exit.COMPLETED, Exit.COMPLETED]


def test_a_pipeline_that_the_project_does_not_name_is_asked_for(shop: Shop) -> None:
    shop.saga("run", "shop:order", "--id", "s")

    nothing = shop.saga("compensate", "s")
    elsewhere = shop.saga("resume", "s", "--ledger", f"sqlite:///{shop.folder}/sagas.db")
    shop.write("pyproject.toml", '[tool.saga]\npipelines = ["shop:seat"]\n')
    other = shop.saga("compensate", "s")

    neither = "saga: expected MODULE:PIPELINE, or pipelines in [tool.saga] of pyproject.toml, got neither. "
    typed = "Say where 'order' is: saga compensate s MODULE:PIPELINE\n"
    assert nothing.err == neither + typed
    assert elsewhere.err.endswith(f": saga resume s MODULE:PIPELINE --ledger sqlite:///{shop.folder}/sagas.db\n")
    assert other.err == f"saga: expected the pipeline 'order' among [tool.saga] pipelines, got seat. {typed}"


def test_whoever_asks_for_a_saga_within_another_without_its_pipeline_is_told_which_one_runs_it(shop: Shop) -> None:
    """Who then said where it is was refused, and only then told to go on with the other one."""
    shop.write("pyproject.toml", '[tool.saga]\npipelines = ["shop:family"]\n')
    shop.saga("run", "shop:family", "--id", "s")

    refused = shop.saga("resume", "s/book")

    assert refused.code == Exit.MISUSE
    assert refused.err == (
        "saga: expected the pipeline 'trip' among [tool.saga] pipelines, got family. Go on with saga s, which runs it. "
        "Where that is done with it, say where 'trip' is: saga resume s/book MODULE:PIPELINE\n"
    )


def test_two_pipelines_of_one_name_are_refused_and_the_same_one_given_twice_is_not(shop: Shop) -> None:
    shop.saga("run", "shop:made", "--id", "s")
    shop.write("other.py", 'from stageflow.api import Pipeline\nseat = Pipeline(name="seat")\n')

    refused = shop.saga("recover", "shop:seat", "other:seat")
    taken = shop.saga("recover", "shop:seat", "shop:seat", "shop:made")

    assert refused.code == Exit.MISUSE
    assert refused.err.startswith("saga: expected one pipeline of each name, got several named 'seat'. ")
    assert taken.out == "No saga has lost its process.\n"
    sys.modules.pop("other", None)


# -- a saga's later life -----------------------------------------------------------------------------------------


def test_a_halted_saga_is_resumed_under_another_policy(shop: Shop) -> None:
    shop.write("halt.toml", 'policy = "fail_fast"\non_failure = "halt"\n')
    shop.write("degrade.toml", 'policy = "continue_with_fallback"\n[fallbacks.ship]\nparcel = 0\n')
    halted = shop.saga("run", "shop:trip", "--id", "s", "--policy", "halt.toml")

    resumed = shop.saga("resume", "s", "shop:trip", "--policy", "degrade.toml")

    assert halted.out.endswith("To do: what was done is kept. Mend the cause, then: saga resume s shop:trip\n")
    assert resumed.code == Exit.DEGRADED
    assert re.search(r"^s  goes on forward, resumed by .+$", resumed.err, re.MULTILINE)
    assert "charge_card" not in resumed.err
    assert "Nothing was done" not in resumed.err


def test_a_stuck_saga_is_settled_and_then_goes_on(shop: Shop) -> None:
    shop.breaks_the_bank()
    stuck = shop.saga("run", "shop:trip", "--id", "s")

    settled = shop.saga("settle", "s", "charge_card", "undone", "--note", "refunded by hand, ticket 4711")
    resumed = shop.saga("resume", "s", "shop:trip")

    assert stuck.out.splitlines()[-3:] == [
        "To do: look at the outside world, put it right by hand, and say so (undone, kept or retry); then go on:",
        "  saga settle s charge_card undone --note '...'",
        "  saga resume s shop:trip",
    ]
    assert settled.code == Exit.COMPLETED
    assert "refunded by hand, ticket 4711" in settled.out
    assert settled.out.endswith("To do: it was not undone to the end; go on with: saga resume s MODULE:PIPELINE\n")
    assert resumed.code == Exit.COMPENSATED


def test_a_report_names_the_ledger_where_the_next_command_would_not_find_it(shop: Shop) -> None:
    shop.breaks_the_bank()
    stuck = shop.saga("run", "shop:trip", "--id", "s", "--ledger", "sqlite:///other.db")
    settle, resume = (shlex.split(line)[1:] for line in stuck.out.splitlines() if line.startswith("  saga "))
    shop.mends_the_bank()

    settled, resumed = shop.saga(*settle), shop.saga(*resume)

    assert settle == ["settle", "s", "charge_card", "undone", "--note", "...", "--ledger", "sqlite:///other.db"]
    assert settled.out.endswith("go on with: saga resume s MODULE:PIPELINE --ledger sqlite:///other.db\n")
    assert resume == ["resume", "s", "shop:trip", "--ledger", "sqlite:///other.db"]
    assert resumed.code == Exit.COMPENSATED


def test_a_report_names_no_pipeline_where_the_project_does(shop: Shop) -> None:
    shop.write("pyproject.toml", '[tool.saga]\npipelines = ["shop:trip"]\n')
    shop.breaks_the_bank()
    shop.saga("run", "shop:trip", "--id", "s")

    shown = shop.saga("show", "s")

    assert shown.out.endswith("\n  saga resume s\n")


@pytest.mark.parametrize("policy", ["compensate", "halt"])
def test_where_the_ledger_is_in_memory_no_command_is_said_to_go_on(shop: Shop, policy: str) -> None:
    shop.write("policy.toml", f'policy = "fail_fast"\non_failure = "{policy}"\n')
    shop.breaks_the_bank()

    done = shop.saga("run", "shop:trip", "--id", "s", "--ledger", "memory:", "--policy", "policy.toml")

    assert done.code == (Exit.HALTED if policy == "halt" else Exit.STUCK)
    assert "saga settle" not in done.out
    assert "saga resume" not in done.out
    assert done.out.endswith(
        "To do: put right by hand what should not stand. The ledger was in memory, and no command finds the saga any more.\n"
    )


def test_an_operator_is_told_why_nothing_was_done(shop: Shop) -> None:
    shop.write(
        "sent.py",
        SHOP + "class Send(PivotStage):\n    async def execute(self, ctx): ...\n\n\n"
        'sent = Pipeline(name="sent", stages=paid.stages).with_stage("send", Send, dependencies=("charge_card",))\n',
    )
    shop.saga("run", "sent:sent", "--id", "s")
    shop.saga("run", "shop:trip", "--id", "t")

    kept = shop.saga("compensate", "s", "sent:sent")
    complete = shop.saga("resume", "s", "sent:sent")
    undone = shop.saga("resume", "t", "shop:trip")

    assert (kept.code, kept.err) == (Exit.COMPLETED, "Nothing was done: nothing that can be undone is left.\n")
    assert (complete.code, complete.err) == (Exit.COMPLETED, "Nothing was done: it is completed, nothing is left to run.\n")
    assert undone.code == Exit.COMPENSATED
    assert undone.err == "Nothing was done: it is undone, and runs once more only when it is told to go forward.\n"
    sys.modules.pop("sent", None)


def test_a_stuck_saga_may_be_run_on_forward(shop: Shop) -> None:
    shop.breaks_the_bank()
    shop.saga("run", "shop:order", "--id", "s")
    shop.mends_the_bank()

    resumed = shop.saga("resume", "s", "shop:order", "--forward")

    assert resumed.code == Exit.COMPLETED


@pytest.mark.parametrize("command", ["resume", "compensate", "recover"])
def test_a_pipeline_that_may_be_left_out_stands_in_no_more_brackets_than_one(shop: Shop, command: str) -> None:
    usage = shop.saga(command, "--help").out.splitlines()[0]

    assert "MODULE:PIPELINE" in usage
    assert "[[" not in usage


def test_a_saga_that_was_undone_runs_once_more_forward_as_the_help_says(shop: Shop) -> None:
    shop.saga("run", "shop:paid", "--id", "s")
    shop.saga("compensate", "s", "shop:paid")

    help_, resumed = shop.saga("resume", "--help"), shop.saga("resume", "s", "shop:paid", "--forward")

    assert "or that was undone" in " ".join(help_.out.split())
    assert resumed.code == Exit.COMPLETED


def test_the_commands_for_names_that_begin_with_a_dash_are_taken_as_they_are_printed(shop: Shop) -> None:
    shop.write(
        "dashed.py", SHOP + 'dashed = Pipeline(name="d").with_stage("-a", Charge).with_stage("b", decline, "work", dependencies=("-a",))'
    )
    shop.breaks_the_bank()
    stuck = shop.saga("run", "dashed:dashed", "--id=-s")
    settle, resume = (shlex.split(line) for line in stuck.out.splitlines() if line.startswith("  saga "))

    settled, resumed = shop.saga(*settle[1:]), shop.saga(*resume[1:])

    assert settle == ["saga", "settle", "--note", "...", "--", "-s", "-a", "undone"]
    assert settled.code == Exit.COMPLETED
    assert resumed.code == Exit.COMPENSATED
    sys.modules.pop("dashed", None)


def test_a_stage_that_is_kept_may_be_given_an_output(shop: Shop) -> None:
    shop.write("timeout.toml", 'policy = "fail_fast"\ntimeout = 0.01\non_failure = "halt"\n')
    shop.write("slow.py", SHOP.replace("compensate_in_doubt = True", ""))
    shop.saga("run", "slow:slow", "--id", "s", "--policy", "timeout.toml")

    settled = shop.saga("settle", "s", "charge_card", "kept", "--note", "it is in the books", "--output", '{"receipt": 9}', "--json")

    assert SagaReport.model_validate_json(settled.out).kept["charge_card"].data == {"receipt": 9}
    sys.modules.pop("slow", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ship", "undone", "--note", "x"), "saga: expected a stage that is stuck or in doubt, for stage 'ship', got one that is kept\n"),
        (("ship", "undone", "--note", " "), "saga: expected a note that says why, for stage 'ship', got ' '\n"),
        (("nothing", "undone", "--note", "x"), "saga: expected a stage of saga s (reserve_seat, charge_card, ship), got 'nothing'\n"),
    ],
)
def test_a_verdict_that_makes_no_sense_is_refused(shop: Shop, arguments: tuple[str, ...], said: str) -> None:
    shop.saga("run", "shop:order", "--id", "s")

    done = shop.saga("settle", "s", *arguments)

    assert (done.code, done.err) == (Exit.MISUSE, said)


def test_a_verdict_is_one_of_three(shop: Shop) -> None:
    done = shop.saga("settle", "s", "ship", "perhaps", "--note", "x")

    assert done.code == Exit.MISUSE
    assert "'perhaps'" in done.err


def test_list_shows_the_sagas_and_may_pick_some(shop: Shop) -> None:
    shop.saga("run", "shop:order", "--id", "first")
    shop.saga("run", "shop:family", "--id", "second")

    everything = shop.saga("list").out.splitlines()
    with_children = shop.saga("list", "--nested", "--json")
    undone = shop.saga("list", "--status", "compensated", "--status", "stuck").out.splitlines()

    assert everything[0].split() == ["ID", "PIPELINE", "STATUS", "STARTED"]
    assert [line.split()[:3] for line in everything[1:]] == [["first", "order", "completed"], ["second", "family", "compensated"]]
    assert [entry["saga_id"] for entry in json.loads(with_children.out)] == ["first", "second", "second/book"]
    assert [line.split()[0] for line in undone[1:]] == ["second"]


def test_list_says_whether_somebody_runs_what_has_not_come_to_rest(shop: Shop) -> None:
    shop.really("run", "shop:crash", "--id", "killed")
    shop.write("exported", shop.saga("export", "killed").out.replace('"killed"', '"imported"'))
    shop.saga("import", "exported")
    shop.begin_elsewhere("silent", lease=1e-9)
    shop.begin_elsewhere("alive", lease=3600)

    listed = shop.saga("list").out.splitlines()[1:]

    assert {line.split()[0]: " ".join(line.split()[-3:]) for line in listed} == {
        "killed": "nobody runs it",
        "imported": "nobody runs it",
        "silent": "nobody runs it",
        "alive": "somebody runs it",
    }


def test_a_report_that_nobody_can_take_down_does_not_pass_for_a_saga_that_never_ran(shop: Shop) -> None:
    """The exit code 2 says that nothing was run; who believes it runs the saga again."""
    command = [sys.executable, "-m", "saga", "run", "shop:order", "--id", "s"]
    here = shop.environment(PYTHONUNBUFFERED="1")  # else Python tries once more when it ends, and exits with 120
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(command, cwd=shop.folder, env=here, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.stderr.endswith("saga: [Errno 28] No space left on device\n")
    assert done.returncode == Exit.FAILED
    assert shop.saga("show", "s").out.startswith("Saga s (order): COMPLETED")


def test_where_the_ledger_fails_the_command_that_goes_on_is_said(shop: Shop) -> None:
    take_away = """
async def take_away(ctx):
    Path("mine.db").rename("elsewhere.db")


theft = seat.with_stage("take_away", take_away, "work", dependencies=("reserve_seat",))
"""
    shop.write("shop.py", SHOP + take_away)

    done = shop.really("run", "shop:theft", "--id", "s", "--ledger", "sqlite:///mine.db")

    assert done.code == Exit.FAILED
    last = done.err.splitlines()[-1]
    assert last.startswith("saga: saga s stopped, because its ledger failed: ")
    assert "In effect: reserve_seat; not known: nothing." in last
    assert last.endswith("When the ledger is back, go on: saga resume s shop:theft --ledger sqlite:///mine.db")


def test_where_the_ledger_fails_to_record_that_a_saga_is_to_be_undone_nobody_is_told_to_run_it_on(shop: Shop) -> None:
    """A saga that had halted ran on to its end when the command was typed that the error gave."""
    shop.saga("run", "shop:order", "--id", "s")
    with closing(sqlite3.connect(shop.folder / "sagas.db")) as file:
        file.execute("CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'the disk is full'); END")

    done = shop.saga("compensate", "s", "shop:order")

    assert done.code == Exit.FAILED
    assert "saga s stopped, because its ledger failed: " in done.err
    assert done.err.endswith("When the ledger is back, go on: saga compensate s shop:order\n")


def test_where_the_ledger_fails_to_record_that_a_stuck_saga_runs_on_nobody_is_told_to_undo_it(shop: Shop) -> None:
    """What the error gave was a plain resume, which goes on with what was stuck."""
    shop.write("fast.toml", 'policy = "fail_fast"\ntimeout = 9\n')
    shop.breaks_the_bank()
    shop.saga("run", "shop:trip", "--id", "s")
    with closing(sqlite3.connect(shop.folder / "sagas.db")) as file:
        file.execute("CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'the disk is full'); END")

    done = shop.saga("resume", "s", "shop:trip", "--forward", "--policy", "fast.toml")

    assert done.code == Exit.FAILED
    assert done.err.endswith("When the ledger is back, go on: saga resume s shop:trip --forward --policy fast.toml\n")


def test_where_the_ledger_fails_once_it_has_that_a_saga_runs_on_nobody_is_told_to_run_it_on_twice(shop: Shop) -> None:
    """It may have been undone when its end was not recorded: a second --forward would run all of it anew."""
    shop.breaks_the_bank()
    shop.saga("run", "shop:trip", "--id", "s")
    with closing(sqlite3.connect(shop.folder / "sagas.db")) as file:
        file.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events WHEN new.body LIKE '%saga_turned_back%' BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    shop.mends_the_bank()

    done = shop.saga("resume", "s", "shop:trip", "--forward")

    assert done.code == Exit.FAILED
    assert done.err.endswith("When the ledger is back, go on: saga resume s shop:trip\n")


DEAF = """
class Deaf(Charge):
    idempotent, timeout = True, 0.01

    async def execute(self, ctx):
        while not Path("patience").exists():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                Path("patience" if Path("asked").exists() else "asked").touch()
        return StageOutput.ok(receipt=7)


deaf = seat.with_stage("charge_card", Deaf, dependencies=("reserve_seat",))
"""


@pytest.mark.parametrize("command", ["run", "recover"])
def test_what_was_given_up_ends_before_the_ledger_is_closed_and_the_report_tells_of_it(shop: Shop, command: str) -> None:
    """The ledger was closed first: that the card was charged after all could not be recorded, and stderr was full of tracebacks."""
    shop.write("hasty.toml", 'policy = "fail_fast"\ncancel_grace = 0.01\non_failure = "halt"\n')
    first = ["--id", "s", "--policy", "hasty.toml"]
    if command == "recover":
        shop.write("shop.py", SHOP + DEAF.replace("(self, ctx):", "(self, ctx):\n        os._exit(9)"))
        shop.really("run", "shop:deaf", *first)
    shop.write("shop.py", SHOP + DEAF)

    done = shop.really(command, "shop:deaf", *(first if command == "run" else ()))

    assert "Traceback" not in done.err
    charge = SagaReport.model_validate_json(shop.saga("show", "s", "--json").out).stages["charge_card"]
    assert charge.state is not StageState.IN_DOUBT
    assert (charge.late_output or charge.output) is not None
    assert done.code != Exit.STUCK


def test_what_came_late_while_the_saga_still_ran_is_recorded_before_the_ledger_is_closed(shop: Shop) -> None:
    """The command cancelled its recording, and the card stayed in doubt."""
    shop.write("hasty.toml", 'policy = "fail_fast"\ncancel_grace = 0.01\non_failure = "halt"\n')
    meanwhile = """
answers = asyncio.Event()
is_charged = asyncio.Event()


class Deaf(Charge):
    timeout = 0.01

    async def execute(self, ctx):
        while not answers.is_set():
            try:
                await answers.wait()
            except asyncio.CancelledError:
                continue
        is_charged.set()
        return StageOutput.ok(receipt=7)


class Ship(Charge):
    async def execute(self, ctx):
        raise ConnectionError("no lorry")

    async def probe(self, ctx):
        answers.set()
        await is_charged.wait()


meanwhile = Pipeline(name="meanwhile").with_stage("charge_card", Deaf).with_stage("ship", Ship)
"""
    shop.write("shop.py", SHOP + meanwhile)

    done = shop.really("run", "shop:meanwhile", "--id", "s", "--policy", "hasty.toml")

    assert "Traceback" not in done.err
    charge = SagaReport.model_validate_json(shop.saga("show", "s", "--json").out).stages["charge_card"]
    assert charge.late_output is not None


def test_a_saga_within_that_still_goes_back_is_waited_for_and_not_cut_short(shop: Shop) -> None:
    """The command cancelled its compensation, and it was stuck."""
    shop.write("hasty.toml", 'policy = "fail_fast"\nin_flight = "cancel"\ncancel_grace = 0.01\non_failure = "halt"\n')
    slowly = """
is_undoing = asyncio.Event()


class RefundByLorry(Charge):
    async def compensate(self, ctx):
        is_undoing.set()
        await wait(ctx)


paid_back = Pipeline(name="paid_back").with_stage("charge_card", RefundByLorry).with_stage(
    "ship", decline, "work", dependencies=("charge_card",)
)


async def book(ctx):
    await ctx.run_saga(paid_back)


async def cancel(ctx): ...


async def fail_meanwhile(ctx):
    await is_undoing.wait()
    return StageOutput.fail("no time")


hasty = Pipeline(name="hasty").with_stage("book", compensable(book, cancel)).with_stage("hurry", fail_meanwhile, "work")
"""
    shop.write("shop.py", "from saga import compensable\n" + WAITING + slowly)
    arguments = [sys.executable, "-W", "error", "-m", "saga", "run", "shop:hasty", "--id", "s", "--policy", "hasty.toml"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    with subprocess.Popen(arguments, cwd=shop.folder, env=shop.environment(), **pipes) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("Waiting for what was given up"):
            assert process.poll() is None
        shop.brings_the_lorry()
        process.communicate()

    assert process.returncode == Exit.HALTED
    assert SagaReport.model_validate_json(shop.saga("show", "s/book", "--json").out).status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["run", "recover"])
def test_a_signal_leaves_what_was_given_up_and_does_not_end(shop: Shop, command: str, number: signal.Signals) -> None:
    """After a Ctrl-C the command waited on, until another one ended it with 130; the others ended it without its report."""
    shop.write("hasty.toml", 'policy = "fail_fast"\ncancel_grace = 0.01\non_failure = "halt"\n')
    first = ["--id", "s", "--policy", "hasty.toml"]
    if command == "recover":
        shop.write("shop.py", SHOP + DEAF.replace("(self, ctx):", "(self, ctx):\n        os._exit(9)"))
        shop.really("run", "shop:deaf", *first)
    shop.write("shop.py", SHOP + DEAF.replace('Path("patience" if', 'Path("asked" if'))
    arguments = [sys.executable, "-W", "error", "-m", "saga", command, "shop:deaf", *(first if command == "run" else ())]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    with subprocess.Popen(arguments, cwd=shop.folder, env=shop.environment(), **pipes) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("Waiting for what was given up"):
            assert process.poll() is None
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()

    assert process.returncode == Exit.HALTED
    assert "halted" in out.lower()
    assert err == ""


def test_what_was_given_up_ends_before_the_ledger_is_closed_also_where_that_failed_meanwhile(shop: Shop) -> None:
    """The ledger took it again, and was closed: that the card was charged after all was not recorded, and stderr was full of tracebacks."""
    shop.write("hasty.toml", 'policy = "continue_with_fallback"\ncancel_grace = 0.01\n')
    fails_meanwhile = """
import sqlite3
from contextlib import closing


def tell_ledger(statement):
    with closing(sqlite3.connect("sagas.db")) as file:
        file.execute(statement)


class Deafer(Deaf):
    async def execute(self, ctx):
        output = await super().execute(ctx)
        tell_ledger("DROP TRIGGER full")
        return output

    async def fallback(self, ctx, failure):
        return StageOutput.ok(receipt=None)


async def fill(ctx):
    tell_ledger("CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'full'); END")


deafer = Pipeline(name="deafer").with_stage("charge_card", Deafer).with_stage("ship", fill, "work", dependencies=("charge_card",))
"""
    shop.write("shop.py", SHOP + DEAF + fails_meanwhile)

    done = shop.really("run", "shop:deafer", "--id", "s", "--policy", "hasty.toml")

    assert done.code == Exit.FAILED
    assert "Traceback" not in done.err
    assert done.err.endswith("When the ledger is back, go on: saga resume s shop:deafer\n")
    charge = SagaReport.model_validate_json(shop.saga("show", "s", "--json").out).stages["charge_card"]
    assert charge.late_output is not None


@pytest.mark.parametrize(("error", "expected"), [(None, [Exit.HALTED]), (LedgerError("it is gone"), ["it is gone", Exit.FAILED])])
def test_where_code_still_runs_that_was_left_the_process_ends_when_all_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, expected: list[Any]
) -> None:
    happened: list[Any] = []

    async def command() -> Exit:
        if error is not None:
            raise error
        return Exit.HALTED

    def tell(error: Exception) -> Exit:
        happened.append(str(error))
        return Exit.FAILED

    async def run() -> None:
        monkeypatch.setattr(conduct, "_LEFT", {asyncio.create_task(asyncio.Event().wait())})
        await conduct.to_the_end(command(), tell)

    monkeypatch.setattr(os, "_exit", happened.append)
    asyncio.run(run())

    assert happened == expected


def test_a_signal_leaves_what_was_given_up_also_where_the_ledger_has_failed(shop: Shop) -> None:
    """What had failed was not told, and the process not ended, before the signal had come a second time."""
    shop.write("hasty.toml", 'policy = "continue_with_fallback"\ncancel_grace = 0.01\n')
    fails_meanwhile = """
class Deafer(Deaf):
    async def fallback(self, ctx, failure):
        return StageOutput.ok(receipt=None)


async def fill(ctx):
    import sqlite3
    with sqlite3.connect("sagas.db") as file:
        file.execute("CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'full'); END")


deafer = Pipeline(name="deafer").with_stage("charge_card", Deafer).with_stage("ship", fill, "work", dependencies=("charge_card",))
"""
    shop.write("shop.py", SHOP + DEAF.replace('Path("patience" if', 'Path("asked" if') + fails_meanwhile)
    arguments = [sys.executable, "-W", "error", "-m", "saga", "run", "shop:deafer", "--id", "s", "--policy", "hasty.toml"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    with subprocess.Popen(arguments, cwd=shop.folder, env=shop.environment(), **pipes) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("Waiting for what was given up"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()

    assert process.returncode == Exit.FAILED
    assert out == ""
    assert err.startswith("saga: saga s stopped, because its ledger failed")
    assert err.endswith("When the ledger is back, go on: saga resume s shop:deafer\n")


def test_show_prints_the_report_again(shop: Shop) -> None:
    ran = shop.saga("run", "shop:family", "--id", "s")

    assert shop.saga("show", "s") == (Exit.COMPLETED, ran.out, "")
    assert SagaReport.model_validate_json(shop.saga("show", "s", "--json").out).saga_id == "s"


def test_a_saga_moves_to_another_ledger_with_its_children(shop: Shop) -> None:
    ran = shop.saga("run", "shop:family", "--id", "s")
    exported = shop.saga("export", "s").out
    shop.write("s.jsonl", exported)

    imported = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    assert imported == (Exit.COMPLETED, "s  compensated\ns/book  compensated\n", "")
    assert shop.saga("show", "s", "--ledger", "sqlite:///new.db").out == ran.out
    assert shop.saga("export", "s", "--ledger", "sqlite:///new.db").out == exported
    assert not re.search("runs it", shop.saga("list", "--ledger", "sqlite:///new.db").out)


def test_the_id_of_a_saga_from_elsewhere_is_shown_and_not_obeyed_by_a_terminal(shop: Shop) -> None:
    shop.saga("run", "shop:order", "--id", "s")
    shop.write("s.jsonl", shop.saga("export", "s").out.replace('"s"', r'"s\u001b[2J"'))

    imported = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")
    pruned = shop.saga("prune", "--older-than", "0s", "--ledger", "sqlite:///new.db")

    assert (imported.out, pruned.out) == ("s\\u001b[2J  completed\n", "s\\u001b[2J\n")


def test_what_machines_read_is_not_obeyed_by_a_terminal_either(shop: Shop) -> None:
    """JSON itself escapes only the oldest control characters: not the one that begins a sequence alone, nor those that turn text round."""
    shop.write("shop.py", SHOP.replace('StageOutput.fail("declined")', r'StageOutput.fail("\x9b2J\u202e 北京")'))
    shop.saga("run", "shop:trip", "--id", "s")

    shown = shop.saga("show", "s", "--json").out
    exported = shop.saga("export", "s").out
    shop.write("s.jsonl", exported)
    shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    assert r"\u009b2J\u202e 北京" in shown
    assert r"\u009b2J\u202e 北京" in exported
    assert json.loads(shown)["cause"]["message"] == "\x9b2J\u202e 北京"
    assert shop.saga("show", "s", "--json", "--ledger", "sqlite:///new.db").out == shown


def test_a_traceback_is_not_obeyed_by_a_terminal(shop: Shop) -> None:
    shop.write("shop.py", SHOP + r'raise ValueError("no\x1b[2J catalogue\n  at all")')

    done = shop.saga("check", "shop:trip", "--traceback")

    assert done.err.endswith("got ValueError: no\\u001b[2J catalogue\n  at all\n\n")


def test_sagas_that_were_imported_are_listed_by_their_age_too(shop: Shop) -> None:
    """They stood last, and those within before the one that runs them."""
    new = ("--ledger", "sqlite:///new.db")
    shop.saga("run", "shop:family", "--id", "older")
    shop.write("older.jsonl", shop.saga("export", "older").out)
    shop.saga("run", "shop:seat", "--id", "younger", *new)
    shop.saga("import", "older.jsonl", *new)

    listed = shop.saga("list", "--nested", *new)
    in_json = shop.saga("list", "--nested", "--json", *new)

    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == ["older", "older/book", "younger"]
    assert [entry["saga_id"] for entry in json.loads(in_json.out)] == ["older", "older/book", "younger"]


def test_a_child_is_not_imported_without_the_saga_that_runs_it(shop: Shop) -> None:
    """saga list did not show it, and what its report said to settle and to resume was the other one."""
    shop.saga("run", "shop:family", "--id", "s")
    shop.write("child.jsonl", shop.saga("export", "s/book").out)

    done = shop.saga("import", "child.jsonl", "--ledger", "sqlite:///new.db")

    assert done.code == Exit.MISUSE
    assert done.err == "saga: expected the saga s, which runs s/book, in the file, too, got none. Export s. Nothing was imported.\n"
    assert not (shop.folder / "new.db").exists()


@pytest.mark.parametrize("parents", [{"s": "s"}, {"s": "t", "t": "s"}, {"s": None, "t": "s"}], ids=["itself", "each other", "another one"])
def test_a_saga_that_is_none_of_its_parents_is_not_imported(shop: Shop, parents: dict[str, str | None]) -> None:
    """Whatever followed the parents of one that runs itself never came to an end."""
    graph = Graph.of([Node(name="reserve_seat", role=Role.COMPENSABLE)])
    lines = [
        event_to_json(
            SagaStarted(
                saga_id=saga_id, pipeline="seat", graph=graph, policy=FailFast(), parent=parent, parent_stage=parent and "reserve_seat"
            )
        )
        for saga_id, parent in parents.items()
    ]
    shop.write("s.jsonl", "\n".join([*lines, f'{{"events":{len(lines)}}}']))

    done = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    child, parent = list(parents.items())[-1] if parents["s"] is None else ("s", parents["s"])
    why = f"saga {child} is not one that stage 'reserve_seat' of saga {parent} runs: its id would begin with {parent}/reserve_seat"
    assert done == (Exit.FAILED, "", f"saga: {why}; nothing was imported\n")
    assert not (shop.folder / "new.db").exists()


@pytest.mark.parametrize(
    ("child", "stage", "why"),
    [
        ("s/room", "room", "stage 'room' of saga s, which is said to run saga s/room, is not among its stages (book)"),
        ("s/room", "book", "saga s/room is not one that stage 'book' of saga s runs: its id would begin with s/book"),
    ],
)
def test_a_saga_that_no_stage_of_its_parent_runs_is_not_imported(shop: Shop, child: str, stage: str, why: str) -> None:
    """The report of its parent had nothing of it, stuck as it was, and to settle it ended in a KeyError when that was recorded."""
    shop.saga("run", "shop:family", "--id", "s")
    exported = shop.saga("export", "s").out
    shop.write("s.jsonl", exported.replace('"s/book"', f'"{child}"').replace('"parent_stage":"book"', f'"parent_stage":"{stage}"'))

    done = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    assert done == (Exit.FAILED, "", f"saga: {why}; nothing was imported\n")
    assert not (shop.folder / "new.db").exists()


def test_an_import_is_refused_as_a_whole(shop: Shop) -> None:
    shop.saga("run", "shop:order", "--id", "s")
    *lines, end = shop.saga("export", "s").out.splitlines(keepends=True)
    some = [line for line in lines if '"stage_started"' not in line]
    files = {
        "headless.jsonl": lines[1:],
        "twice.jsonl": [*lines, lines[0]],
        "cut.jsonl": lines,
        "cut_before.jsonl": [*lines[:-1], *lines, end],
        "holed.jsonl": [lines[0], *lines[2:], end],
        "behind.jsonl": [*lines, end, lines[1], end],
        "garbled.jsonl": [lines[0], "{}\n"],
        "newer.jsonl": [lines[0].replace('"in_flight"', '"later":1,"in_flight"'), *lines[1:]],
        "unknown.jsonl": [lines[0].replace('"dependencies":["reserve_seat"]', '"dependencies":["lost"]'), *lines[1:]],
        "cycle.jsonl": [lines[0].replace('"dependencies":[]', '"dependencies":["ship"]'), *lines[1:]],
        "doubled.jsonl": [lines[0].replace('"name":"ship"', '"name":"reserve_seat"'), *lines[1:]],
        "contradictory.jsonl": [*some, f'{{"events":{len(some)}}}\n'],
        "blank.jsonl": [],
    }
    for name, content in files.items():
        shop.write(name, "".join(content))

    done = {name: shop.saga("import", name, "--ledger", "sqlite:///new.db") for name in files}

    assert {name: (one.code, re.split(", got Unable|: expected one of", one.err)[0]) for name, one in done.items()} == {
        "headless.jsonl": (Exit.FAILED, "saga: expected SagaStarted in line 1, got StageStarted; nothing was imported\n"),
        "twice.jsonl": (Exit.FAILED, f"saga: line {len(lines) + 1} begins saga s a second time; nothing was imported\n"),
        "cut.jsonl": (
            Exit.FAILED,
            "saga: expected at the end how many events there are, got none: the file was cut; nothing was imported\n",
        ),
        "cut_before.jsonl": (Exit.FAILED, f"saga: line {len(lines)} begins saga s a second time; nothing was imported\n"),
        "holed.jsonl": (
            Exit.FAILED,
            f"saga: expected {len(lines)} events before line {len(lines)}, got {len(lines) - 1}: an export was cut; nothing was imported\n",
        ),
        "behind.jsonl": (Exit.FAILED, f"saga: expected SagaStarted in line {len(lines) + 2}, got StageStarted; nothing was imported\n"),
        "garbled.jsonl": (Exit.FAILED, "saga: expected an event of a saga in line 2"),
        "newer.jsonl": (Exit.FAILED, "saga: expected an event of a saga in line 1, got one of another version of saga"),
        **{
            f"{name}.jsonl": (Exit.FAILED, f"saga: expected an event of a saga in line 1, got Value error, {why}; nothing was imported\n")
            for name, why in {
                "unknown": "expected each stage once, behind those that it depends on, got 'charge_card'",
                "cycle": "expected each stage once, behind those that it depends on, got 'reserve_seat'",
                "doubled": "expected each stage once, behind those that it depends on, got 'reserve_seat'",
            }.items()
        },
        "contradictory.jsonl": (Exit.FAILED, done["contradictory.jsonl"].err),
        "blank.jsonl": (Exit.MISUSE, "saga: expected at least one saga, got a file without any. Nothing was imported.\n"),
    }
    assert "StageCompleted" in done["contradictory.jsonl"].err
    assert done["contradictory.jsonl"].err.endswith(". Nothing was imported.\n")
    assert not (shop.folder / "new.db").exists()


def test_several_exports_may_stand_in_one_file(shop: Shop) -> None:
    for saga_id in ("s", "t"):
        shop.saga("run", "shop:order", "--id", saga_id)
    shop.write("both.jsonl", shop.saga("export", "s").out + shop.saga("export", "t").out)

    done = shop.saga("import", "both.jsonl", "--ledger", "sqlite:///new.db")

    assert done == (Exit.COMPLETED, "s  completed\nt  completed\n", "")


def test_a_child_that_the_ledger_would_not_take_keeps_the_saga_that_runs_it_from_being_imported(shop: Shop) -> None:
    shop.saga("run", "shop:family", "--id", "s")
    large = shop.saga("export", "s").out.replace('"receipt":7', '"receipt":"' + "7" * 2**24 + '"')
    shop.write("s.jsonl", large)

    done = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    assert done.code == Exit.FAILED
    assert re.fullmatch(r"saga: expected at most .*, got 16,777,\d+, StageCompleted of saga s/book; nothing was imported\n", done.err)
    assert shop.saga("list", "--nested", "--ledger", "sqlite:///new.db").out.splitlines()[1:] == []


def test_nobody_can_go_on_with_an_imported_saga_before_its_children_are_there(shop: Shop) -> None:
    shop.saga("run", "shop:family", "--id", "s")
    shop.write("s.jsonl", shop.saga("export", "s").out)
    shop.saga("run", "shop:order", "--id", "other", "--ledger", "sqlite:///new.db")
    with closing(sqlite3.connect("new.db", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE free (id TEXT, beside TEXT)")
        connection.execute(
            "CREATE TRIGGER looks AFTER INSERT ON sagas BEGIN INSERT INTO free SELECT id, new.id FROM sagas WHERE owner IS NULL; END"
        )

    shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    with closing(sqlite3.connect("new.db")) as connection:
        assert connection.execute("SELECT * FROM free").fetchall() == [("other", "s/book"), ("other", "s")]
        assert connection.execute("SELECT id FROM sagas WHERE owner IS NOT NULL").fetchall() == []


def test_an_import_that_was_cut_off_leaves_no_saga_without_its_children_and_is_done_when_it_is_said_again(shop: Shop) -> None:
    """The saga would begin anew the child that it did not find; and to import the file again was refused, with 'Nothing was imported'."""
    ran = shop.saga("run", "shop:family", "--id", "s")
    shop.write("s.jsonl", shop.saga("export", "s").out)
    shop.saga("run", "shop:order", "--id", "other", "--ledger", "sqlite:///new.db")
    with closing(sqlite3.connect("new.db", isolation_level=None)) as connection:
        connection.execute("CREATE TRIGGER dies BEFORE INSERT ON sagas WHEN new.id = 's' BEGIN SELECT RAISE(ABORT, 'killed'); END")

    cut_off = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")
    there = shop.saga("list", "--nested", "--ledger", "sqlite:///new.db").out
    with closing(sqlite3.connect("new.db", isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER dies")
    again = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")
    third = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    assert cut_off.code == Exit.FAILED
    assert [line.split()[0] for line in there.splitlines()[1:]] == ["s/book", "other"]
    assert again == (Exit.COMPLETED, "s  compensated\ns/book  compensated, was there already\n", "")
    assert shop.saga("show", "s", "--ledger", "sqlite:///new.db").out == ran.out
    with closing(sqlite3.connect("new.db")) as connection:
        assert connection.execute("SELECT id FROM sagas WHERE owner IS NOT NULL").fetchall() == []
    assert third == (Exit.COMPLETED, "s  compensated, was there already\ns/book  compensated, was there already\n", "")


def test_an_import_beside_another_saga_of_that_id_is_refused(shop: Shop) -> None:
    shop.saga("run", "shop:family", "--id", "s")
    shop.write("s.jsonl", shop.saga("export", "s").out)
    shop.saga("run", "shop:order", "--id", "s/book", "--ledger", "sqlite:///new.db")

    done = shop.saga("import", "s.jsonl", "--ledger", "sqlite:///new.db")

    assert done == (Exit.MISUSE, "", "saga: expected a saga id that is not in the ledger yet, got 's/book'. Nothing was imported.\n")
    assert [line.split()[0] for line in shop.saga("list", "--ledger", "sqlite:///new.db").out.splitlines()[1:]] == ["s/book"]


def test_prune_forgets_what_is_old_and_done(shop: Shop) -> None:
    shop.saga("run", "shop:order", "--id", "s")

    young = shop.saga("prune", "--older-than", "1d")
    old = shop.saga("prune", "--older-than", "0s")

    assert young == (Exit.COMPLETED, "", "0 forgotten\n")
    assert old == (Exit.COMPLETED, "s\n", "1 forgotten\n")
    assert shop.saga("prune", "--older-than", "soon").err == "saga: expected an age such as 30d, 12h or 90m, got 'soon'\n"


@pytest.mark.parametrize("age", ["999999d", "9999999999999w", "9" * 5000 + "s"])
def test_an_age_beyond_the_calendar_is_refused(shop: Shop, age: str) -> None:
    done = shop.saga("prune", "--older-than", age)

    assert (done.code, done.err) == (Exit.MISUSE, f"saga: expected an age that reaches back to the year 1 at most, got {age[:20]!r}\n")


# -- before it runs ----------------------------------------------------------------------------------------------


def test_check_exits_with_what_it_found(shop: Shop) -> None:
    shop.write(
        "risky.py",
        "from shop import paid, Charge, decline\ndecline.has_effect = True\n"
        "pipeline = paid.with_stage('mail', decline, 'work').with_stage('last', Charge, dependencies=('mail',))\n",
    )

    fine = shop.saga("check", "shop:order")
    risky = shop.saga("check", "risky:pipeline")
    as_json = shop.saga("check", "risky:pipeline", "--json")

    assert fine == (Exit.COMPLETED, "", "")
    assert risky.code == Exit.FOUND
    assert risky.out.startswith("stage 'mail': error irreversible-before-fallible: ")
    assert json.loads(as_json.out)[0]["code"] == "irreversible-before-fallible"
    sys.modules.pop("risky", None)


def test_explain_says_what_follows_under_a_policy(shop: Shop) -> None:
    shop.write("halt.toml", 'policy = "fail_fast"\non_failure = "halt"\n')

    text = shop.saga("explain", "shop:order")
    halting = shop.saga("explain", "shop:order", "--policy", "halt.toml", "--json")

    assert text.code == Exit.COMPLETED
    assert "If ship fails: COMPENSATED\n  undone: charge_card; then reserve_seat\n" in text.out
    assert json.loads(halting.out)["stages"]["ship"]["status"] == "halted"


# -- the command itself ------------------------------------------------------------------------------------------


def test_it_runs_as_a_module(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["saga", "--help"])

    with pytest.raises(SystemExit) as exited:
        runpy.run_module("saga", run_name="__main__", alter_sys=True)

    assert exited.value.code == 0
    assert shop.capture.readouterr().out.startswith("Usage: saga ")
    runpy.run_module("saga", run_name="somebody")


def test_the_version_is_that_of_the_package_if_it_is_installed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("saga.cli.commands.version", lambda name: f"1.2.3 of {name}")
    installed = shop.saga("--version")
    monkeypatch.setattr("saga.cli.commands.version", missing)
    loose = shop.saga("--version")

    assert installed == (0, "saga 1.2.3 of stageflow-saga\n", "")
    assert loose == (0, "saga, from a folder that is not installed\n", "")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("saga show t", ["trip-77"]),
        ("saga settle trip-77 ", ["reserve_seat", "charge_card", "ship"]),
        ("saga settle none ", []),
        ("saga show --ledger sqlite:///none/none.db ", []),
    ],
)
def test_the_shell_completes_ids_and_stages(shop: Shop, monkeypatch: pytest.MonkeyPatch, typed: str, words: list[str]) -> None:
    shop.saga("run", "shop:order", "--id", "trip-77")
    monkeypatch.setenv("_SAGA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))

    done = shop.saga()

    assert (done.code, done.out.split(), done.err) == (0, words, "")


@pytest.mark.parametrize("name", [r"\$(touch run)", "trip; touch run", "trip\ntouch", "trip 78", "'", "~root", "=ls"])
def test_the_shell_is_offered_no_name_that_it_would_read_as_more_than_a_word(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """zsh runs the first one when it is asked to complete, the others any shell when the line is entered."""
    shop.write("shop.py", SHOP + f'hostile = seat.with_stage({name!r}, ship, "work")')
    for saga_id in (name, "trip-77"):
        shop.saga("run", "shop:hostile", "--id", saga_id)
    monkeypatch.setenv("_SAGA_COMPLETE", "complete_bash")
    offered = []

    for typed in ("saga show ", "saga settle trip-77 "):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
        offered.append(shop.saga().out)

    assert offered == ["trip-77\n", "reserve_seat\n"]


def test_the_shell_is_offered_a_name_in_any_letters(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell reads them as it does those of English."""
    for saga_id in ("münchen-77", "北京-7"):
        shop.saga("run", "shop:order", "--id", saga_id)
    monkeypatch.setenv("_SAGA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "saga show ")
    monkeypatch.setenv("COMP_CWORD", "2")

    done = shop.saga()

    assert done.out.split() == ["münchen-77", "北京-7"]


def test_to_complete_an_id_makes_no_ledger(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty one nobody would find the saga that they look for."""
    monkeypatch.setenv("_SAGA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "saga show ")
    monkeypatch.setenv("COMP_CWORD", "2")

    done = shop.saga()

    assert done == (0, "\n", "")
    assert not (shop.folder / "sagas.db").exists()


def test_the_list_of_commands_says_all_of_what_each_is_for(shop: Shop) -> None:
    commands = shop.saga("--help").out.partition("Commands:")[2]

    assert "import      Take over sagas" in commands
    assert "..." not in commands


def test_the_shell_is_offered_completion(shop: Shop) -> None:
    helped = shop.saga("--help").out

    assert "--show-completion" in helped
    assert "--install-completion" in helped


def test_the_documented_exit_codes_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")

    documented = {int(code): name for code, name in re.findall(r"^\| (\d+) \| (\w+) \|", page, re.MULTILINE)}

    assert documented == {int(code): code.name.lower() for code in Exit}


def test_every_command_is_documented(shop: Shop) -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    commands = re.findall(r"^  ([a-z]+)  ", shop.saga("--help").out.partition("Commands:")[2], re.MULTILINE)

    assert len(commands) == 13
    for command in commands:
        options = re.findall(r"^  (--[a-z-]+)", shop.saga(command, "--help").out, re.MULTILINE)
        section = re.search(rf"^### `saga {command}.*?(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, command
        for option in set(options) - {"--help", "--traceback", "--ledger", "--json"}:
            assert option in section[0], (command, option)


# -- signals and terminals, with real processes ------------------------------------------------------------------


IMPATIENT = 'policy = "fail_fast"\nin_flight = "cancel"\n'
INTERRUPTED = (
    "Interrupted: waiting for charge_card, then undoing what was done.",
    "A second Ctrl-C stops at once and leaves in effect: reserve_seat; in doubt: charge_card.",
    "What goes on from there: saga resume s shop:slow",
)


class Terminal:
    """A real terminal in which `saga` runs."""

    def __init__(
        self, shop: Shop, *arguments: str, columns: int = 100, rows: int = 30, is_its_own: bool = True, **environment: str
    ) -> None:
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        settings = termios.tcgetattr(theirs)
        # Else a Ctrl-C also throws away what nobody has read yet: the very answer to it, where that is quick.
        settings[3] |= termios.NOFLSH
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
        takes_it = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
        command = [sys.executable, "-W", "error", "-m", "saga", *arguments]
        if is_its_own:  # which hears that it is closed
            command = [sys.executable, "-c", takes_it, *command]
        self.process = subprocess.Popen(
            command,
            cwd=shop.folder,
            env=shop.environment(**environment),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""
        shop.terminals.append(self)

    def until(self, text: str) -> str:
        """Wait until it shows this; all that it has shown."""
        return self._until(lambda: text in self.seen, text)

    def until_it_reads(self, *lines: str) -> None:
        """Wait until it shows lines that read so, one below the other; how long it takes to get there, and to draw, is not known."""
        pattern = re.compile(".*\\n.*".join(lines))
        self._until(lambda: pattern.search(plain(self.seen)) is not None, pattern.pattern)

    def _until(self, shows: Callable[[], bool], what: str) -> str:
        while not shows():
            read = self._read()
            assert read, f"it ended without showing {what!r}:\n{self.seen}"
            self.seen += read
        return self.seen

    def to_the_end(self) -> tuple[int, str]:
        """Wait for it to end: its exit code, and all that it has shown."""
        while read := self._read():
            self.seen += read
        return self.process.wait(), self.seen

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        os.close(self._mine)

    def hang_up(self) -> None:
        """Close the window, or lose the line."""
        os.close(self._mine)
        self._mine = os.open(os.devnull, os.O_RDONLY)

    def press(self, keys: str) -> None:
        os.write(self._mine, keys.encode())

    def _read(self) -> str:
        try:
            return os.read(self._mine, 65536).decode(errors="replace")
        except OSError:  # Linux says so that nobody is at the other end any more
            return ""


def plain(shown: str) -> str:
    """What is shown, without colours and the movements of the cursor; each picture begins a line."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n").replace("\r", "\n")


def test_ctrl_c_in_a_terminal_undoes_and_says_so(shop: Shop) -> None:
    shop.write("impatient.toml", IMPATIENT)
    terminal = Terminal(shop, "run", "shop:slow", "--id", "s", "--policy", "impatient.toml", columns=200)

    terminal.until("the bank is asked")
    terminal.press("\x03")
    code, shown = terminal.to_the_end()

    assert code == Exit.INTERRUPTED
    for line in INTERRUPTED:
        assert line in plain(shown)
    assert "Saga s (slow): COMPENSATED after" in plain(shown)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is back"


def test_a_second_ctrl_c_leaves_what_the_first_one_said_and_resume_goes_on(shop: Shop) -> None:
    shop.breaks_the_bank()
    terminal = Terminal(shop, "run", "shop:refund", "--id", "s", columns=200)

    terminal.until("the bank is asked for it back")
    terminal.press("\x03")
    first = plain(terminal.until("What goes on from there"))
    terminal.press("\x03")
    code, shown = terminal.to_the_end()
    shop.mends_the_bank()
    resumed = shop.saga("resume", "s", "shop:refund")

    assert "Interrupted: it is being undone already, and that goes on." in first
    assert "A second Ctrl-C stops at once and leaves in effect: reserve_seat; in doubt: charge_card." in first
    assert code == Exit.INTERRUPTED
    assert "Stopped at once and left in effect: reserve_seat; in doubt: charge_card." in plain(shown)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is back"
    assert resumed.code == Exit.COMPENSATED


def test_a_terminal_shows_the_stages_as_they_stand_and_then_the_report(shop: Shop) -> None:
    shop.write("impatient.toml", IMPATIENT)
    terminal = Terminal(shop, "run", "shop:slow", "--id", "s", "--policy", "impatient.toml")

    terminal.until_it_reads(
        r"slow  s  running  \d+\.\d s",
        r"reserve_seat +\+ kept +attempt 1 +[\d.]+ m?s",
        r"charge_card +> running +attempt 1 +\d+\.\d s",
        r" 1 of 2 done",
    )
    terminal.press("\x03")
    code, shown = terminal.to_the_end()

    assert code == Exit.INTERRUPTED
    assert "Saga s (slow): COMPENSATED after" in plain(shown)


def test_a_narrow_terminal_without_colours_is_served(shop: Shop) -> None:
    shop.write("impatient.toml", IMPATIENT)
    terminal = Terminal(shop, "run", "shop:slow", "--id", "s", "--policy", "impatient.toml", columns=60, NO_COLOR="1")

    shown = terminal.until("1 of 2 done")
    terminal.press("\x03")
    terminal.to_the_end()

    assert max(map(len, plain(shown).splitlines())) <= 60
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)


def test_a_terminal_that_can_do_nothing_gets_lines(shop: Shop) -> None:
    terminal = Terminal(shop, "run", "shop:order", "--id", "s", TERM="dumb")

    code, shown = terminal.to_the_end()

    assert code == Exit.COMPLETED
    assert "\x1b" not in shown
    assert "s  ship: completed" in shown


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": ""}, {"TTY_COMPATIBLE": "0"}], ids=["as it is", "no colour", "incompatible"])
def test_a_terminal_that_is_closed_undoes(shop: Shop, environment: dict[str, Any]) -> None:
    """It killed the process, and with a ledger in memory nobody knew then what stood."""
    shop.write("impatient.toml", IMPATIENT)
    terminal = Terminal(shop, "run", "shop:slow", "--id", "s", "--policy", "impatient.toml", **environment)

    terminal.until("the bank is asked")
    terminal.hang_up()
    code = terminal.process.wait()

    assert code == Exit.INTERRUPTED
    assert SagaReport.model_validate_json(shop.saga("show", "s", "--json").out).status is SagaStatus.COMPENSATED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_without_a_terminal_undoes_and_says_so(shop: Shop, number: signal.Signals) -> None:
    shop.write("impatient.toml", IMPATIENT)
    command = [sys.executable, "-W", "error", "-m", "saga", "run", "shop:slow", "--id", "s", "--policy", "impatient.toml", "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    with subprocess.Popen(command, cwd=shop.folder, env=shop.environment(), **pipes) as process:
        assert process.stderr is not None
        before: list[str] = []
        while "the bank is asked\n" not in before:
            before.append(process.stderr.readline())
        process.send_signal(number)
        out, err = process.communicate()

    assert process.returncode == Exit.INTERRUPTED
    assert SagaReport.model_validate_json(out).status is SagaStatus.COMPENSATED
    assert tuple(err.splitlines()[:3]) == INTERRUPTED


def test_a_file_that_is_to_be_written_to_as_to_a_terminal_is_not_closed_with_one(shop: Shop) -> None:
    """A log with colours ended where the terminal was closed, and did not say what was undone."""
    shop.write("impatient.toml", IMPATIENT)
    command = [sys.executable, "-W", "error", "-m", "saga", "run", "shop:slow", "--id", "s", "--policy", "impatient.toml"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    with subprocess.Popen(command, cwd=shop.folder, env=shop.environment(FORCE_COLOR="1"), **pipes) as process:
        assert process.stderr is not None
        before = ""
        while "the bank is asked" not in before:
            before = process.stderr.readline()
            assert before
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate()

    assert process.returncode == Exit.INTERRUPTED
    assert "cancelled " in err


def test_a_saga_whose_process_died_is_recovered(shop: Shop) -> None:
    died = shop.really("run", "shop:crash", "--id", "s")
    shop.write("shop.py", SHOP.replace('ending("crash", die)', 'ending("crash", decline)'))
    listed = shop.saga("list").out

    recovered = shop.saga("recover", "shop:crash")

    assert died.code == 9
    assert listed.splitlines()[1].split()[:3] == ["s", "crash", "running"]
    assert (recovered.code, recovered.out) == (Exit.COMPLETED, "s: COMPENSATED\n")
    assert "s  ship: lost its process: its process is gone" in recovered.err
    assert shop.saga("recover", "shop:crash").out == "No saga has lost its process.\n"


def test_recover_exits_with_what_is_left_to_do(shop: Shop) -> None:
    shop.really("run", "shop:crash", "--id", "s")

    unknown = shop.saga("recover", "shop:seat")
    shop.breaks_the_bank()
    shop.write("shop.py", SHOP.replace('ending("crash", die)', 'ending("crash", decline)'))
    sys.modules.pop("shop")
    stuck = shop.saga("recover", "shop:crash")

    assert unknown.code == Exit.FAILED
    assert unknown.out.startswith("s: not recovered, expected a pipeline named 'crash', got those named seat")
    assert stuck.code == Exit.STUCK


def test_a_saga_whose_row_is_damaged_is_told_of_behind_all_others_and_goes_on_by_its_id(shop: Shop) -> None:
    shop.saga("run", "shop:seat", "--id", "done")
    for saga_id in ("s", "gone"):
        shop.begin_elsewhere(saga_id, lease=1e-9)
    with closing(sqlite3.connect("sagas.db")) as ledger, ledger:
        ledger.execute("UPDATE sagas SET status = 'lost' WHERE id = 'gone'")

    listed, in_json = shop.saga("list"), shop.saga("list", "--json")
    watched, left = shop.saga("watch", "gone"), shop.saga("watch", "s")
    unknown = shop.saga("show", "dome")
    recovered = shop.saga("recover", "shop:seat")
    shown, resumed = shop.saga("show", "gone"), shop.saga("resume", "gone", "shop:seat")

    damaged = "the ledger is damaged: where saga gone stands can't be read: 'lost' is not a valid SagaStatus. Nothing was changed. "
    assert [line.split()[0] for line in listed.out.splitlines()] == ["ID", "done", "s"]
    assert [entry["saga_id"] for entry in json.loads(in_json.out)] == ["done", "s"]
    for done in (listed, in_json, watched):
        assert (done.code, done.err.splitlines()[-1].startswith(f"saga: {damaged}")) == (Exit.FAILED, True)
    assert left.code == Exit.LEFT
    assert "Did you mean 'done'?" in unknown.err
    assert [line.partition(".")[0] for line in recovered.out.splitlines()] == [
        "s: COMPLETED",
        f"gone: not recovered, {damaged.partition('.')[0]}",
    ]
    assert recovered.code == Exit.FAILED
    assert "RUNNING" in shown.out
    assert resumed.code == Exit.COMPLETED
    assert shop.saga("recover", "shop:seat").out == "No saga has lost its process.\n"


def test_where_the_ledger_fails_under_a_recovery_the_command_that_goes_on_is_said(shop: Shop) -> None:
    take_away = """
class TakeAway(Reserve):
    retry = Retry(attempts=2)

    async def execute(self, ctx):
        if ctx.attempt == 1:
            os._exit(9)
        Path("mine.db").rename("elsewhere.db")


theft = seat.with_stage("take_away", TakeAway, dependencies=("reserve_seat",))
"""
    shop.write("shop.py", SHOP + take_away)
    shop.really("run", "shop:theft", "--id", "s", "--ledger", "sqlite:///mine.db")

    done = shop.really("recover", "shop:theft", "shop:order", "--ledger", "sqlite:///mine.db")

    assert done.code == Exit.FAILED
    assert done.out.startswith("s: not recovered, saga s stopped, because its ledger failed: ")
    assert done.out.endswith("When the ledger is back, go on: saga recover shop:theft shop:order --ledger sqlite:///mine.db\n")


def test_what_is_printed_aside_goes_to_stderr_where_stdout_was_closed_when_python_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its number may be another file's by now."""
    monkeypatch.setattr(sys, "__stdout__", None)

    with aside():
        sys.stdout.write("from a stage\n")

    assert capsys.readouterr() == ("", "from a stage\n")


def test_a_recovery_is_told_in_json(shop: Shop) -> None:
    shop.really("run", "shop:crash", "--id", "gone")
    shop.write("shop.py", SHOP.replace('ending("crash", die)', 'ending("crash", decline)'))
    shop.begin_elsewhere("held", "crash", lease=3600)
    shop.begin_elsewhere("unknown", "another", lease=1e-9)

    done = shop.saga("recover", "shop:crash", "--json")

    told = json.loads(done.out)
    assert SagaReport.model_validate(told["reports"]["gone"]).status is SagaStatus.COMPENSATED
    assert told["held"]["held"].startswith("saga held is held by owner of held. ")
    assert told["failed"]["unknown"].startswith("expected a pipeline named 'another', got those named crash")
    assert {len(found) for found in told.values()} == {1}
    assert done.code == Exit.FAILED


WAITING = SHOP.replace(
    "ship.has_effect",
    """
async def wait(ctx):
    lorry = os.open("a-lorry", os.O_RDONLY | os.O_NONBLOCK)
    has_come = asyncio.Event()
    asyncio.get_running_loop().add_reader(lorry, has_come.set)
    print("waiting for a lorry", flush=True)
    try:
        await has_come.wait()
    finally:
        asyncio.get_running_loop().remove_reader(lorry)
        os.close(lorry)


ship.has_effect""",
)


def closed_terminal() -> int:
    mine, theirs = pty.openpty()
    os.close(mine)
    return theirs


@contextmanager
def unwritable(number: int) -> Iterator[TextIO]:
    with os.fdopen(number, "w", encoding="utf-8") as file:
        yield file
        let_go(number)  # else it would be tried once more


def test_only_of_an_interrupted_saga_nobody_has_to_read_the_report(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write("shop.py", WAITING.replace('ending("order", ship)', 'ending("order", wait)'))
    deeds = {"waiting for a lorry": interrupt_this_process, "Interrupted": shop.brings_the_lorry}

    with unwritable(closed_terminal()) as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        with once_it_shows(deeds, patched):
            interrupted = shop.saga("run", "shop:order")
    with unwritable(closed_terminal()) as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        ran = shop.saga("run", "shop:seat")

    assert interrupted.code == Exit.INTERRUPTED
    assert ran.code == Exit.FAILED
    assert ran.err.endswith("saga: [Errno 5] Input/output error\n")


def test_of_what_can_not_be_said_only_that_nobody_reads_it_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with unwritable(closed_terminal()) as closed, unwritable(os.open("/dev/full", os.O_WRONLY)) as full:
        monkeypatch.setattr(sys, "stderr", closed)
        Stderr().print("anything")
        print("anything", file=closed, flush=True)
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(OSError, match="No space left"):
            Stderr().print("anything")


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_that_is_closed_is_nothing_to_a_saga_that_does_not_hear_of_it(shop: Shop, term: str) -> None:
    """As one that was begun by setsid: a compensation that printed to it failed of that, and its stage was stuck."""
    waiting = WAITING.replace("await has_come.wait()", "await has_come.wait()\n        return StageOutput.fail('it is full')")
    shop.write("shop.py", waiting.replace('ending("order", ship)', 'ending("order", wait)'))
    terminal = Terminal(shop, "run", "shop:order", "--id", "s", is_its_own=False, TERM=term)
    terminal.until("waiting for a lorry")

    terminal.hang_up()
    shop.brings_the_lorry()
    terminal.process.wait()

    assert SagaReport.model_validate_json(shop.saga("show", "s", "--json").out).status is SagaStatus.COMPENSATED


def test_a_recovery_is_interrupted(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.really("run", "shop:crash", "--id", "s")
    shop.write("shop.py", WAITING.replace('ending("crash", die)', 'ending("crash", wait)'))

    deeds = {"waiting for a lorry": interrupt_this_process, "Interrupted": shop.brings_the_lorry}
    with once_it_shows(deeds, monkeypatch) as shown:
        done = shop.saga("recover", "shop:crash")

    assert done.code == Exit.INTERRUPTED
    assert "Interrupted: what these sagas did is undone, as their policies say. A second Ctrl-C stops at once.\n" in shown()
    assert "s  COMPENSATED\n" in shown()


def test_a_recovery_that_is_interrupted_and_gets_stuck_on_the_way_says_so_with_its_code(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.really("run", "shop:crash", "--id", "s")
    shop.breaks_the_bank()
    shop.write("shop.py", WAITING.replace('ending("crash", die)', 'ending("crash", wait)'))

    deeds = {"waiting for a lorry": interrupt_this_process, "Interrupted": shop.brings_the_lorry}
    with once_it_shows(deeds, monkeypatch) as shown:
        done = shop.saga("recover", "shop:crash")

    assert "s  STUCK\n" in shown()
    assert done.code == Exit.STUCK


def test_a_recovery_that_is_interrupted_twice_leaves_its_sagas_to_the_next_one(shop: Shop) -> None:
    shop.really("run", "shop:crash", "--id", "s")
    shop.write("shop.py", WAITING.replace('ending("crash", die)', 'ending("crash", wait)'))
    terminal = Terminal(shop, "recover", "shop:crash", columns=200)

    terminal.until("waiting for a lorry")
    terminal.press("\x03")
    terminal.until("Interrupted")
    terminal.press("\x03")
    code, shown = terminal.to_the_end()
    shop.brings_the_lorry()

    assert code == Exit.INTERRUPTED
    assert "Stopped at once; saga recover goes on from there." in shown
    # That it was stopped may have reached the ledger before the process ended, or not.
    assert shop.saga("recover", "shop:crash").out in {"s: COMPLETED\n", "s: COMPENSATED\n"}


RUDE = """
import os, signal
from shop import Reserve, Pipeline

class Rude(Reserve):
    is_done = False

    @property
    def retry(self):
        if not self.is_done:
            self.is_done = True
            os.kill(os.getpid(), signal.SIGINT)

pipeline = Pipeline(name="rude").with_stage("rude", Rude())
"""


def test_an_interruption_before_the_saga_has_begun_leaves_no_trace(shop: Shop) -> None:
    shop.write("rude.py", RUDE)

    done = shop.saga("run", "rude:pipeline", "--id", "s")

    assert (done.code, done.out) == (Exit.INTERRUPTED, "")
    assert done.err.startswith("Interrupted: nothing has been done yet.\n")
    assert shop.saga("show", "s").code == Exit.MISUSE
    sys.modules.pop("rude", None)


@pytest.mark.parametrize(
    ("ledger", "option"),
    [
        ("sqlite:///sagas.db", ""),
        ("sqlite:///other.db", " --ledger sqlite:///other.db"),
        ("sqlite:///ann:secret@host.db", " --ledger URL"),
        ("sqlite:///a password=secret", " --ledger URL"),
    ],
)
def test_the_command_that_goes_on_names_the_ledger_where_it_has_to_and_no_password(shop: Shop, ledger: str, option: str) -> None:
    shop.write("rude.py", RUDE)

    done = shop.saga("run", "rude:pipeline", "--id", "a trip", "--ledger", ledger)

    assert done.err.endswith(f"What goes on from there: saga resume 'a trip' rude:pipeline{option}\n")
    sys.modules.pop("rude", None)


def interrupt_this_process() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def once_it_shows(deeds: Mapping[str, Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Do each of these as soon as stderr, which counts as a terminal, has shown its text; gives what it has shown in the end."""
    read, write = os.pipe()
    shown: list[str] = []
    pending = dict(deeds)

    def look_on() -> None:
        with os.fdopen(read) as lines:
            while found := lines.read(1):
                shown.append(found)
                for text in list(pending):
                    if text in "".join(shown[-len(text) :]):
                        pending.pop(text)()

    looker = threading.Thread(target=look_on)
    looker.start()
    with os.fdopen(write, "w", buffering=1) as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        patched.setenv("FORCE_COLOR", "1")
        patched.setenv("TERM", "xterm")
        yield lambda: plain("".join(shown))
    looker.join()


def test_watch_looks_on_until_the_saga_has_come_to_rest(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write("shop.py", WAITING.replace('ending("order", ship)', 'ending("order", wait)'))
    # Its picture would fill the terminal, which nobody reads meanwhile, and hold it up.
    running = Terminal(shop, "run", "shop:order", "--id", "s", TERM="dumb")
    running.until("waiting for a lorry")

    with once_it_shows({"2 of 3 done": shop.brings_the_lorry}, monkeypatch) as shown:
        done = shop.saga("watch", "s")

    assert re.search(r"ship +> running", shown())
    assert done.code == Exit.COMPLETED
    assert done.out.startswith("Saga s (order): COMPLETED")
    assert running.to_the_end()[0] == Exit.COMPLETED


def test_watch_looks_on_when_somebody_goes_on_with_a_saga_that_had_come_to_rest(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may happen between any two looks; here it does before the first one."""
    shop.really("run", "shop:order", "--id", "s")
    original, looks = SagaCoordinator.report, count()

    async def report(coordinator: SagaCoordinator, saga_id: str) -> SagaReport:
        ledger, look = coordinator.ledger, next(looks)
        if look == 0:
            token = await ledger.acquire(saga_id, "somebody")
            resumed = SagaResumed(forward=True, by="somebody")
            await ledger.append(saga_id, [resumed], expected_version=len(await ledger.read(saga_id)), token=token)
        if look == 2:
            token = await ledger.acquire(saga_id, "somebody")
            ended = SagaEnded(status=SagaStatus.COMPLETED)
            await ledger.append(saga_id, [ended], expected_version=len(await ledger.read(saga_id)), token=token, release=True)
        return await original(coordinator, saga_id)

    monkeypatch.setattr(SagaCoordinator, "report", report)

    done = shop.saga("watch", "s")

    assert next(looks) == 3
    assert done.code == Exit.COMPLETED
    assert done.out.startswith("Saga s (order): COMPLETED")


def test_watch_tells_of_a_family_in_the_order_in_which_it_happened(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write("shop.py", SHOP.replace("nested(trip)", "nested(order)"))
    shop.really("run", "shop:family", "--id", "s")
    original, looks = SagaCoordinator.report, count()

    async def report(coordinator: SagaCoordinator, saga_id: str) -> SagaReport:
        if next(looks) == 0:
            shop.really("compensate", "s", "shop:family")
        return await original(coordinator, saga_id)

    monkeypatch.setattr(SagaCoordinator, "report", report)

    done = shop.saga("watch", "s")

    told = done.err.splitlines()
    ends = ["s/book  COMPENSATED", "s  book: undone", "s  COMPENSATED"]
    assert [line for line in told if line in ends] == ends
    assert told[-1] == ends[-1]


def test_ctrl_c_ends_the_watching_and_not_the_saga(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.write("shop.py", WAITING.replace('ending("order", ship)', 'ending("order", wait)'))
    # Its picture would fill the terminal, which nobody reads meanwhile, and hold it up.
    running = Terminal(shop, "run", "shop:order", "--id", "s", TERM="dumb")
    running.until("waiting for a lorry")

    with once_it_shows({"2 of 3 done": interrupt_this_process}, monkeypatch) as shown:
        done = shop.saga("watch", "s")
    shop.brings_the_lorry()

    assert done.code == Exit.INTERRUPTED
    assert "Watching s no longer; it goes on by itself.\n" in shown()
    assert running.to_the_end()[0] == Exit.COMPLETED


def test_watch_says_that_nobody_runs_a_saga_any_more_and_what_goes_on_with_it(shop: Shop) -> None:
    shop.really("run", "shop:crash", "--id", "s")

    done = shop.saga("watch", "s")

    assert done.code == Exit.LEFT
    assert done.out.startswith("Saga s (crash): RUNNING")
    assert done.out.endswith("saga list says which, saga recover MODULE:PIPELINE goes on with it.\n")
    assert done.err == (
        "Nobody runs s any more: its process is gone, or has not said for as long as its lease that it is alive.\n"
        "What goes on with it: saga resume s MODULE:PIPELINE; with all whose process is gone: saga recover MODULE:PIPELINE\n"
    )


def test_watch_of_a_saga_that_no_other_one_runs_takes_its_id_for_no_word(shop: Shop) -> None:
    for saga_id in ("s", "None"):
        shop.begin_elsewhere(saga_id, lease=1e-9)

    watched = [shop.saga("watch", saga_id) for saga_id in ("s", "None")]

    assert [done.code for done in watched] == [Exit.LEFT, Exit.LEFT]
    assert [f"saga resume {saga_id}" in done.err for saga_id, done in zip(("s", "None"), watched, strict=True)] == [True, True]


def test_watch_of_a_child_that_nobody_runs_names_the_saga_that_runs_it(shop: Shop) -> None:
    shop.write("shop.py", SHOP.replace("nested(trip)", "nested(crash)"))
    shop.really("run", "shop:family", "--id", "s")

    done = shop.saga("watch", "s/book", "--json")

    assert done.code == Exit.LEFT
    assert SagaReport.model_validate_json(done.out).saga_id == "s/book"
    assert "What goes on with it: saga resume s MODULE:PIPELINE; " in done.err
