"""Compiling: processes that compile CPU kernels while the model is loaded, the progress of compilation, and a thread
that runs the kernels once while the user types."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanokv.core.config import EngineConfig
from nanokv.core.errors import CheckpointError
from nanokv.kernels import ahead
from nanokv.text.files import read_json

if TYPE_CHECKING:
    from nanokv.llm import LLM

logger = logging.getLogger("nanokv")


NVIDIA = Path("/proc/driver/nvidia/version")
"""The file of a driver, on Linux: torch, which would know whether there is a GPU, is not imported yet."""


def compile_ahead(folder: Path, config: EngineConfig) -> None:
    """Starts the processes that compile the kernels of a model, where the CPU will run it. Does not import torch."""
    if (
        (config.kernels, config.weights) != ("auto", "auto")
        or config.device not in ("auto", "cpu")
        or (config.device == "auto" and NVIDIA.exists())
    ):
        return
    try:
        fields = read_json(folder / "config.json")
    except CheckpointError:  # loading names the fault
        return
    text = fields.get("text_config") or fields
    if not isinstance(text, dict):
        return
    dtype = config.dtype if config.dtype != "auto" else text.get("dtype") or text.get("torch_dtype") or "float32"
    if dtype in ("float32", "bfloat16", "float16"):
        ahead.start(dtype, config.codec, "kv_lora_rank" in text)


class Compilations:
    """Counts the functions that numba compiles in this process. Machine code that is loaded from disk does not count.

    A kernel is compiled once for each dtype and codec, and kept on disk; where no folder is writable, in each process.

    announced   is called once, when the first compilation begins, or by `announce` after a `silent` block
    """

    def __init__(self, announced: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._announced: Callable[[], None] | None = announced
        self._is_silent = False
        self._spans: list[tuple[float, float]] = []
        self._depth = 0  # a function that is compiled has those compiled that it calls
        self._began = 0.0

    def watch(self) -> None:
        """Counts compilations from now on. Imports numba, which takes a moment."""
        from numba.core import event

        on_start, on_end = self._on_start, self._on_end

        class Listener(event.Listener):
            def on_start(self, event: Any) -> None:
                on_start()

            def on_end(self, event: Any) -> None:
                on_end()

        event.register("numba:compile", Listener())

    def announce(self) -> None:
        """Announces a compilation that is under way, unless one was announced."""
        if self._depth and self._announced is not None and not self._is_silent:
            announced, self._announced = self._announced, None
            announced()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """A block in which nothing is announced: the user types."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    def line(self) -> str:
        """The progress of a compilation, as one line; empty where none is under way."""
        if not self._depth:
            return ""
        seconds = time.perf_counter() - self._began
        took = sum(end - start for start, end in self._spans) + seconds
        return f"compiling kernels: {self.count} done in {took:.0f} s"

    def seconds_between(self, start: float, end: float) -> float:
        """Seconds of compiling from `start` to `end`, times of perf_counter()."""
        return sum(max(0.0, min(end, last) - max(start, first)) for first, last in self._spans)

    def _on_start(self) -> None:  # numba compiles in one thread at a time
        if not self._depth:
            self._began = time.perf_counter()
        self._depth += 1
        self.announce()

    def _on_end(self) -> None:
        self._depth -= 1
        self.count += 1
        if not self._depth:
            self._spans.append((self._began, time.perf_counter()))


class WarmUp:
    """Runs the kernels of an engine once, in a thread, before its first request."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self, llm: LLM) -> None:
        """Begins. No request may be submitted while `is_running`."""
        self._thread = threading.Thread(target=_warm_up, args=(llm,), name="warm-up", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()


def _warm_up(llm: LLM) -> None:
    from nanokv.engine.warm_up import warm_up

    try:
        warm_up(llm.engine)
    except Exception:  # the first request meets the same fault and names it
        logger.info("the kernels could not be run before the first request", exc_info=True)
