"""Owners are named so that others can tell whether they are certainly gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from saga import owners
from saga.owners import is_gone, this_process

ROOT = Path(__file__).parent.parent
HOST, PID, STARTED, NAMESPACE, BOOT, RANDOM = range(6)


def changed(owner: str, part: int, value: str) -> str:
    parts = owner.split("/")
    parts[part] = value
    return "/".join(parts)


def of_a_process_that_ended() -> str:
    code = "from saga.owners import this_process; print(this_process())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_two_owners_in_one_process_have_two_names() -> None:
    mine, yours = this_process(), this_process()

    assert mine != yours
    assert mine.split("/")[:RANDOM] == yours.split("/")[:RANDOM]
    assert mine.split("/")[:2] == [socket.gethostname(), str(os.getpid())]


DESCENDS = """
import os, sys
from pathlib import Path
from saga import owners

owners._PROC = Path(sys.argv[1])
pid = os.getpid()
stat = owners._PROC / str(pid) / "stat"
stat.parent.mkdir()
stat.write_text("1 (init) S " + "0 " * 18 + "25 0")
print(owners.this_process(), flush=True)
child = os.fork()
if not child:
    stat.write_text("1 (init) S " + "0 " * 18 + "77 0")
    os.getpid = lambda: pid
    print(owners.this_process(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there processes don't fork")
def test_a_process_that_has_got_the_number_of_one_that_it_descends_from_is_named_by_its_own_start(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", DESCENDS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    before, after = [owner.split("/") for owner in said.split()]
    assert before[PID] == after[PID]
    assert (before[STARTED], after[STARTED]) == ("25", "77")


def test_an_owner_in_a_process_that_runs_is_not_gone() -> None:
    assert not is_gone(this_process())


def test_an_owner_in_a_process_that_ended_is_gone() -> None:
    assert is_gone(of_a_process_that_ended())


def test_an_owner_in_a_process_that_was_killed_is_gone_before_anybody_asked_for_its_exit_code() -> None:
    code = "from saga.owners import this_process; print(this_process(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        owner = process.stdout.readline().strip()
        before = is_gone(owner)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie still
        after = is_gone(owner)

    assert not before
    assert after


def test_an_owner_whose_pid_was_given_to_another_process_is_gone() -> None:
    assert is_gone(changed(this_process(), STARTED, "1"))


ELSEWHERE = {
    "on another host": (HOST, "elsewhere"),
    "before the machine was booted": (BOOT, "0b4e5c6d"),
    "in another container": (NAMESPACE, "pid:[1]"),
    "in a process whose start nobody knows": (STARTED, ""),
    "in a process with a pid that makes no sense": (PID, "one"),
    "in a process with a pid that is too large": (PID, "9" * 30),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_of_an_owner_that_cannot_be_seen_from_here_nothing_is_certain(where: str) -> None:
    assert not is_gone(changed(of_a_process_that_ended(), *ELSEWHERE[where]))


@pytest.mark.parametrize("name", ["", "me", "a/b/c", "/////", "0123456789abcdef0123456789abcdef"])
def test_of_a_name_that_was_made_otherwise_nothing_is_certain(name: str) -> None:
    assert not is_gone(name)


def test_a_process_of_another_user_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError

    owner = of_a_process_that_ended()
    monkeypatch.setattr(os, "kill", forbidden)

    assert not is_gone(owner)


def test_where_there_is_no_proc_nothing_is_certain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = of_a_process_that_ended()
    monkeypatch.setattr(owners, "_PROC", tmp_path)

    mine = this_process()

    assert mine.split("/")[STARTED:RANDOM] == ["", "", ""]
    assert not is_gone(mine)
    assert not is_gone(ended)
    assert not is_gone(changed(mine, PID, ended.split("/")[PID]))


def test_where_proc_is_that_of_another_pid_namespace_nothing_is_certain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after `unshare --pid --fork`, and in a container that has the host's: our pid is another process's there, which comes and goes."""
    namesake = tmp_path / str(os.getpid())
    elsewhere = tmp_path / "4242" / "ns"
    for directory in (namesake, elsewhere, tmp_path / "sys" / "kernel" / "random"):
        directory.mkdir(parents=True)
    (tmp_path / "self").symlink_to("4242")
    (elsewhere / "pid").symlink_to("pid:[4026532177]")
    (tmp_path / "sys" / "kernel" / "random" / "boot_id").write_text("0b4e5c6d")
    (namesake / "stat").write_text(stat_of(started="25"))
    monkeypatch.setattr(owners, "_PROC", tmp_path)
    mine = this_process()

    (namesake / "stat").write_text(stat_of(started="9000"))

    assert not is_gone(mine)


def stat_of(*, started: str) -> str:
    return " ".join(["1", "(init)", "S", *"0" * 18, started, "0"])
