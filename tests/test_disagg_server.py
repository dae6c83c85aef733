"""A prefill server and the strangers at its port: what one connection says or sends ends at most its own session."""

import contextlib
import errno
import os
import re
import select
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import msgspec
import oracles
import pytest
import torch
from click.testing import CliRunner
from test_disagg import PREFILL, SAMPLING
from test_disagg_hosts import ROOM, write_secret

from nanokv import LLM, DisaggConfig, EngineConfig, SamplingParams
from nanokv.cache.store import CacheStore
from nanokv.cli.disagg import prefill as prefill_command
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout, Plane
from nanokv.disagg import reception, server
from nanokv.disagg.channel import Channel, UnreadError
from nanokv.disagg.messages import (
    FROM_DECODE,
    VERSION,
    Abort,
    AbortAck,
    Challenge,
    Done,
    Failed,
    Hello,
    Layers,
    Ping,
    PoolMemory,
    Prefill,
    ProtocolError,
    encode,
    pack_ints,
    take_frames,
)
from nanokv.disagg.prefill_loop import PrefillLoop
from nanokv.disagg.secret import is_loopback, is_signed, new_nonce, read_secret, signed
from nanokv.disagg.transport import GROUP_BYTES, MAX_UNSENT, PageSender, bind
from nanokv.disagg.worker import PrefillModel

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PROMPT = oracles.prompt(60, seed=1)


# ---- bytes of other prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "codec"),
    [("llama", "raw"), ("llama", "tq4"), ("llama", "kivi4"), ("llama", "fp8/int4"), ("deepseek_v3", "raw"),
     ("qwen3_next", "raw"), ("qwen3_next", "kivi4")],
)  # fmt: skip
def test_what_is_sent_does_not_depend_on_what_the_pages_held_before(family, codec, tmp_path):
    """Pages, partial pages of codecs, states and checkpoints of a prompt, with every byte of the pool set before."""
    folder = oracles.llama(tmp_path, head_dim=32) if family == "llama" else oracles.checkpoint(family, tmp_path)
    with LLM(folder, codec=codec, num_pages=6, page_size=32, num_states=6) as llm:
        zero, full = (sent_over(llm, byte) for byte in (0, 0xA7))
    assert zero and zero == full


def sent_over(llm: LLM, byte: int) -> dict:
    """What a server sends for a prompt of 35 tokens whose pool was full of this byte."""
    store, sent = llm.engine.store, {}
    store.pages.data.fill_(byte)
    store.states.data.fill_(byte)
    near, far = socket.socketpair()
    with contextlib.closing(Channel(near)) as channel, far:
        loop = PrefillLoop(llm.engine.model, store, llm.config, 7, lambda *stream: session.between(*stream))
        session = server.SendingSession(channel, loop, 3.0)
        session.sender = SimpleNamespace(send=recorder(store, sent))
        has_states = len(store.states) > 0
        session.hear(
            msgspec.structs.replace(
                PREFILL, tokens=pack_ints(range(3, 38)), prompt_length=35, cached_length=0, pages=pack_ints([1, 4]),
                state=0 if has_states else None,
                checkpoints=((32, 1),) if has_states and store.layout.is_recurrent else (),
            )
        )  # fmt: skip
        while loop.has_work:
            for message in loop.step():
                assert isinstance(message, Done), message
                session.send(message)
    return sent


def recorder(store: CacheStore, sent: dict):
    def send(layers: Layers, ids: list[int]) -> None:
        slots = store.states if layers.states else store.pages
        data = slots.read(ids, layers.first, layers.last)
        sent[layers.states, layers.first, layers.last, layers.places] = data.numpy().tobytes()

    return send


def test_bytes_of_one_decode_process_never_reach_the_next(host, tiny_llama):
    """The next one's prompt is shorter than a page. No 16 bytes of the first one's pages are in its pool."""
    pools = []
    for prompt in (list(range(100, 160)), [7, 8, 9]):
        with LLM(tiny_llama, disagg=DisaggConfig(connect=host.address, min_tokens=1), **ROOM) as llm:
            llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0))
            assert llm.stats()["remote_prefills"] == 1 and llm.stats()["remote_lost"] == 0
            data = llm.engine.store.pages.data.numpy().tobytes()
            chunks = {data[start : start + 16] for start in range(0, len(data), 16)}
            pools.append(chunks - {bytes(16)})
    assert len(pools[0]) > 100 and len(pools[1]) > 10 and not pools[0] & pools[1]


# ---- a server, and connections that the tests play ---------------------------------------------------------------


