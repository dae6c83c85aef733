"""Places of one layer's numbers in a page or a state, in bytes. Kernels take these instead of strided views."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, cached_property

import numpy as np
import torch


def _sizes(planes: KVPlanes | StatePlanes) -> np.ndarray:
    """All fields but the last, which is a dtype."""
    return np.array([getattr(planes, field.name) for field in fields(planes)[:-1]], np.int64)


@dataclass(frozen=True)
class KVPlanes:
    """Places of one attention layer's keys and values in a page.

    The key of a token and a KV head has `head_dim` numbers at k, then `rope_dim` at rope, the rope key that all KV
    heads share. Its value has `value_dim` numbers at v.

        grouped queries   k and v are planes [kv_heads, page_size, head_dim]; no rope key
        MLA, absorbed     one KV head: k and v are the same plane, the latent [page_size, rank]; the rope key is a
                          plane [page_size, rope]
        MLA, expanded     a page holds a row [kv_heads * (nope + value) | rope] for each token; it lasts one step

    k_offset, v_offset, rope_offset   bytes from the start of a page
    page_bytes                        bytes from one page of the pool to the next
    page_size                         tokens in a page, any number
    token_stride, head_stride         bytes from token to token and from KV head to KV head, for k and v
    rope_stride                       bytes from token to token, for the rotated key
    dtype                             float32, bfloat16 or float16
    """

    k_offset: int
    v_offset: int
    rope_offset: int
    page_bytes: int
    page_size: int
    token_stride: int
    head_stride: int
    rope_stride: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rope_dim: int
    dtype: torch.dtype

    @classmethod
    @cache
    def without_pages(cls, kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVPlanes:
        """Planes of heads that are rotated but not written: a page has no bytes."""
        return cls(0, 0, 0, 0, 1, 0, 0, 0, kv_heads, head_dim, head_dim, 0, dtype)

    @cached_property
    def geometry(self) -> np.ndarray:
        """The twelve sizes above as an int64 array, the form that compiled kernels take."""
        return _sizes(self)


LARGEST_SCALE = 65504.0
"""The largest float16; larger scales are clamped to it."""

LOOKUP, UNIFORM, FLOAT8, GROUPS = range(4)
"""The ways of a kernel to compute a number from its code: three of table[code]; low + step * code for GROUPS."""


@dataclass(frozen=True, eq=False)
class CodePlane:
    """The codes of a layer's keys or values. A number is table[code] * scale, with a scale for each token and KV head.

    offset         bytes from the start of a page to the codes: uint8 [kv_heads, page_size, dim * low_bits / 8], where
                   low_bits is `bits`, or 2 where bits is 3
    high_offset    bytes to the third bit of each code: uint8 [kv_heads, page_size, dim / 8]; 0 unless bits is 3
    scale_offset   bytes to the scales: float16 [kv_heads, page_size]
    bits           2, 3, 4 or 8
    dim            numbers of a token and KV head
    table          float32 [2 ** bits], ascending
    scaling        the scale of a vector x; c is the vector of its table values:
                     "absmax"    largest |x| / table[-1], rounded to float16 first; codes are nearest to x / scale
                     "plain"     |x| / sqrt(dim); codes are nearest to x / that, for this and the next two
                     "length"    |x| / |c|: the decoded vector has the length of x
                     "unbiased"  |x|^2 / <x, c>: the product of the decoded vector with x is |x|^2

    A code counts the thresholds (the midpoints of neighbours in the table) below a number. Scales are clamped to 65504;
    a zero vector has scale 0. Several codes share a byte in halves and quarters: with 4 bits, byte j holds coordinate j
    in its low half and j + dim / 2 above; with 2 bits j, j + dim / 4, ...; bit i of a byte j of single bits belongs to
    coordinate j + i * dim / 8.
    """

    offset: int
    high_offset: int
    scale_offset: int
    bits: int
    dim: int
    table: torch.Tensor
    scaling: str

    @cached_property
    def thresholds(self) -> torch.Tensor:
        """float32 [2 ** bits - 1]"""
        return (self.table[1:] + self.table[:-1]) / 2

    @cached_property
    def form(self) -> int:
        """The way to compute table[code]: LOOKUP for up to 4 bits; for 8 bits, UNIFORM (first + code * step) or FLOAT8
        (the values of e4m3 in order). Raises ValueError for any other table of 256."""
        if self.bits <= 4:
            return LOOKUP
        code, table = torch.arange(256), self.table.cpu()
        if torch.equal(table, table[0] + code * (table[1] - table[0])):
            return UNIFORM
        magnitude = torch.where(code < 128, 127 - code, code - 128).clamp(max=126).int()
        value = (magnitude << 20).view(torch.float32) * 2.0**120  # the bits of e4m3 in their place of a float32
        if torch.equal(table, torch.where(code < 128, -value, value)):
            return FLOAT8
        raise ValueError("table of 8 bits: allowed are values at equal distances and those of float8_e4m3fn, ascending")

    @property
    def low_bits(self) -> int:
        return 2 if self.bits == 3 else self.bits


@dataclass(frozen=True, eq=False)
class CodePlanes:
    """Places of one attention layer's codes in a page.

    k, v         CodePlane of keys and of values
    page_bytes   bytes from one page of the pool to the next
    page_size    tokens in a page, any number
    """

    k: CodePlane
    v: CodePlane
    page_bytes: int
    page_size: int
    kv_heads: int

    @cached_property
    def geometry(self) -> np.ndarray:
        """page_bytes, page_size, kv_heads, then offset, high_offset, scale_offset, bits, dim of k and of v: int64."""
        sides = [n for s in (self.k, self.v) for n in (s.offset, s.high_offset, s.scale_offset, s.bits, s.dim)]
        return np.array([self.page_bytes, self.page_size, self.kv_heads, *sides], np.int64)


@dataclass(frozen=True, eq=False)
class GroupPlanes:
    """Places of one attention layer's codes in a full page. A number is low + step * code.

    k_codes, v_codes   bytes from the start of a page to the codes: uint8 [kv_heads, page_size, dim * bits / 8], packed
                       as in CodePlane
    k_step, k_low      to the numbers of each channel of a page's keys: float16 [kv_heads, dim]
    v_step, v_low      to those of `group` channels of a token's value: float16 [kv_heads, page_size, dim / group]
    bits               2 or 4
    dim                numbers of a token and KV head, a multiple of 16
    group              a divisor of dim
    page_bytes         bytes from one page of the pool to the next
    page_size          tokens in a page: 32 or 64
    """

    k_codes: int
    k_step: int
    k_low: int
    v_codes: int
    v_step: int
    v_low: int
    bits: int
    dim: int
    group: int
    page_bytes: int
    page_size: int
    kv_heads: int


@dataclass(frozen=True, eq=False)
class OwnPages:
    """The pages that the requests of a step read unquantized.

    starts   int32 [requests]: the first of these pages in each request; the pages before it are read in codes
    tables   int32 [requests, widest]: places in the memory of such pages, by column as in Batch.page_tables
    """

    starts: torch.Tensor
    tables: torch.Tensor


@dataclass(frozen=True)
class StatePlanes:
    """Places of one Gated DeltaNet layer's two planes in a state of the pool.

    conv_offset    bytes from the start of a state to the last inputs of the convolution: conv_dtype
                   [channels, kernel - 1], oldest first
    state_offset   bytes from the start of a state to the matrices: float32 [value_heads, key_dim, value_dim]
    state_bytes    bytes from one state of the pool to the next
    kernel         width of the convolution over the channels of q | k | v
    """

    conv_offset: int
    state_offset: int
    state_bytes: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    conv_dtype: torch.dtype

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @cached_property
    def geometry(self) -> np.ndarray:
        """The eight sizes above as an int64 array, the form that compiled kernels take."""
        return _sizes(self)


@dataclass(frozen=True)
class HeadNorms:
    """The RMS norms of queries and keys (Qwen3), shared by all heads.

    q, k   weights [head_dim], of one dtype
    """

    q: torch.Tensor
    k: torch.Tensor
    eps: float
