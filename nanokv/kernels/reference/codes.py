"""Codes in torch: encoding vectors to codes and scales, their planes in a page, and attention over decoded vectors.

A vector x is kept as codes and one scale: x ~ table[code] * scale. The codec chooses the table, and whether x is
rotated first. The code of a number is the count of thresholds below it. Codes share bytes in halves, so unpacking needs
no interleaving: see CodePlane.
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
    """Packs several codes into each byte.

    codes    uint8 [..., n], below 2 ** bits
    bits     1, 2, 4 or 8
    Returns  uint8 [..., width], width = n * bits / 8. Byte j holds the codes j, j + width, j + 2 * width, ...; the
             first is in its lowest bits
    """
    packed, *others = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    for place, part in enumerate(others, 1):
        packed = packed | part << place * bits
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_codes`.

    packed   uint8 [..., bytes]
    Returns  uint8 [..., bytes * 8 / bits]
    """
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-1)


def split_codes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Packs codes of 1, 2, 3, 4 or 8 bits.

    codes    uint8 [..., dim], below 2 ** bits
    Returns  one array as of `pack_codes`; for 3 bits two: the lower two bits of each code, then the third
    """
    if bits == 3:
        return [pack_codes(codes & 3, 2), pack_codes(codes >> 2, 1)]
    return [pack_codes(codes, bits)]


def join_codes(parts: list[torch.Tensor], bits: int) -> torch.Tensor:
    """The inverse of `split_codes`.

    Returns  uint8 [..., dim]
    """
    if bits == 3:
        return unpack_codes(parts[0], 2) | unpack_codes(parts[1], 1) << 2
    return unpack_codes(parts[0], bits)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums over the last axis, halves added to each other: the order does not depend on the number of rows.

    x        [..., n], float
    Returns  [...], dtype of x
    """
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
    """Encodes vectors as CodePlane describes.

    x        [..., dim], float
    Returns  codes uint8 [..., dim], not packed, and scales float16 [...]
    """
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
    """Decodes vectors: table[code] * scale.

    codes    uint8 [..., dim], not packed
    scale    float16 [...]
    Returns  float32 [..., dim]
    """
    return plane.table[codes.int()] * scale.float()[..., None]


