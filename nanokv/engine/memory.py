"""The number of pages and states, from the user's options or from free memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanokv.core.config import EngineConfig, parse_bytes
from nanokv.core.errors import ConfigError
from nanokv.core.spec import PageLayout
from nanokv.engine.limits import free_memory
from nanokv.engine.profile_run import run_largest_step, run_reading_step
from nanokv.models.decoder import Decoder

CPU_SHARE, CPU_MOST = 0.25, 4 * 2**30
"""The default on a CPU: this share of free memory, and at most these bytes."""
PROBED_PAGES = 256
"""Pages over which a profile run measures the scratch of reading: so many that scratch per row is negligible."""
PROBED_ROWS = 512
"""Rows of the profile run of a prompt: enough that latents are expanded, where that is cheaper (mla.expands)."""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes for pages and states: `limit` is available, `default` is used where the user does not choose."""

    limit: int
    default: int


def memory_for_pages(config: EngineConfig, model: Decoder, layout: PageLayout, device: torch.device) -> MemoryBudget:
    """The budget of a device. On a GPU, profile runs measure the memory that steps need beside the pages.

    model    a Decoder, bound to the layout
    Raises   ConfigError when gpu_memory_fraction leaves no memory for pages
    """
    if device.type == "cpu":
        free = free_memory()
        return MemoryBudget(free, int(min(free * CPU_SHARE, CPU_MOST)))

    def peak(run: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    step_bytes = peak(lambda: run_largest_step(config, model, layout, device))
    scratch = reading_scratch(peak, config, model, layout, device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    at_once = None
    if config.codec == "raw":  # latents are expanded for one request at a time
        at_once = layout.page_bytes * layout.pages_for(config.max_model_len or model.config.max_positions)
    return gpu_memory(total, free, step_bytes, config.gpu_memory_fraction, scratch, at_once)


def reading_scratch(
    peak: Callable[[Callable[[], None]], int],
    config: EngineConfig,
    model: Decoder,
    layout: PageLayout,
    device: torch.device,
) -> float:
    """Bytes that a step needs for each byte of the pages that it reads: the larger value of decode steps and of a
    prompt over cached pages, which are decoded (prefill="fast") or expanded (latents) for it.

    peak   runs a step and returns the most bytes that it had allocated
    """

    def scratch(few: int, num_rows: int) -> float:
        def peak_over(num_pages: int) -> int:
            return peak(lambda: run_reading_step(num_pages, num_rows, config, model, layout, device))

        less, more = peak_over(few), peak_over(PROBED_PAGES)
        pages = layout.page_bytes * (PROBED_PAGES - few)
        return max(0, more - less - pages) / pages if pages else 0.0

    num_rows = min(PROBED_ROWS, config.max_step_tokens, PROBED_PAGES // 4 * config.page_size)
    own_pages = 1 << (layout.pages_for(num_rows) - 1).bit_length()  # equal rows in both runs: their scratch cancels out
    return max(scratch(1, 1), scratch(own_pages, num_rows))


def gpu_memory(
    total: int, free: int, step_bytes: int, fraction: float, scratch: float = 0.0, at_once: int | None = None
) -> MemoryBudget:
    """Bytes for pages on a GPU of `total` bytes, `free` of them free with the weights loaded.

        |-- in use: weights, others --|---- pages ----|- scratch of pages -|- largest step -|----- unused -----|
                                                                                            ^ fraction * total

    step_bytes   bytes that the largest step needs beside the pages
    fraction     of `total` that the process may use
    scratch      bytes that a step needs for each byte of the pages it reads; a step may read all pages
    at_once      most bytes of pages that have scratch at the same time; None: all
    Raises       ConfigError when no memory is left for pages
    """
    room = int(total * fraction) - (total - free) - step_bytes
    left = int(room / (1 + scratch))
    if at_once is not None:
        left = max(left, int(room - scratch * at_once))
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_fraction={fraction}: of {total:,} bytes {total - free:,} are in use and a step needs "
            f"{step_bytes:,}, which leaves none for pages; a smaller max_step_tokens needs less"
        )
    return MemoryBudget(left, left)


def pool_size(config: EngineConfig, layout: PageLayout, free: MemoryBudget) -> tuple[int, int]:
    """The numbers of pages and of states in the pool.

    Where layers are recurrent, states get half of the memory. Each running request needs two states (its own and a
    checkpoint); the others hold checkpoints of the prefix cache. Where states hold partial pages alone, there are
    max_requests of them, in at most half of the memory.

    free      the budget of the device
    Returns   (pages, states)
    Raises    ConfigError when one page and the states of one request do not fit, or the options exceed the budget
    """
    page_bytes, state_bytes = max(layout.page_bytes, 1), layout.state_bytes
    halves = 2 if state_bytes and config.num_states is None else 1
    if config.num_pages is not None:
        memory, asked = config.num_pages * page_bytes * halves, f"num_pages={config.num_pages}"
    elif config.kv_memory is not None:
        memory, asked = parse_bytes(config.kv_memory, "kv_memory"), f"kv_memory={config.kv_memory!r}"
    else:
        memory, asked = free.default, "kv_memory=None"
    num_states = 0
    if state_bytes:
        most = max(memory // halves // state_bytes, layout.states_per_request)
        if not layout.is_recurrent:
            most = config.max_requests if config.num_pages is not None else min(most, config.max_requests)
        num_states = config.num_states or most
        if config.num_pages is None:
            memory = memory - num_states * state_bytes
            halves = 1
    num_pages = config.num_pages or memory // halves // page_bytes
    if num_pages < 1:
        beside = f", beside {num_states} states of {state_bytes:,} bytes" if num_states else ""
        raise ConfigError(f"{asked}: one page of {config.page_size} tokens takes {page_bytes:,} bytes{beside}")
    total = num_pages * page_bytes + num_states * state_bytes
    if total > free.limit:
        raise ConfigError(f"{asked}: {total:,} bytes for pages and states, but only {free.limit:,} bytes are free")
    return num_pages, num_states
