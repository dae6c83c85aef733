"""Threads for compiled kernels: the OpenMP team that torch has already started.

A second thread pool beside torch's spins on the same cores between layers. So a kernel is handed to the function that
torch's own parallel loops call: GOMP_parallel, of the OpenMP library that torch is linked to. The team is torch's, its
size is torch.get_num_threads(), and its threads are still awake from the matrix product before.

What 30 layers of decode attention add between two torch.mm each (2 cores of an AMD Zen 3, ms):

    requests x tokens    torch's team    one thread    numba prange: its own OpenMP    numba prange: workqueue
    16 x 320             10.8            20.5          11.7                            24
    4 x 512              4.3             7.2           4.7                             10
    1 x 256              0.64            0.96          0.89                            4.5
"""

from __future__ import annotations

import ctypes
import os
import sys

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic


def _address(name: str) -> int:
    """The address of a function of torch's OpenMP library; 0 where that is not libgomp: kernels run on one thread."""
    library = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        function = getattr(ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", library)), name)
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


GOMP_PARALLEL, NUM_THREADS = _address("GOMP_parallel"), _address("omp_get_num_threads")
STARTER = np.array([GOMP_PARALLEL, 2], np.int64)
"""The function that starts threads, and the fewest threads for which it is called. recording.py replaces both."""
GOMP = STARTER.ctypes.data if GOMP_PARALLEL else 0
"""The first argument of every compiled kernel: the address of STARTER, or 0 for kernels that run on one thread. An
argument, because machine code kept on disk outlives an address."""


def threads_for(work: float) -> int:
    """How many threads to use for `work` microseconds of one thread's work; waking the team takes about two."""
    return torch.get_num_threads() if GOMP and work > 8 else 1


def _holds_arrays(kind: types.Type) -> bool:
    if isinstance(kind, types.BaseTuple):
        return any(_holds_arrays(part) for part in kind.types)  # type: ignore[attr-defined]
    return isinstance(kind, types.Array)


@intrinsic
def parallel_for(typingctx, gomp, threads, body, args):
    """Calls body(counter, *args) once on each of `threads` threads of the OpenMP team; returns when all have returned.

    gomp      GOMP
    args      numbers and tuples of numbers: a recorded call keeps a copy of them, and no reference to an array
    counter   address of an int64 that starts at 0 and that the threads share: they draw units of work from it with
              `fetch_add`, which balances the load whatever a unit costs
    body      a compiled function that does not raise; results are written to addresses in `args`
    """
    if _holds_arrays(args):
        raise TypingError(f"parallel_for: the arguments {args} hold an array; a kernel takes its address")
    called = body.get_call_type(typingctx, (types.int64, *args), {})

    def codegen(context, builder, signature, values):
        gomp, threads, _, packed = values
        compiled = body.dispatcher.overloads[called.args]
        context.active_code_library.add_linking_library(compiled.library)
        number, byte = ir.IntType(64), ir.IntType(8).as_pointer()
        # The counter and the arguments lie on the stack of the caller, which waits for the threads.
        counter = cgutils.alloca_once(builder, number)
        builder.store(number(0), counter)
        shared = ir.LiteralStructType([number, number, packed.type])
        captured = cgutils.alloca_once(builder, shared)
        size = number(context.get_abi_sizeof(shared))
        numbers = ir.Constant(shared, ir.Undefined)
        for place, value in enumerate((builder.ptrtoint(counter, number), size, packed)):
            numbers = builder.insert_value(numbers, value, place)
        builder.store(numbers, captured)

        name = f"{builder.function.name}.{body.dispatcher.py_func.__name__}"
        outlined = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [byte]), name)
        outlined.linkage = "internal"
        inside = ir.IRBuilder(outlined.append_basic_block())
        given = inside.load(inside.bitcast(outlined.args[0], shared.as_pointer()), typ=shared)
        function = context.declare_function(builder.module, compiled.fndesc)
        inputs = [inside.extract_value(given, 0), *cgutils.unpack_tuple(inside, inside.extract_value(given, 2))]
        context.call_conv.call_function(inside, function, called.return_type, called.args, inputs)
        inside.ret_void()

        fewest = cgutils.alloca_once_value(builder, number((1 << 63) - 1))
        starter = builder.inttoptr(gomp, number.as_pointer())
        with builder.if_then(builder.icmp_signed("!=", gomp, number(0))):
            builder.store(builder.load(builder.gep(starter, [number(1)]), typ=number), fewest)
        with builder.if_else(builder.icmp_signed(">=", threads, builder.load(fewest))) as (many, one):
            with many:
                kind = ir.FunctionType(ir.VoidType(), [outlined.type, byte, ir.IntType(32), ir.IntType(32)])
                parallel = builder.inttoptr(builder.load(starter, typ=number), kind.as_pointer())
                count = builder.trunc(threads, ir.IntType(32))
                builder.call(parallel, [outlined, builder.bitcast(captured, byte), count, ir.IntType(32)(0)])
            with one:
                builder.call(outlined, [builder.bitcast(captured, byte)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, body, args), codegen
