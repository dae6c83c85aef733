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
    PackedHeadLinear,
    PackedLinear,
    activation_dtype,
    embed,
    head_linear,
    linear,
    pack_head_linear,
    pack_linear,
    row_invariant,
)

__all__ = [
    "HeadNorms",
    "KVPlanes",
    "PackedHeadLinear",
    "PackedLinear",
    "StatePlanes",
    "activation_dtype",
    "add_rms_norm",
    "are_compiled",
    "delta_rule_chunk",
    "delta_rule_step",
    "embed",
    "gated_rms_norm",
    "head_linear",
    "linear",
    "pack_head_linear",
    "pack_linear",
    "paged_attention",
    "read_latents",
    "rms_norm",
    "rope_and_store",
    "row_invariant",
    "short_conv",
    "sigmoid_mul",
    "silu_mul",
    "store_latent",
]


@dataclass(frozen=True)
class KVPlanes:
    """Where one attention layer's keys and values lie in a page.

    K of a token and a KV head is `head_dim` numbers at k, then `tail_dim` at tail, which all KV heads share;
    V of a token and a KV head is `value_dim` numbers at v:

        grouped queries   k and v are planes [kv_heads, page_size, head_dim]; no tail
        MLA, absorbed     one KV head: k and v are the same plane, the latent [page_size, rank]; the tail is the
                          rotated key [page_size, rope]
        MLA, expanded     a page is rows [kv_heads * (nope + value) | rope], one a token, made for one step

    k_offset, v_offset, tail_offset   bytes from the start of a page
    page_bytes                        bytes from one page of the pool to the next
    page_size                         tokens in a page, any number
    token_stride, head_stride         bytes from token to token and from KV head to KV head, for k and v
    tail_stride                       bytes from token to token, for the tail
    dtype                             float32, bfloat16 or float16
    """

    k_offset: int
    v_offset: int
    tail_offset: int
    page_bytes: int
    page_size: int
    token_stride: int
    head_stride: int
    tail_stride: int
    kv_heads: int
    head_dim: int
    value_dim: int
    tail_dim: int
    dtype: torch.dtype

    @cached_property
    def geometry(self) -> np.ndarray:
        """The twelve sizes above as one int64 array, which is how compiled kernels take them."""
        return np.array(
            [
                self.k_offset, self.v_offset, self.tail_offset, self.page_bytes, self.page_size, self.token_stride,
                self.head_stride, self.tail_stride, self.kv_heads, self.head_dim, self.value_dim, self.tail_dim,
            ],
            np.int64,
        )  # fmt: skip


@dataclass(frozen=True)
class HeadNorms:
    """The norms of queries and keys (Qwen3): weights [head_dim] of one dtype, which all heads share, and eps."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def _twins(tensor: torch.Tensor) -> ModuleType:
    return _cpu_twins() if tensor.is_cpu else reference


def are_compiled() -> bool:
    """Whether machine code of the CPU twins lies on disk already; if not, the first calls take seconds."""
    _cpu_twins()
    from nanokv.kernels.cpu import compiled

    return compiled.any_on_disk()


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


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate): [rows, width] -> the same. See reference.sigmoid_mul."""
    return _twins(x).sigmoid_mul(x, gate)


def rope_and_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    planes: KVPlanes,
    batch: Batch,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """Norm and rotate q and k in place, write k and v to their pages. See reference.rope_and_store."""
    _twins(qkv).rope_and_store(qkv, cos_sin, pool, planes, batch, num_heads, norms)


def store_latent(
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    planes: KVPlanes,
    batch: Batch,
) -> None:
    """Rotate q_rope and the rope key in place, write latent and rope key to their pages. See reference.store_latent."""
    _twins(kv).store_latent(q_rope, kv, norm_weight, eps, cos_sin, pool, planes, batch)


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """Attention over each row's request: [rows, heads, head_dim + tail_dim] -> [rows, heads * value_dim]."""
    return _twins(q).paged_attention(q, pool, planes, batch, scale)


def read_latents(
    pool: torch.Tensor, planes: KVPlanes, pages: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and rotated keys of a request, gathered out of its pages. See reference.read_latents."""
    return reference.read_latents(pool, planes, pages, length)


@dataclass(frozen=True)
class StatePlanes:
    """Where one Gated DeltaNet layer's state lies in each state of the pool: two planes.

    conv_offset    bytes from the start of a state to the last inputs of the convolution: conv_dtype
                   [channels, kernel - 1], oldest first
    state_offset   bytes from the start of a state to the matrices: float32 [value_heads, key_dim, value_dim]
    state_bytes    bytes from one state of the pool to the next
    kernel         width of the convolution, which runs over the channels of q | k | v
    """

    conv_offset: int
    state_offset: int
    state_bytes: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    conv_dtype: torch.dtype

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @cached_property
    def geometry(self) -> np.ndarray:
        """The eight sizes above as one int64 array, which is how compiled kernels take them."""
        sizes = [self.conv_offset, self.state_offset, self.state_bytes, self.key_heads, self.value_heads]
        return np.array([*sizes, self.key_dim, self.value_dim, self.kernel], np.int64)


def short_conv(
    x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor, planes: StatePlanes, batch: Batch
) -> torch.Tensor:
    """Causal convolution and silu of each channel of x [rows, channels], in place. See reference.short_conv."""
    return _twins(x).short_conv(x, weight, states, planes, batch)


def delta_rule_step(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """The gated delta rule for one row of each request. See reference.delta_rule_step."""
    return _twins(qkv).delta_rule_step(qkv, gates, a_log, dt_bias, states, planes, batch)


def delta_rule_chunk(
    qkv: torch.Tensor,
    gates: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    planes: StatePlanes,
    batch: Batch,
) -> torch.Tensor:
    """The gated delta rule for any number of rows of each request. See reference.delta_rule_chunk."""
    return _twins(qkv).delta_rule_chunk(qkv, gates, a_log, dt_bias, states, planes, batch)


def gated_rms_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each head times silu(z): [rows, heads * dim] -> the same. See reference.gated_rms_norm."""
    return _twins(x).gated_rms_norm(x, z, weight, eps)
