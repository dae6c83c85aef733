"""Attention: grouped-query attention over the pages of each row's own request. Knows no page layout: the codec does."""

from __future__ import annotations

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs.raw import RawCodec
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import ops
from nanokv.layers.linear import Linear


class Attention:
    """Causal softmax attention with rotary positions (Vaswani et al. 2017; Su et al. 2021; Ainslie et al. 2023).

    qkv        Linear to (num_heads + 2 * kv_heads) * head_dim: the rows of q, then k, then v, one product for the
               three; num_heads * head_dim more where the result is gated
    out        Linear from num_heads * head_dim back to the width of x
    cos_sin    float32 [positions, rotary dims], shared by the layers
    codec      how k and v are written into a page
    scale      what scores are multiplied with
    norms      HeadNorms of q and k, or None
    Call       x [rows, width], store, batch -> [rows, width]; writes the k and v of each row to the row's slot first,
               so that a row sees itself and the rows before it in the same step
    """

    planes: ops.KVPlanes

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        cos_sin: torch.Tensor,
        codec: RawCodec,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        norms: ops.HeadNorms | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.cos_sin = cos_sin
        self.codec = codec
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.qkv_width = (num_heads + 2 * kv_heads) * head_dim
        self.scale = scale
        self.norms = norms

    @staticmethod
    def spec(codec: RawCodec, kv_heads: int, head_dim: int, page_size: int) -> LayerSpec:
        """What such a layer keeps: the codec's planes for k and v, nothing per sequence."""
        return LayerSpec(paged=codec.planes(kv_heads, head_dim, page_size))

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Tells the layer where its planes lie in a page; needed once before the first call."""
        self.planes = self.codec.bind(layout, layer)

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        qkv = self.qkv(x)
        qkv, gate = qkv[:, : self.qkv_width], qkv[:, self.qkv_width :]
        ops.rope_and_store(qkv, self.cos_sin, store.pool, self.planes, batch, self.num_heads, self.norms)
        q = qkv[:, : self.num_heads * self.head_dim].unflatten(1, (self.num_heads, self.head_dim))
        attended = ops.paged_attention(q, store.pool, self.planes, batch, self.scale)
        return self.out(ops.sigmoid_mul(attended, gate) if gate.shape[1] else attended)
