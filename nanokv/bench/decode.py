"""`bench decode`: tokens per second over batch size and context, and their share of the memory bandwidth.

A decode step must read every weight once, and keys, values and states of every request; it also writes the states. On
most machines that bounds it:

    bytes of a step = weights + batch * (context * bytes per token + 2 * state bytes)
    share = bytes of a step / time of a step / bandwidth measured in the same run

Weights that fit in a CPU's cache are not read from memory, so a tiny model may exceed 100 %. The computation of a step
grows with the batch, so the share falls where computing takes longer than reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from nanokv.bench.measure import Ticker, bandwidth, check_length, decode_speed, no_tick, warm_up, weight_bytes
from nanokv.llm import LLM


def bytes_per_step(weights: int, batch: int, context: int, bytes_per_token: int, state_bytes: int = 0) -> int:
    """The least bytes that one decode step must move."""
    return weights + batch * (context * bytes_per_token + 2 * state_bytes)


def measure_decode(
    llm: LLM, batches: Sequence[int], contexts: Sequence[int], steps: int = 20, repeat: int = 1, tick: Ticker = no_tick
) -> list[dict[str, Any]]:
    """A row for each batch and context that fits in the pool and the model; medians of `repeat`.

    steps    timed steps per point
    tick     called after each point
    Raises   ConfigError where even the shortest context is too long
    """
    check_length(llm, min(contexts), steps + 8)
    warm_up(llm, 64)
    limit = bandwidth(llm.device)
    rows = []
    for batch in batches:
        for context in contexts:
            if fits(llm, batch, context, steps):
                speed = median(decode_speed(llm, batch, context, steps) for _ in range(repeat))
                rows.append(_row(llm, batch, context, speed, limit))
            tick()
    return rows


def fits(llm: LLM, batch: int, context: int, steps: int) -> bool:
    """Whether `batch` requests of this context fit into the pool together, and into the model's length."""
    engine, tokens = llm.engine, context + steps + 8
    pages = batch * engine.layout.pages_for(tokens)
    return tokens <= engine.max_length and pages <= len(engine.store.pages) and batch <= engine.config.max_requests


def _row(llm: LLM, batch: int, context: int, speed: float, limit: float) -> dict[str, Any]:
    layout, weights = llm.engine.layout, weight_bytes(llm, batch)
    per_token, per_sequence = layout.bytes_per_token, layout.state_payload
    moved = bytes_per_step(weights, batch, context, per_token, per_sequence)
    step = batch / speed
    return {
        "batch": batch,
        "context_tokens": context,
        "output_tokens_per_s": speed,
        "step_s": step,
        "bytes_per_token": per_token,
        "state_bytes_per_sequence": per_sequence,
        "weight_bytes": weights,
        "bytes_per_step": moved,
        "bytes_per_s": moved / step,
        "bandwidth_bytes_per_s": limit,
        "bandwidth_share": moved / step / limit,
    }
