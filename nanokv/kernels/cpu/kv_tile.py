"""A strip: 64 keys and values of one KV head meet the queries of a block, in float32.

    scores [queries, 64]    = q [queries, depth] @ K [64, depth] transposed      `score`
    weights                 = the scores under an online softmax                 `soften`
    acc [queries, values]  += weights [queries, 64] @ V [64, values]             `gather`

K and V are widened 64 dims at a time, and each part meets every query before the next part takes its place: 16 KiB,
half of a first-level cache, however wide keys and values are. A part adds to sums that the part before it left, so
cutting K into parts does not change the order of any sum (simd.py).

All places are addresses. limits int64 [queries] says for each query which key of the strip is the last that it sees, -1
for none; it is not above 63.
"""

from __future__ import annotations

import numpy as np

from nanokv.kernels.cpu.compiled import inner
from nanokv.kernels.cpu.exp import ONE, ZERO, exp2
from nanokv.kernels.cpu.intrinsics import prefetch, size_of, view, widen
from nanokv.kernels.cpu.row_blocks import STRIP
from nanokv.kernels.cpu.simd import largest, multiply, transpose, weigh, widen_16

TILE = 4  # queries that are multiplied at once
PART = np.int64(64)  # dims of keys, or of values, that are widened at once
LANES = 16  # running sums of a query's weights
F32, I64, HIDDEN = np.dtype(np.float32), np.dtype(np.int64), np.float32(-np.inf)


@inner
def find(keys, strip, count, plane, table, page_bytes, page_size, token_stride):
    """The addresses of `count` tokens of a strip in a plane, into int64 [64]; the last one repeats up to 64."""
    keys = view(keys, STRIP, I64)
    page = strip // page_size
    slot, address = strip - page * page_size, plane + table[page] * page_bytes
    for j in range(count):
        if slot == page_size:
            page += 1
            slot, address = np.int64(0), plane + table[page] * page_bytes
        keys[j] = address + slot * token_stride
        slot += 1
    for j in range(count, STRIP):
        keys[j] = keys[count - 1]


@inner
def _ask(keys, first, end, offset, num_bytes):
    """Prefetch a part of the keys (or values, by the offset) first .. end - 1 of a strip."""
    keys = view(keys, STRIP, I64)
    for j in range(first, end):
        for byte in range(0, num_bytes, 64):
            prefetch(keys[j] + offset + byte)


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
        transpose(keys + 8 * first, d, out + 4 * (first - STRIP * start), STRIP, format)
    for d in range(whole, count):
        for j in range(first, first + 8):
            key = view(view(keys, STRIP, I64)[j], start + count, format)
            view(out, count * STRIP, F32)[d * STRIP + j] = widen(key[start + d])


@inner
def reach(limits, first, end):
    """The last key that any of the queries first .. end - 1 sees."""
    limits = view(limits, end, I64)
    limit = limits[first]
    for n in range(first + 1, end):
        limit = max(limit, limits[n])
    return limit


@inner
def score(keys, valid, ahead, coming, shift, dims, q, depth, queries, limits, k, scores, format):
    """scores += q @ keys transposed, over `dims` dims.

    keys, valid     int64 [64]: where the strip's keys lie, and how many there are
    ahead, coming   the same for the next strip, asked for from memory meanwhile, `shift` bytes further on
    q               float32, rows `depth` apart
    k               room for 64 x 64 float32
    """
    for start in range(0, dims, PART):
        count = min(dims - start, PART)
        for j in range(0, valid, 8):
            _widen_keys(keys, j, start, count, k, format)
            _ask(ahead, j, min(j + 8, coming), shift + start * size_of(format), count * size_of(format))
        for n in range(0, queries, TILE):
            end = min(n + TILE, queries)
            limit = reach(limits, n, end)
            if limit >= 0:
                part = q + 4 * (n * depth + start)
                multiply(end - n, limit + 1, count, part, depth, k, STRIP, scores + 4 * STRIP * n, STRIP)


@inner
def soften(queries, limits, scale, scores, acc, padded, sums, tops):
    """Scores of each query become weights, relative to its largest score so far; what it has summed decays with that.

    acc    float32 [queries, padded]
    sums   float32 [queries, 16]: running sums of weights
    tops   float32 [queries]: the largest score before this strip, then with it
    """
    limits, tops = view(limits, queries, I64), view(tops, queries, F32)
    for n in range(queries):
        limit, place = limits[n], scores + 4 * STRIP * n
        if limit < 0:
            view(place, STRIP, F32)[:] = ZERO  # products that were made for its neighbours
            continue
        if limit < STRIP - 1:
            own = view(place, STRIP, F32)
            for j in range(limit + 1, STRIP):
                own[j] = HIDDEN
        top = max(tops[n], largest(place) * scale)
        decay = ONE if top == tops[n] else exp2(tops[n] - top)
        weigh(place, scale, top, sums + 4 * LANES * n, decay)
        tops[n] = top
        if decay != ONE:
            row = view(acc + 4 * n * padded, padded, F32)
            for d in range(padded):
                row[d] *= decay


@inner
def gather(keys, valid, ahead, coming, shift, from_key, dims, queries, limits, scores, v, acc, padded, format):
    """acc += weights @ values, over `dims` dims. A value lies `from_key` bytes after its key; v is room as k is."""
    for start in range(0, dims, PART):
        count, offset = min(dims - start, PART), from_key + start * size_of(format)
        for j in range(0, valid, 8):
            for n in range(j, min(j + 8, valid)):
                widen_row(view(keys, STRIP, I64)[n] + offset, v + 4 * PART * n, count, format)
            if from_key != 0:  # else values are the keys (MLA), and on their way
                _ask(ahead, j, min(j + 8, coming), shift + offset, count * size_of(format))
        for n in range(0, queries, TILE):
            end = min(n + TILE, queries)
            limit = reach(limits, n, end)
            if limit >= 0:
                part = acc + 4 * (n * padded + start)
                multiply(end - n, count, limit + 1, scores + 4 * STRIP * n, STRIP, v, PART, part, padded)
