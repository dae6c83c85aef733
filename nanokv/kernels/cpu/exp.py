"""2**x as a few multiply-adds, and the gates made of it, for numbers and for vectors."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.emit import INT, constant, like

ZERO, ONE = np.float32(0.0), np.float32(1.0)
LOG2E = np.float32(1 / math.log(2))
SHIFT = 1.5 * 2**23  # a float32 of that size has no room for fractions: adding it rounds to the nearest integer
# Minimax coefficients of 2**r on [-1/2, 1/2], the constant exactly 1: the error in float32 is below 1.6e-7.
_COEFFICIENTS = (0.0013264727, 0.0096715126, 0.0555073374, 0.2402224209, 0.6931469776, 1.0)


def emit_exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x for float32 x <= 0; 0 below 2**-126, and exactly 1 at 0."""

    def number(value: float) -> ir.Constant:
        return constant(x.type, value)

    shifted = builder.fadd(x, number(SHIFT))
    r = builder.fsub(x, builder.fsub(shifted, number(SHIFT)))
    p = number(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = emit.fma(builder, p, r, number(coefficient))
    bits = like(x, INT)  # the integer in the lowest bits of `shifted`, moved to the exponent: a multiplication by 2**it
    power = builder.shl(builder.bitcast(shifted, bits), constant(bits, 23))
    p = builder.bitcast(builder.add(builder.bitcast(p, bits), power), x.type)
    return builder.select(builder.fcmp_ordered("<", x, number(-126.0)), number(0.0), p)


def emit_sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + exp(-x)) in float32."""
    one, positive = constant(x.type, 1.0), builder.fcmp_ordered(">=", x, constant(x.type, 0.0))
    # e <= 1 cannot overflow, and the result is 1 / (1 + e) or e / (1 + e).
    e = emit_exp2(builder, builder.fmul(builder.select(positive, builder.fneg(x), x), constant(x.type, float(LOG2E))))
    return builder.fdiv(builder.select(positive, one, e), builder.fadd(one, e))


def emit_silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * sigmoid(x) in float32."""
    return builder.fmul(x, emit_sigmoid(builder, x))


exp2, sigmoid, silu = map(emit.function(types.float32, result=types.float32), (emit_exp2, emit_sigmoid, emit_silu))
"""The same for a float32 of compiled code."""
