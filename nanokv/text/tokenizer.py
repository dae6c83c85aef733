"""Tokenizer: tokenizer.json and the chat template of a checkpoint, on top of the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanokv.core.errors import CheckpointError, RequestError
from nanokv.text.template import ChatTemplate, check_messages

if TYPE_CHECKING:
    import tokenizers

_ID_END = 1 << 32
MARK = "\ufdd0"
"""Is put inside each special token that a message's text spells. A noncharacter of Unicode: no text uses it."""


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
        names = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint; None without tokenizer.json: such a model serves token ids only.

        Raises CheckpointError, naming the file, where it is damaged.
        """
        import tokenizers

        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: not a readable tokenizer ({' '.join(str(error).split())})") from error
        return cls(backend, ChatTemplate.from_folder(folder))

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. Text that spells a special token becomes that token.

        add_special   add the tokens that the model expects around plain text (often a first one); a rendered chat has
                      them
        Raises        RequestError where the text is not valid Unicode
        """
        return _encode(self.backend, text, add_special)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids, without ids beyond the vocabulary (models pad their vocabulary)."""
        return self.backend.decode([i for i in ids if 0 <= i < _ID_END], skip_special_tokens=skip_special)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, as tokenizer.json writes it; None for an id beyond the vocabulary."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < _ID_END else None

    def bytes_of_token(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer; b"" for an id beyond the vocabulary.

        A token with a letter outside the byte alphabet (an added one, with a space in it) means its own text.
        """
        if token_id not in self._bytes:
            token, alphabet = self.id_to_token(token_id) or "", byte_alphabet()
            known = all(letter in alphabet for letter in token)
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
        if self.template is None:
            raise RequestError("messages: this model has no chat template; give a plain text")
        return self.template.render(messages, add_generation_prompt, **variables)

    def chat(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of the conversation, which end where the assistant's answer begins.

        A special token that a message spells ("<|im_end|>") stays text, so a message cannot end its turn and begin one
        of another role. Otherwise the ids equal encode(apply_template(...)).
        """
        return self.encode_marked(self.render_marked(messages, add_generation_prompt, **variables))

    def render_marked(self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: Any) -> str:
        """apply_template, with MARK inside every special token that a message spells."""
        return self.apply_template(self._mark(check_messages(messages)), add_generation_prompt, **variables)

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of a text from render_marked.

        A tokenizer first cuts a text at special tokens, so encoding the pieces between them one by one gives the same
        ids.
        """
        if MARK not in text or self._special is None:
            return self.encode(text)
        ids: list[int] = []
        end = 0
        for match in self._special.finditer(text):
            ids += self._encode_literally(text[end : match.start()])
            token_id = self.backend.token_to_id(match[0])
            assert token_id is not None  # the names of `_special` are tokens
            ids.append(token_id)
            end = match.end()
        return ids + self._encode_literally(text[end:])

    def encode_after(self, before: str, text: str) -> list[int] | None:
        """Token ids of `text` after `before`, both from render_marked; None where the cut may not be a token border.

        Text of a byte-level tokenizer can be cut anywhere: tokens with other borders still give the same text. A
        SentencePiece tokenizer adds a space before the text it encodes, so that is cut at special tokens only.
        """
        if self.is_byte_level or self._special is None:
            return self.encode_marked(text) if self.is_byte_level else None
        if self._special.match(text):
            return self.encode_marked(text)
        last = next((m for m in self._special.finditer(before) if m.end() == len(before)), None)
        return None if last is None else self.encode_marked(last[0] + text)[1:]

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda m: m[0][0] + MARK + m[0][1:], value) if self._special else value
        if isinstance(value, dict):
            return {key: self._mark(item) for key, item in value.items()}
        return [self._mark(item) for item in value] if isinstance(value, list) else value

    def _encode_literally(self, text: str) -> list[int]:
        return _encode(self._literal, text.replace(MARK, ""), False) if text else []

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy of the tokenizer that encodes special tokens as text; the switch is global to a tokenizer."""
        import tokenizers

        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy


def _encode(backend: tokenizers.Tokenizer, text: str, add_special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"text: not valid Unicode at character {error.start} ({error.reason})") from error
    return backend.encode(text, add_special_tokens=add_special).ids


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters -> the 256 bytes: a printable byte has its own letter, each other byte one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}
