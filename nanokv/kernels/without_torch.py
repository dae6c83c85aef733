"""The process that compiles CPU kernels ahead. It imports them without torch, which takes longer than numba."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any


class _Torch(ModuleType):
    """Stands in for torch. The modules of the kernels name dtypes and functions of torch when they are imported; what
    calls those functions is not compiled and does not run here."""

    def __getattr__(self, name: str) -> _Torch:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Torch(name))
        return getattr(self, name)

    def __call__(self, *args: Any, **named: Any) -> _Torch:
        return self


def compile_ahead(order: dict[str, Any]) -> None:
    """Compiles what nanokv.kernels.ahead orders, and ends when its standard input does."""
    Thread(target=_end_with_parent, daemon=True).start()
    sys.modules["torch"] = _Torch("torch")
    from nanokv.kernels.cpu import ahead

    ahead.compile_kernels(ahead.kernels(order["dtype"], order["is_raw"], order["is_latent"]))
    done = Path(order["done"])
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)
