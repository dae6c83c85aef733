"""Row-wise ops on a CPU: norms and gates. Each is one pass over memory.

The same instructions compute a row at any place in the batch, so its bits depend on that row alone.
"""

from __future__ import annotations

import numpy as np
import torch

from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ONE, sigmoid, silu
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, narrow, size_of, view, widen
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for

UNIT_ROWS = 8
"""Rows of a unit of work."""


@inner(fastmath={"reassoc", "contract"})
def sum_of_squares(row):
    """The sum of squares of a row, in lanes that the compiler chooses: one fixed order, the same for every row.

    The loop runs by index: a loop over the array itself is not vectorised and takes 30 times as long (650 ns for 576
    numbers).
    """
    total = np.float32(0.0)
    for d in range(len(row)):
        total += row[d] * row[d]
    return total


@inner
def norm_factor(wide, eps):
    """1 / the root mean square of a row in float32."""
    return ONE / np.sqrt(sum_of_squares(wide) / np.float32(len(wide)) + eps)


@inner
def weighted(normed, weight, format, weight_format):
    """normed * weight in `format`, rounded as reference.rms_norm says; the branch is decided when it is compiled."""
    if size_of(weight_format) > size_of(format):
        return narrow(normed * widen(weight), format)
    return narrow(widen(narrow(normed, format)) * widen(weight), format)


@inner
def _norm_work(counter, x, residual, weight, out, rows, width, eps, format, weight_format):
    size, scale = size_of(format), view(weight, width, weight_format)
    wide = np.empty(width, np.float32)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            at = row * width * size
            source, target = view(x + at, width, format), view(out + at, width, format)
            if residual:
                stream = view(residual + at, width, format)
                for d in range(width):
                    total = narrow(widen(stream[d]) + widen(source[d]), format)
                    stream[d] = total
                    wide[d] = widen(total)
            else:
                for d in range(width):
                    wide[d] = widen(source[d])
            factor = norm_factor(wide, eps)
            for d in range(width):
                target[d] = weighted(wide[d] * factor, scale[d], format, weight_format)


@compiled
def _norm(gomp, threads, x, residual, weight, out, rows, width, eps, format, weight_format):
    args = (x, residual, weight, out, rows, width, np.float32(eps), format.dtype, weight_format.dtype)
    parallel_for(gomp, threads, _norm_work, args)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.rms_norm, for x [rows, width]."""
    return _normed(x.contiguous(), 0, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.add_rms_norm."""
    return _normed(x.contiguous(), residual.data_ptr(), weight, eps)


