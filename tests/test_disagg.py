"""Prefill in one process and decode in another: the tokens of one process; the protocol, and refusals."""

import contextlib
import fcntl
import os
import re
import resource
import socket
import threading
from array import array
from dataclasses import replace
from pathlib import Path

import msgspec
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanokv import LLM, DisaggConfig, EngineConfig, SamplingParams, codecs
from nanokv.core.errors import ConfigError
from nanokv.core.request import Request, RequestOutput
from nanokv.disagg import cluster, prefill_loop
from nanokv.disagg.channel import Channel, wait
from nanokv.disagg.dispatcher import Dispatcher
from nanokv.disagg.granted_cache import GrantedCache, GrantedPages
from nanokv.disagg.messages import (
    VERSION,
    Abort,
    AbortAck,
    Done,
    Failed,
    Hello,
    Ping,
    PoolMemory,
    Prefill,
    ProtocolError,
    Sampling,
    decode,
    encode,
    pack_ints,
    take_frames,
    unpack_ints,
)
from nanokv.disagg.prefill_loop import PrefillLoop
from nanokv.disagg.shared_buffer import SharedBuffer, map_pool
from nanokv.disagg.worker import WorkerSpec, refusal, run
from nanokv.engine.engine import Engine

LENGTHS = (1, 3, 17, 64, 130)


def prompts() -> list[list[int]]:
    return oracles.prompts(LENGTHS)


PARAMS = [
    SamplingParams(max_tokens=8, temperature=0.0 if i % 2 else 1.0, seed=i, logprobs=1, ignore_eos=True, n=1 + i % 3)
    for i in range(len(prompts()))
]


