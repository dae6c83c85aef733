"""Rotary positions in config.json: rope_parameters, or rope_scaling and rope_theta of older files.

Every field in these objects changes numbers: one that is unknown, or has no meaning for the kind of scaling, is
refused. Positions of images (mrope_*) are those of text in a prompt without images.
"""

from __future__ import annotations

import math

from nanokv.layers.rotary import ROPE_KINDS, RopeConfig
from nanokv.models.config import ModelConfig
from nanokv.models.fields import Fields, shown

MOST_POSITIONS = 1 << 24
"""Positions are counted in float32, exactly up to here. The longest released context is 10,485,760."""
ORIGINAL = "original_max_position_embeddings"
_KNOWN = ("rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL, "mrope_section", "mrope_interleaved")
_OF_KIND = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_slow", "beta_fast", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
_NEUTRAL = {"factor": 1, "attention_factor": 1, "attn_factor": 1, "extrapolation_factor": 1}
"""Values with which a field changes nothing where its kind does not read it."""


def rope(fields: Fields, width: int, default_part: float | None = None) -> RopeConfig:
    """Rotary positions.

    width          dimensions of a head, or of the part of it that has positions
    default_part   of `width` that is rotated where the file does not say; None: the family rotates all of it
    """
    partial = default_part is not None
    scaling = rope_scaling(fields)
    kind = rope_kind(scaling)
    part = _stated(fields, scaling, "partial_rotary_factor", default_part if default_part is not None else 1.0)
    if part > 1 or (part != 1 and not partial):
        place = scaling if scaling.get("partial_rotary_factor") is not None else fields
        raise place.error("partial_rotary_factor", "expected at most 1" if partial else "only 1.0 is supported here")
    dim = int(width * part)
    if dim < 2 or dim % 2:
        raise fields.error("head_dim", f"{dim} dims would turn, and rotary positions turn pairs of dimensions")
    theta = _stated(fields, scaling, "rope_theta", 10000.0)
    if theta <= 1:
        raise (scaling if "rope_theta" in scaling.data else fields).error("rope_theta", "expected more than 1")
    if kind == "default":
        return RopeConfig(dim, theta)
    if kind == "yarn":
        return _yarn(fields, scaling, dim, theta)
    factor = scaling.number("factor", least=1.0)
    if kind == "linear":
        return RopeConfig(dim, theta, kind, factor)
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not low < high:
        raise scaling.error("low_freq_factor", f"expected less than high_freq_factor={high:g}")
    return RopeConfig(dim, theta, kind, factor, low, high, _original(fields, scaling))


def _yarn(fields: Fields, scaling: Fields, dim: int, theta: float) -> RopeConfig:
    """Peng et al. 2023, with the defaults of transformers."""
    original = _original(fields, scaling)
    implied = None  # DeepSeek: the ratio of the lengths, where both stand in the file
    if _states_original(fields, scaling):
        implied = max(1.0, fields.integer("max_position_embeddings", most=MOST_POSITIONS) / original)
    factor = scaling.number("factor", implied, least=1.0)
    slow, fast = scaling.number("beta_slow", 1.0), scaling.number("beta_fast", 32.0)
    if slow > fast:
        raise scaling.error("beta_slow", f"expected at most beta_fast={fast:g}")
    return RopeConfig(
        dim, theta, "yarn", factor, slow, fast, original, _yarn_amplitude(scaling, factor),
        truncate=scaling.flag("truncate", default=True),
    )  # fmt: skip


def reach(fields: Fields, config: ModelConfig) -> int:
    """The context of a model, in tokens: max_position_embeddings, or the length that YaRN scales to where it is longer.

    The recipe of Qwen's model cards adds rope_scaling and leaves max_position_embeddings alone; DeepSeek's files state
    the scaled length. For the other kinds the product of factor and original length says nothing (Llama 3.2: 262,144
    for a trained context of 131,072).
    """
    rope = config.rope
    if rope.kind != "yarn":
        return config.max_positions
    scaled = int(rope.factor * rope.original_max_positions)
    if scaled > MOST_POSITIONS:
        raise rope_scaling(fields).error(
            "factor", f"scales to {scaled} positions; at most {MOST_POSITIONS} are supported"
        )
    return max(config.max_positions, scaled)


def rope_scaling(fields: Fields) -> Fields:
    """The object with the scaling of positions: rope_parameters, or rope_scaling of older files."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    scaling = fields.inside(name)
    new, old = (
        {"rope_type" if key == "type" else key: value for key, value in one.data.items()}
        for one in (scaling, fields.inside("rope_scaling"))
    )
    if name == "rope_parameters" and not old.items() <= new.items():
        raise fields.error("rope_scaling", "rope_parameters beside it says otherwise; keep one of them")
    if any(isinstance(value, dict) for value in scaling.data.values()):
        raise fields.error(name, "positions that differ from layer to layer are not supported")
    return scaling


def rope_kind(scaling: Fields) -> str:
    """The kind of scaling, such as "yarn"; "default": positions are not scaled. Raises for a field that is not its."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("type", kind) != kind:
        raise scaling.error("type", f"rope_type={shown(kind)} beside it says otherwise; keep one of them")
    if kind not in ROPE_KINDS:
        supported = ", ".join(ROPE_KINDS)
        raise scaling.error("rope_type" if scaling.get("rope_type") else "type", f"supported are {supported}")
    for name, value in scaling.data.items():
        known = name in _KNOWN or name in _OF_KIND[kind] or _NEUTRAL.get(name) == value
        if value is not None and not known:
            raise scaling.error(name[:80], f"has no meaning for rope_type={kind!r}; remove it, or the type is another")
    return kind


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's correction of the softmax, which is flatter over longer contexts (Peng et al. 2023)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _stated(fields: Fields, scaling: Fields, name: str, default: float) -> float:
    """A number that may stand in the config, in the scaling of positions, or alike in both."""
    outer = fields.number(name, default)
    inner = scaling.number(name, outer)
    if fields.get(name) is not None and inner != outer:
        raise scaling.error(name, f"{fields.where} has {name}={shown(fields.get(name))}; keep one of them")
    return inner


def _states_original(fields: Fields, scaling: Fields) -> bool:
    return fields.get(ORIGINAL) is not None or scaling.get(ORIGINAL) is not None


def _original(fields: Fields, scaling: Fields) -> int:
    """The context before it was scaled. As in transformers: max_position_embeddings where neither object says."""
    place = fields if fields.get(ORIGINAL) is not None else scaling
    if place is fields and scaling.get(ORIGINAL, fields.get(ORIGINAL)) != fields.get(ORIGINAL):
        raise scaling.error(ORIGINAL, f"{fields.where} has another one; keep one of them")
    if not _states_original(fields, scaling):
        return fields.integer("max_position_embeddings", most=MOST_POSITIONS)
    return place.integer(ORIGINAL, most=MOST_POSITIONS)


def _yarn_amplitude(scaling: Fields, factor: float) -> float:
    """Multiplies cosines and sines."""
    if scaling.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    if not scaling.get("mscale") or not scaling.get("mscale_all_dim"):
        return yarn_mscale(factor, 1.0)
    return yarn_mscale(factor, scaling.number("mscale")) / yarn_mscale(factor, scaling.number("mscale_all_dim"))
