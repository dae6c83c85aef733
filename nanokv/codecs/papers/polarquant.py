"""PolarQuant: a rotated vector in blocks of 16, each written as one radius and a tree of angles.

    level 1    8 pairs of numbers -> 8 radii, 8 angles in [0, 2 pi)      4 bits each, evenly spread
    level 2    4 pairs of radii   -> 4 radii, 4 angles in [0, pi / 2]    2 bits each, as the next two
    level 3, 4                       1 radius, float16                   62 bits for 16 numbers

The angles of level l have the density sin(2 psi) ** (2 ** (l - 1) - 1), whatever the vector was, and gather around
pi / 4. This is another codec than the rotation and Lloyd-Max table that is sometimes called by its name
(table "tq4"), and needs 0.7 bits a number more for the same error.
Source: Han et al. 2025 (PolarQuant, arXiv 2502.02617).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from nanokv.codecs.basis import rotation
from nanokv.codecs.quantizer import Arrays, Quantizer, plane
from nanokv.core.spec import Plane
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import LARGEST_SCALE

BLOCK = 16
ROOT = 4
"""A radius is divided by this, which makes it as large as one number of its block: numbers up to 65504 fit."""
FIRST, OTHERS = 4, 2
"""Bits of the angles of level 1, and of the other levels."""


def pairs(y: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The tree of blocks y [..., 16]: the radius [...], and of each level the two legs whose angle it keeps."""
    levels = []
    while y.shape[-1] > 1:
        a, b = y.chunk(2, dim=-1)
        levels.append((a, b))
        y = (a * a + b * b).sqrt()
    return y[..., 0], levels


def unite(radius: torch.Tensor, levels: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The blocks [..., 16] again, from the radius [...] and the cosines and sines of each level's angles."""
    y = radius[..., None]
    for cos, sin in reversed(levels):
        y = torch.cat((y * cos, y * sin), dim=-1)
    return y


@cache
def angles(level: int) -> torch.Tensor:
    """The angle of each code of a level: float64, ascending. Of levels above 1 the best ones (Lloyd-Max)."""
    if level == 1:
        count = 2**FIRST
        return (torch.arange(count, dtype=torch.float64) + 0.5) * (2 * math.pi / count)
    count, steps = 2**OTHERS, 200_000
    psi = (np.arange(steps) + 0.5) * (math.pi / 2 / steps)
    weight = np.sin(2 * psi) ** (2 ** (level - 1) - 1)
    mass, moment = (np.concatenate(([0.0], np.cumsum(w))) for w in (weight, weight * psi))
    table = (np.arange(count) + 0.5) * (math.pi / 2 / count)
    while True:
        edges = np.concatenate(([0], np.searchsorted(psi, (table[1:] + table[:-1]) / 2), [steps]))
        means = np.diff(moment[edges]) / np.diff(mass[edges])
        if np.abs(means - table).max() < 1e-7:
            return torch.from_numpy(means)
        table = means


@dataclass(frozen=True)
class PolarQuantizer(Quantizer):
    """PolarQuant. Good for keys and for values."""

    name: str
    multiple = 64
    """Four blocks, so that the codes of each level fill whole bytes."""

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        """Codes of each level's angles, uint8, and the radius of each block, float16."""
        parts = [("angles1", dim // 4), ("angles2", dim // 16), ("angles3", dim // 32), ("angles4", dim // 64)]
        codes = [plane(f"{prefix}_{name}", heads, page_size, width, torch.uint8) for name, width in parts]
        return (*codes, plane(f"{prefix}_radius", heads, page_size, dim // BLOCK, torch.float16))

    def encoder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> PolarEncoder:
        """The rotation and the tables of angles."""
        return PolarEncoder(dim, device, ops)


class PolarEncoder:
    """A PolarQuantizer made ready for vectors of one dimension."""

    def __init__(self, dim: int, device: torch.device, ops: Ops) -> None:
        self.basis = rotation(dim, device, ops)
        self._blocks = dim // BLOCK
        tables = [angles(level) for level in range(1, 5)]
        self._directions = [(table.cos().float().to(device), table.sin().float().to(device)) for table in tables]
        middles = [(table[1:] + table[:-1]) / 2 for table in tables[1:]]
        self._middles = [(middle.cos().float().to(device), middle.sin().float().to(device)) for middle in middles]

    def encode(self, x: torch.Tensor) -> Arrays:
        """float32 [..., dim] -> codes uint8 of levels 1 to 4, and radii float16 [..., dim / 16]."""
        radius, levels = pairs(self.basis.to(x).unflatten(-1, (self._blocks, BLOCK)))
        (a, b), *others = ((a[..., None], b[..., None]) for a, b in levels)
        cos, sin = self._directions[0]
        codes = [(a * cos + b * sin).argmax(-1)]  # the nearest of evenly spread angles has the largest product
        for (a, b), (cos, sin) in zip(others, self._middles, strict=True):
            codes.append((b * cos > a * sin).sum(-1))  # how many middles lie below the angle of (a, b): no arctangent
        packed = [
            part
            for level, code in enumerate(codes, 1)
            for part in reference.split_codes(code.byte().flatten(-2), FIRST if level == 1 else OTHERS)
        ]
        return *packed, (radius / ROOT).clamp(max=LARGEST_SCALE).half()

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        """The rotated numbers again: float32 [..., dim]."""
        *packed, radius = arrays
        levels = []
        for i, (part, (cos, sin)) in enumerate(zip(packed, self._directions, strict=True)):
            codes = reference.join_codes([part], FIRST if i == 0 else OTHERS).unflatten(-1, (self._blocks, -1)).int()
            levels.append((cos[codes], sin[codes]))
        return unite(radius.float() * ROOT, levels).flatten(-2)
