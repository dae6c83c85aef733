"""`bench codecs`: bytes, errors, quality and speed of each codec.

    part "codec"   one row a codec: bytes, errors of vectors and attention, quality of words, requests at once
    part "speed"   one row a codec, batch and context: decode speed in turns with the raw codec

Quality is that of a float32 engine whose only difference is the codec, against a raw one; so the row of `raw` says
what the model's own dtype costs. Bytes, speed and requests at once are those of the run's own dtype. All of them use
the same prefill mode.

Each codec takes one engine after the other, never more than one beside the raw ones. Rows come as they are measured, so
an interrupted run keeps its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanokv.bench.codec_errors import model_errors, random_errors, record, theory
from nanokv.bench.codec_quality import Reference, Texts, summary
from nanokv.bench.codec_speed import in_turns, requests_at_once
from nanokv.bench.codec_texts import texts_for
from nanokv.bench.decode import fits
from nanokv.bench.measure import Ticker, is_noise, no_tick, warm_up
from nanokv.codecs import resolve_codec, value_quantizer
from nanokv.core.config import EngineConfig
from nanokv.core.spec import PageLayout
from nanokv.engine.memory import MemoryBudget, pool_size
from nanokv.kernels.ops import Ops
from nanokv.llm import LLM
from nanokv.models.decoder import layer_specs

GIB = 1 << 30
ALL = (
    "raw", "fp8", "int8", "int4", "rot4", "tq2", "tq3", "tq4", "tqp2", "tqp3", "tqp4", "kivi2", "kivi4", "polar", "qjl",
)  # fmt: skip
"""The codecs of a full table."""
KEY_QUANTIZERS = ("fp8", "int8", "int4", "rot4", "tq2", "tq3", "tq4", "tqp2", "tqp3", "tqp4", "polar", "qjl")
VALUE_QUANTIZERS = ("fp8", "int8", "int4", "rot4", "tq2", "tq3", "tq4", "polar")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    texts, text_tokens   of the quality
    points               batch and context of each speed row; those beyond the model or the pool are left out
    steps, turns         decode steps timed in a turn; turns of the codec and the raw one
    requests, context    the fixed memory is that of so many raw requests of so many tokens
    """

    texts: int
    text_tokens: int
    points: tuple[tuple[int, int], ...]
    steps: int
    turns: int
    requests: int
    context: int


FULL = Plan(4, 1024, ((1, 256), (1, 1024), (1, 4096), (8, 256), (8, 1024)), steps=5, turns=3, requests=8, context=512)
QUICK = Plan(2, 256, ((1, 256), (1, 1024)), steps=4, turns=3, requests=4, context=256)

Open = Callable[..., LLM]
"""Makes an engine of the model with these fields of EngineConfig."""
Row = dict[str, Any]


def page_size_of(codec: str) -> int:
    """The page that a codec is measured with: 16 tokens, but where the group is the page."""
    return EngineConfig(codec=codec).page_size


def swept(names: Sequence[str]) -> list[str]:
    """These codecs on keys alone and on values alone: "tq4/raw", "raw/tq4"."""
    keys = [f"{name}/raw" for name in names if name in KEY_QUANTIZERS]
    return keys + [f"raw/{name}" for name in names if name in VALUE_QUANTIZERS]


