"""How many pages and states: from the user's choice, or from the memory that is free."""

from __future__ import annotations

import os

import torch

from nanokv.core.config import EngineConfig, parse_bytes
from nanokv.core.errors import ConfigError
from nanokv.core.spec import PageLayout

CPU_SHARE, CPU_MOST = 0.25, 4 * 2**30


def pool_size(config: EngineConfig, layout: PageLayout, device: torch.device) -> tuple[int, int]:
    """Pages and states of the pools.

    Where layers are recurrent, memory is divided in two halves: states get as many bytes as pages. For every request
    that runs there are two states (one that moves, one checkpoint); what is left keeps checkpoints of the prefix cache.
    Raises ConfigError when not even one page and two states fit, or more is asked for than there is.
    """
    page_bytes, state_bytes, free = max(layout.page_bytes, 1), layout.state_bytes, free_memory(device)
    halves = 2 if state_bytes and config.num_states is None else 1
    if config.num_pages is not None:
        memory, asked = config.num_pages * page_bytes * halves, f"num_pages={config.num_pages}"
    elif config.kv_memory is not None:
        memory, asked = parse_bytes(config.kv_memory, "kv_memory"), f"kv_memory={config.kv_memory!r}"
    else:
        memory, asked = int(min(free * CPU_SHARE, CPU_MOST)), "kv_memory=None"
    num_states = 0
    if state_bytes:
        num_states = config.num_states or max(memory // halves // state_bytes, 2)
        if config.num_pages is None:
            memory = memory - num_states * state_bytes
            halves = 1
    num_pages = config.num_pages or memory // halves // page_bytes
    if num_pages < 1:
        beside = f", beside {num_states} states of {state_bytes:,} bytes" if num_states else ""
        raise ConfigError(f"{asked}: one page of {config.page_size} tokens takes {page_bytes:,} bytes{beside}")
    total = num_pages * page_bytes + num_states * state_bytes
    if total > free:
        raise ConfigError(f"{asked}: {total:,} bytes for pages and states, but only {free:,} bytes are free")
    return num_pages, num_states


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device` without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: ask sysconf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
