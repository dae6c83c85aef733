"""`bench prefix`: prefix caching under load. The shared prefix of prompts of fixed length sweeps from none to all.

Each point begins with an empty cache. Where prompts share tokens, two untimed requests put the prefix into it: two,
because recurrent layers make a checkpoint where the second branches off. Then a closed loop answers `requests` of them.

The ceiling is the speed of a perfect cache, from speeds measured in the same run:

    time = uncached prompt tokens / prefill speed + output tokens after the first / decode speed
    requests/s = requests / time        mean latency = concurrency / (requests/s)

uncached   tokens to compute although every shared token is cached: a match is whole pages and leaves one token
prefill    tokens/s of one prompt of this length, alone, on an empty cache
decode     tokens/s of `concurrency` requests that share as many tokens, in the middle of their answers. The prefill
           gives the first token of an answer, which costs no step of its own.

Requests whose uncached parts are computed in one step may exceed it a little. A point over 105 % of it is marked as
noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from nanokv.bench.measure import (
    Found,
    Loop,
    Ticker,
    check_length,
    closed_loop,
    decode_speed,
    is_noise,
    no_tick,
    not_kept,
    percentile,
    prefill_speed,
    ranged,
    spread,
    warm_up,
)
from nanokv.bench.workloads import shared_prefix_prompts
from nanokv.llm import LLM

DECODE_STEPS = 8


@dataclass(frozen=True)
class Speeds:
    """Tokens per second: of a prefill alone, and of decoding at each (concurrency, shared tokens)."""

    prefill: float
    decode: dict[tuple[int, int], float]


def matchable(prompt_tokens: int, shared: int, page_size: int) -> int:
    """Tokens of a prompt that a perfect cache finds: whole pages of the shared part, and not the last token."""
    return min(shared, prompt_tokens - 1) // page_size * page_size


def ceiling_requests_per_s(uncached: float, output_tokens: int, prefill: float, decode: float) -> float:
    """Requests per second of a perfect cache; `uncached` prompt tokens of each request must be computed."""
    return 1 / (uncached / prefill + (output_tokens - 1) / decode)


def requests_for(concurrency: int, requests: int | None) -> int:
    """Requests of one point: as given, at least one per client; by default two per client, at least four."""
    return max(4, 2 * concurrency) if requests is None else max(requests, concurrency)


def measure_speeds(llm: LLM, prompt_tokens: int, output_tokens: int, points: Iterable[tuple[int, int]]) -> Speeds:
    """The speeds that the ceiling is computed from; `points` are (concurrency, shared tokens)."""
    context = prompt_tokens + output_tokens // 2
    decode = {point: decode_speed(llm, point[0], context, DECODE_STEPS, point[1]) for point in points}
    return Speeds(prefill_speed(llm, prompt_tokens), decode)


def measure_prefix(
    llm: LLM,
    prompt_tokens: int,
    output_tokens: int,
    shared: Sequence[float],
    concurrency: Sequence[int],
    requests: int | None = None,
    repeat: int = 1,
    tick: Ticker = no_tick,
    found: Found = not_kept,
) -> list[dict[str, Any]]:
    """A row for each concurrency and shared part.

    shared       shares of the prompt, 0 to 1
    concurrency  clients in the closed loop
    requests     of one point; None: see requests_for
    repeat       runs of each point; its row holds the run whose requests/s is the median
    tick         called after each timed request
    found        called with a point's row after each repeat
    Raises       ConfigError where the requests are too long for the model
    """
    check_length(llm, prompt_tokens, output_tokens)
    warm_up(llm, prompt_tokens)
    points = [(clients, round(part * prompt_tokens)) for clients in concurrency for part in shared]
    speeds = measure_speeds(llm, prompt_tokens, output_tokens, points)
    rows = []
    for clients, tokens in points:
        count = requests_for(clients, requests)
        loops: list[Loop] = []
        for seed in range(repeat):
            loops.append(run_point(llm, prompt_tokens, output_tokens, tokens, clients, count, seed, tick))
            row = _row(llm, loops, prompt_tokens, output_tokens, tokens, clients, speeds)
            found(row)
        rows.append(row)
    return rows


def run_point(
    llm: LLM,
    prompt_tokens: int,
    output_tokens: int,
    shared: int,
    concurrency: int,
    requests: int,
    seed: int = 0,
    tick: Ticker = no_tick,
) -> Loop:
    """Runs one point of the sweep, on a cache that holds the shared prefix and nothing else."""
    prompts = shared_prefix_prompts(requests + 2, prompt_tokens, shared, llm.model_config.vocab_size, seed)
    llm.reset_prefix_cache()
    if shared:
        closed_loop(llm, prompts[:2], 1, 1)
    return closed_loop(llm, prompts[2:], output_tokens, concurrency, tick)


def _row(
    llm: LLM, loops: list[Loop], prompt_tokens: int, output_tokens: int, shared: int, concurrency: int, speeds: Speeds
) -> dict[str, Any]:
    loop = sorted(loops, key=lambda one: one.requests_per_s)[len(loops) // 2]
    uncached = prompt_tokens - matchable(prompt_tokens, shared, llm.config.page_size)
    decode = speeds.decode[concurrency, shared]
    ceiling = ceiling_requests_per_s(uncached, output_tokens, speeds.prefill, decode)
    prompts = len(loop.requests) * prompt_tokens

    def over(name: str, number: Callable[[Loop], float]) -> dict[str, float]:
        return ranged(name, [number(one) for one in loops], number(loop))

    def ttft(share: float) -> Callable[[Loop], float]:
        return lambda one: percentile([request.ttft_s for request in one.requests], share)

    return {
        "concurrency": concurrency,
        "shared_tokens": shared,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests": len(loop.requests),
        "repeats": len(loops),
        "hit_ratio": loop.hit_ratio,
        "kv_hit_ratio": sum(one.kv_matched_tokens for one in loop.requests) / prompts,
        **over("requests_per_s", lambda one: one.requests_per_s),
        "requests_per_s_spread": spread([one.requests_per_s for one in loops]),
        **over("mean_latency_s", lambda one: mean(request.latency_s for request in one.requests)),
        **over("ttft_p50_s", ttft(0.5)),
        **over("ttft_p95_s", ttft(0.95)),
        "output_tokens_per_s": loop.output_tokens_per_s,
        "computed_tokens": prompts - sum(one.cached_tokens for one in loop.requests),
        "computed_tokens_perfect": uncached * len(loop.requests),
        "prefill_tokens_per_s": speeds.prefill,
        "decode_tokens_per_s": decode,
        "ceiling_requests_per_s": ceiling,
        "ceiling_mean_latency_s": concurrency / ceiling,
        **over("ceiling_share", lambda one: one.requests_per_s / ceiling),
        "noise": is_noise(loop.requests_per_s / ceiling),
    }


def runs(shared: Sequence[float], concurrency: Sequence[int], requests: int | None, repeat: int) -> int:
    """Timed requests of a sweep, for progress bars."""
    return repeat * len(shared) * sum(requests_for(clients, requests) for clients in concurrency)
