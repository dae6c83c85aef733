"""Step: one step between its dispatch and its return. The two halves of commit, and what may happen in between.

    launch     run -> advance -> sample           the device has its orders; nothing is known yet
    resolve    publish -> append -> stop          its tokens are on the host

Between the two of step n the engine may plan and launch step n + 1, and a caller may abort. So when n comes back, some
of its requests have ended (their token is dropped), some have been preempted (their token counts, their pages are
gone), and those that step n + 1 computes further are `num_computed - end` tokens ahead.

A page or a state that is freed while a step still writes it may be handed out at once: a device runs steps in order, so
whoever gets it touches it only after that step.
Source   the overlapped schedulers of SGLang and vLLM, at depth 1
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nanokv.cache.manager import CacheManager
from nanokv.core.request import Request
from nanokv.engine.arrival import Unwritable
from nanokv.engine.inputs import num_logit_rows
from nanokv.engine.live import LiveRequests
from nanokv.engine.runner import Runner
from nanokv.engine.sampler import Sampled
from nanokv.engine.scheduler import StepPlan

Sample = Callable[[torch.Tensor, list[Request], torch.Tensor], Sampled]
"""Logits [rows, vocab], the request of each row, the token before each: int64 [rows]."""


@dataclass
class Share:
    """What one request has in a step.

    end      num_computed after it
    rows     its rows of the step
    samples  who gets a token out of it: the request, and siblings that begin after its prompt; empty in mid-prompt
    logits   float32 [rows, vocab] of its last rows, where it wants them instead of samples
    """

    request: Request
    end: int
    rows: slice
    samples: list[Request] = field(default_factory=list)
    logits: torch.Tensor | None = None


@dataclass
class Step:
    """A step on its way. `sampled` is None where nobody gets a token, `unwritable` where pages can hold all numbers."""

    shares: list[Share]
    sampled: Sampled | None
    unwritable: Unwritable | None

    @property
    def requests(self) -> list[Request]:
        return [share.request for share in self.shares]


def launch(plan: StepPlan, before: Step | None, runner: Runner, live: LiveRequests, sample: Sample) -> Step:
    """Dispatches a planned step; `before` is the step on its way, whose tokens this one may go on from."""
    counts = [num_logit_rows(request) for request in plan.requests]
    late = before.sampled.token_ids if before is not None and before.sampled is not None else None
    logits, last, unwritable = runner.run(plan, late)
    shares: list[Share] = []
    sampled: list[Request] = []
    rows: list[int] = []
    first = row = 0
    for request, count in zip(plan.requests, counts, strict=True):
        is_sampled = count > 0 and not request.wants_all_logits
        num_rows = request.num_scheduled
        request.advance(len(sampled) if is_sampled else None)
        share = Share(request, request.num_computed, slice(row, row + num_rows))
        if is_sampled:
            share.samples = [request, *live.siblings(request)]
            sampled += share.samples
            rows += [first] * len(share.samples)
        elif request.wants_all_logits:
            share.logits = logits[first : first + count].clone()  # a graph writes its own again; this is a plain tensor
        shares.append(share)
        first, row = first + count, row + num_rows
    if not sampled:
        return Step(shares, None, unwritable)
    if rows != list(range(first)):
        logits, last = logits[rows], last[rows]
    return Step(shares, sample(logits, sampled, last), unwritable)


def resolve(step: Step, after: Step | None, cache: CacheManager, live: LiveRequests) -> None:
    """A step has come back; `after` is the one dispatched since."""
    tokens, reports = step.sampled.fetch() if step.sampled is not None else ([], [])
    refused = step.unwritable.fetch() if step.unwritable is not None else []
    now = time.perf_counter()
    results = iter(zip(tokens, reports, strict=True))
    again = set(after.requests) if after is not None else ()
    for share in step.shares:
        if share.request not in again:
            share.request.in_flight = None
    arrived = []
    for share in step.shares:
        own = [next(results) for _ in share.samples]
        request = share.request
        if request.finish_reason is not None:
            continue
        if any(refused[share.rows]):  # before its pages could be seen by others
            live.finish(request, "error", step.unwritable.why)
            continue
        is_preempted = request.num_computed < share.end
        gets_tokens = (
            bool(share.samples) and request.num_tokens == share.end and not (is_preempted and request.num_forks)
        )
        if gets_tokens and any(token is None for token, _ in own):  # as above: nobody is to find such pages
            live.append(request, None, None, now)
            continue
        if not is_preempted:
            cache.commit(request, in_flight=request.num_computed - share.end)
        if share.logits is not None:
            _deliver(request, share)
        elif gets_tokens:
            if len(share.samples) > 1:
                live.fork(request, share.samples[1:])
            arrived += zip(share.samples, own, strict=True)
    for sample, (token, report) in arrived:
        live.append(sample, token, report, now)
    for share in step.shares:
        request = share.request
        if share.logits is not None and request.finish_reason is None and share.end == request.num_tokens:
            live.finish(request, "length")


def _deliver(request: Request, share: Share) -> None:
    """The logits of rows that were not delivered before: a preempted request computes some twice."""
    again = max(0, request.num_scored - (share.end - len(share.logits)))
    request.logit_blocks.append(share.logits[again:])
    request.num_scored = max(request.num_scored, share.end)
