"""Both ends of a connection between hosts, as threads of one process: how each handles the faults of the other."""

import contextlib
import gc
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import msgspec
import oracles
import pytest
import torch
from test_disagg import PREFILL, Stranger, hello_of
from test_disagg_hosts import ENVIRONMENT, ROOM, free_address

from nanokv import LLM, DisaggConfig, EngineConfig, SamplingParams
from nanokv.core.errors import ConfigError
from nanokv.core.request import Request
from nanokv.disagg import cluster, dispatcher, link, prefill_loop, server, supervisor, transport
from nanokv.disagg.channel import Channel
from nanokv.disagg.cluster import DisaggCluster
from nanokv.disagg.config import split_address
from nanokv.disagg.messages import VERSION, Abort, AbortAck, Done, Failed, Hello, Layers, PoolMemory, Prefill, encode
from nanokv.disagg.prefill_loop import PrefillLoop
from nanokv.disagg.transport import bind
from nanokv.disagg.worker import PrefillModel

SENT = PoolMemory(kind="sent", num_bytes=0)
HELLO = Hello(generation=7, version=VERSION, digest="d", num_pages=1, num_states=0, heartbeat_s=10.0, memory=SENT)
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture
def address(tiny_llama) -> str:
    """The address of a prefill process that runs as a thread."""
    address = free_address()
    model = PrefillModel(tiny_llama, EngineConfig(page_size=8, kv_memory="8MiB"), "cpu", "float32")
    threading.Thread(target=server.listen, args=(model, bind(split_address(address))), daemon=True).start()
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(split_address(address)):
            return address
        time.sleep(0.01)


def test_layers_that_arrive_for_longer_than_the_heartbeat_kill_no_worker(address, tiny_llama, monkeypatch):
    between, prompt = server.SendingSession.between, oracles.prompt(150, seed=1)

    def slow(session, *stream):
        time.sleep(0.1)
        return between(session, *stream)

    monkeypatch.setattr(server.SendingSession, "between", slow)
    monkeypatch.setattr(server, "GROUP_BYTES", 1)  # each layer is sent
    monkeypatch.setattr(prefill_loop, "STEP_TOKENS", 16)
    with LLM(tiny_llama, **ROOM) as llm:
        alone = llm.generate([prompt], GREEDY)[0].token_ids
    with LLM(tiny_llama, disagg=DisaggConfig(connect=address, heartbeat_s=1.0), **ROOM) as llm:
        output = llm.generate([prompt], GREEDY)[0]
        assert output.token_ids == alone and output.metrics.ttft > 1.5
        assert llm.stats()["worker_deaths"] == llm.stats()["remote_lost"] == 0


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


def prefill(attempt: int) -> Prefill:
    return msgspec.structs.replace(PREFILL, request=f"r{attempt}", attempt=attempt)


def abort(attempt: int) -> Abort:
    return Abort(generation=7, request=f"r{attempt}", attempt=attempt)


def step(session: server.SendingSession) -> None:
    for message in session.loop.step():
        session.send(message)


def test_a_server_computes_no_late_or_repeated_prompt(session):
    session, heard = session
    for attempt in (1, 1):
        session.hear(prefill(attempt))
    step(session)
    session.hear(prefill(1))
    session.hear(abort(3))
    session.hear(prefill(2))
    session.hear(prefill(3))
    assert not session.loop.has_work and session._pages.num_free == 6
    assert [type(message) for message in heard.receive()] == [Done, AbortAck]


def test_an_abort_of_a_waiting_prompt_leaves_earlier_ones_waiting(session):
    session, heard = session
    for attempt in (1, 2, 3, 4):
        session.hear(prefill(attempt))
    session.hear(abort(4))
    session.hear(abort(2))
    while session.loop.has_work:
        step(session)
    done = [message.attempt for message in heard.receive() if isinstance(message, Done)]
    assert done == [1, 3] and session._pages.num_free == 6


