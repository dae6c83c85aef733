"""The three tiny models as transformers classes, an attention that trains faster on a CPU, and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from tiny.words import BOS, END, PAD

CONTEXT = 2304
SHARED: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
BLOCK = 128


def config(name: str, vocab_size: int) -> transformers.PreTrainedConfig:
    """The config of a model. Raises KeyError for an unknown name.

    tiny-gqa      heads wider than hidden / heads; two heads share K and V
    tiny-mla      DeepSeek-V3 without experts or multi-token prediction
    tiny-hybrid   three layers of Gated DeltaNet, one of attention
    """
    shared = {**SHARED, "vocab_size": vocab_size}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    if name == "tiny-gqa":
        return transformers.LlamaConfig(
            **shared, num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-5, rope_parameters=rope
        )
    if name == "tiny-mla":
        return transformers.DeepseekV3Config(
            **shared,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=128,
            qk_rope_head_dim=32,
            qk_nope_head_dim=64,
            v_head_dim=64,
            rope_interleave=True,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            # Every layer is dense, so the numbers of experts have no effect, but they must be valid.
            first_k_dense_replace=4,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=64,
            num_mtp_layers=0,
        )
    if name == "tiny-hybrid":
        return transformers.Qwen3_5TextConfig(
            **shared,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-6,
            rope_parameters={**rope, "partial_rotary_factor": 0.5},
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            linear_conv_kernel_dim=4,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        )
    raise KeyError(name)


NAMES = ("tiny-gqa", "tiny-mla", "tiny-hybrid")


def build(name: str, vocab_size: int, seed: int) -> transformers.PreTrainedModel:
    """A model with fresh weights in float32, whose attention is `blocked`."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(name, vocab_size))
    model.set_attn_implementation("blocked")
    return model


def blocked(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention in blocks of queries, each over the keys up to its end. It uses plain matrix products, whose
    backward pass is faster on a CPU than that of scaled_dot_product_attention.

    q [batch, heads, length, dim], k and v [batch, kv heads, length, dim]; returns [batch, length, heads, dim of v]
    mask   bool [batch, 1, length, length]: the earlier tokens that each token may see; None: all
    """
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    # Query heads that share K and V are rows of one matrix.
    q = (q * scaling).reshape(batch * kv_heads, heads // kv_heads, length, dim)
    k = k.reshape(batch * kv_heads, length, dim).transpose(1, 2)
    v = v.reshape(batch * kv_heads, length, -1)
    found = []
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        future = torch.full((end - start, end), float("-inf"), dtype=q.dtype).triu(start + 1)
        rows = q[:, :, start:end].reshape(batch * kv_heads, -1, dim)
        scores = (rows @ k[:, :, :end]).view(batch, -1, end - start, end) + future
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, start:end, :end], float("-inf"))
        weights = scores.softmax(-1).view(batch * kv_heads, -1, end)
        found.append((weights @ v[:, :end]).view(batch * kv_heads, -1, end - start, v.shape[-1]))
    return torch.cat(found, 2).view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("blocked", blocked)


def export(model: transformers.PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder in bfloat16 that any engine can load. The folder appears complete or not at all."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    ship = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    ship.load_state_dict(weights)
    ship.generation_config = transformers.GenerationConfig(
        do_sample=False, bos_token_id=0, eos_token_id=[2, 0], pad_token_id=3
    )
    ship.save_pretrained(new)
    (new / "model.safetensors").chmod(0o644)  # safetensors writes files that only the owner can read
    tokenizer.save(str(new / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END, "pad_token": PAD}
    described |= {"model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    (new / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (new / "chat_template.jinja").write_text(TEMPLATE)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
