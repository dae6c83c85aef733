"""Codes in groups in torch: a number is low + step * code, with a step and a low for each group of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanokv.kernels.planes import GroupPlanes, KVPlanes, OwnPages
from nanokv.kernels.reference.attention import paged_attention, plane_view
from nanokv.kernels.reference.codes import decoded_batch, join_codes, page_array

if TYPE_CHECKING:
    from nanokv.core.batch import Batch


def decode_groups(codes: torch.Tensor, step: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """low + step * code: float32, the shape of codes."""
    return codes.float() * step.float() + low.float()


def decode_group_pages(
    pool: torch.Tensor, planes: GroupPlanes, pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of full pages.

    pool     uint8 [num_pages, page_bytes]
    pages    int64 [pages]
    Returns  float32 [pages, kv_heads, page_size, dim] each
    """
    heads, size, dim, width = planes.kv_heads, planes.page_size, planes.dim, planes.dim * planes.bits // 8

    def read(offset: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return page_array(pool, offset, (heads, *shape), dtype)[pages]

    k_codes, v_codes = (
        join_codes([read(offset, (size, width), torch.uint8)], planes.bits)
        for offset in (planes.k_codes, planes.v_codes)
    )
    k = decode_groups(k_codes, *(read(offset, (1, dim)) for offset in (planes.k_step, planes.k_low)))
    each = (read(offset, (size, dim // planes.group, 1)) for offset in (planes.v_step, planes.v_low))
    return k, decode_groups(v_codes.unflatten(-1, (-1, planes.group)), *each).flatten(-2)


def group_places(batch: Batch, own: OwnPages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pages that a step reads in codes, and those that it reads unquantized, each once, ascending: int64; and page
    tables int32 [requests, widest] over the first, followed by the others."""
    pages = batch.page_tables.long()
    is_coded = torch.arange(pages.shape[1], device=pages.device) < own.starts[:, None]
    coded, plain = pages[is_coded].unique(), own.tables[~is_coded].long().unique()
    others = torch.searchsorted(plain, own.tables.long()) + len(coded)
    return coded, plain, torch.where(is_coded, torch.searchsorted(coded, pages), others).int()


def group_batch(
    pool: torch.Tensor,
    planes: GroupPlanes,
    memory: torch.Tensor,
    own_planes: KVPlanes,
    own: OwnPages,
    batch: Batch,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, KVPlanes, Batch]:
    """As decoded_batch, in `dtype`, of the pages that `group_attention` reads; its arguments."""
    coded, plain, tables = batch.once(group_places, own)
    offsets = own_planes.k_offset, own_planes.v_offset
    unquantized = (plane_view(memory, own_planes, offset, planes.dim)[plain].float() for offset in offsets)
    pairs = zip(decode_group_pages(pool, planes, coded), unquantized, strict=True)
    k, v = (torch.cat(pair).to(dtype) for pair in pairs)
    return decoded_batch(k, v, None, batch, tables)


def group_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    planes: GroupPlanes,
    memory: torch.Tensor,
    own_planes: KVPlanes,
    own: OwnPages,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of each row over its own request: over the codes of pages, then over unquantized ones.

    q            [rows, heads, dim], float
    pool         uint8 [num_pages, page_bytes]: pages of codes
    memory       uint8 [places, bytes]: unquantized pages, as own_planes describes
    own          which pages are unquantized, and where
    batch        a row sees the keys at positions <= batch.positions[row]
    scale        factor of the scores, before the softmax
    Returns      [rows, heads * dim], contiguous, dtype of q
    Source       Liu et al. 2024 (KIVI)
    """
    return paged_attention(q, *group_batch(pool, planes, memory, own_planes, own, batch, q.dtype), scale)
