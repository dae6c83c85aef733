"""The raw codec: keys and values in the model's own dtype, one plane each. Lossless, and the measure of the others."""

from __future__ import annotations

import torch

from nanokv.core.errors import ConfigError
from nanokv.core.spec import PageLayout, Plane
from nanokv.kernels.ops import KVPlanes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RawCodec:
    """K and V as they are computed, rounded to `dtype`. Raises ConfigError for a dtype the kernels cannot read."""

    name = "raw"

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            allowed = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
            raise ConfigError(f"dtype={str(dtype).removeprefix('torch.')}: codec raw writes {allowed}")
        self.dtype = dtype

    def planes(self, kv_heads: int, head_dim: int, page_size: int) -> tuple[Plane, ...]:
        """The planes "k" and "v" of one attention layer, each [kv_heads, page_size, head_dim]."""
        shape = (kv_heads, page_size, head_dim)
        return Plane("k", shape, self.dtype, token_axis=1), Plane("v", shape, self.dtype, token_axis=1)

    def bind(self, layout: PageLayout, layer: int) -> KVPlanes:
        """Where the planes of `layer` lie in a page. Raises KeyError where that layer keeps no "k" and "v"."""
        k, v = layout.paged(layer, "k"), layout.paged(layer, "v")
        kv_heads, page_size, head_dim = k.plane.shape
        token_stride = head_dim * k.plane.dtype.itemsize
        return KVPlanes(
            k_offset=k.offset, v_offset=v.offset, tail_offset=0, page_bytes=layout.page_bytes, page_size=page_size,
            token_stride=token_stride, head_stride=page_size * token_stride, tail_stride=0, kv_heads=kv_heads,
            head_dim=head_dim, value_dim=head_dim, tail_dim=0, dtype=k.plane.dtype,
        )  # fmt: skip
