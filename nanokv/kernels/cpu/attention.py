"""Paged attention on a CPU: one algorithm for prefill and decode, exact to the bit in both.

The unit of work is a block of up to 64 rows of one request with one KV head (or all, where blocks are small). It walks
the strips of 64 keys from position 0: widens a strip once to float32, K transposed, and multiplies it with every query
of every row of the block, under an online softmax. A decode is a block of one row. What a row computes is fixed by
absolute positions alone: strips begin at multiples of 64, products add in a fixed order (tile.py), and a strip past
the row's position leaves no trace. So the bits of a row depend neither on batch mates nor on chunks, page size and
threads, whatever the formats of q and pages are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.compiled import compiled
from nanokv.kernels.cpu.exp import ONE, ZERO, exp2
from nanokv.kernels.cpu.plan import STRIP, plan_of
from nanokv.kernels.cpu.team import TEAM, share, threads_for
from nanokv.kernels.cpu.tile import largest, multiply, transpose, widen_16
from nanokv.kernels.cpu.words import FORMAT, fetch_add, fma, narrow, prefetch, view, widen
from nanokv.kernels.ops import KVPlanes

TILE = 4  # queries that are multiplied at once
LANES = 16  # running sums of a query's weights
F32, HIDDEN = FORMAT[torch.float32], np.float32(-np.inf)


@njit
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


@njit
def _ask(keys, first, end, offset, row_bytes):
    """Prefetch the keys (or values, by the offset) first .. end - 1 of a strip."""
    for j in range(first, end):
        for byte in range(0, row_bytes, 64):
            prefetch(keys[j] + offset + byte)


@njit
def _widen_row(source, out, count, format):
    """`count` numbers at an address, as float32 to another address."""
    whole = count // 16 * 16
    for d in range(0, whole, 16):
        widen_16(source + d * format.itemsize, out + 4 * d, format)
    for d in range(whole, count):
        view(out, count, F32)[d] = widen(view(source, count, format)[d])


@njit
def _widen_keys(keys, first, head_dim, out, format):
    """Keys first .. first + 7 of a strip, into their columns of k [head_dim, 64]."""
    whole = head_dim // 16 * 16
    for d in range(0, whole, 32 // format.itemsize):
        transpose(keys.ctypes.data + 8 * first, d, out + 4 * first, STRIP, format)
    for d in range(whole, head_dim):
        for j in range(first, first + 8):
            view(out, head_dim * STRIP, F32)[d * STRIP + j] = widen(view(keys[j], head_dim, format)[d])


@njit
def _soften(scores, limit, scale, top, sums):
    """Scores of one query over a strip become weights, relative to the largest score so far.

    scores    address of 64 float32; those past `limit` are hidden
    top       the largest score before this strip
    sums      address of 16 running sums of weights
    Returns   the largest score now, and what earlier weights have to be multiplied with
    """
    s, sums = view(scores, STRIP, F32), view(sums, LANES, F32)
    for j in range(limit + 1, STRIP):
        s[j] = HIDDEN
    new_top = max(top, largest(scores) * scale)
    decay = exp2(top - new_top)
    for j in range(STRIP):
        s[j] = exp2(fma(s[j], scale, -new_top))
    for lane in range(LANES):
        strip_sum = (s[lane] + s[lane + 16]) + (s[lane + 32] + s[lane + 48])
        sums[lane] = fma(sums[lane], decay, strip_sum)
    return new_top, decay


@njit
def _attend_strip(limits, head_dim, padded, scale, k, v, scores, q, acc, sums, tops):
    """Add one widened strip to all queries of a head. limits[n]: the last key of the strip that query n sees, or < 0.

    q [queries, head_dim], acc [queries, padded], sums [queries, 16]: addresses of float32; tops [queries]: an array
    """
    for first in range(0, len(limits), TILE):
        count = min(TILE, len(limits) - first)
        limit = min(limits[first : first + count].max(), STRIP - 1)
        if limit < 0:
            continue
        tile_acc = acc + 4 * first * padded
        multiply(count, limit + 1, head_dim, True, q + 4 * first * head_dim, head_dim, k, STRIP, scores, STRIP)
        for n in range(first, first + count):
            own = max(min(limits[n], limit), -1)
            tops[n], decay = _soften(scores + 4 * STRIP * (n - first), own, scale, tops[n], sums + 4 * LANES * n)
            if decay != ONE:
                row = view(acc + 4 * n * padded, padded, F32)
                for d in range(padded):
                    row[d] *= decay
        multiply(count, padded, limit + 1, False, scores, STRIP, v, padded, tile_acc, padded)


@njit
def _work(
    counter, q, q_stride, heads, out, pool, geometry, blocks, block_rows, unit_heads, positions, tables, scale,
    q_format, format,
):  # fmt: skip
    """What each thread does: take units (a block of rows, `unit_heads` KV heads) until none is left."""
    k_offset, v_offset, page_bytes, page_size, kv_heads, head_dim = geometry
    group, splits, padded = heads // kv_heads, kv_heads // unit_heads, (head_dim + 15) // 16 * 16
    row_bytes, v_from_k = head_dim * format.itemsize, v_offset - k_offset
    head_bytes = page_size * row_bytes
    most = block_rows * group * unit_heads
    scratch = np.zeros(STRIP * (head_dim + padded + TILE) + most * (head_dim + padded + LANES + 1), np.float32)
    k = scratch.ctypes.data
    v = k + 4 * STRIP * head_dim
    scores = v + 4 * STRIP * padded
    wide_q = scores + 4 * STRIP * TILE
    acc = wide_q + 4 * most * head_dim
    sums = acc + 4 * most * padded
    tops = view(sums + 4 * most * LANES, most, F32)
    keys, here, ahead = np.empty(STRIP, np.int64), np.empty(STRIP, np.int64), np.empty(STRIP, np.int64)
    limits = np.empty(block_rows * group, np.int64)
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
        valid = min(last + 1, STRIP)
        _find(ahead, 0, valid, plane, table, page_bytes, page_size, row_bytes)
        for strip in range(0, last + 1, STRIP):
            keys, ahead = ahead, keys
            coming = max(min(last + 1 - strip - STRIP, STRIP), 0)
            if coming:
                _find(ahead, strip + STRIP, coming, plane, table, page_bytes, page_size, row_bytes)
            for n in range(queries):
                limits[n] = positions[start + n // group] - strip
            for h in range(unit_heads):
                offset = h * head_bytes
                for j in range(STRIP):
                    here[j] = keys[j] + offset
                for j in range(0, valid, 8):
                    _widen_keys(here, j, head_dim, k, format)
                    _ask(ahead, j, min(j + 8, coming), offset, row_bytes)
                for j in range(valid):
                    _widen_row(here[j] + v_from_k, v + 4 * padded * j, head_dim, format)
                    _ask(ahead, j, min(j + 1, coming), offset + v_from_k, row_bytes)
                at = h * queries
                _attend_strip(
                    limits[:queries], head_dim, padded, scale, k, v, scores, wide_q + 4 * at * head_dim,
                    acc + 4 * at * padded, sums + 4 * at * LANES, tops[at : at + queries],
                )  # fmt: skip
            valid = coming
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
    scratch[0] = ZERO  # numba frees an array after its last use, and knows nothing of addresses


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
    out = torch.empty((rows, heads * head_dim), dtype=q.dtype)
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
