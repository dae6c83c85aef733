"""Matrix products in bfloat16 on tile registers (amx.py): one layout of weights for every number of rows.

Weights lie as [out / 16, in / 2, 16, 2]: for 16 outputs, the pairs of numbers that one pair of x is multiplied with. 32
numbers of `in` are one tile, 1 KiB in a row. A strip is 32 rows by 32 outputs, or up to 16 rows by 64 outputs: as many
sums as there are registers. For few rows the time is that of reading the weights, so the tiles of four blocks of
outputs are read side by side: four streams keep more reads in flight than one.

    y[r, o] = (0 + t[0]) + t[1] + ...      t[i] is the instruction's sum over the i-th 32 numbers

whatever the other rows are, so the bits of a row depend on that row alone.

Groups of codes (q8_groups.py) become such tiles in the first-level cache, a step before they are multiplied; for more
than 16 rows, a strip of them once for all rows of a block. So they give the bits of the decoded weight.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import amx, emit, q8_groups
from nanokv.kernels.cpu.amx import COLUMNS, DEPTH, ROWS, TILE_BYTES, release_tiles, set_shapes
from nanokv.kernels.cpu.arena import allocate
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.emit import FLOAT, SHORT
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.q8_groups import CODES

ROW_BLOCK = np.int64(512)
"""Rows that are multiplied with one strip of weights after another: they stay in the second-level cache."""
UNIT_BLOCKS = 12
"""Most blocks of 16 outputs in a unit of work: long runs of memory, few enough to balance the load."""
AHEAD = 8
"""Steps from the tile in use to the one that is prefetched."""
_KINDS = {1: 4, 2: 2}  # tiles of rows of a strip -> most tiles of outputs
X, W = 4, 6  # the first registers of x and of weights; the sums lie below
# The shapes of the registers (sums, then x, then weights) for a low and a tall strip, by the rows of its last tile.
SUM_BYTES = 4 * 64 * ROWS
_SHAPES = np.array(
    [
        [amx.shapes([rows] * 6 + [16] * 2) for rows in range(17)],
        [amx.shapes([16, 16, rows, rows, 16, rows, 16, 16]) for rows in range(17)],
    ]
)
_SHAPES_AT = _SHAPES.ctypes.data


def _emit_prefetch(builder, wide, place, step, steps, block_bytes, size):
    """Prefetches the tile or group that is read AHEAD steps after the one at `place`: of the same block, or of the one
    that the next strip has in its place. The hardware's own prefetch stops at each page of 4 KiB."""
    index = steps.type
    is_next = builder.icmp_signed(">=", builder.add(step, index(AHEAD)), steps)
    skipped = builder.select(is_next, builder.mul(block_bytes, index(wide - 1)), index(0))
    place = builder.add(place, skipped)
    for line in range(0, size, 64):
        address = builder.add(place, index(AHEAD * size + line))
        emit.prefetch(builder, builder.inttoptr(address, ir.IntType(8).as_pointer()), 2)


def _stored_tiles(builder, wide, w, block_bytes, steps, prefetched):
    """tile_at of weights that lie as tiles."""

    def tile_at(step, turn, n):
        place = builder.add(builder.add(w, builder.mul(block_bytes, step.type(n))), builder.shl(step, step.type(10)))
        if prefetched:
            _emit_prefetch(builder, wide, place, step, steps, block_bytes, TILE_BYTES)
        return place

    return tile_at


def _decoded_tiles(builder, wide, w, block_bytes, steps, room):
    """tile_at of groups of codes: the next step of a block is decoded into `room`, beside the step in use."""
    index, size = steps.type, q8_groups.GROUP_BYTES

    def slot(turn, n):
        return builder.add(room, index(TILE_BYTES * (2 * n + turn)))

    def decode(step, turn, n):
        group = builder.add(builder.add(w, builder.mul(block_bytes, index(n))), builder.mul(step, index(size)))
        _emit_prefetch(builder, wide, group, step, steps, block_bytes, size)
        q8_groups.emit_tile(builder, group, slot(turn, n))

    def tile_at(step, turn, n):
        following = builder.add(step, index(1))
        with builder.if_then(builder.icmp_signed("<", following, steps)):
            decode(following, 1 - turn, n)
        return slot(turn, n)

    for n in range(wide):
        decode(index(0), 0, n)
    return tile_at


