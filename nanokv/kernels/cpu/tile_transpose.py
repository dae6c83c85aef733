"""Transposes into and out of the layouts of tile registers (amx.py), 16 x 16 words of 32 bits at a time."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.emit import FLOAT, INT, SHORT, constant

_FLOATS, _WORDS, _SHORTS = ir.VectorType(FLOAT, 16), ir.VectorType(INT, 16), ir.VectorType(SHORT, 32)


def _transposed(builder: ir.IRBuilder, lines: list[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16 words, rows and columns exchanged."""
    for half in (1, 2, 4, 8):  # exchange odd and even lanes of neighbours, then pairs, quads, eights
        keep = ir.Constant(_WORDS, [(lane & ~half) + (16 if lane & half else 0) for lane in range(16)])
        move = ir.Constant(_WORDS, [(lane | half) + (16 if lane & half else 0) for lane in range(16)])
        lines = [
            builder.shuffle_vector(lines[r & ~half], lines[r | half], move if r & half else keep) for r in range(16)
        ]
    return lines


def _address(builder: ir.IRBuilder, addresses: ir.Value, number: ir.Value) -> ir.Value:
    kind = number.type
    place = builder.gep(builder.inttoptr(addresses, kind.as_pointer()), [number], source_etype=kind)
    return builder.load(place, typ=kind)


def _words(builder: ir.IRBuilder, rows: ir.Value, number: int, offset: ir.Value) -> ir.Value:
    """16 words, `offset` bytes into a row."""
    start = builder.add(_address(builder, rows, offset.type(number)), offset)
    line = emit.load(builder, start, offset.type(0), INT, 16)
    line.align = 2
    return line


@emit.function(*[types.int64] * 3)
def transpose_words(builder, rows, offset, out):
    """uint32 [16 words, 16 rows]: the words that lie `offset` bytes into 16 rows, whose addresses are at `rows`."""
    for w, line in enumerate(_transposed(builder, [_words(builder, rows, r, offset) for r in range(16)])):
        emit.store(builder, line, out, offset.type(16 * w))


@emit.function(*[types.int64] * 4)
def transpose_shorts(builder, rows, offset, out, stride):
    """The 32 shorts that lie `offset` bytes into 32 rows: 32 lines of 64 bytes at `out`, `stride` bytes apart.

    Two rows become one of words: a short of one row, then the same short of the other. Words are then transposed.
    """
    index, half = offset.type, constant(_WORDS, 16)
    is_odd = ir.Constant(ir.VectorType(ir.IntType(1), 32), [n % 2 for n in range(32)])
    for part in range(2):  # even shorts of the rows, then odd ones: 16 words of each row
        lines = []
        for r in range(0, 32, 2):
            first, second = (_words(builder, rows, n, offset) for n in (r, r + 1))
            if part == 0:
                second = builder.shl(second, half)
            else:
                first = builder.lshr(first, half)
            pair = builder.select(is_odd, builder.bitcast(second, _SHORTS), builder.bitcast(first, _SHORTS))
            lines.append(builder.bitcast(pair, _WORDS))
        for w, line in enumerate(_transposed(builder, lines)):
            emit.store(builder, line, builder.add(out, builder.mul(stride, index(2 * w + part))), index(0))


@emit.function(*[types.int64] * 5)
def store_columns(builder, count, columns, factors, targets, offset):
    """The first `count` columns of float32 [16, 16], each times its factor, as rows of 16 bfloat16.

    columns   address of the numbers; factors: of float32 [16]
    targets   address of `count` addresses; a row is written `offset` bytes after each
    """
    zero, lines = count.type(0), []
    factor = emit.load(builder, factors, zero, FLOAT, 16)
    for d in range(16):
        line = builder.fmul(emit.load(builder, columns, count.type(16 * d), FLOAT, 16), factor)
        # + 0: a tile that is skipped and one whose weights are all 0 differ in the sign of a zero
        lines.append(builder.bitcast(builder.fadd(line, constant(_FLOATS, 0.0)), _WORDS))
    rows = cgutils.alloca_once(builder, ir.ArrayType(_WORDS, 16))
    for r, line in enumerate(_transposed(builder, lines)):
        builder.store(line, builder.gep(rows, [INT(0), INT(r)]), align=4)
    with cgutils.for_range(builder, count) as loop:
        line = builder.load(builder.gep(rows, [zero, loop.index]), typ=_WORDS, align=4)
        row = emit.narrow(builder, builder.bitcast(line, _FLOATS), types.uint16)
        emit.store(builder, row, builder.add(_address(builder, targets, loop.index), offset), zero)
