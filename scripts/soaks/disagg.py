"""Kills, stops and wakes a prefill process at random moments, and compares every answer with that of one process.

Requests are aborted and the prefix cache is reset meanwhile. After each step the books of the cache are checked. At the
end the workers, the descriptors and /dev/shm must be as before.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from nanokv import LLM, DisaggConfig, NanokvError, RequestOutput, SamplingParams
from nanokv.core.request import Request
from nanokv.disagg import supervisor
from nanokv.engine.ticket import Ticket
from soaks.common import Alone, Holdings, RandomRequests, Record

AT_ONCE = 8
"""Requests that run or wait at the same time."""
STUCK_S = 60.0
"""Seconds without an output, with requests open, after which the engine is stuck."""
KILL, STOP, START = 0.012, 0.04, 0.4
"""Probabilities of one turn: SIGKILL, SIGSTOP, a new request while fewer than AT_ONCE run."""
ABORT = RESET = 0.02
STOPPED_S = (0.02, 0.2, 1.0, 6.0)
"""How long a worker is stopped: the last one is longer than the heartbeat, so it is killed."""
HEARTBEAT_S = 4.0


@dataclass
class Open:
    """A request that has not ended. ended: its finished outputs."""

    prompt: list[int]
    params: SamplingParams
    ticket: Ticket
    ended: list[RequestOutput] = field(default_factory=list)


class Faults:
    """Signals to the prefill process.

    pids   of every worker that was seen
    """

    def __init__(self, llm: LLM, rng: random.Random, record: Record) -> None:
        self.pids: set[int] = set()
        self._slots = llm.cluster.dispatcher.workers.slots
        self._rng, self._record = rng, record
        self._stopped: tuple[int, float] | None = None  # a worker, and when it is woken

    def turn(self) -> None:
        """Perhaps one signal. A worker that is not ready yet is mostly spared: else none would ever be."""
        if self._stopped is not None and time.monotonic() > self._stopped[1]:
            self.wake()
        (slot,) = self._slots
        peer = slot.peer
        if peer is None or peer.gone:
            return
        self.pids.add(peer.pid)
        if slot.state != "ready" and self._rng.random() > 0.02:
            return
        drawn = self._rng.random()
        if drawn < KILL:
            self._send(peer.pid, signal.SIGKILL)
        elif drawn < KILL + STOP and self._stopped is None:
            self._send(peer.pid, signal.SIGSTOP)
            self._stopped = peer.pid, time.monotonic() + self._rng.choice(STOPPED_S)

    def wake(self) -> None:
        """Lets a stopped worker go on."""
        if self._stopped is not None:
            self._send(self._stopped[0], signal.SIGCONT)
            self._stopped = None

    def _send(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # the supervisor was first
            os.kill(pid, number)
            self._record.count(number.name)


def _run(llm: LLM, alone: Alone, rng: random.Random, record: Record, holdings: Holdings, seconds: float) -> set[int]:
    """The soak. Returns the process ids of the workers."""
    make, faults = RandomRequests(rng, llm.model_config.vocab_size), Faults(llm, rng, record)
    running: list[Open] = []
    heard, is_settled = record.seconds, False
    while not record.is_over(seconds):
        while len(running) < AT_ONCE and rng.random() < START:
            prompt, params = make()
            running.append(Open(prompt, params, llm.loop.submit(Request(prompt, params))))
            record.count("requests")
        faults.turn()
        if running and rng.random() < ABORT:
            rng.choice(running).ticket.cancel()
            record.count("aborts")
        if rng.random() < RESET:
            llm.reset_prefix_cache()
            record.count("resets")
        llm.loop.step()
        record.count("steps")
        try:
            llm.loop.call(lambda engine: engine.cache.check())
        except NanokvError as error:
            record.violation(f"the books of the cache: {error}")
            break
        for one in list(running):
            outputs = one.ticket.take()
            heard = record.seconds if outputs else heard
            one.ended += [output for output in outputs if output.finished]
            if len(one.ended) == one.params.n:
                running.remove(one)
                for output in one.ended:
                    record.count("samples compared")
                    difference = alone.difference(one.prompt, one.params, output)
                    if difference is not None:
                        record.violation(f"{one.ticket.request_id}#{output.index}: {difference}")
        if running and record.seconds - heard > STUCK_S:
            record.violation(f"no output for {STUCK_S:g} s: {llm.stats()}")
            break
        if not is_settled and record.seconds > seconds / 4:
            is_settled = True
            holdings.settle()
    faults.wake()
    return faults.pids


def _soak(model: str, rng: random.Random, record: Record, holdings: Holdings, seconds: float) -> set[int]:
    """Two engines, one of them with a prefill process, from start to end. Returns the process ids of its workers."""
    room = {"dtype": "float32", "page_size": 4, "device": "cpu", "num_states": 20}
    disagg = DisaggConfig(min_tokens=12, heartbeat_s=HEARTBEAT_S)
    with (
        LLM(model, num_pages=400, prefix_cache=False, **room) as reference,
        LLM(model, num_pages=120, max_requests=6, max_step_tokens=64, disagg=disagg, **room) as llm,
    ):
        pids = _run(llm, Alone(reference), rng, record, holdings, seconds)
        stats = llm.stats()
    numbers = ("remote_prefills", "remote_lost", "worker_deaths", "stale_messages", "preemptions")
    print(", ".join(f"{name} {stats[name]:,}" for name in numbers))
    return pids


def run(model: str, seconds: float, seed: int) -> None:
    """The soak; exits with 1 where it finds a violation."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    torch.set_num_threads(1)
    logging.getLogger("nanokv").setLevel(logging.CRITICAL)  # a death a second is not worth a line each
    supervisor.MAX_DEATHS = sys.maxsize  # three deaths in a row end the restarts, and the soak
    record, holdings = Record(), Holdings()
    for pid in _soak(model, random.Random(seed), record, holdings, seconds):
        if os.path.exists(f"/proc/{pid}"):
            record.violation(f"worker {pid} has outlived its engine")
    for leak in holdings.leaks():
        record.violation(leak)
    print(record)
    raise SystemExit(record.exit_code)
