"""Mixture of experts: a router selects a few feed-forward layers for each row. Families differ in the router's rule.

A row's result does not depend on the other rows of its step: products compute each row by itself, and the experts of a
row are added in the order of their ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.kernels.experts import Experts
from nanokv.kernels.ops import Ops
from nanokv.layers.linear import Linear
from nanokv.layers.mlp import MLP


@dataclass(eq=False)
class Router:
    """Selects the experts of a row and their weights (Shazeer et al. 2017; DeepSeek-AI 2024).

    gate         Linear to num_experts, float32
    bias         float32 [num_experts], added to the scores for the selection only (load balancing of V3), or None
    per_token    experts of a row
    scoring      "softmax" over all experts, or "sigmoid" of each
    normalise    whether the weights of the selected experts are scaled to a sum of 1
    scale        factor of the weights
    num_groups   groups of experts; a row selects from its best `top_groups` only. The score of a group is that of its
                 best expert (softmax), or the sum of its best two (sigmoid)
    Call         x [rows, width] -> weights float32 [rows, per_token], experts int64 [rows, per_token]
    """

    gate: Linear
    bias: torch.Tensor | None
    per_token: int
    scoring: str
    normalise: bool
    scale: float
    num_groups: int
    top_groups: int

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gate(x.float())
        scores = logits.softmax(-1) if self.scoring == "softmax" else _sigmoid(logits)
        ranked = scores if self.bias is None else scores + self.bias
        if self.top_groups < self.num_groups:
            ranked = self._close_groups(ranked)
        chosen = ranked.topk(self.per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def _close_groups(self, ranked: torch.Tensor) -> torch.Tensor:
        """The scores with -inf for experts outside the best groups."""
        groups = ranked.unflatten(-1, (self.num_groups, -1))
        best = groups.amax(-1) if self.scoring == "softmax" else groups.topk(2, dim=-1).values.sum(-1)
        is_open = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(self.top_groups).indices, True)
        return groups.masked_fill(~is_open.unsqueeze(-1), float("-inf")).flatten(-2)


@dataclass(eq=False)
class MoE:
    """The weighted sum of a row's selected experts, plus a shared expert.

    router        Router
    experts       Experts: the weights of each MLP, packed
    shared        MLP of every row, or None
    shared_gate   Linear to 1, whose sigmoid scales the shared expert, or None
    ops           Ops
    Call          [rows, width] -> [rows, width]
    """

    router: Router
    experts: Experts
    shared: MLP | None
    shared_gate: Linear | None
    ops: Ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x)
        out = self._shared(x)
        self.ops.add_experts(out, x, weights, chosen, self.experts)
        return out

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared is None:
            return torch.zeros_like(x)
        y = self.shared(x)
        return y if self.shared_gate is None else y * _sigmoid(self.shared_gate(x).float()).to(y.dtype)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Sigmoid as the softmax of (x, 0), which torch computes element by element. torch.sigmoid rounds the last few
    numbers of a tensor differently from those before, so a row would depend on its neighbours."""
    return torch.stack((x, torch.zeros_like(x)), dim=-1).softmax(-1)[..., 0]
