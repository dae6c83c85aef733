"""LLM: the interface for programs. Texts or token ids in, RequestOutput out. The engine below knows token ids only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Never, cast, overload

import torch

from nanokv.chats import Messages, are_several, chat_prompt, chat_prompts
from nanokv.core.arguments import no_such
from nanokv.core.config import EngineConfig
from nanokv.core.errors import RequestError
from nanokv.core.request import Request, RequestOutput, SamplingParams
from nanokv.disagg.config import DisaggConfig
from nanokv.engine import scoring
from nanokv.engine.output_processor import Sink
from nanokv.engine.ticket import Ticket
from nanokv.kernels.ops import Ops
from nanokv.models.forms import forms_of
from nanokv.open_model import open_model
from nanokv.progress import MANY, advance_with_bar

Prompt = str | list[int]
"""A text, or its token ids."""
Params = SamplingParams | Sequence[SamplingParams] | None
"""For all prompts, or one for each; None: the defaults."""


class LLM:
    """A model, its cache and its engine.

        with LLM("smollm2-135m-instruct") as llm:
            print(llm.generate("The capital of France is", SamplingParams(temperature=0))[0].text)

    model     a catalog name, a hub id that has been pulled, or a folder with config.json, *.safetensors and
              tokenizer.json (which may be missing when prompts are token ids)
    config    EngineConfig, or its fields as keywords
    disagg    DisaggConfig: other processes, which live as long as this object, compute long prompts
    Raises    ConfigError, CheckpointError. Weights are not fetched here: `nanokv pull NAME` does that

    Threads may call it at the same time: their requests share steps.
    """

    def __init__(
        self, model: str | Path, config: EngineConfig | None = None, disagg: DisaggConfig | None = None, **fields: Any
    ) -> None:
        opened = open_model(model, config, disagg, fields)
        self.config, self.disagg = opened.config, disagg
        self.folder, self.model_config, self.dtype = opened.folder, opened.model_config, opened.dtype
        self.device, self.device_reason = opened.device, opened.device_reason
        self.tokenizer, self.cluster, self.loop = opened.tokenizer, opened.cluster, opened.loop
        self.engine = self.loop.engine

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, progress: bool | None = None, **unknown: Never
    ) -> list[RequestOutput]:
        """Finished outputs, in the order of the prompts; n samples of a prompt are n outputs in a row.

        prompts    a text, a list of token ids, or a list of either
        params     one for all, or one for each prompt
        progress   whether a bar on stderr counts the answers; None: for many prompts, where stderr is a terminal
        Raises     RequestError when any prompt cannot be served; then none is. A later failure ends one sample and
                   raises nothing: its finish_reason is "error", and its `error` gives the cause
        """
        if unknown:
            raise no_such(RequestError, "generate", unknown, ("prompts", "params", "progress"), SamplingParams)
        tickets: list[Ticket] = []
        outputs: list[RequestOutput] = []
        try:
            self._submit(tickets, prompts, params, lambda output: outputs.append(output) if output.finished else None)
            if progress or (progress is None and len(tickets) >= MANY):
                advance_with_bar(tickets, outputs, progress)
            for ticket in tickets:
                while ticket.advance():
                    pass
        finally:
            for ticket in tickets:
                ticket.close()
        return in_order(tickets, outputs)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **unknown: Never) -> Ticket:
        """Iterator over the outputs of one prompt as they come, the new text of each in `.delta`. Closing it aborts.

        The request is checked and queued at once. Streams may be interleaved with each other and with generate().
        Raises RequestError when the prompt cannot be served.
        """
        if unknown:
            raise no_such(RequestError, "stream", unknown, ("prompt", "params"), SamplingParams)
        return self.loop.submit(self._request(prompt, params))

    @overload
    def chat(self, messages: Messages, params: Params = ..., **template: Any) -> RequestOutput: ...
    @overload
    def chat(self, messages: list[Messages], params: Params = ..., **template: Any) -> list[RequestOutput]: ...
    def chat(
        self, messages: Messages | list[Messages], params: Params = None, progress: bool | None = None, **template: Any
    ) -> RequestOutput | list[RequestOutput]:
        """The assistant's answer to `messages` ({"role", "content"}), through the model's chat template.

        messages   a conversation, or a list of conversations, for a list of answers
        params     one for all, or one for each conversation
        progress   as of `generate`
        template   variables of the template: tools, enable_thinking, ...
        Raises     RequestError when they cannot be served, or n of params is not 1
        """
        answers = self.generate(chat_prompts(self.tokenizer, messages, params, template), params, progress)
        return answers if are_several(messages) else answers[0]

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None, **template: Any) -> Ticket:
        """`chat` of one conversation, as a stream of outputs."""
        return self.stream(chat_prompt(self.tokenizer, messages, template), params)

    def score(self, prompt: Prompt) -> torch.Tensor:
        """Logits of every position: float32 [tokens, vocab], row i = logits after token i.

        Every position is computed, through the cache, in steps that other requests share.
        Raises RequestError for a prompt that cannot be served, NanokvError when scoring ends early.
        """
        return torch.cat(list(self.score_blocks(prompt)))

    def score_blocks(self, prompt: Prompt) -> Iterator[torch.Tensor]:
        """`score` as an iterator of blocks float32 [rows, vocab]: the logits of a long text need not fit in memory."""
        return scoring.score_blocks(self.loop, self._encode(prompt))

    def stats(self) -> dict[str, int | float | bool | str]:
        """Numbers about pages, requests and steps, and the chosen forms, by the names of core/stats.py."""
        is_q8 = self.config.weights == "q8"
        invariant = Ops(self.config.kernels).row_invariant(self.dtype, self.device, self.model_config.widths, is_q8)
        forms = forms_of(self.engine.model)
        return {
            **self.loop.call(lambda engine: engine.stats()),
            "weight_forms": forms.of_weights,
            "attention_form": forms.of_attention,
            "row_invariant": invariant,
        }

    def reset_prefix_cache(self) -> None:
        """Drops every cached page that no request holds."""
        self.loop.call(lambda engine: engine.reset_prefix_cache())

    def close(self) -> None:
        """Aborts live requests, ends other processes and closes the event log. Later requests raise NanokvError.

        Safe to call twice. Does nothing in a forked child, because the engine belongs to the parent.
        """
        self.loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}, codec {self.config.codec}"
        return f"LLM({self.folder.name}, {where}, requests of up to {self.engine.max_length:,} tokens)"

    def _submit(self, tickets: list[Ticket], prompts: Prompt | Sequence[Prompt], params: Params, sink: Sink) -> None:
        """Queues a request for each prompt and appends its ticket to `tickets`; its outputs go to `sink`.

        Raises as `generate`; then the caller closes the tickets that there are.
        """
        batch = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) and not isinstance(params, str) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"params: {len(each)} for {len(batch)} prompts; give one, or one for each prompt")
        for prompt, chosen in zip(batch, each, strict=True):
            tickets.append(self.loop.submit(self._request(prompt, chosen), sink))

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        """The request for a prompt, which is scored before it is answered where its params ask for prompt_logprobs."""
        request = Request(self._encode(prompt), params)
        if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
            request.prompt_logprobs = scoring.prompt_logprobs(self.loop, request.prompt_token_ids, params)
        return request

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return prompt  # the engine checks ids
        if self.tokenizer is None:
            raise RequestError(f"prompt: {self.folder} has no tokenizer.json; give token ids")
        return self.tokenizer.encode(prompt, add_special=True)


def in_order(tickets: list[Ticket], outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Outputs in the order of their tickets, the samples of each in theirs."""
    places = {ticket.request_id: place for place, ticket in enumerate(tickets)}
    return sorted(outputs, key=lambda output: (places[output.request_id], output.index))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts: one text, or one list of token ids, becomes a list of one. Raises RequestError."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise RequestError(f"prompts={prompts!r:.60}: expected a text, a list of token ids, or a list of either")
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], Sequence))
    return cast("list[Prompt]", [prompts] if is_one else list(prompts))
