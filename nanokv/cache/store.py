"""CacheStore: the bytes of pages and states. Knows the layout; knows neither owners nor tokens.

    pages    Slots of page_bytes
    states   Slots of state_bytes, behind the pages in the same flat allocation

    page i | layer 0 planes | layer 1 planes | ... | layer n planes |
           ^ i * page_bytes                  ^ first_layer .. last_layer lie side by side: one slice

A page is one contiguous block, so moving it (to host memory, a file, another process) is one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanokv.core.spec import PageLayout

_CACHE_LINE = 64
WORD = 8
"""Bytes of the int64 words in which torch gathers and scatters; single bytes take 40 to 80 times as long."""
LayerRange = Callable[[int, int | None], tuple[int, int]]
"""(first layer, last layer + 1 or None for all) -> the bytes [start, end) of these layers in a slot."""


def _words(data: torch.Tensor) -> torch.Tensor:
    """The same bytes as int64: planes are aligned to 16 bytes, so every slice of layers is whole words."""
    return data.view(torch.int64)


def _zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed uint8 [num_bytes]: a kernel may multiply an unwritten slot by weight 0, and 0 * NaN is NaN.

    On a CPU the system maps zero pages on first touch: unused memory of a large pool costs nothing.
    """
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    block = np.zeros(num_bytes + _CACHE_LINE, dtype=np.uint8)
    start = -block.ctypes.data % _CACHE_LINE
    return torch.from_numpy(block[start : start + num_bytes])


class Slots:
    """Blocks of equal size, read, written and copied by their ids: whole, or some of their layers.

    data          uint8 [slots, bytes], a view of the store's buffer
    layer_range   the bytes of layers in a slot
    """

    def __init__(self, data: torch.Tensor, layer_range: LayerRange) -> None:
        self.data = data
        self._layer_range = layer_range

    def __len__(self) -> int:
        return self.data.shape[0]

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies slot src over slot dst for each (src, dst), one after the other.

        The order matters: a slot may be the source of one copy and the destination of a later one.
        """
        for src, dst in copies:
            self.data[dst].copy_(self.data[src])

    def width(self, first_layer: int = 0, last_layer: int | None = None) -> int:
        """Bytes of the layers first_layer .. last_layer - 1 in one slot."""
        start, end = self._layer_range(first_layer, last_layer)
        return end - start

    def read(
        self,
        ids: Sequence[int],
        first_layer: int = 0,
        last_layer: int | None = None,
        buffer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Copies the layers first_layer .. last_layer - 1 of these slots.

        buffer    uint8, at least len(ids) * width bytes: receives the copy at its start, because reused memory costs no
                  page faults; None: new memory
        Returns   uint8 [len(ids), bytes], contiguous
        """
        source = _words(self._layers(first_layer, last_layer))
        shape = len(ids), source.shape[1]
        size = shape[0] * shape[1] * WORD
        if buffer is None:
            buffer = torch.empty(size, dtype=torch.uint8, device=source.device)
        out = _words(buffer[:size]).view(shape)
        torch.index_select(source, 0, self._index(ids), out=out)
        return out.view(torch.uint8)

    def write(
        self, ids: Sequence[int], data: torch.Tensor, first_layer: int = 0, last_layer: int | None = None
    ) -> None:
        """Writes the layers first_layer .. last_layer - 1 of these slots.

        ids      distinct
        data     uint8 [len(ids), bytes] on any device, as `read` of the same layers returns it
        Raises   ValueError for data of another shape or dtype
        """
        target = self._layers(first_layer, last_layer)
        if data.dtype != torch.uint8 or tuple(data.shape) != (len(ids), target.shape[1]):
            raise ValueError(
                f"data {data.dtype} {list(data.shape)}: expected uint8 {[len(ids), target.shape[1]]} for these layers"
            )
        data = data.to(self.data.device).contiguous()
        data = data.clone() if data.storage_offset() % WORD else data
        _words(target).index_copy_(0, self._index(ids), _words(data))

    def _layers(self, first: int, last: int | None) -> torch.Tensor:
        start, end = self._layer_range(first, last)
        return self.data[:, start:end]

    def _index(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=self.data.device)


class CacheStore:
    """The pages and the states of one engine, in one buffer.

    layout       PageLayout
    num_pages    pages in the pool
    device       of the buffer
    buffer       uint8 [num_pages * page_bytes + num_states * state_bytes], contiguous: memory of the caller (shared
                 memory, CUDA IPC) instead of an allocation. Its content and its device are kept
    num_states   states after the pages
    Raises       ValueError for a buffer of another dtype or size, or one that is not contiguous
    """

    def __init__(
        self,
        layout: PageLayout,
        num_pages: int,
        device: torch.device | str = "cpu",
        buffer: torch.Tensor | None = None,
        num_states: int = 0,
    ) -> None:
        page_bytes = num_pages * layout.page_bytes
        num_bytes = page_bytes + num_states * layout.state_bytes
        if buffer is None:
            buffer = _zeros(num_bytes, torch.device(device))
        elif buffer.dtype != torch.uint8 or not buffer.is_contiguous() or buffer.numel() != num_bytes:
            raise ValueError(
                f"buffer {buffer.dtype} {list(buffer.shape)}: expected contiguous uint8 of {num_bytes} bytes "
                f"({num_pages} pages of {layout.page_bytes}, {num_states} states of {layout.state_bytes})"
            )
        self.layout = layout
        self.device = buffer.device
        self.pages = Slots(buffer[:page_bytes].view(num_pages, layout.page_bytes), layout.layer_range)
        self.states = Slots(buffer[page_bytes:].view(num_states, layout.state_bytes), layout.state_layer_range)
