"""What is kept of values and of owners: where in a value the part is that can't be, and whose process is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter
from stageflow.api import StageArtifact, StageEvent, StageOutput

from saga import owners
from saga.encoding import TAG, encoded, stored
from saga.errors import NotStorable
from saga.events import StageCompleted
from saga.outputs import stored_output
from saga.owners import is_gone, this_process

# -- values ----------------------------------------------------------------------------------------------------------


class Thing:
    def __repr__(self) -> str:
        return "a thing"

    def __hash__(self) -> int:
        return 0


class Booking(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    seats: list[Any]


@dataclass(frozen=True)
class Seat:
    row: int
    by: Any


UNSTORABLE = {
    "effect": Thing(),
    "effect['a'][1]": {"a": [1, Thing()]},
    "effect['a'][0]": {"a": (Thing(),)},
    "the key a thing of effect": {Thing(): 1},
    "an item of effect": {Thing()},
    "an item of effect[0]": [frozenset({Thing()})],
    "effect.seats[1]": Booking(seats=[1, Thing()]),
    "effect['seat'].by": {"seat": Seat(1, Thing())},
}


@pytest.mark.parametrize("where", UNSTORABLE)
def test_the_part_of_a_value_that_has_no_encoding_is_named(where: str) -> None:
    with pytest.raises(NotStorable) as refused:
        stored(UNSTORABLE[where], "effect")

    assert where in str(refused.value)
    assert f"{__name__}.Thing, which has no encoding as JSON" in str(refused.value)


def test_the_type_itself_of_a_dataclass_has_no_encoding() -> None:
    with pytest.raises(NotStorable, match=r"effect\['kind'\]"):
        stored({"kind": Seat}, "effect")


def within_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", [within_itself(), nested(152)], ids=["within itself", "152 levels"])
def test_a_value_that_nests_without_end_or_too_deeply_is_refused(value: Any) -> None:
    with pytest.raises(NotStorable, match=r"effect.*more than 150 levels, or a value within itself"):
        stored(value, "effect")

    assert encoded(value) == {TAG: "opaque", "value": ["list", "nested too deeply, or within itself"]}


def test_a_value_that_nests_just_deeply_enough_is_stored() -> None:
    stored(nested(151), "effect")

    assert encoded(nested(151)) == nested(151)


@pytest.mark.parametrize(
    ("output", "where"),
    [
        (StageOutput.ok(it=Thing()), "data['it']"),
        (StageOutput(status=StageOutput.ok().status, artifacts=[StageArtifact("pdf", {"raw": Thing()})]), "artifacts[0].payload['raw']"),
        (StageOutput(status=StageOutput.ok().status, events=[StageEvent("sent", {"to": Thing()})]), "events[0].data['to']"),
    ],
    ids=["data", "artifacts", "events"],
)
def test_the_part_of_an_output_that_has_no_encoding_is_named(output: StageOutput, where: str) -> None:
    with pytest.raises(NotStorable) as refused:
        stored_output(output)

    assert where in str(refused.value)


def test_an_output_that_is_one_already_is_taken_as_it_is() -> None:
    output = StageOutput.ok(it=Thing())

    event = TypeAdapter(StageCompleted).validate_python({"stage": "a", "output": output})

    assert event.output is output


# -- owners ----------------------------------------------------------------------------------------------------------

LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether another process runs is only known where there is /proc")
HOST, PID, START, NAMESPACE, BOOT = range(5)


def owner_with(**parts: str) -> str:
    """The name of an owner in this process, but for some of its parts."""
    own = this_process().split("/")
    for part, value in parts.items():
        own[{"host": HOST, "pid": PID, "start": START, "namespace": NAMESPACE, "boot": BOOT}[part]] = value
    return "/".join(own)


def test_two_owners_in_one_process_have_two_names_and_neither_is_gone() -> None:
    one, other = this_process(), this_process()

    assert one != other
    assert not is_gone(one)
    assert not is_gone(other)


@LINUX
def test_an_owner_whose_process_has_ended_is_gone_before_and_after_somebody_asks_for_its_exit_code() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        owner = owner_with(pid=str(child.pid), start=owners._stat(owners._PROC, child.pid)[1])
        while_it_runs = is_gone(owner)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        as_a_zombie = is_gone(owner)
    afterwards = is_gone(owner)

    assert [while_it_runs, as_a_zombie, afterwards] == [False, True, True]


@LINUX
def test_an_owner_whose_process_id_was_given_to_another_process_is_gone() -> None:
    assert is_gone(owner_with(start="1"))


GONE = "4194303"  # above the highest process id that Linux gives by default


@LINUX
@pytest.mark.parametrize("part", ["host", "namespace", "boot"])
@pytest.mark.parametrize("value", ["elsewhere", ""])
def test_of_a_process_of_another_machine_boot_or_container_it_is_not_known_that_it_is_gone(part: str, value: str) -> None:
    assert is_gone(owner_with(pid=GONE))
    assert not is_gone(owner_with(pid=GONE, **{part: value}))


@pytest.mark.parametrize("owner", ["", "ann", "a/b/c/d/e/f", "a/b/c/d/e/f/g"])
def test_of_an_owner_of_another_kind_it_is_not_known_that_it_is_gone(owner: str) -> None:
    assert not is_gone(owner)


@LINUX
@pytest.mark.parametrize("pid", ["", "me", "9" * 40])
def test_of_a_process_that_cannot_be_asked_for_it_is_not_known_that_it_is_gone(pid: str) -> None:
    assert not is_gone(owner_with(pid=pid))


def test_where_there_is_no_proc_nobody_is_known_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "_PROC", tmp_path)

    owner = this_process()

    assert owner.split("/")[START:5] == ["", "", ""]
    assert not is_gone(owner)
    assert not is_gone(owner_with(pid=GONE))


@LINUX
def test_a_process_that_proc_hides_is_not_known_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = this_process()
    for name in ("self", "sys"):  # what is left of /proc when it hides processes
        (tmp_path / name).symlink_to(f"/proc/{name}")
    monkeypatch.setattr(owners, "_PROC", tmp_path)

    assert not is_gone(owner)
