"""Steps a decoder by hand: chunks of sequences become Batches over a small pool whose pages are shuffled and dirty."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from nanokv.cache.store import CacheStore
from nanokv.codecs import RawCodec
from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.models.config import ModelConfig
from nanokv.models.decoder import Decoder
from nanokv.models.loader import load_model
from nanokv.models.read import read_folder


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
    config: ModelConfig | None = None,
    **more: Any,
) -> Decoder:
    """A folder's decoder on the CPU, its cache in the dtype of activations; `config` stands in for the folder's own."""
    return load_model(folder, config or read_folder(folder), dtype, "cpu", RawCodec(dtype), page_size, **more)


@dataclass
class Sequence:
    """Token ids, the pages of their K and V, the number of computed tokens, and the id of the recurrent state."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    state: int | None = None


def make_batch(chunks: list[tuple[Sequence, int]], page_size: int, last_only: bool = False) -> Batch:
    """The next `count` tokens of each sequence as one step; logits of every row, or of each sequence's last."""
    token_ids, positions, pages, starts = [], [], [], [0]
    for sequence, count in chunks:
        span = range(sequence.num_computed, sequence.num_computed + count)
        token_ids += [sequence.tokens[p] for p in span]
        positions += span
        pages += [sequence.pages[p // page_size] for p in span]
        starts.append(len(token_ids))
    widest = max(len(sequence.pages) for sequence, _ in chunks)
    tables = [sequence.pages + [0] * (widest - len(sequence.pages)) for sequence, _ in chunks]
    rows = [end - 1 for end in starts[1:]] if last_only else range(len(token_ids))
    return Batch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        write_pages=torch.tensor(pages, dtype=torch.int32),
        write_slots=torch.tensor([p % page_size for p in positions], dtype=torch.int32),
        request_starts=torch.tensor(starts, dtype=torch.int32),
        page_tables=torch.tensor(tables, dtype=torch.int32),
        logit_rows=torch.tensor(list(rows), dtype=torch.int64),
        state_ids=torch.tensor([one.state for one, _ in chunks if one.state is not None], dtype=torch.int32),
        page_size=page_size,
    )


def step_of(
    rows: dict[int, list[int]],
    tables: torch.Tensor,
    page_size: int,
    write_pages: torch.Tensor | None = None,
    write_slots: torch.Tensor | None = None,
) -> Batch:
    """A step for kernels, which read no tokens: the positions of some requests, whose pages are rows of `tables`."""
    positions = torch.tensor([p for own in rows.values() for p in own], dtype=torch.int32)
    starts = torch.tensor([0, *accumulate(len(own) for own in rows.values())], dtype=torch.int32)
    unused = torch.zeros(len(positions), dtype=torch.int32)
    return Batch(
        token_ids=unused.long(), positions=positions,
        write_pages=unused if write_pages is None else write_pages.int(),
        write_slots=unused if write_slots is None else write_slots.int(), request_starts=starts,
        page_tables=tables[list(rows)], logit_rows=unused[:0].long(), state_ids=unused[:0], page_size=page_size,
    )  # fmt: skip


class Rig:
    """A decoder bound to a store of its own, with the page size that it was built for.

    Every byte of the store starts as 0x3F, which is a number near 1 in each float type: a slot that is read before it
    is written changes the result.
    """

    def __init__(self, decoder: Decoder, num_pages: int = 64, seed: int = 0) -> None:
        self.decoder = decoder
        plane = next(plane for spec in decoder.specs for plane in spec.paged)
        self.page_size = plane.shape[plane.token_axis]
        self.layout = PageLayout(decoder.specs, self.page_size)
        decoder.bind(self.layout)
        num_states = 8 if self.layout.state_bytes else 0
        dirty = torch.full((num_pages * self.layout.page_bytes + num_states * self.layout.state_bytes,), 0x3F).byte()
        self.store = CacheStore(self.layout, num_pages, buffer=dirty, num_states=num_states)
        self.free_states = list(range(num_states))
        self.free = list(range(num_pages))
        random.Random(seed).shuffle(self.free)

    def sequence(self, tokens: list[int]) -> Sequence:
        """A sequence with pages for all of its tokens."""
        count = self.layout.pages_for(len(tokens))
        pages, self.free = self.free[:count], self.free[count:]
        assert len(pages) == count, "the pool of the rig is too small"
        return Sequence(tokens, pages, state=self.free_states.pop() if self.free_states else None)

    def step(self, *chunks: tuple[Sequence, int], last_only: bool = False) -> list[torch.Tensor]:
        """Computes the next `count` tokens of each sequence; returns each one's logits [count or 1, vocab]."""
        batch = make_batch(list(chunks), self.page_size, last_only)
        with torch.inference_mode():
            logits = self.decoder.forward(batch, self.store)
        for sequence, count in chunks:
            sequence.num_computed += count
        return list(logits.split([1 if last_only else count for _, count in chunks]))

    def run(self, tokens: list[int], chunk: int) -> torch.Tensor:
        """Logits [tokens, vocab] of one sequence, `chunk` tokens a step."""
        sequence, rows = self.sequence(tokens), []
        while sequence.num_computed < len(tokens):
            rows += self.step((sequence, min(chunk, len(tokens) - sequence.num_computed)))
        self.free += sequence.pages
        if sequence.state is not None:
            self.free_states.append(sequence.state)
        return torch.cat(rows)
