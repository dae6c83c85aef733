"""Everything that needs a GPU, in one run: tests, kernels, the engine. One JSON file, one markdown table.

    python scripts/gpu_report.py [--json FILE] [--markdown FILE] [--device cuda] [--budget 530] [--only PART] [--quick]

Needs no network. Each part runs in a process of its own with a time limit and reports its rows one by one. A part that
fails, hangs or misses a package leaves its error and its rows so far, and the next part runs. Both files are rewritten
after every part. --quick --device cpu runs all parts at meaningless sizes, to check that they run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

PACKAGES = ("torch", "triton", "transformers", "numba", "numpy", "safetensors", "tokenizers", "gguf", "msgspec")
LIMITS = {
    "about": 30, "limits": 40, "tests": 140, "kernels": 110, "codecs": 60, "switches": 70, "host": 40,
    "engine qwen3-0.6b": 60, "engine qwen3-8b": 60, "prefix": 100, "engine qwen3.5-4b": 70,
    "engine deepseek-v2-lite": 90, "engine qwen3-1.7b": 50, "transformers": 50,
}  # fmt: skip
"""Part -> its limit in seconds, the most informative first. The sum exceeds the budget, which ends the last parts.
"about" always runs."""


def rows_of(part: str, device: str, quick: bool) -> Iterable[dict]:
    """The rows of a part. Its imports are here, so that a missing package is an error of this part alone."""
    if part == "about":
        return [about_device(device)]
    if part == "tests":
        return [run_tests(quick)]
    from gpu import engines, kernels
    from gpu.common import Run

    run = Run(device, quick)
    if part.startswith("engine "):
        return engines.engine(run, part.removeprefix("engine "))
    simple: dict[str, Callable[[Run], Iterable[dict]]] = {
        "limits": kernels.limits,
        "kernels": kernels.kernels,
        "switches": engines.switches,
        "host": engines.host,
        "prefix": engines.prefix,
        "transformers": engines.transformers,
        "codecs": engines.codecs,
    }
    return simple[part](run)


def run_tests(quick: bool) -> dict:
    """The GPU tests by pytest: its last line, and the names of the failed tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]  # some tests need packages that may be missing
    done = subprocess.run([*command, *(["--collect-only"] if quick else [])], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    row = {"name": "pytest -m gpu", "shape": lines[-1] if lines else done.stderr[-300:], "failed": failed}
    return row if done.returncode == 0 else {**row, "error": f"exit {done.returncode}"}


def run_part(part: str, device: str, quick: bool, limit: float) -> dict[str, Any]:
    """A part in its own process: {"part", "seconds", "rows", and "error" if it did not finish}."""
    command = [sys.executable, __file__, "--part", part, "--device", device, *(["--quick"] if quick else [])]
    begin, result = time.perf_counter(), {"part": part}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
        if process.returncode:
            last = err.strip().splitlines()[-1:] or [f"exit {process.returncode}"]
            result["error"] = last[0][:300]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its children, too: pytest, compilers
        out, _ = process.communicate()
        result["error"] = f"stopped after {limit:.0f} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return {**result, "seconds": time.perf_counter() - begin, "rows": rows}


def about() -> dict[str, Any]:
    """The system and versions."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "system": platform.platform(), "versions": versions}


def about_device(device: str) -> dict[str, Any]:
    """The device, and the choice of "auto". A broken driver may hang here."""
    import torch

    from nanokv.engine.device import choose_device

    chosen = choose_device("auto")
    row = {"name": "device", "shape": device, "auto": f"{chosen.device}: {chosen.reason}", "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return row
    card = torch.cuda.get_device_properties(0)
    return {**row, "gpu": card.name, "memory_bytes": card.total_memory, "sms": card.multi_processor_count,
            "cache_bytes": card.L2_cache_size}  # fmt: skip


def with_shares(parts: list[dict]) -> None:
    """Adds each row's share of the limits measured in the same run."""
    measured = [row for part in parts if part["part"] == "limits" for row in part["rows"]]
    for unit in ("bytes_per_s", "flops_per_s"):
        limit = max((row[unit] for row in measured if unit in row), default=None)
        for part in parts:
            for row in part["rows"]:
                if limit and row.get(unit):
                    row[f"{unit.partition('_')[0]}_share"] = row[unit] / limit


def markdown(report: dict) -> str:
    """One table of all rows, then the errors."""
    lines = [
        "| part | what | shape | time | tokens/s | GB/s | of copy | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part in report["parts"]:
        for row in part["rows"]:
            taken = row.get("seconds", row.get("step_s"))
            cells = [
                part["part"], row["name"], row.get("shape", ""), "" if taken is None else f"{taken * 1e6:,.1f} us",
                _number(row, "tokens_per_s", 1, ",.0f") or _number(row, "output_tokens_per_s", 1, ",.0f"),
                _number(row, "bytes_per_s", 1e9, ",.0f"), _number(row, "bytes_share", 0.01, ".0f", " %"),
                _number(row, "flops_per_s", 1e12, ",.1f"),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    failed = [(part["part"], part["error"]) for part in report["parts"] if "error" in part]
    failed += [
        (f"{part['part']}: {row['name']} {row.get('shape', '')}", row["error"])
        for part in report["parts"]
        for row in part["rows"]
        if "error" in row
    ]
    lines += ["", *(f"- **{where}**: {error}" for where, error in failed)] if failed else []
    return "\n".join(lines) + "\n"


def _number(row: dict, name: str, unit: float, form: str, suffix: str = "") -> str:
    return format(row[name] / unit, form) + suffix if row.get(name) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/benchmarks/gpu.json", help="(%(default)s)")
    parser.add_argument("--markdown", type=Path, help="default: beside the JSON")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (%(default)s)")
    parser.add_argument("--budget", type=float, default=530, help="seconds for everything (%(default)s)")
    parser.add_argument("--only", choices=list(LIMITS), action="append", help="this part alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="meaningless sizes, to check that all parts run")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # for the process of a part
    options = parser.parse_args()
    if options.part:
        for row in rows_of(options.part, options.device, options.quick):
            print(json.dumps(row), flush=True)
        return
    begin = time.perf_counter()
    report: dict[str, Any] = {"about": about(), "quick": options.quick, "parts": []}
    for part in dict.fromkeys(["about", *(options.only or LIMITS)]):
        left = options.budget - (time.perf_counter() - begin)
        if left < 5:
            result = {"part": part, "error": "no time left", "seconds": 0.0, "rows": []}
        else:
            result = run_part(part, options.device, options.quick, min(LIMITS[part], left))
        report["parts"].append(result)
        with_shares(report["parts"])
        report["seconds"] = time.perf_counter() - begin
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        table = options.markdown or options.json.with_suffix(".md")
        table.write_text(markdown(report), encoding="utf-8")
        said = result.get("error") or f"{len(result['rows'])} rows"
        print(f"{result['seconds']:6.1f} s  {part}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
