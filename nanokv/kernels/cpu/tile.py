"""The inner loops that are written as vector instructions: a small matrix product, a widening transpose, a few rows.

The product's order is the law of exactness here: c[r, n] = c[r, n] + a[r, 0] * b[0, n] + a[r, 1] * b[1, n] + ..., one
fused step after the other. Vector lanes run over n and tiles over r and n, so how many rows there are, how wide a
vector is and where a tile begins change nothing in any number.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from nanokv.kernels.cpu.words import FLOAT, INT, constant, emit_fma, emit_widen

# Floats in two vector registers. Four rows of that width keep eight chains of multiply-adds in flight, which is what
# hides their latency; fewer rows need more width, as far as there are registers (AVX2 has 16, AVX-512 32).
PAIR = 32 if binding.get_host_cpu_features().get("avx512f", False) else 16
WIDTH_1, WIDTH_2 = 64, 2 * PAIR


def _vector(builder, base, index, kind, width):
    """The place of `width` numbers of a kind, `index` numbers after the address or pointer `base`."""
    if not isinstance(base.type, ir.PointerType):
        base = builder.inttoptr(base, kind.as_pointer())
    place = builder.gep(base, [index], source_etype=kind)
    return builder.bitcast(place, ir.VectorType(kind, width).as_pointer())


def _load(builder, base, index, kind, width):
    vector = builder.load(_vector(builder, base, index, kind, width), typ=ir.VectorType(kind, width))
    vector.align = kind.width // 8 if isinstance(kind, ir.IntType) else 4
    return vector


def _store(builder, vector, base, index):
    builder.store(vector, _vector(builder, base, index, vector.type.element, vector.type.count), align=4)


def _spread(builder, number, width):
    one = builder.insert_element(ir.Constant(ir.VectorType(FLOAT, width), ir.Undefined), number, INT(0))
    return builder.shuffle_vector(one, one, constant(ir.VectorType(INT, width), 0))


@intrinsic(prefer_literal=True)
def _tile(typingctx, rows, width, fresh, a, a_stride, b, b_stride, c, c_stride, depth):
    """c[rows, width] += a[rows, depth] @ b[depth, width], all of c in registers. rows and width are literal."""
    num_rows, num_lanes = rows.literal_value, width.literal_value

    def codegen(context, builder, signature, args):
        fresh, a, a_stride, b, b_stride, c, c_stride, depth = args[2:]
        a, b, c = (builder.inttoptr(address, FLOAT.as_pointer()) for address in (a, b, c))
        index = a_stride.type
        a_rows = [builder.gep(a, [builder.mul(a_stride, index(r))], source_etype=FLOAT) for r in range(num_rows)]
        c_starts = [builder.mul(c_stride, index(r)) for r in range(num_rows)]
        zero = constant(ir.VectorType(FLOAT, num_lanes), 0.0)
        sums = []
        for start in c_starts:
            old = _load(builder, c, start, FLOAT, num_lanes)
            sums.append(cgutils.alloca_once_value(builder, builder.select(fresh, zero, old)))
        with cgutils.for_range(builder, depth) as loop:
            b_row = _load(builder, b, builder.mul(loop.index, b_stride), FLOAT, num_lanes)
            for total, a_row in zip(sums, a_rows, strict=True):
                number = builder.load(builder.gep(a_row, [loop.index], source_etype=FLOAT), typ=FLOAT)
                step = emit_fma(builder, _spread(builder, number, num_lanes), b_row, builder.load(total))
                builder.store(step, total)
        for total, start in zip(sums, c_starts, strict=True):
            _store(builder, builder.load(total), c, start)
        return context.get_dummy_value()

    return types.void(rows, width, types.boolean, *[types.int64] * 7), codegen


@njit
def multiply(rows, columns, depth, fresh, a, a_stride, b, b_stride, c, c_stride):
    """c[rows, columns] = a[rows, depth] @ b[depth, columns], plus what stood in c unless `fresh`.

    rows      1 to 4
    columns   rounded up to a multiple of 16; b and c have room for that
    a, b, c   addresses of float32; strides count floats from row to row
    """
    n = 0
    if rows == 4:
        while n + PAIR <= columns:
            _tile(4, PAIR, fresh, a, a_stride, b + 4 * n, b_stride, c + 4 * n, c_stride, depth)
            n += PAIR
        while n < columns:
            _tile(4, 16, fresh, a, a_stride, b + 4 * n, b_stride, c + 4 * n, c_stride, depth)
            n += 16
    elif rows == 3:
        while n < columns:
            _tile(3, 16, fresh, a, a_stride, b + 4 * n, b_stride, c + 4 * n, c_stride, depth)
            n += 16
    elif rows == 2:
        while n + WIDTH_2 <= columns:
            _tile(2, WIDTH_2, fresh, a, a_stride, b + 4 * n, b_stride, c + 4 * n, c_stride, depth)
            n += WIDTH_2
        while n < columns:
            _tile(2, 16, fresh, a, a_stride, b + 4 * n, b_stride, c + 4 * n, c_stride, depth)
            n += 16
    else:
        while n + WIDTH_1 <= columns:
            _tile(1, WIDTH_1, fresh, a, a_stride, b + 4 * n, b_stride, c + 4 * n, c_stride, depth)
            n += WIDTH_1
        while n < columns:
            _tile(1, 16, fresh, a, a_stride, b + 4 * n, b_stride, c + 4 * n, c_stride, depth)
            n += 16


@intrinsic
def transpose(typingctx, rows, first, out, out_stride, format):
    """out[d, 0..7] = row 0..7 [first + d] as float32, for 8 dims d of float32 or 16 dims of a 16-bit format.

    rows   address of 8 addresses
    Rows are read as 32-bit words: a word of a 16-bit row is two dims, which part only after the transpose, by shifts.
    """
    element = format.dtype
    dims = 4 // (element.bitwidth // 8)

    def codegen(context, builder, signature, args):
        rows, first, out, out_stride, _ = args
        index = first.type
        word = builder.lshr(first, index(dims - 1))
        rows = builder.inttoptr(rows, index.as_pointer())
        lines = []
        for r in range(8):
            address = builder.load(builder.gep(rows, [index(r)], source_etype=index), typ=index)
            lines.append(_load(builder, address, word, INT, 8))
            lines[-1].align = 2
        for half in (1, 2, 4):  # exchange odd and even lanes of neighbours, then pairs, then quads
            keep = [(lane & ~half) + (8 if lane & half else 0) for lane in range(8)]
            move = [(lane | half) + (8 if lane & half else 0) for lane in range(8)]
            lines = [
                builder.shuffle_vector(
                    lines[r & ~half], lines[r | half], ir.Constant(ir.VectorType(INT, 8), move if r & half else keep)
                )
                for r in range(8)
            ]
        for w, line in enumerate(lines):
            for part in range(dims):
                numbers = line
                if dims == 2:
                    shifted = builder.lshr(line, constant(line.type, 16)) if part else line
                    numbers = builder.trunc(shifted, ir.VectorType(ir.IntType(16), 8))
                else:
                    numbers = builder.bitcast(line, ir.VectorType(FLOAT, 8))
                place = builder.mul(out_stride, builder.add(first, index(w * dims + part)))
                _store(builder, emit_widen(builder, numbers, element), builder.inttoptr(out, FLOAT.as_pointer()), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, format), codegen


@intrinsic
def widen_16(typingctx, source, out, format):
    """16 numbers of a format at an address, as float32 to another address."""
    kind = FLOAT if format.dtype == types.float32 else ir.IntType(16)

    def codegen(context, builder, signature, args):
        zero = args[0].type(0)
        numbers = _load(builder, args[0], zero, kind, 16)
        _store(builder, emit_widen(builder, numbers, format.dtype), args[1], zero)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, format), codegen


@intrinsic
def largest(typingctx, address):
    """The largest of 64 float32."""

    def codegen(context, builder, signature, args):
        numbers = _load(builder, args[0], args[0].type(0), FLOAT, 64)
        function = ir.FunctionType(FLOAT, [numbers.type])
        function = cgutils.get_or_insert_function(builder.module, function, "llvm.vector.reduce.fmax.v64f32")
        return builder.call(function, [numbers], fastmath=("nnan",))

    return types.float32(types.int64), codegen
