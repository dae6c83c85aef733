"""Decode steps of a fixed size: static buffers, and on a GPU one CUDA graph for each size.

A decode step launches hundreds of small kernels, which takes the host longer than the GPU. A graph records them once
and replays them with one call. It replays addresses, so inputs and logits have fixed places, and sizes come from a
ladder:

    rows     1, 2, 4, 8, 16, 32, 48, ...   a step of 11 requests runs as one of 16; 5 rows of padding (inputs.padded)
    pages    64, 256, 1024, ...            the width of the page tables

A size is recorded when it is first needed, over padding alone: the runs that warm up must move nobody's state.
Source   Kwon et al. 2023 (vLLM) and SGLang, whose decode steps run this way
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from nanokv.cache.store import CacheStore
from nanokv.engine.inputs import Arrays, Block, batch_of, padded, take_in_flight
from nanokv.models.decoder import Decoder

logger = logging.getLogger("nanokv")

FEWEST_PAGES = 64
Forward = Callable[[], None]


def row_ladder(most: int) -> list[int]:
    """Numbers of rows that decode steps are padded to: fine where a row more costs most."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, most, 16)) if size < most} | {most})


def page_ladder(most: int) -> list[int]:
    """Widths of page tables: each four times the last, because what lies past a request's end costs little."""
    ladder, width = [], FEWEST_PAGES
    while width < most:
        ladder.append(width)
        width *= 4
    return [*ladder, most]


class DecodeGraphs:
    """Runs decode steps of up to `max_rows` requests of up to `max_pages` pages.

    The last page and the last state of the store belong to nobody: padding writes there.
    """

    def __init__(self, model: Decoder, store: CacheStore, page_size: int, max_rows: int, max_pages: int) -> None:
        self._model = model
        self._store = store
        self._page_size = page_size
        self._device = store.device
        self._rows, self._pages = row_ladder(max_rows), page_ladder(max_pages)
        self._spare = {"page": len(store.pages) - 1, "state": len(store.states) - 1 if len(store.states) else None}
        # One place for the logits of all sizes: each is read before the next step writes.
        self._logits = torch.empty(max_rows, model.config.vocab_size, device=self._device)
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._sizes: dict[tuple[int, int], tuple[Block, Forward]] = {}

    @property
    def num_sizes(self) -> int:
        """Sizes recorded so far."""
        return len(self._sizes)

    def fit(self, arrays: Arrays) -> bool:
        """Whether this is a step of one row a request, each of which gives logits, of a size that is on the ladder."""
        num_rows, width = arrays["page_tables"].shape
        is_decode = len(arrays["token_ids"]) == len(arrays["logit_rows"]) == num_rows
        return is_decode and num_rows <= self._rows[-1] and width <= self._pages[-1]

    def run(
        self, arrays: Arrays, in_flight_token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits float32 [rows, vocab], the token of each row, int64 [rows], and their Batch.unwritable; all are valid
        until the next step."""
        num_rows, width = arrays["page_tables"].shape
        size = next(n for n in self._rows if n >= num_rows), next(n for n in self._pages if n >= width)
        filled = padded(arrays, *size, **self._spare)
        if size not in self._sizes:
            self._sizes[size] = self._record(filled)
        block, forward = self._sizes[size]
        block.fill(filled)
        if in_flight_token_ids is not None:
            take_in_flight(block.views, in_flight_token_ids)
        forward()
        return self._logits[:num_rows], block.views["token_ids"][:num_rows], block.views["unwritable"][:num_rows]

    def _record(self, like: Arrays) -> tuple[Block, Forward]:
        """A block for inputs like these, and what computes the logits of what it holds."""
        block = Block(like, self._device)
        nobody = {name: array[:0] for name, array in like.items()}
        block.fill(padded(nobody, *like["page_tables"].shape, **self._spare))
        logits = self._logits[: len(like["token_ids"])]

        def forward() -> None:
            batch = batch_of(block.views, self._page_size)  # a new one each time: a Batch is one step
            logits.copy_(self._model.forward(batch, self._store))

        if self._memory is not None:
            _warm_up(forward)  # what fails here fails without a graph too
            try:
                return block, _captured(forward, self._memory)
            except torch.OutOfMemoryError:
                raise  # it says nothing about the kernels
            except RuntimeError as error:
                logger.warning("decode steps run without CUDA graphs, a kernel cannot be recorded: %s", error)
                self._memory = None
        return block, forward


def _warm_up(forward: Forward) -> None:
    """Runs `forward` on another stream, as a capture asks for: kernels compile, libraries allocate."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(2):
            forward()
    main.wait_stream(side)


def _captured(forward: Forward, memory: tuple[int, int]) -> Forward:
    """`forward` as a CUDA graph. Raises RuntimeError where it does what a graph cannot hold, such as to wait."""
    graph = torch.cuda.CUDAGraph()
    main = torch.cuda.current_stream()
    with torch.cuda.stream(main), torch.cuda.graph(graph, pool=memory):  # back on `main` whatever happens inside
        forward()
    return graph.replay
