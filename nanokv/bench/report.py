"""Tables of the benches' rows, and the caption of a run. Measures nothing.

A number of several runs is a median; under it stand the lowest and the highest. An impossible one is marked "noise".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]


NOISE = (
    "noise: impossible numbers (a saving below 0, over 105 % of a ceiling, or raw against itself off by 5 %): other "
    "work disturbed the machine"
)
IN_CACHE = "cache: the bytes of such a step fit in the processor's cache, so that memory is no limit"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s" if value >= 0.9995 else f"{1000 * value:.3g} ms"


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 99.5 else f"{rate:.3g}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


_UNITS: dict[str, Callable[[Any], str]] = {
    "_per_s": _rate, "_s": seconds, "_share": percent, "_mse": _error, "_error": _error, "_tokens": "{:,}".format,
    "_ratio": "{:.3f}".format, "": str,
}  # fmt: skip
"""Last words of a field's name, which tell its unit -> its value as text; the first that fits counts."""


def _columns(*columns: tuple[str, str | Callable[[Row], str]]) -> Columns:
    """Each column from its title and either a field, shown in its unit, or a function of the row."""

    def of_field(field: str) -> Callable[[Row], str]:
        show = next(show for words, show in _UNITS.items() if field.endswith(words))
        return lambda row: show(row[field]) + extent(row, field, show)

    return [(title, of_field(what) if isinstance(what, str) else what) for title, what in columns]


def extent(row: Row, field: str, show: Callable[[Any], str]) -> str:
    """The lowest and the highest of a field, on a line of their own; "" where there is one value."""
    low, high = row.get(f"{field}_min"), row.get(f"{field}_max")
    if row.get("repeats", 1) == 1 or low is None or high is None:
        return ""
    first, last = show(low), show(high)
    unit = last.rpartition(" ")[2]
    return f"\n{first.removesuffix(f' {unit}') if unit != last else first} to {last}"


def _judged(field: str) -> Callable[[Row], str]:
    """A share of a ceiling, or a saving, with the mark of an impossible one."""

    def cell(row: Row) -> str:
        mark = "noise " if row["noise"] else "cache " if row.get("in_cache") and row[field] > 1 else ""
        return mark + percent(row[field]) + extent(row, field, percent)

    return cell


def legend(rows: Sequence[Row]) -> list[str]:
    """The marks that these rows have, explained."""
    is_cached = any(row.get("in_cache") and row["bandwidth_share"] > 1 for row in rows)
    return [NOISE] * any(row.get("noise", False) for row in rows) + [IN_CACHE] * is_cached


def caption(result: Mapping[str, Any]) -> str:
    """What a figure shows, of a command's JSON object: the model and how it ran, and the line of `machine`."""
    settings = result["settings"]
    codec = settings.get("codec") if "codecs" not in settings else None
    repeat = settings.get("repeat", 1)
    words = [
        f"{result['command']}: {result['model']}",
        "random weights" if settings.get("dummy") else "",
        settings.get("dtype", ""),
        f"codec {codec}" if codec else "",
        "reference kernels" if settings.get("kernels") == "reference" else "",
        f"median of {repeat} (lowest to highest)" if repeat > 1 else "",
        "interrupted" if settings.get("interrupted") else "",
    ]
    return "\n".join([", ".join(filter(None, words)), machine(result)])


def machine(result: Mapping[str, Any]) -> str:
    """Where a command ran, of its JSON object: processor and instructions, threads, versions and the date."""
    machine, device = result["hardware"], result["settings"].get("device", "cpu")
    instructions = machine.get("instructions")
    cpu = f"{machine['cpu']}, {machine['cpus']} cores" + (f", {instructions}" if instructions else "")
    versions = [f"nanokv {result['version']}" if "version" in result else "", f"torch {machine['torch']}"]
    where = [
        ", ".join(machine["gpus"]) if device.startswith("cuda") else cpu, f"{machine['threads']} threads",
        machine["system"], *versions, f"Python {machine['python']}", result.get("date", ""),
    ]  # fmt: skip
    return ", ".join(filter(None, where))


def _spread(name: str, digits: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:{digits}} ± {row[f'{name}_std']:{digits}}"


REQUEST = _columns(
    ("prompt", "prompt_tokens"), ("output", "output_tokens"), ("TTFT", "ttft_s"), ("TPOT", "tpot_s"),
    ("total", "total_s"), ("a hit can save", "prefill_share"), ("a hit saved", _judged("hit_saved_share")),
    ("TTFT, hit", "hit_ttft_s"), ("total, hit", "hit_total_s"),
)  # fmt: skip
PREFIX = _columns(
    ("clients", "concurrency"), ("shared", "shared_tokens"), ("hit ratio", "hit_ratio"),
    ("requests/s", "requests_per_s"), ("ceiling", "ceiling_requests_per_s"), ("reached", _judged("ceiling_share")),
    ("latency", "mean_latency_s"), ("TTFT p50", "ttft_p50_s"), ("TTFT p95", "ttft_p95_s"),
    ("computed", "computed_tokens"),
)  # fmt: skip
DECODE = _columns(
    ("batch", "batch"), ("context", "context_tokens"), ("tokens/s", "output_tokens_per_s"), ("step", "step_s"),
    ("MB a step", lambda row: f"{row['bytes_per_step'] / 1e6:,.0f}"),
    ("GB/s", lambda row: f"{row['bytes_per_s'] / 1e9:.1f}"),
    ("of the limit", _judged("bandwidth_share")),
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
    ("KL", lambda row: "noise " * row["noise"] + _spread("kl", ".2g")(row)),
    ("top-1", lambda row: f"{percent(row['top1_agreement'])} ± {100 * row['top1_agreement_std']:.1f}"),
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
        low, high = (f"{row[f'speed_ratio_{end}']:.2f}" for end in ("min", "max"))
        ratio = f"{row['speed_ratio']:.2f} x" + (f", {low} to {high}" if low != high else "")
        mark = "noise " * row.get("noise", False)
        line[point] = f"{mark}{_rate(row['output_tokens_per_s'])} ({ratio})"
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
