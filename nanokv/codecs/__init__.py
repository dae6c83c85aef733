"""How the numbers of a page are written: a codec names its planes, and writes and reads them for a layer.

A name means a quantizer for keys and one for values; "K/V" chooses them one by one:

    raw                  the model's own numbers
    fp8, int8, int4      one code a number, one scale a vector
    rot4                 int4 after a random rotation
    tq2, tq3, tq4        TurboQuant_mse: a rotation, then the best table for rotated numbers
    tqp2, tqp3, tqp4     TurboQuant_prod for keys, with TurboQuant_mse for values; -orth with an orthogonal sketch
    polar                PolarQuant: a rotation, then radii and angles
    qjl                  the signs of a sketch for keys, with int4 for values
    kivi2, kivi4         KIVI, keys and values together: a page is written when it is full
"""

from __future__ import annotations

import re
from functools import partial

import torch

from nanokv.codecs import tables
from nanokv.codecs.kivi import KiviCodec
from nanokv.codecs.mixed import MixedCodec
from nanokv.codecs.paired import PairedCodec
from nanokv.codecs.papers.polarquant import PolarQuantizer
from nanokv.codecs.papers.qjl import QJLQuantizer
from nanokv.codecs.papers.turboquant_prod import ProdQuantizer
from nanokv.codecs.quantizer import Quantizer, RawQuantizer, TableQuantizer
from nanokv.codecs.raw import RawCodec
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError

LatentCodec = RawCodec | PairedCodec
"""A codec that writes the latents of multi-head latent attention."""
LayerCodec = LatentCodec | KiviCodec
"""The codec of one layer, as `Codec.at` gives it."""
Codec = LayerCodec | MixedCodec


_ALL: tuple[Quantizer, ...] = (
    TableQuantizer("fp8", 8, lambda dim: tables.e4m3(), "absmax", rotated=False),
    TableQuantizer("int8", 8, lambda dim: tables.int8(), "absmax", rotated=False),
    TableQuantizer("int4", 4, lambda dim: tables.uniform(4), "absmax", rotated=False),
    TableQuantizer("rot4", 4, lambda dim: tables.uniform(4), "absmax", rotated=True),
    *(TableQuantizer(f"tq{bits}", bits, partial(tables.lloyd_max, bits), "length", rotated=True) for bits in (2, 3, 4)),
    *(ProdQuantizer(f"tqp{bits}", bits, orthogonal=False) for bits in (2, 3, 4)),
    *(ProdQuantizer(f"tqp{bits}-orth", bits, orthogonal=True) for bits in (2, 3, 4)),
    PolarQuantizer("polar"),
    QJLQuantizer("qjl"),
)
_QUANTIZERS = {quantizer.name: quantizer for quantizer in _ALL}
_VALUES = {"qjl": "int4"} | {f"tqp{bits}{end}": f"tq{bits}" for bits in (2, 3, 4) for end in ("", "-orth")}
"""Names that mean another quantizer for values than for keys."""
NAMES = ("raw", *_QUANTIZERS, "kivi2", "kivi4")


def value_quantizer(name: str) -> str:
    """The name of the quantizer of values in the codec called `name`, which is no "K/V"."""
    return _VALUES.get(name, name)


def resolve_codec(
    name: str, dtype: torch.dtype, exact: bool = True, native_layers: str = "", layers: list[int] | None = None
) -> Codec:
    """The codec called `name`, or "K/V", over numbers of `dtype`.

    exact           prefill reads its own chunk through the codes, see pages.py
    native_layers   "first2,last2": these of `layers` stay unquantized
    layers          indices of the layers with attention
    Raises          ConfigError that lists the allowed names
    """
    unquantized = _parse_layers(native_layers, layers or [])
    if name == "raw":
        return RawCodec(dtype)
    if name in ("kivi2", "kivi4"):
        codec: PairedCodec | KiviCodec = KiviCodec(name, int(name[-1]), dtype, exact)
    else:
        codec = _paired(name, dtype, exact)
    return MixedCodec(codec, RawCodec(dtype), unquantized) if unquantized else codec


def codec_of(config: EngineConfig, dtype: torch.dtype, layers: list[int]) -> Codec:
    """The codec of a configuration, in a model whose layers with attention are `layers`."""
    return resolve_codec(config.codec, dtype, config.prefill == "exact", config.native_layers, layers)


def _paired(name: str, dtype: torch.dtype, exact: bool) -> PairedCodec:
    k, slash, v = name.partition("/")
    v = v if slash else value_quantizer(k)
    known = {"raw": RawQuantizer(dtype), **_QUANTIZERS}
    if k not in known or v not in known:
        raise ConfigError(f"codec={name!r}: allowed are {', '.join(NAMES)}, or two of them as K/V (but kivi)")
    if known[v].is_sketch:
        raise ConfigError(f"codec={name!r}: {v} keeps products with keys only, no values; allowed as qjl/V")
    return PairedCodec(name, known[k], known[v], dtype, exact)


def _parse_layers(text: str, layers: list[int]) -> frozenset[int]:
    """The unquantized ones of `layers`, from a text such as "first2,last2". Raises ConfigError."""
    found: set[int] = set()
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(first|last)([1-9]\d*)\s*", part)
        if match is None:
            raise ConfigError(f"native_layers={text!r}: expected such as 'first2,last2'")
        count = int(match[2])
        if count > len(layers):
            raise ConfigError(f"native_layers={text!r}: this model has {len(layers)} layers with attention")
        found.update(layers[:count] if match[1] == "first" else layers[-count:])
    return frozenset(found)
