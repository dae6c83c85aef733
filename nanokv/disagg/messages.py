"""The messages of a decode process and a prefill process, and their form on the wire.

A frame is a length (4 bytes, big-endian) and as many bytes of msgpack: one map, whose key "type" names the message and
whose other keys are the fields below. Unknown keys are ignored, missing or mistyped ones are an error.

    prefill -> decode    CHALLENGE  (between hosts only) a random number, which the proof of HELLO covers
    decode -> prefill    HELLO    version, digest, where the pool is (on one host with its descriptor, SCM_RIGHTS)
    prefill -> decode    HELLO    the same digest and generation, mapped: ready for prompts
    decode -> prefill    PREFILL  these pages may be written until DONE, FAILED or ABORT_ACK
    prefill -> decode    LAYERS   (between hosts only) the bytes of these layers of these pages follow the frame
    prefill -> decode    DONE     every page and state is written: first token of each sample
    prefill -> decode    FAILED   nothing more will be written for this attempt; without a request: HELLO is refused
    decode -> prefill    ABORT    stop this attempt
    prefill -> decode    ABORT_ACK  nothing more will be written for this attempt
    prefill -> decode    PING     still at work, between two layers
    decode -> prefill    PING     (between hosts only) every few seconds after HELLO: still there

Every message after HELLO carries the generation of the pool; those about a request also its attempt, a number that is
never used twice in a generation and ascends at each prefill process. A message about another generation, or about an
attempt that is not open, is dropped. So is a late PREFILL: at or below an attempt that came or was aborted before.
Source: the wire content of vLLM's NIXL connector and of SGLang's disaggregation, without their tensors.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from typing import Annotated

import msgspec

from nanokv.core.errors import NanokvError

VERSION = 4
HEADER = struct.Struct(">I")
MAX_FRAME = 16 << 20
"""Bytes of a frame at most. A prompt of a million tokens takes 4 MiB; a greater length is a malformed one."""
MAX_SAID = 300
"""Characters of a peer that a log line or an error repeats."""
Few = msgspec.Meta(max_length=1 << 16)
"""The most elements of a list of objects, which take up to a hundred times the bytes of their frame."""


def printable(said: object) -> str:
    """What a peer has said, for a log line or an error: on one line, without control characters, cut."""
    line = " ".join(str(said).split())[:MAX_SAID]
    return line if line.isprintable() else ascii(line)[1:-1]


class ProtocolError(NanokvError):
    """Bytes that are no message of this protocol, or a message that is not allowed here."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all messages.

    generation   of the pool
    """

    generation: int

    @property
    def kind(self) -> str:
        """Its name on the wire, such as "HELLO"."""
        return str(self.__struct_config__.tag)


class PoolMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pool is.

    kind     "memfd": its descriptor comes with the frame; "cuda": `handle` is what torch exports; "sent": on another
             host, and pages are sent behind LAYERS
    handle   msgpack of torch's CUDA IPC handle, else empty
    """

    kind: str
    num_bytes: int
    handle: bytes = b""


class Challenge(Message, tag="CHALLENGE", frozen=True, kw_only=True):
    """The first message between hosts.

    nonce   random bytes, used once
    """

    nonce: bytes


class Hello(Message, tag="HELLO", frozen=True, kw_only=True):
    """Opens a connection, and is answered by itself.

    version, digest   must be equal on both sides; digest covers weights, config, codec, page size and layout
    heartbeat_s       seconds of silence after which the decode process kills (0: version 1 had none)
    memory            None in the answer of a prefill process of the same host
    nonce, proof      between hosts: random bytes of the decode process, and what shows that the sender knows the shared
                      secret (secret.py); no proof without one
    """

    version: int
    digest: str
    num_pages: int
    num_states: int
    heartbeat_s: float = 0.0
    memory: PoolMemory | None = None
    nonce: bytes = b""
    proof: bytes = b""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the first token of each sample is chosen (core.request.SamplingParams).

    seed      a decimal number, which may exceed 64 bits
    index     of the first sample
    samples   their number
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    min_tokens: int
    stop_token_ids: Annotated[tuple[int, ...], Few]
    ignore_eos: bool
    logprobs: int | None
    repetition_penalty: float
    seed: str
    index: int
    samples: int


class Attempt(Message, frozen=True, kw_only=True):
    """One attempt at one request."""

    request: str
    attempt: int


