"""Attention over pages, tiled for the GPU: decodes split over the context, prefills tiled over their rows.

Up to MAX_HEADS query heads of a KV head share one program, so K and V are read once for all of them, and the products
are matrix products even for a single row. A step that mixes prefills and decodes runs both kernels, each on its own
requests. The device never waits for the host.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import DTYPES, dot, power_of_two
from nanokv.kernels.cuda.split_kv import Tiling, launch_attention, part_size, tile_rows

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import KVPlanes

TILE_BYTES = 40 << 10
"""Bytes of the largest tile of keys and values; a program has several in shared memory."""
MAX_HEADS = 32
"""Query heads of a KV head in one program: MLA has up to 128, with results 512 wide."""


@triton.jit
def attend(
    q, q_rope, positions, first, last, pool, table, k_offset, v_offset, rope_offset, page_bytes, page_size,
    token_stride, rope_stride, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_ROPE: tl.constexpr, V_IN_K: tl.constexpr, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax attention of BLOCK_M queries over tokens [first, last) of one request and KV head.

    Returns the weighted sums of values, not yet divided, the sums of weights, and the largest score, to the base 2.
    Online softmax (Milakov and Gimelshein 2018), as in Dao et al. 2022.
    """
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    dims, value_dims, rope_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_ROPE)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_valid = tokens < last
        page = tl.load(table + tokens // page_size, mask=is_valid, other=0).to(tl.int64)
        slot, page_at = (tokens % page_size).to(tl.int64), pool + page * page_bytes
        # Addresses stay in bytes up to the last step: offsets are multiples of 16 bytes, so loads are 16 bytes wide.
        at = page_at + slot * token_stride
        k_at = (at + k_offset).to(tl.pointer_type(FORMAT), bitcast=True)
        k = tl.load(k_at[:, None] + dims[None, :], mask=is_valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        scores = dot(q, tl.trans(k.to(q.dtype)), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if ROPE_DIM > 0:
            rope_at = (page_at + slot * rope_stride + rope_offset).to(tl.pointer_type(FORMAT), bitcast=True)
            is_rope = is_valid[:, None] & (rope_dims < ROPE_DIM)[None, :]
            rope_k = tl.load(rope_at[:, None] + rope_dims[None, :], mask=is_rope, other=0.0)
            scores = dot(q_rope, tl.trans(rope_k.to(q.dtype)), scores)
        is_seen = is_valid[None, :] & (tokens[None, :] <= positions[:, None])
        scores = tl.where(is_seen, scores * (scale * 1.4426950408889634), float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no token yet
        weights, fade = tl.exp2(scores - shift[:, None]), tl.exp2(best - shift)
        if V_IN_K:
            v = k
        else:
            v_at = (at + v_offset).to(tl.pointer_type(FORMAT), bitcast=True)
            is_value = is_valid[:, None] & (value_dims < VALUE_DIM)[None, :]
            v = tl.load(v_at[:, None] + value_dims[None, :], mask=is_value, other=0.0)
        acc = dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None])
        total = total * fade + tl.sum(weights, 1)
        best = highest
    return acc, total, best


@triton.jit(do_not_specialize=["requests", "splits", "tables_row", "page_size"])
def attention_kernel(
    q, q_row, q_head, pool, positions, starts, tables, tables_row, requests, out, parts, part_scores, splits, k_offset,
    v_offset, rope_offset, page_bytes, page_size, token_stride, head_stride, rope_stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROPE: tl.constexpr,
    V_IN_K: tl.constexpr, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    IS_DECODE: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, KV head and block of its query heads, part of the context).

    In a tile, query m is row m // BLOCK_H and head m % BLOCK_H. The decode launch takes requests of one row,
    a tile each; the prefill launch takes all others, in tiles of BLOCK_Q rows.
    """
    blocks: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    request, row0, end = tile_rows(starts, requests, tl.program_id(0), BLOCK_Q, IS_DECODE)
    if row0 >= end:
        return
    m = tl.arange(0, BLOCK_M)
    rows, heads = row0 + m // BLOCK_H, block * BLOCK_H + m % BLOCK_H
    is_used = (m < BLOCK_Q * BLOCK_H) & (rows < end) & (heads < GROUP)
    row_positions = tl.load(positions + rows, mask=is_used, other=-1)
    length = tl.max(row_positions, 0) + 1
    first, last = 0, length
    if IS_SPLIT:
        span = part_size(length, splits, BLOCK_N)
        first = tl.program_id(2) * span
        last = tl.minimum(first + span, length)
        if first >= length:
            return
    query = rows.to(tl.int64) * q_row + (kv_head * GROUP + heads) * q_head
    dims, rope_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_ROPE)
    is_query = is_used[:, None] & (dims < HEAD_DIM)[None, :]
    q_main = tl.load(q + query[:, None] + dims[None, :], mask=is_query, other=0.0)
    q_rope = q_main
    if ROPE_DIM > 0:
        is_rope = is_used[:, None] & (rope_dims < ROPE_DIM)[None, :]
        q_rope = tl.load(q + query[:, None] + (HEAD_DIM + rope_dims)[None, :], mask=is_rope, other=0.0)
    acc, total, best = attend(
        q_main, q_rope, row_positions, first, last, pool + kv_head.to(tl.int64) * head_stride,
        tables + tl.cast(request, tl.int64) * tables_row, k_offset, v_offset, rope_offset - kv_head * head_stride,
        page_bytes, page_size, token_stride, rope_stride, scale, HEAD_DIM, VALUE_DIM, ROPE_DIM, BLOCK_D, BLOCK_V,
        BLOCK_ROPE, V_IN_K, FORMAT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: an unused query of the tile
    query_head = kv_head * GROUP + heads
    value_dims = tl.arange(0, BLOCK_V)
    is_result = is_used[:, None] & (value_dims < VALUE_DIM)[None, :]
    if IS_SPLIT:
        part = (tl.cast(request, tl.int64) * (KV_HEADS * GROUP) + query_head) * splits + tl.program_id(2)
        tl.store(parts + part[:, None] * VALUE_DIM + value_dims[None, :], acc, mask=is_result)
        tl.store(part_scores + part, best + tl.log2(total), mask=is_used)
    else:
        result = rows.to(tl.int64) * (KV_HEADS * GROUP) + query_head
        tl.store(out + result[:, None] * VALUE_DIM + value_dims[None, :], acc.to(out.dtype.element_ty), mask=is_result)


def tiling(planes: KVPlanes, group: int, itemsize: int, is_decode: bool) -> Tiling:
    """Blocks for one KV head's group of query heads; itemsize is that of a query's numbers, in bytes."""
    block_d, block_v = power_of_two(planes.head_dim, 16), power_of_two(planes.value_dim, 16)
    block_rope, block_h = power_of_two(planes.rope_dim, 16), min(group, MAX_HEADS)
    v_in_k = planes.k_offset == planes.v_offset and planes.head_dim == planes.value_dim
    token_bytes = itemsize * (block_d + (block_rope if planes.rope_dim else 0) + (0 if v_in_k else block_v))
    block_n = next((size for size in (64, 32) if size * token_bytes <= TILE_BYTES), 16)
    most = 128 if block_v <= 128 and itemsize == 2 else 64 if block_v <= 256 and itemsize == 2 else 32
    block_m = power_of_two(block_h, 16 if is_decode else most)
    blocks = {
        "BLOCK_H": block_h, "BLOCK_D": block_d, "BLOCK_V": block_v, "BLOCK_ROPE": block_rope, "V_IN_K": v_in_k,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_Q": 1 if is_decode else block_m // block_h,
    }  # fmt: skip
    # The loads of a tile wait for those of its page ids, so two stages of the pipeline keep one tile in flight.
    stages = 2 if itemsize > 2 else 5 if is_decode else 3
    return Tiling(blocks, 8 if block_m * block_v > 64 * 64 else 4, stages)


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.paged_attention.

    Source   Dao 2023 (flash-decoding: a decode's context split over programs, parts merged by log-sum-exp)
    """
    _, heads, dim = q.shape
    if q.stride(2) != 1 or heads % planes.kv_heads or dim != planes.head_dim + planes.rope_dim:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    return launch_attention(
        attention_kernel, partial(tiling, planes, heads // planes.kv_heads, q.element_size()), q, pool, planes,
        planes.value_dim, batch, k_offset=planes.k_offset, v_offset=planes.v_offset, rope_offset=planes.rope_offset,
        token_stride=planes.token_stride, head_stride=planes.head_stride, rope_stride=planes.rope_stride, scale=scale,
        HEAD_DIM=planes.head_dim, VALUE_DIM=planes.value_dim, ROPE_DIM=planes.rope_dim, FORMAT=DTYPES[planes.dtype],
    )  # fmt: skip
