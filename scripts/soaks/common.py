"""Parts that the soaks share: random requests, the right answers to them, and the resources of a process."""

from __future__ import annotations

import gc
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nanokv import LLM, RequestOutput, SamplingParams

MAX_REMEMBERED = 256
"""Requests whose right answers are kept."""
GROWTH_MIB = 64
"""Memory that a process may gain after its first quarter; a leak of a page a step gains more in a minute."""


class Record:
    """Counts of events, by name. A violation is printed at once.

    exit_code   0 where there was none
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.violations = 0
        self._begin = self._shown = time.monotonic()

    def is_over(self, seconds: float) -> bool:
        """Whether the time is over, or too much is wrong to go on. Prints a line every half minute."""
        now = time.monotonic()
        if now - self._shown > 30:
            self._shown = now
            print(self, flush=True)
        return self.seconds > seconds or self.violations > 20

    def count(self, name: str) -> None:
        """Counts one more."""
        self.counts[name] += 1

    def violation(self, text: str) -> None:
        """Something that must never happen."""
        self.violations += 1
        print(f"VIOLATION after {self.seconds:.0f} s: {text}", flush=True)

    @property
    def seconds(self) -> float:
        """Since the begin."""
        return time.monotonic() - self._begin

    @property
    def exit_code(self) -> int:
        return 1 if self.violations else 0

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {number:,}" for name, number in sorted(self.counts.items()))
        holds = f"{memory_mib():.0f} MiB, {descriptors()} descriptors"
        return f"{self.seconds:.0f} s: {counts}; {holds}; violations {self.violations}"


class RandomRequests:
    """Prompts with common beginnings, and parameters: greedy and drawn, one sample and three, salted and not.

    rng         the source of all choices
    vocab_size  of the model
    lengths     tokens of the common beginnings
    """

    def __init__(self, rng: random.Random, vocab_size: int, lengths: Sequence[int] = (16, 40, 90, 150)) -> None:
        self._rng, self._vocab_size, self._lengths = rng, vocab_size, lengths
        self._stems = [[self._token() for _ in range(length)] for length in lengths]

    def __call__(self) -> tuple[list[int], SamplingParams]:
        rng = self._rng
        prompt = rng.choice(self._stems)[: rng.choice(self._lengths)]
        prompt = [*prompt, *(self._token() for _ in range(rng.randrange(1, 4)))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.9]), seed=rng.randrange(2), n=rng.choice([1, 1, 3]),
            max_tokens=rng.choice([1, 5, 12]), ignore_eos=True, logprobs=rng.choice([None, 1]),
            cache_salt=rng.choice([None, "x"]),
        )  # fmt: skip
        return prompt, params

    def _token(self) -> int:
        return self._rng.randrange(5, self._vocab_size)


class Alone:
    """The right answers: those of an engine that computes one request at a time and finds no prefix.

    llm   with prefix_cache=False, in float32
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._remembered: dict[tuple[tuple[int, ...], str], list[RequestOutput]] = {}

    def difference(
        self, prompt: list[int], params: SamplingParams, output: RequestOutput, cut: Sequence[str] = ("abort",)
    ) -> str | None:
        """How a finished output differs from the right one, bit for bit; None where it does not.

        cut   finish reasons of outputs that are compared as far as they go
        """
        key = tuple(prompt), repr(params)
        if key not in self._remembered:
            if len(self._remembered) == MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[key] = self._llm.generate([prompt], params)
        right = self._remembered[key][output.index]
        if output.finish_reason in cut:
            tokens = right.token_ids[: len(output.token_ids)]
            return None if output.token_ids == tokens else f"{output.token_ids} before its end, not {tokens}"
        if output.finish_reason == "error":
            return f"error: {output.error}"
        for name in ("token_ids", "finish_reason", "text", "logprobs"):
            found, expected = getattr(output, name), getattr(right, name)
            if found != expected:
                return f"{name} {found!r}, not {expected!r}"
        return None


class Holdings:
    """Resources of this process: memory, descriptors, files in /dev/shm. Made before an engine is."""

    def __init__(self) -> None:
        self._descriptors, self._files = descriptors(), shared_files()
        self._memory: float | None = None

    def settle(self) -> None:
        """Notes the memory that the process needs."""
        self._memory = memory_mib()

    def leaks(self) -> list[str]:
        """The resources that are still held once every engine is closed."""
        found = []
        if self._memory is not None and (now := memory_mib()) > self._memory + GROWTH_MIB:
            found.append(f"{now:.0f} MiB of memory, {self._memory:.0f} after the first quarter")
        if descriptors() > self._descriptors:
            found.append(f"{descriptors()} descriptors, {self._descriptors} before")
        if files := shared_files() - self._files:
            found.append(f"files in /dev/shm: {', '.join(sorted(files))}")
        return found


def memory_mib() -> float:
    """Resident memory of this process, in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors() -> int:
    """Open descriptors of this process."""
    gc.collect()  # memory that is mapped keeps its descriptor
    return len(os.listdir("/proc/self/fd")) - 1  # without that of listdir itself


def shared_files() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
