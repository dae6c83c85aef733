"""What `nanokv size` says beyond bytes: a model's scheme beside plain multi-head and grouped-query attention.

Scalars are counted per token in one attention layer, so that neither dtype nor depth hides the scheme:

    MHA    a key and a value for each query head
    GQA    a key and a value for each KV head: the model's own number of them, or 8 where it has another scheme
    own    what the model's layers keep, read off the same layout as the bytes

A recurrent state is paid once a sequence. At `state_equals_kv_tokens` it weighs as much as all that is kept per token;
None where a model has no such state, or keeps nothing per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanokv.cli.size import CacheSize
    from nanokv.models.config import ModelConfig

USUAL_KV_HEADS = 8


def scalars(one: CacheSize) -> dict[str, Any]:
    """The comparison of one model, as keys of a row of --json."""
    config, layout = one.config, one.layout
    own = (
        config.mla.kv_rank + config.mla.rope_dim
        if config.mla is not None
        else 2 * config.num_kv_heads * config.head_dim
    )
    each = 2 * _value_dim(config)
    kv_heads = min(USUAL_KV_HEADS, config.num_heads) if config.mla is not None else config.num_kv_heads
    per_token = layout.bytes_per_token
    return {
        "attention_layers": sum(1 for spec in layout.specs if spec.paged),
        "recurrent_layers": sum(1 for spec in layout.specs if spec.state),
        "scalars_per_token_layer": own,
        "scalars_per_token_layer_mha": config.num_heads * each,
        "scalars_per_token_layer_gqa": kv_heads * each,
        "state_equals_kv_tokens": -(-layout.state_payload // per_token) if per_token and layout.is_recurrent else None,
    }


def _value_dim(config: ModelConfig) -> int:
    return config.mla.value_dim if config.mla is not None else config.head_dim


def table(sizes: list[CacheSize], contexts: list[int], count: Any, binary: Any) -> list[list[str]]:
    """One line a model, for people."""
    head = [
        "model",
        "attention + recurrent layers",
        "MHA",
        "GQA",
        "own",
        *map(count, contexts),
        "state",
        "state = KV at",
    ]
    lines = [head]
    for one in sizes:
        it = scalars(one)
        equal = it["state_equals_kv_tokens"]
        lines.append(
            [
                one.name,
                f"{it['attention_layers']} + {it['recurrent_layers']}",
                f"{it['scalars_per_token_layer_mha']:,}",
                f"{it['scalars_per_token_layer_gqa']:,}",
                f"{it['scalars_per_token_layer']:,}",
                *(binary(one.payload(tokens)) for tokens in contexts),
                binary(one.layout.state_payload) if one.layout.state_payload else "-",
                f"{equal:,} tokens" if equal else "-",
            ]
        )
    return lines


def notes(sizes: list[CacheSize]) -> Iterator[str]:
    """What a reader may stumble over."""
    yield "MHA, GQA, own: scalars per token in one attention layer; then the whole cache of one sequence (payload)"
    for one in sizes:
        mla = one.config.mla
        if mla is None:
            continue
        heads, value = one.config.num_heads, mla.value_dim
        wide = heads * (mla.nope_dim + mla.rope_dim + value)
        yield (
            f"{one.name}: {heads} heads x {value} = {heads * value:,} scalars are K or V alone; K and V are "
            f"{2 * heads * value:,}, and {wide:,} with the model's own wider keys written out"
        )
