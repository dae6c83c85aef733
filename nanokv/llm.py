"""LLM: the door for programs. Texts or token ids in, RequestOutput out; everything below works on token ids."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from nanokv.codecs import codec_of
from nanokv.core.config import EngineConfig
from nanokv.core.errors import ConfigError, NanokvError, RequestError
from nanokv.core.request import Request, RequestOutput, SamplingParams
from nanokv.disagg.config import DisaggConfig
from nanokv.engine.device import choose_device
from nanokv.engine.engine import Engine
from nanokv.hub.home import resolve_model
from nanokv.kernels.ops import Ops
from nanokv.models.config import ModelConfig
from nanokv.models.loader import load_model
from nanokv.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Prompt = str | list[int]


class LLM:
    """A model, its cache and its engine.

        with LLM("smollm2-135m-instruct") as llm:
            print(llm.generate("The capital of France is", SamplingParams(temperature=0)) [0].text)

    model     a catalog name, a hub id that has been pulled, or a folder with config.json, *.safetensors and
              tokenizer.json (which may be missing when prompts are token ids)
    config    EngineConfig, or its fields as keywords
    disagg    DisaggConfig: long prompts are computed in other processes, which live as long as this object
    Raises    ConfigError, CheckpointError; weights are not fetched here, `nanokv pull NAME` does that

    Threads may call it at the same time: their requests run in the same steps.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        disagg: DisaggConfig | None = None,
        **fields: Any,
    ) -> None:
        if config is not None and fields:
            raise ConfigError(f"{', '.join(fields)}: give a config or fields, not both")
        self.config = config if config is not None else EngineConfig.from_fields(**fields)
        self.disagg = disagg
        self.folder = resolve_model(model)
        chosen = choose_device(self.config.device)
        self.device, self.device_reason = chosen.device, chosen.reason
        self.model_config = ModelConfig.from_folder(self.folder)
        self.dtype = resolve_dtype(self.config.dtype, self.model_config)
        codec = codec_of(self.config, self.dtype, self.model_config.attention_layers)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        with ExitStack() as stack:
            split = None
            if disagg is not None:
                from nanokv.disagg.split import Split  # its messages need msgspec, which nothing else does

                split = Split(disagg, self.folder, self.config, self.device, self.dtype)
                stack.callback(split.close)
            decoder = load_model(
                self.folder,
                self.model_config,
                dtype=self.dtype,
                device=self.device,
                codec=codec,
                page_size=self.config.page_size,
                load=self.config.load,
                seed=self.config.seed,
                kernels=self.config.kernels,
            )
            prefiller = None if split is None else split.dispatcher
            self.engine = Engine(decoder, self.config, self.tokenizer, self.device, prefiller)
            if split is not None:
                split.open(self.engine, self.model_config)
                weakref.finalize(self, split.abandon)  # for whoever forgets close()
            stack.pop_all()
        self._inbox: dict[str, deque[RequestOutput]] = {}
        self._lock = RLock()  # held while a request is queued, stepped or dropped, and its outputs handed out
        self._closed = False
        self._pid = os.getpid()

    # ---- generating -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Finished outputs, in the order of the prompts; n samples of a prompt are n outputs in a row.

        prompts   a text, a list of token ids, or a list of either
        params    one for all, or one for each prompt
        Raises    RequestError when any of them cannot be served; then none is. What goes wrong later ends one sample
                  and raises nothing: its finish_reason is "error", and its `error` says why
        """
        batch = _as_list(prompts)
        several = isinstance(params, Sequence) and not isinstance(params, str)
        each = list(params) if several else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"params: {len(each)} for {len(batch)} prompts; give one, or one for each prompt")
        ids: list[str] = []
        try:
            for prompt, chosen in zip(batch, each, strict=True):
                ids.append(self._submit(Request(self._encode(prompt), chosen)))
            while self._step_for(ids):
                pass
            finished = [output for request_id in ids for output in self._inbox[request_id] if output.finished]
        finally:
            self._forget(ids)
        order = {request_id: place for place, request_id in enumerate(ids)}
        return sorted(finished, key=lambda output: (order[output.request_id], output.index))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Outputs of one prompt as they come, the new text of each in `.delta`. Closing the iterator aborts it.

        The request is checked and queued at once; streams may be interleaved with each other and with generate().
        """
        return _Stream(self, self._submit(Request(self._encode(prompt), params)))

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> RequestOutput:
        """The assistant's answer to `messages` ({"role", "content"}), through the model's chat template."""
        if isinstance(params, SamplingParams) and params.n != 1:
            raise RequestError(f"n={params.n}: a chat has one answer; use generate() for more")
        return self.generate([self._render(messages, template_kwargs)], params)[0]

    def stream_chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None, **template_kwargs: Any
    ) -> Iterator[RequestOutput]:
        """chat(), as a stream."""
        return self.stream(self._render(messages, template_kwargs), params)

    # ---- scoring --------------------------------------------------------------------------------------------------

    def score(self, token_ids: list[int]) -> torch.Tensor:
        """Logits of every position: float32 [tokens, vocab], row i = logits after token i.

        Every position is computed, through the cache, in engine steps beside whatever else runs.
        """
        return torch.cat(list(self.score_blocks(token_ids)))

    def score_blocks(self, token_ids: list[int]) -> Iterator[torch.Tensor]:
        """score() as an iterator of row blocks, so that a long text need not fit in memory as logits."""
        request = Request(token_ids, SamplingParams(max_tokens=1))
        request.logit_blocks = []
        request_id = self._submit(request)
        try:
            while True:
                if request.logit_blocks:
                    yield request.logit_blocks.pop(0)
                elif not self._step_for([request_id]) and not request.logit_blocks:
                    break
            if request.finish_reason != "length":
                raise NanokvError(f"scoring ended early: {request.error or request.finish_reason}")
        finally:
            self._forget([request_id])

    # ---- the rest -------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float | bool]:
        """Plain numbers since the LLM was made.

        bytes_per_token, page_size, page_bytes      what the cache costs (payload; page_bytes with padding)
        pages_total, pages_free, pages_held         pages that are free, or private to running requests
        pages_cached, pages_locked                  pages in the prefix tree; those of them that running requests use
        state_bytes                                 one sequence's recurrent state; where there is one, also:
        states_total, states_free, states_held      states that are free, or belong to running requests
        states_cached, state_evictions              checkpoints in the prefix tree; those dropped for room
        hit_tokens, queried_tokens                  prompt tokens that the prefix cache saved, and that were looked up
        kv_hit_tokens                               prompt tokens whose pages were found: more than hit_tokens only
                                                    where a recurrent state was missing
        evictions, copies                           cached pages dropped for room; shared pages copied before a write
        preemptions, steps                          requests sent back to the queue; engine steps
        requests_running, requests_waiting          right now
        row_invariant                               whether this machine's matrix products give a row the same bits
                                                    whatever its batch mates, which exactness rests on
        with disagg also:
        prefill_workers_ready, requests_remote      right now; requests whose pages another process may write into
        remote_prefills, remote_tokens              attempts handed over, and their uncached tokens
        remote_lost, worker_deaths                  attempts that came to nothing; workers that died or were killed
        stale_messages                              messages of an attempt or a pool that is gone: dropped
        """
        row_invariant = Ops(self.config.kernels).row_invariant(self.dtype, self.device)
        return {**self.engine.stats(), "row_invariant": row_invariant}

    def reset_prefix_cache(self) -> None:
        """Drop every cached page that no running request holds."""
        self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Abort what runs, end other processes and close the event log; no request is taken after that. Safe to call
        twice. With disagg it does nothing in a forked child: the other processes work for the parent."""
        if self.disagg is not None and os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self.engine.close()

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

    def _submit(self, request: Request) -> str:
        with self._lock:
            if self._closed:
                raise NanokvError("this LLM is closed: make a new one")
            request_id = self.engine.add_request(request)
            self._inbox[request_id] = deque()
            return request_id

    def _step_for(self, ids: list[str]) -> bool:
        """One step if any of these requests still runs; False, with all their outputs in the inbox, if none does."""
        with self._lock:
            if not any(request_id in self.engine for request_id in ids):
                return False
            foreign = []  # of requests that the caller gave to the engine, and will ask it for
            for output in self.engine.step():
                self._inbox.get(output.request_id, foreign).append(output)
            self.engine.put_back(foreign)
            return True

    def _forget(self, ids: list[str]) -> None:
        with self._lock:
            for request_id in ids:
                if request_id in self.engine:
                    self.engine.abort(request_id)
                self._inbox.pop(request_id, None)


class _Stream:
    """Iterator over the outputs of one request; a generator would not abort it if closed before the first output."""

    def __init__(self, llm: LLM, request_id: str) -> None:
        self._llm = llm
        self.request_id = request_id

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> RequestOutput:
        inbox = self._llm._inbox.get(self.request_id)
        while inbox is not None:
            with self._llm._lock:
                if inbox:
                    output = inbox.popleft()
                    if output.finished and not inbox and self.request_id not in self._llm.engine:
                        self.close()
                    return output
                if not self._llm._step_for([self.request_id]):  # somebody else stepped the engine and has its outputs
                    self.close()
                    break
        raise StopIteration

    def close(self) -> None:
        """Abort the request if it still runs."""
        self._llm._forget([self.request_id])

    def __del__(self) -> None:
        self.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text or token ids as a list of one. Raises RequestError for what is no sequence."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise RequestError(f"prompts={prompts!r:.60}: expected a text, a list of token ids, or a list of either")
    one = len(prompts) > 0 and not isinstance(prompts[0], (str, Sequence))
    return [prompts] if one else list(prompts)


def resolve_dtype(name: str, model: ModelConfig) -> torch.dtype:
    """The torch dtype of a name; "auto" takes the checkpoint's. Raises ConfigError."""
    chosen = (model.dtype or "float32") if name == "auto" else name
    if chosen not in DTYPES:
        raise ConfigError(f"dtype={chosen!r}: allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[chosen]
