"""KIVI: keys in groups of tokens, channel by channel; values in groups of channels, token by token.

    keys     each channel of the tokens of a page has a minimum and a step: some channels of keys are always large
    values   as many channels of one token have a minimum and a step
    x ~ minimum + step * code,  step = (largest - smallest) / (2 ** bits - 1)

The group of keys is the page, so a page is written only when it is full. Until then its tokens are kept unquantized, as
the partial page of their sequence. A row sees the tokens of its own page unquantized and those of full pages through
the codes, whether they came in one step or in many. (KIVI itself keeps up to 128 latest tokens unquantized.)
Source: Liu et al. 2024 (KIVI); its code gives these results for group_size = residual_length = page_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from nanokv.codecs.key_mean import KeyMean
from nanokv.codecs.pages import Heads, attention_dtype, rotated
from nanokv.codecs.quantizer import array_of, plane
from nanokv.core.batch import Batch
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels.planes import GroupPlanes, KVPlanes, OwnPages
from nanokv.kernels.reference import decode_group_pages, decode_groups, page_array, split_codes

GROUPS = (32, 64)


@dataclass(frozen=True)
class Groups:
    """Codes, steps and minima over one axis of a tensor.

    bits   of a code
    """

    bits: int
    axis: int

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 -> codes uint8 of the same shape, step and minimum float16 with `axis` of size 1."""
        low, high = x.amin(self.axis, keepdim=True), x.amax(self.axis, keepdim=True)
        step, low = ((high - low) / (2**self.bits - 1)).half(), low.half()
        unit = step.float()
        codes = (x - low.float()) * torch.where(unit > 0, 1 / unit, 0)
        return codes.round().clamp(0, 2**self.bits - 1).byte(), step, low

    @staticmethod
    def decode(codes: torch.Tensor, step: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """minimum + step * code: float32, the shape of codes."""
        return decode_groups(codes, step, low)


@dataclass(frozen=True)
class KiviCodec:
    """kivi2 and kivi4.

    bits    of a code
    dtype   of the numbers in partial pages
    exact   False: the rows of one request in a step see each other unquantized, in full pages too
    """

    name: str
    bits: int
    dtype: torch.dtype
    exact: bool

    def at(self, layer: int) -> KiviCodec:
        """The codec of a layer: every layer has this one."""
        return self

    def spec(self, kv_heads: int, head_dim: int, page_size: int) -> LayerSpec:
        """The planes of an attention layer. Raises ConfigError for a page_size or a head_dim without groups."""
        if page_size not in GROUPS:
            sizes = " and ".join(map(str, GROUPS))
            raise ConfigError(
                f"page_size={page_size}: codec {self.name} makes a group of a page; allowed are {sizes}: "
                f"use --page-size {GROUPS[0]} (page_size={GROUPS[0]})"
            )
        if head_dim % 16 or head_dim % min(page_size, head_dim):
            raise ConfigError(
                f"codec={self.name!r}: head_dim={head_dim} of this model; allowed are multiples of 16 that are "
                f"multiples of page_size={page_size} or below it"
            )
        groups = head_dim // min(page_size, head_dim)
        whole = [Plane(f"k_{name}", (kv_heads, head_dim), torch.float16, token_axis=None) for name in ("step", "low")]
        codes = [plane(f"{side}_codes", kv_heads, page_size, head_dim * self.bits // 8, torch.uint8) for side in "kv"]
        each = [plane(f"v_{name}", kv_heads, page_size, groups, torch.float16) for name in ("step", "low")]
        shape = (kv_heads, page_size, head_dim)
        return LayerSpec(
            paged=(codes[0], *whole, codes[1], *each),
            partial_page=tuple(Plane(f"{side}_tail", shape, self.dtype, token_axis=None) for side in "kv"),
        )

    def pages(self, layout: PageLayout, layer: int, heads: Heads) -> KiviPages:
        """The pages of an attention layer."""
        return KiviPages(self, layout, layer, heads)

    def latent_spec(self, rank: int, page_size: int) -> LayerSpec:
        """Raises ConfigError: a latent is key and value at once."""
        raise ConfigError(
            f"codec={self.name!r}: it writes keys and values in two ways, and multi-head latent attention keeps one "
            "latent for both; allowed is one name, other than qjl and kivi"
        )


class KiviPages:
    """Keys and values of one layer: full pages in codes, partial ones unquantized."""

    planes = None
    is_recordable = False
    """Only the device knows which pages become full: see AttentionPages."""

    def __init__(self, codec: KiviCodec, layout: PageLayout, layer: int, heads: Heads) -> None:
        self._codec = codec
        self._heads = heads
        self._keys, self._values = Groups(codec.bits, -2), Groups(codec.bits, -1)
        parts = "codes", "step", "low"
        self._slots = [layout.paged(layer, f"{side}_{part}") for side in "kv" for part in parts]
        size, dim = layout.page_size, heads.head_dim
        k_codes, k_step, k_low, v_codes, v_step, v_low = (slot.offset for slot in self._slots)
        self._planes = GroupPlanes(
            k_codes=k_codes, k_step=k_step, k_low=k_low, v_codes=v_codes, v_step=v_step, v_low=v_low, bits=codec.bits,
            dim=dim, group=min(size, dim), page_bytes=layout.page_bytes, page_size=size, kv_heads=heads.kv_heads,
        )  # fmt: skip
        # The two planes of a partial page lie side by side.
        self._partial = layout.state(layer, "k_tail").offset
        self._shape = 2 * heads.kv_heads, size, dim
        self.key_mean = KeyMean(is_lossy=False)  # each channel has a minimum of its own

    def attend(self, qkv: torch.Tensor, pool: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As AttentionPages.attend."""
        heads = self._heads
        q, k, v = heads.split(rotated(qkv, heads, self.key_mean, batch))
        pieces = batch.once(Pieces)
        memory, offset = self._append(torch.cat((k, v), dim=1).to(self._codec.dtype), states, batch, pieces)
        if len(pieces.full):
            self._seal(self._own(memory, offset)[pieces.places[pieces.full]].float(), pool, batch, pieces)
        own = pieces.own_pages(self._codec.exact)
        own_planes = _own_planes(offset, memory.stride(0), self._shape, self._codec.dtype)
        dtype = attention_dtype(qkv)
        out = heads.ops.group_attention(
            q.to(dtype), pool, self._planes, memory, own_planes, own, pieces.batch, heads.scale
        )
        return out.to(qkv.dtype)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of full pages, decoded: float32 [pages, kv_heads, page_size, head_dim] each."""
        k, v = decode_group_pages(pool, self._planes, pages)
        return self.key_mean.add(k), v

    def _own(self, memory: torch.Tensor, offset: int) -> torch.Tensor:
        """The unquantized pages in a memory uint8 [places, bytes]: [places, keys of heads | values, page_size, dim]."""
        return page_array(memory, offset, self._shape, self._codec.dtype)

    def _append(
        self, rows: torch.Tensor, states: torch.Tensor, batch: Batch, pieces: Pieces
    ) -> tuple[torch.Tensor, int]:
        """Writes rows [rows, keys of heads | values, dim] into the unquantized pages of this step, which are partial
        pages in states where no request has two of them. Keeps those that stay partial.

        Returns   memory uint8 [places, bytes], and the bytes from the start of a place to its page
        """
        memory, offset, kept = states, self._partial, self._own(states, self._partial)
        if pieces.are_many:
            pages = kept.new_zeros(len(pieces.requests), *self._shape)
            memory, offset = pages.view(torch.uint8).flatten(1), 0
            pages[pieces.continued] = kept[pieces.states[pieces.continued]]
        self._own(memory, offset)[pieces.places[pieces.of_rows], :, batch.write_slots.long()] = rows
        if pieces.are_many:
            kept[pieces.states[pieces.partial]] = pages[pieces.partial]
        return memory, offset

    def _seal(self, new: torch.Tensor, pool: torch.Tensor, batch: Batch, pieces: Pieces) -> None:
        """Writes the pages that this step fills, in codes.

        new   float32 [full pages, keys of heads | values, page_size, dim]
        """
        k, v = new.chunk(2, dim=1)
        pages = batch.write_pages[pieces.last_rows[pieces.full]].long()
        codes, step, low = self._keys.encode(k)
        parts = [split_codes(codes, self._codec.bits)[0], step.squeeze(-2), low.squeeze(-2)]
        codes, step, low = self._values.encode(v.unflatten(-1, (-1, self._planes.group)))
        parts += [split_codes(codes.flatten(-2), self._codec.bits)[0], step.squeeze(-1), low.squeeze(-1)]
        for slot, numbers in zip(self._slots, parts, strict=True):
            array_of(pool, slot)[pages] = numbers


@cache
def _own_planes(offset: int, stride: int, shape: tuple[int, int, int], dtype: torch.dtype) -> KVPlanes:
    """Unquantized pages [keys of heads | values, page_size, dim], `offset` bytes into places `stride` bytes apart."""
    both, size, dim = shape
    row = dim * dtype.itemsize
    return KVPlanes(
        k_offset=offset, v_offset=offset + both // 2 * size * row, rope_offset=0, page_bytes=stride, page_size=size,
        token_stride=row, head_stride=size * row, rope_stride=0, kv_heads=both // 2, head_dim=dim, value_dim=dim,
        rope_dim=0, dtype=dtype,
    )  # fmt: skip


class Pieces:
    """The rows of a step cut where the request or the page changes: int64 tensors, one number a piece unless said.

    batch       the Batch with a piece in place of each request
    are_many    a request has several pieces
    of_rows     [rows]: the piece of each row
    requests    the request of each piece
    states      its state
    columns     which page of its request a piece is
    places      where the piece's page lies unquantized: its state, or its own number where are_many
    last_rows   the last row of each piece
    full        the pieces whose last row fills the page; partial: the others
    continued   the pieces whose page was begun in an earlier step
    """

    def __init__(self, batch: Batch) -> None:
        counts = batch.request_starts.diff().long()
        request = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        column = batch.positions.long() // batch.page_size
        is_first = torch.ones_like(request, dtype=torch.bool)
        is_first[1:] = (request[1:] != request[:-1]) | (column[1:] != column[:-1])
        first_rows = is_first.nonzero()[:, 0]
        self.of_rows = is_first.cumsum(0) - 1
        starts = torch.cat((first_rows, first_rows.new_tensor([len(request)]))).int()
        self.requests, self.columns = request[first_rows], column[first_rows]
        self.states = batch.state_ids.long()[self.requests]
        self.are_many = len(first_rows) > len(counts)
        self.places = torch.arange(len(first_rows), device=counts.device) if self.are_many else self.states
        self.last_rows = starts[1:].long() - 1
        are_full = batch.write_slots[self.last_rows] == batch.page_size - 1
        self.full, self.partial = are_full.nonzero()[:, 0], (~are_full).nonzero()[:, 0]
        self.continued = (batch.write_slots[first_rows] > 0).nonzero()[:, 0]
        self.batch = replace(batch, request_starts=starts, page_tables=batch.page_tables[self.requests])

    def own_pages(self, exact: bool) -> OwnPages:
        """The pages that each piece sees unquantized.

        exact   a piece sees only its own page unquantized; else all pages that its request writes in this step
        """
        return self.batch.once(_own_pages, self, exact)


def _own_pages(batch: Batch, own: Pieces, exact: bool) -> OwnPages:
    # Pieces of a request follow each other: for each piece, the first one of its request.
    lead = torch.searchsorted(own.requests, own.requests)
    starts = own.columns if exact else own.columns[lead]
    before = torch.arange(batch.page_tables.shape[1], device=starts.device) - own.columns[:, None]
    places = own.places[:, None] + before.clamp(max=0) * own.are_many
    return OwnPages(starts.int(), places.clamp(min=0).int())
