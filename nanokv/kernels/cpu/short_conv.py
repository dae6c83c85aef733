"""The short convolution of Gated DeltaNet on a CPU: one pass over memory, a few channels of one request at a time.

A thread keeps the last inputs of its channels beside the rows that it has just read, so an output is four
multiply-adds and a silu of numbers in the first-level cache, the same in every step.

In place, because the system takes longer to provide fresh memory for the results of 2,048 rows (30 ms) than one thread
of an AMD Zen 3 takes to compute them (20).

In memory the numbers of a channel lie side by side (four weights, three inputs); in scratch those of a row do. Loops
that transpose them name each row, because LLVM then vectorises them (256 channels of a state take 0.07 us).
"""

from __future__ import annotations

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.exp import ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, narrow, size_of, view, widen
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.simd import convolve
from nanokv.kernels.planes import StatePlanes

F32, INT32 = np.empty(0, np.float32), np.empty(0, np.int32)
KERNEL = 4  # inputs of an output, in every released model
BLOCK = np.int64(256)  # channels of a unit of work
ROWS = np.int64(13)  # rows that are read at once: with the three inputs before them, 16 KiB


@inner
def _read_weights(source, rows, count, format):
    """[count, 4] numbers of a format at an address, as four rows of float32."""
    numbers = view(source, 4 * count, format)
    first, second, third, fourth = rows[0], rows[1], rows[2], rows[3]
    for c in range(count):
        first[c], second[c] = widen(numbers[4 * c]), widen(numbers[4 * c + 1])
        third[c], fourth[c] = widen(numbers[4 * c + 2]), widen(numbers[4 * c + 3])


@inner
def _read_state(source, rows, count, format):
    """[count, 3] numbers of a format at an address, as three rows of float32."""
    numbers = view(source, 3 * count, format)
    first, second, third = rows[0], rows[1], rows[2]
    for c in range(count):
        first[c], second[c], third[c] = widen(numbers[3 * c]), widen(numbers[3 * c + 1]), widen(numbers[3 * c + 2])


@inner
def _write_state(rows, target, count, format):
    """The inverse of `_read_state`."""
    numbers = view(target, 3 * count, format)
    first, second, third = rows[0], rows[1], rows[2]
    for c in range(count):
        numbers[3 * c], numbers[3 * c + 1] = narrow(first[c], format), narrow(second[c], format)
        numbers[3 * c + 2] = narrow(third[c], format)


@inner
def _work(
    counter, x, x_stride, weight, states, conv_offset, state_bytes, channels, starts, positions, state_ids, requests,
    format, weight_format, conv_format,
):  # fmt: skip
    """One thread of the kernel: takes units (a request, some channels) until none is left."""
    parts, size = (channels + BLOCK - 1) // BLOCK, size_of(format)
    starts, state_ids = view(starts, requests + 1, INT32), view(state_ids, requests, INT32)
    window, weights = np.empty((KERNEL - 1 + ROWS, BLOCK), np.float32), np.empty((KERNEL, BLOCK), np.float32)
    result = np.empty(BLOCK, np.float32)
    while True:
        unit = fetch_add(counter, 1)
        if unit >= requests * parts:
            break
        request, first = unit // parts, unit % parts * BLOCK
        start, end, count = np.int64(starts[request]), np.int64(starts[request + 1]), min(BLOCK, channels - first)
        if start == end:
            continue
        state = states + state_ids[request] * state_bytes + conv_offset
        state += first * (KERNEL - 1) * size_of(conv_format)
        _read_weights(weight + first * KERNEL * size_of(weight_format), weights, count, weight_format)
        if view(positions, end, INT32)[start] == 0:
            window[: KERNEL - 1] = ZERO
        else:
            _read_state(state, window, count, conv_format)
        for row in range(start, end, ROWS):
            rows, place = min(ROWS, end - row), x + (row * x_stride + first) * size
            for r in range(rows):
                source, line = view(place + r * x_stride * size, count, format), window[KERNEL - 1 + r]
                for c in range(count):
                    line[c] = widen(narrow(widen(source[c]), conv_format))
            for r in range(rows):
                convolve(count, BLOCK, window[r].ctypes.data, weights.ctypes.data, result.ctypes.data)
                target = view(place + r * x_stride * size, count, format)
                for c in range(count):
                    target[c] = narrow(result[c], format)
            for i in range(KERNEL - 1):  # the last inputs become those before the next rows
                window[i] = window[rows + i]
        _write_state(window, state, count, conv_format)


@compiled
def _short_conv(
    gomp, threads, x, x_stride, weight, states, conv_offset, state_bytes, channels, starts, positions, state_ids,
    requests, format, weight_format, conv_format,
):  # fmt: skip
    args = (
        x, x_stride, weight, states, conv_offset, state_bytes, channels, starts, positions, state_ids, requests,
        format.dtype, weight_format.dtype, conv_format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _work, args)


def short_conv(
    x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor, planes: StatePlanes, batch: Batch
) -> torch.Tensor:
    """As reference.short_conv."""
    (rows, channels), (x_stride, step) = x.shape, x.stride()
    if channels != planes.channels or weight.shape != (channels, KERNEL) or planes.kernel != KERNEL or step != 1:
        raise ValueError(
            f"short_conv: x {tuple(x.shape)} with strides {x.stride()} and weight {tuple(weight.shape)} do not fit "
            f"{planes} and a kernel of {KERNEL}"
        )
    weight = weight.contiguous()
    _short_conv(
        GOMP, threads_for(rows * channels / 1e3), x.data_ptr(), x_stride, weight.data_ptr(), states.data_ptr(),
        planes.conv_offset, planes.state_bytes, channels, batch.request_starts.data_ptr(), batch.positions.data_ptr(),
        batch.state_ids.data_ptr(), batch.num_requests, FORMAT[x.dtype], FORMAT[weight.dtype],
        FORMAT[planes.conv_dtype],
    )  # fmt: skip
    return x