@dataclass
class Host:
    """A prefill server that runs as a thread."""

    address: str
    digest: str
    secret: bytes | None = None

    def connect(self) -> socket.socket:
        name, port = self.address.split(":")
        return socket.create_connection((name, int(port)), timeout=20)

    def hello(self, **changes) -> Hello:
        fields = {"generation": 7, "version": VERSION, "digest": self.digest, "num_pages": 9, "num_states": 0}
        memory = PoolMemory(kind="sent", num_bytes=0)
        return Hello(**{**fields, "heartbeat_s": 10.0, "memory": memory, "nonce": b"n", **changes})

    def joined(self, **changes) -> tuple[socket.socket, list]:
        """A connection that has said HELLO, and the answers to it."""
        sock = self.connect()
        (challenge,) = messages_of(sock, 1)
        assert isinstance(challenge, Challenge)
        sock.sendall(encode(signed(self.hello(**changes), "decode", self.secret, challenge.nonce)))
        return sock, messages_of(sock, 1)


def messages_of(sock: socket.socket, count: int) -> list:
    """The next messages; fewer where the other side closes the connection."""
    buffer, messages = bytearray(), []
    while len(messages) < count:
        data = sock.recv(1)  # not a byte of the message behind
        if not data:
            break
        buffer += data
        messages += take_frames(buffer)
    return messages


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side closes the connection within the timeout of the socket, whatever it says before."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass
    return True


def start(folder: Path, secret: bytes | None = None) -> Host:
    model = PrefillModel(folder, EngineConfig(page_size=8, kv_memory="8MiB"), "cpu", "float32")
    listening = bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    threading.Thread(target=server.listen, args=(model, listening, secret), daemon=True).start()
    return Host(address, model.digest, secret)


@pytest.fixture(scope="module")
def host(tiny_llama) -> Host:
    return start(tiny_llama)


@pytest.fixture
def served(host, tiny_llama):
    """A function that fails unless a decode process is served now."""

    def serve() -> None:
        with LLM(tiny_llama, disagg=DisaggConfig(connect=host.address, min_tokens=8), **ROOM) as llm:
            llm.generate([PROMPT], GREEDY)
            assert llm.stats()["remote_prefills"] == 1 and llm.stats()["remote_lost"] == 0

    return serve


def test_silent_connections_cost_a_decode_process_nothing(host, served, caplog):
    """More of them than the server keeps. None of the limits in seconds has to pass."""
    strangers = [host.connect() for _ in range(reception.MAX_STRANGERS + 20)]
    served()
    assert "gives way to a new connection" in caplog.text and "said no HELLO" not in caplog.text
    for one in strangers:
        one.close()


def test_hello_has_a_deadline_that_single_bytes_do_not_move(host, monkeypatch, caplog):
    monkeypatch.setattr(reception, "HELLO_S", 0.4)
    with host.connect() as sock:
        messages_of(sock, 1)
        frame = encode(host.hello())
        for place in range(200):
            if select.select([sock], [], [], 0.05)[0]:
                break
            sock.sendall(frame[place : place + 1])
        assert is_closed(sock)
    assert "said no HELLO in 0.4 s" in caplog.text


def test_a_server_without_a_free_descriptor_drops_its_oldest_stranger_and_goes_on(caplog):
    with bind(("127.0.0.1", 0)) as listening:
        errors = [OSError(errno.EMFILE, "Too many open files")]
        stand_in = SimpleNamespace(
            setblocking=listening.setblocking, fileno=listening.fileno,
            accept=lambda: raise_(errors.pop()) if errors and host._strangers else listening.accept(),
        )  # fmt: skip
        host = reception.Reception(stand_in, "digest")
        first, second = (socket.create_connection(listening.getsockname(), timeout=20) for _ in range(2))
        with first, second:
            assert is_closed(first) and isinstance(messages_of(second, 1)[0], Challenge)
    assert not errors and "gives way to a new connection" in caplog.text


