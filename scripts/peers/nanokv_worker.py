"""nanokv as a worker of bench_peers.py."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from overhead import match_time, step_overhead
from protocol import serve

import nanokv
from nanokv import LLM
from nanokv.bench.measure import closed_loop
from nanokv.bench.prefix import ceiling_requests_per_s, matchable, measure_speeds

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 49152,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
"""A model with small pages, so that a tree of 1e5 pages fits in memory."""


class Engine:
    def __init__(self, settings: dict) -> None:
        self.llm = LLM(
            settings["model"],
            dtype=settings["dtype"],
            threads=settings["threads"],
            kv_memory=settings["kv_bytes"],
            max_model_len=settings["max_model_len"],
            max_step_tokens=settings["max_step_tokens"],
            max_requests=settings["max_requests"],
        )
        versions = {"nanokv": nanokv.__version__, "torch": version("torch"), "numba": version("numba")}
        self.about = {"versions": versions, "flags": asdict(self.llm.config)}

    def forget(self) -> None:
        self.llm.reset_prefix_cache()

    def run(self, prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[tuple[float, float, int]]:
        loop = closed_loop(self.llm, prompts, output_tokens, concurrency)
        return [(one.ttft_s, one.latency_s, one.cached_tokens) for one in loop.requests]

    def ceilings(self, prompt_tokens: int, output_tokens: int, points: list[list]) -> dict[str, Any]:
        """For each point [concurrency, shared tokens]: requests/s and computed prompt tokens of a perfect cache."""
        speeds = measure_speeds(self.llm, prompt_tokens, output_tokens, [tuple(point) for point in points])
        rows = []
        for clients, shared in points:
            uncached = prompt_tokens - matchable(prompt_tokens, shared, self.llm.config.page_size)
            decode = speeds.decode[clients, shared]
            rate = ceiling_requests_per_s(uncached, output_tokens, speeds.prefill, decode)
            row = {"requests_per_s": rate, "computed_tokens_a_request": uncached, "decode_tokens_per_s": decode}
            rows.append(row | {"prefill_tokens_per_s": speeds.prefill})
        return {"points": rows}

    def overhead(self, running: int, context: int, trees: list[int], match_pages: int, match_tokens: int) -> dict:
        """The cost of a step besides the model, on this model and, with trees of several sizes, on a tiny one."""
        own = step_overhead(self.llm, running, context)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(TINY), encoding="utf-8")
            with LLM(folder, load="dummy", num_pages=max(trees) + running * context, device="cpu") as tiny:
                grown = [step_overhead(tiny, running, context, pages) for pages in trees]
        return {"step": own, "trees": grown, "match": match_time(match_pages, match_tokens)}


if __name__ == "__main__":
    serve(Engine)
