"""Matrix products on a CPU: one loop for every number of rows and every format of weights.

Weights lie in blocks of 16 outputs, [out / 16, in, 16]: the 16 weights that one number of x is multiplied with lie
side by side and are widened in registers, and each vector lane sums one output. So 16-bit weights cross the memory bus
as 16 bits, and no sum runs across lanes. The order of every sum is fixed:

    y[r, o] = x[r, 0] * w[o, 0] + x[r, 1] * w[o, 1] + ...        one fused step after the other

whatever the other rows and the tiles are, so the bits of a row depend on that row alone. Groups of codes (q8_groups.py)
are decoded in registers, to the bits that the decoded weight in float32 gives. Where weights and x are bfloat16 (the
layout of tile_linear.py, on a CPU without tiles), one step takes a pair of numbers. A product for each head (x
[rows, heads, in], weights [heads, out, in]) is the same code with a loop over heads around it.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from nanokv.kernels.cpu import amx, emit, q8_groups
from nanokv.kernels.cpu.arena import allocate
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.elementwise import cast
from nanokv.kernels.cpu.emit import FLOAT, INT
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, size_of, view
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.cpu.q8_groups import CODES, GROUP_BYTES
from nanokv.kernels.q8 import GROUP

LANES = 16
# Rows of a tile: as many sums as registers hold beside the weights. AVX2 has 16 registers of half a block.
MAX_ROWS = 12 if binding.get_host_cpu_features().get("avx512f", False) else 6
# Bytes from the weight in use to the one prefetched: the hardware's own prefetch stops at each page of 4 KiB.
PREFETCH_BYTES = 2048
# Bytes of x that a thread multiplies with one block after another: about what stays in its second-level cache.
X_BYTES = 256 * 1024
# Blocks of a unit of work: long runs of memory for one row, few enough to balance the load.
UNIT_BLOCKS = 12
PAIRS = np.empty(0, np.uint32)
"""The format of a kernel's weights (intrinsics.py): two bfloat16, in words; x lies likewise."""
SQUARE = 64  # side of the squares in which weights are transposed


