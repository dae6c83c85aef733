"""LLVM instructions, written with a builder: for a scalar or for a vector, wherever both make sense.

Every multiply-add is an explicit `fma`, so a result does not depend on how a compiler groups the loop around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT, INT, SHORT, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.HalfType()


def function(*kinds: types.Type | None, result: types.Type = types.void) -> Callable:
    """Makes a function that emits instructions, given a builder and LLVM values, callable from compiled code.

    kinds    types of the values; None stands for a number format, of which the function gets the element type
    result   the type of what the function returns
    """

    def decorate(write: Callable) -> Callable:
        @intrinsic
        @wraps(write)
        def typed(typingctx, *given):
            def codegen(context, builder, signature, args):
                values = (own.dtype if kind is None else arg for kind, own, arg in zip(kinds, given, args, strict=True))
                written = write(builder, *values)
                return context.get_dummy_value() if result == types.void else written

            return result(*(kind or own for kind, own in zip(kinds, given, strict=True))), codegen

        return typed

    return decorate


def like(value: ir.Value, element: ir.Type) -> ir.Type:
    """`element`, or the vector of as many of them as `value` has lanes."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def constant(kind: ir.Type, number: float) -> ir.Constant:
    """A number of a type, or a vector with that number in every lane."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def word_of(element: types.Type) -> ir.Type:
    """The LLVM type of a number of a format in memory."""
    return FLOAT if element == types.float32 else SHORT


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once."""
    name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
    callee = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(callee, [a, b, c])


def widen(builder: ir.IRBuilder, x: ir.Value, element: types.Type) -> ir.Value:
    """Numbers of a format as float32; exact."""
    if element == types.float32:
        return x
    if element == types.int16:
        return builder.fpext(builder.bitcast(x, like(x, HALF)), like(x, FLOAT))
    bits = builder.zext(x, like(x, INT))
    return builder.bitcast(builder.shl(bits, constant(bits.type, 16)), like(x, FLOAT))


def narrow(builder: ir.IRBuilder, x: ir.Value, element: types.Type) -> ir.Value:
    """float32 rounded to a format, ties to even."""
    if element == types.float32:
        return x
    if element == types.int16:
        return builder.bitcast(builder.fptrunc(x, like(x, HALF)), like(x, SHORT))
    bits = builder.bitcast(x, like(x, INT))
    odd = builder.and_(builder.lshr(bits, constant(bits.type, 16)), constant(bits.type, 1))
    bits = builder.lshr(builder.add(bits, builder.add(odd, constant(bits.type, 0x7FFF))), constant(bits.type, 16))
    bits = builder.select(builder.fcmp_unordered("uno", x, x), constant(bits.type, 0x7FC0), bits)
    return builder.trunc(bits, like(x, SHORT))


def _vector(builder, base, index, kind, width):
    """A pointer to `width` numbers of a kind, `index` numbers after the address or pointer `base`."""
    if not isinstance(base.type, ir.PointerType):
        base = builder.inttoptr(base, kind.as_pointer())
    place = builder.gep(base, [index], source_etype=kind)
    return builder.bitcast(place, ir.VectorType(kind, width).as_pointer())


def load(builder, base, index, kind, width):
    """`width` numbers of a kind, `index` numbers after the address or pointer `base`, as a vector."""
    vector = builder.load(_vector(builder, base, index, kind, width), typ=ir.VectorType(kind, width))
    vector.align = kind.width // 8 if isinstance(kind, ir.IntType) else 4
    return vector


def store(builder, vector, base, index):
    """Writes a vector to where `load` reads it."""
    builder.store(vector, _vector(builder, base, index, vector.type.element, vector.type.count), align=4)


def broadcast(builder, number, width):
    """A vector with the number in every lane."""
    one = builder.insert_element(ir.Constant(ir.VectorType(number.type, width), ir.Undefined), number, INT(0))
    return builder.shuffle_vector(one, one, constant(ir.VectorType(INT, width), 0))


def prefetch(builder: ir.IRBuilder, pointer: ir.Value, locality: int) -> None:
    """Prefetches the cache line of a pointer to bytes, to be read. locality: 2 the second-level cache, 3 the first."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
    callee = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(callee, [pointer, INT(0), INT(locality), INT(1)])


def switch(builder: ir.IRBuilder, value: ir.Value, cases: Iterable[int], body: Callable[[int], None]) -> None:
    """body(case), emitted for every case; a switch on an integer selects the one to run, or none."""
    end = builder.append_basic_block()
    choice = builder.switch(value, end)
    for case in cases:
        block = builder.append_basic_block()
        choice.add_case(value.type(case), block)
        builder.position_at_end(block)
        body(case)
        builder.branch(end)
    builder.position_at_end(end)
