"""Errors of a codec: of the vectors in its pages, and of attention over them.

Vectors are written into pages by the layer that serves requests, and read back.

    error of a vector      mean of |x - stored|^2 / |x|^2
    error of attention     |y - y'| / |y| over all rows of a layer, y the result with exact keys and values

The error of a vector is also that of its products: for a query q of length 1 in a random direction,
dim * (q . x - q . stored)^2 / |x|^2 has the same mean. So sketches, which are good for products only, share the
column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import Codec
from nanokv.codecs.pages import Heads
from nanokv.codecs.tables import distortion
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.engine.calibrate import first_pages
from nanokv.kernels.linear import activation_dtype
from nanokv.kernels.ops import AUTO, Ops
from nanokv.llm import LLM

RANDOM_TOKENS, RANDOM_HEADS = 512, 32
"""Of the random vectors: 16,384 each of keys and of values, so that a mean is known to half a percent."""

Vectors = tuple[torch.Tensor, ...]
"""Keys and values, or latents alone: float32 [pages, heads, page_size, dim] each."""


@dataclass(frozen=True)
class Recorded:
    """The inputs of one layer over a text, and its outputs with exact keys and values.

    inputs, outputs   float32 [tokens, width]
    vectors           by token: float32 [tokens, heads, dim] each
    """

    layer: int
    inputs: torch.Tensor
    outputs: torch.Tensor
    vectors: Vectors


class _Tap:
    """A layer that also keeps its inputs."""

    def __init__(self, mixer: Any) -> None:
        self.mixer = mixer
        self.seen: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor, store: CacheStore, batch: Batch) -> torch.Tensor:
        self.seen.append(x.float().clone())
        return self.mixer(x, store, batch)


def record(llm: LLM, token_ids: Sequence[int]) -> list[Recorded]:
    """The layers that keep pages, over one text. The engine must be idle; its prefix cache is emptied."""
    blocks = [(i, llm.engine.model.layers[i]) for i, spec in enumerate(llm.engine.layout.specs) if spec.paged]
    taps = [_Tap(block.mixer) for _, block in blocks]
    with ExitStack() as stack:
        for (_, block), tap in zip(blocks, taps, strict=True):
            stack.enter_context(patch.object(block, "mixer", tap))
        for _ in llm.score_blocks(list(token_ids)):
            pass
    found = []
    for (layer, _), tap in zip(blocks, taps, strict=True):
        inputs = torch.cat(tap.seen)
        outputs, vectors = replay(llm, layer, inputs)
        found.append(Recorded(layer, inputs, outputs, tuple(by_token(x) for x in vectors)))
    return found


@torch.inference_mode()
def replay(llm: LLM, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, Vectors]:
    """One layer over these inputs, through the first pages of an idle engine: its outputs, and the vectors in them."""
    llm.reset_prefix_cache()
    store = llm.engine.store
    mixer: Any = llm.engine.model.layers[layer].mixer
    batch = first_pages(torch.zeros(len(inputs), dtype=torch.int64), llm.config.page_size, store)
    outputs = mixer(inputs.to(activation_dtype(llm.device, llm.dtype), copy=True), store, batch).float()
    pages = batch.page_tables[0].long()
    return outputs, mixer.pages.vectors(store.pages.data, pages)


def by_token(x: torch.Tensor) -> torch.Tensor:
    """[pages, heads, page_size, dim] -> [tokens, heads, dim]."""
    return x.transpose(1, 2).flatten(0, 1)


def relative_mse(x: torch.Tensor, stored: torch.Tensor) -> float:
    """Mean over vectors of |x - stored|^2 / |x|^2; vectors of length 0 count nothing."""
    length = x.square().sum(-1)
    share = (x - stored).square().sum(-1) / length
    return share[length > 0].double().mean().item()


def model_errors(llm: LLM, recorded: Sequence[Recorded]) -> dict[str, float | None]:
    """Errors on the model's own vectors, means over layers. `recorded` comes from a raw float32 engine."""
    attention, vectors = [], []
    for one in recorded:
        outputs, stored = replay(llm, one.layer, one.inputs)
        attention.append(((outputs - one.outputs).norm() / one.outputs.norm()).item())
        vectors.append([relative_mse(x, by_token(s)[: len(x)]) for x, s in zip(one.vectors, stored, strict=True)])
    k, *v = (mean(layer) for layer in zip(*vectors, strict=True))
    return {"attention_error": mean(attention), "model_k_mse": k, "model_v_mse": v[0] if v else None}


@torch.inference_mode()
def random_errors(codec: Codec, dim: int, page_size: int, ops: Ops = AUTO) -> dict[str, float]:
    """Errors on random vectors of length 1, keys and values alike."""
    layout = PageLayout([codec.at(0).spec(RANDOM_HEADS, dim, page_size)], page_size)
    store = CacheStore(layout, layout.pages_for(RANDOM_TOKENS), num_states=1 if layout.state_bytes else 0)
    turned = torch.cat((torch.ones(RANDOM_TOKENS, dim // 2), torch.zeros(RANDOM_TOKENS, dim // 2)), dim=1)  # not at all
    heads = Heads(RANDOM_HEADS, RANDOM_HEADS, dim, 1 / math.sqrt(dim), turned, ops=ops)
    pages = codec.at(0).pages(layout, 0, heads)
    batch = first_pages(torch.zeros(RANDOM_TOKENS, dtype=torch.int64), page_size, store)
    noise = torch.randn(RANDOM_TOKENS, 3 * RANDOM_HEADS, dim, generator=torch.Generator().manual_seed(0))
    x = noise / noise.norm(dim=-1, keepdim=True)
    pages.attend(x.flatten(1).clone(), store.pages.data, store.states.data, batch)
    order = batch.page_tables[0].long()
    stored = pages.vectors(store.pages.data, order)
    k, v = (relative_mse(x, by_token(s)) for x, s in zip(x.chunk(3, dim=1)[1:], stored, strict=True))
    return {"random_k_mse": k, "random_v_mse": v}


def theory(quantizer: str, dim: int) -> float | None:
    """The error of a quantizer on any fixed vector, on average over rotations and sketches; None: no closed form.

    tq2..4       D, the distortion of the Lloyd-Max table: that of plain codes. Codes are stored at their
                 vector's length, which for dim 64 gives 4 % less at 4 bits and 2 % more at 2 bits
    tqp2..4      pi / 2 * D at one bit less, and (pi / 2 - 1) * D where the sketch is orthogonal
    qjl          (pi / 2 - 1) / 2: the mean of two orthogonal sketches
    Source       Zandieh et al. 2025, Theorems 1 and 2; 2024 (QJL)
    """
    if quantizer == "qjl":
        return (math.pi / 2 - 1) / 2
    kind, _, form = quantizer.partition("-")
    if kind.startswith("tqp"):
        factor = math.pi / 2 - (form == "orth")
        return factor * distortion(int(kind[3:]) - 1, dim)
    if kind.startswith("tq"):
        return distortion(int(kind[2:]), dim)
    return None
