"""Row-wise ops in torch: norms and gates. Knows neither requests nor pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides each row by its root mean square, in float32, and multiplies it with the weight.

    The dtype of the weight decides the rounding. A weight as wide as x, or narrower: the row is rounded to x's dtype
    before the product (as Llama does). A weight wider than x: the product is computed in float32 and rounded once (for
    weights 1 + w that are computed in float32, as in Qwen3-Next).

    x        [..., width], float
    weight   [width], float
    Returns  [..., width], dtype of x
    Source   Zhang and Sennrich 2019
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight.dtype.itemsize > x.dtype.itemsize:
        return (normed * weight).to(x.dtype)
    return normed.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds x to the residual IN PLACE, and normalises the sum as `rms_norm` does.

    x, residual   [rows, width], float, the same dtype
    weight        [width], float
    Returns       [rows, width], dtype of residual
    """
    residual += x
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in float32, rounded once.

    gate_up   [rows, 2 * width], float: gate, then up
    Returns   [rows, width], dtype of gate_up
    Source    Shazeer 2020 (SwiGLU)
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate), in float32, rounded once.

    x, gate   [rows, width], float, the same dtype; gate may be a view with a larger row stride
    Returns   [rows, width], contiguous, dtype of x
    Source    Qiu et al. 2025 (gated attention), the output gate of Qwen3-Next
    """
    return (x.float() * torch.sigmoid(gate.float())).to(x.dtype)


def gated_rms_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of each head, as `rms_norm`, times silu(z) in float32, rounded again.

    x, z     [rows, heads * dim], float; z may be a view with a larger row stride
    weight   [dim], float, the same for every head
    Returns  [rows, heads * dim], dtype of x, contiguous
    Source   Yang, Kautz and Hatamizadeh 2024 (the output norm of Gated DeltaNet)
    """
    normed = rms_norm(x.unflatten(-1, (-1, weight.shape[0])), weight, eps).flatten(1)
    return (normed.float() * F.silu(z.float())).to(x.dtype)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another float dtype, rounded to even; x itself where it has that dtype.

    x        [rows, width], float; may be a view with a larger row stride
    Returns  [rows, width], `dtype`
    """
    return x.to(dtype)
