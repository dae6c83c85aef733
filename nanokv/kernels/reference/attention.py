"""Attention over pages in torch: views of K and V in pages, and the attention of each row over its request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import KVPlanes


def plane_view(pool: torch.Tensor, planes: KVPlanes, offset: int, dim: int) -> torch.Tensor:
    """One plane of every page: `dim` numbers for each KV head and token, `offset` bytes into a page.

    pool     uint8 [num_pages, page_bytes]
    Returns  a view [num_pages, kv_heads, page_size, dim], dtype planes.dtype
    """
    width, numbers = planes.dtype.itemsize, pool.view(planes.dtype)
    shape = pool.shape[0], planes.kv_heads, planes.page_size, dim
    strides = planes.page_bytes // width, planes.head_stride // width, planes.token_stride // width, 1
    return numbers.as_strided(shape, strides, numbers.storage_offset() + offset // width)


def rope_view(pool: torch.Tensor, planes: KVPlanes) -> torch.Tensor:
    """The rotated keys of MLA in every page, which all KV heads share.

    pool     uint8 [num_pages, page_bytes]
    Returns  a view [num_pages, page_size, rope_dim], dtype planes.dtype
    """
    width, numbers = planes.dtype.itemsize, pool.view(planes.dtype)
    shape, strides = (pool.shape[0], planes.page_size, planes.rope_dim), (planes.page_bytes, planes.rope_stride)
    return numbers.as_strided(
        shape, (*(stride // width for stride in strides), 1), numbers.storage_offset() + planes.rope_offset // width
    )


def read_latents(
    pool: torch.Tensor, planes: KVPlanes, pages: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and rotated keys of the first `length` tokens of a request.

    pool     uint8 [num_pages, page_bytes]
    pages    int64 [pages of the request], in order of position
    Returns  copies [length, rank] and [length, rope], dtype planes.dtype
    """
    latents = plane_view(pool, planes, planes.k_offset, planes.head_dim)[pages, 0].flatten(0, 1)
    return latents[:length], rope_view(pool, planes)[pages].flatten(0, 1)[:length]


def paged_attention(q: torch.Tensor, pool: torch.Tensor, planes: KVPlanes, batch: Batch, scale: float) -> torch.Tensor:
    """Softmax attention of each row over the pages of its own request, in float32.

    q        [rows, heads, head_dim + rope_dim], float; may be a view with a larger row stride
    pool     uint8 [num_pages, page_bytes]
    batch    a row sees the keys at positions <= batch.positions[row]
    scale    factor of the scores, before the softmax
    Returns  [rows, heads * value_dim], contiguous, dtype of q
    Source   Kwon et al. 2023 (PagedAttention); Ainslie et al. 2023 (group queries share a KV head); DeepSeek-AI 2024
             (MLA: in the absorbed form all queries share one KV head, whose values are the first part of its keys)
    """
    rows, heads, _ = q.shape
    k_plane = plane_view(pool, planes, planes.k_offset, planes.head_dim)
    v_plane = plane_view(pool, planes, planes.v_offset, planes.value_dim)
    rope_plane = rope_view(pool, planes)
    out = q.new_empty(rows, heads, planes.value_dim)
    starts = batch.request_starts.tolist()
    for request, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == end:
            continue
        positions = batch.positions[start:end]
        length = int(positions.max()) + 1
        pages = batch.page_tables[request, : -(-length // planes.page_size)].long()
        # [pages, kv_heads, page_size, dim] -> [kv_heads, 1, length, dim]
        k = k_plane[pages].transpose(0, 1).flatten(1, 2)[:, None, :length].float()
        v = v_plane[pages].transpose(0, 1).flatten(1, 2)[:, None, :length].float()
        rope = rope_plane[pages].flatten(0, 1)[:length].float()
        k = torch.cat((k, rope.expand(planes.kv_heads, 1, -1, -1)), dim=-1)
        # [rows, heads, dim] -> [kv_heads, group, rows, dim]
        grouped = q[start:end].float().unflatten(1, (planes.kv_heads, -1)).permute(1, 2, 0, 3)
        scores = grouped @ k.transpose(-1, -2) * scale
        hidden = torch.arange(length, device=q.device) > positions[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = (weights @ v).permute(2, 0, 1, 3).flatten(1, 2)
    return out.flatten(1, 2)
