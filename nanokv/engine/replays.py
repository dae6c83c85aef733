"""Decode steps on a CPU: the kernel calls of the layers are recorded once for each number of requests, then replayed.

What graphs.py does for a GPU: inputs have fixed places, and Python does not make the calls again. Unlike a graph, a
recording computes nothing, costs one pass of Python over the layers, and needs no padding. The embedding and the logits
are computed as in any step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.batch import Batch
from nanokv.engine.graphs import page_ladder
from nanokv.engine.inputs import Arrays, Block, batch_of, padded, take_in_flight
from nanokv.models.decoder import Decoder

if TYPE_CHECKING:
    from nanokv.kernels.cpu.recording import Recording
    from nanokv.kernels.cpu.row_blocks import RowBlocks

logger = logging.getLogger("nanokv")


@dataclass
class _Size:
    """A recorded step. Its inputs lie in `block` and in x and residual, its results in `x_after` and residual."""

    block: Block
    batch: Batch
    blocks: RowBlocks
    x: torch.Tensor
    residual: torch.Tensor
    x_after: torch.Tensor
    recording: Recording


class DecodeReplays:
    """Runs decode steps of up to `max_rows` requests of up to `max_pages` pages.

    model   a Decoder, bound to the layout of the store
    """

    def __init__(self, model: Decoder, store: CacheStore, page_size: int, max_rows: int, max_pages: int) -> None:
        # numba is imported when the engine is built, as the weights need it too.
        from nanokv.kernels.cpu.recording import IS_POSSIBLE, Memory

        self._model, self._store, self._page_size = model, store, page_size
        self._max_rows, self._pages = max_rows, page_ladder(max_pages)
        self._memory = Memory(max_rows)
        self._sizes: dict[tuple[int, ...], _Size] = {}
        self._is_possible = IS_POSSIBLE

    def run(
        self, arrays: Arrays, in_flight_token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """As DecodeGraphs.run; None for a step that is no decode, is too large, or cannot be recorded."""
        size = self._size(arrays)
        if size is None:
            return None
        num_rows, _ = arrays["page_tables"].shape
        size.block.fill(padded(arrays, num_rows, size.batch.page_tables.shape[1], 0, None))
        if in_flight_token_ids is not None:
            take_in_flight(size.block.views, in_flight_token_ids)
        size.blocks.refresh()
        x, residual = self._model.embed(size.batch)
        size.x.copy_(x)
        size.residual.copy_(residual)
        size.recording.replay()
        logits = self._model.logits(size.x_after, size.residual, size.batch)
        return logits, size.block.views["token_ids"], size.block.views["unwritable"]

    def _size(self, arrays: Arrays) -> _Size | None:
        """The recorded step of these shapes, one row a request, each with logits; None where there is none."""
        num_rows, own_width = arrays["page_tables"].shape
        is_decode = len(arrays["token_ids"]) == len(arrays["logit_rows"]) == num_rows
        if not (self._is_possible and is_decode and num_rows <= self._max_rows and own_width <= self._pages[-1]):
            return None
        width = next(n for n in self._pages if n >= own_width)
        self._model.reach(int(arrays["positions"].max()) + 1)
        key = num_rows, width, torch.get_num_threads(), self._model.cos_sin.data_ptr()
        if key not in self._sizes:
            self._sizes = {old: size for old, size in self._sizes.items() if old[2:] == key[2:]}
            self._record(key, padded(arrays, num_rows, width, 0, None))
        return self._sizes.get(key)

    def _record(self, key: tuple[int, ...], like: Arrays) -> None:
        from nanokv.kernels.cpu.recording import CannotRecord, recording
        from nanokv.kernels.cpu.row_blocks import row_blocks_of

        block = Block(like, self._store.device)
        block.fill(like)
        batch = batch_of(block.views, self._page_size)
        x, residual = self._model.embed(batch)
        # The longest request of this width decides how many threads the attention of the recording takes.
        block.views["positions"].fill_(key[1] * self._page_size - 1)
        blocks, x_after = row_blocks_of(batch), x
        try:
            with recording(self._memory, key[0]) as (made, next_layer):
                for layer in self._model.layers:
                    x_after = layer(x_after, residual, self._store, batch)
                    next_layer()
        except CannotRecord as error:
            logger.debug("decode steps are not recorded: %s", error)
            self._is_possible = False
            return
        self._sizes[key] = _Size(block, batch, blocks, x, residual, x_after, made)
