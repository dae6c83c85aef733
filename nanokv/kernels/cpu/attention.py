"""Paged attention on a CPU: one algorithm for prefill and decode, exact to the bit in both.

The unit of work is a block of up to 64 rows of one request with one KV head (or all, where blocks are small; or some
of its query heads, where units are few). It walks the strips of 64 keys from position 0: each is widened once to
float32, K transposed, and multiplied with every query of the block, under an online softmax (kv_tile.py). A decode is a
block of one row. What a row computes is fixed by absolute positions alone: strips begin at multiples of 64, products
add in a fixed order (simd.py), and a strip past the row's position leaves no trace. So the bits of a row depend neither
on batch mates nor on chunks, page size and threads, whatever the formats of q and pages are.

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
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ONE, ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, narrow, size_of, sizes, view
from nanokv.kernels.cpu.kv_tile import F32, HIDDEN, I64, LANES, PART, TILE, find, gather, score, soften, widen_row
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.row_blocks import STRIP, plan_of
from nanokv.kernels.ops import KVPlanes

ROOM = 256 * 1024  # float32 that the queries and results of a unit may take


@inner
def _work(
    counter, q, q_stride, heads, out, pool, numbers, blocks, block_rows, unit_heads, unit_group, positions, tables,
    scale, q_format, format,
):  # fmt: skip
    """What each thread does: take units (a block of rows, `unit_heads` KV heads, `unit_group` queries a row and KV
    head) until none is left."""
    (
        k_offset, v_offset, tail_offset, page_bytes, page_size, token_stride, head_stride, tail_stride, kv_heads,
        head_dim, value_dim, tail_dim,
    ) = numbers  # fmt: skip
    group, depth, padded = heads // kv_heads, head_dim + tail_dim, (value_dim + 15) // 16 * 16
    parts = (group + unit_group - 1) // unit_group
    splits = kv_heads // unit_heads * parts
    # One piece of memory for all that a thread needs, in cache lines of its own: addresses and limits, then float32.
    of_head = block_rows * unit_group
    most, bounds = of_head * unit_heads, (of_head + 7) // 8 * 8
    floats = STRIP * (2 * PART + of_head) + most * (depth + padded + LANES + 1)
    scratch = np.zeros(5 * STRIP + bounds + floats // 2 + 16, np.int64)
    place = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    keys, next_keys, tails, next_tails = place, place + 8 * STRIP, place + 16 * STRIP, place + 24 * STRIP
    here = place + 32 * STRIP
    limits = here + 8 * STRIP
    k = limits + 8 * bounds
    v = k + 4 * STRIP * PART
    scores = v + 4 * STRIP * PART
    wide_q = scores + 4 * STRIP * of_head
    acc = wide_q + 4 * most * depth
    sums = acc + 4 * most * padded
    tops = sums + 4 * most * LANES
    while True:
        unit = fetch_add(counter, 1)
        if unit >= len(blocks) * splits:
            break
        start, end, request, last = blocks[unit // splits]
        first_head, first = unit % splits // parts * unit_heads, unit % parts * unit_group
        members = min(unit_group, group - first)
        queries = (end - start) * members
        table, key_plane, tail_plane = tables[request], pool + k_offset + first_head * head_stride, pool + tail_offset
        for n in range(unit_heads * queries):
            row, head = start + n % queries // members, (first_head + n // queries) * group + first + n % members
            source = q + (row * q_stride + head * depth) * size_of(q_format)
            widen_row(source, wide_q + 4 * n * depth, depth, q_format)
        view(tops, unit_heads * queries, F32)[:] = HIDDEN
        view(acc, most * (padded + LANES), F32)[:] = ZERO  # the sums, too
        strip, coming = np.int64(0), min(last + 1, STRIP)
        find(next_keys, strip, coming, key_plane, table, page_bytes, page_size, token_stride)
        if tail_dim > 0:
            find(next_tails, strip, coming, tail_plane, table, page_bytes, page_size, tail_stride)
        while coming > 0:
            keys, next_keys, tails, next_tails, valid = next_keys, keys, next_tails, tails, coming
            coming = min(last + 1 - strip - STRIP, STRIP)
            if coming > 0:
                find(next_keys, strip + STRIP, coming, key_plane, table, page_bytes, page_size, token_stride)
                if tail_dim > 0:
                    find(next_tails, strip + STRIP, coming, tail_plane, table, page_bytes, page_size, tail_stride)
            for n in range(queries):
                view(limits, queries, I64)[n] = max(min(positions[start + n // members] - strip, STRIP - 1), -1)
            for h in range(unit_heads):
                shift, at = h * head_stride, h * queries
                for j in range(STRIP):
                    view(here, STRIP, I64)[j] = view(keys, STRIP, I64)[j] + shift
                head_q, head_acc = wide_q + 4 * at * depth, acc + 4 * at * padded
                view(scores, STRIP * queries, F32)[:] = ZERO
                score(
                    here, valid, next_keys, coming, shift, head_dim, head_q, depth, queries, limits, k, scores, format
                )
                if tail_dim > 0:
                    tail_q = head_q + 4 * head_dim
                    score(
                        tails, valid, next_tails, coming, np.int64(0), tail_dim, tail_q, depth, queries, limits, k,
                        scores, format,
                    )  # fmt: skip
                soften(queries, limits, scale, scores, head_acc, padded, sums + 4 * at * LANES, tops + 4 * at)
                gather(
                    here, valid, next_keys, coming, shift, v_offset - k_offset, value_dim, queries, limits, scores, v,
                    head_acc, padded, format,
                )  # fmt: skip
            strip += STRIP
        for n in range(unit_heads * queries):
            row, head = start + n % queries // members, (first_head + n // queries) * group + first + n % members
            target = view(out + (row * heads + head) * value_dim * size_of(q_format), value_dim, q_format)
            result, total = view(acc + 4 * n * padded, padded, F32), ZERO
            for lane_sum in view(sums + 4 * n * LANES, LANES, F32):
                total += lane_sum
            factor = ONE / total
            for d in range(value_dim):
                # + 0: a strip that was skipped and one whose weights are all 0 differ in the sign of a zero
                target[d] = narrow(result[d] * factor + ZERO, q_format)
    scratch[0] = 0  # numba frees an array after its last use, and knows nothing of addresses


@compiled
def _attend(
    gomp, threads, q, q_stride, heads, depth, out, pool, geometry, blocks, block_rows, positions, tables, scale,
    q_format, format,
):  # fmt: skip
    numbers = sizes(geometry)
    kv_heads, value_dim = numbers[8], numbers[10]
    # Small blocks take all KV heads at once, which lie side by side in a page, if that leaves every thread enough.
    unit_heads = kv_heads if block_rows <= 4 and len(blocks) >= 4 * threads else 1
    # The query heads of a KV head are shared out where there are fewer units than threads, or too many queries in one.
    group, units = heads // kv_heads, len(blocks) * kv_heads // unit_heads
    parts = max((threads + units - 1) // units, (block_rows * group * (depth + value_dim) + ROOM - 1) // ROOM)
    unit_group = min(max((group + parts - 1) // parts, TILE), group)
    args = (
        q, q_stride, heads, out, pool, numbers, blocks, block_rows, unit_heads, unit_group, positions, tables,
        np.float32(scale), q_format.dtype, format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.paged_attention."""
    plan = plan_of(batch)
    rows, heads, depth = q.shape
    q_stride, head_stride, step = q.stride()
    value_dim = planes.value_dim
    if depth != planes.head_dim + planes.tail_dim or heads % planes.kv_heads or head_stride != depth or step != 1:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    out = q.new_empty(rows, heads * value_dim)
    if rows == 0:
        return out
    threads = threads_for(plan.cost * heads * (depth + value_dim) * 2e-3)
    _attend(
        GOMP, threads, q.data_ptr(), q_stride, heads, depth, out.data_ptr(), pool.data_ptr(), planes.geometry,
        plan.blocks, plan.block_rows, plan.positions, plan.page_tables, scale / math.log(2), FORMAT[q.dtype],
        FORMAT[planes.dtype],
    )  # fmt: skip
    return out
