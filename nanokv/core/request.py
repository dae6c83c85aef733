"""Request, SamplingParams, RequestOutput: the input of the engine, its state while it runs, and its output.

The counters of a request bound intervals of token positions:

    |<------------------ num_tokens: known (the prompt, then the sampled tokens) ------------------>|
    [0, num_cached)        [num_cached, num_computed)        [num_computed, num_computed + num_scheduled)
     K and V found in       K and V computed by this           computed by the step that is being planned
     the prefix cache       request in earlier steps           or that runs now

Invariants:
- `num_computed <= num_tokens - 1` while the request waits to be scheduled: the last known token is always still to be
  computed, because its logits give the next one.
- `advance` moves `num_computed` when a step is dispatched. OutputProcessor.append adds the sampled token when the
  step's result is on the host; no other code adds tokens.
- Between the two the request has one token in flight: it exists on the device, as number `in_flight` of the tokens
  that the last step sampled, and the next step may already compute it. Then `num_computed <= num_tokens` holds.
- `held` belongs to the cache: only the cache writes it.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanokv.core.arguments import refuses_unknown
from nanokv.core.check import check_integer
from nanokv.core.errors import RequestError
from nanokv.core.metrics import RequestMetrics

_TUPLES: dict[str, Any] = {"stop": str, "stop_token_ids": int, "logits_processor": Callable}
"""Fields that take one value of a kind, or several; a tuple is kept."""


@refuses_unknown(RequestError)
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when a sample ends. `Engine.add_request` calls `validate`."""

    max_tokens: int = 256
    """Most tokens to generate; fewer where the prompt leaves less of the model's length."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to top_p (nucleus sampling)."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    seed: int | None = None
    """Makes the samples of this request reproducible; None derives a seed from the engine's."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are cut off it. A special token may be one of them."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, beside the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Continue past the model's end-of-sequence tokens (benchmarks)."""
    min_tokens: int = 0
    """Tokens to generate before an end-of-sequence token, a stop token or a stop text may end the answer."""
    logprobs: int | None = None
    """Report the log-probability of each token, and those of this many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt: it is scored before it is answered (engine/scoring.py)."""
    n: int = 1
    """Samples of the same prompt; they share its pages."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the answer become less likely (Keskar et al. 2019)."""
    cache_salt: str | None = None
    """Namespace of the prefix cache: requests with different salts share no pages."""
    logits_processor: Callable[[list[int], Any], Any] | tuple[Callable[[list[int], Any], Any], ...] = ()
    """Functions that change the logits before a token is sampled (engine/logits_processors.py)."""

    def __post_init__(self) -> None:
        for name, kind in _TUPLES.items():
            value = getattr(self, name)
            if isinstance(value, kind):
                object.__setattr__(self, name, (value,))
            elif value is None or isinstance(value, list):
                object.__setattr__(self, name, tuple(value or ()))

    def validate(self) -> None:
        """Raises RequestError naming the field, its value and the allowed values."""
        for name, least in (("max_tokens", 1), ("min_tokens", 0), ("top_k", 0), ("n", 1)):
            check_integer(RequestError, name, getattr(self, name), least)
        for name in ("seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_integer(RequestError, name, getattr(self, name), 0)
        self._number("temperature", 0.0, math.inf)
        self._number("top_p", 0.0, 1.0, open_below=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.01, 100.0)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r}: expected True or False")
        for name, kind in _TUPLES.items():
            value = getattr(self, name)
            if not isinstance(value, tuple) or any(isinstance(v, bool) or not isinstance(v, kind) for v in value):
                raise RequestError(f"{name}={value!r}: expected a tuple of {kind.__name__}")
        if "" in self.stop:
            raise RequestError("stop=('',): an empty stop text would match at once")
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise RequestError(f"cache_salt={self.cache_salt!r}: expected a text or None")

    def _number(self, name: str, least: float, most: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value > most or value < least or (open_below and value == least):
            bounds = f"{'more than' if open_below else 'at least'} {least:g}"
            raise RequestError(
                f"{name}={value!r}: expected a number of {bounds}" + (f", at most {most:g}" if most < math.inf else "")
            )


@dataclass
class RequestOutput:
    """The state of one sample after a step, as the caller sees it. The last output has a finish_reason."""

    request_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    delta: str
    finish_reason: str | None
    """"stop", "length", "abort", "error", or None while it runs."""
    error: str | None
    """The cause in one line, where finish_reason is "error": a step failed, or logits were not finite."""
    cached_tokens: int
    """Prompt tokens that the prefix cache saved from computation when the request was first admitted."""
    kv_matched_tokens: int
    """Prompt tokens whose K and V were found; above cached_tokens only where a recurrent state was missing."""
    logprobs: list[dict[int, float]] | None
    """For each token {token id: log-probability}, where SamplingParams.logprobs asks for it."""
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, float] | None] | None = None
    """For each token of the prompt but the first, where SamplingParams.prompt_logprobs asks for it; then None."""

    def __repr__(self) -> str:
        counts = f"{len(self.prompt_token_ids)} ({self.cached_tokens} cached) + {len(self.token_ids)} tokens"
        end = self.finish_reason if self.error is None else f"{self.finish_reason}: {self.error}"
        text = self.text if len(self.text) <= 80 else f"{self.text[:77]}..."
        return f"RequestOutput({self.request_id}#{self.index}: {text!r}, {counts}, {end or 'running'})"

    @property
    def finished(self) -> bool:
        """Whether this is the last output of the sample."""
        return self.finish_reason is not None


