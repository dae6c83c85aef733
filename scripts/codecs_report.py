"""Blocks of docs/benchmarks.md about codecs, from docs/benchmarks/codecs.json (scripts/bench_codecs.py)
and codes.json (scripts/bench_codes.py), and the figure of the first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from peers.figure import markdown, number

from nanokv.bench.figures import add_caption, draw_codecs
from nanokv.bench.report import caption

BENCHMARKS = Path(__file__).resolve().parents[1] / "docs/benchmarks"
JSON = BENCHMARKS / "codecs.json"
CODES = BENCHMARKS / "codes.json"
MOST = {"tq4": 1.5, "rot4": 1.0}
"""Of the time of raw bfloat16, for decode attention on codes."""


def _result() -> dict:
    return json.loads(JSON.read_text(encoding="utf-8"))


def _rows(result: dict, part: str, tiny: bool = False) -> list[dict]:
    return [row for row in result["rows"] if row["part"] == part and (row["model"] != result["model"]) == tiny]


def draw(path: Path) -> None:
    """Draws the figure of a codecs.json beside it, as SVG. Same JSON, same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    result = json.loads(path.read_text(encoding="utf-8"))
    with rc_context({"svg.hashsalt": "nanokv", "svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 6), layout="constrained")
        add_caption(figure, caption(result))
        draw_codecs(figure, [row for row in result["rows"] if row["model"] == result["model"]])
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def is_one_sided(row: dict) -> bool:
    return "raw" in row["codec"].split("/") and "/" in row["codec"]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _spread(row: dict, name: str, digits: str) -> str:
    return f"{row[name]:{digits}} ± {row[f'{name}_std']:{digits}}"


def codecs_bytes(_: dict) -> str:
    """Bytes of each codec, and its errors on random vectors."""
    result = _result()
    hardware, settings = result["hardware"], result["settings"]
    plan = settings["plan"]
    lines = [
        f"{result['date']}, {hardware['cpu']}, {hardware['threads']} threads, torch {hardware['torch']}. Model "
        f"{result['model']}. {plan['texts']} texts of {plan['text_tokens']:,} tokens; speed is the median of "
        f"{plan['turns']} turns{', a quick run' if settings['quick'] else ''}; a turn of over "
        "10 s is not repeated.",
        "",
    ]
    rows = []
    for row in _rows(result, "codec"):
        if not is_one_sided(row):
            rows.append([
                row["codec"], f"{row['true_bits']:.3g}", f"{row['bytes_per_token']:,.0f}",
                f"{row['smaller_than_bfloat16']:.2f} x", f"{row['tokens_in_1gib']:,}", str(row["requests_at_once"]),
                _error(row["random_k_mse"]), _error(row["theory_k_mse"]), _error(row["random_v_mse"]),
                _error(row["theory_v_mse"]),
            ])  # fmt: skip
    header = ["codec", "true bits", "bytes a token", "smaller than bf16", "tokens in 1 GiB", "requests at once"]
    return "\n".join(lines) + "\n" + markdown([*header, "MSE of K", "theory", "MSE of V", "theory"], rows)


def _quality(rows: list[dict]) -> list[list[str]]:
    return [
        [
            row["codec"], f"{row['true_bits']:.3g}", _spread(row, "kl", ".2g"), _spread(row, "top1_agreement", ".3f"),
            f"{row['perplexity']:.4g}", _spread(row, "perplexity_ratio", ".3f"), _error(row["attention_error"]),
            _error(row["model_k_mse"]), _error(row["model_v_mse"]),
        ]
        for row in rows
    ]  # fmt: skip


QUALITY = [
    "codec",
    "true bits",
    "KL",
    "top-1 agreement",
    "perplexity",
    "to raw",
    "error of attention",
    "MSE of K",
    "of V",
]


def codecs_quality(_: dict) -> str:
    """Quality of each codec, mean ± standard deviation over texts."""
    return markdown(QUALITY, _quality([row for row in _rows(_result(), "codec") if not is_one_sided(row)]))


def codecs_sides(_: dict) -> str:
    """The same with one side coded and the other raw."""
    return markdown(QUALITY, _quality([row for row in _rows(_result(), "codec") if is_one_sided(row)]))


def codecs_speed(_: dict) -> str:
    """Decode tokens per second, and the ratio to the raw codec in turns."""
    speed = _rows(_result(), "speed")
    points = list(dict.fromkeys((row["batch"], row["context_tokens"]) for row in speed))
    rows = []
    for codec in dict.fromkeys(row["codec"] for row in speed):
        found = {(row["batch"], row["context_tokens"]): row for row in speed if row["codec"] == codec}
        cells = [found.get(point) for point in points]
        rows.append([codec] + ["" if row is None else _speed(row) for row in cells])
    return markdown(["codec", *(f"{batch} x {context:,}" for batch, context in points)], rows)


def _speed(row: dict) -> str:
    ratios = f"{row['speed_ratio']:.2f} x"
    if row["speed_ratio_min"] != row["speed_ratio_max"]:
        ratios += f", {row['speed_ratio_min']:.2f} to {row['speed_ratio_max']:.2f}"
    return f"{number(row['output_tokens_per_s'])} ({ratios})"


def codecs_tiny(_: dict) -> str:
    """The tiny checkpoints: KL on held-out text of their corpus, and recall over the distance."""
    result = _result()
    quality, recall = _rows(result, "codec", tiny=True), _rows(result, "recall", tiny=True)
    distances = sorted({row["distance"] for row in recall})
    exact = {(row["model"], row["codec"], row["distance"]): f"{row['exact']:.0%}" for row in recall}
    rows = []
    for row in quality:
        cells = [exact.get((row["model"], row["codec"], distance), "") for distance in distances]
        rows.append([row["model"], row["codec"], f"{row['true_bits']:.3g}", _spread(row, "kl", ".2g"), *cells])
    asked = {row["distance"]: row["items"] for row in recall}
    notes = [f"Left out: {one['model']}, {one['codec']}: {one['reason']}." for one in result["left_out"]]
    header = ["model", "codec", "true bits", "KL"] + [f"{d:,} tokens ({asked[d]} asked)" for d in distances]
    return markdown(header, rows) + ("\n\n" + "\n".join(f"- {note}" for note in notes) if notes else "")


def codecs_prefill(_: dict) -> str:
    """Prefill in both modes beside the raw codec."""
    rows = []
    for row in _rows(_result(), "prefill"):
        cells = [f"{row[f'{name}_s']:.2f} s ({row['raw_s'] / row[f'{name}_s']:.2f} x)" for name in ("exact", "fast")]
        rows.append([row["codec"], f"{row['prompt_tokens']:,}", f"{row['raw_s']:.2f} s", *cells])
    return markdown(["codec", "prompt tokens", "raw", "exact", "fast"], rows)


def codecs_targets(_: dict) -> str:
    """The numbers to reach that this bench measures."""
    rows = {row["codec"]: row for row in _rows(_result(), "codec")}
    found = []
    for codec, other, most in (("tq4", "int4", 0.5), ("fp8", "tq4", 0.2), ("int8", "tq4", 0.2)):
        ratio = rows[codec]["kl"] / rows[other]["kl"]
        found.append([f"KL of {codec}", f"at most {most:g} x {other}", f"{ratio:.3g} x", _verdict(ratio <= most)])
    bits = {codec: rows[codec]["true_bits"] for codec in ("tq4", "int4")}
    name, goal = "true bits of tq4", f"at most those of int4, {bits['int4']:.3g}"
    found.append([name, goal, f"{bits['tq4']:.3g}", _verdict(bits["tq4"] <= bits["int4"])])
    ratio = rows["tq4"]["tokens_in_1gib"] / rows["raw"]["tokens_in_1gib"]
    found.append(["tokens in 1 GiB with tq4", "at least 3.7 x raw", f"{ratio:.2f} x", _verdict(ratio >= 3.7)])
    for run in json.loads(CODES.read_text(encoding="utf-8"))["runs"]:
        for row in run["rows"]:
            if row["codec"] in MOST:
                most, low, high = MOST[row["codec"]], min(row["ratios"]), max(row["ratios"])
                found.append([
                    f"decode attention, {row['codec']}, {run['tokens']:,} tokens, threads: {run['threads']}",
                    f"at most {most:g} x the time of raw", f"{row['ratio']:.2f} x ({low:.2f} to {high:.2f})",
                    _verdict(row["ratio"] <= most),
                ])  # fmt: skip
    return markdown(["measure", "to reach", "found", "reached"], found)


def _verdict(is_reached: bool) -> str:
    return "yes" if is_reached else "**no**"


BLOCKS: dict[str, Callable[[dict], str]] = {
    make.__name__: make
    for make in (codecs_bytes, codecs_quality, codecs_targets, codecs_speed, codecs_prefill, codecs_sides, codecs_tiny)
}
