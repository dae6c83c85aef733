"""Batch: one step as flat tensors. Everything a forward pass needs to know about time and place stands here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The rows of one step, request after request; no row knows whether it is prefill or decode.

    token_ids       int64 [rows]            what each row embeds
    positions       int32 [rows]            place of the row in its request; it sees keys at positions <= its own
    write_pages     int32 [rows]            the page that receives the row's K and V
    write_slots     int32 [rows]            the token slot inside that page, 0 <= slot < page_size
    request_starts  int32 [requests + 1]    rows of request r: request_starts[r] .. request_starts[r + 1]
    page_tables     int32 [requests, widest]  pages of request r in order of position; entries past its end are 0 and
                                            are never read, because no position reaches them
    logit_rows      int64 [wanted]          rows whose logits are asked for, ascending
    state_ids       int32 [requests]        states of request r (recurrent layers), empty where no layer has a state
    page_size       tokens in a page
    unwritable      bool [rows]             the one thing that layers write: rows whose keys or values a codec cannot
                                            hold. What comes of such a row is dropped. All False where not given
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    write_pages: torch.Tensor
    write_slots: torch.Tensor
    request_starts: torch.Tensor
    page_tables: torch.Tensor
    logit_rows: torch.Tensor
    state_ids: torch.Tensor
    page_size: int
    unwritable: torch.Tensor | None = None
    _shared: dict[tuple, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unwritable is None:
            object.__setattr__(self, "unwritable", torch.zeros_like(self.token_ids, dtype=torch.bool))

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_requests(self) -> int:
        return self.request_starts.shape[0] - 1

    def once(self, make: Callable[..., T], *arguments: Any) -> T:
        """make(self, *arguments), computed for the first layer that asks and kept for the others: for what all layers
        work out of a step alike. Nobody may write into it."""
        key = (make, *arguments)
        if key not in self._shared:
            self._shared[key] = make(self, *arguments)
        return self._shared[key]

    def select(self, requests: list[int]) -> tuple[torch.Tensor, Batch]:
        """The rows of some requests (int64, ascending with `requests`), and a Batch of only these; no logits asked."""
        bounds = self.request_starts.tolist()
        spans = [torch.arange(bounds[i], bounds[i + 1], device=self.positions.device) for i in requests]
        rows, picked = torch.cat(spans), torch.tensor(requests, device=self.positions.device)
        starts = [0]
        for span in spans:
            starts.append(starts[-1] + len(span))
        return rows, replace(
            self,
            token_ids=self.token_ids[rows],
            positions=self.positions[rows],
            write_pages=self.write_pages[rows],
            write_slots=self.write_slots[rows],
            request_starts=torch.tensor(starts, dtype=torch.int32, device=self.positions.device),
            page_tables=self.page_tables[picked],
            logit_rows=self.logit_rows[:0],
            state_ids=self.state_ids[picked] if len(self.state_ids) else self.state_ids,
            unwritable=self.unwritable[rows],
        )
