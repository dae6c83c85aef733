"""The id of one token in the text of a tokenizer.json. The rest of the file, which is most of it, makes no objects."""

from __future__ import annotations

import msgspec


class _Added(msgspec.Struct):
    content: str
    id: int


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list | None = None


class _File(msgspec.Struct):
    added_tokens: list[_Added] = []
    model: msgspec.Raw = msgspec.Raw(b"{}")


def id_of(token: str, source: str) -> int | None:
    """The id of a token in the JSON text of a tokenizer; None where it has none. Raises ValueError, RecursionError."""
    try:
        file = msgspec.json.decode(source, type=_File)
        ids = {added.content: added.id for added in file.added_tokens}
        if token not in ids and isinstance(vocab := msgspec.json.decode(file.model, type=_Model).vocab, dict):
            ids = vocab
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
    token_id = ids.get(token, -1)
    return token_id if token_id >= 0 else None
