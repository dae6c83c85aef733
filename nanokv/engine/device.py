"""The device and the dtype of an engine, from the names that the user gives.

A GPU is supported when torch was built with CUDA and finds it, its compute capability is 8.0 or newer, and triton can
be imported and can compile and run a kernel on it. "auto" chooses a supported GPU, else the CPU, and never fails. A
device that the user names must work: else a ConfigError says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from nanokv.core.errors import ConfigError
from nanokv.models.config import ModelConfig

LEAST_CAPABILITY = (8, 0)
"""Oldest compute capability that is supported."""
ALLOWED = "allowed are auto, cpu, cuda, cuda:N"
"""The end of an error about a device name."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Name -> torch dtype, of all dtypes that weights and activations may have."""
Obstacle = Callable[[int], str | None]
"""Number of a GPU -> in a few words the reason why the engine cannot use it, or None."""


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one inside a `with` block: streams, events and graphs are those of the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Choice:
    """A device and, in a few words, the reason for it."""

    device: torch.device
    reason: str


def cuda_obstacle(index: int) -> str | None:
    """The Obstacle that asks torch, triton and the card."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if index >= torch.cuda.device_count():
        return f"torch sees {torch.cuda.device_count()} CUDA devices, numbered from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name(index)} has compute capability {found}; {least} or newer is needed"
    return _triton_obstacle(torch.device("cuda", index))


def _triton_obstacle(device: torch.device) -> str | None:
    try:
        from nanokv.engine.check_triton import adds
    except ImportError as error:
        return f"triton cannot be imported ({_line(error)})"
    try:
        return None if adds(device) else "triton compiles kernels that compute wrong numbers"
    except Exception as error:  # no compiler, no driver library, a version that does not fit: all the same here
        return f"triton cannot compile a kernel ({_line(error)})"


def choose_device(name: str, obstacle: Obstacle = cuda_obstacle) -> Choice:
    """The device of a name: "auto", "cpu", "cuda" or "cuda:N".

    Raises   ConfigError for a name that is not allowed, and for a GPU that cannot be used; never for "auto"
    """
    if name == "auto":
        try:
            hindrance = obstacle(0)
        except Exception as error:  # a broken driver must not keep the engine from the CPU
            hindrance = f"CUDA does not work ({_line(error)})"
        return _cuda(0, "it is there and supported") if hindrance is None else Choice(torch.device("cpu"), hindrance)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r}: {ALLOWED}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}: {ALLOWED}")
    if device.type == "cpu":
        return Choice(device, "as asked")
    hindrance = obstacle(device.index or 0)
    if hindrance is not None:
        raise ConfigError(f"device={name!r}: {hindrance}; use cpu, or auto")
    return _cuda(device.index or 0, "as asked")


def resolve_dtype(name: str, model: ModelConfig) -> torch.dtype:
    """The torch dtype of a name; "auto" is the checkpoint's. Raises ConfigError for a name that is not allowed."""
    chosen = (model.dtype or "float32") if name == "auto" else name
    if chosen not in DTYPES:
        raise ConfigError(f"dtype={chosen!r}: allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[chosen]


def _cuda(index: int, reason: str) -> Choice:
    return Choice(torch.device("cuda", index), reason)


def _line(error: Exception) -> str:
    """The first line of an error, shortened."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
