"""Qwen3-Next and Qwen3.5: three layers of Gated DeltaNet, then one of gated attention, repeated.

Attention normalises q and k, rotates a part of each head only, and multiplies its result with a sigmoid gate. The two
generations store the projections of Gated DeltaNet differently; both become one product, [q | k | v | z | b | a].
Sources: Yang et al. 2024 (Gated DeltaNet); the model code of transformers.
"""

from __future__ import annotations

import torch

from nanokv.codecs import Codec
from nanokv.layers.deltanet import GatedDeltaNet
from nanokv.layers.linear import Linear
from nanokv.models import parts
from nanokv.models.config import GATED_DELTA, ModelConfig
from nanokv.models.decoder import Decoder, Mixer
from nanokv.models.weights import Weights, join


def build(config: ModelConfig, weights: Weights, codec: Codec, page_size: int) -> Decoder:
    """The decoder. It takes its tensors from `weights`, one block after the other."""

    def mixer(layer: int, cos_sin: torch.Tensor) -> Mixer:
        at = f"model.layers.{layer}"
        if config.layer_types[layer] == GATED_DELTA:
            return _delta(weights, f"{at}.linear_attn", config, codec)
        query = _query_and_gate(weights, f"{at}.self_attn", config)
        return parts.attention(weights, f"{at}.self_attn", config, codec.at(layer), cos_sin, query)

    return parts.decoder(config, weights, codec, page_size, mixer)


def _query_and_gate(weights: Weights, at: str, config: ModelConfig) -> torch.Tensor:
    """The rows of all queries, then those of all gates; q_proj holds query and gate of one head after the other."""
    heads, head_dim, width = config.num_heads, config.head_dim, config.hidden_size
    stored = weights.matrix(f"{at}.q_proj.weight", heads * 2 * head_dim, width)
    return stored.view(heads, 2, head_dim, width).transpose(0, 1).reshape(-1, width)


def _delta(weights: Weights, at: str, config: ModelConfig, codec: Codec) -> GatedDeltaNet:
    delta, width = config.delta, config.hidden_size
    inner = delta.value_heads * delta.value_dim
    grouped = config.family == "qwen3_next"
    projections = (_grouped if grouped else _flat)(weights, at, config)
    conv = weights.take(f"{at}.conv1d.weight", (delta.channels, 1, delta.kernel), torch.float32)
    return GatedDeltaNet(
        Linear(projections, weights.activation, weights.ops),
        conv.squeeze(1).contiguous(),
        weights.take(f"{at}.A_log", (delta.value_heads,), torch.float32),
        weights.take(f"{at}.dt_bias", (delta.value_heads,), torch.float32),
        weights.vector(f"{at}.norm.weight", delta.value_dim),
        config.norm_eps,
        parts.linear(weights, at, {"out_proj": width}, inner),
        delta,
        weights.ops,
    )


def _flat(weights: Weights, at: str, config: ModelConfig) -> torch.Tensor:
    """Qwen3.5: one matrix for q, k and v, one each for z, b and a."""
    delta, width = config.delta, config.hidden_size
    inner = delta.value_heads * delta.value_dim
    rows = {"qkv": delta.channels, "z": inner, "b": delta.value_heads, "a": delta.value_heads}
    return join([weights.matrix(f"{at}.in_proj_{name}.weight", count, width) for name, count in rows.items()])


def _grouped(weights: Weights, at: str, config: ModelConfig) -> torch.Tensor:
    """Qwen3-Next: one matrix with q, k, v and z of one key head after the other, another with their b and a."""
    delta, width = config.delta, config.hidden_size
    inner, ratio = delta.value_heads * delta.value_dim, delta.value_heads // delta.key_heads
    keys, values = delta.key_heads * delta.key_dim, ratio * delta.value_dim
    qkvz = weights.matrix(f"{at}.in_proj_qkvz.weight", 2 * keys + 2 * inner, width)
    ba = weights.matrix(f"{at}.in_proj_ba.weight", 2 * delta.value_heads, width)
    by_head = qkvz.view(delta.key_heads, -1, width).split((delta.key_dim, delta.key_dim, values, values), dim=1)
    gates = ba.view(delta.key_heads, -1, width).split((ratio, ratio), dim=1)
    return join([part.reshape(-1, width) for part in (*by_head, *gates)])
