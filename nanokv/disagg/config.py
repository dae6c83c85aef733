"""DisaggConfig: how prompts are computed in other processes. Validated like EngineConfig."""

from __future__ import annotations

from dataclasses import dataclass

from nanokv.core.errors import ConfigError

LONGEST_S = 86400.0
"""Seconds of a heartbeat at most: a day."""


@dataclass(frozen=True)
class DisaggConfig:
    """What a user chooses. Raises ConfigError naming the field, its value and what is allowed."""

    prefill_workers: int = 1
    """Prefill processes to start on this host; 0 where all of them are reached by `connect`."""
    connect: str | tuple[str, ...] = ()
    """HOST:PORT of prefill processes on other hosts (`nanokv disagg prefill --listen HOST:PORT`). An address alone
    starts none here."""
    min_tokens: int = 64
    """Prompts with fewer uncached tokens are computed here. The formula: decode step seconds x prefill tokens/s. That
    many tokens lengthen one decode step to twice its time, and handing them over would cost about a step as well;
    `nanokv bench disagg` measures it (`break_even_tokens`)."""
    heartbeat_s: float = 10.0
    """A worker that holds pages and says nothing for so long is killed. It speaks between any two layers. HELLO tells
    it, so it is said here only; between hosts a transfer that makes no progress for so long fails, too."""
    worker_cores: tuple[int, ...] | None = None
    """CPU cores that the prefill processes of this host run on; None: all that this process may use."""

    def __post_init__(self) -> None:
        addresses = (self.connect,) if isinstance(self.connect, str) else tuple(self.connect)
        object.__setattr__(self, "connect", addresses)
        if addresses and self.prefill_workers == 1:
            object.__setattr__(self, "prefill_workers", 0)
        for name, least in (("prefill_workers", 0), ("min_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: expected an integer of at least {least}")
        if not addresses and not self.prefill_workers:
            raise ConfigError("prefill_workers=0: expected at least 1, or addresses in connect")
        for address in addresses:
            split_address(address)
        seconds = self.heartbeat_s
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= LONGEST_S:
            raise ConfigError(f"heartbeat_s={seconds!r}: expected seconds, more than 0, at most {LONGEST_S:g}")
        if self.worker_cores is not None and not self.worker_cores:
            raise ConfigError("worker_cores=(): expected at least one core, or None")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises ConfigError."""
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"address {address!r}: expected HOST:PORT, such as 10.0.0.2:7000")
    return host.strip("[]"), int(port)
