"""Split-KV: how attention is cut into programs (rows into tiles, the context of a decode into parts) and merged again.

Source   Dao 2023 (flash-decoding: parts merged by log-sum-exp)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import launch, num_tiles, power_of_two, tile_of

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import CodePlanes, KVPlanes

MAX_PROGRAMS = 264
"""Programs that fill a large GPU: two on each of an H100's 132 multiprocessors. Decodes are split up to this number."""
MIN_PART = 256
"""Tokens of a part below which splitting costs more than it gains."""


@triton.jit
def tile_rows(starts, requests, tile, BLOCK_Q: tl.constexpr, IS_DECODE: tl.constexpr):
    """The request of a tile, its first row and the request's end; no rows where they belong to the other launch.

    The decode launch has a tile for each single row. The prefill launch has tiles of BLOCK_Q rows, for others.
    """
    if IS_DECODE:
        request = tile
        row0, end = tl.load(starts + request), tl.load(starts + request + 1)
        end = tl.where(end - row0 == 1, end, row0)
    else:
        request, row0, end = tile_of(starts, requests, tile, BLOCK_Q)
        end = tl.where(end - tl.load(starts + request) == 1, row0, end)
    return request, row0, end


@triton.jit
def part_size(length, splits, BLOCK_N: tl.constexpr):
    """Tokens of each part, except the last, of a context of `length`."""
    return tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    parts, part_scores, positions, starts, out, splits,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (request, head): merges the parts of the context, weighted by their sums of exponents (log-sum-exp)."""
    request, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(starts + request)
    if tl.load(starts + request + 1) - row != 1:
        return
    length = tl.load(positions + row) + 1
    size = part_size(length, splits, BLOCK_N)
    first = (request.to(tl.int64) * HEADS + head) * splits
    dims = tl.arange(0, BLOCK_V)
    best, total, acc = float("-inf"), 0.0, tl.zeros([BLOCK_V], tl.float32)
    for part in range(0, tl.cdiv(length, size)):
        score = tl.load(part_scores + first + part)
        values = tl.load(parts + (first + part) * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
        highest = tl.maximum(best, score)
        fade, weight = tl.exp2(best - highest), tl.exp2(score - highest)
        acc, total, best = acc * fade + values * weight, total * fade + weight, highest
    place = out + (row.to(tl.int64) * HEADS + head) * VALUE_DIM
    tl.store(place + dims, (acc / total).to(out.dtype.element_ty), mask=dims < VALUE_DIM)


@dataclass(frozen=True)
class Tiling:
    """How one launch is tiled: compile-time arguments of the kernel, and its options."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


def num_splits(programs: int, longest: int) -> int:
    """Parts of a context, from what the host knows: programs without splitting, and the longest possible context."""
    return max(1, min(MAX_PROGRAMS // programs, longest // MIN_PART))


def allocate_parts(out: torch.Tensor, count: int, value_dim: int, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 for `count` partial results and their scores; `out`, which stays unread, where nothing is split."""
    if splits == 1:
        return out, out
    return out.new_empty(count * value_dim, dtype=torch.float32), out.new_empty(count, dtype=torch.float32)


def launch_attention(
    kernel: Any, tiling: Callable[[bool], Tiling], q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes | CodePlanes,
    value_dim: int, batch: Batch, **args: Any,
) -> torch.Tensor:  # fmt: skip
    """Launches an attention kernel on the decodes and on the prefills of a batch, and merges the parts of the decodes.

    A batch of as many rows as requests is one row of each.

    tiling    of the decodes (True) or the prefills (False)
    args      of the kernel, apart from those that both kernels share
    Returns   [rows, heads * value_dim], dtype of q
    """
    (rows, heads, _), requests = q.shape, batch.num_requests
    out = q.new_empty(rows, heads * value_dim)
    if rows == 0:
        return out
    group = heads // planes.kv_heads
    for is_decode in (True, False) if rows != requests else (True,):
        tile = tiling(is_decode)
        programs = planes.kv_heads * -(-group // tile.blocks["BLOCK_H"])
        splits = num_splits(requests * programs, batch.page_tables.shape[1] * planes.page_size) if is_decode else 1
        parts, part_scores = allocate_parts(out, requests * heads * splits, value_dim, splits)
        tiles = requests if is_decode else num_tiles(rows, requests, tile.blocks["BLOCK_Q"])
        launch(
            kernel, (tiles, programs, splits), num_warps=tile.num_warps, num_stages=tile.num_stages, q=q,
            q_row=q.stride(0), q_head=q.stride(1), pool=pool, positions=batch.positions, starts=batch.request_starts,
            tables=batch.page_tables, tables_row=batch.page_tables.stride(0), requests=requests, out=out, parts=parts,
            part_scores=part_scores, splits=splits, page_bytes=planes.page_bytes, page_size=planes.page_size,
            KV_HEADS=planes.kv_heads, GROUP=group, IS_DECODE=is_decode, IS_SPLIT=splits > 1, **tile.blocks, **args,
        )  # fmt: skip
        if splits > 1:
            launch(
                merge_kernel, (requests, heads), num_warps=1 if value_dim <= 128 else 4, parts=parts,
                part_scores=part_scores, positions=batch.positions, starts=batch.request_starts, out=out, splits=splits,
                HEADS=heads, VALUE_DIM=value_dim, BLOCK_V=power_of_two(value_dim, 16), BLOCK_N=tile.blocks["BLOCK_N"],
            )  # fmt: skip
    return out
