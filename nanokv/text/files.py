"""The files of a tokenizer: tokenizer.json, and what tokenizer_config.json adds to it. Every fault is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanokv.core.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_MOST_BYTES = 1 << 26  # of a file; the largest tokenizer.json has half of it
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_text(path: Path) -> str | None:
    """The text of a file, without a byte order mark; None where there is no such file. Raises CheckpointError."""
    try:
        if not path.is_file():
            if path.exists():
                raise CheckpointError(f"{path}: not a regular file")
            return None
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; at most {_MOST_BYTES} are allowed")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error


def read_json(path: Path) -> dict:
    """A JSON object; an empty one where there is no such file. Raises CheckpointError naming the file."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and the other special tokens, of tokenizer_config.json or else of special_tokens_map.json."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in read_json(folder / file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name in _SPECIAL and isinstance(text, str):
                found[name] = text
    return found


def load_backend(folder: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of tokenizer.json, which neither cuts nor pads; None where there is no such file.

    Plain text gets a first and a last token where tokenizer_config.json says so (add_bos_token, add_eos_token) and
    tokenizer.json does not do it already. A false value takes no token away, as in transformers 5.
    Raises   CheckpointError naming the file
    """
    import tokenizers

    path = folder / "tokenizer.json"
    text = read_text(path)
    if text is None:
        return None
    config = read_json(folder / "tokenizer_config.json")
    special = special_tokens(folder)
    wanted = {name: special.get(name) for name in ("bos_token", "eos_token") if config.get(f"add_{name}") is True}
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        _add_around(backend, wanted.get("bos_token"), wanted.get("eos_token"))
    except BaseException as error:
        raise_unless_of_library(error)
        raise CheckpointError(f"{path}: not a readable tokenizer ({one_line(error)})") from error
    return backend


def _add_around(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Makes the tokenizer add these tokens around a text, beside those that it adds already."""
    from tokenizers import processors

    for name in (first, last):
        if name is not None and backend.token_to_id(name) is None:
            raise ValueError(f"tokenizer_config.json adds {name!r:.40} to each text, which is no token")
    if first is None and last is None:
        return
    plain, whole = backend.encode("x", add_special_tokens=False).tokens, backend.encode("x").tokens
    place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0) if plain else len(whole)
    before, after = whole[:place], whole[place + len(plain) :]
    if first is not None and first not in before:
        before = [first, *before]
    if last is not None and last not in after:
        after = [*after, last]
    ids = [(name, backend.token_to_id(name)) for name in dict.fromkeys([*before, *after])]
    backend.post_processor = processors.TemplateProcessing([*before, "$A", *after], None, ids)


def end_ids(folder: Path) -> tuple[int, ...]:
    """The id of eos_token, with which a turn may end though config.json does not name it; () where there is none.

    Raises CheckpointError naming a file that is damaged
    """
    text = special_tokens(folder).get("eos_token")
    if text is None:
        return ()
    from nanokv.text.token_ids import id_of

    path = folder / "tokenizer.json"
    source = read_text(path)
    try:
        token_id = None if source is None else id_of(text, source)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    return () if token_id is None else (token_id,)


def raise_unless_of_library(error: BaseException) -> None:
    """Raises `error` unless the library did: it raises plain Exception, and panics as a BaseException."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def one_line(error: BaseException) -> str:
    """The message of an exception, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
