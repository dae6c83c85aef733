"""A strip of codes: as kv_tile.py, but keys and values are decoded, not widened, and each token has a scale.

    scores   = (q @ table[K codes] transposed) * K scales      `score_codes`, after `find_codes`
    acc     += (weights * V scales) @ table[V codes]           `gather_codes`, after `find_codes`

The scale of a token multiplies its scores and its weights instead of all its numbers. Codes that do not fill registers
evenly (3 bits lie in two planes; a packed row may be no multiple of 16 bytes) are spread first, one code a byte.

A side is a tuple: offset, high_offset, scale_offset, bits, dim as in CodePlane, its form, and the address of its table.
"""

from __future__ import annotations

import numpy as np

from nanokv.kernels.cpu.compiled import inner
from nanokv.kernels.cpu.intrinsics import prefetch, size_of, view, widen
from nanokv.kernels.cpu.kv_tile import F32, I64, PART, TILE, reach
from nanokv.kernels.cpu.lookup import cut, decode_keys, decode_values, times, turn
from nanokv.kernels.cpu.row_blocks import STRIP
from nanokv.kernels.cpu.simd import multiply

F16, U16, U64 = np.dtype(np.int16), np.dtype(np.uint16), np.dtype(np.uint64)


@inner
def locate(pages, slots, strip, count, pool, table, page_bytes, page_size):
    """The address of the page and the slot of `count` tokens of a strip, into two int64 [64]; the last one repeats."""
    pages, slots = view(pages, STRIP, I64), view(slots, STRIP, I64)
    page = strip // page_size
    slot, address = strip - page * page_size, pool + table[page] * page_bytes
    for j in range(count):
        if slot == page_size:
            page += 1
            slot, address = np.int64(0), pool + table[page] * page_bytes
        pages[j], slots[j] = address, slot
        slot += 1
    for j in range(count, STRIP):
        pages[j], slots[j] = pages[count - 1], slots[count - 1]


@inner
def ask_codes(pages, slots, count, head, page_size, side):
    """Prefetch the codes of `count` tokens of a strip."""
    pages, slots = view(pages, STRIP, I64), view(slots, STRIP, I64)
    width = row_bytes(side)
    for j in range(count):
        address = pages[j] + side[0] + (head * page_size + slots[j]) * width
        for byte in range(0, width, 64):
            prefetch(address + byte)


@inner
def row_bytes(side):
    """Bytes of a token's packed codes, without their third bits."""
    return side[4] * (np.int64(2) if side[3] == 3 else side[3]) // 8


@inner
def _spread(rows, high_rows, width, bits, dims, out, format):
    """Packed codes of a strip, one code a byte: uint8 [64, dims]; `rows` become the addresses of these.

    rows, high_rows   int64 [64]: where the codes of a token lie, and the third bits
    width             bytes of a packed row
    format            words in which bytes are moved; they divide rows of both planes evenly
    """
    rows, high_rows, size = view(rows, STRIP, I64), view(high_rows, STRIP, I64), size_of(format)
    step, eighth = np.int64(2) if bits == 3 else bits, dims // 8
    mask = np.int64((1 << step) - 1)
    for j in range(STRIP):
        packed, codes = view(rows[j], width, format), out + j * dims
        for group in range(dims // width):
            part = view(codes + group * width, width, format)
            for n in range(width // size):
                part[n] = cut(packed[n], step * group, mask, np.int64(0))
        if bits == 3:
            high = view(high_rows[j], eighth, format)
            for group in range(8):
                part = view(codes + group * eighth, eighth, format)
                for n in range(eighth // size):
                    part[n] |= cut(high[n], group, np.int64(1), np.int64(2))
        rows[j] = codes


@inner
def _addresses(pages, slots, offset, width, out):
    pages, slots, out = view(pages, STRIP, I64), view(slots, STRIP, I64), view(out, STRIP, I64)
    for j in range(STRIP):
        out[j] = pages[j] + offset + slots[j] * width


@inner
def find_codes(pages, slots, head, page_size, side, rows, high_rows, scales, room):
    """Where the codes of a strip lie, into `rows` int64 [64], and the scales of its tokens, into float32 [64].

    room      for 64 rows of codes that have to be spread
    Returns   bytes of a row, and bits that a code takes in it
    """
    offset, high_offset, scale_offset, bits, dim = side[:5]
    first, width = head * page_size, row_bytes(side)
    _addresses(pages, slots, offset + first * width, width, rows)
    at, pages_at, slots_at = view(scales, STRIP, F32), view(pages, STRIP, I64), view(slots, STRIP, I64)
    for j in range(STRIP):
        at[j] = widen(view(pages_at[j] + scale_offset + 2 * (first + slots_at[j]), 1, F16)[0])
    if bits != 3 and width % 16 == 0:
        return width, bits
    if bits == 3:
        _addresses(pages, slots, high_offset + first * dim // 8, dim // 8, high_rows)
    if width % 8 == 0 and (bits != 3 or dim % 64 == 0):
        _spread(rows, high_rows, width, bits, dim, room, U64)
    else:
        _spread(rows, high_rows, width, bits, dim, room, U16)
    return dim, np.int64(8)


@inner
def score_codes(rows, width, bits, side, scales, q, queries, limits, turned, k, scores):
    """scores = q @ keys transposed, where scores are 0 before.

    q        float32 [queries, dim]
    turned   room for 64 packed rows
    k        room for 64 x 64 float32
    """
    mask, depth = np.int64((1 << side[3]) - 1), side[4]
    for half in range(2):
        for byte in range(0, width, 16):
            turn(rows + 256 * half, byte, turned + 32 * half + STRIP * byte)
    for start in range(0, depth, PART):
        end = min(start + PART, depth)
        d = start
        while d < end:  # a run of dims whose codes begin at the same bit
            group = d // width
            run = min(end, (group + 1) * width) - d
            source, target = turned + STRIP * (d - group * width), k + 4 * STRIP * (d - start)
            decode_keys(run, source, bits * group, mask, side[5], side[6], target)
            d += run
        for n in range(0, queries, TILE):
            tile = min(n + TILE, queries)
            limit = reach(limits, n, tile)
            if limit >= 0:
                part = q + 4 * (n * depth + start)
                multiply(tile - n, limit + 1, end - start, part, depth, k, STRIP, scores + 4 * STRIP * n, STRIP)
    for n in range(queries):
        times(scores + 4 * STRIP * n, scales)


@inner
def gather_codes(rows, width, bits, side, scales, queries, limits, weights, v, acc):
    """acc += weights @ values; the weights are multiplied with the scales in place.

    v     room for 64 x 64 float32
    acc   float32 [queries, dim]
    """
    mask, dims = np.int64((1 << side[3]) - 1), side[4]
    for n in range(queries):
        times(weights + 4 * STRIP * n, scales)
    for start in range(0, dims, PART):
        end = min(start + PART, dims)
        for d in range(start, end, 32):
            other = min(d + 16, dims - 16)  # the last 16 of an odd number of them come twice
            a, b = d // width, other // width
            decode_values(
                STRIP, rows, d - a * width, a * bits, other - b * width, b * bits, mask, side[5], side[6],
                v + 4 * (d - start),
            )  # fmt: skip
        for n in range(0, queries, TILE):
            tile = min(n + TILE, queries)
            limit = reach(limits, n, tile)
            if limit >= 0:
                part = acc + 4 * (n * dims + start)
                multiply(tile - n, end - start, limit + 1, weights + 4 * STRIP * n, STRIP, v, PART, part, dims)
