"""AttentionPages: between a layer and its coded pages, with one verb, which writes keys and values and attends.

Two ways to attend. Where keys and values are both tables and scales, kernels read the codes themselves. Everything
else is decoded into pages made for one step, each page once, however many requests share it.

Prefill, `exact`: a row reads its own chunk through the codes, so its result depends neither on how a prompt was cut
nor on what was found in the prefix cache. `fast`: the rows of a request with more than one in a step see each other
unquantized, and only earlier tokens through the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.codecs.key_mean import KeyMean
from nanokv.codecs.quantizer import Quantizer, QuantizerPages, RawQuantizer, TableEncoder
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import LARGEST_SCALE, CodePlanes, HeadNorms
from nanokv.kernels.reference import decoded_batch

Decoded = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""k, v and the rotated key of decoded pages, as decoded_batch takes them."""


@dataclass(frozen=True)
class Heads:
    """The parts of an attention layer that its pages need.

    kv_heads  heads of keys and of values; a divisor of num_heads
    scale     factor of the scores
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

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the queries, keys and values in x [rows, num_heads + 2 * kv_heads, ...]."""
        return x.split((self.num_heads, self.kv_heads, self.kv_heads), dim=1)


def rotated(qkv: torch.Tensor, heads: Heads, key_mean: KeyMean, batch: Batch) -> torch.Tensor:
    """q, k and v ready to be coded: float32 [rows, num_heads + 2 * kv_heads, head_dim], which `Heads.split` parts.

    qkv     [rows, (num_heads + 2 * kv_heads) * head_dim], normed and rotated IN PLACE
    batch   rows of k and v that no scale can hold are marked in batch.unwritable
    """
    heads.ops.rope(qkv, heads.cos_sin, batch, heads.num_heads, heads.kv_heads, heads.head_dim, heads.norms)
    x = heads.ops.cast(qkv, torch.float32).unflatten(1, (-1, heads.head_dim))
    key_mean.subtract(heads.split(x)[1])
    heads.ops.refuse_unwritable(x[:, heads.num_heads :], batch)
    return x


def reason_unwritable(codec: str) -> str:
    """The error of a request whose row was refused."""
    return (
        f"codec={codec!r}: keys or values are not finite (damaged weights), or beyond the {LARGEST_SCALE:g} that a "
        "scale can hold (codec raw has no such limit)"
    )


