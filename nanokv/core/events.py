"""The event log: one JSONL record for each thing that happens to a page or a request.

Readers: the inspector, lessons, tests. A record is {"t": seconds since the log began, "step": n, "event": name, ...}.
Events: request, match, alloc, share, copy, publish, evict, free, preempt, step, finish.
"""

from __future__ import annotations

import json
import logging
import time

from nanokv.core.errors import ConfigError

logger = logging.getLogger("nanokv")


class EventLog:
    """Writes records to a file, or nowhere when `path` is None (then `on` is False and callers skip the work).

    A disk that fills switches the log off with one warning: what is logged must not suffer from the logging.
    Raises ConfigError when the file cannot be opened.
    """

    VERSION = 1

    def __init__(self, path: str | None) -> None:
        self.step = 0
        self._start = time.perf_counter()
        try:
            self._file = None if path is None else open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"event_log={path!r}: {error.strerror or error}") from None
        self.write("open", version=self.VERSION)

    @property
    def on(self) -> bool:
        return self._file is not None

    def write(self, event: str, **data) -> None:
        if self._file is None:
            return
        record = {"t": round(time.perf_counter() - self._start, 6), "step": self.step, "event": event, **data}
        try:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        except OSError as error:
            logger.warning("the event log ends here: %s", error)
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
