"""LatentPages: the latents of multi-head latent attention in codes, the rotated keys beside them as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanokv.codecs.pages import attention_dtype, decoded, over_decoded, prefilling, refuse_unwritable, used_pages
from nanokv.codecs.side import Side, SidePages, array_of
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.kernels import ops


@dataclass(frozen=True)
class Latent:
    """What a layer of multi-head latent attention tells its pages.

    rank, rope   numbers of a latent and of a rotated key
    norm, eps    of the latent
    cos_sin      float32 [positions, rope]
    scale        what scores are multiplied with
    """

    rank: int
    rope: int
    norm: torch.Tensor
    eps: float
    cos_sin: torch.Tensor
    scale: float


class LatentPages:
    """The latents of one layer, keys and values at once, in one side."""

    is_recordable = False
    """Pages are decoded: see AttentionPages."""

    def __init__(self, side: Side, layout: PageLayout, layer: int, latent: Latent, exact: bool) -> None:
        self._latent = latent
        self._exact = exact
        self._side = SidePages(side, "latent", layout, layer, 1, latent.rank, latent.cos_sin.device)
        self._rope = layout.paged(layer, "k_rope")

    def attend(
        self, q: torch.Tensor, q_rope: torch.Tensor, kv: torch.Tensor, pool: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Writes each row's latent and rotated key, then attends, absorbed: [rows, heads, rank], dtype of q.

        q           [rows, heads, rank]: queries that stand in the space of latents
        q_rope, kv  as store_latent takes them, changed in place
        batch       rows with NaN, infinity or numbers beyond float16 are marked in batch.unwritable
        """
        latents, keys = self._compute(q_rope, kv, batch)
        for numbers in (latents, keys[:, None]):
            refuse_unwritable(numbers, batch)
        pages, slots = batch.write_pages.long(), batch.write_slots.long()
        self._side.write(latents, pool, pages, slots)
        rope = array_of(pool, self._rope)
        rope[pages, slots] = keys.to(rope.dtype)
        used, places = batch.once(used_pages)
        raw_rows = None if self._exact else batch.once(prefilling)
        numbers = decoded(self._side, latents, pool, batch, used, raw_rows)
        queries = torch.cat((self._side.to(q.float()), q_rope.float()), dim=-1)
        scratch, scale = (numbers, None, rope[used].float()), self._latent.scale
        out = over_decoded(queries, scratch, batch, places, scale, attention_dtype(q)).float()
        return self._side.back(out.unflatten(1, (q.shape[1], -1))).to(q.dtype)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor]:
        """The latents that whole pages stand for: float32 [pages, 1, page_size, rank]."""
        return (self._side.back(self._side.read(pool, pages)),)

    def _compute(self, q_rope: torch.Tensor, kv: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [rows, 1, rank] and rotated keys [rows, rope], float32: the op that writes raw pages writes one page
        with a slot for each row."""
        latent, rows = self._latent, kv.shape[0]
        page = torch.empty(1, 4 * rows * (latent.rank + latent.rope), dtype=torch.uint8, device=kv.device)
        planes = ops.KVPlanes(
            k_offset=0, v_offset=0, rope_offset=4 * rows * latent.rank, page_bytes=page.shape[1], page_size=rows,
            token_stride=4 * latent.rank, head_stride=0, rope_stride=4 * latent.rope, kv_heads=1,
            head_dim=latent.rank, value_dim=latent.rank, rope_dim=latent.rope, dtype=torch.float32,
        )  # fmt: skip
        slots = torch.arange(rows, dtype=torch.int32, device=kv.device)
        here = replace(batch, write_pages=torch.zeros_like(slots), write_slots=slots)
        ops.store_latent(q_rope, kv, latent.norm, latent.eps, latent.cos_sin, page, planes, here)
        numbers = page.view(torch.float32)[0].split((rows * latent.rank, rows * latent.rope))
        return numbers[0].view(rows, 1, latent.rank), numbers[1].view(rows, latent.rope)
