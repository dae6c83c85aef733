"""How fast a codec decodes beside the raw one, and how many requests it lets run in a fixed memory."""

from __future__ import annotations

import time
from typing import Any

from nanokv.bench.measure import declare_cached, decode_speed, greedy, ranged
from nanokv.bench.workloads import random_prompts
from nanokv.core.request import Request
from nanokv.llm import LLM

ONCE_S = 10
"""Seconds of a turn beyond which it is not repeated."""
STEPS_TO_SETTLE = 8
"""Steps after which a full engine has admitted every request it can."""


def in_turns(llm: LLM, raw: LLM, batch: int, context: int, steps: int, turns: int) -> dict[str, Any]:
    """Decode speed of both, in `turns` turns, so that a disturbance of the machine affects both. Medians.

    There are no further turns once the mean turn takes more than ONCE_S seconds.
    """
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < turns and (not pairs or time.perf_counter() - start < ONCE_S * len(pairs)):
        pairs.append((decode_speed(raw, batch, context, steps), decode_speed(llm, batch, context, steps)))
    ratios = [own / other for other, own in pairs]
    return {
        "batch": batch,
        "context_tokens": context,
        "turns": len(pairs),
        **ranged("output_tokens_per_s", [own for _, own in pairs]),
        **ranged("raw_output_tokens_per_s", [other for other, _ in pairs]),
        **ranged("speed_ratio", ratios),
    }


def requests_at_once(llm: LLM, context: int) -> int:
    """Requests of `context` tokens that decode together while others wait: measured, not computed from sizes.

    Their contexts are declared, not computed (`declare_cached`).
    """
    engine, output_tokens = llm.engine, STEPS_TO_SETTLE + 1
    fit = len(engine.store.pages) // engine.layout.pages_for(context + output_tokens)
    prompts = random_prompts(fit + 1, context, llm.model_config.vocab_size, seed=-5)
    declare_cached(llm, prompts[:fit])
    tickets = [llm.loop.submit(Request(prompt, greedy(output_tokens))) for prompt in prompts]
    running = 0
    for _ in range(STEPS_TO_SETTLE):
        llm.loop.step()
        running = sum(len(ticket.take()) for ticket in tickets)
    for ticket in tickets:
        ticket.close()
    llm.reset_prefix_cache()
    return running
