"""Linear and Embedding: the two ways to use a matrix of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanokv.kernels import ops


class Linear:
    """x @ weight.T + bias, the weight packed once for the device it is on.

    weight       [out, in], float; the caller drops it, the packed form stays
    activation   dtype of x and of the result
    bias         [out] in the activation dtype, or None
    Call         [rows, in] -> [rows, out]
    """

    def __init__(self, weight: torch.Tensor, activation: torch.dtype, bias: torch.Tensor | None = None) -> None:
        self.packed = ops.pack_linear(weight, activation)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.packed, self.bias)


class Embedding:
    """The rows of a table.

    table        [vocab, width], float
    activation   dtype of the result
    Call         int64 [rows] -> [rows, width], a new tensor
    """

    def __init__(self, table: torch.Tensor, activation: torch.dtype) -> None:
        self.table = table
        self.activation = activation

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.table).to(self.activation)
