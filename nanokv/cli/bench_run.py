"""One run of a bench: the options of all benches, the model, progress, and the output of the rows.

An interrupted run shows what it measured until then, in every form that was asked for, and ends with exit code 130.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from nanokv.cli import common
from nanokv.hub.catalog import CATALOG, DEFAULT_MODEL

if TYPE_CHECKING:
    from nanokv.bench.figures import Draw
    from nanokv.bench.report import Columns, Row
    from nanokv.disagg.config import DisaggConfig
    from nanokv.llm import LLM


class Numbers(click.ParamType):
    """A comma-separated list of numbers such as 1,4,16, each from `least` to `most`."""

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
                example = "" if param is None else f" such as {param.default}"
                self.fail(f"{text!r}: expected numbers{example}", param, ctx)
            if not self.least <= number <= (number if self.most is None else self.most):
                bounds = f"at least {self.least}" + ("" if self.most is None else f", at most {self.most}")
                self.fail(f"{text!r}: expected {bounds}", param, ctx)
            numbers.append(number)
        return list(dict.fromkeys(numbers))


COUNT = click.IntRange(min=1)
COUNTS = Numbers(int, 1)
_ENGINE = ("device", "dtype", "weights", "kernels", "threads", "kv_memory")


def bench_options(command: Callable) -> Callable:
    """Adds the options of every bench: the model and how it runs, --json, --plot."""
    command = common.json_option(common.plot_option(command))
    dummy = "Use random weights of the model's shape; fetch and read none."
    command = click.option("--dummy", is_flag=True, help=dummy)(command)
    command = click.option("--kv-memory", metavar="SIZE", help="Memory for pages, such as 2GiB.")(command)
    return common.model_options(command)


def speed_options(command: Callable) -> Callable:
    """Adds the options of every bench of speed: bench_options and --repeat."""
    words = "Runs of each point: rows show the median, the lowest and the highest."
    repeat = click.option("--repeat", type=COUNT, default=3, show_default=True, help=words)
    return bench_options(repeat(command))


class Bench:
    """One run: loads the model, shows progress, prints rows. A context manager: the model lives inside.

    what      name of the subcommand
    options   the values of all of its options: its own, and those of `speed_options` or `bench_options`
    fields    further fields of EngineConfig

    settings  the values of the subcommand's own options; at the end of the run, all settings of --json
    rows      those measured so far. An interrupt ends the block of the context manager and no more: `show` prints them
    """

    def __init__(self, what: str, options: dict[str, Any], **fields: Any) -> None:
        self.what, self.settings = what, dict(options)
        self.repeat: int = self.settings.pop("repeat", 1)
        self.rows: list[Row] = []
        self.interrupted = False
        self._asked, self._dummy = self.settings.pop("model"), self.settings.pop("dummy")
        self._as_json, self._plot = self.settings.pop("as_json"), self.settings.pop("plot")
        self._name = self._asked or DEFAULT_MODEL
        self._fields = {name: self.settings.pop(name) for name in _ENGINE} | fields
        if self._plot is not None:
            common.new_figure(1, 1)  # reports a missing matplotlib before the measurements

    def __enter__(self) -> Bench:
        with ExitStack() as stack:
            self._at = stack.enter_context(self._folder())
            self._report = stack.enter_context(common.progress_bars())
            self._report("load", 0, None)
            self.llm: LLM = self.open()
            self._report("load", 1, 1)
            stack.callback(self.llm.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> bool:
        from nanokv.models.forms import forms_of

        self.interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        forms = forms_of(self.llm.engine.model)
        self.settings |= {
            "repeat": self.repeat,
            "device": str(self.llm.device),
            "dtype": str(self.llm.dtype).removeprefix("torch."),
            "codec": self.llm.config.codec,
            "weights": self.llm.config.weights,
            "kernels": self.llm.config.kernels,
            "weight_forms": forms.weights,
            "attention_form": forms.of_attention,
            "dummy": self._dummy,
            "page_size": self.llm.config.page_size,
            "max_step_tokens": self.llm.config.max_step_tokens,
            "pages": len(self.llm.engine.store.pages),
        } | ({"interrupted": True} if self.interrupted else {})
        self._stack.close()
        return self.interrupted

    def open(self, disagg: DisaggConfig | None = None, **fields: Any) -> LLM:
        """An engine with the run's model; `fields` of EngineConfig replace the run's."""
        from nanokv.llm import LLM

        return LLM(self._at, disagg=disagg, load="dummy" if self._dummy else "auto", **self._fields | fields)

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """The model's folder. Dummy weights need only a config.json, which the catalog has."""
        if not (self._dummy and self._name in CATALOG):
            yield common.model_folder(self._asked)
            return
        with TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(CATALOG[self._name].config), encoding="utf-8")
            yield Path(folder)

    def found(self, row: Row) -> None:
        """Keeps a measured row. One with further repeats replaces the last one, which is of the same point."""
        if row.get("repeats", 1) > 1:
            self.rows.pop()
        self.rows.append(row)

    def ticker(self, total: int) -> Callable[[], None]:
        """A function that advances the progress bar; it is to be called `total` times."""
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self._report(self.what, done, total)

        self._report(self.what, 0, total)
        return tick

    def show(
        self,
        tables: Sequence[tuple[Columns, Sequence[Row], str | None]],
        draw: Draw,
        size: tuple[float, float],
        notes: Sequence[str] = (),
    ) -> None:
        """Prints the rows as JSON or as tables, and draws the figure of --plot. Raises KeyboardInterrupt at the end of
        an interrupted run.

        tables   columns, rows, and the field at whose changes a line is drawn, or None
        draw     draws all rows into a figure
        size     width and height of the figure, in inches
        notes    sentences that belong to the rows
        """
        from nanokv.bench import report

        if self.interrupted:
            rows = common.counted(len(self.rows), "row")
            click.echo(f"interrupted: {rows} until then, the last one perhaps of fewer runs", err=True)
        name = f"bench {self.what}"
        if self._plot is not None and self.rows:
            from nanokv.bench.figures import add_caption

            figure = common.new_figure(*size)
            add_caption(figure, report.caption(common.envelope(name, self._name, self.settings, [])))
            draw(figure, self.rows)
            common.save_figure(figure, self._plot)
        if self._as_json:
            settings = self.settings | ({"notes": list(notes)} if notes else {})
            common.emit_json(name, self._name, settings, self.rows)
        elif self.rows:
            self._print(tables, [*report.legend(self.rows), *notes])
        if self.interrupted:
            raise KeyboardInterrupt

    def _print(self, tables: Sequence[tuple[Columns, Sequence[Row], str | None]], notes: Sequence[str]) -> None:
        from rich.console import Console

        from nanokv.bench import report

        weights = "random weights" if self._dummy else "its weights"
        median = f"; median of {self.repeat}, lowest to highest below" if self.repeat > 1 else ""
        click.echo(f"{self._name}: {self.settings['device']}, {self.settings['dtype']}, {weights}{median}")
        click.echo(report.machine(common.envelope(self.what, self._name, self.settings, [])))
        for columns, rows, group in tables:
            made = report.table(columns, rows, group)
            width = Console(width=1000).measure(made).maximum
            Console(width=max(Console().width, width)).print(made)  # a narrower terminal wraps; numbers are never cut
        for note in notes:
            click.echo(note)
