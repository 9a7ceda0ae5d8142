"""Who holds a lease: names for owners, and whether the process that an owner lived in is certainly gone."""

from __future__ import annotations

import os
import secrets
import socket
from functools import cache
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_PARTS: Final = 6


def this_process() -> str:
    """A new name for an owner that lives in this process.

    It says host, process id, the process's start, its pid namespace and the machine's boot, and ends in a random part: two
    owners in one process have two names.
    """
    return f"{_process(_PROC, os.getpid())}/{secrets.token_hex(8)}"


@cache
def _process(proc: Path, pid: int) -> str:
    # The system is asked once: that takes four times as long as to make a coordinator.
    return "/".join((socket.gethostname(), str(pid), _stat(proc, pid)[1], *_here(proc)))


if hasattr(os, "register_at_fork"):  # pragma: no branch - where processes don't fork, there is nothing to see to
    # One that descends from this one may get its number when it has ended, and would be taken for it, and for gone.
    os.register_at_fork(after_in_child=_process.cache_clear)


def is_gone(owner: str) -> bool:
    """Whether the process that an owner lived in certainly runs no more.

    It can be certain only of a process of the same boot of the same machine and of the same pid namespace, and only where
    there is a /proc of that namespace; elsewhere an owner is gone when its lease has ended, and not before.
    """
    parts = owner.split("/")
    if len(parts) != _PARTS:
        return False
    host, pid, started, namespace, boot, _ = parts
    if not (started and namespace and boot) or host != socket.gethostname() or (namespace, boot) != _here(_PROC):
        return False
    try:
        # Not by a look into /proc: it may be mounted so that it hides other users' processes.
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):
        return False
    state, starts = _stat(_PROC, int(pid))
    # A zombie runs no more, though nobody has asked for its exit code yet. A pid may have been given to another process since.
    return state == "Z" or starts not in {"", started}


def _stat(proc: Path, pid: int) -> tuple[str, str]:
    """A process's state, and when it started in clock ticks since the boot; empty when they can't be known."""
    try:
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    # The second field is the program's name in parentheses, and may hold spaces and parentheses itself.
    fields = stat.rpartition(") ")[2].split()
    return fields[0], fields[19]


def _here(proc: Path) -> tuple[str, str]:
    """The pid namespace and the boot; empty where there is no /proc, or only that of another pid namespace."""
    try:
        if (proc / "self").readlink().name != str(os.getpid()):
            # A pid of ours is another process's there.
            return "", ""
        namespace = (proc / "self" / "ns" / "pid").readlink().name
        boot = (proc / "sys" / "kernel" / "random" / "boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "", ""
    return namespace, boot