class CodecBench:
    """Measures codecs of one model, one after the other.

    open_llm   makes engines of it; with no fields but the codec's it takes the run's dtype
    raw        such an engine with codec raw, idle
    plan       Plan
    texts      token ids by name; None: those of codec_texts.texts_for
    """

    def __init__(self, open_llm: Open, raw: LLM, plan: Plan, texts: Texts | None = None) -> None:
        self._open = open_llm
        self._raw = raw
        self._plan = plan
        self.texts = texts_for(raw, plan.texts, plan.text_tokens) if texts is None else texts
        with open_llm(codec="raw", dtype="float32") as llm:
            self._reference = Reference(llm, self.texts)
            self._judged_raw = [self._reference.judge(llm, name) for name in self.texts]
            # Tokens that fill pages of every size: partial pages may not be in codes.
            ids = next(iter(self.texts.values()))[:512]
            self._recorded = record(llm, ids[: len(ids) // 64 * 64 or len(ids)])
        self._points = [
            (batch, context)
            for batch, context in plan.points
            if context + plan.steps + 8 <= raw.engine.max_length and fits(raw, batch, context, plan.steps)
        ]
        if self._points:
            warm_up(raw, 64)

    def num_ticks(self, names: Sequence[str], sweep: Sequence[str]) -> int:
        """How often `rows` of all of these call tick."""
        return len(self.texts) * (len(names) + len(sweep)) + len(names) * len(self._points)

    def rows(
        self, codec: str, with_speed: bool = True, known: Collection[tuple] = (), tick: Ticker = no_tick
    ) -> Iterator[Row]:
        """The rows of one codec but for those whose `key` is known.

        with_speed   False: only the row of the codec, without requests at once (for sweeps)
        tick         called once for each text and each row of speed
        Raises       ConfigError for a codec that cannot serve this model
        """
        if ("codec", codec, None, None) not in known:
            row = {"part": "codec", "codec": codec, **sizes(self._raw, codec), **self._errors_and_quality(codec, tick)}
            if with_speed:
                row |= self._requests_at_once(codec)
            yield row
        missing = [point for point in self._points if ("speed", codec, *point) not in known]
        if not with_speed or not missing:
            return
        with self._open(codec=codec, page_size=page_size_of(codec)) as llm:
            warm_up(llm, 64)
            for batch, context in missing:
                found = in_turns(llm, self._raw, batch, context, self._plan.steps, self._plan.turns)
                # Raw in turns with raw has one speed: how far it is from 1 says how noisy all these ratios are.
                noise = codec == "raw" and is_noise(abs(found["speed_ratio"] - 1), 0.05)
                yield {"part": "speed", "codec": codec, **found, "noise": noise}
                tick()

    def _errors_and_quality(self, codec: str, tick: Ticker) -> Row:
        dtype = self._raw.config.dtype if codec == "raw" else "float32"
        with self._open(codec=codec, dtype=dtype, page_size=page_size_of(codec)) as llm:
            row: Row = _random(llm, codec) | model_errors(llm, self._recorded)
            judged = []
            for name in self.texts:
                judged.append(self._reference.judge(llm, name))
                tick()
        quality = summary(judged, self._judged_raw)
        return row | {"texts": len(judged)} | quality | {"noise": quality["kl"] < 0}

    def _requests_at_once(self, codec: str) -> Row:
        plan, raw, own = self._plan, self._raw.engine.layout, layout_of(self._raw, codec)

        def memory(layout: PageLayout) -> int:
            """Bytes of one request."""
            pages = layout.pages_for(plan.context + 16) * layout.page_bytes
            return pages + layout.states_per_request * layout.state_bytes

        total = plan.requests * memory(raw)
        fields = {"kv_memory": total, "max_requests": total // memory(own) + 1}  # one more than can run
        with self._open(codec=codec, page_size=page_size_of(codec), **fields) as llm:
            return {"requests_at_once": requests_at_once(llm, plan.context), "requests_memory_bytes": total}


def notes(rows: Sequence[Row], dtype: str, vocab_size: int) -> list[str]:
    """Sentences on rows that read wrong without them.

    dtype        of the run
    vocab_size   of the model: a uniform guess has this perplexity
    """
    raw = next((row for row in rows if row["part"] == "codec" and row["codec"] == "raw"), None)
    found = []
    if raw is not None and dtype != "float32":
        found.append(
            f"raw is a {dtype} engine beside the float32 reference, and every other row a float32 engine with that "
            f"codec: the KL of raw is the cost of {dtype}, not of a codec, and may exceed that of int8."
        )
    if any(row["part"] == "codec" and row["perplexity"] > vocab_size for row in rows):
        found.append(
            f"The perplexity exceeds the {vocab_size:,} of a uniform guess: the model does not know the language of "
            "these texts, and its KL, top-1 and ppl say little."
        )
    return found


def key(row: Row) -> tuple:
    """The part, codec, batch and context of a row."""
    return row["part"], row["codec"], row.get("batch"), row.get("context_tokens")


def layout_of(llm: LLM, codec: str, dtype: torch.dtype | None = None) -> PageLayout:
    """The layout of the model of `llm` in this codec. Raises ConfigError where the codec cannot serve it."""
    page_size = page_size_of(codec)
    resolved = resolve_codec(codec, dtype or llm.dtype, layers=llm.model_config.attention_layers)
    return PageLayout(layer_specs(llm.model_config, resolved, page_size), page_size)


def sizes(llm: LLM, codec: str) -> Row:
    """Bytes of the whole model's cache in this codec, beside bfloat16.

    true_bits                bits of a number: payload, scales and all
    bytes_per_token          payload; pool_bytes_per_token: the same with planes aligned, as a pool allocates
    bytes_per_sequence       beside the pages of a request that runs: recurrent states, partial pages
    tokens_in_1gib           that a pool of 1 GiB holds, beside the states of 64 requests
    """
    layout, bfloat16 = layout_of(llm, codec), layout_of(llm, "raw", torch.bfloat16)
    config = EngineConfig(kv_memory=GIB, page_size=layout.page_size)
    pages, _ = pool_size(config, layout, MemoryBudget(limit=GIB, default=GIB))
    per_token, of_bfloat16 = layout.page_payload / layout.page_size, bfloat16.page_payload / bfloat16.page_size
    return {
        "true_bits": 16 * per_token / of_bfloat16,
        "bytes_per_token": per_token,
        "pool_bytes_per_token": layout.page_bytes / layout.page_size,
        "bytes_per_sequence": layout.state_payload,
        "smaller_than_bfloat16": of_bfloat16 / per_token,
        "tokens_in_1gib": pages * layout.page_size,
    }


def _random(llm: LLM, codec: str) -> Row:
    """Errors on random vectors beside theory."""
    config = llm.model_config
    dim = config.head_dim if config.mla is None else config.mla.kv_rank
    resolved = resolve_codec(codec, llm.dtype, layers=config.attention_layers)
    k, _, v = codec.partition("/")
    v = v or value_quantizer(k)
    return random_errors(resolved, dim, page_size_of(codec), Ops(llm.config.kernels)) | {
        "theory_k_mse": theory(k, dim),
        "theory_v_mse": theory(v, dim),
    }
