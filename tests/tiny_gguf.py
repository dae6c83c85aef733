"""Tiny models as GGUF files, written as llama.cpp's converter writes them, from weights as a checkpoint has them.

Written from the converter's rules (names, keys, order of rows), apart from the code under test.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from nanokv.hub.gguf_file import GGUFFile
from nanokv.text.tokenizer import byte_alphabet

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, DIM = 64, 4, 2, 96, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]
TOKENS = SPECIAL + sorted(byte_alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
Edit = Callable[[gguf.GGUFWriter], None]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights under the names of a checkpoint; rounded to bfloat16, so that a conversion loses nothing."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (HIDDEN,),
            f"{layer}.post_attention_layernorm": (HIDDEN,),
            f"{layer}.self_attn.q_proj": (HEADS * DIM, HIDDEN),
            f"{layer}.self_attn.k_proj": (KV_HEADS * DIM, HIDDEN),
            f"{layer}.self_attn.v_proj": (KV_HEADS * DIM, HIDDEN),
            f"{layer}.self_attn.o_proj": (HIDDEN, HEADS * DIM),
            f"{layer}.mlp.gate_proj": (FFN, HIDDEN),
            f"{layer}.mlp.up_proj": (FFN, HIDDEN),
            f"{layer}.mlp.down_proj": (HIDDEN, FFN),
        }
    values = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: (value.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, value in values.items()}


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def gguf_name(name: str) -> str:
    """The name of a checkpoint's tensor in a GGUF file."""
    if name.endswith(".e_score_correction_bias"):
        return f"blk.{name.split('.')[2]}.exp_probs_b.bias"
    stem, kind = name.rsplit(".", 1)
    parts = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{parts[0]}.{NAMES[parts[1]]}.{kind}" if parts[0].isdigit() else f"{NAMES[stem]}.{kind}"


def add_vocabulary(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    """The keys of the tokenizer, which has TOKENS."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def finish(writer: gguf.GGUFWriter, edit: Edit | None = None, without: tuple[str, ...] = ()) -> None:
    """Writes the file after an `edit`, leaving out the keys in `without`."""
    if edit:
        edit(writer)
    for key in without:
        for data in writer.kv_data:
            data.pop(key, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def replaced(key: str, value: object) -> Edit:
    """An edit that sets one key, of a type that it may not have."""
    kinds = {
        str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32, bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
    }  # fmt: skip

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])

    return edit


def write(
    path: Path,
    arch: str = "llama",
    seed: int = 0,
    quantise: bool = False,
    kinds: tuple[gguf.GGMLQuantizationType, ...] = (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0),
    pre: str = "smollm",
    leave_out: tuple[str, ...] = (),
    more: dict[str, np.ndarray] | None = None,
    only: set[str] | None = None,
    edit: Edit | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Writes a llama and returns weights(seed).

    quantise, kinds         store projections and other matrices in blocks of these kinds
    leave_out, more, only   tensors of the file that are left out, added, or the only ones
    edit, without           change and drop keys
    """
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM)
    add_vocabulary(writer, pre)
    values = weights(seed)
    for name, value in values.items():
        source = gguf_name(name)
        if source in leave_out or (only is not None and source not in only):
            continue
        if name.endswith("q_proj.weight"):
            value = permute(value, HEADS)
        elif name.endswith("k_proj.weight"):
            value = permute(value, KV_HEADS)
        if quantise and value.ndim == 2:
            kind = kinds[0] if "proj" in name else kinds[1]
            writer.add_tensor(source, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(source, np.ascontiguousarray(value))
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    finish(writer, edit, without)
    return values


def from_checkpoint(path: Path, folder: Path, arch: str, whole_kv_b: bool = False, edit: Edit | None = None) -> None:
    """Converts a checkpoint of transformers, whose vocabulary has as many tokens as TOKENS.

    arch         llama, qwen2, qwen3, qwen3moe or deepseek2
    whole_kv_b   write attn_kv_b and its keys as converters did until April 2025
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), arch)
    _add_shape(writer, config, arch, whole_kv_b)
    add_vocabulary(writer)
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        value = tensor.float().numpy()
        if ".mlp.experts." in name:
            parts = name.split(".")
            stacks.setdefault(".".join([*parts[:5], *parts[6:]]), {})[int(parts[5])] = value
        elif name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        elif name.endswith("kv_b_proj.weight") and not whole_kv_b:
            heads = value.reshape(config["num_attention_heads"], -1, value.shape[1])
            k, v = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            for part, rows in (("k", k.swapaxes(1, 2)), ("v", v)):
                writer.add_tensor(gguf_name(name).replace("attn_kv_b", f"attn_{part}_b"), np.ascontiguousarray(rows))
        else:
            if arch == "llama" and ".q_proj." in name:
                value = permute(value, config["num_attention_heads"])
            if arch == "llama" and ".k_proj." in name:
                value = permute(value, config["num_key_value_heads"])
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(value))
    for name, experts in stacks.items():
        writer.add_tensor(gguf_name(name), np.stack([experts[i] for i in range(len(experts))]))
    finish(writer, edit)


def _add_shape(writer: gguf.GGUFWriter, config: dict, arch: str, whole_kv_b: bool) -> None:
    """The keys of the architecture."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if arch == "qwen3moe":
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if arch != "deepseek2":
        writer.add_head_count_kv(config["num_key_value_heads"])
        if arch == "llama":
            writer.add_rope_dimension_count(
                config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            )
        if config.get("head_dim"):
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        return
    key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    if whole_kv_b:
        writer.add_head_count_kv(config["num_attention_heads"])
        writer.add_key_length(key)
        writer.add_value_length(config["v_head_dim"])
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config["v_head_dim"])
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if config["model_type"] == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def vocabulary(tokens: list[str], **fields: object) -> GGUFFile:
    """A file with a vocabulary and an embedding table only; `fields` are keys below tokenizer.ggml."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        for key, value in {"tokens": tokens, **fields}.items():
            replaced(f"tokenizer.ggml.{key}", value)(writer)
        writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 1), np.float32))
        finish(writer)
        return GGUFFile(path)