def _emit_weights(builder, w, depth, element, use):
    """use(weights): 16 weights as float32, for each of `depth` numbers of x in order. w: address of a block."""
    index = depth.type
    if element == types.int8:
        with cgutils.for_range(builder, builder.udiv(depth, index(GROUP))) as step:
            group = builder.add(w, builder.mul(step.index, index(GROUP_BYTES)))
            for line in range(0, GROUP_BYTES, 64):
                _prefetch(builder, group, line)
            scales = q8_groups.emit_scales(builder, group)
            with cgutils.for_range(builder, index(q8_groups.QUADS)) as quad:
                for weights in q8_groups.emit_quad(builder, group, quad.index, scales):
                    use(weights)
        return
    with cgutils.for_range(builder, depth) as loop:
        place = builder.add(w, builder.mul(loop.index, index(LANES * element.bitwidth // 8)))
        _prefetch(builder, place, 0)
        if element == types.uint32:
            use(emit.load(builder, place, index(0), INT, LANES))
        else:
            use(emit.widen(builder, emit.load(builder, place, index(0), emit.word_of(element), LANES), element))


def _prefetch(builder, place, line):
    ahead = builder.add(place, place.type(PREFETCH_BYTES + line))
    emit.prefetch(builder, builder.inttoptr(ahead, ir.IntType(8).as_pointer()), 3)


def _multiply_add(builder, number, weights, total):
    """total + number * weights; for weights in words, of the two bfloat16 in each, one after the other."""
    if weights.type.element == FLOAT:
        return emit.fma(builder, number, weights, total)
    kind = ir.FunctionType(total.type, [total.type, amx.BFLOATS, amx.BFLOATS])
    product = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(product, [total, *(builder.bitcast(each, amx.BFLOATS) for each in (number, weights))])


def _emit_tile(builder, rows, x, x_stride, w, y, y_stride, depth, element):
    """The loop over `depth` for a fixed number of rows: a row of 16 weights in, one multiply-add for each row of x.

    Every third row of x has a pointer; the two rows below it are one and two strides away. A pointer for each row would
    take more integer registers than there are.
    """
    index = depth.type
    strides = [builder.mul(x_stride, index(r)) for r in range(rows)]
    thirds = [
        cgutils.alloca_once_value(builder, builder.gep(x, [stride], source_etype=FLOAT)) for stride in strides[::3]
    ]
    sums = [cgutils.alloca_once_value(builder, emit.constant(ir.VectorType(FLOAT, LANES), 0.0)) for _ in range(rows)]

    def add(weights):
        for r, total in enumerate(sums):
            row = builder.gep(builder.load(thirds[r // 3]), [strides[r % 3]], source_etype=FLOAT)
            number = emit.broadcast(builder, builder.load(row, typ=FLOAT), LANES)
            builder.store(_multiply_add(builder, number, weights, builder.load(total)), total)
        for third in thirds:
            builder.store(builder.gep(builder.load(third), [index(1)], source_etype=FLOAT), third)

    _emit_weights(builder, w, depth, element, add)
    for r, total in enumerate(sums):
        emit.store(builder, builder.load(total), y, builder.mul(y_stride, index(r)))


@emit.function(types.int64, None, result=types.int64)
def _block_bytes(builder, depth, element):
    """Bytes of 16 outputs by `depth` numbers of x."""
    if element == types.int8:
        return builder.mul(builder.udiv(depth, depth.type(GROUP)), depth.type(GROUP_BYTES))
    return builder.mul(depth, depth.type(LANES * element.bitwidth // 8))


@emit.function(*[types.int64] * 7, None)
def _tile(builder, rows, x, x_stride, w, y, y_stride, depth, element):
    """y[r, 0..15] = sum over k of x[r, k] * w[k, 0..15], for the rows r < `rows` <= MAX_ROWS.

    x, y   addresses of float32; their strides count floats from row to row
    w      address of [depth, 16] weights in a format, or of depth / 32 groups of codes
    Vector instructions, in one loop for each number of rows, keep every sum in a register.
    """
    x, y = (builder.inttoptr(address, FLOAT.as_pointer()) for address in (x, y))

    def body(count):
        _emit_tile(builder, count, x, x_stride, w, y, y_stride, depth, element)

    emit.switch(builder, rows, range(1, MAX_ROWS + 1), body)


@inner
def _work(counter, x, x_stride, x_head, w, y, rows, depth, heads, blocks, row_block, group, format):
    """One thread of the kernel: takes units (some rows of x, some blocks of w of one head) until none is left."""
    groups = (blocks + group - 1) // group
    units = groups * ((rows + row_block - 1) // row_block)  # of a head
    block_bytes = _block_bytes(depth, format)
    y_stride = heads * blocks * LANES
    while True:
        unit = fetch_add(counter, 1)
        if unit >= heads * units:
            break
        head, unit = unit // units, unit % units
        start, first = unit // groups * row_block, unit % groups * group
        count = min(rows - start, row_block)
        tiles = (count + MAX_ROWS - 1) // MAX_ROWS
        for block in range(first, min(first + group, blocks)):
            row = start
            for tile in range(tiles):
                size = (count + tile) // tiles  # tiles of nearly equal size: 8 rows are 4 + 4, not 6 + 2
                _tile(
                    size, x + 4 * (row * x_stride + head * x_head), x_stride,
                    w + (head * blocks + block) * block_bytes,
                    y + 4 * (row * y_stride + (head * blocks + block) * LANES), y_stride, depth, format,
                )  # fmt: skip
                row += size


@compiled
def _multiply(gomp, threads, x, x_stride, x_head, w, y, rows, depth, heads, blocks, format):
    row_block = MAX_ROWS * min(max(X_BYTES // (4 * depth * MAX_ROWS), 4), 32)
    # Each thread has as many equal groups as UNIT_BLOCKS demands, at least two: so all threads end together.
    group = -(-heads * blocks // (threads * max(2, -(-heads * blocks // (threads * UNIT_BLOCKS)))))
    args = (x, x_stride, x_head, w, y, rows, depth, heads, blocks, row_block, min(group, blocks), format.dtype)
    parallel_for(gomp, threads, _work, args)


@inner
def _pack_work(counter, w, blocks, out, depth, format):
    """One thread of the kernel: transposes blocks of 16 outputs, in small squares that stay in cache."""
    size = size_of(format)
    while True:
        first = fetch_add(counter, LANES)
        if first >= out:
            break
        block = view(blocks + first * depth * size, LANES * depth, format)
        rows = min(LANES, out - first)
        if rows < LANES:
            block[:] = 0
        for start in range(0, depth, SQUARE):
            end = min(start + SQUARE, depth)
            for lane in range(rows):
                row = view(w + (first + lane) * depth * size, depth, format)
                for k in range(start, end):
                    block[k * LANES + lane] = row[k]


@compiled
def _pack(gomp, threads, w, blocks, out, depth, format):
    args = (w, blocks, out, depth, format.dtype)
    parallel_for(gomp, threads, _pack_work, args)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [ceil(out / 16), in, 16], a copy; missing outputs are 0."""
    (out, depth), weight = weight.shape, weight.contiguous()
    blocks = allocate((-(-out // LANES), depth, LANES), weight.dtype)
    threads = threads_for(weight.numel() / 1e3)
    _pack(GOMP, threads, weight.data_ptr(), blocks.data_ptr(), out, depth, FORMAT[weight.dtype])
    return blocks


def unpack(blocks: torch.Tensor, out: int) -> torch.Tensor:
    """The weight [out, in] that was packed."""
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[:out]


def embed(blocks: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int64) of the weight that was packed, float32."""
    return blocks[ids // LANES, :, ids % LANES].float()


def multiply(x: torch.Tensor, weights: torch.Tensor, out: int) -> torch.Tensor:
    """x [rows, in] float32 times a packed [out, in], transposed: [rows, out] float32.

    weights   blocks as of `pack`, or groups of codes as of `q8_groups.pack`
    """
    coded, (rows, width), num_blocks = weights.dtype is torch.uint8, x.shape, len(weights)
    depth = weights.shape[1] * GROUP if coded else weights.shape[1]
    if x.dtype is not torch.float32 or width != depth:
        raise TypeError(f"linear: x is {x.dtype} [{rows}, {width}], expected float32 [rows, {depth}]")
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(rows, num_blocks * LANES)
    threads = threads_for(rows * num_blocks * depth * LANES / 30e3)
    _multiply(
        GOMP, threads, x.data_ptr(), x.stride(0), 0, weights.data_ptr(), y.data_ptr(), rows, depth, 1, num_blocks,
        CODES if coded else FORMAT[weights.dtype],
    )  # fmt: skip
    return y if num_blocks * LANES == out else y[:, :out].contiguous()


def multiply_pairs(x: torch.Tensor, tiles: torch.Tensor, out: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] bfloat16 times a packed [out, in], transposed, plus bias [out]: [rows, out] bfloat16.

    tiles   bfloat16 [ceil(out / 16), in / 2, 16, 2], as of `tile_linear.pack`
    """
    (rows, width), (num_blocks, pairs, _, _) = x.shape, tiles.shape
    if x.dtype is not torch.bfloat16 or width != 2 * pairs:
        raise TypeError(f"linear: x is {x.dtype} [{rows}, {width}], expected bfloat16 [rows, {2 * pairs}]")
    if x.stride(1) != 1 or x.stride(0) % 2:
        x = x.contiguous()
    y = x.new_empty(rows, num_blocks * LANES, dtype=torch.float32)
    threads = threads_for(rows * num_blocks * pairs * LANES / 30e3)
    _multiply(
        GOMP, threads, x.data_ptr(), x.stride(0) // 2, 0, tiles.data_ptr(), y.data_ptr(), rows, pairs, 1, num_blocks,
        PAIRS,
    )  # fmt: skip
    y = y if num_blocks * LANES == out else y[:, :out]
    return cast(y if bias is None else y.add_(bias), torch.bfloat16)


def pack_heads(weight: torch.Tensor) -> torch.Tensor:
    """[heads, out, in] -> [heads, ceil(out / 16), in, 16], a copy; missing outputs are 0."""
    heads, out, depth = weight.shape
    num_blocks = -(-out // LANES)
    if out % LANES:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, num_blocks * LANES - out))
    return pack(weight.reshape(-1, depth)).view(heads, num_blocks, depth, LANES)


def multiply_heads(x: torch.Tensor, blocks: torch.Tensor, out: int) -> torch.Tensor:
    """x [rows, heads, in] float32 times each head's packed [out, in], transposed: [rows, heads, out] float32."""
    (rows, heads, width), (own_heads, num_blocks, depth, _) = x.shape, blocks.shape
    if x.dtype is not torch.float32 or (heads, width) != (own_heads, depth):
        raise TypeError(f"head_linear: x is {x.dtype} {list(x.shape)}, expected float32 [rows, {own_heads}, {depth}]")
    if x.stride(2) != 1:
        x = x.contiguous()
    y = x.new_empty(rows, heads, num_blocks * LANES)
    threads = threads_for(rows * blocks.numel() / 30e3)
    _multiply(
        GOMP, threads, x.data_ptr(), x.stride(0), x.stride(1), blocks.data_ptr(), y.data_ptr(), rows, depth, heads,
        num_blocks, FORMAT[blocks.dtype],
    )  # fmt: skip
    return y if num_blocks * LANES == out else y[..., :out].contiguous()
