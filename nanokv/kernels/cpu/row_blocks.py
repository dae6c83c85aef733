"""What the attention kernels derive from a batch once a step, before the layers run: numpy views and blocks of rows."""

from __future__ import annotations

import numpy as np

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.kv_tile import KV_TILE

BLOCK = 64  # rows of one request that share the widened keys


class RowBlocks:
    """The tensors of a batch as numpy views, and its rows cut into blocks.

    positions     int32 [rows]
    page_tables   int32 [requests, widest]
    blocks        int64 [blocks, 4]: first row, row after the last, request, greatest position; the costliest first
    block_rows    rows of the largest block
    cost          rows times the KV tiles that they see, about
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.positions, self.page_tables = batch.positions.numpy(), batch.page_tables.numpy()
        starts = batch.request_starts.numpy().astype(np.int64)
        counts = -(-np.diff(starts) // BLOCK)
        request = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = starts[request] + BLOCK * nth
        end = np.minimum(first + BLOCK, starts[request + 1])
        last = np.maximum.reduceat(self.positions, first) if len(first) else first
        cost = (end - first) * (last // KV_TILE + 1)
        order = np.argsort(-cost, kind="stable")
        self.blocks = np.stack((first, end, request, last), axis=1)[order]
        self.block_rows = int((end - first).max(initial=0))
        self.cost = int(cost.sum())


_latest: RowBlocks | None = None


def row_blocks_of(batch: Batch) -> RowBlocks:
    """The blocks of a batch, whose tensors do not change; all layers of a step get the same object."""
    global _latest
    blocks = _latest
    if blocks is None or blocks.batch is not batch:
        blocks = _latest = RowBlocks(batch)
    return blocks
