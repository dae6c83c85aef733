"""Whether a text fits into the context, decided without encoding far more of it than fits."""

from __future__ import annotations

from functools import lru_cache, partial

from nanokv.cli.repl.stop_key import StopKey
from nanokv.text.tokenizer import Tokenizer

PIECE = 1 << 16
"""Characters that are encoded at once: a fraction of a second, after which Ctrl-C is heard."""


@lru_cache(maxsize=4)
def longest_token(tokenizer: Tokenizer) -> int:
    """The most bytes that one token of this vocabulary can mean, or more: letters of a byte alphabet take up to two."""
    return max(len(token.encode("utf-8", "replace")) for token in tokenizer.backend.get_vocab())


def count_tokens(tokenizer: Tokenizer, text: str, most: int, stop: StopKey) -> tuple[int, bool]:
    """The tokens of `text`, and whether all of it was counted: counting ends once there are `most`.

    A long text is cut at fixed places, each of which may add a token. Raises Stopped at Ctrl-C.
    """
    count = 0
    for start in range(0, len(text), PIECE):
        count += len(stop.run(partial(tokenizer.encode, text[start : start + PIECE])))
        if count >= most:
            return count, start + PIECE >= len(text)
    return count, True
