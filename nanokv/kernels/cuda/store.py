"""Writes of a step into pages: norm, rotation and write of one head a program, in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import DTYPES, launch, power_of_two
from nanokv.kernels.cuda.rounding import weighted
from nanokv.kernels.planes import KVPlanes

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import HeadNorms


@triton.jit
def page_slot(pool, write_pages, write_slots, row, page_bytes, stride, FORMAT: tl.constexpr):
    """A pointer to the slot of a row, in a plane that begins at offset 0 of each page."""
    page, slot = tl.load(write_pages + row).to(tl.int64), tl.load(write_slots + row).to(tl.int64)
    return (pool + page * page_bytes + slot * stride).to(tl.pointer_type(FORMAT), bitcast=True)


@triton.jit
def rotated(low, high, cos_sin, position, half_dims, HALF: tl.constexpr):
    """Both halves of a head, float32, rotated by the angles of a position."""
    angles = cos_sin + position.to(tl.int64) * (2 * HALF) + half_dims
    cos = tl.load(angles, mask=half_dims < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=half_dims < HALF, other=0.0)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def rope_and_store_kernel(
    qkv, qkv_row, cos_sin, positions, write_pages, write_slots, pool, q_norm, k_norm, eps, k_offset, v_offset,
    page_bytes, token_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, HAS_NORMS: tl.constexpr, STORES: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Program (row, head of q | k | v), or of q | k where nothing is stored.

    A head is held in three parts: the two halves that are rotated, and the rest.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    number: tl.constexpr = qkv.dtype.element_ty
    head_at = qkv + row.to(tl.int64) * qkv_row + head * HEAD_DIM
    half_dims, rest_dims = tl.arange(0, BLOCK_HALF), 2 * HALF + tl.arange(0, BLOCK_REST)
    is_half, is_rest = half_dims < HALF, rest_dims < HEAD_DIM
    low = tl.load(head_at + half_dims, mask=is_half, other=0.0)
    high = tl.load(head_at + HALF + half_dims, mask=is_half, other=0.0)
    rest = tl.load(head_at + rest_dims, mask=is_rest, other=0.0)
    is_value = head >= HEADS + KV_HEADS
    if not is_value:
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORMS:
            weight = k_norm if head >= HEADS else q_norm
            wide_rest = rest.to(tl.float32)
            squares = tl.sum(wide_low * wide_low + wide_high * wide_high) + tl.sum(wide_rest * wide_rest)
            factor = tl.rsqrt(squares / HEAD_DIM + eps)
            wide_low = weighted(wide_low * factor, tl.load(weight + half_dims, mask=is_half, other=0.0), number)
            wide_high = weighted(
                wide_high * factor, tl.load(weight + HALF + half_dims, mask=is_half, other=0.0), number
            )
            wide_rest = weighted(wide_rest * factor, tl.load(weight + rest_dims, mask=is_rest, other=0.0), number)
            # The rounded result of the norm is rotated.
            wide_low, wide_high = wide_low.to(number).to(tl.float32), wide_high.to(number).to(tl.float32)
            rest = wide_rest.to(number)
        wide_low, wide_high = rotated(wide_low, wide_high, cos_sin, tl.load(positions + row), half_dims, HALF)
        low, high = wide_low.to(number), wide_high.to(number)
        tl.store(head_at + half_dims, low, mask=is_half)
        tl.store(head_at + HALF + half_dims, high, mask=is_half)
        if HAS_NORMS:
            tl.store(head_at + rest_dims, rest, mask=is_rest)
    if STORES and head >= HEADS:
        kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS).to(tl.int64)
        plane = pool + tl.where(is_value, v_offset, k_offset) + kv_head * head_stride
        place = page_slot(plane, write_pages, write_slots, row, page_bytes, token_stride, FORMAT)
        tl.store(place + half_dims, low.to(FORMAT), mask=is_half)
        tl.store(place + HALF + half_dims, high.to(FORMAT), mask=is_half)
        tl.store(place + rest_dims, rest.to(FORMAT), mask=is_rest)


def rope_and_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    planes: KVPlanes,
    batch: Batch,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """As reference.rope_and_store; nothing is written where a page has no bytes."""
    kv_heads, head_dim, half, stores = planes.kv_heads, planes.head_dim, cos_sin.shape[1] // 2, planes.page_bytes > 0
    if qkv.shape[1] != (num_heads + 2 * kv_heads) * head_dim or qkv.stride(1) != 1:
        raise ValueError(f"rope_and_store: qkv {tuple(qkv.shape)} with strides {qkv.stride()} does not fit {planes}")
    launch(
        rope_and_store_kernel, (qkv.shape[0], num_heads + (2 if stores else 1) * kv_heads), num_warps=1,
        qkv=qkv, qkv_row=qkv.stride(0), cos_sin=cos_sin, positions=batch.positions, write_pages=batch.write_pages,
        write_slots=batch.write_slots, pool=pool, q_norm=qkv if norms is None else norms.q,
        k_norm=qkv if norms is None else norms.k, eps=0.0 if norms is None else norms.eps, k_offset=planes.k_offset,
        v_offset=planes.v_offset, page_bytes=planes.page_bytes, token_stride=planes.token_stride,
        head_stride=planes.head_stride, HEADS=num_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=half,
        BLOCK_HALF=power_of_two(half), BLOCK_REST=power_of_two(head_dim - 2 * half), HAS_NORMS=norms is not None,
        STORES=stores, FORMAT=DTYPES[planes.dtype],
    )  # fmt: skip


def rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    batch: Batch,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    norms: HeadNorms | None = None,
) -> None:
    """As reference.rope."""
    rope_and_store(qkv, cos_sin, qkv, KVPlanes.without_pages(kv_heads, head_dim, qkv.dtype), batch, num_heads, norms)


@triton.jit
def store_latent_kernel(
    q_rope, q_row, q_head, kv, kv_row, norm_weight, eps, cos_sin, positions, write_pages, write_slots, pool, k_offset,
    rope_offset, page_bytes, token_stride, rope_stride,
    HEADS: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_HALF: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Program (row, head of q_rope), and one more for each row: its latent and its rope key."""
    row, head = tl.program_id(0), tl.program_id(1)
    number: tl.constexpr = kv.dtype.element_ty
    is_key = head == HEADS
    latent = kv + row.to(tl.int64) * kv_row
    head_at = tl.where(
        is_key, (latent + RANK).to(tl.int64), (q_rope + row.to(tl.int64) * q_row + head * q_head).to(tl.int64)
    )
    head_at = head_at.to(tl.pointer_type(number))
    half_dims = tl.arange(0, BLOCK_HALF)
    is_half = half_dims < HALF
    low = tl.load(head_at + half_dims, mask=is_half, other=0.0).to(tl.float32)
    high = tl.load(head_at + HALF + half_dims, mask=is_half, other=0.0).to(tl.float32)
    low, high = rotated(low, high, cos_sin, tl.load(positions + row), half_dims, HALF)
    tl.store(head_at + half_dims, low.to(number), mask=is_half)
    tl.store(head_at + HALF + half_dims, high.to(number), mask=is_half)
    if is_key:
        rope_key = page_slot(pool + rope_offset, write_pages, write_slots, row, page_bytes, rope_stride, FORMAT)
        tl.store(rope_key + half_dims, low.to(number).to(FORMAT), mask=is_half)
        tl.store(rope_key + HALF + half_dims, high.to(number).to(FORMAT), mask=is_half)
        dims = tl.arange(0, BLOCK_RANK)
        is_rank = dims < RANK
        x = tl.load(latent + dims, mask=is_rank, other=0.0).to(tl.float32)
        normed = x * tl.rsqrt(tl.sum(x * x) / RANK + eps)
        normed = weighted(normed, tl.load(norm_weight + dims, mask=is_rank, other=0.0), number)
        place = page_slot(pool + k_offset, write_pages, write_slots, row, page_bytes, token_stride, FORMAT)
        tl.store(place + dims, normed.to(number).to(FORMAT), mask=is_rank)


