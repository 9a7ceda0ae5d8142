"""A process whose disk refuses to sync an append, and that is killed then; it says what it was told: `unsynced.py PATH`. For Linux."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import signal
import struct
import sys
import time

from saga import FailFast, LedgerError
from saga.events import SagaStarted
from saga.graph import Graph
from saga.ledgers.sqlite import SQLiteLedger

SYNCS = {"x86_64": (74, 75), "aarch64": (82, 83)}
"""By machine the numbers of fsync and fdatasync."""
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_EIO, _ALLOW = 0x00050005, 0x7FFF0000


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))


def refuse_to_sync() -> None:
    """From here on the kernel answers whatever this thread wants to sync as a disk that fails does (seccomp)."""
    fsync, fdatasync = SYNCS[platform.machine()]
    is_one = ((_JUMP_IF_EQUAL, 1, 0, fsync), (_JUMP_IF_EQUAL, 0, 1, fdatasync))
    steps = ((_LOAD, 0, 0, 0), *is_one, (_RETURN, 0, 0, _EIO), (_RETURN, 0, 0, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    assert libc.prctl(22, 2, ctypes.byref(_Filter(len(steps), ctypes.addressof(program))), 0, 0) == 0, os.strerror(ctypes.get_errno())


async def _main(path: str) -> None:
    is_failing = False

    def clock() -> float:
        if is_failing:
            refuse_to_sync()
        return time.time()

    ledger = SQLiteLedger(path, clock=clock)
    for saga_id in "st":
        started = SagaStarted(saga_id=saga_id, pipeline="p", graph=Graph(nodes=()), policy=FailFast())
        try:
            await ledger.create(saga_id, f"owner of {saga_id}", (started,))
        except LedgerError as error:
            print(error, flush=True)
        await ledger.read("s")
        is_failing = True
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
