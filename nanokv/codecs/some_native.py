"""SomeNative: another codec for most layers, the raw one for a few. First and last layers are the usual choice."""

from __future__ import annotations

from nanokv.codecs.kivi import KiviCodec
from nanokv.codecs.paired import PairedCodec
from nanokv.codecs.raw import RawCodec


class SomeNative:
    """Answers only which codec a layer has; layers ask it once, when a model is built."""

    def __init__(self, codec: PairedCodec | KiviCodec, raw: RawCodec, native: frozenset[int]) -> None:
        self.name = codec.name
        self.dtype = codec.dtype
        self._codec, self._raw, self._native = codec, raw, native

    def at(self, layer: int) -> PairedCodec | KiviCodec | RawCodec:
        return self._raw if layer in self._native else self._codec
