"""The two products of attention on tile registers (amx.py), for 16 queries and a KV tile of up to 64 keys.

Registers 0 to 3 hold sums, 4 and 5 tiles of queries or weights, 6 and 7 tiles of keys or values. Both of a pair are
used in turn: a load waits until products have read the register, which doubles the time of a loop that has only one.
All places are addresses.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import amx, emit
from nanokv.kernels.cpu.amx import TILE_BYTES

SUMS, B, A = 4, 4, 6
VALUE_STRIDE = 128  # bytes of 64 values


def _next_to(builder: ir.IRBuilder, place: ir.Value, step: ir.Value, num_bytes: int) -> ir.Value:
    return builder.add(place, builder.mul(step, step.type(num_bytes)))


@emit.function(*[types.int64] * 9)
def score_tiles(builder, count, keys, stride, steps, rope_keys, rope_stride, rope_steps, queries, scores):
    """scores = K @ q transposed, for `count` tiles of 16 keys: float32 [16 * count, 16 queries].

    keys      int64 [4]: where the first key of each tile lies, the next one `stride` bytes further
    steps     of 32 dims; those of rope keys follow
    queries   bfloat16 [steps + rope_steps, 16 pairs, 16, 2]
    """
    index = count.type

    def add(tiles, rows, row_bytes, number, operand):
        rows = builder.inttoptr(rows, index.as_pointer())
        starts = [builder.load(builder.gep(rows, [index(n)], source_etype=index), typ=index) for n in range(tiles)]

        def multiply(step, turn):
            amx.load(builder, B + turn, _next_to(builder, operand, step, TILE_BYTES), index(64))
            for tile, start in enumerate(starts):
                amx.load(builder, A + tile % 2, _next_to(builder, start, step, 64), row_bytes)
                amx.multiply(builder, tile, A + tile % 2, B + turn)

        amx.in_turns(builder, number, multiply)

    def body(tiles):
        for tile in range(tiles):
            amx.zero(builder, tile)
        add(tiles, keys, stride, steps, queries)
        add(tiles, rope_keys, rope_stride, rope_steps, _next_to(builder, queries, steps, TILE_BYTES))
        for tile in range(tiles):
            amx.store(builder, tile, builder.add(scores, index(TILE_BYTES * tile)), index(64))

    emit.switch(builder, count, range(1, SUMS + 1), body)


@emit.function(*[types.int64] * 5)
def add_values(builder, steps, dims, values, weights, acc):
    """acc += V transposed @ weights, over `steps` (1 or 2) tiles of 32 keys: float32 [dims, 16 queries].

    dims      a multiple of 32
    values    bfloat16 [dims, 64 keys]
    weights   bfloat16 [steps, 16 pairs, 16, 2]
    """
    index = steps.type

    def add(first, tiles):
        sums = _next_to(builder, acc, first, 64)
        for tile in range(tiles):
            amx.load(builder, tile, builder.add(sums, index(TILE_BYTES * tile)), index(64))
        rows = _next_to(builder, values, first, VALUE_STRIDE)

        def multiply(step, turn):
            amx.load(builder, B + turn, _next_to(builder, weights, step, TILE_BYTES), index(64))
            for tile in range(tiles):
                place = builder.add(_next_to(builder, rows, step, 64), index(16 * VALUE_STRIDE * tile))
                amx.load(builder, A + tile % 2, place, index(VALUE_STRIDE))
                amx.multiply(builder, tile, A + tile % 2, B + turn)

        amx.in_turns(builder, steps, multiply)
        for tile in range(tiles):
            amx.store(builder, tile, builder.add(sums, index(TILE_BYTES * tile)), index(64))

    whole = builder.and_(dims, index(-64))
    for start, stop, tiles in ((index(0), whole, 4), (whole, dims, 2)):
        with cgutils.for_range_slice(builder, start, stop, index(16 * tiles), index) as (first, _):
            add(first, tiles)
