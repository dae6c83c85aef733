"""nanokv size: what a model's cache costs, from its config.json and the page layout; no weights are read."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanokv.cli import compare
from nanokv.cli.common import binary, emit_json, json_option, new_figure, plot_option, save_figure
from nanokv.core.errors import ConfigError
from nanokv.hub.catalog import CATALOG, SHIPPED, CatalogEntry
from nanokv.hub.home import resolve_model

if TYPE_CHECKING:
    from nanokv.core.spec import LayerSpec, PageLayout
    from nanokv.models.config import ModelConfig


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
    epilog="\b\nExamples:\n  nanokv size smollm2-135m-instruct\n"
    "  nanokv size deepseek-v3 qwen3.5-9b llama-3.1-70b --plot growth.svg\n"
    "  nanokv size ./my-model/config.json --dtype bfloat16 --memory 24GiB --context 8K,32K,128K"
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--memory", default="4GiB", show_default=True, callback=_memory, help="Memory for the cache.")
@click.option("--context", "contexts", default="1K,16K,256K", show_default=True, callback=_contexts,
              help="Context lengths, in tokens (1K = 1,024).")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="auto: the checkpoint's own.")  # fmt: skip
@click.option("--codec", default="raw", show_default=True, help="How the numbers of a page are written.")
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
    """Show what each MODEL's cache costs: bytes per token, and what a context needs.

    MODEL is a name nanokv knows, a pulled model, a folder, or a config.json. Payload is what a layer keeps; padded is
    what is allocated: whole pages, every array aligned.
    """
    settings = {"dtype": dtype, "codec": codec, "page_size": int(page_size), "memory_bytes": memory}
    try:
        sizes = [measure(model, dtype, codec, int(page_size)) for model in models]
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    rows = [row(one, tokens, memory) for one in sizes for tokens in contexts]
    if plot is not None:
        _draw(sizes, contexts, memory, plot)
    if as_json:
        emit_json("size", models[0] if len(models) == 1 else list(models), settings, rows)
        return
    for place, one in enumerate(sizes):
        if place:
            click.echo()
        _print(one, contexts, memory)
    if len(sizes) > 1 or sizes[0].layout.state_bytes or sizes[0].config.mla:
        click.echo()
        _echo_table(compare.table(sizes, contexts, _count, binary), left=0)
        for note in compare.notes(sizes):
            click.echo(f"  {note}")


@dataclass(frozen=True)
class CacheSize:
    """One model's cache: everything below is read off the layout that the engine itself would allocate."""

    name: str
    config: ModelConfig
    dtype: str
    codec: str
    layout: PageLayout
    source: str = ""
    unverified: tuple[str, ...] = ()

    def payload(self, tokens: int) -> int:
        return tokens * self.layout.bytes_per_token + self.layout.state_payload

    def pages(self, tokens: int) -> int:
        return self.layout.pages_for(tokens) if self.layout.page_bytes else 0

    def padded(self, tokens: int) -> int:
        return self.pages(tokens) * self.layout.page_bytes + self.layout.state_bytes

    def tokens_in(self, memory: int) -> int | None:
        """Tokens of one sequence that fit; None where no memory grows with the context."""
        room = memory - self.layout.state_bytes
        if not self.layout.page_bytes:
            return None if room >= 0 else 0
        return max(0, room // self.layout.page_bytes) * self.layout.page_size


def measure(model: str, dtype: str, codec: str, page_size: int) -> CacheSize:
    """Raises CheckpointError for an unknown model or family, ConfigError for an unknown dtype or codec."""
    from nanokv.codecs import resolve_codec
    from nanokv.core.spec import PageLayout
    from nanokv.llm import resolve_dtype
    from nanokv.models.decoder import layer_specs

    config, entry = _config(model)
    chosen = resolve_dtype(dtype, config)
    layout = PageLayout(layer_specs(config, resolve_codec(codec, chosen), page_size), page_size)
    known = (entry.source, entry.unverified) if entry is not None else ()
    return CacheSize(model, config, str(chosen).removeprefix("torch."), codec, layout, *known)


def _config(model: str) -> tuple[ModelConfig, CatalogEntry | None]:
    """A model's config, and where the catalog has it from if it is the catalog's."""
    from nanokv.models.fields import read_json
    from nanokv.models.read import read_config, read_folder

    path = Path(model).expanduser()
    if path.is_file():
        return read_config(read_json(path)), None
    if model in CATALOG and not path.is_dir():
        return read_config(CATALOG[model].config), CATALOG[model]
    return read_folder(resolve_model(model, known=(*CATALOG, *SHIPPED))), None


def row(one: CacheSize, tokens: int, memory: int) -> dict[str, Any]:
    """One row of --json."""
    layout = one.layout
    return {
        "model": one.name,
        "dtype": one.dtype,
        "layers": layout.num_layers,
        "context_tokens": tokens,
        "within_trained_context": tokens <= one.config.max_positions,
        "bytes_per_token": layout.bytes_per_token,
        "bytes_per_token_by_layer": [spec.bytes_per_token for spec in layout.specs],
        "state_bytes_per_sequence": layout.state_payload,
        "state_padded_bytes_per_sequence": layout.state_bytes,
        "page_payload_bytes": layout.page_payload,
        "page_padded_bytes": layout.page_bytes,
        "pages": one.pages(tokens),
        "payload_bytes": one.payload(tokens),
        "padded_bytes": one.padded(tokens),
        "memory_bytes": memory,
        "tokens_in_memory": one.tokens_in(memory),
        **compare.scalars(one),
        "source": one.source,
        "unverified_fields": list(one.unverified),
    }


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
    """What a layer keeps, such as "k 3x64, v 3x64"; the axis of tokens is left out."""
    words = []
    for plane in (*spec.paged, *spec.state, *spec.tail):
        shape = [n for axis, n in enumerate(plane.shape) if axis != plane.token_axis]
        words.append(" ".join([plane.name, "x".join(map(str, shape))]).strip())
    return ", ".join(words)


def _count(tokens: int) -> str:
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _echo_table(table: list[list[str]], left: int) -> None:
    """Columns side by side, numbers to the right; column `left` is text."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (
            cell.ljust(width) if place == left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        click.echo(f"  {'  '.join(padded)}".rstrip())


def _draw(sizes: list[CacheSize], contexts: list[int], memory: int, path: Path) -> None:
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    lowest, highest = min(contexts), max(contexts)
    points = sorted({*contexts, *(n for i in range(40) if lowest <= (n := 1 << i) <= highest)})
    for one in sizes:
        axes.plot(points, [one.padded(n) / 2**30 for n in points], marker="o", markersize=3, label=one.name)
    axes.axhline(memory / 2**30, linestyle="--", color="grey", linewidth=1, label=f"memory: {binary(memory)}")
    axes.set(yscale="log", xlabel="context (tokens)", ylabel="cache of one sequence (GiB)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [_count(n) for n in contexts])
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