def test_a_server_without_a_descriptor_and_without_strangers_pauses(monkeypatch):
    """A connection that cannot be accepted stays readable, so that no wait would last."""
    pauses = []
    monkeypatch.setattr(reception, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    with bind(("127.0.0.1", 0)) as listening:
        errors = [OSError(errno.EMFILE, "Too many open files")] * 3
        stand_in = SimpleNamespace(
            setblocking=listening.setblocking, fileno=listening.fileno,
            accept=lambda: raise_(errors.pop()) if errors else listening.accept(),
        )  # fmt: skip
        reception.Reception(stand_in, "digest")
        with socket.create_connection(listening.getsockname(), timeout=20) as sock:
            assert isinstance(messages_of(sock, 1)[0], Challenge)
    assert pauses.count(reception.TICK_S) >= 3  # other servers of this process may pause meanwhile


def raise_(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (encode(Ping(generation=0)) * 100, "PING came before HELLO"),
        (encode(PREFILL), "PREFILL came before HELLO"),
        (b"\0\1\0\0", "its length says 65,536 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "malformed"),
        (encode(Done(generation=1, request="", attempt=1, tokens=(), logprobs=(), finished=0.0)), "malformed"),
    ],
)
def test_anything_but_hello_ends_the_connection(host, said, line, caplog):
    with host.connect() as sock:
        sock.sendall(said)
        assert is_closed(sock)
        name = f"127.0.0.1:{sock.getsockname()[1]}: "
    assert any(message.startswith(name) and line in message for message in caplog.messages)


def test_a_stranger_writes_no_line_of_its_own_into_the_log(host, caplog):
    said = msgspec.msgpack.encode({"type": "A\n127.0.0.1:9 connected \x1b[2J" + "B" * 5000})
    with host.connect() as sock:
        sock.sendall(len(said).to_bytes(4, "big") + said)
        assert is_closed(sock)
    (line,) = [message for message in caplog.messages if "malformed message" in message]
    assert line.isprintable() and len(line) < 400 and "A 127.0.0.1:9 connected \\x1b[2JB" in line


def test_a_long_heartbeat_of_a_peer_that_hangs_up_delays_no_other(host, served):
    sock, (answer,) = host.joined(heartbeat_s=86400.0)
    assert isinstance(answer, Failed) and "heartbeat_s=86400.0 there: expected 0.1 to 600" in answer.reason
    sock.close()
    sock, (answer,) = host.joined(heartbeat_s=600.0)
    assert isinstance(answer, Hello)
    sock.close()
    served()


def test_a_decode_process_that_falls_silent_ends_its_session(host, served, monkeypatch, caplog):
    """One that is served and one that waits; the third one is served."""
    monkeypatch.setattr(server, "SILENCE_S", 0.5)
    monkeypatch.setattr(reception, "SILENCE_S", 0.5)
    first, (answer,) = host.joined()
    assert isinstance(answer, Hello)
    second = host.connect()
    (challenge,) = messages_of(second, 1)
    second.sendall(encode(signed(host.hello(), "decode", None, challenge.nonce)))
    assert is_closed(first) and is_closed(second)
    assert sum("sent nothing for 0.5 s" in message for message in caplog.messages) == 2
    monkeypatch.undo()
    served()


def test_a_second_decode_process_waits_for_its_turn(host, tiny_llama):
    with LLM(tiny_llama, disagg=DisaggConfig(connect=host.address, min_tokens=8), **ROOM):
        sock = host.connect()
        messages_of(sock, 1)
        sock.sendall(encode(host.hello()))
        assert not select.select([sock], [], [], 0.5)[0]
    (answer,) = messages_of(sock, 1)
    assert isinstance(answer, Hello) and answer.generation == 7
    sock.close()


def test_answers_that_are_not_read_end_the_session(host, served, monkeypatch, caplog):
    monkeypatch.setattr(reception, "MAX_UNREAD", 1 << 20)
    sock, _ = host.joined()
    with pytest.raises(OSError), sock:
        for attempt in range(400):
            sock.sendall(encode(Abort(generation=7, request="x" * 100_000, attempt=10 + attempt)))
    monkeypatch.undo()
    served()
    assert "does not read: 1," in caplog.text


def test_pages_that_are_not_read_end_the_session_before_they_fill_the_memory():
    spec = LayerSpec(paged=(Plane("k", (1, 16, 64), torch.float32, 1),))
    store, near_far = CacheStore(PageLayout([spec] * 4, 16), 64), socket.socketpair()
    channel = Channel(near_far[0])
    sender = PageSender(channel, store, lambda layers: None, seconds=0.1)
    layers = Layers(generation=1, request="r", attempt=1, places=b"", first=0, last=4)
    with pytest.raises(UnreadError, match="has read nothing for 0.1 s"):
        for _ in range(1000):
            sender.send(layers, range(64))
    assert channel.queued - channel.sent <= MAX_UNSENT + GROUP_BYTES
    channel.close()
    near_far[1].close()


def test_one_receive_is_bounded_while_the_other_side_goes_on():
    near, far = socket.socketpair()
    channel, frame = Channel(near), encode(Ping(generation=1))
    writer = threading.Thread(target=far.sendall, args=(frame * 200_000,))
    writer.start()
    counts = []
    while sum(counts) < 200_000:
        counts.append(len(channel.receive()))
    writer.join()
    assert max(counts) * len(frame) <= (1 << 20) + (1 << 18) + len(frame)
    channel.close()
    far.close()


# ---- prompts of one session --------------------------------------------------------------------------------------


@pytest.fixture
def session(tiny_llama):
    """The session of a server with pages for two prompts like PREFILL, and the other end of its connection."""
    near, far = socket.socketpair()
    with LLM(tiny_llama, num_pages=6, page_size=8) as llm:
        loop = PrefillLoop(llm.engine.model, llm.engine.store, llm.config, generation=7)
        session = server.SendingSession(Channel(near), loop, 3.0)
        session.sender = SimpleNamespace(send=lambda layers, pages: None)
        heard = Channel(far)
        yield session, heard
        session.channel.close()
        heard.close()


def numbered(attempt: int, **changes) -> Prefill:
    return msgspec.structs.replace(PREFILL, request=f"r{attempt}", attempt=attempt, **changes)


def finish(session) -> None:
    while session.loop.has_work:
        for message in session.loop.step():
            session.send(message)


def test_prompts_that_wait_have_a_limit_in_bytes(session, monkeypatch):
    """Those beyond it fail at once, and their bytes are counted no more once a prompt has ended or was aborted."""
    session, heard = session
    monkeypatch.setattr(server, "MAX_HELD", 4 * server._weight(numbered(1)))
    for attempt in (1, 2, 3, 4, 5):
        session.hear(numbered(attempt))
    session.hear(Abort(generation=7, request="r4", attempt=4))
    session.hear(numbered(6))
    finish(session)
    answers = {(type(message), message.attempt) for message in heard.receive()}
    assert answers == {(Failed, 5), (AbortAck, 4), *((Done, attempt) for attempt in (1, 2, 3, 6))}
    assert session._held == 0


def test_whatever_a_prompt_that_waits_keeps_counts_against_the_limit():
    """Texts, numbers, and the objects of a prompt of one token."""
    least, long = numbered(1, tokens=b"1234", pages=b"1234"), msgspec.structs.replace(PREFILL, request="r" * 100_000)
    long_seed = msgspec.structs.replace(SAMPLING, seed="7" * 100_000)
    assert server._weight(least) >= 1000 and server._weight(long) > 100_000
    assert server._weight(numbered(1, sampling=long_seed)) > 100_000


def test_samples_that_are_computed_at_once_have_a_limit(session, monkeypatch):
    session, heard = session
    monkeypatch.setattr(server, "MAX_SAMPLES", 3)
    two = msgspec.structs.replace(SAMPLING, samples=2)
    session.hear(numbered(1, sampling=two))
    session.hear(numbered(2, sampling=two))
    session.hear(numbered(3, sampling=msgspec.structs.replace(SAMPLING, samples=4)))
    assert list(session._attempts) == [1] and session._pages.num_free == 3
    finish(session)
    failed, *done = heard.receive()
    assert isinstance(failed, Failed) and "1 to 3 samples" in failed.reason
    assert [(one.attempt, len(one.tokens)) for one in done] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"state": 3}, "this model has no recurrent states"),
        ({"checkpoints": ((16, 1),)}, "checkpoints of a state that does not exist"),
        (
            {"tokens": pack_ints([5] * 56), "prompt_length": 56, "pages": pack_ints(range(7))},
            "longer than the pool",
        ),
        ({"sampling": msgspec.structs.replace(SAMPLING, stop_token_ids=(10**12,), min_tokens=5)}, "stop_token_ids"),
        ({"sampling": msgspec.structs.replace(SAMPLING, logprobs=10**9)}, "logprobs"),
    ],
)
def test_a_prompt_that_cannot_be_served_fails_with_the_reason(session, fields, reason):
    session, heard = session
    session.hear(numbered(1, **fields))
    (failed,) = heard.receive()
    assert isinstance(failed, Failed) and reason in failed.reason
    assert session._held == 0 and session._pages.num_free == 6


