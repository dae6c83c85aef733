"""Measuring: requests through an engine in a closed loop, the two speeds, and the memory bandwidth of the machine.

The words are vLLM's: TTFT is arrival to first token, latency is arrival to last token, TPOT is
(latency - TTFT) / (tokens - 1). In a closed loop `concurrency` clients each send the next request when their last one
is answered, so (Little's law) mean latency = concurrency / requests per second while all of them are busy.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nanokv.bench.workloads import random_prompts, shared_prefix_prompts
from nanokv.cache.manager import CacheManager
from nanokv.core.errors import ConfigError, NanokvError
from nanokv.core.request import Request, RequestOutput, SamplingParams
from nanokv.engine.ticket import Ticket
from nanokv.llm import LLM
from nanokv.models.loader import tensors

Ticker = Callable[[], None]
"""Called after each answered request, for progress bars."""

BANDWIDTH_BYTES = 1 << 29
"""The most that is read to measure memory bandwidth: more than most last-level caches hold."""
FILLER = 0x3C
"""The byte that fills pages that were not computed: a harmless number in float32, bfloat16 and float16."""


Found = Callable[[dict[str, Any]], Any]
"""Called with a row as soon as it is measured, and again after each repeat of the same point, which replaces it: a run
that is interrupted keeps what it was called with."""
MOST_OF_CEILING = 1.05
"""Of a ceiling from speeds of the same run: more is a disturbance of the machine, of one of the two measurements."""


def no_tick() -> None:
    """Shows no progress."""


def not_kept(row: dict[str, Any]) -> None:
    """Keeps no row."""


@dataclass(frozen=True)
class Answered:
    """The numbers of one request, in tokens and seconds."""

    prompt_tokens: int
    cached_tokens: int
    kv_matched_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    latency_s: float


@dataclass(frozen=True)
class Loop:
    """The result of a closed loop: its wall time, and the numbers of each request."""

    wall_s: float
    requests: list[Answered]

    @property
    def requests_per_s(self) -> float:
        """Answered requests per second."""
        return len(self.requests) / self.wall_s

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens of all requests per second."""
        return sum(one.output_tokens for one in self.requests) / self.wall_s

    @property
    def hit_ratio(self) -> float:
        """Share of the prompt tokens that the prefix cache saved."""
        return sum(one.cached_tokens for one in self.requests) / sum(one.prompt_tokens for one in self.requests)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks; share 0.5 is the median."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median, 0 for one value."""
    return (max(values) - min(values)) / median(values)


def ranged(name: str, values: Sequence[float], value: float | None = None) -> dict[str, float]:
    """The fields of a measured number: the median of `values`, or `value`, and the extent as NAME_min and NAME_max."""
    found = median(values) if value is None else value
    return {name: found, f"{name}_min": min(values), f"{name}_max": max(values)}


def is_noise(share: float, ceiling: float = 1.0) -> bool:
    """Whether a measured share is impossible: negative, or over 105 % of its ceiling."""
    return share < 0 or share > MOST_OF_CEILING * ceiling


def closed_loop(
    llm: LLM, prompts: Iterable[list[int]], output_tokens: int, concurrency: int, tick: Ticker = no_tick
) -> Loop:
    """Answers all prompts, `concurrency` of them at a time, each with exactly `output_tokens` greedy tokens.

    Raises NanokvError when a request ends in any other way.
    """
    params = greedy(output_tokens)
    waiting, answered = deque(prompts), []
    live: list[Ticket] = []
    start = time.perf_counter()
    while waiting or live:
        while waiting and len(live) < concurrency:
            live.append(llm.loop.submit(Request(waiting.popleft(), params)))
        llm.loop.step()
        for ticket in list(live):
            for output in ticket.take():
                if output.finished:
                    live.remove(ticket)
                    answered.append(_answered(output, output_tokens))
                    tick()
    return Loop(time.perf_counter() - start, answered)


def greedy(output_tokens: int) -> SamplingParams:
    """SamplingParams for exactly this many tokens, the most likely ones."""
    return SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)


def _answered(output: RequestOutput, wanted: int) -> Answered:
    got, metrics = len(output.token_ids), output.metrics
    if output.finish_reason != "length" or got != wanted:
        why = output.error or output.finish_reason
        raise NanokvError(f"a request of the bench ended after {got} of {wanted} tokens: {why}")
    return Answered(
        len(output.prompt_token_ids), output.cached_tokens, output.kv_matched_tokens, got, metrics.ttft or 0.0,
        metrics.tpot or 0.0, metrics.latency or 0.0,
    )  # fmt: skip


def check_length(llm: LLM, prompt_tokens: int, output_tokens: int) -> None:
    """Raises ConfigError for a request that is too long for the model or its pool."""
    longest = llm.engine.max_length
    if prompt_tokens + output_tokens > longest:
        raise ConfigError(f"{prompt_tokens} prompt and {output_tokens} output tokens: at most {longest} together here")


def warm_up(llm: LLM, prompt_tokens: int) -> None:
    """Runs every path once, so that compilation and first touches of memory are not measured."""
    prompts = random_prompts(3, prompt_tokens, llm.model_config.vocab_size, seed=-1)
    closed_loop(llm, prompts[:1], 4, 1)
    closed_loop(llm, [prompt[:33] for prompt in prompts], 4, 3)
    llm.reset_prefix_cache()


