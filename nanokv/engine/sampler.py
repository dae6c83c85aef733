"""Sampler: from logits to tokens. The random number of a token depends on (seed, sample, position) alone.

Order of the filters, as in vLLM and SGLang: repetition penalty, min_tokens, logits processors, temperature, top-k,
top-p, min-p. One uniform number a token comes from a counter-based generator and is looked up in the cumulated
probabilities, so other requests of the batch, preemption and transfers do not change a seeded sample.
Source: Philox (Salmon et al. 2011), the generator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from nanokv.core.request import Request
from nanokv.engine.logits_processors import process_logits

COLDEST = 1e-6
"""Temperatures up to this are greedy: smaller ones may be 0 in float32."""
CANDIDATES = 512
"""Most likely tokens considered first: a nucleus rarely needs more, and 512 of 49,152 sort in a tenth of the time."""


Logprobs = list[dict[int, float] | None]
"""For each row {token id: log-probability}, or None where the request asks for none."""


class SamplerOutput(Protocol):
    """The tokens of a step: on the device at once, on the host after `fetch`."""

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 [rows] on the device; undefined for rows with non-finite logits."""

    def fetch(self) -> tuple[list[int | None], Logprobs]:
        """Waits for the device. Returns the token of each row, None for non-finite logits, and the logprobs."""


@dataclass(frozen=True)
class HostSamplerOutput:
    """A SamplerOutput of tokens that were sampled on the host."""

    tokens: list[int | None]
    logprobs: Logprobs

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 [rows]; 0 for rows with non-finite logits."""
        return torch.tensor([0 if token is None else token for token in self.tokens], dtype=torch.int64)

    def fetch(self) -> tuple[list[int | None], Logprobs]:
        """The tokens and their logprobs."""
        return self.tokens, self.logprobs


@torch.inference_mode()
def sample(
    logits: torch.Tensor, requests: list[Request], last_token_ids: torch.Tensor, eos_token_ids: Collection[int]
) -> HostSamplerOutput:
    """Samples one token a row, on the host.

    logits           float32 [rows, vocab]; changed in place where a request has a penalty, min_tokens or a processor
    requests         the request of each row, advanced: the sampled token is at position request.num_computed
    last_token_ids   int64 [rows], the token of each row at the position before
    eos_token_ids    the model's end-of-sequence tokens
    Returns          tokens, and log-probabilities of the model's logits before penalty, temperature and filters
    """
    raw = [
        logits[row].log_softmax(dim=-1) if request.params.logprobs is not None else None
        for row, request in enumerate(requests)
    ]
    apply_penalties(logits, requests, last_token_ids, eos_token_ids)
    largest = logits.max(dim=-1)
    is_sound = largest.values.isfinite().tolist()
    tokens = [token if sound else None for token, sound in zip(largest.indices.tolist(), is_sound, strict=True)]
    drawn = [row for row, request in enumerate(requests) if is_sound[row] and is_drawn(request)]
    if drawn:
        temperatures = torch.tensor([requests[row].params.temperature for row in drawn], device=logits.device)
        # Subtracting the maximum first keeps a small temperature from overflowing to infinity.
        probabilities = ((logits[drawn] - largest.values[drawn, None]) / temperatures[:, None]).softmax(dim=-1)
        best = probabilities.topk(min(CANDIDATES, probabilities.shape[-1]), dim=-1)
        for i, row in enumerate(drawn):
            tokens[row] = _draw(requests[row], probabilities[i], best.values[i], best.indices[i])
    logprobs = [_report(scores, token, request) for scores, token, request in zip(raw, tokens, requests, strict=True)]
    return HostSamplerOutput(tokens, logprobs)


def is_drawn(request: Request) -> bool:
    """Whether the next token is drawn at random; else it is the most likely one."""
    return request.params.temperature > COLDEST


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    bits = np.random.Philox(key=seed % 2**128, counter=[position, index, 0, 0])
    return float(np.random.Generator(bits).random())


def uniform_of(request: Request) -> float:
    """The random number of the next token of a request."""
    return uniform(request.seed, request.index, request.num_computed)


def apply_penalties(
    logits: torch.Tensor, requests: list[Request], last_token_ids: torch.Tensor, eos_token_ids: Collection[int]
) -> None:
    """Applies the repetition penalty, min_tokens and logits processors in place; arguments as of `sample`.

    The last token of a request may be known on the device alone: it is in `last_token_ids`, not in request.tokens.
    """
    for i, request in enumerate(requests):
        params = request.params
        if params.repetition_penalty != 1.0:
            row, known = logits[i], np.array(request.tokens[: request.num_computed], np.int64)
            # A token may occur more than once in `seen`: every occurrence writes the same score.
            seen = torch.cat((torch.from_numpy(known).to(row.device), last_token_ids[i : i + 1]))
            scores = row[seen]
            row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        if request.num_computed - request.num_prompt < params.min_tokens:
            banned = [*params.stop_token_ids] if params.ignore_eos else [*params.stop_token_ids, *eos_token_ids]
            logits[i, banned] = -torch.inf
        if params.logits_processor:
            process_logits(logits[i], request, last_token_ids[i])


def _draw(request: Request, row: torch.Tensor, best: torch.Tensor, best_ids: torch.Tensor) -> int:
    """One token from one row of probabilities; `best` are its largest, descending, with their ids."""
    params = request.params
    if params.top_k == 0 and params.top_p == 1.0:
        kept, ids = row, None  # no need to sort: any fixed order will do
    elif (0 < params.top_k <= len(best)) or (params.top_k == 0 and float(best.sum()) >= params.top_p):
        kept, ids = best, best_ids
    else:
        kept, ids = row.sort(descending=True, stable=True)
    weights = kept.double().cpu().numpy()
    if params.top_k:
        weights = weights[: params.top_k]
    if params.top_p < 1.0:
        # After top-k the nucleus is measured within what top-k kept; a token stays if those before it hold less.
        total = weights.sum() if params.top_k else 1.0
        before = np.cumsum(weights) - weights
        weights = weights[: max(1, int(np.searchsorted(before, params.top_p * total, side="left")))]
    if params.min_p > 0.0:
        weights = np.where(weights >= params.min_p * weights.max(), weights, 0.0)
    cumulated = np.cumsum(weights)
    # Rounding must not carry the product up to the total: nothing lies beyond it.
    target = min(uniform_of(request) * cumulated[-1], np.nextafter(cumulated[-1], 0.0))
    place = int(np.searchsorted(cumulated, target, side="right"))
    return place if ids is None else int(ids[place])


def _report(scores: torch.Tensor | None, token: int | None, request: Request) -> dict[int, float] | None:
    if scores is None or token is None:
        return None
    logprobs_of_row = {token: float(scores[token])}
    if request.params.logprobs:
        top = scores.topk(min(request.params.logprobs, scores.shape[-1]))
        logprobs_of_row |= dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return logprobs_of_row
