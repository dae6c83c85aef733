"""Overload: says in one line when other programs take the processors that an answer needs.

The measure is the time that threads of this process were ready to run and waited for a processor, which Linux counts
for each thread. A thread that waits for another one, in a loop or asleep, is not counted as waiting.
Source: Documentation/scheduler/sched-stats.rst of the Linux kernel.
"""

from __future__ import annotations

from glob import glob

BEGINS, ENDS = 0.2, 0.1
"""Shares of the processors' time that others take: from BEGINS a machine is overloaded, below ENDS no longer."""
LEAST_S = 0.2
"""Seconds that the threads must have run, together, for a share that is more than noise."""


Times = dict[str, tuple[int, int]]


def thread_times(root: str = "") -> Times:
    """The nanoseconds that each thread of this process has run, and those that it waited for a processor; empty where
    the system does not tell.

    root   a folder in front of /proc: tests have their own
    """
    found = {}
    for path in glob(f"{root}/proc/self/task/*/schedstat"):
        try:
            with open(path, encoding="ascii") as file:
                numbers = file.read().split()
        except OSError:  # the thread has ended
            continue
        found[path] = int(numbers[0]), int(numbers[1])
    return found


def since(before: Times, now: Times) -> tuple[float, float]:
    """Seconds that threads have run, and waited, of those that are alive now."""
    own = [(times, before.get(path, (0, 0))) for path, times in now.items()]
    ran, waited = (sum(times[n] - earlier[n] for times, earlier in own) / 1e9 for n in range(2))
    return ran, waited


class Overload:
    """Measures each answer of a chat. Threads beyond the processors would wait for each other: then it is silent."""

    def __init__(self, threads: int, processors: int, root: str = "") -> None:
        self._root, self._is_silent = root, threads > processors
        self._is_overloaded = False
        self._before: Times = {}

    def begin(self) -> None:
        """Begins an answer."""
        self._before = thread_times(self._root)

    def line(self) -> str:
        """Ends an answer. The line for the first one of an overload; empty for all others."""
        ran, waited = since(self._before, thread_times(self._root))
        if self._is_silent or ran < LEAST_S:
            return ""
        share, was_overloaded = waited / (ran + waited), self._is_overloaded
        self._is_overloaded = share >= (ENDS if was_overloaded else BEGINS)
        if not self._is_overloaded or was_overloaded:
            return ""
        return f"other programs take about {100 * share:.0f} % of the processors' time: answers are slower"
