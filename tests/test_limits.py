"""Memory and processors within the limits of a container, from trees of files such as the kernel shows them."""

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanokv import LLM, EngineConfig
from nanokv.core.errors import ConfigError
from nanokv.engine import limits, memory
from nanokv.engine.limits import free_memory, processors, set_threads, total_memory
from nanokv.kernels.cpu.omp import threads_for

MIB, GIB = 2**20, 2**30


def tree(root: Path, groups: str, files: dict[str, object]) -> str:
    """A machine of 256 GiB whose files say this; `groups` is /proc/self/cgroup."""
    meminfo = (
        f"MemTotal: {256 * GIB // 1024} kB\nMemFree: 9 kB\nMemAvailable: {200 * GIB // 1024} kB\nHugePages_Free: 0\n"
    )
    everything = {"proc/meminfo": meminfo, "proc/self/cgroup": groups}
    everything |= {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in everything.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return str(root)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """64 processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


V2 = "0::/system.slice/box\n"
V1 = "9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n"


def test_without_a_limit_the_machine_decides(tmp_path):
    root = tree(tmp_path, V2, {"system.slice/box/memory.max": "max\n", "system.slice/box/memory.current": GIB,
                               "system.slice/box/cpu.max": "max 100000\n"})  # fmt: skip
    assert free_memory(root) == 200 * GIB and total_memory(root) == 256 * GIB and processors(root) == 64


def test_a_group_of_version_2_bounds_memory_and_processors(tmp_path):
    """Pages of files that were not used of late are given up, and count as free."""
    stat = f"anon {900 * MIB}\nfile {500 * MIB}\ninactive_file {400 * MIB}\n"
    files = {"memory.max": 2 * GIB, "memory.current": 1300 * MIB, "memory.stat": stat, "cpu.max": "150000 100000\n"}
    root = tree(tmp_path, V2, {f"system.slice/box/{name}": content for name, content in files.items()})
    assert free_memory(root) == 2 * GIB - 900 * MIB and processors(root) == 2


def test_the_least_of_all_groups_around_a_process_counts(tmp_path):
    files = {
        "memory.max": 64 * GIB, "memory.current": 60 * GIB, "system.slice/memory.max": 16 * GIB,
        "system.slice/memory.current": 4 * GIB, "system.slice/box/memory.max": "max",
        "system.slice/box/memory.current": GIB, "system.slice/cpu.max": "50000 100000",
        "system.slice/box/cpu.max": "max 100000",
    }  # fmt: skip
    root = tree(tmp_path, V2, files)
    assert free_memory(root) == 4 * GIB and processors(root) == 1


def test_a_soft_limit_of_version_2_counts_as_a_limit(tmp_path):
    files = {"memory.max": "max", "memory.high": 3 * GIB, "memory.current": GIB}
    root = tree(tmp_path, V2, {f"system.slice/box/{name}": content for name, content in files.items()})
    assert free_memory(root) == 2 * GIB


@pytest.mark.parametrize("top", ["docker/abc/", ""])
def test_a_group_of_version_1_bounds_memory_and_processors(top, tmp_path):
    """Also in a container, where the path that the kernel tells is that of the host and does not exist."""
    files = {
        f"memory/{top}memory.limit_in_bytes": 2 * GIB, f"memory/{top}memory.usage_in_bytes": GIB,
        f"memory/{top}memory.stat": f"inactive_file 1\ntotal_inactive_file {512 * MIB}\n",
        f"cpu,cpuacct/{top}cpu.cfs_quota_us": "300000\n", f"cpu,cpuacct/{top}cpu.cfs_period_us": "100000\n",
    }  # fmt: skip
    root = tree(tmp_path, V1, files)
    assert free_memory(root) == GIB + 512 * MIB and processors(root) == 3


def test_version_1_without_a_limit_leaves_the_machine(tmp_path):
    files = {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": GIB,
             "cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}  # fmt: skip
    root = tree(tmp_path, V1, files)
    assert free_memory(root) == 200 * GIB and processors(root) == 64


def test_a_group_that_uses_more_than_its_limit_has_no_memory_left(tmp_path):
    root = tree(tmp_path, V2, {"system.slice/box/memory.max": GIB, "system.slice/box/memory.current": 2 * GIB})
    assert free_memory(root) == 0


def test_processors_are_those_of_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert processors(tree(tmp_path, "", {})) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors(tree(tmp_path, "", {})) == os.cpu_count()


def test_torch_gets_no_more_threads_than_there_are_processors(tmp_path, monkeypatch):
    """Unless the user has chosen, or fewer are set already."""
    root, set_to = tree(tmp_path, V2, {"system.slice/box/cpu.max": "200000 100000"}), []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for threads in (64, 3, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        set_threads(None, root)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    set_threads(None, root)
    assert set_to == [2, 2]


def test_a_chosen_number_of_threads_counts_and_one_beyond_the_processors_is_named(tmp_path, monkeypatch, caplog):
    root, set_to = tree(tmp_path, V2, {"system.slice/box/cpu.max": "200000 100000"}), []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    set_threads(1, root)
    set_threads(2, root)
    assert set_to == [1, 2] and not caplog.records
    set_threads(3, root)
    (record,) = caplog.records
    assert set_to == [1, 2, 3] and "threads=3: this process may use 2 processors" in record.getMessage()


def test_kernels_run_on_as_many_threads_as_the_engine_was_given(tiny_llama):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            with LLM(tiny_llama, threads=threads, num_pages=20):
                assert torch.get_num_threads() == threads_for(1e6) == threads
        with pytest.raises(ConfigError, match="threads=0: expected an integer of at least 1"):
            EngineConfig(threads=0)
    finally:
        torch.set_num_threads(before)


def test_an_engine_takes_its_default_pool_from_the_memory_of_its_container(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * GIB)
    budget = memory.memory_for_pages(None, None, None, torch.device("cpu"))
    assert (budget.limit, budget.default) == (2 * GIB, GIB // 2)


def test_other_systems_tell_their_memory(tmp_path, monkeypatch):
    """As on macOS, by sysconf; as on Windows, by its API."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}.__getitem__)
    assert (total_memory(str(tmp_path)), free_memory(str(tmp_path))) == (16 * GIB, 8 * GIB)
    monkeypatch.delattr(os, "sysconf")

    def tell(pointer) -> None:
        status = pointer._obj
        assert status.length == ctypes.sizeof(limits._MemoryStatus) == 64
        status.total, status.free = 32 * GIB, 20 * GIB

    api = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=tell))
    monkeypatch.setattr(ctypes, "windll", api, raising=False)
    assert (total_memory(str(tmp_path)), free_memory(str(tmp_path))) == (32 * GIB, 20 * GIB)
