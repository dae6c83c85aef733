"""nanokv size: prints the cost of a model's cache, which nanokv/bench/size.py works out. Reads no weights."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanokv.cli.common import binary, dtype_option, emit_json, json_option, new_figure, plot_option, save_figure
from nanokv.core.errors import ConfigError, NanokvError
from nanokv.models import FAMILIES

if TYPE_CHECKING:
    from nanokv.bench.size import CacheSize
    from nanokv.core.spec import LayerSpec


def _contexts(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    lengths = []
    for text in value.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)\s*([kKmM]?)\s*", text)
        if match is None:
            raise click.BadParameter(f"{text!r}: expected token counts such as 1K,16K,256K", ctx, parameter)
        lengths.append(int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()])
    return lengths


def _memory(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    from nanokv.core.config import parse_bytes

    try:
        return parse_bytes(value, "memory")
    except ConfigError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


@click.command(
    epilog=f"Families (model_type in config.json): {', '.join(FAMILIES)}.\n\n"
    "\b\nExamples:\n  nanokv size smollm2-135m-instruct\n"
    "  nanokv size deepseek-v3 qwen3.5-9b llama-3.1-70b --plot growth.svg\n"
    "  nanokv size ./my-model/config.json --dtype bfloat16 --memory 24GiB --context 8K,32K,128K"
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--memory", default="4GiB", show_default=True, callback=_memory, help="Memory for the cache.")
@click.option("--context", "contexts", default="1K,16K,256K", show_default=True, callback=_contexts,
              help="Context lengths in tokens (1K = 1,024).")  # fmt: skip
@dtype_option
@click.option("--codec", default="raw", show_default=True, help="Codec of K and V: raw, fp8, tq4, ..., or a pair K/V.")
@click.option("--page-size", type=click.Choice(["1", "2", "4", "8", "16", "32", "64"]), default="16",
              show_default=True, help="Tokens in a page.")  # fmt: skip
@json_option
@plot_option
def size(
    models: tuple[str, ...],
    memory: int,
    contexts: list[int],
    dtype: str,
    codec: str,
    page_size: str,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show the cost of each MODEL's cache: bytes per token, and bytes of a context.

    MODEL is a catalog name, a pulled model, a folder, or a config.json. Payload counts the numbers that layers keep;
    padded counts the allocation: whole pages, every array aligned. The models after one that cannot be sized are sized
    too; the exit code is 1 then.
    """
    from nanokv.bench.size import measure

    settings = {"dtype": dtype, "codec": codec, "page_size": int(page_size), "memory_bytes": memory}
    sizes: list[CacheSize] = []
    faults: list[NanokvError] = []
    for model in models:
        try:
            sizes.append(measure(model, dtype, codec, int(page_size)))
        except NanokvError as error:
            faults.append(error)
    if not sizes and isinstance(faults[0], ConfigError):
        raise click.UsageError(str(faults[0])) from faults[0]
    for fault in faults[: len(faults) if sizes else -1]:
        click.echo(f"nanokv: {fault}", err=True)
    if not sizes:
        raise faults[-1]
    _report(sizes, contexts, memory, settings, models, as_json, plot)
    if faults:
        sys.exit(1)


