"""Multi-head latent attention: all heads share one latent and one rotated key a token. Only these two are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import LatentCodec, LayerCodec
from nanokv.codecs.latents import Latent, LatentPages, RawLatentPages
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels.linear import PackedHeadLinear
from nanokv.kernels.ops import Ops
from nanokv.layers.linear import Linear
from nanokv.layers.norm import RMSNorm


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2): a page keeps one latent and one rotated key of each token."""

    q_rank: int | None
    """q_lora_rank: width of the low-rank projection of queries; None for a single projection."""
    kv_rank: int
    """kv_lora_rank: width of the latent."""
    nope_dim: int
    """qk_nope_head_dim: part of a head's query and key without positions."""
    rope_dim: int
    """qk_rope_head_dim: part with rotary positions; all heads share its key."""
    value_dim: int
    """v_head_dim"""
    interleaved: bool
    """rope_interleave: whether the checkpoint rotates dims (0, 1), (2, 3), ... and not (0, n/2), (1, n/2 + 1), ..."""


@dataclass(eq=False)
class MLA:
    """Attention whose keys and values are products of a latent c (DeepSeek-AI 2024):

        key of head h     [W_UK_h c | k_rope]          value of head h     W_UV_h c

    There are two ways to the same result. Expanded: compute the keys and values of all tokens, then attend as usual.
    Absorbed: move W_UK into the query and W_UV behind the sum,

        q_h . W_UK_h c = (W_UK_h^T q_h) . c            sum_t p_t W_UV_h c_t = W_UV_h (sum_t p_t c_t)

    so that all heads read the latents themselves: one KV head, K = [c | k_rope], V = c. `expands` finds the cheaper
    one.

    down      Linear to [q | latent | k_rope]; q is the input of q_up, or the queries themselves without q_up
    q_norm    RMSNorm before q_up, or None
    q_up      Linear to the queries, or None; queries are all heads' nope_dim, then all heads' rope_dim
    kv_norm   RMSNorm of the latent
    w_uk      PackedHeadLinear, heads of [rank, nope_dim]
    w_uv      PackedHeadLinear, heads of [value_dim, rank]
    expand    Linear from the latent to [nope_dim | value_dim] of each head, or None: then every row is absorbed
    codec     how latents are written into a page
    scale     factor of the scores
    ops       Ops
    Call      x [rows, width], store, batch -> [rows, width]
    """

    down: Linear
    q_norm: RMSNorm | None
    q_up: Linear | None
    kv_norm: RMSNorm
    w_uk: PackedHeadLinear
    w_uv: PackedHeadLinear
    expand: Linear | None
    out: Linear
    cos_sin: torch.Tensor
    codec: LatentCodec
    num_heads: int
    shape: MLAConfig
    scale: float
    ops: Ops
    pages: LatentPages | RawLatentPages = field(init=False)

    @staticmethod
    def spec(codec: LayerCodec, kv_rank: int, rope_dim: int, page_size: int) -> LayerSpec:
        """The planes of such a layer: the latent and the rotated key of each token, once for all heads."""
        k_rope = Plane("k_rope", (page_size, rope_dim), codec.dtype, token_axis=0)
        return LayerSpec(paged=(*codec.latent_spec(kv_rank, page_size).paged, k_rope))

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Tells the layer where its planes lie in a page; needed once before the first call."""
        shape, norm = self.shape, self.kv_norm
        latent = Latent(
            shape.kv_rank, shape.rope_dim, norm.weight, norm.eps, self.cos_sin, self.scale, self.ops, self.w_uk,
            self.w_uv, self.expand, lambda cached, rows: expands(shape, cached, rows),
        )  # fmt: skip
        self.pages = self.codec.latent_pages(layout, layer, latent)
        self.is_recordable = self.pages.is_recordable

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        heads, shape = self.num_heads, self.shape
        down = self.down(x)
        q, kv = down.split((down.shape[1] - shape.kv_rank - shape.rope_dim, shape.kv_rank + shape.rope_dim), dim=1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        nope, rope = q.split((heads * shape.nope_dim, heads * shape.rope_dim), dim=1)
        nope, rope = nope.unflatten(1, (heads, -1)), rope.unflatten(1, (heads, -1))
        return self.out(self.pages.attend(nope, rope, kv, store.pages.data, batch))


def expands(shape: MLAConfig, cached: int, rows: int) -> bool:
    """Whether `rows` new rows over `cached` tokens take fewer multiply-adds with expanded latents.

    For each head, with R = kv_rank, n = nope_dim, r = rope_dim, v = value_dim, T = cached + rows tokens and
    P = rows * (cached + rows / 2) pairs of a query and a key visible to it:

        expanded    T * R * (n + v)  to expand        + P * ((n + r) + v)  to attend
        absorbed    rows * R * (n + v)  to absorb     + P * ((R + r) + R)  to attend

    Expanding is cheaper where   cached * R * (n + v) < P * (2 R - n - v):   always without a cached prefix, never for
    one row over a long one. For DeepSeek-V3 and a long prefix, from 171 rows.
    """
    pairs = rows * (cached + rows / 2)
    inner = shape.nope_dim + shape.value_dim
    return cached * shape.kv_rank * inner < pairs * (2 * shape.kv_rank - inner)
