"""The config.json of the checkpoint that a GGUF file was made from, for each architecture that is read.

A key that a file lacks means what llama.cpp takes it to mean (its load_hparams, and load_arch_hparams of each model).
A key that would change the numbers in a way that nanokv does not compute is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nanokv.core.errors import PullError
from nanokv.hub.gguf_file import GGUFFile
from nanokv.hub.gguf_tokens import special_id

SUPPORTED = ("llama", "qwen2", "qwen3", "qwen3moe", "deepseek2")
"""Architectures by llama.cpp's names. Files of Mistral have the architecture llama."""
SOFTMAX, SIGMOID = 1, 2
"""expert_gating_func of llama.cpp."""
MOST_EXPERTS, MOST_POSITIONS = 1 << 12, 1 << 24
"""Bounds of counts that no tensor's shape bounds."""


def read_config(file: GGUFFile) -> dict:
    """The config.json of the checkpoint that the file was made from.

    Raises PullError naming the key or tensor that is missing, or the feature that is not supported.
    """
    arch = file.text("general.architecture")
    if arch not in SUPPORTED:
        raise PullError(
            f"{file.path}: architecture {arch!r:.60} is not supported; supported are {', '.join(SUPPORTED)}"
        )
    if arch in ("llama", "qwen2", "qwen3") and file.integer(f"{arch}.expert_count", 0):
        raise PullError(f"{file.path}: a mixture of experts is not supported in the architecture {arch}")
    if "token_embd.weight" not in file.tensor_names:
        raise PullError(f"{file.path}: tensor token_embd.weight is missing")
    layers = file.integer(f"{arch}.block_count", least=1)
    last = f"blk.{layers - 1}.attn_norm.weight"
    if last not in file.tensor_names or layers > len(file.tensor_names):
        raise PullError(f"{file.path}: {arch}.block_count={layers}, but tensor {last} is missing")
    return _deepseek(file, layers) if arch == "deepseek2" else _grouped(file, arch, layers)


def _common(file: GGUFFile, arch: str, family: str, name: str, layers: int) -> dict[str, Any]:
    """The fields of all families, but for the heads and the positions."""
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        "vocab_size": file.shape("token_embd.weight")[0],
        "hidden_size": file.integer(f"{arch}.embedding_length", least=1),
        "intermediate_size": file.per_layer(f"{arch}.feed_forward_length", 1 if arch == "qwen3moe" else None),
        "num_hidden_layers": layers,
        "num_attention_heads": file.per_layer(f"{arch}.attention.head_count"),
        "hidden_act": "silu",
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.integer(f"{arch}.context_length", least=1, most=MOST_POSITIONS),
        "tie_word_embeddings": "output.weight" not in file.tensor_names,
        "bos_token_id": special_id(file, "bos"),
        "eos_token_id": _eos_ids(file),
        "pad_token_id": special_id(file, "padding"),
        "torch_dtype": "bfloat16",
    }


