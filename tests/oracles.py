"""Tiny random checkpoints, made with transformers, which runs them as the reference of nanokv's models.

Every 1-D parameter is perturbed after construction: transformers starts norms at 1 and biases at 0, which would hide
a norm at the wrong place or a bias that is never added.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

LLAMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}


COMMON = {
    key: LLAMA[key]
    for key in (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )
} | {"initializer_range": 0.2}  # fmt: skip


def rope(theta: float, **more) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **more}


LATENT = {
    "num_key_value_heads": 4, "intermediate_size": 128, "num_hidden_layers": 3, "q_lora_rank": 48, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# A larger spread or a faster decay would raise the error of the reference itself above the tolerance of the tests: the
# norm after the heads scales up those whose result is almost 0.
DELTA = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "initializer_range": 0.1,
    "rope_parameters": rope(1e7, partial_rotary_factor=0.25),
}  # fmt: skip
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 32}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {"intermediate_size": 128, "num_hidden_layers": 2, "rope_parameters": rope(1e5)}),
    "qwen2": ("Qwen2", {"intermediate_size": 128, "num_hidden_layers": 2, "rope_parameters": rope(1e6)}),
    "qwen3": (
        "Qwen3",
        {"intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32, "tie_word_embeddings": True,
         "rope_parameters": rope(1e6)},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 32, "norm_topk_prob": True,
         "mlp_only_layers": [1], "decoder_sparse_step": 1, "rope_parameters": rope(1e6), **EXPERTS},
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "v_head_dim": 24, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
         "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
                             "original_max_position_embeddings": 64, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**LATENT, "num_hidden_layers": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
         "rope_parameters": rope(1e4)},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**LATENT, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_interleave": True,
         "num_nextn_predict_layers": 0, "num_mtp_layers": 0,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32, "beta_slow": 1,
                             "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "qwen3_next": ("Qwen3Next", {**DELTA, **SHARED_EXPERT}),
    "qwen3_5": ("Qwen3_5", {**DELTA, "intermediate_size": 128, "tie_word_embeddings": True}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**DELTA, **SHARED_EXPERT}),
}  # fmt: skip
"""Name -> the class of transformers, and the fields of a tiny model beside COMMON."""
HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
ALIASES = {
    "mistral": (
        "Mistral",
        {"intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 24, "sliding_window": None,
         "rope_parameters": rope(1e6)},
    ),
    "qwen3_vl": ("Qwen3VL", {**FAMILIES["qwen3"][1], "rope_parameters": {**MROPE, "rope_theta": 5e6}}),
    "qwen3_vl_moe": ("Qwen3VLMoe", {**FAMILIES["qwen3_moe"][1], "rope_parameters": {**MROPE, "rope_theta": 5e6}}),
}  # fmt: skip
"""The same for families that compute what one of FAMILIES computes."""


def config_of(family: str, **fields) -> transformers.PreTrainedConfig:
    name, own = {**FAMILIES, **ALIASES}[family]
    kind = f"{name}TextConfig" if name.startswith(("Qwen3_5", "Qwen3VL")) else f"{name}Config"
    return getattr(transformers, kind)(**{**COMMON, **own, **fields})


def checkpoint(
    family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str | None = None, **fields
) -> Path:
    """Writes a tiny random model of a family into `folder` and returns it; `fields` replace those of its config."""
    torch.manual_seed(seed)
    name, _ = {**FAMILIES, **ALIASES}[family]
    model = getattr(transformers, f"{name}ForCausalLM")(config_of(family, **fields))
    return save(model, folder, seed, dtype, shard)


def vision_language(family: str, folder: Path, seed: int = 0, **fields) -> Path:
    """A vision-language checkpoint of qwen3_5, qwen3_vl or their MoE: the text model beside a tiny vision tower."""
    torch.manual_seed(seed)
    name, _ = {**FAMILIES, **ALIASES}[family]
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    text = config_of(family, **fields)
    config = getattr(transformers, f"{name}Config")(
        text_config=text.to_dict(),
        vision_config={**vision, "out_hidden_size": 64, "num_position_embeddings": 16},
        image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253,
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    return save(getattr(transformers, f"{name}ForConditionalGeneration")(config), folder, seed, torch.float32, None)


def llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str | None = None, **fields) -> Path:
    """Writes a tiny Llama into `folder` and returns it.

    fields   replace those of LLAMA
    shard    the size of a shard, such as "100KB"; None writes one file
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**LLAMA, **fields})
    return save(transformers.LlamaForCausalLM(config), folder, seed, dtype, shard)


def save(model: torch.nn.Module, folder: Path, seed: int, dtype: torch.dtype, shard: str | None) -> Path:
    """Perturbs every 1-D parameter (and the bias of V3's router), converts and writes the model."""
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # decays between 0.02 and 0.5: see DELTA
                parameter.copy_((0.02 + 0.48 * torch.rand(parameter.shape, generator=generator)).log())
            elif name.endswith("dt_bias"):
                parameter.copy_(-2 + 0.1 * noise(parameter))
            elif parameter.dim() == 1:
                parameter += 0.3 * noise(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.1 * noise(buffer)
    options = {} if shard is None else {"max_shard_size": shard}
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def reference(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint as transformers runs it; a vision-language one whole, where transformers has no text model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    kind = transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


def logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float32 [tokens, vocab] of one unpadded sequence, computed at once."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, LLAMA["vocab_size"], (length,), generator=generator).tolist()


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    """Random prompts of these lengths, and three more that share a prefix with the last one, which has 100 or more."""
    texts = [prompt(length, seed=length) for length in lengths]
    shared = texts[-1]
    return [*texts, [*shared[:100], 5, 6, 7], [*shared[:64], 9], shared[:48]]
