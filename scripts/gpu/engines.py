"""The whole engine on random weights: decode, prefill, graphs and overlap on and off, prefix caching, transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from statistics import median
from unittest.mock import patch

import torch
from gpu.common import Row, Run, config_of, dummy

from nanokv.bench.decode import measure_decode
from nanokv.bench.measure import decode_speed, prefill_speed, warm_up
from nanokv.bench.prefix import measure_prefix
from nanokv.core.request import RequestOutput
from nanokv.engine.host_copy import HostCopy


def engine(run: Run, model: str) -> Iterator[Row]:
    """Prefill and decode of one model: tokens/s, and the share of the memory bandwidth."""
    prompt, batches, contexts = (48, [1, 2], [32]) if run.quick else (2048, [1, 16], [256, 4096])
    with dummy(model, run) as llm:
        warm_up(llm, prompt)
        yield {"name": f"{model} prefill", "shape": f"{prompt:,} tokens", "tokens_per_s": prefill_speed(llm, prompt)}
        for batch, context in product(batches, contexts):  # one by one: a later failure leaves these rows
            for row in measure_decode(llm, [batch], [context], steps=4 if run.quick else 30):
                shape = f"{row['batch']} x {row['context_tokens']:,}"
                yield {"name": f"{model} decode", "shape": shape, "tokens_per_s": row["output_tokens_per_s"], **row}


def host(run: Run, model: str = "qwen3-0.6b") -> Iterator[Row]:
    """Python's time beside the device in a decode step: the time of a step without the wait for tokens."""
    steps, context = (4, 32) if run.quick else (60, 1024)
    waited, beside = 0.0, []

    with dummy(model, run) as llm:
        fetch, step = HostCopy.fetch, llm.engine.step

        def timed_fetch(copy: HostCopy) -> dict[str, list]:
            nonlocal waited
            begin = time.perf_counter()
            fetched = fetch(copy)
            waited += time.perf_counter() - begin
            return fetched

        def timed_step() -> list[RequestOutput]:
            nonlocal waited
            waited, begin = 0.0, time.perf_counter()
            outputs = step()
            beside.append(time.perf_counter() - begin - waited)
            return outputs

        warm_up(llm, context)
        with patch.object(HostCopy, "fetch", timed_fetch), patch.object(llm.engine, "step", timed_step):
            for batch in (1, 2) if run.quick else (1, 16, 64):
                speed = decode_speed(llm, batch, context, steps)
                taken = median(beside[-steps:])
                yield {"name": f"{model} Python beside the device", "shape": f"{batch} x {context:,}", "seconds": taken,
                       "decode_step_s": batch / speed}  # fmt: skip


def switches(run: Run, model: str = "qwen3-0.6b") -> Iterator[Row]:
    """Decode steps with and without graphs and overlap, each in an engine of its own."""
    steps, context = (4, 32) if run.quick else (60, 1024)
    for graphs in (True, False):
        for overlap in (True, False):
            with dummy(model, run, graphs=graphs, overlap=overlap) as llm:
                warm_up(llm, context)
                for batch in (1, 16):
                    speed = decode_speed(llm, batch, context, steps)
                    name = f"graphs {'on' if graphs else 'off'}, overlap {'on' if overlap else 'off'}"
                    yield {"name": f"{model} decode", "shape": f"{batch} x {context:,}, {name}", "tokens_per_s": speed,
                           "step_s": batch / speed}  # fmt: skip


WITH_KERNELS = ("raw", "fp8", "int8", "int4", "rot4", "tq2", "tq3", "tq4")
"""Codecs that kernels read; pages of the others are decoded for each step."""


def codecs(run: Run, model: str = "qwen3-0.6b") -> Iterator[Row]:
    """Decode steps over the pages of each codec: with equal weights, only attention and the codec differ."""
    shapes = [(2, 32)] if run.quick else [(16, 4096), (16, 16_384)]
    for codec in WITH_KERNELS:
        with dummy(model, run, codec=codec) as llm:
            warm_up(llm, 64)
            for batch, context in shapes:
                speed = decode_speed(llm, batch, context, 4 if run.quick else 20)
                yield {"name": f"codec {codec}", "shape": f"{batch} x {context:,}", "tokens_per_s": speed,
                       "step_s": batch / speed, "bytes_per_token": llm.stats()["bytes_per_token"]}  # fmt: skip


def prefix(run: Run) -> Iterator[Row]:
    """`bench prefix` at long prompts, as published measurements run it."""
    prompt, output, clients = (64, 4, [1, 2]) if run.quick else (10_000, 64, [1, 4, 16, 32])
    with dummy("qwen3-1.7b", run, max_requests=max(clients)) as llm:
        for count in clients:  # one by one: a later failure leaves these rows
            for row in measure_prefix(llm, prompt, output, [0.0, 0.5, 0.9], [count], count if run.quick else None):
                shape = f"{count} clients, {row['shared_tokens']:,} of {prompt:,} shared"
                yield {"name": "bench prefix qwen3-1.7b", "shape": shape, **row}


@torch.inference_mode()
def transformers(run: Run, model: str = "qwen3-0.6b") -> Iterator[Row]:
    """The same model in transformers: one request, its own cache."""
    import transformers as hf

    config = config_of(model, run)
    made = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config), dtype=run.dtype)
    made = made.to(run.device).eval()
    prompt, context, steps = (48, 32, 3) if run.quick else (2048, 256, 40)

    def forward(count: int, cache: hf.DynamicCache) -> float:
        begin = time.perf_counter()
        ids = torch.ones(1, count, dtype=torch.int64, device=run.device)
        made(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax().item()  # item() waits
        return time.perf_counter() - begin

    times = [forward(prompt, hf.DynamicCache(config=made.config)) for _ in range(4)]
    yield {"name": f"transformers {model} prefill", "shape": f"{prompt:,} tokens",
           "tokens_per_s": prompt / median(times[1:])}  # fmt: skip
    cache = hf.DynamicCache(config=made.config)
    forward(context, cache)
    times = [forward(1, cache) for _ in range(steps)]
    yield {"name": f"transformers {model} decode", "shape": f"1 x {context:,}", "tokens_per_s": 1 / median(times[2:])}
