"""The tile registers of Intel AMX: permission, shapes, loads, products, stores.

Eight registers hold 16 rows of 64 bytes each. One instruction multiplies bfloat16 tiles into a float32 tile:

    C [16, 16] float32  +=  A [16 rows, 32 numbers] @ B [16 pairs of numbers, 16 columns]

A is read as it lies in memory. B has the numbers 2p and 2p + 1 of a column side by side, in one word of 32 bits. The
order in which an element of C is summed depends on nothing but the order of the instructions, so a row has the same
bits whatever other rows its tile holds.
Source: Intel SDM, chapter 18 and TDPBF16PS; Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import emit
from nanokv.kernels.cpu.emit import FLOAT, SHORT

ROWS, COLUMNS, DEPTH = 16, 16, 32  # of a tile: rows of A and C, columns of B and C, numbers of a row of A
TILE_BYTES = 1024
_BYTE, _INT64 = ir.IntType(8), ir.IntType(64)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def cpu_has_tiles() -> bool:
    """Whether the CPU has tile registers for bfloat16."""
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("amx-tile", "amx-bf16", "avx512bf16"))


@cache
def has_tiles() -> bool:
    """Whether this process may use tile registers: the CPU has them, and Linux grants them."""
    if not cpu_has_tiles() or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def shapes(rows: list[int]) -> np.ndarray:
    """What `set_shapes` loads: uint8 [64], register i of `rows[i]` rows of 64 bytes."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # palette
    config[16 : 16 + 2 * len(rows)].view(np.uint16)[:] = 64
    config[48 : 48 + len(rows)] = rows
    return config


def _call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _BYTE.as_pointer())


@emit.function(types.int64)
def set_shapes(builder, address):
    """Gives the registers of this thread the shapes at an address, and zeroes them."""
    _call(builder, "ldtilecfg", _pointer(builder, address))


@emit.function()
def release_tiles(builder):
    """Frees the registers of this thread: a thread that holds them is slower to switch."""
    _call(builder, "tilerelease")


def zero(builder: ir.IRBuilder, register: int) -> None:
    """Emits: all numbers of a register become 0."""
    _call(builder, "tilezero", _BYTE(register))


def load(builder: ir.IRBuilder, register: int, address: ir.Value, stride: ir.Value) -> None:
    """Emits: reads the rows of a register, `stride` bytes apart."""
    _call(builder, "tileloadd64", _BYTE(register), _pointer(builder, address), stride)


def store(builder: ir.IRBuilder, register: int, address: ir.Value, stride: ir.Value) -> None:
    """Emits: writes the rows of a register, `stride` bytes apart."""
    _call(builder, "tilestored64", _BYTE(register), _pointer(builder, address), stride)


def multiply(builder: ir.IRBuilder, c: int, a: int, b: int) -> None:
    """Emits: register c += register a @ register b."""
    _call(builder, "tdpbf16ps", _BYTE(c), _BYTE(a), _BYTE(b))


class _BFloat(ir.Type):
    """bfloat16, a type that llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BFLOATS = ir.VectorType(_BFloat(), 32)


def round_both(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two vectors of 16 float32 as one of 32 bfloat16, rounded to even; numbers below 2**-126 become 0."""
    kind = ir.FunctionType(BFLOATS, [ir.VectorType(FLOAT, 16)] * 2)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    return builder.bitcast(builder.call(function, [high, low]), ir.VectorType(SHORT, 32))


def round_one(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """A vector of 16 float32 as bfloat16, as `round_both`."""
    kind = ir.FunctionType(ir.VectorType(_BFloat(), 16), [numbers.type])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
    return builder.bitcast(builder.call(function, [numbers]), ir.VectorType(SHORT, 16))


def in_turns(builder: ir.IRBuilder, steps: ir.Value, body: Callable[[ir.Value, int], None]) -> None:
    """Emits: body(step, step % 2) for every step, so that a register can be loaded while products read another."""
    index = steps.type
    with cgutils.for_range(builder, builder.lshr(steps, index(1))) as loop:
        for turn in range(2):
            body(builder.add(builder.shl(loop.index, index(1)), index(turn)), turn)
    with builder.if_then(builder.trunc(steps, ir.IntType(1))):
        body(builder.sub(steps, index(1)), 0)
