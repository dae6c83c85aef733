"""Ops: each op of the engine by name, and the choice of the implementation that runs.

    Ops("auto")         the device of the tensor decides: numba (`cpu/`), Triton (`cuda/`), else torch (`reference/`)
    Ops("reference")    torch on every device: readable, and a debugger can step through it

A model is built with one Ops, which its layers and pages keep. No switch is global: two models of one process may
differ. numba and triton are imported at the first call that needs them, so `import nanokv` is cheap and the reference
kernels need neither.

Ops with a single implementation are plain functions in `kernels.reference`, products with packed weights in
`kernels.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from inspect import Parameter, signature
from types import ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from nanokv.core.config import KERNELS
from nanokv.core.errors import ConfigError
from nanokv.kernels import linear, reference
from nanokv.kernels.experts import Experts
from nanokv.kernels.linear import PackedHeadLinear, PackedLinear
from nanokv.kernels.planes import CodePlanes, KVPlanes

P = ParamSpec("P")
R = TypeVar("R")


@cache
def _numba() -> ModuleType:
    from nanokv.kernels import cpu

    return cpu


@cache
def _triton() -> ModuleType:
    from nanokv.kernels import cuda

    return cuda


def op(name: str, specification: Callable[P, R]) -> Callable[Concatenate[Ops, P], R]:
    """A method that calls the selected implementation of `name`.

    specification   the reference implementation: the method has its signature and its docstring
    """

    def call(self: Ops, tensor: torch.Tensor, /, *rest: Any, **named: Any) -> Any:
        return getattr(self.implementations(tensor), name)(tensor, *rest, **named)

    first, own = Parameter("self", Parameter.POSITIONAL_ONLY), signature(specification)
    method: Any = wraps(specification)(call)
    method.__signature__ = own.replace(parameters=[first, *own.parameters.values()])
    return method


@dataclass(frozen=True)
class Ops:
    """The ops. All tensors of one call are on one device.

    kernels   "auto" or "reference"
    Raises    ConfigError for any other choice
    """

    kernels: str = "auto"

    def __post_init__(self) -> None:
        if self.kernels not in KERNELS:
            raise ConfigError(f"kernels={self.kernels!r}: allowed are {', '.join(KERNELS)}")

    @property
    def are_reference(self) -> bool:
        return self.kernels == "reference"

    @property
    def are_recordable(self) -> bool:
        """Whether a CUDA graph can record the ops of a decode step; the reference kernels read sizes on the host."""
        return not self.are_reference

    def implementations(self, tensor: torch.Tensor) -> ModuleType:
        """The module whose functions compute on this tensor."""
        if self.are_reference:
            return reference
        if tensor.is_cpu:
            return _numba()
        return _triton() if tensor.is_cuda else reference

    rms_norm = op("rms_norm", reference.rms_norm)
    add_rms_norm = op("add_rms_norm", reference.add_rms_norm)
    gated_rms_norm = op("gated_rms_norm", reference.gated_rms_norm)
    silu_mul = op("silu_mul", reference.silu_mul)
    sigmoid_mul = op("sigmoid_mul", reference.sigmoid_mul)
    cast = op("cast", reference.cast)

    rope = op("rope", reference.rope)
    rope_and_store = op("rope_and_store", reference.rope_and_store)
    store_latent = op("store_latent", reference.store_latent)
    store_codes = op("store_codes", reference.store_codes)
    refuse_unwritable = op("refuse_unwritable", reference.refuse_unwritable)
    paged_attention = op("paged_attention", reference.paged_attention)
    code_attention = op("code_attention", reference.code_attention)
    group_attention = op("group_attention", reference.group_attention)

    short_conv = op("short_conv", reference.short_conv)
    delta_rule_step = op("delta_rule_step", reference.delta_rule_step)
    delta_rule_chunk = op("delta_rule_chunk", reference.delta_rule_chunk)

    def pack_linear(self, weight: torch.Tensor, activation_dtype: torch.dtype, q8: bool = False) -> PackedLinear:
        """`linear.pack_linear`; the reference choice keeps the weight as it is, with `q8` the decoded one."""
        return linear.pack_linear(weight, activation_dtype, self.are_reference, q8)

    def pack_head_linear(self, weight: torch.Tensor, activation_dtype: torch.dtype) -> PackedHeadLinear:
        """`linear.pack_head_linear`; the reference choice keeps the weight as it is."""
        return linear.pack_head_linear(weight, activation_dtype, plain=self.are_reference)

    def attention_form(self, x: torch.Tensor, planes: KVPlanes | CodePlanes | None) -> str:
        """The form of attention: "tiles" or "float32" over raw pages, "codes" over coded ones, "decoded" over pages
        that are decoded first; "reference", "triton".

        x        of the activations' dtype and device
        planes   of keys and values in a page; None: pages are decoded
        """
        module = self.implementations(x)
        if module is reference or x.is_cuda:
            return "reference" if module is reference else "triton"
        if not isinstance(planes, KVPlanes):
            return "decoded" if planes is None else "codes"
        from nanokv.kernels.cpu.tile_attention import is_for

        return "tiles" if is_for(x, planes) else "float32"

    def row_invariant(
        self, dtype: torch.dtype, device: torch.device | str, widths: tuple[int, ...], q8: bool = False
    ) -> bool:
        """`linear.row_invariant` of the weights that this choice packs."""
        return linear.row_invariant(dtype, device, self.are_reference, widths, q8)

    def add_experts(
        self, out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, experts: Experts
    ) -> None:
        """out += the weighted results of each row's experts: silu(gate) * up, then down. IN PLACE.

        The loop below takes the rows of one expert after the other, so the experts of a row are added in the order of
        their ids. It waits for the counts on the host; the Triton kernels sort all pairs of a row and an expert
        instead and multiply them at once.

        out, x    [rows, width]
        weights   float32 [rows, per_token]
        chosen    int64 [rows, per_token]: the experts of a row, each at most once
        Source    Shazeer et al. 2017
        """
        if x.is_cuda and not self.are_reference:
            _triton().add_experts(out, x, weights, chosen, experts)
            return
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        rows, factors = order // chosen.shape[1], weights.flatten()[order].to(x.dtype).unsqueeze(1)
        first = 0
        for expert, count in enumerate(flat.bincount().tolist()):
            if count:
                own = slice(first, first + count)
                hidden = self.silu_mul(linear.linear(x[rows[own]], experts.gate_up[expert]))
                out.index_add_(0, rows[own], linear.linear(hidden, experts.down[expert]) * factors[own])
                first += count


AUTO = Ops("auto")
"""The choice for a caller that has none."""
