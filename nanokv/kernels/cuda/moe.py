"""Experts on the GPU: rows sorted by expert, then two grouped matrix products, each tile with its expert's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import DTYPES, dot, launch, num_tiles, tile_of
from nanokv.kernels.cuda.rounding import silu

if TYPE_CHECKING:
    from nanokv.kernels.experts import Experts

BLOCK_N, BLOCK_K = 64, 64


@triton.jit
def tile_product(x, x_row, rows, is_row, weight, columns, WIDTH: tl.constexpr, OUT: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Some rows of x times some rows of a weight [OUT, WIDTH]: [BLOCK_M, BLOCK_N], float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        dims = first + tl.arange(0, BLOCK_K)
        is_dim = dims < WIDTH
        a = tl.load(x + rows[:, None] * x_row + dims[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
        b = tl.load(weight + columns.to(tl.int64)[None, :] * WIDTH + dims[:, None],
                    mask=(columns < OUT)[None, :] & is_dim[:, None], other=0.0)  # fmt: skip
        acc = dot(a, b, acc)
    return acc


@triton.jit
def experts_kernel(
    x, x_row, weights, starts, order, factors, out,
    EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, IS_UP: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (tile of the pairs of a row and its expert, block of columns). Pairs are sorted by expert.

    IS_UP    x [rows, WIDTH] is gathered; gate and up of the expert, then silu(gate) * up: out [pairs, OUT], sorted
    else     x [pairs, WIDTH], sorted; times the pair's factor, back in the order of rows: out [pairs, OUT]
    """
    expert, first, end = tile_of(starts, EXPERTS, tl.program_id(0), BLOCK_M)
    if first >= end:
        return
    pairs = first + tl.arange(0, BLOCK_M)
    is_row = pairs < end
    origin = tl.load(order + pairs, mask=is_row, other=0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    number: tl.constexpr = out.dtype.element_ty
    # The weights of an expert are a tensor of their own, passed as an address.
    weight = tl.multiple_of(tl.load(weights + expert).to(tl.pointer_type(FORMAT)), 16)
    if IS_UP:
        rows, targets = origin // PER_TOKEN, pairs.to(tl.int64)
        gate = tile_product(x, x_row, rows, is_row, weight, columns, WIDTH, OUT, BLOCK_M, BLOCK_N, BLOCK_K)
        up = tile_product(x, x_row, rows, is_row, weight + OUT * WIDTH, columns, WIDTH, OUT, BLOCK_M, BLOCK_N, BLOCK_K)
        result = silu(gate.to(number).to(tl.float32)) * up.to(number).to(tl.float32)
    else:
        targets = origin
        result = tile_product(
            x, x_row, pairs.to(tl.int64), is_row, weight, columns, WIDTH, OUT, BLOCK_M, BLOCK_N, BLOCK_K
        )
        result = result * tl.load(factors + origin, mask=is_row, other=0.0)[:, None]
    target = out + targets[:, None] * OUT + columns[None, :]
    tl.store(target, result.to(number), mask=is_row[:, None] & (columns < OUT)[None, :])


def add_experts(
    out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts
) -> None:
    """As ops.add_experts; the host does not wait for the number of rows of an expert."""
    (rows, width), per_token, count = x.shape, chosen.shape[1], experts.count
    if rows == 0:
        return
    sorted_experts, order = chosen.flatten().sort(stable=True)
    starts = torch.searchsorted(sorted_experts, torch.arange(count + 1, device=x.device)).int()
    hidden = x.new_empty(rows * per_token, experts.hidden)
    results = x.new_empty(rows, per_token, width)
    block_m = 16 if rows * per_token <= 16 * count else 64
    tiles = num_tiles(rows * per_token, count, block_m)
    shared = {
        "starts": starts, "order": order, "factors": weights, "EXPERTS": count, "PER_TOKEN": per_token,
        "FORMAT": DTYPES[x.dtype], "BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_stages": 3,
    }  # fmt: skip
    launch(
        experts_kernel, (tiles, -(-experts.hidden // BLOCK_N)), x=x, x_row=x.stride(0), weights=experts.gate_up_at,
        out=hidden, WIDTH=width, OUT=experts.hidden, IS_UP=True, **shared,
    )  # fmt: skip
    launch(
        experts_kernel, (tiles, -(-width // BLOCK_N)), x=hidden, x_row=hidden.stride(0), weights=experts.down_at,
        out=results, WIDTH=experts.hidden, OUT=width, IS_UP=False, **shared,
    )  # fmt: skip
    out += results.sum(1)
