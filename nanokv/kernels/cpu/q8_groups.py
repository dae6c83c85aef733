"""Q8 weights in memory on a CPU, and the instructions that decode them. One layout serves both products.

A weight lies as [out / 16, in / 32, 544] bytes. A group of 544 is what 16 outputs multiply 32 numbers of x with: 16
scales in float16, then uint8 [8, 16, 4]: for each four numbers of x, a word of four codes for each output. In memory a
code is stored with 128 added. With it in its second byte, the word 0x47000000 is the float32 32768 + 128 + code, so one
multiply-add decodes, exactly:

    (32768 + 128 + code) * scale - (32768 + 128) * scale
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import amx, emit
from nanokv.kernels.cpu.arena import allocate
from nanokv.kernels.cpu.emit import INT, SHORT, constant
from nanokv.kernels.q8 import GROUP, dequantise, quantise

LANES = 16
QUADS = GROUP // 4
SCALE_BYTES = 2 * LANES
GROUP_BYTES = SCALE_BYTES + LANES * GROUP
BIAS = 128
BASE, BASE_BITS = 32768.0, 0x47000000
CHUNK = 1 << 22
"""Numbers that are quantised at a time: float32 copies of them are all that packing holds beside its result."""
CODES = np.empty(0, np.int8)
"""The format of a kernel's weights (intrinsics.py): groups of codes."""
binding.initialize_native_asmparser()  # for the instruction in `_moved`
_BYTE = ir.IntType(8)
_WORDS = ir.VectorType(INT, LANES)
_BYTES = ir.VectorType(_BYTE, 4 * LANES)


@cache
def permutes_bytes() -> bool:
    """Whether the CPU has the instruction of `_moved`."""
    return bool(binding.get_host_cpu_features().get("avx512vbmi", False))


def emit_scales(builder: ir.IRBuilder, group: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The 16 scales of the group at an address, as float32, and what decoding adds."""
    scales = emit.widen(builder, emit.load(builder, group, group.type(0), SHORT, LANES), types.int16)
    return scales, builder.fmul(scales, constant(scales.type, -(BASE + BIAS)))


def _quad(builder: ir.IRBuilder, group: ir.Value, quad: ir.Value) -> ir.Value:
    """The 64 codes of a quad as 16 words."""
    place = builder.add(group, builder.mul(quad, quad.type(4 * LANES)))
    return emit.load(builder, builder.add(place, quad.type(SCALE_BYTES)), quad.type(0), _BYTE, 4 * LANES)


def emit_quad(builder: ir.IRBuilder, group: ir.Value, quad: ir.Value, scales: tuple) -> list[ir.Value]:
    """The 16 weights that each of four numbers of x is multiplied with, as float32."""
    words = builder.bitcast(_quad(builder, group, quad), _WORDS)
    found = []
    for byte in range(4):
        moved = builder.shl(words, constant(_WORDS, 8)) if byte == 0 else words
        moved = builder.lshr(moved, constant(_WORDS, 8 * (byte - 1))) if byte > 1 else moved
        bits = builder.or_(builder.and_(moved, constant(_WORDS, 0xFF00)), constant(_WORDS, BASE_BITS))
        found.append(emit.fma(builder, builder.bitcast(bits, scales[0].type), *scales))
    return found


def _moved(builder: ir.IRBuilder, codes: ir.Value, order: list[int]) -> ir.Value:
    """BASE in 16 words, whose second bytes are the bytes order[0], order[1], ... of codes.

    One instruction, written as such: for a shuffle LLVM selects vpermt2b, which takes three times as long.
    """
    places = ir.Constant(_BYTES, [place for place in order for _ in range(4)])
    kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES, ir.IntType(64), _BYTES])
    base, second = builder.bitcast(constant(_WORDS, BASE_BITS), _BYTES), ir.IntType(64)(0x2222222222222222)
    return builder.asm(kind, "vpermb $1, $2, $0 {$3}", "=v,v,v,^Yk,0", [codes, places, second, base], False)


def emit_tile(builder: ir.IRBuilder, group: ir.Value, tile: ir.Value) -> None:
    """Writes the weights of a group, rounded to bfloat16, as a tile of 1 KiB (tile_linear.py). Both are addresses.

    A byte permutation brings the codes of 8 outputs and a pair of x into place: a half of a row of the tile.
    """
    index, scales = group.type, emit_scales(builder, group)
    halves = []  # scales of 8 outputs, each twice
    for half in range(2):
        order = ir.Constant(_WORDS, [8 * half + n // 2 for n in range(LANES)])
        halves.append([builder.shuffle_vector(each, each, order) for each in scales])
    with cgutils.for_range(builder, index(QUADS)) as loop:
        codes = _quad(builder, group, loop.index)
        for pair in range(2):
            row = []
            for half, (factor, added) in enumerate(halves):
                bits = _moved(builder, codes, [4 * (8 * half + n // 2) + 2 * pair + n % 2 for n in range(LANES)])
                row.append(emit.fma(builder, builder.bitcast(bits, factor.type), factor, added))
            place = builder.add(tile, builder.mul(loop.index, index(128)))
            emit.store(builder, amx.round_both(builder, *row), builder.add(place, index(64 * pair)), index(0))


def emit_tiles(builder: ir.IRBuilder, count: ir.Value, group: ir.Value, tile: ir.Value) -> None:
    """emit_tile of `count` groups, one after the other."""
    with cgutils.for_range(builder, count) as loop:
        source = builder.add(group, builder.mul(loop.index, group.type(GROUP_BYTES)))
        emit_tile(builder, source, builder.add(tile, builder.mul(loop.index, group.type(amx.TILE_BYTES))))


def _parts(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the scales float16 [blocks, steps, 16] and of the codes uint8 [blocks, steps, 8, 16, 4]."""
    return groups.view(torch.float16)[..., :LANES], groups[..., SCALE_BYTES:].unflatten(2, (QUADS, LANES, 4))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> uint8 [ceil(out / 16), in / 32, 544]; missing outputs are 0."""
    out, width = weight.shape
    groups = allocate((-(-out // LANES), width // GROUP, GROUP_BYTES), torch.uint8)
    scales, codes = _parts(groups)
    step = max(1, CHUNK // (LANES * width))
    for first in range(0, len(groups), step):
        rows = weight[first * LANES : (first + step) * LANES]
        if len(rows) % LANES:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % LANES))
        last, (own_codes, own_scales) = first + len(rows) // LANES, quantise(rows)
        scales[first:last] = own_scales.unflatten(0, (-1, LANES)).transpose(1, 2)
        biased = own_codes.view(torch.uint8) ^ BIAS
        codes[first:last] = biased.view(-1, LANES, width // GROUP, QUADS, 4).permute(0, 2, 3, 1, 4)
    return groups


def unpack(groups: torch.Tensor, out: int) -> torch.Tensor:
    """The decoded weight, float32 [out, in]."""
    scales, biased = _parts(groups)
    codes = (biased ^ BIAS).view(torch.int8).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    return dequantise(codes, scales.transpose(1, 2).flatten(0, 1))[:out]


def embed(groups: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int64) of the decoded weight, float32."""
    scales, biased = _parts(groups)
    block, lane = ids // LANES, ids % LANES
    return dequantise((biased[block, :, :, lane].flatten(1) ^ BIAS).view(torch.int8), scales[block, :, lane])
