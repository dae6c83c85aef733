"""Gated DeltaNet: attention without keys and values for each token. A sequence keeps one matrix a head and layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.batch import Batch
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.kernels.ops import Ops
from nanokv.kernels.planes import StatePlanes
from nanokv.layers.linear import Linear


@dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet (Yang et al. 2024): a matrix for each head instead of keys and values for each token."""

    key_heads: int
    """linear_num_key_heads"""
    value_heads: int
    """linear_num_value_heads; value_heads / key_heads consecutive value heads share a key head."""
    key_dim: int
    """linear_key_head_dim"""
    value_dim: int
    """linear_value_head_dim"""
    kernel: int
    """linear_conv_kernel_dim: tokens in the window of the short convolution."""

    @property
    def channels(self) -> int:
        """Width of q, k and v together: the channels of the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(eq=False)
class GatedDeltaNet:
    """A short convolution, then the gated delta rule (Yang et al. 2024), as in Qwen3-Next and Qwen3.5.

    The state S [key_dim, value_dim] of a head maps keys to values. For each token the state decays, its answer for the
    token's key is corrected towards the token's value, and the token's query reads it. There are no positions.

    in_proj   Linear to [q | k | v | z | b | a]: channels, the gate z of the result, the two gates of the state
    conv      [channels, kernel], depthwise over q, k and v together; silu follows
    a_log, dt_bias   float32 [value_heads]: the decay rate of a head's state
    norm      [value_dim]: weight of the norm of each head's result, before its gate
    out       Linear from value_heads * value_dim back to the width of x
    ops       Ops
    Call      x [rows, width], store, batch -> [rows, width]; updates the states batch.state_ids by these rows
    """

    in_proj: Linear
    conv: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    norm: torch.Tensor
    norm_eps: float
    out: Linear
    shape: DeltaConfig
    ops: Ops
    planes: StatePlanes = field(init=False)

    is_recordable = True

    @staticmethod
    def spec(shape: DeltaConfig, dtype: torch.dtype) -> LayerSpec:
        """The planes of such a layer: a float32 state and the last inputs of the convolution, nothing for a token."""
        conv = Plane("conv", (shape.channels, shape.kernel - 1), dtype, token_axis=None)
        state = Plane("state", (shape.value_heads, shape.key_dim, shape.value_dim), torch.float32, token_axis=None)
        return LayerSpec(state=(state, conv))

    def bind(self, layout: PageLayout, layer: int) -> None:
        """Gives the layer the place of its planes in a state; needed once before the first call."""
        conv, state = layout.state(layer, "conv"), layout.state(layer, "state")
        shape = self.shape
        self.planes = StatePlanes(
            conv.offset, state.offset, layout.state_bytes, shape.key_heads, shape.value_heads, shape.key_dim,
            shape.value_dim, shape.kernel, conv.plane.dtype,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        heads, inner = self.shape.value_heads, self.shape.value_heads * self.shape.value_dim
        mixed, z, gates = self.in_proj(x).split((self.shape.channels, inner, 2 * heads), dim=1)
        qkv = self.ops.short_conv(mixed, self.conv, store.states.data, self.planes, batch)
        is_decode = batch.num_rows == batch.num_requests
        rule = self.ops.delta_rule_step if is_decode else self.ops.delta_rule_chunk
        read = rule(qkv, gates, self.a_log, self.dt_bias, store.states.data, self.planes, batch)
        return self.out(self.ops.gated_rms_norm(read, z, self.norm, self.norm_eps))
