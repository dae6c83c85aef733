"""Paged attention on a CPU: one algorithm for prefill and decode, exact to the bit in both.

The unit of work is a block of up to 64 rows of one request with one KV head (or with all KV heads, where blocks are
small; or with some of its query heads, where units are few). A unit walks KV tiles of 64 keys from position 0. Each
tile is widened once to float32, K transposed, and multiplied with every query of the unit, under an online softmax
(kv_tile.py). A decode is a block of one row. Absolute positions alone fix what a row computes: tiles begin at multiples
of 64, products add in a fixed order (simd.py), and a tile past the row's position leaves no trace. So the bits of a row
depend neither on batch mates nor on chunks, page size and threads, whatever the formats of q and pages are.
Where a CPU has tile registers and both formats are bfloat16, tile_attention.py takes over.

Measured for SmolLM2-135M (9 heads, 3 KV heads, 64 dims), bfloat16 pages, 2 cores of an AMD Zen 3 (AVX2): a step of 30
layers takes 10.5 ms for 16 x 320 tokens (9.3 in pages of 2 MiB; reading alone takes 7) and 0.65 for 1 x 256; a prefill
of 2,048 takes 33 ms a layer, where the limit of the instructions is 25. What lost: torch's flash attention in float32,
43 ms; bmm, softmax, bmm over blocks of 64, 128, 256 queries, 58, 76, 81 ms; for a decode, gather and
scaled_dot_product_attention, 0.13 ms a layer against 0.027.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu import tile_attention
from nanokv.kernels.cpu.attention_units import (
    block_of,
    cut_units,
    load_queries,
    positions_of,
    set_limits,
    store_results,
    table_of,
    unit_of,
)
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, sizes, view
from nanokv.kernels.cpu.kv_tile import DIM_TILE, F32, I64, KV_TILE, LANES, locate, online_softmax, pv, qk
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.row_blocks import row_blocks_of
from nanokv.kernels.planes import KVPlanes


@inner
def _work(counter, q, q_stride, heads, out, pool, numbers, step, cut, scale, q_format, format):
    """One thread of the kernel: takes units until none is left. step: RowBlocks.arguments."""
    block_rows, positions = step[1], positions_of(step)
    (
        k_offset, v_offset, rope_offset, page_bytes, page_size, token_stride, head_stride, rope_stride, kv_heads,
        head_dim, value_dim, rope_dim,
    ) = numbers  # fmt: skip
    _, unit_heads, unit_group, parts = cut
    depth, padded, splits = head_dim + rope_dim, (value_dim + 15) // 16 * 16, kv_heads // unit_heads * parts
    # One piece of memory for all that a thread needs, in cache lines of its own: addresses and limits, then float32.
    of_head = block_rows * unit_group
    most, bounds = of_head * unit_heads, (of_head + 7) // 8 * 8
    floats = KV_TILE * (2 * DIM_TILE + of_head) + most * (depth + padded + LANES + 1)
    scratch = np.zeros(5 * KV_TILE + bounds + floats // 2 + 16, np.int64)
    keys = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    next_keys, rope_keys, next_rope_keys = keys + 8 * KV_TILE, keys + 16 * KV_TILE, keys + 24 * KV_TILE
    head_keys = keys + 32 * KV_TILE
    limits = head_keys + 8 * KV_TILE
    k = limits + 8 * bounds
    v = k + 4 * KV_TILE * DIM_TILE
    scores = v + 4 * KV_TILE * DIM_TILE
    wide_q = scores + 4 * KV_TILE * of_head
    acc = wide_q + 4 * most * depth
    total = acc + 4 * most * padded
    best = total + 4 * most * LANES
    while True:
        index = fetch_add(counter, 1)
        if index >= step[0] * splits:
            break
        start, end, request, last = block_of(step, index // splits)
        unit = unit_of(index % splits, start, end, cut)
        _, first_head, _, _, queries = unit
        table, key_plane, rope_plane = (
            table_of(step, request),
            pool + k_offset + first_head * head_stride,
            pool + rope_offset,
        )
        load_queries(unit, cut, q, q_stride, depth, q_format, wide_q, best, acc, padded, total)
        tile, next_count = np.int64(0), min(last + 1, KV_TILE)
        locate(next_keys, tile, next_count, key_plane, table, page_bytes, page_size, token_stride)
        if rope_dim > 0:
            locate(next_rope_keys, tile, next_count, rope_plane, table, page_bytes, page_size, rope_stride)
        while next_count > 0:
            keys, next_keys, rope_keys, next_rope_keys, count = next_keys, keys, next_rope_keys, rope_keys, next_count
            next_count = min(last + 1 - tile - KV_TILE, KV_TILE)
            if next_count > 0:
                after = tile + KV_TILE
                locate(next_keys, after, next_count, key_plane, table, page_bytes, page_size, token_stride)
                if rope_dim > 0:
                    locate(next_rope_keys, after, next_count, rope_plane, table, page_bytes, page_size, rope_stride)
            set_limits(unit, positions, tile, count, limits)
            for h in range(unit_heads):
                shift, at = h * head_stride, h * queries
                for j in range(KV_TILE):
                    view(head_keys, KV_TILE, I64)[j] = view(keys, KV_TILE, I64)[j] + shift
                head_q, head_acc = wide_q + 4 * at * depth, acc + 4 * at * padded
                view(scores, KV_TILE * queries, F32)[:] = ZERO
                qk(
                    head_keys, count, next_keys, next_count, shift, head_dim, head_q, depth, queries, limits, k, scores,
                    format,
                )  # fmt: skip
                if rope_dim > 0:
                    rope_q = head_q + 4 * head_dim
                    qk(
                        rope_keys, count, next_rope_keys, next_count, np.int64(0), rope_dim, rope_q, depth, queries,
                        limits, k, scores, format,
                    )  # fmt: skip
                online_softmax(queries, limits, scale, scores, head_acc, padded, total + 4 * at * LANES, best + 4 * at)
                pv(
                    head_keys, count, next_keys, next_count, shift, v_offset - k_offset, value_dim, queries, limits,
                    scores, v, head_acc, padded, format,
                )  # fmt: skip
            tile += KV_TILE
        store_results(unit, cut, acc, padded, total, out, heads, value_dim, q_format)
    scratch[0] = 0  # numba frees an array after its last use, and an address is no use


@compiled
def _attend(
    gomp, threads, q, q_stride, heads, depth, out, pool, geometry, step, scale,
    q_format, format,
):  # fmt: skip
    numbers = sizes(geometry)
    cut = cut_units(threads, step[0], step[1], heads, numbers[8], depth + numbers[10])
    args = (
        q, q_stride, heads, out, pool, numbers, step, cut, np.float32(scale),
        q_format.dtype, format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.paged_attention."""
    step = row_blocks_of(batch)
    rows, heads, depth = q.shape
    q_stride, head_stride, dim_stride = q.stride()
    value_dim = planes.value_dim
    if depth != planes.head_dim + planes.rope_dim or heads % planes.kv_heads or head_stride != depth or dim_stride != 1:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    out = q.new_empty(rows, heads * value_dim)
    if rows == 0:
        return out
    threads = threads_for(step.cost * heads * (depth + value_dim) * 2e-3)
    attend = tile_attention.attend if tile_attention.is_for(q, planes) else _attend
    attend(
        GOMP, threads, q.data_ptr(), q_stride, heads, depth, out.data_ptr(), pool.data_ptr(), planes.geometry,
        step.arguments, scale / math.log(2), FORMAT[q.dtype],
        FORMAT[planes.dtype],
    )  # fmt: skip
    return out
