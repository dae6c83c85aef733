"""Fields of config.json that several families have: width of a head, layer types, rotary positions, experts.

The `read` of a family calls these functions; their arguments are the differences between families. They know no
family's name.
"""

from __future__ import annotations

import math

from nanokv.layers.rotary import ROPE_KINDS, RopeConfig
from nanokv.models.config import ATTENTION, MoEConfig
from nanokv.models.fields import Fields


def head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """The width of a head: hidden_size / num_heads where the file does not say."""
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"not a multiple of num_attention_heads={num_heads}, and no head_dim")
    return fields.integer("head_dim", default=hidden_size // num_heads)


def layer_types(fields: Fields, num_layers: int, allowed: tuple[str, ...] = (ATTENTION,)) -> tuple[str, ...]:
    """The type of each layer, one of `allowed`: attention in every layer where the file does not say."""
    types = fields.get("layer_types", [ATTENTION] * num_layers)
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in allowed for kind in types):
        raise fields.error("layer_types", f"expected {num_layers} names out of {', '.join(allowed)}")
    return tuple(types)


def intermediate_size(fields: Fields, moe: MoEConfig | None) -> int:
    """The width inside a dense feed-forward layer: a model without dense layers may leave it out, and has 0 then."""
    dense = moe is None or not all(moe.layers)
    return fields.integer("intermediate_size", default=None if dense else 0, least=1 if dense else 0)


def softmax_experts(fields: Fields, num_layers: int, shared: bool, normalise: bool = False) -> MoEConfig:
    """Experts chosen by a softmax over all of them.

    shared      whether there is a shared expert, behind a gate
    normalise   scale the weights of the chosen experts to sum to 1, whatever norm_topk_prob says
    """
    name = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    num_experts, per_token = fields.integer(name), fields.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise fields.error("num_experts_per_tok", f"more than {name}={num_experts}")
    step, dense = fields.integer("decoder_sparse_step", default=1), fields.integers("mlp_only_layers")
    return MoEConfig(
        num_experts=num_experts,
        per_token=per_token,
        width=fields.integer("moe_intermediate_size"),
        shared_width=fields.integer("shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
        normalise=normalise or fields.flag("norm_topk_prob", default=False),
    )


def rope(fields: Fields, width: int, default_part: float | None = None) -> RopeConfig:
    """Rotary positions, from rope_parameters, or from rope_scaling and rope_theta.

    width          dimensions of a head, or of the part of it that has positions
    default_part   of `width` that is rotated where the file does not say; None: the family rotates all of it
    """
    partial = default_part is not None
    scaling = rope_scaling(fields)
    kind = rope_kind(scaling)
    if kind not in ROPE_KINDS:
        raise scaling.error("type", f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    place = scaling if scaling.get("partial_rotary_factor") is not None else fields
    part = place.number("partial_rotary_factor", default=default_part if partial else 1.0)
    if part > 1 or (part != 1 and not partial):
        raise place.error("partial_rotary_factor", "expected at most 1" if partial else "only 1.0 is supported here")
    dim = int(width * part)
    if dim % 2:
        raise fields.error("head_dim", f"{dim} dims would turn, and rotary positions turn pairs of dimensions")
    theta = scaling.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    if kind == "default":
        return RopeConfig(dim, theta)
    factor = scaling.number("factor")
    if kind == "linear":
        return RopeConfig(dim, theta, kind, factor)
    original = scaling.integer("original_max_position_embeddings")
    if kind == "yarn":
        return RopeConfig(
            dim, theta, kind, factor, scaling.number("beta_slow", 1.0), scaling.number("beta_fast", 32.0), original,
            _yarn_amplitude(scaling, factor),
        )  # fmt: skip
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not low < high:
        raise scaling.error("low_freq_factor", f"expected less than high_freq_factor={high:g}")
    return RopeConfig(dim, theta, kind, factor, low, high, original)


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
    """The kind of scaling, such as "yarn"; "default": positions are not scaled."""
    return scaling.get("rope_type", scaling.get("type", "default"))


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's correction of the softmax, which is flatter over longer contexts (Peng et al. 2023)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_amplitude(scaling: Fields, factor: float) -> float:
    """Multiplies cosines and sines."""
    if scaling.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    if not scaling.get("mscale") or not scaling.get("mscale_all_dim"):
        return yarn_mscale(factor, 1.0)
    return yarn_mscale(factor, scaling.number("mscale")) / yarn_mscale(factor, scaling.number("mscale_all_dim"))
