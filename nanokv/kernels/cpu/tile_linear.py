"""Matrix products in bfloat16 on tile registers (amx.py): one layout of weights for every number of rows.

Weights lie as [out / 16, in / 2, 16, 2]: for 16 outputs, the pairs of numbers that one pair of x is multiplied with. 32
numbers of `in` are one tile, 1 KiB in a row. A strip is 32 rows by 32 outputs, or up to 16 rows by 64 outputs: as many
sums as there are registers. For few rows the time is that of reading the weights, so the tiles of four blocks of
outputs are read side by side: four streams keep more reads in flight than one.

    y[r, o] = (0 + t[0]) + t[1] + ...      t[i] is the instruction's sum over the i-th 32 numbers

whatever the other rows are, so the bits of a row depend on that row alone.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import amx, emit
from nanokv.kernels.cpu.amx import COLUMNS, DEPTH, ROWS, TILE_BYTES, release_tiles, set_shapes
from nanokv.kernels.cpu.arena import allocate
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.emit import FLOAT, SHORT
from nanokv.kernels.cpu.intrinsics import fetch_add
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for

ROW_BLOCK = np.int64(512)
"""Rows that are multiplied with one strip of weights after another: they stay in the second-level cache."""
UNIT_BLOCKS = 12
"""Most blocks of 16 outputs in a unit of work: long runs of memory, few enough to balance the load."""
PREFETCH_BYTES = 8192
"""From the tile in use to the one that is prefetched: the hardware's own prefetch stops at each page of 4 KiB."""
_KINDS = {1: 4, 2: 2}  # tiles of rows of a strip -> most tiles of outputs
X, W = 4, 6  # the first registers of x and of weights; the sums lie below
# The shapes of the registers (sums, then x, then weights) for a low and a tall strip, by the rows of its last tile.
_SHAPES = np.array(
    [
        [amx.shapes([rows] * 6 + [16] * 2) for rows in range(17)],
        [amx.shapes([16, 16, rows, rows, 16, rows, 16, 16]) for rows in range(17)],
    ]
)
_SHAPES_AT = _SHAPES.ctypes.data


def _emit_strip(builder, tall, wide, x, x_stride, w, block_bytes, sums, steps):
    """The loop over the depth for `tall` tiles of rows and `wide` tiles of outputs.

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
            place = builder.add(builder.add(w, builder.mul(block_bytes, index(n))), builder.shl(step, index(10)))
            amx.load(builder, W + n % 2, place, index(64))
            if tall == 1:
                for line in range(0, TILE_BYTES, 64):
                    ahead = builder.add(place, index(PREFETCH_BYTES + line))
                    emit.prefetch(builder, builder.inttoptr(ahead, ir.IntType(8).as_pointer()), 2)
            for r, register in enumerate(rows):
                amx.multiply(builder, r * most + n, register, W + n % 2)

    amx.in_turns(builder, steps, multiply)
    for r in range(tall):
        for n in range(wide):
            place = builder.add(sums, index(4 * COLUMNS * (ROWS * most * r + n)))
            amx.store(builder, r * most + n, place, index(4 * COLUMNS * most))


def _strip(tall):
    @emit.function(*[types.int64] * 7)
    def strip(builder, wide, x, x_stride, w, block_bytes, sums, steps):
        def body(count):
            _emit_strip(builder, tall, count, x, x_stride, w, block_bytes, sums, steps)

        emit.switch(builder, wide, range(1, _KINDS[tall] + 1), body)

    return strip


_low_strip, _tall_strip = _strip(1), _strip(2)


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
            emit.store(builder, emit.narrow(builder, total, types.uint16), target, column)


@inner
def _work(counter, x, x_stride, w, bias, y, rows, steps, blocks, group, shapes):
    """One thread of the kernel: takes units (a block of rows, a group of outputs) until none is left."""
    groups, block_bytes, y_stride = (blocks + group - 1) // group, steps * TILE_BYTES, blocks * COLUMNS * 2
    units, shape = groups * ((rows + ROW_BLOCK - 1) // ROW_BLOCK), np.int64(-1)
    scratch = np.empty(16 * 64 + 16, np.float32)
    sums = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
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
            own_bias = bias + block * COLUMNS * 2 if bias != 0 else bias
            row = start
            while row < stop:
                size = min(stop - row, 2 * ROWS)
                is_tall = size > ROWS
                wanted = size - ROWS + 17 if is_tall else size  # a row of _SHAPES
                if wanted != shape:
                    set_shapes(shapes + 64 * wanted)
                    shape = wanted
                source, weights = x + row * x_stride, w + block * block_bytes
                if is_tall:
                    _tall_strip(count, source, x_stride, weights, block_bytes, sums, steps)
                else:
                    _low_strip(count, source, x_stride, weights, block_bytes, sums, steps)
                stride = 4 * COLUMNS * (2 if is_tall else 4)
                _round(size, count, sums, stride, own_bias, y + row * y_stride + block * COLUMNS * 2, y_stride)
                row += size
    release_tiles()
    scratch[0] = 0  # numba frees an array after its last use, and an address is no use


@compiled
def _multiply(gomp, threads, x, x_stride, w, bias, y, rows, steps, blocks, shapes):
    # Each thread has as many equal groups as UNIT_BLOCKS demands, at least two: so all threads end together.
    group = -(-blocks // (threads * max(2, -(-blocks // (threads * UNIT_BLOCKS)))))
    args = (x, x_stride, w, bias, y, rows, steps, blocks, min(group, blocks), shapes)
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


def multiply(x: torch.Tensor, tiles: torch.Tensor, out: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] bfloat16 times the packed [out, in], transposed, plus bias [out]: [rows, out] bfloat16."""
    (rows, width), (blocks, pairs, _, _) = x.shape, tiles.shape
    if x.dtype is not torch.bfloat16 or width != 2 * pairs:
        raise TypeError(f"linear: x is {x.dtype} [{rows}, {width}], expected bfloat16 [rows, {2 * pairs}]")
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(rows, blocks * COLUMNS)
    if bias is not None and out % COLUMNS:
        bias = torch.nn.functional.pad(bias, (0, -out % COLUMNS))
    if rows:
        threads = threads_for(rows * blocks * pairs / 1e4 + blocks * pairs / 1e3)
        _multiply(
            GOMP, threads, x.data_ptr(), 2 * x.stride(0), tiles.data_ptr(), 0 if bias is None else bias.data_ptr(),
            y.data_ptr(), rows, pairs // 16, blocks, _SHAPES_AT,
        )  # fmt: skip
    return y if blocks * COLUMNS == out else y[:, :out].contiguous()
