"""RawCodec: keys and values in the model's own dtype, one plane each. Lossless, the reference of the other codecs."""

from __future__ import annotations

import torch

from nanokv.codecs.latents import Latent, RawLatentPages
from nanokv.codecs.pages import Heads
from nanokv.codecs.quantizer import array_of
from nanokv.core.batch import Batch
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout, Plane, PlaneSlot
from nanokv.kernels.planes import KVPlanes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RawCodec:
    """Keys and values rounded to `dtype`. Raises ConfigError for a dtype the kernels cannot read."""

    name = "raw"

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            allowed = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
            raise ConfigError(f"dtype={str(dtype).removeprefix('torch.')}: codec raw writes {allowed}")
        self.dtype = dtype

    @property
    def expands_latents(self) -> bool:
        """Whether latents may be expanded. In float32 the bits of a row must not depend on the form it takes."""
        return self.dtype != torch.float32

    def at(self, layer: int) -> RawCodec:
        """The codec of a layer: every layer has this one."""
        return self

    def planes(self, kv_heads: int, head_dim: int, page_size: int) -> tuple[Plane, ...]:
        """The planes "k" and "v" of one attention layer, each [kv_heads, page_size, head_dim]."""
        shape = (kv_heads, page_size, head_dim)
        return Plane("k", shape, self.dtype, token_axis=1), Plane("v", shape, self.dtype, token_axis=1)

    def spec(self, kv_heads: int, head_dim: int, page_size: int) -> LayerSpec:
        """The planes of an attention layer."""
        return LayerSpec(paged=self.planes(kv_heads, head_dim, page_size))

    def latent_spec(self, rank: int, page_size: int) -> LayerSpec:
        """The plane of the latents of multi-head latent attention, [page_size, rank]."""
        return LayerSpec(paged=(Plane("latent", (page_size, rank), self.dtype, token_axis=0),))

    def bind(self, layout: PageLayout, layer: int) -> KVPlanes:
        """Where the planes of `layer` lie in a page. Raises KeyError where the layer keeps no "k" and "v"."""
        k, v = layout.paged(layer, "k"), layout.paged(layer, "v")
        kv_heads, page_size, head_dim = k.plane.shape
        token_stride = head_dim * k.plane.dtype.itemsize
        return KVPlanes(
            k_offset=k.offset, v_offset=v.offset, rope_offset=0, page_bytes=layout.page_bytes, page_size=page_size,
            token_stride=token_stride, head_stride=page_size * token_stride, rope_stride=0, kv_heads=kv_heads,
            head_dim=head_dim, value_dim=head_dim, rope_dim=0, dtype=k.plane.dtype,
        )  # fmt: skip

    def pages(self, layout: PageLayout, layer: int, heads: Heads) -> RawPages:
        """The pages of an attention layer."""
        return RawPages(self.bind(layout, layer), [layout.paged(layer, name) for name in "kv"], heads)

    def latent_pages(self, layout: PageLayout, layer: int, latent: Latent) -> RawLatentPages:
        """The pages of a layer of multi-head latent attention."""
        return RawLatentPages(layout, layer, latent)


class RawPages:
    """Keys and values of one layer, read in place."""

    key_mean = None
    is_recordable = True

    def __init__(self, planes: KVPlanes, slots: list[PlaneSlot], heads: Heads) -> None:
        self.planes = planes
        self._slots = slots
        self._heads = heads

    def attend(self, qkv: torch.Tensor, pool: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As AttentionPages.attend."""
        heads = self._heads
        heads.ops.rope_and_store(qkv, heads.cos_sin, pool, self.planes, batch, heads.num_heads, heads.norms)
        q = qkv[:, : heads.num_heads * heads.head_dim].unflatten(1, (heads.num_heads, heads.head_dim))
        return heads.ops.paged_attention(q, pool, self.planes, batch, heads.scale)

    def vectors(self, pool: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As AttentionPages.vectors."""
        return tuple(array_of(pool, slot)[pages].float() for slot in self._slots)
