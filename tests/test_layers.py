"""Layers against plain torch: rotary tables against those of transformers, other layers against their formulas."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import Sequence, make_batch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanokv.cache.store import CacheStore
from nanokv.codecs import RawCodec
from nanokv.codecs.pages import Heads
from nanokv.core.spec import PageLayout
from nanokv.kernels.ops import AUTO
from nanokv.layers.attention import Attention
from nanokv.layers.linear import Embedding, Linear
from nanokv.layers.mlp import MLP
from nanokv.layers.norm import RMSNorm
from nanokv.layers.rotary import RopeConfig, cos_sin_table

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeConfig(64, 1e5), {"rope_type": "default"}),
        (RopeConfig(64, 1e4, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (RopeConfig(64, 5e5, "llama3", 8.0, 1.0, 4.0, 64), {"rope_type": "llama3", **LLAMA3}),
    ],
    ids=["default", "linear", "llama3"],
)
def test_the_rope_table_matches_transformers(rope, parameters):
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": rope.theta, **parameters},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(512)[None])
    table = cos_sin_table(rope, 512)
    assert table.dtype == torch.float32 and table.shape == (512, 64)
    torch.testing.assert_close(table, torch.cat((cos[0, :, :32], sin[0, :, :32]), dim=1), rtol=0, atol=1e-4)


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones():
    plain = cos_sin_table(RopeConfig(64, 5e5), 2)[1]
    scaled = cos_sin_table(RopeConfig(64, 5e5, "llama3", 8.0, 1.0, 4.0, 64), 2)[1]
    angles = torch.atan2(scaled[32:], scaled[:32]) / torch.atan2(plain[32:], plain[:32])
    assert angles[0] == 1 and angles[-1] == pytest.approx(1 / 8, rel=1e-4)
    assert (angles.diff() <= 1e-6).all(), "the ratio falls monotonically"


def test_linear_multiplies_and_adds_its_bias():
    x, weight, bias = normal(5, 24), normal(40, 24, seed=1), normal(40, seed=2)
    torch.testing.assert_close(Linear(weight, torch.float32, AUTO)(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Linear(weight, torch.float32, AUTO, bias)(x), x @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_an_embedding_copies_its_rows_in_the_activation_dtype():
    table = normal(10, 8).bfloat16()
    rows = Embedding(table, torch.float32)(torch.tensor([3, 3, 9]))
    assert torch.equal(rows, table[[3, 3, 9]].float())
    same = Embedding(table, torch.bfloat16)(torch.tensor([0]))
    same.zero_()
    assert table[0].abs().sum() > 0, "the residual stream is written in place, so rows must be copies"


def test_norm_adds_to_the_residual_in_place():
    x, residual, weight = normal(3, 16), normal(3, 16, seed=1), normal(16, seed=2)
    total = x + residual
    expected = F.rms_norm(total, (16,), weight, 1e-5)
    norm = RMSNorm(weight, 1e-5, AUTO)
    torch.testing.assert_close(norm(total.clone()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.add(x, residual), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(residual, total)


def test_mlp_is_swiglu_with_gate_before_up():
    x, gate, up, down = normal(4, 16), normal(24, 16, seed=1), normal(24, 16, seed=2), normal(16, 24, seed=3)
    mlp = MLP(Linear(torch.cat((gate, up)), torch.float32, AUTO), Linear(down, torch.float32, AUTO), AUTO)
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=1e-4, atol=1e-4)


def test_attention_caches_k_and_v_and_no_state_per_sequence():
    spec = RawCodec(torch.bfloat16).spec(kv_heads=3, head_dim=64, page_size=16)
    assert [(plane.name, plane.shape) for plane in spec.paged] == [("k", (3, 16, 64)), ("v", (3, 16, 64))]
    assert spec.bytes_per_token == 2 * 3 * 64 * 2 and spec.bytes_per_sequence == 0


def test_a_token_attends_to_its_own_request_up_to_itself():
    heads, kv_heads, dim, page_size = 4, 2, 16, 4
    codec = RawCodec(torch.float32)
    width = (heads + 2 * kv_heads) * dim
    projection, out = normal(width, 32, seed=1), normal(32, heads * dim, seed=2)
    no_turn = torch.cat((torch.ones(64, dim // 2), torch.zeros(64, dim // 2)), dim=1)
    qkv, back = Linear(projection, torch.float32, AUTO), Linear(out, torch.float32, AUTO)
    attention = Attention(qkv, back, codec, Heads(heads, kv_heads, dim, dim**-0.5, no_turn))
    layout = PageLayout([codec.spec(kv_heads, dim, page_size)] * 2, page_size)
    attention.bind(layout, 1)
    store = CacheStore(layout, 8)
    pool = store.pages.data
    x = normal(9, 32)
    sequences = [Sequence([0] * 6, [5, 2]), Sequence([0] * 3, [7])]
    got = attention(x, store, make_batch([(sequences[0], 6), (sequences[1], 3)], page_size))

    for rows in (slice(0, 6), slice(6, 9)):
        q, k, v = (x[rows] @ projection.T).split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        q, k, v = (part.unflatten(1, (-1, dim)).transpose(0, 1) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
        expected = mixed[0].transpose(0, 1).flatten(1) @ out.T
        torch.testing.assert_close(got[rows], expected, rtol=1e-3, atol=1e-3)
    assert not pool[:, : layout.paged(1, "k").offset].any(), "the planes of the other layer are unchanged"
    assert not pool[[0, 1, 3, 4, 6]].any(), "unused pages are unchanged"
