"""Products with weights: a weight is packed once for its device and multiplied with any number of rows.

On a CPU the dtypes and the instructions select one of the forms of forms.py; everywhere else, and with the reference
kernels, a weight stays as it is: the form "plain". Knows neither layers nor models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from nanokv.kernels.forms import CPU_FORMS, FORMATS, Q8_FORMS, PackedLinear, block_kernels, multiplies_bfloat16
from nanokv.kernels.q8 import GROUP, dequantise, quantise


def activation_dtype(device: torch.device | str, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations: the weights' own where the device multiplies it natively, else float32."""
    if torch.device(device).type != "cpu" or weight_dtype not in (torch.bfloat16, torch.float16):
        return weight_dtype
    return torch.bfloat16 if weight_dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def pack_linear(
    weight: torch.Tensor, activation_dtype: torch.dtype, plain: bool = False, q8: bool = False
) -> PackedLinear:
    """Packs a weight for its device.

    weight             [out, in], float; the form "plain" may share its memory
    activation_dtype   of x, see `activation_dtype`
    plain              takes the form "plain" on every device
    q8                 8 bits for a weight, whose `in` is a multiple of 32: the form "q8", or "plain" with the decoded
                       numbers
    """
    weight = weight.detach()
    shape, dtype = (weight.shape[0], weight.shape[1]), weight.dtype
    first = None
    for form in (Q8_FORMS if q8 else CPU_FORMS) if weight.device.type == "cpu" and not plain else ():
        refusal = form.refusal(weight, activation_dtype)
        if refusal is None:
            return PackedLinear(shape, dtype, activation_dtype, form, form.pack(weight), first)
        first = first or refusal
    if q8:
        weight = dequantise(*quantise(weight))
    return PackedLinear(shape, dtype, activation_dtype, None, weight.to(activation_dtype).contiguous(), first)


def linear(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias.

    x        [rows, in], activation dtype; any number of rows, including 0
    bias     [out], activation dtype, or None
    Returns  [rows, out], activation dtype, a new contiguous tensor
    Raises   TypeError for an x of another width or dtype; torch raises in the form plain
    """
    if packed.packing is None:
        return F.linear(x, packed.data, bias)
    return packed.packing.multiply(x, packed, bias)


def embed(packed: PackedLinear, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` of a packed weight: an embedding table that the output layer shares.

    ids      int64 [rows], 0 <= id < out
    Returns  [rows, in], activation dtype, a new tensor
    """
    return F.embedding(ids, packed.data) if packed.packing is None else packed.packing.embed(packed, ids)


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
    if may_pack and weight.dtype in FORMATS and activation_dtype in FORMATS:
        return PackedHeadLinear(shape, activation_dtype, "blocks", block_kernels().pack_heads(weight))
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
        return block_kernels().multiply_heads(x.float(), packed.data, packed.shape[1]).to(x.dtype)
    return (x.transpose(0, 1) @ packed.data.transpose(1, 2)).transpose(0, 1).contiguous()


@cache
def row_invariant(
    dtype: torch.dtype,
    device: torch.device | str,
    plain: bool = False,
    widths: tuple[int, ...] = (576, 1536),
    q8: bool = False,
) -> bool:
    """Whether the bits of a row of `linear` are independent of the other rows: measured once in a process.

    dtype    of the weights; activations take `activation_dtype(device, dtype)`
    plain    as of `pack_linear`
    widths   of x, on which the form of a weight depends
    q8       whether weights have 8 bits where their width allows it
    """
    device = torch.device(device)
    noise = torch.Generator().manual_seed(0)
    activation = activation_dtype(device, dtype)
    for width in widths:
        weight = torch.randn(200, width, generator=noise).to(device, dtype)
        packed = pack_linear(weight, activation, plain=plain, q8=q8 and width % GROUP == 0)
        x = torch.randn(130, width, generator=noise).to(device, activation)
        together = linear(x, packed)
        for start, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 17), (17, 33), (33, 66), (66, 130), (5, 130)):
            if not torch.equal(linear(x[start:end], packed), together[start:end]):
                return False
    return True
