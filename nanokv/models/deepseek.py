"""DeepSeek-V2 and V3 (DeepSeek-AI 2024), Kimi-K2: multi-head latent attention, mixtures of experts after dense layers.

kv_b_proj holds for each head the rows that expand the latent to a key (W_UK), then the rows that expand it to a value
(W_UV). They are packed twice: head by head for absorbed attention, and whole for expanded attention (layers/mla.py).
"""

from __future__ import annotations

from typing import Any

import torch

from nanokv.codecs import Codec
from nanokv.codecs.kivi import KiviCodec
from nanokv.layers.linear import Linear
from nanokv.layers.mla import MLA, MLAConfig
from nanokv.layers.norm import RMSNorm
from nanokv.models import parts, rope_fields, shared_fields
from nanokv.models.config import ModelConfig, MoEConfig
from nanokv.models.fields import Fields
from nanokv.models.weights import Weights, join

NORM_EPS = 1e-6
"""Of the norms inside the projections. The released code does not read it from the config."""


def read(fields: Fields, common: dict[str, Any]) -> ModelConfig:
    """Reads the fields of config.json in which families differ.

    common    fields of ModelConfig that all families share, by name
    Raises    CheckpointError naming the field
    """
    v3, num_layers = common["family"] != "deepseek_v2", common["num_layers"]
    if common["num_kv_heads"] != common["num_heads"]:
        raise fields.error("num_key_value_heads", "expected num_attention_heads: keys come out of the latent")
    if common["attention_bias"]:
        raise fields.error("attention_bias", "only false is supported in this family")
    mla = MLAConfig(
        q_rank=fields.integer("q_lora_rank", default=0, least=0) or None,
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim", most=shared_fields.MOST_HEAD_DIM),
        rope_dim=fields.integer("qk_rope_head_dim", most=shared_fields.MOST_HEAD_DIM),
        value_dim=fields.integer("v_head_dim", most=shared_fields.MOST_HEAD_DIM),
        interleaved=not v3 or fields.flag("rope_interleave", default=True),
    )
    head_dim, rope = mla.nope_dim + mla.rope_dim, rope_fields.rope(fields, mla.rope_dim)
    moe = _experts(fields, num_layers, v3)
    return ModelConfig(
        **common,
        head_dim=head_dim,
        rope=rope,
        softmax_scale=head_dim**-0.5 * _score_factor(fields, rope.factor),
        intermediate_size=shared_fields.intermediate_size(fields, moe),
        layer_types=shared_fields.layer_types(fields, num_layers),
        mla=mla,
        moe=moe,
    )


def _experts(fields: Fields, num_layers: int, v3: bool) -> MoEConfig | None:
    """The mixture of experts: V2 scores with a softmax, V3 with sigmoids; both may choose from the best groups only."""
    first, step = fields.integer("first_k_dense_replace", default=0, least=0), fields.integer("moe_layer_freq", 1)
    layers = tuple(i >= first and i % step == 0 for i in range(num_layers))
    if not any(layers):
        return None
    methods = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    grouped = fields.choice("topk_method", methods[0], methods) != "greedy"
    num_experts = shared_fields.count_experts(fields, "n_routed_experts", num_layers)
    per_token = fields.integer("num_experts_per_tok")
    num_groups, top_groups = (fields.integer("n_group"), fields.integer("topk_group")) if grouped else (1, 1)
    if num_experts % num_groups or top_groups > num_groups:
        raise fields.error("n_group", f"does not divide {num_experts} experts into groups of which {top_groups} stay")
    if per_token > num_experts // num_groups * top_groups:
        raise fields.error("num_experts_per_tok", "more than the groups that stay have experts")
    scoring = "sigmoid" if v3 else "softmax"
    width = fields.integer("moe_intermediate_size")
    return MoEConfig(
        num_experts=num_experts,
        per_token=per_token,
        width=width,
        shared_width=width * fields.integer("n_shared_experts", default=0, least=0, most=shared_fields.MOST_EXPERTS),
        shared_gate=False,
        layers=layers,
        scoring=fields.choice("scoring_func", scoring, (scoring,)),
        normalise=v3 and fields.flag("norm_topk_prob", default=True),  # transformers does not normalise in V2
        scale=fields.number("routed_scaling_factor", default=1.0),
        num_groups=num_groups,
        top_groups=top_groups,
    )


