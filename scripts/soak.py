"""Soaks: long runs of the engine with faults, whose answers are compared with those of the same requests alone.

Each prints what it did and every violation, and exits with 1 if there was one.
"""

from __future__ import annotations

import signal

import click
from soaks import disagg as disagg_soak
from soaks import engine as engine_soak
from soaks import interrupts as interrupt_soak
from soaks import threads as thread_soak

MODELS = click.Choice(["tiny-gqa", "tiny-mla", "tiny-hybrid"])
seconds = click.option("--seconds", default=60.0, show_default=True, help="How long.")
seed = click.option("--seed", default=0, show_default=True, help="Of the load and of the faults.")
model = click.option("--model", default="tiny-gqa", type=MODELS, show_default=True)


@click.group(help=__doc__, epilog="Example: python scripts/soak.py engine --model tiny-hybrid --seconds 600 --seed 3")
def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


@main.command()
@model
@seconds
@seed
@click.option("--codec", default="raw", show_default=True)
@click.option("--overlap", is_flag=True, help="Plan a step before the last one is resolved, as on a GPU.")
def engine(model: str, seconds: float, seed: int, codec: str, overlap: bool) -> None:
    """Random requests, aborts, resets, exceptions in inner functions, interrupts."""
    engine_soak.run(model, seconds, seed, codec, overlap)


@main.command()
@model
@click.option("--kind", type=click.Choice(interrupt_soak.KINDS), default="signal", show_default=True)
def interrupts(model: str, kind: str) -> None:
    """An interrupt at every line of cache/ and engine/, once."""
    subject = interrupt_soak.Subject(model)
    places = subject.lines(kind)
    wrong = 0
    with click.progressbar(places, label=f"{len(places)} lines") as bar:
        for place in bar:
            fault = subject.run(interrupt_soak.Interruption(place, kind))
            if fault is not None:
                wrong += 1
                click.echo(f"\nVIOLATION {interrupt_soak.named(place)}: {fault}")
                subject = interrupt_soak.Subject(model)
    click.echo(f"{len(places)} lines interrupted, {wrong} violations")
    raise SystemExit(wrong > 0)


@main.command()
@model
@seconds
@seed
def threads(model: str, seconds: float, seed: int) -> None:
    """Threads that ask, close, drop and forget streams, beside stats() and reset_prefix_cache()."""
    thread_soak.run(thread_soak.Threads, model, seconds, seed)


@main.command()
@model
@seconds
@seed
def ctrl_c(model: str, seconds: float, seed: int) -> None:
    """Ctrl-C at random moments of generate()."""
    thread_soak.run(thread_soak.CtrlC, model, seconds, seed)


@main.command()
@model
@seconds
@seed
def disagg(model: str, seconds: float, seed: int) -> None:
    """Kills, stops and wakes a prefill process at random."""
    disagg_soak.run(model, seconds, seed)


if __name__ == "__main__":
    main()
