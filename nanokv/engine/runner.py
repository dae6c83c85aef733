"""Runner: from planned requests to logits. Makes one Batch of flat tensors and drives the decoder over the store."""

from __future__ import annotations

import torch

from nanokv.cache.contract import Moves
from nanokv.cache.store import CacheStore
from nanokv.core.request import Request
from nanokv.engine.graphs import DecodeGraphs
from nanokv.engine.host_copy import UnwritableRows
from nanokv.engine.inputs import arrays_of, batch_of, on_device, take_in_flight
from nanokv.models.decoder import Between, Decoder


class Runner:
    """Runs planned steps of one model over one store of pages. Never waits for the device.

    codec     its name; it may refuse rows, unless it is raw
    between   called after each layer (Decoder.forward), or None
    """

    def __init__(
        self, model: Decoder, store: CacheStore, page_size: int, codec: str, between: Between | None = None
    ) -> None:
        self._model = model
        self._store = store
        self._page_size = page_size
        self._codec = codec
        self._between = between
        self._graphs: DecodeGraphs | None = None

    def pad_decodes(self, max_rows: int, max_pages: int) -> None:
        """Runs decode steps in sizes from a ladder (graphs.py). No request may own the store's last page and state."""
        self._graphs = DecodeGraphs(self._model, self._store, self._page_size, max_rows, max_pages)

    @torch.inference_mode()
    def run(
        self, requests: list[Request], in_flight_token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, UnwritableRows | None]:
        """Logits float32 [wanted, vocab], request after request, as many rows each as `num_logit_rows` says; the token
        of each of these rows, int64 [wanted]; and, where a codec may refuse some, which rows of the step it did.

        in_flight_token_ids   int64, the tokens that the previous step samples, known to the device only
        """
        arrays = arrays_of(requests, self._page_size)
        in_flight = in_flight_token_ids if arrays["is_in_flight"].any() else None
        if self._graphs is not None and self._graphs.fit(arrays):
            logits, tokens, refused = self._graphs.run(arrays, in_flight)
            return logits, tokens, self._unwritable(refused)
        views = on_device(arrays, self._store.device)
        if in_flight is not None:
            take_in_flight(views, in_flight)
        batch = batch_of(views, self._page_size)
        logits = self._model.forward(batch, self._store, self._between)
        return logits, batch.token_ids[batch.logit_rows], self._unwritable(batch.unwritable)

    def _unwritable(self, rows: torch.Tensor) -> UnwritableRows | None:
        return None if self._codec == "raw" else UnwritableRows(rows, self._codec)

    @torch.inference_mode()
    def move(self, moves: Moves) -> None:
        """Makes the copies of a plan, before everything else that is done for it."""
        self._store.pages.copy(moves.pages)
        self._store.states.copy(moves.states)
        moves.done = True
