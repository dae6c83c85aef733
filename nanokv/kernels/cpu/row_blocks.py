"""What the attention kernels derive from a batch once a step, before the layers run: blocks of rows."""

from __future__ import annotations

import numpy as np

from nanokv.core.batch import Batch
from nanokv.kernels.cpu.kv_tile import KV_TILE

BLOCK = 64  # rows of one request that share the widened keys


class RowBlocks:
    """The rows of a batch, cut into blocks, and its tensors as a kernel takes them.

    blocks        int64 [blocks, 4]: first row, row after the last, request, greatest position; the costliest first
    cost          rows times the KV tiles that they see, about
    arguments     of a kernel, numbers: blocks, rows of the largest, address of blocks; rows, address of their positions
                  (int32); width of the page tables, their address (int32)
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._positions, self._tables = batch.positions.contiguous().numpy(), batch.page_tables.contiguous()
        self.blocks, self.cost, block_rows = self._cut()
        self.arguments = (
            len(self.blocks), block_rows, self.blocks.ctypes.data, len(self._positions), self._positions.ctypes.data,
            self._tables.shape[1], self._tables.data_ptr(),
        )  # fmt: skip

    def refresh(self) -> None:
        """Writes the blocks for new values of the batch's tensors in place: a recorded kernel knows their address."""
        self.blocks[:] = self._cut()[0]

    def _cut(self) -> tuple[np.ndarray, int, int]:
        starts = self.batch.request_starts.numpy().astype(np.int64)
        counts = -(-np.diff(starts) // BLOCK)
        request = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = starts[request] + BLOCK * nth
        end = np.minimum(first + BLOCK, starts[request + 1])
        last = np.maximum.reduceat(self._positions, first) if len(first) else first
        cost = (end - first) * (last // KV_TILE + 1)
        order = np.argsort(-cost, kind="stable")
        blocks = np.stack((first, end, request, last), axis=1)[order]
        return blocks, int(cost.sum()), int((end - first).max(initial=0))


def row_blocks_of(batch: Batch) -> RowBlocks:
    """The blocks of a batch, whose tensors do not change; all layers of a step get the same object."""
    return batch.once(RowBlocks)
