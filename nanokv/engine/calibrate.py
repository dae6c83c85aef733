"""The common offset of keys: its mean, which the option `center_keys` subtracts, and a warning where the option would
help. Both are measured before the first request."""

from __future__ import annotations

import logging

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs.pages import reason_unwritable
from nanokv.core.batch import Batch
from nanokv.core.config import EngineConfig
from nanokv.core.errors import CodecError, ConfigError
from nanokv.models.decoder import Decoder

logger = logging.getLogger("nanokv")

TOKENS = 256
"""Random tokens whose keys are averaged: strong biases of keys hardly depend on the token or its position."""

FEW_TOKENS = 64
"""Tokens that show whether there is such a bias; of SmolLM2's layers they give the offset of 256 within 5 %."""
LARGE_OFFSET = 4.0
"""The offset (`KeyMean.offset`) from which codes lose too much. The scale of a vector grows with its length, so errors
grow by sqrt(1 + offset ** 2). In a random Llama with a bias of keys, the KL divergence from the raw cache was that of
centered keys times 1.4 at an offset of 0.9 (tq4), 2.2 at 1.8, 3.8 at 3.6 and 5.4 at 6.7; of fp8 1.3, 3.2, 7.5 and 17.
kivi, whose groups have a minimum, loses nothing. The layers of SmolLM2 have 1.4 to 2.7."""


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
    for key_mean in key_means:
        key_mean.measure()
    batch = _run(TOKENS, model, store, config, longest)
    if batch.unwritable.any():
        raise CodecError(f"center_keys=True: {reason_unwritable(config.codec)}")


@torch.inference_mode()
def warn_of_offsets(model: Decoder, store: CacheStore, config: EngineConfig, longest: int) -> None:
    """Logs a warning where keys of some layers have a common offset so large that their codes lose what raw keeps.

    Runs one step, as `measure_key_means` does; the step changes nothing that lasts.
    """
    key_means = [one for one in model.key_means() if one.is_lossy]
    if not key_means:
        return
    for key_mean in key_means:
        key_mean.measure_offset()
    _run(FEW_TOKENS, model, store, config, longest)
    offsets = torch.stack([one.offset for one in key_means if one.offset is not None])
    large = int((offsets >= LARGE_OFFSET).sum())
    if large:
        layers = f"{large} layer{'' if large == 1 else 's'}"
        many = f"the keys of {layers} have a large common offset (up to {float(offsets.max()):.1f} times their spread)"
        logger.warning("%s: codec %s loses what differs between them; use --center-keys", many, config.codec)


def _run(count: int, model: Decoder, store: CacheStore, config: EngineConfig, longest: int) -> Batch:
    """Runs a step of at most `count` random tokens over the first pages of the store."""
    count = min(count, longest, len(store.pages) * config.page_size)
    tokens = torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    batch = first_pages(tokens, config.page_size, store)
    model.forward(batch, store)
    return batch


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
