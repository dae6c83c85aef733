"""Matrix products with plain weights: the readable truth for kernels/linear.py."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, summed in float64.

    x        [rows, in], float
    weight   [out, in], float of any width
    bias     [out] or None
    Returns  [rows, out], dtype of x
    """
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    return y.to(x.dtype)


def embed(weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids` of a table [vocab, width], as `dtype`: [len(ids), width]."""
    return weight[ids].to(dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each head's own product, in float64: x [rows, heads, in], weight [heads, out, in] -> [rows, heads, out]."""
    return torch.einsum("rhi,hoi->rho", x.double(), weight.double()).to(x.dtype)
