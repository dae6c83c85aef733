"""PairedCodec: one quantizer for keys, another for values. Each token is written at once, and depends on no other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.codecs.latents import Latent, LatentPages
from nanokv.codecs.pages import AttentionPages, Heads
from nanokv.codecs.quantizer import Quantizer
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout


@dataclass(frozen=True)
class PairedCodec:
    """A codec of two quantizers.

    name    as the user gave it
    k, v    Quantizer of keys and of values
    dtype   of unquantized numbers: the rotated keys of latent attention
    exact   see pages.py
    """

    name: str
    k: Quantizer
    v: Quantizer
    dtype: torch.dtype
    exact: bool

    expands_latents = False

    def at(self, layer: int) -> PairedCodec:
        """The codec of a layer: every layer has this one."""
        return self

    def spec(self, kv_heads: int, head_dim: int, page_size: int) -> LayerSpec:
        """The planes of an attention layer. Raises ConfigError for a head_dim that does not fit."""
        self._check(head_dim, "head_dim")
        sizes = kv_heads, head_dim, page_size
        return LayerSpec(paged=(*self.k.planes("k", *sizes), *self.v.planes("v", *sizes)))

    def pages(self, layout: PageLayout, layer: int, heads: Heads) -> AttentionPages:
        """The pages of an attention layer."""
        return AttentionPages(self.k, self.v, layout, layer, heads, self.exact)

    def latent_spec(self, rank: int, page_size: int) -> LayerSpec:
        """The planes of the latents of multi-head latent attention, written by the quantizer of keys.

        Raises ConfigError for a rank that does not fit, and for quantizers that cannot be both key and value.
        """
        if "/" in self.name or self.k.is_sketch:
            raise ConfigError(
                f"codec={self.name!r}: multi-head latent attention keeps one latent for keys and values; allowed is "
                "one name, other than qjl and kivi"
            )
        self._check(rank, "kv_rank")
        return LayerSpec(paged=self.k.planes("latent", 1, rank, page_size))

    def latent_pages(self, layout: PageLayout, layer: int, latent: Latent) -> LatentPages:
        """The pages of a layer of multi-head latent attention."""
        return LatentPages(self.k, layout, layer, latent, self.exact)

    def _check(self, dim: int, name: str) -> None:
        multiple = max(self.k.multiple, self.v.multiple)
        if dim % multiple:
            raise ConfigError(
                f"codec={self.name!r}: {name}={dim} of this model; allowed are multiples of {multiple}, or codec raw"
            )
