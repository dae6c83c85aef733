"""Writes of a step into pages, on a CPU: norms of heads and latents, rotation, and the write, in one pass."""

from __future__ import annotations

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.elementwise import UNIT_ROWS, norm_factor, weighted
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, narrow, size_of, sizes, view, widen
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.planes import HeadNorms, KVPlanes

F32, INT32 = np.dtype(np.float32), np.dtype(np.int32)
NOWHERE = torch.empty(0, dtype=torch.uint8)  # a pool at address 0: nothing is written


@inner
def _rotate(head, table, format):
    """Rotates the first len(table) numbers at an address. table: the cosines, then the sines of the row's angles."""
    half = len(table) // 2
    cos, sin = table[:half], table[half:]
    low, high = view(head, half, format), view(head + half * size_of(format), half, format)
    for d in range(half):
        a, b = widen(low[d]), widen(high[d])
        low[d] = narrow(a * cos[d] - b * sin[d], format)
        high[d] = narrow(b * cos[d] + a * sin[d], format)


@inner
def _copy(source, target, count, format, page_format):
    numbers, page = view(source, count, format), view(target, count, page_format)
    for d in range(count):
        page[d] = narrow(widen(numbers[d]), page_format)


@inner
def _norm(source, wide, weight, eps, target, format, weight_format, page_format):
    """The RMS norm of len(wide) numbers at an address, as `format` and then as `page_format` to another address."""
    width = len(wide)
    numbers, scale = view(source, width, format), view(weight, width, weight_format)
    out = view(target, width, page_format)
    for d in range(width):
        wide[d] = widen(numbers[d])
    factor = norm_factor(wide, eps)
    for d in range(width):
        out[d] = narrow(widen(weighted(wide[d] * factor, scale[d], format, weight_format)), page_format)


@inner
def _rope_work(
    counter, qkv, stride, rows, q_norm, k_norm, eps, cos_sin, rotary, pool, numbers, positions, pages, slots, heads,
    format, weight_format, page_format,
):  # fmt: skip
    k_offset, v_offset, _, page_bytes, _, token_stride, head_stride, _, kv_heads, head_dim, _, _ = numbers
    positions, pages, slots = view(positions, rows, INT32), view(pages, rows, INT32), view(slots, rows, INT32)
    head_bytes, wide = head_dim * size_of(format), np.empty(head_dim, np.float32)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            at = qkv + row * stride * size_of(format)
            table = view(cos_sin + 4 * rotary * positions[row], rotary, F32)
            for head in range(heads + kv_heads):
                place, weight = at + head * head_bytes, q_norm if head < heads else k_norm
                if weight != 0:
                    _norm(place, wide, weight, eps, place, format, weight_format, format)
                _rotate(place, table, format)
            if pool == 0:
                continue
            page = pool + pages[row] * page_bytes + slots[row] * token_stride
            for head in range(kv_heads):
                k = at + (heads + head) * head_bytes
                _copy(k, page + k_offset + head * head_stride, head_dim, format, page_format)
                _copy(k + kv_heads * head_bytes, page + v_offset + head * head_stride, head_dim, format, page_format)


@compiled
def _rope(
    gomp, threads, qkv, stride, rows, q_norm, k_norm, eps, cos_sin, rotary, pool, geometry, positions, pages, slots,
    heads, format, weight_format, page_format,
):  # fmt: skip
    args = (
        qkv, stride, rows, q_norm, k_norm, np.float32(eps), cos_sin, rotary, pool, sizes(geometry), positions, pages,
        slots, heads, format.dtype, weight_format.dtype, page_format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _rope_work, args)


