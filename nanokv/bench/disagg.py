"""`bench disagg`: how long prompts delay running answers, in one process and in two.

`running` requests decode. Long prompts arrive one at a time, each half a second after the first token of the previous
one: every mode has the same work, and no queue grows. A gap is the time between two tokens of one running answer while
prompts arrive.

    one step    one process, all cores, a prompt is computed in one step
    chunked     one process, all cores, at most `chunk` tokens a step
    split       two processes; on a CPU each is pinned to half of the cores, on a GPU they share it

Two processes on the same cores cannot do more work than one. Splitting shortens the gaps; its price are the cores that
are idle while there is nothing to prefill, or nothing to decode.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from nanokv.bench.measure import Found, Ticker, greedy, no_tick, not_kept, percentile, ranged, spread
from nanokv.bench.workloads import random_prompts
from nanokv.cache.manager import CacheManager
from nanokv.core.errors import NanokvError
from nanokv.core.request import Request, RequestOutput
from nanokv.disagg.config import DisaggConfig
from nanokv.disagg.grants import prefill_message
from nanokv.disagg.messages import encode
from nanokv.engine.ticket import Ticket
from nanokv.llm import LLM

MODES = ("one step", "chunked", "split")
PAUSE_S = 0.5
"""Seconds between the first token of a long prompt and the arrival of the next one."""
ANSWER = 4
"""Tokens of the answer to a long prompt."""
TRANSFERS = 9
"""Transfers that are timed, of each length."""

Load = Callable[..., LLM]
"""Makes an LLM: (disagg=None, **fields of EngineConfig)."""


@dataclass(frozen=True)
class Trace:
    """One run. Seconds since its start.

    gaps       (time, gap) of each token of a running answer after its first
    arrivals   of the long prompts
    ttfts      of the long prompts
    """

    wall_s: float
    gaps: list[tuple[float, float]]
    arrivals: list[float]
    ttfts: list[float]


def measure_disagg(
    load: Load,
    prompt_tokens: int,
    prompts: int,
    running: int,
    context: int,
    chunk: int,
    repeat: int = 1,
    tick: Ticker = no_tick,
    found: Found = not_kept,
) -> list[dict[str, Any]]:
    """A row for each mode: of `repeat` runs the one with the median p99. Raises NanokvError where a request fails.

    prompt_tokens   of a long prompt; `prompts` of them arrive
    context         tokens of each of the `running` requests
    chunk           tokens of a step in mode "chunked"
    found           called with a mode's row after each repeat
    """
    cores = sorted(os.sched_getaffinity(0))
    whole = prompt_tokens + running
    rows = []
    for mode in MODES:
        with _cores(cores[: max(1, len(cores) // 2)] if mode == "split" else cores) as threads:
            worker_cores = tuple(cores[len(cores) // 2 :])
            disagg = DisaggConfig(worker_cores=worker_cores) if mode == "split" else None
            step = chunk if mode == "chunked" else whole
            with load(disagg, max_step_tokens=step, prefix_cache=True, threads=threads) as llm:
                run_trace(llm, min(prompt_tokens, 256), 1, running, context, seed=99)  # compiles
                transfers: dict[int, list[float]] = {}
                for tokens in (prompt_tokens, prompt_tokens // 4):
                    if disagg is not None and tokens >= disagg.min_tokens:
                        transfers[tokens] = [transfer_time(llm, tokens, seed) for seed in range(TRANSFERS)]
                traces: list[Trace] = []
                for seed in range(repeat):
                    traces.append(run_trace(llm, prompt_tokens, prompts, running, context, seed, tick))
                    row = _row(mode, llm, traces, prompt_tokens, prompts, running, threads, transfers)
                    found(row)
                rows.append(row)
    return rows


def run_trace(
    llm: LLM, prompt_tokens: int, prompts: int, running: int, context: int, seed: int = 0, tick: Ticker = no_tick
) -> Trace:
    """One run on an empty cache. Running answers start again at the model's length, and are cancelled at the end."""
    vocab, engine = llm.model_config.vocab_size, llm.engine
    llm.reset_prefix_cache()
    long = greedy(engine.max_length - context)
    contexts = random_prompts(running, context, vocab, seed)
    answering = {llm.loop.submit(Request(one, long)): one for one in contexts}
    last: dict[Ticket, float] = {}
    while len(last) < running:
        last |= {ticket: time.perf_counter() for ticket, _ in _step(llm, answering)}
    start = time.perf_counter()
    waiting = random_prompts(prompts, prompt_tokens, vocab, seed + 1000)
    gaps: list[tuple[float, float]] = []
    arrivals: list[float] = []
    ttfts: list[float] = []
    due = start + PAUSE_S
    live: set[Ticket] = set()
    current: Ticket | None = None
    while waiting or live or time.perf_counter() < due:
        if waiting and current is None and time.perf_counter() >= due:
            current = llm.loop.submit(Request(waiting.pop(0), greedy(ANSWER)))
            arrivals.append(time.perf_counter() - start)
            live.add(current)
        for ticket, output in _step(llm, [*answering, *live]):
            now = time.perf_counter()
            if ticket in answering:
                if ticket in last:
                    gaps.append((now - start, now - last[ticket]))
                last[ticket] = now
                if output.finished:
                    again = answering.pop(ticket)
                    answering[llm.loop.submit(Request(again, long))] = again
                continue
            if ticket is current and output.metrics.ttft is not None:
                ttfts.append(output.metrics.ttft)
                current, due = None, now + PAUSE_S
                tick()
            if output.finished:
                live.discard(ticket)
    wall = time.perf_counter() - start
    for ticket in answering:
        ticket.close()
    return Trace(wall, gaps, arrivals, ttfts)


