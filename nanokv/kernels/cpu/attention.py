"""Paged attention on a CPU: one algorithm for prefill and decode, exact to the bit in both.

The unit of work is (a block of up to 64 rows of one request, one KV head). It walks the strips of 64 keys from position
0: widens the strip once (K transposed) and multiplies it with every query of every row of the block, under an
online softmax. A decode is a block of one row. What a row computes is fixed by absolute positions alone: strips begin
at multiples of 64, products add in a fixed order (tile.py), and a strip past the row's position leaves no trace.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.compiled import compiled
from nanokv.kernels.cpu.exp import ONE, ZERO, exp2
from nanokv.kernels.cpu.plan import STRIP, plan_of
from nanokv.kernels.cpu.team import TEAM, threads_for, together
from nanokv.kernels.cpu.tile import largest, multiply, transpose, widen_16
from nanokv.kernels.cpu.words import FORMAT, fetch_add, fma, narrow, prefetch, view, widen
from nanokv.kernels.ops import KVPlanes

TILE = 4  # queries that are multiplied at once
LANES = 16  # running sums of a query's weights

F32 = FORMAT[torch.float32]
HIDDEN = np.float32(-np.inf)


@njit
def _soften(scores, limit, scale, top, sums):
    """Scores of one query over a strip become weights, relative to the largest score so far.

    scores    address of 64 float32; those past `limit` are hidden
    top       the largest score before this strip
    sums      address of 16 running sums of weights
    Returns   the largest score now, and what all earlier weights have to be multiplied with
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
def _widen_row(source, out, count, format):
    """`count` numbers of a format at an address, as float32 to another address."""
    size = format.itemsize
    whole = count - count % 16
    for d in range(0, whole, 16):
        widen_16(source + size * d, out + 4 * d, format)
    for d in range(whole, count):
        view(out, count, F32)[d] = widen(view(source, count, format)[d])


import os
SPREAD=int(os.environ.get("SPREAD","1"));QA=1;QB=1
@njit
def _widen_keys8(keys, head_dim, out, format):
    step = 32 // format.itemsize
    for d in range(0, head_dim, step):
        transpose(keys, d, out, STRIP, format)

I64 = np.empty(0, np.int64)

@njit
def _ask(keys, first, last, offset, size):
    """Prefetch rows [first, last) of `size` bytes."""
    for j in range(first, last):
        for x in range(0, size, 64):
            prefetch(keys[j] + offset + x)

@njit
def _find(keys, strip, valid, base, table, page_bytes, page_size, row_bytes):
    shift = 0
    while (1 << shift) < page_size:
        shift += 1
    for j in range(valid):
        position = strip + j
        keys[j] = base + table[position >> shift] * page_bytes + (position & (page_size - 1)) * row_bytes
    for j in range(valid, STRIP):
        keys[j] = keys[valid - 1]


