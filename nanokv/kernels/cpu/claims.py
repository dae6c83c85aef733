"""Claims: locks on files, so that two processes do not compile the same function at the same time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")  # of POSIX and of Windows


LONGEST_WAIT_S = 30.0


def _lock(file: int) -> None:
    """Locks a file, at once or not at all. Raises OSError."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)


@contextmanager
def claim(path: Path, wait: bool) -> Iterator[bool]:
    """Holds the lock of a file for a block; a process that ends, however it ends, releases it.

    wait     until another process has released it, LONGEST_WAIT_S at most: it may be stopped
    Yields   whether the lock is held, or cannot be had on this file system; False where another process holds it
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
    end = time.monotonic() + LONGEST_WAIT_S
    while True:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):  # held elsewhere: the first on POSIX, the second on Windows
            if not wait or time.monotonic() > end:
                return False
            time.sleep(0.005)
        except OSError:  # this file system has no locks
            return True
        else:
            return True
