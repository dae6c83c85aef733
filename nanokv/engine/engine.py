"""Engine: requests in, outputs out, one step at a time. Owns the lifecycle of a request.

    add_request -> waiting
    step():  plan -> launch -> resolve -> outputs

On a CPU a step is resolved where it was launched. On a GPU the next one is planned and launched first (depth 1), so
that the device always has work: the same loop, one step later. An exception inside a step ends the requests of that
step with "error"; the pages come back and the engine goes on.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import torch

from nanokv.cache.manager import CacheManager
from nanokv.cache.states import NUM_LENT
from nanokv.cache.store import CacheStore
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError, RequestError
from nanokv.core.events import EventLog
from nanokv.core.request import Request, RequestMetrics, RequestOutput
from nanokv.core.spec import PageLayout
from nanokv.engine.admission import check_request
from nanokv.engine.calibrate import measure_key_means
from nanokv.engine.device import current
from nanokv.engine.device_sampler import sample_on_device
from nanokv.engine.hand_over import hand_over, take_back
from nanokv.engine.live import LiveRequests
from nanokv.engine.memory import memory_for_pages, pool_size
from nanokv.engine.remote import Prefiller
from nanokv.engine.runner import Runner
from nanokv.engine.sampler import Sampled, sample
from nanokv.engine.scheduler import Scheduler, StepPlan
from nanokv.engine.step import Step, launch, resolve
from nanokv.models.decoder import Decoder
from nanokv.text.tokenizer import Tokenizer

logger = logging.getLogger("nanokv")


class Engine:
    """Continuous batching over a paged, prefix-shared cache.

    model       a Decoder; the engine binds it to the layout of its pages
    config      EngineConfig, names resolved
    tokenizer   for texts and stop texts; None serves token ids only
    device      where model and pages live
    prefiller   computes long prompts elsewhere; None: all are computed here
    Raises      ConfigError when the pool does not fit in memory
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        device: torch.device | str = "cpu",
        prefiller: Prefiller | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prefiller = prefiller
        self.layout = PageLayout(model.specs, config.page_size)
        longest = model.config.max_positions
        if config.max_model_len is not None and config.max_model_len > longest:
            raise ConfigError(f"max_model_len={config.max_model_len}: this model reaches {longest} tokens at most")
        self.device = device = torch.device(device)
        model.bind(self.layout)
        with current(device):
            memory = memory_for_pages(config, model, self.layout, device)
        num_pages, num_states = pool_size(config, self.layout, memory)
        if num_states:
            # A request that runs needs a state, where one is needed another for its checkpoint, and those that another
            # process leaves checkpoints in.
            each = self.layout.states_per_request + (NUM_LENT if prefiller and self.layout.is_recurrent else 0)
            config = replace(config, max_requests=min(config.max_requests, max(1, num_states // each)))
        self.config = config
        self.events = EventLog(config.event_log)
        on_gpu = device.type != "cpu"
        # Decode steps that are padded to a fixed size write what nobody reads to a page and a state that nobody owns.
        spare = int((on_gpu if config.graphs is None else config.graphs) and model.is_recordable)
        pages, states = num_pages + spare, num_states and num_states + spare
        num_bytes = pages * self.layout.page_bytes + states * self.layout.state_bytes
        buffer = None if prefiller is None else prefiller.allocate(num_bytes, device)
        self.store = CacheStore(self.layout, pages, device, buffer, states)
        self.cache = CacheManager(
            self.layout, num_pages, config.prefix_cache, self.events, num_states, config.state_interval
        )
        if config.center_keys:
            measure_key_means(model, self.store, config, longest)
        self.scheduler = Scheduler(config, self.cache, self.events, prefiller)
        self.live = LiveRequests(self.scheduler, self.cache, tokenizer, model.config.eos_token_ids, self.events)
        # A request alone must fit in the pool; the last token sampled is never written.
        self._pool_tokens = num_pages * config.page_size
        self.max_length = min(config.max_model_len or longest, self._pool_tokens + 1)
        self.runner = Runner(model, self.store, config.page_size, config.codec)
        if spare:
            with current(device):
                self.runner.pad_decodes(config.max_requests, self.cache.pages_for(self.max_length))
        self.num_steps = 0
        self._sampler = sample_on_device if on_gpu else sample
        self._depth = 1 if (on_gpu if config.overlap is None else config.overlap) else 0
        self._steps: deque[Step] = deque()  # on their way, oldest first
        self._num_added = 0

    # ---- requests -------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> str:
        """Queue a request and return its id. Raises RequestError, naming field, value and what is allowed."""
        if request.request_id is not None and request.request_id in self.live:
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
        self.live.open(request)
        if self.events.on:
            self.events.write("request", request=request.request_id, prompt_tokens=request.num_prompt, n=params.n)
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End every sample of a request now; unknown or finished ids raise RequestError. Its pages are free at once,
        but where another process writes into them: then when that one has acknowledged, or is gone."""
        if request_id not in self.live:
            raise RequestError(f"request_id={request_id!r}: no such live request")
        for request in self.live.of_id(request_id):
            self.live.finish(request, "abort")

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is live: queued or running."""
        return request_id in self.live

    @property
    def has_work(self) -> bool:
        return len(self.live) > 0 or self.live.has_outputs

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Launch one step and return what became known: an output for each sample with a new token or an end."""
        plan = StepPlan()
        try:
            if self.prefiller is not None:
                self._collect(wait=False)
            plan = self._plan()
            with current(self.device):
                self._hand_over(plan)
                is_launched = self._launch(plan)
                if not is_launched and not self._steps and self.prefiller is not None:
                    self._collect(wait=not self.live.has_outputs)
                while self._steps and (len(self._steps) > self._depth or not is_launched):
                    self._resolve(self._steps[0])
                    self._steps.popleft()
        except BaseException:  # Ctrl-C in the middle of a step: nothing of it counts, its requests compute it again
            self._send_back(plan)
            raise
        if not len(self.live):
            self._steps.clear()  # what is still on its way is a token too many of somebody who has ended
            if self.config.debug_checks:
                self.cache.check()
        return self.live.take_outputs()

    def put_back(self, outputs: list[RequestOutput]) -> None:
        """Outputs that the caller of `step` had no use for; the next step returns them again."""
        self.live.put_back(outputs)

    def _plan(self) -> StepPlan:
        try:
            return self.scheduler.plan()
        except Exception as error:
            # It is one of the running, or the one that was about to be admitted.
            self._fail(self.scheduler.running or list(self.scheduler.waiting)[:1], error)
            return StepPlan()

    def _launch(self, plan: StepPlan) -> bool:
        """Whether there was something to do, and it is on its way."""
        if not plan.requests:
            return False
        self.num_steps += 1
        self._record(plan)
        try:
            before = self._steps[-1] if self._steps else None
            self._steps.append(launch(plan, before, self.runner, self.live, self._sample))
        except Exception as error:
            self._fail(plan.requests, error)
            self._lose_states(plan)
            return False
        return True

    def _resolve(self, step: Step) -> None:
        try:
            resolve(step, self._steps[1] if len(self._steps) > 1 else None, self.cache, self.live)
        except Exception as error:
            self._fail(step.requests, error)

    def _sample(self, logits: torch.Tensor, requests: list[Request], last: torch.Tensor) -> Sampled:
        return self._sampler(logits, requests, last, self.model.config.eos_token_ids)

    def _fail(self, requests: Iterable[Request], error: Exception) -> None:
        logger.exception("a step failed; its requests end with an error")
        for request in self.live.of(requests):
            self.live.finish(request, "error", f"{type(error).__name__}: {error}")

    def _send_back(self, plan: StepPlan) -> None:
        """Everything that is planned or on its way counts as never begun."""
        on_the_way = [request for step in self._steps for request in step.requests]
        requests = self.live.of([*plan.requests, *plan.remote, *on_the_way])
        self._steps.clear()
        for request in requests:
            request.in_flight = None
        for request in [request for request in reversed(self.scheduler.running) if request in requests]:
            if not (request.is_remote and self.prefiller.abort(request)):
                self.scheduler.preempt(request)
        self._lose_states(plan)

    def _lose_states(self, plan: StepPlan) -> None:
        """State copies that a failed step did not get to: who was to have one does without."""
        lost = {dst for _, dst in plan.state_copies}
        for request in [request for request in reversed(self.scheduler.running) if request.state_id in lost]:
            self.scheduler.preempt(request)
        self.cache.lose_states(lost)

    def _hand_over(self, plan: StepPlan) -> None:
        """Gives long prompts to another process, once nothing here still reads or writes their new pages."""
        if not plan.remote:
            return
        try:
            self.runner.copy(plan)
        except Exception as error:
            self._fail([*plan.requests, *plan.remote], error)
            self._lose_states(plan)
            plan.requests, plan.remote = [], []  # pages that were to be copied into are not what they should be
        hand_over(plan.remote, self.prefiller, self.cache, self.events, self._fail)

    def _collect(self, wait: bool) -> None:
        take_back(self.prefiller.collect(wait), self.scheduler, self.cache, self.live, self._fail)

    def _record(self, plan: StepPlan) -> None:
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

    # ---- the rest -------------------------------------------------------------------------------------------------

    def _longest(self, request: Request) -> int:
        """Prompt tokens that leave room for an answer; a scored text has none, but every token of it is written."""
        return min(self.max_length, self._pool_tokens) if request.wants_all_logits else self.max_length - 1

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
            **(self.prefiller.stats() if self.prefiller is not None else {}),
        }

    def close(self) -> None:
        for request_id in self.live:
            self.abort(request_id)
        if self.prefiller is not None:
            self.prefiller.close()
            self._collect(wait=False)
        self.events.close()
