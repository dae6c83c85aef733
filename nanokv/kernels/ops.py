"""The ops of the engine, each under one signature; picks the twin for the device. The only module others import.

A tensor on a CPU goes to the numba twins in `cpu/`, any other to the torch twins in `reference/`. numba is imported
when the first CPU op runs, so that `import nanokv` stays cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels import reference
from nanokv.kernels.linear import (
    PackedLinear,
    activation_dtype,
    embed,
    linear,
    pack_linear,
    row_invariant,
)

__all__ = [
    "KVPlanes",
    "PackedLinear",
    "activation_dtype",
    "add_rms_norm",
    "embed",
    "linear",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rope_and_store",
    "row_invariant",
    "silu_mul",
]


@dataclass(frozen=True)
class KVPlanes:
    """Where one attention layer's keys and values lie in each page: two planes [kv_heads, page_size, head_dim].

    k_offset, v_offset   bytes from the start of a page
    page_bytes           bytes from one page of the pool to the next
    dtype                float32, bfloat16 or float16
    """

    k_offset: int
    v_offset: int
    page_bytes: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @cached_property
    def geometry(self) -> np.ndarray:
        """The six sizes above as one int64 array, which is how compiled kernels take them."""
        return np.array(
            [self.k_offset, self.v_offset, self.page_bytes, self.page_size, self.kv_heads, self.head_dim], np.int64
        )


def _twins(tensor: torch.Tensor) -> ModuleType:
    return _cpu_twins() if tensor.is_cpu else reference


@cache
def _cpu_twins() -> ModuleType:
    from nanokv.kernels import cpu

    return cpu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each row: [rows, width] -> the same. See reference.rms_norm."""
    return _twins(x).rms_norm(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x in place, then its RMS norm. See reference.add_rms_norm."""
    return _twins(x).add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: [rows, 2 * width] -> [rows, width]. See reference.silu_mul."""
    return _twins(gate_up).silu_mul(gate_up)


def rope_and_store(
    qkv: torch.Tensor, cos_sin: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, num_heads: int
) -> None:
    """Rotate q and k in place, write k and v to their pages. See reference.rope_and_store."""
    _twins(qkv).rope_and_store(qkv, cos_sin, pool, planes, batch, num_heads)


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """Attention of each row over its request's pages: [rows, heads, head_dim] -> [rows, heads * head_dim]."""
    return _twins(q).paged_attention(q, pool, planes, batch, scale)
