"""Linear layers: a weight packed once into the form its device multiplies fastest, then used for any number of rows.

Three forms, chosen by what the device can do:

    blocks   CPU, float32 activations, weights float32, bfloat16 or float16: our own loop (cpu/linear.py). Weights stay
             as wide as they were; bits of a row depend on that row alone.
    onednn   CPU with bfloat16 instructions, bfloat16 throughout: oneDNN's packed product (torch.ops.mkldnn).
    plain    everything else, GPUs first: torch.nn.functional.linear.

Knows nothing of layers or models. numba is imported when the first blocks are packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F

# oneDNN lays out weights for an expected number of rows. A single row would get a layout made for matrix-vector
# products, so we ask for a small batch, and run a single row as two: from two rows up, a row's bits stay the same.
_EXPECTED_ROWS = 32
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)  # what blocks hold


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions and oneDNN uses them; oneDNN alone would also emulate them."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and torch.cpu._is_avx512_bf16_supported()
    )


@cache
def _blocks() -> ModuleType:
    from nanokv.kernels.cpu import linear

    return linear


def activation_dtype(device: torch.device | str, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations: that of the weights where the device multiplies it natively, else float32."""
    if torch.device(device).type != "cpu" or weight_dtype not in (torch.bfloat16, torch.float16):
        return weight_dtype
    return torch.bfloat16 if weight_dtype == torch.bfloat16 and _multiplies_bfloat16() else torch.float32


@dataclass(frozen=True)
class PackedLinear:
    """A weight in one of the three forms. Made by `pack_linear`, used by `linear` and `embed`.

    shape              (out, in)
    weight_dtype       of the weight that was packed
    activation_dtype   of x and of the result
    form               "blocks", "onednn" or "plain"
    data               the weight in that form
    table              a plain copy [out, in] beside it, or None
    """

    shape: tuple[int, int]
    weight_dtype: torch.dtype
    activation_dtype: torch.dtype
    form: str
    data: torch.Tensor
    table: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the weight takes, the plain copy included. oneDNN's form is counted without its padding."""
        table = 0 if self.table is None else self.table.nbytes
        return table + (self.data.numel() * self.data.element_size())

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] again, in its own dtype; a copy unless it was kept."""
        if self.form == "blocks":
            return _blocks().unpack(self.data, self.shape[0])
        if self.form == "onednn":
            return self.data.to_dense() if self.table is None else self.table
        return self.data


def pack_linear(weight: torch.Tensor, activation_dtype: torch.dtype, keep: bool = False) -> PackedLinear:
    """Pack a weight for its device.

    weight             [out, in], float; not referred to afterwards, unless the form is plain
    activation_dtype   of the x to come, see `activation_dtype`
    keep               its rows are wanted too (`embed`): a table that the output layer shares is then held once where
                       the form allows (blocks, plain), twice for oneDNN
    """
    weight = weight.detach()
    shape, dtype, on_cpu = tuple(weight.shape), weight.dtype, weight.device.type == "cpu"
    if on_cpu and activation_dtype == torch.float32 and dtype in _FORMATS:
        return PackedLinear(shape, dtype, activation_dtype, "blocks", _blocks().pack(weight))
    if on_cpu and activation_dtype == dtype == torch.bfloat16 and _multiplies_bfloat16():
        return _pack_onednn(weight, keep)
    return PackedLinear(shape, dtype, activation_dtype, "plain", weight.to(activation_dtype).contiguous())


def _pack_onednn(weight: torch.Tensor, keep: bool) -> PackedLinear:
    data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
    table = weight.clone() if keep else None
    return PackedLinear(tuple(weight.shape), weight.dtype, weight.dtype, "onednn", data, table)


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias.

    x        [rows, in], activation dtype; any number of rows, 0 too
    bias     [out], activation dtype, or None
    Returns  [rows, out], activation dtype, a new contiguous tensor
    Raises   TypeError where x does not fit
    """
    if packed.form == "blocks":
        y = _blocks().multiply(x, packed.data, packed.shape[0])
        return y if bias is None else y.add_(bias)
    if packed.form == "onednn":
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty((0, packed.shape[0]))
        rows_of_x = x.expand(2, -1).contiguous() if rows == 1 else x.contiguous()
        y = torch.ops.mkldnn._linear_pointwise(rows_of_x, packed.data, bias, "none", [], "")
        return y if rows > 1 else y[:1]
    return F.linear(x, packed.data, bias)


def embed(packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` of a packed weight: the embedding table that an output layer shares.

    ids      int64 [rows], 0 <= id < out
    Returns  [rows, in], activation dtype, a new tensor
    Raises   ValueError where the form hides its rows and the weight was packed without `keep`
    """
    if packed.form == "blocks":
        return _blocks().embed(packed.data, ids)
    table = packed.table if packed.form == "onednn" else packed.data
    if table is None:
        raise ValueError("embed: the weight was packed without keep=True, and oneDNN's form hides its rows")
    return F.embedding(ids, table)


@dataclass(frozen=True)
class PackedHeadLinear:
    """A weight for each head, on a CPU in the form "blocks" whatever the activations are, else "plain".

    shape              (heads, out, in)
    activation_dtype   of x and of the result
    form               "blocks" or "plain"
    data               the weights in that form
    """

    shape: tuple[int, int, int]
    activation_dtype: torch.dtype
    form: str
    data: torch.Tensor


def pack_head_linear(weight: torch.Tensor, activation_dtype: torch.dtype) -> PackedHeadLinear:
    """Pack the weights [heads, out, in] of a product that each head has of its own; see `head_linear`."""
    weight, shape = weight.detach(), tuple(weight.shape)
    if weight.device.type == "cpu" and weight.dtype in _FORMATS and activation_dtype in _FORMATS:
        return PackedHeadLinear(shape, activation_dtype, "blocks", _blocks().pack_heads(weight))
    return PackedHeadLinear(shape, activation_dtype, "plain", weight.to(activation_dtype).contiguous())


def head_linear(x: torch.Tensor, packed: PackedHeadLinear) -> torch.Tensor:
    """y[r, h] = weight[h] @ x[r, h]: what MLA's absorption does to queries and to results, head by head.

    x        [rows, heads, in], activation dtype; may be a view whose rows and heads lie any distance apart
    Returns  [rows, heads, out], activation dtype, contiguous; in the form blocks summed in float32, the bits of a row
             independent of the other rows
    Raises   TypeError where x does not fit
    Source   DeepSeek-AI 2024 (DeepSeek-V2)
    """
    if x.dtype is not packed.activation_dtype:
        raise TypeError(f"head_linear: x is {x.dtype}, expected {packed.activation_dtype}")
    if packed.form == "blocks":
        return _blocks().multiply_heads(x.float(), packed.data, packed.shape[1]).to(x.dtype)
    return (x.transpose(0, 1) @ packed.data.transpose(1, 2)).transpose(0, 1).contiguous()


@cache
def row_invariant(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether a row of `linear` has the same bits whatever the other rows are: measured, once per process.

    dtype    of the weights; activations take `activation_dtype(device, dtype)`
    """
    device = torch.device(device)
    noise = torch.Generator().manual_seed(0)
    activation = activation_dtype(device, dtype)
    for out, width in ((200, 576), (64, 1536)):
        packed = pack_linear(torch.randn(out, width, generator=noise).to(device, dtype), activation)
        x = torch.randn(130, width, generator=noise).to(device, activation)
        together = linear(x, packed)
        for start, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 17), (17, 33), (33, 66), (66, 130), (5, 130)):
            if not torch.equal(linear(x[start:end], packed), together[start:end]):
                return False
    return True
