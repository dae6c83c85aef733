"""Detokenizer: takes token ids one by one, gives text as soon as its characters are complete."""

from __future__ import annotations

import codecs

from nanokv.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of a growing list of tokens, at a constant cost per token.

    The deltas and the flush add up to tokenizer.decode(ids), bytes that are no UTF-8 included (as U+FFFD). There is one
    exception: where one byte of a run is wrong, a byte-fallback tokenizer (SentencePiece) decodes the whole run as
    garbage, with the characters before that byte, which this class has given already.

    tokenizer      of the model
    skip_special   leave special tokens out
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._steps = _Bytes(tokenizer, skip_special) if tokenizer.is_byte_level else _Window(tokenizer, skip_special)
        self._pieces: list[str] = []

    def push(self, token_id: int) -> str:
        """The text that one more token completes: often "", never part of a character. Unknown ids give ""."""
        return self._keep(self._steps.push(token_id))

    def flush(self) -> str:
        """The rest of the text after the last token. An incomplete character is U+FFFD."""
        return self._keep(self._steps.flush())

    @property
    def text(self) -> str:
        """All text given so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def _keep(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


class _Bytes:
    """For byte-level tokenizers: looks up the bytes of a token and decodes UTF-8 incrementally."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._table = tokenizer.bytes_of_token
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decoder.decode(self._table(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _Window:
    """For any tokenizer: decodes the last few tokens with and without the new one, and takes the difference.

    The window begins with the tokens of the last delta, because the first token of a text may lose its space.
    Source   text-generation-inference and vLLM (prefix_offset, read_offset)
    """

    _PATIENCE = 8  # tokens: a UTF-8 character has 4 bytes at most, so after 8 tokens it never becomes complete

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._read = 0
        self._known = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        incomplete = text.endswith(_REPLACEMENT) and len(self._window) - self._read < self._PATIENCE
        return "" if incomplete or len(text) <= len(self._known) else self._advance(text)

    def flush(self) -> str:
        text = self._decode(self._window)
        return self._advance(text) if len(text) > len(self._known) else ""

    def _advance(self, text: str) -> str:
        delta = text[len(self._known) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._known = self._decode(self._window)
        return delta

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)