class Thread:
    """A prefill worker as a thread of this process: a process of its own takes seconds to import torch."""

    def __init__(self, spec: WorkerSpec) -> None:
        ours, theirs = socket.socketpair()
        self.name, self.why, self.channel = spec.name, None, Channel(ours)
        self._end, end = os.pipe()
        self._thread = threading.Thread(target=self._run, args=(spec, Channel(theirs), end))
        self._thread.start()

    def _run(self, spec: WorkerSpec, channel: Channel, end: int) -> None:
        with contextlib.suppress(EOFError):
            run(spec, channel)
        channel.close()
        os.close(end)

    def fileno(self) -> int:
        return self._end

    def kill(self) -> None:
        self.channel.close()

    @property
    def gone(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self.channel.close()
        os.close(self._end)


@pytest.mark.parametrize("family", [*oracles.FAMILIES, "qwen3_next in a process"])
def test_every_family_answers_as_one_process_does(family, tmp_path, monkeypatch):
    """Greedy and sampled, several samples, log-probabilities, with hits and without."""
    family, _, in_a_process = family.partition(" ")
    if not in_a_process:
        monkeypatch.setattr(cluster, "LocalWorker", Thread)
    folder = oracles.checkpoint(family, tmp_path)
    room = {"num_pages": 256, "num_states": 40, "debug_checks": True}
    with LLM(folder, **room) as llm:
        alone = [(output.token_ids, output.logprobs) for output in llm.generate(prompts(), PARAMS)]
    with LLM(folder, disagg=DisaggConfig(min_tokens=2), **room) as llm:
        for _ in range(2):  # the second time with hits
            assert [(output.token_ids, output.logprobs) for output in llm.generate(prompts(), PARAMS)] == alone
        stats = llm.stats()
        assert stats["remote_prefills"] >= 6 and stats["hit_tokens"] > 0
        assert stats["remote_lost"] == stats["worker_deaths"] == stats["stale_messages"] == 0
        llm.engine.cache.check()


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama whose heads every codec takes."""
    return oracles.llama(tmp_path_factory.mktemp("wide"), head_dim=64)


@pytest.mark.parametrize("codec", [*(name for name in codecs.NAMES if name != "raw"), "tq4/int8", "tq4 qwen3_next"])
def test_every_codec_answers_as_one_process_does(codec, wide, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "LocalWorker", Thread)
    codec, _, family = codec.partition(" ")
    folder = oracles.checkpoint(family, tmp_path) if family else wide
    room = {"num_pages": 64, "page_size": 32, "num_states": 40, "codec": codec, "debug_checks": True}
    batch, params = prompts()[2:6], PARAMS[2:6]
    with LLM(folder, **room) as llm:
        alone = [output.token_ids for output in llm.generate(batch, params)]
    with LLM(folder, disagg=DisaggConfig(min_tokens=2), **room) as llm:
        for _ in range(2):  # the second time with hits
            assert [output.token_ids for output in llm.generate(batch, params)] == alone
        assert llm.stats()["remote_prefills"] >= 4 and llm.stats()["remote_lost"] == 0
        assert llm.stats()["hit_tokens"] > 0


def test_two_prefill_workers_share_the_work(tiny_llama, monkeypatch):
    monkeypatch.setattr(cluster, "LocalWorker", Thread)
    batch = [oracles.prompt(100, seed=20 + i) for i in range(6)]
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM(tiny_llama, num_pages=128) as llm:
        alone = [output.token_ids for output in llm.generate(batch, greedy)]
    with LLM(tiny_llama, disagg=DisaggConfig(prefill_workers=2), num_pages=128) as llm:
        assert llm.stats()["prefill_workers_ready"] == 2
        for prompt in batch:
            llm.engine.add_request(Request(prompt, greedy))
        llm.engine.step()
        shares = [len(slot.grants) for slot in llm.cluster.dispatcher.workers.slots]
        assert shares == [3, 3] or sum(shares) < 6  # some have ended already
        llm.reset_prefix_cache()
        assert [output.token_ids for output in llm.generate(batch, greedy)] == alone


def test_short_suffixes_are_computed_here(tiny_llama, monkeypatch):
    monkeypatch.setattr(cluster, "LocalWorker", Thread)
    greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LLM(tiny_llama, disagg=DisaggConfig(min_tokens=50), num_pages=64) as llm:
        text = oracles.prompt(120, seed=1)
        llm.generate([oracles.prompt(49, seed=2)], greedy)
        assert llm.stats()["remote_prefills"] == 0
        llm.generate([text], greedy)
        assert llm.stats()["remote_prefills"] == 1
        llm.generate([[*text, 5, 6, 7]], greedy)  # all but a few tokens are cached
        assert llm.stats()["remote_prefills"] == 1
        llm.score(text)
        assert llm.stats()["remote_prefills"] == 1


@pytest.fixture
def three_deliveries(tiny_llama, monkeypatch):
    """An engine with three deliveries that it has not collected, and the right answers by request id."""
    monkeypatch.setattr(cluster, "LocalWorker", Thread)
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    texts = [oracles.prompt(100, seed=30 + i) for i in range(3)]
    with LLM(tiny_llama, num_pages=64) as llm:
        alone = [output.token_ids for output in llm.generate(texts, greedy)]
    with LLM(tiny_llama, disagg=DisaggConfig(), num_pages=64, debug_checks=True) as llm:
        ids, dispatcher = [llm.engine.add_request(Request(text, greedy)) for text in texts], llm.cluster.dispatcher
        with monkeypatch.context() as deaf:
            deaf.setattr(dispatcher, "_listen", lambda: None)
            llm.engine.step()
        while len(dispatcher._results) < 3:
            dispatcher.workers.select(0.05)
            dispatcher._listen()
        yield llm.engine, dict(zip(ids, alone, strict=True))


def test_pages_behind_logits_that_are_not_finite_are_not_published(three_deliveries):
    engine, alone = three_deliveries
    results = engine.transfers.connectors[0]._results
    results[0] = replace(results[0], tokens=(None,))
    first = results[0].request.request_id
    ends = finished(engine)
    ill = ends.pop(first)
    assert ill.finish_reason == "error" and "not finite" in ill.error
    assert all(ends[name].token_ids == alone[name] for name in ends)
    engine.cache.check()
    assert engine.cache.tree.prefix_length(array("i", ill.prompt_token_ids).tobytes(), None) == 0


def finished(engine: Engine) -> dict[str, RequestOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return {output.request_id: output for output in outputs if output.finish_reason is not None}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_delivery_that_fails_loses_no_other_one(three_deliveries, monkeypatch, failure):
    engine, alone = three_deliveries
    adopt, first = engine.cache.adopt, next(iter(alone))

    def failing(request, num_tokens):
        monkeypatch.setattr(engine.cache, "adopt", adopt)
        adopt(request, num_tokens)
        raise failure("injected fault")

    monkeypatch.setattr(engine.cache, "adopt", failing)
    if failure is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    ends = finished(engine)
    if failure is RuntimeError:
        assert "injected fault" in ends.pop(first).error
        del alone[first]
    assert {request_id: output.token_ids for request_id, output in ends.items()} == alone
    engine.cache.check()
    assert engine.stats()["pages_held"] == 0


@pytest.mark.parametrize("where", ["before the scheduler", "behind the scheduler"])
def test_pages_of_an_aborted_request_are_freed_despite_ctrl_c(three_deliveries, monkeypatch, where):
    engine, alone = three_deliveries
    first = engine.transfers.connectors[0]._results[0].request.request_id
    engine.abort(first)
    owner, name = (engine.scheduler, "remove") if where == "before the scheduler" else (engine.cache, "release")

    def failing(request):
        monkeypatch.delattr(owner, name)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, failing, raising=False)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    ends = finished(engine)
    ends.pop(first, None)
    assert all(output.token_ids == alone[name] for name, output in ends.items()) and len(ends) == 2
    engine.cache.check()
    assert engine.stats()["pages_held"] == 0 and not engine.scheduler.running


class Interrupted(dict):
    """Grants that are interrupted by Ctrl-C where one of them ends."""

    def pop(self, *arguments):
        raise KeyboardInterrupt

    __delitem__ = pop


def test_a_result_whose_grant_stays_by_ctrl_c_is_delivered_once(played):
    dispatcher, stranger = played
    (slot,) = dispatcher.workers.slots
    slot.grants = Interrupted()
    answered(dispatcher, stranger, (5,))
    with pytest.raises(KeyboardInterrupt):
        dispatcher.collect(wait=True)
    assert [delivery.tokens for delivery in dispatcher.collect(wait=False)] == [(5,)]
    assert dispatcher.stats()["requests_remote"] == 0


def test_a_start_that_ctrl_c_interrupts_is_repeated(played, monkeypatch):
    dispatcher, stranger = played
    (slot,) = dispatcher.workers.slots
    starts = iter([KeyboardInterrupt(), None])

    def start() -> Stranger:
        if next(starts):
            raise KeyboardInterrupt
        return Stranger()

    slot.start, stranger.gone = start, True
    with pytest.raises(KeyboardInterrupt):
        dispatcher.collect(wait=False)
    dispatcher.collect(wait=False)
    assert slot.peer is not None and slot.peer is not stranger and slot.state == "starting"


@pytest.mark.parametrize("is_sent", [False, True])
def test_a_worker_is_greeted_though_ctrl_c_comes_in_between(played, monkeypatch, is_sent):
    """Otherwise it would wait for HELLO for ever, and this process for it."""
    dispatcher, stranger = played
    (slot,) = dispatcher.workers.slots
    second, stranger.gone = Stranger(), True
    slot.start = lambda: second
    with monkeypatch.context() as patch:
        patch.setattr(second.channel, "send", interrupted(second.channel.send, is_sent))
        dispatcher.collect(wait=False)  # reaps the first one and starts the second
        with pytest.raises(KeyboardInterrupt):
            dispatcher.collect(wait=False)
    dispatcher.collect(wait=False)
    with contextlib.closing(Channel(second.mouth)) as far:
        assert [type(message) for message in far.receive()] == [Hello] * (1 + is_sent)
    assert slot.state == "greeted"


@pytest.mark.parametrize("is_sent", [False, True])
def test_an_abort_that_ctrl_c_interrupts_costs_no_worker(played, monkeypatch, is_sent):
    dispatcher, stranger = played
    (slot,) = dispatcher.workers.slots
    request = long_request()
    dispatcher.start(request, request.num_tokens, [])
    with monkeypatch.context() as patch:
        patch.setattr(stranger.channel, "send", interrupted(stranger.channel.send, is_sent))
        with pytest.raises(KeyboardInterrupt):
            dispatcher.abort(request)
    assert dispatcher.abort(request) and slot.grants[1].aborted
    answer = AbortAck(generation=dispatcher.generation, request="r", attempt=1)
    stranger.mouth.sendall(encode(answer if is_sent else done_of(dispatcher, (5,))))
    (delivery,) = dispatcher.collect(wait=True)
    assert (delivery.request, delivery.num_tokens) == (request, 0)
    assert not stranger.gone and dispatcher.stats()["worker_deaths"] == 0


def interrupted(call, is_done: bool):
    """`call` with Ctrl-C behind it, or in place of it."""

    def run(*arguments):
        if is_done:
            call(*arguments)
        raise KeyboardInterrupt

    return run


@pytest.mark.parametrize("what", ["move", "start"])
def test_a_transfer_that_fails_ends_its_own_requests_only(tiny_llama, monkeypatch, what):
    """A step whose copies were not made is not run: its pages would hold tokens of another request."""
    monkeypatch.setattr(cluster, "LocalWorker", Thread)
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    long, short = oracles.prompt(100, seed=1), oracles.prompt(9, seed=2)
    with LLM(tiny_llama, disagg=DisaggConfig(), num_pages=64, debug_checks=True) as llm:
        engine, launched = llm.engine, []
        (alone,) = (output.token_ids for output in llm.generate([short], greedy))
        run, owner = engine.runner.run, engine.runner if what == "move" else llm.cluster.dispatcher

        def failing(*arguments):
            monkeypatch.delattr(owner, what)
            raise RuntimeError("injected fault")

        monkeypatch.setattr(owner, what, failing, raising=False)
        monkeypatch.setattr(
            engine.runner, "run", lambda requests, in_flight: launched.append(requests) or run(requests, in_flight)
        )
        ids = [engine.add_request(Request(text, greedy)) for text in (long, short)]
        outputs = engine.step()
        ends = {output.request_id: output for output in outputs if output.finish_reason is not None} | finished(engine)
        assert "injected fault" in ends[ids[0]].error
        if what == "move":
            assert not launched and "injected fault" in ends[ids[1]].error
        else:
            assert ends[ids[1]].token_ids == alone
        engine.cache.check()
        assert engine.stats()["pages_held"] == 0


# ---- messages -----------------------------------------------------------------------------------------------------

SAMPLING = Sampling(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, min_tokens=0, stop_token_ids=(), ignore_eos=True, logprobs=None,
    repetition_penalty=1.0, seed="5", index=0, samples=1,
)  # fmt: skip
PREFILL = Prefill(
    generation=7, request="r", attempt=1, tokens=pack_ints(range(3, 23)), prompt_length=20, cached_length=8,
    pages=pack_ints([4, 1, 3]), state=None, checkpoints=(), sampling=SAMPLING,
)  # fmt: skip


def test_the_wire_form_is_what_is_documented():
    frame = encode(Abort(generation=7, request="r", attempt=3))
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert msgspec.msgpack.decode(frame[4:]) == {"type": "ABORT", "generation": 7, "request": "r", "attempt": 3}
    assert unpack_ints(PREFILL.pages).tolist() == [4, 1, 3] and PREFILL.pages[:4] == b"\x04\0\0\0"


@given(
    st.lists(st.sampled_from([PREFILL, Ping(generation=1), AbortAck(generation=1, request="", attempt=0)])),
    st.integers(1, 300),
)
def test_messages_survive_any_cut_of_the_stream(messages, size):
    stream, buffer, received = b"".join(encode(message) for message in messages), bytearray(), []
    for start in range(0, len(stream), size):
        buffer += stream[start : start + size]
        received += take_frames(buffer)
    assert received == messages and not buffer


@given(st.binary(max_size=60))
def test_malformed_bytes_raise_nothing_but_a_protocol_error(body):
    for attempt in (lambda: decode(body), lambda: take_frames(bytearray(body)), lambda: unpack_ints(body)):
        try:
            attempt()
        except ProtocolError as error:
            assert "\n" not in str(error)


@given(st.integers(0, len(encode(PREFILL)) - 5), st.integers(0, 255))
def test_a_damaged_prefill_is_refused_or_harmless(place, byte):
    body = bytearray(encode(PREFILL)[4:])
    body[place] = byte
    with contextlib.suppress(ProtocolError):
        decode(body)


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop(tiny_llama):
    with LLM(tiny_llama, num_pages=8, page_size=8) as llm:
        yield PrefillLoop(llm.engine.model, llm.engine.store, llm.config, generation=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", b""),
        ("tokens", b"abc"),
        ("tokens", pack_ints([5] * 19 + [256])),
        ("prompt_length", 0),
        ("prompt_length", 21),
        ("cached_length", 7),
        ("cached_length", 24),
        ("cached_length", -8),
        ("pages", pack_ints([4, 1])),
        ("pages", pack_ints([4, 1, 8])),
        ("pages", pack_ints([4, 1, -1])),
        ("pages", pack_ints([4, 1, 1])),
        ("state", 0),
        ("checkpoints", ((8, 1),)),
        ("sampling", msgspec.structs.replace(SAMPLING, samples=0)),
        ("sampling", msgspec.structs.replace(SAMPLING, seed="five")),
        ("sampling", msgspec.structs.replace(SAMPLING, temperature=-1.0)),
        ("sampling", msgspec.structs.replace(SAMPLING, stop_token_ids=(10**12,), min_tokens=5)),
        ("sampling", msgspec.structs.replace(SAMPLING, stop_token_ids=(-1,))),
        ("sampling", msgspec.structs.replace(SAMPLING, logprobs=257)),
        ("sampling", msgspec.structs.replace(SAMPLING, index=-1)),
    ],
)
def test_an_invalid_prefill_is_answered_with_failed(loop, field, value):
    answer = loop.accept(msgspec.structs.replace(PREFILL, **{field: value}))
    assert isinstance(answer, Failed) and answer.request == "r" and not loop.has_work


def test_a_repeated_prefill_is_computed_once(loop):
    assert loop.accept(PREFILL) is None and loop.accept(PREFILL) is None
    (done,) = loop.step()
    assert (done.request, done.attempt, len(done.tokens)) == ("r", 1, 1)
    assert not loop.has_work and loop.step() == []
    assert loop.accept(PREFILL) is None
    assert not loop.has_work  # its pages have other owners
    assert loop.abort(Abort(generation=7, request="r", attempt=3)) == AbortAck(generation=7, request="r", attempt=3)
    for attempt in (2, 3):
        assert loop.accept(msgspec.structs.replace(PREFILL, attempt=attempt)) is None
    assert not loop.has_work


def test_numbers_that_a_codec_cannot_hold_fail_only_their_attempt(tiny_llama, monkeypatch):
    with LLM(tiny_llama, num_pages=8, page_size=8, codec="tq4") as llm:
        loop = PrefillLoop(llm.engine.model, llm.engine.store, llm.config, generation=7)
        mixer = llm.engine.model.layers[0].mixer
        project = mixer.qkv

        def broken(x: torch.Tensor) -> torch.Tensor:
            qkv = project(x)
            qkv[2, -1] = float("inf")  # a row of the first request
            return qkv

        monkeypatch.setattr(mixer, "qkv", broken)
        assert loop.accept(PREFILL) is None
        other = msgspec.structs.replace(PREFILL, request="s", attempt=2, pages=pack_ints([4, 0, 2]))
        assert loop.accept(other) is None
        answers = {answer.request: answer for answer in loop.step()}
        assert isinstance(answers["r"], Failed) and "codec='tq4': keys or values" in answers["r"].reason
        assert isinstance(answers["s"], Done) and answers["s"].tokens[0] is not None
        assert not loop.has_work


def test_prompts_that_end_before_a_step_fails_are_done_and_the_rest_fail(tiny_llama, monkeypatch):
    with LLM(tiny_llama, num_pages=12, page_size=8) as llm:
        loop = PrefillLoop(llm.engine.model, llm.engine.store, llm.config, generation=7)
        append = loop.append

        def failing(request, *arguments):
            if loop.prompt(request).attempt == 2:
                raise RuntimeError("injected fault")
            append(request, *arguments)

        monkeypatch.setattr(loop, "append", failing)
        for number in (1, 2, 3):
            pages = pack_ints(range(3 * number, 3 * number + 3))
            loop.accept(msgspec.structs.replace(PREFILL, request=str(number), attempt=number, pages=pages))
        answers = {answer.request: answer for answer in loop.step()}
        assert {request: type(answer) for request, answer in answers.items()} == {"1": Done, "2": Failed, "3": Failed}
        assert "injected fault" in answers["2"].reason and not loop.has_work


@pytest.fixture(scope="module")
def hybrid_loop(tmp_path_factory):
    """A loop over a model with recurrent states, and two prompts. The first one stops at a checkpoint on its way."""
    folder = oracles.checkpoint("qwen3_next", tmp_path_factory.mktemp("hybrid"))
    first = msgspec.structs.replace(PREFILL, cached_length=0, state=0, checkpoints=((8, 1),))
    second = msgspec.structs.replace(
        PREFILL, attempt=2, tokens=pack_ints(range(40, 60)), cached_length=0, pages=pack_ints([0, 2, 5]), state=2
    )
    with LLM(folder, num_pages=8, page_size=8, num_states=8) as llm:
        yield lambda: PrefillLoop(llm.engine.model, llm.engine.store, llm.config, generation=7), first, second


def test_samples_of_one_request_get_their_own_tokens(hybrid_loop):
    """Preempted samples are attempts of their own, and the later one may end first."""
    make, first, second = hybrid_loop
    answers = []
    for other in ("another", second.request):
        loop = make()
        assert loop.accept(first) is loop.accept(msgspec.structs.replace(second, request=other)) is None
        ends = [message for _ in range(2) for message in loop.step()]
        assert [message.attempt for message in ends] == [2, 1] and not loop.has_work
        answers.append([message.tokens for message in ends])
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]


def test_a_copy_that_fails_fails_every_open_attempt(hybrid_loop, monkeypatch):
    """Also one that is not in the step: the checkpoint may be its own."""
    monkeypatch.setattr(prefill_loop, "STEP_TOKENS", 8)
    make, first, second = hybrid_loop
    loop = make()
    assert loop.accept(first) is loop.accept(second) is None
    assert loop.step() == []
    monkeypatch.setattr(loop._runner, "move", raising(RuntimeError("injected fault")))
    assert [(type(message), message.attempt) for message in loop.step()] == [(Failed, 1), (Failed, 2)]
    assert not loop.has_work


def raising(error: BaseException):
    def fail(*arguments):
        raise error

    return fail


def test_another_version_or_digest_is_refused():
    memory = PoolMemory(kind="memfd", num_bytes=1)
    hello = Hello(generation=1, version=VERSION, digest="d", num_pages=1, num_states=0, heartbeat_s=10.0, memory=memory)
    assert refusal(hello, "d", ("memfd",)) is None
    for change, reason in (
        ({"version": 99}, "version 99"), ({"digest": "e"}, "another model"), ({"memory": None}, "memory None"),
        *(({"heartbeat_s": seconds}, f"heartbeat_s={seconds}") for seconds in (0.0, 86400.0, torch.inf, torch.nan)),
    ):  # fmt: skip
        assert reason in refusal(msgspec.structs.replace(hello, **change), "d", ("memfd",))
    assert "memory 'memfd' there" in refusal(hello, "d", ("sent",))


class Stranger:
    """A peer that the test plays itself, over a socket pair."""

    name = "stranger"
    why = None

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel, self.mouth = Channel(ours), theirs
        self.gone = False
        self._wake, self._end = socket.socketpair()

    def fileno(self) -> int:
        return self._wake.fileno()

    def kill(self) -> None:
        self.gone = True
        self._end.close()

    def close(self) -> None:
        self.channel.close()


@pytest.mark.parametrize(
    "answer",
    [
        Hello(generation=0, version=99, digest="d", num_pages=4, num_states=0, heartbeat_s=10.0),
        Hello(generation=0, version=VERSION, digest="other", num_pages=4, num_states=0, heartbeat_s=10.0),
        Failed(generation=0, reason="another model there"),
        Prefill(**{**msgspec.structs.asdict(PREFILL), "generation": 0}),
        b"\xff\xff\xff\xff",
        b"\0\0\0\x01\xc1",
    ],
)
def test_a_worker_that_does_not_fit_gets_no_prompts(answer, caplog):
    dispatcher = Dispatcher(DisaggConfig())
    dispatcher.allocate(4096, torch.device("cpu"))
    strangers: list[Stranger] = []

    def start() -> Stranger:
        stranger = Stranger()
        strangers.append(stranger)
        if isinstance(answer, bytes):
            stranger.mouth.sendall(answer)
        else:
            stranger.mouth.sendall(encode(msgspec.structs.replace(answer, generation=dispatcher.generation)))
        return stranger

    dispatcher.workers.add(start)
    if isinstance(answer, Failed):
        with pytest.raises(ConfigError, match="another model there"):
            dispatcher.open(256, 4, 0, "d")
    else:
        with pytest.raises(ConfigError, match="disagg: stranger broke the protocol .*, 3 times in a row"):
            dispatcher.open(256, 4, 0, "d")
        assert len(strangers) == 3  # tried again, then given up
    assert dispatcher.stats()["prefill_workers_ready"] == 0
    request = Request([5] * 100, SamplingParams())
    request.tokens = array("i", request.prompt_token_ids)
    assert dispatcher.offers(request, 0) == 0
    dispatcher.close()


def hello_of(dispatcher: Dispatcher) -> Hello:
    """The answer of a worker that fits."""
    return Hello(
        generation=dispatcher.generation, version=VERSION, digest="d", num_pages=4, num_states=0, heartbeat_s=10.0
    )


def long_request() -> Request:
    request = Request([5] * 100, SamplingParams(), "r")
    request.tokens, request.num_prompt = array("i", request.prompt_token_ids), 100
    return request


def done_of(dispatcher: Dispatcher, tokens: tuple[int | None, ...]) -> Done:
    """DONE of the first attempt, with these tokens."""
    return Done(
        generation=dispatcher.generation, request="r", attempt=1, tokens=tokens, logprobs=(None,) * len(tokens),
        finished=0.0,
    )  # fmt: skip


def answered(dispatcher: Dispatcher, stranger: Stranger, tokens: tuple[int | None, ...]) -> None:
    """A request of 100 tokens is transferred, and its worker answers DONE with these tokens."""
    request = long_request()
    dispatcher.start(request, request.num_tokens, [])
    stranger.mouth.sendall(encode(done_of(dispatcher, tokens)))


@pytest.fixture
def played():
    """A dispatcher, and its only worker, which the test plays."""
    dispatcher, stranger = Dispatcher(DisaggConfig()), Stranger()
    dispatcher.allocate(4096, torch.device("cpu"))
    stranger.mouth.sendall(encode(hello_of(dispatcher)))
    peers = [stranger]
    dispatcher.workers.add(lambda: peers.pop())
    dispatcher.open(256, 4, 0, "d")
    yield dispatcher, stranger
    dispatcher.close()


def test_successful_attempts_do_not_count_against_a_request(played):
    dispatcher, stranger = played
    answered(dispatcher, stranger, (5,))
    while not dispatcher.collect(wait=True):
        pass
    request = dispatcher.collect(wait=False)[0].request
    assert request.num_attempts == 0 and dispatcher.stats()["remote_prefills"] == 1


@pytest.mark.parametrize("token", [256, -1])
def test_a_token_beyond_the_vocabulary_is_not_delivered(played, token):
    dispatcher, stranger = played
    dispatcher.workers._closed = True  # no other one is started
    answered(dispatcher, stranger, (token,))
    while dispatcher.stats()["requests_remote"]:
        dispatcher._listen()
    assert [delivery.tokens for delivery in dispatcher.collect(wait=False)] == [()]
    assert dispatcher.stats()["worker_deaths"] == 1


# ---- the pool ----------------------------------------------------------------------------------------------------


def test_two_mappings_are_the_same_bytes_and_nothing_has_a_name():
    names = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").exists() else set()
    pool = SharedBuffer(8192, torch.device("cpu"))
    own, other = pool.tensor, map_pool(pool.export(), os.dup(pool.descriptor), 8192)
    other[5000] = 77
    assert own[5000] == 77 and own.sum() == 77
    pool.close()
    other[0] = 1
    assert own[0] == 1
    assert (set(Path("/dev/shm").iterdir()) if Path("/dev/shm").exists() else set()) == names


def test_a_pool_of_another_size_is_refused():
    pool = SharedBuffer(4096, torch.device("cpu"))
    with pytest.raises(ProtocolError, match="4,096 bytes where 8,192"):
        map_pool(pool.export(), os.dup(pool.descriptor), 8192)
    with pytest.raises(ProtocolError, match="expected memfd or cuda"):
        map_pool(PoolMemory(kind="tape", num_bytes=4096), None, 4096)
    pool.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefill_workers": 0}, "prefill_workers=0"),
        ({"prefill_workers": True}, "prefill_workers=True"),
        ({"min_tokens": 0}, "min_tokens=0"),
        ({"heartbeat_s": 0}, "heartbeat_s=0"),
        ({"heartbeat_s": float("nan")}, "heartbeat_s=nan"),
        ({"heartbeat_s": float("inf")}, "heartbeat_s=inf"),
        ({"heartbeat_s": 86400}, "heartbeat_s=86400: expected seconds, 0.1 to 600"),
        ({"secret_file": "secret"}, "secret_file='secret': only prefill processes in connect"),
        ({"secret_file": 5, "connect": "a:1"}, "secret_file=5: expected a path"),
        ({"connect": "host"}, "address 'host'"),
        ({"connect": ("a:1", "b:99999")}, "address 'b:99999'"),
        ({"connect": 5}, "connect=5"),
        ({"connect": (5,)}, "address 5"),
        ({"worker_cores": ()}, "worker_cores=()"),
        ({"worker_cores": 3}, "worker_cores=3"),
        ({"worker_cores": (1 << 20,)}, f"worker_cores=({1 << 20},)"),
        ({"worker_cores": (-1,)}, "worker_cores=(-1,)"),
        ({"worker_cores": ("0",)}, "worker_cores=('0',)"),
        ({"worker_cores": (True,)}, "worker_cores=(True,)"),
    ],
)
def test_invalid_choices_are_named(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DisaggConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "workers"), [({}, 1), ({"connect": "a:1"}, 0), ({"connect": "a:1", "prefill_workers": 1}, 1)]
)
def test_the_config_decides_the_number_of_workers(fields, workers):
    assert DisaggConfig(**fields).prefill_workers == workers


def test_another_system_is_refused_in_one_line(tiny_llama, monkeypatch):
    monkeypatch.setattr(cluster.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="disagg: processes that share pages need Linux"):
        cluster.DisaggCluster(DisaggConfig(), tiny_llama, EngineConfig(), torch.device("cpu"), torch.float32)


def test_an_aborted_request_leaves_no_copy_behind():
    """The slot of its checkpoint has another owner after that."""
    pages, request = GrantedCache(4), Request(list(range(9)))
    pages.give(request, GrantedPages(array("i", [0, 1, 2]), 0, state=1, checkpoints={4: 2}))
    pages.match(request)
    request.num_computed = 4
    pages.commit(request)
    pages.release(request)
    assert pages.drain_moves().states == []


def test_descriptors_beyond_1024_are_polled():
    """As in a server of many files. select.select refuses those from 1,024 on."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        high = socket.socket(fileno=fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD, 2000))
        channel = Channel(high)
        assert channel.fileno() >= 2000
        assert not wait([channel], seconds=0) and wait([channel], [channel])
        theirs.sendall(encode(Ping(generation=1)))
        assert wait([channel]) and channel.receive() == [Ping(generation=1)]
        channel.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
