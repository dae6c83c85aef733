"""Compiled functions: those that Python calls, whose machine code is cached on disk and compiled anew when any file of
this folder changes, and the inner functions that become part of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder

from nanokv.kernels.ahead import stamp
from nanokv.kernels.cpu.claims import claim


def compiled(function: Callable) -> Callable:
    """numba.njit that releases the GIL and caches its machine code on disk, where a folder is writable.

    numba checks only whether the file of `function` itself has changed, and would run old code after an edit of a
    function that it calls. So the stamp of the cache is the content of all kernels.
    """
    # numba's types leave out an option and the private parts below
    dispatcher: Any = njit(nogil=True, no_cfunc_wrapper=True)(function)  # type: ignore[call-overload]
    with contextlib.suppress(RuntimeError):  # numba found no folder: this process compiles for itself
        dispatcher.enable_caching()
        cache = dispatcher._cache
        cache._cache_file._source_stamp = stamp()
        dispatcher.compile = _Once(dispatcher, Path(cache.cache_path) / f"{cache._cache_file._index_name}.lock")
    return dispatcher


class _Once:
    """The method `compile` of a dispatcher: two processes do not compile the same function at the same time."""

    def __init__(self, dispatcher: Any, lock: Path) -> None:
        self._dispatcher, self._compile, self._lock = dispatcher, dispatcher.compile, lock

    def __call__(self, signature: Any, wait: bool = True) -> Any:
        """Compiles for a signature, or loads the result of a process that has. Without `wait`, does nothing where
        another process compiles."""
        with claim(self._lock, wait=False) as is_held:
            if is_held:
                return self._compile(signature)
        if not wait:
            return None
        data = {"dispatcher": self._dispatcher, "args": signature, "return_type": None}
        with event.trigger_event("numba:compile", data=data), claim(self._lock, wait=True):
            return self._compile(signature)


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
