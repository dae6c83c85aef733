"""The measurements of bench_peers.py: the rows of the table, and the number from a worker's answer."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median
from typing import Any

REQUESTS, SHARED = {1: 3, 4: 8, 16: 16}, (0.0, 0.5, 0.9)
PREFIX_PROMPT, PREFIX_OUTPUT = 1024, 32
ALL, BATCHING, SHARING = ("nanokv", "vllm", "llama", "transformers"), ("nanokv", "vllm", "llama"), ("nanokv", "vllm")


@dataclass(frozen=True)
class Row:
    """One row: `requests` prompts of equal length in a closed loop of `concurrency` clients.

    measure   "decode_tokens_per_s", "output_tokens_per_s", "prefill_tokens_per_s" or "requests_per_s"
    shared    tokens that all prompts share, brought into the cache by one untimed request
    engines   the engines to measure: llama.cpp and transformers share no prefixes between requests, and transformers
              has no continuous batching
    """

    name: str
    measure: str
    prompt_tokens: int
    output_tokens: int
    requests: int
    concurrency: int
    shared: int = 0
    engines: tuple[str, ...] = ALL

    @property
    def shape(self) -> dict[str, int]:
        """The shape of the row's requests, for the result."""
        names = ("prompt_tokens", "output_tokens", "requests", "concurrency")
        return {name: getattr(self, name) for name in names} | {"shared_tokens": self.shared}

    @property
    def is_prefix(self) -> bool:
        return self.measure == "requests_per_s"

    def value(self, answer: dict) -> float:
        """The value of the measure, from a worker's answer."""
        wall, requests = answer["wall_s"], answer["requests"]
        if self.measure == "decode_tokens_per_s":
            return mean((self.output_tokens - 1) / (one["latency_s"] - one["ttft_s"]) for one in requests)
        if self.measure == "prefill_tokens_per_s":
            return len(requests) * self.prompt_tokens / wall
        if self.measure == "output_tokens_per_s":
            return len(requests) * self.output_tokens / wall
        return len(requests) / wall

    def details(self, answer: dict) -> dict:
        """The other numbers of a run."""
        requests = answer["requests"]
        cached = sum(one["cached_tokens"] for one in requests)
        return {
            "wall_s": answer["wall_s"],
            "mean_latency_s": mean(one["latency_s"] for one in requests),
            "ttft_p50_s": median(one["ttft_s"] for one in requests),
            "hit_ratio": cached / (len(requests) * self.prompt_tokens),
            "computed_tokens": len(requests) * self.prompt_tokens - cached,
        }

    def expected_s(self, prefill_tokens_per_s: float, decode_tokens_per_s: float) -> float:
        """An estimate of the seconds of a run on an engine with these speeds, measured with one request."""
        uncached = self.requests * (self.prompt_tokens - self.shared) + self.shared
        together = min(self.concurrency, 3)  # a low guess of the gain from batching
        return uncached / prefill_tokens_per_s + self.requests * self.output_tokens / (decode_tokens_per_s * together)


def all_rows() -> list[Row]:
    """The rows of the table, in its order."""
    rows = [
        Row("decode, 1 request, 256 tokens of context", "decode_tokens_per_s", 256, 128, 1, 1),
        Row("4 requests of 256+128", "output_tokens_per_s", 256, 128, 4, 4, engines=BATCHING),
        Row("16 requests of 256+128", "output_tokens_per_s", 256, 128, 16, 16, engines=BATCHING),
        Row("prefill of 2,048 tokens", "prefill_tokens_per_s", 2048, 1, 1, 1),
    ]
    for part in SHARED:
        for clients in REQUESTS:
            rows.append(
                Row(
                    f"bench prefix, concurrency {clients}, shared {part:g}",
                    "requests_per_s",
                    PREFIX_PROMPT,
                    PREFIX_OUTPUT,
                    REQUESTS[clients],
                    clients,
                    round(part * PREFIX_PROMPT),
                    SHARING,
                )
            )
    return rows


def quick_rows() -> list[Row]:
    """The rows that show most in the shortest time."""
    return [row for row in all_rows() if not row.is_prefix or (row.concurrency, row.shared) == (16, 922)]


def summary(values: list[float]) -> dict[str, float]:
    """The numbers of several runs for a table."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def rounded(value: Any) -> Any:
    """The value with floats rounded to six digits: more is noise, and makes a committed file hard to read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