def store_latent(
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    planes: KVPlanes,
    batch: Batch,
) -> None:
    """As reference.store_latent."""
    rows, heads, rope = q_rope.shape
    if q_rope.dtype != kv.dtype or kv.shape != (rows, planes.head_dim + rope) or q_rope.stride(2) * kv.stride(1) != 1:
        raise ValueError(f"store_latent: q {tuple(q_rope.shape)} and kv {tuple(kv.shape)} do not fit {planes}")
    launch(
        store_latent_kernel, (rows, heads + 1), num_warps=1, q_rope=q_rope, q_row=q_rope.stride(0),
        q_head=q_rope.stride(1), kv=kv, kv_row=kv.stride(0), norm_weight=norm_weight, eps=eps, cos_sin=cos_sin,
        positions=batch.positions, write_pages=batch.write_pages, write_slots=batch.write_slots, pool=pool,
        k_offset=planes.k_offset, rope_offset=planes.rope_offset, page_bytes=planes.page_bytes,
        token_stride=planes.token_stride, rope_stride=planes.rope_stride, HEADS=heads, RANK=planes.head_dim,
        HALF=rope // 2, BLOCK_RANK=power_of_two(planes.head_dim), BLOCK_HALF=power_of_two(rope // 2),
        FORMAT=DTYPES[planes.dtype],
    )  # fmt: skip
