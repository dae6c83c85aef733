"""Parts that families share: projections, norms, attention, feed-forward layers, and the whole decoder.

Each function takes its tensors by their names in checkpoints, below a prefix `at` such as "model.layers.3.self_attn".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from nanokv.codecs import Codec, LayerCodec
from nanokv.codecs.pages import Heads
from nanokv.kernels.experts import Experts
from nanokv.kernels.linear import embed
from nanokv.kernels.planes import HeadNorms
from nanokv.layers.attention import Attention
from nanokv.layers.linear import Embedding, Linear
from nanokv.layers.mlp import MLP
from nanokv.layers.moe import MoE, Router
from nanokv.layers.norm import RMSNorm
from nanokv.layers.rotary import cos_sin_table, first_positions
from nanokv.models import FAMILIES
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import Block, Decoder, layer_specs
from nanokv.models.weights import Weights, join


def linear(weights: Weights, at: str, outs: dict[str, int], width: int, bias: bool = False) -> Linear:
    """The projections `outs` (name -> rows) of one input as one product; their results follow each other in a row."""
    parts = [weights.projection(f"{at}.{name}.weight", rows, width) for name, rows in outs.items()]
    biases = [weights.vector(f"{at}.{name}.bias", rows) for name, rows in outs.items()] if bias else []
    weight = parts[0] if len(parts) == 1 else join(parts)
    return weights.linear(weight, join(biases) if biases else None)


def norm(weights: Weights, name: str, config: ModelConfig, size: int) -> RMSNorm:
    """A norm. Weights stored around zero (norm_offset) stay in float32, so that 1 + w is exact."""
    return RMSNorm(norm_weight(weights, name, config, size), config.norm_eps, weights.ops)


def norm_weight(weights: Weights, name: str, config: ModelConfig, size: int) -> torch.Tensor:
    """The weight [size] of a norm, with norm_offset added."""
    if not config.norm_offset:
        return weights.vector(f"{name}.weight", size)
    weight = weights.take(f"{name}.weight", (size,), torch.float32)
    return weight if weight.is_meta else weight + config.norm_offset  # for meta see weights.join


def attention(
    weights: Weights, at: str, config: ModelConfig, codec: LayerCodec, cos_sin: torch.Tensor, query: torch.Tensor | None
) -> Attention:
    """Grouped-query attention.

    query   the rows of q, then those of the output gate; None: q_proj holds the rows of q and there is no gate
    """
    width, dim, bias = config.hidden_size, config.head_dim, config.attention_bias or config.qkv_bias
    q_width, kv_width = config.num_heads * dim, config.num_kv_heads * dim
    if query is None:
        qkv = linear(weights, at, {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}, width, bias)
    else:
        k, v = (weights.projection(f"{at}.{name}_proj.weight", kv_width, width) for name in "kv")
        qkv = weights.linear(join([query[:q_width], k, v, query[q_width:]]))
    norms = None
    if config.qk_norm:
        q_norm, k_norm = (norm_weight(weights, f"{at}.{name}_norm", config, dim) for name in "qk")
        norms = HeadNorms(q_norm, k_norm, config.norm_eps)
    out = linear(weights, at, {"o_proj": width}, q_width, config.attention_bias)
    scale, ops = config.softmax_scale, weights.ops
    heads = Heads(config.num_heads, config.num_kv_heads, dim, scale, cos_sin, norms, ops)
    return Attention(qkv, out, codec, heads)


def mlp(weights: Weights, at: str, width: int, inner: int, bias: bool = False) -> MLP:
    """A gated feed-forward layer of `inner` hidden numbers."""
    gate_up = linear(weights, at, {"gate_proj": inner, "up_proj": inner}, width, bias)
    return MLP(gate_up, linear(weights, at, {"down_proj": width}, inner, bias), weights.ops)


def feed_forward(weights: Weights, at: str, config: ModelConfig, layer: int) -> MLP | MoE:
    """The half of a block that computes each token by itself: dense, or a mixture of experts."""
    width, moe = config.hidden_size, config.moe
    if moe is None or not moe.layers[layer]:
        return mlp(weights, at, width, config.intermediate_size, config.mlp_bias)
    stored = weights.take(f"{at}.gate.weight", (moe.num_experts, width), torch.float32)
    gate = Linear(stored, torch.float32, weights.ops)
    bias = None
    if moe.scoring == "sigmoid":
        bias = weights.take(f"{at}.gate.e_score_correction_bias", (moe.num_experts,), torch.float32)
    router = Router(gate, bias, moe.per_token, moe.scoring, moe.normalise, moe.scale, moe.num_groups, moe.top_groups)
    experts = [mlp(weights, f"{at}.experts.{e}", width, moe.width) for e in range(moe.num_experts)]
    shared = shared_gate = None
    if moe.shared_width:
        name = "shared_expert" if moe.shared_gate else "shared_experts"  # as Qwen, as DeepSeek
        shared = mlp(weights, f"{at}.{name}", width, moe.shared_width)
    if moe.shared_gate:
        shared_gate = linear(weights, at, {"shared_expert_gate": 1}, width)
    packed = Experts([one.gate_up.packed for one in experts], [one.down.packed for one in experts])
    return MoE(router, packed, shared, shared_gate, weights.ops)


def decoder(config: ModelConfig, weights: Weights, codec: Codec, page_size: int) -> Decoder:
    """The stack that every family shares. `mixer` of the family builds the half of a block in which families differ."""
    width, mixer = config.hidden_size, import_module(FAMILIES[config.family][1]).mixer
    specs = layer_specs(config, codec, page_size)  # refuses a codec that does not fit, before a tensor is read
    cos_sin = cos_sin_table(config.rope, first_positions(config.max_positions, weights.device), weights.device)
    name, vocab = "model.embed_tokens.weight", config.vocab_size
    if config.tie_embeddings:
        head = weights.linear(weights.projection(name, vocab, width))
        embedding: Callable[[torch.Tensor], torch.Tensor] = partial(embed, head.packed)
    else:
        embedding = Embedding(weights.matrix(name, vocab, width), weights.activation)
        head = weights.linear(weights.projection("lm_head.weight", vocab, width))
    layers = [
        Block(
            norm(weights, f"model.layers.{layer}.input_layernorm", config, width),
            mixer(weights, config, codec, layer, cos_sin),
            norm(weights, f"model.layers.{layer}.post_attention_layernorm", config, width),
            feed_forward(weights, f"model.layers.{layer}.mlp", config, layer),
        )
        for layer in range(config.num_layers)
    ]
    last = norm(weights, "model.norm", config, width)
    return Decoder(config, specs, embedding, layers, last, head, cos_sin)
