"""nanokv bench codecs: size, errors, quality and speed of each codec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from nanokv.cli.bench_run import Bench, model_options
from nanokv.core.errors import ConfigError, NanokvError


class CodecNames(click.ParamType):
    """A list such as fp8,tq4,fp8/tq4."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        import torch

        from nanokv.codecs import resolve_codec

        if isinstance(value, list):
            return value
        names = list(dict.fromkeys(value.split(",")))
        for name in names:
            try:
                resolve_codec(name, torch.float32)
            except ConfigError as error:
                self.fail(str(error), param, ctx)
        return names


@click.command(epilog="Example: nanokv bench codecs smollm2-135m-instruct --codecs raw,fp8,tq4 --plot codecs.png")
@click.option("--codecs", "names", metavar="LIST", type=CodecNames(),
              help="Names, or pairs K/V such as fp8/tq4.  [default: all codecs]")  # fmt: skip
@click.option("--sweep", is_flag=True, help="Measure each codec on keys alone and on values alone too.")
@click.option("--quick", is_flag=True, help="Use fewer and shorter texts and fewer points of speed.")
@model_options
def codecs(names: list[str] | None, sweep: bool, quick: bool, **options: Any) -> None:
    """Measure the codecs of the cache.

    Prints true bits, errors, the quality of the model's output, decode speed, and how many requests fit at once.
    Quality is relative to a raw float32 cache, on texts of Python's own help. Speed is measured in turns with the raw
    codec.
    """
    from nanokv.bench import codecs as measured
    from nanokv.bench import report

    plan = measured.QUICK if quick else measured.FULL
    names = list(measured.ALL) if names is None else names
    settings: dict[str, Any] = {"codecs": names, "sweep": sweep, "quick": quick, **asdict(plan)}
    left_out: list[dict[str, str]] = []
    failures: list[dict[str, str]] = []
    with Bench("codecs", settings, options, max_requests=max(batch for batch, _ in plan.points)) as at:
        settings["prefill"] = at.llm.config.prefill
        bench = measured.CodecBench(at.open, at.llm, plan)
        settings["text_names"] = list(bench.texts)
        pairs = measured.swept(names) if sweep else []
        tick = at.ticker(bench.num_ticks(names, pairs))
        for name in [*names, *pairs]:
            try:
                for row in bench.rows(name, with_speed=name not in pairs, tick=tick):
                    at.rows.append(row)
            except ConfigError as error:
                left_out.append({"codec": name, "reason": str(error)})
                click.echo(f"left out: {name}: {error}", err=True)
            except Exception as error:  # a run may take hours: the other codecs are still measured and shown
                failures.append({"codec": name, "error": f"{type(error).__name__}: {error}"})
                click.echo(f"failed: {name}: {failures[-1]['error']}", err=True)
    settings |= {"left_out": left_out, "failures": failures}
    if not at.rows:
        raise NanokvError("no codec could be measured")
    at.show(report.codec_tables(at.rows), report.draw_codecs, (13, 5.5))
    if failures:
        raise NanokvError(f"failed: {', '.join(one['codec'] for one in failures)}")
