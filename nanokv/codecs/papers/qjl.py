"""QJL: of a key only its length and the signs of a sketch S k are kept, 2 bits a number.

    q . k  ~  |k| sqrt(pi / 2) / m  (S q) . sign(S k),  S [m, d] with rows about sqrt(d) long

The estimate is unbiased. Decoded numbers are m scaled signs over the basis S: good for products, not as a vector.
Source: Zandieh et al. 2024 (QJL), with orthogonal rows as in its code; without its outlier channels, and without its
unquantized latest tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from nanokv.codecs.basis import Basis, sketch
from nanokv.codecs.quantizer import Arrays, Quantizer, plane
from nanokv.core.spec import Plane
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import LARGEST_SCALE

BITS = 2
"""Signs for each number of a key, as in the paper's tables."""


@dataclass(frozen=True)
class QJLQuantizer(Quantizer):
    """QJL, for keys only."""

    name: str
    is_sketch = True

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        """Signs uint8 [.., dim / 4], eight in a byte, and lengths float16."""
        signs = plane(f"{prefix}_signs", heads, page_size, dim * BITS // 8, torch.uint8)
        return signs, plane(f"{prefix}_scale", heads, page_size, None, torch.float16)

    def encoder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> QJLEncoder:
        """The sketch for vectors of `dim` numbers."""
        return QJLEncoder(_basis(dim, device, ops))


@cache
def _basis(dim: int, device: torch.device, ops: Ops) -> Basis:
    return Basis(sketch(BITS * dim, dim, orthogonal=True), device, ops)


class QJLEncoder:
    """A QJLQuantizer made ready for vectors of one dimension."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    def encode(self, x: torch.Tensor) -> Arrays:
        """float32 [..., dim] -> signs uint8 [..., dim / 4], and |x| / sqrt(dim) float16 [...]."""
        signs = reference.split_codes((self.basis.to(x) > 0).byte(), 1)
        return *signs, (reference.row_sum(x * x) / x.shape[-1]).sqrt().clamp(max=LARGEST_SCALE).half()

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        """Scaled signs: float32 [..., 2 * dim]."""
        signs, scale = arrays
        factor = math.sqrt(self.basis.dim * math.pi / 2) / self.basis.width
        return (reference.join_codes([signs], 1).float() * 2 - 1) * (scale.float() * factor)[..., None]
