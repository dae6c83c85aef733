"""nanokv bench: options and output of the benches. nanokv/bench measures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from nanokv.cli.bench_run import COUNT, COUNTS, Bench, Numbers, bench_options, speed_options
from nanokv.cli.common import Group, binary
from nanokv.core.errors import ConfigError, NanokvError


@click.group(
    cls=Group,
    epilog="\b\nExamples:\n  nanokv bench request --dummy\n  nanokv bench prefix --plot prefix.png\n"
    "  nanokv bench decode smollm2-135m-instruct --json > decode.json",
)
def bench() -> None:
    """Measure this engine on this machine."""


@bench.command(epilog="Example: nanokv bench request --prompt-tokens 1024,4096 --output-tokens 512")
@click.option("--prompt-tokens", type=COUNTS, default="1024", show_default=True, help="Prompt lengths, one row each.")
@click.option("--output-tokens", type=COUNT, default=128, show_default=True, help="Tokens of the answer.")
@speed_options
def request(**options: Any) -> None:
    """Measure one request alone, without and with a cache hit.

    Prints TTFT, TPOT and total time, and the share that a perfect hit can save: the prefill, (TTFT - TPOT) / total.
    The measured saving comes from the same prompt a second time.
    """
    from nanokv.bench import figures, report
    from nanokv.bench.request import measure_request

    lengths, output_tokens = options["prompt_tokens"], options["output_tokens"]
    with Bench("request", options) as at:
        tick = at.ticker(2 * len(lengths) * at.repeat)
        for length in lengths:
            measure_request(at.llm, length, output_tokens, at.repeat, tick, at.found)
    at.show([(report.REQUEST, at.rows, None)], figures.draw_request, (8, 2 + 0.6 * len(at.rows)))


@bench.command(epilog="Example: nanokv bench prefix --concurrency 1,8 --shared 0,0.5,1 --plot prefix.png")
@click.option("--prompt-tokens", type=COUNT, default=1024, show_default=True, help="Tokens of every prompt.")
@click.option("--output-tokens", type=COUNT, default=32, show_default=True, help="Tokens of every answer.")
@click.option("--shared", type=Numbers(float, 0, 1), default="0,0.25,0.5,0.75,0.9,1", show_default=True,
              help="Shares of the prompt that all requests have in common.")  # fmt: skip
@click.option("--concurrency", type=COUNTS, default="1,4,16", show_default=True,
              help="Clients; each sends a request when its last one is finished.")  # fmt: skip
@click.option(
    "--requests", type=COUNT, help="Requests per point, at least one per client.  [default: 2 per client, at least 4]"
)
@speed_options
def prefix(**options: Any) -> None:
    """Measure prefix caching under load.

    Prompts of fixed length share none, some or all of their tokens. The ceiling of each point is the throughput of a
    perfect cache: uncached prompt tokens at the measured prefill speed, plus output tokens at the measured decode speed
    of that many clients.
    """
    from nanokv.bench import figures, report
    from nanokv.bench.prefix import measure_prefix, runs

    with Bench("prefix", options, max_requests=max(options["concurrency"])) as at:
        tick = at.ticker(runs(options["shared"], options["concurrency"], options["requests"], at.repeat))
        measure_prefix(at.llm, **at.settings, repeat=at.repeat, tick=tick, found=at.found)
    at.show([(report.PREFIX, at.rows, "concurrency")], figures.draw_prefix, (13, 4.4))


@bench.command(epilog="Example: nanokv bench decode --batch 1,8,32 --context 256,2048")
@click.option("--batch", type=COUNTS, default="1,4,16", show_default=True, help="Requests that decode together.")
@click.option("--context", type=COUNTS, default="256,1024,4096", show_default=True, help="Tokens before the answer.")
@click.option("--steps", type=COUNT, default=20, show_default=True, help="Timed steps per point; rows show the median.")
@speed_options
def decode(**options: Any) -> None:
    """Measure decoding over batch size and context.

    A step must read all weights and the keys and values of every request. The table has the share of the memory
    bandwidth that this reaches; a plain read of as many bytes as the weights measures it in the same run. Below stand
    the forms of the weights and of attention, with the reason where a weight has another form than the preferred one.
    """
    from nanokv.bench import figures, report
    from nanokv.bench.decode import fits, measure_decode, notes

    batch, context, steps = options["batch"], options["context"], options["steps"]
    with Bench("decode", options, max_requests=max(batch)) as at:
        pool, longest = len(at.llm.engine.store.pages) * at.llm.engine.layout.page_bytes, at.llm.engine.max_length
        left_out = [(b, c) for b in batch for c in context if not fits(at.llm, b, c, steps)]
        at.settings["left_out"] = [{"batch": b, "context_tokens": c} for b, c in left_out]
        tick = at.ticker(len(batch) * len(context))
        measure_decode(at.llm, batch, context, steps, at.repeat, tick, at.found)
    if left_out:
        points = ", ".join(f"{b} x {c:,}" for b, c in left_out)
        limits = f"the {binary(pool)} of pages (--kv-memory) or the model's {longest:,} tokens"
        click.echo(f"left out, beyond {limits}: {points}", err=True)
    at.show([(report.DECODE, at.rows, "batch")], figures.draw_decode, (9, 4.4), notes(at.llm, at.rows))


@bench.command(epilog="Example: nanokv bench disagg --plot disagg.png")
@click.option("--prompt-tokens", type=COUNT, default=2048, show_default=True, help="Tokens of each arriving prompt.")
@click.option("--prompts", type=COUNT, default=6, show_default=True, help="Arriving prompts, one after the other.")
@click.option("--running", type=COUNT, default=4, show_default=True, help="Requests that decode meanwhile.")
@click.option("--context", type=COUNT, default=256, show_default=True, help="Tokens of context of those requests.")
@click.option("--chunk", type=COUNT, default=128, show_default=True, help="Tokens per step with chunked prefill.")
@speed_options
def disagg(**options: Any) -> None:
    """Measure stalls of running answers while long prompts arrive.

    Compares one process, with whole and with chunked prefill, with two processes on the same cores. On a CPU each of
    the two processes has half of the cores, the one process has all.
    """
    from nanokv.bench import figures, report
    from nanokv.bench.disagg import MODES, measure_disagg

    with Bench("disagg", options) as at:
        tick = at.ticker(len(MODES) * options["prompts"] * at.repeat)
        measure_disagg(at.open, **at.settings, repeat=at.repeat, tick=tick, found=at.found)
    at.show([(report.DISAGG, at.rows, None)], figures.draw_disagg, (9, 7.4))


def _codec_names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    """The codecs of a list such as fp8,tq4,fp8/tq4; of None, all."""
    import torch

    from nanokv.bench.codecs import ALL
    from nanokv.codecs import resolve_codec

    names = list(ALL) if value is None else list(dict.fromkeys(value.split(",")))
    for name in names:
        try:
            resolve_codec(name, torch.float32)
        except ConfigError as error:
            raise click.BadParameter(str(error), ctx, parameter) from None
    return names


@bench.command(epilog="Example: nanokv bench codecs smollm2-135m-instruct --codecs raw,fp8,tq4 --plot codecs.png")
@click.option("--codecs", metavar="LIST", callback=_codec_names,
              help="Names, or pairs K/V such as fp8/tq4.  [default: all codecs]")  # fmt: skip
@click.option("--sweep", is_flag=True, help="Measure each codec on keys alone and on values alone too.")
@click.option("--quick", is_flag=True, help="Use fewer and shorter texts and fewer points of speed.")
@bench_options
def codecs(**options: Any) -> None:
    """Measure the codecs of the cache.

    Prints true bits, errors, the quality of the model's output, decode speed, and how many requests fit at once.
    Quality is relative to a raw float32 cache, on texts of Python's own help; the small shipped models read their own
    closed language. Speed is measured in turns with the raw codec.
    """
    from nanokv.bench import codecs as measured
    from nanokv.bench import figures, report

    plan, names = measured.QUICK if options["quick"] else measured.FULL, options["codecs"]
    left_out: list[dict[str, str]] = []
    failures: list[dict[str, str]] = []
    with Bench("codecs", options, max_requests=max(batch for batch, _ in plan.points)) as at:
        at.settings |= asdict(plan) | {"prefill": at.llm.config.prefill}
        bench = measured.CodecBench(at.open, at.llm, plan)
        at.settings["text_names"] = list(bench.texts)
        pairs = measured.swept(names) if options["sweep"] else []
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
    at.settings |= {"left_out": left_out, "failures": failures}
    if not at.rows and not at.interrupted:
        raise NanokvError("no codec could be measured")
    notes = measured.notes(at.rows, at.settings["dtype"], at.llm.model_config.vocab_size)
    at.show(report.codec_tables(at.rows), figures.draw_codecs, (13, 6), notes)
    if failures:
        raise NanokvError(f"failed: {', '.join(one['codec'] for one in failures)}")
