"""The raw codec: keys and values in the model's own dtype, one plane each. Lossless, and the measure of the others."""

from __future__ import annotations

import torch

from nanokv.codecs.pages import Heads
from nanokv.core.batch import Batch
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels import ops
from nanokv.kernels.ops import KVPlanes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RawCodec:
    """K and V as they are computed, rounded to `dtype`. Raises ConfigError for a dtype the kernels cannot read."""

    name = "raw"
    is_raw = True

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            allowed = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
            raise ConfigError(f"dtype={str(dtype).removeprefix('torch.')}: codec raw writes {allowed}")
        self.dtype = dtype

    def at(self, layer: int) -> RawCodec:
        return self

    def planes(self, kv_heads: int, head_dim: int, page_size: int) -> tuple[Plane, ...]:
        """The planes "k" and "v" of one attention layer, each [kv_heads, page_size, head_dim]."""
        shape = (kv_heads, page_size, head_dim)
        return Plane("k", shape, self.dtype, token_axis=1), Plane("v", shape, self.dtype, token_axis=1)

    def spec(self, kv_heads: int, head_dim: int, page_size: int) -> LayerSpec:
        """What an attention layer keeps."""
        return LayerSpec(paged=self.planes(kv_heads, head_dim, page_size))

    def latent_spec(self, rank: int, page_size: int) -> LayerSpec:
        """What a layer of multi-head latent attention keeps of its latents."""
        return LayerSpec(paged=(Plane("latent", (page_size, rank), self.dtype, token_axis=0),))

    def bind(self, layout: PageLayout, layer: int) -> KVPlanes:
        """Where the planes of `layer` lie in a page. Raises KeyError where that layer keeps no "k" and "v"."""
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
        return RawPages(self.bind(layout, layer), heads)


class RawPages:
    """Keys and values of one layer, read where they stand."""

    centre = None
    is_recordable = True

    def __init__(self, planes: KVPlanes, heads: Heads) -> None:
        self.planes = planes
        self._heads = heads

    def attend(self, qkv: torch.Tensor, pool: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As AttentionPages.attend."""
        heads = self._heads
        ops.rope_and_store(qkv, heads.cos_sin, pool, self.planes, batch, heads.num_heads, heads.norms)
        q = qkv[:, : heads.num_heads * heads.head_dim].unflatten(1, (heads.num_heads, heads.head_dim))
        return ops.paged_attention(q, pool, self.planes, batch, heads.scale)