def _score_factor(fields: Fields, factor: float) -> float:
    """Multiplies the scale of the scores: above 1 where YaRN scales the positions."""
    scaling = rope_fields.rope_scaling(fields)
    if not scaling.get("mscale_all_dim"):
        return 1.0
    return rope_fields.yarn_mscale(factor, scaling.number("mscale_all_dim")) ** 2


def mixer(weights: Weights, config: ModelConfig, codec: Codec, layer: int, cos_sin: torch.Tensor) -> MLA:
    """The latent attention of a layer. Takes its tensors from `weights`."""
    at, own = f"model.layers.{layer}.self_attn", codec.at(layer)
    mla, heads, width, scale = config.mla, config.num_heads, config.hidden_size, config.softmax_scale
    assert mla is not None and not isinstance(own, KiviCodec)  # layer_specs refuses KIVI
    q_width, rank = heads * (mla.nope_dim + mla.rope_dim), mla.kv_rank
    activation, ops = weights.activation, weights.ops
    if mla.q_rank is None:
        q_down, q_norm, q_up = (
            _by_part(weights.projection(f"{at}.q_proj.weight", q_width, width), heads, mla),
            None,
            None,
        )
    else:
        q_down = weights.projection(f"{at}.q_a_proj.weight", mla.q_rank, width)
        q_norm = RMSNorm(weights.vector(f"{at}.q_a_layernorm.weight", mla.q_rank), NORM_EPS, ops)
        stored = weights.projection(f"{at}.q_b_proj.weight", q_width, mla.q_rank)
        q_up = weights.linear(_by_part(stored, heads, mla))
    kv_a = weights.projection(f"{at}.kv_a_proj_with_mqa.weight", rank + mla.rope_dim, width)
    latent, k_rope = kv_a.split((rank, mla.rope_dim))
    down = weights.linear(join([q_down, latent, _halves(k_rope, mla)]))
    kv_b = weights.matrix(f"{at}.kv_b_proj.weight", heads * (mla.nope_dim + mla.value_dim), rank)
    k_rows, v_rows = kv_b.view(heads, -1, rank).split((mla.nope_dim, mla.value_dim), dim=1)
    kv_norm = RMSNorm(weights.vector(f"{at}.kv_a_layernorm.weight", rank), NORM_EPS, ops)
    w_uk, w_uv = (ops.pack_head_linear(rows, activation) for rows in (k_rows.transpose(1, 2), v_rows))
    expand = Linear(kv_b, activation, ops) if own.expands_latents else None
    out = parts.linear(weights, at, {"o_proj": width}, heads * mla.value_dim)
    return MLA(down, q_norm, q_up, kv_norm, w_uk, w_uv, expand, out, cos_sin, own, heads, mla, scale, ops)


def _by_part(q: torch.Tensor, heads: int, mla: MLAConfig) -> torch.Tensor:
    """The rows of q by part: the part without positions of all heads, then the rotated part of all heads."""
    columns = q.shape[1]
    nope, rope = q.view(heads, -1, columns).split((mla.nope_dim, mla.rope_dim), dim=1)
    return join([nope.reshape(-1, columns), _halves(rope, mla).reshape(-1, columns)])


def _halves(rope: torch.Tensor, mla: MLAConfig) -> torch.Tensor:
    """Rotated rows [..., rope_dim, in], reordered: pairs (0, 1), (2, 3), ... become (0, n/2), (1, n/2 + 1), ...

    Queries and keys are permuted alike, so their products do not change.
    """
    if not mla.interleaved:
        return rope
    return join([rope[..., 0::2, :], rope[..., 1::2, :]], dim=-2)
