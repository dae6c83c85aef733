"""Linear, Embedding, and a weight that is both: the ways to use a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanokv.kernels import ops


class Linear:
    """x @ weight.T + bias, the weight packed once for the device it is on.

    weight       [out, in], float; the caller drops it, the packed form stays
    activation   dtype of x and of the result
    bias         [out] in the activation dtype, or None
    keep         its rows will be looked up too (TiedEmbedding)
    Call         [rows, in] -> [rows, out]
    """

    def __init__(
        self, weight: torch.Tensor, activation: torch.dtype, bias: torch.Tensor | None = None, keep: bool = False
    ) -> None:
        self.packed = ops.pack_linear(weight, activation, keep)
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


class TiedEmbedding:
    """The rows of the head: one packed weight is both, where the model ties them. Called as Embedding is."""

    def __init__(self, head: Linear) -> None:
        self.head = head

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return ops.embed(self.head.packed, token_ids)
