"""Decoding of one request alone and beside busy programs on the same processors, with several bounds on spins.

    python scripts/bench_contention.py --model smollm2-135m-instruct --json FILE
    python scripts/bench_contention.py --spins 10000,none --loops 0,2 --llama-python VENV/bin/python --gguf FILE

Each engine is a worker process of scripts/peers that loads once. Spins are GOMP_SPINCOUNT, "none" libgomp's own choice
(about 300,000), "passive" OMP_WAIT_POLICY. In each repeat every number of loops is taken, and every engine in turn, the
order reversed from one repeat to the next; rows are medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from peers.client import Worker  # noqa: E402
from peers.figure import markdown, number  # noqa: E402
from peers.rows import rounded  # noqa: E402

from nanokv.bench.workloads import random_prompts  # noqa: E402
from nanokv.cli.common import envelope  # noqa: E402
from nanokv.core.spin import CHOICES, SPINS  # noqa: E402
from nanokv.hub.catalog import DEFAULT_MODEL  # noqa: E402
from nanokv.hub.home import resolve_model  # noqa: E402
from nanokv.models.read import read_folder  # noqa: E402

CONTEXT = 256
CHOSEN = {"none": {"KMP_BLOCKTIME": "0"}, "passive": {"OMP_WAIT_POLICY": "passive"}}
"""Words of --spins. KMP_BLOCKTIME says nothing to libgomp, and counts as a choice of the user."""


def main() -> None:
    options = parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    folder = resolve_model(options.model)
    settings = {
        "model": str(folder), "dtype": options.dtype, "threads": options.threads, "kv_bytes": 1 << 29,
        "max_model_len": 1024, "max_step_tokens": 2048, "max_requests": 4, "gguf": str(options.gguf),
    }  # fmt: skip
    prompts = random_prompts(1, CONTEXT, read_folder(folder).vocab_size, seed=1)
    job = {"prompts": prompts, "output_tokens": options.tokens, "concurrency": 1, "before": []}
    speeds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, workers(options, settings, Path(scratch)) as made:
        for worker in made.values():
            worker.ask(**job)
        for repeat in range(options.repeats):
            for loops in options.loops:
                with busy(loops):
                    for name in made if repeat % 2 == 0 else reversed(made):
                        (one,) = made[name].ask(**job)["requests"]
                        speed = (options.tokens - 1) / (one["latency_s"] - one["ttft_s"])
                        speeds.setdefault((name, loops), []).append(speed)
                        print(f"{repeat + 1}  {name}  {loops} loops  {speed:.4g} tokens/s", file=sys.stderr, flush=True)
    report(options, speeds)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="and processors (%(default)s)")
    parser.add_argument("--loops", type=numbers, default=[0, 1, 2, 4, 8], help="busy programs (0,1,2,4,8)")
    parser.add_argument("--spins", default=str(SPINS), help="comma-separated numbers, none, passive (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of the answer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--llama-python", help="interpreter of llama-cpp-python's environment; needs --gguf")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    if options.llama_python and not options.gguf:
        parser.error("--llama-python needs --gguf")
    return options


@contextmanager
def workers(options: argparse.Namespace, settings: dict, scratch: Path) -> Iterator[dict[str, Worker]]:
    """The engines by name, each a process."""
    made: dict[str, Worker] = {}
    try:
        for spins in options.spins.split(","):
            for name in CHOICES:
                os.environ.pop(name, None)
            os.environ |= CHOSEN[spins] if spins in CHOSEN else {"GOMP_SPINCOUNT": str(int(spins))}
            made[f"nanokv, spins {spins}"] = Worker("nanokv", sys.executable, settings, scratch / f"{spins}.log")
        if options.llama_python:
            made["llama.cpp"] = Worker("llama", options.llama_python, settings, scratch / "llama.log")
        yield made
    finally:
        for worker in made.values():
            worker.close()


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that compute without end, on the processors of this one."""
    processes = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(loops)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _spin() -> None:
    while True:
        pass


def report(options: argparse.Namespace, speeds: dict[tuple[str, int], list[float]]) -> None:
    """Prints the table and writes the JSON."""
    rows: list[dict[str, Any]] = []
    for (name, loops), found in speeds.items():
        alone, middle = speeds.get((name, 0)), median(found)
        share = {} if alone is None else {"of_alone_share": middle / median(alone)}
        row = {"engine": name, "busy_loops": loops, "output_tokens_per_s": middle, "values": found}
        rows.append(row | share)
    names = list(dict.fromkeys(row["engine"] for row in rows))
    by_loops = [[str(loops), *(number(median(speeds[name, loops])) for name in names)] for loops in options.loops]
    print(markdown(["busy programs", *(f"{name}, tokens/s" for name in names)], by_loops))
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("dtype", "threads", "tokens", "repeats")}
        result = envelope("bench_contention", options.model, settings | {"context_tokens": CONTEXT}, rows)
        options.json.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
