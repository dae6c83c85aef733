"""Paged attention in bfloat16 on tile registers: the algorithm of attention.py, 16 queries at a time.

    scores [64 keys, 16 queries]   = K [64, depth] @ q transposed, which is packed into tiles once a unit
    weights                        = the scores under an online softmax (tile_softmax.py), as bfloat16
    acc [values, 16 queries]      += V transposed [values, 64] @ weights

K is read from pages as it lies, where pages hold whole tiles of 16 keys; else it is copied. V is transposed once a KV
tile and KV head, for all queries of a unit. Sums are float32, so a result differs from float32's by the rounding of
weights, 2**-9 of each. As in attention.py, the bits of a row depend on that row alone: a lane holds one query, KV tiles
begin at multiples of 64, and a key that a query does not see adds a zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nanokv.kernels.cpu import amx
from nanokv.kernels.cpu.amx import COLUMNS, DEPTH, ROWS, TILE_BYTES, release_tiles, set_shapes
from nanokv.kernels.cpu.attention_units import block_of, cut_units, positions_of, row_and_head, table_of, unit_of
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ONE, ZERO
from nanokv.kernels.cpu.intrinsics import fetch_add, sizes, view
from nanokv.kernels.cpu.kv_tile import F32, I64, KV_TILE, MASKED, locate, prefetch
from nanokv.kernels.cpu.omp import parallel_for
from nanokv.kernels.cpu.tile_products import VALUE_STRIDE, add_values, score_tiles
from nanokv.kernels.cpu.tile_softmax import softmax_columns
from nanokv.kernels.cpu.tile_transpose import store_columns, transpose_shorts, transpose_words
from nanokv.kernels.planes import KVPlanes

I32, U16 = np.dtype(np.int32), np.dtype(np.uint16)
_SHAPES = amx.shapes([ROWS] * 8)
_SHAPES_AT = _SHAPES.ctypes.data


def is_for(q: torch.Tensor, planes: KVPlanes) -> bool:
    """Whether `attend` computes this attention, on this machine."""
    if q.dtype is not torch.bfloat16 or planes.dtype is not torch.bfloat16 or not amx.has_tiles():
        return False
    return planes.head_dim % DEPTH == planes.value_dim % DEPTH == planes.rope_dim % DEPTH == 0


@inner
def _load_queries(unit, cut, q, q_stride, depth, positions, zeros, rows, tiles, last, base, total, acc, value_dim):
    """The queries of a unit as tiles [KV heads * groups, depth / 32]; and what an online softmax starts from.

    last   int32 [groups, 16]: the positions of the queries, the last one repeated
    rows   room for 16 addresses
    """
    start, _, _, members, queries = unit
    groups = (queries + COLUMNS - 1) // COLUMNS
    for n in range(groups * COLUMNS):
        view(last, groups * COLUMNS, I32)[n] = positions[start + min(n, queries - 1) // members]
    for n in range(cut[1] * groups):
        head, first = n // groups, n % groups * COLUMNS
        for lane in range(COLUMNS):
            address = zeros
            if first + lane < queries:
                row, q_head = row_and_head(head * queries + first + lane, unit, cut[0])
                address = q + 2 * (row * q_stride + q_head * depth)
            view(rows, COLUMNS, I64)[lane] = address
        for d in range(0, depth, DEPTH):
            transpose_words(rows, 2 * d, tiles + TILE_BYTES // DEPTH * (n * depth + d))
    count = cut[1] * groups * COLUMNS
    view(base, count, F32)[:] = MASKED
    view(total, count, F32)[:] = ZERO
    view(acc, count * value_dim, F32)[:] = ZERO


@inner
def _store_results(unit, cut, out, heads, value_dim, targets, total, acc):
    """Divides the results of a unit by their sums of weights and writes them to out [rows, heads, value_dim]."""
    queries = unit[4]
    groups = (queries + COLUMNS - 1) // COLUMNS
    for n in range(cut[1] * groups):
        head, first = n // groups, n % groups * COLUMNS
        count = min(queries - first, COLUMNS)
        for lane in range(count):
            row, q_head = row_and_head(head * queries + first + lane, unit, cut[0])
            view(targets, COLUMNS, I64)[lane] = out + 2 * (row * heads + q_head) * value_dim
        factors, columns = total + 4 * COLUMNS * n, acc + 4 * COLUMNS * n * value_dim
        for lane in range(COLUMNS):
            weights = view(factors, COLUMNS, F32)
            weights[lane] = ONE / weights[lane]
        for d in range(0, value_dim, ROWS):
            store_columns(count, columns + 4 * COLUMNS * d, factors, targets, 2 * d)


@inner
def _range_of(lasts):
    """The least and the greatest of 16 positions."""
    lasts = view(lasts, COLUMNS, I32)
    lowest = highest = np.int64(lasts[0])
    for lane in range(1, COLUMNS):
        lowest, highest = min(lowest, np.int64(lasts[lane])), max(highest, np.int64(lasts[lane]))
    return lowest, highest


@inner
def _copy(keys, count, shift, dims, out):
    """The keys of a tile, side by side: bfloat16 [count, dims]."""
    for j in range(count):
        source, target = view(view(keys, KV_TILE, I64)[j] + shift, dims, U16), view(out + 2 * j * dims, dims, U16)
        for d in range(dims):
            target[d] = source[d]


@inner
def _find_tiles(keys, count, shift, dims, stride, is_whole, starts, copies):
    """Where the tiles of 16 keys lie, into int64 [4]: in pages if tiles are whole there, else in a copy.

    Returns the bytes from key to key.
    """
    if not is_whole:
        _copy(keys, (count + ROWS - 1) // ROWS * ROWS, shift, dims, copies)
    for n in range(KV_TILE // ROWS):
        whole = view(keys, KV_TILE, I64)[ROWS * n] + shift
        view(starts, KV_TILE // ROWS, I64)[n] = whole if is_whole else copies + 2 * ROWS * n * dims
    return stride if is_whole else 2 * dims


@inner
def _transpose_values(keys, count, next_keys, next_count, shift, from_key, dims, zeros, rows, values):
    """bfloat16 [dims, 64]: the values of a tile, which lie `from_key` bytes after its keys, and zeros up to 32 or 64.

    The values of the next tile are prefetched meanwhile, unless they are its keys (MLA).
    """
    for j in range(KV_TILE):
        view(rows, KV_TILE, I64)[j] = view(keys, KV_TILE, I64)[j] + shift + from_key if j < count else zeros
    for j in range(0, count, DEPTH):
        for d in range(0, dims, DEPTH):
            transpose_shorts(rows + 8 * j, 2 * d, values + VALUE_STRIDE * d + 2 * j, VALUE_STRIDE)
            if from_key != 0:
                prefetch(next_keys, j, min(j + DEPTH, next_count), shift + from_key + 2 * d, 2 * DEPTH)


@inner
def _work(counter, q, q_stride, heads, out, pool, numbers, step, cut, scale, shapes):
    """One thread of the kernel, as in attention.py: takes units until none is left."""
    block_rows, positions = step[1], positions_of(step)
    (
        k_offset, v_offset, rope_offset, page_bytes, page_size, token_stride, head_stride, rope_stride, kv_heads,
        head_dim, value_dim, rope_dim,
    ) = numbers  # fmt: skip
    _, unit_heads, unit_group, parts = cut
    depth, splits, is_whole = head_dim + rope_dim, kv_heads // unit_heads * parts, page_size % ROWS == 0
    most = (block_rows * unit_group + COLUMNS - 1) // COLUMNS  # groups of 16 queries of a KV head
    most_of_all = most * unit_heads
    # One piece of memory for all that a thread needs, in cache lines: addresses, positions, operands, then float32.
    lines = 41 + most + 32 + 64 + 2 * value_dim + (0 if is_whole else 2 * depth)
    lines += most_of_all * (TILE_BYTES // 64 * depth // DEPTH + value_dim + 2) + max(depth, value_dim) // DEPTH
    scratch = np.empty(64 * lines + 64, np.uint8)
    keys = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    next_keys, rope_keys, next_rope_keys, rows = keys + 512, keys + 1024, keys + 1536, keys + 2048
    starts, rope_starts = keys + 2560, keys + 2592
    lasts = keys + 41 * 64
    scores = lasts + 64 * most
    weights = scores + 4 * TILE_BYTES
    values = weights + 2 * TILE_BYTES
    copies = values + VALUE_STRIDE * value_dim
    operands = copies + (0 if is_whole else 2 * KV_TILE * depth)
    acc = operands + most_of_all * TILE_BYTES // DEPTH * depth
    base = acc + most_of_all * 4 * COLUMNS * value_dim
    total = base + most_of_all * 4 * COLUMNS
    zeros = total + most_of_all * 4 * COLUMNS
    view(zeros, max(depth, value_dim), U16)[:] = 0
    set_shapes(shapes)
    while True:
        index = fetch_add(counter, 1)
        if index >= step[0] * splits:
            break
        start, end, request, last = block_of(step, index // splits)
        unit = unit_of(index % splits, start, end, cut)
        _, first_head, _, _, queries = unit
        groups = (queries + COLUMNS - 1) // COLUMNS
        table, key_plane, rope_plane = (
            table_of(step, request),
            pool + k_offset + first_head * head_stride,
            pool + rope_offset,
        )
        _load_queries(
            unit, cut, q, q_stride, depth, positions, zeros, rows, operands, lasts, base, total, acc, value_dim
        )
        tile, next_count = np.int64(0), min(last + 1, KV_TILE)
        locate(next_keys, tile, next_count, key_plane, table, page_bytes, page_size, token_stride)
        if rope_dim > 0:
            locate(next_rope_keys, tile, next_count, rope_plane, table, page_bytes, page_size, rope_stride)
        while next_count > 0:
            keys, next_keys, rope_keys, next_rope_keys, count = next_keys, keys, next_rope_keys, rope_keys, next_count
            next_count = min(last + 1 - tile - KV_TILE, KV_TILE)
            if next_count > 0:
                after = tile + KV_TILE
                locate(next_keys, after, next_count, key_plane, table, page_bytes, page_size, token_stride)
                if rope_dim > 0:
                    locate(next_rope_keys, after, next_count, rope_plane, table, page_bytes, page_size, rope_stride)
            rope_bytes = np.int64(0)
            if rope_dim > 0:
                rope_copies = copies + 2 * KV_TILE * head_dim
                rope_bytes = _find_tiles(
                    rope_keys, count, np.int64(0), rope_dim, rope_stride, is_whole, rope_starts, rope_copies
                )
                prefetch(next_rope_keys, 0, next_count, 0, 2 * rope_dim)
            for h in range(unit_heads):
                shift = h * head_stride
                key_bytes = _find_tiles(keys, count, shift, head_dim, token_stride, is_whole, starts, copies)
                prefetch(next_keys, 0, next_count, shift, 2 * head_dim)
                _transpose_values(
                    keys, count, next_keys, next_count, shift, v_offset - k_offset, value_dim, zeros, rows, values
                )
                for g in range(groups):
                    own_lasts, n = lasts + 64 * g, h * groups + g
                    lowest, highest = _range_of(own_lasts)
                    seen = min(highest - tile, KV_TILE - 1)
                    if seen < 0:
                        continue
                    tiles = seen // ROWS + 1
                    own_acc = acc + 4 * COLUMNS * value_dim * n
                    score_tiles(
                        tiles, starts, key_bytes, head_dim // DEPTH, rope_starts, rope_bytes, rope_dim // DEPTH,
                        operands + TILE_BYTES // DEPTH * depth * n, scores,
                    )  # fmt: skip
                    softmax_columns(
                        tiles * ROWS, tile, np.int64(lowest - tile < tiles * ROWS - 1), own_lasts, scores, scale,
                        base + 64 * n, total + 64 * n, weights, own_acc, value_dim,
                    )  # fmt: skip
                    add_values((tiles + 1) // 2, value_dim, values, weights, own_acc)
            tile += KV_TILE
        _store_results(unit, cut, out, heads, value_dim, rows, total, acc)
    release_tiles()
    scratch[0] = 0  # numba frees an array after its last use, and an address is no use


@compiled
def _attend(
    gomp, threads, q, q_stride, heads, depth, out, pool, geometry, step, scale, shapes
):  # fmt: skip
    numbers = sizes(geometry)
    cut = cut_units(threads, step[0], step[1], heads, numbers[8], depth + numbers[10])
    args = (
        q, q_stride, heads, out, pool, numbers, step, cut, np.float32(scale), shapes
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def attend(*args: Any) -> None:
    """As attention.py's `_attend`, whose arguments it takes: without the two formats, which are bfloat16."""
    _attend(*args[:-2], _SHAPES_AT)