def page_array(pool: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The array at `offset` bytes into every page.

    pool     uint8 [num_pages, page_bytes]
    Returns  a view [num_pages, *shape]
    """
    numbers, strides = pool.view(dtype), torch.empty(shape, device="meta").stride()
    return numbers.as_strided(
        (pool.shape[0], *shape),
        (pool.stride(0) // dtype.itemsize, *strides),
        numbers.storage_offset() + offset // dtype.itemsize,
    )


def _views(pool: torch.Tensor, planes: CodePlanes, plane: CodePlane) -> list[torch.Tensor]:
    """Views of the codes (two for 3 bits) and of the scales of K or V in every page."""
    tokens = planes.kv_heads, planes.page_size
    views = [page_array(pool, plane.offset, (*tokens, plane.dim * plane.low_bits // 8), torch.uint8)]
    if plane.bits == 3:
        views.append(page_array(pool, plane.high_offset, (*tokens, plane.dim // 8), torch.uint8))
    return [*views, page_array(pool, plane.scale_offset, tokens, torch.float16)]


def refuse_unwritable(x: torch.Tensor, batch: Batch) -> None:
    """Marks the rows with numbers that no scale can hold in batch.unwritable, and zeros them.

    x   float32 [rows, heads, dim], about to be written; changed IN PLACE; may be a view with a larger row stride

    So every page holds finite numbers, other requests of the step are not affected, and the host need not wait: it
    reads the marks with the tokens.
    """
    is_bad = ~(x.abs().amax((1, 2)) <= LARGEST_SCALE)  # NaN is not smaller either
    batch.unwritable.logical_or_(is_bad)
    x.masked_fill_(is_bad[:, None, None], 0.0)


def store_codes(k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> None:
    """Encodes k and v of each row and writes codes and scales to its page.

    k, v   [rows, kv_heads, dim], float, rotated already where the codec rotates; may be views
    pool   uint8 [num_pages, page_bytes]; row i is written to page batch.write_pages[i], slot batch.write_slots[i]
    """
    pages, slots = batch.write_pages.long(), batch.write_slots.long()
    for x, plane in ((k, planes.k), (v, planes.v)):
        codes, scale = encode(x, plane)
        for view, numbers in zip(_views(pool, planes, plane), (*split_codes(codes, plane.bits), scale), strict=True):
            view[pages, :, slots] = numbers


def decode_pages(pool: torch.Tensor, planes: CodePlanes, side: CodePlane, pages: torch.Tensor) -> torch.Tensor:
    """Decodes the keys or values in some pages. They stay rotated where the codec rotates.

    pool     uint8 [num_pages, page_bytes]
    side     planes.k or planes.v
    pages    int64 [pages]
    Returns  float32 [pages, kv_heads, page_size, dim]
    """
    *codes, scale = (view[pages] for view in _views(pool, planes, side))
    return decode(join_codes(codes, side.bits), scale, side)


def decoded_batch(
    k: torch.Tensor, v: torch.Tensor | None, rope: torch.Tensor | None, batch: Batch, tables: torch.Tensor
) -> tuple[torch.Tensor, KVPlanes, Batch]:
    """A pool made for one step of decoded keys and values, with what `paged_attention` needs to read it.

    k, v     [pages, kv_heads, page_size, dim], both float32, bfloat16 or float16; v None: the values are the keys
    rope     the rotated keys of MLA [pages, page_size, rope_dim], dtype of k, or None
    tables   int32 [requests, widest]: the pages of each request, as indices into k and v
    Returns  the pool, its planes, and the batch with these tables
    """
    (_, kv_heads, page_size, dim), own = k.shape, v is not None
    value_dim = dim if v is None else v.shape[-1]
    heads = k if v is None else torch.cat((k, v), dim=-1)
    width, size, heads = heads.shape[-1], k.element_size(), heads.flatten(1)
    pool = heads if rope is None else torch.cat((heads, rope.flatten(1)), dim=1)
    planes = KVPlanes(
        k_offset=0, v_offset=size * dim if own else 0, rope_offset=size * heads.shape[1],
        page_bytes=size * pool.shape[1], page_size=page_size, token_stride=size * width,
        head_stride=size * page_size * width, rope_stride=0 if rope is None else size * rope.shape[-1],
        kv_heads=kv_heads, head_dim=dim, value_dim=value_dim, rope_dim=0 if rope is None else rope.shape[-1],
        dtype=k.dtype,
    )  # fmt: skip
    return pool.view(torch.uint8), planes, replace(batch, page_tables=tables)


def decode_batch(pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> tuple[torch.Tensor, KVPlanes, Batch]:
    """Decodes every page in the tables of a batch, each page once.

    pool     uint8 [num_pages, page_bytes]
    Returns  as decoded_batch
    """
    pages, places = batch.page_tables.long().unique(return_inverse=True)
    k, v = (decode_pages(pool, planes, side, pages) for side in (planes.k, planes.v))
    return decoded_batch(k, v, None, batch, places.int())


def code_attention(q: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch, scale: float) -> torch.Tensor:
    """Softmax attention of each row over the codes of its own request: decodes the pages, then runs `paged_attention`.

    q        [rows, heads, k.dim], float, rotated as the keys are
    pool     uint8 [num_pages, page_bytes]
    batch    a row sees the keys at positions <= batch.positions[row]
    scale    factor of the scores, before the softmax
    Returns  [rows, heads * v.dim], contiguous, dtype of q, rotated as the values are
    Source   Zandieh et al. 2025 (TurboQuant: the query is rotated once, the result rotated back once)
    """
    return paged_attention(q, *decode_batch(pool, planes, batch), scale)
