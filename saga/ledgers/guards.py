"""Locks on the files of SQLite ledgers that no other code of the process can drop."""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Final

_SHARED_LOCK: Final = (0x40000002, 510)
"""The bytes of a file, the first and how many, that whoever has it open holds a lock on: <https://sqlite.org/fileformat2.html#the_lock_byte_page>."""
_PENDING_LOCK: Final = (0x40000000, 1)
"""Those that whoever opens it needs a lock on first."""
_ALL_LOCKS: Final = (0x40000000, 512)
"""These two, and the one between them."""
_INDEX_LOCK: Final = (128, 1)
"""Those of a log's index that whoever uses it holds a lock on: <https://sqlite.org/walformat.html>."""

if sys.platform == "linux":  # pragma: no branch - a run is on one system
    import fcntl

    def _fcntl(descriptor: int, command: int, kind: int, place: tuple[int, int] = _SHARED_LOCK) -> int:
        flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, *place, 0)
        return int.from_bytes(fcntl.fcntl(descriptor, command, flock)[:2], sys.byteorder)


_GUARDS: Final[dict[tuple[int, int] | None, Guard]] = {}
"""By their files; one for each, because to close a second opening of it would itself drop SQLite's locks."""
_GUARDING: Final = Lock()


class Guard:
    """Keeps other processes from taking themselves for the last one that uses a file, as long as this one is connected to it.

    Where any code of a process opens and closes a file, to copy it, say, POSIX drops the locks that the process has on it, SQLite's among
    them. The next process that closes the ledger would then write its log into it, without any lock, and delete it, while this one writes
    to it. On Linux a lock can be that of one opening of the file instead, and stays; SQLite takes it for that of one process more.

    Attributes:
        connections: How many of this process it is for.
        modified: When the file had been written to last, as far as those that were closed have seen; nanoseconds.
    """

    def __init__(self) -> None:
        self.connections = self.modified = 0
        self._closing = Lock()
        self._descriptor: int | None = None

    @classmethod
    def of(cls, file: tuple[int, int] | None) -> Guard:
        """The one of a file, for one more connection to it."""
        with _GUARDING:
            guard = _GUARDS.get(file) or _GUARDS.setdefault(file, cls())
            guard.connections += 1
        return guard

    def hold(self, path: Path) -> None:
        """Have the lock; nobody needs to wait for it, because the connection has SQLite's by then.

        Raises:
            BlockingIOError: It has lost that already, and somebody is just taking the log away.
            OSError: Too many files are open.
        """
        with _GUARDING:
            if sys.platform == "linux" and self._descriptor is None:
                try:
                    self._descriptor = os.open(path, os.O_RDWR)
                except OSError as error:
                    if error.errno in {errno.EMFILE, errno.ENFILE}:
                        raise
                    # Who may only read it loses nothing; and who may write to it later asks anew.
            self._lock(is_held=True)

    @contextmanager
    def shut(self) -> Iterator[bool]:
        """Have no other process open the file meanwhile, if that can be had; whether it can."""
        is_shut = False
        with ExitStack() as stack:
            if sys.platform == "linux" and self._descriptor is not None:  # pragma: no branch - as above
                with suppress(OSError):
                    _fcntl(self._descriptor, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _PENDING_LOCK)
                    stack.callback(_fcntl, self._descriptor, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, _PENDING_LOCK)
                    is_shut = True
            yield is_shut

    @contextmanager
    def given_back(self) -> Iterator[None]:
        """Close a connection; one after the other: of two that close at once, neither is the last one to SQLite."""
        with self._closing:
            yield
            with _GUARDING:
                self.connections -= 1
                if not self.connections:
                    self._lock(is_held=False)
                for file in [file for file, guard in _GUARDS.items() if guard.is_done()]:
                    _GUARDS.pop(file).close()

    def let_go(self) -> None:
        """Let the connection that is just given back take the log away, if it is the last one."""
        with _GUARDING:
            if self.connections == 1:
                self._lock(is_held=False)

    def _lock(self, *, is_held: bool) -> None:
        if sys.platform == "linux" and self._descriptor is not None:
            try:
                _fcntl(self._descriptor, fcntl.F_OFD_SETLK, fcntl.F_RDLCK if is_held else fcntl.F_UNLCK)
            except BlockingIOError:
                raise
            except OSError:
                pass  # the system has no such locks

    def is_done(self) -> bool:
        """Whether nobody needs it, nor has a lock on the file, nor gets one before it is closed.

        A connection of the application's own would lose its one.
        """
        if self.connections:
            return False
        if sys.platform == "linux" and self._descriptor is not None:
            try:
                _fcntl(self._descriptor, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, _ALL_LOCKS)
            except BlockingIOError:
                return False
            except OSError:
                pass  # the system has no such locks
        return True

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def is_in_use(index: Path) -> bool:
    """Whether anybody uses a log by this index; where that can't be told, it is taken to be so."""
    is_used = True
    if sys.platform == "linux":  # pragma: no branch - as above
        with suppress(OSError), index.open("rb") as file:
            is_used = _fcntl(file.fileno(), fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _INDEX_LOCK) != fcntl.F_UNLCK
    return is_used


def _begin_anew() -> None:  # pragma: no cover - coverage keeps no account of a process that was forked off
    """Let go of the openings that a forked process shares with its parent: a lock would stay as long as any of the two has them."""
    while _GUARDS:
        _GUARDS.popitem()[1].close()


if hasattr(os, "register_at_fork"):  # pragma: no branch - where processes don't fork, there is nothing to see to
    os.register_at_fork(after_in_child=_begin_anew)
