"""OutputProcessor: the live samples and their outputs. Appends tokens and ends samples. Knows no step and no tensor."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator

from nanokv.cache.manager import CacheManager
from nanokv.core.events import Events, Finished
from nanokv.core.metrics import RequestMetrics
from nanokv.core.request import Request, RequestOutput
from nanokv.engine.scheduler import Scheduler
from nanokv.engine.text_stream import TextStream
from nanokv.text.tokenizer import Tokenizer

Sink = Callable[[RequestOutput], None]
"""Receives the outputs of one request, in the thread that steps."""


class OutputProcessor:
    """The live samples of each request id. `append` alone adds sampled tokens to a request.

    An output goes to the sink of its request; without one it waits for `take_outputs`.

    scheduler       where requests wait and run
    cache           CacheManager, for forks
    tokenizer       for texts and stop texts, or None
    eos_token_ids   the model's end-of-sequence tokens
    events          Events
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: CacheManager,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
        events: Events,
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._events = events
        self._samples: dict[str, list[Request]] = {}
        self._sinks: dict[str, Sink] = {}
        self._outputs: list[RequestOutput] = []
        self.num_delivered = 0  # outputs so far

    def __contains__(self, request_id: str | None) -> bool:
        """Whether a request is live."""
        return request_id in self._samples

    def __len__(self) -> int:
        """Live requests."""
        return len(self._samples)

    def __iter__(self) -> Iterator[str]:
        """The ids of live requests; requests may end meanwhile."""
        return iter(list(self._samples))

    @property
    def has_outputs(self) -> bool:
        """Whether outputs wait for `take_outputs`."""
        return bool(self._outputs)

    def take_outputs(self) -> list[RequestOutput]:
        """The outputs of requests without a sink since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def open(self, request: Request, sink: Sink | None = None) -> None:
        """Queues a new request. Its outputs go to `sink`."""
        self._open_text(request)
        if sink is not None:
            self._sinks[request.id] = sink
        self._samples[request.id] = [request]
        self._scheduler.add(request)

    def of(self, requests: Iterable[Request]) -> list[Request]:
        """Every live sample of these requests, siblings included."""
        ids = dict.fromkeys(request.id for request in requests)
        return [sample for request_id in ids for sample in self._samples.get(request_id, ())]

    def of_id(self, request_id: str) -> list[Request]:
        """The live samples of a request id."""
        return list(self._samples.get(request_id, ()))

    def drop_ended(self) -> None:
        """Forgets requests without a live sample: an interrupt came at their end."""
        self._samples = {name: samples for name, samples in self._samples.items() if samples}
        self._sinks = {name: sink for name, sink in self._sinks.items() if name in self._samples}

    def siblings(self, request: Request) -> list[Request]:
        """The other samples of a request whose prompt is computed by this step. `fork` makes them live."""
        children: list[Request] = []
        for index in range(1, request.num_forks + 1):
            child = Request(request.prompt_token_ids, request.params, request.request_id)
            child.index, child.seed, child.max_tokens = index, request.seed, request.max_tokens
            child.num_prompt, child.num_computed = request.num_prompt, request.num_computed
            child.tokens = array("i", request.tokens)
            child.logprobs = [] if request.logprobs is not None else None
            child.prompt_logprobs = request.prompt_logprobs
            child.metrics = RequestMetrics(request.metrics.arrival, request.metrics.first_scheduled)
            self._open_text(child)
            children.append(child)
        return children

    def fork(self, request: Request, children: list[Request]) -> None:
        """Makes siblings live: they share the pages of the computed prompt and run beside the request."""
        self._samples[request.id].extend(children)  # at once, so that an interrupt finds all of them or none
        request.num_forks -= len(children)
        for child in children:
            self._scheduler.join(child)
        for child in children:
            self._cache.fork(request, child)

    def append(self, request: Request, token: int | None, scores: dict[int, float] | None, now: float) -> None:
        """Appends a sampled token, which may end the sample.

        token    None where the model's logits were not finite: the sample ends with an error
        scores   {token id: log-probability}, where the request asks for them
        now      seconds of time.perf_counter()
        """
        params = request.params
        if token is None:
            why = "the model's logits are not finite: its weights are damaged, or they need a wider dtype"
            self.finish(request, "error", request.fault or why)
            return
        request.tokens.append(token)
        request.metrics.token_times.append(now)
        if scores is not None and request.logprobs is not None:
            request.logprobs.append(scores)
        is_eos = token in params.stop_token_ids or (not params.ignore_eos and token in self._eos_token_ids)
        if request.text_stream is not None and not is_eos:
            request.text_stream.push(token, request.num_generated >= params.min_tokens)
        if is_eos or (request.text_stream is not None and request.text_stream.stopped):
            self.finish(request, "stop")
        elif request.num_generated >= request.max_tokens:
            self.finish(request, "length")
        else:
            self._deliver(self._output(request))
            request.num_delivered = request.num_generated  # last: until then an interrupt takes the token back

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Ends a sample, and with it the siblings that were not forked from it yet. Releases its pages."""
        request.finish_reason, request.error = reason, error
        if request.text_stream is not None:
            request.text_stream.flush(reason in ("stop", "length"))
        for index in range(request.index, request.index + request.num_forks + 1):
            output = self._output(request)
            output.index = index
            self._deliver(output)
        self._scheduler.remove(request)
        samples = self._samples[request.id]
        samples.remove(request)  # last: until then an interrupted `finish` is repeated (recovery.py)
        if not samples:
            del self._samples[request.id]
            self._sinks.pop(request.id, None)
        if self._events:
            self._events.emit(Finished(request.id, request.index, reason))

    def _deliver(self, output: RequestOutput) -> None:
        self.num_delivered += 1
        self._sinks.get(output.request_id, self._outputs.append)(output)

    def _open_text(self, request: Request) -> None:
        if self._tokenizer is not None and not request.wants_all_logits:
            request.text_stream = TextStream(self._tokenizer, request.params.stop)

    def _output(self, request: Request) -> RequestOutput:
        text: TextStream | None = request.text_stream
        return RequestOutput(
            request_id=request.id,
            index=request.index,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=request.tokens[request.num_prompt :].tolist(),
            delta=text.take_delta() if text is not None else "",
            text=text.text if text is not None else "",
            finish_reason=request.finish_reason,
            error=request.error,
            cached_tokens=request.held.num_cached,
            kv_matched_tokens=request.held.num_kv_matched,
            logprobs=list(request.logprobs) if request.logprobs is not None else None,
            metrics=request.metrics,
            prompt_logprobs=request.prompt_logprobs,
        )
