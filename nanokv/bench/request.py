"""`bench request`: one request alone, and the largest share of its time that a cache hit can save.

A hit saves the prefill except the last token, which is still computed and takes about one decode step:

    prefill share = (TTFT - TPOT) / total

That is the ceiling. The measured saving is beside it: the same prompt again, found in the cache. A saving below 0 or
over 105 % of the ceiling is impossible, and marked as noise.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from nanokv.bench.measure import (
    Answered,
    Found,
    Ticker,
    check_length,
    closed_loop,
    is_noise,
    no_tick,
    not_kept,
    ranged,
    warm_up,
)
from nanokv.bench.workloads import random_prompts
from nanokv.llm import LLM


def prefill_share(ttft_s: float, tpot_s: float, total_s: float) -> float:
    """The share of a request's time that a perfect cache hit would save, 0 to 1."""
    return max(0.0, ttft_s - tpot_s) / total_s


def measure_request(
    llm: LLM,
    prompt_tokens: int,
    output_tokens: int,
    repeat: int = 1,
    tick: Ticker = no_tick,
    found: Found = not_kept,
) -> dict[str, Any]:
    """One row: medians of `repeat` requests on an empty cache, each followed by the same request on a full cache.

    tick     called after each request
    found    called with the row after each repeat
    Raises   ConfigError where the request is too long for the model
    """
    check_length(llm, prompt_tokens, output_tokens)
    warm_up(llm, min(prompt_tokens, 512))
    miss: list[Answered] = []
    hit: list[Answered] = []
    row: dict[str, Any] = {}
    for prompt in random_prompts(repeat, prompt_tokens, llm.model_config.vocab_size):
        miss += closed_loop(llm, [prompt], output_tokens, 1, tick).requests
        hit += closed_loop(llm, [prompt], output_tokens, 1, tick).requests
        llm.reset_prefix_cache()
        row = _row(miss, hit)
        found(row)
    return row


def _row(miss: list[Answered], hit: list[Answered]) -> dict[str, Any]:
    ttft, tpot, total = (median(getattr(one, name) for one in miss) for name in ("ttft_s", "tpot_s", "latency_s"))
    share = prefill_share(ttft, tpot, total)
    saved = [1 - with_hit.latency_s / without.latency_s for without, with_hit in zip(miss, hit, strict=True)]
    return {
        "prompt_tokens": miss[0].prompt_tokens,
        "output_tokens": miss[0].output_tokens,
        "repeats": len(miss),
        **ranged("ttft_s", [one.ttft_s for one in miss]),
        **ranged("tpot_s", [one.tpot_s for one in miss]),
        **ranged("total_s", [one.latency_s for one in miss]),
        "prefill_tokens_per_s": miss[0].prompt_tokens / ttft,
        "prefill_share": share,
        **ranged("hit_ttft_s", [one.ttft_s for one in hit]),
        **ranged("hit_total_s", [one.latency_s for one in hit]),
        "hit_cached_tokens": hit[0].cached_tokens,
        **ranged("hit_saved_share", saved),
        "noise": is_noise(median(saved), share),
    }
