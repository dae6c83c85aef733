"""The Llama family (Touvron et al. 2023; SmolLM2, TinyLlama, Llama 2 and 3): its tensors and how they become a Decoder.

Attention and MLP with norms before them, no norm on q or k, full rotary width; biases only where the config says so.
"""

from __future__ import annotations

from nanokv.codecs.raw import RawCodec
from nanokv.layers.attention import Attention
from nanokv.layers.linear import Embedding, Linear
from nanokv.layers.mlp import MLP
from nanokv.layers.norm import RMSNorm
from nanokv.layers.rotary import cos_sin_table
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import Block, Decoder, layer_specs
from nanokv.models.weights import Weights


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint; matrices are [out, in]."""
    width, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    matrices = {
        "self_attn.q_proj": (q_width, width, config.attention_bias),
        "self_attn.k_proj": (kv_width, width, config.attention_bias),
        "self_attn.v_proj": (kv_width, width, config.attention_bias),
        "self_attn.o_proj": (width, q_width, config.attention_bias),
        "mlp.gate_proj": (inner, width, config.mlp_bias),
        "mlp.up_proj": (inner, width, config.mlp_bias),
        "mlp.down_proj": (width, inner, config.mlp_bias),
    }
    for i in range(config.num_layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (width,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (width,)
        for name, (rows, columns, has_bias) in matrices.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"model.layers.{i}.{name}.bias"] = (rows,)
    return shapes


def build(config: ModelConfig, weights: Weights, codec: RawCodec, page_size: int) -> Decoder:
    """The decoder, its weights taken out of `weights` one block after the other."""
    cos_sin = cos_sin_table(config.rope, config.max_positions, weights.device)

    def linear(has_bias: bool, *names: str) -> Linear:
        weight = weights.matrix(*(f"{name}.weight" for name in names))
        bias = weights.vector(*(f"{name}.bias" for name in names)) if has_bias else None
        return Linear(weight, weights.activation, bias)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights.vector(f"{name}.weight"), config.norm_eps)

    def block(at: str) -> Block:
        qkv = linear(config.attention_bias, *(f"{at}.self_attn.{part}_proj" for part in "qkv"))
        out = linear(config.attention_bias, f"{at}.self_attn.o_proj")
        gate_up = linear(config.mlp_bias, f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
        down = linear(config.mlp_bias, f"{at}.mlp.down_proj")
        return Block(
            norm(f"{at}.input_layernorm"),
            Attention(qkv, out, cos_sin, codec, config.num_heads, config.head_dim),
            norm(f"{at}.post_attention_layernorm"),
            MLP(gate_up, down),
        )

    table = weights.matrix("model.embed_tokens.weight")
    head = table if config.tie_embeddings else weights.matrix("lm_head.weight")
    return Decoder(
        config,
        layer_specs(config, codec, page_size),
        Embedding(table, weights.activation),
        [block(f"model.layers.{i}") for i in range(config.num_layers)],
        norm("model.norm"),
        Linear(head, weights.activation),
    )
