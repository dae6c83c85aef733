"""Decoder: the stack of blocks that every family shares.

The residual stream of a row is x + residual: the result of the last sublayer, and the sum before it. The next norm does
the addition, in one pass over memory with its own work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import Codec
from nanokv.codecs.key_mean import KeyMean
from nanokv.core.batch import Batch
from nanokv.core.errors import CacheError
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.layers.attention import Attention
from nanokv.layers.deltanet import GatedDeltaNet
from nanokv.layers.linear import Linear
from nanokv.layers.mla import MLA
from nanokv.layers.norm import RMSNorm
from nanokv.layers.rotary import extend
from nanokv.models.config import GATED_DELTA, ModelConfig


def layer_specs(config: ModelConfig, codec: Codec, page_size: int) -> list[LayerSpec]:
    """The LayerSpec of each layer, from the config alone (`nanokv size` has no weights)."""

    def spec(layer: int, kind: str) -> LayerSpec:
        if kind == GATED_DELTA:
            assert config.delta is not None
            return GatedDeltaNet.spec(config.delta, codec.dtype)
        own = codec.at(layer)
        if config.mla is not None:
            return MLA.spec(own, config.mla.kv_rank, config.mla.rope_dim, page_size)
        return own.spec(config.num_kv_heads, config.head_dim, page_size)

    return [spec(layer, kind) for layer, kind in enumerate(config.layer_types)]


class Mixer(Protocol):
    """The half of a block that reads other tokens, and therefore the half with a cache."""

    @property
    def is_recordable(self) -> bool:
        """Whether a CUDA graph can record a decode step. Needs a bound layer."""

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Gives the layer the place of its planes; needed once before the first call."""

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        """[rows, width] -> [rows, width]; writes the rows into the layer's planes."""


FeedForward = Callable[[torch.Tensor], torch.Tensor]
"""The half of a block that computes each token by itself: MLP or MoE, [rows, width] -> [rows, width]."""

Between = Callable[[int, torch.Tensor, torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, Batch]]
"""Called after a layer with (layer, x, residual, batch); its result is the input of the next layer."""


@dataclass(eq=False)
class Block:
    """A pre-norm block: mixes tokens, then transforms each.

    Call   x, residual [rows, width], activation dtype -> the new x; residual is updated IN PLACE
    """

    input_norm: RMSNorm
    mixer: Mixer
    mlp_norm: RMSNorm
    mlp: FeedForward

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        x = self.mixer(self.input_norm.add(x, residual), store, batch)
        return self.mlp(self.mlp_norm.add(x, residual))


@dataclass(eq=False)
class Decoder:
    """A language model over pages. `bind` a layout before the first step.

    config      ModelConfig
    specs       LayerSpec of each layer, for PageLayout
    embedding   token ids -> the first x
    layers      list of Block
    norm        RMSNorm of the last residual stream
    head        Linear to the vocabulary
    cos_sin     the table of positions that all layers read; in a long context it grows with the positions in use
    """

    config: ModelConfig
    specs: list[LayerSpec]
    embedding: Callable[[torch.Tensor], torch.Tensor]
    layers: list[Block]
    norm: RMSNorm
    head: Linear
    cos_sin: torch.Tensor

    def bind(self, layout: PageLayout) -> None:
        """Gives each layer the offsets of its planes. Raises CacheError for another model's layout."""
        sizes = {spec.page_size for spec in self.specs if spec.paged}
        if layout.specs != self.specs or not sizes <= {layout.page_size}:
            raise CacheError("the page layout is that of another model, codec or page size than the decoder's")
        for index, layer in enumerate(self.layers):
            layer.mixer.bind(layout, index)

    @property
    def is_recordable(self) -> bool:
        """Whether a CUDA graph can record a decode step. Needs a bound decoder."""
        return self.norm.ops.are_recordable and all(layer.mixer.is_recordable for layer in self.layers)

    def key_means(self) -> list[KeyMean]:
        """The means of the layers whose codec can subtract one from keys; once the decoder is bound."""
        mixers = [layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention)]
        return [mixer.pages.key_mean for mixer in mixers if mixer.pages.key_mean is not None]

    def reach(self, num_positions: int) -> None:
        """Extends the table of positions, which may move, to at least `num_positions` rows."""
        extend(self.cos_sin, self.config.rope, num_positions, self.config.max_positions)

    def embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream before the first layer: x and residual, each [rows, width]."""
        if len(self.cos_sin) < self.config.max_positions:
            self.reach(int(batch.positions.max()) + 1)
        x = self.embedding(batch.token_ids)
        return x, torch.zeros_like(x)

    def logits(self, x: torch.Tensor, residual: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits of batch.logit_rows after the last layer: float32 [wanted, vocab]."""
        rows = batch.logit_rows
        return self.head(self.norm.add(x[rows], residual[rows])).float()

    def forward(self, batch: Batch, store: CacheStore, between: Between | None = None) -> torch.Tensor:
        """One step: writes the rows' keys, values and states into `store`. Returns logits, float32 [wanted, vocab].

        between   called after each layer, the last one included; None: no call. It may read rows, replace their values
                  and drop rows. Its result is the input of the next layer, and the returned batch must describe exactly
                  the returned rows: a dropped row is gone from every field, and request_starts and logit_rows count the
                  remaining rows. Later layers write nothing for a dropped row: in their planes its slot keeps the
                  previous content, which later rows of the same request read. They mark unwritable rows in the returned
                  batch alone. An exception ends the step
        """
        x, residual = self.embed(batch)
        for index, layer in enumerate(self.layers):
            x = layer(x, residual, store, batch)
            if between is not None:
                x, residual, batch = between(index, x, residual, batch)
        return self.logits(x, residual, batch)
