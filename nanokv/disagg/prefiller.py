"""PrefillLoop: prompts in, first tokens out. The same Scheduler and Runner as a decode process, over given pages.

Knows nothing of sockets or processes: `accept` takes a PREFILL, `step` computes one step and returns what to say.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch

from nanokv.cache.store import CacheStore
from nanokv.core.batch import Batch
from nanokv.core.config import EngineConfig
from nanokv.core.events import EventLog
from nanokv.core.request import Request, SamplingParams
from nanokv.disagg.messages import Abort, AbortAck, Done, Failed, Message, Prefill, ProtocolError, failed, unpack_ints
from nanokv.disagg.pages import FixedPages, Given
from nanokv.engine.inputs import num_logit_rows
from nanokv.engine.runner import Runner
from nanokv.engine.sampler import sample
from nanokv.engine.scheduler import Scheduler, StepPlan
from nanokv.models.decoder import Block, Decoder

logger = logging.getLogger("nanokv")

STEP_TOKENS = 512
"""Tokens of one step: an ABORT is heard between steps, and 512 rows already use a core's matrix units fully."""

Key = tuple[str, int]
"""(request, attempt)"""


class Watched:
    """A block that tells when it has run, so that a worker is heard, and layers can travel, in the middle of a step."""

    def __init__(self, block: Block, layer: int, after_layer: Callable[[int, Batch], None]) -> None:
        self._block, self._layer, self._after_layer = block, layer, after_layer

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        x = self._block(x, residual, store, batch)
        self._after_layer(self._layer, batch)
        return x


class PrefillLoop:
    """Computes what it is given over one store.

    model         Decoder, bound to the layout of `store`
    config        EngineConfig of the decode process
    generation    of the pool
    after_layer   called with (layer, batch) whenever a layer of a step has run
    """

    def __init__(
        self,
        model: Decoder,
        store: CacheStore,
        config: EngineConfig,
        generation: int,
        after_layer: Callable[[int, Batch], None] = lambda layer, batch: None,
    ) -> None:
        watched = [Watched(block, layer, after_layer) for layer, block in enumerate(model.layers)]
        runs = Decoder(model.config, model.specs, model.embedding, watched, model.norm, model.head)
        self.store = store
        self.cache = FixedPages(config.page_size)
        self.generation = generation
        self.running: list[Request] = []  # the requests of the step that runs right now
        self._model = model
        self._page_size = config.page_size
        self._runner = Runner(runs, store, config.page_size, config.codec)
        # Every attempt runs at once as far as the scheduler is concerned; the budget of a step orders them.
        ours = replace(config, max_step_tokens=STEP_TOKENS, max_requests=1 << 20, prefix_cache=False, schedule="fcfs")
        self._scheduler = Scheduler(ours, self.cache, EventLog(None))
        self._open: dict[Key, Request] = {}
        self._messages: dict[Request, Prefill] = {}
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
        self._open[key], self._messages[request] = request, message
        self._scheduler.add(request)
        return None

    def abort(self, message: Abort) -> AbortAck:
        """Forgets an attempt; nothing is written for it from here on. What is not open is acknowledged all the same."""
        key = (message.request, message.attempt)
        self._highest = max(self._highest, message.attempt)
        if key in self._open:
            self._close(key)
        return AbortAck(generation=self.generation, request=message.request, attempt=message.attempt)

    def step(self) -> list[Message]:
        """One step; DONE or FAILED of each request that it ends. Raises EOFError where `after_layer` does:
        nobody is left to be told."""
        plan, messages = StepPlan(), []
        try:
            plan = self._scheduler.plan()
            self.running = list(plan.requests)
            if plan.requests:
                self._run(plan, messages)
        except EOFError:
            raise
        except Exception as error:
            logger.exception("a step failed; the decode process is told")
            lost = plan.requests or list(self._open.values())
            keys = [key for key, request in self._open.items() if request in lost]
            messages += [self._give_up(key, f"{type(error).__name__}: {error}") for key in keys]
        finally:
            self.running = []
        return messages

    def prompt(self, request: Request) -> Prefill:
        """The message that a request came with."""
        return self._messages[request]

    def _run(self, plan: StepPlan, messages: list[Message]) -> None:
        """Appends to `messages` as it goes: what ended before an error has ended all the same."""
        wanted = [num_logit_rows(request) for request in plan.requests]
        logits, last, unwritable = self._runner.run(plan, None)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # what DONE promises has been written
        finished = time.monotonic()
        refused = iter(unwritable.fetch() if unwritable is not None else [])
        ill: list[Request] = []
        for request in plan.requests:
            if any(list(islice(refused, request.num_scheduled))):
                ill.append(request)
            request.advance()
            self.cache.commit(request)
        ends = [request for request, count in zip(plan.requests, wanted, strict=True) if count]
        for request in ill:
            key = next(key for key, one in self._open.items() if one is request)
            messages.append(self._give_up(key, unwritable.why))
        for row, request in enumerate(ends):
            if request in ill:
                continue
            prompt = self._messages[request]
            first = prompt.sampling.index
            samples = [_sample_of(request, index) for index in range(first, first + prompt.sampling.samples)]
            rows = [row] * len(samples)
            sampled = sample(logits[rows], samples, last[rows], self._model.config.eos_token_ids)
            tokens, logprobs = sampled.fetch()
            key = (prompt.request, prompt.attempt)
            self._close(key)
            messages.append(
                Done(
                    generation=self.generation, request=key[0], attempt=key[1], tokens=tuple(tokens),
                    logprobs=tuple(logprobs), finished=finished,
                )
            )  # fmt: skip

    def _close(self, key: Key) -> None:
        request = self._open.pop(key)
        del self._messages[request]
        self._scheduler.remove(request)
        self.cache.release(request)

    def _give_up(self, key: Key, reason: str) -> Failed:
        message = self._messages[self._open[key]]
        self._close(key)
        return failed(message, reason)

    def _checked(self, message: Prefill) -> tuple[Request, Given]:
        """A request over what the message gives. Raises ProtocolError where any of it cannot be."""
        tokens, pages = unpack_ints(message.tokens), unpack_ints(message.pages)
        size, num_pages, num_states = self._page_size, self.store.num_pages, self.store.states.shape[0]
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
        return request, Given(pages, message.cached_length, message.state, checkpoints)


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
