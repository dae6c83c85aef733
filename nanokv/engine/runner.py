"""Runner: from a plan to logits. Turns requests into one Batch of flat tensors and drives the decoder over the pool."""

from __future__ import annotations

import numpy as np
import torch

from nanokv.cache.store import CacheStore
from nanokv.core.batch import Batch
from nanokv.core.request import Request
from nanokv.engine.scheduler import StepPlan
from nanokv.models.decoder import Decoder


class Runner:
    """Runs planned steps of one model over one store of pages."""

    def __init__(self, model: Decoder, store: CacheStore, page_size: int) -> None:
        self._model = model
        self._store = store
        self._page_size = page_size

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Logits float32 [wanted rows, vocab]: request after request, as many rows each as `num_logit_rows` says."""
        self._store.copy_pages(plan.page_copies)
        self._store.copy_states(plan.state_copies)
        plan.state_copies = []  # done: what fails from here on loses no checkpoint
        return self._model.forward(build_batch(plan.requests, self._page_size, self._store.pool.device), self._store)


def num_logit_rows(request: Request) -> int:
    """Rows whose logits the step must give: all when scoring, one when it computes the last known token, else none."""
    if request.wants_all_logits:
        return request.num_scheduled
    return 1 if request.num_scheduled == request.num_to_compute else 0


def build_batch(requests: list[Request], page_size: int, device: torch.device) -> Batch:
    """One step as flat tensors; `requests` have num_scheduled > 0 and pages for all tokens up to there."""
    counts = np.array([request.num_scheduled for request in requests], np.int32)
    starts = np.zeros(len(requests) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    tables = np.zeros((len(requests), max(len(request.pages) for request in requests)), np.int32)
    token_ids = np.empty(starts[-1], np.int64)
    first_positions = np.empty(len(requests), np.int32)
    logit_rows: list[int] = []
    for i, request in enumerate(requests):
        computed, scheduled, end = request.num_computed, request.num_scheduled, int(starts[i + 1])
        token_ids[end - scheduled : end] = request.tokens[computed : computed + scheduled]
        first_positions[i] = computed
        tables[i, : len(request.pages)] = request.pages
        logit_rows.extend(range(end - num_logit_rows(request), end))
    owners = np.repeat(np.arange(len(requests), dtype=np.int32), counts)
    positions = np.arange(starts[-1], dtype=np.int32) - starts[owners] + first_positions[owners]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        write_pages=tensor(tables[owners, positions // page_size]),
        write_slots=tensor(positions % page_size),
        request_starts=tensor(starts),
        page_tables=tensor(tables),
        logit_rows=tensor(np.array(logit_rows, np.int64)),
        state_ids=tensor(np.array([r.state_id for r in requests if r.state_id is not None], np.int32)),
        page_size=page_size,
    )
