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

import torch

from nanokv.codecs.key_mean import KeyMean
from nanokv.codecs.pages import Heads, attend_decoded, attention_dtype, rotated
from nanokv.codecs.quantizer import array_of, plane
from nanokv.core.batch import Batch
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels.reference import join_codes, split_codes

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
        return codes.float() * step.float() + low.float()


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
    """Only the device knows which pages become full, and pages are decoded: see AttentionPages."""

    def __init__(self, codec: KiviCodec, layout: PageLayout, layer: int, heads: Heads) -> None:
        self._codec = codec
        self._heads = heads
        self._group = min(layout.page_size, heads.head_dim)
        self._keys, self._values = Groups(codec.bits, -2), Groups(codec.bits, -1)
        parts = "codes", "step", "low"
        self._k, self._v = ([layout.paged(layer, f"{side}_{part}") for part in parts] for side in "kv")
        self._partial = [layout.state(layer, f"{side}_tail") for side in "kv"]
        self.key_mean = KeyMean(is_lossy=False)  # each channel has a minimum of its own

    def attend(self, qkv: torch.Tensor, pool: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As AttentionPages.attend."""
        heads = self._heads
        q, k, v = rotated(qkv, heads, self.key_mean, batch)
        pieces = batch.once(Pieces)
        new = [self._append(x, slot, states, batch, pieces) for x, slot in zip((k, v), self._partial, strict=True)]
        self._seal(new, pool, batch.write_pages[pieces.last_rows[pieces.full]].long(), pieces)
        tables, sealed = batch.once(piece_tables, self._codec.exact)
        k, v = (torch.cat((old, own.float())) for old, own in zip(self._decode(pool, sealed), new, strict=True))
        by_piece = replace(batch, request_starts=pieces.starts)
        out = attend_decoded(heads.ops, q, (k, v, None), by_piece, tables, heads.scale, attention_dtype(qkv))
        return out.to(qkv.dtype)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of full pages, decoded: float32 [pages, kv_heads, page_size, head_dim] each."""
        k, v = self._decode(pool, pages)
        return self.key_mean.add(k), v

    def _append(self, x, slot, states, batch, pieces) -> torch.Tensor:
        """The pages of this step unquantized: [pieces, kv_heads, page_size, head_dim]. Keeps those that are partial."""
        kept = array_of(states, slot)
        own = batch.state_ids.long()[pieces.requests]
        pages = kept.new_zeros(len(own), *kept.shape[1:])
        pages[pieces.continued] = kept[own[pieces.continued]]
        pages[pieces.of_rows, :, batch.write_slots.long()] = x.to(self._codec.dtype)
        kept[own[pieces.partial]] = pages[pieces.partial]
        return pages

    def _seal(self, new: list[torch.Tensor], pool: torch.Tensor, pages: torch.Tensor, pieces: Pieces) -> None:
        """Writes the pages that this step fills, in codes."""
        k, v = (x[pieces.full].float() for x in new)
        codes, step, low = self._keys.encode(k)
        parts = [split_codes(codes, self._codec.bits)[0], step.squeeze(-2), low.squeeze(-2)]
        codes, step, low = self._values.encode(v.unflatten(-1, (-1, self._group)))
        parts += [split_codes(codes.flatten(-2), self._codec.bits)[0], step.squeeze(-1), low.squeeze(-1)]
        for slot, numbers in zip((*self._k, *self._v), parts, strict=True):
            array_of(pool, slot)[pages] = numbers

    def _decode(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of full pages: float32 [pages, kv_heads, page_size, head_dim] each."""
        codes, step, low = (array_of(pool, slot)[pages] for slot in self._k)
        k = Groups.decode(join_codes([codes], self._codec.bits), step.unsqueeze(-2), low.unsqueeze(-2))
        codes, step, low = (array_of(pool, slot)[pages] for slot in self._v)
        codes = join_codes([codes], self._codec.bits).unflatten(-1, (-1, self._group))
        return k, Groups.decode(codes, step.unsqueeze(-1), low.unsqueeze(-1)).flatten(-2)


class Pieces:
    """The rows of a step cut where the request or the page changes: int64 tensors, one number a piece unless said.

    starts      int32 [pieces + 1]: the rows of piece i are starts[i] .. starts[i + 1]
    of_rows     [rows]: the piece of each row
    requests    the request of each piece
    places      which page of its request a piece is
    last_rows   the last row of each piece
    full        the pieces whose last row fills the page; partial: the others
    continued   the pieces whose page was begun in an earlier step
    """

    def __init__(self, batch: Batch) -> None:
        counts = batch.request_starts.diff().long()
        request = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        place = batch.positions.long() // batch.page_size
        is_first = torch.ones_like(request, dtype=torch.bool)
        is_first[1:] = (request[1:] != request[:-1]) | (place[1:] != place[:-1])
        first_rows = is_first.nonzero()[:, 0]
        self.of_rows = is_first.cumsum(0) - 1
        self.starts = torch.cat((first_rows, first_rows.new_tensor([len(request)]))).int()
        self.requests, self.places = request[first_rows], place[first_rows]
        self.last_rows = self.starts[1:].long() - 1
        are_full = batch.write_slots[self.last_rows] == batch.page_size - 1
        self.full, self.partial = are_full.nonzero()[:, 0], (~are_full).nonzero()[:, 0]
        self.continued = (batch.write_slots[first_rows] > 0).nonzero()[:, 0]


def piece_tables(batch: Batch, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Page tables int32 [pieces, widest] over [full pages to decode | this step's pages]; the full pages int64.

    exact   a piece sees only its own page unquantized; else all pages that its request writes in this step
    """
    own = batch.once(Pieces)
    pages = batch.page_tables[own.requests].long()
    columns = torch.arange(pages.shape[1], device=pages.device)
    # Pieces of a request follow each other: for each piece, the first one of its request.
    lead = torch.searchsorted(own.requests, own.requests)
    first_unquantized = own.places if exact else own.places[lead]
    is_sealed = columns < first_unquantized[:, None]
    sealed = pages[is_sealed].unique()
    pieces = torch.arange(len(lead), device=pages.device)
    unquantized = (pieces - own.places)[:, None] + columns + len(sealed)
    return torch.where(is_sealed, torch.searchsorted(sealed, pages), unquantized).clamp(min=0).int(), sealed
