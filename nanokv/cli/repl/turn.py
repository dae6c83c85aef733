"""One answer: engine steps, streamed text, Ctrl-C, and the line of numbers under it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from nanokv.cli.common import binary
from nanokv.core.errors import NanokvError
from nanokv.core.request import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from nanokv.llm import LLM

SAME_GENERATION_S = 0.4
"""Seconds after a first Ctrl-C within which a second one leaves, even where the answer has stopped by then."""


class StopKey:
    """Ctrl-C inside a `with` block: the first sets `pressed`, the second ends the process with 130.

    The first takes effect between two engine steps, so that no step is interrupted. The second also works inside a
    long step, where no cleanup is possible: it ends the process at once.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._pressed_at = 0.0

    def __enter__(self) -> StopKey:
        self.pressed = False
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pressed and exception[0] is None:
            time.sleep(max(0.0, self._pressed_at + SAME_GENERATION_S - time.perf_counter()))
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        if self.pressed:
            os.write(2, b"\n")
            os._exit(130)
        self.pressed, self._pressed_at = True, time.perf_counter()


@dataclass(frozen=True)
class Turn:
    """The result of one request.

    output      the last RequestOutput
    kv_tokens   tokens whose K and V had been computed when it ended
    stopped     whether Ctrl-C ended it
    entered     perf_counter() when the user pressed Enter
    """

    output: RequestOutput
    kv_tokens: int
    stopped: bool
    entered: float


def answer(
    llm: LLM, token_ids: list[int], params: SamplingParams, show: Callable[[str], None], stop: StopKey, entered: float
) -> Turn:
    """Streams one answer through `show`. Raises RequestError where the prompt cannot be served.

    The engine advances step by step, and an answer can be stopped between any two steps. A stopped answer is aborted:
    its pages are free or cached when this returns, or, in a transfer, when the connector has acknowledged.
    """
    request = Request(token_ids, params)
    ticket = llm.loop.submit(request)
    computed = 0
    try:
        while ticket.advance():
            for output in ticket.take():
                if output.delta:
                    show(output.delta)
                if output.finished:
                    generated = len(output.token_ids)
                    kv_tokens = len(token_ids) + generated - 1 if generated else computed
                    return Turn(output, kv_tokens, output.finish_reason == "abort", entered)
            computed = request.num_computed
            if stop.pressed:
                ticket.cancel()
    finally:  # also where `show` raises
        ticket.close()
    raise NanokvError("the answer ended without a last output")


def stats_line(turn: Turn, page_size: int, page_bytes: int, state_bytes: int = 0) -> str:
    """38 tok · 61.2 tok/s · TTFT 41 ms · prompt 212 (cached 192) · KV 249 tok / 16 pages / 5.6 MiB

    tok/s is decode only, (n - 1) / (time of the last token - time of the first); TTFT counts from Enter.
    """
    output, times = turn.output, turn.output.metrics.token_times
    generated = len(output.token_ids)
    parts = [f"^C after {generated} tok" if turn.stopped else f"{generated} tok"]
    if len(times) > 1 and times[-1] > times[0]:
        parts.append(f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tok/s")
    if times:
        parts.append(f"TTFT {duration(times[0] - turn.entered)}")
    found, cached = output.kv_matched_tokens, output.cached_tokens
    without_state = f" of {found} found" if found > cached else ""  # pages without a recurrent state are no use
    parts.append(f"prompt {len(output.prompt_token_ids)} (cached {cached}{without_state})")
    pages = -(-turn.kv_tokens // page_size)
    kept = f"KV {turn.kv_tokens} tok / {pages} page{'' if pages == 1 else 's'} / {binary(pages * page_bytes)}"
    parts.append(kept + (f" + state {binary(state_bytes)}" if state_bytes else ""))
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as text: 41 ms, 1.20 s."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
