"""Functions on rows in registers that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weighted(normed, weight, FORMAT: tl.constexpr):
    """normed * weight in float32, rounded as reference.rms_norm says: normed is rounded to FORMAT before the product,
    unless the weight is wider than FORMAT."""
    if weight.dtype.primitive_bitwidth > FORMAT.primitive_bitwidth:
        return normed * weight
    return normed.to(FORMAT).to(tl.float32) * weight.to(FORMAT).to(tl.float32)


@triton.jit
def silu(x):
    """x * sigmoid(x), float32."""
    return x / (1.0 + tl.exp(-x))
