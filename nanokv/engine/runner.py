"""Runner: from planned requests to logits. Makes one Batch of flat tensors and runs the decoder over the store."""

from __future__ import annotations

import torch

from nanokv.cache.contract import Moves
from nanokv.cache.store import CacheStore
from nanokv.core.request import Request
from nanokv.engine.graphs import DecodeGraphs
from nanokv.engine.host_copy import UnwritableRows
from nanokv.engine.inputs import Arrays, arrays_of, batch_of, on_device, take_in_flight
from nanokv.engine.interrupts import Interrupts
from nanokv.engine.replays import DecodeReplays
from nanokv.models.decoder import Between, Decoder


class Runner:
    """Runs planned steps of one model over one store of pages. Never waits for the device.

    codec     name of the codec; any but "raw" may refuse rows
    between   called after each layer (Decoder.forward), or None
    interrupts   delivers Ctrl-C during a forward pass; None: nothing delays it
    """

    def __init__(
        self,
        model: Decoder,
        store: CacheStore,
        page_size: int,
        codec: str,
        between: Between | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        self._model = model
        self._store = store
        self._page_size = page_size
        self._codec = codec
        self._between = between
        self._interrupts = interrupts if interrupts is not None else Interrupts()
        self._graphs: DecodeGraphs | None = None
        self._replays: DecodeReplays | None = None

    def pad_decodes(self, max_rows: int, max_pages: int) -> None:
        """Runs decode steps in a few fixed sizes from now on (graphs.py), of up to `max_rows` requests of up to
        `max_pages` pages. The last page and the last state of the store must have no owner."""
        self._graphs = DecodeGraphs(self._model, self._store, self._page_size, max_rows, max_pages)

    def replay_decodes(self, max_rows: int, max_pages: int) -> None:
        """Records the layers of decode steps on a CPU from now on (replays.py), of up to `max_rows` requests of up to
        `max_pages` pages."""
        self._replays = DecodeReplays(self._model, self._store, self._page_size, max_rows, max_pages)

    @torch.inference_mode()
    def run(
        self, requests: list[Request], in_flight_token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, UnwritableRows | None]:
        """Computes the scheduled tokens of these requests.

        in_flight_token_ids   int64, the samples of the previous step, which only the device knows; None: none
        Returns               logits float32 [wanted, vocab], `num_logit_rows` of each request in turn; the token of
                              each of these rows, int64 [wanted]; and the rows of the step that the codec has refused,
                              None for a codec that refuses none
        """
        arrays = arrays_of(requests, self._page_size)
        in_flight = in_flight_token_ids if arrays["is_in_flight"].any() else None
        if self._graphs is not None and self._graphs.fit(arrays):
            logits, tokens, refused = self._graphs.run(arrays, in_flight)
            return logits, tokens, self._unwritable(refused)
        with self._interrupts.forward_pass():
            replayed = self._replays.run(arrays, in_flight) if self._replays is not None else None
            logits, tokens, refused = replayed or self._forward(arrays, in_flight)
        return logits, tokens, self._unwritable(refused)

    def _forward(
        self, arrays: Arrays, in_flight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        views = on_device(arrays, self._store.device)
        if in_flight is not None:
            take_in_flight(views, in_flight)
        batch = batch_of(views, self._page_size)
        logits = self._model.forward(batch, self._store, self._between)
        return logits, batch.token_ids[batch.logit_rows], batch.unwritable

    def _unwritable(self, rows: torch.Tensor) -> UnwritableRows | None:
        return None if self._codec == "raw" else UnwritableRows(rows, self._codec)

    @torch.inference_mode()
    def move(self, moves: Moves) -> None:
        """Runs the copies of a plan, before its forward pass."""
        self._store.pages.copy(moves.pages)
        self._store.states.copy(moves.states)
        moves.done = True
