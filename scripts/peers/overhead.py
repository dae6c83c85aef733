"""The cost of the engine beside the model: scheduler, tree and batch building in a step, and a match in a large tree.

nanokv_worker.py uses it; a reader may call it as well:

    step_overhead(llm, running=64, context=256)         -> seconds of a step, and of those not in the forward pass
    match_time(pages=100_000, prompt_tokens=10_000)     -> seconds of one match, list conversion included
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from statistics import median
from typing import Any
from unittest.mock import patch

from nanokv.bench.measure import declare, declare_cached, decoding_together
from nanokv.bench.workloads import random_prompts
from nanokv.cache.manager import CacheManager
from nanokv.core.request import Request
from nanokv.core.spec import PageLayout
from nanokv.kernels.cpu.recording import Recording
from nanokv.llm import LLM

PAGE_SIZE = 16


def step_overhead(llm: LLM, running: int, context: int, tree_pages: int = 0, steps: int = 20) -> dict[str, Any]:
    """Times decode steps of `running` requests while the tree holds at least `tree_pages` pages.

    Everything in a step that is not the decoder's forward pass counts as overhead, sampling and outputs included.
    """
    engine, vocab_size, page_size = llm.engine, llm.model_config.vocab_size, llm.config.page_size
    llm.reset_prefix_cache()
    per_prompt = 64 * page_size
    for seed in range(tree_pages // 64):
        declare(engine.cache, random_prompts(1, per_prompt, vocab_size, seed)[0])
    prompts = random_prompts(running, context, vocab_size, seed=-4)
    declare_cached(llm, prompts)
    inside, depth = 0.0, 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any) -> Any:
            nonlocal inside, depth
            begin, depth = time.perf_counter(), depth + 1
            result = function(*arguments)
            depth -= 1
            inside += time.perf_counter() - begin if depth == 0 else 0.0
            return result

        return call

    whole, beside = [], []
    with ExitStack() as stack:
        stack.enter_context(decoding_together(llm, prompts, steps + 8))
        # A replayed step computes its layers in `replay`, and calls the decoder for its embedding and its logits.
        for owner, name in (
            (engine.model, "forward"), (engine.model, "embed"), (engine.model, "logits"), (Recording, "replay"),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        for _ in range(steps):
            inside, begin = 0.0, time.perf_counter()
            llm.loop.step()
            whole.append(time.perf_counter() - begin)
            beside.append(whole[-1] - inside)
        cached = llm.stats()["pages_cached"]
    return {
        "running": running,
        "context_tokens": context,
        "tree_pages": cached,
        "step_s": median(whole),
        "overhead_s": median(beside),
        "overhead_share": median(beside) / median(whole),
    }


def match_time(pages: int, prompt_tokens: int, vocab_size: int = 49152, repeat: int = 20, seed: int = 0) -> dict:
    """Times CacheManager.match of prompts whose tokens are all in a tree of `pages` pages.

    Every path of the tree branches every 1 to 8 pages. The time covers the conversion of a list of token ids to the
    request's array, and the match, but not the release.
    """
    generator = random.Random(seed)
    cache = CacheManager(PageLayout([], PAGE_SIZE), pages + prompt_tokens)
    trunks: list[list[int]] = []
    branches = 0
    while cache.stats()["pages_cached"] < pages:
        trunk = [generator.randrange(vocab_size) for _ in range(prompt_tokens)]
        trunks.append(trunk)
        declare(cache, trunk)
        length = generator.randint(1, 8)
        while length * PAGE_SIZE < prompt_tokens and cache.stats()["pages_cached"] < pages:
            tail = [generator.randrange(vocab_size) for _ in range(generator.randint(1, 8) * PAGE_SIZE)]
            declare(cache, trunk[: length * PAGE_SIZE] + tail)
            branches += 1
            length += generator.randint(1, 8)
    times = []
    for trunk in (trunks[:-1] or trunks)[:repeat]:
        request = Request(trunk)
        begin = time.perf_counter()
        request.tokens = array("i", request.prompt_token_ids)
        matched = cache.match(request)
        times.append(time.perf_counter() - begin)
        cache.release(request)
    return {
        "tree_pages": cache.stats()["pages_cached"],
        "branches": branches,
        "prompt_tokens": prompt_tokens,
        "matched_tokens": matched,
        "match_s": median(times),
        "match_worst_s": max(times),
    }
