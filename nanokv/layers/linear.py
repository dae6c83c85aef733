"""Linear and Embedding: the two uses of a weight matrix. A model that ties them reads the rows of a packed Linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanokv.kernels.linear import linear
from nanokv.kernels.ops import Ops


class Linear:
    """x @ weight.T + bias. The weight is packed once for its device.

    weight       [out, in], float; only the packed form is kept
    activation   dtype of x and of the result
    ops          Ops
    bias         [out] in the activation dtype, or None
    q8           whether the weight takes 8 bits for a number
    Call         [rows, in] -> [rows, out]
    """

    def __init__(
        self,
        weight: torch.Tensor,
        activation: torch.dtype,
        ops: Ops,
        bias: torch.Tensor | None = None,
        q8: bool = False,
    ) -> None:
        self.packed = ops.pack_linear(weight, activation, q8)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.packed, self.bias)


@dataclass(eq=False)
class Embedding:
    """Looks up rows of a table.

    table        [vocab, width], float
    activation   dtype of the result
    Call         int64 [rows] -> [rows, width], a new tensor
    """

    table: torch.Tensor
    activation: torch.dtype

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.table).to(self.activation)