def _normed(x: torch.Tensor, residual: int, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual: its address, or 0 where there is none."""
    rows, width = x.shape
    out = torch.empty_like(x)
    _norm(
        GOMP, threads_for(rows * width / 3e3), x.data_ptr(), residual, weight.data_ptr(), out.data_ptr(), rows, width,
        eps, FORMAT[x.dtype], FORMAT[weight.dtype],
    )  # fmt: skip
    return out


@inner
def _gated_work(counter, x, z, z_stride, weight, out, rows, heads, dim, eps, format, weight_format):
    size, scale = size_of(format), view(weight, dim, weight_format)
    wide = np.empty(dim, np.float32)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            for head in range(heads):
                at = (row * heads + head) * dim * size
                source, target = view(x + at, dim, format), view(out + at, dim, format)
                gate = view(z + (row * z_stride + head * dim) * size, dim, format)
                for d in range(dim):
                    wide[d] = widen(source[d])
                factor = norm_factor(wide, eps)
                for d in range(dim):
                    normed = weighted(wide[d] * factor, scale[d], format, weight_format)
                    target[d] = narrow(widen(normed) * silu(widen(gate[d])), format)


@compiled
def _gated(gomp, threads, x, z, z_stride, weight, out, rows, heads, dim, eps, format, weight_format):
    args = (x, z, z_stride, weight, out, rows, heads, dim, np.float32(eps), format.dtype, weight_format.dtype)
    parallel_for(gomp, threads, _gated_work, args)


def gated_rms_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.gated_rms_norm."""
    x, dim = x.contiguous(), weight.shape[0]
    (rows, width), (z_stride, step) = x.shape, z.stride()
    if z.shape != x.shape or z.dtype != x.dtype or width % dim or step != 1:
        raise ValueError(f"gated_rms_norm: z {tuple(z.shape)} with strides {z.stride()} does not fit {tuple(x.shape)}")
    out = torch.empty_like(x)
    _gated(
        GOMP, threads_for(rows * width / 1e3), x.data_ptr(), z.data_ptr(), z_stride, weight.data_ptr(), out.data_ptr(),
        rows, width // dim, dim, eps, FORMAT[x.dtype], FORMAT[weight.dtype],
    )  # fmt: skip
    return out


@inner
def _silu_work(counter, gate_up, out, rows, width, format):
    size = size_of(format)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            gate = view(gate_up + 2 * row * width * size, width, format)
            up = view(gate_up + (2 * row + 1) * width * size, width, format)
            target = view(out + row * width * size, width, format)
            for d in range(width):
                target[d] = narrow(silu(widen(gate[d])) * widen(up[d]), format)


@compiled
def _silu(gomp, threads, gate_up, out, rows, width, format):
    args = (gate_up, out, rows, width, format.dtype)
    parallel_for(gomp, threads, _silu_work, args)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As reference.silu_mul."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    threads = threads_for(rows * width / 1.3e3)
    _silu(GOMP, threads, gate_up.data_ptr(), out.data_ptr(), rows, width, FORMAT[gate_up.dtype])
    return out


@inner
def _sigmoid_work(counter, x, gate, gate_stride, out, rows, width, format):
    size = size_of(format)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            source, target = view(x + row * width * size, width, format), view(out + row * width * size, width, format)
            gates = view(gate + row * gate_stride * size, width, format)
            for d in range(width):
                target[d] = narrow(widen(source[d]) * sigmoid(widen(gates[d])), format)


@compiled
def _sigmoid_mul(gomp, threads, x, gate, gate_stride, out, rows, width, format):
    args = (x, gate, gate_stride, out, rows, width, format.dtype)
    parallel_for(gomp, threads, _sigmoid_work, args)


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As reference.sigmoid_mul."""
    (rows, width), x = x.shape, x.contiguous()
    gate_stride, step = gate.stride()
    if gate.shape != x.shape or gate.dtype != x.dtype or step != 1:
        raise ValueError(
            f"sigmoid_mul: gate {gate.dtype} {tuple(gate.shape)} with strides {gate.stride()} does not fit "
            f"x {x.dtype} {tuple(x.shape)}"
        )
    out = torch.empty_like(x)
    threads = threads_for(rows * width / 1.3e3)
    _sigmoid_mul(
        GOMP, threads, x.data_ptr(), gate.data_ptr(), gate_stride, out.data_ptr(), rows, width, FORMAT[x.dtype]
    )
    return out


@inner
def _cast_work(counter, x, stride, out, rows, width, format, out_format):
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            source = view(x + row * stride * size_of(format), width, format)
            target = view(out + row * width * size_of(out_format), width, out_format)
            for d in range(width):
                target[d] = narrow(widen(source[d]), out_format)


@compiled
def _cast(gomp, threads, x, stride, out, rows, width, format, out_format):
    parallel_for(gomp, threads, _cast_work, (x, stride, out, rows, width, format.dtype, out_format.dtype))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As reference.cast."""
    (rows, width), (stride, step) = x.shape, x.stride()
    if x.dtype == dtype:
        return x
    if step != 1:
        raise ValueError(f"cast: the columns of x, strides {x.stride()}, must lie side by side")
    out = x.new_empty(rows, width, dtype=dtype)
    threads = threads_for(rows * width / 3e3)
    _cast(GOMP, threads, x.data_ptr(), stride, out.data_ptr(), rows, width, FORMAT[x.dtype], FORMAT[dtype])
    return out
