"""The compiled half of a replay (recording.py): every thread of the team walks a list of kernel calls."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.barrier import meet
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


@emit.function(types.int64, result=types.int64)
def _team_size(builder, function):
    """The threads of this team: calls omp_get_num_threads."""
    kind = ir.FunctionType(ir.IntType(32), [])
    return builder.zext(builder.call(builder.inttoptr(function, kind.as_pointer()), []), ir.IntType(64))


@inner
def _work(counter, calls, count, num_threads, state, syscall, futex):
    """One thread of a replay: takes part in the calls that want as many threads."""
    own, team = fetch_add(counter, 1), _team_size(num_threads)
    for n in range(count):
        call = view(calls + 32 * n, 4, I64)
        if own < call[2]:
            _call(call[0], call[1])
        if call[3] != 0:
            meet(state, team, syscall, futex)


@compiled
def replay(gomp, threads, calls, count, num_threads, state, syscall, futex):
    """Makes the calls of a list, int64 [count, 4]: address of a function, address of its data, its threads, and whether
    all threads wait for each other after it.

    num_threads              address of omp_get_num_threads
    state, syscall, futex    of the barrier, as barrier.meet takes them
    """
    parallel_for(gomp, threads, _work, (calls, count, num_threads, state, syscall, futex))
