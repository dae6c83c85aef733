"""The forms in which a weight lies in memory, each with its product.

    tiles    CPU with tile registers, bfloat16 throughout: cpu/tile_linear.py; the bits of a row depend on it alone
    blocks   CPU, float32 activations, weights float32, bfloat16 or float16 in their own width: cpu/linear.py; the bits
             of a row depend on it alone
    onednn   CPU with bfloat16 instructions, bfloat16 throughout: oneDNN's packed product (torch.ops.mkldnn)
    q8       CPU, where asked for, 8 bits a weight (q8.py): the product of tiles, with the bits of the decoded weight in
             bfloat16; without tile registers or bfloat16 that of blocks, with the bits of the decoded weight in float32
    plain    everything else, and every weight of a model with the reference kernels: torch.nn.functional.linear

numba is imported when the first weight is packed into tiles, blocks or q8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of blocks."""
# oneDNN lays out weights for an expected number of rows. For a single row it picks a layout for matrix-vector products,
# so a small batch is requested here and a single row runs as two: from two rows up, the bits of a row stay the same.
_EXPECTED_ROWS = 32


@dataclass(frozen=True)
class PackedLinear:
    """A weight in one of the forms. linear.py makes it and multiplies with it.

    shape              (out, in)
    weight_dtype       of the weight before packing
    activation_dtype   of x and of the result
    packing            the form; None: plain
    data               the weight in that form
    table              a plain copy [out, in] beside it, or None
    refusal            why the preferred form, the first of the list, was not taken; None where it was
    """

    shape: tuple[int, int]
    weight_dtype: torch.dtype
    activation_dtype: torch.dtype
    packing: Form | None
    data: torch.Tensor
    table: torch.Tensor | None = None
    refusal: str | None = None

    @property
    def form(self) -> str:
        """The name of the form."""
        return "plain" if self.packing is None else self.packing.name

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight, the plain copy included. oneDNN's form is counted without its padding."""
        table = 0 if self.table is None else self.table.nbytes
        return table + (self.data.numel() * self.data.element_size())

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] again (q8: decoded) in its own dtype; may share memory with the packed form."""
        return self.data.to(self.weight_dtype) if self.packing is None else self.packing.unpack(self)


class Form(Protocol):
    """How a weight [out, in] is packed, multiplied, read row by row, and unpacked."""

    name: str

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        """Why this CPU does not multiply such a weight in this form, in few words; None where it does."""

    def pack(self, weight: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The packed weight, and with `keep` a plain copy where `embed` needs one."""

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        """As linear.linear."""

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        """As linear.embed."""

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        """The weight [out, in]."""


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions and oneDNN uses them; without them oneDNN emulates, slowly."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.cpu._is_avx512_bf16_supported()
    )


def _no_bfloat16(weight_dtype: torch.dtype, activation_dtype: torch.dtype) -> str | None:
    """Why this CPU does not multiply in bfloat16 throughout; None where it does."""
    if weight_dtype != torch.bfloat16:
        return f"{_name(weight_dtype)} weights"
    if not multiplies_bfloat16():
        has_onednn = torch.backends.mkldnn.is_available()
        return "the CPU has no bfloat16 instructions" if has_onednn else "this build of torch has no oneDNN"
    return None if activation_dtype == torch.bfloat16 else f"{_name(activation_dtype)} activations"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def block_kernels() -> ModuleType:
    """The kernels of the form "blocks", which import numba."""
    from nanokv.kernels.cpu import linear

    return linear


@cache
def _tile_kernels() -> ModuleType:
    from nanokv.kernels.cpu import tile_linear

    return tile_linear


@cache
def _q8_groups() -> ModuleType:
    from nanokv.kernels.cpu import q8_groups

    return q8_groups


def _no_tiles() -> str | None:
    """Why products in bfloat16 do not run on tile registers; None where they do."""
    amx = _tile_kernels().amx
    if amx.has_tiles():
        return None
    return "the system does not grant AMX" if amx.cpu_has_tiles() else "the CPU has no AMX"


class Tiles:
    name = "tiles"

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        width, refused = weight.shape[1], _no_bfloat16(weight.dtype, activation_dtype)
        if refused is not None:
            return refused
        if width % 32:
            return f"width {width} is no multiple of 32"
        return _no_tiles()

    def pack(self, weight: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _tile_kernels().pack(weight), None

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        return _tile_kernels().multiply(x, packed.data, packed.shape[0], bias)

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        return _tile_kernels().embed(packed.data, ids)

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        return _tile_kernels().unpack(packed.data, packed.shape[0])


class Blocks:
    name = "blocks"

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        if activation_dtype == torch.float32 and weight.dtype in FORMATS:
            return None
        return f"{_name(weight.dtype)} weights and {_name(activation_dtype)} activations"

    def pack(self, weight: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return block_kernels().pack(weight), None

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        y = block_kernels().multiply(x, packed.data, packed.shape[0])
        return y if bias is None else y.add_(bias)

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        return block_kernels().embed(packed.data, ids)

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        return block_kernels().unpack(packed.data, packed.shape[0])


class OneDNN:
    name = "onednn"

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        return _no_bfloat16(weight.dtype, activation_dtype)

    def pack(self, weight: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
        return data, weight.clone() if keep else None

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty((0, packed.shape[0]))
        rows_of_x = x.expand(2, -1).contiguous() if rows == 1 else x.contiguous()
        y = torch.ops.mkldnn._linear_pointwise(rows_of_x, packed.data, bias, "none", [], "")
        return y if rows > 1 else y[:1]

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        if packed.table is None:
            raise ValueError("embed: the weight was packed without keep=True, and oneDNN's form hides its rows")
        return F.embedding(ids, packed.table)

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        return packed.data.to_dense() if packed.table is None else packed.table


class Q8:
    """On AMX tiles where `tiled`; else in float32, whatever the activations are."""

    name = "q8"

    def __init__(self, tiled: bool) -> None:
        self.tiled = tiled

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        if not self.tiled:
            return None
        return _no_tiles() if activation_dtype == torch.bfloat16 else f"{_name(activation_dtype)} activations"

    def pack(self, weight: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _q8_groups().pack(weight), None

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        if self.tiled:
            return _tile_kernels().multiply(x, packed.data, packed.shape[0], bias)
        y = block_kernels().multiply(x.float(), packed.data, packed.shape[0])
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        return _q8_groups().embed(packed.data, ids).to(packed.activation_dtype)

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        return _q8_groups().unpack(packed.data, packed.shape[0]).to(packed.weight_dtype)


CPU_FORMS: tuple[Form, ...] = (Tiles(), Blocks(), OneDNN())
"""In order of preference."""
Q8_FORMS: tuple[Form, ...] = (Q8(tiled=True), Q8(tiled=False))
"""The same, where 8 bits are asked for."""