@dataclass
class Holding:
    """The pages and states of one request. Only an implementation of cache.contract.Cache writes it.

    pages           pages[i] holds the tokens [i * page_size, (i + 1) * page_size)
    num_published   the first num_published pages are in the prefix tree and immutable; the others belong to this
                    request and to samples forked from it
    node            the locked node of the tree at the end of the published pages (cache.radix.Node)
    state_id        the state that recurrent layers update, at num_computed; None where no layer has one
    recurrence      the checkpoints of that state (cache.states.Recurrence)
    num_cached      prompt tokens that the prefix cache saved at the first admission
    num_kv_matched  prompt tokens whose pages were found then; more only where a recurrent state was missing
    admitted        the request has had pages before, so num_cached and num_kv_matched are final
    """

    pages: array[int] = field(default_factory=lambda: array("i"))
    num_published: int = 0
    node: Any = None
    state_id: int | None = None
    recurrence: Any = None
    num_cached: int = 0
    num_kv_matched: int = 0
    admitted: bool = False


class Request:
    """One sample in the engine. A user gives the three arguments; the engine owns all other attributes.

    prompt_token_ids   at least one token id
    params             SamplingParams
    request_id         unique among live requests; None: the engine gives one
    """

    def __init__(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> None:
        self.prompt_token_ids = prompt_token_ids
        self.params = params if params is not None else SamplingParams()
        self.request_id = request_id
        self.index = 0  # number of this sample, 0 .. n - 1
        self.seed = 0  # of the request; equal for its samples
        # score(): (first row, float32 [rows, vocab]) of each step, instead of samples; a preemption repeats rows
        self.logit_blocks: list[tuple[int, Any]] | None = None
        self.num_delivered = 0  # sampled tokens that an output has shown
        self.num_forks = 0  # samples that share this request's prompt and do not run yet

        self.tokens: array[int] = array("i")  # filled by the engine once the ids are validated
        self.num_prompt = 0
        self.num_computed = 0
        self.num_scheduled = 0
        self.in_flight: int | None = None  # the place of its token among the samples of the step in flight
        self.in_transfer = False  # a connector may write into its pages, so they are quarantined
        self.num_attempts = 0  # transfers since the last one that delivered tokens
        self.held = Holding()

        self.max_tokens = 0  # params.max_tokens, cut to the model's length
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.fault: str | None = None  # why its last logits cannot be sampled, where a logits_processor is the cause
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        self.logprobs: list[dict[int, float]] | None = None
        self.text_stream: Any = None  # engine.text_stream.TextStream, where there is a tokenizer
        self.metrics = RequestMetrics(arrival=time.perf_counter())

    @property
    def id(self) -> str:
        """The request_id of a request that the engine has queued."""
        assert self.request_id is not None
        return self.request_id

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and the sampled tokens."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Sampled tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def wants_all_logits(self) -> bool:
        """Whether the request is scored: it wants the logits of every row, and no samples."""
        return self.logit_blocks is not None

    @property
    def num_to_compute(self) -> int:
        """Tokens without K and V, a token in flight included.

        A token in flight is not counted before it arrives where it is the last of the answer, and where other samples
        of the prompt wait: they are forked when it arrives.
        """
        known = len(self.tokens) - self.num_computed
        if self.in_flight is None or self.num_forks or self.num_generated + 1 >= self.max_tokens:
            return known
        return known + 1

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the last known token is still to be computed."""
        return self.num_to_compute > 1

    def advance(self, in_flight: int | None = None) -> None:
        """Counts the scheduled tokens as computed: their step has been dispatched.

        in_flight   the place of this request's token among the samples of the step; None where it gets none
        """
        self.num_computed += self.num_scheduled
        self.num_scheduled = 0
        self.in_flight = in_flight

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}#{self.index}: {self.num_prompt}+{self.num_generated} tokens, "
            f"{self.num_computed} computed, {len(self.held.pages)} pages)"
        )
