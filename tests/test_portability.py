"""Other systems than Linux, imagined: a process in which the modules and functions of POSIX are absent."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanokv import LLM, SamplingParams
from nanokv.cli import learn_watch
from nanokv.learn import check_process, checking

ROOT = Path(__file__).parents[1]

WITHOUT_POSIX = """
import builtins, ctypes, io, mmap, os, pkgutil, signal, sys
from importlib import import_module

# The libraries have builds for other systems, so they are imported first.
import torch, numba, tokenizers, jinja2, click, rich.progress, gguf, safetensors.torch, huggingface_hub, msgspec

ABSENT = {"fcntl", "termios", "tty", "pty", "resource", "readline", "grp", "pwd", "syslog"}


class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT:
            raise ImportError(f"No module named {name!r} here", name=name)


def no_kernel_files(path, *arguments, opened=builtins.open, **options):
    if str(path).startswith(("/proc", "/sys", "/dev")):
        raise FileNotFoundError(2, "No such file or directory", path)
    return opened(path, *arguments, **options)


def no_torch_library(name, *arguments, load=ctypes.CDLL, **options):
    if "libtorch_cpu" in str(name):
        raise OSError(f"{name}: not found")
    return load(name, *arguments, **options)


sys.meta_path.insert(0, Refusing())
for name in ABSENT:
    sys.modules.pop(name, None)
for owner, names in {
    os: "fork forkpty sched_getaffinity sched_setaffinity posix_fadvise killpg getuid geteuid setsid sysconf mkfifo "
        "memfd_create pidfd_open register_at_fork getloadavg wait4 uname ttyname",
    signal: "SIGKILL SIGSTOP SIGCONT SIGXCPU SIGALRM SIGHUP SIGWINCH SIGUSR1 SIGTSTP setitimer alarm pthread_sigmask "
        "pidfd_send_signal",
    mmap: "MADV_HUGEPAGE MAP_PRIVATE MAP_ANONYMOUS",
}.items():  # fmt: skip
    for name in names.split():
        if hasattr(owner, name):
            delattr(owner, name)
builtins.open = no_kernel_files
ctypes.CDLL = no_torch_library
if sys.argv[1] == "windows":
    import types
    status = lambda pointer: (setattr(pointer._obj, "total", 2**34), setattr(pointer._obj, "free", 2**33))
    ctypes.windll = types.SimpleNamespace(kernel32=types.SimpleNamespace(GlobalMemoryStatusEx=status))
    sys.modules["msvcrt"] = types.ModuleType("msvcrt")
    sys.modules["msvcrt"].locking, sys.modules["msvcrt"].LK_NBLCK = lambda *file_mode_bytes: None, 2
else:
    os.sysconf = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}.__getitem__
"""

GENERATE_AND_IMPORT_ALL = """
import nanokv
from nanokv import LLM, SamplingParams
from nanokv.engine.limits import free_memory
from nanokv.kernels.cpu.omp import GOMP

assert free_memory() == 2**33 and GOMP == 0
torch.set_num_threads(2)
with LLM("tiny-gqa", device="cpu", dtype="float32") as llm:
    outputs = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=8))
    print([output.token_ids for output in outputs])
for module in pkgutil.walk_packages(nanokv.__path__, "nanokv."):
    if not module.name.startswith(EXEMPT):
        import_module(module.name)
import nanokv.disagg.config
"""
TEXTS = ["There is a red ball. Omar owns it. " * 8 + "The owner is", "A box is blue"]
EXEMPT = ("nanokv.disagg.", "nanokv.kernels.cuda.", "nanokv.engine.check_triton")
"""Processes that share pages need Linux, and GPU kernels need triton."""


@pytest.mark.parametrize("system", ["windows", pytest.param("macos", marks=pytest.mark.slow)])
def test_nothing_outside_disagg_needs_posix(system):
    """The same tokens, on one thread: torch's OpenMP library is not found either. Every other module is imported."""
    script = f"{WITHOUT_POSIX}\nTEXTS, EXEMPT = {TEXTS!r}, {EXEMPT!r}\n{GENERATE_AND_IMPORT_ALL}"
    ended = subprocess.run(
        [sys.executable, "-c", script, system], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    with LLM("tiny-gqa", device="cpu", dtype="float32") as llm:
        here = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=8))
    assert ended.stdout.strip() == str([output.token_ids for output in here])


def test_watch_reads_the_keys_of_windows(monkeypatch):
    keys = ["N"]
    monkeypatch.setattr(learn_watch, "msvcrt", SimpleNamespace(kbhit=lambda: bool(keys), getwch=lambda: keys.pop()))
    with learn_watch._single_keys():
        assert learn_watch._key(5.0) == "n"
        assert learn_watch._key(0.0) is None


def test_a_check_without_process_groups_and_limits_still_ends_its_process(monkeypatch):
    monkeypatch.delattr(os, "killpg")
    monkeypatch.delattr(signal, "SIGXCPU")
    monkeypatch.setitem(sys.modules, "resource", None)
    check_process._limit_processor_time(1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    checking._kill_group(process)
    assert process.wait(60) != 0
    assert checking._cut_short("load", None, 10, "").kind == "timeout"