def _report(
    sizes: list[CacheSize],
    contexts: list[int],
    memory: int,
    settings: dict[str, Any],
    models: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Prints what was measured, as tables or as JSON, and draws it."""
    from nanokv.bench.size import row

    if plot is not None:
        _draw(sizes, contexts, memory, plot)
    if as_json:
        rows = [row(one, tokens, memory) for one in sizes for tokens in contexts]
        emit_json("size", models[0] if len(models) == 1 else list(models), settings, rows)
        return
    for place, one in enumerate(sizes):
        if place:
            click.echo()
        _print(one, contexts, memory)
    if len(sizes) > 1 or sizes[0].layout.state_bytes or sizes[0].config.mla:
        click.echo()
        _echo_table(_comparison(sizes, contexts), left=0)
        for note in _notes(sizes):
            click.echo(f"  {note}")


def _print(one: CacheSize, contexts: list[int], memory: int) -> None:
    layout = one.layout
    click.echo(f"{one.name}: {one.config.family}, {one.dtype}, codec {one.codec}, pages of {layout.page_size} tokens")
    if one.unverified:
        click.echo(f"  stated by one source only: {', '.join(one.unverified)}")
    table = [["layers", "keep", "bytes/token each", "bytes/token", "state bytes each"]]
    for spec, count in Counter(layout.specs).items():
        each, state = spec.bytes_per_token, spec.bytes_per_sequence
        table.append([str(count), _planes(spec), f"{each:,}", f"{count * each:,}", f"{state:,}"])
    table.append([str(layout.num_layers), "together", "", f"{layout.bytes_per_token:,}", f"{layout.state_payload:,}"])
    _echo_table(table, left=1)
    click.echo(f"  a page takes {layout.page_bytes:,} bytes, {layout.page_payload:,} of them payload")
    if layout.state_bytes:
        click.echo(f"  a state takes {layout.state_bytes:,} bytes, {layout.state_payload:,} of them payload")
    fits = one.tokens_in(memory)
    halves = ""
    if one.layout.state_bytes:
        kept = "states and their checkpoints" if one.layout.is_recurrent else "tails of unfinished pages"
        halves = f"; an engine gives up to half of it to {kept} of requests that run"
    found = "any number of" if fits is None else f"{fits:,}"
    click.echo(f"  {binary(memory)} hold {found} tokens of one sequence{halves}")
    table = [["context", "pages", "payload", "padded", ""]]
    for tokens in contexts:
        note = "" if tokens <= one.config.max_positions else f"beyond the trained {one.config.max_positions:,}"
        pages, payload, padded = one.pages(tokens), one.payload(tokens), one.padded(tokens)
        table.append([_count(tokens), f"{pages:,}", binary(payload), binary(padded), note])
    _echo_table(table, left=4)


def _planes(spec: LayerSpec) -> str:
    """The arrays of a layer without their axis of tokens, such as "k 3x64, v 3x64"."""
    words = []
    for plane in (*spec.paged, *spec.state, *spec.partial_page):
        shape = [n for axis, n in enumerate(plane.shape) if axis != plane.token_axis]
        words.append(" ".join([plane.name, "x".join(map(str, shape))]).strip())
    return ", ".join(words)


def _count(tokens: int) -> str:
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _echo_table(table: list[list[str]], left: int) -> None:
    """Prints aligned columns, numbers to the right; column `left` is text."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (
            cell.ljust(width) if place == left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        click.echo(f"  {'  '.join(padded)}".rstrip())


def _comparison(sizes: list[CacheSize], contexts: list[int]) -> list[list[str]]:
    """The table that compares models: a head, then one line per model."""
    from nanokv.bench.size import scalars

    scheme = ("model", "attention + recurrent layers", "MHA", "GQA", "own")
    lines = [[*scheme, *map(_count, contexts), "state", "state = KV at"]]
    for one in sizes:
        it = scalars(one)
        equal = it["state_equals_kv_tokens"]
        lines.append(
            [
                one.name,
                f"{it['attention_layers']} + {it['recurrent_layers']}",
                f"{it['scalars_per_token_layer_mha']:,}",
                f"{it['scalars_per_token_layer_gqa']:,}",
                f"{it['scalars_per_token_layer']:,}",
                *(binary(one.payload(tokens)) for tokens in contexts),
                binary(one.layout.state_payload) if one.layout.state_payload else "-",
                f"{equal:,} tokens" if equal else "-",
            ]
        )
    return lines


def _notes(sizes: list[CacheSize]) -> Iterator[str]:
    """Notes below the comparison, one line each."""
    yield "MHA, GQA, own: scalars per token in one attention layer; then the whole cache of one sequence (payload)"
    for one in sizes:
        mla = one.config.mla
        if mla is None:
            continue
        heads, value = one.config.num_heads, mla.value_dim
        wide = heads * (mla.nope_dim + mla.rope_dim + value)
        yield (
            f"{one.name}: {heads} heads x {value} = {heads * value:,} scalars are K or V alone; K and V are "
            f"{2 * heads * value:,}, and {wide:,} with the model's own wider keys written out"
        )


def _draw(sizes: list[CacheSize], contexts: list[int], memory: int, path: Path) -> None:
    """Draws bytes over contexts; beyond the trained context of a model its line is dashed and its points are hollow."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    lowest, highest = min(contexts), max(contexts)
    common = {*contexts, *(n for i in range(40) if lowest <= (n := 1 << i) <= highest)}
    drawn = [memory]
    for one in sizes:
        trained = one.config.max_positions
        points = sorted(common | ({trained} if lowest < trained < highest else set()))
        within = [n for n in points if n <= trained]
        beyond = [*within[-1:], *(n for n in points if n > trained)]
        (line,) = axes.plot(within, [one.padded(n) for n in within], marker="o", markersize=3,
                            label=f"{one.name} ({one.dtype})")  # fmt: skip
        axes.plot(beyond, [one.padded(n) for n in beyond], marker="o", markersize=4, markerfacecolor="none",
                  linestyle="--", color=line.get_color(), markevery=slice(len(within[-1:]), None))  # fmt: skip
        drawn += [one.padded(n) for n in points]
    if any(highest > one.config.max_positions for one in sizes):
        axes.plot([], [], marker="o", markersize=4, markerfacecolor="none", linestyle="--", color="grey",
                  label="beyond the trained context")  # fmt: skip
    axes.axhline(memory, linestyle=":", color="grey", linewidth=1, label=f"memory: {binary(memory)}")
    axes.set(xlabel="context (tokens)", ylabel="cache of one sequence",
             title=f"codec {sizes[0].codec}, pages of {sizes[0].layout.page_size} tokens")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(contexts, [_count(n) for n in contexts])
    ticks = byte_ticks(min(filter(None, drawn)), max(drawn))
    axes.set_yticks(ticks, [binary(n).replace(".0", "") for n in ticks])
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def byte_ticks(lowest: int, highest: int) -> list[int]:
    """Powers of two around a range, at most nine: all of them, or each 4, 16 or 1,024 times the one before."""
    first, last = lowest.bit_length() - 1, (highest - 1).bit_length()
    for step in (1, 2, 4):
        exponents = range(first - first % step, last + step, step)
        if len(exponents) <= 9:
            return [1 << i for i in exponents]
    return [1 << i for i in range(first - first % 10, last + 10, 10)]
