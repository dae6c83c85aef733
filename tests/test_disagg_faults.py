"""Processes that die, hang or send garbage: every request has the right tokens, no page leaks, the engine goes on.

The processes are real. They fail at hooks after every message and every layer (faulty_worker.py), never after a sleep.
"""

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import oracles
import pytest

from nanokv import LLM, DisaggConfig, SamplingParams
from nanokv.core.errors import ConfigError
from nanokv.core.request import Request
from nanokv.disagg import process

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = [oracles.prompt(length, seed=length) for length in (40, 90, 150)]
ROOM = {"num_pages": 64, "page_size": 8, "debug_checks": True}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def right(tiny_llama) -> list[list[int]]:
    """The answers of one process."""
    with LLM(tiny_llama, **ROOM) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def shared(tiny_llama, tmp_path_factory):
    """An LLM with one faulty prefill process that all tests use, and the file that tells it how to fail."""
    fault = tmp_path_factory.mktemp("fault") / "fault"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "ENTRY", "faulty_worker")
        patch.setenv("NANOKV_FAULT", str(fault))
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", f"{here}:{here.parent}")
        with LLM(tiny_llama, disagg=DisaggConfig(min_tokens=8, heartbeat_s=3.0), **ROOM) as llm:
            yield llm, fault


@pytest.fixture
def llm(shared, right):
    """Before and after each test: the worker is ready, no attempt is open, no page is held, answers are right."""
    llm, fault = shared
    fault.unlink(missing_ok=True)
    wait_until_ready(llm)
    before = llm.stats()["remote_lost"]
    llm.reset_prefix_cache()
    assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == right
    assert llm.stats()["remote_lost"] == before
    llm.reset_prefix_cache()
    yield llm
    fault.unlink(missing_ok=True)
    settle(llm)
    llm.engine.cache.check()
    assert llm.stats()["pages_held"] == llm.stats()["pages_locked"] == 0


def wait_until_ready(llm: LLM) -> None:
    step_until(llm, lambda: llm.stats()["prefill_workers_ready"] == 1)


def settle(llm: LLM) -> None:
    """Until no other process may write into a page."""
    step_until(llm, lambda: llm.stats()["requests_remote"] == 0 and not llm.engine.has_work)


def step_until(llm: LLM, holds) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        llm.engine.step()
        llm.engine.cache.check()
        time.sleep(0.002)


def plan(shared, fault: str) -> None:
    shared[1].write_text(fault)


