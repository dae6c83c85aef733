"""2**x for the exponents that attention and activations meet, as a few multiply-adds that vectorise."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from nanokv.kernels.cpu.words import fma, times_power

ZERO, ONE = np.float32(0.0), np.float32(1.0)
LOG2E = np.float32(1 / math.log(2))
LOWEST, SHIFT = np.float32(-126.0), np.float32(1.5 * 2**23)
# 2**r on [-1/2, 1/2], relative error below 1e-8; p(0) is exactly 1.
P1, P2, P3, P4, P5, P6 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 7))


@njit
def exp2(x):
    """2**x for x <= 0; 0 below 2**-126."""
    kept = max(x, LOWEST)
    shifted = kept + SHIFT
    r = kept - (shifted - SHIFT)
    p = fma(fma(fma(fma(fma(fma(P6, r, P5), r, P4), r, P3), r, P2), r, P1), r, ONE)
    return ZERO if x < LOWEST else times_power(p, shifted)
