"""Parts that commands share: a model by name, options, progress bars, the JSON envelope, figures."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import nanokv
from nanokv.core.config import KERNELS, WEIGHTS
from nanokv.core.errors import ConfigError, NanokvError, RequestError
from nanokv.hub.catalog import DEFAULT_MODEL
from nanokv.hub.home import find_damage, folder_for, resolve_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

dtype_option = click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
    help="auto: the checkpoint's own.",
)  # fmt: skip
_MODEL_OPTIONS = (
    click.argument("model", required=False),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    dtype_option,
    click.option("--weights", type=click.Choice(WEIGHTS), default="auto", show_default=True,
                 help="auto: in the dtype; q8: 8 bits for a number, on a CPU."),
    click.option("--kernels", type=click.Choice(KERNELS), default="auto", show_default=True,
                 help="auto: compiled for the device; reference: readable torch, on any device."),
    click.option("--threads", type=int, metavar="N", help="Threads on a CPU. Default: the processors it may use."),
)  # fmt: skip
_CODEC_OPTIONS = (
    click.option("--codec", default="raw", show_default=True,
                 help="Codec of K and V: raw, fp8, tq4, ..., or a pair K/V."),
    click.option("--center-keys", is_flag=True,
                 help="Subtract the mean of the keys, measured at load, before a codec writes them."),
    click.option("--page-size", type=int, help="Tokens in a page. Default: 16, or 32 for codecs kivi2 and kivi4."),
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


class Group(click.Group):
    """A group whose help has the whole summary of each command; click's own cuts long ones."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            helps = {name: command.help or "" for name, command in sorted(self.commands.items())}
            formatter.write_dl([(name, " ".join(text.partition("\n\n")[0].split())) for name, text in helps.items()])


def _figure_path(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    if value is not None and Path(value).suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"{value!r} must end in .png or .svg", ctx, parameter)
    return None if value is None else Path(value)


plot_option = click.option(
    "--plot", metavar="FILE", callback=_figure_path, help="Draw a figure: FILE ends in .png or .svg."
)


def model_options(command: Callable) -> Callable:
    """Adds MODEL, which may be absent, and how it runs: --device, --dtype, --weights, --kernels, --threads.

    A wrong value of an option is a usage error, also where only a loaded model shows that it is wrong.
    """

    @wraps(command)
    def run(**options: Any) -> Any:
        try:
            return command(**options)
        except (ConfigError, RequestError) as error:
            raise usage_error(error, options)  # noqa: B904 - the error is its context, or itself

    for option in reversed(_MODEL_OPTIONS):
        run = option(run)
    return run


def codec_options(command: Callable) -> Callable:
    """Adds the options of the cache's codec: --codec, --center-keys, --page-size."""
    for option in reversed(_CODEC_OPTIONS):
        command = option(command)
    return command


def usage_error(error: NanokvError, options: Container[str]) -> Exception:
    """A UsageError that names the option where `error` begins with the name of one ("page_size=3: ..."), else `error`.

    options   the names of the command's parameters
    """
    named = re.match(r"(\w+)(=True(?=:)|=)", str(error))  # a flag has no value
    if named is None or named[1] not in options:
        return error
    option, rest = named[1].replace("_", "-"), str(error)[named.end() :]
    return click.UsageError(f"--{option}{'' if rest.startswith(':') else ' '}{rest}")


def model_folder(name: str | None) -> Path:
    """The folder of a model. None means the default model, which is pulled where it is missing.

    Raises CheckpointError, with the command to run, and PullError.
    """
    if name is None:
        target = folder_for(DEFAULT_MODEL)
        if find_damage(target) is not None:
            pull_with_progress(DEFAULT_MODEL)
        return target
    return resolve_model(name)


def pull_with_progress(what: str, **options: Any) -> Path:
    """hub.pull.pull with progress bars. Raises PullError."""
    from nanokv.hub.pull import pull

    with progress_bars() as progress:
        return pull(what, progress=progress, **options)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields report(stage, done, total), one bar per stage. Bars appear on stderr, and only where it is a terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int | None) -> None:
        bars.start()  # not earlier: the hub's client draws bars of its own
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield report
    finally:
        bars.stop()


def hardware() -> dict[str, Any]:
    """The machine of the measurements: names and counts of its processors, bytes of its memory, versions."""
    import torch

    from nanokv.engine.limits import processors, total_memory
    from nanokv.kernels.instructions import instructions

    return {
        "cpu": _cpu_name(),
        "instructions": ", ".join(instructions()) or "no vector instructions",
        "cpus": processors(),
        "memory_bytes": total_memory(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    named = re.search(r"^model name.*?:(.*)", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def emit_json(command: str, model: str | list[str], settings: dict, rows: list[dict]) -> None:
    """Prints the envelope, the object of every --json, on stdout. Keys of `rows` name their units."""
    click.echo(json.dumps(envelope(command, model, settings, rows), indent=2, allow_nan=False))


def envelope(command: str, model: str | list[str], settings: dict, rows: list[dict]) -> dict[str, Any]:
    """A run of a command as one object: what it was, when and where it ran, and what it found."""
    head = {"command": command, "version": nanokv.__version__, "date": time.strftime("%Y-%m-%d")}
    return head | {"hardware": hardware(), "model": model, "settings": settings, "rows": rows}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches. Raises NanokvError, with the remedy, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NanokvError("--plot needs matplotlib; run `pip install 'nanokv[bench]'`") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure and prints its path on stderr. Raises NanokvError where it cannot be written."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise NanokvError(f"{path}: {error.strerror or error}") from error
    click.echo(f"wrote {path}", err=True)


def binary(num_bytes: float) -> str:
    """Bytes in binary units, such as 22.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as 1 page or 1,200 pages."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
