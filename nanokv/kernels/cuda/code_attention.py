"""Attention on codes: as attention.py, but K and V are decoded in registers, once for all query heads of a KV head.

The scale of a token multiplies its scores and weights, not every number of its vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.attention import MAX_HEADS
from nanokv.kernels.cuda.codes import load_codes, plane_args
from nanokv.kernels.cuda.launch import dot, power_of_two
from nanokv.kernels.cuda.split_kv import Tiling, launch_attention, part_size, tile_rows

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import CodePlanes


@triton.jit
def load_plane(page, slot, offset, high_offset, scale_offset, kv_head, page_size, is_valid, table,
            BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Table values [tokens, BLOCK_D] and scales [tokens] of the K or V of some tokens, float32."""
    size: tl.constexpr = DIM * (2 if BITS == 3 else BITS) // 8
    vector = kv_head.to(tl.int64) * page_size + slot
    low, high = page + offset + vector * size, page + high_offset + vector * (DIM // 8)
    codes = load_codes(low, high, is_valid, BITS, DIM, BLOCK_D)
    scale = (page + scale_offset + vector * 2).to(tl.pointer_type(tl.float16), bitcast=True)
    values = tl.load(table + codes, mask=(tl.arange(0, BLOCK_D) < DIM)[None, :], other=0.0)
    return values, tl.load(scale, mask=is_valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["requests", "splits", "tables_row", "page_size"])
def code_attention_kernel(
    q, q_row, q_head, pool, positions, starts, tables, tables_row, requests, out, parts, part_scores, splits,
    k_table, k_offset, k_high_offset, k_scale_offset, v_table, v_offset, v_high_offset, v_scale_offset, page_bytes,
    page_size, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, K_DIM: tl.constexpr, K_BITS: tl.constexpr,
    V_DIM: tl.constexpr, V_BITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, IS_DECODE: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, KV head and block of its query heads, part of the context), as attention_kernel."""
    blocks: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    number: tl.constexpr = q.dtype.element_ty
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
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    query_head = kv_head * GROUP + heads
    query = q + (rows.to(tl.int64) * q_row + query_head * q_head)[:, None] + dims[None, :]
    queries = tl.load(query, mask=is_used[:, None] & (dims < K_DIM)[None, :], other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    table = tables + tl.cast(request, tl.int64) * tables_row
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        is_valid = tokens < last
        page = pool + tl.load(table + tokens // page_size, mask=is_valid, other=0).to(tl.int64) * page_bytes
        slot = (tokens % page_size).to(tl.int64)
        k, k_scale = load_plane(page, slot, k_offset, k_high_offset, k_scale_offset, kv_head, page_size, is_valid,
                             k_table, K_BITS, K_DIM, BLOCK_D)  # fmt: skip
        scores = dot(queries, tl.trans(k.to(number)), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        scores = scores * (k_scale * (scale * 1.4426950408889634))[None, :]
        is_seen = is_valid[None, :] & (tokens[None, :] <= row_positions[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights, fade = tl.exp2(scores - shift[:, None]), tl.exp2(best - shift)
        v, v_scale = load_plane(page, slot, v_offset, v_high_offset, v_scale_offset, kv_head, page_size, is_valid,
                             v_table, V_BITS, V_DIM, BLOCK_V)  # fmt: skip
        acc = dot((weights * v_scale[None, :]).to(number), v.to(number), acc * fade[:, None])
        total = total * fade + tl.sum(weights, 1)
        best = highest
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    is_result = is_used[:, None] & (value_dims < V_DIM)[None, :]
    if IS_SPLIT:
        part = (tl.cast(request, tl.int64) * (KV_HEADS * GROUP) + query_head) * splits + tl.program_id(2)
        tl.store(parts + part[:, None] * V_DIM + value_dims[None, :], acc, mask=is_result)
        tl.store(part_scores + part, best + tl.log2(total), mask=is_used)
    else:
        result = rows.to(tl.int64) * (KV_HEADS * GROUP) + query_head
        tl.store(out + result[:, None] * V_DIM + value_dims[None, :], acc.to(number), mask=is_result)


def code_attention(q: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch, scale: float) -> torch.Tensor:
    """As reference.code_attention."""
    _, heads, dim = q.shape
    if q.stride(2) != 1 or heads % planes.kv_heads or dim != planes.k.dim:
        raise ValueError(f"code_attention: q {tuple(q.shape)} with strides {q.stride()} does not fit {planes}")
    block_h, block_v = min(heads // planes.kv_heads, MAX_HEADS), power_of_two(planes.v.dim, 16)

    def tiling(is_decode: bool) -> Tiling:
        block_m = power_of_two(block_h, 16 if is_decode else 64)
        return Tiling({
            "BLOCK_H": block_h, "BLOCK_D": power_of_two(dim, 16), "BLOCK_V": block_v, "BLOCK_M": block_m,
            "BLOCK_N": 64 if block_v <= 64 else 32, "BLOCK_Q": 1 if is_decode else block_m // block_h,
        })  # fmt: skip

    return launch_attention(
        code_attention_kernel, tiling, q, pool, planes, planes.v.dim, batch, scale=scale,
        **plane_args(planes.k, "k_"), **plane_args(planes.v, "v_"),
    )  # fmt: skip