def _grouped(file: GGUFFile, arch: str, layers: int) -> dict[str, Any]:
    """llama, qwen2, qwen3 and qwen3moe: grouped-query attention in every layer.

    Biases on q, k and v alone are Qwen2's; in the architecture llama, biases on the output and in the feed-forward
    layers are possible too.
    """
    family, name = {"qwen3": ("qwen3", "Qwen3"), "qwen3moe": ("qwen3_moe", "Qwen3Moe")}.get(arch, ("llama", "Llama"))
    biased = {part for part in ("q", "k", "v", "output") if f"blk.0.attn_{part}.bias" in file.tensor_names}
    if family == "llama" and biased == {"q", "k", "v"}:
        family, name = "qwen2", "Qwen2"
    config = _common(file, arch, family, name, layers)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    dim = file.integer(f"{arch}.attention.key_length", hidden // heads, least=1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.integer(f"{arch}.{key}", dim) != dim:
            raise PullError(f"{file.path}: {arch}.{key} differs from the head size {dim}")
    if dim % 2:
        raise PullError(f"{file.path}: the head size {dim} is odd, and positions turn pairs of numbers")
    config["num_key_value_heads"] = file.per_layer(f"{arch}.attention.head_count_kv", heads)
    config["head_dim"] = dim
    config["rope_theta"] = file.number(f"{arch}.rope.freq_base", 10000.0)
    config["rope_scaling"] = _rope_scaling(file, arch, config, dim)
    if family == "llama":
        config["attention_bias"] = "output" in biased and len(biased) == 4
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensor_names
    if family == "qwen3_moe":
        config |= _softmax_experts(file, config["intermediate_size"])
    return config


def _softmax_experts(file: GGUFFile, inner: int) -> dict[str, Any]:
    """The experts of qwen3moe, in every layer; llama.cpp always normalises the weights of the chosen ones."""
    chosen = file.integer("qwen3moe.expert_used_count", least=1)
    return {
        "num_experts": file.integer("qwen3moe.expert_count", least=1, most=MOST_EXPERTS),
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": file.integer("qwen3moe.expert_feed_forward_length", inner // chosen, least=1),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def _deepseek(file: GGUFFile, layers: int) -> dict[str, Any]:
    """deepseek2: multi-head latent attention. Scores by a softmax are DeepSeek-V2's, by sigmoids V3's.

    Older files hold attn_kv_b whole; then key_length is that of a head, and not of a latent with its rotated part.
    """
    gating = file.integer("deepseek2.expert_gating_func", SOFTMAX)
    if gating not in (0, SOFTMAX, SIGMOID):
        raise PullError(f"{file.path}: deepseek2.expert_gating_func={gating} is not supported; 1 and 2 are")
    if file.has("deepseek2.attention.temperature_scale"):
        raise PullError(f"{file.path}: deepseek2.attention.temperature_scale is not supported")
    version = 3 if gating == SIGMOID else 2
    config = _common(file, "deepseek2", f"deepseek_v{version}", f"DeepseekV{version}", layers)
    rank = file.integer("deepseek2.attention.kv_lora_rank", least=1)
    rope = file.integer("deepseek2.rope.dimension_count", least=1)
    split = "_mla" if file.has("deepseek2.attention.key_length_mla") else ""
    key = file.integer(f"deepseek2.attention.key_length{split}", least=rope + 1)
    direct = "blk.0.attn_q.weight" in file.tensor_names
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": None if direct else file.integer("deepseek2.attention.q_lora_rank", least=1),
        "kv_lora_rank": rank,
        "qk_nope_head_dim": key - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": file.integer(f"deepseek2.attention.value_length{split}", least=1),
        "rope_theta": file.number("deepseek2.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, "deepseek2", config, rope),
        "attention_bias": False,
        **_routed_experts(file, layers, version),
    }
    return config


def _routed_experts(file: GGUFFile, layers: int, version: int) -> dict[str, Any]:
    """The experts of deepseek2, after a few dense layers; a model may have dense layers only."""
    if not (experts := file.integer("deepseek2.expert_count", 0, most=MOST_EXPERTS)):
        return {"first_k_dense_replace": layers}
    normalise = file.flag("deepseek2.expert_weights_norm", False)
    if version == 2 and normalise:
        raise PullError(f"{file.path}: deepseek2.expert_weights_norm is not supported with expert_gating_func=1")
    groups = file.integer("deepseek2.expert_group_count", 1) or 1
    fields = {
        "first_k_dense_replace": min(file.integer("deepseek2.leading_dense_block_count", 0), layers),
        "n_routed_experts": experts,
        "num_experts_per_tok": file.integer("deepseek2.expert_used_count", least=1),
        "n_shared_experts": file.integer("deepseek2.expert_shared_count", 0, most=MOST_EXPERTS),
        "moe_intermediate_size": file.integer("deepseek2.expert_feed_forward_length", least=1),
        "routed_scaling_factor": _scale(file, "deepseek2.expert_weights_scale"),
        "norm_topk_prob": normalise,
        "n_group": groups,
        "topk_group": file.integer("deepseek2.expert_group_used_count", 1, least=1) if groups > 1 else 1,
    }
    if version == 2:
        return {**fields, "topk_method": "group_limited_greedy" if groups > 1 else "greedy"}
    return {**fields, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def _eos_ids(file: GGUFFile) -> int | list[int] | None:
    """The ids that keys name; generation_config.json has those that llama.cpp finds by name too."""
    ids = list(dict.fromkeys(i for key in ("eos", "eot", "eom") if (i := special_id(file, key)) is not None))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _scale(file: GGUFFile, key: str) -> float:
    """A factor of which 0 means none, as if the key were missing."""
    return 1.0 if file.is_zero(key) else file.number(key, 1.0)


def _rope_scaling(file: GGUFFile, arch: str, config: dict, dim: int) -> dict | None:
    """Scaled positions: linear where the file names a factor and no type, as in files of 2023.

    config   has rope_theta and max_position_embeddings
    dim      of a head that turn
    """
    kind = file.text(f"{arch}.rope.scaling.type", "linear")
    factor = _scale(file, f"{arch}.rope.scaling.factor")
    if not file.has(f"{arch}.rope.scaling.factor"):
        factor = _scale(file, f"{arch}.rope.scale_linear")  # the key of files before August 2023
    if kind not in ("none", "linear", "yarn"):
        raise PullError(
            f"{file.path}: rope scaling {kind!r:.60} is not supported; none, linear, yarn and Llama 3's are"
        )
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if file.has(f"{arch}.rope.scaling.{name}") and _scale(file, f"{arch}.rope.scaling.{name}") != 1:
            raise PullError(f"{file.path}: {arch}.rope.scaling.{name} is not supported, but for 1")
    divisors = arch == "llama" and "rope_freqs.weight" in file.tensor_names
    if kind == "none" or factor == 1:
        return _llama3(file, file.number(f"{arch}.rope.freq_base", 10000.0), dim) if divisors else None
    if divisors:
        raise PullError(f"{file.path}: rope_freqs.weight beside {arch}.rope.scaling.factor={factor:g} is not supported")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.integer(
            f"{arch}.rope.scaling.original_context_length", config["max_position_embeddings"], 1, MOST_POSITIONS
        ),
        "beta_fast": file.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
    }
    if arch == "deepseek2":  # the converter multiplies mscale_all_dim by 0.1, and takes mscale to be equal
        mscale = float(str(np.float32(file.number("deepseek2.rope.scaling.yarn_log_multiplier") * 10)))
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _llama3(file: GGUFFile, theta: float, dim: int) -> dict:
    """Llama 3's scaling, of which GGUF stores a divisor for each frequency instead of the parameters."""
    divisors = file.tensor("rope_freqs.weight")
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    low, high, original = llama3.values()
    factor = float(divisors.max())
    turns = original * theta ** -(np.arange(0, dim, 2) / dim) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else smooth
    if divisors.shape != smooth.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise PullError(f"{file.path}: rope_freqs.weight does not follow Llama 3's scaling, the only one supported")
    return {"rope_type": "llama3", "factor": factor, **llama3}
