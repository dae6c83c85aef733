"""Folders that appear whole or not at all: a folder is filled in a temporary place, synced, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nanokv.core.errors import PullError
from nanokv.hub.home import MANIFEST

LOCK = ".lock"
"""The file in a folder of weights that a pull locks."""


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object, indented, in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def locked(home: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lets one pull at a time work in a folder of weights.

    home      the folder; created if missing
    on_wait   called before the wait, if another process holds the lock
    Raises    PullError where the folder cannot be created or locked

    The lock of the operating system ends with the process. Its file is removed by the process that holds it, which is
    safe: a process that waits takes the lock of a removed file for no lock. Remains of killed pulls are removed on
    entry and on exit: a pip process that outlived its parent may have written in between.
    """
    path = home / LOCK
    lock = FileLock(path)
    try:
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        raise PullError(f"cannot write {home}: {error.strerror or error}") from error
    try:
        _sweep(home)
        yield
    finally:
        _sweep(home)
        with suppress(OSError):  # Windows removes no open file: there the library removes it after the release
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def staged(target: Path, source: dict) -> Iterator[tuple[Path, Path]]:
    """Yields (model, scratch), two empty folders on the disk of `target`; when the block ends, model becomes `target`.

    target   the folder to create or replace; its parent must be locked
    source   of the files; written into the manifest with the size of each file
    Raises   PullError, one line, where the disk fails or is full; no file remains

    A process that dies at any moment leaves `target` unchanged.
    """
    staging = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        model, scratch = staging / "model", staging / "scratch"
        model.mkdir()
        scratch.mkdir()
        yield model, scratch
        sizes = {str(f.relative_to(model)): f.stat().st_size for f in sorted(model.rglob("*")) if f.is_file()}
        write_json(model / MANIFEST, {**source, "files": sizes})
        for path in (*model.rglob("*"), model):
            _sync(path)
        if target.exists():
            target.rename(staging / "old")
        model.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise PullError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _sweep(home: Path) -> None:
    for stale in home.glob(".*.part-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _sync(path: Path) -> None:
    """Writes a file or folder to the disk. Windows has no handle of a folder, and flushes files open for writing."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
