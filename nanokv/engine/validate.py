"""The checks of a request before it is queued. A RequestError names the field, its value and the allowed values."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace
from operator import index

import numpy as np

from nanokv.core.config import EngineConfig
from nanokv.core.errors import RequestError
from nanokv.core.metrics import RequestMetrics
from nanokv.core.request import Request, SamplingParams
from nanokv.models.config import ModelConfig
from nanokv.text.tokenizer import Tokenizer


def validate_request(request: Request, model: ModelConfig, config: EngineConfig, longest: int) -> list[int]:
    """Checks every field of a new request.

    longest   most prompt tokens that this engine can serve
    Returns   the prompt's token ids as plain ints
    Raises    RequestError
    """
    params = request.params
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params={params!r:.60}: expected SamplingParams")
    params.validate()
    if request.finish_reason is not None or request.metrics.first_scheduled is not None:
        raise RequestError(f"request_id={request.request_id!r}: this Request object was used before; make a new one")
    try:
        given = request.prompt_token_ids
        if isinstance(given, (str, bytes, bytearray)) or any(isinstance(token, bool) for token in given):
            raise TypeError(f"found {given!r:.60}")
        token_ids = [index(token) for token in given]
        ids = np.frombuffer(array("i", token_ids), np.int32) if token_ids else np.empty(0, np.int32)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"prompt_token_ids: expected a list of token ids ({error})") from None
    if not token_ids:
        raise RequestError("prompt_token_ids=[]: expected at least one token")
    vocab_size = model.vocab_size
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise RequestError(f"prompt_token_ids: unknown token id {wrong}; allowed are 0 to {vocab_size - 1}")
    if len(token_ids) > longest:
        raise RequestError(
            f"prompt_token_ids: {len(token_ids)} tokens; this model and its pool allow at most {longest} "
            "(max_model_len, kv_memory, num_pages)"
        )
    if params.n > config.max_requests:
        raise RequestError(
            f"n={params.n}: at most {config.max_requests} samples run at once here (max_requests, and num_states where "
            "layers keep states)"
        )
    for token in params.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"stop_token_ids: unknown token id {token}; allowed are 0 to {vocab_size - 1}")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise RequestError(f"{name}={getattr(params, name)}: the vocabulary has {vocab_size} tokens")
    if params.prompt_logprobs is not None and not request.wants_all_logits and request.prompt_logprobs is None:
        raise RequestError("prompt_logprobs: an engine does not score prompts; give the prompt to LLM or AsyncLLM")
    return token_ids


def with_stop_ids(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The params with the ids of stop texts that are special tokens: the text of an answer leaves these out."""
    if not params.stop or tokenizer is None:
        return params
    ids = [token_id for text in params.stop if (token_id := tokenizer.special_id(text)) is not None]
    return replace(params, stop_token_ids=tuple(dict.fromkeys([*params.stop_token_ids, *ids]))) if ids else params


def prepare_request(request: Request, number: int, seed: int, max_length: int) -> None:
    """Sets the attributes that the engine owns of a validated request.

    number       of the request, counted since the engine was made
    seed         of the engine
    max_length   tokens that a request may reach, prompt and answer together
    """
    params = request.params
    request.tokens = array("i", request.prompt_token_ids)
    if request.request_id is None:
        request.request_id = f"request-{number}"
    request.num_prompt = len(request.tokens)
    request.max_tokens = min(params.max_tokens, max_length - request.num_prompt)
    request.seed = params.seed if params.seed is not None else (seed << 64) + number
    request.num_forks = params.n - 1
    request.logprobs = [] if params.logprobs is not None else None
    request.metrics = RequestMetrics(arrival=time.perf_counter())
