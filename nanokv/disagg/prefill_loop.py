"""PrefillLoop: prompts in, first tokens out. The scheduler, runner and steps of an engine, over granted pages.

    accept(PREFILL) -> step() ... step() -> DONE, or FAILED

Knows no sockets and no processes.
"""

from __future__ import annotations

import logging
import time
from array import array
from dataclasses import dataclass, field, replace

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.config import EngineConfig
from nanokv.core.events import Events
from nanokv.core.request import Request, SamplingParams
from nanokv.disagg.granted_cache import GrantedCache, GrantedPages
from nanokv.disagg.messages import Abort, AbortAck, Done, Failed, Message, Prefill, ProtocolError, failed, unpack_ints
from nanokv.engine.runner import Runner
from nanokv.engine.sampler import SamplerOutput, sample
from nanokv.engine.scheduler import Scheduler, StepPlan
from nanokv.engine.step import launch, resolve
from nanokv.models.decoder import Between, Decoder

logger = logging.getLogger("nanokv")

STEP_TOKENS = 512
"""Tokens of one step. An ABORT takes effect between steps, and 512 rows keep the matrix units of a core busy."""


@dataclass
class OpenAttempt:
    """A PREFILL that the loop computes. sampled: (token, logprobs) of each sample so far."""

    message: Prefill
    request: Request
    sampled: list[tuple[int | None, dict[int, float] | None]] = field(default_factory=list)


