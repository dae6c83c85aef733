"""Compiled functions that Python calls: kept on disk, and compiled anew when any file of this folder changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from numba import njit


def _fingerprint() -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _fingerprint()


def compiled(function: Callable) -> Callable:
    """numba.njit that releases the GIL and keeps its machine code on disk.

    numba asks only whether the file of `function` itself has changed, and would run old code after an edit of a
    function that it calls. So the stamp of the cache becomes the content of all kernels.
    """
    dispatcher = njit(nogil=True, cache=True)(function)
    dispatcher._cache._cache_file._source_stamp = _STAMP
    return dispatcher
