"""Quantizer: how keys, or values, become the planes of a page. Knows no layers.

A quantizer is a recipe (a name and numbers); its encoder is the recipe made ready for a dimension and a device:

    x [..., dim] --encode--> one array for each plane --decode--> s [..., width],  x ~ basis.back(s)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch

from nanokv.codecs.basis import Basis, rotation
from nanokv.core.spec import PageLayout, Plane, PlaneSlot
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import CodePlane

Arrays = tuple[torch.Tensor, ...]


class Encoder(Protocol):
    """A quantizer made ready for vectors of one dimension. Rows do not depend on each other, to the last bit."""

    @property
    def basis(self) -> Basis | None:
        """None: the numbers s are those of x."""

    def encode(self, x: torch.Tensor) -> Arrays:
        """float32 [..., dim] -> one array for each plane, in their order: [..., width of the plane]."""

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        """The numbers s again: float32 [..., width]."""


class Quantizer(ABC):
    """How the vectors of keys, or of values, are written: as numbers s over a basis, with x ~ basis.back(s)."""

    name: str
    is_sketch: ClassVar[bool] = False
    """Good for products with a query only, so not for values."""
    multiple: ClassVar[int] = 16
    """The dimension of its vectors must be a multiple of this."""

    @abstractmethod
    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        """The planes of a page that hold vectors of `heads` heads; their names begin with `prefix`."""

    @abstractmethod
    def encoder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> Encoder:
        """The quantizer made ready for vectors of `dim` numbers."""


def plane(name: str, heads: int, page_size: int, width: int | None, dtype: torch.dtype) -> Plane:
    """A plane [heads, page_size, width], or [heads, page_size] where there is one number a token."""
    shape = (heads, page_size) if width is None else (heads, page_size, width)
    return Plane(name, shape, dtype, token_axis=1)


def array_of(memory: torch.Tensor, slot: PlaneSlot) -> torch.Tensor:
    """One plane of all pages (or of all states): a view [pages, *shape] of uint8 [pages, bytes]."""
    return reference.page_array(memory, slot.offset, slot.plane.shape, slot.plane.dtype)


class QuantizerPages:
    """The keys, or the values, of one layer, where they lie in pages.

    planes   of the quantizer, in their order
    """

    def __init__(self, encoder: Encoder, planes: tuple[Plane, ...], layout: PageLayout, layer: int) -> None:
        self.encoder = encoder
        self.slots = [layout.paged(layer, plane.name) for plane in planes]

    def write(self, x: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        """Encodes x float32 [rows, heads, dim]: row i to page pages[i], slot slots[i]."""
        for slot, numbers in zip(self.slots, self.encoder.encode(x), strict=True):
            array_of(pool, slot)[pages, :, slots] = numbers

    def read(self, pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """The decoded numbers of whole pages: float32 [pages, heads, page_size, width]."""
        return self.encoder.decode(*(array_of(pool, slot)[pages] for slot in self.slots))

    def to(self, x: torch.Tensor) -> torch.Tensor:
        """Queries float32 [..., dim] in the basis of decoded keys: [..., width]."""
        return x if self.encoder.basis is None else self.encoder.basis.to(x)

    def back(self, s: torch.Tensor) -> torch.Tensor:
        """Sums of decoded numbers float32 [..., width] as vectors: [..., dim]."""
        return s if self.encoder.basis is None else self.encoder.basis.back(s)

    def encode_exact(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers float32 [..., width] of x [..., dim], without loss."""
        return x if self.encoder.basis is None else self.encoder.basis.solve(x)


@dataclass(frozen=True)
class RawQuantizer(Quantizer):
    """The numbers themselves, rounded to a dtype."""

    dtype: torch.dtype
    name: str = "raw"
    multiple = 1
    basis = None

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        """One plane of the dtype."""
        return (plane(prefix, heads, page_size, dim, self.dtype),)

    def encoder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> RawQuantizer:
        """Itself: rounding needs neither the dimension nor the device."""
        return self

    def encode(self, x: torch.Tensor) -> Arrays:
        """float32 [..., dim] -> the same in the dtype."""
        return (x.to(self.dtype),)

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        """The same as float32."""
        return arrays[0].float()


@dataclass(frozen=True)
class TableQuantizer(Quantizer):
    """One code for each number and one scale for each vector: x ~ table[code] * scale, after a rotation or none.

    name      bits  table                   scale                         rotated
    fp8       8     the values of e4m3      largest number / 448          no
    int8      8     -128 .. 127             largest number / 127          no
    int4      4     -7.5 .. 7.5             largest number / 7.5          no
    rot4      4     the same                the same                      yes
    tq2..tq4  2-4   Lloyd-Max               length / length of the codes  yes     TurboQuant_mse, Zandieh et al. 2025
    """

    name: str
    bits: int
    table: Callable[[int], torch.Tensor]
    """From the dimension to the table."""
    scaling: str
    rotated: bool

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        """Codes uint8, the third bits in a plane of their own, and scales float16."""
        parts = [("codes", 2 if self.bits == 3 else self.bits)] + ([("high", 1)] if self.bits == 3 else [])
        codes = [plane(f"{prefix}_{name}", heads, page_size, dim * n // 8, torch.uint8) for name, n in parts]
        return (*codes, plane(f"{prefix}_scale", heads, page_size, None, torch.float16))

    def encoder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> TableEncoder:
        """The table and the rotation for vectors of `dim` numbers."""
        return TableEncoder(self, dim, device, ops)


class TableEncoder:
    """A TableQuantizer made ready for vectors of one dimension."""

    def __init__(self, quantizer: TableQuantizer, dim: int, device: torch.device, ops: Ops) -> None:
        self.basis = rotation(dim, device, ops) if quantizer.rotated else None
        table = quantizer.table(dim).to(device)
        self.code = CodePlane(0, 0, 0, quantizer.bits, dim, table, quantizer.scaling)

    def code_plane(self, slots: list[PlaneSlot]) -> CodePlane:
        """The place of the codes in a page and their meaning, for the kernels that read them.

        slots   of the planes, in their order
        """
        offset, *high, scale = (slot.offset for slot in slots)
        return replace(self.code, offset=offset, high_offset=high[0] if high else 0, scale_offset=scale)

    def encode(self, x: torch.Tensor) -> Arrays:
        """float32 [..., dim] -> codes uint8, in two arrays where they have three bits, and scales float16 [...]."""
        codes, scale = reference.encode(x if self.basis is None else self.basis.to(x), self.code)
        return *reference.split_codes(codes, self.code.bits), scale

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        """table[code] * scale: float32 [..., dim]."""
        *codes, scale = arrays
        return reference.decode(reference.join_codes(codes, self.code.bits), scale, self.code)
