"""nanokv bench: options and output of the benches. nanokv/bench measures."""

from __future__ import annotations

from typing import Any

import click

from nanokv.cli.bench_codecs import codecs
from nanokv.cli.bench_run import COUNT, COUNTS, Bench, Numbers, engine_options
from nanokv.cli.common import binary


@click.group(
    epilog="\b\nExamples:\n  nanokv bench request --dummy\n  nanokv bench prefix --plot prefix.png\n"
    "  nanokv bench decode smollm2-135m-instruct --json > decode.json"
)
def bench() -> None:
    """Measure this engine on this machine."""


bench.add_command(codecs)


@bench.command(epilog="Example: nanokv bench request --prompt-tokens 1024,4096 --output-tokens 512")
@click.option("--prompt-tokens", type=COUNTS, default="1024", show_default=True, help="Prompt lengths, one row each.")
@click.option("--output-tokens", type=COUNT, default=128, show_default=True, help="Tokens of the answer.")
@engine_options
def request(prompt_tokens: list[int], output_tokens: int, **options: Any) -> None:
    """Measure one request alone, without and with a cache hit.

    Prints TTFT, TPOT and total time, and the share that a perfect hit can save: the prefill, (TTFT - TPOT) / total.
    The measured saving comes from the same prompt a second time.
    """
    from nanokv.bench import report
    from nanokv.bench.request import measure_request

    settings = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    with Bench("request", settings, options) as at:
        tick = at.ticker(2 * len(prompt_tokens) * at.repeat)
        at.rows = [measure_request(at.llm, length, output_tokens, at.repeat, tick) for length in prompt_tokens]
    at.show([(report.REQUEST, at.rows, None)], report.draw_request, (7, 1.5 + 0.6 * len(at.rows)))


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
@engine_options
def prefix(
    prompt_tokens: int,
    output_tokens: int,
    shared: list[float],
    concurrency: list[int],
    requests: int | None,
    **options: Any,
) -> None:
    """Measure prefix caching under load.

    Prompts of fixed length share none, some or all of their tokens. The ceiling of each point is the throughput of a
    perfect cache: uncached prompt tokens at the measured prefill speed, plus output tokens at the measured decode speed
    of that many clients.
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
    at.show([(report.PREFIX, at.rows, "concurrency")], report.draw_prefix, (13, 4))


@bench.command(epilog="Example: nanokv bench decode --batch 1,8,32 --context 256,2048")
@click.option("--batch", type=COUNTS, default="1,4,16", show_default=True, help="Requests that decode together.")
@click.option("--context", type=COUNTS, default="256,1024,4096", show_default=True, help="Tokens before the answer.")
@click.option("--steps", type=COUNT, default=20, show_default=True, help="Timed steps per point; rows show the median.")
@engine_options
def decode(batch: list[int], context: list[int], steps: int, **options: Any) -> None:
    """Measure decoding over batch size and context.

    A step must read all weights and the keys and values of every request. The table has the share of the memory
    bandwidth that this reaches; the bandwidth is measured in the same run.
    """
    from nanokv.bench import report
    from nanokv.bench.decode import fits, measure_decode

    settings: dict[str, Any] = {"batch": batch, "context": context, "steps": steps}
    with Bench("decode", settings, options, max_requests=max(batch)) as at:
        at.rows = measure_decode(at.llm, batch, context, steps, at.repeat, at.ticker(len(batch) * len(context)))
        pool, longest = len(at.llm.engine.store.pages) * at.llm.engine.layout.page_bytes, at.llm.engine.max_length
        left_out = [(b, c) for b in batch for c in context if not fits(at.llm, b, c, steps)]
    settings["left_out"] = [{"batch": b, "context_tokens": c} for b, c in left_out]
    at.show([(report.DECODE, at.rows, "batch")], report.draw_decode, (9, 4))
    if left_out:
        points = ", ".join(f"{b} x {c:,}" for b, c in left_out)
        limits = f"the {binary(pool)} of pages (--kv-memory) or the model's {longest:,} tokens"
        click.echo(f"left out, beyond {limits}: {points}", err=True)


@bench.command(epilog="Example: nanokv bench disagg --plot disagg.png")
@click.option("--prompt-tokens", type=COUNT, default=2048, show_default=True, help="Tokens of each arriving prompt.")
@click.option("--prompts", type=COUNT, default=6, show_default=True, help="Arriving prompts, one after the other.")
@click.option("--running", type=COUNT, default=4, show_default=True, help="Requests that decode meanwhile.")
@click.option("--context", type=COUNT, default=256, show_default=True, help="Tokens of context of those requests.")
@click.option("--chunk", type=COUNT, default=128, show_default=True, help="Tokens per step with chunked prefill.")
@engine_options
def disagg(prompt_tokens: int, prompts: int, running: int, context: int, chunk: int, **options: Any) -> None:
    """Measure stalls of running answers while long prompts arrive.

    Compares one process, with whole and with chunked prefill, with two processes on the same cores. On a CPU each of
    the two processes has half of the cores, the one process has all.
    """
    from nanokv.bench import report
    from nanokv.bench.disagg import MODES, measure_disagg

    settings = {"prompt_tokens": prompt_tokens, "prompts": prompts, "running": running, "context": context,
                "chunk": chunk}  # fmt: skip
    with Bench("disagg", settings, options) as at:
        tick = at.ticker(len(MODES) * prompts * at.repeat)
        at.rows = measure_disagg(
            at.open, prompt_tokens, prompts, running, context, chunk, at.repeat, tick
        )  # fmt: skip
    at.show([(report.DISAGG, at.rows, None)], report.draw_disagg, (9, 7))
