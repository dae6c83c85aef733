"""A KV tile: attention of a unit's queries (attention_units.py) over 64 keys and values of one KV head, in float32.

    scores [queries, 64]    = q [queries, depth] @ K [64, depth] transposed      `qk`
    weights                 = the scores under an online softmax                 `online_softmax`
    acc [queries, values]  += weights [queries, 64] @ V [64, values]             `pv`

K and V are widened 64 dims at a time, and every query uses a part before the next part replaces it: 16 KiB, half of a
first-level cache, for keys and values of any width. A part adds to the sums of the part before it, so cutting K into
parts does not change the order of any sum (simd.py).

All places in memory are addresses. limits int64 [queries] holds, for each query, the last key of the tile that the
query sees: 0 to 63, or -1 for none.
"""

from __future__ import annotations

import numpy as np

from nanokv.kernels.cpu.compiled import inner
from nanokv.kernels.cpu.exp import ONE, ZERO, exp2
from nanokv.kernels.cpu.intrinsics import prefetch_line, size_of, view, widen
from nanokv.kernels.cpu.simd import largest, multiply, softmax_weights, transpose, widen_16

# Keys of a tile. (numba compiles a function anew for each plain int constant that is passed to it, and only once for a
# numpy integer.)
KV_TILE = np.int64(64)
Q_TILE = 4  # queries that are multiplied at once
DIM_TILE = np.int64(64)  # dims of keys, or of values, that are widened at once
LANES = 16  # running sums of a query's weights
F32, I64, MASKED = np.dtype(np.float32), np.dtype(np.int64), np.float32(-np.inf)


@inner
def locate(keys, start, count, plane, table, page_bytes, page_size, token_stride):
    """The addresses of tokens start .. start + count - 1 in a plane, into int64 [64]; the last one repeats up to 64."""
    keys = view(keys, KV_TILE, I64)
    page = start // page_size
    slot, address = start - page * page_size, plane + table[page] * page_bytes
    for j in range(count):
        if slot == page_size:
            page += 1
            slot, address = np.int64(0), plane + table[page] * page_bytes
        keys[j] = address + slot * token_stride
        slot += 1
    for j in range(count, KV_TILE):
        keys[j] = keys[count - 1]


@inner
def prefetch(keys, first, end, offset, num_bytes):
    """Prefetches a part of the keys (or values, by the offset) first .. end - 1 of a tile."""
    keys = view(keys, KV_TILE, I64)
    for j in range(first, end):
        for byte in range(0, num_bytes, 64):
            prefetch_line(keys[j] + offset + byte)


@inner
def widen_row(source, out, count, format):
    """`count` numbers at an address, as float32 to another address."""
    whole = count // 16 * 16
    for d in range(0, whole, 16):
        widen_16(source + d * size_of(format), out + 4 * d, format)
    for d in range(whole, count):
        view(out, count, F32)[d] = widen(view(source, count, format)[d])


@inner
def _widen_keys(keys, first, start, count, out, format):
    """Dims start .. start + count - 1 of the keys first .. first + 7, into their columns of out [count, 64]."""
    whole = count // 16 * 16
    for d in range(start, start + whole, 32 // size_of(format)):
        transpose(keys + 8 * first, d, out + 4 * (first - KV_TILE * start), KV_TILE, format)
    for d in range(whole, count):
        for j in range(first, first + 8):
            key = view(view(keys, KV_TILE, I64)[j], start + count, format)
            view(out, count * KV_TILE, F32)[d * KV_TILE + j] = widen(key[start + d])


@inner
def last_visible(limits, first, end):
    """The last key that any of the queries first .. end - 1 sees."""
    limits = view(limits, end, I64)
    limit = limits[first]
    for n in range(first + 1, end):
        limit = max(limit, limits[n])
    return limit


@inner
def qk(keys, count, next_keys, next_count, shift, dims, q, depth, queries, limits, k, scores, format):
    """scores += q @ keys transposed, over `dims` dims.

    keys, count             int64 [64]: the addresses of the tile's keys, and how many there are
    next_keys, next_count   the same for the next tile, prefetched meanwhile, `shift` bytes further on
    q                       float32, rows `depth` apart
    k                       room for 64 x 64 float32
    """
    for start in range(0, dims, DIM_TILE):
        part_dims = min(dims - start, DIM_TILE)
        for j in range(0, count, 8):
            _widen_keys(keys, j, start, part_dims, k, format)
            prefetch(next_keys, j, min(j + 8, next_count), shift + start * size_of(format), part_dims * size_of(format))
        for n in range(0, queries, Q_TILE):
            end = min(n + Q_TILE, queries)
            limit = last_visible(limits, n, end)
            if limit >= 0:
                part = q + 4 * (n * depth + start)
                multiply(end - n, limit + 1, part_dims, part, depth, k, KV_TILE, scores + 4 * KV_TILE * n, KV_TILE)


@inner
def online_softmax(queries, limits, scale, scores, acc, padded, total, best):
    """The scores of each query become weights, relative to its largest score so far; its sums fade by the same factor.

    acc     float32 [queries, padded]
    total   float32 [queries, 16]: running sums of weights
    best    float32 [queries]: the largest score before this tile, then with it
    """
    limits, best = view(limits, queries, I64), view(best, queries, F32)
    for n in range(queries):
        limit, own_scores = limits[n], scores + 4 * KV_TILE * n
        if limit < 0:
            view(own_scores, KV_TILE, F32)[:] = ZERO  # products that were made for other queries of a Q_TILE
            continue
        if limit < KV_TILE - 1:
            masked = view(own_scores, KV_TILE, F32)
            for j in range(limit + 1, KV_TILE):
                masked[j] = MASKED
        highest = max(best[n], largest(own_scores) * scale)
        fade = ONE if highest == best[n] else exp2(best[n] - highest)
        softmax_weights(own_scores, scale, highest, total + 4 * LANES * n, fade)
        best[n] = highest
        if fade != ONE:
            row = view(acc + 4 * n * padded, padded, F32)
            for d in range(padded):
                row[d] *= fade


@inner
def pv(keys, count, next_keys, next_count, shift, from_key, dims, queries, limits, weights, v, acc, padded, format):
    """acc += weights @ values, over `dims` dims. A value lies `from_key` bytes after its key; v is room as k is."""
    for start in range(0, dims, DIM_TILE):
        part_dims, offset = min(dims - start, DIM_TILE), from_key + start * size_of(format)
        for j in range(0, count, 8):
            for n in range(j, min(j + 8, count)):
                widen_row(view(keys, KV_TILE, I64)[n] + offset, v + 4 * DIM_TILE * n, part_dims, format)
            if from_key != 0:  # else values are the keys (MLA), which are prefetched already
                prefetch(next_keys, j, min(j + 8, next_count), shift + offset, part_dims * size_of(format))
        for n in range(0, queries, Q_TILE):
            end = min(n + Q_TILE, queries)
            limit = last_visible(limits, n, end)
            if limit >= 0:
                part = acc + 4 * (n * padded + start)
                multiply(end - n, part_dims, limit + 1, weights + 4 * KV_TILE * n, KV_TILE, v, DIM_TILE, part, padded)