def test_lists_of_numbers_have_a_limit_before_they_become_objects():
    body = msgspec.msgpack.decode(encode(PREFILL)[4:])
    for field in ("checkpoints", "stop_token_ids"):
        holder = body if field == "checkpoints" else body["sampling"]
        long = {**holder, field: [[8, 1]] * 70_000 if field == "checkpoints" else [5] * 70_000}
        changed = msgspec.msgpack.encode(long if holder is body else {**body, "sampling": long})
        with pytest.raises(ProtocolError, match="length <= 65536"):
            take_frames(bytearray(len(changed).to_bytes(4, "big") + changed), decoder=FROM_DECODE)


# ---- the secret --------------------------------------------------------------------------------------------------


def test_two_hosts_with_the_same_secret_work_together(tiny_llama, tmp_path):
    path = write_secret(tmp_path / "secret")
    there = start(tiny_llama, read_secret(path))
    chosen = DisaggConfig(connect=there.address, min_tokens=8, secret_file=path)
    with LLM(tiny_llama, disagg=chosen, **ROOM) as llm:
        llm.generate([PROMPT], GREEDY)
        assert llm.stats()["remote_prefills"] == 1 and llm.stats()["remote_lost"] == 0


@pytest.mark.parametrize(
    ("here", "there", "line"),
    [
        (None, b"a secret of the server", "a shared secret is asked for here: secret_file there is missing"),
        (b"some other secret", b"a secret of the server", "or has another one"),
        (b"a secret of a client", None, "no secret is known here: start this prefill process with --secret-file"),
    ],
)
def test_hosts_with_different_secrets_refuse_each_other(here, there, line, tiny_llama, tmp_path):
    path = None if here is None else write_secret(tmp_path / "secret", here.decode())
    chosen = DisaggConfig(connect=start(tiny_llama, there).address, secret_file=path)
    with pytest.raises(ConfigError, match=re.escape(line)):
        LLM(tiny_llama, disagg=chosen, **ROOM)


