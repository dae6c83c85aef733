"""DeepSeek-V2 and V3 (DeepSeek-AI 2024): multi-head latent attention, and experts behind a few dense layers.

kv_b_proj holds, for each head, the rows that expand the latent to a key (W_UK), then those that expand it to a value
(W_UV). It is packed twice: head by head for absorbed attention, and whole for expanded attention (layers/mla.py).
"""

from __future__ import annotations

import torch

from nanokv.codecs import Codec
from nanokv.layers.linear import Linear
from nanokv.layers.mla import MLA
from nanokv.layers.norm import RMSNorm
from nanokv.models import parts
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import Decoder
from nanokv.models.weights import Weights, join

NORM_EPS = 1e-6
"""Of the norms inside the projections. The released code has this constant and ignores the config's."""


def build(config: ModelConfig, weights: Weights, codec: Codec, page_size: int) -> Decoder:
    """The decoder. It takes its tensors from `weights`, one block after the other."""

    def mixer(layer: int, cos_sin: torch.Tensor) -> MLA:
        return _attention(weights, f"model.layers.{layer}.self_attn", config, codec.at(layer), cos_sin)

    return parts.decoder(config, weights, codec, page_size, mixer)


def _attention(weights: Weights, at: str, config: ModelConfig, codec: Codec, cos_sin: torch.Tensor) -> MLA:
    mla, heads, width = config.mla, config.num_heads, config.hidden_size
    q_width, rank = heads * (mla.nope_dim + mla.rope_dim), mla.kv_rank
    activation, ops = weights.activation, weights.ops
    if mla.q_rank is None:
        down, q_norm, q_up = _by_part(weights.matrix(f"{at}.q_proj.weight", q_width, width), config), None, None
    else:
        down = weights.matrix(f"{at}.q_a_proj.weight", mla.q_rank, width)
        q_norm = RMSNorm(weights.vector(f"{at}.q_a_layernorm.weight", mla.q_rank), NORM_EPS, ops)
        stored = weights.matrix(f"{at}.q_b_proj.weight", q_width, mla.q_rank)
        q_up = Linear(_by_part(stored, config), activation, ops)
    latent, k_rope = weights.matrix(f"{at}.kv_a_proj_with_mqa.weight", rank + mla.rope_dim, width).split(
        (rank, mla.rope_dim)
    )
    kv_b = weights.matrix(f"{at}.kv_b_proj.weight", heads * (mla.nope_dim + mla.value_dim), rank)
    w_uk, w_uv = kv_b.view(heads, -1, rank).split((mla.nope_dim, mla.value_dim), dim=1)
    return MLA(
        Linear(join([down, latent, _halves(k_rope, config)]), activation, ops),
        q_norm,
        q_up,
        RMSNorm(weights.vector(f"{at}.kv_a_layernorm.weight", rank), NORM_EPS, ops),
        ops.pack_head_linear(w_uk.transpose(1, 2), activation),
        ops.pack_head_linear(w_uv, activation),
        Linear(kv_b, activation, ops) if codec.expands_latents else None,
        parts.linear(weights, at, {"o_proj": width}, heads * mla.value_dim),
        cos_sin,
        codec,
        heads,
        mla,
        config.softmax_scale,
        ops,
    )


def _by_part(q: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rows head by head -> the rows without positions of all heads, then the rotated rows of all heads."""
    mla, columns = config.mla, q.shape[1]
    nope, rope = q.view(config.num_heads, -1, columns).split((mla.nope_dim, mla.rope_dim), dim=1)
    return join([nope.reshape(-1, columns), _halves(rope, config).reshape(-1, columns)])


def _halves(rope: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Rotated rows [..., rope_dim, in]: pairs (0, 1), (2, 3), ... become (0, n/2), (1, n/2 + 1), ...

    Queries and keys are permuted alike, so their products do not change.
    """
    if not config.mla.interleaved:
        return rope
    return join([rope[..., 0::2, :], rope[..., 1::2, :]], dim=-2)
