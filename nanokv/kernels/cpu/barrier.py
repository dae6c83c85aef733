"""A barrier whose threads spin for as long as that has paid, then sleep.

libgomp has one number of spins for a process, whatever happens. On an idle machine a thread that arrives early waits
microseconds, and sleeping would cost more. Beside other programs the thread that it waits for may have no processor for
milliseconds, and spinning takes the one that it could have. So a thread that has slept spins longer before the next
sleep if this one was short, and less if it was long.
Source: adaptive mutexes (glibc, PTHREAD_MUTEX_ADAPTIVE_NP); futex(2) of Linux.
"""

from __future__ import annotations

import ctypes
import platform
import sys

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.compiled import inner
from nanokv.kernels.cpu.intrinsics import fetch_add

MOST_SPINS, LEAST_SPINS = 10_000, 50
SHORT_TICKS = 2_500_000
"""Of the CPU's counter of cycles: about a millisecond. A sleep and the return from it take some 0.2 on a virtual
machine."""
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
"""The number of the system call; 0: this barrier does not exist here."""
SYSCALL = ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0 if FUTEX else 0
_WAIT, _WAKE, _ALL = np.int64(128), np.int64(129), np.int64(2**31 - 1)
# Places in the state, in cache lines of their own. On these machines the low half of a number comes first, and is what
# a futex compares.
_ARRIVED, _GENERATION, _SLEEPERS, _SPINS = (np.int64(64 * n) for n in range(4))


def new_state() -> np.ndarray:
    """The state of a barrier: four cache lines of int64, and room to begin at the first byte of one."""
    state = np.zeros(5 * 8, np.int64)
    state[(address(state) + int(_SPINS) - state.ctypes.data) // 8] = MOST_SPINS
    return state


def address(state: np.ndarray) -> int:
    """Where the cache lines of a state begin."""
    return -(-state.ctypes.data // 64) * 64


@emit.function(types.int64, result=types.int64)
def _load(builder, place):
    return builder.load_atomic(builder.inttoptr(place, place.type.as_pointer()), "seq_cst", 8, typ=place.type)


@emit.function(types.int64, types.int64)
def _store(builder, place, number):
    builder.store_atomic(number, builder.inttoptr(place, number.type.as_pointer()), "seq_cst", 8)


@emit.function(result=types.int64)
def _ticks(builder):
    kind = ir.FunctionType(ir.IntType(64), [])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])


@emit.function()
def _pause(builder):
    """Leaves the processor to its other thread for a moment, where the CPU has a word for that."""
    if platform.machine() in ("x86_64", "AMD64"):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])


@emit.function(*[types.int64] * 5)
def _futex(builder, syscall, number, place, operation, value):
    kind = ir.FunctionType(place.type, [place.type] * 7)
    zero = place.type(0)
    builder.call(builder.inttoptr(syscall, kind.as_pointer()), [number, place, operation, value, zero, zero, zero])


@inner
def meet(state, team, syscall, futex):
    """Returns when `team` threads have called it.

    state            address of a state
    syscall, futex   SYSCALL and FUTEX: arguments, because machine code kept on disk outlives an address
    """
    generation = _load(state + _GENERATION)
    if fetch_add(state + _ARRIVED, 1) == team - 1:
        _store(state + _ARRIVED, 0)
        _store(state + _GENERATION, generation + 1)
        if _load(state + _SLEEPERS) > 0:
            _futex(syscall, futex, state + _GENERATION, _WAKE, _ALL)
        return
    spins, begin = _load(state + _SPINS), _ticks()
    for _ in range(spins):
        _pause()
        if _load(state + _GENERATION) != generation:
            return
    # A thread that counts itself first, and looks again then, is seen by the last one, or sees what that has written.
    fetch_add(state + _SLEEPERS, 1)
    while _load(state + _GENERATION) == generation:
        _futex(syscall, futex, state + _GENERATION, _WAIT, generation & 0xFFFFFFFF)
    fetch_add(state + _SLEEPERS, -1)
    if _ticks() - begin < SHORT_TICKS:
        _store(state + _SPINS, min(2 * spins, MOST_SPINS))
    else:
        _store(state + _SPINS, max(spins // 4, LEAST_SPINS))
