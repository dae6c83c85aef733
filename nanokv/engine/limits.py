"""Memory and processors that this process may use, within the limits of its container.

Linux limits groups of processes (cgroups), and a group cannot exceed the groups around it. Both versions are read, the
group of this process and all around it, and the least room counts. Other systems have no such limits here.

    version 2    /sys/fs/cgroup/GROUP/          memory.max, memory.high, memory.current, cpu.max
    version 1    /sys/fs/cgroup/memory/GROUP/   memory.limit_in_bytes, memory.usage_in_bytes
                 /sys/fs/cgroup/cpu/GROUP/      cpu.cfs_quota_us, cpu.cfs_period_us

Source: cgroup-v2.rst and cgroup-v1/memory.rst of the Linux kernel's documentation.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Iterator

import torch

logger = logging.getLogger("nanokv")


def free_memory(root: str = "") -> int:
    """Bytes of main memory that can be allocated without swapping, in this container.

    root   a folder in front of /proc and /sys: tests have their own
    """
    return min([_machine_memory(root)[1], *_room_in_groups(root)])


def total_memory(root: str = "") -> int:
    """Bytes of main memory of the machine."""
    return _machine_memory(root)[0]


def processors(root: str = "") -> int:
    """Processors that this process may use at the same time: those of its affinity, as many as its quota pays for."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([mine, *_quotas(root)]))


_changed: tuple[int, int] | None = None
"""The threads of torch before an engine changed them, and what it made of them."""


def set_threads(threads: int | None = None, root: str = "") -> None:
    """Sets the threads of torch, whose number the compiled kernels take too. It counts for the whole process: the
    engine that was built last decides for all. Only a Python thread that has run torch before keeps its number.

    threads   None: those that torch had before an engine changed them, but no more than `processors`. More would take
              turns, and spin meanwhile. OMP_NUM_THREADS is the user's choice, and stays
    """
    global _changed
    available, present = processors(root), torch.get_num_threads()
    own = _changed[0] if _changed is not None and _changed[1] == present else present
    if threads is None:
        threads = own if "OMP_NUM_THREADS" in os.environ else min(own, available)
    elif threads > available:
        logger.warning("threads=%d: this process may use %d processors, so threads wait for each other",
                       threads, available)  # fmt: skip
    if threads != present:
        _changed = own, threads
        torch.set_num_threads(threads)


# -- control groups


def _room_in_groups(root: str) -> Iterator[int]:
    """Bytes that are left in each group with a limit. Clean pages of files are given up before the limit is felt."""
    for folder in _groups(root, "memory"):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = (_number(_read(f"{folder}/{name}")) for name in (limit_name, usage_name))
            if limit is not None and usage is not None:
                cache = _fields(_read(f"{folder}/memory.stat")).get(cache_name, 0)
                yield max(0, limit - max(0, usage - cache))


def _quotas(root: str) -> Iterator[int]:
    """Processors that the quota of each group pays for, rounded up."""
    for folder in _groups(root, "cpu"):
        quota, _, period = (_read(f"{folder}/cpu.max") or "").strip().partition(" ")
        if not quota:
            quota, period = (_read(f"{folder}/cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        share, of = _number(quota), _number(period)
        if share and of:  # "max" is no number, -1 (version 1) none either
            yield math.ceil(share / of)


def _groups(root: str, controller: str) -> Iterator[str]:
    """The folders of the groups of this process that limit what `controller` counts, innermost first.

    In a container the path that the kernel tells may be that of the host, which does not exist here: then the files at
    the top, which every walk reaches, are those of the container.
    """
    for line in (_read(f"{root}/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            tops = [f"{root}/sys/fs/cgroup", f"{root}/sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            tops = [f"{root}/sys/fs/cgroup/{controller}", f"{root}/sys/fs/cgroup/{controllers}"]
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for top in dict.fromkeys(tops):
            for length in range(len(parts), -1, -1):
                yield "/".join([top, *parts[:length]])


def _fields(text: str | None) -> dict[str, int]:
    pairs = (line.split() for line in (text or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(text: str | None) -> int | None:
    """The number that a file holds; None for "max", -1 and a file that does not exist."""
    return int(text) if text is not None and text.strip().isdecimal() else None


def _read(path: str) -> str | None:
    """A small file of the kernel; None where it does not exist or may not be read."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return None


# -- the machine


def _machine_memory(root: str) -> tuple[int, int]:
    """Bytes of main memory: all, and those that can be allocated without swapping."""
    lines = (_read(f"{root}/proc/meminfo") or "").replace(" kB", "").replace(":", " ")
    found = _fields(lines)
    if "MemAvailable" in found:
        return found["MemTotal"] * 1024, found["MemAvailable"] * 1024
    if hasattr(os, "sysconf"):  # macOS: what others use is not told; half is a guess
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total // 2
    return _windows_memory()


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("total", ctypes.c_uint64), ("free", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )  # fmt: skip


def _windows_memory() -> tuple[int, int]:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.total, status.free
