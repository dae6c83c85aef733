"""The ops of the engine, each under one signature; picks the twin for the device. The only module others import.

A tensor on a CPU goes to the numba twins in `cpu/`, one on a CUDA device to the Triton twins in `cuda/`, any other to
the torch twins in `reference/`. numba and triton are imported when the first op on such a tensor runs, so that `import
nanokv` stays cheap and needs no triton.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from nanokv.core.batch import Batch
from nanokv.kernels import reference
from nanokv.kernels.experts import Experts
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
from nanokv.kernels.planes import LARGEST_SCALE, CodePlane, CodePlanes, HeadNorms, KVPlanes, StatePlanes

__all__ = [
    "LARGEST_SCALE",
    "CodePlane",
    "CodePlanes",
    "Experts",
    "HeadNorms",
    "KVPlanes",
    "PackedHeadLinear",
    "PackedLinear",
    "StatePlanes",
    "activation_dtype",
    "add_experts",
    "add_rms_norm",
    "are_compiled",
    "code_attention",
    "decode",
    "decoded_batch",
    "delta_rule_chunk",
    "delta_rule_step",
    "embed",
    "encode",
    "gated_rms_norm",
    "head_linear",
    "join_codes",
    "linear",
    "pack_head_linear",
    "pack_linear",
    "paged_attention",
    "read_latents",
    "rms_norm",
    "rope",
    "rope_and_store",
    "row_invariant",
    "row_sum",
    "short_conv",
    "sigmoid_mul",
    "silu_mul",
    "split_codes",
    "store_codes",
    "store_latent",
]


def _twins(tensor: torch.Tensor) -> ModuleType:
    if tensor.is_cpu:
        return _cpu_twins()
    return _cuda_twins() if tensor.is_cuda else reference


def are_compiled() -> bool:
    """Whether machine code of the CPU twins lies on disk already; if not, the first calls take seconds."""
    _cpu_twins()
    from nanokv.kernels.cpu import compiled

    return compiled.any_on_disk()


@cache
def _cpu_twins() -> ModuleType:
    from nanokv.kernels import cpu

    return cpu


@cache
def _cuda_twins() -> ModuleType:
    from nanokv.kernels import cuda

    return cuda


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
    """Attention over each row's request: [rows, heads, head_dim + rope_dim] -> [rows, heads * value_dim]."""
    return _twins(q).paged_attention(q, pool, planes, batch, scale)


def store_codes(k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> None:
    """Codes and scales of k and v [rows, kv_heads, dim], written to their pages. See reference.store_codes."""
    _twins(k).store_codes(k, v, pool, planes, batch)


def code_attention(q: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch, scale: float) -> torch.Tensor:
    """Attention on codes: q [rows, heads, k.dim] -> [rows, heads * v.dim]. See reference.code_attention."""
    return _twins(q).code_attention(q, pool, planes, batch, scale)


def encode(x: torch.Tensor, plane: CodePlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., dim] and scales float16 [...] of vectors [..., dim]. See reference.encode."""
    return reference.encode(x, plane)


def decode(codes: torch.Tensor, scale: torch.Tensor, plane: CodePlane) -> torch.Tensor:
    """What codes and scales stand for: float32 [..., dim]. See reference.decode."""
    return reference.decode(codes, scale, plane)


def split_codes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Codes of 1, 2, 3, 4 or 8 bits, several in a byte; 3 bits take two arrays. See reference.split_codes."""
    return reference.split_codes(codes, bits)


def join_codes(parts: list[torch.Tensor], bits: int) -> torch.Tensor:
    """The codes that split_codes split. See reference.join_codes."""
    return reference.join_codes(parts, bits)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums over the last axis, each row's bits its own. See reference.row_sum."""
    return reference.row_sum(x)


def decoded_batch(
    k: torch.Tensor, v: torch.Tensor | None, tail: torch.Tensor | None, batch: Batch, tables: torch.Tensor
) -> tuple[torch.Tensor, KVPlanes, Batch]:
    """A pool of decoded pages, and how paged_attention reads it. See reference.decoded_batch."""
    return reference.decoded_batch(k, v, tail, batch, tables)


def rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    batch: Batch,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    norms: HeadNorms | None = None,
) -> None:
    """Norm and rotate q and k in place, as rope_and_store does; nothing is written to pages. See reference.rope."""
    _twins(qkv).rope(qkv, cos_sin, batch, num_heads, kv_heads, head_dim, norms)


def read_latents(
    pool: torch.Tensor, planes: KVPlanes, pages: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and rotated keys of a request, gathered out of its pages. See reference.read_latents."""
    return reference.read_latents(pool, planes, pages, length)


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


def add_experts(
    out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts
) -> None:
    """out += the weighted results of each row's experts: silu(gate) * up, then down (Shazeer et al. 2017). IN PLACE.

    Off the GPU expert after expert takes its rows, so a row's experts are added in the order of their ids. On it, where
    the host must not wait to learn the counts, all pairs of a row and an expert are sorted and multiplied at once.

    out, x    [rows, width]
    weights   float32 [rows, per_token]
    chosen    int64 [rows, per_token], the experts of a row, each at most once
    """
    if x.is_cuda:
        _cuda_twins().add_experts(out, x, weights, chosen, experts)
        return
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    rows, factors = order // chosen.shape[1], weights.flatten()[order].to(x.dtype).unsqueeze(1)
    first = 0
    for expert, count in enumerate(flat.bincount().tolist()):
        if count:
            mine = slice(first, first + count)
            hidden = silu_mul(linear(x[rows[mine]], experts.gate_up[expert]))
            out.index_add_(0, rows[mine], linear(hidden, experts.down[expert]) * factors[mine])
            first += count
