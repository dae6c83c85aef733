"""Products with weights: a weight is packed once for its device and multiplied with any number of rows.

The device selects one of three forms:

    blocks   CPU, float32 activations, weights float32, bfloat16 or float16: the numba loop of cpu/linear.py. Weights
             keep their width; the bits of a row depend on that row alone
    onednn   CPU with bfloat16 instructions, bfloat16 throughout: oneDNN's packed product (torch.ops.mkldnn)
    plain    everything else, and every weight of a model with the reference kernels: torch.nn.functional.linear

Knows neither layers nor models. numba is imported when the first weight is packed into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F

# oneDNN lays out weights for an expected number of rows. For a single row it picks a layout for matrix-vector products,
# so a small batch is requested here and a single row runs as two: from two rows up, the bits of a row stay the same.
_EXPECTED_ROWS = 32
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes of blocks


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions and oneDNN uses them; without them oneDNN emulates, slowly."""
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
    """The dtype of activations: the weights' own where the device multiplies it natively, else float32."""
    if torch.device(device).type != "cpu" or weight_dtype not in (torch.bfloat16, torch.float16):
        return weight_dtype
    return torch.bfloat16 if weight_dtype == torch.bfloat16 and _multiplies_bfloat16() else torch.float32


@dataclass(frozen=True)
class PackedLinear:
    """A weight in one of the three forms. `pack_linear` makes it, `linear` and `embed` use it.

    shape              (out, in)
    weight_dtype       of the weight before packing
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
        """Bytes of the weight, the plain copy included. oneDNN's form is counted without its padding."""
        table = 0 if self.table is None else self.table.nbytes
        return table + (self.data.numel() * self.data.element_size())

    def unpack(self) -> torch.Tensor:
        """The weight [out, in] again, in its own dtype; may share memory with the packed form."""
        if self.form == "blocks":
            return _blocks().unpack(self.data, self.shape[0])
        if self.form == "onednn":
            return self.data.to_dense() if self.table is None else self.table
        return self.data.to(self.weight_dtype)


def pack_linear(
    weight: torch.Tensor, activation_dtype: torch.dtype, keep: bool = False, plain: bool = False
) -> PackedLinear:
    """Packs a weight for its device.

    weight             [out, in], float; the form "plain" may share its memory
    activation_dtype   of x, see `activation_dtype`
    keep               `embed` reads its rows too: a table that the output layer shares is then held once in the forms
                       blocks and plain, twice in oneDNN's
    plain              takes the form "plain" on every device
    """
    weight = weight.detach()
    (out, width), dtype, may_pack = weight.shape, weight.dtype, weight.device.type == "cpu" and not plain
    if may_pack and activation_dtype == torch.float32 and dtype in _FORMATS:
        return PackedLinear((out, width), dtype, activation_dtype, "blocks", _blocks().pack(weight))
    if may_pack and activation_dtype == dtype == torch.bfloat16 and _multiplies_bfloat16():
        return _pack_onednn(weight, keep)
    return PackedLinear((out, width), dtype, activation_dtype, "plain", weight.to(activation_dtype).contiguous())


def _pack_onednn(weight: torch.Tensor, keep: bool) -> PackedLinear:
    data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
    (out, width), table = weight.shape, weight.clone() if keep else None
    return PackedLinear((out, width), weight.dtype, weight.dtype, "onednn", data, table)


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias.

    x        [rows, in], activation dtype; any number of rows, including 0
    bias     [out], activation dtype, or None
    Returns  [rows, out], activation dtype, a new contiguous tensor
    Raises   TypeError for an x of another width or dtype in the form "blocks"; torch raises for the other forms
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
    """Rows `ids` of a packed weight: an embedding table that the output layer shares.

    ids      int64 [rows], 0 <= id < out
    Returns  [rows, in], activation dtype, a new tensor
    Raises   ValueError for a weight in oneDNN's form that was packed without `keep`
    """
    if packed.form == "blocks":
        return _blocks().embed(packed.data, ids)
    table = packed.table if packed.form == "onednn" else packed.data
    if table is None:
        raise ValueError("embed: the weight was packed without keep=True, and oneDNN's form hides its rows")
    return F.embedding(ids, table)


@dataclass(frozen=True)
class PackedHeadLinear:
    """One weight a head: on a CPU in the form "blocks" for all activations, else "plain".

    shape              (heads, out, in)
    activation_dtype   of x and of the result
    form               "blocks" or "plain"
    data               the weights in that form
    """

    shape: tuple[int, int, int]
    activation_dtype: torch.dtype
    form: str
    data: torch.Tensor


def pack_head_linear(weight: torch.Tensor, activation_dtype: torch.dtype, plain: bool = False) -> PackedHeadLinear:
    """Packs weights [heads, out, in], one for each head, for `head_linear`.

    plain   takes the form "plain" on every device
    """
    weight, (heads, out, width) = weight.detach(), weight.shape
    shape = heads, out, width
    may_pack = weight.device.type == "cpu" and not plain
    if may_pack and weight.dtype in _FORMATS and activation_dtype in _FORMATS:
        return PackedHeadLinear(shape, activation_dtype, "blocks", _blocks().pack_heads(weight))
    return PackedHeadLinear(shape, activation_dtype, "plain", weight.to(activation_dtype).contiguous())


def head_linear(x: torch.Tensor, packed: PackedHeadLinear) -> torch.Tensor:
    """y[r, h] = weight[h] @ x[r, h]: the absorption of MLA, for queries and for results.

    x        [rows, heads, in], activation dtype; may be a view with any strides of rows and heads
    Returns  [rows, heads, out], activation dtype, contiguous; in the form "blocks" summed in float32, and the bits of
             a row do not depend on other rows
    Raises   TypeError for an x of another dtype
    Source   DeepSeek-AI 2024 (DeepSeek-V2)
    """
    if x.dtype is not packed.activation_dtype:
        raise TypeError(f"head_linear: x is {x.dtype}, expected {packed.activation_dtype}")
    if packed.form == "blocks":
        return _blocks().multiply_heads(x.float(), packed.data, packed.shape[1]).to(x.dtype)
    return (x.transpose(0, 1) @ packed.data.transpose(1, 2)).transpose(0, 1).contiguous()


@cache
def row_invariant(dtype: torch.dtype, device: torch.device | str, plain: bool = False) -> bool:
    """Whether the bits of a row of `linear` are independent of the other rows: measured once in a process.

    oneDNN's form counts as dependent: its kernels differ with the number of rows, for some shapes and threads.

    dtype    of the weights; activations take `activation_dtype(device, dtype)`
    plain    as of `pack_linear`
    """
    device = torch.device(device)
    noise = torch.Generator().manual_seed(0)
    activation = activation_dtype(device, dtype)
    for out, width in ((200, 576), (64, 1536)):
        packed = pack_linear(torch.randn(out, width, generator=noise).to(device, dtype), activation, plain=plain)
        if packed.form == "onednn":
            return False
        x = torch.randn(130, width, generator=noise).to(device, activation)
        together = linear(x, packed)
        for start, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 17), (17, 33), (33, 66), (66, 130), (5, 130)):
            if not torch.equal(linear(x[start:end], packed), together[start:end]):
                return False
    return True
