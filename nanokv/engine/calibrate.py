"""measure_key_means: the means of keys that the option `center_keys` subtracts, measured before the first request."""

from __future__ import annotations

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs.pages import reason_unwritable
from nanokv.core.batch import Batch
from nanokv.core.config import EngineConfig
from nanokv.core.errors import CodecError, ConfigError
from nanokv.models.decoder import Decoder

TOKENS = 256
"""Random tokens whose keys are averaged: strong biases of keys hardly depend on the token or its position."""


@torch.inference_mode()
def measure_key_means(model: Decoder, store: CacheStore, config: EngineConfig, longest: int) -> None:
    """Sets the mean of each layer whose codec can subtract one, in one step over pages that are still free.

    Each layer subtracts its mean in this step already, so the layers above measure the keys that requests will have.

    store     CacheStore whose first pages and first state the step overwrites
    longest   tokens a request may reach
    Raises    ConfigError where no layer can use a mean, CodecError where the model's keys are not finite
    """
    key_means = model.key_means()
    if not key_means:
        raise ConfigError("center_keys=True: no layer of this model writes keys in codes (codec raw, or latents)")
    count = min(TOKENS, longest, len(store.pages) * config.page_size)
    tokens = torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    for key_mean in key_means:
        key_mean.measure()
    batch = first_pages(tokens, config.page_size, store)
    model.forward(batch, store)
    if batch.unwritable.any():
        raise CodecError(f"center_keys=True: {reason_unwritable(config.codec)}")


def first_pages(tokens: torch.Tensor, page_size: int, store: CacheStore) -> Batch:
    """A Batch of one request of `tokens`, int64 [rows], in the first pages and the first state of the store."""
    device = store.device
    positions = torch.arange(len(tokens), dtype=torch.int32, device=device)
    pages = positions // page_size
    return Batch(
        token_ids=tokens.to(device),
        positions=positions,
        write_pages=pages,
        write_slots=positions % page_size,
        request_starts=torch.tensor([0, len(tokens)], dtype=torch.int32, device=device),
        page_tables=torch.arange(store.layout.pages_for(len(tokens)), dtype=torch.int32, device=device)[None],
        logit_rows=torch.tensor([len(tokens) - 1], device=device),
        state_ids=torch.zeros(min(1, len(store.states)), dtype=torch.int32, device=device),
        page_size=page_size,
    )
