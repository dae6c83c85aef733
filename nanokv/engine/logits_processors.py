"""Logits processors: functions of a user that change the logits before a token is sampled.

    def processor(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor | None

    token_ids   the prompt and the answer so far
    logits      float32 [vocab], on the device of the model, valid during the call: after the repetition penalty and
                min_tokens, before temperature and the filters
    Returns     the logits to sample from, float32 [vocab]; None: `logits`, which it has changed in place

A processor is a function of its arguments alone. It may be called again for the same tokens (a step that was
interrupted), and on a GPU once for tokens beyond the end of an answer. Several run in turn. An exception, and logits of
which none is finite, end their request with "error"; the other requests of the step go on. A device waits for such a
request in each step, because the host needs the last token. No request without a processor comes here.
Source: the logits processors of transformers and vLLM.
"""

from __future__ import annotations

import logging

import torch

from nanokv.core.request import Request

logger = logging.getLogger("nanokv")


def process_logits(logits: torch.Tensor, request: Request, last_token_id: torch.Tensor) -> None:
    """Runs the processors of a request on its logits, in place. A failure makes them NaN and sets `request.fault`.

    logits          float32 [vocab]
    request         advanced: the next token is at position request.num_computed
    last_token_id   int64 [], the token before: it may be known on the device alone
    """
    if not logits.max().isfinite():
        return  # the model's fault, and the sampler's to tell
    token_ids = [*request.tokens[: request.num_computed - 1], int(last_token_id)]
    processors = request.params.logits_processor
    assert isinstance(processors, tuple)
    try:
        for processor in processors:
            result = processor(list(token_ids), logits)
            if result is not None:
                logits.copy_(_checked(result, logits))
    except Exception as error:
        logger.exception("a logits processor failed; its request ends with an error")
        request.fault = f"logits_processor: {type(error).__name__}: {error}"
        logits.fill_(torch.nan)
        return
    if not logits.max().isfinite():
        request.fault = "logits_processor: the largest logit is not finite: it forbids every token, or gives NaN or inf"


def _checked(result: object, logits: torch.Tensor) -> torch.Tensor:
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"returned {type(result).__name__}; expected a tensor, or None for logits changed in place")
    if result.shape != logits.shape:
        raise ValueError(f"returned shape {list(result.shape)}; expected {list(logits.shape)}")
    return result
