"""LLM: the interface for programs. Texts or token ids in, RequestOutput out. The engine below knows token ids only."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import torch

from nanokv.codecs import codec_of
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError, NanokvError, RequestError
from nanokv.core.request import Request, RequestOutput, SamplingParams
from nanokv.disagg.config import DisaggConfig
from nanokv.engine.device import choose_device, resolve_dtype
from nanokv.engine.engine import Engine
from nanokv.engine.limits import limit_threads
from nanokv.engine.loop import EngineLoop
from nanokv.engine.ticket import Ticket
from nanokv.hub.home import resolve_model
from nanokv.kernels.ops import Ops
from nanokv.models.loader import load_model
from nanokv.models.read import read_folder
from nanokv.text.tokenizer import Tokenizer

Prompt = str | list[int]
"""A text, or its token ids."""


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
        if config is not None and fields:
            raise ConfigError(f"{', '.join(fields)}: give a config or fields, not both")
        self.config = config if config is not None else EngineConfig.from_fields(**fields)
        self.disagg = disagg
        self.folder = resolve_model(model)
        chosen = choose_device(self.config.device)
        self.device, self.device_reason = chosen.device, chosen.reason
        limit_threads()
        self.model_config = read_folder(self.folder)
        self.dtype = resolve_dtype(self.config.dtype, self.model_config)
        codec = codec_of(self.config, self.dtype, self.model_config.attention_layers)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        with ExitStack() as stack:
            self.cluster = cluster = None
            if disagg is not None:
                from nanokv.disagg.cluster import DisaggCluster  # only where it is asked for

                self.cluster = cluster = DisaggCluster(disagg, self.folder, self.config, self.device, self.dtype)
                stack.callback(cluster.close)
            decoder = load_model(
                self.folder, self.model_config, dtype=self.dtype, device=self.device, codec=codec,
                page_size=self.config.page_size, load=self.config.load, seed=self.config.seed,
                kernels=self.config.kernels,
            )  # fmt: skip
            connectors = () if cluster is None else (cluster.dispatcher,)
            allocate = None if cluster is None else cluster.dispatcher.allocate
            self.engine = Engine(decoder, self.config, self.tokenizer, self.device, connectors, allocate)
            self.loop = EngineLoop(self.engine)  # streams keep it, and with it the processes, though the LLM is dropped
            if cluster is not None:
                cluster.open(self.engine, self.model_config)
                weakref.finalize(self.loop, cluster.abandon)  # where close() was not called
            stack.pop_all()
        self._pid = os.getpid()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Finished outputs, in the order of the prompts; n samples of a prompt are n outputs in a row.

        prompts   a text, a list of token ids, or a list of either
        params    one for all, or one for each prompt
        Raises    RequestError when any prompt cannot be served; then none is. A later failure ends one sample and
                  raises nothing: its finish_reason is "error", and its `error` gives the cause
        """
        batch = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) and not isinstance(params, str) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"params: {len(each)} for {len(batch)} prompts; give one, or one for each prompt")
        tickets: list[Ticket] = []
        try:
            for prompt, chosen in zip(batch, each, strict=True):
                tickets.append(self.loop.submit(Request(self._encode(prompt), chosen)))
            finished = [[output for output in ticket if output.finished] for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.close()
        return [output for samples in finished for output in sorted(samples, key=lambda output: output.index)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Ticket:
        """Iterator over the outputs of one prompt as they come, the new text of each in `.delta`. Closing it aborts.

        The request is checked and queued at once. Streams may be interleaved with each other and with generate().
        Raises RequestError when the prompt cannot be served.
        """
        return self.loop.submit(Request(self._encode(prompt), params))

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> RequestOutput:
        """The assistant's answer to `messages` ({"role", "content"}), through the model's chat template.

        Raises RequestError when they cannot be served, or params.n is not 1.
        """
        if isinstance(params, SamplingParams) and params.n != 1:
            raise RequestError(f"n={params.n}: a chat has one answer; use generate() for more")
        return self.generate([self._render(messages, template_kwargs)], params)[0]

    def stream_chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> Ticket:
        """`chat`, as a stream of outputs."""
        return self.stream(self._render(messages, template_kwargs), params)

    def score(self, token_ids: list[int]) -> torch.Tensor:
        """Logits of every position: float32 [tokens, vocab], row i = logits after token i.

        Every position is computed, through the cache, in steps that other requests share.
        Raises RequestError for token ids that cannot be served, NanokvError when scoring ends early.
        """
        return torch.cat(list(self.score_blocks(token_ids)))

    def score_blocks(self, token_ids: list[int]) -> Iterator[torch.Tensor]:
        """`score` as an iterator of blocks float32 [rows, vocab]: the logits of a long text need not fit in memory."""
        request = Request(token_ids, SamplingParams(max_tokens=1))
        blocks = request.logit_blocks = []
        with closing(self.loop.submit(request)) as ticket:
            while ticket.advance() or blocks:
                ticket.take()
                while blocks:
                    yield blocks.pop(0)
            if request.finish_reason != "length":
                raise NanokvError(f"scoring ended early: {request.error or request.finish_reason}")

    def stats(self) -> dict[str, int | float | bool]:
        """Numbers about pages, requests and steps, by the names of core/stats.py."""
        invariant = Ops(self.config.kernels).row_invariant(self.dtype, self.device)
        return {**self.loop.call(lambda engine: engine.stats()), "row_invariant": invariant}

    def reset_prefix_cache(self) -> None:
        """Drops every cached page that no request holds."""
        self.loop.call(lambda engine: engine.reset_prefix_cache())

    def close(self) -> None:
        """Aborts live requests, ends other processes and closes the event log. Later requests raise NanokvError.

        Safe to call twice. With disagg it does nothing in a forked child: the other processes work for the parent.
        """
        if self.disagg is None or os.getpid() == self._pid:
            self.loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return prompt  # the engine checks ids
        if self.tokenizer is None:
            raise RequestError(f"prompt: {self.folder} has no tokenizer.json; give token ids")
        return self.tokenizer.encode(prompt, add_special=True)

    def _render(self, messages: list[dict[str, Any]], template_kwargs: dict[str, Any]) -> list[int]:
        if self.tokenizer is None:
            raise RequestError(f"messages: {self.folder} has no tokenizer.json; use generate() with token ids")
        return self.tokenizer.chat(messages, **template_kwargs)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts: one text, or one list of token ids, becomes a list of one. Raises RequestError."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise RequestError(f"prompts={prompts!r:.60}: expected a text, a list of token ids, or a list of either")
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], Sequence))
    return cast("list[Prompt]", [prompts] if is_one else list(prompts))
