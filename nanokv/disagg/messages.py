"""The words that a decode process and a prefill process exchange, and how they look on the wire.

A frame is a length (4 bytes, big-endian) and as many bytes of msgpack: one map, whose key "type" names the message and
whose other keys are the fields below. Unknown keys are ignored, missing or mistyped ones are an error.

    decode -> prefill    PING     (between hosts only) HELLO comes when the model is loaded
    decode -> prefill    HELLO    who I am, where the pool is (on one host its descriptor rides along, SCM_RIGHTS)
    prefill -> decode    HELLO    the same digest and generation, mapped: ready for prompts
    decode -> prefill    PREFILL  these pages are yours until you say DONE, FAILED or ABORT_ACK
    prefill -> decode    LAYERS   (between hosts only) the data connection carries these pages of these layers next
    prefill -> decode    DONE     every page and state is written: first token of each sample
    prefill -> decode    FAILED   nothing more will be written for this attempt; or, without a request: we do not fit
    decode -> prefill    ABORT    stop
    prefill -> decode    ABORT_ACK  nothing more will be written for this attempt
    prefill -> decode    PING     still at work, between two layers

Every message after HELLO carries the generation of the pool; those about a request also its attempt, a number that is
never used twice in a generation and ascends at each prefill process. What names another generation, or an attempt that
is no longer open, is dropped; so is a PREFILL that is late: at or below an attempt that came or was aborted before.
Source: the wire content of vLLM's NIXL connector and of SGLang's disaggregation, without their tensors.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable

import msgspec

from nanokv.core.errors import NanokvError

VERSION = 3
HEADER = struct.Struct(">I")
MAX_FRAME = 16 << 20
"""Bytes of a frame at most: a prompt of a million tokens takes 4 MiB, and a length beyond this is no length."""


class ProtocolError(NanokvError):
    """What came in is no message of this protocol, or none that belongs here."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """generation   of the pool that this is about"""

    generation: int


class PoolMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pool is.

    kind     "memfd": its descriptor comes with the frame; "cuda": `handle` is what torch exports; "sent": on another
             host, pages travel over the data connection that `port` leads to
    handle   msgpack of torch's CUDA IPC handle, else empty
    port     TCP port of the rendezvous of the data connection, else 0
    """

    kind: str
    num_bytes: int
    handle: bytes = b""
    port: int = 0


class Hello(Message, tag="HELLO", frozen=True, kw_only=True):
    """version, digest   must be equal on both sides; digest covers weights, config, codec, page size and layout
    heartbeat_s      silence after which the decode process kills; the answer repeats it (0: version 1 knew none)
    memory           None in the answer of a prefill process of the same host
    """

    version: int
    digest: str
    num_pages: int
    num_states: int
    heartbeat_s: float = 0.0
    memory: PoolMemory | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What chooses the first token of each sample; `seed` is a decimal number, which may exceed 64 bits."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    min_tokens: int
    stop_token_ids: tuple[int, ...]
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
    """tokens        known tokens, int32, little-endian: prompt and, after a preemption, what was sampled
    prompt_length  how many of them are prompt
    cached_length  the first of them whose K and V stand in the pages already; whole pages, less than all
    pages          pages for all tokens in order of position, int32, little-endian
    state          the state of recurrent layers, standing at cached_length; None where there is none
    checkpoints    (position, state): leave a copy of the state there on the way; whole pages, ascending
    """

    tokens: bytes
    prompt_length: int
    cached_length: int
    pages: bytes
    state: int | None
    checkpoints: tuple[tuple[int, int], ...]
    sampling: Sampling

    @property
    def states(self) -> list[int]:
        """All states that it grants: the request's own one, then those of the checkpoints."""
        own = [] if self.state is None else [self.state]
        return [*own, *(state for _, state in self.checkpoints)]


class Layers(Attempt, tag="LAYERS", frozen=True, kw_only=True):
    """The data connection carries next: layers first .. last - 1 of these pages or (`states`) states."""

    places: bytes
    first: int
    last: int
    states: bool = False


class Done(Attempt, tag="DONE", frozen=True, kw_only=True):
    """tokens    of each sample; None where its logits are not finite
    logprobs   of each sample: token id -> log-probability where it was asked for, else None
    finished   CLOCK_MONOTONIC seconds when the last kernel had ended (one host: measures the hand-over)
    """

    tokens: tuple[int | None, ...]
    logprobs: tuple[dict[int, float] | None, ...]
    finished: float


class Failed(Message, tag="FAILED", frozen=True, kw_only=True):
    """reason   one line; without a request: why this process takes no prompts of that one at all"""

    reason: str
    request: str | None = None
    attempt: int = 0


def failed(attempt: Attempt, reason: str) -> Failed:
    """FAILED of the attempt that a message is about."""
    return Failed(generation=attempt.generation, request=attempt.request, attempt=attempt.attempt, reason=reason)


class Abort(Attempt, tag="ABORT", frozen=True, kw_only=True):
    pass


class AbortAck(Attempt, tag="ABORT_ACK", frozen=True, kw_only=True):
    pass


class Ping(Message, tag="PING", frozen=True, kw_only=True):
    pass


AnyMessage = Hello | Prefill | Layers | Done | Failed | Abort | AbortAck | Ping
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """A whole frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a message of {len(body):,} bytes: at most {MAX_FRAME:,} are sent")
    return HEADER.pack(len(body)) + body


def decode(body: bytes | bytearray) -> AnyMessage:
    """The message of one frame, without its length. Raises ProtocolError."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from None


def take_frames(buffer: bytearray) -> list[AnyMessage]:
    """Takes every whole frame off the front of `buffer`. Raises ProtocolError; the buffer is then of no more use."""
    messages = []
    while len(buffer) >= HEADER.size:
        (length,) = HEADER.unpack_from(buffer)
        if length > MAX_FRAME:
            raise ProtocolError(f"malformed frame: its length says {length:,} bytes")
        end = HEADER.size + length
        if len(buffer) < end:
            break
        messages.append(decode(bytes(buffer[HEADER.size : end])))
        del buffer[:end]
    return messages


def pack_ints(values: Iterable[int]) -> bytes:
    """int32, little-endian."""
    packed = array("i", values)
    if struct.pack("=i", 1) != struct.pack("<i", 1):
        packed.byteswap()
    return packed.tobytes()


def unpack_ints(packed: bytes) -> array[int]:
    """The inverse. Raises ProtocolError."""
    values = array("i")
    if len(packed) % values.itemsize:
        raise ProtocolError(f"{len(packed)} bytes are no list of int32")
    values.frombytes(packed)
    if struct.pack("=i", 1) != struct.pack("<i", 1):
        values.byteswap()
    return values
