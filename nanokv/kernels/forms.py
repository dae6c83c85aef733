"""The forms in which a weight lies in memory, each with its product.

    tiles    CPU with tile registers, bfloat16 throughout: cpu/tile_linear.py; the bits of a row depend on it alone
    blocks   CPU, float32 activations, weights float32, bfloat16 or float16 in their own width: cpu/linear.py; the bits
             of a row depend on it alone
    pairs    CPU with bfloat16 instructions, bfloat16 throughout: cpu/linear.py; the bits of a row depend on it alone
    q8       CPU, where asked for, 8 bits a weight (q8.py): the product of tiles, with the bits of the decoded weight in
             bfloat16; without tile registers or bfloat16 that of blocks, with the bits of the decoded weight in float32
    plain    everything else, and every weight of a model with the reference kernels: torch.nn.functional.linear

numba is imported when the first weight is packed into another form than plain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of blocks."""


@dataclass(frozen=True)
class PackedLinear:
    """A weight in one of the forms. linear.py makes it and multiplies with it.

    shape              (out, in)
    weight_dtype       of the weight before packing
    activation_dtype   of x and of the result
    packing            the form; None: plain
    data               the weight in that form
    refusal            why the preferred form, the first of the list, was not taken; None where it was
    """

    shape: tuple[int, int]
    weight_dtype: torch.dtype
    activation_dtype: torch.dtype
    packing: Form | None
    data: torch.Tensor
    refusal: str | None = None

    @property
    def form(self) -> str:
        """The name of the form."""
        return "plain" if self.packing is None else self.packing.name

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight in its form."""
        return self.data.nbytes

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] again (q8: decoded) in its own dtype; may share memory with the packed form."""
        return self.data.to(self.weight_dtype) if self.packing is None else self.packing.unpack(self)


class Form(Protocol):
    """How a weight [out, in] is packed, multiplied, read row by row, and unpacked."""

    name: str

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        """Why this CPU does not multiply such a weight in this form, in few words; None where it does."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The packed weight."""

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        """As linear.linear."""

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        """As linear.embed."""

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        """The weight [out, in]."""


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions."""
    return torch.cpu._is_avx512_bf16_supported()


def _no_bfloat16(weight_dtype: torch.dtype, activation_dtype: torch.dtype) -> str | None:
    """Why this CPU does not multiply in bfloat16 throughout; None where it does."""
    if weight_dtype != torch.bfloat16:
        return f"{_name(weight_dtype)} weights"
    if not multiplies_bfloat16():
        return "the CPU has no bfloat16 instructions"
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

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return _tile_kernels().pack(weight)

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

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return block_kernels().pack(weight)

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        y = block_kernels().multiply(x, packed.data, packed.shape[0])
        return y if bias is None else y.add_(bias)

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        return block_kernels().embed(packed.data, ids)

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        return block_kernels().unpack(packed.data, packed.shape[0])


class Pairs:
    name = "pairs"

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        odd = f"width {weight.shape[1]} is odd" if weight.shape[1] % 2 else None
        return _no_bfloat16(weight.dtype, activation_dtype) or odd

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return _tile_kernels().pack(weight)

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        return block_kernels().multiply_pairs(x, packed.data, packed.shape[0], bias)

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        return _tile_kernels().embed(packed.data, ids)

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        return _tile_kernels().unpack(packed.data, packed.shape[0])


class Q8:
    """On AMX tiles where `tiled`; else in float32, whatever the activations are."""

    name = "q8"

    def __init__(self, tiled: bool) -> None:
        self.tiled = tiled

    def refusal(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> str | None:
        if not self.tiled:
            return None
        if activation_dtype != torch.bfloat16:
            return f"{_name(activation_dtype)} activations"
        return _no_tiles() or (None if _q8_groups().permutes_bytes() else "the CPU has no AVX-512 VBMI")

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return _q8_groups().pack(weight)

    def multiply(self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        if self.tiled:
            return _tile_kernels().multiply(x, packed.data, packed.shape[0], bias)
        y = block_kernels().multiply(x.float(), packed.data, packed.shape[0])
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def embed(self, packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
        return _q8_groups().embed(packed.data, ids).to(packed.activation_dtype)

    def unpack(self, packed: PackedLinear) -> torch.Tensor:
        return _q8_groups().unpack(packed.data, packed.shape[0]).to(packed.weight_dtype)


CPU_FORMS: tuple[Form, ...] = (Tiles(), Blocks(), Pairs())
"""In order of preference."""
Q8_FORMS: tuple[Form, ...] = (Q8(tiled=True), Q8(tiled=False))
"""The same, where 8 bits are asked for."""
