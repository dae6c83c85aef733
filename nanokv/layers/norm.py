"""RMSNorm, alone or fused with the residual addition before it in every block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanokv.kernels.ops import Ops


@dataclass(eq=False)
class RMSNorm:
    """Each row divided by its root mean square, times `weight` (Zhang and Sennrich 2019).

    weight   [width] in the activation dtype
    eps      added to the mean square
    ops      Ops
    Call     [rows, width] -> [rows, width]
    """

    weight: torch.Tensor
    eps: float
    ops: Ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x IN PLACE, then the norm of the sum: [rows, width] -> [rows, width]."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
