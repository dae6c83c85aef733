"""Tables and figures of the benches' rows. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Row = dict[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 99.5 else f"{rate:.3g}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


_UNITS: dict[str, Callable[[Any], str]] = {
    "_per_s": _rate, "_s": _seconds, "_share": _percent, "_mse": _error, "_error": _error, "_tokens": "{:,}".format,
    "_ratio": "{:.3f}".format, "": str,
}  # fmt: skip
"""Last words of a field's name, which tell its unit -> its value as text; the first that fits counts."""


def _columns(*columns: tuple[str, str | Callable[[Row], str]]) -> Columns:
    """Each column from its title and either a field, shown in its unit, or a function of the row."""

    def of_field(field: str) -> Callable[[Row], str]:
        show = next(show for words, show in _UNITS.items() if field.endswith(words))
        return lambda row: show(row[field])

    return [(title, of_field(what) if isinstance(what, str) else what) for title, what in columns]


def _spread(name: str, digits: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:{digits}} ± {row[f'{name}_std']:{digits}}"


REQUEST = _columns(
    ("prompt", "prompt_tokens"), ("output", "output_tokens"), ("TTFT", "ttft_s"), ("TPOT", "tpot_s"),
    ("total", "total_s"), ("a hit can save", "prefill_share"), ("a hit saved", "hit_saved_share"),
    ("TTFT, hit", "hit_ttft_s"), ("total, hit", "hit_total_s"),
)  # fmt: skip
PREFIX = _columns(
    ("clients", "concurrency"), ("shared", "shared_tokens"), ("hit ratio", "hit_ratio"),
    ("requests/s", "requests_per_s"), ("ceiling", "ceiling_requests_per_s"), ("reached", "ceiling_share"),
    ("latency", "mean_latency_s"), ("TTFT p50", "ttft_p50_s"), ("TTFT p95", "ttft_p95_s"),
    ("computed", "computed_tokens"),
)  # fmt: skip
DECODE = _columns(
    ("batch", "batch"), ("context", "context_tokens"), ("tokens/s", "output_tokens_per_s"), ("step", "step_s"),
    ("MB a step", lambda row: f"{row['bytes_per_step'] / 1e6:,.0f}"),
    ("GB/s", lambda row: f"{row['bytes_per_s'] / 1e9:.1f}"),
    ("of the limit", "bandwidth_share"),
)  # fmt: skip
DISAGG = _columns(
    ("mode", "mode"), ("gap p50", "tpot_p50_s"), ("gap p99", "tpot_p99_s"), ("longest", "longest_stall_s"),
    ("TTFT p50", "ttft_p50_s"), ("prompts/s", "requests_per_s"), ("tokens/s", "output_tokens_per_s"),
    ("transfer", "hand_over_s"), ("moved", lambda row: f"{row['bytes_moved']:,} B"),
)  # fmt: skip
CODEC_BYTES = _columns(
    ("codec", "codec"), ("bits", lambda row: f"{row['true_bits']:.3g}"),
    ("bytes/token", lambda row: f"{row['bytes_per_token']:,.0f}"),
    ("smaller", lambda row: f"{row['smaller_than_bfloat16']:.2f} x"),
    ("tokens/GiB", lambda row: f"{row['tokens_in_1gib']:,}"),
    ("at once", lambda row: str(row.get("requests_at_once", ""))),
    ("MSE of K", "random_k_mse"), ("theory", "theory_k_mse"), ("MSE of V", "random_v_mse"), ("theory", "theory_v_mse"),
)  # fmt: skip
CODEC_QUALITY = _columns(
    ("codec", "codec"), ("bits", lambda row: f"{row['true_bits']:.3g}"),
    ("KL", _spread("kl", ".2g")),
    ("top-1", lambda row: f"{_percent(row['top1_agreement'])} ± {100 * row['top1_agreement_std']:.1f}"),
    ("ppl", lambda row: f"{row['perplexity']:.4g}"),
    ("to raw", _spread("perplexity_ratio", ".3f")),
    ("attention", "attention_error"), ("model's K", "model_k_mse"), ("its V", "model_v_mse"),
)  # fmt: skip


def codec_speed(rows: Sequence[Row]) -> tuple[Columns, list[Row]]:
    """The columns and lines of the speed table: a line per codec, a column per batch and context."""
    lines: dict[str, Row] = {}
    points: dict[str, None] = {}
    for row in (row for row in rows if row["part"] == "speed"):
        point = f"{row['batch']} x {row['context_tokens']:,}"
        points[point] = None
        line = lines.setdefault(row["codec"], {"codec": row["codec"]})
        line[point] = f"{_rate(row['output_tokens_per_s'])} ({row['speed_ratio']:.2f} x)"
    columns = [(point, lambda line, at=point: line.get(at, "")) for point in points]
    return (("tokens/s (to raw)", lambda line: line["codec"]), *columns), list(lines.values())


def codec_tables(rows: Sequence[Row]) -> list[tuple[Columns, Sequence[Row], str | None]]:
    """The tables of `bench codecs`, each as (columns, rows, None): bytes and errors, quality, speed where measured."""
    of_codecs = [row for row in rows if row["part"] == "codec"]
    columns, lines = codec_speed(rows)
    tables: list[tuple[Columns, Sequence[Row], str | None]]
    tables = [(CODEC_BYTES, of_codecs, None), (CODEC_QUALITY, of_codecs, None), (columns, lines, None)]
    return tables if lines else tables[:2]


