"""Attention: grouped-query attention over the pages of each row's own request. Knows no page layout: the codec does."""

from __future__ import annotations

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import Codec
from nanokv.codecs.pages import Heads
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

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        cos_sin: torch.Tensor,
        codec: Codec,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        norms: ops.HeadNorms | None = None,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.codec = codec
        self.heads = Heads(num_heads, kv_heads, head_dim, scale, cos_sin, norms)
        self.qkv_width = (num_heads + 2 * kv_heads) * head_dim

    @staticmethod
    def spec(codec: Codec, kv_heads: int, head_dim: int, page_size: int) -> LayerSpec:
        """What such a layer keeps: what the codec makes of its keys and values."""
        return codec.spec(kv_heads, head_dim, page_size)

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Tells the layer where its planes lie in a page; needed once before the first call."""
        self.pages = self.codec.pages(layout, layer, self.heads)

    @property
    def is_recordable(self) -> bool:
        """Whether a decode step of this layer may stand in a CUDA graph."""
        return self.pages.is_recordable

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        qkv = self.qkv(x)
        qkv, gate = qkv[:, : self.qkv_width], qkv[:, self.qkv_width :]
        attended = self.pages.attend(qkv, store.pages.data, store.states.data, batch)
        return self.out(ops.sigmoid_mul(attended, gate) if gate.shape[1] else attended)
