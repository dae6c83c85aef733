"""Compiled functions that Python calls: cached on disk, and compiled anew when any file of this folder changes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def _fingerprint() -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _fingerprint()


def compiled(function: Callable) -> Callable:
    """numba.njit that releases the GIL and caches its machine code on disk, where a folder is writable.

    numba checks only whether the file of `function` itself has changed, and would run old code after an edit of a
    function that it calls. So the stamp of the cache is the content of all kernels.
    """
    dispatcher: Any = njit(nogil=True)(function)  # numba's types leave out the private parts below
    with contextlib.suppress(RuntimeError):  # numba found no folder: this process compiles for itself
        dispatcher.enable_caching()
        dispatcher._cache._cache_file._source_stamp = _STAMP
    return dispatcher


def inner(function: Callable) -> Callable:
    """numba.njit for a function that only compiled code calls: without the wrappers for Python, which take long to
    compile, and with IEEE 754 results where Python raises (a division by zero)."""
    # The types that numba ships do not list the first two options.
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")(function)  # type: ignore[call-overload]
