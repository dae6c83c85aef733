"""Fields of config.json that several families have: width of a head, layer types, experts.

The `read` of a family calls these functions; their arguments are the differences between families. They know no
family's name.
"""

from __future__ import annotations

from nanokv.models.config import ATTENTION, MoEConfig
from nanokv.models.fields import Fields

MOST_HEAD_DIM = 4096
"""The widest head of a released model has 576 dimensions."""
MOST_EXPERTS = 1 << 16
"""Of all layers together. The largest released model has 23,040."""


def head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """The width of a head: hidden_size / num_heads where the file does not say."""
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"not a multiple of num_attention_heads={num_heads}, and no head_dim")
    return fields.integer("head_dim", default=hidden_size // num_heads, most=MOST_HEAD_DIM)


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
    num_experts, per_token = count_experts(fields, name, num_layers), fields.integer("num_experts_per_tok")
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


def count_experts(fields: Fields, name: str, num_layers: int) -> int:
    """The experts of a layer. Each expert of each layer is built, so that all of them together have a bound."""
    return fields.integer(name, most=MOST_EXPERTS // num_layers)
