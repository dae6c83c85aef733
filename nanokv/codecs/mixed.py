"""MixedCodec: a few layers unquantized, the others in a codec. First and last layers are the usual choice."""

from __future__ import annotations

from nanokv.codecs.kivi import KiviCodec
from nanokv.codecs.paired import PairedCodec
from nanokv.codecs.raw import RawCodec


class MixedCodec:
    """Knows the codec of each layer, and no pages: layers ask it once, when a model is built.

    codec         of most layers
    raw           of the layers `unquantized`
    """

    def __init__(self, codec: PairedCodec | KiviCodec, raw: RawCodec, unquantized: frozenset[int]) -> None:
        self.name = codec.name
        self.dtype = codec.dtype
        self._codec, self._raw, self._unquantized = codec, raw, unquantized

    def at(self, layer: int) -> PairedCodec | KiviCodec | RawCodec:
        """The codec of a layer."""
        return self._raw if layer in self._unquantized else self._codec
