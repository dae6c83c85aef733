"""The event log: one JSONL record for each thing that happens to a page or a request.

Readers: the inspector, lessons, tests. A record is {"t": seconds since the log began, "step": n, "event": name, ...}.
Events: request, match, alloc, share, copy, publish, evict, free, preempt, step, finish.
"""

from __future__ import annotations

import json
import time


class EventLog:
    """Writes records to a file, or nowhere when `path` is None (then `on` is False and callers skip the work)."""

    VERSION = 1

    def __init__(self, path: str | None) -> None:
        self.on = path is not None
        self.step = 0
        self._start = time.perf_counter()
        self._file = open(path, "w", encoding="utf-8", buffering=1) if path is not None else None  # noqa: SIM115
        if self.on:
            self.write("open", version=self.VERSION)

    def write(self, event: str, **data) -> None:
        if self._file is None:
            return
        record = {"t": round(time.perf_counter() - self._start, 6), "step": self.step, "event": event, **data}
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.on = False
