"""The pages of multi-head latent attention: a latent and a rotated key for each token, shared by all heads.

RawLatentPages   latents in the model's own dtype, read in place: absorbed, or expanded where that is cheaper
LatentPages      latents in codes, always absorbed; the rotated keys stay unquantized
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanokv.codecs.pages import attend_decoded, attention_dtype, used_pages, write_and_decode
from nanokv.codecs.quantizer import Quantizer, QuantizerPages, array_of
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.kernels.linear import PackedHeadLinear, head_linear
from nanokv.kernels.ops import Ops
from nanokv.kernels.planes import KVPlanes
from nanokv.kernels.reference import read_latents


@dataclass(frozen=True)
class Latent:
    """The parts of a layer of multi-head latent attention that its pages need.

    rank, rope   numbers of a latent and of a rotated key
    norm, eps    weight [rank] and eps of the latent's RMS norm
    cos_sin      float32 [positions, rope]
    scale        factor of the scores
    ops          Ops of the layer
    w_uk, w_uv   heads of [rank, nope_dim] and of [value_dim, rank], packed for head_linear
    expand       latents [tokens, rank] -> [tokens, heads * (nope_dim + value_dim)], or None: every row is absorbed
    expands      whether `rows` new rows over `cached` tokens cost less expanded
    """

    rank: int
    rope: int
    norm: torch.Tensor
    eps: float
    cos_sin: torch.Tensor
    scale: float
    ops: Ops
    w_uk: PackedHeadLinear
    w_uv: PackedHeadLinear
    expand: Callable[[torch.Tensor], torch.Tensor] | None
    expands: Callable[[int, int], bool]


def latent_planes(
    latent: Latent, offset: int, rope_offset: int, page_bytes: int, page_size: int, dtype: torch.dtype
) -> KVPlanes:
    """Pages of latents [page_size, rank] at `offset` and rotated keys [page_size, rope] at `rope_offset`, in bytes."""
    return KVPlanes(
        k_offset=offset, v_offset=offset, rope_offset=rope_offset, page_bytes=page_bytes, page_size=page_size,
        token_stride=latent.rank * dtype.itemsize, head_stride=0, rope_stride=latent.rope * dtype.itemsize, kv_heads=1,
        head_dim=latent.rank, value_dim=latent.rank, rope_dim=latent.rope, dtype=dtype,
    )  # fmt: skip


class RawLatentPages:
    """Latents and rotated keys of one layer, read in place."""

    is_recordable = True

    def __init__(self, layout: PageLayout, layer: int, latent: Latent) -> None:
        self._latent = latent
        self._slot = layout.paged(layer, "latent")
        offsets = self._slot.offset, layout.paged(layer, "k_rope").offset
        self.planes = latent_planes(latent, *offsets, layout.page_bytes, layout.page_size, self._slot.plane.dtype)

    def attend(
        self, nope: torch.Tensor, rope: torch.Tensor, kv: torch.Tensor, pool: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Writes each row's latent and rotated key, then attends: [rows, heads * value_dim], dtype of nope.

        nope   [rows, heads, nope_dim]: the part of queries without positions
        rope   [rows, heads, rope]: the part with positions; rotated IN PLACE
        kv     [rows, rank + rope]: the latent before its norm, and the key, which is rotated IN PLACE
        pool   uint8 [num_pages, page_bytes]
        """
        latent = self._latent
        latent.ops.store_latent(rope, kv, latent.norm, latent.eps, latent.cos_sin, pool, self.planes, batch)
        expanding = self._expanding(batch)
        if not expanding:
            return self.absorbed(nope, rope, pool, batch)
        attended = nope.new_empty(nope.shape[0], nope.shape[1] * latent.w_uv.shape[1])
        others = [request for request in range(batch.num_requests) if request not in expanding]
        forms = [([request], self.expanded) for request in expanding] + ([(others, self.absorbed)] if others else [])
        for requests, form in forms:
            rows, part = batch.select(requests)
            attended[rows] = form(nope[rows], rope[rows], pool, part)
        return attended

    def absorbed(self, nope: torch.Tensor, rope: torch.Tensor, pool: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Attention over the latents themselves: queries as `attend` takes them, rotated -> its result."""
        q = torch.cat((head_linear(nope, self._latent.w_uk), rope), dim=-1)
        latents = self._latent.ops.paged_attention(q, pool, self.planes, batch, self._latent.scale)
        return head_linear(latents.unflatten(1, (nope.shape[1], -1)), self._latent.w_uv).flatten(1)

    def expanded(self, nope: torch.Tensor, rope: torch.Tensor, pool: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The same for one request: expands all latents that its rows see into one scratch page, and attends over it.

        scratch   [tokens, heads * (nope_dim + value_dim) + rope]: the key that the heads share is at the end of a row
        """
        assert self._latent.expand is not None
        heads, nope_dim = nope.shape[1:]
        length = int(batch.positions[-1]) + 1
        pages = batch.page_tables[0, : -(-length // batch.page_size)].long()
        latents, keys = (part.to(nope.dtype) for part in read_latents(pool, self.planes, pages, length))
        scratch = torch.cat((self._latent.expand(latents), keys), dim=1)
        size, value_dim = scratch.element_size(), self._latent.w_uv.shape[1]
        row, head = scratch.shape[1] * size, (nope_dim + value_dim) * size
        own = KVPlanes(
            k_offset=0, v_offset=nope_dim * size, rope_offset=heads * head, page_bytes=scratch.nbytes,
            page_size=length, token_stride=row, head_stride=head, rope_stride=row, kv_heads=heads, head_dim=nope_dim,
            value_dim=value_dim, rope_dim=self._latent.rope, dtype=scratch.dtype,
        )  # fmt: skip
        alone = replace(batch, page_tables=torch.zeros_like(batch.page_tables[:, :1]), page_size=length)
        q, page = torch.cat((nope, rope), dim=-1), scratch.view(torch.uint8).view(1, -1)
        return self._latent.ops.paged_attention(q, page, own, alone, self._latent.scale)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor]:
        """The latents of whole pages: float32 [pages, 1, page_size, rank]."""
        return (array_of(pool, self._slot)[pages].float()[:, None],)

    def _expanding(self, batch: Batch) -> list[int]:
        """The requests of a step for which expanding is cheaper; none in a step that only decodes."""
        if self._latent.expand is None or batch.num_rows == batch.num_requests:
            return []
        first = batch.positions[batch.request_starts[:-1].long()].tolist()
        counts = batch.request_starts.diff().tolist()
        return [i for i, sizes in enumerate(zip(first, counts, strict=True)) if self._latent.expands(*sizes)]


class LatentPages:
    """Coded latents of one layer, keys and values at once."""

    planes = None
    is_recordable = False
    """Pages are decoded: see AttentionPages."""

    def __init__(self, quantizer: Quantizer, layout: PageLayout, layer: int, latent: Latent, exact: bool) -> None:
        self._latent = latent
        self._exact = exact
        encoder = quantizer.encoder(latent.rank, latent.cos_sin.device, latent.ops)
        planes = quantizer.planes("latent", 1, latent.rank, layout.page_size)
        self._coded = QuantizerPages(encoder, planes, layout, layer)
        self._rope = layout.paged(layer, "k_rope")

    def attend(
        self, nope: torch.Tensor, rope: torch.Tensor, kv: torch.Tensor, pool: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """As RawLatentPages.attend, every row absorbed.

        batch   rows with NaN, infinity or numbers beyond float16 are marked in batch.unwritable
        """
        latent = self._latent
        latents, keys = self._compute(rope, kv, batch)
        for numbers in (latents, keys[:, None]):
            latent.ops.refuse_unwritable(numbers, batch)
        stored_keys = array_of(pool, self._rope)
        stored_keys[batch.write_pages.long(), batch.write_slots.long()] = keys.to(stored_keys.dtype)
        numbers = write_and_decode(self._coded, latents, pool, batch, self._exact)
        used, places = batch.once(used_pages)
        absorbed = head_linear(nope, latent.w_uk)
        queries = torch.cat((self._coded.to(absorbed.float()), rope.float()), dim=-1)
        scratch = numbers, None, stored_keys[used].float()
        out = attend_decoded(latent.ops, queries, scratch, batch, places, latent.scale, attention_dtype(nope)).float()
        mixed = self._coded.back(out.unflatten(1, (nope.shape[1], -1))).to(nope.dtype)
        return head_linear(mixed, latent.w_uv).flatten(1)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor]:
        """As RawLatentPages.vectors, decoded."""
        return (self._coded.back(self._coded.read(pool, pages)),)

    def _compute(self, rope: torch.Tensor, kv: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [rows, 1, rank] and rotated keys [rows, rope], float32: the op that writes raw pages writes one page
        with a slot for each row."""
        latent, rows = self._latent, kv.shape[0]
        page = torch.empty(1, 4 * rows * (latent.rank + latent.rope), dtype=torch.uint8, device=kv.device)
        planes = latent_planes(latent, 0, 4 * rows * latent.rank, page.shape[1], rows, torch.float32)
        slots = torch.arange(rows, dtype=torch.int32, device=kv.device)
        here = replace(batch, write_pages=torch.zeros_like(slots), write_slots=slots)
        latent.ops.store_latent(rope, kv, latent.norm, latent.eps, latent.cos_sin, page, planes, here)
        numbers = page.view(torch.float32)[0].split((rows * latent.rank, rows * latent.rope))
        return numbers[0].view(rows, 1, latent.rank), numbers[1].view(rows, latent.rope)
