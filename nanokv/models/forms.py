"""The forms that were chosen for a model on this machine: those of its weights, with reasons, and that of attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanokv.kernels.linear import PackedHeadLinear, PackedLinear
from nanokv.layers.attention import Attention
from nanokv.layers.mla import MLA
from nanokv.models.decoder import Decoder

_PARTS = "nanokv.models.", "nanokv.layers.", "nanokv.kernels.experts"
"""Modules of the objects that hold weights."""


@dataclass(frozen=True)
class Forms:
    """The chosen forms.

    weights     matrices by form, most first
    refusals    (form, why it is not the preferred one) -> matrices
    attention   what computes attention (Ops.attention_form), each once, in the order of the layers
    """

    weights: dict[str, int]
    refusals: dict[tuple[str, str], int]
    attention: tuple[str, ...]

    def __str__(self) -> str:
        """Such as "weights: 210 tiles, 1 pairs (width 100 is no multiple of 32); attention: tiles"."""
        parts = [f"{count} {form}{self._reasons(form)}" for form, count in self.weights.items()]
        return f"weights: {', '.join(parts)}; attention: {self.of_attention}"

    @property
    def of_weights(self) -> str:
        """Such as "210 tiles, 1 pairs"."""
        return ", ".join(f"{count} {form}" for form, count in self.weights.items())

    @property
    def of_attention(self) -> str:
        """Such as "tiles"; "none" for a model without attention."""
        return ", ".join(self.attention) or "none"

    def _reasons(self, form: str) -> str:
        mine = {why: count for (of, why), count in self.refusals.items() if of == form}
        words = [why if len(mine) == 1 else f"{why}: {count}" for why, count in mine.items()]
        return f" ({'; '.join(words)})" if words else ""


def forms_of(model: Decoder) -> Forms:
    """The forms of a bound model."""
    weights: Counter[str] = Counter()
    refusals: Counter[tuple[str, str]] = Counter()
    for packed in {id(packed): packed for packed in _packed(model)}.values():
        refusal = "one weight a head" if isinstance(packed, PackedHeadLinear) else packed.refusal
        weights[packed.form] += 1
        if refusal is not None:
            refusals[packed.form, refusal] += 1
    x = model.cos_sin.new_empty(0, dtype=model.head.packed.activation_dtype)
    pages = [layer.mixer.pages for layer in model.layers if isinstance(layer.mixer, (Attention, MLA))]
    attention = dict.fromkeys(model.norm.ops.attention_form(x, own.planes) for own in pages)
    return Forms(dict(weights.most_common()), dict(refusals), tuple(attention))


def _packed(part: Any) -> Iterator[PackedLinear | PackedHeadLinear]:
    """The packed weights below `part`; one that two parts share comes twice."""
    if isinstance(part, (PackedLinear, PackedHeadLinear)):
        yield part
    elif isinstance(part, (list, tuple)):
        for one in part:
            yield from _packed(one)
    elif type(part).__module__.startswith(_PARTS) and hasattr(part, "__dict__"):
        yield from _packed(list(vars(part).values()))
