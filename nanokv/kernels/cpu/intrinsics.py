"""What numba lacks for the CPU kernels: memory at an address, 16-bit formats, fused multiply-add, atomic counters.

Kernels take plain integers (addresses, sizes): a compiled function accepts an int in 0.05 us, and the numpy view of a
tensor costs 1 us to make. The format of numbers is the element type of an (empty) array, or its `dtype`, which costs
nothing in a call inside compiled code:

    float32   float32        uint16   the bits of a bfloat16        int16   the bits of a float16
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from nanokv.kernels.cpu import emit

# torch dtype -> an empty array of its element type: the argument that gives a kernel its number format.
FORMAT = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}


fma = emit.function(*[types.float32] * 3, result=types.float32)(emit.fma)


@intrinsic
def widen(typingctx, x):
    """A number of any format as float32."""

    def codegen(context, builder, signature, args):
        return emit.widen(builder, args[0], x)

    return types.float32(x), codegen


@intrinsic
def narrow(typingctx, x, format):
    """A float32 rounded to the format that the array `format` stands for."""

    def codegen(context, builder, signature, args):
        return emit.narrow(builder, args[0], format.dtype)

    return format.dtype(types.float32, format), codegen


@emit.function(None, result=types.int64)
def size_of(builder, element):
    """Bytes of a number of a format, known when a kernel is compiled."""
    return ir.IntType(64)(element.bitwidth // 8)


@intrinsic
def pointer(typingctx, address, format):
    """An address as a pointer to numbers of a format."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(format.dtype)(types.int64, format), codegen


@njit
def view(address, size, format):
    """The `size` numbers of a format at an address, as an array."""
    return carray(pointer(address, format), (size,))


@njit
def sizes(geometry):
    """KVPlanes.geometry as a tuple, whose numbers the compiler can keep in registers."""
    return (
        geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7],
        geometry[8], geometry[9], geometry[10], geometry[11],
    )  # fmt: skip


@emit.function(types.int64, types.int64, result=types.int64)
def fetch_add(builder, address, amount):
    """Adds to the int64 at an address, atomically. Returns the value before."""
    return builder.atomic_rmw("add", builder.inttoptr(address, amount.type.as_pointer()), amount, "acq_rel")


@emit.function(types.int64)
def prefetch_line(builder, address):
    """Prefetches the cache line at an address, into the second-level cache."""
    emit.prefetch(builder, builder.inttoptr(address, ir.IntType(8).as_pointer()), 2)
