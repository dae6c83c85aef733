"""nanokv: an LLM inference engine small enough to read, whose subject is the KV cache.

from nanokv import LLM, AsyncLLM, EngineConfig, SamplingParams
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanokv.core.spin import bound_spins

if TYPE_CHECKING:
    from nanokv.async_llm import AsyncLLM
    from nanokv.core.config import EngineConfig
    from nanokv.core.errors import NanokvError
    from nanokv.core.request import RequestOutput, SamplingParams
    from nanokv.disagg.config import DisaggConfig
    from nanokv.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM", "AsyncLLM", "DisaggConfig", "EngineConfig", "NanokvError", "RequestOutput", "SamplingParams", "__version__",
]  # fmt: skip

_HOMES = {
    "LLM": "nanokv.llm",
    "AsyncLLM": "nanokv.async_llm",
    "DisaggConfig": "nanokv.disagg.config",
    "EngineConfig": "nanokv.core.config",
    "NanokvError": "nanokv.core.errors",
    "RequestOutput": "nanokv.core.request",
    "SamplingParams": "nanokv.core.request",
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used: `nanokv --help` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nanokv' has no attribute {name!r}")
    if name in ("LLM", "AsyncLLM"):
        bound_spins()  # before they import torch
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
