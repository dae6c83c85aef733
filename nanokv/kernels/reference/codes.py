"""Codes in torch: how vectors become codes and scales, where these lie in a page, and attention over what they decode.

A vector x is kept as codes and one scale: x ~ table[code] * scale. Which table, and whether x was rotated before, is
the codec's business. A code is found by counting the thresholds below a number, and codes share bytes in halves, so
that unpacking needs no interleaving: see CodePlane.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nanokv.kernels.planes import LARGEST_SCALE, CodePlane, CodePlanes, KVPlanes
from nanokv.kernels.reference.attention import paged_attention

if TYPE_CHECKING:
    from nanokv.core.batch import Batch


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., n] below 2 ** bits -> uint8 [..., n * bits / 8]; bits is 1, 2, 4 or 8.

    Byte j holds the codes j, j + width, j + 2 * width, ..., the first in its lowest bits; width = n * bits / 8.
    """
    packed, *others = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    for place, part in enumerate(others, 1):
        packed = packed | part << place * bits
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes that `pack_codes` packed: uint8 [..., bytes] -> uint8 [..., bytes * 8 / bits]."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-1)


def split_codes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Codes uint8 [..., dim], packed: one array, or for 3 bits the lower two and then the third of each."""
    if bits == 3:
        return [pack_codes(codes & 3, 2), pack_codes(codes >> 2, 1)]
    return [pack_codes(codes, bits)]


def join_codes(parts: list[torch.Tensor], bits: int) -> torch.Tensor:
    """The codes uint8 [..., dim] that `split_codes` split."""
    if bits == 3:
        return unpack_codes(parts[0], 2) | unpack_codes(parts[1], 1) << 2
    return unpack_codes(parts[0], bits)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, halves added to each other: its order does not depend on how many rows there are."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        rest = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        if rest.shape[-1]:
            x = torch.cat((x, rest), dim=-1)
    return x[..., 0]


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0)


def encode(x: torch.Tensor, plane: CodePlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., dim] and scales float16 [...] of the vectors x [..., dim], as CodePlane describes."""
    x = x.float()
    if plane.scaling == "absmax":
        scale = (x.abs().amax(-1) / plane.table[-1]).clamp(max=LARGEST_SCALE).half()
        unit = scale.float()
    else:
        unit = (row_sum(x * x) / plane.dim).sqrt()
    codes = torch.bucketize((x * _inverse(unit)[..., None]).contiguous(), plane.thresholds)
    if plane.scaling == "plain":
        scale = unit
    elif plane.scaling != "absmax":
        c = plane.table[codes]
        if plane.scaling == "length":
            scale = unit * (plane.dim * _inverse(row_sum(c * c))).sqrt()
        else:
            scale = unit * unit * plane.dim * _inverse(row_sum(x * c))
    return codes.to(torch.uint8), scale.clamp(max=LARGEST_SCALE).half()


def decode(codes: torch.Tensor, scale: torch.Tensor, plane: CodePlane) -> torch.Tensor:
    """The vectors that codes uint8 [..., dim] and scales float16 [...] stand for: float32 [..., dim]."""
    return plane.table[codes.int()] * scale.float()[..., None]


