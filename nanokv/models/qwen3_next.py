"""Qwen3-Next and Qwen3.5: three layers of Gated DeltaNet, then one of gated attention, repeated.

Attention here normalises q and k, rotates only a part of each head, and multiplies its result with a sigmoid gate. The
two generations store the projections of Gated DeltaNet in different ways; both become one product, [q | k | v | z | b |
a]. Sources: Yang et al. 2024 (Gated DeltaNet); the model code of transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from nanokv.codecs import Codec
from nanokv.layers.deltanet import DeltaConfig, GatedDeltaNet
from nanokv.models import parts, rope_fields, shared_fields
from nanokv.models.config import ATTENTION, GATED_DELTA, ModelConfig
from nanokv.models.decoder import Mixer
from nanokv.models.fields import Fields
from nanokv.models.weights import Weights, join

NEXT = "qwen3_next"
DENSE = ("qwen3_5", "qwen3_5_text")
"""The model_types without experts."""
MOST_DELTA = 4096
"""Of the heads of a Gated DeltaNet, their dimensions and its convolution. Released models have up to 128."""


def read(fields: Fields, common: dict[str, Any]) -> ModelConfig:
    """Reads the fields of config.json in which families differ.

    common    fields of ModelConfig that all families share, by name
    Raises    CheckpointError naming the field
    """
    family, num_layers = common["family"], common["num_layers"]
    if common["attention_bias"]:
        raise fields.error("attention_bias", "only false is supported in this family")
    moe = None
    if family not in DENSE:
        moe = shared_fields.softmax_experts(fields, num_layers, shared=True, normalise=family != NEXT)
    head_dim = shared_fields.head_dim(fields, common["hidden_size"], common["num_heads"])
    return ModelConfig(
        **common,
        head_dim=head_dim,
        qk_norm=True,
        norm_offset=1.0,
        rope=rope_fields.rope(fields, head_dim, default_part=0.25),
        softmax_scale=head_dim**-0.5,
        intermediate_size=shared_fields.intermediate_size(fields, moe),
        layer_types=_layer_types(fields, num_layers),
        moe=moe,
        delta=_delta_config(fields),
    )


def _layer_types(fields: Fields, num_layers: int) -> tuple[str, ...]:
    """layer_types, or attention in every full_attention_interval-th layer."""
    if fields.get("layer_types") is not None:
        return shared_fields.layer_types(fields, num_layers, (ATTENTION, GATED_DELTA))
    interval = fields.integer("full_attention_interval", default=4)
    return tuple(GATED_DELTA if (i + 1) % interval else ATTENTION for i in range(num_layers))


def _delta_config(fields: Fields) -> DeltaConfig:
    key_heads, value_heads = (fields.integer(f"linear_num_{kind}_heads", most=MOST_DELTA) for kind in ("key", "value"))
    if value_heads % key_heads:
        raise fields.error("linear_num_value_heads", f"not a multiple of linear_num_key_heads={key_heads}")
    return DeltaConfig(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=fields.integer("linear_key_head_dim", most=MOST_DELTA),
        value_dim=fields.integer("linear_value_head_dim", most=MOST_DELTA),
        kernel=fields.integer("linear_conv_kernel_dim", least=2, most=MOST_DELTA),
    )


def mixer(weights: Weights, config: ModelConfig, codec: Codec, layer: int, cos_sin: torch.Tensor) -> Mixer:
    """The attention or the Gated DeltaNet of a layer. Takes its tensors from `weights`."""
    at = f"model.layers.{layer}"
    if config.layer_types[layer] == GATED_DELTA:
        return _delta(weights, f"{at}.linear_attn", config)
    query = _query_and_gate(weights, f"{at}.self_attn", config)
    return parts.attention(weights, f"{at}.self_attn", config, codec.at(layer), cos_sin, query)


def _query_and_gate(weights: Weights, at: str, config: ModelConfig) -> torch.Tensor:
    """q_proj with the rows of all queries, then of all gates; it stores query and gate of one head after the other."""
    heads, head_dim, width = config.num_heads, config.head_dim, config.hidden_size
    stored = weights.projection(f"{at}.q_proj.weight", heads * 2 * head_dim, width)
    return stored.view(heads, 2, head_dim, width).transpose(0, 1).reshape(-1, width)


def _delta(weights: Weights, at: str, config: ModelConfig) -> GatedDeltaNet:
    delta, width = config.delta, config.hidden_size
    assert delta is not None
    inner = delta.value_heads * delta.value_dim
    projections = (_grouped if config.family == NEXT else _flat)(weights, at, delta, width)
    in_proj = weights.linear(projections)
    stored = weights.take(f"{at}.conv1d.weight", (delta.channels, 1, delta.kernel), torch.float32)
    conv = stored.squeeze(1).contiguous()
    each = (delta.value_heads,)
    a_log, dt_bias = (weights.take(f"{at}.{name}", each, torch.float32) for name in ("A_log", "dt_bias"))
    norm = weights.vector(f"{at}.norm.weight", delta.value_dim)
    out = parts.linear(weights, at, {"out_proj": width}, inner)
    return GatedDeltaNet(in_proj, conv, a_log, dt_bias, norm, config.norm_eps, out, delta, weights.ops)


def _flat(weights: Weights, at: str, delta: DeltaConfig, width: int) -> torch.Tensor:
    """Qwen3.5: one matrix for q, k and v, one each for z, b and a."""
    inner = delta.value_heads * delta.value_dim
    rows = {"qkv": delta.channels, "z": inner, "b": delta.value_heads, "a": delta.value_heads}
    return join([weights.projection(f"{at}.in_proj_{name}.weight", count, width) for name, count in rows.items()])


def _grouped(weights: Weights, at: str, delta: DeltaConfig, width: int) -> torch.Tensor:
    """Qwen3-Next: one matrix with q, k, v and z of one key head after the other, another with their b and a."""
    inner, ratio = delta.value_heads * delta.value_dim, delta.value_heads // delta.key_heads
    keys, values = delta.key_heads * delta.key_dim, ratio * delta.value_dim
    qkvz = weights.projection(f"{at}.in_proj_qkvz.weight", 2 * keys + 2 * inner, width)
    ba = weights.projection(f"{at}.in_proj_ba.weight", 2 * delta.value_heads, width)
    by_head = qkvz.view(delta.key_heads, -1, width).split((delta.key_dim, delta.key_dim, values, values), dim=1)
    gates = ba.view(delta.key_heads, -1, width).split((ratio, ratio), dim=1)
    return join([part.reshape(-1, width) for part in (*by_head, *gates)])
