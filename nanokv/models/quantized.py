"""Quantised matrices of a checkpoint, decoded while they are read. Knows FP8 and NVFP4, no family.

A quantised matrix is a tensor of codes with tensors of scales beside it. Their names and dtypes tell the layout:

    x.weight         F8_E4M3 [out, in]    x.weight_scale_inv                        block FP8 of DeepSeek and Qwen
    x.weight         F8_E4M3 [out, in]    x.weight_scale                            FP8 of compressed-tensors, ModelOpt
    x.weight         U8 [out, in / 2]     x.weight_scale, x.weight_scale_2          NVFP4 of ModelOpt
    x.weight_packed  U8 [out, in / 2]     x.weight_scale, x.weight_global_scale     NVFP4 of compressed-tensors

A number is code * scale. One scale belongs to a block of rows and columns, to a row, or to the tensor; NVFP4 has one
(F8_E4M3) for 16 neighbours in a row, multiplied by weight_scale_2 or divided by weight_global_scale. Its codes are two
to a byte, the even column in the low half. A matrix without scales beside it is stored plainly, so modules that the
config excludes need no list. Scales of activations and of a quantised KV cache are not read: here both keep the dtype
of the engine.

The codes of a GGUF file (hub/home.py:Q8_FILE) are x.weight I8 [out, in] and x.weight_scale F16 [out, in / 32].

Sources: README_WEIGHTS of DeepSeek-V3; the documentation of NVIDIA ModelOpt and NeMo AutoModel (NVFP4), and of
compressed-tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from nanokv.core.errors import CheckpointError
from nanokv.kernels.q8 import GROUP
from nanokv.models.quantized_fields import Quantization

DECODED = ("fp8", "nvfp4", "fbgemm_fp8", "w4a16_nvfp4", "mixed_precision", "mixed-precision")
"""Methods whose matrices may be decoded. The mixed ones choose a format for each matrix, and its tensors tell which."""
NOT_WEIGHTS = re.compile(
    r"\.(input_scale|input_scale_ub|input_global_scale|activation_scale|output_scale|([qkv]|kv|prob_output)_scale)$"
)
"""Scales of activations, and of keys and values in a quantised cache."""
SUFFIXES = ("_scale_inv", "_scale", "_scale_2", "_global_scale")
"""What the name of a weight gets in the names of its scales."""
SCALES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E8M0")
"""Dtypes of scales, as safetensors names them."""
CHUNK = 1 << 22
"""Numbers that are decoded at a time: float32 copies of them are all that decoding holds beside its result."""
NIBBLE = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""E2M1: the number of each 4-bit code."""
PAIRS = torch.stack([NIBBLE.repeat(16), NIBBLE.repeat_interleave(16)], dim=1)
"""float32 [256, 2]: both numbers of a byte, the low half first."""


