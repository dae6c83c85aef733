"""DisaggConfig: how prompts are computed in other processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nanokv.core.arguments import refuses_unknown
from nanokv.core.check import check_integer
from nanokv.core.errors import ConfigError

SHORTEST_S, LONGEST_S = 0.1, 600.0
"""The bounds of heartbeat_s, in seconds; the other process holds a HELLO to them as well."""


@refuses_unknown(ConfigError)
@dataclass(frozen=True)
class DisaggConfig:
    """The choices of a user. Raises ConfigError, naming the field, its value and what is allowed."""

    prefill_workers: int | None = None
    """Prefill processes to start on this host. None: one, or none where `connect` names some."""
    connect: str | tuple[str, ...] = ()
    """HOST:PORT of prefill processes on other hosts (`nanokv disagg prefill --listen HOST:PORT`)."""
    secret_file: str | os.PathLike[str] | None = None
    """Path of the secret that this host and those of `connect` share (`nanokv disagg prefill --secret-file FILE`):
    each proves to the other that it knows it."""
    min_tokens: int = 64
    """Prompts with fewer uncached tokens are computed here. The formula: decode step seconds x prefill tokens/s. That
    many tokens double the time of one decode step, and a transfer costs about a step as well. `nanokv bench disagg`
    measures it (`break_even_tokens`)."""
    heartbeat_s: float = 10.0
    """Seconds of silence after which a worker with open attempts is killed. It sends PING between layers; HELLO tells
    it this value. Between hosts pages that stand still for so long end the connection as well."""
    worker_cores: tuple[int, ...] | None = None
    """CPU cores for the prefill processes of this host; None: all that this process may use."""

    def __post_init__(self) -> None:
        if not isinstance(self.connect, (str, tuple, list)):
            raise ConfigError(f"connect={self.connect!r}: expected HOST:PORT, or a tuple of them")
        addresses = (self.connect,) if isinstance(self.connect, str) else tuple(self.connect)
        object.__setattr__(self, "connect", addresses)
        if self.prefill_workers is None:
            object.__setattr__(self, "prefill_workers", 0 if addresses else 1)
        for name, least in (("prefill_workers", 0), ("min_tokens", 1)):
            check_integer(ConfigError, name, getattr(self, name), least)
        if not addresses and not self.prefill_workers:
            raise ConfigError("prefill_workers=0: expected at least 1, or addresses in connect")
        for address in addresses:
            split_address(address)
        if self.secret_file is not None:
            if not isinstance(self.secret_file, (str, os.PathLike)):
                raise ConfigError(f"secret_file={self.secret_file!r}: expected a path")
            if not addresses:
                raise ConfigError(
                    f"secret_file={str(self.secret_file)!r}: only prefill processes in connect ask for it"
                )
        seconds = self.heartbeat_s
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not is_heartbeat(seconds):
            raise ConfigError(f"heartbeat_s={seconds!r}: expected seconds, {SHORTEST_S:g} to {LONGEST_S:g}")
        if self.worker_cores is not None:
            cores, count = self.worker_cores, os.cpu_count() or 1
            are_cores = isinstance(cores, (tuple, list)) and all(core in range(count) for core in cores)
            if not are_cores or not cores or any(not isinstance(core, int) or isinstance(core, bool) for core in cores):
                raise ConfigError(f"worker_cores={cores!r}: expected a tuple of cores from 0 to {count - 1}, or None")
            object.__setattr__(self, "worker_cores", tuple(cores))


def is_heartbeat(seconds: float) -> bool:
    """Whether seconds of silence are within the bounds; false for NaN."""
    return SHORTEST_S <= seconds <= LONGEST_S


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises ConfigError for another form."""
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"address {address!r}: expected HOST:PORT, such as 10.0.0.2:7000")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """The inverse: "HOST:PORT", "[HOST]:PORT" for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
