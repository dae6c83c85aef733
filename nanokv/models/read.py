"""config.json of every family into ModelConfig. Knows JSON and the habits of each family; knows no tensors.

Reads the files of transformers 4 (rope_theta and rope_scaling, torch_dtype) and 5 (rope_parameters, dtype), and the
text part of vision-language models. A field that shapes a tensor has no default: a file without it is refused, not
guessed at.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nanokv.core.errors import CheckpointError
from nanokv.layers.deltanet import DeltaConfig
from nanokv.layers.mla import MLAConfig
from nanokv.layers.rotary import ROPE_KINDS, RopeConfig
from nanokv.models import FAMILIES
from nanokv.models.config import ATTENTION, GATED_DELTA, ModelConfig, MoEConfig
from nanokv.models.fields import Fields, read_json

DTYPES = ("float32", "bfloat16", "float16")
DEEPSEEK = ("deepseek_v2", "deepseek_v3")


def read_folder(folder: Path) -> ModelConfig:
    """Reads config.json and, for eos ids, generation_config.json. Raises CheckpointError naming file and field."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and *.safetensors")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a model folder holds config.json and *.safetensors")
    generation = folder / "generation_config.json"
    more_eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    return read_config(read_json(path), str(path), more_eos)


def read_config(data: dict[str, Any], where: str, more_eos: Any = None) -> ModelConfig:
    """The content of a config.json; `more_eos` is generation_config.json's."""
    outer = Fields(data, where)
    family = _family(outer)
    for part in (outer, outer.inside("text_config")):
        if part.get("quantization_config") is not None:
            method = part.get("quantization_config")
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            raise part.error("quantization_config", f"{method!r} weights are not supported; use the plain checkpoint")
    fields = outer.inside("text_config") if outer.get("text_config") is not None else outer
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "only 'silu' is supported")
    if fields.flag("use_sliding_window", default=False):
        raise fields.error("use_sliding_window", "attention over a window is not supported")
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"does not divide num_attention_heads={num_heads}")
    hybrid = family.startswith(("qwen3_next", "qwen3_5"))
    mla = _mla(fields, family, num_kv_heads == num_heads) if family in DEEPSEEK else None
    head_dim = mla.nope_dim + mla.rope_dim if mla else _head_dim(fields, hidden_size, num_heads)
    vocab_size = fields.integer("vocab_size")
    num_layers = fields.integer("num_hidden_layers")
    moe = _moe(fields, family, num_layers)
    dense = moe is None or not all(moe.layers)
    rope = _rope(fields, mla.rope_dim if mla else head_dim, hybrid)
    bos = fields.token_ids("bos_token_id", vocab_size)
    attention_bias = fields.flag("attention_bias", default=False)
    if attention_bias and (mla or hybrid):
        raise fields.error("attention_bias", "only false is supported in this family")
    tied = outer if outer.get("tie_word_embeddings") is not None else fields  # both levels may exist; the top one holds
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", default=None if dense else 0, least=1 if dense else 0),
        num_layers=num_layers,
        layer_types=_layer_types(fields, num_layers, hybrid),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qk_norm=hybrid or family.startswith("qwen3"),
        output_gate=hybrid,
        norm_offset=1.0 if hybrid else 0.0,
        norm_eps=fields.number("rms_norm_eps"),
        rope=rope,
        softmax_scale=head_dim**-0.5 * (_yarn_softmax(fields) if mla else 1.0),
        max_positions=fields.integer("max_position_embeddings"),
        tie_embeddings=tied.flag("tie_word_embeddings", default=False),
        attention_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
        mla=mla,
        moe=moe,
        delta=_delta(fields) if hybrid else None,
        num_extra_layers=fields.integer("num_nextn_predict_layers", default=0, least=0),
        eos_token_ids=_eos(fields, more_eos, vocab_size),
        bos_token_id=bos[0] if bos else None,
        dtype=_dtype(fields) or _dtype(outer),
    )


