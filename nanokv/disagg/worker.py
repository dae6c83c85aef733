"""The prefill process of one host: `python -m nanokv.disagg.worker`, started and supervised by the decode process.

It loads the model, maps the pool that HELLO names, and computes prompts until the decode process closes the connection.
It holds nothing that must be saved: SIGKILL at any moment ends it cleanly.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from nanokv.cache.store import CacheStore
from nanokv.codecs import codec_of
from nanokv.core.batch import Batch
from nanokv.core.config import EngineConfig
from nanokv.core.errors import NanokvError
from nanokv.core.spec import PageLayout
from nanokv.disagg.channel import Channel, wait
from nanokv.disagg.config import LONGEST_S, SHORTEST_S, is_heartbeat
from nanokv.disagg.messages import VERSION, Abort, Failed, Hello, Message, Ping, Prefill, ProtocolError
from nanokv.disagg.prefill_loop import PrefillLoop
from nanokv.disagg.shared_buffer import map_pool
from nanokv.engine.limits import set_threads
from nanokv.engine.profile_run import run_small_step
from nanokv.models.decoder import Decoder
from nanokv.models.identity import model_identity
from nanokv.models.loader import load_model
from nanokv.models.read import read_folder

logger = logging.getLogger("nanokv")


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The argument of a worker, as JSON. Device and dtype are those that the decode process has resolved.

    config   fields of EngineConfig
    cores    CPU cores to run on; None: all
    """

    name: str
    folder: str
    device: str
    dtype: str
    config: dict
    cores: tuple[int, ...] | None = None


class PrefillModel:
    """A model with compiled kernels, and the digest that a decode process must share.

    folder    of the model
    device    "cpu", "cuda:0"
    dtype     "float32", "bfloat16" or "float16"
    decoder   bound to `layout`
    """

    def __init__(self, folder: Path, config: EngineConfig, device: str, dtype: str) -> None:
        self.config = config
        self.device = torch.device(device)
        set_threads(config.threads)
        described = read_folder(folder)
        kind = getattr(torch, dtype)
        self.decoder: Decoder = load_model(
            folder, described, dtype=kind, device=self.device, codec=codec_of(config, kind, described.attention_layers),
            page_size=config.page_size, load=config.load, seed=config.seed, kernels=config.kernels,
            weights=config.weights,
        )  # fmt: skip
        self.layout = PageLayout(self.decoder.specs, config.page_size)
        self.decoder.bind(self.layout)
        run_small_step(self.decoder, self.layout, self.device)
        self.digest = model_identity(folder, described, config, dtype, self.layout, VERSION)


def refusal(hello: Hello, digest: str, kinds: tuple[str, ...]) -> str | None:
    """Why a process with this digest cannot work with the sender of HELLO; None where it can.

    kinds   of memory that this process can use
    """
    if hello.version != VERSION:
        return f"protocol version {hello.version} there, {VERSION} here"
    if hello.digest != digest:
        return "another model, dtype, codec or page size there than here"
    if not is_heartbeat(hello.heartbeat_s):
        return f"heartbeat_s={hello.heartbeat_s!r} there: expected {SHORTEST_S:g} to {LONGEST_S:g}"
    if hello.memory is None or hello.memory.kind not in kinds:
        kind = None if hello.memory is None else hello.memory.kind
        return f"memory {kind!r:.40} there; expected here is {' or '.join(kinds)}"
    return None


def receive_hello(channel: Channel, digest: str) -> Hello:
    """Waits for HELLO of a decode process of this host; the answer, which the caller sends, repeats it.

    Raises ProtocolError for another message, and for a HELLO that does not fit, after FAILED was sent; EOFError where
    the other side closes the connection.
    """
    while not channel.closed:
        wait([channel])
        for message in channel.receive():
            if not isinstance(message, Hello):
                raise ProtocolError(f"{message.kind} came before HELLO")
            reason = refusal(message, digest, ("memfd", "cuda"))
            if reason is not None:
                channel.send(Failed(generation=message.generation, reason=reason))
                raise ProtocolError(reason)
            return message
    raise EOFError("the decode process closed the connection before HELLO")


