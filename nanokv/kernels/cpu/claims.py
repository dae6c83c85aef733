"""Claims: locks on files, so that two processes do not compile the same function at the same time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def claim(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file for a block; a process that ends, however it ends, releases it.

    wait     until another process has released it
    Yields   whether the lock is held, or cannot be had on this file system; without `wait`, False where another
             process holds it
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # a folder that is read only
        yield True
        return
    try:
        yield _is_held(file, wait)
    finally:
        os.close(file)


def _is_held(file: int, wait: bool) -> bool:
    while True:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):  # held elsewhere: the first on POSIX, the second on Windows
            if not wait:
                return False
            time.sleep(0.005)
        except OSError:  # this file system has no locks
            return True
        else:
            return True