def test_a_server_that_does_not_know_the_secret_gets_no_prompt(tiny_llama, tmp_path):
    """It repeats HELLO, with the proof that it was sent or with none."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def serve() -> None:
            stranger.accept()[0].close()  # the connection that looks whether one is possible
            for proof in ("same", "none", "none"):
                sock, _ = stranger.accept()
                with sock:
                    sock.sendall(encode(Challenge(generation=0, nonce=b"1" * 32)))
                    (hello,) = messages_of(sock, 1)
                    sock.sendall(encode(hello if proof == "same" else msgspec.structs.replace(hello, proof=b"")))
                    heard.extend(messages_of(sock, 1))

        thread = threading.Thread(target=serve)
        thread.start()
        chosen = DisaggConfig(
            connect=f"127.0.0.1:{stranger.getsockname()[1]}", secret_file=write_secret(tmp_path / "secret")
        )
        with pytest.raises(ConfigError, match="does not know the secret"):
            LLM(tiny_llama, disagg=chosen, **ROOM)
        thread.join()
    assert heard == []


def test_a_proof_is_of_one_side_one_challenge_and_one_hello(host):
    hello, secret, challenge = host.hello(nonce=new_nonce()), b"a secret of sixteen", new_nonce()
    proven = signed(hello, "decode", secret, challenge)
    assert is_signed(proven, "decode", secret, challenge)
    assert not is_signed(proven, "prefill", secret, challenge)
    assert not is_signed(proven, "decode", secret, new_nonce())
    assert not is_signed(proven, "decode", b"another secret..", challenge)
    assert not is_signed(proven, "decode", None, challenge)
    assert not is_signed(hello, "decode", secret, challenge)
    for change in ({"nonce": new_nonce()}, {"digest": "other"}, {"heartbeat_s": 2.0}, {"generation": 8}):
        assert not is_signed(msgspec.structs.replace(proven, **change), "decode", secret, challenge)


def test_a_secret_file_is_a_private_file_of_some_length(tmp_path):
    path = write_secret(tmp_path / "secret", "0123456789abcdef")
    assert read_secret(path) == b"0123456789abcdef"
    path.chmod(0o604)
    with pytest.raises(ConfigError, match=r"other users may read it; run `chmod 600 "):
        read_secret(path)
    for text, found in (("", 0), ("short", 5), ("x" * 5000, 4097)):
        with pytest.raises(ConfigError, match=f"holds {found} bytes; expected 16 to 4096"):
            read_secret(write_secret(path, text))
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    for other in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(ConfigError, match="no regular file"):
            read_secret(other)


@pytest.mark.parametrize(
    ("host_name", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.2", False), ("::ffff:10.0.0.2", False), ("fe80::1%eth0", False)],
)  # fmt: skip
def test_loopback_is_told_from_other_addresses(host_name, expected):
    assert is_loopback(host_name) is expected


def test_a_server_beyond_loopback_needs_a_secret(tiny_llama):
    """In one line, before the model is loaded."""
    ended = CliRunner().invoke(prefill_command, [str(tiny_llama), "--listen", f"0.0.0.0:{free_port()}"])
    assert isinstance(ended.exception, ConfigError)
    assert "beyond loopback a shared secret is required: give --secret-file FILE" in str(ended.exception)


def free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as one:
        return one.getsockname()[1]