def rope_and_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    planes: KVPlanes,
    batch: Batch,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """As reference.rope_and_store."""
    (rows, width), (stride, step) = qkv.shape, qkv.stride()
    if width != (num_heads + 2 * planes.kv_heads) * planes.head_dim or step != 1:
        raise ValueError(f"rope_and_store: qkv {tuple(qkv.shape)} with strides {qkv.stride()} does not fit {planes}")
    q_norm, k_norm, eps, weight_dtype = 0, 0, 0.0, qkv.dtype
    if norms is not None:
        q_norm, k_norm, eps, weight_dtype = norms.q.data_ptr(), norms.k.data_ptr(), norms.eps, norms.q.dtype
    _rope(
        GOMP, threads_for(rows * width / 1e3), qkv.data_ptr(), stride, rows, q_norm, k_norm, eps, cos_sin.data_ptr(),
        cos_sin.shape[1], pool.data_ptr(), planes.geometry, batch.positions.data_ptr(), batch.write_pages.data_ptr(),
        batch.write_slots.data_ptr(), num_heads, FORMAT[qkv.dtype], FORMAT[weight_dtype], FORMAT[planes.dtype],
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
    nowhere = KVPlanes.without_pages(kv_heads, head_dim, qkv.dtype)
    rope_and_store(qkv, cos_sin, NOWHERE, nowhere, batch, num_heads, norms)


@inner
def _latent_work(
    counter, q, q_stride, head_stride, heads, kv, kv_stride, rows, weight, eps, cos_sin, pool, numbers, positions,
    pages, slots, format, weight_format, page_format,
):  # fmt: skip
    k_offset, _, rope_offset, page_bytes, _, token_stride, _, rope_stride, _, rank, _, rope = numbers
    positions, pages, slots = view(positions, rows, INT32), view(pages, rows, INT32), view(slots, rows, INT32)
    wide = np.empty(rank, np.float32)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            table = view(cos_sin + 4 * rope * positions[row], rope, F32)
            for head in range(heads):
                _rotate(q + (row * q_stride + head * head_stride) * size_of(format), table, format)
            latent, page = kv + row * kv_stride * size_of(format), pool + pages[row] * page_bytes
            place = page + k_offset + slots[row] * token_stride
            _norm(latent, wide, weight, eps, place, format, weight_format, page_format)
            rope_key = latent + rank * size_of(format)
            _rotate(rope_key, table, format)
            _copy(rope_key, page + rope_offset + slots[row] * rope_stride, rope, format, page_format)


@compiled
def _latent(
    gomp, threads, q, q_stride, head_stride, heads, kv, kv_stride, rows, weight, eps, cos_sin, pool, geometry,
    positions, pages, slots, format, weight_format, page_format,
):  # fmt: skip
    args = (
        q, q_stride, head_stride, heads, kv, kv_stride, rows, weight, np.float32(eps), cos_sin, pool, sizes(geometry),
        positions, pages, slots, format.dtype, weight_format.dtype, page_format.dtype,
    )  # fmt: skip
    parallel_for(gomp, threads, _latent_work, args)


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
    (rows, heads, rope), (q_stride, head_stride, q_step) = q_rope.shape, q_rope.stride()
    (_, width), (kv_stride, kv_step) = kv.shape, kv.stride()
    if (rope, width) != (planes.rope_dim, planes.head_dim + rope) or cos_sin.shape[1] != rope:
        raise ValueError(f"store_latent: q_rope {tuple(q_rope.shape)}, kv {tuple(kv.shape)} do not fit {planes}")
    if q_step != 1 or kv_step != 1 or q_rope.dtype != kv.dtype:
        raise ValueError("store_latent: the numbers of q_rope and of kv must lie side by side and be of one dtype")
    _latent(
        GOMP, threads_for(rows * (heads * rope + width) / 1e3), q_rope.data_ptr(), q_stride, head_stride, heads,
        kv.data_ptr(), kv_stride, rows, norm_weight.data_ptr(), eps, cos_sin.data_ptr(), pool.data_ptr(),
        planes.geometry, batch.positions.data_ptr(), batch.write_pages.data_ptr(), batch.write_slots.data_ptr(),
        FORMAT[kv.dtype], FORMAT[norm_weight.dtype], FORMAT[planes.dtype],
    )  # fmt: skip
