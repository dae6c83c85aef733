"""The input of a step: flat arrays on the host, and one copy of them to the device.

    arrays      name -> numpy array: the fields of Batch, and the sources of tokens that only the device knows
    Block       the same arrays side by side in one block of bytes, on host and device; its views are the tensors

A CUDA graph reads one block, which is filled again for each step: a graph knows addresses, not values.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nanokv.core.batch import Batch
from nanokv.core.request import Request

ALIGNMENT = 16
"""Bytes: every array of a block starts at a multiple."""
Arrays = dict[str, np.ndarray]
"""Name -> array, for one step."""


def num_logit_rows(request: Request) -> int:
    """Rows whose logits the step must give: all when scoring, one when it computes the last token, else none."""
    if request.wants_all_logits:
        return request.num_scheduled
    return 1 if request.num_scheduled == request.num_to_compute else 0


def arrays_of(requests: list[Request], page_size: int) -> Arrays:
    """One step as flat arrays; `requests` have num_scheduled > 0 and pages for all tokens up to there.

    Beside the fields of Batch:
    is_in_flight     bool [rows], rows whose token is in flight: token_ids there is to be replaced by
    in_flight_slots  int64 [rows], number in_flight_slots[row] of the tokens that the step before samples
    """
    counts = np.array([request.num_scheduled for request in requests], np.int32)
    starts = np.zeros(len(requests) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    tables = np.zeros((len(requests), max(len(request.held.pages) for request in requests)), np.int32)
    token_ids = np.zeros(starts[-1], np.int64)
    is_in_flight, in_flight_slots = np.zeros(starts[-1], np.bool_), np.zeros(starts[-1], np.int64)
    first_positions = np.empty(len(requests), np.int32)
    logit_rows: list[int] = []
    for i, request in enumerate(requests):
        computed, scheduled, end = request.num_computed, request.num_scheduled, int(starts[i + 1])
        known = request.tokens[computed : computed + scheduled]
        token_ids[end - scheduled : end - scheduled + len(known)] = known
        if len(known) < scheduled:
            is_in_flight[end - 1], in_flight_slots[end - 1] = True, request.in_flight
        first_positions[i] = computed
        tables[i, : len(request.held.pages)] = request.held.pages
        logit_rows.extend(range(end - num_logit_rows(request), end))
    owners = np.repeat(np.arange(len(requests), dtype=np.int32), counts)
    positions = np.arange(starts[-1], dtype=np.int32) - starts[owners] + first_positions[owners]
    return {
        "token_ids": token_ids,
        "in_flight_slots": in_flight_slots,
        "logit_rows": np.array(logit_rows, np.int64),
        "positions": positions,
        "write_pages": tables[owners, positions // page_size],
        "write_slots": positions % page_size,
        "request_starts": starts,
        "page_tables": tables,
        "state_ids": np.array([r.held.state_id for r in requests if r.held.state_id is not None], np.int32),
        "is_in_flight": is_in_flight,
        "unwritable": np.zeros(starts[-1], np.bool_),
    }


def padded(arrays: Arrays, num_rows: int, width: int, page: int, state: int | None) -> Arrays:
    """A step of one sampled row a request, padded to `num_rows` requests and page tables `width` pages wide.

    page, state   without an owner: each row of padding is the first token of a request there, so it reads the keys it
                  has just written, and no state; state is None where no layer has one
    """
    more = num_rows - len(arrays["token_ids"])

    def fill(name: str, value: int) -> np.ndarray:
        if not more:
            return arrays[name]
        return np.concatenate((arrays[name], np.full(more, value, arrays[name].dtype)))

    tables = np.zeros((num_rows, width), np.int32)
    own = arrays["page_tables"]
    tables[: len(own), : own.shape[1]] = own
    tables[len(own) :, 0] = page
    return {
        **{
            name: fill(name, 0)
            for name in ("token_ids", "in_flight_slots", "positions", "write_slots", "is_in_flight", "unwritable")
        },
        "write_pages": fill("write_pages", page),
        "state_ids": fill("state_ids", state) if state is not None else arrays["state_ids"],
        "logit_rows": np.arange(num_rows, dtype=np.int64),
        "request_starts": np.arange(num_rows + 1, dtype=np.int32),
        "page_tables": tables,
    }


class Block:
    """Arrays side by side in one block of bytes on a device.

    like     arrays of the same names, shapes and dtypes
    Attributes: views, name -> tensor of the same shape and dtype; `fill` writes all of them
    """

    def __init__(self, like: Arrays, device: torch.device) -> None:
        self.device = device
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, array in like.items():
            self._places[name] = end, end + array.nbytes
            end += math.ceil(array.nbytes / ALIGNMENT) * ALIGNMENT
        self._bytes = torch.empty(end, dtype=torch.uint8, device=device)
        self.views: dict[str, torch.Tensor] = {}
        for name, (start, stop) in self._places.items():
            kind = torch.from_numpy(like[name]).dtype
            self.views[name] = self._bytes[start:stop].view(kind).view(like[name].shape)

    def fill(self, arrays: Arrays) -> None:
        """Writes all views with one asynchronous copy, from a new host buffer: the device may still read the last."""
        staged = torch.empty(len(self._bytes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        numbers = staged.numpy()
        for name, (start, stop) in self._places.items():
            numbers[start:stop].view(arrays[name].dtype).reshape(arrays[name].shape)[...] = arrays[name]
        self._bytes.copy_(staged, non_blocking=True)


def on_device(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as tensors on `device`, of the same shapes and dtypes, for one step."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    block = Block(arrays, device)
    block.fill(arrays)
    return block.views


def take_in_flight(views: dict[str, torch.Tensor], in_flight_token_ids: torch.Tensor) -> None:
    """Writes tokens of the previous step into views["token_ids"], on the device, which works in order.

    in_flight_token_ids   int64, the samples of the previous step
    """
    ids = views["token_ids"]
    ids.copy_(torch.where(views["is_in_flight"], in_flight_token_ids[views["in_flight_slots"]], ids))


def batch_of(views: dict[str, torch.Tensor], page_size: int) -> Batch:
    """The Batch of the tensors of a step."""
    fields = {name: view for name, view in views.items() if name not in ("is_in_flight", "in_flight_slots")}
    return Batch(**fields, page_size=page_size)
