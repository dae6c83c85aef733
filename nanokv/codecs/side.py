"""Side: how the vectors of one side of attention, keys or values, become planes of a page. Knows no layers.

A side is a recipe (a name and numbers); its coder is the recipe made ready for a dimension and a device:

    x [..., dim] --encode--> one array for each plane --decode--> s [..., width],  x ~ basis.back(s)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from nanokv.codecs.basis import Basis, rotation
from nanokv.core.spec import PageLayout, Plane, PlaneSlot
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import CodePlane

Arrays = tuple[torch.Tensor, ...]


class Coder(Protocol):
    """A side, ready for vectors of one dimension. Rows do not depend on each other, to the last bit."""

    basis: Basis | None
    """None: the numbers stand as they are."""

    def encode(self, x: torch.Tensor) -> Arrays:
        """float32 [..., dim] -> what goes into the planes, in their order: [..., width of the plane] each."""
        ...

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        """The numbers s again: float32 [..., width]."""
        ...


class Side(Protocol):
    name: str
    is_sketch: bool
    """Good for products with it only, and not as a value."""
    multiple: int
    """Of which the dimension of its vectors must be a multiple."""

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]: ...

    def coder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> Coder: ...


def plane(name: str, heads: int, page_size: int, width: int | None, dtype: torch.dtype) -> Plane:
    """A plane [heads, page_size, width], or [heads, page_size] where there is one number a token."""
    shape = (heads, page_size) if width is None else (heads, page_size, width)
    return Plane(name, shape, dtype, token_axis=1)


def array_of(memory: torch.Tensor, slot: PlaneSlot) -> torch.Tensor:
    """One plane of all pages (or of all states): a view [pages, *shape] of uint8 [pages, bytes]."""
    numbers, size = memory.view(slot.plane.dtype), slot.plane.dtype.itemsize
    strides = torch.empty(slot.plane.shape, device="meta").stride()
    return numbers.as_strided(
        (memory.shape[0], *slot.plane.shape),
        (memory.stride(0) // size, *strides),
        numbers.storage_offset() + slot.offset // size,
    )


class SidePages:
    """One side of one layer, where it lies in pages.

    heads, dim   of the vectors
    """

    def __init__(
        self,
        side: Side,
        prefix: str,
        layout: PageLayout,
        layer: int,
        heads: int,
        dim: int,
        device: torch.device,
        ops: Ops,
    ) -> None:
        self.coder = side.coder(dim, device, ops)
        planes = side.planes(prefix, heads, dim, layout.page_size)
        self.slots = [layout.paged(layer, plane.name) for plane in planes]

    def write(self, x: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
        """x float32 [rows, heads, dim]: row i to page pages[i], slot slots[i]."""
        for slot, numbers in zip(self.slots, self.coder.encode(x), strict=True):
            array_of(pool, slot)[pages, :, slots] = numbers

    def read(self, pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """The decoded numbers of whole pages: float32 [pages, heads, page_size, width]."""
        return self.coder.decode(*(array_of(pool, slot)[pages] for slot in self.slots))

    def to(self, x: torch.Tensor) -> torch.Tensor:
        """Queries as keys of this side want them."""
        return x if self.coder.basis is None else self.coder.basis.to(x)

    def back(self, s: torch.Tensor) -> torch.Tensor:
        """Sums of decoded numbers, as the vectors they stand for."""
        return s if self.coder.basis is None else self.coder.basis.back(s)

    def exactly(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers that stand for x without any loss."""
        return x if self.coder.basis is None else self.coder.basis.exactly(x)


@dataclass(frozen=True)
class RawSide:
    """The numbers themselves, rounded to a dtype."""

    dtype: torch.dtype
    name: str = "raw"
    is_sketch: bool = False
    multiple: int = 1

    @property
    def basis(self) -> None:
        return None

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        return (plane(prefix, heads, page_size, dim, self.dtype),)

    def coder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> RawSide:
        return self

    def encode(self, x: torch.Tensor) -> Arrays:
        return (x.to(self.dtype),)

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        return arrays[0].float()


@dataclass(frozen=True)
class TableSide:
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
    is_sketch: bool = False
    multiple: int = 16

    def planes(self, prefix: str, heads: int, dim: int, page_size: int) -> tuple[Plane, ...]:
        parts = [("codes", 2 if self.bits == 3 else self.bits)] + ([("high", 1)] if self.bits == 3 else [])
        codes = [plane(f"{prefix}_{name}", heads, page_size, dim * n // 8, torch.uint8) for name, n in parts]
        return (*codes, plane(f"{prefix}_scale", heads, page_size, None, torch.float16))

    def coder(self, dim: int, device: torch.device, ops: Ops = AUTO) -> TableCoder:
        return TableCoder(self, dim, device, ops)


class TableCoder:
    def __init__(self, side: TableSide, dim: int, device: torch.device, ops: Ops) -> None:
        self.basis = rotation(dim, device, ops) if side.rotated else None
        self.code = CodePlane(0, 0, 0, side.bits, dim, side.table(dim).to(device), side.scaling)

    def placed(self, slots: list[PlaneSlot]) -> CodePlane:
        """Where the planes lie in a page: what kernels that read codes need."""
        offset, *high, scale = (slot.offset for slot in slots)
        return replace(self.code, offset=offset, high_offset=high[0] if high else 0, scale_offset=scale)

    def encode(self, x: torch.Tensor) -> Arrays:
        codes, scale = reference.encode(x if self.basis is None else self.basis.to(x), self.code)
        return *reference.split_codes(codes, self.code.bits), scale

    def decode(self, *arrays: torch.Tensor) -> torch.Tensor:
        *codes, scale = arrays
        return reference.decode(reference.join_codes(codes, self.code.bits), scale, self.code)