class Source(Protocol):
    """A tensor of a checkpoint that can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str:
        """As safetensors names it, such as "BF16"."""

    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Quantized:
    """A matrix of codes and its scales.

    name     of the matrix, for errors
    codes    F8_E4M3 [out, in], or U8 [out, in / 2]
    scale    [ceil(out / rows), ceil(in / columns)] for `block` = (rows, columns); any shape of as many numbers
    second   one float32 that the scales are multiplied by, or divided by where `divide`; None: 1
    target   dtype of the decoded numbers
    """

    name: str
    codes: Source
    scale: Source
    block: tuple[int, int]
    target: torch.dtype
    second: Source | None = None
    divide: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] of the decoded matrix."""
        rows, columns = self.codes.shape
        return (rows, columns * 2) if self.codes.dtype == "U8" else (rows, columns)

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(-(-size // block) for size, block in zip(self.shape, self.block, strict=True))

    @property
    def dtype(self) -> str:
        """As safetensors names it. The decoded numbers have a supported one."""
        return {torch.bfloat16: "BF16", torch.float16: "F16"}.get(self.target, "F32")

    def read(self) -> torch.Tensor:
        """The decoded matrix. Raises CheckpointError where a scale is not finite."""
        scales = self._scales()
        codes, (rows, columns) = self.codes.read(), self.shape
        decoded = torch.empty((rows, columns), dtype=self.target)
        step = max(1, CHUNK // max(1, columns))
        for start in range(0, rows, step):
            part = codes[start : start + step]
            numbers = PAIRS[part.int()].flatten(1) if part.dtype == torch.uint8 else part.float()
            own = scales[torch.arange(start, start + len(part)) // self.block[0]]
            if own.shape[1] > 1:
                own = own.repeat_interleave(self.block[1], dim=1)[:, :columns]
            decoded[start : start + step] = numbers.mul_(own)
        return decoded

    def _scales(self) -> torch.Tensor:
        """float32, of the shape of `grid`."""
        scales = self.scale.read().float()
        if self.second is not None:
            factor = self.second.read().float().reshape(())
            scales = scales / factor if self.divide else scales * factor
        if not scales.isfinite().all():
            raise CheckpointError(f"{self.name}: a scale of this quantised tensor is not a finite number")
        return scales.reshape(self.grid)


def pair(
    tensors: dict[str, Source], how: Quantization, target: torch.dtype
) -> tuple[dict[str, Source], dict[str, str]]:
    """Joins the codes and the scales of every quantised matrix.

    tensors   of a checkpoint by name
    how       as the config describes it
    target    dtype of the decoded numbers
    Returns   the tensors, each quantised matrix under the name of its weight, without the scales; and name -> complaint
              of each matrix whose scales are missing or misshapen, which is not among the tensors
    """
    joined = {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.search(name)}
    complaints = {}
    for name, codes in tensors.items():
        weight = name.removesuffix("_packed") if name.endswith(".weight_packed") else name
        if not weight.endswith(".weight") or codes.dtype not in ("F8_E4M3", "U8"):
            continue
        for part in (name, *(weight + suffix for suffix in SUFFIXES)):
            joined.pop(part, None)
        try:
            joined[weight] = _matrix(tensors, weight, name, how, target)
        except CheckpointError as error:
            complaints[weight] = f"{name} {error}"
    return joined, complaints


def q8_matrices(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """The matrices of codes I8 [out, in] with scales F16 [out, in / 32] beside them, which decode to float32, exactly.

    tensors   all of a file, by name
    Raises    CheckpointError naming a tensor that is neither
    """
    found: dict[str, Source] = {}
    for name in (name for name in tensors if not name.endswith("_scale")):
        codes, scale = tensors[name], tensors.get(f"{name}_scale")
        whole = codes.dtype == "I8" and len(codes.shape) == 2 and not codes.shape[1] % GROUP
        expected = (codes.shape[0], codes.shape[1] // GROUP) if whole else ()
        if not whole or scale is None or (scale.dtype, scale.shape) != ("F16", expected):
            raise CheckpointError(f"{name[:80]!r}: expected codes I8 [out, in] with scales F16 [out, in / {GROUP}]")
        found[name] = Quantized(name, codes, scale, (1, GROUP), torch.float32)
    return found


def _matrix(tensors: dict[str, Source], weight: str, name: str, how: Quantization, target: torch.dtype) -> Quantized:
    """The matrix whose codes have this name. Raises CheckpointError where its scales are missing or misshapen."""
    codes, nvfp4 = tensors[name], tensors[name].dtype == "U8"
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise CheckpointError(f"is {codes.dtype} {list(codes.shape)}; only matrices are decoded")
    if weight != name and weight in tensors:
        raise CheckpointError("is also stored plainly")
    if nvfp4:
        names = [f"{weight}_scale", f"{weight}_scale_2" if weight == name else f"{weight}_global_scale"]
    else:
        names = [f"{weight}_scale_inv" if f"{weight}_scale_inv" in tensors else f"{weight}_scale"]
    if sum(weight + suffix in tensors for suffix in SUFFIXES) > len(names):
        raise CheckpointError("has more scales than its format")
    for each in names:
        if each not in tensors:
            raise CheckpointError(f"is {codes.dtype} without {each[len(weight) - len('weight') :]}")
    scale, second = tensors[names[0]], tensors[names[1]] if nvfp4 else None
    if nvfp4:
        block = (1, 16)
        if scale.dtype != "F8_E4M3" or how.group_size not in (None, 16):
            raise CheckpointError("is not NVFP4: it has no F8_E4M3 scale for 16 numbers")
    else:
        rows, columns = codes.shape
        block = how.block or ((rows, columns) if math.prod(scale.shape) == 1 else (1, columns))
    matrix = Quantized(weight, codes, scale, block, target, second, divide=nvfp4 and weight != name)
    for part, expected in ((scale, matrix.grid), (second, (1,))):
        if part is not None and (part.dtype not in SCALES or _squeezed(part.shape) != _squeezed(expected)):
            found = f"{part.dtype} {list(part.shape)}"
            raise CheckpointError(f"has scales {found}; expected floating point {list(expected)}")
    return matrix


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    """Without ones: [out, 1] and [out] are alike, so are [rows, 1, columns, 1] and [rows, columns], and [] and [1]."""
    return [size for size in shape if size != 1]