def test_a_prompt_with_checkpoints_and_no_state_fails_alone(session):
    session, heard = session
    session.hear(msgspec.structs.replace(prefill(1), checkpoints=((8, 0),)))
    session.hear(prefill(2))
    step(session)
    assert [(type(one), one.attempt) for one in heard.receive()] == [(Failed, 1), (Done, 2)]


@pytest.mark.parametrize("attempt", [1, 3])
def test_an_abort_of_another_request_leaves_an_attempt_alone(session, attempt):
    """Attempt 1 is computed, 3 waits for pages."""
    session, heard = session
    for one in (1, 2, 3):
        session.hear(prefill(one))
    session.hear(msgspec.structs.replace(abort(attempt), request="another"))
    while session.loop.has_work:
        step(session)
    done = [message.attempt for message in heard.receive() if isinstance(message, Done)]
    assert done == [1, 2, 3] and session._pages.num_free == 6


def test_an_error_of_one_session_is_one_line_and_the_server_goes_on(address, tiny_llama, monkeypatch, caplog):
    serve = server.serve_one
    first = iter([raising(ValueError("zip() arguments\nof any kind"))])
    monkeypatch.setattr(server, "serve_one", lambda *arguments: next(first, serve)(*arguments))
    monkeypatch.setattr(link, "RETRY_S", 0.1)
    with LLM(tiny_llama, disagg=DisaggConfig(connect=address), **ROOM) as llm:  # tries again
        assert llm.stats()["prefill_workers_ready"] == 1
    (line,) = [message for message in caplog.messages if "ValueError" in message]
    assert line.endswith(": ValueError: zip() arguments of any kind")


def test_a_server_keeps_nothing_of_a_decode_process_that_has_disconnected(address, tiny_llama, monkeypatch, caplog):
    """Nor does it wait for a garbage collection."""
    senders, sessions = [], []
    for made, name in ((senders, "PageSender"), (sessions, "SendingSession")):
        kind = getattr(server, name)
        monkeypatch.setattr(server, name, lambda *args, make=kind, made=made: referred(make(*args), made))
    gc.collect()
    gc.disable()
    try:
        with LLM(tiny_llama, disagg=DisaggConfig(connect=address), **ROOM):
            wait_until(lambda: senders)  # the server makes it after its HELLO
        wait_until(lambda: all(made() is None for made in (*senders, *sessions)))
        assert len(senders) == len(sessions) == 1
    finally:
        gc.enable()


def referred(made, to: list):
    to.append(weakref.ref(made))
    return made


def wait_until(holds, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_decode_process_that_ends_during_a_prompt_is_one_line_on_the_server(address, tiny_llama, monkeypatch, caplog):
    between, left = server.SendingSession.between, threading.Event()

    def slow(session, *stream):
        assert left.wait(30)
        return between(session, *stream)

    monkeypatch.setattr(server.SendingSession, "between", slow)
    with LLM(tiny_llama, disagg=DisaggConfig(connect=address, min_tokens=8, heartbeat_s=2.0), **ROOM) as llm:
        llm.engine.add_request(Request(oracles.prompt(150, seed=1), GREEDY))
        llm.engine.step()
    left.set()
    wait_until(lambda: [one for one in caplog.messages if one.endswith("disconnected")], 30)
    lines = [record for record in caplog.records if record.message.startswith("127.0.0.1")]
    assert len(lines) == 2 and not any(record.exc_info for record in caplog.records)  # connected, disconnected


def split_of(folder, **fields) -> DisaggCluster:
    return DisaggCluster(DisaggConfig(**fields), folder, EngineConfig(page_size=8), torch.device("cpu"), torch.float32)


def test_a_wrong_address_closes_the_other_connections_and_starts_nothing(tiny_llama, monkeypatch):
    started = []
    monkeypatch.setattr(cluster, "LocalWorker", started.append)
    with socket.create_server(("127.0.0.1", 0)) as right:
        addresses = f"127.0.0.1:{right.getsockname()[1]}", free_address()
        with pytest.raises(ConfigError, match=re.escape(f"connect='{addresses[1]}'")):
            split_of(tiny_llama, connect=addresses, prefill_workers=2)
        sock, _ = right.accept()
        with sock:
            sock.settimeout(5.0)
            assert sock.recv(1) == b"" and not started


def test_a_port_of_another_service_is_named(tiny_llama):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet():
            for _ in range(1 + supervisor.MAX_DEATHS):  # the first connection looks whether one is possible
                sock, _ = other.accept()
                greeted.append(sock)
                sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        greeted: list[socket.socket] = []
        threading.Thread(target=greet, daemon=True).start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=re.escape(f"connect='{address}': no nanokv prefill process there")):
            LLM(tiny_llama, disagg=DisaggConfig(connect=address), **ROOM)
        for sock in greeted:
            sock.close()


