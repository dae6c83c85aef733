"""A KV tile of codes: as kv_tile.py, but keys and values are decoded, not widened, and each token may have a scale.

    scores   = (q @ table[K codes] transposed) * K scales      `qk_codes`, after `locate_codes`
    acc     += (weights * V scales) @ table[V codes]           `pv_codes`, after `locate_codes`

The scale of a token multiplies its scores and its weights instead of all its numbers. Numbers in GROUPS (KIVI) are
low + step * code instead, and tokens have no scales. Codes that do not fill registers evenly (3 bits lie in two planes;
a packed row may be no multiple of 16 bytes) are unpacked first, one code a byte.

A plane is a tuple: offset, high_offset, scale_offset, bits, dim as in CodePlane, its form, the address of its table,
low_offset, and numbers of a token that share a step. Of GROUPS the scales are the steps, and the table is room for the
steps and lows of a tile.
"""

from __future__ import annotations

import numpy as np

from nanokv.kernels.cpu.compiled import inner
from nanokv.kernels.cpu.intrinsics import prefetch_line, size_of, view, widen
from nanokv.kernels.cpu.kv_tile import DIM_TILE, F32, I64, KV_TILE, Q_TILE, last_visible, widen_row
from nanokv.kernels.cpu.lookup import decode_keys, decode_values, extract_bits, multiply_64, transpose_bytes
from nanokv.kernels.cpu.simd import multiply
from nanokv.kernels.planes import GROUPS

F16, U16, U64 = np.dtype(np.int16), np.dtype(np.uint16), np.dtype(np.uint64)


@inner
def locate_tokens(pages, slots, start, count, pool, table, page_bytes, page_size):
    """The page's address and the slot of tokens start .. start + count - 1, into two int64 [64]; the last repeats."""
    pages, slots = view(pages, KV_TILE, I64), view(slots, KV_TILE, I64)
    page = start // page_size
    slot, address = start - page * page_size, pool + table[page] * page_bytes
    for j in range(count):
        if slot == page_size:
            page += 1
            slot, address = np.int64(0), pool + table[page] * page_bytes
        pages[j], slots[j] = address, slot
        slot += 1
    for j in range(count, KV_TILE):
        pages[j], slots[j] = pages[count - 1], slots[count - 1]


@inner
def row_bytes(plane):
    """Bytes of a token's packed codes, without their third bits."""
    return plane[4] * (np.int64(2) if plane[3] == 3 else plane[3]) // 8


