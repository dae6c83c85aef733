"""How many pages: from the user's choice, or from the memory that is free."""

from __future__ import annotations

import os

import torch

from nanokv.core.config import EngineConfig, parse_bytes
from nanokv.core.errors import ConfigError
from nanokv.core.spec import PageLayout

CPU_SHARE, CPU_MOST = 0.25, 4 * 2**30


def pool_size(config: EngineConfig, layout: PageLayout, device: torch.device) -> int:
    """Pages of the pool. Raises ConfigError when not even one page fits or more is asked for than there is."""
    page_bytes = max(layout.page_bytes, 1)
    free = free_memory(device)
    if config.num_pages is not None:
        num_pages, asked = config.num_pages, f"num_pages={config.num_pages}"
    elif config.kv_memory is not None:
        num_pages, asked = parse_bytes(config.kv_memory, "kv_memory") // page_bytes, f"kv_memory={config.kv_memory!r}"
    else:
        num_pages, asked = int(min(free * CPU_SHARE, CPU_MOST)) // page_bytes, "kv_memory=None"
    if num_pages < 1:
        raise ConfigError(f"{asked}: one page of {config.page_size} tokens takes {page_bytes:,} bytes")
    if num_pages * page_bytes > free:
        raise ConfigError(f"{asked}: {num_pages * page_bytes:,} bytes for pages, but only {free:,} bytes are free")
    return num_pages


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