def worker_pid(llm: LLM) -> int:
    return llm.cluster.dispatcher.workers.slots[0].peer.pid


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        pytest.param("PREFILL received kill", True, marks=SLOW),
        pytest.param("layer kill", True, marks=SLOW),
        ("DONE before kill", True),
        pytest.param("DONE before half", True, marks=SLOW),
        pytest.param("DONE before noise", True, marks=SLOW),
        pytest.param("DONE sent kill", None, marks=SLOW),  # what was delivered counts; the other prompts are lost
        ("layer stop", True),
        pytest.param("DONE sent stop", None, marks=SLOW),
    ],
)
def test_a_worker_that_dies_hangs_or_sends_garbage_costs_no_token(llm, shared, right, caplog, fault, lost):
    before = llm.stats()
    plan(shared, fault)
    with caplog.at_level(logging.WARNING, "nanokv"):
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == right
        step_until(llm, lambda: llm.stats()["worker_deaths"] == before["worker_deaths"] + 1)
        wait_until_ready(llm)
    after = llm.stats()
    assert after["worker_deaths"] == before["worker_deaths"] + 1
    if lost:
        assert after["remote_lost"] > before["remote_lost"]
    assert sum("a new one starts" in record.message for record in caplog.records) == 1
    assert sum("is back" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("fault", ["DONE before twice", "DONE before stale"])
def test_repeated_and_stale_messages_are_dropped(llm, shared, right, fault):
    before = llm.stats()
    plan(shared, fault)
    assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == right
    after = llm.stats()
    assert after["stale_messages"] - before["stale_messages"] == (1 if "twice" in fault else 2)
    assert after["worker_deaths"] == before["worker_deaths"]


def test_a_step_that_fails_in_the_worker_is_computed_again(llm, shared, right):
    before = llm.stats()
    plan(shared, "layer raise")
    assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == right
    after = llm.stats()
    assert after["remote_lost"] > before["remote_lost"] and after["worker_deaths"] == before["worker_deaths"]


@pytest.mark.slow
def test_pages_of_a_stopped_worker_are_not_reused_before_its_death(llm, shared, right):
    """Aborted or not, they stay quarantined; and the worker never wakes up to write into them."""
    plan(shared, "layer stop")
    pid = worker_pid(llm)
    request_id = llm.engine.add_request(Request(PROMPTS[2], GREEDY))
    step_until(llm, lambda: not shared[1].exists())  # it has stopped in the middle of a layer
    llm.engine.abort(request_id)
    outputs = llm.engine.step()
    assert [output.finish_reason for output in outputs] == ["abort"]
    assert llm.stats()["pages_held"] == 19
    step_until(llm, lambda: llm.stats()["pages_held"] == 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == right


@pytest.mark.parametrize(
    "fault",
    [None, "ABORT received kill", *(pytest.param(f"ABORT_ACK before {how}", marks=SLOW) for how in ("kill", "twice"))],
)
def test_pages_of_an_abort_in_flight_are_free_once_nothing_writes_to_them(llm, shared, right, fault):
    if fault is not None:
        plan(shared, fault)
    ids = [llm.engine.add_request(Request(prompt, GREEDY)) for prompt in PROMPTS]
    llm.engine.step()
    for request_id in ids:
        llm.engine.abort(request_id)
    settle(llm)
    assert llm.stats()["pages_held"] == 0
    wait_until_ready(llm)
    assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == right


def test_more_prompts_than_the_pool_holds_wait_for_each_other(llm, right):
    many = [oracles.prompt(200 + i, seed=50 + i) for i in range(6)]
    outputs = llm.generate([*many, *PROMPTS], GREEDY)
    assert [output.token_ids for output in outputs[-3:]] == right
    assert all(output.finish_reason == "length" for output in outputs)


def test_a_full_pool_preempts_no_request_in_transfer(llm):
    """Answers outgrow the pool while prompts are computed elsewhere."""
    long = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    prompts = [oracles.prompt(100, seed=70 + i) for i in range(6)]
    together = [output.token_ids for output in llm.generate(prompts, long)]
    assert together == [llm.generate(prompt, long)[0].token_ids for prompt in prompts]


def test_prompts_are_computed_here_when_workers_keep_dying(tiny_llama, right, monkeypatch, tmp_path, caplog):
    """The entry module does not exist any more: every new process dies at once."""
    with caplog.at_level(logging.WARNING, "nanokv"), LLM(tiny_llama, disagg=DisaggConfig(), **ROOM) as llm:
        monkeypatch.setattr(process, "ENTRY", "no_such_worker")
        os.kill(worker_pid(llm), signal.SIGKILL)
        step_until(llm, lambda: llm.stats()["worker_deaths"] == 3)
        assert [output.token_ids for output in llm.generate(PROMPTS, GREEDY)] == right
        assert llm.stats()["prefill_workers_ready"] == 0
    assert sum("no new one is started" in record.message for record in caplog.records) == 1


def test_workers_that_cannot_start_are_an_error(tiny_llama, monkeypatch):
    monkeypatch.setattr(process, "ENTRY", "no_such_worker")
    with pytest.raises(
        ConfigError,
        match="disagg: prefill 0 (has died|closed its connection), 3 times in a row: see its log lines above",
    ):
        LLM(tiny_llama, disagg=DisaggConfig(), **ROOM)


@pytest.mark.parametrize("is_main", [True, pytest.param(False, marks=SLOW)])
def test_a_garbage_collected_llm_ends_its_worker_and_frees_its_pool(tiny_llama, is_main):
    """In any thread in which the garbage collection runs."""
    gc.collect()  # what other tests left behind goes now, not in between
    before = Counter(pools_and_processes())
    llm = LLM(tiny_llama, disagg=DisaggConfig(), **ROOM)
    assert Counter(pools_and_processes()) - before
    llm.itself = llm
    del llm
    if is_main:
        gc.collect()
    else:
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    deadline = time.monotonic() + 60
    while Counter(pools_and_processes()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pools_and_processes() -> list[str]:
    """The descriptors of pools and of other processes in this one, and its children, zombies too."""
    descriptors = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of listdir itself
            descriptors.append(os.readlink(f"/proc/self/fd/{number}"))
    kinds = [one for one in descriptors if "nanokv-pages" in one or "pidfd" in one]
    return sorted(kinds) + Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
from nanokv import LLM, DisaggConfig, SamplingParams
from nanokv.core.request import Request
llm = LLM(sys.argv[1], disagg=DisaggConfig(min_tokens=8), num_pages=64, page_size=8)
print(llm.cluster.dispatcher.workers.slots[0].peer.pid, flush=True)
llm.engine.add_request(Request(list(range(3, 203)), SamplingParams(max_tokens=4)))
while True:
    llm.engine.step()
    if not llm.engine.has_work:
        llm.engine.add_request(Request([time.perf_counter_ns() % 200 + 3] * 200, SamplingParams(max_tokens=4)))
"""


@pytest.mark.parametrize(
    ("how", "stopped"),
    [
        pytest.param(signal.SIGKILL, False, marks=SLOW),
        (signal.SIGKILL, True),
        pytest.param(signal.SIGINT, False, marks=SLOW),
    ],
)
def test_a_worker_does_not_outlive_the_decode_process(tiny_llama, how, stopped):
    """Not even a stopped one, which cannot notice the end."""
    here = Path(__file__).parent.parent
    decode = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_llama)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(here)},
    )  # fmt: skip
    worker = int(decode.stdout.readline())
    try:
        if stopped:
            os.kill(worker, signal.SIGSTOP)
        decode.send_signal(how)
        decode.wait(timeout=120)
        deadline = time.monotonic() + 30
        while is_running(worker) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_running(worker)
    finally:
        decode.kill()
        decode.stdout.close()


FORKED = """
import os, sys, time
from nanokv import LLM, DisaggConfig, SamplingParams
llm = LLM(sys.argv[1], disagg=DisaggConfig(min_tokens=8), num_pages=64, page_size=8)
first = os.fork()
if not first:
    llm.close()
    sys.exit()
os.waitpid(first, 0)
second = os.fork()
if not second:
    time.sleep(120)
    os._exit(0)
llm.generate([list(range(3, 103))], SamplingParams(max_tokens=4))
stats = llm.stats()
worker = llm.cluster.dispatcher.workers.slots[0].peer
print(stats["remote_prefills"], stats["worker_deaths"], worker.pid, second, flush=True)
time.sleep(120)
"""


@pytest.mark.slow
def test_a_forked_child_ends_no_worker_and_keeps_none(tiny_llama):
    """The first child closes its copy of the LLM and ends; the second lives on when the decode process is killed."""
    here = Path(__file__).parent.parent
    decode = subprocess.Popen(
        [sys.executable, "-c", FORKED, str(tiny_llama)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(here)},
    )  # fmt: skip
    prefills, deaths, worker, child = map(int, decode.stdout.readline().split())
    try:
        assert (prefills, deaths) == (1, 0)
        decode.kill()
        decode.wait(timeout=120)
        deadline = time.monotonic() + 30
        while is_running(worker) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_running(child) and not is_running(worker)
    finally:
        decode.kill()
        os.kill(child, signal.SIGKILL)
        decode.stdout.close()


def is_running(pid: int) -> bool:
    """Whether it exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
