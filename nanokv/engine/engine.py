"""Engine: requests in, outputs out, one step at a time. Owns the lifecycle of a request.

    add_request -> waiting
    step():  plan -> move -> start transfers -> launch -> resolve -> outputs

On a CPU a step is resolved right after its launch. On a GPU the next step is planned and launched first (depth 1), so
that the device always has work: the same loop, one step later. An exception inside a step ends the requests of that
step with "error"; their pages are released and the engine goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from nanokv.cache.observers import Observers
from nanokv.core.config import EngineConfig
from nanokv.core.errors import RequestError
from nanokv.core.events import RequestAdded, StepLaunched
from nanokv.core.request import Request, RequestOutput
from nanokv.engine.build import Allocate, build
from nanokv.engine.connector import Connector
from nanokv.engine.device import current
from nanokv.engine.device_sampler import sample_on_device
from nanokv.engine.output_processor import OutputProcessor, Sink
from nanokv.engine.recovery import Recovery
from nanokv.engine.sampler import sample
from nanokv.engine.scheduler import Scheduler, StepPlan
from nanokv.engine.step import Step, launch, resolve
from nanokv.engine.transfers import Transfers
from nanokv.engine.validate import prepare_request, validate_request, with_stop_ids
from nanokv.models.decoder import Decoder
from nanokv.text.tokenizer import Tokenizer


class Engine:
    """Continuous batching over a paged, prefix-shared cache.

    model        a Decoder; the engine binds it to the layout of its pages
    config       EngineConfig, names resolved
    tokenizer    for texts and stop texts; None: token ids only
    device       of the model and the pages
    connectors   bring computed pages
    allocate     makes the memory of pages and states; None: the store allocates
    observers    receive the changes of the prefix tree
    Raises       ConfigError when the pool does not fit in memory
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        device: torch.device | str = "cpu",
        connectors: Sequence[Connector] = (),
        allocate: Allocate | None = None,
        observers: Observers | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        parts = build(model, config, self.device, bool(connectors), allocate, observers)
        self.config, self.layout, self.events = parts.config, parts.layout, parts.events
        self.store, self.cache, self.runner, self.max_length = parts.store, parts.cache, parts.runner, parts.max_length
        self.transfers, self.interrupts = Transfers(connectors), parts.interrupts
        source = self.transfers if connectors else None
        self.scheduler = Scheduler(self.config, self.cache, self.events, source)
        self.outputs = OutputProcessor(self.scheduler, self.cache, tokenizer, model.config.eos_token_ids, self.events)
        self.num_steps = 0
        on_gpu = self.device.type != "cpu"
        self._sample = partial(sample_on_device if on_gpu else sample, eos_token_ids=model.config.eos_token_ids)
        self._depth = 1 if (on_gpu if config.overlap is None else config.overlap) else 0
        self._recovery = Recovery(self.scheduler, self.cache, self.outputs, self.transfers)
        self._log, self._pool_tokens = parts.log, parts.pool_tokens
        self._steps: deque[Step] = deque()  # in flight, oldest first
        self._num_added = 0

    def add_request(self, request: Request, sink: Sink | None = None) -> str:
        """Queues a request and returns its id.

        sink     receives the outputs of the request; None: `step` returns them
        Raises   RequestError naming the field, its value and the allowed values
        """
        if request.request_id is not None and request.request_id in self.outputs:
            raise RequestError(f"request_id={request.request_id!r}: a request with this id is still live")
        request.prompt_token_ids = validate_request(request, self.model.config, self.config, self._longest(request))
        if request.params.stop and self.tokenizer is None:
            raise RequestError(f"stop={request.params.stop!r}: stop texts need a tokenizer, which this model lacks")
        self._num_added += 1
        request.params = with_stop_ids(request.params, self.tokenizer)
        prepare_request(request, self._num_added, self.config.seed, self.max_length)
        with self.turn():
            if self.events:
                self.events.emit(RequestAdded(request.id, request.num_prompt, request.params.n))
            self.outputs.open(request, sink)
        return request.id

    def abort(self, request_id: str) -> None:
        """Ends every sample of a request and frees its pages; those in a transfer once it is collected.

        Raises RequestError for an id that is not live.
        """
        if request_id not in self.outputs:
            raise RequestError(f"request_id={request_id!r}: no such live request")
        with self.turn():
            for request in self.outputs.of_id(request_id):
                self.outputs.finish(request, "abort")

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is live: waiting or running."""
        return request_id in self.outputs

    @property
    def has_work(self) -> bool:
        """Whether requests are live, or outputs wait for `step` to return them."""
        return len(self.outputs) > 0 or self.outputs.has_outputs

    def step(self) -> list[RequestOutput]:
        """`advance`. Returns the outputs of requests without a sink: one for each sample that got a token or ended."""
        self.advance()
        return self.outputs.take_outputs()

    def advance(self) -> None:
        """Launches one step and resolves those that are due. Outputs go to the sinks of their requests.

        KeyboardInterrupt undoes the step: its requests compute the same tokens again.
        """
        num_delivered = self.outputs.num_delivered
        with self.turn(), current(self.device):
            self._collect(wait=False)
            plan = self._plan()
            self._move(plan)
            if plan.transfers:
                self.transfers.start(plan.transfers, self.cache, self.events, self._recovery.fail)
            is_launched = self._launch(plan)
            if not is_launched and not self._steps:
                self._collect(wait=self.outputs.num_delivered == num_delivered)
            while self._steps and (len(self._steps) > self._depth or not is_launched):
                self._resolve(self._steps[0])
                self._steps.popleft()
            if not len(self.outputs):
                self._steps.clear()  # steps in flight compute tokens of samples that have ended
                if self.config.debug_checks:
                    self.cache.check()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A change of the books, which an interrupt undoes: Ctrl-C waits for its end, or for a forward pass in it."""
        with self.interrupts.deferred():
            try:
                yield
            except Exception:
                raise
            except BaseException:  # Ctrl-C in a forward pass; anywhere else, of a handler of the program itself
                if self.interrupts.in_forward:
                    self._recovery.undo(self._steps)
                else:
                    self._recovery.rebuild()
                self._steps.clear()
                self.interrupts.in_forward = False
                raise

    def _plan(self) -> StepPlan:
        try:
            return self.scheduler.plan()
        except Exception as error:
            # The cause is a running request, or the one that was about to be admitted. Half a plan may be in the books.
            suspects = list(self.scheduler.running) or list(self.scheduler.waiting)[:1]
            self._steps.clear()
            self._recovery.rebuild()
            self._recovery.fail(suspects, error)
            return StepPlan()

    def _move(self, plan: StepPlan) -> None:
        """Saves and copies pages and states before the step overwrites them."""
        try:
            if plan.moves.saves:
                self.transfers.save(plan.moves, self.store)
            self.runner.move(plan.moves)
        except Exception as error:
            self._recovery.fail(plan.all_requests, error)
            self._recovery.lose_states(plan)
            plan.requests, plan.transfers = [], []  # the destinations of its copies hold other content

    def _launch(self, plan: StepPlan) -> bool:
        """Launches the step of a plan. False where the plan is empty or the launch fails."""
        if not plan.requests:
            return False
        self.num_steps += 1
        self._record(plan)
        try:
            previous = self._steps[-1] if self._steps else None
            self._steps.append(launch(plan, previous, self.runner, self.outputs, self._sample))
        except Exception as error:
            self._recovery.fail(plan.requests, error)
            return False
        return True

    def _resolve(self, step: Step) -> None:
        try:
            resolve(step, self._steps[1] if len(self._steps) > 1 else None, self.cache, self.outputs)
        except Exception as error:
            self._recovery.fail(step.requests, error)

    def _collect(self, wait: bool) -> None:
        if self.transfers.connectors:
            self.transfers.collect(wait, self.scheduler, self.cache, self.outputs, self._recovery.fail)

    def _record(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        for request in plan.requests:
            if request.metrics.first_scheduled is None:
                request.metrics.first_scheduled = now
        if self.events:
            rows = [(request.id, request.index, request.num_scheduled) for request in plan.requests]
            self.events.emit(StepLaunched(self.num_steps, plan.num_tokens, rows, plan.moves.pages, plan.moves.states))

    def _longest(self, request: Request) -> int:
        """Most prompt tokens: a prompt leaves room for a token of the answer, and a scored text has no answer."""
        return min(self.max_length, self._pool_tokens) if request.wants_all_logits else self.max_length - 1

    def reset_prefix_cache(self) -> None:
        """Drops every cached page that no request holds."""
        with self.turn():
            self.cache.reset()

    def forget_requests(self, is_interrupted: bool) -> None:
        """Aborts live requests. `is_interrupted`: this is a child process, forked in the middle of a turn."""
        if is_interrupted:
            self._recovery.rebuild()
        self._steps.clear()
        for request_id in self.outputs:
            self.abort(request_id)

    def stats(self) -> dict[str, int | float]:
        """Numbers about pages, requests and steps, by the names of core/stats.py."""
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
            **self.transfers.stats(),
        }

    def close(self) -> None:
        """Aborts live requests, closes the connectors and the event log."""
        self.forget_requests(is_interrupted=False)
        self.transfers.close()
        self._collect(wait=False)
        if self._log is not None:
            self._log.close()
