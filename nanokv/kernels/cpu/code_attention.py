"""Attention on codes on a CPU: as attention.py, over tiles of codes (code_tile.py).

Codes are decoded to float32 once a KV head and tile, for all queries of a unit. Sums add in the order of attention.py,
so here, too, the bits of a row depend on that row alone. Tiles of unquantized pages (KIVI) follow those of codes: they
begin where these pages do, which the position of a row decides.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.attention_units import (
    I32,
    block_of,
    cut_units,
    load_queries,
    positions_of,
    set_limits,
    store_results,
    table_of,
    unit_of,
)
from nanokv.kernels.cpu.code_tile import locate_codes, locate_tokens, prefetch_codes, pv_codes, qk_codes
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, sizes, view
from nanokv.kernels.cpu.kv_tile import DIM_TILE, F32, KV_TILE, LANES, locate, online_softmax, pv, qk
from nanokv.kernels.cpu.lookup import split_table
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.row_blocks import row_blocks_of
from nanokv.kernels.planes import GROUPS, LOOKUP, CodePlane, CodePlanes, GroupPlanes, KVPlanes, OwnPages

_NO_PAGES = 0, np.zeros(12, np.int64), 0, 0, 0


@inner
def _with_room(plane, room):
    """A plane whose table lies in the memory of a thread: split as lookup.py reads it, or the steps of a tile."""
    if plane[5] == LOOKUP:
        split_table(plane[6], 1 << plane[3], room)
    elif plane[5] != GROUPS:
        return plane
    return (*plane[:6], room, *plane[7:])


@inner
def _attend_own(unit, first, last, table, positions, own, scale, q, acc, total, best, rooms, format):
    """Adds the unquantized keys first .. last and their values to the results of a unit, whose dims are equal."""
    address, numbers = own
    k_offset, v_offset, page_bytes, page_size, token_stride, head_stride, dim = (
        numbers[0], numbers[1], numbers[3], numbers[4], numbers[5], numbers[6], numbers[9]
    )  # fmt: skip
    keys, limits, scores, k, v, unit_heads = rooms
    queries = unit[4]
    for tile in range(first, last + 1, KV_TILE):
        count = min(last + 1 - tile, KV_TILE)
        set_limits(unit, positions, tile, count, limits)
        for h in range(unit_heads):
            at, plane = h * queries, address + k_offset + (unit[1] + h) * head_stride
            head_q, head_acc = q + 4 * at * dim, acc + 4 * at * dim
            locate(keys, tile, count, plane, table, page_bytes, page_size, token_stride)
            view(scores, KV_TILE * queries, F32)[:] = ZERO
            none = np.int64(0)
            qk(keys, count, keys, none, none, dim, head_q, dim, queries, limits, k, scores, format)
            online_softmax(queries, limits, scale, scores, head_acc, dim, total + 4 * at * LANES, best + 4 * at)
            pv(
                keys, count, keys, none, none, v_offset - k_offset, dim, queries, limits, scores, v, head_acc, dim,
                format,
            )  # fmt: skip


@inner
def _work(counter, q, q_stride, heads, out, pool, shape, k_plane, v_plane, step, own, cut, scale, q_format, own_format):
    """One thread of the kernel, as in attention.py: takes units until none is left.

    own   of unquantized pages: address, KVPlanes.geometry, address of their starts (0: there are none), width and
          address of their tables
    """
    block_rows, positions = step[1], positions_of(step)
    page_bytes, page_size, kv_heads = shape
    _, unit_heads, unit_group, parts = cut
    depth, value_dim, splits = k_plane[4], v_plane[4], kv_heads // unit_heads * parts
    widest, of_head = max(depth, value_dim), block_rows * unit_group
    most, bounds = of_head * unit_heads, (of_head + 7) // 8 * 8
    # One piece of memory for all that a thread needs, in cache lines of its own: addresses and limits, tables, codes,
    # then float32.
    floats = KV_TILE * (2 * DIM_TILE + 2 + of_head) + most * (depth + value_dim + LANES + 1)
    rooms = 64 + 2 * 4 * widest  # in words of 8 bytes, for a table or the steps of a tile each
    scratch = np.zeros(6 * KV_TILE + bounds + rooms + 2 * KV_TILE * widest // 8 + floats // 2 + 16, np.int64)
    pages = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    next_pages, slots, next_slots = pages + 8 * KV_TILE, pages + 16 * KV_TILE, pages + 24 * KV_TILE
    rows, high_rows, limits = pages + 32 * KV_TILE, pages + 40 * KV_TILE, pages + 48 * KV_TILE
    k_room = limits + 8 * bounds
    v_room = k_room + 4 * rooms
    transposed = v_room + 4 * rooms
    unpacked = transposed + KV_TILE * widest
    k = unpacked + KV_TILE * widest
    v = k + 4 * KV_TILE * DIM_TILE
    k_scales, v_scales = v + 4 * KV_TILE * DIM_TILE, v + 4 * KV_TILE * (DIM_TILE + 1)
    scores = v_scales + 4 * KV_TILE
    wide_q = scores + 4 * KV_TILE * of_head
    acc = wide_q + 4 * most * depth
    total = acc + 4 * most * value_dim
    best = total + 4 * most * LANES
    k_plane, v_plane = _with_room(k_plane, k_room), _with_room(v_plane, v_room)
    memory, own_numbers, own_starts, own_width, own_tables = own
    while True:
        index = fetch_add(counter, 1)
        if index >= step[0] * splits:
            break
        start, end, request, last = block_of(step, index // splits)
        unit = unit_of(index % splits, start, end, cut)
        _, first_head, _, _, queries = unit
        table = table_of(step, request)
        load_queries(unit, cut, q, q_stride, depth, q_format, wide_q, best, acc, value_dim, total)
        coded = view(own_starts, request + 1, I32)[request] * page_size if own_starts != 0 else last + 1
        tile, next_count = np.int64(0), min(coded, KV_TILE)
        if next_count > 0:
            locate_tokens(next_pages, next_slots, tile, next_count, pool, table, page_bytes, page_size)
        while next_count > 0:
            pages, next_pages, slots, next_slots, count = next_pages, pages, next_slots, slots, next_count
            next_count = min(coded - tile - KV_TILE, KV_TILE)
            if next_count > 0:
                locate_tokens(next_pages, next_slots, tile + KV_TILE, next_count, pool, table, page_bytes, page_size)
            set_limits(unit, positions, tile, count, limits)
            for h in range(unit_heads):
                at, head = h * queries, first_head + h
                head_q, head_acc = wide_q + 4 * at * depth, acc + 4 * at * value_dim
                view(scores, KV_TILE * queries, F32)[:] = ZERO
                prefetch_codes(next_pages, next_slots, next_count, head, page_size, k_plane, True)
                width, bits = locate_codes(
                    pages, slots, head, page_size, k_plane, True, rows, high_rows, k_scales, unpacked
                )
                qk_codes(rows, width, bits, k_plane, k_scales, head_q, queries, limits, transposed, k, scores)
                online_softmax(
                    queries, limits, scale, scores, head_acc, value_dim, total + 4 * at * LANES, best + 4 * at
                )
                prefetch_codes(next_pages, next_slots, next_count, head, page_size, v_plane, False)
                width, bits = locate_codes(
                    pages, slots, head, page_size, v_plane, False, rows, high_rows, v_scales, unpacked
                )
                pv_codes(rows, width, bits, v_plane, v_scales, queries, limits, scores, v, head_acc)
            tile += KV_TILE
        if own_starts != 0:
            own_table = view(own_tables + 4 * own_width * request, own_width, I32)
            _attend_own(
                unit, coded, last, own_table, positions, (memory, own_numbers), scale, wide_q, acc, total, best,
                (pages, limits, scores, k, v, unit_heads), own_format,
            )  # fmt: skip
        store_results(unit, cut, acc, value_dim, total, out, heads, value_dim, q_format)
    scratch[0] = 0  # numba frees an array after its last use, and an address is no use


@compiled
def _attend(
    gomp, threads, q, q_stride, heads, out, pool, shape, k_plane, v_plane, step, own, scale,
    q_format, own_format,
):  # fmt: skip
    places = (own[0], sizes(own[1]), own[2], own[3], own[4])
    cut = cut_units(threads, step[0], step[1], heads, shape[2], k_plane[4] + v_plane[4])
    args = (
        q, q_stride, heads, out, pool, shape, k_plane, v_plane, step, places, cut,
        np.float32(scale), q_format.dtype, own_format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def _plane(plane: CodePlane) -> tuple[int, ...]:
    numbers = plane.offset, plane.high_offset, plane.scale_offset, plane.bits, plane.dim
    return *numbers, plane.form, plane.table.data_ptr(), 0, plane.dim


def _run(op, q, pool, planes, k_plane, v_plane, own, own_dtype, batch, scale) -> torch.Tensor:
    """Checks shapes and attends. k_plane, v_plane: as code_tile.py takes them."""
    step = row_blocks_of(batch)
    rows, heads, depth = q.shape
    q_stride, head_stride, dim_stride = q.stride()
    k_dim, v_dim = k_plane[4], v_plane[4]
    if depth != k_dim or heads % planes.kv_heads or head_stride != depth or dim_stride != 1:
        raise ValueError(f"{op}: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    if k_dim % 16 or v_dim % 16:
        raise ValueError(f"{op}: dims {k_dim} and {v_dim}; allowed are multiples of 16")
    out = q.new_empty(rows, heads * v_dim)
    if rows == 0:
        return out
    _attend(
        GOMP, threads_for(step.cost * heads * (depth + v_dim) * 2e-3), q.data_ptr(), q_stride, heads, out.data_ptr(),
        pool.data_ptr(), (planes.page_bytes, planes.page_size, planes.kv_heads), k_plane, v_plane, step.arguments,
        own, scale / math.log(2), FORMAT[q.dtype],
        FORMAT[own_dtype],
    )  # fmt: skip
    return out


def code_attention(q: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.code_attention, for dims that are multiples of 16."""
    sides, own = (_plane(planes.k), _plane(planes.v)), _NO_PAGES
    return _run("code_attention", q, pool, planes, *sides, own, torch.float32, batch, scale)


def group_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    planes: GroupPlanes,
    memory: torch.Tensor,
    own_planes: KVPlanes,
    own: OwnPages,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """As reference.group_attention, for dims that are multiples of 16 and pages of 32 or 64 tokens."""
    k = planes.k_codes, 0, planes.k_step, planes.bits, planes.dim, GROUPS, 0, planes.k_low, planes.dim
    v = planes.v_codes, 0, planes.v_step, planes.bits, planes.dim, GROUPS, 0, planes.v_low, planes.group
    starts, tables = own.starts.contiguous(), own.tables.contiguous()
    places = (
        memory.data_ptr(), own_planes.geometry, starts.data_ptr(), tables.shape[1], tables.data_ptr(),
    )  # fmt: skip
    return _run("group_attention", q, pool, planes, k, v, places, own_planes.dtype, batch, scale)
