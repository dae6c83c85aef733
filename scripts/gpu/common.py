"""Shared by the parts of the GPU report: the size of a run, timing on a device, models of random weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nanokv.hub.catalog import CATALOG
from nanokv.llm import LLM

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The device, and `quick`: sizes small enough for a CPU, which tests the report and measures nothing."""

    device: str
    quick: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def copies(self, num_bytes: float) -> int:
        """Copies of the tensors of a call that moves `num_bytes`: together over 4 times the last-level cache (50 MB on
        an H100), so that no call finds its tensors in the cache. Small tensors have 64 copies at most: in a model they
        are in that cache, too."""
        if self.device == "cpu":
            return 2  # enough to test that calls take turns
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(64, max(1, math.ceil(4 * cache / num_bytes)))


def seconds(calls: Sequence[Callable[[], Any]], run: Run, count: int = 20) -> float:
    """Seconds of one call, median of 5; `calls` over several copies of their tensors run in turn. On a GPU a CUDA graph
    of at least `count` calls is timed, so that launches cost nothing."""
    for call in [*calls, *calls[:1] * 2]:
        call()
    if run.device == "cpu":
        times = []
        for call in islice(cycle(calls), 5):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return median(times)
    torch.cuda.synchronize()
    rounds = -(-count // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    return median(times[1:])


def small(config: dict) -> dict:
    """The same family with two to four narrow layers and few heads, experts and tokens; heads keep their width."""
    if "text_config" in config:
        return {**config, "text_config": small(config["text_config"])}
    tiny = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "intermediate_size": 256}
    layers = 4 if "full_attention_interval" in config or "layer_types" in config else 2
    kv_heads = 4 if config.get("kv_lora_rank") else 2
    fewer = {
        "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    }  # fmt: skip
    tiny |= {name: value for name, value in fewer.items() if config.get(name)}
    if "layer_types" in config:
        tiny["layer_types"] = config["layer_types"][:layers]
    return {**config, **tiny, "num_hidden_layers": layers}


def config_of(name: str, run: Run) -> dict:
    return small(CATALOG[name].config) if run.quick else CATALOG[name].config


@contextmanager
def dummy(name: str, run: Run, **fields: Any) -> Iterator[LLM]:
    """A model of the catalog with random weights, on the run's device."""
    if run.quick:
        fields = {"kv_memory": "64MiB", **fields}
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of(name, run)), encoding="utf-8")
        dtype = str(run.dtype).removeprefix("torch.")
        with LLM(folder, load="dummy", device=run.device, dtype=dtype, **fields) as llm:
            yield llm
