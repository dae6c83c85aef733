"""Compiling ahead: at the first run on a machine, other processes compile CPU kernels while this one imports torch and
loads weights.

numba compiles one function at a time, so threads do not help. A process (without_torch.py) imports numba without torch,
and begins with the kernel that takes longest and is needed late. Its results lie in numba's cache on disk; a claim on
each function (cpu/claims.py) keeps two processes from compiling the same one. All of it is a matter of speed: a kernel
that is not there is compiled by the process that calls it.

Imports neither torch nor numba.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

logger = logging.getLogger("nanokv")

FOLDER = Path(__file__).parent / "cpu"
MOST_PROCESSES = 2
"""The kernel that takes longest takes about half of the time of all."""
_PROGRAM = "import json, sys; order = json.loads(input()); sys.path[:] = order['path']; " + (
    "from nanokv.kernels.without_torch import compile_ahead; compile_ahead(order)"
)


@cache
def stamp() -> str:
    """A digest of the code of all CPU kernels: what their compiled code depends on."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(FOLDER.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def start(dtype: str, codec: str, is_latent: bool) -> list[Thread]:
    """Starts the processes that compile the kernels of a model, unless they have once done so; does not wait for them.

    dtype       of the weights, by name
    codec       the name of the codec of pages
    is_latent   attention is MLA
    Returns     a thread for each process, which ends with it; none on a single core
    """
    done = _marker(dtype, codec, is_latent)
    if not sys.executable or done.exists():
        return []
    order = {"path": sys.path, "done": str(done), "dtype": dtype, "is_raw": codec == "raw", "is_latent": is_latent}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(MOST_PROCESSES, cores - 1)
    threads = [Thread(target=_run, args=(order,), name="compile-ahead", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def _marker(dtype: str, codec: str, is_latent: bool) -> Path:
    """The file that says that these kernels are in numba's cache, which lies in the same folder."""
    name = f"{stamp()} {sys.version} {version('numba')} {_cpu()} {dtype} {codec == 'raw'} {is_latent}"
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or FOLDER / "__pycache__")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):  # numba takes a folder of the user
        folder = Path.home() / ".cache" / "nanokv"
    return folder / f"ahead-{hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()}"


def _cpu() -> str:
    """The model of the CPU and its instructions, on Linux; elsewhere the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return " ".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


def _run(order: dict[str, Any]) -> None:
    """Runs the process to its end. It ends when its standard input does, so it does not outlive this process."""
    # A Ctrl-C at the terminal ends no process of another session.
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    try:
        with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, text=True, **silent) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            process.wait()
    except OSError:  # no process may be started here, or it ended at once
        logger.info("no second process compiles kernels", exc_info=True)
