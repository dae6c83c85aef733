"""The compiled half of a replay (recording.py): every thread of the team walks a list of kernel calls."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.intrinsics import fetch_add, view
from nanokv.kernels.cpu.omp import parallel_for

I64 = np.dtype(np.int64)


@emit.function(types.int64, types.int64)
def _call(builder, function, data):
    """Calls the outlined body of a kernel."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [builder.inttoptr(data, byte)])


@emit.function(types.int64)
def _wait(builder, barrier):
    """Waits until all threads of the team are here."""
    builder.call(builder.inttoptr(barrier, ir.FunctionType(ir.VoidType(), []).as_pointer()), [])


@inner
def _work(counter, calls, count, barrier):
    """One thread of a replay: takes part in the calls that want as many threads."""
    own = fetch_add(counter, 1)
    for n in range(count):
        call = view(calls + 32 * n, 4, I64)
        if own < call[2]:
            _call(call[0], call[1])
        if call[3] != 0:
            _wait(barrier)


@compiled
def replay(gomp, threads, calls, count, barrier):
    """Makes the calls of a list, int64 [count, 4]: address of a function, address of its data, its threads, and whether
    all threads wait for each other after it. barrier: address of the function that waits."""
    parallel_for(gomp, threads, _work, (calls, count, barrier))
