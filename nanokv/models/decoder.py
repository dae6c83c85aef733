"""Decoder: the stack of blocks that every family shares, in one call or stepped layer by layer.

    x, residual = decoder.embed(batch)
    for layer in decoder.layers:
        x = layer(x, residual, store, batch)
    logits = decoder.logits(x, residual, batch)

The stream of a row is x + residual: what the last sublayer gave, and the sum before it. The addition waits for the
next norm, which does both in one pass over memory. A caller that steps the layers may read, drop or replace rows
between two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import Codec
from nanokv.codecs.pages import Centre
from nanokv.core.batch import Batch
from nanokv.core.errors import CacheError
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.layers.attention import Attention
from nanokv.layers.deltanet import GatedDeltaNet
from nanokv.layers.linear import Embedding, Linear, TiedEmbedding
from nanokv.layers.mla import MLA
from nanokv.layers.norm import RMSNorm
from nanokv.models.config import GATED_DELTA, ModelConfig


def layer_specs(config: ModelConfig, codec: Codec, page_size: int) -> list[LayerSpec]:
    """What each layer of the model keeps, known without its weights (`nanokv size`)."""

    def spec(layer: int, kind: str) -> LayerSpec:
        if kind == GATED_DELTA:
            return GatedDeltaNet.spec(config.delta, codec.dtype)
        own = codec.at(layer)
        if config.mla is not None:
            return MLA.spec(own, config.mla.kv_rank, config.mla.rope_dim, page_size)
        return Attention.spec(own, config.num_kv_heads, config.head_dim, page_size)

    return [spec(layer, kind) for layer, kind in enumerate(config.layer_types)]


class Mixer(Protocol):
    """The half of a block that looks at other tokens, and so the half that keeps something."""

    @property
    def is_recordable(self) -> bool: ...

    def bind(self, layout: PageLayout, layer: int) -> None: ...

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor: ...


FeedForward = Callable[[torch.Tensor], torch.Tensor]
"""The half of a block that looks at one token at a time: MLP or MoE, [rows, width] -> [rows, width]."""


class Block:
    """A pre-norm block: mix tokens, then transform each.

    Call   x, residual [rows, width], activation dtype -> the new x; residual is updated IN PLACE
    """

    def __init__(self, input_norm: RMSNorm, mixer: Mixer, mlp_norm: RMSNorm, mlp: FeedForward) -> None:
        self.input_norm = input_norm
        self.mixer = mixer
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        x = self.mixer(self.input_norm.add(x, residual), store, batch)
        return self.mlp(self.mlp_norm.add(x, residual))


class Decoder:
    """A language model over pages. `bind` a layout before the first step.

    config   ModelConfig
    specs    LayerSpec of each layer, for PageLayout
    layers   list of Block
    """

    def __init__(
        self,
        config: ModelConfig,
        specs: list[LayerSpec],
        embedding: Embedding | TiedEmbedding,
        layers: list[Block],
        norm: RMSNorm,
        head: Linear,
    ) -> None:
        self.config = config
        self.specs = specs
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head

    def bind(self, layout: PageLayout) -> None:
        """Gives each layer the offsets of its planes. Raises CacheError for the layout of another model."""
        sizes = {spec.page_size for spec in self.specs if spec.paged}
        if layout.specs != self.specs or not sizes <= {layout.page_size}:
            raise CacheError("the page layout is that of another model, codec or page size than the decoder's")
        for index, layer in enumerate(self.layers):
            layer.mixer.bind(layout, index)

    @property
    def is_recordable(self) -> bool:
        """Whether a CUDA graph can record a decode step. Needs a bound decoder."""
        return self.norm.ops.are_recordable and all(layer.mixer.is_recordable for layer in self.layers)

    def centres(self) -> list[Centre]:
        """Of the layers whose codec can take a mean off keys; once the decoder is bound."""
        mixers = [layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention)]
        return [mixer.centre for mixer in mixers if mixer.centre is not None]

    def embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream before the first layer: x and residual, each [rows, width]."""
        x = self.embedding(batch.token_ids)
        return x, torch.zeros_like(x)

    def logits(self, x: torch.Tensor, residual: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits of batch.logit_rows after the last layer: float32 [wanted, vocab]."""
        rows = batch.logit_rows
        return self.head(self.norm.add(x[rows], residual[rows])).float()

    def forward(self, batch: Batch, store: CacheStore) -> torch.Tensor:
        """One step: writes what every row adds into pages and states, returns float32 [wanted, vocab]."""
        x, residual = self.embed(batch)
        for layer in self.layers:
            x = layer(x, residual, store, batch)
        return self.logits(x, residual, batch)
