"""TurboQuant_prod: codes of one bit less, and the signs of a sketch of their residual.

    y = R x / |x|,  c = its Lloyd-Max values at bits - 1,  r = y - c,  z = sign(S r)
    q . x  ~  |x| ( (R q) . c  +  |r| sqrt(pi / 2) / d  (S R q) . z )

The estimate of a product is unbiased, which that of the codes alone is not; it pays with variance. Decoded
numbers are 2 d, c and the scaled z, over the basis [R; S R].
Source: Zandieh et al. 2025 (TurboQuant, Algorithm 2). There S is drawn from a normal distribution; see `sketch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from nanokv.codecs.basis import Basis, haar, rotation, sketch
from nanokv.codecs.quantizer import Arrays, Quantizer, plane
from nanokv.codecs.tables import lloyd_max
from nanokv.core.spec import Plane
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import LARGEST_SCALE, CodePlane


@dataclass(frozen=True)
class ProdQuantizer(Quantizer):
    """TurboQuant_prod, for keys.

    bits         of codes and signs together, 1 to 4; 1 is the sketch alone
    orthogonal   see `sketch`
    """

    name: str
    bits: int
    orthogonal: bool

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        """Codes and signs uint8, and two scales float16: of x and of the residual."""
        parts = [("codes", 2 if self.bits == 4 else self.bits - 1), ("high", 1 if self.bits == 4 else 0), ("signs", 1)]
        codes = [plane(f"{prefix}_{n}", heads, page_size, dim * bits // 8, torch.uint8) for n, bits in parts if bits]
        scales = [plane(f"{prefix}_{name}", heads, page_size, None, torch.float16) for name in ("scale", "rest")]
        return (*codes, *scales)

    def encoder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> ProdEncoder:
        """The rotation, the sketch and the table for vectors of `dim` numbers."""
        return ProdEncoder(self, dim, device, ops)


@cache
def _basis(dim: int, orthogonal: bool, device: torch.device, ops: Ops) -> Basis:
    return Basis(torch.cat((haar(dim), sketch(dim, dim, orthogonal) @ haar(dim))), device, ops)


class ProdEncoder:
    """A ProdQuantizer made ready for vectors of one dimension."""

    def __init__(self, quantizer: ProdQuantizer, dim: int, device: torch.device, ops: Ops) -> None:
        self.basis = _basis(dim, quantizer.orthogonal, device, ops)
        self._rotation = rotation(dim, device, ops)
        self._sketch = Basis(sketch(dim, dim, quantizer.orthogonal), device, ops)
        self._factor = math.sqrt(math.pi / 2) / dim
        self._code = None
        if quantizer.bits > 1:
            table = lloyd_max(quantizer.bits - 1, dim).to(device)
            self._code = CodePlane(0, 0, 0, quantizer.bits - 1, dim, table, "plain")

    def encode(self, x: torch.Tensor) -> Arrays:
        """float32 [..., dim] -> codes and signs uint8, |x| / sqrt(dim) and the same of r, float16 [...]."""
        y, root = self._rotation.to(x), math.sqrt(x.shape[-1])
        scale = reference.row_sum(y * y).sqrt() / root
        parts, rest = [], y * torch.where(scale > 0, 1 / scale, 0)[..., None]  # in units in which |x| is root
        if self._code is not None:
            codes, _ = reference.encode(y, self._code)
            parts, rest = reference.split_codes(codes, self._code.bits), rest - self._code.table[codes.int()]
        signs = reference.split_codes((self._sketch.to(rest) > 0).byte(), 1)
        length = reference.row_sum(rest * rest).sqrt() / root
        return *parts, *signs, scale.clamp(max=LARGEST_SCALE).half(), length.half()

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        """c and the scaled z, both times the scale: float32 [..., 2 * dim]."""
        *parts, signs, scale, length = arrays
        scale, length = scale.float()[..., None], length.float()[..., None]
        z = reference.join_codes([signs], 1).float() * 2 - 1
        z *= length * (self._factor * math.sqrt(z.shape[-1]))
        codes = torch.zeros_like(z)
        if self._code is not None:
            codes = self._code.table[reference.join_codes(parts, self._code.bits).int()]
        return torch.cat((codes, z), dim=-1) * scale
