"""Tally: what a soak has counted, and the violations that it has found."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path


class Tally(Counter[str]):
    """Counts by name. `violation` prints at once, so that a soak that is stopped has shown what it found.

    seconds   of the soak
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.violations: list[str] = []
        self._begin = self._shown = time.monotonic()
        self._seconds = seconds

    def violation(self, text: str) -> None:
        """Notes and prints a violation."""
        self.violations.append(text)
        print(f"VIOLATION {text}", flush=True)

    @property
    def is_over(self) -> bool:
        """Whether the time is over, or too much is wrong to go on. Prints a line every half minute."""
        now = time.monotonic()
        if now - self._shown > 30:
            self._shown = now
            print(self, flush=True)
        return now - self._begin > self._seconds or len(self.violations) > 20

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in sorted(self.items()))
        return f"{time.monotonic() - self._begin:.0f} s: {counts}; {resources()}"

    def report(self) -> None:
        """Prints the counts. Exits with 1 where there was a violation."""
        print(f"{self}; {len(self.violations)} violations", flush=True)
        if self.violations:
            raise SystemExit(1)


def resources() -> str:
    """Resident memory and open descriptors of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory, descriptors = pages * os.sysconf("SC_PAGE_SIZE") >> 20, len(os.listdir("/proc/self/fd"))
    return f"RSS {memory} MiB, {descriptors} descriptors"
