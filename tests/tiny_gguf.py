"""A tiny llama as a GGUF file, written as llama.cpp's converter writes it, and its weights as a checkpoint has them."""

from pathlib import Path

import gguf
import numpy as np

from nanokv.text.tokenizer import byte_alphabet

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, DIM = 64, 4, 2, 96, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]
TOKENS = SPECIAL + sorted(byte_alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


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
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(
    path: Path,
    arch: str = "llama",
    seed: int = 0,
    quantise: bool = False,
    pre: str = "smollm",
    leave_out: tuple[str, ...] = (),
    more: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes the file and returns weights(seed). `leave_out` names tensors of the file, `more` adds some."""
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    values = weights(seed)
    for name, value in values.items():
        parts = name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)
        source = f"blk.{parts[0]}.{NAMES[parts[1]]}" if parts[0].isdigit() else NAMES[name.removesuffix(".weight")]
        if f"{source}.weight" in leave_out:
            continue
        if name.endswith("q_proj.weight"):
            value = permute(value, HEADS)
        elif name.endswith("k_proj.weight"):
            value = permute(value, KV_HEADS)
        if quantise and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1 if "proj" in name else gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{source}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{source}.weight", np.ascontiguousarray(value))
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
