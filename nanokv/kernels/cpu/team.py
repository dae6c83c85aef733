"""Threads: the OpenMP team that torch has already started, borrowed for compiled kernels.

A second pool beside torch's would spin on the same cores between layers. So a kernel is handed to the very function
that torch's own parallel loops go through: GOMP_parallel, of whichever OpenMP library torch was linked to. The team is
torch's, its size is torch.get_num_threads(), and its threads are still awake from the matrix product before.
"""

from __future__ import annotations

import ctypes
import os

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _find_parallel() -> int:
    """Address of GOMP_parallel, or 0 where torch's OpenMP library has none (then kernels run on one thread)."""
    library = "libtorch_cpu.so" if os.name == "posix" else "torch_cpu.dll"
    try:
        function = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


TEAM = _find_parallel()


def threads_for(work: float) -> int:
    """How many threads to use for `work` microseconds of one thread's work: waking a team costs about two."""
    return torch.get_num_threads() if TEAM and work > 8 else 1


@intrinsic
def together(typingctx, team, threads, body, args):
    """body(*args) once on each of `threads` threads of the team at address `team`; returns when all are done.

    body must not raise; what the threads share stands behind addresses in `args`.
    """
    signature = body.get_call_type(typingctx, tuple(args), {})

    def codegen(context, builder, call, values):
        team, threads, _, packed = values
        compiled = body.dispatcher.overloads[signature.args]
        context.active_code_library.add_linking_library(compiled.library)
        place = cgutils.alloca_once_value(builder, packed)
        anything = ir.IntType(8).as_pointer()
        outlined = ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [anything]), f"{builder.function.name}.together"
        )
        outlined.linkage = "internal"
        inside = ir.IRBuilder(outlined.append_basic_block())
        there = inside.load(inside.bitcast(outlined.args[0], packed.type.as_pointer()), typ=packed.type)
        function = context.declare_function(builder.module, compiled.fndesc)
        context.call_conv.call_function(
            inside, function, signature.return_type, signature.args, cgutils.unpack_tuple(inside, there)
        )
        inside.ret_void()
        kind = ir.FunctionType(ir.VoidType(), [outlined.type, anything, ir.IntType(32), ir.IntType(32)])
        parallel = builder.inttoptr(team, kind.as_pointer())
        thread_count = builder.trunc(threads, ir.IntType(32))
        builder.call(parallel, [outlined, builder.bitcast(place, anything), thread_count, ir.IntType(32)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, body, args), codegen
