"""Recorded steps: the kernel calls of a decode step, made once by Python and replayed by compiled code.

A decode step of 30 layers calls about 270 small kernels. Python takes 10 microseconds for each: to find the compiled
function, to convert its arguments, to allocate a result. And each call starts the threads, and waits for all of them. A
replay starts the threads once: every thread walks the list of calls, and meets the others at a barrier between two.

While a recording is made, nothing is computed: `parallel_for` hands the body of a kernel and its arguments to this
file instead of to the threads, and results are allocated in memory that the recording keeps. An operation that is
neither an allocation nor a view nor one of our kernels cannot be replayed: it raises CannotRecord.
Source: CUDA graphs, which record kernel launches in the same way.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanokv.kernels.cpu.barrier import FUTEX, SYSCALL, address, new_state
from nanokv.kernels.cpu.omp import GOMP, GOMP_PARALLEL, NUM_THREADS, STARTER
from nanokv.kernels.cpu.replay import replay

_I64 = np.dtype(np.int64)
_LINE = 8
"""int64 of a cache line: threads draw units from counters in lines of their own."""
_START = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
"""The type of GOMP_parallel: function, its data, threads, flags."""
_ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


IS_POSSIBLE = bool(GOMP and NUM_THREADS and SYSCALL)
"""Whether this system has what a replay needs."""


class CannotRecord(Exception):
    """A step does something that is no kernel call."""


class Memory:
    """Memory for the results of kernels, which all recordings of a model share.

    Results live no longer than the next layer, so the allocations of layer n take the places of those of layer n - 2.

    most_rows   of a step; memory is allocated for so many, whatever the rows of the first recording
    """

    def __init__(self, most_rows: int) -> None:
        self.most_rows = most_rows
        self._places: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def place(self, layer: int, first: int, num_bytes: int, rows: int) -> tuple[torch.Tensor, int]:
        """uint8 [num_bytes] for a result of a layer, in a step of `rows`; and the first place for the next result.

        first   of the places that no earlier result of the layer has taken
        """
        places = self._places[layer % 2]
        while first < len(places) and len(places[first]) < num_bytes:
            first += 1
        if first == len(places):
            places.append(torch.empty(num_bytes * -(-self.most_rows // rows), dtype=torch.uint8))
        return places[first][:num_bytes], first + 1


class Recording:
    """A list of kernel calls, in the order in which they were made, and what they need to be made again.

    memory   where their results lie; None: nowhere
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self._memory = memory
        self._calls: list[tuple[int, bytes, int]] = []

    def append(self, function: int, data: int, threads: int) -> None:
        """Adds a call: the address of the outlined body of a kernel, of its data, and its number of threads."""
        size = ctypes.cast(data, ctypes.POINTER(ctypes.c_int64))[1]
        self._calls.append((function, ctypes.string_at(data, size), threads))

    def close(self) -> None:
        """Lays the calls out for `replay`: addresses of functions and data, threads, and whether a barrier follows."""
        count = len(self._calls)
        starts = np.cumsum([0] + [-(-len(data) // 64) * 64 for _, data, _ in self._calls])
        self._data, self._counters = np.zeros(starts[-1] + 64, np.uint8), np.zeros(count * _LINE, _I64)
        base = -(-self._data.ctypes.data // 64) * 64
        self._list, self.threads = np.zeros((count, 4), _I64), max((call[2] for call in self._calls), default=1)
        for n, (function, data, threads) in enumerate(self._calls):
            ctypes.memmove(base + int(starts[n]), data, len(data))
            ctypes.c_int64.from_address(base + int(starts[n])).value = self._counters.ctypes.data + 8 * _LINE * n
            follows = self._calls[n + 1][2] if n + 1 < count else 1
            waits = max(threads, follows) > 1 and n + 1 < count
            self._list[n] = function, base + int(starts[n]), threads, waits
        self._calls.clear()
        self._barrier = new_state()

    def replay(self) -> None:
        """Makes the calls again."""
        self._counters[:] = 0
        calls, barrier = self._list.ctypes.data, address(self._barrier)
        replay(GOMP, self.threads, calls, len(self._list), NUM_THREADS, barrier, SYSCALL, FUTEX)


class _Allocations(TorchDispatchMode):
    """Gives results places in Memory, lets views pass, and refuses everything else."""

    def __init__(self, memory: Memory, rows: int) -> None:
        super().__init__()
        self._memory, self._rows = memory, rows
        self._layer = self._next = 0

    def next_layer(self) -> None:
        self._layer, self._next = self._layer + 1, 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ALLOCATIONS:
            like = function(*args, **{**(kwargs or {}), "device": "meta"})
            place, self._next = self._memory.place(self._layer, self._next, like.nbytes, self._rows)
            return place.view(like.dtype).view(like.shape)
        found = function(*args, **(kwargs or {})) if function.is_view else None
        # Without gradients, `contiguous`, `to` and `reshape` arrive here whole: they are views, or they are copies.
        if not all(_shares_memory(view, args) for view in (found if isinstance(found, tuple | list) else (found,))):
            raise CannotRecord(str(function))
        return found


def _shares_memory(result: Any, arguments: Any) -> bool:
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    memories = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() in memories


class _Recorder:
    """Stands in for GOMP_parallel while a step is recorded: notes the calls of one thread, and makes all others.

    A kernel of another thread may still hold the address of `callback` when the recording has ended, so there is one
    for the life of the process.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None
        self.made = Recording()
        self.fault: BaseException | None = None
        self._parallel = _START(GOMP_PARALLEL)
        self._callback = _START(self._call)
        self._starter = np.array([ctypes.cast(self._callback, ctypes.c_void_p).value, 1], np.int64)
        self._usual = STARTER.copy()

    def _call(self, function: int, data: int, threads: int, flags: int) -> None:
        if threading.get_ident() != self.owner:  # another model of this process computes meanwhile
            self._parallel(function, data, threads, flags)
            return
        try:
            self.made.append(function, data, threads)
        except BaseException as error:  # ctypes would drop it, and the call would be missing
            self.fault = error

    def begin(self, made: Recording) -> None:
        self.owner, self.made, self.fault = threading.get_ident(), made, None
        STARTER[:] = self._starter

    def end(self) -> None:
        STARTER[:], self.owner = self._usual, None

    def check(self) -> None:
        """Raises what a call of the recording has raised."""
        if self.fault is not None:
            raise self.fault

    def renew(self) -> None:
        """In a forked child: the thread that recorded is gone."""
        self.lock = threading.Lock()
        self.end()


_recorder = _Recorder()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_recorder.renew)


@contextmanager
def recording(memory: Memory, rows: int) -> Iterator[tuple[Recording, Callable[[], None]]]:
    """Inside the block, kernel calls of this thread are recorded and not made.

    rows     of the step, at most memory.most_rows
    Yields   the Recording, complete after the block, and a function to call after each layer
    Raises   CannotRecord, from inside the block
    """
    made, allocations = Recording(memory), _Allocations(memory, rows)
    with _recorder.lock:
        try:
            _recorder.begin(made)
            with allocations:
                yield made, allocations.next_layer
            _recorder.check()
        finally:
            _recorder.end()
    made.close()
