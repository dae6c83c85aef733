"""RequestMetrics: the times of one sample."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RequestMetrics:
    """Times of one sample, in seconds of time.perf_counter(); None before the event."""

    arrival: float
    first_scheduled: float | None = None
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float | None:
        """Time to first token: arrival to the first token, queueing included."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def latency(self) -> float | None:
        """Arrival to the last token so far."""
        return self.token_times[-1] - self.arrival if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (latency - ttft) / (tokens - 1)."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)
