"""Plane, LayerSpec, PageLayout: where each layer's data lies in a page and in a state. Knows no values and no owners.

A page is one contiguous block of bytes that holds every paged plane of every layer for `page_size` tokens; a state is
one contiguous block that holds every state plane of every layer for one sequence:

    page   | layer 0: k | layer 0: v | layer 1: k | layer 1: v | ...      each plane aligned to 16 bytes
    pool   uint8 [num_pages, page_bytes], flat: plane p of page i starts at i * page_bytes + offset(p)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ALIGNMENT = 16
"""Bytes: every plane starts at a multiple."""


@dataclass(frozen=True)
class Plane:
    """One named array in a page or in a state.

    shape       of the whole array: with page_size tokens at `token_axis` for a paged plane
    token_axis  the axis of `shape` that counts tokens; None for a state plane, and for a paged plane that belongs to
                all tokens of the page
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    token_axis: int | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, without alignment."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerSpec:
    """The planes of one layer. Bytes are payload, without alignment.

    paged          in pages, per token
    state          per sequence, updated by every token: a prefix can be reused only where a checkpoint of it exists
    partial_page   per sequence, the tokens of its unfinished page: empty at page boundaries, so it needs no checkpoint
    """

    paged: tuple[Plane, ...] = ()
    state: tuple[Plane, ...] = ()
    partial_page: tuple[Plane, ...] = ()

    @property
    def page_size(self) -> int | None:
        """Tokens in a page; None for a layer without planes per token."""
        sizes = [plane.shape[plane.token_axis] for plane in self.paged if plane.token_axis is not None]
        return sizes[0] if sizes else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer's paged planes; 0 where it keeps none."""
        return sum(plane.num_bytes for plane in self.paged) // self.page_size if self.page_size else 0

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of the layer's planes in a state."""
        return sum(plane.num_bytes for plane in (*self.state, *self.partial_page))


@dataclass(frozen=True)
class PlaneSlot:
    """The place of one plane: `offset` bytes after the start of its page or state."""

    plane: Plane
    offset: int


class PageLayout:
    """The byte offsets of every plane of every layer in a page and in a state, computed from the layers' specs.

    specs       LayerSpec of each layer
    page_size   tokens in a page
    Attributes: page_bytes, state_bytes (allocated, with padding); page_payload, state_payload (without padding);
    is_recurrent (whether a layer has a state, so that a prefix can be reused only from a checkpoint)
    """

    def __init__(self, specs: list[LayerSpec], page_size: int) -> None:
        self.specs = list(specs)
        self.page_size = page_size
        self._paged: list[dict[str, PlaneSlot]] = []
        self._state: list[dict[str, PlaneSlot]] = []
        self.page_bytes = self._place(self._paged, [spec.paged for spec in specs])
        self.state_bytes = self._place(self._state, [(*spec.state, *spec.partial_page) for spec in specs])
        self.is_recurrent = any(spec.state for spec in specs)
        self.page_payload = sum(plane.num_bytes for spec in specs for plane in spec.paged)
        self.state_payload = sum(spec.bytes_per_sequence for spec in specs)

    @staticmethod
    def _place(table: list[dict[str, PlaneSlot]], layers: list[tuple[Plane, ...]]) -> int:
        """Places the planes of all layers one after the other, each at a multiple of ALIGNMENT bytes.

        Appends the slots of each layer to `table`, by name; returns the bytes of them all, a multiple of ALIGNMENT too.
        """
        end = 0
        for planes in layers:
            slots = {}
            for plane in planes:
                slots[plane.name] = PlaneSlot(plane, end)
                end += -(-plane.num_bytes // ALIGNMENT) * ALIGNMENT
            table.append(slots)
        return end

    @property
    def states_per_request(self) -> int:
        """States that one request may hold: its own, and a checkpoint where layers are recurrent."""
        return 0 if not self.state_bytes else 2 if self.is_recurrent else 1

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.specs)

    @property
    def bytes_per_token(self) -> int:
        """Payload bytes of one more token, all layers together."""
        return sum(spec.bytes_per_token for spec in self.specs)

    def paged(self, layer: int, name: str) -> PlaneSlot:
        """The slot of a paged plane. Raises KeyError where the layer keeps no such plane."""
        return self._paged[layer][name]

    def state(self, layer: int, name: str) -> PlaneSlot:
        """The slot of a plane of a state or of a partial page. Raises KeyError where the layer keeps no such plane."""
        return self._state[layer][name]

    def layer_range(self, first: int = 0, last: int | None = None) -> tuple[int, int]:
        """The bytes [start, end) of a page that hold the layers first .. last - 1, which are adjacent."""
        return _layer_range(self._paged, self.page_bytes, first, last)

    def state_layer_range(self, first: int = 0, last: int | None = None) -> tuple[int, int]:
        """The bytes [start, end) of a state that hold the layers first .. last - 1."""
        return _layer_range(self._state, self.state_bytes, first, last)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)


def _layer_range(table: list[dict[str, PlaneSlot]], size: int, first: int, last: int | None) -> tuple[int, int]:
    """The bytes of the layers first .. last - 1 of `table` in a block of `size`; layers without planes have none."""
    starts = [min((slot.offset for slot in slots.values()), default=None) for slots in table]
    later = [] if last is None else [start for start in starts[last:] if start is not None]
    own = [start for start in starts[first:last] if start is not None]
    end = later[0] if later else size
    return (own[0] if own else end), end
