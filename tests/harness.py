"""Steps a decoder by hand: chunks of sequences become Batches over a small pool whose pages are shuffled and dirty."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from nanokv.core.batch import Batch
from nanokv.core.spec import PageLayout
from nanokv.models.decoder import Decoder


@dataclass
class Sequence:
    """Token ids, the pages that hold their K and V, and how many are computed."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0


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
        state_ids=torch.zeros(0, dtype=torch.int32),
        page_size=page_size,
    )


class Rig:
    """A decoder bound to a pool of its own, in pages of the size it was built for.

    Every byte of the pool starts as 0x3F, which is a number near 1 in each float type: a slot that is read before it
    is written changes the result.
    """

    def __init__(self, decoder: Decoder, num_pages: int = 64, seed: int = 0) -> None:
        self.decoder = decoder
        plane = decoder.specs[0].paged[0]
        self.page_size = plane.shape[plane.token_axis]
        self.layout = PageLayout(decoder.specs, self.page_size)
        decoder.bind(self.layout)
        self.pool = torch.full((num_pages, self.layout.page_bytes), 0x3F, dtype=torch.uint8)
        self.free = list(range(num_pages))
        random.Random(seed).shuffle(self.free)

    def sequence(self, tokens: list[int]) -> Sequence:
        """A sequence with pages for all of its tokens."""
        count = self.layout.pages_for(len(tokens))
        pages, self.free = self.free[:count], self.free[count:]
        assert len(pages) == count, "the pool of the rig is too small"
        return Sequence(tokens, pages)

    def step(self, *chunks: tuple[Sequence, int], last_only: bool = False) -> list[torch.Tensor]:
        """Computes the next `count` tokens of each sequence; returns each one's logits [count or 1, vocab]."""
        batch = make_batch(list(chunks), self.page_size, last_only)
        with torch.inference_mode():
            logits = self.decoder.forward(batch, self.pool)
        for sequence, count in chunks:
            sequence.num_computed += count
        return list(logits.split([1 if last_only else count for _, count in chunks]))

    def run(self, tokens: list[int], chunk: int) -> torch.Tensor:
        """Logits [tokens, vocab] of one sequence, `chunk` tokens a step."""
        sequence, rows = self.sequence(tokens), []
        while sequence.num_computed < len(tokens):
            rows += self.step((sequence, min(chunk, len(tokens) - sequence.num_computed)))
        self.free += sequence.pages
        return torch.cat(rows)
