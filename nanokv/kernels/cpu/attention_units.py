"""Units of work of attention: cutting a step into units, loading the queries of a unit, storing its results.

A unit is a block of rows of one request (row_blocks.py) with some KV heads and some query heads of each. Its queries
are numbered by KV head, then row, then query head. Two tuples:

    cut    query heads of a KV head; KV heads of a unit, query heads of each; units that share a KV head
    unit   first row, first KV head, first query head of each KV head, query heads of each, queries of each
"""

from __future__ import annotations

import numpy as np

from nanokv.kernels.cpu.compiled import inner
from nanokv.kernels.cpu.exp import ONE, ZERO
from nanokv.kernels.cpu.intrinsics import narrow, size_of, view
from nanokv.kernels.cpu.kv_tile import F32, I64, LANES, MASKED, Q_TILE, widen_row

I32 = np.dtype(np.int32)
MAX_FLOATS = 256 * 1024  # that the queries and results of a unit may take


@inner
def block_of(step, n):
    """Block n of a step (RowBlocks.arguments): first row, row after the last, request, greatest position."""
    block = view(step[2] + 32 * n, 4, I64)
    return block[0], block[1], block[2], block[3]


@inner
def positions_of(step):
    """The positions of the rows of a step: int32 [rows]."""
    return view(step[4], step[3], I32)


@inner
def table_of(step, request):
    """The pages of a request, in order of position: int32 [widest]."""
    return view(step[6] + 4 * step[5] * request, step[5], I32)


@inner
def cut_units(threads, num_blocks, block_rows, heads, kv_heads, dims):
    """How blocks of rows are cut into units. dims: of a query and of a result, together."""
    # Small blocks take all KV heads at once, which lie side by side in a page, if that leaves every thread enough.
    unit_heads = kv_heads if block_rows <= 4 and num_blocks >= 4 * threads else 1
    # The query heads of a KV head are divided where there are fewer units than threads, or too many queries in one.
    group, units = heads // kv_heads, num_blocks * kv_heads // unit_heads
    parts = max((threads + units - 1) // units, (block_rows * group * dims + MAX_FLOATS - 1) // MAX_FLOATS)
    unit_group = min(max((group + parts - 1) // parts, Q_TILE), group)
    return group, unit_heads, unit_group, (group + unit_group - 1) // unit_group


@inner
def unit_of(index, start, end, cut):
    """Unit `index` of the block of rows start .. end - 1."""
    group, unit_heads, unit_group, parts = cut
    first_head, first = index // parts * unit_heads, index % parts * unit_group
    members = min(unit_group, group - first)
    return start, first_head, first, members, (end - start) * members


@inner
def row_and_head(n, unit, group):
    """The row and the head of query n of a unit, in q and in out."""
    start, first_head, first, members, queries = unit
    return start + n % queries // members, (first_head + n // queries) * group + first + n % members


@inner
def load_queries(unit, cut, q, q_stride, depth, format, wide_q, best, acc, padded, total):
    """The queries of a unit, widened, to float32 [KV heads, queries, depth]; and what an online softmax starts from."""
    count = cut[1] * unit[4]
    for n in range(count):
        row, head = row_and_head(n, unit, cut[0])
        source = q + (row * q_stride + head * depth) * size_of(format)
        widen_row(source, wide_q + 4 * n * depth, depth, format)
    view(best, count, F32)[:] = MASKED
    view(acc, count * padded, F32)[:] = ZERO
    view(total, count * LANES, F32)[:] = ZERO


@inner
def set_limits(unit, positions, tile_start, count, limits):
    """The last of `count` keys of a KV tile that each query of a KV head sees, -1 for none: int64 [queries]."""
    start, _, _, members, queries = unit
    limits = view(limits, queries, I64)
    for n in range(queries):
        limits[n] = max(min(positions[start + n // members] - tile_start, count - 1), -1)


@inner
def store_results(unit, cut, acc, padded, total, out, heads, value_dim, format):
    """Divides the results of a unit by their sums of weights and writes them to out [rows, heads, value_dim]."""
    for n in range(cut[1] * unit[4]):
        row, head = row_and_head(n, unit, cut[0])
        target = view(out + (row * heads + head) * value_dim * size_of(format), value_dim, format)
        result, weights = view(acc + 4 * n * padded, padded, F32), ZERO
        for lane_sum in view(total + 4 * n * LANES, LANES, F32):
            weights += lane_sum
        factor = ONE / weights
        for d in range(value_dim):
            # + 0: a tile that is skipped and one whose weights are all 0 differ in the sign of a zero
            target[d] = narrow(result[d] * factor + ZERO, format)
