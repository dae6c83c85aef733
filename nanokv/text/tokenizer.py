"""Tokenizer: tokenizer.json and the chat template of a checkpoint, on top of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanokv.core.errors import RequestError
from nanokv.text.files import load_backend, one_line, raise_unless_of_library
from nanokv.text.pieces import Pieces
from nanokv.text.spelled import find_spelled
from nanokv.text.template import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

_ID_END = 1 << 32


class Tokenizer:
    """Text to token ids and back.

    backend    tokenizers.Tokenizer
    template   ChatTemplate; None where the model has none
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: ChatTemplate | None = None) -> None:
        self.backend = backend
        self.template = template
        self.vocab_size = backend.get_vocab_size()
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint; None without tokenizer.json: such a model serves token ids only.

        Raises CheckpointError, naming the file, where it is damaged.
        """
        backend = load_backend(Path(folder))
        return cls(backend, ChatTemplate.from_folder(folder)) if backend is not None else None

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. Text that spells a special token becomes that token.

        add_special   add the tokens that the model expects around plain text (often a first one); a rendered chat has
                      them
        Raises        RequestError where the text is not valid Unicode
        """
        return _encode(self.backend, text, add_special)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids, without ids beyond the vocabulary (models pad their vocabulary)."""
        if self.is_byte_level:
            left_out = self.special_ids if skip_special else frozenset()
            return b"".join(self.bytes_of_token(i) for i in ids if i not in left_out).decode("utf-8", "replace")
        return self.backend.decode([i for i in ids if 0 <= i < _ID_END], skip_special_tokens=skip_special)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, as tokenizer.json writes it; None for an id beyond the vocabulary."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < _ID_END else None

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this text; None where no special token has it."""
        token_id = self.backend.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def bytes_of_token(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer; b"" for an id beyond the vocabulary.

        An added token, unless it is a letter of the byte alphabet, and one with other letters mean their own text.
        """
        if token_id not in self._bytes:
            token, alphabet = self.id_to_token(token_id) or "", byte_alphabet()
            verbatim = token_id in self._added and len(token) > 1
            known = not verbatim and all(letter in alphabet for letter in token)
            self._bytes[token_id] = bytes(alphabet[letter] for letter in token) if known else token.encode()
        return self._bytes[token_id]

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether each token is a run of bytes in GPT-2's alphabet, so that text can be cut at any token."""
        decoder = json.loads(self.backend.decoder.__getstate__()) if self.backend.decoder is not None else {}
        return decoder.get("type") == "ByteLevel"

    # ---- chats ----------------------------------------------------------------------------------------------------

    def apply_template(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as one text, see `ChatTemplate.render`. Raises RequestError where there is no template."""
        return self._template().render(messages, add_generation_prompt, **variables)

    def chat(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of the conversation, which end where the assistant's answer begins.

        A special token that a message spells ("<|im_end|>") stays text, so a message cannot end its turn and begin one
        of another role; a token for which the template itself looks is the exception (see spelled.py). The text of the
        ids is always apply_template(...), and without such spellings they equal encode(apply_template(...)).
        """
        return self.pieces.encode(*self.render(messages, add_generation_prompt, **variables))

    def render(
        self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any
    ) -> tuple[str, frozenset[int]]:
        """apply_template, and a position inside each special token of the text that a message spells."""
        chat = self._template().open(messages, add_generation_prompt, **variables)
        return chat.text, find_spelled(chat, [self._added[i] for i in self.special_ids])

    @cached_property
    def pieces(self) -> Pieces:
        """The encoder of rendered chats."""
        return Pieces(self.backend, _encode, self.is_byte_level)

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise RequestError("messages: this model has no chat template; give a plain text")
        return self.template


def _encode(backend: tokenizers.Tokenizer, text: str, add_special: bool = False) -> list[int]:
    try:
        text.encode()
        return backend.encode(text, add_special_tokens=add_special).ids
    except UnicodeEncodeError as error:
        raise RequestError(f"text: not valid Unicode at character {error.start} ({error.reason})") from error
    except BaseException as error:
        raise_unless_of_library(error)
        raise RequestError(f"text: the tokenizer fails on it ({one_line(error):.200})") from error


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters -> the 256 bytes: a printable byte has its own letter, each other byte one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}
