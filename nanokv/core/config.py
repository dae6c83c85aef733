"""EngineConfig: every option of an engine, with its meaning and its default.

Syntax is checked here, on construction. Names that other packages define (a codec, a device) are resolved when the
engine is built: this package knows none of them.
"""

from __future__ import annotations

import re
from dataclasses import InitVar, dataclass
from typing import cast

from nanokv.core.arguments import refuses_unknown
from nanokv.core.check import check_integer
from nanokv.core.errors import ConfigError

_UNITS = {"": 1} | {
    letter + suffix: base**power for power, letter in enumerate("kmgt", 1) for suffix, base in (("", 1000), ("i", 1024))
}
_PAGE_SIZES = {"kivi2": 32, "kivi4": 32}
"""The default page_size of codecs that make a group of a page; that of all others is 16."""
_SCHEDULES = ("fcfs", "longest-prefix")
_LOADS = ("auto", "dummy")
_PREFILLS = ("exact", "fast")
KERNELS = ("auto", "reference")
MOST_THREADS = 1024
WEIGHTS = ("auto", "q8")


def parse_bytes(value: int | str, field: str = "size") -> int:
    """Bytes from an integer or a text such as "512MiB", "4GB", "1TiB", "1073741824".

    field    names the value in the error
    Raises   ConfigError unless it is more than 0 bytes
    """
    if isinstance(value, bool | float):
        raise ConfigError(f"{field}={value!r}: expected bytes or a text such as '512MiB'")
    if isinstance(value, int):
        number = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
        if match is None:
            raise ConfigError(f"{field}={value!r}: expected bytes or a text such as '512MiB'")
        number = int(float(match[1]) * _UNITS[match[2] or ""])
    if number <= 0:
        raise ConfigError(f"{field}={value!r}: must be more than 0 bytes")
    return number