class Session:
    """The exchange with one decode process: computes its prompts, and answers its messages between steps.

    heartbeat_s   seconds of silence after which the decode process kills this one; PING is sent after a quarter of it
    silence_s     seconds of silence of the decode process that end the session; None: it says nothing while it is idle
    """

    def __init__(self, channel: Channel, loop: PrefillLoop, heartbeat_s: float, silence_s: float | None = None) -> None:
        self.channel = channel
        self.loop = loop
        self._every = heartbeat_s / 4
        self._silence_s = silence_s
        self._spoke = self._heard = time.monotonic()

    def send(self, message: Message) -> None:
        """Sends a message."""
        self.channel.send(message)
        self._spoke = time.monotonic()

    def beat(self) -> None:
        """Sends PING if it is due, unless the other side is not reading."""
        if time.monotonic() - self._spoke > self._every and not self.channel.is_backed_up:
            self.send(Ping(generation=self.loop.generation))

    def between(self, layer: int, x: Tensor, residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
        """Called after each layer of a step (Decoder.forward): sends PING if it is due."""
        self.beat()
        return x, residual, batch

    def serve(self) -> None:
        """Runs until the decode process closes the connection.

        Raises ProtocolError for a message it may not send, EOFError where it is silent for too long.
        """
        while True:
            self._wait()
            messages = self.channel.receive()
            for message in messages:
                self.hear(message)
            if self.channel.closed:
                return
            if messages:
                self._heard = time.monotonic()
            elif self._silence_s is not None and time.monotonic() - self._heard > self._silence_s:
                raise EOFError(f"sent nothing for {self._silence_s:g} s")
            if self.loop.has_work:
                self.beat()
                for answer in self.loop.step():
                    self.send(answer)

    def hear(self, message: Message) -> None:
        """Takes one message. Raises ProtocolError for one that no decode process may send."""
        if message.generation != self.loop.generation:
            return  # about an older pool
        if isinstance(message, Prefill):
            refused = self.loop.accept(message)
            if refused is not None:
                self.send(refused)
        elif isinstance(message, Abort):
            self.send(self.loop.abort(message))
        elif not isinstance(message, Ping):
            raise ProtocolError(f"{message.kind} is not for a prefill process")

    def _wait(self) -> None:
        """Waits for a message, unless there is work."""
        self.channel.flush()
        writing = [self.channel] if self.channel.is_backed_up else []
        wait([self.channel], writing, 0 if self.loop.has_work else self._silence_s)


def run(spec: WorkerSpec, channel: Channel, make_session: Callable[..., Session] = Session) -> None:
    """Loads the model, answers HELLO, and serves. Raises ProtocolError, EOFError."""
    model = PrefillModel(Path(spec.folder), EngineConfig(**spec.config), spec.device, spec.dtype)
    hello = receive_hello(channel, model.digest)
    assert hello.memory is not None
    layout = model.layout
    num_bytes = hello.num_pages * layout.page_bytes + hello.num_states * layout.state_bytes
    pool = map_pool(hello.memory, channel.take_descriptor(), num_bytes)
    store = CacheStore(layout, hello.num_pages, buffer=pool, num_states=hello.num_states)
    session: Session
    loop = PrefillLoop(model.decoder, store, model.config, hello.generation, lambda *stream: session.between(*stream))
    session = make_session(channel, loop, hello.heartbeat_s)
    session.send(msgspec.structs.replace(hello, memory=None))
    session.serve()


def end_with(pid: int) -> None:
    """Ends this process when process `pid` has ended. Raises EOFError where it has ended already.

    Its sockets do not tell: a forked child keeps them open. Nor does PR_SET_PDEATHSIG, which watches the thread that
    started this process and may end earlier.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise EOFError("the decode process has ended") from None

    def watch() -> None:
        wait([pidfd])
        os._exit(0)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def main(arguments: list[str], make_session: Callable[..., Session] = Session) -> int:
    """The program. Returns its exit code: 0 where the decode process has closed the connection.

    arguments   number of an inherited socket; a WorkerSpec as JSON
    """
    spec = msgspec.json.decode(arguments[1], type=WorkerSpec)
    logging.basicConfig(format=f"[{spec.name}] %(message)s", stream=sys.stderr)
    if spec.cores is not None:
        os.sched_setaffinity(0, spec.cores)
    sock = socket.socket(fileno=int(arguments[0]))
    parent, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    channel = Channel(sock)
    try:
        end_with(parent)
        run(spec, channel, make_session)
    except EOFError:
        return 0
    except Exception as error:  # the decode process notices the end; the log has the cause
        known = isinstance(error, NanokvError)
        what = str(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.error("%s", what, exc_info=logger.isEnabledFor(logging.DEBUG))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