def _family(fields: Fields) -> str:
    """The model_type, if both it and the architecture are known and belong together."""
    model_type = fields.get("model_type")
    architectures = fields.get("architectures", [])
    known = ", ".join(f"{name} ({architecture})" for name, (architecture, _) in FAMILIES.items())
    if not isinstance(architectures, list):
        raise fields.error("architectures", "expected a list of names")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = f"model_type={model_type!r}" + (f" ({architectures})" if architectures else "")
        raise CheckpointError(f"{fields.where}: {named} is not supported; supported are {known}")
    if architectures and FAMILIES[model_type][0] not in architectures:
        raise fields.error("architectures", f"not supported for model_type {model_type!r}; supported are {known}")
    return model_type


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"not a multiple of num_attention_heads={num_heads}, and no head_dim")
    return fields.integer("head_dim", default=hidden_size // num_heads)


def _layer_types(fields: Fields, num_layers: int, hybrid: bool) -> tuple[str, ...]:
    """From layer_types, or every full_attention_interval-th layer; all attention in the other families."""
    types = fields.get("layer_types")
    if types is None and hybrid:
        interval = fields.integer("full_attention_interval", default=4)
        types = [GATED_DELTA if (i + 1) % interval else ATTENTION for i in range(num_layers)]
    types = types if types is not None else [ATTENTION] * num_layers
    allowed = (ATTENTION, GATED_DELTA) if hybrid else (ATTENTION,)
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in allowed for kind in types):
        raise fields.error("layer_types", f"expected {num_layers} names out of {', '.join(allowed)}")
    return tuple(types)


def _mla(fields: Fields, family: str, one_each: bool) -> MLAConfig:
    if not one_each:
        raise fields.error("num_key_value_heads", "expected num_attention_heads: keys come out of the latent")
    return MLAConfig(
        q_rank=fields.integer("q_lora_rank", default=0, least=0) or None,
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        interleaved=family == "deepseek_v2" or fields.flag("rope_interleave", default=True),
    )


