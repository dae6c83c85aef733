"""Request, SamplingParams, RequestOutput: what is asked, what is known of it, what is answered.

The words of a request, with the intervals they bound (tokens by position):

    |<-------------------- num_tokens: known (prompt, then what was sampled) --------------------->|
    [0, num_cached)        [num_cached, num_computed)        [num_computed, num_computed + num_scheduled)
     K and V found in       K and V computed by this           computed in the step that is being planned
     the prefix cache       request in earlier steps           or run right now

The laws:
- `num_computed <= num_tokens - 1` whenever the request waits to be scheduled: the last known token is always still to
  be computed, because its logits give the next one.
- `advance` moves `num_computed` when a step is dispatched; `resolve` appends the sampled token when the step's result
  is on the host. A token is appended there and nowhere else.
- Between the two the request has one token in flight: it exists on the device, as number `in_flight` of those that the
  last step sampled, and the next step may already compute it. Then `num_computed <= num_tokens` is the law.
- `held` is what the cache knows of the request, and only the cache writes it.
"""

from __future__ import annotations

import math
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

from nanokv.core.check import check_integer
from nanokv.core.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Checked by `validate`, which the engine calls in `add_request`."""

    max_tokens: int = 256
    """Tokens to generate at most; cut to what the model's length leaves."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to top_p (nucleus sampling)."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    seed: int | None = None
    """Makes the samples of this request reproducible; None takes a seed from the engine's."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Further token ids that end the answer, beside the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens (benchmarks)."""
    min_tokens: int = 0
    """Tokens to generate before any end-of-sequence or stop token may be chosen, or a stop text may match."""
    logprobs: int | None = None
    """For each token, report its log-probability and those of this many most likely ones."""
    n: int = 1
    """Samples of the same prompt; they share its pages."""
    repetition_penalty: float = 1.0
    """Above 1: makes tokens that occurred in prompt or answer less likely (Keskar et al. 2019)."""
    cache_salt: str | None = None
    """Namespace of the prefix cache: requests with other salts share nothing with this one."""

    def __post_init__(self) -> None:
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            value = getattr(self, name)
            if isinstance(value, kind):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def validate(self) -> None:
        """Raises RequestError naming the field, its value and what is allowed."""
        self._integer("max_tokens", 1)
        self._integer("min_tokens", 0)
        self._integer("top_k", 0)
        self._integer("n", 1)
        if self.seed is not None:
            self._integer("seed", 0)
        if self.logprobs is not None:
            self._integer("logprobs", 0)
        self._number("temperature", 0.0, math.inf)
        self._number("top_p", 0.0, 1.0, open_below=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.01, 100.0)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r}: expected True or False")
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or any(isinstance(v, bool) or not isinstance(v, kind) for v in value):
                raise RequestError(f"{name}={value!r}: expected a tuple of {kind.__name__}")
        if "" in self.stop:
            raise RequestError("stop=('',): an empty stop text would match at once")
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise RequestError(f"cache_salt={self.cache_salt!r}: expected a text or None")

    def _integer(self, name: str, least: int) -> None:
        check_integer(RequestError, name, getattr(self, name), least)

    def _number(self, name: str, least: float, most: float, open_below: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value > most or value < least or (open_below and value == least):
            bounds = f"{'more than' if open_below else 'at least'} {least:g}"
            raise RequestError(
                f"{name}={value!r}: expected a number of {bounds}" + (f", at most {most:g}" if most < math.inf else "")
            )


@dataclass
class RequestMetrics:
    """Times of one request, seconds on time.perf_counter(); None until it happened."""

    arrival: float
    first_scheduled: float | None = None
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float | None:
        """Time to first token: arrival to the first token, queueing included."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def latency(self) -> float | None:
        """Arrival to the last token so far."""
        return self.token_times[-1] - self.arrival if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (latency - ttft) / (tokens - 1)."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)


@dataclass
class RequestOutput:
    """What the caller sees of one sample after a step; the last one has a finish_reason."""

    request_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    delta: str
    finish_reason: str | None
    """"stop", "length", "abort", "error", or None while it runs."""
    error: str | None
    """One line that says why, where finish_reason is "error": a step failed, or logits were not finite."""
    cached_tokens: int
    """Prompt tokens whose computation the prefix cache saved when the request was first admitted."""
    kv_matched_tokens: int
    """Prompt tokens whose K and V were found; above cached_tokens only where a recurrent state was missing."""
    logprobs: list[dict[int, float]] | None
    metrics: RequestMetrics

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Holding:
    """What the cache holds for one request. Only an implementation of cache.contract.Cache writes it.

    pages           pages[i] holds the tokens [i * page_size, (i + 1) * page_size)
    num_published   the first of these pages stand in the prefix tree, immutable; the others belong to this request and
                    to samples forked from it
    node            the locked node of the tree at the end of the published pages (cache.radix.Node)
    state_id        the state that recurrent layers update, at num_computed; None where no layer has one
    recurrence      the checkpoints of that state (cache.states.Recurrence)
    num_cached      prompt tokens that the prefix cache saved at the first admission
    num_kv_matched  prompt tokens whose pages were found then; more only where a recurrent state was missing
    admitted        has had pages once, so the last two are final
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
    """One sample on its way through the engine. A user fills in the first three; the engine owns the rest.

    prompt_token_ids   list[int], at least one
    params             SamplingParams
    request_id         str, unique among live requests; the engine names it when None
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
        self.index = 0  # which of the n samples
        self.seed = 0  # resolved by the engine
        self.logit_blocks: list[Any] | None = None  # score(): float32 [rows, vocab] of each step, instead of sampling
        self.num_scored = 0  # rows of logits delivered so far: a preempted request computes some rows twice
        self.num_forks = 0  # samples that share this request's prompt and are not running yet

        self.tokens: array[int] = array("i")  # filled by the engine once the ids are checked
        self.num_prompt = 0
        self.num_computed = 0
        self.num_scheduled = 0
        self.in_flight: int | None = None  # which of the last step's samples is this request's, while it is not here
        self.in_transfer = False  # a connector may write into its pages, so they are quarantined
        self.num_attempts = 0  # transfers since the last one that brought something
        self.held = Holding()

        self.max_tokens = 0  # params.max_tokens, cut to the model's length
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.logprobs: list[dict[int, float]] | None = None
        self.text_stream: Any = None  # engine.text_stream.TextStream, where there is a tokenizer
        self.metrics = RequestMetrics(arrival=time.perf_counter())

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and what was sampled."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def wants_all_logits(self) -> bool:
        return self.logit_blocks is not None

    @property
    def num_to_compute(self) -> int:
        """Tokens whose K and V are still missing, one in flight included.

        A token in flight has to arrive first where the answer ends with it, and where other samples begin after the
        same prompt: they are forked when it is here.
        """
        known = len(self.tokens) - self.num_computed
        if self.in_flight is None or self.num_forks or self.num_generated + 1 >= self.max_tokens:
            return known
        return known + 1

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the last token is still to be computed."""
        return self.num_to_compute > 1

    def advance(self, in_flight: int | None = None) -> None:
        """First half of commit: the step that computes the scheduled tokens has been dispatched.

        in_flight   the place of this request's token among those that the step samples; None if it samples none
        """
        self.num_computed += self.num_scheduled
        self.num_scheduled = 0
        self.in_flight = in_flight

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}#{self.index}: {self.num_prompt}+{self.num_generated} tokens, "
            f"{self.num_computed} computed, {len(self.held.pages)} pages)"
        )
