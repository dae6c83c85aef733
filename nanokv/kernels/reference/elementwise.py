"""Row-wise ops in torch: normalisation and the gated activation. Knows nothing of requests or pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row divided by its root mean square, in float32; rounded to x's dtype, then times the weight (as in Llama).

    x        [rows, width], float
    weight   [width], float, possibly narrower than x
    Returns  [rows, width], dtype of x
    Source   Zhang and Sennrich 2019
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x, IN PLACE; then the norm of the sum, as `rms_norm`.

    x, residual   [rows, width], the same dtype
    Returns       [rows, width], dtype of residual
    """
    residual += x
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in float32, rounded once.

    gate_up   [rows, 2 * width]: gate first, then up
    Returns   [rows, width], dtype of gate_up
    Source    Shazeer 2020 (SwiGLU)
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
