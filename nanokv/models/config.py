"""ModelConfig: the shape of a model, for every family in one vocabulary. Knows names and numbers, no tensors, no JSON.

The docstring of a field gives its name in config.json where that differs. models/read.py reads the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.layers.deltanet import DeltaConfig
from nanokv.layers.mla import MLAConfig
from nanokv.layers.rotary import RopeConfig

ATTENTION, GATED_DELTA = "full_attention", "linear_attention"


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: each row goes to a few of many feed-forward layers."""

    num_experts: int
    """num_experts, num_local_experts or n_routed_experts"""
    per_token: int
    """num_experts_per_tok"""
    width: int
    """moe_intermediate_size: width inside an expert."""
    shared_width: int
    """Width inside the expert that every row goes to; 0 where there is none."""
    shared_gate: bool
    """Whether a sigmoid gate scales the shared expert."""
    layers: tuple[bool, ...]
    """Which layers are mixtures; the others are dense."""
    scoring: str
    """"softmax" over all experts, or "sigmoid" of each, to which a learnt bias is added for the choice only."""
    normalise: bool
    """norm_topk_prob: whether the weights of the chosen experts are made to sum to 1."""
    scale: float
    """routed_scaling_factor: multiplies the weights."""
    num_groups: int
    """n_group: experts are chosen from the best groups only ..."""
    top_groups: int
    """topk_group: ... of which there are this many."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. A field with a default is a feature that a plain decoder lacks."""

    family: str
    """model_type: which module builds it, see nanokv.models.FAMILIES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width inside a dense feed-forward layer; 0 where no layer is dense and the file does not say."""
    num_layers: int
    """num_hidden_layers"""
    layer_types: tuple[str, ...]
    """"full_attention" or "linear_attention" for each layer."""
    num_heads: int
    """num_attention_heads: query heads."""
    num_kv_heads: int
    """num_key_value_heads: heads of k and v, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of a head; hidden_size / num_heads where the file does not say. With MLA: of its query and key."""
    qk_norm: bool = False
    """Whether each head of q and k is normalised before its rotation."""
    output_gate: bool = False
    """Whether the result of attention is multiplied with the sigmoid of a projection of its input."""
    norm_offset: float = 0.0
    """What is added to the weights of the norms: 1 where they are stored around zero."""
    norm_eps: float
    """rms_norm_eps"""
    rope: RopeConfig
    softmax_scale: float
    """What scores are multiplied with before the softmax."""
    max_positions: int
    """max_position_embeddings: tokens the model was trained for."""
    tie_embeddings: bool
    """tie_word_embeddings: whether the head is the embedding table."""
    attention_bias: bool
    """Whether q, k, v and o have one."""
    mlp_bias: bool
    """Whether gate, up and down have one."""
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    delta: DeltaConfig | None = None
    num_extra_layers: int
    """num_nextn_predict_layers: layers behind the last that predict further tokens; they are not loaded."""
    eos_token_ids: tuple[int, ...]
    """eos_token_id of config.json, then those that generation_config.json adds."""
    bos_token_id: int | None
    dtype: str | None
    """The checkpoint's own: "float32", "bfloat16", "float16", or None where the file does not say."""

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that keep something for each token."""
        return [layer for layer, kind in enumerate(self.layer_types) if kind == ATTENTION]

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward half of a layer is a mixture of experts."""
        return self.moe is not None and self.moe.layers[layer]