class PrefillLoop:
    """Computes prompts over the pages of one store. It takes the outputs of its own steps (engine.step.Outputs).

    model        Decoder, bound to the layout of `store`
    config       EngineConfig of the decode process
    generation   of the pool
    between      called after each layer of a step (Decoder.forward), or None
    """

    def __init__(
        self,
        model: Decoder,
        store: CacheStore,
        config: EngineConfig,
        generation: int,
        between: Between | None = None,
    ) -> None:
        self.store = store
        self.cache = GrantedCache(config.page_size)
        self.generation = generation
        self.running: list[Request] = []  # requests of the step that is being computed
        self._model = model
        self._page_size = config.page_size
        self._runner = Runner(model, store, config.page_size, config.codec, between)
        # The scheduler admits every attempt at once; the budget of a step orders them.
        config = replace(config, max_step_tokens=STEP_TOKENS, max_requests=1 << 20, prefix_cache=False, schedule="fcfs")
        self._scheduler = Scheduler(config, self.cache, Events())
        self._open: dict[str | None, OpenAttempt] = {}  # by request id in this process, see _id_of
        self._messages: list[Message] = []
        self._finished = 0.0
        self._highest = 0  # attempt accepted or aborted; a PREFILL at or below it is late: its pages are not its own

    @property
    def has_work(self) -> bool:
        """Whether an attempt is open."""
        return bool(self._open)

    def accept(self, message: Prefill) -> Failed | None:
        """Opens an attempt. Attempts ascend, so a repeated or late message is dropped.

        Returns FAILED where the message cannot be served, else None.
        """
        if message.attempt <= self._highest:
            return None
        try:
            request, given = self._checked(message)
        except ProtocolError as error:
            return failed(message, str(error))
        self._highest = message.attempt
        self.cache.give(request, given)
        self._open[request.request_id] = OpenAttempt(message, request)
        self._scheduler.add(request)
        return None

    def abort(self, message: Abort) -> AbortAck:
        """Closes an attempt: nothing is written for it any more. One that is not open is acknowledged as well."""
        self._highest = max(self._highest, message.attempt)
        attempt = self._open.get(_id_of(message))
        if attempt is not None:
            self._close(attempt)
        return AbortAck(generation=self.generation, request=message.request, attempt=message.attempt)

    def step(self) -> list[Message]:
        """Computes one step and returns DONE or FAILED of each attempt that it ends.

        Raises EOFError where `between` does: the decode process is gone.
        """
        plan, self._messages = StepPlan(), []
        try:
            plan = self._scheduler.plan()
            self.running = plan.requests
            self._runner.move(plan.moves)
            if plan.requests:
                resolve(launch(plan, None, self._runner, self, self._sample), None, self.cache, self)
        except EOFError:
            raise
        except Exception as error:
            logger.exception("a step failed; its prompts are reported as failed")
            for attempt in list(self._open.values()):  # a copy that was not made may be the checkpoint of any of them
                if attempt.request in plan.requests or not plan.moves.done:
                    self.finish(attempt.request, "error", f"{type(error).__name__}: {error}")
        finally:
            self.running = []
        return self._messages

    def prompt(self, request: Request) -> Prefill:
        """The PREFILL of a request of this loop."""
        return self._open[request.request_id].message

    # -- engine.step.Outputs

    def siblings(self, request: Request) -> list[Request]:
        """The other samples that the PREFILL asks for."""
        wire = self.prompt(request).sampling
        return [_sample_of(request, index) for index in range(wire.index + 1, wire.index + wire.samples)]

    def fork(self, request: Request, children: list[Request]) -> None:
        """Does nothing: siblings run in the decode process."""

    def append(self, request: Request, token: int | None, logprobs: dict[int, float] | None, now: float) -> None:
        """Takes the first token of a sample. The last sample's makes DONE; None ends all samples of the prompt."""
        attempt = self._open[request.request_id]
        message, done = attempt.message, attempt.sampled
        done += [(token, logprobs)] * (message.sampling.samples if token is None else 1)
        if len(done) == message.sampling.samples:
            tokens, scores = zip(*done, strict=True)
            self._close(attempt)
            self._messages.append(
                Done(
                    generation=self.generation, request=message.request, attempt=message.attempt, tokens=tokens,
                    logprobs=scores, finished=self._finished,
                )
            )  # fmt: skip

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Ends an attempt with FAILED, whose reason is the error."""
        attempt = self._open[request.request_id]
        self._close(attempt)
        self._messages.append(failed(attempt.message, error or reason))

    # -- inside

    def _sample(self, logits: torch.Tensor, requests: list[Request], last: torch.Tensor) -> SamplerOutput:
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # DONE says that every page is written
        self._finished = time.monotonic()
        return sample(logits, requests, last, self._model.config.eos_token_ids)

    def _close(self, attempt: OpenAttempt) -> None:
        del self._open[attempt.request.request_id]
        self._scheduler.remove(attempt.request)
        self.cache.release(attempt.request)

    def _checked(self, message: Prefill) -> tuple[Request, GrantedPages]:
        """A request over the granted pages. Raises ProtocolError for a field that is out of its range."""
        tokens, pages = unpack_ints(message.tokens), unpack_ints(message.pages)
        size, num_pages, num_states = self._page_size, len(self.store.pages), len(self.store.states)
        vocab = self._model.config.vocab_size
        checkpoints = dict(message.checkpoints)
        states = message.states
        whole = (position % size == 0 for position in (message.cached_length, *checkpoints))
        expectations = {
            "tokens": len(tokens) > 0 and min(tokens) >= 0 and max(tokens) < vocab,
            "prompt_length": 0 < message.prompt_length <= len(tokens),
            "cached_length": 0 <= message.cached_length < len(tokens) and all(whole),
            "pages": len(pages) == len(set(pages)) == self.cache.pages_for(len(tokens))
            and (not pages or 0 <= min(pages) <= max(pages) < num_pages),
            "state": (message.state is None) == (num_states == 0),
            "checkpoints": len(set(states)) == len(states)
            and all(0 <= state < num_states for state in states)
            and all(message.cached_length < position < len(tokens) for position in checkpoints),
            "stop_token_ids": all(0 <= token < vocab for token in message.sampling.stop_token_ids),
            "logprobs": message.sampling.logprobs is None or message.sampling.logprobs <= vocab,
            "index": 0 <= message.sampling.index < 1 << 20,
            "samples": 0 < message.sampling.samples <= 1024
            and message.sampling.seed.removeprefix("-").isdecimal()
            and len(message.sampling.seed) < 64,
        }
        for name, holds in expectations.items():
            if not holds:
                raise ProtocolError(f"PREFILL {message.request}: invalid {name}")
        request = Request(tokens[: message.prompt_length].tolist(), _params(message), _id_of(message))
        request.tokens, request.num_prompt = tokens, message.prompt_length
        request.seed, request.index = int(message.sampling.seed), message.sampling.index
        return request, GrantedPages(pages, message.cached_length, message.state, checkpoints)


def _id_of(message: Prefill | Abort) -> str:
    """The request id in this process: preempted samples of one request are attempts of their own, with one id."""
    return f"{message.request}/{message.attempt}"


def _params(message: Prefill) -> SamplingParams:
    """The parameters of the first token. Raises ProtocolError for invalid ones."""
    wire = message.sampling
    params = SamplingParams(
        max_tokens=1, temperature=wire.temperature, top_k=wire.top_k, top_p=wire.top_p, min_p=wire.min_p,
        stop_token_ids=wire.stop_token_ids, ignore_eos=wire.ignore_eos, min_tokens=wire.min_tokens,
        logprobs=wire.logprobs, repetition_penalty=wire.repetition_penalty,
    )  # fmt: skip
    try:
        params.validate()
    except ValueError as error:
        raise ProtocolError(f"PREFILL {message.request}: {error}") from None
    return params


def _sample_of(request: Request, index: int) -> Request:
    """Sample `index` of a request, with the fields that the sampler reads."""
    one = Request(request.prompt_token_ids, request.params, request.request_id)
    one.tokens, one.num_prompt = array("i", request.tokens), request.num_prompt
    one.num_computed, one.seed, one.index = request.num_computed, request.seed, index
    return one
