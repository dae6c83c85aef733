"""Writes of a step into pages of codes, on a CPU: the scale of each vector, its codes and their packing, in one pass.

Sums add in the order of reference.codes.row_sum, halves to each other, so that both twins write the same bytes, except
for a number on a threshold: torch does not always round a square root to the nearest.
"""

from __future__ import annotations

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.compiled import compiled, inner
from nanokv.kernels.cpu.elementwise import UNIT_ROWS
from nanokv.kernels.cpu.exp import ONE, ZERO
from nanokv.kernels.cpu.intrinsics import FORMAT, fetch_add, narrow, size_of, view, widen
from nanokv.kernels.cpu.kv_tile import F32, widen_row
from nanokv.kernels.cpu.omp import GOMP, parallel_for, threads_for
from nanokv.kernels.planes import LARGEST_SCALE, CodePlane, CodePlanes

U8, INT32 = np.dtype(np.uint8), np.dtype(np.int32)
F16 = FORMAT[torch.float16]
MAX_SCALE = np.float32(LARGEST_SCALE)
ABSMAX, PLAIN, LENGTH, UNBIASED = range(4)
SCALING = {"absmax": ABSMAX, "plain": PLAIN, "length": LENGTH, "unbiased": UNBIASED}


@inner
def _sum(terms):
    """The sum of an array, which is overwritten."""
    count = len(terms)
    while count > 1:
        half = count // 2
        for n in range(half):
            terms[n] += terms[half + n]
        if count % 2 != 0:
            terms[half] = terms[count - 1]
        count -= half
    return terms[0]


@inner
def _inverse(x):
    return ONE / x if x > ZERO else ZERO


@inner
def _nearest(x, factor, thresholds, codes):
    """The number of thresholds below x * factor, for each number: of 255, every 16th is compared first, then 15 more.

    A binary search mispredicts half its branches and takes ten times as long.
    """
    step = 1 if len(thresholds) < 16 else 16
    codes[:] = 0
    for threshold in thresholds[step - 1 :: step]:
        for n in range(len(x)):
            codes[n] += np.int32(x[n] * factor > threshold)
    if step == 1:
        return
    for n in range(len(x)):
        number, first, below = x[n] * factor, np.int64(codes[n]) * 16, np.int32(0)
        between = thresholds[first : first + 15]
        for t in range(15):
            below += np.int32(number > between[t])
        codes[n] = np.int32(first) + below


