"""Scoring: the logits of every token of a text, and the log-probabilities of a prompt.

A scored request computes every row and samples none. It leaves its pages in the cache, so that a prompt that is scored
first and answered afterwards is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import torch

from nanokv.core.errors import NanokvError
from nanokv.core.request import Request, SamplingParams
from nanokv.engine.loop import EngineLoop


def score_blocks(
    loop: EngineLoop, token_ids: list[int], params: SamplingParams | None = None
) -> Iterator[torch.Tensor]:
    """Logits of every position in blocks, float32 [rows, vocab], in steps that other requests share.

    params   of a request for the same text, for its cache_salt
    Raises   RequestError where the text cannot be served, NanokvError when scoring ends early
    """
    scored = replace(params or SamplingParams(), max_tokens=1, n=1)
    request = Request(token_ids, scored)
    blocks = request.logit_blocks = []
    seen = 0
    with closing(loop.submit(request)) as ticket:
        while ticket.advance() or blocks:
            ticket.take()
            while blocks:
                first, rows = blocks.pop(0)
                if first + len(rows) > seen:
                    yield rows[seen - first :]
                    seen = first + len(rows)
        if request.finish_reason != "length":
            raise NanokvError(f"scoring ended early: {request.error or request.finish_reason}")


def prompt_logprobs(loop: EngineLoop, token_ids: list[int], params: SamplingParams) -> list[dict[int, float] | None]:
    """The log-probability of each token of a prompt after those before it, and of the most likely tokens there.

    params    with prompt_logprobs, the number of most likely tokens
    Returns   for each token {token id: log-probability}; None for the first, which follows nothing
    Raises    as `score_blocks`
    """
    reports: list[dict[int, float] | None] = [None]
    for block in score_blocks(loop, token_ids, params):
        said = torch.tensor(token_ids[len(reports) :][: len(block)], dtype=torch.int64, device=block.device)
        scores = block[: len(said)].log_softmax(dim=-1)  # the row of the last token predicts the answer
        own = scores.gather(1, said[:, None])[:, 0].tolist()
        best = scores.topk(params.prompt_logprobs or 0, dim=-1)
        for token, score, ids, values in zip(
            said.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True
        ):
            reports.append({token: score, **dict(zip(ids, values, strict=True))})
    return reports
