"""How the numbers of a page are written: a codec names its planes and tells the kernels where they lie."""

from __future__ import annotations

import torch

from nanokv.codecs.raw import RawCodec
from nanokv.core.errors import ConfigError

_CODECS = {"raw": RawCodec}


def resolve_codec(name: str, dtype: torch.dtype) -> RawCodec:
    """The codec called `name` over numbers of `dtype`. Raises ConfigError that lists the names there are."""
    if name not in _CODECS:
        raise ConfigError(f"codec={name!r}: allowed are {', '.join(sorted(_CODECS))}")
    return _CODECS[name](dtype)


__all__ = ["RawCodec", "resolve_codec"]
