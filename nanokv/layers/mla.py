"""Multi-head latent attention: one latent and one rotated key per token serve all heads. Nothing expanded is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import Codec
from nanokv.codecs.latents import Latent, LatentPages
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels import ops
from nanokv.layers.linear import Linear
from nanokv.layers.norm import RMSNorm


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2): what is kept of a token is one latent and one rotated key."""

    q_rank: int | None
    """q_lora_rank: width that queries are squeezed through; None projects them at once."""
    kv_rank: int
    """kv_lora_rank: width of the latent."""
    nope_dim: int
    """qk_nope_head_dim: part of a head's query and key without positions."""
    rope_dim: int
    """qk_rope_head_dim: part with rotary positions; its key is shared by all heads."""
    value_dim: int
    """v_head_dim"""
    interleaved: bool
    """rope_interleave: whether the checkpoint rotates dims (0, 1), (2, 3), ... and not (0, n/2), (1, n/2 + 1), ..."""


class MLA:
    """Attention whose keys and values are products of a latent c (DeepSeek-AI 2024):

        key of head h     [W_UK_h c | k_rope]          value of head h     W_UV_h c

    Two ways to the same result. Expanded: compute keys and values of all tokens, then attend as usual. Absorbed: move
    W_UK into the query and W_UV behind the sum,

        q_h . W_UK_h c = (W_UK_h^T q_h) . c            sum_t p_t W_UV_h c_t = W_UV_h (sum_t p_t c_t)

    so that all heads read the latents themselves: one KV head, K = [c | k_rope], V = c. `expands` says which is
    cheaper.

    down      Linear to [q | latent | k_rope]; q is what q_up takes where queries have a rank, else the queries
    q_norm    RMSNorm before q_up, or None
    q_up      Linear to the queries, or None; queries are all heads' nope_dim, then all heads' rope_dim
    kv_norm   RMSNorm of the latent
    w_uk      heads of [rank, nope_dim] packed for ops.head_linear; w_uv heads of [value_dim, rank]
    expand    Linear from the latent to [nope_dim | value_dim] of each head, or None: then every row is absorbed
    codec     how latents are written into a page; codes are always attended absorbed
    Call      x [rows, width], store, batch -> [rows, width]
    """

    planes: ops.KVPlanes
    pages: LatentPages

    def __init__(
        self,
        down: Linear,
        q_norm: RMSNorm | None,
        q_up: Linear | None,
        kv_norm: RMSNorm,
        w_uk: ops.PackedHeadLinear,
        w_uv: ops.PackedHeadLinear,
        expand: Linear | None,
        out: Linear,
        cos_sin: torch.Tensor,
        codec: Codec,
        num_heads: int,
        shape: MLAConfig,
        scale: float,
    ) -> None:
        self.down = down
        self.q_norm = q_norm
        self.q_up = q_up
        self.kv_norm = kv_norm
        self.w_uk = w_uk
        self.w_uv = w_uv
        self.expand = expand
        self.out = out
        self.cos_sin = cos_sin
        self.codec = codec
        self.num_heads = num_heads
        self.shape = shape
        self.scale = scale

    @staticmethod
    def spec(codec: Codec, kv_rank: int, rope_dim: int, page_size: int) -> LayerSpec:
        """What such a layer keeps: the latent and the rotated key of each token, once for all heads."""
        k_rope = Plane("k_rope", (page_size, rope_dim), codec.dtype, token_axis=0)
        return LayerSpec(paged=(*codec.latent_spec(kv_rank, page_size).paged, k_rope))

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Tells the layer where its planes lie in a page; needed once before the first call."""
        if not self.codec.is_raw:
            shape, norm = self.shape, self.kv_norm
            latent = Latent(shape.kv_rank, shape.rope_dim, norm.weight, norm.eps, self.cos_sin, self.scale)
            self.pages = self.codec.latent_pages(layout, layer, latent)
            return
        latent, k_rope = layout.paged(layer, "latent"), layout.paged(layer, "k_rope")
        page_size, rank = latent.plane.shape
        rope_dim, size = k_rope.plane.shape[1], latent.plane.dtype.itemsize
        self.planes = ops.KVPlanes(
            k_offset=latent.offset, v_offset=latent.offset, rope_offset=k_rope.offset, page_bytes=layout.page_bytes,
            page_size=page_size, token_stride=rank * size, head_stride=0, rope_stride=rope_dim * size, kv_heads=1,
            head_dim=rank, value_dim=rank, rope_dim=rope_dim, dtype=latent.plane.dtype,
        )  # fmt: skip

    @property
    def is_recordable(self) -> bool:
        """Whether a decode step of this layer may stand in a CUDA graph."""
        return self.codec.is_raw or self.pages.is_recordable

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        heads, shape = self.num_heads, self.shape
        down = self.down(x)
        q, kv = down.split((down.shape[1] - shape.kv_rank - shape.rope_dim, shape.kv_rank + shape.rope_dim), dim=1)
        if self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        nope, rope = q.split((heads * shape.nope_dim, heads * shape.rope_dim), dim=1)
        nope, rope = nope.unflatten(1, (heads, -1)), rope.unflatten(1, (heads, -1))
        if not self.codec.is_raw:
            absorbed = ops.head_linear(nope, self.w_uk)
            latents = self.pages.attend(absorbed, rope, kv, store.pool, batch)
            return self.out(ops.head_linear(latents, self.w_uv).flatten(1))
        ops.store_latent(rope, kv, self.kv_norm.weight, self.kv_norm.eps, self.cos_sin, store.pool, self.planes, batch)
        expanding = self._expanding(batch)
        if not expanding:
            return self.out(self._absorbed(nope, rope, store, batch))
        attended = x.new_empty(x.shape[0], heads * shape.value_dim)
        others = [request for request in range(batch.num_requests) if request not in expanding]
        if others:
            rows, part = batch.select(others)
            attended[rows] = self._absorbed(nope[rows], rope[rows], store, part)
        for request in expanding:
            rows, part = batch.select([request])
            attended[rows] = self._expanded(nope[rows], rope[rows], store, part)
        return self.out(attended)

    def _absorbed(self, nope: torch.Tensor, rope: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        q = torch.cat((ops.head_linear(nope, self.w_uk), rope), dim=-1)
        latents = ops.paged_attention(q, store.pool, self.planes, batch, self.scale)
        return ops.head_linear(latents.unflatten(1, (self.num_heads, -1)), self.w_uv).flatten(1)

    def _expanded(self, nope: torch.Tensor, rope: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        """One request: expands all latents that its rows see into one scratch page of its own, and attends over that.

        scratch   [tokens, heads * (nope_dim + value_dim) + rope_dim]: what the heads share stands at the end of a row
        """
        shape, planes, heads = self.shape, self.planes, self.num_heads
        length = int(batch.positions[-1]) + 1
        pages = batch.page_tables[0, : -(-length // planes.page_size)].long()
        latent, k_rope = (part.to(nope.dtype) for part in ops.read_latents(store.pool, planes, pages, length))
        scratch = torch.cat((self.expand(latent), k_rope), dim=1)
        size, each = scratch.element_size(), shape.nope_dim + shape.value_dim
        own = ops.KVPlanes(
            k_offset=0, v_offset=shape.nope_dim * size, rope_offset=heads * each * size, page_bytes=scratch.nbytes,
            page_size=length, token_stride=scratch.shape[1] * size, head_stride=each * size,
            rope_stride=scratch.shape[1] * size, kv_heads=heads, head_dim=shape.nope_dim, value_dim=shape.value_dim,
            rope_dim=shape.rope_dim, dtype=scratch.dtype,
        )  # fmt: skip
        alone = replace(batch, page_tables=torch.zeros_like(batch.page_tables[:, :1]), page_size=length)
        pool = scratch.view(torch.uint8).view(1, -1)
        return ops.paged_attention(torch.cat((nope, rope), dim=-1), pool, own, alone, self.scale)

    def _expanding(self, batch: Batch) -> list[int]:
        """The requests of a step for which expanding is cheaper; none in a step that only decodes."""
        if self.expand is None or batch.num_rows == batch.num_requests:
            return []
        starts = batch.request_starts.tolist()
        first = batch.positions[batch.request_starts[:-1].long()].tolist()
        counts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        return [i for i, count in enumerate(counts) if expands(self.shape, first[i], count)]


def expands(shape: MLAConfig, cached: int, rows: int) -> bool:
    """Whether `rows` new rows over `cached` tokens cost fewer multiply-adds when latents are expanded.

    For each head, with R = kv_rank, n = nope_dim, r = rope_dim, v = value_dim, T = cached + rows tokens and
    P = rows * (cached + rows / 2) pairs of a query and a key that it sees:

        expanded    T * R * (n + v)  to expand        + P * ((n + r) + v)  to attend
        absorbed    rows * R * (n + v)  to absorb     + P * ((R + r) + R)  to attend

    Expanding wins where   cached * R * (n + v) < P * (2 R - n - v):   always without a cached prefix, never for one
    row over a long one. DeepSeek-V3 turns at 171 rows over a long prefix.
    """
    pairs = rows * (cached + rows / 2)
    inner = shape.nope_dim + shape.value_dim
    return cached * shape.kv_rank * inner < pairs * (2 * shape.kv_rank - inner)
