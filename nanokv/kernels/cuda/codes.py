"""Codes in registers: a vector becomes codes and one scale, and codes become numbers again. See planes.CodePlane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from nanokv.kernels.cuda.launch import launch, power_of_two
from nanokv.kernels.cuda.store import page_slot

if TYPE_CHECKING:
    from nanokv.core.batch import Batch
    from nanokv.kernels.planes import CodePlane, CodePlanes


@triton.jit
def load_codes(low, high, is_there, BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes [tokens, BLOCK_D] of tokens whose bytes begin at low and, of 3 bits the third, at high.

    Coordinate j stands in byte j % bytes: each byte is read by several threads, and once from memory.
    """
    low_bits: tl.constexpr = 2 if BITS == 3 else BITS
    size: tl.constexpr = DIM * low_bits // 8
    dims = tl.arange(0, BLOCK_D)
    is_code = is_there[:, None] & (dims < DIM)[None, :]
    packed = tl.load(low[:, None] + (dims % size)[None, :], mask=is_code, other=0).to(tl.int32)
    codes = (packed >> (dims // size * low_bits)[None, :]) & ((1 << low_bits) - 1)
    if BITS == 3:
        third: tl.constexpr = DIM // 8
        packed = tl.load(high[:, None] + (dims % third)[None, :], mask=is_code, other=0).to(tl.int32)
        codes |= ((packed >> (dims // third)[None, :]) & 1) << 2
    return codes


@triton.jit
def inverse(x):
    """1 / x, and 0 where x is 0."""
    return tl.where(x > 0.0, 1.0 / tl.where(x > 0.0, x, 1.0), 0.0)


@triton.jit
def encode(x, place, low_bits: tl.constexpr, table, thresholds, DIM: tl.constexpr, PARTS: tl.constexpr,
           BLOCK_B: tl.constexpr, BITS: tl.constexpr, SCALING: tl.constexpr, KEEPS: tl.constexpr):  # fmt: skip
    """Encodes one vector and stores bits of its codes at `place`: KEEPS picks "low" ones or the "third". Returns the
    scale. Held as [PARTS, bytes]: the codes that share a byte stand in a column."""
    size: tl.constexpr = DIM // PARTS
    parts, bytes = tl.arange(0, PARTS), tl.arange(0, BLOCK_B)
    is_there = (bytes < size)[None, :] & (parts >= 0)[:, None]
    numbers = tl.load(x + parts[:, None] * size + bytes[None, :], mask=is_there, other=0.0).to(tl.float32)
    if SCALING == "absmax":
        largest = tl.max(tl.max(tl.abs(numbers), 1), 0)
        scale = tl.minimum(largest / tl.load(table + (1 << BITS) - 1), 65504.0)
        unit = scale.to(tl.float16).to(tl.float32)
    else:
        unit = tl.sqrt(tl.sum(tl.sum(numbers * numbers, 1), 0) / DIM)
        scale = unit
    wanted = numbers * inverse(unit)
    codes = tl.zeros([PARTS, BLOCK_B], tl.int32)
    for step in tl.static_range(BITS):  # how many thresholds lie below: bit after bit, the highest first
        higher = codes | (1 << (BITS - 1 - step))
        codes = tl.where(wanted > tl.load(thresholds + higher - 1), higher, codes)
    if (SCALING == "length") | (SCALING == "unbiased"):
        c = tl.where(is_there, tl.load(table + codes), 0.0)
        if SCALING == "length":
            scale = unit * tl.sqrt(DIM * inverse(tl.sum(tl.sum(c * c, 1), 0)))
        else:
            scale = unit * unit * DIM * inverse(tl.sum(tl.sum(numbers * c, 1), 0))
    if KEEPS == "third":
        codes = codes >> 2
    elif BITS == 3:
        codes = codes & 3
    packed = tl.sum(codes << (parts * low_bits)[:, None], 0)
    tl.store(place + bytes, packed.to(tl.uint8), mask=bytes < size)
    return tl.minimum(scale, 65504.0)


@triton.jit
def store_codes_kernel(
    x, x_row, x_head, write_pages, write_slots, pool, table, thresholds, offset, high_offset, scale_offset, page_bytes,
    page_size, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_THIRD: tl.constexpr,
    SCALING: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head): one side's vector, encoded, packed and written."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    low_bits: tl.constexpr = 2 if BITS == 3 else BITS
    size: tl.constexpr = DIM * low_bits // 8
    vector = x + row * x_row + head * x_head
    low = page_slot(pool + offset + head * page_size * size, write_pages, write_slots, row, page_bytes, size, tl.uint8)
    scale = encode(vector, low, low_bits, table, thresholds, DIM, 8 // low_bits, BLOCK_LOW, BITS, SCALING, "low")
    if BITS == 3:
        third: tl.constexpr = DIM // 8
        plane = pool + high_offset + head * page_size * third
        high = page_slot(plane, write_pages, write_slots, row, page_bytes, third, tl.uint8)
        scale = encode(vector, high, 1, table, thresholds, DIM, 8, BLOCK_THIRD, BITS, SCALING, "third")
    plane = pool + scale_offset + head * page_size * 2
    tl.store(page_slot(plane, write_pages, write_slots, row, page_bytes, 2, tl.float16), scale.to(tl.float16))


def side_args(side: CodePlane, name: str) -> dict[str, Any]:
    """Arguments of a kernel about one side, their names begun with `name`."""
    args = {
        "table": side.table, "offset": side.offset, "high_offset": side.high_offset, "scale_offset": side.scale_offset,
        "DIM": side.dim, "BITS": side.bits,
    }  # fmt: skip
    return {(name.upper() if key.isupper() else name) + key: value for key, value in args.items()}


def store_codes(k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> None:
    """As reference.store_codes."""
    for x, side in ((k, planes.k), (v, planes.v)):
        rows, heads, dim = x.shape
        if x.stride(2) != 1 or dim != side.dim or heads != planes.kv_heads:
            raise ValueError(f"store_codes: {tuple(x.shape)} with strides {x.stride()} does not fit {side}")
        launch(
            store_codes_kernel, (rows, heads), num_warps=1, x=x, x_row=x.stride(0), x_head=x.stride(1),
            write_pages=batch.write_pages, write_slots=batch.write_slots, pool=pool, thresholds=side.thresholds,
            page_bytes=planes.page_bytes, page_size=planes.page_size, BLOCK_LOW=power_of_two(dim * side.low_bits // 8),
            BLOCK_THIRD=power_of_two(dim // 8), SCALING=side.scaling, **side_args(side, ""),
        )  # fmt: skip