@njit
def _work(counter, q, q_stride, heads, out, pool, geometry, blocks, block_rows, together_heads, positions, tables, scale, q_format, format):
    k_offset, v_offset, page_bytes, page_size, kv_heads, head_dim = geometry
    group = heads // kv_heads
    padded = (head_dim + 15) // 16 * 16
    row_bytes, head_bytes = head_dim * format.itemsize, page_size * head_dim * format.itemsize
    most = block_rows * group * together_heads
    keys_now, keys_next = np.empty(STRIP, np.int64), np.empty(STRIP, np.int64)
    keys_head = np.empty(STRIP, np.int64)
    scratch = np.empty(STRIP * (head_dim + padded + TILE) + most * (head_dim + padded + LANES + 1), np.float32)
    k = scratch.ctypes.data
    v = k + 4 * STRIP * head_dim
    scores = v + 4 * STRIP * padded
    wide_q = scores + 4 * STRIP * TILE
    acc = wide_q + 4 * most * head_dim
    sums = acc + 4 * most * padded
    tops = view(sums + 4 * most * LANES, most, F32)
    acc_view, sums_view = view(acc, most * padded, F32), view(sums, most * LANES, F32)
    if padded > head_dim:
        view(v, STRIP * padded, F32)[:] = ZERO
    splits = kv_heads // together_heads
    while True:
        unit = fetch_add(counter, 1)
        if unit >= len(blocks) * splits:
            break
        start, end, request, last = blocks[unit // splits]
        first_head = unit % splits * together_heads
        rows = end - start
        queries = rows * group
        table = tables[request]
        base = pool + k_offset + first_head * head_bytes
        _find(keys_next, 0, min(STRIP, last + 1), base, table, page_bytes, page_size, row_bytes)
        all_queries = queries * together_heads
        acc_view[: all_queries * padded] = ZERO
        sums_view[: all_queries * LANES] = ZERO
        tops[:all_queries] = HIDDEN
        for n in range(all_queries):
            head = (first_head + n // queries) * group + n % group
            row = start + n % queries // group
            _widen_row(q + q_format.itemsize * (row * q_stride + head * head_dim), wide_q + 4 * n * head_dim, head_dim, q_format)
        for strip in range(0, last + 1, STRIP):
            valid = min(STRIP, last + 1 - strip)
            ahead = max(min(STRIP, last + 1 - strip - STRIP), 0)
            keys_now, keys_next = keys_next, keys_now
            if ahead:
                _find(keys_next, strip + STRIP, ahead, base, table, page_bytes, page_size, row_bytes)
            for h in range(together_heads):
                for j in range(STRIP):
                    keys_head[j] = keys_now[j] + h * head_bytes
                for j in range(0, valid, 8):
                    _widen_keys8(keys_head.ctypes.data + 8 * j, head_dim, k + 4 * j, format)
                    if SPREAD and j < 32: _ask(keys_next, j*QA, min(ahead, j*QA + 8*QA), h * head_bytes, row_bytes)
                for j in range(valid):
                    _widen_row(keys_head[j] + v_offset - k_offset, v + 4 * padded * j, head_dim, format)
                    if SPREAD and j%8==0 and j<32: _ask(keys_next, 32+j*QB, min(ahead, 32 + j*QB + 8*QB), h * head_bytes, row_bytes)
                for first in range(0, queries, TILE):
                    count = min(TILE, queries - first)
                    limit = -1
                    for n in range(first, first + count):
                        limit = max(limit, positions[start + n // group] - strip)
                    if limit < 0:
                        continue
                    limit = min(limit, STRIP - 1)
                    at = h * queries + first
                    multiply(count, limit + 1, head_dim, True, wide_q + 4 * at * head_dim, head_dim, k, STRIP, scores, STRIP)
                    if SPREAD and first == 0: _ask(keys_next, 0, min(16, ahead), h * head_bytes + v_offset - k_offset, row_bytes)
                    for n in range(count):
                        if SPREAD and first == 0 and n==1: _ask(keys_next, 16, min(32, ahead), h * head_bytes + v_offset - k_offset, row_bytes)
                        own = min(max(positions[start + (first + n) // group] - strip, -1), STRIP - 1)
                        top, decay = _soften(scores + 4 * STRIP * n, own, scale, tops[at + n], sums + 4 * LANES * (at + n))
                        tops[at + n] = top
                        if decay != ONE:
                            a = view(acc + 4 * (at + n) * padded, padded, F32)
                            for d in range(padded):
                                a[d] *= decay
                    if SPREAD and first == 0: _ask(keys_next, 32, min(48, ahead), h * head_bytes + v_offset - k_offset, row_bytes)
                    multiply(count, padded, limit + 1, False, scores, STRIP, v, padded, acc + 4 * at * padded, padded)
                    if SPREAD and first == 0: _ask(keys_next, 48, min(64, ahead), h * head_bytes + v_offset - k_offset, row_bytes)
        for n in range(all_queries):
            total = ZERO
            for lane in range(LANES):
                total += sums_view[n * LANES + lane]
            head = (first_head + n // queries) * group + n % group
            row = start + n % queries // group
            target = view(out + q_format.itemsize * (row * heads + head) * head_dim, head_dim, q_format)
            for d in range(head_dim):
                # + 0.0: a strip that was skipped and one whose weights are all 0 differ in the sign of a zero
                target[d] = narrow(acc_view[n * padded + d] / total + ZERO, q_format)


@njit(nogil=True)
def _attend(
    team, threads, q, q_stride, heads, out, pool, geometry, blocks, block_rows, together_heads, positions, tables, scale, q_format, format
):
    counter = np.zeros(1, np.int64)
    numbers = (geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5])
    args = (
        counter.ctypes.data, q, q_stride, heads, out, pool, numbers, blocks, block_rows, together_heads, positions, tables, np.float32(scale),
        q_format, format,
    )
    if threads > 1:
        together(team, threads, _work, args)
    else:
        _work(*args)

import os
TH=int(os.environ.get("TH","0"))
def paged_attention(
    q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float
) -> torch.Tensor:
    """As reference.paged_attention."""
    plan = plan_of(batch)
    rows, heads, head_dim = q.shape
    out = torch.empty((rows, heads * head_dim), dtype=q.dtype)
    if rows == 0: return out
    _attend(
        TEAM, torch.get_num_threads() if plan.cost * heads > 20 else 1, q.data_ptr(), q.stride(0), heads, out.data_ptr(), pool.data_ptr(), planes.geometry,
        plan.blocks, plan.block_rows, planes.kv_heads if TH and plan.block_rows<=4 else 1, plan.positions, plan.page_tables, scale * 1.4426950408889634, FORMAT[q.dtype], FORMAT[planes.dtype],
    )
    return out
