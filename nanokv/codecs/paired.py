"""PairedCodec: keys in one side, values in another. A token is written when it comes, and depends on no other."""

from __future__ import annotations

import torch

from nanokv.codecs.latents import Latent, LatentPages
from nanokv.codecs.pages import AttentionPages, Heads
from nanokv.codecs.side import Side
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout


class PairedCodec:
    """A codec of two sides.

    name    as the user gave it
    dtype   of what is not coded
    exact   see pages.py
    """

    expands_latents = False

    def __init__(self, name: str, k: Side, v: Side, dtype: torch.dtype, exact: bool) -> None:
        self.name = name
        self.dtype = dtype
        self._k, self._v = k, v
        self._exact = exact

    def at(self, layer: int) -> PairedCodec:
        return self

    def spec(self, kv_heads: int, head_dim: int, page_size: int) -> LayerSpec:
        """What an attention layer keeps. Raises ConfigError for a head_dim that does not fit."""
        self._check(head_dim, "head_dim")
        planes = (
            side.planes(prefix, kv_heads, head_dim, page_size) for side, prefix in ((self._k, "k"), (self._v, "v"))
        )
        return LayerSpec(paged=sum(planes, ()))

    def pages(self, layout: PageLayout, layer: int, heads: Heads) -> AttentionPages:
        """The pages of an attention layer."""
        return AttentionPages(self._k, self._v, layout, layer, heads, self._exact)

    def latent_spec(self, rank: int, page_size: int) -> LayerSpec:
        """What a layer of multi-head latent attention keeps of its latents: they take the side of keys.

        Raises ConfigError for a rank that does not fit, and for sides that cannot be both key and value.
        """
        if "/" in self.name or self._k.is_sketch:
            raise ConfigError(
                f"codec={self.name!r}: multi-head latent attention keeps one latent for keys and values; allowed is "
                "one name, other than qjl and kivi"
            )
        self._check(rank, "kv_rank")
        return LayerSpec(paged=self._k.planes("latent", 1, rank, page_size))

    def latent_pages(self, layout: PageLayout, layer: int, latent: Latent) -> LatentPages:
        """The pages of a layer of multi-head latent attention."""
        return LatentPages(self._k, layout, layer, latent, self._exact)

    def _check(self, dim: int, what: str) -> None:
        multiple = max(self._k.multiple, self._v.multiple)
        if dim % multiple:
            raise ConfigError(
                f"codec={self.name!r}: {what}={dim} of this model; allowed are multiples of {multiple}, or codec raw"
            )