@refuses_unknown(ConfigError)
@dataclass(frozen=True)
class EngineConfig:
    """The options of an engine. Raises ConfigError naming the field, its value and the allowed values."""

    device: str = "auto"
    """Where the model runs: "auto", "cpu", "cuda" or "cuda:N"."""
    dtype: str = "auto"
    """Weights and activations: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"."""
    weights: str = "auto"
    """How a CPU holds matrices: "auto" (in dtype), or "q8": rounded to 8 bits a number, with a scale for each 32. A
    decode then reads about half as many bytes as in bfloat16."""
    codec: str = "raw"
    """The codec that writes keys and values into pages: a name, or "K/V" for two; "raw" keeps the model's dtype."""
    native_layers: str = ""
    """Layers whose pages stay unquantized, counted among those with attention: "first2,last2"."""
    prefill: str = "exact"
    """"exact": a prompt reads its own keys and values through the codec, so that results do not depend on chunks and
    prefix hits; "fast": a prompt reads the keys and values of its own step unquantized. Equal for the raw codec."""
    center_keys: bool = False
    """Subtract the mean of each layer's keys, measured before the first request, from the keys that a codec writes."""
    page_size: int = cast(int, None)
    """Tokens in a page, the unit of allocation, sharing and eviction. None: 16, or 32 for codecs kivi2 and kivi4."""
    kv_memory: int | str | None = None
    """Bytes for pages and states ("512MiB"). Default on a CPU: a quarter of free memory, 4 GiB at most; on a GPU:
    gpu_memory_fraction decides."""
    gpu_memory_fraction: float = 0.9
    """Share of a GPU's memory that this process may fill: weights, the largest step, and the rest for pages."""
    num_pages: int | None = None
    """Pages in the pool, instead of kv_memory."""
    num_states: int | None = None
    """States of recurrent layers in the pool, two for each running request. Default: as many bytes as pages take."""
    state_interval: int | None = None
    """Tokens between further checkpoints of recurrent states, a multiple of page_size; None: no further ones."""
    prefix_cache: bool = True
    """Keep finished pages and reuse them for requests that begin with the same tokens."""
    max_step_tokens: int = 2048
    """Token budget of one step, prefill chunks and decodes together (vLLM: max_num_batched_tokens)."""
    max_requests: int = 64
    """Requests that run at once; others wait (vLLM: max_num_seqs)."""
    max_model_len: int | None = None
    """Tokens a request may reach, prompt and answer together. Default: the longest context of the model."""
    overlap: bool | None = None
    """Plan the next step while the device computes this one. Default: on for a GPU, off for a CPU, where execution is
    synchronous."""
    graphs: bool | None = None
    """Run decode steps of a few fixed sizes from static buffers, on a GPU as CUDA graphs. Default: on for a GPU; a CPU
    records the kernel calls of each size and replays them, without padding. False: neither. Codecs that are decoded
    into pages made for one step cannot be recorded, and run without."""
    schedule: str = "fcfs"
    """Order of waiting requests: "fcfs", or "longest-prefix" (longest cached prefix first, with ageing)."""
    seed: int = 0
    """Seed of the requests without one."""
    event_log: str | None = None
    """Path of a JSONL file that receives a record of each event of a page or a request (core/events.py)."""
    debug_checks: bool = False
    """Audit the cache whenever the engine is idle (CacheManager.check)."""
    load: str = "auto"
    """"auto" reads the checkpoint; "dummy" fills the model with seeded random weights (benchmarks)."""

    kernels: str = "auto"
    """"auto": compiled kernels for the device (numba, Triton); "reference": the readable torch ones on any device, to
    step through with a debugger. Much slower; float32 tokens are the same, except where two logits almost tie."""
    threads: int | None = None
    """Threads that compute on a CPU, of torch and of the compiled kernels. Torch has one number for the whole process:
    the engine built last decides. Default: OMP_NUM_THREADS, else at most the processors that the process may use
    (affinity, quota of its container)."""
    unquantized_layers: InitVar[str] = ""
    """An alias of native_layers, in which its value is kept."""

    def __post_init__(self, unquantized_layers: str) -> None:
        if not isinstance(unquantized_layers, str):
            raise ConfigError(f"unquantized_layers={unquantized_layers!r}: expected such as 'first2,last2'")
        if unquantized_layers:
            if self.native_layers:
                raise ConfigError("native_layers and unquantized_layers are the same option: give one of them")
            object.__setattr__(self, "native_layers", unquantized_layers)
        if self.page_size is None:
            object.__setattr__(self, "page_size", _PAGE_SIZES.get(str(self.codec), 16))
        self._integers(page_size=1, max_step_tokens=1, max_requests=1)
        self._integers(optional=True, num_pages=1, num_states=2, state_interval=1, max_model_len=2, threads=1)
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ConfigError(f"threads={self.threads}: at most {MOST_THREADS}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r}: expected an integer")
        if self.page_size & (self.page_size - 1) or self.page_size > 64:
            raise ConfigError(f"page_size={self.page_size}: allowed are 1, 2, 4, 8, 16, 32, 64")
        if self.state_interval is not None and self.state_interval % self.page_size:
            raise ConfigError(
                f"state_interval={self.state_interval}: expected a multiple of page_size={self.page_size}"
            )
        if self.kv_memory is not None:
            parse_bytes(self.kv_memory, "kv_memory")
            if self.num_pages is not None:
                raise ConfigError("kv_memory and num_pages both size the pool: give one of them")
        choices = {"schedule": _SCHEDULES, "load": _LOADS, "prefill": _PREFILLS, "kernels": KERNELS, "weights": WEIGHTS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if not isinstance(self.native_layers, str):
            raise ConfigError(f"native_layers={self.native_layers!r}: expected such as 'first2,last2'")
        if self.event_log is not None and not isinstance(self.event_log, str):
            raise ConfigError(f"event_log={self.event_log!r}: expected a path as text")
        for name in ("device", "dtype", "codec"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a name")
        for name in ("prefix_cache", "center_keys", "debug_checks"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected True or False")
        for name in ("overlap", "graphs"):
            if getattr(self, name) not in (None, True, False):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected True, False or None")
        fraction = self.gpu_memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ConfigError(f"gpu_memory_fraction={fraction!r}: expected a number of more than 0, at most 1")

    def _integers(self, optional: bool = False, **least: int) -> None:
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None or not optional:
                check_integer(ConfigError, name, value, minimum)
