"""Grouped-query attention over the pages of each row's own request. The codec alone knows the layout of a page."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import LayerCodec
from nanokv.codecs.pages import Heads
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.layers.linear import Linear


@dataclass(eq=False)
class Attention:
    """Causal softmax attention with rotary positions (Vaswani et al. 2017; Su et al. 2021; Ainslie et al. 2023).

    qkv        Linear to (num_heads + 2 * kv_heads) * head_dim: q, k and v in one product, in this order; followed by
               num_heads * head_dim rows of an output gate in models that have one
    out        Linear from num_heads * head_dim back to the width of x
    codec      LayerCodec: writes k and v into pages and reads them
    heads      Heads: their number and width, positions and norms
    Call       x [rows, width], store, batch -> [rows, width]. The k and v of all rows are written first, so a row
               attends to itself and to the earlier rows of its request in the same step
    """

    qkv: Linear
    out: Linear
    codec: LayerCodec
    heads: Heads

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Gives the layer the place of its planes in a page; needed once before the first call."""
        self.pages = self.codec.pages(layout, layer, self.heads)
        self.is_recordable = self.pages.is_recordable

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        heads, qkv = self.heads, self.qkv(x)
        width = (heads.num_heads + 2 * heads.kv_heads) * heads.head_dim
        qkv, gate = qkv[:, :width], qkv[:, width:]
        attended = self.pages.attend(qkv, store.pages.data, store.states.data, batch)
        return self.out(heads.ops.sigmoid_mul(attended, gate) if gate.shape[1] else attended)
