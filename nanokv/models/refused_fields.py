"""Fields that would change a model's numbers and that no family here computes: one line refuses each.

They come from other families whose tensors have the same names and shapes, so that no missing tensor betrays them.
"""

from __future__ import annotations

import math
from typing import Any

from nanokv.models.config import ModelConfig
from nanokv.models.fields import Fields, shown

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "use_sliding_window": (False,),
    "sliding_window_pattern": (),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_soft_cap": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "clip_qkv": (),
    "swiglu_limit": (),
    "alibi": (False,),
    "position_embedding_type": ("rope", "rotary"),
    "rope_interleaved": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "attn_temperature_tuning": (False,),
    "no_rope_layer_interval": (0,),
    "index_topk": (),
    "mamba_ssm_dtype": ("float32",),
    "output_gate_type": ("swish",),
}
"""Field -> the values with which it changes nothing, beside null."""


def refuse(fields: Fields, config: ModelConfig) -> None:
    """Raises CheckpointError for the first field that asks for other numbers than a model of `config` computes."""
    scale, window = config.softmax_scale, fields.get("sliding_window")
    is_wide = isinstance(window, int) and window >= config.max_positions  # no key ever leaves it
    neutral = NEUTRAL | {
        "sliding_window": (window,) if fields.get("use_sliding_window") is not None or is_wide else (),
        "use_qk_norm": (config.qk_norm,),
        "qkv_bias": (config.attention_bias or config.qkv_bias,),
        "attn_output_gate": (config.delta is not None,),
        "no_rope_layers": ([], [1] * config.num_layers),
        "query_pre_attn_scalar": _near(fields, "query_pre_attn_scalar", scale**-2),
        "attention_multiplier": _near(fields, "attention_multiplier", scale),
    }
    for name, values in neutral.items():
        value = fields.get(name)
        if value is not None and value not in values:
            only = f"only {' and '.join(map(shown, values))} is supported" if values else "not supported"
            raise fields.error(name, only)


def _near(fields: Fields, name: str, expected: float) -> tuple[Any, ...]:
    """The value of a field, where it is the expected number but for rounding."""
    value = fields.get(name)
    return (value,) if isinstance(value, (int, float)) and math.isclose(value, expected, rel_tol=1e-6) else ()
