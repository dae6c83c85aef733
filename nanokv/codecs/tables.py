"""Tables: the values that codes stand for. Each is float32, ascending, one value a code.

A rotation by a random orthogonal matrix makes every coordinate of a vector behave alike: for a vector of length sqrt(d)
a coordinate t * sqrt(d) has the density

    f(t) ~ (1 - t^2)^((d - 3) / 2),  -1 <= t <= 1        so that (t + 1) / 2 ~ Beta((d - 1) / 2, (d - 1) / 2)

which is nearly a normal one. The Lloyd-Max table is the best one for it: each value is the mean of the numbers rounded
to it.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch


def _mass(theta: np.ndarray, power: int) -> np.ndarray:
    """Integral of cos(x) ** power from 0 to theta, by the recursion that integration by parts gives."""
    total = theta.copy() if power % 2 == 0 else np.sin(theta)
    for n in range(power % 2 + 2, power + 1, 2):
        total = np.cos(theta) ** (n - 1) * np.sin(theta) / n + (n - 1) / n * total
    return total


def cells(thresholds: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability and mean of a coordinate in each cell between thresholds: float64 [len + 1] each.

    thresholds   ascending, in units of 1 / sqrt(dim), as the means are
    """
    edges = np.concatenate(([-1.0], np.clip(thresholds / math.sqrt(dim), -1, 1), [1.0]))
    mass = _mass(np.arcsin(edges), dim - 2)  # t = sin(theta) turns (1 - t^2)^((d - 3) / 2) dt into cos^(d - 2)
    moment = -((1 - edges**2) ** ((dim - 1) / 2)) / (dim - 1)
    share = np.diff(mass)
    return share / (mass[-1] - mass[0]), np.diff(moment) / share * math.sqrt(dim)


@cache
def lloyd_max(bits: int, dim: int) -> torch.Tensor:
    """The Lloyd-Max table of a rotated vector's coordinates, for vectors of length sqrt(dim): float32 [2 ** bits].

    Source   Lloyd 1982, Max 1960; Zandieh et al. 2025 (TurboQuant, from this density)
    """
    table = np.linspace(-1, 1, 2**bits) * (0.8 * bits)
    while True:
        _, means = cells((table[1:] + table[:-1]) / 2, dim)
        if np.abs(means - table).max() < 1e-9:
            return torch.from_numpy((means - means[::-1]) / 2).float()  # symmetric to the last bit
        table = means


def distortion(bits: int, dim: int) -> float:
    """The mean of |x - decoded|^2 / |x|^2 that the Lloyd-Max table leaves."""
    table = lloyd_max(bits, dim).double().numpy() if bits else np.zeros(1)
    share, means = cells((table[1:] + table[:-1]) / 2, dim)
    return float(1 - np.sum(share * means**2))


def uniform(bits: int) -> torch.Tensor:
    """2 ** bits values one apart and symmetric, without a zero: -7.5 .. 7.5 for 4 bits."""
    return torch.arange(2**bits, dtype=torch.float32) - (2**bits - 1) / 2


def int8() -> torch.Tensor:
    """-128 .. 127, of which -128 is never used."""
    return torch.arange(-128, 128, dtype=torch.float32)


def e4m3() -> torch.Tensor:
    """The values of float8_e4m3fn, -448 .. 448, in order: a code is the byte of that format with its order made plain
    (the sign flipped, or all bits where it is negative). The two NaNs become another -448 and 448, at the ends."""
    code = torch.arange(256)
    byte = torch.where(code < 128, 255 - code, code - 128).to(torch.uint8)
    values = byte.view(torch.float8_e4m3fn).float().nan_to_num(nan=0)
    return values.where(byte & 127 != 127, (code - 127.5).sign() * 448)
