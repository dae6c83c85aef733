"""The short convolution of Gated DeltaNet, in place: one program a request and block of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import DTYPES, launch, power_of_two
from nanokv.kernels.cuda.rounding import silu

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import StatePlanes

BLOCK_C, BLOCK_R = 32, 64
"""Channels and rows that a program has in registers."""


@triton.jit
def inputs(x, x_row, state, rows, start, end, dims, is_valid, is_kept, KERNEL: tl.constexpr):
    """Inputs of some rows of a request, in the format of its state; rows before `start` are read from the state."""
    number: tl.constexpr = state.dtype.element_ty
    is_row = is_valid & (rows >= start) & (rows < end)
    value = tl.load(x + rows.to(tl.int64) * x_row + dims, mask=is_row, other=0.0).to(number)
    before = rows - start + (KERNEL - 1)  # the state holds KERNEL - 1 inputs, oldest first
    is_before = is_kept & (rows < start) & (before >= 0)
    return tl.where(is_before, tl.load(state + dims * (KERNEL - 1) + before, mask=is_before, other=0.0), value)


@triton.jit
def short_conv_kernel(
    x, x_row, weight, states, state_bytes, conv_offset, state_ids, starts, positions,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Program (request, block of channels).

    Results overwrite inputs, so the tiles of rows run from the last to the first: the inputs before a tile are still
    there when it runs. A barrier separates the loads and the stores of a tile.
    """
    request = tl.program_id(0)
    start, end = tl.load(starts + request), tl.load(starts + request + 1)
    if start >= end:
        return
    dims = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_valid = dims < CHANNELS
    place = states + tl.load(state_ids + request).to(tl.int64) * state_bytes + conv_offset
    state = place.to(tl.pointer_type(FORMAT), bitcast=True)
    # Before position 0 all inputs are 0: no channel of the state is read.
    is_kept = dims < tl.where(tl.load(positions + start) > 0, CHANNELS, 0)
    slots = tl.arange(0, BLOCK_K)
    last = inputs(x, x_row, state, end - (KERNEL - 1) + slots[:, None], start, end, dims[None, :], is_valid[None, :],
                  is_kept[None, :], KERNEL)  # fmt: skip
    tiles = tl.cdiv(end - start, BLOCK_R)
    for step in range(0, tiles):
        rows = start + (tiles - 1 - step) * BLOCK_R + tl.arange(0, BLOCK_R)
        total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for tap in tl.static_range(KERNEL):
            taken = inputs(x, x_row, state, rows[:, None] - (KERNEL - 1 - tap), start, end, dims[None, :],
                           is_valid[None, :], is_kept[None, :], KERNEL)  # fmt: skip
            factor = tl.load(weight + dims * KERNEL + tap, mask=is_valid, other=0.0).to(tl.float32)
            total += taken.to(tl.float32) * factor[None, :]
        tl.debug_barrier()
        out = x + rows[:, None].to(tl.int64) * x_row + dims[None, :]
        tl.store(out, silu(total).to(x.dtype.element_ty), mask=(rows < end)[:, None] & is_valid[None, :])
    tl.debug_barrier()
    is_new = is_valid[None, :] & (slots < KERNEL - 1)[:, None]
    tl.store(state + dims[None, :] * (KERNEL - 1) + slots[:, None], last, mask=is_new)


def short_conv(
    x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor, planes: StatePlanes, batch: Batch
) -> torch.Tensor:
    """As reference.short_conv."""
    if x.shape[1] != planes.channels or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"short_conv: x {tuple(x.shape)} with strides {x.stride()} does not fit {planes}")
    # A decode is one row a request: a program takes more channels instead.
    is_decode = x.shape[0] == batch.num_requests
    block_r, block_c = (1, 4 * BLOCK_C) if is_decode else (BLOCK_R, BLOCK_C)
    launch(
        short_conv_kernel, (batch.num_requests, -(-planes.channels // block_c)), x=x, x_row=x.stride(0), weight=weight,
        states=states, state_bytes=planes.state_bytes, conv_offset=planes.conv_offset, state_ids=batch.state_ids,
        starts=batch.request_starts, positions=batch.positions, CHANNELS=planes.channels, KERNEL=planes.kernel,
        BLOCK_K=power_of_two(planes.kernel - 1), BLOCK_C=block_c, BLOCK_R=block_r, FORMAT=DTYPES[planes.conv_dtype],
    )  # fmt: skip
    return x