def page_view(pool: torch.Tensor, planes: CodePlanes, offset: int, shape: tuple[int, ...], dtype: torch.dtype):
    """An array [kv_heads, page_size, *shape] that stands `offset` bytes into each page: a view [num_pages, ...]."""
    shape = planes.kv_heads, planes.page_size, *shape
    numbers, strides = pool.view(dtype), torch.empty(shape, device="meta").stride()
    return numbers.as_strided(
        (pool.shape[0], *shape),
        (planes.page_bytes // dtype.itemsize, *strides),
        numbers.storage_offset() + offset // dtype.itemsize,
    )


def _views(pool: torch.Tensor, planes: CodePlanes, plane: CodePlane) -> list[torch.Tensor]:
    """The planes of codes and of scales of one side."""
    views = [page_view(pool, planes, plane.offset, (plane.dim * plane.low_bits // 8,), torch.uint8)]
    if plane.bits == 3:
        views.append(page_view(pool, planes, plane.high_offset, (plane.dim // 8,), torch.uint8))
    return [*views, page_view(pool, planes, plane.scale_offset, (), torch.float16)]


def store_codes(k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> None:
    """Writes codes and scales of each row's k and v to its page.

    k, v   [rows, kv_heads, dim], float, already rotated where the codec rotates; may be views
    pool   uint8 [num_pages, page_bytes]; row i goes to page batch.write_pages[i], slot batch.write_slots[i]
    """
    pages, slots = batch.write_pages.long(), batch.write_slots.long()
    for x, plane in ((k, planes.k), (v, planes.v)):
        codes, scale = encode(x, plane)
        for view, numbers in zip(_views(pool, planes, plane), (*split_codes(codes, plane.bits), scale), strict=True):
            view[pages, :, slots] = numbers


def decode_pages(pool: torch.Tensor, planes: CodePlanes, side: CodePlane, pages: torch.Tensor) -> torch.Tensor:
    """The keys or values in some pages, still rotated: float32 [pages, kv_heads, page_size, dim].

    side    planes.k or planes.v
    pages   int64
    """
    *codes, scale = (view[pages] for view in _views(pool, planes, side))
    return decode(join_codes(codes, side.bits), scale, side)


def decoded_batch(
    k: torch.Tensor, v: torch.Tensor | None, tail: torch.Tensor | None, batch: Batch, tables: torch.Tensor
) -> tuple[torch.Tensor, KVPlanes, Batch]:
    """A pool of pages that holds decoded keys and values, and how to attend over it.

    k, v      [pages, kv_heads, page_size, dim], all of one dtype that pages may have; v None: values are the keys
    tail      [pages, page_size, tail_dim] or None
    tables    int32 [requests, widest]: the pages of each request, as places in k and v
    Returns   pool, KVPlanes, and the batch over these tables
    """
    (_, kv_heads, page_size, dim), own = k.shape, v is not None
    value_dim = dim if v is None else v.shape[-1]
    heads = k if v is None else torch.cat((k, v), dim=-1)
    width, size, heads = heads.shape[-1], k.element_size(), heads.flatten(1)
    pool = heads if tail is None else torch.cat((heads, tail.flatten(1)), dim=1)
    planes = KVPlanes(
        k_offset=0, v_offset=size * dim if own else 0, tail_offset=size * heads.shape[1],
        page_bytes=size * pool.shape[1], page_size=page_size, token_stride=size * width,
        head_stride=size * page_size * width, tail_stride=0 if tail is None else size * tail.shape[-1],
        kv_heads=kv_heads, head_dim=dim, value_dim=value_dim, tail_dim=0 if tail is None else tail.shape[-1],
        dtype=k.dtype,
    )  # fmt: skip
    return pool.view(torch.uint8), planes, replace(batch, page_tables=tables)


def decode_batch(pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> tuple[torch.Tensor, KVPlanes, Batch]:
    """`decoded_batch` of every page in the tables of a batch, each page once."""
    pages, places = batch.page_tables.long().unique(return_inverse=True)
    k, v = (decode_pages(pool, planes, side, pages) for side in (planes.k, planes.v))
    return decoded_batch(k, v, None, batch, places.int())


def code_attention(q: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch, scale: float) -> torch.Tensor:
    """Softmax attention of each row over the codes of its own request: decodes the pages, then attends as usual.

    q        [rows, heads, k.dim], float, rotated as the keys are
    Returns  [rows, heads * v.dim], contiguous, dtype of q, rotated as the values are
    Source   Zandieh et al. 2025 (TurboQuant: the query is rotated once, the result rotated back once)
    """
    return paged_attention(q, *decode_batch(pool, planes, batch), scale)
