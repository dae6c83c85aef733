"""Figures of the benches' rows: each measured point with its lowest and highest run, each figure with a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nanokv.bench.labels import colour, label_points, marker
from nanokv.bench.report import Row, percent, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Figure", Sequence[Row]], None]
CAPTION_POINTS = 7
"""Size of the caption's letters; one is about half as wide."""


def add_caption(figure: Figure, text: str) -> None:
    """Writes the caption (report.caption) under a figure, in lines that fit its width."""
    letters = int(figure.get_figwidth() * 72 / (0.52 * CAPTION_POINTS))
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, letters)]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=CAPTION_POINTS, color="0.35")


def draw_request(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws each request as a bar: its prefill, which a perfect hit saves, and the rest; its time with a hit beside."""
    axes = figure.add_subplot()
    places = range(len(rows))
    saved = [row["prefill_share"] * row["total_s"] for row in rows]
    rest = [row["total_s"] - part for row, part in zip(rows, saved, strict=True)]
    axes.barh(places, saved, color="tab:orange", label="prefill: the most that a hit can save")
    axes.barh(places, rest, left=saved, color="tab:blue", label="the rest", xerr=_bars(rows, "total_s"),
              error_kw={"elinewidth": 1})  # fmt: skip
    hits = [row["hit_total_s"] for row in rows]
    below = [place + 0.28 for place in places]
    axes.errorbar(hits, below, xerr=_bars(rows, "hit_total_s"), fmt="D", markersize=5, color="black",
                  markerfacecolor="white", linewidth=1, label="measured with a hit")  # fmt: skip
    longest = max(max(row["total_s_max"], row["hit_total_s_max"]) for row in rows)
    for place, row in zip(places, rows, strict=True):
        mark = "noise: " if row["noise"] else ""
        text = f"can save {percent(row['prefill_share'])}\n{mark}saved {percent(row['hit_saved_share'])}"
        axes.annotate(text, (1.03 * longest, place), va="center", fontsize=8)
    axes.set(xlabel="seconds", ylabel="prompt + output tokens", xlim=(0, 1.28 * longest))
    axes.set_yticks(places, [f"{row['prompt_tokens']:,} + {row['output_tokens']:,}" for row in rows])
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)


def draw_prefix(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws three panels over the shared tokens, a line per concurrency; ceilings dashed. Lines that coincide are seen
    by the size of their markers."""
    panels = (
        ("hit_ratio", None, "prefix cache hit ratio"),
        ("requests_per_s", "ceiling_requests_per_s", "requests per second"),
        ("mean_latency_s", "ceiling_mean_latency_s", "mean latency (s)"),
    )
    groups = _groups(rows, "concurrency")
    for axes, (name, ceiling, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for place, (clients, points) in enumerate(groups.items()):
            shared, label = [row["shared_tokens"] for row in points], f"{clients} client{'s' * (clients > 1)}"
            size = 4 + 3 * (len(groups) - 1 - place)
            bars = axes.errorbar(shared, [row[name] for row in points], yerr=_bars(points, name), marker="o",
                                 markersize=size, linewidth=1.2, label=label, zorder=3 + place)  # fmt: skip
            if ceiling is not None:
                line_colour = bars.lines[0].get_color()
                axes.plot(shared, [row[ceiling] for row in points], "--", color=line_colour, linewidth=1)
        if ceiling is not None:
            _mark_noise(axes, rows, "shared_tokens", name)
        axes.set(title=title, xlabel=f"shared tokens of {rows[0]['prompt_tokens']:,}")
        _from_zero(axes)
    axes.plot([], [], "--", color="grey", linewidth=1, label="ceiling")
    _shared_legend(figure, axes)


def draw_decode(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws two panels over the batch size, a line per context: tokens per second, and the share of the bandwidth."""
    panels = (("output_tokens_per_s", 1, "output tokens per second"), ("bandwidth_share", 100, "% of memory bandwidth"))
    batches = sorted({row["batch"] for row in rows})
    for axes, (name, scale, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for context, points in _groups(rows, "context_tokens").items():
            values = [scale * row[name] for row in points]
            axes.errorbar([row["batch"] for row in points], values, yerr=_bars(points, name, scale), marker="o",
                          linewidth=1.2, label=f"context {context:,}")  # fmt: skip
        _mark_noise(axes, rows, "batch", name, scale)
        axes.set(title=title, xlabel="requests in the batch")
        axes.set_xticks(batches)
        _from_zero(axes)
    axes.axhline(100, color="grey", linewidth=1, linestyle="--")
    _shared_legend(figure, axes)


def draw_disagg(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws a panel per mode, on one scale: gaps between the tokens of running answers over time; prompts as lines."""
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        axes.plot(row["gap_times_s"], [1000 * gap for gap in row["gaps_s"]], ".", markersize=3)
        for arrival in row["arrivals_s"]:
            axes.axvline(arrival, color="tab:orange", linewidth=0.8)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        runs = ""
        if row["repeats"] > 1 and "tpot_p99_s_min" in row:
            runs = f" ({seconds(row['tpot_p99_s_min'])} to {seconds(row['tpot_p99_s_max'])})"
        longest = seconds(row["longest_stall_s"])
        axes.set(title=f"{row['mode']}: p99 {seconds(row['tpot_p99_s'])}{runs}, longest {longest}",
                 ylabel="ms between tokens")  # fmt: skip
    panels[-1].set_xlabel(f"seconds; orange: a prompt of {rows[0]['prompt_tokens']:,} tokens arrives")


def draw_codecs(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws two panels: KL divergence over true bits, a point per codec; decode speed, to raw, over the context."""
    quality, speed = figure.subplots(1, 2, width_ratios=(1.25, 1))
    whole = [
        row for row in rows if row["part"] == "codec" and "raw/" not in row["codec"] and "/raw" not in row["codec"]
    ]
    names = [row["codec"] for row in whole]
    shown = [row for row in whole if row["kl"] > 0]  # raw in float32 is the reference itself: 0 has no logarithm
    for row in shown:
        low = min(row["kl_std"], 0.9 * row["kl"])
        quality.errorbar(row["true_bits"], row["kl"], yerr=[[low], [row["kl_std"]]], marker=marker(row["codec"]),
                         linewidth=1, color=colour(row["codec"], names))  # fmt: skip
    quality.set(xscale="log", yscale="log", xlabel="true bits a number", ylabel="nats a token",
                title="KL divergence to raw float32; bars: standard deviation over texts")  # fmt: skip
    quality.grid(alpha=0.3)
    quality.set_xticks([2, 3, 4, 5, 6, 8, 12, 16], ["2", "3", "4", "5", "6", "8", "12", "16"])
    quality.minorticks_off()
    quality.margins(x=0.1, y=0.1)
    alone = [row for row in rows if row["part"] == "speed" and row["batch"] == 1 and row["codec"] != "raw"]
    ends = []
    for name, points in _groups(alone, "codec").items():
        contexts, ratios = ([row[field] for row in points] for field in ("context_tokens", "speed_ratio"))
        style = colour(name, names)
        speed.errorbar(contexts, ratios, yerr=_bars(points, "speed_ratio"), marker=marker(name), color=style,
                       linewidth=1.2, elinewidth=0.8)  # fmt: skip
        ends.append((contexts[-1], ratios[-1], name, style))
    speed.axhline(1, color="grey", linewidth=1, linestyle="--")
    contexts = sorted({row["context_tokens"] for row in alone})
    speed.set(xscale="log", xlabel="tokens of context", title="decode speed, 1 request, to raw")
    speed.set_xticks(contexts, [f"{context:,}" for context in contexts])
    speed.minorticks_off()
    _from_zero(speed)
    if contexts:
        speed.set_xlim(right=contexts[-1] * (contexts[-1] / contexts[0]) ** 0.3)
    of_quality = [(row["true_bits"], row["kl"], row["codec"], colour(row["codec"], names)) for row in shown]
    figure.draw_without_rendering()  # lays the panels out: from here on their pixels are known
    label_points(quality, of_quality)
    label_points(speed, ends, in_column=True)


def _bars(rows: Sequence[Row], name: str, scale: float = 1) -> list[list[float]] | None:
    """Lengths of error bars, below and above, from the lowest to the highest run; None where none has several."""
    if not any(f"{name}_min" in row for row in rows):
        return None
    below = [scale * max(0.0, row[name] - row.get(f"{name}_min", row[name])) for row in rows]
    return [below, [scale * max(0.0, row.get(f"{name}_max", row[name]) - row[name]) for row in rows]]


def _mark_noise(axes: Axes, rows: Sequence[Row], x: str, y: str, scale: float = 1) -> None:
    """Crosses impossible points out."""
    noisy = [row for row in rows if row["noise"]]
    if noisy:
        places = [row[x] for row in noisy], [scale * row[y] for row in noisy]
        axes.plot(*places, "x", color="black", markersize=11, zorder=20, label="noise: over 105 % of a ceiling")


def _shared_legend(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, outside of them: it covers no point."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)


def _groups(rows: Sequence[Row], name: str) -> dict[Any, list[Row]]:
    return {value: [row for row in rows if row[name] == value] for value in dict.fromkeys(row[name] for row in rows)}


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
