"""The README's figure of a result of bench_peers.py, and the names that figure and tables share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {"nanokv": "nanokv", "vllm": "vLLM-CPU", "llama": "llama.cpp", "transformers": "transformers"}
COLORS = {"nanokv": "tab:orange", "vllm": "tab:blue", "llama": "tab:green", "transformers": "tab:gray"}
UNITS = {
    "decode_tokens_per_s": "tok/s",
    "output_tokens_per_s": "output tok/s",
    "prefill_tokens_per_s": "tok/s",
    "requests_per_s": "requests/s",
    "seconds": "s",
}


def number(value: float) -> str:
    """Three digits: 0.903, 31.4, 2,470."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def is_less_better(row: dict) -> bool:
    return row["measure"] == "seconds"


def draw(result: dict, path: Path) -> None:
    """The README's figure: a panel for each speed, and requests/s over the shared prefix. Same JSON, same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "nanokv", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(12, 5.6), layout="constrained")
        axes = figure.subplots(2, 3).flat
        bars = [row for row in result["rows"] if row["measure"] != "requests_per_s"]
        order = sorted(bars, key=lambda row: row["measure"] == "seconds")
        left: list[str] = []
        for place, (row, panel) in enumerate(zip(order, axes, strict=False)):
            names = _bars(panel, row)
            if place % 3 and names == left:
                panel.set_yticklabels([])  # the panel on its left has the same
            left = names
        _sweep(list(axes)[-1] if len(order) >= 6 else figure.axes[5], result)
        for panel in figure.axes[len(order) : 5]:
            panel.set_axis_off()
        threads = f"{result['settings']['threads']} threads"
        figure.suptitle(f"{result['model']}, {result['hardware']['cpu']}, {threads}, {result['date']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _bars(panel: Any, row: dict) -> list[str]:
    """Draws a bar for each engine; returns their names, from above."""
    names = sorted(row["engines"], key=lambda name: (list(NAMES).index(name.split()[0]), name))
    for place, name in enumerate(names):
        runs, engine = row["engines"][name], name.split()[0]
        spread = [[runs["median"] - runs["min"]], [runs["max"] - runs["median"]]]
        panel.barh(place, runs["median"], color=COLORS[engine], xerr=spread, error_kw={"elinewidth": 1})
        panel.annotate(f" {number(runs['median'])}", (0, place), va="center", color="white", weight="bold")
    panel.set_yticks(range(len(names)), [f"{NAMES[name.split()[0]]} {name.split()[1]}" for name in names])
    panel.invert_yaxis()
    better = "less is better" if is_less_better(row) else "more is better"
    panel.set_title(f"{row['name']}\n{UNITS[row['measure']]}, {better}", fontsize=9)
    return names


def _sweep(panel: Any, result: dict) -> None:
    rows = [row for row in result["rows"] if row["measure"] == "requests_per_s"]
    most = max((row["concurrency"] for row in rows), default=0)
    rows = [row for row in rows if row["concurrency"] == most]
    for name in dict.fromkeys(name for row in rows for name in row["engines"]):
        shared = [row["shared_tokens"] for row in rows if name in row["engines"]]
        runs = [row["engines"][name] for row in rows if name in row["engines"]]
        middle = [one["median"] for one in runs]
        spread = [[one["median"] - one["min"] for one in runs], [one["max"] - one["median"] for one in runs]]
        engine, dtype = name.split()
        style = "--" if dtype == "float32" else "-"
        panel.errorbar(shared, middle, spread, fmt=style, marker="o", color=COLORS[engine], elinewidth=1,
                       label=f"{NAMES[engine]} {dtype}")  # fmt: skip
    panel.set_ylim(bottom=0)
    panel.set_xlabel("shared tokens of 1,024")
    panel.set_title(f"bench prefix, {most} clients\nrequests/s, more is better", fontsize=9)
    if rows:
        panel.legend(fontsize=8)
