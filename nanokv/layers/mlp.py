"""The gated feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.kernels.ops import Ops
from nanokv.layers.linear import Linear


@dataclass(eq=False)
class MLP:
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020).

    gate_up   Linear to 2 * intermediate: the rows of gate, then those of up, in one product
    down      Linear back to the width of x
    ops       Ops
    Call      [rows, width] -> [rows, width]
    """

    gate_up: Linear
    down: Linear
    ops: Ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x)))
