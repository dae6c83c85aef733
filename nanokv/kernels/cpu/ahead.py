"""The kernels that a model needs, by name and types, so that they can be compiled before a tensor is there."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import torch
from llvmlite import binding
from numba import typeof, types

from nanokv.kernels.cpu import attention, elementwise, linear, replay, store, tile_attention, tile_linear
from nanokv.kernels.cpu.amx import has_tiles
from nanokv.kernels.cpu.intrinsics import FORMAT

# The types of parameters, by their names. Those that end with `format` are given, and all others int64.
_TYPES = {
    "eps": types.float64,
    "scale": types.float64,
    "geometry": types.int64[::1],
    "step": types.UniTuple(types.int64, 7),
}
Kernel = tuple[Any, tuple[types.Type, ...]]
"""A compiled function and the types of its arguments."""


def kernels(dtype: str, is_raw: bool, is_latent: bool) -> list[Kernel]:
    """The kernels that every prompt and every step of a model needs, the last ones that a forward pass calls first.

    Kernels of codes and of other layers than attention are missing; the first call compiles those.

    dtype       of weights, by name
    is_raw      pages hold numbers of that dtype, no codes
    is_latent   attention is MLA, which stores in another way
    """
    weights, float32 = (typeof(FORMAT[getattr(torch, name)]) for name in (dtype, "float32"))
    multiplies = dtype == "bfloat16" and binding.get_host_cpu_features().get("avx512bf16", False)
    x = weights if multiplies else float32
    tiles = multiplies and has_tiles()
    attend = tile_attention._attend if tiles else attention._attend
    found = [_kernel(attend, x, q_format=x, format=weights)] if is_raw else []
    found.append(_kernel(elementwise._silu, x))
    if not is_latent:
        found.append(_kernel(store._rope, x, page_format=weights if is_raw else x))
    if tiles:
        found.append(_kernel(tile_linear._multiply, x))
    elif multiplies:
        found += [_kernel(linear._multiply, typeof(linear.PAIRS)), _kernel(elementwise._cast, x, format=float32)]
    else:
        found += [_kernel(linear._multiply, weights), _kernel(linear._pack, weights)]
    return [*found, _kernel(elementwise._norm, x), _kernel(replay.replay, x)]


def compile_kernels(kernels: list[Kernel]) -> None:
    """Compiles kernels, first those that no other process compiles at that moment. Then all lie in the cache."""
    gc.disable()
    for wait in (False, True):
        for function, signature in kernels:
            function.compile(signature, wait=wait)


def _kernel(function: Any, usual: types.Type, /, **others: types.Type) -> Kernel:
    """A kernel whose formats are `usual`, but for the types in `others`, by the names of parameters."""

    def kind(name: str) -> types.Type:
        return others.get(name) or (usual if name.endswith("format") else _TYPES.get(name, types.int64))

    return function, tuple(kind(name) for name in inspect.signature(function.py_func).parameters)
