"""Runner: from a plan to logits. Turns requests into one Batch of flat tensors and drives the decoder over the pool."""

from __future__ import annotations

import torch

from nanokv.cache.store import CacheStore
from nanokv.engine.arrival import Unwritable
from nanokv.engine.graphs import DecodeGraphs
from nanokv.engine.inputs import arrays_of, batch_of, on_device, take_late
from nanokv.engine.scheduler import StepPlan
from nanokv.models.decoder import Decoder


class Runner:
    """Runs planned steps of one model over one store of pages. Never waits for the device.

    codec   its name; it may refuse rows, unless it is raw
    """

    def __init__(self, model: Decoder, store: CacheStore, page_size: int, codec: str) -> None:
        self._model = model
        self._store = store
        self._page_size = page_size
        self._codec = codec
        self._graphs: DecodeGraphs | None = None

    def pad_decodes(self, max_rows: int, max_pages: int) -> None:
        """Run decode steps in sizes from a ladder (graphs.py). The store's last page and state must be nobody's."""
        self._graphs = DecodeGraphs(self._model, self._store, self._page_size, max_rows, max_pages)

    @torch.inference_mode()
    def run(
        self, plan: StepPlan, late_token_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Unwritable | None]:
        """Logits float32 [wanted, vocab], request after request, as many rows each as `num_logit_rows` says; the token
        of each of these rows, int64 [wanted]; and, where a codec may refuse some, which rows of the step it did.

        late_token_ids   int64, what the step before samples: where the tokens come from that are in flight
        """
        self.copy(plan)
        arrays = arrays_of(plan.requests, self._page_size)
        late = late_token_ids if arrays["is_late"].any() else None
        if self._graphs is not None and self._graphs.fit(arrays):
            logits, tokens, refused = self._graphs.run(arrays, late)
            return logits, tokens, self._unwritable(refused)
        views = on_device(arrays, self._store.pool.device)
        if late is not None:
            take_late(views, late)
        batch = batch_of(views, self._page_size)
        logits = self._model.forward(batch, self._store)
        return logits, batch.token_ids[batch.logit_rows], self._unwritable(batch.unwritable)

    def _unwritable(self, rows: torch.Tensor) -> Unwritable | None:
        return None if self._codec == "raw" else Unwritable(rows, self._codec)

    def copy(self, plan: StepPlan) -> None:
        """Makes the copies of a plan, which come before everything else that is done for it."""
        self._store.copy_pages(plan.page_copies)
        self._store.copy_states(plan.state_copies)
        plan.page_copies, plan.state_copies = [], []  # done: what fails from here on loses no checkpoint
