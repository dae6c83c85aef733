"""Mixture of experts: a router chooses a few feed-forward layers for each row. Knows no family: the router's rule does.

Every number of a row follows from that row alone: products keep a row's bits whatever the other rows are, and a row's
experts are added in the order of their ids. So batch mates change nothing.
"""

from __future__ import annotations

import torch

from nanokv.kernels import ops
from nanokv.layers.linear import Linear
from nanokv.layers.mlp import MLP


class Router:
    """Which experts a row goes to, and with which weights (Shazeer et al. 2017; DeepSeek-AI 2024).

    gate         Linear to num_experts, float32
    bias         float32 [num_experts], added to the scores for the choice only (balances the experts of V3), or None
    scoring      "softmax" over all experts, or "sigmoid" of each
    normalise    make the weights of the chosen sum to 1
    scale        multiplies the weights
    num_groups   experts stand in so many groups, of which the best `top_groups` are open: a group counts as its best
                 expert (softmax), or as its best two together (sigmoid)
    Call         x [rows, width] -> weights float32 [rows, per_token], experts int64 [rows, per_token]
    """

    def __init__(
        self,
        gate: Linear,
        bias: torch.Tensor | None,
        per_token: int,
        scoring: str,
        normalise: bool,
        scale: float,
        num_groups: int,
        top_groups: int,
    ) -> None:
        self.gate = gate
        self.bias = bias
        self.per_token = per_token
        self.scoring = scoring
        self.normalise = normalise
        self.scale = scale
        self.num_groups = num_groups
        self.top_groups = top_groups

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


class MoE:
    """The weighted sum of the experts that the router chose, and of one that every row goes to.

    router        Router
    experts       list of MLP
    shared        MLP, or None
    shared_gate   Linear to 1, whose sigmoid scales the shared expert, or None
    Call          [rows, width] -> [rows, width]
    """

    def __init__(self, router: Router, experts: list[MLP], shared: MLP | None, shared_gate: Linear | None) -> None:
        self.router = router
        self.experts = ops.Experts([one.gate_up.packed for one in experts], [one.down.packed for one in experts])
        self.shared = shared
        self.shared_gate = shared_gate

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x)
        out = self._shared(x)
        ops.add_experts(out, x, weights, chosen, self.experts)
        return out

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared is None:
            return torch.zeros_like(x)
        y = self.shared(x)
        return y if self.shared_gate is None else y * _sigmoid(self.shared_gate(x).float()).to(y.dtype)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """By the softmax of (x, 0), which torch computes element by element: its sigmoid rounds the last few numbers of a
    tensor in another way than those before, so a row would depend on the rows around it."""
    return torch.stack((x, torch.zeros_like(x)), dim=-1).softmax(-1)[..., 0]
