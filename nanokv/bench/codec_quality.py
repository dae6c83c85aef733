"""Quality of a codec: next-token distributions compared with those of the raw float32 cache.

    KL divergence     sum p log(p / q), p of the raw float32 cache, in nats a token: the measure to trust
    top-1 agreement   share of tokens whose most likely successor is the same
    perplexity        exp of the mean surprise at the text; by chance a damaged cache may have the lower one

Every number is one of a text; means and standard deviations are over texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
import torch.nn.functional as F

from nanokv.llm import LLM

ROWS = 128
"""Distributions compared at a time: a whole text of them would not fit in a cache."""

Texts = Mapping[str, Sequence[int]]
"""Token ids by name."""


@dataclass(frozen=True)
class Judged:
    """One text, or the mean of several.

    surprise   mean of -log p(next token), in nats
    """

    kl: float
    top1: float
    surprise: float


class Reference:
    """The distributions of the raw float32 cache, held in memory: tokens * vocab * 4 bytes a text.

    llm     a raw float32 engine, only used here
    """

    def __init__(self, llm: LLM, texts: Texts) -> None:
        self.texts = texts
        self._log_probs = {name: torch.cat(list(_log_probs(llm, ids))) for name, ids in texts.items()}

    def judge(self, llm: LLM, name: str) -> Judged:
        """Compares the distributions of `llm` over one text."""
        ids = torch.tensor(list(self.texts[name]))
        kl, same, surprise, row = 0.0, 0, 0.0, 0
        for q in _log_probs(llm, self.texts[name]):
            p = self._log_probs[name][row : row + len(q)]
            after = ids[row + 1 : row + 1 + len(q)]
            kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
            same += int((q.argmax(-1) == p.argmax(-1)).sum())
            surprise += F.nll_loss(q, after, reduction="sum").item()
            row += len(q)
        return Judged(kl / row, same / row, surprise / row)


def _log_probs(llm: LLM, ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """Distributions after each token but the last, as logarithms: float32 [ROWS or fewer, vocab], on the CPU."""
    left = len(ids) - 1
    llm.reset_prefix_cache()
    for block in llm.score_blocks(list(ids)):
        block = block[:left]
        left -= len(block)
        for rows in block.split(ROWS):
            yield rows.log_softmax(-1).cpu()


def summary(judged: Iterable[Judged], raw: Iterable[Judged]) -> dict[str, float]:
    """Means and standard deviations over texts; `raw` are those of the reference's engine."""
    judged, raw = list(judged), list(raw)
    perplexity = [torch.tensor(one.surprise).exp().item() for one in judged]
    ratio = [torch.tensor(one.surprise - other.surprise).exp().item() for one, other in zip(judged, raw, strict=True)]
    each = {
        "kl": [one.kl for one in judged],
        "top1_agreement": [one.top1 for one in judged],
        "perplexity": perplexity,
        "perplexity_ratio": ratio,
    }
    found = {}
    for name, values in each.items():
        found[name] = mean(values)
        found[f"{name}_std"] = stdev(values) if len(values) > 1 else 0.0
    return found