def table(columns: Columns, rows: Sequence[Row], group: str | None = None) -> Table:
    """A rich table with a line between two rows whose values of `group` differ."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, _ in columns:
        made.add_column(title, justify="right", no_wrap=True)
    for row, later in zip(rows, [*rows[1:], None], strict=True):
        ends = group is not None and later is not None and later[group] != row[group]
        made.add_row(*(show(row) for _, show in columns), end_section=ends)
    return made


# ---- figures ------------------------------------------------------------------------------------------------------


def draw_request(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws each request as a bar: its prefill, which a perfect hit saves, and the rest."""
    axes = figure.add_subplot()
    names = [f"{row['prompt_tokens']:,} + {row['output_tokens']:,}" for row in rows]
    saved = [row["prefill_share"] * row["total_s"] for row in rows]
    rest = [row["total_s"] - part for row, part in zip(rows, saved, strict=True)]
    axes.barh(names, saved, color="tab:orange", label="prefill: what a perfect hit saves")
    axes.barh(names, rest, left=saved, color="tab:blue", label="the rest")
    for place, row in enumerate(rows):
        axes.annotate(f" {_percent(row['prefill_share'])}", (0, place), va="center")
    axes.set(xlabel="seconds", ylabel="prompt + output tokens")
    axes.invert_yaxis()
    axes.legend()


def draw_prefix(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws three panels over the shared tokens, a line per concurrency; ceilings dashed."""
    panels = (
        ("hit_ratio", None, "prefix cache hit ratio"),
        ("requests_per_s", "ceiling_requests_per_s", "requests per second"),
        ("mean_latency_s", "ceiling_mean_latency_s", "mean latency (s)"),
    )
    for axes, (name, ceiling, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for clients, points in _groups(rows, "concurrency").items():
            shared, label = [row["shared_tokens"] for row in points], f"{clients} client{'s' * (clients > 1)}"
            (line,) = axes.plot(shared, [row[name] for row in points], marker="o", label=label)
            if ceiling is not None:
                axes.plot(shared, [row[ceiling] for row in points], "--", color=line.get_color(), linewidth=1)
        axes.set(title=title, xlabel=f"shared tokens of {rows[0]['prompt_tokens']:,}")
        _from_zero(axes)
    axes.plot([], [], "--", color="grey", linewidth=1, label="ceiling")
    axes.legend()


def draw_decode(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws two panels over the batch size, a line per context: tokens per second, and the share of the bandwidth."""
    panels = (("output_tokens_per_s", 1, "output tokens per second"), ("bandwidth_share", 100, "% of memory bandwidth"))
    for axes, (name, scale, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for context, points in _groups(rows, "context_tokens").items():
            values = [scale * row[name] for row in points]
            axes.plot([row["batch"] for row in points], values, marker="o", label=f"context {context:,}")
        axes.set(title=title, xlabel="requests in the batch")
        _from_zero(axes)
    axes.legend()


def draw_disagg(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws a panel per mode, on one scale: gaps between the tokens of running answers over time; prompts as lines."""
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        axes.plot(row["gap_times_s"], [1000 * gap for gap in row["gaps_s"]], ".", markersize=3)
        for arrival in row["arrivals_s"]:
            axes.axvline(arrival, color="tab:orange", linewidth=0.8)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.set(title=f"{row['mode']}: p99 {_seconds(row['tpot_p99_s'])}, longest {_seconds(row['longest_stall_s'])}",
                 ylabel="ms between tokens")  # fmt: skip
    panels[-1].set_xlabel(f"seconds; orange: a prompt of {rows[0]['prompt_tokens']:,} tokens arrives")


def draw_codecs(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws two panels: KL divergence over true bits, a point per codec; decode speed, to raw, over the context."""
    quality, speed = figure.subplots(1, 2)
    whole = [
        row for row in rows if row["part"] == "codec" and "raw/" not in row["codec"] and "/raw" not in row["codec"]
    ]
    for row in whole:
        if row["kl"] > 0:  # raw in float32 is the reference itself: 0 has no place on a logarithmic axis
            low = min(row["kl_std"], 0.9 * row["kl"])
            bars = [[low], [row["kl_std"]]]
            quality.errorbar(row["true_bits"], row["kl"], yerr=bars, marker="o", linewidth=1, color=_colour(row, whole))
            quality.annotate(f" {row['codec']}", (row["true_bits"], row["kl"]), fontsize=8)
    quality.set(yscale="log", xlabel="true bits a number", ylabel="nats a token", title="KL divergence to raw float32")
    quality.grid(alpha=0.3)
    alone = [row for row in rows if row["part"] == "speed" and row["batch"] == 1 and row["codec"] != "raw"]
    for name, points in _groups(alone, "codec").items():
        contexts, ratios = ([row[field] for row in points] for field in ("context_tokens", "speed_ratio"))
        speed.plot(contexts, ratios, marker="o", label=name, color=_colour(points[0], whole))
    speed.axhline(1, color="grey", linewidth=1, linestyle="--")
    contexts = sorted({row["context_tokens"] for row in alone})
    speed.set(xscale="log", xlabel="tokens of context", title="decode speed, 1 request, to raw")
    speed.set_xticks(contexts, [f"{context:,}" for context in contexts])
    speed.minorticks_off()
    _from_zero(speed)
    if alone:
        speed.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _colour(row: Row, rows: Sequence[Row]) -> tuple[float, float, float, float]:
    """The colour of a codec, the same in both panels."""
    from matplotlib import colormaps

    names = [other["codec"] for other in rows]
    return colormaps["tab20"](names.index(row["codec"]) % 20 if row["codec"] in names else 0)


def _groups(rows: Sequence[Row], name: str) -> dict[Any, list[Row]]:
    return {value: [row for row in rows if row[name] == value] for value in dict.fromkeys(row[name] for row in rows)}


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
