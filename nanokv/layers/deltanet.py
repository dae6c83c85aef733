"""Gated DeltaNet: attention without keys and values per token. A layer keeps one matrix a head for each sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels import ops
from nanokv.layers.linear import Linear


@dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet (Yang et al. 2024): a matrix for each head instead of keys and values for each token."""

    key_heads: int
    """linear_num_key_heads"""
    value_heads: int
    """linear_num_value_heads; each key head serves value_heads / key_heads consecutive ones."""
    key_dim: int
    """linear_key_head_dim"""
    value_dim: int
    """linear_value_head_dim"""
    kernel: int
    """linear_conv_kernel_dim: tokens that the short convolution sees."""

    @property
    def channels(self) -> int:
        """Width of q, k and v together, which is what the convolution runs over."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class GatedDeltaNet:
    """The gated delta rule behind a short convolution (Yang et al. 2024), as in Qwen3-Next and Qwen3.5.

    A head's state S [key_dim, value_dim] maps keys to values. A token lets it decay, corrects what it answers for the
    token's key towards the token's value, and reads it with the token's query. No positions, nothing per token.

    in_proj   Linear to [q | k | v | z | b | a]: channels, then the gate of the result, then the two gates of the state
    conv      [channels, kernel] depthwise, over q, k and v together, silu after it
    a_log, dt_bias   float32 [value_heads]: how fast a head's state decays
    norm      [value_dim], of each head's result before its gate
    out       Linear from value_heads * value_dim back to the width of x
    Call      x [rows, width], store, batch -> [rows, width]; the states batch.state_ids move on by the rows
    """

    planes: ops.StatePlanes
    is_recordable = True

    def __init__(
        self,
        in_proj: Linear,
        conv: torch.Tensor,
        a_log: torch.Tensor,
        dt_bias: torch.Tensor,
        norm: torch.Tensor,
        norm_eps: float,
        out: Linear,
        shape: DeltaConfig,
    ) -> None:
        self.in_proj = in_proj
        self.conv = conv
        self.a_log = a_log
        self.dt_bias = dt_bias
        self.norm = norm
        self.norm_eps = norm_eps
        self.out = out
        self.shape = shape

    @staticmethod
    def spec(shape: DeltaConfig, dtype: torch.dtype) -> LayerSpec:
        """What such a layer keeps: nothing per token, a float32 state and the last inputs of the convolution."""
        conv = Plane("conv", (shape.channels, shape.kernel - 1), dtype, token_axis=None)
        state = Plane("state", (shape.value_heads, shape.key_dim, shape.value_dim), torch.float32, token_axis=None)
        return LayerSpec(state=(state, conv))

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Tells the layer where its planes lie in a state; needed once before the first call."""
        conv, state = layout.state(layer, "conv"), layout.state(layer, "state")
        shape = self.shape
        self.planes = ops.StatePlanes(
            conv.offset, state.offset, layout.state_bytes, shape.key_heads, shape.value_heads, shape.key_dim,
            shape.value_dim, shape.kernel, conv.plane.dtype,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        heads, inner = self.shape.value_heads, self.shape.value_heads * self.shape.value_dim
        mixed, z, gates = self.in_proj(x).split((self.shape.channels, inner, 2 * heads), dim=1)
        qkv = ops.short_conv(mixed, self.conv, store.states.data, self.planes, batch)
        rule = ops.delta_rule_step if batch.num_rows == batch.num_requests else ops.delta_rule_chunk
        read = rule(qkv, gates, self.a_log, self.dt_bias, store.states.data, self.planes, batch)
        return self.out(ops.gated_rms_norm(read, z, self.norm, self.norm_eps))
