"""The gated feed-forward layer."""

from __future__ import annotations

import torch

from nanokv.kernels.ops import Ops
from nanokv.layers.linear import Linear


class MLP:
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020).

    gate_up   Linear to 2 * intermediate: the rows of gate, then those of up, in one product
    down      Linear back to the width of x
    ops       Ops
    Call      [rows, width] -> [rows, width]
    """

    def __init__(self, gate_up: Linear, down: Linear, ops: Ops) -> None:
        self.gate_up = gate_up
        self.down = down
        self.ops = ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x)))
