"""Codes in registers: vectors are encoded to codes and one scale, and decoded again. See planes.CodePlane."""

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
def load_codes(low, high, is_valid, BITS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes [tokens, BLOCK_D] of tokens whose bytes begin at low; the third of 3 bits begins at high.

    Coordinate j is in byte j % size: several threads read each byte, which comes from memory once.
    """
    low_bits: tl.constexpr = 2 if BITS == 3 else BITS
    size: tl.constexpr = DIM * low_bits // 8
    dims = tl.arange(0, BLOCK_D)
    is_code = is_valid[:, None] & (dims < DIM)[None, :]
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
def encode(x, target, low_bits: tl.constexpr, table, thresholds, DIM: tl.constexpr, PARTS: tl.constexpr,
           BLOCK_B: tl.constexpr, BITS: tl.constexpr, SCALING: tl.constexpr, KEEPS: tl.constexpr):  # fmt: skip
    """Encodes one vector and stores bits of its codes at `target`: the "low" ones or the "third", as KEEPS says.

    The vector is held as [PARTS, bytes]: the codes that share a byte are one column. Returns the scale.
    """
    size: tl.constexpr = DIM // PARTS
    parts, bytes = tl.arange(0, PARTS), tl.arange(0, BLOCK_B)
    is_valid = (bytes < size)[None, :] & (parts >= 0)[:, None]
    numbers = tl.load(x + parts[:, None] * size + bytes[None, :], mask=is_valid, other=0.0).to(tl.float32)
    if SCALING == "absmax":
        largest = tl.max(tl.max(tl.abs(numbers), 1), 0)
        scale = tl.minimum(largest / tl.load(table + (1 << BITS) - 1), 65504.0)
        unit = scale.to(tl.float16).to(tl.float32)
    else:
        unit = tl.sqrt(tl.sum(tl.sum(numbers * numbers, 1), 0) / DIM)
        scale = unit
    scaled = numbers * inverse(unit)
    codes = tl.zeros([PARTS, BLOCK_B], tl.int32)
    for step in tl.static_range(BITS):  # the number of thresholds below, bit after bit, the highest first
        higher = codes | (1 << (BITS - 1 - step))
        codes = tl.where(scaled > tl.load(thresholds + higher - 1), higher, codes)
    if (SCALING == "length") | (SCALING == "unbiased"):
        c = tl.where(is_valid, tl.load(table + codes), 0.0)
        if SCALING == "length":
            scale = unit * tl.sqrt(DIM * inverse(tl.sum(tl.sum(c * c, 1), 0)))
        else:
            scale = unit * unit * DIM * inverse(tl.sum(tl.sum(numbers * c, 1), 0))
    if KEEPS == "third":
        codes = codes >> 2
    elif BITS == 3:
        codes = codes & 3
    packed = tl.sum(codes << (parts * low_bits)[:, None], 0)
    tl.store(target + bytes, packed.to(tl.uint8), mask=bytes < size)
    return tl.minimum(scale, 65504.0)


@triton.jit
def store_codes_kernel(
    x, x_row, x_head, write_pages, write_slots, pool, table, thresholds, offset, high_offset, scale_offset, page_bytes,
    page_size, DIM: tl.constexpr, BITS: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_THIRD: tl.constexpr,
    SCALING: tl.constexpr,
):  # fmt: skip
    """Program (row, KV head): one vector of K or of V, encoded, packed and written."""
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


def plane_args(plane: CodePlane, name: str) -> dict[str, Any]:
    """The arguments of a kernel for one plane; their names begin with `name`."""
    args = {
        "table": plane.table, "offset": plane.offset, "high_offset": plane.high_offset,
        "scale_offset": plane.scale_offset, "DIM": plane.dim, "BITS": plane.bits,
    }  # fmt: skip
    return {(name.upper() if key.isupper() else name) + key: value for key, value in args.items()}


def store_codes(k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> None:
    """As reference.store_codes."""
    for x, plane in ((k, planes.k), (v, planes.v)):
        rows, heads, dim = x.shape
        if x.stride(2) != 1 or dim != plane.dim or heads != planes.kv_heads:
            raise ValueError(f"store_codes: {tuple(x.shape)} with strides {x.stride()} does not fit {plane}")
        launch(
            store_codes_kernel, (rows, heads), num_warps=1, x=x, x_row=x.stride(0), x_head=x.stride(1),
            write_pages=batch.write_pages, write_slots=batch.write_slots, pool=pool, thresholds=plane.thresholds,
            page_bytes=planes.page_bytes, page_size=planes.page_size, BLOCK_LOW=power_of_two(dim * plane.low_bits // 8),
            BLOCK_THIRD=power_of_two(dim // 8), SCALING=plane.scaling, **plane_args(plane, ""),
        )  # fmt: skip
