"""What stands between a layer and its pages: one verb, which writes the keys and values of a step and attends.

    AttentionPages    keys and values of grouped-query attention, in any two sides
    LatentPages       the latent of multi-head latent attention, in one side; the rotated key stays as it is

Two ways to attend. Where both sides are tables and scales, kernels read the codes themselves. Everything else is
decoded into pages made for one step, each page once, however many requests share it.

Prefill, `exact`: a row reads its own chunk through the codes, so what it computes does not depend on how a prompt was
cut or what was found in the prefix cache. `fast`: the rows of a request that brings more than one to a step see each
other as they are, and only what was there before through the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.codecs.side import Side, SidePages, TableCoder
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import LARGEST_SCALE, CodePlanes, HeadNorms
from nanokv.kernels.reference import decoded_batch

LARGEST = LARGEST_SCALE
"""The largest number that is written: that of a float16, in which scales are kept."""


@dataclass(frozen=True)
class Heads:
    """What an attention layer tells its pages.

    scale     what scores are multiplied with
    cos_sin   float32 [positions, rotary dims]
    norms     HeadNorms of q and k, or None
    ops       Ops of the layer
    """

    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    cos_sin: torch.Tensor
    norms: HeadNorms | None = None
    ops: Ops = AUTO


class Centre:
    """The mean of a layer's keys, taken off before they are coded.

    A constant added to all keys of a row moves all its scores alike and leaves the softmax as it was, so nothing has to
    be added back. What is left of keys with a strong bias (Qwen2) is far smaller and codes far better. The mean is that
    of the first step after `start`, and fixed from then on: it is part of what a page means.
    """

    def __init__(self) -> None:
        self.mean: torch.Tensor | None = None
        self._is_wanted = False

    def start(self) -> None:
        self._is_wanted = True

    def __call__(self, keys: torch.Tensor) -> None:
        """Takes the mean off keys, float32 [rows, heads, dim], IN PLACE: before they are checked, because what is left
        may be larger than they were."""
        if self._is_wanted:
            self.mean, self._is_wanted = keys.mean(0), False
        if self.mean is not None:
            keys.sub_(self.mean)

    def back(self, keys: torch.Tensor) -> torch.Tensor:
        """The mean on keys again: float32 [pages, heads, page_size, dim]."""
        return keys if self.mean is None else keys + self.mean[:, None]


def refuse_unwritable(x: torch.Tensor, batch: Batch) -> None:
    """Marks the rows with numbers that no scale can hold in batch.unwritable, and puts zeros in their place.

    x   float32 [rows, heads, dim], about to be written; changed in place

    So no page ever holds what stands for no number, other requests of the step see nothing of it, and the host need not
    wait: it reads the marks with the tokens.
    """
    is_bad = ~(x.abs().amax((1, 2)) <= LARGEST)  # NaN is not smaller either
    batch.unwritable.logical_or_(is_bad)
    x.masked_fill_(is_bad[:, None, None], 0.0)


def why_refused(codec: str) -> str:
    """What the request of such a row is told."""
    return (
        f"codec={codec!r}: keys or values are not finite (damaged weights), or beyond the {LARGEST:g} that a scale can "
        "hold (codec raw has no such limit)"
    )


class AttentionPages:
    """Keys and values of one layer.

    k, v    Side of keys and of values
    exact   prefill reads its own chunk through the codes
    """

    def __init__(self, k: Side, v: Side, layout: PageLayout, layer: int, heads: Heads, exact: bool) -> None:
        self._heads = heads
        self._exact = exact
        self._layout = layout
        device = heads.cos_sin.device
        self._k, self._v = (
            SidePages(side, prefix, layout, layer, heads.kv_heads, heads.head_dim, device, heads.ops)
            for side, prefix in ((k, "k"), (v, "v"))
        )
        self._planes = None
        if isinstance(self._k.coder, TableCoder) and isinstance(self._v.coder, TableCoder):
            k_plane, v_plane = (side.coder.placed(side.slots) for side in (self._k, self._v))
            self._planes = CodePlanes(k_plane, v_plane, layout.page_bytes, layout.page_size, heads.kv_heads)
        self.centre = Centre()

    @property
    def is_recordable(self) -> bool:
        """Whether a decode step may stand in a CUDA graph. What is decoded has sizes that only the device knows (how
        many pages there are, each counted once), so the host waits to learn them."""
        return self._planes is not None

    def attend(self, qkv: torch.Tensor, pool: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Writes k and v of each row to its slot, then attends: [rows, num_heads * head_dim], dtype of qkv.

        qkv     [rows, (num_heads + 2 * kv_heads) * head_dim], as `rope_and_store` takes it; changed in place
        pool    uint8 [num_pages, page_bytes]
        states  uint8 [num_states, state_bytes]
        batch   rows with NaN, infinity or numbers beyond float16 are marked in batch.unwritable
        """
        heads = self._heads
        heads.ops.rope(qkv, heads.cos_sin, batch, heads.num_heads, heads.kv_heads, heads.head_dim, heads.norms)
        x = qkv.unflatten(1, (-1, heads.head_dim)).float()
        q, k, v = x.split((heads.num_heads, heads.kv_heads, heads.kv_heads), dim=1)
        self.centre(k)
        refuse_unwritable(x[:, heads.num_heads :], batch)
        raw_rows = None if self._exact else batch.once(prefilling)
        attend = self._attend_codes if self._planes is not None and raw_rows is None else self._attend_decoded
        out = attend(q, k, v, pool, batch, raw_rows, attention_dtype(qkv)).float()
        return self._v.back(out.unflatten(1, (heads.num_heads, -1))).flatten(1).to(qkv.dtype)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that whole pages stand for: float32 [pages, kv_heads, page_size, head_dim] each."""
        k, v = (side.back(side.read(pool, pages)) for side in (self._k, self._v))
        return self.centre.back(k), v

    def _attend_codes(self, q, k, v, pool, batch, _raw_rows, dtype) -> torch.Tensor:
        basis = self._k.coder.basis
        if basis is not None and basis is self._v.coder.basis:  # one product for the three
            q, k, v = basis.to(torch.cat((q, k, v), dim=1)).split((q.shape[1], k.shape[1], v.shape[1]), dim=1)
        else:
            q, k, v = self._k.to(q), self._k.to(k), self._v.to(v)
        self._heads.ops.store_codes(k, v, pool, self._planes, batch)
        return self._heads.ops.code_attention(q.to(dtype), pool, self._planes, batch, self._heads.scale)

    def _attend_decoded(self, q, k, v, pool, batch, raw_rows, dtype) -> torch.Tensor:
        for side, x in ((self._k, k), (self._v, v)):
            side.write(x, pool, batch.write_pages.long(), batch.write_slots.long())
        pages, places = batch.once(used_pages)
        keys, values = (decoded(side, x, pool, batch, pages, raw_rows) for side, x in ((self._k, k), (self._v, v)))
        heads, scratch = self._heads, (keys, values, None)
        return over_decoded(heads.ops, self._k.to(q), scratch, batch, places, heads.scale, dtype)


def attention_dtype(activations: torch.Tensor) -> torch.dtype:
    """What turned queries and decoded pages are rounded to for attention: on a GPU the dtype of activations, whose
    products are fast there; on a CPU float32."""
    return activations.dtype if activations.is_cuda else torch.float32


def over_decoded(
    ops: Ops,
    q: torch.Tensor,
    decoded: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    batch: Batch,
    tables: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Attention over pages decoded for this step: [rows, heads * value_dim], `dtype`.

    decoded   k, v and tail, as decoded_batch takes them with `tables`
    """
    k, v, tail = (None if x is None else x.to(dtype) for x in decoded)
    return ops.paged_attention(q.to(dtype), *decoded_batch(k, v, tail, batch, tables), scale)


def used_pages(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages in the tables of a step, each once, ascending: int64; and the tables, as places among them: int32."""
    pages, places = batch.page_tables.long().unique(return_inverse=True)
    return pages, places.int()


def prefilling(batch: Batch) -> torch.Tensor | None:
    """The rows (int64) of requests that bring more than one to the step; None where no request does."""
    if batch.num_rows == batch.num_requests:
        return None
    counts = batch.request_starts.diff().long()
    return (counts > 1).repeat_interleave(counts).nonzero()[:, 0]


def decoded(
    side: SidePages,
    x: torch.Tensor,
    pool: torch.Tensor,
    batch: Batch,
    pages: torch.Tensor,
    raw_rows: torch.Tensor | None,
) -> torch.Tensor:
    """Decoded pages [pages, heads, page_size, width], with the rows raw_rows of x in their slots as they are."""
    numbers = side.read(pool, pages)
    if raw_rows is not None:
        places = torch.searchsorted(pages, batch.write_pages[raw_rows].long())
        numbers[places, :, batch.write_slots[raw_rows].long()] = side.exactly(x[raw_rows])
    return numbers
