"""One answer: engine steps, streamed text, Ctrl-C, and the line of numbers under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanokv.cli.common import binary
from nanokv.cli.repl.compiling import Compilations
from nanokv.cli.repl.stop_key import StopKey
from nanokv.core.errors import NanokvError
from nanokv.core.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from nanokv.cli.repl.terminal import Terminal
    from nanokv.llm import LLM

SHOWN_PREFILL = 512
"""Tokens to compute from which the progress of a prompt is shown."""


@dataclass(frozen=True)
class Turn:
    """The result of one request.

    output       the last RequestOutput
    kv_tokens    tokens whose K and V had been computed when it ended
    stopped      whether Ctrl-C ended it
    first_s      seconds from Enter to the first token, None without one; as the next, without those of compiling
    decode_s     seconds from the first token to the last
    compiling_s  seconds from Enter to the last token in which kernels were compiled
    """

    output: RequestOutput
    kv_tokens: int
    stopped: bool
    first_s: float | None
    decode_s: float
    compiling_s: float


def answer(
    llm: LLM,
    token_ids: list[int],
    params: SamplingParams,
    terminal: Terminal,
    stop: StopKey,
    entered: float,
    compiled: Compilations,
) -> Turn:
    """Streams one answer to `terminal`. Raises RequestError where the prompt cannot be served.

    The engine advances step by step, and an answer can be stopped between any two steps. A stopped answer is aborted:
    its pages are free or cached when this returns, or, in a transfer, when the connector has acknowledged.
    """
    request = Request(token_ids, params)
    ticket = llm.loop.submit(request)
    computed = 0

    def progress() -> str:
        """The line of `busy`, read by its thread while steps run."""
        if stop.pressed:
            return "stopping after this step; Ctrl-C again leaves"
        line = compiled.line()
        if not line and len(token_ids) - request.held.num_cached >= SHOWN_PREFILL:
            line = f"prefill {request.num_computed:,} / {len(token_ids):,}"
        return line

    try:
        with terminal.busy(progress):
            while ticket.advance():
                for output in ticket.take():
                    if output.delta:
                        terminal.say(output.delta)
                    if output.finished:
                        generated = len(output.token_ids)
                        kv_tokens = len(token_ids) + generated - 1 if generated else computed
                        return _turn(output, kv_tokens, entered, compiled)
                computed = request.num_computed
                if stop.pressed:
                    ticket.cancel()
    finally:  # also where the terminal raises
        ticket.close()
    raise NanokvError("the answer ended without a last output")


def _turn(output: RequestOutput, kv_tokens: int, entered: float, compiled: Compilations) -> Turn:
    times = output.metrics.token_times
    first, last = (times[0], times[-1]) if times else (entered, entered)
    before, within = compiled.seconds_between(entered, first), compiled.seconds_between(first, last)
    first_s = first - entered - before if times else None
    stopped = output.finish_reason == "abort"
    return Turn(output, kv_tokens, stopped, first_s, last - first - within, before + within)


def stats_line(turn: Turn, page_size: int, page_bytes: int, state_bytes: int = 0) -> str:
    """38 tok · 61.2 tok/s · TTFT 41 ms · prompt 212 (cached 192) · KV 249 tok / 16 pages / 5.6 MiB

    tok/s is decode only, (n - 1) / (time of the last token - time of the first); TTFT counts from Enter. Time in which
    kernels were compiled is in neither, and comes last.
    """
    output = turn.output
    generated = len(output.token_ids)
    parts = [f"^C after {generated} tok" if turn.stopped else f"{generated} tok"]
    if generated > 1 and turn.decode_s > 0:
        parts.append(f"{(len(output.metrics.token_times) - 1) / turn.decode_s:.1f} tok/s")
    if turn.first_s is not None:
        parts.append(f"TTFT {duration(turn.first_s)}")
    found, cached = output.kv_matched_tokens, output.cached_tokens
    without_state = f" of {found} found" if found > cached else ""  # pages without a recurrent state are no use
    parts.append(f"prompt {len(output.prompt_token_ids)} (cached {cached}{without_state})")
    pages = -(-turn.kv_tokens // page_size)
    kept = f"KV {turn.kv_tokens} tok / {pages} page{'' if pages == 1 else 's'} / {binary(pages * page_bytes)}"
    parts.append(kept + (f" + state {binary(state_bytes)}" if state_bytes else ""))
    if turn.compiling_s > 0:
        parts.append(f"compiling {duration(turn.compiling_s)} apart")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as text: 41 ms, 1.20 s."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
