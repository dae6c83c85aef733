"""Llama (Touvron et al. 2023; SmolLM2, TinyLlama, Llama 2 and 3), Qwen3 and Qwen3-MoE (Yang et al. 2025).

Grouped-query attention in every layer. Qwen3 normalises each head of q and k; Qwen3-MoE has experts as feed-forward
layers.
"""

from __future__ import annotations

import torch

from nanokv.codecs import Codec
from nanokv.layers.attention import Attention
from nanokv.models import parts
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import Decoder
from nanokv.models.weights import Weights


def build(config: ModelConfig, weights: Weights, codec: Codec, page_size: int) -> Decoder:
    """The decoder. It takes its tensors from `weights`, one block after the other."""

    def mixer(layer: int, cos_sin: torch.Tensor) -> Attention:
        return parts.attention(weights, f"model.layers.{layer}.self_attn", config, codec.at(layer), cos_sin, None)

    return parts.decoder(config, weights, codec, page_size, mixer)
