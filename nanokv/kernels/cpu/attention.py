"""Paged attention on a CPU: one algorithm for prefill and decode, exact to the bit in both.

The unit of work is a block of up to 64 rows of one request with one KV head (or all, where blocks are small). It walks
the strips of 64 keys from position 0: widens a strip once to float32, K transposed, and multiplies it with every query
of every row of the block, under an online softmax. A decode is a block of one row. What a row computes is fixed by
absolute positions alone: strips begin at multiples of 64, products add in a fixed order (tile.py), and a strip past
the row's position leaves no trace. So the bits of a row depend neither on batch mates nor on chunks, page size and
threads, whatever the formats of q and pages are.

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
from nanokv.kernels.cpu.exp import ONE, ZERO, exp2
from nanokv.kernels.cpu.plan import STRIP, plan_of
from nanokv.kernels.cpu.team import TEAM, share, threads_for
from nanokv.kernels.cpu.tile import largest, multiply, transpose, weigh, widen_16
from nanokv.kernels.cpu.words import FORMAT, fetch_add, narrow, prefetch, view, widen
from nanokv.kernels.ops import KVPlanes

TILE = 4  # queries that are multiplied at once
GROUP = 8  # queries that meet K, then V, of a strip: as many as stay in the first-level cache beside either
LANES = 16  # running sums of a query's weights
F32, I64, HIDDEN = FORMAT[torch.float32], np.empty(0, np.int64), np.float32(-np.inf)


@inner
def _find(keys, strip, count, plane, table, page_bytes, page_size, row_bytes):
    """The addresses of `count` keys of a strip; the last one repeats up to 64."""
    slot, page = page_size, strip // page_size
    address = plane
    for j in range(count):
        if slot == page_size:
            slot, address = 0, plane + table[page] * page_bytes
            page += 1
        keys[j] = address + slot * row_bytes
        slot += 1
    for j in range(count, STRIP):
        keys[j] = keys[count - 1]


@inner
def _ask(keys, first, end, offset, row_bytes):
    """Prefetch the keys (or values, by the offset) first .. end - 1 of a strip."""
    for j in range(first, end):
        for byte in range(0, row_bytes, 64):
            prefetch(keys[j] + offset + byte)


@inner
def _widen_row(source, out, count, format):
    """`count` numbers at an address, as float32 to another address."""
    whole = count // 16 * 16
    for d in range(0, whole, 16):
        widen_16(source + d * format.itemsize, out + 4 * d, format)
    for d in range(whole, count):
        view(out, count, F32)[d] = widen(view(source, count, format)[d])


@inner
def _widen_keys(keys, first, head_dim, out, format):
    """Keys first .. first + 7 of a strip, into their columns of k [head_dim, 64]."""
    whole = head_dim // 16 * 16
    for d in range(0, whole, 32 // format.itemsize):
        transpose(keys.ctypes.data + 8 * first, d, out + 4 * first, STRIP, format)
    for d in range(whole, head_dim):
        for j in range(first, first + 8):
            view(out, head_dim * STRIP, F32)[d * STRIP + j] = widen(view(keys[j], head_dim, format)[d])


@inner
def _soften(scores, limit, scale, top, sums):
    """Scores of one query over a strip become weights, relative to the largest score so far.

    scores    address of 64 float32; those past `limit` are hidden
    top       the largest score before this strip
    sums      address of 16 running sums of weights
    Returns   the largest score now, and what earlier weights have to be multiplied with
    """
    if limit < STRIP - 1:
        s = view(scores, STRIP, F32)
        for j in range(limit + 1, STRIP):
            s[j] = HIDDEN
    new_top = max(top, largest(scores) * scale)
    decay = ONE if new_top == top else exp2(top - new_top)
    weigh(scores, scale, new_top, sums, decay)
    return new_top, decay


@inner
def _attend_strip(queries, limits, head_dim, padded, scale, k, v, scores, q, acc, sums, tops):
    """Add one widened strip to the queries of a head. limits[n]: the last key of the strip that query n sees, or < 0.

    limits int64 [queries], q [queries, head_dim], acc [queries, padded], sums [queries, 16], tops [queries]: addresses
    """
    limits, tops = view(limits, queries, I64), view(tops, queries, F32)
    for start in range(0, queries, GROUP):
        end = min(start + GROUP, queries)
        limit = limits[start]
        for n in range(start, end):
            limit = max(limit, limits[n])
        if limit < 0:
            continue
        limit = min(limit, STRIP - 1)
        view(scores, STRIP * (end - start), F32)[:] = ZERO
        for n in range(start, end, TILE):
            multiply(
                min(TILE, end - n), limit + 1, head_dim, q + 4 * n * head_dim, head_dim, k, STRIP,
                scores + 4 * STRIP * (n - start), STRIP,
            )  # fmt: skip
        for n in range(start, end):
            own = max(min(limits[n], STRIP - 1), -1)
            tops[n], decay = _soften(scores + 4 * STRIP * (n - start), own, scale, tops[n], sums + 4 * LANES * n)
            if decay != ONE:
                row = view(acc + 4 * n * padded, padded, F32)
                for d in range(padded):
                    row[d] *= decay
        for n in range(start, end, TILE):
            multiply(
                min(TILE, end - n), padded, limit + 1, scores + 4 * STRIP * (n - start), STRIP, v, padded,
                acc + 4 * n * padded, padded,
            )  # fmt: skip


@inner
def _work(
    counter, q, q_stride, heads, out, pool, geometry, blocks, block_rows, unit_heads, positions, tables, scale,
    q_format, format,
):  # fmt: skip
    """What each thread does: take units (a block of rows, `unit_heads` KV heads) until none is left."""
    k_offset, v_offset, page_bytes, page_size, kv_heads, head_dim = geometry
    group, splits, padded = heads // kv_heads, kv_heads // unit_heads, (head_dim + 15) // 16 * 16
    row_bytes, head_bytes = head_dim * format.itemsize, page_size * head_dim * format.itemsize
    v_from_k = v_offset - k_offset
    most = block_rows * group * unit_heads
    # One piece of memory for all that a thread needs, in cache lines of its own: addresses and limits, then float32.
    bounds = (block_rows * group + 7) // 8 * 8
    floats = STRIP * (head_dim + padded + GROUP) + most * (head_dim + padded + LANES + 1)
    scratch = np.zeros(3 * STRIP + bounds + floats // 2 + 16, np.int64)
    place = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    keys, ahead = view(place, STRIP, I64), view(place + 8 * STRIP, STRIP, I64)
    here = view(place + 16 * STRIP, STRIP, I64)
    limits = place + 24 * STRIP
    k = limits + 8 * bounds
    v = k + 4 * STRIP * head_dim
    scores = v + 4 * STRIP * padded
    wide_q = scores + 4 * STRIP * GROUP
    acc = wide_q + 4 * most * head_dim
    sums = acc + 4 * most * padded
    tops = view(sums + 4 * most * LANES, most, F32)
    while True:
        unit = fetch_add(counter, 1)
        if unit >= len(blocks) * splits:
            break
        start, end, request, last = blocks[unit // splits]
        first_head, queries = unit % splits * unit_heads, (end - start) * group
        plane, table = pool + k_offset + first_head * head_bytes, tables[request]
        for n in range(unit_heads * queries):
            row, head = start + n % queries // group, (first_head + n // queries) * group + n % group
            source = q + (row * q_stride + head * head_dim) * q_format.itemsize
            _widen_row(source, wide_q + 4 * n * head_dim, head_dim, q_format)
            tops[n] = HIDDEN
        view(acc, most * (padded + LANES), F32)[:] = ZERO  # the sums, too
        strip, coming = np.int64(0), min(last + 1, STRIP)
        _find(ahead, strip, coming, plane, table, page_bytes, page_size, row_bytes)
        while coming > 0:
            keys, ahead, valid = ahead, keys, coming
            coming = min(last + 1 - strip - STRIP, STRIP)
            if coming > 0:
                _find(ahead, strip + STRIP, coming, plane, table, page_bytes, page_size, row_bytes)
            for n in range(queries):
                view(limits, queries, I64)[n] = positions[start + n // group] - strip
            for h in range(unit_heads):
                offset = h * head_bytes
                for j in range(STRIP):
                    here[j] = keys[j] + offset
                for j in range(0, valid, 8):
                    _widen_keys(here, j, head_dim, k, format)
                    for n in range(j, min(j + 8, valid)):
                        _widen_row(here[n] + v_from_k, v + 4 * padded * n, head_dim, format)
                    _ask(ahead, j, min(j + 8, coming), offset, row_bytes)
                    _ask(ahead, j, min(j + 8, coming), offset + v_from_k, row_bytes)
                at = h * queries
                _attend_strip(
                    queries, limits, head_dim, padded, scale, k, v, scores, wide_q + 4 * at * head_dim,
                    acc + 4 * at * padded, sums + 4 * at * LANES, tops.ctypes.data + 4 * at,
                )  # fmt: skip
            strip += STRIP
        for n in range(unit_heads * queries):
            row, head = start + n % queries // group, (first_head + n // queries) * group + n % group
            target = view(out + (row * heads + head) * head_dim * q_format.itemsize, head_dim, q_format)
            result, total = view(acc + 4 * n * padded, padded, F32), ZERO
            for lane_sum in view(sums + 4 * n * LANES, LANES, F32):
                total += lane_sum
            factor = ONE / total
            for d in range(head_dim):
                # + 0: a strip that was skipped and one whose weights are all 0 differ in the sign of a zero
                target[d] = narrow(result[d] * factor + ZERO, q_format)
    scratch[0] = 0  # numba frees an array after its last use, and knows nothing of addresses


@compiled
def _attend(
    team, threads, q, q_stride, heads, out, pool, geometry, blocks, block_rows, unit_heads, positions, tables, scale,
    q_format, format,
):  # fmt: skip
    numbers = (geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5])
    args = (
        q, q_stride, heads, out, pool, numbers, blocks, block_rows, unit_heads, positions, tables, np.float32(scale),
        q_format, format,
    )  # fmt: skip
    share(team, threads, _work, args)


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.paged_attention."""
    plan = plan_of(batch)
    rows, heads, head_dim = q.shape
    q_stride, head_stride, step = q.stride()
    if head_dim != planes.head_dim or heads % planes.kv_heads or head_stride != head_dim or step != 1:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    out = q.new_empty(rows, heads * head_dim)
    if rows == 0:
        return out
    threads = threads_for(plan.cost * heads * head_dim * 4e-3)
    # Small blocks take all KV heads at once, which lie side by side in a page, if that leaves every thread enough.
    unit_heads = planes.kv_heads if plan.block_rows <= 4 and len(plan.blocks) >= 4 * threads else 1
    _attend(
        TEAM, threads, q.data_ptr(), q_stride, heads, out.data_ptr(), pool.data_ptr(), planes.geometry, plan.blocks,
        plan.block_rows, unit_heads, plan.positions, plan.page_tables, scale / math.log(2), FORMAT[q.dtype],
        FORMAT[planes.dtype],
    )  # fmt: skip
    return out