def prefill_speed(llm: LLM, prompt_tokens: int, repeat: int = 3) -> float:
    """Prompt tokens per second of one request alone that finds nothing in the cache (median of `repeat`)."""
    prompts = random_prompts(repeat, prompt_tokens, llm.model_config.vocab_size, seed=-2)
    speeds = [prompt_tokens / closed_loop(llm, [prompt], 1, 1).wall_s for prompt in prompts]
    llm.reset_prefix_cache()
    return median(speeds)


def decode_speed(llm: LLM, batch: int, context: int, steps: int, shared: int = 0) -> float:
    """Output tokens per second while `batch` requests of about `context` tokens decode together.

    The first `shared` tokens are common to all: the same pages, which a CPU may find in its own cache. Only steps in
    which every request decodes are timed; the median of `steps` of them counts. The contexts are not computed but
    declared (`declare_cached`): the contents of pages do not change the time of reading them.
    """
    prompts = shared_prefix_prompts(batch, context, min(shared, context - 1), llm.model_config.vocab_size, seed=-3)
    declare_cached(llm, prompts)
    times = []
    with decoding_together(llm, prompts, steps + 8) as tickets:
        for _ in range(steps):
            begin = time.perf_counter()
            llm.loop.step()
            times.append(time.perf_counter() - begin)
            outputs = [output for ticket in tickets for output in ticket.take()]
            if len(outputs) != batch or any(output.finished for output in outputs):
                raise NanokvError(f"{batch} requests of {context} tokens do not decode together in this pool")
    return batch / median(times)


@contextmanager
def decoding_together(llm: LLM, prompts: Iterable[list[int]], output_tokens: int) -> Iterator[list[Ticket]]:
    """Tickets of requests that have all returned a first token; at the end they are cancelled and the prefix cache is
    reset."""
    tickets = [llm.loop.submit(Request(prompt, greedy(output_tokens))) for prompt in prompts]
    started: set[Ticket] = set()
    while len(started) < len(tickets):
        llm.loop.step()
        started |= {ticket for ticket in tickets if ticket.take()}
    try:
        yield tickets
    finally:
        for ticket in tickets:
            ticket.close()
        llm.reset_prefix_cache()


def declare_cached(llm: LLM, prompts: Iterable[list[int]]) -> None:
    """Publishes pages for these prompts without computing them. For timing only: reset the prefix cache afterwards.

    The pages are written, because memory that was never written is one page of zeros to the operating system, and
    reads of it would come from the CPU's cache.
    """
    data = llm.engine.store.pages.data
    for prompt in prompts:
        pages = declare(llm.engine.cache, prompt)
        data[torch.tensor(pages, dtype=torch.int64, device=data.device)] = FILLER


def declare(cache: CacheManager, prompt: list[int]) -> list[int]:
    """Puts a prompt into the tree by the cache's own four verbs, as if it had been computed. Returns its new pages.

    Raises NanokvError when the pool has no room.
    """
    request = Request(prompt)
    request.tokens, request.num_prompt = array("i", prompt), len(prompt)
    cache.match(request)
    # A match finds whole pages that leave a token to compute, and a recurrent state at their end.
    whole = (request.num_tokens - 1) // cache.page_size * cache.page_size
    missing, first_new = whole - request.num_computed, len(request.held.pages)
    if not cache.reserve(request, missing):
        cache.release(request)
        raise NanokvError(f"the pool has no room for {missing} more tokens (kv_memory)")
    pages = list(request.held.pages[first_new:])
    request.num_computed += missing
    cache.commit(request)
    cache.release(request)
    return pages


def read_bytes(num_bytes: int) -> int:
    """Bytes that `bandwidth` reads in the place of so many."""
    return max(4, min(num_bytes, BANDWIDTH_BYTES) // 4 * 4)


def bandwidth(device: torch.device, num_bytes: int = 1 << 62, repeat: int = 5) -> float:
    """Bytes per second that torch's threads read from memory: the fastest of several sums over a buffer, which is
    memory as weights have it, in large pages where the system has them.

    num_bytes   that are read, such as those of the weights; BANDWIDTH_BYTES at most
    """
    count = read_bytes(num_bytes) // 4
    if device.type == "cpu":
        from nanokv.kernels.cpu.arena import allocate

        buffer = allocate((count,), torch.float32).fill_(1.0)
    else:
        buffer = torch.ones(count, dtype=torch.float32, device=device)
    times = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        buffer.sum().item()  # item() waits for a GPU
        times.append(time.perf_counter() - begin)
    return 4 * count / min(times[1:])


def cache_bytes(device: torch.device) -> int | None:
    """Bytes of the last-level cache of the device; None where it cannot be read. A step that moves fewer bytes may read
    none of them from memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)


def weight_bytes(llm: LLM, batch: int) -> int:
    """Bytes of weights that a decode step of `batch` rows must read: all tensors, less a table of which only rows are
    looked up, and less the experts that no row goes to (counted as if rows chose their experts at random)."""
    config = llm.model_config
    sizes = {name: prod(shape) for name, shape in tensors(config).items()}
    total = sum(sizes.values()) - (0 if config.tie_embeddings else config.vocab_size * config.hidden_size)
    if config.moe is not None:
        idle = (1 - config.moe.per_token / config.moe.num_experts) ** batch
        total -= round(idle * sum(size for name, size in sizes.items() if ".experts." in name))
    return total * llm.dtype.itemsize
