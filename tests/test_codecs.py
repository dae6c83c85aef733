"""The raw codec keeps the model's own numbers; unknown names and dtypes are refused."""

import pytest
import torch

from nanokv.codecs import resolve_codec
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout


def test_the_raw_codec_keeps_k_and_v_in_the_dtype_of_the_model():
    codec = resolve_codec("raw", torch.bfloat16)
    planes = codec.planes(3, 64, 16)
    assert [(plane.name, plane.shape, plane.dtype) for plane in planes] == [
        ("k", (3, 16, 64), torch.bfloat16),
        ("v", (3, 16, 64), torch.bfloat16),
    ]
    assert LayerSpec(planes).bytes_per_token == 2 * 3 * 64 * 2


def test_bind_gives_the_offsets_of_the_planes():
    codec = resolve_codec("raw", torch.float16)
    layout = PageLayout([LayerSpec(codec.planes(3, 64, 16))] * 4, 16)
    planes = codec.bind(layout, 2)
    assert (planes.k_offset, planes.v_offset, planes.page_bytes) == (4 * 6144, 5 * 6144, 8 * 6144)


def test_unknown_codec_names_and_dtypes_are_refused():
    with pytest.raises(ConfigError, match="codec='zip': allowed are raw"):
        resolve_codec("zip", torch.float32)
    with pytest.raises(ConfigError, match="int8"):
        resolve_codec("raw", torch.int8)


def test_a_layer_without_k_and_v_cannot_be_bound():
    with pytest.raises(KeyError):
        resolve_codec("raw", torch.float32).bind(PageLayout([LayerSpec()], 16), 0)
