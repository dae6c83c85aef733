"""Inner loops written as vector instructions: a small matrix product, a widening transpose, the softmax of 64 scores,
a pass over a recurrent state, a short convolution.

Exactness rests on the order of the product: c[r, n] = c[r, n] + a[r, 0] * b[0, n] + a[r, 1] * b[1, n] + ..., one fused
step after the other. Vector lanes run over n and register tiles over r and n, so the number of rows, the width of a
vector and the start of a tile change no result.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.emit import FLOAT, INT, SHORT
from nanokv.kernels.cpu.exp import emit_exp2, emit_silu

# Rows of a register tile -> floats of each row in it: eight registers of sums (six, for 3 rows), because about eight
# chains of multiply-adds hide each other's latency. AVX2 has 16 registers of 8 floats, AVX-512 32 of 16.
_PAIR = 32 if binding.get_host_cpu_features().get("avx512f", False) else 16
_WIDTHS = {1: 64, 2: 2 * _PAIR, 3: _PAIR, 4: _PAIR}


def _emit_tile(builder, rows, width, a, a_stride, b, b_stride, c, c_stride, depth):
    """The loop over `depth` for a fixed number of rows and columns, with all of c in registers."""
    index = depth.type
    a_rows = [builder.gep(a, [builder.mul(a_stride, index(r))], source_etype=FLOAT) for r in range(rows)]
    c_starts = [builder.mul(c_stride, index(r)) for r in range(rows)]
    sums = [cgutils.alloca_once_value(builder, emit.load(builder, c, start, FLOAT, width)) for start in c_starts]
    with cgutils.for_range(builder, depth) as loop:
        b_row = emit.load(builder, b, builder.mul(loop.index, b_stride), FLOAT, width)
        for total, a_row in zip(sums, a_rows, strict=True):
            number = builder.load(builder.gep(a_row, [loop.index], source_etype=FLOAT), typ=FLOAT)
            builder.store(emit.fma(builder, emit.broadcast(builder, number, width), b_row, builder.load(total)), total)
    for total, start in zip(sums, c_starts, strict=True):
        emit.store(builder, builder.load(total), c, start)


@emit.function(*[types.int64] * 9)
def multiply(builder, rows, columns, depth, a, a_stride, b, b_stride, c, c_stride):
    """c[rows, columns] += a[rows, depth] @ b[depth, columns].

    rows      1 to 4
    columns   rounded up to a multiple of 16, for which b and c must have room
    a, b, c   addresses of float32; strides count floats from row to row
    """
    a, b, c = (builder.inttoptr(address, FLOAT.as_pointer()) for address in (a, b, c))
    index = rows.type
    columns = builder.and_(builder.add(columns, index(15)), index(-16))

    def body(count):
        width = _WIDTHS[count]
        whole = builder.and_(columns, index(-width))
        for start, stop, step in ((index(0), whole, width), (whole, columns, 16)):
            with cgutils.for_range_slice(builder, start, stop, index(step), index) as (n, _):
                b_part, c_part = (builder.gep(place, [n], source_etype=FLOAT) for place in (b, c))
                _emit_tile(builder, count, step, a, a_stride, b_part, b_stride, c_part, c_stride, depth)

    emit.switch(builder, rows, _WIDTHS, body)


@emit.function(*[types.int64] * 4, None)
def transpose(builder, rows, first, out, out_stride, element):
    """out[d, 0..7] = row 0..7 [first + d] as float32, for 8 dims d of float32 or 16 dims of a 16-bit format.

    rows   address of 8 addresses
    Rows are read as 32-bit words: a word of a 16-bit row is two dims, which shifts separate after the transpose.
    """
    dims, index = 4 // (element.bitwidth // 8), first.type
    word = builder.lshr(first, index(dims - 1))
    rows = builder.inttoptr(rows, index.as_pointer())
    lines = []
    for r in range(8):
        address = builder.load(builder.gep(rows, [index(r)], source_etype=index), typ=index)
        lines.append(emit.load(builder, address, word, INT, 8))
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
            if dims == 2:
                shifted = builder.lshr(line, emit.constant(line.type, 16)) if part else line
                numbers = builder.trunc(shifted, ir.VectorType(SHORT, 8))
            else:
                numbers = builder.bitcast(line, ir.VectorType(FLOAT, 8))
            place = builder.mul(out_stride, builder.add(first, index(w * dims + part)))
            emit.store(builder, emit.widen(builder, numbers, element), out, place)


@emit.function(types.int64, types.int64, None)
def widen_16(builder, source, out, element):
    """16 numbers of a format at an address, as float32 to another address."""
    zero = source.type(0)
    numbers = emit.load(builder, source, zero, emit.word_of(element), 16)
    emit.store(builder, emit.widen(builder, numbers, element), out, zero)


def _load_64(builder, address):
    """64 float32 as four vectors."""
    return [emit.load(builder, address, address.type(n), FLOAT, 16) for n in range(0, 64, 16)]


@emit.function(types.int64, result=types.float32)
def largest(builder, scores):
    """The largest of the 64 float32 at an address."""
    a, b, c, d = _load_64(builder, scores)

    def larger(x, y):
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    top = larger(larger(a, b), larger(c, d))
    kind = ir.FunctionType(FLOAT, [top.type])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fmax.v16f32")
    return builder.call(function, [top], fastmath=("nnan",))


@emit.function(types.int64, types.float32, types.float32, types.int64, types.float32)
def softmax_weights(builder, scores, scale, highest, total, fade):
    """Each of 64 scores s becomes the weight 2**(s * scale - highest). 16 sums of weights fade; then these are added.

    scores, total   addresses of 64 and of 16 float32
    """
    scale, fade, shift = (emit.broadcast(builder, number, 16) for number in (scale, fade, builder.fneg(highest)))
    weights = [emit_exp2(builder, emit.fma(builder, s, scale, shift)) for s in _load_64(builder, scores)]
    for n, weight in enumerate(weights):
        emit.store(builder, weight, scores, scores.type(16 * n))
    a, b, c, d = weights
    sums, zero = builder.fadd(builder.fadd(a, b), builder.fadd(c, d)), total.type(0)
    sums = emit.fma(builder, emit.load(builder, total, zero, FLOAT, 16), fade, sums)
    emit.store(builder, sums, total, zero)


def _emit_update(builder, width, depth, state, stride, decay, delta, k, q, next_k, out, predicted):
    """The loop over the rows of a state for a fixed number of its columns, both sums in registers."""
    zero = depth.type(0)
    decay, delta = emit.broadcast(builder, decay, width), emit.load(builder, delta, zero, FLOAT, width)
    sums = [cgutils.alloca_once_value(builder, emit.constant(delta.type, 0.0)) for _ in range(2)]
    with cgutils.for_range(builder, depth) as loop:
        key, query, next_key = (
            emit.broadcast(builder, builder.load(builder.gep(row, [loop.index], source_etype=FLOAT), typ=FLOAT), width)
            for row in (k, q, next_k)
        )
        place = builder.mul(loop.index, stride)
        row = emit.fma(builder, decay, emit.load(builder, state, place, FLOAT, width), builder.fmul(key, delta))
        emit.store(builder, row, state, place)
        for number, total in zip((query, next_key), sums, strict=True):
            builder.store(emit.fma(builder, number, row, builder.load(total)), total)
    for total, target in zip(sums, (out, predicted), strict=True):
        emit.store(builder, builder.load(total), target, zero)


@emit.function(*[types.int64] * 4, types.float32, *[types.int64] * 6)
def update_state(builder, columns, depth, state, stride, decay, delta, k, q, next_k, out, predicted):
    """state = decay * state + k[:, None] * delta; out = q @ state; predicted = next_k @ state: one pass over a state.

    columns          a multiple of 16
    state            address of float32 [depth, columns], rows `stride` floats apart
    k, q, next_k     addresses of float32 [depth]
    delta, out, ..   addresses of float32 [columns]
    """
    state, delta, k, q, next_k, out, predicted = (
        builder.inttoptr(address, FLOAT.as_pointer()) for address in (state, delta, k, q, next_k, out, predicted)
    )
    index = columns.type
    whole = builder.and_(columns, index(-32))
    for start, stop, width in ((index(0), whole, 32), (whole, columns, 16)):
        with cgutils.for_range_slice(builder, start, stop, index(width), index) as (n, _):
            part, *parts = (builder.gep(place, [n], source_etype=FLOAT) for place in (state, delta, out, predicted))
            _emit_update(builder, width, depth, part, stride, decay, parts[0], k, q, next_k, *parts[1:])


@emit.function(*[types.int64] * 5)
def convolve(builder, columns, stride, inputs, weights, out):
    """out = silu(inputs[0] * weights[0] + .. + inputs[3] * weights[3]), column by column.

    columns           rounded up to a multiple of 16, for which every row must have room
    inputs, weights   addresses of float32 [4, columns], rows `stride` floats apart
    out               address of float32 [columns]
    """
    with cgutils.for_range_slice(builder, columns.type(0), columns, columns.type(16), columns.type) as (n, _):
        total = emit.constant(ir.VectorType(FLOAT, 16), 0.0)
        for row in range(4):
            at = builder.add(n, builder.mul(stride, stride.type(row)))
            number, weight = (emit.load(builder, place, at, FLOAT, 16) for place in (inputs, weights))
            total = emit.fma(builder, number, weight, total)
        emit.store(builder, emit_silu(builder, total), out, n)
