"""Blocks of docs/benchmarks.md on disaggregated prefill, from docs/benchmarks/disagg.json (`nanokv bench disagg`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from peers.figure import markdown, number

JSON = Path(__file__).resolve().parents[1] / "docs/benchmarks/disagg.json"


def _result() -> dict:
    return json.loads(JSON.read_text(encoding="utf-8"))


def _seconds(value: float) -> str:
    return f"{number(value)} s" if value >= 1 else f"{1000 * value:.3g} ms"


def disagg(_: dict) -> str:
    """The table of the three modes."""
    result = _result()
    settings, rows = result["settings"], []
    for row in result["rows"]:
        p99 = f"{_seconds(row['tpot_p99_s'])} (spread {row['tpot_p99_spread']:.0%})"
        rows.append([
            row["mode"], _seconds(row["tpot_p50_s"]), p99, _seconds(row["longest_stall_s"]),
            _seconds(row["ttft_p50_s"]), number(row["requests_per_s"]), number(row["output_tokens_per_s"]),
        ])  # fmt: skip
    intro = (
        f"{result['model']}, {settings['dtype']}; {settings['running']} running answers, {settings['prompts']} prompts "
        f"of {settings['prompt_tokens']:,} tokens one after the other; chunks of {settings['chunk']} tokens. Of "
        f"{settings['repeat']} runs the one with the median p99 counts; spread: highest less lowest, of the median."
    )
    header = ["mode", "gap p50", "gap p99", "longest gap", "TTFT p50", "prompts/s", "tokens/s"]
    return f"{intro}\n\n{markdown(header, rows)}"


def disagg_targets(_: dict) -> str:
    """The table of the targets that this benchmark measures."""
    one_step, chunked, split = _result()["rows"]
    found = []
    for entry in split["hand_overs"]:
        middle = median(entry["seconds"])
        found.append([
            f"transfer of {entry['tokens']:,} tokens", "under 2 ms", f"{_seconds(middle)} (at most "
            f"{_seconds(max(entry['seconds']))} of {len(entry['seconds'])})", _verdict(middle < 0.002),
        ])  # fmt: skip
    ratio = one_step["tpot_p99_s"] / split["tpot_p99_s"]
    found.append(["gap p99, one step against split", "at least 3 x", f"{ratio:.2f} x", _verdict(ratio >= 3)])
    ratio = chunked["tpot_p99_s"] / split["tpot_p99_s"]
    found.append(["gap p99, chunked against split", "reported", f"{ratio:.2f} x", ""])
    return markdown(["measure", "to reach", "found", "reached"], found)


def _verdict(is_reached: bool) -> str:
    return "yes" if is_reached else "**no**"


BLOCKS: dict[str, Callable[[dict], str]] = {make.__name__: make for make in (disagg, disagg_targets)}
