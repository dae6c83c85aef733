"""Tables for a terminal and figures of the benches' rows. Measures nothing."""

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


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 99.5 else f"{rate:.3g}"


REQUEST: Columns = (
    ("prompt", lambda row: f"{row['prompt_tokens']:,}"),
    ("output", lambda row: f"{row['output_tokens']:,}"),
    ("TTFT", lambda row: _seconds(row["ttft_s"])),
    ("TPOT", lambda row: _seconds(row["tpot_s"])),
    ("total", lambda row: _seconds(row["total_s"])),
    ("a hit can save", lambda row: _percent(row["prefill_share"])),
    ("a hit saved", lambda row: _percent(row["hit_saved_share"])),
    ("TTFT, hit", lambda row: _seconds(row["hit_ttft_s"])),
    ("total, hit", lambda row: _seconds(row["hit_total_s"])),
)
PREFIX: Columns = (
    ("clients", lambda row: str(row["concurrency"])),
    ("shared", lambda row: f"{row['shared_tokens']:,}"),
    ("hit ratio", lambda row: f"{row['hit_ratio']:.3f}"),
    ("requests/s", lambda row: _rate(row["requests_per_s"])),
    ("ceiling", lambda row: _rate(row["ceiling_requests_per_s"])),
    ("reached", lambda row: _percent(row["ceiling_share"])),
    ("latency", lambda row: _seconds(row["mean_latency_s"])),
    ("TTFT p50", lambda row: _seconds(row["ttft_p50_s"])),
    ("TTFT p95", lambda row: _seconds(row["ttft_p95_s"])),
    ("computed", lambda row: f"{row['computed_tokens']:,}"),
)
DECODE: Columns = (
    ("batch", lambda row: str(row["batch"])),
    ("context", lambda row: f"{row['context_tokens']:,}"),
    ("tokens/s", lambda row: _rate(row["output_tokens_per_s"])),
    ("step", lambda row: _seconds(row["step_s"])),
    ("MB a step", lambda row: f"{row['bytes_per_step'] / 1e6:,.0f}"),
    ("GB/s", lambda row: f"{row['bytes_per_s'] / 1e9:.1f}"),
    ("of the limit", lambda row: _percent(row["bandwidth_share"])),
)


def table(columns: Columns, rows: Sequence[Row], group: str | None = None) -> Table:
    """A rich table; a line stands between rows where the value of `group` changes."""
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
    """Each request as a bar: its prefill, which a perfect hit erases, and the rest."""
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
    """Three panels over the shared tokens, a line for each concurrency; ceilings dashed."""
    panels = (
        ("hit_ratio", None, "prefix cache hit ratio"),
        ("requests_per_s", "ceiling_requests_per_s", "requests per second"),
        ("mean_latency_s", "ceiling_mean_latency_s", "mean latency (s)"),
    )
    for axes, (name, ceiling, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for clients, points in _groups(rows, "concurrency").items():
            shared = [row["shared_tokens"] for row in points]
            (line,) = axes.plot(
                shared, [row[name] for row in points], marker="o", label=f"{clients} client{'s' * (clients > 1)}"
            )
            if ceiling is not None:
                axes.plot(shared, [row[ceiling] for row in points], "--", color=line.get_color(), linewidth=1)
        axes.set(title=title, xlabel=f"shared tokens of {rows[0]['prompt_tokens']:,}")
        _from_zero(axes)
    axes.plot([], [], "--", color="grey", linewidth=1, label="ceiling")
    axes.legend()


def draw_decode(figure: Figure, rows: Sequence[Row]) -> None:
    """Two panels over the batch size, a line for each context: tokens per second, and the share of the bandwidth."""
    panels = (("output_tokens_per_s", 1, "output tokens per second"), ("bandwidth_share", 100, "% of memory bandwidth"))
    for axes, (name, scale, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for context, points in _groups(rows, "context_tokens").items():
            values = [scale * row[name] for row in points]
            axes.plot([row["batch"] for row in points], values, marker="o", label=f"context {context:,}")
        axes.set(title=title, xlabel="requests in the batch")
        _from_zero(axes)
    axes.legend()


def _groups(rows: Sequence[Row], name: str) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
