"""The event log: each event as one line of JSON in a file.

A record is {"t": seconds since the log began, "step": n, "event": name, ...the fields of the event}; a field that is
None is left out. core/events.py lists the events. The first record is {"event": "open", "version": VERSION}.
"""

from __future__ import annotations

import json
import time
from dataclasses import fields

from nanokv.core.errors import ConfigError
from nanokv.core.events import Event, StepLaunched

VERSION = 2
"""Version of the log. Version 1 named the event "transfer" "hand_over"."""


class EventLog:
    """A subscriber of Events that writes a file, emptied first.

    path     of the file
    Raises   ConfigError when the file cannot be opened. A call raises OSError on a full disk; `Events` then removes the
             log with a warning, and requests go on
    """

    def __init__(self, path: str) -> None:
        self._step = 0
        self._start = time.perf_counter()
        try:
            self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"event_log={path!r}: {error.strerror or error}") from None
        self._write("open", {"version": VERSION})

    def __call__(self, event: Event) -> None:
        values = {field.name: getattr(event, field.name) for field in fields(event)}
        if isinstance(event, StepLaunched):
            self._step = values.pop("number")
        self._write(event.name, {name: value for name, value in values.items() if value is not None})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, name: str, values: dict[str, object]) -> None:
        record = {"t": round(time.perf_counter() - self._start, 6), "step": self._step, "event": name, **values}
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
