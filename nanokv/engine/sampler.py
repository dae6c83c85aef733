"""Sampler: from logits to tokens. The noise of a sample depends on (seed, sample index, position) and on nothing else.

Order of the filters, as in the field: min_tokens, repetition penalty, temperature, top-k, top-p, min-p. One uniform
number a token is drawn from a counter-based generator (Salmon et al. 2011, Philox) and looked up in the cumulated
probabilities, so neither batch mates nor preemption nor a hand-over to another process can change a seeded sample.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from nanokv.core.request import Request

COLDEST = 1e-6
"""Temperatures below this are as good as greedy, and in float32 they would divide by zero."""
CANDIDATES = 512
"""Most likely tokens looked at first: a nucleus rarely needs more, and 512 of 49,152 sort in a tenth of the time."""


@torch.inference_mode()
def sample(
    logits: torch.Tensor, requests: list[Request], eos_token_ids: Collection[int]
) -> tuple[list[int | None], list[dict[int, float] | None]]:
    """One token a row; None where the row's logits are not finite.

    logits    float32 [rows, vocab]; changed in place where a request asks for a penalty or min_tokens
    requests  the request of each row; the token sampled stands at position request.num_tokens
    Returns   the tokens, and for each row {token id: log-probability} where it was asked for, else None.
              Log-probabilities are the model's own, before penalty, temperature and filters.
    """
    raw = [_log_probabilities(logits[row], request) for row, request in enumerate(requests)]
    for row, request in enumerate(requests):
        _shape(logits[row], request, eos_token_ids)
    largest = logits.max(dim=-1)
    is_sound = largest.values.isfinite().tolist()
    tokens = [token if sound else None for token, sound in zip(largest.indices.tolist(), is_sound, strict=True)]
    drawn = [row for row, request in enumerate(requests) if is_sound[row] and request.params.temperature > COLDEST]
    if drawn:
        temperatures = torch.tensor([requests[row].params.temperature for row in drawn], device=logits.device)
        # Subtracting the maximum first keeps a small temperature from overflowing to infinity.
        probabilities = ((logits[drawn] - largest.values[drawn, None]) / temperatures[:, None]).softmax(dim=-1)
        best = probabilities.topk(min(CANDIDATES, probabilities.shape[-1]), dim=-1)
        for i, row in enumerate(drawn):
            tokens[row] = _draw(requests[row], probabilities[i], best.values[i], best.indices[i])
    return tokens, [
        _report(scores, token, request) for scores, token, request in zip(raw, tokens, requests, strict=True)
    ]


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    bits = np.random.Philox(key=seed % 2**128, counter=[position, index, 0, 0])
    return float(np.random.Generator(bits).random())


def _shape(row: torch.Tensor, request: Request, eos_token_ids: Collection[int]) -> None:
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.array(request.tokens, np.int64))).to(row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if request.num_generated < params.min_tokens:
        banned = [*params.stop_token_ids] if params.ignore_eos else [*params.stop_token_ids, *eos_token_ids]
        row[banned] = -torch.inf


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
    target = min(
        uniform(request.seed, request.index, request.num_tokens) * cumulated[-1], np.nextafter(cumulated[-1], 0.0)
    )
    place = int(np.searchsorted(cumulated, target, side="right"))
    return place if ids is None else int(ids[place])


def _log_probabilities(row: torch.Tensor, request: Request) -> torch.Tensor | None:
    return row.log_softmax(dim=-1) if request.params.logprobs is not None else None


def _report(scores: torch.Tensor | None, token: int | None, request: Request) -> dict[int, float] | None:
    if scores is None or token is None:
        return None
    report = {token: float(scores[token])}
    if request.params.logprobs:
        top = scores.topk(min(request.params.logprobs, scores.shape[-1]))
        report |= dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return report
