"""Writes of a step into pages, in torch: norms of heads and latents, rotation by position, and the write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanokv.kernels.reference.attention import plane_view, rope_view
from nanokv.kernels.reference.elementwise import rms_norm

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import HeadNorms, KVPlanes


def _rotate(heads: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotates heads [rows, heads, dim] IN PLACE; dims past the width of cos_sin stay as they are."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions.long()].unsqueeze(1).split(half, dim=-1)
    low, high = heads[..., :half].float(), heads[..., half : 2 * half].float()
    # Both halves are computed before either is written: in float32 `low` and `high` are views of `heads`.
    new_low, new_high = low * cos - high * sin, high * cos + low * sin
    heads[..., :half], heads[..., half : 2 * half] = new_low, new_high


def rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    batch: Batch,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    norms: HeadNorms | None = None,
) -> None:
    """The first half of `rope_and_store`: normalises each head of q and k and rotates it IN PLACE by its position.

    qkv, cos_sin, norms   as in `rope_and_store`
    """
    heads = qkv.unflatten(1, (num_heads + 2 * kv_heads, head_dim))
    q, k, _ = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        q.copy_(rms_norm(q, norms.q, norms.eps))
        k.copy_(rms_norm(k, norms.k, norms.eps))
    _rotate(heads[:, : num_heads + kv_heads], cos_sin, batch.positions)


def rope_and_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    pool: torch.Tensor,
    planes: KVPlanes,
    batch: Batch,
    num_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """Normalises and rotates each head of q and k IN PLACE, and writes k and v of each row to its page.

    qkv       [rows, (num_heads + 2 * kv_heads) * head_dim], float: q | k | v, each head's dims side by side; may be a
              view with a larger row stride
    cos_sin   float32 [max_len, rotary_dim]: cosines, then sines, by position; dims past rotary_dim are not rotated
    pool      uint8 [num_pages, page_bytes]; row i is written to page batch.write_pages[i], slot batch.write_slots[i]
    norms     of the heads of q and k, as `rms_norm`, before the rotation; None where a model has none
    Source    Su et al. 2021, in the half (NeoX) layout: dim i is rotated with dim i + rotary_dim / 2; Qwen3 2025 (the
              norms)
    """
    rope(qkv, cos_sin, batch, num_heads, planes.kv_heads, planes.head_dim, norms)
    heads = qkv.unflatten(1, (num_heads + 2 * planes.kv_heads, planes.head_dim))
    _, k, v = heads.split((num_heads, planes.kv_heads, planes.kv_heads), dim=1)
    pages, slots = batch.write_pages.long(), batch.write_slots.long()
    plane_view(pool, planes, planes.k_offset, planes.head_dim)[pages, :, slots] = k.to(planes.dtype)
    plane_view(pool, planes, planes.v_offset, planes.head_dim)[pages, :, slots] = v.to(planes.dtype)


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
    """Rotates the rope part of q and kv IN PLACE, and writes each row's normed latent and rotated key to its page.

    q_rope        [rows, heads, rope], float; may be a view with any row and head stride
    kv            [rows, rank + rope], float: latent | rope key, as the down-projection gives them; may be a view
    norm_weight   [rank], float, for the `rms_norm` of the latent with `eps`
    cos_sin       float32 [max_len, rope]: cosines, then sines, by position
    pool          uint8 [num_pages, page_bytes]; row i goes to page batch.write_pages[i], slot batch.write_slots[i]
    planes        of the absorbed form: rank = head_dim, rope = rope_dim
    Source        DeepSeek-AI 2024 (DeepSeek-V2, MLA). Its checkpoints rotate dims 2i and 2i + 1 together; this op
                  expects the half layout, which the loader makes by permuting rows of weights
    """
    rank = planes.head_dim
    latent = rms_norm(kv[:, :rank], norm_weight, eps)
    rope_key = kv[:, None, rank:]
    _rotate(q_rope, cos_sin, batch.positions)
    _rotate(rope_key, cos_sin, batch.positions)

    pages, slots = batch.write_pages.long(), batch.write_slots.long()
    plane_view(pool, planes, planes.k_offset, rank)[pages, 0, slots] = latent.to(planes.dtype)
    rope_view(pool, planes)[pages, slots] = rope_key[:, 0].to(planes.dtype)
