"""`bench decode`: tokens per second over batch size and context, and their share of the memory bandwidth.

A decode step must read every weight once, and keys, values and states of every request; it also writes the states. On
most machines that bounds it:

    bytes of a step = weights + batch * (context * bytes per token + 2 * state bytes)
    share = bytes of a step / time of a step / bandwidth measured in the same run

The bandwidth is that of a plain read of as many bytes as the weights have, on the same threads.
The computation of a step grows with the batch, so the share falls where computing takes longer than reading. A step
whose bytes fit in the last-level cache may read none of them from memory: it is marked `in_cache`, and may exceed
100 %. Any other share over 105 % is marked as noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanokv.bench.measure import (
    Found,
    Ticker,
    bandwidth,
    cache_bytes,
    check_length,
    decode_speed,
    is_noise,
    no_tick,
    not_kept,
    ranged,
    read_bytes,
    warm_up,
    weight_bytes,
)
from nanokv.llm import LLM
from nanokv.models.forms import forms_of


def bytes_per_step(weights: int, batch: int, context: int, bytes_per_token: int, state_bytes: int = 0) -> int:
    """The least bytes that one decode step must move."""
    return weights + batch * (context * bytes_per_token + 2 * state_bytes)


def measure_decode(
    llm: LLM,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int = 20,
    repeat: int = 1,
    tick: Ticker = no_tick,
    found: Found = not_kept,
) -> list[dict[str, Any]]:
    """A row for each batch and context that fits in the pool and the model; medians of `repeat`.

    steps    timed steps per point
    tick     called after each point
    found    called with a point's row after each repeat
    Raises   ConfigError where even the shortest context is too long
    """
    check_length(llm, min(contexts), steps + 8)
    warm_up(llm, 64)
    read = read_bytes(weight_bytes(llm, max(batches)))
    limit = bandwidth(llm.device, read)
    rows = []
    for batch in batches:
        for context in contexts:
            if fits(llm, batch, context, steps):
                speeds: list[float] = []
                for _ in range(repeat):
                    speeds.append(decode_speed(llm, batch, context, steps))
                    row = _row(llm, batch, context, speeds, limit, read)
                    found(row)
                rows.append(row)
            tick()
    return rows


def fits(llm: LLM, batch: int, context: int, steps: int) -> bool:
    """Whether `batch` requests of this context fit into the pool together, and into the model's length."""
    engine, tokens = llm.engine, context + steps + 8
    pages = batch * engine.layout.pages_for(tokens)
    return tokens <= engine.max_length and pages <= len(engine.store.pages) and batch <= engine.config.max_requests


def notes(llm: LLM, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The forms that this model takes on this machine, and the limit that the rows are compared with."""
    limits = [
        f"limit: {row['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s, a plain read of {row['read_bytes'] / 1e6:,.0f} MB"
        for row in rows[-1:]
    ]
    return [str(forms_of(llm.engine.model)), *limits]


def _row(llm: LLM, batch: int, context: int, speeds: list[float], limit: float, read: int) -> dict[str, Any]:
    layout, weights = llm.engine.layout, weight_bytes(llm, batch)
    per_token, per_sequence = layout.bytes_per_token, layout.state_payload
    moved = bytes_per_step(weights, batch, context, per_token, per_sequence)
    steps = ranged("step_s", [batch / speed for speed in speeds])
    step, fits_in = steps["step_s"], cache_bytes(llm.device) or 0
    share, in_cache = moved / step / limit, moved <= fits_in
    return {
        "batch": batch,
        "context_tokens": context,
        "repeats": len(speeds),
        **ranged("output_tokens_per_s", speeds),
        **steps,
        "bytes_per_token": per_token,
        "state_bytes_per_sequence": per_sequence,
        "weight_bytes": weights,
        "bytes_per_step": moved,
        "bytes_per_s": moved / step,
        "bandwidth_bytes_per_s": limit,
        "read_bytes": read,
        **ranged("bandwidth_share", [moved * speed / batch / limit for speed in speeds], share),
        "in_cache": in_cache,
        "noise": is_noise(share) and not in_cache,
    }
