"""An interrupt at every line of cache/ and engine/, each in a run of its own. Afterwards the books have to be right, no
sample may be lost or stuck, and every answer has to be that of an undisturbed run.

Two kinds of interrupt:

    signal   SIGINT at the line, as Ctrl-C sends it: the engine delays it to a place where nothing breaks
    raised   KeyboardInterrupt at the line, as a debugger or another signal's handler raises it: the engine rebuilds
"""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import nanokv
from nanokv import SamplingParams
from nanokv.core.errors import NanokvError
from nanokv.llm import LLM

KINDS = ("signal", "raised")
ROOMS = tuple(str(Path(nanokv.__file__).parent / room) for room in ("cache", "engine"))
NOT_OURS = ("audit.py", "build.py", "calibrate.py", "memory.py", "profile_run.py", "check_triton.py")
MOST_STEPS = 300

Place = tuple[str, int]
"""A line: the path of its file and its number."""


class Interruption:
    """Traces the lines of cache/ and engine/. `at` a line: interrupts there, the first time that it is reached."""

    def __init__(self, at: Place | None, kind: str) -> None:
        self.lines: dict[Place, None] = {}  # in order of their first time
        self.at, self.kind, self.done = at, kind, False

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Traces the body."""
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        path = frame.f_code.co_filename
        return self._line if path.startswith(ROOMS) and not path.endswith(NOT_OURS) else None

    def _line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line":
            self.lines.setdefault(place)
            if place == self.at and not self.done:
                self.done = True
                if self.kind == "raised":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
        return self._line


class Subject:
    """A small engine under pressure: shared prefixes, several samples, too few pages for all.

    model   a tiny model
    """

    def __init__(self, model: str) -> None:
        states: dict[str, Any] = {"num_states": 10, "state_interval": 8} if model == "tiny-hybrid" else {}
        self.llm = LLM(
            model,
            dtype="float32",
            device="cpu",
            page_size=4,
            num_pages=22,
            max_step_tokens=16,
            max_requests=5,
            **states,
        )
        rng, vocab = random.Random(3), self.llm.model_config.vocab_size
        stem = [rng.randrange(5, vocab) for _ in range(18)]
        shapes = ((18, 3, 1, 9), (12, 5, 3, 6), (18, 1, 1, 12), (8, 9, 1, 7), (18, 6, 2, 5), (4, 20, 1, 8))
        self.prompts = [stem[:shared] + [rng.randrange(5, vocab) for _ in range(own)] for shared, own, _, _ in shapes]
        self.params = [
            SamplingParams(temperature=0.9, seed=seed, n=n, max_tokens=length, ignore_eos=True, logprobs=1)
            for seed, (_, _, n, length) in enumerate(shapes)
        ]
        self.expected = self._answers()

    def lines(self, kind: str) -> list[Place]:
        """The lines that a run passes."""
        interruption = Interruption(None, kind)
        self.run(interruption)
        return list(interruption.lines)

    def run(self, interruption: Interruption) -> str | None:
        """A run with this interruption. Returns what is wrong after it, or None."""
        self.llm.reset_prefix_cache()
        try:
            return self._signalled(interruption) if interruption.kind == "signal" else self._raised(interruption)
        except NanokvError as error:
            return f"{type(error).__name__}: {error}"

    def _signalled(self, interruption: Interruption) -> str | None:
        try:
            with interruption.tracing():
                self.llm.generate(self.prompts, self.params)
        except KeyboardInterrupt:
            pass
        return self._wrong_books() or ("another answer later" if self._answers() != self.expected else None)

    def _raised(self, interruption: Interruption) -> str | None:
        from nanokv.core.request import Request

        engine, found = self.llm.engine, {}
        for number, (prompt, params) in enumerate(zip(self.prompts, self.params, strict=True)):
            engine.add_request(Request(list(prompt), params, str(number)))
        for _ in range(MOST_STEPS):
            if not engine.has_work:
                break
            try:
                with interruption.tracing():
                    outputs = engine.step()
            except KeyboardInterrupt:
                outputs = []
            engine.cache.check()
            found |= {(int(one.request_id), one.index): one for one in outputs if one.finished}
        else:
            return "requests without an end"
        answers = [(one.token_ids, one.text, one.finish_reason, one.logprobs) for _, one in sorted(found.items())]
        return self._wrong_books() or (None if answers == self.expected else "a lost or another answer")

    def _wrong_books(self) -> str | None:
        engine = self.llm.engine
        engine.cache.check()
        if engine.has_work:
            return "requests left behind"
        stats = engine.stats()
        held = stats["pages_held"] + stats["pages_locked"] + stats.get("states_held", 0)
        return f"{held} pages or states left behind" if held else None

    def _answers(self) -> list[tuple[Any, ...]]:
        outputs = self.llm.generate(self.prompts, self.params)
        return [(one.token_ids, one.text, one.finish_reason, one.logprobs) for one in outputs]


def named(place: Place) -> str:
    """ "engine/step.py:57"."""
    return f"{Path(place[0]).parent.name}/{Path(place[0]).name}:{place[1]}"
