"""Engine: requests in, outputs out, one step at a time. Owns the lifecycle of a request and the two halves of commit.

    add_request -> waiting
    step():  plan -> run -> advance -> sample -> resolve -> outputs

`resolve` is the only place where a token is appended, a stop is found and pages are published. An exception inside a
step ends the requests of that step with "error"; the pages come back and the engine goes on.
"""

from __future__ import annotations

import logging
import time
from array import array
from dataclasses import replace

import torch

from nanokv.cache.manager import CacheManager
from nanokv.cache.store import CacheStore
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError, RequestError
from nanokv.core.events import EventLog
from nanokv.core.request import Request, RequestMetrics, RequestOutput
from nanokv.core.spec import PageLayout
from nanokv.engine.admission import check_request
from nanokv.engine.answer import Answer
from nanokv.engine.memory import pool_size
from nanokv.engine.runner import Runner, num_logit_rows
from nanokv.engine.sampler import sample
from nanokv.engine.scheduler import Scheduler, StepPlan
from nanokv.models.decoder import Decoder
from nanokv.text.tokenizer import Tokenizer

logger = logging.getLogger("nanokv")


class Engine:
    """Continuous batching over a paged, prefix-shared cache.

    model       a Decoder; the engine binds it to the layout of its pages
    config      EngineConfig, names resolved
    tokenizer   for texts and stop texts; None serves token ids only
    device      where model and pages live
    Raises      ConfigError when the pool does not fit in memory
    """

    def __init__(
        self, model: Decoder, config: EngineConfig, tokenizer: Tokenizer | None, device: torch.device | str = "cpu"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layout = PageLayout(model.specs, config.page_size)
        longest = model.config.max_positions
        if config.max_model_len is not None and config.max_model_len > longest:
            raise ConfigError(f"max_model_len={config.max_model_len}: this model reaches {longest} tokens at most")
        num_pages, num_states = pool_size(config, self.layout, torch.device(device))
        if num_states:  # a request that runs needs a state, and one more for its checkpoint
            config = replace(config, max_requests=min(config.max_requests, num_states // 2))
        self.config = config
        self.events = EventLog(config.event_log)
        self.store = CacheStore(self.layout, num_pages, device, num_states=num_states)
        self.cache = CacheManager(
            self.layout, num_pages, config.prefix_cache, self.events, num_states, config.state_interval
        )
        model.bind(self.layout)
        self.runner = Runner(model, self.store, config.page_size)
        self.scheduler = Scheduler(config, self.cache, self.events)
        # A request alone must fit in the pool; the last token sampled is never written.
        self._pool_tokens = num_pages * config.page_size
        self.max_length = min(config.max_model_len or longest, self._pool_tokens + 1)
        self.num_steps = 0
        self._live: dict[str, list[Request]] = {}
        self._outputs: list[RequestOutput] = []
        self._num_added = 0

    # ---- requests -------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> str:
        """Queue a request and return its id. Raises RequestError, naming field, value and what is allowed."""
        if request.request_id is not None and request.request_id in self._live:
            raise RequestError(f"request_id={request.request_id!r}: a request with this id is still live")
        request.prompt_token_ids = check_request(request, self.model.config, self.config, self._longest(request))
        if request.params.stop and self.tokenizer is None:
            raise RequestError(f"stop={request.params.stop!r}: stop texts need a tokenizer, which this model lacks")
        request.tokens = array("i", request.prompt_token_ids)
        self._num_added += 1
        if request.request_id is None:
            request.request_id = f"request-{self._num_added}"
        params = request.params
        request.num_prompt = len(request.tokens)
        request.max_tokens = min(params.max_tokens, self.max_length - request.num_prompt)
        request.seed = params.seed if params.seed is not None else (self.config.seed << 64) + self._num_added
        request.num_forks = params.n - 1
        request.logprobs = [] if params.logprobs is not None else None
        request.metrics = RequestMetrics(arrival=time.perf_counter())
        self._prepare_answer(request)
        self._live[request.request_id] = [request]
        self.scheduler.add(request)
        if self.events.on:
            self.events.write("request", request=request.request_id, prompt_tokens=request.num_prompt, n=params.n)
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End every sample of a request now; its pages are free at once. Unknown or finished ids raise RequestError."""
        if request_id not in self._live:
            raise RequestError(f"request_id={request_id!r}: no such live request")
        for request in list(self._live[request_id]):
            self._finish(request, "abort")

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is live: queued or running."""
        return request_id in self._live

    @property
    def has_work(self) -> bool:
        return bool(self._live) or bool(self._outputs)

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what became known: an output for each sample with a new token or an end."""
        plan = StepPlan()
        try:
            plan = self.scheduler.plan()
            if plan.requests:
                self._run(plan)
        except Exception as error:
            logger.exception("a step failed; its requests end with an error")
            # Where planning itself failed, it is one of the running, or the one that was about to be admitted.
            failed = plan.requests or self.scheduler.running or list(self.scheduler.waiting)[:1]
            for request in self._samples_of(failed):
                self._finish(request, "error", f"{type(error).__name__}: {error}")
            self._lose_states(plan)
        except BaseException:  # Ctrl-C in the middle of a step: nothing of it counts, its requests compute it again
            interrupted = self._samples_of(plan.requests)
            for request in [request for request in reversed(self.scheduler.running) if request in interrupted]:
                self.scheduler.preempt(request)
            self._lose_states(plan)
            raise
        if self.config.debug_checks and not self._live:
            self.cache.check()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _lose_states(self, plan: StepPlan) -> None:
        """State copies that a failed step did not get to: who was to have one does without."""
        lost = {dst for _, dst in plan.state_copies}
        for request in [request for request in reversed(self.scheduler.running) if request.state_id in lost]:
            self.scheduler.preempt(request)
        self.cache.lose_states(lost)

    def put_back(self, outputs: list[RequestOutput]) -> None:
        """Outputs that the caller of `step` had no use for; the next step returns them again."""
        self._outputs.extend(outputs)

    def _samples_of(self, requests: list[Request]) -> list[Request]:
        """Every live sample of these requests: siblings share the fate of a step, forked in it or not."""
        ids = dict.fromkeys(request.request_id for request in requests)
        return [sample for request_id in ids for sample in self._live.get(request_id, ())]

    def _run(self, plan: StepPlan) -> None:
        self.num_steps += 1
        self.events.step = self.num_steps
        now = time.perf_counter()
        for request in plan.requests:
            if request.metrics.first_scheduled is None:
                request.metrics.first_scheduled = now
        if self.events.on:
            rows = [[request.request_id, request.index, request.num_scheduled] for request in plan.requests]
            self.events.write(
                "step", tokens=plan.num_tokens, requests=rows, copies=plan.page_copies, state_copies=plan.state_copies
            )
        wanted = [num_logit_rows(request) for request in plan.requests]
        logits = self.runner.run(plan)
        for request in plan.requests:
            request.advance()
        self._resolve(plan, logits, wanted)

    def _resolve(self, plan: StepPlan, logits: torch.Tensor, wanted: list[int]) -> None:
        """Second half of commit: publish, append, stop."""
        sampled: list[Request] = []
        rows: list[int] = []
        first = 0
        for request, count in zip(plan.requests, wanted, strict=True):
            self.cache.commit(request)
            if request.wants_all_logits:
                again = max(0, request.num_scored - (request.num_computed - count))
                request.logit_blocks.append(logits[first + again : first + count])
                request.num_scored = max(request.num_scored, request.num_computed)
            elif count:
                samples = [request, *self._fork(request)]
                sampled.extend(samples)
                rows.extend([first] * len(samples))
            first += count
        if sampled:
            picked = logits if rows == list(range(len(logits))) else logits[rows]
            tokens, logprobs = sample(picked, sampled, self.model.config.eos_token_ids)
            now = time.perf_counter()
            for request, token, scores in zip(sampled, tokens, logprobs, strict=True):
                self._append(request, token, scores, now)
        for request in plan.requests:
            if request.wants_all_logits and request.num_to_compute == 0:
                self._finish(request, "length")

    def _fork(self, request: Request) -> list[Request]:
        """The other samples of a request whose prompt has just been computed: they share its pages from here on."""
        children: list[Request] = []
        num_forks, request.num_forks = request.num_forks, 0
        for index in range(1, num_forks + 1):
            child = Request(request.prompt_token_ids, request.params, request.request_id)
            child.index, child.seed, child.max_tokens = index, request.seed, request.max_tokens
            child.num_prompt = request.num_prompt
            child.tokens = array("i", request.tokens)
            child.logprobs = [] if request.logprobs is not None else None
            child.metrics = RequestMetrics(request.metrics.arrival, request.metrics.first_scheduled)
            self._prepare_answer(child)
            self.cache.fork(request, child)
            self.scheduler.join(child)
            self._live[request.request_id].append(child)
            children.append(child)
        return children

    def _append(self, request: Request, token: int | None, scores: dict[int, float] | None, now: float) -> None:
        params = request.params
        if token is None:
            self._finish(request, "error", "the model's logits are not finite; a wider dtype may help")
            return
        request.tokens.append(token)
        request.metrics.token_times.append(now)
        if scores is not None:
            request.logprobs.append(scores)
        is_eos = token in params.stop_token_ids or (not params.ignore_eos and token in self.model.config.eos_token_ids)
        if request.answer is not None and not is_eos:
            request.answer.push(token, request.num_generated >= params.min_tokens)
        if is_eos or (request.answer is not None and request.answer.stopped):
            self._finish(request, "stop")
        elif request.num_generated >= request.max_tokens:
            self._finish(request, "length")
        else:
            self._outputs.append(self._output(request))

    def _finish(self, request: Request, reason: str, error: str | None = None) -> None:
        self.scheduler.remove(request)
        request.finish_reason, request.error = reason, error
        if request.answer is not None:
            request.answer.flush(reason in ("stop", "length"))
        samples = self._live[request.request_id]
        samples.remove(request)
        if not samples:
            del self._live[request.request_id]
        if self.events.on:
            self.events.write("finish", request=request.request_id, index=request.index, reason=reason)
        for index in range(request.index, request.index + request.num_forks + 1):
            output = self._output(request)
            output.index = index
            self._outputs.append(output)

    def _output(self, request: Request) -> RequestOutput:
        answer: Answer | None = request.answer
        return RequestOutput(
            request_id=request.request_id,
            index=request.index,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=request.tokens[request.num_prompt :].tolist(),
            delta=answer.take_delta() if answer is not None else "",
            text=answer.text if answer is not None else "",
            finish_reason=request.finish_reason,
            error=request.error,
            cached_tokens=request.num_cached,
            kv_matched_tokens=request.num_kv_matched,
            logprobs=list(request.logprobs) if request.logprobs is not None else None,
            metrics=request.metrics,
        )

    # ---- the rest -------------------------------------------------------------------------------------------------

    def _longest(self, request: Request) -> int:
        """Prompt tokens that leave room for an answer; a scored text has none, but every token of it is written."""
        return min(self.max_length, self._pool_tokens) if request.wants_all_logits else self.max_length - 1

    def _prepare_answer(self, request: Request) -> None:
        if self.tokenizer is not None and not request.wants_all_logits:
            request.answer = Answer(self.tokenizer, request.params.stop)

    def reset_prefix_cache(self) -> None:
        """Drop every cached page that no running request holds."""
        self.cache.reset()

    def stats(self) -> dict[str, int | float]:
        """Plain numbers about pages, requests and steps since the engine was made (documented at LLM.stats)."""
        return {
            "bytes_per_token": self.layout.bytes_per_token,
            "page_size": self.layout.page_size,
            "page_bytes": self.layout.page_bytes,
            "state_bytes": self.layout.state_bytes,
            **self.cache.stats(),
            "requests_running": len(self.scheduler.running),
            "requests_waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.num_preemptions,
            "steps": self.num_steps,
        }

    def close(self) -> None:
        for request_id in list(self._live):
            self.abort(request_id)
        self.events.close()
