"""Tiny valid model folders without tokenizer, one for each way in which weights are stored. Files of 10 to 60 KB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanokv.models.loader import tensors
from nanokv.models.read import read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
EXPERTS = {
    **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
LATENT = {
    **LLAMA, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def plain(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded bfloat16 noise for every tensor of a model; norms are 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tensors(read_config(config))
    noise = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (t.fill_(1) if "norm" in name else t).to(torch.bfloat16) for name, t in noise.items()}


def with_codes(weights: dict[str, torch.Tensor], nvfp4: bool) -> dict[str, torch.Tensor]:
    """The projections replaced by codes with scales beside them. The codes mean nothing."""
    stored = dict(weights)
    for name, matrix in weights.items():
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = matrix.shape
        if nvfp4:
            stored[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            stored[f"{name}_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_2"] = torch.tensor(0.5)
        else:
            stored[name] = matrix.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.ones(-(-rows // 16), -(-columns // 16))
    return stored


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of each layer in one tensor."""
    stored = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights[f"{at}.{expert}.{part}_proj.weight"] for expert in range(4)])
            for part in ("gate", "up", "down")
        )
        stored |= {f"{at}.gate_up_proj": torch.cat([gate, up], dim=1), f"{at}.down_proj": down}
    return stored


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], shards: int = 0) -> Path:
    """A folder with config.json and model.safetensors, or with so many shards and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))
    if not shards:
        save_file(weights, folder / "model.safetensors")
        return folder
    owners = {name: f"model-{place % shards}.safetensors" for place, name in enumerate(weights)}
    for file in set(owners.values()):
        save_file({name: tensor for name, tensor in weights.items() if owners[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    return folder


def seeds(root: Path) -> Iterator[Path]:
    """Writes every model below a folder and yields it."""
    yield write(root / "llama", LLAMA, plain(LLAMA))
    yield write(root / "shards", LLAMA, plain(LLAMA), shards=3)
    yield write(root / "fp8", {**QWEN3, "quantization_config": FP8}, with_codes(plain(QWEN3), nvfp4=False))
    yield write(root / "nvfp4", {**LLAMA, "quantization_config": NVFP4}, with_codes(plain(LLAMA), nvfp4=True), shards=2)
    yield write(root / "experts", EXPERTS, fused(plain(EXPERTS)))
    yield write(root / "latent", {**LATENT, "quantization_config": FP8}, with_codes(plain(LATENT), nvfp4=False))