def _emit_strip(builder, tall, wide, x, x_stride, sums, steps, tile_at):
    """The loop over the depth for `tall` tiles of rows and `wide` tiles of outputs.

    tile_at(step, turn, n)   emits what makes the tile of a step of block n readable; returns its address
    Registers of x and of weights are used in turn: a load waits until products have read its register.
    """
    index, most = steps.type, _KINDS[tall]
    for r in range(tall):
        for n in range(wide):
            amx.zero(builder, r * most + n)

    def multiply(step, turn):
        at = builder.add(x, builder.mul(step, index(2 * DEPTH)))
        rows = [X + r if tall > 1 else X + turn for r in range(tall)]
        for r, register in enumerate(rows):
            amx.load(builder, register, builder.add(at, builder.mul(x_stride, index(ROWS * r))), x_stride)
        for n in range(wide):
            amx.load(builder, W + n % 2, tile_at(step, turn, n), index(64))
            for r, register in enumerate(rows):
                amx.multiply(builder, r * most + n, register, W + n % 2)

    amx.in_turns(builder, steps, multiply)
    for r in range(tall):
        for n in range(wide):
            place = builder.add(sums, index(4 * COLUMNS * (ROWS * most * r + n)))
            amx.store(builder, r * most + n, place, index(4 * COLUMNS * most))


@emit.function(*[types.int64] * 8, None)
def _low_strip(builder, wide, x, x_stride, w, block_bytes, sums, steps, room, element):
    """Up to 16 rows by `wide` <= 4 blocks of outputs; weights are tiles or groups of codes."""

    def body(count):
        if element == types.int8:
            tile_at = _decoded_tiles(builder, count, w, block_bytes, steps, room)
        else:
            tile_at = _stored_tiles(builder, count, w, block_bytes, steps, prefetched=True)
        _emit_strip(builder, 1, count, x, x_stride, sums, steps, tile_at)

    emit.switch(builder, wide, range(1, _KINDS[1] + 1), body)


@emit.function(*[types.int64] * 7)
def _tall_strip(builder, wide, x, x_stride, w, block_bytes, sums, steps):
    """17 to 32 rows by `wide` <= 2 blocks of outputs; weights are tiles."""

    def body(count):
        tile_at = _stored_tiles(builder, count, w, block_bytes, steps, prefetched=False)
        _emit_strip(builder, 2, count, x, x_stride, sums, steps, tile_at)

    emit.switch(builder, wide, range(1, _KINDS[2] + 1), body)


@emit.function(*[types.int64] * 3, None, result=types.int64)
def _tiles_of(builder, w, groups, room, element):
    """The address of the tiles at w: w itself, or `room`, where so many groups of codes are decoded."""
    if element != types.int8:
        return w
    q8_groups.emit_tiles(builder, groups, w, room)
    return room


@emit.function(None, result=types.int64)
def _bytes_of(builder, element):
    """Bytes of 16 outputs by 32 numbers: a tile, or a group of codes."""
    return ir.IntType(64)(q8_groups.GROUP_BYTES if element == types.int8 else TILE_BYTES)


@emit.function(*[types.int64] * 7)
def _round(builder, rows, blocks, sums, sums_stride, bias, y, y_stride):
    """y = sums + bias in bfloat16. bias: address of bfloat16 [blocks * 16], or 0. Strides in bytes."""
    index, zero = rows.type, rows.type(0)
    with cgutils.for_range(builder, blocks) as n:
        column = builder.mul(n.index, index(COLUMNS))
        added = cgutils.alloca_once_value(builder, emit.constant(ir.VectorType(FLOAT, COLUMNS), 0.0))
        with builder.if_then(builder.icmp_signed("!=", bias, zero)):
            builder.store(emit.widen(builder, emit.load(builder, bias, column, SHORT, COLUMNS), types.uint16), added)
        plus = builder.load(added)
        with cgutils.for_range(builder, rows) as r:
            source = builder.add(sums, builder.mul(r.index, sums_stride))
            target = builder.add(y, builder.mul(r.index, y_stride))
            total = builder.fadd(emit.load(builder, source, column, FLOAT, COLUMNS), plus)
            emit.store(builder, amx.round_one(builder, total), target, column)


