"""Pieces: token ids of a text in which some spellings of special tokens are only text, and of the end of a text.

A tokenizer first cuts a text at its special tokens, and encodes what lies between them. A piece encoded alone may
differ: a tokenizer may add a space at the very beginning (Metaspace "first"), and a token may take the spaces around it
(lstrip, rstrip). So the cuts are those of the library, and a piece that is not the first is encoded after a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from functools import cached_property
from itertools import pairwise
from secrets import token_hex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


class Pieces:
    """The encoder of rendered chats.

    backend        tokenizers.Tokenizer
    encode         (tokenizer, text) -> token ids, without tokens around the text; raises RequestError
    is_byte_level  whether each token is a run of bytes
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        encode: Callable[[tokenizers.Tokenizer, str], list[int]],
        is_byte_level: bool,
    ) -> None:
        self._backend = backend
        self._encode_by = encode
        self._is_byte_level = is_byte_level
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._before = next((token.content for token in added.values() if token.special and not token.rstrip), None)

    def encode(self, text: str, literal: Collection[int] = ()) -> list[int]:
        """Token ids of a text, without tokens around it.

        literal   a position inside each special token that is only text
        """
        return self._from(text, literal, 0) if literal else self._encode_by(self._backend, text)

    def encode_after(self, text: str, literal: Collection[int], cut: int) -> list[int] | None:
        """Token ids of text[cut:], as they are in the whole; None where `cut` may not be a border of tokens.

        A special token on either side of the cut makes it one. Where the tokenizer adds nothing to a text, any cut
        will do: tokens with other borders still give the same text.
        """
        real = self._real(text, literal)
        if any(start < cut < stop for start, stop, _ in real):
            return None
        if not self._can_cut and not any(cut in (start, stop) for start, stop, _ in real):
            return None
        if self._before is None or any(place >= cut for place in literal):
            return self._from(text, literal, cut)
        return self._encode_by(self._backend, self._before + text[cut:])[1:]

    def _from(self, text: str, literal: Collection[int], start: int) -> list[int]:
        ids: list[int] = []
        for begin, end, token_id in self._real(text, literal):
            if begin >= start:
                ids += [*self._between(text, literal, start, begin), token_id]
                start = end
        return ids + self._between(text, literal, start, len(text))

    def _between(self, text: str, literal: Collection[int], start: int, stop: int) -> list[int]:
        """Token ids of text[start:stop], none of them special."""
        ids = self._encode_literally(text, start, stop)
        if not set(ids).isdisjoint(self._special.values()):  # the model's own vocabulary joins the letters: break them
            cuts = [start, *sorted(place + 1 for place in literal if start <= place < stop - 1), stop]
            ids = [i for left, right in pairwise(cuts) for i in self._encode_literally(text, left, right)]
        return ids

    def _encode_literally(self, text: str, start: int, stop: int) -> list[int]:
        if start == stop:
            return []
        backend, guard = self._literal
        return (
            self._encode_by(backend, guard + text[start:stop])[1:] if start else self._encode_by(backend, text[:stop])
        )

    def _real(self, text: str, literal: Collection[int]) -> list[tuple[int, int, int]]:
        """(start, stop, token id) of each special token that is one, with the spaces that it takes."""
        if not self._special:
            return []
        encoded = self._scanner.encode(text, add_special_tokens=False)
        names = self._scanner.get_added_tokens_decoder()
        places = sorted(literal)
        real = []
        for i, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True):
            token_id = self._special.get(names[i].content) if i in names else None
            if token_id is not None and bisect_left(places, start) == bisect_left(places, stop):
                real.append((start, stop, token_id))
        return real

    @cached_property
    def _scanner(self) -> tokenizers.Tokenizer:
        """A tokenizer that finds the added tokens as the backend does, and takes all else for one unknown word."""
        from tokenizers import Tokenizer, models

        scanner = Tokenizer(models.WordLevel({"\ufdd0": 0}, unk_token="\ufdd0"))
        if self._backend.normalizer is not None:
            scanner.normalizer = self._backend.normalizer
        scanner.add_tokens(list(self._backend.get_added_tokens_decoder().values()))
        return scanner

    @cached_property
    def _literal(self) -> tuple[tokenizers.Tokenizer, str]:
        """A copy of the tokenizer that encodes special tokens as text, and a token of it that no text spells."""
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        guard = f"\ufdd0{token_hex(16)}"
        copy.add_tokens([AddedToken(guard, normalized=False)])
        return copy, guard

    @cached_property
    def _can_cut(self) -> bool:
        """Whether a text may be cut anywhere: its tokens are runs of bytes, and nothing is added before a word."""
        return self._is_byte_level and len(self._encode_by(self._backend, "x")) == 1