@inner
def _pack(codes, first_bit, bits, target):
    """Bits first_bit .. first_bit + bits - 1 of each code, 8 / bits codes in a byte: byte j holds the codes j,
    j + len(target), ..., the first in its lowest bits."""
    width = len(target)
    target[:] = 0
    for group in range(8 // bits):
        for j in range(width):
            part = (codes[group * width + j] >> first_bit) & ((1 << bits) - 1)
            target[j] |= np.uint8(part << (group * bits))


@inner
def _encode(x, terms, codes, table, thresholds, scaling):
    """Codes of a vector, into int32 [dim], and its scale; as reference.codes.encode."""
    dim = np.float32(len(x))
    if scaling == ABSMAX:
        unit = ZERO
        for n in range(len(x)):
            unit = max(unit, abs(x[n]))
        scale = widen(narrow(min(unit / table[-1], MAX_SCALE), F16))
        unit = scale
    else:
        for n in range(len(x)):
            terms[n] = x[n] * x[n]
        unit = np.sqrt(_sum(terms) / dim)
        scale = unit
    _nearest(x, _inverse(unit), thresholds, codes)
    if scaling == LENGTH:
        for n in range(len(x)):
            terms[n] = table[codes[n]] * table[codes[n]]
        scale = unit * np.sqrt(dim * _inverse(_sum(terms)))
    elif scaling == UNBIASED:
        for n in range(len(x)):
            terms[n] = x[n] * table[codes[n]]
        scale = unit * unit * dim * _inverse(_sum(terms))
    return min(scale, MAX_SCALE)


@inner
def _store_vector(source, page, plane, at, floats, format):
    """Writes one vector: `source` its address, `page` that of its page, `at` its head * page_size + slot."""
    offset, high_offset, scale_offset, bits, dim, scaling, table, thresholds = plane
    x, terms, codes = view(floats, dim, F32), view(floats + 4 * dim, dim, F32), view(floats + 8 * dim, dim, INT32)
    widen_row(source, floats, dim, format)
    levels = 1 << bits
    scale = _encode(x, terms, codes, view(table, levels, F32), view(thresholds, levels - 1, F32), scaling)
    view(page + scale_offset + 2 * at, 1, F16)[0] = narrow(scale, F16)
    low = np.int64(2) if bits == 3 else bits
    width = dim * low // 8
    _pack(codes, np.int64(0), low, view(page + offset + at * width, width, U8))
    if bits == 3:
        eighth = dim // 8
        _pack(codes, np.int64(2), np.int64(1), view(page + high_offset + at * eighth, eighth, U8))


@inner
def _work(counter, k, v, strides, rows, pool, sizes, k_plane, v_plane, pages, slots, format):
    page_bytes, page_size, kv_heads = sizes
    k_row, k_head, v_row, v_head = strides
    pages, slots, size = view(pages, rows, INT32), view(slots, rows, INT32), size_of(format)
    scratch = np.empty(3 * max(k_plane[4], v_plane[4]), np.float32)
    floats = np.int64(scratch.ctypes.data)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            page = pool + pages[row] * page_bytes
            for head in range(kv_heads):
                at = head * page_size + slots[row]
                _store_vector(k + (row * k_row + head * k_head) * size, page, k_plane, at, floats, format)
                _store_vector(v + (row * v_row + head * v_head) * size, page, v_plane, at, floats, format)
    scratch[0] = 0  # numba frees an array after its last use, and an address is no use


@compiled
def _store(gomp, threads, k, v, strides, rows, pool, geometry, k_rest, v_rest, pages, slots, format):
    sizes = (geometry[0], geometry[1], geometry[2])
    k_plane = (geometry[3], geometry[4], geometry[5], geometry[6], geometry[7], *k_rest)
    v_plane = (geometry[8], geometry[9], geometry[10], geometry[11], geometry[12], *v_rest)
    parallel_for(gomp, threads, _work, (k, v, strides, rows, pool, sizes, k_plane, v_plane, pages, slots, format.dtype))


def _scaling_and_tables(plane: CodePlane) -> tuple[int, int, int]:
    return SCALING[plane.scaling], plane.table.data_ptr(), plane.thresholds.data_ptr()


def store_codes(k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, planes: CodePlanes, batch: Batch) -> None:
    """As reference.store_codes."""
    rows = k.shape[0]
    for name, x, plane in (("k", k, planes.k), ("v", v, planes.v)):
        if x.shape != (rows, planes.kv_heads, plane.dim) or x.stride(2) != 1 or x.dtype != k.dtype:
            raise ValueError(
                f"store_codes: {name} {x.dtype} {tuple(x.shape)} with strides {x.stride()} does not fit {planes}"
            )
    strides = (*k.stride()[:2], *v.stride()[:2])
    _store(
        GOMP, threads_for(rows * planes.kv_heads * (planes.k.dim + planes.v.dim) / 200), k.data_ptr(), v.data_ptr(),
        strides, rows, pool.data_ptr(), planes.geometry, _scaling_and_tables(planes.k), _scaling_and_tables(planes.v),
        batch.write_pages.data_ptr(), batch.write_slots.data_ptr(), FORMAT[k.dtype],
    )  # fmt: skip


@inner
def _refuse_work(counter, x, stride, rows, width, unwritable):
    marks = view(unwritable, rows, U8)
    while True:
        first = fetch_add(counter, UNIT_ROWS)
        if first >= rows:
            break
        for row in range(first, min(first + UNIT_ROWS, rows)):
            numbers, is_good = view(x + 4 * row * stride, width, F32), True
            for n in range(width):
                is_good &= abs(numbers[n]) <= MAX_SCALE  # NaN is not smaller either
            if not is_good:
                marks[row] = 1
                numbers[:] = ZERO


@compiled
def _refuse(gomp, threads, x, stride, rows, width, unwritable):
    parallel_for(gomp, threads, _refuse_work, (x, stride, rows, width, unwritable))


def refuse_unwritable(x: torch.Tensor, batch: Batch) -> None:
    """As reference.refuse_unwritable."""
    (rows, heads, dim), (stride, head_stride, step) = x.shape, x.stride()
    if x.dtype != torch.float32 or (heads > 1 and head_stride != dim) or step != 1:
        raise ValueError(f"refuse_unwritable: x {x.dtype} {tuple(x.shape)} with strides {x.stride()}")
    threads = threads_for(rows * heads * dim / 3e3)
    _refuse(GOMP, threads, x.data_ptr(), stride, rows, heads * dim, batch.unwritable.data_ptr())
