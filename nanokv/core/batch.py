"""Batch: the input of one step as flat tensors: tokens, their positions, and the pages of each request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The rows of one step, request after request. Rows of prefill and of decode are alike.

    token_ids       int64 [rows]            the token of each row
    positions       int32 [rows]            position of the row in its request; it attends to positions <= its own
    write_pages     int32 [rows]            the page that receives the row's K and V
    write_slots     int32 [rows]            the token slot inside that page, 0 <= slot < page_size
    request_starts  int32 [requests + 1]    rows of request r: request_starts[r] .. request_starts[r + 1]
    page_tables     int32 [requests, widest]  pages of request r in order of position; entries past its end are 0 and
                                            are never read, because no position reaches them
    logit_rows      int64 [wanted]          rows whose logits are wanted, ascending
    state_ids       int32 [requests]        the state of each request, empty where no layer has a state
    page_size       tokens in a page
    unwritable      bool [rows]             layers mark the rows whose keys or values a codec cannot hold; the results
                                            of such rows are dropped. All False where not given. The one field that
                                            layers write
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
    unwritable: torch.Tensor = field(default=None)  # type: ignore[assignment]  # __post_init__ makes it a tensor
    _memo: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unwritable is None:
            object.__setattr__(self, "unwritable", torch.zeros_like(self.token_ids, dtype=torch.bool))

    @property
    def num_rows(self) -> int:
        """Rows of all requests together."""
        return self.token_ids.shape[0]

    @property
    def num_requests(self) -> int:
        """Requests with a row or more."""
        return self.request_starts.shape[0] - 1

    def once(self, make: Callable[..., T], *arguments: Any) -> T:
        """make(self, *arguments), memoised: a value of this step that every layer needs. Treat it as read-only."""
        key = (make, *arguments)
        if key not in self._memo:
            self._memo[key] = make(self, *arguments)
        value: T = self._memo[key]
        return value

    def select(self, requests: list[int]) -> tuple[torch.Tensor, Batch]:
        """The part of the batch that belongs to some requests. The memo of `once` is not shared.

        requests   indices of requests, in the order of the new batch
        Returns    int64 [rows], the rows of these requests; and their Batch, without logit rows
        """
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
