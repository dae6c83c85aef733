"""An online softmax down the columns of scores [keys, 16 queries], whose weights become an operand of tile registers.

A vector holds the scores of 16 queries with one key. No sum and no maximum crosses lanes, so the results of a query
depend neither on its lane nor on the other lanes. Weights are relative to the base of a query, a number that its scores
do not exceed by more than HEADROOM:

    weight = 2**(score - base)      sum = sum * fade + weights, by rows modulo 4      fade = 2**(old base - base)
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import amx, emit
from nanokv.kernels.cpu.emit import FLOAT, INT, SHORT, constant
from nanokv.kernels.cpu.exp import SHIFT, emit_exp2

HEADROOM = 8.0
"""Weights of up to 2**8 lose no precision, and a base that seldom moves saves the scaling of sums."""
# Minimax coefficients of 2**r on [-1/2, 1/2], the constant exactly 1: the error is below 1.1e-4.
_COEFFICIENTS = (0.05500897, 0.24221106, 0.69328293, 1.0)
_FLOATS, _WORDS = ir.VectorType(FLOAT, 16), ir.VectorType(INT, 16)


def _by_fours(builder: ir.IRBuilder, rows: ir.Value, first: float, body: Callable) -> list[ir.Value]:
    """body(row, value) for each row, which gives the next of 4 values (rows modulo 4); they start from `first`."""
    places = [cgutils.alloca_once_value(builder, constant(_FLOATS, first)) for _ in range(4)]
    with cgutils.for_range_slice(builder, rows.type(0), rows, rows.type(4), rows.type) as (row, _):
        values = body([builder.add(row, rows.type(n)) for n in range(4)], [builder.load(place) for place in places])
        for place, value in zip(places, values, strict=True):
            builder.store(value, place)
    return [builder.load(place) for place in places]


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _row(builder: ir.IRBuilder, scores: ir.Value, row: ir.Value) -> ir.Value:
    return emit.load(builder, scores, builder.shl(row, row.type(4)), FLOAT, 16)


def _pairs(builder: ir.IRBuilder, even: ir.Value, odd: ir.Value) -> ir.Value:
    """16 words of two bfloat16, rounded to even; numbers below 2**-126 become 0."""
    both = amx.round_both(builder, even, odd)
    order = ir.Constant(ir.VectorType(INT, 32), [n // 2 + 16 * (n % 2) for n in range(32)])
    return builder.bitcast(builder.shuffle_vector(both, both, order), _WORDS)


def _power(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x, to 2**-13 of it, which the rounding to bfloat16 hides; exactly 0 from -127 down."""
    floor = constant(_FLOATS, -127.0)
    x = builder.select(builder.fcmp_ordered(">", floor, x), floor, x)  # a NaN stays
    shifted = builder.fadd(x, constant(_FLOATS, SHIFT))
    r = builder.fsub(x, builder.fsub(shifted, constant(_FLOATS, SHIFT)))
    p = constant(_FLOATS, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = emit.fma(builder, p, r, constant(_FLOATS, coefficient))
    # As in exp.py, the integer moves to the exponent. 1 * 2**-127 has the bits of 0.
    power = builder.shl(builder.bitcast(shifted, _WORDS), constant(_WORDS, 23))
    return builder.bitcast(builder.add(builder.bitcast(p, _WORDS), power), _FLOATS)


def _mask(builder: ir.IRBuilder, rows: ir.Value, first: ir.Value, last: ir.Value, scores: ir.Value) -> None:
    """Scores of keys after the last key that a query sees become -inf, whatever they are."""
    limit = emit.load(builder, last, rows.type(0), INT, 16)
    with cgutils.for_range(builder, rows) as loop:
        key = emit.broadcast(builder, builder.trunc(builder.add(first, loop.index), INT), 16)
        seen = builder.icmp_signed("<=", key, limit)
        own = builder.select(seen, _row(builder, scores, loop.index), constant(_FLOATS, float("-inf")))
        emit.store(builder, own, scores, builder.shl(loop.index, rows.type(4)))


@emit.function(*[types.int64] * 5, types.float32, *[types.int64] * 5)
def softmax_columns(builder, rows, first, masked, last, scores, scale, base, total, weights, acc, dims):
    """Weights of `rows` keys, a multiple of 16; the sums of each query fade if its base moves.

    first, masked, last   if masked, query n sees the keys first, first + 1, .. up to last[n] only: int32 [16]
    scores                float32 [rows, 16], scaled here
    base, total           float32 [16]; -inf and 0 before the first keys
    weights               bfloat16 pairs [rows / 2, 16, 2]; the rest of 32 rows is 0
    acc                   float32 [dims, 16]: sums of values
    All but first, masked, dims and scale are addresses.
    """
    index, zero = rows.type, rows.type(0)
    with builder.if_then(builder.icmp_signed("!=", masked, zero)):
        _mask(builder, rows, first, last, scores)
    scale = emit.broadcast(builder, scale, 16)

    def highest(keys, values):
        return [_larger(builder, _row(builder, scores, key), value) for key, value in zip(keys, values, strict=True)]

    a, b, c, d = _by_fours(builder, rows, float("-inf"), highest)
    top = builder.fmul(_larger(builder, _larger(builder, a, b), _larger(builder, c, d)), scale)
    before = emit.load(builder, base, zero, FLOAT, 16)
    moves = builder.fcmp_ordered(">", top, builder.fadd(before, constant(_FLOATS, HEADROOM)))
    after = builder.select(moves, top, before)
    emit.store(builder, after, base, zero)
    shift = builder.fneg(after)

    def weigh(keys, sums):
        own = [_power(builder, emit.fma(builder, _row(builder, scores, key), scale, shift)) for key in keys]
        for n in (0, 2):
            emit.store(builder, _pairs(builder, own[n], own[n + 1]), weights, builder.shl(keys[n], index(3)))
        for key in keys:  # the product that follows reads the sums, which other queries' sums have displaced
            line = builder.add(acc, builder.shl(key, index(6)))
            emit.prefetch(builder, builder.inttoptr(line, ir.IntType(8).as_pointer()), 3)
        return [builder.fadd(total, weight) for total, weight in zip(sums, own, strict=True)]

    a, b, c, d = _by_fours(builder, rows, 0.0, weigh)
    with builder.if_then(builder.icmp_signed("!=", builder.and_(rows, index(16)), zero)):
        for pair in range(8):
            empty = builder.shl(builder.add(rows, index(2 * pair)), index(3))
            emit.store(builder, constant(_WORDS, 0), weights, empty)
    sums = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
    fade = emit_exp2(builder, builder.fsub(before, after))
    sums = emit.fma(builder, emit.load(builder, total, zero, FLOAT, 16), fade, sums)
    emit.store(builder, sums, total, zero)
    any_moves = builder.icmp_signed("!=", builder.bitcast(moves, SHORT), SHORT(0))
    with builder.if_then(any_moves), cgutils.for_range(builder, dims) as loop:
        place = builder.shl(loop.index, index(4))
        emit.store(builder, builder.fmul(emit.load(builder, acc, place, FLOAT, 16), fade), acc, place)
