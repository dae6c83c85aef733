"""`bench request`: one request alone, and the largest share of its time that a cache hit can save.

A hit saves the prefill except the last token, which is still computed and takes about one decode step:

    prefill share = (TTFT - TPOT) / total

That is the ceiling. The measured saving is beside it: the same prompt again, found in the cache.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from nanokv.bench.measure import Answered, Ticker, check_length, closed_loop, no_tick, warm_up
from nanokv.bench.workloads import random_prompts
from nanokv.llm import LLM


def prefill_share(ttft_s: float, tpot_s: float, total_s: float) -> float:
    """The share of a request's time that a perfect cache hit would save, 0 to 1."""
    return max(0.0, ttft_s - tpot_s) / total_s


def measure_request(
    llm: LLM, prompt_tokens: int, output_tokens: int, repeat: int = 1, tick: Ticker = no_tick
) -> dict[str, Any]:
    """One row: medians of `repeat` requests on an empty cache, each followed by the same request on a full cache.

    tick     called after each request
    Raises   ConfigError where the request is too long for the model
    """
    check_length(llm, prompt_tokens, output_tokens)
    warm_up(llm, min(prompt_tokens, 512))
    miss: list[Answered] = []
    hit: list[Answered] = []
    for prompt in random_prompts(repeat, prompt_tokens, llm.model_config.vocab_size):
        miss += closed_loop(llm, [prompt], output_tokens, 1, tick).requests
        hit += closed_loop(llm, [prompt], output_tokens, 1, tick).requests
        llm.reset_prefix_cache()
    ttft, tpot, total = (median(getattr(one, name) for one in miss) for name in ("ttft_s", "tpot_s", "latency_s"))
    hit_total = median(one.latency_s for one in hit)
    return {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "repeats": repeat,
        "ttft_s": ttft,
        "tpot_s": tpot,
        "total_s": total,
        "prefill_tokens_per_s": prompt_tokens / ttft,
        "prefill_share": prefill_share(ttft, tpot, total),
        "hit_ttft_s": median(one.ttft_s for one in hit),
        "hit_total_s": hit_total,
        "hit_cached_tokens": hit[0].cached_tokens,
        "hit_saved_share": 1 - hit_total / total,
    }