@inner
def _unpack(rows, high_rows, width, bits, dims, out, format):
    """Unpacks the codes of a tile, one code a byte: uint8 [64, dims]; `rows` become the addresses of these.

    rows, high_rows   int64 [64]: addresses of the codes of each token, and of their third bits
    width             bytes of a packed row
    format            words in which bytes are moved; they divide rows of both planes evenly
    """
    rows, high_rows, size = view(rows, KV_TILE, I64), view(high_rows, KV_TILE, I64), size_of(format)
    step, eighth = np.int64(2) if bits == 3 else bits, dims // 8
    mask = np.int64((1 << step) - 1)
    for j in range(KV_TILE):
        packed, codes = view(rows[j], width, format), out + j * dims
        for group in range(dims // width):
            part = view(codes + group * width, width, format)
            for n in range(width // size):
                part[n] = extract_bits(packed[n], step * group, mask, np.int64(0))
        if bits == 3:
            high = view(high_rows[j], eighth, format)
            for group in range(8):
                part = view(codes + group * eighth, eighth, format)
                for n in range(eighth // size):
                    part[n] |= extract_bits(high[n], group, np.int64(1), np.int64(2))
        rows[j] = codes


@inner
def _addresses(pages, slots, offset, width, out):
    pages, slots, out = view(pages, KV_TILE, I64), view(slots, KV_TILE, I64), view(out, KV_TILE, I64)
    for j in range(KV_TILE):
        out[j] = pages[j] + offset + slots[j] * width


@inner
def _load_scales(pages, slots, first, plane, out):
    """The scales of a tile's tokens, as float32 [64]."""
    at, pages, slots = view(out, KV_TILE, F32), view(pages, KV_TILE, I64), view(slots, KV_TILE, I64)
    for j in range(KV_TILE):
        at[j] = widen(view(pages[j] + plane[2] + 2 * (first + slots[j]), 1, F16)[0])


@inner
def _groups_of(pages, slots, half, head, page_size, plane, are_keys):
    """The steps of the keys, or of the values, of half a tile: an address, still without the offset, and their number.
    The 32 tokens share the steps of keys."""
    page, dim = view(pages, KV_TILE, I64)[32 * half], plane[4]
    if are_keys:
        return page + 2 * head * dim, dim
    # Where a tile ends in its first half, the second one repeats the last token, and its group is read from the start.
    groups, slot = dim // plane[8], view(slots, KV_TILE, I64)[32 * half] // 32 * 32
    return page + 2 * (head * page_size + slot) * groups, 32 * groups


@inner
def prefetch_codes(pages, slots, count, head, page_size, plane, are_keys):
    """Prefetches the codes and the scales of `count` tokens of a tile."""
    first, width = head * page_size, row_bytes(plane)
    at, slots_at = view(pages, KV_TILE, I64), view(slots, KV_TILE, I64)
    for j in range(count):
        address = at[j] + plane[0] + (first + slots_at[j]) * width
        for byte in range(0, width, 64):
            prefetch_line(address + byte)
        if plane[5] != GROUPS and (j == 0 or slots_at[j] % 32 == 0):
            prefetch_line(at[j] + plane[2] + 2 * (first + slots_at[j]))
    if plane[5] == GROUPS:
        for half in range((count + 31) // 32):
            start, numbers = _groups_of(pages, slots, half, head, page_size, plane, are_keys)
            for byte in range(0, 2 * numbers, 64):
                prefetch_line(start + plane[2] + byte)
                prefetch_line(start + plane[7] + byte)


@inner
def _load_groups(pages, slots, head, page_size, plane, are_keys):
    """The steps of a tile, by halves, then its lows: float32 [2, 2, dim] of keys, [2, 64, groups] of values."""
    for half in range(2):
        start, count = _groups_of(pages, slots, half, head, page_size, plane, are_keys)
        widen_row(start + plane[2], plane[6] + 4 * half * count, count, F16)
        widen_row(start + plane[7], plane[6] + 4 * (half + 2) * count, count, F16)


@inner
def locate_codes(pages, slots, head, page_size, plane, are_keys, rows, high_rows, scales, room):
    """The addresses of a tile's codes, into `rows` int64 [64], and the scales of its tokens, into float32 [64].

    room      for 64 rows of codes that have to be unpacked
    Returns   bytes of a row, and bits of a code in it
    """
    offset, high_offset, bits, dim = plane[0], plane[1], plane[3], plane[4]
    first, width = head * page_size, row_bytes(plane)
    _addresses(pages, slots, offset + first * width, width, rows)
    if plane[5] != GROUPS:
        _load_scales(pages, slots, first, plane, scales)
    else:
        _load_groups(pages, slots, head, page_size, plane, are_keys)
    if bits != 3 and width % 16 == 0:
        return width, bits
    if bits == 3:
        _addresses(pages, slots, high_offset + first * dim // 8, dim // 8, high_rows)
    if width % 8 == 0 and (bits != 3 or dim % 64 == 0):
        _unpack(rows, high_rows, width, bits, dim, room, U64)
    else:
        _unpack(rows, high_rows, width, bits, dim, room, U16)
    return dim, np.int64(8)


@inner
def qk_codes(rows, width, bits, plane, scales, q, queries, limits, transposed, k, scores):
    """scores = q @ keys transposed. Scores must be 0 before.

    q            float32 [queries, dim]
    transposed   room for 64 packed rows
    k            room for 64 x 64 float32
    """
    mask, depth = np.int64((1 << plane[3]) - 1), plane[4]
    for half in range(2):
        for byte in range(0, width, 16):
            transpose_bytes(rows + 256 * half, byte, transposed + 32 * half + KV_TILE * byte)
    for start in range(0, depth, DIM_TILE):
        end = min(start + DIM_TILE, depth)
        d = start
        while d < end:  # a run of dims whose codes begin at the same bit
            group = d // width
            run = min(end, (group + 1) * width) - d
            source, target = transposed + KV_TILE * (d - group * width), k + 4 * KV_TILE * (d - start)
            decode_keys(run, source, bits * group, mask, plane[5], plane[6], d, depth, target)
            d += run
        for n in range(0, queries, Q_TILE):
            last = min(n + Q_TILE, queries)
            limit = last_visible(limits, n, last)
            if limit >= 0:
                part = q + 4 * (n * depth + start)
                multiply(last - n, limit + 1, end - start, part, depth, k, KV_TILE, scores + 4 * KV_TILE * n, KV_TILE)
    if plane[5] != GROUPS:
        for n in range(queries):
            multiply_64(scores + 4 * KV_TILE * n, scales)


@inner
def pv_codes(rows, width, bits, plane, scales, queries, limits, weights, v, acc):
    """acc += weights @ values; the weights are multiplied with the scales in place.

    v     room for 64 x 64 float32
    acc   float32 [queries, dim]
    """
    mask, dims, group = np.int64((1 << plane[3]) - 1), plane[4], plane[8]
    if plane[5] != GROUPS:
        for n in range(queries):
            multiply_64(weights + 4 * KV_TILE * n, scales)
    for start in range(0, dims, DIM_TILE):
        end = min(start + DIM_TILE, dims)
        for d in range(start, end, 32):
            other = min(d + 16, dims - 16)  # of an odd number of blocks the last is decoded twice
            a, b = d // width, other // width
            decode_values(
                KV_TILE, rows, d - a * width, a * bits, other - b * width, b * bits, mask, plane[5], plane[6],
                d // group, other // group, dims // group, v + 4 * (d - start),
            )  # fmt: skip
        for n in range(0, queries, Q_TILE):
            last = min(n + Q_TILE, queries)
            limit = last_visible(limits, n, last)
            if limit >= 0:
                part = acc + 4 * (n * dims + start)
                multiply(last - n, end - start, limit + 1, weights + 4 * KV_TILE * n, KV_TILE, v, DIM_TILE, part, dims)