def _moe(fields: Fields, family: str, num_layers: int) -> MoEConfig | None:
    if family in DEEPSEEK:
        return _deepseek_moe(fields, family, num_layers)
    if not family.removesuffix("_text").endswith("moe") and family != "qwen3_next":
        return None
    name = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    num_experts, per_token = fields.integer(name), fields.integer("num_experts_per_tok")
    if per_token > num_experts:
        raise fields.error("num_experts_per_tok", f"more than {name}={num_experts}")
    step, dense = fields.integer("decoder_sparse_step", default=1), fields.integers("mlp_only_layers")
    shared = family != "qwen3_moe"
    return MoEConfig(
        num_experts=num_experts,
        per_token=per_token,
        width=fields.integer("moe_intermediate_size"),
        shared_width=fields.integer("shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
        scoring="softmax",
        normalise=family.startswith("qwen3_5") or fields.flag("norm_topk_prob", default=False),
        scale=1.0,
        num_groups=1,
        top_groups=1,
    )


def _deepseek_moe(fields: Fields, family: str, num_layers: int) -> MoEConfig | None:
    first, step = fields.integer("first_k_dense_replace", default=0, least=0), fields.integer("moe_layer_freq", 1)
    layers = tuple(i >= first and i % step == 0 for i in range(num_layers))
    if not any(layers):
        return None
    v3 = family == "deepseek_v3"
    method = "noaux_tc" if v3 else fields.choice("topk_method", "greedy", ("greedy", "group_limited_greedy"))
    grouped = method != "greedy"
    num_experts, per_token = fields.integer("n_routed_experts"), fields.integer("num_experts_per_tok")
    num_groups = fields.integer("n_group") if grouped else 1
    top_groups = fields.integer("topk_group") if grouped else 1
    if num_experts % num_groups or top_groups > num_groups:
        raise fields.error("n_group", f"does not divide {num_experts} experts into groups of which {top_groups} stay")
    if per_token > num_experts // num_groups * top_groups:
        raise fields.error("num_experts_per_tok", "more than the groups that stay have experts")
    fields.choice("scoring_func", "sigmoid" if v3 else "softmax", ("sigmoid",) if v3 else ("softmax",))
    width = fields.integer("moe_intermediate_size")
    return MoEConfig(
        num_experts=num_experts,
        per_token=per_token,
        width=width,
        shared_width=width * fields.integer("n_shared_experts", default=0, least=0),
        shared_gate=False,
        layers=layers,
        scoring="sigmoid" if v3 else "softmax",
        normalise=v3 and fields.flag("norm_topk_prob", default=True),  # transformers does not normalise in V2
        scale=fields.number("routed_scaling_factor", default=1.0),
        num_groups=num_groups,
        top_groups=top_groups,
    )


def _delta(fields: Fields) -> DeltaConfig:
    key_heads, value_heads = fields.integer("linear_num_key_heads"), fields.integer("linear_num_value_heads")
    if value_heads % key_heads:
        raise fields.error("linear_num_value_heads", f"not a multiple of linear_num_key_heads={key_heads}")
    return DeltaConfig(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=fields.integer("linear_key_head_dim"),
        value_dim=fields.integer("linear_value_head_dim"),
        kernel=fields.integer("linear_conv_kernel_dim", least=2),
    )


def _rope_fields(fields: Fields) -> Fields:
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    rope = fields.inside(name)
    new, old = (
        {"rope_type" if key == "type" else key: value for key, value in one.data.items()}
        for one in (rope, fields.inside("rope_scaling"))
    )
    if name == "rope_parameters" and not old.items() <= new.items():
        raise fields.error("rope_scaling", "rope_parameters beside it says otherwise; keep one of them")
    if any(isinstance(value, dict) for value in rope.data.values()):
        raise fields.error(name, "positions that differ from layer to layer are not supported")
    return rope


def _rope(fields: Fields, width: int, partial: bool) -> RopeConfig:
    """From rope_parameters, or from rope_scaling and rope_theta beside it; `width` dims of which a part may turn."""
    rope = _rope_fields(fields)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise rope.error("type", f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    place = rope if rope.get("partial_rotary_factor") is not None else fields
    factor = place.number("partial_rotary_factor", default=0.25 if partial else 1.0)
    if factor > 1 or (factor != 1 and not partial):
        raise place.error("partial_rotary_factor", "expected at most 1" if partial else "only 1.0 is supported here")
    dim = int(width * factor)
    if dim % 2:
        raise fields.error("head_dim", f"{dim} dims would turn, and rotary positions turn pairs of dimensions")
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    if kind == "default":
        return RopeConfig(dim, theta)
    factor = rope.number("factor")
    if kind == "linear":
        return RopeConfig(dim, theta, kind, factor)
    original = rope.integer("original_max_position_embeddings")
    if kind == "yarn":
        return RopeConfig(
            dim, theta, kind, factor, rope.number("beta_slow", 1.0), rope.number("beta_fast", 32.0), original,
            _yarn_amplitude(rope, factor),
        )  # fmt: skip
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise rope.error("low_freq_factor", f"expected less than high_freq_factor={high:g}")
    return RopeConfig(dim, theta, kind, factor, low, high, original)


def _mscale(factor: float, mscale: float) -> float:
    """How YaRN makes up for the softmax growing flatter over longer contexts (Peng et al. 2023)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_amplitude(rope: Fields, factor: float) -> float:
    """What cosines and sines are multiplied with."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if not mscale or not all_dims:
        return _mscale(factor, 1.0)
    return _mscale(factor, rope.number("mscale")) / _mscale(factor, rope.number("mscale_all_dim"))


def _yarn_softmax(fields: Fields) -> float:
    """What DeepSeek multiplies the scale of scores with, where positions are stretched."""
    rope = _rope_fields(fields)
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not rope.get("mscale_all_dim"):
        return 1.0
    return _mscale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2


def _eos(fields: Fields, more: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids of both files, each once, in order."""
    added = Fields({"eos_token_id": more}, f"{Path(fields.where).parent / 'generation_config.json'}")
    ids = fields.token_ids("eos_token_id", vocab_size) + added.token_ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids))


def _dtype(fields: Fields) -> str | None:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return None
    plain = value.removeprefix("torch.") if isinstance(value, str) else value
    if plain not in DTYPES:
        raise fields.error(name, f"not supported; supported are {', '.join(DTYPES)}")
    return plain
