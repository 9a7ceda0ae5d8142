"""A process whose disk fails at the end of a commit, and that is killed then; it says what it was told, and of which saga. For Linux.

    unsynced.py PATH CALL

The call that fails is `sync`, or `index`: the one that lets the index of the log grow.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import platform
import signal
import sqlite3
import struct
import sys
import time

from saga import FailFast, LedgerError
from saga.events import SagaStarted
from saga.graph import Graph
from saga.ledgers.sqlite import SQLiteLedger

CALLS = {"x86_64": (74, 75, 18), "aarch64": (82, 83, 68)}
"""By machine the numbers of fsync, fdatasync and pwrite64."""
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_EIO, _ENOSPC, _ALLOW = 0x00050005, 0x0005001C, 0x7FFF0000


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))


def refuse(call: str) -> None:
    """From here on the kernel answers this thread as a disk does that fails to sync, or has no room (seccomp)."""
    fsync, fdatasync, pwrite = CALLS[platform.machine()]
    steps = {
        "sync": ((_JUMP_IF_EQUAL, 1, 0, fsync), (_JUMP_IF_EQUAL, 0, 1, fdatasync), (_RETURN, 0, 0, _EIO)),
        # SQLite lets its index grow by writing the last byte of each page, and writes no single byte elsewhere.
        "index": ((_JUMP_IF_EQUAL, 0, 3, pwrite), (_LOAD, 0, 0, 32), (_JUMP_IF_EQUAL, 0, 1, 1), (_RETURN, 0, 0, _ENOSPC)),
    }[call]
    steps = ((_LOAD, 0, 0, 0), *steps, (_RETURN, 0, 0, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    assert libc.prctl(22, 2, ctypes.byref(_Filter(len(steps), ctypes.addressof(program))), 0, 0) == 0, os.strerror(ctypes.get_errno())


async def _main(path: str, call: str) -> None:
    is_failing = False

    def clock() -> float:
        if is_failing:
            refuse(call)
        return time.time()

    ledger = SQLiteLedger(path, clock=clock)
    reader: sqlite3.Connection | None = None
    for number in itertools.count():
        started = SagaStarted(saga_id=f"s{number}", pipeline="p", graph=Graph(nodes=()), policy=FailFast(), input={"text": "x" * 300_000})
        try:
            await ledger.create(started.saga_id, "me", (started,))
        except LedgerError as error:
            print(started.saga_id, error, flush=True)
            break
        if reader is None:
            # As long as it looks at what there is now, the log grows, and its index with it.
            reader = sqlite3.connect(path)
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM sagas").fetchall()
        is_failing = True
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