@inner
def _work(counter, x, x_stride, w, bias, y, rows, steps, blocks, group, shapes, room, format):
    """One thread of the kernel: takes units (a block of rows, a group of outputs) until none is left."""
    groups, block_bytes, y_stride = (blocks + group - 1) // group, steps * _bytes_of(format), blocks * COLUMNS * 2
    units, shape = groups * ((rows + ROW_BLOCK - 1) // ROW_BLOCK), np.int64(-1)
    scratch = np.empty(SUM_BYTES + room + 64, np.uint8)
    sums = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    decoded = sums + SUM_BYTES  # of a strip for tall ones; low ones come last, and begin anew
    while True:
        unit = fetch_add(counter, 1)
        if unit >= units:
            break
        start, first = unit // groups * ROW_BLOCK, unit % groups * group
        stop, last = min(start + ROW_BLOCK, rows), min(first + group, blocks)
        tall = stop - start > ROWS
        wide = np.int64(2) if tall else np.int64(4)
        for block in range(first, last, wide):
            count = min(last - block, wide)
            weights = w + block * block_bytes
            tiles = _tiles_of(weights, count * steps, decoded, format) if tall else weights
            own_bias = bias + block * COLUMNS * 2 if bias != 0 else bias
            row = start
            while row < stop:
                size = min(stop - row, 2 * ROWS)
                is_tall = size > ROWS
                wanted = size - ROWS + 17 if is_tall else size  # a row of _SHAPES
                if wanted != shape:
                    set_shapes(shapes + 64 * wanted)
                    shape = wanted
                source = x + row * x_stride
                if is_tall:
                    _tall_strip(count, source, x_stride, tiles, steps * TILE_BYTES, sums, steps)
                else:
                    _low_strip(count, source, x_stride, weights, block_bytes, sums, steps, decoded, format)
                stride = 4 * COLUMNS * (2 if is_tall else 4)
                _round(size, count, sums, stride, own_bias, y + row * y_stride + block * COLUMNS * 2, y_stride)
                row += size
    release_tiles()
    scratch[0] = 0  # numba frees an array after its last use, and an address is no use


@compiled
def _multiply(gomp, threads, x, x_stride, w, bias, y, rows, steps, blocks, shapes, room, format):
    # Each thread has as many equal groups as UNIT_BLOCKS demands, at least two: so all threads end together.
    group = -(-blocks // (threads * max(2, -(-blocks // (threads * UNIT_BLOCKS)))))
    args = (x, x_stride, w, bias, y, rows, steps, blocks, min(group, blocks), shapes, room, format.dtype)
    parallel_for(gomp, threads, _work, args)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16 [out, in] -> [ceil(out / 16), in / 2, 16, 2], a copy; missing outputs are 0."""
    out, depth = weight.shape
    tiles = allocate((-(-out // COLUMNS), depth // 2, COLUMNS, 2), weight.dtype)
    whole = out // COLUMNS
    tiles[:whole] = weight[: whole * COLUMNS].reshape(whole, COLUMNS, depth // 2, 2).transpose(1, 2)
    if out % COLUMNS:
        tiles[whole] = 0
        tiles[whole, :, : out % COLUMNS] = weight[whole * COLUMNS :].reshape(-1, depth // 2, 2).transpose(0, 1)
    return tiles


def unpack(tiles: torch.Tensor, out: int) -> torch.Tensor:
    """The weight [out, in] that was packed."""
    blocks, pairs, _, _ = tiles.shape
    return tiles.transpose(1, 2).reshape(blocks * COLUMNS, 2 * pairs)[:out]


def embed(tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int64) of the weight that was packed, bfloat16."""
    return tiles[ids // COLUMNS, :, ids % COLUMNS].flatten(1)


def multiply(x: torch.Tensor, weights: torch.Tensor, out: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] bfloat16 times a packed [out, in], transposed, plus bias [out]: [rows, out] bfloat16.

    weights   tiles as of `pack`, or groups of codes as of `q8_groups.pack`
    """
    coded, (rows, width), blocks = weights.dtype is torch.uint8, x.shape, len(weights)
    steps = weights.shape[1] if coded else weights.shape[1] // (DEPTH // 2)
    if x.dtype is not torch.bfloat16 or width != DEPTH * steps:
        raise TypeError(f"linear: x is {x.dtype} [{rows}, {width}], expected bfloat16 [rows, {DEPTH * steps}]")
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(rows, blocks * COLUMNS)
    if bias is not None and out % COLUMNS:
        bias = torch.nn.functional.pad(bias, (0, -out % COLUMNS))
    if rows:
        threads = threads_for(rows * blocks * steps / 625 + blocks * steps / 62.5)
        room = TILE_BYTES * max(2 * _KINDS[1], _KINDS[2] * steps) if coded else 0
        _multiply(
            GOMP, threads, x.data_ptr(), 2 * x.stride(0), weights.data_ptr(), 0 if bias is None else bias.data_ptr(),
            y.data_ptr(), rows, steps, blocks, _SHAPES_AT, room, CODES if coded else FORMAT[torch.bfloat16],
        )  # fmt: skip
    return y if blocks * COLUMNS == out else y[:, :out].contiguous()
