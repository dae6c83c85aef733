"""Llama (Touvron et al. 2023; SmolLM2, TinyLlama, Llama 2 and 3), Mistral, Qwen2 (2.5, QwQ, the distillations of R1),
Qwen3 and Qwen3-MoE (Yang et al. 2025), the text parts of Qwen3-VL.

Grouped-query attention in every layer. Mistral is Llama where it has no window. Qwen2 adds biases to q, k and v. Qwen3
normalises each head of q and k; Qwen3-MoE also replaces the feed-forward layers by mixtures of experts.
"""

from __future__ import annotations

from typing import Any

import torch

from nanokv.codecs import Codec
from nanokv.layers.attention import Attention
from nanokv.models import parts, rope_fields, shared_fields
from nanokv.models.config import ModelConfig
from nanokv.models.fields import Fields
from nanokv.models.weights import Weights

MISTRAL, BIASED = "mistral", "qwen2"
PLAIN = ("llama", MISTRAL, BIASED)
"""The model_types that do not normalise q and k."""
EXPERTS, VL_EXPERTS = "qwen3_moe", "qwen3_vl_moe"


def read(fields: Fields, common: dict[str, Any]) -> ModelConfig:
    """Reads the fields of config.json in which families differ.

    common    fields of ModelConfig that all families share, by name
    Raises    CheckpointError naming the field
    """
    family, num_layers = common["family"], common["num_layers"]
    if family == MISTRAL and "sliding_window" not in fields.data:
        raise fields.error("sliding_window", "is missing, which means a window of 4096 tokens; null: no window")
    moe = None
    if family in (EXPERTS, VL_EXPERTS):
        moe = shared_fields.softmax_experts(fields, num_layers, shared=False, normalise=family == VL_EXPERTS)
    head_dim = shared_fields.head_dim(fields, common["hidden_size"], common["num_heads"])
    return ModelConfig(
        **common,
        head_dim=head_dim,
        qk_norm=family not in PLAIN,
        qkv_bias=family == BIASED,
        rope=rope_fields.rope(fields, head_dim),
        softmax_scale=head_dim**-0.5,
        intermediate_size=shared_fields.intermediate_size(fields, moe),
        layer_types=shared_fields.layer_types(fields, num_layers),
        moe=moe,
    )


def mixer(weights: Weights, config: ModelConfig, codec: Codec, layer: int, cos_sin: torch.Tensor) -> Attention:
    """The attention of a layer. Takes its tensors from `weights`."""
    return parts.attention(weights, f"model.layers.{layer}.self_attn", config, codec.at(layer), cos_sin, None)