def transfer_time(llm: LLM, prompt_tokens: int, seed: int) -> float:
    """Seconds from the last kernel of a prefill in another process until its first token is returned here.

    The engine is idle otherwise; in a busy one the rest of the running step is added.
    """
    (prompt,) = random_prompts(1, prompt_tokens, llm.model_config.vocab_size, seed=2000 + seed)
    ticket = llm.loop.submit(Request(prompt, greedy(2)))
    while not _step(llm, [ticket]):
        pass
    assert llm.cluster is not None
    seconds = time.monotonic() - llm.cluster.dispatcher.last_finished
    for _ in ticket:  # the second token
        pass
    return seconds


def _step(llm: LLM, tickets: Iterable[Ticket]) -> list[tuple[Ticket, RequestOutput]]:
    """One step, and its outputs for these requests."""
    llm.loop.step()
    outputs = [(ticket, output) for ticket in tickets for output in ticket.take()]
    for _, output in outputs:
        if output.error is not None:
            raise NanokvError(f"a request of the bench ended: {output.error}")
    return outputs


@contextmanager
def _cores(cores: list[int]) -> Iterator[int]:
    """Runs this thread and torch's threads on these cores; yields the number of threads."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(min(threads, len(cores)) if len(cores) < len(before) else threads)
    try:
        yield torch.get_num_threads()
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def _row(
    mode: str,
    llm: LLM,
    traces: list[Trace],
    prompt_tokens: int,
    prompts: int,
    running: int,
    threads: int,
    transfers: dict[int, list[float]],
) -> dict[str, Any]:
    def gap(share: float) -> Callable[[Trace], float]:
        return lambda one: percentile([length for _, length in one.gaps], share)

    p99 = gap(0.99)
    trace = sorted(traces, key=p99)[len(traces) // 2]

    def over(name: str, number: Callable[[Trace], float]) -> dict[str, float]:
        return ranged(name, [number(one) for one in traces], number(trace))

    ttft = median(trace.ttfts)
    hand_over = transfers.get(prompt_tokens)
    return {
        "mode": mode,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "prompts": prompts,
        "running": running,
        "repeats": len(traces),
        **over("tpot_p50_s", gap(0.5)),
        **over("tpot_p99_s", p99),
        "tpot_p99_spread": spread([p99(one) for one in traces]),
        **over("longest_stall_s", gap(1)),
        **over("ttft_p50_s", lambda one: median(one.ttfts)),
        "ttft_max_s": max(trace.ttfts),
        **over("requests_per_s", lambda one: prompts / one.wall_s),
        **over("output_tokens_per_s", lambda one: len(one.gaps) / one.wall_s),
        **(ranged("hand_over_s", hand_over) if hand_over else {"hand_over_s": None}),
        "hand_overs": [{"tokens": tokens, "seconds": found} for tokens, found in transfers.items()],
        "bytes_moved": _message_bytes(llm, prompt_tokens) if transfers else 0,
        "break_even_tokens": round(gap(0.5)(trace) * prompt_tokens / ttft) if transfers else None,
        "arrivals_s": [round(time, 4) for time in trace.arrivals],
        "gap_times_s": [round(time, 4) for time, _ in trace.gaps],
        "gaps_s": [round(length, 5) for _, length in trace.gaps],
    }


def _message_bytes(llm: LLM, prompt_tokens: int) -> int:
    """Bytes of the PREFILL of such a prompt: all that is sent for it, beside a DONE of a hundred bytes."""
    request = Request([5] * prompt_tokens, greedy(ANSWER), "request-1")
    request.tokens.extend(request.prompt_token_ids)
    request.num_prompt = prompt_tokens
    layout = llm.engine.layout
    cache = CacheManager(layout, layout.pages_for(prompt_tokens), num_states=4 if layout.state_bytes else 0)
    cache.match(request)
    cache.reserve(request, prompt_tokens)
    return len(encode(prefill_message(request, 1, 1 << 60, [])))
