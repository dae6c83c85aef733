"""RMSNorm: alone, or fused with the residual addition that stands before it in every block."""

from __future__ import annotations

import torch

from nanokv.kernels import ops


class RMSNorm:
    """Each row divided by its root mean square, times `weight` (Zhang and Sennrich 2019).

    weight   [width] in the activation dtype
    eps      added to the mean square
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x IN PLACE, then the norm of the sum: [rows, width] -> [rows, width]."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
