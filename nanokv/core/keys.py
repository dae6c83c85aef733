"""Page keys: names of cached pages that are valid in every process.

    root key  = H(identity, salt)                     one for each model and namespace
    page key  = H(key of the page before, tokens)     before the first page of a prompt: the root key

Equal keys mean equal tokens after an equal prefix, under an equal model and salt. Knows no pages and no tensors; a
router uses it without torch.
Source: the block hashes of vLLM's prefix cache.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16
"""Bytes of a key."""
TOKEN_BYTES = array("i").itemsize
"""Bytes of a token id, an int32."""


def root_key(identity: bytes, salt: str | None) -> bytes:
    """The key before the first page of a prompt.

    identity   digest of weights, config, codec, dtype and layout (models/identity.py)
    salt       namespace of the prefix cache, or None
    Returns    KEY_BYTES bytes
    """
    typed = b"\0" if salt is None else b"\1" + salt.encode("utf-8", "surrogatepass")
    framed = len(identity).to_bytes(8, "little") + identity + typed
    return blake2b(framed, digest_size=KEY_BYTES, person=b"nanokv root").digest()


def page_keys(tokens: Sequence[int] | bytes, page_size: int, parent: bytes) -> list[bytes]:
    """The keys of the whole pages of `tokens`, in order. A partial page at the end has no key.

    tokens      token ids, or their bytes as int32 in the machine's byte order
    page_size   tokens in a page
    parent      the key of the page before, or a root key: KEY_BYTES bytes
    """
    data = tokens if isinstance(tokens, bytes) else array("i", tokens).tobytes()
    if sys.byteorder == "big":
        swapped = array("i", data)
        swapped.byteswap()
        data = swapped.tobytes()
    size = page_size * TOKEN_BYTES
    keys = []
    for start in range(0, len(data) - size + 1, size):
        parent = blake2b(parent + data[start : start + size], digest_size=KEY_BYTES, person=b"nanokv page").digest()
        keys.append(parent)
    return keys
