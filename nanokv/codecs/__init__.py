"""How the numbers of a page are written: a codec names its planes, and writes and reads them for a layer.

A name stands for two sides, keys and values; "K/V" chooses them one by one:

    raw                  the model's own numbers
    fp8, int8, int4      one code a number, one scale a vector
    rot4                 int4 after a random rotation
    tq2, tq3, tq4        TurboQuant_mse: a rotation, then the best table for what it makes of numbers
    tqp2, tqp3, tqp4     TurboQuant_prod for keys, with TurboQuant_mse for values; -orth with an orthogonal sketch
    polar                PolarQuant: a rotation, then radii and angles
    qjl                  the signs of a sketch for keys, with int4 for values
    kivi2, kivi4         KIVI, keys and values together: a page is written when it is full
"""

from __future__ import annotations

import re

import torch

from nanokv.codecs import tables
from nanokv.codecs.kivi import KiviCodec
from nanokv.codecs.paired import PairedCodec
from nanokv.codecs.papers.polarquant import PolarSide
from nanokv.codecs.papers.qjl import QJLSide
from nanokv.codecs.papers.turboquant_prod import ProdSide
from nanokv.codecs.raw import RawCodec
from nanokv.codecs.side import RawSide, Side, TableSide
from nanokv.codecs.some_native import SomeNative
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError

Codec = RawCodec | PairedCodec | KiviCodec | SomeNative


def _lloyd_max(bits: int):
    return lambda dim: tables.lloyd_max(bits, dim)


_SIDES: dict[str, Side] = {
    side.name: side
    for side in (
        TableSide("fp8", 8, lambda dim: tables.e4m3(), "absmax", rotated=False),
        TableSide("int8", 8, lambda dim: tables.int8(), "absmax", rotated=False),
        TableSide("int4", 4, lambda dim: tables.uniform(4), "absmax", rotated=False),
        TableSide("rot4", 4, lambda dim: tables.uniform(4), "absmax", rotated=True),
        *(TableSide(f"tq{bits}", bits, _lloyd_max(bits), "length", rotated=True) for bits in (2, 3, 4)),
        *(ProdSide(f"tqp{bits}", bits, orthogonal=False) for bits in (2, 3, 4)),
        *(ProdSide(f"tqp{bits}-orth", bits, orthogonal=True) for bits in (2, 3, 4)),
        PolarSide("polar"),
        QJLSide("qjl"),
    )
}
_VALUES = {"qjl": "int4"} | {f"tqp{bits}{end}": f"tq{bits}" for bits in (2, 3, 4) for end in ("", "-orth")}
"""Names that mean another side for values than for keys."""
NAMES = ("raw", *_SIDES, "kivi2", "kivi4")


def value_side(name: str) -> str:
    """The side of values where this name stands alone for both."""
    return _VALUES.get(name, name)


def resolve_codec(
    name: str,
    dtype: torch.dtype,
    exact: bool = True,
    native_layers: str = "",
    layers: list[int] | None = None,
) -> Codec:
    """The codec called `name`, or "K/V", over numbers of `dtype`.

    exact           prefill reads its own chunk through the codes, see pages.py
    native_layers   "first2,last2": these of `layers` stay raw
    layers          indices of the layers with attention
    Raises          ConfigError that lists the names there are
    """
    if name == "raw":
        return RawCodec(dtype)
    if name in ("kivi2", "kivi4"):
        codec = KiviCodec(name, int(name[-1]), dtype, exact)
    else:
        codec = _paired(name, dtype, exact)
    native = parse_native_layers(native_layers, layers or [])
    return SomeNative(codec, RawCodec(dtype), native) if native else codec


def codec_of(config: EngineConfig, dtype: torch.dtype, layers: list[int]) -> Codec:
    """The codec that a configuration asks for, in a model whose layers with attention are `layers`."""
    return resolve_codec(config.codec, dtype, config.prefill == "exact", config.native_layers, layers)


def _paired(name: str, dtype: torch.dtype, exact: bool) -> PairedCodec:
    k, slash, v = name.partition("/")
    v = v if slash else value_side(k)
    sides = {"raw": RawSide(dtype), **_SIDES}
    if k not in sides or v not in sides:
        raise ConfigError(f"codec={name!r}: allowed are {', '.join(NAMES)}, or two of them as K/V (but kivi)")
    if sides[v].is_sketch:
        raise ConfigError(f"codec={name!r}: {v} keeps products with keys only, no values; allowed as qjl/V")
    return PairedCodec(name, sides[k], sides[v], dtype, exact)


def parse_native_layers(text: str, layers: list[int]) -> frozenset[int]:
    """ "first2,last2" as indices of layers. Raises ConfigError."""
    native: set[int] = set()
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(first|last)([1-9]\d*)\s*", part)
        if match is None:
            raise ConfigError(f"native_layers={text!r}: expected such as 'first2,last2'")
        count = int(match[2])
        if count > len(layers):
            raise ConfigError(f"native_layers={text!r}: this model has {len(layers)} layers with attention")
        native.update(layers[:count] if match[1] == "first" else layers[-count:])
    return frozenset(native)


__all__ = ["NAMES", "Codec", "RawCodec", "codec_of", "parse_native_layers", "resolve_codec", "value_side"]
