"""The sampler for a GPU: the filters and random numbers of sampler.py for all rows at once, without a wait.

The host reads no number: where sampler.py checks whether a nucleus fits into the most likely tokens, this sampler
sorts. Tokens equal those of sampler.py up to the rounding of a sum.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from nanokv.core.request import Request
from nanokv.engine.host_copy import HostCopy
from nanokv.engine.inputs import on_device
from nanokv.engine.sampler import Logprobs, apply_penalties, is_drawn, uniform_of

MOST_SORTED_BY_TOPK = 1024
"""Largest top_k for which tokens are selected; above it a sort costs no more."""


class DeviceSamplerOutput:
    """A SamplerOutput of tokens on the device, whose copies to the host have begun.

    token_ids   int64 [rows]
    parts       tensors [rows, ...] to copy: "tokens", "is_sound", and for logprobs "scores", "best_ids", "best_scores"
    wanted      SamplingParams.logprobs of each row
    """

    def __init__(self, token_ids: torch.Tensor, parts: dict[str, torch.Tensor], wanted: list[int | None]) -> None:
        self.token_ids = token_ids
        self._wanted = wanted
        self._copy = HostCopy(parts)

    def fetch(self) -> tuple[list[int | None], Logprobs]:
        """Waits for the copies. Returns the token of each row, None for non-finite logits, and the logprobs."""
        parts = self._copy.fetch()
        tokens = [token if sound else None for token, sound in zip(parts["tokens"], parts["is_sound"], strict=True)]
        logprobs: Logprobs = [None] * len(tokens)
        for row, (token, wanted) in enumerate(zip(tokens, self._wanted, strict=True)):
            if token is not None and wanted is not None:
                best = zip(parts["best_ids"][row][:wanted], parts["best_scores"][row][:wanted], strict=True)
                logprobs[row] = {token: parts["scores"][row], **dict(best)}
        return tokens, logprobs


@torch.inference_mode()
def sample_on_device(
    logits: torch.Tensor, requests: list[Request], last_token_ids: torch.Tensor, eos_token_ids: Collection[int]
) -> DeviceSamplerOutput:
    """Samples one token a row, on any device; arguments and result as of `sampler.sample`."""
    wanted = [request.params.logprobs for request in requests]
    raw = logits.log_softmax(dim=-1) if any(count is not None for count in wanted) else None
    apply_penalties(logits, requests, last_token_ids, eos_token_ids)
    largest = logits.max(dim=-1)
    tokens = largest.indices
    for rows, top_k in _groups(requests):
        chosen = [requests[row] for row in rows]
        _draw(tokens, logits, largest.values, chosen, rows, top_k)
    parts = {"tokens": tokens, "is_sound": largest.values.isfinite()}
    if raw is not None:
        best = raw.topk(max(count or 0 for count in wanted), dim=-1)
        parts |= {"scores": raw.gather(1, tokens[:, None])[:, 0], "best_ids": best.indices, "best_scores": best.values}
    return DeviceSamplerOutput(tokens, parts, wanted)


def _groups(requests: list[Request]) -> list[tuple[list[int], int | None]]:
    """The drawn rows by the work they need: (rows, number of tokens to select; 0: all in any order, None: sort all)."""
    groups: dict[str, list[int]] = {"any order": [], "selected": [], "sorted": []}
    for row, request in enumerate(requests):
        params = request.params
        if is_drawn(request):
            is_selected = 0 < params.top_k <= MOST_SORTED_BY_TOPK
            is_plain = params.top_k == 0 and params.top_p == 1.0
            groups["selected" if is_selected else "any order" if is_plain else "sorted"].append(row)
    most = max((requests[row].params.top_k for row in groups["selected"]), default=0)
    sizes = {"any order": 0, "selected": most, "sorted": None}
    return [(rows, sizes[name]) for name, rows in groups.items() if rows]


def _draw(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    largest: torch.Tensor,
    requests: list[Request],
    rows: list[int],
    select: int | None,
) -> None:
    """Draws a token for each of `rows` and writes it into `tokens`.

    tokens     int64 [all rows]
    logits     float32 [all rows, vocab]
    largest    float32 [all rows], the largest logit of each row
    requests   of `rows`
    select     number of most likely tokens to select first; 0: all in any order, None: sort all
    """
    params = [request.params for request in requests]
    on = on_device(
        {
            "rows": np.array(rows, np.int64),
            "uniform": np.array([uniform_of(request) for request in requests]),
            "top_p": np.array([p.top_p for p in params]),
            "min_p": np.array([p.min_p for p in params]),
            "top_k": np.array([p.top_k or logits.shape[1] for p in params], np.int64),
            "has_top_k": np.array([p.top_k > 0 for p in params]),
            "temperature": np.array([p.temperature for p in params], np.float32),
        },
        logits.device,
    )
    kept, top = (logits, largest) if len(rows) == len(logits) else (logits[on["rows"]], largest[on["rows"]])
    kept, ids = ((kept - top[:, None]) / on["temperature"][:, None]).softmax(dim=-1), None
    if select is None:
        kept, ids = kept.sort(dim=-1, descending=True, stable=True)
    elif select:
        kept, ids = kept.topk(min(select, kept.shape[1]), dim=-1)
    weights = kept.double()
    if ids is not None:
        places = torch.arange(weights.shape[1], device=weights.device)
        weights = weights.masked_fill(places >= on["top_k"][:, None], 0.0)
        # After top-k the nucleus is measured within what top-k kept; a token stays if those before it hold less.
        total = torch.where(on["has_top_k"], weights.sum(-1), 1.0)
        before = weights.cumsum(-1) - weights
        is_out = (before >= (on["top_p"] * total)[:, None]) & (on["top_p"] < 1.0)[:, None]
        is_out[:, 0] = False
        weights = weights.masked_fill(is_out, 0.0)
    weights = weights.masked_fill(weights < on["min_p"][:, None] * weights.amax(-1, keepdim=True), 0.0)
    cumulated = weights.cumsum(-1)
    end = cumulated[:, -1]
    # Rounding must not carry the product up to the total: nothing lies beyond it.
    target = torch.minimum(on["uniform"] * end, torch.nextafter(end, torch.zeros_like(end)))
    place = torch.searchsorted(cumulated, target[:, None], right=True).clamp(max=weights.shape[1] - 1)
    tokens.index_copy_(0, on["rows"], (place if ids is None else ids.gather(1, place))[:, 0])
