"""The driver's side of a worker: a process in a peer's own environment that loads once and then runs jobs."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

from nanokv.core.spin import bounded

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOAD_S, ANSWER_S = 900, 900


class WorkerError(Exception):
    """A worker failed, hung or answered with an error."""


class Worker:
    """One engine at one dtype, in a process of its own.

    engine     nanokv, vllm, llama or transformers
    python     the interpreter of its environment
    settings   see the workers; must have "dtype" and "threads"
    log        file for the output of the engine
    Raises     WorkerError if the worker does not start
    """

    def __init__(self, engine: str, python: str, settings: dict, log: Path) -> None:
        self.engine, self.name, self._log = engine, f"{engine} {settings['dtype']}", log
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [python, str(HERE / f"{engine}_worker.py"), json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment(engine, settings),
            )  # fmt: skip
        ready = self._read(LOAD_S)
        self.load_s: float = ready["load_s"]
        self.about: dict[str, Any] = ready["about"]

    def ask(self, **job: Any) -> dict:
        """The answer to one job. Raises WorkerError."""
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(f"{self.name} has ended{self._last_words()}") from None
        return self._read(ANSWER_S)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, timeout: float) -> dict:
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._process.kill()
            raise WorkerError(f"{self.name} gave no answer in {timeout} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} has ended{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1]}" if lines else ""


def environment(engine: str, settings: dict) -> dict[str, str]:
    """The environment of a worker: threads, no network, and the settings that vLLM reads only from there; the bound
    on spins that the command line sets for nanokv, whose worker imports torch first."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
    if engine == "nanokv":
        variables = bounded(variables | {"PYTHONPATH": str(ROOT)})
    if engine == "vllm":  # it runs on Linux only, where the affinity is known
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, settings["kv_bytes"] >> 30)),
            "VLLM_CPU_OMP_THREADS_BIND": cpu_range(sorted(os.sched_getaffinity(0))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
    return variables


def cpu_range(cpus: list[int]) -> str:
    """[0, 1] -> "0-1", [0, 2] -> "0,2"."""
    if len(cpus) > 1 and cpus == list(range(cpus[0], cpus[-1] + 1)):
        return f"{cpus[0]}-{cpus[-1]}"
    return ",".join(map(str, cpus))
