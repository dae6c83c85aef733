"""Soak of threads and of Ctrl-C, as a program with threads and a user of a notebook cause them."""

from __future__ import annotations

import gc
import random
import signal
import sys
import threading
import time
import traceback
from typing import Any

import torch

from nanokv import SamplingParams
from nanokv.llm import LLM
from soaks.common import Record

KINDS = ("generate", "stream", "stream", "close", "drop", "unread", "score", "two", "cycle")
SWITCH_S = 1e-5
"""Seconds after which Python changes the thread; 500 times as often as usual."""


class Threads:
    """Eight threads that ask, and one that calls stats() and reset_prefix_cache() all the time."""

    def __init__(self, model: str, seed: int) -> None:
        self.seed, self.over = seed, threading.Event()
        rng = random.Random(seed)
        self.llm = LLM(
            model, dtype="float32", device="cpu", page_size=4, num_pages=60, max_step_tokens=48, max_requests=6
        )
        alone = LLM(model, dtype="float32", device="cpu", page_size=4, num_pages=400, prefix_cache=False)
        vocab = self.llm.model_config.vocab_size
        stems = [[rng.randrange(5, vocab) for _ in range(length)] for length in (12, 20, 33, 60)]
        tails = [[rng.randrange(5, vocab) for _ in range(length)] for length in (1, 3, 7)]
        self.cases = [
            (prompt, params, alone.generate([prompt], params)[0])
            for prompt in (stem + tail for stem in stems for tail in tails)
            for params in (SamplingParams(temperature=t, seed=5, max_tokens=14, ignore_eos=True) for t in (0, 0.9))
        ]
        self.scores = [(stem, alone.score(stem)) for stem in stems]

    def run(self, record: Record, seconds: float) -> None:
        """Threads until the time is over; then everything has to be given back."""
        sys.setswitchinterval(SWITCH_S)
        threads = [threading.Thread(target=self._work, args=(record, number), daemon=True) for number in range(8)]
        threads.append(threading.Thread(target=self._meddle, args=(record,), daemon=True))
        for thread in threads:
            thread.start()
        while not record.is_over(seconds):
            time.sleep(0.25)
            try:
                self.llm.loop.call(lambda engine: engine.cache.check())
                record.count("checks")
            except Exception as error:
                record.violation(f"books: {error}")
        self.over.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                record.violation(f"{thread.name} hangs")
        gc.collect()
        self.llm.loop.call(lambda engine: engine.cache.check())
        stats = self.llm.stats()
        if left := stats["pages_held"] + stats["requests_running"] + stats["requests_waiting"]:
            record.violation(f"{left} pages or requests are left at the end")

    def _work(self, record: Record, number: int) -> None:
        rng = random.Random(self.seed * 100 + number)
        while not self.over.is_set():
            kind = rng.choice(KINDS)
            try:
                if not self._ask(kind, rng):
                    record.violation(f"{kind}: another answer than alone")
            except Exception:
                record.violation(f"{kind}: {traceback.format_exc(limit=-4)}")
            record.counts[kind] += 1

    def _ask(self, kind: str, rng: random.Random) -> bool:
        """One use of the LLM. False where its answer is wrong."""
        prompt, params, expected = rng.choice(self.cases)
        if kind == "score":
            text, rows = rng.choice(self.scores)
            return torch.equal(self.llm.score(text), rows)
        if kind in ("generate", "two"):
            outputs = self.llm.generate([prompt] * (1 + (kind == "two")), params)
            return all(output.token_ids == expected.token_ids for output in outputs)
        stream = self.llm.stream(prompt, params)
        if kind == "stream":
            outputs = list(stream)
            text = "".join(output.delta for output in outputs)
            return outputs[-1].token_ids == expected.token_ids and text == expected.text
        if kind == "close":
            for _ in range(rng.randrange(6)):
                next(stream)
            stream.close()
        elif kind != "unread":
            next(stream)
        if kind == "cycle":  # only the garbage collector can close it
            cycle: list[Any] = [stream]
            cycle.append(cycle)
        return True

    def _meddle(self, record: Record) -> None:
        rng = random.Random(self.seed)
        while not self.over.is_set():
            try:
                if rng.random() < 0.5:
                    self.llm.reset_prefix_cache()
                    record.count("resets")
                else:
                    self.llm.stats()
            except Exception as error:
                record.violation(f"stats or reset: {error!r}")
            time.sleep(rng.random() * 0.0006)


class CtrlC:
    """`generate` with an interrupt at a random moment, again and again; each time everything is given back."""

    def __init__(self, model: str, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        states: dict[str, Any] = {"num_states": 12} if "hybrid" in model else {}
        self.llm = LLM(model, dtype="float32", device="cpu", page_size=4, num_pages=64, **states)
        vocab = self.llm.model_config.vocab_size
        stem = [rng.randrange(5, vocab) for _ in range(40)]
        self.prompts = [
            stem[: rng.choice([10, 20, 40])] + [rng.randrange(5, vocab) for _ in range(rng.randrange(1, 8))]
            for _ in range(8)
        ]
        self.params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        self.expected = self._answers()

    def run(self, record: Record, seconds: float) -> None:
        """Interrupts by SIGINT and by a handler of the program itself, in turns."""
        signal.signal(signal.SIGALRM, self._interrupt)
        begin = time.monotonic()
        self._answers()
        whole = time.monotonic() - begin
        while not record.is_over(seconds):
            self.is_raised = self.rng.random() < 0.5
            if self.rng.random() < 0.3:
                self.llm.reset_prefix_cache()
            try:
                signal.setitimer(signal.ITIMER_REAL, self.rng.random() * whole + 1e-6)
                self._answers()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                record.counts["raised" if self.is_raised else "signals"] += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            record.count("generates")
            self._check(record)

    def _interrupt(self, *_: object) -> None:
        if self.is_raised:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    def _check(self, record: Record) -> None:
        gc.collect()
        try:
            self.llm.loop.call(lambda engine: engine.cache.check())
        except Exception as error:
            record.violation(f"books: {error}")
        stats = self.llm.stats()
        if left := stats["pages_held"] + stats["pages_locked"] + stats["requests_running"] + stats["requests_waiting"]:
            record.violation(f"{left} pages or requests are left")
        if record.counts["generates"] % 10 == 0 and self._answers() != self.expected:
            record.violation("another answer than before the interrupts")

    def _answers(self) -> list[list[int]]:
        return [output.token_ids for output in self.llm.generate(self.prompts, self.params)]


def run(kind: type[Threads] | type[CtrlC], model: str, seconds: float, seed: int) -> None:
    """The soak; exits with 1 where it finds a violation."""
    torch.set_num_threads(1)
    record = Record()
    kind(model, seed).run(record, seconds)
    print(record)
    raise SystemExit(record.exit_code)
