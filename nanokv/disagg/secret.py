"""A secret that two hosts share: each proves to the other that it knows it, and never sends it.

    prefill -> decode    CHALLENGE  a nonce of the prefill process
    decode -> prefill    HELLO      a nonce of its own; proof: HMAC-SHA256 of the secret over both nonces and this HELLO
    prefill -> decode    HELLO      proof over the same and the answer

The label of a side stands in front, so that no side can send back what it was sent, and fresh nonces make a recorded
HELLO worthless. It covers the opening of the connection. What travels afterwards is neither encrypted nor signed: a
host on the path can read and change it.
Source: RFC 2104 (HMAC); the challenge and response of RFC 5802 (SCRAM), without passwords.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import stat
from hashlib import sha256

import msgspec

from nanokv.core.errors import ConfigError
from nanokv.disagg.messages import Hello

NONCE_BYTES = 32
LEAST_BYTES = 16
"""The shortest secret: 16 bytes of `head -c 32 /dev/urandom | base64` cannot be guessed."""
MOST_BYTES = 4096


def read_secret(path: str | os.PathLike[str]) -> bytes:
    """The secret in a file, without white space at its ends.

    Raises ConfigError where the file cannot be read, other users may read it, or it is too short or too long.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"secret_file={str(path)!r}: no regular file")
        if os.name == "posix" and mode & stat.S_IROTH:
            raise ConfigError(f"secret_file={str(path)!r}: other users may read it; run `chmod 600 {path}`")
        with open(path, "rb") as file:
            secret = file.read(MOST_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(f"secret_file={str(path)!r}: {error.strerror or error}") from None
    if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
        raise ConfigError(
            f"secret_file={str(path)!r}: holds {len(secret)} bytes; expected {LEAST_BYTES} to {MOST_BYTES}, such as "
            "those of `head -c 32 /dev/urandom | base64`"
        )
    return secret


def new_nonce() -> bytes:
    """Random bytes, to be used once."""
    return secrets.token_bytes(NONCE_BYTES)


def signed(hello: Hello, label: str, secret: bytes | None, challenge: bytes) -> Hello:
    """HELLO with the proof that its sender knows the secret; without one there is no proof.

    label       "decode" or "prefill": the side that sends it
    challenge   the nonce of the prefill process; that of the decode process is in `hello`
    """
    return msgspec.structs.replace(hello, proof=_proof(hello, label, secret, challenge) if secret else b"")


def is_signed(hello: Hello, label: str, secret: bytes | None, challenge: bytes) -> bool:
    """Whether HELLO has the right proof; without a secret, whether it has none."""
    if secret is None:
        return not hello.proof
    return hmac.compare_digest(hello.proof, _proof(hello, label, secret, challenge))


def is_loopback(host: str) -> bool:
    """Whether an IP address is one of this host alone."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _proof(hello: Hello, label: str, secret: bytes, challenge: bytes) -> bytes:
    said = msgspec.msgpack.encode(msgspec.structs.replace(hello, proof=b""))
    framed = msgspec.msgpack.encode([label, challenge, said])  # lengths included: no two inputs have the same bytes
    return hmac.digest(secret, framed, sha256)
