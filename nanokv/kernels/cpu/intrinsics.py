"""What numba lacks for the CPU kernels: memory at an address, 16-bit formats, fused multiply-add, atomic counters.

Kernels take plain integers (addresses, sizes): a compiled function accepts an int in 0.05 us, and the numpy view of a
tensor costs 1 us to make. The format of numbers is the element type of an (empty) array, or its `dtype`, which costs
nothing in a call inside compiled code:

    float32   float32        uint16   the bits of a bfloat16        int16   the bits of a float16

Every multiply-add is an explicit `fma`, so a result does not depend on how a compiler groups the loop around it.
The `emit` functions write LLVM instructions for a scalar or a vector; an intrinsic makes them callable.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT, INT, SHORT, HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.HalfType()

# torch dtype -> an empty array of its element type: the argument that gives a kernel its number format.
FORMAT = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}


def like(value: ir.Value, element: ir.Type) -> ir.Type:
    """`element`, or the vector of as many of them as `value` has lanes."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def constant(kind: ir.Type, number: float) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once."""
    name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def emit_widen(builder: ir.IRBuilder, x: ir.Value, element: types.Type) -> ir.Value:
    """Numbers of a format as float32; exact."""
    if element == types.float32:
        return x
    if element == types.int16:
        return builder.fpext(builder.bitcast(x, like(x, HALF)), like(x, FLOAT))
    bits = builder.zext(x, like(x, INT))
    return builder.bitcast(builder.shl(bits, constant(bits.type, 16)), like(x, FLOAT))


def emit_narrow(builder: ir.IRBuilder, x: ir.Value, element: types.Type) -> ir.Value:
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


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c in float32, rounded once."""

    def codegen(context, builder, signature, args):
        return emit_fma(builder, *args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def widen(typingctx, x):
    """A number of any format as float32."""

    def codegen(context, builder, signature, args):
        return emit_widen(builder, args[0], x)

    return types.float32(x), codegen


@intrinsic
def narrow(typingctx, x, format):
    """A float32 rounded to the format that the array `format` stands for."""

    def codegen(context, builder, signature, args):
        return emit_narrow(builder, args[0], format.dtype)

    return format.dtype(types.float32, format), codegen


@intrinsic
def size_of(typingctx, format):
    """Bytes of a number of a format, known when a kernel is compiled."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.int64, format.dtype.bitwidth // 8)

    return types.int64(format), codegen


@intrinsic
def _pointer(typingctx, address, format):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(format.dtype)(types.int64, format), codegen


@njit
def view(address, size, format):
    """The `size` numbers of a format at an address, as an array."""
    return carray(_pointer(address, format), (size,))


@njit
def sizes(geometry):
    """KVPlanes.geometry as a tuple, whose numbers the compiler can keep in registers."""
    return (
        geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7],
        geometry[8], geometry[9], geometry[10], geometry[11],
    )  # fmt: skip


@intrinsic
def fetch_add(typingctx, address, amount):
    """Adds to the int64 at an address, atomically. Returns the value before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], args[1].type.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


def emit_prefetch(builder: ir.IRBuilder, pointer: ir.Value, locality: int) -> None:
    """Prefetches the cache line of a pointer to bytes, to be read. locality: 2 the second-level cache, 3 the first."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, INT(0), INT(locality), INT(1)])


@intrinsic
def prefetch_line(typingctx, address):
    """Prefetches the cache line at an address, into the second-level cache."""

    def codegen(context, builder, signature, args):
        emit_prefetch(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), 2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen
