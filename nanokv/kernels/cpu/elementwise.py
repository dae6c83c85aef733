"""Row-wise ops on a CPU: norms, the gated activation, rotation and the write into pages. Each is one pass over memory.

A row is computed by the same instructions wherever it stands in the batch, so its bits depend on that row alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.compiled import compiled
from nanokv.kernels.cpu.exp import LOG2E, ONE, exp2
from nanokv.kernels.cpu.team import TEAM, share, threads_for
from nanokv.kernels.cpu.words import FORMAT, fetch_add, narrow, view, widen
from nanokv.kernels.ops import KVPlanes

F32, INT32 = np.empty(0, np.float32), np.empty(0, np.int32)
TAKE = 8
"""Rows that a thread takes at once."""


@njit(fastmath={"reassoc", "contract"})
def _sum_of_squares(row):
    """Reassociated by the compiler into lanes: some fixed order, the same for every row.

    By index: a loop over the array itself is not vectorised and takes 30 times as long (650 ns for 576 numbers).
    """
    total = np.float32(0.0)
    for d in range(len(row)):
        total += row[d] * row[d]
    return total


@njit(error_model="numpy")
def _norm_work(counter, x, residual, weight, out, rows, width, eps, format, weight_format):
    size, scale = format.itemsize, view(weight, width, weight_format)
    wide = np.empty(width, np.float32)
    while True:
        first = fetch_add(counter, TAKE)
        if first >= rows:
            break
        for row in range(first, min(first + TAKE, rows)):
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
            factor = ONE / np.sqrt(_sum_of_squares(wide) / np.float32(width) + eps)
            for d in range(width):
                target[d] = narrow(widen(narrow(wide[d] * factor, format)) * widen(scale[d]), format)


@compiled
def _norm(team, threads, x, residual, weight, out, rows, width, eps, format, weight_format):
    args = (x, residual, weight, out, rows, width, np.float32(eps), format, weight_format)
    share(team, threads, _norm_work, args)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.rms_norm."""
    return _normed(x.contiguous(), 0, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.add_rms_norm."""
    return _normed(x.contiguous(), residual.data_ptr(), weight, eps)


def _normed(x: torch.Tensor, residual: int, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, width = x.shape
    out = torch.empty_like(x)
    _norm(
        TEAM, threads_for(rows * width / 3e3), x.data_ptr(), residual, weight.data_ptr(), out.data_ptr(), rows, width,
        eps, FORMAT[x.dtype], FORMAT[weight.dtype],
    )  # fmt: skip
    return out


@njit(error_model="numpy")  # Python's check for a zero divisor would keep the loop from vectorising
def _silu_work(counter, gate_up, out, rows, width, format):
    size = format.itemsize
    while True:
        first = fetch_add(counter, TAKE)
        if first >= rows:
            break
        for row in range(first, min(first + TAKE, rows)):
            gate = view(gate_up + 2 * row * width * size, width, format)
            up = view(gate_up + (2 * row + 1) * width * size, width, format)
            target = view(out + row * width * size, width, format)
            for d in range(width):
                g = widen(gate[d])
                e = exp2(-abs(g) * LOG2E)  # never overflows: sigmoid(g) is 1 / (1 + e) or e / (1 + e)
                target[d] = narrow(g * ((ONE if g >= 0 else e) / (ONE + e)) * widen(up[d]), format)


@compiled
def _silu(team, threads, gate_up, out, rows, width, format):
    args = (gate_up, out, rows, width, format)
    share(team, threads, _silu_work, args)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As reference.silu_mul."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    threads = threads_for(rows * width / 1.3e3)
    _silu(TEAM, threads, gate_up.data_ptr(), out.data_ptr(), rows, width, FORMAT[gate_up.dtype])
    return out


@njit
def _rope_work(
    counter, qkv, rows, cos_sin, rotary, pool, geometry, positions, pages, slots, heads, format, page_format
):  # fmt: skip
    k_offset, v_offset, page_bytes, page_size, kv_heads, head_dim = geometry
    half, width = rotary // 2, (heads + 2 * kv_heads) * head_dim
    positions, pages, slots = view(positions, rows, INT32), view(pages, rows, INT32), view(slots, rows, INT32)
    plane = page_size * head_dim * page_format.itemsize
    while True:
        first = fetch_add(counter, TAKE)
        if first >= rows:
            break
        for row in range(first, min(first + TAKE, rows)):
            at = qkv + row * width * format.itemsize
            table = view(cos_sin + 4 * rotary * positions[row], rotary, F32)
            cos, sin = table[:half], table[half:]
            for head in range(heads + kv_heads):
                low = view(at + head * head_dim * format.itemsize, half, format)
                high = view(at + (head * head_dim + half) * format.itemsize, half, format)
                for d in range(half):
                    a, b = widen(low[d]), widen(high[d])
                    low[d] = narrow(a * cos[d] - b * sin[d], format)
                    high[d] = narrow(b * cos[d] + a * sin[d], format)
            page = pool + pages[row] * page_bytes + slots[row] * head_dim * page_format.itemsize
            for head in range(kv_heads):
                k = view(at + (heads + head) * head_dim * format.itemsize, head_dim, format)
                v = view(at + (heads + kv_heads + head) * head_dim * format.itemsize, head_dim, format)
                k_page = view(page + k_offset + head * plane, head_dim, page_format)
                v_page = view(page + v_offset + head * plane, head_dim, page_format)
                for d in range(head_dim):
                    k_page[d] = narrow(widen(k[d]), page_format)
                    v_page[d] = narrow(widen(v[d]), page_format)


@compiled
def _rope(
    team, threads, qkv, rows, cos_sin, rotary, pool, geometry, positions, pages, slots, heads, format, page_format
):  # fmt: skip
    numbers = (geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5])
    args = (
        qkv, rows, cos_sin, rotary, pool, numbers, positions, pages, slots, heads, format,
        page_format,
    )  # fmt: skip
    share(team, threads, _rope_work, args)


def rope_and_store(
    qkv: torch.Tensor, cos_sin: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, num_heads: int
) -> None:
    """As reference.rope_and_store."""
    _rope(
        TEAM, threads_for(qkv.numel() / 1e3), qkv.data_ptr(), qkv.shape[0], cos_sin.data_ptr(), cos_sin.shape[1],
        pool.data_ptr(), planes.geometry, batch.positions.data_ptr(), batch.write_pages.data_ptr(),
        batch.write_slots.data_ptr(), num_heads, FORMAT[qkv.dtype], FORMAT[planes.dtype],
    )  # fmt: skip
