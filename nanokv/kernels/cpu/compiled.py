"""Compiled functions: those that Python calls, whose machine code is cached on disk and compiled anew when any file of
this folder changes, and the inner functions that become part of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder


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
    # numba's types leave out an option and the private parts below
    dispatcher: Any = njit(nogil=True, no_cfunc_wrapper=True)(function)  # type: ignore[call-overload]
    with contextlib.suppress(RuntimeError):  # numba found no folder: this process compiles for itself
        dispatcher.enable_caching()
        dispatcher._cache._cache_file._source_stamp = _STAMP
    return dispatcher


class _Part(JITCodeLibrary):
    """The code of an inner function: linked into its callers as it was written, and optimised as a part of them.

    numba's own library optimises a function and makes machine code of it before the callers inline it, and so compiles
    a function as many times as calls lie above it.
    """

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """0: no machine code."""
        return 0

    @property
    def codegen(self) -> _Part:
        """Itself, for `set_env`: there is no machine code to be told of an environment."""
        return self

    def set_env(self, name: str, env: Any) -> None:
        pass


class _PartCompiler(CompilerBase):
    """numba's compiler, whose result is a _Part."""

    def define_pipelines(self) -> list[Any]:
        self.state.library = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


def inner(function: Callable | None = None, **options: Any) -> Any:
    """numba.njit for a function that only compiled code calls: without the wrappers for Python, and with IEEE 754
    results where Python raises (a division by zero). options: further ones of njit."""
    plain = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy", **options}
    decorate = njit(pipeline_class=_PartCompiler, **plain)  # type: ignore[call-overload]
    return decorate if function is None else decorate(function)