class AttentionPages:
    """Coded keys and values of one layer of grouped-query attention.

    k, v    Quantizer of keys and of values
    exact   prefill reads its own chunk through the codes
    """

    def __init__(self, k: Quantizer, v: Quantizer, layout: PageLayout, layer: int, heads: Heads, exact: bool) -> None:
        self._heads = heads
        self._exact = exact
        dim, device, sizes = heads.head_dim, heads.cos_sin.device, (heads.kv_heads, heads.head_dim, layout.page_size)
        k_codes, v_codes = (one.encoder(dim, device, heads.ops) for one in (k, v))
        self._k = QuantizerPages(k_codes, k.planes("k", *sizes), layout, layer)
        self._v = QuantizerPages(v_codes, v.planes("v", *sizes), layout, layer)
        self._planes: CodePlanes | None = None
        if isinstance(k_codes, TableEncoder) and isinstance(v_codes, TableEncoder):
            k_plane, v_plane = k_codes.code_plane(self._k.slots), v_codes.code_plane(self._v.slots)
            self._planes = CodePlanes(k_plane, v_plane, layout.page_bytes, layout.page_size, heads.kv_heads)
        self.key_mean = KeyMean(is_lossy=not isinstance(k, RawQuantizer))

    @property
    def planes(self) -> CodePlanes | None:
        """Where a kernel reads the codes; None where pages are decoded."""
        return self._planes

    @property
    def is_recordable(self) -> bool:
        """Whether a decode step may be recorded in a CUDA graph. Not where pages are decoded: the host waits for the
        device to learn how many there are, each counted once."""
        return self._planes is not None

    def attend(self, qkv: torch.Tensor, pool: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Writes k and v of each row to its slot, then attends: [rows, num_heads * head_dim], dtype of qkv.

        qkv     [rows, (num_heads + 2 * kv_heads) * head_dim], as `rope_and_store` takes it; changed IN PLACE
        pool    uint8 [num_pages, page_bytes]
        states  uint8 [num_states, state_bytes]
        batch   rows with NaN, infinity or numbers beyond float16 are marked in batch.unwritable
        """
        heads = self._heads
        x = rotated(qkv, heads, self.key_mean, batch)
        is_coded, dtype = self._exact or batch.once(prefill_rows) is None, attention_dtype(qkv)
        if self._planes is not None and is_coded:
            out = self._attend_codes(x, pool, self._planes, batch, dtype).float()
        else:
            out = self._attend_decoded(x, pool, batch, dtype).float()
        return heads.ops.cast(self._v.back(out.unflatten(1, (heads.num_heads, -1))).flatten(1), qkv.dtype)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of whole pages, decoded: float32 [pages, kv_heads, page_size, head_dim] each."""
        k, v = (own.back(own.read(pool, pages)) for own in (self._k, self._v))
        return self.key_mean.add(k), v

    def _attend_codes(self, x, pool, planes, batch, dtype) -> torch.Tensor:
        basis = self._k.encoder.basis
        if basis is self._v.encoder.basis:  # one product for the three
            q, k, v = self._heads.split(x if basis is None else basis.to(x))
        else:
            q, k, v = self._heads.split(x)
            q, k, v = self._k.to(q), self._k.to(k), self._v.to(v)
        self._heads.ops.store_codes(k, v, pool, planes, batch)
        return self._heads.ops.code_attention(q.to(dtype), pool, planes, batch, self._heads.scale)

    def _attend_decoded(self, x, pool, batch, dtype) -> torch.Tensor:
        q, k, v = self._heads.split(x)
        keys, values = (write_and_decode(own, x, pool, batch, self._exact) for own, x in ((self._k, k), (self._v, v)))
        places = batch.once(used_pages)[1]
        heads, scratch = self._heads, (keys, values, None)
        return attend_decoded(heads.ops, self._k.to(q), scratch, batch, places, heads.scale, dtype)


def attention_dtype(activations: torch.Tensor) -> torch.dtype:
    """The dtype of queries and decoded pages in attention: on a GPU that of activations, whose products are fast there;
    on a CPU float32."""
    return activations.dtype if activations.is_cuda else torch.float32


def attend_decoded(
    ops: Ops, q: torch.Tensor, decoded: Decoded, batch: Batch, tables: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Attention over pages decoded for this step: [rows, heads * value_dim], `dtype`.

    q         [rows, heads, head_dim], in the basis of the keys
    tables    int32 [requests, widest]: the pages of each request, as places in `decoded`
    """
    k, *others = decoded
    v, rope = (None if x is None else x.to(dtype) for x in others)
    return ops.paged_attention(q.to(dtype), *decoded_batch(k.to(dtype), v, rope, batch, tables), scale)


def used_pages(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages in the tables of a step, each once, ascending: int64; and the tables, as places among them: int32."""
    pages, places = batch.page_tables.long().unique(return_inverse=True)
    return pages, places.int()


def prefill_rows(batch: Batch) -> torch.Tensor | None:
    """The rows (int64) of requests with more than one row in the step; None where every request has one."""
    if batch.num_rows == batch.num_requests:
        return None
    counts = batch.request_starts.diff().long()
    return (counts > 1).repeat_interleave(counts).nonzero()[:, 0]


def write_and_decode(
    quantizer: QuantizerPages, x: torch.Tensor, pool: torch.Tensor, batch: Batch, exact: bool
) -> torch.Tensor:
    """Writes the rows of a step, then decodes its pages: float32 [pages, heads, page_size, width], as in `used_pages`.

    x       float32 [rows, heads, dim]
    exact   False: the rows of `prefill_rows` come out unquantized
    """
    where, slots = batch.write_pages.long(), batch.write_slots.long()
    quantizer.write(x, pool, where, slots)
    pages, _ = batch.once(used_pages)
    numbers = quantizer.read(pool, pages)
    rows = None if exact else batch.once(prefill_rows)
    if rows is not None:
        numbers[torch.searchsorted(pages, where[rows]), :, slots[rows]] = quantizer.encode_exact(x[rows])
    return numbers
