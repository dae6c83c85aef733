"""Codes of a KV tile as float32: unpacked, looked up and, for keys, transposed, in vector instructions.

Up to 16 table entries are looked up byte by byte: the lowest bytes of all entries fill half a register, the next bytes
another, and so on. One instruction (a byte shuffle) picks 32 bytes by 32 codes; four of them, interleaved, make 32
float32. AVX-512 looks up 16 entries of float32 in one instruction. Codes in groups (KIVI) are converted and scaled.

Keys are transposed as bytes, before they are unpacked.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.compiled import inner
from nanokv.kernels.cpu.emit import FLOAT, INT
from nanokv.kernels.cpu.intrinsics import view
from nanokv.kernels.planes import FLOAT8, GROUPS, LOOKUP, UNIFORM

U8 = np.dtype(np.uint8)
BYTE, WORD = ir.IntType(8), ir.IntType(16)
BYTES = ir.VectorType(BYTE, 32)
FLOATS = ir.VectorType(FLOAT, 16)
KINDS = (LOOKUP, UNIFORM, FLOAT8, GROUPS)  # of codes: decoding is compiled for each
_FEATURES = binding.get_host_cpu_features()
_HAS_BYTE_SHUFFLE, _HAS_TABLE_REGISTER = _FEATURES.get("avx2", False), _FEATURES.get("avx512f", False)


def _splat(byte):
    return ir.Constant(BYTES, [byte] * 32)


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(lanes)), list(lanes)))


def _interleave(builder, a, b, high):
    """Numbers of a and b in turn, from the low or the high half of each 16-byte lane."""
    count = a.type.count // 2
    lanes = []
    for lane in (0, count):
        for n in range(lane + high * count // 2, lane + (high + 1) * count // 2):
            lanes += [n, n + 2 * count]
    return _shuffle(builder, a, b, lanes)


def _join_bytes(builder, planes):
    """The bytes of 32 numbers, lowest first, as two vectors of 16 int32."""
    lines = []
    for high in (0, 1):
        pairs = (_interleave(builder, planes[n], planes[n + 1], high) for n in (0, 2))
        low, top = (builder.bitcast(pair, ir.VectorType(WORD, 16)) for pair in pairs)
        lines += [builder.bitcast(_interleave(builder, low, top, half), ir.VectorType(INT, 8)) for half in (0, 1)]
    return [_shuffle(builder, lines[n], lines[n + 1], range(16)) for n in (0, 2)]


def _by_lanes(builder, codes):
    """32 codes in the order that `_join_bytes` undoes: 4 of each 8 neighbours in the low half, the others above."""
    quads = builder.bitcast(codes, ir.VectorType(INT, 8))
    return builder.bitcast(_shuffle(builder, quads, quads, (0, 2, 4, 6, 1, 3, 5, 7)), BYTES)


def _widened(builder, codes):
    """32 codes as two vectors of 16 int32."""
    halves = [_shuffle(builder, codes, codes, range(n, n + 16)) for n in (0, 16)]
    return [builder.zext(half, ir.VectorType(INT, 16)) for half in halves]


def _lookup_bytes(builder, table, codes):
    """For each of 32 codes below 16, that byte of the table in its 16-byte lane."""
    if _HAS_BYTE_SHUFFLE:
        kind = ir.FunctionType(BYTES, [BYTES, BYTES])
        return builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pshuf.b"), [table, codes]
        )
    picked = ir.Constant(BYTES, ir.Undefined)
    for n in range(32):
        byte = builder.extract_element(table, builder.zext(builder.extract_element(codes, INT(n)), INT))
        picked = builder.insert_element(picked, byte, INT(n))
    return picked


def _decoder(builder, kind, table):
    """A function from 32 codes to two vectors of 16 float32, for one kind of table, which is loaded here."""
    if kind == LOOKUP and _HAS_TABLE_REGISTER:
        entries = emit.load(builder, table, table.type(16), FLOAT, 16)
        pick = ir.FunctionType(FLOATS, [FLOATS, ir.VectorType(INT, 16)])
        permute = cgutils.get_or_insert_function(builder.module, pick, "llvm.x86.avx512.permvar.sf.512")

        def decode(codes):
            return [builder.call(permute, [entries, half]) for half in _widened(builder, codes)]

    elif kind == LOOKUP:
        planes = []
        for n in range(4):
            half = emit.load(builder, table, table.type(16 * n), BYTE, 16)
            planes.append(_shuffle(builder, half, half, [*range(16)] * 2))

        def decode(codes):
            codes = _by_lanes(builder, codes)
            lines = _join_bytes(builder, [_lookup_bytes(builder, plane, codes) for plane in planes])
            return [builder.bitcast(line, FLOATS) for line in lines]

    elif kind == UNIFORM:
        first, second = (
            builder.load(builder.bitcast(_pointer(builder, table, n), FLOAT.as_pointer()), typ=FLOAT) for n in (0, 4)
        )
        step, first = emit.broadcast(builder, builder.fsub(second, first), 16), emit.broadcast(builder, first, 16)

        def decode(codes):
            return [_scaled(builder, half, step, first) for half in _widened(builder, codes)]

    else:
        nothing, power = _splat(0), emit.constant(FLOATS, 2.0**120)

        def decode(codes):
            # Codes ascend with the values: the first half is negative, and e4m3 has a NaN at each end.
            low, high = _splat(-128), _splat(126)
            codes = builder.xor(_by_lanes(builder, codes), low)
            codes = builder.select(builder.icmp_signed(">", codes, high), high, codes)
            codes = builder.select(builder.icmp_signed("<", codes, _splat(-127)), _splat(-127), codes)
            bits = builder.xor(
                codes, builder.select(builder.icmp_signed("<", codes, _splat(0)), _splat(127), _splat(0))
            )
            top = builder.or_(builder.and_(bits, low), builder.and_(builder.lshr(bits, _splat(4)), _splat(7)))
            lines = _join_bytes(builder, [nothing, nothing, builder.shl(bits, _splat(4)), top])
            return [builder.fmul(builder.bitcast(line, power.type), power) for line in lines]

    return decode


def _scaled(builder, codes, step, low):
    """low + step * code, for 16 codes."""
    return emit.fma(builder, builder.sitofp(codes, FLOATS), step, low)


def _group(builder, steps, number, lows):
    """Step and low of a group, in every lane. lows: how many floats after the steps the lows lie."""
    steps = builder.inttoptr(steps, FLOAT.as_pointer())
    numbers = (number, builder.add(number, lows))
    places = (builder.gep(steps, [at], source_etype=FLOAT) for at in numbers)
    return [emit.broadcast(builder, builder.load(place, typ=FLOAT), 16) for place in places]


def _byte_mask(builder, mask):
    """A mask below 256 in each of 32 bytes."""
    word = builder.mul(builder.trunc(mask, INT), INT(0x01010101))
    return builder.bitcast(emit.broadcast(builder, word, 8), BYTES)


def _pointer(builder, address, offset):
    return builder.inttoptr(builder.add(address, address.type(offset)), BYTE.as_pointer())


@emit.function(*[types.int64] * 3)
def transpose_bytes(builder, keys, first, out):
    """Bytes first .. first + 15 of 32 rows, transposed: 16 rows of 32 bytes, 64 bytes apart.

    keys   address of 32 addresses
    """
    keys = builder.inttoptr(keys, first.type.as_pointer())
    halves = ir.VectorType(BYTE, 16)

    def row(n):
        address = builder.load(builder.gep(keys, [INT(n)], source_etype=first.type), typ=first.type)
        numbers = builder.load(builder.inttoptr(builder.add(address, first), halves.as_pointer()), typ=halves)
        numbers.align = 1
        return numbers

    lines = [_shuffle(builder, row(n), row(n + 16), range(32)) for n in range(16)]
    for _ in range(4):
        lines = [_interleave(builder, lines[n // 2], lines[n // 2 + 8], n % 2) for n in range(16)]
    for n, line in enumerate(lines):
        target = builder.inttoptr(builder.add(out, out.type(64 * n)), BYTES.as_pointer())
        builder.store(line, target, align=32)


@emit.function(*[types.int64] * 9)
def decode_keys(builder, count, source, shift, mask, kind, table, first, dims, out):
    """`count` rows of 64 bytes from `transpose_bytes` become rows of 64 float32, numbers for the codes
    (byte >> shift) & mask.

    table   address of a table's bytes (LOOKUP, see split_table), of its float32, or of the steps of the dims, for the
            keys 0 - 31, then for the others, and of their lows: float32 [2, 2, dims] (GROUPS)
    first   the dim of the first row
    """
    words = ir.VectorType(WORD, 16)
    mask = _byte_mask(builder, mask)
    shift = emit.broadcast(builder, builder.trunc(shift, WORD), 16)

    def body(kind):
        decode = None if kind == GROUPS else _decoder(builder, kind, table)
        with cgutils.for_range(builder, count) as loop:
            for half in (0, 1):
                at = builder.add(builder.mul(loop.index, count.type(64)), count.type(32 * half))
                codes = builder.bitcast(emit.load(builder, source, at, BYTE, 32), words)
                codes = builder.and_(builder.bitcast(builder.lshr(codes, shift), BYTES), mask)
                if kind == GROUPS:
                    number = builder.add(builder.add(first, loop.index), builder.mul(dims, dims.type(half)))
                    group = _group(builder, table, number, builder.mul(dims, dims.type(2)))
                    lines = [_scaled(builder, part, *group) for part in _widened(builder, codes)]
                else:
                    lines = decode(codes)
                for n, line in enumerate(lines):
                    emit.store(builder, line, out, builder.add(at, at.type(16 * n)))

    emit.switch(builder, kind, KINDS, body)


@emit.function(*[types.int64] * 13)
def decode_values(
    builder, count, rows, first, first_shift, second, second_shift, mask, kind, table, first_group, second_group,
    groups, out,
):  # fmt: skip
    """32 float32 of each of `count` rows: 16 from the bytes at `first`, 16 from those at `second`.

    rows     address of `count` addresses
    table    as in decode_keys; steps, then lows, of the groups of each row: float32 [2, count, groups] (GROUPS)
    groups   of a row; those of the 16 numbers are `first_group` and `second_group`
    out      rows of 64 float32
    """
    rows = builder.inttoptr(rows, count.type.as_pointer())
    quads, halves = ir.VectorType(INT, 8), ir.VectorType(BYTE, 16)
    mask = _byte_mask(builder, mask)
    shifts = ir.Constant(quads, ir.Undefined)
    for n, amount in enumerate([first_shift] * 4 + [second_shift] * 4):
        shifts = builder.insert_element(shifts, builder.trunc(amount, INT), INT(n))

    def body(kind):
        decode = None if kind == GROUPS else _decoder(builder, kind, table)
        with cgutils.for_range(builder, count) as loop:
            row = builder.load(builder.gep(rows, [loop.index], source_etype=count.type), typ=count.type)
            a, b = (
                builder.load(builder.inttoptr(builder.add(row, at), halves.as_pointer()), typ=halves)
                for at in (first, second)
            )
            a.align = b.align = 1
            both = builder.bitcast(_shuffle(builder, a, b, range(32)), quads)
            codes = builder.and_(builder.bitcast(builder.lshr(both, shifts), BYTES), mask)
            if kind == GROUPS:
                start, lows = builder.mul(loop.index, groups), builder.mul(count, groups)
                numbers = (builder.add(start, number) for number in (first_group, second_group))
                lines = [
                    _scaled(builder, part, *_group(builder, table, number, lows))
                    for part, number in zip(_widened(builder, codes), numbers, strict=True)
                ]
            else:
                lines = decode(codes)
            for n, line in enumerate(lines):
                at = builder.add(builder.mul(loop.index, count.type(64)), count.type(16 * n))
                emit.store(builder, line, out, at)

    emit.switch(builder, kind, KINDS, body)


@emit.function(types.int64, types.int64)
def multiply_64(builder, numbers, factors):
    """numbers *= factors, for the 64 float32 at two addresses."""
    for n in range(0, 64, 16):
        at = numbers.type(n)
        a, b = (emit.load(builder, place, at, FLOAT, 16) for place in (numbers, factors))
        emit.store(builder, builder.fmul(a, b), numbers, at)


@inner
def split_table(table, count, out):
    """Up to 16 float32 as four runs of 16 bytes, the lowest byte of each, then the next, ...; then as they are."""
    source, target = view(table, 4 * count, U8), view(out, 128, U8)
    for n in range(count):
        for byte in range(4):
            target[16 * byte + n] = target[64 + 4 * n + byte] = source[4 * n + byte]


@intrinsic
def extract_bits(typingctx, word, shift, mask, up):
    """((byte >> shift) & mask) << up for each byte of a word of 2 or 8."""

    def codegen(context, builder, signature, args):
        word, shift, mask, up = args
        shift, mask, up = (builder.trunc(arg, word.type) if word.type.width < 64 else arg for arg in (shift, mask, up))
        mask = builder.mul(mask, word.type(0x0101010101010101 >> (64 - word.type.width)))
        return builder.shl(builder.and_(builder.lshr(word, shift), mask), up)

    return word(word, types.int64, types.int64, types.int64), codegen