class Prefill(Attempt, tag="PREFILL", frozen=True, kw_only=True):
    """Grants pages and states to an attempt.

    tokens         known tokens, int32, little-endian: the prompt and, after a preemption, sampled tokens
    prompt_length  how many of them are prompt
    cached_length  the first of them whose K and V are in the pages already; whole pages, less than all
    pages          pages for all tokens in order of position, int32, little-endian
    state          the state of recurrent layers at cached_length; None where no layer has one
    checkpoints    (position, state): a copy of the state at this position is left there; whole pages, ascending
    """

    tokens: bytes
    prompt_length: int
    cached_length: int
    pages: bytes
    state: int | None
    checkpoints: Annotated[tuple[tuple[int, int], ...], Few]
    sampling: Sampling

    @property
    def states(self) -> list[int]:
        """All states that it grants: the request's own, then those of the checkpoints."""
        own = [] if self.state is None else [self.state]
        return [*own, *(state for _, state in self.checkpoints)]


class Layers(Attempt, tag="LAYERS", frozen=True, kw_only=True):
    """Layers first .. last - 1 of these pages, or of these states. Their bytes follow the frame, place after place.

    places   ids in the pool of the decode process, int32, little-endian
    """

    places: bytes
    first: int
    last: int
    states: bool = False


class Done(Attempt, tag="DONE", frozen=True, kw_only=True):
    """Every page and state of the attempt is written.

    tokens     first token of each sample; None where the logits are not finite
    logprobs   of each sample: token id -> log-probability where it was asked for, else None
    finished   CLOCK_MONOTONIC seconds when the last kernel had ended (on one host it measures the transfer)
    """

    tokens: Annotated[tuple[int | None, ...], Few]
    logprobs: Annotated[tuple[dict[int, float] | None, ...], Few]
    finished: float


class Failed(Message, tag="FAILED", frozen=True, kw_only=True):
    """Ends an attempt without a result; without a request it refuses HELLO.

    reason   one line
    """

    reason: str
    request: str | None = None
    attempt: int = 0


def failed(attempt: Attempt, reason: str) -> Failed:
    """FAILED of the attempt that a message is about."""
    return Failed(generation=attempt.generation, request=attempt.request, attempt=attempt.attempt, reason=reason)


class Abort(Attempt, tag="ABORT", frozen=True, kw_only=True):
    """Asks the prefill process to stop an attempt."""


class AbortAck(Attempt, tag="ABORT_ACK", frozen=True, kw_only=True):
    """Nothing more will be written for the attempt."""


class Ping(Message, tag="PING", frozen=True, kw_only=True):
    """A sign of life."""


AnyMessage = Challenge | Hello | Prefill | Layers | Done | Failed | Abort | AbortAck | Ping
_encoder = msgspec.msgpack.Encoder()
ANY = msgspec.msgpack.Decoder(AnyMessage)
FROM_DECODE = msgspec.msgpack.Decoder(Hello | Prefill | Abort | Ping)
"""Reads what a decode process sends, and builds no objects of other messages."""


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ProtocolError for one that is too long."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a message of {len(body):,} bytes: at most {MAX_FRAME:,} are sent")
    return HEADER.pack(len(body)) + body


def decode(body: bytes | bytearray, decoder: msgspec.msgpack.Decoder = ANY) -> AnyMessage:
    """The message of one frame, without its length. Raises ProtocolError."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {printable(error)}") from None


def take_frames(
    buffer: bytearray, longest: int = MAX_FRAME, decoder: msgspec.msgpack.Decoder = ANY
) -> list[AnyMessage]:
    """Removes whole frames from the front of `buffer`, up to the first LAYERS: other bytes follow it.

    longest   bytes of a frame
    decoder   of the messages that may come
    Raises    ProtocolError; the buffer is then unusable
    """
    messages: list[AnyMessage] = []
    while len(buffer) >= HEADER.size and not (messages and isinstance(messages[-1], Layers)):
        (length,) = HEADER.unpack_from(buffer)
        if length > longest:
            raise ProtocolError(f"malformed frame: its length says {length:,} bytes")
        end = HEADER.size + length
        if len(buffer) < end:
            break
        messages.append(decode(bytes(buffer[HEADER.size : end]), decoder))
        del buffer[:end]
    return messages


def pack_ints(values: Iterable[int]) -> bytes:
    """The values as int32, little-endian."""
    packed = array("i", values)
    if struct.pack("=i", 1) != struct.pack("<i", 1):
        packed.byteswap()
    return packed.tobytes()


def unpack_ints(packed: bytes) -> array[int]:
    """The inverse of `pack_ints`. Raises ProtocolError for bytes that are no int32 values."""
    values = array("i")
    if len(packed) % values.itemsize:
        raise ProtocolError(f"{len(packed)} bytes are no list of int32")
    values.frombytes(packed)
    if struct.pack("=i", 1) != struct.pack("<i", 1):
        values.byteswap()
    return values
