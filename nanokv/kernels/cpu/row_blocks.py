"""What the kernels derive from a batch once a step, before the layers run: numpy views, and how attention is cut up."""

from __future__ import annotations

import numpy as np

from nanokv.core.batch import Batch

# Keys that attention takes at once; strips begin at multiples of it. (numba compiles a function anew for each plain
# int constant that is passed to it, and only once for a numpy integer.)
STRIP = np.int64(64)
BLOCK = 64  # rows of one request that share the widened keys


class Plan:
    """The tensors of a batch as numpy views, and its blocks of rows.

    positions     int32 [rows]
    page_tables   int32 [requests, widest]
    blocks        int64 [blocks, 4]: first row, row after the last, request, greatest position; the dearest come first
    block_rows    rows of the largest block
    cost          rows times the strips that they see, about
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
        cost = (end - first) * (last // STRIP + 1)
        order = np.argsort(-cost, kind="stable")
        self.blocks = np.stack((first, end, request, last), axis=1)[order]
        self.block_rows = int((end - first).max(initial=0))
        self.cost = int(cost.sum())


_latest: Plan | None = None


def plan_of(batch: Batch) -> Plan:
    """The plan of a batch, whose tensors stay as they are; all layers of a step ask for the same one."""
    global _latest
    plan = _latest
    if plan is None or plan.batch is not batch:
        plan = _latest = Plan(batch)
    return plan
