"""Row-wise kernels: norms, one program a row or head, and gates, one program a block of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import launch, power_of_two
from nanokv.kernels.cuda.rounding import silu, weighted

MAX_BLOCK = 1024
"""Numbers of a row in one program of a gate, at most."""


@triton.jit
def rms_norm_kernel(
    x, x_row, residual, residual_row, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr
):
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    number: tl.constexpr = out.dtype.element_ty
    dims = tl.arange(0, BLOCK)
    is_valid = dims < WIDTH
    wide = tl.load(x + row * x_row + dims, mask=is_valid, other=0.0).to(tl.float32)
    if ADDS:
        place = residual + row * residual_row + dims
        # The norm is of the sum as it is stored, rounded.
        kept = (wide + tl.load(place, mask=is_valid, other=0.0).to(tl.float32)).to(number)
        tl.store(place, kept, mask=is_valid)
        wide = kept.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / WIDTH + eps)
    normed = weighted(normed, tl.load(weight + dims, mask=is_valid, other=0.0), number)
    tl.store(out + row * WIDTH + dims, normed.to(number), mask=is_valid)


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    (rows, width), out = x.shape, x.new_empty(x.shape)
    kept, block = x if residual is None else residual, power_of_two(width)
    if weight.shape != (width,) or kept.shape != x.shape or kept.dtype != x.dtype or x.stride(1) * kept.stride(1) != 1:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} and residual do not fit x {tuple(x.shape)}")
    launch(
        rms_norm_kernel, (rows,), num_warps=min(8, max(1, block // 512)), x=x, x_row=x.stride(0), residual=kept,
        residual_row=kept.stride(0), weight=weight, out=out, eps=eps, WIDTH=width, BLOCK=block,
        ADDS=residual is not None,
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.rms_norm, for x [rows, width]."""
    return _norm(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.add_rms_norm."""
    return _norm(x, residual, weight, eps)


@triton.jit
def gated_rms_norm_kernel(x, z, z_row, weight, out, eps, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, head)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    number: tl.constexpr = x.dtype.element_ty
    dims = tl.arange(0, BLOCK)
    is_valid, at = dims < DIM, (row * HEADS + head) * DIM + dims
    wide = tl.load(x + at, mask=is_valid, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_row + head * DIM + dims, mask=is_valid, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / DIM + eps)
    normed = weighted(normed, tl.load(weight + dims, mask=is_valid, other=0.0), number).to(number).to(tl.float32)
    tl.store(out + at, (normed * silu(gate)).to(number), mask=is_valid)


def gated_rms_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.gated_rms_norm."""
    x, (rows, width), dim = x.contiguous(), x.shape, weight.shape[0]
    if z.shape != x.shape or z.dtype != x.dtype or width % dim or z.stride(1) != 1:
        raise ValueError(f"gated_rms_norm: z {tuple(z.shape)} with strides {z.stride()} does not fit {tuple(x.shape)}")
    out = torch.empty_like(x)
    launch(
        gated_rms_norm_kernel, (rows, width // dim), num_warps=1, x=x, z=z, z_row=z.stride(0), weight=weight, out=out,
        eps=eps, HEADS=width // dim, DIM=dim, BLOCK=power_of_two(dim),
    )  # fmt: skip
    return out


@triton.jit
def gate_kernel(gate, gate_row, up, up_row, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_SILU: tl.constexpr):
    """Program (row, block): up times silu or sigmoid of the gate."""
    row = tl.program_id(0).to(tl.int64)
    number: tl.constexpr = out.dtype.element_ty
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_valid = dims < WIDTH
    wide = tl.load(gate + row * gate_row + dims, mask=is_valid, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_row + dims, mask=is_valid, other=0.0).to(tl.float32)
    factor = silu(wide) if IS_SILU else 1.0 / (1.0 + tl.exp(-wide))
    tl.store(out + row * WIDTH + dims, (factor * other).to(number), mask=is_valid)


def _gate(gate: torch.Tensor, up: torch.Tensor, is_silu: bool) -> torch.Tensor:
    (rows, width), out = up.shape, up.new_empty(up.shape)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.stride(1) * up.stride(1) != 1:
        raise ValueError(f"gate {gate.dtype} {tuple(gate.shape)} does not fit {up.dtype} {tuple(up.shape)}")
    block = min(power_of_two(width), MAX_BLOCK)
    launch(
        gate_kernel, (rows, -(-width // block)), gate=gate, gate_row=gate.stride(0), up=up, up_row=up.stride(0),
        out=out, WIDTH=width, BLOCK=block, IS_SILU=is_silu,
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As reference.silu_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _gate(gate, up, is_silu=True)


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As reference.sigmoid_mul."""
    return _gate(gate, x, is_silu=False)
