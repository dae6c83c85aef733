"""Profile runs: steps over stores of their own, to measure the memory of a step or to compile kernels. Their results
are dropped."""

from __future__ import annotations

import numpy as np
import torch

from nanokv.cache.store import CacheStore
from nanokv.core.config import EngineConfig
from nanokv.core.request import Request, SamplingParams
from nanokv.core.spec import PageLayout
from nanokv.engine.device_sampler import sample_on_device
from nanokv.engine.inputs import batch_of, on_device
from nanokv.engine.scheduler import SCORE_ROWS
from nanokv.models.decoder import Decoder

SMALL = 64
"""Tokens of a short prompt."""


def run_largest_step(config: EngineConfig, model: Decoder, layout: PageLayout, device: torch.device) -> None:
    """Runs a prompt of max_step_tokens and samples max_requests rows, over a store of one page and one state.

    Every token is written to that page: the numbers are meaningless, the allocations are those of a real step.
    """
    num_rows = min(config.max_step_tokens, model.config.max_positions)
    wanted = min(num_rows, max(config.max_requests, SCORE_ROWS))
    tables = np.zeros((1, layout.pages_for(num_rows)), np.int32)
    logits = _run(np.arange(num_rows, dtype=np.int32), tables, wanted, model, layout, device)
    requests = [Request([0], SamplingParams(top_p=0.9)) for _ in range(min(config.max_requests, wanted))]
    last = torch.zeros(len(requests), dtype=torch.int64, device=device)
    sample_on_device(logits[: len(requests)], requests, last, ()).fetch()


def run_reading_step(
    num_pages: int, num_rows: int, config: EngineConfig, model: Decoder, layout: PageLayout, device: torch.device
) -> None:
    """Runs requests that together read `num_pages` pages, a power of two, over a store of as many.

    num_rows   rows of all requests together, the last tokens of each; at least one a request
    """
    longest = model.config.max_positions
    # Pages of one request: a power of two too, so that it divides num_pages.
    each = min(num_pages, 1 << max(1, longest // config.page_size).bit_length() - 1)
    tables = np.arange(num_pages, dtype=np.int32).reshape(-1, each)
    end = min(each * config.page_size, longest)
    count = min(max(1, num_rows // len(tables)), end)
    positions = np.tile(np.arange(end - count, end, dtype=np.int32), len(tables))
    _run(positions, tables, 1, model, layout, device)


def run_small_step(model: Decoder, layout: PageLayout, device: torch.device) -> None:
    """Runs a short prompt, so that the kernels of a prefill are compiled and loaded before the first request."""
    num_rows = min(SMALL, model.config.max_positions)
    tables = np.arange(layout.pages_for(num_rows), dtype=np.int32)[None]
    _run(np.arange(num_rows, dtype=np.int32), tables, 1, model, layout, device)


@torch.inference_mode()
def _run(
    positions: np.ndarray, tables: np.ndarray, wanted: int, model: Decoder, layout: PageLayout, device: torch.device
) -> torch.Tensor:
    """Runs a step over a new store.

    positions   int32 [rows], of the requests one after the other, each with as many rows
    tables      int32 [requests, pages], the page table of each request
    wanted      the first rows, whose logits are computed
    Returns     float32 [wanted, vocab]
    """
    rows, requests = len(positions), len(tables)
    owners = np.repeat(np.arange(requests), rows // requests)
    arrays = {
        "token_ids": np.zeros(rows, np.int64),
        "positions": positions,
        "write_pages": tables[owners, positions // layout.page_size],
        "write_slots": positions % layout.page_size,
        "request_starts": np.arange(requests + 1, dtype=np.int32) * (rows // requests),
        "page_tables": tables,
        "logit_rows": np.arange(wanted, dtype=np.int64),
        "state_ids": np.zeros(requests if layout.state_bytes else 0, np.int32),
    }
    store = CacheStore(layout, int(tables.max()) + 1, device, num_states=min(1, len(arrays["state_ids"])))
    return model.forward(batch_of(on_device(arrays, device), layout.page_size), store)
