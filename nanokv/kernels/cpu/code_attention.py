"""Attention on codes on a CPU: as attention.py, with strips of codes (code_tile.py).

Codes are decoded to float32 once a KV head and strip, for all queries of a block. Sums add in the order of
attention.py, so here, too, a row's bits depend on that row alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.attention import ROOM
from nanokv.kernels.cpu.code_tile import ask_codes, find_codes, gather_codes, locate, score_codes
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ONE, ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, narrow, size_of, view
from nanokv.kernels.cpu.kv_tile import F32, HIDDEN, I64, LANES, PART, TILE, soften, widen_row
from nanokv.kernels.cpu.lookup import split_table
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.row_blocks import STRIP, plan_of
from nanokv.kernels.ops import CodePlanes
from nanokv.kernels.planes import LOOKUP


@inner
def _side(side, room):
    """A side whose table is in the form that lookup.py reads."""
    if side[5] != LOOKUP:
        return side
    split_table(side[6], 1 << side[3], room)
    return (*side[:6], room)


@inner
def _work(
    counter, q, q_stride, heads, out, pool, sizes, k_side, v_side, blocks, block_rows, unit_heads, unit_group,
    positions, tables, scale, q_format,
):  # fmt: skip
    """What each thread does, as in attention.py: take units until none is left."""
    page_bytes, page_size, kv_heads = sizes
    depth, value_dim = k_side[4], v_side[4]
    group, widest = heads // kv_heads, max(depth, value_dim)
    parts = (group + unit_group - 1) // unit_group
    splits = kv_heads // unit_heads * parts
    of_head = block_rows * unit_group
    most, bounds = of_head * unit_heads, (of_head + 7) // 8 * 8
    # One piece of memory for all that a thread needs, in cache lines of its own: addresses and limits, tables, codes,
    # then float32.
    floats = STRIP * (2 * PART + 2 + of_head) + most * (depth + value_dim + LANES + 1)
    scratch = np.zeros(6 * STRIP + bounds + 16 + 2 * STRIP * widest // 8 + floats // 2 + 16, np.int64)
    place = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    pages, next_pages, slots, next_slots = place, place + 8 * STRIP, place + 16 * STRIP, place + 24 * STRIP
    rows, high_rows, limits = place + 32 * STRIP, place + 40 * STRIP, place + 48 * STRIP
    tables_room = limits + 8 * bounds
    turned = tables_room + 128
    spread = turned + STRIP * widest
    k = spread + STRIP * widest
    v = k + 4 * STRIP * PART
    k_scales, v_scales = v + 4 * STRIP * PART, v + 4 * STRIP * (PART + 1)
    scores = v_scales + 4 * STRIP
    wide_q = scores + 4 * STRIP * of_head
    acc = wide_q + 4 * most * depth
    sums = acc + 4 * most * value_dim
    tops = sums + 4 * most * LANES
    k_side, v_side = _side(k_side, tables_room), _side(v_side, tables_room + 64)
    while True:
        unit = fetch_add(counter, 1)
        if unit >= len(blocks) * splits:
            break
        start, end, request, last = blocks[unit // splits]
        first_head, first = unit % splits // parts * unit_heads, unit % parts * unit_group
        members = min(unit_group, group - first)
        queries = (end - start) * members
        table = tables[request]
        for n in range(unit_heads * queries):
            row, head = start + n % queries // members, (first_head + n // queries) * group + first + n % members
            source = q + (row * q_stride + head * depth) * size_of(q_format)
            widen_row(source, wide_q + 4 * n * depth, depth, q_format)
        view(tops, unit_heads * queries, F32)[:] = HIDDEN
        view(acc, most * (value_dim + LANES), F32)[:] = ZERO  # the sums, too
        strip, coming = np.int64(0), min(last + 1, STRIP)
        locate(next_pages, next_slots, strip, coming, pool, table, page_bytes, page_size)
        while coming > 0:
            pages, next_pages, slots, next_slots = next_pages, pages, next_slots, slots
            coming = min(last + 1 - strip - STRIP, STRIP)
            if coming > 0:
                locate(next_pages, next_slots, strip + STRIP, coming, pool, table, page_bytes, page_size)
            for n in range(queries):
                view(limits, queries, I64)[n] = max(min(positions[start + n // members] - strip, STRIP - 1), -1)
            for h in range(unit_heads):
                at, head = h * queries, first_head + h
                head_q, head_acc = wide_q + 4 * at * depth, acc + 4 * at * value_dim
                view(scores, STRIP * queries, F32)[:] = ZERO
                ask_codes(next_pages, next_slots, coming, head, page_size, k_side)
                width, bits = find_codes(pages, slots, head, page_size, k_side, rows, high_rows, k_scales, spread)
                score_codes(rows, width, bits, k_side, k_scales, head_q, queries, limits, turned, k, scores)
                soften(queries, limits, scale, scores, head_acc, value_dim, sums + 4 * at * LANES, tops + 4 * at)
                ask_codes(next_pages, next_slots, coming, head, page_size, v_side)
                width, bits = find_codes(pages, slots, head, page_size, v_side, rows, high_rows, v_scales, spread)
                gather_codes(rows, width, bits, v_side, v_scales, queries, limits, scores, v, head_acc)
            strip += STRIP
        for n in range(unit_heads * queries):
            row, head = start + n % queries // members, (first_head + n // queries) * group + first + n % members
            target = view(out + (row * heads + head) * value_dim * size_of(q_format), value_dim, q_format)
            result, total = view(acc + 4 * n * value_dim, value_dim, F32), ZERO
            for lane_sum in view(sums + 4 * n * LANES, LANES, F32):
                total += lane_sum
            factor = ONE / total
            for d in range(value_dim):
                target[d] = narrow(result[d] * factor + ZERO, q_format)  # + 0: see attention.py
    scratch[0] = 0  # numba frees an array after its last use, and knows nothing of addresses


@compiled
def _attend(
    gomp, threads, q, q_stride, heads, out, pool, geometry, tables, blocks, block_rows, positions, page_tables, scale,
    q_format,
):  # fmt: skip
    k_form, v_form, k_table, v_table = tables
    sizes = (geometry[0], geometry[1], geometry[2])
    k_side = (geometry[3], geometry[4], geometry[5], geometry[6], geometry[7], k_form, k_table)
    v_side = (geometry[8], geometry[9], geometry[10], geometry[11], geometry[12], v_form, v_table)
    kv_heads, dims = geometry[2], geometry[7] + geometry[12]
    # Cut up as in attention.py.
    unit_heads = kv_heads if block_rows <= 4 and len(blocks) >= 4 * threads else 1
    group, units = heads // kv_heads, len(blocks) * kv_heads // unit_heads
    parts = max((threads + units - 1) // units, (block_rows * group * dims + ROOM - 1) // ROOM)
    unit_group = min(max((group + parts - 1) // parts, TILE), group)
    args = (
        q, q_stride, heads, out, pool, sizes, k_side, v_side, blocks, block_rows, unit_heads, unit_group, positions,
        page_tables, np.float32(scale), q_format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def code_attention(q: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.code_attention, for dims that are multiples of 16."""
    plan = plan_of(batch)
    rows, heads, depth = q.shape
    q_stride, head_stride, step = q.stride()
    k, v = planes.k, planes.v
    if depth != k.dim or heads % planes.kv_heads or head_stride != depth or step != 1:
        raise ValueError(f"code_attention: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    if k.dim % 16 or v.dim % 16:
        raise ValueError(f"code_attention: dims {k.dim} and {v.dim}; allowed are multiples of 16")
    out = q.new_empty(rows, heads * v.dim)
    if rows == 0:
        return out
    _attend(
        GOMP, threads_for(plan.cost * heads * (depth + v.dim) * 2e-3), q.data_ptr(), q_stride, heads, out.data_ptr(),
        pool.data_ptr(), planes.geometry, (k.form, v.form, k.table.data_ptr(), v.table.data_ptr()), plan.blocks,
        plan.block_rows, plan.positions, plan.page_tables, scale / math.log(2), FORMAT[q.dtype],
    )  # fmt: skip
    return out
