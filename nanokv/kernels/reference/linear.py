"""Matrix products with plain weights: the specification of kernels/linear.py."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, summed in float64.

    x        [rows, in], float
    weight   [out, in], float of any width
    bias     [out], float, or None
    Returns  [rows, out], dtype of x
    """
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    return y.to(x.dtype)


def embed(weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of an embedding table.

    weight   [vocab, width], float
    ids      int64 [rows]
    Returns  [rows, width], `dtype`
    """
    return weight[ids].to(dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product for each head, y[r, h] = weight[h] @ x[r, h], summed in float64.

    x        [rows, heads, in], float
    weight   [heads, out, in], float
    Returns  [rows, heads, out], dtype of x
    Source   DeepSeek-AI 2024 (DeepSeek-V2: the absorbed form of MLA)
    """
    return torch.einsum("rhi,hoi->rho", x.double(), weight.double()).to(x.dtype)
