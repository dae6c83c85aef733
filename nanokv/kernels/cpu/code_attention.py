"""Attention on codes on a CPU: as attention.py, over tiles of codes (code_tile.py).

Codes are decoded to float32 once a KV head and tile, for all queries of a unit. Sums add in the order of attention.py,
so here, too, the bits of a row depend on that row alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.attention_units import arrays_of, cut_units, load_queries, set_limits, store_results, unit_of
from nanokv.kernels.cpu.code_tile import locate_codes, locate_tokens, prefetch_codes, pv_codes, qk_codes
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, view
from nanokv.kernels.cpu.kv_tile import DIM_TILE, F32, KV_TILE, LANES, online_softmax
from nanokv.kernels.cpu.lookup import split_table
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.row_blocks import row_blocks_of
from nanokv.kernels.planes import LOOKUP, CodePlanes


@inner
def _with_split_table(plane, room):
    """A plane whose table has the form that lookup.py reads."""
    if plane[5] != LOOKUP:
        return plane
    split_table(plane[6], 1 << plane[3], room)
    return (*plane[:6], room)


@inner
def _work(counter, q, q_stride, heads, out, pool, sizes, k_plane, v_plane, step, cut, scale, q_format):
    """One thread of the kernel, as in attention.py: takes units until none is left."""
    blocks, block_rows, positions, tables = arrays_of(step)
    page_bytes, page_size, kv_heads = sizes
    _, unit_heads, unit_group, parts = cut
    depth, value_dim, splits = k_plane[4], v_plane[4], kv_heads // unit_heads * parts
    widest, of_head = max(depth, value_dim), block_rows * unit_group
    most, bounds = of_head * unit_heads, (of_head + 7) // 8 * 8
    # One piece of memory for all that a thread needs, in cache lines of its own: addresses and limits, tables, codes,
    # then float32.
    floats = KV_TILE * (2 * DIM_TILE + 2 + of_head) + most * (depth + value_dim + LANES + 1)
    scratch = np.zeros(6 * KV_TILE + bounds + 16 + 2 * KV_TILE * widest // 8 + floats // 2 + 16, np.int64)
    pages = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    next_pages, slots, next_slots = pages + 8 * KV_TILE, pages + 16 * KV_TILE, pages + 24 * KV_TILE
    rows, high_rows, limits = pages + 32 * KV_TILE, pages + 40 * KV_TILE, pages + 48 * KV_TILE
    tables_room = limits + 8 * bounds
    transposed = tables_room + 128
    unpacked = transposed + KV_TILE * widest
    k = unpacked + KV_TILE * widest
    v = k + 4 * KV_TILE * DIM_TILE
    k_scales, v_scales = v + 4 * KV_TILE * DIM_TILE, v + 4 * KV_TILE * (DIM_TILE + 1)
    scores = v_scales + 4 * KV_TILE
    wide_q = scores + 4 * KV_TILE * of_head
    acc = wide_q + 4 * most * depth
    total = acc + 4 * most * value_dim
    best = total + 4 * most * LANES
    k_plane, v_plane = _with_split_table(k_plane, tables_room), _with_split_table(v_plane, tables_room + 64)
    while True:
        index = fetch_add(counter, 1)
        if index >= len(blocks) * splits:
            break
        start, end, request, last = blocks[index // splits]
        unit = unit_of(index % splits, start, end, cut)
        _, first_head, _, _, queries = unit
        table = tables[request]
        load_queries(unit, cut, q, q_stride, depth, q_format, wide_q, best, acc, value_dim, total)
        tile, next_count = np.int64(0), min(last + 1, KV_TILE)
        locate_tokens(next_pages, next_slots, tile, next_count, pool, table, page_bytes, page_size)
        while next_count > 0:
            pages, next_pages, slots, next_slots = next_pages, pages, next_slots, slots
            next_count = min(last + 1 - tile - KV_TILE, KV_TILE)
            if next_count > 0:
                locate_tokens(next_pages, next_slots, tile + KV_TILE, next_count, pool, table, page_bytes, page_size)
            set_limits(unit, positions, tile, limits)
            for h in range(unit_heads):
                at, head = h * queries, first_head + h
                head_q, head_acc = wide_q + 4 * at * depth, acc + 4 * at * value_dim
                view(scores, KV_TILE * queries, F32)[:] = ZERO
                prefetch_codes(next_pages, next_slots, next_count, head, page_size, k_plane)
                width, bits = locate_codes(pages, slots, head, page_size, k_plane, rows, high_rows, k_scales, unpacked)
                qk_codes(rows, width, bits, k_plane, k_scales, head_q, queries, limits, transposed, k, scores)
                online_softmax(
                    queries, limits, scale, scores, head_acc, value_dim, total + 4 * at * LANES, best + 4 * at
                )
                prefetch_codes(next_pages, next_slots, next_count, head, page_size, v_plane)
                width, bits = locate_codes(pages, slots, head, page_size, v_plane, rows, high_rows, v_scales, unpacked)
                pv_codes(rows, width, bits, v_plane, v_scales, queries, limits, scores, v, head_acc)
            tile += KV_TILE
        store_results(unit, cut, acc, value_dim, total, out, heads, value_dim, q_format)
    scratch[0] = 0  # numba frees an array after its last use, and an address is no use


@compiled
def _attend(
    gomp, threads, q, q_stride, heads, out, pool, geometry, tables, step, scale,
    q_format,
):  # fmt: skip
    k_form, v_form, k_table, v_table = tables
    sizes = (geometry[0], geometry[1], geometry[2])
    k_plane = (geometry[3], geometry[4], geometry[5], geometry[6], geometry[7], k_form, k_table)
    v_plane = (geometry[8], geometry[9], geometry[10], geometry[11], geometry[12], v_form, v_table)
    cut = cut_units(threads, step[0], step[1], heads, geometry[2], geometry[7] + geometry[12])
    args = (
        q, q_stride, heads, out, pool, sizes, k_plane, v_plane, step, cut,
        np.float32(scale), q_format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def code_attention(q: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.code_attention, for dims that are multiples of 16."""
    step = row_blocks_of(batch)
    rows, heads, depth = q.shape
    q_stride, head_stride, dim_stride = q.stride()
    k, v = planes.k, planes.v
    if depth != k.dim or heads % planes.kv_heads or head_stride != depth or dim_stride != 1:
        raise ValueError(f"code_attention: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    if k.dim % 16 or v.dim % 16:
        raise ValueError(f"code_attention: dims {k.dim} and {v.dim}; allowed are multiples of 16")
    out = q.new_empty(rows, heads * v.dim)
    if rows == 0:
        return out
    _attend(
        GOMP, threads_for(step.cost * heads * (depth + v.dim) * 2e-3), q.data_ptr(), q_stride, heads, out.data_ptr(),
        pool.data_ptr(), planes.geometry, (k.form, v.form, k.table.data_ptr(), v.table.data_ptr()), step.arguments,
        scale / math.log(2), FORMAT[q.dtype],
    )  # fmt: skip
    return out
