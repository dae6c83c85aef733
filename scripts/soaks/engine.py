"""Soak of the engine: random requests, aborts, resets, exceptions in inner functions, interrupts at random moments.

After every step the books are checked. Every answer is compared, bit by bit in float32, with that of the same request
alone in an engine without a prefix cache.
"""

from __future__ import annotations

import logging
import random
import signal
from typing import Any

import torch

from nanokv import SamplingParams
from nanokv.core.request import Request, RequestOutput
from nanokv.llm import LLM
from soaks.common import Alone, Record

WORDS = ["the", " a", "e", " is", "\n", "is the", "o"]
FAULTY = ("runner.run", "_sample", "cache.commit", "scheduler.plan", "cache.match", "cache.reserve", "model.forward")
"""Functions of the engine that raise, before or after they have run."""
FAULTS = (RuntimeError, MemoryError, KeyError)


class Soak:
    """One engine under load.

    model     a tiny model
    seed      of the load and the faults
    codec     of the cache
    overlap   plan and launch a step before the last is resolved, as on a GPU
    """

    def __init__(self, model: str, seed: int, codec: str, overlap: bool) -> None:
        self.rng = rng = random.Random(seed)
        needs_states = model == "tiny-hybrid" or codec.startswith("kivi")
        size = 32 if codec.startswith("kivi") else rng.choice([1, 4, 4, 8])
        states: dict[str, Any] = (
            {"num_states": 16, "state_interval": 16 if size <= 16 else size} if needs_states else {}
        )
        self.llm = LLM(
            model, dtype="float32", device="cpu", codec=codec, page_size=size, num_pages=max(12, 160 // size),
            max_step_tokens=rng.choice([7, 24, 64]), max_requests=8, schedule=rng.choice(["fcfs", "longest-prefix"]),
            overlap=overlap, graphs=False, **states,
        )  # fmt: skip
        self._reference = LLM(
            model, dtype="float32", device="cpu", codec=codec, page_size=size, num_pages=max(40, 1200 // size),
            prefix_cache=False, max_requests=8, **({"num_states": 20} if needs_states else {}),
        )  # fmt: skip
        self.vocab = self.llm.model_config.vocab_size
        self.stems = [self._ids(rng.choice([8, 12, 16, 20, 33, 60])) for _ in range(5)]
        self.asked: dict[str, Request] = {}
        self.ends: dict[str, dict[int, RequestOutput]] = {}
        self.armed: tuple[str, bool] | None = None  # a faulty function, and whether it raises after it has run
        self._alone = Alone(self._reference)
        self._idle = self._delivered = 0
        for name in FAULTY:
            self._wrap(name)

    def run(self, record: Record, seconds: float) -> None:
        """Steps until the time is over, then to the end of all requests."""
        signal.signal(signal.SIGALRM, _raise)
        while not record.is_over(seconds):
            self._feed(record)
            self._disturb(record)
            self._step(record)
        self.armed = None
        while self.llm.engine.has_work and not record.violations:
            self._step(record, interrupting=False)
        for name in ("preemptions", "evictions"):
            record.counts[name] += int(self.llm.stats()[name])
        if held := self.llm.stats()["pages_held"]:
            record.violation(f"{held} pages are held at the end")

    def _ids(self, count: int) -> list[int]:
        return [self.rng.randrange(5, self.vocab) for _ in range(count)]

    def _feed(self, record: Record) -> None:
        rng = self.rng
        while len(self.asked) < 14 and rng.random() < 0.35:
            stem = rng.choice(self.stems)
            ids = stem[: rng.choice([4, 8, len(stem), len(stem)])] + self._ids(rng.choice([0, 0, 1, 3, 4, 7, 30]))
            is_scored = rng.random() < 0.06
            params = SamplingParams(
                temperature=rng.choice([0, 0.9, 1.5]), seed=rng.randrange(4), n=rng.choice([1, 1, 1, 1, 2, 3]),
                ignore_eos=rng.random() < 0.7, max_tokens=rng.choice([1, 3, 4, 9, 17, 40]),
                min_tokens=rng.choice([0, 2]), logprobs=rng.choice([None, 2]),
                cache_salt=rng.choice([None, None, None, "x", "y"]),
                stop=tuple(rng.sample(WORDS, rng.choice([0, 0, 0, 1, 2]))),
                repetition_penalty=rng.choice([1.0, 1.0, 1.3]), top_p=rng.choice([1.0, 0.8]), top_k=rng.choice([0, 20]),
            )  # fmt: skip
            record.count("requests")
            request = Request(
                ids, SamplingParams(max_tokens=1) if is_scored else params, f"q{record.counts['requests']}"
            )
            if is_scored:
                request.logit_blocks = []
                record.count("scores")
            self.llm.engine.add_request(request, self._take)
            self.asked[request.id] = request

    def _take(self, output: RequestOutput) -> None:
        if output.finished:
            self.ends.setdefault(output.request_id, {})[output.index] = output

    def _disturb(self, record: Record) -> None:
        rng, engine = self.rng, self.llm.engine
        if self.asked and rng.random() < 0.02 and (name := rng.choice(list(self.asked))) in engine:
            engine.abort(name)
            record.count("aborts")
        if rng.random() < 0.01:
            self.llm.reset_prefix_cache()
            record.count("resets")
        self.armed = (rng.choice(FAULTY), rng.random() < 0.5) if rng.random() < 0.06 else None

    def _step(self, record: Record, interrupting: bool = True) -> None:
        rng, engine = self.rng, self.llm.engine
        record.count("steps")
        try:
            try:
                if interrupting and rng.random() < 0.1:
                    longest = rng.choice([5e-5, 2e-4, 1e-3, 3e-3, 8e-3])
                    signal.setitimer(signal.ITIMER_REAL, longest * rng.random() + 1e-6)
                engine.advance()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            record.count("interrupts")
        record.counts["faults"] += self.armed == ("", False)
        try:
            engine.cache.check()
        except Exception as error:
            record.violation(f"step {record.counts['steps']}: {error}")
        self._idle = 0 if engine.outputs.num_delivered > self._delivered else self._idle + 1
        self._delivered = engine.outputs.num_delivered
        if self._idle > 400 and engine.has_work:
            record.violation(f"no output in {self._idle} steps: {engine.scheduler.running}")
        for name in [name for name in self.asked if name not in engine and name in self.ends]:
            self._compare(self.asked.pop(name), self.ends.pop(name), record)

    def _compare(self, request: Request, ends: dict[int, RequestOutput], record: Record) -> None:
        if len(ends) != request.params.n:
            record.violation(f"{request}: {len(ends)} ends, expected {request.params.n}")
            return
        prompt = list(request.prompt_token_ids)
        for end in ends.values():
            record.count("compared")
            if request.logit_blocks is not None:
                expected = self._reference.score(prompt)
                rows = expected[:0]
                for first, block in request.logit_blocks:
                    rows = torch.cat([rows[:first], block, rows[first + len(block) :]])
                is_right = torch.equal(rows, expected if end.finish_reason == "length" else expected[: len(rows)])
                difference = None if is_right else "other rows than alone"
            else:
                difference = self._alone.difference(prompt, request.params, end, cut=("abort", "error"))
            if difference is not None:
                record.violation(f"{request} {request.params}: {end.finish_reason}: {difference}")

    def _wrap(self, name: str) -> None:
        owner: Any = self.llm.engine
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, last)

        def faulty(*arguments: Any, **more: Any) -> Any:
            result = None if self.armed == (name, False) else original(*arguments, **more)
            if self.armed is not None and self.armed[0] == name:
                self.armed = ("", False)  # counted by `_step`
                raise self.rng.choice(FAULTS)(f"injected at {name}")
            return result

        setattr(owner, last, faulty)


def _raise(*_: object) -> None:
    raise KeyboardInterrupt


def run(model: str, seconds: float, seed: int, codec: str, overlap: bool) -> None:
    """The soak; exits with 1 where it finds a violation."""
    torch.set_num_threads(1)
    logging.getLogger("nanokv").setLevel(logging.CRITICAL)  # faults are injected, and each would log a traceback
    record = Record()
    Soak(model, seed, codec, overlap).run(record, seconds)
    print(record)
    raise SystemExit(record.exit_code)
