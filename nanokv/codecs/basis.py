"""Bases: the matrices that turn a vector before it is coded. Seeded, made once for a dimension, shared by all layers.

A codec keeps a vector x as numbers s with x ~ B^T s. So a product with x needs no decoding beyond s,

    q . x  ~  (B q) . s        the query is turned once, whatever the number of keys
    sum_t w_t v_t  ~  B^T sum_t w_t s_t        a result is turned back once, whatever the number of values
"""

from __future__ import annotations

import math
from functools import cache, cached_property

import torch

from nanokv.kernels.linear import PackedLinear, linear
from nanokv.kernels.ops import Ops

ROTATION, SKETCH = 1, 2
"""Seeds. They differ: an estimator that draws both from one seed is biased."""


@cache
def haar(dim: int, seed: int = ROTATION) -> torch.Tensor:
    """A random orthogonal matrix, all equally likely: float64 [dim, dim].

    QR of a normal matrix, with the signs of R's diagonal moved into Q; without that Q is not uniform (Mezzadri 2007).
    """
    noise = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()


@cache
def sketch(rows: int, dim: int, orthogonal: bool, seed: int = SKETCH) -> torch.Tensor:
    """Rows to take signs of: float64 [rows, dim], each row about sqrt(dim) long.

    orthogonal   blocks of `dim` rows at right angles, instead of independent normal numbers (Zandieh et al. 2024, QJL,
                 whose own code does so): the error of an estimate is 2.75 times smaller
    """
    if orthogonal:
        blocks = [haar(dim, seed + block) for block in range(-(-rows // dim))]
        return torch.cat(blocks)[:rows] * math.sqrt(dim)
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Basis:
    """A matrix B float64 [width, dim], of rank dim, packed for products whose rows do not depend on each other."""

    def __init__(self, matrix: torch.Tensor, device: torch.device, ops: Ops) -> None:
        self.width, self.dim = matrix.shape
        self._ops = ops
        self._matrix = matrix.to(device)
        self._to = self._pack(self._matrix)
        self._back = self._pack(self._matrix.T)

    def _pack(self, matrix: torch.Tensor) -> PackedLinear:
        return self._ops.pack_linear(matrix.float(), torch.float32)

    @cached_property
    def _inverse(self) -> PackedLinear:
        return self._pack(torch.linalg.pinv(self._matrix).T)

    def to(self, x: torch.Tensor) -> torch.Tensor:
        """B x: float32 [..., dim] -> [..., width]."""
        return _product(x, self._to)

    def back(self, s: torch.Tensor) -> torch.Tensor:
        """B^T s: float32 [..., width] -> [..., dim]."""
        return _product(s, self._back)

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """The shortest s with B^T s = x, float32 [..., dim] -> [..., width]; B x where B is a rotation."""
        return _product(x, self._inverse)


def _product(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    return linear(x.reshape(-1, x.shape[-1]), packed).unflatten(0, x.shape[:-1])


@cache
def rotation(dim: int, device: torch.device, ops: Ops) -> Basis:
    """The rotation of every vector of this dimension."""
    return Basis(haar(dim), device, ops)
