"""Attention over pages in torch: where K and V of a token go, and how a row reads those of its request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.ops import KVPlanes


def plane_view(pool: torch.Tensor, planes: KVPlanes, offset: int) -> torch.Tensor:
    """One plane of every page: a view [num_pages, kv_heads, page_size, head_dim] of the pool's bytes at `offset`."""
    width, size = planes.dtype.itemsize, planes.kv_heads * planes.page_size * planes.head_dim
    numbers = pool.view(planes.dtype)[:, offset // width : offset // width + size]
    return numbers.view(-1, planes.kv_heads, planes.page_size, planes.head_dim)


def rope_and_store(
    qkv: torch.Tensor, cos_sin: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, num_heads: int
) -> None:
    """Rotate q and k IN PLACE by their positions, then write k and v of each row to its slot of its page.

    qkv       [rows, (num_heads + 2 * kv_heads) * head_dim]: q | k | v, each head's dims side by side
    cos_sin   float32 [max_len, rotary_dim]: cosines, then sines; dims past rotary_dim stay as they are
    pool      uint8 [num_pages, page_bytes]; row i goes to page batch.write_pages[i], slot batch.write_slots[i]
    Source    Su et al. 2021, in the half (NeoX) layout: dim i turns with dim i + rotary_dim / 2
    """
    heads = qkv.view(qkv.shape[0], -1, planes.head_dim)
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[batch.positions.long()].unsqueeze(1).split(half, dim=-1)
    turned = heads[:, : num_heads + planes.kv_heads]
    low, high = turned[..., :half].float(), turned[..., half : 2 * half].float()
    # Both halves are computed before either is written: in float32 `low` and `high` are views of `turned`.
    new_low, new_high = low * cos - high * sin, high * cos + low * sin
    turned[..., :half], turned[..., half : 2 * half] = new_low, new_high

    pages, slots = batch.write_pages.long(), batch.write_slots.long()
    k, v = heads[:, num_heads:].split(planes.kv_heads, dim=1)
    plane_view(pool, planes, planes.k_offset)[pages, :, slots] = k.to(planes.dtype)
    plane_view(pool, planes, planes.v_offset)[pages, :, slots] = v.to(planes.dtype)


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """Softmax attention of each row over the pages of its own request, in float32.

    q        [rows, heads, head_dim], float; may be a view whose rows lie further apart
    pool     uint8 [num_pages, page_bytes]
    batch    Batch; a row sees the keys at positions <= batch.positions[row]
    Returns  [rows, heads * head_dim], contiguous, dtype of q
    Source   Kwon et al. 2023 (PagedAttention); Ainslie et al. 2023 (group queries share a KV head)
    """
    rows, heads, head_dim = q.shape
    k_plane = plane_view(pool, planes, planes.k_offset)
    v_plane = plane_view(pool, planes, planes.v_offset)
    out = q.new_empty(rows, heads, head_dim)
    starts = batch.request_starts.tolist()
    for request, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == end:
            continue
        positions = batch.positions[start:end]
        length = int(positions.max()) + 1
        pages = batch.page_tables[request, : -(-length // planes.page_size)].long()
        # [pages, kv_heads, page_size, head_dim] -> [kv_heads, 1, length, head_dim]
        k = k_plane[pages].transpose(0, 1).flatten(1, 2)[:, None, :length].float()
        v = v_plane[pages].transpose(0, 1).flatten(1, 2)[:, None, :length].float()
        # [rows, heads, head_dim] -> [kv_heads, group, rows, head_dim]
        grouped = q[start:end].float().unflatten(1, (planes.kv_heads, -1)).permute(1, 2, 0, 3)
        scores = grouped @ k.transpose(-1, -2) * scale
        hidden = torch.arange(length, device=q.device) > positions[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = (weights @ v).permute(2, 0, 1, 3).flatten(1, 2)
    return out.flatten(1, 2)
