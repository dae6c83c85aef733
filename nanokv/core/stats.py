"""The values of `LLM.stats`: a table of names, kinds, units and meanings, for documentation and metrics.

gauge     the present value, or a constant of the engine
counter   a count since the engine was made; never falls
text      a constant of the engine, in words
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stat:
    """One value. `only` names the engines that have it; "": all."""

    name: str
    kind: str
    unit: str
    meaning: str
    only: str = ""


_STATES, _DISAGG = "layers with states", "disagg"

STATS = (
    Stat("bytes_per_token", "gauge", "bytes", "bytes of one more token in the cache, without padding"),
    Stat("page_size", "gauge", "tokens", "tokens in a page"),
    Stat("page_bytes", "gauge", "bytes", "bytes of a page, padding included"),
    Stat("state_bytes", "gauge", "bytes", "the recurrent state of one sequence; 0 without recurrent layers"),
    Stat("pages_total", "gauge", "pages", "pages in the pool"),
    Stat("pages_free", "gauge", "pages", "pages without an owner"),
    Stat("pages_held", "gauge", "pages", "pages private to running requests"),
    Stat("pages_cached", "gauge", "pages", "pages in the prefix tree"),
    Stat("pages_locked", "gauge", "pages", "pages in the prefix tree that running requests use"),
    Stat("states_total", "gauge", "states", "states in the pool", _STATES),
    Stat("states_free", "gauge", "states", "states without an owner", _STATES),
    Stat("states_held", "gauge", "states", "states of running requests", _STATES),
    Stat("states_cached", "gauge", "states", "checkpoints in the prefix tree", _STATES),
    Stat("state_evictions", "counter", "states", "checkpoints dropped to make room", _STATES),
    Stat("evictions", "counter", "pages", "cached pages dropped to make room"),
    Stat("hit_tokens", "counter", "tokens", "prompt tokens that the prefix cache saved, at the first admission"),
    Stat("kv_hit_tokens", "counter", "tokens", "prompt tokens whose pages were found, with a state or without"),
    Stat("queried_tokens", "counter", "tokens", "prompt tokens looked up in the prefix cache"),
    Stat("copies", "counter", "pages", "shared pages copied before a write"),
    Stat("requests_running", "gauge", "requests", "running requests"),
    Stat("requests_waiting", "gauge", "requests", "requests in the queue"),
    Stat("preemptions", "counter", "requests", "running requests that went back to the queue"),
    Stat("steps", "counter", "steps", "engine steps"),
    Stat("prefill_workers_ready", "gauge", "processes", "prefill processes that accept prompts", _DISAGG),
    Stat("requests_remote", "gauge", "requests", "requests whose pages another process may write", _DISAGG),
    Stat("remote_prefills", "counter", "attempts", "prefills given to prefill processes", _DISAGG),
    Stat("remote_tokens", "counter", "tokens", "uncached tokens of these prefills", _DISAGG),
    Stat("remote_lost", "counter", "attempts", "remote prefills that failed or whose process died", _DISAGG),
    Stat("worker_deaths", "counter", "processes", "prefill processes that died or were killed", _DISAGG),
    Stat("stale_messages", "counter", "messages", "dropped messages of an old attempt or an old pool", _DISAGG),
    Stat("weight_forms", "text", "", "the forms of the weights (kernels/forms.py), matrices of each"),
    Stat("attention_form", "text", "", "what computes attention: tiles, float32, codes, decoded, reference or triton"),
    Stat(
        "row_invariant", "gauge", "bool",
        "whether matrix products on this machine give a row the same bits for any other rows; exactness needs it",
    ),
)  # fmt: skip
"""Every value of `LLM.stats`."""


def markdown() -> str:
    """The table of docs/stats.md."""
    rows = ["| name | kind | unit | meaning |", "|---|---|---|---|"]
    for stat in STATS:
        only = f" ({stat.only} only)" if stat.only else ""
        rows.append(f"| `{stat.name}` | {stat.kind} | {stat.unit} | {stat.meaning}{only} |")
    return "\n".join(rows) + "\n"
