"""Step: one step from its dispatch to its result.

    launch     run -> advance -> sample           dispatched to the device; no result is known yet
    resolve    publish -> append -> stop          its tokens are on the host

Between launch and resolve of step n, the engine may plan and launch step n + 1, and callers may abort requests. So when
step n is resolved, some of its requests have ended (their token is dropped), some are preempted (their token is kept,
their pages are released), and those in step n + 1 have `num_computed - end` more tokens in flight.

A page or a state that is freed while a step still writes it may be allocated at once: a device runs steps in order, so
its next owner writes after that step.
Source: the overlapped schedulers of SGLang and vLLM, at depth 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nanokv.cache.contract import Cache
from nanokv.core.request import Request
from nanokv.engine.host_copy import UnwritableRows
from nanokv.engine.inputs import num_logit_rows
from nanokv.engine.runner import Runner
from nanokv.engine.sampler import SamplerOutput
from nanokv.engine.scheduler import StepPlan

Sample = Callable[[torch.Tensor, list[Request], torch.Tensor], SamplerOutput]
"""(logits float32 [rows, vocab], the request of each row, the token before each, int64 [rows]) -> SamplerOutput."""


class Outputs(Protocol):
    """Receives the results of a step: the OutputProcessor, and in a prefill process the PrefillLoop."""

    def siblings(self, request: Request) -> list[Request]:
        """The other samples of a request whose prompt is computed by this step; they do not run yet."""

    def fork(self, request: Request, children: list[Request]) -> None:
        """Runs these siblings from now on, on the pages of the prompt."""

    def append(self, request: Request, token: int | None, logprobs: dict[int, float] | None, now: float) -> None:
        """Appends a sampled token; None: the model's logits are not finite.

        logprobs   {token id: log-probability}, where the request asks for them
        now        seconds of time.perf_counter()
        """

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Ends a sample."""


@dataclass
class RequestSlice:
    """The part of one request in a step.

    end       num_computed after the step
    rows      its rows of the step
    samples   the samples that get a token: the request, and siblings that begin after its prompt; empty in mid-prompt
    logits    float32 [rows, vocab] of its last rows, where it is scored
    """

    request: Request
    end: int
    rows: slice
    samples: list[Request] = field(default_factory=list)
    logits: torch.Tensor | None = None


@dataclass
class Step:
    """A step in flight.

    sampled      the tokens; None where no sample gets one
    unwritable   the rows that the codec refused; None for a codec that refuses none
    """

    slices: list[RequestSlice]
    sampled: SamplerOutput | None
    unwritable: UnwritableRows | None

    @property
    def requests(self) -> list[Request]:
        """The requests of the step, in row order."""
        return [part.request for part in self.slices]


def launch(plan: StepPlan, previous: Step | None, runner: Runner, outputs: Outputs, sample: Sample) -> Step:
    """Dispatches a planned step.

    previous   the step in flight, whose tokens this step may compute; None: there is none
    """
    counts = [num_logit_rows(request) for request in plan.requests]
    in_flight = previous.sampled.token_ids if previous is not None and previous.sampled is not None else None
    logits, last, unwritable = runner.run(plan.requests, in_flight)
    slices: list[RequestSlice] = []
    sampled: list[Request] = []
    rows: list[int] = []
    first = row = 0
    for request, count in zip(plan.requests, counts, strict=True):
        is_sampled = count > 0 and not request.wants_all_logits
        num_rows = request.num_scheduled
        request.advance(len(sampled) if is_sampled else None)
        part = RequestSlice(request, request.num_computed, slice(row, row + num_rows))
        if is_sampled:
            part.samples = [request, *outputs.siblings(request)]
            sampled += part.samples
            rows += [first] * len(part.samples)
        elif request.wants_all_logits:
            part.logits = logits[first : first + count].clone()  # the next replay of a graph overwrites them
        slices.append(part)
        first, row = first + count, row + num_rows
    if not sampled:
        return Step(slices, None, unwritable)
    if rows != list(range(first)):
        logits, last = logits[rows], last[rows]
    return Step(slices, sample(logits, sampled, last), unwritable)


def resolve(step: Step, following: Step | None, cache: Cache, outputs: Outputs) -> None:
    """Waits for a step, publishes its pages and delivers its tokens and logits.

    following   the step dispatched since, or None
    """
    tokens, logprobs = step.sampled.fetch() if step.sampled is not None else ([], [])
    refused = step.unwritable.fetch() if step.unwritable is not None else []
    now = time.perf_counter()
    results = iter(zip(tokens, logprobs, strict=True))
    in_following = set(following.requests) if following is not None else set()
    for part in step.slices:
        if part.request not in in_following:
            part.request.in_flight = None
    arrived: list[tuple[Request, tuple[int | None, dict[int, float] | None]]] = []
    for part in step.slices:
        own = [next(results) for _ in part.samples]
        request = part.request
        if request.finish_reason is not None:
            continue
        if step.unwritable is not None and any(refused[part.rows]):  # before its pages are published
            outputs.finish(request, "error", step.unwritable.why)
            continue
        is_preempted = request.num_computed < part.end
        gets_tokens = bool(part.samples) and request.num_tokens == part.end and not (is_preempted and request.num_forks)
        if gets_tokens and any(token is None for token, _ in own):  # such pages are never published
            outputs.append(request, None, None, now)
            continue
        if not is_preempted:
            cache.commit(request, in_flight=request.num_computed - part.end)
        if part.logits is not None and request.logit_blocks is not None:
            request.logit_blocks.append((part.end - len(part.logits), part.logits))
        elif gets_tokens:
            if len(part.samples) > 1:
                outputs.fork(request, part.samples[1:])
            arrived += zip(part.samples, own, strict=True)
    for sample, (token, scores) in arrived:
        outputs.append(sample, token, scores, now)
    for part in step.slices:
        request = part.request
        if part.logits is not None and request.finish_reason is None and part.end == request.num_tokens:
            outputs.finish(request, "length")
