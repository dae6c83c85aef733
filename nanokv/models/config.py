"""ModelConfig: the shape of a model, for every family in one vocabulary. Knows names and numbers, no tensors, no JSON.

The docstring of a field gives its name in config.json where that differs. models/read.py reads the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.layers.deltanet import DeltaConfig
from nanokv.layers.mla import MLAConfig
from nanokv.layers.rotary import RopeConfig
from nanokv.models.quantized_fields import Quantization

ATTENTION, GATED_DELTA = "full_attention", "linear_attention"


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The shape of a mixture of experts: the router sends each row to a few of many feed-forward layers."""

    num_experts: int
    """num_experts, num_local_experts or n_routed_experts"""
    per_token: int
    """num_experts_per_tok"""
    width: int
    """moe_intermediate_size: width inside an expert."""
    shared_width: int
    """Width inside the shared expert, which takes every row; 0: there is none."""
    shared_gate: bool
    """Whether a sigmoid gate scales the shared expert."""
    layers: tuple[bool, ...]
    """For each layer, whether it is a mixture; the others are dense."""
    scoring: str = "softmax"
    """"softmax" over all experts, or "sigmoid" of each; a learned bias is then added for the choice only."""
    normalise: bool
    """norm_topk_prob: whether the weights of the chosen experts are scaled to sum to 1."""
    scale: float = 1.0
    """routed_scaling_factor: multiplies the weights."""
    num_groups: int = 1
    """n_group: groups of experts; only experts of the best groups are chosen."""
    top_groups: int = 1
    """topk_group: how many groups are the best ones."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. A field with a default is a feature that a plain decoder lacks."""

    family: str
    """model_type: a key of nanokv.models.FAMILIES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width inside a dense feed-forward layer; 0: no layer is dense."""
    num_layers: int
    """num_hidden_layers"""
    layer_types: tuple[str, ...]
    """"full_attention" or "linear_attention" for each layer."""
    num_heads: int
    """num_attention_heads: heads of q."""
    num_kv_heads: int
    """num_key_value_heads: heads of k and v, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of a head; with MLA, of its query and key."""
    qk_norm: bool = False
    """Whether each head of q and k is normalised before its rotation."""
    norm_offset: float = 0.0
    """Added to the weights of the norms: 1.0 where the checkpoint stores them around zero."""
    norm_eps: float
    """rms_norm_eps"""
    rope: RopeConfig
    softmax_scale: float
    """Multiplies the scores before the softmax."""
    max_positions: int
    """max_position_embeddings: the context of the model, in tokens; YaRN's scaled one where that is longer."""
    tie_embeddings: bool
    """tie_word_embeddings: whether the head is the embedding table."""
    attention_bias: bool
    """Whether the projections of q, k, v and o have a bias."""
    qkv_bias: bool = False
    """Whether those of q, k and v have one, and that of o has none."""
    mlp_bias: bool
    """Whether the gate, up and down projections have a bias."""
    mla: MLAConfig | None = None
    """Multi-head latent attention in place of grouped-query attention."""
    moe: MoEConfig | None = None
    """A mixture of experts in some layers, or in all."""
    delta: DeltaConfig | None = None
    """Gated DeltaNet in the layers of the type "linear_attention"."""
    num_extra_layers: int
    """num_nextn_predict_layers: layers after the last one that predict further tokens; they are not loaded."""
    eos_token_ids: tuple[int, ...]
    """eos_token_id of config.json, then the ids that generation_config.json adds."""
    bos_token_id: int | None
    dtype: str | None
    """Of the checkpoint: "float32", "bfloat16" or "float16"; None where the file does not say."""
    quantization: Quantization | None = None
    """quantization_config: how the matrices are stored; None: in `dtype`."""

    @property
    def attention_layers(self) -> list[int]:
        """Indices of the layers that keep keys and values, or latents, for each token."""
        return [layer for layer, kind in enumerate(self.layer_types) if kind == ATTENTION]

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of inputs that its matrices have, each once."""
        inputs = {self.hidden_size, self.num_heads * self.head_dim, self.intermediate_size}
        if self.mla is not None:
            inputs |= {self.mla.kv_rank, self.mla.q_rank or 0, self.num_heads * self.mla.value_dim}
        if self.delta is not None:
            inputs.add(self.delta.value_heads * self.delta.value_dim)
        if self.moe is not None:
            inputs |= {self.moe.width, self.moe.shared_width}
        return tuple(sorted(inputs - {0}))
