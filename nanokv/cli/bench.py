"""nanokv bench: measure this engine on this machine. What is measured, and how, stands in nanokv/bench."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from nanokv.cli.common import (
    binary,
    emit_json,
    json_option,
    model_folder,
    new_figure,
    plot_option,
    progress_bars,
    save_figure,
)
from nanokv.hub.catalog import CATALOG, DEFAULT_MODEL

if TYPE_CHECKING:
    from nanokv.bench.report import Columns, Row
    from nanokv.llm import LLM


class Numbers(click.ParamType):
    """A list such as 1,4,16."""

    name = "list"

    def __init__(self, kind: type, least: float, most: float | None = None) -> None:
        self.kind, self.least, self.most = kind, least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list:
        if isinstance(value, list):
            return value
        numbers = []
        for text in value.split(","):
            try:
                number = self.kind(text)
            except ValueError:
                self.fail(f"{text!r}: expected numbers such as {param.default}", param, ctx)
            if not self.least <= number <= (number if self.most is None else self.most):
                bounds = f"at least {self.least}" + ("" if self.most is None else f", at most {self.most}")
                self.fail(f"{text!r}: expected {bounds}", param, ctx)
            if number not in numbers:
                numbers.append(number)
        return numbers


WIDTH = 110
COUNT = click.IntRange(min=1)
COUNTS = Numbers(int, 1)


def engine_options(command: Callable) -> Callable:
    """What every bench takes: the model and how it runs; how often; where the numbers go."""
    options = [
        click.argument("model", required=False),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
                     show_default=True, help="auto: the checkpoint's own."),
        click.option("--kv-memory", metavar="SIZE", help="Memory for pages, such as 2GiB."),
        click.option("--dummy", is_flag=True, help="Random weights of the model's shape: nothing is fetched or read."),
        click.option("--repeat", type=COUNT, default=1, show_default=True, help="Measure so often; medians count."),
        json_option,
        plot_option,
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(epilog="\b\nExample:\n  nanokv bench prefix --plot prefix.png")
def bench() -> None:
    """Measure this engine on this machine: one request, prefix caching under load, decoding."""


@bench.command(epilog="Example: nanokv bench request --prompt-tokens 1024,4096 --output-tokens 512")
@click.option("--prompt-tokens", type=COUNTS, default="1024", show_default=True, help="Lengths of the prompt.")
@click.option("--output-tokens", type=COUNT, default=128, show_default=True, help="Length of the answer.")
@engine_options
def request(prompt_tokens: list[int], output_tokens: int, **options: Any) -> None:
    """One request alone: TTFT, TPOT, total, and the most that a perfect cache hit can save of it.

    A hit can save the prefill: (TTFT - TPOT) / total. What one saved is measured with the same prompt again.
    """
    from nanokv.bench import report
    from nanokv.bench.request import measure_request, runs

    settings = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    with Bench("request", settings, options) as at:
        tick = at.ticker(len(prompt_tokens) * runs(at.repeat))
        at.rows = [measure_request(at.llm, length, output_tokens, at.repeat, tick) for length in prompt_tokens]
    at.show(report.REQUEST, report.draw_request, (7, 1.5 + 0.6 * len(at.rows)))


@bench.command(epilog="Example: nanokv bench prefix --concurrency 1,8 --shared 0,0.5,1 --plot prefix.png")
@click.option("--prompt-tokens", type=COUNT, default=1024, show_default=True, help="Length of every prompt.")
@click.option("--output-tokens", type=COUNT, default=32, show_default=True, help="Length of every answer.")
@click.option("--shared", type=Numbers(float, 0, 1), default="0,0.25,0.5,0.75,0.9,1", show_default=True,
              help="Parts of the prompt that all requests share.")  # fmt: skip
@click.option("--concurrency", type=COUNTS, default="1,4,16", show_default=True,
              help="Clients; each sends its next request when the last is answered.")  # fmt: skip
@click.option(
    "--requests", type=COUNT, help="Requests of one point, at least one a client.  [default: 2 a client, at least 4]"
)
@engine_options
def prefix(
    prompt_tokens: int,
    output_tokens: int,
    shared: list[float],
    concurrency: list[int],
    requests: int | None,
    **options: Any,
) -> None:
    """Prefix caching under load: prompts of fixed length share none, some or all of their tokens.

    The ceiling beside each point is what a perfect cache would reach: uncached prompt tokens at the measured prefill
    speed, plus output tokens at the measured decode speed of that many clients.
    """
    from nanokv.bench import report
    from nanokv.bench.prefix import measure_prefix, runs

    settings = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "shared": shared,
                "concurrency": concurrency, "requests": requests}  # fmt: skip
    with Bench("prefix", settings, options, max_requests=max(concurrency)) as at:
        tick = at.ticker(runs(shared, concurrency, requests, at.repeat))
        at.rows = measure_prefix(
            at.llm, prompt_tokens, output_tokens, shared, concurrency, requests, at.repeat, tick
        )  # fmt: skip
    at.show(report.PREFIX, report.draw_prefix, (13, 4), group="concurrency")


@bench.command(epilog="Example: nanokv bench decode --batch 1,8,32 --context 256,2048")
@click.option("--batch", type=COUNTS, default="1,4,16", show_default=True, help="Requests that decode together.")
@click.option("--context", type=COUNTS, default="256,1024,4096", show_default=True, help="Tokens before the answer.")
@click.option("--steps", type=COUNT, default=20, show_default=True, help="Steps timed for a point; the median counts.")
@engine_options
def decode(batch: list[int], context: list[int], steps: int, **options: Any) -> None:
    """Decoding over batch size and context, and the share of the memory bandwidth that it reaches.

    A step must read all weights and the keys and values of every request. The bandwidth is measured in the same run.
    """
    from nanokv.bench import report
    from nanokv.bench.decode import fits, measure_decode

    settings: dict[str, Any] = {"batch": batch, "context": context, "steps": steps}
    with Bench("decode", settings, options, max_requests=max(batch)) as at:
        at.rows = measure_decode(at.llm, batch, context, steps, at.repeat, at.ticker(len(batch) * len(context)))
        pool = at.llm.engine.store.num_pages * at.llm.engine.layout.page_bytes
        left_out = [(b, c) for b in batch for c in context if not fits(at.llm, b, c, steps)]
    settings["left_out"] = [{"batch": b, "context_tokens": c} for b, c in left_out]
    at.show(report.DECODE, report.draw_decode, (9, 4), group="batch")
    if left_out:
        points = ", ".join(f"{b} x {c:,}" for b, c in left_out)
        click.echo(f"left out, beyond the {binary(pool)} of pages (--kv-memory): {points}", err=True)


class Bench:
    """One run: loads the model, shows progress, prints rows. A context manager: the model lives inside.

    what      name of the subcommand
    settings  of the subcommand, for --json
    options   those of `engine_options`
    fields    further fields of EngineConfig
    """

    def __init__(self, what: str, settings: dict, options: dict[str, Any], **fields: Any) -> None:
        self.what = what
        self.settings = settings
        self.repeat: int = options["repeat"]
        self.rows: list[Row] = []
        self._as_json, self._plot = options["as_json"], options["plot"]
        self._name = options["model"] or DEFAULT_MODEL
        self._asked, self._dummy = options["model"], options["dummy"]
        self._fields = {name: options[name] for name in ("device", "dtype", "kv_memory")} | fields
        if self._plot is not None:
            new_figure(1, 1)  # a missing matplotlib shows now, not after the measurements

    def __enter__(self) -> Bench:
        from nanokv.llm import LLM

        with ExitStack() as stack:
            folder = stack.enter_context(self._folder())
            self._report = stack.enter_context(progress_bars())
            self._report("load", 0, None)
            self.llm: LLM = LLM(folder, load="dummy" if self._dummy else "auto", **self._fields)
            self._report("load", 1, 1)
            stack.callback(self.llm.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.settings |= {
            "repeat": self.repeat,
            "device": str(self.llm.device),
            "dtype": str(self.llm.dtype).removeprefix("torch."),
            "dummy": self._dummy,
            "page_size": self.llm.config.page_size,
            "max_step_tokens": self.llm.config.max_step_tokens,
            "pages": self.llm.engine.store.num_pages,
        }
        self._stack.close()

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """The model's folder. Dummy weights need its config.json alone, which the catalog knows too."""
        if not (self._dummy and self._name in CATALOG):
            yield model_folder(self._asked)
            return
        with TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(CATALOG[self._name].config), encoding="utf-8")
            yield Path(folder)

    def ticker(self, total: int) -> Callable[[], None]:
        """A function to call `total` times; the bar moves."""
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self._report(self.what, done, total)

        self._report(self.what, 0, total)
        return tick

    def show(
        self,
        columns: Columns,
        draw: Callable[[Any, list[Row]], None],
        size: tuple[float, float],
        group: str | None = None,
    ) -> None:
        """Prints the rows as JSON or as a table, and draws them where a figure was asked for."""
        from rich.console import Console

        from nanokv.bench import report

        if self._plot is not None and self.rows:
            figure = new_figure(*size)
            draw(figure, self.rows)
            save_figure(figure, self._plot)
        if self._as_json:
            emit_json(f"bench {self.what}", self._name, self.settings, self.rows)
            return
        weights = "random weights" if self._dummy else "its weights"
        where = f"{self.settings['device']}, {self.settings['dtype']}, {weights}"
        click.echo(f"{self._name}: {where}; median of {self.repeat}" if self.repeat > 1 else f"{self._name}: {where}")
        console = Console(width=max(Console().width, WIDTH))  # a narrower terminal wraps; numbers are never cut
        console.print(report.table(columns, self.rows, group))
