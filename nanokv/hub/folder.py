"""Folders that appear whole or not at all: a folder is filled in a temporary place, synced, then renamed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanokv.core.errors import PullError
from nanokv.hub.home import MANIFEST


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object, indented, in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def locked(home: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lets one pull at a time work in a folder of weights.

    home      the folder; created if missing
    on_wait   called before the wait, if another process holds the lock
    Raises    PullError where the folder cannot be created or locked

    The kernel's lock on the folder itself ends with the process and leaves no file. Remains of killed pulls are removed
    on entry and on exit: a pip process that outlived its parent may have written in between.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        handle = os.open(home, os.O_RDONLY)
    except OSError as error:
        raise PullError(f"cannot write {home}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        _sweep(home)
        yield
    finally:
        _sweep(home)
        os.close(handle)


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
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