def test_a_worker_that_cannot_start_ends_the_workers_before_it(tiny_llama, monkeypatch):
    strangers = [Stranger()]
    monkeypatch.setattr(cluster, "LocalWorker", lambda spec: strangers[int(spec.name[-1])])
    with pytest.raises(IndexError):
        split_of(tiny_llama, prefill_workers=2)
    assert strangers[0].gone


def test_a_wait_for_a_worker_is_logged_once(address, tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(supervisor, "TELL_S", 0.1)
    with LLM(tiny_llama, disagg=DisaggConfig(connect=address), **ROOM) as first:
        threading.Timer(0.5, first.close).start()
        LLM(tiny_llama, disagg=DisaggConfig(connect=address), **ROOM).close()
    waits = [record.message for record in caplog.records if record.message.startswith("waiting for")]
    assert waits == [f"waiting for prefill {address}: it loads its model, or serves another decode process"]


def test_a_restarted_worker_that_is_never_ready_is_killed(monkeypatch):
    monkeypatch.setattr(supervisor, "START_S", 0.05)
    strangers, ours = [], dispatcher.Dispatcher(DisaggConfig())
    ours.allocate(4096, torch.device("cpu"))

    def start() -> Stranger:
        strangers.append(Stranger())
        if len(strangers) == 1:
            strangers[0].mouth.sendall(encode(hello_of(ours)))
        return strangers[-1]

    ours.workers.add(start)
    ours.open(256, 4, 0, "d")
    strangers[0].gone = True
    deadline = time.monotonic() + 60
    while len(strangers) < 3:
        assert time.monotonic() < deadline
        ours.collect(wait=False)
    assert strangers[1].gone
    ours.close()


def test_a_server_uses_the_heartbeat_of_the_decode_process(address, tiny_llama, monkeypatch):
    told, begin = [], server.SendingSession.__init__

    def recorded(session, channel, loop, heartbeat_s, silence_s):
        told.append(heartbeat_s)
        begin(session, channel, loop, heartbeat_s, silence_s)

    monkeypatch.setattr(server.SendingSession, "__init__", recorded)
    LLM(tiny_llama, disagg=DisaggConfig(connect=address, heartbeat_s=2), **ROOM).close()
    assert told == [2.0]


def test_each_loss_of_a_host_is_logged_once(address, tiny_llama, monkeypatch, caplog):
    with LLM(tiny_llama, disagg=DisaggConfig(connect=address, min_tokens=8), **ROOM) as llm:
        monkeypatch.setattr(link.PageReceiver, "receive", raising(EOFError("Connection reset by peer")))
        llm.generate([oracles.prompt(40, seed=1)], GREEDY)
        deaths = llm.stats()["worker_deaths"]  # the prompt goes there again, if the connection is made in time
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    lines = [message for message in warnings if message.startswith(f"prefill {address} ") and "is back" not in message]
    assert len(lines) == deaths in (1, 2)
    assert lines[0].endswith(": 1 prompts are computed here, tried again")


@pytest.mark.parametrize(("memory", "lived_s", "starts"), [(SENT, 60.0, 7), (None, 60.0, 3), (None, -1.0, 7)])
def test_hello_of_a_host_and_a_long_life_reset_the_count_of_deaths(memory, lived_s, starts, monkeypatch, caplog):
    """Six disconnects without a prompt between."""
    monkeypatch.setattr(supervisor, "LIVED_S", lived_s)
    strangers, ours = [], dispatcher.Dispatcher(DisaggConfig())
    ours.allocate(4096, torch.device("cpu"))

    def start() -> Stranger:
        strangers.append(Stranger())
        strangers[-1].mouth.sendall(encode(hello_of(ours)))
        return strangers[-1]

    ours.workers.add(start, memory)
    ours.open(256, 4, 0, "d")
    for _ in range(6):
        strangers[-1].gone = True
        for _ in range(2):
            ours.collect(wait=False)
    assert len(strangers) == starts
    ours_alone = [message for message in caplog.messages if message.startswith("stranger ")]  # other servers log, too
    assert ours_alone[0] == f"stranger {'has died: a new one starts' if memory is None else 'is gone: tried again'}"
    ours.close()


def raising(error: Exception):
    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize("level", ["WARNING", pytest.param("DEBUG", marks=pytest.mark.slow)])
def test_a_worker_that_cannot_load_logs_the_cause_in_one_line(tmp_path, level):
    """With its traceback at the level DEBUG."""
    spec = msgspec.json.encode({"name": "prefill 0", "folder": str(tmp_path), "device": "cpu", "dtype": "float32",
                               "config": {"nothing": 1}}).decode()  # fmt: skip
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = (
            "import logging, sys; from nanokv.disagg import worker; "
            f"logging.getLogger('nanokv').setLevel('{level}'); sys.exit(worker.main(sys.argv[1:]))"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program, str(theirs.fileno()), spec],
            pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
    first, *more = ended.stderr.splitlines()
    assert ended.returncode == 1 and first.startswith("[prefill 0] nothing: ")
    assert bool(more) == (level == "DEBUG")


def test_layers_before_hello_end_the_connection(caplog):
    caplog.set_level("INFO", "nanokv")
    layers = Layers(generation=7, request="r", attempt=1, places=b"", first=0, last=1)
    with socket.create_server(("127.0.0.1", 0)) as host:
        address = f"127.0.0.1:{host.getsockname()[1]}"
        peer = link.HostLink(address, lambda: None, 1.0)
        peer.channel.send(HELLO)
        sock, _ = host.accept()
        with sock:
            sock.sendall(encode(layers))
            peer._thread.join(60.0)
    assert peer.gone and f"prefill {address}: LAYERS came before HELLO" in caplog.messages
    peer.close()


def test_a_done_whose_pages_have_not_all_come_ends_the_connection_and_costs_no_token(address, tiny_llama, monkeypatch):
    """Otherwise the zeros of a new page, or another prompt's keys, would be published."""
    prompt = oracles.prompt(40, seed=3)
    with LLM(tiny_llama, **ROOM) as alone:
        expected = alone.generate([prompt], GREEDY)[0].token_ids
    send, calls = transport.PageSender.send, []

    def forgetful(self, layers, ids):
        calls.append(layers.first)
        if len(calls) > 1:
            send(self, layers, ids)

    monkeypatch.setattr(transport.PageSender, "send", forgetful)
    with LLM(tiny_llama, disagg=DisaggConfig(connect=address, min_tokens=8), **ROOM) as llm:
        assert llm.generate([prompt], GREEDY)[0].token_ids == expected
        assert calls and llm.stats()["worker_deaths"] == 1


def test_a_host_beyond_loopback_is_not_sent_prompts_without_a_secret(address, monkeypatch):
    monkeypatch.setattr(link, "is_loopback", lambda host: False)
    with pytest.raises(ConfigError, match="give a secret_file"):
        link.connect(address, 10.0, None)
    link.connect(address, 10.0, b"a secret of the two hosts").close()
