"""PrefillLoop: prompts in, first tokens out. The Scheduler, Runner and Step of an engine, over pages that were granted.

Knows nothing of sockets or processes: `accept` takes a PREFILL, `step` computes one step and returns what to say.
"""

from __future__ import annotations

import logging
import time
from array import array
from dataclasses import replace

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
"""Tokens of one step: an ABORT is heard between steps, and 512 rows already use a core's matrix units fully."""

Key = tuple[str, int]
"""(request, attempt)"""


class PrefillLoop:
    """Computes what it is given over one store. It is the Outputs of its own steps: the first tokens become DONE.

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
        self.running: list[Request] = []  # the requests of the step that runs right now
        self._model = model
        self._page_size = config.page_size
        self._runner = Runner(model, store, config.page_size, config.codec, between)
        # Every attempt runs at once as far as the scheduler is concerned; the budget of a step orders them.
        ours = replace(config, max_step_tokens=STEP_TOKENS, max_requests=1 << 20, prefix_cache=False, schedule="fcfs")
        self._scheduler = Scheduler(ours, self.cache, Events())
        self._open: dict[Key, Request] = {}
        self._prompts: dict[Request, Prefill] = {}
        self._sampled: dict[Request, list[tuple[int | None, dict[int, float] | None]]] = {}
        self._messages: list[Message] = []
        self._finished = 0.0
        self._highest = 0  # attempt that was accepted or aborted; a PREFILL at or below it is late, its pages are gone

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def accept(self, message: Prefill) -> Failed | None:
        """Takes an attempt on; or says why not. Attempts ascend: a doubled or late message is dropped."""
        key = (message.request, message.attempt)
        if message.attempt <= self._highest:
            return None
        try:
            request, given = self._checked(message)
        except ProtocolError as error:
            return failed(message, str(error))
        self._highest = message.attempt
        self.cache.give(request, given)
        self._open[key], self._prompts[request] = request, message
        self._scheduler.add(request)
        return None

    def abort(self, message: Abort) -> AbortAck:
        """Forgets an attempt; nothing is written for it from here on. What is not open is acknowledged all the same."""
        key = (message.request, message.attempt)
        self._highest = max(self._highest, message.attempt)
        if key in self._open:
            self._close(self._open[key])
        return AbortAck(generation=self.generation, request=message.request, attempt=message.attempt)

    def step(self) -> list[Message]:
        """One step; DONE or FAILED of each request that it ends. Raises EOFError where `between` does: then no process
        is left to be told."""
        plan, self._messages = StepPlan(), []
        try:
            plan = self._scheduler.plan()
            self.running = list(plan.requests)
            self._runner.move(plan.moves)
            if plan.requests:
                resolve(launch(plan, None, self._runner, self, self._sample), None, self.cache, self)
        except EOFError:
            raise
        except Exception as error:
            logger.exception("a step failed; the decode process is told")
            lost = plan.requests or list(self._open.values())
            for request in [request for request in self._open.values() if request in lost]:
                self.finish(request, "error", f"{type(error).__name__}: {error}")
        finally:
            self.running = []
        return self._messages

    def prompt(self, request: Request) -> Prefill:
        """The message that a request came with."""
        return self._prompts[request]

    # -- engine.step.Outputs

    def siblings(self, request: Request) -> list[Request]:
        """The other samples that PREFILL asks for."""
        wire = self._prompts[request].sampling
        return [_sample_of(request, index) for index in range(wire.index + 1, wire.index + wire.samples)]

    def fork(self, request: Request, children: list[Request]) -> None:
        """Siblings run in the decode process."""

    def append(self, request: Request, token: int | None, logprobs: dict[int, float] | None, now: float) -> None:
        """The first token of a sample; with that of the last one, DONE. None ends all samples of the prompt."""
        key = next(key for key in self._open if key[0] == request.request_id)
        parent = self._open[key]
        wanted = self._prompts[parent].sampling.samples
        done = self._sampled.setdefault(parent, [])
        done += [(token, logprobs)] * (wanted if token is None else 1)
        if len(done) == wanted:
            tokens, scores = zip(*done, strict=True)
            self._close(parent)
            self._messages.append(
                Done(
                    generation=self.generation, request=key[0], attempt=key[1], tokens=tokens, logprobs=scores,
                    finished=self._finished,
                )
            )  # fmt: skip

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """FAILED, with the error as its reason."""
        message = self._prompts[request]
        self._close(request)
        self._messages.append(failed(message, error or reason))

    # -- inside

    def _sample(self, logits: torch.Tensor, requests: list[Request], last: torch.Tensor) -> SamplerOutput:
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # what DONE promises has been written
        self._finished = time.monotonic()
        return sample(logits, requests, last, self._model.config.eos_token_ids)

    def _close(self, request: Request) -> None:
        message = self._prompts.pop(request)
        del self._open[message.request, message.attempt]
        self._sampled.pop(request, None)
        self._scheduler.remove(request)
        self.cache.release(request)

    def _checked(self, message: Prefill) -> tuple[Request, GrantedPages]:
        """A request over what the message gives. Raises ProtocolError where any of it cannot be."""
        tokens, pages = unpack_ints(message.tokens), unpack_ints(message.pages)
        size, num_pages, num_states = self._page_size, len(self.store.pages), len(self.store.states)
        vocab = self._model.config.vocab_size
        checkpoints = dict(message.checkpoints)
        states = [*checkpoints.values(), *([] if message.state is None else [message.state])]
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
            "samples": 0 < message.sampling.samples <= 1024
            and message.sampling.seed.removeprefix("-").isdecimal()
            and len(message.sampling.seed) < 64,
        }
        for field, holds in expectations.items():
            if not holds:
                raise ProtocolError(f"PREFILL {message.request}: {field} cannot be")
        request = Request(tokens[: message.prompt_length].tolist(), _params(message), message.request)
        request.tokens, request.num_prompt = tokens, message.prompt_length
        request.seed, request.index = int(message.sampling.seed), message.sampling.index
        return request, GrantedPages(pages, message.cached_length, message.state, checkpoints)


def _params(message: Prefill) -> SamplingParams:
    """Raises ProtocolError for parameters that cannot be honoured."""
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
    """A request with the same tokens: what the sampler needs to know of one of n samples."""
    one = Request(request.prompt_token_ids, request.params, request.request_id)
    one.tokens, one.num_prompt = array("i", request.tokens), request.num_prompt
    one.num_computed, one.seed, one.index = request.num_computed, request.seed, index
    return one
