"""Decode steps of a fixed size: static buffers, and on a GPU one CUDA graph for each size.

A decode step launches hundreds of small kernels, which takes the host longer than the GPU. A graph records them once
and replays them with one call. It replays addresses, so inputs and logits have fixed places, and a step is padded to
one of a few sizes:

    rows     1, 2, 4, 8, 16, 32, 48, ...   a step of 11 requests runs as one of 16; 5 rows of padding (inputs.padded)
    pages    64, 256, 1024, ...            the width of the page tables

A size is recorded when it is first needed, over padding alone: warm-up runs must not update the state of a request.
Source: the CUDA graphs of the decode steps of vLLM (Kwon et al. 2023) and SGLang.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from nanokv.cache.store import CacheStore
from nanokv.engine.inputs import Arrays, Block, batch_of, padded, take_in_flight
from nanokv.models.decoder import Decoder

logger = logging.getLogger("nanokv")

FEWEST_PAGES = 64
"""Smallest width of page tables."""
Forward = Callable[[], None]
"""Computes the logits of a block's content."""


def row_ladder(most: int) -> list[int]:
    """Numbers of rows that decode steps are padded to, up to `most`: fine where a further row costs most."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most} | {most})


def page_ladder(most: int) -> list[int]:
    """Widths of page tables up to `most`, each four times the last: entries past a request's end cost little."""
    ladder, width = [], FEWEST_PAGES
    while width < most:
        ladder.append(width)
        width *= 4
    return [*ladder, most]


class DecodeGraphs:
    """Runs decode steps of up to `max_rows` requests of up to `max_pages` pages.

    model   a Decoder, bound to the layout of the store
    store   CacheStore whose last page and last state have no owner: padding writes there
    """

    def __init__(self, model: Decoder, store: CacheStore, page_size: int, max_rows: int, max_pages: int) -> None:
        self._model = model
        self._store = store
        self._page_size = page_size
        self._device = store.device
        self._rows, self._pages = row_ladder(max_rows), page_ladder(max_pages)
        self._spare_page = len(store.pages) - 1
        self._spare_state = len(store.states) - 1 if len(store.states) else None
        # One buffer for the logits of all sizes: each is read before the next step writes.
        self._logits = torch.empty(max_rows, model.config.vocab_size, device=self._device)
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._sizes: dict[tuple[int, int], tuple[Block, Forward]] = {}

    def fit(self, arrays: Arrays) -> bool:
        """Whether this is a step of one row a request, each with logits, no larger than the largest size."""
        num_rows, width = arrays["page_tables"].shape
        is_decode: bool = len(arrays["token_ids"]) == len(arrays["logit_rows"]) == num_rows
        return is_decode and bool(num_rows <= self._rows[-1] and width <= self._pages[-1])

    def run(
        self, arrays: Arrays, in_flight_token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs a step that `fit` accepts.

        in_flight_token_ids   int64, the samples of the previous step, or None where no row needs them
        Returns               logits float32 [rows, vocab], the token of each row, int64 [rows], and Batch.unwritable,
                              bool [rows]; all are valid until the next step
        """
        num_rows, width = arrays["page_tables"].shape
        size = next(n for n in self._rows if n >= num_rows), next(n for n in self._pages if n >= width)
        filled = padded(arrays, *size, self._spare_page, self._spare_state)
        if size not in self._sizes:
            self._sizes[size] = self._record(filled)
        block, forward = self._sizes[size]
        block.fill(filled)
        if in_flight_token_ids is not None:
            take_in_flight(block.views, in_flight_token_ids)
        forward()
        return self._logits[:num_rows], block.views["token_ids"][:num_rows], block.views["unwritable"][:num_rows]

    def _record(self, like: Arrays) -> tuple[Block, Forward]:
        """A block for inputs of these shapes, and the Forward over it."""
        block = Block(like, self._device)
        no_rows = {name: array[:0] for name, array in like.items()}
        num_rows, width = like["page_tables"].shape
        block.fill(padded(no_rows, num_rows, width, self._spare_page, self._spare_state))
        logits = self._logits[: len(like["token_ids"])]

        def forward() -> None:
            batch = batch_of(block.views, self._page_size)  # a new one each time: its memo is valid for one step
            logits.copy_(self._model.forward(batch, self._store))

        if self._memory is not None:
            _warm_up(forward)  # a failure here would occur without a graph too
            try:
                return block, _captured(forward, self._memory)
            except torch.OutOfMemoryError:
                raise  # not a fault of a kernel
            except RuntimeError as error:
                logger.warning("decode steps run without CUDA graphs, a kernel cannot be recorded: %s", error)
                self._memory = None
        return block, forward


def _warm_up(forward: Forward) -> None:
    """Runs `forward` on another stream, as a capture requires: kernels compile, libraries allocate."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(2):
            forward()
    main.wait_stream(side)


def _captured(forward: Forward, memory: Any) -> Forward:
    """`forward` as a CUDA graph in the pool `memory`. Raises RuntimeError where it cannot be recorded: it waits."""
    graph = torch.cuda.CUDAGraph()
    main = torch.cuda.current_stream()
    with torch.cuda.stream(main), torch.cuda.graph(graph, pool=memory):  # back on `main` after an error, too
        forward()
    return graph.replay
